// ssm/rational.hpp: kernels, layer and recurrence of RTF, and ss_to_tf.
#include <eigenblocks/ssm/discretize.hpp>
#include <eigenblocks/ssm/rational.hpp>

#include "kernel_case.hpp"
#include "support/alloc_guard.hpp"

using namespace kernel_case;

namespace {

using Parameters = eb::RationalParameters<double>;
using eb::RationalForm;
constexpr RationalForm kForms[] = {RationalForm::proper, RationalForm::proper_true,
                                   RationalForm::delayed};

/// sum |a| < 1: stable.
Parameters random_parameters(Index channels, Index states, std::uint64_t seed = 1) {
  eb::Random random(seed);
  Parameters p{.a = eb::normal_matrix<double>(random, channels, states),
               .b = eb::normal_matrix<double>(random, channels, states),
               .h0 = eb::normal_matrix<double>(random, channels, 1)};
  for (Index h = 0; h < channels; ++h) p.a.row(h) *= 0.9 / p.a.row(h).cwiseAbs().sum();
  return p;
}

/// C Abar^l B with dense matrices, C from (I - (Abar^n)^T)^-1 b unless b is C; delayed: one step later, plus the alias.
Real dense_kernel(const Parameters& p, Index length, RationalForm form, Real* c_out = nullptr) {
  const Index states = p.states(), n = length + length % 2;
  Real k(length, p.channels());
  for (Index h = 0; h < p.channels(); ++h) {
    Real a = Real::Zero(states, states);
    a.row(0) = -p.a.row(h);
    for (Index i = 1; i < states; ++i) a(i, i - 1) = 1;
    Real c = p.b.row(h), power = Real::Identity(states, states);
    for (Index i = 0; i < n; ++i) power = power.lazyProduct(a).eval();
    if (form != RationalForm::proper_true) {
      Real system = (Real::Identity(states, states) - power).transpose(), column = c.transpose();
      eb::detail::dense_solve(system, column);
      c = column.transpose();
    }
    if (c_out != nullptr) c_out->row(h) = c;
    eb::Vector<double> x = eb::Vector<double>::Unit(states, 0);
    eb::Vector<double> values(n);
    for (Index l = 0; l < n; ++l) {
      values[l] = c.row(0).dot(x);
      x = a.lazyProduct(x).eval();
    }
    const bool delayed = form == RationalForm::delayed;
    for (Index l = 0; l < length; ++l) k(l, h) = delayed ? values[(l + n - 1) % n] : values[l];
    k(0, h) += p.h0[h];
  }
  return k;
}

Real stepped(const Parameters& p, Index length, const eb::RationalOptions& options, const Real& u,
             Index rows) {
  Real y(u.rows(), u.cols());
  auto state = eb::rational_state(p, length, options);
  for (Index t = 0; t < u.rows(); t += rows) {
    const Index n = std::min(rows, u.rows() - t);
    auto snapshot = state;
    eb::rational_step(snapshot, u.middleRows(t, n), y.middleRows(t, n));
    state = snapshot;
  }
  return y;
}

}  // namespace

TEST_CASE("rational: the kernel and C are those of the companion matrix, odd and even lengths") {
  for (const RationalForm form : kForms) {
    for (const auto& [length, states] :
         {std::pair<Index, Index>{1, 1}, {2, 1}, {7, 3}, {8, 5}, {40, 6}, {45, 4}}) {
      const Parameters p = random_parameters(3, states);
      Real c(3, states);
      const Real want = dense_kernel(p, length, form, &c);
      CHECK(relative(eb::rational_kernel(p, length, {form}), want) < 1e-12);
      CHECK(relative(eb::rational_output(p, length, {form}), c) < 1e-12);
    }
  }
}

TEST_CASE("rational: convolution, steps and chunks agree") {
  eb::Random random(2);
  const Parameters p = random_parameters(5, 4);
  const Real u = eb::normal_matrix<double>(random, 33, 5);
  for (const RationalForm form : kForms) {
    const eb::RationalOptions options{form};
    const Real whole = stepped(p, 33, options, u, 33);
    for (const Index rows : {1, 2, 7, 32})
      CHECK(relative(stepped(p, 33, options, u, rows), whole) < 1e-14);
    Real y(33, 5);
    eb::KernelLayerSaved<double> saved;
    eb::rational_forward(saved, p, u, y, options);
    Real expected = whole;
    if (form == RationalForm::delayed) {  // the official alias: k_0 holds C Abar^(n-1) B as well
      const eb::RowVector<double> alias =
          eb::rational_kernel(p, 33, options).row(0) - p.h0.transpose();
      for (Index t = 0; t < 33; ++t) expected.row(t) += alias.cwiseProduct(u.row(t));
    }
    CHECK(relative(y, expected) < 1e-12);
  }
  // a state given, and what it becomes
  Real x0 = eb::normal_matrix<double>(random, 5, 4), y(1, 5);
  auto state = eb::rational_state(p, 33, {}, &x0);
  CHECK(state.value() == x0);
  eb::rational_step(state, u.topRows(1), y);
  const Real x = state.value();
  for (Index h = 0; h < 5; ++h) {
    CHECK(x(h, 0) == doctest::Approx(u(0, h) - p.a.row(h).dot(x0.row(h))));
    CHECK(x(h, 3) == x0(h, 2));
  }
}

TEST_CASE("rational: a window of the last inputs where a is 0") {
  Parameters p = random_parameters(1, 3);
  p.a.setZero();
  p.h0.setZero();
  const Real k = eb::rational_kernel(p, 8);
  CHECK(largest_difference(k.topRows(3), p.b.transpose()) < 1e-15);
  CHECK(k.bottomRows(5).cwiseAbs().maxCoeff() < 1e-15);
}

TEST_CASE("rational: gradients") {
  eb::Random random(3);
  for (const RationalForm form : kForms) {
    for (const Index length : {7, 8}) {
      Parameters p = random_parameters(2, 3), dp;
      const Real up = eb::normal_matrix<double>(random, length, 2);
      eb::rational_kernel_backward(p, up, dp, {form});
      const auto loss = [&] { return inner(up, eb::rational_kernel(p, length, {form})); };
      check_gradient(loss, p.a, dp.a, "a");
      check_gradient(loss, p.b, dp.b, "b");
      check_gradient(loss, p.h0, dp.h0, "h0");
    }
  }
  Parameters p = random_parameters(2, 3), dp;
  Real u = eb::normal_matrix<double>(random, 9, 2), du(9, 2), y(9, 2);
  const Real dy = eb::normal_matrix<double>(random, 9, 2);
  eb::KernelLayerSaved<double> saved;
  eb::rational_forward(saved, p, u, y);
  eb::rational_backward(saved, p, u, dy, du, dp);
  const auto layer = [&] {
    eb::KernelLayerSaved<double> own;
    eb::rational_forward(own, p, u, y);
    return inner(dy, y);
  };
  check_gradient(layer, p.a, dp.a, "a");
  check_gradient(layer, p.b, dp.b, "b");
  check_gradient(layer, p.h0, dp.h0, "h0");
  check_gradient(layer, u, du, "u");
}

TEST_CASE("rational: the same for every executor; steps allocate nothing; no rows") {
  const Parameters p = random_parameters(19, 4);
  eb::Random random(4);
  const Real up = eb::normal_matrix<double>(random, 30, 19);
  check_same_bits([&](eb::ExecutorRef executor) {
    Parameters dp;
    eb::rational_kernel_backward(p, up, dp, {RationalForm::proper_true}, executor);
    Real all(19, 30 + 8);
    all << eb::rational_kernel(p, 30, {}, executor).transpose(), dp.a, dp.b;
    return all;
  });
  auto state = eb::rational_state(p, 30);
  Real y(30, 19);
  {
    const AllocationCount count;
    eb::rational_step(state, up, y);
    if (AllocationCount::available) CHECK(count.calls() == 0);
  }
  eb::KernelLayerSaved<double> saved;
  Real empty(0, 19);
  Parameters dp;
  eb::rational_forward(saved, p, empty, empty);
  eb::rational_backward(saved, p, empty, empty, empty, dp);
  CHECK(dp.a == Real::Zero(19, 4));
}

TEST_CASE("ss_to_tf: the impulse response of the fraction is that of the system") {
  eb::Random random(5);
  for (const Index n : {1, 2, 3, 6, 12}) {
    const Real a =
        eb::normal_matrix<double>(random, n, n) / std::sqrt(2.0 * static_cast<double>(n));
    const eb::Vector<double> b = eb::normal_matrix<double>(random, n, 1);
    const eb::Vector<double> c = eb::normal_matrix<double>(random, n, 1);
    const eb::TransferFunction tf = eb::ss_to_tf(a, b, c);
    eb::Vector<double> x = b, series(30);
    double worst = 0;
    for (Index l = 0; l < 30; ++l) {
      series[l] = l < n ? tf.b[l] : 0.0;
      for (Index i = 1; i <= std::min(l, n); ++i) series[l] -= tf.a[i - 1] * series[l - i];
      worst = std::max(worst, std::abs(series[l] - c.dot(x)));
      x = a.lazyProduct(x).eval();
    }
    CHECK(worst < 1e-11);
  }
  Real diagonal = Real::Zero(3, 3);  // (x - 1)(x - 2)(x - 3)
  diagonal.diagonal() << 1, 2, 3;
  const eb::Vector<double> one = eb::Vector<double>::Ones(3);
  const eb::TransferFunction tf = eb::ss_to_tf(diagonal, one, one);
  CHECK(tf.a[0] == doctest::Approx(-6));
  CHECK(tf.a[1] == doctest::Approx(11));
  CHECK(tf.a[2] == doctest::Approx(-6));
}

TEST_CASE("rational: errors name both sides and leave outputs alone") {
  const Parameters good = random_parameters(2, 4);
  Real k = Real::Constant(6, 2, 7);
  const auto refuse = [&](auto&& change, const std::string& text) {
    Parameters p = good;
    change(p);
    check_throws<eb::invalid_argument>([&] { eb::rational_kernel_forward(p, k); }, text);
    CHECK(k == Real::Constant(6, 2, 7));
  };
  refuse([](Parameters& p) { p.b.resize(2, 3); }, "b is 2 x 3, expected 2 x 4 (shape of a)");
  refuse([](Parameters& p) { p.h0.resize(3); }, "h0 has 3 entries, expected 2 (channels)");
  refuse([](Parameters& p) { p.a(0, 0) = std::nan(""); }, "a must be finite");
  check_throws<eb::invalid_argument>([&] { eb::rational_kernel(good, 3); },
                                     "states (4) must be below the transform's length (4)");
  check_throws<eb::invalid_argument>([&] { eb::rational_kernel(good, 0); },
                                     "length (0) must be at least 1");
  Parameters pole = good;  // 1 + z^2 vanishes at node 2 of 8
  pole.a.row(1) << 0, 1, 0, 0;
  Real longer = Real::Constant(8, 2, 7);
  check_throws<std::domain_error>(
      [&] { eb::rational_kernel_forward(pole, longer); },
      "rational_kernel: the denominator of channel 1 vanishes at node 2 of 8");
  CHECK(longer == Real::Constant(8, 2, 7));
  auto state = eb::rational_state(good, 6);
  Real wrong(2, 3);
  check_throws<eb::invalid_argument>([&] { eb::rational_step(state, wrong, wrong); },
                                     "rows has 3 columns, expected 2 (channels)");
  const Real square = Real::Identity(2, 2);
  const eb::Vector<double> three = eb::Vector<double>::Ones(3), two = eb::Vector<double>::Ones(2);
  check_throws<eb::invalid_argument>([&] { eb::ss_to_tf(square, three, two); },
                                     "b has 3 entries, expected 2 (states of a)");
}
