// Rotary positions along several axes, and the positions themselves: rope_apply_nd, mrope_positions,
// rope_tie_positions, xpos_apply.
#include "rope_forms.hpp"

#include <eigenblocks/position/positions.hpp>
#include <eigenblocks/position/rope_nd.hpp>
#include <eigenblocks/position/xpos.hpp>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;

std::vector<Index> integers_in(const std::string& text) {
  std::vector<Index> values;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    values.push_back(golden::parse_number<Index>("sections", part));
  }
  return values;
}

template <class C>
RotaryAxes axes_of(C& c) {
  const std::string allocation = c.param("freq_alloc");
  const Index rotary_dim = c.param_int("rotary_dim"), axes = c.shape("in.positions").at(1);
  const double base = c.param_real("base", 10000.0);
  if (allocation == "axial" || allocation == "axial_alternating") {
    if (rotary_dim % (2 * axes) != 0) throw std::runtime_error("axes must divide the pairs");
    const RotaryFrequencies part = rope_frequencies(rotary_dim / axes, base);
    return allocation == "axial" ? axial_axes(part, axes) : alternating_axes(part, axes);
  }
  const RotaryFrequencies whole = rope_frequencies(rotary_dim, base);
  if (allocation == "cyclic") return cyclic_axes(whole, axes);
  const std::vector<Index> sections = integers_in(c.param("sections"));
  if (allocation == "section") return section_axes(whole, sections);
  if (allocation == "section_interleaved") return interleaved_section_axes(whole, sections);
  throw std::runtime_error("freq_alloc " + allocation + " is unknown");
}

template <class C>
void rope_apply_nd(C& c) {
  using S = golden::scalar_of<C>;
  const RotaryAxes axes = axes_of(c);
  const RopeLayout layout = golden::layout_named(c.param("layout"));
  c.has_param("sections");  // cases of other allocations may name them
  const RopeOptions options{.heads = c.shape("in.x").at(1)};
  const Matrix<S> x = c.matrix("in.x");
  const bool gradient = c.has("gin.x");
  const Matrix<S> dy = gradient ? c.matrix("gout.y") : x;
  const Vector<double> flat = c.exact("in.positions");
  const Matrix<double> positions =
      Eigen::Map<const Matrix<double>>(flat.data(), x.rows(), axes.axes);
  const RotaryNdTable<S> table(axes, layout);

  golden::check_rope_forms(c, x, dy, positions, table, RotaryNdTable<S>(axes, layout, 0), options);

  Matrix<S> y(x.rows(), x.cols()), dx(x.rows(), x.cols());
  const auto expect = [&] {
    c.expect("out.y", y);
    if (gradient) c.expect("gin.x", dx);
  };

  if (layout == RopeLayout::half_per_axis) return;
  c.form("one axis after the other");  // the tables of one axis, the other pairs at rest
  y = x;
  dx = dy;
  for (Index a = 0; a < axes.axes; ++a) {
    RotaryFrequencies own = axes.frequencies;
    for (Index p = 0; p < own.pairs(); ++p) {
      if (axes.axis[static_cast<std::size_t>(p)] != a) own.inv_freq[p] = 0;
    }
    const RotaryTable<S> one(own, layout);
    rope_in_place(y, positions.col(a), one, options);
    rope_backward_in_place(dx, positions.col(a), one, options);
  }
  expect();
}

template <class C>
std::vector<TokenSegment> segments_of(C& c) {
  const std::vector<Index> rows = c.integers("in.segments");
  std::vector<TokenSegment> segments;
  for (std::size_t at = 0; at + 3 < rows.size(); at += 4) {
    segments.push_back(
        {static_cast<SegmentKind>(rows[at]), rows[at + 1], rows[at + 2], rows[at + 3]});
  }
  return segments;
}

template <class C>
void mrope(C& c) {
  const auto one_of = [&](const char* name, const char* fallback, auto... choices) {
    const std::string given = c.param(name, std::string(fallback));
    int found = -1, at = 0;
    ((found = given == choices ? at : found, ++at), ...);
    if (found < 0) throw std::runtime_error(name + (" " + given) + " is unknown");
    return found;
  };
  const MropeOptions options{
      .variant = static_cast<MropeVariant>(
          one_of("variant", "qwen2_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
      .spatial_merge = c.param_int("spatial_merge", MropeOptions{}.spatial_merge),
      .tokens_per_second = c.param_real("tokens_per_second", 0.0),
      .advance = static_cast<MropeAdvance>(one_of("advance", "all", "all", "spatial"))};
  const Vector<double> seconds =
      c.has("in.second_per_grid") ? c.exact("in.second_per_grid") : Vector<double>();
  const MropePositions got = mrope_positions(
      segments_of(c), options,
      std::span<const double>(seconds.data(), static_cast<std::size_t>(seconds.size())));
  c.expect_integers("out.positions",
                    {got.positions.data(), got.positions.data() + got.positions.size()});
  c.expect_integers("out.next", {got.next});
  c.expect_integers("out.delta", {got.delta});
}

template <class C>
void rope_tie(C& c) {
  const std::string variant = c.param("variant");
  const auto named = [&] {
    if (variant == "v1_integer") return RopeTieVariant::v1_integer;
    if (variant == "v1_equivalent") return RopeTieVariant::v1_equivalent;
    if (variant == "v2") return RopeTieVariant::v2;
    if (variant == "v2_frames") return RopeTieVariant::v2_frames;
    throw std::runtime_error("variant " + variant + " is unknown");
  };
  const RopeTiePositions got = rope_tie_positions(segments_of(c), named());
  c.expect_exact("out.positions", got.positions);
  c.expect_exact("out.next", got.next);
}

template <class C>
void xpos_apply(C& c) {
  using S = golden::scalar_of<C>;
  const XposOptions standard;
  const RotaryFrequencies f =
      rope_frequencies(c.param_int("rotary_dim"), c.param_real("base", 10000.0));
  const RopeLayout layout = golden::layout_named(c.param("layout"));
  const XposOptions options{.gamma = c.param_real("gamma", standard.gamma),
                            .scale_base = c.param_real("scale_base", standard.scale_base),
                            .center = c.param_real("center", standard.center)};
  const Vector<double> positions = c.exact("in.positions");
  for (const Index table_positions : {65536, 0}) {
    if (table_positions == 0) c.form("without coarse table");
    const XposTables<S> tables = xpos_tables<S>(f, layout, options, table_positions);
    const auto side = [&](const std::string& name, const RotaryTable<S>& table) {
      const RopeOptions heads{.heads = c.shape("in." + name).at(1)};
      c.expect("out." + name, rope(c.matrix("in." + name), positions, table, heads));
      if (!c.has("gin." + name)) return;
      Matrix<S> d = c.matrix("gout." + name);
      rope_backward_in_place(d, positions, table, heads);
      c.expect("gin." + name, d);
    };
    side("q", tables.query);
    side("k", tables.key);
  }
}

}  // namespace

void register_rope_nd(golden::Registry& registry) {
  registry.add("rope_apply_nd", [](auto& c) { rope_apply_nd(c); });
  registry.add("mrope_positions", [](auto& c) { mrope(c); });
  registry.add("rope_tie_positions", [](auto& c) { rope_tie(c); });
  registry.add("xpos_apply", [](auto& c) { xpos_apply(c); });
}
