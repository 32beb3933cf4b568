// The attention layers of a hybrid of windows and full attention (hwfa.hpp), and the caches of all of them.
//
//   const HwfaPlan plan = hwfa_plan(24, 16);                                  // or hwfa2_plan, or layers of one's own
//   const auto layers = hwfa_layers<float>(plan, {.heads = 8, .kv_heads = 2, .head_dim = 64, .logn_length = 512});
//   mha_forward(layers[i], weights[i], x, y, saved[i]);                       // each is an Mha: all of mha.hpp
//   mha_backward(layers[i], weights[i], saved[i], x, dy, dx, dweights[i]);
//   HwfaState<float> state = hwfa_state(layers, capacity);
//   mha_step(layers[i], weights[i], state.layers[i], rows, out);              // i = 0 .. L-1, any number of rows
//   state.truncate(n);                                                        // all layers, or none on an error
//
//   span            window: causal over the last w tokens, in a ring        full: causal over all of them
//   position        rope | nope: none | rerope: min(i - j, rerope_window)
//   logn            scores times log n / log N, n the keys seen, N = options.logn_length; clipped at 1 or plain
//
// ReRoPE in a window that is not longer than its own is RoPE, and so it is computed.
//
// Memory of N tokens with f full layers of L, all windows w: 2 kv_heads head_dim (N f + (L-f) min(N, w)) scalars, which is
// HwfaMemory::tokens; what the caches hold beyond it is reported apart.  A ring's slots are w - 1 + chunk rounded up to 16:
// with chunk 1, w and head_dim multiples of 16 and the capacity filled, the bytes held are the formula's, at the price of
// prompts that are taken one token at a time.
//
// Errors (invalid_argument): those of Mha; a plan without layers; options that the plan decides (window_left, logn); a window < 1
// or with span full; rerope_window < 1 under ReRoPE, set without it, or shorter than the layer's window; rope_base 0 with
// a layer that has positions; logn_length 0 with a layer that has log n; layer numbers are given.
// Sources: kexue.fm 9603, 9731.
#pragma once

#include <eigenblocks/attention/hwfa.hpp>
#include <eigenblocks/attention/mha_rerope.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline void require_hwfa_layer(const HwfaLayer& layer, std::size_t at, const MhaOptions& options,
                               bool has_frequencies) {
  const bool windowed = layer.span == HwfaSpan::window;
  const bool relative = layer.position == HwfaPosition::rerope;
  require(windowed ? layer.window >= 1 : layer.window == 0, "layers[", at, "].window (",
          layer.window, ") must be ", windowed ? "at least 1" : "0: the layer is full");
  require(relative ? layer.rerope_window >= 1 : layer.rerope_window == 0, "layers[", at,
          "].rerope_window (", layer.rerope_window, ") must be ",
          relative ? "at least 1" : "0: the layer has no ReRoPE");
  require(!windowed || !relative || layer.window <= layer.rerope_window, "layers[", at,
          "].window (", layer.window, ") must be at most its rerope_window (", layer.rerope_window,
          "): a ring has no keys for longer ones");
  require(layer.position == HwfaPosition::nope || options.rope_base > 0 || has_frequencies,
          "rope_base (", options.rope_base, ") must be positive: layers[", at,
          "] has rotary positions");
  require(!layer.logn || options.logn_length != 0, "logn_length (0) must be at least 2: layers[",
          at, "] has log-n scaling");
}

}  // namespace detail

/// One layer per entry of the plan, input first.  options: what they have in common; logn_length is read where the plan asks
/// for log n, rope_base and frequencies where it asks for positions.
template <RealScalar S>
std::vector<Mha<S>> hwfa_layers(const HwfaPlan& plan, const MhaOptions& options,
                                const RotaryFrequencies* frequencies = nullptr,
                                Index positions = 4096) {
  detail::require(!plan.layers.empty(), "the plan has no layers");
  detail::require(options.window_left == -1, "window_left (", options.window_left,
                  ") must be -1: the plan has the windows");
  for (std::size_t i = 0; i < plan.layers.size(); ++i)
    detail::require_hwfa_layer(plan.layers[i], i, options, frequencies != nullptr);
  std::vector<Mha<S>> layers;
  layers.reserve(plan.layers.size());
  for (const HwfaLayer& layer : plan.layers) {
    MhaOptions o = options;
    o.window_left = layer.span == HwfaSpan::window ? layer.window - 1 : -1;
    o.logn = layer.logn_mode;
    if (!layer.logn) o.logn_length = 0;
    if (layer.position == HwfaPosition::nope) {
      o.rope_base = 0;
      layers.emplace_back(o);
    } else if (layer.position == HwfaPosition::rerope && layer.span == HwfaSpan::full) {
      layers.push_back(rerope_mha<S>(o, rerope(layer.rerope_window), frequencies, positions));
    } else {
      layers.emplace_back(o, frequencies, positions);
    }
  }
  return layers;
}

/// Bytes of the caches of a plan.
struct HwfaMemory {
  std::size_t tokens = 0;     ///< 2 kv_heads head_dim (N f + (L-f) min(N, w)) scalars
  std::size_t near_keys = 0;  ///< the second keys of ReRoPE layers, a ring of their window
  std::size_t room =
      0;  ///< not filled: capacity, rings' room for a chunk, rounding to 16 tokens and channels
  std::size_t total() const { return tokens + near_keys + room; }
};

/// The caches of all layers: a regular value, a copy is a snapshot.
template <RealScalar S>
struct HwfaState {
  std::vector<MhaState<S>> layers;

  /// Tokens that all layers have seen.
  Index size() const {
    Index least = layers.empty() ? 0 : layers.front().size();
    for (const MhaState<S>& layer : layers) least = std::min(least, layer.size());
    return least;
  }
  /// Forgets positions >= n in every layer.  std::out_of_range, with nothing changed, unless 0 <= n <= size() and all rings
  /// still hold the window before n, as they do for up to chunk (ReRoPE: 16) tokens less.
  void truncate(Index n) {
    if (n < 0 || n > size()) {
      detail::raise<std::out_of_range>("HwfaState: truncate(", n, ") is outside [0, ", size(), "]");
    }
    // Rings first that may refuse, those with the least to spare before the others; none is touched before a refusal.
    MhaState<S>* tightest = nullptr;
    for (MhaState<S>& layer : layers) {
      const KvCache<S>& c = layer.cache;
      if (layer.rerope) {
        if (tightest == nullptr || spare(layer) < spare(*tightest)) tightest = &layer;
      } else if (c.ring() && std::max<Index>(0, n - c.options().window) < c.first()) {
        layer.truncate(n);  // throws
      }
    }
    if (tightest != nullptr) tightest->truncate(n);
    for (MhaState<S>& layer : layers) layer.truncate(n);
  }
  /// Of a further token once the windows are full: the full layers alone.
  Index bytes_per_token() const {
    Index sum = 0;
    for (const MhaState<S>& layer : layers) {
      if (layer.rerope || !layer.cache.ring()) sum += layer.bytes_per_token();
    }
    return sum;
  }
  /// Bytes held in all: memory().total().
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const MhaState<S>& layer : layers) sum += layer.bytes();
    return sum;
  }
  HwfaMemory memory() const {
    HwfaMemory m;
    for (const MhaState<S>& layer : layers) {
      const Index kept = !layer.rerope && layer.cache.ring()
                             ? std::min(layer.size(), layer.cache.options().window + 1)
                             : layer.size();
      m.tokens += static_cast<std::size_t>(kept * layer.bytes_per_token());
      if (layer.rerope) m.near_keys += layer.rerope->near().bytes();
    }
    m.room = bytes() - m.tokens - m.near_keys;
    return m;
  }

 private:
  static Index spare(const MhaState<S>& layer) {
    return layer.rerope->near().slots() - layer.rerope->position().window;
  }
};

/// Empty caches for the layers of hwfa_layers.  capacity: tokens that full layers make room for at once; chunk: tokens that
/// windows take at once and can forget again.
template <RealScalar S>
HwfaState<S> hwfa_state(const std::vector<Mha<S>>& layers, Index capacity = 0,
                        Index first_position = 0, Index chunk = KvCacheOptions{}.chunk) {
  HwfaState<S> state;
  state.layers.reserve(layers.size());
  for (const Mha<S>& layer : layers)
    state.layers.push_back(mha_state(layer, capacity, first_position, chunk));
  return state;
}

EIGENBLOCKS_NAMESPACE_END
