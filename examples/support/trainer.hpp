// Optimisers and checkpoints for the decoder: Muon on the hidden matrices, AdamW on embedding, head and gains.
#pragma once

#include "llama.hpp"
#include "recipe.hpp"

#include <eigenblocks/io/safetensors.hpp>

#include <string>

namespace example {

template <class S, class Attention = eb::Mha<S>>
class Trainer {
 public:
  Trainer(const Llama<S, Attention>& model, const TrainingPlan& plan) : model_(model), plan_(plan) {
    weights_ = model.initial_weights(static_cast<std::uint64_t>(plan.seed));
  }

  const TrainingPlan& plan() const { return plan_; }
  const LlamaWeights<S>& weights() const { return weights_; }
  Index step() const { return recipe_.step; }

  /// One step on packed sequences; returns the loss before it.
  double train(std::span<const Index> ids, std::span<const Index> targets, ExecutorRef executor) {
    const double loss =
        model_.train_step(weights_, ids, targets, plan_.batch, gradients_, slices_, executor);
    recipe_.apply(
        plan_, weights_, gradients_, [](auto& w, auto&& f) { for_each_parameter(w, f); },
        is_hidden_matrix, executor);
    return loss;
  }

  /// Weights alone, or with the optimiser's state and the plan, so that a resumed run is bitwise the uninterrupted one.
  void save(const std::string& path, bool with_optimiser) const {
    eb::SafetensorsWriter writer;
    for_each_parameter(weights_,
                       [&](const std::string& name, const auto& p) { writer.add(name, p); });
    if (with_optimiser) {
      for (const auto& [name, state] : recipe_.muon) writer.add("muon." + name, state.momentum);
      for (const auto& [name, state] : recipe_.adamw)
        writer.add("adamw.m." + name, state.m).add("adamw.v." + name, state.v);
    }
    const auto put = [&](const char* key, Index value) {
      writer.metadata(key, std::to_string(value));
    };
    put("step", recipe_.step);
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
        auto& state = recipe_.muon[name];
        state.momentum.resize(p.rows(), p.cols());
        read(file, path, "muon." + name, state.momentum);
      } else {
        auto& state = recipe_.adamw[name];
        const bool vector = p.cols() == 1;
        state.m.resize(vector ? 1 : p.rows(), vector ? p.rows() : p.cols());
        state.v.resize(state.m.rows(), state.m.cols());
        read(file, path, "adamw.m." + name, state.m);
        read(file, path, "adamw.v." + name, state.v);
        state.step = saved_number(file, path, "step");
      }
    });
    if (with_optimiser) recipe_.step = saved_number(file, path, "step");
  }

 private:
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
  Recipe<S> recipe_;
};

}  // namespace example
