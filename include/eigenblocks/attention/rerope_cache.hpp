// The key/value cache under a position policy with a window (position/rerope.hpp): two keys per token, nothing rotated again.
//
//   ReropeCache<float> cache(rerope(512), {.kv_heads = 8, .head_dim = 128});
//   rerope_attention_step(cache, q, k, v, out, shape, table, rule);      // rerope.hpp
//   ReropeCache<float> snapshot = cache;                                 // a regular value
//   cache.truncate(n);                                                   // forget positions >= n
//
//   near keys  R(j) k_j      a ring of the last w - 1 + 16: the token's own window, and that of a step of up to 16 tokens
//   far keys   R(S_j) k_j    all of them, with the values, in a KvCache; written when the token arrives
//
// S_j depends on j alone, so neither part changes when the sequence grows.  Memory: (N + w) d + N e scalars per head instead
// of N (d + e).
#pragma once

#include <eigenblocks/attention/cache.hpp>
#include <eigenblocks/position/rerope.hpp>

#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Keys of the last slots() tokens, in the panels of KvCache.
template <StorageScalar T>
class KeyRing {
 public:
  static constexpr Index kPanel = KvCache<T>::kPanel;

  KeyRing(Index kv_heads, Index dim, Index tokens)
      : kv_heads_(kv_heads), dim_(dim), slots_((tokens + kPanel - 1) / kPanel * kPanel) {
    keys_.setZero(kv_heads * slots_ * dim);
  }
  Index slots() const { return slots_; }
  Index slot(Index position) const { return position % slots_; }
  const T* key_panel(Index h, Index panel) const {
    return keys_.data() + (h * slots_ + panel * kPanel) * dim_;
  }
  /// Rows at positions first, first + 1, ...; the last slots() of them stay.
  void put(Index first, Index rows, const T* key, Index stride) {
    for (Index r = std::max<Index>(0, rows - slots_); r < rows; ++r) {
      const Index at = slot(first + r);
      for (Index h = 0; h < kv_heads_; ++h) {
        scatter(key + r * stride + h * dim_, dim_,
                keys_.data() + (h * slots_ + at / kPanel * kPanel) * dim_ + at % kPanel, kPanel);
      }
    }
  }
  std::size_t bytes() const { return static_cast<std::size_t>(keys_.size()) * sizeof(T); }
  bool same(const KeyRing& other, Index first, Index end) const {
    for (Index p = first; p < end; ++p) {
      const Index at = slot(p), lane = at / kPanel * kPanel * dim_ + at % kPanel;
      for (Index h = 0; h < kv_heads_; ++h) {
        for (Index c = 0; c < dim_; ++c) {
          const Index x = h * slots_ * dim_ + lane + c * kPanel;
          if (!(keys_[x] == other.keys_[x])) return false;
        }
      }
    }
    return true;
  }

 private:
  Index kv_heads_, dim_, slots_;
  Vector<T> keys_;
};

}  // namespace detail

template <StorageScalar T>
class ReropeCache {
 public:
  /// Tokens that a step can take with the ring alone.
  static constexpr Index kStepRows = 16;

  /// Errors: options.window other than -1 (the policy has the window), and those of KvCache.
  ReropeCache(const NearFarPosition& position, const KvCacheOptions& options)
      : position_(position),
        far_((detail::require(options.window == -1, "ReropeCache: options.window (", options.window,
                              ") must be -1: all tokens stay, the policy's window is ",
                              position.window),
              options)),
        near_(options.kv_heads, options.head_dim, position.window - 1 + kStepRows) {}

  const NearFarPosition& position() const { return position_; }
  const KvCacheOptions& options() const { return far_.options(); }
  /// Tokens appended so far = position of the next one.
  Index size() const { return far_.size(); }
  Index capacity() const { return far_.capacity(); }
  /// Of a further token; the ring of near keys, bytes() - far part, does not grow.
  Index bytes_per_token() const { return far_.bytes_per_token(); }
  std::size_t bytes() const { return far_.bytes() + near_.bytes(); }
  void reserve(Index tokens) { far_.reserve(tokens); }

  /// Forgets positions >= n.  std::out_of_range unless 0 <= n <= size() and the ring still holds the window before n.
  void truncate(Index n) {
    if (n < 0 || n > size()) {
      detail::raise<std::out_of_range>("ReropeCache: truncate(", n, ") is outside [0, ", size(),
                                       "]");
    }
    const Index needed = std::max<Index>(0, n - position_.window + 1);
    if (n < size() && needed < first_) {
      detail::raise<std::out_of_range>("ReropeCache: truncate(", n, ") needs the near key of ",
                                       needed, ", but the ring starts at ", first_);
    }
    far_.truncate(n);
    first_ = std::min(first_, n);
  }
  void clear() {
    far_.clear();
    first_ = 0;
  }

  /// Same policy, options, positions and stored rows.
  friend bool operator==(const ReropeCache& a, const ReropeCache& b) {
    return a.position_ == b.position_ && a.far_ == b.far_ && a.first_ == b.first_ &&
           a.near_.same(b.near_, a.first_, a.size());
  }

  // For rerope.hpp.
  KvCache<T>& far() { return far_; }
  const KvCache<T>& far() const { return far_; }
  const detail::KeyRing<T>& near() const { return near_; }
  /// Near keys of rows that `far` already has, rows at positions [first, size()).
  void put_near(Index first, const T* key, Index stride) {
    near_.put(first, size() - first, key, stride);
    first_ = std::max(first_, size() - near_.slots());
  }
  /// Room for rotated rows, which is not part of the value.
  std::vector<T>& rotated() { return rotated_; }
  std::vector<double>& positions() { return positions_; }

 private:
  NearFarPosition position_;
  KvCache<T> far_;
  detail::KeyRing<T> near_;
  Index first_ = 0;  // oldest position whose near key is stored
  std::vector<T> rotated_;
  std::vector<double> positions_;
};

EIGENBLOCKS_NAMESPACE_END
