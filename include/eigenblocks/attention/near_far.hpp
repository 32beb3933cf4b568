// Tiles of scores under a position policy with a near and a far branch (position/rerope.hpp).
// Internal to attention/; the public functions are in rerope.hpp.
//
//   s_ij = <q1_i, k1_j> where i - j < w,  <q2_i, k2_j> where not
//
// In a tile of queries [i0, i1) a panel of keys is far, near or, where the edge of the window runs through it, mixed.  Keys
// ascend, so the panels come in that order:
//
//   far       all of i - j >= w    panels [g0, mixed_begin)      one product
//   mixed                          panels [mixed_begin, mixed_end)     both products, selected lane by lane
//   near      all of i - j < w     panels [mixed_end, g1)        one product
//
// Mixed panels are about (tile queries + panel keys)/(visible keys) of all: nothing for long sequences, without any
// condition on the window.  A sequence that fits the window is all near, and its scores are those of plain attention bit for bit.
#pragma once

#include <eigenblocks/attention/mask.hpp>
#include <eigenblocks/core/tile.hpp>

#include <algorithm>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// The position policy of a rule with a far branch: its queries and keys, rows and heads as those of the near branch, and
/// in the backward where their gradients go.
template <StorageScalar T>
struct FarOperands {
  Index window;
  const T* query;
  Index query_stride;
  const T* key;
  Index key_stride;
  T* dquery = nullptr;
  Index dquery_stride = 0;
  T* dkey = nullptr;
  Index dkey_stride = 0;

  const T* query_row(Index row, Index column) const { return query + row * query_stride + column; }
  const T* key_row(Index row, Index column) const { return key + row * key_stride + column; }
};

/// Keys of the near branch, keys of the far branch and values as the operand of ForwardTiles, from two sources.
template <class Near, class Far>
struct NearFarSource {
  Near near;
  Far far;  ///< with the values
  template <int MR, RealScalar S>
  void pack_keys(Index kv, Index dim, Index first, Index count, S* panels, S* scratch) const {
    near.template pack_keys<MR>(kv, dim, first, count, panels, scratch);
  }
  template <int MR, RealScalar S>
  void pack_far_keys(Index kv, Index dim, Index first, Index count, S* panels, S* scratch) const {
    far.template pack_keys<MR>(kv, dim, first, count, panels, scratch);
  }
  template <int MR, RealScalar S>
  void pack_values(Index kv, Index dim, Index first, Index count, S* panels, Index panel_stride,
                   S* scratch) const {
    far.template pack_values<MR>(kv, dim, first, count, panels, panel_stride, scratch);
  }
};

/// How many query and key operands a rule has: 2 with FarOperands.
template <class Rule>
inline constexpr int branches = [] {
  if constexpr (requires(const Rule& rule) { rule.position.query_row(0, 0); }) return 2;
  return 1;
}();

struct NearFarSplit {
  Index far_begin, mixed_begin, mixed_end, near_end;
};

/// Panels [g0, g1) of `panel` keys each, panel 0 starting at position `base`, against queries [i0, i1).
inline NearFarSplit near_far_split(Index i0, Index i1, Index base, Index panel, Index g0, Index g1,
                                   Index window) {
  const auto panels = [&](Index keys) { return keys <= 0 ? Index{0} : keys / panel; };
  // Far: last key <= i0 - w.  Near: first key >= i1 - w.
  const Index far = panels(i0 - window + 1 - base);
  const Index near = panels(i1 - window - base + panel - 1);
  const Index mixed_begin = std::clamp(far, g0, g1);
  return {g0, mixed_begin, std::clamp(near, mixed_begin, g1), g1};
}

/// What the split costs, from the shapes alone: products of (tile_queries x tile_keys) pieces under a causal mask.
struct NearFarCount {
  Index tiles = 0;  ///< pieces with a visible key: products that plain attention computes
  Index mixed = 0;  ///< pieces computed twice
};
inline NearFarCount near_far_count(Index queries, Index keys, Index query_offset, Index window,
                                   Index tile_queries, Index tile_keys) {
  NearFarCount count;
  for (Index row = 0; row < queries; row += tile_queries) {
    const Index i0 = row + query_offset, i1 = std::min(row + tile_queries, queries) + query_offset;
    const Index seen = std::clamp<Index>(i1, 0, keys);
    const Index pieces = (seen + tile_keys - 1) / tile_keys;
    const NearFarSplit split = near_far_split(i0, i1, 0, tile_keys, 0, pieces, window);
    count.tiles += pieces;
    count.mixed += split.mixed_end - split.mixed_begin;
  }
  return count;
}

/// Panels of keys and the query tile of one branch.
template <RealScalar S>
struct BranchOperands {
  const S* panels;  ///< of panel 0
  const S* query;
};

/// Far where query i0 + irel is at least `window` past key j.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P far_lanes(const P& irel, Index i0, Index j, Index window) {
  return simd::less_equal(simd::zero<P>(), clamped_distance(irel, i0 - window, j));
}

/// scores (rows from panel 0 on) of the panels of `split`; with kMax their column maxima are merged into top.
/// spare: rows as in scores; only those of mixed panels are used.
template <RealScalar S, int MR, int NV, bool kMax>
void near_far_tile(const NearFarSplit& split, Index window, Index i0, Index base, Index depth,
                   const BranchOperands<S>& near, const BranchOperands<S>& far, S* scores, S* spare,
                   S* top) {
  using P = simd::Packet<S>;
  constexpr int w = simd::kLanes<S>;
  constexpr Index nq = NV * w, rows = MR * nq;
  const auto product = [&]<bool kTop>(const BranchOperands<S>& x, Index from, Index to, S* target,
                                      std::bool_constant<kTop>) {
    if (from < to) {
      tile_scores<S, MR, NV, kTop>(to - from, depth, x.panels + from * MR * depth, x.query,
                                   target + from * rows, kTop ? top : nullptr);
    }
  };
  product(far, split.far_begin, split.mixed_begin, scores, std::bool_constant<kMax>{});
  product(near, split.mixed_end, split.near_end, scores, std::bool_constant<kMax>{});
  if (split.mixed_begin == split.mixed_end) return;
  product(near, split.mixed_begin, split.mixed_end, scores, std::false_type{});
  product(far, split.mixed_begin, split.mixed_end, spare, std::false_type{});
  for (Index r = split.mixed_begin * MR; r < split.mixed_end * MR; ++r) {
    for (int v = 0; v < nq; v += w) {
      const P is_far = far_lanes(simd::iota<P>(static_cast<S>(v)), i0, base + r, window);
      S* const s = scores + r * nq + v;
      const P value = simd::select(is_far, simd::load<P>(spare + r * nq + v), simd::load<P>(s));
      simd::store<P>(s, value);
      if constexpr (kMax) simd::store<P>(top + v, simd::max(simd::load<P>(top + v), value));
    }
  }
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
