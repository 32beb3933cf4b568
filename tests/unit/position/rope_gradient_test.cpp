#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/position/rope.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;

constexpr RopeLayout kLayouts[] = {RopeLayout::interleaved, RopeLayout::half};

/// Five rows of two heads of 13 channels, ten of which turn.
struct Problem {
  explicit Problem(RopeLayout layout) : table(scaled(), layout, 256) {
    positions << 0, 3, -2.5, 1000, 270.25;
    Random random(11);
    x = normal_matrix<double>(random, 5, 26);
    dy = normal_matrix<double>(random, 5, 26);
  }
  static RotaryFrequencies scaled() {
    RotaryFrequencies f = rope_frequencies(10, 100.0);
    f.attention_factor = 1.3;
    return f;
  }
  double loss() const { return rope(x, positions, table, options).cwiseProduct(dy).sum(); }

  RotaryTable<double> table;
  RopeOptions options{.heads = 2, .first_channel = 2};
  Vector<double> positions = Vector<double>(5);
  Matrix<double> x, dy;
};

}  // namespace

TEST_CASE("gradient of x against finite differences") {
  for (const RopeLayout layout : kLayouts) {
    Problem problem(layout);
    Matrix<double> dx(5, 26);
    rope_backward(problem.dy, problem.positions, problem.table, dx, problem.options);
    const GradcheckResult result = gradcheck([&] { return problem.loss(); }, problem.x, dx);
    CHECK_MESSAGE(result.passed, result.message());
  }
}

TEST_CASE("gradient of the positions against finite differences") {
  for (const RopeLayout layout : kLayouts) {
    Problem problem(layout);
    problem.positions << 0, 3, -2.5, 6, 1.25;  // gradcheck's steps grow with the entries
    const Matrix<double> y = rope(problem.x, problem.positions, problem.table, problem.options);
    Vector<double> gradient(5);
    rope_position_backward(y, problem.dy, problem.table, gradient, problem.options);
    // gradcheck moves entries of a matrix; the loss reads the positions from its column.
    Matrix<double> moved = problem.positions;
    const auto loss = [&] {
      problem.positions = moved.col(0);
      return problem.loss();
    };
    const GradcheckResult result = gradcheck(loss, moved, Matrix<double>(gradient));
    CHECK_MESSAGE(result.passed, result.message());
  }
}

TEST_CASE("forward and backward are adjoint in float too") {
  Random random(12);
  for (const RopeLayout layout : kLayouts) {
    const RotaryTable<float> table(rope_frequencies(32), layout);
    const Matrix<float> x = normal_matrix<float>(random, 31, 96),
                        dy = normal_matrix<float>(random, 31, 96);
    Matrix<float> y(31, 96), dx(31, 96);
    rope_forward(x, 4000, table, y, {.heads = 3});
    rope_backward(dy, 4000, table, dx, {.heads = 3});
    const auto dot = [](const Matrix<float>& a, const Matrix<float>& b) {
      return a.cast<double>().cwiseProduct(b.cast<double>()).sum();
    };
    // 2976 products of size 1, each off by about 3e-7 with random sign.
    CHECK(std::abs(dot(y, dy) - dot(x, dx)) <= 3e-7 * 55 * 4);
  }
}

TEST_CASE("position gradient of shared 16-bit activations is summed in double") {
  const RotaryTable<float> table(rope_frequencies(4), RopeLayout::half);
  const Matrix<Eigen::bfloat16> y = Matrix<Eigen::bfloat16>::Ones(2, 4);
  Matrix<Eigen::bfloat16> dy = Matrix<Eigen::bfloat16>::Zero(2, 4);
  dy(1, 2) = Eigen::bfloat16(3.0f);  // b of pair 0, whose frequency is 1
  dy(1, 1) = Eigen::bfloat16(2.0f);  // a of pair 1, frequency 0.01
  Vector<double> gradient = Vector<double>::Constant(2, 7.0);
  rope_position_backward(y, dy, table, gradient, {.heads = 1});
  CHECK(gradient[0] == 0.0);
  CHECK(gradient[1] == doctest::Approx(3.0 - 0.02).epsilon(1e-15));
}

TEST_CASE("rope_position_backward checks its shapes") {
  const RotaryTable<double> table(rope_frequencies(4), RopeLayout::half);
  const Matrix<double> y = Matrix<double>::Ones(2, 8), narrow = Matrix<double>::Ones(2, 4);
  Vector<double> gradient = Vector<double>::Constant(2, 7.0), longer(3);
  CHECK_THROWS_WITH_AS(rope_position_backward(y, narrow, table, gradient, {.heads = 2}),
                       "eigenblocks: dy is 2 x 4, expected 2 x 8 (the shape of y)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_position_backward(y, y, table, longer, {.heads = 2}),
                       "eigenblocks: d_positions has 3 entries, expected 2 (one for each row of y)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_position_backward(y, y, table, gradient, {.heads = 3}),
                       "eigenblocks: heads (3) must divide the columns of y (8)", invalid_argument);
  CHECK(gradient == Vector<double>::Constant(2, 7.0));
}
