// The tanh RNN and the GRU: against plain formulas, gradients, Jacobians, steps, errors.
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/ssm/gru.hpp>
#include <eigenblocks/ssm/rnn.hpp>

#include "support/alloc_guard.hpp"
#include "support/layer_checks.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr eb::GruVariant kVariants[] = {eb::GruVariant::reset_after, eb::GruVariant::reset_before};

Vector<double> vector_of(eb::Random& random, Index n, double spread = 1) {
  return eb::normal_matrix<double>(random, n, 1, spread).col(0);
}

struct Rnn {
  Matrix<double> u, w, x, dx, du, dw;
  Vector<double> x0, dx0;
  Rnn(Index tokens, Index n, std::uint64_t seed = 1) {
    eb::Random random(seed);
    u = eb::normal_matrix<double>(random, tokens, n);
    w = eb::normal_matrix<double>(random, n, n, 0.7 / std::sqrt(double(n)));
    x0 = vector_of(random, n);
    dx = eb::normal_matrix<double>(random, tokens, n);
    x = du = Matrix<double>::Constant(tokens, n, kNan);
    dw = Matrix<double>::Constant(n, n, kNan);
    dx0 = Vector<double>::Constant(n, kNan);
  }
  void forward() { eb::rnn_tanh_forward(u, w, x0, x); }
  void backward(eb::ExecutorRef executor = {}) {
    eb::rnn_tanh_backward(w, x0, x, dx, du, dw, dx0, executor);
  }
  double loss() {
    forward();
    return (dx.array() * x.array()).sum();
  }
};

struct Gru {
  eb::GruOptions options;
  eb::GruWeights<double> w, dw;
  Matrix<double> x, h, dh, dx;
  Vector<double> h0, dh0;
  Gru(Index tokens, Index in, Index n, eb::GruVariant variant, std::uint64_t seed = 2)
      : options{variant} {
    eb::Random random(seed);
    x = eb::normal_matrix<double>(random, tokens, in);
    w = {eb::normal_matrix<double>(random, in, 3 * n, 0.8),
         eb::normal_matrix<double>(random, n, 3 * n, 1.2 / std::sqrt(double(n))),
         vector_of(random, 3 * n, 0.3), vector_of(random, 3 * n, 0.3)};
    dw = eb::gru_zeros<double>(in, n);
    h0 = vector_of(random, n);
    dh = eb::normal_matrix<double>(random, tokens, n);
    h = Matrix<double>::Constant(tokens, n, kNan);
    dx = Matrix<double>::Constant(tokens, in, kNan);
    dh0 = Vector<double>::Constant(n, kNan);
  }
  void forward() { eb::gru_forward(x, w, h0, h, options); }
  void backward(eb::ExecutorRef executor = {}) {
    eb::gru_backward(x, w, h0, h, dh, dx, dw, dh0, options, executor);
  }
  double loss() {
    forward();
    return (dh.array() * h.array()).sum();
  }
  /// The formula, one entry after the other.
  Matrix<double> plain() const {
    const Index n = w.size();
    const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
    Matrix<double> out(x.rows(), n);
    Vector<double> state = h0;
    for (Index t = 0; t < x.rows(); ++t) {
      Vector<double> r(n), z(n), next(n);
      const auto input = [&](Index j) { return x.row(t).dot(w.input.col(j)) + w.input_bias[j]; };
      for (Index i = 0; i < n; ++i) {
        r[i] = sigmoid(input(i) + state.dot(w.hidden.col(i)) + w.hidden_bias[i]);
        z[i] = sigmoid(input(n + i) + state.dot(w.hidden.col(n + i)) + w.hidden_bias[n + i]);
      }
      for (Index i = 0; i < n; ++i) {
        const Index j = 2 * n + i;
        const double inside = options.variant == eb::GruVariant::reset_after
                                  ? r[i] * (state.dot(w.hidden.col(j)) + w.hidden_bias[j])
                                  : r.cwiseProduct(state).dot(w.hidden.col(j)) + w.hidden_bias[j];
        next[i] = (1 - z[i]) * std::tanh(input(j) + inside) + z[i] * state[i];
      }
      state = next;
      out.row(t) = state.transpose();
    }
    return out;
  }
};

void check_gradient(const eb::GradcheckResult& result) {
  CHECK_MESSAGE(result.passed, result.message());
}

/// Largest difference of J from central differences of the cell's forward, and of its diagonal from J.
template <class C>
void check_jacobian(const C& cell, const Matrix<double>& prev, const Matrix<double>& u) {
  const Index n = cell.size(), rows = prev.rows();
  Matrix<double> f(rows, n), up(rows, n), down(rows, n), jacobian(rows, n * n), diagonal(rows, n);
  Vector<double> scratch(std::max<Index>(1, eb::detail::cell_scratch(cell, rows)));
  const auto forward = [&](const Matrix<double>& at, Matrix<double>& out) {
    eb::detail::cell_forward<C>(cell, at, u, out, scratch.data());
  };
  for (Index j = 0; j < n; ++j) {
    constexpr double h = 1e-5;
    Matrix<double> moved = prev;
    moved.col(j).array() += h;
    forward(moved, up);
    moved.col(j).array() -= 2 * h;
    forward(moved, down);
    forward(prev, f);
    eb::detail::cell_jacobian<C>(cell, prev, u, f, jacobian, scratch.data());
    for (Index i = 0; i < n; ++i) {
      const Vector<double> slope = (up.col(i) - down.col(i)) / (2 * h);
      CHECK((slope - jacobian.col(i * n + j)).cwiseAbs().maxCoeff() < 1e-8);
    }
  }
  Matrix<double> tangents(rows, cell.tangent_size());
  if constexpr (eb::detail::CellWithScratch<C>) {
    cell.jacobian_diagonal(prev, u, f, diagonal, scratch.data());
    cell.tangents(prev, u, f, tangents, scratch.data());
  } else {
    cell.jacobian_diagonal(prev, u, f, diagonal);
    cell.tangents(prev, u, f, tangents);
  }
  Vector<double> tmp(2 * n);
  for (Index t = 0; t < rows; ++t) {  // the factored form is the same matrix
    const Eigen::Map<const Matrix<double>> j(&jacobian(t, 0), n, n);
    const Vector<double> v = prev.row((t + 1) % rows).transpose(), start = prev.row(0).transpose();
    Vector<double> y = start, z = start;
    cell.multiply(&tangents(t, 0), v.data(), y.data(), tmp.data());
    cell.multiply_transposed(&tangents(t, 0), v.data(), z.data(), tmp.data());
    CHECK((y - start - j.lazyProduct(v)).cwiseAbs().maxCoeff() < 1e-13);
    CHECK((z - start - j.transpose().lazyProduct(v)).cwiseAbs().maxCoeff() < 1e-13);
  }
  for (Index i = 0; i < n; ++i) {
    CHECK((diagonal.col(i) - jacobian.col(i * n + i)).cwiseAbs().maxCoeff() < 1e-13);
  }
}

}  // namespace

TEST_CASE("rnn_tanh is the recurrence, for widths that fill packets and that do not") {
  for (const Index n : {1, 2, 3, 4, 7, 8, 19, 33, 70}) {
    Rnn r(5, n);
    r.forward();
    Vector<double> state = r.x0;
    for (Index t = 0; t < 5; ++t) {
      Vector<double> next(n);
      for (Index j = 0; j < n; ++j) next[j] = std::tanh(state.dot(r.w.col(j)) + r.u(t, j));
      state = next;
      CHECK((r.x.row(t).transpose() - state).cwiseAbs().maxCoeff() < 1e-14);
    }
  }
}

TEST_CASE("rnn_tanh gradients are finite differences") {
  Rnn r(6, 5);
  r.forward();
  r.backward();
  const auto loss = [&] { return r.loss(); };
  check_gradient(eb::gradcheck(loss, r.u, r.du));
  check_gradient(eb::gradcheck(loss, r.w, r.dw));
  Eigen::Map<Matrix<double>> x0(r.x0.data(), 1, 5);
  check_gradient(eb::gradcheck(loss, x0, r.dx0.transpose()));
}

TEST_CASE("rnn_tanh: chunks give the bits of the whole, views as well, no tokens are fine") {
  Rnn r(13, 6);
  r.forward();
  for (const Index split : {0, 1, 5, 13}) {
    auto state = eb::rnn_tanh_state<double>(6);
    state.x = r.x0;
    Matrix<double> wide = Matrix<double>::Constant(13, 9, 5.0);
    eb::rnn_tanh_step(state, r.w, r.u.topRows(split), wide.topLeftCorner(split, 6));
    eb::rnn_tanh_step(state, r.w, r.u.bottomRows(13 - split), wide.bottomLeftCorner(13 - split, 6));
    CHECK((wide.leftCols(6) == r.x));
    CHECK((wide.rightCols(3).array() == 5.0).all());
    CHECK((state.x == r.x.row(12).transpose()));
  }
  Rnn none(0, 3);
  none.forward();
  none.backward();
  CHECK(none.dw.isZero(0));
  CHECK(none.dx0.isZero(0));
}

TEST_CASE("gru is the formula, both variants") {
  for (const auto variant : kVariants) {
    for (const Index n : {1, 3, 4, 11, 18}) {
      for (const Index tokens : {1, 9, 150}) {
        Gru g(tokens, 3, n, variant);
        g.forward();
        CHECK(largest_difference(g.h, g.plain()) < 1e-13);
      }
    }
  }
}

TEST_CASE("gru gradients are finite differences") {
  for (const auto variant : kVariants) {
    Gru g(5, 2, 3, variant);
    g.forward();
    g.backward();
    const auto loss = [&] { return g.loss(); };
    const auto row = [](Vector<double>& v) {
      return Eigen::Map<Matrix<double>>(v.data(), 1, v.size());
    };
    check_gradient(eb::gradcheck(loss, g.x, g.dx));
    check_gradient(eb::gradcheck(loss, g.w.input, g.dw.input));
    check_gradient(eb::gradcheck(loss, g.w.hidden, g.dw.hidden));
    check_gradient(eb::gradcheck(loss, row(g.w.input_bias), row(g.dw.input_bias)));
    check_gradient(eb::gradcheck(loss, row(g.w.hidden_bias), row(g.dw.hidden_bias)));
    check_gradient(eb::gradcheck(loss, row(g.h0), row(g.dh0)));
  }
}

TEST_CASE("gru: chunks agree with the whole, a copy of the state is a snapshot") {
  for (const auto variant : kVariants) {
    Gru g(21, 3, 5, variant);
    g.forward();
    for (const Index size : {1, 4, 12, 21}) {
      auto state = eb::gru_state(g.w);
      state.h = g.h0;
      Matrix<double> h(21, 5);
      for (Index t = 0; t < 21; t += size) {
        const Index n = std::min<Index>(size, 21 - t);
        auto snapshot = state;
        Matrix<double> again(n, 5);
        eb::gru_step(state, g.w, g.x.middleRows(t, n), h.middleRows(t, n), g.options);
        eb::gru_step(snapshot, g.w, g.x.middleRows(t, n), again, g.options);
        CHECK((again == h.middleRows(t, n)));
      }
      CHECK(largest_difference(h, g.h) < 1e-14);
    }
    Gru none(0, 2, 3, variant);
    none.forward();
    none.backward();
    CHECK(none.dw.hidden.isZero(0));
    CHECK(none.dh0.isZero(0));
  }
}

TEST_CASE(
    "gates that are saturated: z = 1 keeps the state, z = 0 and r = 0 forget it, NaN stays in its "
    "sequence") {
  for (const auto variant : kVariants) {
    Gru g(4, 2, 3, variant);
    g.w.input_bias.segment(3, 3).setConstant(1000);
    g.forward();
    CHECK(largest_difference(g.h, g.h0.transpose().replicate(4, 1)) < 1e-300);
    g.w.input_bias.segment(3, 3).setConstant(-1000);
    g.w.input_bias.head(3).setConstant(-1000);
    g.w.hidden_bias.setZero();
    g.forward();
    const Matrix<double> inputs = eb::gru_inputs(g.x, g.w);
    CHECK(largest_difference(g.h, inputs.rightCols(3).array().tanh().matrix()) < 1e-15);
    g.x(2, 0) = kNan;
    g.forward();
    CHECK(g.h.topRows(2).allFinite());
    CHECK(g.h.row(2).array().isNaN().all());
  }
}

TEST_CASE("Jacobians and their diagonals are finite differences") {
  eb::Random random(7);
  for (const Index n : {1, 3, 6}) {
    const Matrix<double> prev = eb::normal_matrix<double>(random, 5, n, 0.5);
    const Rnn r(5, n);
    check_jacobian(eb::tanh_cell(r.w), prev, r.u);
    for (const auto variant : kVariants) {
      const Gru g(5, 2, n, variant);
      check_jacobian(eb::gru_cell(g.w, g.options), prev, eb::gru_inputs(g.x, g.w));
    }
  }
}

TEST_CASE("weight gradients do not depend on the executor") {
  Rnn r(300, 9);
  Gru g(300, 4, 9, eb::GruVariant::reset_after);
  r.forward();
  g.forward();
  r.backward();
  g.backward();
  for (const int workers : {2, 3, 7}) {
    const eb::thread_pool pool(workers);
    Rnn r2 = r;
    Gru g2 = g;
    r2.backward(pool);
    g2.backward(pool);
    CHECK((r2.dw == r.dw));
    CHECK((r2.du == r.du));
    CHECK((g2.dw.hidden == g.dw.hidden));
    CHECK((g2.dw.input == g.dw.input));
    CHECK((g2.dx == g.dx));
    Matrix<double> h = g.h;
    eb::gru_forward(g.x, g.w, g.h0, h, g.options, pool);
    CHECK((h == g.h));
  }
}

TEST_CASE("steps allocate nothing") {
  Rnn r(8, 6);
  Gru g(8, 3, 6, eb::GruVariant::reset_before);
  auto rnn = eb::rnn_tanh_state<double>(6);
  auto gru = eb::gru_state(g.w);
  const auto step = [&] {
    eb::rnn_tanh_step(rnn, r.w, r.u, r.x);
    eb::gru_step(gru, g.w, g.x, g.h, g.options);
  };
  step();
  const AllocationCount count;
  step();
  if (AllocationCount::available) CHECK(count.calls() == 0);
}

TEST_CASE("wrong operands are named, and nothing is written") {
  Rnn r(4, 3);
  Gru g(4, 2, 3, eb::GruVariant::reset_after);
  using Error = eb::invalid_argument;
  const Matrix<double> wide(4, 5);
  check_throws<Error>([&] { eb::rnn_tanh_forward(wide, r.w, r.x0, r.x); },
                      "u is 4 x 5, expected 4 x 3 (any rows, rows of weight)");
  check_throws<Error>([&] { eb::rnn_tanh_forward(r.u, wide, r.x0, r.x); },
                      "weight is 4 x 5, expected 4 x 4 (a square matrix)");
  check_throws<Error>([&] { eb::tanh_cell(Matrix<double>(0, 0)); },
                      "weight is 0 x 0, expected at least 1 x 1");
  check_throws<Error>([&] { eb::rnn_tanh_forward(r.u, r.w, g.w.input_bias, r.x); },
                      "initial has 9 entries, expected 3 (rows of weight)");
  check_throws<Error>([&] { eb::rnn_tanh_backward(r.w, r.x0, r.u, wide, r.du, r.dw, r.dx0); },
                      "dout is 4 x 5, expected 4 x 3 (shape of out)");
  check_throws<Error>([&] { eb::gru_forward(wide, g.w, g.h0, g.h); },
                      "x is 4 x 5, expected 4 x 2 (any rows, rows of weights.input)");
  check_throws<Error>([&] { eb::rnn_tanh_state<double>(0); },
                      "rnn_tanh_state: size (0) must be at least 1");
  auto bad = g.w;
  bad.hidden_bias.resize(4);
  check_throws<Error>([&] { eb::gru_forward(g.x, bad, g.h0, g.h); },
                      "weights.hidden_bias has 4 entries, expected 9 (3H)");
  check_throws<Error>([&] { eb::gru_cell(bad); },
                      "weights.hidden_bias has 4 entries, expected 9 (3H)");
  auto dw = g.dw;
  dw.hidden.resize(3, 3);
  check_throws<Error>([&] { eb::gru_backward(g.x, g.w, g.h0, g.dh, g.dh, g.dx, dw, g.dh0); },
                      "dweights.hidden is 3 x 3, expected 3 x 9 (shape of weights.hidden)");
  CHECK(r.x.array().isNaN().all());
  CHECK(g.h.array().isNaN().all());
  CHECK(g.dx.array().isNaN().all());
  CHECK(r.du.array().isNaN().all());
}
