// Gradients of the norms, and what they refuse.
#include <doctest/doctest.h>

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/nn/norm.hpp>

#include <limits>

using namespace eigenblocks;

namespace {

struct Shape {
  Index rows, heads, d;
};
const Shape kShapes[] = {{1, 1, 2}, {3, 1, 5}, {2, 3, 4}, {2, 2, 17}};

void check(const GradcheckResult& result) { CHECK_MESSAGE(result.passed, result.message()); }

}  // namespace

TEST_CASE("norm gradients against finite differences, with and without gain and bias") {
  Random random(1);
  for (const auto& s : kShapes) {
    const Index rows = s.rows, heads = s.heads, d = s.d;
    for (const bool gain : {true, false}) {
      CAPTURE(d);
      CAPTURE(gain);
      const Index cols = heads * d;
      Matrix<double> x = normal_matrix<double>(random, rows, cols);
      Matrix<double> w = normal_matrix<double>(random, gain ? 1 : 0, d);
      Matrix<double> b = normal_matrix<double>(random, 1, d);
      const Matrix<double> dy = normal_matrix<double>(random, rows, cols);
      Matrix<double> y(rows, cols), dx(rows, cols);
      Matrix<double> dw(w.rows(), d), db(1, d);
      Vector<double> r(rows * heads);
      // The gains as vectors; an empty one means none.
      const auto as_vector = [](Matrix<double>& m) {
        return Eigen::Map<Vector<double>>(m.data(), m.size());
      };
      const auto loss = [&] { return y.cwiseProduct(dy).sum(); };

      const RmsNormOptions rms{.eps = 0.01, .heads = heads};
      rms_norm_forward(x, as_vector(w), y, r, rms);
      rms_norm_backward(x, as_vector(w), r, dy, dx, as_vector(dw), rms);
      const auto run_rms = [&] {
        rms_norm_forward(x, as_vector(w), y, rms);
        return loss();
      };
      check(gradcheck(run_rms, x, dx));
      if (gain) check(gradcheck(run_rms, w, dw));

      const LayerNormOptions layer{.eps = 0.01, .heads = heads};
      layer_norm_forward(x, as_vector(w), as_vector(b), y, r, layer);
      layer_norm_backward(x, as_vector(w), r, dy, dx, as_vector(dw), as_vector(db), layer);
      const auto run_layer = [&] {
        layer_norm_forward(x, as_vector(w), as_vector(b), y, layer);
        return loss();
      };
      check(gradcheck(run_layer, x, dx));
      check(gradcheck(run_layer, b, db));
      if (gain) check(gradcheck(run_layer, w, dw));

      for (const double eps : {1e-12, 1e3}) {  // above and below the threshold
        const L2NormalizeOptions l2{.eps = eps, .heads = heads};
        l2_normalize_forward(x, y, r, l2);
        l2_normalize_backward(x, r, dy, dx, l2);
        check(gradcheck(
            [&] {
              l2_normalize_forward(x, y, l2);
              return loss();
            },
            x, dx));
      }
    }
  }
}

TEST_CASE("norm gradients of many rows are the sums over single rows") {
  // 16 blocks at most, whatever the number of rows: the blocks' sums must meet.
  Random random(2);
  const Index rows = 700, d = 96;
  const Matrix<double> x = normal_matrix<double>(random, rows, d),
                       dy = normal_matrix<double>(random, rows, d);
  const Vector<double> w = normal_matrix<double>(random, d, 1);
  Vector<double> r(rows), dw(d), db(d), dw_row(d), db_row(d), dw_sum = Vector<double>::Zero(d),
                                                              db_sum = dw_sum;
  Matrix<double> y(rows, d), dx(rows, d), dx_row(1, d);
  layer_norm_forward(x, w, w, y, r);
  layer_norm_backward(x, w, r, dy, dx, dw, db);
  for (Index i = 0; i < rows; ++i) {
    layer_norm_backward(x.row(i), w, r.segment(i, 1), dy.row(i), dx_row, dw_row, db_row);
    CHECK(dx_row == dx.row(i));
    dw_sum += dw_row;
    db_sum += db_row;
  }
  const double tolerance = rows * std::numeric_limits<double>::epsilon();  // times terms of size 1
  CHECK((dw - dw_sum).cwiseAbs().maxCoeff() <= 10 * tolerance);
  CHECK((db - db_sum).cwiseAbs().maxCoeff() <= 10 * tolerance);
}

TEST_CASE("norms refuse what does not fit, before writing") {
  Matrix<float> x = Matrix<float>::Ones(2, 6), y = Matrix<float>::Constant(2, 6, 5.f);
  Matrix<float> narrow(2, 5);
  Vector<float> w3 = Vector<float>::Ones(3), w4 = Vector<float>::Ones(4), r2(2), r4(4), d3(3),
                d4(4);
  const Vector<float> none;
#define REFUSES(call, text) CHECK_THROWS_WITH_AS(call, "eigenblocks: " text, invalid_argument)
  REFUSES(rms_norm_forward(x, w3, y, {.heads = 4}), "heads (4) must divide the columns of x (6)");
  REFUSES(rms_norm_forward(x, w3, y, {.heads = 0}), "heads (0) must divide the columns of x (6)");
  REFUSES(rms_norm_forward(x, none, y, {.eps = 0}), "eps (0) must be a positive normal number");
  REFUSES(rms_norm_forward(x, none, y, {.eps = 1e-40}),
          "eps (1e-40) must be a positive normal number");
  REFUSES(rms_norm_forward(x, none, y, {.eps = std::numeric_limits<double>::quiet_NaN()}),
          "eps (nan) must be a positive normal number");
  REFUSES(rms_norm_forward(x, w4, y, {.heads = 2}),
          "gain has 4 entries, expected 3 (columns of x / heads, or 0 for none)");
  REFUSES(rms_norm_forward(x, w3, narrow, {.heads = 2}), "y is 2 x 5, expected 2 x 6 (shape of x)");
  REFUSES(rms_norm_forward(x, w3, y, r2, {.heads = 2}),
          "rstd has 2 entries, expected 4 (rows of x * heads)");
  REFUSES(layer_norm_forward(x, w3, w4, y, {.heads = 2}),
          "bias has 4 entries, expected 3 (columns of x / heads, or 0 for none)");
  REFUSES(layer_norm_forward(x, none, none, y, r2, {.heads = 2}),
          "rstd has 2 entries, expected 4 (rows of x * heads)");
  REFUSES(l2_normalize_forward(x, y, r2, {.heads = 2}),
          "rnorm has 2 entries, expected 4 (rows of x * heads)");
  REFUSES(l2_normalize_forward(x, narrow), "y is 2 x 5, expected 2 x 6 (shape of x)");

  const RmsNormOptions rms{.heads = 2};
  REFUSES(rms_norm_backward(x, w4, r4, x, y, d3, rms),
          "gain has 4 entries, expected 3 (columns of x / heads, or 0 for none)");
  REFUSES(rms_norm_backward(x, w3, r2, x, y, d3, rms),
          "rstd has 2 entries, expected 4 (rows of x * heads)");
  REFUSES(rms_norm_backward(x, w3, r4, narrow, y, d3, rms),
          "dy is 2 x 5, expected 2 x 6 (shape of x)");
  REFUSES(rms_norm_backward(x, w3, r4, x, narrow, d3, rms),
          "dx is 2 x 5, expected 2 x 6 (shape of x)");
  REFUSES(rms_norm_backward(x, w3, r4, x, y, d4, rms),
          "dgain has 4 entries, expected 3 (size of gain)");
  const LayerNormOptions layer{.heads = 2};
  REFUSES(layer_norm_backward(x, w3, r4, x, y, d4, d3, layer),
          "dgain has 4 entries, expected 3 (size of gain)");
  REFUSES(layer_norm_backward(x, w3, r4, x, y, d3, d4, layer),
          "dbias has 4 entries, expected 3 (columns of x / heads, or 0 for none)");
  REFUSES(l2_normalize_backward(x, r2, x, y, {.heads = 2}),
          "rnorm has 2 entries, expected 4 (rows of x * heads)");
  REFUSES(l2_normalize_backward(x, r4, narrow, y, {.heads = 2}),
          "dy is 2 x 5, expected 2 x 6 (shape of x)");
#undef REFUSES
  CHECK((y.array() == 5.f).all());
}
