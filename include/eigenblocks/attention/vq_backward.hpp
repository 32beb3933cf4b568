// Gradients of Transformer-VQ attention in linear time, by products of row blocks.
// Internal to attention/; the public function is in vq_attention.hpp, the conventions are VqGradient's (vq_options.hpp).
//
// For a block of queries, with keys [k, i] taken one by one, the tokens before k by code, and P from the log-sum-exp:
//   P_is = exp(<q_i + u, C_s> + log n_s - lse_i),   dS_is = P_is (<dout_i, mu_s> - D_i),   D_i = <dout_i, out_i>
//   P_ij and dS_ij likewise
//   G_is = dS_is + sum over j in [k, i] with code s of dS_ij;   dB = dS of the distances 0 .. M
//   dq = G C + dB R,   du = sum of the rows of G C,   dv_bias = sum of the rows of dB R,   dR = dB^T (q + v_bias)
//   dk_j = sum_i dS_ij (q_i + u),   dv_j = sum_i P_ij dout_i           over the pairs that the convention lets through
// A value in the aggregate gets dv_j = sum over the blocks that have it there of (sum_i P_is dout_i) / n_s: a second sweep, from
// the last block to the first, keeps that sum per code.
//
// Products run over pairs that are masked, with a weight of 0.  Where the other factor is not finite that would be NaN, so
// then its rows are taken one by one, without those pairs.
#pragma once

#include <eigenblocks/attention/online_softmax.hpp>
#include <eigenblocks/attention/vq_options.hpp>
#include <eigenblocks/core/product.hpp>

#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Where the gradients go: as query, key and value; du, dv_bias and dr contiguous as the operands, or null.
template <RealScalar S>
struct VqGradients {
  MatrixRef<S> dq, dk, dv;
  S *du, *dv_bias, *dr;
};

/// to = weights rows, without the rows of weight 0 if one of them is not finite.
template <RealScalar S>
void vq_weighted_rows(const ConstMatrixRef<S>& weights, const ConstMatrixRef<S>& rows, bool finite,
                      MatrixRef<S> to) {
  if (finite) return product_nn<S>(weights, rows, to);
  to.setZero();
  for (Index x = 0; x < to.rows(); ++x) {
    for (Index k = 0; k < rows.rows(); ++k) {
      if (weights(x, k) != S(0)) to.row(x) += weights(x, k) * rows.row(k);
    }
  }
}

template <RealScalar S>
class VqBackward {
  using View = Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>>;
  using ConstView = Eigen::Map<const Matrix<S>, 0, Eigen::OuterStride<>>;

 public:
  VqBackward(const VqAttentionSizes& sizes, const VqAttentionOptions& options,
             const VqAttentionOperands<S>& operands, const S* lse, const ConstMatrixRef<S>& out,
             const ConstMatrixRef<S>& dout, VqGradients<S>& gradients)
      : n_(sizes),
        o_(options),
        x_(operands),
        lse_(lse),
        out_(out),
        dout_(dout),
        g_(gradients),
        rows_(std::min<Index>(64, sizes.rows)),
        distances_(std::min(sizes.mem_len, sizes.rows) + 1) {
    for (Index i = 0; i < n_.rows; i += rows_) {
      widest_ = std::max(widest_, std::min(i + rows_, n_.rows) - first_key(i));
    }
  }

  void run(ExecutorRef executor, Workspace& workspace) const {
    const std::size_t bytes = scratch_bytes();
    workspace.prepare(executor.workers(), bytes);
    executor.run(n_.heads, [&](Index h, int worker) { head(h, workspace.arena(worker, bytes)); });
  }

 private:
  /// What a head works on; matrices with a row per query of the block.
  struct Head {
    Index h;
    ConstView codebook, r;  // r: the distances that occur
    bool codebook_finite, r_finite;
    VqAggregate<S> older;            // tokens that the block takes by code
    S *q_u, *q_v, *into_q;           // x d
    S *products, *p_code, *ds_code;  // x codes: A, then G; P and dS of the aggregate
    S* bias;                         // x distances: B, then dB
    S *p, *ds;                       // x keys
    S *dr, *log_count, *delta;       // delta: D
    Index* code;                     // of every token
  };

  std::size_t scratch_bytes() const {
    const Index d = n_.dim, s = n_.codes, e = n_.value_dim;
    return padded_bytes<Index>(s) + padded_bytes<S>(s * e) + 3 * padded_bytes<S>(rows_ * d) +
           3 * padded_bytes<S>(rows_ * s) + padded_bytes<S>(rows_ * distances_) +
           2 * padded_bytes<S>(rows_ * widest_) + padded_bytes<S>(distances_ * d) +
           padded_bytes<S>(s) + padded_bytes<S>(rows_) + padded_bytes<Index>(n_.rows);
  }

  /// Query i sends key gradients to the keys from here on.
  Index gradient_begin(Index i) const {
    const Index cache = o_.gradient == VqGradient::block_only ? 0 : n_.mem_len;
    return std::max<Index>(0, i / o_.block_len * o_.block_len - cache);
  }
  /// Keys that the block of queries from i on takes one by one begin here.
  Index first_key(Index i) const {
    const Index window = std::max<Index>(0, i - n_.mem_len);
    return n_.aggregate ? std::min(window, gradient_begin(i)) : window;
  }

  static ConstView view(const S* data, Index rows, Index cols, Index stride) {
    return ConstView(data, rows, cols, Eigen::OuterStride<>(stride));
  }
  static View block(S* data, Index rows, Index cols, Index stride) {
    return View(data, rows, cols, Eigen::OuterStride<>(stride));
  }
  static View block(S* data, Index rows, Index cols) { return block(data, rows, cols, cols); }

  void head(Index h, Arena arena) const {
    const Index d = n_.dim, s = n_.codes, e = n_.value_dim;
    const bool relative = x_.r != nullptr;
    const ConstView codebook =
        view(x_.codebook + h * s * x_.codebook_stride, s, d, x_.codebook_stride);
    const ConstView r =
        view(relative ? x_.r + h * (n_.mem_len + 1) * d : nullptr, relative ? distances_ : 0, d, d);
    Head c{h,
           codebook,
           r,
           vq_is_finite(codebook),
           vq_is_finite(r),
           {arena.take<Index>(s), arena.take<S>(s * e)},
           arena.take<S>(rows_ * d),
           arena.take<S>(rows_ * d),
           arena.take<S>(rows_ * d),
           arena.take<S>(rows_ * s),
           arena.take<S>(rows_ * s),
           arena.take<S>(rows_ * s),
           arena.take<S>(rows_ * distances_),
           arena.take<S>(rows_ * widest_),
           arena.take<S>(rows_ * widest_),
           arena.take<S>(distances_ * d),
           arena.take<S>(s),
           arena.take<S>(rows_),
           arena.take<Index>(n_.rows)};
    for (Index t = 0; t < n_.rows; ++t) c.code[t] = x_.code[t * n_.heads + h];
    std::fill_n(c.older.count, s, Index{0});
    std::fill_n(c.older.mean, s * e, S(0));
    std::fill_n(c.dr, distances_ * d, S(0));
    g_.dk.middleCols(h * d, d).setZero();
    g_.dv.middleCols(h * e, e).setZero();
    const auto zero = [&](S* gradient, Index count) {
      if (gradient != nullptr) std::fill_n(gradient + h * count, count, S(0));
    };
    zero(g_.du, d);
    zero(g_.dv_bias, d);
    zero(g_.dr, (n_.mem_len + 1) * d);
    Index older = 0;
    for (Index i = 0; i < n_.rows; i += rows_) {
      for (; n_.aggregate && older < first_key(i); ++older) {
        c.older.add(c.code[older], x_.value_of(n_, older, h), e);
      }
      queries(c, i, std::min(rows_, n_.rows - i), first_key(i));
    }
    if (g_.dr != nullptr) std::copy_n(c.dr, distances_ * d, g_.dr + h * (n_.mem_len + 1) * d);
    if (older > 0 && o_.gradient == VqGradient::through_cache) values_through_means(c, older);
  }

  /// q + shift of the block.
  void shifted(const Head& c, Index i, Index rows, const S* shift, S* to) const {
    View q = block(to, rows, n_.dim);
    q = view(x_.query + i * x_.query_stride + c.h * n_.dim, rows, n_.dim, x_.query_stride);
    if (shift != nullptr) {
      q.rowwise() += Eigen::Map<const RowVector<S>>(shift + c.h * n_.dim, n_.dim);
    }
  }

  S lse(const Head& c, Index i) const { return lse_[i * n_.heads + c.h]; }

  /// P of the aggregate, 0 for a code without tokens, from the products.
  void code_probabilities(const Head& c, Index i, Index rows) const {
    const Index s = n_.codes;
    for (Index k = 0; k < s; ++k) {
      c.log_count[k] = static_cast<S>(std::log(static_cast<double>(c.older.count[k])));
    }
    for (Index x = 0; x < rows; ++x) {
      S* const p = c.p_code + x * s;
      const S l = lse(c, i + x);
      for (Index k = 0; k < s; ++k) p[k] = c.products[x * s + k] + c.log_count[k];
      exponentials(p, s, l);
      for (Index k = 0; k < s; ++k) p[k] = c.older.count[k] == 0 ? S(0) : p[k];
    }
  }

  void queries(const Head& c, Index i, Index rows, Index first) const {
    const Index d = n_.dim, s = n_.codes, e = n_.value_dim, m = n_.mem_len;
    const Index keys = i + rows - first;
    const bool relative = x_.r != nullptr, any_older = n_.aggregate && first > 0;
    const View q_u = block(c.q_u, rows, d), q_v = block(c.q_v, rows, d);
    const auto dout = dout_.block(i, c.h * e, rows, e);
    shifted(c, i, rows, x_.u, c.q_u);
    product_nt<S>(q_u, c.codebook, block(c.products, rows, s));
    if (relative) {
      shifted(c, i, rows, x_.v_bias, c.q_v);
      product_nt<S>(q_v, c.r, block(c.bias, rows, distances_));
    }
    for (Index x = 0; x < rows; ++x) {
      c.delta[x] = dout.row(x).dot(out_.row(i + x).segment(c.h * e, e));
    }
    // Probabilities; columns are keys from `first` on, B has distance D in column D.
    for (Index x = 0; x < rows; ++x) {
      const Index at = i + x - first, begin = begin_of(i + x, first);
      const Index* const code = c.code + first;
      const S* const product = c.products + x * s;
      S* const p = c.p + x * keys;
      for (Index j = begin; j <= at; ++j) p[j] = product[code[j]];
      if (relative) {
        const S* const bias = c.bias + x * distances_;
        for (Index j = std::max(begin, at - m); j <= at; ++j) p[j] += bias[at - j];
      }
      const S l = lse(c, i + x);
      exponentials(p + begin, at + 1 - begin, l);
      std::fill(p, p + begin, S(0));
      std::fill(p + at + 1, p + keys, S(0));
    }
    product_nt<S>(dout,
                  view(x_.value + first * x_.value_stride + c.h * e, keys, e, x_.value_stride),
                  block(c.ds, rows, keys));
    if (any_older) {
      code_probabilities(c, i, rows);
      product_nt<S>(dout, view(c.older.mean, s, e, e), block(c.ds_code, rows, s));
    }
    // dS, G in the place of A, dB in the place of B.
    for (Index x = 0; x < rows; ++x) {
      const Index at = i + x - first, begin = begin_of(i + x, first);
      const Index* const code = c.code + first;
      S* const g = c.products + x * s;
      const S* const p = c.p + x * keys;
      S* const ds = c.ds + x * keys;
      std::fill_n(g, s, S(0));
      for (Index k = 0; any_older && k < s; ++k) {
        if (c.older.count[k] == 0) continue;
        g[k] = c.p_code[x * s + k] * (c.ds_code[x * s + k] - c.delta[x]);
      }
      for (Index j = begin; j <= at; ++j) ds[j] = p[j] * (ds[j] - c.delta[x]);
      for (Index j = begin; j <= at; ++j) g[code[j]] += ds[j];
      std::fill(ds, ds + begin, S(0));
      std::fill(ds + at + 1, ds + keys, S(0));
      if (!relative) continue;
      S* const bias = c.bias + x * distances_;
      const Index seen = std::min(distances_, at - begin + 1);
      for (Index distance = 0; distance < seen; ++distance) bias[distance] = ds[at - distance];
      std::fill(bias + seen, bias + distances_, S(0));
    }
    View into_q = block(c.into_q, rows, d);
    auto dq = g_.dq.block(i, c.h * d, rows, d);
    const auto add_sum = [&](S* to) {
      if (to != nullptr) Eigen::Map<RowVector<S>>(to + c.h * d, d) += into_q.colwise().sum();
    };
    vq_weighted_rows<S>(block(c.products, rows, s), c.codebook, c.codebook_finite, into_q);
    dq = into_q;
    add_sum(g_.du);
    if (relative) {
      vq_weighted_rows<S>(block(c.bias, rows, distances_), c.r, c.r_finite, into_q);
      dq += into_q;
      add_sum(g_.dv_bias);
      if (g_.dr != nullptr) {
        add_pairs(block(c.bias, rows, distances_), q_v, block(c.dr, distances_, d), [&](Index x) {
          const Index at = i + x - first;
          return Columns{0, std::min(distances_, at - begin_of(i + x, first) + 1)};
        });
      }
    }
    send_to_keys(i, rows, first, keys, c.ds, q_u, g_.dk.middleCols(c.h * d, d), false);
    send_to_keys(i, rows, first, keys, c.p, dout, g_.dv.middleCols(c.h * e, e),
                 o_.gradient == VqGradient::through_cache);
  }

  /// Column of the first key that query i sees among those from `first` on.
  Index begin_of(Index i, Index first) const {
    return n_.aggregate ? 0 : std::max<Index>(0, i - n_.mem_len - first);
  }

  /// gradient of the keys += weights^T rows, over the pairs of the convention, or all; changes the weights.
  void send_to_keys(Index i, Index rows, Index first, Index keys, S* weights,
                    const ConstMatrixRef<S>& from, MatrixRef<S> gradient, bool all) const {
    const Index begin = all ? first : std::max(first, gradient_begin(i));
    const auto receivers = [&](Index x) {
      const Index visible = first + begin_of(i + x, first);
      return Columns{
          std::max(begin, all ? visible : std::max(visible, gradient_begin(i + x))) - begin,
          i + x + 1 - begin};
    };
    const Index count = first + keys - begin;
    View pairs = block(weights + begin - first, rows, count, keys);
    for (Index x = 0; !all && x < rows; ++x)
      pairs.row(x).head(std::min(receivers(x).begin, count)).setZero();
    add_pairs(pairs, from, gradient.middleRows(begin, count), receivers);
  }

  struct Columns {
    Index begin, end;
  };

  /// to += weights^T from, where row x of the weights is 0 outside `columns(x)`.
  template <class F>
  static void add_pairs(const ConstMatrixRef<S>& weights, const ConstMatrixRef<S>& from,
                        MatrixRef<S> to, F&& columns) {
    if (vq_is_finite(from)) return product_tn<S>(weights, from, to, Write::add);
    for (Index x = 0; x < from.rows(); ++x) {
      const Columns seen = columns(x);
      for (Index j = seen.begin; j < seen.end; ++j) to.row(j) += weights(x, j) * from.row(x);
    }
  }

  /// dv of the tokens [0, older), from the last block to the first; takes them out of the counts on the way.
  void values_through_means(const Head& c, Index older) const {
    const Index s = n_.codes, e = n_.value_dim;
    S* const sums = c.older.mean;  // the means have served
    std::fill_n(sums, s * e, S(0));
    for (Index i = (n_.rows - 1) / rows_ * rows_; older > 0; i -= rows_) {
      for (; older > first_key(i); --older) {
        const Index code = c.code[older - 1];
        g_.dv.row(older - 1).segment(c.h * e, e) +=
            Eigen::Map<const RowVector<S>>(sums + code * e, e);
        --c.older.count[code];
      }
      const Index rows = std::min(rows_, n_.rows - i);
      shifted(c, i, rows, x_.u, c.q_u);
      product_nt<S>(block(c.q_u, rows, n_.dim), c.codebook, block(c.products, rows, s));
      code_probabilities(c, i, rows);
      // (sum_i P_is dout_i) / n_s: the division goes into P.
      for (Index x = 0; x < rows; ++x) {
        for (Index k = 0; k < s; ++k) {
          if (c.older.count[k] > 1) c.p_code[x * s + k] /= static_cast<S>(c.older.count[k]);
        }
      }
      product_tn<S>(block(c.p_code, rows, s), dout_.block(i, c.h * e, rows, e), block(sums, s, e),
                    Write::add);
    }
  }

  const VqAttentionSizes n_;
  const VqAttentionOptions o_;
  const VqAttentionOperands<S> x_;
  const S* lse_;
  const ConstMatrixRef<S> out_, dout_;
  VqGradients<S>& g_;
  Index rows_, distances_, widest_ = 0;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
