// First tokens and a rolling window: the full pass under causal() & (prefix(n) | window_left(w)), in constant memory.
#include <eigenblocks/attention/sink_cache.hpp>

#include "unit/attention/decode_case.hpp"

#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/position/rope.hpp>

#include <cmath>

#include "support/alloc_guard.hpp"

namespace {

using namespace attention_test;

const auto kCausal = eb::attention_rule(AnyMask(eb::causal()));

ProblemOptions self(Index tokens) {
  return {.queries = tokens, .keys = tokens, .heads = 4, .kv_heads = 2, .dim = 6, .value_dim = 5};
}
AnyMask kept(Index sinks, Index window) {
  return eb::causal() & (eb::prefix(sinks) | eb::window_left(window));
}

/// Rows of sink attention as the paper's code computes them: keys stored as they come, and at every step all of them turned at
/// their places in the cache.  One head, scale 1.
Matrix<double> streaming_llm(const Matrix<double>& q, const Matrix<double>& k,
                             const Matrix<double>& v, Index sinks, Index window,
                             const eb::RotaryTable<double>& table) {
  Matrix<double> out(q.rows(), v.cols());
  for (Index i = 0; i < q.rows(); ++i) {
    std::vector<Index> rows;
    for (Index j = 0; j <= i; ++j) {
      if (j < sinks || j >= i - window) rows.push_back(j);
    }
    const Index count = static_cast<Index>(rows.size());
    Matrix<double> keys(count, k.cols());
    for (Index x = 0; x < count; ++x) keys.row(x) = k.row(rows[static_cast<std::size_t>(x)]);
    keys = eb::rope(keys, 0, table, {.heads = 1});
    const Matrix<double> query = eb::rope(Matrix<double>(q.row(i)), count - 1, table, {.heads = 1});
    Vector<double> p(count);
    for (Index x = 0; x < count; ++x) p[x] = keys.row(x).dot(query.row(0));
    p = (p.array() - p.maxCoeff()).exp();
    p /= p.sum();
    out.row(i).setZero();
    for (Index x = 0; x < count; ++x) out.row(i) += p[x] * v.row(rows[static_cast<std::size_t>(x)]);
  }
  return out;
}

}  // namespace

TEST_CASE("every chunking equals the full pass under the mask") {
  ProblemOptions o = self(150);
  o.sinks = o.row_scale = true;  // sink logits besides
  const Problem p(o);
  for (const auto& sizes :
       {std::pair<Index, Index>{1, 0}, {4, 11}, {16, 33}, {20, 5}, {50, 16}, {200, 20}}) {
    const Index sinks = sizes.first, window = sizes.second;
    CAPTURE(sinks);
    CAPTURE(window);
    const Outcome<double> want = oracle(p, {kept(sinks, window)});
    const Bounds bounds(p, want, std::numeric_limits<double>::epsilon());
    for (const Index ring_chunk : {1, 20, 64}) {
      for (const Chunking& c : chunkings(150)) {
        CAPTURE(c.name);
        eb::KvCache<double> cache(
            cache_options(p, {.window = window, .chunk = ring_chunk, .sinks = sinks}));
        CHECK(difference(step_through<double>(p, cache, kCausal, c.chunk), want.out) <= bounds.out);
      }
    }
  }
}

TEST_CASE("positions past several splits of 1024, and the rule's own window") {
  const Problem p(self(1500));
  eb::KvCache<double> cache(cache_options(p, {.window = 1050, .chunk = 350, .sinks = 3}));
  const auto chunk = [](Index t) { return t < 1200 ? Index{300} : t < 1470 ? 30 : 1; };
  const Outcome<double> want = oracle(p, {kept(3, 1050)});
  CHECK(difference(step_through<double>(p, cache, kCausal, chunk), want.out) < 1e-13);
  CHECK(cache.first() == 1500 - cache.ring_slots());

  // window_left in the rule hides sinks again: it is the rule's mask AND what the cache keeps.
  const Problem small(self(90));
  eb::KvCache<double> narrow(cache_options(small, {.window = 20, .chunk = 5, .sinks = 4}));
  CHECK(difference(
            step_through<double>(small, narrow,
                                 eb::attention_rule(AnyMask(eb::causal() & eb::window_left(7))),
                                 [](Index) { return Index{3}; }),
            oracle(small, {AnyMask(eb::causal() & eb::window_left(7))}).out) < 1e-13);
}

TEST_CASE("over the cache: rows and log-sum-exp, the same bits for every executor") {
  const Problem p(self(1400));
  eb::KvCache<double> cache(cache_options(p, {.window = 1100, .chunk = 64, .sinks = 5}));
  cache.append(p.k, p.v);
  const Outcome<double> want = oracle(p, {kept(5, 1100)});
  for (const Index rows : {1, 16, 40}) {
    Matrix<double> out(rows, 20), lse(rows, 4), again(rows, 20);
    eb::attention_over_cache(cache, p.q.bottomRows(rows), out, p.shape, kCausal, {}, &lse);
    CHECK(difference(out, want.out.bottomRows(rows)) < 1e-13);
    CHECK(difference(lse, want.lse.bottomRows(rows)) < 1e-12);
    for (const int workers : {2, 3, 7}) {
      const eb::thread_pool pool(workers);
      eb::attention_over_cache(cache, p.q.bottomRows(rows), again, p.shape, kCausal, {}, nullptr,
                               pool);
      CHECK(again == out);
    }
  }
}

TEST_CASE("while the ring still reaches the sinks every row may ask again") {
  const Problem p(self(45));
  eb::KvCache<double> cache(cache_options(p, {.window = 20, .chunk = 12, .sinks = 20}));
  cache.append(p.k, p.v);
  CHECK(cache.first() == 13);
  CHECK(cache.keys(0, 45) == p.k);
  for (const Index rows : {5, 45}) {
    Matrix<double> out(rows, 20);
    eb::attention_over_cache(cache, p.q.bottomRows(rows), out, p.shape, kCausal);
    CHECK(difference(out, oracle(p, {kept(20, 20)}).out.bottomRows(rows)) < 1e-13);
  }
}

TEST_CASE("constant memory, nothing allocated; sinks and window read back") {
  const Problem p(self(400));
  eb::KvCache<double> cache(cache_options(p, {.window = 20, .chunk = 12, .sinks = 5}));
  const std::size_t bytes = cache.bytes();
  CHECK(cache.bytes_per_token() == 2 * (6 + 5) * 8);
  CHECK(bytes == (16u + 32u) * 2 * (6 + 16) * 8);
  CHECK(cache.capacity() == 5 + 32);
  Matrix<double> out(3, 20);
  const auto step = [&](Index t) {
    eb::attention_step(cache, p.q.middleRows(t, 3), p.k.middleRows(t, 3), p.v.middleRows(t, 3), out,
                       p.shape, kCausal);
  };
  for (Index t = 0; t < 60; t += 3) step(t);
  const AllocationCount count;
  for (Index t = 60; t < 390; t += 3) step(t);
  if (AllocationCount::available) CHECK(count.calls() == 0);
  CHECK(cache.bytes() == bytes);
  CHECK(cache.size() == 390);
  CHECK(cache.first() == 390 - 32);
  CHECK(cache.keys(0, 5) == p.k.topRows(5));
  CHECK(cache.values(2, 4) == p.v.middleRows(2, 2));
  CHECK(cache.keys(358, 390) == p.k.middleRows(358, 32));
  CHECK(cache.values(370, 371) == p.v.row(370));
  const eb::KvCache<double> copy = cache;
  CHECK(copy == cache);
  cache.append(p.k.topRows(400 - 390), p.v.topRows(400 - 390));
  CHECK_FALSE(copy == cache);
  // All at once, more than sinks and ring hold: the sinks stay.
  eb::KvCache<double> whole(cache_options(p, {.window = 20, .chunk = 12, .sinks = 5})),
      other = whole;
  whole.append(p.k, p.v);
  CHECK(whole.keys(0, 5) == p.k.topRows(5));
  CHECK(whole.keys(368, 400) == p.k.bottomRows(32));
  Matrix<double> k = p.k;
  k(2, 3) += 1;  // a sink
  other.append(k, p.v);
  CHECK_FALSE(whole == other);
}

TEST_CASE("roll back: the same bits afterwards, or a clear refusal") {
  const Problem p(self(80));
  const eb::KvCacheOptions options = cache_options(p, {.window = 9, .chunk = 12, .sinks = 4});
  const std::function<Index(Index)> one = [](Index) { return Index{1}; };
  eb::KvCache<double> straight(options), cache(options);
  const Matrix<double> want = step_through<double>(p, straight, kCausal, one);
  Matrix<double> out(80, 20), drafts(5, 20);
  for (Index t = 0; t < 80; ++t) {
    if (t % 7 == 3 && t + 5 <= 80) {
      eb::attention_step(cache, p.q.topRows(5), p.k.topRows(5), p.v.topRows(5), drafts, p.shape,
                         kCausal);
      cache.truncate(t);
    }
    eb::attention_step(cache, p.q.middleRows(t, 1), p.k.middleRows(t, 1), p.v.middleRows(t, 1),
                       out.middleRows(t, 1), p.shape, kCausal);
  }
  CHECK(out == want);
  // Ring of 32 slots: after 80 tokens it starts at 48.
  const eb::KvCache<double> before = cache;
  CHECK_THROWS_WITH_AS(cache.truncate(56),
                       "eigenblocks: KvCache: truncate(56) needs position 47, but the ring starts "
                       "at 48",
                       std::out_of_range);
  CHECK_THROWS_WITH_AS(cache.truncate(5),
                       "eigenblocks: KvCache: truncate(5) needs position 4, but the ring starts at "
                       "48",
                       std::out_of_range);
  CHECK_THROWS_WITH_AS(cache.truncate(81), "eigenblocks: KvCache: truncate(81) is outside [0, 80]",
                       std::out_of_range);
  CHECK(cache == before);
  cache.truncate(57);
  CHECK(cache.size() == 57);
  // Among the sinks everything is there: as if only three tokens had come.
  cache.truncate(3);
  eb::KvCache<double> three(options);
  three.append(p.k.topRows(3), p.v.topRows(3));
  for (Index t = 3; t < 80; ++t) {
    eb::attention_step(cache, p.q.middleRows(t, 1), p.k.middleRows(t, 1), p.v.middleRows(t, 1),
                       out.middleRows(t, 1), p.shape, kCausal);
  }
  CHECK(out.bottomRows(77) == want.bottomRows(77));
}

TEST_CASE(
    "positions inside the cache: a second query for the sinks is the paper's cache, turned anew at "
    "every step") {
  ProblemOptions o = self(70);
  o.heads = o.kv_heads = 1;
  o.scale = 1.0;
  const Problem p(o);
  const eb::RotaryTable<double> table(eb::rope_frequencies(6), eb::RopeLayout::half);
  const eb::RopeOptions one{.heads = 1};
  for (const auto& sizes : {std::pair<Index, Index>{4, 11}, {1, 0}, {20, 7}}) {
    const Index sinks = sizes.first, window = sizes.second;
    const Matrix<double> want = streaming_llm(p.q, p.k, p.v, sinks, window, table);
    for (const Index chunk : {1, 5, 40}) {
      eb::KvCache<double> cache(cache_options(p, {.window = window, .chunk = 24, .sinks = sinks}));
      Matrix<double> out(70, 5);
      for (Index t = 0; t < 70;) {
        const Index n = std::min(chunk, 70 - t);
        const Matrix<double> x = p.q.middleRows(t, n), y = p.k.middleRows(t, n);
        std::vector<double> at(static_cast<std::size_t>(n));
        eb::sink_query_positions(cache.options(), cache.size(), at);
        eb::sink_attention_step(cache, eb::rope(x, t, table, one), eb::rope(x, at, table, one),
                                eb::rope(y, t, table, one), p.v.middleRows(t, n),
                                out.middleRows(t, n), p.shape, kCausal);
        t += n;
      }
      CHECK(difference(out, want) < 1e-13);
    }
  }
}

TEST_CASE("errors") {
  const auto make = [](const eb::KvCacheOptions& o) { return eb::KvCache<double>(o); };
  CHECK_THROWS_WITH_AS(make({.window = 4, .sinks = -1}),
                       "eigenblocks: KvCache: sinks (-1) must not be negative",
                       eb::invalid_argument);
  CHECK_THROWS_WITH_AS(make({.sinks = 4}),
                       "eigenblocks: KvCache: sinks need a window: without one every token stays",
                       eb::invalid_argument);
  const Problem p(self(60));
  eb::KvCache<double> cache(cache_options(p, {.window = 9, .chunk = 12, .sinks = 4}));
  cache.append(p.k, p.v);
  const eb::KvCache<double> before = cache;
  CHECK_THROWS_WITH_AS(cache.keys(3, 30),
                       "eigenblocks: KvCache: positions [3, 30) are not within the stored [28, 60) "
                       "or among the sinks",
                       std::out_of_range);
  Matrix<double> out = Matrix<double>::Constant(2, 20, 5.0), many(24, 20);
  const Matrix<double> q = p.q.topRows(2), wide(2, 23), k = p.k.topRows(2), v = p.v.topRows(2);
  CHECK_THROWS_WITH_AS(eb::sink_attention_step(cache, q, wide, k, v, out, p.shape, kCausal),
                       "eigenblocks: sink_query is 2 x 23, expected 2 x 24 (shape of query)",
                       eb::invalid_argument);
  CHECK_THROWS_WITH_AS(
      eb::attention_over_cache(cache, p.q.topRows(24), many, p.shape, kCausal),
      "eigenblocks: query has 24 rows, but the ring holds the whole window of the last 23 only",
      eb::invalid_argument);
  eb::KvCache<double> plain(cache_options(p, {.window = 9}));
  CHECK_THROWS_WITH_AS(eb::sink_attention_step(plain, q, q, k, v, out, p.shape, kCausal),
                       "eigenblocks: sink_attention_step: the cache has no sinks",
                       eb::invalid_argument);
  CHECK(cache == before);
  CHECK(plain.size() == 0);
  CHECK((out.array() == 5.0).all());
}
