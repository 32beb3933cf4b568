// The multi-head attention layer of decoder models: MHA, MQA and GQA with causal attention, rotary positions and q/k norm.
//
//   q = x W_q + b_q,  k = x W_k + b_k,  v = x W_v + b_v           W_q D x (H d), W_k and W_v D x (KV d), in x out
//   q = R(pos) norm(q),  k = R(pos) norm(k)                       norm before rotation; either may be off
//   y = attention(q, k, v) W_o + b_o                              W_o (H d) x D, causal, window, soft-cap, sinks
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
// Sources: arXiv 1706.03762, 1911.02150, 2305.13245; q/k norm as in Qwen3 (rms_head) and OLMo 2 (rms_full); arXiv 2302.05442.
#pragma once

#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/varlen.hpp>
#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/position/rope.hpp>

#include <optional>
#include <span>

EIGENBLOCKS_NAMESPACE_BEGIN

/// none; rms_head: each head's d channels, one gain [d] for all heads; rms_full: the whole row, gain [H d] and [KV d].
enum class QkNorm { none, rms_head, rms_full };

struct MhaOptions {
  Index heads = 1;
  Index kv_heads = 0;  ///< 0 means heads
  Index head_dim = 1;  ///< d; need not be D / heads
  QkNorm qk_norm = QkNorm::none;
  double norm_eps = 1e-6;
  double rope_base = 10000.0;                 ///< 0 switches rotary positions off (NoPE)
  Index rotary_dim = 0;                       ///< rotated channels of a head; 0 means all
  RopeLayout rope_layout = RopeLayout::half;  ///< as transformers' Llama, Qwen, Mistral
  Index window_left = -1;  ///< -1 is unbounded; transformers' sliding_window W is W - 1
  double soft_cap = 0;     ///< 0 is off
  std::optional<double> scale = std::nullopt;  ///< default 1/sqrt(head_dim)
};

/// Parameters, or their gradients.  Vectors of size 0 are absent.
template <RealScalar S>
struct MhaWeights {
  Matrix<S> w_q, w_k, w_v, w_o;
  Vector<S> b_q, b_k, b_v, b_o;
  Vector<S> q_norm, k_norm;
  Vector<S> sinks;
};

/// Options, validated, with what is made from them once.  Immutable: threads share it.
template <RealScalar S>
class Mha {
 public:
  /// Errors: heads, kv_heads, head_dim < 1; kv_heads not dividing heads; rotary_dim odd or larger than head_dim; rope_base
  /// negative; soft_cap negative; window_left < -1; scale not finite.  frequencies replaces the plain ones of rope_base.
  explicit Mha(const MhaOptions& options, const RotaryFrequencies* frequencies = nullptr,
               Index positions = 4096)
      : options_(options) {
    if (options_.kv_heads == 0) options_.kv_heads = options_.heads;
    if (options_.rotary_dim == 0) options_.rotary_dim = options_.head_dim;
    const MhaOptions& o = options_;
    detail::require(o.heads >= 1 && o.kv_heads >= 1, "heads (", o.heads, ") and kv_heads (",
                    o.kv_heads, ") must be at least 1");
    detail::require(o.heads % o.kv_heads == 0, "kv_heads (", o.kv_heads, ") must divide heads (",
                    o.heads, ")");
    detail::require(o.head_dim >= 1, "head_dim (", o.head_dim, ") must be at least 1");
    detail::require(o.window_left >= -1, "window_left (", o.window_left,
                    ") must be -1 (unbounded) or >= 0");
    detail::require(o.rope_base >= 0, "rope_base (", o.rope_base,
                    ") must be positive, or 0 for no rotary positions");
    detail::require(!o.scale || std::isfinite(*o.scale), "scale (", o.scale.value_or(0),
                    ") must be finite");
    soft_cap(o.soft_cap);
    if (o.rope_base > 0 || frequencies != nullptr) {
      detail::require(o.rotary_dim <= o.head_dim, "rotary_dim (", o.rotary_dim,
                      ") must be at most head_dim (", o.head_dim, ")");
      table_.emplace(frequencies ? *frequencies : rope_frequencies(o.rotary_dim, o.rope_base),
                     o.rope_layout, positions);
      detail::require(table_->rotary_dim() <= o.head_dim, "the frequencies turn ",
                      table_->rotary_dim(), " channels, head_dim is ", o.head_dim);
    }
  }

  const MhaOptions& options() const { return options_; }
  /// Null without rotary positions.
  const RotaryTable<S>* rotary() const { return table_ ? &*table_ : nullptr; }

  AttentionShape shape() const {
    AttentionShape shape;
    shape.heads = options_.heads;
    shape.kv_heads = options_.kv_heads;
    shape.scale = options_.scale;
    return shape;
  }

  /// f(rule) with the attention rule of the layer.
  template <class F>
  void with_rule(F&& f) const {
    constexpr Index kUnbounded = Index{1} << 60;
    const auto mask =
        causal() & window_left(options_.window_left < 0 ? kUnbounded : options_.window_left);
    if (options_.soft_cap > 0) {
      f(attention_rule(mask, soft_cap(options_.soft_cap)));
    } else {
      f(attention_rule(mask));
    }
  }

 private:
  MhaOptions options_;
  std::optional<RotaryTable<S>> table_;
};

/// Which rows belong together, and where they stand.
struct MhaBatch {
  std::span<const Index> cu_seqlens =
      {};  ///< cumulative lengths from 0 to the number of rows; empty: one sequence
  Index first_position = 0;  ///< position of the first row of each sequence
};

/// What the backward needs; its buffers are reused when the same object is passed again.
template <RealScalar S>
struct MhaSaved {
  Matrix<S> q_raw, k_raw;  ///< projections before the norm; empty without one
  Vector<S> q_rstd, k_rstd;
  Matrix<S> q, k, v;   ///< as attended to: after norm and rotation
  Matrix<S> attended;  ///< concatenated heads, before W_o
  AttentionSaved<S> attention;
};

namespace detail {

template <RealScalar S>
void require_mha_weights(const Mha<S>& layer, const MhaWeights<S>& w, Index width) {
  const MhaOptions& o = layer.options();
  const Index q = o.heads * o.head_dim, kv = o.kv_heads * o.head_dim;
  require_shape("w_q", w.w_q.rows(), w.w_q.cols(), width, q, "columns of x, heads * head_dim");
  require_shape("w_k", w.w_k.rows(), w.w_k.cols(), width, kv, "columns of x, kv_heads * head_dim");
  require_shape("w_v", w.w_v.rows(), w.w_v.cols(), width, kv, "columns of x, kv_heads * head_dim");
  require_shape("w_o", w.w_o.rows(), w.w_o.cols(), q, width, "heads * head_dim, columns of x");
  const auto optional = [](const char* name, const Vector<S>& v, Index size, const char* meaning) {
    if (v.size() != 0) require_size(name, v.size(), size, meaning);
  };
  optional("b_q", w.b_q, q, "heads * head_dim, or none");
  optional("b_k", w.b_k, kv, "kv_heads * head_dim, or none");
  optional("b_v", w.b_v, kv, "kv_heads * head_dim, or none");
  optional("b_o", w.b_o, width, "columns of x, or none");
  optional("sinks", w.sinks, o.heads, "heads, or none");
  if (o.qk_norm == QkNorm::rms_head) {
    require_size("q_norm", w.q_norm.size(), o.head_dim, "head_dim, shared by the heads");
    require_size("k_norm", w.k_norm.size(), o.head_dim, "head_dim, shared by the heads");
  } else if (o.qk_norm == QkNorm::rms_full) {
    require_size("q_norm", w.q_norm.size(), q, "heads * head_dim");
    require_size("k_norm", w.k_norm.size(), kv, "kv_heads * head_dim");
  }
}

inline void require_batch(const MhaBatch& batch, Index rows) {
  if (!batch.cu_seqlens.empty()) require_cumulative("cu_seqlens", batch.cu_seqlens, rows, "x");
}

/// f(first row, rows) for every sequence.
template <class F>
void for_each_batch_part(const MhaBatch& batch, Index rows, F&& f) {
  if (batch.cu_seqlens.empty()) {
    f(Index{0}, rows);
    return;
  }
  for (std::size_t b = 0; b + 1 < batch.cu_seqlens.size(); ++b) {
    f(batch.cu_seqlens[b], batch.cu_seqlens[b + 1] - batch.cu_seqlens[b]);
  }
}

template <RealScalar S>
AttentionTensors<S> mha_tensors(const MhaWeights<S>& weights) {
  AttentionTensors<S> tensors;
  if (weights.sinks.size() != 0) tensors.sinks = &weights.sinks;
  return tensors;
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
  if (layer.rotary() == nullptr) return;
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
  if (layer.rotary() != nullptr) {
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
  const Index whole[] = {0, rows};
  const std::span<const Index> cu =
      batch.cu_seqlens.empty() ? std::span<const Index>(whole) : batch.cu_seqlens;
  layer.with_rule([&](const auto& rule) {
    saved.attention =
        attention_varlen_forward(saved.q, saved.k, saved.v, cu, cu, saved.attended, layer.shape(),
                                 rule, detail::mha_tensors(weights), executor);
  });
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
  AttentionTensorGradients<S> gradients;
  if (weights.sinks.size() != 0) gradients.sinks = &dweights.sinks;
  const Index whole[] = {0, rows};
  const std::span<const Index> cu =
      batch.cu_seqlens.empty() ? std::span<const Index>(whole) : batch.cu_seqlens;
  layer.with_rule([&](const auto& rule) {
    attention_varlen_backward(saved.attention, saved.q, saved.k, saved.v, cu, cu, saved.attended,
                              dattended, dq, dk, dv, layer.shape(), rule,
                              detail::mha_tensors(weights), &gradients, executor);
  });
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

  Index size() const { return cache.size(); }
  void truncate(Index n) { cache.truncate(n); }
  Index bytes_per_token() const { return cache.bytes_per_token(); }
};

/// An empty state with room for `capacity` tokens; a layer with a window keeps only what the window can see.
template <RealScalar S>
MhaState<S> mha_state(const Mha<S>& layer, Index capacity = 0, Index first_position = 0) {
  const MhaOptions& o = layer.options();
  return {.cache = KvCache<S>({.kv_heads = o.kv_heads,
                               .head_dim = o.head_dim,
                               .capacity = capacity,
                               .window = o.window_left}),
          .scratch = {},
          .first_position = first_position};
}

/// The rows that follow what the state has seen; y is rows x D.  On an error nothing is changed.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void mha_step(const Mha<scalar_t<X>>& layer, const MhaWeights<scalar_t<X>>& weights,
              MhaState<scalar_t<X>>& state, const X& x, Y&& y, ExecutorRef executor = {}) {
  const Index rows = x.rows();
  detail::require_mha_weights(layer, weights, x.cols());
  detail::require_shape("y", y.rows(), y.cols(), rows, x.cols(), "shape of x");
  state.cache.require_room(rows);
  MhaSaved<scalar_t<X>>& s = state.scratch;
  detail::mha_project(layer, weights, x, s,
                      {.first_position = state.first_position + state.cache.size()}, executor);
  layer.with_rule([&](const auto& rule) {
    attention_step(state.cache, s.q, s.k, s.v, s.attended, layer.shape(), rule,
                   detail::mha_tensors(weights), executor);
  });
  detail::project(s.attended, weights.w_o, weights.b_o, y, executor);
}

EIGENBLOCKS_NAMESPACE_END
