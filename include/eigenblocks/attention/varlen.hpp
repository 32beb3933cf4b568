// Attention over packed sequences of different lengths.
//
// Sequence b owns query rows [cu_q[b], cu_q[b+1]) and key/value rows [cu_k[b], cu_k[b+1]) (cumulative lengths as in
// flash-attention's cu_seqlens) and attends only to itself.  Positions inside a sequence are aligned at the bottom right: its
// last query sits on its last key, query row t at position t + (keys - queries).  Leading queries before the first key are
// dead under a causal mask: out 0, lse -inf.  Zero-length sequences are legal.
//
// No padding, no T x T mask; results are bitwise those of one attention call per sequence, for every executor.
// Errors (invalid_argument): cu_q or cu_k empty, of different lengths, not starting at 0, decreasing, not ending at the row
// count; shape.query_offset or key_offset not 0 (the packing sets them); and those of attention_forward.
// Source: flash-attention's variable-length interface.
#pragma once

#include <eigenblocks/attention/kernel.hpp>

#include <span>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline void require_cumulative(const char* name, std::span<const Index> cumulative, Index rows,
                               const char* what) {
  require(!cumulative.empty(), name, " is empty, expected one entry more than there are sequences");
  require(cumulative.front() == 0, name, " starts at ", cumulative.front(), ", expected 0");
  for (std::size_t b = 1; b < cumulative.size(); ++b) {
    require(cumulative[b] >= cumulative[b - 1], name, " decreases at entry ", b, ": ",
            cumulative[b - 1], " then ", cumulative[b]);
  }
  require(cumulative.back() == rows, name, " ends at ", cumulative.back(), ", expected the ", rows,
          " rows of ", what);
}

inline void require_packing(std::span<const Index> cu_q, std::span<const Index> cu_k,
                            Index query_rows, Index key_rows, const AttentionShape& shape) {
  require_cumulative("cu_seqlens_q", cu_q, query_rows, "query");
  require_cumulative("cu_seqlens_k", cu_k, key_rows, "key");
  require(cu_q.size() == cu_k.size(), "cu_seqlens_q has ", cu_q.size(),
          " entries, cu_seqlens_k has ", cu_k.size(), ": expected as many");
  require(shape.query_offset == 0 && shape.key_offset == 0, "query_offset (", shape.query_offset,
          ") and key_offset (", shape.key_offset,
          ") must be 0: packing aligns each sequence at the bottom right");
}

template <class S>
void require_packed_tensors(const AttentionTensors<S>& tensors, const AttentionSizes& n) {
  require(tensors.bias == nullptr && tensors.mask == nullptr,
          "bias and mask tensors have no place over packed sequences; express them in the rule");
  require_tensors(tensors, n);
}

/// The tensors of one sequence: sinks shared, row_scale cut.
template <class S>
struct SequenceTensors {
  AttentionTensors<S> tensors;
  Vector<S> row_scale;
  SequenceTensors(const AttentionTensors<S>& all, Index first, Index count) {
    tensors.sinks = all.sinks;
    if (all.row_scale == nullptr) return;
    row_scale = all.row_scale->segment(first, count);
    tensors.row_scale = &row_scale;
  }
  SequenceTensors(const SequenceTensors&) = delete;
  SequenceTensors& operator=(const SequenceTensors&) = delete;
};

/// Calls f(sequence, executor for it, workspace of its worker): sequences in parallel when there are enough of them.
template <class F>
void for_each_sequence(Index sequences, ExecutorRef executor, F&& f) {
  const int workers = executor.workers();
  if (workers > 1 && sequences >= 2 * workers) {
    std::vector<Workspace> workspaces(static_cast<std::size_t>(workers));
    executor.run(sequences, [&](Index b, int worker) {
      f(b, ExecutorRef(serial), workspaces[static_cast<std::size_t>(worker)]);
    });
  } else {
    Workspace workspace;
    for (Index b = 0; b < sequences; ++b) f(b, executor, workspace);
  }
}

}  // namespace detail

/// Writes out; returns the log-sum-exp, one row per packed query.  tensors: sinks and row_scale (one entry per packed query).
template <MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O, class Rule = DefaultRule>
  requires SameScalar<Q, K, V, O> AttentionSaved<compute_t<scalar_t<Q>>> attention_varlen_forward(
      const Q& query, const K& key, const V& value, std::span<const Index> cu_seqlens_q,
      std::span<const Index> cu_seqlens_k, O&& out, const AttentionShape& shape,
      const Rule& rule = {}, const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
      ExecutorRef executor = {}) {
    using S = compute_t<scalar_t<Q>>;
    const detail::AttentionSizes n = detail::require_forward(query, key, value, out, shape);
    detail::require_packing(cu_seqlens_q, cu_seqlens_k, n.queries, n.keys, shape);
    detail::require_packed_tensors(tensors, n);
    detail::require_score_heads(rule.score, n.heads);
    AttentionSaved<S> saved;
    saved.lse.resize(n.queries, n.heads);
    detail::for_each_sequence(static_cast<Index>(cu_seqlens_q.size()) - 1, executor,
                              [&](Index b, ExecutorRef inner, Workspace& workspace) {
                                const auto at = static_cast<std::size_t>(b);
                                const Index q0 = cu_seqlens_q[at], tq = cu_seqlens_q[at + 1] - q0;
                                const Index k0 = cu_seqlens_k[at], tk = cu_seqlens_k[at + 1] - k0;
                                AttentionShape local = shape;
                                local.query_offset = tk - tq;
                                auto o = out.middleRows(q0, tq);
                                auto l = saved.lse.middleRows(q0, tq);
                                const detail::SequenceTensors<S> part(tensors, q0, tq);
                                detail::attention_forward_into(
                                    query.middleRows(q0, tq), key.middleRows(k0, tk),
                                    value.middleRows(k0, tk), o, l, local, rule, part.tensors,
                                    inner, workspace);
                              });
    return saved;
  }

/// Gradients for attention_varlen_forward; overwrites dquery, dkey, dvalue, and the non-null tensors of `gradients`.
template <MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike O, MatrixLike DO, OutputMatrix DQ,
          OutputMatrix DK, OutputMatrix DV, class Rule = DefaultRule>
  requires SameScalar<Q, K, V, O, DO, DQ, DK, DV>
void attention_varlen_backward(
    const AttentionSaved<compute_t<scalar_t<Q>>>& saved, const Q& query, const K& key,
    const V& value, std::span<const Index> cu_seqlens_q, std::span<const Index> cu_seqlens_k,
    const O& out, const DO& dout, DQ&& dquery, DK&& dkey, DV&& dvalue, const AttentionShape& shape,
    const Rule& rule = {}, const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
    AttentionTensorGradients<compute_t<scalar_t<Q>>>* gradients = nullptr,
    ExecutorRef executor = {}) {
  using S = compute_t<scalar_t<Q>>;
  const detail::AttentionSizes n = detail::require_forward(query, key, value, out, shape);
  detail::require_packing(cu_seqlens_q, cu_seqlens_k, n.queries, n.keys, shape);
  detail::require_packed_tensors(tensors, n);
  detail::require_score_heads(rule.score, n.heads);
  const AttentionTensorGradients<S> wanted = gradients ? *gradients : AttentionTensorGradients<S>{};
  detail::require_tensor_gradients(wanted, tensors, n);
  detail::require_shape("saved.lse", saved.lse.rows(), saved.lse.cols(), n.queries, n.heads,
                        "queries x heads");
  detail::require_shape("dout", dout.rows(), dout.cols(), out.rows(), out.cols(), "shape of out");
  detail::require_shape("dquery", dquery.rows(), dquery.cols(), query.rows(), query.cols(),
                        "shape of query");
  detail::require_shape("dkey", dkey.rows(), dkey.cols(), key.rows(), key.cols(), "shape of key");
  detail::require_shape("dvalue", dvalue.rows(), dvalue.cols(), value.rows(), value.cols(),
                        "shape of value");
  const Index sequences = static_cast<Index>(cu_seqlens_q.size()) - 1;
  Matrix<S> sink_parts = Matrix<S>::Zero(wanted.sinks ? sequences : 0, n.heads);
  // A score functor with parameter gradients writes to one place per head: sequences take turns.
  const ExecutorRef across =
      detail::HasScoreAccumulate<decltype(rule.score), S> ? ExecutorRef(serial) : executor;
  detail::for_each_sequence(
      sequences, across, [&](Index b, ExecutorRef inner, Workspace& workspace) {
        const auto at = static_cast<std::size_t>(b);
        const Index q0 = cu_seqlens_q[at], tq = cu_seqlens_q[at + 1] - q0;
        const Index k0 = cu_seqlens_k[at], tk = cu_seqlens_k[at + 1] - k0;
        AttentionShape local = shape;
        local.query_offset = tk - tq;
        auto dq = dquery.middleRows(q0, tq);
        auto dk = dkey.middleRows(k0, tk);
        auto dv = dvalue.middleRows(k0, tk);
        const detail::SequenceTensors<S> part(tensors, q0, tq);
        Vector<S> dsinks(wanted.sinks ? n.heads : 0), drho(wanted.row_scale ? tq : 0);
        Matrix<S> dlse;
        AttentionTensorGradients<S> local_gradients;
        if (wanted.sinks) local_gradients.sinks = &dsinks;
        if (wanted.row_scale) local_gradients.row_scale = &drho;
        if (wanted.upstream_lse) {
          dlse = wanted.upstream_lse->middleRows(q0, tq);
          local_gradients.upstream_lse = &dlse;
        }
        detail::attention_backward_into(
            saved.lse.middleRows(q0, tq), query.middleRows(q0, tq), key.middleRows(k0, tk),
            value.middleRows(k0, tk), out.middleRows(q0, tq), dout.middleRows(q0, tq), dq, dk, dv,
            local, rule, part.tensors, &local_gradients, inner, workspace);
        if (wanted.sinks) sink_parts.row(b) = dsinks.transpose();
        if (wanted.row_scale) wanted.row_scale->segment(q0, tq) = drho;
      });
  if (wanted.sinks) *wanted.sinks = sink_parts.colwise().sum().transpose();
}

EIGENBLOCKS_NAMESPACE_END
