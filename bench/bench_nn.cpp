// Softmax, norms, activations and linear maps against the limits of the machine, one thread.
//
//   softmax/float/forward/N:64/D:1024           OP/scalar/forward|backward/N:rows/D:cols
//   OP = softmax log_softmax layernorm rmsnorm l2norm silu gelu swiglu;  rmsnorm also by heads of 64: .../H:16
//   linear/float/y|dx|dW/N:T/K:in/D:out         y = x W, dx = dy W^T, dW = x^T dy
//   sampling/float/top_k:40,top_p:0.9/D:V       one token: from logits to a drawn id
//
// bytes_per_second counts each operand matrix once.  limit: the time of a copy of that many bytes (working sets in
// the second cache and beyond it); for loops with an exponential the slower of that and of simd::exp2; for linear the
// slower of the FMA peak and of reading every operand once.  The backward passes of softmax and norms read each row
// twice, and the saved vectors besides.
#include <eigenblocks/nn/glu.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/nn/sampling.hpp>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

/// Operands of a row-wise op, N x D each; outputs are touched once so that no page is new while timing.
template <class S>
struct Rows {
  eb::Matrix<S> x, x2, g, y, dx, dx2;
  eb::Vector<S> gain, bias, saved, dgain, dbias;
  Rows(Index n, Index d, Index heads)
      : x(bench::random_matrix<S>(n, d, 1)),
        x2(bench::random_matrix<S>(n, d, 2)),
        g(bench::random_matrix<S>(n, d, 3)),
        y(x),
        dx(x),
        dx2(x),
        gain(bench::random_matrix<S>(d / heads, 1, 4)),
        bias(gain),
        saved(n * heads),
        dgain(gain),
        dbias(gain) {}
};

/// Registers op; `streams` operand matrices move per call, `exps` exponentials are taken per entry.
template <class S, class Prepare, class Run>
void rows(const char* op, const char* pass, Index n, Index d, int streams, int exps,
          Prepare prepare, Run run, Index heads = 1) {
  const std::string name = std::string(op) + "/" + bench::scalar_name<S>() + "/" + pass +
                           "/N:" + std::to_string(n) + "/D:" + std::to_string(d) +
                           (heads > 1 ? "/H:" + std::to_string(heads) : "");
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    Rows<S> r(n, d, heads);
    prepare(r);
    const double count = static_cast<double>(n * d), bytes = streams * count * sizeof(S);
    bench::measure(state,
                   {.bytes = bytes,
                    .limit = exps > 0 ? bench::exp_copy_limit<S>(exps * count, bytes)
                                      : bench::copy_limit(bytes)},
                   [&] {
                     run(r);
                     bench::touch(r.y.data());
                   });
  })->Unit(benchmark::kMicrosecond);
}

template <class S>
void row_ops(Index n, Index d) {
  const auto nothing = [](auto&) {};
  const auto softmax = [](auto& r) { eb::softmax_forward(r.x, r.y); };
  rows<S>("softmax", "forward", n, d, 2, 1, nothing, softmax);
  rows<S>("softmax", "backward", n, d, 3, 0, softmax,
          [](auto& r) { eb::softmax_backward(r.y, r.g, r.dx); });
  const auto log_softmax = [](auto& r) { eb::log_softmax_forward(r.x, r.y); };
  rows<S>("log_softmax", "forward", n, d, 2, 1, nothing, log_softmax);
  rows<S>("log_softmax", "backward", n, d, 3, 1, log_softmax,
          [](auto& r) { eb::log_softmax_backward(r.y, r.g, r.dx); });

  const auto layer = [](auto& r) { eb::layer_norm_forward(r.x, r.gain, r.bias, r.y, r.saved); };
  rows<S>("layernorm", "forward", n, d, 2, 0, nothing, layer);
  rows<S>("layernorm", "backward", n, d, 3, 0, layer, [](auto& r) {
    eb::layer_norm_backward(r.x, r.gain, r.saved, r.g, r.dx, r.dgain, r.dbias);
  });
  for (const Index heads : {Index(1), d / 64}) {
    const eb::RmsNormOptions options{.heads = heads};
    const auto rms = [=](auto& r) { eb::rms_norm_forward(r.x, r.gain, r.y, r.saved, options); };
    rows<S>("rmsnorm", "forward", n, d, 2, 0, nothing, rms, heads);
    rows<S>(
        "rmsnorm", "backward", n, d, 3, 0, rms,
        [=](auto& r) { eb::rms_norm_backward(r.x, r.gain, r.saved, r.g, r.dx, r.dgain, options); },
        heads);
  }
  const auto l2 = [](auto& r) { eb::l2_normalize_forward(r.x, r.y, r.saved); };
  rows<S>("l2norm", "forward", n, d, 2, 0, nothing, l2);
  rows<S>("l2norm", "backward", n, d, 3, 0, l2,
          [](auto& r) { eb::l2_normalize_backward(r.x, r.saved, r.g, r.dx); });

  for (const auto kind : {eb::Activation::silu, eb::Activation::gelu}) {
    const char* const op = kind == eb::Activation::silu ? "silu" : "gelu";
    rows<S>(op, "forward", n, d, 2, 1, nothing,
            [=](auto& r) { eb::activation_forward(kind, r.x, r.y); });
    rows<S>(op, "backward", n, d, 3, 1, nothing,
            [=](auto& r) { eb::activation_backward(kind, r.x, r.g, r.dx); });
  }
  rows<S>("swiglu", "forward", n, d, 3, 1, nothing,
          [](auto& r) { eb::glu_forward(r.x, r.x2, r.y); });
  rows<S>("swiglu", "backward", n, d, 5, 1, nothing,
          [](auto& r) { eb::glu_backward(r.x, r.x2, r.g, r.dx, r.dx2); });
}

template <class S>
void linear(Index tokens, Index in, Index out) {
  const double flops = 2.0 * static_cast<double>(tokens) * static_cast<double>(in * out);
  const auto add = [=](const char* what, auto run) {
    const std::string name = std::string("linear/") + bench::scalar_name<S>() + "/" + what +
                             "/N:" + std::to_string(tokens) + "/K:" + std::to_string(in) +
                             "/D:" + std::to_string(out);
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
      const auto x = bench::random_matrix<S>(tokens, in, 1),
                 w = bench::random_matrix<S>(in, out, 2);
      eb::Matrix<S> y = bench::random_matrix<S>(tokens, out, 3), dx = x, dw = w;
      const double bytes = sizeof(S) * static_cast<double>(x.size() + w.size() + y.size());
      const auto limit = [=] {
        return std::max(flops / bench::fma_peak<S>(), bytes / bench::read_rate(bytes));
      };
      bench::measure(state, {.flops = flops, .bytes = bytes, .limit = limit},
                     [&] { run(x, w, y, dx, dw); });
    })->Unit(benchmark::kMicrosecond);
  };
  add("y", [](auto& x, auto& w, auto& y, auto&, auto&) { eb::linear_forward(x, w, y); });
  add("dx", [](auto&, auto& w, auto& y, auto& dx, auto&) { eb::linear_backward_input(y, w, dx); });
  add("dW", [](auto& x, auto&, auto& y, auto&, auto& dw) { eb::linear_backward_weight(x, y, dw); });
}

void sampling(const char* variant, const eb::SamplingOptions& options, Index vocabulary) {
  const std::string name =
      std::string("sampling/float/") + variant + "/D:" + std::to_string(vocabulary);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Vector<float> logits = bench::random_matrix<float>(vocabulary, 1, 1, 3.0);
    eb::SamplingWorkspace<float> workspace;
    eb::Random random(1);
    const double count = static_cast<double>(vocabulary);
    bench::measure(
        state, {.bytes = 4 * count, .limit = bench::exp_copy_limit<float>(count, 8 * count)}, [&] {
          benchmark::DoNotOptimize(eb::sample_token(logits, random.uniform(), options, workspace));
        });
  })->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Index n : {64, 512, 8192}) row_ops<float>(n, 1024);
  row_ops<double>(64, 1024);
  linear<float>(1, 1024, 4096);
  linear<float>(512, 128, 256);
  linear<float>(512, 1024, 1024);
  linear<float>(2048, 1024, 4096);
  linear<double>(512, 512, 512);
  for (const Index vocabulary : {256, 131072}) {
    sampling("plain", {}, vocabulary);
    sampling("top_k:40,top_p:0.9", {.top_k = 40, .top_p = 0.9}, vocabulary);
    sampling("top_p:0.9", {.top_p = 0.9}, vocabulary);
    sampling("min_p:0.05", {.min_p = 0.05}, vocabulary);
  }
  return bench::run(argc, argv);
}
