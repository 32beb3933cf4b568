// The pieces an attention call is described with: shape, rule, optional tensors, and their validation.
//
// The score pipeline, which every implementation in this folder obeys (i, j absolute positions, h the query head):
//   s_ij = scale rho_i <q_i, k_j>              scale defaults to 1/sqrt(head_dim); rho_i = tensors.row_scale, default 1
//   s_ij = rule.score(s_ij, i, j, h)           soft-cap, ALiBi, ...                        (score.hpp)
//   s_ij = s_ij + bias_ij                      tensors.bias; an entry of -inf counts as masked
//   s_ij = -inf unless rule.mask(i, j, h) and tensors.mask_ij                              (mask.hpp); by selection
//   lse_i = log( sum_j exp(s_ij) [+ exp(sink_h)] ),   out_i = sum_j exp(s_ij - lse_i) v_j
// A row without a visible key: out = 0, lse = -inf (sink_h with a sink), every gradient 0.  NaN in a visible operand propagates.
//
// Shapes: query Tq x (heads * d), key Tk x (kv_heads * d), value Tk x (kv_heads * e), out Tq x (heads * e), lse Tq x heads.
// Query head h reads key/value head h / (heads / kv_heads): GQA; kv_heads = heads is MHA, kv_heads = 1 MQA.
// Sources: arXiv 1706.03762 (MHA), 1911.02150 (MQA), 2305.13245 (GQA), 2309.17453 and gpt-oss (sinks).
#pragma once

#include <eigenblocks/attention/mask.hpp>
#include <eigenblocks/attention/score.hpp>

#include <cmath>
#include <optional>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

using BoolMatrix = Eigen::Matrix<bool, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct AttentionShape {
  Index heads = 1;         ///< query heads
  Index kv_heads = 0;      ///< key/value heads; 0 means as many as query heads
  Index query_offset = 0;  ///< absolute position of query row 0; may be negative
  Index key_offset = 0;    ///< absolute position of key row 0, >= 0
  std::optional<double> scale =
      std::nullopt;  ///< default 1/sqrt(head_dim); 0 and negative values are legal
};

/// Keys and queries are used as given.
struct PlainPosition {};
/// No position policy: rotate queries and keys beforehand (position/rope.hpp) if wanted.
inline PlainPosition plain() { return {}; }

template <class M, class F, class P>
struct AttentionRule {
  using mask_type = M;
  using score_type = F;
  M mask;
  F score;
  P position;
};

/// Bundles a mask (mask.hpp or a lambda), a score functor (score.hpp) and a position policy.
template <class M = FullMask, class F = IdentityScore, class P = PlainPosition>
auto attention_rule(M mask = {}, F score = {}, P position = {}) {
  static_assert(Mask<M>,
                "attention_rule: argument 1 must be a mask, callable as bool(Index query, Index "
                "key[, Index head])");
  static_assert(Score<F>,
                "attention_rule: argument 2 must be a score functor, callable as S(S s, Index i, "
                "Index j, Index h)");
  if constexpr (Mask<M> && Score<F>) {
    auto lifted = detail::as_mask(std::move(mask));
    return AttentionRule<decltype(lifted), F, P>{std::move(lifted), std::move(score),
                                                 std::move(position)};
  }
}
using DefaultRule = decltype(attention_rule());

/// Optional operands; null means not used.  S is the compute scalar.
template <RealScalar S>
struct AttentionTensors {
  const Matrix<S>* bias =
      nullptr;  ///< Tq x Tk, shared by the heads, or (heads * Tq) x Tk, head h in rows [h Tq, (h+1) Tq)
  const BoolMatrix* mask = nullptr;      ///< Tq x Tk, true = visible
  const Vector<S>* row_scale = nullptr;  ///< rho, Tq
  const Vector<S>* sinks = nullptr;      ///< heads
};

/// Gradients of the optional operands, overwritten where not null (sizes as in AttentionTensors), and the upstream gradient
/// of the log-sum-exp, if the loss depends on it.
template <RealScalar S>
struct AttentionTensorGradients {
  Matrix<S>* bias = nullptr;
  Vector<S>* row_scale = nullptr;
  Vector<S>* sinks = nullptr;
  const Matrix<S>* upstream_lse = nullptr;  ///< Tq x heads
};

/// What the backward needs besides the operands and the output.
template <RealScalar S>
struct AttentionSaved {
  Matrix<S> lse;  ///< Tq x heads, natural logarithm, sinks included
};

namespace detail {

/// Whether a rule uses queries and keys as they are.
template <class Rule>
inline constexpr bool takes_as_given = [] {
  if constexpr (requires(const Rule& rule) { rule.position; })
    return std::is_same_v<decltype(Rule::position), PlainPosition>;
  return true;
}();
#define EIGENBLOCKS_POSITION_MESSAGE                                                          \
  "this attention takes queries and keys as they are; a rule with a position policy belongs " \
  "to rerope_attention_forward (attention/rerope.hpp)"

/// All sizes of one call, checked.
struct AttentionSizes {
  Index queries, keys, heads, kv_heads, group, key_dim, value_dim;
  double scale;
};

/// A score functor with a member `slopes` has one per query head; `slopes_name` is what the message calls them.
template <class F>
void require_score_heads(const F& score, Index heads) {
  if constexpr (requires { score.slopes.size(); }) {
    const char* name = "slopes of the score";
    if constexpr (requires { F::slopes_name; }) name = F::slopes_name;
    require_size(name, score.slopes.size(), heads, "one per query head");
  } else if constexpr (requires {
                         score.f;
                         score.g;
                       }) {
    require_score_heads(score.f, heads);
    require_score_heads(score.g, heads);
  }
}

inline AttentionSizes attention_sizes(Index query_rows, Index query_cols, Index key_rows,
                                      Index key_cols, Index value_rows, Index value_cols,
                                      const AttentionShape& shape) {
  const Index heads = shape.heads, kv_heads = shape.kv_heads == 0 ? heads : shape.kv_heads;
  require(heads >= 1, "heads (", heads, ") must be at least 1");
  require(kv_heads >= 1, "kv_heads (", kv_heads, ") must be at least 1");
  require(heads % kv_heads == 0, "kv_heads (", kv_heads, ") must divide heads (", heads, ")");
  require(query_cols % heads == 0, "heads (", heads, ") must divide the ", query_cols,
          " columns of query");
  require(value_cols % kv_heads == 0, "kv_heads (", kv_heads, ") must divide the ", value_cols,
          " columns of value");
  const Index dim = query_cols / heads;
  require(dim >= 1 || query_rows == 0, "query has no columns");
  require_shape("key", key_rows, key_cols, key_rows, kv_heads * dim,
                "cols = kv_heads * head_dim, head_dim as in query");
  require_shape("value", value_rows, value_cols, key_rows, value_cols, "one row per key");
  require(shape.key_offset >= 0, "key_offset (", shape.key_offset, ") must not be negative");
  const double scale = shape.scale ? *shape.scale
                       : dim > 0   ? 1.0 / std::sqrt(static_cast<double>(dim))
                                   : 1.0;
  require(std::isfinite(scale), "scale (", scale, ") must be finite");
  return {query_rows, key_rows, heads, kv_heads, heads / kv_heads, dim, value_cols / kv_heads,
          scale};
}

template <class S>
void require_tensors(const AttentionTensors<S>& t, const AttentionSizes& n) {
  if (t.bias != nullptr) {
    require((t.bias->rows() == n.queries || t.bias->rows() == n.heads * n.queries) &&
                t.bias->cols() == n.keys,
            "bias is ", t.bias->rows(), " x ", t.bias->cols(), ", expected ", n.queries, " x ",
            n.keys, " or ", n.heads * n.queries, " x ", n.keys,
            " (queries or heads * queries, keys)");
  }
  if (t.mask != nullptr) {
    require_shape("mask", t.mask->rows(), t.mask->cols(), n.queries, n.keys, "queries x keys");
  }
  if (t.row_scale != nullptr)
    require_size("row_scale", t.row_scale->size(), n.queries, "one per query row");
  if (t.sinks != nullptr) require_size("sinks", t.sinks->size(), n.heads, "one per query head");
}

template <class S>
void require_tensor_gradients(const AttentionTensorGradients<S>& g, const AttentionTensors<S>& t,
                              const AttentionSizes& n) {
  if (g.bias != nullptr) {
    require(t.bias != nullptr, "a gradient of bias was asked for, but there is no bias");
    require_shape("gradient of bias", g.bias->rows(), g.bias->cols(), t.bias->rows(),
                  t.bias->cols(), "shape of bias");
  }
  if (g.row_scale != nullptr) {
    require(t.row_scale != nullptr,
            "a gradient of row_scale was asked for, but there is no row_scale");
    require_size("gradient of row_scale", g.row_scale->size(), n.queries, "one per query row");
  }
  if (g.sinks != nullptr) {
    require(t.sinks != nullptr, "a gradient of sinks was asked for, but there are no sinks");
    require_size("gradient of sinks", g.sinks->size(), n.heads, "one per query head");
  }
  if (g.upstream_lse != nullptr) {
    require_shape("upstream_lse", g.upstream_lse->rows(), g.upstream_lse->cols(), n.queries,
                  n.heads, "queries x heads");
  }
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
