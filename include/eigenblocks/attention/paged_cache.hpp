// Keys and values of many sequences in one pool of pages (PagedAttention, arXiv 2309.06180), decoded as one batch.
//
//   PagedKvCache<float> cache({.kv_heads = 8, .head_dim = 128, .page = 16, .pages = 4096});
//   const Index a = cache.add_sequence(), b = cache.add_sequence(), c = cache.fork(b);
//   const Index first[] = {a}, all[] = {a, b, c};                       // a fork shares pages and copies those it writes to
//   paged_attention_step(cache, first, prompt_q, prompt_k, prompt_v, prompt_out, shape);      // pre-fill one sequence
//   paged_attention_step(cache, all, q, k, v, out, shape, rule, {}, pool);                    // a row each, of any lengths
//   paged_attention_over_cache(cache, all, q, out, shape, rule);        // attend only
//   cache.truncate(c, n);  cache.remove(a);                             // pages return to the pool
//
// A page holds `page` tokens of all key/value heads, in the panels of KvCache; a sequence is a table of pages, so no memory is
// lost to lengths that differ but the last page's rest.  bytes_per_token as KvCache.
//
// Batch: rows are ordered by sequence, the same number for each; row t of a sequence sits at its position size - rows + t.  The
// work is cut by (sequence, key/value head, 1024 positions), so all workers are busy with one row per sequence too.  Every
// sequence gets the bits that attention_step over a KvCache<T> of its own gives, whatever the batch, pages and executor.
// Nothing is allocated per step once the scratch has its size.
//
// Errors: std::out_of_range for an id that is not in use; invalid_argument for options, shapes and an id given twice;
// std::length_error when the pool has too few pages for the whole batch.  On an error nothing has changed.
#pragma once

#include <eigenblocks/attention/cache.hpp>
#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/decode_rows.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct PagedKvCacheOptions {
  Index kv_heads = 1;
  Index head_dim = 1;
  Index value_dim = 0;  ///< 0 means head_dim
  Index page =
      16;  ///< tokens per page, a multiple of 16; large pages read faster, small ones waste less
  Index pages = 1;  ///< of the pool, all allocated at once
  friend bool operator==(const PagedKvCacheOptions&, const PagedKvCacheOptions&) = default;
};

template <StorageScalar T>
class PagedKvCache {
 public:
  static constexpr Index kPanel = KvCache<T>::kPanel;
  /// Whether queries of scalar U compute in what is stored.
  template <StorageScalar U>
  static constexpr bool serves = std::same_as<compute_t<U>, compute_t<T>>;

  PagedKvCache() : PagedKvCache(PagedKvCacheOptions{}) {}
  /// Errors: kv_heads, head_dim, pages < 1, value_dim < 0, page not a positive multiple of 16.
  explicit PagedKvCache(const PagedKvCacheOptions& options) : options_(options) {
    detail::require(options.kv_heads >= 1, "PagedKvCache: kv_heads (", options.kv_heads,
                    ") must be at least 1");
    detail::require(options.head_dim >= 1, "PagedKvCache: head_dim (", options.head_dim,
                    ") must be at least 1");
    detail::require(options.value_dim >= 0, "PagedKvCache: value_dim (", options.value_dim,
                    ") must not be negative");
    detail::require(options.page >= 1 && options.page % kPanel == 0, "PagedKvCache: page (",
                    options.page, ") must be a positive multiple of ", kPanel);
    detail::require(options.pages >= 1 && options.pages <= std::numeric_limits<std::int32_t>::max(),
                    "PagedKvCache: pages (", options.pages, ") must be at least 1 and fit 32 bits");
    if (options_.value_dim == 0) options_.value_dim = options_.head_dim;
    value_stride_ = (options_.value_dim + kPanel - 1) / kPanel * kPanel;
    keys_.setZero(options_.pages * options_.kv_heads * options_.page * options_.head_dim);
    values_.setZero(options_.pages * options_.kv_heads * options_.page * value_stride_);
    users_.assign(static_cast<std::size_t>(options_.pages), 0);
    writers_ = users_;
    free_.reserve(users_.size());
    for (Index p = options_.pages; p-- > 0;) free_.push_back(static_cast<std::int32_t>(p));
  }

  const PagedKvCacheOptions& options() const { return options_; }
  Index bytes_per_token() const {
    return options_.kv_heads * (options_.head_dim + options_.value_dim) *
           static_cast<Index>(sizeof(T));
  }
  /// Of the pool, padding included.
  std::size_t bytes() const {
    return static_cast<std::size_t>(keys_.size() + values_.size()) * sizeof(T);
  }
  Index free_pages() const { return static_cast<Index>(free_.size()); }
  Index sequences() const { return in_use_; }
  bool contains(Index id) const {
    return id >= 0 && id < static_cast<Index>(sequences_.size()) && at(id).used;
  }
  Index size(Index id) const { return sequence(id).size; }

  /// A new, empty sequence; ids of removed ones are given out again.
  Index add_sequence() {
    const auto unused = std::find_if(sequences_.begin(), sequences_.end(),
                                     [](const Sequence& s) { return !s.used; });
    const Index id = unused - sequences_.begin();
    if (unused == sequences_.end()) sequences_.emplace_back();
    at(id).pages.reserve(users_.size());  // so that steps never allocate; 4 bytes per page
    at(id).used = true;
    ++in_use_;
    return id;
  }
  /// A new sequence with the tokens of `id`, which share their pages until one of both writes.
  Index fork(Index id) {
    require_sequence(id);
    const Index copy = add_sequence();
    at(copy).size = at(id).size;
    at(copy).pages.assign(at(id).pages.begin(), at(id).pages.end());
    for (const std::int32_t page : at(copy).pages) ++users(page);
    return copy;
  }
  /// Ends a sequence; pages that no fork uses return to the pool.
  void remove(Index id) {
    truncate(id, 0);
    at(id).used = false;
    --in_use_;
  }
  /// Forgets positions >= n.  std::out_of_range unless 0 <= n <= size(id).
  void truncate(Index id, Index n) {
    require_sequence(id);
    Sequence& s = at(id);
    if (n < 0 || n > s.size) {
      detail::raise<std::out_of_range>("PagedKvCache: truncate(", id, ", ", n, ") is outside [0, ",
                                       s.size, "]");
    }
    s.size = n;
    for (; static_cast<Index>(s.pages.size()) > pages_of(n); s.pages.pop_back())
      release(s.pages.back());
  }

  /// Appends rows to one sequence.  std::length_error when the pool has too few pages; nothing has changed then.
  template <CacheRows<T> K, CacheRows<T> V>
  void append(Index id, const K& key, const V& value) {
    append_batch(std::span<const Index>(&id, 1), key, value);
  }
  /// Appends rows [b n, (b + 1) n) to sequence ids[b], n = rows / ids.size().
  template <CacheRows<T> K, CacheRows<T> V>
  void append_batch(std::span<const Index> ids, const K& key, const V& value) {
    const Index count = require_share("key", ids, key.rows());
    detail::require_shape("key", key.rows(), key.cols(), key.rows(),
                          options_.kv_heads * options_.head_dim,
                          "cols = kv_heads * head_dim of the cache");
    detail::require_shape("value", value.rows(), value.cols(), key.rows(),
                          options_.kv_heads * options_.value_dim,
                          "rows of key, cols = kv_heads * value_dim of the cache");
    require_room(ids, count);
    for (std::size_t b = 0; b < ids.size(); ++b)
      put_rows(ids[b], count, key, value, static_cast<Index>(b) * count);
  }

  /// Rows of each sequence.  std::out_of_range for an unknown id, invalid_argument for a repeated one or an uneven share.
  Index require_share(const char* name, std::span<const Index> ids, Index rows) {
    require_ids(ids);
    const Index count = static_cast<Index>(ids.size());
    detail::require(count == 0 ? rows == 0 : rows % count == 0, name, " has ", rows,
                    " rows, which ", count, " sequences cannot share evenly");
    return count == 0 ? 0 : rows / count;
  }
  void require_ids(std::span<const Index> ids) {
    for (const Index id : ids) require_sequence(id);
    Index twice = -1;
    for (const Index id : ids) twice = std::exchange(at(id).listed, true) ? id : twice;
    for (const Index id : ids) at(id).listed = false;
    detail::require(twice < 0, "PagedKvCache: sequence ", twice, " is listed twice");
  }

  /// Pages that `rows` more tokens for each of the sequences take, copies of shared pages included.
  Index pages_needed(std::span<const Index> ids, Index rows) {
    Index needed = 0;
    if (rows == 0) return needed;
    for (const Index id : ids) {
      const Sequence& s = at(id);
      needed += pages_of(s.size + rows) - static_cast<Index>(s.pages.size());
      if (s.size % options_.page == 0) continue;
      // The last writer of a shared page keeps it, if nobody else uses it.
      const std::int32_t page = s.pages.back();
      if (++writers(page) < users(page)) ++needed;
    }
    for (const Index id : ids) {
      if (!at(id).pages.empty()) writers(at(id).pages.back()) = 0;
    }
    return needed;
  }
  void require_room(std::span<const Index> ids, Index rows) {
    const Index needed = pages_needed(ids, rows);
    if (needed > free_pages()) {
      detail::raise<std::length_error>("PagedKvCache: ", rows, " more tokens for each of ",
                                       ids.size(), " sequences take ", needed, " pages, but ",
                                       free_pages(), " are free");
    }
  }

  /// Copies positions [begin, end) of a sequence out, token-major.  std::out_of_range unless 0 <= begin <= end <= size(id).
  Matrix<T> keys(Index id, Index begin, Index end) const {
    require_range(id, begin, end);
    Matrix<T> rows(end - begin, options_.kv_heads * options_.head_dim);
    for (Index p = begin; p < end; ++p) {
      for (Index h = 0; h < options_.kv_heads; ++h) {
        const T* const key = key_panel(page_at(id, p), h, p % options_.page / kPanel) + p % kPanel;
        for (Index c = 0; c < options_.head_dim; ++c)
          rows(p - begin, h * options_.head_dim + c) = key[c * kPanel];
      }
    }
    return rows;
  }
  Matrix<T> values(Index id, Index begin, Index end) const {
    require_range(id, begin, end);
    Matrix<T> rows(end - begin, options_.kv_heads * options_.value_dim);
    for (Index p = begin; p < end; ++p) {
      for (Index h = 0; h < options_.kv_heads; ++h) {
        std::copy_n(value_row(page_at(id, p), h, p % options_.page), options_.value_dim,
                    &rows(p - begin, h * options_.value_dim));
      }
    }
    return rows;
  }

  // For the attention over the cache.
  Index value_stride() const { return value_stride_; }
  std::span<const std::int32_t> table(Index id) const { return at(id).pages; }
  const T* key_panel(Index page, Index h, Index panel) const {
    return keys_.data() + panel_offset(page, h, panel);
  }
  const T* value_row(Index page, Index h, Index row) const {
    return values_.data() + row_offset(page, h, row);
  }
  Workspace& workspace() { return workspace_; }
  std::vector<Index>& tasks() { return tasks_; }

 private:
  struct Sequence {
    Index size = 0;
    std::vector<std::int32_t> pages;
    bool used = false, listed = false;  // listed: scratch of require_ids
  };

  Sequence& at(Index id) { return sequences_[static_cast<std::size_t>(id)]; }
  const Sequence& at(Index id) const { return sequences_[static_cast<std::size_t>(id)]; }
  const Sequence& sequence(Index id) const {
    require_sequence(id);
    return at(id);
  }
  void require_sequence(Index id) const {
    if (!contains(id)) detail::raise<std::out_of_range>("PagedKvCache: there is no sequence ", id);
  }
  void require_range(Index id, Index begin, Index end) const {
    require_sequence(id);
    if (begin < 0 || begin > end || end > at(id).size) {
      detail::raise<std::out_of_range>("PagedKvCache: positions [", begin, ", ", end,
                                       ") of sequence ", id, " are not within [0, ", at(id).size,
                                       ")");
    }
  }
  Index panel_offset(Index page, Index h, Index panel) const {
    return ((page * options_.kv_heads + h) * options_.page + panel * kPanel) * options_.head_dim;
  }
  Index row_offset(Index page, Index h, Index row) const {
    return ((page * options_.kv_heads + h) * options_.page + row) * value_stride_;
  }
  std::int32_t& users(std::int32_t page) { return users_[static_cast<std::size_t>(page)]; }
  std::int32_t& writers(std::int32_t page) { return writers_[static_cast<std::size_t>(page)]; }
  Index pages_of(Index tokens) const { return (tokens + options_.page - 1) / options_.page; }
  Index page_at(Index id, Index position) const {
    return at(id).pages[static_cast<std::size_t>(position / options_.page)];
  }
  std::int32_t take_page() {
    const std::int32_t page = free_.back();
    free_.pop_back();
    users(page) = 1;
    return page;
  }
  void release(std::int32_t page) {
    if (--users(page) == 0) free_.push_back(page);
  }

  /// The page of the sequence's next token, its own: new, or a copy of a shared one.
  Index page_to_write(Sequence& s) {
    if (s.size % options_.page == 0) {
      s.pages.push_back(take_page());
    } else if (users(s.pages.back()) > 1) {
      const std::int32_t copy = take_page(), shared = s.pages.back();
      const Index heads = options_.kv_heads * options_.page;
      std::copy_n(key_panel(shared, 0, 0), heads * options_.head_dim,
                  keys_.data() + copy * heads * options_.head_dim);
      std::copy_n(value_row(shared, 0, 0), heads * value_stride_,
                  values_.data() + copy * heads * value_stride_);
      release(shared);
      s.pages.back() = copy;
    }
    return s.pages.back();
  }

  template <class K, class V>
  void put_rows(Index id, Index count, const K& key, const V& value, Index row) {
    Sequence& s = at(id);
    const Index d = options_.head_dim, e = options_.value_dim;
    for (Index r = row; r < row + count; ++r, ++s.size) {
      const Index page = page_to_write(s), at = s.size % options_.page;
      for (Index h = 0; h < options_.kv_heads; ++h) {
        detail::scatter(key.data() + r * key.outerStride() + h * d, d,
                        keys_.data() + panel_offset(page, h, at / kPanel) + at % kPanel, kPanel);
        detail::scatter(value.data() + r * value.outerStride() + h * e, e,
                        values_.data() + row_offset(page, h, at), 1);
      }
    }
  }

  PagedKvCacheOptions options_;
  Index value_stride_ = 0, in_use_ = 0;
  Vector<T> keys_, values_;  // [page][head][panels or rows of the page]
  std::vector<std::int32_t> users_, free_;
  std::vector<Sequence> sequences_;
  // Scratch, not part of the value.
  std::vector<std::int32_t> writers_;  // all 0 between calls
  std::vector<Index> tasks_;
  Workspace workspace_;
};

namespace detail {

/// One sequence as the source of DecodeRows and the operands of ForwardTiles; slots are positions.
template <StorageScalar T>
struct PagedSource {
  const PagedKvCache<T>* cache;
  std::span<const std::int32_t> table;
  Index tokens, page;
  using Entry = T;
  static constexpr Index kPanel = PagedKvCache<T>::kPanel;
  static constexpr bool kScaled = false, kContiguous = false;

  PagedSource(const PagedKvCache<T>& pool, Index id)
      : cache(&pool), table(pool.table(id)), tokens(pool.size(id)), page(pool.options().page) {}

  Index first() const { return 0; }
  Index size() const { return tokens; }
  Index sinks() const { return 0; }
  Index oldest_seen(Index) const { return 0; }
  Index slot(Index position) const { return position; }
  Index slots() const { return cache->options().pages * page; }
  Index run_end(Index, Index) const { return tokens; }
  Index value_stride() const { return cache->value_stride(); }
  bool has_gap() const { return false; }
  Index key_offset() const { return 0; }

  Index page_of(Index slot) const { return table[static_cast<std::size_t>(slot / page)]; }
  const T* key_panel(Index kv, Index panel) const {
    return cache->key_panel(page_of(panel * kPanel), kv, panel * kPanel % page / kPanel);
  }
  const T* key_panel_ahead(Index kv, Index panel) const {
    return panel * kPanel < tokens ? key_panel(kv, panel) : nullptr;
  }
  const T* value_row(Index kv, Index at) const {
    return cache->value_row(page_of(at), kv, at % page);
  }
  Index panels_together(Index panel) const { return (page - panel * kPanel % page) / kPanel; }

  template <int MR, RealScalar S>
  void pack_keys(Index kv, Index dim, Index first, Index count, S* panels, S*) const {
    pack_stored_keys<MR>(*this, kv, dim, first, count, panels);
  }
  template <int MR, RealScalar S>
  void pack_values(Index kv, Index dim, Index first, Index count, S* panels, Index panel_stride,
                   S* scratch) const {
    for (Index r = 0; r < count;) {
      const Index at = first + r, run = std::min(count - r, page - at % page);
      pack_column_panels<MR>(run, dim, value_row(kv, at), value_stride(), panels + r * MR,
                             panel_stride, scratch);
      r += run;
    }
  }
};

/// Up to 16 rows for each sequence, as one set of tasks.
template <StorageScalar T, StorageScalar Q, class Rule>
void decode_batch(PagedKvCache<T>& cache, std::span<const Index> ids, const AttentionSizes& n,
                  const DecodeOperands<compute_t<Q>, Q>& operands, const Rule& rule,
                  const AttentionTensors<compute_t<Q>>& tensors, ExecutorRef executor) {
  using S = compute_t<Q>;
  using Rows = DecodeRows<S, Q, PagedSource<T>, Rule>;
  const Index batch = static_cast<Index>(ids.size()), count = n.queries / batch;
  const auto with_rows = [&](Index b, const auto& f) {
    const PagedSource<T> source(cache, ids[static_cast<std::size_t>(b)]);
    DecodeOperands<S, Q> x = operands;
    x.row0 = b * count;
    x.count = count;
    x.position = source.size() - count;
    return f(Rows(source, n, rule, tensors, x));
  };
  // Sequence b has tasks [begin[b], begin[b + 1]).
  std::vector<Index>& begin = cache.tasks();
  begin.assign(1, 0);
  for (Index b = 0; b < batch; ++b) {
    begin.push_back(begin.back() +
                    n.kv_heads * with_rows(b, [](const Rows& x) { return x.splits(); }));
  }
  const Index part = with_rows(0, [](const Rows& x) { return x.part_scalars(); });
  const std::size_t bytes = with_rows(0, [](const Rows& x) { return x.scratch_bytes(); });
  // Scratch for a full pool, so that it rarely grows.
  const Index most = n.kv_heads * (PagedSource<T>(cache, ids[0]).slots() / Rows::kSplit + batch);
  const Index scalars = std::max(begin.back(), most) * part;
  Workspace& workspace = cache.workspace();
  workspace.prepare(executor.workers(), bytes);
  S* const partial = workspace.shared(padded_bytes<S>(scalars)).template take<S>(scalars);
  const auto splits_of = [&](Index b) {
    const auto at = begin.begin() + b;
    return (at[1] - at[0]) / n.kv_heads;
  };
  executor.run(begin.back(), [&](Index task, int worker) {
    const Index b = std::upper_bound(begin.begin(), begin.end(), task) - begin.begin() - 1;
    const Index local = task - begin[static_cast<std::size_t>(b)], splits = splits_of(b);
    with_rows(b, [&](const Rows& x) {
      x.attend(local / splits, local % splits, partial + task * part,
               workspace.arena(worker, bytes));
    });
  });
  executor.run(batch * n.kv_heads, [&](Index task, int) {
    const Index b = task / n.kv_heads, kv = task % n.kv_heads, splits = splits_of(b);
    with_rows(b, [&](const Rows& x) {
      x.merge(kv, splits, partial + (begin[static_cast<std::size_t>(b)] + kv * splits) * part);
    });
  });
}

/// Everything has been checked.
template <StorageScalar T, MatrixLike Q, class O, class Rule>
void attend_pages(PagedKvCache<T>& cache, std::span<const Index> ids, const Q& query, O& out,
                  const AttentionSizes& n, const AttentionShape& shape, const Rule& rule,
                  const AttentionTensors<compute_t<scalar_t<Q>>>& tensors, ExecutorRef executor) {
  using U = scalar_t<Q>;
  using S = compute_t<U>;
  static_assert(takes_as_given<Rule>, EIGENBLOCKS_POSITION_MESSAGE);
  if (n.queries == 0) return;
  DecodeOperands<S, U> x{
      query.data(), query.outerStride(), out.data(), out.outerStride(), nullptr, 0, 0, 0, 0};
  const Index batch = static_cast<Index>(ids.size()), count = n.queries / batch;
  if (count <= kMostDecodeRows) {
    decode_batch<T, U>(cache, ids, n, x, rule, tensors, executor);
    return;
  }
  AttentionSizes part = n;
  part.queries = count;
  for (Index b = 0; b < batch; ++b) {
    const PagedSource<T> source(cache, ids[static_cast<std::size_t>(b)]);
    Vector<S> row_scale;
    attend_rows<U>(source, source, part, x, shape, rule,
                   part_of(tensors, b * count, count, row_scale), cache.workspace(), executor);
    x.query += count * x.query_stride;
    x.out += count * x.out_stride;
  }
}

}  // namespace detail

/// Rows that a PagedKvCache<T> serves.
template <class Q, class T>
concept PagedQuery =
    MatrixLike<Q> && StorageScalar<T> && PagedKvCache<T>::template serves<scalar_t<Q>>;

/// Attention of query rows at the last positions of the sequences `ids`: of n rows each, rows [b n, (b + 1) n) belong to ids[b].
/// tensors: sinks and row_scale (of all rows) only.
template <StorageScalar T, PagedQuery<T> Q, OutputMatrix O, class Rule = CausalRule>
  requires SameScalar<Q, O>
void paged_attention_over_cache(PagedKvCache<T>& cache, std::span<const Index> ids, const Q& query,
                                O&& out, const AttentionShape& shape, const Rule& rule = {},
                                const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
                                ExecutorRef executor = {}) {
  const detail::AttentionSizes n = detail::require_over_cache(cache, query, out, shape, tensors);
  detail::require_score_heads(rule.score, n.heads);
  const Index count = cache.require_share("query", ids, query.rows());
  for (const Index id : ids) {
    detail::require(count <= cache.size(id), "query has ", count, " rows for sequence ", id,
                    ", which holds only ", cache.size(id), " positions");
  }
  detail::attend_pages(cache, ids, query, out, n, shape, rule, tensors, executor);
}

/// Appends rows of keys and values to the sequences, then attends with the query rows at their positions.
template <StorageScalar T, PagedQuery<T> Q, CacheRows<T> K, CacheRows<T> V, OutputMatrix O,
          class Rule = CausalRule>
  requires SameScalar<Q, O>
void paged_attention_step(PagedKvCache<T>& cache, std::span<const Index> ids, const Q& query,
                          const K& key, const V& value, O&& out, const AttentionShape& shape,
                          const Rule& rule = {},
                          const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
                          ExecutorRef executor = {}) {
  const detail::AttentionSizes n = detail::require_over_cache(cache, query, out, shape, tensors);
  detail::require_score_heads(rule.score, n.heads);
  detail::require_shape("key", key.rows(), key.cols(), query.rows(), key.cols(),
                        "one row per query row");
  cache.append_batch(ids, key, value);
  detail::attend_pages(cache, ids, query, out, n, shape, rule, tensors, executor);
}

EIGENBLOCKS_NAMESPACE_END
