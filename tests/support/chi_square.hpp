// Pearson's chi-square test of draws against a known law.
//
//   CHECK(chi_square_p(observed, probability) > 1e-4);
//
// Cells with an expectation below 8 are merged into one.  A draw where the law has probability 0 gives p = 0.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace stats {

/// Q(a, x): the upper regularised incomplete gamma function, by series or continued fraction.
inline double gamma_q(double a, double x) {
  if (x <= 0) return 1;
  const double front = std::exp(a * std::log(x) - x - std::lgamma(a));
  if (x < a + 1) {
    double term = 1 / a, sum = term;
    for (int n = 1; n < 10000 && term > 1e-16 * sum; ++n) sum += term *= x / (a + n);
    return 1 - front * sum;
  }
  double b = x + 1 - a, c = 1e300, d = 1 / b, h = d;
  for (int n = 1; n < 10000; ++n) {
    const double step = -n * (n - a);
    b += 2;
    d = 1 / (step * d + b);
    c = b + step / c;
    h *= d * c;
    if (std::abs(d * c - 1) < 1e-15) break;
  }
  return front * h;
}

inline double chi_square_p(const std::vector<double>& observed,
                           const std::vector<double>& probability) {
  double draws = 0, statistic = 0, rest_seen = 0, rest_expected = 0;
  int cells = 0;
  for (const double count : observed) draws += count;
  const auto add = [&](double seen, double expected) {
    statistic += (seen - expected) * (seen - expected) / expected;
    ++cells;
  };
  for (std::size_t i = 0; i < observed.size(); ++i) {
    const double expected = draws * probability[i];
    if (expected <= 0 && observed[i] > 0) return 0;
    if (expected >= 8) {
      add(observed[i], expected);
    } else {
      rest_seen += observed[i];
      rest_expected += expected;
    }
  }
  if (rest_expected > 0.5)
    add(rest_seen, rest_expected);
  else if (rest_seen > 12)
    return 0;
  return cells < 2 ? 1 : gamma_q((cells - 1) / 2.0, statistic / 2);
}

}  // namespace stats
