// Reconstruction: what a HiPPO state remembers, u(point) ~ sum_n E[point, n] c_n  (arXiv 2008.07669, 2206.12037).
//
//   const Matrix<double> e = hippo_basis(HippoMeasure::legs, 64, points);           // M x 64, in double
//   hippo_reconstruct(HippoMeasure::legs, points, coefficients, past);              // N x H -> M x H, without E
//   hippo_reconstruct_backward(HippoMeasure::legs, points, dpast, dcoefficients);   // M x H -> N x H: E^T dpast
//
// points: s in [0, 1], 0 the oldest moment of the window and 1 now; for legs the window is the whole history [0, t].
//   legs, legt           r_n P_n(2s - 1), r_n = sqrt(2n + 1)                     either scaling of time
//   lmu                  P_n(1 - 2s)
//   fourier, fourier2    with q = 1 - s: 1, 0, sqrt 2 cos 2 pi q, sqrt 2 sin 2 pi q, sqrt 2 cos 4 pi q, ..
//   lagt, tlagt          points are ages s >= 0: L_n(s) e^(-s/2);  tlagt (beta = 1): L_n(s)
// legs as an LTI system (S4): at age tau the basis is that of s = e^-tau, with weight e^-tau; its impulse response
// e^(tau A) B is weight times basis.  Points outside the window extrapolate a polynomial: they are allowed and grow fast.
//
// Three-term recurrences over all points at once, O(M N), in blocks of points.
// Errors (invalid_argument, nothing written): shapes, states < 1 (odd for fourier), a measure without a basis here, points
// that are not finite, negative ages.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/ssm/hippo.hpp>

#include <algorithm>
#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline void require_basis(HippoMeasure measure, Index states,
                          const ConstVectorRef<double>& points) {
  const bool laguerre = measure == HippoMeasure::lagt || measure == HippoMeasure::tlagt;
  require(laguerre || measure == HippoMeasure::legs || std::isfinite(hippo_window(measure)),
          "measure ", hippo_name(measure),
          " has no basis here, expected legs, legt, lmu, fourier, fourier2, lagt or tlagt");
  require_hippo_states(measure, states);
  for (Index i = 0; i < points.size(); ++i) {
    require(std::isfinite(points[i]), "points[", i, "] (", points[i], ") must be finite");
    require(!laguerre || points[i] >= 0, "points[", i, "] (", points[i],
            ") is an age and must not be negative");
  }
}

/// scale(n) p_n into the columns of e, where (n + 1) p_{n+1} = next(n, p_n, p_{n-1}), from p_0.
template <class Next, class Scale>
void three_term_basis(const RowVector<double>& first, Matrix<double>& transposed, Next&& next,
                      Scale&& scale) {
  RowVector<double> before = RowVector<double>::Zero(first.size()), now = first,
                    after(first.size());
  for (Index n = 0; n < transposed.rows(); ++n) {
    transposed.row(n) = scale(n) * now;
    next(static_cast<double>(n), now, before, after);
    after /= static_cast<double>(n + 1);
    before.swap(now);
    now.swap(after);
  }
}

/// E^T (N x M) at few points.
inline void hippo_basis_rows(HippoMeasure measure, const ConstVectorRef<double>& points,
                             Matrix<double>& transposed) {
  const Index states = transposed.rows();
  const RowVector<double> s = points.transpose();
  const RowVector<double> one = RowVector<double>::Ones(s.size());
  if (measure == HippoMeasure::fourier || measure == HippoMeasure::fourier2) {
    for (Index i = 0; i < s.size(); ++i) {
      for (Index j = 0; j < states / 2; ++j) {
        // The whole turns go first: exact, and cos(2 pi j q) stays accurate for large j.
        const double turns = static_cast<double>(j) * (1 - s[i]);
        const double angle = 2 * kHippoPi * (turns - std::floor(turns));
        transposed(2 * j, i) = j == 0 ? 1.0 : std::sqrt(2.0) * std::cos(angle);
        transposed(2 * j + 1, i) = j == 0 ? 0.0 : std::sqrt(2.0) * std::sin(angle);
      }
    }
    return;
  }
  if (measure == HippoMeasure::lagt || measure == HippoMeasure::tlagt) {
    RowVector<double> first = one;
    if (measure == HippoMeasure::lagt) first = (-0.5 * s).array().exp();
    three_term_basis(
        first, transposed,
        [&](double n, const RowVector<double>& now, const RowVector<double>& before,
            RowVector<double>& after) {
          after = ((2 * n + 1) * one - s).cwiseProduct(now) - n * before;
        },
        [](Index) { return 1.0; });
    return;
  }
  const bool lmu = measure == HippoMeasure::lmu;
  const RowVector<double> x = lmu ? RowVector<double>(one - 2 * s) : RowVector<double>(2 * s - one);
  three_term_basis(
      one, transposed,
      [&](double n, const RowVector<double>& now, const RowVector<double>& before,
          RowVector<double>& after) { after = (2 * n + 1) * x.cwiseProduct(now) - n * before; },
      [&](Index n) { return lmu ? 1.0 : legendre_norm(n); });
}

inline constexpr Index kBasisPoints = 256;  // of a block: a row of E^T is 2 KB

/// f(first, E^T of a block of points).
template <class F>
void hippo_basis_blocks(HippoMeasure measure, Index states, const ConstVectorRef<double>& points,
                        F&& f) {
  Matrix<double> transposed;
  for (Index first = 0; first < points.size(); first += kBasisPoints) {
    const Index m = std::min(kBasisPoints, points.size() - first);
    transposed.resize(states, m);
    hippo_basis_rows(measure, points.segment(first, m), transposed);
    f(first, transposed);
  }
}

}  // namespace detail

/// E, M x states.
inline Matrix<double> hippo_basis(HippoMeasure measure, Index states,
                                  const ConstVectorRef<double>& points) {
  detail::require_basis(measure, states, points);
  Matrix<double> e(points.size(), states);
  detail::hippo_basis_blocks(measure, states, points,
                             [&](Index first, const Matrix<double>& transposed) {
                               e.middleRows(first, transposed.cols()) = transposed.transpose();
                             });
  return e;
}

/// out (M x H) = E coefficients (N x H).
template <MatrixLike C, OutputMatrix O>
  requires SameScalar<C, O> && RealScalar<scalar_t<C>>
void hippo_reconstruct(HippoMeasure measure, const ConstVectorRef<double>& points,
                       const C& coefficients, O&& out) {
  using S = scalar_t<C>;
  detail::require_basis(measure, coefficients.rows(), points);
  detail::require_shape("out", out.rows(), out.cols(), points.size(), coefficients.cols(),
                        "points, channels");
  Matrix<S> e;
  detail::hippo_basis_blocks(
      measure, coefficients.rows(), points, [&](Index first, const Matrix<double>& transposed) {
        e = transposed.template cast<S>();
        detail::product_tn<S>(e, coefficients, out.middleRows(first, e.cols()));
      });
}

/// dcoefficients (N x H) = E^T dout (M x H); overwrites.
template <MatrixLike G, OutputMatrix DC>
  requires SameScalar<G, DC> && RealScalar<scalar_t<G>>
void hippo_reconstruct_backward(HippoMeasure measure, const ConstVectorRef<double>& points,
                                const G& dout, DC&& dcoefficients) {
  using S = scalar_t<G>;
  detail::require_basis(measure, dcoefficients.rows(), points);
  detail::require_shape("dout", dout.rows(), dout.cols(), points.size(), dcoefficients.cols(),
                        "points, channels");
  dcoefficients.setZero();
  Matrix<S> e;
  detail::hippo_basis_blocks(measure, dcoefficients.rows(), points,
                             [&](Index first, const Matrix<double>& transposed) {
                               e = transposed.template cast<S>();
                               detail::product_nn<S>(e, dout.middleRows(first, e.cols()),
                                                     dcoefficients, detail::Write::add);
                             });
}

EIGENBLOCKS_NAMESPACE_END
