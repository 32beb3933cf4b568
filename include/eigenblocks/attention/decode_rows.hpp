// The few-rows path of attention over stored keys and values: up to 16 query rows, every key read once for all of them.
// Internal to attention/; the public functions are in decode.hpp, quantized_cache.hpp, sink_cache.hpp and paged_cache.hpp.
//
// A task is one key/value head and one split, positions [s kSplit, (s + 1) kSplit); merge() adds the splits up in order.
// Within a split, block by block of 64 keys:
//   scores[row][key]   query rows times panels of 16 keys: lanes are keys       [times the keys' scales]
//   soften             score functor, mask, running maximum, exp2, sum
//   out rows           += probabilities [times the values' scales] times value rows
//
// Where entries lie and what they are is the Source's business:
//   Entry, kPanel               scalar of keys and values: S, half, bfloat16, or int8 codes
//   kScaled                     a float per position beside them:  key_scales(kv), value_scales(kv), by slot
//   kContiguous                 panels of neighbouring slots lie together; else  panels_together(panel)  and
//                               key_panel_ahead(kv, panel), null past the end
//   first(), size()             positions stored are [first, size), and [0, sinks()) apart
//   oldest_seen(i)              first position of the former part that a query at i may see
//   slot(p), run_end(p, slot)   slots of positions p, ..., run_end - 1 follow each other; a panel's positions stay in lane p % 16
//   key_panel(kv, panel), value_row(kv, slot), value_stride(), slots() (of all memory: sizes the scratch)
#pragma once

#include <eigenblocks/attention/forward_tiles.hpp>
#include <eigenblocks/attention/near_far.hpp>
#include <eigenblocks/attention/partial.hpp>
#include <eigenblocks/attention/rule.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <int W>
struct CodeVectors;
#define EIGENBLOCKS_CODE_VECTORS(W)                             \
  template <>                                                   \
  struct CodeVectors<W> {                                       \
    typedef std::int8_t Codes __attribute__((vector_size(W)));  \
    typedef float Floats __attribute__((vector_size(4 * W)));   \
    typedef double Doubles __attribute__((vector_size(8 * W))); \
  };
EIGENBLOCKS_CODE_VECTORS(2)
EIGENBLOCKS_CODE_VECTORS(4)
EIGENBLOCKS_CODE_VECTORS(8)
EIGENBLOCKS_CODE_VECTORS(16)
#undef EIGENBLOCKS_CODE_VECTORS

/// A packet from entries: 8-bit codes, or what simd::load_as takes.  Exact.
template <class P, class Entry>
EIGENBLOCKS_ALWAYS_INLINE P load_entries(const Entry* from) {
  if constexpr (!std::is_same_v<Entry, std::int8_t>) {
    return simd::load_as<P>(from);
  } else {
    constexpr int w = simd::kPacketSize<P>;
    if constexpr (w == 1) {
      return static_cast<P>(*from);
    } else {
      constexpr bool single = std::is_same_v<simd::lane_t<P>, float>;
#if !defined(EIGEN_DONT_VECTORIZE) && defined(__AVX2__)  // (g++ 12 widens in two halves)
      if constexpr (w == 8 && single) {
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
      }
#endif
      using V = CodeVectors<w>;
      typename V::Codes codes;
      std::memcpy(&codes, from, sizeof(codes));
      return std::bit_cast<P>(__builtin_convertvector(
          codes, std::conditional_t<single, typename V::Floats, typename V::Doubles>));
    }
  }
}
template <class Entry, RealScalar S>
void widen_row(const Entry* from, S* to, Index count) {
  using P = simd::Packet<S>;
  constexpr int w = simd::kLanes<S>;
  Index i = 0;
  for (; i + w <= count; i += w) simd::store<P>(to + i, load_entries<P>(from + i));
  for (; i < count; ++i) to[i] = static_cast<S>(from[i]);
}

inline constexpr Index kMostDecodeRows = 16;

/// One call's rows: query, out and lse from row 0 of the call on, the rows [row0, row0 + count) of it that DecodeRows takes, and
/// the position of row0.
template <RealScalar S, StorageScalar T>
struct DecodeOperands {
  const T* query;
  Index query_stride;
  T* out;
  Index out_stride;
  S* lse = nullptr;
  Index lse_stride = 0;
  Index row0 = 0, count = 0, position = 0;
  const T* sink_query = nullptr;  ///< rows that ask the sinks; null: those of query
  Index sink_query_stride = 0;
};

/// A few query rows over the keys and values of `source`.
template <RealScalar S, StorageScalar T, class Source, class Rule>
class DecodeRows {
  using P = simd::Packet<S>;
  static constexpr int kW = simd::kLanes<S>;
  using Entry = typename Source::Entry;
  static constexpr Index kPanel = Source::kPanel;
  static constexpr Index kBlock =
      64;  // keys per soft-max update: K and V of a block fit the first-level cache
  static constexpr Index kRowsAtOnce = 6;  // of queries times keys in one register tile
  // Registers of values in one register tile: with 6 rows 12 accumulators of 16 registers, 24 of 32.
  static constexpr int kRowVectors = kW < 16 ? 2 : 4;
  static constexpr int kBranches =
      branches<Rule>;  // 2: keys of the far branch, the near ones in a ring
  static constexpr S kNone = -std::numeric_limits<S>::infinity();
  static constexpr bool kPlainScore = std::is_same_v<typename Rule::score_type, IdentityScore>;
  static_assert(kPanel % kW == 0);

 public:
  /// Keys per part: enough parts for threads at 4k, too few to cost anything.
  static constexpr Index kSplit = 1024;

  DecodeRows(const Source& source, const AttentionSizes& sizes, const Rule& rule,
             const AttentionTensors<S>& tensors, const DecodeOperands<S, T>& operands)
      : source_(source),
        n_(sizes),
        rule_(rule),
        tensors_(tensors),
        x_(operands),
        rows_(operands.count * sizes.group),
        value_cols_(source.value_stride()) {}

  void run(Workspace& workspace, ExecutorRef executor) const {
    const Index splits = this->splits(), part = part_scalars();
    // Scratch is sized by capacity, so that it rarely grows.
    const Index parts = n_.kv_heads * std::max(splits, source_.slots() / kSplit + 2);
    workspace.prepare(executor.workers(), scratch_bytes());
    S* const partial =
        workspace.shared(padded_bytes<S>(parts * part)).template take<S>(parts * part);
    executor.run(n_.kv_heads * splits, [&](Index task, int worker) {
      attend(task / splits, task % splits, partial + task * part,
             workspace.arena(worker, scratch_bytes()));
    });
    for (Index kv = 0; kv < n_.kv_heads; ++kv) merge(kv, splits, partial + kv * splits * part);
  }

  // What run() is made of, for callers with tasks of their own: attend() every split of a key/value head into part_scalars()
  // scalars, then merge() the head's parts, which lie one after the other.
  Index splits() const {
    return std::max<Index>(1, (source_.size() + kSplit - 1) / kSplit - first_split());
  }
  Index part_scalars() const { return rows_ * (value_cols_ + 2); }
  std::size_t scratch_bytes() const {
    return kBranches * (padded_bytes<S>(rows_ * n_.key_dim) + padded_bytes<S>(rows_ * kBlock)) +
           padded_bytes<S>(kBlock * n_.key_dim) + padded_bytes<S>(kBlock * value_cols_);
  }

  /// Keys of one split: partial = out rows (not normalised), then per row maximum and sum.
  void attend(Index kv, Index split, S* partial, Arena arena) const {
    const Index begin = (first_split() + split) * kSplit;
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
    const KeyRange visible = detail::key_range(rule_.mask, position(0), position(x_.count - 1) + 1);
    const auto walk = [&](Index low, Index high) {
      // Positions advance panel by panel; a block never crosses the end of the ring, and starts on a panel.
      for (Index p = low; p < high;) {
        const Index at = source_.slot(p), lane0 = at % kPanel;
        const Index base = p - lane0;  // position that lane 0 of the first panel would have
        Index end = std::min({high, base + kBlock, source_.run_end(p, at)});
        if constexpr (kBranches == 1) {
          branch[0].keys = source_.key_panel(kv, at / kPanel);
        } else {
          end = choose_branches(kv, at / kPanel, p, end, branch);
        }
        block(kv, at / kPanel, base, p, end, branch, key_scratch, value_scratch, partial, top, sum);
        p = end;
      }
    };
    const Index sinks = split == 0 ? std::min(source_.sinks(), visible.end) : 0;
    const Index low = std::max({begin, source_.oldest_seen(position(0)), visible.begin});
    const Index high = std::min({begin + kSplit, source_.size(), visible.end});
    if (sinks > 0) {
      if (x_.sink_query != nullptr) {
        scale_rows(kv, x_.sink_query, x_.sink_query_stride, branch[0].query);
      } else {
        scale_rows(kv, x_.query, x_.query_stride, branch[0].query);
      }
      walk(0, sinks);
    }
    if (low >= high) return;
    if (sinks == 0 || x_.sink_query != nullptr)
      scale_rows(kv, x_.query, x_.query_stride, branch[0].query);
    if constexpr (kBranches == 2)
      scale_rows(kv, rule_.position.query, rule_.position.query_stride, branch[1].query);
    walk(low, high);
  }

  /// Adds up the splits of one key/value head in order and writes the rows.
  void merge(Index kv, Index splits, S* partial) const {
    const Index part = part_scalars();
    for (Index r = 0; r < rows_; ++r) {
      const Index i = x_.row0 + r / n_.group, h = kv * n_.group + r % n_.group;
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
      Eigen::Map<RowVector<T>> row(x_.out + i * x_.out_stride + h * n_.value_dim, n_.value_dim);
      if (x_.lse != nullptr)
        x_.lse[i * x_.lse_stride + h] = sum == S(0) ? kNone : top + std::log(sum);
      if (splits == 1) {
        const S weight =
            sum == S(0) ? S(0) : merge_weight(partial[rows_ * value_cols_ + r], top) / sum;
        row = (weight * values_of(partial, r)).template cast<T>();
        continue;
      }
      S* const total = partial + r * value_cols_;  // the first part becomes the sum
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

 private:
  Index first_split() const { return source_.first() / kSplit; }
  Index position(Index row) const { return x_.position + row; }

  /// Row r = query r / group, head r % group.
  void scale_rows(Index kv, const T* query, Index stride, S* to) const {
    for (Index r = 0; r < rows_; ++r, to += n_.key_dim) {
      const Index i = x_.row0 + r / n_.group, h = kv * n_.group + r % n_.group;
      const S factor =
          static_cast<S>(n_.scale) * (tensors_.row_scale ? (*tensors_.row_scale)[i] : S(1));
      const T* const q = query + i * stride + h * n_.key_dim;
      for (Index c = 0; c < n_.key_dim; ++c) to[c] = factor * static_cast<S>(q[c]);
    }
  }

  /// One block's keys, null when it has none of the branch; query rows; scores of the block.
  struct Branch {
    const Entry* keys;
    S *query, *scores;
  };

  /// Keys of the branches for positions from p on, and where they end: blocks are cut where the window of a row begins, so
  /// that only keys near to some rows and far to others are multiplied twice.
  Index choose_branches(Index kv, Index panel, Index p, Index end, Branch* branch) const {
    const auto& near = rule_.position;
    const Index far_end = position(0) - near.window + 1,
                near_begin = position(x_.count - 1) - near.window + 1;
    branch[0].keys = branch[1].keys = nullptr;
    if (p < near_begin) branch[1].keys = source_.key_panel(kv, panel);
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
    // Entries are widened where they are used, unless several groups of rows use them.
    const bool widen = !std::is_same_v<S, Entry> && rows_ > kRowsAtOnce;
    const auto widened = [&](const Entry* from, S* to, Index count, const auto& use) {
      if constexpr (!std::is_same_v<S, Entry>) {
        if (widen) {
          widen_row(from, to, count);
          return use(static_cast<const S*>(to));
        }
      }
      use(from);
    };
    S* scores = branch[0].scores;
    const Entry* next = nullptr;
    for (int b = 0; b < kBranches; ++b) {
      if (kBranches == 2 && branch[b].keys == nullptr) continue;
      scores = branch[b].scores;
      if constexpr (Source::kContiguous) next = branch[b].keys + width * d;
      in_stretches(panel, panels, [&](Index x, Index count) {
        const Entry* const keys =
            Source::kContiguous ? branch[b].keys : source_.key_panel(kv, panel + x);
        widened(keys, key_scratch, count * kPanel * d, [&](const auto* k) {
          block_scores(count, k, branch[b].query, scores + x * kPanel,
                       source_.value_row(kv, (panel + x) * kPanel));
        });
      });
    }
    if constexpr (kBranches == 2) {
      if (branch[0].keys && branch[1].keys) scores = choose_scores(base, width, branch);
    }
    if constexpr (Source::kScaled)
      scale_columns(width, source_.key_scales(kv) + panel * kPanel, scores);
    for (Index r = 0; r < rows_; ++r)
      soften(kv, r, base, begin, end, width, scores + r * kBlock, out, top, sum);
    if constexpr (Source::kScaled)
      scale_columns(width, source_.value_scales(kv) + panel * kPanel, scores);
    in_stretches(panel, panels, [&](Index x, Index count) {
      const Index from = std::max(begin - base, x * kPanel),
                  to = std::min(end - base, (x + count) * kPanel);
      if constexpr (!Source::kContiguous) next = source_.key_panel_ahead(kv, panel + panels + x);
      widened(source_.value_row(kv, (panel + x) * kPanel), value_scratch,
              count * kPanel * value_cols_, [&](const auto* values) {
                add_values(to - from, scores + from, values + (from - x * kPanel) * value_cols_,
                           out, next);
              });
    });
  }

  /// f(x, count) for panels [panel + x, panel + x + count) that lie together in memory, up to `panels` in all.
  template <class F>
  void in_stretches(Index panel, Index panels, F&& f) const {
    if constexpr (Source::kContiguous) {
      f(Index{0}, panels);
    } else {
      for (Index x = 0; x < panels;) {
        const Index count = std::min(panels - x, source_.panels_together(panel + x));
        f(x, count);
        x += count;
      }
    }
  }

  /// Scores or probabilities of all rows times one factor per key.
  void scale_columns(Index width, const float* factor, S* scores) const {
    for (Index r = 0; r < rows_; ++r) {
      for (Index x = 0; x < width; ++x) scores[r * kBlock + x] *= static_cast<S>(factor[x]);
    }
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
    Ahead(const Entry* from, Index count, Index turns)
        : at_(reinterpret_cast<const char*>(from)),
          step_(turns > 0 ? count * Index(sizeof(Entry)) / turns : 0) {}
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
  void block_scores(Index panels, const K* keys, const S* query, S* scores,
                    const Entry* values) const {
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
        key[v] = load_entries<P>(panel + v * kW);
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
                  const Entry* ahead) const {
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
        row[v] = load_entries<P>(values + v * kW);
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

  Eigen::Map<const RowVector<S>> values_of(const S* partial, Index r) const {
    return {partial + r * value_cols_, n_.value_dim};
  }

  const Source& source_;
  const AttentionSizes& n_;
  const Rule& rule_;
  const AttentionTensors<S>& tensors_;
  const DecodeOperands<S, T> x_;
  const Index rows_, value_cols_;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
