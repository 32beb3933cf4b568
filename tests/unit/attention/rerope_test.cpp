// ReRoPE attention, forward and backward: against brute force, finite differences, plain RoPE, other executors; tile counts.
#include "rerope_case.hpp"

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <functional>
#include <string>

namespace {

using namespace rerope_test;

template <class S>
auto rule_of(const NearFarPosition& policy, const AnyMask& mask = causal()) {
  return attention_rule(mask, IdentityScore{}, policy);
}

template <class S>
struct Gradients {
  Matrix<S> out, dq, dk, dv;
  Vector<S> drow_scale, dsinks;
  friend bool operator==(const Gradients&, const Gradients&) = default;
};

template <class S, class Rule>
Gradients<S> run(const Case<S>& x, const Rule& rule, ExecutorRef executor = {}) {
  Gradients<S> g{x.empty_out(), x.q, x.k, x.v, x.row_scale, x.sinks};
  const auto saved =
      rerope_attention_forward(x.q, x.k, x.v, g.out, x.shape, x.table, rule, x.tensors(), executor);
  AttentionTensorGradients<S> gradients{.row_scale = &g.drow_scale, .sinks = &g.dsinks};
  rerope_attention_backward(saved, x.q, x.k, x.v, g.out, x.dout, g.dq, g.dk, g.dv, x.shape, x.table,
                            rule, x.tensors(), &gradients, executor);
  return g;
}

}  // namespace

TEST_CASE("forward equals brute force: policies, windows, offsets, layouts, groups of heads") {
  const std::vector<Sizes> cases{
      {.queries = 61, .keys = 61},
      {.queries = 30, .keys = 77, .heads = 3, .kv_heads = 3, .query_offset = 47},
      {.queries = 25, .keys = 200, .query_offset = 175, .layout = RopeLayout::interleaved},
      {.queries = 40, .keys = 33, .rotary_dim = 8, .query_offset = 12, .key_offset = 15},
      {.queries = 9, .keys = 20, .dim = 6, .query_offset = -3, .attention_factor = 1.3},
      {.queries = 1, .keys = 1}};
  for (const Sizes& n : cases) {
    const Case<double> x(n);
    for (const Index w : {1, 5, 24, 48, 300}) {
      for (const NearFarPosition& policy : policies(w)) {
        CAPTURE(n.keys);
        CAPTURE(w);
        CAPTURE(policy.leak);
        CAPTURE(policy.group);
        Matrix<double> out = x.empty_out();
        rerope_attention_forward(x.q, x.k, x.v, out, x.shape, x.table, rule_of<double>(policy),
                                 x.tensors());
        CHECK(distance(out, brute_force(x, policy)) < 1e-13);
      }
    }
  }
}

TEST_CASE("score functors and other masks see the chosen score") {
  const Case<double> x({.queries = 50, .keys = 50});
  const AnyMask mask = causal() & window_left(30);
  Matrix<double> out = x.empty_out();
  rerope_attention_forward(x.q, x.k, x.v, out, x.shape, x.table,
                           attention_rule(mask, soft_cap(1.5), leaky_rerope(9, 3)), x.tensors());
  CHECK(distance(out, brute_force(x, leaky_rerope(9, 3), mask, 1.5)) < 1e-13);
}

TEST_CASE("float and bfloat16 follow double") {
  const Sizes n{.queries = 130, .keys = 130};
  const Case<float> x(n);
  Matrix<float> out = x.empty_out();
  rerope_attention_forward(x.q, x.k, x.v, out, x.shape, x.table, rule_of<float>(rerope(37)),
                           x.tensors());
  CHECK(distance(out, brute_force(x, rerope(37))) < 5e-6);

  const auto rounded = [](const Matrix<float>& m) -> Matrix<Eigen::bfloat16> {
    return m.cast<Eigen::bfloat16>();
  };
  const Matrix<Eigen::bfloat16> q = rounded(x.q), k = rounded(x.k), v = rounded(x.v);
  Matrix<Eigen::bfloat16> short_out(out.rows(), out.cols());
  rerope_attention_forward(q, k, v, short_out, x.shape, x.table, rule_of<float>(rerope(37)),
                           x.tensors());
  CHECK(distance(short_out, out) < 0.06);
}

TEST_CASE("scores of a thousand: the maximum counts the chosen branch in mixed tiles") {
  Case<float> x({.queries = 260, .keys = 260});
  x.q *= 40.0F;
  x.k *= 40.0F;
  x.row_scale.setOnes();
  x.sinks.setConstant(-1e30F);
  Matrix<float> out = x.empty_out();
  const auto saved = rerope_attention_forward(x.q, x.k, x.v, out, x.shape, x.table,
                                              rule_of<float>(rerope(60)), x.tensors());
  Matrix<double> lse;
  // Rounding of such scores moves weights by per mille.
  CHECK(distance(out, brute_force(x, rerope(60), causal(), 0, &lse)) < 0.02);
  CHECK(distance(saved.lse, lse) < 0.01);
}

TEST_CASE("a sequence within the window is plain RoPE attention, bit for bit") {
  for (const NearFarPosition& policy : policies(64)) {
    const Case<float> x({.queries = 64, .keys = 64});
    const Gradients<float> got = run(x, rule_of<float>(policy));
    const RopeOptions heads{.heads = x.shape.heads}, kv_heads{.heads = x.shape.kv_heads};
    const Matrix<float> q = rope(x.q, 0, x.table, heads), k = rope(x.k, 0, x.table, kv_heads);
    const auto plain_rule = attention_rule(AnyMask(causal()));
    Gradients<float> want{x.empty_out(), q, k, x.v, x.row_scale, x.sinks};
    const auto saved = attention_forward(q, k, x.v, want.out, x.shape, plain_rule, x.tensors());
    AttentionTensorGradients<float> gradients{.row_scale = &want.drow_scale, .sinks = &want.dsinks};
    attention_backward(saved, q, k, x.v, want.out, x.dout, want.dq, want.dk, want.dv, x.shape,
                       plain_rule, x.tensors(), &gradients);
    rope_backward_in_place(want.dq, 0, x.table, heads);
    rope_backward_in_place(want.dk, 0, x.table, kv_heads);
    CHECK(got == want);
  }
}

TEST_CASE("leak 1 is RoPE") {
  const Case<double> x({.queries = 150, .keys = 150});
  const Gradients<double> a = run(x, rule_of<double>(leaky_rerope(21, 1))),
                          b = run(x, rule_of<double>(rerope(150)));
  CHECK(distance(a.out, b.out) < 1e-13);
  CHECK(distance(a.dq, b.dq) < 1e-12);
  CHECK(distance(a.dk, b.dk) < 1e-12);
  CHECK(distance(a.dv, b.dv) < 1e-12);
}

TEST_CASE("gradients are the finite differences") {
  for (const Sizes& n : {Sizes{.queries = 19,
                        .keys = 19,
                        .heads = 4,
                        .kv_heads = 2,
                        .dim = 4,
                        .value_dim = 2,
                        .rotary_dim = 4},
                         Sizes{.queries = 7,
                         .keys = 40,
                         .dim = 5,
                         .value_dim = 2,
                         .rotary_dim = 4,
                         .query_offset = 33,
                         .layout = RopeLayout::interleaved,
                         .attention_factor = 0.8}}) {
    for (const NearFarPosition& policy : policies(5)) {
      Case<double> x(n);
      const auto rule = rule_of<double>(policy);
      const Gradients<double> g = run(x, rule);
      const auto loss = [&] {
        Matrix<double> out = x.empty_out();
        rerope_attention_forward(x.q, x.k, x.v, out, x.shape, x.table, rule, x.tensors());
        return out.cwiseProduct(x.dout).sum();
      };
      const auto check = [&](const char* name,
                             Eigen::Ref<Matrix<double>, 0, Eigen::OuterStride<>> at,
                             const Matrix<double>& gradient) {
        const GradcheckResult result = gradcheck(loss, at, gradient, {.max_entries = 60});
        CHECK_MESSAGE(result.passed, std::string(name), ": ", result.message());
      };
      using Column = Eigen::Map<Matrix<double>>;
      check("query", x.q, g.dq);
      check("key", x.k, g.dk);
      check("value", x.v, g.dv);
      check("row_scale", Column(x.row_scale.data(), x.row_scale.size(), 1), g.drow_scale);
      check("sinks", Column(x.sinks.data(), x.sinks.size(), 1), g.dsinks);
    }
  }
}

TEST_CASE("several key blocks and chunks: the backward of a long sequence is that of its pieces") {
  // Queries split in two calls over the same keys add up to one call.
  const Case<double> x({.queries = 260, .keys = 260});
  const auto rule = rule_of<double>(rerope(70));
  const Gradients<double> whole = run(x, rule);
  Matrix<double> dk = Matrix<double>::Zero(260, x.k.cols()),
                 dv = Matrix<double>::Zero(260, x.v.cols());
  for (const Index first : {0, 100}) {
    const Index rows = first == 0 ? 100 : 160;
    Case<double> part = x;
    part.q = x.q.middleRows(first, rows);
    part.dout = x.dout.middleRows(first, rows);
    part.row_scale = x.row_scale.segment(first, rows);
    part.shape.query_offset = first;
    const Gradients<double> g = run(part, rule);
    CHECK(distance(g.out, whole.out.middleRows(first, rows)) < 1e-13);
    CHECK(distance(g.dq, whole.dq.middleRows(first, rows)) < 1e-12);
    dk += g.dk;
    dv += g.dv;
  }
  CHECK(distance(dk, whole.dk) < 1e-12);
  CHECK(distance(dv, whole.dv) < 1e-12);
}

TEST_CASE("results are the same bits for every number of workers") {
  for (const Index kv_heads : {1, 4}) {
    const Case<float> x({.queries = 200, .keys = 200, .heads = 4, .kv_heads = kv_heads});
    const auto rule = rule_of<float>(leaky_rerope(50, 2.5));
    const Gradients<float> want = run(x, rule);
    for (const int workers : {1, 2, 3, 7}) {
      const thread_pool pool(workers);
      CHECK(run(x, rule, pool) == want);
    }
  }
}

TEST_CASE(
    "what is far is never read as near: keys of one branch may hold NaN where the other is asked") {
  // Far keys equal the keys under rerope; a NaN in a key that is only near to hidden rows must not spread.
  Case<double> x({.queries = 90, .keys = 90});
  x.k.row(89).setConstant(std::numeric_limits<double>::quiet_NaN());
  Matrix<double> out = x.empty_out();
  rerope_attention_forward(x.q, x.k, x.v, out, x.shape, x.table, rule_of<double>(rerope(17)),
                           x.tensors());
  CHECK(out.topRows(89).allFinite());
  CHECK(out.row(89).array().isNaN().all());
}

TEST_CASE("only tiles that the edge of the window crosses are computed twice") {
  const auto share = [](Index tokens, Index window, Index tile) {
    const detail::NearFarCount n = detail::near_far_count(tokens, tokens, 0, window, tile, tile);
    return static_cast<double>(n.mixed) / static_cast<double>(n.tiles);
  };
  // One mixed tile per row of tiles beyond the window when the tile divides it: (64 - 8) of 64 65/2.
  const detail::NearFarCount n = detail::near_far_count(4096, 4096, 0, 512, 64, 64);
  CHECK(n.tiles == 64 * 65 / 2);
  CHECK(n.mixed == 64 - 8);
  CHECK(share(4096, 512, 64) == doctest::Approx(0.027).epsilon(0.01));
  CHECK(share(16384, 1024, 64) == doctest::Approx(0.0073).epsilon(0.01));
  CHECK(share(65536, 1024, 64) == doctest::Approx(0.0019).epsilon(0.03));
  CHECK(detail::near_far_count(4096, 4096, 0, 500, 64, 64).mixed <= 2 * 64);
  CHECK(detail::near_far_count(512, 512, 0, 512, 64, 64).mixed == 0);
  // The split itself: a pair is in the part its distance asks for, or in the mixed one.
  for (const Index window : {1, 3, 8, 50}) {
    for (const Index i0 : {0, 5, 40}) {
      for (const Index base : {0, 2, 13}) {
        const detail::NearFarSplit s = detail::near_far_split(i0, i0 + 6, base, 4, 1, 12, window);
        CHECK((s.far_begin == 1 && s.near_end == 12));
        CHECK((s.far_begin <= s.mixed_begin && s.mixed_begin <= s.mixed_end &&
               s.mixed_end <= s.near_end));
        for (Index g = 1; g < 12; ++g) {
          Index far = 0;
          for (Index i = i0; i < i0 + 6; ++i) {
            for (Index j = base + 4 * g; j < base + 4 * g + 4; ++j) far += i - j >= window;
          }
          CHECK((g < s.mixed_begin) == (far == 24));
          CHECK((g >= s.mixed_end) == (far == 0));
        }
      }
    }
  }
}

TEST_CASE("bad input throws, and nothing is written") {
  Case<double> x({.queries = 6, .keys = 6});
  Matrix<double> out = Matrix<double>::Constant(6, 12, 7.0), dq = x.q, dk = x.k, dv = x.v;
  const AttentionSaved<double> saved{Matrix<double>::Zero(6, 2)};
  AttentionTensorGradients<double> gradients;
  NearFarPosition policy = rerope(3);
  AnyMask mask = causal();
  const auto refuse = [&](const char* message) {
    const auto rule = rule_of<double>(policy, mask);
    CHECK_THROWS_WITH_AS(rerope_attention_forward(x.q, x.k, x.v, out, x.shape, x.table, rule),
                         doctest::Contains(message), std::invalid_argument);
    CHECK_THROWS_WITH_AS(rerope_attention_backward(saved, x.q, x.k, x.v, out, x.dout, dq, dk, dv,
                                                   x.shape, x.table, rule, {}, &gradients),
                         doctest::Contains(message), std::invalid_argument);
    CHECK((out.array() == 7.0).all());
    CHECK((dq == x.q && dk == x.k && dv == x.v));
  };
  const Case<double> good = x;
  mask = full();
  refuse("must be causal");
  mask = window_right(1);
  refuse("must be causal");
  mask = causal();
  policy.window = 0;
  refuse("window (0) must be at least 1");
  policy = {.kind = NearFarPosition::Kind::leaky, .window = 3, .leak = 0};
  refuse("leak (0) must be positive and finite");
  policy = {.kind = NearFarPosition::Kind::self_extend, .window = 3, .group = 4};
  refuse("group (4) must be at most window (3)");
  policy = rerope(3);
  x.shape.heads = 3;
  refuse("heads (3) must divide");
  x.shape = good.shape;
  x.k.resize(5, 8);
  dk.resize(5, 8);
  x.k.setZero();
  dk.setZero();
  refuse("value is 6 x 6");
  x = good;
  dk = x.k;
  x.table = RotaryTable<double>(rope_frequencies(10), RopeLayout::half, 0);
  refuse("the table turns 10 channels, head_dim is 8");
}
