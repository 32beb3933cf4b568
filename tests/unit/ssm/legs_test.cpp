#include "support/alloc_guard.hpp"
#include "support/layer_checks.hpp"

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/ssm/basis.hpp>
#include <eigenblocks/ssm/legs.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace {

namespace eb = eigenblocks;
using eb::Discretization;
using eb::HippoMeasure;
using eb::Index;
using eb::LegsOptions;
using eb::LegsTiming;
using eb::Matrix;
using eb::Vector;

Matrix<double> random(Index rows, Index cols, std::uint64_t seed) {
  eb::Random generator(seed);
  Matrix<double> m(rows, cols);
  eb::fill_normal(generator, m);
  return m;
}

Matrix<double> multiply(const Matrix<double>& a, const Matrix<double>& b) {
  Matrix<double> c(a.rows(), b.cols());
  eb::detail::product_nn<double>(a, b, c);
  return c;
}

/// Noise with the frequencies 0 .. `cycles` cycles in its length.
Matrix<double> band_limited(Index length, int cycles, std::uint64_t seed) {
  eb::Random generator(seed);
  Matrix<double> u = Matrix<double>::Zero(length, 1);
  for (int k = 1; k <= cycles; ++k) {
    const double a = generator.normal(), b = generator.normal();
    for (Index t = 0; t < length; ++t) {
      const double x =
          2 * 3.14159265358979323846 * k * static_cast<double>(t) / static_cast<double>(length);
      u(t, 0) += a * std::cos(x) + b * std::sin(x);
    }
  }
  return u;
}

/// Relative RMS error of the history that the coefficients hold.
double reconstruction_error(const Matrix<double>& u, const Matrix<double>& c) {
  const Index length = u.rows();
  Vector<double> middle(length);
  for (Index t = 0; t < length; ++t)
    middle[t] = (static_cast<double>(t) + 0.5) / static_cast<double>(length);
  Matrix<double> past(length, 1);
  eb::hippo_reconstruct(HippoMeasure::legs, middle, c, past);
  return (past - u).norm() / u.norm();
}

Matrix<double> run(const Matrix<double>& u, const LegsOptions& options) {
  Matrix<double> c(options.states, u.cols());
  eb::legs_forward(u, c, options);
  return c;
}

const std::vector<LegsTiming> kTimings = {LegsTiming::paper, LegsTiming::code,
                                          LegsTiming::consistent};

/// The recursion as the contract states it, with dense matrices: the oracle of the sweeps.
Matrix<double> dense_states(const Matrix<double>& u, const LegsOptions& options, double alpha) {
  const eb::Hippo h = eb::hippo_matrix(HippoMeasure::legs, options.states);
  const Matrix<double> one = Matrix<double>::Identity(options.states, options.states);
  Matrix<double> c = Matrix<double>::Zero(options.states, u.cols());
  for (Index t = 0; t < u.rows(); ++t) {
    if (t == 0 && options.timing != LegsTiming::code) {
      c.row(0) = u.row(0);
      continue;
    }
    const double k = static_cast<double>(t);
    double lambda = (1 - alpha) / k, mu = alpha / (k + 1), f = 1 / k;
    if (options.timing == LegsTiming::consistent) f = lambda + mu;
    if (options.timing == LegsTiming::code) {
      lambda = (1 - alpha) / (k + 1);
      f = 1 / (k + 1);
    }
    Matrix<double> right = multiply(one + lambda * h.a, c) + f * h.b * u.row(t);
    Matrix<double> left = one - mu * h.a;
    eb::detail::dense_solve(left, right);
    c = right;
  }
  return c;
}

}  // namespace

TEST_CASE("structured products and solves are those of the matrix, for every number of channels") {
  for (const Index n : {Index{1}, Index{2}, Index{17}}) {
    const Matrix<double> a = eb::hippo_matrix(HippoMeasure::legs, n).a;
    const Matrix<double> one = Matrix<double>::Identity(n, n);
    for (const Index channels : {Index{1}, Index{3}, Index{4}, Index{23}, Index{64}, Index{139}}) {
      // A block of a wider matrix: strides.
      const Matrix<double> wide = random(n, channels + 5, 1);
      const auto v = wide.middleCols(2, channels);
      for (const double lambda : {0.0, 1e-7, 0.02, 0.5, 3.0, 1e4, -0.021}) {
        Matrix<double> out(n, channels), want = multiply(one + lambda * a, v);
        const auto close = [&](double scale) {
          return largest_difference(out, want) < 1e-13 * scale * (1 + want.cwiseAbs().maxCoeff());
        };
        const double size = 1 + std::abs(lambda) * static_cast<double>(n);
        eb::legs_multiply(v, out, lambda);
        CHECK(close(size));
        eb::legs_multiply_transposed(v, out, lambda);
        want = multiply(one + lambda * a.transpose(), v);
        CHECK(close(size));
        eb::legs_solve(v, out, lambda);
        CHECK(largest_difference(multiply(one - lambda * a, out), v) < 1e-12 * size);
        eb::legs_solve_transposed(v, out, lambda);
        CHECK(largest_difference(multiply(one - lambda * a.transpose(), out), v) < 1e-12 * size);
        Matrix<double> same = v;
        eb::legs_solve_transposed(same, same, lambda);
        CHECK(same == out);
      }
    }
  }
}

TEST_CASE("a solve keeps the digits of float at large lambda and N") {
  const Matrix<double> v = random(400, 3, 2);
  Matrix<double> want(400, 3);
  Matrix<float> got(400, 3);
  for (const double lambda : {1e-4, 1.0, 100.0}) {
    eb::legs_solve(v, want, lambda);
    eb::legs_solve(Matrix<float>(v.cast<float>()), got, lambda);
    CHECK((got.cast<double>() - want).norm() < 3e-6 * want.norm());
  }
}

TEST_CASE("steps are the recursion of the contract, in every timing and method") {
  const Matrix<double> u = random(60, 5, 3);
  for (const LegsTiming timing : kTimings) {
    for (const double alpha : {0.0, 0.3, 0.5, 1.0}) {
      CAPTURE(alpha);
      const LegsOptions options{
          .states = 7, .method = Discretization::gbt, .alpha = alpha, .timing = timing};
      const Matrix<double> want = dense_states(u, options, alpha);
      CHECK(largest_difference(run(u, options), want) < 1e-11 * want.cwiseAbs().maxCoeff());
    }
  }
  CHECK(run(u, {.states = 7, .method = Discretization::backward}) ==
        run(u, {.states = 7, .method = Discretization::gbt, .alpha = 1.0}));
  CHECK(run(u, {.states = 7}) == run(u, {.states = 7, .method = Discretization::gbt}));
}

TEST_CASE("zoh is the exact projection, and the projection is the integral") {
  const Matrix<double> u = random(40, 3, 4);
  Matrix<double> exact(9, 3);
  eb::legs_project(u, exact);
  for (const LegsTiming timing : {LegsTiming::paper, LegsTiming::consistent}) {
    const LegsOptions options{.states = 9, .method = Discretization::zoh, .timing = timing};
    CHECK(largest_difference(run(u, options), exact) < 1e-12);
  }
  CHECK(largest_difference(
            run(u, {.states = 9, .method = Discretization::zoh, .timing = LegsTiming::code}),
            exact) > 1e-2);
  // c_n = int_0^1 u(s) r_n P_n(2s - 1) ds by the midpoint rule.
  constexpr Index fine = 100;
  Vector<double> points(40 * fine);
  for (Index i = 0; i < points.size(); ++i)
    points[i] = (static_cast<double>(i) + 0.5) / static_cast<double>(points.size());
  const Matrix<double> e = eb::hippo_basis(HippoMeasure::legs, 9, points);
  Matrix<double> sum = Matrix<double>::Zero(9, 3);
  for (Index i = 0; i < points.size(); ++i)
    sum += e.row(i).transpose() * u.row(i / fine) / static_cast<double>(points.size());
  CHECK(largest_difference(sum, exact) < 1e-3);
  // Across tiles of samples.
  const Matrix<double> longer = random(600, 1, 5);
  Matrix<double> c(4, 1);
  eb::legs_project(longer, c);
  CHECK(c(0, 0) == doctest::Approx(longer.mean()).epsilon(1e-12));
}

TEST_CASE("the error of the reconstruction falls with N: the headline") {
  // 20 cycles of noise in 2000 inputs, mean over five signals; the specification's one signal had .82, .53, .031, 1.0e-4.
  const auto mean = [](Index states, bool exact, Discretization method) {
    double sum = 0;
    for (std::uint64_t seed = 1; seed <= 5; ++seed) {
      const Matrix<double> u = band_limited(2000, 20, seed);
      Matrix<double> c(states, 1);
      if (exact) {
        eb::legs_project(u, c);
      } else {
        c = run(u, {.states = states, .method = method});
      }
      sum += reconstruction_error(u, c);
    }
    return sum / 5;
  };
  const double e16 = mean(16, true, Discretization::zoh), e32 = mean(32, true, Discretization::zoh),
               e64 = mean(64, true, Discretization::zoh),
               e128 = mean(128, true, Discretization::zoh);
  MESSAGE("projection, N = 16, 32, 64, 128: ", e16, " ", e32, " ", e64, " ", e128);
  CHECK(std::abs(e16 - 0.82) < 0.05);
  CHECK(std::abs(e32 - 0.6) < 0.1);
  CHECK(e64 < 0.06);
  CHECK(e64 > 0.01);
  CHECK(e128 < 3e-4);
  const double bilinear64 = mean(64, false, Discretization::bilinear),
               bilinear128 = mean(128, false, Discretization::bilinear),
               backward = mean(128, false, Discretization::backward);
  MESSAGE("bilinear, N = 64, 128; backward: ", bilinear64, " ", bilinear128, " ", backward);
  CHECK(std::abs(bilinear64 - e64) < 0.2 * e64);
  CHECK(bilinear128 > e128);
  CHECK(bilinear128 < 2e-2);
  CHECK(std::abs(backward - 0.25) < 0.04);
}

TEST_CASE("consistent weights beat the paper's, which beat the code's") {
  const Matrix<double> u = band_limited(2000, 20, 1);
  Matrix<double> exact(128, 1);
  eb::legs_project(u, exact);
  double error[3] = {};
  for (std::size_t i = 0; i < 3; ++i) {
    const Matrix<double> c = run(u, {.states = 128, .timing = kTimings[i]});
    error[i] = (c - exact).norm() / exact.norm();
  }
  MESSAGE("coefficients, paper, code, consistent: ", error[0], " ", error[1], " ", error[2]);
  CHECK(error[2] < error[0]);
  CHECK(error[0] < error[1]);
  CHECK(error[2] < 3e-3);
}

TEST_CASE("what a constant becomes") {
  const Matrix<double> u = Matrix<double>::Constant(60, 1, 2.5);
  Matrix<double> rest = Matrix<double>::Zero(8, 1);
  rest(0, 0) = 2.5;
  for (const double alpha : {0.0, 0.5, 1.0}) {
    const Matrix<double> c = run(u, {.states = 8,
                                     .method = Discretization::gbt,
                                     .alpha = alpha,
                                     .timing = LegsTiming::consistent});
    if (alpha > 0) CHECK(largest_difference(c, rest) < 1e-13);
    // A fixed point of every method in the code's timing, once it is there.
    auto memory = eb::legs_memory<double>(
        {.states = 8, .method = Discretization::gbt, .alpha = alpha, .timing = LegsTiming::code},
        1);
    memory.coefficients = rest;
    memory.inputs = 20;
    eb::legs_step(memory, u);
    if (alpha > 0) CHECK(largest_difference(memory.coefficients, rest) < 1e-13);
  }
  const Matrix<double> few = u.topRows(12);
  CHECK(largest_difference(run(few, {.states = 4, .method = Discretization::forward}),
                           rest.topRows(4)) < 1e-10);
  CHECK(largest_difference(run(few, {.states = 8, .method = Discretization::zoh}), rest) < 1e-12);
  // The paper's bilinear weights drift: B has 1/k, A the mean of 1/k and 1/(k+1).
  const double drift = largest_difference(run(u, {.states = 8}), rest) / 2.5;
  MESSAGE("drift of a constant, bilinear, paper, k = 60: ", drift);
  CHECK(std::abs(drift - 0.035) < 1e-3);
}

TEST_CASE("timescale equivariance: every input twice gives the same memory") {
  const Matrix<double> u = random(30, 2, 6);
  Matrix<double> twice(60, 2), once(10, 2), again(10, 2);
  for (Index t = 0; t < 60; ++t) twice.row(t) = u.row(t / 2);
  eb::legs_project(u, once);
  eb::legs_project(twice, again);
  CHECK(largest_difference(once, again) < 1e-13);
  CHECK(largest_difference(run(twice, {.states = 6, .method = Discretization::zoh}),
                           run(u, {.states = 6, .method = Discretization::zoh})) < 1e-12);
}

TEST_CASE("the past is forgotten polynomially: d c(T) / d u_m has the size 1/T at every m") {
  // With zoh the influence of step m on step T is sum_j a_j (m/T)^j / m, j = 1..N: it scales as 1/T at fixed m/T, where an
  // LTI system would have e^(-(T - m)).
  const auto influence = [](Index steps, Index at) {
    Matrix<double> g = Matrix<double>::Ones(3, 1), du(steps, 1);
    eb::legs_project_backward(g, du);
    return du(at, 0);
  };
  const double small = influence(200, 50), large = influence(2000, 505);
  CHECK(std::abs(10 * large / small - 1) < 0.05);
  // The polynomial: T du_m as a function of m/T is one of degree N - 1, so its N-th difference is zero.
  Matrix<double> g = Matrix<double>::Ones(3, 1), du(100, 1);
  eb::legs_project_backward(g, du);
  CHECK(std::abs(du(40, 0) - 3 * du(41, 0) + 3 * du(42, 0) - du(43, 0)) < 1e-15);
  CHECK(std::abs(du(40, 0) - 2 * du(41, 0) + du(42, 0)) > 1e-7);
}

TEST_CASE("gradients with respect to the inputs") {
  Matrix<double> u = random(13, 3, 7);
  const Matrix<double> glast = random(5, 3, 8), gstates = random(13, 15, 9);
  for (const LegsTiming timing : kTimings) {
    for (const Discretization method : {Discretization::bilinear, Discretization::backward,
                                        Discretization::forward, Discretization::zoh}) {
      const LegsOptions options{.states = 5, .method = method, .timing = timing};
      Matrix<double> last(5, 3), states(13, 15), du(13, 3), part(13, 3);
      const auto loss = [&] {
        eb::legs_forward(u, last, options, &states);
        return last.cwiseProduct(glast).sum() + states.cwiseProduct(gstates).sum();
      };
      eb::legs_backward(&glast, &gstates, du, options);
      const auto r = eb::gradcheck(loss, u, du);
      CHECK_MESSAGE(r.passed, r.message());
      // Linear in the upstream gradients.
      eb::legs_backward(&glast, nullptr, part, options);
      Matrix<double> rest(13, 3);
      eb::legs_backward(nullptr, &gstates, rest, options);
      CHECK(largest_difference(part + rest, du) < 1e-11 * (1 + du.cwiseAbs().maxCoeff()));
      eb::legs_backward(nullptr, nullptr, rest, options);
      CHECK(rest.cwiseAbs().maxCoeff() == 0.0);
    }
  }
  Matrix<double> du(13, 3), c(5, 3);
  eb::legs_project_backward(glast, du);
  eb::legs_project(u, c);
  CHECK(du.cwiseProduct(u).sum() == doctest::Approx(c.cwiseProduct(glast).sum()).epsilon(1e-12));
}

TEST_CASE("cuts of the sequence, kept states, snapshots and workers change no bit") {
  const Matrix<double> u = random(50, 150, 10);
  for (const LegsTiming timing : kTimings) {
    const LegsOptions options{.states = 12, .timing = timing};
    const Matrix<double> want = run(u, options);
    Matrix<double> last(12, 150), states(50, 12 * 150);
    eb::legs_forward(u, last, options, &states);
    CHECK(last == want);
    auto memory = eb::legs_memory<double>(options, 150);
    for (Index t = 0; t < 50;) {
      const Index rows = std::min<Index>(1 + t % 7, 50 - t);
      eb::legs_step(memory, u.middleRows(t, rows));
      t += rows;
      CHECK(Eigen::Map<const Matrix<double>>(states.row(t - 1).data(), 12, 150) ==
            memory.coefficients);
    }
    CHECK(memory.inputs == 50);
    auto copy = memory;
    eb::legs_step(memory, u.topRows(3));
    eb::legs_step(copy, u.topRows(3));
    CHECK(copy.coefficients == memory.coefficients);
    Matrix<double> du(50, 150), serial(50, 150);
    eb::legs_backward(&want, nullptr, serial, options);
    for (const int workers : {1, 2, 3, 7}) {
      const eb::thread_pool pool(workers);
      eb::legs_forward(u, last, options, nullptr, pool);
      CHECK(last == want);
      eb::legs_backward(&want, nullptr, du, options, pool);
      CHECK(du == serial);
    }
  }
}

TEST_CASE("steps allocate nothing") {
  if (!AllocationCount::available) return;
  const Matrix<double> u = random(4, 70, 11);
  auto memory = eb::legs_memory<double>({.states = 16}, 70);
  eb::legs_step(memory, u);
  const AllocationCount count;
  for (int i = 0; i < 5; ++i) eb::legs_step(memory, u);
  CHECK(count.calls() == 0);
}

TEST_CASE("float stays close over many steps") {
  const Matrix<double> u = band_limited(20000, 10, 3);
  const Matrix<double> want = run(u, {.states = 32});
  Matrix<float> c(32, 1);
  eb::legs_forward(Matrix<float>(u.cast<float>()), c, {.states = 32});
  const double error = (c.cast<double>() - want).norm() / want.norm();
  MESSAGE("float after 20000 steps: ", error);
  CHECK(error < 3e-5);
}

TEST_CASE("NaN stays in its channel; no channels, no inputs") {
  Matrix<double> u = random(9, 70, 12);
  u(4, 66) = std::numeric_limits<double>::quiet_NaN();
  for (const auto method : {Discretization::bilinear, Discretization::zoh}) {
    const Matrix<double> c = run(u, {.states = 4, .method = method});
    CHECK(c.col(66).hasNaN());
    CHECK(c.leftCols(66).allFinite());
    CHECK(c.rightCols(3).allFinite());
  }
  CHECK(run(Matrix<double>(0, 3), {.states = 4}) == Matrix<double>::Zero(4, 3));
  CHECK(run(Matrix<double>(5, 0), {.states = 4}).cols() == 0);
  Matrix<double> c = Matrix<double>::Ones(4, 2), du(0, 2);
  eb::legs_project(Matrix<double>(0, 2), c);
  CHECK(c == Matrix<double>::Zero(4, 2));
  eb::legs_backward(&c, nullptr, du, {.states = 4});
}

TEST_CASE("bad input is named and nothing is written") {
  using eb::invalid_argument;
  const Matrix<double> u = random(3, 2, 13);
  Matrix<double> c = Matrix<double>::Constant(4, 2, 5), wrong(4, 3), du = random(3, 2, 1);
  const Matrix<double> before = du;
  check_throws<invalid_argument>([&] { eb::legs_forward(u, c, {.states = 0}); },
                                 "states (0) must be in [1, 32768]");
  check_throws<invalid_argument>([&] { eb::legs_forward(u, c, {.states = 5}); },
                                 "last is 4 x 2, expected 5 x 2 (states, channels)");
  check_throws<invalid_argument>(
      [&] { eb::legs_forward(u, c, {.states = 4, .method = Discretization::gbt, .alpha = -1}); },
      "alpha (-1) must be in [0, 1]");
  check_throws<invalid_argument>(
      [&] { eb::legs_forward(u, c, {.states = 4, .timing = static_cast<LegsTiming>(7)}); },
      "timing (7) is not a LegsTiming");
  check_throws<invalid_argument>([&] { eb::legs_forward(u, c, {.states = 4}, &wrong); },
                                 "states is 4 x 3, expected 3 x 8 (inputs, states * channels)");
  check_throws<invalid_argument>([&] { (void)eb::legs_memory<double>({}, -1); },
                                 "channels (-1) must not be negative");
  auto memory = eb::legs_memory<double>({.states = 4}, 2);
  check_throws<invalid_argument>([&] { eb::legs_step(memory, wrong); },
                                 "u is 4 x 3, expected 4 x 2 (inputs, channels)");
  CHECK(memory.inputs == 0);
  check_throws<invalid_argument>([&] { eb::legs_backward(&wrong, nullptr, du, {.states = 4}); },
                                 "dlast is 4 x 3, expected 4 x 2 (states, channels)");
  check_throws<invalid_argument>(
      [&] { eb::legs_backward(nullptr, &wrong, du, {.states = 4}); },
      "dstates is 4 x 3, expected 3 x 8 (rows of du, states * channels)");
  check_throws<invalid_argument>([&] { eb::legs_project(u, wrong); },
                                 "last is 4 x 3, expected 4 x 2 (states, channels)");
  check_throws<invalid_argument>([&] { eb::legs_multiply(u, c, 0.5); },
                                 "out is 4 x 2, expected 3 x 2 (shape of v)");
  check_throws<invalid_argument>(
      [&] { eb::legs_solve(u, du, std::numeric_limits<double>::infinity()); },
      "lambda (inf) must be finite");
  check_throws<std::domain_error>(
      [&] { eb::legs_solve(u, du, -0.5); },
      "I - lambda A is singular: 1 + lambda (n + 1) = 0 at lambda -0.5, n 1");
  CHECK(du == before);
  CHECK((c.array() == 5.0).all());
}
