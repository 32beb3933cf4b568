// Golden op mha_layer: the whole layer, full pass and backward, in chunks and token by token.
#include "support/golden.hpp"

#include <eigenblocks/attention/mha.hpp>

#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

template <class C>
eb::MhaOptions read_options(C& c) {
  eb::MhaOptions o;
  o.heads = c.param_int("n_heads");
  o.kv_heads = c.param_int("n_kv_heads");
  o.head_dim = c.param_int("head_dim");
  o.rope_base = c.param_real("rope_theta");
  const std::string layout = c.param("rope_layout", "half");
  if (layout != "half" && layout != "interleaved")
    throw std::runtime_error("unknown rope_layout " + layout);
  o.rope_layout = layout == "half" ? eb::RopeLayout::half : eb::RopeLayout::interleaved;
  const std::string norm = c.param("qk_norm", "none");
  if (norm == "rms_head") {
    o.qk_norm = eb::QkNorm::rms_head;
  } else if (norm == "rms_full") {
    o.qk_norm = eb::QkNorm::rms_full;
  } else if (norm != "none") {
    throw std::runtime_error("unknown qk_norm " + norm);
  }
  o.norm_eps = c.param_real("norm_eps", 1e-6);
  o.window_left = c.param_int("window_left", -1);
  o.soft_cap = c.param_real("softcap", 0.0);
  if (c.has_param("scale")) o.scale = c.param_real("scale");
  return o;
}

template <class C>
eb::MhaWeights<golden::scalar_of<C>> read_weights(C& c) {
  using S = golden::scalar_of<C>;
  eb::MhaWeights<S> w;
  w.w_q = c.matrix("in.w_q");
  w.w_k = c.matrix("in.w_k");
  w.w_v = c.matrix("in.w_v");
  w.w_o = c.matrix("in.w_o");
  const auto optional = [&](const char* name, Vector<S>& v) {
    if (c.has(name)) v = c.vector(name);
  };
  optional("in.b_q", w.b_q);
  optional("in.b_k", w.b_k);
  optional("in.b_v", w.b_v);
  optional("in.b_o", w.b_o);
  optional("in.q_norm", w.q_norm);
  optional("in.k_norm", w.k_norm);
  optional("in.sinks", w.sinks);
  return w;
}

struct MhaOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const eb::Mha<S> layer(read_options(c));
    const eb::MhaWeights<S> weights = read_weights(c);
    const Matrix<S> x = c.matrix("in.x");
    const Index first = c.param_int("pos0", 0), rows = x.rows();

    Matrix<S> y(rows, x.cols());
    eb::MhaSaved<S> saved;
    eb::mha_forward(layer, weights, x, y, saved, {.first_position = first});
    c.expect("out.out", y);
    c.expect("out.k_cache", saved.k);
    c.expect("out.v_cache", saved.v);
    if (c.has("gin.x")) backward(c, layer, weights, saved, x, first);

    for (const Index chunk : {Index{1}, Index{3}, rows}) {
      c.form("steps of " + std::to_string(chunk));
      eb::MhaState<S> state = eb::mha_state(layer, 0, first);
      Matrix<S> out(rows, x.cols());
      for (Index t = 0; t < rows; t += chunk) {
        const Index n = std::min(chunk, rows - t);
        eb::mha_step(layer, weights, state, x.middleRows(t, n), out.middleRows(t, n));
      }
      c.expect("out.out", out);
      if (!state.cache.ring()) {
        c.expect("out.k_cache", state.cache.keys(0, rows));
        c.expect("out.v_cache", state.cache.values(0, rows));
      }
    }
  }

  template <class C, class S>
  static void backward(C& c, const eb::Mha<S>& layer, const eb::MhaWeights<S>& weights,
                       const eb::MhaSaved<S>& saved, const Matrix<S>& x, Index first) {
    Matrix<S> dx(x.rows(), x.cols());
    eb::MhaWeights<S> g;
    eb::mha_backward(layer, weights, saved, x, c.matrix("gout.out"), dx, g,
                     {.first_position = first});
    c.expect("gin.x", dx);
    c.expect("gin.w_q", g.w_q);
    c.expect("gin.w_k", g.w_k);
    c.expect("gin.w_v", g.w_v);
    c.expect("gin.w_o", g.w_o);
    const auto optional = [&](const char* name, const Vector<S>& v) {
      if (v.size() != 0) c.expect(name, v);
    };
    optional("gin.b_q", g.b_q);
    optional("gin.b_k", g.b_k);
    optional("gin.b_v", g.b_v);
    optional("gin.b_o", g.b_o);
    optional("gin.q_norm", g.q_norm);
    optional("gin.k_norm", g.k_norm);
    optional("gin.sinks", g.sinks);
  }
};

}  // namespace

void register_mha(golden::Registry& registry) { registry.add("mha_layer", MhaOp{}); }
