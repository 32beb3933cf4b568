// 8-bit codes: the rounding bound, attention over the codes as over the de-quantised rows, the bound of the output.
#include "unit/attention/decode_case.hpp"

#include <eigenblocks/attention/quantized_cache.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <cmath>
#include <string>

#include "support/alloc_guard.hpp"

namespace {

using namespace attention_test;
using eb::QuantizedKvCache;

const auto kCausal = eb::attention_rule(AnyMask(eb::causal()));

eb::KvCacheOptions options(eb::KvCacheOptions o = {}) {
  o.kv_heads = 2;
  o.head_dim = 7;
  o.value_dim = 5;
  return o;
}
Problem problem(Index tokens, bool extras = false) {
  return Problem({.queries = tokens,
                  .keys = tokens,
                  .heads = 4,
                  .kv_heads = 2,
                  .dim = 7,
                  .value_dim = 5,
                  .row_scale = extras,
                  .sinks = extras});
}

/// All rows, `chunk(t)` at a time.
Matrix<double> run(const Problem& p, QuantizedKvCache& cache,
                   const std::function<Index(Index)>& chunk, eb::ExecutorRef executor = {}) {
  Matrix<double> out = Matrix<double>::Constant(p.dout.rows(), p.dout.cols(), std::nan(""));
  for (Index t = 0; t < p.q.rows();) {
    const Index n = std::min(chunk(t), p.q.rows() - t);
    const Vector<double> row_scale = p.row_scale.segment(t, n);
    const eb::AttentionTensors<double> tensors{
        .row_scale = p.options.row_scale ? &row_scale : nullptr,
        .sinks = p.options.sinks ? &p.sinks : nullptr};
    eb::attention_step(cache, p.q.middleRows(t, n), p.k.middleRows(t, n), p.v.middleRows(t, n),
                       out.middleRows(t, n), p.shape, kCausal, tensors, executor);
    t += n;
  }
  return out;
}

/// The problem with its keys and values as the cache gives them back.
Problem dequantised(const Problem& p) {
  QuantizedKvCache cache(options());
  cache.append(p.k, p.v);
  Problem x = p;
  x.k = cache.keys(0, p.k.rows()).cast<double>();
  x.v = cache.values(0, p.v.rows()).cast<double>();
  return x;
}

}  // namespace

TEST_CASE("every entry within half a step; the largest entry of a row exactly 127 steps") {
  eb::Random random(3);
  Matrix<double> k = eb::normal_matrix<double>(random, 40, 14), v = k.leftCols(10) * 3.0;
  k.row(3) *= 1e30;
  k.row(4) *= 1e-37;  // scales below the normal numbers
  k.row(5) *= 1e-44;
  k.row(6).head(7).setZero();
  v.row(7).tail(5).setZero();
  QuantizedKvCache cache(options());
  cache.append(k, v);
  const auto check = [](const Matrix<double>& x, const Matrix<float>& back,
                        const Matrix<float>& scales, Index d) {
    for (Index t = 0; t < x.rows(); ++t) {
      for (Index h = 0; h < 2; ++h) {
        const double s = static_cast<double>(scales(t, h));
        const auto row = x.row(t).segment(h * d, d);
        const double top = row.cwiseAbs().maxCoeff();
        CHECK(s == static_cast<double>(
                       top == 0 ? 0.0f : std::max(static_cast<float>(top / 127), 0x1p-126f)));
        double largest = 0;
        for (Index c = 0; c < d; ++c) {
          const double got = static_cast<double>(back(t, h * d + c));
          // (the product s * code is rounded to float)
          CHECK(std::abs(got - row[c]) <= s / 2 * (1 + 1e-12) + 6e-8 * std::abs(got) + 1e-45);
          if (s > 0) {
            const double code = got / s;
            CHECK(std::abs(code - std::nearbyint(code)) < 1e-5);
            largest = std::max(largest, std::abs(std::nearbyint(code)));
          } else {
            CHECK(got == 0.0);
          }
        }
        if (s > 0x1p-126) CHECK(largest == 127.0);
      }
    }
  };
  check(k, cache.keys(0, 40), cache.key_scale_rows(0, 40), 7);
  check(v, cache.values(0, 40), cache.value_scale_rows(0, 40), 5);
}

TEST_CASE("half steps round to even, in float and in double") {
  Matrix<float> x(1, 6);
  x << 127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f;
  Matrix<float> want(1, 6);
  want << 127.0f, 0.0f, 2.0f, 2.0f, 0.0f, -2.0f;
  QuantizedKvCache cache({.kv_heads = 1, .head_dim = 6});
  cache.append(x, x);
  cache.append(Matrix<double>(x.cast<double>()), Matrix<double>(x.cast<double>()));
  for (Index t = 0; t < 2; ++t) {
    CHECK(cache.keys(t, t + 1) == want);
    CHECK(cache.values(t, t + 1) == want);
  }
}

TEST_CASE("attention over the codes is attention over the de-quantised rows, in every chunking") {
  const Problem p = problem(75, true), x = dequantised(p);
  for (const eb::KvCacheOptions& o :
       {eb::KvCacheOptions{}, eb::KvCacheOptions{.window = 20, .chunk = 3},
        eb::KvCacheOptions{.window = 9, .chunk = 20, .sinks = 3}}) {
    CAPTURE(o.window);
    AnyMask mask = eb::causal();
    if (o.window >= 0) mask = eb::causal() & (eb::prefix(o.sinks) | eb::window_left(o.window));
    const Outcome<double> want = oracle(x, {mask});
    for (const Chunking& c : chunkings(75)) {
      CAPTURE(c.name);
      QuantizedKvCache cache(options(o));
      // De-quantised rows are rounded to float, 6e-8; what attends is not.
      CHECK(difference(run(p, cache, c.chunk), want.out) < 1e-6);
    }
  }
}

TEST_CASE("the output errs by no more than the header says, and by something") {
  const Problem p = problem(60);
  const Outcome<double> exact = oracle(p, {eb::causal()});
  QuantizedKvCache cache(options());
  const Matrix<double> out = run(p, cache, [](Index) { return Index{4}; });
  const Matrix<float> s_k = cache.key_scale_rows(0, 60), s_v = cache.value_scale_rows(0, 60);
  double worst = 0;
  for (Index i = 0; i < 60; ++i) {
    for (Index h = 0; h < 4; ++h) {
      const Index kv = h / 2;
      const double e = p.q.row(i).segment(h * 7, 7).cwiseAbs().sum() / std::sqrt(7.0) *
                       static_cast<double>(s_k.col(kv).head(i + 1).maxCoeff()) / 2;
      const double bound =
          static_cast<double>(s_v.col(kv).head(i + 1).maxCoeff()) / 2 +
          (std::exp(2 * e) - 1) * p.v.block(0, kv * 5, i + 1, 5).cwiseAbs().maxCoeff();
      const double error = (out.row(i) - exact.out.row(i)).segment(h * 5, 5).cwiseAbs().maxCoeff();
      CHECK(error <= bound * (1 + 1e-9));
      worst = std::max(worst, error / bound);
    }
  }
  MESSAGE("largest error / bound: ", worst);
  CHECK(worst > 0.01);
}

TEST_CASE("a regular value: snapshots, roll back, clear; chunks store the same bits") {
  const Problem p = problem(50);
  for (const eb::KvCacheOptions& o :
       {eb::KvCacheOptions{}, eb::KvCacheOptions{.window = 9, .chunk = 12}}) {
    QuantizedKvCache straight(options(o)), cache(options(o));
    straight.append(p.k.topRows(30), p.v.topRows(30));
    for (Index t = 0; t < 30; ++t) cache.append(p.k.middleRows(t, 1), p.v.middleRows(t, 1));
    CHECK(cache == straight);
    const QuantizedKvCache snapshot = cache;
    cache.append(p.k.bottomRows(4), p.v.bottomRows(4));
    CHECK_FALSE(cache == snapshot);
    cache.truncate(30);
    if (o.window < 0) CHECK(cache == snapshot);  // (a ring has lost its oldest tokens)
    CHECK(cache.keys(20, 30) == snapshot.keys(20, 30));
    cache = snapshot;
    const Matrix<double> twice = 2.0 * p.k.bottomRows(4);  // other scales, the same codes
    cache.append(twice, p.v.bottomRows(4));
    QuantizedKvCache other = snapshot;
    other.append(p.k.bottomRows(4), p.v.bottomRows(4));
    CHECK_FALSE(cache == other);
    cache = snapshot;
    CHECK(cache == straight);
    cache.clear();
    CHECK(cache == QuantizedKvCache(options(o)));
  }
}

TEST_CASE("the same bits for every executor; nothing allocated once warm") {
  const Problem p = problem(1100);
  QuantizedKvCache cache(options({.capacity = 1200}));
  cache.append(p.k, p.v);
  Matrix<double> want(3, 20), out(3, 20);
  eb::attention_over_cache(cache, p.q.topRows(3), want, p.shape, kCausal);
  for (const int workers : {1, 2, 3, 7}) {
    const eb::thread_pool pool(workers);
    eb::attention_over_cache(cache, p.q.topRows(3), out, p.shape, kCausal, {}, nullptr, pool);
    CHECK(out == want);
  }
  if (!AllocationCount::available) return;
  const auto step = [&] {
    eb::attention_step(cache, p.q.topRows(3), p.k.topRows(3), p.v.topRows(3), out, p.shape,
                       kCausal);
  };
  step();
  const AllocationCount count;
  for (int i = 0; i < 20; ++i) step();
  CHECK(count.calls() == 0);
}

TEST_CASE("memory: d + 4 bytes per row") {
  const QuantizedKvCache cache({.kv_heads = 8, .head_dim = 128, .capacity = 64});
  CHECK(cache.bytes_per_token() == 8 * 2 * (128 + 4));
  CHECK(cache.bytes() == 64u * 8 * 2 * (128 + 4));
}

TEST_CASE("NaN and infinity show where they are attended to, and nowhere else") {
  for (const double bad : {std::nan(""), kInfinity, -kInfinity, 1e300}) {
    Problem p = problem(20);
    p.v(12, 7) = bad;  // kv head 1
    QuantizedKvCache cache(options());
    Matrix<double> out = run(p, cache, [](Index) { return Index{1}; });
    CHECK(out.topRows(12).allFinite());
    CHECK(out.leftCols(10).allFinite());
    CHECK(out.bottomRows(8).rightCols(10).array().isNaN().all());
    cache.truncate(12);  // and not after it was forgotten
    eb::attention_step(cache, p.q.topRows(1), p.k.topRows(1), p.v.topRows(1), out.topRows(1),
                       p.shape, kCausal);
    CHECK(out.row(0).allFinite());
  }
}

TEST_CASE("errors name the cache; nothing changes") {
  CHECK_THROWS_WITH_AS(QuantizedKvCache({.kv_heads = 0}),
                       "eigenblocks: QuantizedKvCache: kv_heads (0) must be at least 1",
                       eb::invalid_argument);
  const Problem p = problem(12);
  QuantizedKvCache cache(options({.capacity = 10, .fixed = true}));
  cache.append(p.k.topRows(9), p.v.topRows(9));
  const QuantizedKvCache before = cache;
  Matrix<double> out = Matrix<double>::Constant(2, 20, 5.0);
  CHECK_THROWS_WITH_AS(
      eb::attention_step(cache, p.q.topRows(2), p.k.topRows(2), p.v.topRows(2), out, p.shape,
                         kCausal),
      "eigenblocks: QuantizedKvCache: 9 tokens and 2 more exceed the fixed capacity 10",
      std::length_error);
  CHECK_THROWS_WITH_AS(cache.append(p.v.topRows(1), p.v.topRows(1)),
                       "eigenblocks: key is 1 x 10, expected 1 x 14 (cols = kv_heads * head_dim of "
                       "the cache)",
                       eb::invalid_argument);
  CHECK_THROWS_WITH_AS(cache.truncate(10),
                       "eigenblocks: QuantizedKvCache: truncate(10) is outside [0, 9]",
                       std::out_of_range);
  CHECK_THROWS_WITH_AS(
      cache.keys(3, 10),
      "eigenblocks: QuantizedKvCache: positions [3, 10) are not within the stored [0, 9)",
      std::out_of_range);
  CHECK(cache == before);
  CHECK((out.array() == 5.0).all());
}
