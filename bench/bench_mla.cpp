// Decoding with multi-head latent attention at DeepSeek's sizes, one thread.
//
//   latent_attention/float/Tq:1/Tk:4096/H:16   the absorbed core over the latent cache (512 + 64 channels); limit: the FMA peak;
//                                              bytes_per_second counts every stored latent once, sweep_ms is a plain read of them
//   mla_step/float/absorbed/...                the layer, D 2048, one token after Tk; expanded is the same through keys and values
//   mha_step/float/...                         GQA with 8 heads of keys of the same width; items_per_second are tokens
#include <eigenblocks/attention/mla.hpp>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

constexpr Index kModel = 2048, kHeads = 16;
const eb::MlaOptions kOptions{
    .heads = kHeads, .nope_dim = 128, .rope_dim = 64, .value_dim = 128, .kv_rank = 512};

std::string sizes(Index rows, Index tokens) {
  return "/Tq:" + std::to_string(rows) + "/Tk:" + std::to_string(tokens) +
         "/H:" + std::to_string(kHeads);
}

template <class T>
void core(Index rows, Index tokens) {
  const std::string name =
      std::string("latent_attention/") + bench::scalar_name<T>() + sizes(rows, tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    eb::LatentCache<T> cache({.latent_dim = 512, .rope_dim = 64, .capacity = tokens});
    cache.append(bench::random_matrix<float>(tokens, 576, 1));
    const eb::Matrix<float> q = bench::random_matrix<float>(rows, kHeads * 576, 2);
    eb::Matrix<float> out(rows, kHeads * 512);
    const double bytes = static_cast<double>(tokens * cache.stride()) * sizeof(T);
    const double flops = static_cast<double>(rows * kHeads * tokens) * 2 * (2 * 512 + 64);
    bench::measure(state, {.flops = flops, .bytes = bytes, .limit = bench::fma_limit<float>(flops)},
                   [&] {
                     eb::latent_attention(cache, q, out, kHeads, 0.07);
                     bench::touch(out.data());
                   });
    state.counters["sweep_ms"] = 1e3 * bench::sweep_seconds({{cache.row(0), bytes}});
  })->Unit(benchmark::kMillisecond);
}

/// step() appends rows to the state and truncates it again.
template <class Step>
void tokens_per_second(benchmark::State& state, Index rows, Step&& step) {
  bench::measure(state, {}, step);
  state.SetItemsProcessed(static_cast<std::int64_t>(rows) *
                          static_cast<std::int64_t>(state.iterations()));
}

void layer_step(const char* form_name, eb::MlaForm form, Index rows, Index tokens) {
  const std::string name = std::string("mla_step/float/") + form_name + sizes(rows, tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Mla<float> layer(kOptions);
    eb::MlaWeights<float> w;
    w.w_q = bench::random_matrix<float>(kModel, kHeads * 192, 1, 0.02);
    w.w_dkv = bench::random_matrix<float>(kModel, 576, 2, 0.02);
    w.w_ukv = bench::random_matrix<float>(512, kHeads * 256, 3, 0.02);
    w.w_o = bench::random_matrix<float>(kHeads * 128, kModel, 4, 0.02);
    eb::MlaState<float> mla = eb::mla_state(layer, tokens + rows);
    mla.cache.append(bench::random_matrix<float>(tokens, 576, 5));
    const eb::Matrix<float> x = bench::random_matrix<float>(rows, kModel, 6);
    eb::Matrix<float> y(rows, kModel);
    tokens_per_second(state, rows, [&] {
      eb::mla_step(layer, w, mla, x, y, form);
      mla.truncate(tokens);
    });
  })->Unit(benchmark::kMillisecond);
}

void gqa_step(Index rows, Index tokens) {
  const std::string name = "mha_step/float/HK:8" + sizes(rows, tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Mha<float> layer({.heads = kHeads, .kv_heads = 8, .head_dim = 128});
    eb::MhaWeights<float> w;
    w.w_q = bench::random_matrix<float>(kModel, kHeads * 128, 1, 0.02);
    w.w_k = bench::random_matrix<float>(kModel, 8 * 128, 2, 0.02);
    w.w_v = bench::random_matrix<float>(kModel, 8 * 128, 3, 0.02);
    w.w_o = bench::random_matrix<float>(kHeads * 128, kModel, 4, 0.02);
    eb::MhaState<float> mha = eb::mha_state(layer, tokens + rows);
    const eb::Matrix<float> kv = bench::random_matrix<float>(tokens, 8 * 128, 5);
    mha.cache.append(kv, kv);
    const eb::Matrix<float> x = bench::random_matrix<float>(rows, kModel, 6);
    eb::Matrix<float> y(rows, kModel);
    tokens_per_second(state, rows, [&] {
      eb::mha_step(layer, w, mha, x, y);
      mha.truncate(tokens);
    });
  })->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (Index rows : {1, 4, 16}) core<float>(rows, 4096);
  core<Eigen::bfloat16>(1, 4096);
  core<float>(1, 32768);
  layer_step("absorbed", eb::MlaForm::absorbed, 1, 4096);
  layer_step("expanded", eb::MlaForm::expanded, 1, 4096);
  gqa_step(1, 4096);
  return bench::run(argc, argv);
}
