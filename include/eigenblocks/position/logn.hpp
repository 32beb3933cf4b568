// log-n scaling: queries grow with the logarithm of what they look at, so that the entropy of the
// soft-max does not grow with the length.
//
//   scale_i = log(n_i + 1) / log(train_length)      plain: trained in
//   scale_i = max(1, the same)                      clipped: a patch for models trained without it
//
// n_i + 1 is the number of keys a causal query at position n_i sees.  The scale multiplies the query,
// before the rotation or after, which is the same; AttentionTensors::row_scale takes it as it is:
//
//   const Vector<float> rho = logn_scale<float>(0, tokens, 512);
//   attention_forward(q, k, v, out, shape, rule, {.row_scale = &rho});
//
// Backward: the gradient of the query is multiplied by the same scale; nothing flows into positions.
// Source: kexue.fm/archives/8823 and 9706, repository bojone/rerope.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/position/frequencies.hpp>

#include <algorithm>
#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class LognMode { clipped, plain };

/// The scale of `rows` queries.  Positions may be fractional.  A plain scale is 0 at position 0.
/// Errors: a list of positions whose size is not rows; rows negative; a position negative or not
/// finite; train_length below 2.
template <RealScalar S>
Vector<S> logn_scale(const RopePositions& positions, Index rows, Index train_length,
                     LognMode mode = LognMode::clipped) {
  detail::require(rows >= 0, "rows (", rows, ") must not be negative");
  detail::require(train_length >= 2, "train_length (", train_length, ") must be at least 2");
  detail::require_positions(positions, rows, "rows");
  for (Index i = 0; i < rows; ++i) {
    const double n = positions.real(i);
    detail::require(n >= 0 && std::isfinite(n), "positions[", i, "] (", n,
                    ") must be finite and not negative");
  }
  const double unit = std::log(static_cast<double>(train_length));
  Vector<S> scale(rows);
  for (Index i = 0; i < rows; ++i) {
    const double plain = std::log(positions.real(i) + 1.0) / unit;
    scale[i] = static_cast<S>(mode == LognMode::clipped ? std::max(1.0, plain) : plain);
  }
  return scale;
}

EIGENBLOCKS_NAMESPACE_END
