// Forms, states, gradients and errors of ssm/ssd.hpp, and what SSD is equal to.
#include <eigenblocks/attention/linear.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/ssm/selective_scan.hpp>
#include <eigenblocks/ssm/ssd.hpp>

#include "support/alloc_guard.hpp"
#include "support/layer_checks.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kSame = 1e-12;

struct Result {
  Matrix<double> out, state;
};
struct Gradients {
  Matrix<double> x, a, b, c, state;
};

struct Case {
  eb::SsdOptions options;
  Index head_dim, states;
  Matrix<double> x, a, b, c, first, dout, dlast;

  explicit Case(Index tokens, Index heads = 4, Index groups = 2, Index p = 5, Index n = 3,
                std::uint64_t seed = 1)
      : options{.heads = heads, .groups = groups}, head_dim(p), states(n) {
    eb::Random random(seed);
    const auto normal = [&](Index rows, Index cols) {
      return eb::normal_matrix<double>(random, rows, cols);
    };
    x = normal(tokens, heads * p);
    a = -normal(tokens, heads).cwiseAbs();
    b = normal(tokens, groups * n);
    c = normal(tokens, groups * n);
    first = normal(heads * p, n);
    dout = normal(tokens, heads * p);
    dlast = normal(heads * p, n);
  }
  Result blank() const {
    return {Matrix<double>::Constant(x.rows(), x.cols(), kNan),
            Matrix<double>::Constant(first.rows(), first.cols(), kNan)};
  }
  Result chunked(Index chunk = 0, eb::ExecutorRef executor = {}) const {
    Result r = blank();
    eb::SsdOptions o = options;
    o.chunk = chunk;
    eb::ssd_forward(x, a, b, c, r.out, o, &first, &r.state, executor);
    return r;
  }
  Result recurrent(eb::ExecutorRef executor = {}) const {
    Result r = blank();
    eb::ssd_recurrent(x, a, b, c, r.out, options, &first, &r.state, executor);
    return r;
  }
  Result quadratic() const {
    Result r = blank();
    eb::ssd_reference(x, a, b, c, r.out, options, &first, &r.state);
    return r;
  }
  Result stepped(Index start, Index rows) const {
    Result r = blank();
    auto state = eb::ssd_state<double>(options, head_dim, states, &first);
    for (Index t = 0, n = start; t < x.rows(); t += n, n = rows) {
      n = std::min(n, x.rows() - t);
      eb::ssd_step(state, x.middleRows(t, n), a.middleRows(t, n), b.middleRows(t, n),
                   c.middleRows(t, n), r.out.middleRows(t, n));
    }
    CHECK(state.size() == x.rows());
    r.state = state.memory;
    return r;
  }
  double loss() const {
    const Result r = quadratic();
    return (dout.array() * r.out.array()).sum() + (dlast.array() * r.state.array()).sum();
  }
  Gradients gradients(Index chunk = 0, eb::ExecutorRef executor = {}) const {
    Gradients g{x * kNan, a * kNan, b * kNan, c * kNan, first * kNan};
    eb::SsdOptions o = options;
    o.chunk = chunk;
    eb::ssd_backward(x, a, b, c, dout, g.x, g.a, g.b, g.c, o, &first, &dlast, &g.state, executor);
    return g;
  }
};

double difference(const Matrix<double>& a, const Matrix<double>& b) {
  double worst = 0, size = 1;
  for (Index i = 0; i < b.size(); ++i) size = std::max(size, std::abs(b.data()[i]));
  for (Index i = 0; i < a.size(); ++i) {
    const double off = std::abs(a.data()[i] - b.data()[i]);
    worst = std::isnan(off) ? kInf : std::max(worst, off);
  }
  return worst / size;
}
double difference(const Result& a, const Result& b) {
  return std::max(difference(a.out, b.out), difference(a.state, b.state));
}
double difference(const Gradients& x, const Gradients& y) {
  return std::max({difference(x.x, y.x), difference(x.a, y.a), difference(x.b, y.b),
                   difference(x.c, y.c), difference(x.state, y.state)});
}
bool same_bits(const Result& a, const Result& b) { return a.out == b.out && a.state == b.state; }

}  // namespace

TEST_CASE("ssd: by hand") {
  Matrix<double> x(2, 1), a(2, 1), b(2, 1), c(2, 1), s(1, 1), out(2, 1), last(1, 1);
  x << 5, 2;
  a << std::log(0.5), std::log(0.25);
  b << 3, 1;
  c << 7, -1;
  s << 2;  // S = 2/2 + 5 * 3 = 16, y = 112; S = 16/4 + 2 = 6, y = -6
  eb::ssd_reference(x, a, b, c, out, {}, &s, &last);
  CHECK(out(0, 0) == doctest::Approx(112).epsilon(1e-14));
  CHECK(out(1, 0) == doctest::Approx(-6).epsilon(1e-14));
  CHECK(last(0, 0) == doctest::Approx(6).epsilon(1e-14));
}

TEST_CASE("ssd: chunked, recurrent, stepped and quadratic forms agree") {
  for (const auto& sizes :
       {std::array<Index, 4>{1, 1, 1, 1}, {4, 2, 5, 3}, {6, 1, 17, 12}, {3, 3, 8, 16}}) {
    for (const Index tokens : {0, 1, 2, 67}) {
      const Case c(tokens, sizes[0], sizes[1], sizes[2], sizes[3]);
      const Result want = c.quadratic();
      CAPTURE(sizes[0]);
      CAPTURE(tokens);
      for (const Index chunk : {0, 1, 3, 16, 31, 67, 1000})
        CHECK(difference(c.chunked(chunk), want) < kSame);
      CHECK(difference(c.recurrent(), want) < kSame);
      if (tokens < 2) continue;
      for (const Index rows : {1, 8, 9, 50}) CHECK(difference(c.stepped(rows, rows), want) < kSame);
    }
  }
}

TEST_CASE("ssd: a state may be cut at every position, and a copy is a snapshot") {
  const Case c(24);
  const Result want = c.quadratic();
  for (Index at = 0; at < 24; ++at) CHECK(difference(c.stepped(at, 24), want) < kSame);
  auto state = eb::ssd_state<double>(c.options, 5, 3, &c.first);
  const auto before = state;
  Matrix<double> one(1, 20), again(1, 20);
  const auto step = [&](Matrix<double>& out) {
    eb::ssd_step(state, c.x.topRows(1), c.a.topRows(1), c.b.topRows(1), c.c.topRows(1), out);
  };
  step(one);
  CHECK(state.memory != before.memory);
  state = before;
  step(again);
  CHECK(one == again);
  CHECK(state.bytes() == 20 * 3 * 8);
}

TEST_CASE("ssd: equals the selective scan with a scalar A per head") {
  const Index tokens = 70, heads = 4, groups = 2, p = 5, n = 3;
  const Case c(tokens, heads, groups, p, n);
  Matrix<double> delta(tokens, heads * p), u = c.x, a(heads * p, n), out = c.x, last = c.first;
  for (Index t = 0; t < tokens; ++t) {
    for (Index d = 0; d < heads * p; ++d) {
      const Index h = d / p;
      delta(t, d) = -c.a(t, h) / (1.0 + static_cast<double>(h));  // a_t = D_t A_h
      a.row(d).setConstant(-1.0 - static_cast<double>(h));
      u(t, d) = c.x(t, d) / delta(t, d);  // x_t = D_t u_t
    }
  }
  eb::selective_scan_forward(u, delta, a, c.b, c.c, out, {.groups = groups}, {.state = &c.first},
                             &last);
  CHECK(difference({out, last}, c.chunked()) < kSame);
}

TEST_CASE("ssd: equals gated linear attention, and plain linear attention without decay") {
  Case c(70, 4, 2, 5, 3);
  Matrix<double> first(4 * 3, 5);  // linear attention's states are the transposes
  for (Index h = 0; h < 4; ++h)
    first.middleRows(h * 3, 3) = c.first.middleRows(h * 5, 5).transpose();
  const eb::LinearAttentionOptions options{.heads = 4, .key_heads = 2};
  CHECK(
      difference(eb::linear_attention(c.c, c.b, c.x, options, {.log_decay = &c.a, .state = &first}),
                 c.chunked().out) < kSame);
  c.a.setZero();
  CHECK(difference(eb::linear_attention(c.c, c.b, c.x, options, {.state = &first}),
                   c.chunked().out) < kSame);
}

TEST_CASE("ssd: gradients of every input by finite differences") {
  for (const Index tokens : {1, 2, 9}) {
    Case c(tokens, 4, 2, 3, 2);
    for (const Index chunk : {0, 1, 4}) {
      const Gradients g = c.gradients(chunk);
      CAPTURE(tokens);
      CAPTURE(chunk);
      const auto check = [&](Matrix<double>& x, const Matrix<double>& gradient) {
        const auto r = eb::gradcheck([&] { return c.loss(); }, x, gradient);
        CHECK_MESSAGE(r.passed, r.message());
      };
      check(c.x, g.x);
      check(c.a, g.a);
      check(c.b, g.b);
      check(c.c, g.c);
      check(c.first, g.state);
    }
  }
}

// The recurrence backwards: da_t = e^{a_t} <S_{t-1}, dS_t>, without any cancellation.
TEST_CASE(
    "ssd: gradients across chunks and strips, and under extreme decays, follow the recurrence") {
  for (const double strength : {1e-9, 1.0, 30.0, 700.0, kInf}) {
    const Index tokens = 60, heads = 3, p = 270, n = 9;  // strips of one head
    Case c(tokens, heads, 1, p, n);
    for (Index i = 0; i < c.a.size(); i += 3)
      c.a.data()[i] = std::isinf(strength) ? -kInf : c.a.data()[i] * strength;
    Gradients want{c.x * 0, c.a * 0, c.b * 0, c.c * 0, c.first * 0};
    for (Index h = 0; h < heads; ++h) {
      std::vector<Matrix<double>> states{c.first.middleRows(h * p, p)};
      const auto x = [&](Index t) { return c.x.row(t).segment(h * p, p); };
      const auto dy = [&](Index t) { return c.dout.row(t).segment(h * p, p); };
      for (Index t = 0; t < tokens; ++t) {
        states.push_back(std::exp(c.a(t, h)) * states.back());
        for (Index k = 0; k < p; ++k) states.back().row(k) += x(t)[k] * c.b.row(t);
      }
      Matrix<double> ds = c.dlast.middleRows(h * p, p);
      for (Index t = tokens; t-- > 0;) {
        const auto at = static_cast<std::size_t>(t);
        for (Index k = 0; k < p; ++k) {
          ds.row(k) += dy(t)[k] * c.c.row(t);
          want.c.row(t) += dy(t)[k] * states[at + 1].row(k);
          want.b.row(t) += x(t)[k] * ds.row(k);
          want.x(t, h * p + k) = ds.row(k).dot(c.b.row(t));
        }
        want.a(t, h) = std::exp(c.a(t, h)) * (states[at].array() * ds.array()).sum();
        ds *= std::exp(c.a(t, h));
      }
      want.state.middleRows(h * p, p) = ds;
    }
    for (const Index chunk : {0, 7, 60}) {
      CAPTURE(strength);
      CAPTURE(chunk);
      const Gradients got = c.gradients(chunk);
      CHECK(difference(got, want) < kSame);
      // A closed gate passes next to nothing, and its gradient is as small.
      for (Index i = 0; i < want.a.size(); ++i) {
        CHECK(std::abs(got.a.data()[i] - want.a.data()[i]) <=
              1e-9 * std::exp(c.a.data()[i]) + 1e-300);
      }
      CHECK(difference(c.chunked(chunk), c.recurrent()) < kSame);
    }
  }
}

TEST_CASE("ssd: bitwise the same for every executor") {
  const Case c(40, 12, 2, 150, 5);  // strips of three heads
  const Result want = c.chunked(16), recurrent = c.recurrent();
  const Gradients g = c.gradients(16);
  for (const int workers : {2, 3, 7}) {
    const eb::thread_pool pool(workers);
    CHECK(same_bits(want, c.chunked(16, pool)));
    CHECK(same_bits(recurrent, c.recurrent(pool)));
    const Gradients p = c.gradients(16, pool);
    CHECK((g.x == p.x && g.a == p.a && g.b == p.b && g.c == p.c && g.state == p.state));
  }
}

TEST_CASE("ssd: causality, and a NaN stays out of earlier outputs and later gradients") {
  const Case clean(50);
  const Result want = clean.chunked(16);
  const Gradients g = clean.gradients(16);
  for (const Index at : {0, 5, 16, 33, 49}) {
    for (int which = 0; which < 5; ++which) {
      Case c = clean;
      Matrix<double>* const inputs[] = {&c.x, &c.a, &c.b, &c.c, &c.dout};
      inputs[which]->row(at).setConstant(kNan);
      CAPTURE(at);
      CAPTURE(which);
      if (which < 4) {
        const Result got = c.chunked(16);
        CHECK(difference(Matrix<double>(got.out.topRows(at)),
                         Matrix<double>(want.out.topRows(at))) < kSame);
        CHECK(!got.out.row(at).allFinite());
        CHECK(difference(Matrix<double>(c.recurrent().out.topRows(at)),
                         Matrix<double>(want.out.topRows(at))) < kSame);
        const Gradients got_g = c.gradients(16);
        if (which == 2)
          CHECK(difference(Matrix<double>(got_g.c.topRows(at)), Matrix<double>(g.c.topRows(at))) <
                kSame);
        if (which == 3)
          CHECK(difference(Matrix<double>(got_g.b.bottomRows(49 - at)),
                           Matrix<double>(g.b.bottomRows(49 - at))) < kSame);
      } else {
        const Gradients got = c.gradients(16);
        const Index rest = 49 - at;
        CHECK(difference(Matrix<double>(got.x.bottomRows(rest)),
                         Matrix<double>(g.x.bottomRows(rest))) < kSame);
        CHECK(difference(Matrix<double>(got.b.bottomRows(rest)),
                         Matrix<double>(g.b.bottomRows(rest))) < kSame);
        CHECK(difference(Matrix<double>(got.c.topRows(at)), Matrix<double>(g.c.topRows(at))) <
              kSame);
        CHECK(!got.x.row(at).allFinite());
      }
    }
  }
}

TEST_CASE("ssd: views with strides, absent states, no tokens") {
  const Case c(20);
  Matrix<double> wide(20, 44), want = c.x, got(20, 50);
  wide << c.x, c.a, c.b, c.c, Matrix<double>::Zero(20, 8);
  eb::ssd_forward(c.x, c.a, c.b, c.c, want, c.options);
  eb::ssd_forward(wide.leftCols(20), wide.middleCols(20, 4), wide.middleCols(24, 6),
                  wide.middleCols(30, 6), got.middleCols(7, 20), c.options);
  CHECK(got.middleCols(7, 20) == want);
  const Matrix<double> zero = c.first * 0;
  Matrix<double> g1[4] = {c.x, c.a, c.b, c.c}, g2[4] = {c.x, c.a, c.b, c.c};
  eb::ssd_backward(c.x, c.a, c.b, c.c, c.dout, g1[0], g1[1], g1[2], g1[3], c.options);
  eb::ssd_backward(c.x, c.a, c.b, c.c, c.dout, g2[0], g2[1], g2[2], g2[3], c.options, &zero, &zero);
  for (int i = 0; i < 4; ++i) CHECK(g1[i] == g2[i]);
  const Case empty(0);
  CHECK(empty.chunked().state == empty.first);
  CHECK(empty.gradients().state == empty.dlast);
}

TEST_CASE("ssd: steps allocate nothing; float is close to double") {
  const Case c(90, 4, 2, 16, 8);
  auto state = eb::ssd_state<double>(c.options, 16, 8);
  Matrix<double> out = c.x;
  for (const Index rows : {1, 90}) {
    const auto step = [&] {
      eb::ssd_step(state, c.x.topRows(rows), c.a.topRows(rows), c.b.topRows(rows),
                   c.c.topRows(rows), out.topRows(rows));
    };
    step();
    const AllocationCount count;
    step();
    CHECK(count.calls() == 0);
  }
  const Matrix<float> x = c.x.cast<float>(), a = c.a.cast<float>(), b = c.b.cast<float>(),
                      cc = c.c.cast<float>(), first = c.first.cast<float>();
  Matrix<float> got = x, last = first;
  eb::ssd_forward(x, a, b, cc, got, c.options, &first, &last);
  const Result want = c.quadratic();
  CHECK(difference(got.cast<double>(), want.out) < 2e-6);
  CHECK(difference(last.cast<double>(), want.state) < 2e-6);
}

TEST_CASE("ssd: bad input is named, and nothing is written") {
  const Case c(3);  // x 3 x 20, a 3 x 4, b and c 3 x 6, states 20 x 3
  Matrix<double> out = Matrix<double>::Constant(3, 20, 5), wrong(2, 7);
  const auto refuse = [&](const Matrix<double>& x, const Matrix<double>& a, const Matrix<double>& b,
                          const Matrix<double>& d, Matrix<double>& to, const Matrix<double>* first,
                          Matrix<double>* last, eb::SsdOptions o, const char* text) {
    check_throws<eb::invalid_argument>([&] { eb::ssd_forward(x, a, b, d, to, o, first, last); },
                                       text);
  };
  const eb::SsdOptions o = c.options;
  refuse(c.x, c.a, c.b, c.c, out, nullptr, nullptr, {.heads = 0}, "heads (0) must be at least 1");
  refuse(c.x, c.a, c.b, c.c, out, nullptr, nullptr, {.heads = 4, .groups = 0},
         "groups (0) must be at least 1");
  refuse(c.x, c.a, c.b, c.c, out, nullptr, nullptr, {.heads = 4, .groups = 3},
         "groups (3) must divide heads (4)");
  refuse(c.x, c.a, c.b, c.c, out, nullptr, nullptr, {.heads = 4, .groups = 2, .chunk = -1},
         "chunk (-1) must be positive, or 0 for the default");
  refuse(wrong, c.a, c.b, c.c, out, nullptr, nullptr, o,
         "x is 2 x 7, expected columns in a positive multiple of heads (4)");
  refuse(c.x, wrong, c.b, c.c, out, nullptr, nullptr, o,
         "log_decay is 2 x 7, expected 3 x 4 (tokens, heads)");
  refuse(c.x, c.a, wrong, c.c, out, nullptr, nullptr, o,
         "b is 2 x 7, expected 3 rows and columns in a positive multiple of groups (2)");
  refuse(c.x, c.a, c.b, wrong, out, nullptr, nullptr, o, "c is 2 x 7, expected 3 x 6 (shape of b)");
  refuse(c.x, c.a, c.b, c.c, wrong, nullptr, nullptr, o,
         "out is 2 x 7, expected 3 x 20 (shape of x)");
  refuse(c.x, c.a, c.b, c.c, out, &wrong, nullptr, o,
         "state is 2 x 7, expected 20 x 3 (heads * head_dim, states)");
  refuse(c.x, c.a, c.b, c.c, out, nullptr, &wrong, o,
         "final_state is 2 x 7, expected 20 x 3 (heads * head_dim, states)");
  CHECK((out.array() == 5).all());
  check_throws<eb::invalid_argument>([&] { eb::ssd_state<double>(o, 0, 3); },
                                     "head_dim (0) and states (3) must be at least 1");
  check_throws<eb::invalid_argument>([&] { eb::ssd_state<double>({.heads = 0}, 5, 3); },
                                     "heads (0) must be at least 1");
  check_throws<eb::invalid_argument>(
      [&] { eb::ssd_state<double>(o, 5, 3, &wrong); },
      "initial is 2 x 7, expected 20 x 3 (heads * head_dim, states)");

  Matrix<double> g[4] = {out, Matrix<double>::Constant(3, 4, 5), Matrix<double>::Constant(3, 6, 5),
                         Matrix<double>::Constant(3, 6, 5)};
  const auto backward = [&](const Matrix<double>& dout, int broken, const Matrix<double>* first,
                            const Matrix<double>* dlast, Matrix<double>* dfirst, const char* text) {
    const auto at = [&](int i) -> Matrix<double>& { return i == broken ? wrong : g[i]; };
    check_throws<eb::invalid_argument>(
        [&] {
          eb::ssd_backward(c.x, c.a, c.b, c.c, dout, at(0), at(1), at(2), at(3), o, first, dlast,
                           dfirst);
        },
        text);
  };
  backward(wrong, -1, nullptr, nullptr, nullptr, "dout is 2 x 7, expected 3 x 20 (shape of x)");
  backward(c.x, 0, nullptr, nullptr, nullptr, "dx is 2 x 7, expected 3 x 20 (shape of x)");
  backward(c.x, 1, nullptr, nullptr, nullptr,
           "dlog_decay is 2 x 7, expected 3 x 4 (shape of log_decay)");
  backward(c.x, 2, nullptr, nullptr, nullptr, "db is 2 x 7, expected 3 x 6 (shape of b)");
  backward(c.x, 3, nullptr, nullptr, nullptr, "dc is 2 x 7, expected 3 x 6 (shape of c)");
  backward(c.x, -1, &wrong, nullptr, nullptr,
           "state is 2 x 7, expected 20 x 3 (heads * head_dim, states)");
  backward(c.x, -1, nullptr, &wrong, nullptr,
           "dfinal_state is 2 x 7, expected 20 x 3 (heads * head_dim, states)");
  backward(c.x, -1, nullptr, nullptr, &wrong,
           "dstate is 2 x 7, expected 20 x 3 (heads * head_dim, states)");
  for (const Matrix<double>& m : g) CHECK((m.array() == 5).all());
}
