// Gradient check: an analytic vector-Jacobian product against central differences in double.
//
//   // L(x) = <upstream, f(x)> for a fixed random upstream; gradient = what f_backward returned for it
//   const GradcheckResult r = gradcheck([&] { f_forward(x, y); return (upstream.array() * y.array()).sum(); }, x, gradient);
//   CHECK_MESSAGE(r.passed, r.message());
//
// The four-point stencil  f'(x) = [8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))] / 12h  has truncation error O(h^4) and
// rounding error O(eps |f| / h); h = eps^(1/5) max(1, |x|) balances the two (about 1e-12 relative for smooth f of size 1).
// Entries are compared by  |analytic - numeric| <= atol + rtol max(|analytic|, |numeric|);  NaN never passes.
// `x` is changed in place during the check and is bitwise restored.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <string>

EIGENBLOCKS_NAMESPACE_BEGIN

struct GradcheckOptions {
  double rtol = 1e-6;
  double atol = 1e-8;
  double step = 7.4e-4;        ///< eps^(1/5); multiplied by max(1, |x|)
  Index max_entries = 10'000;  ///< larger inputs are sampled at an even stride
};

struct GradcheckResult {
  bool passed = true;
  Index row = 0, col = 0;            ///< entry with the worst ratio error / tolerance
  double analytic = 0, numeric = 0;  ///< its two derivatives
  double worst = 0;                  ///< that ratio; <= 1 passes
  std::string message() const {
    return detail::join_text("entry (", row, ", ", col, "): analytic ", analytic, ", numeric ",
                             numeric, ", error / tolerance ", worst);
  }
};

/// Compares `gradient` (shape of x) with the derivatives of the scalar `loss()`, a callable that reads x through its
/// captures.  Errors: invalid_argument if the shapes of x and gradient differ.
template <class Loss>
GradcheckResult gradcheck(Loss&& loss, Eigen::Ref<Matrix<double>, 0, Eigen::OuterStride<>> x,
                          const ConstMatrixRef<double>& gradient,
                          const GradcheckOptions& options = {}) {
  detail::require_shape("gradient", gradient.rows(), gradient.cols(), x.rows(), x.cols(),
                        "shape of x");
  GradcheckResult result;
  const Index size = x.rows() * x.cols();
  const Index stride = std::max<Index>(1, size / std::max<Index>(1, options.max_entries));
  for (Index at = 0; at < size; at += stride) {
    const Index i = at / x.cols(), j = at % x.cols();
    const double saved = x(i, j);
    const double h = options.step * std::max(1.0, std::abs(saved));
    const auto difference = [&](double by) {
      x(i, j) = saved + by;
      const double up = loss();
      x(i, j) = saved - by;
      const double down = loss();
      return up - down;
    };
    const double numeric = (8.0 * difference(h) - difference(2.0 * h)) / (12.0 * h);
    x(i, j) = saved;
    const double analytic = gradient(i, j);
    const double tolerance =
        options.atol + options.rtol * std::max(std::abs(analytic), std::abs(numeric));
    const double ratio = std::abs(analytic - numeric) / tolerance;
    if (!(ratio <= result.worst)) {  // also catches NaN
      result.worst = ratio;
      result.row = i;
      result.col = j;
      result.analytic = analytic;
      result.numeric = numeric;
    }
    if (!(ratio <= 1.0)) {
      result.passed = false;
      if (std::isnan(ratio)) return result;
    }
  }
  return result;
}

EIGENBLOCKS_NAMESPACE_END
