// XPOS: rotary positions whose scores also fade with the distance.
// Source: A Length-Extrapolatable Transformer, arXiv 2212.10554.
//
// RoPE with a scale for each of the R/2 pairs, inverse on queries and keys (c: center):
//
//   z_p = (2p/R + gamma) / (1 + gamma)
//   q at n:  turned by n f_p, times z_p^((n - c) / scale_base)
//   k at n:  turned by n f_p, times z_p^(-(n - c) / scale_base)
//
// so that the score of pair p at distance m - n has the factor z_p^((m - n) / scale_base), whatever
// c is.  It falls for causal distances m - n >= 0 and grows for others: for causal attention only.
//
//   const XposTables<float> tables = xpos_tables<float>(rope_frequencies(64), RopeLayout::half);
//   rope_in_place(q, 0, tables.query, {.heads = 8});                  // all functions of rope.hpp
//   rope_in_place(k, 0, tables.key, {.heads = 2});
//   rope_backward_in_place(dq, 0, tables.query, {.heads = 8});        // turns back, the same scale
//   rope_backward_in_place(dk, 0, tables.key, {.heads = 2});
//
// Range.  The scale of pair 0 is the steepest, 0.286^((n - c)/512) by default: it leaves float at
// |n - c| = 36 000 (double: 290 000), where products become 0 * inf = NaN.  Put c into the middle of
// the positions, the same for queries and keys; a cached key keeps the c it was rotated with.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/position/frequencies.hpp>
#include <eigenblocks/position/rope.hpp>

#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

struct XposOptions {
  double gamma = 0.4;         ///< positive; the smaller, the faster the first pairs fade
  double scale_base = 512.0;  ///< positive: positions over which pair p fades to z_p
  double center = 0.0;        ///< c: where neither queries nor keys are scaled
};

/// The tables of queries and keys, one and the same but for the sign of the exponent.
template <RealScalar S>
struct XposTables {
  RotaryTable<S> query, key;
};

/// The scale is part of the two tables of RotaryTable, so it costs nothing per token, and a float row
/// is within 1.74e-7 of the truth, relative to the scale.
///   frequencies   f_p of the R/2 pairs, usually rope_frequencies(R)
///   positions     integers in [0, positions) need no sine and no power
/// Errors: gamma or scale_base not positive and finite; center not finite; those of RotaryTable.
template <RealScalar S>
XposTables<S> xpos_tables(const RotaryFrequencies& frequencies, RopeLayout layout,
                          const XposOptions& options = {}, Index positions = 65536) {
  const auto require_positive = [](const char* name, double value) {
    detail::require(value > 0 && std::isfinite(value), name, " (", value,
                    ") must be positive and finite");
  };
  require_positive("gamma", options.gamma);
  require_positive("scale_base", options.scale_base);
  detail::require(std::isfinite(options.center), "center (", options.center, ") must be finite");
  const auto table = [&](double scale_base) {
    detail::RotaryExtras extras{.zeta = Vector<double>(frequencies.pairs()),
                                .scale_base = scale_base,
                                .center = options.center};
    for (Index p = 0; p < frequencies.pairs(); ++p) {
      const double share =
          static_cast<double>(2 * p) / static_cast<double>(2 * frequencies.pairs());
      extras.zeta[p] = (share + options.gamma) / (1.0 + options.gamma);
    }
    return RotaryTable<S>(frequencies, layout, positions, std::move(extras));
  };
  return {table(options.scale_base), table(-options.scale_base)};
}

EIGENBLOCKS_NAMESPACE_END
