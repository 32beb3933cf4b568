// Exact attention without a T x T matrix: the tiled forward and backward behind MHA, MQA and GQA.
//
//   attention_forward(q, k, v, out, shape, rule, tensors, executor) -> AttentionSaved (log-sum-exp only)
//   attention_backward(saved, q, k, v, out, dout, dq, dk, dv, shape, rule, tensors, &gradients, executor)
//   attention(q, k, v, shape, rule) -> out
//
// Definition, shapes and defaults: rule.hpp.  Masks: mask.hpp, scores: score.hpp, both compiled into the loops.
// Storage float, double, or half / bfloat16 (computed in float).  Only visible tiles are computed; results are bitwise the
// same for every executor.  Memory beyond the operands: a few MB, see forward_tiles.hpp.
//
// Errors (invalid_argument, before anything is written): heads or kv_heads < 1, kv_heads not dividing heads, widths or row
// counts that do not fit, wrong shapes of out or of an optional tensor, a scale that is not finite.
#pragma once

#include <eigenblocks/attention/backward_tiles.hpp>
#include <eigenblocks/attention/forward_tiles.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <class Q, class K, class V, class O>
AttentionSizes require_forward(const Q& query, const K& key, const V& value, const O& out,
                               const AttentionShape& shape) {
  const AttentionSizes n = attention_sizes(query.rows(), query.cols(), key.rows(), key.cols(),
                                           value.rows(), value.cols(), shape);
  require_shape("out", out.rows(), out.cols(), n.queries, n.heads * n.value_dim,
                "queries x heads * value_dim");
  return n;
}

/// attention_forward with the tile sizes and the workspace chosen by the caller; lse is Tq x heads.
template <class Shape = void, MatrixLike Q, MatrixLike K, MatrixLike V, class O, class L,
          class Rule>
void attention_forward_into(const Q& query, const K& key, const V& value, O& out, L& lse,
                            const AttentionShape& shape, const Rule& rule,
                            const AttentionTensors<compute_t<scalar_t<Q>>>& tensors,
                            ExecutorRef executor, Workspace& workspace,
                            const TileTuning& tuning = {}) {
  using T = scalar_t<Q>;
  using S = compute_t<T>;
  using Tile = std::conditional_t<std::is_void_v<Shape>, TileShape<S>, Shape>;
  const AttentionSizes n = require_forward(query, key, value, out, shape);
  require_tensors(tensors, n);
  require_score_heads(rule.score, n.heads);
  require_shape("lse", lse.rows(), lse.cols(), n.queries, n.heads, "queries x heads");
  const auto run = [&]<class Source>(const Source& source) {
    ForwardTiles<S, T, Source, Rule, Tile>(n, shape, rule, tensors, query.data(),
                                           query.outerStride(), source, out.data(),
                                           out.outerStride(), lse.data(), lse.outerStride(), tuning)
        .run(executor, workspace);
  };
  const MatrixSource<T> near{key.data(), key.outerStride(), value.data(), value.outerStride()};
  if constexpr (branches<Rule> == 1) {
    static_assert(takes_as_given<Rule>, EIGENBLOCKS_POSITION_MESSAGE);
    run(near);
  } else {
    const MatrixSource<T> far{rule.position.key, rule.position.key_stride, value.data(),
                              value.outerStride()};
    run(NearFarSource<MatrixSource<T>, MatrixSource<T>>{near, far});
  }
}

}  // namespace detail

/// Writes out (Tq x heads*e); returns the log-sum-exp for the backward.
template <MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O, class Rule = DefaultRule>
  requires SameScalar<Q, K, V, O> AttentionSaved<compute_t<scalar_t<Q>>> attention_forward(
      const Q& query, const K& key, const V& value, O&& out, const AttentionShape& shape,
      const Rule& rule = {}, const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
      ExecutorRef executor = {}) {
    const detail::AttentionSizes n = detail::require_forward(query, key, value, out, shape);
    AttentionSaved<compute_t<scalar_t<Q>>> saved;
    saved.lse.resize(n.queries, n.heads);
    Workspace workspace;
    detail::attention_forward_into(query, key, value, out, saved.lse, shape, rule, tensors,
                                   executor, workspace);
    return saved;
  }

/// The same with the result as value.
template <MatrixLike Q, MatrixLike K, MatrixLike V, class Rule = DefaultRule>
  requires SameScalar<Q, K, V> Matrix<scalar_t<Q>> attention(
      const Q& query, const K& key, const V& value, const AttentionShape& shape,
      const Rule& rule = {}, const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
      ExecutorRef executor = {}) {
    const detail::AttentionSizes n = detail::attention_sizes(
        query.rows(), query.cols(), key.rows(), key.cols(), value.rows(), value.cols(), shape);
    Matrix<scalar_t<Q>> out(n.queries, n.heads * n.value_dim);
    attention_forward(query, key, value, out, shape, rule, tensors, executor);
    return out;
  }

/// Gradients of a loss whose derivative by out is dout (and by the log-sum-exp gradients->upstream_lse).  Overwrites dquery,
/// dkey, dvalue (shapes of query, key, value) and the non-null tensors of `gradients`; parameter gradients of the score functor
/// are added.  `out` and `saved` are those of the forward.
template <MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike O, MatrixLike DO, OutputMatrix DQ,
          OutputMatrix DK, OutputMatrix DV, class Rule = DefaultRule>
  requires SameScalar<Q, K, V, O, DO, DQ, DK, DV>
void attention_backward(const AttentionSaved<compute_t<scalar_t<Q>>>& saved, const Q& query,
                        const K& key, const V& value, const O& out, const DO& dout, DQ&& dquery,
                        DK&& dkey, DV&& dvalue, const AttentionShape& shape, const Rule& rule = {},
                        const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
                        AttentionTensorGradients<compute_t<scalar_t<Q>>>* gradients = nullptr,
                        ExecutorRef executor = {}) {
  Workspace workspace;
  detail::attention_backward_into(saved.lse, query, key, value, out, dout, dquery, dkey, dvalue,
                                  shape, rule, tensors, gradients, executor, workspace);
}

EIGENBLOCKS_NAMESPACE_END
