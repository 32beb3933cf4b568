// Optimisers and checkpoints for the decoder: Muon on the hidden matrices, AdamW on embedding, head and gains.
#pragma once

#include "llama.hpp"

#include <eigenblocks/io/safetensors.hpp>
#include <eigenblocks/optim/adamw.hpp>
#include <eigenblocks/optim/clip.hpp>
#include <eigenblocks/optim/muon.hpp>
#include <eigenblocks/optim/schedule.hpp>

#include <map>
#include <string>

namespace example {

/// Numbers a checkpoint needs to go on exactly where it stopped.
struct TrainingPlan {
  Index steps = 1000, length = 64, batch = 32, seed = 1;
  double muon_lr = 0.02, adamw_lr = 2e-3;
};

template <class S, class Attention = eb::Mha<S>>
class Trainer {
 public:
  Trainer(const Llama<S, Attention>& model, const TrainingPlan& plan) : model_(model), plan_(plan) {
    weights_ = model.initial_weights(static_cast<std::uint64_t>(plan.seed));
  }

  const TrainingPlan& plan() const { return plan_; }
  const LlamaWeights<S>& weights() const { return weights_; }
  Index step() const { return step_; }

  /// One step on packed sequences; returns the loss before it.
  double train(std::span<const Index> ids, std::span<const Index> targets, ExecutorRef executor) {
    const double loss =
        model_.train_step(weights_, ids, targets, plan_.batch, gradients_, slices_, executor);
    std::vector<eb::TensorRef<S>> all;
    for_each_parameter(gradients_, [&](const std::string&, auto& g) { all.emplace_back(g); });
    eb::clip_grad_norm<S>(all, {.max_norm = 1.0}, executor);
    const double rate = schedule();
    std::size_t i = 0;
    for_each_parameter(weights_, [&](const std::string& name, auto& p) {
      update(name, p, all[i++], rate, executor);
    });
    ++step_;
    return loss;
  }

  /// Weights alone, or with the optimiser's state and the plan, so that a resumed run is bitwise the uninterrupted one.
  void save(const std::string& path, bool with_optimiser) const {
    eb::SafetensorsWriter writer;
    for_each_parameter(weights_,
                       [&](const std::string& name, const auto& p) { writer.add(name, p); });
    if (with_optimiser) {
      for (const auto& [name, state] : muon_) writer.add("muon." + name, state.momentum);
      for (const auto& [name, state] : adamw_)
        writer.add("adamw.m." + name, state.m).add("adamw.v." + name, state.v);
    }
    const auto put = [&](const char* key, Index value) {
      writer.metadata(key, std::to_string(value));
    };
    put("step", step_);
    put("steps", plan_.steps);
    put("length", plan_.length);
    put("batch", plan_.batch);
    put("seed", plan_.seed);
    writer.write(path);
  }

  static TrainingPlan saved_plan(const std::string& path) {
    const auto file = eb::SafetensorsFile::open(path);
    TrainingPlan plan;
    plan.steps = saved_number(file, path, "steps");
    plan.length = saved_number(file, path, "length");
    plan.batch = saved_number(file, path, "batch");
    plan.seed = saved_number(file, path, "seed");
    return plan;
  }

  /// Replaces the weights, and with_optimiser all state, by a saved file's.
  void load(const std::string& path, bool with_optimiser) {
    const auto file = eb::SafetensorsFile::open(path);
    for_each_parameter(weights_, [&](const std::string& name, auto& p) {
      read(file, path, name, p);
      if (!with_optimiser) return;
      if (is_hidden_matrix(name)) {
        auto& state = muon_[name];
        state.momentum.resize(p.rows(), p.cols());
        read(file, path, "muon." + name, state.momentum);
      } else {
        auto& state = adamw_[name];
        const bool vector = p.cols() == 1;
        state.m.resize(vector ? 1 : p.rows(), vector ? p.rows() : p.cols());
        state.v.resize(state.m.rows(), state.m.cols());
        read(file, path, "adamw.m." + name, state.m);
        read(file, path, "adamw.v." + name, state.v);
        state.step = saved_number(file, path, "step");
      }
    });
    if (with_optimiser) step_ = saved_number(file, path, "step");
  }

 private:
  /// Warm-up for 50 steps, flat to 60 %, linear to 0.
  double schedule() const {
    const Index warmup = std::min<Index>(50, plan_.steps / 10), flat = plan_.steps * 6 / 10;
    return eb::lr_schedule(step_, {.kind = eb::ScheduleKind::wsd,
                                   .peak = 1.0,
                                   .warmup = warmup,
                                   .total = plan_.steps,
                                   .stable = flat - warmup,
                                   .min_ratio = 0.0});
  }

  template <class Parameter>
  void update(const std::string& name, Parameter& p, const eb::TensorRef<S>& gradient, double rate,
              ExecutorRef executor) {
    if constexpr (std::is_same_v<Parameter, Matrix<S>>) {
      if (is_hidden_matrix(name)) {
        const Eigen::Map<const Matrix<S>> g(gradient.data(), gradient.rows(), gradient.cols());
        eb::muon_step(p, g, muon_[name], {.lr = plan_.muon_lr * rate, .weight_decay = 0.1},
                      executor);
        return;
      }
    }
    eb::adamw_step<S>(
        p, gradient, adamw_[name],
        {.lr = plan_.adamw_lr * rate, .beta2 = 0.95, .eps = 1e-10, .weight_decay = 0.0}, executor);
  }

  static Index saved_number(const eb::SafetensorsFile& file, const std::string& path,
                            const std::string& key) {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end())
      throw eb::data_error(path + " is no checkpoint: it does not say its " + key);
    try {
      return std::stoll(found->second);
    } catch (const std::exception&) {
      throw eb::data_error(path + ": " + key + " = " + found->second + " is not a number");
    }
  }

  template <class M>
  static void read(const eb::SafetensorsFile& file, const std::string& path,
                   const std::string& name, M& to) {
    if (!file.contains(name)) throw eb::data_error(path + " has no tensor " + name);
    const Matrix<S> from = file.matrix<S>(name);
    if (from.size() != to.size() || (from.rows() != to.rows() && from.rows() != 1)) {
      throw eb::data_error(path + ": " + name + " is " + std::to_string(from.rows()) + " x " +
                           std::to_string(from.cols()) + ", this model's is " +
                           std::to_string(to.rows()) + " x " + std::to_string(to.cols()));
    }
    to = Eigen::Map<const M>(from.data(), to.rows(), to.cols());
  }

  const Llama<S, Attention>& model_;
  TrainingPlan plan_;
  LlamaWeights<S> weights_, gradients_;
  typename Llama<S, Attention>::Slices slices_;
  std::map<std::string, eb::MuonState<S>> muon_;
  std::map<std::string, eb::AdamWState<S>> adamw_;
  Index step_ = 0;
};

}  // namespace example
