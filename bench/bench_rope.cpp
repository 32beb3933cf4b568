// Rotary embedding against the memory limit.
//
//   rope/float/half/T:512/H:8/d:64             in place, what a layer does
//   rope_out/... rope_back/...                 out of place; backward, in place
//   rope_positions/float/half/KIND/...         in place, positions beyond the table and as lists
//
// bytes_per_second, of the best iteration, counts every channel once read and once written.
// `limit` is the best time of a sweep that moves the same bytes, over the best time of the
// rotation, both timed in turns: multiplying the buffer by a constant in place for the in-place
// forms, a copy for rope_out.  1 means that the rotation is free.
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/position/rope.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace {

using namespace eigenblocks;

enum class Form { in_place, out, back };

struct Shape {
  Index rows, heads, dim;
};

template <class F>
double seconds(F&& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Times `run` and `sweep` in turns; reports the time of `run`.
template <class Run, class Sweep>
void time_against(benchmark::State& state, double bytes, Run&& run, Sweep&& sweep) {
  double best = 1e9, best_sweep = 1e9;
  for (auto _ : state) {
    best_sweep = std::min(best_sweep, seconds(sweep));
    const double time = seconds(run);
    best = std::min(best, time);
    state.SetIterationTime(time);
  }
  state.counters["bytes_per_second"] = bytes / best;
  state.counters["limit"] = best_sweep / best;
}

/// x *= 1 as a sweep over memory; 16-bit types are moved as integers, so that no conversion enters
/// the limit.
template <class S>
void sweep_in_place(Matrix<S>& x) {
  using Unit = std::conditional_t<sizeof(S) == 2, std::int32_t, S>;
  Eigen::Map<Eigen::Array<Unit, Eigen::Dynamic, 1>> all(
      reinterpret_cast<Unit*>(x.data()), x.size() * Index{sizeof(S)} / Index{sizeof(Unit)});
  Unit one = 1;
  benchmark::DoNotOptimize(one);  // or the compiler drops the loop
  all = all * one;
  benchmark::ClobberMemory();
}

template <class S>
void rotate(benchmark::State& state, Form form, RopeLayout layout, Shape shape) {
  Random random(1);
  const RotaryTable<compute_t<S>> table(rope_frequencies(shape.dim), layout);
  const RopeOptions options{.heads = shape.heads};
  Matrix<S> x =
      normal_matrix<float>(random, shape.rows, shape.heads * shape.dim).template cast<S>();
  Matrix<S> y = x;
  const double bytes = 2.0 * static_cast<double>(x.size()) * sizeof(S);
  const auto copy = [&] {
    std::memcpy(y.data(), x.data(), sizeof(S) * static_cast<std::size_t>(x.size()));
    benchmark::ClobberMemory();
  };
  const auto in_place = [&] { sweep_in_place(x); };
  switch (form) {
    case Form::in_place:
      return time_against(
          state, bytes, [&] { rope_in_place(x, 1000, table, options); }, in_place);
    case Form::out:
      return time_against(
          state, bytes, [&] { rope_forward(x, 1000, table, y, options); }, copy);
    case Form::back:
      return time_against(
          state, bytes, [&] { rope_backward_in_place(x, 1000, table, options); }, in_place);
  }
}

void rotate_at(benchmark::State& state, const std::string& kind, Shape shape) {
  Random random(1);
  const RotaryTable<float> table(rope_frequencies(shape.dim), RopeLayout::half);
  Matrix<float> x = normal_matrix<float>(random, shape.rows, shape.heads * shape.dim);
  Vector<double> list =
      Vector<double>::LinSpaced(shape.rows, 1000.0, 999.0 + static_cast<double>(shape.rows));
  if (kind == "reals") list.array() += 0.5;
  const RopePositions positions =
      kind == "beyond" ? RopePositions(10'000'000) : RopePositions(list);
  time_against(
      state, 2.0 * static_cast<double>(x.size()) * sizeof(float),
      [&] { rope_in_place(x, positions, table, {.heads = shape.heads}); },
      [&] { sweep_in_place(x); });
}

std::string suffix(Shape shape) {
  return "/T:" + std::to_string(shape.rows) + "/H:" + std::to_string(shape.heads) +
         "/d:" + std::to_string(shape.dim);
}

template <class S>
void add(const char* op, const char* scalar, Form form, Shape shape) {
  for (const RopeLayout layout : {RopeLayout::half, RopeLayout::interleaved}) {
    const std::string name = std::string(op) + "/" + scalar +
                             (layout == RopeLayout::half ? "/half" : "/interleaved") +
                             suffix(shape);
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
      rotate<S>(state, form, layout, shape);
    })->UseManualTime();
  }
}

}  // namespace

int main(int argc, char** argv) {
  constexpr Shape kModel{512, 8, 64};
  for (const Shape shape :
       {Shape{1, 32, 128}, Shape{512, 1, 64}, kModel, Shape{512, 32, 128}, Shape{2048, 8, 64}}) {
    add<float>("rope", "float", Form::in_place, shape);
  }
  for (const Shape shape : {kModel, Shape{2048, 8, 64}}) {
    add<float>("rope_out", "float", Form::out, shape);
    add<float>("rope_back", "float", Form::back, shape);
  }
  add<double>("rope", "double", Form::in_place, kModel);
  add<Eigen::half>("rope", "half", Form::in_place, kModel);
  add<Eigen::bfloat16>("rope", "bfloat16", Form::in_place, kModel);
  for (const char* kind : {"beyond", "integers", "reals"}) {
    const std::string name = std::string("rope_positions/float/half/") + kind + suffix(kModel);
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
      rotate_at(state, kind, kModel);
    })->UseManualTime();
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
