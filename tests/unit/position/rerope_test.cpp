// Position policies with a window: values by hand, the two branches, the table, errors.
#include <eigenblocks/position/rerope.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

using namespace eigenblocks;

namespace {

/// Relative positions of the keys 0 .. i seen from i.
template <class Position>
std::vector<double> seen_from(const Position& p, Index i) {
  std::vector<double> row;
  for (Index j = 0; j <= i; ++j) row.push_back(p.relative(i, j));
  return row;
}

}  // namespace

TEST_CASE("relative positions by hand") {
  CHECK(seen_from(rerope(3), 6) == std::vector<double>{3, 3, 3, 3, 2, 1, 0});
  CHECK(seen_from(leaky_rerope(3, 2), 6) == std::vector<double>{4.5, 4, 3.5, 3, 2, 1, 0});
  CHECK(seen_from(leaky_rerope(2, 0.5), 4) == std::vector<double>{6, 4, 2, 1, 0});
  // 7 div 2 - j div 2 + 4 - 2
  CHECK(seen_from(self_extend(4, 2), 7) == std::vector<double>{5, 5, 4, 4, 3, 2, 1, 0});
  // 7 div 3 - j div 3 + 4 - 1: the window is not a multiple of the group
  CHECK(seen_from(self_extend(4, 3), 7) == std::vector<double>{5, 5, 5, 4, 3, 2, 1, 0});
  CHECK(seen_from(linear_position(), 3) == std::vector<double>{3, 2, 1, 0});
  CHECK(seen_from(linear_position(4), 3) == std::vector<double>{0.75, 0.5, 0.25, 0});
}

TEST_CASE("the far branch's absolute positions differ by the relative position") {
  for (const Index window : {1, 4, 7, 100}) {
    for (const NearFarPosition& p :
         {rerope(window), leaky_rerope(window, 8), leaky_rerope(window, 0.0625),
          leaky_rerope(window, 3.7), self_extend(window, (window + 1) / 2)}) {
      double worst = 0;
      for (Index i = 0; i < 150; ++i) {
        for (Index j = 0; j <= i - window; ++j)
          worst = std::max(worst, std::abs(p.far_query(i) - p.far_key(j) - p.relative(i, j)));
      }
      CHECK(worst < 1e-12);  // of positions up to 2400
    }
  }
}

TEST_CASE("limits: leak 1 and group 1 are RoPE, a large leak is ReRoPE; leaky is continuous") {
  const auto rope = rope_relative_positions(linear_position(), 40, 40);
  CHECK((rope_relative_positions(leaky_rerope(5, 1), 40, 40) - rope).cwiseAbs().maxCoeff() < 1e-13);
  CHECK(rope_relative_positions(self_extend(5, 1), 40, 40) == rope);
  CHECK((rope_relative_positions(leaky_rerope(5, 1e12), 40, 40) -
         rope_relative_positions(rerope(5), 40, 40))
            .cwiseAbs()
            .maxCoeff() < 1e-9);
  CHECK(leaky_rerope(5, 3).relative(5, 0) == 5);
}

TEST_CASE("the table: offset of the queries, keys ahead are 0, empty sizes") {
  const Matrix<double> part = rope_relative_positions(rerope(3), 2, 6, 3);
  const Matrix<double> whole = rope_relative_positions(rerope(3), 5, 6);
  CHECK(part == whole.bottomRows(2));
  CHECK((part(0, 4) == 0 && part(0, 5) == 0 && part(1, 5) == 0));
  CHECK(rope_relative_positions(rerope(3), 0, 0).size() == 0);
  CHECK(rope_relative_positions(rerope(3), 2, 3, -2).isZero());  // nothing is seen
}

TEST_CASE("bad input") {
  const auto refuses = [](auto make, const char* message) {
    CHECK_THROWS_WITH_AS(make(), doctest::Contains(message), std::invalid_argument);
  };
  constexpr double inf = std::numeric_limits<double>::infinity(),
                   nan = std::numeric_limits<double>::quiet_NaN();
  refuses([] { rerope(0); }, "window (0) must be at least 1");
  refuses([] { leaky_rerope(-1, 2); }, "window (-1) must be at least 1");
  refuses([] { leaky_rerope(4, 0); }, "leak (0) must be positive and finite");
  refuses([] { leaky_rerope(4, -1); }, "leak (-1) must be positive and finite");
  refuses([] { leaky_rerope(4, inf); }, "leak (inf) must be positive and finite");
  refuses([] { leaky_rerope(4, nan); }, "must be positive and finite");
  refuses([] { self_extend(4, 0); }, "group (0) must be at least 1");
  refuses([] { self_extend(4, 5); }, "group (5) must be at most window (4)");
  refuses([] { linear_position(0); }, "factor (0) must be positive and finite");
  refuses([] { rope_relative_positions(rerope(3), -1, 2); }, "queries (-1) must not be negative");
  refuses([] { rope_relative_positions(rerope(3), 1, -2); }, "keys (-2) must not be negative");
}
