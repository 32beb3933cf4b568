#include <doctest/doctest.h>

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/glu.hpp>

#include <utility>
#include <vector>

using namespace eigenblocks;

namespace {

constexpr Activation kKinds[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                 Activation::relu, Activation::sigmoid};

template <class S>
Matrix<S> activated(Activation kind, const Matrix<S>& a) {
  Matrix<S> y(a.rows(), a.cols());
  activation_forward(kind, a, y);
  return y;
}

struct Ffn {
  Matrix<double> x, wg, wu, wd, dy;
  Ffn(Random& random, Index tokens, Index d, Index f, Index out)
      : x(normal_matrix<double>(random, tokens, d)),
        wg(normal_matrix<double>(random, d, f)),
        wu(normal_matrix<double>(random, d, f)),
        wd(normal_matrix<double>(random, f, out)),
        dy(normal_matrix<double>(random, tokens, out)) {}
};

}  // namespace

TEST_CASE_TEMPLATE("glu: the fused passes are activation and product, to the bit", S, float,
                   double) {
  Random random(1);
  const thread_pool pool(3);
  for (const Activation kind : kKinds) {
    for (const auto& s : {std::pair<Index, Index>{0, 4}, {2, 0}, {1, 1}, {3, 17}, {70, 1003}}) {
      const Index rows = s.first, cols = s.second;
      CAPTURE(static_cast<int>(kind));
      CAPTURE(cols);
      const Matrix<S> a = normal_matrix<S>(random, rows, cols, 3.0),
                      b = normal_matrix<S>(random, rows, cols),
                      dh = normal_matrix<S>(random, rows, cols);
      Matrix<S> h(rows, cols), da(rows, cols), db(rows, cols), a2 = a, b2 = b, slope(rows, cols);
      glu_forward(a, b, h, kind);
      const Matrix<S> f = activated(kind, a);
      CHECK(h == Matrix<S>(f.cwiseProduct(b)));
      glu_forward(a2, b2, a2, kind, pool);
      CHECK(a2 == h);

      glu_backward(a, b, dh, da, db, kind);
      activation_backward(kind, a, Matrix<S>(dh.cwiseProduct(b)), slope);
      CHECK(da == slope);
      CHECK(db == Matrix<S>(dh.cwiseProduct(f)));
      a2 = a;  // outputs over inputs
      glu_backward(a2, b2, dh, a2, b2, kind, pool);
      CHECK(a2 == da);
      CHECK(b2 == db);
    }
  }
}

TEST_CASE("glu_ffn: forward is its formula, gradients match finite differences") {
  Random random(2);
  for (const Activation kind : kKinds) {
    CAPTURE(static_cast<int>(kind));
    Ffn n(random, 3, 5, 7, 4);
    const GluFfnOptions options{.activation = kind};
    Matrix<double> y(3, 4), dx(3, 5), dwg(5, 7), dwu(5, 7), dwd(7, 4);
    GluFfnSaved<double> saved;
    Workspace workspace;
    glu_ffn_forward(n.x, n.wg, n.wu, n.wd, y, saved, workspace, options);
    const Matrix<double> a = n.x * n.wg, b = n.x * n.wu;
    const Matrix<double> want = activated(kind, a).cwiseProduct(b) * n.wd;
    CHECK((y - want).cwiseAbs().maxCoeff() <=
          1e-13 * (1 + want.cwiseAbs().maxCoeff()));  // sums of 7, 5 terms
    CHECK(y == glu_ffn(n.x, n.wg, n.wu, n.wd, options));
    REQUIRE((kind != Activation::relu || a.cwiseAbs().minCoeff() > 0.03));  // away from the kink

    glu_ffn_backward(saved, n.x, n.wg, n.wu, n.wd, n.dy, dx, dwg, dwu, dwd, workspace, options);
    const auto loss = [&] {
      return glu_ffn(n.x, n.wg, n.wu, n.wd, options).cwiseProduct(n.dy).sum();
    };
    const auto check = [&](Matrix<double>& of, const Matrix<double>& gradient) {
      const auto result = gradcheck(loss, of, gradient);
      CHECK_MESSAGE(result.passed, result.message());
    };
    check(n.x, dx);
    check(n.wg, dwg);
    check(n.wu, dwu);
    check(n.wd, dwd);
  }
}

TEST_CASE("glu_ffn: no tokens, no width, one token at a time, threads") {
  Random random(3);
  const Ffn none(random, 0, 3, 4, 3), thin(random, 2, 3, 0, 3);
  CHECK(glu_ffn(none.x, none.wg, none.wu, none.wd).rows() == 0);
  CHECK((glu_ffn(thin.x, thin.wg, thin.wu, thin.wd).array() == 0).all());

  const Ffn n(random, 9, 6, 16, 6);
  const Matrix<double> whole = glu_ffn(n.x, n.wg, n.wu, n.wd);
  GluFfnSaved<double> saved;
  Workspace workspace;
  Matrix<double> row(1, 6);
  for (Index t = 0; t < 9; ++t) {
    glu_ffn_forward(n.x.row(t), n.wg, n.wu, n.wd, row, saved, workspace);
    CHECK((row - whole.row(t)).cwiseAbs().maxCoeff() <= 1e-13 * (1 + whole.cwiseAbs().maxCoeff()));
  }

  const Ffn big(random, 300, 100, 600, 100);  // cut into blocks
  const thread_pool pool(3);
  const auto run = [&](ExecutorRef executor) {
    std::vector<Matrix<double>> all{Matrix<double>(300, 100), big.x, big.wg, big.wu, big.wd};
    glu_ffn_forward(big.x, big.wg, big.wu, big.wd, all[0], saved, workspace, {}, executor);
    glu_ffn_backward(saved, big.x, big.wg, big.wu, big.wd, big.dy, all[1], all[2], all[3], all[4],
                     workspace, {}, executor);
    return all;
  };
  CHECK(run(serial) == run(pool));
}

TEST_CASE("glu refuses what does not fit, before writing") {
  Matrix<float> a = Matrix<float>::Ones(2, 3), narrow = Matrix<float>::Constant(2, 2, 5.f), h(2, 3);
#define REFUSES(call, text) CHECK_THROWS_WITH_AS(call, "eigenblocks: " text, invalid_argument)
  REFUSES(glu_forward(a, narrow, h), "b is 2 x 2, expected 2 x 3 (shape of a)");
  REFUSES(glu_forward(a, a, narrow), "h is 2 x 2, expected 2 x 3 (shape of a)");
  REFUSES(glu_backward(a, narrow, a, h, h), "b is 2 x 2, expected 2 x 3 (shape of a)");
  REFUSES(glu_backward(a, a, narrow, h, h), "dh is 2 x 2, expected 2 x 3 (shape of a)");
  REFUSES(glu_backward(a, a, a, narrow, h), "da is 2 x 2, expected 2 x 3 (shape of a)");
  REFUSES(glu_backward(a, a, a, h, narrow), "db is 2 x 2, expected 2 x 3 (shape of a)");

  Matrix<float> x(2, 3), wg(3, 4), wu(3, 4), wd(4, 3), y(2, 3), dx(2, 3), dwg(3, 4), dwu(3, 4),
      dwd(4, 3);
  for (Matrix<float>* m : {&x, &wg, &wu, &wd, &y}) m->setConstant(0.5f);
  GluFfnSaved<float> saved, unused;
  Workspace workspace;
  REFUSES(glu_ffn_forward(x, wd, wu, wd, y, saved, workspace), "w_gate has 4 rows, x has 3 cols");
  REFUSES(glu_ffn_forward(x, wg, x, wd, y, saved, workspace),
          "w_up is 2 x 3, expected 3 x 4 (shape of w_gate)");
  REFUSES(glu_ffn_forward(x, wg, wu, wg, y, saved, workspace),
          "w_down has 3 rows, w_gate has 4 cols");
  REFUSES(glu_ffn_forward(x, wg, wu, wd, wg, saved, workspace),
          "y is 3 x 4, expected 2 x 3 (rows of x, cols of w_down)");
  CHECK(saved.gate.size() == 0);
  glu_ffn_forward(x, wg, wu, wd, y, saved, workspace);
  const auto backward = [&](const GluFfnSaved<float>& s, auto& dy_, auto& dx_, auto& dwg_,
                            auto& dwu_, auto& dwd_) {
    glu_ffn_backward(s, x, wg, wu, wd, dy_, dx_, dwg_, dwu_, dwd_, workspace);
  };
  REFUSES(backward(unused, y, dx, dwg, dwu, dwd),
          "saved.gate is 0 x 0, expected 2 x 4 (rows of x, cols of w_gate)");
  unused.gate = saved.gate;
  REFUSES(backward(unused, y, dx, dwg, dwu, dwd),
          "saved.up is 0 x 0, expected 2 x 4 (rows of x, cols of w_gate)");
  REFUSES(backward(saved, wd, dx, dwg, dwu, dwd),
          "dy is 4 x 3, expected 2 x 3 (rows of x, cols of w_down)");
  REFUSES(backward(saved, y, wd, dwg, dwu, dwd), "dx is 4 x 3, expected 2 x 3 (shape of x)");
  REFUSES(backward(saved, y, dx, dwd, dwu, dwd),
          "dw_gate is 4 x 3, expected 3 x 4 (shape of w_gate)");
  REFUSES(backward(saved, y, dx, dwg, dwd, dwd), "dw_up is 4 x 3, expected 3 x 4 (shape of w_up)");
  REFUSES(backward(saved, y, dx, dwg, dwu, dwg),
          "dw_down is 3 x 4, expected 4 x 3 (shape of w_down)");
#undef REFUSES
  CHECK((narrow.array() == 5.f).all());
}
