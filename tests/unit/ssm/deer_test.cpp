// DEER and ELK against the sequential recurrence: sweeps, guarantees, failures that say so, gradients, user cells.
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/ssm/deer.hpp>
#include <eigenblocks/ssm/gru.hpp>
#include <eigenblocks/ssm/rnn.hpp>

#include "support/layer_checks.hpp"

#include <doctest/doctest.h>
#include <Eigen/LU>

#include <cmath>
#include <limits>
#include <string>

namespace eb = eigenblocks;
using eb::DeerMethod;
using eb::Index;
using eb::Matrix;
using eb::Vector;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr DeerMethod kMethods[] = {DeerMethod::newton, DeerMethod::quasi, DeerMethod::su_const,
                                   DeerMethod::jacobi};

/// A random tanh RNN of gain g: entries of W of standard deviation g/sqrt(N), of u 0.5.
struct Rnn {
  Matrix<double> w, u, x;
  Vector<double> x0;
  Rnn(Index tokens, Index n, double gain, std::uint64_t seed = 1) {
    eb::Random random(seed);
    w = eb::normal_matrix<double>(random, n, n, gain / std::sqrt(static_cast<double>(n)));
    u = eb::normal_matrix<double>(random, tokens, n, 0.5);
    x0 = eb::normal_matrix<double>(random, n, 1, 0.5).col(0);
    x.resize(tokens, n);
    eb::rnn_tanh_forward(u, w, x0, x);
  }
  eb::DeerStatus solve(Matrix<double>& out, const eb::DeerOptions& options,
                       eb::ExecutorRef executor = {}) const {
    return eb::deer_forward(eb::tanh_cell(w), u, x0, out, options, executor);
  }
};

constexpr eb::DeerOptions tight(DeerMethod method) {
  return {.method = method, .atol = 1e-12, .rtol = 0, .max_sweeps = 300};
}

/// The least a cell can be: no scratch, no diagonal, no constant, no loop of its own.  h' = c tanh(h_shifted) + u.
struct ShiftCell {
  using Scalar = double;
  double c;
  Index width;
  Index size() const { return width; }
  Index input_size() const { return width; }
  void forward(const eb::ConstMatrixRef<double>& prev, const eb::ConstMatrixRef<double>& u,
               eb::MatrixRef<double> out) const {
    for (Index t = 0; t < prev.rows(); ++t) {
      for (Index i = 0; i < width; ++i) {
        out(t, i) = c * std::tanh(prev(t, i) + 0.5 * prev(t, (i + 1) % width)) + u(t, i);
      }
    }
  }
  void jacobian(const eb::ConstMatrixRef<double>& prev, const eb::ConstMatrixRef<double>&,
                const eb::ConstMatrixRef<double>&, eb::MatrixRef<double> jacobian) const {
    jacobian.setZero();
    for (Index t = 0; t < prev.rows(); ++t) {
      for (Index i = 0; i < width; ++i) {
        const double f = std::tanh(prev(t, i) + 0.5 * prev(t, (i + 1) % width));
        jacobian(t, i * width + i) += c * (1 - f * f);
        jacobian(t, i * width + (i + 1) % width) += 0.5 * c * (1 - f * f);
      }
    }
  }
};
static_assert(eb::RecurrentCell<ShiftCell>);
static_assert(eb::RecurrentCell<eb::TanhCell<double>> && eb::RecurrentCell<eb::GruCell<float>>);
static_assert(!eb::RecurrentCell<Rnn>);

}  // namespace

TEST_CASE("all methods find the states of the sequential recurrence") {
  for (const Index tokens : {1, 2, 50, 700}) {
    const Rnn r(tokens, 5, 0.5);
    for (const DeerMethod method : kMethods) {
      for (const auto guess : {eb::DeerGuess::initial, eb::DeerGuess::zeros}) {
        auto options = tight(method);
        options.guess = guess;
        Matrix<double> x = Matrix<double>::Constant(tokens, 5, kNan);
        const eb::DeerStatus s = r.solve(x, options);
        CHECK(s.converged);
        CHECK(!s.fell_back);
        CHECK(s.found == tokens);
        CHECK(Index(s.residuals.size()) == s.sweeps);
        CHECK(largest_difference(x, r.x) < 1e-11);
      }
    }
  }
  const Rnn none(0, 3, 1);
  Matrix<double> x(0, 3);
  const eb::DeerStatus s = none.solve(x, {});
  CHECK(s.converged);
  CHECK(s.sweeps == 0);
}

TEST_CASE(
    "sweeps are those of the specification: few for Newton, whatever T; tens for the others") {
  for (const Index tokens : {100, 1000, 5000}) {
    const Rnn mild(tokens, 4, 0.5), strong(tokens, 8, 0.9);
    Matrix<double> x(tokens, 4), y(tokens, 8);
    CHECK(mild.solve(x, tight(DeerMethod::newton)).sweeps <= 7);
    const Index quasi = mild.solve(x, tight(DeerMethod::quasi)).sweeps;
    CHECK(quasi >= 10);
    CHECK(quasi <= 60);
    CHECK(mild.solve(x, tight(DeerMethod::su_const)).sweeps <= 40);
    const eb::DeerStatus s = strong.solve(y, tight(DeerMethod::newton));
    CHECK(s.converged);
    CHECK(s.sweeps <= 20);
    CHECK(largest_difference(y, strong.x) < 1e-11);
  }
}

TEST_CASE("Newton converges quadratically") {
  const Rnn r(400, 6, 0.6);
  Matrix<double> x = Matrix<double>::Zero(400, 6);
  const auto residuals = eb::deer_sweeps(eb::tanh_cell(r.w), r.u, r.x0, x, 6);
  for (std::size_t k = 1; k < residuals.size(); ++k) {
    if (residuals[k - 1] < 0.1)
      CHECK(residuals[k] < 3 * residuals[k - 1] * residuals[k - 1] + 1e-14);
  }
  CHECK(residuals.back() < 1e-14);
}

TEST_CASE("after k sweeps the first k states are exact, whatever stands for the Jacobian") {
  const Rnn r(12, 4, 2.0);
  eb::Random random(5);
  const Matrix<double> guess = eb::normal_matrix<double>(random, 12, 4);
  for (const DeerMethod method : kMethods) {
    for (const Index k : {1, 2, 5, 12}) {
      Matrix<double> x = guess;
      const auto residuals =
          eb::deer_sweeps(eb::tanh_cell(r.w), r.u, r.x0, x, k, {.method = method});
      CHECK(Index(residuals.size()) == k);
      CHECK(largest_difference(x.topRows(k), r.x.topRows(k)) < 1e-11);
      if (k < 5) CHECK(largest_difference(x, r.x) > 1e-6);
    }
  }
}

TEST_CASE("a sweep is its definition") {
  const Rnn r(300, 3, 0.8);
  eb::Random random(6);
  const Matrix<double> old = eb::normal_matrix<double>(random, 300, 3, 0.4);
  for (const DeerMethod method : kMethods) {
    Matrix<double> x = old, want(300, 3);
    const auto residuals = eb::deer_sweeps(eb::tanh_cell(r.w), r.u, r.x0, x, 1, {.method = method});
    Vector<double> y = r.x0;
    for (Index t = 0; t < 300; ++t) {
      const Vector<double> prev = t == 0 ? r.x0 : Vector<double>(old.row(t - 1).transpose());
      const Vector<double> f =
          (r.w.transpose() * prev + r.u.row(t).transpose()).array().tanh().matrix();
      Matrix<double> j = (1 - f.array().square()).matrix().asDiagonal() * r.w.transpose();
      if (method == DeerMethod::quasi) j = Matrix<double>(j.diagonal().asDiagonal());
      if (method == DeerMethod::su_const) j = r.w.transpose();
      if (method == DeerMethod::jacobi) j.setZero();
      y = (j * (y - prev) + f).eval();
      want.row(t) = y.transpose();
    }
    CHECK(largest_difference(x, want) < 1e-9 * std::max(1.0, want.cwiseAbs().maxCoeff()));
    CHECK(residuals[0] == doctest::Approx(largest_difference(want, old)));
  }
}

TEST_CASE(
    "what does not converge falls back to the bits of the sequential recurrence and says so") {
  const Rnn chaotic(2000, 8, 3.0), wild(1000, 8, 0.9);
  for (const DeerMethod method : {DeerMethod::quasi, DeerMethod::su_const, DeerMethod::jacobi}) {
    Matrix<double> x(2000, 8);
    const eb::DeerStatus s = chaotic.solve(x, {.method = method});
    CHECK(s.fell_back);
    CHECK(!s.converged);
    CHECK(s.found < 2000);
    CHECK(s.sweeps < 60);
    CHECK((x == chaotic.x));
    const eb::DeerStatus raw = chaotic.solve(x, {.method = method, .fallback = false});
    CHECK(!raw.fell_back);
    CHECK(!raw.converged);
    CHECK(raw.sweeps == s.sweeps);
    CHECK(x.allFinite());
    CHECK(largest_difference(x, chaotic.x) > 1e-3);
  }
  Matrix<double> x(1000, 8);  // su_const diverges at gain 0.9 (1e106 in the specification)
  CHECK(wild.solve(x, {.method = DeerMethod::su_const}).fell_back);
  CHECK((x == wild.x));
  const eb::DeerStatus limited = wild.solve(x, {.max_sweeps = 2});
  CHECK(limited.sweeps == 2);
  CHECK(limited.fell_back);
  CHECK((x == wild.x));
  const eb::DeerStatus patient = wild.solve(x, {.method = DeerMethod::su_const, .patience = 3});
  CHECK(patient.sweeps == 4);
}

TEST_CASE("the guard and the restart get through expansion that overflows without them") {
  const Rnn r(3000, 8, 1.5);
  Matrix<double> x(3000, 8);
  const eb::DeerStatus s = r.solve(x, {.max_sweeps = 200, .patience = 60});
  CHECK(s.converged);
  CHECK(largest_difference(x, r.x) < 1e-8);
  x.setZero();
  const auto residuals = eb::deer_sweeps(eb::tanh_cell(r.w), r.u, r.x0, x, 3);
  CHECK((!x.allFinite() || x.cwiseAbs().maxCoeff() > 1e8));  // what the guard is for
  const eb::DeerStatus whole = r.solve(x, {.max_sweeps = 400, .patience = 200, .restart = false});
  CHECK(whole.sweeps >= s.sweeps);
  CHECK(whole.converged);
}

TEST_CASE("NaN and infinity in the input come out as in the sequential recurrence") {
  for (const double bad : {kNan, kInf}) {
    Rnn r(200, 3, 0.5);
    r.u(100, 1) = bad;
    eb::rnn_tanh_forward(r.u, r.w, r.x0, r.x);
    for (const DeerMethod method : kMethods) {
      Matrix<double> x(200, 3);
      const eb::DeerStatus s = r.solve(x, tight(method));
      CHECK((s.converged || s.fell_back));
      CHECK(s.fell_back == std::isnan(bad));
      for (Index t = 0; t < 200; ++t) {
        for (Index i = 0; i < 3; ++i) {
          if (std::isnan(r.x(t, i))) {
            CHECK(std::isnan(x(t, i)));
          } else {
            CHECK(std::abs(x(t, i) - r.x(t, i)) < 1e-11);
          }
        }
      }
    }
  }
  Rnn r(10, 3, 0.5);
  r.x0[0] = kNan;
  Matrix<double> x(10, 3);
  const eb::DeerStatus s = r.solve(x, {});
  CHECK(s.fell_back);
  CHECK(s.sweeps == 1);
  CHECK(x.array().isNaN().all());
}

TEST_CASE("a given guess is used: the solution needs one sweep, its neighbourhood few") {
  const Rnn r(500, 6, 0.9);
  Matrix<double> x = r.x;
  const eb::DeerOptions warm{.guess = eb::DeerGuess::given};
  CHECK(r.solve(x, warm).sweeps == 1);
  x.array() += 1e-5;
  CHECK(r.solve(x, warm).sweeps <= 2);
  CHECK(largest_difference(x, r.x) < 1e-12);
}

TEST_CASE("a damped sweep is the Kalman filter") {
  const Rnn r(9, 3, 0.8);
  constexpr double variance = 3.0;
  eb::Random random(12);
  const Matrix<double> old = eb::normal_matrix<double>(random, 9, 3, 0.4);
  const Matrix<double> one = Matrix<double>::Identity(3, 3);
  for (const DeerMethod method : {DeerMethod::newton, DeerMethod::quasi}) {
    Matrix<double> x = old, want(9, 3), covariance = Matrix<double>::Zero(3, 3);
    eb::deer_sweeps(eb::tanh_cell(r.w), r.u, r.x0, x, 1,
                    {.method = method, .observation_variance = variance});
    Vector<double> mean = r.x0;
    for (Index t = 0; t < 9; ++t) {
      const Vector<double> prev = t == 0 ? r.x0 : Vector<double>(old.row(t - 1).transpose());
      const Vector<double> f =
          (r.w.transpose() * prev + r.u.row(t).transpose()).array().tanh().matrix();
      Matrix<double> j = (1 - f.array().square()).matrix().asDiagonal() * r.w.transpose();
      if (method == DeerMethod::quasi) j = Matrix<double>(j.diagonal().asDiagonal());
      const Vector<double> ahead = j * (mean - prev) + f;
      const Matrix<double> before = j * covariance * j.transpose() + one;
      const Matrix<double> gain = before * (before + variance * one).inverse();
      mean = ahead + gain * (old.row(t).transpose() - ahead);
      covariance = (one - gain) * before;
      want.row(t) = mean.transpose();
    }
    CHECK(largest_difference(x, want) < 1e-12);
  }
}

TEST_CASE("damped sweeps (ELK) find the states, and are DEER for a huge variance") {
  const Rnn r(150, 4, 0.9);
  Matrix<double> x(150, 4), y = Matrix<double>::Zero(150, 4), z = y;
  for (const DeerMethod method : {DeerMethod::newton, DeerMethod::quasi}) {
    for (const double variance : {1e8, 100.0, 10.0}) {
      auto options = tight(method);
      options.observation_variance = variance;
      options.patience = 100;
      const eb::DeerStatus s = r.solve(x, options);
      CHECK(s.converged);
      CHECK(largest_difference(x, r.x) < 1e-10);
    }
    y.setZero();
    z.setZero();
    eb::deer_sweeps(eb::tanh_cell(r.w), r.u, r.x0, y, 2, {.method = method});
    eb::deer_sweeps(eb::tanh_cell(r.w), r.u, r.x0, z, 2,
                    {.method = method, .observation_variance = 1e12});
    CHECK(largest_difference(y, z) < 1e-8);
  }
  // So damped that hardly anything moves: small updates must not pass for convergence.
  auto frozen = tight(DeerMethod::newton);
  frozen.observation_variance = 1e-13;
  const eb::DeerStatus s = r.solve(x, frozen);
  CHECK(!s.converged);
  CHECK(s.fell_back);
  CHECK((x == r.x));
}

TEST_CASE("the implicit gradient is backpropagation through time") {
  const Rnn r(400, 5, 0.9);
  eb::Random random(3);
  const Matrix<double> dx = eb::normal_matrix<double>(random, 400, 5);
  Matrix<double> du(400, 5), dw(5, 5), du2 = du, dw2 = dw, lambda(400, 5);
  Vector<double> dx0(5), dx02(5);
  eb::rnn_tanh_backward(r.w, r.x0, r.x, dx, du, dw, dx0);
  eb::deer_adjoint(eb::tanh_cell(r.w), r.u, r.x0, r.x, dx, lambda, dx02);
  eb::rnn_tanh_parameter_gradients(r.x0, r.x, lambda, du2, dw2);
  CHECK(largest_difference(du, du2) < 1e-11);
  CHECK(largest_difference(dw, dw2) < 1e-11);
  CHECK(largest_difference(dx0, dx02) < 1e-11);
}

TEST_CASE("GRU: DEER and its gradient, both variants") {
  for (const auto variant : {eb::GruVariant::reset_after, eb::GruVariant::reset_before}) {
    eb::Random random(4);
    const Index tokens = 260, in = 3, n = 5;
    const Matrix<double> x = eb::normal_matrix<double>(random, tokens, in);
    eb::GruWeights<double> w = eb::gru_zeros<double>(in, n);
    eb::fill_normal(random, w.input);
    eb::fill_normal(random, w.hidden, 0.5);
    const Vector<double> h0 = Vector<double>::Constant(n, 0.3);
    Matrix<double> want(tokens, n), h(tokens, n);
    eb::gru_forward(x, w, h0, want, {variant});
    const auto cell = eb::gru_cell(w, {variant});
    const Matrix<double> gates = eb::gru_inputs(x, w);
    for (const DeerMethod method : kMethods) {
      const eb::DeerStatus s = eb::deer_forward(cell, gates, h0, h, tight(method));
      if (method == DeerMethod::newton) {
        CHECK(s.converged);
        CHECK(s.sweeps <= 12);
      }
      CHECK(largest_difference(h, want) < 1e-10);
    }
    const Matrix<double> dh = eb::normal_matrix<double>(random, tokens, n);
    auto dw = eb::gru_zeros<double>(in, n), dw2 = dw;
    Matrix<double> dx(tokens, in), dx2(tokens, in), lambda(tokens, n);
    Vector<double> dh0(n), dh02(n);
    eb::gru_backward(x, w, h0, want, dh, dx, dw, dh0, {variant});
    eb::deer_adjoint(cell, gates, h0, want, dh, lambda, dh02);
    eb::gru_parameter_gradients(x, w, h0, want, lambda, dx2, dw2, {variant});
    CHECK(largest_difference(dx, dx2) < 1e-11);
    CHECK(largest_difference(dw.input, dw2.input) < 1e-11);
    CHECK(largest_difference(dw.hidden, dw2.hidden) < 1e-11);
    CHECK(largest_difference(dw.hidden_bias, dw2.hidden_bias) < 1e-11);
    CHECK(largest_difference(dh0, dh02) < 1e-11);
  }
}

TEST_CASE("a user's cell with nothing but forward and jacobian; the same bits for every executor") {
  const ShiftCell cell{0.6, 3};
  eb::Random random(8);
  const Matrix<double> u = eb::normal_matrix<double>(random, 1500, 3, 0.5);
  const Vector<double> h0 = Vector<double>::Constant(3, 0.2);
  Matrix<double> want(1500, 3);
  eb::recurrent_forward(cell, u, h0, want);
  for (const DeerMethod method : {DeerMethod::newton, DeerMethod::quasi, DeerMethod::jacobi}) {
    Matrix<double> first(1500, 3), x(1500, 3), lambda(1500, 3), lambda2(1500, 3);
    Vector<double> d0(3), d02(3);
    const eb::DeerStatus serial = eb::deer_forward(cell, u, h0, first, tight(method));
    CHECK(serial.converged);
    CHECK(largest_difference(first, want) < 1e-10);
    eb::deer_adjoint(cell, u, h0, first, u, lambda, d0);
    for (const int workers : {1, 2, 3, 7}) {
      const eb::thread_pool pool(workers);
      const eb::DeerStatus s = eb::deer_forward(cell, u, h0, x, tight(method), pool);
      CHECK((x == first));
      CHECK(s.residuals == serial.residuals);
      eb::deer_adjoint(cell, u, h0, first, u, lambda2, d02, pool);
      CHECK((lambda2 == lambda));
      CHECK((d02 == d0));
    }
  }
}

TEST_CASE("options and operands are checked before anything is written") {
  const Rnn r(6, 3, 0.5);
  const auto cell = eb::tanh_cell(r.w);
  Matrix<double> x = Matrix<double>::Constant(6, 3, kNan);
  const auto throws = [&](const eb::DeerOptions& options, const std::string& text) {
    check_throws<eb::invalid_argument>([&] { eb::deer_forward(cell, r.u, r.x0, x, options); },
                                       text);
  };
  throws({.atol = -2}, "atol (-2) must be non-negative and finite, or -1 for the default");
  throws({.rtol = kInf}, "rtol (inf) must be non-negative and finite, or -1 for the default");
  throws({.max_sweeps = 0}, "max_sweeps (0) must be at least 1");
  throws({.patience = 0}, "patience (0) must be at least 1");
  throws({.method = static_cast<DeerMethod>(9)}, "method (9) is not a DeerMethod");
  throws({.guess = static_cast<eb::DeerGuess>(9)}, "guess (9) is not a DeerGuess");
  throws({.observation_variance = 0}, "observation_variance (0) must be positive");
  throws(
      {.method = DeerMethod::jacobi, .observation_variance = 10},
      "observation_variance (10) needs method newton or quasi, others have no Jacobian to filter "
      "with");
  const ShiftCell shift{0.5, 3};
  check_throws<eb::invalid_argument>(
      [&] { eb::deer_forward(shift, r.u, r.x0, x, {.method = DeerMethod::su_const}); },
      "method su_const needs a cell with constant_jacobian");
  check_throws<eb::invalid_argument>([&] { eb::deer_sweeps(cell, r.u, r.x0, x, -1); },
                                     "sweeps (-1) must not be negative");
  const Matrix<double> wide(6, 4);
  check_throws<eb::invalid_argument>(
      [&] { eb::deer_forward(cell, wide, r.x0, x); },
      "u is 6 x 4, expected 6 x 3 (any rows, input_size of the cell)");
  check_throws<eb::invalid_argument>(
      [&] { eb::deer_forward(cell, r.u, Vector<double>::Zero(2), x); },
      "initial has 2 entries, expected 3 (size of the cell)");
  Vector<double> d0(3);
  check_throws<eb::invalid_argument>([&] { eb::deer_adjoint(cell, r.u, r.x0, r.x, wide, x, d0); },
                                     "dout is 6 x 4, expected 6 x 3 (shape of out)");
  CHECK(x.array().isNaN().all());
}

TEST_CASE("float") {
  const Rnn r(800, 6, 0.7);
  const Matrix<float> w = r.w.cast<float>(), u = r.u.cast<float>();
  const Vector<float> x0 = r.x0.cast<float>();
  Matrix<float> x(800, 6);
  for (const DeerMethod method : {DeerMethod::newton, DeerMethod::quasi}) {
    const eb::DeerStatus s = eb::deer_forward(eb::tanh_cell(w), u, x0, x, {.method = method});
    CHECK(s.converged);
    CHECK((x.cast<double>() - r.x).cwiseAbs().maxCoeff() < 1e-4);
  }
}
