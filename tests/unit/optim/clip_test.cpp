#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/optim/clip.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using namespace eigenblocks;

TEST_CASE_TEMPLATE("clip_grad_norm: 3-4-5", S, float, double) {
  Matrix<S> a(1, 1);
  Vector<S> b(2);
  a << S(3);
  b << S(0), S(4);
  CHECK(clip_grad_norm({.max_norm = 10}, a, b) == 5.0);
  CHECK(a(0, 0) == S(3));  // untouched, to the bit
  CHECK(b[1] == S(4));
  CHECK(clip_grad_norm({.max_norm = 1}, a, b) == 5.0);
  const double eps = double(std::numeric_limits<S>::epsilon());
  CHECK(double(a(0, 0)) == doctest::Approx(3 / (5 + 1e-6)).epsilon(2 * eps));
  CHECK(double(b[1]) == doctest::Approx(4 / (5 + 1e-6)).epsilon(2 * eps));
  CHECK(b[0] == S(0));
  CHECK(clip_grad_norm({.max_norm = 0}, a, b) == doctest::Approx(1.0).epsilon(1e-5));
  CHECK(a(0, 0) == S(0));
}

TEST_CASE("clip_grad_norm: lists, blocks, empty tensors; equal bits for every executor") {
  Random random(2);
  const Matrix<float> start = normal_matrix<float>(random, 611, 331);
  const auto clipped = [&](ExecutorRef executor, double& norm) {
    Matrix<float> x = start, none(0, 4);
    // The blocks tile x without its last column.
    const std::vector<TensorRef<float>> list{x.leftCols(100), none, x.middleCols(100, 230)};
    norm = clip_grad_norm<float>(list, {.max_norm = 0.5}, executor);
    return x;
  };
  double norm = 0;
  const Matrix<float> serial_result = clipped(serial, norm);
  const double want = start.leftCols(330).cast<double>().norm();
  CHECK(norm == doctest::Approx(want).epsilon(1e-5));
  CHECK(serial_result.col(330) == start.col(330));
  CHECK(serial_result.leftCols(330).cast<double>().norm() == doctest::Approx(0.5).epsilon(1e-5));
  for (const int workers : {1, 2, 3, 7}) {
    const thread_pool pool(workers);
    double other = 0;
    CHECK(clipped(pool, other) == serial_result);
    CHECK(other == norm);
  }
  CHECK(clip_grad_norm<float>({}, {}) == 0.0);
  CHECK(joint_norm<double>({}) == 0.0);
}

TEST_CASE("clip_grad_norm: float gradients whose squares leave the range of float") {
  for (const float size : {1e30f, 1e-30f}) {
    Matrix<float> g = Matrix<float>::Constant(40, 25, size);
    const double norm = clip_grad_norm({.max_norm = 1e20}, g);
    // As ratios: Approx compares with an absolute scale of 1.
    CHECK(norm / (double(size) * std::sqrt(1000.0)) == doctest::Approx(1).epsilon(1e-5));
    CHECK(g.cast<double>().norm() / std::min(1e20, norm) == doctest::Approx(1).epsilon(1e-5));
  }
}

TEST_CASE("clip_grad_norm: infinite and NaN norms behave as in PyTorch") {
  constexpr float inf = std::numeric_limits<float>::infinity();
  Matrix<float> g = Matrix<float>::Ones(2, 3);
  g(1, 1) = inf;
  CHECK(clip_grad_norm({.max_norm = 1}, g) == double(inf));
  CHECK(g(0, 0) == 0.0f);
  CHECK(std::isnan(g(1, 1)));
  g = Matrix<float>::Ones(2, 3);
  g(0, 2) = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(clip_grad_norm({.max_norm = 1}, g)));
  CHECK(std::isnan(g(1, 1)));
}

TEST_CASE("clip_grad_norm: bad input") {
  Matrix<double> g = Matrix<double>::Ones(1, 2);
  CHECK_THROWS_WITH_AS(clip_grad_norm({.max_norm = -1}, g),
                       "eigenblocks: clip_grad_norm: max_norm (-1) must not be negative",
                       invalid_argument);
  CHECK_THROWS_AS(clip_grad_norm({.max_norm = std::numeric_limits<double>::quiet_NaN()}, g),
                  invalid_argument);
  CHECK(g(0, 0) == 1.0);
}
