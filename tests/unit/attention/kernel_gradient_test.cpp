// The tiled backward against finite differences of the tiled forward, for every operand.
#include "support/attention_case.hpp"

#include <eigenblocks/core/gradcheck.hpp>

#include <doctest/doctest.h>

#include <string>

namespace {

using namespace attention_test;

/// <dout, out> + <dlse, lse>; rows without a visible key have no lse to differentiate.
double loss(const Problem& p, const AnyRule& rule, const Run& run) {
  const Outcome<double> y = tiled<double>(p, rule, run, false);
  double sum = y.out.cwiseProduct(p.dout).sum();
  if (!p.options.upstream_lse) return sum;
  for (Index i = 0; i < y.lse.size(); ++i) {
    if (y.lse.data()[i] != -kInfinity) sum += p.dlse.data()[i] * y.lse.data()[i];
  }
  return sum;
}

void check_gradients(const ProblemOptions& options, const AnyRule& rule, const Run& run = {}) {
  Problem p(options);
  const Outcome<double> g = tiled<double>(p, rule, run);
  const auto check = [&](const char* name, Eigen::Ref<Matrix<double>, 0, Eigen::OuterStride<>> x,
                         const Matrix<double>& gradient) {
    const eb::GradcheckResult result =
        eb::gradcheck([&] { return loss(p, rule, run); }, x, gradient);
    CHECK_MESSAGE(result.passed, std::string(name), ": ", result.message());
  };
  check("query", p.q, g.dq);
  check("key", p.k, g.dk);
  check("value", p.v, g.dv);
  if (p.has_bias()) check("bias", p.bias, g.dbias);
  using Column = Eigen::Map<Matrix<double>>;
  if (options.row_scale)
    check("row_scale", Column(p.row_scale.data(), p.row_scale.size(), 1), g.drow_scale);
  if (options.sinks) check("sinks", Column(p.sinks.data(), p.sinks.size(), 1), g.dsinks);
}

/// A user's functor without lanes, whose derivative depends on everything.
struct Bent {
  template <class S>
  S operator()(S s, Index i, Index j, Index h) const {
    return s + S(0.05) * s * s * static_cast<S>(h + 1) +
           S(0.3) * std::sin(static_cast<S>(i - 2 * j));
  }
  template <class S>
  S grad(S s, Index, Index, Index h) const {
    return S(1) + S(0.1) * s * static_cast<S>(h + 1);
  }
};

constexpr ProblemOptions kSmall{.queries = 7,
                                .keys = 9,
                                .heads = 4,
                                .kv_heads = 2,
                                .dim = 3,
                                .value_dim = 2,
                                .query_offset = 1,
                                .upstream_lse = true};

ProblemOptions everything(ProblemOptions o) {
  o.bias = o.keep = o.row_scale = o.sinks = o.upstream_lse = true;
  return o;
}

}  // namespace

TEST_CASE("plain scores: full, causal, windows, prefix, documents by lambda") {
  check_gradients(kSmall, {});
  check_gradients(kSmall, {eb::causal()});
  check_gradients(kSmall, {eb::window_left(2) & eb::window_right(1)});
  check_gradients(kSmall, {eb::causal() | eb::prefix(4)});
  check_gradients(kSmall, {AnyMask([](Index i, Index j) { return i / 3 == j / 3; })});
}

TEST_CASE("everything at once, on the path without and with a score functor") {
  check_gradients(everything(kSmall), {eb::causal()});
  check_gradients(everything(kSmall),
                  {eb::causal(), eb::compose(eb::soft_cap(1.5), eb::alibi(eb::alibi_slopes(4)))});
  ProblemOptions plain = everything(kSmall);
  plain.bias = false;  // no bias and no functor: exponentials in base two
  check_gradients(plain, {eb::causal()});
}

TEST_CASE("score functors: soft cap, ALiBi, order of both, one of a user") {
  for (const AnyScore& score :
       {AnyScore(eb::soft_cap(0.8)), AnyScore(eb::alibi(eb::alibi_slopes(4))), AnyScore(Bent{}),
        AnyScore(eb::compose(eb::alibi(eb::alibi_slopes(4)), eb::soft_cap(1.0))),
        AnyScore(eb::compose(Bent{}, eb::soft_cap(1.0)))}) {
    check_gradients(kSmall, {eb::causal(), score});
  }
}

TEST_CASE("a bias shared by the heads collects from all of them") {
  ProblemOptions o = kSmall;
  o.shared_bias = true;
  check_gradients(o, {eb::causal()});
  o.kv_heads = 4;  // enough kv heads for one task each, were the bias not shared
  check_gradients(o, {eb::causal()});
}

TEST_CASE("MQA, MHA with enough kv heads for one task each, dead rows, negative scale") {
  ProblemOptions o = everything(kSmall);
  o.kv_heads = 1;
  check_gradients(o, {eb::causal()});
  o.kv_heads = 4;
  check_gradients(o, {eb::causal()});
  o.sinks = false;
  o.query_offset = -3;  // the first rows see no key
  check_gradients(o, {eb::causal()});
  o.scale = -0.9;
  check_gradients(o, {eb::causal(), eb::soft_cap(2.0)});
}

TEST_CASE("across tile borders: small blocks, several key chunks, a narrow register tile") {
  ProblemOptions o = everything(kSmall);
  o.queries = 13;
  o.keys = 29;
  o.query_offset = 11;
  const eb::detail::TileTuning small{.key_block = 4, .query_tiles = 1, .packed_scalars = 1};
  check_gradients(o, {eb::causal(), eb::soft_cap(2.0)}, {.tuning = small, .narrow = true});
  o.bias = false;
  check_gradients(o, {eb::causal() & eb::window_left(9)}, {.tuning = small, .narrow = true});
}
