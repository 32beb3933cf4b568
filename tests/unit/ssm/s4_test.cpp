// ssm/s4_discrete.hpp, s4_cauchy.hpp, s4_kernel.hpp and s4.hpp: kernel, layer and recurrence of S4.
#include <eigenblocks/ssm/s4.hpp>

#include "kernel_case.hpp"
#include "support/alloc_guard.hpp"

#include <initializer_list>

using namespace kernel_case;

namespace {

using Parameters = eb::S4Parameters<double>;
constexpr eb::S4Options kTruncated{}, kPlain{.output = eb::S4Output::plain};

/// HiPPO's with noise on everything, so that no phase is special.
Parameters random_parameters(Index channels, Index states, eb::HippoMeasure measure, Index rank = 0,
                             double noise = 0.5) {
  eb::Random random(1);
  Parameters p = eb::s4_parameters<double>(
      channels, states, random, {.measure = measure, .rank = rank, .dt_min = 0.02, .dt_max = 0.2});
  p.p += noise * random_complex(random, p.p.rows(), p.p.cols());
  p.b += noise * random_complex(random, channels, p.modes());
  for (Index i = 0; i < p.lambda.size(); ++i)
    p.lambda.data()[i] += noise * Complex(-random.uniform() - 0.2, random.normal());
  return p;
}

struct Run {
  Real y;
  ComplexMatrix last;
};
Run stepped(const Parameters& p, const Real& u, const ComplexMatrix& x0, Index rows) {
  Run r{Real(u.rows(), u.cols()), {}};
  auto state = eb::s4_state(p, &x0);
  for (Index t = 0; t < u.rows(); t += rows) {
    const Index n = std::min(rows, u.rows() - t);
    auto snapshot = state;
    eb::s4_step(snapshot, u.middleRows(t, n), r.y.middleRows(t, n));
    state = snapshot;
  }
  r.last = state.value();
  return r;
}

}  // namespace

TEST_CASE("s4: the kernel is that of powers, odd and even lengths, every rank, both forms of C") {
  const Parameters legs = random_parameters(2, 8, eb::HippoMeasure::legs);
  const Parameters legt = random_parameters(1, 6, eb::HippoMeasure::legt);
  const Parameters wide = random_parameters(1, 6, eb::HippoMeasure::legt, 3);
  Parameters diagonal = legs;
  diagonal.p.resize(0, 0);
  for (const Parameters* p :
       std::initializer_list<const Parameters*>{&legs, &legt, &wide, &diagonal}) {
    for (const Index length : {1, 2, 3, 16, 31, 130}) {
      for (const eb::S4Options& options : {kTruncated, kPlain}) {
        CHECK(relative(eb::s4_kernel(*p, length, options),
                       eb::s4_kernel_reference(*p, length, options)) < 1e-11);
      }
    }
  }
}

TEST_CASE("s4: 64 states of LegS over 1024 steps, to 1e-12 of the largest value") {
  eb::Random random(2);
  const Parameters p = eb::s4_parameters<double>(1, 64, random, {.dt_min = 0.01, .dt_max = 0.01});
  CHECK(relative(eb::s4_kernel(p, 1024), eb::s4_kernel_reference(p, 1024)) < 1e-12);
  CHECK(relative(eb::s4_kernel(p, 1023, kPlain), eb::s4_kernel_reference(p, 1023, kPlain)) < 1e-12);
}

TEST_CASE("s4: convolution, steps, chunks and a dense scan agree") {
  eb::Random random(3);
  for (const auto measure : {eb::HippoMeasure::legs, eb::HippoMeasure::legt}) {
    const Parameters p = random_parameters(5, 8, measure);
    const Real u = eb::normal_matrix<double>(random, 45, 5);
    const ComplexMatrix zero = ComplexMatrix::Zero(5, 4), x0 = random_complex(random, 5, 4);
    eb::KernelLayerSaved<double> saved;
    Real y(45, 5);
    eb::s4_forward(saved, p, u, y, kPlain);
    CHECK(relative(stepped(p, u, zero, 45).y, y) < 1e-10);
    Parameters trained = p;
    trained.c = eb::s4_truncate(p, 45);
    Real same(45, 5);
    eb::s4_forward(saved, trained, u, same);
    CHECK(relative(same, y) < 1e-10);
    const Run whole = stepped(p, u, x0, 45);
    for (const Index rows : {1, 2, 7, 44}) {
      const Run run = stepped(p, u, x0, rows);
      CHECK(relative(run.y, whole.y) < 1e-13);
      CHECK(relative(run.last, whole.last) < 1e-13);
    }
    // x <- Abar x + Bbar u with the dense discretisation of the oracle: its kernel by another way than s4_kernel
    const Real k = eb::s4_kernel_reference(p, 45, kPlain);
    Real direct = u * p.skip.asDiagonal();
    for (Index t = 0; t < 45; ++t) {
      for (Index j = 0; j <= t; ++j) direct.row(t) += k.row(j).cwiseProduct(u.row(t - j));
    }
    CHECK(relative(y, direct) < 1e-10);
  }
}

TEST_CASE("s4: C and C~, and growing lengths") {
  const Parameters p = random_parameters(3, 6, eb::HippoMeasure::legs);
  Parameters trained = p;
  trained.c = eb::s4_truncate(p, 20);
  const auto back = eb::s4_untruncate(trained, 20);
  CHECK(back.reliable);
  CHECK(back.rcond.minCoeff() > 1e-6);
  CHECK(relative(back.c, p.c) < 1e-10);
  CHECK(relative(eb::s4_double_length(trained, 20), eb::s4_truncate(p, 40)) < 1e-11);
  Parameters slow = p;  // hardly any decay within the length
  slow.dt.setConstant(1e-12);
  slow.c = eb::s4_truncate(slow, 2);
  const auto poor = eb::s4_untruncate(slow, 2);
  CHECK(!poor.reliable);
  CHECK(poor.rcond.maxCoeff() < 1e-10);
}

TEST_CASE("s4: gradients of the kernel") {
  for (const auto measure : {eb::HippoMeasure::legs, eb::HippoMeasure::legt}) {
    for (const eb::S4Options& options : {kTruncated, kPlain}) {
      for (const Index length : {9, 12}) {
        Parameters p = random_parameters(2, 4, measure), dp;
        eb::Random random(4);
        const Real up = eb::normal_matrix<double>(random, length, 2);
        eb::s4_kernel_backward(p, up, dp, options);
        const auto loss = [&] { return inner(up, eb::s4_kernel(p, length, options)); };
        check_gradient(loss, p.lambda, dp.lambda, "lambda");
        check_gradient(loss, p.p, dp.p, "p");
        check_gradient(loss, p.b, dp.b, "b");
        check_gradient(loss, p.c, dp.c, "c");
        check_gradient(loss, p.dt, dp.dt, "dt");
      }
    }
  }
}

TEST_CASE("s4: gradients of the layer and of the recurrence") {
  Parameters p = random_parameters(2, 4, eb::HippoMeasure::legt), dp;
  eb::Random random(5);
  Real u = eb::normal_matrix<double>(random, 9, 2), du(9, 2), y(9, 2);
  const Real dy = eb::normal_matrix<double>(random, 9, 2);
  eb::KernelLayerSaved<double> saved;
  eb::s4_forward(saved, p, u, y);
  eb::s4_backward(saved, p, u, dy, du, dp);
  const auto layer = [&] {
    eb::KernelLayerSaved<double> own;
    eb::s4_forward(own, p, u, y);
    return inner(dy, y);
  };
  check_gradient(layer, p.p, dp.p, "p");
  check_gradient(layer, p.c, dp.c, "c");
  check_gradient(layer, p.skip, dp.skip, "skip");
  check_gradient(layer, u, du, "u");

  ComplexMatrix x0 = random_complex(random, 2, 2), dx0;
  const ComplexMatrix dlast = random_complex(random, 2, 2);
  eb::s4_recurrent_backward(p, u, dy, du, dp, &x0, &dlast, &dx0);
  const auto recurrence = [&] {
    const Run r = stepped(p, u, x0, 9);
    return inner(dy, r.y) + inner(dlast, r.last);
  };
  check_gradient(recurrence, p.lambda, dp.lambda, "lambda");
  check_gradient(recurrence, p.p, dp.p, "p");
  check_gradient(recurrence, p.b, dp.b, "b");
  check_gradient(recurrence, p.c, dp.c, "c");
  check_gradient(recurrence, p.dt, dp.dt, "dt");
  check_gradient(recurrence, p.skip, dp.skip, "skip");
  check_gradient(recurrence, u, du, "u");
  check_gradient(recurrence, x0, dx0, "x0");
}

TEST_CASE("s4: the recurrence's gradient over more rows than it keeps states for") {
  const Parameters p = random_parameters(1, 4, eb::HippoMeasure::legs);
  eb::Random random(6);
  const Real u = eb::normal_matrix<double>(random, 150, 1),
             dy = eb::normal_matrix<double>(random, 150, 1);
  Real y(150, 1), du(150, 1), du_conv(150, 1);
  Parameters dp, dp_conv;
  eb::KernelLayerSaved<double> saved;
  eb::s4_forward(saved, p, u, y, kPlain);
  eb::s4_backward(saved, p, u, dy, du_conv, dp_conv, kPlain);
  eb::s4_recurrent_backward(p, u, dy, du, dp);
  CHECK(relative(du, du_conv) < 1e-10);
  CHECK(relative(dp.lambda, dp_conv.lambda) < 1e-9);
  CHECK(relative(dp.p, dp_conv.p) < 1e-9);
  CHECK(relative(dp.b, dp_conv.b) < 1e-10);
  CHECK(relative(dp.c, dp_conv.c) < 1e-10);
  CHECK(std::abs(dp.dt[0] - dp_conv.dt[0]) < 1e-9 * std::abs(dp.dt[0]));
}

TEST_CASE("s4: the same for every executor; steps allocate nothing; no rows") {
  const Parameters p = random_parameters(11, 6, eb::HippoMeasure::legs);
  eb::Random random(7);
  const Real up = eb::normal_matrix<double>(random, 33, 11);
  check_same_bits([&](eb::ExecutorRef executor) {
    Parameters dp, dr;
    Real du(33, 11);
    eb::s4_kernel_backward(p, up, dp, kPlain, executor);
    eb::s4_recurrent_backward(p, up, up, du, dr, nullptr, nullptr, nullptr, executor);
    Real all(11, 66 + 18);
    all << eb::s4_kernel(p, 33, kPlain, executor).transpose(), du.transpose(), parts_of(dp.lambda),
        parts_of(dr.b), parts_of(eb::s4_truncate(p, 33, executor));
    return all;
  });
  auto state = eb::s4_state(p);
  Real y(33, 11);
  {
    const AllocationCount count;
    eb::s4_step(state, up, y);
    if (AllocationCount::available) CHECK(count.calls() == 0);
  }
  eb::KernelLayerSaved<double> saved;
  Real empty(0, 11);
  Parameters dp;
  eb::s4_forward(saved, p, empty, empty);
  eb::s4_backward(saved, p, empty, empty, empty, dp);
  CHECK(dp.p == ComplexMatrix::Zero(11, 3));
}

TEST_CASE("s4: initial parameters") {
  eb::Random random(8);
  const Parameters p = eb::s4_parameters<double>(3, 8, random, {.measure = eb::HippoMeasure::legt});
  CHECK(p.rank() == 2);
  CHECK(p.p.row(2) == p.p.row(0));  // p_0 of channels 0 .. 2, then p_1
  CHECK(p.p.row(3) != p.p.row(0));
  CHECK(p.dt.minCoeff() >= 1e-3);
  CHECK(p.dt.maxCoeff() <= 1e-1);
}

TEST_CASE("s4: errors name both sides and leave outputs alone") {
  const Parameters good = random_parameters(2, 4, eb::HippoMeasure::legs);
  Real k = Real::Constant(4, 2, 7);
  const auto refuse = [&](auto&& change, const std::string& text) {
    Parameters p = good;
    change(p);
    check_throws<eb::invalid_argument>([&] { eb::s4_kernel_forward(p, k); }, text);
    check_throws<eb::invalid_argument>([&] { eb::s4_state(p); }, text);
    CHECK(k == Real::Constant(4, 2, 7));
  };
  refuse([](Parameters& p) { p.lambda(0, 1) = Complex(1e-3, -1); },
         "lambda(0, 1) has real part 0.001, which must not be positive");
  refuse([](Parameters& p) { p.dt[0] = -1; }, "dt[0] (-1) must be positive and finite");
  refuse([](Parameters& p) { p.p.resize(3, 2); },
         "p is 3 x 2, expected rank * 2 x 2 (rank * channels, modes)");
  refuse([](Parameters& p) { p.p(1, 1) = std::nan(""); }, "p must be finite");
  check_throws<eb::invalid_argument>([&] { eb::s4_kernel(good, 0); },
                                     "length (0) must be at least 1");
  Real wrong(4, 3);
  check_throws<eb::invalid_argument>([&] { eb::s4_kernel_forward(good, wrong); },
                                     "kernel is 4 x 3, expected 4 x 2 (length x channels)");
  Parameters pole = good;
  pole.p.setZero();
  pole.lambda(1, 0) = 0;
  check_throws<std::domain_error>(
      [&] { eb::s4_kernel_forward(pole, k); },
      "s4_kernel: a pole of channel 1 lies on a node of the kernel's transform");
  CHECK(k == Real::Constant(4, 2, 7));
  auto state = eb::s4_state(good);
  check_throws<eb::invalid_argument>([&] { eb::s4_step(state, wrong, wrong); },
                                     "rows has 3 columns, expected 2 (channels)");
}
