// Kernels, layers and steps of S4D, S4 and RTF, one thread; H = 64 channels of N = 64 states (32 complex modes).
//
//   s4d_kernel/float/forward/T:16384/H:64       and backward; linear in T: token_channel is constant
//   s4_kernel/float/forward/T:16384/H:64        Cauchy sums and the inverse transform, C~ given
//   rtf_kernel/float/N:64/T:16384/H:64          flat in N
//   s4d_layer/float/T:16384/H:64                kernel and long convolution: what one forward pass of the layer costs
//   s4d_recurrence/float/T:16384/H:64           the layer token by token, channels in SIMD lanes
//   s4d_step/float/H:64                         one token of every channel; limit: the bytes of state and coefficients
//
// FLOPS counts what the kernel is made of at the least: 4 n for every channel and step of S4D (a complex product, real part),
// 8 (1 + R)^2 n for every channel and node of S4 (in double); tables, reciprocals and transforms are overhead.  token_channel
// is the time for one step of one channel.
#include <eigenblocks/ssm/rational.hpp>
#include <eigenblocks/ssm/s4.hpp>
#include <eigenblocks/ssm/s4d.hpp>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

constexpr Index kChannels = 64, kStates = 64, kModes = kStates / 2;

void per_token(benchmark::State& state, Index tokens) {
  state.counters["token_channel"] = benchmark::Counter(
      static_cast<double>(tokens * kChannels),
      benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

template <class F>
void add(const std::string& name, Index tokens, F&& f) {
  benchmark::RegisterBenchmark(
      (name + "/T:" + std::to_string(tokens) + "/H:" + std::to_string(kChannels)).c_str(),
      [=](benchmark::State& state) {
        f(state, tokens);
        per_token(state, tokens);
      })
      ->Unit(benchmark::kMillisecond);
}

template <class S>
eb::S4dParameters<S> s4d() {
  eb::Random random(1);
  return eb::s4d_parameters<S>(kChannels, kStates, random);
}
template <class S>
eb::S4Parameters<S> s4() {
  eb::Random random(1);
  return eb::s4_parameters<S>(kChannels, kStates, random);
}

template <class S>
void s4d_kernel(benchmark::State& state, Index tokens, bool backward) {
  const auto p = s4d<S>();
  eb::Matrix<S> k = bench::random_matrix<S>(tokens, kChannels, 1);
  const double flops = 4.0 * static_cast<double>(kModes * kChannels) * static_cast<double>(tokens) *
                       (backward ? 2 : 1);
  const bench::Work work{.flops = flops, .limit = bench::fma_limit<S>(flops)};
  if (backward) {
    eb::S4dParameters<S> dp;
    bench::measure(state, work, [&] {
      eb::s4d_kernel_backward(p, k, dp);
      bench::touch(dp.dt.data());
    });
  } else {
    bench::measure(state, work, [&] {
      eb::s4d_kernel_forward(p, k);
      bench::touch(k.data());
    });
  }
}

template <class S>
void s4_kernel(benchmark::State& state, Index tokens, bool backward) {
  const auto p = s4<S>();
  eb::Matrix<S> k = bench::random_matrix<S>(tokens, kChannels, 1);
  const double flops =
      32.0 * static_cast<double>(kModes * kChannels) * static_cast<double>(tokens / 2 + 1);
  const bench::Work work{.flops = flops, .limit = bench::fma_limit<double>(flops)};
  if (backward) {
    eb::S4Parameters<S> dp;
    bench::measure(state, {}, [&] {
      eb::s4_kernel_backward(p, k, dp);
      bench::touch(dp.dt.data());
    });
  } else {
    bench::measure(state, work, [&] {
      eb::s4_kernel_forward(p, k);
      bench::touch(k.data());
    });
  }
}

template <class S>
void rtf_kernel(benchmark::State& state, Index tokens, Index states) {
  eb::RationalParameters<S> p{
      .a = bench::random_matrix<S>(kChannels, states, 1, 0.3 / static_cast<double>(states)),
      .b = bench::random_matrix<S>(kChannels, states, 2),
      .h0 = eb::Vector<S>::Ones(kChannels)};
  eb::Matrix<S> k(tokens, kChannels);
  bench::measure(state, {}, [&] {
    eb::rational_kernel_forward(p, k);
    bench::touch(k.data());
  });
}

template <class S>
void s4d_layer(benchmark::State& state, Index tokens) {
  const auto p = s4d<S>();
  const eb::Matrix<S> u = bench::random_matrix<S>(tokens, kChannels, 1);
  eb::Matrix<S> y = u;
  eb::KernelLayerSaved<S> saved;
  bench::measure(state, {}, [&] {
    eb::s4d_forward(saved, p, u, y);
    bench::touch(y.data());
  });
}
/// The same by the recurrence, channels in lanes: what the kernel and the convolution have to beat.
template <class S>
void s4d_recurrence(benchmark::State& state, Index tokens) {
  auto s = eb::s4d_state(s4d<S>());
  const eb::Matrix<S> u = bench::random_matrix<S>(tokens, kChannels, 1);
  eb::Matrix<S> y = u;
  const double flops = 20.0 * static_cast<double>(kModes * kChannels) * static_cast<double>(tokens);
  bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)}, [&] {
    eb::s4d_step(s, u, y);
    bench::touch(y.data());
  });
}
template <class S>
void s4_layer(benchmark::State& state, Index tokens) {
  const auto p = s4<S>();
  const eb::Matrix<S> u = bench::random_matrix<S>(tokens, kChannels, 1);
  eb::Matrix<S> y = u;
  eb::KernelLayerSaved<S> saved;
  bench::measure(state, {}, [&] {
    eb::s4_forward(saved, p, u, y);
    bench::touch(y.data());
  });
}

/// bytes: what a step reads and writes of state and coefficients.
template <class S, class State, class F>
void step(benchmark::State& state, State s, Index rows_of_modes, F&& f) {
  const eb::Matrix<S> u = bench::random_matrix<S>(1, kChannels, 1);
  eb::Matrix<S> y = u;
  const double bytes = static_cast<double>(rows_of_modes * kChannels * Index(sizeof(S)));
  bench::measure(state, {.bytes = bytes, .limit = bench::copy_limit(bytes)}, [&] {
    f(s, u, y);
    bench::touch(y.data());
  });
}

}  // namespace

int main(int argc, char** argv) {
  for (const Index tokens : {1024, 4096, 16384, 65536}) {
    for (const bool backward : {false, true}) {
      const std::string pass = backward ? "/backward" : "/forward";
      add("s4d_kernel/float" + pass, tokens,
          [=](auto& state, Index t) { s4d_kernel<float>(state, t, backward); });
      add("s4_kernel/float" + pass, tokens,
          [=](auto& state, Index t) { s4_kernel<float>(state, t, backward); });
    }
    add("s4d_layer/float", tokens, [](auto& state, Index t) { s4d_layer<float>(state, t); });
    add("s4d_recurrence/float", tokens,
        [](auto& state, Index t) { s4d_recurrence<float>(state, t); });
    add("s4_layer/float", tokens, [](auto& state, Index t) { s4_layer<float>(state, t); });
    for (const Index states : {16, 64, 256}) {
      add("rtf_kernel/float/N:" + std::to_string(states), tokens,
          [=](auto& state, Index t) { rtf_kernel<float>(state, t, states); });
    }
  }
  add("s4d_step/float", 1, [](auto& state, Index) {
    step<float>(state, eb::s4d_state(s4d<float>()), 10 * kModes,
                [](auto& s, const auto& u, auto& y) { eb::s4d_step(s, u, y); });
  });
  add("s4_step/float", 1, [](auto& state, Index) {
    step<float>(state, eb::s4_state(s4<float>()), 16 * kModes,
                [](auto& s, const auto& u, auto& y) { eb::s4_step(s, u, y); });
  });
  return bench::run(argc, argv);
}
