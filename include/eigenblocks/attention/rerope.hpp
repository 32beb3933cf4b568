// Causal attention under a relative position that stops growing, or grows slower, beyond a window: ReRoPE, Leaky ReRoPE,
// Self-Extend (position/rerope.hpp), at the cost of plain RoPE attention.
//
//   s_ij = scale rho_i <R(i) q_i, R(j) k_j>            i - j < w: near
//   s_ij = scale rho_i <R(P_i) q_i, R(S_j) k_j>        otherwise: far           then score, mask, soft-max as in rule.hpp
//
//   const auto rule = attention_rule(causal(), {}, rerope(512));
//   const RotaryTable<float> table(rope_frequencies(64), RopeLayout::half);
//   auto saved = rerope_attention_forward(q, k, v, out, shape, table, rule);                       // q, k not rotated
//   rerope_attention_backward(saved, q, k, v, out, dout, dq, dk, dv, shape, table, rule);
//   ReropeCache<float> cache(rerope(512), {.kv_heads = 8, .head_dim = 64});
//   rerope_attention_step(cache, q, k, v, out, shape, table, rule);                 // prompt, chunk or one token
//
// Rows stand at shape.query_offset + r, keys at shape.key_offset + j.  Only tiles that the edge of the window crosses compute
// two products (near_far.hpp); a sequence within the window gives plain RoPE attention bit for bit.  Log-n scaling
// (position/logn.hpp) is tensors.row_scale.  Storage float, double, half, bfloat16.  Memory beyond the kernel's: the rotated
// copies, at most two of q and two of k.
//
// Errors (invalid_argument, before anything is written): those of attention_forward; a mask that is not causal, because
// min(d, w) says nothing of keys ahead; table.rotary_dim() > head_dim.
// Sources: kexue.fm 9708, 9728; arXiv 2401.01325.
#pragma once

#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/near_far.hpp>
#include <eigenblocks/attention/rerope_cache.hpp>
#include <eigenblocks/position/rope.hpp>

#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <class Rule>
concept NearFarRule = std::same_as<decltype(Rule::position), NearFarPosition>;

/// Every row's keys end with its own position.
template <class M>
void require_causal(const M& mask, Index first, Index rows) {
  for (Index i = first; i < first + rows; ++i) {
    require(key_range(mask, i, i + 1).end <= std::max<Index>(0, i + 1),
            "the mask of a rule with a window of positions must be causal: combine it with "
            "causal()");
  }
}

inline std::vector<double> far_positions(const NearFarPosition& p, Index first, Index rows,
                                         bool keys, std::vector<double> list = {}) {
  list.resize(static_cast<std::size_t>(rows));
  for (Index r = 0; r < rows; ++r)
    list[static_cast<std::size_t>(r)] = keys ? p.far_key(first + r) : p.far_query(first + r);
  return list;
}

/// Whether far keys are the keys themselves.
template <RealScalar S>
bool keys_stay(const NearFarPosition& p, const RotaryTable<S>& table) {
  return p.kind == NearFarPosition::Kind::rerope && table.frequencies().attention_factor == 1.0;
}

/// Both rotations of queries and keys, and the kernel's rule that names them.
template <StorageScalar T>
struct RotatedOperands {
  using S = compute_t<T>;
  Matrix<T> near_query, far_query, near_key, far_key;

  template <MatrixLike Q, MatrixLike K>
  RotatedOperands(const Q& query, const K& key, const AttentionShape& shape,
                  const RotaryTable<S>& table, const NearFarPosition& p, ExecutorRef executor)
      : near_query(query.rows(), query.cols()),
        far_query(query.rows(), query.cols()),
        near_key(key.rows(), key.cols()) {
    const Index kv_heads = shape.kv_heads == 0 ? shape.heads : shape.kv_heads;
    rope_forward(query, shape.query_offset, table, near_query, {.heads = shape.heads}, executor);
    rope_forward(query, far_positions(p, shape.query_offset, query.rows(), false), table, far_query,
                 {.heads = shape.heads}, executor);
    rope_forward(key, shape.key_offset, table, near_key, {.heads = kv_heads}, executor);
    if (keys_stay(p, table)) {
      far_key_ = key.data();
      far_key_stride_ = key.outerStride();
      return;
    }
    far_key.resize(key.rows(), key.cols());
    rope_forward(key, far_positions(p, shape.key_offset, key.rows(), true), table, far_key,
                 {.heads = kv_heads}, executor);
    far_key_ = far_key.data();
    far_key_stride_ = far_key.outerStride();
  }

  RotatedOperands(const RotatedOperands&) = delete;  // far_key_ may point into far_key

  template <class Rule>
  auto rule(const Rule& from) const {
    using M = typename Rule::mask_type;
    using F = typename Rule::score_type;
    return AttentionRule<M, F, FarOperands<T>>{
        from.mask, from.score,
        FarOperands<T>{from.position.window, far_query.data(), far_query.outerStride(), far_key_,
                       far_key_stride_}};
  }

 private:
  const T* far_key_ = nullptr;
  Index far_key_stride_ = 0;
};

template <StorageScalar T, class Rule>
void require_rerope(const AttentionSizes& n, const AttentionShape& shape,
                    const RotaryTable<compute_t<T>>& table, const Rule& rule) {
  require_near_far(rule.position);
  require(table.rotary_dim() <= n.key_dim, "the table turns ", table.rotary_dim(),
          " channels, head_dim is ", n.key_dim);
  require_causal(rule.mask, shape.query_offset, n.queries);
}

}  // namespace detail

/// Writes out (Tq x heads*e) from queries and keys that are not rotated; returns the log-sum-exp for the backward.
template <MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O, detail::NearFarRule Rule>
  requires SameScalar<Q, K, V, O> AttentionSaved<compute_t<scalar_t<Q>>> rerope_attention_forward(
      const Q& query, const K& key, const V& value, O&& out, const AttentionShape& shape,
      const RotaryTable<compute_t<scalar_t<Q>>>& table, const Rule& rule,
      const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {}, ExecutorRef executor = {}) {
    using T = scalar_t<Q>;
    const detail::AttentionSizes n = detail::require_forward(query, key, value, out, shape);
    detail::require_tensors(tensors, n);
    detail::require_score_heads(rule.score, n.heads);
    detail::require_rerope<T>(n, shape, table, rule);
    const detail::RotatedOperands<T> x(query, key, shape, table, rule.position, executor);
    AttentionSaved<compute_t<T>> saved;
    saved.lse.resize(n.queries, n.heads);
    Workspace workspace;
    detail::attention_forward_into(x.near_query, x.near_key, value, out, saved.lse, shape,
                                   x.rule(rule), tensors, executor, workspace);
    return saved;
  }

/// Gradients by the unrotated queries and keys and by the values; everything else as attention_backward.
///   dq_i = R(i)^T dq1_i + R(P_i)^T dq2_i,   dk_j = R(j)^T dk1_j + R(S_j)^T dk2_j
template <MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike O, MatrixLike DO, OutputMatrix DQ,
          OutputMatrix DK, OutputMatrix DV, detail::NearFarRule Rule>
  requires SameScalar<Q, K, V, O, DO, DQ, DK, DV>
void rerope_attention_backward(
    const AttentionSaved<compute_t<scalar_t<Q>>>& saved, const Q& query, const K& key,
    const V& value, const O& out, const DO& dout, DQ&& dquery, DK&& dkey, DV&& dvalue,
    const AttentionShape& shape, const RotaryTable<compute_t<scalar_t<Q>>>& table, const Rule& rule,
    const AttentionTensors<compute_t<scalar_t<Q>>>& tensors = {},
    AttentionTensorGradients<compute_t<scalar_t<Q>>>* gradients = nullptr,
    ExecutorRef executor = {}) {
  using T = scalar_t<Q>;
  const detail::AttentionSizes n = detail::require_forward(query, key, value, out, shape);
  detail::require_rerope<T>(n, shape, table, rule);
  const NearFarPosition& p = rule.position;
  const detail::RotatedOperands<T> x(query, key, shape, table, p, executor);
  Matrix<T> far_dquery(query.rows(), query.cols()), far_dkey(key.rows(), key.cols());
  auto kernel_rule = x.rule(rule);
  kernel_rule.position.dquery = far_dquery.data();
  kernel_rule.position.dquery_stride = far_dquery.outerStride();
  kernel_rule.position.dkey = far_dkey.data();
  kernel_rule.position.dkey_stride = far_dkey.outerStride();
  Workspace workspace;
  detail::attention_backward_into(saved.lse, x.near_query, x.near_key, value, out, dout, dquery,
                                  dkey, dvalue, shape, kernel_rule, tensors, gradients, executor,
                                  workspace);
  rope_backward_in_place(dquery, shape.query_offset, table, {.heads = n.heads}, executor);
  rope_backward_in_place(far_dquery, detail::far_positions(p, shape.query_offset, n.queries, false),
                         table, {.heads = n.heads}, executor);
  dquery += far_dquery;
  rope_backward_in_place(dkey, shape.key_offset, table, {.heads = n.kv_heads}, executor);
  if (!detail::keys_stay(p, table)) {
    rope_backward_in_place(far_dkey, detail::far_positions(p, shape.key_offset, n.keys, true),
                           table, {.heads = n.kv_heads}, executor);
  }
  dkey += far_dkey;
}

namespace detail {

/// Near keys of the tiles: of positions from `begin` on the rows of this call, before them the ring, and what is older than the
/// window, which no row of this call is near to, zeros.
template <StorageScalar T>
struct NearCacheSource {
  const KeyRing<T>* ring;
  Index begin, window;
  MatrixSource<T> rows;

  template <int MR, RealScalar S>
  void pack_keys(Index kv, Index dim, Index first, Index count, S* panels, S* scratch) const {
    constexpr Index kPanel = KeyRing<T>::kPanel;
    for (Index c0 = 0; c0 < count; c0 += MR, panels += dim * MR) {
      const Index p = first + c0, here = std::min<Index>(MR, count - c0);
      if (p >= begin) {
        rows.template pack_keys<MR>(kv, dim, p - begin, here, panels, scratch);
        continue;
      }
      std::fill_n(panels, dim * MR, S(0));
      for (Index m = 0; m < here; ++m) {
        const Index at = p + m;
        if (at <= begin - window) continue;
        const T* from;
        Index stride = 1;
        if (at >= begin) {
          from = rows.key + (at - begin) * rows.key_stride + kv * dim;
        } else {
          from = ring->key_panel(kv, ring->slot(at) / kPanel) + ring->slot(at) % kPanel;
          stride = kPanel;
        }
        for (Index c = 0; c < dim; ++c) panels[c * MR + m] = static_cast<S>(from[c * stride]);
      }
    }
  }
};

/// The position policy of a step: far queries, and near keys in the ring.
template <StorageScalar T>
struct CachedFarOperands {
  Index window;
  const T* query;
  Index query_stride;
  const KeyRing<T>* ring;
  const T* query_row(Index row, Index column) const { return query + row * query_stride + column; }
};

template <StorageScalar T, class Rule>
struct ReropeCacheRule {
  using mask_type = MaskRef<typename Rule::mask_type>;
  using score_type = typename Rule::score_type;
  mask_type mask;
  const score_type& score;
  CachedFarOperands<T> position;
};

}  // namespace detail

/// Appends keys (not rotated) and values, then attends with the query rows at their positions.  Any number of rows; the rows of
/// the full forward, up to rounding, however the sequence is cut.  Allocates nothing once the cache and its scratch have their
/// size.  tensors: sinks and row_scale only.
/// Errors: those of attention_step; a rule whose policy is not the cache's; a mask that is not causal.  On an error neither the
/// cache nor out is changed.
template <StorageScalar T, MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O,
          detail::NearFarRule Rule>
  requires SameScalar<Q, K, V, O> && std::same_as<scalar_t<Q>, T>
void rerope_attention_step(ReropeCache<T>& cache, const Q& query, const K& key, const V& value,
                           O&& out, const AttentionShape& shape,
                           const RotaryTable<compute_t<T>>& table, const Rule& rule,
                           const AttentionTensors<compute_t<T>>& tensors = {},
                           ExecutorRef executor = {}) {
  KvCache<T>& far = cache.far();
  const detail::AttentionSizes n = detail::require_over_cache(far, query, out, shape, tensors);
  detail::require_score_heads(rule.score, n.heads);
  far.require_rows(key.rows(), key.cols(), value.rows(), value.cols());
  detail::require_shape("key", key.rows(), key.cols(), query.rows(), key.cols(),
                        "one row per query row");
  detail::require(rule.position == cache.position(), "the rule's position policy (window ",
                  rule.position.window, ") is not that of the cache (window ",
                  cache.position().window, ")");
  const Index begin = cache.size(), rows = n.queries;
  AttentionShape at = shape;
  at.query_offset = begin;
  detail::require_rerope<T>(n, at, table, rule);
  far.require_room(rows);
  if (rows == 0) return;

  const NearFarPosition& p = cache.position();
  const Index q_cols = query.cols(), k_cols = key.cols();
  cache.rotated().resize(static_cast<std::size_t>(2 * rows * (q_cols + k_cols)));
  T* const room = cache.rotated().data();
  const auto rotate = [&](const auto& x, const RopePositions& positions, T* to, Index heads) {
    Eigen::Map<Matrix<T>> y(to, x.rows(), x.cols());
    rope_forward(x, positions, table, y, {.heads = heads}, executor);
    return y;
  };
  const auto far_at = [&](bool keys) -> const std::vector<double>& {
    cache.positions() = detail::far_positions(p, begin, rows, keys, std::move(cache.positions()));
    return cache.positions();
  };
  const auto near_query = rotate(query, begin, room, n.heads);
  const auto far_query = rotate(query, far_at(false), room + rows * q_cols, n.heads);
  T* const key_room = room + 2 * rows * q_cols;
  const auto near_key = rotate(key, begin, key_room, n.kv_heads);
  if (detail::keys_stay(p, table)) {
    far.append(key, value);
  } else {
    far.append(rotate(key, far_at(true), key_room + rows * k_cols, n.kv_heads), value);
  }
  const detail::ReropeCacheRule<T, Rule> cached{
      detail::MaskRef<typename Rule::mask_type>(rule.mask),
      rule.score,
      {p.window, far_query.data(), far_query.outerStride(), &cache.near()}};
  const detail::NearFarSource<detail::NearCacheSource<T>, detail::CacheSource<T>> source{
      {&cache.near(), begin, p.window, {near_key.data(), near_key.outerStride(), nullptr, 0}},
      {&far}};
  // Few rows read the ring, so it takes their keys first; for many it still serves the window before them.
  const bool few = rows <= ReropeCache<T>::kStepRows;
  if (few) cache.put_near(begin, near_key.data(), near_key.outerStride());
  detail::attend_over_cache<T>(far, source, n, near_query.data(), near_query.outerStride(),
                               out.data(), out.outerStride(), nullptr, 0, shape, cached, tensors,
                               executor);
  if (!few) cache.put_near(begin, near_key.data(), near_key.outerStride());
}

EIGENBLOCKS_NAMESPACE_END
