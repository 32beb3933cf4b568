// A LLaMA-style decoder put together from the library's blocks: forward, backward, and decoding with a cache.
//
//   x = E[ids];  per layer  x += Attention(RMSNorm(x)),  x += (silu(y Wg) * (y Wu)) Wd with y = RMSNorm(x)
//   logits = RMSNorm(x) E^T  (tied) or  RMSNorm(x) W_head
//
// Weights are in x out, no biases.  Training runs on a batch of packed sequences of one length; the batch is cut into four
// slices with gradient buffers of their own, added in order, so every executor gives the same bits.
#pragma once

#include <eigenblocks/attention/mha.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/nn/embedding.hpp>
#include <eigenblocks/nn/glu.hpp>
#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/nn/norm.hpp>

#include <span>
#include <string>
#include <vector>

namespace example {

namespace eb = eigenblocks;

using eb::ExecutorRef;
using eb::Index;
using eb::Matrix;
using eb::Vector;

struct LlamaConfig {
  Index vocab = 256, width = 128, layers = 3, heads = 4, kv_heads = 2, ff = 256;
  double rope_base = 10000.0, eps = 1e-6;
  bool tied = true;  ///< the output matrix is the embedding, transposed
  eb::RopeLayout rope_layout = eb::RopeLayout::half;
  Index window_left = -1;  ///< keys a token sees before itself; -1 is all of them
};

template <class S>
struct LlamaLayer {
  Vector<S> norm1, norm2;
  eb::MhaWeights<S> attention;
  Matrix<S> w_gate, w_up, w_down;
};

/// Parameters, or their gradients.
template <class S>
struct LlamaWeights {
  Matrix<S> embedding;  ///< vocab x width
  std::vector<LlamaLayer<S>> layers;
  Vector<S> norm;
  Matrix<S> head;  ///< width x vocab; empty when tied
};

/// f(name, parameter) for every matrix and vector, in a fixed order.  Hidden matrices are those Muon trains.
template <class Weights, class F>
void for_each_parameter(Weights& w, F&& f) {
  f(std::string("E"), w.embedding);
  for (std::size_t i = 0; i < w.layers.size(); ++i) {
    auto& layer = w.layers[i];
    const std::string at = std::string("l").append(std::to_string(i)).append(".");
    f(at + "norm1", layer.norm1);
    f(at + "Wq", layer.attention.w_q);
    f(at + "Wk", layer.attention.w_k);
    f(at + "Wv", layer.attention.w_v);
    f(at + "Wo", layer.attention.w_o);
    f(at + "norm2", layer.norm2);
    f(at + "Wg", layer.w_gate);
    f(at + "Wu", layer.w_up);
    f(at + "Wd", layer.w_down);
  }
  f(std::string("norm_f"), w.norm);
  if (w.head.size() != 0) f(std::string("lm_head"), w.head);
}
inline bool is_hidden_matrix(const std::string& name) {
  return name.find(".W") != std::string::npos;
}

/// Attention is eb::Mha, or a class of one's own with mha_forward (and mha_backward to train, mha_state and mha_step to decode).
template <class S, class Attention = eb::Mha<S>>
class Llama {
 public:
  explicit Llama(const LlamaConfig& config)
      : Llama(config, std::vector<Attention>(static_cast<std::size_t>(config.layers),
                                             Attention(mha_options(config)))) {}
  /// With the attention of each layer; rope_base, rope_layout and window_left of config are then theirs to say.
  Llama(const LlamaConfig& config, std::vector<Attention> attention)
      : config_(config), attention_(std::move(attention)) {}

  const LlamaConfig& config() const { return config_; }

  /// N(0, 0.02^2) embedding, N(0, 1/fan_in) matrices, the two that write to the residual stream smaller by sqrt(2 layers).
  LlamaWeights<S> initial_weights(std::uint64_t seed) const {
    eb::Random random(seed);
    LlamaWeights<S> w = shaped_weights();
    const double residual = 1.0 / std::sqrt(2.0 * static_cast<double>(config_.layers));
    for_each_parameter(w, [&](const std::string& name, auto& p) {
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(p)>, Vector<S>>) {
        p.setOnes();
      } else {
        const bool writes = name.ends_with("Wo") || name.ends_with("Wd");
        const double stddev =
            name == "E" ? 0.02
                        : (writes ? residual : 1.0) / std::sqrt(static_cast<double>(p.rows()));
        eb::fill_normal(random, p, stddev);
      }
    });
    return w;
  }

  /// Weights of the right shapes, all zero.
  LlamaWeights<S> shaped_weights() const {
    const Index d = config_.width, kv = config_.kv_heads * (d / config_.heads), ff = config_.ff;
    LlamaWeights<S> w;
    w.embedding.setZero(config_.vocab, d);
    w.layers.resize(static_cast<std::size_t>(config_.layers));
    for (LlamaLayer<S>& layer : w.layers) {
      layer.norm1.setZero(d);
      layer.norm2.setZero(d);
      layer.attention.w_q.setZero(d, d);
      layer.attention.w_k.setZero(d, kv);
      layer.attention.w_v.setZero(d, kv);
      layer.attention.w_o.setZero(d, d);
      layer.w_gate.setZero(d, ff);
      layer.w_up.setZero(d, ff);
      layer.w_down.setZero(ff, d);
    }
    w.norm.setZero(d);
    if (!config_.tied) w.head.setZero(d, config_.vocab);
    return w;
  }

  /// Buffers of one slice of a batch; reused from step to step.
  struct Slice {
    struct LayerSaved {
      Matrix<S> x_in, y1, x_mid, y2;
      Vector<S> rstd1, rstd2;
      eb::MhaSaved<S> attention;
      eb::GluFfnSaved<S> glu;
    };
    std::vector<LayerSaved> layers;
    Matrix<S> x, branch, y, logits, dx, dbranch, dnormed;
    Vector<S> rstd;
    std::vector<Index> cu_seqlens;
    LlamaWeights<S> gradients;
    eb::Workspace workspace;
    double loss_sum = 0;
  };
  using Slices = std::vector<Slice>;

  /// Logits (rows x vocab) of packed sequences; an empty cu_seqlens means one sequence.
  const Matrix<S>& forward(const LlamaWeights<S>& w, std::span<const Index> ids,
                           std::span<const Index> cu_seqlens, Slice& s) const {
    const Index rows = static_cast<Index>(ids.size()), d = config_.width;
    const eb::RmsNormOptions norm{.eps = config_.eps};
    s.layers.resize(w.layers.size());
    s.x.resize(rows, d);
    s.branch.resize(rows, d);
    s.y.resize(rows, d);
    s.logits.resize(rows, config_.vocab);
    s.rstd.resize(rows);
    eb::embedding_forward(w.embedding, ids, s.x);
    for (std::size_t i = 0; i < w.layers.size(); ++i) {
      const LlamaLayer<S>& layer = w.layers[i];
      typename Slice::LayerSaved& saved = s.layers[i];
      saved.y1.resize(rows, d);
      saved.y2.resize(rows, d);
      saved.rstd1.resize(rows);
      saved.rstd2.resize(rows);
      saved.x_in = s.x;
      eb::rms_norm_forward(s.x, layer.norm1, saved.y1, saved.rstd1, norm);
      mha_forward(attention_[i], layer.attention, saved.y1, s.branch, saved.attention,
                  {.cu_seqlens = cu_seqlens});
      s.x += s.branch;
      saved.x_mid = s.x;
      eb::rms_norm_forward(s.x, layer.norm2, saved.y2, saved.rstd2, norm);
      eb::glu_ffn_forward(saved.y2, layer.w_gate, layer.w_up, layer.w_down, s.branch, saved.glu,
                          s.workspace);
      s.x += s.branch;
    }
    eb::rms_norm_forward(s.x, w.norm, s.y, s.rstd, norm);
    output(w, s.y, s.logits);
    return s.logits;
  }

  /// Sum of the cross entropies of the targets, and (in s.gradients) the gradients of that sum times `weight`.
  double forward_backward(const LlamaWeights<S>& w, std::span<const Index> ids,
                          std::span<const Index> targets, std::span<const Index> cu_seqlens,
                          double weight, Slice& s) const {
    const Index rows = static_cast<Index>(ids.size()), d = config_.width;
    const eb::RmsNormOptions norm{.eps = config_.eps};
    if (s.gradients.layers.size() != w.layers.size()) s.gradients = shaped_weights();
    LlamaWeights<S>& g = s.gradients;
    forward(w, ids, cu_seqlens, s);
    const eb::CrossEntropyOptions sum{.reduction = eb::Reduction::sum};
    const auto loss = eb::cross_entropy_forward(s.logits, targets, sum);
    eb::cross_entropy_backward(loss, s.logits, targets, weight, s.logits,
                               sum);  // logits become their gradient

    s.dx.resize(rows, d);
    s.dbranch.resize(rows, d);
    s.dnormed.resize(rows, d);
    if (config_.tied) {
      eb::linear_forward(s.logits, w.embedding, s.dnormed);  // dy = dlogits E
      eb::linear_backward_weight(s.logits, s.y, g.embedding);
    } else {
      eb::linear_backward(s.y, w.head, s.logits, s.dnormed, g.head);
      g.embedding.setZero();
    }
    eb::rms_norm_backward(s.x, w.norm, s.rstd, s.dnormed, s.dx, g.norm, norm);
    for (std::size_t i = w.layers.size(); i-- > 0;) {
      const LlamaLayer<S>& layer = w.layers[i];
      const typename Slice::LayerSaved& saved = s.layers[i];
      LlamaLayer<S>& dlayer = g.layers[i];
      eb::glu_ffn_backward(saved.glu, saved.y2, layer.w_gate, layer.w_up, layer.w_down, s.dx,
                           s.dnormed, dlayer.w_gate, dlayer.w_up, dlayer.w_down, s.workspace);
      eb::rms_norm_backward(saved.x_mid, layer.norm2, saved.rstd2, s.dnormed, s.dbranch,
                            dlayer.norm2, norm);
      s.dx += s.dbranch;
      mha_backward(attention_[i], layer.attention, saved.attention, saved.y1, s.dx, s.dnormed,
                   dlayer.attention, {.cu_seqlens = cu_seqlens});
      eb::rms_norm_backward(saved.x_in, layer.norm1, saved.rstd1, s.dnormed, s.dbranch,
                            dlayer.norm1, norm);
      s.dx += s.dbranch;
    }
    eb::embedding_accumulate(ids, s.dx, g.embedding);
    return loss.loss;
  }

  /// Mean loss over a batch of `sequences` sequences of equal length, and its gradients.
  double train_step(const LlamaWeights<S>& w, std::span<const Index> ids,
                    std::span<const Index> targets, Index sequences, LlamaWeights<S>& gradients,
                    Slices& slices, ExecutorRef executor) const {
    constexpr Index kSlices = 4;
    const Index length = static_cast<Index>(ids.size()) / sequences,
                count = std::min(kSlices, sequences);
    slices.resize(static_cast<std::size_t>(count));
    const double weight = 1.0 / static_cast<double>(ids.size());
    executor.run(count, [&](Index task, int) {
      Slice& s = slices[static_cast<std::size_t>(task)];
      const Index first = task * sequences / count, last = (task + 1) * sequences / count;
      s.cu_seqlens.resize(static_cast<std::size_t>(last - first + 1));
      for (Index b = first; b <= last; ++b)
        s.cu_seqlens[static_cast<std::size_t>(b - first)] = (b - first) * length;
      const auto at = static_cast<std::size_t>(first * length),
                 n = static_cast<std::size_t>((last - first) * length);
      s.loss_sum =
          forward_backward(w, ids.subspan(at, n), targets.subspan(at, n), s.cu_seqlens, weight, s);
    });
    gradients = slices[0].gradients;
    double loss = slices[0].loss_sum;
    for (std::size_t i = 1; i < slices.size(); ++i) {
      add_parameters(gradients, slices[i].gradients);
      loss += slices[i].loss_sum;
    }
    return loss * weight;
  }

  /// Decoding state: one cache per layer.
  struct State {
    std::vector<eb::MhaState<S>> layers;
    Matrix<S> x, branch, y;
    eb::GluFfnSaved<S> glu;
    eb::Workspace workspace;
    Index size() const { return layers.front().size(); }
  };
  State state(Index capacity) const {
    State s;
    for (const Attention& attention : attention_)
      s.layers.push_back(mha_state(attention, capacity));
    return s;
  }

  /// Logits (rows x vocab) of the tokens that follow what the state has seen.
  void step(const LlamaWeights<S>& w, State& s, std::span<const Index> ids,
            Matrix<S>& logits) const {
    const Index rows = static_cast<Index>(ids.size()), d = config_.width;
    const eb::RmsNormOptions norm{.eps = config_.eps};
    s.x.resize(rows, d);
    s.y.resize(rows, d);
    s.branch.resize(rows, d);
    logits.resize(rows, config_.vocab);
    eb::embedding_forward(w.embedding, ids, s.x);
    for (std::size_t i = 0; i < w.layers.size(); ++i) {
      const LlamaLayer<S>& layer = w.layers[i];
      eb::rms_norm_forward(s.x, layer.norm1, s.y, norm);
      mha_step(attention_[i], layer.attention, s.layers[i], s.y, s.branch);
      s.x += s.branch;
      eb::rms_norm_forward(s.x, layer.norm2, s.y, norm);
      eb::glu_ffn_forward(s.y, layer.w_gate, layer.w_up, layer.w_down, s.branch, s.glu,
                          s.workspace);
      s.x += s.branch;
    }
    eb::rms_norm_forward(s.x, w.norm, s.y, norm);
    output(w, s.y, logits);
  }

 private:
  static eb::MhaOptions mha_options(const LlamaConfig& config) {
    eb::MhaOptions options;
    options.heads = config.heads;
    options.kv_heads = config.kv_heads;
    options.head_dim = config.width / config.heads;
    options.rope_base = config.rope_base;
    options.rope_layout = config.rope_layout;
    options.window_left = config.window_left;
    return options;
  }

  void output(const LlamaWeights<S>& w, const Matrix<S>& y, Matrix<S>& logits) const {
    if (config_.tied) {
      eb::linear_backward_input(y, w.embedding, logits);  // y E^T
    } else {
      eb::linear_forward(y, w.head, logits);
    }
  }

  static void add_parameters(LlamaWeights<S>& to, LlamaWeights<S>& from) {
    std::vector<S*> data;
    for_each_parameter(from, [&](const std::string&, auto& p) { data.push_back(p.data()); });
    std::size_t i = 0;
    for_each_parameter(to, [&](const std::string&, auto& p) {
      p += Eigen::Map<std::remove_cvref_t<decltype(p)>>(data[i++], p.rows(), p.cols());
    });
  }

  LlamaConfig config_;
  std::vector<Attention> attention_;
};

}  // namespace example
