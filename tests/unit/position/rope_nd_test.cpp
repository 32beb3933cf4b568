#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/position/rope_nd.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using namespace eigenblocks;

constexpr RopeLayout kLayouts[] = {RopeLayout::interleaved, RopeLayout::half,
                                   RopeLayout::half_per_axis};

/// One of each kind over P = 12 pairs.
std::vector<RotaryAxes> allocations() {
  const RotaryFrequencies whole = rope_frequencies(24), third = rope_frequencies(8);
  return {axial_axes(third, 3), alternating_axes(third, 3), cyclic_axes(whole, 3),
          section_axes(whole, {3, 4, 5}), interleaved_section_axes(whole, {5, 4, 3})};
}

/// Rows that take every path: the fine table, both tables, negative, beyond the table, fractional,
/// mixtures, equal coordinates, and all of them zero.
Matrix<double> coordinates() {
  Matrix<double> m(13, 3);
  m << 0, 0, 0,          //
      1, 2, 3,           //
      255, 0, 256,       //
      300, 7, 511,       //
      -1, -256, -1000,   //
      5000, 6000, 4,     // beyond a table of 1024
      6000, 5000, 6001,  //
      0.5, 1.25, -2.75,  //
      2.5, 300, 3,       //
      7, 1e3, 0.125,     //
      9, 9, 9,           //
      777, 777, 777,     //
      -0.5, -0.5, -0.5;
  return m;
}

/// The definition, pair by pair, in double.
Matrix<double> definition(const Matrix<double>& x, const Matrix<double>& at, const RotaryAxes& axes,
                          RopeLayout layout, const RopeOptions& options) {
  Matrix<double> y = x;
  const RotaryFrequencies& f = axes.frequencies;
  const Index head_dim = x.cols() / options.heads, pairs = f.pairs(), part = pairs / axes.axes;
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index head = 0; head < options.heads; ++head) {
      for (Index p = 0; p < pairs; ++p) {
        Index a = 2 * p, b = 2 * p + 1;
        if (layout == RopeLayout::half) a = p, b = p + pairs;
        if (layout == RopeLayout::half_per_axis) a = p / part * 2 * part + p % part, b = a + part;
        a += head * head_dim + options.first_channel;
        b += head * head_dim + options.first_channel;
        const double angle = at(i, axes.axis[static_cast<std::size_t>(p)]) * f.inv_freq[p];
        const double c = f.attention_factor * std::cos(angle),
                     s = f.attention_factor * std::sin(angle);
        y(i, a) = x(i, a) * c - x(i, b) * s;
        y(i, b) = x(i, a) * s + x(i, b) * c;
      }
    }
  }
  return y;
}

/// Entries below 6, a row of the table (1.74e-7 or 4.5e-16, rope_table_test), two products, one sum.
template <class S>
constexpr double kBound = 2 * 6.0 * (std::is_same_v<S, float> ? 3e-7 : 1.1e-15);

double distance(const auto& a, const auto& b) {
  return (a.template cast<double>() - b.template cast<double>()).cwiseAbs().maxCoeff();
}

}  // namespace

TEST_CASE("which axis and which frequency a pair has") {
  using Axes = std::vector<Index>;
  RotaryFrequencies f = rope_frequencies(12), part = rope_frequencies(6);
  f.attention_factor = part.attention_factor = 1.5;
  part.softmax_factor = 2.0;

  const RotaryAxes axial = axial_axes(part, 2);
  CHECK(axial.axis == Axes{0, 0, 0, 1, 1, 1});
  CHECK(axial.frequencies.inv_freq.head(3) == part.inv_freq);
  CHECK(axial.frequencies.inv_freq.tail(3) == part.inv_freq);
  CHECK(axial.axes == 2);
  CHECK(axial.frequencies.attention_factor == 1.5);
  CHECK(axial.frequencies.softmax_factor == 2.0);

  const RotaryAxes alternating = alternating_axes(part, 2);
  CHECK(alternating.axis == Axes{0, 1, 0, 1, 0, 1});
  for (Index p = 0; p < 6; ++p) {
    CHECK(alternating.frequencies.inv_freq[p] == part.inv_freq[p / 2]);
  }

  CHECK(cyclic_axes(f, 2).axis == Axes{0, 1, 0, 1, 0, 1});
  CHECK(cyclic_axes(f, 4).axis == Axes{0, 1, 2, 3, 0, 1});
  CHECK(section_axes(f, {1, 3, 2}).axis == Axes{0, 1, 1, 1, 2, 2});
  CHECK(section_axes(f, {6, 0}).axis == Axes{0, 0, 0, 0, 0, 0});
  CHECK(interleaved_section_axes(f, {4, 1, 1}).axis == Axes{0, 1, 2, 0, 0, 0});
  CHECK(interleaved_section_axes(f, {2, 2, 2}).axis == Axes{0, 1, 2, 0, 1, 2});
  CHECK(interleaved_section_axes(f, {6, 0, 0}).axis == Axes{0, 0, 0, 0, 0, 0});
  // P = 5: the last place of axis 1 is pair 4, although 3 * 2 = P + 1.
  CHECK(interleaved_section_axes(rope_frequencies(10), {2, 2, 1}).axis == Axes{0, 1, 2, 0, 1});
  for (const RotaryAxes& whole : {cyclic_axes(f, 2), section_axes(f, {1, 3, 2})}) {
    CHECK(whole.frequencies.inv_freq == f.inv_freq);
    CHECK(whole.frequencies.attention_factor == 1.5);
  }
  // Qwen3-VL, the numbers of its configuration: pairs 60 .. 63 are time.
  const RotaryAxes qwen = interleaved_section_axes(rope_frequencies(128), {24, 20, 20});
  CHECK(std::count(qwen.axis.begin(), qwen.axis.end(), 0) == 24);
  CHECK(std::count(qwen.axis.begin(), qwen.axis.end(), 1) == 20);
  CHECK(std::count(qwen.axis.begin() + 60, qwen.axis.end(), 0) == 4);
}

TEST_CASE_TEMPLATE("forward and backward follow the definition", S, float, double) {
  Random random(1);
  const Matrix<double> at = coordinates();
  for (RotaryAxes axes : allocations()) {
    for (const RopeLayout layout : kLayouts) {
      axes.frequencies.attention_factor = layout == RopeLayout::half ? 1.2 : 1.0;
      const RotaryNdTable<S> table(axes, layout, 1024);
      const RopeOptions options{.heads = 5, .first_channel = 3};
      const Matrix<S> x = normal_matrix<S>(random, at.rows(), 5 * 29);
      Matrix<S> y(x.rows(), x.cols());
      rope_forward(x, at, table, y, options);
      const Matrix<double> wide = x.template cast<double>();
      REQUIRE(distance(y, definition(wide, at, axes, layout, options)) <=
              1.2 * kBound<S> + 6000 * 1e-15);
      for (Index channel : {0, 2, 27, 28}) CHECK(y.col(channel) == x.col(channel));
      rope_backward(x, at, table, y, options);
      REQUIRE(distance(y, definition(wide, -at, axes, layout, options)) <=
              1.2 * kBound<S> + 6000 * 1e-15);
    }
  }
}

TEST_CASE_TEMPLATE("text stays RoPE with the same frequencies, to the bit", S, float, double) {
  Random random(2);
  RotaryFrequencies f = rope_frequencies(44, 1e6);
  const Vector<double> line = (Vector<double>(7) << 0, 3, 256, -700.0, 12345, 0.5, 1e9).finished();
  const Matrix<double> everywhere = line.replicate(1, 3);
  for (const RopeLayout layout : {RopeLayout::interleaved, RopeLayout::half}) {
    for (const double factor : {1.0, 1.3}) {
      f.attention_factor = factor;
      const RotaryTable<S> one(f, layout, 1024);
      const Matrix<S> x = normal_matrix<S>(random, 7, 3 * 44);
      for (const RotaryAxes& axes : {cyclic_axes(f, 3), section_axes(f, {4, 9, 9}),
                                     interleaved_section_axes(f, {10, 6, 6})}) {
        const RotaryNdTable<S> table(axes, layout, 1024);
        CHECK(rope(x, everywhere, table, {.heads = 3}) == rope(x, line, one, {.heads = 3}));
        // A run: all axes go on together.
        CHECK(rope(x, 1020, table, {.heads = 3}) == rope(x, 1020, one, {.heads = 3}));
        // Coordinates that differ, where only pairs of equal coordinates are compared: same bits.
        Matrix<double> apart = everywhere;
        apart.col(0).array() += 1;
        const Matrix<S> y = rope(x, apart, table, {.heads = 3}),
                        want = rope(x, line, one, {.heads = 3});
        for (Index p = 0; p < 22; ++p) {
          if (axes.axis[static_cast<std::size_t>(p)] == 0) continue;
          const Index channel = layout == RopeLayout::half ? p : 2 * p;
          REQUIRE(y.col(channel) == want.col(channel));
          REQUIRE(y.col(44 + channel) == want.col(44 + channel));
        }
      }
    }
  }
}

TEST_CASE("axial in the layout half_per_axis is RoPE in each part of the head, to the bit") {
  Random random(3);
  const RotaryFrequencies part = rope_frequencies(14);
  const Matrix<double> at = coordinates();
  const Matrix<float> x = normal_matrix<float>(random, at.rows(), 2 * 45);
  const RotaryNdTable<float> table(axial_axes(part, 3), RopeLayout::half_per_axis, 512);
  const RotaryTable<float> one(part, RopeLayout::half, 512);
  Matrix<float> want = x;
  for (Index a = 0; a < 3; ++a) {
    rope_in_place(want, at.col(a), one, {.heads = 2, .first_channel = 3 + a * 14});
  }
  CHECK(rope(x, at, table, {.heads = 2, .first_channel = 3}) == want);
}

TEST_CASE_TEMPLATE("laws of rotations", S, float, double) {
  Random random(4);
  const Matrix<S> q = normal_matrix<S>(random, 1, 24), k = normal_matrix<S>(random, 1, 24);
  const Matrix<double> m = (Matrix<double>(1, 3) << 3, 40, 17.5).finished(),
                       n = (Matrix<double>(1, 3) << 1, -2, 300).finished(),
                       shift = (Matrix<double>(1, 3) << 1000, 2.5, -70).finished();
  for (const RotaryAxes& axes : allocations()) {
    for (const RopeLayout layout : kLayouts) {
      const RotaryNdTable<S> table(axes, layout);
      const auto turned = [&](const Matrix<S>& x, const Matrix<double>& at) {
        return rope(x, at, table, {.heads = 1});
      };
      // The score depends on the differences of the coordinates only.
      const auto score = [&](const Matrix<double>& a, const Matrix<double>& b) {
        return static_cast<double>(turned(q, a).row(0).dot(turned(k, b).row(0)));
      };
      CHECK(std::abs(score(m + shift, n + shift) - score(m, n)) <= 24 * 6 * 4 * kBound<S>);
      CHECK(std::abs(score(m - n, 0 * n) - score(m, n)) <= 24 * 6 * 4 * kBound<S>);
      CHECK(std::abs(score(m, n) - score(n, m)) > 1e-3);  // and it does depend on them
      // There and back; lengths stay.
      Matrix<S> back = turned(q, m);
      CHECK(std::abs(double(back.norm()) - double(q.norm())) <= 4 * kBound<S>);
      rope_backward_in_place(back, m, table, {.heads = 1});
      CHECK(distance(back, q) <= 4 * kBound<S>);
      // One rotation after another.
      CHECK(distance(turned(turned(q, m), n), turned(q, m + n)) <= 4 * kBound<S>);
    }
  }
}

TEST_CASE("all forms agree bit for bit") {
  Random random(5);
  Matrix<double> at = coordinates().replicate(20, 1);
  at.col(1).array() += Vector<double>::LinSpaced(at.rows(), 0.0, double(at.rows() - 1)).array();
  const Index rows = at.rows();
  const Matrix<float> x = normal_matrix<float>(random, rows, 2 * 26);
  const RopeOptions options{.heads = 2, .first_channel = 1};
  for (const RotaryAxes& axes : {cyclic_axes(rope_frequencies(24), 3), allocations()[0]}) {
    for (const RopeLayout layout : kLayouts) {
      const RotaryNdTable<float> table(axes, layout, 1024), empty(axes, layout, 0);
      const Matrix<float> want = rope(x, at, table, options);
      Matrix<float> y(rows, x.cols()), back(rows, x.cols());
      rope_backward(x, at, table, back, options);
      CHECK(rope(x, at, empty, options) == want);
      y = x;
      rope_backward_in_place(y, at, empty, options);
      CHECK(y == back);
      for (Index i = 0; i < rows; ++i) {  // step by step
        rope_forward(x.row(i), at.row(i), table, y.row(i), options);
      }
      CHECK(y == want);
      thread_pool pool(3);
      y.setZero();
      rope_forward(x, at, table, y, options, pool);
      CHECK(y == want);
      // Coordinates in any storage: column-major, a block, integers.
      const Eigen::MatrixXd column_major = at;
      CHECK(rope(x, column_major, table, options) == want);
      Matrix<double> wide = Matrix<double>::Constant(rows, 6, 1e5);
      wide.middleCols(2, 3) = at;
      CHECK(rope(x, wide.middleCols(2, 3), table, options) == want);
      const Matrix<Index> whole = at.cast<Index>();
      CHECK(rope(x, whole, table, options) ==
            rope(x, Matrix<double>(whole.cast<double>()), table, options));
    }
  }
}

TEST_CASE("integer coordinates reach further than a double can count") {
  const RotaryNdTable<double> table(cyclic_axes(rope_frequencies(4), 2), RopeLayout::half);
  const Matrix<double> x = Matrix<double>::Ones(1, 4);
  Matrix<Index> at(1, 2);
  at << (Index{1} << 53) + 1, 5;
  Matrix<Index> next = at;
  next(0, 0) -= 1;
  CHECK(rope(x, at, table, {.heads = 1})(0, 0) != rope(x, next, table, {.heads = 1})(0, 0));
  CHECK(rope(x, at, table, {.heads = 1})(0, 1) == rope(x, next, table, {.heads = 1})(0, 1));
}

TEST_CASE_TEMPLATE("16-bit activations: arithmetic in float, one rounding", H, Eigen::half,
                   Eigen::bfloat16) {
  Random random(6);
  const Matrix<double> at = coordinates();
  const Matrix<H> x = normal_matrix<float>(random, at.rows(), 3 * 27).template cast<H>();
  const RopeOptions options{.heads = 3, .first_channel = 2};
  for (const RopeLayout layout : kLayouts) {
    const RotaryNdTable<float> table(allocations()[3], layout);
    const Matrix<float> wide = rope(Matrix<float>(x.template cast<float>()), at, table, options);
    CHECK(rope(x, at, table, options).template cast<float>() ==
          wide.template cast<H>().template cast<float>());
  }
}

TEST_CASE("a NaN coordinate spoils its own axis only; zero is the identity") {
  Matrix<double> at(2, 3);
  at << 1, std::numeric_limits<double>::quiet_NaN(), 2, 0, 0, -0.0;
  const RotaryNdTable<float> table(section_axes(rope_frequencies(6), {1, 1, 1}),
                                   RopeLayout::interleaved);
  Matrix<float> x = Matrix<float>::Ones(2, 6);
  x(1, 0) = -0.0f;
  const Matrix<float> y = rope(x, at, table, {.heads = 1});
  CHECK(y.row(0).leftCols(2).allFinite());
  CHECK(y.row(0).middleCols(2, 2).array().isNaN().all());
  CHECK(y.row(0).rightCols(2).allFinite());
  CHECK(y.row(1) == x.row(1));
  CHECK(std::signbit(y(1, 0)));
}

TEST_CASE("gradients against finite differences") {
  Random random(7);
  for (RotaryAxes axes : allocations()) {
    axes.frequencies = RotaryFrequencies{.inv_freq = axes.frequencies.inv_freq.cwiseMax(0.05),
                                         .attention_factor = 1.3};
    for (const RopeLayout layout : kLayouts) {
      const RotaryNdTable<double> table(axes, layout);
      const RopeOptions options{.heads = 2, .first_channel = 2};
      Matrix<double> x = normal_matrix<double>(random, 4, 2 * 27), at(4, 3), dx(4, 54), dat(4, 3);
      const Matrix<double> dy = normal_matrix<double>(random, 4, 54);
      at << 0, 3, -2.5, 1, 1, 1, 6, 1.25, 2, 0.5, 0, 4;
      const auto loss = [&] { return rope(x, at, table, options).cwiseProduct(dy).sum(); };
      rope_backward(dy, at, table, dx, options);
      const GradcheckResult of_x = gradcheck(loss, x, dx);
      CHECK_MESSAGE(of_x.passed, of_x.message());
      rope_position_backward(rope(x, at, table, options), dy, table, dat, options);
      const GradcheckResult of_at = gradcheck(loss, at, dat);
      CHECK_MESSAGE(of_at.passed, of_at.message());
    }
  }
}

TEST_CASE("every error names its argument and leaves the output alone") {
  const RotaryFrequencies f = rope_frequencies(12);
  CHECK_THROWS_WITH_AS(axial_axes(f, 0), "eigenblocks: axes (0) must be at least 1",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(alternating_axes(f, -2), "eigenblocks: axes (-2) must be at least 1",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(axial_axes(f, 171),
                       "eigenblocks: axes (171) * rotary_dim (12) must be at most 2048",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(cyclic_axes(f, 0), "eigenblocks: axes (0) must be at least 1",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(cyclic_axes({}, 2), doctest::Contains("inv_freq has 0 entries"),
                       invalid_argument);
  CHECK_THROWS_WITH_AS(section_axes(f, {2, 3}),
                       "eigenblocks: the sum of sections (5) must be the number of pairs (6)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(section_axes(f, {7, -1}),
                       "eigenblocks: sections[1] (-1) must be in [0, 2048]", invalid_argument);
  CHECK_THROWS_WITH_AS(section_axes(f, std::vector<Index>{}),
                       "eigenblocks: sections has 0 entries, expected one for each axis",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(interleaved_section_axes(f, {3, 3}),
                       "eigenblocks: sections has 2 entries, expected 3 (time, row, column)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(interleaved_section_axes(f, {1, 2, 2}),
                       "eigenblocks: the sum of sections (5) must be the number of pairs (6)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(
      interleaved_section_axes(f, {1, 3, 2}),
      "eigenblocks: 3 * sections[1] (3) must be at most the number of pairs (6) + 1",
      invalid_argument);
  CHECK_THROWS_WITH_AS(interleaved_section_axes(f, {1, 2, 3}),
                       "eigenblocks: 3 * sections[2] (3) must be at most the number of pairs (6)",
                       invalid_argument);

  const auto refuse = [](const char* message, const RotaryAxes& axes, RopeLayout layout) {
    CHECK_THROWS_WITH_AS(RotaryNdTable<float>(axes, layout), message, invalid_argument);
  };
  refuse("eigenblocks: axis has 2 entries, expected 6 (one for each pair)",
         {.frequencies = f, .axis = {0, 0}, .axes = 1}, RopeLayout::half);
  refuse("eigenblocks: axis[5] (2) is outside [0, axes), axes = 2",
         {.frequencies = f, .axis = {0, 1, 0, 1, 0, 2}, .axes = 2}, RopeLayout::half);
  refuse("eigenblocks: axes (0) must be at least 1", {.frequencies = f, .axis = {}, .axes = 0},
         RopeLayout::half_per_axis);
  refuse("eigenblocks: axes (4) must divide the number of pairs (6) for half_per_axis",
         cyclic_axes(f, 4), RopeLayout::half_per_axis);
  refuse("eigenblocks: layout (9) must be interleaved (0), half (1) or half_per_axis (2)",
         cyclic_axes(f, 2), static_cast<RopeLayout>(9));
  refuse("eigenblocks: rotary_dim (2050) must be at most 2048",
         cyclic_axes(rope_frequencies(2050), 2), RopeLayout::half);
  CHECK_THROWS_WITH_AS(RotaryTable<float>(f, RopeLayout::half_per_axis),
                       "eigenblocks: layout (2) must be interleaved (0) or half (1)",
                       invalid_argument);

  const RotaryNdTable<float> table(cyclic_axes(f, 2), RopeLayout::half);
  CHECK(table.axes() == 2);
  CHECK(table.positions() == 65536);
  CHECK(table.bytes() == (256 + 256 + 2 + 1) * 12 * sizeof(float));
  const Matrix<float> x = Matrix<float>::Ones(3, 24);
  Matrix<float> y = Matrix<float>::Constant(3, 24, 7.0f), wrong(3, 12);
  const Matrix<double> narrow(3, 1), few(2, 2), good = Matrix<double>::Zero(3, 2);
  CHECK_THROWS_WITH_AS(rope_forward(x, narrow, table, y, {.heads = 2}),
                       "eigenblocks: positions is 3 x 1, expected 3 x 2 (rows of the input x axes)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_backward_in_place(y, few, table, {.heads = 2}),
                       "eigenblocks: positions is 2 x 2, expected 3 x 2 (rows of the input x axes)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_forward(x, good, table, wrong, {.heads = 2}),
                       "eigenblocks: y is 3 x 12, expected 3 x 24 (the shape of the input)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_forward(x, good, table, y, {}),
                       "eigenblocks: heads (0) must be at least 1", invalid_argument);
  CHECK(y == Matrix<float>::Constant(3, 24, 7.0f));

  Matrix<double> gradient = Matrix<double>::Constant(3, 3, 7.0);
  CHECK_THROWS_WITH_AS(rope_position_backward(x, x, table, gradient, {.heads = 2}),
                       "eigenblocks: d_positions is 3 x 3, expected 3 x 2 (rows of y x axes)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(rope_position_backward(x, wrong, table, gradient, {.heads = 2}),
                       "eigenblocks: dy is 3 x 12, expected 3 x 24 (the shape of y)",
                       invalid_argument);
  CHECK(gradient == Matrix<double>::Constant(3, 3, 7.0));

  Matrix<float> none(0, 24);  // no rows is valid
  rope_in_place(none, Matrix<double>(0, 2), table, {.heads = 2});
  rope_in_place(none, 0, table, {.heads = 2});
}
