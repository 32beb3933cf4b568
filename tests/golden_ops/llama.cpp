// Golden op llama: the decoder of examples/support/llama.hpp, full pass and backward, in chunks and token by token.
#include "../../examples/support/llama.hpp"
#include "support/golden.hpp"

#include <string>
#include <vector>

namespace {

using eigenblocks::Index;
using eigenblocks::Matrix;
using eigenblocks::Vector;
using example::Llama;
using example::LlamaConfig;
using example::LlamaWeights;

struct LlamaOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const LlamaConfig config{.vocab = c.param_int("vocab"),
                             .width = c.param_int("d"),
                             .layers = c.param_int("layers"),
                             .heads = c.param_int("heads"),
                             .kv_heads = c.param_int("kv_heads"),
                             .ff = c.param_int("ff"),
                             .rope_base = c.param_real("rope_base"),
                             .eps = c.param_real("eps"),
                             .tied = c.param_flag("tied"),
                             .rope_layout = c.param("rope_layout") == "interleaved"
                                                ? eigenblocks::RopeLayout::interleaved
                                                : eigenblocks::RopeLayout::half};
    const Llama<S> model(config);
    LlamaWeights<S> w = model.shaped_weights();
    for_each_parameter(w, [&](const std::string& name, auto& p) {
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(p)>, Vector<S>>) {
        p = c.vector("in." + name);
      } else {
        p = c.matrix("in." + name);
      }
    });
    const std::vector<Index> ids = c.integers("in.ids"), targets = c.integers("in.targets");
    const Index rows = static_cast<Index>(ids.size());

    typename Llama<S>::Slice slice;
    c.expect("out.logits", model.forward(w, ids, {}, slice));
    const double weight = 1.0 / static_cast<double>(rows);
    c.expect("out.loss",
             static_cast<S>(weight * model.forward_backward(w, ids, targets, {}, weight, slice)));
    for_each_parameter(slice.gradients,
                       [&](const std::string& name, auto& g) { c.expect("gin." + name, g); });

    for (const Index chunk : {Index{1}, Index{2}, rows}) {
      c.form("steps of " + std::to_string(chunk));
      auto state = model.state(0);
      Matrix<S> logits(rows, config.vocab), part;
      for (Index t = 0; t < rows; t += chunk) {
        const Index n = std::min(chunk, rows - t);
        model.step(w, state,
                   std::span(ids).subspan(static_cast<std::size_t>(t), static_cast<std::size_t>(n)),
                   part);
        logits.middleRows(t, n) = part;
      }
      c.expect("out.logits", logits);
    }
  }
};

}  // namespace

void register_llama(golden::Registry& registry) { registry.add("llama", LlamaOp{}); }
