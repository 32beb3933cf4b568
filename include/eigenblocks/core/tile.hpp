// The register-blocked loops of the attention kernel.  They know scalars and strides, nothing of masks or scores, so they
// are instantiated once per scalar.  Design and evidence: FlashAttention's tiling (arXiv 2205.14135, 2307.08691) on the
// transposed score tile: the lanes of a register are queries, the rows of a tile are keys.  Maximum, sum and rescaling
// of the soft-max are then vertical, and neither keys nor values need a transpose in the inner loops.
//
//   score tile   S^T [keys][NQ]      = K [keys][d] Q^T [d][NQ]            tile_scores
//   output tile  O^T [e][NQ]        += V^T [e][keys] P^T [keys][NQ]       tile_accumulate
//   gradients    dK, dV [keys][c]   += P^T or dS^T [keys][NQ] * rows      tile_rows
//
// NQ = NV registers of W lanes.  A panel holds MR rows side by side, [depth][MR], so that the scalars to broadcast for one
// step are neighbours.  Register budget: MR * NV accumulators + NV operands + 1 broadcast:
//   32 registers (AVX-512)  8 x 3 -> 28      16 with FMA (AVX2)  4 x 3 -> 16      16 without (SSE2)  4 x 2 -> 12
// and kGradientRows x 2 for tile_rows (12 x 2 -> 27, 6 x 2 -> 15).
#pragma once

#include <eigenblocks/core/simd.hpp>

#include <algorithm>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Shape of the register tile for scalar S on this target.
template <RealScalar S>
struct TileShape {
#if defined(__AVX512F__) && !defined(EIGEN_DONT_VECTORIZE)
  static constexpr int kRows = 8, kVectors = 3, kGradientRows = 12;
#elif defined(__FMA__) || defined(__aarch64__)
  static constexpr int kRows = 4, kVectors = 3, kGradientRows = 6;
#else
  static constexpr int kRows = 4, kVectors = 2, kGradientRows = 6;
#endif
  static constexpr int kLanesPerVector = simd::kLanes<S>;
  static constexpr int kQueries = kVectors * kLanesPerVector;
};

template <int N, class F>
EIGENBLOCKS_ALWAYS_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }
  (std::make_integer_sequence<int, N>{});
}

/// acc[m][v] += sum_k a[k MR + m] * b[k stride + v W ...]; everything stays in registers.
template <class P, int MR, int NV>
EIGENBLOCKS_ALWAYS_INLINE void tile_multiply(P (&acc)[std::size_t(MR)][std::size_t(NV)],
                                             Index depth, const simd::lane_t<P>* a,
                                             const simd::lane_t<P>* b) {
  constexpr int w = simd::kPacketSize<P>;
  for (Index k = 0; k < depth;
       ++k, a += MR, b += NV * w) {  // (g++ 12 spills when this is unrolled)
    P row[std::size_t(NV)];
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      row[v] = simd::load<P>(b + v * w);
      simd::keep_in_register(row[v]);
    });
    unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      const P scalar = simd::set1<P>(a[m]);
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        acc[m][v] = simd::fma(scalar, row[v], acc[m][v]);
      });
    });
  }
}

/// scores[key][NQ] = panel keys times queries, for `groups` panels of MR keys; panel g starts at k_panels + g * depth * MR.
/// With kMax the column maxima are merged into top[NQ].
template <RealScalar S, int MR, int NV, bool kMax>
EIGENBLOCKS_NOINLINE void tile_scores(Index groups, Index depth, const S* k_panels,
                                      const S* queries, S* scores, S* top) {
  using P = simd::Packet<S>;
  constexpr int w = simd::kLanes<S>;
  for (Index g = 0; g < groups; ++g, k_panels += depth * MR, scores += MR * NV * w) {
    P acc[std::size_t(MR)][std::size_t(NV)];
    unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA { acc[m][v] = simd::zero<P>(); });
    });
    tile_multiply<P, MR, NV>(acc, depth, k_panels, queries);
    unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<P>(scores + (m * NV + v) * w, acc[m][v]);
      });
    });
    if constexpr (kMax) {
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        P most = acc[0][v];
        unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA { most = simd::max(most, acc[m][v]); });
        simd::store<P>(top + v * w, simd::max(simd::load<P>(top + v * w), most));
      });
    }
  }
}

enum class TileStart { zero, keep, rescale };

/// out[c][NQ] = start + sum_keys v_panels * probabilities[keys][NQ], for `groups` panels of MR channels, panel_stride apart.
/// start: zero, the old value, or the old value times factor[NQ].
template <RealScalar S, int MR, int NV, TileStart kStart>
EIGENBLOCKS_NOINLINE void tile_accumulate(Index groups, Index keys, const S* v_panels,
                                          Index panel_stride, const S* probabilities, S* out,
                                          const S* factor) {
  using P = simd::Packet<S>;
  constexpr int w = simd::kLanes<S>;
  for (Index g = 0; g < groups; ++g, v_panels += panel_stride, out += MR * NV * w) {
    P acc[std::size_t(MR)][std::size_t(NV)];
    unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        if constexpr (kStart == TileStart::zero) {
          acc[m][v] = simd::zero<P>();
        } else if constexpr (kStart == TileStart::keep) {
          acc[m][v] = simd::load<P>(out + (m * NV + v) * w);
        } else {
          acc[m][v] =
              simd::mul(simd::load<P>(out + (m * NV + v) * w), simd::load<P>(factor + v * w));
        }
      });
    });
    tile_multiply<P, MR, NV>(acc, keys, v_panels, probabilities);
    unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<P>(out + (m * NV + v) * w, acc[m][v]);
      });
    });
  }
}

/// Weights read in place from one or more tiles, rows from a matrix: for m < MR, c < NV W
///   out[m][c] += sum_{t < tiles} sum_{q < nq} weights[t tile_stride + m nq + q] * rows[(t nq + q) row_stride + c]
template <RealScalar S, int MR, int NV>
EIGENBLOCKS_ALWAYS_INLINE void tile_rows_block(Index tiles, Index tile_stride, int nq,
                                               const S* weights, const S* rows, Index row_stride,
                                               S* out, Index out_stride) {
  using P = simd::Packet<S>;
  constexpr int w = simd::kLanes<S>;
  P acc[std::size_t(MR)][std::size_t(NV)];
  unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      acc[m][v] = simd::load<P>(out + m * out_stride + v * w);
    });
  });
  for (Index t = 0; t < tiles; ++t, weights += tile_stride) {
    for (int q = 0; q < nq; ++q, rows += row_stride) {
      P row[std::size_t(NV)];
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        row[v] = simd::load<P>(rows + v * w);
        simd::keep_in_register(row[v]);
      });
      unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        const P scalar = simd::set1<P>(weights[m * nq + q]);
        unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          acc[m][v] = simd::fma(scalar, row[v], acc[m][v]);
        });
      });
    }
  }
  unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      simd::store<P>(out + m * out_stride + v * w, acc[m][v]);
    });
  });
}

/// tile_rows_block over all columns; `columns` is a multiple of W (padded), two registers at a time, then one.
template <RealScalar S, int MR>
EIGENBLOCKS_NOINLINE void tile_rows(Index columns, Index tiles, Index tile_stride, int nq,
                                    const S* weights, const S* rows, Index row_stride, S* out,
                                    Index out_stride) {
  constexpr int w = simd::kLanes<S>;
  Index c = 0;
  for (; c + 2 * w <= columns; c += 2 * w) {
    tile_rows_block<S, MR, 2>(tiles, tile_stride, nq, weights, rows + c, row_stride, out + c,
                              out_stride);
  }
  if (c < columns) {
    tile_rows_block<S, MR, 1>(tiles, tile_stride, nq, weights, rows + c, row_stride, out + c,
                              out_stride);
  }
}

/// The largest packet whose lanes divide N; the scalar where there is none.
template <RealScalar S, int N>
struct PanelPacketOf {
  using Best = typename Eigen::internal::find_best_packet<S, N>::type;
  using type = std::conditional_t<N % simd::kPacketSize<Best> == 0, Best, S>;
};
template <RealScalar S, int N>
using PanelPacket = typename PanelPacketOf<S, N>::type;

/// to[c to_stride + r] = from[r from_stride + c] for r < rows, c < cols; packets of N lanes move N x N blocks.
template <RealScalar S, int N>
void transpose_into(Index rows, Index cols, const S* from, Index from_stride, S* to,
                    Index to_stride) {
  using P = PanelPacket<S, N>;
  constexpr int w = simd::kPacketSize<P>;
  Index r = 0;
  if constexpr (w > 1) {
    for (; r + w <= rows; r += w) {
      // Rows lie far apart: what comes next is fetched meanwhile.
      simd::prefetch_rows(from, from_stride, r + w, std::min(r + 2 * w, rows), cols);
      Index c = 0;
      for (; c + w <= cols; c += w) {
        Eigen::internal::PacketBlock<P, w> block;
        for (int i = 0; i < w; ++i)
          block.packet[i] = simd::load<P>(from + (r + i) * from_stride + c);
        Eigen::internal::ptranspose(block);
        for (int i = 0; i < w; ++i) simd::store<P>(to + (c + i) * to_stride + r, block.packet[i]);
      }
      for (; c < cols; ++c) {
        for (int i = 0; i < w; ++i) to[c * to_stride + r + i] = from[(r + i) * from_stride + c];
      }
    }
  }
  for (; r < rows; ++r) {
    for (Index c = 0; c < cols; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

/// Rows in the compute scalar: the operand itself when it is stored so, else converted into `scratch` (rows x cols).
template <RealScalar S, StorageScalar T>
const S* compute_rows(Index rows, Index cols, const T* from, Index stride, S* scratch,
                      Index& out_stride) {
  if constexpr (std::is_same_v<S, T>) {
    (void)rows;
    (void)cols;
    (void)scratch;
    out_stride = stride;
    return from;
  } else {
    for (Index r = 0; r < rows; ++r) simd::convert_row(from + r * stride, scratch + r * cols, cols);
    out_stride = cols;
    return scratch;
  }
}

/// Row panels: panels[g][c][MR] for rows g MR + m, the last panel filled up with zero rows.  scratch: MR x cols.
template <int MR, RealScalar S, StorageScalar T>
void pack_row_panels(Index rows, Index cols, const T* from, Index stride, S* panels, S* scratch) {
  for (Index r = 0; r < rows; r += MR, panels += cols * MR) {
    const Index count = std::min<Index>(MR, rows - r);
    if (count < MR) std::fill_n(panels, cols * MR, S(0));
    simd::prefetch_rows(from, stride, r + 2 * MR, std::min<Index>(r + 3 * MR, rows), cols);
    Index stride_now = 0;
    const S* const source =
        compute_rows<S>(count, cols, from + r * stride, stride, scratch, stride_now);
    transpose_into<S, MR>(count, cols, source, stride_now, panels, MR);
  }
}

/// Column panels: panels[g][row][MR] for columns g MR + m, the last panel filled up with zero columns; panel_stride apart.
/// Four rows at a time, so that a panel's cache line is written whole.  scratch: 4 x cols.
template <int MR, RealScalar S, StorageScalar T>
void pack_column_panels(Index rows, Index cols, const T* from, Index stride, S* panels,
                        Index panel_stride, S* scratch) {
  using P = PanelPacket<S, MR>;
  constexpr int w = simd::kPacketSize<P>;
  const Index whole = cols / MR * MR;
  for (Index r = 0; r < rows; r += 4) {
    const Index count = std::min<Index>(4, rows - r);
    simd::prefetch_rows(from, stride, r + 8, std::min(r + 12, rows), cols);
    Index source_stride = 0;
    const S* const source =
        compute_rows<S>(count, cols, from + r * stride, stride, scratch, source_stride);
    S* to = panels + r * MR;
    Index c = 0;
    for (; c < whole; c += MR, to += panel_stride) {
      for (Index i = 0; i < count; ++i) {
        for (int m = 0; m < MR; m += w) {
          simd::store<P>(to + i * MR + m, simd::load<P>(source + i * source_stride + c + m));
        }
      }
    }
    if (c == cols) continue;
    for (Index i = 0; i < count; ++i) {
      for (int m = 0; m < MR; ++m)
        to[i * MR + m] = c + m < cols ? source[i * source_stride + c + m] : S(0);
    }
  }
}

/// One query tile: to[c][NQ] = rows transposed times factor[lane]; lanes beyond `count` are zero.  scratch: NQ x cols.
template <RealScalar S, StorageScalar T>
void pack_query_tile(Index count, Index cols, const T* from, Index stride, int nq, const S* factor,
                     S* to, S* scratch) {
  using P = simd::Packet<S>;
  constexpr int w = simd::kLanes<S>;
  if (count < nq) std::fill_n(to, cols * nq, S(0));
  Index stride_now = 0;
  const S* const source = compute_rows<S>(count, cols, from, stride, scratch, stride_now);
  transpose_into<S, w>(count, cols, source, stride_now, to, nq);
  for (Index c = 0; c < cols; ++c) {
    for (int v = 0; v < nq; v += w) {
      simd::store<P>(to + c * nq + v,
                     simd::mul(simd::load<P>(to + c * nq + v), simd::load<P>(factor + v)));
    }
  }
}

/// The way back: rows[lane][c] = tile[c][lane] for lane < count, converted to the storage scalar.  scratch: NQ x cols.
template <RealScalar S, StorageScalar T>
void unpack_query_tile(Index count, Index cols, const S* tile, int nq, T* to, Index stride,
                       S* scratch) {
  if constexpr (std::is_same_v<S, T>) {
    (void)scratch;
    transpose_into<S, simd::kLanes<S>>(cols, count, tile, nq, to, stride);
  } else {
    transpose_into<S, simd::kLanes<S>>(cols, count, tile, nq, scratch, cols);
    for (Index r = 0; r < count; ++r) simd::convert_row(scratch + r * cols, to + r * stride, cols);
  }
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
