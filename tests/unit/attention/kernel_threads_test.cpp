// Results are the same bits for every executor and every number of workers.
#include "support/attention_case.hpp"

#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

namespace {

using namespace attention_test;

/// Hands tasks out backwards, to workers in turn: an order no pool would choose.
struct BackwardExecutor {
  int workers() const { return 5; }
  void run(Index tasks, eb::TaskRef task) const {
    for (Index i = tasks; i-- > 0;) task(i, static_cast<int>(i % 5));
  }
};

template <class S>
void check_executors(const ProblemOptions& options, const AnyRule& rule,
                     const eb::detail::TileTuning& tuning = {}) {
  const Problem p(options);
  const Outcome<S> want = tiled<S>(p, rule, {.tuning = tuning});
  for (const int workers : {1, 2, 3, 7}) {
    CAPTURE(workers);
    const eb::thread_pool pool(workers);
    CHECK(tiled<S>(p, rule, {.tuning = tuning, .executor = pool}) == want);
  }
  CHECK(tiled<S>(p, rule, {.tuning = tuning, .executor = BackwardExecutor{}}) == want);
}

constexpr ProblemOptions kMedium{.queries = 150,
                                 .keys = 210,
                                 .heads = 4,
                                 .kv_heads = 2,
                                 .query_offset = 60,
                                 .keep = true,
                                 .row_scale = true,
                                 .sinks = true,
                                 .upstream_lse = true};

}  // namespace

TEST_CASE("fewer than four kv heads: the backward is cut into sets of key blocks") {
  for (const Index kv_heads : {1, 2}) {
    ProblemOptions o = kMedium;
    o.kv_heads = kv_heads;
    check_executors<double>(o, {eb::causal()});
    check_executors<float>(o, {eb::causal() & eb::window_left(40), eb::soft_cap(2.0)});
    o.bias = true;
    check_executors<double>(o, {eb::causal()});
  }
}

TEST_CASE("four kv heads and more: one task each") {
  ProblemOptions o = kMedium;
  o.heads = 8;
  o.kv_heads = 4;
  check_executors<double>(o, {eb::causal()});
  check_executors<float>(
      o, {AnyMask([](Index i, Index j) { return (i + j) % 3 != 0; }), eb::soft_cap(2.0)});
}

TEST_CASE("a bias shared by the heads, whose gradient all of them add to") {
  for (const Index kv_heads : {1, 4}) {
    ProblemOptions o = kMedium;
    o.kv_heads = kv_heads;
    o.shared_bias = true;
    check_executors<double>(o, {eb::causal()});
  }
}

TEST_CASE("several key chunks and batches of kv heads") {
  ProblemOptions o = kMedium;
  o.heads = o.kv_heads = 6;
  check_executors<float>(o, {eb::causal()},
                         {.key_block = 16, .query_tiles = 1, .packed_scalars = 500});
}

TEST_CASE("small and empty problems") {
  for (const Index queries : {0, 1, 3}) {
    for (const Index keys : {0, 1, 5}) {
      check_executors<double>({.queries = queries, .keys = keys, .heads = 4, .sinks = true},
                              {eb::causal()});
    }
  }
}
