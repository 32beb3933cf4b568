// One attention call with all its operands, run by the oracle and by the tiled kernels, and compared with derived bounds.
//
//   const Problem p({.queries = 37, .keys = 53, .heads = 4, .kv_heads = 2, .bias = true});
//   check_close(tiled<float>(p, rule), oracle(p, rule), p);
//
// The kernels behind tiled() are instantiated once for the whole test program, in unit/attention/tiled_*.cpp.
#pragma once

#include "support/attention_rule.hpp"

#include <eigenblocks/attention/forward_tiles.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>

namespace attention_test {

using eb::Matrix;
using eb::Vector;

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct ProblemOptions {
  Index queries = 1, keys = 1, heads = 1, kv_heads = 0, dim = 8, value_dim = 8;
  Index query_offset = 0, key_offset = 0;
  std::optional<double> scale = std::nullopt;
  bool bias = false, shared_bias = false, keep = false, row_scale = false, sinks = false,
       upstream_lse = false;
  std::uint64_t seed = 1;
};

/// Random operands in double; options say which exist.
struct Problem {
  explicit Problem(const ProblemOptions& o) : options(o) {
    shape = {.heads = o.heads,
             .kv_heads = o.kv_heads,
             .query_offset = o.query_offset,
             .key_offset = o.key_offset,
             .scale = o.scale};
    const Index kv_heads = o.kv_heads == 0 ? o.heads : o.kv_heads;
    eb::Random random(o.seed);
    q = eb::normal_matrix<double>(random, o.queries, o.heads * o.dim);
    k = eb::normal_matrix<double>(random, o.keys, kv_heads * o.dim);
    v = eb::normal_matrix<double>(random, o.keys, kv_heads * o.value_dim);
    dout = eb::normal_matrix<double>(random, o.queries, o.heads * o.value_dim);
    bias = eb::normal_matrix<double>(random, (o.shared_bias ? 1 : o.heads) * o.queries, o.keys);
    dlse = eb::normal_matrix<double>(random, o.queries, o.heads);
    row_scale = eb::normal_matrix<double>(random, o.queries, 1);
    sinks = eb::normal_matrix<double>(random, o.heads, 1);
    keep.resize(o.queries, o.keys);
    for (Index i = 0; i < keep.size(); ++i) keep.data()[i] = random.uniform() < 0.7;
  }

  /// The optional operands that are in use.
  eb::AttentionTensors<double> tensors() const {
    return {.bias = has_bias() ? &bias : nullptr,
            .mask = options.keep ? &keep : nullptr,
            .row_scale = options.row_scale ? &row_scale : nullptr,
            .sinks = options.sinks ? &sinks : nullptr};
  }
  bool has_bias() const { return options.bias || options.shared_bias; }
  Index kv_heads() const { return options.kv_heads == 0 ? options.heads : options.kv_heads; }

  ProblemOptions options;
  eb::AttentionShape shape;
  Matrix<double> q, k, v, dout, bias, dlse;
  Vector<double> row_scale, sinks;
  eb::BoolMatrix keep;
};

/// Results of forward and backward; fields without operand stay empty.
template <class S>
struct Outcome {
  Matrix<S> out, lse, dq, dk, dv, dbias;
  Vector<S> drow_scale, dsinks;
  Matrix<S> probability;  // oracle only: (heads * queries) x keys

  Outcome() = default;
  /// Sized for p and filled with NaN, so that whatever is not written shows.
  explicit Outcome(const Problem& p) {
    const S nan = std::numeric_limits<S>::quiet_NaN();
    out.setConstant(p.dout.rows(), p.dout.cols(), nan);
    lse.setConstant(p.q.rows(), p.options.heads, nan);
    dq.setConstant(p.q.rows(), p.q.cols(), nan);
    dk.setConstant(p.k.rows(), p.k.cols(), nan);
    dv.setConstant(p.v.rows(), p.v.cols(), nan);
    if (p.has_bias()) dbias.setConstant(p.bias.rows(), p.bias.cols(), nan);
    if (p.options.row_scale) drow_scale.setConstant(p.q.rows(), nan);
    if (p.options.sinks) dsinks.setConstant(p.options.heads, nan);
  }
  eb::AttentionTensorGradients<S> gradients(const Matrix<S>* dlse) {
    return {.bias = dbias.size() > 0 ? &dbias : nullptr,
            .row_scale = drow_scale.size() > 0 ? &drow_scale : nullptr,
            .sinks = dsinks.size() > 0 ? &dsinks : nullptr,
            .upstream_lse = dlse};
  }
  friend bool operator==(const Outcome& a, const Outcome& b) {
    return a.out == b.out && a.lse == b.lse && a.dq == b.dq && a.dk == b.dk && a.dv == b.dv &&
           a.dbias == b.dbias && a.drow_scale == b.drow_scale && a.dsinks == b.dsinks;
  }
};

/// How the kernels are run; results depend on it at most by rounding, on the executor not at all.
struct Run {
  eb::detail::TileTuning tuning = {};
  bool narrow = false;  ///< a register tile that no target has
  eb::ExecutorRef executor = {};
};

/// attention/reference.hpp in double.
Outcome<double> oracle(const Problem& problem, const AnyRule& rule = {});
/// attention/kernel.hpp, operands rounded to S.  Only the first two results without `backward`.
template <class S>
Outcome<S> tiled(const Problem& problem, const AnyRule& rule = {}, const Run& run = {},
                 bool backward = true);
extern template Outcome<double> tiled<double>(const Problem&, const AnyRule&, const Run&, bool);
extern template Outcome<float> tiled<float>(const Problem&, const AnyRule&, const Run&, bool);

/// Largest errors to expect in scalar S, statistically: sums of n terms err by sqrt(n) roundings of the terms' size.
/// `unit` is the rounding of S, or of the storage where operands were rounded to it.
struct Bounds {
  double out, lse, dq, dk, dv, dbias, drow_scale, dsinks;
  Bounds(const Problem& p, const Outcome<double>& want, double unit);
};

/// Every result within its bound; infinities and zeros of the oracle exact.
template <class S>
void check_close(const Outcome<S>& got, const Outcome<double>& want, const Problem& p,
                 double unit = static_cast<double>(std::numeric_limits<S>::epsilon()));

/// max |got - want|, infinity where one of them is not finite and the other differs.
template <class G, class W>
double difference(const Eigen::MatrixBase<G>& got, const Eigen::MatrixBase<W>& want) {
  if (got.rows() != want.rows() || got.cols() != want.cols()) return kInfinity;
  double worst = 0;
  for (Index i = 0; i < want.rows(); ++i) {
    for (Index j = 0; j < want.cols(); ++j) {
      const double g = static_cast<double>(got(i, j)), w = static_cast<double>(want(i, j));
      const double d = g == w ? 0.0 : std::abs(g - w);
      worst = std::isnan(d) ? kInfinity : std::max(worst, d);
    }
  }
  return worst;
}

}  // namespace attention_test
