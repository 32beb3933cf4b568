// The running soft-max of a tile of queries whose keys come block by block (arXiv 1805.02867, 2205.14135).
// Internal to attention/.  A tile's lanes are NQ = NV registers of queries; its state is, for every lane,
//
//   top   the largest score so far        sum   sum of exp(score - top) so far        factor   what older sums are worth now
//
// and a block of scores [rows][NQ] turns into probabilities relative to the new top:
//
//   soften_tile<S, NV, kNatural>(rows, scores, block_top, top, sum, factor);    // block_top: the block's column maxima
//   out = out * factor + V^T scores                                             // tile_accumulate with TileStart::rescale
//   total = exponentials(x, n, shift);                                          // of one row whose maximum is known
//
// Scores are in units of log 2 (log2(e) folded into the queries), or with kNatural in natural ones.  A lane that has seen only
// -inf has top = -inf and sum = 0; its probabilities are 0.
#pragma once

#include <eigenblocks/core/tile.hpp>

#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline constexpr double kLog2e = 1.44269504088896340736;
inline constexpr double kLn2 = 0.69314718055994530942;

/// scores -> exp(scores - m) with the new running maximum m; sum = sum * factor + column sums; factor = exp(old m - m).
template <RealScalar S, int NV, bool kNatural>
EIGENBLOCKS_NOINLINE void soften_tile(Index rows, S* scores, const S* block_top, S* top, S* sum,
                                      S* factor) {
  using P = simd::Packet<S>;
  constexpr int w = simd::kLanes<S>;
  const P none = simd::set1<P>(-std::numeric_limits<S>::infinity());
  const auto exponential = [](const P& x) EIGENBLOCKS_INLINE_LAMBDA {
    if constexpr (kNatural) {
      return simd::exp2(simd::mul(x, simd::set1<P>(static_cast<S>(kLog2e))));
    } else {
      return simd::exp2(x);
    }
  };
  P reference[std::size_t(NV)], total[std::size_t(NV)];
  unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
    const P old = simd::load<P>(top + v * w);
    const P most = simd::max(old, simd::load<P>(block_top + v * w));
    // Nothing visible so far: subtract 0, so that exp(-inf) is 0 and not exp(-inf - -inf).
    reference[v] = simd::select(simd::equal(most, none), simd::zero<P>(), most);
    simd::store<P>(top + v * w, most);
    simd::store<P>(factor + v * w, exponential(simd::sub(old, reference[v])));
    total[v] = simd::zero<P>();
  });
  for (Index r = 0; r < rows; ++r, scores += NV * w) {
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      const P p = exponential(simd::sub(simd::load<P>(scores + v * w), reference[v]));
      simd::store<P>(scores + v * w, p);
      total[v] = simd::add(total[v], p);
    });
  }
  unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
    simd::store<P>(sum + v * w,
                   simd::fma(simd::load<P>(sum + v * w), simd::load<P>(factor + v * w), total[v]));
  });
}

/// x = exp(x - shift); returns the sum.
template <RealScalar S>
EIGENBLOCKS_NOINLINE S exponentials(S* x, Index count, S shift) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  Index i = 0;
  P sum = simd::zero<P>();
  for (; i + w <= count; i += w) {
    const P p = simd::exp(simd::sub(simd::load<P>(x + i), simd::set1<P>(shift)));
    simd::store<P>(x + i, p);
    sum = simd::add(sum, p);
  }
  S total = simd::sum(sum);
  for (; i < count; ++i) total += x[i] = simd::exp(x[i] - shift);
  return total;
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
