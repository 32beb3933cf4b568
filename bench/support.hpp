// What the benchmark programs share: clocks, the limits of the machine, inputs, and the description of the run.
//
//   bench::fma_peak<float>()        flop/s of a loop of independent fused multiply-adds on Eigen's widest packet
//   bench::exp_rate<float>()        exponentials per second of simd::exp2 on data in the first-level cache
//   bench::read_rate(bytes)         bytes/s of summing a buffer of that size, again and again
//   bench::copy_rate(bytes)         bytes/s, read plus written, where source and target together have that size
//   bench::in_place_rate(bytes)     the same for reading and writing back a buffer of half that size
//   bench::triad_rate(bytes)        bytes/s of a = b + s c (two streams read, one written)
//   bench::sweep_seconds({{p, bytes}, ...})   the same for buffers that exist already
//   bench::random_matrix<S>(...)    normal entries, the same in every run and on every platform
//
// A limit is timed when it is asked for, not stored: the clock of a shared machine wanders within minutes, so a
// share of a limit only means something when both were timed in the same minute.  Limits are best-of-many; compare
// them with best-of-many.  "FMA" is a multiply and an add (2 flop) on targets without a fused instruction too.
//
// Nothing here needs Google Benchmark; harness.hpp adds that.
#pragma once

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/tile.hpp>  // detail::unroll

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <limits>
#include <string>

namespace bench {

namespace eb = eigenblocks;
using eb::Index;

/// Monotonic time in seconds.
inline double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Processor time of this process, all threads, in seconds: not disturbed by other processes taking the core.
inline double cpu_seconds() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Makes the compiler believe that *object is read and changed here.
template <class T>
void touch(T* object) {
  __asm__ volatile("" : : "g"(object) : "memory");
}

/// Best processor time of one call of the single-threaded f in seconds, in batches of at least 0.2 ms.
template <class F>
double best_seconds(F&& f, double budget = 0.02) {
  const auto batch = [&](long calls) {
    const double start = cpu_seconds();
    for (long i = 0; i < calls; ++i) f();
    return (cpu_seconds() - start) / static_cast<double>(calls);
  };
  double best = batch(1);
  long calls = 1;
  while (best * static_cast<double>(calls) < 2e-4) best = batch(calls *= 4);
  const double end = wall_seconds() + budget;
  for (int round = 0; round < 3 || wall_seconds() < end; ++round)
    best = std::min(best, batch(calls));
  return best;
}

namespace detail {

inline constexpr int kUnroll = 8;  // loads in flight per turn, and independent sums

template <class S>
EIGENBLOCKS_NOINLINE S fma_loop(long turns, S factor, S addend) {
  using P = eb::simd::Packet<S>;
  constexpr int chains = 12;  // latency 4 x 2 units = 8 would do; 12 + 2 operands fit 16 registers
  __asm__ volatile(
      ""
      :
      :
      : "memory");  // else the compiler sees a pure function and calls it once for all repetitions
  const P a = eb::simd::set1<P>(factor), b = eb::simd::set1<P>(addend);
  P x[chains];
  eb::detail::unroll<chains>([&](auto i) EIGENBLOCKS_INLINE_LAMBDA { x[i] = b; });
  for (long turn = 0; turn < turns; ++turn) {
    eb::detail::unroll<chains>([&](auto i) EIGENBLOCKS_INLINE_LAMBDA {
      x[i] = eb::simd::fma(x[i], a, b);
      eb::simd::keep_in_register(x[i]);
    });
  }
  P sum = x[0];
  eb::detail::unroll<chains - 1>(
      [&](auto i) EIGENBLOCKS_INLINE_LAMBDA { sum = eb::simd::add(sum, x[i + 1]); });
  S lanes[eb::simd::kLanes<S>];
  eb::simd::store<P>(lanes, sum);
  return lanes[0];
}

/// Sums n floats; n is cut to whole turns.
inline EIGENBLOCKS_NOINLINE float read_loop(const float* p, Index n) {
  using P = eb::simd::Packet<float>;
  constexpr int w = eb::simd::kLanes<float>;
  P sum[kUnroll];
  for (P& s : sum) s = eb::simd::zero<P>();
  for (Index i = 0; i + kUnroll * w <= n; i += kUnroll * w) {
    for (int j = 0; j < kUnroll; ++j)
      sum[j] = eb::simd::add(sum[j], eb::simd::load<P>(p + i + j * w));
  }
  for (int j = 1; j < kUnroll; ++j) sum[0] = eb::simd::add(sum[0], sum[j]);
  return eb::simd::sum(sum[0]);
}

/// to = a + scale b for kTriad, else to = a and b is left alone; to may be a.
template <bool kTriad>
EIGENBLOCKS_NOINLINE void write_loop(float* EIGENBLOCKS_RESTRICT to, const float* a, const float* b,
                                     float scale, Index n) {
  using P = eb::simd::Packet<float>;
  constexpr int w = eb::simd::kLanes<float>;
  const P factor = eb::simd::set1<P>(scale);
  for (Index i = 0; i + kUnroll * w <= n; i += kUnroll * w) {
    for (int j = 0; j < kUnroll; ++j) {
      P value = eb::simd::load<P>(a + i + j * w);
      if constexpr (kTriad) value = eb::simd::fma(eb::simd::load<P>(b + i + j * w), factor, value);
      eb::simd::keep_in_register(value);  // or the copy becomes a call of memcpy
      eb::simd::store<P>(to + i + j * w, value);
    }
  }
}

}  // namespace detail

template <eb::RealScalar S>
double fma_peak() {
  constexpr long turns = 20000;
  volatile S sink = 0;
  const double seconds =
      best_seconds([&] { sink = detail::fma_loop<S>(turns, S(0.999), S(1e-9)); });
  (void)sink;
  return 2.0 * 12 * turns * eb::simd::kLanes<S> / seconds;
}

template <eb::RealScalar S>
double exp_rate() {
  using P = eb::simd::Packet<S>;
  constexpr Index n = 2048;
  eb::Vector<S> x(n), y(n);
  for (Index i = 0; i < n; ++i) x[i] = -S(20) * static_cast<S>(i) / static_cast<S>(n);
  const double seconds = best_seconds([&] {
    for (Index i = 0; i < n; i += 4 * eb::simd::kLanes<S>) {
      for (Index j = i; j < i + 4 * eb::simd::kLanes<S>; j += eb::simd::kLanes<S>) {
        eb::simd::store<P>(y.data() + j, eb::simd::exp2(eb::simd::load<P>(x.data() + j)));
      }
    }
    touch(y.data());
  });
  return static_cast<double>(n) / seconds;
}

struct Buffer {
  const void* data;
  double bytes;
};

/// Seconds of reading these buffers one after the other, again and again.
inline double sweep_seconds(std::initializer_list<Buffer> buffers) {
  volatile float sink = 0;
  const double seconds = best_seconds([&] {
    for (const Buffer& buffer : buffers) {
      sink = detail::read_loop(static_cast<const float*>(buffer.data),
                               static_cast<Index>(buffer.bytes / sizeof(float)));
      touch(buffer.data);
    }
  });
  (void)sink;
  return seconds;
}

inline double read_rate(double bytes) {
  const eb::Vector<float> x = eb::Vector<float>::Zero(static_cast<Index>(bytes / sizeof(float)));
  return bytes / sweep_seconds({{x.data(), bytes}});
}

inline double copy_rate(double bytes) {
  const Index n = static_cast<Index>(bytes / 2 / sizeof(float));
  const eb::Vector<float> from = eb::Vector<float>::Zero(n);
  eb::Vector<float> to = from;
  return bytes / best_seconds([&] {
           detail::write_loop<false>(to.data(), from.data(), nullptr, 0, n);
           touch(to.data());
         });
}

/// The same for a buffer of half that size that is read and written back.
inline double in_place_rate(double bytes) {
  const Index n = static_cast<Index>(bytes / 2 / sizeof(float));
  eb::Vector<float> x = eb::Vector<float>::Zero(n);
  return bytes / best_seconds([&] {
           detail::write_loop<false>(x.data(), x.data(), nullptr, 0, n);
           touch(x.data());
         });
}

inline double triad_rate(double bytes) {
  const Index n = static_cast<Index>(bytes / 3 / sizeof(float));
  const eb::Vector<float> b = eb::Vector<float>::Zero(n), c = b;
  eb::Vector<float> a = b;
  return bytes / best_seconds([&] {
           detail::write_loop<true>(a.data(), b.data(), c.data(), 2, n);
           touch(a.data());
         });
}

/// rows x cols entries of N(0, stddev^2); equal arguments give equal bits everywhere.  Any storage scalar.
template <eb::StorageScalar S>
eb::Matrix<S> random_matrix(Index rows, Index cols, std::uint64_t seed, double stddev = 1.0) {
  eb::Random random(seed);
  eb::Matrix<S> x(rows, cols);
  eb::fill_normal(random, x, stddev);
  return x;
}

template <class S>
constexpr const char* scalar_name() {
  if constexpr (std::is_same_v<S, float>) {
    return "float";
  } else if constexpr (std::is_same_v<S, double>) {
    return "double";
  } else if constexpr (std::is_same_v<S, Eigen::half>) {
    return "half";
  } else {
    return "bfloat16";
  }
}

// ---- What the figures of a run depend on.

inline std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

inline std::string compiler_name() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

/// The flags as far as the compiler tells them; the build may define EIGENBLOCKS_BENCH_FLAGS as the exact string.
inline std::string build_flags() {
#if defined(EIGENBLOCKS_BENCH_FLAGS)
  return EIGENBLOCKS_BENCH_FLAGS;
#else
  std::string flags = eb::simd::kLanes<float> == 16  ? "AVX-512"
                      : eb::simd::kLanes<float> == 8 ? "AVX"
                      : eb::simd::kLanes<float> == 4 ? "128-bit"
                                                     : "scalar";
#if defined(__FMA__)
  flags += " FMA";
#endif
#if defined(__OPTIMIZE__)
  flags += " optimised";
#else
  flags += " NOT optimised";
#endif
#if !defined(NDEBUG)
  flags += " with assertions";
#endif
  return flags;
#endif
}

inline std::string eigen_version() {
  char text[32];
#if EIGEN_VERSION_AT_LEAST(5, 0, 0)
  std::snprintf(text, sizeof(text), "%d.%d.%d", EIGEN_MAJOR_VERSION, EIGEN_MINOR_VERSION,
                EIGEN_PATCH_VERSION);
#else
  std::snprintf(text, sizeof(text), "%d.%d.%d", EIGEN_WORLD_VERSION, EIGEN_MAJOR_VERSION,
                EIGEN_MINOR_VERSION);
#endif
  return text;
}

/// Cache sizes as Eigen sees them; its products are blocked for these.
inline std::string cache_sizes() {
  char text[80];
  std::snprintf(text, sizeof(text), "L1 %ld KB, L2 %ld KB, L3 %ld KB",
                static_cast<long>(Eigen::l1CacheSize() / 1024),
                static_cast<long>(Eigen::l2CacheSize() / 1024),
                static_cast<long>(Eigen::l3CacheSize() / 1024));
  return text;
}

/// Takes `--l3=MB` out of the arguments: Eigen blocks its products for a last-level cache of that size.  Virtual
/// machines report the whole host's cache, which makes Eigen's blocks too large.
inline void take_l3_option(int& argc, char** argv) {
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--l3=", 5) == 0) {
      const double megabytes = std::atof(argv[i] + 5);
      if (!(megabytes > 0)) {
        std::fprintf(stderr, "--l3=MB wants a size in megabytes, got '%s'\n", argv[i] + 5);
        std::exit(1);
      }
      Eigen::setCpuCacheSizes(Eigen::l1CacheSize(), Eigen::l2CacheSize(),
                              static_cast<Index>(megabytes * 1048576));
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
}

}  // namespace bench
