// Rules around attention: relative_bias, kerple_bias, attention_scale, softmax_gradient_mass, normalized_attention,
// hwfa_window.
#include "support/golden.hpp"

#include <eigenblocks/attention/bias.hpp>
#include <eigenblocks/attention/hwfa.hpp>
#include <eigenblocks/attention/key_norm.hpp>
#include <eigenblocks/attention/scale.hpp>

#include <stdexcept>
#include <string>

namespace {

using namespace eigenblocks;

template <class C>
void relative_bias_op(C& c) {
  using S = golden::scalar_of<C>;
  const std::string kind = c.param("kind");
  const Index heads = c.param_int("num_heads"), queries = c.param_int("num_queries"),
              keys = c.param_int("num_keys");
  const auto expect = [&](const auto& score) {
    c.expect("out.bias", relative_bias<S>(score, heads, queries, keys, keys - queries));
  };
  if (kind == "alibi") return expect(alibi(alibi_slopes<S>(heads), AlibiDistance::past));
  if (kind == "sandwich") return expect(sandwich<S>(heads, keys / 2, c.param_int("dim")));
  const Vector<S> r1 = c.vector("in.r1"), r2 = c.vector("in.r2");
  if (kind == "kerple_log") return expect(kerple_log(r1, r2));
  if (kind == "kerple_power") return expect(kerple_power(r1, r2));
  throw std::runtime_error("kind " + kind + " is unknown");
}

template <class C>
void kerple_bias(C& c) {
  using S = golden::scalar_of<C>;
  const std::string kind = c.param("kind");
  const Vector<S> p = c.vector("in.p"), a = c.vector("in.a");
  const Index heads = p.size(), queries = c.param_int("Tq"), keys = c.param_int("Tk"),
              offset = c.param_int("q_offset", 0);
  Vector<S> dp = Vector<S>::Zero(heads), da = Vector<S>::Zero(heads);
  const auto run = [&](const auto& score) {
    c.expect("out.bias", relative_bias<S>(score, heads, queries, keys, offset));
    if (!c.has("gin.p")) return;
    const Vector<S> g =
        c.has("gout.bias") ? c.vector("gout.bias") : Vector<S>::Zero(heads * queries * keys);
    for (Index at = 0; at < g.size(); ++at) {
      const Index row = at / keys;
      score.accumulate(g[at], S(0), row % queries + offset, at % keys, row / queries);
    }
    c.expect("gin.p", dp);
    c.expect("gin.a", da);
  };
  if (kind == "log") return run(kerple_log_with_gradient(p, a, dp, da));
  if (kind == "power") return run(kerple_power_with_gradient(a, p, da, dp));
  throw std::runtime_error("kind " + kind + " is unknown");
}

template <class C>
void scale(C& c) {
  const std::string kind = c.param("kind");
  const ScaleRule rule = kind == "standard"             ? ScaleRule::standard
                         : kind == "log_n"              ? ScaleRule::log_n
                         : kind == "log_n_clamped"      ? ScaleRule::log_n_clamped
                         : kind == "gradmax_normal"     ? ScaleRule::gradmax_normal
                         : kind == "gradmax_normal_fit" ? ScaleRule::gradmax_normal_fit
                         : kind == "gradmax_cosine"
                             ? ScaleRule::gradmax_cosine
                             : throw std::runtime_error("kind " + kind + " is unknown");
  const Index head_dim = c.param_int("head_dim", 1);
  const double base = c.param_real("base", 512);
  const Vector<double> n = c.exact("in.n");
  Vector<double> got(n.size());
  for (Index i = 0; i < n.size(); ++i) got[i] = attention_scale(rule, n[i], head_dim, base);
  c.expect_exact("out.scale", got);
}

template <class C>
void gradient_mass(C& c) {
  using S = golden::scalar_of<C>;
  const Vector<S> s = c.vector("in.s"), alpha = c.vector("in.alpha");
  Vector<S> mass(alpha.size());
  for (Index i = 0; i < alpha.size(); ++i) mass[i] = softmax_gradient_mass(s, alpha[i]);
  c.expect("out.mass", mass);
}

template <class C>
void normalized(C& c) {
  using S = golden::scalar_of<C>;
  const std::string mode = c.param("mode");
  NormalizedAttentionOptions options;
  options.mode = mode == "qna"    ? NormalizedAttention::qna
                 : mode == "kna"  ? NormalizedAttention::kna
                 : mode == "cosa" ? NormalizedAttention::cosa
                                  : throw std::runtime_error("mode " + mode + " is unknown");
  options.lambda = c.param_real("lam", options.lambda);
  options.dynamic = c.param_flag("dynamic", false);
  options.base = c.param_real("base", options.base);
  options.eps = c.param_real("eps", options.eps);
  const Matrix<S> q = c.matrix("in.q"), k = c.matrix("in.k"), v = c.matrix("in.v");
  const AttentionShape shape{.heads = c.shape("in.q")[1], .kv_heads = c.shape("in.k")[1]};
  Matrix<S> out(q.rows(), shape.heads * v.cols() / shape.kv_heads);
  const auto saved = normalized_attention_forward(q, k, v, out, shape, options);
  c.expect("out.out", out);
  c.expect("out.lse", saved.attention.lse);
  if (!c.has("gin.q")) return;
  const Matrix<S> dout =
      c.has("gout.out") ? c.matrix("gout.out") : Matrix<S>::Zero(out.rows(), out.cols());
  Matrix<S> dlse, dq(q.rows(), q.cols()), dk(k.rows(), k.cols()), dv(v.rows(), v.cols());
  AttentionTensorGradients<S> gradients;
  if (c.has("gout.lse")) {
    dlse = c.matrix("gout.lse");
    gradients.upstream_lse = &dlse;
  }
  normalized_attention_backward(saved, q, k, v, out, dout, dq, dk, dv, shape, options,
                                attention_rule(causal()), {}, &gradients);
  c.expect("gin.q", dq);
  c.expect("gin.k", dk);
  c.expect("gin.v", dv);
}

template <class C>
void window(C& c) {
  const Index layers = c.param_int("n_layers");
  const Index w = hwfa_window(layers, c.param_int("train_len"), c.param_real("alpha", 0.75));
  c.expect_integers("out.window", {w});
  c.expect_integers("out.receptive_field", {hwfa_receptive_field(layers, w)});
}

}  // namespace

void register_attention_rules(golden::Registry& registry) {
  registry.add("relative_bias", [](auto& c) { relative_bias_op(c); });
  registry.add("kerple_bias", [](auto& c) { kerple_bias(c); });
  registry.add("attention_scale", [](auto& c) { scale(c); });
  registry.add("softmax_gradient_mass", [](auto& c) { gradient_mass(c); });
  registry.add("normalized_attention", [](auto& c) { normalized(c); });
  registry.add("hwfa_window", [](auto& c) { window(c); });
}
