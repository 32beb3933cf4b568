// Inside of fft.hpp and convolution.hpp: complex transforms of many channels at once, one channel per SIMD lane.
//
// A buffer has one row per sample: kFftLanes real parts, then as many imaginary parts (a cache line each).  Transforms
// of a power of two are radix-4, forward by decimation in frequency into bit-reversed rows, inverse by decimation in
// time from there: a convolution needs no reordering.  They go depth first: a quarter of the rows is finished before the next
// one is touched, so that all but the first levels run in the caches whatever their sizes.  Two real rows are one complex
// row (x_{2j} + i x_{2j+1}), which for this layout means that real rows are copied as they are.
// Other lengths: Bluestein's convolution with a chirp, in a transform of a power of two >= 2n - 1.
#pragma once

#include <eigenblocks/core/fft_lanes.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline constexpr Index kFftLeaf = 128;  // rows: 16 KB, half of a first-level cache

/// exp(-2 pi i j / n), 0 <= j < n: the angle is reduced to an eighth of the circle, so both parts are good to an ulp.
inline std::complex<double> unit_root(Index j, Index n) {
  Index a = 8 * j;  // the angle is 2 pi a / b, b = 8 n
  const Index b = 8 * n;
  const bool below = a > b / 2;
  if (below) a = b - a;
  const bool left = a > b / 4;
  if (left) a = b / 2 - a;
  const bool steep = a > b / 8;
  if (steep) a = b / 4 - a;
  const double angle = 2 * std::numbers::pi * (static_cast<double>(a) / static_cast<double>(b));
  double c = std::cos(angle), s = std::sin(angle);
  if (steep) std::swap(c, s);
  return {left ? -c : c, below ? s : -s};
}

inline Index reverse_bits(Index value, int bits) {
  std::uint64_t v = static_cast<std::uint64_t>(value);
  v = ((v >> 1) & 0x5555555555555555u) | ((v & 0x5555555555555555u) << 1);
  v = ((v >> 2) & 0x3333333333333333u) | ((v & 0x3333333333333333u) << 2);
  v = ((v >> 4) & 0x0f0f0f0f0f0f0f0fu) | ((v & 0x0f0f0f0f0f0f0f0fu) << 4);
  v = ((v >> 8) & 0x00ff00ff00ff00ffu) | ((v & 0x00ff00ff00ff00ffu) << 8);
  v = ((v >> 16) & 0x0000ffff0000ffffu) | ((v & 0x0000ffff0000ffffu) << 16);
  v = (v >> 32) | (v << 32);
  return bits == 0 ? 0 : static_cast<Index>(v >> (64 - bits));
}

/// Transform of n rows, n a power of two; the tables are the only state.
template <RealScalar S>
class PowerTwoFft {
  using C = ComplexLanes<S>;
  static constexpr Index kRow = kFftRow<S>, kWidth = simd::kLanes<S>, kLanes = kFftLanes<S>;

 public:
  PowerTwoFft() = default;
  explicit PowerTwoFft(Index n) : n_(n) {
    Index count = 0;
    for (Index m = n; m > 4; m /= 4) count += 6 * (m / 4);
    twiddles_.reserve(static_cast<std::size_t>(count));
    for (Index m = n; m > 4; m /= 4) {
      first_[level(m)] = static_cast<Index>(twiddles_.size());
      for (Index j = 0; j < m / 4; ++j) {
        for (const Index power : {2, 1, 3}) {
          const std::complex<double> w = unit_root(power * j, m);
          twiddles_.push_back(static_cast<S>(w.real()));
          twiddles_.push_back(static_cast<S>(w.imag()));
        }
      }
    }
  }

  Index size() const { return n_; }
  /// Rows in order become rows in bit-reversed order.
  void forward(S* z) const { forward(z, n_); }
  /// And back, times n.
  void inverse(S* z) const { inverse(z, n_); }

 private:
  static std::size_t level(Index m) {
    return static_cast<std::size_t>(std::countr_zero(static_cast<std::uint64_t>(m)));
  }
  const S* twiddles(Index m) const { return twiddles_.data() + first_[level(m)]; }

  void forward(S* z, Index m) const {
    if (m > kFftLeaf) {
      forward_stage(z, m);
      for (Index i = 0; i < 4; ++i) forward(z + i * (m / 4) * kRow, m / 4);
      return;
    }
    Index s = m;
    for (; s > 4; s /= 4) {
      for (Index at = 0; at < m; at += s) forward_stage(z + at * kRow, s);
    }
    if (s == 4) {
      for (Index at = 0; at < m; at += 4) forward_four(z + at * kRow);
    } else if (s == 2) {
      for (Index at = 0; at < m; at += 2) two(z + at * kRow);
    }
  }

  void inverse(S* z, Index m) const {
    if (m > kFftLeaf) {
      for (Index i = 0; i < 4; ++i) inverse(z + i * (m / 4) * kRow, m / 4);
      return inverse_stage(z, m);
    }
    Index s = m;
    while (s > 4) s /= 4;
    if (s == 4) {
      for (Index at = 0; at < m; at += 4) inverse_four(z + at * kRow);
    } else if (s == 2) {
      for (Index at = 0; at < m; at += 2) two(z + at * kRow);
    }
    for (s *= 4; s <= m; s *= 4) {
      for (Index at = 0; at < m; at += s) inverse_stage(z + at * kRow, s);
    }
  }

  /// (a, b, c, d) to the sums over the four residues of k, without their twiddles; rows in the order k = 0, 2, 1, 3.
  static EIGENBLOCKS_ALWAYS_INLINE void split(C& a, C& b, C& c, C& d) {
    const C t0 = a + c, t1 = a - c, t2 = b + d, t3 = b - d;
    a = t0 + t2;
    b = t0 - t2;
    c = {simd::add(t1.re, t3.im), simd::sub(t1.im, t3.re)};
    d = {simd::sub(t1.re, t3.im), simd::add(t1.im, t3.re)};
  }
  /// Its inverse, times 4.
  static EIGENBLOCKS_ALWAYS_INLINE void merge(C& a, C& b, C& c, C& d) {
    const C s0 = a + b, s1 = a - b, s2 = c + d, s3 = c - d;
    a = s0 + s2;
    c = s0 - s2;
    b = {simd::sub(s1.re, s3.im), simd::add(s1.im, s3.re)};
    d = {simd::add(s1.re, s3.im), simd::sub(s1.im, s3.re)};
  }

  void forward_stage(S* z, Index m) const {
    const Index quarter = m / 4 * kRow;
    const S* w = twiddles(m);
    for (S* const end = z + quarter; z != end; z += kRow, w += 6) {
      const C w2 = set_lanes<S>(w), w1 = set_lanes<S>(w + 2), w3 = set_lanes<S>(w + 4);
      for (Index r = 0; r < kLanes; r += kWidth) {
        S* const to = z + r;
        C a = load_lanes<S>(to), b = load_lanes<S>(to + quarter),
          c = load_lanes<S>(to + 2 * quarter), d = load_lanes<S>(to + 3 * quarter);
        split(a, b, c, d);
        store_lanes(to, a);
        store_lanes(to + quarter, b * w2);
        store_lanes(to + 2 * quarter, c * w1);
        store_lanes(to + 3 * quarter, d * w3);
      }
    }
  }

  void inverse_stage(S* z, Index m) const {
    const Index quarter = m / 4 * kRow;
    const S* w = twiddles(m);
    for (S* const end = z + quarter; z != end; z += kRow, w += 6) {
      const C w2 = set_lanes<S>(w), w1 = set_lanes<S>(w + 2), w3 = set_lanes<S>(w + 4);
      for (Index r = 0; r < kLanes; r += kWidth) {
        S* const to = z + r;
        C a = load_lanes<S>(to), b = conjugate_times(w2, load_lanes<S>(to + quarter)),
          c = conjugate_times(w1, load_lanes<S>(to + 2 * quarter)),
          d = conjugate_times(w3, load_lanes<S>(to + 3 * quarter));
        merge(a, b, c, d);
        store_lanes(to, a);
        store_lanes(to + quarter, b);
        store_lanes(to + 2 * quarter, c);
        store_lanes(to + 3 * quarter, d);
      }
    }
  }

  static void forward_four(S* z) {
    for (Index r = 0; r < kLanes; r += kWidth) {
      S* const to = z + r;
      C a = load_lanes<S>(to), b = load_lanes<S>(to + kRow), c = load_lanes<S>(to + 2 * kRow),
        d = load_lanes<S>(to + 3 * kRow);
      split(a, b, c, d);
      store_lanes(to, a);
      store_lanes(to + kRow, b);
      store_lanes(to + 2 * kRow, c);
      store_lanes(to + 3 * kRow, d);
    }
  }
  static void inverse_four(S* z) {
    for (Index r = 0; r < kLanes; r += kWidth) {
      S* const to = z + r;
      C a = load_lanes<S>(to), b = load_lanes<S>(to + kRow), c = load_lanes<S>(to + 2 * kRow),
        d = load_lanes<S>(to + 3 * kRow);
      merge(a, b, c, d);
      store_lanes(to, a);
      store_lanes(to + kRow, b);
      store_lanes(to + 2 * kRow, c);
      store_lanes(to + 3 * kRow, d);
    }
  }
  static void two(S* z) {
    for (Index r = 0; r < kLanes; r += kWidth) {
      const C a = load_lanes<S>(z + r), b = load_lanes<S>(z + r + kRow);
      store_lanes(z + r, a + b);
      store_lanes(z + r + kRow, a - b);
    }
  }

  Index n_ = 1;
  std::vector<S> twiddles_;  // per stage and j: w^2j, w^j, w^3j, in the order of the rows
  std::array<Index, 64> first_{};
};

/// Transform of n rows, any n >= 1.  Buffers have rows() >= n rows.
template <RealScalar S>
class AnyFft {
 public:
  AnyFft() = default;
  explicit AnyFft(Index n) : n_(n), bits_(int(std::bit_width(static_cast<std::uint64_t>(n)) - 1)) {
    power_two_ = std::has_single_bit(static_cast<std::uint64_t>(n));
    if (power_two_) {
      inner_ = PowerTwoFft<S>(n);
      return;
    }
    const Index m = static_cast<Index>(std::bit_ceil(static_cast<std::uint64_t>(2 * n - 1)));
    inner_ = PowerTwoFft<S>(m);
    chirp_.resize(static_cast<std::size_t>(2 * n));
    std::vector<S> kernel(static_cast<std::size_t>(m * kFftRow<S>), S(0));
    Index square = 0;  // j^2 mod 2n
    for (Index j = 0; j < n; ++j) {
      const std::complex<double> c = unit_root(square, 2 * n);
      chirp_[static_cast<std::size_t>(2 * j)] = static_cast<S>(c.real());
      chirp_[static_cast<std::size_t>(2 * j + 1)] = static_cast<S>(c.imag());
      for (const Index row : {j, (m - j) % m}) {
        S* const to = kernel.data() + row * kFftRow<S>;
        to[0] = static_cast<S>(c.real());
        to[kFftLanes<S>] = static_cast<S>(-c.imag());
      }
      square = (square + 2 * j + 1) % (2 * n);
    }
    inner_.forward(kernel.data());
    response_.resize(static_cast<std::size_t>(2 * m));
    for (Index p = 0; p < m; ++p) {
      for (const Index part : {0, 1}) {
        response_[static_cast<std::size_t>(2 * p + part)] =
            kernel[static_cast<std::size_t>(p * kFftRow<S> + part * kFftLanes<S>)] /
            static_cast<S>(m);
      }
    }
  }

  Index size() const { return n_; }
  Index rows() const { return inner_.size(); }
  bool power_two() const { return power_two_; }
  int bits() const { return bits_; }
  /// The row of frequency k.
  Index position(Index k) const { return power_two_ ? reverse_bits(k, bits_) : k; }

  /// Rows 0 .. n-1 in order to frequencies at their positions.
  void forward(S* z) const { power_two_ ? inner_.forward(z) : bluestein<false>(z); }
  /// And back, times n.
  void inverse(S* z) const { power_two_ ? inner_.inverse(z) : bluestein<true>(z); }

 private:
  template <bool kConj>
  static void multiply(S* z, const S* numbers, Index rows) {
    for (Index j = 0; j < rows; ++j) {
      const auto w = set_lanes<S>(numbers + 2 * j);
      for (Index r = 0; r < kFftLanes<S>; r += simd::kLanes<S>) {
        S* const at = z + j * kFftRow<S> + r;
        if constexpr (kConj) {
          store_lanes(at, conjugate_times(w, load_lanes<S>(at)));
        } else {
          store_lanes(at, w * load_lanes<S>(at));
        }
      }
    }
  }
  /// jk = (j^2 + k^2 - (j - k)^2) / 2.  The chirp is even, so conjugating it conjugates its spectrum.
  template <bool kConj>
  void bluestein(S* z) const {
    multiply<kConj>(z, chirp_.data(), n_);
    std::fill(z + n_ * kFftRow<S>, z + rows() * kFftRow<S>, S(0));
    inner_.forward(z);
    multiply<kConj>(z, response_.data(), rows());
    inner_.inverse(z);
    multiply<kConj>(z, chirp_.data(), n_);
  }

  Index n_ = 1;
  int bits_ = 0;
  bool power_two_ = true;
  PowerTwoFft<S> inner_;
  std::vector<S> chirp_, response_;
};

/// Transform of n real numbers per lane: n/2 complex ones for even n, n for odd n.
template <RealScalar S>
class RealFftTables {
 public:
  explicit RealFftTables(Index n) : n_(n), halved_(n % 2 == 0), inner_(halved_ ? n / 2 : n) {
    if (!halved_) return;
    const Index half = n / 2;
    turns_.resize(static_cast<std::size_t>(half + 2));
    for_each_pair([&](Index, Index, Index k, Index at) {
      const std::complex<double> w = unit_root(k, n);  // -i w
      turns_[static_cast<std::size_t>(2 * at)] = static_cast<S>(w.imag());
      turns_[static_cast<std::size_t>(2 * at + 1)] = static_cast<S>(-w.real());
    });
  }

  Index size() const { return n_; }
  bool halved() const { return halved_; }
  const AnyFft<S>& inner() const { return inner_; }
  /// Scalars of a buffer.
  Index buffer_size() const { return inner_.rows() * kFftRow<S>; }
  /// -i exp(-2 pi i k / n) of the pair counted `at`.
  const S* turn(Index at) const { return turns_.data() + 2 * at; }

  /// f(row of k, row of n/2 - k, k, count) once for each pair of frequencies 0 < k <= n/2 - k (or the other way round)
  /// of the halved transform, rows walked from the ends of each octave: bit reversal maps k -> n/2 - k to that.
  template <class F>
  void for_each_pair(F&& f) const {
    const Index half = inner_.size();
    if (!inner_.power_two()) {
      for (Index k = 1; 2 * k <= half; ++k) f(k, half - k, k, k);
      return;
    }
    if (half > 1) f(Index(1), Index(1), half / 2, Index(0));
    for (Index octave = 2; octave < half; octave *= 2) {
      for (Index i = 0; i < octave / 2; ++i) {
        const Index p = octave + i;
        f(p, 2 * octave - 1 - i, reverse_bits(p, inner_.bits()), octave / 2 + i);
      }
    }
  }

  /// The same pairs in the order of k: for memory that holds the frequencies in their natural order.
  template <class F>
  void for_each_frequency(F&& f) const {
    const Index half = inner_.size();
    if (!inner_.power_two()) return for_each_pair(f);
    for (Index k = 1; 2 * k <= half; ++k) {
      const Index own = reverse_bits(k, inner_.bits());
      const Index other = reverse_bits(half - k, inner_.bits());
      const Index low = std::min(own, other), high = std::max(own, other);
      const Index octave = static_cast<Index>(std::bit_floor(static_cast<std::uint64_t>(low)));
      f(low, high, own == low ? k : half - k, octave / 2 + low - octave);
    }
  }

 private:
  Index n_;
  bool halved_;
  AnyFft<S> inner_;
  std::vector<S> turns_;
};

/// X_k and X_{n/2-k}, both times 2, from Z_k and Z_{n/2-k}.
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void unpack_real(ComplexLanes<S>& a, ComplexLanes<S>& b,
                                           const ComplexLanes<S>& turn) {
  const ComplexLanes<S> e = a + conjugate(b), v = turn * (a - conjugate(b));
  a = e + v;
  b = conjugate(e - v);
}
/// And back, times 2.
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void pack_real(ComplexLanes<S>& a, ComplexLanes<S>& b,
                                         const ComplexLanes<S>& turn) {
  const ComplexLanes<S> e = a + conjugate(b), v = conjugate_times(turn, a - conjugate(b));
  a = e + v;
  b = conjugate(e - v);
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
