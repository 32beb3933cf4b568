// Transformer-VQ attention: options, optional biases, sizes and their checks; operands, and the sums of older tokens.  The
// definition is in vq_attention.hpp.
#pragma once

#include <eigenblocks/attention/vq_codebook.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

/// What the backward sends through the cache; the forward does not depend on it.  B is the block of query i, tokens
/// [b L, (b+1) L); the cache of B is the M tokens before it.  Queries, u, v_bias and r always get their whole gradient; the
/// gradient of a key is that of its codeword (straight-through).
///                  d key_j from query i           d value_j from query i
enum class VqGradient {
  through_cache,  ///< j in B or its cache               every j <= i: through the means too   (grad_thru_cache = 1)
  recent_only,  ///< j in B or its cache               j in B or its cache: means are constants
  block_only,  ///< j in B                            j in B                                 (grad_thru_cache = 0)
};

struct VqAttentionOptions {
  Index heads = 1;
  Index block_len =
      512;  ///< L, at least 1: which keys get a gradient; L >= T is the full straight-through gradient
  Index mem_len = 512;  ///< M, at least 0: distances 0 .. M have a relative bias
  bool aggregate =
      true;  ///< keys beyond M stay visible; false: plain window attention over M + 1 keys
  VqGradient gradient = VqGradient::through_cache;
};

/// Biases of Transformer-XL, or their gradients.  A matrix of size 0 is absent: a zero u or v_bias, or no relative bias.
template <RealScalar S>
struct VqBias {
  Matrix<S> u;       ///< heads x d
  Matrix<S> v_bias;  ///< heads x d, together with r
  Matrix<S> r;       ///< (heads * (M + 1)) x d, the distances 0 .. M of a head in consecutive rows
};

namespace detail {

/// Sizes of one call.  Rows are numbered from the first new one; remembered ones are -cached .. -1.
struct VqAttentionSizes {
  Index rows, heads, dim, value_dim, codes, mem_len;
  Index cached = 0;  ///< remembered tokens, at most mem_len
  Index seen = 0;    ///< all tokens before row 0: token t < 0 is in slot (seen + t) % mem_len
  bool aggregate = true;
};

/// Operands of one call.  Rows of codebook and of r: those of a head follow each other, r by distance 0 .. M.
template <RealScalar S>
struct VqAttentionOperands {
  const S* query;
  Index query_stride;
  const S* value;
  Index value_stride;
  const Index* code;  ///< rows x heads
  const S* codebook;
  Index codebook_stride;
  const S *u, *v_bias, *r;             ///< null: none; u and v_bias heads x d, r heads (M + 1) x d
  const Index* memory_code = nullptr;  ///< mem_len x heads
  const S* memory_value = nullptr;     ///< mem_len x (heads e)

  Index code_of(const VqAttentionSizes& n, Index token, Index h) const {
    return token >= 0 ? code[token * n.heads + h]
                      : memory_code[(n.seen + token) % n.mem_len * n.heads + h];
  }
  const S* value_of(const VqAttentionSizes& n, Index token, Index h) const {
    return token >= 0 ? value + token * value_stride + h * n.value_dim
                      : memory_value + ((n.seen + token) % n.mem_len * n.heads + h) * n.value_dim;
  }
};

/// Tokens of one head summed up by code.
template <RealScalar S>
struct VqAggregate {
  Index* count;  ///< codes
  S* mean;       ///< codes x e

  /// mean' = n/(n + 1) mean + value/(n + 1)
  void add(Index s, const S* value, Index e) const {
    const S n = static_cast<S>(count[s]++), one_more = static_cast<S>(count[s]);
    Eigen::Map<Vector<S>> to(mean + s * e, e);
    to = (n / one_more) * to + (S(1) / one_more) * Eigen::Map<const Vector<S>>(value, e);
  }
  /// Merges what `before` holds into this.
  void add(const VqAggregate& before, Index codes, Index e) const {
    for (Index s = 0; s < codes; ++s) {
      if (before.count[s] == 0) continue;
      const S n = static_cast<S>(before.count[s]), m = static_cast<S>(count[s]);
      Eigen::Map<Vector<S>> to(mean + s * e, e);
      to = (m / (n + m)) * to + (n / (n + m)) * Eigen::Map<const Vector<S>>(before.mean + s * e, e);
      count[s] += before.count[s];
    }
  }
};

/// Whether all entries are finite.
template <class M>
bool vq_is_finite(const M& m) {
  using S = typename M::Scalar;
  return (m * S(0)).sum() == S(0);  // (NaN otherwise)
}

template <class Q, class K, class V, class C, RealScalar S>
VqAttentionSizes vq_attention_sizes(const Q& query, const K& key, const V& value, const C& codebook,
                                    const VqAttentionOptions& options, const VqBias<S>& bias) {
  const VqSizes n = vq_sizes(query.rows(), query.cols(), codebook.rows(), codebook.cols(),
                             options.heads, "query");
  require_shape("key", key.rows(), key.cols(), n.tokens, query.cols(), "shape of query");
  require(value.rows() == n.tokens && value.cols() % n.heads == 0, "value is ", value.rows(), " x ",
          value.cols(), ", expected ", n.tokens, " rows (rows of query) and a multiple of ",
          n.heads, " columns (heads)");
  require(options.block_len >= 1, "block_len (", options.block_len, ") must be at least 1");
  require(options.mem_len >= 0, "mem_len (", options.mem_len, ") must not be negative");
  const auto optional = [&](const char* name, const Matrix<S>& m, Index rows, const char* meaning) {
    if (m.size() != 0) require_shape(name, m.rows(), m.cols(), rows, n.dim, meaning);
  };
  optional("u", bias.u, n.heads, "heads x columns of codebook, or empty");
  optional("v_bias", bias.v_bias, n.heads, "heads x columns of codebook, or empty");
  optional("r", bias.r, n.heads * (options.mem_len + 1),
           "heads * (mem_len + 1) x columns of codebook, or empty");
  require(bias.v_bias.size() == 0 || bias.r.size() != 0, "v_bias is ", bias.v_bias.rows(), " x ",
          bias.v_bias.cols(), ", r is empty: v_bias needs r");
  return {.rows = n.tokens,
          .heads = n.heads,
          .dim = n.dim,
          .value_dim = value.cols() / n.heads,
          .codes = n.codes,
          .mem_len = options.mem_len,
          .aggregate = options.aggregate};
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
