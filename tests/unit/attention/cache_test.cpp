#include <eigenblocks/attention/cache.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <string>

namespace {

using namespace eigenblocks;

/// Token t, channel c of a key: t + c / 64; values the negative.  Exact in every storage scalar up to t = 31.
template <class T>
Matrix<T> tokens(Index first, Index count, Index cols, float sign = 1.0f) {
  Matrix<T> m(count, cols);
  for (Index t = 0; t < count; ++t) {
    for (Index c = 0; c < cols; ++c)
      m(t, c) = static_cast<T>(
          sign * (static_cast<float>((first + t) % 32) + static_cast<float>(c % 64) / 64));
  }
  return m;
}

template <class T>
void append(KvCache<T>& cache, Index count) {
  const KvCacheOptions& o = cache.options();
  cache.append(tokens<T>(cache.size(), count, o.kv_heads * o.head_dim),
               tokens<T>(cache.size(), count, o.kv_heads * o.value_dim, -1.0f));
}

/// Every stored position reads back.
template <class T>
void check_contents(const KvCache<T>& cache) {
  const KvCacheOptions& o = cache.options();
  const Index first = cache.first(), count = cache.size() - first;
  CHECK(cache.keys(first, cache.size()) == tokens<T>(first, count, o.kv_heads * o.head_dim));
  CHECK(cache.values(first, cache.size()) ==
        tokens<T>(first, count, o.kv_heads * o.value_dim, -1.0f));
}

}  // namespace

TEST_CASE_TEMPLATE("what is appended reads back, in any chunking, for odd sizes", T, float, double,
                   Eigen::half, Eigen::bfloat16) {
  for (const Index dim : {1, 5}) {
    for (const Index chunk : {1, 2, 7, 16, 17, 64}) {
      KvCache<T> cache({.kv_heads = 3, .head_dim = dim, .value_dim = dim + 2});
      while (cache.size() < 31) append(cache, std::min<Index>(chunk, 31 - cache.size()));
      CHECK(cache.size() == 31);
      CHECK(cache.first() == 0);
      check_contents(cache);
    }
  }
}

TEST_CASE("value_dim defaults to head_dim; bytes per token is the count of the paper") {
  const KvCache<float> cache({.kv_heads = 8, .head_dim = 128});
  CHECK(cache.options().value_dim == 128);
  CHECK(cache.bytes_per_token() ==
        8 * (128 + 128) * 4);  // 2048 scalars: arXiv 2405.04434, GQA with 8 groups
  CHECK(KvCache<Eigen::half>({.kv_heads = 8, .head_dim = 128}).bytes_per_token() == 2048 * 2);
  CHECK(KvCache<Eigen::bfloat16>({.kv_heads = 1, .head_dim = 64, .value_dim = 32})
            .bytes_per_token() == 96 * 2);
  CHECK(cache.bytes() == 0);
  KvCache<float> reserved({.kv_heads = 2, .head_dim = 16, .capacity = 100});
  CHECK(reserved.bytes() == 112u * 2 * 32 * 4);  // whole panels of 16 tokens
}

TEST_CASE("growth: geometric, by reserve, and not at all while the capacity lasts") {
  KvCache<float> cache({.kv_heads = 2, .head_dim = 3, .capacity = 20});
  CHECK(cache.capacity() == 32);
  append(cache, 32);
  CHECK(cache.capacity() == 32);
  append(cache, 1);
  CHECK(cache.capacity() == 64);
  cache.reserve(10);  // never shrinks
  CHECK(cache.capacity() == 64);
  cache.reserve(100);
  CHECK(cache.capacity() == 112);
  append(cache, 79);
  CHECK(cache.size() == 112);
  CHECK(cache.capacity() == 112);
  check_contents(cache);
  append(cache, 200);  // more than double at once
  CHECK(cache.size() == 312);
  check_contents(cache);
}

TEST_CASE("a fixed cache refuses what does not fit and stays as it was") {
  KvCache<float> cache({.kv_heads = 1, .head_dim = 2, .capacity = 5, .fixed = true});
  CHECK(cache.capacity() == 5);  // not the 16 slots of its panel
  append(cache, 4);
  const KvCache<float> before = cache;
  CHECK_THROWS_WITH_AS(append(cache, 2),
                       "eigenblocks: KvCache: 4 tokens and 2 more exceed the fixed capacity 5",
                       std::length_error);
  CHECK(cache == before);
  append(cache, 1);
  CHECK_THROWS_AS(append(cache, 1), std::length_error);
  append(cache, 0);
  check_contents(cache);
  cache.truncate(2);
  append(cache, 3);
  check_contents(cache);
  CHECK_THROWS_WITH_AS(cache.reserve(17),
                       "eigenblocks: KvCache: reserve(17) on a cache of fixed capacity 5",
                       eigenblocks::invalid_argument);
}

TEST_CASE(
    "a ring keeps at least its window, however often it wraps and however much comes at once") {
  for (const Index window : {0, 1, 15, 16, 40}) {
    for (const Index chunk : {1, 5, 64}) {
      KvCache<float> cache({.kv_heads = 2, .head_dim = 3, .window = window, .chunk = chunk});
      const Index slots = cache.capacity();
      CHECK(slots >= window + chunk);
      CHECK(slots < window + chunk + 16);
      Index count = 1;
      while (cache.size() < 10 * slots) {
        append(cache, count);
        count = count % 23 + 1;
        CHECK(cache.size() - cache.first() == std::min(cache.size(), slots));
        check_contents(cache);
      }
      append(cache, 3 * slots + 5);  // most of it is gone at once
      CHECK(cache.first() == cache.size() - slots);
      check_contents(cache);
      CHECK(cache.capacity() == slots);
    }
  }
}

TEST_CASE("truncate, append again, snapshot and restore") {
  KvCache<double> cache({.kv_heads = 2, .head_dim = 4});
  append(cache, 25);
  const KvCache<double> snapshot = cache;
  append(cache, 20);
  CHECK_FALSE(cache == snapshot);
  cache.truncate(25);
  CHECK(cache.size() == 25);
  CHECK(cache == snapshot);
  cache.truncate(7);
  CHECK_FALSE(cache == snapshot);
  append(cache, 18);
  CHECK(cache == snapshot);
  check_contents(cache);
  cache = snapshot;
  CHECK(cache == snapshot);
  cache.truncate(25);  // nothing to forget
  CHECK(cache == snapshot);
  cache.truncate(0);
  CHECK(cache.size() == 0);
  append(cache, 3);
  check_contents(cache);
  cache.clear();
  CHECK(cache == KvCache<double>({.kv_heads = 2, .head_dim = 4}));
  CHECK_THROWS_WITH_AS(cache.truncate(1), "eigenblocks: KvCache: truncate(1) is outside [0, 0]",
                       std::out_of_range);
  CHECK_THROWS_AS(cache.truncate(-1), std::out_of_range);
}

TEST_CASE("a copy owns its tokens") {
  KvCache<float> a({.kv_heads = 1, .head_dim = 2});
  append(a, 10);
  KvCache<float> b = a;
  a.truncate(3);
  append(b, 5);
  check_contents(a);
  check_contents(b);
  CHECK(a.size() == 3);
  CHECK(b.size() == 15);
}

TEST_CASE("a ring can be truncated as long as it holds the window before the new end") {
  KvCache<float> cache({.kv_heads = 1, .head_dim = 2, .window = 10, .chunk = 22});  // 32 slots
  append(cache, 20);
  cache.truncate(2);  // nothing has been overwritten yet
  append(cache, 98);  // size 100, positions 68 .. 99
  CHECK(cache.first() == 68);
  CHECK_THROWS_WITH_AS(
      cache.truncate(77),
      "eigenblocks: KvCache: truncate(77) needs position 67, but the ring starts at 68",
      std::out_of_range);
  CHECK(cache.size() == 100);
  cache.truncate(78);
  CHECK(cache.first() == 68);
  check_contents(cache);
  append(cache, 40);
  check_contents(cache);
}

TEST_CASE("equality is options, positions and stored rows, not history or spare capacity") {
  KvCache<float> a({.kv_heads = 1, .head_dim = 2}), b = a;
  CHECK(a == b);
  append(a, 20);
  append(b, 10);
  append(b, 10);
  b.reserve(500);
  CHECK(a == b);
  KvCache<float> other({.kv_heads = 1, .head_dim = 2});
  Matrix<float> k = tokens<float>(0, 20, 2);
  k(19, 1) += 1.0f;
  other.append(k, tokens<float>(0, 20, 2, -1.0f));
  CHECK_FALSE(a == other);
  CHECK_FALSE(KvCache<float>({.kv_heads = 1, .head_dim = 2}) ==
              KvCache<float>({.kv_heads = 2, .head_dim = 1}));
  CHECK(KvCache<float>() == KvCache<float>());
}

TEST_CASE("rows are read from views, and ranges are checked") {
  KvCache<float> cache({.kv_heads = 2, .head_dim = 2});
  Matrix<float> fused(6, 8);
  fused << tokens<float>(0, 6, 4), tokens<float>(0, 6, 4, -1.0f);
  cache.append(fused.leftCols(4), fused.rightCols(4));
  check_contents(cache);
  CHECK(cache.keys(2, 2).rows() == 0);
  CHECK(cache.values(2, 5) == tokens<float>(2, 3, 4, -1.0f));
  CHECK_THROWS_WITH_AS((void)cache.keys(0, 7),
                       "eigenblocks: KvCache: positions [0, 7) are not within the stored [0, 6)",
                       std::out_of_range);
  CHECK_THROWS_AS((void)cache.keys(-1, 2), std::out_of_range);
  CHECK_THROWS_AS((void)cache.values(4, 3), std::out_of_range);
}

TEST_CASE("bad options and rows are refused with the numbers") {
  const auto refuse = [](const KvCacheOptions& options, const std::string& text) {
    CHECK_THROWS_WITH_AS(KvCache<float>{options}, ("eigenblocks: KvCache: " + text).c_str(),
                         eigenblocks::invalid_argument);
  };
  refuse({.kv_heads = 0}, "kv_heads (0) must be at least 1");
  refuse({.head_dim = 0}, "head_dim (0) must be at least 1");
  refuse({.value_dim = -1}, "value_dim (-1) must not be negative");
  refuse({.capacity = -4}, "capacity (-4) must not be negative");
  refuse({.window = -2}, "window (-2) must be -1 (off) or >= 0");
  refuse({.chunk = 0}, "chunk (0) must be at least 1");
  refuse({.fixed = true}, "a fixed cache needs a capacity of at least 1");
  refuse({.capacity = 8, .fixed = true, .window = 3},
         "fixed and window exclude each other: a ring never grows");

  KvCache<float> cache({.kv_heads = 2, .head_dim = 3, .value_dim = 4});
  append(cache, 2);
  const KvCache<float> before = cache;
  const Matrix<float> key(2, 6), value(2, 8), narrow(2, 5), few(1, 8);
  CHECK_THROWS_WITH_AS(
      cache.append(narrow, value),
      "eigenblocks: key is 2 x 5, expected 2 x 6 (cols = kv_heads * head_dim of the cache)",
      eigenblocks::invalid_argument);
  CHECK_THROWS_WITH_AS(cache.append(key, key),
                       "eigenblocks: value is 2 x 6, expected 2 x 8 (rows of key, cols = kv_heads "
                       "* value_dim of the cache)",
                       eigenblocks::invalid_argument);
  CHECK_THROWS_AS(cache.append(key, few), eigenblocks::invalid_argument);
  CHECK(cache == before);
}
