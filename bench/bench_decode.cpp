// Decoding: a few query rows over a filled key/value cache, one thread.
//
//   attention_over_cache/float/causal/Tq:1/Tk:4096/H:32/HK:8/d:128
//   attention_over_cache/float_over_int8/...      QuantizedKvCache;  float_over_bfloat16: KvCache<bfloat16>
//   attention_over_cache/float_over_pages64/...   one sequence in pages of 64 tokens;  .../B:8 eight of Tk tokens each
//
// bytes_per_second counts every stored key and value once.  limit is the share of a plain read sweep of the same buffers,
// timed right before and after: beyond the last-level cache the bandwidth of memory, within it that of the cache.
// vs_float: time over KvCache<float> / time over this cache, median of paired rounds; above 1 this one is faster.
#include <eigenblocks/attention/paged_cache.hpp>
#include <eigenblocks/attention/quantized_cache.hpp>

#include <algorithm>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

struct Shape {
  Index queries, keys, heads, kv_heads, dim, batch = 1;
  std::string name(const std::string& variant) const {
    const auto number = [](const char* key, Index value) {
      return std::string(key) + std::to_string(value);
    };
    return "attention_over_cache/" + variant + "/causal" + number("/Tq:", queries) +
           number("/Tk:", keys) + number("/H:", heads) + number("/HK:", kv_heads) +
           number("/d:", dim) + (batch > 1 ? number("/B:", batch) : "");
  }
  eb::AttentionShape attention() const {
    return {.heads = heads, .kv_heads = kv_heads, .scale = {}};
  }
};

/// append(rows) until there are `keys`.
template <class T, class Append>
void fill(const Shape& s, const Append& append) {
  const eb::Matrix<T> rows =
      bench::random_matrix<T>(std::min<Index>(s.keys, 512), s.kv_heads * s.dim, 2);
  for (Index size = 0; size < s.keys;) {
    const Index count = std::min(rows.rows(), s.keys - size);
    append(rows.topRows(count));
    size += count;
  }
}

/// One cache per sequence.
template <class Cache, class T>
std::vector<Cache> filled(const Shape& s) {
  Cache cache({.kv_heads = s.kv_heads, .head_dim = s.dim, .capacity = s.keys});
  fill<T>(s, [&](const auto& rows) { cache.append(rows, rows); });
  return std::vector<Cache>(static_cast<std::size_t>(s.batch), cache);
}

template <class Cache, class T>
void attend(std::vector<Cache>& caches, const eb::Matrix<T>& q, eb::Matrix<T>& out,
            const Shape& s) {
  for (Index b = 0; b < s.batch; ++b) {
    eb::attention_over_cache(caches[static_cast<std::size_t>(b)],
                             q.middleRows(b * s.queries, s.queries),
                             out.middleRows(b * s.queries, s.queries), s.attention());
  }
  bench::touch(out.data());
}

/// vs_float of `f`, in rounds that take turns.
template <class F>
void compare(benchmark::State& state, const Shape& s, const eb::Matrix<float>& q,
             eb::Matrix<float>& out, const F& f) {
  auto caches = filled<eb::KvCache<float>, float>(s);
  std::vector<double> ratios;
  const auto time = [](const auto& call) {
    const double start = bench::cpu_seconds();
    for (double now = start; now - start < 5e-3; now = bench::cpu_seconds()) call();
    return bench::cpu_seconds() - start;
  };
  const auto per_call = [&](const auto& call) {
    long calls = 0;
    const double seconds = time([&] {
      call();
      ++calls;
    });
    return seconds / static_cast<double>(calls);
  };
  attend(caches, q, out, s);
  for (int round = 0; round < 15; ++round) {
    const double reference = per_call([&] { attend(caches, q, out, s); });
    ratios.push_back(reference / per_call(f));
  }
  std::nth_element(ratios.begin(), ratios.begin() + 7, ratios.end());
  state.counters["vs_float"] = ratios[7];
}

/// Queries of scalar T over caches filled with rows of scalar T.
template <class T, class Cache>
void decode(const std::string& variant, const Shape& s) {
  benchmark::RegisterBenchmark(s.name(variant).c_str(), [=](benchmark::State& state) {
    auto caches = filled<Cache, T>(s);
    const eb::Matrix<T> q = bench::random_matrix<T>(s.batch * s.queries, s.heads * s.dim, 1);
    eb::Matrix<T> out = q;
    const double bytes = static_cast<double>(s.batch * s.keys * caches[0].bytes_per_token());
    const double entries = static_cast<double>(s.keys * s.kv_heads * s.dim) *
                           static_cast<double>(sizeof(*caches[0].key_panel(0, 0)));
    const auto sweep = [&] {
      return bytes / (2 * entries) *
             bench::sweep_seconds(
                 {{caches[0].key_panel(0, 0), entries}, {caches[0].value_row(0, 0), entries}});
    };
    const auto step = [&] { attend(caches, q, out, s); };
    bench::measure(state, {.bytes = bytes, .limit = sweep}, step);
    if constexpr (std::is_same_v<T, float> && !std::is_same_v<Cache, eb::KvCache<float>>)
      compare(state, s, q, out, step);
  })->Unit(benchmark::kMillisecond);
}

void decode_pages(Index page, const Shape& s) {
  const std::string variant = "float_over_pages" + std::to_string(page);
  benchmark::RegisterBenchmark(s.name(variant).c_str(), [=](benchmark::State& state) {
    eb::PagedKvCache<float> cache({.kv_heads = s.kv_heads,
                                   .head_dim = s.dim,
                                   .page = page,
                                   .pages = s.batch * ((s.keys + page - 1) / page)});
    std::vector<Index> ids;
    for (Index b = 0; b < s.batch; ++b) ids.push_back(cache.add_sequence());
    // Sequences grow in turns, so that their pages lie between each other's.
    const Index batch = s.batch;
    fill<float>(s, [&](const auto& rows) {
      const eb::Matrix<float> all = rows.replicate(batch, 1);
      cache.append_batch(ids, all, all);
    });
    const eb::Matrix<float> q =
        bench::random_matrix<float>(s.batch * s.queries, s.heads * s.dim, 1);
    eb::Matrix<float> out = q;
    const double half = static_cast<double>(s.batch * s.keys * cache.bytes_per_token()) / 2;
    const auto sweep = [&] {
      return bench::sweep_seconds(
          {{cache.key_panel(0, 0, 0), half}, {cache.value_row(0, 0, 0), half}});
    };
    const auto step = [&] {
      eb::paged_attention_over_cache(cache, ids, q, out, s.attention());
      bench::touch(out.data());
    };
    bench::measure(state, {.bytes = 2 * half, .limit = sweep}, step);
    compare(state, s, q, out, step);
  })->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (Index keys : {512, 4096, 32768}) {
    for (Index queries : {1, 4, 16})
      decode<float, eb::KvCache<float>>("float", {queries, keys, 32, 8, 128});
    decode<Eigen::bfloat16, eb::KvCache<Eigen::bfloat16>>("bfloat16", {1, keys, 32, 8, 128});
    decode<float, eb::KvCache<Eigen::bfloat16>>("float_over_bfloat16", {1, keys, 32, 8, 128});
    for (Index queries : {1, 4, 16})
      decode<float, eb::QuantizedKvCache>("float_over_int8", {queries, keys, 32, 8, 128});
    for (Index page : {16, 64}) decode_pages(page, {1, keys, 32, 8, 128});
  }
  decode_pages(16, {1, 1024, 32, 8, 128, 8});
  decode<float, eb::KvCache<float>>("float", {1, 4096, 8, 8, 64});
  decode<float, eb::QuantizedKvCache>("float_over_int8", {1, 4096, 8, 8, 64});
  return bench::run(argc, argv);
}
