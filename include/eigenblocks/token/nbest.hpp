// The k best segmentations of a text under a unigram model, exactly.
//
//   for (const Segmentation& y : nbest(model, text, 10)) use(y.pieces, y.score);
//   nbest(model, theta, text, 10);                       // any scores, one for each piece of the model
//   segmentation_ends(model, y.pieces);                  // where its pieces end
//
// By falling score S = sum of log_prob; among equal scores by the ends, the list that is smaller in
// lexicographic order first.  All of them if there are no more than k; k may be as large as one likes.
//
// The best rest of every position is found first, from the right.  A best-first search then keeps an agenda of ways to leave a
// segmentation already found, each ranked by the best segmentation it leads to, which is known; only as many as are still
// wanted stay on it.  O(k edges) time, O(n + k) besides the result.
// Sums are taken in 64-bit integers, theta in units of 2^-j with j as large as the text allows (more digits than a sum of doubles
// of that size keeps): sums do not depend on the order of pieces, so that permutations of the same pieces are
// exactly equal and the order is the same everywhere.  `score` is the usual sum of doubles from the left.  Viterbi breaks ties
// otherwise (longest last piece).
// Errors: invalid_argument for k < 0, for theta of the wrong size or not finite; data_error for a text without a segmentation.
// Source: D. Eppstein, "Finding the k shortest paths" (1998), in the simple form of ranking deviations.
#pragma once

#include <eigenblocks/token/unigram_weights.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct Segmentation {
  std::vector<std::uint32_t> pieces;  ///< indices of the model
  double score = 0;
  friend bool operator==(const Segmentation&, const Segmentation&) = default;
};

/// Where the pieces end: ascending, the last the number of bytes in all.
inline std::vector<std::size_t> segmentation_ends(const UnigramModel& model,
                                                  std::span<const std::uint32_t> pieces) {
  std::vector<std::size_t> ends;
  ends.reserve(pieces.size());
  std::size_t at = 0;
  for (const std::uint32_t p : pieces) ends.push_back(at += model.length(p));
  return ends;
}

namespace detail {

class NBestSearch {
 public:
  NBestSearch(const UnigramModel& model, std::span<const double> theta, std::string_view text)
      : model_(model), text_(text), units_(theta.size()), rest_(text.size() + 1, kNone) {
    double largest = 0;
    for (const double x : theta) largest = std::max(largest, std::abs(x));
    // Every sum of at most n pieces stays below 2^60.
    int exponent = 0;
    std::frexp(largest * static_cast<double>(text.size() + 1), &exponent);
    for (std::size_t p = 0; p < theta.size(); ++p)
      units_[p] = std::llrint(std::ldexp(theta[p], 60 - std::max(exponent, 0)));
    next_.resize(text.size());
    rest_[text.size()] = 0;
    for (std::size_t s = text.size(); s-- > 0;) {
      model.trie().walk(text.substr(s), [&](std::size_t length, std::uint32_t p) {
        if (rest_[s + length] == kNone) return;
        const std::int64_t x = units_[p] + rest_[s + length];
        if (x > rest_[s]) {  // the shortest of equals stays: smaller ends
          rest_[s] = x;
          next_[s] = p;
        }
      });
    }
    if (rest_[0] == kNone) raise_no_segmentation(text, last_reached(model.trie(), text));
  }

  /// f(pieces) for the k best in their order.
  template <class F>
  void run(std::size_t k, F&& f) {
    if (k == 0) return;
    paths_.push_back({});
    extend(paths_[0], 0);
    f(paths_[0].pieces);
    add_deviations(0, 0, rest_[0], k - 1);
    while (paths_.size() < k && !agenda_.empty()) {
      std::pop_heap(agenda_.begin(), agenda_.end(), worse_);
      const Deviation top = agenda_.back();
      agenda_.pop_back();
      Path path;
      const Path& parent = paths_[top.path];
      path.parent = top.path;
      path.at = top.at;
      const auto count = static_cast<std::ptrdiff_t>(top.at);
      path.pieces.assign(parent.pieces.begin(), parent.pieces.begin() + count);
      path.ends.assign(parent.ends.begin(), parent.ends.begin() + count);
      path.pieces.push_back(top.piece);
      path.ends.push_back(top.end);
      extend(path, top.end);
      paths_.push_back(std::move(path));
      f(paths_.back().pieces);
      add_deviations(paths_.size() - 1, top.at + 1, top.score, k - paths_.size());
    }
  }

 private:
  static constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::min();

  struct Path {
    std::size_t parent = 0,
                at = 0;  // it has the first `at` pieces of its parent, and another one then
    std::vector<std::uint32_t> pieces;
    std::vector<std::size_t> ends;
  };
  /// All segmentations with the first `at` pieces of a path and `piece` next.
  struct Deviation {
    std::int64_t score;  // of the best of them
    std::size_t path, at, end;
    std::uint32_t piece;
  };
  struct Worse {
    const NBestSearch* search;
    bool operator()(const Deviation& a, const Deviation& b) const {
      if (a.score != b.score) return a.score < b.score;
      return search->end_at_difference(b, a) < search->end_at_difference(a, b);
    }
  };

  /// The best way on from `end`.
  void extend(Path& path, std::size_t end) const {
    while (end < text_.size()) {
      path.pieces.push_back(next_[end]);
      path.ends.push_back(end += model_.length(next_[end]));
    }
  }

  void add_deviations(std::size_t path, std::size_t from, std::int64_t score, std::size_t wanted) {
    if (wanted == 0) return;
    const Path& p = paths_[path];
    for (std::size_t at = from; at < p.pieces.size(); ++at) {
      const std::size_t s = at == 0 ? 0 : p.ends[at - 1];
      model_.trie().walk(text_.substr(s), [&](std::size_t length, std::uint32_t piece) {
        const std::size_t e = s + length;
        if (piece == p.pieces[at] || rest_[e] == kNone) return;
        const std::int64_t x = score - rest_[s] + units_[piece] + rest_[e];
        if (x < cutoff_) return;
        agenda_.push_back({x, path, at, e, piece});
        std::push_heap(agenda_.begin(), agenda_.end(), worse_);
      });
      if (agenda_.size() > 256 && agenda_.size() / 2 > wanted) trim(wanted);
    }
  }
  /// Each deviation leads to at least one segmentation: more than are still wanted are not needed.
  void trim(std::size_t wanted) {
    const auto last = agenda_.begin() + static_cast<std::ptrdiff_t>(wanted);
    std::nth_element(agenda_.begin(), last - 1, agenda_.end(),
                     [&](const Deviation& a, const Deviation& b) { return worse_(b, a); });
    agenda_.erase(last, agenda_.end());
    cutoff_ = std::max(cutoff_, agenda_.back().score);
    std::make_heap(agenda_.begin(), agenda_.end(), worse_);
  }

  /// The number of pieces that two paths share.  The younger one left its parent for an edge that the older did not take.
  std::size_t shared(std::size_t a, std::size_t b) const {
    std::size_t count = std::numeric_limits<std::size_t>::max();
    while (a != b) {
      if (a < b) std::swap(a, b);
      count = std::min(count, paths_[a].at);
      a = paths_[a].parent;
    }
    return count;
  }
  /// The end of a's piece where its segmentations first differ from those of b.
  std::size_t end_at_difference(const Deviation& a, const Deviation& b) const {
    const std::size_t at = std::min({shared(a.path, b.path), a.at, b.at});
    return at == a.at ? a.end : paths_[a.path].ends[at];
  }

  const UnigramModel& model_;
  std::string_view text_;
  std::vector<std::int64_t> units_, rest_;  // theta; the best score of what follows each position
  std::vector<std::uint32_t> next_;         // its first piece
  std::vector<Path> paths_;
  std::vector<Deviation> agenda_;
  std::int64_t cutoff_ = kNone;
  Worse worse_{this};
};

}  // namespace detail

/// The k best segmentations with the scores theta, one for each piece of the model.
inline std::vector<Segmentation> nbest(const UnigramModel& model, std::span<const double> theta,
                                       std::string_view text, std::ptrdiff_t k) {
  detail::require(k >= 0, "nbest: k (", k, ") must be at least 0");
  detail::require(theta.size() == model.size(), "nbest: theta has ", theta.size(),
                  " entries, expected ", model.size(), " (one for each piece)");
  for (std::size_t p = 0; p < theta.size(); ++p)
    detail::require(std::isfinite(theta[p]), "nbest: theta[", p, "] (", theta[p],
                    ") must be finite");
  std::vector<Segmentation> result;
  detail::NBestSearch search(model, theta, text);
  search.run(static_cast<std::size_t>(k), [&](const std::vector<std::uint32_t>& pieces) {
    double score = 0;
    for (const std::uint32_t p : pieces) score += theta[p];
    result.push_back({pieces, score});
  });
  return result;
}
inline std::vector<Segmentation> nbest(const UnigramModel& model, std::string_view text,
                                       std::ptrdiff_t k) {
  return nbest(model, model.log_probs(), text, k);
}

EIGENBLOCKS_NAMESPACE_END
