#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/position/rope.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using namespace eigenblocks;

constexpr RopeLayout kLayouts[] = {RopeLayout::interleaved, RopeLayout::half};

/// The definition, pair by pair, in double.
Matrix<double> definition(const Matrix<double>& x, const RopePositions& positions,
                          const RotaryFrequencies& f, RopeLayout layout,
                          const RopeOptions& options) {
  Matrix<double> y = x;
  const Index head_dim = x.cols() / options.heads;
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index head = 0; head < options.heads; ++head) {
      for (Index p = 0; p < f.pairs(); ++p) {
        const Index first = head * head_dim + options.first_channel;
        const Index a = first + (layout == RopeLayout::half ? p : 2 * p);
        const Index b = first + (layout == RopeLayout::half ? p + f.pairs() : 2 * p + 1);
        const double angle = positions.real(i) * f.inv_freq[p], factor = f.attention_factor;
        y(i, a) = factor * (x(i, a) * std::cos(angle) - x(i, b) * std::sin(angle));
        y(i, b) = factor * (x(i, a) * std::sin(angle) + x(i, b) * std::cos(angle));
      }
    }
  }
  return y;
}

/// Relative error of a rotation: a rounded row (1.3e-7 or 4.5e-16, see rope_table_test), two
/// products, one sum.
template <class S>
constexpr double kRotation = std::is_same_v<S, float> ? 3e-7 : 1e-15;
/// |entries| of a standard normal sample of this size stay below this.
constexpr double kLargest = 6.0;

bool same_bits(const Matrix<float>& a, const Matrix<float>& b) {
  return a.size() == b.size() &&
         std::memcmp(a.data(), b.data(), sizeof(float) * static_cast<std::size_t>(a.size())) == 0;
}

}  // namespace

TEST_CASE_TEMPLATE("forward and backward follow the definition", S, float, double) {
  Random random(1);
  for (const RopeLayout layout : kLayouts) {
    // Rotary sizes around the packet sizes 2 .. 16 and a large odd number of pairs.
    for (const Index rotary_dim : {2, 4, 6, 14, 16, 30, 34, 64, 122}) {
      for (const Index rows : {0, 1, 7}) {
        for (const Index heads : {1, 3, 9}) {
          for (const Index first : {0, 3}) {
            const RopeOptions options{.heads = heads, .first_channel = first};
            RotaryFrequencies f = rope_frequencies(rotary_dim);
            if (heads == 3) f.attention_factor = 1.2;
            const RotaryTable<S> table(f, layout, 512);
            const Matrix<S> x = normal_matrix<S>(random, rows, heads * (rotary_dim + first + 2));
            Matrix<S> y(rows, x.cols());
            rope_forward(x, 300, table, y, options);
            const Matrix<double> want =
                definition(x.template cast<double>(), 300, f, layout, options);
            REQUIRE((y.template cast<double>() - want).template lpNorm<Eigen::Infinity>() <=
                    2 * kLargest * kRotation<S> + 300 * 1e-15);
            for (Index i = 0; i < rows; ++i) {
              for (Index c = 0; c < x.cols(); ++c) {
                const Index channel = c % (rotary_dim + first + 2);
                if (channel < first || channel >= first + rotary_dim) REQUIRE(y(i, c) == x(i, c));
              }
            }
            // Backward is the rotation by -n.
            rope_backward(x, 300, table, y, options);
            std::vector<double> negative;
            for (Index i = 0; i < rows; ++i) negative.push_back(-300.0 - static_cast<double>(i));
            const Matrix<double> back =
                definition(x.template cast<double>(), negative, f, layout, options);
            REQUIRE((y.template cast<double>() - back).template lpNorm<Eigen::Infinity>() <=
                    2 * kLargest * kRotation<S> + 300 * 1e-15);
          }
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("negative and fractional positions", S, float, double) {
  Random random(2);
  const std::vector<double> positions{-3, 0.5, -1e4 - 0.25, 12345.678, 0, -0.0, 1e-3};
  const RotaryFrequencies f = rope_frequencies(16);
  for (const RopeLayout layout : kLayouts) {
    const Matrix<S> x = normal_matrix<S>(random, 7, 2 * 20);
    const Matrix<S> y = rope(x, positions, RotaryTable<S>(f, layout), {.heads = 2});
    const Matrix<double> want =
        definition(x.template cast<double>(), positions, f, layout, {.heads = 2});
    CHECK((y.template cast<double>() - want).cwiseAbs().maxCoeff() <=
          2 * kLargest * kRotation<S> + 2e4 * 1e-15);
  }
}

TEST_CASE_TEMPLATE(
    "all forms agree bit for bit: in place, views, expressions, chunks, single steps", S, float,
    double) {
  Random random(3);
  const Index rows = 70, heads = 2, cols = heads * 26;
  RotaryFrequencies f = rope_frequencies(22);
  f.attention_factor = 1.1;
  for (const RopeLayout layout : kLayouts) {
    const RotaryTable<S> table(f, layout, 256);  // positions 230 .. 299 leave it in the middle
    const RopeOptions options{.heads = heads, .first_channel = 1};
    const Matrix<S> x = normal_matrix<S>(random, rows, cols);
    Matrix<S> want(rows, cols), back(rows, cols), y = x;
    rope_forward(x, 230, table, want, options);
    rope_backward(x, 230, table, back, options);

    rope_in_place(y, 230, table, options);
    CHECK(y == want);
    y = x;
    rope_forward(y, 230, table, y, options);
    CHECK(y == want);
    y = x;
    rope_backward_in_place(y, 230, table, options);
    CHECK(y == back);
    y = x;
    rope_backward(y, 230, table, y, options);
    CHECK(y == back);
    CHECK(rope(x, 230, table, options) == want);

    // A block of a wider buffer, whose other channels are not touched.
    Matrix<S> wide = Matrix<S>::Constant(rows, cols + 5, S(7)), narrow(rows, cols);
    wide.middleCols(2, cols) = x;
    rope_forward(wide.middleCols(2, cols), 230, table, narrow, options);
    CHECK(narrow == want);
    rope_in_place(wide.middleCols(2, cols), 230, table, options);
    CHECK(wide.middleCols(2, cols) == want);
    CHECK((wide.leftCols(2).array() == S(7)).all());
    CHECK((wide.rightCols(3).array() == S(7)).all());

    // Expressions and column-major matrices are evaluated into the result.
    const Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic> column_major = x;
    CHECK(rope(column_major, 230, table, options) == want);
    CHECK(rope(x * S(2), 230, table, options) == rope(Matrix<S>(x * S(2)), 230, table, options));

    for (const Index chunk : {1, 7, 64}) {
      for (Index i = 0; i < rows; i += chunk) {
        const Index count = std::min(chunk, rows - i);
        rope_forward(x.middleRows(i, count), 230 + i, table, y.middleRows(i, count), options);
      }
      CHECK(y == want);
    }
    RowVector<S> row = x.row(5);
    rope_in_place(row, 235, table, options);
    CHECK(row == want.row(5));
  }
}

TEST_CASE("results do not depend on the executor") {
  Random random(4);
  const Matrix<float> x = normal_matrix<float>(random, 301, 6 * 64);
  for (const RopeLayout layout : kLayouts) {
    const RotaryTable<float> table(rope_frequencies(64), layout, 0);
    Matrix<float> want(301, 384), y(301, 384);
    for (Index i = 0; i < 301; ++i) {
      rope_forward(x.middleRows(i, 1), 1'000'000 + i, table, want.middleRows(i, 1), {.heads = 6});
    }
    CHECK(same_bits(rope(x, 1'000'000, table, {.heads = 6}), want));
    for (const int workers : {1, 2, 7}) {
      thread_pool pool(workers);
      y.setZero();
      rope_forward(x, 1'000'000, table, y, {.heads = 6}, pool);
      CHECK(same_bits(y, want));
    }
  }
}

TEST_CASE("position 0 is the identity, bit for bit, unless there is an attention factor") {
  const float inf = std::numeric_limits<float>::infinity(),
              nan = std::numeric_limits<float>::quiet_NaN();
  Matrix<float> x(2, 8);
  x << -0.0f, -1.0f, 0.0f, -0.0f, inf, nan, 1e-42f, -2.0f, 1.0f, -0.0f, -0.0f, 5.0f, -inf, 3.0f,
      -nan, 0.0f;
  for (const RopeLayout layout : kLayouts) {
    RotaryFrequencies f = rope_frequencies(4);
    const RotaryTable<float> table(f, layout);
    const std::vector<double> zeros{0.0, -0.0};
    Matrix<float> y = Matrix<float>::Constant(2, 8, 7.0f);
    rope_forward(x, zeros, table, y, {.heads = 2});
    CHECK(same_bits(y, x));
    y.setConstant(7.0f);
    rope_backward(x, std::vector<Index>{0, 0}, table, y, {.heads = 2});
    CHECK(same_bits(y, x));
    y = x;
    rope_in_place(y.topRows(1), 0, table, {.heads = 2});
    CHECK(same_bits(y, x));

    f.attention_factor = 2.0;
    const Matrix<float> ones = Matrix<float>::Ones(1, 6);
    Matrix<float> want(1, 6);
    want << 1, 2, 2, 2, 2, 1;
    CHECK(rope(ones, 0, RotaryTable<float>(f, layout), {.heads = 1, .first_channel = 1}) == want);
  }
}

TEST_CASE_TEMPLATE("laws of rotations", S, float, double) {
  Random random(5);
  const double kBound = 20 * kLargest * kRotation<S>;
  const RotaryFrequencies f = rope_frequencies(32);
  const Index heads = 3, cols = heads * 32;
  const RopeOptions options{.heads = heads};
  for (const RopeLayout layout : kLayouts) {
    const RotaryTable<S> table(f, layout, 512);
    const Matrix<S> q = normal_matrix<S>(random, 1, cols), k = normal_matrix<S>(random, 1, cols);
    const auto at = [&](const Matrix<S>& x, Index n) { return rope(x, n, table, options); };
    const auto score = [&](Index m, Index n) -> S { return at(q, m).row(0).dot(at(k, n).row(0)); };
    for (const Index n : {1, 300, 1'000'000, -17}) {
      CAPTURE(n);
      CHECK(std::abs(double(at(q, n).norm()) - double(q.norm())) <= kBound);
      // There and back.
      Matrix<S> back(1, cols);
      rope_backward(at(q, n), n, table, back, options);
      CHECK((back - q).cwiseAbs().maxCoeff() <= S(kBound));
      // R_m R_n = R_(m+n).
      CHECK((at(at(q, n), 45) - at(q, n + 45)).cwiseAbs().maxCoeff() <= S(kBound));
      // Scores depend on the distance only; 96 products of size up to kLargest^2 are summed.
      CHECK(std::abs(double(score(n + 30, n)) - double(score(30, 0))) <= 100 * kLargest * kBound);
    }
    // The score in closed form (half the point of RoPE): sum of (q_a k_a + q_b k_b) cos + (q_a k_b
    // - q_b k_a) sin.
    double want = 0;
    for (Index head = 0; head < heads; ++head) {
      for (Index p = 0; p < 16; ++p) {
        const Index a = head * 32 + (layout == RopeLayout::half ? p : 2 * p);
        const Index b = head * 32 + (layout == RopeLayout::half ? p + 16 : 2 * p + 1);
        const double qa = double(q(0, a)), qb = double(q(0, b)), ka = double(k(0, a)),
                     kb = double(k(0, b));
        const double angle = 30 * f.inv_freq[p];
        want += (qa * ka + qb * kb) * std::cos(angle) + (qa * kb - qb * ka) * std::sin(angle);
      }
    }
    CHECK(std::abs(double(score(1030, 1000)) - want) <= 100 * kLargest * kBound);
  }
}

TEST_CASE_TEMPLATE("16-bit activations: angles in double, arithmetic in float, one rounding", H,
                   Eigen::half, Eigen::bfloat16) {
  Random random(6);
  for (const RopeLayout layout : kLayouts) {
    const RotaryTable<float> table(rope_frequencies(22), layout, 256);
    const RopeOptions options{.heads = 3, .first_channel = 2};
    const Matrix<H> x = normal_matrix<float>(random, 9, 3 * 27).template cast<H>();
    const Matrix<float> wide =
        rope(Matrix<float>(x.template cast<float>()), 100'000, table, options);
    Matrix<H> y(9, 81);
    rope_forward(x, 100'000, table, y, options);
    CHECK(y.template cast<float>() == wide.template cast<H>().template cast<float>());
    Matrix<H> z = x;
    rope_in_place(z, 100'000, table, options);
    CHECK(z.template cast<float>() == y.template cast<float>());
    rope_backward_in_place(z, 100'000, table, options);
    // Two roundings of 2^-9 (bfloat16; half: 2^-12) of values below kLargest.
    CHECK((z.template cast<float>() - x.template cast<float>()).cwiseAbs().maxCoeff() <=
          2 * 6.0f * 0x1p-9f * 1.5f);
  }
}

TEST_CASE("every error names its argument and leaves the output alone") {
  const RotaryTable<float> table(rope_frequencies(8), RopeLayout::half);
  const Matrix<float> x = Matrix<float>::Ones(3, 16);
  Matrix<float> y = Matrix<float>::Constant(3, 16, 7.0f), wrong(2, 16);
  const std::vector<double> two{1, 2};
  const auto refuse = [&](const char* message, const RopeOptions& options) {
    CHECK_THROWS_WITH_AS(rope_forward(x, 0, table, y, options), message, invalid_argument);
  };
  refuse("eigenblocks: heads (0) must be at least 1", {});
  refuse("eigenblocks: heads (3) must divide the columns of x (16)", {.heads = 3});
  refuse("eigenblocks: first_channel (0) + rotary_dim (8) must be at most the head size (4)",
         {.heads = 4});
  refuse("eigenblocks: first_channel (1) + rotary_dim (8) must be at most the head size (8)",
         {.heads = 2, .first_channel = 1});
  refuse("eigenblocks: first_channel (-1) must not be negative", {.heads = 2, .first_channel = -1});
  CHECK_THROWS_WITH_AS(
      rope_forward(x, two, table, y, {.heads = 2}),
      "eigenblocks: positions has 2 entries, expected 3 (one for each row of the input)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(rope_forward(x, 0, table, wrong, {.heads = 2}),
                       "eigenblocks: y is 2 x 16, expected 3 x 16 (the shape of the input)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_in_place(y, two, table, {.heads = 2}),
                       doctest::Contains("positions has 2 entries"), invalid_argument);
  CHECK_THROWS_WITH_AS(rope_backward(x, 0, table, wrong, {.heads = 2}),
                       "eigenblocks: dx is 2 x 16, expected 3 x 16 (the shape of the input)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_backward(x, 0, table, y, {.heads = 5}),
                       "eigenblocks: heads (5) must divide the columns of dy (16)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_backward_in_place(y, two, table, {.heads = 2}),
                       doctest::Contains("positions has 2 entries"), invalid_argument);
  CHECK(y == Matrix<float>::Constant(3, 16, 7.0f));

  // No rows is valid, and is still checked.
  Matrix<float> none(0, 16);
  rope_in_place(none, 0, table, {.heads = 2});
  rope_in_place(none, std::vector<double>{}, table, {.heads = 2});
  CHECK_THROWS_AS(rope_in_place(none, two, table, {.heads = 2}), invalid_argument);
}
