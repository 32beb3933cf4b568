// The checker itself must be beyond doubt: it accepts exact gradients and refuses every kind of wrong one.
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace {

using namespace eigenblocks;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

/// A quartic with known gradient: sum of c x^4 - 2 x^2 + x with c = entry number.
struct Quartic {
  Matrix<double> x, c;
  Quartic() : x(3, 5), c(3, 5) {
    Random random(4);
    fill_normal(random, x, 2.0);
    for (Index i = 0; i < c.size(); ++i) c.data()[i] = static_cast<double>(i);
  }
  double loss() const {
    return (c.array() * x.array().pow(4) - 2 * x.array().square() + x.array()).sum();
  }
  Matrix<double> gradient() const {
    return (4 * c.array() * x.array().cube() - 4 * x.array() + 1).matrix();
  }
  GradcheckResult check(const Matrix<double>& g, const GradcheckOptions& options = {}) {
    return gradcheck([this] { return loss(); }, x, g, options);
  }
};

}  // namespace

TEST_CASE("the stencil is exact on quartics up to rounding") {
  // Truncation starts at the fifth derivative, which is 0.  What is left is the rounding of the loss: at most 15 terms of
  // size about 14 * 5^4, so eps * 1e4 / h = 3e-9 absolute against gradients up to 1e4.
  Quartic q;
  const GradcheckResult result = q.check(q.gradient(), {.rtol = 1e-9, .atol = 1e-8});
  CHECK_MESSAGE(result.passed, result.message());
  CHECK(result.worst <= 1.0);
}

TEST_CASE("a wrong entry is found, wherever it is, and named") {
  for (Index at = 0; at < 15; ++at) {
    Quartic q;
    Matrix<double> g = q.gradient();
    g.data()[at] = g.data()[at] * (1 + 1e-4) + 1e-4;
    const GradcheckResult result = q.check(g);
    CHECK_FALSE(result.passed);
    CHECK(result.row * 5 + result.col == at);
    CHECK(result.analytic == g.data()[at]);
    CHECK(result.worst > 1.0);
  }
}

TEST_CASE("sign, missing factor, zero gradient and transposed entries are refused") {
  Quartic q;
  const Matrix<double> g = q.gradient();
  CHECK_FALSE(q.check(-g).passed);
  CHECK_FALSE(q.check(2 * g).passed);
  CHECK_FALSE(q.check(Matrix<double>::Zero(3, 5)).passed);
  CHECK_FALSE(q.check(g.rowwise().reverse()).passed);
}

TEST_CASE("NaN and infinity never pass") {
  for (const double bad : {kNaN, kInf, -kInf}) {
    Quartic q;
    Matrix<double> g = q.gradient();
    g(1, 2) = bad;
    const GradcheckResult result = q.check(g);
    CHECK_FALSE(result.passed);
    CHECK(result.row == 1);
    CHECK(result.col == 2);
    // and a loss that is not a number, with a gradient that agrees with nothing
    double dummy = 0;
    Matrix<double> x = Matrix<double>::Zero(1, 1);
    CHECK_FALSE(
        gradcheck([&] { return x(0, 0) + dummy * 0 + bad; }, x, Matrix<double>::Ones(1, 1)).passed);
  }
}

TEST_CASE("x is restored bitwise, also when it is a strided view") {
  Quartic q;
  q.x(0, 0) = -0.0;
  q.x(1, 1) = 0.1;
  q.x(2, 4) = 1e-300;
  const Matrix<double> before = q.x;
  (void)q.check(q.gradient());
  for (Index i = 0; i < 15; ++i) {
    CHECK(std::signbit(q.x.data()[i]) == std::signbit(before.data()[i]));
    CHECK(q.x.data()[i] == before.data()[i]);
  }

  Matrix<double> wide = Matrix<double>::Constant(3, 9, 0.5);
  auto view = wide.middleCols(2, 4);
  const auto loss = [&] { return view.array().square().sum() + 100 * wide.col(0).sum(); };
  const GradcheckResult result = gradcheck(loss, view, Matrix<double>(2 * view));
  CHECK_MESSAGE(result.passed, result.message());
  CHECK((wide.array() == 0.5).all());
}

TEST_CASE("sizes that are empty or large, and shapes that differ") {
  Matrix<double> empty(0, 4);
  CHECK(gradcheck([] { return 0.0; }, empty, Matrix<double>(0, 4)).passed);

  // 40 entries, at most 10 looked at: every fourth one.
  Matrix<double> x = Matrix<double>::Ones(8, 5);
  int calls = 0;
  const auto loss = [&] { return ++calls, x.sum(); };
  Matrix<double> g = Matrix<double>::Ones(8, 5);
  g(0, 1) = 7;  // entry 1 is skipped
  CHECK(gradcheck(loss, x, g, {.max_entries = 10}).passed);
  CHECK(calls == 10 * 4);
  g(0, 4) = 7;  // entry 4 is not
  CHECK_FALSE(gradcheck(loss, x, g, {.max_entries = 10}).passed);

  CHECK_THROWS_WITH_AS(gradcheck(loss, x, Matrix<double>::Ones(5, 8)),
                       "eigenblocks: gradient is 5 x 8, expected 8 x 5 (shape of x)",
                       eigenblocks::invalid_argument);
}

TEST_CASE("the message shows both derivatives") {
  Matrix<double> x = Matrix<double>::Constant(1, 1, 3.0);
  const GradcheckResult result =
      gradcheck([&] { return 2 * x(0, 0); }, x, Matrix<double>::Ones(1, 1));
  CHECK_FALSE(result.passed);
  CHECK(result.message().find("entry (0, 0): analytic 1, numeric 2, error / tolerance ") == 0);
}
