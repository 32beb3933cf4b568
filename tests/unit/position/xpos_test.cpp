#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/position/xpos.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <type_traits>

namespace {

using namespace eigenblocks;

constexpr RopeLayout kLayouts[] = {RopeLayout::interleaved, RopeLayout::half};

double zeta(Index p, Index rotary_dim, const XposOptions& o) {
  return (2.0 * double(p) / double(rotary_dim) + o.gamma) / (1 + o.gamma);
}

/// The definition, in double: x rotated, then times zeta^(sign (n - c)/scale_base).
Matrix<double> definition(Matrix<double> x, const Vector<double>& positions,
                          const RotaryFrequencies& f, RopeLayout layout, const XposOptions& o,
                          Index heads, double sign, bool transpose) {
  const Index pairs = f.pairs(), dim = x.cols() / heads;
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index head = 0; head < heads; ++head) {
      for (Index p = 0; p < pairs; ++p) {
        const Index a = head * dim + (layout == RopeLayout::half ? p : 2 * p);
        const Index b = layout == RopeLayout::half ? a + pairs : a + 1;
        const double n = positions[i], angle = (transpose ? -n : n) * f.inv_freq[p];
        const double scale = std::pow(zeta(p, 2 * pairs, o), sign * (n - o.center) / o.scale_base);
        const double x_a = x(i, a), x_b = x(i, b);
        x(i, a) = scale * (x_a * std::cos(angle) - x_b * std::sin(angle));
        x(i, b) = scale * (x_a * std::sin(angle) + x_b * std::cos(angle));
      }
    }
  }
  return x;
}

}  // namespace

TEST_CASE_TEMPLATE("queries and keys follow the definition", S, float, double) {
  Random random(1);
  // The fine table, both tables, beyond a table of 512, negative, fractional.
  Vector<double> positions(10);
  positions << 0, 1, 100, 255, 256, 511, 2000, -3, -600, 777.25;
  const RotaryFrequencies f = rope_frequencies(22);
  const double bound = std::is_same_v<S, float> ? 4e-7 : 3e-15;
  for (const RopeLayout layout : kLayouts) {
    for (const double center : {0.0, 300.0, 256.0, -100.5}) {
      for (const Index table_positions : {512, 0}) {
        const XposOptions o{.gamma = 0.7, .scale_base = 300.0, .center = center};
        const XposTables<S> tables = xpos_tables<S>(f, layout, o, table_positions);
        const Matrix<S> x = normal_matrix<S>(random, 10, 2 * 24);
        const Matrix<double> wide = x.template cast<double>();
        for (const bool transpose : {false, true}) {
          for (const double sign : {1.0, -1.0}) {
            const RotaryTable<S>& table = sign > 0 ? tables.query : tables.key;
            Matrix<S> y(10, 48);
            if (transpose) {
              rope_backward(x, positions, table, y, {.heads = 2});
            } else {
              rope_forward(x, positions, table, y, {.heads = 2});
            }
            const Matrix<double> want =
                definition(wide, positions, f, layout, o, 2, sign, transpose);
            for (Index i = 0; i < 10; ++i) {  // an error relative to the scale of the row
              const double largest = std::max(want.row(i).cwiseAbs().maxCoeff(), 6.0);
              REQUIRE((y.row(i).template cast<double>() - want.row(i)).cwiseAbs().maxCoeff() <=
                      largest * (bound + std::abs(positions[i]) * 3e-16));
            }
          }
        }
      }
    }
  }
}

TEST_CASE("a score depends on the distance only, and fades with it") {
  Random random(2);
  const RotaryFrequencies f = rope_frequencies(16);
  const XposOptions o{};
  const Matrix<double> q = normal_matrix<double>(random, 1, 16),
                       k = normal_matrix<double>(random, 1, 16);
  for (const RopeLayout layout : kLayouts) {
    const XposTables<double> plain = xpos_tables<double>(f, layout),
                             moved = xpos_tables<double>(f, layout, {.center = 1000});
    const auto score = [&](const XposTables<double>& t, Index m, Index n) {
      return rope(q, m, t.query, {.heads = 1}).row(0).dot(rope(k, n, t.key, {.heads = 1}).row(0));
    };
    double want = 0;
    for (Index p = 0; p < 8; ++p) {
      const Index a = layout == RopeLayout::half ? p : 2 * p,
                  b = layout == RopeLayout::half ? p + 8 : 2 * p + 1;
      const double angle = 400 * f.inv_freq[p];
      want += std::pow(zeta(p, 16, o), 400 / 512.0) *
              ((q(0, a) * k(0, a) + q(0, b) * k(0, b)) * std::cos(angle) +
               (q(0, a) * k(0, b) - q(0, b) * k(0, a)) * std::sin(angle));
    }
    for (const Index n : {0, 77, 256, 1000, 3000}) {
      CHECK(score(plain, n + 400, n) == doctest::Approx(want).epsilon(1e-11));
      CHECK(score(moved, n + 400, n) == doctest::Approx(want).epsilon(1e-11));
    }
    // The last pair is the slowest to fade: zeta_7^(50000/512) = 1.1e-4.
    CHECK(std::abs(score(plain, 50'000, 0)) < 1.1e-4 * q.norm() * k.norm());
  }
}

TEST_CASE("a center keeps float in range where the start of the text would not") {
  const RotaryFrequencies f = rope_frequencies(8);
  const Matrix<float> x = Matrix<float>::Ones(1, 8);
  const auto key = [&](const XposOptions& o) {
    return rope(x, 50'000, xpos_tables<float>(f, RopeLayout::half, o).key, {.heads = 1});
  };
  CHECK(!key({}).allFinite());
  CHECK(key({.center = 49'000}).allFinite());
  // The scale of the last pair at the center is 1, and position 0 is then no identity.
  const XposTables<float> centered =
      xpos_tables<float>(f, RopeLayout::half, {.scale_base = 10, .center = 20});
  const Matrix<float> at_zero = rope(x, 0, centered.query, {.heads = 1});
  CHECK(at_zero(0, 0) == doctest::Approx(std::pow(0.4 / 1.4, -2.0)).epsilon(1e-6));
  CHECK(rope(x, 0, xpos_tables<float>(f, RopeLayout::half).query, {.heads = 1}) == x);
}

TEST_CASE("gradients against finite differences") {
  Random random(3);
  RotaryFrequencies f = rope_frequencies(10, 100.0);
  f.attention_factor = 1.3;
  for (const RopeLayout layout : kLayouts) {
    const XposTables<double> tables =
        xpos_tables<double>(f, layout, {.scale_base = 8, .center = 2});
    for (const RotaryTable<double>* table : {&tables.query, &tables.key}) {
      const RopeOptions options{.heads = 2, .first_channel = 1};
      Matrix<double> x = normal_matrix<double>(random, 5, 24), at(5, 1), dx(5, 24);
      const Matrix<double> dy = normal_matrix<double>(random, 5, 24);
      at << 0, 3, -2.5, 6, 1.25;
      const auto loss = [&] { return rope(x, at.col(0), *table, options).cwiseProduct(dy).sum(); };
      rope_backward(dy, at.col(0), *table, dx, options);
      const GradcheckResult of_x = gradcheck(loss, x, dx);
      CHECK_MESSAGE(of_x.passed, of_x.message());
      Vector<double> gradient(5);
      rope_position_backward(rope(x, at.col(0), *table, options), dy, *table, gradient, options);
      const GradcheckResult of_n = gradcheck(loss, at, Matrix<double>(gradient));
      CHECK_MESSAGE(of_n.passed, of_n.message());
    }
  }
}

TEST_CASE("every error names its argument") {
  const RotaryFrequencies f = rope_frequencies(8);
  const double inf = std::numeric_limits<double>::infinity();
  const auto refuse = [&](const char* message, const XposOptions& o) {
    CHECK_THROWS_WITH_AS(xpos_tables<float>(f, RopeLayout::half, o), message, invalid_argument);
  };
  refuse("eigenblocks: gamma (0) must be positive and finite", {.gamma = 0});
  refuse("eigenblocks: gamma (inf) must be positive and finite", {.gamma = inf});
  refuse("eigenblocks: scale_base (-512) must be positive and finite", {.scale_base = -512});
  refuse("eigenblocks: center (inf) must be finite", {.center = inf});
  CHECK_THROWS_WITH_AS(xpos_tables<float>({}, RopeLayout::half),
                       doctest::Contains("inv_freq has 0 entries"), invalid_argument);
  CHECK_THROWS_WITH_AS(xpos_tables<float>(f, RopeLayout::half_per_axis),
                       "eigenblocks: layout (2) must be interleaved (0) or half (1)",
                       invalid_argument);
}
