// Operands and results as views: head blocks of one fused matrix, row ranges, buffers with gaps that hold NaN.
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <limits>

namespace {

using namespace eigenblocks;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr Index kTokens = 37, kHeads = 4, kKvHeads = 2, kDim = 5, kValueDim = 3;
constexpr AttentionShape kShape{.heads = kHeads, .kv_heads = kKvHeads};

struct Operands {
  Matrix<double> q, k, v, dout;
  Operands() {
    Random random(1);
    q = normal_matrix<double>(random, kTokens, kHeads * kDim);
    k = normal_matrix<double>(random, kTokens, kKvHeads * kDim);
    v = normal_matrix<double>(random, kTokens, kKvHeads * kValueDim);
    dout = normal_matrix<double>(random, kTokens, kHeads * kValueDim);
  }
};

/// A matrix of NaN with one block of numbers in the middle.
struct Framed {
  Matrix<double> storage;
  Index rows, cols;
  Framed(Index r, Index c)
      : storage(Matrix<double>::Constant(r + 4, c + 7, kNaN)), rows(r), cols(c) {}
  explicit Framed(const Matrix<double>& inner) : Framed(inner.rows(), inner.cols()) {
    view() = inner;
  }
  Eigen::Block<Matrix<double>> view() { return storage.block(2, 3, rows, cols); }
  bool frame_untouched() const {
    return (storage.array() == storage.array()).count() <= rows * cols &&
           storage.topRows(2).hasNaN() &&
           (storage.leftCols(3).array() != storage.leftCols(3).array()).all() &&
           (storage.rightCols(4).array() != storage.rightCols(4).array()).all() &&
           (storage.bottomRows(2).array() != storage.bottomRows(2).array()).all();
  }
};

}  // namespace

TEST_CASE(
    "views with gaps give the bits of dense operands, and nothing outside them is read or "
    "written") {
  const Operands x;
  const auto rule = attention_rule(causal());
  Matrix<double> out(kTokens, kHeads * kValueDim), dq(x.q.rows(), x.q.cols()),
      dk(x.k.rows(), x.k.cols()), dv(x.v.rows(), x.v.cols());
  const auto saved = attention_forward(x.q, x.k, x.v, out, kShape, rule);
  attention_backward(saved, x.q, x.k, x.v, out, x.dout, dq, dk, dv, kShape, rule);

  Framed q(x.q), k(x.k), v(x.v), dout(x.dout), fout(out.rows(), out.cols()),
      fdq(dq.rows(), dq.cols()), fdk(dk.rows(), dk.cols()), fdv(dv.rows(), dv.cols());
  const auto fsaved = attention_forward(q.view(), k.view(), v.view(), fout.view(), kShape, rule);
  CHECK(fsaved.lse == saved.lse);
  CHECK(fout.view() == out);
  attention_backward(fsaved, q.view(), k.view(), v.view(), fout.view(), dout.view(), fdq.view(),
                     fdk.view(), fdv.view(), kShape, rule);
  CHECK(fdq.view() == dq);
  CHECK(fdk.view() == dk);
  CHECK(fdv.view() == dv);
  for (const Framed* f : {&fout, &fdq, &fdk, &fdv}) CHECK(f->frame_untouched());
}

TEST_CASE("query, key and value as column blocks of one projection, results into one gradient") {
  const Operands x;
  const auto rule = attention_rule(causal());
  const Index q_cols = x.q.cols(), k_cols = x.k.cols(), v_cols = x.v.cols();
  Matrix<double> fused(kTokens, q_cols + k_cols + v_cols), dfused(kTokens, fused.cols());
  fused << x.q, x.k, x.v;
  const Matrix<double> out = attention(x.q, x.k, x.v, kShape, rule);
  Matrix<double> got(out.rows(), out.cols());
  const auto saved = attention_forward(fused.leftCols(q_cols), fused.middleCols(q_cols, k_cols),
                                       fused.rightCols(v_cols), got, kShape, rule);
  CHECK(got == out);
  attention_backward(saved, fused.leftCols(q_cols), fused.middleCols(q_cols, k_cols),
                     fused.rightCols(v_cols), got, x.dout, dfused.leftCols(q_cols),
                     dfused.middleCols(q_cols, k_cols), dfused.rightCols(v_cols), kShape, rule);
  Matrix<double> dq = x.q, dk = x.k, dv = x.v;
  attention_backward(saved, x.q, x.k, x.v, out, x.dout, dq, dk, dv, kShape, rule);
  CHECK(dfused.leftCols(q_cols) == dq);
  CHECK(dfused.middleCols(q_cols, k_cols) == dk);
  CHECK(dfused.rightCols(v_cols) == dv);
}

TEST_CASE("mapped memory, references and single rows bind") {
  const Operands x;
  const Matrix<double> want = attention(x.q, x.k, x.v, kShape);
  const Eigen::Map<const Matrix<double>> mapped(x.q.data(), x.q.rows(), x.q.cols());
  const ConstMatrixRef<double> reference = x.k;
  CHECK(attention(mapped, reference, x.v, kShape) == want);

  // One query row is a vector at compile time.
  const Matrix<double> last = attention(x.q.row(kTokens - 1), x.k, x.v, kShape);
  CHECK((last - want.bottomRows(1)).cwiseAbs().maxCoeff() < 1e-14);
  const RowVector<double> query = x.q.row(kTokens - 1);
  CHECK(attention(query, x.k, x.v, kShape) == last);
}

TEST_CASE("the log-sum-exp may go to a strided view as well") {
  const Operands x;
  const auto rule = attention_rule(causal());
  Matrix<double> out(kTokens, kHeads * kValueDim);
  const auto saved = attention_forward(x.q, x.k, x.v, out, kShape, rule);
  Framed lse(kTokens, kHeads);
  auto view = lse.view();
  Workspace workspace;
  detail::attention_forward_into(x.q, x.k, x.v, out, view, kShape, rule, {}, serial, workspace);
  CHECK(lse.view() == saved.lse);
  CHECK(lse.frame_untouched());
}
