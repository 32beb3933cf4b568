// The tiles of Transformer-VQ attention: the forward pass in linear time.
// Internal to attention/; the public functions and the definition are in vq_attention.hpp, the loops in core/tile.hpp.
//
// A tile is NQ queries (lanes) of one head; a group of tiles, rows [i, i + G), passes over the operands together.  Keys are
//   recent   tokens [i - M, i + G)      one column each, with the relative bias
//   older    tokens [0, i - M)          one column per code: log n_s on the score, the mean value mu_s
// and three facts keep it cheap:
//   * keys are codewords, so A = (q + u) C^T holds every score there is: a recent key reads row z_j of A
//   * B = (q + v_bias) R^T is computed once per distance; its entry for (i, j) lies on a diagonal, and walking the rows of B
//     with a stride one short of their length turns diagonals into columns while the tile is transposed
//   * the distances outside [0, M] are columns of B too, constant ones: 0 (or -inf without aggregate) beyond M, -inf in the
//     future.  They are the mask.
// So a query costs 2 d S + 2 d (M + 1) + 2 e S + 2 e (M + G) flops: how the sequence is cut changes nothing but rounding.
//
// Order of work, all cut by shape:
//   for every head and chunk of queries       the means of the tokens that leave the window meanwhile       (tasks)
//   for every head                            running merge: the older tokens of every chunk               (tasks)
//   for every head and chunk                  its groups, one after the other                               (tasks)
#pragma once

#include <eigenblocks/attention/online_softmax.hpp>
#include <eigenblocks/attention/vq_options.hpp>

#include <cmath>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <RealScalar S, int kTiles = 2, class Shape = TileShape<S>>
class VqTiles {
  using P = simd::Packet<S>;
  static constexpr int kW = simd::kLanes<S>, kMR = Shape::kRows, kNV = Shape::kVectors,
                       kNQ = kNV * kW;
  static constexpr Index kGroup = kTiles * kNQ;  // queries of a pass over the operands
  static constexpr Index kQueryRows = (kGroup + kMR - 1) / kMR * kMR;
  static constexpr Index kBlock = 192;  // columns between two updates of the running soft-max
  static constexpr S kNone = -std::numeric_limits<S>::infinity();

 public:
  /// Below this many rows the tiles are emptier than steps of one row are slow.
  static constexpr Index kWorthwhile = kNQ / 2;

  VqTiles(const VqAttentionSizes& sizes, const VqAttentionOperands<S>& operands, S* out,
          Index out_stride, S* lse, Index chunk = 0)
      : n_(sizes),
        x_(operands),
        out_(out),
        out_stride_(out_stride),
        lse_(lse),
        chunk_(
            up(chunk > 0 ? chunk : std::max<Index>({1024, sizes.codes, sizes.rows / 32}), kGroup)),
        chunks_((sizes.rows + chunk_ - 1) / chunk_),
        distances_(std::min(sizes.mem_len, sizes.rows + sizes.cached) + 1),
        columns_(up(distances_, kNQ)),
        bias_stride_(columns_ + 2 * kGroup),
        value_rows_(up(sizes.value_dim, kMR)),
        code_rows_(up(sizes.codes, kMR)),
        mean_stride_(code_rows_ * kMR +
                     16 * kMR),  // (not a power of two: every panel its own cache sets)
        keys_(std::min(sizes.mem_len, sizes.rows + sizes.cached) + std::min(chunk_, sizes.rows)) {}

  /// What every worker needs.
  std::size_t scratch_bytes() const {
    return padded_bytes<S>(code_rows_ * n_.dim) + padded_bytes<S>(columns_ * n_.dim) +
           padded_bytes<S>(value_rows_ * keys_) +
           padded_bytes<S>(value_rows_ / kMR * mean_stride_) + padded_bytes<S>(code_rows_) +
           padded_bytes<Index>(n_.codes) + padded_bytes<Index>(keys_) +
           padded_bytes<Index>(keys_ + 1) + padded_bytes<S>(kQueryRows * n_.dim) +
           padded_bytes<S>(scratch_rows() * packed_width()) + padded_bytes<S>(kQueryRows * n_.dim) +
           padded_bytes<S>(kQueryRows * bias_stride_) + padded_bytes<S>(kBlock * kNQ) +
           padded_bytes<S>(kNQ) +
           kTiles * (padded_bytes<S>(kNQ * n_.dim) + padded_bytes<S>(code_rows_ * kNQ) +
                     padded_bytes<S>(value_rows_ * kNQ) + 3 * padded_bytes<S>(kNQ));
  }

  /// out (and lse, rows x heads, if not null).  With counts (heads x codes) and means ((heads codes) x e), the aggregate
  /// starts from them, and they are left as it is after the last row.
  void run(ExecutorRef executor, Workspace& workspace, Index* counts, S* means) {
    if (n_.rows == 0) return;
    const Index slots = n_.aggregate || counts != nullptr ? chunks_ + 1 : 0;
    const std::size_t bytes = scratch_bytes();
    workspace.prepare(executor.workers(), bytes);
    Arena shared = workspace.shared(padded_bytes<Index>(n_.heads * slots * n_.codes) +
                                    padded_bytes<S>(n_.heads * slots * n_.codes * n_.value_dim));
    Index* const slot_counts = shared.take<Index>(n_.heads * slots * n_.codes);
    S* const slot_means = shared.take<S>(n_.heads * slots * n_.codes * n_.value_dim);
    const auto slot = [&](Index h, Index c) {
      const Index at = (h * slots + c) * n_.codes;
      return VqAggregate<S>{slot_counts + at, slot_means + at * n_.value_dim};
    };
    if (slots > 0) {
      executor.run(n_.heads * chunks_, [&](Index task, int) {
        const Index h = task / chunks_, c = task % chunks_;
        VqAggregate<S> part = slot(h, c + 1);
        clear(part);
        const Index begin = c * chunk_, end = std::min(n_.rows, begin + chunk_);
        for (Index t = std::max(begin - n_.mem_len, -n_.cached); t < end - n_.mem_len; ++t) {
          part.add(x_.code_of(n_, t, h), x_.value_of(n_, t, h), n_.value_dim);
        }
      });
      executor.run(n_.heads, [&](Index h, int) {
        VqAggregate<S> first = slot(h, 0);
        clear(first);
        if (counts != nullptr) {
          std::copy_n(counts + h * n_.codes, n_.codes, first.count);
          std::copy_n(means + h * n_.codes * n_.value_dim, n_.codes * n_.value_dim, first.mean);
        }
        for (Index c = 0; c < chunks_; ++c) slot(h, c + 1).add(slot(h, c), n_.codes, n_.value_dim);
        if (counts != nullptr) {
          const VqAggregate<S> last = slot(h, chunks_);
          std::copy_n(last.count, n_.codes, counts + h * n_.codes);
          std::copy_n(last.mean, n_.codes * n_.value_dim, means + h * n_.codes * n_.value_dim);
        }
      });
    }
    executor.run(n_.heads * chunks_, [&](Index task, int worker) {
      const Index h = task / chunks_, c = task % chunks_;
      attend(h, c * chunk_, std::min(n_.rows, (c + 1) * chunk_),
             n_.aggregate ? slot(h, c) : VqAggregate<S>{nullptr, nullptr},
             workspace.arena(worker, bytes));
    });
  }

 private:
  static constexpr Index up(Index n, Index to) { return (n + to - 1) / to * to; }
  void clear(VqAggregate<S>& part) const {
    std::fill_n(part.count, n_.codes, Index{0});
    std::fill_n(part.mean, n_.codes * n_.value_dim, S(0));
  }

  /// What a chunk works on.
  struct Chunk {
    Index h, first_key;       // keys from this token on are packed
    S *codebook, *r, *value;  // panels
    S* mean;                  // panels of the older tokens' means
    S* log_count;             // log2 n_s
    Index *count, *code;
    Index* faults;      // faults[k]: how many of the first k keys have a value that is not finite
    S *rows, *scratch;  // queries before packing
    S *biased, *bias;   // panels of q + v_bias, and B
    S *scores, *block_top;
    struct Tile {
      S *query, *products;  // q + u, and A
      S *out, *top, *sum, *factor;
      bool started;
    } tile[std::size_t(kTiles)];
  };
  using Tile = typename Chunk::Tile;
  Index scratch_rows() const { return std::max<Index>({kNQ, kMR, 4}); }
  Index packed_width() const { return std::max(n_.dim, n_.value_dim); }

  void attend(Index h, Index begin, Index end, const VqAggregate<S>& older, Arena arena) const {
    Chunk c;
    c.h = h;
    c.first_key = std::max(begin - n_.mem_len, -n_.cached);
    c.codebook = arena.take<S>(code_rows_ * n_.dim);
    c.r = arena.take<S>(columns_ * n_.dim);
    c.value = arena.take<S>(value_rows_ * keys_);
    c.mean = arena.take<S>(value_rows_ / kMR * mean_stride_);
    c.log_count = arena.take<S>(code_rows_);
    c.count = arena.take<Index>(n_.codes);
    c.code = arena.take<Index>(keys_);
    c.faults = arena.take<Index>(keys_ + 1);
    c.rows = arena.take<S>(kQueryRows * n_.dim);
    c.scratch = arena.take<S>(scratch_rows() * packed_width());
    c.biased = arena.take<S>(kQueryRows * n_.dim);
    c.bias = arena.take<S>(kQueryRows * bias_stride_);
    c.scores = arena.take<S>(kBlock * kNQ);
    c.block_top = arena.take<S>(kNQ);
    for (Tile& t : c.tile) {
      t.query = arena.take<S>(kNQ * n_.dim);
      t.products = arena.take<S>(code_rows_ * kNQ);
      t.out = arena.take<S>(value_rows_ * kNQ);
      t.top = arena.take<S>(kNQ);
      t.sum = arena.take<S>(kNQ);
      t.factor = arena.take<S>(kNQ);
    }
    pack(c, end, older);
    for (Index i = begin; i < end; i += kGroup) {
      const Index rows = std::min(kGroup, end - i);
      group(c, i, rows);
      if (!n_.aggregate) continue;
      for (Index t = std::max(i - n_.mem_len, -n_.cached); t < i + rows - n_.mem_len; ++t) {
        forget(c, c.code[t - c.first_key], x_.value_of(n_, t, h));
      }
    }
  }

  /// Codebook, r, the values of the chunk's keys and the means as panels; the constant columns of B.
  void pack(const Chunk& c, Index end, const VqAggregate<S>& older) const {
    const Index d = n_.dim, e = n_.value_dim;
    pack_row_panels<kMR>(n_.codes, d, x_.codebook + c.h * n_.codes * x_.codebook_stride,
                         x_.codebook_stride, c.codebook, c.scratch);
    c.faults[0] = 0;
    for (Index t = c.first_key, k = 0; t < end; ++t, ++k) {
      c.code[k] = x_.code_of(n_, t, c.h);
      const Eigen::Map<const RowVector<S>> value(x_.value_of(n_, t, c.h), e);
      c.faults[k + 1] = c.faults[k] + (vq_is_finite(value) ? 0 : 1);
    }
    const auto pack_values = [&](Index first, Index last) {
      if (first < last) {
        pack_column_panels<kMR>(last - first, e, x_.value_of(n_, first, c.h),
                                first >= 0 ? x_.value_stride : n_.heads * e,
                                c.value + (first - c.first_key) * kMR, keys_ * kMR, c.scratch);
      }
    };
    if (c.first_key < 0) {  // the memory is a ring
      const Index split =
          std::min<Index>(0, c.first_key + n_.mem_len - (n_.seen + c.first_key) % n_.mem_len);
      pack_values(c.first_key, split);
      pack_values(split, 0);
    }
    pack_values(std::max<Index>(0, c.first_key), end);
    if (n_.aggregate) {
      std::copy_n(older.count, n_.codes, c.count);
      for (Index s = 0; s < n_.codes; ++s) c.log_count[s] = log_count(c.count[s]);
      pack_column_panels<kMR>(n_.codes, e, older.mean, e, c.mean, mean_stride_, c.scratch);
    }
    // B: [columns beyond M][distances_ .. 0, filled up on the left][columns of the future]
    const S beyond = n_.aggregate ? S(0) : kNone;
    for (Index x = 0; x < kQueryRows; ++x) {
      S* const row = c.bias + x * bias_stride_;
      std::fill_n(row, kGroup + columns_ - distances_, beyond);
      std::fill_n(row + kGroup + columns_ - distances_, distances_, S(0));
      std::fill_n(row + kGroup + columns_, kGroup, kNone);
    }
    if (x_.r == nullptr) return;
    const S* const r = x_.r + c.h * (n_.mem_len + 1) * d;
    for (Index column = 0; column < columns_; column += kNQ) {  // (rows of r backwards)
      S* const to = c.r + column * d;
      const Index skip = std::max<Index>(0, columns_ - distances_ - column);
      if (skip > 0) std::fill_n(to, kNQ * d, S(0));
      transpose_into<S, kW>(kNQ - skip, d, r + (columns_ - 1 - column - skip) * d, -d, to + skip,
                            kNQ);
    }
  }

  static S log_count(Index n) {
    return n == 0 ? kNone : static_cast<S>(std::log2(static_cast<double>(n)));
  }

  /// A token leaves the window: its value goes into the mean of its code.
  void forget(const Chunk& c, Index s, const S* value) const {
    const S n = static_cast<S>(c.count[s]++), one_more = static_cast<S>(c.count[s]);
    const S keep = n / one_more, take = S(1) / one_more;
    c.log_count[s] = log_count(c.count[s]);
    S* to = c.mean + s * kMR;
    const Index whole = n_.value_dim / kMR * kMR;
    for (Index k = 0; k < whole; k += kMR, to += mean_stride_) {
      for (int m = 0; m < kMR; ++m) to[m] = keep * to[m] + take * value[k + m];
    }
    for (Index k = whole; k < n_.value_dim; ++k)
      to[k - whole] = keep * to[k - whole] + take * value[k];
  }

  /// A few tiles that pass over codebook, r, means and values together.
  void group(Chunk& c, Index i, Index rows) const {
    const Index d = n_.dim;
    const Index first = std::max(i - n_.mem_len, -n_.cached), last = i + rows;
    const Index tiles = (rows + kNQ - 1) / kNQ;
    query_rows(i, rows, c.h, x_.u, c.rows);
    for (Index x = 0; x < tiles; ++x) {
      Tile& t = c.tile[x];
      const Index lanes = std::min<Index>(kNQ, rows - x * kNQ);
      if (lanes < kNQ) std::fill_n(t.query, kNQ * d, S(0));
      transpose_into<S, kW>(lanes, d, c.rows + x * kNQ * d, d, t.query, kNQ);
      std::fill_n(t.top, kNQ, kNone);
      std::fill_n(t.sum, kNQ, S(0));
      t.started = false;
    }
    for (Index s = 0; s < code_rows_; s += kBlock) {
      const Index panels = std::min(kBlock, code_rows_ - s) / kMR;
      for (Index x = 0; x < tiles; ++x) {
        tile_scores<S, kMR, kNV, false>(panels, d, c.codebook + s * d, c.tile[x].query,
                                        c.tile[x].products + s * kNQ, nullptr);
      }
    }
    for (Index s = 0; n_.aggregate && s < n_.codes; s += kBlock) {
      const Index count = std::min(kBlock, n_.codes - s);
      for (Index x = 0; x < tiles; ++x) {
        Tile& t = c.tile[x];
        if (older_scores(count, t.products + s * kNQ, c.log_count + s, c.scores, c.block_top)) {
          accumulate(c, t, count, c.mean + s * kMR, mean_stride_);
        }
      }
    }
    if (x_.r != nullptr) {
      query_rows(i, rows, c.h, x_.v_bias, c.rows);
      pack_row_panels<kMR>(rows, d, c.rows, d, c.biased, c.scratch);
      relative_bias(c, (rows + kMR - 1) / kMR, last - 1 - first);
    }
    for (Index j = first; j < last; j += kBlock) {
      for (Index x = 0; x < tiles; ++x) {
        const Index i0 = i + x * kNQ, begin = j, end = std::min({j + kBlock, last, i0 + kNQ});
        if (begin >= end) continue;
        const Index count = end - begin, at = begin - c.first_key;
        // Key begin + k and lane x are i0 + x - begin - k apart; distance D is column kGroup + columns_ - 1 - D.
        const S* const bias = c.bias + x * kNQ * bias_stride_ + kGroup + columns_ - 1 - i0 + begin;
        const bool masked = end > i0 + 1 || !n_.aggregate;
        (masked ? recent_scores<true> : recent_scores<false>)(count, bias, bias_stride_ - 1,
                                                              c.tile[x].products, c.code + at,
                                                              c.scores, c.block_top);
        if (masked && c.faults[at + count] != c.faults[at]) {
          accumulate_visible(c, c.tile[x], i0, begin, count);
        } else {
          accumulate(c, c.tile[x], count, c.value + at * kMR, keys_ * kMR);
        }
      }
    }
    for (Index x = 0; x < tiles; ++x)
      finish(c, c.tile[x], i + x * kNQ, std::min<Index>(kNQ, rows - x * kNQ));
  }

  /// Scores of `count` columns become probabilities and go into the tile with the values in `panels`.
  void accumulate(const Chunk& c, Tile& t, Index count, const S* panels, Index stride) const {
    soften_tile<S, kNV, false>(count, c.scores, c.block_top, t.top, t.sum, t.factor);
    add_values(t, count, panels, stride, c.scores);
  }

  /// The same for the keys from `begin` on, where a value that is not finite goes only to the queries that see it: anywhere
  /// else a probability of 0 would make it NaN.
  void accumulate_visible(const Chunk& c, Tile& t, Index i0, Index begin, Index count) const {
    const Index at = begin - c.first_key;
    soften_tile<S, kNV, false>(count, c.scores, c.block_top, t.top, t.sum, t.factor);
    for (Index k = 0; k < count;) {
      const Index from = k;
      while (k < count && c.faults[at + k + 1] == c.faults[at + k]) ++k;
      add_values(t, k - from, c.value + (at + from) * kMR, keys_ * kMR, c.scores + from * kNQ);
      std::fill_n(t.factor, kNQ, S(1));  // older sums are rescaled once
      if (k == count) break;
      const Index j = begin + k, x0 = std::max<Index>(0, j - i0),
                  x1 = n_.aggregate ? kNQ : std::min<Index>(kNQ, j + n_.mem_len + 1 - i0);
      const S* const p = c.scores + k * kNQ;
      for (Index m = 0; m < n_.value_dim; ++m) {
        const S value = c.value[(m / kMR * keys_ + at + k) * kMR + m % kMR];
        for (Index x = x0; x < x1; ++x) t.out[m * kNQ + x] += p[x] * value;
      }
      ++k;
    }
  }

  /// out = out * factor + values * probabilities
  void add_values(Tile& t, Index count, const S* panels, Index stride, const S* p) const {
    const Index groups = value_rows_ / kMR;
    if (t.started) {
      tile_accumulate<S, kMR, kNV, TileStart::rescale>(groups, count, panels, stride, p, t.out,
                                                       t.factor);
    } else {
      tile_accumulate<S, kMR, kNV, TileStart::zero>(groups, count, panels, stride, p, t.out,
                                                    nullptr);
      t.started = true;
    }
  }

  /// log2(e) (q + shift), rows of the tile.
  void query_rows(Index i, Index rows, Index h, const S* shift, S* to) const {
    constexpr S log2e = static_cast<S>(kLog2e);
    for (Index x = 0; x < rows; ++x) {
      const Eigen::Map<const Vector<S>> q(x_.query + (i + x) * x_.query_stride + h * n_.dim,
                                          n_.dim);
      Eigen::Map<Vector<S>> row(to + x * n_.dim, n_.dim);
      if (shift == nullptr) {
        row = log2e * q;
      } else {
        row = log2e * (q + Eigen::Map<const Vector<S>>(shift + h * n_.dim, n_.dim));
      }
    }
  }

  /// B of the tile for the distances up to `farthest`.
  void relative_bias(const Chunk& c, Index groups, Index farthest) const {
    const Index d = n_.dim;
    const Index begin = std::max<Index>(0, columns_ - 1 - farthest) / kNQ * kNQ;
    for (Index column = begin; column < columns_; column += kNQ) {
      bias_tile(groups, d, c.biased, c.r + column * d, c.bias + kGroup + column, bias_stride_);
    }
    if (!n_.aggregate && begin < columns_ - distances_) {  // the product made them 0
      for (Index x = 0; x < kQueryRows; ++x) {
        std::fill_n(c.bias + x * bias_stride_ + kGroup, columns_ - distances_, kNone);
      }
    }
  }

  EIGENBLOCKS_NOINLINE static void bias_tile(Index groups, Index depth, const S* panels,
                                             const S* columns, S* to, Index stride) {
    for (Index g = 0; g < groups; ++g, panels += depth * kMR, to += kMR * stride) {
      P acc[std::size_t(kMR)][std::size_t(kNV)];
      unroll<kMR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA { acc[m][v] = simd::zero<P>(); });
      });
      tile_multiply<P, kMR, kNV>(acc, depth, panels, columns);
      unroll<kMR>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          simd::store<P>(to + m * stride + v * kW, acc[m][v]);
        });
      });
    }
  }

  /// scores = A + log2 n, -inf for a code without tokens; false if there is none with.
  EIGENBLOCKS_NOINLINE static bool older_scores(Index codes, const S* products, const S* log_count,
                                                S* scores, S* top) {
    P most[std::size_t(kNV)];
    unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA { most[v] = simd::set1<P>(kNone); });
    bool any = false;
    for (Index s = 0; s < codes; ++s, products += kNQ, scores += kNQ) {
      if (log_count[s] == kNone) {
        std::fill_n(scores, kNQ, kNone);
        continue;
      }
      any = true;
      const P shift = simd::set1<P>(log_count[s]);
      unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        const P score = simd::add(simd::load<P>(products + v * kW), shift);
        simd::store<P>(scores + v * kW, score);
        most[v] = simd::max(most[v], score);
      });
    }
    unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA { simd::store<P>(top + v * kW, most[v]); });
    return any;
  }

  /// scores = row z of A + bias of the diagonal: bias[x stride + j] for key j and lane x.  A bias of -inf is the mask.
  template <bool kMasked>
  EIGENBLOCKS_NOINLINE static void recent_scores(Index keys, const S* bias, Index stride,
                                                 const S* products, const Index* code, S* scores,
                                                 S* top) {
    const P none = simd::set1<P>(kNone);
    for (int v = 0; v < kNV; ++v) {
      P most = none;
      const auto add = [&](Index j, const P& b) EIGENBLOCKS_INLINE_LAMBDA {
        P score = simd::add(b, simd::load<P>(products + code[j] * kNQ + v * kW));
        if constexpr (kMasked) score = simd::select(simd::equal(b, none), none, score);
        simd::store<P>(scores + j * kNQ + v * kW, score);
        most = simd::max(most, score);
      };
      const S* const lanes = bias + v * kW * stride;
      Index j = 0;
      if constexpr (kW > 1) {
        for (; j + kW <= keys; j += kW) {
          Eigen::internal::PacketBlock<PanelPacket<S, kW>, kW> square;
          for (int x = 0; x < kW; ++x) square.packet[x] = simd::load<P>(lanes + x * stride + j);
          Eigen::internal::ptranspose(square);
          for (int k = 0; k < kW; ++k) add(j + k, square.packet[k]);
        }
      }
      for (; j < keys; ++j) {
        S column[std::size_t(kW)];
        for (int x = 0; x < kW; ++x) column[x] = lanes[x * stride + j];
        add(j, simd::load<P>(column));
      }
      simd::store<P>(top + v * kW, most);
    }
  }

  void finish(const Chunk& c, const Tile& t, Index i, Index rows) const {
    for (Index x = 0; x < kNQ; ++x) {
      const bool dead = t.sum[x] == S(0);  // every score -inf
      if (lse_ != nullptr && x < rows) {
        lse_[(i + x) * n_.heads + c.h] =
            dead ? kNone : t.top[x] * static_cast<S>(kLn2) + std::log(t.sum[x]);
      }
      t.factor[x] = dead ? S(0) : S(1) / t.sum[x];
    }
    for (Index k = 0; k < n_.value_dim; ++k) {
      S* const row = t.out + k * kNQ;
      for (int v = 0; v < kNQ; v += kW) {
        simd::store<P>(row + v, simd::mul(simd::load<P>(row + v), simd::load<P>(t.factor + v)));
      }
    }
    unpack_query_tile<S>(rows, n_.value_dim, t.out, kNQ,
                         out_ + i * out_stride_ + c.h * n_.value_dim, out_stride_, c.scratch);
  }

  const VqAttentionSizes n_;
  const VqAttentionOperands<S> x_;
  S* out_;
  Index out_stride_;
  S* lse_;
  Index chunk_, chunks_, distances_, columns_, bias_stride_, value_rows_, code_rows_, mean_stride_,
      keys_;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
