// Learning-rate schedules: the rate of step t = 0, 1, ... as a pure function; nothing to save.
//
// With p = (t - warmup) / max(1, total - warmup) and
//      q = (t - warmup - stable) / max(1, total - warmup - stable), both clamped to [0, 1],
//      c = (1 + cos(pi p)) / 2,   r = min_ratio:
//
//   kind          t < warmup              afterwards
//   constant      t / warmup              1
//   linear        t / warmup              1 - p
//   cosine        t / warmup              c
//   cosine_min    t / warmup              c (1 - r) + r
//   wsd           (t/warmup)(1 - r) + r   1 for `stable` steps, then (1 - q)(1 - r) + r
//
// all times `peak`.  These are the schedules of Hugging Face transformers
// (get_*_schedule_with_warmup; wsd = warmup-stable-decay, MiniCPM, arXiv 2404.06395), except that p
// and q stay at 1 once t passes `total`: there the plain cosine would rise again.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class ScheduleKind { constant, linear, cosine, cosine_min, wsd };

struct ScheduleOptions {
  ScheduleKind kind = ScheduleKind::cosine;
  double peak = 1e-3;    ///< the highest rate; finite, >= 0
  Index warmup = 0;      ///< steps of the rise; 0 starts at the peak
  Index total = 1;       ///< the step at which the decay ends
  Index stable = 0;      ///< wsd: steps at the peak between warmup and decay
  double min_ratio = 0;  ///< cosine_min, wsd: final rate / peak, in [0, 1]
};

/// Learning rate of step `step` >= 0.
/// Errors: invalid_argument for a negative count or step, a peak that is negative or not finite,
/// min_ratio outside [0, 1].
inline double lr_schedule(Index step, const ScheduleOptions& options) {
  detail::require(step >= 0, "lr_schedule: step (", step, ") must not be negative");
  detail::require(std::isfinite(options.peak) && options.peak >= 0, "lr_schedule: peak (",
                  options.peak, ") must be finite and not negative");
  detail::require(options.warmup >= 0 && options.total >= 0 && options.stable >= 0,
                  "lr_schedule: warmup (", options.warmup, "), total (", options.total,
                  ") and stable (", options.stable, ") must not be negative");
  detail::require(options.min_ratio >= 0 && options.min_ratio <= 1, "lr_schedule: min_ratio (",
                  options.min_ratio, ") must be in [0, 1]");

  const bool wsd = options.kind == ScheduleKind::wsd;
  const bool floored = wsd || options.kind == ScheduleKind::cosine_min;
  const double floor = floored ? options.min_ratio : 0.0;
  const auto above_floor = [floor](double ratio) { return ratio * (1.0 - floor) + floor; };

  if (step < options.warmup) {
    const double rise = static_cast<double>(step) / static_cast<double>(options.warmup);
    return options.peak * (wsd ? above_floor(rise) : rise);
  }
  const Index start = options.warmup + (wsd ? options.stable : 0);
  const double length = static_cast<double>(std::max<Index>(1, options.total - start));
  const double progress = std::clamp(static_cast<double>(step - start) / length, 0.0, 1.0);
  double ratio = 1.0;
  switch (options.kind) {
    case ScheduleKind::constant:
      break;
    case ScheduleKind::linear:
    case ScheduleKind::wsd:
      ratio = 1.0 - progress;
      break;
    case ScheduleKind::cosine:
    case ScheduleKind::cosine_min:
      ratio = 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
      break;
  }
  return options.peak * above_floor(ratio);
}

EIGENBLOCKS_NAMESPACE_END
