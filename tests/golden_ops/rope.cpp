// Rotary positions along one axis: rope_apply, rope_layout_convert, rope_cos_sin.
#include "rope_forms.hpp"

#include <eigenblocks/position/rope.hpp>

#include <stdexcept>
#include <string>

namespace {

using namespace eigenblocks;

RopeLayout other(RopeLayout layout) {
  return layout == RopeLayout::half ? RopeLayout::interleaved : RopeLayout::half;
}

template <class C>
void rope_apply(C& c) {
  using S = golden::scalar_of<C>;
  const Index rotary_dim = c.param_int("rotary_dim");
  const RopeLayout layout = golden::layout_named(c.param("layout"));
  RotaryFrequencies frequencies = rope_frequencies(rotary_dim, c.param_real("base", 10000.0));
  frequencies.attention_factor = c.param_real("attention_factor", 1.0);
  const RopeOptions options{.heads = c.shape("in.x").at(1)};
  const Matrix<S> x = c.matrix("in.x");
  const bool gradient = c.has("gin.x");
  const Matrix<S> dy = gradient ? c.matrix("gout.y") : x;
  const Vector<double> positions = c.exact("in.positions");
  const RotaryTable<S> table(frequencies, layout);

  golden::check_rope_forms(c, x, dy, positions, table, RotaryTable<S>(frequencies, layout, 0),
                           options);

  Matrix<S> y(x.rows(), x.cols()), dx(x.rows(), x.cols());
  const auto expect = [&] {
    c.expect("out.y", y);
    if (gradient) c.expect("gin.x", dx);
  };

  c.form("through the other layout");
  const RotaryTable<S> converted(frequencies, other(layout));
  const auto there_and_back = [&](const Matrix<S>& in, auto&& turn) {
    Matrix<S> out = rope_convert_layout(in, layout, other(layout), rotary_dim, options);
    turn(out, positions, converted, options, serial);
    return rope_convert_layout(out, other(layout), layout, rotary_dim, options);
  };
  y = there_and_back(x, [](auto&&... all) { rope_in_place(all...); });
  dx = there_and_back(dy, [](auto&&... all) { rope_backward_in_place(all...); });
  expect();
}

template <class C>
void rope_layout_convert(C& c) {
  const std::string direction = c.param("direction");
  if (direction != "interleaved_to_half" && direction != "half_to_interleaved") {
    throw std::runtime_error("direction " + direction + " is unknown");
  }
  const RopeLayout from =
      golden::layout_named(direction == "interleaved_to_half" ? "interleaved" : "half");
  const Index rotary_dim = c.param_int("rotary_dim");
  const RopeOptions options{.heads = c.shape("in.x").at(1)};
  c.expect("out.y", rope_convert_layout(c.matrix("in.x"), from, other(from), rotary_dim, options));
  if (!c.has("gin.x")) return;
  c.expect("gin.x",
           rope_convert_layout(c.matrix("gout.y"), other(from), from, rotary_dim, options));
}

template <class C>
void rope_cos_sin_rows(C& c) {
  using S = golden::scalar_of<C>;
  const RotaryFrequencies frequencies =
      rope_frequencies(c.param_int("rotary_dim"), c.param_real("base", 10000.0));
  const Vector<double> positions = c.exact("in.positions");
  const Index rows = positions.size(), pairs = frequencies.pairs();

  Matrix<double> cos(rows, pairs), sin(rows, pairs);
  rope_cos_sin(positions, frequencies, cos, sin);
  c.expect_exact("out.cos", cos);
  c.expect_exact("out.sin", sin);

  c.form("rows of a table");  // what a table makes of the vectors (1, 0)
  Matrix<S> unit = Matrix<S>::Zero(rows, 2 * pairs);
  unit.leftCols(pairs).setOnes();
  const Matrix<S> turned =
      rope(unit, positions, RotaryTable<S>(frequencies, RopeLayout::half), {.heads = 1});
  c.expect("out.cos", turned.leftCols(pairs));
  c.expect("out.sin", turned.rightCols(pairs));
}

}  // namespace

void register_rope(golden::Registry& registry) {
  registry.add("rope_apply", [](auto& c) { rope_apply(c); });
  registry.add("rope_layout_convert", [](auto& c) { rope_layout_convert(c); });
  registry.add("rope_cos_sin", [](auto& c) { rope_cos_sin_rows(c); });
}
