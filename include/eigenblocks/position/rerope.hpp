// Relative positions that stop growing, or grow slower, beyond a window: ReRoPE and its relatives.
//
// A causal query at i sees a key at j <= i under the relative position, with d = i - j and a window w:
//
//   rerope(w)            min(d, w)                                                 kexue.fm 9708
//   leaky_rerope(w, k)   d below w, then w + (d - w)/k                             kexue.fm 9708, 9728
//   self_extend(w, G)    d below w, then  i div G - j div G + w - w div G          arXiv 2401.01325
//   linear_position(k)   d/k: RoPE for k = 1, position interpolation otherwise     arXiv 2306.15595
//
// Leaky with k = 1 is RoPE, with k large ReRoPE; k < 1 ("inverse leaky", kexue.fm 9728) is for training, after which
// plain RoPE is used.  Recommended: w = L0/4 .. L0/2 of a trained length L0, and k such that w + (T - w)/k stays below
// L0/2; log-n scaling (logn.hpp) goes with all of them.
//
// The first three split into a near branch, plain RoPE for d < w, and a far branch that is RoPE as well, with queries at P_i
// and keys at S_j, neither of which depends on the other index or on the length:
//
//   rerope        P_i = w                        S_j = 0: far keys stay as they are
//   leaky_rerope  P_i = i/k + w (1 - 1/k)        S_j = j/k
//   self_extend   P_i = i div G + w - w div G    S_j = j div G
//
// Attention under them: attention/rerope.hpp.  Linear positions are a matter of frequencies alone, f/k: no kernel needs them.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

/// A position policy with a near and a far branch; made by rerope, leaky_rerope and self_extend below.
struct NearFarPosition {
  enum class Kind { rerope, leaky, self_extend };
  Kind kind = Kind::rerope;
  Index window = 1;
  double leak = 1.0;
  Index group = 1;

  /// P_i.
  double far_query(Index i) const {
    switch (kind) {
      case Kind::leaky:
        return static_cast<double>(i) / leak + static_cast<double>(window) * (1.0 - 1.0 / leak);
      case Kind::self_extend:
        return static_cast<double>(floor_div(i) + window - window / group);
      default:
        return static_cast<double>(window);
    }
  }
  /// S_j.
  double far_key(Index j) const {
    switch (kind) {
      case Kind::leaky:
        return static_cast<double>(j) / leak;
      case Kind::self_extend:
        return static_cast<double>(floor_div(j));
      default:
        return 0.0;
    }
  }
  /// Relative position of key j <= i.
  double relative(Index i, Index j) const {
    const Index d = i - j;
    if (d < window) return static_cast<double>(d);
    switch (kind) {
      case Kind::leaky:
        return static_cast<double>(window) + static_cast<double>(d - window) / leak;
      case Kind::self_extend:
        return static_cast<double>(floor_div(i) - floor_div(j) + window - window / group);
      default:
        return static_cast<double>(window);
    }
  }
  friend bool operator==(const NearFarPosition&, const NearFarPosition&) = default;

 private:
  Index floor_div(Index n) const { return n >= 0 ? n / group : -((group - 1 - n) / group); }
};

namespace detail {

inline void require_near_far(const NearFarPosition& p) {
  require(p.window >= 1, "window (", p.window, ") must be at least 1");
  require(p.leak > 0 && std::isfinite(p.leak), "leak (", p.leak, ") must be positive and finite");
  require(p.group >= 1, "group (", p.group, ") must be at least 1");
  require(p.group <= p.window, "group (", p.group, ") must be at most window (", p.window, ")");
}

}  // namespace detail

/// min(d, window).  Errors: window < 1.
inline NearFarPosition rerope(Index window) {
  const NearFarPosition p{.window = window};
  detail::require_near_far(p);
  return p;
}
/// d below the window, then window + (d - window)/leak.  Errors: window < 1; leak not positive and finite.
inline NearFarPosition leaky_rerope(Index window, double leak) {
  const NearFarPosition p{.kind = NearFarPosition::Kind::leaky, .window = window, .leak = leak};
  detail::require_near_far(p);
  return p;
}
/// Far positions in groups (Self-Extend).  Errors: window < 1; group < 1 or > window.
inline NearFarPosition self_extend(Index window, Index group) {
  const NearFarPosition p{
      .kind = NearFarPosition::Kind::self_extend, .window = window, .group = group};
  detail::require_near_far(p);
  return p;
}

/// d/factor.
struct LinearPosition {
  double factor = 1.0;
  double relative(Index i, Index j) const { return static_cast<double>(i - j) / factor; }
};
/// RoPE (factor 1) or position interpolation.  Errors: factor not positive and finite.
inline LinearPosition linear_position(double factor = 1.0) {
  detail::require(factor > 0 && std::isfinite(factor), "factor (", factor,
                  ") must be positive and finite");
  return {factor};
}

/// The table of relative positions, queries x keys: entry (r, j) for the query at query_offset + r, 0 where j lies behind it.
/// Errors: a negative count.
template <class Position>
Matrix<double> rope_relative_positions(const Position& position, Index queries, Index keys,
                                       Index query_offset = 0) {
  detail::require(queries >= 0, "queries (", queries, ") must not be negative");
  detail::require(keys >= 0, "keys (", keys, ") must not be negative");
  Matrix<double> relative = Matrix<double>::Zero(queries, keys);
  for (Index r = 0; r < queries; ++r) {
    const Index i = r + query_offset;
    for (Index j = 0; j < std::min(keys, i + 1); ++j) relative(r, j) = position.relative(i, j);
  }
  return relative;
}

EIGENBLOCKS_NAMESPACE_END
