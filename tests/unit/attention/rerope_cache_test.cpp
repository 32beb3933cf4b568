// ReRoPE attention step by step: every way of cutting a sequence gives the full pass; snapshots, truncation, allocations.
#include "rerope_case.hpp"
#include "support/alloc_guard.hpp"

#include <eigenblocks/core/thread_pool.hpp>

#include <functional>

namespace {

using namespace rerope_test;

template <class T, class S>
ReropeCache<T> cache_for(const Case<S>& x, const NearFarPosition& policy, Index capacity = 0) {
  return ReropeCache<T>(policy, {.kv_heads = x.shape.kv_heads,
                                 .head_dim = x.k.cols() / x.shape.kv_heads,
                                 .value_dim = x.v.cols() / x.shape.kv_heads,
                                 .capacity = capacity});
}

/// Rows [from, to) through the cache, chunk(t) at a time.
template <class S>
Matrix<S> steps(const Case<S>& x, ReropeCache<S>& cache, Index from, Index to,
                const std::function<Index(Index)>& chunk, ExecutorRef executor = {}) {
  const auto rule = attention_rule(AnyMask(causal()), IdentityScore{}, cache.position());
  Matrix<S> out = x.empty_out().middleRows(from, to - from);
  for (Index t = from; t < to;) {
    const Index n = std::min(chunk(t), to - t);
    const Vector<S> row_scale = x.row_scale.segment(t, n);
    rerope_attention_step(cache, x.q.middleRows(t, n), x.k.middleRows(t, n), x.v.middleRows(t, n),
                          out.middleRows(t - from, n), x.shape, x.table, rule,
                          {.row_scale = &row_scale, .sinks = &x.sinks}, executor);
    t += n;
  }
  return out;
}

std::function<Index(Index)> constant(Index n) {
  return [n](Index) { return n; };
}

}  // namespace

TEST_CASE("every cut of a sequence gives the brute-force rows") {
  for (const Sizes& n : {Sizes{.queries = 120, .keys = 120, .heads = 4, .kv_heads = 2},
                         Sizes{.queries = 97,
                         .keys = 97,
                         .heads = 1,
                         .value_dim = 5,
                         .layout = RopeLayout::interleaved,
                         .attention_factor = 1.2}}) {
    const Case<double> x(n);
    for (const Index w : {1, 16, 33, 400}) {
      for (const NearFarPosition& policy : policies(w)) {
        const Matrix<double> want = brute_force(x, policy);
        const auto check = [&](const char* name, const std::function<Index(Index)>& chunk) {
          CAPTURE(std::string(name));
          CAPTURE(w);
          CAPTURE(policy.leak);
          CAPTURE(policy.group);
          ReropeCache<double> cache = cache_for<double>(x, policy);
          CHECK(distance(steps(x, cache, 0, n.queries, chunk), want) < 1e-13);
          CHECK(cache.size() == n.queries);
        };
        check("one by one", constant(1));
        check("all at once", constant(n.queries));
        check("prompt, then one by one", [](Index t) { return Index{t == 0 ? 60 : 1}; });
        check("chunks around the switch", [](Index t) { return t % 19 + 1; });
        check("17", constant(17));
      }
    }
  }
}

TEST_CASE("float and bfloat16 caches") {
  const Case<float> x({.queries = 300, .keys = 300, .heads = 4, .kv_heads = 2});
  const NearFarPosition policy = rerope(64);
  ReropeCache<float> cache = cache_for<float>(x, policy);
  const Matrix<float> out =
      steps(x, cache, 0, 300, [](Index t) { return t == 0 ? 200 : t % 2 + 1; });
  CHECK(distance(out, brute_force(x, policy)) < 1e-5);
}

TEST_CASE("snapshot, truncation and continuation") {
  const Case<double> x({.queries = 90, .keys = 90});
  const NearFarPosition policy = leaky_rerope(20, 3);
  ReropeCache<double> cache = cache_for<double>(x, policy);
  const Matrix<double> want = steps(x, cache, 0, 90, constant(1));

  ReropeCache<double> other = cache_for<double>(x, policy);
  steps(x, other, 0, 60, constant(7));
  const ReropeCache<double> snapshot = other;
  CHECK(snapshot == other);
  const Matrix<double> tail = steps(x, other, 60, 72, constant(4));
  CHECK_FALSE(snapshot == other);
  CHECK(distance(tail, want.middleRows(60, 12)) < 1e-13);
  other.truncate(60);  // as after rejected speculative tokens
  CHECK(steps(x, other, 60, 72, constant(4)) == tail);
  CHECK_THROWS_WITH_AS(other.truncate(40),
                       doctest::Contains("needs the near key of 21, but the ring starts at 24"),
                       std::out_of_range);
  CHECK_THROWS_AS(other.truncate(73), std::out_of_range);
  CHECK_THROWS_AS(other.truncate(-1), std::out_of_range);
  CHECK(other.size() == 72);
  other.clear();
  CHECK(steps(x, other, 0, 90, constant(1)) == want);
  CHECK(other == cache);
}

TEST_CASE("memory: one set of keys and values that grows, one ring of near keys that does not") {
  const ReropeCache<float> cache(rerope(512), {.kv_heads = 2, .head_dim = 8, .capacity = 4096});
  CHECK(cache.bytes_per_token() == 2 * (8 + 8) * 4);
  // The ring: 511 + 16 tokens, rounded up to panels of 16.
  const std::size_t ring = 528 * 2 * 8 * 4;
  CHECK(cache.bytes() == 4096 * 2 * (8 + 16) * 4 + ring);  // value rows are padded to 16
}

TEST_CASE("steps allocate nothing once warm, and do not depend on the workers") {
  const Case<float> x({.queries = 200, .keys = 200, .heads = 4, .kv_heads = 4});
  for (const NearFarPosition& policy : {rerope(40), leaky_rerope(40, 2.5)}) {
    ReropeCache<float> cache = cache_for<float>(x, policy, 256);
    const auto rule = attention_rule(AnyMask(causal()), IdentityScore{}, policy);
    Matrix<float> out = x.empty_out();
    const auto step = [&](Index t, ExecutorRef executor) {
      rerope_attention_step(cache, x.q.middleRows(t, 1), x.k.middleRows(t, 1), x.v.middleRows(t, 1),
                            out.middleRows(t, 1), x.shape, x.table, rule, {}, executor);
    };
    for (Index t = 0; t < 50; ++t) step(t, {});
    if (AllocationCount::available) {
      const AllocationCount count;
      for (Index t = 50; t < 200; ++t) step(t, {});
      CHECK(count.calls() == 0);
    }
    cache.truncate(199);
    const Matrix<float> last = out.row(199);
    const thread_pool pool(3);
    step(199, pool);
    CHECK(out.row(199) == last);
  }
}

TEST_CASE("bad input throws, and neither cache nor out changes") {
  Case<double> x({.queries = 6, .keys = 6});
  NearFarPosition policy = rerope(3);
  ReropeCache<double> cache(
      policy, {.kv_heads = 1, .head_dim = 8, .value_dim = 6, .capacity = 10, .fixed = true});
  steps(x, cache, 0, 6, constant(2));
  const ReropeCache<double> before = cache;
  Matrix<double> out = Matrix<double>::Constant(6, 12, 7.0);
  AnyMask mask = causal();
  const auto step = [&] {
    rerope_attention_step(cache, x.q, x.k, x.v, out, x.shape, x.table,
                          attention_rule(mask, IdentityScore{}, policy));
  };
  const auto refuse = [&](const char* message) {
    CHECK_THROWS_WITH_AS(step(), doctest::Contains(message), std::invalid_argument);
    CHECK(cache == before);
    CHECK((out.array() == 7.0).all());
  };
  CHECK_THROWS_WITH_AS(step(), doctest::Contains("exceed the fixed capacity 10"),
                       std::length_error);
  CHECK(cache == before);
  policy = rerope(4);
  refuse("the rule's position policy (window 4) is not that of the cache (window 3)");
  policy = rerope(3);
  mask = full();
  refuse("must be causal");
  mask = causal();
  x.shape.query_offset = 6;
  refuse("query_offset (6) and key_offset (0) must be 0");
  x.shape.query_offset = 0;
  const Matrix<double> k = x.k;
  x.k = k.topRows(5);
  refuse("value is 6 x 6, expected 5 x 6");
  x.k = k;
  x.table = RotaryTable<double>(rope_frequencies(10), RopeLayout::half, 0);
  refuse("the table turns 10 channels, head_dim is 8");
  CHECK_THROWS_WITH_AS(ReropeCache<double>(policy, {.kv_heads = 1, .head_dim = 8, .window = 5}),
                       doctest::Contains("options.window (5) must be -1"), std::invalid_argument);
}
