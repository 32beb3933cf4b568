// A training run that says how far it is.
#pragma once

#include "recipe.hpp"

#include <chrono>
#include <cstdio>

namespace example {

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Steps of any trainer (plan, step, train) until `stop`, with a line every few seconds.
template <class T>
void train(T& trainer, const Corpus& corpus, Index stop, eigenblocks::ExecutorRef executor) {
  const TrainingPlan& plan = trainer.plan();
  const double start = seconds();
  const Index first = trainer.step();
  double shown = start, running = 0;
  while (trainer.step() < stop) {
    const Index step = trainer.step();
    const Batch batch = training_batch(corpus, static_cast<std::uint64_t>(plan.seed), step,
                                       plan.batch, plan.length);
    const double loss = trainer.train(batch.ids, batch.targets, executor);
    running = step == first ? loss : 0.95 * running + 0.05 * loss;
    if (seconds() - shown > 2.0 || trainer.step() == stop) {
      shown = seconds();
      const double per_step = (shown - start) / static_cast<double>(trainer.step() - first);
      std::printf("step %5lld/%lld  loss %.3f  %.0f tokens/s  %.0f s left\n",
                  static_cast<long long>(trainer.step()), static_cast<long long>(plan.steps),
                  running, static_cast<double>(plan.batch * plan.length) / per_step,
                  per_step * static_cast<double>(stop - trainer.step()));
      std::fflush(stdout);
    }
  }
}

}  // namespace example
