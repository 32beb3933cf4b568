#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/optim/adamw.hpp>

#include <cmath>
#include <limits>
#include <utility>

using namespace eigenblocks;

namespace {

/// The formula of the header, number by number in double.
struct Reference {
  Matrix<double> w, m, v;
  int t = 0;
  void step(const Matrix<double>& g, const AdamWOptions& o) {
    ++t;
    for (Index i = 0; i < w.size(); ++i) {
      double &wi = w.data()[i], &mi = m.data()[i], &vi = v.data()[i];
      const double gi = g.data()[i];
      wi *= 1 - o.lr * o.weight_decay;
      mi = o.beta1 * mi + (1 - o.beta1) * gi;
      vi = o.beta2 * vi + (1 - o.beta2) * gi * gi;
      const double bottom = std::sqrt(vi) / std::sqrt(1 - std::pow(o.beta2, t)) + o.eps;
      wi -= o.lr / (1 - std::pow(o.beta1, t)) * mi / bottom;
    }
  }
};

}  // namespace

TEST_CASE_TEMPLATE("adamw_step is the formula, odd sizes included", S, float, double) {
  const AdamWOptions variants[] = {
      {},
      {.lr = 0.03, .beta2 = 0.95, .weight_decay = 0.1},
      {.lr = 0.1, .beta1 = 0, .beta2 = 0, .eps = 1e-3, .weight_decay = 0}};
  Random random(5);
  for (const AdamWOptions& options : variants) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{0, 3}, {1, 1}, {3, 5}, {7, 37}}) {
      Matrix<S> w = normal_matrix<S>(random, rows, cols);
      const Matrix<double> zero = Matrix<double>::Zero(rows, cols);
      Reference want{w.template cast<double>(), zero, zero};
      AdamWState<S> state;
      for (int t = 0; t < 6; ++t) {
        const Matrix<S> g = normal_matrix<S>(random, rows, cols);
        adamw_step(w, g, state, options);
        want.step(g.template cast<double>(), options);
      }
      // Six steps of a dozen roundings each, of numbers below 8; m and v the same.
      const double tolerance =
          6 * 12 * 8 * double(std::numeric_limits<S>::epsilon()) * double(w.size());
      CHECK((w.template cast<double>() - want.w).cwiseAbs().sum() <= tolerance);
      CHECK((state.m.template cast<double>() - want.m).cwiseAbs().sum() <= tolerance);
      CHECK((state.v.template cast<double>() - want.v).cwiseAbs().sum() <= tolerance);
      CHECK(state.step == 6);
    }
  }
}

TEST_CASE("adamw_step: the first step moves every weight by lr against the sign of its gradient") {
  Matrix<double> w = Matrix<double>::Zero(1, 5), g(1, 5);
  g << 3, -1e-3, 1e4, 0, -7;
  AdamWState<double> state;
  adamw_step(w, g, state, {.lr = 0.5});
  const double sign[] = {-1, 1, -1, 0, 1};
  for (Index i = 0; i < 5; ++i) CHECK(w(0, i) == doctest::Approx(0.5 * sign[i]).epsilon(2e-5));
  CHECK(w(0, 3) == 0.0);
}

TEST_CASE_TEMPLATE("adamw_step: equal bits for blocks, vectors, executors and a resumed run", S,
                   float, double) {
  const AdamWOptions options{.lr = 0.01, .beta2 = 0.95, .weight_decay = 0.1};
  Random random(6);
  const Index rows = 103, cols = 671;  // more than two pieces
  const Matrix<S> start = normal_matrix<S>(random, rows, cols);
  const Matrix<S> g1 = normal_matrix<S>(random, rows, cols),
                  g2 = normal_matrix<S>(random, rows, cols);
  Matrix<S> w = start;
  AdamWState<S> state;
  adamw_step(w, g1, state, options);
  const Matrix<S> saved_w = w;
  const AdamWState<S> saved = state;
  const S *const m = state.m.data(), *const v = state.v.data();
  adamw_step(w, g2, state, options);
  CHECK(state.m.data() == m);  // no new memory after the first step
  CHECK(state.v.data() == v);
  CHECK_FALSE(state == saved);

  Matrix<S> resumed = saved_w;
  AdamWState<S> resumed_state = saved;
  adamw_step(resumed, g2, resumed_state, options);
  CHECK(resumed == w);
  CHECK(resumed_state == state);

  for (const int workers : {1, 2, 3, 7}) {
    const thread_pool pool(workers);
    Matrix<S> other = start;
    AdamWState<S> other_state;
    adamw_step(other, g1, other_state, options, pool);
    adamw_step(other, g2, other_state, options, pool);
    CHECK(other == w);
    CHECK(other_state == state);
  }

  Matrix<S> wide = Matrix<S>::Constant(rows + 2, cols + 3, S(9));
  auto block = wide.block(1, 2, rows, cols);
  block = start;
  AdamWState<S> block_state;
  adamw_step(block, g1, block_state, options);
  adamw_step(block, g2, block_state, options);
  CHECK(Matrix<S>(block) == w);
  CHECK(block_state == state);
  CHECK(wide.row(0).minCoeff() == S(9));
  CHECK(wide.col(1).maxCoeff() == S(9));
  CHECK(wide.col(cols + 2).maxCoeff() == S(9));

  Vector<S> column = start.row(0);
  const RowVector<S> v1 = g1.row(0), v2 = g2.row(0);
  AdamWState<S> vector_state;
  adamw_step(column, v1, vector_state, options);
  adamw_step(column, v2, vector_state, options);
  CHECK(column == Vector<S>(w.row(0)));
}

TEST_CASE_TEMPLATE("adamw_step: zero, huge and infinite gradients", S, float, double) {
  Matrix<S> w = Matrix<S>::Constant(3, 5, S(2));
  AdamWState<S> state;
  const Matrix<S> none = Matrix<S>::Zero(3, 5);
  adamw_step(w, none, state, {.lr = 0.5, .weight_decay = 0.5});
  CHECK(w == Matrix<S>::Constant(3, 5, S(1.5)));  // decay alone, exactly
  // v overflows to infinity: the update becomes 0, not NaN.
  const Matrix<S> huge =
      Matrix<S>::Constant(3, 5, std::sqrt(std::numeric_limits<S>::max()) * S(100));
  adamw_step(w, huge, state, {.weight_decay = 0});
  CHECK(w == Matrix<S>::Constant(3, 5, S(1.5)));
  Matrix<S> poisoned = none;
  poisoned(1, 2) = std::numeric_limits<S>::quiet_NaN();
  state = {};
  adamw_step(w, poisoned, state, {.weight_decay = 0});
  CHECK(std::isnan(w(1, 2)));  // and nothing else
  w(1, 2) = S(1.5);
  CHECK(w == Matrix<S>::Constant(3, 5, S(1.5)));
}

TEST_CASE("adamw_step: bad input leaves everything as it was") {
  Matrix<float> w = Matrix<float>::Ones(2, 3);
  const Matrix<float> g = Matrix<float>::Ones(2, 3), wrong = Matrix<float>::Ones(3, 2);
  AdamWState<float> state;
  CHECK_THROWS_WITH_AS(adamw_step(w, wrong, state),
                       "eigenblocks: adamw_step: grad is 3 x 2, expected 2 x 3 (shape of param)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(adamw_step(w, g, state, {.lr = -1}),
                       "eigenblocks: adamw_step: lr (-1) must not be negative", invalid_argument);
  CHECK_THROWS_WITH_AS(adamw_step(w, g, state, {.beta1 = 1}),
                       "eigenblocks: adamw_step: beta1 (1) must be in [0, 1)", invalid_argument);
  CHECK_THROWS_WITH_AS(adamw_step(w, g, state, {.beta2 = -0.1}),
                       "eigenblocks: adamw_step: beta2 (-0.1) must be in [0, 1)", invalid_argument);
  CHECK_THROWS_WITH_AS(adamw_step(w, g, state, {.eps = -1}),
                       "eigenblocks: adamw_step: eps (-1) must not be negative", invalid_argument);
  CHECK_THROWS_WITH_AS(adamw_step(w, g, state, {.weight_decay = -1}),
                       "eigenblocks: adamw_step: weight_decay (-1) must not be negative",
                       invalid_argument);
  CHECK(w == g);
  CHECK(state == AdamWState<float>{});
  adamw_step(w, g, state);
  const Matrix<float> before = w;
  CHECK_THROWS_WITH_AS(adamw_step(w.leftCols(2), g.leftCols(2), state),
                       "eigenblocks: adamw_step: state.m is 2 x 3, expected 2 x 2 (shape of param)",
                       invalid_argument);
  CHECK(w == before);
  CHECK(state.step == 1);
}
