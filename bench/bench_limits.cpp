// The limits of this machine, against which every other figure is read.
//
//   bench_limits [--threads=N]      N defaults to the number of hardware threads; 1 is always shown as well
//
// FMA: loop of independent fused multiply-adds on the widest packet of this build.  exp2: simd::exp2 on 2048 numbers in
// the first-level cache.  Memory: float streams over a working set of the given size per thread; the bytes of copy
// and triad count reads and writes, not the line that a plain store fetches first.  Best of about 20 batches.
// With several threads all run at the same time and the sum of the work is divided by the time of the slowest.
#include <eigenblocks/core/thread_pool.hpp>

#include "support.hpp"

#include <thread>
#include <vector>

namespace {

using bench::Index;

/// Best time of `threads` simultaneous calls of f(thread), once each: processor time of one, wall clock of several.
template <class F>
double best_together(int threads, F&& f) {
  const eigenblocks::thread_pool pool(threads);
  const auto clock = threads == 1 ? bench::cpu_seconds : bench::wall_seconds;
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < 15; ++round) {
    const double start = clock();
    pool.run(threads, [&](Index task, int) { f(task); });
    best = std::min(best, clock() - start);
  }
  return best;
}

/// Total rate of `threads` threads that each do `amount` of something per call of f(thread), called until about 5 ms are full.
template <class F>
double rate_together(int threads, double amount, F&& f) {
  const double once = bench::best_seconds([&] { f(0); });
  const long calls = std::max(1L, static_cast<long>(5e-3 / once));
  const double seconds = best_together(threads, [&](Index thread) {
    for (long i = 0; i < calls; ++i) f(thread);
  });
  return amount * static_cast<double>(calls) * threads / seconds;
}

template <class S>
double fma_together(int threads) {
  constexpr long turns = 20000;
  std::vector<S> sink(static_cast<std::size_t>(threads) * 64);
  return rate_together(threads, 2.0 * 12 * turns * eigenblocks::simd::kLanes<S>, [&](Index thread) {
    sink[static_cast<std::size_t>(thread) * 64] =
        bench::detail::fma_loop<S>(turns, S(0.999), S(1e-9));
    bench::touch(sink.data());
  });
}

void print_memory(int threads, double bytes) {
  const auto count = static_cast<std::size_t>(threads);
  const auto n = static_cast<Index>(bytes / sizeof(float));
  std::vector<eigenblocks::Vector<float>> data(count);
  for (auto& x : data) x.setZero(n);
  std::vector<float> sink(count * 16);
  const auto of = [&](Index thread) { return data[static_cast<std::size_t>(thread)].data(); };
  const double read = rate_together(threads, bytes, [&](Index thread) {
    sink[static_cast<std::size_t>(thread) * 16] = bench::detail::read_loop(of(thread), n);
    bench::touch(of(thread));
  });
  const double copy = rate_together(threads, bytes, [&](Index thread) {
    bench::detail::write_loop<false>(of(thread) + n / 2, of(thread), nullptr, 0, n / 2);
    bench::touch(of(thread));
  });
  const double triad = rate_together(threads, bytes, [&](Index thread) {
    bench::detail::write_loop<true>(of(thread) + n / 3 * 2, of(thread), of(thread) + n / 3, 2,
                                    n / 3);
    bench::touch(of(thread));
  });
  const double kilobytes = bytes / 1024;
  char size[32];
  std::snprintf(size, sizeof(size), kilobytes < 1024 ? "%.0f KB" : "%.0f MB",
                kilobytes < 1024 ? kilobytes : kilobytes / 1024);
  std::printf("| %-7s | %7d | %8.1f | %8.1f | %8.1f |\n", size, threads, read * 1e-9, copy * 1e-9,
              triad * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--threads=", 10) == 0 && std::atoi(argv[i] + 10) >= 1) {
      threads = std::atoi(argv[i] + 10);
    } else {
      std::fprintf(stderr, "usage: bench_limits [--threads=N]\n");
      return 1;
    }
  }
  std::printf("%s; %s; %s; Eigen %s; %s\n\n", bench::cpu_name().c_str(),
              bench::compiler_name().c_str(), bench::build_flags().c_str(),
              bench::eigen_version().c_str(), bench::cache_sizes().c_str());
  std::vector<int> teams{1};
  if (threads > 1) teams.push_back(threads);
  std::printf("| threads | FMA float GFLOP/s | FMA double GFLOP/s |\n|---|---|---|\n");
  for (int team : teams) {
    std::printf("| %7d | %17.1f | %18.1f |\n", team, fma_together<float>(team) * 1e-9,
                fma_together<double>(team) * 1e-9);
  }
  std::printf("\nexp2: %.2f float/ns, %.2f double/ns (1 thread)\n\n",
              bench::exp_rate<float>() * 1e-9, bench::exp_rate<double>() * 1e-9);
  std::printf(
      "| size    | threads | read     | copy r+w | triad    | (GB/s)\n|---|---|---|---|---|\n");
  for (int team : teams) {
    for (double kilobytes : {16.0, 256.0, 1024.0, 8192.0, 32768.0, 262144.0})
      print_memory(team, kilobytes * 1024);
  }
  return 0;
}
