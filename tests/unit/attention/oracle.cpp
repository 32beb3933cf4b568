// The oracle and the error bounds of support/attention_case.hpp.
#include "support/attention_case.hpp"

#include <eigenblocks/attention/reference.hpp>

#include <string>

namespace attention_test {

Outcome<double> oracle(const Problem& p, const AnyRule& rule) {
  return rule.visit([&](const auto& concrete) {
    Outcome<double> result(p);
    const eb::AttentionTensors<double> tensors = p.tensors();
    auto gradients = result.gradients(p.options.upstream_lse ? &p.dlse : nullptr);
    eb::attention_reference(p.q, p.k, p.v, result.out, result.lse, p.shape, concrete, tensors);
    eb::attention_reference_backward(p.q, p.k, p.v, p.dout, result.dq, result.dk, result.dv,
                                     p.shape, concrete, tensors, &gradients);
    const eb::detail::AttentionSizes n = eb::detail::attention_sizes(
        p.q.rows(), p.q.cols(), p.k.rows(), p.k.cols(), p.v.rows(), p.v.cols(), p.shape);
    std::vector<double> raw(static_cast<std::size_t>(n.keys)), score(raw);
    result.probability.resize(n.heads * n.queries, n.keys);
    for (Index h = 0; h < n.heads; ++h) {
      for (Index i = 0; i < n.queries; ++i) {
        eb::detail::reference_scores(p.q, p.k, n, p.shape, concrete, tensors, i, h, raw, score);
        const auto normaliser = eb::detail::reference_normaliser(score, tensors, h);
        for (Index j = 0; j < n.keys; ++j) {
          result.probability(h * n.queries + i, j) =
              normaliser.probability(score[static_cast<std::size_t>(j)]);
        }
      }
    }
    return result;
  });
}

namespace {

double largest(const Matrix<double>& m) { return m.size() > 0 ? m.cwiseAbs().maxCoeff() : 0.0; }

}  // namespace

Bounds::Bounds(const Problem& p, const Outcome<double>& want, double unit) {
  const Index heads = p.options.heads, group = heads / p.kv_heads(), d = p.options.dim,
              e = p.options.value_dim;
  const Index queries = p.q.rows(), keys = p.k.rows();
  const auto root = [](Index n) { return std::sqrt(static_cast<double>(n)); };
  const double scale =
      std::abs(p.options.scale.value_or(1 / std::sqrt(std::max(1.0, static_cast<double>(d)))));
  const double rho = p.options.row_scale ? largest(p.row_scale) : 1.0;
  // Over all heads: the products before cancellation, |q||k| and |dout||v|; final scores; sums of P and |dS| over the rows
  // and columns.
  double products = 0, upstream = 0, scores = p.options.sinks ? largest(p.sinks) : 0.0, columns = 0,
         ds_rows = 0, ds_columns = 0;
  for (Index h = 0; h < heads && queries > 0 && keys > 0; ++h) {
    const Index kv = h / group;
    const auto q = p.q.middleCols(h * d, d), k = p.k.middleCols(kv * d, d);
    const auto v = p.v.middleCols(kv * e, e), dout = p.dout.middleCols(h * e, e);
    products = std::max(products, largest(q.cwiseAbs() * k.cwiseAbs().transpose()));
    upstream = std::max(upstream, largest(dout.cwiseAbs() * v.cwiseAbs().transpose()));
    const Matrix<double> weight = want.probability.middleRows(h * queries, queries);
    const Matrix<double> dp = dout * v.transpose();
    Vector<double> delta = weight.cwiseProduct(dp).rowwise().sum();
    if (p.options.upstream_lse) delta -= p.dlse.col(h);
    const Matrix<double> ds = weight.cwiseProduct(dp.colwise() - delta).cwiseAbs();
    columns = std::max(columns, weight.colwise().sum().maxCoeff());
    ds_rows = std::max(ds_rows, ds.rowwise().sum().maxCoeff());
    ds_columns = std::max(ds_columns, ds.colwise().sum().maxCoeff());
    for (Index i = 0; i < queries; ++i) {
      for (Index j = 0; j < keys; ++j) {
        if (weight(i, j) > 0)
          scores = std::max(scores, std::abs(want.lse(i, h) + std::log(weight(i, j))));
      }
    }
  }
  columns *= static_cast<double>(group);  // a kv head collects from its group
  ds_columns *= static_cast<double>(group);
  // The dot product and its factors (scale, rho, log2 e); functor, bias, subtraction of the maximum; exp and sum.
  const double p_error = unit * ((root(d) + 4) * scale * rho * products + 4 * scores + 8);
  lse = p_error + unit * root(keys);
  out = largest(p.v) * (p_error + unit * (root(keys) + 8));
  dv = largest(p.dout) * columns * (p_error + unit * (root(queries * group) + 8));
  // dS = P (dP - D): relative errors of P, absolute ones of two sums of e and one of Tk products that may cancel.
  const double dlse_size = p.options.upstream_lse ? largest(p.dlse) : 0.0;
  const double difference_error = unit * (upstream + dlse_size) * (2 * root(e) + root(keys) + 8);
  const double rows_error = 2 * p_error * ds_rows + difference_error;
  dq = scale * rho * largest(p.k) * rows_error;
  dk = scale * rho * largest(p.q) * (2 * p_error * ds_columns + columns * difference_error);
  dbias = rows_error * (p.options.shared_bias ? root(heads) : 1.0);
  drow_scale = scale * products * root(heads) * rows_error;
  dsinks = root(queries) * (upstream + dlse_size) * (p_error + unit * (root(e) + 8));
}

namespace {

template <class Block>
bool all_zero(const Block& block) {
  return (block.array() == typename Block::Scalar(0)).all();
}

/// What no key or no query can see is exactly zero, not merely small.
template <class S>
void check_zeros(const Outcome<S>& got, const Outcome<double>& want, const Problem& p) {
  const Index queries = p.q.rows(), keys = p.k.rows(), group = p.options.heads / p.kv_heads();
  const Index d = p.options.dim, e = p.options.value_dim;
  bool rows = true, columns = true, entries = true;
  for (Index h = 0; h < p.options.heads; ++h) {
    for (Index i = 0; i < queries; ++i) {
      if (!all_zero(want.probability.row(h * queries + i))) continue;
      rows = rows && all_zero(got.out.row(i).segment(h * e, e)) &&
             all_zero(got.dq.row(i).segment(h * d, d));
    }
  }
  for (Index kv = 0; kv < p.kv_heads(); ++kv) {
    const auto weights = want.probability.middleRows(kv * group * queries, group * queries);
    for (Index j = 0; j < keys; ++j) {
      if (!all_zero(weights.col(j))) continue;
      columns = columns && all_zero(got.dk.row(j).segment(kv * d, d)) &&
                all_zero(got.dv.row(j).segment(kv * e, e));
    }
  }
  if (p.options.bias && !p.options.shared_bias) {
    for (Index i = 0; i < want.probability.size(); ++i) {
      entries = entries && (want.probability.data()[i] != 0.0 || got.dbias.data()[i] == S(0));
    }
  }
  CHECK_MESSAGE(rows, "a row without visible keys is not exactly 0");
  CHECK_MESSAGE(columns, "a key that no query sees has a gradient");
  CHECK_MESSAGE(entries, "the bias of a masked pair has a gradient");
}

}  // namespace

template <class S>
void check_close(const Outcome<S>& got, const Outcome<double>& want, const Problem& p,
                 double unit) {
  const Bounds bound(p, want, unit);
  const auto close = [](const char* name, const auto& g, const auto& w, double limit) {
    const double error = difference(g, w);
    CHECK_MESSAGE(error <= limit, std::string(name), " is off by ", error, ", allowed ", limit);
  };
  close("out", got.out, want.out, bound.out);
  close("lse", got.lse, want.lse, bound.lse);
  close("dq", got.dq, want.dq, bound.dq);
  close("dk", got.dk, want.dk, bound.dk);
  close("dv", got.dv, want.dv, bound.dv);
  close("dbias", got.dbias, want.dbias, bound.dbias);
  close("drow_scale", got.drow_scale, want.drow_scale, bound.drow_scale);
  close("dsinks", got.dsinks, want.dsinks, bound.dsinks);
  check_zeros(got, want, p);
}

template void check_close<double>(const Outcome<double>&, const Outcome<double>&, const Problem&,
                                  double);
template void check_close<float>(const Outcome<float>&, const Outcome<double>&, const Problem&,
                                 double);

}  // namespace attention_test
