#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/optim/muon.hpp>

#include <cmath>
#include <limits>
#include <utility>

using namespace eigenblocks;

namespace {

/// The formula of the header, with newton_schulz as a black box.
template <class S>
struct Reference {
  Matrix<S> w, buf;
  void step(const Matrix<S>& g, const MuonOptions& o) {
    const S mu = static_cast<S>(o.momentum);
    buf = mu * buf + (1 - mu) * g;
    const Matrix<S> u = o.nesterov ? Matrix<S>((1 - mu) * g + mu * buf) : buf;
    const bool in_out = o.layout == MuonLayout::in_out;
    const double scale =
        muon_scale(in_out ? w.rows() : w.cols(), in_out ? w.cols() : w.rows(), o.adjust);
    w = static_cast<S>(1 - o.lr * o.weight_decay) * w -
        static_cast<S>(o.lr * scale) * newton_schulz(u, o.newton_schulz);
  }
};

}  // namespace

TEST_CASE("muon_scale: the four rules") {
  CHECK(muon_scale(4, 16, MuonAdjust::original) == 2.0);
  CHECK(muon_scale(16, 4, MuonAdjust::original) == 1.0);
  CHECK(muon_scale(16, 4, MuonAdjust::spectral_unclamped) == 0.5);
  CHECK(muon_scale(25, 4, MuonAdjust::match_rms_adamw) == doctest::Approx(1.0));
  CHECK(muon_scale(4, 25, MuonAdjust::match_rms_adamw) == doctest::Approx(1.0));
  CHECK(muon_scale(3, 70, MuonAdjust::naive) == 1.0);
}

TEST_CASE_TEMPLATE("muon_step is the formula, for every rule, layout and odd shape", S, float,
                   double) {
  Random random(12);
  for (const MuonAdjust adjust : {MuonAdjust::original, MuonAdjust::match_rms_adamw,
                                  MuonAdjust::spectral_unclamped, MuonAdjust::naive}) {
    for (const MuonLayout layout : {MuonLayout::in_out, MuonLayout::out_in}) {
      for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {1, 5}, {5, 1}, {13, 7}}) {
        MuonOptions options{.lr = 0.02, .adjust = adjust, .layout = layout};
        options.nesterov = rows != 5;
        Matrix<S> w = normal_matrix<S>(random, rows, cols);
        Reference<S> want{w, Matrix<S>::Zero(rows, cols)};
        MuonState<S> state;
        for (int t = 0; t < 3; ++t) {
          const Matrix<S> g = normal_matrix<S>(random, rows, cols);
          muon_step(w, g, state, options);
          want.step(g, options);
        }
        // The iteration amplifies the rounding of its input by up to 3.4445^5 = 485; lr times scale
        // is below 0.05.
        const double eps = double(std::numeric_limits<S>::epsilon());
        CHECK(double((w - want.w).cwiseAbs().maxCoeff()) <= 485 * 4 * 0.05 * eps + 20 * eps);
        CHECK(double((state.momentum - want.buf).cwiseAbs().maxCoeff()) <= 10 * eps);
      }
    }
  }
}

TEST_CASE_TEMPLATE("muon_step: heads are matrices of their own", S, float, double) {
  Random random(13);
  const Matrix<S> start = normal_matrix<S>(random, 10, 12), g = normal_matrix<S>(random, 10, 12);
  for (const MuonLayout layout : {MuonLayout::in_out, MuonLayout::out_in}) {
    const bool in_out = layout == MuonLayout::in_out;
    MuonOptions options{.lr = 0.1, .layout = layout, .heads = 2};
    Matrix<S> whole = start, parts = start;
    MuonState<S> state, first, second;
    muon_step(whole, g, state, options);
    options.heads = 1;
    if (in_out) {
      muon_step(parts.leftCols(6), g.leftCols(6), first, options);
      muon_step(parts.rightCols(6), g.rightCols(6), second, options);
    } else {
      muon_step(parts.topRows(5), g.topRows(5), first, options);
      muon_step(parts.bottomRows(5), g.bottomRows(5), second, options);
    }
    CHECK(whole == parts);
    Matrix<S> unsplit = start;
    state = {};
    muon_step(unsplit, g, state, options);
    CHECK_FALSE(unsplit == whole);
  }
}

TEST_CASE_TEMPLATE("muon_step: equal bits for blocks, executors and a resumed run", S, float,
                   double) {
  const MuonOptions options{.lr = 0.02, .newton_schulz = {.steps = 2}};
  Random random(14);
  const Index rows = 131, cols = 277;
  const Matrix<S> start = normal_matrix<S>(random, rows, cols);
  const Matrix<S> g1 = normal_matrix<S>(random, rows, cols),
                  g2 = normal_matrix<S>(random, rows, cols);
  Matrix<S> w = start;
  MuonState<S> state;
  muon_step(w, g1, state, options);
  const Matrix<S> saved_w = w;
  const MuonState<S> saved = state;  // a copy has the momentum and no scratch
  CHECK(saved == state);
  CHECK(saved.workspace.bytes() == 0);
  const std::size_t bytes = state.workspace.bytes();
  const S* const momentum = state.momentum.data();
  muon_step(w, g2, state, options);
  CHECK(state.workspace.bytes() == bytes);  // no new memory after the first step
  CHECK(state.momentum.data() == momentum);
  CHECK_FALSE(saved == state);

  Matrix<S> resumed = saved_w;
  MuonState<S> resumed_state{.momentum = saved.momentum};
  muon_step(resumed, g2, resumed_state, options);
  CHECK(resumed == w);
  CHECK(resumed_state == state);

  for (const int workers : {1, 2, 3, 7}) {
    const thread_pool pool(workers);
    Matrix<S> other = start;
    MuonState<S> other_state;
    muon_step(other, g1, other_state, options, pool);
    muon_step(other, g2, other_state, options, pool);
    CHECK(other == w);
    CHECK(other_state == state);
  }
  Matrix<S> wide = Matrix<S>::Constant(rows + 1, cols + 3, S(9));
  auto block = wide.block(1, 2, rows, cols);
  block = start;
  MuonState<S> block_state;
  muon_step(block, g1, block_state, options);
  muon_step(block, g2, block_state, options);
  CHECK(Matrix<S>(block) == w);
  CHECK(wide.row(0).minCoeff() == S(9));
  CHECK(wide.col(1).maxCoeff() == S(9));
  CHECK(wide.col(cols + 2).maxCoeff() == S(9));
}

TEST_CASE("muon_step: decay keeps the weights below 1.21 scale / weight_decay") {
  // Spectral norm by the Gram matrix: |W|_2^2 <= |W|_F^2, so the Frobenius norm over sqrt(rank) is
  // checked, a weaker form that needs no SVD.
  Random random(15);
  Matrix<double> w = normal_matrix<double>(random, 8, 8, 10.0);
  MuonState<double> state;
  const MuonOptions options{.lr = 0.5, .weight_decay = 1.0};
  for (int t = 0; t < 100; ++t) {
    muon_step(w, normal_matrix<double>(random, 8, 8), state, options);
  }
  CHECK(w.norm() / std::sqrt(8.0) <= 1.21);
  CHECK(w.norm() > 0.1);
}

TEST_CASE("muon_step: zero gradients, empty matrices") {
  Matrix<float> w = Matrix<float>::Constant(3, 4, 2.0f), none(0, 4);
  MuonState<float> state, empty;
  const Matrix<float> zero = Matrix<float>::Zero(3, 4);
  muon_step(w, zero, state, {.lr = 0.5, .weight_decay = 0.5});
  CHECK(w == Matrix<float>::Constant(3, 4, 1.5f));
  muon_step(none, none, empty);
}

TEST_CASE("muon_step: bad input leaves everything as it was") {
  Matrix<float> w = Matrix<float>::Ones(2, 3);
  const Matrix<float> g = Matrix<float>::Ones(2, 3), wrong = Matrix<float>::Ones(3, 2);
  MuonState<float> state;
  CHECK_THROWS_WITH_AS(muon_step(w, wrong, state),
                       "eigenblocks: muon_step: grad is 3 x 2, expected 2 x 3 (shape of weight)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(muon_step(w, g, state, {.lr = -1}),
                       "eigenblocks: muon_step: lr (-1) must not be negative", invalid_argument);
  CHECK_THROWS_WITH_AS(muon_step(w, g, state, {.momentum = -1}),
                       "eigenblocks: muon_step: momentum (-1) must not be negative",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(muon_step(w, g, state, {.weight_decay = -1}),
                       "eigenblocks: muon_step: weight_decay (-1) must not be negative",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(muon_step(w, g, state, {.heads = 2}),
                       "eigenblocks: muon_step: heads (2) must divide fan_out (3)",
                       invalid_argument);
  CHECK_THROWS_AS(muon_step(w, g, state, {.heads = 0}), invalid_argument);
  CHECK_THROWS_AS(muon_step(w, g, state, {.newton_schulz = {.steps = 100}}), invalid_argument);
  CHECK(w == g);
  CHECK(state == MuonState<float>{});
  muon_step(w, g, state);
  CHECK_THROWS_WITH_AS(
      muon_step(w.leftCols(2), g.leftCols(2), state),
      "eigenblocks: muon_step: state.momentum is 2 x 3, expected 2 x 2 (shape of weight)",
      invalid_argument);
}
