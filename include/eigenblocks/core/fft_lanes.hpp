// Inside of fft.hpp: complex numbers of many channels, one channel per SIMD lane, and rows of them.
//
// A row of a buffer is one sample: kFftLanes real parts, then as many imaginary parts (a cache line each).
#pragma once

#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <complex>
#include <cstddef>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <RealScalar S>
inline constexpr Index kFftLanes = Index(64 / sizeof(S));  // one cache line
template <RealScalar S>
inline constexpr Index kFftRow = 2 * kFftLanes<S>;

/// A complex number in each lane.
template <RealScalar S>
struct ComplexLanes {
  simd::Packet<S> re, im;
};
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> operator+(const ComplexLanes<S>& a,
                                                    const ComplexLanes<S>& b) {
  return {simd::add(a.re, b.re), simd::add(a.im, b.im)};
}
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> operator-(const ComplexLanes<S>& a,
                                                    const ComplexLanes<S>& b) {
  return {simd::sub(a.re, b.re), simd::sub(a.im, b.im)};
}
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> operator*(const ComplexLanes<S>& a,
                                                    const ComplexLanes<S>& b) {
  return {simd::fma(a.re, b.re, simd::neg(simd::mul(a.im, b.im))),
          simd::fma(a.re, b.im, simd::mul(a.im, b.re))};
}
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> scaled(const ComplexLanes<S>& a, S factor) {
  const auto by = simd::set1<simd::Packet<S>>(factor);
  return {simd::mul(a.re, by), simd::mul(a.im, by)};
}
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> conjugate(const ComplexLanes<S>& a) {
  return {a.re, simd::neg(a.im)};
}
/// conj(a) b
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> conjugate_times(const ComplexLanes<S>& a,
                                                          const ComplexLanes<S>& b) {
  return {simd::fma(a.re, b.re, simd::mul(a.im, b.im)),
          simd::fma(a.re, b.im, simd::neg(simd::mul(a.im, b.re)))};
}
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> load_lanes(const S* row) {
  return {simd::load<simd::Packet<S>>(row), simd::load<simd::Packet<S>>(row + kFftLanes<S>)};
}
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void store_lanes(S* row, const ComplexLanes<S>& z) {
  simd::store<simd::Packet<S>>(row, z.re);
  simd::store<simd::Packet<S>>(row + kFftLanes<S>, z.im);
}
/// The same number in all lanes.
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> set_lanes(const S* number) {
  return {simd::set1<simd::Packet<S>>(number[0]), simd::set1<simd::Packet<S>>(number[1])};
}

/// (a0, b0, a1, b1, ..) from (a0, a1, ..) and (b0, b1, ..), and back.
template <RealScalar S, std::size_t... I>
EIGENBLOCKS_ALWAYS_INLINE void interleave(simd::Packet<S>& a, simd::Packet<S>& b,
                                          std::index_sequence<I...>) {
  constexpr std::size_t w = sizeof...(I);
  if constexpr (w > 1) {
    const simd::Packet<S> low = __builtin_shufflevector(a, b, int(I / 2 + (I % 2) * w)...);
    b = __builtin_shufflevector(a, b, int(w / 2 + I / 2 + (I % 2) * w)...);
    a = low;
  }
}
template <RealScalar S, std::size_t... I>
EIGENBLOCKS_ALWAYS_INLINE void separate(simd::Packet<S>& a, simd::Packet<S>& b,
                                        std::index_sequence<I...>) {
  if constexpr (sizeof...(I) > 1) {
    const simd::Packet<S> even = __builtin_shufflevector(a, b, int(2 * I)...);
    b = __builtin_shufflevector(a, b, int(2 * I + 1)...);
    a = even;
  }
}

/// Channels [r, r + a packet) of a row of `lanes` <= kFftLanes complex numbers; those beyond are 0.
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> get_complex(const std::complex<S>* row, Index r,
                                                      Index lanes) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  const S* from = reinterpret_cast<const S*>(row + r);
  S part[std::size_t(2 * w)];
  if (r + w > lanes) {
    for (Index i = 0; i < 2 * w; ++i) part[i] = i < 2 * (lanes - r) ? from[i] : S(0);
    from = part;
  }
  P re = simd::load<P>(from), im = simd::load<P>(from + w);
  separate<S>(re, im, std::make_index_sequence<std::size_t(w)>());
  return {re, im};
}
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void put_complex(std::complex<S>* row, Index r, Index lanes,
                                           ComplexLanes<S> z) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  S* const to = reinterpret_cast<S*>(row + r);
  interleave<S>(z.re, z.im, std::make_index_sequence<std::size_t(w)>());
  if (r + w <= lanes) {
    simd::store<P>(to, z.re);
    simd::store<P>(to + w, z.im);
  } else if (r < lanes) {
    S part[std::size_t(2 * w)];
    simd::store<P>(part, z.re);
    simd::store<P>(part + w, z.im);
    std::copy(part, part + 2 * (lanes - r), to);
  }
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
