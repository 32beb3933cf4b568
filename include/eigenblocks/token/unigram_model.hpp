// A unigram language model over byte pieces, the model of BytePiece and of unigram tokenizers.
//
//   UnigramModel model = UnigramModel::from_counts({{"a", 3, 5}, {"ab", 4, 2}, {"b", 5, 7}});   // bytes, id, count
//   const std::vector<std::pair<std::string, double>> counts = {{"a", 5}, {"ab", 2}};
//   UnigramModel numbered = UnigramModel::from_counts(counts);                                   // ids 3, 4, .. by length, then bytes
//   model.log_prob(p)      log c(p) - log(sum of all counts): two logarithms and one subtraction, in double
//   model.find("ab")       the piece as an index in [0, size()), or ByteTrie::kNone
//
// A segmentation of a text into pieces y has the score S(y) = sum of log_prob.  Encoding: viterbi.hpp; all segmentations at
// once: lattice.hpp.
//
// Ids 0, 1, 2 are <pad>, <bos>, <eos>; pieces have ids from 3 up, any order, gaps allowed.  Pieces are indexed by falling
// count, so that what is read often lies together; ids are only looked up for pieces that are put out.
// Errors (invalid_argument, naming the piece): empty piece, a piece or an id that occurs twice, id outside [3, 2^31), count
// that is not positive and finite.  Not every byte need be a piece: see covers_all_bytes().
// Sources: BytePiece 0.6.3 (https://kexue.fm/archives/9752); T. Kudo, arXiv 1804.10959.
#pragma once

#include <eigenblocks/token/trie.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

using TokenId = std::int32_t;

inline constexpr TokenId kPadId = 0, kBosId = 1, kEosId = 2, kFirstPieceId = 3;

struct UnigramPiece {
  std::string bytes;
  TokenId id = kFirstPieceId;
  double count = 1;
  friend bool operator==(const UnigramPiece&, const UnigramPiece&) = default;
};

namespace detail {

/// Bytes as text for messages: printable ASCII as it is, the rest as \xHH.
inline std::string quoted_bytes(std::string_view bytes) {
  static constexpr char digits[] = "0123456789abcdef";
  std::string text = "\"";
  for (const char c : bytes) {
    const auto b = static_cast<unsigned char>(c);
    if (b >= 0x20 && b < 0x7f && c != '"' && c != '\\') {
      text += c;
    } else {
      text += {'\\', 'x', digits[b >> 4], digits[b & 15]};
    }
  }
  return text += '"';
}

/// Why a text has no segmentation: nothing goes on from byte `reached`.
inline std::string no_segmentation_message(std::string_view text, std::size_t reached) {
  return join_text("no piece of the model reaches past byte ", reached, " of the text (",
                   quoted_bytes(text.substr(reached, 8)), "..)");
}

/// By length, then bytes: the order of ids.
inline bool shorter_first(std::string_view a, std::string_view b) {
  return a.size() != b.size() ? a.size() < b.size() : a < b;
}

}  // namespace detail

class UnigramModel {
 public:
  UnigramModel() = default;

  static UnigramModel from_counts(const std::vector<UnigramPiece>& pieces) {
    return UnigramModel(pieces);
  }
  static UnigramModel from_counts(const std::vector<std::pair<std::string, double>>& counts) {
    std::vector<UnigramPiece> pieces;
    pieces.reserve(counts.size());
    for (const auto& [bytes, count] : counts) pieces.push_back({bytes, 0, count});
    std::sort(pieces.begin(), pieces.end(), [](const UnigramPiece& a, const UnigramPiece& b) {
      return detail::shorter_first(a.bytes, b.bytes);
    });
    TokenId id = kFirstPieceId;
    for (UnigramPiece& piece : pieces) piece.id = id++;
    return UnigramModel(pieces);
  }

  /// Number of pieces, the special ids not counted.
  std::size_t size() const { return ids_.size(); }
  /// Pieces and the three special ids.
  std::size_t vocab_size() const { return size() + kFirstPieceId; }
  std::size_t max_piece_length() const { return max_length_; }
  double total_count() const { return total_; }
  /// Whether every byte is a piece, so that every text can be encoded.
  bool covers_all_bytes() const { return covers_all_bytes_; }

  const ByteTrie& trie() const { return trie_; }
  std::uint32_t find(std::string_view bytes) const { return trie_.find(bytes); }

  // Of piece p, 0 <= p < size(); not checked.
  std::string_view piece(std::uint32_t p) const {
    return std::string_view(blob_).substr(begins_[p], begins_[p + 1] - begins_[p]);
  }
  std::uint32_t length(std::uint32_t p) const { return begins_[p + 1] - begins_[p]; }
  TokenId id(std::uint32_t p) const { return ids_[p]; }
  double count(std::uint32_t p) const { return counts_[p]; }
  double log_prob(std::uint32_t p) const { return log_probs_[p]; }
  /// Of all pieces, by index.
  const std::vector<double>& log_probs() const { return log_probs_; }

  /// The piece with this id.  std::out_of_range for ids of no piece, the special ones included.
  std::uint32_t index(TokenId id) const {
    const auto at = static_cast<std::size_t>(id) - kFirstPieceId;
    if (id >= kFirstPieceId && at < by_id_.size() && by_id_[at] != ByteTrie::kNone)
      return by_id_[at];
    const auto found = far_ids_.find(id);
    if (found == far_ids_.end()) {
      detail::raise<std::out_of_range>("id ", id, " is not a piece of this model (", size(),
                                       " pieces)");
    }
    return found->second;
  }

  /// Pieces as they were given, by id.
  std::vector<UnigramPiece> pieces() const {
    std::vector<UnigramPiece> list;
    list.reserve(size());
    for (std::uint32_t p = 0; p < size(); ++p)
      list.push_back({std::string(piece(p)), id(p), count(p)});
    std::sort(list.begin(), list.end(),
              [](const UnigramPiece& a, const UnigramPiece& b) { return a.id < b.id; });
    return list;
  }

  /// Bytes held in all.
  std::size_t bytes() const {
    return trie_.bytes() + blob_.size() + (begins_.size() + by_id_.size()) * 4 +
           size() * (sizeof(TokenId) + 2 * sizeof(double));
  }

 private:
  explicit UnigramModel(const std::vector<UnigramPiece>& pieces) {
    for (const UnigramPiece& piece : pieces) {
      const auto name = [&] { return detail::quoted_bytes(piece.bytes); };
      if (piece.id < kFirstPieceId) {
        detail::raise<invalid_argument>("UnigramModel: piece ", name(), " has id ", piece.id,
                                        ", must be at least ", kFirstPieceId);
      }
      if (!(piece.count > 0) || !std::isfinite(piece.count)) {
        detail::raise<invalid_argument>("UnigramModel: piece ", name(), " has count ", piece.count,
                                        ", must be positive and finite");
      }
      if (piece.bytes.empty()) {
        detail::raise<invalid_argument>("UnigramModel: the piece with id ", piece.id, " is empty");
      }
    }
    std::vector<std::uint32_t> order(pieces.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(),
              [&](auto a, auto b) { return pieces[a].id < pieces[b].id; });
    for (std::size_t i = 1; i < order.size(); ++i) {
      const UnigramPiece &a = pieces[order[i - 1]], &b = pieces[order[i]];
      if (a.id == b.id) {
        detail::raise<invalid_argument>("UnigramModel: pieces ", detail::quoted_bytes(a.bytes),
                                        " and ", detail::quoted_bytes(b.bytes),
                                        " have the same id ", a.id);
      }
    }
    // The order of summation is that of the ids: counts are integers, so that it matters only above 2^53.
    for (const std::uint32_t i : order) total_ += pieces[i].count;
    detail::require(std::isfinite(total_), "UnigramModel: the sum of all counts is infinite");
    std::stable_sort(order.begin(), order.end(),
                     [&](auto a, auto b) { return pieces[a].count > pieces[b].count; });

    const double log_total = std::log(total_);
    std::vector<std::string_view> keys;
    for (const std::uint32_t i : order) {
      const UnigramPiece& piece = pieces[i];
      keys.push_back(piece.bytes);
      blob_ += piece.bytes;
      detail::require(blob_.size() < std::numeric_limits<std::uint32_t>::max(),
                      "UnigramModel: the pieces have 2^32 bytes or more in all");
      begins_.push_back(static_cast<std::uint32_t>(blob_.size()));
      ids_.push_back(piece.id);
      counts_.push_back(piece.count);
      log_probs_.push_back(std::log(piece.count) - log_total);
      max_length_ = std::max(max_length_, piece.bytes.size());
    }
    check_distinct(keys);
    trie_ = ByteTrie(keys, counts_);
    covers_all_bytes_ = true;
    for (int c = 0; c < 256; ++c) {
      const char byte = static_cast<char>(c);
      covers_all_bytes_ = covers_all_bytes_ && find({&byte, 1}) != ByteTrie::kNone;
    }
    // Ids that a table of 4 entries for each piece reaches go there, others into a map.
    by_id_.assign(4 * size() + 1024, ByteTrie::kNone);
    for (std::uint32_t p = 0; p < size(); ++p) {
      const auto at = static_cast<std::size_t>(ids_[p] - kFirstPieceId);
      if (at < by_id_.size()) {
        by_id_[at] = p;
      } else {
        far_ids_.emplace(ids_[p], p);
      }
    }
    while (!by_id_.empty() && by_id_.back() == ByteTrie::kNone) by_id_.pop_back();
  }

  static void check_distinct(std::vector<std::string_view> keys) {
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice != keys.end()) {
      detail::raise<invalid_argument>("UnigramModel: piece ", detail::quoted_bytes(*twice),
                                      " occurs twice");
    }
  }

  ByteTrie trie_;
  std::string blob_;  // the pieces, one after the other
  std::vector<std::uint32_t> begins_{0};
  std::vector<TokenId> ids_;
  std::vector<double> counts_, log_probs_;
  std::vector<std::uint32_t> by_id_;
  std::unordered_map<TokenId, std::uint32_t> far_ids_;
  double total_ = 0;
  std::size_t max_length_ = 0;
  bool covers_all_bytes_ = false;
};

EIGENBLOCKS_NAMESPACE_END
