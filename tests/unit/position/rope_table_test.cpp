// RotaryTable: its accuracy at long positions, and that a row depends on nothing but its position.
#include <eigenblocks/position/rope.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;

/// cos (columns 0 .. R/2-1) and sin (the rest) of a table at the listed positions: what it does to
/// (1, 0).
template <class S>
Matrix<S> rows_of(const RotaryTable<S>& table, const RopePositions& positions, Index count) {
  const Index pairs = table.pairs();
  Matrix<S> unit = Matrix<S>::Zero(count, 2 * pairs), out(count, 2 * pairs);
  const bool half = table.layout() == RopeLayout::half;
  for (Index p = 0; p < pairs; ++p) unit.col(half ? p : 2 * p).setOnes();
  rope_forward(unit, positions, table, out, {.heads = 1});
  if (half) return out;
  return rope_convert_layout(out, RopeLayout::interleaved, RopeLayout::half, 2 * pairs,
                             {.heads = 1});
}

template <class S>
double table_error(RopeLayout layout, const std::vector<double>& positions, Index table_positions) {
  const RotaryFrequencies f = rope_frequencies(128);
  const Index count = static_cast<Index>(positions.size());
  Matrix<double> cos(count, 64), sin(count, 64);
  rope_cos_sin(positions, f, cos, sin);
  const Matrix<S> got = rows_of(RotaryTable<S>(f, layout, table_positions), positions, count);
  return std::max((got.leftCols(64).template cast<double>() - cos).cwiseAbs().maxCoeff(),
                  (got.rightCols(64).template cast<double>() - sin).cwiseAbs().maxCoeff());
}

/// `count` integers from `first` at odd steps, so that all rows of the fine table occur.
std::vector<double> spread(double first, int count) {
  std::vector<double> out;
  for (int i = 0; i < count; ++i) out.push_back(first + 37.0 * i);
  return out;
}

}  // namespace

TEST_CASE(
    "table rows are as good at 1e9 as at 0: within 1.74e-7 (float), 4.5e-16 (double) of the "
    "truth") {
  // c = c_h c_l - s_h s_l.  The four entries are off by u = 2^-25 at most, which costs (|c_h| +
  // |s_h| + |c_l| + |s_l|) u <= 2 sqrt(2) u; two products and their difference round by u each: (2
  // sqrt(2) + 3) u.  Measured: 1.33e-7. In double u is 2^-54, and the entries themselves are right
  // to 2.2e-16 only.
  constexpr double kFloat = 1.74e-7, kDouble = 4.5e-16;
  for (const RopeLayout layout : {RopeLayout::interleaved, RopeLayout::half}) {
    for (const double first : {0.0, 65000.0, 1e6, 1e7, 1e9}) {
      CAPTURE(first);
      CHECK(table_error<float>(layout, spread(first, 999), 4096) <= kFloat);
      CHECK(table_error<double>(layout, spread(first, 999), 4096) <= kDouble);
    }
    CHECK(table_error<float>(layout, spread(-1e6, 999), 4096) <= kFloat);
    // Real positions are rounded once.
    CHECK(table_error<float>(layout, spread(1e6 + 0.5, 99), 4096) <= 0x1p-25 * 1.0001);
    CHECK(table_error<double>(layout, spread(-1e6 + 0.25, 99), 4096) == 0.0);
  }
}

TEST_CASE("relative angles survive at long positions, where float angles do not") {
  // The table of the study: cos of the relative angle between P + d and P, d = 1 .. 64; the float
  // column is what a model in transformers computes.  Ours stays at the size of two rounded rows;
  // the bounds of the rival are half of what it measured.
  const RotaryFrequencies f = rope_frequencies(128);
  const RotaryTable<float> table(f, RopeLayout::half, 0);
  const struct {
    Index position;
    double rival;
  } kRows[] = {{4096, 1.2e-4}, {131072, 3.8e-3}, {1'000'000, 3.1e-2}, {10'000'000, 0.45}};
  for (const auto& row : kRows) {
    const Index position = row.position;
    CAPTURE(position);
    const Matrix<float> rows = rows_of(table, position, 65);
    double ours = 0, floats = 0;
    for (Index d = 1; d <= 64; ++d) {
      for (Index p = 0; p < 64; ++p) {
        const double want = std::cos(static_cast<double>(d) * f.inv_freq[p]);
        const auto entry = [&](Index i, Index j) { return static_cast<double>(rows(i, j)); };
        ours = std::max(
            ours, std::abs(entry(0, p) * entry(d, p) + entry(0, 64 + p) * entry(d, 64 + p) - want));
        const float rounded = static_cast<float>(f.inv_freq[p]);
        const double a = static_cast<double>(static_cast<float>(position) * rounded);
        const double b = static_cast<double>(static_cast<float>(position + d) * rounded);
        floats = std::max(floats, std::abs(std::cos(b - a) - want));
      }
    }
    CHECK(ours <= 2.6e-7);
    CHECK(floats >= row.rival);
  }
}

TEST_CASE_TEMPLATE(
    "a row depends on its position only: not on the table's size, nor on how it is asked for", S,
    float, double) {
  const RotaryFrequencies f = rope_frequencies(22);
  for (const RopeLayout layout : {RopeLayout::interleaved, RopeLayout::half}) {
    const RotaryTable<S> big(f, layout, 70000);
    CHECK(big.positions() == 70144);  // whole runs of 256
    for (const Index first : {0, 255, 4000, 69990, 123456, -300}) {
      CAPTURE(first);
      constexpr Index kCount = 300;  // crosses a border of 256 wherever it starts
      const Matrix<S> want = rows_of(big, first, kCount);
      std::vector<double> reals;
      std::vector<Index> integers, backwards;
      for (Index i = 0; i < kCount; ++i) {
        integers.push_back(first + i);
        reals.push_back(static_cast<double>(first + i));
        backwards.push_back(first + kCount - 1 - i);
      }
      CHECK(rows_of(big, integers, kCount) == want);
      CHECK(rows_of(big, reals, kCount) == want);
      CHECK(rows_of(big, backwards, kCount) == want.colwise().reverse());
      for (const Index positions : {0, 1, 256, 257}) {
        const RotaryTable<S> small(f, layout, positions);
        CHECK(rows_of(small, first, kCount) == want);
        CHECK(rows_of(small, backwards, kCount) == want.colwise().reverse());
      }
    }
  }
}

TEST_CASE("a float table at 1e7 is within 1e-6 of the double table") {
  const RotaryFrequencies f = rope_frequencies(64, 5e5);
  const Matrix<float> single = rows_of(RotaryTable<float>(f, RopeLayout::half), 10'000'000, 64);
  const Matrix<double> twice = rows_of(RotaryTable<double>(f, RopeLayout::half), 10'000'000, 64);
  CHECK((single.cast<double>() - twice).cwiseAbs().maxCoeff() <= 1e-6);
}

TEST_CASE("positions beyond 2^31 do not overflow") {
  const RotaryFrequencies f = rope_frequencies(8);
  const Index far = Index{1} << 40;
  const Matrix<double> got = rows_of(RotaryTable<double>(f, RopeLayout::half, 512), far, 3);
  const std::vector<Index> listed{far, far + 1, far + 2};
  CHECK(got == rows_of(RotaryTable<double>(f, RopeLayout::half, 0), listed, 3));
  // Consecutive rows differ by the turn of one position.
  for (Index p = 0; p < 4; ++p) {
    const double turn = got(0, p) * got(1, p) + got(0, 4 + p) * got(1, 4 + p);
    CHECK(turn == doctest::Approx(std::cos(f.inv_freq[p])).epsilon(1e-9));
  }
}

TEST_CASE("a table takes any frequencies and reports its sizes") {
  RotaryFrequencies f{.inv_freq = Vector<double>(3)};
  f.inv_freq << 1.0, 0.0, 0.5;  // a zero frequency (proportional rotary) leaves its pair alone
  const RotaryTable<float> table(f, RopeLayout::interleaved, 1000);
  CHECK(table.rotary_dim() == 6);
  CHECK(table.pairs() == 3);
  CHECK(table.positions() == 1024);
  CHECK(table.bytes() == (256 + 4) * 6 * sizeof(float));
  CHECK(table.layout() == RopeLayout::interleaved);
  CHECK(table.frequencies().inv_freq == f.inv_freq);
  const Matrix<float> rows = rows_of(table, 1, 500);
  CHECK(rows.col(1) == Vector<float>::Ones(500));
  CHECK(rows.col(4) == Vector<float>::Zero(500));
}

TEST_CASE("RotaryTable refuses what it cannot hold") {
  const RotaryFrequencies f = rope_frequencies(8);
  CHECK_THROWS_WITH_AS(RotaryTable<float>(f, static_cast<RopeLayout>(7)),
                       "eigenblocks: layout (7) must be interleaved (0) or half (1)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(RotaryTable<float>(f, RopeLayout::half, -1),
                       "eigenblocks: positions (-1) must not be negative", invalid_argument);
  CHECK_THROWS_WITH_AS(RotaryTable<float>(rope_frequencies(2050), RopeLayout::half),
                       "eigenblocks: rotary_dim (2050) must be at most 2048", invalid_argument);
  RotaryFrequencies bad = f;
  bad.inv_freq.resize(0);
  CHECK_THROWS_WITH_AS(RotaryTable<float>(bad, RopeLayout::half),
                       doctest::Contains("inv_freq has 0 entries"), invalid_argument);
  bad = f;
  bad.inv_freq[3] = HUGE_VAL;
  CHECK_THROWS_WITH_AS(RotaryTable<float>(bad, RopeLayout::half),
                       "eigenblocks: inv_freq[3] (inf) must be finite", invalid_argument);
  bad = f;
  bad.attention_factor = 0;
  CHECK_THROWS_WITH_AS(RotaryTable<float>(bad, RopeLayout::half),
                       "eigenblocks: attention_factor (0) must be positive and finite",
                       invalid_argument);
}
