// The tiled backward pass (arXiv 2205.14135, 2307.08691): probabilities are recomputed from the saved log-sum-exp.
// Internal to attention/; the public function is in kernel.hpp, the formulas in reference.hpp, the loops in core/tile.hpp.
//
// For a key/value head: pack K and V as score panels and K as accumulation panels.  For each of its query heads: transpose Q
// and dout into query tiles, copy their rows (rho_i q_i, dout_i) padded.  Then for every key block and group of query tiles
//   S^T = K Q^T,  dP^T = V dout^T                            tile_scores
//   P = exp(S - lse),  dS = P (dP - D) score'(S)             one sweep; D_i = <dout_i, out_i> - dlse_i
//   dQ^T += K^T dS^T                                         tile_accumulate
//   dV += P^T dout,  dK += dS^T (rho q)                      tile_rows
// five products, 2.5 times the forward.
//
// With a far branch (near_far.hpp) Q, K and their gradients exist once per branch; dS goes to the branch its score came from.
//
// Work is cut by shape: one task per key/value head, or, with few heads, kParts interleaved sets of key blocks whose dQ are
// added in a fixed order.  Results are bitwise the same for every executor.  Memory: about 8 (Tq + Tk) d scalars per task.
#pragma once

#include <eigenblocks/attention/forward_tiles.hpp>

#include <numeric>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <RealScalar S, StorageScalar T, class Rule, class Shape = TileShape<S>>
class BackwardTiles {
  using P = simd::Packet<S>;
  static constexpr int kW = simd::kLanes<S>, kMR = Shape::kRows, kNV = Shape::kVectors,
                       kNQ = kNV * kW;
  static constexpr int kGR = Shape::kGradientRows;
  static constexpr int kBranches = branches<Rule>;  // 2: near and far operands
  static constexpr Index kParts = 4, kMaxGroup = 16;
  static constexpr S kNone = -std::numeric_limits<S>::infinity();
  static constexpr bool kAccumulates = HasScoreAccumulate<typename Rule::score_type, S>;
  using RowMap = Eigen::Map<const RowVector<T>>;

 public:
  struct Operands {
    const T *query, *key, *value, *out, *dout;
    Index query_stride, key_stride, value_stride, out_stride, dout_stride;
    T *dquery, *dkey, *dvalue;
    Index dquery_stride, dkey_stride, dvalue_stride;
    const S* lse;
    Index lse_stride;
  };

  BackwardTiles(const AttentionSizes& sizes, const AttentionShape& shape, const Rule& rule,
                const AttentionTensors<S>& tensors, const AttentionTensorGradients<S>& gradients,
                const Operands& x, const TileTuning& tuning)
      : n_(sizes),
        shape_(shape),
        rule_(rule),
        tensors_(tensors),
        gradients_(gradients),
        x_(x),
        block_(round_up(std::max<Index>(1, std::min<Index>(tuning.key_block, 96)),
                        std::lcm(kMR, kGR))),
        group_tiles_(std::clamp<Index>(tuning.query_tiles, 1, kMaxGroup)),
        tiles_((n_.queries + kNQ - 1) / kNQ),
        blocks_((n_.keys + block_ - 1) / block_),
        key_rows_(round_up(n_.key_dim, kMR)),
        key_cols_(round_up(n_.key_dim, kW)),
        value_cols_(round_up(n_.value_dim, kW)),
        natural_(!std::is_same_v<typename Rule::score_type, IdentityScore> ||
                 tensors.bias != nullptr) {
    rows_[0] = {x.query,  x.query_stride,  x.key,  x.key_stride,
                x.dquery, x.dquery_stride, x.dkey, x.dkey_stride};
    static_assert(kBranches == 2 || takes_as_given<Rule>, EIGENBLOCKS_POSITION_MESSAGE);
    if constexpr (kBranches == 2) {
      const auto& far = rule.position;
      rows_[1] = {far.query,  far.query_stride,  far.key,  far.key_stride,
                  far.dquery, far.dquery_stride, far.dkey, far.dkey_stride};
    }
  }

  void run(ExecutorRef executor, Workspace& workspace) {
    if (gradients_.bias) gradients_.bias->setZero();
    if (gradients_.sinks) gradients_.sinks->setZero();
    if (gradients_.row_scale) {
      rho_gradient_.assign(static_cast<std::size_t>(n_.heads * n_.queries), S(0));
    }
    workspace.prepare(executor.workers());
    // A bias shared by the heads collects from all of them: then heads go one after another.
    const bool heads_in_turn =
        gradients_.bias && gradients_.bias->rows() == n_.queries && n_.heads > 1;
    if (n_.kv_heads >= kParts && !heads_in_turn) {
      executor.run(n_.kv_heads, [&](Index kv, int worker) {
        Buffers b(*this, workspace.arena(worker, buffer_bytes(1)), 1);
        kv_head(kv, 1, b, serial);
      });
    } else {
      const Index parts = kAccumulates ? 1 : std::clamp<Index>(blocks_, 1, kParts);
      Buffers b(*this, workspace.shared(buffer_bytes(parts)), parts);
      for (Index kv = 0; kv < n_.kv_heads; ++kv) kv_head(kv, parts, b, executor);
    }
    if (gradients_.row_scale) {
      for (Index i = 0; i < n_.queries; ++i) {
        S sum = 0;
        for (Index h = 0; h < n_.heads; ++h)
          sum += rho_gradient_[static_cast<std::size_t>(h * n_.queries + i)];
        (*gradients_.row_scale)[i] = sum;
      }
    }
  }

 private:
  /// Rows of queries and keys, and of their gradients.
  struct Rows {
    const T* query;
    Index query_stride;
    const T* key;
    Index key_stride;
    T* dquery;
    Index dquery_stride;
    T* dkey;
    Index dkey_stride;
  };
  struct Branch {
    S *k_scores, *k_panels;  // packed keys of the kv head
    S* dkey;                 // accumulator, rows padded to registers
    S* query_tiles;          // [tile][channel][NQ]
    S* query_rows;           // [row][padded channel]
    S* dquery;               // [part][tile][channel][NQ]
    S* dscore;               // [part] scratch of the sweep
  };
  struct Buffers {
    Branch branch[std::size_t(kBranches)];
    S *v_scores, *dvalue;       // as k_scores and dkey
    S *dout_tiles, *dout_rows;  // as query_tiles and query_rows
    S *lse, *delta;             // [row]; lse is +inf where there is nothing to do
    S *probability, *addend;    // [part] scratch of the sweep
    S* scratch;                 // [tile] or [key block]
    Buffers(const BackwardTiles& t, Arena arena, Index parts) {
      const Index rows = t.tiles_ * kNQ, keys = t.blocks_ * t.block_;
      for (Branch& x : branch) {
        x.k_scores = arena.take<S>(keys * t.n_.key_dim);
        x.k_panels = arena.take<S>(keys * t.key_rows_);
        x.dkey = arena.take<S>(keys * t.key_cols_);
        x.query_tiles = arena.take<S>(rows * t.n_.key_dim);
        x.query_rows = arena.take<S>(rows * t.key_cols_);
        x.dquery = arena.take<S>(parts * rows * t.key_rows_);
        x.dscore = arena.take<S>(parts * t.sweep_scalars());
      }
      v_scores = arena.take<S>(keys * t.n_.value_dim);
      dvalue = arena.take<S>(keys * t.value_cols_);
      dout_tiles = arena.take<S>(rows * t.n_.value_dim);
      dout_rows = arena.take<S>(rows * t.value_cols_);
      lse = arena.take<S>(rows);
      delta = arena.take<S>(rows);
      probability = arena.take<S>(parts * t.sweep_scalars());
      addend = arena.take<S>(parts * t.block_ * kNQ);
      scratch = arena.take<S>(std::max(t.blocks_, t.tiles_) * t.scratch_scalars());
    }
  };
  Index sweep_scalars() const { return group_tiles_ * block_ * kNQ; }
  Index scratch_scalars() const {
    return std::max(kNQ, kMR) * std::max(n_.key_dim, n_.value_dim) + kNQ;
  }
  std::size_t buffer_bytes(Index parts) const {
    const Index rows = tiles_ * kNQ, keys = blocks_ * block_;
    const Index per_branch = keys * (n_.key_dim + key_rows_ + key_cols_) +
                             rows * (n_.key_dim + key_cols_ + parts * key_rows_) +
                             parts * sweep_scalars();
    return padded_bytes<S>(kBranches * per_branch + keys * (n_.value_dim + value_cols_) +
                           rows * (n_.value_dim + value_cols_ + 2) +
                           parts * (sweep_scalars() + block_ * kNQ) +
                           std::max(blocks_, tiles_) * scratch_scalars()) +
           (9 + 7 * kBranches) * kAlignment;
  }

  void kv_head(Index kv, Index parts, Buffers& b, ExecutorRef executor) {
    executor.run(blocks_, [&](Index block, int) {
      const Index at = block * block_, keys = std::min(block_, n_.keys - at);
      const T* const v = x_.value + at * x_.value_stride + kv * n_.value_dim;
      S* const scratch = b.scratch + block * scratch_scalars();  // used for 16-bit storage only
      for (int x = 0; x < kBranches; ++x) {
        const T* const k = rows_[x].key + at * rows_[x].key_stride + kv * n_.key_dim;
        pack_row_panels<kMR>(keys, n_.key_dim, k, rows_[x].key_stride,
                             b.branch[x].k_scores + at * n_.key_dim, scratch);
        pack_column_panels<kMR>(keys, n_.key_dim, k, rows_[x].key_stride,
                                b.branch[x].k_panels + at * key_rows_, keys * kMR, scratch);
      }
      pack_row_panels<kMR>(keys, n_.value_dim, v, x_.value_stride, b.v_scores + at * n_.value_dim,
                           scratch);
    });
    for (Branch& x : b.branch) std::fill_n(x.dkey, blocks_ * block_ * key_cols_, S(0));
    std::fill_n(b.dvalue, blocks_ * block_ * value_cols_, S(0));
    for (Index r = 0; r < n_.group; ++r) {
      const Index h = kv * n_.group + r;
      executor.run(tiles_, [&](Index tile, int) { prepare_tile(h, tile, parts, b); });
      executor.run(parts, [&](Index part, int) {
        for (Index block = part; block < blocks_; block += parts) sweep(h, block, part, b);
      });
      executor.run(tiles_, [&](Index tile, int) { finish_tile(h, tile, parts, b); });
      if (gradients_.sinks) sink_gradient(h, b);
    }
    executor.run(blocks_, [&](Index block, int) {
      const S scale = static_cast<S>(n_.scale);
      for (Index j = block * block_; j < std::min(n_.keys, (block + 1) * block_); ++j) {
        for (int x = 0; x < kBranches; ++x) {
          store_row(b.branch[x].dkey + j * key_cols_, n_.key_dim, scale,
                    rows_[x].dkey + j * rows_[x].dkey_stride + kv * n_.key_dim);
        }
        store_row(b.dvalue + j * value_cols_, n_.value_dim, S(1),
                  x_.dvalue + j * x_.dvalue_stride + kv * n_.value_dim);
      }
    });
  }

  static void store_row(const S* from, Index cols, S scale, T* to) {
    Eigen::Map<RowVector<T>>(to, cols) =
        (scale * Eigen::Map<const RowVector<S>>(from, cols)).template cast<T>();
  }

  KeyRange visible(Index tile) const {
    const Index i0 = tile * kNQ + shape_.query_offset,
                i1 = std::min(n_.queries, (tile + 1) * kNQ) + shape_.query_offset;
    const KeyRange range = detail::key_range(rule_.mask, i0, i1);
    return {std::clamp<Index>(range.begin - shape_.key_offset, 0, n_.keys),
            range.end >= n_.keys + shape_.key_offset
                ? n_.keys
                : std::clamp<Index>(range.end - shape_.key_offset, 0, n_.keys)};
  }

  /// Transposed and row copies of one query tile; clears its dQ.
  void prepare_tile(Index h, Index tile, Index parts, Buffers& b) const {
    const Index row0 = tile * kNQ, count = std::min<Index>(kNQ, n_.queries - row0);
    const Index d = n_.key_dim, e = n_.value_dim;
    S* const scratch = b.scratch + tile * scratch_scalars();
    S* const factor = scratch + scratch_scalars() - kNQ;
    const T* const go = x_.dout + row0 * x_.dout_stride + h * e;
    const S unit = static_cast<S>(natural_ ? n_.scale : n_.scale * kLog2e);
    for (Index x = 0; x < kNQ; ++x) factor[x] = x < count ? unit * rho(row0 + x) : S(0);
    for (int branch = 0; branch < kBranches; ++branch) {
      const Rows& from = rows_[branch];
      Branch& to = b.branch[branch];
      const T* const q = from.query + row0 * from.query_stride + h * d;
      pack_query_tile<S>(count, d, q, from.query_stride, kNQ, factor, to.query_tiles + row0 * d,
                         scratch);
      for (Index x = 0; x < kNQ; ++x) {
        RowVectorMap query(to.query_rows + (row0 + x) * key_cols_, key_cols_);
        query.setZero();
        if (x < count)
          query.head(d) = rho(row0 + x) * RowMap(q + x * from.query_stride, d).template cast<S>();
      }
      for (Index p = 0; p < parts; ++p)
        std::fill_n(dquery_tile(to, p, tile), key_rows_ * kNQ, S(0));
    }
    std::fill_n(factor, kNQ, S(1));
    pack_query_tile<S>(count, e, go, x_.dout_stride, kNQ, factor, b.dout_tiles + row0 * e, scratch);
    for (Index x = 0; x < kNQ; ++x) {
      const Index i = row0 + x;
      RowVectorMap dout(b.dout_rows + i * value_cols_, value_cols_);
      dout.setZero();
      b.lse[i] = std::numeric_limits<S>::infinity();
      b.delta[i] = S(0);
      if (x >= count) continue;
      dout.head(e) = RowMap(go + x * x_.dout_stride, e).template cast<S>();
      const S lse = x_.lse[i * x_.lse_stride + h];
      if (lse == kNone) continue;  // no visible key: every probability is 0
      b.lse[i] = natural_ ? lse : lse * static_cast<S>(kLog2e);
      b.delta[i] =
          dout.head(e).dot(RowMap(x_.out + i * x_.out_stride + h * e, e).template cast<S>());
      if (gradients_.upstream_lse) b.delta[i] -= (*gradients_.upstream_lse)(i, h);
    }
  }
  using RowVectorMap = Eigen::Map<RowVector<S>>;
  S rho(Index i) const { return tensors_.row_scale ? (*tensors_.row_scale)[i] : S(1); }
  S* dquery_tile(const Branch& b, Index part, Index tile) const {
    return b.dquery + (part * tiles_ + tile) * key_rows_ * kNQ;
  }

  /// One key block against all query tiles.
  void sweep(Index h, Index block, Index part, Buffers& b) const {
    const Index base = block * block_, keys = std::min(block_, n_.keys - base);
    S* const probability = b.probability + part * sweep_scalars();
    S* const addend = b.addend + part * block_ * kNQ;
    for (Index first = 0; first < tiles_; first += group_tiles_) {
      const Index count = std::min(group_tiles_, tiles_ - first);
      Strip value_strips[kMaxGroup], strips[std::size_t(kBranches)][kMaxGroup];
      for (Index x = 0; x < count; ++x) {
        const KeyRange range = visible(first + x);
        const Index a = std::max(range.begin - base, Index{0}),
                    z = std::min(range.end - base, keys);
        if (a >= z) continue;
        const Index i0 = (first + x) * kNQ + shape_.query_offset;
        const Index i1 = std::min(n_.queries, (first + x + 1) * kNQ) + shape_.query_offset;
        const TileClass tile_class = detail::classify(
            rule_.mask, i0, i1, base + a + shape_.key_offset, base + z + shape_.key_offset);
        if (tile_class == TileClass::empty) continue;
        const Strip hull{a, z};
        Strip part_of[std::size_t(kBranches)];
        S* dscore[std::size_t(kBranches)];
        for (int k = 0; k < kBranches; ++k)
          dscore[k] = b.branch[k].dscore + part * sweep_scalars() + x * block_ * kNQ;
        tile(h, first + x, base, hull, keys, tile_class, part, b, probability + x * block_ * kNQ,
             dscore, addend, part_of);
        value_strips[x] = whole_rows(hull, probability + x * block_ * kNQ);
        for (int k = 0; k < kBranches; ++k) strips[k][x] = whole_rows(part_of[k], dscore[k]);
      }
      accumulate_rows(count, value_strips, probability, b.dout_rows + first * kNQ * value_cols_,
                      value_cols_, b.dvalue + base * value_cols_);
      for (int k = 0; k < kBranches; ++k) {
        Branch& branch = b.branch[k];
        accumulate_rows(count, strips[k], branch.dscore + part * sweep_scalars(),
                        branch.query_rows + first * kNQ * key_cols_, key_cols_,
                        branch.dkey + base * key_cols_);
      }
    }
  }

  /// Key rows [begin, end) of a block.
  struct Strip {
    Index begin = 0, end = 0;
  };
  /// The strip widened to whole gradient rows, the additional values cleared.
  Strip whole_rows(Strip strip, S* values) const {
    if (strip.begin == strip.end) return {};
    const Strip whole{strip.begin / kGR * kGR, std::min(round_up(strip.end, kGR), block_)};
    std::fill(values + whole.begin * kNQ, values + strip.begin * kNQ, S(0));
    std::fill(values + strip.end * kNQ, values + whole.end * kNQ, S(0));
    return whole;
  }

  /// to[key] += sum over the tiles' queries of values[tile][key][query] * rows[tile query].
  void accumulate_rows(Index tiles, const Strip* strips, const S* values, const S* rows, Index cols,
                       S* to) const {
    Index low = block_, high = 0;
    for (Index x = 0; x < tiles; ++x) {
      if (strips[x].begin == strips[x].end) continue;
      low = std::min(low, strips[x].begin);
      high = std::max(high, strips[x].end);
    }
    for (Index r = low; r < high; r += kGR) {
      const auto sees = [&](Index x) { return strips[x].begin <= r && r < strips[x].end; };
      for (Index x = 0; x < tiles;) {  // runs of tiles that see these rows
        if (!sees(x)) {
          ++x;
          continue;
        }
        Index stop = x + 1;
        while (stop < tiles && sees(stop)) ++stop;
        tile_rows<S, kGR>(cols, stop - x, block_ * kNQ, kNQ, values + (x * block_ + r) * kNQ,
                          rows + x * kNQ * cols, cols, to + r * cols, cols);
        x = stop;
      }
    }
  }

  /// Rows `hull` of one tile: probabilities, score gradients and this block's share of dQ; part_of: the rows that a branch's
  /// dscore holds.
  void tile(Index h, Index index, Index base, Strip hull, Index keys, TileClass tile_class,
            Index part, const Buffers& b, S* probability, S* const* dscore, S* addend,
            Strip* part_of) const {
    const auto [a, z] = hull;
    const Index row0 = index * kNQ, d = n_.key_dim, e = n_.value_dim;
    const Index g0 = a / kMR, g1 = (z + kMR - 1) / kMR;
    part_of[0] = hull;
    S* both = dscore[0];  // where the gradients of all rows are computed
    [[maybe_unused]] Strip mixed;
    if constexpr (kBranches == 1) {
      tile_scores<S, kMR, kNV, false>(g1 - g0, d, b.branch[0].k_scores + (base + g0 * kMR) * d,
                                      b.branch[0].query_tiles + row0 * d,
                                      probability + g0 * kMR * kNQ, nullptr);
    } else {
      const Index i0 = row0 + shape_.query_offset, j0 = base + shape_.key_offset,
                  i1 = std::min(n_.queries, row0 + kNQ) + shape_.query_offset,
                  window = rule_.position.window;
      const NearFarSplit split = near_far_split(i0, i1, j0, kMR, g0, g1, window);
      const auto operands = [&](const Branch& x) {
        return BranchOperands<S>{x.k_scores + base * d, x.query_tiles + row0 * d};
      };
      near_far_tile<S, kMR, kNV, false>(split, window, i0, j0, d, operands(b.branch[0]),
                                        operands(b.branch[1]), probability, addend, nullptr);
      mixed = {std::clamp(split.mixed_begin * kMR, a, z), std::clamp(split.mixed_end * kMR, a, z)};
      part_of[0] = {mixed.begin, z};
      part_of[1] = {a, mixed.end};
      if (mixed.begin == z) both = dscore[1];
    }
    tile_scores<S, kMR, kNV, false>(g1 - g0, e, b.v_scores + (base + g0 * kMR) * e,
                                    b.dout_tiles + row0 * e, both + g0 * kMR * kNQ, nullptr);
    if (!natural_ && tile_class == TileClass::full && tensors_.mask == nullptr) {
      plain_gradient(z - a, probability + a * kNQ, both + a * kNQ, b.lse + row0, b.delta + row0);
    } else {
      general_gradient(h, row0, base + a, base + z, tile_class, probability + a * kNQ,
                       both + a * kNQ, b.lse + row0, b.delta + row0, addend);
    }
    if constexpr (kBranches == 2) {
      if (both == dscore[0]) divide(a, mixed, row0, base, dscore[0], dscore[1]);
    }
    for (int k = 0; k < kBranches; ++k) {
      const auto [begin, end] = part_of[k];
      if (begin == end) continue;
      tile_accumulate<S, kMR, kNV, TileStart::keep>(
          key_rows_ / kMR, end - begin, b.branch[k].k_panels + base * key_rows_ + begin * kMR,
          keys * kMR, dscore[k] + begin * kNQ, dquery_tile(b.branch[k], part, index), nullptr);
    }
  }

  /// Rows [a, mixed.begin) move from near to far; those of `mixed` are divided lane by lane.
  void divide(Index a, Strip mixed, Index row0, Index base, S* near, S* far) const {
    const Index i0 = row0 + shape_.query_offset, window = rule_.position.window;
    std::copy(near + a * kNQ, near + mixed.begin * kNQ, far + a * kNQ);
    for (Index r = mixed.begin; r < mixed.end; ++r) {
      for (int v = 0; v < kNQ; v += kW) {
        const P is_far =
            far_lanes(simd::iota<P>(static_cast<S>(v)), i0, base + r + shape_.key_offset, window);
        const P gradient = simd::load<P>(near + r * kNQ + v);
        simd::store<P>(near + r * kNQ + v, simd::select(is_far, simd::zero<P>(), gradient));
        simd::store<P>(far + r * kNQ + v, simd::select(is_far, gradient, simd::zero<P>()));
      }
    }
  }

  static EIGENBLOCKS_NOINLINE void plain_gradient(Index rows, S* probability, S* dscore,
                                                  const S* lse, const S* delta) {
    P l[std::size_t(kNV)], dl[std::size_t(kNV)];
    unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
      l[v] = simd::load<P>(lse + v * kW);
      dl[v] = simd::load<P>(delta + v * kW);
    });
    for (Index r = 0; r < rows; ++r, probability += kNQ, dscore += kNQ) {
      unroll<kNV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        const P p = simd::exp2(simd::sub(simd::load<P>(probability + v * kW), l[v]));
        simd::store<P>(probability + v * kW, p);
        simd::store<P>(dscore + v * kW,
                       simd::mul(p, simd::sub(simd::load<P>(dscore + v * kW), dl[v])));
      });
    }
  }

  EIGENBLOCKS_NOINLINE void general_gradient(Index h, Index row0, Index begin, Index end,
                                             TileClass tile_class, S* probability, S* dscore,
                                             const S* lse, const S* delta, S* addend) const {
    const Index count = std::min<Index>(kNQ, n_.queries - row0);
    const Index i0 = row0 + shape_.query_offset, last = i0 + count - 1;
    const Matrix<S>* const bias = tensors_.bias;
    const Index bias_row = bias && bias->rows() != n_.queries ? h * n_.queries + row0 : row0;
    if (bias) {
      transpose_into<S, kW>(count, end - begin, bias->data() + bias_row * bias->cols() + begin,
                            bias->cols(), addend, kNQ);
      for (Index x = count; x < kNQ; ++x) {
        for (Index r = 0; r < end - begin; ++r) addend[r * kNQ + x] = S(0);
      }
    }
    const P none = simd::set1<P>(kNone);
    for (Index col = begin; col < end; ++col, probability += kNQ, dscore += kNQ, addend += kNQ) {
      const Index j = col + shape_.key_offset;
      const bool test = tile_class == TileClass::partial &&
                        detail::classify(rule_.mask, i0, last + 1, j, j + 1) != TileClass::full;
      for (int v = 0; v < kNQ; v += kW) {
        const P irel = simd::iota<P>(static_cast<S>(v));
        const P raw = simd::load<P>(probability + v);
        P s = raw;
        if (natural_) {
          s = score_lanes<P>(rule_.score, raw, irel, i0, v, last, j, h);
          if (bias) {
            const P addition = simd::load<P>(addend + v);
            s = simd::select(simd::equal(addition, none), addition, simd::add(s, addition));
          }
        }
        if (test) s = simd::select(mask_lanes<P>(rule_.mask, irel, i0, v, last, j, h), s, none);
        if (tensors_.mask) s = simd::select(bool_lanes(row0, v, count, col), s, none);
        P x = simd::sub(s, simd::load<P>(lse + v));
        if (natural_) x = simd::mul(x, simd::set1<P>(static_cast<S>(kLog2e)));
        const P hidden = simd::equal(s, none);
        const P p = simd::select(hidden, simd::zero<P>(), simd::exp2(x));
        const P ds = simd::select(
            hidden, simd::zero<P>(),
            simd::mul(p, simd::sub(simd::load<P>(dscore + v), simd::load<P>(delta + v))));
        if (natural_) {
          if (gradients_.bias) simd::store<P>(addend + v, ds);
          if constexpr (kAccumulates) accumulate(h, i0 + v, last, j, ds, raw, hidden);
          const P slope = score_grad_lanes<P>(rule_.score, raw, irel, i0, v, last, j, h);
          simd::store<P>(dscore + v, simd::select(hidden, simd::zero<P>(), simd::mul(ds, slope)));
        } else {
          simd::store<P>(dscore + v, ds);
        }
        simd::store<P>(probability + v, p);
      }
    }
    if (gradients_.bias) {
      addend -= (end - begin) * kNQ;
      Matrix<S>& g = *gradients_.bias;
      for (Index x = 0; x < count; ++x) {
        for (Index r = 0; r < end - begin; ++r) g(bias_row + x, begin + r) += addend[r * kNQ + x];
      }
    }
  }

  P bool_lanes(Index row0, Index first_lane, Index count, Index col) const {
    S keep[std::size_t(kW)];
    for (Index x = 0; x < kW; ++x) {
      keep[x] =
          first_lane + x < count && (*tensors_.mask)(row0 + first_lane + x, col) ? S(1) : S(0);
    }
    return simd::less(simd::zero<P>(), simd::load<P>(keep));
  }

  void accumulate(Index h, Index i_first, Index last, Index j, const P& ds, const P& raw,
                  const P& hidden) const {
    S gradient[std::size_t(kW)], s[std::size_t(kW)], skip[std::size_t(kW)];
    simd::store<P>(gradient, ds);
    simd::store<P>(s, raw);
    simd::store<P>(skip, simd::select(hidden, simd::set1<P>(S(1)), simd::zero<P>()));
    for (Index x = 0; x < kW && i_first + x <= last; ++x) {
      if (skip[x] == S(0)) rule_.score.accumulate(gradient[x], s[x], i_first + x, j, h);
    }
  }

  /// Adds the parts of dQ in order, writes the rows, and the head's share of the row_scale gradient.
  void finish_tile(Index h, Index tile, Index parts, Buffers& b) {
    const Index row0 = tile * kNQ, count = std::min<Index>(kNQ, n_.queries - row0), d = n_.key_dim;
    S* const scratch = b.scratch + tile * scratch_scalars();
    S* const factor = scratch + scratch_scalars() - kNQ;
    for (Index x = 0; x < kNQ; ++x)
      factor[x] = x < count ? static_cast<S>(n_.scale) * rho(row0 + x) : S(0);
    for (int branch = 0; branch < kBranches; ++branch) {
      S* const sum = dquery_tile(b.branch[branch], 0, tile);
      for (Index p = 1; p < parts; ++p) {
        RowVectorMap(sum, d * kNQ) += RowVectorMap(dquery_tile(b.branch[branch], p, tile), d * kNQ);
      }
      const Rows& rows = rows_[branch];
      if (gradients_.row_scale) {
        for (Index x = 0; x < count; ++x) {
          const T* const q = rows.query + (row0 + x) * rows.query_stride + h * d;
          S product = 0;
          for (Index c = 0; c < d; ++c) product += sum[c * kNQ + x] * static_cast<S>(q[c]);
          rho_gradient_[static_cast<std::size_t>(h * n_.queries + row0 + x)] +=
              static_cast<S>(n_.scale) * product;
        }
      }
      for (Index c = 0; c < d; ++c) {
        for (int v = 0; v < kNQ; v += kW) {
          simd::store<P>(sum + c * kNQ + v,
                         simd::mul(simd::load<P>(sum + c * kNQ + v), simd::load<P>(factor + v)));
        }
      }
      unpack_query_tile<S>(count, d, sum, kNQ, rows.dquery + row0 * rows.dquery_stride + h * d,
                           rows.dquery_stride, scratch);
    }
  }

  void sink_gradient(Index h, const Buffers& b) const {
    S sum = 0;
    for (Index i = 0; i < n_.queries; ++i) {
      const S lse = x_.lse[i * x_.lse_stride + h];
      if (lse != kNone) sum -= std::exp((*tensors_.sinks)[h] - lse) * b.delta[i];
    }
    (*gradients_.sinks)[h] = sum;
  }

  const AttentionSizes& n_;
  const AttentionShape& shape_;
  const Rule& rule_;
  const AttentionTensors<S>& tensors_;
  const AttentionTensorGradients<S>& gradients_;
  Operands x_;
  Rows rows_[std::size_t(kBranches)];
  Index block_, group_tiles_, tiles_, blocks_, key_rows_, key_cols_, value_cols_;
  bool natural_;
  std::vector<S> rho_gradient_;  // [head][row], summed over heads at the end
};

/// attention_backward with the tile sizes and the workspace chosen by the caller.
template <class Shape = void, class L, MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike O,
          MatrixLike DO, class DQ, class DK, class DV, class Rule>
void attention_backward_into(const L& lse, const Q& query, const K& key, const V& value,
                             const O& out, const DO& dout, DQ& dquery, DK& dkey, DV& dvalue,
                             const AttentionShape& shape, const Rule& rule,
                             const AttentionTensors<compute_t<scalar_t<Q>>>& tensors,
                             const AttentionTensorGradients<compute_t<scalar_t<Q>>>* gradients,
                             ExecutorRef executor, Workspace& workspace,
                             const TileTuning& tuning = {}) {
  using T = scalar_t<Q>;
  using S = compute_t<T>;
  using Tile = std::conditional_t<std::is_void_v<Shape>, TileShape<S>, Shape>;
  const AttentionSizes n = attention_sizes(query.rows(), query.cols(), key.rows(), key.cols(),
                                           value.rows(), value.cols(), shape);
  const AttentionTensorGradients<S> none;
  const AttentionTensorGradients<S>& g = gradients ? *gradients : none;
  require_tensors(tensors, n);
  require_score_heads(rule.score, n.heads);
  require_tensor_gradients(g, tensors, n);
  const Index e = n.heads * n.value_dim;
  require_shape("saved.lse", lse.rows(), lse.cols(), n.queries, n.heads, "queries x heads");
  require_shape("out", out.rows(), out.cols(), n.queries, e, "queries x heads * value_dim");
  require_shape("dout", dout.rows(), dout.cols(), n.queries, e, "shape of out");
  require_shape("dquery", dquery.rows(), dquery.cols(), query.rows(), query.cols(),
                "shape of query");
  require_shape("dkey", dkey.rows(), dkey.cols(), key.rows(), key.cols(), "shape of key");
  require_shape("dvalue", dvalue.rows(), dvalue.cols(), value.rows(), value.cols(),
                "shape of value");
  using Tiles = BackwardTiles<S, T, Rule, Tile>;
  const typename Tiles::Operands x{query.data(),         key.data(),           value.data(),
                                   out.data(),           dout.data(),          query.outerStride(),
                                   key.outerStride(),    value.outerStride(),  out.outerStride(),
                                   dout.outerStride(),   dquery.data(),        dkey.data(),
                                   dvalue.data(),        dquery.outerStride(), dkey.outerStride(),
                                   dvalue.outerStride(), lse.data(),           lse.outerStride()};
  Tiles(n, shape, rule, tensors, g, x, tuning).run(executor, workspace);
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
