// Golden ops mla (full pass and backward; step by step, absorbed and expanded) and kv_cache_size.
#include "rope_forms.hpp"

#include <eigenblocks/attention/cache_size.hpp>
#include <eigenblocks/attention/mla.hpp>

#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

struct MlaOp {
  template <class C>
  static eb::MlaOptions read_options(C& c) {
    eb::MlaOptions o;
    o.heads = c.param_int("n_heads");
    o.nope_dim = c.param_int("qk_nope_dim");
    o.rope_dim = c.param_int("qk_rope_dim");
    o.value_dim = c.param_int("v_dim");
    o.q_rank = c.param_int("q_lora_rank", 0);
    o.kv_rank = c.param_int("kv_lora_rank");
    o.rope_base = c.param_real("rope_theta", o.rope_base);
    o.rope_layout = golden::layout_named(c.param("rope_layout", "interleaved"));
    o.norm_eps = c.param_real("norm_eps", o.norm_eps);
    if (c.has_param("scale")) o.scale = c.param_real("scale");
    return o;
  }

  /// f(name, parameter) for every parameter the file holds.
  template <class C, class W, class F>
  static void for_each(C& c, W& w, F&& f) {
    const auto visit = [&](const char* name, auto& parameter) {
      if (c.has(std::string("in.") + name)) f(name, parameter);
    };
    visit("w_q", w.w_q);
    visit("w_dq", w.w_dq);
    visit("b_dq", w.b_dq);
    visit("q_norm", w.q_norm);
    visit("w_uq", w.w_uq);
    visit("w_dkv", w.w_dkv);
    visit("b_dkv", w.b_dkv);
    visit("kv_norm", w.kv_norm);
    visit("w_ukv", w.w_ukv);
    visit("w_o", w.w_o);
    visit("b_o", w.b_o);
  }

  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const eb::Mla<S> layer(read_options(c));
    eb::MlaWeights<S> weights;
    for_each(c, weights, [&]<class P>(const char* name, P& parameter) {
      const std::string file_name = std::string("in.") + name;
      if constexpr (std::is_same_v<P, Vector<S>>) {
        parameter = c.vector(file_name);
      } else {
        parameter = c.matrix(file_name);
      }
    });
    const Matrix<S> x = c.matrix("in.x");
    const Index first = c.param_int("pos0", 0), rows = x.rows();
    const Index rank = layer.options().kv_rank, rope = layer.options().rope_dim;

    Matrix<S> y(rows, x.cols());
    eb::MlaSaved<S> saved;
    eb::mla_forward(layer, weights, x, y, saved, {.first_position = first});
    c.expect("out.out", y);
    c.expect("out.c_kv", saved.latent.leftCols(rank));
    c.expect("out.k_rope", saved.latent.rightCols(rope));
    if (c.has("gout.out")) {
      Matrix<S> dx(rows, x.cols());
      eb::MlaWeights<S> g;
      eb::mla_backward(layer, weights, saved, x, c.matrix("gout.out"), dx, g,
                       {.first_position = first});
      if (c.has("gin.x")) c.expect("gin.x", dx);
      for_each(c, g, [&](const char* name, const auto& gradient) {
        const std::string file_name = std::string("gin.") + name;
        if (c.has(file_name)) c.expect(file_name, gradient);
      });
    }

    for (const eb::MlaForm form : {eb::MlaForm::absorbed, eb::MlaForm::expanded}) {
      for (const Index chunk : {Index{1}, Index{3}, std::max<Index>(rows, 1)}) {
        c.form((form == eb::MlaForm::absorbed ? "absorbed, steps of " : "expanded, steps of ") +
               std::to_string(chunk));
        eb::MlaState<S> state = eb::mla_state(layer, 0, first);
        Matrix<S> out(rows, x.cols());
        for (Index t = 0; t < rows; t += chunk) {
          const Index n = std::min(chunk, rows - t);
          eb::mla_step(layer, weights, state, x.middleRows(t, n), out.middleRows(t, n), form);
        }
        c.expect("out.out", out);
        c.expect("out.c_kv", Matrix<S>(state.cache.latents()));
        c.expect("out.k_rope", Matrix<S>(state.cache.rope_keys()));
      }
    }
  }
};

struct KvCacheSizeOp {
  template <class C>
  void operator()(C& c) const {
    const std::string name = c.param("kind");
    const eb::KvCacheSizeOptions options{.layers = c.param_int("n_layers", 1),
                                         .heads = c.param_int("n_heads", 0),
                                         .kv_heads = c.param_int("n_kv_heads", 0),
                                         .head_dim = c.param_int("head_dim", 0),
                                         .kv_rank = c.param_int("kv_lora_rank", 0),
                                         .rope_dim = c.param_int("rope_dim", 0)};
    for (const auto& [text, kind] : {std::pair{"mha", eb::KvCacheKind::mha},
                                     {"gqa", eb::KvCacheKind::gqa},
                                     {"mqa", eb::KvCacheKind::mqa},
                                     {"mla", eb::KvCacheKind::mla}}) {
      if (name == text)
        return c.expect_integers("out.elements_per_token", {eb::kv_cache_size(kind, options)});
    }
    throw std::runtime_error("unknown kind " + name);
  }
};

}  // namespace

void register_mla(golden::Registry& registry) {
  registry.add("mla", MlaOp{});
  registry.add("kv_cache_size", KvCacheSizeOp{});
}
