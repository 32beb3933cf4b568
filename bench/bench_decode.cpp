// Decoding: a few query rows over a filled key/value cache, one thread.
//
//   attention_over_cache/float/causal/Tq:1/Tk:4096/H:32/HK:8/d:128
//
// bytes_per_second counts every stored key and value once.  limit is the share of a plain read sweep of the same buffers,
// timed right before and after: beyond the last-level cache the bandwidth of memory, within it that of the cache.
#include <eigenblocks/attention/decode.hpp>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

template <class T>
void decode(Index queries, Index keys, Index heads, Index kv_heads, Index dim) {
  const auto number = [](const char* key, Index value) {
    return std::string(key) + std::to_string(value);
  };
  const std::string name = std::string("attention_over_cache/") + bench::scalar_name<T>() +
                           "/causal" + number("/Tq:", queries) + number("/Tk:", keys) +
                           number("/H:", heads) + number("/HK:", kv_heads) + number("/d:", dim);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    eb::KvCache<T> cache({.kv_heads = kv_heads, .head_dim = dim, .capacity = keys});
    const eb::Matrix<T> rows =
        bench::random_matrix<T>(std::min<Index>(keys, 512), kv_heads * dim, 2);
    while (cache.size() < keys) {
      const auto part = rows.topRows(std::min(rows.rows(), keys - cache.size()));
      cache.append(part, part);
    }
    const eb::Matrix<T> q = bench::random_matrix<T>(queries, heads * dim, 1);
    eb::Matrix<T> out = q;
    const double half = static_cast<double>(cache.bytes()) / 2;
    const auto sweep = [&] {
      return bench::sweep_seconds({{cache.key_panel(0, 0), half}, {cache.value_row(0, 0), half}});
    };
    bench::measure(state, {.bytes = 2 * half, .limit = sweep}, [&] {
      eb::attention_over_cache(cache, q, out, {.heads = heads, .kv_heads = kv_heads, .scale = {}});
      bench::touch(out.data());
    });
  })->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (Index keys : {512, 4096, 32768}) {
    for (Index queries : {1, 4, 16}) decode<float>(queries, keys, 32, 8, 128);
    decode<Eigen::bfloat16>(1, keys, 32, 8, 128);
  }
  decode<float>(1, 4096, 8, 8, 64);
  return bench::run(argc, argv);
}
