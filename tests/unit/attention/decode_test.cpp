// Attention over a cache: every chunking is the full causal pass, in both paths (few rows, tiles) and over many splits.
#include "unit/attention/decode_case.hpp"

#include <eigenblocks/core/thread_pool.hpp>

#include <string>

namespace {

using namespace attention_test;

const eb::CausalRule kCausal = eb::attention_rule(eb::causal());

ProblemOptions self(Index tokens, Index heads, Index kv_heads, Index dim = 5, Index value_dim = 7) {
  return {.queries = tokens,
          .keys = tokens,
          .heads = heads,
          .kv_heads = kv_heads,
          .dim = dim,
          .value_dim = value_dim};
}

const std::function<Index(Index)> kOne = [](Index) { return Index{1}; };

}  // namespace

TEST_CASE("every chunking equals the full causal pass: groups of every size, odd widths") {
  for (const auto& heads :
       {std::pair<Index, Index>{1, 1}, {2, 1}, {6, 2}, {4, 1}, {7, 1}, {4, 4}}) {
    CAPTURE(heads.first);
    check_decode<double>(Problem(self(75, heads.first, heads.second)), kCausal, {eb::causal()});
  }
  check_decode<double>(Problem(self(40, 2, 1, 1, 1)), kCausal, {eb::causal()});
  check_decode<double>(Problem(self(40, 2, 1, 16, 33)), kCausal, {eb::causal()});
}

TEST_CASE("sinks and per-row scales, cut with the chunks") {
  ProblemOptions o = self(75, 4, 2);
  o.sinks = o.row_scale = true;
  check_decode<double>(Problem(o), kCausal, {eb::causal()});
  check_decode<double>(Problem(o), kCausal, {eb::causal()}, {.window = 20, .chunk = 3});
}

TEST_CASE("more keys than one split of 1024") {
  const Problem p(self(2100, 2, 1, 3, 2));
  const Outcome<double> want = oracle(p, {eb::causal()});
  const Bounds bounds(p, want, std::numeric_limits<double>::epsilon());
  for (const Index chunk : {1, 13, 700}) {
    // `chunk` rows at a time where a split begins, and large pieces between.
    const auto rows = [chunk](Index t) {
      return t == 0 ? 1000 : t >= 1040 && t < 2030 ? std::max<Index>(2030 - t, chunk) : chunk;
    };
    eb::KvCache<double> cache(cache_options(p));
    const Matrix<double> out = step_through<double>(p, cache, kCausal, rows);
    CHECK(difference(out, want.out) <= bounds.out);
  }
}

TEST_CASE("ring windows of every size, wrapping many times") {
  for (const Index window : {0, 1, 15, 16, 33, 100}) {
    for (const Index chunk : {1, 5, 64}) {
      CAPTURE(window);
      CAPTURE(chunk);
      check_decode<double>(Problem(self(150, 4, 2)), kCausal, {eb::causal()},
                           {.window = window, .chunk = chunk});
    }
  }
}

TEST_CASE("a ring gives the same rows as a growing cache under the same window") {
  const Problem p(self(130, 2, 2));
  const auto rule = eb::attention_rule(AnyMask(eb::causal() & eb::window_left(25)));
  eb::KvCache<double> whole(cache_options(p)), ring(cache_options(p, {.window = 25, .chunk = 8}));
  CHECK(difference(step_through<double>(p, ring, kCausal, kOne),
                   step_through<double>(p, whole, rule, kOne)) < 1e-14);
}

TEST_CASE("over the cache: the last rows ask again, with their log-sum-exp") {
  const Problem p(self(90, 4, 2));
  const Outcome<double> want = oracle(p, {eb::causal()});
  const Bounds bounds(p, want, std::numeric_limits<double>::epsilon());
  eb::KvCache<double> cache(cache_options(p));
  cache.append(p.k, p.v);
  for (const Index rows : {0, 1, 5, 16, 17, 90}) {
    Matrix<double> out(rows, want.out.cols()), lse(rows, 4);
    eb::attention_over_cache(cache, p.q.bottomRows(rows), out, p.shape, kCausal, {}, &lse);
    CHECK(difference(out, want.out.bottomRows(rows)) <= bounds.out);
    CHECK(difference(lse, want.lse.bottomRows(rows)) <= bounds.lse);
    Matrix<double> again(rows, want.out.cols());
    eb::attention_over_cache(cache, p.q.bottomRows(rows), again,
                             p.shape);  // the default rule is causal
    CHECK(again == out);
  }
}

TEST_CASE("the same bits for every executor, in both paths and over several splits") {
  ProblemOptions o = self(2100, 4, 2, 4, 4);
  o.sinks = true;
  const Problem p(o);
  eb::KvCache<double> cache(cache_options(p));
  cache.append(p.k, p.v);
  const eb::AttentionTensors<double> tensors{.sinks = &p.sinks};
  for (const Index rows : {1, 16, 40}) {
    Matrix<double> want(rows, p.dout.cols()), want_lse(rows, 4);
    eb::attention_over_cache(cache, p.q.bottomRows(rows), want, p.shape, kCausal, tensors,
                             &want_lse);
    for (const int workers : {1, 2, 3, 7}) {
      const eb::thread_pool pool(workers);
      Matrix<double> out(rows, p.dout.cols()), lse(rows, 4);
      eb::attention_over_cache(cache, p.q.bottomRows(rows), out, p.shape, kCausal, tensors, &lse,
                               pool);
      CHECK(out == want);
      CHECK(lse == want_lse);
    }
  }
  // and step by step
  const Problem small(self(40, 4, 2));
  eb::KvCache<double> a(cache_options(small)), b = a;
  const eb::thread_pool pool(3);
  const auto chunk = [](Index t) { return t % 19 + 1; };
  CHECK(step_through<double>(small, a, kCausal, chunk, pool) ==
        step_through<double>(small, b, kCausal, chunk));
}

TEST_CASE("growing, reserved and fixed caches give the same bits") {
  const Problem p(self(70, 2, 1));
  eb::KvCache<double> growing(cache_options(p)), reserved(cache_options(p, {.capacity = 500})),
      fixed(cache_options(p, {.capacity = 70, .fixed = true}));
  const Matrix<double> want = step_through<double>(p, growing, kCausal, kOne);
  CHECK(step_through<double>(p, reserved, kCausal, kOne) == want);
  CHECK(step_through<double>(p, fixed, kCausal, kOne) == want);
}

TEST_CASE("roll back after speculation and snapshots: the same bits as without") {
  const Problem p(self(60, 2, 1));
  for (const eb::KvCacheOptions& options :
       {eb::KvCacheOptions{}, eb::KvCacheOptions{.window = 9, .chunk = 12}}) {
    eb::KvCache<double> straight(cache_options(p, options));
    const Matrix<double> want = step_through<double>(p, straight, kCausal, kOne);
    eb::KvCache<double> cache(cache_options(p, options));
    Matrix<double> out(60, p.dout.cols()), drafts(5, p.dout.cols());
    for (Index t = 0; t < 60; ++t) {
      if (t % 7 == 3 && t + 5 <= 60) {  // guess five tokens, take them back
        const eb::KvCache<double> snapshot = cache;
        eb::attention_step(cache, p.q.topRows(5), p.k.topRows(5), p.v.topRows(5), drafts, p.shape);
        if (t % 2) {
          cache.truncate(t);
        } else {
          cache = snapshot;
        }
      }
      eb::attention_step(cache, p.q.middleRows(t, 1), p.k.middleRows(t, 1), p.v.middleRows(t, 1),
                         out.middleRows(t, 1), p.shape);
    }
    CHECK(out == want);
    CHECK(cache.size() == straight.size());
  }
}

TEST_CASE("a full fixed cache throws and changes nothing") {
  const Problem p(self(12, 2, 1));
  eb::KvCache<double> cache(cache_options(p, {.capacity = 10, .fixed = true}));
  Matrix<double> out = Matrix<double>::Constant(12, p.dout.cols(), 7.0);
  eb::attention_step(cache, p.q.topRows(9), p.k.topRows(9), p.v.topRows(9), out.topRows(9),
                     p.shape);
  const eb::KvCache<double> before = cache;
  const Matrix<double> out_before = out;
  CHECK_THROWS_WITH_AS(eb::attention_step(cache, p.q.topRows(2), p.k.topRows(2), p.v.topRows(2),
                                          out.topRows(2), p.shape),
                       "eigenblocks: KvCache: 9 tokens and 2 more exceed the fixed capacity 10",
                       std::length_error);
  CHECK(cache == before);
  CHECK(out == out_before);
  eb::attention_step(cache, p.q.topRows(1), p.k.topRows(1), p.v.topRows(1), out.topRows(1),
                     p.shape);
  CHECK(cache.size() == 10);
}

TEST_CASE("NaN that was truncated, lies outside the window or in padding does not leak") {
  const Problem p(self(50, 2, 1));
  const Matrix<double> nan_k = Matrix<double>::Constant(20, 5, std::nan("")),
                       nan_v = Matrix<double>::Constant(20, 7, std::nan(""));
  for (const eb::KvCacheOptions& options :
       {eb::KvCacheOptions{}, eb::KvCacheOptions{.window = 6, .chunk = 26}}) {
    eb::KvCache<double> clean(cache_options(p, options)), cache = clean;
    for (const Index chunk : {1, 3, 20}) {
      clean.clear();
      cache.clear();
      cache.append(nan_k, nan_v);
      cache.truncate(0);
      const auto chunks = [chunk](Index) { return chunk; };
      CHECK(step_through<double>(p, cache, kCausal, chunks) ==
            step_through<double>(p, clean, kCausal, chunks));
    }
  }
  // Keys before the window of a growing cache, in the same panel as visible ones.
  const auto window = eb::attention_rule(AnyMask(eb::causal() & eb::window_left(9)));
  eb::KvCache<double> cache(cache_options(p)), clean = cache;
  cache.append(nan_k, nan_v);
  cache.append(p.k, p.v);
  clean.append(Matrix<double>(Matrix<double>::Zero(20, 5)),
               Matrix<double>(Matrix<double>::Zero(20, 7)));
  clean.append(p.k, p.v);
  Matrix<double> got(1, 14), want(1, 14);
  eb::attention_over_cache(cache, p.q.topRows(1), got, p.shape, window);
  eb::attention_over_cache(clean, p.q.topRows(1), want, p.shape, window);
  CHECK(got == want);
  CHECK(got.allFinite());
}

TEST_CASE("NaN in what is seen shows, in the output and in the log-sum-exp") {
  const Problem p(self(1030, 2, 1, 3, 4));
  const auto run = [&](const Matrix<double>& q, const Matrix<double>& k, Index tokens, Index rows) {
    eb::KvCache<double> cache(cache_options(p));
    cache.append(k.topRows(tokens), p.v.topRows(tokens));
    Matrix<double> out(rows, 8), lse(rows, 2);
    eb::attention_over_cache(cache, q.middleRows(tokens - rows, rows), out, p.shape, kCausal, {},
                             &lse);
    return std::pair<Matrix<double>, Matrix<double>>{out, lse};
  };
  for (const Index rows : {1, 20}) {
    for (const Index tokens : {30, 1025, 1030}) {  // the second split holds one key, or six
      Matrix<double> k = p.k, q = p.q;
      k.row(tokens - 1).setConstant(std::nan(""));
      const auto key = run(p.q, k, tokens, rows);
      CHECK(std::isnan(key.first(rows - 1, 0)));
      CHECK(std::isnan(key.first(rows - 1, 7)));
      CHECK(std::isnan(key.second(rows - 1, 0)));
      if (rows > 1) CHECK(key.second.topRows(rows - 1).allFinite());
      q(tokens - 1, 0) = std::nan("");  // head 0 only
      const auto query = run(q, p.k, tokens, rows);
      CHECK(query.first.row(rows - 1).head(4).array().isNaN().all());
      CHECK(query.first.row(rows - 1).tail(4).allFinite());
      CHECK(std::isnan(query.second(rows - 1, 0)));
      CHECK(std::isfinite(query.second(rows - 1, 1)));
    }
  }
}

TEST_CASE("huge scores, and rows whose rule shows them nothing") {
  Problem p(self(40, 2, 1));
  p.q *= 300.0;
  p.k *= 300.0;
  check_decode<double>(p, kCausal, {eb::causal()});
  const auto nobody = [](Index i, Index) { return i % 3 == 0; };
  Problem dead(self(40, 2, 1));
  const Outcome<double> want = oracle(dead, {AnyMask(eb::causal() & nobody)});
  for (const Index chunk : {1, 40}) {
    eb::KvCache<double> cache(cache_options(dead));
    const Matrix<double> out =
        step_through<double>(dead, cache, eb::attention_rule(AnyMask(eb::causal() & nobody)),
                             [chunk](Index) { return chunk; });
    CHECK(difference(out, want.out) < 1e-13);
    CHECK((out.row(4).array() == 0.0).all());
  }
}

TEST_CASE("calls that do not fit are refused with the numbers; neither cache nor output changes") {
  const Problem p(self(30, 4, 2, 3, 2));
  eb::KvCache<double> cache(cache_options(p));
  cache.append(p.k.topRows(20), p.v.topRows(20));
  const eb::KvCache<double> before = cache;
  Matrix<double> out = Matrix<double>::Constant(2, 8, 5.0);
  const Matrix<double> q = p.q.topRows(2), k = p.k.topRows(2), v = p.v.topRows(2);
  const auto refuse = [&](auto&& call, const std::string& text) {
    CHECK_THROWS_WITH_AS(call(), ("eigenblocks: " + text).c_str(), eb::invalid_argument);
    CHECK(cache == before);
    CHECK((out.array() == 5.0).all());
  };
  using Tensors = eb::AttentionTensors<double>;
  const auto step = [&](const Matrix<double>& query, const Matrix<double>& key,
                        const Matrix<double>& value, Matrix<double>& result,
                        const eb::AttentionShape& shape, const Tensors& tensors = {}) {
    return [&, shape, tensors] {
      eb::attention_step(cache, query, key, value, result, shape, kCausal, tensors);
    };
  };
  Matrix<double> narrow(2, 7), few(1, 8);
  refuse(step(q, k, v, out, {.heads = 3}), "kv_heads (3) differs from the cache's (2)");
  refuse(step(q, k, v, out, {.heads = 5, .kv_heads = 2}),
         "query is 2 x 12, expected 2 x 15 (cols = heads * head_dim of the cache)");
  refuse(step(narrow, k, v, out, p.shape),
         "query is 2 x 7, expected 2 x 12 (cols = heads * head_dim of the cache)");
  refuse(step(q, k, v, narrow, p.shape),
         "out is 2 x 7, expected 2 x 8 (queries x heads * value_dim)");
  refuse(step(q, v, v, out, p.shape),
         "key is 2 x 4, expected 2 x 6 (cols = kv_heads * head_dim of the cache)");
  refuse(step(q, k, k, out, p.shape),
         "value is 2 x 6, expected 2 x 4 (rows of key, cols = kv_heads * value_dim of the cache)");
  const Matrix<double> one_k = k.topRows(1), one_v = v.topRows(1);
  refuse(step(q, one_k, one_v, out, p.shape),
         "key is 1 x 6, expected 2 x 6 (one row per query row)");
  eb::AttentionShape shifted = p.shape;
  shifted.query_offset = 3;
  refuse(step(q, k, v, out, shifted),
         "query_offset (3) and key_offset (0) must be 0: the cache knows the positions");
  const Matrix<double> bias(2, 22);
  const eb::BoolMatrix keep(2, 22);
  refuse(step(q, k, v, out, p.shape, {.bias = &bias}),
         "bias and mask tensors have no place over a cache; express them in the rule");
  refuse(step(q, k, v, out, p.shape, {.mask = &keep}),
         "bias and mask tensors have no place over a cache; express them in the rule");
  const Vector<double> three(3);
  refuse(step(q, k, v, out, p.shape, {.row_scale = &three}),
         "row_scale has 3 entries, expected 2 (one per query row)");
  refuse(step(q, k, v, out, p.shape, {.sinks = &three}),
         "sinks has 3 entries, expected 4 (one per query head)");

  Matrix<double> many(21, 8), lse(2, 3);
  refuse([&] { eb::attention_over_cache(cache, p.q.topRows(21), many, p.shape); },
         "query has 21 rows, but the cache holds only 20 positions");
  refuse([&] { eb::attention_over_cache(cache, q, out, p.shape, kCausal, {}, &lse); },
         "lse is 2 x 3, expected 2 x 4 (queries x heads)");

  // A ring has forgotten what the earlier of too many rows would need.
  eb::KvCache<double> ring(cache_options(p, {.window = 10, .chunk = 6}));
  ring.append(p.k, p.v);
  Matrix<double> seven(7, 8), six(6, 8);
  CHECK_THROWS_WITH_AS(
      eb::attention_over_cache(ring, p.q.bottomRows(7), seven, p.shape),
      "eigenblocks: query has 7 rows, but the ring holds the whole window of the last 6 only",
      eb::invalid_argument);
  eb::attention_over_cache(ring, p.q.bottomRows(6), six, p.shape);
  CHECK(difference(six, cache_oracle(p, {eb::causal()}, 10).out.bottomRows(6)) < 1e-13);
}
