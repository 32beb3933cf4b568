// Transformer-VQ attention against full attention, one thread.
//
//   vq_attention/float/T:8192/S:512/M:512/H:1/d:64    codes and attention
//   vq_nearest/float/...                              the codes alone
//   vq_backward/float/...                             the backward alone, L = 512, through_cache
//   vq_step/float/...                                 one token behind T others
//   vq_ratio/float/bias:B/...                         this and attention_forward (causal), turn by turn on the same
//                                                     operands: ratio = time of full / time of vq, median of the rounds;
//                                                     bias:0 computes what full attention does, bias:1 adds r, u, v_bias
//
// Linear time: per_token_us must not depend on T.  FLOPS counts 2 d S for the codes, 2 d (2 S + 2 (M + 1)) for the rest, as if
// every token had M before it and all codes behind those; backward 2 d (6 S + 3 (M + 1) + 3 (M + L/2)).
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/vq_attention.hpp>

#include "harness.hpp"

#include <string>
#include <vector>

namespace {

using bench::Index;
namespace eb = eigenblocks;

constexpr Index kHeads = 1, kDim = 64, kCodes = 512, kMemory = 512;

template <class S>
struct Operands {
  eb::Matrix<S> q, k, v, codebook, out;
  eb::VqBias<S> bias;
  eb::VqAttentionOptions options{.heads = kHeads, .block_len = 512, .mem_len = kMemory};
  explicit Operands(Index tokens)
      : q(bench::random_matrix<S>(tokens, kHeads * kDim, 1, 0.35)),
        k(bench::random_matrix<S>(tokens, kHeads * kDim, 2, 0.35)),
        v(bench::random_matrix<S>(tokens, kHeads * kDim, 3)),
        codebook(bench::random_matrix<S>(kHeads * kCodes, kDim, 4, 0.35)),
        out(tokens, kHeads * kDim),
        bias{bench::random_matrix<S>(kHeads, kDim, 5, 0.35),
             bench::random_matrix<S>(kHeads, kDim, 6, 0.35),
             bench::random_matrix<S>(kHeads * (kMemory + 1), kDim, 7, 0.35)} {}
  auto forward() { return eb::vq_attention_forward(q, k, v, codebook, out, options, bias); }
  auto full() {
    return eb::attention_forward(q, k, v, out, {.heads = kHeads, .scale = 1.0},
                                 eb::attention_rule(eb::causal()));
  }
};

std::string sizes(Index tokens) {
  return "/T:" + std::to_string(tokens) + "/S:" + std::to_string(kCodes) +
         "/M:" + std::to_string(kMemory) + "/H:" + std::to_string(kHeads) +
         "/d:" + std::to_string(kDim);
}

double search_flops(Index tokens) {
  return 2.0 * static_cast<double>(kHeads * kDim) * static_cast<double>(tokens * kCodes);
}
double attention_flops(Index tokens) {
  return 4.0 * static_cast<double>(kHeads * kDim) *
         static_cast<double>(tokens * (kCodes + kMemory + 1));
}

/// Microseconds of processor time for a token.
void per_token(benchmark::State& state, Index tokens) {
  using benchmark::Counter;
  state.counters["per_token_us"] = Counter(1e-6 * static_cast<double>(tokens),
                                           Counter::kIsIterationInvariantRate | Counter::kInvert);
}

template <class S>
void forward(Index tokens) {
  const std::string name = std::string("vq_attention/") + bench::scalar_name<S>() + sizes(tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    Operands<S> x(tokens);
    const double flops = search_flops(tokens) + attention_flops(tokens);
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)},
                   [&] { x.forward(); });
    per_token(state, tokens);
  })->Unit(benchmark::kMillisecond);
}

template <class S>
void nearest(Index tokens) {
  const std::string name = std::string("vq_nearest/") + bench::scalar_name<S>() + sizes(tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    Operands<S> x(tokens);
    const double flops = search_flops(tokens);
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)},
                   [&] { eb::vq_nearest(x.k, x.codebook, kHeads); });
  })->Unit(benchmark::kMillisecond);
}

template <class S>
void backward(Index tokens) {
  const std::string name = std::string("vq_backward/") + bench::scalar_name<S>() + sizes(tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    Operands<S> x(tokens);
    const auto saved = x.forward();
    const eb::Matrix<S> dout = bench::random_matrix<S>(tokens, x.v.cols(), 8);
    eb::Matrix<S> dq = x.q, dk = x.k, dv = x.v;
    eb::VqBias<S> dbias;
    const double flops = 2.0 * static_cast<double>(kHeads * kDim) *
                         static_cast<double>(tokens * (6 * kCodes + 6 * kMemory + 3 * 512 / 2));
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)}, [&] {
      eb::vq_attention_backward(saved, x.q, x.v, x.codebook, x.out, dout, dq, dk, dv, x.options,
                                x.bias, &dbias);
    });
    per_token(state, tokens);
  })->Unit(benchmark::kMillisecond);
}

/// Reads codebook (twice), r, the memory and the means once.
template <class S>
void step(Index tokens) {
  const std::string name = std::string("vq_step/") + bench::scalar_name<S>() + sizes(tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    Operands<S> x(tokens);
    eb::VqState<S> vq = eb::vq_state(x.codebook, kDim, x.options);
    eb::vq_attention_step(vq, x.q, x.k, x.v, x.codebook, x.out, x.options, x.bias);
    const double bytes = static_cast<double>(sizeof(S)) *
                         static_cast<double>(kHeads * kDim * (3 * kCodes + 2 * kMemory));
    bench::measure(state, {.bytes = bytes, .limit = {}}, [&] {
      eb::vq_attention_step(vq, x.q.topRows(1), x.k.topRows(1), x.v.topRows(1), x.codebook,
                            x.out.topRows(1), x.options, x.bias);
    });
    per_token(state, 1);
  })->Unit(benchmark::kMicrosecond);
}

/// Rounds of one run of each; the median of the ratios of a round.
void ratio(Index tokens, int rounds, bool bias) {
  const std::string name = std::string("vq_ratio/float/bias:") + (bias ? "1" : "0") + sizes(tokens);
  benchmark::RegisterBenchmark(name.c_str(),
                               [=](benchmark::State& state) {
                                 Operands<float> x(tokens);
                                 if (!bias) x.bias = {};
                                 std::vector<double> ratios;
                                 x.forward();
                                 for (auto _ : state) {
                                   for (int round = 0; round < rounds; ++round) {
                                     const double a = bench::cpu_seconds();
                                     x.forward();
                                     const double b = bench::cpu_seconds();
                                     x.full();
                                     const double c = bench::cpu_seconds();
                                     ratios.push_back((c - b) / (b - a));
                                   }
                                 }
                                 std::sort(ratios.begin(), ratios.end());
                                 state.counters["ratio"] = ratios[ratios.size() / 2];
                                 state.counters["least"] = ratios.front();
                                 state.counters["most"] = ratios.back();
                               })
      ->Unit(benchmark::kMillisecond)
      ->Iterations(1);
}

}  // namespace

int main(int argc, char** argv) {
  for (Index tokens : {2048, 4096, 8192, 16384, 32768, 65536}) forward<float>(tokens);
  forward<double>(8192);
  nearest<float>(8192);
  for (Index tokens : {4096, 16384}) backward<float>(tokens);
  for (Index tokens : {4096, 65536}) step<float>(tokens);
  for (const bool bias : {false, true}) {
    ratio(8192, 15, bias);
    ratio(32768, 5, bias);
  }
  return bench::run(argc, argv);
}
