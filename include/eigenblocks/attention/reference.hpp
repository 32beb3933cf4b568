// Attention as it is written on paper: one loop over the pairs, in double, no tiles.  The oracle of every fast path.
//
//   attention_reference(q, k, v, out, lse, shape, rule, tensors)                   pipeline of rule.hpp
//   attention_reference_backward(q, k, v, dout, dq, dk, dv, shape, rule, tensors, gradients)
//       D_i = <dout_i, out_i> - dlse_i;  P_ij = exp(s_ij - lse_i);  dS_ij = P_ij (<dout_i, v_j> - D_i)
//       dbias = dS;  dS = dS * score'(s);  dq_i = scale rho_i sum_j dS_ij k_j;  dk_j = scale sum_i rho_i dS_ij q_i
//       dv_j = sum_i P_ij dout_i;  drho_i = scale sum_hj dS_ij <q_i, k_j>;  dsink_h = -sum_i exp(sink_h - lse_i) D_i
//
// Takes and gives double.  Shares only the description of the call (rule.hpp) with the kernels, none of their code.
#pragma once

#include <eigenblocks/attention/rule.hpp>

#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Scores of one query row against all keys: raw (scaled products) and final (after the pipeline, -inf where masked).
template <class Rule>
void reference_scores(const ConstMatrixRef<double>& q, const ConstMatrixRef<double>& k,
                      const AttentionSizes& n, const AttentionShape& shape, const Rule& rule,
                      const AttentionTensors<double>& tensors, Index row, Index h,
                      std::vector<double>& raw, std::vector<double>& score) {
  const Index d = n.key_dim, kv = h / n.group, i = row + shape.query_offset;
  const double rho = tensors.row_scale ? (*tensors.row_scale)[row] : 1.0;
  for (Index col = 0; col < n.keys; ++col) {
    const auto at = static_cast<std::size_t>(col);
    const Index j = col + shape.key_offset;
    double product = 0;
    for (Index c = 0; c < d; ++c) product += q(row, h * d + c) * k(col, kv * d + c);
    raw[at] = n.scale * rho * product;
    bool visible = rule.mask(i, j, h) && (tensors.mask == nullptr || (*tensors.mask)(row, col));
    double bias = 0;
    if (tensors.bias != nullptr) {
      bias = (*tensors.bias)(tensors.bias->rows() == n.queries ? row : h * n.queries + row, col);
      visible = visible && bias != -std::numeric_limits<double>::infinity();
    }
    score[at] =
        visible ? rule.score(raw[at], i, j, h) + bias : -std::numeric_limits<double>::infinity();
  }
}

/// The denominator of one row: lse = top + log_sum.  Kept in two parts, because next to a row of -1e30 the logarithm of
/// the number of keys would be lost.
struct ReferenceNormaliser {
  static constexpr double kNone = -std::numeric_limits<double>::infinity();
  double top = kNone, log_sum = 0;
  double lse() const { return top + log_sum; }
  double probability(double score) const {
    return score == kNone ? 0.0 : std::exp(score - top - log_sum);
  }
};

inline ReferenceNormaliser reference_normaliser(const std::vector<double>& score,
                                                const AttentionTensors<double>& tensors, Index h) {
  ReferenceNormaliser n;
  if (tensors.sinks) n.top = (*tensors.sinks)[h];
  for (const double s : score) n.top = s > n.top || std::isnan(s) ? s : n.top;
  if (n.top == n.kNone) return n;
  double sum = tensors.sinks ? std::exp((*tensors.sinks)[h] - n.top) : 0.0;
  for (const double s : score) sum += s == n.kNone ? 0.0 : std::exp(s - n.top);
  n.log_sum = std::log(sum);
  return n;
}

}  // namespace detail

/// out (Tq x heads*e) and lse (Tq x heads) of the pipeline in rule.hpp.  Errors as attention_forward.
template <class Rule = DefaultRule>
void attention_reference(const ConstMatrixRef<double>& query, const ConstMatrixRef<double>& key,
                         const ConstMatrixRef<double>& value, MatrixRef<double> out,
                         MatrixRef<double> lse, const AttentionShape& shape, const Rule& rule = {},
                         const AttentionTensors<double>& tensors = {}) {
  const detail::AttentionSizes n = detail::attention_sizes(
      query.rows(), query.cols(), key.rows(), key.cols(), value.rows(), value.cols(), shape);
  detail::require_tensors(tensors, n);
  detail::require_score_heads(rule.score, n.heads);
  detail::require_shape("out", out.rows(), out.cols(), n.queries, n.heads * n.value_dim,
                        "queries x heads * value_dim");
  detail::require_shape("lse", lse.rows(), lse.cols(), n.queries, n.heads, "queries x heads");
  std::vector<double> raw(static_cast<std::size_t>(n.keys)), score(raw);
  for (Index h = 0; h < n.heads; ++h) {
    for (Index row = 0; row < n.queries; ++row) {
      detail::reference_scores(query, key, n, shape, rule, tensors, row, h, raw, score);
      const auto normaliser = detail::reference_normaliser(score, tensors, h);
      lse(row, h) = normaliser.lse();
      auto o = out.row(row).segment(h * n.value_dim, n.value_dim);
      o.setZero();
      for (Index col = 0; col < n.keys; ++col) {
        const double p = normaliser.probability(score[static_cast<std::size_t>(col)]);
        if (p != 0) o += p * value.row(col).segment(h / n.group * n.value_dim, n.value_dim);
      }
    }
  }
}

/// Gradients of sum <dout, out> (+ <upstream_lse, lse>); overwrites dq, dk, dv and the non-null fields of `gradients`.
/// Parameter gradients of the score functor (accumulate) are added.
template <class Rule = DefaultRule>
void attention_reference_backward(const ConstMatrixRef<double>& query,
                                  const ConstMatrixRef<double>& key,
                                  const ConstMatrixRef<double>& value,
                                  const ConstMatrixRef<double>& dout, MatrixRef<double> dquery,
                                  MatrixRef<double> dkey, MatrixRef<double> dvalue,
                                  const AttentionShape& shape, const Rule& rule = {},
                                  const AttentionTensors<double>& tensors = {},
                                  AttentionTensorGradients<double>* gradients = nullptr) {
  const detail::AttentionSizes n = detail::attention_sizes(
      query.rows(), query.cols(), key.rows(), key.cols(), value.rows(), value.cols(), shape);
  const Index d = n.key_dim, e = n.value_dim;
  Matrix<double> out(n.queries, n.heads * e), lse(n.queries, n.heads);
  attention_reference(query, key, value, out, lse, shape, rule, tensors);
  AttentionTensorGradients<double> none;
  AttentionTensorGradients<double>& g = gradients ? *gradients : none;
  detail::require_tensor_gradients(g, tensors, n);
  detail::require_shape("dout", dout.rows(), dout.cols(), n.queries, n.heads * e, "shape of out");
  detail::require_shape("dquery", dquery.rows(), dquery.cols(), query.rows(), query.cols(),
                        "shape of query");
  detail::require_shape("dkey", dkey.rows(), dkey.cols(), key.rows(), key.cols(), "shape of key");
  detail::require_shape("dvalue", dvalue.rows(), dvalue.cols(), value.rows(), value.cols(),
                        "shape of value");
  dquery.setZero();
  dkey.setZero();
  dvalue.setZero();
  if (g.bias) g.bias->setZero();
  if (g.row_scale) g.row_scale->setZero();
  if (g.sinks) g.sinks->setZero();
  std::vector<double> raw(static_cast<std::size_t>(n.keys)), score(raw);
  for (Index h = 0; h < n.heads; ++h) {
    const Index kv = h / n.group;
    for (Index row = 0; row < n.queries; ++row) {
      if (lse(row, h) == -std::numeric_limits<double>::infinity()) continue;
      detail::reference_scores(query, key, n, shape, rule, tensors, row, h, raw, score);
      const auto normaliser = detail::reference_normaliser(score, tensors, h);
      const auto go = dout.row(row).segment(h * e, e);
      const double delta = go.dot(out.row(row).segment(h * e, e)) -
                           (g.upstream_lse ? (*g.upstream_lse)(row, h) : 0.0);
      const double rho = tensors.row_scale ? (*tensors.row_scale)[row] : 1.0;
      if (g.sinks) (*g.sinks)[h] -= normaliser.probability((*tensors.sinks)[h]) * delta;
      for (Index col = 0; col < n.keys; ++col) {
        const auto at = static_cast<std::size_t>(col);
        const double p = normaliser.probability(score[at]);
        if (p == 0) continue;
        const Index i = row + shape.query_offset, j = col + shape.key_offset;
        dvalue.row(col).segment(kv * e, e) += p * go;
        double ds = p * (go.dot(value.row(col).segment(kv * e, e)) - delta);
        if (g.bias) (*g.bias)(g.bias->rows() == n.queries ? row : h * n.queries + row, col) += ds;
        if constexpr (detail::HasScoreAccumulate<decltype(rule.score), double>) {
          rule.score.accumulate(ds, raw[at], i, j, h);
        }
        ds *= detail::score_grad(rule.score, raw[at], i, j, h);
        const auto qi = query.row(row).segment(h * d, d);
        const auto kj = key.row(col).segment(kv * d, d);
        dquery.row(row).segment(h * d, d) += (n.scale * rho * ds) * kj;
        dkey.row(col).segment(kv * d, d) += (n.scale * rho * ds) * qi;
        if (g.row_scale) (*g.row_scale)[row] += n.scale * ds * qi.dot(kj);
      }
    }
  }
}

EIGENBLOCKS_NAMESPACE_END
