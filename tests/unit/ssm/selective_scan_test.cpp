// Forms, states, gradients and errors of ssm/selective_scan.hpp.
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/ssm/selective_scan.hpp>

#include "support/alloc_guard.hpp"
#include "support/layer_checks.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <string>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using Vector = eb::Vector<double>;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kSame = 1e-12;

struct Result {
  Matrix<double> out, state;
};
struct Gradients {
  Matrix<double> u, delta, a, b, c, gate, state;
  Vector skip, bias;
};

/// Random operands of one call with every optional input, and upstream gradients.
struct Case {
  eb::SelectiveScanOptions options;
  Matrix<double> u, delta, a, b, c, gate, first, dout, dlast;
  Vector skip, bias;

  explicit Case(Index tokens, Index channels = 6, Index states = 3, Index groups = 1,
                bool softplus = true, std::uint64_t seed = 1)
      : options{.groups = groups, .delta_softplus = softplus} {
    eb::Random random(seed);
    const auto normal = [&](Index rows, Index cols) {
      return eb::normal_matrix<double>(random, rows, cols);
    };
    u = normal(tokens, channels);
    delta = normal(tokens, channels);
    if (!softplus) delta = delta.cwiseAbs().eval();
    a = -normal(channels, states).cwiseAbs();
    b = normal(tokens, groups * states);
    c = normal(tokens, groups * states);
    gate = normal(tokens, channels);
    first = normal(channels, states);
    dout = normal(tokens, channels);
    dlast = normal(channels, states);
    skip = normal(channels, 1);
    bias = normal(channels, 1).cwiseAbs() * 0.3;
  }
  /// A_dn = (n + 1) A_d0 exactly.
  void set_powers() {
    for (Index d = 0; d < a.rows(); ++d) {
      for (Index n = 0; n < a.cols(); ++n)
        a(d, n) = static_cast<double>(n + 1) * -(1 + static_cast<double>(d) / 8);
    }
  }
  eb::SelectiveScanTensors<double> tensors() const {
    return {.skip = &skip, .delta_bias = &bias, .gate = &gate, .state = &first};
  }
  Result blank() const {
    return {Matrix<double>::Constant(u.rows(), u.cols(), kNan),
            Matrix<double>::Constant(a.rows(), a.cols(), kNan)};
  }
  Result whole(eb::ExecutorRef executor = {}) const {
    Result r = blank();
    eb::selective_scan_forward(u, delta, a, b, c, r.out, options, tensors(), &r.state, executor);
    return r;
  }
  Result reference() const {
    Result r = blank();
    eb::selective_scan_reference(u, delta, a, b, c, r.out, options, tensors(), &r.state);
    return r;
  }
  /// In steps of `rows`, the first of `start` rows.
  Result stepped(Index start, Index rows) const {
    Result r = blank();
    auto state = eb::selective_scan_state<double>(a.rows(), a.cols(), options, &first);
    for (Index t = 0; t < u.rows();) {
      const Index n = std::min(t == 0 ? start : rows, u.rows() - t);
      const Matrix<double> z = gate.middleRows(t, n);
      eb::selective_scan_step(state, u.middleRows(t, n), delta.middleRows(t, n), a,
                              b.middleRows(t, n), c.middleRows(t, n), r.out.middleRows(t, n),
                              {.skip = &skip, .delta_bias = &bias, .gate = &z});
      t += n;
    }
    CHECK(state.size() == u.rows());
    r.state = state.memory;
    return r;
  }
  double loss() const {
    const Result r = reference();
    return (dout.array() * r.out.array()).sum() + (dlast.array() * r.state.array()).sum();
  }
  Gradients gradients(eb::ExecutorRef executor = {}) const {
    const auto like = [](const auto& m) { return (m * kNan).eval(); };  // what is not written shows
    Gradients g{like(u),    like(delta), like(a),    like(b),   like(c),
                like(gate), like(first), like(skip), like(bias)};
    eb::selective_scan_backward(
        u, delta, a, b, c, dout, g.u, g.delta, g.a, g.b, g.c, options, tensors(), &dlast,
        {.skip = &g.skip, .delta_bias = &g.bias, .gate = &g.gate, .state = &g.state}, executor);
    return g;
  }
};

/// The largest difference, relative to the largest entry of b where that is above 1; NaN counts as infinite.
double difference(const Matrix<double>& a, const Matrix<double>& b) {
  double worst = 0, size = 1;
  for (Index i = 0; i < b.size(); ++i) size = std::max(size, std::abs(b.data()[i]));
  for (Index i = 0; i < a.size(); ++i) {
    const double off = std::abs(a.data()[i] - b.data()[i]);
    worst = std::isnan(off) ? HUGE_VAL : std::max(worst, off);
  }
  return worst / size;
}
double difference(const Result& a, const Result& b) {
  return std::max(difference(a.out, b.out), difference(a.state, b.state));
}
bool same_bits(const Result& a, const Result& b) { return a.out == b.out && a.state == b.state; }
double difference(const Gradients& x, const Gradients& y) {
  return std::max({difference(x.u, y.u), difference(x.delta, y.delta), difference(x.a, y.a),
                   difference(x.b, y.b), difference(x.c, y.c), difference(x.gate, y.gate),
                   difference(x.state, y.state), difference(x.skip, y.skip),
                   difference(x.bias, y.bias)});
}

}  // namespace

TEST_CASE("selective scan: by hand") {
  // D = 1: h = 3/2 + 1 * 5 * 7 = 36.5, y = 2 * 36.5 + 10 * 7 = 143; D = 2: h = 36.5/4 + 2 * 1 * 1, y = -h + 10
  Matrix<double> u(2, 1), delta(2, 1), a(1, 1), b(2, 1), c(2, 1), h(1, 1), out(2, 1), last(1, 1);
  u << 7, 1;
  delta << 0.5, 1.5;
  a << -std::log(2.0);
  b << 5, 1;
  c << 2, -1;
  h << 3;
  const Vector skip = Vector::Constant(1, 10), bias = Vector::Constant(1, 0.5);
  const auto check = [&] {
    CHECK(out(0, 0) == doctest::Approx(143).epsilon(1e-14));
    CHECK(out(1, 0) == doctest::Approx(10 - 11.125).epsilon(1e-14));
    CHECK(last(0, 0) == doctest::Approx(11.125).epsilon(1e-14));
  };
  eb::selective_scan_reference(u, delta, a, b, c, out, {},
                               {.skip = &skip, .delta_bias = &bias, .state = &h}, &last);
  check();
  eb::selective_scan_forward(u, delta, a, b, c, out, {},
                             {.skip = &skip, .delta_bias = &bias, .state = &h}, &last);
  check();
  eb::selective_scan_forward(u, delta, a, b, c, out);  // nothing optional: h = 0.5 * 5 * 7 first
  CHECK(out(0, 0) == doctest::Approx(35).epsilon(1e-14));
}

TEST_CASE("selective scan: whole, steps of any size and reference agree") {
  for (const bool softplus : {true, false}) {
    for (const bool powers : {true, false}) {
      for (const auto& sizes :
           {std::array<Index, 3>{1, 1, 1}, {6, 3, 2}, {40, 5, 2}, {70, 16, 1}}) {
        for (const Index tokens : {0, 1, 63, 64, 131}) {
          Case c(tokens, sizes[0], sizes[1], sizes[2], softplus);
          if (powers) c.set_powers();
          CAPTURE(sizes[0]);
          CAPTURE(tokens);
          const Result want = c.reference();
          CHECK(difference(c.whole(), want) < kSame);
          if (tokens == 131) {
            for (const Index rows : {1, 7, 64, 100})
              CHECK(difference(c.stepped(rows, rows), want) < kSame);
          }
        }
      }
    }
  }
}

TEST_CASE("selective scan: a state may be cut at every position, and a copy is a snapshot") {
  const Case c(13, 5, 4);
  const Result want = c.reference();
  for (Index at = 1; at < 13; ++at) CHECK(difference(c.stepped(at, 13), want) < kSame);
  auto state = eb::selective_scan_state<double>(5, 4, c.options, &c.first);
  const auto before = state;
  Matrix<double> one(1, 5), again(1, 5);
  const auto step = [&](auto& s, Matrix<double>& out) {
    eb::selective_scan_step(s, c.u.topRows(1), c.delta.topRows(1), c.a, c.b.topRows(1),
                            c.c.topRows(1), out);
  };
  step(state, one);
  CHECK(state.memory != before.memory);
  state = before;
  step(state, again);
  CHECK(one == again);
  CHECK(state.bytes() == 5 * 4 * 8);
}

TEST_CASE("selective scan: matrix form M_ij = <C_i, e^{(S_i - S_j) A} B_j> D_j") {
  Case c(17, 3, 4, 1, false);
  Matrix<double> out(17, 3), want = Matrix<double>::Zero(17, 3);
  eb::selective_scan_forward(c.u, c.delta, c.a, c.b, c.c, out, c.options);
  for (Index d = 0; d < 3; ++d) {
    for (Index i = 0; i < 17; ++i) {
      double sum = 0;  // S_i - S_j
      for (Index j = i; j >= 0; --j) {
        double m = 0;
        for (Index n = 0; n < 4; ++n) m += c.c(i, n) * std::exp(sum * c.a(d, n)) * c.b(j, n);
        want(i, d) += m * c.delta(j, d) * c.u(j, d);
        sum += c.delta(j, d);
      }
    }
  }
  CHECK(difference(out, want) < kSame);
}

TEST_CASE("selective scan: powers are taken exactly where they hold, within their bound") {
  Case c(40, 20, 16, 1);
  c.set_powers();
  const Result with = c.whole();
  c.options.powers = false;
  const Result without = c.whole();
  CHECK(difference(with, without) < 1e-13);
  CHECK(!same_bits(with, without));  // or the two paths are one
  c.options.powers = true;
  Case off = c;
  off.a(19, 15) = std::nextafter(off.a(19, 15), 0.0);  // one entry by one bit: no powers anywhere
  const Result other = off.whole();
  CHECK(other.out.leftCols(19) == without.out.leftCols(19));
  CHECK(!same_bits(other, with));

  // A state of 1 without input shows e^{D A}: 3 (n+1) units beyond the exponential's own rounding.  (A few tokens would go
  // without powers; tokens of step 0 change nothing.)
  const Matrix<float> u = Matrix<float>::Zero(5, 1), ones = Matrix<float>::Ones(5, 16);
  const Matrix<float> first = ones.topRows(1);
  Matrix<float> a(1, 16), out(5, 1);
  for (Index n = 0; n < 16; ++n) a(0, n) = -static_cast<float>(n + 1);
  for (const float step : {1e-4f, 0.013f, 0.3f, 0.77f, 2.1f}) {
    Matrix<float> delta = u;
    delta(4, 0) = step;
    for (const bool powers : {true, false}) {
      auto state = eb::selective_scan_state<float>(1, 16, {.powers = powers}, &first);
      eb::selective_scan_step(state, u, delta, a, ones, ones, out);
      for (Index n = 0; n < 16; ++n) {
        const double want = std::exp(static_cast<double>(step) * static_cast<double>(a(0, n)));
        const double own = 2 + std::abs(static_cast<double>(step * a(0, n)));
        const double units = own + (powers ? 3.0 * static_cast<double>(n + 1) : 0.0);
        CHECK(std::abs(static_cast<double>(state.memory(0, n)) - want) <= units * 0x1p-23 * want);
      }
    }
  }
}

TEST_CASE("selective scan: growth, huge steps and -inf follow the reference") {
  Case c(30, 9, 4, 1, false);
  c.options.powers = false;
  c.delta.col(2) *= -0.1;          // D < 0: e^{D A} > 1
  c.a.row(4) = -c.a.row(4) * 0.1;  // A > 0
  c.delta(7, 5) = 1e5;             // forgets all
  c.a(6, 1) = -std::numeric_limits<double>::infinity();
  CHECK(difference(c.whole(), c.reference()) < kSame);
  c.set_powers();
  c.options.powers = true;
  CHECK(difference(c.whole(), c.reference()) < kSame);
  // e^{800} is inf, however it comes about; on tiles as in short calls.
  for (const Index tokens : {2, 6}) {
    for (const double sign : {1.0, -1.0}) {
      Matrix<double> delta = Matrix<double>::Zero(tokens, 1), u = delta, out = delta;
      const Matrix<double> ones = Matrix<double>::Ones(tokens, 1);
      const Matrix<double> first = Matrix<double>::Ones(1, 1), a = first * 2 * sign;
      Matrix<double> last = first;
      delta(tokens - 1, 0) = 400 * sign;
      eb::selective_scan_forward(u, delta, a, ones, ones, out, {.powers = false}, {.state = &first},
                                 &last);
      CHECK(last(0, 0) == std::numeric_limits<double>::infinity());
      CHECK(out(tokens - 2, 0) == 1);
    }
  }
  Case s(1, 3, 2);  // PyTorch's threshold, and the lower tail
  s.bias.setZero();
  s.delta << 20.5, -800, 19.5;
  s.u.setOnes();
  s.b.setOnes();
  s.first.setZero();
  const Result r = s.whole();
  CHECK(r.state(0, 0) == 20.5);
  CHECK(r.state(1, 0) == 0);
  CHECK(r.state(2, 0) == doctest::Approx(19.5 + std::exp(-19.5)).epsilon(1e-15));
}

TEST_CASE("selective scan: gradients of every input by finite differences") {
  for (const bool softplus : {true, false}) {
    for (const bool powers : {true, false}) {
      for (const Index tokens : {1, 9}) {
        Case c(tokens, 4, 3, 2, softplus);
        if (powers) c.set_powers();
        const Gradients g = c.gradients();
        CAPTURE(softplus);
        CAPTURE(powers);
        const auto check = [&](auto& x, const Matrix<double>& gradient) {
          const auto r =
              eb::gradcheck([&] { return c.loss(); },
                            Eigen::Map<Matrix<double>>(x.data(), x.rows(), x.cols()), gradient);
          CHECK_MESSAGE(r.passed, r.message());
        };
        check(c.u, g.u);
        check(c.delta, g.delta);
        check(c.a, g.a);
        check(c.b, g.b);
        check(c.c, g.c);
        check(c.gate, g.gate);
        check(c.first, g.state);
        check(c.skip, g.skip);
        check(c.bias, g.bias);
      }
    }
  }
}

// The recurrence backwards, one number at a time.
TEST_CASE("selective scan: gradients over many tiles, blocks and strips follow the recurrence") {
  for (const bool powers : {true, false}) {
    Case c(150, 300, 5, 1, true, 7);
    if (powers) c.set_powers();
    const Index tokens = 150, channels = 300, states = 5;
    Gradients want{c.u * 0, c.u * 0, c.a * 0,    c.b * 0,   c.c * 0,
                   c.u * 0, c.a * 0, c.skip * 0, c.bias * 0};
    for (Index d = 0; d < channels; ++d) {
      Matrix<double> h(tokens + 1, states);
      h.row(0) = c.first.row(d);
      Vector step(tokens), lam = c.dlast.row(d).transpose();
      for (Index t = 0; t < tokens; ++t) {
        step[t] = std::log1p(std::exp(c.delta(t, d) + c.bias[d]));
        for (Index n = 0; n < states; ++n)
          h(t + 1, n) = std::exp(step[t] * c.a(d, n)) * h(t, n) + step[t] * c.b(t, n) * c.u(t, d);
      }
      for (Index t = tokens; t-- > 0;) {
        const double z = c.gate(t, d), s = 1 / (1 + std::exp(-z)), dy = c.dout(t, d) * z * s;
        const double y = h.row(t + 1).dot(c.c.row(t)) + c.skip[d] * c.u(t, d);
        want.gate(t, d) = c.dout(t, d) * y * s * (1 + z * (1 - s));
        want.skip[d] += dy * c.u(t, d);
        want.u(t, d) = dy * c.skip[d];
        double dstep = 0;
        for (Index n = 0; n < states; ++n) {
          lam[n] += dy * c.c(t, n);
          const double e = std::exp(step[t] * c.a(d, n)), w = lam[n] * e * h(t, n);
          want.c(t, n) += dy * h(t + 1, n);
          want.b(t, n) += lam[n] * step[t] * c.u(t, d);
          want.u(t, d) += lam[n] * step[t] * c.b(t, n);
          want.a(d, n) += step[t] * w;
          dstep += c.a(d, n) * w + lam[n] * c.b(t, n) * c.u(t, d);
          lam[n] *= e;
        }
        want.delta(t, d) = dstep / (1 + std::exp(-c.delta(t, d) - c.bias[d]));
        want.bias[d] += want.delta(t, d);
      }
      want.state.row(d) = lam.transpose();
    }
    CHECK(difference(c.gradients(), want) < kSame);
  }
}

TEST_CASE("selective scan: bitwise the same for every executor") {
  const Case grouped(70, 300, 3, 3), single(70, 300, 3, 1);
  for (const int workers : {2, 3, 7}) {
    const Case& c = workers == 3 ? grouped : single;
    const Result a = c.whole();
    const Gradients g = c.gradients();
    const eb::thread_pool pool(workers);
    CHECK(same_bits(a, c.whole(pool)));
    const Gradients p = c.gradients(pool);
    CHECK((g.u == p.u && g.delta == p.delta && g.a == p.a && g.b == p.b && g.c == p.c));
    CHECK((g.gate == p.gate && g.state == p.state && g.skip == p.skip && g.bias == p.bias));
  }
}

TEST_CASE("selective scan: causality, and a NaN stays in its channel and its future") {
  const Case clean(80, 20, 3);
  const Result want = clean.whole();
  for (const Index at : {0, 30, 64, 79}) {
    Case c = clean;
    c.u(at, 3) = kNan;
    c.delta(at, 17) = kNan;
    const Result got = c.whole();
    CHECK(got.out.topRows(at) == want.out.topRows(at));
    CHECK(std::isnan(got.out(at, 3)));
    CHECK(std::isnan(got.out(79, 17)));
    for (Index d = 0; d < 20; ++d) {
      if (d == 3 || d == 17) continue;
      CHECK(difference(got.out.col(d), want.out.col(d)) < kSame);
    }
    c = clean;
    c.b(at, 1) = kNan;
    CHECK(c.whole().out.topRows(at) == want.out.topRows(at));
    c = clean;
    c.dout.row(at).setConstant(kNan);
    const Gradients g = c.gradients(), clean_g = clean.gradients();
    CHECK(g.u.bottomRows(79 - at) == clean_g.u.bottomRows(79 - at));
    CHECK(g.b.bottomRows(79 - at) == clean_g.b.bottomRows(79 - at));
    CHECK(std::isnan(g.u(at, 0)));
  }
}

TEST_CASE("selective scan: views with strides, and optional parts") {
  const Case c(20, 6, 4);
  Matrix<double> wide(20, 30), out(20, 40), want(20, 6);
  wide << c.u, c.delta, c.b, c.c, c.u, c.b;
  eb::selective_scan_forward(c.u, c.delta, c.a, c.b, c.c, want, c.options);
  eb::selective_scan_forward(wide.leftCols(6), wide.middleCols(6, 6), c.a, wide.middleCols(12, 4),
                             wide.middleCols(16, 4), out.middleCols(11, 6), c.options);
  CHECK(out.middleCols(11, 6) == want);
  // without the options in the backward: as with neutral ones
  const Vector none = Vector::Zero(6);
  const Matrix<double> zero = c.first * 0;
  Matrix<double> g1[5] = {c.u, c.u, c.a, c.b, c.c}, g2[5] = {c.u, c.u, c.a, c.b, c.c};
  eb::selective_scan_backward(c.u, c.delta, c.a, c.b, c.c, c.dout, g1[0], g1[1], g1[2], g1[3],
                              g1[4], c.options);
  eb::selective_scan_backward(c.u, c.delta, c.a, c.b, c.c, c.dout, g2[0], g2[1], g2[2], g2[3],
                              g2[4], c.options,
                              {.skip = &none, .delta_bias = &none, .state = &zero}, &zero);
  for (int i = 0; i < 5; ++i) CHECK(g1[i] == g2[i]);
  // no tokens: the state and its gradient pass
  const Case empty(0, 6, 4);
  CHECK(empty.whole().state == empty.first);
  const Gradients g = empty.gradients();
  CHECK(g.state == empty.dlast);
  CHECK(g.a == c.a * 0);
  CHECK(g.skip == none);
}

TEST_CASE("selective scan: steps allocate nothing") {
  const Case c(70, 40, 5);
  auto state = eb::selective_scan_state<double>(40, 5, c.options);
  Matrix<double> out(70, 40);
  const eb::SelectiveScanTensors<double> extra{.skip = &c.skip, .delta_bias = &c.bias};
  for (const Index rows : {1, 70}) {
    const auto step = [&] {
      eb::selective_scan_step(state, c.u.topRows(rows), c.delta.topRows(rows), c.a,
                              c.b.topRows(rows), c.c.topRows(rows), out.topRows(rows), extra);
    };
    step();
    const AllocationCount count;
    step();
    CHECK(count.calls() == 0);
  }
}

TEST_CASE("selective scan: float is close to double") {
  Case c(300, 24, 16);
  c.set_powers();
  for (const bool powers : {true, false}) {
    c.options.powers = powers;
    const Result want = c.reference();
    const eb::Vector<float> skip = c.skip.cast<float>(), bias = c.bias.cast<float>();
    const Matrix<float> gate = c.gate.cast<float>(), first = c.first.cast<float>();
    const auto f = [](const auto& m) { return Matrix<float>(m.template cast<float>()); };
    Matrix<float> out(300, 24), last(24, 16);
    eb::selective_scan_forward(f(c.u), f(c.delta), f(c.a), f(c.b), f(c.c), out, c.options,
                               {.skip = &skip, .delta_bias = &bias, .gate = &gate, .state = &first},
                               &last);
    CHECK(difference(out.cast<double>(), want.out) < 2e-6);
    CHECK(difference(last.cast<double>(), want.state) < 2e-6);
  }
}

TEST_CASE("selective scan: bad input is named, and nothing is written") {
  const Case c(3, 4, 2, 2);
  Matrix<double> out = Matrix<double>::Constant(3, 4, 5), wrong(2, 7);
  const Vector short_vector(3);
  const auto refuse = [&](const Matrix<double>& u, const Matrix<double>& delta,
                          const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& d,
                          eb::SelectiveScanOptions o, eb::SelectiveScanTensors<double> extra,
                          const char* text) {
    check_throws<eb::invalid_argument>(
        [&] { eb::selective_scan_forward(u, delta, a, b, d, out, o, extra); }, text);
  };
  const auto& o = c.options;
  refuse(Matrix<double>(3, 0), c.delta, c.a, c.b, c.c, o, {},
         "u is 3 x 0, expected at least one channel");
  refuse(c.u, wrong, c.a, c.b, c.c, o, {}, "delta is 2 x 7, expected 3 x 4 (shape of u)");
  refuse(c.u, c.delta, wrong, c.b, c.c, o, {},
         "a is 2 x 7, expected 4 rows (channels of u) and at least one state");
  refuse(c.u, c.delta, c.a, wrong, c.c, o, {},
         "b is 2 x 7, expected 3 x 4 (tokens, groups * states)");
  refuse(c.u, c.delta, c.a, c.b, wrong, o, {},
         "c is 2 x 7, expected 3 x 4 (tokens, groups * states)");
  refuse(c.u, c.delta, c.a, c.b, c.c, {.groups = 0}, {}, "groups (0) must be at least 1");
  refuse(c.u, c.delta, c.a, c.b, c.c, {.groups = 3}, {}, "groups (3) must divide the channels (4)");
  refuse(c.u, c.delta, c.a, c.b, c.c, o, {.skip = &short_vector},
         "skip has 3 entries, expected 4 (channels)");
  refuse(c.u, c.delta, c.a, c.b, c.c, o, {.delta_bias = &short_vector},
         "delta_bias has 3 entries, expected 4 (channels)");
  refuse(c.u, c.delta, c.a, c.b, c.c, o, {.gate = &wrong},
         "gate is 2 x 7, expected 3 x 4 (shape of u)");
  refuse(c.u, c.delta, c.a, c.b, c.c, o, {.state = &wrong},
         "state is 2 x 7, expected 4 x 2 (channels, states)");
  check_throws<eb::invalid_argument>(
      [&] { eb::selective_scan_forward(c.u, c.delta, c.a, c.b, c.c, out, o, {}, &wrong); },
      "final_state is 2 x 7, expected 4 x 2 (channels, states)");
  check_throws<eb::invalid_argument>(
      [&] { eb::selective_scan_forward(c.u, c.delta, c.a, c.b, c.c, wrong, o); },
      "out is 2 x 7, expected 3 x 4 (shape of u)");
  CHECK((out.array() == 5).all());

  auto state = eb::selective_scan_state<double>(4, 2, o, &c.first);
  check_throws<eb::invalid_argument>(
      [&] { eb::selective_scan_step(state, c.u, c.delta, c.a, c.b, c.c, out, c.tensors()); },
      "tensors.state must be null: the state is `state`");
  CHECK(state.memory == c.first);
  CHECK(state.size() == 0);
  check_throws<eb::invalid_argument>([&] { eb::selective_scan_state<double>(0, 2); },
                                     "channels (0) and states (2) must be at least 1");
  check_throws<eb::invalid_argument>([&] { eb::selective_scan_state<double>(4, 2, {}, &wrong); },
                                     "initial is 2 x 7, expected 4 x 2 (channels, states)");

  Matrix<double> g[5] = {out, out, Matrix<double>::Constant(4, 2, 5), out, out};
  Vector to_skip = Vector::Constant(4, 5), bad_vector(3);
  const auto backward = [&](const Matrix<double>& dout, int broken, const Matrix<double>* dlast,
                            const eb::SelectiveScanGradients<double>& to,
                            const eb::SelectiveScanTensors<double>& extra, const char* text) {
    const auto at = [&](int i) -> Matrix<double>& { return i == broken ? wrong : g[i]; };
    check_throws<eb::invalid_argument>(
        [&] {
          eb::selective_scan_backward(c.u, c.delta, c.a, c.b, c.c, dout, at(0), at(1), at(2), at(3),
                                      at(4), o, extra, dlast, to);
        },
        text);
  };
  const auto all = c.tensors();
  backward(wrong, -1, nullptr, {}, all, "dout is 2 x 7, expected 3 x 4 (shape of u)");
  backward(c.dout, 0, nullptr, {}, all, "du is 2 x 7, expected 3 x 4 (shape of u)");
  backward(c.dout, 1, nullptr, {}, all, "ddelta is 2 x 7, expected 3 x 4 (shape of u)");
  backward(c.dout, 2, nullptr, {}, all, "da is 2 x 7, expected 4 x 2 (shape of a)");
  backward(c.dout, 3, nullptr, {}, all, "db is 2 x 7, expected 3 x 4 (shape of b)");
  backward(c.dout, 4, nullptr, {}, all, "dc is 2 x 7, expected 3 x 4 (shape of c)");
  backward(c.dout, -1, &wrong, {}, all, "dfinal_state is 2 x 7, expected 4 x 2 (channels, states)");
  backward(c.dout, -1, nullptr, {.state = &wrong}, all,
           "gradients.state is 2 x 7, expected 4 x 2 (channels, states)");
  backward(c.dout, -1, nullptr, {.gate = &wrong}, all,
           "gradients.gate is 2 x 7, expected 3 x 4 (shape of u)");
  backward(c.dout, -1, nullptr, {.skip = &bad_vector}, all,
           "gradients.skip has 3 entries, expected 4 (channels)");
  backward(c.dout, -1, nullptr, {.delta_bias = &bad_vector}, all,
           "gradients.delta_bias has 3 entries, expected 4 (channels)");
  backward(c.dout, -1, nullptr, {.skip = &to_skip}, {},
           "gradients.skip is wanted, but there is no skip");
  backward(c.dout, -1, nullptr, {.delta_bias = &to_skip}, {},
           "gradients.delta_bias is wanted, but there is no delta_bias");
  backward(c.dout, -1, nullptr, {.gate = &g[0]}, {},
           "gradients.gate is wanted, but there is no gate");
  for (const Matrix<double>& m : g) CHECK((m.array() == 5).all());
  CHECK((to_skip.array() == 5).all());
}
