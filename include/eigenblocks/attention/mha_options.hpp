// The multi-head attention layer: options, weights, batches, and their checks.  What the layer computes is in mha.hpp.
#pragma once

#include <eigenblocks/attention/varlen.hpp>
#include <eigenblocks/position/logn.hpp>
#include <eigenblocks/position/rerope.hpp>
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
  /// N of log-n scaling: scores times log n / log N, n the keys that the row sees by causality and window; 0 is off.
  Index logn_length = 0;
  LognMode logn = LognMode::clipped;  ///< plain for models trained with it
};

/// Parameters, or their gradients.  Vectors of size 0 are absent.
template <RealScalar S>
struct MhaWeights {
  Matrix<S> w_q, w_k, w_v, w_o;
  Vector<S> b_q, b_k, b_v, b_o;
  Vector<S> q_norm, k_norm;
  Vector<S> sinks;
};

namespace detail {
template <RealScalar S>
struct MhaRelative;
}

/// Options, validated, with what is made from them once.  Immutable: threads share it.
template <RealScalar S>
class Mha {
 public:
  /// Errors: heads, kv_heads, head_dim < 1; kv_heads not dividing heads; rotary_dim odd or larger than head_dim; rope_base
  /// negative; soft_cap negative; window_left < -1; scale not finite; logn_length 1 or negative.  frequencies replaces the
  /// plain ones of rope_base.
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
    detail::require(o.logn_length == 0 || o.logn_length >= 2, "logn_length (", o.logn_length,
                    ") must be at least 2, or 0 for no log-n scaling");
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
  /// The position policy of a layer made by rerope_mha (mha_rerope.hpp); null for plain rotation and none.
  const NearFarPosition* relative() const { return operations_ ? &relative_ : nullptr; }

  AttentionShape shape() const {
    AttentionShape shape;
    shape.heads = options_.heads;
    shape.kv_heads = options_.kv_heads;
    shape.scale = options_.scale;
    return shape;
  }

  /// Whom a row sees.
  auto mask() const {
    constexpr Index kUnbounded = Index{1} << 60;
    return causal() & window_left(options_.window_left < 0 ? kUnbounded : options_.window_left);
  }
  /// f(rule) with the attention rule of a layer without position policy.
  template <class F>
  void with_rule(F&& f) const {
    if (options_.soft_cap > 0) {
      f(attention_rule(mask(), soft_cap(options_.soft_cap)));
    } else {
      f(attention_rule(mask()));
    }
  }

  // For mha_rerope.hpp and the functions below.
  const detail::MhaRelative<S>* operations() const { return operations_; }
  void set_relative(const NearFarPosition& relative, const detail::MhaRelative<S>& operations) {
    relative_ = relative;
    operations_ = &operations;
  }

 private:
  MhaOptions options_;
  std::optional<RotaryTable<S>> table_;
  NearFarPosition relative_;
  const detail::MhaRelative<S>* operations_ = nullptr;
};

/// Which rows belong together, and where they stand.
struct MhaBatch {
  std::span<const Index> cu_seqlens =
      {};  ///< cumulative lengths from 0 to the number of rows; empty: one sequence
  Index first_position = 0;  ///< position of the first row of each sequence
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

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
