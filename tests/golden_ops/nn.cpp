// Golden ops of nn/: embedding, norms, gated units, sampling, and the norms of queries and keys.
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/embedding.hpp>
#include <eigenblocks/nn/glu.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/nn/sampling.hpp>

#include <stdexcept>
#include <string>
#include <vector>

#include "support/golden.hpp"

namespace eb = eigenblocks;
using eb::Index;

namespace {

eb::Activation activation_of(const std::string& name) {
  if (name == "silu") return eb::Activation::silu;
  if (name == "gelu") return eb::Activation::gelu;
  if (name == "gelu_tanh") return eb::Activation::gelu_tanh;
  if (name == "relu") return eb::Activation::relu;
  if (name == "sigmoid") return eb::Activation::sigmoid;
  throw std::runtime_error("unknown act " + name);
}

template <class C>
void embedding(C& c) {
  using S = golden::scalar_of<C>;
  const eb::Matrix<S> table = c.matrix("in.E");
  const std::vector<Index> ids = c.integers("in.ids");
  c.expect("out.y", eb::embedding(table, ids));
  if (!c.has("gin.E")) return;
  const eb::Matrix<S> dy = c.matrix("gout.y");
  eb::Matrix<S> dtable(table.rows(), table.cols());
  eb::embedding_backward(ids, dy, dtable);
  c.expect("gin.E", dtable);
  c.form("accumulate");
  dtable.setZero();
  eb::embedding_accumulate(ids, dy, dtable);
  c.expect("gin.E", dtable);
}

/// rms_norm with gain and head count, out of place and in place.
template <class C>
void rms(C& c, const std::string& weight, const eb::RmsNormOptions& options) {
  using S = golden::scalar_of<C>;
  const eb::Matrix<S> x = c.matrix("in.x");
  const eb::Vector<S> gain = c.vector("in." + weight);
  eb::Matrix<S> y(x.rows(), x.cols());
  eb::Vector<S> rstd(x.rows() * options.heads);
  eb::rms_norm_forward(x, gain, y, rstd, options);
  c.expect("out.y", y);
  if (!c.has("gin.x")) return;
  eb::Matrix<S> dx = c.matrix("gout.y");
  eb::Vector<S> dgain(gain.size());
  eb::rms_norm_backward(x, gain, rstd, dx, dx, dgain, options);
  c.expect("gin.x", dx);
  c.expect("gin." + weight, dgain);
  c.form("in place");
  y = x;
  eb::rms_norm_forward(y, gain, y, options);
  c.expect("out.y", y);
}

template <class C>
void layer(C& c) {
  using S = golden::scalar_of<C>;
  const eb::LayerNormOptions options{.eps = c.param_real("eps")};
  const eb::Matrix<S> x = c.matrix("in.x");
  const eb::Vector<S> gain = c.vector("in.w"), bias = c.vector("in.b");
  eb::Matrix<S> y(x.rows(), x.cols()), dx(x.rows(), x.cols());
  eb::Vector<S> rstd(x.rows()), dgain(gain.size()), dbias(bias.size());
  eb::layer_norm_forward(x, gain, bias, y, rstd, options);
  c.expect("out.y", y);
  if (!c.has("gin.x")) return;
  eb::layer_norm_backward(x, gain, rstd, c.matrix("gout.y"), dx, dgain, dbias, options);
  c.expect("gin.x", dx);
  c.expect("gin.w", dgain);
  c.expect("gin.b", dbias);
}

template <class C>
void l2(C& c, const eb::L2NormalizeOptions& options) {
  using S = golden::scalar_of<C>;
  const eb::Matrix<S> x = c.matrix("in.x");
  eb::Matrix<S> y(x.rows(), x.cols()), dx(x.rows(), x.cols());
  eb::Vector<S> rnorm(x.rows() * options.heads);
  eb::l2_normalize_forward(x, y, rnorm, options);
  c.expect("out.y", y);
  if (!c.has("gin.x")) return;
  eb::l2_normalize_backward(x, rnorm, c.matrix("gout.y"), dx, options);
  c.expect("gin.x", dx);
}

template <class C>
void qk_normalize(C& c) {
  const std::string kind = c.param("kind");
  const double eps = c.param_real("eps");
  const Index heads = c.shape("in.x")[1];
  if (kind == "l2") return l2(c, {.eps = eps, .heads = heads});
  if (kind == "rms_head") return rms(c, "weight", {.eps = eps, .heads = heads});
  if (kind == "rms_full") return rms(c, "weight", {.eps = eps});
  throw std::runtime_error("unknown kind " + kind);
}

template <class C>
void glu_ffn(C& c) {
  using S = golden::scalar_of<C>;
  const eb::GluFfnOptions options{.activation = activation_of(c.param("act"))};
  const eb::Matrix<S> x = c.matrix("in.x"), wg = c.matrix("in.Wg"), wu = c.matrix("in.Wu"),
                      wd = c.matrix("in.Wd");
  const eb::thread_pool pool(2);
  const auto run = [&](eb::ExecutorRef executor) {
    eb::Matrix<S> y(x.rows(), wd.cols()), dx = x, dwg = wg, dwu = wu, dwd = wd;
    eb::GluFfnSaved<S> saved;
    eb::Workspace workspace;
    eb::glu_ffn_forward(x, wg, wu, wd, y, saved, workspace, options, executor);
    c.expect("out.y", y);
    if (!c.has("gin.x")) return;
    eb::glu_ffn_backward(saved, x, wg, wu, wd, c.matrix("gout.y"), dx, dwg, dwu, dwd, workspace,
                         options, executor);
    c.expect("gin.x", dx);
    c.expect("gin.Wg", dwg);
    c.expect("gin.Wu", dwu);
    c.expect("gin.Wd", dwd);
  };
  run(eb::serial);
  c.form("two threads");
  run(pool);
}

template <class C>
void sampling_probs(C& c) {
  using S = golden::scalar_of<C>;
  const eb::SamplingOptions options{.temperature = c.param_real("temperature"),
                                    .top_k = c.param_int("top_k"),
                                    .top_p = c.param_real("top_p"),
                                    .min_p = c.param_real("min_p")};
  const eb::Vector<S> logits = c.vector("in.logits");
  const eb::Vector<S> probs = eb::sampling_probs(logits, options);
  c.expect("out.probs", probs);
  const eb::Vector<double> u = c.exact("in.u");
  eb::SamplingWorkspace<S> workspace;
  std::vector<Index> index, token;
  for (Index i = 0; i < u.size(); ++i) {
    index.push_back(eb::sample_index(probs, u[i]));
    token.push_back(eb::sample_token(logits, u[i], options, workspace));
  }
  c.expect_integers("out.index", index);
  c.form("sample_token");
  c.expect_integers("out.index", token);
}

}  // namespace

void register_nn(golden::Registry& registry) {
  registry.add("embedding", [](auto& c) { embedding(c); });
  registry.add("rms_norm", [](auto& c) { rms(c, "w", {.eps = c.param_real("eps")}); });
  registry.add("layer_norm", [](auto& c) { layer(c); });
  registry.add("l2_normalize", [](auto& c) { l2(c, {.eps = c.param_real("eps")}); });
  registry.add("qk_normalize", [](auto& c) { qk_normalize(c); });
  registry.add("glu_ffn", [](auto& c) { glu_ffn(c); });
  registry.add("sampling_probs", [](auto& c) { sampling_probs(c); });
}
