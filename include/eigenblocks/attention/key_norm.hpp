// Attention with normalised queries or keys: the norm takes the place of 1/sqrt(d).
//
//   qna    s_ij = <l2(q_i), k_j>            kna    s_ij = <q_i, l2(k_j)>      (KeyNorm)
//   cosa   s_ij = lambda <l2(q_i), l2(k_j)>                                   l2(x) = x / max(|x|, eps), head by head
// dynamic: row i, with n = position + 1, is multiplied by ln n / ln base (qna, kna); in cosa lambda becomes lambda ln n
// (the post's lambda = 4, then).  Fixed cosa: 4 ln n with n half the training length.
// Maps on the kernel as it is: rows normalised beforehand (nn/norm.hpp), AttentionShape::scale and row_scale.
// Masks, biases, sinks: rule and tensors as in kernel.hpp; `row_scale` is this header's.  Shapes: rule.hpp.
// Rotations (RoPE) go before or after the norm, which is the same: apply them to q and k beforehand.
// Errors (invalid_argument): those of the kernel and of l2_normalize; shape.scale or tensors.row_scale given; lambda not
// finite; base <= 1 or a negative query_offset with dynamic; a saved object of other sizes.
// Source: kexue.fm/archives/9859.
#pragma once

#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/scale.hpp>
#include <eigenblocks/nn/norm.hpp>

#include <string>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Which operands are normalised: queries, keys (KeyNorm), or both (cosine attention).
enum class NormalizedAttention { qna, kna, cosa };

/// KeyNorm by default; eps is torch's.
struct NormalizedAttentionOptions {
  NormalizedAttention mode = NormalizedAttention::kna;
  double lambda = 4;  ///< cosa only
  bool dynamic = false;
  double base = 512;  ///< qna and kna with dynamic
  double eps = 1e-12;
};

/// For the backward.  An operand that is not normalised is not copied.
template <RealScalar S>
struct NormalizedAttentionSaved {
  AttentionSaved<S> attention;
  Matrix<S> query, key;            ///< l2(q), l2(k), or empty
  Vector<S> query_norm, key_norm;  ///< 1 / max(norm, eps)
  Vector<S> row_scale;             ///< empty unless dynamic
};

namespace detail {

/// Shape of the kernel call.
inline AttentionShape normalized_shape(const AttentionShape& shape,
                                       const NormalizedAttentionOptions& o) {
  require(!shape.scale, "normalized attention: shape.scale (", shape.scale.value_or(0),
          ") must not be given, use lambda");
  require(std::isfinite(o.lambda), "normalized attention: lambda (", o.lambda, ") must be finite");
  AttentionShape inner = shape;
  inner.scale = o.mode == NormalizedAttention::cosa ? o.lambda : 1.0;
  return inner;
}

template <class S>
AttentionTensors<S> normalized_tensors(const AttentionTensors<S>& tensors,
                                       const Vector<S>& row_scale, bool dynamic) {
  require(tensors.row_scale == nullptr,
          "normalized attention: tensors.row_scale must be null, the rule sets it");
  AttentionTensors<S> inner = tensors;
  if (dynamic) inner.row_scale = &row_scale;
  return inner;
}

/// What the backward needs of one operand, before anything is written; nothing of one that is not normalised.
template <class S>
void require_normalized(const char* name, const Matrix<S>& x, const Vector<S>& norm, Index rows,
                        Index cols, bool normalized, double eps, Index heads) {
  const std::string saved = join_text("saved.", name);
  if (normalized) norm_eps<S>(eps, heads, cols);  // for its checks
  require_shape(saved.c_str(), x.rows(), x.cols(), normalized ? rows : 0, normalized ? cols : 0,
                normalized ? "shape of the operand" : "not normalised in this mode");
  require_size((saved + "_norm").c_str(), norm.size(), normalized ? rows * heads : 0,
               normalized ? "rows * heads" : "not normalised in this mode");
}

}  // namespace detail

/// Writes out (Tq x heads*e); returns what the backward needs.  The default rule is causal.
template <MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O,
          class Rule = decltype(attention_rule(causal()))>
  requires SameScalar<Q, K, V, O> && RealScalar<scalar_t<Q>>
auto normalized_attention_forward(const Q& query, const K& key, const V& value, O&& out,
                                  const AttentionShape& shape,
                                  const NormalizedAttentionOptions& options = {},
                                  const Rule& rule = attention_rule(causal()),
                                  const AttentionTensors<scalar_t<Q>>& tensors = {},
                                  ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  using enum NormalizedAttention;
  const AttentionShape inner = detail::normalized_shape(shape, options);
  const detail::AttentionSizes n = detail::require_forward(query, key, value, out, inner);
  NormalizedAttentionSaved<S> saved;
  if (options.dynamic) {
    // head_dim 1: no root; base e: ln n itself.
    saved.row_scale = causal_attention_scales<S>(
        ScaleRule::log_n, n.queries, 1, options.mode == cosa ? std::exp(1.0) : options.base,
        shape.query_offset);
  }
  const auto pieces = detail::normalized_tensors(tensors, saved.row_scale, options.dynamic);
  const auto normalize = [&](const auto& x, Matrix<S>& y, Vector<S>& norm, Index heads) {
    y.resize(x.rows(), x.cols());
    norm.resize(x.rows() * heads);
    l2_normalize_forward(x, y, norm, {.eps = options.eps, .heads = heads}, executor);
  };
  if (options.mode != kna) normalize(query, saved.query, saved.query_norm, n.heads);
  if (options.mode != qna) normalize(key, saved.key, saved.key_norm, n.kv_heads);
  const ConstMatrixRef<S> q =
      options.mode == kna ? ConstMatrixRef<S>(query) : ConstMatrixRef<S>(saved.query);
  const ConstMatrixRef<S> k =
      options.mode == qna ? ConstMatrixRef<S>(key) : ConstMatrixRef<S>(saved.key);
  saved.attention = attention_forward(q, k, value, out, inner, rule, pieces, executor);
  return saved;
}

/// Overwrites dquery, dkey, dvalue (shapes of query, key, value) and the non-null tensors of gradients, as attention_backward;
/// `saved`, `out`, shape, options, rule and tensors are those of the forward.
template <MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike O, MatrixLike DO, OutputMatrix DQ,
          OutputMatrix DK, OutputMatrix DV, class Rule = decltype(attention_rule(causal()))>
  requires SameScalar<Q, K, V, O, DO, DQ, DK, DV> && RealScalar<scalar_t<Q>>
void normalized_attention_backward(
    const NormalizedAttentionSaved<scalar_t<Q>>& saved, const Q& query, const K& key,
    const V& value, const O& out, const DO& dout, DQ&& dquery, DK&& dkey, DV&& dvalue,
    const AttentionShape& shape, const NormalizedAttentionOptions& options = {},
    const Rule& rule = attention_rule(causal()), const AttentionTensors<scalar_t<Q>>& tensors = {},
    AttentionTensorGradients<scalar_t<Q>>* gradients = nullptr, ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  using enum NormalizedAttention;
  const AttentionShape inner = detail::normalized_shape(shape, options);
  const auto pieces = detail::normalized_tensors(tensors, saved.row_scale, options.dynamic);
  const detail::AttentionSizes n = detail::require_forward(query, key, value, out, inner);
  detail::require_normalized<S>("query", saved.query, saved.query_norm, query.rows(), query.cols(),
                                options.mode != kna, options.eps, n.heads);
  detail::require_normalized<S>("key", saved.key, saved.key_norm, key.rows(), key.cols(),
                                options.mode != qna, options.eps, n.kv_heads);
  detail::require_size("saved.row_scale", saved.row_scale.size(), options.dynamic ? n.queries : 0,
                       "one per query row if dynamic, else none");
  const ConstMatrixRef<S> q =
      options.mode == kna ? ConstMatrixRef<S>(query) : ConstMatrixRef<S>(saved.query);
  const ConstMatrixRef<S> k =
      options.mode == qna ? ConstMatrixRef<S>(key) : ConstMatrixRef<S>(saved.key);
  attention_backward(saved.attention, q, k, value, out, dout, dquery, dkey, dvalue, inner, rule,
                     pieces, gradients, executor);
  if (options.mode != kna) {
    l2_normalize_backward(query, saved.query_norm, dquery, dquery,
                          {.eps = options.eps, .heads = n.heads}, executor);
  }
  if (options.mode != qna) {
    l2_normalize_backward(key, saved.key_norm, dkey, dkey,
                          {.eps = options.eps, .heads = n.kv_heads}, executor);
  }
}

EIGENBLOCKS_NAMESPACE_END
