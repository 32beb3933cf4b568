// Conversion between the two ways of forming pairs.
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/position/rope.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <string>

namespace {

using namespace eigenblocks;

constexpr RopeLayout kInterleaved = RopeLayout::interleaved, kHalf = RopeLayout::half;

}  // namespace

TEST_CASE("conversion moves channel 2p to p and 2p + 1 to p + R/2, in each head") {
  Matrix<float> x(1, 16), want(1, 16);
  x << 0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17;
  want << 0, 1, 3, 5, 2, 4, 6, 7, 10, 11, 13, 15, 12, 14, 16, 17;
  const RopeOptions options{.heads = 2, .first_channel = 1};
  CHECK(
      rope_convert_layout(x, kInterleaved, kHalf, 4, options) ==
      (Matrix<float>(1, 16) << 0, 1, 3, 2, 4, 5, 6, 7, 10, 11, 13, 12, 14, 15, 16, 17).finished());
  want << 0, 2, 4, 1, 3, 5, 6, 7, 10, 12, 14, 11, 13, 15, 16, 17;
  CHECK(rope_convert_layout(x, kInterleaved, kHalf, 6, {.heads = 2}) == want);
  CHECK(rope_convert_layout(want, kHalf, kInterleaved, 6, {.heads = 2}) == x);
  CHECK(rope_convert_layout(x, kHalf, kHalf, 6, {.heads = 2}) == x);
}

TEST_CASE_TEMPLATE("rotate, then convert = convert, then rotate", S, float, double) {
  Random random(21);
  const RotaryFrequencies f = rope_frequencies(22);
  const RopeOptions options{.heads = 3};
  const Matrix<S> x = normal_matrix<S>(random, 19, 3 * 25);
  const Matrix<S> pairs = rope(x, 700, RotaryTable<S>(f, kInterleaved), options);
  const Matrix<S> halves = rope(rope_convert_layout(x, kInterleaved, kHalf, 22, options), 700,
                                RotaryTable<S>(f, kHalf), options);
  // Packets of the two layouts may contract multiplications and additions differently: one rounding
  // of |x| <= 6.
  const S bound = 8 * std::numeric_limits<S>::epsilon() * S(6);
  CHECK((rope_convert_layout(pairs, kInterleaved, kHalf, 22, options) - halves)
            .cwiseAbs()
            .maxCoeff() <= bound);
}

TEST_CASE("converted weights, biases and gains give converted activations") {
  Random random(22);
  const RopeOptions options{.heads = 2, .first_channel = 1};
  const Matrix<double> x = normal_matrix<double>(random, 3, 5),
                       w = normal_matrix<double>(random, 5, 2 * 9);
  const Vector<double> bias = normal_matrix<double>(random, 1, 18).transpose();
  const Vector<double> gain = normal_matrix<double>(random, 1, 9).transpose();
  const auto project = [&](const Matrix<double>& weights, const Vector<double>& b,
                           const Vector<double>& g) {
    Matrix<double> y = x * weights;
    y.rowwise() += b.transpose();
    for (Index head = 0; head < 2; ++head) {
      y.middleCols(head * 9, 9) = (y.middleCols(head * 9, 9) * g.asDiagonal()).eval();
    }
    return y;
  };
  const Matrix<double> want =
      rope_convert_layout(project(w, bias, gain), kInterleaved, kHalf, 6, options);
  const Matrix<double> got =
      project(rope_convert_layout(w, kInterleaved, kHalf, 6, options),
              rope_convert_layout(bias, kInterleaved, kHalf, 6, options),
              rope_convert_layout(gain, kInterleaved, kHalf, 6, {.heads = 1, .first_channel = 1}));
  // Products with permuted columns may be summed in another order.
  CHECK((got - want).cwiseAbs().maxCoeff() <= 1e-13);
}

TEST_CASE("views and 16-bit storage convert without being touched elsewhere; no rows is valid") {
  Matrix<Eigen::half> wide(2, 7);
  for (Index j = 0; j < 7; ++j) wide.col(j).setConstant(Eigen::half(float(j)));
  Matrix<Eigen::half> out = wide;
  rope_convert_layout(wide.middleCols(1, 4), kInterleaved, kHalf, 4, out.middleCols(1, 4),
                      {.heads = 1});
  CHECK(out.row(1).cast<float>() == (RowVector<float>(7) << 0, 1, 3, 2, 4, 5, 6).finished());
  const Matrix<float> none(0, 8);
  CHECK(rope_convert_layout(none, kInterleaved, kHalf, 4, {.heads = 2}).rows() == 0);
}

TEST_CASE("conversion errors") {
  Matrix<float> x = Matrix<float>::Ones(2, 8), y = x, wrong(2, 4);
  const RopeOptions two{.heads = 2};
  const auto bad = static_cast<RopeLayout>(2);
  CHECK_THROWS_WITH_AS(rope_convert_layout(x, bad, kHalf, 4, y, two),
                       "eigenblocks: from (2) must be interleaved (0) or half (1)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_convert_layout(x, kHalf, bad, 4, y, two),
                       "eigenblocks: to (2) must be interleaved (0) or half (1)", invalid_argument);
  CHECK_THROWS_WITH_AS(rope_convert_layout(x, kInterleaved, kHalf, 3, y, two),
                       "eigenblocks: rotary_dim (3) must be even and at least 2", invalid_argument);
  CHECK_THROWS_WITH_AS(
      rope_convert_layout(x, kInterleaved, kHalf, 6, y, two),
      "eigenblocks: first_channel (0) + rotary_dim (6) must be at most the head size (4)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(rope_convert_layout(x, kInterleaved, kHalf, 4, wrong, two),
                       "eigenblocks: y is 2 x 4, expected 2 x 8 (the shape of x)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_convert_layout(x, kInterleaved, kHalf, 4, x, two),
                       "eigenblocks: y must not be x: the conversion cannot work in place",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_convert_layout(x, kInterleaved, kHalf, 4, y, {}),
                       "eigenblocks: heads (0) must be at least 1", invalid_argument);
}
