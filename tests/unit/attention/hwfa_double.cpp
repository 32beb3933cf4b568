#include "mha_case.hpp"

#include <eigenblocks/attention/hwfa_layer.hpp>

namespace mha_case {

std::vector<Layer> hwfa_layers(const eb::HwfaPlan& plan, const eb::MhaOptions& options) {
  return eb::hwfa_layers<double>(plan, options);
}
Layer rerope_mha(const eb::MhaOptions& options, const eb::NearFarPosition& position) {
  return eb::rerope_mha<double>(options, position);
}

}  // namespace mha_case
