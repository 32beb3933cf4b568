// Masks: which keys a query may attend to, as functors that the attention kernel compiles in.
//
//   causal()            j <= i
//   window_left(w)      j >= i - w    (flash-attention's inclusive convention; transformers' sliding_window W is w = W - 1)
//   window_right(w)     j <= i + w
//   prefix(n)           j < n         (prefix-LM is  causal() | prefix(n))
//   same_document(ids)  ids[i] == ids[j]
//   full()              everything
//   a & b, a | b        both / either; a bare lambda bool(Index i, Index j) or bool(Index i, Index j, Index head) may be one side
//
// i and j are absolute positions (row + AttentionShape::query_offset, column + key_offset), h the query head.
//
// A mask of your own needs  bool operator()(Index i, Index j, Index h) const  (or without h) and may add, to be faster,
//   TileClass classify(i0, i1, j0, j1) const    is the rectangle of queries [i0, i1) and keys [j0, j1) empty, partial or full?
//   KeyRange  key_range(i0, i1) const           a range holding every key visible to any query in [i0, i1)
//   P lanes(P irel, Index i0, Index j, Index h) const   mask packet for queries i0 + irel[lane] and one key (core/simd.hpp)
// Without classify every tile is tested element by element; without key_range every tile is visited.
// Sources: flash-attention (window convention), FlexAttention arXiv 2412.05496 (block classification).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/simd.hpp>

#include <algorithm>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class TileClass { empty, partial, full };  // ordered: & takes the smaller, | the larger

/// Half-open range of keys.
struct KeyRange {
  Index begin = 0;
  Index end = std::numeric_limits<Index>::max();
};

namespace detail {

// Marks our mask types, so that & and | are only found for them.
struct MaskTag {};
template <class M>
concept MaskObject = std::is_base_of_v<MaskTag, M>;

template <class M>
concept MaskOfPositions = requires(const M& mask, Index i) {
  { mask(i, i) } -> std::convertible_to<bool>;
};
template <class M>
concept MaskOfHeads = requires(const M& mask, Index i) {
  { mask(i, i, i) } -> std::convertible_to<bool>;
};

// Windows beyond this are as good as unbounded, and positions plus or minus one stay in range.
inline constexpr Index kWidestWindow = Index{1} << 60;

/// i0 + irel - j as lanes; |i0 - j| is clamped far outside the tile so that float stays exact.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P clamped_distance(const P& irel, Index i0, Index j) {
  constexpr Index kFar = Index{1} << 20;
  return simd::add(irel,
                   simd::set1<P>(static_cast<simd::lane_t<P>>(std::clamp(i0 - j, -kFar, kFar))));
}

}  // namespace detail

/// What attention_rule and the operators accept as a mask.
template <class M>
concept Mask = detail::MaskOfHeads<M> || detail::MaskOfPositions<M>;

struct FullMask : detail::MaskTag {
  bool operator()(Index, Index, Index) const { return true; }
  TileClass classify(Index, Index, Index, Index) const { return TileClass::full; }
  KeyRange key_range(Index, Index) const { return {}; }
};
/// Every key is visible.
inline FullMask full() { return {}; }

struct CausalMask : detail::MaskTag {
  bool operator()(Index i, Index j, Index) const { return j <= i; }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    return j0 >= i1 ? TileClass::empty : j1 - 1 <= i0 ? TileClass::full : TileClass::partial;
  }
  KeyRange key_range(Index, Index i1) const { return {0, std::max<Index>(0, i1)}; }
  template <class P>
  P lanes(const P& irel, Index i0, Index j, Index) const {
    return simd::less_equal(simd::zero<P>(), detail::clamped_distance(irel, i0, j));
  }
};
/// j <= i.
inline CausalMask causal() { return {}; }

struct WindowLeftMask : detail::MaskTag {
  Index window;
  explicit WindowLeftMask(Index w) : window(w) {}
  bool operator()(Index i, Index j, Index) const { return j >= i - window; }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    return j1 - 1 < i0 - window    ? TileClass::empty
           : j0 >= i1 - 1 - window ? TileClass::full
                                   : TileClass::partial;
  }
  KeyRange key_range(Index i0, Index) const {
    return {std::max<Index>(0, i0 - window), std::numeric_limits<Index>::max()};
  }
  template <class P>
  P lanes(const P& irel, Index i0, Index j, Index) const {
    return simd::less_equal(detail::clamped_distance(irel, i0 - window, j), simd::zero<P>());
  }
};
/// j >= i - window; window >= 0.
inline WindowLeftMask window_left(Index window) {
  detail::require(window >= 0, "window_left: window (", window, ") must not be negative");
  return WindowLeftMask(std::min(window, detail::kWidestWindow));
}

struct WindowRightMask : detail::MaskTag {
  Index window;
  explicit WindowRightMask(Index w) : window(w) {}
  bool operator()(Index i, Index j, Index) const { return j <= i + window; }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    return CausalMask{}.classify(i0 + window, i1 + window, j0, j1);
  }
  KeyRange key_range(Index i0, Index i1) const {
    return CausalMask{}.key_range(i0 + window, i1 + window);
  }
  template <class P>
  P lanes(const P& irel, Index i0, Index j, Index h) const {
    return CausalMask{}.lanes(irel, i0 + window, j, h);
  }
};
/// j <= i + window; window >= 0.
inline WindowRightMask window_right(Index window) {
  detail::require(window >= 0, "window_right: window (", window, ") must not be negative");
  return WindowRightMask(std::min(window, detail::kWidestWindow));
}

struct PrefixMask : detail::MaskTag {
  Index length;
  explicit PrefixMask(Index n) : length(n) {}
  bool operator()(Index, Index j, Index) const { return j < length; }
  TileClass classify(Index, Index, Index j0, Index j1) const {
    return j0 >= length ? TileClass::empty : j1 <= length ? TileClass::full : TileClass::partial;
  }
  KeyRange key_range(Index, Index) const { return {0, length}; }
};
/// j < length, for every query; length >= 0.
inline PrefixMask prefix(Index length) {
  detail::require(length >= 0, "prefix: length (", length, ") must not be negative");
  return PrefixMask(length);
}

struct SameDocumentMask : detail::MaskTag {
  std::span<const Index> ids;
  bool sorted;  // as in packed sequences: then a document is a range
  explicit SameDocumentMask(std::span<const Index> document_ids)
      : ids(document_ids), sorted(std::is_sorted(ids.begin(), ids.end())) {}
  bool operator()(Index i, Index j, Index) const { return at(i) == at(j); }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    const auto [q0, q1] = hull(i0, i1);
    const auto [k0, k1] = hull(j0, j1);
    if (q1 < k0 || k1 < q0) return TileClass::empty;
    return q0 == q1 && k0 == k1 ? TileClass::full : TileClass::partial;
  }
  KeyRange key_range(Index i0, Index i1) const {
    if (!sorted || i0 >= i1) return {};
    const auto first = std::lower_bound(ids.begin(), ids.end(), at(i0)),
               last = std::upper_bound(ids.begin(), ids.end(), at(i1 - 1));
    return {first - ids.begin(), last - ids.begin()};
  }

 private:
  Index at(Index position) const {
    detail::require_index("same_document: position", position, static_cast<Index>(ids.size()));
    return ids[static_cast<std::size_t>(position)];
  }
  /// Smallest and largest id of the positions [begin, end), which are some.
  std::pair<Index, Index> hull(Index begin, Index end) const {
    const Index first = at(begin), last = at(end - 1);
    if (sorted) return {first, last};
    const auto [low, high] = std::minmax_element(ids.begin() + begin, ids.begin() + end);
    return {*low, *high};
  }
};
/// ids[i] == ids[j]; the ids must outlive the mask and cover every absolute position (std::out_of_range otherwise).
inline SameDocumentMask same_document(std::span<const Index> ids) { return SameDocumentMask(ids); }

namespace detail {

/// A callable of (i, j) as one of (i, j, h).
template <class F>
struct LiftedMask : MaskTag {
  F f;
  explicit LiftedMask(F function) : f(std::move(function)) {}
  bool operator()(Index i, Index j, Index) const { return static_cast<bool>(f(i, j)); }
};

template <class M>
auto as_mask(M mask) {
  if constexpr (MaskOfHeads<M>) {
    return mask;
  } else {
    return LiftedMask<M>(std::move(mask));
  }
}

template <class M>
concept HasClassify = requires(const M& m, Index i) {
  { m.classify(i, i, i, i) } -> std::same_as<TileClass>;
};
template <class M>
concept HasKeyRange = requires(const M& m, Index i) {
  { m.key_range(i, i) } -> std::same_as<KeyRange>;
};
template <class M, class P>
concept HasMaskLanes = requires(const M& m, P irel, Index i) {
  { m.lanes(irel, i, i, i) } -> std::convertible_to<P>;
};

template <class M>
TileClass classify(const M& mask, Index i0, Index i1, Index j0, Index j1) {
  if constexpr (HasClassify<M>) {
    return mask.classify(i0, i1, j0, j1);
  } else {
    return TileClass::partial;
  }
}
template <class M>
KeyRange key_range(const M& mask, Index i0, Index i1) {
  if constexpr (HasKeyRange<M>) {
    return mask.key_range(i0, i1);
  } else {
    return {};
  }
}

/// Mask packet of queries i0 + first_lane + 0, 1, ... and key j.  Queries beyond last_query (padding lanes of a tile) are
/// asked as last_query, so a user's mask never sees a position that does not exist.
template <class P, class M>
EIGENBLOCKS_ALWAYS_INLINE P mask_lanes(const M& mask, const P& irel, Index i0, Index first_lane,
                                       Index last_query, Index j, Index h) {
  if constexpr (HasMaskLanes<M, P>) {
    (void)first_lane;
    (void)last_query;
    return mask.lanes(irel, i0, j, h);
  } else {
    using S = simd::lane_t<P>;
    constexpr int w = simd::kPacketSize<P>;
    S keep[std::size_t(w)];
    for (int x = 0; x < w; ++x) {
      keep[x] = mask(std::min(i0 + first_lane + x, last_query), j, h) ? S(1) : S(0);
    }
    return simd::less(simd::zero<P>(), simd::load<P>(keep));
  }
}

template <class A, class B>
struct AndMask : MaskTag {
  A a;
  B b;
  AndMask(A first, B second) : a(std::move(first)), b(std::move(second)) {}
  bool operator()(Index i, Index j, Index h) const { return a(i, j, h) && b(i, j, h); }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    return std::min(detail::classify(a, i0, i1, j0, j1), detail::classify(b, i0, i1, j0, j1));
  }
  KeyRange key_range(Index i0, Index i1) const {
    const KeyRange x = detail::key_range(a, i0, i1), y = detail::key_range(b, i0, i1);
    return {std::max(x.begin, y.begin), std::min(x.end, y.end)};
  }
  template <class P>
    requires HasMaskLanes<A, P> && HasMaskLanes<B, P> P lanes(const P& irel, Index i0, Index j,
                                                              Index h)
  const { return simd::mask_and<P>(a.lanes(irel, i0, j, h), b.lanes(irel, i0, j, h)); }
};

template <class A, class B>
struct OrMask : MaskTag {
  A a;
  B b;
  OrMask(A first, B second) : a(std::move(first)), b(std::move(second)) {}
  bool operator()(Index i, Index j, Index h) const { return a(i, j, h) || b(i, j, h); }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    return std::max(detail::classify(a, i0, i1, j0, j1), detail::classify(b, i0, i1, j0, j1));
  }
  KeyRange key_range(Index i0, Index i1) const {
    const KeyRange x = detail::key_range(a, i0, i1), y = detail::key_range(b, i0, i1);
    if (x.begin >= x.end) return y;
    if (y.begin >= y.end) return x;
    return {std::min(x.begin, y.begin), std::max(x.end, y.end)};
  }
  template <class P>
    requires HasMaskLanes<A, P> && HasMaskLanes<B, P> P lanes(const P& irel, Index i0, Index j,
                                                              Index h)
  const { return simd::mask_or<P>(a.lanes(irel, i0, j, h), b.lanes(irel, i0, j, h)); }
};

}  // namespace detail

/// Visible where both are.
template <Mask A, Mask B>
  requires(detail::MaskObject<A> || detail::MaskObject<B>)
auto operator&(A a, B b) {
  return detail::AndMask(detail::as_mask(std::move(a)), detail::as_mask(std::move(b)));
}
/// Visible where either is.
template <Mask A, Mask B>
  requires(detail::MaskObject<A> || detail::MaskObject<B>)
auto operator|(A a, B b) {
  return detail::OrMask(detail::as_mask(std::move(a)), detail::as_mask(std::move(b)));
}

EIGENBLOCKS_NAMESPACE_END
