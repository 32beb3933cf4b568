// Attention over a key/value cache: decoding step by step, chunked prefill, and both with a sliding window.
//
//   attention_step(cache, q, k, v, out, shape, rule)       append k, v, then attend; any number of rows
//   attention_over_cache(cache, q, out, shape, rule)       attend only: the last q.rows() positions of the cache ask
//
// Query row t sits at position size - rows + t (aligned at the bottom right), and the default rule is causal().  Rows fed in
// any chunking give the rows of the full causal pass, up to rounding.  A ring cache adds window_left(window) to the rule.
// Nothing is allocated once cache and scratch have their size.
//
// Few rows (up to 16 per call) read each head's panels once for all query heads of its group: lanes are keys, and the
// positions are cut at multiples of kSplit whose parts merge in a fixed order, so results do not depend on the executor
// (split-KV, FlashDecoding).  More rows take the tiles of forward_tiles.hpp.
//
// Errors (invalid_argument): widths that do not fit the cache, shape.query_offset or key_offset not 0, bias or mask tensors
// (use the rule); std::length_error for a full fixed cache.  On an error neither cache nor out is changed.
#pragma once

#include <eigenblocks/attention/cache.hpp>
#include <eigenblocks/attention/forward_tiles.hpp>
#include <eigenblocks/attention/near_far.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Keys and values of a cache as the operands of ForwardTiles; column c is position cache.first() + c.
template <StorageScalar T>
struct CacheSource {
  const KvCache<T>* cache;
  static constexpr Index kPanel = KvCache<T>::kPanel;

  template <int MR, RealScalar S>
  void pack_keys(Index kv, Index dim, Index first, Index count, S* panels, S*) const {
    for (Index c0 = 0; c0 < count; c0 += MR, panels += dim * MR) {
      if (count - c0 < MR) std::fill_n(panels, dim * MR, S(0));
      for (Index m = 0; m < std::min<Index>(MR, count - c0); ++m) {
        const Index at = cache->slot(cache->first() + first + c0 + m);
        const T* const from = cache->key_panel(kv, at / kPanel) + at % kPanel;
        for (Index c = 0; c < dim; ++c) panels[c * MR + m] = static_cast<S>(from[c * kPanel]);
      }
    }
  }
  template <int MR, RealScalar S>
  void pack_values(Index kv, Index dim, Index first, Index count, S* panels, Index panel_stride,
                   S* scratch) const {
    for (Index r = 0; r < count;) {  // runs of neighbouring slots
      const Index at = cache->slot(cache->first() + first + r);
      const Index run = std::min(count - r, cache->slots() - at);
      pack_column_panels<MR>(run, dim, cache->value_row(kv, at), cache->value_stride(),
                             panels + r * MR, panel_stride, scratch);
      r += run;
    }
  }
};

/// The few-rows path.
template <RealScalar S, StorageScalar T, class Rule>
class DecodeRows {
  using P = simd::Packet<S>;
  static constexpr int kW = simd::kLanes<S>;
  static constexpr Index kPanel = KvCache<T>::kPanel;
  static constexpr Index kBlock =
      64;  // keys per soft-max update: K and V of a block fit the first-level cache
  static constexpr Index kSplit =
      1024;  // keys per part: enough parts for threads at 4k, too few to cost anything
  static constexpr Index kRowsAtOnce = 6;  // of queries times keys in one register tile
  // Registers of values in one register tile: with 6 rows 12 accumulators of 16 registers, 24 of 32.
  static constexpr int kRowVectors = kW < 16 ? 2 : 4;
  static constexpr int kBranches =
      branches<Rule>;  // 2: keys of the far branch, the near ones in a ring
  static constexpr S kNone = -std::numeric_limits<S>::infinity();
  static constexpr bool kPlainScore = std::is_same_v<typename Rule::score_type, IdentityScore>;
  static_assert(kPanel % kW == 0);

 public:
  static constexpr Index kMaxRows = 16;

  DecodeRows(KvCache<T>& cache, const AttentionSizes& sizes, const Rule& rule,
             const AttentionTensors<S>& tensors, const T* query, Index query_stride, T* out,
             Index out_stride, S* lse, Index lse_stride)
      : cache_(cache),
        n_(sizes),
        rule_(rule),
        tensors_(tensors),
        query_(query),
        query_stride_(query_stride),
        out_(out),
        out_stride_(out_stride),
        lse_(lse),
        lse_stride_(lse_stride),
        rows_(sizes.queries * sizes.group),
        value_cols_(cache.value_stride()) {}

  void run(ExecutorRef executor) {
    const Index first_split = cache_.first() / kSplit;
    const Index splits = std::max<Index>(1, (cache_.size() + kSplit - 1) / kSplit - first_split);
    const Index most_splits =
        cache_.slots() / kSplit + 2;  // scratch is sized by capacity, so that it rarely grows
    Workspace& workspace = cache_.workspace();
    workspace.prepare(executor.workers(), scratch_bytes());
    const Index part = rows_ * (value_cols_ + 2);
    const Index parts = n_.kv_heads * std::max(splits, most_splits);
    S* const partial =
        workspace.shared(padded_bytes<S>(parts * part)).template take<S>(parts * part);
    executor.run(n_.kv_heads * splits, [&](Index task, int worker) {
      const Index kv = task / splits, split = task % splits;
      attend(kv, (first_split + split) * kSplit, partial + task * part,
             workspace.arena(worker, scratch_bytes()));
    });
    for (Index kv = 0; kv < n_.kv_heads; ++kv)
      merge(kv, splits, partial + kv * splits * part, part);
  }

 private:
  std::size_t scratch_bytes() const {
    return kBranches * (padded_bytes<S>(rows_ * n_.key_dim) + padded_bytes<S>(rows_ * kBlock)) +
           padded_bytes<S>(kBlock * n_.key_dim) + padded_bytes<S>(kBlock * value_cols_);
  }
  Index position(Index row) const { return cache_.size() - n_.queries + row; }

  /// Keys of one split: partial = out rows (not normalised), then per row maximum and sum.
  void attend(Index kv, Index begin, S* partial, Arena arena) const {
    Branch branch[std::size_t(kBranches)];
    for (Branch& x : branch)
      x = {nullptr, arena.take<S>(rows_ * n_.key_dim), arena.take<S>(rows_ * kBlock)};
    S* const key_scratch = arena.take<S>(kBlock * n_.key_dim);
    S* const value_scratch = arena.take<S>(kBlock * value_cols_);
    S* const top = partial + rows_ * value_cols_;
    S* const sum = top + rows_;
    std::fill_n(partial, rows_ * value_cols_, S(0));
    std::fill_n(top, rows_, kNone);
    std::fill_n(sum, rows_, S(0));
    const KeyRange visible =
        detail::key_range(rule_.mask, position(0), position(n_.queries - 1) + 1);
    const Index low = std::max({begin, cache_.first(), visible.begin});
    const Index high = std::min({begin + kSplit, cache_.size(), visible.end});
    if (low >= high) return;
    for (Index r = 0; r < rows_; ++r) {  // row r = query r / group, head r % group
      const Index i = r / n_.group, h = kv * n_.group + r % n_.group;
      const S factor =
          static_cast<S>(n_.scale) * (tensors_.row_scale ? (*tensors_.row_scale)[i] : S(1));
      const auto scale_row = [&](const T* q, S* to) {
        for (Index c = 0; c < n_.key_dim; ++c) to[c] = factor * static_cast<S>(q[c]);
      };
      scale_row(query_ + i * query_stride_ + h * n_.key_dim, branch[0].query + r * n_.key_dim);
      if constexpr (kBranches == 2)
        scale_row(rule_.position.query_row(i, h * n_.key_dim), branch[1].query + r * n_.key_dim);
    }
    // Positions advance panel by panel; a block never crosses the end of the ring, and starts on a panel.
    for (Index p = low; p < high;) {
      const Index at = cache_.slot(p), lane0 = at % kPanel;
      const Index base = p - lane0;  // position that lane 0 of the first panel would have
      Index end = std::min({high, base + kBlock, p + cache_.slots() - at});
      if constexpr (kBranches == 1) {
        branch[0].keys = cache_.key_panel(kv, at / kPanel);
      } else {
        end = choose_branches(kv, at / kPanel, p, end, branch);
      }
      block(kv, at / kPanel, base, p, end, branch, key_scratch, value_scratch, partial, top, sum);
      p = end;
    }
  }

  /// One block's keys, null when it has none of the branch; query rows; scores of the block.
  struct Branch {
    const T* keys;
    S *query, *scores;
  };

  /// Keys of the branches for positions from p on, and where they end: blocks are cut where the window of a row begins, so
  /// that only keys near to some rows and far to others are multiplied twice.
  Index choose_branches(Index kv, Index panel, Index p, Index end, Branch* branch) const {
    const auto& near = rule_.position;
    const Index far_end = position(0) - near.window + 1,
                near_begin = position(n_.queries - 1) - near.window + 1;
    branch[0].keys = branch[1].keys = nullptr;
    if (p < near_begin) branch[1].keys = cache_.key_panel(kv, panel);
    if (p < far_end) return std::min(end, far_end);
    const Index at = near.ring->slot(p);
    branch[0].keys = near.ring->key_panel(kv, at / kPanel);
    if (p < near_begin) end = std::min(end, near_begin);
    return std::min(end, p + near.ring->slots() - at);
  }

  /// Keys [begin, end) at positions base + lane of consecutive panels.
  void block(Index kv, Index panel, Index base, Index begin, Index end, const Branch* branch,
             S* key_scratch, S* value_scratch, S* out, S* top, S* sum) const {
    const Index d = n_.key_dim, panels = (end - base + kPanel - 1) / kPanel,
                width = panels * kPanel;
    const T* const v = cache_.value_row(kv, panel * kPanel);
    const Index first = begin - base;
    // 16-bit entries are widened where they are used, unless several groups of rows use them.
    const bool widen = !std::is_same_v<S, T> && rows_ > kRowsAtOnce;
    const auto widened = [&](const T* from, S* to, Index count, const auto& use) {
      if constexpr (!std::is_same_v<S, T>) {
        if (widen) {
          simd::convert_row(from, to, count);
          return use(static_cast<const S*>(to));
        }
      }
      use(from);
    };
    S* scores = branch[0].scores;
    const T* next = nullptr;
    for (int x = 0; x < kBranches; ++x) {
      if (kBranches == 2 && branch[x].keys == nullptr) continue;
      scores = branch[x].scores;
      next = branch[x].keys + width * d;
      widened(branch[x].keys, key_scratch, width * d,
              [&](const auto* keys) { block_scores(panels, keys, branch[x].query, scores, v); });
    }
    if constexpr (kBranches == 2) {
      if (branch[0].keys && branch[1].keys) scores = choose_scores(base, width, branch);
    }
    for (Index r = 0; r < rows_; ++r)
      soften(kv, r, base, begin, end, width, scores + r * kBlock, out, top, sum);
    widened(v, value_scratch, width * value_cols_, [&](const auto* values) {
      add_values(end - begin, scores + first, values + first * value_cols_, out, next);
    });
  }

  /// Of each row's two scores the one its distance asks for.
  S* choose_scores(Index base, Index width, const Branch* branch) const {
    for (Index r = 0; r < rows_; ++r) {
      const Index far = position(r / n_.group) - rule_.position.window + 1 - base;
      const Index count = std::clamp<Index>(far, 0, width);
      std::copy_n(branch[1].scores + r * kBlock, count, branch[0].scores + r * kBlock);
    }
    return branch[0].scores;
  }

  /// Memory that is needed soon, fetched evenly over `turns` turns of a loop: a burst would block the loop's own loads.
  class Ahead {
   public:
    Ahead() = default;  // nothing
    Ahead(const T* from, Index count, Index turns)
        : at_(reinterpret_cast<const char*>(from)),
          step_(turns > 0 ? count * Index(sizeof(T)) / turns : 0) {}
    EIGENBLOCKS_ALWAYS_INLINE void fetch() {
      simd::prefetch(at_);
      at_ += step_;
    }
    void skip(Index turns) { at_ += turns * step_; }

   private:
    const char* at_ = nullptr;
    Index step_ = 0;
  };

  /// f.template operator()<M>(r) for groups of M rows from r on: six (and four) rows keep both multiply-add units busy.
  template <class F>
  void in_row_groups(F&& f) const {
    Index r = 0;
    for (; rows_ - r >= 6 && rows_ - r != 8; r += 6) f.template operator()<6>(r);
    for (; rows_ - r >= 4; r += 4) f.template operator()<4>(r);
    for (; rows_ - r >= 2; r += 2) f.template operator()<2>(r);
    if (r < rows_) f.template operator()<1>(r);
  }

  /// scores[r][lane] = <query row r, key lane> for consecutive panels of keys.
  template <class K>
  void block_scores(Index panels, const K* keys, const S* query, S* scores, const T* values) const {
    for (Index x = 0; x < panels; ++x) {
      // While the panel is multiplied, its values are on their way.
      Ahead ahead(values + x * kPanel * value_cols_, kPanel * value_cols_, n_.key_dim);
      in_row_groups([&]<int M>(Index r) EIGENBLOCKS_INLINE_LAMBDA {
        rows_times_panel<M>(r, keys + x * kPanel * n_.key_dim, query, scores + x * kPanel, ahead);
        ahead = {};
      });
    }
  }

  template <int M, class K>
  EIGENBLOCKS_NOINLINE void rows_times_panel(Index r0, const K* panel, const S* query, S* scores,
                                             Ahead ahead) const {
    constexpr int nv = int(kPanel) / kW;
    const Index d = n_.key_dim;
    P acc[std::size_t(M)][std::size_t(nv)];
    unroll<M>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<nv>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA { acc[m][v] = simd::zero<P>(); });
    });
    const S* const q = query + r0 * d;
    for (Index c = 0; c < d; ++c, panel += kPanel) {
      ahead.fetch();
      P key[std::size_t(nv)];
      unroll<nv>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        key[v] = simd::load_as<P>(panel + v * kW);
        simd::keep_in_register(key[v]);
      });
      unroll<M>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        const P scalar = simd::set1<P>(q[m * d + c]);
        unroll<nv>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          acc[m][v] = simd::fma(scalar, key[v], acc[m][v]);
        });
      });
    }
    unroll<M>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<nv>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<P>(scores + (r0 + m) * kBlock + v * kW, acc[m][v]);
      });
    });
  }

  /// Score functor, mask and running soft-max of one row over one block; leaves probabilities, 0 outside [begin, end).
  void soften(Index kv, Index r, Index base, Index begin, Index end, Index width, S* s, S* out,
              S* top, S* sum) const {
    const Index i = position(r / n_.group), h = kv * n_.group + r % n_.group;
    if constexpr (!kPlainScore) apply_score(i, h, base, begin, end, width, s);
    std::fill(s, s + (begin - base), kNone);
    std::fill(s + (end - base), s + width, kNone);
    if (detail::classify(rule_.mask, i, i + 1, begin, end) != TileClass::full) {
      for (Index j = begin; j < end; ++j) {
        if (!rule_.mask(i, j, h)) s[j - base] = kNone;
      }
    }
    P most = simd::set1<P>(kNone);
    for (Index x = 0; x < width; x += kW) most = simd::max(most, simd::load<P>(s + x));
    const S old = top[r], now = std::max(old, simd::max_lane(most));
    const S reference = now == kNone ? S(0) : now;
    const P shift = simd::set1<P>(reference);
    const P log2e = simd::set1<P>(static_cast<S>(kLog2e));
    P total = simd::zero<P>();
    for (Index x = 0; x < width; x += kW) {
      const P p = simd::exp2(simd::mul(simd::sub(simd::load<P>(s + x), shift), log2e));
      simd::store<P>(s + x, p);
      total = simd::add(total, p);
    }
    const S keep = old == now ? S(1) : old == kNone ? S(0) : std::exp(old - reference);
    if (keep != S(1)) {
      Eigen::Map<Vector<S>>(out + r * value_cols_, value_cols_) *= keep;
      sum[r] *= keep;
    }
    sum[r] += simd::sum(total);
    top[r] = now;
  }

  void apply_score(Index i, Index h, Index base, Index begin, Index end, Index width, S* s) const {
    if constexpr (RelativeScore<typename Rule::score_type> &&
                  requires(P packet) { rule_.score.lanes(packet, packet, i, base, h); }) {
      // Only i - j counts: key base + x seen from i is key base seen from i - x.
      for (Index x = 0; x < width; x += kW) {
        const P irel = simd::neg(simd::iota<P>(static_cast<S>(x)));
        simd::store<P>(s + x, rule_.score.lanes(simd::load<P>(s + x), irel, i, base, h));
      }
    } else {
      for (Index j = begin; j < end; ++j) s[j - base] = rule_.score(s[j - base], i, j, h);
    }
  }

  /// out rows += probabilities times value rows; fetches the next keys meanwhile.
  template <class V>
  void add_values(Index keys, const S* probabilities, const V* values, S* out,
                  const T* ahead) const {
    Ahead fetch(ahead, keys * n_.key_dim, keys * (value_cols_ / (kRowVectors * kW)));
    in_row_groups([&]<int M>(Index r) EIGENBLOCKS_INLINE_LAMBDA {
      const S* const p = probabilities + r * kBlock;
      S* const o = out + r * value_cols_;
      Index c = 0;
      for (; c + kRowVectors * kW <= value_cols_; c += kRowVectors * kW) {
        columns<M, kRowVectors>(keys, p, values + c, o + c, fetch);
        fetch.skip(keys);
      }
      for (; c + kW <= value_cols_; c += kW) columns<M, 1>(keys, p, values + c, o + c, Ahead{});
      fetch = {};
    });
  }

  template <int M, int NV, class V>
  EIGENBLOCKS_NOINLINE void columns(Index keys, const S* p, const V* values, S* out,
                                    Ahead ahead) const {
    P acc[std::size_t(M)][std::size_t(NV)];
    unroll<M>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        acc[m][v] = simd::load<P>(out + m * value_cols_ + v * kW);
      });
    });
    for (Index j = 0; j < keys; ++j, values += value_cols_) {
      ahead.fetch();
      P row[std::size_t(NV)];
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        row[v] = simd::load_as<P>(values + v * kW);
        simd::keep_in_register(row[v]);
      });
      unroll<M>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
        const P scalar = simd::set1<P>(p[m * kBlock + j]);
        unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          acc[m][v] = simd::fma(scalar, row[v], acc[m][v]);
        });
      });
    }
    unroll<M>([&](auto m) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<P>(out + m * value_cols_ + v * kW, acc[m][v]);
      });
    });
  }

  /// Adds up the splits of one key/value head in order and writes the rows.
  void merge(Index kv, Index splits, const S* partial, Index part) const {
    for (Index r = 0; r < rows_; ++r) {
      const Index i = r / n_.group, h = kv * n_.group + r % n_.group;
      const S sink = tensors_.sinks ? (*tensors_.sinks)[h] : kNone;
      S top = sink;
      for (Index x = 0; x < splits; ++x)
        top = std::max(top, partial[x * part + rows_ * value_cols_ + r]);
      S sum = sink == kNone ? S(0) : std::exp(sink - top);
      for (Index x = 0; x < splits; ++x) {
        const S* const stats = partial + x * part + rows_ * value_cols_ + r;
        // Told by the sum, not by the maximum: a part that saw only NaN keeps its maximum at -inf.
        if (stats[rows_] != S(0)) sum += std::exp(stats[0] - top) * stats[rows_];
      }
      Eigen::Map<RowVector<T>> row(out_ + i * out_stride_ + h * n_.value_dim, n_.value_dim);
      if (lse_ != nullptr) lse_[i * lse_stride_ + h] = sum == S(0) ? kNone : top + std::log(sum);
      if (splits == 1) {
        const S weight =
            sum == S(0) ? S(0) : merge_weight(partial[rows_ * value_cols_ + r], top) / sum;
        row = (weight * values_of(partial, r)).template cast<T>();
        continue;
      }
      S* const total = const_cast<S*>(partial) + r * value_cols_;  // the first part becomes the sum
      Eigen::Map<Vector<S>> acc(total, n_.value_dim);
      for (Index x = 0; x < splits; ++x) {
        const S* const stats = partial + x * part + rows_ * value_cols_ + r;
        const S weight = stats[rows_] == S(0) ? S(0) : std::exp(stats[0] - top) / sum;
        if (x == 0) {
          acc *= weight;
        } else if (weight != S(0)) {
          acc += weight * values_of(partial + x * part, r).transpose();
        }
      }
      row = acc.transpose().template cast<T>();
    }
  }
  Eigen::Map<const RowVector<S>> values_of(const S* partial, Index r) const {
    return {partial + r * value_cols_, n_.value_dim};
  }

  KvCache<T>& cache_;
  const AttentionSizes& n_;
  const Rule& rule_;
  const AttentionTensors<S>& tensors_;
  const T* query_;
  Index query_stride_;
  T* out_;
  Index out_stride_;
  S* lse_;
  Index lse_stride_;
  Index rows_, value_cols_;
};

template <StorageScalar T, MatrixLike Q, class O>
AttentionSizes require_over_cache(const KvCache<T>& cache, const Q& query, const O& out,
                                  const AttentionShape& shape,
                                  const AttentionTensors<compute_t<T>>& tensors) {
  const KvCacheOptions& c = cache.options();
  const Index kv_heads = shape.kv_heads == 0 ? shape.heads : shape.kv_heads;
  require(kv_heads == c.kv_heads, "kv_heads (", kv_heads, ") differs from the cache's (",
          c.kv_heads, ")");
  require_shape("query", query.rows(), query.cols(), query.rows(), shape.heads * c.head_dim,
                "cols = heads * head_dim of the cache");
  AttentionSizes n = attention_sizes(query.rows(), query.cols(), 0, kv_heads * c.head_dim, 0,
                                     kv_heads * c.value_dim, shape);
  n.keys = cache.size() - cache.first();
  require_shape("out", out.rows(), out.cols(), n.queries, n.heads * n.value_dim,
                "queries x heads * value_dim");
  require(shape.query_offset == 0 && shape.key_offset == 0, "query_offset (", shape.query_offset,
          ") and key_offset (", shape.key_offset, ") must be 0: the cache knows the positions");
  require(tensors.bias == nullptr && tensors.mask == nullptr,
          "bias and mask tensors have no place over a cache; express them in the rule");
  require_tensors(tensors, n);
  return n;
}

/// A mask by reference: rules own what their functors own, and a step must not copy (and allocate) that.
template <class M>
struct MaskRef : MaskTag {
  const M* mask;
  explicit MaskRef(const M& m) : mask(&m) {}
  bool operator()(Index i, Index j, Index h) const { return (*mask)(i, j, h); }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    return detail::classify(*mask, i0, i1, j0, j1);
  }
  KeyRange key_range(Index i0, Index i1) const { return detail::key_range(*mask, i0, i1); }
  template <class P>
    requires HasMaskLanes<M, P> P lanes(const P& irel, Index i0, Index j, Index h)
  const { return mask->lanes(irel, i0, j, h); }
};

/// The rule of a cache: the caller's, by reference, and the window of a ring.
template <class Rule>
struct CacheRule {
  using mask_type = AndMask<MaskRef<typename Rule::mask_type>, WindowLeftMask>;
  using score_type = typename Rule::score_type;
  mask_type mask;
  const score_type& score;
};
template <StorageScalar T, class Rule>
CacheRule<Rule> cache_rule(const KvCache<T>& cache, const Rule& rule) {
  static_assert(takes_as_given<Rule>, EIGENBLOCKS_POSITION_MESSAGE);
  const Index window = cache.ring() ? cache.options().window : kWidestWindow;
  return {{MaskRef<typename Rule::mask_type>(rule.mask), WindowLeftMask(window)}, rule.score};
}

/// The last rows of the cache ask; everything has been checked.  source: keys and values of the tiles for many rows.
template <StorageScalar T, class Source, class Rule>
void attend_over_cache(KvCache<T>& cache, const Source& source, AttentionSizes n, const T* query,
                       Index query_stride, T* out, Index out_stride, compute_t<T>* lse,
                       Index lse_stride, const AttentionShape& shape, const Rule& rule,
                       const AttentionTensors<compute_t<T>>& tensors, ExecutorRef executor) {
  using S = compute_t<T>;
  if (n.queries == 0) return;
  n.keys = cache.size() - cache.first();
  if (n.queries <= DecodeRows<S, T, Rule>::kMaxRows) {
    DecodeRows<S, T, Rule>(cache, n, rule, tensors, query, query_stride, out, out_stride, lse,
                           lse_stride)
        .run(executor);
    return;
  }
  AttentionShape local = shape;
  local.query_offset = cache.size() - n.queries;
  local.key_offset = cache.first();
  if (lse == nullptr) {  // the tiles need one: a piece of scratch that is no worker's
    const int workers = executor.workers();
    cache.workspace().prepare(workers + 1);
    lse = cache.workspace()
              .arena(workers, padded_bytes<S>(n.queries * n.heads))
              .template take<S>(n.queries * n.heads);
    lse_stride = n.heads;
  }
  const auto tiles = [&](const AttentionSizes& sizes) {
    return ForwardTiles<S, T, Source, Rule>(sizes, local, rule, tensors, query, query_stride,
                                            source, out, out_stride, lse, lse_stride, TileTuning{});
  };
  AttentionSizes most = n;
  most.keys = cache.slots();
  tiles(most).reserve(executor, cache.workspace());
  tiles(n).run(executor, cache.workspace());
}

}  // namespace detail

using CausalRule = decltype(attention_rule(causal()));

/// Attention of query rows at the last query.rows() positions of the cache.  out: rows x (heads * value_dim); lse: rows x heads
/// or null.  tensors: sinks and row_scale only.
template <StorageScalar T, MatrixLike Q, OutputMatrix O, class Rule = CausalRule>
  requires SameScalar<Q, O> && std::same_as<scalar_t<Q>, T>
void attention_over_cache(KvCache<T>& cache, const Q& query, O&& out, const AttentionShape& shape,
                          const Rule& rule = {}, const AttentionTensors<compute_t<T>>& tensors = {},
                          Matrix<compute_t<T>>* lse = nullptr, ExecutorRef executor = {}) {
  const detail::AttentionSizes n = detail::require_over_cache(cache, query, out, shape, tensors);
  detail::require_score_heads(rule.score, n.heads);
  detail::require(n.queries <= cache.size() - cache.first(), "query has ", n.queries,
                  " rows, but the cache holds only ", cache.size() - cache.first(), " positions");
  const Index whole = cache.size() - cache.first() - cache.options().window;
  detail::require(cache.first() == 0 || n.queries <= whole, "query has ", n.queries,
                  " rows, but the ring holds the whole window of the last ", whole, " only");
  if (lse != nullptr)
    detail::require_shape("lse", lse->rows(), lse->cols(), n.queries, n.heads, "queries x heads");
  const auto bounded = detail::cache_rule(cache, rule);
  detail::attend_over_cache(cache, detail::CacheSource<T>{&cache}, n, query.data(),
                            query.outerStride(), out.data(), out.outerStride(),
                            lse ? lse->data() : nullptr, lse ? lse->cols() : 0, shape, bounded,
                            tensors, executor);
}

/// Appends key and value rows, then attends with query rows at their positions.  Any number of rows: one when decoding, a chunk
/// or a whole prompt when pre-filling.
template <StorageScalar T, MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O,
          class Rule = CausalRule>
  requires SameScalar<Q, K, V, O> && std::same_as<scalar_t<Q>, T>
void attention_step(KvCache<T>& cache, const Q& query, const K& key, const V& value, O&& out,
                    const AttentionShape& shape, const Rule& rule = {},
                    const AttentionTensors<compute_t<T>>& tensors = {}, ExecutorRef executor = {}) {
  using S = compute_t<T>;
  detail::AttentionSizes n = detail::require_over_cache(cache, query, out, shape, tensors);
  detail::require_score_heads(rule.score, n.heads);
  cache.require_rows(key.rows(), key.cols(), value.rows(), value.cols());
  detail::require_shape("key", key.rows(), key.cols(), query.rows(), key.cols(),
                        "one row per query row");
  cache.require_room(key.rows());
  const auto bounded = detail::cache_rule(cache, rule);
  // A ring must not drop keys that earlier rows of the same piece still see.
  const Index piece =
      cache.ring() ? std::max<Index>(1, cache.slots() - cache.options().window) : n.queries;
  for (Index r = 0; r < n.queries; r += piece) {
    const Index rows = std::min(piece, n.queries - r);
    cache.append(key.middleRows(r, rows), value.middleRows(r, rows));
    detail::AttentionSizes part = n;
    part.queries = rows;
    AttentionTensors<S> part_tensors = tensors;
    Vector<S> part_scale;
    if (tensors.row_scale != nullptr && rows < n.queries) {
      part_scale = tensors.row_scale->segment(r, rows);
      part_tensors.row_scale = &part_scale;
    }
    detail::attend_over_cache<T>(cache, detail::CacheSource<T>{&cache}, part,
                                 query.data() + r * query.outerStride(), query.outerStride(),
                                 out.data() + r * out.outerStride(), out.outerStride(), nullptr, 0,
                                 shape, bounded, part_tensors, executor);
  }
}

EIGENBLOCKS_NAMESPACE_END
