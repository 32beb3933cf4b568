// How far rotary frequencies carry: decay curves, the longest context of a base, the least base of a
// context.
//
//   f(m) = sum_p cos(m f_p)
//
// For queries of independent entries with variance s^2, a key that resembles the query scores on
// average 2 s^2 f(m) more than one that does not, m positions away.  A context of L wants f(m) >= 0
// for m = 0 .. L-1 (arXiv 2405.14591, kexue.fm/archives/10122).
//
//   rope_decay_curve    f, or the bound of RoFormer's decay
//   rope_max_context    the first m with f(m) < 0: contexts up to that length are sound
//   rope_min_base       the least base of a grid that is sound for L, the search of the post
//
// All take any frequencies, so YaRN and the others are judged alike; attention_factor is positive and
// changes no sign.  Pairs at rest count (cos 0 = 1): pass-through channels are frequencies 0, see
// proportional_frequencies.
//
// Sound bases come in narrow intervals and are not monotone: bisection goes wrong, and the least base
// depends on the grid.  From 5e5 positions on compare results of equal grids only.
// Everything is in double: in float an angle at m = 1e6 is off by 0.06 rad.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/position/frequencies.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <optional>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class RopeDecay {
  sum,  ///< f(m)
  abel  ///< (1/P) sum_{j=1..P} |sum_{p<j} exp(i m f_p)|, P pairs; arXiv 2104.09864 section 3.4.3
};

namespace detail {

inline double rope_decay(const RotaryFrequencies& frequencies, Index m) {
  double sum = 0;
  for (const double f : frequencies.inv_freq) {
    sum += rotary_cos_sin(static_cast<double>(m), f, 1.0).first;
  }
  return sum;
}

inline double rope_abel(const RotaryFrequencies& frequencies, Index m) {
  double re = 0, im = 0, sum = 0;
  for (const double f : frequencies.inv_freq) {
    const auto [c, s] = rotary_cos_sin(static_cast<double>(m), f, 1.0);
    re += c;
    im += s;
    sum += std::sqrt(re * re + im * im);
  }
  return sum / static_cast<double>(frequencies.pairs());
}

/// The first m of begin, begin + step, ... before end (step 1 or -1) with f(m) < 0.
///
/// Pairs turn by recurrence, two products for each, and start afresh every 1024 steps, when their
/// error is at most 1024 units in the last place.  A sum within that of 0 is formed once more by
/// rope_decay, which alone decides about signs.
inline std::optional<Index> find_negative(const RotaryFrequencies& frequencies, Index begin,
                                          Index end, Index step) {
  using Array = Eigen::ArrayXd;
  constexpr Index kFresh = 1024;
  const Index pairs = frequencies.pairs();
  const double doubt = 1e-11 * static_cast<double>(pairs);
  Array c(pairs), s(pairs), next(pairs), turn_c(pairs), turn_s(pairs);
  const auto rows_at = [&](Index m, Array& cos, Array& sin) {
    for (Index p = 0; p < pairs; ++p) {
      const auto [x, y] = rotary_cos_sin(static_cast<double>(m), frequencies.inv_freq[p], 1.0);
      cos[p] = x;
      sin[p] = y;
    }
  };
  rows_at(step, turn_c, turn_s);
  for (Index m = begin, age = 0; m != end; m += step, ++age) {
    if (age % kFresh == 0) {
      rows_at(m, c, s);
    } else {
      next = c * turn_c - s * turn_s;
      s = s * turn_c + c * turn_s;
      c.swap(next);
    }
    if (c.sum() < doubt && rope_decay(frequencies, m) < 0) return m;
  }
  return std::nullopt;
}

/// Tells candidates of a search apart.  One that fails mostly does so where the last one did, or a
/// few positions from there; else at the far end more often than at the near one.
class ContextCheck {
 public:
  explicit ContextCheck(Index length) : length_(length) {}

  /// f(m) >= 0 for m = 0 .. length-1.
  bool operator()(const RotaryFrequencies& frequencies) {
    constexpr Index kNear = 8;
    for (Index i = 0; i <= 2 * kNear && failed_ >= 0; ++i) {  // failed_, +1, -1, +2, -2, ...
      const Index m = failed_ + (i % 2 == 1 ? (i + 1) / 2 : -(i / 2));
      if (m >= 0 && m < length_ && rope_decay(frequencies, m) < 0) {
        failed_ = m;
        return false;
      }
    }
    const std::optional<Index> negative = find_negative(frequencies, length_ - 1, -1, -1);
    if (negative) failed_ = *negative;
    return !negative;
  }

 private:
  Index length_;
  Index failed_ = -1;  // where the last failure was; -1 before the first
};

}  // namespace detail

/// The curve at m = 0 .. length-1.
/// Errors: length < 1; bad frequencies.
inline Vector<double> rope_decay_curve(const RotaryFrequencies& frequencies, Index length,
                                       RopeDecay kind = RopeDecay::sum) {
  detail::require_frequencies(frequencies);
  detail::require(length >= 1, "length (", length, ") must be at least 1");
  Vector<double> curve(length);
  for (Index m = 0; m < length; ++m) {
    curve[m] = kind == RopeDecay::sum ? detail::rope_decay(frequencies, m)
                                      : detail::rope_abel(frequencies, m);
  }
  return curve;
}

/// The least m < max_length with f(m) < 0: the longest sound context.  Nothing if there is none, all
/// of max_length is sound.  The paper's method.
/// Errors: max_length < 1; bad frequencies.
inline std::optional<Index> rope_max_context(const RotaryFrequencies& frequencies,
                                             Index max_length) {
  detail::require_frequencies(frequencies);
  detail::require(max_length >= 1, "max_length (", max_length, ") must be at least 1");
  return detail::find_negative(frequencies, 0, max_length, 1);
}

struct RopeMinBaseOptions {
  int levels = 5;                              ///< 1 .. 6
  std::optional<double> start = std::nullopt;  ///< largest base tried; by default 1000 length
};

/// The search of kexue.fm/archives/10122.  B = start; at level k = 1 .. levels the least good base
/// B j/10^k, j = 1 .. 10^k, becomes B.  Good: ladder(b) gives frequencies with f(m) >= 0 for
/// m < length.  Nothing if the first level has no good base: start is too small, or the ladder does
/// not carry so far.
///
///   rope_min_base(4096, [](double b) { return yarn_frequencies(128, b, options); });
///
/// Errors: length < 1; levels not in 1 .. 6; start not positive and finite; those of the ladder.
template <class Ladder>
  requires std::regular_invocable<const Ladder&, double> std::optional<double> rope_min_base(
      Index length, const Ladder& ladder, const RopeMinBaseOptions& options = {}) {
    detail::require(length >= 1, "length (", length, ") must be at least 1");
    detail::require(options.levels >= 1 && options.levels <= 6, "levels (", options.levels,
                    ") must be in 1 .. 6");
    double best = options.start.value_or(1000.0 * static_cast<double>(length));
    detail::require(best > 0 && std::isfinite(best), "start (", best,
                    ") must be positive and finite");
    detail::ContextCheck is_good(length);
    Index parts = 1;
    for (int level = 1; level <= options.levels; ++level) {
      parts *= 10;
      const double whole = best;
      bool found = false;
      for (Index j = 1; j <= parts && !found; ++j) {
        const double base = whole * (static_cast<double>(j) / static_cast<double>(parts));
        const RotaryFrequencies frequencies = ladder(base);
        detail::require_frequencies(frequencies);
        found = is_good(frequencies);
        if (found) best = base;
      }
      // Later levels end at the base of the level before, which is good.
      if (!found) return std::nullopt;
    }
    return best;
  }

/// The same for the plain ladder of `rotary_dim` channels.
/// Errors: also rotary_dim odd or below 2.
inline std::optional<double> rope_min_base(Index length, Index rotary_dim,
                                           const RopeMinBaseOptions& options = {}) {
  return rope_min_base(
      length, [rotary_dim](double base) { return rope_frequencies(rotary_dim, base); }, options);
}

EIGENBLOCKS_NAMESPACE_END
