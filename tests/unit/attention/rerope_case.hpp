// Attention under a policy with a window, by brute force over the matrix of relative positions, for the rerope tests.
#pragma once

#include "support/attention_rule.hpp"

#include <eigenblocks/attention/reference.hpp>
#include <eigenblocks/attention/rerope.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace rerope_test {

using namespace eigenblocks;
using attention_test::AnyMask;

struct Sizes {
  Index queries = 1, keys = 1, heads = 2, kv_heads = 1, dim = 8, value_dim = 6, rotary_dim = 6;
  Index query_offset = 0, key_offset = 0;
  RopeLayout layout = RopeLayout::half;
  double attention_factor = 1.0;
};

/// Random operands in S, drawn in double.
template <class S>
struct Case {
  Matrix<S> q, k, v, dout;
  Vector<S> row_scale, sinks;
  AttentionShape shape;
  RotaryTable<S> table;

  explicit Case(const Sizes& n)
      : shape{.heads = n.heads,
              .kv_heads = n.kv_heads,
              .query_offset = n.query_offset,
              .key_offset = n.key_offset},
        table(frequencies(n), n.layout) {
    Random random(7);
    const auto draw = [&](Index rows, Index cols) -> Matrix<S> {
      return normal_matrix<double>(random, rows, cols).template cast<S>();
    };
    q = draw(n.queries, n.heads * n.dim);
    k = draw(n.keys, n.kv_heads * n.dim);
    v = draw(n.keys, n.kv_heads * n.value_dim);
    dout = draw(n.queries, n.heads * n.value_dim);
    row_scale = draw(n.queries, 1);
    sinks = draw(n.heads, 1);
  }
  AttentionTensors<S> tensors() const { return {.row_scale = &row_scale, .sinks = &sinks}; }
  Matrix<S> empty_out() const {
    return Matrix<S>::Constant(dout.rows(), dout.cols(), std::numeric_limits<S>::quiet_NaN());
  }

 private:
  static RotaryFrequencies frequencies(const Sizes& n) {
    RotaryFrequencies f = rope_frequencies(n.rotary_dim, 50.0);
    f.attention_factor = n.attention_factor;
    return f;
  }
};

/// Scores made beforehand: entry (h * queries + row, key).
struct TableScore {
  const Matrix<double>* scores;
  Index queries, query_offset, key_offset;
  template <class S>
  S operator()(S, Index i, Index j, Index h) const {
    return static_cast<S>((*scores)(h * queries + i - query_offset, j - key_offset));
  }
  template <class S>
  S grad(S, Index, Index, Index) const {
    return S(0);
  }
};

/// out by the definition: every pair's query turned to the relative position of the pair, in double.
template <class S>
Matrix<double> brute_force(const Case<S>& x, const NearFarPosition& policy,
                           const AnyMask& mask = causal(), double cap = 0,
                           Matrix<double>* lse_out = nullptr) {
  const Index queries = x.q.rows(), keys = x.k.rows(), heads = x.shape.heads,
              dim = x.q.cols() / heads, group = heads / x.shape.kv_heads;
  const RotaryTable<double> table(x.table.frequencies(), x.table.layout(), 0);
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  Matrix<double> scores(heads * queries, keys);
  for (Index r = 0; r < queries; ++r) {
    for (Index c = 0; c < keys; ++c) {
      const Index i = r + x.shape.query_offset, j = c + x.shape.key_offset;
      const std::vector<double> relative{j <= i ? policy.relative(i, j) : 0.0}, zero{0.0};
      const Matrix<double> q = rope(x.q.row(r).template cast<double>().eval(), relative, table,
                                    {.heads = heads}),
                           k = rope(x.k.row(c).template cast<double>().eval(), zero, table,
                                    {.heads = x.shape.kv_heads});
      for (Index h = 0; h < heads; ++h) {
        scores(h * queries + r, c) =
            scale * static_cast<double>(x.row_scale[r]) *
            q.middleCols(h * dim, dim).row(0).dot(k.middleCols(h / group * dim, dim).row(0));
      }
    }
  }
  Matrix<double> out(x.dout.rows(), x.dout.cols()), lse(queries, heads);
  const Vector<double> sinks = x.sinks.template cast<double>();
  const TableScore table_score{&scores, queries, x.shape.query_offset, x.shape.key_offset};
  attention_reference(x.q.template cast<double>().eval(), x.k.template cast<double>().eval(),
                      x.v.template cast<double>().eval(), out, lse, x.shape,
                      attention_rule(mask, compose(table_score, soft_cap(cap))), {.sinks = &sinks});
  if (lse_out != nullptr) *lse_out = lse;
  return out;
}

template <class A, class B>
double distance(const A& a, const B& b) {
  const double d = (a.template cast<double>() - b.template cast<double>()).cwiseAbs().maxCoeff();
  return std::isnan(d) ? std::numeric_limits<double>::infinity() : d;
}

/// The policies at window w: rerope, leaky with whole, fractional and small leak, self-extend.
inline std::vector<NearFarPosition> policies(Index w) {
  return {rerope(w), leaky_rerope(w, 4), leaky_rerope(w, 2.5), leaky_rerope(w, 0.125),
          self_extend(w, std::min<Index>(w, 3))};
}

}  // namespace rerope_test
