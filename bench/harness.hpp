// Google Benchmark with this project's counters, context and main.
//
//   int main(int argc, char** argv) {
//     benchmark::RegisterBenchmark("copy/float/n:4096", [](benchmark::State& state) {
//       bench::measure(state, {.bytes = 2 * 4096 * 4, .limit = [] { return 2 * 4096 * 4 / bench::copy_rate(2 * 4096 * 4); }},
//                      [&] { to = from; });
//     });
//     return bench::run(argc, argv);
//   }
//
// Counters: FLOPS and bytes_per_second are means over the run (Google Benchmark's, by processor time); `limit` is the share
// of the limit, best against best: the time the limit needs for this work, timed right before and right after, divided
// by the best batch of the run.  1 is as fast as the machine can; above 1 says that the limit was disturbed.
#pragma once

#include <benchmark/benchmark.h>

#include <functional>

#include "support.hpp"

namespace bench {

/// What one call does.  limit() times, at that moment, the seconds that the machine needs for it at the least.
struct Work {
  double flops = 0;
  double bytes = 0;
  std::function<double()> limit;
};

/// Seconds of the limits, for Work::limit.  (One thread: everything here is processor time.)
template <eb::RealScalar S>
std::function<double()> fma_limit(double flops) {
  return [=] { return flops / fma_peak<S>(); };
}
/// For loops that read and write `bytes` in all, and touch nothing else between two calls.
inline std::function<double()> copy_limit(double bytes) {
  return [=] { return bytes / copy_rate(bytes); };
}
/// The same where the output is the memory of the input.
inline std::function<double()> in_place_limit(double bytes) {
  return [=] { return bytes / in_place_rate(bytes); };
}
/// Element-wise loops with one exponential per element: the slower of the two.
template <eb::RealScalar S>
std::function<double()> exp_copy_limit(double count, double bytes) {
  return [=] { return std::max(count / exp_rate<S>(), bytes / copy_rate(bytes)); };
}

/// Runs f under `state` and sets the counters.
template <class F>
void measure(benchmark::State& state, const Work& work, F&& f) {
  f();
  double limit = work.limit ? work.limit() : 0;
  // The clock is read every `batch` calls, 50 us or more apart, so that reading it costs nothing.
  double start = cpu_seconds();
  f();
  const long batch = std::max(1L, static_cast<long>(5e-5 / (cpu_seconds() - start)));
  double best = std::numeric_limits<double>::infinity();
  long calls = 0;
  start = cpu_seconds();
  for (auto _ : state) {
    f();
    if (++calls == batch) {
      const double now = cpu_seconds();
      best = std::min(best, (now - start) / static_cast<double>(batch));
      start = cpu_seconds();
      calls = 0;
    }
  }
  using benchmark::Counter;
  if (work.flops > 0) {
    state.counters["FLOPS"] =
        Counter(work.flops, Counter::kIsIterationInvariantRate, Counter::OneK::kIs1000);
  }
  if (work.bytes > 0) {
    state.SetBytesProcessed(static_cast<std::int64_t>(work.bytes) *
                            static_cast<std::int64_t>(state.iterations()));
  }
  if (work.limit && std::isfinite(best)) {
    limit = std::min(limit, work.limit());
    state.counters["limit"] = limit / best;
  }
}

/// main() after all benchmarks are registered.  Takes Google Benchmark's options and --l3=MB (support.hpp).
inline int run(int argc, char** argv) {
  take_l3_option(argc, argv);
  benchmark::AddCustomContext("cpu", cpu_name());
  benchmark::AddCustomContext("compiler", compiler_name());
  benchmark::AddCustomContext("flags", build_flags());
  benchmark::AddCustomContext("eigen", eigen_version());
  benchmark::AddCustomContext("eigen_caches", cache_sizes());
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
