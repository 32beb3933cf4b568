#include <doctest/doctest.h>

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/activation.hpp>

#include <cmath>
#include <limits>

using namespace eigenblocks;

namespace {

constexpr Activation kKinds[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                 Activation::relu, Activation::sigmoid};

/// In long double: a rounded argument in double would cost the tails x^2 ulp.
double reference(Activation kind, double argument) {
  using Wide = long double;
  const Wide x = static_cast<Wide>(argument);
  const auto sigmoid = [](Wide v) {
    return v < 0 ? std::exp(v) / (1 + std::exp(v)) : 1 / (1 + std::exp(-v));
  };
  const auto value = [&]() -> Wide {
    switch (kind) {
      case Activation::silu:
        return x * sigmoid(x);
      case Activation::gelu:
        return x / 2 * std::erfc(-x / std::sqrt(Wide(2)));
      case Activation::gelu_tanh:
        return x * sigmoid(2 * std::sqrt(2 / std::acos(Wide(-1))) *
                           (x + static_cast<Wide>(0.044715) * x * x * x));
      case Activation::relu:
        return x > 0 ? x : 0;
      case Activation::sigmoid:
        return sigmoid(x);
    }
    return 0;
  };
  return static_cast<double>(value());
}

}  // namespace

TEST_CASE_TEMPLATE("activations are the textbook at every width, tails included", S, float,
                   double) {
  // Up to 24 ulp where the result is a normal number, its limit below that; in the lower tail of gelu_tanh the rounding
  // of the exponent e counts |e| times.
  const double eps = double(std::numeric_limits<S>::epsilon());
  const double smallest = double(std::numeric_limits<S>::min());
  Random random(1);
  for (const Activation kind : kKinds) {
    CAPTURE(static_cast<int>(kind));
    for (const Index cols : {0, 1, 3, 8, 15, 16, 17, 31, 100}) {
      Matrix<S> frame = normal_matrix<S>(random, 3, cols + 4, 4.0),
                out = Matrix<S>::Constant(3, cols + 4, S(7));
      const auto x = frame.middleCols(1, cols);
      auto y = out.middleCols(2, cols);
      activation_forward(kind, x, y);
      for (Index i = 0; i < 3; ++i) {
        for (Index j = 0; j < cols; ++j) {
          const double want = reference(kind, double(x(i, j)));
          const double exponent = kind == Activation::gelu_tanh && want < 0 ? std::log(-want) : 0;
          const double tolerance = eps * (24 + 4 * std::abs(exponent));
          CHECK(std::abs(double(y(i, j)) - want) <= tolerance * std::abs(want) + smallest);
        }
      }
      y.setConstant(S(7));
      CHECK((out.array() == S(7)).all());
    }
  }
}

TEST_CASE_TEMPLATE("activations: limits, large arguments and NaN", S, float, double) {
  const S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  Matrix<S> x(1, 7), y(1, 7), dx(1, 7);
  const Matrix<S> one = Matrix<S>::Ones(1, 7);
  x << -inf, S(-1e3), S(-1e30), S(1e3), S(1e30), inf, nan;
  for (const Activation kind : kKinds) {
    CAPTURE(static_cast<int>(kind));
    activation_forward(kind, x, y);
    activation_backward(kind, x, one, dx);
    for (Index j = 0; j < 3; ++j) {
      CHECK(y(0, j) == S(0));
      CHECK(dx(0, j) == S(0));
    }
    for (Index j = 3; j < 6; ++j) {
      CHECK(y(0, j) == (kind == Activation::sigmoid ? S(1) : x(0, j)));
      CHECK(dx(0, j) == (kind == Activation::sigmoid ? S(0) : S(1)));
    }
    CHECK(std::isnan(y(0, 6)));
  }
  // relu's slope at 0 is 0 by convention.
  x.setZero();
  activation_backward(Activation::relu, x, one, dx);
  CHECK((dx.array() == S(0)).all());
}

TEST_CASE("activation gradients against finite differences") {
  Random random(2);
  for (const Activation kind : kKinds) {
    CAPTURE(static_cast<int>(kind));
    Matrix<double> x = normal_matrix<double>(random, 3, 19, 2.0), y = x, dx = x;
    // Keep clear of relu's kink: the stencil reaches 2 h max(1, |x|) < 0.02.
    x = x.unaryExpr([](double v) { return std::abs(v) < 0.05 ? v + 0.1 : v; });
    const Matrix<double> dy = normal_matrix<double>(random, 3, 19);
    activation_backward(kind, x, dy, dx);
    const auto result = gradcheck(
        [&] {
          activation_forward(kind, x, y);
          return y.cwiseProduct(dy).sum();
        },
        x, dx);
    CHECK_MESSAGE(result.passed, result.message());
  }
}

TEST_CASE_TEMPLATE("activations: in place, on threads and as expressions the same bits", S, float,
                   double) {
  Random random(3);
  const Matrix<S> x = normal_matrix<S>(random, 50, 1040, 3.0),
                  dy = normal_matrix<S>(random, 50, 1040);
  const thread_pool pool(3);
  for (const Activation kind : kKinds) {
    Matrix<S> y(50, 1040), dx(50, 1040), again = x;
    activation_forward(kind, x, y);
    activation_forward(kind, again, again, pool);
    CHECK(again == y);
    activation_backward(kind, x, dy, dx);
    again = dy;
    activation_backward(kind, x, again, again, pool);
    CHECK(again == dx);
    again = x;
    activation_backward(kind, again, dy, again);
    CHECK(again == dx);
    switch (kind) {
      case Activation::silu:
        again = silu(x);
        break;
      case Activation::gelu:
        again = gelu(x);
        break;
      case Activation::gelu_tanh:
        again = gelu_tanh(x);
        break;
      case Activation::relu:
        again = relu(x);
        break;
      case Activation::sigmoid:
        again = sigmoid(x);
        break;
    }
    CHECK(again == y);
  }
}

TEST_CASE("activation expressions compose with Eigen, fixed sizes and any order") {
  Random random(4);
  const Matrix<float> a = normal_matrix<float>(random, 5, 11),
                      b = normal_matrix<float>(random, 5, 11);
  const Matrix<float> h = silu(a.array()) * b.array() + 1;
  const double eps = double(std::numeric_limits<float>::epsilon());
  for (Index i = 0; i < 5; ++i) {
    for (Index j = 0; j < 11; ++j) {
      const double want = reference(Activation::silu, double(a(i, j))) * double(b(i, j)) + 1;
      CHECK(std::abs(double(h(i, j)) - want) <= 16 * eps * (std::abs(want) + 2));
    }
  }
  const Matrix<float> doubled = 2 * a;
  CHECK(Matrix<float>(relu(2 * a)) == Matrix<float>(relu(doubled)));
  const Matrix<float> product = a * b.transpose(), of_product = gelu(a * b.transpose());
  CHECK((of_product - Matrix<float>(gelu(product))).cwiseAbs().maxCoeff() <= 1e-5f);
  const Eigen::MatrixXf columns = a;
  CHECK(Matrix<float>(sigmoid(columns)) == Matrix<float>(sigmoid(a)));
  const Vector<float> vector = normal_matrix<float>(random, 9, 1);
  const Vector<float> first = vector.head(4), of_first = silu(vector.head(4));
  CHECK(of_first == Vector<float>(silu(first)));
  const Eigen::Array4f four(-1.f, 0.f, 1.f, 2.f);
  const Eigen::Array<double, 3, 1> three(-1., 0., 2.);
  const Eigen::Array4f y4 = silu(four);
  const Eigen::Array<double, 3, 1> y3 = gelu(three);
  for (Index i = 0; i < 4; ++i)
    CHECK(double(y4[i]) == doctest::Approx(reference(Activation::silu, double(four[i]))));
  for (Index i = 0; i < 3; ++i)
    CHECK(y3[i] == doctest::Approx(reference(Activation::gelu, three[i])));
}

TEST_CASE("activations refuse shapes that differ and unknown kinds, before writing") {
  Matrix<float> x = Matrix<float>::Ones(2, 3), y = Matrix<float>::Constant(2, 2, 5.f);
  CHECK_THROWS_WITH_AS(activation_forward(Activation::silu, x, y),
                       "eigenblocks: y is 2 x 2, expected 2 x 3 (shape of x)", invalid_argument);
  CHECK_THROWS_WITH_AS(activation_backward(Activation::silu, x, y, x),
                       "eigenblocks: dy is 2 x 2, expected 2 x 3 (shape of x)", invalid_argument);
  CHECK_THROWS_WITH_AS(activation_backward(Activation::silu, x, x, y),
                       "eigenblocks: dx is 2 x 2, expected 2 x 3 (shape of x)", invalid_argument);
  CHECK_THROWS_WITH_AS(activation_forward(static_cast<Activation>(9), x, x),
                       "eigenblocks: activation (9) is not one of the five kinds",
                       invalid_argument);
  CHECK((y.array() == 5.f).all());
}
