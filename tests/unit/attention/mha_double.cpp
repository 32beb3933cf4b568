#include "mha_case.hpp"

namespace mha_case {

void forward(const Layer& layer, const Weights& weights, const Rows& x, OutRows y,
             eb::MhaSaved<double>& saved, const eb::MhaBatch& batch, eb::ExecutorRef executor) {
  eb::mha_forward(layer, weights, x, y, saved, batch, executor);
}
void backward(const Layer& layer, const Weights& weights, const eb::MhaSaved<double>& saved,
              const Rows& x, const Rows& dy, OutRows dx, Weights& dweights,
              const eb::MhaBatch& batch, eb::ExecutorRef executor) {
  eb::mha_backward(layer, weights, saved, x, dy, dx, dweights, batch, executor);
}
void step(const Layer& layer, const Weights& weights, eb::MhaState<double>& state, const Rows& x,
          OutRows y, eb::ExecutorRef executor) {
  eb::mha_step(layer, weights, state, x, y, executor);
}

}  // namespace mha_case
