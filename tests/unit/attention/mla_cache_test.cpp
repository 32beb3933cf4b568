#include "support/layer_checks.hpp"

#include <eigenblocks/attention/cache_size.hpp>
#include <eigenblocks/attention/mla_cache.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <string>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

namespace {

Matrix<float> some_rows(Index rows, Index cols, std::uint64_t seed) {
  eb::Random random(seed);
  return eb::normal_matrix<float>(random, rows, cols);
}

}  // namespace

TEST_CASE("latent cache: gives back what was appended, through any growth") {
  const Matrix<float> rows = some_rows(200, 7, 1);
  eb::LatentCache<float> cache({.latent_dim = 5, .rope_dim = 2});
  CHECK(cache.size() == 0);
  for (Index t = 0, n = 0; t < 200; t += n) {
    n = std::min<Index>(t % 31 + 1, 200 - t);
    cache.append(rows.middleRows(t, n));
    CHECK(cache.size() == t + n);
  }
  CHECK(cache.view() == rows);
  CHECK(cache.latents() == rows.leftCols(5));
  CHECK(cache.rope_keys() == rows.rightCols(2));
  CHECK(cache.capacity() >= 200);
  CHECK(cache.slots() % eb::LatentCache<float>::kBlock == 0);
}

TEST_CASE("latent cache: a value: copies, comparison, rollback") {
  const Matrix<float> rows = some_rows(20, 6, 2);
  eb::LatentCache<float> cache({.latent_dim = 4, .rope_dim = 2, .capacity = 50});
  cache.append(rows.topRows(12));
  const eb::LatentCache<float> snapshot = cache;
  cache.append(rows.bottomRows(8));
  CHECK(!(cache == snapshot));
  CHECK(snapshot.size() == 12);
  cache.truncate(12);
  CHECK(cache == snapshot);
  cache.append(rows.topRows(1));
  cache = snapshot;
  CHECK(cache.view() == rows.topRows(12));
  cache.clear();
  CHECK(cache.size() == 0);
  cache.append(Matrix<float>(0, 6));
  CHECK(cache.size() == 0);
}

TEST_CASE("latent cache: room is made once, 16-bit storage rounds") {
  eb::LatentCache<Eigen::bfloat16> cache({.latent_dim = 5, .rope_dim = 2});
  cache.reserve(100);
  const auto* const before = cache.row(0);
  const Matrix<float> rows = some_rows(100, 7, 3);
  cache.append(rows);
  CHECK(cache.row(0) == before);
  CHECK(cache.view() == rows.cast<Eigen::bfloat16>());
  CHECK(cache.bytes_per_token() == 14);
  CHECK(eb::LatentCache<float>({.latent_dim = 512, .rope_dim = 64}).bytes_per_token() == 576 * 4);
  // Rows fill an odd number of lines.
  CHECK(eb::LatentCache<float>({.latent_dim = 512, .rope_dim = 64}).stride() == 37 * 16);
  CHECK(eb::LatentCache<double>({.latent_dim = 8}).stride() == 8);
}

TEST_CASE("latent cache: errors change nothing") {
  using invalid = eb::invalid_argument;
  using Cache = eb::LatentCache<float>;
  check_throws<invalid>([] { Cache({.latent_dim = 0}); },
                        "LatentCache: latent_dim (0) must be at least 1");
  check_throws<invalid>([] { Cache({.rope_dim = -2}); },
                        "LatentCache: rope_dim (-2) must not be negative");
  check_throws<invalid>([] { Cache({.capacity = -1}); },
                        "LatentCache: capacity (-1) must not be negative");
  check_throws<invalid>([] { Cache({.fixed = true}); },
                        "LatentCache: a fixed cache needs a capacity of at least 1");
  Cache cache({.latent_dim = 4, .rope_dim = 2, .capacity = 3, .fixed = true});
  CHECK(cache.capacity() == 3);
  check_throws<invalid>(
      [&] { cache.append(some_rows(1, 5, 1)); },
      "rows is 1 x 5, expected 1 x 6 (cols = latent_dim + rope_dim of the cache)");
  cache.append(some_rows(2, 6, 1));
  check_throws<std::length_error>([&] { cache.append(some_rows(2, 6, 1)); },
                                  "LatentCache: 2 tokens and 2 more exceed the fixed capacity 3");
  check_throws<std::out_of_range>([&] { cache.truncate(3); },
                                  "LatentCache: truncate(3) is outside [0, 2]");
  check_throws<std::out_of_range>([&] { cache.truncate(-1); },
                                  "LatentCache: truncate(-1) is outside [0, 2]");
  check_throws<invalid>([&] { cache.reserve(4); },
                        "LatentCache: reserve(4) on a cache of fixed capacity 3");
  CHECK(cache.size() == 2);
}

TEST_CASE("kv_cache_size: the table of DeepSeek-V2") {
  using Kind = eb::KvCacheKind;
  const eb::KvCacheSizeOptions v2{
      .layers = 60, .heads = 128, .kv_heads = 8, .head_dim = 128, .kv_rank = 512, .rope_dim = 64};
  CHECK(eb::kv_cache_size(Kind::mla, v2) == 34560);
  CHECK(eb::kv_cache_size(Kind::mha, v2) == 1966080);
  CHECK(eb::kv_cache_size(Kind::gqa, v2) == 122880);
  CHECK(eb::kv_cache_size(Kind::mqa, v2) == 15360);
  CHECK(eb::kv_cache_size(Kind::mla, {.layers = 27, .kv_rank = 512, .rope_dim = 64}) == 15552);
  using invalid = eb::invalid_argument;
  check_throws<invalid>([] { eb::kv_cache_size(Kind::mha, {.layers = 0}); },
                        "layers (0) must be at least 1");
  check_throws<invalid>([] { eb::kv_cache_size(Kind::mha, {}); }, "heads (0) must be at least 1");
  check_throws<invalid>([] { eb::kv_cache_size(Kind::gqa, {}); },
                        "kv_heads (0) must be at least 1");
  check_throws<invalid>([] { eb::kv_cache_size(Kind::mqa, {}); },
                        "head_dim (0) must be at least 1");
  check_throws<invalid>([] { eb::kv_cache_size(Kind::mla, {}); }, "kv_rank (0) must be at least 1");
  check_throws<invalid>([] { eb::kv_cache_size(Kind::mla, {.kv_rank = 1, .rope_dim = -1}); },
                        "rope_dim (-1) must not be negative");
}
