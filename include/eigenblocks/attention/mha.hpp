// The multi-head attention layer of decoder models: MHA, MQA and GQA with causal attention, rotary positions and q/k norm.
//
//   q = x W_q + b_q,  k = x W_k + b_k,  v = x W_v + b_v           W_q D x (H d), W_k and W_v D x (KV d), in x out
//   q = R(pos) norm(q),  k = R(pos) norm(k)                       norm before rotation; either may be off
//   y = attention(q, k, v) W_o + b_o                              W_o (H d) x D, causal, window, soft-cap, sinks, log-n
//
//   const Mha<float> layer({.heads = 8, .kv_heads = 2, .head_dim = 64});      // options and rotary table, made once
//   mha_forward(layer, weights, x, y, saved, {.cu_seqlens = cu});
//   mha_backward(layer, weights, saved, x, dy, dx, dweights, {.cu_seqlens = cu});
//   MhaState<float> state = mha_state(layer, capacity);
//   mha_step(layer, weights, state, rows, out);                    // any number of rows: prompt, chunk or one token
//
// Several sequences packed in x are told apart by cu_seqlens; positions start anew (at first_position) in each.
// Chunked steps give the rows of the full pass.  mha_step allocates nothing once state has seen its largest chunk and the cache
// its capacity.  W_q, W_k, W_v are separate: optimisers such as Muon treat them so, and checkpoints store them so.
// Relative positions that stop growing (ReRoPE and its kin): mha_rerope.hpp makes such a layer, everything else stays.
// Sources: arXiv 1706.03762, 1911.02150, 2305.13245; q/k norm as in Qwen3 (rms_head) and OLMo 2 (rms_full); arXiv 2302.05442.
#pragma once

#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/mha_options.hpp>
#include <eigenblocks/attention/rerope_cache.hpp>
#include <eigenblocks/attention/scale.hpp>
#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/nn/norm.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

/// What the backward needs; its buffers are reused when the same object is passed again.
template <RealScalar S>
struct MhaSaved {
  Matrix<S> q_raw, k_raw;  ///< projections before the norm; empty without one
  Vector<S> q_rstd, k_rstd;
  Matrix<S> q, k, v;  ///< as attended to: after norm and rotation (a position policy rotates later)
  Vector<S> row_scale;  ///< log-n factors; empty without
  Matrix<S> attended;   ///< concatenated heads, before W_o
  AttentionSaved<S> attention;
};

namespace detail {

template <RealScalar S>
AttentionTensors<S> mha_tensors(const MhaWeights<S>& weights, const Vector<S>& row_scale) {
  AttentionTensors<S> tensors;
  if (weights.sinks.size() != 0) tensors.sinks = &weights.sinks;
  if (row_scale.size() != 0) tensors.row_scale = &row_scale;
  return tensors;
}

/// Log-n factors of every sequence's rows, of which `before` tokens are already cached.
template <RealScalar S>
void mha_row_scale(const Mha<S>& layer, const MhaBatch& batch, Index rows, Index before,
                   Vector<S>& scale) {
  const MhaOptions& o = layer.options();
  scale.resize(o.logn_length == 0 ? 0 : rows);
  if (scale.size() == 0) return;
  const ScaleRule rule = o.logn == LognMode::clipped ? ScaleRule::log_n_clamped : ScaleRule::log_n;
  for_each_batch_part(batch, rows, [&](Index first, Index count) {
    for (Index t = 0; t < count; ++t) {
      Index seen = before + t + 1;
      if (o.window_left >= 0) seen = std::min(seen, o.window_left + 1);
      scale[first + t] = static_cast<S>(
          attention_scale(rule, static_cast<double>(seen), 1, static_cast<double>(o.logn_length)));
    }
  });
}

/// y = x W, plus b unless it is empty.
template <MatrixLike X, RealScalar S, class Y>
void project(const X& x, const Matrix<S>& w, const Vector<S>& b, Y& y, ExecutorRef executor) {
  if (b.size() == 0) {
    linear_forward(x, w, y, executor);
  } else {
    linear_forward(x, w, b, y, executor);
  }
}

/// Gradients of project by its parameters, overwritten.
template <MatrixLike X, MatrixLike DY, RealScalar S>
void project_backward(const X& x, const DY& dy, Matrix<S>& dw, Vector<S>& db,
                      ExecutorRef executor) {
  linear_backward_weight(x, dy, dw, executor);
  if (db.size() != 0) linear_backward_bias(dy, db, executor);
}

/// Norm and rotation of projected heads, in place; keeps `raw` and rstd when there is a norm.
template <RealScalar S>
void mha_position(const Mha<S>& layer, const Vector<S>& gain, Index heads, Matrix<S>& x,
                  Matrix<S>& raw, Vector<S>& rstd, const MhaBatch& batch, ExecutorRef executor) {
  const MhaOptions& o = layer.options();
  if (o.qk_norm != QkNorm::none) {
    const RmsNormOptions norm{.eps = o.norm_eps,
                              .heads = o.qk_norm == QkNorm::rms_head ? heads : 1};
    raw = x;
    rstd.resize(x.rows() * norm.heads);
    rms_norm_forward(raw, gain, x, rstd, norm, executor);
  }
  if (layer.rotary() == nullptr || layer.relative() != nullptr) return;
  for_each_batch_part(batch, x.rows(), [&](Index first, Index rows) {
    rope_in_place(x.middleRows(first, rows), batch.first_position, *layer.rotary(),
                  {.heads = heads}, executor);
  });
}

/// q, k, v of all rows, normed and rotated, and room for what attention gives.
template <MatrixLike X, RealScalar S>
void mha_project(const Mha<S>& layer, const MhaWeights<S>& weights, const X& x, MhaSaved<S>& saved,
                 const MhaBatch& batch, ExecutorRef executor) {
  const MhaOptions& o = layer.options();
  const Index rows = x.rows();
  saved.q.resize(rows, o.heads * o.head_dim);
  saved.k.resize(rows, o.kv_heads * o.head_dim);
  saved.v.resize(rows, o.kv_heads * o.head_dim);
  saved.attended.resize(rows, o.heads * o.head_dim);
  project(x, weights.w_q, weights.b_q, saved.q, executor);
  project(x, weights.w_k, weights.b_k, saved.k, executor);
  project(x, weights.w_v, weights.b_v, saved.v, executor);
  mha_position(layer, weights.q_norm, o.heads, saved.q, saved.q_raw, saved.q_rstd, batch, executor);
  mha_position(layer, weights.k_norm, o.kv_heads, saved.k, saved.k_raw, saved.k_rstd, batch,
               executor);
}

/// The way back of mha_position: dx in place, dgain overwritten.
template <RealScalar S>
void mha_position_backward(const Mha<S>& layer, const Vector<S>& gain, Index heads,
                           const Matrix<S>& raw, const Vector<S>& rstd, Matrix<S>& dx,
                           Vector<S>& dgain, const MhaBatch& batch, ExecutorRef executor) {
  const MhaOptions& o = layer.options();
  if (layer.rotary() != nullptr && layer.relative() == nullptr) {
    for_each_batch_part(batch, dx.rows(), [&](Index first, Index rows) {
      rope_backward_in_place(dx.middleRows(first, rows), batch.first_position, *layer.rotary(),
                             {.heads = heads}, executor);
    });
  }
  dgain.resize(gain.size());
  if (o.qk_norm == QkNorm::none) {
    dgain.setZero();
    return;
  }
  const RmsNormOptions norm{.eps = o.norm_eps, .heads = o.qk_norm == QkNorm::rms_head ? heads : 1};
  rms_norm_backward(raw, gain, rstd, dx, dx, dgain, norm, executor);
}

/// saved.attended and saved.attention from saved.q, k, v.
template <RealScalar S>
void mha_attend(const Mha<S>& layer, const MhaWeights<S>& weights, MhaSaved<S>& saved,
                const MhaBatch& batch, ExecutorRef executor) {
  mha_row_scale(layer, batch, saved.q.rows(), 0, saved.row_scale);
  if (layer.operations() != nullptr) {
    layer.operations()->forward(layer, weights, saved, batch, executor);
    return;
  }
  const Index whole[] = {0, saved.q.rows()};
  const std::span<const Index> cu =
      batch.cu_seqlens.empty() ? std::span<const Index>(whole) : batch.cu_seqlens;
  layer.with_rule([&](const auto& rule) {
    saved.attention =
        attention_varlen_forward(saved.q, saved.k, saved.v, cu, cu, saved.attended, layer.shape(),
                                 rule, mha_tensors(weights, saved.row_scale), executor);
  });
}

/// dq, dk, dv and dweights.sinks from dattended, all overwritten.
template <RealScalar S>
void mha_attend_backward(const Mha<S>& layer, const MhaWeights<S>& weights,
                         const MhaSaved<S>& saved, const Matrix<S>& dattended, Matrix<S>& dq,
                         Matrix<S>& dk, Matrix<S>& dv, MhaWeights<S>& dweights,
                         const MhaBatch& batch, ExecutorRef executor) {
  if (layer.operations() != nullptr) {
    layer.operations()->backward(layer, weights, saved, dattended, dq, dk, dv, dweights, batch,
                                 executor);
    return;
  }
  AttentionTensorGradients<S> gradients;
  if (weights.sinks.size() != 0) gradients.sinks = &dweights.sinks;
  const Index whole[] = {0, saved.q.rows()};
  const std::span<const Index> cu =
      batch.cu_seqlens.empty() ? std::span<const Index>(whole) : batch.cu_seqlens;
  layer.with_rule([&](const auto& rule) {
    attention_varlen_backward(saved.attention, saved.q, saved.k, saved.v, cu, cu, saved.attended,
                              dattended, dq, dk, dv, layer.shape(), rule,
                              mha_tensors(weights, saved.row_scale), &gradients, executor);
  });
}

}  // namespace detail

/// y (T x D) from x (T x D); fills `saved` for the backward.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void mha_forward(const Mha<scalar_t<X>>& layer, const MhaWeights<scalar_t<X>>& weights, const X& x,
                 Y&& y, MhaSaved<scalar_t<X>>& saved, const MhaBatch& batch = {},
                 ExecutorRef executor = {}) {
  const Index rows = x.rows();
  detail::require_mha_weights(layer, weights, x.cols());
  detail::require_shape("y", y.rows(), y.cols(), rows, x.cols(), "shape of x");
  detail::require_batch(batch, rows);
  detail::mha_project(layer, weights, x, saved, batch, executor);
  detail::mha_attend(layer, weights, saved, batch, executor);
  detail::project(saved.attended, weights.w_o, weights.b_o, y, executor);
}

/// dx (T x D) and every gradient of the weights (dweights is resized and overwritten) from dy.
template <MatrixLike X, MatrixLike DY, OutputMatrix DX>
  requires SameScalar<X, DY, DX> && RealScalar<scalar_t<X>>
void mha_backward(const Mha<scalar_t<X>>& layer, const MhaWeights<scalar_t<X>>& weights,
                  const MhaSaved<scalar_t<X>>& saved, const X& x, const DY& dy, DX&& dx,
                  MhaWeights<scalar_t<X>>& dweights, const MhaBatch& batch = {},
                  ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const MhaOptions& o = layer.options();
  const Index rows = x.rows();
  detail::require_mha_weights(layer, weights, x.cols());
  detail::require_shape("dy", dy.rows(), dy.cols(), rows, x.cols(), "shape of x");
  detail::require_shape("dx", dx.rows(), dx.cols(), rows, x.cols(), "shape of x");
  detail::require_shape("saved.q", saved.q.rows(), saved.q.cols(), rows, o.heads * o.head_dim,
                        "rows of x, heads * head_dim");
  detail::require_batch(batch, rows);
  const auto like = [](Matrix<S>& gradient, const Matrix<S>& of) {
    gradient.resize(of.rows(), of.cols());
  };
  like(dweights.w_q, weights.w_q);
  like(dweights.w_k, weights.w_k);
  like(dweights.w_v, weights.w_v);
  like(dweights.w_o, weights.w_o);
  dweights.b_q.resize(weights.b_q.size());
  dweights.b_k.resize(weights.b_k.size());
  dweights.b_v.resize(weights.b_v.size());
  dweights.b_o.resize(weights.b_o.size());
  dweights.sinks.resize(weights.sinks.size());
  Matrix<S> dattended(rows, saved.attended.cols());
  linear_backward_input(dy, weights.w_o, dattended, executor);
  detail::project_backward(saved.attended, dy, dweights.w_o, dweights.b_o, executor);
  Matrix<S> dq(rows, saved.q.cols()), dk(rows, saved.k.cols()), dv(rows, saved.v.cols());
  detail::mha_attend_backward(layer, weights, saved, dattended, dq, dk, dv, dweights, batch,
                              executor);
  detail::mha_position_backward(layer, weights.q_norm, o.heads, saved.q_raw, saved.q_rstd, dq,
                                dweights.q_norm, batch, executor);
  detail::mha_position_backward(layer, weights.k_norm, o.kv_heads, saved.k_raw, saved.k_rstd, dk,
                                dweights.k_norm, batch, executor);
  detail::project_backward(x, dq, dweights.w_q, dweights.b_q, executor);
  detail::project_backward(x, dk, dweights.w_k, dweights.b_k, executor);
  detail::project_backward(x, dv, dweights.w_v, dweights.b_v, executor);
  linear_backward_input(dq, weights.w_q, dx, executor);
  linear_accumulate_input(dk, weights.w_k, dx, executor);
  linear_accumulate_input(dv, weights.w_v, dx, executor);
}

/// Everything that decoding needs between two calls: a regular value, a copy is a snapshot.
template <RealScalar S>
struct MhaState {
  KvCache<S> cache;
  MhaSaved<S> scratch;       ///< buffers of the projections, reused from call to call
  Index first_position = 0;  ///< position of the first token, where rotation starts to count
  std::optional<ReropeCache<S>> rerope = std::nullopt;  ///< in the place of cache under a policy

  Index size() const { return rerope ? rerope->size() : cache.size(); }
  void truncate(Index n) { rerope ? rerope->truncate(n) : cache.truncate(n); }
  Index bytes_per_token() const {
    return rerope ? rerope->bytes_per_token() : cache.bytes_per_token();
  }
  /// Bytes held in all.
  std::size_t bytes() const { return rerope ? rerope->bytes() : cache.bytes(); }
};

namespace detail {

/// Attention under a position policy, behind pointers: programs without one do not compile its kernels.
template <RealScalar S>
struct MhaRelative {
  void (*forward)(const Mha<S>&, const MhaWeights<S>&, MhaSaved<S>&, const MhaBatch&, ExecutorRef);
  void (*backward)(const Mha<S>&, const MhaWeights<S>&, const MhaSaved<S>&,
                   const Matrix<S>& dattended, Matrix<S>& dq, Matrix<S>& dk, Matrix<S>& dv,
                   MhaWeights<S>& dweights, const MhaBatch&, ExecutorRef);
  void (*step)(const Mha<S>&, const MhaWeights<S>&, MhaState<S>&, ExecutorRef);
};

/// The state has the kind of cache the layer needs: a ring must not be shorter than the layer's window.
template <RealScalar S>
void require_mha_state(const Mha<S>& layer, const MhaState<S>& state) {
  require((layer.relative() != nullptr) == state.rerope.has_value(), "the state is ",
          state.rerope ? "" : "not ", "one of a layer with a position policy, the layer is ",
          layer.relative() ? "one" : "not");
  const Index kept = state.cache.options().window, window = layer.options().window_left;
  require(kept < 0 || (window >= 0 && window <= kept), "the state keeps a window of ", kept,
          ", the layer's window_left is ", window);
}

}  // namespace detail

/// An empty state with room for `capacity` tokens; a layer with a window keeps only what the window can see, and room for
/// `chunk` tokens taken at once (KvCacheOptions).  Under a position policy all tokens stay.
template <RealScalar S>
MhaState<S> mha_state(const Mha<S>& layer, Index capacity = 0, Index first_position = 0,
                      Index chunk = KvCacheOptions{}.chunk) {
  const MhaOptions& o = layer.options();
  KvCacheOptions cache{.kv_heads = o.kv_heads, .head_dim = o.head_dim, .capacity = capacity};
  MhaState<S> state;
  state.first_position = first_position;
  if (layer.relative() != nullptr) {
    state.rerope.emplace(*layer.relative(), cache);
  } else {
    cache.window = o.window_left;
    cache.chunk = chunk;
    state.cache = KvCache<S>(cache);
  }
  return state;
}

/// The rows that follow what the state has seen; y is rows x D.  On an error nothing is changed.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void mha_step(const Mha<scalar_t<X>>& layer, const MhaWeights<scalar_t<X>>& weights,
              MhaState<scalar_t<X>>& state, const X& x, Y&& y, ExecutorRef executor = {}) {
  const Index rows = x.rows();
  detail::require_mha_weights(layer, weights, x.cols());
  detail::require_shape("y", y.rows(), y.cols(), rows, x.cols(), "shape of x");
  detail::require_mha_state(layer, state);
  (state.rerope ? state.rerope->far() : state.cache).require_room(rows);
  MhaSaved<scalar_t<X>>& s = state.scratch;
  const MhaBatch next{.first_position = state.first_position + state.size()};
  detail::mha_project(layer, weights, x, s, next, executor);
  detail::mha_row_scale(layer, next, rows, state.size(), s.row_scale);
  if (layer.operations() != nullptr) {
    layer.operations()->step(layer, weights, state, executor);
  } else {
    layer.with_rule([&](const auto& rule) {
      attention_step(state.cache, s.q, s.k, s.v, s.attended, layer.shape(), rule,
                     detail::mha_tensors(weights, s.row_scale), executor);
    });
  }
  detail::project(s.attended, weights.w_o, weights.b_o, y, executor);
}

EIGENBLOCKS_NAMESPACE_END
