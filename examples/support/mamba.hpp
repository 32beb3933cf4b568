// A Mamba language model put together from the library's blocks: whole sequences forward and backward, tokens step by step.
//
//   x = E[ids];  per layer  x += Mixer(RMSNorm(x));  logits = RMSNorm(x) E^T          (arXiv 2312.00752: no other blocks)
//
//   Mixer(y):  a, z = y W_in;  u = silu(conv(a) + conv_bias)          causal, one filter of `width` taps per channel
//              r, B, C = u W_x;  delta = r W_dt                       the step size has rank dt_rank
//              out = (scan(u, softplus(delta + dt_bias), -e^{A_log}, B, C) + D u) silu(z);  W_out
//
// Weights are in x out.  A batch is packed sequences of one length; it is cut into four slices with gradient buffers of their
// own, added in order, so every executor gives the same bits.  The state of decoding is of constant size: for each layer the
// last taps - 1 inputs of the convolution and channels x states numbers of the scan.
#pragma once

#include "recipe.hpp"

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/nn/conv1d.hpp>
#include <eigenblocks/nn/embedding.hpp>
#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/ssm/selective_scan.hpp>

#include <cmath>
#include <span>
#include <string>
#include <vector>

namespace example {

namespace eb = eigenblocks;

using eb::ExecutorRef;
using eb::Matrix;
using eb::Vector;

struct MambaConfig {
  Index vocab = 256, width = 128, layers = 4;
  Index channels = 256;                ///< of the mixer (d_inner), twice the width in the paper
  Index states = 16;                   ///< of each channel
  Index taps = 4;                      ///< of the convolution
  Index dt_rank = 8;                   ///< width / 16 in the paper
  double dt_min = 1e-3, dt_max = 0.1;  ///< the step sizes a fresh model starts with
  double eps = 1e-5;
};

template <class S>
struct MambaLayer {
  Vector<S> norm;
  Matrix<S> w_in;       ///< width x 2 channels: the branch of the scan, then the gate
  Matrix<S> conv;       ///< taps x channels
  Vector<S> conv_bias;  ///< channels
  Matrix<S> w_x;        ///< channels x (dt_rank + 2 states)
  Matrix<S> w_dt;       ///< dt_rank x channels
  Vector<S> dt_bias;    ///< channels
  Matrix<S> a_log;      ///< channels x states
  Vector<S> skip;       ///< channels (the paper's D)
  Matrix<S> w_out;      ///< channels x width
};

/// Parameters, or their gradients.
template <class S>
struct MambaWeights {
  Matrix<S> embedding;  ///< vocab x width; transposed it is the output matrix
  std::vector<MambaLayer<S>> layers;
  Vector<S> norm;
};

/// f(name, parameter) for every matrix and vector, in a fixed order; hidden matrices, those Muon trains, are called W_...
template <class Weights, class F>
void for_each_mamba_parameter(Weights& w, F&& f) {
  f(std::string("E"), w.embedding);
  for (std::size_t i = 0; i < w.layers.size(); ++i) {
    auto& layer = w.layers[i];
    const std::string at = std::string("l").append(std::to_string(i)).append(".");
    f(at + "norm", layer.norm);
    f(at + "W_in", layer.w_in);
    f(at + "conv", layer.conv);
    f(at + "conv_bias", layer.conv_bias);
    f(at + "W_x", layer.w_x);
    f(at + "W_dt", layer.w_dt);
    f(at + "dt_bias", layer.dt_bias);
    f(at + "A_log", layer.a_log);
    f(at + "D", layer.skip);
    f(at + "W_out", layer.w_out);
  }
  f(std::string("norm_f"), w.norm);
}
inline bool is_mamba_matrix(const std::string& name) {
  return name.find(".W_") != std::string::npos;
}

template <class S>
class Mamba {
 public:
  explicit Mamba(const MambaConfig& config) : config_(config) {}
  const MambaConfig& config() const { return config_; }

  /// Weights of the right shapes, all zero.
  MambaWeights<S> shaped_weights() const {
    const Index d = config_.width, c = config_.channels, n = config_.states, r = config_.dt_rank;
    MambaWeights<S> w;
    w.embedding.setZero(config_.vocab, d);
    w.norm.setZero(d);
    w.layers.resize(static_cast<std::size_t>(config_.layers));
    for (MambaLayer<S>& layer : w.layers) {
      layer.norm.setZero(d);
      layer.w_in.setZero(d, 2 * c);
      layer.conv.setZero(config_.taps, c);
      layer.w_x.setZero(c, r + 2 * n);
      layer.w_dt.setZero(r, c);
      layer.a_log.setZero(c, n);
      layer.w_out.setZero(c, d);
      for (auto* v : {&layer.conv_bias, &layer.dt_bias, &layer.skip}) v->setZero(c);
    }
    return w;
  }

  /// N(0, 0.02^2) embedding, N(0, 1/fan_in) matrices, W_out smaller by sqrt(layers); A = -(1..N) in every channel
  /// (S4D-Real), D = 1, the softplus of dt_bias log-uniform in [dt_min, dt_max].
  MambaWeights<S> initial_weights(std::uint64_t seed) const {
    eb::Random random(seed);
    MambaWeights<S> w = shaped_weights();
    const auto stddev = [](Index fan_in) { return 1 / std::sqrt(static_cast<double>(fan_in)); };
    eb::fill_normal(random, w.embedding, 0.02);
    for (MambaLayer<S>& layer : w.layers) {
      for (auto* m : {&layer.w_in, &layer.conv, &layer.w_x, &layer.w_dt})
        eb::fill_normal(random, *m, stddev(m->rows()));
      eb::fill_normal(random, layer.w_out, stddev(config_.channels * config_.layers));
      layer.norm.setOnes();
      layer.skip.setOnes();
      const double low = std::log(config_.dt_min), high = std::log(config_.dt_max);
      for (Index c = 0; c < config_.channels; ++c) {
        const double dt = std::exp(low + (high - low) * random.uniform());
        layer.dt_bias[c] = static_cast<S>(dt + std::log(-std::expm1(-dt)));  // inverse softplus
        for (Index n = 0; n < config_.states; ++n)
          layer.a_log(c, n) = static_cast<S>(std::log(static_cast<double>(n + 1)));
      }
    }
    w.norm.setOnes();
    return w;
  }

  /// Buffers of one slice of a batch; reused from step to step.
  struct Slice {
    struct Layer {
      Matrix<S> x_in, y, az, u, rbc, delta, gated, a;
      std::vector<Matrix<S>> gates;  // one for each sequence
      Vector<S> rstd;
    };
    std::vector<Layer> layers;
    Matrix<S> x, branch, y, logits, dx, dbranch, dy, daz, du, drbc, ddelta, dgated, dgate;
    Vector<S> rstd;
    MambaWeights<S> gradients;
    MambaLayer<S> share;  // of one sequence in the gradients of a layer
    double loss_sum = 0;
  };
  using Slices = std::vector<Slice>;

  /// Logits (rows x vocab) of `sequences` packed sequences of equal length.
  const Matrix<S>& forward(const MambaWeights<S>& w, std::span<const Index> ids, Index sequences,
                           Slice& s) const {
    const Index rows = static_cast<Index>(ids.size()), d = config_.width;
    s.layers.resize(w.layers.size());
    for (auto* m : {&s.x, &s.branch, &s.y}) m->resize(rows, d);
    s.logits.resize(rows, config_.vocab);
    s.rstd.resize(rows);
    eb::embedding_forward(w.embedding, ids, s.x);
    for (std::size_t i = 0; i < w.layers.size(); ++i) {
      typename Slice::Layer& saved = s.layers[i];
      saved.x_in = s.x;
      saved.y.resize(rows, d);
      saved.rstd.resize(rows);
      eb::rms_norm_forward(s.x, w.layers[i].norm, saved.y, saved.rstd, {.eps = config_.eps});
      mixer_forward(w.layers[i], sequences, saved, s.branch);
      s.x += s.branch;
    }
    eb::rms_norm_forward(s.x, w.norm, s.y, s.rstd, {.eps = config_.eps});
    eb::linear_backward_input(s.y, w.embedding, s.logits);  // y E^T
    return s.logits;
  }

  /// Sum of the cross entropies of the targets, and (in s.gradients) the gradients of that sum times `weight`.
  double forward_backward(const MambaWeights<S>& w, std::span<const Index> ids,
                          std::span<const Index> targets, Index sequences, double weight,
                          Slice& s) const {
    const Index rows = static_cast<Index>(ids.size()), d = config_.width;
    if (s.gradients.layers.size() != w.layers.size()) s.gradients = shaped_weights();
    MambaWeights<S>& g = s.gradients;
    forward(w, ids, sequences, s);
    const eb::CrossEntropyOptions sum{.reduction = eb::Reduction::sum};
    const auto loss = eb::cross_entropy_forward(s.logits, targets, sum);
    eb::cross_entropy_backward(loss, s.logits, targets, weight, s.logits, sum);
    for (auto* m : {&s.dx, &s.dbranch, &s.dy}) m->resize(rows, d);
    eb::linear_forward(s.logits, w.embedding, s.dy);
    eb::linear_backward_weight(s.logits, s.y, g.embedding);
    eb::rms_norm_backward(s.x, w.norm, s.rstd, s.dy, s.dx, g.norm, {.eps = config_.eps});
    for (std::size_t i = w.layers.size(); i-- > 0;) {
      const typename Slice::Layer& saved = s.layers[i];
      mixer_backward(w.layers[i], sequences, saved, s, g.layers[i]);
      eb::rms_norm_backward(saved.x_in, w.layers[i].norm, saved.rstd, s.dy, s.dbranch,
                            g.layers[i].norm, {.eps = config_.eps});
      s.dx += s.dbranch;
    }
    eb::embedding_accumulate(ids, s.dx, g.embedding);
    return loss.loss;
  }

  /// Mean loss over a batch of `sequences` sequences of equal length, and its gradients.
  double train_step(const MambaWeights<S>& w, std::span<const Index> ids,
                    std::span<const Index> targets, Index sequences, MambaWeights<S>& gradients,
                    Slices& slices, ExecutorRef executor) const {
    constexpr Index kSlices = 4;
    const Index length = static_cast<Index>(ids.size()) / sequences,
                count = std::min(kSlices, sequences);
    slices.resize(static_cast<std::size_t>(count));
    const double weight = 1.0 / static_cast<double>(ids.size());
    executor.run(count, [&](Index task, int) {
      Slice& s = slices[static_cast<std::size_t>(task)];
      const Index first = task * sequences / count, here = (task + 1) * sequences / count - first;
      const auto at = static_cast<std::size_t>(first * length),
                 n = static_cast<std::size_t>(here * length);
      s.loss_sum = forward_backward(w, ids.subspan(at, n), targets.subspan(at, n), here, weight, s);
    });
    gradients = slices[0].gradients;
    double loss = slices[0].loss_sum;
    for (std::size_t i = 1; i < slices.size(); ++i) {
      add_parameters(gradients, slices[i].gradients);
      loss += slices[i].loss_sum;
    }
    return loss * weight;
  }

  /// All that decoding needs: of constant size, however many tokens it has seen.  A copy is a snapshot.
  struct State {
    struct Layer {
      eb::Conv1dState<S> conv;
      eb::SelectiveScanState<S> scan;
      Matrix<S> a;  // not part of the value, like the rest: -e^{A_log}
    };
    std::vector<Layer> layers;
    Matrix<S> x, branch, y, az, u, rbc, delta, gate, gated;

    Index size() const { return layers.front().scan.size(); }
    Index bytes() const {
      Index sum = 0;
      for (const Layer& layer : layers) sum += layer.conv.bytes() + layer.scan.bytes();
      return sum;
    }
  };
  State state(const MambaWeights<S>& w) const {
    State s;
    for (const MambaLayer<S>& layer : w.layers) {
      s.layers.push_back({eb::conv1d_state<S>(config_.taps, config_.channels, kConv),
                          eb::selective_scan_state<S>(config_.channels, config_.states, kScan),
                          decay_rates(layer)});
    }
    return s;
  }

  /// Logits (rows x vocab) of the tokens that follow what the state has seen.
  void step(const MambaWeights<S>& w, State& s, std::span<const Index> ids,
            Matrix<S>& logits) const {
    const Index rows = static_cast<Index>(ids.size()), d = config_.width, c = config_.channels,
                r = config_.dt_rank, n = config_.states;
    for (auto* m : {&s.x, &s.branch, &s.y}) m->resize(rows, d);
    for (auto* m : {&s.u, &s.delta, &s.gated}) m->resize(rows, c);
    s.az.resize(rows, 2 * c);
    s.rbc.resize(rows, r + 2 * n);
    logits.resize(rows, config_.vocab);
    eb::embedding_forward(w.embedding, ids, s.x);
    for (std::size_t i = 0; i < w.layers.size(); ++i) {
      const MambaLayer<S>& layer = w.layers[i];
      typename State::Layer& own = s.layers[i];
      eb::rms_norm_forward(s.x, layer.norm, s.y, {.eps = config_.eps});
      eb::linear_forward(s.y, layer.w_in, s.az);
      eb::conv1d_step(own.conv, s.az.leftCols(c), layer.conv, s.u, &layer.conv_bias);
      eb::linear_forward(s.u, layer.w_x, s.rbc);
      eb::linear_forward(s.rbc.leftCols(r), layer.w_dt, s.delta);
      s.gate = s.az.rightCols(c);
      eb::selective_scan_step(own.scan, s.u, s.delta, own.a, s.rbc.middleCols(r, n),
                              s.rbc.rightCols(n), s.gated,
                              {.skip = &layer.skip, .delta_bias = &layer.dt_bias, .gate = &s.gate});
      eb::linear_forward(s.gated, layer.w_out, s.branch);
      s.x += s.branch;
    }
    eb::rms_norm_forward(s.x, w.norm, s.y, {.eps = config_.eps});
    eb::linear_backward_input(s.y, w.embedding, logits);
  }

 private:
  static constexpr eb::Conv1dOptions kConv{.silu = true};
  static constexpr eb::SelectiveScanOptions kScan{.delta_softplus = true};

  static Matrix<S> decay_rates(const MambaLayer<S>& layer) { return -layer.a_log.array().exp(); }

  void mixer_forward(const MambaLayer<S>& layer, Index sequences, typename Slice::Layer& saved,
                     Matrix<S>& out) const {
    const Index rows = saved.y.rows(), length = rows / sequences, c = config_.channels,
                r = config_.dt_rank, n = config_.states;
    for (auto* m : {&saved.u, &saved.delta, &saved.gated}) m->resize(rows, c);
    saved.az.resize(rows, 2 * c);
    saved.rbc.resize(rows, r + 2 * n);
    saved.a = decay_rates(layer);
    saved.gates.resize(static_cast<std::size_t>(sequences));
    eb::linear_forward(saved.y, layer.w_in, saved.az);
    for (Index at = 0; at < rows; at += length) {
      eb::conv1d_forward(saved.az.block(at, 0, length, c), layer.conv,
                         saved.u.middleRows(at, length), kConv, {.bias = &layer.conv_bias});
    }
    eb::linear_forward(saved.u, layer.w_x, saved.rbc);
    eb::linear_forward(saved.rbc.leftCols(r), layer.w_dt, saved.delta);
    for (Index at = 0; at < rows; at += length) {
      Matrix<S>& gate = saved.gates[static_cast<std::size_t>(at / length)];
      gate = saved.az.block(at, c, length, c);
      eb::selective_scan_forward(
          saved.u.middleRows(at, length), saved.delta.middleRows(at, length), saved.a,
          saved.rbc.block(at, r, length, n), saved.rbc.block(at, r + n, length, n),
          saved.gated.middleRows(at, length), kScan,
          {.skip = &layer.skip, .delta_bias = &layer.dt_bias, .gate = &gate});
    }
    eb::linear_forward(saved.gated, layer.w_out, out);
  }

  /// Gradients g of the layer and s.dy of its input, from s.dx of its output.
  void mixer_backward(const MambaLayer<S>& layer, Index sequences,
                      const typename Slice::Layer& saved, Slice& s, MambaLayer<S>& g) const {
    const Index rows = saved.y.rows(), length = rows / sequences, c = config_.channels,
                r = config_.dt_rank, n = config_.states;
    for (auto* m : {&s.du, &s.ddelta, &s.dgated}) m->resize(rows, c);
    s.daz.resize(rows, 2 * c);
    s.drbc.resize(rows, r + 2 * n);
    s.dgate.resize(length, c);
    s.share = g;  // the shapes
    for (auto* m : {&g.a_log, &g.conv}) m->setZero();
    for (auto* v : {&g.skip, &g.dt_bias, &g.conv_bias}) v->setZero();

    eb::linear_backward(saved.gated, layer.w_out, s.dx, s.dgated, g.w_out);
    for (Index at = 0; at < rows; at += length) {
      eb::selective_scan_backward(
          saved.u.middleRows(at, length), saved.delta.middleRows(at, length), saved.a,
          saved.rbc.block(at, r, length, n), saved.rbc.block(at, r + n, length, n),
          s.dgated.middleRows(at, length), s.du.middleRows(at, length),
          s.ddelta.middleRows(at, length), s.share.a_log, s.drbc.block(at, r, length, n),
          s.drbc.block(at, r + n, length, n), kScan,
          {.skip = &layer.skip,
           .delta_bias = &layer.dt_bias,
           .gate = &saved.gates[static_cast<std::size_t>(at / length)]},
          nullptr, {.skip = &s.share.skip, .delta_bias = &s.share.dt_bias, .gate = &s.dgate});
      g.a_log += s.share.a_log;
      g.skip += s.share.skip;
      g.dt_bias += s.share.dt_bias;
      s.daz.block(at, c, length, c) = s.dgate;
    }
    g.a_log.array() *= saved.a.array();  // dA / dA_log = A
    eb::linear_backward(saved.rbc.leftCols(r), layer.w_dt, s.ddelta, s.drbc.leftCols(r), g.w_dt);
    eb::linear_accumulate_input(s.drbc, layer.w_x, s.du);
    eb::linear_backward_weight(saved.u, s.drbc, g.w_x);
    for (Index at = 0; at < rows; at += length) {
      eb::conv1d_backward(saved.az.block(at, 0, length, c), layer.conv, s.du.middleRows(at, length),
                          s.daz.block(at, 0, length, c), s.share.conv, kConv,
                          {.bias = &layer.conv_bias}, nullptr, {.bias = &s.share.conv_bias});
      g.conv += s.share.conv;
      g.conv_bias += s.share.conv_bias;
    }
    eb::linear_backward(saved.y, layer.w_in, s.daz, s.dy, g.w_in);
  }

  static void add_parameters(MambaWeights<S>& to, MambaWeights<S>& from) {
    std::vector<S*> data;
    for_each_mamba_parameter(from, [&](const std::string&, auto& p) { data.push_back(p.data()); });
    std::size_t i = 0;
    for_each_mamba_parameter(to, [&](const std::string&, auto& p) {
      p += Eigen::Map<std::remove_cvref_t<decltype(p)>>(data[i++], p.rows(), p.cols());
    });
  }

  MambaConfig config_;
};

/// Muon on the hidden matrices, AdamW on the rest: the recipe of 01_tiny_lm.
class MambaTrainer {
 public:
  MambaTrainer(const Mamba<float>& model, const TrainingPlan& plan)
      : model_(model),
        plan_(plan),
        weights_(model.initial_weights(static_cast<std::uint64_t>(plan.seed))) {}

  const TrainingPlan& plan() const { return plan_; }
  const MambaWeights<float>& weights() const { return weights_; }
  Index step() const { return recipe_.step; }

  /// One step on packed sequences; returns the loss before it.
  double train(std::span<const Index> ids, std::span<const Index> targets, ExecutorRef executor) {
    const double loss =
        model_.train_step(weights_, ids, targets, plan_.batch, gradients_, slices_, executor);
    recipe_.apply(
        plan_, weights_, gradients_, [](auto& w, auto&& f) { for_each_mamba_parameter(w, f); },
        is_mamba_matrix, executor);
    return loss;
  }

  /// Mean loss of a batch of sequences of `length`, nats per byte.
  double loss(const Batch& batch, Index length, ExecutorRef executor) const {
    Mamba<float>::Slices slices(static_cast<std::size_t>(executor.workers()));
    return mean_loss(batch, length, executor,
                     [&](std::span<const Index> ids, int worker) -> const Matrix<float>& {
                       return model_.forward(weights_, ids, 1,
                                             slices[static_cast<std::size_t>(worker)]);
                     });
  }

 private:
  const Mamba<float>& model_;
  TrainingPlan plan_;
  MambaWeights<float> weights_, gradients_;
  Mamba<float>::Slices slices_;
  Recipe<float> recipe_;
};

}  // namespace example
