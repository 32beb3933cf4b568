#include "support/layer_checks.hpp"

#include <eigenblocks/ssm/basis.hpp>
#include <eigenblocks/ssm/discretize.hpp>
#include <eigenblocks/ssm/hippo.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <complex>
#include <limits>
#include <vector>

namespace {

namespace eb = eigenblocks;
using eb::HippoMeasure;
using eb::Index;
using eb::Matrix;
using eb::Vector;

const std::vector<HippoMeasure> kAll = {
    HippoMeasure::legs,     HippoMeasure::legsd,         HippoMeasure::legt,  HippoMeasure::lmu,
    HippoMeasure::lagt,     HippoMeasure::tlagt,         HippoMeasure::glagt, HippoMeasure::fourier,
    HippoMeasure::fourier2, HippoMeasure::fourier_decay, HippoMeasure::foud};

Matrix<double> diagonal(const Vector<double>& d) { return d.asDiagonal(); }

Matrix<double> times(const Matrix<double>& a, const Matrix<double>& b) {
  Matrix<double> c(a.rows(), b.cols());
  eb::detail::product_nn<double>(a, b, c);
  return c;
}

/// The largest |a - b| relative to the largest |b|.
double relative(const Matrix<double>& a, const Matrix<double>& b) {
  return largest_difference(a, b) / b.cwiseAbs().maxCoeff();
}

/// The coefficients at t = 1 of a signal that is u(t) at rest before 0: exact up to the width of the steps.
Vector<double> coefficients(const eb::Hippo& h, const std::vector<double>& u, double dt) {
  const auto d = eb::discretize(h.a, h.b, dt, {.method = eb::Discretization::zoh});
  Vector<double> x = Vector<double>::Zero(h.b.size()), next = x;
  for (const double value : u) {
    next = d.b * value;
    for (Index i = 0; i < x.size(); ++i) {
      for (Index k = 0; k < x.size(); ++k) next[i] += d.a(i, k) * x[k];
    }
    x.swap(next);
  }
  return x;
}

double signal(double t) { return std::sin(2.0 * t) + 0.5 * std::cos(5.0 * t + 0.3); }

}  // namespace

TEST_CASE("names go to measures and back") {
  for (const HippoMeasure m : kAll) CHECK(eb::hippo_measure(eb::hippo_name(m)) == m);
  CHECK(eb::hippo_measure("fout") == HippoMeasure::fourier);
  CHECK(eb::hippo_measure("fourier_diag") == HippoMeasure::foud);
  check_throws<eb::invalid_argument>(
      [] { (void)eb::hippo_measure("legz"); },
      "measure (legz) must be one of legs, legsd, legt, lmu, lagt, tlagt, glagt, fourier, "
      "fourier2, fourier_decay, foud");
}

TEST_CASE("A + P^T P is a multiple of one plus a skew matrix") {
  for (const HippoMeasure m : kAll) {
    CAPTURE(eb::hippo_name(m));
    const eb::Hippo h = eb::hippo_matrix(m, 10);
    REQUIRE(h.p.cols() == 10);
    if (h.p.rows() == 0) {
      CHECK((m == HippoMeasure::lmu || m == HippoMeasure::glagt));
      continue;
    }
    Matrix<double> s = h.a - h.shift * Matrix<double>::Identity(10, 10);
    for (Index r = 0; r < h.p.rows(); ++r) s += times(h.p.row(r).transpose(), h.p.row(r));
    CHECK(largest_difference(s, -s.transpose()) < 1e-13 * h.a.cwiseAbs().maxCoeff());
  }
}

TEST_CASE("legs has the eigenvalues -1 .. -N on its diagonal; legsd is its normal part") {
  const eb::Hippo legs = eb::hippo_matrix(HippoMeasure::legs, 12);
  for (Index n = 0; n < 12; ++n) {
    CHECK(legs.a(n, n) == -static_cast<double>(n + 1));
    for (Index k = n + 1; k < 12; ++k) CHECK(legs.a(n, k) == 0.0);
  }
  const eb::Hippo normal = eb::hippo_matrix(HippoMeasure::legsd, 12);
  CHECK(relative(legs.a + times(legs.p.transpose(), legs.p), normal.a) < 1e-14);
  CHECK(relative(0.5 * legs.b, normal.b) < 1e-15);
  // A e_0 = -B: the constant u e_0 is at rest.
  CHECK(largest_difference(legs.a.col(0), -legs.b) < 1e-14);
}

TEST_CASE("lmu is a rescaled legt of window 1; windows scale time") {
  constexpr Index n = 9;
  Vector<double> sign(n), r(n);
  for (Index i = 0; i < n; ++i) {
    sign[i] = i % 2 == 0 ? 1 : -1;
    r[i] = std::sqrt(2.0 * static_cast<double>(i) + 1);
  }
  const eb::Hippo lmu = eb::hippo_matrix(HippoMeasure::lmu, n);
  const eb::Hippo s4 = eb::hippo_matrix(HippoMeasure::legt, n);
  const eb::Hippo paper =
      eb::hippo_matrix(HippoMeasure::legt, n, {.window = eb::HippoWindow::paper});
  CHECK(relative(2 * s4.a, paper.a) < 1e-15);
  CHECK(relative(2 * s4.b, paper.b) < 1e-15);
  CHECK(relative(std::sqrt(2.0) * s4.p, paper.p) < 1e-15);
  const Matrix<double> left = diagonal(sign.cwiseProduct(r));
  const Matrix<double> right = diagonal(sign.cwiseQuotient(r));
  CHECK(relative(times(times(left, paper.a), right), lmu.a) < 1e-14);
  CHECK(relative(times(left, paper.b), lmu.b) < 1e-14);
  const eb::Hippo f1 = eb::hippo_matrix(HippoMeasure::fourier, 8, {.window = 1.0});
  const eb::Hippo f2 = eb::hippo_matrix(HippoMeasure::fourier2, 8);
  CHECK(relative(f1.a, f2.a) < 1e-14);
  CHECK(relative(f1.b, f2.b) < 1e-14);
  CHECK(eb::hippo_window(HippoMeasure::legt) == eb::HippoWindow::s4);
  CHECK(std::isinf(eb::hippo_window(HippoMeasure::legs)));
}

TEST_CASE("Su's scalings of kexue.fm 10114") {
  constexpr Index n = 7;
  const eb::Hippo legs = eb::hippo_matrix(HippoMeasure::legs, n);
  const eb::Hippo legt = eb::hippo_matrix(HippoMeasure::legt, n, {.window = 1.0});
  // x = Lambda^-1 c: A -> Lambda^-1 A Lambda, B -> Lambda^-1 B, from his first B = sqrt 2 ours.
  Vector<double> scale(n);
  for (Index i = 0; i < n; ++i) scale[i] = std::sqrt(2.0 / (2.0 * static_cast<double>(i) + 1));
  const Matrix<double> inverse = diagonal(scale.cwiseInverse());
  const Matrix<double> a = times(times(inverse, legs.a), diagonal(scale));
  const Matrix<double> t = times(times(inverse, legt.a), diagonal(scale));
  const Vector<double> b = std::sqrt(2.0) * times(inverse, legs.b);
  const Vector<double> bt = std::sqrt(2.0) * times(inverse, legt.b);
  for (Index i = 0; i < n; ++i) {
    const double odd = 2.0 * static_cast<double>(i) + 1;
    CHECK(b[i] == doctest::Approx(odd).epsilon(1e-13));
    CHECK(bt[i] == doctest::Approx(odd).epsilon(1e-13));
    for (Index k = 0; k < n; ++k) {
      const double want = k < i ? -odd : k == i ? -static_cast<double>(i + 1) : 0.0;
      CHECK(a(i, k) == doctest::Approx(want).epsilon(1e-13));
      const double sign = k < i || (k - i) % 2 == 0 ? 1.0 : -1.0;
      CHECK(t(i, k) == doctest::Approx(-odd * sign).epsilon(1e-13));
    }
  }
}

TEST_CASE("Laguerre measures agree where they overlap, and at large N") {
  const eb::Hippo lagt = eb::hippo_matrix(HippoMeasure::lagt, 8);
  const eb::Hippo half = eb::hippo_matrix(HippoMeasure::tlagt, 8, {.beta = 1.0});
  CHECK(largest_difference(half.a + 0.5 * Matrix<double>::Identity(8, 8), lagt.a) == 0.0);
  const eb::Hippo tilted = eb::hippo_matrix(HippoMeasure::tlagt, 8, {.beta = 0.5});
  CHECK(tilted.a(3, 3) == -0.75);
  CHECK(tilted.b[5] == 0.5);
  // alpha = 0: l_n = 1, B = beta^(1/2).
  const eb::Hippo general = eb::hippo_matrix(HippoMeasure::glagt, 8, {.beta = 0.25});
  CHECK(largest_difference(general.b, Vector<double>::Constant(8, 0.5)) < 1e-15);
  CHECK(general.a(2, 2) == -0.625);
  CHECK(general.a(6, 1) == doctest::Approx(-1.0));
  const eb::Hippo large = eb::hippo_matrix(HippoMeasure::glagt, 400, {.alpha = 0.3, .beta = 0.1});
  CHECK(large.a(1, 0) == doctest::Approx(-1 / std::sqrt(1.3)).epsilon(1e-13));
  const double scale = std::pow(0.1, 0.35) / std::sqrt(std::tgamma(0.7) * std::tgamma(1.3));
  CHECK(large.b[0] == doctest::Approx(scale).epsilon(1e-13));
  CHECK(large.b[1] == doctest::Approx(scale * std::sqrt(1.3)).epsilon(1e-13));
  CHECK(large.a.allFinite());
  CHECK(large.b.allFinite());
}

TEST_CASE("the Fourier family has its dead state") {
  for (const HippoMeasure m :
       {HippoMeasure::fourier, HippoMeasure::fourier2, HippoMeasure::fourier_decay}) {
    const eb::Hippo h = eb::hippo_matrix(m, 6);
    CHECK(h.a.row(1).cwiseAbs().maxCoeff() == 0.0);
    CHECK(h.a.col(1).cwiseAbs().maxCoeff() == 0.0);
    CHECK(h.b[1] == 0.0);
  }
}

TEST_CASE("Fourier coefficients of the whole history rest at a constant") {
  const Matrix<std::complex<double>> a = eb::hippo_fourier_history(3);
  REQUIRE(a.rows() == 7);
  for (Index i = 0; i < 7; ++i) CHECK(a(i, 3) == std::complex<double>(-1, 0));
  CHECK(a(5, 5).imag() == doctest::Approx(2 * 3.14159265358979));
  CHECK(a(5, 4).real() == doctest::Approx(-2.0));  // n = 2, k = 1
  CHECK(a(1, 5).real() == doctest::Approx(-0.5));  // n = -2, k = 2
}

TEST_CASE("the basis reads the signal back from a simulated sliding window") {
  // Windows end now at t = 3; the measure forgets all before, up to what its N terms resolve.
  constexpr double dt = 2e-3;
  std::vector<double> u;
  for (int i = 0; i < 1500; ++i) u.push_back(signal(dt * (static_cast<double>(i) + 0.5)));
  const Vector<double> points = Vector<double>::LinSpaced(21, 0.05, 0.95);
  const auto check = [&](HippoMeasure m, Index n, double window, double tolerance) {
    CAPTURE(eb::hippo_name(m));
    const eb::Hippo h = eb::hippo_matrix(m, n, {.window = window});
    const Matrix<double> c = coefficients(h, u, dt);
    Matrix<double> got(21, 1);
    eb::hippo_reconstruct(m, points, c, got);
    double worst = 0;
    for (Index i = 0; i < 21; ++i)
      worst = std::max(worst, std::abs(got(i, 0) - signal(3 - window * (1 - points[i]))));
    CHECK(worst < tolerance);
  };
  check(HippoMeasure::legt, 16, 1.0, 5e-3);
  check(HippoMeasure::legt, 16, 2.0, 5e-3);
  check(HippoMeasure::lmu, 16, 2.0, 5e-3);
  // Only signals of the period of the window have no jump at its ends; the middle of it is close enough to tell mistakes.
  check(HippoMeasure::fourier, 64, 2.0, 0.2);
  check(HippoMeasure::fourier2, 64, 1.0, 0.2);
}

TEST_CASE("legs as a time-invariant system has the response e^-t r_n P_n(2 e^-t - 1)") {
  const eb::Hippo legs = eb::hippo_matrix(HippoMeasure::legs, 10);
  for (const double t : {0.1, 0.7, 2.5}) {
    const Matrix<double> response = times(eb::expm(t * legs.a), legs.b);
    const Matrix<double> e =
        eb::hippo_basis(HippoMeasure::legs, 10, Vector<double>::Constant(1, std::exp(-t)));
    CHECK(largest_difference(response.transpose(), std::exp(-t) * e) < 1e-12);
  }
  // Laguerre functions are the responses of lagt in the same way, at age t.
  const eb::Hippo lagt = eb::hippo_matrix(HippoMeasure::lagt, 10);
  const Matrix<double> response = times(eb::expm(1.7 * lagt.a), lagt.b);
  const Matrix<double> e =
      eb::hippo_basis(HippoMeasure::lagt, 10, Vector<double>::Constant(1, 1.7));
  CHECK(largest_difference(response.transpose(), e) < 1e-12);
}

TEST_CASE("basis: low orders in closed form, orthonormality, no drift at high degree") {
  const Vector<double> s = Vector<double>::LinSpaced(5, 0.0, 1.0);
  const Matrix<double> legs = eb::hippo_basis(HippoMeasure::legs, 3, s);
  const Matrix<double> lmu = eb::hippo_basis(HippoMeasure::lmu, 3, s);
  const Matrix<double> lagt = eb::hippo_basis(HippoMeasure::lagt, 3, s);
  const Matrix<double> tlagt = eb::hippo_basis(HippoMeasure::tlagt, 3, s);
  const Matrix<double> fourier = eb::hippo_basis(HippoMeasure::fourier, 6, s);
  for (Index i = 0; i < 5; ++i) {
    const double x = 2 * s[i] - 1, q = 2 * 3.14159265358979323846 * (1 - s[i]);
    CHECK(legs(i, 2) == doctest::Approx(std::sqrt(5.0) * (1.5 * x * x - 0.5)));
    CHECK(lmu(i, 1) == doctest::Approx(-x));
    CHECK(tlagt(i, 2) == doctest::Approx(1 - 2 * s[i] + s[i] * s[i] / 2));
    CHECK(lagt(i, 1) == doctest::Approx((1 - s[i]) * std::exp(-s[i] / 2)));
    CHECK(fourier(i, 0) == 1.0);
    CHECK(fourier(i, 1) == 0.0);
    CHECK(std::abs(fourier(i, 4) - std::sqrt(2.0) * std::cos(2 * q)) < 1e-14);
    CHECK(std::abs(fourier(i, 3) - std::sqrt(2.0) * std::sin(q)) < 1e-14);
  }
  // The midpoint rule over 4000 points, which also walks across the blocks of points.
  constexpr Index m = 4000;
  Vector<double> grid(m);
  for (Index i = 0; i < m; ++i) grid[i] = (static_cast<double>(i) + 0.5) / m;
  const Matrix<double> e = eb::hippo_basis(HippoMeasure::legs, 12, grid);
  CHECK(largest_difference(times(e.transpose(), e) / m, Matrix<double>::Identity(12, 12)) < 1e-4);
  const Matrix<double> ends = eb::hippo_basis(HippoMeasure::legs, 1001, Vector<double>::Ones(1));
  CHECK(ends(0, 1000) == doctest::Approx(std::sqrt(2001.0)).epsilon(1e-13));
}

TEST_CASE("reconstruction equals E c and its gradient is E^T g") {
  Vector<double> points(300);
  for (Index i = 0; i < 300; ++i) points[i] = static_cast<double>(i) / 299;
  Matrix<double> c(6, 3), g(300, 3), out(300, 3), dc(6, 3);
  for (Index i = 0; i < c.size(); ++i) c.data()[i] = std::cos(static_cast<double>(i * i));
  for (Index i = 0; i < g.size(); ++i) g.data()[i] = std::sin(static_cast<double>(i * i));
  for (const HippoMeasure m : {HippoMeasure::legt, HippoMeasure::lmu, HippoMeasure::fourier2,
                               HippoMeasure::lagt, HippoMeasure::tlagt}) {
    const Matrix<double> e = eb::hippo_basis(m, 6, points);
    eb::hippo_reconstruct(m, points, c, out);
    CHECK(largest_difference(out, times(e, c)) < 1e-13);
    dc.setConstant(7);
    eb::hippo_reconstruct_backward(m, points, g, dc);
    CHECK(largest_difference(dc, times(e.transpose(), g)) < 1e-12);
  }
  Matrix<float> single(300, 3);
  eb::hippo_reconstruct(HippoMeasure::legs, points, Matrix<float>(c.cast<float>()), single);
  eb::hippo_reconstruct(HippoMeasure::legs, points, c, out);
  CHECK(largest_difference(single.cast<double>(), out) < 2e-6 * out.cwiseAbs().maxCoeff());
  Matrix<double> none(0, 3);
  eb::hippo_reconstruct(HippoMeasure::legs, Vector<double>(0), c, none);
}

TEST_CASE("bad input is named and nothing is written") {
  using eb::invalid_argument;
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  check_throws<invalid_argument>([] { (void)eb::hippo_matrix(HippoMeasure::legs, 0); },
                                 "states (0) must be in [1, 32768]");
  check_throws<invalid_argument>([] { (void)eb::hippo_matrix(HippoMeasure::fourier, 7); },
                                 "states (7) must be even for measure fourier");
  check_throws<invalid_argument>(
      [] { (void)eb::hippo_matrix(HippoMeasure::glagt, 4, {.alpha = 1}); },
      "alpha (1) must be finite and below 1");
  check_throws<invalid_argument>(
      [] { (void)eb::hippo_matrix(HippoMeasure::glagt, 4, {.beta = 0.0}); },
      "beta (0) must be positive and finite");
  check_throws<invalid_argument>(
      [] { (void)eb::hippo_matrix(HippoMeasure::tlagt, 4, {.beta = -2.0}); },
      "beta (-2) must be positive and finite");
  check_throws<invalid_argument>(
      [] { (void)eb::hippo_matrix(HippoMeasure::legs, 4, {.window = 1.0}); },
      "window (1) is given, but measure legs has no sliding window");
  check_throws<invalid_argument>(
      [] { (void)eb::hippo_matrix(HippoMeasure::legt, 4, {.window = 0.0}); },
      "window (0) must be positive and finite");
  check_throws<invalid_argument>([] { (void)eb::hippo_matrix(static_cast<HippoMeasure>(99), 4); },
                                 "measure (99) is not a HippoMeasure");

  const Vector<double> points = Vector<double>::Zero(2);
  const Matrix<double> c = Matrix<double>::Ones(4, 1);
  Matrix<double> out = Matrix<double>::Constant(3, 1, 5.0), dc = Matrix<double>::Constant(4, 1, 5);
  check_throws<invalid_argument>([&] { eb::hippo_reconstruct(HippoMeasure::legs, points, c, out); },
                                 "out is 3 x 1, expected 2 x 1 (points, channels)");
  check_throws<invalid_argument>(
      [&] { eb::hippo_reconstruct(HippoMeasure::foud, points, c, out); },
      "measure foud has no basis here, expected legs, legt, lmu, fourier, fourier2, lagt or tlagt");
  check_throws<invalid_argument>(
      [&] { eb::hippo_reconstruct(HippoMeasure::legs, Vector<double>::Constant(3, nan), c, out); },
      "points[0] (nan) must be finite");
  check_throws<invalid_argument>(
      [&] { eb::hippo_reconstruct(HippoMeasure::lagt, Vector<double>::Constant(3, -1.0), c, out); },
      "points[0] (-1) is an age and must not be negative");
  check_throws<invalid_argument>(
      [&] { eb::hippo_reconstruct_backward(HippoMeasure::legs, points, out, dc); },
      "dout is 3 x 1, expected 2 x 1 (points, channels)");
  CHECK((out.array() == 5.0).all());
  CHECK((dc.array() == 5.0).all());
}
