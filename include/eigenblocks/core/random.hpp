// Random numbers that are the same on every platform, compiler and Eigen version.
//
// Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
// block c of stream s under key k is a pure function of (k, s, c), so any position can be reached directly
// and independent streams need no seeding tricks.
//
//   Random random(seed);                     // or Random(seed, stream)
//   double u = random.uniform();             // [0, 1), 53 bits
//   double z = random.normal();              // standard normal by the inverse distribution function
//   Index  i = random.below(n);              // 0 <= i < n, unbiased
//   fill_normal(random, weights, 0.02);      // row by row
//
// normal() evaluates Wichura's AS241 (relative error about 1e-16) with explicit fused multiply-adds and its own
// logarithm: no libm function and no contraction that a compiler may or may not do, hence equal bits everywhere.
// State is a regular value: copy it to take a snapshot, compare it, skip ahead with set_position().
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Ten rounds of Philox4x32.
constexpr std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                  std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

template <std::size_t N>
double fma_horner(const double (&coefficients)[N], double x) {
  double y = coefficients[N - 1];
  for (std::size_t i = N - 1; i-- > 0;) y = std::fma(y, x, coefficients[i]);
  return y;
}

/// log(x) for 0 < x < 1, relative error below 1e-15, the same bits everywhere: log m by the series of
/// 2 atanh((m - 1) / (m + 1)) on m in [sqrt(1/2), sqrt(2)), plus the exponent times log 2.
inline double portable_log(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752440) {
    m += m;
    --exponent;
  }
  constexpr double kOdd[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9, 1.0 / 11,
                             1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  const double t = (m - 1.0) / (m + 1.0);
  const double square = t * t;
  const double series = 2.0 * t * fma_horner(kOdd, square);
  return std::fma(static_cast<double>(exponent), 0.69314718055994530942, series);
}

/// Inverse of the standard normal distribution function for 0 < p < 1 (algorithm AS241, PPND16).
inline double normal_quantile(double p) {
  constexpr double a[] = {3.3871328727963666080e0,  1.3314166789178437745e+2,
                          1.9715909503065514427e+3, 1.3731693765509461125e+4,
                          4.5921953931549871457e+4, 6.7265770927008700853e+4,
                          3.3430575583588128105e+4, 2.5090809287301226727e+3};
  constexpr double b[] = {1.0,
                          4.2313330701600911252e+1,
                          6.8718700749205790830e+2,
                          5.3941960214247511077e+3,
                          2.1213794301586595867e+4,
                          3.9307895800092710610e+4,
                          2.8729085735721942674e+4,
                          5.2264952788528545610e+3};
  constexpr double c[] = {1.42343711074968357734e0,  4.63033784615654529590e0,
                          5.76949722146069140550e0,  3.64784832476320460504e0,
                          1.27045825245236838258e0,  2.41780725177450611770e-1,
                          2.27238449892691845833e-2, 7.74545014278341407640e-4};
  constexpr double d[] = {1.0,
                          2.05319162663775882187e0,
                          1.67638483018380384940e0,
                          6.89767334985100004550e-1,
                          1.48103976427480074590e-1,
                          1.51986665636164571966e-2,
                          5.47593808499534494600e-4,
                          1.05075007164441684324e-9};
  constexpr double e[] = {6.65790464350110377720e0,  5.46378491116411436990e0,
                          1.78482653991729133580e0,  2.96560571828504891230e-1,
                          2.65321895265761230930e-2, 1.24266094738807843860e-3,
                          2.71155556874348757815e-5, 2.01033439929228813265e-7};
  constexpr double f[] = {1.0,
                          5.99832206555887937690e-1,
                          1.36929880922735805310e-1,
                          1.48753612908506148525e-2,
                          7.86869131145613259100e-4,
                          1.84631831751005468180e-5,
                          1.42151175831644588870e-7,
                          2.04426310338993978564e-15};
  const double q = p - 0.5;
  if (std::abs(q) <= 0.425) {
    const double r = std::fma(-q, q, 0.180625);
    return q * (fma_horner(a, r) / fma_horner(b, r));
  }
  const double r = std::sqrt(-portable_log(q < 0 ? p : 1.0 - p));
  const double tail = r <= 5.0 ? fma_horner(c, r - 1.6) / fma_horner(d, r - 1.6)
                               : fma_horner(e, r - 5.0) / fma_horner(f, r - 5.0);
  return q < 0 ? -tail : tail;
}

}  // namespace detail

/// Philox4x32-10 stream of 32-bit words with a position.
class Random {
 public:
  explicit constexpr Random(std::uint64_t seed = 0, std::uint64_t stream = 0)
      : seed_(seed), stream_(stream) {}

  std::uint32_t bits32() {
    const std::uint32_t word = block()[static_cast<std::size_t>(position_ % 4)];
    ++position_;
    return word;
  }
  std::uint64_t bits64() {
    const std::uint64_t low = bits32();
    return low | std::uint64_t{bits32()} << 32;
  }
  /// [0, 1) in steps of 2^-53.
  double uniform() { return static_cast<double>(bits64() >> 11) * 0x1p-53; }
  /// Standard normal.
  double normal() {
    return detail::normal_quantile((static_cast<double>(bits64() >> 11) + 0.5) * 0x1p-53);
  }
  /// Uniform in [0, n) without bias (rejection); n >= 1.
  Index below(Index n) {
    detail::require(n >= 1, "Random::below: n (", n, ") must be at least 1");
    const auto range = static_cast<std::uint64_t>(n);
    const std::uint64_t reject =
        (0 - range) % range;  // 2^64 mod n: the words that would favour small results
    for (;;) {
      const std::uint64_t word = bits64();
      if (word >= reject) return static_cast<Index>(word % range);
    }
  }

  /// Number of 32-bit words drawn so far; setting it jumps there in O(1).
  std::uint64_t position() const { return position_; }
  void set_position(std::uint64_t position) { position_ = position; }
  std::uint64_t seed() const { return seed_; }
  std::uint64_t stream() const { return stream_; }

  friend bool operator==(const Random& a, const Random& b) {
    return a.seed_ == b.seed_ && a.stream_ == b.stream_ && a.position_ == b.position_;
  }

 private:
  const std::array<std::uint32_t, 4>& block() {
    const std::uint64_t index = position_ / 4;
    if (index != cached_index_) {
      cached_index_ = index;
      cached_ = detail::philox4x32(
          {static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32),
           static_cast<std::uint32_t>(stream_), static_cast<std::uint32_t>(stream_ >> 32)},
          {static_cast<std::uint32_t>(seed_), static_cast<std::uint32_t>(seed_ >> 32)});
    }
    return cached_;
  }

  std::uint64_t seed_;
  std::uint64_t stream_;
  std::uint64_t position_ = 0;
  std::uint64_t cached_index_ = ~std::uint64_t{0};
  std::array<std::uint32_t, 4> cached_{};
};

/// out(i, j) ~ N(0, stddev^2), drawn row by row.
template <OutputMatrix M>
void fill_normal(Random& random, M&& out, double stddev = 1.0) {
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index j = 0; j < out.cols(); ++j) {
      out(i, j) = static_cast<scalar_t<M>>(stddev * random.normal());
    }
  }
}

/// out(i, j) ~ U[low, high), drawn row by row.
template <OutputMatrix M>
void fill_uniform(Random& random, M&& out, double low = 0.0, double high = 1.0) {
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index j = 0; j < out.cols(); ++j) {
      out(i, j) = static_cast<scalar_t<M>>(std::fma(high - low, random.uniform(), low));
    }
  }
}

/// A rows x cols matrix of N(0, stddev^2) entries.
template <RealScalar S>
Matrix<S> normal_matrix(Random& random, Index rows, Index cols, double stddev = 1.0) {
  Matrix<S> out(rows, cols);
  fill_normal(random, out, stddev);
  return out;
}

EIGENBLOCKS_NAMESPACE_END
