#include <eigenblocks/position/base_bound.hpp>
#include <eigenblocks/position/frequency_scaling.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <complex>
#include <limits>
#include <optional>
#include <vector>

namespace {

using namespace eigenblocks;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double direct(const RotaryFrequencies& f, Index m) {
  long double sum = 0;
  for (const double x : f.inv_freq) {
    sum += std::cos(static_cast<long double>(m) * static_cast<long double>(x));
  }
  return static_cast<double>(sum);
}

std::optional<Index> direct_first_negative(const RotaryFrequencies& f, Index length) {
  for (Index m = 0; m < length; ++m) {
    if (direct(f, m) < 0) return m;
  }
  return std::nullopt;
}

/// The search as the post has it, nothing skipped.
std::optional<double> direct_min_base(Index length, Index dim, int levels, double start) {
  double best = start;
  Index parts = 1;
  for (int level = 1; level <= levels; ++level) {
    parts *= 10;
    Index j = 1;
    double base = 0;
    for (; j <= parts; ++j) {
      base = best * (double(j) / double(parts));
      if (!direct_first_negative(rope_frequencies(dim, base), length)) break;
    }
    if (j > parts) return std::nullopt;
    best = base;
  }
  return best;
}

}  // namespace

TEST_CASE("rope_decay_curve: the sum of cosines and the bound of partial sums") {
  for (const Index dim : {2, 10, 128}) {
    const RotaryFrequencies f = rope_frequencies(dim);
    const Vector<double> sum = rope_decay_curve(f, 40);
    const Vector<double> abel = rope_decay_curve(f, 40, RopeDecay::abel);
    REQUIRE(sum.size() == 40);
    for (Index m = 0; m < 40; ++m) {
      CHECK(sum[m] == doctest::Approx(direct(f, m)).epsilon(1e-13));
      double want = 0;
      std::complex<double> partial = 0;
      for (const double x : f.inv_freq) {
        partial += std::polar(1.0, double(m) * x);
        want += std::abs(partial);
      }
      CHECK(abel[m] == doctest::Approx(2.0 / double(dim) * want).epsilon(1e-13));
    }
    CHECK(sum[0] == double(dim / 2));
    CHECK(abel[0] == double(dim / 2 + 1) / 2);  // the mean of 1 .. dim/2
  }
}

TEST_CASE("rope_decay_curve: the values of the base-bound paper") {
  const std::vector<Index> at{1, 16, 256, 4096, 32768};
  const std::vector<double> base_1e4{.97021, .62034, .3207, -.05285, .05646};
  const std::vector<double> base_5e5{.97791, .72951, .55952, .38275, .20974};
  const Vector<double> a = rope_decay_curve(rope_frequencies(128, 1e4), 32769) / 64;
  const Vector<double> b = rope_decay_curve(rope_frequencies(128, 5e5), 32769) / 64;
  for (std::size_t i = 0; i < at.size(); ++i) {
    CHECK(std::abs(a[at[i]] - base_1e4[i]) <= 5.01e-6);
    CHECK(std::abs(b[at[i]] - base_5e5[i]) <= 5.01e-6);
  }
}

TEST_CASE("rope_max_context: the first negative sum") {
  CHECK(rope_max_context(rope_frequencies(128, 1e4), 8192) == 1707);
  CHECK(rope_max_context(rope_frequencies(128, 5e5), 40000) == 18438);
  CHECK(rope_max_context(rope_frequencies(128, 1e6), 40000) == 27115);
  // The end is not included, and the sound part ends where the first negative stands.
  CHECK(rope_max_context(rope_frequencies(128, 1e4), 1708) == 1707);
  CHECK_FALSE(rope_max_context(rope_frequencies(128, 1e4), 1707).has_value());
  CHECK_FALSE(rope_max_context(rope_frequencies(2), 1).has_value());
  CHECK(rope_max_context(rope_frequencies(2), 3) == 2);  // cos 2 < 0
  for (const Index dim : {2, 4, 6, 18, 64}) {
    for (const double base : {1.0, 3.0, 50.0, 900.0, 1e4}) {
      const RotaryFrequencies f = rope_frequencies(dim, base);
      CHECK(rope_max_context(f, 3000) == direct_first_negative(f, 3000));
    }
  }
}

TEST_CASE("rope_max_context decides by the exact sum, however close to 0") {
  // f(m) = cos(m x) + cos(m y) is 0 up to the rounding of x and y at m = 3000, where both signs occur.
  for (const double sign : {-1.0, 1.0}) {
    RotaryFrequencies f{.inv_freq = Vector<double>(2)};
    f.inv_freq << 1e-5, (3.14159265358979323846 - 0.03 + sign * 1e-12) / 3000;
    CHECK(rope_max_context(f, 3001) == direct_first_negative(f, 3001));
    CHECK(rope_max_context(f, 3001).has_value() == (sign > 0));
  }
}

TEST_CASE("rope_max_context: interpolation by k reaches k times as far") {
  for (const double k : {2.0, 4.0, 16.0}) {
    const Index plain = *rope_max_context(rope_frequencies(64, 3000.0), 10000);
    const Index scaled = *rope_max_context(linear_frequencies(64, 3000.0, {.factor = k}), 200000);
    CHECK(scaled <= static_cast<Index>(k) * plain);
    CHECK(scaled > static_cast<Index>(k) * (plain - 1));
  }
}

TEST_CASE("rope_max_context: with at least half of the channels at rest no base fails") {
  for (const double base : {1.5, 40.0, 1e4}) {
    for (const Index rotary_dim : {8, 16, 32}) {
      const auto f = proportional_frequencies(64, base, {.rotary_dim = rotary_dim});
      CHECK_FALSE(rope_max_context(f, 5000).has_value());
      CHECK(rope_decay_curve(f, 5000).minCoeff() >= 0);
    }
  }
  // More than half is not enough.
  CHECK(rope_max_context(proportional_frequencies(64, 1.5, {.rotary_dim = 48}), 5000).has_value());
}

TEST_CASE("rope_min_base: the table of head size 128") {
  struct Row {
    Index length;
    double base;
  };
  for (const Row row : {Row{1024, 4293.45}, Row{2048, 11587.4}, Row{4096, 26952.6},
                        Row{8192, 83764.2}, Row{16384, 231645}}) {
    const std::optional<double> base = rope_min_base(row.length, 128);
    REQUIRE(base.has_value());
    CHECK(*base == doctest::Approx(row.base).epsilon(5e-6));
    CHECK_FALSE(rope_max_context(rope_frequencies(128, *base), row.length).has_value());
    CHECK(*base > 1.6 * double(row.length));  // the estimate for infinite head size
  }
}

TEST_CASE("rope_min_base: equal to the search that skips nothing") {
  for (const Index dim : {6, 32}) {
    for (const Index length : {1, 2, 7, 40, 100}) {
      for (const double start : {3.0, 1e3, 1e5}) {
        CAPTURE(dim);
        CAPTURE(length);
        CAPTURE(start);
        const auto want = direct_min_base(length, dim, 3, start);
        CHECK(rope_min_base(length, dim, {.levels = 3, .start = start}) == want);
      }
    }
  }
  CHECK(rope_min_base(150, 32, {.levels = 2}) ==
        rope_min_base(150, 32, {.levels = 2, .start = 150000.0}));
  // cos m: every base alike, and good up to m = 1.
  CHECK(rope_min_base(2, 2, {.levels = 2, .start = 10.0}) == doctest::Approx(0.01));
}

TEST_CASE("rope_min_base: no good base in the first level is no value") {
  CHECK_FALSE(rope_min_base(3, 2).has_value());  // cos 2 < 0 whatever the base
  CHECK_FALSE(rope_min_base(4096, 128, {.start = 2000.0}).has_value());
}

TEST_CASE("rope_min_base takes any ladder") {
  const auto interpolated = [](double base) { return linear_frequencies(64, base, {.factor = 4}); };
  const RopeMinBaseOptions options{.levels = 3, .start = 1e5};
  const std::optional<double> plain = rope_min_base(256, 64, options);
  // f(m/4) >= 0 on m < 1021 includes all of f(m) >= 0 on m < 256.
  const std::optional<double> base = rope_min_base(1021, interpolated, options);
  REQUIRE(plain.has_value());
  REQUIRE(base.has_value());
  CHECK(*base >= *plain);
  CHECK_FALSE(rope_max_context(interpolated(*base), 1021).has_value());
}

TEST_CASE("base bounds: bad input") {
  const RotaryFrequencies f = rope_frequencies(8);
  RotaryFrequencies bad = f;
  bad.inv_freq[2] = kNaN;
  CHECK_THROWS_WITH_AS(rope_decay_curve(f, 0), "eigenblocks: length (0) must be at least 1",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_max_context(f, 0), "eigenblocks: max_length (0) must be at least 1",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_decay_curve(bad, 4), doctest::Contains("inv_freq[2]"),
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_max_context(bad, 4), doctest::Contains("inv_freq[2]"),
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_min_base(4, [&](double) { return bad; }),
                       doctest::Contains("inv_freq[2]"), invalid_argument);
  CHECK_THROWS_AS(rope_decay_curve(RotaryFrequencies{}, 4), invalid_argument);
  CHECK_THROWS_WITH_AS(rope_min_base(0, 8), "eigenblocks: length (0) must be at least 1",
                       invalid_argument);
  for (const int levels : {0, 7, -1}) {
    CHECK_THROWS_WITH_AS(rope_min_base(8, 8, {.levels = levels}),
                         doctest::Contains(") must be in 1 .. 6"), invalid_argument);
  }
  for (const double start : {0.0, -1.0, kInfinity, kNaN}) {
    CHECK_THROWS_WITH_AS(rope_min_base(8, 8, {.start = start}),
                         doctest::Contains(") must be positive and finite"), invalid_argument);
  }
  for (const Index dim : {0, 7, -2}) {
    CHECK_THROWS_WITH_AS(rope_min_base(8, dim), doctest::Contains("rotary_dim ("),
                         invalid_argument);
  }
}
