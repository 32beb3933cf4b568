// Position policies with a window: rope_relative_positions, rerope_attention, rerope_decode.
#include "rope_forms.hpp"

#include <eigenblocks/attention/rerope.hpp>
#include <eigenblocks/position/logn.hpp>

#include <stdexcept>
#include <string>

namespace {

using namespace eigenblocks;

/// The case's policy; rope is leaky_rerope with leak 1 at any window.
template <class C>
NearFarPosition position(C& c) {
  const std::string variant = c.param("variant");
  // Cases name all three; a policy uses its own.
  const Index window = c.param_int("window", 1), group = c.param_int("group", 1);
  const double leak = c.param_real("leak", 1.0);
  if (variant == "rope") return leaky_rerope(window, 1.0);
  if (variant == "rerope") return rerope(window);
  if (variant == "leaky_rerope") return leaky_rerope(window, leak);
  if (variant == "self_extend") return self_extend(window, group);
  throw std::runtime_error("variant " + variant + " is unknown");
}

template <class C>
void relative_positions(C& c) {
  const Index queries = c.param_int("num_queries"), keys = c.param_int("num_keys"),
              offset = c.param_int("q_offset", 0);
  const auto expect = [&](const auto& policy) {
    c.expect_exact("out.relative", rope_relative_positions(policy, queries, keys, offset));
  };
  const std::string variant = c.param("variant");
  if (variant == "pi") {
    c.param_int("window", 1);
    c.param_int("group", 1);
    expect(linear_position(c.param_real("leak")));
  } else {
    expect(position(c));
  }
  std::vector<Index> visible;
  for (Index r = 0; r < queries; ++r) {
    for (Index j = 0; j < keys; ++j) visible.push_back(causal()(r + offset, j, 0));
  }
  c.expect_integers("out.visible", visible);
}

/// One case of rerope_attention and rerope_decode.
template <class S>
struct Case {
  Matrix<S> q, k, v;
  AttentionShape shape;
  RotaryTable<S> table;
  Vector<S> row_scale;
  NearFarPosition policy;

  template <class C>
  explicit Case(C& c)
      : q(c.matrix("in.q")),
        k(c.matrix("in.k")),
        v(c.matrix("in.v")),
        table(rope_frequencies(c.param_int("rotary_dim"), c.param_real("base", 10000.0)),
              golden::layout_named(c.param("layout"))),
        policy(position(c)) {
    if (c.param_int("causal", 1) != 1) throw std::runtime_error("causal must be 1");
    shape.heads = c.shape("in.q")[1];
    shape.kv_heads = c.shape("in.k")[1];
    shape.query_offset = c.param_int("q_offset", 0);
    if (c.has_param("scale")) shape.scale = c.param_real("scale");
    const Index length = c.param_int("logn_train_length", 0);
    row_scale = length == 0 ? Vector<S>::Ones(q.rows())
                            : logn_scale<S>(shape.query_offset, q.rows(), length);
  }
  Index out_cols() const { return shape.heads * v.cols() / shape.kv_heads; }
  auto rule() const { return attention_rule(causal(), {}, policy); }

  /// The rows through a cache, `prefill` of them first, then `chunk` at a time.
  Matrix<S> steps(Index prefill, Index chunk) const {
    ReropeCache<S> cache(policy, {.kv_heads = shape.kv_heads,
                                  .head_dim = k.cols() / shape.kv_heads,
                                  .value_dim = v.cols() / shape.kv_heads});
    Matrix<S> out(q.rows(), out_cols());
    for (Index t = 0; t < q.rows();) {
      const Index n = std::min(t == 0 && prefill > 0 ? prefill : chunk, q.rows() - t);
      const Vector<S> scale = row_scale.segment(t, n);
      rerope_attention_step(cache, q.middleRows(t, n), k.middleRows(t, n), v.middleRows(t, n),
                            out.middleRows(t, n), shape, table, rule(), {.row_scale = &scale});
      t += n;
    }
    return out;
  }
};

template <class C>
void rerope_attention(C& c) {
  using S = golden::scalar_of<C>;
  const Case<S> x(c);
  const AttentionTensors<S> tensors{.row_scale = &x.row_scale};
  Matrix<S> out(x.q.rows(), x.out_cols());
  const auto saved =
      rerope_attention_forward(x.q, x.k, x.v, out, x.shape, x.table, x.rule(), tensors);
  c.expect("out.o", out);
  if (c.has("gin.q")) {
    Matrix<S> dq(x.q.rows(), x.q.cols()), dk(x.k.rows(), x.k.cols()), dv(x.v.rows(), x.v.cols());
    rerope_attention_backward(saved, x.q, x.k, x.v, out, c.matrix("gout.o"), dq, dk, dv, x.shape,
                              x.table, x.rule(), tensors);
    c.expect("gin.q", dq);
    c.expect("gin.k", dk);
    c.expect("gin.v", dv);
  }
  if (x.shape.query_offset != 0 || x.q.rows() != x.k.rows()) return;
  c.form("step by step");
  c.expect("out.o", x.steps(0, 1));
}

template <class C>
void rerope_decode(C& c) {
  const Case<golden::scalar_of<C>> x(c);
  const Index prefill = c.param_int("prefill");
  c.expect("out.o", x.steps(prefill, 1));
  c.form("in chunks");
  c.expect("out.o", x.steps(prefill, 3));
}

}  // namespace

void register_rerope(golden::Registry& registry) {
  registry.add("rope_relative_positions", [](auto& c) { relative_positions(c); });
  registry.add("rerope_attention", [](auto& c) { rerope_attention(c); });
  registry.add("rerope_decode", [](auto& c) { rerope_decode(c); });
}
