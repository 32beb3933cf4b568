#include <eigenblocks/position/logn.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

using namespace eigenblocks;

TEST_CASE_TEMPLATE("logn_scale: log of the keys in sight over log of the trained length", S, float,
                   double) {
  const std::vector<double> n{0, 1, 510, 511, 512, 4095, 1e7, 2.5};
  const auto plain = logn_scale<S>(n, 8, 512, LognMode::plain);
  const auto clipped = logn_scale<S>(n, 8, 512);
  for (Index i = 0; i < 8; ++i) {
    const long double want =
        std::log(static_cast<long double>(n[static_cast<std::size_t>(i)]) + 1) / std::log(512.0L);
    CHECK(std::abs(plain[i] - static_cast<S>(want)) <=
          2 * std::numeric_limits<S>::epsilon() * static_cast<S>(want));
    CHECK(clipped[i] == (plain[i] > S(1) ? plain[i] : S(1)));
  }
  CHECK(plain[0] == S(0));  // one key: nothing to sharpen
  CHECK(plain[3] == S(1));  // natural count n + 1: exactly the trained length
  CHECK(clipped[4] > S(1));
}

TEST_CASE("logn_scale takes runs, an offset included, and no rows") {
  const auto run = logn_scale<double>(100, 5, 64);
  const auto list = logn_scale<double>(std::vector<Index>{100, 101, 102, 103, 104}, 5, 64);
  CHECK(run == list);
  CHECK(run[0] == std::log(101.0) / std::log(64.0));
  CHECK(logn_scale<float>(0, 0, 64).size() == 0);
}

TEST_CASE("logn_scale: bad input") {
  CHECK_THROWS_WITH_AS(logn_scale<double>(0, 3, 1),
                       "eigenblocks: train_length (1) must be at least 2", invalid_argument);
  CHECK_THROWS_WITH_AS(logn_scale<double>(0, -1, 512),
                       "eigenblocks: rows (-1) must not be negative", invalid_argument);
  CHECK_THROWS_WITH_AS(logn_scale<double>(std::vector<double>{1, 2}, 3, 512),
                       "eigenblocks: positions has 2 entries, expected 3 (rows)", invalid_argument);
  CHECK_THROWS_WITH_AS(logn_scale<double>(-2, 3, 512),
                       "eigenblocks: positions[0] (-2) must be finite and not negative",
                       invalid_argument);
  for (const double n :
       {-0.5, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    CHECK_THROWS_AS(logn_scale<double>(std::vector<double>{1, n}, 2, 512), invalid_argument);
  }
}
