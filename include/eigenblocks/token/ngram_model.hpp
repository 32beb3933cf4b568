// The byte n-gram language model that BytePiece's trainer cuts text with ("BNLM").
//
//   NgramCounter counter(6);
//   counter.add(segment);                              // every window of 1 to 6 bytes of the segment
//   const NgramModel model(counter.sorted(), {.order = 6, .min_count = 2});
//   NgramSegmenter cut(model);
//   cut.run(segment, [](std::string_view piece) { ... });
//
//   g(w) = log C(w) - log C(w without its last byte),   C of the empty window = all bytes
// Bytes that never occur count once; windows of 2 or more bytes with C < min_count are dropped.
// Cutting: Viterbi over states 0..K-1, K = order.  State j at byte i scores g of the j preceding bytes and this one; state 0
// starts a piece; allowed are k -> 0 and k -> min(k + 1, K - 1).  With ensure_unicode no piece starts at 0x80..0xBF.  Among
// equals, and in columns that are all -inf, the smallest k wins.
// So a character whose own windows were dropped leaves every state at -inf from there to the end of its segment, and all of
// that comes out as single bytes.  This is BytePiece's behaviour and the default; with `rescue` only the character itself
// becomes single bytes and the rest of the segment is cut as if a new one began after it (the score goes on).
// O(K) time and 2 bytes of memory per byte of the segment.  Errors (invalid_argument): order outside [1, 255], min_count < 1.
// Sources: https://kexue.fm/archives/9752, https://kexue.fm/archives/3956; BytePiece 0.6.3.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct NgramOptions {
  Index order = 6;
  Index min_count = 2;
  bool ensure_unicode = true;
  bool rescue = false;  ///< not BytePiece: see the top of this file
};

namespace detail {

inline void check_ngram_order(Index order) {
  require(order >= 1 && order <= 255, "order (", order, ") must be in [1, 255]");
}

}  // namespace detail

/// Counts windows.  Only the longest window at each byte is counted; those of fewer bytes are its beginnings.
class NgramCounter {
 public:
  explicit NgramCounter(Index order) : order_(static_cast<std::size_t>(order)) {
    detail::check_ngram_order(order);
    if (packed()) slots_.resize(1024);
  }

  void add(std::string_view segment) {
    for (std::size_t i = 0; i < segment.size(); ++i) {
      const std::string_view window = segment.substr(i, order_);
      if (packed()) {
        add_key(pack(window), 1);
      } else {
        ++long_[std::string(window)];
      }
    }
  }
  void add(const NgramCounter& other) {
    for (const Slot& slot : other.slots_) {
      if (slot.key != 0) add_key(slot.key, slot.count);
    }
    for (const auto& [window, count] : other.long_) long_[window] += count;
  }

  /// Windows with their counts, in byte order.
  std::vector<std::pair<std::string, std::int64_t>> sorted() const {
    std::vector<std::pair<std::string, std::int64_t>> list(long_.begin(), long_.end());
    std::sort(list.begin(), list.end());
    std::vector<Slot> packed_list;  // keys compare as the windows do
    for (const Slot& slot : slots_) {
      if (slot.key != 0) packed_list.push_back(slot);
    }
    std::sort(packed_list.begin(), packed_list.end(),
              [](const Slot& a, const Slot& b) { return a.key < b.key; });
    list.reserve(list.size() + packed_list.size());
    for (const Slot& slot : packed_list) list.emplace_back(unpack(slot.key), slot.count);
    return list;
  }

 private:
  struct Slot {
    std::uint64_t key = 0;  // the bytes from the top, the length in the lowest byte; 0: free
    std::int64_t count = 0;
  };

  bool packed() const { return order_ <= 7; }
  static std::uint64_t pack(std::string_view window) {
    std::uint64_t key = 0;
    for (std::size_t i = 0; i < window.size(); ++i) {
      key |= std::uint64_t{static_cast<std::uint8_t>(window[i])} << (56 - 8 * i);
    }
    return key | window.size();
  }
  static std::string unpack(std::uint64_t key) {
    std::string window(static_cast<std::size_t>(key & 0xff), '\0');
    for (std::size_t i = 0; i < window.size(); ++i) {
      window[i] = static_cast<char>(key >> (56 - 8 * i) & 0xff);
    }
    return window;
  }
  void add_key(std::uint64_t key, std::int64_t count) {
    if (2 * used_ >= slots_.size()) grow();
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t at = hash(key) & mask;; at = (at + 1) & mask) {
      if (slots_[at].key == 0) {
        slots_[at].key = key;
        ++used_;
      }
      if (slots_[at].key == key) {
        slots_[at].count += count;
        return;
      }
    }
  }
  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    used_ = 0;
    for (const Slot& slot : old) {
      if (slot.key != 0) add_key(slot.key, slot.count);
    }
  }
  static std::size_t hash(std::uint64_t key) {
    key *= 0x9e3779b97f4a7c15u;
    return static_cast<std::size_t>(key ^ key >> 29);
  }

  std::size_t order_, used_ = 0;
  std::vector<Slot> slots_;
  std::unordered_map<std::string, std::int64_t> long_;  // orders above 7
};

/// g of every window that was kept, as a tree: a window's node is found from that of the window without its last byte.
class NgramModel {
 public:
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};

  /// `windows`: NgramCounter::sorted().
  NgramModel(const std::vector<std::pair<std::string, std::int64_t>>& windows,
             const NgramOptions& options)
      : options_(options) {
    detail::check_ngram_order(options.order);
    detail::require(options.min_count >= 1, "min_count (", options.min_count,
                    ") must be at least 1");
    std::array<std::int64_t, 256> bytes{};
    for (const auto& [window, count] : windows)
      bytes[static_cast<std::uint8_t>(window[0])] += count;
    std::int64_t total = 0;
    for (std::int64_t& count : bytes) total += count = std::max<std::int64_t>(count, 1);
    for (std::size_t c = 0; c < 256; ++c) single_[c] = log_count(bytes[c]) - log_count(total);
    slots_.resize(1024);
    for (std::size_t begin = 0; begin < windows.size();) {
      const auto c = static_cast<std::uint8_t>(windows[begin].first[0]);
      const std::size_t end = run_end(windows, begin, windows.size(), 0);
      add_children(windows, begin, end, 1, c, bytes[c]);
      begin = end;
    }
  }

  const NgramOptions& options() const { return options_; }
  /// Windows of at least 2 bytes that were kept.
  std::size_t size() const { return used_; }

  /// g of the single byte c, whose node is c itself.
  double single(std::uint8_t c) const { return single_[c]; }
  /// The node of a window and then c, and its g; kNone if it was dropped.
  std::uint32_t child(std::uint32_t node, std::uint8_t c, double& g) const {
    const std::uint64_t key = key_of(node, c);
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t at = hash(key) & mask;; at = (at + 1) & mask) {
      const Slot& slot = slots_[at];
      if (slot.key == key) {
        g = slot.g;
        return slot.node;
      }
      if (slot.key == 0) return kNone;
    }
  }

 private:
  using Windows = std::vector<std::pair<std::string, std::int64_t>>;
  struct Slot {
    std::uint64_t key = 0;  // parent's node + 1, byte; 0: free
    double g = 0;
    std::uint32_t node = 0;
  };

  static double log_count(std::int64_t count) { return std::log(static_cast<double>(count)); }
  static std::uint64_t key_of(std::uint32_t node, std::uint8_t c) {
    return (std::uint64_t{node} + 1) << 8 | c;
  }
  static std::size_t hash(std::uint64_t key) {
    key *= 0x9e3779b97f4a7c15u;
    return static_cast<std::size_t>(key ^ key >> 32);
  }
  static std::size_t run_end(const Windows& windows, std::size_t begin, std::size_t end,
                             std::size_t depth) {
    const char c = windows[begin].first[depth];
    std::size_t i = begin + 1;
    while (i < end && windows[i].first[depth] == c) ++i;
    return i;
  }

  /// Windows [begin, end) agree in their first `depth` bytes, whose node and count are given.
  void add_children(const Windows& windows, std::size_t begin, std::size_t end, std::size_t depth,
                    std::uint32_t node, std::int64_t node_count) {
    while (begin < end && windows[begin].first.size() == depth)
      ++begin;  // cut short by a segment's end
    while (begin < end) {
      const std::size_t stop = run_end(windows, begin, end, depth);
      std::int64_t count = 0;
      for (std::size_t i = begin; i < stop; ++i) count += windows[i].second;
      if (count >= options_.min_count) {
        const auto c = static_cast<std::uint8_t>(windows[begin].first[depth]);
        const std::uint32_t child = insert(node, c, log_count(count) - log_count(node_count));
        add_children(windows, begin, stop, depth + 1, child, count);
      }
      begin = stop;
    }
  }

  std::uint32_t insert(std::uint32_t parent, std::uint8_t c, double g) {
    detail::require(used_ < kNone - 512, "NgramModel: 2^32 windows or more");
    if (2 * (used_ + 1) > slots_.size()) grow();
    const auto node = static_cast<std::uint32_t>(256 + used_);
    put({key_of(parent, c), g, node});
    return node;
  }
  void put(const Slot& slot) {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = hash(slot.key) & mask;
    while (slots_[at].key != 0) at = (at + 1) & mask;
    slots_[at] = slot;
    ++used_;
  }
  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    used_ = 0;
    for (const Slot& slot : old) {
      if (slot.key != 0) put(slot);
    }
  }

  NgramOptions options_;
  std::array<double, 256> single_{};
  std::vector<Slot> slots_;
  std::size_t used_ = 0;
};

/// Cuts segments; owns the tables of one of them, so that one object serves one thread.
class NgramSegmenter {
 public:
  explicit NgramSegmenter(const NgramModel& model)
      : model_(&model), order_(static_cast<std::size_t>(model.options().order)) {
    emission_.resize(order_);
    nodes_.resize(order_);
    score_.resize(order_);
    saved_.resize(order_);
  }

  /// f(piece) from left to right.
  template <class F>
  void run(std::string_view segment, F&& f) {
    if (segment.empty()) return;
    forward(segment);
    backward(segment.size());
    std::size_t begin = 0;
    for (std::size_t i = 1; i <= segment.size(); ++i) {
      if (i < segment.size() && !starts_[i]) continue;
      f(segment.substr(begin, i - begin));
      begin = i;
    }
  }

 private:
  static constexpr double kImpossible = -std::numeric_limits<double>::infinity();
  static bool continues(std::uint8_t c) { return (c & 0xc0) == 0x80; }

  void forward(std::string_view segment) {
    from_.assign(segment.size(), 0);
    stays_.assign(segment.size(), 0);
    std::fill(nodes_.begin(), nodes_.end(), NgramModel::kNone);
    std::fill(score_.begin(), score_.end(), kImpossible);
    const bool unicode = model_->options().ensure_unicode;
    std::size_t character = 0;  // where the current one starts
    for (std::size_t i = 0; i < segment.size(); ++i) {
      const auto c = static_cast<std::uint8_t>(segment[i]);
      emit(c);
      if (unicode && continues(c)) {
        emission_[0] = kImpossible;
      } else {
        character = i;
        if (model_->options().rescue) saved_ = score_;
      }
      if (i == 0) {
        score_[0] = emission_[0];
      } else {
        advance(i);
      }
      if (model_->options().rescue && best_state() == order_) i = rescue(segment, character);
    }
  }

  /// Emissions of the states at the next byte.
  void emit(std::uint8_t c) {
    for (std::size_t j = order_ - 1; j > 0; --j) {
      emission_[j] = kImpossible;
      nodes_[j] = nodes_[j - 1] == NgramModel::kNone
                      ? NgramModel::kNone
                      : model_->child(nodes_[j - 1], c, emission_[j]);
    }
    nodes_[0] = c;
    emission_[0] = model_->single(c);
  }

  /// One column.  Sums are compared as they are rounded, with the emission: BytePiece's ties depend on it.
  void advance(std::size_t i) {
    const std::size_t last = order_ - 1;
    double best = score_[0] + emission_[0];
    std::size_t from = 0;
    for (std::size_t k = 1; k < order_; ++k) {
      const double x = score_[k] + emission_[0];
      if (x > best) {
        best = x;
        from = k;
      }
    }
    from_[i] = static_cast<std::uint8_t>(from);
    if (last > 0) {
      const double enters = score_[last - 1] + emission_[last];
      const double stays = score_[last] + emission_[last];
      stays_[i] = stays > enters;
      for (std::size_t j = last - 1; j > 0; --j) score_[j] = score_[j - 1] + emission_[j];
      score_[last] = std::max(enters, stays);
    }
    score_[0] = best;
  }

  /// The state with the best score, the order if all are impossible.
  std::size_t best_state() const {
    std::size_t best = 0;
    for (std::size_t j = 1; j < order_; ++j) {
      if (score_[j] > score_[best]) best = j;
    }
    return score_[best] == kImpossible ? order_ : best;
  }

  /// Makes the bytes of the character at `begin` pieces of their own; returns its last byte.
  std::size_t rescue(std::string_view segment, std::size_t begin) {
    score_ = saved_;
    std::size_t i = begin;
    do {
      std::fill(emission_.begin(), emission_.end(), kImpossible);
      emission_[0] = model_->single(static_cast<std::uint8_t>(segment[i]));
      if (i == 0) {
        score_[0] = emission_[0];
      } else {
        advance(i);
      }
      ++i;
    } while (i < segment.size() && continues(static_cast<std::uint8_t>(segment[i])));
    std::fill(nodes_.begin(), nodes_.end(), NgramModel::kNone);  // no window reaches back into it
    return i - 1;
  }

  void backward(std::size_t size) {
    starts_.assign(size, 0);
    std::size_t state = best_state();
    if (state == order_) state = 0;
    for (std::size_t i = size; i-- > 0;) {
      starts_[i] = state == 0;
      if (state == 0) {
        state = from_[i];
      } else if (state + 1 < order_ || !stays_[i]) {
        --state;
      }
    }
  }

  const NgramModel* model_;
  std::size_t order_;
  std::vector<double> emission_, score_, saved_;
  std::vector<std::uint32_t> nodes_;
  std::vector<std::uint8_t> from_, stays_, starts_;
};

EIGENBLOCKS_NAMESPACE_END
