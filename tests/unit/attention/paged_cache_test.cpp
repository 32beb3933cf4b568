// Many sequences in one pool: each gets the bits of a cache of its own, whoever else is in the batch.
#include <eigenblocks/attention/paged_cache.hpp>

#include "unit/attention/decode_case.hpp"

#include <eigenblocks/core/thread_pool.hpp>

#include <map>
#include <vector>

#include "support/alloc_guard.hpp"

namespace {

using namespace attention_test;

const auto kCausal = eb::attention_rule(AnyMask(eb::causal()));
constexpr eb::AttentionShape kShape{.heads = 4, .kv_heads = 2};
constexpr Index kDim = 5, kValueDim = 7;

eb::PagedKvCacheOptions options(Index page, Index pages) {
  return {.kv_heads = 2, .head_dim = kDim, .value_dim = kValueDim, .page = page, .pages = pages};
}

struct Tokens {
  Matrix<double> q, k, v;
  Tokens(Index rows, std::uint64_t seed) {
    eb::Random random(seed);
    q = eb::normal_matrix<double>(random, rows, 4 * kDim);
    k = eb::normal_matrix<double>(random, rows, 2 * kDim);
    v = eb::normal_matrix<double>(random, rows, 2 * kValueDim);
  }
};

/// The pool, and beside it a cache for every sequence.
struct Twin {
  eb::PagedKvCache<double> pool;
  std::map<Index, eb::KvCache<double>> alone;
  std::uint64_t seed = 1;
  AnyMask mask = eb::causal();

  explicit Twin(const eb::PagedKvCacheOptions& o) : pool(o) {}

  Index add() {
    const Index id = pool.add_sequence();
    alone.insert_or_assign(
        id, eb::KvCache<double>({.kv_heads = 2, .head_dim = kDim, .value_dim = kValueDim}));
    return id;
  }
  Index fork(Index id) {
    const Index copy = pool.fork(id);
    alone.insert_or_assign(copy, alone.at(id));
    return copy;
  }
  void remove(Index id) {
    pool.remove(id);
    alone.erase(id);
  }
  void truncate(Index id, Index n) {
    pool.truncate(id, n);
    alone.at(id).truncate(n);
  }
  /// `rows` tokens for each of ids; the same bits.
  void step(const std::vector<Index>& ids, Index rows, eb::ExecutorRef executor = {}) {
    const auto rule = eb::attention_rule(mask);
    const Index count = static_cast<Index>(ids.size());
    const Tokens x(count * rows, seed++);
    Vector<double> scale(count * rows), sinks(4);
    for (Index i = 0; i < count * rows; ++i) scale[i] = 1.0 + 0.1 * static_cast<double>(i % 7);
    sinks << 0.3, -1.0, 0.0, 2.0;
    Matrix<double> out(count * rows, 4 * kValueDim), want = out, again = out;
    eb::paged_attention_step(pool, ids, x.q, x.k, x.v, out, kShape, rule,
                             {.row_scale = &scale, .sinks = &sinks}, executor);
    for (Index b = 0; b < count; ++b) {
      eb::KvCache<double>& cache = alone.at(ids[static_cast<std::size_t>(b)]);
      const Vector<double> part = scale.segment(b * rows, rows);
      eb::attention_step(cache, x.q.middleRows(b * rows, rows), x.k.middleRows(b * rows, rows),
                         x.v.middleRows(b * rows, rows), want.middleRows(b * rows, rows), kShape,
                         rule, {.row_scale = &part, .sinks = &sinks});
    }
    CHECK(out == want);
    eb::paged_attention_over_cache(pool, ids, x.q, again, kShape, rule,
                                   {.row_scale = &scale, .sinks = &sinks});
    CHECK(again == want);
  }
  void check_contents() const {
    for (const auto& [id, cache] : alone) {
      REQUIRE(pool.size(id) == cache.size());
      CHECK(pool.keys(id, 0, cache.size()) == cache.keys(0, cache.size()));
      CHECK(pool.values(id, 0, cache.size()) == cache.values(0, cache.size()));
    }
  }
};

}  // namespace

TEST_CASE("sequences of different lengths, joining and leaving: the bits of a cache of their own") {
  for (const Index page : {16, 48, 64}) {
    CAPTURE(page);
    Twin x(options(page, 80));
    const Index a = x.add(), b = x.add();
    x.step({a}, 40);  // prompts: tiles
    x.step({b}, 7);
    for (int i = 0; i < 30; ++i) x.step({b, a}, 1);
    const Index c = x.add();
    x.step({c}, 1);
    x.step({a, b, c}, 3);
    x.remove(b);
    x.step({c, a}, 16);
    const Index d = x.add();
    CHECK(d == b);  // a free id is used again
    x.step({a, d, c}, 20);
    x.truncate(a, 33);  // in the middle of a page and of a panel
    x.truncate(c, 0);
    for (int i = 0; i < 20; ++i) x.step({a, c, d}, 1);
    x.check_contents();
  }
}

TEST_CASE("windows that start anywhere, splits of 1024, any executor") {
  Twin x(options(48, 100));  // windows and splits start in the middle of pages
  x.mask = eb::causal() & eb::window_left(1037);
  const Index a = x.add(), b = x.add();
  x.step({a}, 2100);
  x.step({b}, 1020);
  for (const int workers : {1, 2, 3, 7}) {
    const eb::thread_pool pool(workers);
    x.step({a, b}, 1, pool);
    x.step({b, a}, 2, pool);
  }
}

TEST_CASE("forks share pages until one of them writes") {
  for (const Index length : {20, 32}) {
    CAPTURE(length);
    Twin x(options(16, 12));
    const Index a = x.add();
    x.step({a}, length);
    CHECK(x.pool.free_pages() == 10);
    const Index b = x.fork(a), c = x.fork(a);
    CHECK(x.pool.free_pages() == 10);
    // 20: the last page is shared by three; the last to write keeps it.  32: three new pages.
    CHECK(x.pool.pages_needed(std::vector<Index>{a, b, c}, 1) == (length == 20 ? 2 : 3));
    CHECK(x.pool.pages_needed(std::vector<Index>{a, b}, 1) == 2);
    x.step({a, b, c}, 1);
    CHECK(x.pool.free_pages() == (length == 20 ? 8 : 7));
    x.check_contents();
    for (int i = 0; i < 15; ++i) x.step({c, b, a}, 1);
    x.check_contents();
    x.truncate(b, 18);
    const Index d = x.fork(b);
    x.step({b}, 1);
    x.step({d}, 2);
    x.check_contents();
    x.remove(a);
    x.remove(c);
    x.step({b, d}, 5);
    x.check_contents();
    x.remove(b);
    x.remove(d);
    CHECK(x.pool.free_pages() == 12);
    CHECK(x.pool.sequences() == 0);
  }
}

TEST_CASE("a pool that is too small refuses the whole batch and changes nothing") {
  Twin x(options(16, 4));
  const Index a = x.add(), b = x.add();
  x.step({a}, 31);
  x.step({b}, 16);
  CHECK(x.pool.free_pages() == 1);
  const Tokens two(4, 9);
  Matrix<double> out = Matrix<double>::Constant(4, 28, 5.0);
  const std::vector<Index> both{a, b};
  CHECK_THROWS_WITH_AS(
      eb::paged_attention_step(x.pool, both, two.q, two.k, two.v, out, kShape, kCausal),
      "eigenblocks: PagedKvCache: 2 more tokens for each of 2 sequences take 2 "
      "pages, but 1 are free",
      std::length_error);
  CHECK((out.array() == 5.0).all());
  CHECK(x.pool.free_pages() == 1);
  x.check_contents();
  x.step({a, b}, 1);  // exactly fits
  CHECK(x.pool.free_pages() == 0);
  // A fork's copy counts: two sequences share a page that only one may write in place.
  const Index c = x.fork(b);
  const Tokens one(1, 10);
  CHECK_THROWS_AS(x.pool.append(c, one.k, one.v), std::length_error);
  x.truncate(a, 16);
  x.step({c}, 1);
  x.step({b}, 1);
  x.check_contents();
}

TEST_CASE("float rows over 16-bit pages: the bits of float rows over a 16-bit cache") {
  eb::PagedKvCache<Eigen::bfloat16> pool(
      {.kv_heads = 2, .head_dim = kDim, .value_dim = kValueDim, .pages = 8});
  eb::KvCache<Eigen::bfloat16> cache({.kv_heads = 2, .head_dim = kDim, .value_dim = kValueDim});
  CHECK(pool.bytes_per_token() == cache.bytes_per_token());
  const Tokens x(60, 3);
  const Matrix<float> q = x.q.cast<float>(), k = x.k.cast<float>(), v = x.v.cast<float>();
  Matrix<float> out(60, 28), want(60, 28);
  const Index ids[] = {pool.add_sequence()};
  for (Index t = 0, n = 0; t < 60; t += n) {
    n = t < 30 ? 3 : 5;  // 6 and 10 rows a head: widened where used, and once for all
    eb::paged_attention_step(pool, ids, q.middleRows(t, n), k.middleRows(t, n), v.middleRows(t, n),
                             out.middleRows(t, n), kShape);
    eb::attention_step(cache, q.middleRows(t, n), k.middleRows(t, n), v.middleRows(t, n),
                       want.middleRows(t, n), kShape);
  }
  CHECK(out == want);
  // and those of the rounded operands, up to rounding
  Problem p(
      {.queries = 60, .keys = 60, .heads = 4, .kv_heads = 2, .dim = kDim, .value_dim = kValueDim});
  p.q = q.cast<double>();
  p.k = k.cast<Eigen::bfloat16>().cast<double>();
  p.v = v.cast<Eigen::bfloat16>().cast<double>();
  CHECK(difference(out, oracle(p, {eb::causal()}).out) < 2e-6);
}

TEST_CASE("nothing is allocated once warm") {
  if (!AllocationCount::available) return;
  eb::PagedKvCache<double> pool(options(16, 200));
  const Tokens x(9, 5);
  Matrix<double> out(9, 28);
  std::vector<Index> ids;
  for (int i = 0; i < 3; ++i) ids.push_back(pool.add_sequence());
  const eb::thread_pool threads(3);
  const auto step = [&] {
    eb::paged_attention_step(pool, ids, x.q, x.k, x.v, out, kShape, kCausal, {}, threads);
  };
  step();
  const AllocationCount count;
  for (int i = 0; i < 345; ++i) step();  // to 1038 tokens each: new pages, and the second split
  CHECK(count.calls() == 0);
  CHECK(pool.size(ids[0]) == 1038);
}

TEST_CASE("a copy is a value of its own") {
  Twin x(options(16, 10));
  const Index a = x.add();
  x.step({a}, 20);
  const eb::PagedKvCache<double> before = x.pool;
  x.step({a}, 20);
  CHECK(before.size(a) == 20);
  CHECK(before.free_pages() == 8);
  CHECK(before.keys(a, 0, 20) == x.pool.keys(a, 0, 20));
}

TEST_CASE("errors: before anything is written") {
  using Pool = eb::PagedKvCache<double>;
  const auto refuse = [](auto&& call, const char* text) {
    CHECK_THROWS_WITH_AS(call(), text, eb::invalid_argument);
  };
  refuse([] { Pool({.page = 20}); },
         "eigenblocks: PagedKvCache: page (20) must be a positive multiple of 16");
  refuse([] { Pool({.pages = 0}); },
         "eigenblocks: PagedKvCache: pages (0) must be at least 1 and fit 32 bits");
  refuse([] { Pool({.kv_heads = 0}); },
         "eigenblocks: PagedKvCache: kv_heads (0) must be at least 1");
  refuse([] { Pool({.head_dim = 0}); },
         "eigenblocks: PagedKvCache: head_dim (0) must be at least 1");
  refuse([] { Pool({.value_dim = -1}); },
         "eigenblocks: PagedKvCache: value_dim (-1) must not be negative");
  Pool pool(options(16, 6));
  const Index a = pool.add_sequence(), b = pool.add_sequence();
  const Tokens x(4, 2);
  Matrix<double> out = Matrix<double>::Constant(4, 28, 5.0);
  const auto step = [&](const std::vector<Index>& ids, const Matrix<double>& q,
                        const Matrix<double>& k, const Matrix<double>& v) {
    return [&, ids] { eb::paged_attention_step(pool, ids, q, k, v, out, kShape, kCausal); };
  };
  pool.append(a, x.k, x.v);
  refuse(step({a, b, a}, x.q, x.k, x.v), "eigenblocks: PagedKvCache: sequence 0 is listed twice");
  const Index c = pool.add_sequence();
  refuse(step({a, b, c}, x.q, x.k, x.v),
         "eigenblocks: key has 4 rows, which 3 sequences cannot share evenly");
  refuse(step({}, x.q, x.k, x.v),
         "eigenblocks: key has 4 rows, which 0 sequences cannot share evenly");
  refuse(step({a}, x.q, x.v, x.v),
         "eigenblocks: key is 4 x 14, expected 4 x 10 (cols = kv_heads * head_dim of the cache)");
  refuse(step({a}, x.q, x.k, x.k),
         "eigenblocks: value is 4 x 10, expected 4 x 14 (rows of key, cols = kv_heads * value_dim "
         "of the cache)");
  refuse(step({a}, x.k, x.k, x.v),
         "eigenblocks: query is 4 x 10, expected 4 x 20 (cols = heads * head_dim of the cache)");
  const Matrix<double> few = x.k.topRows(2);
  refuse(step({a}, x.q, few, x.v),
         "eigenblocks: key is 2 x 10, expected 4 x 10 (one row per query row)");
  refuse(
      [&] {
        eb::paged_attention_over_cache(pool, std::vector<Index>{b}, x.q, out, kShape, kCausal);
      },
      "eigenblocks: query has 4 rows for sequence 1, which holds only 0 positions");
  const auto unknown = [](auto&& call, const char* text) {
    CHECK_THROWS_WITH_AS(call(), text, std::out_of_range);
  };
  pool.remove(c);
  for (const Index id : {c, Index{-1}, Index{99}}) {
    const std::string text =
        "eigenblocks: PagedKvCache: there is no sequence " + std::to_string(id);
    unknown([&] { step({a, id}, x.q, x.k, x.v)(); }, text.c_str());
    unknown([&] { pool.fork(id); }, text.c_str());
    unknown([&] { pool.remove(id); }, text.c_str());
    unknown([&] { pool.size(id); }, text.c_str());
  }
  unknown([&] { pool.truncate(a, 5); },
          "eigenblocks: PagedKvCache: truncate(0, 5) is outside [0, 4]");
  unknown([&] { pool.keys(a, 2, 5); },
          "eigenblocks: PagedKvCache: positions [2, 5) of sequence 0 are not within [0, 4)");
  CHECK(pool.size(a) == 4);
  CHECK(pool.size(b) == 0);
  CHECK(pool.free_pages() == 5);
  CHECK((out.array() == 5.0).all());
  step({}, Matrix<double>(0, 20), Matrix<double>(0, 10),
       Matrix<double>(0, 14));  // no sequences: nothing to do
}
