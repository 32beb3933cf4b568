// ssm/s4d_kernel.hpp and ssm/s4d.hpp: kernel, layer and recurrence of diagonal state space models.
#include <eigenblocks/ssm/s4d.hpp>

#include "kernel_case.hpp"
#include "support/alloc_guard.hpp"

#include <limits>

using namespace kernel_case;

namespace {

using Parameters = eb::S4dParameters<double>;
constexpr eb::S4dOptions kZoh{}, kBilinear{.discretization = eb::Discretization::bilinear};

Parameters random_parameters(Index channels, Index modes, std::uint64_t seed = 1) {
  eb::Random random(seed);
  Parameters p;
  p.lambda = random_complex(random, channels, modes);
  for (Index i = 0; i < p.lambda.size(); ++i) {
    Complex& z = p.lambda.data()[i];
    z = {-0.1 - std::abs(z.real()), 5 * z.imag()};
  }
  p.b = random_complex(random, channels, modes);
  p.c = random_complex(random, channels, modes);
  p.dt.resize(channels);
  p.skip.resize(channels);
  for (Index h = 0; h < channels; ++h) {
    p.dt[h] = 0.02 + 0.1 * random.uniform();
    p.skip[h] = random.normal();
  }
  return p;
}

/// The oracle: one power after the other.
Real power_kernel(const Parameters& p, Index length, const eb::S4dOptions& options) {
  Real k = Real::Zero(length, p.channels());
  for (Index h = 0; h < p.channels(); ++h) {
    for (Index n = 0; n < p.modes(); ++n) {
      const auto step =
          eb::discretize_diagonal<double>(p.lambda(h, n), p.dt[h], options.discretization);
      Complex x = step.phi * p.b(h, n);
      for (Index l = 0; l < length; ++l, x *= step.a) k(l, h) += 2 * (p.c(h, n) * x).real();
    }
  }
  return k;
}

struct Run {
  Real y;
  ComplexMatrix last;
};
Run convolved(const Parameters& p, const Real& u, const ComplexMatrix& x0,
              const eb::S4dOptions& options = {}) {
  Run r{Real(u.rows(), u.cols()), {}};
  eb::KernelLayerSaved<double> saved;
  eb::s4d_forward(saved, p, u, r.y, options, &x0, &r.last);
  return r;
}
Run stepped(const Parameters& p, const Real& u, const ComplexMatrix& x0, Index rows,
            const eb::S4dOptions& options = {}) {
  Run r{Real(u.rows(), u.cols()), {}};
  auto state = eb::s4d_state(p, options, &x0);
  for (Index t = 0; t < u.rows(); t += rows) {
    const Index n = std::min(rows, u.rows() - t);
    auto snapshot = state;
    eb::s4d_step(snapshot, u.middleRows(t, n), r.y.middleRows(t, n));
    state = snapshot;
  }
  r.last = state.value();
  return r;
}

}  // namespace

TEST_CASE("s4d: the kernel is the sum of powers, for every length and both discretisations") {
  Parameters p = random_parameters(3, 5);
  p.lambda(0, 0) = 0;                      // a = 1
  p.lambda(1, 0) = Complex(-2 / p.dt[1]);  // bilinear: a = 0
  p.lambda(2, 0) = Complex(-1e5, 3e4);     // gone after a step
  for (const eb::S4dOptions& options : {kZoh, kBilinear}) {
    for (const Index length : {1, 2, 7, 8, 63, 64, 65, 1000, 5000})
      CHECK(relative(eb::s4d_kernel(p, length, options), power_kernel(p, length, options)) < 2e-13);
  }
}

TEST_CASE("s4d: powers far out are fresh, not drifted") {
  Parameters p = random_parameters(1, 1);
  p.lambda(0, 0) = Complex(0, 1);  // no decay
  p.b(0, 0) = p.c(0, 0) = 1;
  p.dt[0] = 1;
  const Index length = 200001;
  const Real k = eb::s4d_kernel(p, length);
  const Complex phi = (std::exp(Complex(0, 1)) - 1.0) / Complex(0, 1);
  double worst = 0;
  for (Index l = 0; l < length; ++l) {
    const double angle = static_cast<double>(l);
    worst = std::max(
        worst, std::abs(k(l, 0) - 2 * (phi * Complex(std::cos(angle), std::sin(angle))).real()));
  }
  CHECK(worst < 2.5e-14);
}

TEST_CASE("s4d: float keeps float's precision over long kernels") {
  eb::Random random(4);
  const auto p = eb::s4d_parameters<float>(3, 64, random);
  Parameters wide;
  wide.lambda = p.lambda.cast<Complex>();
  wide.b = p.b.cast<Complex>();
  wide.c = p.c.cast<Complex>();
  wide.dt = p.dt.cast<double>();
  CHECK(relative(eb::s4d_kernel(p, 4096).cast<double>(), eb::s4d_kernel(wide, 4096)) < 1e-6);
}

TEST_CASE("s4d: convolution, steps and chunks agree, from a state to a state") {
  eb::Random random(2);
  for (const eb::S4dOptions& options : {kZoh, kBilinear}) {
    for (const auto& [rows, channels, modes] :
         {std::tuple<Index, Index, Index>{1, 1, 1}, {37, 5, 3}, {130, 9, 2}}) {
      const Parameters p = random_parameters(channels, modes);
      const Real u = eb::normal_matrix<double>(random, rows, channels);
      const ComplexMatrix x0 = random_complex(random, channels, modes);
      const Run whole = convolved(p, u, x0, options);
      for (const Index chunk : {Index{1}, Index{2}, Index{7}, rows}) {
        const Run run = stepped(p, u, x0, chunk, options);
        CHECK(relative(run.y, whole.y) < 1e-11);
        CHECK(relative(run.last, whole.last) < 1e-11);
      }
    }
  }
}

TEST_CASE("s4d: the step by hand") {
  Parameters p = random_parameters(1, 1);
  p.dt[0] = 0.5;
  p.lambda(0, 0) = Complex(-1, 2);
  const auto step = eb::discretize_diagonal<double>(p.lambda(0, 0), 0.5, eb::Discretization::zoh);
  ComplexMatrix x0(1, 1);
  x0(0, 0) = Complex(0.3, -0.7);
  Real u(1, 1), y(1, 1);
  u(0, 0) = 1.5;
  auto state = eb::s4d_state(p, {}, &x0);
  eb::s4d_step(state, u, y);
  const Complex x = step.a * x0(0, 0) + step.phi * p.b(0, 0) * 1.5;
  CHECK(std::abs(state.value()(0, 0) - x) < 1e-15);
  CHECK(y(0, 0) == doctest::Approx(2 * (p.c(0, 0) * x).real() + p.skip[0] * 1.5).epsilon(1e-14));
}

TEST_CASE("s4d: gradients of the kernel") {
  for (const eb::S4dOptions& options : {kZoh, kBilinear}) {
    Parameters p = random_parameters(2, 3), dp;
    p.dt[0] = 1;
    p.lambda(0, 1) = Complex(-2);  // bilinear: a = 0, where only a^0 and its neighbour count
    eb::Random random(3);
    const Real up = eb::normal_matrix<double>(random, 21, 2);
    eb::s4d_kernel_backward(p, up, dp, options);
    const auto loss = [&] { return inner(up, eb::s4d_kernel(p, 21, options)); };
    check_gradient(loss, p.lambda, dp.lambda, "lambda");
    check_gradient(loss, p.b, dp.b, "b");
    check_gradient(loss, p.c, dp.c, "c");
    check_gradient(loss, p.dt, dp.dt, "dt");
    CHECK(dp.skip == eb::Vector<double>::Zero(2));
  }
}

TEST_CASE("s4d: gradients of the layer, states included") {
  Parameters p = random_parameters(2, 2), dp;
  eb::Random random(5);
  Real u = eb::normal_matrix<double>(random, 11, 2), du(11, 2);
  const Real dy = eb::normal_matrix<double>(random, 11, 2);
  ComplexMatrix x0 = random_complex(random, 2, 2), dx0;
  const ComplexMatrix dlast = random_complex(random, 2, 2);
  eb::KernelLayerSaved<double> saved;
  Real y(11, 2);
  eb::s4d_forward(saved, p, u, y);
  eb::s4d_backward(saved, p, u, dy, du, dp, {}, &x0, &dlast, &dx0);
  const auto loss = [&] {
    const Run r = convolved(p, u, x0);
    return inner(dy, r.y) + inner(dlast, r.last);
  };
  check_gradient(loss, p.lambda, dp.lambda, "lambda");
  check_gradient(loss, p.b, dp.b, "b");
  check_gradient(loss, p.c, dp.c, "c");
  check_gradient(loss, p.dt, dp.dt, "dt");
  check_gradient(loss, p.skip, dp.skip, "skip");
  check_gradient(loss, u, du, "u");
  check_gradient(loss, x0, dx0, "x0");
}

TEST_CASE("s4d: small steps approach the continuous system") {
  Parameters p = random_parameters(1, 3);
  p.dt[0] = 1e-5;
  const Real zoh = eb::s4d_kernel(p, 1000, kZoh), bilinear = eb::s4d_kernel(p, 1000, kBilinear);
  double exact = 0;
  for (Index n = 0; n < 3; ++n)
    exact += 2 * (p.c(0, n) * std::exp(p.lambda(0, n) * 1e-5 * 999.0) * p.b(0, n)).real();
  CHECK(zoh(999, 0) / 1e-5 == doctest::Approx(exact).epsilon(1e-3));
  CHECK(relative(zoh, bilinear) < 1e-4);
}

TEST_CASE("s4d: causal and the same for every executor") {
  const Parameters p = random_parameters(19, 4);
  eb::Random random(6);
  const Real u = eb::normal_matrix<double>(random, 70, 19);
  Real later = u;
  later.bottomRows(20).setConstant(9);
  const ComplexMatrix x0 = random_complex(random, 19, 4);
  const Run a = convolved(p, u, x0), b = convolved(p, later, x0);
  CHECK(largest_difference(a.y.topRows(50), b.y.topRows(50)) < 1e-11);
  check_same_bits([&](eb::ExecutorRef executor) { return eb::s4d_kernel(p, 300, {}, executor); });
  check_same_bits([&](eb::ExecutorRef executor) {
    eb::KernelLayerSaved<double> saved;
    Real y(70, 19), du(70, 19);
    ComplexMatrix last, dx0;
    Parameters dp;
    eb::s4d_forward(saved, p, u, y, {}, &x0, &last, executor);
    eb::s4d_backward(saved, p, u, later, du, dp, {}, &x0, &x0, &dx0, executor);
    Real all(19, 140 + 32);
    all << y.transpose(), du.transpose(), parts_of(last), parts_of(dx0), parts_of(dp.lambda),
        parts_of(dp.b);
    return all;
  });
}

TEST_CASE("s4d: no rows leave the state, steps allocate nothing") {
  const Parameters p = random_parameters(5, 3);
  eb::Random random(7);
  const ComplexMatrix x0 = random_complex(random, 5, 3);
  const Run none = convolved(p, Real(0, 5), x0);
  CHECK(none.last == x0);
  eb::KernelLayerSaved<double> saved;
  Real empty(0, 5);
  Parameters dp;
  ComplexMatrix dx0;
  eb::s4d_forward(saved, p, empty, empty);
  eb::s4d_backward(saved, p, empty, empty, empty, dp, {}, &x0, &x0, &dx0);
  CHECK(dx0 == x0);
  CHECK(dp.lambda == ComplexMatrix::Zero(5, 3));
  auto state = eb::s4d_state(p);
  Real u = Real::Ones(4, 5), y(4, 5);
  const AllocationCount count;
  eb::s4d_step(state, u, y);
  if (AllocationCount::available) CHECK(count.calls() == 0);
}

TEST_CASE("s4d: initial modes and parameters") {
  CHECK(eb::s4d_modes(eb::S4dInit::lin, 8)[3].imag() == doctest::Approx(-9.42477796076938));
  CHECK(eb::s4d_modes(eb::S4dInit::inv, 8)[1].imag() == doctest::Approx(-4.2441318157838759));
  CHECK(eb::s4d_modes(eb::S4dInit::inv2, 8)[1].imag() == doctest::Approx(-7.6394372684109766));
  CHECK(eb::s4d_modes(eb::S4dInit::quad, 8)[2].imag() == doctest::Approx(-7.9577471545947667));
  CHECK(eb::s4d_modes(eb::S4dInit::real, 8)[2] == Complex(-3, 0));
  CHECK(eb::s4d_modes(eb::S4dInit::legs, 8)[0].real() == doctest::Approx(-0.5));
  eb::Random a(1), b(1);
  const Parameters p = eb::s4d_parameters<double>(4, 8, a, {.dt_min = 0.01, .dt_max = 0.02});
  const Parameters q =
      eb::s4d_parameters<double>(4, 8, b, {.dt_min = 0.01, .dt_max = 0.02, .positive = true});
  CHECK(p.lambda == q.lambda.conjugate());
  CHECK(p.c == q.c);
  CHECK(p.dt.minCoeff() >= 0.01);
  CHECK(p.dt.maxCoeff() <= 0.02);
  Parameters mirrored = q;  // the same layer with C conjugated
  mirrored.c = p.c.conjugate();
  CHECK(relative(eb::s4d_kernel(mirrored, 50), eb::s4d_kernel(p, 50)) < 1e-14);
}

TEST_CASE("s4d: errors name both sides and leave outputs alone") {
  const Parameters good = random_parameters(2, 3);
  Real k = Real::Constant(4, 2, 7);
  const auto refuse = [&](auto&& change, const std::string& text) {
    Parameters p = good;
    change(p);
    check_throws<eb::invalid_argument>([&] { eb::s4d_kernel_forward(p, k); }, text);
    check_throws<eb::invalid_argument>([&] { eb::s4d_state(p); }, text);
    CHECK(k == Real::Constant(4, 2, 7));
  };
  refuse([](Parameters& p) { p.lambda(1, 2) = Complex(0.5, 1); },
         "lambda(1, 2) has real part 0.5, which must not be positive");
  refuse([](Parameters& p) { p.dt[1] = 0; }, "dt[1] (0) must be positive and finite");
  refuse([](Parameters& p) { p.dt.resize(3); }, "dt has 3 entries, expected 2 (channels)");
  refuse([](Parameters& p) { p.c.resize(2, 2); }, "c is 2 x 2, expected 2 x 3 (shape of lambda)");
  refuse([](Parameters& p) { p.b(0, 0) = std::numeric_limits<double>::infinity(); },
         "b must be finite");
  refuse(
      [](Parameters& p) {
        p.skip.resize(1);
        p.skip[0] = 0;
      },
      "skip has 1 entries, expected 2 (channels) or none");
  check_throws<eb::invalid_argument>([&] { eb::s4d_kernel(good, 0); },
                                     "length (0) must be at least 1");
  check_throws<eb::invalid_argument>(
      [&] { eb::s4d_kernel(good, 4, {.discretization = eb::Discretization::backward}); },
      "discretization (1) must be zoh or bilinear");
  check_throws<eb::invalid_argument>([&] { eb::s4d_modes(eb::S4dInit::lin, 7); },
                                     "states (7) must be even and at least 2");
  eb::KernelLayerSaved<double> saved;
  Real u = Real::Ones(4, 3);
  check_throws<eb::invalid_argument>([&] { eb::s4d_forward(saved, good, u, k); },
                                     "u has 3 columns, expected 2 (channels)");
  const ComplexMatrix x0 = ComplexMatrix::Zero(2, 2);
  Real input = Real::Ones(4, 2);
  check_throws<eb::invalid_argument>([&] { eb::s4d_forward(saved, good, input, k, {}, &x0); },
                                     "initial is 2 x 2, expected 2 x 3 (channels x modes)");
  Parameters dp;
  check_throws<eb::invalid_argument>([&] { eb::s4d_backward(saved, good, input, input, k, dp); },
                                     "saved is of a forward pass over 0 x 0, but u is 4 x 2");
  auto state = eb::s4d_state(good);
  check_throws<eb::invalid_argument>([&] { eb::s4d_step(state, u, k); },
                                     "rows has 3 columns, expected 2 (channels)");
  CHECK(k == Real::Constant(4, 2, 7));
  CHECK(state.value() == ComplexMatrix::Zero(2, 3));
}
