// Transformer-VQ attention as it is defined: every query against every key.  One screen, the oracle of vq_attention.hpp.
//
//   s_ij = <q_i + u, C_z(j)> + [i - j <= M] <q_i + v_bias, r_(i-j)>      j <= i; keys beyond M only with `aggregate`
//   out_i = sum_j softmax_j(s_i) v_j,   lse_i = log sum_j exp(s_ij)
// Shapes, options and errors as in vq_attention.hpp.  Time O(T^2) for each head.
#pragma once

#include <eigenblocks/attention/vq_options.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

/// out (T x (heads * e)) and lse (T x heads) from the codes of the keys.
template <MatrixLike Q, MatrixLike V, MatrixLike C, OutputMatrix O, OutputMatrix L>
  requires SameScalar<Q, V, C, O, L> && RealScalar<scalar_t<Q>>
void vq_attention_reference(const Q& query, const VqCodes& codes, const V& value, const C& codebook,
                            O&& out, L&& lse, const VqAttentionOptions& options,
                            const VqBias<scalar_t<Q>>& bias = {}) {
  using S = scalar_t<Q>;
  const detail::VqAttentionSizes n =
      detail::vq_attention_sizes(query, query, value, codebook, options, bias);
  detail::require_codes(codes, {n.rows, n.heads, n.dim, n.codes});
  detail::require_shape("out", out.rows(), out.cols(), n.rows, value.cols(), "shape of value");
  detail::require_shape("lse", lse.rows(), lse.cols(), n.rows, n.heads, "tokens x heads");
  Vector<S> score(n.rows);
  for (Index h = 0; h < n.heads; ++h) {
    for (Index i = 0; i < n.rows; ++i) {
      const Index first = options.aggregate ? 0 : std::max<Index>(0, i - n.mem_len);
      RowVector<S> q_u = query.row(i).segment(h * n.dim, n.dim), q_v = q_u;
      if (bias.u.size() != 0) q_u += bias.u.row(h);
      if (bias.v_bias.size() != 0) q_v += bias.v_bias.row(h);
      S top = -std::numeric_limits<S>::infinity();
      for (Index j = first; j <= i; ++j) {
        score[j] = q_u.dot(codebook.row(h * n.codes + codes(j, h)));
        if (bias.r.size() != 0 && i - j <= n.mem_len) {
          score[j] += q_v.dot(bias.r.row(h * (n.mem_len + 1) + i - j));
        }
        top = std::max(top, score[j]);
      }
      RowVector<S> sum = RowVector<S>::Zero(n.value_dim);
      S total = 0;
      for (Index j = first; j <= i; ++j) {
        const S p = std::exp(score[j] - top);
        total += p;
        sum += p * value.row(j).segment(h * n.value_dim, n.value_dim);
      }
      out.row(i).segment(h * n.value_dim, n.value_dim) = sum / total;
      lse(i, h) = top + std::log(total);
    }
  }
}

EIGENBLOCKS_NAMESPACE_END
