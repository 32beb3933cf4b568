// Normalisations of rows: RMSNorm, LayerNorm and L2 normalisation, whole rows or head by head.
//
//   rms_norm     y = w * x r                r = (mean x^2 + eps)^-1/2
//   layer_norm   y = w * (x - mu) r + b     mu = mean x, r = (mean (x - mu)^2 + eps)^-1/2    (two passes)
//   l2_normalize y = x r                    r = 1 / max(|x|, eps)
//
// Backward, with h = the normalised row before gain and bias and u = w * dy:
//   rms_norm     dx = r (u - h mean(u * h))              dw = sum over rows of dy * h
//   layer_norm   dx = r (u - mean u - h mean(u * h))     dw the same, db = sum over rows of dy
//   l2_normalize dx = r (dy - h sum(dy * h)) where |x| > eps, else dy / eps
//
// Shapes: x, y, dx, dy are T x (heads * d); gain w and bias b have d entries, shared by all heads; each head of each
// row is normalised by itself.  heads = 1 is the ordinary norm.  The norms of queries and keys are
//   rms_head (Qwen3)  rms_norm with heads = H, d gains        l2 (KeyNorm)  l2_normalize with heads = H
//   rms_full (OLMo2)  rms_norm with heads = 1, H d gains
// Only r is saved: T * heads entries, row by row.  An empty gain or bias (size 0) means none.
//
// In place: y may be x, and dx may be dy or x; other overlaps are not allowed.  Zero rows give y = 0 (or b) and finite
// gradients.  Nothing overflows or underflows on the way for |x| up to half the largest number: rows whose sum of
// squares leaves the range of the scalar are summed again, scaled by a power of two.  A NaN or infinity makes its row
// NaN.
// Gradients of gain and bias are summed in an order fixed by the shape: the executor does not change a bit.
//
// Errors: invalid_argument for shapes that do not fit, heads < 1 or not a divisor, and eps that is not a positive
// normal number of the scalar.
// Sources: arXiv 1910.07467 (RMSNorm), 1607.06450 (LayerNorm), kexue.fm 9859 (KeyNorm); torch's functions.
#pragma once

#include <eigenblocks/core/softmax.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

/// eps is LLaMA's; OLMo and Mistral configurations say 1e-5.
struct RmsNormOptions {
  double eps = 1e-6;
  Index heads = 1;
};
/// eps is torch's.
struct LayerNormOptions {
  double eps = 1e-5;
  Index heads = 1;
};
/// eps is torch's.
struct L2NormalizeOptions {
  double eps = 1e-12;
  Index heads = 1;
};

namespace detail {

/// sum_j (scale (x_j - mean))^2 with a scale that keeps it in range; 1 but for extreme rows.
template <class S>
struct SquareSum {
  S sum, scale;
};

template <class S>
S square_sum_scaled(const S* x, Index n, S mean, S scale) {
  using P = simd::Packet<S>;
  const P shift = simd::set1<P>(mean), factor = simd::set1<P>(scale);
  return sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    const P v = simd::mul(simd::sub(io.load(x + j, mean), shift), factor);
    return simd::mul(v, v);
  });
}

/// `floor` is what the caller adds to the sum: squares that vanish beside it need no rescue.
template <class S>
SquareSum<S> square_sum(const S* x, Index n, S mean, S floor) {
  using Limits = std::numeric_limits<S>;
  constexpr S tiny = Limits::min() / Limits::epsilon();
  const S sum = square_sum_scaled(x, n, mean, S(1));
  if (sum <= Limits::max() && sum + floor >= tiny) [[likely]]
    return {sum, S(1)};
  S largest = std::sqrt(floor);
  for (Index j = 0; j < n; ++j) largest = std::max(largest, std::abs(x[j] - mean));
  if (std::isnan(sum) || std::isinf(largest)) return {Limits::quiet_NaN(), S(1)};
  constexpr int most = Limits::max_exponent - 4;
  const S scale = std::ldexp(S(1), -std::clamp(std::ilogb(largest), -most, most));
  return {square_sum_scaled(x, n, mean, scale), scale};
}

/// (mean (x - mean)^2 + eps)^-1/2.
template <class S>
S reciprocal_rms(const S* x, Index n, S mean, S eps) {
  const S count = static_cast<S>(n);
  const auto [sum, scale] = square_sum(x, n, mean, eps * count);
  return scale / std::sqrt(sum / count + eps * scale * scale);
}

template <class S>
S row_mean(const S* x, Index n) {
  const S count = static_cast<S>(n);
  const S sum =
      sum_packets<S>(n, [x](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA { return io.load(x + j); });
  if (std::isfinite(sum)) [[likely]]
    return sum / count;
  const auto part = simd::set1<simd::Packet<S>>(S(1) / count);
  return sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    return simd::mul(io.load(x + j), part);
  });
}

/// 1 / max(|x|, eps).
template <class S>
S reciprocal_norm(const S* x, Index n, S eps) {
  const auto [sum, scale] = square_sum(x, n, S(0), eps * eps);
  const S r = scale / std::sqrt(sum), most = S(1) / eps;
  return r > most ? most : r;
}

/// y = w * (x - mean) r + b; null w or b are left out.
template <class S>
void scale_row(const S* x, const S* w, const S* b, S* y, Index n, S mean, S r, bool stream) {
  using P = simd::Packet<S>;
  const P shift = simd::set1<P>(mean), factor = simd::set1<P>(r);
  const auto pass = [&](auto finish) {
    for_output_packets(y, stream, n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
      io.put(y + j, finish(simd::mul(simd::sub(io.load(x + j), shift), factor), j, io));
    });
  };
  if (w == nullptr && b == nullptr) {
    pass([](const P& h, Index, auto) EIGENBLOCKS_INLINE_LAMBDA { return h; });
  } else if (b == nullptr) {
    pass([w](const P& h, Index j, auto io)
             EIGENBLOCKS_INLINE_LAMBDA { return simd::mul(h, io.load(w + j)); });
  } else if (w == nullptr) {
    pass([b](const P& h, Index j, auto io)
             EIGENBLOCKS_INLINE_LAMBDA { return simd::add(h, io.load(b + j)); });
  } else {
    pass([w, b](const P& h, Index j, auto io)
             EIGENBLOCKS_INLINE_LAMBDA { return simd::fma(h, io.load(w + j), io.load(b + j)); });
  }
}

/// What is known of a row: h = (x - mean) r, and for the backward pass the two reductions of the formulas at the top.
template <class S>
struct NormRow {
  S mean, r;
  S along = 0;           ///< factor of h sum(u * h): 1 / n; for l2 1, or 0 where |x| <= eps
  bool centred = false;  ///< subtract mean u
};

/// dx of one row; adds dy * h to dw_sum and dy to db_sum unless null.
template <bool Gain, class S>
void norm_backward_row(const S* x, const S* w, const S* dy, S* dx, S* dw_sum, S* db_sum, Index n,
                       const NormRow<S>& row, bool stream) {
  using P = simd::Packet<S>;
  const P shift = simd::set1<P>(row.mean), factor = simd::set1<P>(row.r);
  const auto normalised = [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    return simd::mul(simd::sub(io.load(x + j, row.mean), shift), factor);
  };
  const auto upstream = [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    if constexpr (Gain) return simd::mul(io.load(w + j), io.load(dy + j));
    return io.load(dy + j);
  };
  S product, sum = 0;
  if (row.centred) {
    P products[2] = {simd::zero<P>(), simd::zero<P>()}, sums[2] = {products[0], products[0]};
    const auto add = [&](int k, Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
      const P u = upstream(j, io);
      products[k] = simd::fma(u, normalised(j, io), products[k]);
      sums[k] = simd::add(sums[k], u);
    };
    constexpr Index w2 = 2 * simd::kLanes<S>;
    Index j = 0;
    for (; j + w2 <= n; j += w2) {
      add(0, j, WholePacket<S>{});
      add(1, j + w2 / 2, WholePacket<S>{});
    }
    for (; j + w2 / 2 <= n; j += w2 / 2) add(0, j, WholePacket<S>{});
    if (j < n) add(1, j, PartPacket<S>{n - j});
    product = simd::sum(simd::add(products[0], products[1]));
    sum = simd::sum(simd::add(sums[0], sums[1]));
  } else {
    product = sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
      return simd::mul(upstream(j, io), normalised(j, io));
    });
  }
  const P along = simd::set1<P>(product * row.along);
  const P level = simd::set1<P>(sum / static_cast<S>(n));
  for_output_packets(dx, stream, n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    const P h = normalised(j, io), g = io.load(dy + j);
    const P u = simd::sub(upstream(j, io), level);
    if constexpr (Gain) io.store(dw_sum + j, simd::fma(g, h, io.load(dw_sum + j)));
    if (db_sum != nullptr) io.store(db_sum + j, simd::add(g, io.load(db_sum + j)));
    io.put(dx + j, simd::mul(factor, simd::sub(u, simd::mul(h, along))));
  });
}

template <class V>
auto* data_or_null(V& v) {
  return v.size() == 0 ? nullptr : v.data();
}

/// Forward pass of a matrix; statistics(row) gives its mean and r.  rstd may be null.
template <class S, class Statistics>
void norm_forward(const ConstMatrixRef<S>& x, const ConstVectorRef<S>& w,
                  const ConstVectorRef<S>& b, MatrixRef<S> y, S* rstd, Index heads,
                  ExecutorRef executor, Statistics&& statistics) {
  const Index d = x.cols() / heads;
  const bool stream = worth_streaming(y.data(), y.rows(), y.cols(), {x.data()});
  for_row_blocks(x.rows(), x.cols(), executor, [&](Index first, Index rows) {
    for (Index i = first; i < first + rows; ++i) {
      for (Index h = 0; h < heads; ++h) {
        const S* const from = x.row(i).data() + h * d;
        const NormRow<S> row = statistics(from);
        if (rstd != nullptr) rstd[i * heads + h] = row.r;
        scale_row(from, data_or_null(w), data_or_null(b), y.row(i).data() + h * d, d, row.mean,
                  row.r, stream);
      }
    }
    if (stream) simd::stream_fence();
  });
}

/// Backward pass of a matrix; known(row, r) gives the NormRow.  Up to 16 blocks of rows keep their own sums of dw and
/// db, added in order at the end.
template <class S, class Known>
void norm_backward(const ConstMatrixRef<S>& x, const ConstVectorRef<S>& w, const S* rstd,
                   const ConstMatrixRef<S>& dy, MatrixRef<S> dx, VectorRef<S> dw, VectorRef<S> db,
                   Index heads, ExecutorRef executor, Known&& known) {
  const Index rows = x.rows(), d = x.cols() / heads, width = dw.size() + db.size();
  const Index block = std::max({Index(1), (rows + 15) / 16, 32768 / std::max<Index>(1, x.cols())});
  const Index blocks = (rows + block - 1) / block;
  const bool stream = worth_streaming(dx.data(), rows, dx.cols(), {x.data(), dy.data()});
  Matrix<S> sums = Matrix<S>::Zero(blocks, width);
  executor.run(blocks, [&](Index task, int) {
    S* const dw_sum = sums.row(task).data();
    S* const db_sum = db.size() == 0 ? nullptr : dw_sum + dw.size();
    for (Index i = task * block; i < std::min(rows, (task + 1) * block); ++i) {
      for (Index h = 0; h < heads; ++h) {
        const S* const from = x.row(i).data() + h * d;
        const S* const upstream = dy.row(i).data() + h * d;
        S* const to = dx.row(i).data() + h * d;
        const NormRow<S> row = known(from, rstd[i * heads + h]);
        if (w.size() != 0) {
          norm_backward_row<true>(from, w.data(), upstream, to, dw_sum, db_sum, d, row, stream);
        } else {
          norm_backward_row<false>(from, w.data(), upstream, to, dw_sum, db_sum, d, row, stream);
        }
      }
    }
    if (stream) simd::stream_fence();
  });
  dw.setZero();
  db.setZero();
  for (Index task = 0; task < blocks && width != 0; ++task) {
    dw += sums.row(task).head(dw.size()).transpose();
    db += sums.row(task).tail(db.size()).transpose();
  }
}

/// Checks eps and heads against the columns of x; returns eps as the scalar.
template <class S>
S norm_eps(double eps, Index heads, Index cols) {
  require(heads >= 1 && cols % heads == 0, "heads (", heads, ") must divide the columns of x (",
          cols, ")");
  require(eps >= static_cast<double>(std::numeric_limits<S>::min()) &&
              eps <= static_cast<double>(std::numeric_limits<S>::max()),
          "eps (", eps, ") must be a positive normal number");
  return static_cast<S>(eps);
}

inline void require_per_column(const char* name, Index size, Index cols, Index heads) {
  if (size != 0) require_size(name, size, cols / heads, "columns of x / heads, or 0 for none");
}
inline void require_per_group(const char* name, Index size, Index rows, Index heads) {
  require_size(name, size, rows * heads, "rows of x * heads");
}

/// The three forward passes; shapes but that of the saved r are checked here.
template <class S>
void rms_norm(const ConstMatrixRef<S>& x, const ConstVectorRef<S>& gain, MatrixRef<S> y, S* rstd,
              const RmsNormOptions& options, ExecutorRef executor) {
  const S eps = norm_eps<S>(options.eps, options.heads, x.cols());
  require_per_column("gain", gain.size(), x.cols(), options.heads);
  require_shape("y", y.rows(), y.cols(), x.rows(), x.cols(), "shape of x");
  const Index d = x.cols() / options.heads;
  norm_forward<S>(x, gain, Vector<S>(), y, rstd, options.heads, executor, [eps, d](const S* row) {
    return NormRow<S>{S(0), reciprocal_rms(row, d, S(0), eps)};
  });
}

template <class S>
void layer_norm(const ConstMatrixRef<S>& x, const ConstVectorRef<S>& gain,
                const ConstVectorRef<S>& bias, MatrixRef<S> y, S* rstd,
                const LayerNormOptions& options, ExecutorRef executor) {
  const S eps = norm_eps<S>(options.eps, options.heads, x.cols());
  require_per_column("gain", gain.size(), x.cols(), options.heads);
  require_per_column("bias", bias.size(), x.cols(), options.heads);
  require_shape("y", y.rows(), y.cols(), x.rows(), x.cols(), "shape of x");
  const Index d = x.cols() / options.heads;
  norm_forward<S>(x, gain, bias, y, rstd, options.heads, executor, [eps, d](const S* row) {
    const S mean = row_mean(row, d);
    return NormRow<S>{mean, reciprocal_rms(row, d, mean, eps)};
  });
}

template <class S>
void l2_normalize(const ConstMatrixRef<S>& x, MatrixRef<S> y, S* rnorm,
                  const L2NormalizeOptions& options, ExecutorRef executor) {
  const S eps = norm_eps<S>(options.eps, options.heads, x.cols());
  require_shape("y", y.rows(), y.cols(), x.rows(), x.cols(), "shape of x");
  const Index d = x.cols() / options.heads;
  norm_forward<S>(x, Vector<S>(), Vector<S>(), y, rnorm, options.heads, executor,
                  [eps, d](const S* row) {
                    return NormRow<S>{S(0), reciprocal_norm(row, d, eps)};
                  });
}

}  // namespace detail

/// y = gain * x r, and r in rstd (T * heads entries) for the backward pass.
/// x, y: T x (heads * d); gain: d entries or none.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void rms_norm_forward(const X& x, const ConstVectorRef<scalar_t<X>>& gain, Y&& y,
                      VectorRef<scalar_t<X>> rstd, const RmsNormOptions& options = {},
                      ExecutorRef executor = {}) {
  detail::require_per_group("rstd", rstd.size(), x.rows(), options.heads);
  detail::rms_norm<scalar_t<X>>(x, gain, y, rstd.data(), options, executor);
}

/// The same without rstd.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void rms_norm_forward(const X& x, const ConstVectorRef<scalar_t<X>>& gain, Y&& y,
                      const RmsNormOptions& options = {}, ExecutorRef executor = {}) {
  detail::rms_norm<scalar_t<X>>(x, gain, y, nullptr, options, executor);
}

/// The same by value, of any Eigen expression.
template <RealExpression D>
Matrix<typename D::Scalar> rms_norm(const D& x, const ConstVectorRef<typename D::Scalar>& gain,
                                    const RmsNormOptions& options = {}) {
  Matrix<typename D::Scalar> y = x;
  rms_norm_forward(y, gain, y, options);
  return y;
}

/// dx (T x (heads * d)) and dgain (as many entries as gain) from the input x, rstd of the forward pass, and dy.
template <MatrixLike X, MatrixLike G, OutputMatrix D>
  requires SameScalar<X, G, D> && RealScalar<scalar_t<X>>
void rms_norm_backward(const X& x, const ConstVectorRef<scalar_t<X>>& gain,
                       const ConstVectorRef<scalar_t<X>>& rstd, const G& dy, D&& dx,
                       VectorRef<scalar_t<X>> dgain, const RmsNormOptions& options = {},
                       ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const Index heads = options.heads;
  detail::norm_eps<S>(options.eps, heads, x.cols());
  detail::require_per_column("gain", gain.size(), x.cols(), heads);
  detail::require_per_group("rstd", rstd.size(), x.rows(), heads);
  detail::require_shape("dy", dy.rows(), dy.cols(), x.rows(), x.cols(), "shape of x");
  detail::require_shape("dx", dx.rows(), dx.cols(), x.rows(), x.cols(), "shape of x");
  detail::require_size("dgain", dgain.size(), gain.size(), "size of gain");
  const S along = S(1) / static_cast<S>(x.cols() / heads);
  Vector<S> none;
  detail::norm_backward<S>(x, gain, rstd.data(), dy, dx, dgain, none, heads, executor,
                           [along](const S*, S r) {
                             return detail::NormRow<S>{S(0), r, along};
                           });
}

/// y = gain * (x - mean) r + bias, and r in rstd (T * heads entries) for the backward pass.
/// x, y: T x (heads * d); gain, bias: d entries or none.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void layer_norm_forward(const X& x, const ConstVectorRef<scalar_t<X>>& gain,
                        const ConstVectorRef<scalar_t<X>>& bias, Y&& y, VectorRef<scalar_t<X>> rstd,
                        const LayerNormOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_per_group("rstd", rstd.size(), x.rows(), options.heads);
  detail::layer_norm<scalar_t<X>>(x, gain, bias, y, rstd.data(), options, executor);
}

/// The same without rstd.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void layer_norm_forward(const X& x, const ConstVectorRef<scalar_t<X>>& gain,
                        const ConstVectorRef<scalar_t<X>>& bias, Y&& y,
                        const LayerNormOptions& options = {}, ExecutorRef executor = {}) {
  detail::layer_norm<scalar_t<X>>(x, gain, bias, y, nullptr, options, executor);
}

/// The same by value, of any Eigen expression.
template <RealExpression D>
Matrix<typename D::Scalar> layer_norm(const D& x, const ConstVectorRef<typename D::Scalar>& gain,
                                      const ConstVectorRef<typename D::Scalar>& bias,
                                      const LayerNormOptions& options = {}) {
  Matrix<typename D::Scalar> y = x;
  layer_norm_forward(y, gain, bias, y, options);
  return y;
}

/// dx (T x (heads * d)), dgain and dbias (as many entries as gain and bias) from the input x, rstd of the forward pass,
/// and dy.  The mean is computed again.
template <MatrixLike X, MatrixLike G, OutputMatrix D>
  requires SameScalar<X, G, D> && RealScalar<scalar_t<X>>
void layer_norm_backward(const X& x, const ConstVectorRef<scalar_t<X>>& gain,
                         const ConstVectorRef<scalar_t<X>>& rstd, const G& dy, D&& dx,
                         VectorRef<scalar_t<X>> dgain, VectorRef<scalar_t<X>> dbias,
                         const LayerNormOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const Index heads = options.heads;
  detail::norm_eps<S>(options.eps, heads, x.cols());
  detail::require_per_column("gain", gain.size(), x.cols(), heads);
  detail::require_per_group("rstd", rstd.size(), x.rows(), heads);
  detail::require_shape("dy", dy.rows(), dy.cols(), x.rows(), x.cols(), "shape of x");
  detail::require_shape("dx", dx.rows(), dx.cols(), x.rows(), x.cols(), "shape of x");
  detail::require_size("dgain", dgain.size(), gain.size(), "size of gain");
  detail::require_per_column("dbias", dbias.size(), x.cols(), heads);
  const Index d = x.cols() / heads;
  const S along = S(1) / static_cast<S>(d);
  detail::norm_backward<S>(x, gain, rstd.data(), dy, dx, dgain, dbias, heads, executor,
                           [along, d](const S* row, S r) {
                             return detail::NormRow<S>{detail::row_mean(row, d), r, along, true};
                           });
}

/// y = x r with r = 1 / max(|x|, eps) in rnorm (T * heads entries) for the backward pass.  x, y: T x (heads * d).
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void l2_normalize_forward(const X& x, Y&& y, VectorRef<scalar_t<X>> rnorm,
                          const L2NormalizeOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_per_group("rnorm", rnorm.size(), x.rows(), options.heads);
  detail::l2_normalize<scalar_t<X>>(x, y, rnorm.data(), options, executor);
}

/// The same without rnorm.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void l2_normalize_forward(const X& x, Y&& y, const L2NormalizeOptions& options = {},
                          ExecutorRef executor = {}) {
  detail::l2_normalize<scalar_t<X>>(x, y, nullptr, options, executor);
}

/// The same by value, of any Eigen expression.
template <RealExpression D>
Matrix<typename D::Scalar> l2_normalize(const D& x, const L2NormalizeOptions& options = {}) {
  Matrix<typename D::Scalar> y = x;
  l2_normalize_forward(y, y, options);
  return y;
}

/// dx (T x (heads * d)) from the input x, rnorm of the forward pass, and dy; eps must be the forward pass's.
template <MatrixLike X, MatrixLike G, OutputMatrix D>
  requires SameScalar<X, G, D> && RealScalar<scalar_t<X>>
void l2_normalize_backward(const X& x, const ConstVectorRef<scalar_t<X>>& rnorm, const G& dy,
                           D&& dx, const L2NormalizeOptions& options = {},
                           ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const Index heads = options.heads;
  const S most = S(1) / detail::norm_eps<S>(options.eps, heads, x.cols());
  detail::require_per_group("rnorm", rnorm.size(), x.rows(), heads);
  detail::require_shape("dy", dy.rows(), dy.cols(), x.rows(), x.cols(), "shape of x");
  detail::require_shape("dx", dx.rows(), dx.cols(), x.rows(), x.cols(), "shape of x");
  Vector<S> none;
  detail::norm_backward<S>(x, none, rnorm.data(), dy, dx, none, none, heads, executor,
                           [most](const S*, S r) {
                             return detail::NormRow<S>{S(0), r, r == most ? S(0) : S(1)};
                           });
}

EIGENBLOCKS_NAMESPACE_END
