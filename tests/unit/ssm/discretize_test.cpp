#include "support/layer_checks.hpp"

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/ssm/discretize.hpp>
#include <eigenblocks/ssm/hippo.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <complex>
#include <limits>
#include <vector>

namespace {

namespace eb = eigenblocks;
using eb::Discretization;
using eb::DiscretizeOptions;
using eb::Index;
using eb::Matrix;
using eb::Vector;
using Complex = std::complex<double>;

Matrix<double> random(Index rows, Index cols, std::uint64_t seed, double scale = 1.0) {
  eb::Random generator(seed);
  Matrix<double> m(rows, cols);
  eb::fill_normal(generator, m, scale);
  return m;
}

/// e^a by its series over a 2^-20, squared 20 times, in long double: another way to the same numbers.
Matrix<double> series_exponential(const Matrix<double>& a) {
  using Long = Eigen::Matrix<long double, Eigen::Dynamic, Eigen::Dynamic>;
  const Index n = a.rows();
  const auto multiply = [n](const Long& x, const Long& y) {
    Long z = Long::Zero(n, n);
    for (Index i = 0; i < n; ++i) {
      for (Index k = 0; k < n; ++k) {
        for (Index j = 0; j < n; ++j) z(i, j) += x(i, k) * y(k, j);
      }
    }
    return z;
  };
  const Long small = a.cast<long double>() * std::ldexp(1.0L, -12);
  Long sum = Long::Identity(n, n), term = sum;
  for (int k = 1; k < 24; ++k) {
    term = multiply(term, small) / static_cast<long double>(k);
    sum += term;
  }
  for (int i = 0; i < 12; ++i) sum = multiply(sum, sum);
  return sum.cast<double>();
}

const std::vector<DiscretizeOptions> kMethods = {{.method = Discretization::forward},
                                                 {.method = Discretization::backward},
                                                 {.method = Discretization::bilinear},
                                                 {.method = Discretization::gbt, .alpha = 0.3},
                                                 {.method = Discretization::zoh}};

}  // namespace

TEST_CASE("expm at every size of its argument") {
  for (const double scale : {0.0, 1e-9, 1e-3, 0.02, 0.1, 0.4, 1.0, 3.0, 20.0}) {
    CAPTURE(scale);
    const Matrix<double> a = random(6, 6, 3, scale);
    const Matrix<double> want = series_exponential(a);
    CHECK(largest_difference(eb::expm(a), want) < 2e-14 * want.cwiseAbs().maxCoeff());
  }
  // Triangular with large negative eigenvalues: legs far into the future.
  const Matrix<double> legs = eb::hippo_matrix(eb::HippoMeasure::legs, 8).a;
  CHECK(eb::expm(5 * legs).cwiseAbs().maxCoeff() < 1.0);
  CHECK(eb::expm(Matrix<double>(0, 0)).size() == 0);
  Matrix<double> bad = Matrix<double>::Zero(2, 2);
  bad(0, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(eb::expm(bad).hasNaN());
  bad(0, 1) = std::numeric_limits<double>::infinity();
  CHECK(eb::expm(bad).hasNaN());
}

TEST_CASE("the gradient of expm, for gradients of any size") {
  for (const double size : {1e-12, 1.0, 1e12}) {
    Matrix<double> a = random(4, 4, 5, 0.7);
    const Matrix<double> g = random(4, 4, 6, size);
    const Matrix<double> da = eb::expm_backward(a, g);
    const auto loss = [&] { return eb::expm(a).cwiseProduct(g).sum() / size; };
    const auto r = eb::gradcheck(loss, a, da / size);
    CHECK_MESSAGE(r.passed, r.message());
  }
  CHECK(eb::expm_backward(random(3, 3, 1), Matrix<double>::Zero(3, 3)).cwiseAbs().maxCoeff() == 0);
}

TEST_CASE("defining equations of every method") {
  const Matrix<double> a = random(5, 5, 1, 0.5), b = random(5, 2, 2);
  const Matrix<double> one = Matrix<double>::Identity(5, 5);
  const double dt = 0.3;
  for (const auto& options : kMethods) {
    const eb::Discretized d = eb::discretize(a, b, dt, options);
    if (options.method == Discretization::zoh) {
      CHECK(largest_difference(d.a, series_exponential(dt * a)) < 1e-14);
      CHECK(largest_difference(a * d.b, (d.a - one) * b) < 1e-13);  // A int e^(sA) = e^(dt A) - 1
      continue;
    }
    const double alpha = options.method == Discretization::forward    ? 0.0
                         : options.method == Discretization::backward ? 1.0
                         : options.method == Discretization::bilinear ? 0.5
                                                                      : 0.3;
    CHECK(largest_difference((one - alpha * dt * a) * d.a, one + (1 - alpha) * dt * a) < 1e-14);
    CHECK(largest_difference((one - alpha * dt * a) * d.b, dt * b) < 1e-14);
  }
}

TEST_CASE("zoh needs no inverse: singular A, tiny dt") {
  const eb::Hippo h = eb::hippo_matrix(eb::HippoMeasure::fourier, 6);
  const Matrix<double> b = h.b;
  const eb::Discretized d = eb::discretize(h.a, b, 0.1, {.method = Discretization::zoh});
  CHECK(d.a(1, 1) == doctest::Approx(1.0).epsilon(1e-14));
  CHECK(std::abs(d.b(1, 0)) < 1e-16);
  const Matrix<double> zero = Matrix<double>::Zero(2, 2), unit = Matrix<double>::Ones(2, 1);
  CHECK(largest_difference(eb::discretize(zero, unit, 0.5, {.method = Discretization::zoh}).b,
                           0.5 * unit) < 1e-16);
  const eb::Discretized tiny = eb::discretize(h.a, b, 1e-12, {.method = Discretization::zoh});
  CHECK(largest_difference(tiny.b / 1e-12, b) < 1e-10);
}

TEST_CASE("methods agree to second and third order in dt") {
  const Matrix<double> a = random(4, 4, 8), b = random(4, 1, 9);
  double last = 0;
  for (const double dt : {1e-2, 1e-3}) {
    const auto zoh = eb::discretize(a, b, dt, {.method = Discretization::zoh});
    const auto bilinear = eb::discretize(a, b, dt);
    const double error = largest_difference(zoh.a, bilinear.a);
    if (last > 0) CHECK(std::abs(1000 * error / last - 1) < 0.1);
    last = error;
  }
}

TEST_CASE("stability") {
  const eb::Hippo h = eb::hippo_matrix(eb::HippoMeasure::legs, 12);
  const Matrix<double> b = h.b;
  // Triangular: the diagonal is the spectrum.
  for (const double dt : {0.01, 1.0, 100.0}) {
    for (const auto method :
         {Discretization::backward, Discretization::bilinear, Discretization::zoh})
      CHECK(eb::discretize(h.a, b, dt, {.method = method}).a.diagonal().cwiseAbs().maxCoeff() < 1);
  }
  CHECK(eb::discretize(h.a, b, 1.0, {.method = Discretization::forward})
            .a.diagonal()
            .cwiseAbs()
            .maxCoeff() == 11.0);
  for (const Complex lambda : {Complex(-0.5, 300), Complex(-4, 0), Complex(-1e-3, -2)}) {
    for (const double dt : {0.01, 1.0, 50.0}) {
      for (const auto method :
           {Discretization::backward, Discretization::bilinear, Discretization::zoh})
        CHECK(std::abs(eb::discretize_diagonal<double>(lambda, dt, method).a) < 1);
      const bool inside = std::abs(1.0 + dt * lambda) < 1;
      const auto forward = eb::discretize_diagonal<double>(lambda, dt, Discretization::forward);
      CHECK((std::abs(forward.a) < 1) == inside);
    }
  }
}

TEST_CASE("gradients of the dense forms") {
  for (const auto& options : kMethods) {
    CAPTURE(static_cast<int>(options.method));
    Matrix<double> a = random(5, 5, 11, 0.8), b = random(5, 2, 12);
    Matrix<double> dt = Matrix<double>::Constant(1, 1, 0.4);
    const Matrix<double> ga = random(5, 5, 13), gb = random(5, 2, 14);
    const auto loss = [&] {
      const eb::Discretized d = eb::discretize(a, b, dt(0, 0), options);
      return d.a.cwiseProduct(ga).sum() + d.b.cwiseProduct(gb).sum();
    };
    Matrix<double> da(5, 5), db(5, 2), ddt(1, 1);
    eb::discretize_backward(a, b, dt(0, 0), ga, gb, da, db, ddt(0, 0), options);
    auto r = eb::gradcheck(loss, a, da);
    CHECK_MESSAGE(r.passed, "a: ", r.message());
    r = eb::gradcheck(loss, b, db);
    CHECK_MESSAGE(r.passed, "b: ", r.message());
    r = eb::gradcheck(loss, dt, ddt);
    CHECK_MESSAGE(r.passed, "dt: ", r.message());
  }
}

TEST_CASE("diagonal forms are the dense ones of a 1 x 1 system") {
  for (const auto& options : kMethods) {
    for (const double lambda : {-3.0, -0.2, -1e-5, 0.0, 0.4}) {
      const Matrix<double> a = Matrix<double>::Constant(1, 1, lambda),
                           b = Matrix<double>::Ones(1, 1);
      const auto dense = eb::discretize(a, b, 0.7, options);
      const auto mode = eb::discretize_diagonal<double>(lambda, 0.7, options.method, options.alpha);
      CHECK(mode.a.real() == doctest::Approx(dense.a(0, 0)).epsilon(1e-14));
      CHECK(mode.phi.real() == doctest::Approx(dense.b(0, 0)).epsilon(1e-14));
      CHECK(mode.a.imag() == 0.0);
    }
  }
}

TEST_CASE("phi and its slope hold their accuracy through zero and along the imaginary axis") {
  using Long = std::complex<long double>;
  // In long double the quotient loses 4 digits of 19 at |x| = 1e-2 (8 for the slope), the series is exact below that.
  const auto want = [](Complex x) {
    const Long z(x);
    if (std::abs(z) > 0.5L) {
      const Long value = (std::exp(z) - 1.0L) / z;
      return std::pair<Long, Long>{value, (std::exp(z) - value) / z};
    }
    Long value = 0, slope = 0, power = 1;
    long double factorial = 1;
    for (int k = 0; k < 24; ++k) {
      factorial *= static_cast<long double>(k + 1);
      value += power / factorial;
      slope +=
          power * static_cast<long double>(k + 1) / (factorial * static_cast<long double>(k + 2));
      power *= z;
    }
    return std::pair<Long, Long>{value, slope};
  };
  for (const double size :
       {0.0, 1e-300, 1e-12, 1e-4, 9.9e-3, 1.01e-2, 0.2, 0.2499, 0.2501, 0.6, 3.0, 30.0, 600.0}) {
    for (const double angle : {1.6, 2.0, 2.7, 3.1415926535}) {  // left half-plane
      const Complex x = std::polar(size, angle);
      const auto [value, slope] = want(x);
      const auto mode = eb::discretize_diagonal<double>(x, 1.0, Discretization::zoh);
      CHECK(std::abs(Long(mode.phi) - value) <= 4e-16L * std::abs(value));
      const auto g =
          eb::discretize_diagonal_backward<double>(x, 1.0, 0.0, 1.0, Discretization::zoh);
      CHECK(std::abs(std::conj(Long(g.lambda)) - slope) <= 4e-15L * std::abs(slope));
    }
  }
}

TEST_CASE("gradients of the diagonal forms") {
  for (const auto& options : kMethods) {
    for (const Complex lambda : {Complex(-0.5, 2), Complex(-1e-4, 3e-3), Complex(0, 0),
                                 Complex(-0.3, -0.1), Complex(-2, 20)}) {
      Matrix<double> x(1, 3);
      x << lambda.real(), lambda.imag(), 0.4;
      const Complex ga(0.3, -1.1), gphi(0.7, 0.9);
      const auto loss = [&] {
        const auto s = eb::discretize_diagonal<double>(Complex(x(0, 0), x(0, 1)), x(0, 2),
                                                       options.method, options.alpha);
        return (std::conj(ga) * s.a + std::conj(gphi) * s.phi).real();
      };
      const auto g = eb::discretize_diagonal_backward<double>(lambda, 0.4, ga, gphi, options.method,
                                                              options.alpha);
      Matrix<double> gradient(1, 3);
      gradient << g.lambda.real(), g.lambda.imag(), g.dt;
      const auto r = eb::gradcheck(loss, x, gradient);
      CHECK_MESSAGE(r.passed, r.message());
    }
  }
}

TEST_CASE("vectors of modes: one dt for each, or one for all with its gradients summed") {
  Vector<Complex> lambda(3), a, phi, dlambda, ga(3), gphi(3);
  lambda << Complex(-1, 1), Complex(-0.5, -4), Complex(0, 0);
  ga << Complex(1, 2), Complex(-1, 0.5), Complex(0.2, 0);
  gphi << Complex(0.1, 0), Complex(2, -1), Complex(1, 1);
  Vector<double> each(3), shared(1), deach, dshared;
  each << 0.1, 0.1, 0.1;
  shared << 0.1;
  for (const Vector<double>& dt : {each, shared}) {
    eb::discretize_diagonal(lambda, dt, a, phi, Discretization::bilinear);
    for (Index i = 0; i < 3; ++i) {
      const auto s = eb::discretize_diagonal<double>(lambda[i], 0.1, Discretization::bilinear);
      CHECK(a[i] == s.a);
      CHECK(phi[i] == s.phi);
    }
  }
  eb::discretize_diagonal_backward(lambda, each, ga, gphi, dlambda, deach, Discretization::zoh);
  eb::discretize_diagonal_backward(lambda, shared, ga, gphi, dlambda, dshared, Discretization::zoh);
  REQUIRE(dshared.size() == 1);
  CHECK(dshared[0] == doctest::Approx(deach.sum()).epsilon(1e-14));
  const auto single =
      eb::discretize_diagonal<float>(std::complex<float>(-0.5f, 3.0f), 0.01f, Discretization::zoh);
  const auto exact = eb::discretize_diagonal<double>(Complex(-0.5, 3), static_cast<double>(0.01f),
                                                     Discretization::zoh);
  CHECK(std::abs(Complex(single.phi) - exact.phi) < 1e-9);
}

TEST_CASE("bad input is named, singular steps are numerical failures, nothing is written") {
  using eb::invalid_argument;
  const Matrix<double> a = Matrix<double>::Identity(2, 2), b = Matrix<double>::Ones(2, 1);
  constexpr double inf = std::numeric_limits<double>::infinity();
  check_throws<invalid_argument>([&] { (void)eb::discretize(a, b, 0.0); },
                                 "dt (0) must be positive and finite");
  check_throws<invalid_argument>([&] { (void)eb::discretize(a, b, inf); },
                                 "dt (inf) must be positive and finite");
  check_throws<invalid_argument>([&] { (void)eb::discretize(b, b, 1.0); },
                                 "a is 2 x 1, expected square");
  check_throws<invalid_argument>([&] { (void)eb::discretize(a, Matrix<double>(3, 1), 1.0); },
                                 "b has 3 rows, expected 2 (states of a)");
  check_throws<invalid_argument>(
      [&] { (void)eb::discretize(a, b, 1.0, {.method = Discretization::gbt, .alpha = 1.5}); },
      "alpha (1.5) must be in [0, 1]");
  check_throws<invalid_argument>(
      [&] { (void)eb::discretize(a, b, 1.0, {.method = Discretization::zoh, .alpha = 0.3}); },
      "alpha (0.3) is an option of method gbt alone");
  check_throws<std::domain_error>(
      [&] { (void)eb::discretize(a, b, 1.0, {.method = Discretization::backward}); },
      "I - alpha dt A is singular to working precision (alpha 1, dt 1)");
  check_throws<invalid_argument>(
      [&] { (void)eb::discretize_diagonal<double>(Complex(-1, 0), -1.0, Discretization::zoh); },
      "dt (-1) must be positive and finite");
  Matrix<double> da = Matrix<double>::Constant(2, 2, 5), db = Matrix<double>::Constant(2, 1, 5);
  double ddt = 5;
  check_throws<invalid_argument>([&] { eb::discretize_backward(a, b, 0.5, b, b, da, db, ddt); },
                                 "ga is 2 x 1, expected 2 x 2 (shape of a)");
  check_throws<std::domain_error>(
      [&] {
        eb::discretize_backward(a, b, 1.0, a, b, da, db, ddt, {.method = Discretization::backward});
      },
      "I - alpha dt A is singular to working precision (alpha 1, dt 1)");
  CHECK((da.array() == 5.0).all());
  CHECK((db.array() == 5.0).all());
  CHECK(ddt == 5.0);
  Matrix<double> nearly(2, 2);  // I - A is singular but for its last bit
  nearly << 0.0, -1.0, -1.0, -2e-16;
  check_throws<std::domain_error>(
      [&] { (void)eb::discretize(nearly, b, 1.0, {.method = Discretization::backward}); },
      "I - alpha dt A is singular to working precision (alpha 1, dt 1)");
  Matrix<double> sick = a;
  sick(0, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(eb::discretize(sick, b, 0.5).a.hasNaN());
}
