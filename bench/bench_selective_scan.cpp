// Selective scan (Mamba) and SSD (Mamba-2), one thread.
//
//   selective_scan/float/exp/T:4096/D:1024/N:16          an exponential for each t, d and n; limit: the rate of exponentials
//   selective_scan/float/powers/...                      A = -(1..N): one for each t and d, products for the rest; no such limit
//   selective_scan/float/backward/...                    the backward alone (an A that needs exponentials, two of each)
//   selective_scan/float/step/...                        one token against a state
//   ssd/float/chunked/T:2048/H:24/P:64/N:128/chunk:64    one group; limit: the FMA peak
//   ssd/float/recurrent/... , ssd/float/backward/...
//
// `cells` is T D N per second.  FLOPS of ssd counts what the recurrence needs at the least, 4 P N for each token and head
// (10 P N for the backward: states again, dX, dB, dC and the state's gradient), whatever the form spends on top; `spent`
// is the share of the limit with the products of a chunk's tokens among themselves counted too, of the triangle alone.
#include <eigenblocks/ssm/selective_scan.hpp>
#include <eigenblocks/ssm/ssd.hpp>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

enum class Pass { exp, powers, backward, step, chunked, recurrent };
constexpr const char* kPasses[] = {"exp", "powers", "backward", "step", "chunked", "recurrent"};

template <class S>
void add_scan(Pass pass, Index tokens, Index channels, Index states) {
  const std::string name = std::string("selective_scan/") + bench::scalar_name<S>() + "/" +
                           kPasses[int(pass)] + "/T:" + std::to_string(tokens) +
                           "/D:" + std::to_string(channels) + "/N:" + std::to_string(states);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Matrix<S> u = bench::random_matrix<S>(tokens, channels, 1);
    const eb::Matrix<S> delta = bench::random_matrix<S>(tokens, channels, 2, 0.05).cwiseAbs();
    eb::Matrix<S> a = -bench::random_matrix<S>(channels, states, 3).cwiseAbs();
    if (pass == Pass::powers) {
      for (Index n = 0; n < states; ++n) a.col(n).setConstant(-static_cast<S>(n + 1));
    }
    const eb::Matrix<S> b = bench::random_matrix<S>(tokens, states, 4);
    const eb::Matrix<S> c = bench::random_matrix<S>(tokens, states, 5);
    eb::Matrix<S> out = u;
    const double cells = static_cast<double>(tokens * channels) * static_cast<double>(states);
    bench::Work work;
    if (pass != Pass::powers) {
      const double exps = cells * (pass == Pass::backward ? 2 : 1);
      work.limit = [=] { return exps / bench::exp_rate<S>(); };
    }
    if (pass == Pass::backward) {
      eb::Matrix<S> du = u, ddelta = u, da = a, db = b, dc = c;
      bench::measure(state, work, [&] {
        eb::selective_scan_backward(u, delta, a, b, c, u, du, ddelta, da, db, dc);
        bench::touch(du.data());
      });
    } else if (pass == Pass::step) {
      auto memory = eb::selective_scan_state<S>(channels, states);
      bench::measure(state, work, [&] {
        eb::selective_scan_step(memory, u, delta, a, b, c, out);
        bench::touch(out.data());
      });
    } else {
      bench::measure(state, work, [&] {
        eb::selective_scan_forward(u, delta, a, b, c, out);
        bench::touch(out.data());
      });
    }
    state.counters["cells"] = benchmark::Counter(
        cells, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::OneK::kIs1000);
  })->Unit(benchmark::kMillisecond);
}

template <class S>
void add_ssd(Pass pass, Index tokens, Index heads, Index p, Index n, Index chunk = 64) {
  const std::string name = std::string("ssd/") + bench::scalar_name<S>() + "/" +
                           kPasses[int(pass)] + "/T:" + std::to_string(tokens) +
                           "/H:" + std::to_string(heads) + "/P:" + std::to_string(p) +
                           "/N:" + std::to_string(n) + "/chunk:" + std::to_string(chunk);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Matrix<S> x = bench::random_matrix<S>(tokens, heads * p, 1);
    const eb::Matrix<S> a = -bench::random_matrix<S>(tokens, heads, 2, 0.05).cwiseAbs();
    const eb::Matrix<S> b = bench::random_matrix<S>(tokens, n, 3, 0.1);
    const eb::Matrix<S> c = bench::random_matrix<S>(tokens, n, 4);
    const eb::SsdOptions options{.heads = heads, .chunk = chunk};
    eb::Matrix<S> out = x;
    const double cells = static_cast<double>(tokens * heads) * static_cast<double>(p * n);
    const double flops = cells * (pass == Pass::backward ? 10 : 4);
    const bench::Work work{.flops = flops, .limit = bench::fma_limit<S>(flops)};
    if (pass == Pass::backward) {
      eb::Matrix<S> dx = x, da = a, db = b, dc = c;
      bench::measure(state, work, [&] {
        eb::ssd_backward(x, a, b, c, x, dx, da, db, dc, options);
        bench::touch(dx.data());
      });
    } else if (pass == Pass::chunked) {
      bench::measure(state, work, [&] {
        eb::ssd_forward(x, a, b, c, out, options);
        bench::touch(out.data());
      });
    } else {
      bench::measure(state, work, [&] {
        eb::ssd_recurrent(x, a, b, c, out, options);
        bench::touch(out.data());
      });
    }
    // In units of P N: a triangle of chunk^2 / 2 multiply-adds for each P (twice backward), and for each N once a strip.
    const double strip =
        static_cast<double>(std::clamp<Index>(512 / p, 1, std::min<Index>(heads, 16)));
    const double q = static_cast<double>(chunk), shared = q / static_cast<double>(p) / strip;
    const double own = q / static_cast<double>(n);
    const double spent = pass == Pass::chunked    ? 4 + own + shared
                         : pass == Pass::backward ? 10 + 2 * own + 3 * shared
                                                  : 4;
    state.counters["spent"] = state.counters["limit"].value * spent * cells / flops;
  })->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Pass pass : {Pass::exp, Pass::powers, Pass::backward}) {
    add_scan<float>(pass, 1024, 128, 16);
    add_scan<float>(pass, 4096, 1024, 16);
    add_scan<double>(pass, 1024, 128, 16);
  }
  add_scan<float>(Pass::step, 1, 1024, 16);
  for (const Index chunk : {32, 64, 128}) {
    add_ssd<float>(Pass::chunked, 2048, 24, 64, 128, chunk);
    add_ssd<float>(Pass::backward, 2048, 24, 64, 128, chunk);
  }
  add_ssd<float>(Pass::chunked, 2048, 8, 64, 64);
  add_ssd<float>(Pass::recurrent, 2048, 24, 64, 128);
  add_ssd<double>(Pass::chunked, 2048, 8, 64, 128);
  return bench::run(argc, argv);
}
