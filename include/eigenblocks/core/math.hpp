// Scalar functions of the activations, accurate and vectorised, as packet functions (core/simd.hpp) and over rows.
//
//   sigmoid(x) = 1 / (1 + e^-x)        silu(x) = x sigmoid(x)        softplus(x) = log(1 + e^x)
//   tanh(x)                            normal_cdf(x) = Phi(x)        gelu(x) = x Phi(x)
//   gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))     (the approximation of BERT and GPT-2)
// and their derivatives silu_grad, gelu_grad, gelu_tanh_grad, softplus' = sigmoid, tanh' = 1 - tanh^2.
//
// Why not Eigen's: in 3.4 the float logistic is off by 5e-4 near x = -8, and double tanh, erf and log1p are scalar
// (13-16 ns per element).  Error bounds, float and double, over the whole line (tests/unit/core/math_test.cpp has
// the same table): sigmoid, silu, tanh, softplus 4 ulp, silu_grad 6; normal_cdf, gelu 8 ulp, gelu_grad 8 + x^2; gelu_tanh
// and its derivative 8 ulp, in the lower tail 8 + 3 |2u|, u the argument of the tanh (the rounding of an exponent is
// relative to it).  Derivatives count in units of the larger of their two terms.  The bounds hold as long as the tail that
// the function is made of (e^-|x|, Phi(-|x|), e^-|2u|) is a normal number; beyond that comes the exact limit.  None
// overflows on the way; limits at +-inf are exact; NaN stays NaN.
//
// Row form: transform(in, out, n, f) applies f, a generic callable on packets and scalars, to n contiguous numbers;
// in == out is allowed.
#pragma once

#include <eigenblocks/core/simd.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace simd {

/// sigmoid(x) and 1 - sigmoid(x) = sigmoid(-x), both with full relative accuracy, from one e^-|x|.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE void sigmoid_pair(const P& x, P& value, P& complement) {
  const P one = set1<P>(lane_t<P>(1));
  const P e = exp_nonpositive(neg(abs(x)));
  const P large = div(one, add(one, e));
  const P small = mul(e, large);
  const P negative = less(x, zero<P>());
  value = select(negative, small, large);
  complement = select(negative, large, small);
}

/// 1 / (1 + e^-x).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P sigmoid(const P& x) {
  P value, complement;
  sigmoid_pair(x, value, complement);
  return value;
}

/// x sigmoid(x); silu(-inf) = 0.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P silu(const P& x) {
  // The bound keeps -inf * 0 out; below it the sigmoid is 0.
  return mul(max(x, set1<P>(lane_t<P>(-1e4))), sigmoid(x));
}

/// sigmoid(x) (1 + x (1 - sigmoid(x))).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P silu_grad(const P& x) {
  P gate, rest;
  sigmoid_pair(x, gate, rest);
  const P slope = mul(gate, rest);
  return select(equal(slope, zero<P>()), gate, fma(x, slope, gate));
}

/// e^x - 1 for |x| <= 80 without cancellation: 2^n (e^r - 1) + (2^n - 1).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P expm1_bounded(const P& x) {
  P rounded, n;
  const P r = detail::reduce_log2(x, rounded, n);
  const P em1 = fma(mul(r, r), detail::exp_tail(r), r);
  const P one = set1<P>(lane_t<P>(1));
  const P power = detail::add_exponent(one, rounded);
  return fma(power, em1, sub(power, one));
}

/// tanh(x) = (e^2x - 1) / (e^2x + 1), the numerator without cancellation.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P tanh(const P& x) {
  using S = lane_t<P>;
  const P bound = set1<P>(S(sizeof(S) == 4 ? 10 : 20));  // |tanh| is 1 to the last bit from here on
  const P clamped = select(less(abs(x), bound), x, select(less(x, zero<P>()), neg(bound), bound));
  const P em1 = expm1_bounded(add(clamped, clamped));
  const P y = div(em1, add(em1, set1<P>(S(2))));
  return select(equal(x, x), y, x);
}

/// log(1 + u) for 0 <= u <= 1: 2 atanh(u / (2 + u)).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P log1p_unit(const P& u) {
  using S = lane_t<P>;
  const P s = div(u, add(u, set1<P>(S(2))));
  const P z = mul(s, s);
  P tail;
  if constexpr (std::is_same_v<S, float>) {
    constexpr float c[] = {0.333333336777f, 0.199998481523f, 0.142964053573f, 0.108500208066f,
                           0.116268908511f};
    tail = horner(c, z);
  } else {
    constexpr double c[] = {
        0.33333333333333333449,  0.19999999999999750014,  0.14285714285803394492,
        0.11111111098732389795,  0.090909099715954222357, 0.076922712216323600892,
        0.066676048946984079645, 0.058669421197783982802, 0.054241006871070871234,
        0.037396653969778632647, 0.078268285134317273645};
    tail = horner(c, z);
  }
  const P twice = add(s, s);
  return fma(mul(twice, z), tail, twice);
}

/// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P softplus(const P& x) {
  const P tail = log1p_unit(exp_nonpositive(neg(abs(x))));
  return add(select(less(zero<P>(), x), x, zero<P>()), select(equal(x, x), tail, x));
}

namespace detail {
/// a^2 - square, where square = a * a rounded: one fused multiply-add, or Dekker's product on targets without it.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P square_error(const P& a, const P& square) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, a, neg(square));
#else
  const P c = mul(a, set1<P>(lane_t<P>(sizeof(lane_t<P>) == 4 ? 4097.0 : 134217729.0)));
  const P high = sub(c, sub(c, a));
  const P low = sub(a, high);
  const P cross = mul(add(high, high), low);
  return add(mul(low, low), add(cross, sub(mul(high, high), square)));
#endif
}
}  // namespace detail

/// Standard normal distribution function; the lower tail keeps its relative accuracy.
///   Phi(-z sqrt 2) = erfc(z) / 2,  erfc(z) = t g(t) e^(-z^2),  t = 2 / (2 + z), g a minimax polynomial for 0 <= z <= 27.5
///   (10 in float).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P normal_cdf(const P& x) {
  using S = lane_t<P>;
  const P one = set1<P>(S(1));
  const P a = abs(x);
  const P z = mul(a, set1<P>(S(0.70710678118654752440)));
  const P t = div(set1<P>(S(2)), add(set1<P>(S(2)), z));
  P g;
  if constexpr (std::is_same_v<S, float>) {
    constexpr float c[] = {0.57201197492f,    0.32622250094f,    0.10202982440f,
                           0.0059628170017f,  -0.0061544538531f, -0.00061965322282f,
                           0.00059697525758f, 4.6780469090e-6f,  -6.6920841027e-5f,
                           6.6812703233e-6f,  5.5794735334e-6f};
    g = horner(c, mul(sub(t, set1<P>(S(0.58333333333333333333))), set1<P>(S(2.4))));
  } else {
    constexpr double c[] = {
        0.53473266149462551646,     0.33817087581594185603,     0.12438548734917219816,
        0.012285324665944693826,    -0.0088678307081479050044,  -0.0018136980324165837301,
        0.001116383612158349711,    0.00014593872942895238231,  -0.00018708402576554950836,
        0.000014271743037057148611, 0.000028202358191372629652, -0.000010679778285730778533,
        -1.8054216149459380734e-6,  2.7337889696371628409e-6,   -7.112751133244804993e-7,
        -2.7084523730719414554e-7,  2.8834918358651197623e-7,   -7.87413637004750586e-8,
        -4.1748162897369201352e-8,  4.0699382405925109175e-8,   -1.5497870886499898743e-9,
        -8.2302985738359114197e-9,  1.0267949035251223411e-9,   7.2336320425809357337e-10};
    g = horner(
        c, mul(sub(t, set1<P>(S(0.53389830508474576271))), set1<P>(S(1 / 0.46610169491525423729))));
  }
  // e^(-x^2/2) with the rounding error of x^2 put back: matters from |x| = 4 on.
  const P square = mul(a, a);
  const P lost = detail::square_error(a, square);
  const P half = set1<P>(S(0.5));
  const P density = mul(exp_nonpositive(mul(square, neg(half))), fma(lost, neg(half), one));
  const P tail = mul(half, mul(mul(t, g), density));
  // Beyond the fitted range the value is below the smallest normal number; also keeps inf - inf out.
  const P edge = set1<P>(S(sizeof(S) == 4 ? 13.1 : 37.6));
  const P lower = select(less(a, edge), tail, zero<P>());
  const P y = select(less(x, zero<P>()), lower, sub(one, lower));
  return select(equal(x, x), y, x);
}

/// x Phi(x), the exact GELU (arXiv 1606.08415).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P gelu(const P& x) {
  const P cdf = normal_cdf(x);
  return select(equal(cdf, zero<P>()), zero<P>(), mul(x, cdf));
}

/// Phi(x) + x phi(x).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P gelu_grad(const P& x) {
  using S = lane_t<P>;
  const P density =
      mul(exp_nonpositive(mul(mul(x, x), set1<P>(S(-0.5)))), set1<P>(S(0.39894228040143267794)));
  const P cdf = normal_cdf(x);
  return select(equal(density, zero<P>()), cdf, fma(x, density, cdf));
}

namespace detail {
inline constexpr double kGeluScale = 0.79788456080286535588;  // sqrt(2 / pi)
inline constexpr double kGeluCubic = 0.044715;
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P gelu_tanh_inner(const P& x, const P& square) {
  using S = lane_t<P>;
  return mul(mul(x, set1<P>(S(kGeluScale))), fma(square, set1<P>(S(kGeluCubic)), set1<P>(S(1))));
}
}  // namespace detail

/// The tanh approximation of GELU.  (1 + tanh u) / 2 is taken as sigmoid(2u), which keeps the lower tail.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P gelu_tanh(const P& x) {
  const P u = detail::gelu_tanh_inner(x, mul(x, x));
  const P gate = sigmoid(add(u, u));
  return select(equal(gate, zero<P>()), zero<P>(), mul(x, gate));
}

/// d/dx of gelu_tanh: g + x g (1 - g) 2 u', with g = sigmoid(2u).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P gelu_tanh_grad(const P& x) {
  using S = lane_t<P>;
  const P square = mul(x, x);
  const P u = detail::gelu_tanh_inner(x, square);
  P gate, rest;
  sigmoid_pair(add(u, u), gate, rest);
  const P slope = mul(gate, rest);
  const P inner = mul(set1<P>(S(2 * detail::kGeluScale)),
                      fma(square, set1<P>(S(3 * detail::kGeluCubic)), set1<P>(S(1))));
  return select(equal(slope, zero<P>()), gate, fma(mul(x, slope), inner, gate));
}

/// out[i] = f(in[i]) for n contiguous numbers; f works on packets and on scalars.
template <RealScalar S, class F>
void transform(const S* in, S* out, Index n, F&& f) {
  using P = Packet<S>;
  constexpr Index w = kLanes<S>;
  Index i = 0;
  for (; i + w <= n; i += w) store<P>(out + i, f(load<P>(in + i)));
  for (; i < n; ++i) out[i] = f(in[i]);
}

}  // namespace simd

EIGENBLOCKS_NAMESPACE_END
