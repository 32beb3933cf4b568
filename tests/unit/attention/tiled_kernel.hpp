// Body of attention_test::tiled, for the files that instantiate it.
#pragma once

#include "support/attention_case.hpp"

#include <eigenblocks/attention/kernel.hpp>

namespace attention_test {

/// A register tile with few and odd sizes: nothing may depend on the native one.
struct NarrowTile {
  static constexpr int kRows = 2, kVectors = 1, kGradientRows = 3;
};

template <class Shape, class S, class Rule>
Outcome<S> run_tiles(const Problem& p, const Rule& rule, const Run& run, bool backward) {
  const Matrix<S> q = p.q.cast<S>(), k = p.k.cast<S>(), v = p.v.cast<S>(), dout = p.dout.cast<S>();
  const Matrix<S> bias = p.bias.cast<S>(), dlse = p.dlse.cast<S>();
  const Vector<S> row_scale = p.row_scale.cast<S>(), sinks = p.sinks.cast<S>();
  const eb::AttentionTensors<S> tensors{.bias = p.has_bias() ? &bias : nullptr,
                                        .mask = p.options.keep ? &p.keep : nullptr,
                                        .row_scale = p.options.row_scale ? &row_scale : nullptr,
                                        .sinks = p.options.sinks ? &sinks : nullptr};
  Outcome<S> result(p);
  eb::Workspace workspace;
  eb::detail::attention_forward_into<Shape>(q, k, v, result.out, result.lse, p.shape, rule, tensors,
                                            run.executor, workspace, run.tuning);
  if (!backward) return result;
  const auto gradients = result.gradients(p.options.upstream_lse ? &dlse : nullptr);
  eb::detail::attention_backward_into<Shape>(result.lse, q, k, v, result.out, dout, result.dq,
                                             result.dk, result.dv, p.shape, rule, tensors,
                                             &gradients, run.executor, workspace, run.tuning);
  return result;
}

template <class S>
Outcome<S> tiled(const Problem& p, const AnyRule& rule, const Run& run, bool backward) {
  return rule.visit([&](const auto& concrete) {
    return run.narrow ? run_tiles<NarrowTile, S>(p, concrete, run, backward)
                      : run_tiles<void, S>(p, concrete, run, backward);
  });
}

}  // namespace attention_test
