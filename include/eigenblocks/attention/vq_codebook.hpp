// The codebook of Transformer-VQ: nearest code, commitment loss, update by exponential moving averages.
//
//   z_t = argmin_s |k_t - C_s|^2                                    per head; exact ties go to the lowest index
//   commit = 1/T sum_t mask_t sum_h |k_th - C_h,z|^2                masked tokens count in T
//   d commit / d k = 2 mask (k - C_z) / T                           C is a constant: it learns by averages only
//   C = c_sum / max(c_count, count_floor)
//   c_count' = g c_count + (1 - g) #{t: mask, z_t = s},  c_sum' = g c_sum + (1 - g) sum of those k_t
//
// Shapes: k is T x (heads*d); a codebook is (heads*codes) x d, the codes of a head in consecutive rows; codes are T x heads;
// counts are heads x codes.  A key that is NaN has code 0.  In float, a code whose distance ties within rounding may be taken.
// Source: arXiv 2309.16354, github.com/transformer-vq/transformer_vq (decay 0.99, floor 0.01; no restart of dead codes).
//
// Errors (invalid_argument): an empty codebook, rows that heads does not divide, widths that do not fit, wrong sizes of codes
// or mask, decay outside [0, 1], count_floor not positive; std::out_of_range for a code outside the codebook.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/tile.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

using VqCodes = Matrix<Index>;                              ///< T x heads
using VqTokenMask = Eigen::Array<bool, Eigen::Dynamic, 1>;  ///< T entries, true = counts

/// Running sums of the keys of each code; codebook = sum / max(count, floor).
template <RealScalar S>
struct VqCodebookAverage {
  Matrix<S> sum;    ///< (heads*codes) x d
  Matrix<S> count;  ///< heads x codes
};

struct VqAverageOptions {
  double decay = 0.99;
  double count_floor = 0.01;
};

namespace detail {

struct VqSizes {
  Index tokens, heads, dim, codes;
};

inline VqSizes vq_sizes(Index tokens, Index width, Index codebook_rows, Index dim, Index heads,
                        const char* name = "key") {
  require(heads >= 1, "heads (", heads, ") must be at least 1");
  require(codebook_rows >= heads && codebook_rows % heads == 0, "codebook has ", codebook_rows,
          " rows, expected a positive multiple of heads (", heads, ")");
  require(codebook_rows / heads <= (Index{1} << 24), "codebook has ", codebook_rows / heads,
          " codes for a head, expected at most ",
          Index{1} << 24);  // (searched as numbers of the scalar)
  require(dim >= 1, "codebook has ", dim, " columns, expected at least 1");
  require(width == heads * dim, name, " has ", width, " columns, expected ", heads * dim,
          " (heads * columns of the codebook)");
  return {tokens, heads, dim, codebook_rows / heads};
}

inline void require_codes(const VqCodes& codes, const VqSizes& n) {
  require_shape("codes", codes.rows(), codes.cols(), n.tokens, n.heads, "tokens x heads");
  for (Index i = 0; i < codes.size(); ++i) require_index("code", codes.data()[i], n.codes);
}

inline void require_token_mask(const VqTokenMask* mask, Index tokens) {
  if (mask != nullptr) require_size("mask", mask->size(), tokens, "tokens");
}

/// Codes of the rows of one head, lanes = tokens.  panels: the codebook in row panels; half: |C_s|^2 / 2.
template <RealScalar S>
class VqSearch {
  using P = simd::Packet<S>;
  using Shape = TileShape<S>;
  static constexpr int kW = simd::kLanes<S>, kMR = Shape::kRows, kNV = Shape::kVectors,
                       kNQ = kNV * kW;

 public:
  static Index padded(Index codes) { return (codes + kMR - 1) / kMR * kMR; }
  static std::size_t bytes(Index codes, Index dim) {
    return padded_bytes<S>(padded(codes) * dim) + padded_bytes<S>(padded(codes)) +
           padded_bytes<S>(kNQ * dim) + padded_bytes<S>(std::max<Index>(kNQ, kMR) * dim) +
           padded_bytes<S>(kNQ);
  }

  VqSearch(Index codes, Index dim, const S* codebook, Index stride, Arena& arena)
      : codes_(codes), dim_(dim) {
    S* const panels = arena.take<S>(padded(codes) * dim);
    S* const half = arena.take<S>(padded(codes));
    std::fill_n(half, padded(codes), std::numeric_limits<S>::infinity());  // padding never wins
    tile_ = arena.take<S>(kNQ * dim);
    scratch_ = arena.take<S>(std::max<Index>(kNQ, kMR) * dim);
    one_ = arena.take<S>(kNQ);
    std::fill_n(one_, kNQ, S(1));
    pack_row_panels<kMR>(codes, dim, codebook, stride, panels, scratch_);
    for (Index s = 0; s < codes; ++s) {
      half[s] = Eigen::Map<const Vector<S>>(codebook + s * stride, dim).squaredNorm() / S(2);
    }
    panels_ = panels;
    half_ = half;
  }

  /// codes[t * code_stride] for `count` rows.
  void run(Index count, const S* key, Index stride, Index* codes, Index code_stride) const {
    for (Index t = 0; t < count; t += kNQ) {
      tile(std::min<Index>(kNQ, count - t), key + t * stride, stride, codes + t * code_stride,
           code_stride);
    }
  }

 private:
  void tile(Index count, const S* key, Index stride, Index* codes, Index code_stride) const {
    pack_query_tile<S>(count, dim_, key, stride, kNQ, one_, tile_, scratch_);
    P best[std::size_t(kNV)], where[std::size_t(kNV)];
    for (int v = 0; v < kNV; ++v) {
      best[v] = simd::set1<P>(-std::numeric_limits<S>::infinity());
      where[v] = simd::zero<P>();
    }
    const S* panel = panels_;
    for (Index s = 0; s < codes_; s += kMR, panel += kMR * dim_) {
      P acc[std::size_t(kMR)][std::size_t(kNV)];
      unroll<kMR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA { acc[m][v] = simd::zero<P>(); });
      });
      tile_multiply<P, kMR, kNV>(acc, dim_, panel, tile_);
      unroll<kMR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        const P half = simd::set1<P>(half_[s + m]), at = simd::set1<P>(static_cast<S>(s + m));
        unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          const P score = simd::sub(acc[m][v], half);
          const P better = simd::less(best[v], score);  // false for NaN
          best[v] = simd::select(better, score, best[v]);
          where[v] = simd::select(better, at, where[v]);
        });
      });
    }
    S found[std::size_t(kNQ)];
    for (int v = 0; v < kNV; ++v) simd::store<P>(found + v * kW, where[v]);
    for (Index x = 0; x < count; ++x) codes[x * code_stride] = static_cast<Index>(found[x]);
  }

  Index codes_, dim_;
  const S* panels_;
  const S* half_;
  S *tile_, *scratch_, *one_;
};

/// codes: tokens x heads.
template <class K, class C>
void vq_nearest_into(const K& key, const C& codebook, const VqSizes& n, Index* codes,
                     ExecutorRef executor, Workspace& workspace) {
  using S = scalar_t<K>;
  constexpr Index chunk = 1024;  // tokens of a task
  const Index chunks = (n.tokens + chunk - 1) / chunk;
  const std::size_t bytes = VqSearch<S>::bytes(n.codes, n.dim);
  workspace.prepare(executor.workers(), bytes);
  executor.run(n.heads * chunks, [&](Index task, int worker) {
    const Index h = task / chunks, first = task % chunks * chunk;
    Arena arena = workspace.arena(worker, bytes);
    const VqSearch<S> search(n.codes, n.dim, codebook.data() + h * n.codes * codebook.outerStride(),
                             codebook.outerStride(), arena);
    search.run(std::min(chunk, n.tokens - first),
               key.data() + first * key.outerStride() + h * n.dim, key.outerStride(),
               codes + first * n.heads + h, n.heads);
  });
}

}  // namespace detail

/// Nearest codes of every key, T x heads.
template <MatrixLike K, MatrixLike C>
  requires SameScalar<K, C> && RealScalar<scalar_t<K>> VqCodes
  vq_nearest(const K& key, const C& codebook, Index heads = 1, ExecutorRef executor = {}) {
    const detail::VqSizes n =
        detail::vq_sizes(key.rows(), key.cols(), codebook.rows(), codebook.cols(), heads);
    VqCodes codes(n.tokens, heads);
    Workspace workspace;
    detail::vq_nearest_into(key, codebook, n, codes.data(), executor, workspace);
    return codes;
  }

/// |k - C_z|^2, T x heads.
template <MatrixLike K, MatrixLike C>
  requires SameScalar<K, C> && RealScalar<scalar_t<K>> Matrix<scalar_t<K>> vq_squared_error(
      const K& key, const C& codebook, const VqCodes& codes) {
    const detail::VqSizes n =
        detail::vq_sizes(key.rows(), key.cols(), codebook.rows(), codebook.cols(), codes.cols());
    detail::require_codes(codes, n);
    Matrix<scalar_t<K>> error(n.tokens, n.heads);
    for (Index t = 0; t < n.tokens; ++t) {
      for (Index h = 0; h < n.heads; ++h) {
        error(t, h) =
            (key.row(t).segment(h * n.dim, n.dim) - codebook.row(h * n.codes + codes(t, h)))
                .squaredNorm();
      }
    }
    return error;
  }

/// The commitment loss; 0 without tokens.
template <MatrixLike K, MatrixLike C>
  requires SameScalar<K, C> && RealScalar<scalar_t<K>> scalar_t<K> vq_commit_forward(
      const K& key, const C& codebook, const VqCodes& codes, const VqTokenMask* mask = nullptr) {
    using S = scalar_t<K>;
    const Matrix<S> error = vq_squared_error(key, codebook, codes);
    detail::require_token_mask(mask, key.rows());
    S sum = 0;
    for (Index t = 0; t < key.rows(); ++t) {
      if (mask == nullptr || (*mask)[t]) sum += error.row(t).sum();
    }
    return key.rows() == 0 ? S(0) : sum / static_cast<S>(key.rows());
  }

/// dkey = upstream * d commit / d key.
template <MatrixLike K, MatrixLike C, OutputMatrix DK>
  requires SameScalar<K, C, DK> && RealScalar<scalar_t<K>>
void vq_commit_backward(const K& key, const C& codebook, const VqCodes& codes, scalar_t<K> upstream,
                        DK&& dkey, const VqTokenMask* mask = nullptr) {
  using S = scalar_t<K>;
  const detail::VqSizes n =
      detail::vq_sizes(key.rows(), key.cols(), codebook.rows(), codebook.cols(), codes.cols());
  detail::require_codes(codes, n);
  detail::require_token_mask(mask, n.tokens);
  detail::require_shape("dkey", dkey.rows(), dkey.cols(), n.tokens, key.cols(), "shape of key");
  const S factor = n.tokens == 0 ? S(0) : S(2) * upstream / static_cast<S>(n.tokens);
  for (Index t = 0; t < n.tokens; ++t) {
    for (Index h = 0; h < n.heads; ++h) {
      auto to = dkey.row(t).segment(h * n.dim, n.dim);
      if (mask == nullptr || (*mask)[t]) {
        to = factor *
             (key.row(t).segment(h * n.dim, n.dim) - codebook.row(h * n.codes + codes(t, h)));
      } else {
        to.setZero();
      }
    }
  }
}

/// The codebook of an average, (heads*codes) x d.
template <RealScalar S>
Matrix<S> vq_codebook(const VqCodebookAverage<S>& average, const VqAverageOptions& options = {}) {
  detail::require(options.count_floor > 0, "count_floor (", options.count_floor,
                  ") must be positive");
  detail::require(average.sum.rows() == average.count.size(), "sum has ", average.sum.rows(),
                  " rows, count has ", average.count.size(), " entries, expected equal numbers");
  Matrix<S> codebook = average.sum;
  for (Index s = 0; s < codebook.rows(); ++s) {
    codebook.row(s) /= std::max(average.count.data()[s], static_cast<S>(options.count_floor));
  }
  return codebook;
}

/// One step of the moving averages with the keys of a batch and the codes they were given.
template <MatrixLike K>
  requires RealScalar<scalar_t<K>>
void vq_average_update(VqCodebookAverage<scalar_t<K>>& average, const K& key, const VqCodes& codes,
                       const VqTokenMask* mask = nullptr, const VqAverageOptions& options = {}) {
  using S = scalar_t<K>;
  detail::require(options.decay >= 0 && options.decay <= 1, "decay (", options.decay,
                  ") must be in [0, 1]");
  const detail::VqSizes n = detail::vq_sizes(key.rows(), key.cols(), average.sum.rows(),
                                             average.sum.cols(), codes.cols());
  detail::require_shape("count", average.count.rows(), average.count.cols(), n.heads, n.codes,
                        "heads x codes");
  detail::require_codes(codes, n);
  detail::require_token_mask(mask, n.tokens);
  const S keep = static_cast<S>(options.decay), add = static_cast<S>(1 - options.decay);
  Matrix<S> sum = Matrix<S>::Zero(average.sum.rows(), n.dim),
            count = Matrix<S>::Zero(n.heads, n.codes);
  for (Index t = 0; t < n.tokens; ++t) {
    if (mask != nullptr && !(*mask)[t]) continue;
    for (Index h = 0; h < n.heads; ++h) {
      sum.row(h * n.codes + codes(t, h)) += key.row(t).segment(h * n.dim, n.dim);
      count(h, codes(t, h)) += S(1);
    }
  }
  average.sum = keep * average.sum + add * sum;
  average.count = keep * average.count + add * count;
}

EIGENBLOCKS_NAMESPACE_END
