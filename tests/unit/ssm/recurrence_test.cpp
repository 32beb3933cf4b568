#include "support/alloc_guard.hpp"
#include "support/layer_checks.hpp"

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/ssm/recurrence.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::LtiOptions;
using eb::LtiOutput;
using eb::LtiSystem;
using eb::Matrix;

Matrix<double> random(Index rows, Index cols, std::uint64_t seed, double scale = 1.0) {
  eb::Random generator(seed);
  Matrix<double> m(rows, cols);
  eb::fill_normal(generator, m, scale);
  return m;
}

LtiSystem<double> example(Index n, Index inputs, Index outputs, bool direct = true) {
  return {random(n, n, 1, 0.7 / std::sqrt(static_cast<double>(n))), random(n, inputs, 2),
          random(outputs, n, 3), direct ? random(outputs, inputs, 4) : Matrix<double>()};
}

/// The definition, number by number.
void reference(const LtiSystem<double>& m, const Matrix<double>& u, LtiOutput output,
               Matrix<double>& x, Matrix<double>& y) {
  for (Index t = 0; t < u.rows(); ++t) {
    Matrix<double> next = Matrix<double>::Zero(1, m.states());
    for (Index i = 0; i < m.states(); ++i) {
      for (Index k = 0; k < m.states(); ++k) next(0, i) += m.a(i, k) * x(0, k);
      for (Index k = 0; k < m.inputs(); ++k) next(0, i) += m.b(i, k) * u(t, k);
    }
    const Matrix<double>& read = output == LtiOutput::post ? next : x;
    for (Index p = 0; p < m.outputs(); ++p) {
      y(t, p) = 0;
      for (Index k = 0; k < m.states(); ++k) y(t, p) += m.c(p, k) * read(0, k);
      for (Index k = 0; k < m.inputs() && m.d.size() > 0; ++k) y(t, p) += m.d(p, k) * u(t, k);
    }
    x = next;
  }
}

constexpr LtiOutput kOutputs[] = {LtiOutput::post, LtiOutput::pre};

}  // namespace

TEST_CASE("sequence and steps are the definition, across chunks") {
  for (const LtiOutput output : kOutputs) {
    for (const bool direct : {true, false}) {
      const auto m = example(6, 2, 3, direct);
      const Matrix<double> u = random(150, 2, 5), x0 = random(1, 6, 6);
      Matrix<double> x = x0, want(150, 3), y(150, 3), xt(1, 6);
      reference(m, u, output, x, want);
      eb::lti_forward(m, u, y, {output}, &x0, &xt);
      CHECK(largest_difference(y, want) < 1e-12);
      CHECK(largest_difference(xt, x) < 1e-12);
      auto state = eb::lti_state(m, {output}, &x0);
      for (Index t = 0; t < 150;) {
        const Index rows = std::min<Index>(1 + t % 70, 150 - t);
        eb::lti_step(m, state, u.middleRows(t, rows), y.middleRows(t, rows));
        t += rows;
      }
      CHECK(largest_difference(y, want) < 1e-12);
      CHECK(largest_difference(state.x, x) < 1e-12);
    }
  }
}

TEST_CASE("the impulse response is the kernel, and shifts with the impulse") {
  const auto m = example(5, 2, 2, false);
  for (const LtiOutput output : kOutputs) {
    const Matrix<double> k = eb::lti_kernel(m, 12, {output});
    for (Index input = 0; input < 2; ++input) {
      for (const Index at : {Index{0}, Index{3}}) {
        Matrix<double> u = Matrix<double>::Zero(12, 2), y(12, 2);
        u(at, input) = 1;
        eb::lti_forward(m, u, y, {output});
        for (Index t = 0; t < 12; ++t) {
          for (Index p = 0; p < 2; ++p) {
            const double want = t < at ? 0.0 : k(t - at, p * 2 + input);
            CHECK(y(t, p) == doctest::Approx(want).epsilon(1e-12));
          }
        }
      }
    }
  }
  CHECK(eb::lti_kernel(m, 3, {LtiOutput::pre}).row(0).cwiseAbs().maxCoeff() == 0.0);
  CHECK(eb::lti_kernel(m, 0).rows() == 0);
}

TEST_CASE("gradients of everything") {
  for (const LtiOutput output : kOutputs) {
    auto m = example(4, 2, 3);
    Matrix<double> u = random(7, 2, 5), x0 = random(1, 4, 6), y(7, 3), xt(1, 4);
    const Matrix<double> dy = random(7, 3, 7), dxt = random(1, 4, 8);
    const auto loss = [&] {
      eb::lti_forward(m, u, y, {output}, &x0, &xt);
      return y.cwiseProduct(dy).sum() + xt.cwiseProduct(dxt).sum();
    };
    Matrix<double> du(7, 2), dx0(1, 4);
    LtiSystem<double> d;
    eb::lti_backward(m, u, dy, du, d, {output}, &x0, &dxt, &dx0);
    const auto check = [&](const char* name, Matrix<double>& x, const Matrix<double>& gradient) {
      const auto r = eb::gradcheck(loss, x, gradient);
      CHECK_MESSAGE(r.passed, name, ": ", r.message());
    };
    check("a", m.a, d.a);
    check("b", m.b, d.b);
    check("c", m.c, d.c);
    check("d", m.d, d.d);
    check("u", u, du);
    check("x0", x0, dx0);
  }
}

TEST_CASE("without feedthrough, initial and last state") {
  const auto m = example(4, 1, 1, false);
  const Matrix<double> u = random(6, 1, 5), dy = random(6, 1, 6);
  const Matrix<double> zero = Matrix<double>::Zero(1, 4);
  Matrix<double> du(6, 1), other(6, 1);
  LtiSystem<double> d, e;
  eb::lti_backward(m, u, dy, du, d);
  eb::lti_backward(m, u, dy, other, e, {}, &zero, &zero);
  CHECK(du == other);
  CHECK(d.a == e.a);
  CHECK(d.d.size() == 0);
  // No rows: the state passes, gradients are zero.
  Matrix<double> none(0, 1), empty(0, 1), x0 = random(1, 4, 9), xt(1, 4), dx0(1, 4);
  eb::lti_forward(m, none, empty, {}, &x0, &xt);
  CHECK(xt == x0);
  eb::lti_backward(m, none, empty, empty, d, {}, &x0, &xt, &dx0);
  CHECK(dx0 == xt);
  CHECK(d.a.cwiseAbs().maxCoeff() == 0.0);
}

TEST_CASE("a later input changes no earlier output; NaN included") {
  const auto m = example(4, 1, 2);
  Matrix<double> u = random(10, 1, 5), y(10, 2), z(10, 2);
  eb::lti_forward(m, u, y);
  u(6, 0) = std::numeric_limits<double>::quiet_NaN();
  eb::lti_forward(m, u, z);
  CHECK(largest_difference(y.topRows(6), z.topRows(6)) < 1e-14);
  CHECK(z.row(6).hasNaN());
}

TEST_CASE("steps allocate nothing, float is close") {
  const auto m = example(24, 3, 3);
  const LtiSystem<float> single{m.a.cast<float>(), m.b.cast<float>(), m.c.cast<float>(),
                                m.d.cast<float>()};
  const Matrix<double> stable_u = random(20, 3, 5);
  const Matrix<float> u = stable_u.cast<float>();
  Matrix<float> y(20, 3);
  Matrix<double> want(20, 3);
  eb::lti_forward(m, stable_u, want);
  eb::lti_forward(single, u, y);
  CHECK((y.cast<double>() - want).norm() < 1e-4 * want.norm());
  if (!AllocationCount::available) return;
  auto state = eb::lti_state(single);
  eb::lti_step(single, state, u.topRows(1), y.topRows(1));
  const AllocationCount count;
  for (Index t = 1; t < 20; ++t)
    eb::lti_step(single, state, u.middleRows(t, 1), y.middleRows(t, 1));
  CHECK(count.calls() == 0);
}

TEST_CASE("bad input is named and nothing is written") {
  using eb::invalid_argument;
  const auto m = example(4, 2, 3);
  const Matrix<double> u = random(5, 2, 5);
  Matrix<double> y = Matrix<double>::Constant(5, 3, 7), x(1, 5), wide(5, 4);
  check_throws<invalid_argument>([&] { eb::lti_forward(m, wide, y); },
                                 "u is 5 x 4, expected 5 x 2 (steps, cols of b)");
  check_throws<invalid_argument>([&] { eb::lti_forward(m, u, wide); },
                                 "y is 5 x 4, expected 5 x 3 (rows of u, rows of c)");
  check_throws<invalid_argument>([&] { eb::lti_forward(m, u, y, {}, &x); },
                                 "x0 is 1 x 5, expected 1 x 4 (1, states of a)");
  check_throws<invalid_argument>([&] { eb::lti_forward(m, u, y, {}, nullptr, &x); },
                                 "xt is 1 x 5, expected 1 x 4 (1, states of a)");
  auto bad = m;
  bad.a.setZero(4, 3);
  check_throws<invalid_argument>([&] { eb::lti_forward(bad, u, y); },
                                 "a is 4 x 3, expected square");
  bad = m;
  bad.c.setZero(3, 3);
  check_throws<invalid_argument>([&] { eb::lti_forward(bad, u, y); },
                                 "c is 3 x 3, expected 3 x 4 (outputs, states of a)");
  bad = m;
  bad.d.setZero(2, 2);
  check_throws<invalid_argument>([&] { (void)eb::lti_kernel(bad, 3); },
                                 "d is 2 x 2, expected 3 x 2 (rows of c, cols of b)");
  check_throws<invalid_argument>([&] { (void)eb::lti_kernel(m, -3); },
                                 "length (-3) must not be negative");
  Matrix<double> du = Matrix<double>::Constant(5, 2, 7);
  LtiSystem<double> d;
  check_throws<invalid_argument>([&] { eb::lti_backward(m, u, y, wide, d); },
                                 "du is 5 x 4, expected 5 x 2 (shape of u)");
  check_throws<invalid_argument>([&] { eb::lti_backward(m, u, y, du, d, {}, nullptr, &x); },
                                 "dxt is 1 x 5, expected 1 x 4 (1, states of a)");
  CHECK((y.array() == 7.0).all());
  CHECK((du.array() == 7.0).all());
  CHECK(d.a.size() == 0);
}
