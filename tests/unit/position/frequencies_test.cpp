#include <eigenblocks/position/frequencies.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace eigenblocks;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// cos and sin of n f, right to a few units of long double: f is split so that both partial
/// products are exact.
std::pair<double, double> exact_cos_sin(Index n, double f) {
  const double high = static_cast<double>(static_cast<float>(f)), low = f - high;
  const long double a = static_cast<long double>(n) * static_cast<long double>(high);
  const long double b = static_cast<long double>(n) * static_cast<long double>(low);
  return {static_cast<double>(std::cos(a) * std::cos(b) - std::sin(a) * std::sin(b)),
          static_cast<double>(std::sin(a) * std::cos(b) + std::cos(a) * std::sin(b))};
}

}  // namespace

TEST_CASE("rope_frequencies is the geometric ladder from 1 down to base^(-1 + 2/R)") {
  for (const double base : {2.0, 10000.0, 5e5}) {
    for (const Index rotary_dim : {2, 4, 22, 128}) {
      const RotaryFrequencies f = rope_frequencies(rotary_dim, base);
      REQUIRE(f.pairs() == rotary_dim / 2);
      CHECK(f.rotary_dim() == rotary_dim);
      CHECK(f.attention_factor == 1.0);
      CHECK(f.inv_freq[0] == 1.0);
      for (Index p = 1; p < f.pairs(); ++p) {
        const double step = f.inv_freq[p] / f.inv_freq[p - 1];
        CHECK(step ==
              doctest::Approx(std::exp(-2.0 * std::log(base) / double(rotary_dim))).epsilon(1e-14));
      }
    }
  }
  CHECK(rope_frequencies(4).inv_freq[1] == doctest::Approx(0.01).epsilon(1e-15));
  CHECK(rope_frequencies(4, 1.0).inv_freq[1] ==
        1.0);  // base 1 is odd but sound: all pairs turn alike
}

TEST_CASE("rope_frequencies refuses odd or missing channels and impossible bases") {
  CHECK_THROWS_WITH_AS(rope_frequencies(5),
                       "eigenblocks: rotary_dim (5) must be even and at least 2", invalid_argument);
  CHECK_THROWS_WITH_AS(rope_frequencies(0),
                       "eigenblocks: rotary_dim (0) must be even and at least 2", invalid_argument);
  CHECK_THROWS_WITH_AS(rope_frequencies(-2),
                       "eigenblocks: rotary_dim (-2) must be even and at least 2",
                       invalid_argument);
  for (const double base : {0.0, -1.0, kInfinity, kNaN}) {
    CHECK_THROWS_WITH_AS(rope_frequencies(4, base),
                         doctest::Contains(") must be positive and finite"), invalid_argument);
  }
  CHECK_THROWS_WITH_AS(rope_frequencies(4, -1.0),
                       "eigenblocks: base (-1) must be positive and finite", invalid_argument);
}

TEST_CASE("RopePositions reads runs and lists") {
  const auto reals = [](const RopePositions& positions, Index count) {
    std::vector<double> out;
    for (Index i = 0; i < count; ++i) out.push_back(positions.real(i));
    return out;
  };
  CHECK(reals(7, 3) == std::vector<double>{7, 8, 9});
  CHECK(reals(-1, 3) == std::vector<double>{-1, 0, 1});
  CHECK(RopePositions(7).is_run());

  const std::vector<double> doubles{3, -2.5, 1e9};
  CHECK(reals(doubles, 3) == doubles);
  CHECK(RopePositions(doubles).size() == 3);
  CHECK_FALSE(RopePositions(doubles).is_run());
  CHECK(reals(std::span<const double>(doubles), 3) == doubles);
  const std::vector<Index> integers{3, -2, 1'000'000'007};
  CHECK(reals(integers, 3) == std::vector<double>{3, -2, 1'000'000'007});

  // A column of T x A positions (rope over several axes) is read in place, stride and all.
  Matrix<double> axes(3, 2);
  axes << 1, 10, 2, 20.5, 3, 30;
  CHECK(reals(axes.col(1), 3) == std::vector<double>{10, 20.5, 30});
  CHECK(reals(axes.row(2), 2) == std::vector<double>{3, 30});
  Vector<double> vector(2);
  vector << 4, 5;
  CHECK(reals(vector, 2) == std::vector<double>{4, 5});
  static_assert(!std::is_constructible_v<RopePositions, double>,
                "a real first position would be cut");
  static_assert(!std::is_constructible_v<RopePositions, std::vector<float>>, "floats end at 2^24");
}

TEST_CASE("RopePositions tells integers from what is not one") {
  const std::vector<double> list{5, -300, 2.5, 0x1p53, -0.0, kInfinity, kNaN, 0x1p53 - 1};
  const RopePositions positions(list);
  Index n = -1;
  CHECK(positions.integer(0, n));
  CHECK(n == 5);
  CHECK(positions.integer(1, n));
  CHECK(n == -300);
  CHECK(positions.integer(4, n));
  CHECK(n == 0);
  CHECK(positions.integer(7, n));
  CHECK(n == 9007199254740991);
  for (const Index i : {2, 3, 5, 6}) CHECK_FALSE(positions.integer(i, n));
  CHECK(RopePositions(10).integer(3, n));
  CHECK(n == 13);
}

TEST_CASE("rope_cos_sin is exact in double at every position") {
  // cos and sin of the rounded angle, the correction and its sum round by at most half a unit in
  // the last place each.
  constexpr double kBound = 2 * 2.2204e-16;
  const RotaryFrequencies f = rope_frequencies(32);
  const std::vector<Index> n{0,         1,          -1,         255,           4096,
                             1'000'000, 10'000'000, 16'777'217, 1'000'000'007, 9'999'999'967};
  Matrix<double> cos(10, 16), sin(10, 16);
  rope_cos_sin(n, f, cos, sin);
  double naive = 0;
  for (Index i = 0; i < 10; ++i) {
    for (Index p = 0; p < 16; ++p) {
      const auto [c, s] = exact_cos_sin(n[static_cast<std::size_t>(i)], f.inv_freq[p]);
      CHECK(std::abs(cos(i, p) - c) <= kBound);
      CHECK(std::abs(sin(i, p) - s) <= kBound);
      const double angle = static_cast<double>(n[static_cast<std::size_t>(i)]) * f.inv_freq[p];
      naive = std::max(naive, std::abs(std::cos(angle) - c));
    }
  }
  CHECK(naive > 1e-8);  // what leaving out the rounding error of n f would cost
}

TEST_CASE(
    "rope_cos_sin rounds once in float, applies the attention factor and takes real positions") {
  RotaryFrequencies f = rope_frequencies(6, 500.0);
  f.attention_factor = 1.25;
  const std::vector<double> n{0.5, -7.25, 3e6};
  Matrix<double> cos(3, 3), sin(3, 3);
  Matrix<float> cos_float(3, 3), sin_float(3, 3);
  rope_cos_sin(n, f, cos, sin);
  rope_cos_sin(n, f, cos_float, sin_float);
  for (Index i = 0; i < 3; ++i) {
    for (Index p = 0; p < 3; ++p) {
      const double angle = n[static_cast<std::size_t>(i)] * f.inv_freq[p];
      // The angle of this line is rounded: 3e6 times 2^-53 at most.
      CHECK(std::abs(cos(i, p) - 1.25 * std::cos(angle)) <= 1e-9);
      CHECK(std::abs(sin(i, p) - 1.25 * std::sin(angle)) <= 1e-9);
      CHECK(cos_float(i, p) == static_cast<float>(cos(i, p)));
      CHECK(sin_float(i, p) == static_cast<float>(sin(i, p)));
    }
  }
  Matrix<double> none_cos(0, 3), none_sin(0, 3);
  rope_cos_sin(std::vector<double>{}, f, none_cos, none_sin);
}

TEST_CASE("rope_cos_sin checks shapes and frequencies") {
  const RotaryFrequencies f = rope_frequencies(6);
  Matrix<double> cos = Matrix<double>::Constant(2, 3, 7), sin = cos, wrong(2, 4), short_(1, 3);
  CHECK_THROWS_WITH_AS(rope_cos_sin(0, f, wrong, sin),
                       "eigenblocks: cos is 2 x 4, expected 2 x 3 (cols = rotary_dim / 2)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_cos_sin(0, f, cos, short_),
                       "eigenblocks: sin is 1 x 3, expected 2 x 3 (rows of cos x rotary_dim / 2)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_cos_sin(std::vector<double>{1, 2, 3}, f, cos, sin),
                       "eigenblocks: positions has 3 entries, expected 2 (one for each row of cos)",
                       invalid_argument);
  const RotaryFrequencies empty;
  CHECK_THROWS_WITH_AS(
      rope_cos_sin(0, empty, cos, sin),
      "eigenblocks: inv_freq has 0 entries, expected at least 1 (half of the rotated channels)",
      invalid_argument);
  RotaryFrequencies bad = f;
  bad.inv_freq[1] = kNaN;
  CHECK_THROWS_WITH_AS(rope_cos_sin(0, bad, cos, sin),
                       "eigenblocks: inv_freq[1] (nan) must be finite", invalid_argument);
  for (const double factor : {0.0, -1.0, kInfinity, kNaN}) {
    bad = f;
    bad.attention_factor = factor;
    CHECK_THROWS_WITH_AS(rope_cos_sin(0, bad, cos, sin), doctest::Contains("attention_factor ("),
                         invalid_argument);
  }
  CHECK(cos == Matrix<double>::Constant(2, 3, 7));  // nothing was written
  CHECK(sin == cos);
}
