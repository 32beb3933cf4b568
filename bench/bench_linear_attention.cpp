// Gated linear attention, one thread: chunked against recurrent, forward and backward.
//
//   linear_attention/float/chunked/head/T:8192/d:64/H:4     gate: none, head (a scalar per head) or channel; limit: the FMA peak
//   linear_attention/float/recurrent/...                    token by token, one pass over the state each
//   linear_attention/float/backward/...                     the backward alone
//   linear_attention/float/chunk:64/...                     other chunk lengths than the default
//
// FLOPS counts what the recurrence needs at the least, 4 d e for each token and head (8 d e for the backward: dq, dk, dv
// and the state's gradient), whatever the form spends on top, so that forms and chunk lengths compare by it; `spent` is
// the share of the limit with the products of a chunk's tokens among themselves, C (d + e), counted (and the
// backward's recomputed states) as well.  token_head is the time for one token of one head.
#include <eigenblocks/attention/linear.hpp>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

constexpr Index kHeads = 4;
constexpr const char* kGates[] = {"none", "head", "channel"};

enum class Pass { forward, recurrent, backward };

template <class S>
void add(Pass pass, int gate, Index tokens, Index d, Index chunk = 0) {
  const char* const pass_name = pass == Pass::recurrent  ? "recurrent"
                                : pass == Pass::backward ? "backward"
                                                         : "chunked";
  std::string name = std::string("linear_attention/") + bench::scalar_name<S>() + "/" + pass_name +
                     "/" + kGates[gate] + "/T:" + std::to_string(tokens) +
                     "/d:" + std::to_string(d) + "/H:" + std::to_string(kHeads);
  if (chunk != 0) name += "/chunk:" + std::to_string(chunk);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const Index width = kHeads * d;
    const eb::Matrix<S> q = bench::random_matrix<S>(tokens, width, 1);
    const eb::Matrix<S> k = bench::random_matrix<S>(tokens, width, 2, 0.1);
    const eb::Matrix<S> v = bench::random_matrix<S>(tokens, width, 3);
    const eb::Matrix<S> decay =
        -bench::random_matrix<S>(tokens, gate == 2 ? width : kHeads, 4, 0.05).cwiseAbs();
    const eb::LinearAttentionOptions options{.heads = kHeads, .chunk = chunk};
    const eb::LinearAttentionTensors<S> tensors{.log_decay = gate == 0 ? nullptr : &decay};
    eb::Matrix<S> out(tokens, width), last(width, d);
    const double cells = static_cast<double>(tokens * kHeads) * static_cast<double>(d * d);
    const double flops = cells * (pass == Pass::backward ? 8 : 4);
    const bench::Work work{.flops = flops, .limit = bench::fma_limit<S>(flops)};
    if (pass == Pass::forward) {
      bench::measure(state, work, [&] {
        eb::linear_attention_forward(q, k, v, out, options, tensors, &last);
        bench::touch(out.data());
      });
    } else if (pass == Pass::recurrent) {
      bench::measure(state, work, [&] {
        eb::linear_attention_recurrent(q, k, v, out, options, tensors, &last);
        bench::touch(out.data());
      });
    } else {
      eb::Matrix<S> dq(tokens, width), dk = dq, dv = dq, dgate = decay;
      bench::measure(state, work, [&] {
        eb::linear_attention_backward(q, k, v, v, dq, dk, dv, options, tensors, nullptr,
                                      {.log_decay = gate == 0 ? nullptr : &dgate});
        bench::touch(dq.data());
      });
    }
    const double c = static_cast<double>(chunk == 0 ? 32 : chunk),
                 width_ratio = c / static_cast<double>(d);
    const double spent = pass == Pass::forward    ? 4 + 2 * width_ratio
                         : pass == Pass::backward ? 12 + 5 * width_ratio
                                                  : 4;  // in units of d e
    state.counters["spent"] = state.counters["limit"].value * spent * cells / flops;
    state.counters["token_head"] = benchmark::Counter(
        static_cast<double>(tokens * kHeads),
        benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  })->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Index d : {64, 128}) {
    for (const Index tokens : {2048, 8192, 32768}) {
      for (const int gate : {0, 1, 2}) add<float>(Pass::forward, gate, tokens, d);
      for (const int gate : {0, 1, 2}) add<float>(Pass::recurrent, gate, tokens, d);
      for (const int gate : {0, 1, 2}) add<float>(Pass::backward, gate, tokens, d);
    }
    add<double>(Pass::forward, 2, 2048, d);
    for (const Index chunk : {8, 16, 24, 32, 48, 64, 96, 128}) {
      for (const int gate : {0, 1, 2}) add<float>(Pass::forward, gate, 2048, d, chunk);
      for (const int gate : {0, 2}) add<float>(Pass::backward, gate, 2048, d, chunk);
    }
  }
  return bench::run(argc, argv);
}
