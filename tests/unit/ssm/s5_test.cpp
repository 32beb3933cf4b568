// S5: against a dense recurrence, steps, gradients, both directions, errors.
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/ssm/s5.hpp>

#include "support/alloc_guard.hpp"
#include "support/layer_checks.hpp"

#include <doctest/doctest.h>

#include <limits>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

namespace {

using Complex = std::complex<double>;
using Parameters = eb::S5Parameters<double>;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Matrix<Complex> complex_normal(eb::Random& random, Index rows, Index cols) {
  Matrix<Complex> m(rows, cols);
  m.real() = eb::normal_matrix<double>(random, rows, cols, 0.7);
  m.imag() = eb::normal_matrix<double>(random, rows, cols, 0.7);
  return m;
}

struct Layer {
  eb::S5Options options;
  Parameters p, dp;
  Matrix<double> u, y, dy, du;
  Layer(Index tokens, Index modes, Index channels, eb::S5Options o = {}) : options(o) {
    eb::Random random(11);
    p.lambda = complex_normal(random, modes, 1).col(0);
    p.lambda.real() = -p.lambda.real().cwiseAbs() - Vector<double>::Constant(modes, 0.05);
    if (modes > 0) p.lambda[0] = Complex(-1e-9, 0);  // next to 0
    p.b = complex_normal(random, modes, channels);
    p.c = complex_normal(random, channels, o.bidirectional ? 2 * modes : modes);
    p.d = eb::normal_matrix<double>(random, channels, 1).col(0);
    p.dt = eb::normal_matrix<double>(random, modes, 1).col(0).cwiseAbs().array() + 0.1;
    u = eb::normal_matrix<double>(random, tokens, channels);
    dy = eb::normal_matrix<double>(random, tokens, channels);
    y = du = Matrix<double>::Constant(tokens, channels, kNan);
  }
  void forward(eb::ExecutorRef executor = {}) { eb::s5_forward(u, p, y, options, executor); }
  void backward(eb::ExecutorRef executor = {}) {
    eb::s5_backward(u, p, dy, du, dp, options, executor);
  }
  double loss() {
    forward();
    return (dy.array() * y.array()).sum();
  }
  /// By columns of complex numbers, every step on its own.
  Matrix<double> plain() const {
    const Index n = p.modes(), tokens = u.rows();
    Matrix<Complex> x(tokens, 2 * n);
    const auto mode = [&](Index i) {
      return eb::discretize_diagonal<double>(p.lambda[i], p.dt.size() == 1 ? p.dt[0] : p.dt[i],
                                             options.method);
    };
    for (Index i = 0; i < n; ++i) {
      Complex state = 0, back = 0;
      for (Index t = 0; t < tokens; ++t) {
        Complex in = 0, in_back = 0;
        for (Index h = 0; h < u.cols(); ++h) {
          in += p.b(i, h) * u(t, h);
          in_back += p.b(i, h) * u(tokens - 1 - t, h);
        }
        state = mode(i).a * state + mode(i).phi * in;
        back = mode(i).a * back + mode(i).phi * in_back;
        x(t, i) = state;
        x(tokens - 1 - t, n + i) = back;
      }
    }
    Matrix<double> out(tokens, u.cols());
    for (Index t = 0; t < tokens; ++t) {
      for (Index h = 0; h < u.cols(); ++h) {
        Complex sum = 0;
        for (Index i = 0; i < p.c.cols(); ++i) sum += p.c(h, i) * x(t, i);
        out(t, h) = (options.conj_sym ? 2 : 1) * sum.real() + p.d[h] * u(t, h);
      }
    }
    return out;
  }
};

constexpr eb::S5Options kOptions[] = {
    {},
    {.method = eb::Discretization::bilinear, .conj_sym = false},
    {.method = eb::Discretization::backward},
    {.bidirectional = true},
};

}  // namespace

TEST_CASE("forward is the recurrence, in one block and in several") {
  for (const eb::S5Options& options : kOptions) {
    for (const Index tokens : {0, 1, 7, 9, 40}) {
      Layer layer(tokens, 3, 5, options);
      layer.forward();
      CHECK(largest_difference(layer.y, layer.plain()) < 1e-12);
    }
    Layer blocks(2500, 2, 3, options);
    blocks.forward();
    CHECK(largest_difference(blocks.y, blocks.plain()) <
          1e-8);  // the mode next to 0 sums everything
  }
  Layer shared(20, 3, 2);
  shared.p.dt = Vector<double>::Constant(1, 0.3);
  shared.forward();
  CHECK(largest_difference(shared.y, shared.plain()) < 1e-12);
}

TEST_CASE("a state carried over any split gives the whole") {
  for (const Index split : {0, 1, 5, 12, 25}) {
    Layer layer(25, 3, 4, {.method = eb::Discretization::bilinear});
    layer.forward();
    auto state = eb::s5_state(layer.p, layer.options);
    Matrix<double> y(25, 4);
    eb::s5_step(state, layer.u.topRows(split), y.topRows(split));
    auto copy = state;
    eb::s5_step(state, layer.u.bottomRows(25 - split), y.bottomRows(25 - split));
    CHECK(largest_difference(y, layer.y) < 1e-12);
    for (Index t = split; t < 25; ++t) eb::s5_step(copy, layer.u.row(t), y.row(t));
    CHECK(largest_difference(y, layer.y) < 1e-12);
  }
}

TEST_CASE("causality, shift equivariance, both discretisations for small dt") {
  Layer layer(30, 3, 2);
  layer.forward();
  const Matrix<double> y = layer.y;
  layer.u.row(20).array() += 1.0;
  layer.forward();
  CHECK(largest_difference(layer.y.topRows(20), y.topRows(20)) == 0);
  CHECK(largest_difference(layer.y.row(20), y.row(20)) > 1e-3);

  Layer late = layer;
  late.u.setZero();
  late.u.bottomRows(25) = layer.u.topRows(25);
  late.forward();
  CHECK(largest_difference(late.y.bottomRows(25), layer.y.topRows(25)) < 1e-12);

  Layer small = layer;
  const auto gap = [&](double dt) {
    small.p.dt.setConstant(dt);
    small.options.method = eb::Discretization::zoh;
    small.forward();
    const Matrix<double> zoh = small.y;
    small.options.method = eb::Discretization::bilinear;
    small.forward();
    return largest_difference(zoh, small.y) / dt;
  };
  CHECK(gap(1e-3) / gap(1e-4) == doctest::Approx(100).epsilon(0.05));  // relative: O(dt^2)
}

TEST_CASE("gradients are finite differences") {
  for (const eb::S5Options& options : kOptions) {
    Layer layer(7, 2, 3, options);
    layer.p.lambda[0] = Complex(-0.4, 0.9);
    layer.backward();
    const auto loss = [&] { return layer.loss(); };
    const auto check = [&](auto& parameter, auto& gradient) {
      using M = std::remove_reference_t<decltype(parameter)>;
      constexpr Index parts = sizeof(typename M::Scalar) / sizeof(double);
      REQUIRE(parameter.size() == gradient.size());
      Eigen::Map<Matrix<double>> x(reinterpret_cast<double*>(parameter.data()), 1,
                                   parts * parameter.size());
      const Eigen::Map<Matrix<double>> g(reinterpret_cast<double*>(gradient.data()), 1,
                                         parts * gradient.size());
      const eb::GradcheckResult result = eb::gradcheck(loss, x, g);
      CHECK_MESSAGE(result.passed, result.message());
    };
    check(layer.p.lambda, layer.dp.lambda);
    check(layer.p.b, layer.dp.b);
    check(layer.p.c, layer.dp.c);
    check(layer.p.d, layer.dp.d);
    check(layer.p.dt, layer.dp.dt);
    check(layer.u, layer.du);
  }
  Layer none(0, 2, 3);
  none.backward();
  CHECK(none.dp.b.isZero(0));
  CHECK(none.dp.c.isZero(0));
}

TEST_CASE("the same bits for every executor; steps allocate nothing") {
  Layer layer(900, 9, 6, {.bidirectional = true});
  layer.forward();
  layer.backward();
  for (const int workers : {2, 3, 7}) {
    const eb::thread_pool pool(workers);
    Layer other = layer;
    other.forward(pool);
    other.backward(pool);
    CHECK((other.y == layer.y));
    CHECK((other.du == layer.du));
    CHECK((other.dp.b == layer.dp.b));
    CHECK((other.dp.lambda == layer.dp.lambda));
  }
  Layer steps(8, 5, 7);
  auto state = eb::s5_state(steps.p);
  eb::s5_step(state, steps.u, steps.y);
  const AllocationCount count;
  eb::s5_step(state, steps.u, steps.y);
  if (AllocationCount::available) CHECK(count.calls() == 0);
}

TEST_CASE("wrong operands are named, and nothing is written") {
  Layer layer(4, 3, 2);
  using Error = eb::invalid_argument;
  const auto throws = [&](const Parameters& p, const eb::S5Options& options, const char* text) {
    check_throws<Error>([&] { eb::s5_forward(layer.u, p, layer.y, options); }, text);
    check_throws<Error>([&] { eb::s5_backward(layer.u, p, layer.dy, layer.du, layer.dp, options); },
                        text);
  };
  Parameters bad = layer.p;
  bad.c.resize(2, 4);
  throws(bad, {},
         "c is 2 x 4, expected 2 x 3 (entries of d, entries of lambda (twice if bidirectional))");
  throws(layer.p, {.bidirectional = true},
         "c is 2 x 3, expected 2 x 6 (entries of d, entries of lambda (twice if bidirectional))");
  bad = layer.p;
  bad.dt.resize(2);
  throws(bad, {}, "dt has 2 entries, expected 1 or 3 (one for each lambda)");
  bad = layer.p;
  bad.dt[1] = 0;
  throws(bad, {}, "dt (0) must be positive and finite");
  throws(layer.p, {.method = eb::Discretization::forward},
         "method (0) must be zoh, bilinear or backward");
  const Matrix<double> wide(4, 3);
  check_throws<Error>([&] { eb::s5_forward(wide, layer.p, layer.y); },
                      "u is 4 x 3, expected 4 x 2 (any rows, entries of d)");
  check_throws<Error>([&] { eb::s5_state(layer.p, {.bidirectional = true}); },
                      "bidirectional layers have no steps");
  auto state = eb::s5_state(layer.p);
  check_throws<Error>([&] { eb::s5_step(state, wide, layer.y); },
                      "u is 4 x 3, expected 4 x 2 (any rows, channels of the state)");
  CHECK(layer.y.array().isNaN().all());
  CHECK(layer.du.array().isNaN().all());
}
