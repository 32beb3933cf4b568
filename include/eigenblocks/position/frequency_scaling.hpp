// Rotary frequencies for contexts longer than the trained one.
//
// Every builder reads  x_frequencies(rotary_dim R, base b, options)  and returns the R/2 frequencies
// with their attention and soft-max factors (1 unless said).  f_p = b^(-2p/R) is the plain ladder of
// rope_frequencies, k = factor = wanted context / trained context, L0 = original_max_position:
//
//   linear        f/k                                       position interpolation, arXiv 2306.15595
//   ntk_aware     (b k^(R/(R-2)))^(-2p/R)                   bloc97: f_0 stays, the last becomes f/k
//   ntk_radix     (b k)^(-2p/R)                             kexue.fm/archives/9675 ("NTK-RoPE-old")
//   ntk_fixed     (b k)^(-2p/R) / k^(2/R)                   kexue.fm/archives/9706
//   ntk_mixed     f exp(-ln k ((p+1)/(R/2))^e)              the same post; e = 1 ntk_fixed, 0 linear
//   dynamic_ntk   base b (k L/L0 - (k-1))^(R/(R-2))         transformers; L = max(seq_len, L0)
//   ntk_by_parts  f/k to f by rotations within L0           as printed in arXiv 2309.00071
//   yarn          f to f/k by the index of the pair         the official code of that paper
//   longrope      f / (seq_len > L0 ? long : short)_p       arXiv 2402.13753; the factors are searched
//   llama3        f/k to f by rotations within L0           Llama 3.1
//   proportional  b^(-2p/D)/k for the first pairs, then 0   transformers: D is the whole head
//
// k = 1 gives f to the bit (longrope: factors 1).  Results lie between f/k and f; those of dynamic_ntk,
// longrope and the resting pairs of proportional go their own way.
//
//   const RotaryFrequencies f = yarn_frequencies(128, 1e4, {.factor = 16, .original_max_position = 4096});
//
// dynamic_ntk and longrope depend on the current length.  Keys that were rotated and cached under
// one length do not fit queries of another (transformers lets them differ): fix seq_len for a whole
// decode, or keep the keys unrotated.
//
// Errors: those of rope_frequencies; factor not finite or below 1 (linear: not positive); R = 2 where
// R - 2 divides; original_max_position below 1, which is also the default where the method has none;
// and what the options say.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/position/frequencies.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <optional>

EIGENBLOCKS_NAMESPACE_BEGIN

/// linear, ntk_aware, ntk_radix, ntk_fixed: nothing but k.
struct RopeScalingOptions {
  double factor = 1.0;
};

struct NtkMixedOptions {
  double factor = 1.0;
  double exponent = 0.625;  ///< e in [0, 1]; the rerope repository has 0.75
};

struct DynamicNtkOptions {
  double factor = 1.0;
  Index original_max_position = 0;
  Index seq_len = 0;  ///< current length; up to original_max_position the plain ladder
};

/// Pairs that turn more than beta_fast times within L0 stay, below beta_slow they become f/k.
struct NtkByPartsOptions {
  double factor = 1.0;
  Index original_max_position = 0;
  double beta_fast = 32.0;  ///< not below beta_slow
  double beta_slow = 1.0;   ///< positive
};

struct YarnOptions {
  double factor = 1.0;
  Index original_max_position = 0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  bool truncate = true;                                   ///< ends of the ramp at whole pairs
  double mscale = 0.0;                                    ///< DeepSeek; not negative, 0 = not given
  double mscale_all_dim = 0.0;                            ///< likewise
  std::optional<double> attention_factor = std::nullopt;  ///< in place of the formula; positive
};

struct LongRopeOptions {
  double factor = 1.0;  ///< enters the attention factor only
  Index original_max_position = 0;
  Index seq_len = 0;
  Vector<double> short_factor{};  ///< R/2 each, positive
  Vector<double> long_factor{};
  std::optional<double> attention_factor = std::nullopt;
};

struct Llama3Options {
  double factor = 8.0;
  Index original_max_position = 8192;
  double low_freq_factor =
      1.0;  ///< rotations within L0 from which a pair begins to keep its f; >= 0
  double high_freq_factor = 4.0;  ///< and from which it keeps all of it; above low_freq_factor
};

struct ProportionalOptions {
  Index rotary_dim = 0;  ///< channels that rotate, even, 2 .. head size
  double factor = 1.0;
};

namespace detail {

inline void require_scaling(double factor) {
  require(factor >= 1 && std::isfinite(factor), "factor (", factor,
          ") must be finite and at least 1");
}

inline void require_trained_length(Index original_max_position, Index least = 1) {
  require(original_max_position >= least, "original_max_position (", original_max_position,
          ") must be at least ", least);
}

inline void require_seq_len(Index seq_len) {
  require(seq_len >= 0, "seq_len (", seq_len, ") must be at least 0");
}

inline void require_betas(double beta_fast, double beta_slow) {
  require(beta_slow > 0 && beta_fast >= beta_slow && std::isfinite(beta_fast), "beta_fast (",
          beta_fast, ") must be finite and not below beta_slow (", beta_slow,
          "), which must be positive");
}

/// `given` overrides the formula, which is then not asked.
template <class Formula>
double attention_factor_or(const std::optional<double>& given, const Formula& formula) {
  if (!given) return formula();
  require(*given > 0 && std::isfinite(*given), "attention_factor (", *given,
          ") must be positive and finite");
  return *given;
}

/// The ladder of base b k^(R/(R-2)): the last of its frequencies is the plain one divided by k.
inline RotaryFrequencies ntk_ladder(Index rotary_dim, double base, double factor) {
  rope_frequencies(rotary_dim, base);  // its errors come first, with the base the caller gave
  require(rotary_dim > 2, "rotary_dim (", rotary_dim,
          ") must be above 2: the base is scaled by factor^(R/(R-2))");
  const double r = static_cast<double>(rotary_dim);
  return rope_frequencies(rotary_dim, base * std::pow(factor, r / (r - 2)));
}

/// f/k for pairs with at most `few` rotations within `length`, f from `many` on, linear between.
inline RotaryFrequencies blend_by_rotations(RotaryFrequencies plain, double factor, Index length,
                                            double few, double many) {
  for (double& f : plain.inv_freq) {
    const double rotations = static_cast<double>(length) * f / (2 * std::numbers::pi);
    const double kept = rotations >= many  ? 1.0
                        : rotations <= few ? 0.0
                                           : (rotations - few) / (many - few);
    f = std::lerp(f / factor, f, kept);
  }
  return plain;
}

/// 0.1 m ln k + 1, the growth of YaRN's logits (its sqrt(1/t) has m = 1).
inline double yarn_mscale(double factor, double mscale) {
  return 0.1 * mscale * std::log(factor) + 1.0;
}

}  // namespace detail

/// f/k: position n turns as n/k did.  The only one that takes 0 < k < 1 (positions spread out).
inline RotaryFrequencies linear_frequencies(Index rotary_dim, double base,
                                            const RopeScalingOptions& options) {
  RotaryFrequencies out = rope_frequencies(rotary_dim, base);
  detail::require(options.factor > 0 && std::isfinite(options.factor), "factor (", options.factor,
                  ") must be positive and finite");
  out.inv_freq /= options.factor;
  return out;
}

/// (b k^(R/(R-2)))^(-2p/R).
inline RotaryFrequencies ntk_aware_frequencies(Index rotary_dim, double base,
                                               const RopeScalingOptions& options) {
  detail::require_scaling(options.factor);
  return detail::ntk_ladder(rotary_dim, base, options.factor);
}

/// (b k)^(-2p/R): seen as digits of n to the base b^(2/R), the radix grows by k^(2/R).
inline RotaryFrequencies ntk_radix_frequencies(Index rotary_dim, double base,
                                               const RopeScalingOptions& options) {
  detail::require_scaling(options.factor);
  rope_frequencies(rotary_dim, base);
  return rope_frequencies(rotary_dim, base * options.factor);
}

/// (b k)^(-2p/R) / k^(2/R): the modulus 2 pi of the digits grows like the radix.
inline RotaryFrequencies ntk_fixed_frequencies(Index rotary_dim, double base,
                                               const RopeScalingOptions& options) {
  RotaryFrequencies out = ntk_radix_frequencies(rotary_dim, base, options);
  out.inv_freq /= std::pow(options.factor, 2.0 / static_cast<double>(rotary_dim));
  return out;
}

/// f exp(-ln k ((p+1)/(R/2))^e): a mixed radix that stretches low digits less.
/// Errors: exponent not in [0, 1].
inline RotaryFrequencies ntk_mixed_frequencies(Index rotary_dim, double base,
                                               const NtkMixedOptions& options) {
  RotaryFrequencies out = rope_frequencies(rotary_dim, base);
  detail::require_scaling(options.factor);
  detail::require(options.exponent >= 0 && options.exponent <= 1, "exponent (", options.exponent,
                  ") must be in [0, 1]");
  const double log_factor = std::log(options.factor), pairs = static_cast<double>(out.pairs());
  for (Index p = 0; p < out.pairs(); ++p) {
    out.inv_freq[p] *=
        std::exp(-log_factor * std::pow(static_cast<double>(p + 1) / pairs, options.exponent));
  }
  return out;
}

/// ntk_aware for the length that is there: k L/L0 - (k-1) in place of k, L = max(seq_len, L0).
/// Errors: seq_len negative.
inline RotaryFrequencies dynamic_ntk_frequencies(Index rotary_dim, double base,
                                                 const DynamicNtkOptions& options) {
  detail::require_scaling(options.factor);
  detail::require_trained_length(options.original_max_position);
  detail::require_seq_len(options.seq_len);
  const double k = options.factor, trained = static_cast<double>(options.original_max_position);
  const bool within = options.seq_len <= options.original_max_position;
  const double growth = within ? 1.0 : k * static_cast<double>(options.seq_len) / trained - (k - 1);
  return detail::ntk_ladder(rotary_dim, base, growth);
}

/// With r = L0 f / 2 pi rotations and g = clamp((r - beta_slow)/(beta_fast - beta_slow), 0, 1):
/// (1-g) f/k + g f.  Not what the code of the paper does, that is yarn: up to a factor 3 apart.
/// Errors: beta_fast < beta_slow; beta_slow not positive.
inline RotaryFrequencies ntk_by_parts_frequencies(Index rotary_dim, double base,
                                                  const NtkByPartsOptions& options) {
  const RotaryFrequencies plain = rope_frequencies(rotary_dim, base);
  detail::require_scaling(options.factor);
  detail::require_trained_length(options.original_max_position);
  detail::require_betas(options.beta_fast, options.beta_slow);
  return detail::blend_by_rotations(plain, options.factor, options.original_max_position,
                                    options.beta_slow, options.beta_fast);
}

/// c(rot) = R ln(L0/(2 pi rot)) / (2 ln b) is the (real) index of the pair that turns rot times.
/// low = max(floor c(beta_fast), 0), high = min(ceil c(beta_slow), R-1), 0.001 more if equal;
/// ramp_p = clamp((p - low)/(high - low), 0, 1);  f' = ramp f/k + (1 - ramp) f.
/// Taken over from the code: the bound R-1 where R/2-1 pairs end, and that the ramp runs backwards
/// for an L0 so small (below 2 pi) or so large that high < low.
/// attention_factor: the given one, or (0.1 mscale ln k + 1)/(0.1 mscale_all_dim ln k + 1) if neither
/// is 0, or 0.1 ln k + 1.  softmax_factor: (0.1 mscale_all_dim ln k + 1)^2, DeepSeek-V2 and V3.
/// Errors: base not above 1; beta_fast < beta_slow; beta_slow not positive; mscale < 0.
inline RotaryFrequencies yarn_frequencies(Index rotary_dim, double base,
                                          const YarnOptions& options) {
  RotaryFrequencies out = rope_frequencies(rotary_dim, base);
  detail::require(base > 1, "base (", base, ") must be above 1: the ramp divides by its logarithm");
  detail::require_scaling(options.factor);
  detail::require_trained_length(options.original_max_position);
  detail::require_betas(options.beta_fast, options.beta_slow);
  detail::require(options.mscale >= 0 && std::isfinite(options.mscale), "mscale (", options.mscale,
                  ") must be finite and at least 0");
  detail::require(options.mscale_all_dim >= 0 && std::isfinite(options.mscale_all_dim),
                  "mscale_all_dim (", options.mscale_all_dim, ") must be finite and at least 0");

  const double channels = static_cast<double>(rotary_dim), k = options.factor;
  const auto pair_of = [&](double rotations) {
    const double positions = static_cast<double>(options.original_max_position) / rotations;
    return channels * std::log(positions / (2 * std::numbers::pi)) / (2 * std::log(base));
  };
  const double first = pair_of(options.beta_fast), last = pair_of(options.beta_slow);
  const double low = std::max(options.truncate ? std::floor(first) : first, 0.0);
  double high = std::min(options.truncate ? std::ceil(last) : last, channels - 1);
  if (high == low) high += 0.001;
  for (Index p = 0; p < out.pairs(); ++p) {
    const double ramp = std::clamp((static_cast<double>(p) - low) / (high - low), 0.0, 1.0);
    out.inv_freq[p] = std::lerp(out.inv_freq[p], out.inv_freq[p] / k, ramp);
  }

  const double all_dim = detail::yarn_mscale(k, options.mscale_all_dim);
  out.attention_factor = detail::attention_factor_or(options.attention_factor, [&] {
    const bool both = options.mscale > 0 && options.mscale_all_dim > 0;
    return both ? detail::yarn_mscale(k, options.mscale) / all_dim : detail::yarn_mscale(k, 1.0);
  });
  out.softmax_factor = all_dim * all_dim;
  return out;
}

/// f_p divided by long_factor_p beyond the trained length, by short_factor_p up to it.
/// attention_factor: the given one, or sqrt(1 + ln k / ln L0), 1 for k = 1.
/// Errors: short_factor or long_factor not R/2 entries, or one of them not positive and finite;
/// seq_len negative; L0 < 2 where ln L0 divides.
inline RotaryFrequencies longrope_frequencies(Index rotary_dim, double base,
                                              const LongRopeOptions& options) {
  RotaryFrequencies out = rope_frequencies(rotary_dim, base);
  detail::require_scaling(options.factor);
  detail::require_trained_length(options.original_max_position);
  detail::require_seq_len(options.seq_len);
  const auto require_factors = [&](const char* name, const Vector<double>& factors) {
    detail::require_size(name, factors.size(), out.pairs(), "rotary_dim / 2");
    for (Index p = 0; p < factors.size(); ++p) {
      detail::require(factors[p] > 0 && std::isfinite(factors[p]), name, "[", p, "] (", factors[p],
                      ") must be positive and finite");
    }
  };
  require_factors("short_factor", options.short_factor);
  require_factors("long_factor", options.long_factor);
  out.attention_factor = detail::attention_factor_or(options.attention_factor, [&] {
    if (options.factor == 1) return 1.0;
    detail::require_trained_length(options.original_max_position, 2);
    const double trained = static_cast<double>(options.original_max_position);
    return std::sqrt(1.0 + std::log(options.factor) / std::log(trained));
  });
  const bool beyond = options.seq_len > options.original_max_position;
  out.inv_freq.array() /= (beyond ? options.long_factor : options.short_factor).array();
  return out;
}

/// With wavelength w = 2 pi / f: f where w < L0/high, f/k where w > L0/low, between the two linear in
/// L0/w.  The same blend as ntk_by_parts.
/// Errors: low_freq_factor negative, or not below high_freq_factor.
inline RotaryFrequencies llama3_frequencies(Index rotary_dim, double base,
                                            const Llama3Options& options = {}) {
  const RotaryFrequencies plain = rope_frequencies(rotary_dim, base);
  detail::require_scaling(options.factor);
  detail::require_trained_length(options.original_max_position);
  const double low = options.low_freq_factor, high = options.high_freq_factor;
  detail::require(low >= 0 && low < high && std::isfinite(high), "low_freq_factor (", low,
                  ") must be at least 0 and below high_freq_factor (", high, ")");
  return detail::blend_by_rotations(plain, options.factor, options.original_max_position, low,
                                    high);
}

/// Head size D in the place of rotary_dim: D/2 pairs, those from options.rotary_dim / 2 on at rest,
/// so that in the half layout channels p and p + D/2 turn.
/// Errors: options.rotary_dim odd, below 2 or above D.
inline RotaryFrequencies proportional_frequencies(Index head_dim, double base,
                                                  const ProportionalOptions& options) {
  RotaryFrequencies out = rope_frequencies(head_dim, base);
  detail::require_scaling(options.factor);
  detail::require(
      options.rotary_dim >= 2 && options.rotary_dim % 2 == 0 && options.rotary_dim <= head_dim,
      "options.rotary_dim (", options.rotary_dim,
      ") must be even, at least 2 and at most head_dim (", head_dim, ")");
  out.inv_freq /= options.factor;
  out.inv_freq.tail((head_dim - options.rotary_dim) / 2).setZero();
  return out;
}

/// Channels that rotate when a configuration gives a share of the head ("partial_rotary_factor"):
/// floor(head_dim share), as transformers counts.
/// Errors: share not in (0, 1]; an odd result or none.
inline Index partial_rotary_dim(Index head_dim, double share) {
  detail::require(share > 0 && share <= 1, "share (", share, ") must be in (0, 1]");
  const Index rotary_dim = static_cast<Index>(static_cast<double>(head_dim) * share);
  detail::require(rotary_dim >= 2 && rotary_dim % 2 == 0, "share (", share, ") of head_dim (",
                  head_dim, ") gives ", rotary_dim, " channels, which must be even and at least 2");
  return rotary_dim;
}

EIGENBLOCKS_NAMESPACE_END
