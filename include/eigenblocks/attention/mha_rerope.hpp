// A multi-head attention layer whose relative positions stop growing, or grow slower, beyond a window: ReRoPE, Leaky ReRoPE,
// Self-Extend (position/rerope.hpp), in the layer of mha.hpp.
//
//   s_ij = scale rho_i <R(i) q_i, R(j) k_j>   i - j < w,      scale rho_i <R(P_i) q_i, R(S_j) k_j>   otherwise
//
//   const Mha<float> layer = rerope_mha<float>({.heads = 8, .head_dim = 64, .logn_length = 512}, rerope(256));
//   mha_forward(layer, ...), mha_backward(layer, ...), mha_state(layer), mha_step(layer, ...)          as in mha.hpp
//
// Positions count from the start of each sequence, whatever first_position is.  The state holds a ReropeCache: all tokens stay,
// also with a window_left.  Here and not in mha.hpp because the kernels of a policy are compiled where they are asked for.
// Errors (invalid_argument): those of Mha and of the policy; no rotary positions; soft_cap, which has no kernel here.
// Sources: kexue.fm 9708, 9728; arXiv 2401.01325.
#pragma once

#include <eigenblocks/attention/mha.hpp>
#include <eigenblocks/attention/rerope.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <RealScalar S>
auto mha_rerope_rule(const Mha<S>& layer) {
  return attention_rule(layer.mask(), IdentityScore{}, *layer.relative());
}

template <RealScalar S>
void mha_rerope_forward(const Mha<S>& layer, const MhaWeights<S>& weights, MhaSaved<S>& saved,
                        const MhaBatch& batch, ExecutorRef executor) {
  const AttentionTensors<S> all = mha_tensors(weights, saved.row_scale);
  const auto rule = mha_rerope_rule(layer);
  saved.attention.lse.resize(saved.q.rows(), layer.options().heads);
  for_each_batch_part(batch, saved.q.rows(), [&](Index first, Index rows) {
    const SequenceTensors<S> part(all, first, rows);
    saved.attention.lse.middleRows(first, rows) =
        rerope_attention_forward(saved.q.middleRows(first, rows), saved.k.middleRows(first, rows),
                                 saved.v.middleRows(first, rows),
                                 saved.attended.middleRows(first, rows), layer.shape(),
                                 *layer.rotary(), rule, part.tensors, executor)
            .lse;
  });
}

template <RealScalar S>
void mha_rerope_backward(const Mha<S>& layer, const MhaWeights<S>& weights,
                         const MhaSaved<S>& saved, const Matrix<S>& dattended, Matrix<S>& dq,
                         Matrix<S>& dk, Matrix<S>& dv, MhaWeights<S>& dweights,
                         const MhaBatch& batch, ExecutorRef executor) {
  const AttentionTensors<S> all = mha_tensors(weights, saved.row_scale);
  const auto rule = mha_rerope_rule(layer);
  dweights.sinks.setZero();
  Vector<S> dsinks(weights.sinks.size());
  AttentionTensorGradients<S> gradients;
  if (dsinks.size() != 0) gradients.sinks = &dsinks;
  for_each_batch_part(batch, saved.q.rows(), [&](Index first, Index rows) {
    const SequenceTensors<S> part(all, first, rows);
    const AttentionSaved<S> of_part{saved.attention.lse.middleRows(first, rows)};
    rerope_attention_backward(of_part, saved.q.middleRows(first, rows),
                              saved.k.middleRows(first, rows), saved.v.middleRows(first, rows),
                              saved.attended.middleRows(first, rows),
                              dattended.middleRows(first, rows), dq.middleRows(first, rows),
                              dk.middleRows(first, rows), dv.middleRows(first, rows), layer.shape(),
                              *layer.rotary(), rule, part.tensors, &gradients, executor);
    dweights.sinks += dsinks;
  });
}

template <RealScalar S>
void mha_rerope_step(const Mha<S>& layer, const MhaWeights<S>& weights, MhaState<S>& state,
                     ExecutorRef executor) {
  MhaSaved<S>& s = state.scratch;
  rerope_attention_step(*state.rerope, s.q, s.k, s.v, s.attended, layer.shape(), *layer.rotary(),
                        mha_rerope_rule(layer), mha_tensors(weights, s.row_scale), executor);
}

template <RealScalar S>
inline constexpr MhaRelative<S> kMhaRerope{&mha_rerope_forward<S>, &mha_rerope_backward<S>,
                                           &mha_rerope_step<S>};

}  // namespace detail

/// A layer under a position policy; frequencies replaces the plain ones of options.rope_base.
template <RealScalar S>
Mha<S> rerope_mha(const MhaOptions& options, const NearFarPosition& position,
                  const RotaryFrequencies* frequencies = nullptr, Index positions = 4096) {
  detail::require_near_far(position);
  detail::require(options.soft_cap == 0, "soft_cap (", options.soft_cap,
                  ") must be 0: a layer with a position policy has none");
  Mha<S> layer(options, frequencies, positions);
  detail::require(layer.rotary() != nullptr, "rope_base (", options.rope_base,
                  ") must be positive: a position policy bends rotary positions");
  layer.set_relative(position, detail::kMhaRerope<S>);
  return layer;
}

EIGENBLOCKS_NAMESPACE_END
