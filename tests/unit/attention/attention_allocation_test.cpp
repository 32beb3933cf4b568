// Memory promises: steps allocate nothing once warm, the forward needs a few MB whatever the length.
#include "support/alloc_guard.hpp"

#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <memory>

namespace {

using namespace eigenblocks;

constexpr Index kHeads = 4, kKvHeads = 2, kDim = 8;
constexpr AttentionShape kShape{.heads = kHeads, .kv_heads = kKvHeads};

struct Tokens {
  Matrix<float> q, k, v, out;
  explicit Tokens(Index count) {
    Random random(1);
    q = normal_matrix<float>(random, count, kHeads * kDim);
    k = normal_matrix<float>(random, count, kKvHeads * kDim);
    v = normal_matrix<float>(random, count, kKvHeads * kDim);
    out.resize(count, kHeads * kDim);
  }
};

/// Allocations of 40 steps after a few to warm up.
template <class Rule>
long step_allocations(const KvCacheOptions& options, Index rows, const Rule& rule,
                      ExecutorRef executor = {}) {
  Tokens x(rows);
  KvCache<float> cache(options);
  const auto step = [&] {
    attention_step(cache, x.q, x.k, x.v, x.out, kShape, rule, {}, executor);
  };
  for (int i = 0; i < 3; ++i) step();
  const AllocationCount count;
  for (int i = 0; i < 40; ++i) step();
  return count.calls();
}

constexpr KvCacheOptions kGrowing{.kv_heads = kKvHeads, .head_dim = kDim, .capacity = 4096};
constexpr KvCacheOptions kRing{.kv_heads = kKvHeads, .head_dim = kDim, .window = 100, .chunk = 64};

}  // namespace

TEST_CASE("the counter counts: new, malloc through Eigen, aligned new") {
  if (!AllocationCount::available) return;
  const AllocationCount count;
  auto number = std::make_unique<int>(3);
  CHECK(count.calls() == 1);
  Vector<double> vector = Vector<double>::Zero(100);
  CHECK(count.calls() == 2);
  CHECK(count.bytes() >= 804);
  Workspace workspace;
  workspace.shared(1000);
  CHECK(count.calls() == 3);
  CHECK(*number + static_cast<int>(vector[99]) == 3);
}

TEST_CASE(
    "attention_step allocates nothing after warm-up: any chunk, growing with room or ring, serial "
    "or threads") {
  if (!AllocationCount::available) return;
  const auto causal_rule = attention_rule(causal());
  for (const KvCacheOptions& options : {kGrowing, kRing}) {
    for (const Index rows : {1, 5, 16, 17, 60}) {
      CAPTURE(rows);
      CHECK(step_allocations(options, rows, causal_rule) == 0);
    }
  }
  const thread_pool pool(3);
  CHECK(step_allocations(kGrowing, 1, causal_rule, pool) == 0);
  CHECK(step_allocations(kGrowing, 30, causal_rule, pool) == 0);
}

TEST_CASE("nor with a rule that owns memory, such as ALiBi slopes") {
  if (!AllocationCount::available) return;
  const auto rule = attention_rule(causal(), compose(soft_cap(30.0), alibi(alibi_slopes(kHeads))));
  CHECK(step_allocations(kGrowing, 1, rule) == 0);
  CHECK(step_allocations(kRing, 17, rule) == 0);
}

TEST_CASE("append allocates nothing while the capacity lasts; truncate and clear never do") {
  if (!AllocationCount::available) return;
  const Tokens x(10);
  KvCache<float> cache(kGrowing), ring(kRing);
  const AllocationCount count;
  for (int i = 0; i < 400; ++i) {
    cache.append(x.k, x.v);
    ring.append(x.k, x.v);
  }
  cache.truncate(17);
  cache.clear();
  CHECK(count.calls() == 0);
}

TEST_CASE("a forward call with a workspace of the right size allocates nothing") {
  if (!AllocationCount::available) return;
  Tokens x(100);
  Matrix<float> lse(100, kHeads);
  Workspace workspace;
  const auto rule = attention_rule(causal());
  const auto run = [&] {
    detail::attention_forward_into(x.q, x.k, x.v, x.out, lse, kShape, rule, {}, serial, workspace);
  };
  run();
  const AllocationCount count;
  run();
  CHECK(count.calls() == 0);
}

TEST_CASE("memory of a forward over 16384 tokens, 2 heads of 64: operands and a few MB") {
  constexpr Index kTokens = 16384;
  const AttentionShape shape{.heads = 2};
  Matrix<float> q = Matrix<float>::Constant(kTokens, 2 * 64, 0.1f), out(kTokens, 2 * 64),
                lse(kTokens, 2);
  Workspace workspace;
  // Scratch depends on the shapes alone; a window keeps the sanitizer build fast.
  const auto rule = attention_rule(causal() & window_left(20));
  detail::attention_forward_into(q, q, q, out, lse, shape, rule, {}, serial, workspace);
  MESSAGE("scratch of the forward: ", workspace.bytes() / 1024, " KB");
  CHECK(workspace.bytes() < 8u << 20);
  CHECK(out(kTokens - 1, 0) == doctest::Approx(0.1));
  if (!AllocationCount::available) return;
  const AllocationCount count;
  const auto saved = attention_forward(q, q, q, out, shape, rule);
  CHECK(count.bytes() < (8l << 20) + 16384 * 2 * 4);  // the log-sum-exp and the scratch
}
