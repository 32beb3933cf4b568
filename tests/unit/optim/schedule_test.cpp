#include <doctest/doctest.h>

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/optim/schedule.hpp>

#include <cmath>
#include <limits>

using namespace eigenblocks;

namespace {
constexpr ScheduleKind kAll[] = {ScheduleKind::constant, ScheduleKind::linear, ScheduleKind::cosine,
                                 ScheduleKind::cosine_min, ScheduleKind::wsd};
}

TEST_CASE("lr_schedule: the table of the header, point by point") {
  ScheduleOptions options{.peak = 2.0, .warmup = 4, .total = 12, .stable = 2, .min_ratio = 0.25};
  const auto rate = [&](ScheduleKind kind, Index t) {
    options.kind = kind;
    return lr_schedule(t, options);
  };
  CHECK(rate(ScheduleKind::constant, 1) == 0.5);
  CHECK(rate(ScheduleKind::constant, 4) == 2.0);
  CHECK(rate(ScheduleKind::constant, 1000) == 2.0);
  CHECK(rate(ScheduleKind::linear, 0) == 0.0);
  CHECK(rate(ScheduleKind::linear, 3) == 1.5);
  CHECK(rate(ScheduleKind::linear, 6) == 1.5);
  CHECK(rate(ScheduleKind::linear, 12) == 0.0);
  CHECK(rate(ScheduleKind::cosine, 8) == doctest::Approx(1.0));
  CHECK(rate(ScheduleKind::cosine, 12) == doctest::Approx(0.0));
  CHECK(rate(ScheduleKind::cosine_min, 2) == 1.0);
  CHECK(rate(ScheduleKind::cosine_min, 8) == doctest::Approx(1.25));
  CHECK(rate(ScheduleKind::cosine_min, 12) == doctest::Approx(0.5));
  CHECK(rate(ScheduleKind::wsd, 0) == 0.5);  // starts at min_ratio, not at 0
  CHECK(rate(ScheduleKind::wsd, 2) == 1.25);
  CHECK(rate(ScheduleKind::wsd, 4) == 2.0);
  CHECK(rate(ScheduleKind::wsd, 6) == 2.0);
  CHECK(rate(ScheduleKind::wsd, 9) == 1.25);
  CHECK(rate(ScheduleKind::wsd, 12) == 0.5);
}

TEST_CASE("lr_schedule: past the end every kind stays where it ended") {
  ScheduleOptions options{.peak = 1.0, .warmup = 3, .total = 10, .stable = 2, .min_ratio = 0.1};
  for (const ScheduleKind kind : kAll) {
    options.kind = kind;
    for (const Index t : {11, 13, 100, 1'000'000'000}) {
      CHECK(lr_schedule(t, options) == lr_schedule(10, options));
    }
  }
}

TEST_CASE("lr_schedule: no warmup, no steps, warmup beyond the end") {
  for (const ScheduleKind kind : kAll) {
    CHECK(lr_schedule(0, {.kind = kind, .peak = 3.0, .warmup = 0, .total = 5}) == 3.0);
    CHECK(std::isfinite(lr_schedule(0, {.kind = kind, .peak = 3.0, .total = 0})));
    CHECK(std::isfinite(lr_schedule(9, {.kind = kind, .warmup = 8, .total = 4, .stable = 9})));
    for (Index t = 0; t < 30; ++t) {
      const double rate = lr_schedule(
          t, {.kind = kind, .peak = 3.0, .warmup = 7, .total = 20, .stable = 5, .min_ratio = 0.2});
      CHECK(rate >= 0);
      CHECK(rate <= 3.0);
    }
  }
}

TEST_CASE("lr_schedule: bad input") {
  CHECK_THROWS_WITH_AS(lr_schedule(-1, {}),
                       "eigenblocks: lr_schedule: step (-1) must not be negative",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(lr_schedule(0, {.peak = -0.5}),
                       "eigenblocks: lr_schedule: peak (-0.5) must be finite and not negative",
                       invalid_argument);
  CHECK_THROWS_AS(lr_schedule(0, {.peak = std::numeric_limits<double>::quiet_NaN()}),
                  invalid_argument);
  CHECK_THROWS_WITH_AS(
      lr_schedule(0, {.warmup = -2, .total = 3}),
      "eigenblocks: lr_schedule: warmup (-2), total (3) and stable (0) must not be negative",
      invalid_argument);
  CHECK_THROWS_WITH_AS(lr_schedule(0, {.min_ratio = 1.5}),
                       "eigenblocks: lr_schedule: min_ratio (1.5) must be in [0, 1]",
                       invalid_argument);
}
