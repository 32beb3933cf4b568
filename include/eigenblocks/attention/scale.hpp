// How much to multiply scores by, as a function of the number n of visible keys.
//
//   standard             1 / sqrt(d)
//   log_n                ln n / (ln base sqrt(d))                  entropy invariance; 0 at n = 1
//   log_n_clamped        max(1, ln n / ln base) / sqrt(d)          for models trained without it
//   gradmax_normal       a / sqrt(d), a maximises a (1 - e^(a^2) / n): a = sqrt(W0(n sqrt(e) / 2) - 1/2)
//   gradmax_normal_fit   0.84 sqrt(ln n) / sqrt(d)
//   gradmax_cosine       a maximises a (1 - g(2a) / (n g(a)^2)), g(a) = E e^(a cos) = 0F1(; d/2; a^2/4);
//                        multiplies the cosine, no 1/sqrt(d); about 3.5 ln n for d = 128
//   softmax_gradient_mass(s, alpha) = alpha (1 - sum softmax(alpha s)^2) = half the L1 norm of d softmax(alpha s) / ds
//
// The gradmax rules replace the moments of that mass by expectations (scores normal, or cosines of random directions): the
// post's heuristic, poor beyond alpha = 0.71 sqrt(ln n).  base is the training length.
// causal_attention_scales: the same row by row, n = position + 1, for AttentionTensors::row_scale with scale = 1.
// Errors (invalid_argument): n < 1 or not finite; head_dim < 1; base <= 1 or not finite; gradmax_cosine where there is no
// maximum (head_dim 1 and n > 2) or one past a = 1e300; alpha not finite; an empty s.
// Sources: kexue.fm 8823, 9588 (log n), 9706 (clamped), 9812 (gradmax).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

/// The formulas are at the top.
enum class ScaleRule {
  standard,
  log_n,
  log_n_clamped,
  gradmax_normal,
  gradmax_normal_fit,
  gradmax_cosine
};

namespace detail {

/// u = a^2 of u + ln(1 + 2u) = ln n: Newton climbs to it, the left side being concave.  u + 1/2 = W0(n sqrt(e) / 2).
inline double gradmax_normal(double n) {
  const double target = std::log(n);
  double u = target / 3;
  for (int step = 0; step < 60; ++step) {
    const double move = (target - u - std::log1p(2 * u)) / (1 + 2 / (1 + 2 * u));
    u += move;
    if (std::abs(move) <= 1e-16 * u) break;
  }
  return std::sqrt(std::max(u, 0.0));
}

/// What gradmax_cosine needs of g(a) = 0F1(; half; a^2/4) = Gamma(half) (2/a)^(half-1) I_(half-1)(a).
struct CosineMoment {
  double log_g;    ///< log g - a
  double deficit;  ///< 1 - g'/g, with g'/g = I_half / I_(half-1)
};

/// Hankel's expansion, for a much larger than half^2: sqrt(2 pi a) e^-a I_nu(a) = sum_k (-1)^k c_k(nu) / a^k.
inline CosineMoment cosine_moment_far(double a, double half) {
  const double nu = half - 1;
  double lower = 1, upper = 1, sum = 1,
         gap = 0;  // of I_nu and I_(nu+1), and their difference term by term
  for (double k = 1; k < 40; ++k) {
    const double odd = (2 * k - 1) * (2 * k - 1), step = -1 / (8 * a * k);
    lower *= (4 * nu * nu - odd) * step;
    upper *= (4 * (nu + 1) * (nu + 1) - odd) * step;
    sum += lower;
    gap += lower - upper;
  }
  const double log_power = std::lgamma(half) + (half - 1) * std::log(2 / a);
  return {std::log(sum) - 0.5 * std::log(2 * 3.14159265358979323846 * a) + log_power, gap / sum};
}

/// The power series, all terms positive, rescaled on the way; g'/g by a continued fraction from its tail.
inline CosineMoment cosine_moment_near(double a, double half) {
  const double x = a * a / 4;
  double term = 1, sum = 1, log_scale = 0;
  for (double k = 1; term > 1e-18 * sum || k * (half + k) < x; ++k) {
    term *= x / (k * (half + k - 1));
    sum += term;
    if (sum > 1e200) {
      term *= 1e-200;
      sum *= 1e-200;
      log_scale += 200 * std::log(10.0);
    }
  }
  double slope = 0;
  for (int k = 60 + static_cast<int>(2 * a); k >= 0; --k) slope = a / (2 * (half + k) + a * slope);
  return {std::log(sum) + log_scale - a, 1 - slope};
}

inline CosineMoment cosine_moment(double a, double half) {
  return a > 100 + half * half ? cosine_moment_far(a, half) : cosine_moment_near(a, half);
}

/// The zero of the derivative 1 - g(2a) / (n g(a)^2) (1 + 2a (g'/g(2a) - g'/g(a))), by bisection.
inline double gradmax_cosine(double n, Index head_dim) {
  if (n <= 1) return 0;
  require(head_dim >= 2 || n <= 2, "gradmax_cosine: head_dim (", head_dim,
          ") must be at least 2 for n (", n, ") above 2, there is no maximum");
  const double half = static_cast<double>(head_dim) / 2;
  const auto rising = [&](double a) {  // the sign of the derivative
    const CosineMoment once = cosine_moment(a, half), twice = cosine_moment(2 * a, half);
    const double slope = 1 + 2 * a * (once.deficit - twice.deficit);
    return slope <= 0 || twice.log_g - 2 * once.log_g + std::log(slope) < std::log(n);
  };
  double low = 0, high = 1;
  while (rising(high)) {
    low = high;
    high *= 2;
    require(high < 1e300, "gradmax_cosine: no maximum below 1e300 for n (", n, ") and head_dim (",
            head_dim, ")");
  }
  for (int step = 0; step < 100; ++step) {
    const double middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) break;
    (rising(middle) ? low : high) = middle;
  }
  return low + (high - low) / 2;
}

}  // namespace detail

/// The factor of `rule` for n visible keys (n >= 1, need not be whole); base, above 1, is read by the log_n rules only.
inline double attention_scale(ScaleRule rule, double n, Index head_dim, double base = 512) {
  detail::require(n >= 1 && std::isfinite(n), "attention_scale: n (", n,
                  ") must be finite and at least 1");
  detail::require(head_dim >= 1, "attention_scale: head_dim (", head_dim, ") must be at least 1");
  detail::require(base > 1 && std::isfinite(base), "attention_scale: base (", base,
                  ") must be finite and above 1");
  const double root = std::sqrt(static_cast<double>(head_dim));
  const double log_n = std::log(n) / std::log(base);
  switch (rule) {
    case ScaleRule::log_n:
      return log_n / root;
    case ScaleRule::log_n_clamped:
      return std::max(1.0, log_n) / root;
    case ScaleRule::gradmax_normal:
      return detail::gradmax_normal(n) / root;
    case ScaleRule::gradmax_normal_fit:
      return 0.84 * std::sqrt(std::log(n)) / root;
    case ScaleRule::gradmax_cosine:
      return detail::gradmax_cosine(n, head_dim);
    case ScaleRule::standard:
      break;
  }
  return 1 / root;
}

/// Row i, at position query_offset + i, gets the factor for n = position + 1.  Errors: rows or query_offset negative.
template <RealScalar S>
Vector<S> causal_attention_scales(ScaleRule rule, Index rows, Index head_dim, double base = 512,
                                  Index query_offset = 0) {
  detail::require(rows >= 0, "causal_attention_scales: rows (", rows, ") must not be negative");
  detail::require(query_offset >= 0, "causal_attention_scales: query_offset (", query_offset,
                  ") must not be negative");
  Vector<S> scales(rows);
  for (Index i = 0; i < rows; ++i) {
    scales[i] = static_cast<S>(
        attention_scale(rule, static_cast<double>(query_offset + i + 1), head_dim, base));
  }
  return scales;
}

namespace detail {

/// p = softmax(alpha s), s = s - its entry of largest alpha s; returns 1 - sum p^2 without cancellation: what is not the largest
/// entry is summed apart.
template <class S>
S softmax_spread(Vector<S>& s, S alpha, Vector<S>& p) {
  require(s.size() >= 1, "softmax_gradient_mass: s (", s.size(), " entries) must not be empty");
  require(std::isfinite(alpha), "softmax_gradient_mass: alpha (", alpha, ") must be finite");
  Index top = 0;
  alpha < 0 ? s.minCoeff(&top) : s.maxCoeff(&top);
  // (by halves, since the difference of two large numbers may be infinite, and alpha 0)
  const S largest = s[top] / 2;
  p = s.unaryExpr([=](S x) { return std::exp(S(2) * (alpha * (x / 2 - largest))); });
  s.array() -= s[top];
  p[top] = 0;
  const S rest = p.sum(), squares = p.squaredNorm(), total = 1 + rest;
  p[top] = 1;
  p /= total;
  return (2 * rest + (rest * rest - squares)) / (total * total);
}

}  // namespace detail

/// alpha (1 - sum softmax(alpha s)^2): half the L1 norm of the Jacobian of softmax(alpha s) by s.  s: scores of one query, not
/// empty; an entry of -inf with alpha > 0 counts as masked.
template <RealScalar S>
S softmax_gradient_mass(const Vector<S>& s, S alpha) {
  Vector<S> below = s, p;
  return alpha * detail::softmax_spread<S>(below, alpha, p);
}

/// Its gradients: ds_k = -2 alpha^2 p_k (p_k - sum p^2), overwritten (size of s); returns d mass / d alpha =
/// 1 - sum p^2 + <s, ds> / alpha.
template <RealScalar S>
S softmax_gradient_mass_backward(const Vector<S>& s, S alpha, Vector<S>& ds) {
  detail::require_size("softmax_gradient_mass: ds", ds.size(), s.size(), "size of s");
  Vector<S> below = s, p;
  S dalpha = detail::softmax_spread<S>(below, alpha, p);
  const S squares = p.squaredNorm();
  for (Index k = 0; k < s.size(); ++k) {
    const S inner = S(-2) * alpha * p[k] * (p[k] - squares);
    if (p[k] != 0) dalpha += inner * below[k];  // the sum of inner is 0: s may be shifted
    ds[k] = alpha * inner;
  }
  return dalpha;
}

EIGENBLOCKS_NAMESPACE_END
