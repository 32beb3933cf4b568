// The tiled forward pass: online soft-max over tiles of keys x queries (arXiv 2205.14135, 2307.08691).
// Internal to attention/; the public functions are in kernel.hpp, the definition in rule.hpp, the loops in core/tile.hpp.
//
// Order of work, all cut by shape:
//   for a batch of kv heads, for a chunk of keys (a few MB when packed):
//     pack keys and values of the chunk into panels                         (tasks: kv head x key block)
//     for every query head and block of query tiles                         (tasks)
//       for every key block, for every tile: scores -> score functor, mask -> running maximum, exp2, sum -> output
// One chunk is the rule; with more, a task merges its rows with what the chunks before left in out and lse (partial.hpp).
//
// Two numeric paths.  Without score functor and bias, log2(e) is folded into the queries and the exponential is a bare
// exp2(s - m).  Otherwise scores stay in natural units and are multiplied after the subtraction, so that finite biases down to
// the lowest float keep their meaning.
#pragma once

#include <eigenblocks/attention/near_far.hpp>
#include <eigenblocks/attention/online_softmax.hpp>
#include <eigenblocks/attention/partial.hpp>
#include <eigenblocks/attention/rule.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/tile.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <cmath>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Sizes that do not change results beyond rounding; tests vary them.
struct TileTuning {
  Index key_block =
      128;  ///< keys per tile: K and V panels of a block stay in the first-level caches
  Index query_tiles = 4;  ///< query tiles that share a key block while it is hot
  Index packed_scalars =
      Index{1} << 20;  ///< packed K and V of one kv head per chunk: 4 MB of floats
};

/// Keys and values as plain matrices.
template <StorageScalar T>
struct MatrixSource {
  const T* key;
  Index key_stride;
  const T* value;
  Index value_stride;
  template <int MR, RealScalar S>
  void pack_keys(Index kv, Index dim, Index first, Index count, S* panels, S* scratch) const {
    pack_row_panels<MR>(count, dim, key + first * key_stride + kv * dim, key_stride, panels,
                        scratch);
  }
  template <int MR, RealScalar S>
  void pack_values(Index kv, Index dim, Index first, Index count, S* panels, Index panel_stride,
                   S* scratch) const {
    pack_column_panels<MR>(count, dim, value + first * value_stride + kv * dim, value_stride,
                           panels, panel_stride, scratch);
  }
};

constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

template <RealScalar S, StorageScalar T, class Source, class Rule, class Shape = TileShape<S>>
class ForwardTiles {
  using P = simd::Packet<S>;
  static constexpr int kW = simd::kLanes<S>, kMR = Shape::kRows, kNV = Shape::kVectors,
                       kNQ = kNV * kW;
  static constexpr int kBranches = branches<Rule>;  // 2: near and far operands (near_far.hpp)
  static constexpr Index kMaxTiles = 16;
  static constexpr Index kBatchScalars = Index{1} << 21;  // packed at once to keep workers busy
  static constexpr S kNone = -std::numeric_limits<S>::infinity();

 public:
  ForwardTiles(const AttentionSizes& sizes, const AttentionShape& shape, const Rule& rule,
               const AttentionTensors<S>& tensors, const T* query, Index query_stride,
               const Source& source, T* out, Index out_stride, S* lse, Index lse_stride,
               const TileTuning& tuning)
      : n_(sizes),
        shape_(shape),
        rule_(rule),
        tensors_(tensors),
        query_(query),
        query_stride_(query_stride),
        source_(source),
        out_(out),
        out_stride_(out_stride),
        lse_(lse),
        lse_stride_(lse_stride),
        block_(round_up(std::max<Index>(1, tuning.key_block), kMR)),
        tiles_(std::clamp<Index>(tuning.query_tiles, 1, kMaxTiles)),
        value_rows_(round_up(sizes.value_dim, kMR)),
        natural_(!std::is_same_v<typename Rule::score_type, IdentityScore> ||
                 tensors.bias != nullptr) {
    const Index row = std::max<Index>(1, kBranches * n_.key_dim + value_rows_);
    chunk_ = std::max(block_, tuning.packed_scalars / row / block_ * block_);
    // One chunk where parts could not be merged: 16-bit outputs do not hold them, and next to a bias of -1e30 the
    // log-sum-exp forgets how many keys it stands for.
    if (!std::is_same_v<S, T> || tensors.bias != nullptr || chunk_ > n_.keys)
      chunk_ = std::max(block_, round_up(n_.keys, block_));
    // Packing several heads at once only helps to keep workers busy; the arithmetic is the same.
    head_scalars_ = chunk_ * row;
  }

  /// Room for a run of this many keys or fewer, so that a growing cache does not grow its scratch with every block.
  void reserve(ExecutorRef executor, Workspace& workspace) const {
    const Index together = executor.workers() == 1
                               ? head_scalars_
                               : std::min(n_.kv_heads * head_scalars_, kBatchScalars);
    workspace.shared(padded_bytes<S>(std::max(head_scalars_, together)));
  }

  void run(ExecutorRef executor, Workspace& workspace) {
    if (n_.queries == 0 || n_.heads * n_.value_dim + n_.heads == 0) return;
    const int workers = executor.workers();
    const Index batch =
        workers == 1 ? 1 : std::clamp<Index>(kBatchScalars / head_scalars_, 1, n_.kv_heads);
    const std::size_t bytes = scratch_bytes();
    workspace.prepare(workers, bytes);
    S* const packed = workspace.shared(padded_bytes<S>(batch * head_scalars_))
                          .template take<S>(batch * head_scalars_);
    const Index query_blocks = (n_.queries + tiles_ * kNQ - 1) / (tiles_ * kNQ);
    for (Index kv0 = 0; kv0 < n_.kv_heads; kv0 += batch) {
      const Index kvs = std::min(batch, n_.kv_heads - kv0);
      Index first = 0;
      do {  // once even without keys: the rows must be written
        const Index count = std::min(chunk_, n_.keys - first);
        const Index blocks = (count + block_ - 1) / block_;
        executor.run(kvs * blocks, [&](Index task, int worker) {
          Arena arena = workspace.arena(worker, bytes);
          pack(kv0 + task / blocks, first, task % blocks, count,
               packed + task / blocks * head_scalars_, arena.take<S>(pack_scalars()));
        });
        executor.run(kvs * n_.group * query_blocks, [&](Index task, int worker) {
          // Late query blocks first: under a causal mask they are the largest.
          const Index slot = task % (kvs * n_.group),
                      block = query_blocks - 1 - task / (kvs * n_.group);
          attend(kv0 * n_.group + slot, block * tiles_ * kNQ, first, count,
                 packed + slot / n_.group * head_scalars_, workspace.arena(worker, bytes));
        });
        first += count;
      } while (first < n_.keys);
    }
  }

 private:
  struct Tile {
    Index row0, count;     // query rows [row0, row0 + count)
    Index begin, end;      // visible key columns, a hull
    bool started = false;  // out holds something
    S* query[std::size_t(kBranches)];
    S *out, *top, *sum, *factor;
  };

  // Rows of a query tile or of a panel, whichever are more (without vectors a panel is).
  Index pack_scalars() const { return std::max(kNQ, kMR) * std::max(n_.key_dim, n_.value_dim); }
  std::size_t scratch_bytes() const {
    return static_cast<std::size_t>(tiles_) *
               (kBranches * padded_bytes<S>(n_.key_dim * kNQ) + padded_bytes<S>(value_rows_ * kNQ) +
                3 * padded_bytes<S>(kNQ)) +
           2 * padded_bytes<S>(block_ * kNQ) + padded_bytes<S>(pack_scalars()) +
           padded_bytes<S>(kNQ);
  }

  /// Panels of one kv head and chunk: keys [branch][chunk / MR][d][MR], then for every block values [e / MR][keys of the block][MR].
  void pack(Index kv, Index first, Index block, Index count, S* packed, S* scratch) const {
    const Index at = block * block_, keys = std::min(block_, count - at);
    source_.template pack_keys<kMR>(kv, n_.key_dim, first + at, keys, packed + at * n_.key_dim,
                                    scratch);
    if constexpr (kBranches == 2) {
      source_.template pack_far_keys<kMR>(kv, n_.key_dim, first + at, keys,
                                          packed + (chunk_ + at) * n_.key_dim, scratch);
    }
    source_.template pack_values<kMR>(kv, n_.value_dim, first + at, keys, packed + values_at(at),
                                      keys * kMR, scratch);
  }

  Index values_at(Index at) const { return kBranches * chunk_ * n_.key_dim + at * value_rows_; }

  void attend(Index h, Index row_begin, Index first, Index count, const S* packed,
              Arena arena) const {
    S* const scores = arena.take<S>(block_ * kNQ);
    S* const addend = arena.take<S>(block_ * kNQ);
    S* const scratch = arena.take<S>(pack_scalars());
    S* const block_top = arena.take<S>(kNQ);
    Index tiles = 0;
    Tile tile[kMaxTiles];
    for (; tiles < tiles_ && row_begin + tiles * kNQ < n_.queries; ++tiles) {
      Tile& t = tile[tiles];
      t.row0 = row_begin + tiles * kNQ;
      t.count = std::min<Index>(kNQ, n_.queries - t.row0);
      const Index i0 = t.row0 + shape_.query_offset;
      const KeyRange range = detail::key_range(rule_.mask, i0, i0 + t.count);
      t.begin = std::clamp<Index>(range.begin - shape_.key_offset, first, first + count);
      t.end = range.end >= n_.keys + shape_.key_offset
                  ? first + count
                  : std::clamp<Index>(range.end - shape_.key_offset, first, first + count);
      for (S*& query : t.query) query = arena.take<S>(n_.key_dim * kNQ);
      t.out = arena.take<S>(value_rows_ * kNQ);
      t.top = arena.take<S>(kNQ);
      t.sum = arena.take<S>(kNQ);
      t.factor = arena.take<S>(kNQ);
      start(t, h, first == 0, scratch);
    }
    for (Index at = 0; at < count; at += block_) {
      const Index keys = std::min(block_, count - at);
      const S* const k_panels = packed + at * n_.key_dim;
      const S* const v_panels = packed + values_at(at);
      for (Index x = 0; x < tiles; ++x) {
        const Index begin = std::max(tile[x].begin, first + at),
                    end = std::min(tile[x].end, first + at + keys);
        if (begin < end) {
          visit(tile[x], h, begin, end, first + at, keys, k_panels, v_panels, scores, addend,
                block_top);
        }
      }
    }
    for (Index x = 0; x < tiles; ++x) finish(tile[x], h, first == 0, scratch);
  }

  void start(Tile& t, Index h, bool first_chunk, S* scratch) const {
    const S unit = static_cast<S>(natural_ ? n_.scale : n_.scale * kLog2e);
    const S sink = tensors_.sinks && first_chunk
                       ? (*tensors_.sinks)[h] * static_cast<S>(natural_ ? 1.0 : kLog2e)
                       : kNone;
    for (int x = 0; x < kNQ; ++x) {
      t.top[x] = sink;
      t.sum[x] = sink == kNone ? S(0) : S(1);
      t.factor[x] = x < t.count
                        ? (tensors_.row_scale ? unit * (*tensors_.row_scale)[t.row0 + x] : unit)
                        : S(0);
    }
    if (t.begin < t.end) {
      pack_query_tile<S>(t.count, n_.key_dim, query_ + t.row0 * query_stride_ + h * n_.key_dim,
                         query_stride_, kNQ, t.factor, t.query[0], scratch);
      if constexpr (kBranches == 2) {
        pack_query_tile<S>(t.count, n_.key_dim, rule_.position.query_row(t.row0, h * n_.key_dim),
                           rule_.position.query_stride, kNQ, t.factor, t.query[1], scratch);
      }
    }
  }

  /// One tile of scores: keys [begin, end) of the block that starts at column `base`.
  void visit(Tile& t, Index h, Index begin, Index end, Index base, Index keys, const S* k_panels,
             const S* v_panels, S* scores, S* addend, S* block_top) const {
    const Index i0 = t.row0 + shape_.query_offset, i1 = i0 + t.count;
    const TileClass tile_class =
        detail::classify(rule_.mask, i0, i1, begin + shape_.key_offset, end + shape_.key_offset);
    if (tile_class == TileClass::empty) return;
    const Index a = begin - base, b = end - base;  // rows of the tile
    const Index g0 = a / kMR, g1 = (b + kMR - 1) / kMR;
    const bool plain_tile = !natural_ && tensors_.mask == nullptr && tile_class == TileClass::full;
    std::fill_n(block_top, kNQ, kNone);
    if (plain_tile && a % kMR == 0 && b % kMR == 0) {
      multiply<true>(t, base, g0, g1, k_panels, scores, addend, block_top);
    } else {
      multiply<false>(t, base, g0, g1, k_panels, scores, addend, nullptr);
      if (natural_) apply_score(t, h, begin, end, scores + a * kNQ, addend);
      if (tile_class == TileClass::partial) apply_mask(t, h, begin, end, scores + a * kNQ);
      if (tensors_.mask != nullptr) apply_bool_mask(t, begin, end, scores + a * kNQ);
      column_maximum(b - a, scores + a * kNQ, block_top);
    }
    (natural_ ? soften_tile<S, kNV, true> : soften_tile<S, kNV, false>)(b - a, scores + a * kNQ,
                                                                        block_top, t.top, t.sum,
                                                                        t.factor);
    const Index groups = value_rows_ / kMR;
    if (t.started) {
      tile_accumulate<S, kMR, kNV, TileStart::rescale>(
          groups, b - a, v_panels + a * kMR, keys * kMR, scores + a * kNQ, t.out, t.factor);
    } else {
      tile_accumulate<S, kMR, kNV, TileStart::zero>(groups, b - a, v_panels + a * kMR, keys * kMR,
                                                    scores + a * kNQ, t.out, nullptr);
      t.started = true;
    }
  }

  /// Scores of panels [g0, g1) of the block at column `base`; `spare` has room for them once more.
  template <bool kMax>
  void multiply(const Tile& t, Index base, Index g0, Index g1, const S* k_panels, S* scores,
                [[maybe_unused]] S* spare, S* top) const {
    const Index d = n_.key_dim;
    if constexpr (kBranches == 1) {
      tile_scores<S, kMR, kNV, kMax>(g1 - g0, d, k_panels + g0 * kMR * d, t.query[0],
                                     scores + g0 * kMR * kNQ, top);
    } else {
      const Index i0 = t.row0 + shape_.query_offset, j0 = base + shape_.key_offset,
                  window = rule_.position.window;
      near_far_tile<S, kMR, kNV, kMax>(near_far_split(i0, i0 + t.count, j0, kMR, g0, g1, window),
                                       window, i0, j0, d, {k_panels, t.query[0]},
                                       {k_panels + chunk_ * d, t.query[1]}, scores, spare, top);
    }
  }

  EIGENBLOCKS_NOINLINE void apply_score(const Tile& t, Index h, Index begin, Index end, S* scores,
                                        S* addend) const {
    const Index i0 = t.row0 + shape_.query_offset, last = i0 + t.count - 1;
    if (tensors_.bias != nullptr) {
      const Matrix<S>& bias = *tensors_.bias;
      const Index row = bias.rows() == n_.queries ? t.row0 : h * n_.queries + t.row0;
      transpose_into<S, kW>(t.count, end - begin, bias.data() + row * bias.cols() + begin,
                            bias.cols(), addend, kNQ);
      for (Index x = t.count; x < kNQ; ++x) {
        for (Index r = 0; r < end - begin; ++r) addend[r * kNQ + x] = S(0);
      }
    }
    for (Index j = begin; j < end; ++j, scores += kNQ, addend += kNQ) {
      for (int v = 0; v < kNQ; v += kW) {
        const P irel = simd::iota<P>(static_cast<S>(v));
        P s = score_lanes<P>(rule_.score, simd::load<P>(scores + v), irel, i0, v, last,
                             j + shape_.key_offset, h);
        if (tensors_.bias != nullptr) {
          const P b = simd::load<P>(addend + v);
          s = simd::select(simd::equal(b, simd::set1<P>(kNone)), b, simd::add(s, b));
        }
        simd::store<P>(scores + v, s);
      }
    }
  }

  EIGENBLOCKS_NOINLINE void apply_mask(const Tile& t, Index h, Index begin, Index end,
                                       S* scores) const {
    const Index i0 = t.row0 + shape_.query_offset, last = i0 + t.count - 1;
    for (Index col = begin; col < end; ++col, scores += kNQ) {
      const Index j = col + shape_.key_offset;
      const TileClass row_class = detail::classify(rule_.mask, i0, last + 1, j, j + 1);
      if (row_class == TileClass::full) continue;
      for (int v = 0; v < kNQ; v += kW) {
        const P irel = simd::iota<P>(static_cast<S>(v));
        const P keep = mask_lanes<P>(rule_.mask, irel, i0, v, last, j, h);
        simd::store<P>(scores + v,
                       simd::select(keep, simd::load<P>(scores + v), simd::set1<P>(kNone)));
      }
    }
  }

  void apply_bool_mask(const Tile& t, Index begin, Index end, S* scores) const {
    for (Index x = 0; x < t.count; ++x) {
      const bool* const keep = tensors_.mask->data() + (t.row0 + x) * tensors_.mask->cols();
      for (Index col = begin; col < end; ++col) {
        if (!keep[col]) scores[(col - begin) * kNQ + x] = kNone;
      }
    }
  }

  static void column_maximum(Index rows, const S* scores, S* top) {
    P most[std::size_t(kNV)];
    for (int v = 0; v < kNV; ++v) most[v] = simd::load<P>(top + v * kW);
    for (Index r = 0; r < rows; ++r) {
      for (int v = 0; v < kNV; ++v)
        most[v] = simd::max(most[v], simd::load<P>(scores + r * kNQ + v * kW));
    }
    for (int v = 0; v < kNV; ++v) simd::store<P>(top + v * kW, most[v]);
  }

  void finish(Tile& t, Index h, bool first_chunk, S* scratch) const {
    if (!t.started && !first_chunk) return;
    T* const out = out_ + t.row0 * out_stride_ + h * n_.value_dim;
    simd::prefetch_rows(out, out_stride_, 0, t.count, n_.value_dim);
    S lse[std::size_t(kNQ)];
    for (Index x = 0; x < t.count; ++x) {
      const bool dead = t.sum[x] == S(0);
      lse[x] = dead ? kNone : t.top[x] * static_cast<S>(natural_ ? 1.0 : kLn2) + std::log(t.sum[x]);
      t.factor[x] = dead ? S(0) : S(1) / t.sum[x];
    }
    for (Index x = t.count; x < kNQ; ++x) t.factor[x] = S(0);
    if (!t.started) {
      for (Index x = 0; x < t.count; ++x) {
        Eigen::Map<RowVector<T>>(out + x * out_stride_, n_.value_dim).setZero();
        lse_[(t.row0 + x) * lse_stride_ + h] = lse[x];
      }
      return;
    }
    for (Index c = 0; c < n_.value_dim; ++c) {
      for (int v = 0; v < kNQ; v += kW) {
        simd::store<P>(t.out + c * kNQ + v,
                       simd::mul(simd::load<P>(t.out + c * kNQ + v), simd::load<P>(t.factor + v)));
      }
    }
    if (first_chunk) {
      unpack_query_tile<S>(t.count, n_.value_dim, t.out, kNQ, out, out_stride_, scratch);
      for (Index x = 0; x < t.count; ++x) lse_[(t.row0 + x) * lse_stride_ + h] = lse[x];
    } else if constexpr (std::is_same_v<S, T>) {
      unpack_query_tile<S>(t.count, n_.value_dim, t.out, kNQ, scratch, n_.value_dim, scratch);
      using Rows = Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>>;
      Rows merged(out, t.count, n_.value_dim, Eigen::OuterStride<>(out_stride_));
      Rows merged_lse(lse_ + t.row0 * lse_stride_ + h, t.count, 1,
                      Eigen::OuterStride<>(lse_stride_));
      attention_merge_into(merged, merged_lse,
                           Eigen::Map<const Matrix<S>>(scratch, t.count, n_.value_dim),
                           Eigen::Map<const Matrix<S>>(lse, t.count, 1));
    }
  }

  const AttentionSizes& n_;
  const AttentionShape& shape_;
  const Rule& rule_;
  const AttentionTensors<S>& tensors_;
  const T* query_;
  Index query_stride_;
  Source source_;
  T* out_;
  Index out_stride_;
  S* lse_;
  Index lse_stride_;
  Index block_, tiles_, value_rows_, chunk_ = 0, head_scalars_ = 0;
  bool natural_;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
