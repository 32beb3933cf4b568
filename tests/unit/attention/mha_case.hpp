// The multi-head layer in double behind plain functions: its kernels are compiled once for all tests, in mha_double.cpp, and
// those of ReRoPE in hwfa_double.cpp.
#pragma once

#include <eigenblocks/attention/hwfa.hpp>
#include <eigenblocks/attention/mha.hpp>

#include <vector>

namespace mha_case {

namespace eb = eigenblocks;

using Layer = eb::Mha<double>;
using Weights = eb::MhaWeights<double>;
using Rows = eb::ConstMatrixRef<double>;
using OutRows = eb::MatrixRef<double>;

void forward(const Layer& layer, const Weights& weights, const Rows& x, OutRows y,
             eb::MhaSaved<double>& saved, const eb::MhaBatch& batch = {},
             eb::ExecutorRef executor = {});
void backward(const Layer& layer, const Weights& weights, const eb::MhaSaved<double>& saved,
              const Rows& x, const Rows& dy, OutRows dx, Weights& dweights,
              const eb::MhaBatch& batch = {}, eb::ExecutorRef executor = {});
void step(const Layer& layer, const Weights& weights, eb::MhaState<double>& state, const Rows& x,
          OutRows y, eb::ExecutorRef executor = {});

std::vector<Layer> hwfa_layers(const eb::HwfaPlan& plan, const eb::MhaOptions& options);
Layer rerope_mha(const eb::MhaOptions& options, const eb::NearFarPosition& position);

}  // namespace mha_case
