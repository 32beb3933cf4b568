// The most probable segmentation of a text under a unigram model.
//
//   std::vector<TokenId> ids = viterbi_encode(model, "the text as one segment");
//   Viterbi viterbi;                                     // owns the tables: nothing is allocated once they have grown
//   const double score = viterbi.run(model, text);       // S of the best segmentation
//   viterbi.append_ids(model, ids);                      // and its pieces, in order
//
//   score[0] = 0,   score[e] = max over pieces p = text[s, e) of score[s] + log_prob(p)
//
// Starts are taken from left to right, and the pieces from each in one walk of the trie; a candidate wins only if it is
// strictly better, so among equals the one with the longest last piece stays.  Scores are added up in double from the left
// and never rebased: ids are those of BytePiece to the bit.  O(edges) time, 12 bytes per byte of text.
// Errors: data_error if no segmentation exists (a byte that is no piece), with the place; nothing is appended then.
// Source: https://kexue.fm/archives/9768, BytePiece 0.6.3.
#pragma once

#include <eigenblocks/token/unigram_model.hpp>

#include <limits>
#include <string_view>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

class Viterbi {
 public:
  /// Finds the best segmentation and returns its score.
  double run(const UnigramModel& model, std::string_view text) {
    if (!search(model, text)) detail::raise<data_error>(unreachable_message(text));
    return score_[size_];
  }

  /// The same without throwing: whether there is a segmentation.
  bool search(const UnigramModel& model, std::string_view text) {
    constexpr double none = -std::numeric_limits<double>::infinity();
    const std::size_t n = text.size();
    if (score_.size() < n + 1) {
      score_.resize(n + 1);
      piece_.resize(n + 1);
    }
    size_ = n;
    std::fill_n(score_.begin(), n + 1, none);
    score_[0] = 0;
    const ByteTrie::Unit* const units = model.trie().units();
    const double* const log_probs = model.log_probs().data();
    const auto* const bytes = reinterpret_cast<const unsigned char*>(text.data());
    double* const score = score_.data();
    std::uint32_t* const piece = piece_.data();
    for (std::size_t s = 0; s < n; ++s) {
      const double start = score[s];
      if (start == none) continue;
      std::uint32_t base = 0;
      for (std::size_t e = s; e < n;) {
        const std::uint8_t c = bytes[e++];
        const ByteTrie::Unit unit = units[base + c];
        if (!unit.is(c)) break;
        base = unit.base;
        const std::uint32_t p = unit.key();
        if (p == ByteTrie::kNone) continue;
        const double x = start + log_probs[p];
        if (x > score[e]) {
          score[e] = x;
          piece[e] = p;
        }
      }
    }
    return score[n] != none;
  }

  /// Why the last search failed.
  EIGENBLOCKS_COLD std::string unreachable_message(std::string_view text) const {
    std::size_t last = size_;
    while (score_[last] == -std::numeric_limits<double>::infinity()) --last;
    return detail::no_segmentation_message(text, last);
  }

  /// The pieces of the last run, first to last, as indices of the model.
  void append_pieces(const UnigramModel& model, std::vector<std::uint32_t>& pieces) const {
    const std::size_t begin = pieces.size();
    walk_back(model, [&](std::uint32_t p) { pieces.push_back(p); });
    std::reverse(pieces.begin() + static_cast<std::ptrdiff_t>(begin), pieces.end());
  }
  /// The same as ids.
  void append_ids(const UnigramModel& model, std::vector<TokenId>& ids) const {
    const std::size_t begin = ids.size();
    walk_back(model, [&](std::uint32_t p) { ids.push_back(model.id(p)); });
    std::reverse(ids.begin() + static_cast<std::ptrdiff_t>(begin), ids.end());
  }

 private:
  template <class F>
  void walk_back(const UnigramModel& model, F&& f) const {
    for (std::size_t e = size_; e > 0; e -= model.length(piece_[e])) f(piece_[e]);
  }

  std::vector<double> score_;
  std::vector<std::uint32_t> piece_;  // that ends here
  std::size_t size_ = 0;
};

/// Ids of the best segmentation.
inline std::vector<TokenId> viterbi_encode(const UnigramModel& model, std::string_view text) {
  Viterbi viterbi;
  viterbi.run(model, text);
  std::vector<TokenId> ids;
  viterbi.append_ids(model, ids);
  return ids;
}

EIGENBLOCKS_NAMESPACE_END
