// How the examples train: Muon on hidden matrices, AdamW on the rest, one schedule, and the loss on held-out text.
#pragma once

#include "text.hpp"

#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/optim/adamw.hpp>
#include <eigenblocks/optim/clip.hpp>
#include <eigenblocks/optim/muon.hpp>
#include <eigenblocks/optim/schedule.hpp>

#include <map>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace example {

/// Numbers a checkpoint needs to go on exactly where it stopped.
struct TrainingPlan {
  Index steps = 1000, length = 64, batch = 32, seed = 1;
  double muon_lr = 0.02, adamw_lr = 2e-3;
};

/// The optimisers' state: a regular value.
template <class S>
struct Recipe {
  std::map<std::string, eigenblocks::MuonState<S>> muon;
  std::map<std::string, eigenblocks::AdamWState<S>> adamw;
  Index step = 0;

  /// One step; clips the gradients to norm 1 first.  for_each(w, f) calls f(name, parameter) for every matrix and vector,
  /// in the same order for weights and gradients; hidden(name) says which matrices are Muon's.
  template <class Weights, class ForEach, class Hidden>
  void apply(const TrainingPlan& plan, Weights& weights, Weights& gradients,
             const ForEach& for_each, const Hidden& hidden, eigenblocks::ExecutorRef executor) {
    std::vector<eigenblocks::TensorRef<S>> all;
    for_each(gradients, [&](const std::string&, auto& g) { all.emplace_back(g); });
    eigenblocks::clip_grad_norm<S>(all, {.max_norm = 1.0}, executor);
    const double rate = schedule(plan);
    std::size_t i = 0;
    for_each(weights, [&](const std::string& name, auto& p) {
      const eigenblocks::TensorRef<S>& gradient = all[i++];
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(p)>, eigenblocks::Matrix<S>>) {
        if (hidden(name)) {
          const Eigen::Map<const eigenblocks::Matrix<S>> g(gradient.data(), gradient.rows(),
                                                           gradient.cols());
          eigenblocks::muon_step(p, g, muon[name], {.lr = plan.muon_lr * rate, .weight_decay = 0.1},
                                 executor);
          return;
        }
      }
      eigenblocks::adamw_step<S>(
          p, gradient, adamw[name],
          {.lr = plan.adamw_lr * rate, .beta2 = 0.95, .eps = 1e-10, .weight_decay = 0.0}, executor);
    });
    ++step;
  }

 private:
  /// Warm-up for 50 steps, flat to 60 %, linear to 0.
  double schedule(const TrainingPlan& plan) const {
    const Index warmup = std::min<Index>(50, plan.steps / 10), flat = plan.steps * 6 / 10;
    return eigenblocks::lr_schedule(step, {.kind = eigenblocks::ScheduleKind::wsd,
                                           .peak = 1.0,
                                           .warmup = warmup,
                                           .total = plan.steps,
                                           .stable = flat - warmup,
                                           .min_ratio = 0.0});
  }
};

/// Nats per target, the mean over a batch of sequences of `length`; logits(ids, worker) are those of one sequence.
template <class Logits>
double mean_loss(const Batch& batch, Index length, eigenblocks::ExecutorRef executor,
                 const Logits& logits) {
  const auto n = static_cast<std::size_t>(length);
  const std::span<const Index> ids(batch.ids), targets(batch.targets);
  std::vector<double> each(ids.size() / n);
  executor.run(static_cast<Index>(each.size()), [&](Index b, int worker) {
    const std::size_t at = static_cast<std::size_t>(b) * n;
    each[static_cast<std::size_t>(b)] =
        eigenblocks::cross_entropy(logits(ids.subspan(at, n), worker), targets.subspan(at, n),
                                   {.reduction = eigenblocks::Reduction::sum});
  });
  double sum = 0;
  for (const double one : each) sum += one;
  return sum / static_cast<double>(ids.size());
}

}  // namespace example
