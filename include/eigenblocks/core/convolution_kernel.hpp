// Inside of convolution.hpp: blocks of channels convolved directly and in the frequency domain.
#pragma once

#include <eigenblocks/core/fft.hpp>
#include <eigenblocks/core/fft_kernel.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cstddef>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Rows of channels: row r at data + r * stride.
template <class S>
struct ChannelRows {
  S* data;
  Index stride, rows;
  S* row(Index r) const { return data + r * stride; }
  ChannelRows columns(Index first) const { return {data + first, stride, rows}; }
};

template <class M>
auto channel_rows(M& m) {
  using T = std::remove_pointer_t<decltype(m.data())>;
  return ChannelRows<T>{m.data(), m.outerStride(), m.rows()};
}

// ---- Direct: to_i = sum_m a_m b_{kI i + kM m} over the rows that exist, + skip * plus_i.

template <int kI, int kM, int kTile, class P, RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void direct_tile(const ChannelRows<const S>& a,
                                           const ChannelRows<const S>& b, const S* skip,
                                           const ChannelRows<const S>& plus,
                                           const ChannelRows<S>& to, Index i0, Index d) {
  P sum[std::size_t(kTile)];
  for (int i = 0; i < kTile; ++i) {
    sum[i] = skip == nullptr
                 ? simd::zero<P>()
                 : simd::mul(simd::load<P>(skip + d), simd::load<P>(plus.row(i0 + i) + d));
  }
  // First and last row of b that some i of the tile meets, for m = 0.
  const Index low = std::min(kI * i0, kI * (i0 + kTile - 1)), high = low + kTile - 1;
  const Index begin = std::max<Index>(0, kM > 0 ? -high : low - b.rows + 1);
  const Index end = std::min(a.rows, kM > 0 ? b.rows - low : high + 1);
  for (Index m = begin; m < end; ++m) {
    const P factor = simd::load<P>(a.row(m) + d);
    if (low + kM * m >= 0 && high + kM * m < b.rows) {
      for (int i = 0; i < kTile; ++i) {
        sum[i] = simd::fma(factor, simd::load<P>(b.row(kI * (i0 + i) + kM * m) + d), sum[i]);
      }
    } else {
      for (int i = 0; i < kTile; ++i) {
        const Index r = kI * (i0 + i) + kM * m;
        if (r >= 0 && r < b.rows) sum[i] = simd::fma(factor, simd::load<P>(b.row(r) + d), sum[i]);
      }
    }
  }
  for (int i = 0; i < kTile; ++i) simd::store<P>(to.row(i0 + i) + d, sum[i]);
}

template <int kI, int kM, class P, RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void direct_column(const ChannelRows<const S>& a,
                                             const ChannelRows<const S>& b, const S* skip,
                                             const ChannelRows<const S>& plus,
                                             const ChannelRows<S>& to, Index d) {
  constexpr int kTile = 8;
  Index i = 0;
  for (; i + kTile <= to.rows; i += kTile)
    direct_tile<kI, kM, kTile, P>(a, b, skip, plus, to, i, d);
  for (; i < to.rows; ++i) direct_tile<kI, kM, 1, P>(a, b, skip, plus, to, i, d);
}

template <int kI, int kM, RealScalar S>
EIGENBLOCKS_NOINLINE void direct_block(const ChannelRows<const S>& a, const ChannelRows<const S>& b,
                                       const S* skip, const ChannelRows<const S>& plus,
                                       const ChannelRows<S>& to, Index lanes) {
  Index d = 0;
  for (; d + simd::kLanes<S> <= lanes; d += simd::kLanes<S>) {
    direct_column<kI, kM, simd::Packet<S>>(a, b, skip, plus, to, d);
  }
  for (; d < lanes; ++d) direct_column<kI, kM, S>(a, b, skip, plus, to, d);
}

// ---- Spectra of a block, rows bit-reversed, twice the transform; row 0 holds those of k = 0 and n/2.

/// Rows [first, first + n) of x into z, zeros where x has none.
template <RealScalar S>
void load_block(const ChannelRows<const S>& x, Index first, Index begin, Index n, Index lanes,
                S* z) {
  begin = std::clamp<Index>(std::max(begin, -first), 0, n);
  const Index end = std::clamp<Index>(x.rows - first, begin, n);
  std::fill(z, z + begin * kFftLanes<S>, S(0));
  for (Index j = begin; j < end; ++j) copy_lanes(x.row(first + j), z + j * kFftLanes<S>, lanes);
  std::fill(z + end * kFftLanes<S>, z + n * kFftLanes<S>, S(0));
}

/// The two real numbers of row 0 from a transform, and back.
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void unpack_first(const S* z, Index r, ComplexLanes<S>& x) {
  const auto v = load_lanes<S>(z + r);
  x = scaled({simd::add(v.re, v.im), simd::sub(v.re, v.im)}, S(2));
}
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> pack_first(const ComplexLanes<S>& x) {
  return {simd::add(x.re, x.im), simd::sub(x.re, x.im)};
}
/// Products of the two real numbers of row 0.
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE ComplexLanes<S> both(const ComplexLanes<S>& a, const ComplexLanes<S>& b) {
  return {simd::mul(a.re, b.re), simd::mul(a.im, b.im)};
}

/// Transform to spectrum, in place or into `to`.
template <RealScalar S>
void block_spectrum(const RealFftTables<S>& t, S* z, S* to) {
  constexpr Index w = simd::kLanes<S>;
  for (Index r = 0; r < kFftLanes<S>; r += w) {
    ComplexLanes<S> x;
    unpack_first(z, r, x);
    store_lanes(to + r, x);
  }
  t.for_each_pair([&](Index p, Index q, Index, Index at) EIGENBLOCKS_INLINE_LAMBDA {
    const auto turn = set_lanes<S>(t.turn(at));
    const Index i = p * kFftRow<S>, j = q * kFftRow<S>;
    for (Index r = 0; r < kFftLanes<S>; r += w) {
      auto a = load_lanes<S>(z + i + r), b = load_lanes<S>(z + j + r);
      unpack_real(a, b, turn);
      store_lanes(to + i + r, a);
      store_lanes(to + j + r, b);
    }
  });
}

/// z: transform of a signal -> packed product of its spectrum with `factor`; the spectrum itself to `keep` unless null.
template <RealScalar S>
void block_product(const RealFftTables<S>& t, S* z, const S* factor, S* keep) {
  constexpr Index w = simd::kLanes<S>;
  for (Index r = 0; r < kFftLanes<S>; r += w) {
    ComplexLanes<S> x;
    unpack_first(z, r, x);
    if (keep != nullptr) store_lanes(keep + r, x);
    store_lanes(z + r, pack_first<S>(both(x, load_lanes<S>(factor + r))));
  }
  t.for_each_pair([&](Index p, Index q, Index, Index at) EIGENBLOCKS_INLINE_LAMBDA {
    const auto turn = set_lanes<S>(t.turn(at));
    const Index i = p * kFftRow<S>, j = q * kFftRow<S>;
    for (Index r = 0; r < kFftLanes<S>; r += w) {
      auto a = load_lanes<S>(z + i + r), b = load_lanes<S>(z + j + r);
      unpack_real(a, b, turn);
      if (keep != nullptr) {
        store_lanes(keep + i + r, a);
        store_lanes(keep + j + r, b);
      }
      a = a * load_lanes<S>(factor + i + r);
      b = b * load_lanes<S>(factor + j + r);
      pack_real(a, b, turn);
      store_lanes(z + i + r, a);
      store_lanes(z + j + r, b);
    }
  });
}

/// z: transform of an upstream gradient g -> packed conj(kernel) G.  kAdd: `sum` += conj(input) G, a spectrum; else sum
/// becomes that, packed.
template <bool kAdd, RealScalar S>
void block_gradients(const RealFftTables<S>& t, S* z, const S* kernel, const S* input, S* sum) {
  constexpr Index w = simd::kLanes<S>;
  const auto put = [&](S* to, const ComplexLanes<S>& x) EIGENBLOCKS_INLINE_LAMBDA {
    if constexpr (kAdd) {
      store_lanes(to, load_lanes<S>(to) + x);
    } else {
      store_lanes(to, x);
    }
  };
  for (Index r = 0; r < kFftLanes<S>; r += w) {
    ComplexLanes<S> x;
    unpack_first(z, r, x);
    const auto product = both(x, load_lanes<S>(input + r));
    put(sum + r, kAdd ? product : pack_first<S>(product));
    store_lanes(z + r, pack_first<S>(both(x, load_lanes<S>(kernel + r))));
  }
  t.for_each_pair([&](Index p, Index q, Index, Index at) EIGENBLOCKS_INLINE_LAMBDA {
    const auto turn = set_lanes<S>(t.turn(at));
    const Index i = p * kFftRow<S>, j = q * kFftRow<S>;
    for (Index r = 0; r < kFftLanes<S>; r += w) {
      auto a = load_lanes<S>(z + i + r), b = load_lanes<S>(z + j + r);
      unpack_real(a, b, turn);
      auto c = conjugate_times(load_lanes<S>(input + i + r), a),
           d = conjugate_times(load_lanes<S>(input + j + r), b);
      if constexpr (!kAdd) pack_real(c, d, turn);
      if (kAdd && p == q) {  // one row, not two
        put(sum + i + r, c);
      } else {
        put(sum + i + r, c);
        put(sum + j + r, d);
      }
      a = conjugate_times(load_lanes<S>(kernel + i + r), a);
      b = conjugate_times(load_lanes<S>(kernel + j + r), b);
      pack_real(a, b, turn);
      store_lanes(z + i + r, a);
      store_lanes(z + j + r, b);
    }
  });
}

/// A sum of spectra, packed in place.
template <RealScalar S>
void block_pack(const RealFftTables<S>& t, S* z) {
  constexpr Index w = simd::kLanes<S>;
  for (Index r = 0; r < kFftLanes<S>; r += w)
    store_lanes(z + r, pack_first<S>(load_lanes<S>(z + r)));
  t.for_each_pair([&](Index p, Index q, Index, Index at) EIGENBLOCKS_INLINE_LAMBDA {
    const auto turn = set_lanes<S>(t.turn(at));
    const Index i = p * kFftRow<S>, j = q * kFftRow<S>;
    for (Index r = 0; r < kFftLanes<S>; r += w) {
      auto a = load_lanes<S>(z + i + r), b = load_lanes<S>(z + j + r);
      pack_real(a, b, turn);
      store_lanes(z + i + r, a);
      store_lanes(z + j + r, b);
    }
  });
}

/// Rows [from, from + count) of an inverted product into rows of `to` starting at `at`: scaled, + skip * plus (at the same
/// rows); kAdd adds to what is there.
template <bool kAdd, RealScalar S>
void store_block(const RealFftTables<S>& t, const S* z, Index from, Index count,
                 const ChannelRows<S>& to, Index at, const S* skip,
                 const ChannelRows<const S>& plus, Index lanes) {
  // Spectra are doubled twice, packing doubles again, the inverse multiplies by its length.
  const S scale = S(1) / (S(8) * static_cast<S>(t.inner().size()));
  const auto column = [&]<class P>(const S* in, Index row, Index d) EIGENBLOCKS_INLINE_LAMBDA {
    P value = simd::mul(simd::load<P>(in + d), simd::set1<P>(scale));
    if (skip != nullptr) {
      value = simd::fma(simd::load<P>(skip + d), simd::load<P>(plus.row(row) + d), value);
    }
    if constexpr (kAdd) value = simd::add(value, simd::load<P>(to.row(row) + d));
    simd::store<P>(to.row(row) + d, value);
  };
  for (Index j = 0; j < count; ++j) {
    const S* const in = z + (from + j) * kFftLanes<S>;
    Index d = 0;
    for (; d + simd::kLanes<S> <= lanes; d += simd::kLanes<S>) {
      column.template operator()<simd::Packet<S>>(in, at + j, d);
    }
    for (; d < lanes; ++d) column.template operator()<S>(in, at + j, d);
  }
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
