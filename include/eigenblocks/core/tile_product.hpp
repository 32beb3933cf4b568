// Products of small tiles, and with triangles of them: what the chunked forms of linear recurrences are made of.
//
//   strided_product(rows, columns, depth, left_factor(a, stride), b, b_stride, out, out_stride, start);   // out = start + a b
//   strided_product(..., transposed_factor(a, stride), ...);                                                 // out = start + a^T b
//   add_lower_product(n, columns, m, m_stride, x, x_stride, tile_is_finite(x, count), out);             // out_i += sum_{j <= i} m_ij x_j
//
// The tiles are in the first two caches already, so the left factor is read in place, by strides, and the right one is
// row-major with columns that are a multiple of the lanes.  For products of large matrices: product.hpp.
#pragma once

#include <eigenblocks/core/tile.hpp>
#include <eigenblocks/core/types.hpp>

#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

enum class ProductStart { zero, keep, scale_rows };

/// A factor read in place: entry (m, k) is data[m row + k depth], so that a transpose is a pair of strides.
template <RealScalar S>
struct ProductFactor {
  const S* data;
  Index row, depth;
};

template <RealScalar S, int MR, int NV>
EIGENBLOCKS_ALWAYS_INLINE void strided_product_block(Index depth, ProductFactor<S> a, const S* b,
                                                     Index b_stride, S* out, Index out_stride,
                                                     ProductStart start, const S* factor) {
  using P = simd::Packet<S>;
  constexpr int w = simd::kLanes<S>;
  P acc[std::size_t(MR)][std::size_t(NV)];
  unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA { acc[m][v] = simd::zero<P>(); });
  });
  const S* at = a.data;
  for (Index k = 0; k < depth; ++k, at += a.depth, b += b_stride) {
    P row[std::size_t(NV)];
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      row[v] = simd::load<P>(b + v * w);
      simd::keep_in_register(row[v]);
    });
    unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      const P scalar = simd::set1<P>(at[m * a.row]);
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        acc[m][v] = simd::fma(scalar, row[v], acc[m][v]);
      });
    });
  }
  unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      S* const to = out + m * out_stride + v * w;
      if (start == ProductStart::keep) {
        acc[m][v] = simd::add(simd::load<P>(to), acc[m][v]);
      } else if (start == ProductStart::scale_rows) {
        acc[m][v] = simd::fma(simd::load<P>(to), simd::set1<P>(factor[m]), acc[m][v]);
      }
      simd::store<P>(to, acc[m][v]);
    });
  });
}

template <RealScalar S, int MR>
EIGENBLOCKS_NOINLINE void strided_product_rows(Index columns, Index depth, ProductFactor<S> a,
                                               const S* b, Index b_stride, S* out, Index out_stride,
                                               ProductStart start, const S* factor) {
  constexpr int w = simd::kLanes<S>, nv = MR >= 4 ? 2 : 4;
  Index c = 0;
  for (; c + nv * w <= columns; c += nv * w)
    strided_product_block<S, MR, nv>(depth, a, b + c, b_stride, out + c, out_stride, start, factor);
  for (; c < columns; c += w)
    strided_product_block<S, MR, 1>(depth, a, b + c, b_stride, out + c, out_stride, start, factor);
}

/// out = start + a b for a (rows x depth) and row-major b (depth x columns); columns is a multiple of the lanes.
/// start: zero, the old out, or the old out with row m times factor[m].
template <RealScalar S>
void strided_product(Index rows, Index columns, Index depth, ProductFactor<S> a, const S* b,
                     Index b_stride, S* out, Index out_stride, ProductStart start,
                     const S* factor = nullptr) {
  constexpr int most = TileShape<S>::kGradientRows;
  const auto take = [&]<int MR>(std::integral_constant<int, MR>) {
    strided_product_rows<S, MR>(columns, depth, a, b, b_stride, out, out_stride, start, factor);
    rows -= MR;
    a.data += MR * a.row;
    out += MR * out_stride;
    if (factor != nullptr) factor += MR;
  };
  while (rows > 0) {  // what is left over comes in fours: 8 rows are 4 + 4, not 6 + 2
    if (rows == most || rows >= most + 4) {
      take(std::integral_constant<int, most>{});
    } else if (rows >= 4) {
      take(std::integral_constant<int, 4>{});
    } else if (rows >= 2) {
      take(std::integral_constant<int, 2>{});
    } else {
      take(std::integral_constant<int, 1>{});
    }
  }
}

/// A tile, and its transpose, as the left factor.
template <RealScalar S>
ProductFactor<S> left_factor(const S* tile, Index stride) {
  return {tile, stride, 1};
}
template <RealScalar S>
ProductFactor<S> transposed_factor(const S* tile, Index stride) {
  return {tile, 1, stride};
}

/// Whether all entries are finite; count is a multiple of the lanes.
template <RealScalar S>
EIGENBLOCKS_NOINLINE bool tile_is_finite(const S* x, Index count) {
  using P = simd::Packet<S>;
  P sum = simd::zero<P>();
  for (Index i = 0; i < count; i += simd::kLanes<S>)
    sum = simd::fma(simd::load<P>(x + i), simd::zero<P>(), sum);
  return simd::sum(sum) == S(0);
}

/// out_i += sum_{j <= i} m_ij x_j for n rows, where m is 0 above the diagonal.  Rows are taken in blocks if x is finite, else
/// one by one: the zeros of a block's rows meet the x of later tokens, and a NaN would not stay away from a product.
template <RealScalar S>
void add_lower_product(Index n, Index columns, const S* m, Index m_stride, const S* x,
                       Index x_stride, bool x_finite, S* out) {
  const Index step = x_finite ? TileShape<S>::kGradientRows : 1;
  for (Index i = 0; i < n; i += step) {
    const Index count = std::min(step, n - i);
    strided_product(count, columns, i + count, left_factor(m + i * m_stride, m_stride), x, x_stride,
                    out + i * x_stride, x_stride, ProductStart::keep);
  }
}
/// out_j += sum_{i >= j} m_ij x_i
template <RealScalar S>
void add_lower_transposed_product(Index n, Index columns, const S* m, Index m_stride, const S* x,
                                  Index x_stride, bool x_finite, S* out) {
  const Index step = x_finite ? TileShape<S>::kGradientRows : 1;
  for (Index j = 0; j < n; j += step) {
    const Index count = std::min(step, n - j);
    strided_product(count, columns, n - j, transposed_factor(m + j * m_stride + j, m_stride),
                    x + j * x_stride, x_stride, out + j * x_stride, x_stride, ProductStart::keep);
  }
}

/// Rows of an operand: where they begin, and how far they lie apart.
template <class T>
struct HeadRows {
  T* data;
  Index stride;
  T* row(Index t) const { return data + t * stride; }
};
/// The columns of m from `first` on.
template <class M>
auto head_columns(M& m, Index first = 0) {
  return HeadRows<std::remove_pointer_t<decltype(m.data())>>{m.data() + first, m.outerStride()};
}
/// The rows of m from `first` on; null for none.
template <class M>
auto head_rows(M* m, Index first = 0) {
  using T = std::remove_pointer_t<decltype(m->data())>;
  return m == nullptr ? HeadRows<T>{nullptr, 0}
                      : HeadRows<T>{m->data() + first * m->cols(), m->cols()};
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
