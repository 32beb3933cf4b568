// Streams without end in constant memory: the first tokens and a rolling window (StreamingLLM, arXiv 2309.17453).
//
//   KvCache<float> cache({.kv_heads = 8, .head_dim = 128, .window = 1019, .sinks = 4});    // QuantizedKvCache likewise
//   attention_step(cache, q, k, v, out, shape, rule);                                      // decode.hpp
//
// A query at position i sees the keys j < sinks and i - window <= j <= i: full attention under
// causal() & (prefix(sinks) | window_left(window)), up to rounding.  The paper's cache of start_size + recent_size tokens is
// sinks = start_size, window = recent_size - 1.  bytes() does not grow; truncate(n) is possible while the ring still holds the
// window before n (std::out_of_range otherwise; the sinks are always there).  A sink here is a token; a logit per head that joins
// the soft-max (gpt-oss) is tensors.sinks, and both may be used.
//
// Positions.  Keys are stored as given and never touched again.  That is all there is to do without positions, under ALiBi, and for
// models trained with windows.  Rotary models trained on full attention see a sink at distances they have not met, so
// the paper counts positions inside the cache: its code stores keys before the rotation and turns all of them anew at every step.
// Only differences count, and within the window they do not change; so it is enough to turn keys once, at their positions
// in the text, and to let every query ask twice:
//
//   s_ij = <R(i) q_i, R(j) k_j>  for i - window <= j,      <R(P_i) q_i, R(j) k_j>  for a sink,      P_i = min(i, sinks + window)
//
//   std::vector<double> at(rows);                                        // P_i of the next rows
//   sink_query_positions(cache.options(), cache.size(), at);
//   rope_forward(x_q, cache.size(), table, q, heads);                    // position/rope.hpp
//   rope_forward(x_q, at, table, q_at_sinks, heads);
//   rope_forward(x_k, cache.size(), table, k, kv_heads);
//   sink_attention_step(cache, q, q_at_sinks, k, v, out, shape, rule);
//
// The mask and the score functor of the rule get positions in the text in both cases.
#pragma once

#include <eigenblocks/attention/decode.hpp>

#include <algorithm>
#include <span>

EIGENBLOCKS_NAMESPACE_BEGIN

/// P_i of rows at positions first, first + 1, ...: where a query stands in a cache of sinks and window, counted from its start.
inline void sink_query_positions(const KvCacheOptions& options, Index first,
                                 std::span<double> positions) {
  detail::require(options.sinks > 0, "sink_query_positions: the cache has no sinks");
  detail::require(first >= 0, "sink_query_positions: first (", first, ") must not be negative");
  for (double& p : positions)
    p = static_cast<double>(std::min(first++, options.sinks + options.window));
}

/// attention_step in which the rows of sink_query ask the sinks and those of query the window.  Takes many rows 16 by 16.
/// Errors: those of attention_step; a cache without sinks; sink_query of another shape than query.
template <class Cache, MatrixLike Q, MatrixLike QS, MatrixLike K, MatrixLike V, OutputMatrix O,
          class Rule = CausalRule>
  requires SameScalar<Q, QS, O> && detail::AttendableCache<Cache, Q> &&
      detail::TakesRows<Cache, K, V>
void sink_attention_step(Cache& cache, const Q& query, const QS& sink_query, const K& key,
                         const V& value, O&& out, const AttentionShape& shape,
                         const Rule& rule = {},
                         const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
                         ExecutorRef executor = {}) {
  detail::require(cache.options().sinks > 0, "sink_attention_step: the cache has no sinks");
  detail::require_shape("sink_query", sink_query.rows(), sink_query.cols(), query.rows(),
                        query.cols(), "shape of query");
  detail::step_over_cache(cache, query, sink_query.data(), sink_query.outerStride(), key, value,
                          out, shape, rule, tensors, executor);
}

EIGENBLOCKS_NAMESPACE_END
