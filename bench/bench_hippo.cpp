// HiPPO-LegS in O(N), one thread.
//
//   legs_step/float/N:64/H:64         256 inputs into a memory of H channels, bilinear; the state stays in the caches
//   legs_step/float/N:64/H:64/rows:1  one input a call, as in decoding
//   legs_backward/...                 the gradient of 256 inputs
//   legs_solve/float/N:256/H:4096     (I - lambda A)^-1 v, and legs_solve_transposed: from memory to memory
//   legs_project/float/N:64/T:16384   the exact projection of a sequence of one channel
//
// A coefficient of a step is 7 flop in 4 instructions.  limit of legs_step and legs_backward: as many fused multiply-adds.
// limit of the solves: copying v to out.  per_coefficient: time for one coefficient of one channel and one input.
#include <eigenblocks/ssm/legs.hpp>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

struct Shape {
  Index states, channels;
  std::string suffix() const {
    return "/N:" + std::to_string(states) + "/H:" + std::to_string(channels);
  }
};

void per_coefficient(benchmark::State& state, double count) {
  state.counters["per_coefficient"] = benchmark::Counter(
      count, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

template <class S>
void step(Shape shape, Index rows) {
  const std::string name = std::string("legs_step/") + bench::scalar_name<S>() + shape.suffix() +
                           (rows == 1 ? "/rows:1" : "");
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    auto memory = eb::legs_memory<S>({.states = shape.states}, shape.channels);
    const eb::Matrix<S> u = bench::random_matrix<S>(rows, shape.channels, 1);
    memory.inputs = 1000;
    const double count = static_cast<double>(rows * shape.states * shape.channels);
    bench::measure(state, {.flops = 7 * count, .limit = bench::fma_limit<S>(8 * count)}, [&] {
      eb::legs_step(memory, u);
      bench::touch(memory.coefficients.data());
    });
    per_coefficient(state, count);
  })->Unit(benchmark::kMicrosecond);
}

template <class S>
void backward(Shape shape) {
  const std::string name = std::string("legs_backward/") + bench::scalar_name<S>() + shape.suffix();
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    constexpr Index rows = 256;
    const eb::Matrix<S> g = bench::random_matrix<S>(shape.states, shape.channels, 1);
    eb::Matrix<S> du(rows, shape.channels);
    const double count = static_cast<double>(rows * shape.states * shape.channels);
    bench::measure(state, {.flops = 7 * count, .limit = bench::fma_limit<S>(8 * count)}, [&] {
      eb::legs_backward(&g, nullptr, du, {.states = shape.states});
      bench::touch(du.data());
    });
    per_coefficient(state, count);
  })->Unit(benchmark::kMicrosecond);
}

template <class S>
void solve(Shape shape, bool transposed) {
  const std::string name = std::string(transposed ? "legs_solve_transposed/" : "legs_solve/") +
                           bench::scalar_name<S>() + shape.suffix();
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Matrix<S> v = bench::random_matrix<S>(shape.states, shape.channels, 1);
    eb::Matrix<S> out = v;
    const double bytes = 2.0 * static_cast<double>(v.size()) * sizeof(S);
    bench::measure(state,
                   {.flops = 7.0 * static_cast<double>(v.size()),
                    .bytes = bytes,
                    .limit = bench::copy_limit(bytes)},
                   [&] {
                     if (transposed) {
                       eb::legs_solve_transposed(v, out, 0.01);
                     } else {
                       eb::legs_solve(v, out, 0.01);
                     }
                     bench::touch(out.data());
                   });
  })->Unit(benchmark::kMicrosecond);
}

void project(Index states, Index steps) {
  const std::string name =
      "legs_project/float/N:" + std::to_string(states) + "/T:" + std::to_string(steps);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Matrix<float> u = bench::random_matrix<float>(steps, 1, 1);
    eb::Matrix<float> c(states, 1);
    const double count = static_cast<double>(states * steps);
    bench::measure(state, {.flops = 8 * count, .limit = bench::fma_limit<double>(8 * count)}, [&] {
      eb::legs_project(u, c);
      bench::touch(c.data());
    });
    per_coefficient(state, count);
  })->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Shape shape : {Shape{64, 1}, Shape{64, 64}, Shape{256, 64}, Shape{64, 1024}}) {
    step<float>(shape, 256);
    backward<float>(shape);
  }
  step<double>({64, 64}, 256);
  backward<double>({64, 64});
  for (const Shape shape : {Shape{64, 1}, Shape{64, 64}, Shape{64, 1024}}) step<float>(shape, 1);
  for (const Shape shape : {Shape{64, 64}, Shape{256, 4096}}) {
    for (const bool transposed : {false, true}) solve<float>(shape, transposed);
  }
  solve<double>({64, 64}, false);
  project(64, 16384);
  project(256, 16384);
  return bench::run(argc, argv);
}
