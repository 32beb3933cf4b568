// The cache of multi-head latent attention: one row [c | k_rope] per token, whatever the number of heads.
//
//   LatentCache<float> cache({.latent_dim = 512, .rope_dim = 64});     // grows geometrically; .capacity reserves
//   cache.append(rows);                          // t x (latent_dim + rope_dim): c after its norm, the rope key rotated
//   LatentCache<float> snapshot = cache;         // a regular value: copy, compare, restore by assignment
//   cache.truncate(n);                           // forget positions >= n (speculative decoding)
//
// The latent c serves as key and as value and is stored once (mla_decode.hpp reads it so).  Positions are 0-based; size() is
// the number of tokens appended and the next position.  append allocates nothing while the capacity lasts.
// T may be a 16-bit type: rows are rounded when appended and widened block by block when read.
//
// Layout, hidden: rows, padded to an odd number of cache lines, so that walking down a column does not collide in one set of
// the first-level cache; room for whole blocks of 48 tokens.
// bytes_per_token = (latent_dim + rope_dim) sizeof(T), the count of arXiv 2405.04434 table 1 (times the scalar).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <algorithm>

EIGENBLOCKS_NAMESPACE_BEGIN

struct LatentCacheOptions {
  Index latent_dim = 1;  ///< r_kv
  Index rope_dim = 0;    ///< d_r
  Index capacity = 0;    ///< tokens to make room for at once
  bool fixed = false;    ///< never grow: std::length_error when the capacity is exceeded
  friend bool operator==(const LatentCacheOptions&, const LatentCacheOptions&) = default;
};

template <StorageScalar T>
class LatentCache {
 public:
  static constexpr Index kBlock = 48;  ///< tokens that the attention takes at a time

  LatentCache() : LatentCache(LatentCacheOptions{}) {}
  /// Errors: latent_dim < 1, rope_dim < 0, capacity < 0; fixed without capacity.
  explicit LatentCache(const LatentCacheOptions& options) : options_(options) {
    detail::require(options.latent_dim >= 1, "LatentCache: latent_dim (", options.latent_dim,
                    ") must be at least 1");
    detail::require(options.rope_dim >= 0, "LatentCache: rope_dim (", options.rope_dim,
                    ") must not be negative");
    detail::require(options.capacity >= 0, "LatentCache: capacity (", options.capacity,
                    ") must not be negative");
    detail::require(!options.fixed || options.capacity >= 1,
                    "LatentCache: a fixed cache needs a capacity of at least 1");
    const Index line = static_cast<Index>(detail::kAlignment / sizeof(T));
    stride_ = ((width() + line - 1) / line | 1) * line;
    allocate(options.capacity);
  }

  const LatentCacheOptions& options() const { return options_; }
  /// Scalars of a token.
  Index width() const { return options_.latent_dim + options_.rope_dim; }
  /// Tokens appended so far = position of the next one.
  Index size() const { return size_; }
  /// Tokens that fit without allocating.
  Index capacity() const { return options_.fixed ? options_.capacity : slots_; }
  Index bytes_per_token() const { return width() * static_cast<Index>(sizeof(T)); }
  /// Bytes held in all, padding included.
  std::size_t bytes() const { return static_cast<std::size_t>(rows_.size()) * sizeof(T); }

  /// Room for `tokens` in all, so that later appends do not allocate.
  void reserve(Index tokens) {
    if (tokens <= capacity()) return;
    detail::require(!options_.fixed, "LatentCache: reserve(", tokens,
                    ") on a cache of fixed capacity ", options_.capacity);
    allocate(tokens);
  }

  /// Appends rows, rounded to T.  Errors: invalid_argument for the width; std::length_error when a fixed cache is full; nothing
  /// is written then.
  template <MatrixLike R>
    requires(std::same_as<scalar_t<R>, T> || std::same_as<scalar_t<R>, compute_t<T>>)
  void append(const R& rows) {
    detail::require_shape("rows", rows.rows(), rows.cols(), rows.rows(), width(),
                          "cols = latent_dim + rope_dim of the cache");
    require_room(rows.rows());
    if (size_ + rows.rows() > slots_) allocate(std::max(size_ + rows.rows(), 2 * slots_));
    Eigen::Map<Matrix<T>, 0, Eigen::OuterStride<>>(rows_.data() + size_ * stride_, rows.rows(),
                                                   width(), Eigen::OuterStride<>(stride_)) =
        rows.template cast<T>();
    size_ += rows.rows();
  }

  /// std::length_error if `rows` more tokens do not fit a fixed cache.
  void require_room(Index rows) const {
    if (options_.fixed && size_ + rows > options_.capacity) {
      detail::raise<std::length_error>("LatentCache: ", size_, " tokens and ", rows,
                                       " more exceed the fixed capacity ", options_.capacity);
    }
  }

  /// Forgets positions >= n.  std::out_of_range unless 0 <= n <= size().
  void truncate(Index n) {
    if (n < 0 || n > size_) {
      detail::raise<std::out_of_range>("LatentCache: truncate(", n, ") is outside [0, ", size_,
                                       "]");
    }
    size_ = n;
  }
  void clear() { size_ = 0; }

  using View = Eigen::Map<const Matrix<T>, 0, Eigen::OuterStride<>>;
  /// All tokens, size() x (latent_dim + rope_dim); valid until the next append.
  View view() const { return {rows_.data(), size_, width(), Eigen::OuterStride<>(stride_)}; }
  auto latents() const { return view().leftCols(options_.latent_dim); }
  auto rope_keys() const { return view().rightCols(options_.rope_dim); }

  /// Same options and stored rows.
  friend bool operator==(const LatentCache& a, const LatentCache& b) {
    return a.options_ == b.options_ && a.size_ == b.size_ && a.view() == b.view();
  }

  // For the attention over the cache (mla_decode.hpp).
  Index slots() const { return slots_; }
  Index stride() const { return stride_; }
  const T* row(Index position) const { return rows_.data() + position * stride_; }
  Workspace& workspace() { return workspace_; }

 private:
  void allocate(Index tokens) {
    const Index slots = (tokens + kBlock - 1) / kBlock * kBlock;
    // One line more: blocks of channels may read past the last row.
    Vector<T> rows = Vector<T>::Zero(slots * stride_ + static_cast<Index>(detail::kAlignment));
    std::copy_n(rows_.data(), size_ * stride_, rows.data());
    rows_.swap(rows);
    slots_ = slots;
  }

  LatentCacheOptions options_;
  Index stride_ = 0, slots_ = 0, size_ = 0;
  Vector<T> rows_;
  Workspace workspace_;  // scratch of the attention over the cache; not part of the value
};

EIGENBLOCKS_NAMESPACE_END
