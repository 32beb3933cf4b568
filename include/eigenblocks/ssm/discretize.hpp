// Discretisation: x' = A x + B u over a step dt with u held becomes x_k = Abar x_{k-1} + Bbar u_k.
//
//   gbt(alpha)  Abar = M^-1 (I + (1 - alpha) dt A),  Bbar = dt M^-1 B,  M = I - alpha dt A      (generalised bilinear transform)
//   forward = gbt(0)    bilinear = gbt(1/2)    backward = gbt(1)
//   zoh         Abar = e^(dt A),  Bbar = int_0^dt e^(sA) ds B                                   (zero-order hold: exact)
//
//   const Discretized d = discretize(h.a, b, dt, {.method = Discretization::zoh});        // b is N x M; d.a, d.b
//   discretize_backward(h.a, b, dt, ga, gb, da, db, ddt, {.method = Discretization::zoh});
//   const auto s = discretize_diagonal(lambda, dt, Discretization::zoh);                  // complex modes: s.a, s.phi
//   const auto g = discretize_diagonal_backward(lambda, dt, ga, gphi, Discretization::zoh);   // g.lambda, g.dt
//
// Dense, in double, O(N^3) once per (A, dt): cast the result.  ZOH takes the exponential of dt [[A, B], [0, 0]], so A may be
// singular and dt tiny; its gradient is the adjoint of the exponential's Frechet derivative.  Gradients overwrite.
// Diagonal: Bbar = phi b.  Modes of float are computed in double; near lambda dt = 0 by series, so lambda = 0 is a mode like
// any other.  Complex gradients are dL/dRe + i dL/dIm: G_lambda = conj(da/dlambda) G_a + conj(dphi/dlambda) G_phi.
//
// Bilinear and backward keep Re lambda < 0 inside the unit disc, zoh as well; forward needs |1 + dt lambda| < 1.
// The weights are named as in the papers' code; kexue.fm 10137 names them the other way round (its alpha multiplies x(t)).
// As in S4, C and D stay as they are and y_k = C x_k is read after the update; scipy's cont2discrete(.., 'gbt') changes them.
// expm(a) is the matrix exponential by scaling and squaring of Pade approximants (Higham, SIAM J. Matrix Anal. 26, 2005).
//
// Errors: invalid_argument for shapes, dt not positive and finite, alpha outside [0, 1], alpha given a value other than 1/2
// with a method that is not gbt; std::domain_error where M is singular to working precision.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <limits>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class Discretization { forward, backward, bilinear, gbt, zoh };

struct DiscretizeOptions {
  Discretization method = Discretization::bilinear;
  double alpha = 0.5;  ///< of gbt: 0 is forward, 1 backward
};

struct Discretized {
  Matrix<double> a;  ///< N x N
  Matrix<double> b;  ///< N x M
};

namespace detail {

/// alpha of the GBT family.
inline double gbt_alpha(const DiscretizeOptions& options) {
  switch (options.method) {
    case Discretization::forward:
      return 0;
    case Discretization::backward:
      return 1;
    case Discretization::gbt:
      return options.alpha;
    default:
      return 0.5;
  }
}

inline void require_discretization(const DiscretizeOptions& options) {
  require(options.method >= Discretization::forward && options.method <= Discretization::zoh,
          "method (", options.method, ") is not a Discretization");
  require(options.alpha >= 0 && options.alpha <= 1, "alpha (", options.alpha,
          ") must be in [0, 1]");
  require(options.method == Discretization::gbt || options.alpha == 0.5, "alpha (", options.alpha,
          ") is an option of method gbt alone");
}

inline void require_step(double dt) {
  require(dt > 0 && std::isfinite(dt), "dt (", dt, ") must be positive and finite");
}

/// x = a^-1 x by elimination with row pivoting; a is used up.  A zero pivot leaves infinities or NaN.
EIGENBLOCKS_NOINLINE inline void dense_solve(Matrix<double>& a, Matrix<double>& x) {
  const Index n = a.rows();
  const auto axpy = [](double by, const double* from, double* to, Index size) {
    for (Index i = 0; i < size; ++i) to[i] += by * from[i];
  };
  const Index m = x.cols();
  for (Index k = 0; k < n; ++k) {
    Index pivot = k;
    for (Index i = k + 1; i < n; ++i)
      if (std::abs(a(i, k)) > std::abs(a(pivot, k))) pivot = i;
    if (pivot != k) {
      std::swap_ranges(&a(k, 0), &a(k, 0) + n, &a(pivot, 0));
      std::swap_ranges(x.data() + k * m, x.data() + (k + 1) * m, x.data() + pivot * m);
    }
    for (Index i = k + 1; i < n; ++i) {
      const double factor = -a(i, k) / a(k, k);
      if (factor == 0) continue;
      axpy(factor, &a(k, 0) + k, &a(i, 0) + k, n - k);
      axpy(factor, x.data() + k * m, x.data() + i * m, m);
    }
  }
  for (Index k = n - 1; k >= 0; --k) {
    for (Index i = k + 1; i < n; ++i) axpy(-a(k, i), x.data() + i * m, x.data() + k * m, m);
    for (Index j = 0; j < m; ++j) x(k, j) /= a(k, k);
  }
}

inline double one_norm(const ConstMatrixRef<double>& a) {
  double largest = 0;
  for (Index j = 0; j < a.cols(); ++j) {
    const double sum = a.col(j).cwiseAbs().sum();
    if (std::isnan(sum)) return sum;
    largest = std::max(largest, sum);
  }
  return largest;
}

EIGENBLOCKS_NOINLINE inline Matrix<double> dense_product(const ConstMatrixRef<double>& a,
                                                         const ConstMatrixRef<double>& b) {
  Matrix<double> c(a.rows(), b.cols());
  product_nn<double>(a, b, c);
  return c;
}

/// (V - U)^-1 (V + U) of the diagonal Pade approximant with coefficients c: even ones in V, odd ones, times a, in U.
template <std::size_t N>
Matrix<double> pade(const Matrix<double>& a, const std::array<double, N>& c) {
  const Matrix<double> square = dense_product(a, a);
  const Matrix<double> one = Matrix<double>::Identity(a.rows(), a.cols());
  Matrix<double> even = c[N - 2] * one, odd = c[N - 1] * one;
  for (std::size_t i = N - 2; i >= 2; i -= 2) {
    even = dense_product(even, square) + c[i - 2] * one;
    odd = dense_product(odd, square) + c[i - 1] * one;
  }
  odd = dense_product(a, odd);
  Matrix<double> denominator = even - odd;
  even += odd;
  dense_solve(denominator, even);
  return even;
}

/// The approximant of degree 13, its coefficients grouped so that six products do.
EIGENBLOCKS_NOINLINE inline Matrix<double> pade13(const Matrix<double>& a) {
  constexpr double c[] = {64764752532480000.,
                          32382376266240000.,
                          7771770303897600.,
                          1187353796428800.,
                          129060195264000.,
                          10559470521600.,
                          670442572800.,
                          33522128640.,
                          1323241920.,
                          40840800.,
                          960960.,
                          16380.,
                          182.,
                          1.};
  const Matrix<double> one = Matrix<double>::Identity(a.rows(), a.cols());
  const Matrix<double> a2 = dense_product(a, a), a4 = dense_product(a2, a2),
                       a6 = dense_product(a4, a2);
  Matrix<double> odd = dense_product(a6, c[13] * a6 + c[11] * a4 + c[9] * a2);
  odd += c[7] * a6 + c[5] * a4 + c[3] * a2 + c[1] * one;
  odd = dense_product(a, odd);
  Matrix<double> even = dense_product(a6, c[12] * a6 + c[10] * a4 + c[8] * a2);
  even += c[6] * a6 + c[4] * a4 + c[2] * a2 + c[0] * one;
  Matrix<double> denominator = even - odd;
  even += odd;
  dense_solve(denominator, even);
  return even;
}

}  // namespace detail

/// e^a of a square matrix.  NaN and infinities give NaN everywhere.
inline Matrix<double> expm(const ConstMatrixRef<double>& a) {
  detail::require(a.rows() == a.cols(), "a is ", a.rows(), " x ", a.cols(), ", expected square");
  if (a.size() == 0) return a;
  const double norm = detail::one_norm(a);
  if (!std::isfinite(norm)) {
    return Matrix<double>::Constant(a.rows(), a.cols(), std::numeric_limits<double>::quiet_NaN());
  }
  // The largest 1-norms at which the degrees are accurate to the last bit.
  if (norm <= 0.0149558521) return detail::pade<4>(a, {120, 60, 12, 1});
  if (norm <= 0.2539398330) return detail::pade<6>(a, {30240, 15120, 3360, 420, 30, 1});
  if (norm <= 0.9504178996) {
    return detail::pade<8>(a, {17297280, 8648640, 1995840, 277200, 25200, 1512, 56, 1});
  }
  const int squarings = std::max(0, static_cast<int>(std::ceil(std::log2(norm / 5.3719203511))));
  Matrix<double> power = detail::pade13(a * std::ldexp(1.0, -squarings));
  for (int i = 0; i < squarings; ++i) power = detail::dense_product(power, power);
  return power;
}

/// Adjoint of the derivative of expm at a: sum over matrices E of <g, d/dE expm(a)> E.  The gradient of <g, expm(a)>.
inline Matrix<double> expm_backward(const ConstMatrixRef<double>& a,
                                    const ConstMatrixRef<double>& g) {
  const Index n = a.rows();
  detail::require(n == a.cols(), "a is ", n, " x ", a.cols(), ", expected square");
  detail::require_shape("g", g.rows(), g.cols(), n, n, "shape of a");
  if (n == 0) return g;
  // The result is linear in g: brought to the size of a, it does not decide how often the block matrix is halved.
  const double size = g.cwiseAbs().maxCoeff();
  if (size == 0) return Matrix<double>::Zero(n, n);
  const double scale = std::max(a.cwiseAbs().maxCoeff(), 1e-8) / size;
  Matrix<double> block = Matrix<double>::Zero(2 * n, 2 * n);
  block.topLeftCorner(n, n) = a.transpose();
  block.bottomRightCorner(n, n) = a.transpose();
  block.topRightCorner(n, n) = scale * g;
  return expm(block).topRightCorner(n, n) / scale;
}

namespace detail {

inline void require_system(Index a_rows, Index a_cols, Index b_rows, double dt,
                           const DiscretizeOptions& options) {
  require_discretization(options);
  require_step(dt);
  require(a_rows == a_cols, "a is ", a_rows, " x ", a_cols, ", expected square");
  require(b_rows == a_rows, "b has ", b_rows, " rows, expected ", a_rows, " (states of a)");
}

/// dt [[A, B], [0, 0]].
inline Matrix<double> augmented(const ConstMatrixRef<double>& a, const ConstMatrixRef<double>& b,
                                double dt) {
  const Index n = a.rows(), m = b.cols();
  Matrix<double> f = Matrix<double>::Zero(n + m, n + m);
  f.topLeftCorner(n, n) = dt * a;
  f.topRightCorner(n, m) = dt * b;
  return f;
}

/// Abar, Bbar and M^-1 of a GBT method.
struct GbtSolution {
  Matrix<double> a, b, inverse;
};
inline GbtSolution gbt_solve(const ConstMatrixRef<double>& a, const ConstMatrixRef<double>& b,
                             double dt, double alpha) {
  const Index n = a.rows(), m = b.cols();
  const Matrix<double> one = Matrix<double>::Identity(n, n);
  Matrix<double> divisor = one - (alpha * dt) * a, solution(n, 2 * n + m);
  const double norm = one_norm(divisor);
  solution << one + ((1 - alpha) * dt) * a, dt * b, one;
  dense_solve(divisor, solution);
  GbtSolution s{
      .a = solution.leftCols(n), .b = solution.middleCols(n, m), .inverse = solution.rightCols(n)};
  // (A NaN of the input is not singular, it propagates.)
  if (n > 0 && std::isfinite(norm) &&
      !(norm * one_norm(s.inverse) * std::numeric_limits<double>::epsilon() < 1)) {
    raise<std::domain_error>("I - alpha dt A is singular to working precision (alpha ", alpha,
                             ", dt ", dt, ")");
  }
  return s;
}

}  // namespace detail

/// (Abar, Bbar) for a (N x N) and b (N x M).
inline Discretized discretize(const ConstMatrixRef<double>& a, const ConstMatrixRef<double>& b,
                              double dt, const DiscretizeOptions& options = {}) {
  detail::require_system(a.rows(), a.cols(), b.rows(), dt, options);
  const Index n = a.rows(), m = b.cols();
  if (options.method == Discretization::zoh) {
    const Matrix<double> e = expm(detail::augmented(a, b, dt));
    return {e.topLeftCorner(n, n), e.topRightCorner(n, m)};
  }
  const double alpha = detail::gbt_alpha(options);
  if (alpha == 0) return {Matrix<double>::Identity(n, n) + dt * a, dt * b};
  detail::GbtSolution s = detail::gbt_solve(a, b, dt, alpha);
  return {std::move(s.a), std::move(s.b)};
}

/// Gradients of <ga, Abar> + <gb, Bbar> with respect to a, b and dt; overwrites da, db, ddt.
inline void discretize_backward(const ConstMatrixRef<double>& a, const ConstMatrixRef<double>& b,
                                double dt, const ConstMatrixRef<double>& ga,
                                const ConstMatrixRef<double>& gb, MatrixRef<double> da,
                                MatrixRef<double> db, double& ddt,
                                const DiscretizeOptions& options = {}) {
  detail::require_system(a.rows(), a.cols(), b.rows(), dt, options);
  const Index n = a.rows(), m = b.cols();
  detail::require_shape("ga", ga.rows(), ga.cols(), n, n, "shape of a");
  detail::require_shape("gb", gb.rows(), gb.cols(), n, m, "shape of b");
  detail::require_shape("da", da.rows(), da.cols(), n, n, "shape of a");
  detail::require_shape("db", db.rows(), db.cols(), n, m, "shape of b");
  if (options.method == Discretization::zoh) {
    Matrix<double> g = Matrix<double>::Zero(n + m, n + m);
    g.topLeftCorner(n, n) = ga;
    g.topRightCorner(n, m) = gb;
    const Matrix<double> f = detail::augmented(a, b, dt);
    const Matrix<double> gf = expm_backward(f, g);
    ddt = gf.cwiseProduct(f).sum() / dt;
    da = dt * gf.topLeftCorner(n, n);
    db = dt * gf.topRightCorner(n, m);
    return;
  }
  const double alpha = detail::gbt_alpha(options);
  const detail::GbtSolution s = detail::gbt_solve(a, b, dt, alpha);
  Matrix<double> z(n, n), zb(n, m);
  detail::product_tn<double>(s.inverse, ga, z);
  detail::product_tn<double>(s.inverse, gb, zb);
  ddt = z.cwiseProduct((1 - alpha) * a + alpha * detail::dense_product(a, s.a)).sum() +
        zb.cwiseProduct(b + alpha * detail::dense_product(a, s.b)).sum();
  Matrix<double> weight(n, n);
  detail::product_nt<double>(z, s.a, weight);
  detail::product_nt<double>(zb, s.b, weight, detail::Write::add);
  da = dt * ((1 - alpha) * z + alpha * weight);
  db = dt * zb;
}

// ---- Diagonal A ---------------------------------------------------------------------------------

/// One mode of x' = lambda x + b u over dt: x_k = a x_{k-1} + phi b u_k.
template <RealScalar S>
struct DiagonalStep {
  std::complex<S> a, phi;
};

template <RealScalar S>
struct DiagonalGradient {
  std::complex<S> lambda;
  S dt;
};

namespace detail {

/// phi1(x) = (e^x - 1)/x and phi1'(x), by series where the quotient cancels.
struct PhiPair {
  std::complex<double> value, slope;
};
inline PhiPair phi1(std::complex<double> x, std::complex<double> exp_x) {
  using Complex = std::complex<double>;
  if (std::norm(x) < 0.25 * 0.25) {  // the last terms are 0.25^12/13!, below 1e-17
    // value = sum x^k/(k+1)!, slope = sum (k+1) x^k/(k+2)!
    Complex value = 0, slope = 0;
    constexpr int kTerms = 13;
    double factorial = 6227020800.0;  // 13!
    for (int k = kTerms - 1; k >= 0; --k) {
      // here factorial is (k+1)!
      value = value * x + 1.0 / factorial;
      slope = slope * x + static_cast<double>(k + 1) / (factorial * static_cast<double>(k + 2));
      factorial /= static_cast<double>(k + 1);
    }
    return {value, slope};
  }
  // e^x - 1 without cancellation where x is small or near the imaginary axis.
  const double half = std::sin(0.5 * x.imag());
  const Complex em1(std::expm1(x.real()) * std::cos(x.imag()) - 2 * half * half, exp_x.imag());
  const Complex value = em1 / x;
  return {value, (exp_x - value) / x};
}

inline void require_diagonal(double dt, Discretization method, double alpha) {
  require_discretization({.method = method, .alpha = alpha});
  require_step(dt);
}

}  // namespace detail

/// a and phi of one mode.
template <RealScalar S>
DiagonalStep<S> discretize_diagonal(std::complex<S> lambda, std::type_identity_t<S> dt,
                                    Discretization method, double alpha = 0.5) {
  using Complex = std::complex<double>;
  const double step = static_cast<double>(dt);
  detail::require_diagonal(step, method, alpha);
  const Complex x = Complex(lambda) * step;
  Complex a, phi;
  if (method == Discretization::zoh) {
    a = std::exp(x);
    phi = step * detail::phi1(x, a).value;
  } else {
    const double weight = detail::gbt_alpha({.method = method, .alpha = alpha});
    const Complex q = 1.0 / (1.0 - weight * x);
    a = (1.0 + (1.0 - weight) * x) * q;
    phi = step * q;
  }
  return {std::complex<S>(a), std::complex<S>(phi)};
}

/// Gradients of Re <ga, a> + Re <gphi, phi> (see the top for complex gradients).
template <RealScalar S>
DiagonalGradient<S> discretize_diagonal_backward(std::complex<S> lambda, std::type_identity_t<S> dt,
                                                 std::type_identity_t<std::complex<S>> ga,
                                                 std::type_identity_t<std::complex<S>> gphi,
                                                 Discretization method, double alpha = 0.5) {
  using Complex = std::complex<double>;
  const double step = static_cast<double>(dt);
  detail::require_diagonal(step, method, alpha);
  const Complex l(lambda), x = l * step;
  Complex a_lambda, a_dt, phi_lambda, phi_dt;
  if (method == Discretization::zoh) {
    const Complex a = std::exp(x);
    a_lambda = step * a;
    a_dt = l * a;
    phi_lambda = step * step * detail::phi1(x, a).slope;
    phi_dt = a;
  } else {
    const double weight = detail::gbt_alpha({.method = method, .alpha = alpha});
    const Complex q = 1.0 / (1.0 - weight * x), square = q * q;
    a_lambda = step * square;
    a_dt = l * square;
    phi_lambda = weight * step * step * square;
    phi_dt = square;
  }
  const Complex g(ga), h(gphi);
  const Complex gradient = std::conj(a_lambda) * g + std::conj(phi_lambda) * h;
  const Complex time = std::conj(a_dt) * g + std::conj(phi_dt) * h;
  return {std::complex<S>(gradient), static_cast<S>(time.real())};
}

/// The same for a vector of modes: a[i], phi[i] from lambda[i] and dt[i], or one dt for all.
template <RealScalar S>
void discretize_diagonal(const Vector<std::complex<S>>& lambda, const Vector<S>& dt,
                         Vector<std::complex<S>>& a, Vector<std::complex<S>>& phi,
                         Discretization method, double alpha = 0.5) {
  detail::require(dt.size() == lambda.size() || dt.size() == 1, "dt has ", dt.size(),
                  " entries, expected 1 or ", lambda.size(), " (one for each lambda)");
  detail::require_discretization({.method = method, .alpha = alpha});
  for (Index i = 0; i < dt.size(); ++i) detail::require_step(static_cast<double>(dt[i]));
  a.resize(lambda.size());
  phi.resize(lambda.size());
  for (Index i = 0; i < lambda.size(); ++i) {
    const auto step = discretize_diagonal<S>(lambda[i], dt[dt.size() == 1 ? 0 : i], method, alpha);
    a[i] = step.a;
    phi[i] = step.phi;
  }
}

/// Its gradients: dlambda[i], and ddt in the shape of dt (summed over the modes where they share it).
template <RealScalar S>
void discretize_diagonal_backward(const Vector<std::complex<S>>& lambda, const Vector<S>& dt,
                                  const Vector<std::complex<S>>& ga,
                                  const Vector<std::complex<S>>& gphi,
                                  Vector<std::complex<S>>& dlambda, Vector<S>& ddt,
                                  Discretization method, double alpha = 0.5) {
  detail::require(dt.size() == lambda.size() || dt.size() == 1, "dt has ", dt.size(),
                  " entries, expected 1 or ", lambda.size(), " (one for each lambda)");
  detail::require_size("ga", ga.size(), lambda.size(), "one for each lambda");
  detail::require_size("gphi", gphi.size(), lambda.size(), "one for each lambda");
  detail::require_discretization({.method = method, .alpha = alpha});
  for (Index i = 0; i < dt.size(); ++i) detail::require_step(static_cast<double>(dt[i]));
  dlambda.resize(lambda.size());
  ddt = Vector<S>::Zero(dt.size());
  for (Index i = 0; i < lambda.size(); ++i) {
    const Index at = dt.size() == 1 ? 0 : i;
    const auto g =
        discretize_diagonal_backward<S>(lambda[i], dt[at], ga[i], gphi[i], method, alpha);
    dlambda[i] = g.lambda;
    ddt[at] += g.dt;
  }
}

EIGENBLOCKS_NAMESPACE_END
