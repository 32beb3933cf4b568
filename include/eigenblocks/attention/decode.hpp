// Attention over a key/value cache: decoding step by step, chunked prefill, and both with a sliding window.
//
//   attention_step(cache, q, k, v, out, shape, rule)       append k, v, then attend; any number of rows
//   attention_over_cache(cache, q, out, shape, rule)       attend only: the last q.rows() positions of the cache ask
//
// cache: KvCache (cache.hpp) or QuantizedKvCache (quantized_cache.hpp).  q and out share a scalar, k and v may have others; all
// compute in the same as the cache, so float rows go over KvCache<bfloat16>.
//
// Query row t sits at position size - rows + t (aligned at the bottom right), and the default rule is causal().  Rows fed in
// any chunking give the rows of the full causal pass, up to rounding.  A ring cache adds window_left(window) to the rule, and
// with sinks  prefix(sinks) | window_left(window).  Nothing is allocated once cache and scratch have their size.
//
// Few rows (up to 16 per call) read each head's panels once for all query heads of its group: lanes are keys, and the
// positions are cut at multiples of 1024 whose parts merge in a fixed order, so results do not depend on the executor
// (split-KV, FlashDecoding; decode_rows.hpp).  More rows take the tiles of forward_tiles.hpp, or, where sinks and window have a
// gap between them, go 16 by 16.
//
// Errors (invalid_argument): widths that do not fit the cache, shape.query_offset or key_offset not 0, bias or mask tensors
// (use the rule); std::length_error for a full fixed cache.  On an error neither cache nor out is changed.
#pragma once

#include <eigenblocks/attention/cache.hpp>
#include <eigenblocks/attention/decode_rows.hpp>
#include <eigenblocks/attention/forward_tiles.hpp>
#include <eigenblocks/attention/near_far.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Key panels of ForwardTiles from a source of DecodeRows, for positions from `position` on.
template <int MR, class Source, RealScalar S>
void pack_stored_keys(const Source& source, Index kv, Index dim, Index position, Index count,
                      S* panels) {
  constexpr Index kPanel = Source::kPanel;
  for (Index c0 = 0; c0 < count; c0 += MR, panels += dim * MR) {
    if (count - c0 < MR) std::fill_n(panels, dim * MR, S(0));
    for (Index m = 0; m < std::min<Index>(MR, count - c0); ++m) {
      const Index at = source.slot(position + c0 + m);
      const auto* const from = source.key_panel(kv, at / kPanel) + at % kPanel;
      S scale(1);
      if constexpr (Source::kScaled) scale = static_cast<S>(source.key_scales(kv)[at]);
      for (Index c = 0; c < dim; ++c) {
        S& to = panels[c * MR + m];
        to = static_cast<S>(from[c * kPanel]);
        if constexpr (Source::kScaled) to *= scale;
      }
    }
  }
}

/// A cache as the source of DecodeRows and as the operands of ForwardTiles, for which column c is position key_offset() + c.
template <class E>
struct CacheSource {
  const PanelStore<E>* cache;
  using Entry = E;
  static constexpr Index kPanel = PanelStore<E>::kPanel;
  static constexpr bool kScaled = PanelStore<E>::kScaled, kContiguous = true;

  Index first() const { return cache->first(); }
  Index size() const { return cache->size(); }
  Index sinks() const { return std::min(cache->options().sinks, cache->size()); }
  Index oldest_seen(Index i) const {
    const KvCacheOptions& o = cache->options();
    return o.sinks == 0 ? first() : std::max({first(), o.sinks, i - o.window});
  }
  Index slot(Index position) const { return cache->slot(position); }
  Index slots() const { return cache->slots(); }
  Index run_end(Index position, Index at) const { return position + cache->slots() - at; }
  Index value_stride() const { return cache->value_stride(); }
  const E* key_panel(Index kv, Index panel) const { return cache->key_panel(kv, panel); }
  const E* value_row(Index kv, Index at) const { return cache->value_row(kv, at); }
  const float* key_scales(Index kv) const { return cache->key_scales(kv); }
  const float* value_scales(Index kv) const { return cache->value_scales(kv); }

  /// Columns of tiles have no gap between sinks and window.
  bool has_gap() const { return cache->options().sinks > 0 && first() > cache->options().sinks; }
  Index key_offset() const { return cache->options().sinks > 0 ? 0 : first(); }

  template <int MR, RealScalar S>
  void pack_keys(Index kv, Index dim, Index first, Index count, S* panels, S*) const {
    pack_stored_keys<MR>(*this, kv, dim, key_offset() + first, count, panels);
  }
  template <int MR, RealScalar S>
  void pack_values(Index kv, Index dim, Index first, Index count, S* panels, Index panel_stride,
                   S* scratch) const {
    for (Index r = 0; r < count;) {  // runs of neighbouring slots
      const Index p = key_offset() + first + r, at = cache->slot(p);
      Index run = std::min(count - r, cache->slots() - at);
      if (p < cache->options().sinks) run = std::min(run, cache->options().sinks - p);
      if constexpr (kScaled) {
        run =
            std::min<Index>(run, 4);  // rows that scratch holds; pack_column_panels needs none of S
        for (Index x = 0; x < run; ++x) {
          const S scale = static_cast<S>(cache->value_scales(kv)[at + x]);
          const E* const codes = cache->value_row(kv, at + x);
          for (Index c = 0; c < dim; ++c) scratch[x * dim + c] = scale * static_cast<S>(codes[c]);
        }
        pack_column_panels<MR>(run, dim, static_cast<const S*>(scratch), dim, panels + r * MR,
                               panel_stride, scratch);
      } else {
        pack_column_panels<MR>(run, dim, cache->value_row(kv, at), cache->value_stride(),
                               panels + r * MR, panel_stride, scratch);
      }
      r += run;
    }
  }
};

template <class E>
CacheSource<E> source_of(const PanelStore<E>& cache) {
  return {&cache};
}

template <class Cache, MatrixLike Q, class O>
AttentionSizes require_over_cache(const Cache& cache, const Q& query, const O& out,
                                  const AttentionShape& shape,
                                  const AttentionTensors<compute_t<scalar_t<Q>>>& tensors) {
  const auto& c = cache.options();
  const Index kv_heads = shape.kv_heads == 0 ? shape.heads : shape.kv_heads;
  require(kv_heads == c.kv_heads, "kv_heads (", kv_heads, ") differs from the cache's (",
          c.kv_heads, ")");
  require_shape("query", query.rows(), query.cols(), query.rows(), shape.heads * c.head_dim,
                "cols = heads * head_dim of the cache");
  AttentionSizes n = attention_sizes(query.rows(), query.cols(), 0, kv_heads * c.head_dim, 0,
                                     kv_heads * c.value_dim, shape);
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

/// What a cache keeps for a query: window_left(window), or prefix(sinks) | window_left(window).
struct KeptMask : MaskTag {
  WindowLeftMask window;
  Index sinks;
  explicit KeptMask(const KvCacheOptions& o)
      : window(o.window >= 0 ? o.window : kWidestWindow), sinks(o.sinks) {}
  bool operator()(Index i, Index j, Index h) const { return j < sinks || window(i, j, h); }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    const TileClass recent = window.classify(i0, i1, j0, j1);
    return sinks == 0 ? recent : std::max(recent, PrefixMask(sinks).classify(i0, i1, j0, j1));
  }
  KeyRange key_range(Index i0, Index i1) const {
    return sinks == 0 ? window.key_range(i0, i1) : KeyRange{};
  }
  template <class P>
  P lanes(const P& irel, Index i0, Index j, Index h) const {
    return j < sinks ? simd::equal(simd::zero<P>(), simd::zero<P>()) : window.lanes(irel, i0, j, h);
  }
};

/// The rule of a cache: the caller's, by reference, and what the cache keeps.
template <class Rule>
struct CacheRule {
  using mask_type = AndMask<MaskRef<typename Rule::mask_type>, KeptMask>;
  using score_type = typename Rule::score_type;
  mask_type mask;
  const score_type& score;
};
template <class Rule>
CacheRule<Rule> cache_rule(const KvCacheOptions& options, const Rule& rule) {
  static_assert(takes_as_given<Rule>, EIGENBLOCKS_POSITION_MESSAGE);
  return {{MaskRef<typename Rule::mask_type>(rule.mask), KeptMask(options)}, rule.score};
}

/// The last rows of `few` ask; everything has been checked.  few: keys and values for few rows; source: those of the tiles for
/// many.
template <StorageScalar T, class Few, class Source, class Rule>
void attend_rows(const Few& few, const Source& source, AttentionSizes n,
                 DecodeOperands<compute_t<T>, T> x, const AttentionShape& shape, const Rule& rule,
                 const AttentionTensors<compute_t<T>>& tensors, Workspace& workspace,
                 ExecutorRef executor) {
  using S = compute_t<T>;
  using Rows = DecodeRows<S, T, Few, Rule>;
  if (n.queries == 0) return;
  if (n.queries <= kMostDecodeRows || few.has_gap() || x.sink_query != nullptr) {
    for (x.row0 = 0; x.row0 < n.queries; x.row0 += x.count) {
      x.count = std::min(kMostDecodeRows, n.queries - x.row0);
      x.position = few.size() - n.queries + x.row0;
      Rows(few, n, rule, tensors, x).run(workspace, executor);
    }
    return;
  }
  AttentionShape local = shape;
  local.query_offset = few.size() - n.queries;
  local.key_offset = few.key_offset();
  n.keys = few.size() - few.key_offset();
  if (x.lse == nullptr) {  // the tiles need one: a piece of scratch that is no worker's
    const int workers = executor.workers();
    workspace.prepare(workers + 1);
    x.lse = workspace.arena(workers, padded_bytes<S>(n.queries * n.heads))
                .template take<S>(n.queries * n.heads);
    x.lse_stride = n.heads;
  }
  const auto tiles = [&](const AttentionSizes& sizes) {
    return ForwardTiles<S, T, Source, Rule>(sizes, local, rule, tensors, x.query, x.query_stride,
                                            source, x.out, x.out_stride, x.lse, x.lse_stride,
                                            TileTuning{});
  };
  AttentionSizes most = n;
  most.keys = few.slots();
  tiles(most).reserve(executor, workspace);
  tiles(n).run(executor, workspace);
}

/// The same over a cache, with the tiles' operands given.
template <StorageScalar T, class Cache, class Source, class Rule>
void attend_over_cache(Cache& cache, const Source& source, const AttentionSizes& n, const T* query,
                       Index query_stride, T* out, Index out_stride, compute_t<T>* lse,
                       Index lse_stride, const AttentionShape& shape, const Rule& rule,
                       const AttentionTensors<compute_t<T>>& tensors, ExecutorRef executor) {
  attend_rows<T>(source_of(cache), source, n,
                 {query, query_stride, out, out_stride, lse, lse_stride}, shape, rule, tensors,
                 cache.workspace(), executor);
}

/// Rows [begin, begin + count) of a row_scale tensor.
template <RealScalar S>
AttentionTensors<S> part_of(const AttentionTensors<S>& tensors, Index begin, Index count,
                            Vector<S>& row_scale) {
  AttentionTensors<S> part = tensors;
  if (tensors.row_scale != nullptr && count < tensors.row_scale->size()) {
    row_scale = tensors.row_scale->segment(begin, count);
    part.row_scale = &row_scale;
  }
  return part;
}

/// A cache that derives from PanelStore, and query rows that compute in what it stores.
template <class Cache, class Q>
concept AttendableCache = requires(const Cache& cache) {
  source_of(cache);
}
&&Cache::template serves<scalar_t<Q>>;
template <class Cache, class K, class V>
concept TakesRows = requires(Cache& cache, const K& key, const V& value) {
  cache.append(key, value);
};

/// attention_step; sink_query: rows that ask the sinks, or null.
template <class Cache, class Q, class K, class V, class O, class Rule>
void step_over_cache(Cache& cache, const Q& query, const scalar_t<Q>* sink_query,
                     Index sink_query_stride, const K& key, const V& value, O& out,
                     const AttentionShape& shape, const Rule& rule,
                     const AttentionTensors<compute_t<scalar_t<Q>>>& tensors,
                     ExecutorRef executor) {
  using T = scalar_t<Q>;
  AttentionSizes n = require_over_cache(cache, query, out, shape, tensors);
  require_score_heads(rule.score, n.heads);
  cache.require_rows(key.rows(), key.cols(), value.rows(), value.cols());
  require_shape("key", key.rows(), key.cols(), query.rows(), key.cols(), "one row per query row");
  cache.require_room(key.rows());
  const auto kept = cache_rule(cache.options(), rule);
  const auto source = source_of(cache);
  // A ring must not drop keys that earlier rows of the same piece still see.
  const Index rows = n.queries,
              piece = cache.ring() ? std::max<Index>(1, cache.ring_slots() - cache.options().window)
                                   : rows;
  for (Index r = 0; r < rows; r += piece) {
    n.queries = std::min(piece, rows - r);
    cache.append(key.middleRows(r, n.queries), value.middleRows(r, n.queries));
    DecodeOperands<compute_t<T>, T> x{query.data() + r * query.outerStride(), query.outerStride(),
                                      out.data() + r * out.outerStride(), out.outerStride()};
    if (sink_query != nullptr) {
      x.sink_query = sink_query + r * sink_query_stride;
      x.sink_query_stride = sink_query_stride;
    }
    Vector<compute_t<T>> row_scale;
    attend_rows<T>(source, source, n, x, shape, kept, part_of(tensors, r, n.queries, row_scale),
                   cache.workspace(), executor);
  }
}

}  // namespace detail

using CausalRule = decltype(attention_rule(causal()));

/// Attention of query rows at the last query.rows() positions of the cache.  out: rows x (heads * value_dim); lse: rows x heads
/// or null.  tensors: sinks and row_scale only.
template <class Cache, MatrixLike Q, OutputMatrix O, class Rule = CausalRule>
  requires SameScalar<Q, O> && detail::AttendableCache<Cache, Q>
void attention_over_cache(Cache& cache, const Q& query, O&& out, const AttentionShape& shape,
                          const Rule& rule = {},
                          const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
                          Matrix<compute_t<scalar_t<Q>>>* lse = nullptr,
                          ExecutorRef executor = {}) {
  const detail::AttentionSizes n = detail::require_over_cache(cache, query, out, shape, tensors);
  detail::require_score_heads(rule.score, n.heads);
  const bool everything = cache.first() <= cache.options().sinks;
  const Index held = everything ? cache.size() : cache.size() - cache.first();
  detail::require(n.queries <= held, "query has ", n.queries, " rows, but the cache holds only ",
                  held, " positions");
  const Index whole = held - cache.options().window;
  detail::require(everything || n.queries <= whole, "query has ", n.queries,
                  " rows, but the ring holds the whole window of the last ", whole, " only");
  if (lse != nullptr)
    detail::require_shape("lse", lse->rows(), lse->cols(), n.queries, n.heads, "queries x heads");
  const auto kept = detail::cache_rule(cache.options(), rule);
  detail::attend_over_cache<scalar_t<Q>>(cache, detail::source_of(cache), n, query.data(),
                                         query.outerStride(), out.data(), out.outerStride(),
                                         lse ? lse->data() : nullptr, lse ? lse->cols() : 0, shape,
                                         kept, tensors, executor);
}

/// Appends key and value rows, then attends with query rows at their positions.  Any number of rows: one when decoding, a chunk
/// or a whole prompt when pre-filling.
template <class Cache, MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O,
          class Rule = CausalRule>
  requires SameScalar<Q, O> && detail::AttendableCache<Cache, Q> && detail::TakesRows<Cache, K, V>
void attention_step(Cache& cache, const Q& query, const K& key, const V& value, O&& out,
                    const AttentionShape& shape, const Rule& rule = {},
                    const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
                    ExecutorRef executor = {}) {
  detail::step_over_cache(cache, query, nullptr, 0, key, value, out, shape, rule, tensors,
                          executor);
}

EIGENBLOCKS_NAMESPACE_END
