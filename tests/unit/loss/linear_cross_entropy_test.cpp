#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/loss/linear_cross_entropy.hpp>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

using namespace eigenblocks;

namespace {

/// A problem, its logits spelled out, and what cross_entropy says about them.
template <class S>
struct Problem {
  Matrix<S> hidden, weight;
  RowVector<S> bias;
  std::vector<Index> targets;
  LinearCrossEntropyOptions options;
  Matrix<S> dh, dw;
  RowVector<S> db;

  Problem(Index tokens, Index classes, Index dim, const LinearCrossEntropyOptions& use)
      : options(use), dh(tokens, dim), dw(classes, dim), db(classes) {
    Random random(41);
    hidden = normal_matrix<S>(random, tokens, dim);
    weight = normal_matrix<S>(random, classes, dim);
    bias = normal_matrix<S>(random, 1, classes);
    for (Index t = 0; t < tokens; ++t) targets.push_back(t % 5 == 2 ? -100 : random.below(classes));
  }
  double upstream() const { return 0.7; }

  CrossEntropySaved forward(ExecutorRef executor = {}) const {
    return linear_cross_entropy_forward(hidden, weight, bias, targets, options, executor);
  }
  CrossEntropySaved two_passes(ExecutorRef executor = {}) {
    clear();
    const CrossEntropySaved saved = forward(executor);
    linear_cross_entropy_backward(saved, hidden, weight, bias, targets, upstream(), dh, dw, db,
                                  options, executor);
    return saved;
  }
  CrossEntropySaved fused(ExecutorRef executor = {}) {
    clear();
    return linear_cross_entropy_fused(hidden, weight, bias, targets, upstream(), dh, dw, db,
                                      options, executor);
  }
  void clear() {
    dh.setConstant(S(99));
    dw.setConstant(S(99));
    db.setConstant(S(99));
  }

  /// Logits, cross_entropy, its gradient, and the three gradients by the chain rule.
  CrossEntropySaved explicit_logits() {
    Matrix<S> x(hidden.rows(), weight.rows());
    detail::product_nt<S>(hidden, weight, x);
    x.rowwise() += bias;
    Matrix<S> chain = Matrix<S>::Ones(x.rows(), x.cols());
    if (options.softcap > 0) {
      const S cap = static_cast<S>(options.softcap);
      for (Index i = 0; i < x.size(); ++i) {
        const S ratio = std::tanh(x.data()[i] / cap);
        x.data()[i] = cap * ratio;
        chain.data()[i] = 1 - ratio * ratio;
      }
    }
    const CrossEntropySaved saved = cross_entropy_forward(x, targets, options.loss);
    cross_entropy_backward(saved, x, targets, upstream(), x, options.loss);
    x = x.cwiseProduct(chain);
    detail::product_nn<S>(x, weight, dh);
    detail::product_tn<S>(x, hidden, dw);
    db = x.colwise().sum();
    return saved;
  }
};

template <class S>
void check_equal(const Problem<S>& got, const CrossEntropySaved& saved, const Problem<S>& want,
                 const CrossEntropySaved& want_saved) {
  // Logits are sums of `dim` products of order 1 (|x| < 30); their error, 30 eps sqrt(dim), moves
  // probabilities and losses by as much.
  const double dim = static_cast<double>(want.hidden.cols());
  const double tolerance = 30 * double(std::numeric_limits<S>::epsilon()) * (1 + std::sqrt(dim));
  CHECK((saved.lse - want_saved.lse).norm() <= tolerance * (1 + want_saved.lse.norm()));
  CHECK((saved.losses - want_saved.losses).norm() <= tolerance * (1 + want_saved.losses.norm()));
  CHECK(std::abs(saved.loss - want_saved.loss) <= tolerance * (1 + std::abs(want_saved.loss)));
  CHECK(double((got.dh - want.dh).norm()) <= tolerance * (1 + double(want.dh.norm())));
  CHECK(double((got.dw - want.dw).norm()) <= tolerance * (1 + double(want.dw.norm())));
  CHECK(double((got.db - want.db).norm()) <= tolerance * (1 + double(want.db.norm())));
}

}  // namespace

TEST_CASE("linear_cross_entropy equals cross_entropy on explicit logits, for every tile size") {
  const LinearCrossEntropyOptions variants[] = {
      {},
      {.loss = {.label_smoothing = 0.1, .z_loss = 1e-2}, .softcap = 5},
      {.loss = {.label_smoothing = 1, .reduction = Reduction::sum}}};
  for (const LinearCrossEntropyOptions& variant : variants) {
    for (const auto& [tokens, classes, dim] :
         {std::array<Index, 3>{1, 1, 1}, {7, 23, 5}, {11, 8, 0}, {1, 31, 3}}) {
      Problem<double> want(tokens, classes, dim, variant);
      const CrossEntropySaved want_saved = want.explicit_logits();
      for (const Index token_tile : {0, 1, 3, 100}) {
        for (const Index vocab_tile : {1, 7, 100}) {
          CAPTURE(token_tile);
          CAPTURE(vocab_tile);
          Problem<double> got(tokens, classes, dim, variant);
          got.options.token_tile = token_tile;
          got.options.vocab_tile = vocab_tile;
          check_equal(got, got.two_passes(), want, want_saved);
          check_equal(got, got.fused(), want, want_saved);
        }
      }
    }
  }
}

TEST_CASE("linear_cross_entropy: several blocks of 256 each way; equal bits for every executor") {
  // 300 tokens, 700 classes, 270 dimensions: all three products are cut.
  const LinearCrossEntropyOptions variant{
      .loss = {.label_smoothing = 0.1}, .softcap = 20, .token_tile = 280, .vocab_tile = 600};
  Problem<float> problem(300, 700, 270, variant);
  const CrossEntropySaved explicit_saved = problem.explicit_logits();
  const Problem<float> want = problem;
  const CrossEntropySaved saved = problem.two_passes();
  check_equal(problem, saved, want, explicit_saved);
  const Matrix<float> dh = problem.dh, dw = problem.dw;
  const RowVector<float> db = problem.db;
  const CrossEntropySaved fused_saved = problem.fused();
  check_equal(problem, fused_saved, want, explicit_saved);
  const Matrix<float> fused_dh = problem.dh, fused_dw = problem.dw;
  for (const int workers : {1, 2, 3, 7}) {
    const thread_pool pool(workers);
    const CrossEntropySaved other = problem.two_passes(pool);
    CHECK(other.loss == saved.loss);
    CHECK(other.lse == saved.lse);
    CHECK(problem.dh == dh);
    CHECK(problem.dw == dw);
    CHECK(problem.db == db);
    CHECK(problem.fused(pool).loss == fused_saved.loss);
    CHECK(problem.dh == fused_dh);
    CHECK(problem.dw == fused_dw);
  }
}

TEST_CASE(
    "linear_cross_entropy: weight as d x V, without bias, per-token upstream, strided operands") {
  Problem<double> problem(9, 40, 6,
                          {.loss = {.label_smoothing = 0.1}, .token_tile = 4, .vocab_tile = 13});
  problem.bias.setZero();
  const CrossEntropySaved with_bias = problem.two_passes();
  const Matrix<double> dh = problem.dh, dw = problem.dw;

  Matrix<double> wide_h = Matrix<double>::Constant(9, 10, 5.0),
                 wide_w = Matrix<double>::Constant(40, 9, 5.0);
  wide_h.middleCols(2, 6) = problem.hidden;
  wide_w.middleCols(1, 6) = problem.weight;
  const auto h = wide_h.middleCols(2, 6);
  const auto w = wide_w.middleCols(1, 6);
  const CrossEntropySaved saved =
      linear_cross_entropy_forward(h, w, problem.targets, problem.options);
  CHECK(saved.loss == with_bias.loss);
  problem.clear();
  linear_cross_entropy_backward(saved, h, w, problem.targets, problem.upstream(), problem.dh,
                                problem.dw, problem.options);
  CHECK(problem.dh == dh);
  CHECK(problem.dw == dw);
  linear_cross_entropy_fused(h, w, problem.targets, problem.upstream(), problem.dh, problem.dw,
                             problem.options);
  CHECK((problem.dh - dh).norm() <= 1e-14);
  CHECK((problem.dw - dw).norm() <= 1e-14);

  LinearCrossEntropyOptions columns = problem.options;
  columns.layout = HeadLayout::class_columns;
  const Matrix<double> turned = problem.weight.transpose();
  Matrix<double> dturned(6, 40);
  const CrossEntropySaved other =
      linear_cross_entropy_forward(problem.hidden, turned, problem.targets, columns);
  CHECK(other.loss == doctest::Approx(saved.loss).epsilon(1e-14));
  linear_cross_entropy_backward(other, problem.hidden, turned, problem.targets, problem.upstream(),
                                problem.dh, dturned, columns);
  CHECK((problem.dh - dh).norm() <= 1e-14);
  CHECK((dturned.transpose() - dw).norm() <= 1e-14);

  // One upstream per token, all equal, is the sum.
  LinearCrossEntropyOptions none = problem.options, sum = problem.options;
  none.loss.reduction = Reduction::none;
  sum.loss.reduction = Reduction::sum;
  const Vector<double> all = Vector<double>::Constant(9, 0.3);
  Matrix<double> dh_sum(9, 6), dw_sum(40, 6);
  linear_cross_entropy_backward(saved, h, w, problem.targets, all, problem.dh, problem.dw, none);
  linear_cross_entropy_backward(saved, h, w, problem.targets, 0.3, dh_sum, dw_sum, sum);
  CHECK(problem.dh == dh_sum);
  CHECK(problem.dw == dw_sum);
}

TEST_CASE("linear_cross_entropy: no tokens, ignored tokens, masked classes by a bias of -inf") {
  Problem<float> empty(0, 5, 3, {});
  const CrossEntropySaved none = empty.two_passes();
  CHECK(std::isnan(none.loss));
  CHECK(empty.dw.isZero(0));
  CHECK(empty.db.isZero(0));
  empty.fused();
  CHECK(empty.dw.isZero(0));

  Problem<float> ignored(4, 5, 3, {.loss = {.empty_is_zero = true}});
  ignored.targets.assign(4, -100);
  CHECK(ignored.two_passes().loss == 0.0);
  CHECK(ignored.dh.isZero(0));
  CHECK(ignored.dw.isZero(0));

  Problem<float> masked(6, 9, 3, {.vocab_tile = 4});
  masked.bias.segment(4, 5).setConstant(-std::numeric_limits<float>::infinity());
  for (Index& y : masked.targets) y = y < 0 ? y : y % 4;
  CHECK(std::isfinite(masked.two_passes().loss));
  CHECK(masked.dw.bottomRows(5).isZero(0));
  CHECK(masked.db.tail(5).isZero(0));
  CHECK_FALSE(masked.dw.topRows(4).isZero(0));
  CHECK_FALSE(masked.dh.hasNaN());
}

TEST_CASE("linear_cross_entropy: a NaN class makes every loss NaN, whatever tile it falls into") {
  for (const Index vocab_tile : {1, 4, 9}) {
    for (const Index bad : {0, 5, 8}) {
      Problem<double> p(6, 9, 3, {.vocab_tile = vocab_tile});
      p.weight.row(bad).setConstant(std::numeric_limits<double>::quiet_NaN());
      const CrossEntropySaved saved = p.forward();
      CHECK(std::isnan(saved.loss));
      for (Index t = 0; t < 6; ++t) CHECK(std::isnan(saved.lse[t]));
    }
  }
}

TEST_CASE("linear_cross_entropy: bad input leaves the outputs as they were") {
  Problem<double> p(2, 3, 4, {});
  p.clear();
  const CrossEntropySaved saved = p.forward();
  const Matrix<double> narrow = Matrix<double>::Zero(3, 5);
  CHECK_THROWS_WITH_AS(
      linear_cross_entropy_forward(p.hidden, narrow, p.targets),
      "eigenblocks: linear_cross_entropy: weight is 3 x 5, expected 3 x 4 (classes x "
      "columns of hidden)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(linear_cross_entropy_forward(p.hidden, p.weight, p.targets,
                                                    {.layout = HeadLayout::class_columns}),
                       "eigenblocks: linear_cross_entropy: weight is 3 x 4, expected 4 x 4 "
                       "(columns of hidden x classes)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(
      linear_cross_entropy_forward(p.hidden, p.weight, p.bias.head(2), p.targets),
      "eigenblocks: linear_cross_entropy: bias has 2 entries, expected 3 (one for each class)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(linear_cross_entropy_forward(p.hidden, p.weight, p.targets, {.softcap = -1}),
                       "eigenblocks: linear_cross_entropy: softcap (-1) must not be negative",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(
      linear_cross_entropy_forward(p.hidden, p.weight, p.targets, {.token_tile = -1}),
      "eigenblocks: linear_cross_entropy: token_tile (-1) must not be negative", invalid_argument);
  CHECK_THROWS_WITH_AS(
      linear_cross_entropy_forward(p.hidden, p.weight, p.targets, {.vocab_tile = 0}),
      "eigenblocks: linear_cross_entropy: vocab_tile (0) must be at least 1", invalid_argument);
  const std::vector<Index> high{0, 3};
  CHECK_THROWS_AS(linear_cross_entropy_forward(p.hidden, p.weight, high), std::out_of_range);

  Matrix<double> wrong(3, 4);
  CHECK_THROWS_WITH_AS(
      linear_cross_entropy_backward(saved, p.hidden, p.weight, p.targets, 1.0, wrong, p.dw),
      "eigenblocks: linear_cross_entropy: dhidden is 3 x 4, expected 2 x 4 (shape of hidden)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(
      linear_cross_entropy_fused(p.hidden, p.weight, p.targets, 1.0, p.dh, wrong.leftCols(3)),
      "eigenblocks: linear_cross_entropy: dweight is 3 x 3, expected 3 x 4 (shape of weight)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(
      linear_cross_entropy_backward(saved, p.hidden, p.weight, p.bias, p.targets, 1.0, p.dh, p.dw,
                                    p.db.head(2)),
      "eigenblocks: linear_cross_entropy: dbias has 2 entries, expected 3 (size of bias)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(
      linear_cross_entropy_backward({}, p.hidden, p.weight, p.targets, 1.0, p.dh, p.dw),
      "eigenblocks: linear_cross_entropy: saved.lse has 0 entries, expected 2 (rows of hidden)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(linear_cross_entropy_fused(p.hidden, p.weight, p.targets, 1.0, p.dh, p.dw,
                                                  {.loss = {.reduction = Reduction::none}}),
                       "eigenblocks: linear_cross_entropy_fused: Reduction::none has no single "
                       "upstream gradient; use "
                       "linear_cross_entropy_forward and _backward",
                       invalid_argument);
  CHECK(p.dh == Matrix<double>::Constant(2, 4, 99.0));
  CHECK(p.dw == Matrix<double>::Constant(3, 4, 99.0));
  CHECK(p.db == RowVector<double>::Constant(3, 99.0));
}
