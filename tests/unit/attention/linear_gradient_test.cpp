// Gradients of linear attention against finite differences, across chunk sizes, gates and executors.
#include <eigenblocks/attention/linear.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

namespace {

constexpr double kSame = 1e-12;
constexpr double kInf = std::numeric_limits<double>::infinity();

struct Gradients {
  Matrix<double> q, k, v, gate, state;
};

/// Operands, the upstream gradients of out and of the last state, and the loss they make.
struct Case {
  eb::LinearAttentionOptions options;
  Matrix<double> q, k, v, gate, initial, dout, dlast;
  bool gated;

  /// gate_columns: 0, heads or heads * d.
  Case(Index tokens, Index gate_columns, Index heads = 2, Index key_heads = 0, Index d = 3,
       Index e = 5, double decay = 0.7, std::uint64_t seed = 3)
      : options{.heads = heads, .key_heads = key_heads, .scale = 0.6}, gated(gate_columns > 0) {
    eb::Random random(seed);
    const auto normal = [&](Index rows, Index cols) {
      return eb::normal_matrix<double>(random, rows, cols);
    };
    const Index keys = key_heads == 0 ? heads : key_heads;
    q = normal(tokens, keys * d);
    k = normal(tokens, keys * d);
    v = normal(tokens, heads * e);
    gate = -decay * normal(tokens, gate_columns).cwiseAbs();
    initial = normal(heads * d, e);
    dout = normal(tokens, heads * e);
    dlast = normal(heads * d, e);
  }

  eb::LinearAttentionTensors<double> tensors() const {
    return {.log_decay = gated ? &gate : nullptr, .state = &initial};
  }
  double loss() const {
    Matrix<double> out(v.rows(), v.cols()), last(initial.rows(), initial.cols());
    eb::linear_attention_reference(q, k, v, out, options, tensors(), &last);
    return (dout.array() * out.array()).sum() + (dlast.array() * last.array()).sum();
  }
  Gradients gradients(Index chunk = 0, eb::ExecutorRef executor = {}) const {
    const auto like = [](const Matrix<double>& m) {  // of NaN: what is not written shows
      return (m * std::numeric_limits<double>::quiet_NaN()).eval();
    };
    Gradients g{like(q), like(k), like(v), like(gate), like(initial)};
    eb::LinearAttentionOptions o = options;
    o.chunk = chunk;
    eb::linear_attention_backward(q, k, v, dout, g.q, g.k, g.v, o, tensors(), &dlast,
                                  {.log_decay = gated ? &g.gate : nullptr, .state = &g.state},
                                  executor);
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
double difference(const Gradients& a, const Gradients& b, bool gated) {
  return std::max({difference(a.q, b.q), difference(a.k, b.k), difference(a.v, b.v),
                   difference(a.state, b.state), gated ? difference(a.gate, b.gate) : 0.0});
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("linear attention: gradients of every input by finite differences") {
  for (const Index gate_columns : {0, 2, 6}) {
    for (const Index tokens : {1, 2, 11}) {
      Case c(tokens, gate_columns);
      for (const Index chunk : {0, 1, 4, 7}) {
        const Gradients g = c.gradients(chunk);
        CAPTURE(gate_columns);
        CAPTURE(tokens);
        CAPTURE(chunk);
        const auto check = [&](Matrix<double>& x, const Matrix<double>& gradient) {
          const auto r = eb::gradcheck([&] { return c.loss(); }, x, gradient);
          CHECK_MESSAGE(r.passed, r.message());
        };
        check(c.q, g.q);
        check(c.k, g.k);
        check(c.v, g.v);
        check(c.initial, g.state);
        if (c.gated) check(c.gate, g.gate);
      }
    }
  }
}

TEST_CASE("linear attention: gradients where heads share q and k") {
  for (const Index gate_columns : {0, 4, 12}) {
    Case c(9, gate_columns, 4, 2);
    const Gradients g = c.gradients(4);
    const auto check = [&](Matrix<double>& x, const Matrix<double>& gradient) {
      const auto r = eb::gradcheck([&] { return c.loss(); }, x, gradient);
      CHECK_MESSAGE(r.passed, r.message());
    };
    check(c.q, g.q);
    check(c.k, g.k);
    check(c.v, g.v);
    if (c.gated) check(c.gate, g.gate);
  }
}

TEST_CASE("linear attention: gradients do not depend on the chunk, more than 16 chunks included") {
  for (const Index gate_columns : {0, 2, 34}) {
    const Case c(83, gate_columns, 2, 0, 17, 9);
    const Gradients want = c.gradients(83);
    for (const Index chunk : {0, 1, 2, 5, 8, 33}) {
      CAPTURE(chunk);
      CHECK(difference(c.gradients(chunk), want, c.gated) < kSame);
    }
  }
}

TEST_CASE("linear attention: gradients are bitwise the same for every executor") {
  const eb::thread_pool pool(3);
  for (const Index gate_columns : {0, 4, 12}) {
    const Case c(40, gate_columns, 4, 2);
    const Gradients a = c.gradients(), b = c.gradients(0, pool);
    CHECK(a.q == b.q);
    CHECK(a.k == b.k);
    CHECK(a.v == b.v);
    CHECK(a.state == b.state);
    if (c.gated) CHECK(a.gate == b.gate);
  }
}

TEST_CASE("linear attention: gradients are optional, and absent inputs count as 0") {
  const Case c(19, 2);
  const Gradients want = c.gradients();
  Matrix<double> dq(19, 6), dk = dq, dv(19, 10), dgate(19, 2), zero_state = c.initial * 0.0;
  eb::linear_attention_backward(c.q, c.k, c.v, c.dout, dq, dk, dv, c.options, c.tensors(),
                                &c.dlast);
  CHECK(dq == want.q);
  CHECK(dk == want.k);
  CHECK(dv == want.v);

  Matrix<double> dq2 = dq, dk2 = dk, dv2 = dv, dgate2 = dgate;
  eb::linear_attention_backward(c.q, c.k, c.v, c.dout, dq, dk, dv, c.options,
                                {.log_decay = &c.gate}, nullptr, {.log_decay = &dgate});
  eb::linear_attention_backward(c.q, c.k, c.v, c.dout, dq2, dk2, dv2, c.options,
                                {.log_decay = &c.gate, .state = &zero_state}, &zero_state,
                                {.log_decay = &dgate2});
  CHECK(dq == dq2);
  CHECK(dk == dk2);
  CHECK(dv == dv2);
  CHECK(dgate == dgate2);

  Case empty(0, 2);
  const Gradients passed = empty.gradients();
  CHECK(passed.state == empty.dlast);
}

// The recurrence backwards, one number at a time: dg_t = e^{g_t} <S_{t-1}, dS_t>, without any cancellation.
TEST_CASE("linear attention: gradients under extreme gates follow the recurrence") {
  for (const double strength : {1e-9, 30.0, 700.0, 1e6, kInf}) {
    const Index d = 5, e = 4, tokens = 40;
    Case c(tokens, d, 1, 0, d, e, 1.0);
    c.dout *= 1e3;
    for (Index t = 0; t < tokens; ++t) {
      for (Index i = 0; i < d; ++i) {
        if ((t + i) % 3 == 0) c.gate(t, i) = std::isinf(strength) ? -kInf : c.gate(t, i) * strength;
      }
    }
    std::vector<Matrix<double>> states{c.initial};
    for (Index t = 0; t < tokens; ++t) {
      Matrix<double> s = states.back();
      for (Index i = 0; i < d; ++i)
        s.row(i) = std::exp(c.gate(t, i)) * s.row(i) + c.k(t, i) * c.v.row(t);
      states.push_back(s);
    }
    Matrix<double> ds = c.dlast, dq(tokens, d), dk = dq, dv(tokens, e), dgate = dq;
    for (Index t = tokens; t-- > 0;) {
      const auto at = static_cast<std::size_t>(t);
      ds += 0.6 * c.q.row(t).transpose() * c.dout.row(t);
      dq.row(t) = 0.6 * c.dout.row(t) * states[at + 1].transpose();
      dk.row(t) = c.v.row(t) * ds.transpose();
      dv.row(t) = c.k.row(t) * ds;
      for (Index i = 0; i < d; ++i) {
        dgate(t, i) = std::exp(c.gate(t, i)) * states[at].row(i).dot(ds.row(i));
        ds.row(i) *= std::exp(c.gate(t, i));
      }
    }
    for (const Index chunk : {0, 7, 40}) {
      const Gradients g = c.gradients(chunk);
      CAPTURE(strength);
      CAPTURE(chunk);
      CHECK(difference(g.q, dq) < kSame);
      CHECK(difference(g.k, dk) < kSame);
      CHECK(difference(g.v, dv) < kSame);
      CHECK(difference(g.state, ds) < kSame);
      // A closed gate passes next to nothing, and its gradient is as small: entry by entry, not by the largest.
      for (Index i = 0; i < dgate.size(); ++i) {
        const double got = g.gate.data()[i], want = dgate.data()[i];
        const double terms = 1e5 * std::exp(c.gate.data()[i]);  // what may cancel within one entry
        CHECK(std::abs(got - want) <= 1e-12 * terms + 1e-300);
      }
    }
  }
}

TEST_CASE("linear attention: a NaN of dout stays out of later tokens' gradients") {
  for (const Index gate_columns : {0, 2, 6}) {
    for (const Index at : {0, 8, 25}) {
      const Case clean(30, gate_columns);
      Case c = clean;
      c.dout.row(at).setConstant(std::numeric_limits<double>::quiet_NaN());
      const Gradients got = c.gradients(), want = clean.gradients();
      const Index rest = 29 - at;
      CHECK(got.q.bottomRows(rest) == want.q.bottomRows(rest));
      CHECK(got.k.bottomRows(rest) == want.k.bottomRows(rest));
      CHECK(got.v.bottomRows(rest) == want.v.bottomRows(rest));
      CHECK(got.q.topRows(at) == want.q.topRows(at));  // earlier queries do not see it either
      CHECK(!got.v.row(at).allFinite());
      if (c.gated) CHECK(got.gate.bottomRows(rest) == want.gate.bottomRows(rest));
    }
  }
}

TEST_CASE("linear attention: float gradients are close to those in double") {
  const Case c(200, 16, 2, 0, 8, 8, 0.1);
  const Gradients want = c.gradients();
  const Matrix<float> q = c.q.cast<float>(), k = c.k.cast<float>(), v = c.v.cast<float>();
  const Matrix<float> gate = c.gate.cast<float>(), initial = c.initial.cast<float>();
  const Matrix<float> dout = c.dout.cast<float>(), dlast = c.dlast.cast<float>();
  Matrix<float> dq(200, 16), dk = dq, dv = dq, dgate = dq, dstate(16, 8);
  eb::linear_attention_backward(q, k, v, dout, dq, dk, dv, c.options,
                                {.log_decay = &gate, .state = &initial}, &dlast,
                                {.log_decay = &dgate, .state = &dstate});
  CHECK(difference(dq.cast<double>(), want.q) < 3e-6);
  CHECK(difference(dk.cast<double>(), want.k) < 3e-6);
  CHECK(difference(dv.cast<double>(), want.v) < 3e-6);
  CHECK(difference(dgate.cast<double>(), want.gate) < 3e-6);
  CHECK(difference(dstate.cast<double>(), want.state) < 3e-6);
}

TEST_CASE("linear attention: bad input of the backward is named, and nothing is written") {
  const Case c(4, 2);  // q, k 4 x 6, v 4 x 10, state 6 x 5
  const Matrix<double> wrong(3, 8);
  Matrix<double> bad(2, 9),
      dq = Matrix<double>::Constant(4, 6, 5), dk = dq, dv = Matrix<double>::Constant(4, 10, 5),
      dgate = Matrix<double>::Constant(4, 2, 5), dstate = Matrix<double>::Constant(6, 5, 5);
  const auto refuse = [&](const Matrix<double>& q, const Matrix<double>& dout, Matrix<double>& to_q,
                          Matrix<double>& to_k, Matrix<double>& to_v, const Matrix<double>* gate,
                          const Matrix<double>* dlast, Matrix<double>* to_gate,
                          Matrix<double>* to_state, const char* part) {
    const std::string text = message_of([&] {
      eb::linear_attention_backward(q, c.k, c.v, dout, to_q, to_k, to_v, c.options,
                                    {.log_decay = gate, .state = &c.initial}, dlast,
                                    {.log_decay = to_gate, .state = to_state});
    });
    CHECK_MESSAGE(text.find(part) != std::string::npos, text);
  };
  const Matrix<double>*g = &c.gate, *dl = &c.dlast;
  refuse(wrong, c.dout, dq, dk, dv, g, dl, &dgate, &dstate, "key is 4 x 6, expected 3 x 8");
  refuse(c.q, wrong, dq, dk, dv, g, dl, &dgate, &dstate, "dout is 3 x 8, expected 4 x 10");
  refuse(c.q, c.dout, bad, dk, dv, g, dl, &dgate, &dstate, "dquery is 2 x 9, expected 4 x 6");
  refuse(c.q, c.dout, dq, bad, dv, g, dl, &dgate, &dstate, "dkey is 2 x 9, expected 4 x 6");
  refuse(c.q, c.dout, dq, dk, bad, g, dl, &dgate, &dstate, "dvalue is 2 x 9, expected 4 x 10");
  refuse(c.q, c.dout, dq, dk, dv, &wrong, dl, &dgate, &dstate,
         "log_decay is 3 x 8, expected 4 x 2 or 4 x 6");
  refuse(c.q, c.dout, dq, dk, dv, g, &wrong, &dgate, &dstate,
         "dfinal_state is 3 x 8, expected 6 x 5");
  refuse(c.q, c.dout, dq, dk, dv, g, dl, &bad, &dstate,
         "gradients.log_decay is 2 x 9, expected 4 x 2");
  refuse(c.q, c.dout, dq, dk, dv, g, dl, &dgate, &bad, "gradients.state is 2 x 9, expected 6 x 5");
  refuse(c.q, c.dout, dq, dk, dv, nullptr, dl, &dgate, &dstate, "there is no log_decay");
  CHECK((dq.array() == 5).all());
  CHECK((dk.array() == 5).all());
  CHECK((dv.array() == 5).all());
  CHECK((dgate.array() == 5).all());
  CHECK((dstate.array() == 5).all());
}
