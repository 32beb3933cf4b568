// Softmax, log-softmax and log-sum-exp of every row, with their gradients.
//
//   softmax               p_j = exp(x_j - m) / sum_k exp(x_k - m),  m = max_k x_k
//   log_softmax           y_j = x_j - lse
//   logsumexp             lse = m + log(sum_k exp(x_k - m))
//   softmax_backward      dx_j = p_j (dp_j - sum_k p_k dp_k)
//   log_softmax_backward  dx_j = dy_j - p_j sum_k dy_k
//   logsumexp_backward    dx_j = dlse p_j
//
// Shapes: matrices are T x n; lse and its gradient have T entries.  An output may be the memory of an input of the
// same shape (in place); other overlaps are not allowed.  Rows are independent: the executor does not change a bit.
//
// Masked entries are x_j = -inf.  They are selected away, never multiplied away:
//   * their probability and their gradient are exactly 0, whatever the upstream gradient holds there, NaN included;
//   * a row of nothing but -inf (or without columns) has p = 0, log p = -inf, lse = -inf and gradient 0.
// A NaN or +inf anywhere in a row makes the whole row NaN.
//
// Accuracy: exp(t) is computed as 2^(t log2 e), twice as fast as an exp that is exact to the last bit; the relative
// error is (2 + |t|) ulp with t = x_j - m, that is within 2 ulp of the row's largest probability everywhere.
// A row is passed over three times (maximum; exponentials and their sum; scale).
//
// Errors: invalid_argument where shapes differ.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/simd.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

/// What the functions that return their result take: any Eigen matrix, array or expression of float or double.
/// (Through derived(), because Eigen's segments of vectors derive from another type's DenseBase.)
template <class D>
concept RealExpression = RealScalar<typename D::Scalar> && requires(const D& x) {
  requires detail::EigenDense<std::remove_cvref_t<decltype(x.derived())>>;
};

// How this header and nn/ walk over rows.  A loop body is a generic callable body(j, io): it handles the packet that
// begins at column j and reads and writes through io, so that the columns left over at the end of a row take the same
// packet code.
namespace detail {

/// Loads and stores whole packets.
template <class S>
struct WholePacket {
  using P = simd::Packet<S>;
  EIGENBLOCKS_ALWAYS_INLINE P load(const S* from, S /*fill*/ = S(0)) const {
    return simd::load<P>(from);
  }
  EIGENBLOCKS_ALWAYS_INLINE void store(S* to, const P& p) const { simd::store<P>(to, p); }
  EIGENBLOCKS_ALWAYS_INLINE void put(S* to, const P& p) const { store(to, p); }
};

/// The same, but `put` goes past the caches.
template <class S>
struct StreamPacket : WholePacket<S> {
  EIGENBLOCKS_ALWAYS_INLINE void put(S* to, const simd::Packet<S>& p) const { simd::stream(to, p); }
};

/// Loads and stores the first `count` lanes, 0 < count < kLanes; the others load as `fill` and are not written.
template <class S>
struct PartPacket {
  using P = simd::Packet<S>;
  Index count;

#if defined(__AVX512F__) && !defined(EIGEN_DONT_VECTORIZE)
  unsigned lanes() const { return (1u << count) - 1u; }
  EIGENBLOCKS_ALWAYS_INLINE P load(const S* from, S fill = S(0)) const {
    if constexpr (std::is_same_v<S, float>) {
      return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(lanes()), from);
    } else {
      return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>(lanes()), from);
    }
  }
  EIGENBLOCKS_ALWAYS_INLINE void store(S* to, const P& p) const {
    if constexpr (std::is_same_v<S, float>) {
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes()), p);
    } else {
      _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes()), p);
    }
  }
#elif defined(__AVX__) && !defined(EIGEN_DONT_VECTORIZE)
  __m256i lanes() const {
    static constexpr int kSet[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const Index words = count * Index(sizeof(S) / sizeof(int));
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kSet + 8 - words));
  }
  EIGENBLOCKS_ALWAYS_INLINE P load(const S* from, S fill = S(0)) const {
    if constexpr (std::is_same_v<S, float>) {
      return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(from, lanes()),
                              _mm256_castsi256_ps(lanes()));
    } else {
      return _mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(from, lanes()),
                              _mm256_castsi256_pd(lanes()));
    }
  }
  EIGENBLOCKS_ALWAYS_INLINE void store(S* to, const P& p) const {
    if constexpr (std::is_same_v<S, float>) {
      _mm256_maskstore_ps(to, lanes(), p);
    } else {
      _mm256_maskstore_pd(to, lanes(), p);
    }
  }
#else
  P load(const S* from, S fill = S(0)) const {
    S lanes[simd::kLanes<S>];
    for (Index i = 0; i < simd::kLanes<S>; ++i) lanes[i] = i < count ? from[i] : fill;
    return simd::load<P>(lanes);
  }
  void store(S* to, const P& p) const {
    S lanes[simd::kLanes<S>];
    simd::store<P>(lanes, p);
    for (Index i = 0; i < count; ++i) to[i] = lanes[i];
  }
#endif
  EIGENBLOCKS_ALWAYS_INLINE void put(S* to, const P& p) const { store(to, p); }
};

template <class S, class Body>
EIGENBLOCKS_ALWAYS_INLINE void for_packets(Index n, Body&& body) {
  constexpr Index w = simd::kLanes<S>;
  Index j = 0;
  for (; j + w <= n; j += w) body(j, WholePacket<S>{});
  if (j < n) body(j, PartPacket<S>{n - j});
}

/// Outputs from this size on do not stay in a cache, so writing them past it saves the line fetched before each store: a
/// third of the traffic of a copy.
inline constexpr Index kStreamBytes = Index{24} << 20;

/// Whether an output of rows x cols at y is to be streamed; in place it is in the cache already.
template <class S>
bool worth_streaming(const S* y, Index rows, Index cols, std::initializer_list<const S*> inputs) {
  return rows * cols * Index(sizeof(S)) >= kStreamBytes &&
         std::find(inputs.begin(), inputs.end(), y) == inputs.end();
}

/// for_packets whose io.put(y + j, p) writes the output row y, streamed if so wanted and y is aligned.
template <class S, class Body>
EIGENBLOCKS_ALWAYS_INLINE void for_output_packets(const S* y, bool stream, Index n, Body&& body) {
  constexpr Index w = simd::kLanes<S>;
  if (!stream || reinterpret_cast<std::uintptr_t>(y) % (std::size_t(w) * sizeof(S)) != 0) {
    return for_packets<S>(n, body);
  }
  Index j = 0;
  for (; j + w <= n; j += w) body(j, StreamPacket<S>{});
  if (j < n) body(j, PartPacket<S>{n - j});
}

/// Combines body(j, io) of all packets of a row with four accumulators (the latency of an addition is four cycles).
template <class S, class Combine, class Body>
EIGENBLOCKS_ALWAYS_INLINE simd::Packet<S> reduce_packets(Index n, S start, Combine&& combine,
                                                         Body&& body) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  P a = simd::set1<P>(start), b = a, c = a, d = a;
  Index j = 0;
  for (; j + 4 * w <= n; j += 4 * w) {
    a = combine(body(j, WholePacket<S>{}), a);
    b = combine(body(j + w, WholePacket<S>{}), b);
    c = combine(body(j + 2 * w, WholePacket<S>{}), c);
    d = combine(body(j + 3 * w, WholePacket<S>{}), d);
  }
  for (; j + w <= n; j += w) a = combine(body(j, WholePacket<S>{}), a);
  if (j < n) b = combine(body(j, PartPacket<S>{n - j}), b);
  return combine(combine(a, b), combine(c, d));
}

template <class S, class Body>
EIGENBLOCKS_ALWAYS_INLINE S sum_packets(Index n, Body&& body) {
  using P = simd::Packet<S>;
  return simd::sum(reduce_packets<S>(
      n, S(0), [](const P& p, const P& q) EIGENBLOCKS_INLINE_LAMBDA { return simd::add(p, q); },
      body));
}

/// Runs work(first_row, rows) over blocks of about 2^15 entries (some 10 us of work), cut by shape alone.
template <class Work>
void for_row_blocks(Index rows, Index cols, ExecutorRef executor, Work&& work) {
  const Index block = std::max<Index>(1, 32768 / std::max<Index>(1, cols));
  executor.run((rows + block - 1) / block,
               [&](Index task, int) { work(task * block, std::min(block, rows - task * block)); });
}

/// e^t for t <= 0 (or barely above it); e^-inf = 0.  Relative error |t| ulp: right for probabilities, cheaper than simd::exp.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P exp_by_exp2(const P& t) {
  using S = simd::lane_t<P>;
  return simd::exp2(simd::mul(t, simd::set1<P>(S(1.44269504088896340736))));
}

template <class S>
inline constexpr S kMinusInfinity = -std::numeric_limits<S>::infinity();

/// The maximum of a row; -inf only if every entry is -inf.  A NaN next to a larger number may be overlooked: it shows
/// as soon as the row is exponentiated.
template <class S>
S row_max(const S* x, Index n) {
  using P = simd::Packet<S>;
  const S m = simd::max_lane(reduce_packets<S>(
      n, kMinusInfinity<S>,
      [](const P& p, const P& q) EIGENBLOCKS_INLINE_LAMBDA { return simd::max(p, q); },
      [x](Index j, auto io)
          EIGENBLOCKS_INLINE_LAMBDA { return io.load(x + j, kMinusInfinity<S>); }));
  if (m == kMinusInfinity<S>) [[unlikely]] {
    for (Index j = 0; j < n; ++j) {
      if (std::isnan(x[j])) return x[j];
    }
  }
  return m;
}

/// sum_j e^(x_j - m).
template <class S>
S row_exp_sum(const S* x, Index n, S m) {
  const auto shift = simd::set1<simd::Packet<S>>(m);
  return sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    return exp_by_exp2(simd::sub(io.load(x + j, kMinusInfinity<S>), shift));
  });
}

template <class S>
void softmax_row(const S* x, S* p, Index n) {
  const S m = row_max(x, n);
  if (m == kMinusInfinity<S>) {
    std::fill_n(p, n, S(0));
    return;
  }
  const auto shift = simd::set1<simd::Packet<S>>(m);
  const S total = sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    const auto e = exp_by_exp2(simd::sub(io.load(x + j, kMinusInfinity<S>), shift));
    io.store(p + j, e);
    return e;
  });
  const auto scale = simd::set1<simd::Packet<S>>(S(1) / total);
  for_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    io.store(p + j, simd::mul(io.load(p + j), scale));
  });
}

template <bool Select, class S>
void softmax_backward_row(const S* p, const S* dp, S* dx, Index n) {
  using P = simd::Packet<S>;
  // The factor is selected, not the product: both forms then contract to the same fused multiply-add.
  const auto product = [](const P& q, const P& g) EIGENBLOCKS_INLINE_LAMBDA {
    const P none = simd::zero<P>();
    if constexpr (Select) return simd::mul(q, simd::select(simd::equal(q, none), none, g));
    return simd::mul(q, g);
  };
  const S dot = sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    return product(io.load(p + j), io.load(dp + j));
  });
  if (!Select && !std::isfinite(dot)) {  // perhaps only by 0 * NaN at a masked entry
    return softmax_backward_row<true>(p, dp, dx, n);
  }
  const P shift = simd::set1<P>(dot);
  for_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    io.store(dx + j, product(io.load(p + j), simd::sub(io.load(dp + j), shift)));
  });
}

template <class S>
void log_softmax_row(const S* x, S* y, Index n) {
  using P = simd::Packet<S>;
  const S m = row_max(x, n);
  if (m == kMinusInfinity<S>) {
    std::fill_n(y, n, m);
    return;
  }
  const P shift = simd::set1<P>(m), log_sum = simd::set1<P>(std::log(row_exp_sum(x, n, m)));
  for_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    io.store(y + j, simd::sub(simd::sub(io.load(x + j), shift), log_sum));
  });
}

template <class S>
void log_softmax_backward_row(const S* y, const S* dy, S* dx, Index n) {
  using P = simd::Packet<S>;
  const P none = simd::zero<P>(), lowest = simd::set1<P>(kMinusInfinity<S>);
  const P total = simd::set1<P>(sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    return simd::select(simd::equal(io.load(y + j), lowest), none, io.load(dy + j));
  }));
  for_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    const P log_p = io.load(y + j);
    const P slope = simd::sub(io.load(dy + j), simd::mul(exp_by_exp2(log_p), total));
    io.store(dx + j, simd::select(simd::equal(log_p, lowest), none, slope));
  });
}

template <class S>
void logsumexp_backward_row(const S* x, S lse, S dlse, S* dx, Index n) {
  using P = simd::Packet<S>;
  const P none = simd::zero<P>(), lowest = simd::set1<P>(kMinusInfinity<S>);
  const P shift = simd::set1<P>(lse), scale = simd::set1<P>(dlse);
  for_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    const P value = io.load(x + j);
    const P p = exp_by_exp2(simd::sub(value, shift));
    io.store(dx + j, simd::select(simd::equal(value, lowest), none, simd::mul(p, scale)));
  });
}

}  // namespace detail

/// p = softmax of each row of x; x and p are T x n.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void softmax_forward(const X& x, Y&& p, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_shape("p", p.rows(), p.cols(), x.rows(), x.cols(), "shape of x");
  const ConstMatrixRef<S> from(x);
  MatrixRef<S> to(p);
  detail::for_row_blocks(x.rows(), x.cols(), executor, [&](Index first, Index rows) {
    for (Index i = first; i < first + rows; ++i) {
      detail::softmax_row(from.row(i).data(), to.row(i).data(), from.cols());
    }
  });
}

/// The same by value, of any Eigen expression.
template <RealExpression D>
Matrix<typename D::Scalar> softmax(const D& x) {
  Matrix<typename D::Scalar> p = x;
  softmax_forward(p, p);
  return p;
}

/// dx from the probabilities p that the forward pass returned and their gradient dp; all T x n.
template <MatrixLike Y, MatrixLike G, OutputMatrix X>
  requires SameScalar<Y, G, X> && RealScalar<scalar_t<Y>>
void softmax_backward(const Y& p, const G& dp, X&& dx, ExecutorRef executor = {}) {
  using S = scalar_t<Y>;
  detail::require_shape("dp", dp.rows(), dp.cols(), p.rows(), p.cols(), "shape of p");
  detail::require_shape("dx", dx.rows(), dx.cols(), p.rows(), p.cols(), "shape of p");
  const ConstMatrixRef<S> value(p), upstream(dp);
  MatrixRef<S> to(dx);
  detail::for_row_blocks(p.rows(), p.cols(), executor, [&](Index first, Index rows) {
    for (Index i = first; i < first + rows; ++i) {
      detail::softmax_backward_row<false>(value.row(i).data(), upstream.row(i).data(),
                                          to.row(i).data(), value.cols());
    }
  });
}

/// y = log softmax of each row of x; x and y are T x n.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void log_softmax_forward(const X& x, Y&& y, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_shape("y", y.rows(), y.cols(), x.rows(), x.cols(), "shape of x");
  const ConstMatrixRef<S> from(x);
  MatrixRef<S> to(y);
  detail::for_row_blocks(x.rows(), x.cols(), executor, [&](Index first, Index rows) {
    for (Index i = first; i < first + rows; ++i) {
      detail::log_softmax_row(from.row(i).data(), to.row(i).data(), from.cols());
    }
  });
}

/// The same by value, of any Eigen expression.
template <RealExpression D>
Matrix<typename D::Scalar> log_softmax(const D& x) {
  Matrix<typename D::Scalar> y = x;
  log_softmax_forward(y, y);
  return y;
}

/// dx from the log-probabilities y that the forward pass returned and their gradient dy; all T x n.
template <MatrixLike Y, MatrixLike G, OutputMatrix X>
  requires SameScalar<Y, G, X> && RealScalar<scalar_t<Y>>
void log_softmax_backward(const Y& y, const G& dy, X&& dx, ExecutorRef executor = {}) {
  using S = scalar_t<Y>;
  detail::require_shape("dy", dy.rows(), dy.cols(), y.rows(), y.cols(), "shape of y");
  detail::require_shape("dx", dx.rows(), dx.cols(), y.rows(), y.cols(), "shape of y");
  const ConstMatrixRef<S> value(y), upstream(dy);
  MatrixRef<S> to(dx);
  detail::for_row_blocks(y.rows(), y.cols(), executor, [&](Index first, Index rows) {
    for (Index i = first; i < first + rows; ++i) {
      detail::log_softmax_backward_row(value.row(i).data(), upstream.row(i).data(),
                                       to.row(i).data(), value.cols());
    }
  });
}

/// lse[t] = log sum_j exp(x(t, j)); x is T x n, lse has T entries.
template <MatrixLike X>
  requires RealScalar<scalar_t<X>>
void logsumexp_forward(const X& x, VectorRef<scalar_t<X>> lse, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_size("lse", lse.size(), x.rows(), "rows of x");
  const ConstMatrixRef<S> from(x);
  detail::for_row_blocks(x.rows(), x.cols(), executor, [&](Index first, Index rows) {
    for (Index i = first; i < first + rows; ++i) {
      const S* const row = from.row(i).data();
      const S m = detail::row_max(row, from.cols());
      lse[i] = m == detail::kMinusInfinity<S>
                   ? m
                   : m + std::log(detail::row_exp_sum(row, from.cols(), m));
    }
  });
}

/// The same by value, of any Eigen expression.
template <RealExpression D>
Vector<typename D::Scalar> logsumexp(const D& x) {
  using S = typename D::Scalar;
  const Matrix<S> values = x;
  Vector<S> lse(values.rows());
  logsumexp_forward(values, lse);
  return lse;
}

/// dx from x, lse as returned by the forward pass, and dlse; x and dx are T x n, lse and dlse have T entries.
template <MatrixLike X, OutputMatrix D>
  requires SameScalar<X, D> && RealScalar<scalar_t<X>>
void logsumexp_backward(const X& x, const ConstVectorRef<scalar_t<X>>& lse,
                        const ConstVectorRef<scalar_t<X>>& dlse, D&& dx,
                        ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_size("lse", lse.size(), x.rows(), "rows of x");
  detail::require_size("dlse", dlse.size(), x.rows(), "rows of x");
  detail::require_shape("dx", dx.rows(), dx.cols(), x.rows(), x.cols(), "shape of x");
  const ConstMatrixRef<S> from(x);
  MatrixRef<S> to(dx);
  detail::for_row_blocks(x.rows(), x.cols(), executor, [&](Index first, Index rows) {
    for (Index i = first; i < first + rows; ++i) {
      detail::logsumexp_backward_row(from.row(i).data(), lse[i], dlse[i], to.row(i).data(),
                                     from.cols());
    }
  });
}

EIGENBLOCKS_NAMESPACE_END
