// Transformer-VQ attention without a causal mask and without positions: the form for encoders and cross-attention.
//
//   z_j = nearest code of k_j,  n_s = how many keys have code s,  mu_s = mean of their values
//   out_i = sum_s P_is mu_s,   P_is = softmax over s of (<q_i, C_s> + log n_s)         = softmax_j(<q_i, C_z(j)>) v_j
//
// in time O((T_q + T_k) S (d + e)) instead of O(T_q T_k (d + e)); the same as exp(Q C^T)(Delta^T V) / exp(Q C^T) Delta^T 1 with
// one-hot Delta, but means and log counts keep every number of ordinary size.
//
//   const auto saved = vq_encoder_forward(q, k, v, codebook, out, {.heads = H}, &mask);       // mask: which keys count, or null
//   vq_encoder_backward(saved, q, codebook, out, dout, dq, dv, {.heads = H}, &mask);
//
// Shapes: query and out T_q x (heads * d), (heads * e); key and value T_k x the same; codebook (heads * codes) x d; mask T_k.
// The backward follows the aggregate's rule (vq_options.hpp): scores use the constant codebook, so keys get no gradient from
// here; they learn by the commitment loss (vq_commit_backward).  dv_j = sum_i P_iz(j) dout_i / n_z(j), 0 for masked keys.
// Without a key that counts: out = 0, lse = -inf, every gradient 0.  Outputs must not overlap inputs.
// Executors do not change a bit: forward tasks are heads x blocks of rows, backward tasks are heads.
// Source: arXiv 2309.16354, kexue.fm/archives/9844.
//
// Errors (invalid_argument): an empty codebook, heads < 1, shapes that do not fit.  Zero rows are valid.
#pragma once

#include <eigenblocks/attention/online_softmax.hpp>
#include <eigenblocks/attention/vq_backward.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

struct VqEncoderOptions {
  Index heads = 1;
};

/// What the backward needs besides the operands and the output.
template <RealScalar S>
struct VqEncoderSaved {
  VqCodes codes;        ///< T_k x heads
  Matrix<Index> count;  ///< heads x codes
  Matrix<S> mean;       ///< (heads * codes) x e; 0 for a code without keys
  Matrix<S> lse;        ///< T_q x heads
};

namespace detail {

struct VqEncoderSizes {
  VqSizes query;
  Index value_dim;
};

template <class Q, class C>
VqEncoderSizes vq_encoder_sizes(const Q& query, const C& codebook, Index value_cols,
                                const VqEncoderOptions& options) {
  const VqSizes n = vq_sizes(query.rows(), query.cols(), codebook.rows(), codebook.cols(),
                             options.heads, "query");
  require(value_cols % n.heads == 0, "value has ", value_cols, " columns, expected a multiple of ",
          n.heads, " (heads)");
  return {n, value_cols / n.heads};
}

/// Rows of one pass: the scores of a block stay in the second-level cache.
inline constexpr Index kVqEncoderRows = 64;

/// scores (rows x codes) = <q_i, C_s> + log n_s, and -inf for a code without keys.
template <RealScalar S>
void vq_encoder_scores(const VqSizes& n, Index h, Index i, const ConstMatrixRef<S>& query,
                       const ConstMatrixRef<S>& codebook, const Matrix<Index>& count,
                       Eigen::Map<Matrix<S>>& scores) {
  product_nt<S>(query.block(i, h * n.dim, scores.rows(), n.dim),
                codebook.middleRows(h * n.codes, n.codes), scores);
  for (Index s = 0; s < n.codes; ++s) {
    if (count(h, s) == 0) {
      scores.col(s).setConstant(-std::numeric_limits<S>::infinity());
    } else {
      scores.col(s).array() += static_cast<S>(std::log(static_cast<double>(count(h, s))));
    }
  }
}

}  // namespace detail

/// out from query, key and value.
template <MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike C, OutputMatrix O>
  requires SameScalar<Q, K, V, C, O> && RealScalar<scalar_t<Q>> VqEncoderSaved<scalar_t<Q>>
  vq_encoder_forward(const Q& query, const K& key, const V& value, const C& codebook, O&& out,
                     const VqEncoderOptions& options = {}, const VqTokenMask* mask = nullptr,
                     ExecutorRef executor = {}) {
    using S = scalar_t<Q>;
    const detail::VqEncoderSizes sizes =
        detail::vq_encoder_sizes(query, codebook, value.cols(), options);
    const detail::VqSizes& n = sizes.query;
    const Index e = sizes.value_dim;
    detail::require(key.cols() == query.cols(), "key has ", key.cols(), " columns, expected ",
                    query.cols(), " (columns of query)");
    detail::require(value.rows() == key.rows(), "value has ", value.rows(), " rows, expected ",
                    key.rows(), " (rows of key)");
    detail::require_token_mask(mask, key.rows());
    detail::require_shape("out", out.rows(), out.cols(), n.tokens, value.cols(),
                          "rows of query, columns of value");
    VqEncoderSaved<S> saved{vq_nearest(key, codebook, n.heads, executor),
                            Matrix<Index>::Zero(n.heads, n.codes),
                            Matrix<S>::Zero(n.heads * n.codes, e), Matrix<S>(n.tokens, n.heads)};
    executor.run(n.heads, [&](Index h, int) {
      const detail::VqAggregate<S> all{saved.count.data() + h * n.codes,
                                       saved.mean.data() + h * n.codes * e};
      for (Index t = 0; t < key.rows(); ++t) {
        if (mask != nullptr && !(*mask)[t]) continue;
        all.add(saved.codes(t, h), value.data() + t * value.outerStride() + h * e, e);
      }
    });
    constexpr Index block = detail::kVqEncoderRows;
    const Index blocks = (n.tokens + block - 1) / block;
    Workspace workspace;
    const std::size_t bytes = detail::padded_bytes<S>(block * n.codes);
    workspace.prepare(executor.workers(), bytes);
    executor.run(n.heads * blocks, [&](Index task, int worker) {
      const Index h = task / blocks, i = task % blocks * block,
                  rows = std::min(block, n.tokens - i);
      detail::Arena arena = workspace.arena(worker, bytes);
      Eigen::Map<Matrix<S>> p(arena.take<S>(rows * n.codes), rows, n.codes);
      detail::vq_encoder_scores<S>(n, h, i, query, codebook, saved.count, p);
      for (Index x = 0; x < rows; ++x) {
        S top = p.row(x).maxCoeff();
        if (top == -std::numeric_limits<S>::infinity()) top = 0;
        const S sum = detail::exponentials(p.row(x).data(), n.codes, top);
        saved.lse(i + x, h) = top + std::log(sum);
        p.row(x) *= sum == S(0) ? S(0) : S(1) / sum;
      }
      detail::product_nn<S>(p, saved.mean.middleRows(h * n.codes, n.codes),
                            out.block(i, h * e, rows, e));
    });
    return saved;
  }

/// dq and dv from dout, after vq_encoder_forward; both are overwritten.
template <MatrixLike Q, MatrixLike C, MatrixLike O, MatrixLike DO, OutputMatrix DQ, OutputMatrix DV>
  requires SameScalar<Q, C, O, DO, DQ, DV> && RealScalar<scalar_t<Q>>
void vq_encoder_backward(const VqEncoderSaved<scalar_t<Q>>& saved, const Q& query,
                         const C& codebook, const O& out, const DO& dout, DQ&& dq, DV&& dv,
                         const VqEncoderOptions& options = {}, const VqTokenMask* mask = nullptr,
                         ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  const detail::VqEncoderSizes sizes =
      detail::vq_encoder_sizes(query, codebook, out.cols(), options);
  const detail::VqSizes& n = sizes.query;
  const Index e = sizes.value_dim, keys = saved.codes.rows();
  detail::require_shape("out", out.rows(), out.cols(), n.tokens, out.cols(), "rows of query");
  detail::require_shape("dout", dout.rows(), dout.cols(), n.tokens, out.cols(), "shape of out");
  detail::require_shape("dq", dq.rows(), dq.cols(), n.tokens, query.cols(), "shape of query");
  detail::require_shape("dv", dv.rows(), dv.cols(), keys, out.cols(),
                        "rows of key, columns of out");
  detail::require_token_mask(mask, keys);
  detail::require_codes(saved.codes, {keys, n.heads, n.dim, n.codes});
  detail::require_shape("saved.count", saved.count.rows(), saved.count.cols(), n.heads, n.codes,
                        "heads x codes");
  detail::require_shape("saved.mean", saved.mean.rows(), saved.mean.cols(), n.heads * n.codes, e,
                        "heads * codes x columns of a head's value");
  detail::require_shape("saved.lse", saved.lse.rows(), saved.lse.cols(), n.tokens, n.heads,
                        "rows of query x heads");
  constexpr Index block = detail::kVqEncoderRows;
  Workspace workspace;
  const std::size_t bytes =
      2 * detail::padded_bytes<S>(block * n.codes) + detail::padded_bytes<S>(n.codes * e);
  workspace.prepare(executor.workers(), bytes);
  executor.run(n.heads, [&](Index h, int worker) {
    detail::Arena arena = workspace.arena(worker, bytes);
    S* const p_data = arena.take<S>(block * n.codes);
    S* const ds_data = arena.take<S>(block * n.codes);
    Eigen::Map<Matrix<S>> sums(arena.take<S>(n.codes * e), n.codes, e);  // sum_i P_is dout_i
    sums.setZero();
    const auto codewords = codebook.middleRows(h * n.codes, n.codes);
    const bool finite = detail::vq_is_finite(codewords);
    for (Index i = 0; i < n.tokens; i += block) {
      const Index rows = std::min(block, n.tokens - i);
      Eigen::Map<Matrix<S>> p(p_data, rows, n.codes), ds(ds_data, rows, n.codes);
      const auto dout_rows = dout.block(i, h * e, rows, e);
      detail::vq_encoder_scores<S>(n, h, i, query, codebook, saved.count, p);
      for (Index x = 0; x < rows; ++x) {
        const S lse = saved.lse(i + x, h);
        const bool dead = lse == -std::numeric_limits<S>::infinity();
        detail::exponentials(p.row(x).data(), n.codes, dead ? S(0) : lse);
      }
      detail::product_nt<S>(dout_rows, saved.mean.middleRows(h * n.codes, n.codes), ds);
      for (Index x = 0; x < rows; ++x) {
        const S delta = dout_rows.row(x).dot(out.row(i + x).segment(h * e, e));
        ds.row(x).array() = p.row(x).array() * (ds.row(x).array() - delta);
      }
      detail::vq_weighted_rows<S>(ds, codewords, finite, dq.block(i, h * n.dim, rows, n.dim));
      detail::product_tn<S>(p, dout_rows, sums, detail::Write::add);
    }
    for (Index s = 0; s < n.codes; ++s)
      sums.row(s) /= static_cast<S>(std::max<Index>(1, saved.count(h, s)));
    for (Index t = 0; t < keys; ++t) {
      auto to = dv.row(t).segment(h * e, e);
      if (mask == nullptr || (*mask)[t]) {
        to = sums.row(saved.codes(t, h));
      } else {
        to.setZero();
      }
    }
  });
}

EIGENBLOCKS_NAMESPACE_END
