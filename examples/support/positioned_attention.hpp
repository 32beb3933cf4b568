// An attention layer whose positions are chosen freely, in the place of eb::Mha in the decoder.
//
//   rotary     any frequencies, or none (NoPE)
//   window     the last tokens only
//   logn       queries grow with the logarithm of what they see
//   key_norm   k / |k| in the place of 1/sqrt(d)
//   relative   relative positions that stop growing, or grow slower, beyond a window; here for inference only
#pragma once

#include <eigenblocks/attention/mha.hpp>
#include <eigenblocks/attention/rerope.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/position/logn.hpp>

#include <optional>
#include <stdexcept>
#include <vector>

namespace example {

namespace eb = eigenblocks;

struct PositionChoice {
  std::optional<eb::RotaryFrequencies> rotary = std::nullopt;
  eb::Index window = 0;  ///< tokens seen, the token itself included; 0 is all
  std::optional<eb::NearFarPosition> relative = std::nullopt;
  eb::Index logn_length = 0;  ///< training length; 0 is off
  eb::LognMode logn = eb::LognMode::clipped;
  bool key_norm = false;
};

template <class S>
class PositionedAttention {
 public:
  PositionedAttention(eb::Index heads, eb::Index kv_heads, PositionChoice choice)
      : heads_(heads), kv_heads_(kv_heads), choice_(std::move(choice)) {
    if (choice_.rotary) table_.emplace(*choice_.rotary, eb::RopeLayout::half);
  }

  eb::Index heads() const { return heads_; }
  eb::Index kv_heads() const { return kv_heads_; }
  const PositionChoice& choice() const { return choice_; }
  const eb::RotaryTable<S>* rotary() const { return table_ ? &*table_ : nullptr; }

  eb::AttentionShape shape() const {
    eb::AttentionShape shape{.heads = heads_, .kv_heads = kv_heads_};
    if (choice_.key_norm) shape.scale = 1.0;
    return shape;
  }
  auto rule() const {
    constexpr eb::Index kUnbounded = eb::Index{1} << 60;
    return eb::attention_rule(
        eb::causal() & eb::window_left(choice_.window > 0 ? choice_.window - 1 : kUnbounded));
  }

 private:
  eb::Index heads_, kv_heads_;
  PositionChoice choice_;
  std::optional<eb::RotaryTable<S>> table_;
};

namespace detail {

using eb::Index;
using eb::Matrix;
using eb::Vector;

/// cu_seqlens of a batch, one sequence when there are none.
class Sequences {
 public:
  Sequences(const eb::MhaBatch& batch, Index rows) : whole_{0, rows}, given_(batch.cu_seqlens) {}
  std::span<const Index> cu() const { return given_.empty() ? std::span(whole_) : given_; }
  /// f(first row, rows) for every sequence.
  template <class F>
  void for_each(F&& f) const {
    for (std::size_t b = 0; b + 1 < cu().size(); ++b) f(cu()[b], cu()[b + 1] - cu()[b]);
  }

 private:
  std::array<Index, 2> whole_;
  std::span<const Index> given_;
};

/// log-n scales of all rows; empty when off.
template <class S>
Vector<S> row_scale(const PositionChoice& choice, const Sequences& sequences, Index rows) {
  Vector<S> scale;
  if (choice.logn_length == 0) return scale;
  scale.resize(rows);
  sequences.for_each([&](Index first, Index n) {
    scale.segment(first, n) = eb::logn_scale<S>(0, n, choice.logn_length, choice.logn);
  });
  return scale;
}

/// Turns the rows of every sequence to 0, 1, 2, ..., or back.
template <bool kBack = false, class S>
void rotate(const PositionedAttention<S>& layer, const Sequences& sequences, Index heads,
            Matrix<S>& x) {
  sequences.for_each([&](Index first, Index n) {
    if constexpr (kBack) {
      eb::rope_backward_in_place(x.middleRows(first, n), 0, *layer.rotary(), {.heads = heads});
    } else {
      eb::rope_in_place(x.middleRows(first, n), 0, *layer.rotary(), {.heads = heads});
    }
  });
}

/// Attention under layer.choice().relative, on saved.q and saved.k as projected.
template <class S>
void rerope_attention(const PositionedAttention<S>& layer, eb::MhaSaved<S>& saved,
                      const Sequences& sequences, const Vector<S>& scale) {
  const auto rule = eb::attention_rule(eb::causal(), {}, *layer.choice().relative);
  sequences.for_each([&](Index first, Index n) {
    const Vector<S> rows = scale.size() > 0 ? Vector<S>(scale.segment(first, n)) : Vector<S>();
    eb::rerope_attention_forward(saved.q.middleRows(first, n), saved.k.middleRows(first, n),
                                 saved.v.middleRows(first, n), saved.attended.middleRows(first, n),
                                 layer.shape(), *layer.rotary(), rule,
                                 {.row_scale = rows.size() > 0 ? &rows : nullptr});
  });
}

}  // namespace detail

/// As eb::mha_forward.
template <class S>
void mha_forward(const PositionedAttention<S>& layer, const eb::MhaWeights<S>& weights,
                 const eb::Matrix<S>& x, eb::Matrix<S>& y, eb::MhaSaved<S>& saved,
                 const eb::MhaBatch& batch) {
  const eb::Index rows = x.rows();
  const PositionChoice& choice = layer.choice();
  const detail::Sequences sequences(batch, rows);
  saved.q.resize(rows, weights.w_q.cols());
  saved.k.resize(rows, weights.w_k.cols());
  saved.v.resize(rows, weights.w_v.cols());
  saved.attended.resize(rows, weights.w_o.rows());
  eb::linear_forward(x, weights.w_q, saved.q);
  eb::linear_forward(x, weights.w_k, saved.k);
  eb::linear_forward(x, weights.w_v, saved.v);
  if (choice.key_norm) {
    saved.k_raw = saved.k;
    saved.k_rstd.resize(rows * layer.kv_heads());
    eb::l2_normalize_forward(saved.k_raw, saved.k, saved.k_rstd, {.heads = layer.kv_heads()});
  }
  const eb::Vector<S> scale = detail::row_scale<S>(choice, sequences, rows);
  const eb::AttentionTensors<S> tensors{.row_scale = scale.size() > 0 ? &scale : nullptr};
  if (choice.relative) {
    detail::rerope_attention(layer, saved, sequences, scale);
  } else {
    if (layer.rotary() != nullptr) {
      detail::rotate(layer, sequences, layer.heads(), saved.q);
      detail::rotate(layer, sequences, layer.kv_heads(), saved.k);
    }
    saved.attention =
        eb::attention_varlen_forward(saved.q, saved.k, saved.v, sequences.cu(), sequences.cu(),
                                     saved.attended, layer.shape(), layer.rule(), tensors);
  }
  eb::linear_forward(saved.attended, weights.w_o, y);
}

/// As eb::mha_backward.
template <class S>
void mha_backward(const PositionedAttention<S>& layer, const eb::MhaWeights<S>& weights,
                  const eb::MhaSaved<S>& saved, const eb::Matrix<S>& x, const eb::Matrix<S>& dy,
                  eb::Matrix<S>& dx, eb::MhaWeights<S>& dweights, const eb::MhaBatch& batch) {
  const eb::Index rows = x.rows();
  const PositionChoice& choice = layer.choice();
  if (choice.relative) throw std::logic_error("ReRoPE is for inference in this example");
  const detail::Sequences sequences(batch, rows);
  const eb::Vector<S> scale = detail::row_scale<S>(choice, sequences, rows);
  const eb::AttentionTensors<S> tensors{.row_scale = scale.size() > 0 ? &scale : nullptr};
  eb::Matrix<S> dattended(rows, saved.attended.cols()), dq(rows, saved.q.cols()),
      dk(rows, saved.k.cols()), dv(rows, saved.v.cols());
  eb::linear_backward_input(dy, weights.w_o, dattended);
  eb::linear_backward_weight(saved.attended, dy, dweights.w_o);
  eb::attention_varlen_backward(saved.attention, saved.q, saved.k, saved.v, sequences.cu(),
                                sequences.cu(), saved.attended, dattended, dq, dk, dv,
                                layer.shape(), layer.rule(), tensors);
  if (layer.rotary() != nullptr) {
    detail::rotate<true>(layer, sequences, layer.heads(), dq);
    detail::rotate<true>(layer, sequences, layer.kv_heads(), dk);
  }
  if (choice.key_norm)
    eb::l2_normalize_backward(saved.k_raw, saved.k_rstd, dk, dk, {.heads = layer.kv_heads()});
  eb::linear_backward_weight(x, dq, dweights.w_q);
  eb::linear_backward_weight(x, dk, dweights.w_k);
  eb::linear_backward_weight(x, dv, dweights.w_v);
  eb::linear_backward_input(dq, weights.w_q, dx);
  eb::linear_accumulate_input(dk, weights.w_k, dx);
  eb::linear_accumulate_input(dv, weights.w_v, dx);
}

}  // namespace example
