// The packet layer: what kernels and user-written lane functors compute with.
//
// A packet is Eigen's register type for a scalar S: Packet<S>, kLanes<S> lanes wide (16 / 8 / 4 floats with AVX-512 /
// AVX2 / SSE or NEON, 1 with EIGEN_DONT_VECTORIZE, where Packet<float> is float itself).  The functions below work on
// packets and on plain scalars alike, so one source serves every target, float and double, Eigen 3.4 and 5.
//
//   load store set1 zero iota          memory and constants (unaligned)
//   load_as<P>(from) store_as(to, p)   the same from and to half or bfloat16
//   convert_row(from, to, n)           n numbers from one storage scalar to another
//   + - * / are add sub mul div;  fma(a, b, c) = a b + c
//   max min abs select(mask, a, b) less(a, b) less_equal(a, b) mask_and mask_or mask_any
//   exp2 exp exp_nonpositive           own polynomials, see the contracts
//   log log1p                          likewise
//   sum max_lane                       across the lanes
//   keep_in_register(p)                stops g++ from folding the load of p into each use (see below)
//   prefetch(address) prefetch_rows    what is needed soon
//   stream stream_fence                stores of what is not needed soon
//
// Why own exponentials: Eigen 3.4's exp(-inf) is 2.9e-39, not 0, so masked entries would leak; and these are 2x faster.
// Contracts (|x| anywhere; tests walk them):
//   exp2   float <= 1.5 ulp, double <= 1.5 ulp where the result is a normal number; below that 0 or a subnormal;
//          exp2(-inf) = 0, exp2(0) = 1; NaN stays NaN.  Requires x <= 127 (float), x <= 1023 (double): kernels call it with x <= 0.
//   exp    the same for every x; overflow gives inf.  exp_nonpositive: x <= 0 only, cheaper.
//   log    <= 1 ulp for every x > 0, subnormals included; log(inf) = inf, log(1) = 0, log(+-0) = -inf, x < 0 and NaN give NaN.
//   log1p  log(1 + x) for x >= 0 <= 2 ulp, log1p(x) = x for small x; inf gives inf, NaN stays NaN.
#pragma once

#include <eigenblocks/core/types.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace simd {

namespace ei = Eigen::internal;

template <RealScalar S>
using Packet = typename ei::packet_traits<S>::type;
template <class P>
using lane_t = typename ei::unpacket_traits<P>::type;
template <RealScalar S>
inline constexpr int kLanes = int(ei::unpacket_traits<Packet<S>>::size);
template <class P>
inline constexpr int kPacketSize = int(ei::unpacket_traits<P>::size);

#define EIGENBLOCKS_SIMD \
  template <class P>     \
  EIGENBLOCKS_ALWAYS_INLINE

EIGENBLOCKS_SIMD P load(const lane_t<P>* from) { return ei::ploadu<P>(from); }
namespace detail {
template <int W>
struct WordVectors;
#define EIGENBLOCKS_WORD_VECTORS(W)                                   \
  template <>                                                         \
  struct WordVectors<W> {                                             \
    typedef std::uint16_t Halves __attribute__((vector_size(2 * W))); \
    typedef std::uint32_t Words __attribute__((vector_size(4 * W)));  \
  };
EIGENBLOCKS_WORD_VECTORS(4)
EIGENBLOCKS_WORD_VECTORS(8)
EIGENBLOCKS_WORD_VECTORS(16)
#undef EIGENBLOCKS_WORD_VECTORS
}  // namespace detail

/// A packet of float from a storage scalar (half, bfloat16; float itself).  Exact.
template <class P, StorageScalar T>
EIGENBLOCKS_ALWAYS_INLINE P load_as(const T* from) {
  constexpr int w = kPacketSize<P>;
  if constexpr (std::is_same_v<T, lane_t<P>>) {
    return load<P>(from);
  } else if constexpr (w == 1) {
    return static_cast<P>(*from);
  } else if constexpr (std::is_same_v<T, Eigen::bfloat16>) {  // the upper half of a float
#if !defined(EIGEN_DONT_VECTORIZE) && \
    defined(__AVX2__)  // (g++ 12 makes five instructions of the form below)
    if constexpr (w == 8) {
      const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(upper), 16));
    }
#endif
    using V = detail::WordVectors<w>;
    typename V::Halves upper;
    std::memcpy(&upper, from, sizeof(upper));
    return std::bit_cast<P>(__builtin_convertvector(upper, typename V::Words) << 16);
  } else {
#if defined(__F16C__) && !defined(EIGEN_DONT_VECTORIZE)
    if constexpr (w == 4)
      return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    if constexpr (w == 8)
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#if defined(__AVX512F__) && (defined(__OPTIMIZE__) || defined(__clang__))
    if constexpr (w == 16)
      return _mm512_maskz_cvtph_ps(0xFFFF,
                                   _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
#endif
    lane_t<P> lanes[std::size_t(w)];
    for (int i = 0; i < w; ++i) lanes[i] = static_cast<lane_t<P>>(from[i]);
    return load<P>(lanes);
  }
}
EIGENBLOCKS_SIMD void store(lane_t<P>* to, const P& p) { ei::pstoreu<lane_t<P>>(to, p); }
/// A packet of float as storage scalars, rounded to nearest even as Eigen's casts do; NaN stays NaN.
template <class P, StorageScalar T>
EIGENBLOCKS_ALWAYS_INLINE void store_as(T* to, const P& p) {
  constexpr int w = kPacketSize<P>;
  if constexpr (std::is_same_v<T, lane_t<P>>) {
    store<P>(to, p);
  } else if constexpr (w == 1) {
    *to = static_cast<T>(p);
  } else if constexpr (std::is_same_v<T, Eigen::bfloat16>) {
    using V = detail::WordVectors<w>;
    using Words = typename V::Words;
    const Words bits = std::bit_cast<Words>(p);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words quiet = (bits >> 16) | 0x40u;
    const Words nan = (bits & 0x7fffffffu) > 0x7f800000u;  // all ones where it is one
    const auto upper =
        __builtin_convertvector((quiet & nan) | (rounded & ~nan), typename V::Halves);
    std::memcpy(static_cast<void*>(to), &upper, sizeof(upper));
  } else {
#if defined(__F16C__) && !defined(EIGEN_DONT_VECTORIZE)
    if constexpr (w == 8) {
      return _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                              _mm256_cvtps_ph(p, _MM_FROUND_TO_NEAREST_INT));
    }
#if defined(__AVX512F__) && (defined(__OPTIMIZE__) || defined(__clang__))
    if constexpr (w == 16) {
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                 _mm512_maskz_cvtps_ph(0xFFFF, p, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
#endif
    lane_t<P> lanes[std::size_t(w)];
    store<P>(lanes, p);
    for (int i = 0; i < w; ++i) to[i] = static_cast<T>(lanes[i]);
  }
}
EIGENBLOCKS_SIMD P set1(lane_t<P> value) { return ei::pset1<P>(value); }
EIGENBLOCKS_SIMD P zero() { return ei::pset1<P>(lane_t<P>(0)); }
/// first, first + 1, ...
EIGENBLOCKS_SIMD P iota(lane_t<P> first) { return ei::plset<P>(first); }

EIGENBLOCKS_SIMD P add(const P& a, const P& b) { return ei::padd(a, b); }
EIGENBLOCKS_SIMD P sub(const P& a, const P& b) { return ei::psub(a, b); }
EIGENBLOCKS_SIMD P mul(const P& a, const P& b) { return ei::pmul(a, b); }
EIGENBLOCKS_SIMD P div(const P& a, const P& b) { return ei::pdiv(a, b); }
EIGENBLOCKS_SIMD P neg(const P& a) { return ei::pnegate(a); }
EIGENBLOCKS_SIMD P fma(const P& a, const P& b, const P& c) { return ei::pmadd(a, b, c); }
// (AVX-512: the maskz forms with a full mask are the plain instructions; g++ 12 warns about its own plain intrinsics)
EIGENBLOCKS_SIMD P max(const P& a, const P& b) {
#if defined(__AVX512F__) && !defined(EIGEN_DONT_VECTORIZE)
  if constexpr (sizeof(P) == 64 && sizeof(lane_t<P>) == 4) return _mm512_maskz_max_ps(0xFFFF, b, a);
  if constexpr (sizeof(P) == 64 && sizeof(lane_t<P>) == 8) return _mm512_maskz_max_pd(0xFF, b, a);
#endif
  return ei::pmax(a, b);
}
EIGENBLOCKS_SIMD P min(const P& a, const P& b) {
#if defined(__AVX512F__) && !defined(EIGEN_DONT_VECTORIZE)
  if constexpr (sizeof(P) == 64 && sizeof(lane_t<P>) == 4) return _mm512_maskz_min_ps(0xFFFF, b, a);
  if constexpr (sizeof(P) == 64 && sizeof(lane_t<P>) == 8) return _mm512_maskz_min_pd(0xFF, b, a);
#endif
  return ei::pmin(a, b);
}
EIGENBLOCKS_SIMD P abs(const P& a) { return ei::pabs(a); }
EIGENBLOCKS_SIMD P sqrt(const P& a) { return ei::psqrt(a); }

/// Masks are packets with all bits of a lane set or clear; combine them with mask_and / mask_or, use them in select.
EIGENBLOCKS_SIMD P less(const P& a, const P& b) { return ei::pcmp_lt(a, b); }
EIGENBLOCKS_SIMD P less_equal(const P& a, const P& b) { return ei::pcmp_le(a, b); }
EIGENBLOCKS_SIMD P equal(const P& a, const P& b) { return ei::pcmp_eq(a, b); }
EIGENBLOCKS_SIMD P mask_and(const P& a, const P& b) { return ei::pand(a, b); }
EIGENBLOCKS_SIMD P mask_or(const P& a, const P& b) { return ei::por(a, b); }
/// mask ? a : b, lane by lane.
EIGENBLOCKS_SIMD P select(const P& mask, const P& a, const P& b) {
  if constexpr (std::is_arithmetic_v<P>) {
    return std::bit_cast<std::conditional_t<sizeof(P) == 4, std::uint32_t, std::uint64_t>>(mask) !=
                   0
               ? a
               : b;
  } else {
    return ei::pselect(mask, a, b);
  }
}

EIGENBLOCKS_SIMD lane_t<P> sum(const P& a) { return ei::predux(a); }
EIGENBLOCKS_SIMD lane_t<P> max_lane(const P& a) { return ei::predux_max(a); }

/// Keeps a loaded packet in a register.  With -mtune=znver3 and the like, g++ 12 folds the load into every fused
/// multiply-add that uses it, which makes register-blocked kernels load-bound (a third slower).  Costs nothing.
EIGENBLOCKS_SIMD void keep_in_register(P& p) {
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__)) && \
    defined(__SSE2__)
#if defined(__AVX512F__)
  __asm__("" : "+v"(p));
#else
  __asm__("" : "+x"(p));
#endif
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
  __asm__("" : "+w"(p));
#else
  (void)p;
#endif
}

/// Stores past the caches, to an address that is a multiple of the packet's size; stream_fence() before others read.
EIGENBLOCKS_SIMD void stream(lane_t<P>* to, const P& p) {
#if defined(__SSE2__) && !defined(EIGEN_DONT_VECTORIZE)
  constexpr bool single = std::is_same_v<lane_t<P>, float>;
#if defined(__AVX512F__)
  if constexpr (sizeof(P) == 64 && single) return _mm512_stream_ps(to, p);
  if constexpr (sizeof(P) == 64 && !single) return _mm512_stream_pd(to, p);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(P) == 32 && single) return _mm256_stream_ps(to, p);
  if constexpr (sizeof(P) == 32 && !single) return _mm256_stream_pd(to, p);
#endif
  if constexpr (sizeof(P) == 16 && single) return _mm_stream_ps(to, p);
  if constexpr (sizeof(P) == 16 && !single) return _mm_stream_pd(to, p);
#endif
  store<P>(to, p);
}
inline void stream_fence() {
#if defined(__SSE2__) && !defined(EIGEN_DONT_VECTORIZE)
  _mm_sfence();
#endif
}

/// to[i] = from[i] for n contiguous numbers, one of T and U being the compute scalar of the other.
template <StorageScalar T, StorageScalar U>
void convert_row(const T* from, U* to, Index n) {
  using S = compute_t<T>;
  constexpr Index w = kLanes<S>;
  Index i = 0;
  for (; i + w <= n; i += w) store_as<Packet<S>>(to + i, load_as<Packet<S>>(from + i));
  for (; i < n; ++i) to[i] = static_cast<U>(from[i]);
}

/// Asks for the cache line at `address`, which need not be readable.
EIGENBLOCKS_ALWAYS_INLINE void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}
/// The same for every line of `cols` numbers in each of the rows [begin, end), which lie `stride` apart.
template <class T>
EIGENBLOCKS_ALWAYS_INLINE void prefetch_rows(const T* rows, Index stride, Index begin, Index end,
                                             Index cols) {
  constexpr Index line = Index(64 / sizeof(T));
  for (Index r = begin; r < end; ++r) {
    for (Index c = 0; c < cols; c += line) prefetch(rows + r * stride + c);
  }
}

/// Polynomial c[0] + c[1] x + ... by Horner's rule.
template <class P, class C, std::size_t N>
EIGENBLOCKS_ALWAYS_INLINE P horner(const C (&c)[N], const P& x) {
  P y = set1<P>(static_cast<lane_t<P>>(c[N - 1]));
  for (std::size_t i = N - 1; i-- > 0;) y = fma(y, x, set1<P>(static_cast<lane_t<P>>(c[i])));
  return y;
}

namespace detail {

template <class S>
struct Bits;
template <>
struct Bits<float> {
  using Int = std::int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
};
template <>
struct Bits<double> {
  using Int = std::int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
};

/// Adds (the integer in the low bits of `rounded`) * 2^mantissa to the bits of p: p times 2^n while that is normal.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P add_exponent(const P& p, const P& rounded) {
  using B = Bits<lane_t<P>>;
  using Int = typename B::Int;
  using Unsigned = std::make_unsigned_t<Int>;
  if constexpr (std::is_arithmetic_v<P>) {
    return std::bit_cast<P>(static_cast<Unsigned>(
        std::bit_cast<Unsigned>(p) + (std::bit_cast<Unsigned>(rounded) << B::kMantissa)));
  } else {
    typedef Unsigned IntVector __attribute__((vector_size(sizeof(P))));
    return std::bit_cast<P>(std::bit_cast<IntVector>(p) +
                            (std::bit_cast<IntVector>(rounded) << B::kMantissa));
  }
}

/// 2^r on |r| <= 1/2, minimax in relative error: 2.6e-9 (float, degree 6), 1.2e-17 (double, degree 11).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P exp2_fraction(const P& r) {
  if constexpr (std::is_same_v<lane_t<P>, float>) {
    constexpr float c[] = {1.0f,           0.693147214968f,   0.240226527829f,   0.0555031055101f,
                           0.00961769297f, 0.00134066439024f, 0.000155946781613f};
    return horner(c, r);
  } else {
    constexpr double c[] = {1.0,
                            0.69314718055994531326,
                            0.24022650695910097011,
                            0.055504108664820820631,
                            0.0096181291076075350845,
                            0.0013333558146665668694,
                            0.00015403530440803220178,
                            0.000015252733550335066941,
                            1.3215443086113030386e-6,
                            1.0178190533582399774e-7,
                            7.0724972909485472779e-9,
                            4.4344272102887541846e-10};
    return horner(c, r);
  }
}

/// (e^r - 1 - r) / r^2 on |r| <= log(2)/2; times r^2 the error is 7.5e-9 (float), 1.2e-17 (double).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P exp_tail(const P& r) {
  if constexpr (std::is_same_v<lane_t<P>, float>) {
    constexpr float c[] = {0.500000002693f, 0.16666577006f, 0.041666375249f, 0.00836317525547f,
                           0.00139411136637f};
    return horner(c, r);
  } else {
    constexpr double c[] = {0.50000000000000010212,    0.16666666666666674523,
                            0.041666666666624157875,   0.0083333333333222152106,
                            0.001388888891719838631,   0.00019841269886566398025,
                            0.00002480152132015615238, 2.7557242364849317814e-6,
                            2.7620076799169896683e-7,  2.5110039179932520501e-8};
    return horner(c, r);
  }
}

/// Splits x = n log 2 + r; returns r, leaves n + kRound in `rounded` (n in its low bits).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P reduce_log2(const P& x, P& rounded, P& n) {
  using S = lane_t<P>;
  constexpr bool single = std::is_same_v<S, float>;
  constexpr S high = single ? S(0.693359375) : S(0.693147180369123816490);
  constexpr S low = single ? S(-2.12194440e-4) : S(1.90821492927058770002e-10);
  rounded = fma(x, set1<P>(S(1.44269504088896340736)), set1<P>(Bits<S>::kRound));
  n = sub(rounded, set1<P>(Bits<S>::kRound));
  const P r = fma(n, set1<P>(-high), x);
  return fma(n, set1<P>(-low), r);
}

}  // namespace detail

/// 2^x for x below the overflow limit (kernels: x <= 0); see the contract at the top.
EIGENBLOCKS_SIMD P exp2(const P& x) {
  using S = lane_t<P>;
  using B = detail::Bits<S>;
#if defined(__AVX512F__) && !defined(EIGEN_DONT_VECTORIZE) && \
    (defined(__OPTIMIZE__) ||                                 \
     defined(__clang__))  // without -O, g++'s intrinsics are macros that warn
  // (the maskz forms with a full mask are the plain instructions; g++ 12 warns about its own plain intrinsics)
  if constexpr (sizeof(P) == 64 && std::is_same_v<S, float>) {  // scalef has every limit built in
    const __m512 n = _mm512_maskz_roundscale_ps(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT);
    return _mm512_maskz_scalef_ps(0xFFFF, detail::exp2_fraction<P>(_mm512_sub_ps(x, n)), n);
  }
  if constexpr (sizeof(P) == 64 && std::is_same_v<S, double>) {
    const __m512d n = _mm512_maskz_roundscale_pd(0xFF, x, _MM_FROUND_TO_NEAREST_INT);
    return _mm512_maskz_scalef_pd(0xFF, detail::exp2_fraction<P>(_mm512_sub_pd(x, n)), n);
  }
#endif
  // From -bias on, n is -bias, and 2^n below is 0 exactly: a bound in place of a select, a third faster.
  const P bounded = max(x, set1<P>(S(-B::kBias)));  // NaN stays
  const P rounded = add(bounded, set1<P>(B::kRound));
  const P r = sub(bounded, sub(rounded, set1<P>(B::kRound)));
  // 2^n as a number: 1.0 with n added to its exponent; the product keeps NaN whatever its payload.
  const P power = detail::add_exponent(set1<P>(S(1)), rounded);
  return mul(detail::exp2_fraction(r), power);
}

/// e^x for x <= 0 (NaN stays, -inf gives 0): the same accuracy, with one bound in place of three selects.
EIGENBLOCKS_SIMD P exp_nonpositive(const P& x) {
  using S = lane_t<P>;
  // From -bias log 2 on, n is -bias, and 2^n below is 0 exactly.
  const P bounded = max(x, set1<P>(std::is_same_v<S, float> ? S(-88.02969) : S(-709.089565712824)));
  P rounded, n;
  const P r = detail::reduce_log2(bounded, rounded, n);
  const P p = add(set1<P>(S(1)), fma(mul(r, r), detail::exp_tail(r), r));
  return mul(p, detail::add_exponent(set1<P>(S(1)), rounded));
}

/// e^x; see the contract at the top.
EIGENBLOCKS_SIMD P exp(const P& x) {
  using S = lane_t<P>;
  P rounded, n;
  const P r = detail::reduce_log2(x, rounded, n);
  const P p = add(set1<P>(S(1)), fma(mul(r, r), detail::exp_tail(r), r));
  constexpr bool single = std::is_same_v<S, float>;
  const P low = set1<P>(single ? S(-87.3365478515625)
                               : S(-708.39641853226408));  // log of the smallest normal
  const P high =
      set1<P>(single ? S(88.72283172607421875) : S(709.78271289338397));  // log of the largest
  P y = detail::add_exponent(p, rounded);
  y = select(less(x, low), zero<P>(), y);
  y = select(less(high, x), set1<P>(std::numeric_limits<S>::infinity()), y);
  return select(equal(x, x), y, x);
}

namespace detail {

/// m in [sqrt(1/2), sqrt(2)) and the integer k with x = m 2^k, for positive normal x; anything else gives some finite k.
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P split_exponent(const P& x, P& k) {
  using S = lane_t<P>;
  using B = Bits<S>;
  using Unsigned = std::make_unsigned_t<typename B::Int>;
  constexpr Unsigned root = std::bit_cast<Unsigned>(S(0.70710678118654752440));
  constexpr Unsigned to_one = std::bit_cast<Unsigned>(S(1)) - root;
  constexpr Unsigned mantissa = (Unsigned(1) << B::kMantissa) - 1;
  constexpr Unsigned round = std::bit_cast<Unsigned>(B::kRound);
  // kRound holds integers in its low bits, so k + bias becomes a number without a conversion.
  if constexpr (std::is_arithmetic_v<P>) {
    const Unsigned u = std::bit_cast<Unsigned>(x) + to_one;
    k = std::bit_cast<P>((u >> B::kMantissa) + round) - (B::kRound + S(B::kBias));
    return std::bit_cast<P>((u & mantissa) + root);
  } else {
    typedef Unsigned IntVector __attribute__((vector_size(sizeof(P))));
    const IntVector u = std::bit_cast<IntVector>(x) + to_one;
    k = sub(std::bit_cast<P>((u >> B::kMantissa) + round), set1<P>(B::kRound + S(B::kBias)));
    return std::bit_cast<P>((u & mantissa) + root);
  }
}

}  // namespace detail

/// log x; see the contract at the top.  x = 2^k (1 + f), s = f / (2 + f):
///   log(1 + f) = 2 atanh s = f - (f^2/2 - s (f^2/2 + r)),  r = 2 (s^2/3 + s^4/5 + ...), minimax: 1.7e-11 (float), 4.6e-18 (double).
EIGENBLOCKS_SIMD P log(const P& x) {
  using S = lane_t<P>;
  using B = detail::Bits<S>;
  using Limits = std::numeric_limits<S>;
  constexpr bool single = std::is_same_v<S, float>;
  constexpr S high = single ? S(0.693359375) : S(0.693147180369123816490);
  constexpr S low = single ? S(-2.12194440054690583e-4) : S(1.90821492927058770002e-10);
  const P one = set1<P>(S(1));
  const P subnormal = less(x, set1<P>(Limits::min()));
  const P lift = set1<P>(S(typename B::Int(1) << B::kMantissa));  // makes subnormals normal
  P k;
  const P f = sub(detail::split_exponent(select(subnormal, mul(x, lift), x), k), one);
  k = sub(k, select(subnormal, set1<P>(S(B::kMantissa)), zero<P>()));
  const P s = div(f, add(f, set1<P>(S(2))));
  const P z = mul(s, s);
  P tail;
  if constexpr (single) {
    constexpr float c[] = {0.333333332772f, 0.200000609385f, 0.142754082999f, 0.116652909692f};
    tail = horner(c, z);
  } else {
    constexpr double c[] = {0.33333333333333348442, 0.19999999999949721617,  0.14285714313001634371,
                            0.11111105565129938515, 0.090914447278374739193, 0.07665855309105385784,
                            0.073082927124443109947};
    tail = horner(c, z);
  }
  const P r = add(mul(z, tail), mul(z, tail));
  const P half_square = mul(mul(f, set1<P>(S(0.5))), f);
  const P small = fma(s, add(half_square, r), mul(k, set1<P>(low)));
  const P y = fma(k, set1<P>(high), sub(f, sub(half_square, small)));
  const P edge =
      select(equal(x, zero<P>()), set1<P>(-Limits::infinity()), set1<P>(Limits::quiet_NaN()));
  const P infinity = set1<P>(Limits::infinity());
  return select(less(zero<P>(), x), select(equal(x, infinity), x, y), edge);
}

/// log(1 + x) for x >= 0, also where 1 + x rounds to 1: log(u) + (x - (u - 1)) / u with u = 1 + x rounded.
EIGENBLOCKS_SIMD P log1p(const P& x) {
  const P one = set1<P>(lane_t<P>(1));
  const P u = add(one, x);
  const P lost = select(equal(u, x), zero<P>(), sub(x, sub(u, one)));  // (u = x: huge or inf)
  return add(log(u), div(lost, u));
}

#undef EIGENBLOCKS_SIMD

}  // namespace simd

EIGENBLOCKS_NAMESPACE_END
