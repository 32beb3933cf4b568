// A decoder of gated attention units over quantised keys, Transformer-VQ's, and its twin with full attention.
//
//   x = E[ids];  per layer  x += VqLayer(RMSNorm(x));  logits = RMSNorm(x) E^T             (arXiv 2309.16354: no other blocks)
//
// Full attention is the same layer with every key a codeword of its own: nothing is rounded, and with one block for the whole
// sequence the straight-through gradient is the true one.  All else is shared: weights, biases, gate.
// Codebooks follow the keys by moving averages, after every step.  A batch is cut into its sequences, each with gradients of
// its own, added in order: every executor gives the same bits.
#pragma once

#include "recipe.hpp"

#include <eigenblocks/attention/vq.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/nn/embedding.hpp>
#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/nn/norm.hpp>

#include <span>
#include <string>
#include <vector>

namespace example {

namespace eb = eigenblocks;

using eb::ExecutorRef;
using eb::Matrix;
using eb::Vector;

enum class Keys { quantised, exact };

struct GatedConfig {
  Keys keys = Keys::quantised;
  Index vocab = 256, width = 128, layers = 4, key_dim = 64, value_dim = 192;
  Index codes = 128, block_len = 64, mem_len = 64;
  double decay = 0.95;  ///< of the codebooks' averages; the paper's 0.99 suits longer training
};

/// Parameters, or their gradients.
struct GatedWeights {
  struct Layer {
    Vector<float> norm;
    eb::VqLayerWeights<float> attention;
  };
  Matrix<float> embedding;
  std::vector<Layer> layers;
  Vector<float> norm;
};

/// f(name, parameter) for every matrix and vector; hidden matrices, those Muon trains, are called w_...
template <class Weights, class F>
void for_each_gated_parameter(Weights& w, F&& f) {
  f(std::string("E"), w.embedding);
  for (std::size_t i = 0; i < w.layers.size(); ++i) {
    auto& a = w.layers[i].attention;
    const std::string at = std::to_string(i) + ".";
    f(at + "norm", w.layers[i].norm);
    f(at + "w_q", a.w_q);
    f(at + "w_k", a.w_k);
    f(at + "w_v", a.w_v);
    f(at + "w_g", a.w_g);
    f(at + "w_r", a.w_r);
    f(at + "w_o", a.w_o);
    f(at + "u", a.u);
    f(at + "v_bias", a.v_bias);
  }
  f(std::string("norm_f"), w.norm);
}
inline bool is_gated_matrix(const std::string& name) {
  return name.find(".w_") != std::string::npos;
}

class GatedDecoder {
 public:
  using Codebooks = std::vector<Matrix<float>>;  ///< one per layer; unused with exact keys

  explicit GatedDecoder(const GatedConfig& config) : config_(config) {}
  const GatedConfig& config() const { return config_; }

  /// N(0, 0.02^2) embedding, N(0, 1/fan_in) matrices, w_o smaller by sqrt(layers), zero biases.
  GatedWeights initial_weights(std::uint64_t seed) const {
    const Index d = config_.width, key = config_.key_dim, value = config_.value_dim;
    GatedWeights w;
    w.embedding.resize(config_.vocab, d);
    w.norm.resize(d);
    w.layers.resize(static_cast<std::size_t>(config_.layers));
    for (GatedWeights::Layer& layer : w.layers) {
      layer.norm.resize(d);
      eb::VqLayerWeights<float>& a = layer.attention;
      for (auto* m : {&a.w_q, &a.w_k, &a.w_r}) m->resize(d, key);
      for (auto* m : {&a.w_v, &a.w_g}) m->resize(d, value);
      a.w_o.resize(value, d);
      a.u.resize(1, key);
      a.v_bias.resize(1, key);
    }
    eb::Random random(seed);
    for_each_gated_parameter(w, [&](const std::string& name, auto& p) {
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(p)>, Vector<float>>) {
        p.setOnes();
      } else if (name == "E" || is_gated_matrix(name)) {
        const double fan_in = 1.0 / std::sqrt(static_cast<double>(p.rows())),
                     less = 1.0 / std::sqrt(static_cast<double>(config_.layers));
        eb::fill_normal(random, p,
                        name == "E"             ? 0.02
                        : name.ends_with("w_o") ? less * fan_in
                                                : fan_in);
      } else {
        p.setZero();
      }
    });
    return w;
  }

  /// Buffers of one sequence; reused from step to step.
  struct Sequence {
    struct Layer {
      Matrix<float> x_in, y, keys;
      Vector<float> rstd;
      eb::VqLayerSaved<float> attention;
    };
    std::vector<Layer> layers;
    Matrix<float> x, branch, y, logits, dx, dbranch, dy;
    Vector<float> rstd;
    GatedWeights gradients;
    double loss_sum = 0;
  };

  const Matrix<float>& forward(const GatedWeights& w, const Codebooks& codebooks,
                               std::span<const Index> ids, Sequence& s) const {
    const Index rows = static_cast<Index>(ids.size()), d = config_.width;
    const eb::VqLayer<float> layer(options(rows));
    s.layers.resize(w.layers.size());
    for (auto* m : {&s.x, &s.branch, &s.y}) m->resize(rows, d);
    s.logits.resize(rows, config_.vocab);
    s.rstd.resize(rows);
    eb::embedding_forward(w.embedding, ids, s.x);
    for (std::size_t i = 0; i < w.layers.size(); ++i) {
      Sequence::Layer& saved = s.layers[i];
      saved.x_in = s.x;
      saved.y.resize(rows, d);
      saved.rstd.resize(rows);
      eb::rms_norm_forward(s.x, w.layers[i].norm, saved.y, saved.rstd);
      if (config_.keys == Keys::exact) {  // the codebook is the keys
        saved.keys.resize(rows, config_.key_dim);
        eb::linear_forward(saved.y, w.layers[i].attention.w_k, saved.keys);
        eb::rms_norm_forward(saved.keys, layer.gain(), saved.keys, layer.norm());
      }
      eb::vq_layer_forward(layer, w.layers[i].attention, codebook(codebooks, s, i), saved.y,
                           s.branch, saved.attention);
      s.x += s.branch;
    }
    eb::rms_norm_forward(s.x, w.norm, s.y, s.rstd);
    eb::linear_backward_input(s.y, w.embedding, s.logits);  // y E^T
    return s.logits;
  }

  /// Sum of the cross entropies of the targets, and (in s.gradients) the gradients of that sum times `weight` plus the
  /// commitment losses of this sequence as the layer weighs them.
  double forward_backward(const GatedWeights& w, const Codebooks& codebooks,
                          std::span<const Index> ids, std::span<const Index> targets, double weight,
                          Sequence& s) const {
    const Index rows = static_cast<Index>(ids.size()), d = config_.width;
    if (s.gradients.layers.size() != w.layers.size()) s.gradients = w;  // the shapes
    GatedWeights& g = s.gradients;
    forward(w, codebooks, ids, s);
    const eb::CrossEntropyOptions sum{.reduction = eb::Reduction::sum};
    const auto loss = eb::cross_entropy_forward(s.logits, targets, sum);
    eb::cross_entropy_backward(loss, s.logits, targets, weight, s.logits, sum);
    for (auto* m : {&s.dx, &s.dbranch, &s.dy}) m->resize(rows, d);
    eb::linear_forward(s.logits, w.embedding, s.dy);
    eb::linear_backward_weight(s.logits, s.y, g.embedding);
    eb::rms_norm_backward(s.x, w.norm, s.rstd, s.dy, s.dx, g.norm);
    const eb::VqLayer<float> layer(options(rows));
    for (std::size_t i = w.layers.size(); i-- > 0;) {
      const Sequence::Layer& saved = s.layers[i];
      eb::vq_layer_backward(layer, w.layers[i].attention, codebook(codebooks, s, i),
                            saved.attention, saved.y, s.dx, s.dy, g.layers[i].attention);
      eb::rms_norm_backward(saved.x_in, w.layers[i].norm, saved.rstd, s.dy, s.dbranch,
                            g.layers[i].norm);
      s.dx += s.dbranch;
    }
    eb::embedding_accumulate(ids, s.dx, g.embedding);
    return loss.loss;
  }

 private:
  eb::VqLayerOptions options(Index rows) const {
    return {.heads = 1,
            .key_dim = config_.key_dim,
            .value_dim = config_.value_dim,
            .block_len = config_.keys == Keys::exact ? std::max<Index>(1, rows) : config_.block_len,
            .mem_len = config_.mem_len};
  }
  const Matrix<float>& codebook(const Codebooks& codebooks, const Sequence& s,
                                std::size_t i) const {
    return config_.keys == Keys::exact ? s.layers[i].keys : codebooks[i];
  }

  GatedConfig config_;
};

class GatedTrainer {
 public:
  GatedTrainer(const GatedConfig& config, const TrainingPlan& plan) : model_(config), plan_(plan) {
    weights_ = model_.initial_weights(static_cast<std::uint64_t>(plan.seed));
    sequences_.resize(static_cast<std::size_t>(plan.batch));
    if (config.keys == Keys::exact) return;
    eb::Random random(static_cast<std::uint64_t>(plan.seed) + 1000);
    for (Index i = 0; i < config.layers; ++i) {  // as wide as normalised keys are
      const double width = std::pow(static_cast<double>(config.key_dim), -0.25);
      averages_.push_back({eb::normal_matrix<float>(random, config.codes, config.key_dim, width),
                           Matrix<float>::Ones(1, config.codes)});
      codebooks_.push_back(eb::vq_codebook(averages_.back()));
    }
  }

  /// One step on packed sequences; the loss before it.
  double train(const Batch& batch, ExecutorRef executor) {
    const auto length = static_cast<std::size_t>(plan_.length);
    const double weight = 1.0 / static_cast<double>(batch.ids.size());
    executor.run(plan_.batch, [&](Index b, int) {
      Sequence& s = sequences_[static_cast<std::size_t>(b)];
      const std::size_t at = static_cast<std::size_t>(b) * length;
      s.loss_sum =
          model_.forward_backward(weights_, codebooks_, std::span(batch.ids).subspan(at, length),
                                  std::span(batch.targets).subspan(at, length), weight, s);
    });
    GatedWeights& g = sequences_[0].gradients;
    double loss = sequences_[0].loss_sum;
    for (std::size_t b = 1; b < sequences_.size(); ++b) {
      add(g, sequences_[b].gradients);
      loss += sequences_[b].loss_sum;
    }
    recipe_.apply(
        plan_, weights_, g, [](auto& w, auto&& f) { for_each_gated_parameter(w, f); },
        is_gated_matrix, executor);
    follow_keys();
    return loss * weight;
  }

  /// Mean loss of the targets of a batch, nats per byte.
  double loss(const Batch& batch, ExecutorRef executor) {
    std::vector<Sequence> buffers(static_cast<std::size_t>(executor.workers()));
    return mean_loss(batch, plan_.length, executor,
                     [&](std::span<const Index> ids, int worker) -> const Matrix<float>& {
                       return model_.forward(weights_, codebooks_, ids,
                                             buffers[static_cast<std::size_t>(worker)]);
                     });
  }

  /// Codes that have had keys lately, of all layers' codes.
  double live_codes() const {
    double live = 0, all = 0;
    for (const auto& average : averages_) {
      live += static_cast<double>((average.count.array() > 0.01f).count());
      all += static_cast<double>(average.count.size());
    }
    return all == 0 ? 1 : live / all;
  }
  Index step() const { return recipe_.step; }
  const TrainingPlan& plan() const { return plan_; }

 private:
  using Sequence = GatedDecoder::Sequence;

  /// The averages take in the keys of the whole batch at once.
  void follow_keys() {
    for (std::size_t i = 0; i < averages_.size(); ++i) {
      Matrix<float> keys(plan_.batch * plan_.length, model_.config().key_dim);
      eb::VqCodes codes(keys.rows(), 1);
      for (Index b = 0; b < plan_.batch; ++b) {
        const auto& saved = sequences_[static_cast<std::size_t>(b)].layers[i].attention;
        keys.middleRows(b * plan_.length, plan_.length) = saved.k;
        codes.middleRows(b * plan_.length, plan_.length) = saved.attention.codes;
      }
      eb::vq_average_update(averages_[i], keys, codes, nullptr, {.decay = model_.config().decay});
      codebooks_[i] = eb::vq_codebook(averages_[i]);
    }
  }

  static void add(GatedWeights& to, GatedWeights& from) {
    std::vector<float*> data;
    for_each_gated_parameter(from, [&](const std::string&, auto& p) { data.push_back(p.data()); });
    std::size_t i = 0;
    for_each_gated_parameter(to, [&](const std::string&, auto& p) {
      p += Eigen::Map<std::remove_cvref_t<decltype(p)>>(data[i++], p.rows(), p.cols());
    });
  }

  const GatedDecoder model_;
  TrainingPlan plan_;
  GatedWeights weights_;
  std::vector<eb::VqCodebookAverage<float>> averages_;
  GatedDecoder::Codebooks codebooks_;
  std::vector<Sequence> sequences_;
  Recipe<float> recipe_;
};

}  // namespace example
