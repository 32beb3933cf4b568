// Forms, states, gates and errors of attention/linear.hpp; its gradients are in linear_gradient_test.cpp.
#include <eigenblocks/attention/linear.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include "support/alloc_guard.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <string>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

namespace {

constexpr double kSame = 1e-12;  // sums of at most a few hundred terms of size 1
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

enum class Gate { none, head, channel };
constexpr Gate kGates[] = {Gate::none, Gate::head, Gate::channel};

/// Random operands of one call.
template <class S>
struct Case {
  eb::LinearAttentionOptions options;
  Index dim, value_dim;
  Matrix<S> q, k, v, gate, initial;
  Gate kind;

  Case(Index tokens, Gate gate_kind, Index heads = 2, Index key_heads = 0, Index d = 5, Index e = 7,
       double decay = 1.0, std::uint64_t seed = 1)
      : options{.heads = heads, .key_heads = key_heads, .scale = 0.6},
        dim(d),
        value_dim(e),
        kind(gate_kind) {
    eb::Random random(seed);
    const Index keys = key_heads == 0 ? heads : key_heads;
    q = eb::normal_matrix<S>(random, tokens, keys * d);
    k = eb::normal_matrix<S>(random, tokens, keys * d);
    v = eb::normal_matrix<S>(random, tokens, heads * e);
    gate =
        -static_cast<S>(decay) *
        eb::normal_matrix<S>(random, tokens, kind == Gate::channel ? heads * d : heads).cwiseAbs();
    initial = eb::normal_matrix<S>(random, heads * d, e);
  }

  eb::LinearAttentionTensors<S> tensors() const {
    return {.log_decay = kind == Gate::none ? nullptr : &gate, .state = &initial};
  }
};

struct Result {
  Matrix<double> out, state;
};

template <class F>
Result run(const Case<double>& c, F&& f) {
  Result r{Matrix<double>::Constant(c.v.rows(), c.v.cols(), kNan),
           Matrix<double>::Constant(c.initial.rows(), c.initial.cols(), kNan)};
  f(r.out, &r.state);
  return r;
}
Result chunked(const Case<double>& c, Index chunk = 0, eb::ExecutorRef executor = {}) {
  eb::LinearAttentionOptions o = c.options;
  o.chunk = chunk;
  return run(c, [&](auto& out, auto* last) {
    eb::linear_attention_forward(c.q, c.k, c.v, out, o, c.tensors(), last, executor);
  });
}
Result recurrent(const Case<double>& c, eb::ExecutorRef executor = {}) {
  return run(c, [&](auto& out, auto* last) {
    eb::linear_attention_recurrent(c.q, c.k, c.v, out, c.options, c.tensors(), last, executor);
  });
}
Result quadratic(const Case<double>& c) {
  return run(c, [&](auto& out, auto* last) {
    eb::linear_attention_reference(c.q, c.k, c.v, out, c.options, c.tensors(), last);
  });
}
Result stepped(const Case<double>& c, Index rows) {
  return run(c, [&](auto& out, auto* last) {
    auto state = eb::linear_attention_state(c.options, c.dim, c.value_dim, &c.initial);
    for (Index t = 0; t < c.q.rows(); t += rows) {
      const Index n = std::min(rows, c.q.rows() - t);
      const Matrix<double> gate = c.gate.middleRows(t, n);
      eb::linear_attention_step(state, c.q.middleRows(t, n), c.k.middleRows(t, n),
                                c.v.middleRows(t, n), out.middleRows(t, n),
                                c.kind == Gate::none ? nullptr : &gate);
    }
    CHECK(state.size() == c.q.rows());
    *last = state.memory;
  });
}

/// The largest difference, relative to the largest entry of b where that is above 1; NaN counts as infinite.
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
bool same_bits(const Result& a, const Result& b) { return a.out == b.out && a.state == b.state; }

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("linear attention: quadratic form by hand") {
  // One head, d = e = 1: S = 2; S = 2/2 + 3 * 5 = 16, o = 0.5 * 7 * 16 = 56; S = 16/4 + 1 * 2 = 6, o = 0.5 * -1 * 6 = -3.
  Matrix<double> q(2, 1), k(2, 1), v(2, 1), g(2, 1), s(1, 1), out(2, 1), last(1, 1);
  q << 7, -1;
  k << 3, 1;
  v << 5, 2;
  g << std::log(0.5), std::log(0.25);
  s << 2;
  const eb::LinearAttentionOptions options{.scale = 0.5};
  eb::linear_attention_reference(q, k, v, out, options, {.log_decay = &g, .state = &s}, &last);
  CHECK(out(0, 0) == doctest::Approx(56).epsilon(1e-14));
  CHECK(out(1, 0) == doctest::Approx(-3).epsilon(1e-14));
  CHECK(last(0, 0) == doctest::Approx(6).epsilon(1e-14));
  CHECK(difference(eb::linear_attention(q, k, v, options, {.log_decay = &g, .state = &s}), out) <
        kSame);
  eb::linear_attention_reference(q, k, v, out, options);  // neither gate nor state
  CHECK(out(0, 0) == doctest::Approx(52.5).epsilon(1e-14));
  CHECK(out(1, 0) == doctest::Approx(-8.5).epsilon(1e-14));
  CHECK(eb::retnet_log_decay(0) == doctest::Approx(std::log(31.0 / 32)).epsilon(1e-15));
  CHECK(eb::retnet_log_decay(3) == doctest::Approx(std::log(255.0 / 256)).epsilon(1e-15));
}

TEST_CASE("linear attention: chunked, recurrent, stepped and quadratic forms agree") {
  for (const Gate gate : kGates) {
    for (const Index tokens : {1, 2, 3, 8, 13, 40, 77}) {
      const Case<double> c(tokens, gate, 3, 0, 5, 7, 1.0, static_cast<std::uint64_t>(tokens));
      const Result want = quadratic(c);
      CAPTURE(static_cast<int>(gate));
      CAPTURE(tokens);
      CHECK(difference(recurrent(c), want) < kSame);
      for (const Index chunk : {0, 1, 2, 3, 7, 16, 33, 64, 1000}) {
        CAPTURE(chunk);
        CHECK(difference(chunked(c, chunk), want) < kSame);
      }
      for (const Index rows : {1, 3, 8, 9, 50}) {
        CAPTURE(rows);
        CHECK(difference(stepped(c, rows), want) < kSame);
      }
    }
  }
}

TEST_CASE("linear attention: widths that fill registers, overrun them, or are 1") {
  for (const Gate gate : kGates) {
    for (const auto& [d, e] :
         {std::pair<Index, Index>{16, 32}, {1, 1}, {1, 19}, {33, 1}, {24, 37}}) {
      const Case<double> c(45, gate, 2, 0, d, e);
      const Result want = quadratic(c);
      CAPTURE(d);
      CAPTURE(e);
      CHECK(difference(chunked(c), want) < kSame);
      CHECK(difference(recurrent(c), want) < kSame);
    }
  }
}

TEST_CASE("linear attention: heads that share q and k") {
  for (const Gate gate : kGates) {
    const Case<double> shared(21, gate, 6, 2);
    Case<double> repeated = shared;
    repeated.options.key_heads = 0;
    repeated.q.resize(21, 6 * 5);
    repeated.k.resize(21, 6 * 5);
    for (Index h = 0; h < 6; ++h) {
      repeated.q.middleCols(h * 5, 5) = shared.q.middleCols(h / 3 * 5, 5);
      repeated.k.middleCols(h * 5, 5) = shared.k.middleCols(h / 3 * 5, 5);
    }
    CHECK(same_bits(chunked(shared), chunked(repeated)));
    CHECK(same_bits(recurrent(shared), recurrent(repeated)));
    CHECK(difference(chunked(shared), quadratic(shared)) < kSame);
  }
}

TEST_CASE("linear attention: a state carried over any cut gives the whole") {
  for (const Gate gate : kGates) {
    const Case<double> c(50, gate);
    const Result whole = chunked(c, 8);
    for (const Index cut : {0, 1, 17, 32, 49, 50}) {
      Case<double> first = c, second = c;
      for (Matrix<double> Case<double>::*m :
           {&Case<double>::q, &Case<double>::k, &Case<double>::v, &Case<double>::gate}) {
        first.*m = Matrix<double>((c.*m).topRows(cut));
        second.*m = Matrix<double>((c.*m).bottomRows(50 - cut));
      }
      const Result a = chunked(first, 8);
      second.initial = a.state;
      const Result b = chunked(second, 8);
      CAPTURE(cut);
      CHECK(difference(a.out, whole.out.topRows(cut)) < kSame);
      CHECK(difference(b.out, whole.out.bottomRows(50 - cut)) < kSame);
      CHECK(difference(b.state, whole.state) < kSame);
    }
    // The last state may take the place of the first.
    Matrix<double> state = c.initial, out(50, c.v.cols());
    eb::LinearAttentionTensors<double> tensors = c.tensors();
    tensors.state = &state;
    eb::linear_attention_forward(c.q, c.k, c.v, out, c.options, tensors, &state);
    CHECK(difference(state, whole.state) < kSame);
    CHECK(difference(out, whole.out) < kSame);
    state = c.initial;
    eb::linear_attention_recurrent(c.q, c.k, c.v, out, c.options, tensors, &state);
    CHECK(difference(state, whole.state) < kSame);
    CHECK(difference(out, whole.out) < kSame);
  }
}

TEST_CASE("linear attention: a constant scalar gate is a constant channel gate") {
  Case<double> scalar(37, Gate::head);
  for (Index h = 0; h < 2; ++h) scalar.gate.col(h).setConstant(eb::retnet_log_decay(h));
  Case<double> channel = scalar;
  channel.kind = Gate::channel;
  channel.gate.resize(37, 10);
  for (Index h = 0; h < 2; ++h)
    channel.gate.middleCols(h * 5, 5).setConstant(eb::retnet_log_decay(h));
  CHECK(same_bits(chunked(scalar), chunked(channel)));
  Case<double> none = scalar, zero = scalar;
  none.kind = Gate::none;
  zero.gate.setZero();
  CHECK(difference(chunked(none), chunked(zero)) < kSame);
  CHECK(difference(recurrent(none), recurrent(zero)) == 0);
}

TEST_CASE("linear attention: strong decay neither overflows nor loses digits") {
  for (const Gate gate : {Gate::head, Gate::channel}) {
    for (const double strength : {1e-8, 5.0, 60.0, 800.0, 1e5}) {
      const Case<double> c(70, gate, 2, 0, 9, 6, strength);
      const Result want = quadratic(c);
      CAPTURE(strength);
      CHECK(want.out.allFinite());
      for (const Index chunk : {0, 5, 64}) CHECK(difference(chunked(c, chunk), want) < kSame);
      CHECK(difference(recurrent(c), want) < kSame);
    }
  }
  // In float, where e^{88} is the end: every gate between 0 and -100, one channel after the other.
  const Case<float> c(96, Gate::channel, 1, 0, 16, 8, 40.0);
  const Matrix<float> out = eb::linear_attention(c.q, c.k, c.v, c.options, c.tensors());
  const Matrix<double> q = c.q.cast<double>(), k = c.k.cast<double>(), v = c.v.cast<double>();
  const Matrix<double> gate = c.gate.cast<double>(), initial = c.initial.cast<double>();
  Matrix<double> want(96, 8);
  eb::linear_attention_reference(q, k, v, want, c.options, {.log_decay = &gate, .state = &initial});
  CHECK(difference(out.cast<double>(), want) < 2e-6);
}

TEST_CASE("linear attention: a gate of -inf forgets everything before it") {
  for (const Gate gate : {Gate::head, Gate::channel}) {
    for (const Index reset : {0, 1, 6, 31, 32, 45}) {
      Case<double> c(46, gate);
      c.gate.row(reset).setConstant(-kInf);
      Case<double> tail = c;
      for (Matrix<double> Case<double>::*m :
           {&Case<double>::q, &Case<double>::k, &Case<double>::v, &Case<double>::gate}) {
        tail.*m = Matrix<double>((c.*m).bottomRows(46 - reset));
      }
      tail.initial.setZero();
      const Result want = quadratic(tail);
      CAPTURE(reset);
      for (const Index chunk : {0, 1, 7, 64}) {
        const Result got = chunked(c, chunk);
        CHECK(got.out.allFinite());
        CHECK(difference(got.out.bottomRows(46 - reset), want.out) < kSame);
        CHECK(difference(got.state, want.state) < kSame);
      }
      const Result got = recurrent(c);
      CHECK(difference(got.out.bottomRows(46 - reset), want.out) < kSame);
      CHECK(difference(got.state, want.state) < kSame);
    }
  }
}

TEST_CASE("linear attention: gates above 0 grow") {
  Case<double> c(40, Gate::channel);
  c.gate = -c.gate * 0.2;
  const Result want = quadratic(c);
  CHECK(difference(chunked(c, 16), want) < kSame);
  CHECK(difference(recurrent(c), want) < kSame);
}

TEST_CASE("linear attention: NaN and infinity stay out of earlier tokens") {
  for (const Gate gate : kGates) {
    for (Matrix<double> Case<double>::*operand :
         {&Case<double>::q, &Case<double>::k, &Case<double>::v, &Case<double>::gate}) {
      if (gate == Gate::none && operand == &Case<double>::gate) continue;
      for (const double poison : {kNan, kInf}) {
        for (const Index at : {1, 10, 31}) {
          const Case<double> clean(40, gate);
          Case<double> c = clean;
          (c.*operand).row(at).setConstant(poison);
          for (const Index chunk : {0, 7}) {
            const Matrix<double> got = chunked(c, chunk).out, want = chunked(clean, chunk).out;
            CAPTURE(at);
            CHECK(got.topRows(at) == want.topRows(at));
            CHECK(!got.row(at).allFinite());
          }
        }
      }
    }
  }
}

TEST_CASE("linear attention: bitwise the same for every executor") {
  const eb::thread_pool two(2), three(3);
  for (const Gate gate : kGates) {
    const Case<double> c(70, gate, 6, 3);
    const Result want = chunked(c), steps = recurrent(c);
    for (const eb::thread_pool* pool : {&two, &three}) {
      CHECK(same_bits(chunked(c, 0, *pool), want));
      CHECK(same_bits(recurrent(c, *pool), steps));
    }
  }
}

TEST_CASE("linear attention: views with gaps between their rows") {
  const Case<double> c(20, Gate::head);
  Matrix<double> wide(20, 60), wide_out(20, 40);
  wide.setConstant(kNan);
  wide_out.setConstant(3);
  wide.middleCols(2, 10) = c.q;
  wide.middleCols(15, 10) = c.k;
  wide.middleCols(30, 14) = c.v;
  eb::linear_attention_forward(wide.middleCols(2, 10), wide.middleCols(15, 10),
                               wide.middleCols(30, 14), wide_out.middleCols(5, 14), c.options,
                               c.tensors());
  CHECK(wide_out.middleCols(5, 14) == chunked(c).out);
  CHECK((wide_out.leftCols(5).array() == 3).all());
  CHECK((wide_out.rightCols(21).array() == 3).all());
}

TEST_CASE("linear attention: no tokens pass the state on") {
  const Case<double> c(0, Gate::channel);
  CHECK(chunked(c).state == c.initial);
  CHECK(recurrent(c).state == c.initial);
  CHECK(quadratic(c).state == c.initial);
  auto state = eb::linear_attention_state(c.options, c.dim, c.value_dim, &c.initial);
  Matrix<double> out(0, c.v.cols());
  eb::linear_attention_step(state, c.q, c.k, c.v, out, &c.gate);
  CHECK(state.memory == c.initial);
  CHECK(state.size() == 0);
}

TEST_CASE("linear attention: a copied state is a snapshot") {
  const Case<double> c(30, Gate::channel);
  auto state = eb::linear_attention_state<double>(c.options, c.dim, c.value_dim);
  CHECK(state.memory.isZero(0));
  CHECK(state.bytes() == 2 * 5 * 7 * 8);
  Matrix<double> out(30, c.v.cols()), again = out;
  const auto feed = [&](auto& to, Index first, Index rows, Matrix<double>& result) {
    const Matrix<double> gate = c.gate.middleRows(first, rows);
    eb::linear_attention_step(to, c.q.middleRows(first, rows), c.k.middleRows(first, rows),
                              c.v.middleRows(first, rows), result.middleRows(first, rows), &gate);
  };
  feed(state, 0, 12, out);
  const auto snapshot = state;
  const Matrix<double> memory = state.memory;
  for (Index t = 12; t < 30; ++t) feed(state, t, 1, out);
  CHECK(snapshot.memory == memory);
  CHECK(snapshot.size() == 12);
  auto restored = snapshot;
  for (Index t = 12; t < 30; ++t) feed(restored, t, 1, again);
  CHECK(out.bottomRows(18) == again.bottomRows(18));
  CHECK(restored.memory == state.memory);
  state = snapshot;
  feed(state, 12, 18, out);
  CHECK(difference(state.memory, restored.memory) < kSame);
}

TEST_CASE("linear attention: steps allocate nothing once warm") {
  if (!AllocationCount::available) return;
  const eb::thread_pool pool(2);
  for (const Gate gate : kGates) {
    const Case<float> c(40, gate, 4, 2, 8, 12);
    for (const Index rows : {1, 20}) {
      for (const eb::ExecutorRef executor : {eb::ExecutorRef(), eb::ExecutorRef(pool)}) {
        auto state = eb::linear_attention_state<float>(c.options, c.dim, c.value_dim);
        const Matrix<float> g = c.gate.topRows(rows);
        Matrix<float> out(rows, c.v.cols());
        const auto step = [&] {
          eb::linear_attention_step(state, c.q.topRows(rows), c.k.topRows(rows), c.v.topRows(rows),
                                    out, gate == Gate::none ? nullptr : &g, executor);
        };
        step();
        const AllocationCount count;
        for (int i = 0; i < 5; ++i) step();
        CHECK(count.calls() == 0);
      }
    }
  }
}

TEST_CASE("linear attention: bad input is named, and nothing is written") {
  const Case<double> c(4, Gate::head, 6, 2);  // q, k 4 x 10, v 4 x 42, state 30 x 7
  Matrix<double> out = Matrix<double>::Constant(4, 42, 5),
                 last = Matrix<double>::Constant(30, 7, 5);
  const Matrix<double> wrong(3, 8);
  const auto refuse = [&](auto&& change, std::initializer_list<const char*> parts) {
    for (const int form : {0, 1, 2}) {
      eb::LinearAttentionOptions options = c.options;
      eb::LinearAttentionTensors<double> tensors = c.tensors();
      const Matrix<double>*q = &c.q, *k = &c.k, *v = &c.v;
      Matrix<double>*to = &out, *final_state = &last;
      change(options, tensors, q, k, v, to, final_state);
      const std::string text = message_of([&] {
        if (form == 0) {
          eb::linear_attention_forward(*q, *k, *v, *to, options, tensors, final_state);
        } else if (form == 1) {
          eb::linear_attention_recurrent(*q, *k, *v, *to, options, tensors, final_state);
        } else {
          eb::linear_attention_reference(*q, *k, *v, *to, options, tensors, final_state);
        }
      });
      for (const char* part : parts) CHECK_MESSAGE(has(text, part), text);
    }
  };
  Matrix<double> small_out(3, 42), small_state(29, 7);
  using O = eb::LinearAttentionOptions;
#define EB_CHANGE(statement)                                                            \
  [&]([[maybe_unused]] O& o, [[maybe_unused]] auto& t, [[maybe_unused]] auto*& q,       \
      [[maybe_unused]] auto*& k, [[maybe_unused]] auto*& v, [[maybe_unused]] auto*& to, \
      [[maybe_unused]] auto*& last_state) { statement; }
  refuse(EB_CHANGE(o.heads = 0), {"heads (0) must be at least 1"});
  refuse(EB_CHANGE(o.key_heads = -1), {"key_heads (-1) must be at least 1"});
  refuse(EB_CHANGE(o.key_heads = 4), {"key_heads (4) must divide heads (6)"});
  refuse(EB_CHANGE(o.chunk = -2), {"chunk (-2) must be positive"});
  refuse(EB_CHANGE(o.scale = kInf), {"scale (inf) must be finite"});
  refuse(EB_CHANGE(o.key_heads = 3), {"query is 4 x 10", "key_heads (3)"});
  refuse(EB_CHANGE(k = &wrong), {"key is 3 x 8, expected 4 x 10", "shape of query"});
  refuse(EB_CHANGE(v = &wrong), {"value is 3 x 8, expected 4 rows", "multiple of heads (6)"});
  refuse(EB_CHANGE(to = &small_out), {"out is 3 x 42, expected 4 x 42"});
  refuse(EB_CHANGE(t.log_decay = &wrong), {"log_decay is 3 x 8, expected 4 x 6 or 4 x 30"});
  refuse(EB_CHANGE(t.state = &wrong), {"state is 3 x 8, expected 30 x 7"});
  refuse(EB_CHANGE(last_state = &small_state), {"final_state is 29 x 7, expected 30 x 7"});
#undef EB_CHANGE
  CHECK((out.array() == 5).all());
  CHECK((last.array() == 5).all());

  CHECK(has(message_of([&] { eb::linear_attention_state<double>(c.options, 0, 7); }),
            "key_dim (0) and value_dim (7) must be at least 1"));
  CHECK(has(message_of([&] { eb::linear_attention_state<double>({.heads = -3}, 5, 7); }),
            "heads (-3) must be at least 1"));
  CHECK(has(message_of([&] { eb::linear_attention_state<double>(c.options, 5, 7, &wrong); }),
            "initial is 3 x 8, expected 30 x 7"));
  auto state = eb::linear_attention_state(c.options, 5, 7, &c.initial);
  CHECK(has(message_of([&] { eb::linear_attention_step(state, c.q, c.k, c.v, out, &wrong); }),
            "log_decay is 3 x 8, expected 4 x 6 or 4 x 30"));
  CHECK(has(message_of([&] {
              eb::linear_attention_step(state, c.q.leftCols(8), c.k.leftCols(8), c.v, out);
            }),
            "state is 30 x 7, expected 24 x 7"));
  CHECK(state.memory == c.initial);
  CHECK(state.size() == 0);
  CHECK((out.array() == 5).all());
}
