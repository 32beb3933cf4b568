// HWFA, hybrid window and full attention: which layer attends how.
//
//   HWFA    layers 0 .. L-2: window of w tokens (itself included) with RoPE; layer L-1: full, no positions, log-n factor
//   HWFA2   full layers with RoPE at i L / (f+1), i = 1..f (L/2 for one), windows with RoPE elsewhere; at inference the full
//           layers use ReRoPE and log n
//   window rule       w = floor((alpha N - 1) / (L - 1)) + 1: the receptive field (w-1)(L-1)+1 is at most alpha N
//   cache             2 kv_heads head_dim (N f + (L-f) min(N, w)) scalars for N tokens
//
// A layer's mask is causal() & window_left(layer.window - 1) where it is windowed.  The layers themselves: hwfa_layer.hpp.
// Errors (invalid_argument): layers < 2, window < 1, train_length < 1, alpha outside (0, 1] or too small for one token,
// full_layers outside [1, layers - 1], tokens negative, kv_heads or head_dim < 1.
// Sources: kexue.fm 9603 (HWFA), 9731 (HWFA2).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/position/logn.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

/// What a layer sees, how it knows positions, and whether it is trained or extrapolates.
enum class HwfaSpan { full, window };
enum class HwfaPosition { rope, nope, rerope };
enum class HwfaPhase { training, inference };

/// How one layer attends.  logn: its scores are multiplied by the log_n rule (scale.hpp), which logn_mode says.
struct HwfaLayer {
  HwfaSpan span = HwfaSpan::window;
  HwfaPosition position = HwfaPosition::rope;
  bool logn = false;
  Index window = 0;                      ///< tokens seen, the token itself included; 0 for full
  Index rerope_window = 0;               ///< of ReRoPE; 0 otherwise
  LognMode logn_mode = LognMode::plain;  ///< clipped where the model was trained without
};

/// One entry per layer, input first.
struct HwfaPlan {
  std::vector<HwfaLayer> layers;

  Index full_layers() const {
    return static_cast<Index>(
        std::count_if(layers.begin(), layers.end(),
                      [](const HwfaLayer& layer) { return layer.span == HwfaSpan::full; }));
  }
  /// How many inputs one token depends on through the windowed layers alone.
  Index receptive_field() const {
    Index field = 1;
    for (const HwfaLayer& layer : layers) {
      if (layer.span == HwfaSpan::window) field += layer.window - 1;
    }
    return field;
  }
  /// Scalars of the caches of all layers after `tokens` tokens.
  Index cache_scalars(Index tokens, Index kv_heads, Index head_dim) const {
    detail::require(tokens >= 0, "tokens (", tokens, ") must not be negative");
    detail::require(kv_heads >= 1, "kv_heads (", kv_heads, ") must be at least 1");
    detail::require(head_dim >= 1, "head_dim (", head_dim, ") must be at least 1");
    Index rows = 0;
    for (const HwfaLayer& layer : layers) {
      rows += layer.span == HwfaSpan::full ? tokens : std::min(tokens, layer.window);
    }
    return 2 * kv_heads * head_dim * rows;
  }
};

/// (window - 1)(layers - 1) + 1, of the windowed layers of HWFA.
inline Index hwfa_receptive_field(Index layers, Index window) {
  detail::require(layers >= 2, "layers (", layers, ") must be at least 2");
  detail::require(window >= 1, "window (", window, ") must be at least 1");
  return (window - 1) * (layers - 1) + 1;
}

/// The largest window whose receptive field stays within alpha * train_length.
inline Index hwfa_window(Index layers, Index train_length, double alpha = 0.75) {
  detail::require(layers >= 2, "layers (", layers, ") must be at least 2");
  detail::require(train_length >= 1, "train_length (", train_length, ") must be at least 1");
  detail::require(alpha > 0 && alpha <= 1, "alpha (", alpha, ") must be in (0, 1]");
  const double room = alpha * static_cast<double>(train_length) - 1;
  detail::require(room >= -1e-9, "alpha (", alpha, ") times train_length (", train_length,
                  ") must be at least 1");
  // A quotient that is an integer on paper must not round down; 1e-12 is the rule of the fixtures, and enough for alpha N up to
  // some thousand (beyond, an alpha like 0.57 may give one token less).
  return static_cast<Index>(
             std::floor(std::max(room, 0.0) / static_cast<double>(layers - 1) + 1e-12)) +
         1;
}

/// HWFA: layers - 1 windows of `window` tokens with RoPE, then a full layer without positions with the log-n factor.
inline HwfaPlan hwfa_plan(Index layers, Index window) {
  hwfa_receptive_field(layers, window);  // for its checks
  HwfaPlan plan;
  plan.layers.assign(static_cast<std::size_t>(layers), HwfaLayer{.window = window});
  plan.layers.back() = {
      .span = HwfaSpan::full, .position = HwfaPosition::nope, .logn = true, .window = 0};
  return plan;
}

/// Defaults are the post's, but for full_layers: its best model has 2.
struct Hwfa2Options {
  Index window = 64;          ///< tokens seen, the token itself included
  Index full_layers = 1;      ///< f
  Index rerope_window = 256;  ///< of the full layers at inference
};

/// HWFA2: full layers at i layers / (f + 1), i = 1..f, rounded down, windows elsewhere; all with RoPE in training.  At
/// inference the full layers use ReRoPE and log n, clipped: nothing changes within the trained length but the positions.
inline HwfaPlan hwfa2_plan(Index layers, const Hwfa2Options& options, HwfaPhase phase) {
  hwfa_receptive_field(layers, options.window);
  detail::require(options.full_layers >= 1 && options.full_layers < layers, "full_layers (",
                  options.full_layers, ") must be in [1, layers - 1], layers is ", layers);
  detail::require(options.rerope_window >= 1, "rerope_window (", options.rerope_window,
                  ") must be at least 1");
  const bool inference = phase == HwfaPhase::inference;
  HwfaPlan plan;
  plan.layers.assign(static_cast<std::size_t>(layers), HwfaLayer{.window = options.window});
  for (Index i = 1; i <= options.full_layers; ++i) {
    plan.layers[static_cast<std::size_t>(i * layers / (options.full_layers + 1))] = {
        .span = HwfaSpan::full,
        .position = inference ? HwfaPosition::rerope : HwfaPosition::rope,
        .logn = inference,
        .window = 0,
        .rerope_window = inference ? options.rerope_window : 0,
        .logn_mode = inference ? LognMode::clipped : LognMode::plain};
  }
  return plan;
}

EIGENBLOCKS_NAMESPACE_END
