// Laws of attention that hold whatever the numbers: each relates two calls of the public functions.
#include "support/attention_rule.hpp"

#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/partial.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <numeric>
#include <vector>

namespace {

using namespace attention_test;
using eb::Matrix;
using eb::Vector;

// Everything below is of size one, and sums have at most a few hundred terms: 1e-12 is 5000 roundings.
constexpr double kTolerance = 1e-12;

double distance(const Matrix<double>& a, const Matrix<double>& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  return a.size() == 0 ? 0.0 : (a - b).cwiseAbs().maxCoeff();
}

struct Operands {
  Matrix<double> q, k, v, dout;
  eb::AttentionShape shape;
  Operands(Index queries, Index keys, Index heads, Index kv_heads, std::uint64_t seed = 1) {
    eb::Random random(seed);
    q = eb::normal_matrix<double>(random, queries, heads * kDim);
    k = eb::normal_matrix<double>(random, keys, kv_heads * kDim);
    v = eb::normal_matrix<double>(random, keys, kv_heads * kDim);
    dout = eb::normal_matrix<double>(random, queries, heads * kDim);
    shape = {.heads = heads, .kv_heads = kv_heads};
  }
  static constexpr Index kDim = 6;
};

struct Results {
  Matrix<double> out, lse, dq, dk, dv, dbias;
};

Results evaluate(const Operands& x, const AnyRule& rule = {},
                 const eb::AttentionTensors<double>& tensors = {}) {
  Results r;
  r.out.resize(x.dout.rows(), x.dout.cols());
  r.dq = x.q;
  r.dk = x.k;
  r.dv = x.v;
  eb::AttentionTensorGradients<double> gradients;
  if (tensors.bias) {
    r.dbias = *tensors.bias;
    gradients.bias = &r.dbias;
  }
  rule.visit([&](const auto& concrete) {
    const auto saved = eb::attention_forward(x.q, x.k, x.v, r.out, x.shape, concrete, tensors);
    r.lse = saved.lse;
    eb::attention_backward(saved, x.q, x.k, x.v, r.out, x.dout, r.dq, r.dk, r.dv, x.shape, concrete,
                           tensors, &gradients);
  });
  return r;
}

/// Two calls that must agree, all results within the tolerance.
void check_same(const Results& a, const Results& b) {
  CHECK(distance(a.out, b.out) < kTolerance);
  for (Index i = 0; i < a.lse.size(); ++i) {
    CHECK((a.lse.data()[i] == b.lse.data()[i] ||
           std::abs(a.lse.data()[i] - b.lse.data()[i]) < kTolerance));
  }
  CHECK(distance(a.dq, b.dq) < kTolerance);
  CHECK(distance(a.dk, b.dk) < kTolerance);
  CHECK(distance(a.dv, b.dv) < kTolerance);
}

eb::BoolMatrix mask_matrix(Index queries, Index keys, const AnyMask& mask) {
  eb::BoolMatrix keep(queries, keys);
  for (Index i = 0; i < queries; ++i) {
    for (Index j = 0; j < keys; ++j) keep(i, j) = mask(i, j, 0);
  }
  return keep;
}

}  // namespace

TEST_CASE("probabilities sum to one: values of one give an output of one; a sink takes its share") {
  Operands x(40, 70, 4, 2);
  x.v.setOnes();
  for (const AnyRule& rule :
       {AnyRule{}, AnyRule{eb::causal()}, AnyRule{eb::window_left(5), eb::soft_cap(2.0)}}) {
    CHECK(distance(evaluate(x, rule).out, Matrix<double>::Ones(40, x.dout.cols())) < kTolerance);
  }
  Vector<double> sinks(4);
  sinks << -3.0, 0.0, 1.0, 5.0;
  const Results r = evaluate(x, {eb::causal()}, {.sinks = &sinks});
  for (Index h = 0; h < 4; ++h) {
    for (Index i = 0; i < 40; ++i) {
      CHECK(std::abs(r.out(i, h * Operands::kDim) + std::exp(sinks[h] - r.lse(i, h)) - 1.0) <
            kTolerance);
    }
  }
}

TEST_CASE("the output lies in the convex hull of the visible values") {
  const Operands x(50, 50, 2, 1);
  const Results r = evaluate(x, {eb::causal() & eb::window_left(8)});
  for (Index i = 0; i < 50; ++i) {
    const Index first = std::max<Index>(0, i - 8);
    const auto visible = x.v.middleRows(first, i - first + 1);
    for (Index h = 0; h < 2; ++h) {
      const auto out = r.out.row(i).segment(h * Operands::kDim, Operands::kDim);
      CHECK((out.array() <= visible.colwise().maxCoeff().array() + kTolerance).all());
      CHECK((out.array() >= visible.colwise().minCoeff().array() - kTolerance).all());
    }
  }
}

TEST_CASE("adding a constant to the scores of a row moves its lse and nothing else") {
  const Operands x(30, 45, 2, 2);
  eb::Random random(9);
  Matrix<double> bias = eb::normal_matrix<double>(random, 60, 45);
  Results before = evaluate(x, {eb::causal()}, {.bias = &bias});
  for (Index i = 0; i < 60; ++i) {
    const double shift = static_cast<double>(i % 7) - 3.0;
    bias.row(i).array() += shift;
    before.lse(i % 30, i / 30) += shift;
  }
  const Results after = evaluate(x, {eb::causal()}, {.bias = &bias});
  check_same(after, before);
  CHECK(distance(after.dbias, before.dbias) < kTolerance);
}

TEST_CASE("score gradients of a row sum to zero") {
  const Operands x(30, 45, 2, 1);
  const Matrix<double> bias = Matrix<double>::Zero(60, 45);
  for (const AnyRule& rule : {AnyRule{eb::causal()}, AnyRule{eb::causal(), eb::soft_cap(1.0)}}) {
    const Results r = evaluate(x, rule, {.bias = &bias});
    CHECK(r.dbias.rowwise().sum().cwiseAbs().maxCoeff() < kTolerance);
    CHECK(r.dbias.cwiseAbs().maxCoeff() > 0.1);
  }
}

TEST_CASE(
    "permuting keys together with values changes nothing; permuting queries permutes the output") {
  const Operands x(35, 52, 4, 2);
  const Results want = evaluate(x);
  Eigen::PermutationMatrix<Eigen::Dynamic> order(52), rows(35);
  order.setIdentity();
  rows.setIdentity();
  eb::Random random(3);
  for (Index i = 51; i > 0; --i)
    std::swap(order.indices()[i], order.indices()[random.below(i + 1)]);
  for (Index i = 34; i > 0; --i) std::swap(rows.indices()[i], rows.indices()[random.below(i + 1)]);
  Operands y = x;
  y.k = order * x.k;
  y.v = order * x.v;
  y.q = rows * x.q;
  y.dout = rows * x.dout;
  const Results got = evaluate(y);
  Results expected = want;
  expected.out = rows * want.out;
  expected.lse = rows * want.lse;
  expected.dq = rows * want.dq;
  expected.dk = order * want.dk;
  expected.dv = order * want.dv;
  check_same(got, expected);
}

TEST_CASE("GQA is MHA with repeated heads, MQA is GQA with one kv head") {
  for (const Index kv_heads : {1, 2, 3, 6}) {
    const Operands x(33, 41, 6, kv_heads);
    const Index group = 6 / kv_heads, d = Operands::kDim;
    Operands repeated = x;
    repeated.shape.kv_heads = 6;
    repeated.k.resize(41, 6 * d);
    repeated.v.resize(41, 6 * d);
    for (Index h = 0; h < 6; ++h) {  // contiguous groups, never h mod kv_heads
      repeated.k.middleCols(h * d, d) = x.k.middleCols(h / group * d, d);
      repeated.v.middleCols(h * d, d) = x.v.middleCols(h / group * d, d);
    }
    const AnyRule rule{eb::causal() | eb::prefix(9)};
    const Results got = evaluate(x, rule);
    Results want = evaluate(repeated, rule);
    Matrix<double> dk = Matrix<double>::Zero(41, kv_heads * d), dv = dk;
    for (Index h = 0; h < 6; ++h) {
      dk.middleCols(h / group * d, d) += want.dk.middleCols(h * d, d);
      dv.middleCols(h / group * d, d) += want.dv.middleCols(h * d, d);
    }
    want.dk = dk;
    want.dv = dv;
    check_same(got, want);
  }
}

TEST_CASE("a mask is its table: functors, combinations and lambdas equal the boolean matrix") {
  const Operands x(60, 60, 2, 1);
  const auto lambda = [](Index i, Index j) { return j <= i; };
  for (const AnyMask& mask :
       {AnyMask(eb::causal()), AnyMask(eb::causal() | eb::prefix(13)),
        AnyMask(eb::causal() & eb::window_left(7)),
        AnyMask(eb::window_left(4) & eb::window_right(9)),
        AnyMask((eb::causal() | eb::prefix(20)) & eb::window_left(11)), AnyMask(lambda),
        AnyMask([](Index i, Index j) { return i / 7 == j / 7; })}) {
    const eb::BoolMatrix keep = mask_matrix(60, 60, mask);
    check_same(evaluate(x, {mask}), evaluate(x, {}, {.mask = &keep}));
  }
  check_same(evaluate(x, {eb::causal()}), evaluate(x, {lambda}));
  check_same(evaluate(x, {eb::causal()}), evaluate(x, {eb::window_right(0)}));
  check_same(evaluate(x, {eb::full()}), evaluate(x, {eb::causal() | eb::prefix(60)}));
}

TEST_CASE("a score functor is its table: ALiBi equals the explicit bias") {
  const Operands x(40, 55, 4, 2);
  const Vector<double> slopes = eb::alibi_slopes(4);
  for (const auto distance : {eb::AlibiDistance::absolute, eb::AlibiDistance::past}) {
    const auto score = eb::alibi(slopes, distance);
    Matrix<double> bias(160, 55);
    for (Index i = 0; i < 160; ++i) {
      for (Index j = 0; j < 55; ++j) bias(i, j) = score(0.0, i % 40, j, i / 40);
    }
    check_same(evaluate(x, {eb::full(), score}), evaluate(x, {}, {.bias = &bias}));
  }
  // Under a causal mask both distances are one.
  check_same(evaluate(x, {eb::causal(), eb::alibi(slopes)}),
             evaluate(x, {eb::causal(), eb::alibi(slopes, eb::AlibiDistance::past)}));
}

TEST_CASE("only differences of positions count: a common shift of both offsets changes no bit") {
  Operands x(50, 64, 2, 1);
  const AnyRule rules[] = {{eb::causal() & eb::window_left(10)},
                           {eb::causal(), eb::alibi(eb::alibi_slopes(2))}};
  for (const AnyRule& rule : rules) {
    x.shape.query_offset = 14;
    x.shape.key_offset = 0;
    const Results want = evaluate(x, rule);
    for (const Index shift : {Index{1}, Index{4096}, Index{10'000'019}}) {
      x.shape.query_offset = 14 + shift;
      x.shape.key_offset = shift;
      const Results got = evaluate(x, rule);
      CHECK(got.out == want.out);
      CHECK(got.dk == want.dk);
    }
  }
}

TEST_CASE("keys that nobody sees can be appended without effect") {
  const Operands x(30, 30, 2, 2);
  Operands longer = x;
  longer.k.conservativeResize(90, Eigen::NoChange);
  longer.v.conservativeResize(90, Eigen::NoChange);
  longer.k.bottomRows(60).setConstant(3.0);
  longer.v.bottomRows(60).setConstant(-5.0);
  const Results want = evaluate(x, {eb::causal()}), got = evaluate(longer, {eb::causal()});
  CHECK(distance(got.out, want.out) < kTolerance);
  CHECK(distance(got.dq, want.dq) < kTolerance);
  CHECK(distance(got.dk.topRows(30), want.dk) < kTolerance);
  CHECK((got.dk.bottomRows(60).array() == 0.0).all());
  CHECK((got.dv.bottomRows(60).array() == 0.0).all());
}

TEST_CASE("the output is linear in the values, the gradients in the upstream") {
  const Operands x(25, 31, 2, 1);
  Operands scaled = x;
  scaled.v *= -2.5;
  const Results want = evaluate(x, {eb::causal()}), values = evaluate(scaled, {eb::causal()});
  CHECK(distance(values.out, -2.5 * want.out) < kTolerance);
  scaled = x;
  scaled.dout *= 3.0;
  const Results upstream = evaluate(scaled, {eb::causal()});
  CHECK(distance(upstream.dq, 3.0 * want.dq) < 10 * kTolerance);
  CHECK(distance(upstream.dv, 3.0 * want.dv) < 10 * kTolerance);
}

TEST_CASE("scale, row_scale and the size of the queries are one factor") {
  Operands x(25, 31, 2, 1);
  x.shape.scale = 0.7;
  const Results want = evaluate(x, {eb::causal()});
  Operands y = x;
  y.shape.scale = 1.0;
  const Vector<double> rho = Vector<double>::Constant(25, 0.7);
  check_same(evaluate(y, {eb::causal()}, {.row_scale = &rho}), want);
  y.q *= 0.7;
  Results got = evaluate(y, {eb::causal()});
  got.dq *= 0.7;  // chain rule
  check_same(got, want);
}

TEST_CASE(
    "attention over parts of the keys, merged, is attention over all of them; so are its "
    "gradients") {
  const Operands x(40, 90, 4, 2);
  const AnyRule rule{eb::causal() | eb::prefix(50)};
  const Results want = evaluate(x, rule);
  for (const std::vector<Index>& cuts :
       {std::vector<Index>{0, 90}, {0, 1, 90}, {0, 30, 60, 90}, {0, 40, 40, 89, 90}}) {
    Matrix<double> out = Matrix<double>::Zero(40, x.dout.cols());
    Matrix<double> lse = Matrix<double>::Constant(40, 4, -std::numeric_limits<double>::infinity());
    const auto part = [&](std::size_t c) {
      Operands piece = x;
      piece.k = x.k.middleRows(cuts[c], cuts[c + 1] - cuts[c]);
      piece.v = x.v.middleRows(cuts[c], cuts[c + 1] - cuts[c]);
      piece.shape.key_offset = cuts[c];
      return piece;
    };
    for (std::size_t c = 0; c + 1 < cuts.size(); ++c) {
      const Results r = evaluate(part(c), rule);
      eb::attention_merge_into(out, lse, r.out, r.lse);
    }
    CHECK(distance(out, want.out) < kTolerance);
    CHECK(distance(lse, want.lse) < kTolerance);
    // As ring attention does it: every part runs its backward with the final output and log-sum-exp.
    Matrix<double> dq = Matrix<double>::Zero(40, x.q.cols()), dk(90, x.k.cols()),
                   dv(90, x.v.cols());
    for (std::size_t c = 0; c + 1 < cuts.size(); ++c) {
      const Operands piece = part(c);
      Matrix<double> piece_dq = x.q;
      rule.visit([&](const auto& concrete) {
        eb::attention_backward(eb::AttentionSaved<double>{lse}, piece.q, piece.k, piece.v, out,
                               x.dout, piece_dq, dk.middleRows(cuts[c], piece.k.rows()),
                               dv.middleRows(cuts[c], piece.k.rows()), piece.shape, concrete);
      });
      dq += piece_dq;
    }
    CHECK(distance(dq, want.dq) < kTolerance);
    CHECK(distance(dk, want.dk) < kTolerance);
    CHECK(distance(dv, want.dv) < kTolerance);
  }
}
