// The key/value cache of one attention layer.
//
//   KvCache<float> cache({.kv_heads = 8, .head_dim = 128});            // grows geometrically; .capacity reserves
//   KvCache<float> window({.kv_heads = 8, .head_dim = 128, .window = 4095});   // ring: keeps what window_left(4095) can see
//   cache.append(k, v);                         // rows of new tokens: t x (kv_heads * head_dim), t x (kv_heads * value_dim)
//   KvCache<float> snapshot = cache;            // a regular value: copy, compare, restore by assignment
//   cache.truncate(n);                          // forget positions >= n (speculative decoding)
//
// Attention over it: decode.hpp.  Positions are 0-based; size() is the number of tokens appended and the next position.
// append allocates nothing while the capacity lasts.
//
// Layout, hidden because decoding is won here: the keys of a head lie in panels of 16 tokens, [panel][channel][16], so
// that lanes are keys and no horizontal sum is needed; values are rows, padded to 16 scalars; each head is contiguous.
// bytes_per_token = kv_heads (head_dim + value_dim) sizeof(T), the count of arXiv 2405.04434 table 1 (times the scalar).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <algorithm>

EIGENBLOCKS_NAMESPACE_BEGIN

struct KvCacheOptions {
  Index kv_heads = 1;
  Index head_dim = 1;
  Index value_dim = 0;  ///< 0 means head_dim
  Index capacity = 0;   ///< tokens to make room for at once
  bool fixed =
      false;  ///< never grow: std::length_error when more than `capacity` tokens are appended
  Index window = -1;  ///< >= 0: keep only the keys that window_left(window) can see, in a ring
  Index chunk =
      64;  ///< ring only: tokens that attention_step takes in one piece (longer chunks are split)
  friend bool operator==(const KvCacheOptions&, const KvCacheOptions&) = default;
};

namespace detail {

/// to[c stride] = from[c].
template <StorageScalar T>
void scatter(const T* from, Index count, T* to, Index stride) {
  for (Index c = 0; c < count; ++c) to[c * stride] = from[c];
}

}  // namespace detail

template <StorageScalar T>
class KvCache {
 public:
  static constexpr Index kPanel =
      16;  ///< tokens per key panel: one AVX-512 register of floats, two of AVX2

  KvCache() : KvCache(KvCacheOptions{}) {}
  /// Errors: kv_heads, head_dim < 1, value_dim < 0, capacity < 0, window < -1, chunk < 1; fixed without capacity or with a window.
  explicit KvCache(const KvCacheOptions& options) : options_(options) {
    detail::require(options.kv_heads >= 1, "KvCache: kv_heads (", options.kv_heads,
                    ") must be at least 1");
    detail::require(options.head_dim >= 1, "KvCache: head_dim (", options.head_dim,
                    ") must be at least 1");
    detail::require(options.value_dim >= 0, "KvCache: value_dim (", options.value_dim,
                    ") must not be negative");
    detail::require(options.capacity >= 0, "KvCache: capacity (", options.capacity,
                    ") must not be negative");
    detail::require(options.window >= -1, "KvCache: window (", options.window,
                    ") must be -1 (off) or >= 0");
    detail::require(options.chunk >= 1, "KvCache: chunk (", options.chunk, ") must be at least 1");
    detail::require(!options.fixed || options.capacity >= 1,
                    "KvCache: a fixed cache needs a capacity of at least 1");
    detail::require(!options.fixed || options.window < 0,
                    "KvCache: fixed and window exclude each other: a ring never grows");
    if (options_.value_dim == 0) options_.value_dim = options_.head_dim;
    value_stride_ = (options_.value_dim + kPanel - 1) / kPanel * kPanel;
    allocate(ring() ? options_.window + options_.chunk : options_.capacity);
  }

  const KvCacheOptions& options() const { return options_; }
  bool ring() const { return options_.window >= 0; }
  /// Tokens appended so far = position of the next one.
  Index size() const { return size_; }
  /// Oldest position still stored.
  Index first() const { return first_; }
  /// Tokens that fit without allocating (ring: that are kept).
  Index capacity() const { return options_.fixed ? options_.capacity : slots_; }
  Index bytes_per_token() const {
    return options_.kv_heads * (options_.head_dim + options_.value_dim) *
           static_cast<Index>(sizeof(T));
  }
  /// Bytes held in all, padding included.
  std::size_t bytes() const {
    return static_cast<std::size_t>(keys_.size() + values_.size()) * sizeof(T);
  }

  /// Room for `tokens` in all, so that later appends do not allocate.  Nothing to do for a ring.
  void reserve(Index tokens) {
    if (!ring() && tokens > slots_) {
      detail::require(!options_.fixed, "KvCache: reserve(", tokens,
                      ") on a cache of fixed capacity ", options_.capacity);
      grow(tokens);
    }
  }

  /// Appends key and value rows.  Errors: invalid_argument for shapes; std::length_error when a fixed cache is full; nothing
  /// is written then.
  template <MatrixLike K, MatrixLike V>
    requires SameScalar<K, V> && std::same_as<scalar_t<K>, T>
  void append(const K& key, const V& value) {
    require_rows(key.rows(), key.cols(), value.rows(), value.cols());
    require_room(key.rows());
    const Index d = options_.head_dim, e = options_.value_dim, rows = key.rows();
    if (!ring() && size_ + rows > slots_) grow(std::max(size_ + rows, 2 * slots_));
    for (Index r = std::max<Index>(0, rows - slots_); r < rows; ++r) {
      const Index at = slot(size_ + r);
      for (Index h = 0; h < options_.kv_heads; ++h) {
        detail::scatter(key.data() + r * key.outerStride() + h * d, d,
                        panel_to_fill(h, at / kPanel) + at % kPanel, kPanel);
        std::copy_n(value.data() + r * value.outerStride() + h * e, e, row_to_fill(h, at));
      }
    }
    size_ += rows;
    first_ = std::max(first_, size_ - slots_);
  }

  /// std::length_error if `rows` more tokens do not fit a fixed cache.
  void require_room(Index rows) const {
    if (options_.fixed && size_ + rows > options_.capacity) {
      detail::raise<std::length_error>("KvCache: ", size_, " tokens and ", rows,
                                       " more exceed the fixed capacity ", options_.capacity);
    }
  }
  void require_rows(Index key_rows, Index key_cols, Index value_rows, Index value_cols) const {
    detail::require_shape("key", key_rows, key_cols, key_rows,
                          options_.kv_heads * options_.head_dim,
                          "cols = kv_heads * head_dim of the cache");
    detail::require_shape("value", value_rows, value_cols, key_rows,
                          options_.kv_heads * options_.value_dim,
                          "rows of key, cols = kv_heads * value_dim of the cache");
  }

  /// Forgets positions >= n.  std::out_of_range unless 0 <= n <= size() and a ring still holds the window before n.
  void truncate(Index n) {
    if (n < 0 || n > size_) {
      detail::raise<std::out_of_range>("KvCache: truncate(", n, ") is outside [0, ", size_, "]");
    }
    if (ring() && std::max<Index>(0, n - options_.window) < first_) {
      detail::raise<std::out_of_range>("KvCache: truncate(", n, ") needs position ",
                                       std::max<Index>(0, n - options_.window),
                                       ", but the ring starts at ", first_);
    }
    size_ = n;
    first_ = std::min(first_, n);
  }
  void clear() { size_ = first_ = 0; }

  /// Copies positions [begin, end) out, token-major.  std::out_of_range unless first() <= begin <= end <= size().
  Matrix<T> keys(Index begin, Index end) const {
    require_range(begin, end);
    Matrix<T> rows(end - begin, options_.kv_heads * options_.head_dim);
    for (Index p = begin; p < end; ++p) {
      for (Index h = 0; h < options_.kv_heads; ++h) {
        const T* const panel = key_panel(h, slot(p) / kPanel) + slot(p) % kPanel;
        for (Index c = 0; c < options_.head_dim; ++c)
          rows(p - begin, h * options_.head_dim + c) = panel[c * kPanel];
      }
    }
    return rows;
  }
  Matrix<T> values(Index begin, Index end) const {
    require_range(begin, end);
    Matrix<T> rows(end - begin, options_.kv_heads * options_.value_dim);
    for (Index p = begin; p < end; ++p) {
      for (Index h = 0; h < options_.kv_heads; ++h) {
        std::copy_n(value_row(h, slot(p)), options_.value_dim,
                    &rows(p - begin, h * options_.value_dim));
      }
    }
    return rows;
  }

  /// Same options, positions and stored rows.
  friend bool operator==(const KvCache& a, const KvCache& b) {
    return a.options_ == b.options_ && a.size_ == b.size_ && a.first_ == b.first_ &&
           (a.size_ == a.first_ || (a.keys(a.first_, a.size_) == b.keys(b.first_, b.size_) &&
                                    a.values(a.first_, a.size_) == b.values(b.first_, b.size_)));
  }

  // For the attention over the cache (decode.hpp).
  Index slot(Index position) const { return ring() ? position % slots_ : position; }
  Index slots() const { return slots_; }
  Index value_stride() const { return value_stride_; }
  const T* key_panel(Index h, Index panel) const {
    return keys_.data() + (h * slots_ + panel * kPanel) * options_.head_dim;
  }
  const T* value_row(Index h, Index at) const {
    return values_.data() + (h * slots_ + at) * value_stride_;
  }
  Workspace& workspace() { return workspace_; }

 private:
  T* panel_to_fill(Index h, Index panel) {
    return keys_.data() + (h * slots_ + panel * kPanel) * options_.head_dim;
  }
  T* row_to_fill(Index h, Index at) { return values_.data() + (h * slots_ + at) * value_stride_; }

  void allocate(Index tokens) {
    slots_ = (tokens + kPanel - 1) / kPanel * kPanel;
    keys_.setZero(options_.kv_heads * slots_ * options_.head_dim);
    values_.setZero(options_.kv_heads * slots_ * value_stride_);
  }
  void grow(Index tokens) {
    KvCache bigger(*this, tokens);
    for (Index h = 0; h < options_.kv_heads; ++h) {
      std::copy_n(key_panel(h, 0), slots_ * options_.head_dim, bigger.panel_to_fill(h, 0));
      std::copy_n(value_row(h, 0), slots_ * value_stride_, bigger.row_to_fill(h, 0));
    }
    keys_.swap(bigger.keys_);
    values_.swap(bigger.values_);
    slots_ = bigger.slots_;
  }
  KvCache(const KvCache& like, Index tokens)
      : options_(like.options_), value_stride_(like.value_stride_) {
    allocate(tokens);
  }
  void require_range(Index begin, Index end) const {
    if (begin < first_ || begin > end || end > size_) {
      detail::raise<std::out_of_range>("KvCache: positions [", begin, ", ", end,
                                       ") are not within the stored [", first_, ", ", size_, ")");
    }
  }

  KvCacheOptions options_;
  Index value_stride_ = 0;
  Index slots_ = 0;
  Index size_ = 0, first_ = 0;
  Vector<T> keys_, values_;
  Workspace workspace_;  // scratch of the attention over the cache; not part of the value
};

EIGENBLOCKS_NAMESPACE_END
