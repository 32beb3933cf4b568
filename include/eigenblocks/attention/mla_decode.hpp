// Attention over a latent cache: the core of MLA's absorbed form.
//
//   s_tj = scale <q_th, [c_j | k_rope_j]>,   out_th = sum_j softmax_j(s_tj) c_j        j <= position of row t
//
//   latent_attention(cache, query, out, heads, scale, executor);
//     query   rows x (heads * (latent_dim + rope_dim)): per head [q_nope W_UK^T | rotated q_rope]; the last rows of the cache ask
//     out     rows x (heads * latent_dim): per head a mixture of latents, still to be multiplied by W_UV
//
// This is multi-query attention with one head of keys whose values are the keys' first channels.  All (row, head) pairs are
// rows of one product: the lanes of a register are such pairs, and keys and values are scalars read in place, by row for
// the scores and by column for the sum, so that the latents are stored once and read once for up to 8 register tiles (128
// pairs of floats on AVX2).  With 16 heads and 576 channels this is 15 flop per byte: the multiply-add units are the limit,
// not memory.
//
// Positions are cut into at most 16 parts of at least kSplit tokens, which merge in order (split-KV); the cut depends on
// sizes only, so every executor gives the same bits.  Nothing is allocated once cache and scratch have their size.
// Errors (invalid_argument): heads < 1, shapes that do not fit, more rows than the cache has tokens, scale not finite.
#pragma once

#include <eigenblocks/attention/mla_cache.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/tile.hpp>

#include <cmath>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// acc[m][v] += sum_k a[k depth_stride + m row_stride] * b[k NV W + v W ...]
template <class P, int MR, int NV>
EIGENBLOCKS_ALWAYS_INLINE void tile_multiply_strided(P (&acc)[std::size_t(MR)][std::size_t(NV)],
                                                     Index depth, const simd::lane_t<P>* a,
                                                     Index depth_stride, Index row_stride,
                                                     const simd::lane_t<P>* b) {
  constexpr int w = simd::kPacketSize<P>;
  for (Index k = 0; k < depth; ++k, a += depth_stride, b += NV * w) {
    P row[std::size_t(NV)];
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      row[v] = simd::load<P>(b + v * w);
      simd::keep_in_register(row[v]);
    });
    unroll<MR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      const P scalar = simd::set1<P>(a[m * row_stride]);
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        acc[m][v] = simd::fma(scalar, row[v], acc[m][v]);
      });
    });
  }
}

/// One call: rows of queries whose (row, head) pairs fill at most kMostTiles register tiles at a time.
template <RealScalar S, StorageScalar T>
class LatentRows {
  using P = simd::Packet<S>;
  static constexpr int kW = simd::kLanes<S>;
  static constexpr int kVectors = 2;
  static constexpr int kLanes = kVectors * kW;  // pairs of a tile
  static constexpr int kRows =
      TileShape<S>::kGradientRows;                         // keys, or channels, of a register tile
  static constexpr Index kBlock = LatentCache<T>::kBlock;  // keys per soft-max update
  static constexpr Index kSplit = 21 * kBlock, kMostSplits = 16;  // about 1000 keys per part
  static constexpr Index kDepth =
      256;  // channels of a score at a time: the queries' fit the first-level cache
  static constexpr Index kTilesAtOnce =
      8;  // tiles that share a block of latents, sums in the second-level cache
  static constexpr Index kMostTiles = 16;  // bounds the scratch
  static constexpr S kNone = -std::numeric_limits<S>::infinity();
  static_assert(kBlock % kRows == 0);

 public:
  LatentRows(LatentCache<T>& cache, Index heads, S scale, const S* query, Index query_stride,
             S* out, Index out_stride, Index rows, Index first)
      : cache_(cache),
        heads_(heads),
        scale_(scale),
        query_(query),
        query_stride_(query_stride),
        out_(out),
        out_stride_(out_stride),
        first_(first),
        pairs_(rows * heads),
        tiles_((pairs_ + kLanes - 1) / kLanes),
        depth_(cache.width()),
        channels_((cache.options().latent_dim + kRows - 1) / kRows * kRows) {}

  static Index rows_at_once(Index heads) { return std::max<Index>(1, kMostTiles * kLanes / heads); }

  void run(ExecutorRef executor) {
    const Index keys = position(pairs_ - 1) + 1;
    // Counted in whole parts, so that the cut is the same whatever the capacity.
    const Index split = std::max(kSplit, round_up((keys + kMostSplits - 1) / kMostSplits, kBlock));
    const Index splits = (keys + split - 1) / split;
    const Index most = std::clamp<Index>(cache_.slots() / kSplit + 1, splits, kMostSplits);
    const Index groups = (tiles_ + kTilesAtOnce - 1) / kTilesAtOnce;
    Workspace& workspace = cache_.workspace();
    workspace.prepare(executor.workers(), scratch_bytes());
    S* const partial = workspace.shared(padded_bytes<S>(most * tiles_ * part()))
                           .template take<S>(splits * tiles_ * part());
    executor.run(groups * splits, [&](Index task, int worker) {
      const Index group = task / splits, x = task % splits;
      const Index tile = group * kTilesAtOnce;
      attend(tile, std::min(tiles_, tile + kTilesAtOnce), x * split,
             std::min(keys, (x + 1) * split), partial + x * tiles_ * part(),
             workspace.arena(worker, scratch_bytes()));
    });
    executor.run(tiles_, [&](Index tile, int) { merge(tile, splits, partial); });
  }

 private:
  static Index round_up(Index value, Index to) { return (value + to - 1) / to * to; }
  /// Scalars of a tile's partial result: sums [channel][lane], then maximum and sum of the lanes.
  Index part() const { return (channels_ + 2) * kLanes; }
  std::size_t scratch_bytes() const {
    return padded_bytes<S>(kTilesAtOnce * depth_ * kLanes) + padded_bytes<S>(kBlock * kLanes) +
           padded_bytes<S>(widened_size()) + padded_bytes<S>(kLanes);
  }
  /// A block in the compute scalar; blocks of channels may read past its last row.
  Index widened_size() const { return kBlock * cache_.stride() + Index(kAlignment); }
  static const S* widen(const T* from, Index count, S* scratch) {
    if constexpr (std::is_same_v<S, T>) {
      return from;
    } else {
      simd::convert_row(from, scratch, count);
      return scratch;
    }
  }
  Index position(Index pair) const { return first_ + pair / heads_; }
  Index count(Index tile) const { return std::min<Index>(kLanes, pairs_ - tile * kLanes); }
  /// f.template operator()<NV>(): a tile of few pairs makes do with one register.
  template <class F>
  void with_vectors(Index tile, F&& f) const {
    if (count(tile) > kW) {
      f.template operator()<kVectors>();
    } else {
      f.template operator()<1>();
    }
  }

  /// Tiles [tile0, tile1) over keys [begin, end), a block of latents at a time.
  void attend(Index tile0, Index tile1, Index begin, Index end, S* partial, Arena arena) const {
    S* const queries = arena.take<S>(kTilesAtOnce * depth_ * kLanes);
    S* const scores = arena.take<S>(kBlock * kLanes);
    S* const widened = arena.take<S>(widened_size());
    S* const factor = arena.take<S>(kLanes);
    std::fill_n(factor, kLanes, scale_);
    for (Index t = tile0; t < tile1; ++t) {
      with_vectors(t, [&]<int NV>() {
        pack_pairs<NV>(t, factor, queries + (t - tile0) * depth_ * kLanes);
        S* const sums = partial + t * part();
        std::fill_n(sums, (channels_ + 2) * NV * kW, S(0));
        std::fill_n(sums + channels_ * NV * kW, NV * kW, kNone);
      });
    }
    const Index stride = cache_.stride();
    for (Index j = begin; j < end; j += kBlock) {
      const S* const latents = widen(cache_.row(j), kBlock * stride, widened);
      for (Index t = tile0; t < tile1; ++t) {
        const Index last = position(std::min(pairs_, (t + 1) * kLanes) - 1);
        if (j > last) continue;
        with_vectors(t, [&]<int NV>() {
          block<NV>(t, j, std::min({kBlock, end - j, last + 1 - j}), latents, stride,
                    queries + (t - tile0) * depth_ * kLanes, scores, partial + t * part());
        });
      }
    }
  }

  /// to[channel][lane] = query of the lane's pair times scale; the pairs of a row are neighbours.
  template <int NV>
  void pack_pairs(Index tile, const S* factor, S* to) const {
    constexpr int nq = NV * kW;
    if (query_stride_ == heads_ * depth_) {
      pack_query_tile<S, S>(count(tile), depth_, query_ + tile * kLanes * depth_, depth_, nq,
                            factor, to, nullptr);
      return;
    }
    std::fill_n(to, depth_ * nq, S(0));
    for (Index lane = 0; lane < count(tile); ++lane) {
      const Index pair = tile * kLanes + lane;
      const S* const from = query_ + pair / heads_ * query_stride_ + pair % heads_ * depth_;
      for (Index c = 0; c < depth_; ++c) to[c * nq + lane] = scale_ * from[c];
    }
  }

  /// Scores, soft-max update and weighted sum of `keys` latents at positions j0, j0 + 1, ...
  template <int NV>
  void block(Index tile, Index j0, Index keys, const S* latents, Index stride, const S* queries,
             S* scores, S* sums) const {
    constexpr int nq = NV * kW;
    const Index groups = (keys + kRows - 1) / kRows;
    for (Index c = 0; c < depth_; c += kDepth) {
      block_scores<NV>(groups, std::min(kDepth, depth_ - c), latents + c, stride, queries + c * nq,
                       scores, c == 0);
    }
    for (Index x = std::max<Index>(0, position(tile * kLanes) + 1 - j0); x < keys; ++x) {
      for (Index lane = 0; lane < count(tile); ++lane) {
        if (j0 + x > position(tile * kLanes + lane)) scores[x * nq + lane] = kNone;
      }
    }
    S* const top = sums + channels_ * nq;
    S* const total = top + nq;
    P keep[std::size_t(NV)];
    unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      keep[v] = soften(keys, scores + v * kW, nq, top + v * kW, total + v * kW);
    });
    accumulate<NV>(keys, latents, stride, scores, keep, sums);
  }

  /// scores[key][lane] = (or +=) latents times queries over some channels.
  template <int NV>
  EIGENBLOCKS_NOINLINE void block_scores(Index groups, Index depth, const S* latents, Index stride,
                                         const S* queries, S* scores, bool set) const {
    for (Index g = 0; g < groups; ++g, latents += kRows * stride, scores += kRows * NV * kW) {
      P acc[std::size_t(kRows)][std::size_t(NV)];
      unroll<kRows>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          acc[m][v] = set ? simd::zero<P>() : simd::load<P>(scores + (m * NV + v) * kW);
        });
      });
      tile_multiply_strided<P, kRows, NV>(acc, depth, latents, 1, stride, queries);
      unroll<kRows>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          simd::store<P>(scores + (m * NV + v) * kW, acc[m][v]);
        });
      });
    }
  }

  /// One register of lanes: scores become probabilities; returns what the old sums keep.
  static P soften(Index keys, S* scores, Index nq, S* top, S* total) {
    const P old = simd::load<P>(top);
    P now = old;
    for (Index x = 0; x < keys; ++x) now = simd::max(now, simd::load<P>(scores + x * nq));
    // Without a visible key so far: any finite number gives exp(-inf - it) = 0.
    const P shift = simd::max(now, simd::set1<P>(std::numeric_limits<S>::lowest()));
    P sum = simd::zero<P>();
    for (Index x = 0; x < keys; ++x) {
      const P p = simd::exp_nonpositive(simd::sub(simd::load<P>(scores + x * nq), shift));
      simd::store<P>(scores + x * nq, p);
      sum = simd::add(sum, p);
    }
    const P keep = simd::exp_nonpositive(simd::sub(old, shift));
    simd::store<P>(total, simd::fma(simd::load<P>(total), keep, sum));
    simd::store<P>(top, now);
    return keep;
  }

  /// sums[channel][lane] = keep sums + latents transposed times probabilities.
  template <int NV>
  EIGENBLOCKS_NOINLINE void accumulate(Index keys, const S* latents, Index stride,
                                       const S* probabilities, const P (&keep)[std::size_t(NV)],
                                       S* sums) const {
    for (Index c = 0; c < channels_; c += kRows, sums += kRows * NV * kW) {
      P acc[std::size_t(kRows)][std::size_t(NV)];
      unroll<kRows>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          acc[m][v] = simd::mul(simd::load<P>(sums + (m * NV + v) * kW), keep[v]);
        });
      });
      tile_multiply_strided<P, kRows, NV>(acc, keys, latents + c, stride, 1, probabilities);
      unroll<kRows>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          simd::store<P>(sums + (m * NV + v) * kW, acc[m][v]);
        });
      });
    }
  }

  /// Adds up the parts of a tile in order, in the first part, and writes its pairs.
  void merge(Index tile, Index splits, S* partial) const {
    with_vectors(tile, [&]<int NV>() {
      constexpr int nq = NV * kW;
      const Index step = tiles_ * part();
      S* const first = partial + tile * part();
      for (Index v = 0; v < nq; v += kW) {
        S* const lanes = first + v;
        const Index top = channels_ * nq, total = top + nq;
        P most = simd::load<P>(lanes + top);
        for (Index x = 1; x < splits; ++x)
          most = simd::max(most, simd::load<P>(lanes + x * step + top));
        const P shift = simd::max(most, simd::set1<P>(std::numeric_limits<S>::lowest()));
        P weight[std::size_t(kMostSplits)], sum = simd::zero<P>();
        for (Index x = 0; x < splits; ++x) {
          weight[x] =
              simd::exp_nonpositive(simd::sub(simd::load<P>(lanes + x * step + top), shift));
          sum = simd::fma(weight[x], simd::load<P>(lanes + x * step + total), sum);
        }
        for (Index x = 0; x < splits; ++x) weight[x] = simd::div(weight[x], sum);
        for (Index c = 0; c < cache_.options().latent_dim; ++c) {
          P acc = simd::mul(weight[0], simd::load<P>(lanes + c * nq));
          for (Index x = 1; x < splits; ++x)
            acc = simd::fma(weight[x], simd::load<P>(lanes + x * step + c * nq), acc);
          simd::store<P>(lanes + c * nq, acc);
        }
      }
      write_pairs(tile, first, nq);
    });
  }

  void write_pairs(Index tile, const S* sums, int nq) const {
    const Index r = cache_.options().latent_dim;
    if (out_stride_ == heads_ * r) {
      unpack_query_tile<S, S>(count(tile), r, sums, nq, out_ + tile * kLanes * r, r, nullptr);
      return;
    }
    for (Index lane = 0; lane < count(tile); ++lane) {
      const Index pair = tile * kLanes + lane;
      S* const to = out_ + pair / heads_ * out_stride_ + pair % heads_ * r;
      for (Index c = 0; c < r; ++c) to[c] = sums[c * nq + lane];
    }
  }

  LatentCache<T>& cache_;
  Index heads_;
  S scale_;
  const S* query_;
  Index query_stride_;
  S* out_;
  Index out_stride_;
  Index first_, pairs_, tiles_;
  Index depth_, channels_;
};

}  // namespace detail

/// out from query, both in the compute scalar of the cache; row t of n asks at position size() - n + t.
template <StorageScalar T, MatrixLike Q, OutputMatrix O>
  requires SameScalar<Q, O> && std::same_as<scalar_t<Q>, compute_t<T>>
void latent_attention(LatentCache<T>& cache, const Q& query, O&& out, Index heads, double scale,
                      ExecutorRef executor = {}) {
  using S = compute_t<T>;
  using Rows = detail::LatentRows<S, T>;
  detail::require(heads >= 1, "heads (", heads, ") must be at least 1");
  detail::require_shape("query", query.rows(), query.cols(), query.rows(), heads * cache.width(),
                        "cols = heads * (latent_dim + rope_dim) of the cache");
  detail::require_shape("out", out.rows(), out.cols(), query.rows(),
                        heads * cache.options().latent_dim, "rows of query, heads * latent_dim");
  detail::require(query.rows() <= cache.size(), "query has ", query.rows(),
                  " rows, but the cache holds only ", cache.size(), " tokens");
  detail::require(std::isfinite(scale), "scale (", scale, ") must be finite");
  const Index most = Rows::rows_at_once(heads);
  for (Index t = 0; t < query.rows(); t += most) {
    const Index rows = std::min(most, query.rows() - t);
    Rows(cache, heads, static_cast<S>(scale), query.data() + t * query.outerStride(),
         query.outerStride(), out.data() + t * out.outerStride(), out.outerStride(), rows,
         cache.size() - query.rows() + t)
        .run(executor);
  }
}

EIGENBLOCKS_NAMESPACE_END
