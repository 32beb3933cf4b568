#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/optim/sgd.hpp>

#include <cmath>
#include <limits>
#include <utility>

using namespace eigenblocks;

namespace {

/// The formula of the header, number by number in double.
struct Reference {
  Matrix<double> w, buf;
  bool started = false;
  void step(const Matrix<double>& g, const SgdOptions& o) {
    for (Index i = 0; i < w.size(); ++i) {
      double d = g.data()[i] + o.weight_decay * w.data()[i];
      if (o.momentum > 0) {
        double& b = buf.data()[i];
        b = started ? o.momentum * b + (1 - o.dampening) * d : d;
        d = o.nesterov ? d + o.momentum * b : b;
      }
      w.data()[i] -= o.lr * d;
    }
    started = started || o.momentum > 0;
  }
};

}  // namespace

TEST_CASE_TEMPLATE("sgd_step is the formula, for every variant and odd sizes", S, float, double) {
  const SgdOptions variants[] = {
      {.lr = 0.1},
      {.lr = 0.1, .weight_decay = 0.2},
      {.lr = 0.1, .momentum = 0.9},
      {.lr = 0.1, .momentum = 0.9, .dampening = 0.3, .weight_decay = 0.1},
      {.lr = 0.1, .momentum = 0.9, .nesterov = true, .weight_decay = 0.1}};
  Random random(3);
  for (const SgdOptions& options : variants) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{0, 3}, {1, 1}, {3, 5}, {7, 37}}) {
      Matrix<S> w = normal_matrix<S>(random, rows, cols);
      Reference want{w.template cast<double>(), Matrix<double>::Zero(rows, cols)};
      SgdState<S> state;
      for (int t = 0; t < 5; ++t) {
        const Matrix<S> g = normal_matrix<S>(random, rows, cols);
        sgd_step(w, g, state, options);
        want.step(g.template cast<double>(), options);
      }
      // Five steps of at most eight roundings, of numbers below 8.
      const double tolerance = 5 * 8 * 8 * double(std::numeric_limits<S>::epsilon());
      CHECK((w.template cast<double>() - want.w).cwiseAbs().sum() <= tolerance * double(w.size()));
      CHECK(state.started == (options.momentum > 0));
      CHECK(state.buffer.size() == (options.momentum > 0 ? w.size() : 0));
    }
  }
}

TEST_CASE_TEMPLATE("sgd_step: equal bits for blocks, vectors, executors and a resumed run", S,
                   float, double) {
  const SgdOptions options{.lr = 0.1, .momentum = 0.9, .weight_decay = 0.01};
  Random random(4);
  const Index rows = 103, cols = 671;  // more than two pieces
  const Matrix<S> start = normal_matrix<S>(random, rows, cols);
  const Matrix<S> g1 = normal_matrix<S>(random, rows, cols),
                  g2 = normal_matrix<S>(random, rows, cols);
  Matrix<S> w = start;
  SgdState<S> state;
  sgd_step(w, g1, state, options);
  const Matrix<S> saved_w = w;
  const SgdState<S> saved = state;
  const S* const buffer = state.buffer.data();
  sgd_step(w, g2, state, options);
  CHECK(state.buffer.data() == buffer);  // no new memory after the first step
  CHECK_FALSE(state == saved);

  Matrix<S> resumed = saved_w;
  SgdState<S> resumed_state = saved;
  sgd_step(resumed, g2, resumed_state, options);
  CHECK(resumed == w);
  CHECK(resumed_state == state);

  for (const int workers : {1, 2, 3, 7}) {
    const thread_pool pool(workers);
    Matrix<S> other = start;
    SgdState<S> other_state;
    sgd_step(other, g1, other_state, options, pool);
    sgd_step(other, g2, other_state, options, pool);
    CHECK(other == w);
    CHECK(other_state == state);
  }

  Matrix<S> wide = Matrix<S>::Constant(rows + 2, cols + 3, S(9));
  auto block = wide.block(1, 2, rows, cols);
  block = start;
  SgdState<S> block_state;
  sgd_step(block, g1, block_state, options);
  sgd_step(block, g2, block_state, options);
  CHECK(Matrix<S>(block) == w);
  CHECK(block_state == state);
  CHECK(wide.row(0).minCoeff() == S(9));
  CHECK(wide.col(1).maxCoeff() == S(9));
  CHECK(wide.col(cols + 2).maxCoeff() == S(9));

  Vector<S> column = start.row(0);
  const RowVector<S> v1 = g1.row(0), v2 = g2.row(0);
  SgdState<S> vector_state;
  sgd_step(column, v1, vector_state, options);
  sgd_step(column, v2, vector_state, options);
  CHECK(column == Vector<S>(w.row(0)));
}

TEST_CASE("sgd_step: bad input leaves everything as it was") {
  Matrix<float> w = Matrix<float>::Ones(2, 3);
  const Matrix<float> g = Matrix<float>::Ones(2, 3), wrong = Matrix<float>::Ones(3, 2);
  SgdState<float> state;
  CHECK_THROWS_WITH_AS(sgd_step(w, wrong, state),
                       "eigenblocks: sgd_step: grad is 3 x 2, expected 2 x 3 (shape of param)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(sgd_step(w, g, state, {.lr = -1}),
                       "eigenblocks: sgd_step: lr (-1) must not be negative", invalid_argument);
  CHECK_THROWS_WITH_AS(sgd_step(w, g, state, {.momentum = -1}),
                       "eigenblocks: sgd_step: momentum (-1) must not be negative",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(sgd_step(w, g, state, {.weight_decay = -1}),
                       "eigenblocks: sgd_step: weight_decay (-1) must not be negative",
                       invalid_argument);
  const char* nesterov =
      "eigenblocks: sgd_step: nesterov needs momentum (0) > 0 and dampening (0) = 0";
  CHECK_THROWS_WITH_AS(sgd_step(w, g, state, {.nesterov = true}), nesterov, invalid_argument);
  CHECK_THROWS_AS(sgd_step(w, g, state, {.momentum = 0.9, .dampening = 0.1, .nesterov = true}),
                  invalid_argument);
  CHECK(w == g);
  CHECK(state == SgdState<float>{});
  sgd_step(w, g, state, {.momentum = 0.9});
  CHECK_THROWS_WITH_AS(
      sgd_step(w.leftCols(2), g.leftCols(2), state, {.momentum = 0.9}),
      "eigenblocks: sgd_step: state.buffer is 2 x 3, expected 2 x 2 (shape of param)",
      invalid_argument);
}
