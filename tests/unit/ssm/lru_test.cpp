// LRU: initialisation, against a plain recurrence, stationarity, steps, gradients, errors.
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/ssm/lru.hpp>

#include "support/alloc_guard.hpp"
#include "support/layer_checks.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

namespace {

using Complex = std::complex<double>;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Layer {
  eb::LruParameters<double> p, dp;
  Matrix<double> u, y, dy, du;
  Vector<Complex> h0, last, dlast, dh0;
  Layer(Index tokens, Index modes, Index channels, eb::LruInitOptions options = {.r_min = 0.3}) {
    eb::Random random(21);
    p = eb::lru_parameters<double>(random, modes, channels, options);
    u = eb::normal_matrix<double>(random, tokens, channels);
    dy = eb::normal_matrix<double>(random, tokens, channels);
    y = du = Matrix<double>::Constant(tokens, channels, kNan);
    const auto state = [&] {
      Vector<Complex> v(modes);
      for (Index i = 0; i < modes; ++i) v[i] = {random.normal(), random.normal()};
      return v;
    };
    h0 = state();
    dlast = state();
  }
  void forward(eb::ExecutorRef executor = {}) { eb::lru_forward(u, p, y, h0, &last, executor); }
  void backward(eb::ExecutorRef executor = {}) {
    eb::lru_backward(u, p, dy, du, dp, h0, &dlast, &dh0, executor);
  }
  double loss() {
    forward();
    return (dy.array() * y.array()).sum() + (dlast.conjugate().cwiseProduct(last)).sum().real();
  }
  Complex lambda(Index n) const {
    return std::exp(Complex(-std::exp(p.nu_log[n]), std::exp(p.theta_log[n])));
  }
};

}  // namespace

TEST_CASE("lru_init: radii on the ring, gamma = sqrt(1 - |lambda|^2) without cancellation") {
  const Vector<double> u1 = Vector<double>::LinSpaced(11, 0, 1), u2 = u1.reverse();
  const auto ring = eb::lru_init(u1, u2, {.r_min = 0.9, .r_max = 0.999, .max_phase = 6.28});
  for (Index i = 0; i < 11; ++i) {
    const double radius = std::exp(-std::exp(ring.nu_log[i]));
    CHECK(radius * radius == doctest::Approx(u1[i] * (0.999 * 0.999 - 0.81) + 0.81).epsilon(1e-12));
    CHECK(std::exp(ring.theta_log[i]) == doctest::Approx(6.28 * u2[i]).epsilon(1e-12));
    CHECK(std::exp(2 * ring.gamma_log[i]) == doctest::Approx(1 - radius * radius).epsilon(1e-10));
  }
  // 1 - |lambda|^2 = 2e-13: 1 - r r would keep three digits.
  const double square = 1 - 2e-13;
  const Vector<double> one = Vector<double>::Ones(1);
  const double r = std::sqrt(square);
  const auto edge = eb::lru_init(one, one, {.r_min = r, .r_max = r});
  const double nu = std::exp(edge.nu_log[0]);
  CHECK(edge.gamma_log[0] == doctest::Approx(0.5 * std::log(2 * nu - 2 * nu * nu)).epsilon(1e-12));
  const auto zero = eb::lru_init(Vector<double>::Zero(1), one);  // radius 0: log(0) is kept out
  CHECK(std::isfinite(zero.nu_log[0]));
  CHECK(zero.gamma_log[0] == doctest::Approx(0));
}

TEST_CASE("forward is the recurrence, in one block and in several") {
  for (const Index tokens : {0, 1, 8, 9, 1500}) {
    Layer layer(tokens, 5, 3);
    layer.forward();
    Vector<Complex> h = layer.h0;
    double worst = 0;
    for (Index t = 0; t < tokens; ++t) {
      for (Index n = 0; n < 5; ++n) {
        Complex in = 0;
        for (Index j = 0; j < 3; ++j) in += layer.p.b(n, j) * layer.u(t, j);
        h[n] = layer.lambda(n) * h[n] + std::exp(layer.p.gamma_log[n]) * in;
      }
      for (Index j = 0; j < 3; ++j) {
        Complex sum = 0;
        for (Index n = 0; n < 5; ++n) sum += layer.p.c(j, n) * h[n];
        worst =
            std::max(worst, std::abs(layer.y(t, j) - sum.real() - layer.p.d[j] * layer.u(t, j)));
      }
    }
    CHECK(worst < 1e-12);
    for (Index n = 0; n < 5; ++n) CHECK(std::abs(layer.last[n] - h[n]) < 1e-12);
  }
}

TEST_CASE("E|h|^2 = E|B u|^2 in the long run, near the unit circle as well") {
  Layer layer(60000, 12, 4, {.r_min = 0.9, .r_max = 0.99});
  layer.forward();
  // |h|^2 averaged over time and modes, by reading the states through a C of ones.
  const auto mimo = eb::detail::lru_layer(layer.p);
  Matrix<Complex> h;
  mimo.states(layer.u, Vector<Complex>::Zero(12), false, h, {});
  double states = 0, inputs = 0;
  for (Index n = 0; n < 12; ++n) {
    states += h.col(n).tail(59000).squaredNorm() / 59000;
    inputs += layer.p.b.row(n).squaredNorm();  // u is white with variance 1
  }
  CHECK(states / inputs == doctest::Approx(1).epsilon(0.05));
}

TEST_CASE("a state carried over any split gives the whole") {
  for (const Index split : {0, 1, 6, 11, 23}) {
    Layer layer(23, 5, 3);
    layer.forward();
    auto state = eb::lru_state(layer.p, layer.h0);
    Matrix<double> y(23, 3);
    eb::lru_step(state, layer.u.topRows(split), y.topRows(split));
    auto copy = state;
    eb::lru_step(state, layer.u.bottomRows(23 - split), y.bottomRows(23 - split));
    CHECK(largest_difference(y, layer.y) < 1e-13);
    CHECK((state.h - layer.last).cwiseAbs().maxCoeff() < 1e-13);
    for (Index t = split; t < 23; ++t) eb::lru_step(copy, layer.u.row(t), y.row(t));
    CHECK(largest_difference(y, layer.y) < 1e-13);
  }
}

TEST_CASE("gradients are finite differences") {
  Layer layer(6, 3, 2);
  layer.backward();
  const auto loss = [&] { return layer.loss(); };
  const auto check = [&](double* x, Index n, const double* gradient) {
    const eb::GradcheckResult result =
        eb::gradcheck(loss, Eigen::Map<Matrix<double>>(x, 1, n),
                      Eigen::Map<const Matrix<double>>(gradient, 1, n));
    CHECK_MESSAGE(result.passed, result.message());
  };
  const auto parts = [](auto& m) { return reinterpret_cast<double*>(m.data()); };
  check(layer.p.nu_log.data(), 3, layer.dp.nu_log.data());
  check(layer.p.theta_log.data(), 3, layer.dp.theta_log.data());
  check(layer.p.gamma_log.data(), 3, layer.dp.gamma_log.data());
  check(parts(layer.p.b), 12, parts(layer.dp.b));
  check(parts(layer.p.c), 12, parts(layer.dp.c));
  check(layer.p.d.data(), 2, layer.dp.d.data());
  check(layer.u.data(), 12, layer.du.data());
  check(parts(layer.h0), 6, parts(layer.dh0));
  Layer none(0, 3, 2);
  none.backward();
  CHECK((none.dh0 == none.dlast));
}

TEST_CASE("the same bits for every executor; steps allocate nothing") {
  Layer layer(1200, 20, 6);
  layer.forward();
  layer.backward();
  for (const int workers : {2, 3, 7}) {
    const eb::thread_pool pool(workers);
    Layer other = layer;
    other.forward(pool);
    other.backward(pool);
    CHECK((other.y == layer.y));
    CHECK((other.du == layer.du));
    CHECK((other.dp.nu_log == layer.dp.nu_log));
    CHECK((other.dp.b == layer.dp.b));
  }
  Layer steps(8, 5, 7);
  auto state = eb::lru_state(steps.p);
  eb::lru_step(state, steps.u, steps.y);
  const AllocationCount count;
  eb::lru_step(state, steps.u, steps.y);
  if (AllocationCount::available) CHECK(count.calls() == 0);
}

TEST_CASE("float next to the unit circle stays close to double") {
  Layer layer(3000, 6, 4, {.r_min = 0.9, .r_max = 0.999});
  layer.h0.setZero();
  layer.forward();
  eb::LruParameters<float> p{
      layer.p.nu_log.cast<float>(),          layer.p.theta_log.cast<float>(),
      layer.p.gamma_log.cast<float>(),       layer.p.b.cast<std::complex<float>>(),
      layer.p.c.cast<std::complex<float>>(), layer.p.d.cast<float>()};
  const Matrix<float> u = layer.u.cast<float>();
  Matrix<float> y(3000, 4);
  eb::lru_forward(u, p, y);
  const double scale = layer.y.cwiseAbs().maxCoeff();
  CHECK((y.cast<double>() - layer.y).cwiseAbs().maxCoeff() < 1e-3 * scale);
}

TEST_CASE("wrong operands are named, and nothing is written") {
  using Error = eb::invalid_argument;
  Layer layer(4, 3, 2);
  auto bad = layer.p;
  bad.theta_log.resize(2);
  check_throws<Error>([&] { eb::lru_forward(layer.u, bad, layer.y); },
                      "theta_log has 2 entries, expected 3 (entries of nu_log)");
  bad = layer.p;
  bad.b.resize(3, 3);
  check_throws<Error>([&] { eb::lru_forward(layer.u, bad, layer.y); },
                      "b is 3 x 3, expected 3 x 2 (entries of nu_log, entries of d)");
  const Vector<Complex> two(2);
  check_throws<Error>([&] { eb::lru_forward(layer.u, layer.p, layer.y, two); },
                      "initial has 2 entries, expected 3 (modes), or none");
  check_throws<Error>([&] { eb::lru_state(layer.p, two); },
                      "initial has 2 entries, expected 3 (modes), or none");
  check_throws<Error>(
      [&] { eb::lru_backward(layer.u, layer.p, layer.dy, layer.du, layer.dp, {}, &two); },
      "dfinal has 2 entries, expected 3 (modes)");
  const Matrix<double> wide(4, 3);
  check_throws<Error>([&] { eb::lru_forward(wide, layer.p, layer.y); },
                      "u is 4 x 3, expected 4 x 2 (any rows, entries of d)");
  const Vector<double> one = Vector<double>::Ones(1), big = Vector<double>::Constant(1, 1.5);
  check_throws<Error>([&] { eb::lru_init(one, one, {.r_min = 0.9, .r_max = 0.5}); },
                      "r_min (0.9) and r_max (0.5) must be ordered within [0, 1]");
  check_throws<Error>([&] { eb::lru_init(big, one); }, "draw 0 (1.5, 1) is outside [0, 1]");
  check_throws<Error>([&] { eb::lru_init(one, Vector<double>::Zero(2)); },
                      "u2 has 2 entries, expected 1 (entries of u1)");
  CHECK(layer.y.array().isNaN().all());
  CHECK(layer.du.array().isNaN().all());
}
