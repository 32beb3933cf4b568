// The mathematics of ring attention: a sequence cut over R ranks, keys and values passed round.
//
//   rank r holds the tokens ring_positions(layout, R, T, r); at step s = 0 .. R-1 its queries meet the keys of rank (r - s) mod R:
//     ring_step_forward(q, k, v, out, lse, shape, rule, positions_r, positions_of_the_block, s == 0)    merged by log-sum-exp
//   backward, k and v going round once more with their gradients, out and lse being final:
//     ring_step_backward(lse, q, k, v, out, dout, dq, dk, dv, shape, rule, positions_r, positions_of_the_block)   adds to dq, dk, dv
//
// Masks and score functors see global positions, so windows, documents, ALiBi and any layout work; rotate queries and keys to
// theirs beforehand.  Sending is the caller's (mpi/): nothing here knows of other processes.
//
//   contiguous   r T/R, r T/R + 1, ...       R divides T     equal work without a mask; under a causal one rank R-1 has most
//   striped      r, r + R, r + 2 R, ...      R divides T     equal work up to a diagonal (arXiv 2311.09431)
//   zigzag       chunks r and 2R-1-r of 2R   2 R divides T   equal work under a causal mask at every step
//
// Sources: arXiv 2310.01889 (ring), 2311.09431 (striped); zigzag as in zhuzilin/ring-flash-attention.
#pragma once

#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/partial.hpp>

#include <algorithm>
#include <span>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class RingLayout { contiguous, striped, zigzag };

/// The global positions of a rank's tokens, ascending.
/// Errors: an unknown layout; ranks < 1; rank outside [0, ranks); tokens negative or not divisible as the layout needs.
inline std::vector<Index> ring_positions(RingLayout layout, Index ranks, Index tokens, Index rank) {
  detail::require(layout == RingLayout::contiguous || layout == RingLayout::striped ||
                      layout == RingLayout::zigzag,
                  "layout (", layout, ") must be contiguous, striped or zigzag");
  detail::require(ranks >= 1, "ranks (", ranks, ") must be at least 1");
  detail::require(rank >= 0 && rank < ranks, "rank (", rank, ") must be in [0, ", ranks, ")");
  const Index parts = layout == RingLayout::zigzag ? 2 * ranks : ranks;
  detail::require(tokens >= 0 && tokens % parts == 0, "tokens (", tokens,
                  ") must be a multiple of ", parts,
                  layout == RingLayout::zigzag ? " (2 ranks)" : " (ranks)");
  const Index local = tokens / ranks, half = tokens / parts;
  std::vector<Index> positions;
  positions.reserve(static_cast<std::size_t>(local));
  for (Index t = 0; t < local; ++t) {
    switch (layout) {
      case RingLayout::contiguous:
        positions.push_back(rank * local + t);
        break;
      case RingLayout::striped:
        positions.push_back(t * ranks + rank);
        break;
      case RingLayout::zigzag:
        positions.push_back(t < half ? rank * half + t : (2 * ranks - 1 - rank) * half + t - half);
        break;
    }
  }
  return positions;
}

/// Work of each rank and step, ranks x ranks: entry (r, s) counts the pairs of rank r's queries and the keys of rank
/// (r - s) mod ranks with key <= query (causal), or all.  Errors: those of ring_positions.
inline Matrix<Index> ring_pairs(RingLayout layout, Index ranks, Index tokens, bool causal) {
  std::vector<std::vector<Index>> held;
  ring_positions(layout, ranks, tokens, 0);  // checks before the loop
  for (Index r = 0; r < ranks; ++r) held.push_back(ring_positions(layout, ranks, tokens, r));
  Matrix<Index> pairs(ranks, ranks);
  for (Index r = 0; r < ranks; ++r) {
    for (Index s = 0; s < ranks; ++s) {
      const auto& queries = held[static_cast<std::size_t>(r)];
      const auto& keys = held[static_cast<std::size_t>((r - s + ranks) % ranks)];
      Index count = 0;
      for (const Index i : queries) {
        count += causal ? std::upper_bound(keys.begin(), keys.end(), i) - keys.begin()
                        : static_cast<Index>(keys.size());
      }
      pairs(r, s) = count;
    }
  }
  return pairs;
}

namespace detail {

/// A mask asked at the global positions of local rows and columns, both ascending.
template <class M>
struct PlacedMask : MaskTag {
  const M* mask;
  std::span<const Index> queries, keys;
  PlacedMask(const M& m, std::span<const Index> q, std::span<const Index> k)
      : mask(&m), queries(q), keys(k) {}

  bool operator()(Index i, Index j, Index h) const {
    return (*mask)(at(queries, i), at(keys, j), h);
  }
  // The hull of positions has more pairs than the tile: what holds for all of them holds for the tile.
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    return detail::classify(*mask, at(queries, i0), at(queries, i1 - 1) + 1, at(keys, j0),
                            at(keys, j1 - 1) + 1);
  }
  KeyRange key_range(Index i0, Index i1) const {
    const KeyRange range = detail::key_range(*mask, at(queries, i0), at(queries, i1 - 1) + 1);
    const auto first_from = [&](Index position) {
      return std::lower_bound(keys.begin(), keys.end(), position) - keys.begin();
    };
    return {first_from(range.begin), first_from(range.end)};
  }

 private:
  static Index at(std::span<const Index> positions, Index i) {
    return positions[static_cast<std::size_t>(i)];
  }
};

/// The same for a score functor; its lanes, which count on neighbouring queries, are left out.
template <class F>
struct PlacedScore {
  const F* score;
  std::span<const Index> queries, keys;
  Index query(Index i) const { return queries[static_cast<std::size_t>(i)]; }
  Index key(Index j) const { return keys[static_cast<std::size_t>(j)]; }
  template <class S>
  S operator()(S s, Index i, Index j, Index h) const {
    return (*score)(s, query(i), key(j), h);
  }
  template <class S>
  S grad(S s, Index i, Index j, Index h) const {
    return score_grad(*score, s, query(i), key(j), h);
  }
  template <class S>
    requires HasScoreAccumulate<F, S>
  void accumulate(S ds, S s, Index i, Index j, Index h) const {
    score->accumulate(ds, s, query(i), key(j), h);
  }
};

/// `rule` for rows and columns that stand at the given positions; it refers to rule and lists.
template <class Rule>
auto placed_rule(const Rule& rule, std::span<const Index> queries, std::span<const Index> keys) {
  using F = typename Rule::score_type;
  PlacedMask<typename Rule::mask_type> mask(rule.mask, queries, keys);
  if constexpr (std::is_same_v<F, IdentityScore>) {
    return attention_rule(mask);
  } else {
    return attention_rule(mask, PlacedScore<F>{&rule.score, queries, keys});
  }
}

inline void require_ring_positions(const char* name, std::span<const Index> positions, Index rows) {
  require_size(name, static_cast<Index>(positions.size()), rows, "one per row");
  for (std::size_t i = 1; i < positions.size(); ++i) {
    require(positions[i - 1] < positions[i], name, "[", i, "] (", positions[i],
            ") must be above the entry before it (", positions[i - 1], ")");
  }
}

/// What both steps ask of their operands beyond the kernel's own checks.
template <class S>
void require_ring_step(const AttentionShape& shape, Index queries, Index keys,
                       std::span<const Index> query_positions, std::span<const Index> key_positions,
                       const AttentionTensors<S>& tensors) {
  require(shape.query_offset == 0 && shape.key_offset == 0, "query_offset (", shape.query_offset,
          ") and key_offset (", shape.key_offset, ") must be 0: the lists say the positions");
  require_ring_positions("query_positions", query_positions, queries);
  require_ring_positions("key_positions", key_positions, keys);
  require(tensors.bias == nullptr && tensors.mask == nullptr,
          "bias and mask tensors have no place in a ring; express them in the rule");
}

}  // namespace detail

/// Attention of local queries to one block of keys; with `first` out and lse are overwritten, else the block is merged into
/// them.  tensors: row_scale, and sinks, which count once, at the first block.
/// Errors: those of attention_forward; lists that are not ascending or not one entry per row; offsets in shape; bias or mask
/// tensors, which belong to one block.
template <MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O, OutputMatrix L,
          class Rule = DefaultRule>
  requires SameScalar<Q, K, V, O, L> && RealScalar<scalar_t<Q>>
void ring_step_forward(const Q& query, const K& key, const V& value, O&& out, L&& lse,
                       const AttentionShape& shape, const Rule& rule,
                       std::span<const Index> query_positions, std::span<const Index> key_positions,
                       bool first, AttentionTensors<scalar_t<Q>> tensors = {},
                       ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  detail::require_ring_step(shape, query.rows(), key.rows(), query_positions, key_positions,
                            tensors);
  const detail::AttentionSizes n = detail::require_forward(query, key, value, out, shape);
  detail::require_shape("lse", lse.rows(), lse.cols(), n.queries, n.heads, "queries x heads");
  const auto placed = detail::placed_rule(rule, query_positions, key_positions);
  Workspace workspace;
  if (first) {
    detail::attention_forward_into(query, key, value, out, lse, shape, placed, tensors, executor,
                                   workspace);
    return;
  }
  tensors.sinks = nullptr;
  Matrix<S> part(out.rows(), out.cols()), part_lse(lse.rows(), lse.cols());
  detail::attention_forward_into(query, key, value, part, part_lse, shape, placed, tensors,
                                 executor, workspace);
  attention_merge_into(out, lse, part, part_lse);
}

/// Adds the gradients of one block to dquery, dkey and dvalue; out and lse are those after the last forward step.
/// Errors: as ring_step_forward.
template <MatrixLike L, MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike O, MatrixLike DO,
          OutputMatrix DQ, OutputMatrix DK, OutputMatrix DV, class Rule = DefaultRule>
  requires SameScalar<L, Q, K, V, O, DO, DQ, DK, DV> && RealScalar<scalar_t<Q>>
void ring_step_backward(const L& lse, const Q& query, const K& key, const V& value, const O& out,
                        const DO& dout, DQ&& dquery, DK&& dkey, DV&& dvalue,
                        const AttentionShape& shape, const Rule& rule,
                        std::span<const Index> query_positions,
                        std::span<const Index> key_positions,
                        AttentionTensors<scalar_t<Q>> tensors = {}, ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  detail::require_ring_step(shape, query.rows(), key.rows(), query_positions, key_positions,
                            tensors);
  detail::require_shape("dquery", dquery.rows(), dquery.cols(), query.rows(), query.cols(),
                        "shape of query");
  detail::require_shape("dkey", dkey.rows(), dkey.cols(), key.rows(), key.cols(), "shape of key");
  detail::require_shape("dvalue", dvalue.rows(), dvalue.cols(), value.rows(), value.cols(),
                        "shape of value");
  tensors.sinks = nullptr;  // they are in lse
  Matrix<S> dq(query.rows(), query.cols()), dk(key.rows(), key.cols()),
      dv(value.rows(), value.cols());
  Workspace workspace;
  detail::attention_backward_into(lse, query, key, value, out, dout, dq, dk, dv, shape,
                                  detail::placed_rule(rule, query_positions, key_positions),
                                  tensors, nullptr, executor, workspace);
  dquery += dq;
  dkey += dk;
  dvalue += dv;
}

EIGENBLOCKS_NAMESPACE_END
