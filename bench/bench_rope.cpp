// Rotary embedding against the memory limit, one thread.
//
//   rope/float/half/T:512/H:8/d:64             in place, what a layer does
//   rope_out/... rope_back/...                 out of place; backward, in place
//   rope_positions/float/half/KIND/...         in place, positions beyond the table and as lists
//   rope_nd/float/LAYOUT/AXES/...              in place, three axes: the patches of an image behind a text
//   rope_nd/float/half/cyclic/text/...         the same, all coordinates equal
//
// bytes_per_second counts every channel once read and once written.  limit: reading and writing back the same bytes
// without arithmetic (rope_out: copying them).  1 means that the rotation is free.
#include <eigenblocks/position/rope.hpp>
#include <eigenblocks/position/rope_nd.hpp>

#include "harness.hpp"

namespace {

using bench::Index;
namespace eb = eigenblocks;

enum class Form { in_place, out, back };

struct Shape {
  Index rows, heads, dim;
  std::string suffix() const {
    return "/T:" + std::to_string(rows) + "/H:" + std::to_string(heads) +
           "/d:" + std::to_string(dim);
  }
};

template <class S>
void rotate(const char* op, Form form, Shape shape) {
  for (const eb::RopeLayout layout : {eb::RopeLayout::half, eb::RopeLayout::interleaved}) {
    const std::string name = std::string(op) + "/" + bench::scalar_name<S>() +
                             (layout == eb::RopeLayout::half ? "/half" : "/interleaved") +
                             shape.suffix();
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
      const eb::RotaryTable<eb::compute_t<S>> table(eb::rope_frequencies(shape.dim), layout);
      const eb::RopeOptions options{.heads = shape.heads};
      eb::Matrix<S> x = bench::random_matrix<S>(shape.rows, shape.heads * shape.dim, 1);
      eb::Matrix<S> y = x;
      const double bytes = 2.0 * static_cast<double>(x.size()) * sizeof(S);
      const auto limit =
          form == Form::out ? bench::copy_limit(bytes) : bench::in_place_limit(bytes);
      bench::measure(state, {.bytes = bytes, .limit = limit}, [&] {
        if (form == Form::in_place) eb::rope_in_place(x, 1000, table, options);
        if (form == Form::out) eb::rope_forward(x, 1000, table, y, options);
        if (form == Form::back) eb::rope_backward_in_place(x, 1000, table, options);
        bench::touch(y.data());
      });
    })->Unit(benchmark::kMicrosecond);
  }
}

void rotate_at(const std::string& kind, Shape shape) {
  benchmark::RegisterBenchmark(
      ("rope_positions/float/half/" + kind + shape.suffix()).c_str(),
      [=](benchmark::State& state) {
        const eb::RotaryTable<float> table(eb::rope_frequencies(shape.dim), eb::RopeLayout::half);
        eb::Matrix<float> x = bench::random_matrix<float>(shape.rows, shape.heads * shape.dim, 1);
        eb::Vector<double> list = eb::Vector<double>::LinSpaced(
            shape.rows, 1000.0, 999.0 + static_cast<double>(shape.rows));
        if (kind == "reals") list.array() += 0.5;
        const eb::RopePositions positions =
            kind == "beyond" ? eb::RopePositions(10'000'000) : eb::RopePositions(list);
        const double bytes = 2.0 * static_cast<double>(x.size()) * sizeof(float);
        bench::measure(state, {.bytes = bytes, .limit = bench::in_place_limit(bytes)}, [&] {
          eb::rope_in_place(x, positions, table, {.heads = shape.heads});
          bench::touch(x.data());
        });
      })
      ->Unit(benchmark::kMicrosecond);
}

/// The allocations of rope_nd.hpp, over three axes.
struct NamedAxes {
  const char* name;
  eb::RopeLayout layout;
  eb::RotaryAxes axes;
};

std::vector<NamedAxes> all_axes(Index dim) {
  const eb::RotaryFrequencies whole = eb::rope_frequencies(dim),
                              part = eb::rope_frequencies(dim / 3);
  const Index pairs = dim / 2, third = pairs / 3;
  return {{"half/axial", eb::RopeLayout::half, eb::axial_axes(part, 3)},
          {"half_per_axis/axial", eb::RopeLayout::half_per_axis, eb::axial_axes(part, 3)},
          {"half/alternating", eb::RopeLayout::half, eb::alternating_axes(part, 3)},
          {"half/cyclic", eb::RopeLayout::half, eb::cyclic_axes(whole, 3)},
          {"interleaved/cyclic", eb::RopeLayout::interleaved, eb::cyclic_axes(whole, 3)},
          {"half/section", eb::RopeLayout::half,
           eb::section_axes(whole, {pairs - 2 * third, third, third})},
          {"half/interleaved_section", eb::RopeLayout::half,
           eb::interleaved_section_axes(whole, {pairs - 2 * third, third, third})}};
}

/// Heads of 96 channels, which three axes share evenly.
void rotate_nd(const NamedAxes& kind, bool text, Shape shape) {
  benchmark::RegisterBenchmark(
      ("rope_nd/float/" + std::string(kind.name) + (text ? "/text" : "") + shape.suffix()).c_str(),
      [=](benchmark::State& state) {
        const eb::RotaryNdTable<float> table(kind.axes, kind.layout);
        eb::Matrix<float> x = bench::random_matrix<float>(shape.rows, shape.heads * shape.dim, 1);
        constexpr Index kFirst = 1000, kWidth = 32;
        eb::Matrix<Index> at(shape.rows, 3);
        for (Index i = 0; i < shape.rows; ++i) {
          at.row(i) << kFirst, kFirst + i / kWidth, kFirst + i % kWidth;
          if (text) at.row(i).setConstant(kFirst + i);
        }
        const double bytes = 2.0 * static_cast<double>(x.size()) * sizeof(float);
        bench::measure(state, {.bytes = bytes, .limit = bench::in_place_limit(bytes)}, [&] {
          eb::rope_in_place(x, at, table, {.heads = shape.heads});
          bench::touch(x.data());
        });
      })
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  constexpr Shape model{512, 8, 64};
  for (const Shape shape :
       {Shape{1, 32, 128}, Shape{512, 1, 64}, model, Shape{512, 32, 128}, Shape{2048, 8, 64}}) {
    rotate<float>("rope", Form::in_place, shape);
  }
  for (const Shape shape : {model, Shape{2048, 8, 64}}) {
    rotate<float>("rope_out", Form::out, shape);
    rotate<float>("rope_back", Form::back, shape);
  }
  rotate<double>("rope", Form::in_place, model);
  rotate<Eigen::half>("rope", Form::in_place, model);
  rotate<Eigen::bfloat16>("rope", Form::in_place, model);
  for (const char* kind : {"beyond", "integers", "reals"}) rotate_at(kind, model);
  for (const NamedAxes& kind : all_axes(96)) rotate_nd(kind, false, {512, 8, 96});
  rotate_nd(all_axes(96)[3], true, {512, 8, 96});
  return bench::run(argc, argv);
}
