#include <eigenblocks/position/frequency_scaling.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;
using Real = long double;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr Real kTwoPi = 2 * std::numbers::pi_v<Real>;

/// base^(-2p/R) in long double, base and all.
Real ladder(Real base, Index p, Index rotary_dim) {
  return std::exp(-std::log(base) * Real(2 * p) / Real(rotary_dim));
}

Real clamp01(Real x) { return std::min(Real(1), std::max(Real(0), x)); }

/// Every frequency against `formula(p)`, to a few roundings.
void check_frequencies(const RotaryFrequencies& got, Index rotary_dim,
                       const std::function<Real(Index)>& formula) {
  REQUIRE(got.pairs() == rotary_dim / 2);
  for (Index p = 0; p < got.pairs(); ++p) {
    const double want = static_cast<double>(formula(p));
    CAPTURE(p);
    CHECK(std::abs(got.inv_freq[p] - want) <= 2e-14 * want);
  }
}

void check_plain_factors(const RotaryFrequencies& got) {
  CHECK(got.attention_factor == 1.0);
  CHECK(got.softmax_factor == 1.0);
}

/// The methods whose results lie between f/k and f, by name.
struct Method {
  std::string name;
  std::function<RotaryFrequencies(Index, double, double)> build;  // rotary_dim, base, factor
};

std::vector<Method> bounded_methods() {
  return {
      {"linear",
       [](Index r, double b, double k) { return linear_frequencies(r, b, {.factor = k}); }},
      {"ntk_aware",
       [](Index r, double b, double k) { return ntk_aware_frequencies(r, b, {.factor = k}); }},
      {"ntk_radix",
       [](Index r, double b, double k) { return ntk_radix_frequencies(r, b, {.factor = k}); }},
      {"ntk_fixed",
       [](Index r, double b, double k) { return ntk_fixed_frequencies(r, b, {.factor = k}); }},
      {"ntk_mixed",
       [](Index r, double b, double k) { return ntk_mixed_frequencies(r, b, {.factor = k}); }},
      {"dynamic_ntk",
       [](Index r, double b, double k) {
         return dynamic_ntk_frequencies(
             r, b, {.factor = k, .original_max_position = 1000, .seq_len = 1300});
       }},
      {"ntk_by_parts",
       [](Index r, double b, double k) {
         return ntk_by_parts_frequencies(r, b, {.factor = k, .original_max_position = 4096});
       }},
      {"yarn",
       [](Index r, double b, double k) {
         return yarn_frequencies(r, b, {.factor = k, .original_max_position = 4096});
       }},
      {"llama3",
       [](Index r, double b, double k) { return llama3_frequencies(r, b, {.factor = k}); }},
  };
}

}  // namespace

TEST_CASE("frequency scaling: factor 1 is the plain ladder to the bit") {
  for (const Index rotary_dim : {4, 22, 128}) {
    for (const double base : {7.0, 10000.0, 5e5}) {
      const Vector<double> plain = rope_frequencies(rotary_dim, base).inv_freq;
      for (const Method& method : bounded_methods()) {
        if (method.name == "dynamic_ntk") continue;  // below: it depends on the length as well
        CAPTURE(method.name);
        const RotaryFrequencies f = method.build(rotary_dim, base, 1.0);
        CHECK(f.inv_freq == plain);
        check_plain_factors(f);
      }
      const Vector<double> ones = Vector<double>::Ones(rotary_dim / 2);
      const RotaryFrequencies longrope = longrope_frequencies(
          rotary_dim, base,
          {.original_max_position = 64, .seq_len = 99, .short_factor = ones, .long_factor = ones});
      CHECK(longrope.inv_freq == plain);
      check_plain_factors(longrope);
      CHECK(proportional_frequencies(rotary_dim, base, {.rotary_dim = rotary_dim}).inv_freq ==
            plain);
      for (const Index seq_len : {0, 1, 64}) {
        CHECK(
            dynamic_ntk_frequencies(
                rotary_dim, base, {.factor = 3.3, .original_max_position = 64, .seq_len = seq_len})
                .inv_freq == plain);
      }
    }
  }
}

TEST_CASE("frequency scaling: results fall with p and stay between f/k and f") {
  for (const Index rotary_dim : {4, 22, 64, 128}) {
    for (const double base : {100.0, 10000.0, 5e5}) {
      const Vector<double> plain = rope_frequencies(rotary_dim, base).inv_freq;
      for (const double k : {1.5, 8.0, 64.0}) {
        for (const Method& method : bounded_methods()) {
          CAPTURE(method.name);
          CAPTURE(k);
          const Vector<double> f = method.build(rotary_dim, base, k).inv_freq;
          for (Index p = 0; p < f.size(); ++p) {
            CHECK(f[p] <= plain[p] * (1 + 1e-14));
            CHECK(f[p] >= plain[p] / k * (1 - 1e-14));
            if (p > 0) CHECK(f[p] < f[p - 1]);
          }
        }
      }
    }
  }
}

TEST_CASE("linear, ntk_aware, ntk_radix, ntk_fixed, ntk_mixed against their formulas") {
  for (const Index r : {4, 22, 128}) {
    for (const double base : {10.0, 10000.0, 5e5}) {
      for (const double k : {1.25, 8.0, 1000.0}) {
        const Real b = Real(base), n = Real(r), kk = Real(k);
        const RopeScalingOptions options{.factor = k};
        check_frequencies(linear_frequencies(r, base, options), r,
                          [&](Index p) { return ladder(b, p, r) / kk; });
        check_frequencies(ntk_aware_frequencies(r, base, options), r, [&](Index p) {
          return ladder(b, p, r) * std::pow(kk, -Real(2 * p) / (n - 2));
        });
        check_frequencies(ntk_radix_frequencies(r, base, options), r,
                          [&](Index p) { return ladder(b * kk, p, r); });
        check_frequencies(ntk_fixed_frequencies(r, base, options), r,
                          [&](Index p) { return ladder(b * kk, p, r) / std::pow(kk, 2 / n); });
        for (const double e : {0.625, 0.75}) {
          check_frequencies(
              ntk_mixed_frequencies(r, base, {.factor = k, .exponent = e}), r, [&](Index p) {
                const Real a = std::log(kk) / std::pow(n / 2, Real(e));
                return ladder(b, p, r) * std::exp(-a * std::pow(Real(p + 1), Real(e)));
              });
        }
      }
    }
  }
  // Defaults: the post's exponent.
  CHECK(ntk_mixed_frequencies(64, 1e4, {.factor = 8}).inv_freq ==
        ntk_mixed_frequencies(64, 1e4, {.factor = 8, .exponent = 0.625}).inv_freq);
}

TEST_CASE("the NTK methods meet at their limits") {
  const Index r = 64;
  const RotaryFrequencies plain = rope_frequencies(r);
  const auto near = [](const Vector<double>& a, const Vector<double>& b) {
    return ((a - b).array().abs() <= 1e-14 * b.array()).all();
  };
  const Vector<double> aware = ntk_aware_frequencies(r, 1e4, {.factor = 8}).inv_freq;
  CHECK(aware[0] == 1.0);
  CHECK(aware[31] == doctest::Approx(plain.inv_freq[31] / 8).epsilon(1e-14));
  CHECK(ntk_fixed_frequencies(r, 1e4, {.factor = 8}).inv_freq[31] ==
        doctest::Approx(plain.inv_freq[31] / 8).epsilon(1e-14));
  CHECK(near(ntk_mixed_frequencies(r, 1e4, {.factor = 8, .exponent = 1}).inv_freq,
             ntk_fixed_frequencies(r, 1e4, {.factor = 8}).inv_freq));
  CHECK(near(ntk_mixed_frequencies(r, 1e4, {.factor = 8, .exponent = 0}).inv_freq,
             linear_frequencies(r, 1e4, {.factor = 8}).inv_freq));
  // At twice the trained length dynamic_ntk is ntk_aware with k + 1.
  CHECK(near(
      dynamic_ntk_frequencies(r, 1e4, {.factor = 3, .original_max_position = 512, .seq_len = 1024})
          .inv_freq,
      ntk_aware_frequencies(r, 1e4, {.factor = 4}).inv_freq));
}

TEST_CASE("linear: position n turns as n/k did, and k below 1 is allowed") {
  const std::vector<double> n{0, 3, 1000}, stretched{0, 12, 4000};
  const RotaryFrequencies plain = rope_frequencies(6);
  Matrix<double> c(3, 3), s(3, 3), c2(3, 3), s2(3, 3);
  rope_cos_sin(n, plain, c, s);
  rope_cos_sin(stretched, linear_frequencies(6, 1e4, {.factor = 4}), c2, s2);
  CHECK(c == c2);
  CHECK(s == s2);
  rope_cos_sin(n, linear_frequencies(6, 1e4, {.factor = 0.25}), c2, s2);
  rope_cos_sin(stretched, plain, c, s);
  CHECK(c == c2);
}

TEST_CASE("dynamic_ntk against its formula") {
  for (const Index seq_len : {2049, 5000, 1'000'000}) {
    const Real growth = Real(2) * Real(seq_len) / 2048 - 1;
    check_frequencies(
        dynamic_ntk_frequencies(64, 1e4,
                                {.factor = 2, .original_max_position = 2048, .seq_len = seq_len}),
        64, [&](Index p) { return ladder(1e4L * std::pow(growth, Real(64) / 62), p, 64); });
  }
}

TEST_CASE("ntk_by_parts and llama3 against their formulas") {
  for (const Index r : {22, 128}) {
    for (const double k : {2.0, 16.0}) {
      check_frequencies(
          ntk_by_parts_frequencies(r, 1e4, {.factor = k, .original_max_position = 4096}), r,
          [&](Index p) {
            const Real f = ladder(1e4L, p, r), g = clamp01((4096 * f / kTwoPi - 1) / 31);
            return (1 - g) * f / Real(k) + g * f;
          });
      check_frequencies(llama3_frequencies(r, 5e5, {.factor = k}), r,
                        [&](Index p) {  // as transformers has it
                          const Real f = ladder(5e5L, p, r), w = kTwoPi / f;
                          if (w < 8192.0L / 4) return f;
                          if (w > 8192.0L / 1) return f / Real(k);
                          const Real s = (8192 / w - 1) / (4 - 1);
                          return (1 - s) * f / Real(k) + s * f;
                        });
    }
  }
  const RotaryFrequencies f = rope_frequencies(128);
  const auto parts = ntk_by_parts_frequencies(
      128, 1e4, {.factor = 16, .original_max_position = 4096, .beta_fast = 8, .beta_slow = 2});
  check_plain_factors(parts);
  for (Index p = 0; p < 64; ++p) {
    const double turns = 4096 * f.inv_freq[p] / static_cast<double>(kTwoPi);
    if (turns > 8.001) CHECK(parts.inv_freq[p] == f.inv_freq[p]);
    if (turns < 1.999) CHECK(parts.inv_freq[p] == f.inv_freq[p] / 16);
    if (turns > 2.001 && turns < 7.999) CHECK(parts.inv_freq[p] != f.inv_freq[p]);
  }
  // Equal betas: a step.
  const auto step = ntk_by_parts_frequencies(
      128, 1e4, {.factor = 16, .original_max_position = 4096, .beta_fast = 5, .beta_slow = 5});
  for (Index p = 0; p < 64; ++p) {
    const bool fast = 4096 * f.inv_freq[p] / static_cast<double>(kTwoPi) >= 5;
    CHECK(step.inv_freq[p] == (fast ? f.inv_freq[p] : f.inv_freq[p] / 16));
  }
  // Llama 3.1's numbers are the defaults.
  CHECK(
      llama3_frequencies(128, 5e5).inv_freq ==
      llama3_frequencies(
          128, 5e5,
          {.factor = 8, .original_max_position = 8192, .low_freq_factor = 1, .high_freq_factor = 4})
          .inv_freq);
}

TEST_CASE("yarn: the ramp of the official code") {
  for (const bool truncate : {true, false}) {
    for (const double k : {4.0, 40.0}) {
      const auto turns_at = [](Real rotations) {
        return 128 * std::log(4096 / (rotations * kTwoPi)) / (2 * std::log(1e4L));
      };
      Real low = turns_at(32), high = turns_at(1);
      if (truncate) low = std::floor(low), high = std::ceil(high);
      const auto f = yarn_frequencies(
          128, 1e4, {.factor = k, .original_max_position = 4096, .truncate = truncate});
      check_frequencies(f, 128, [&](Index p) {
        const Real plain = ladder(1e4L, p, 128), ramp = clamp01((Real(p) - low) / (high - low));
        return plain / Real(k) * ramp + plain * (1 - ramp);
      });
      CHECK(f.attention_factor == doctest::Approx(0.1 * std::log(k) + 1).epsilon(1e-15));
      CHECK(f.softmax_factor == 1.0);
    }
  }
}

TEST_CASE("yarn is not the formula printed in its paper") {
  const auto code =
      yarn_frequencies(128, 1e4, {.factor = 16, .original_max_position = 4096}).inv_freq;
  const auto printed =
      ntk_by_parts_frequencies(128, 1e4, {.factor = 16, .original_max_position = 4096}).inv_freq;
  Index worst = 0;
  (code.array() / printed.array()).maxCoeff(&worst);
  CHECK(worst == 38);
  CHECK(code[38] / printed[38] == doctest::Approx(3.04).epsilon(0.002));
}

TEST_CASE("yarn: ends of the ramp that meet, or leave the pairs") {
  const Vector<double> plain = rope_frequencies(16, 100.0).inv_freq;
  // Equal ends at a whole pair: a step after it.
  const double length = 2 * std::numbers::pi * 100;  // the pair of 1 rotation is 8 ln 100 / ln 100
  const auto at = [&](double betas) {
    return yarn_frequencies(16, 100.0,
                            {.factor = 4,
                             .original_max_position = static_cast<Index>(length),
                             .beta_fast = betas,
                             .beta_slow = betas,
                             .truncate = false});
  };
  const double low = 16 * std::log(628 / (2 * std::numbers::pi * 20)) / (2 * std::log(100.0));
  const Vector<double> step = at(20).inv_freq;
  for (Index p = 0; p < 8; ++p) {
    CHECK(step[p] == (static_cast<double>(p) > low ? plain[p] / 4 : plain[p]));
  }
  // Whole ends, both at pair 0 (6 positions are just short of one turn): a step after it.
  const auto zero = yarn_frequencies(16, 100.0, {.factor = 4, .original_max_position = 6});
  for (Index p = 0; p < 8; ++p) CHECK(zero.inv_freq[p] == (p > 0 ? plain[p] / 4 : plain[p]));
  // beta_slow so small that the ramp would end beyond channel R - 1: it ends there.
  const auto slow = yarn_frequencies(
      16, 100.0, {.factor = 4, .original_max_position = 628, .beta_fast = 20, .beta_slow = 1e-9});
  const Real first = std::floor(Real(low));
  check_frequencies(slow, 16, [&](Index p) {
    const Real f = ladder(100, p, 16), ramp = clamp01((Real(p) - first) / (15 - first));
    return f / 4 * ramp + f * (1 - ramp);
  });
  // beta_fast so large that the ramp would begin before pair 0: it begins there.
  const auto fast = yarn_frequencies(
      16, 100.0, {.factor = 4, .original_max_position = 628, .beta_fast = 1e9, .beta_slow = 20});
  check_frequencies(fast, 16, [&](Index p) {
    const Real f = ladder(100, p, 16), ramp = clamp01(Real(p) / std::ceil(Real(low)));
    return f / 4 * ramp + f * (1 - ramp);
  });
}

TEST_CASE("yarn: attention factor and soft-max factor") {
  YarnOptions options{.factor = 40, .original_max_position = 4096};
  const auto factors = [&] { return yarn_frequencies(64, 1e4, options); };
  const double ln = std::log(40.0);
  options.mscale = 0.707;  // alone it says nothing
  CHECK(factors().attention_factor == doctest::Approx(0.1 * ln + 1).epsilon(1e-15));
  CHECK(factors().softmax_factor == 1.0);
  options.mscale_all_dim = 0.9;
  CHECK(factors().attention_factor ==
        doctest::Approx((0.0707 * ln + 1) / (0.09 * ln + 1)).epsilon(1e-15));
  CHECK(factors().softmax_factor == doctest::Approx(std::pow(0.09 * ln + 1, 2)).epsilon(1e-15));
  options.mscale = 0;  // all_dim alone: no quotient, but DeepSeek's soft-max factor
  CHECK(factors().attention_factor == doctest::Approx(0.1 * ln + 1).epsilon(1e-15));
  CHECK(factors().softmax_factor == doctest::Approx(std::pow(0.09 * ln + 1, 2)).epsilon(1e-15));
  options.mscale = options.mscale_all_dim = 1.0;  // DeepSeek-V3: cos and sin stay as they are
  CHECK(factors().attention_factor == 1.0);
  options.attention_factor = 1.75;
  CHECK(factors().attention_factor == 1.75);
  options.factor = 1;
  options.attention_factor.reset();
  check_plain_factors(factors());
}

TEST_CASE("longrope divides by the factors of the current length") {
  LongRopeOptions options{.factor = 32, .original_max_position = 4096};
  options.short_factor = Vector<double>::LinSpaced(8, 1.0, 1.5);
  options.long_factor = Vector<double>::LinSpaced(8, 1.0, 64.0);
  const Vector<double> plain = rope_frequencies(16).inv_freq;
  for (const Index seq_len : {0, 4096, 4097, 131072}) {
    options.seq_len = seq_len;
    const RotaryFrequencies f = longrope_frequencies(16, 1e4, options);
    const Vector<double>& by = seq_len > 4096 ? options.long_factor : options.short_factor;
    for (Index p = 0; p < 8; ++p) CHECK(f.inv_freq[p] == plain[p] / by[p]);
    CHECK(f.attention_factor ==
          doctest::Approx(std::sqrt(1 + std::log(32.0) / std::log(4096.0))).epsilon(1e-15));
    CHECK(f.softmax_factor == 1.0);
  }
  options.attention_factor = 1.19;
  options.original_max_position = 1;  // no logarithm is asked for
  CHECK(longrope_frequencies(16, 1e4, options).attention_factor == 1.19);
  options.attention_factor.reset();
  CHECK_THROWS_WITH_AS(longrope_frequencies(16, 1e4, options),
                       "eigenblocks: original_max_position (1) must be at least 2",
                       invalid_argument);
  options.factor = 1;
  CHECK(longrope_frequencies(16, 1e4, options).attention_factor == 1.0);
}

TEST_CASE("proportional leaves the last pairs at rest; partial_rotary_dim counts channels") {
  const RotaryFrequencies f = proportional_frequencies(64, 1e6, {.rotary_dim = 16, .factor = 2});
  check_plain_factors(f);
  REQUIRE(f.pairs() == 32);
  for (Index p = 0; p < 8; ++p) {
    CHECK(f.inv_freq[p] ==
          doctest::Approx(static_cast<double>(ladder(1e6L, p, 64)) / 2).epsilon(1e-14));
  }
  CHECK(f.inv_freq.tail(24) == Vector<double>::Zero(24));
  CHECK(partial_rotary_dim(64, 0.25) == 16);
  CHECK(partial_rotary_dim(80, 0.4) == 32);
  CHECK(partial_rotary_dim(96, 1.0) == 96);
  CHECK(partial_rotary_dim(10, 0.29) == 2);
}

TEST_CASE("frequency scaling: bad input") {
  for (const double k : {0.0, 0.999, -2.0, kInfinity, kNaN}) {
    for (const Method& method : bounded_methods()) {
      if (method.name == "linear" && k == 0.999) continue;
      CAPTURE(method.name);
      CHECK_THROWS_WITH_AS(method.build(8, 1e4, k), doctest::Contains("factor ("),
                           invalid_argument);
    }
  }
  CHECK_THROWS_WITH_AS(ntk_aware_frequencies(8, 1e4, {.factor = 0.5}),
                       "eigenblocks: factor (0.5) must be finite and at least 1", invalid_argument);
  CHECK_THROWS_WITH_AS(linear_frequencies(8, 1e4, {.factor = 0}),
                       "eigenblocks: factor (0) must be positive and finite", invalid_argument);
  for (const Method& method : bounded_methods()) {
    CAPTURE(method.name);
    CHECK_THROWS_WITH_AS(method.build(7, 1e4, 2), doctest::Contains("rotary_dim (7)"),
                         invalid_argument);
    CHECK_THROWS_WITH_AS(method.build(8, -3, 2), doctest::Contains("base (-3)"), invalid_argument);
    if (method.name == "ntk_aware" || method.name == "dynamic_ntk") {
      CHECK_THROWS_WITH_AS(method.build(2, 1e4, 2),
                           doctest::Contains("rotary_dim (2) must be above 2"), invalid_argument);
    } else {
      CHECK_NOTHROW(method.build(2, 1e4, 2));
    }
  }
  for (const double e : {-0.1, 1.1, kNaN}) {
    CHECK_THROWS_WITH_AS(ntk_mixed_frequencies(8, 1e4, {.factor = 2, .exponent = e}),
                         doctest::Contains(") must be in [0, 1]"), invalid_argument);
  }
  const char* untrained = "eigenblocks: original_max_position (0) must be at least 1";
  CHECK_THROWS_WITH_AS(dynamic_ntk_frequencies(8, 1e4, {}), untrained, invalid_argument);
  CHECK_THROWS_WITH_AS(ntk_by_parts_frequencies(8, 1e4, {}), untrained, invalid_argument);
  CHECK_THROWS_WITH_AS(yarn_frequencies(8, 1e4, {}), untrained, invalid_argument);
  CHECK_THROWS_WITH_AS(longrope_frequencies(8, 1e4, {}), untrained, invalid_argument);
  CHECK_THROWS_WITH_AS(llama3_frequencies(8, 1e4, {.original_max_position = 0}), untrained,
                       invalid_argument);
  CHECK_THROWS_WITH_AS(dynamic_ntk_frequencies(8, 1e4, {.original_max_position = 9, .seq_len = -1}),
                       "eigenblocks: seq_len (-1) must be at least 0", invalid_argument);

  const auto betas = [](double fast, double slow) {
    const char* text = ") must be finite and not below beta_slow (";
    CHECK_THROWS_WITH_AS(
        ntk_by_parts_frequencies(
            8, 1e4, {.original_max_position = 9, .beta_fast = fast, .beta_slow = slow}),
        doctest::Contains(text), invalid_argument);
    CHECK_THROWS_WITH_AS(
        yarn_frequencies(8, 1e4,
                         {.original_max_position = 9, .beta_fast = fast, .beta_slow = slow}),
        doctest::Contains(text), invalid_argument);
  };
  betas(1, 2);
  betas(1, 0);
  betas(kInfinity, 1);
  betas(kNaN, 1);
  betas(1, kNaN);
  CHECK_THROWS_WITH_AS(yarn_frequencies(8, 1.0, {.original_max_position = 9}),
                       "eigenblocks: base (1) must be above 1: the ramp divides by its logarithm",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(yarn_frequencies(8, 1e4, {.original_max_position = 9, .mscale = -1}),
                       "eigenblocks: mscale (-1) must be finite and at least 0", invalid_argument);
  CHECK_THROWS_WITH_AS(yarn_frequencies(8, 1e4, {.original_max_position = 9, .mscale_all_dim = -1}),
                       "eigenblocks: mscale_all_dim (-1) must be finite and at least 0",
                       invalid_argument);
  for (const double factor : {0.0, -1.0, kInfinity, kNaN}) {
    CHECK_THROWS_WITH_AS(
        yarn_frequencies(8, 1e4, {.original_max_position = 9, .attention_factor = factor}),
        doctest::Contains("attention_factor ("), invalid_argument);
  }

  LongRopeOptions options{.original_max_position = 64,
                          .short_factor = Vector<double>::Ones(4),
                          .long_factor = Vector<double>::Ones(4)};
  CHECK_THROWS_WITH_AS(longrope_frequencies(6, 1e4, options),
                       "eigenblocks: short_factor has 4 entries, expected 3 (rotary_dim / 2)",
                       invalid_argument);
  options.long_factor.resize(5);
  CHECK_THROWS_WITH_AS(longrope_frequencies(8, 1e4, options),
                       "eigenblocks: long_factor has 5 entries, expected 4 (rotary_dim / 2)",
                       invalid_argument);
  options.long_factor = Vector<double>::Ones(4);
  options.short_factor[2] = 0;
  CHECK_THROWS_WITH_AS(longrope_frequencies(8, 1e4, options),
                       "eigenblocks: short_factor[2] (0) must be positive and finite",
                       invalid_argument);
  options.short_factor[2] = 1;
  options.long_factor[0] = kNaN;
  CHECK_THROWS_AS(longrope_frequencies(8, 1e4, options), invalid_argument);
  options.long_factor[0] = 1;
  options.factor = 0.5;
  CHECK_THROWS_AS(longrope_frequencies(8, 1e4, options), invalid_argument);
  options.factor = 2;
  options.seq_len = -4;
  CHECK_THROWS_AS(longrope_frequencies(8, 1e4, options), invalid_argument);

  CHECK_THROWS_WITH_AS(
      llama3_frequencies(8, 1e4, {.low_freq_factor = 4, .high_freq_factor = 4}),
      "eigenblocks: low_freq_factor (4) must be at least 0 and below high_freq_factor (4)",
      invalid_argument);
  CHECK_THROWS_AS(llama3_frequencies(8, 1e4, {.low_freq_factor = -1}), invalid_argument);
  CHECK_THROWS_AS(llama3_frequencies(8, 1e4, {.high_freq_factor = kInfinity}), invalid_argument);

  for (const Index rotary_dim : {0, 3, 10}) {
    CHECK_THROWS_WITH_AS(proportional_frequencies(8, 1e4, {.rotary_dim = rotary_dim}),
                         doctest::Contains("at most head_dim (8)"), invalid_argument);
  }
  CHECK_THROWS_AS(proportional_frequencies(8, 1e4, {.rotary_dim = 4, .factor = 0.5}),
                  invalid_argument);
  CHECK_THROWS_WITH_AS(partial_rotary_dim(12, 0.25),
                       "eigenblocks: share (0.25) of head_dim (12) gives 3 channels, which must be "
                       "even and at least 2",
                       invalid_argument);
  for (const double share : {0.0, 1.5, kNaN, 0.01}) {
    CHECK_THROWS_AS(partial_rotary_dim(64, share), invalid_argument);
  }
}
