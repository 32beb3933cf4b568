// Ring attention in one process: any layout and number of ranks gives the single-process attention and its gradients.
#include "support/attention_rule.hpp"

#include <eigenblocks/attention/ring.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;
using attention_test::AnyMask;

constexpr RingLayout kLayouts[] = {RingLayout::contiguous, RingLayout::striped, RingLayout::zigzag};
constexpr AttentionShape kShape{.heads = 4, .kv_heads = 2};
constexpr Index kDim = 5, kValueDim = 3;

struct Operands {
  Matrix<double> q, k, v, dout;
  Vector<double> row_scale, sinks;
  explicit Operands(Index tokens) {
    Random random(3);
    q = normal_matrix<double>(random, tokens, kShape.heads * kDim);
    k = normal_matrix<double>(random, tokens, kShape.kv_heads * kDim);
    v = normal_matrix<double>(random, tokens, kShape.kv_heads * kValueDim);
    dout = normal_matrix<double>(random, tokens, kShape.heads * kValueDim);
    row_scale = normal_matrix<double>(random, tokens, 1);
    sinks = normal_matrix<double>(random, kShape.heads, 1);
  }
  Index tokens() const { return q.rows(); }
};

struct Result {
  Matrix<double> out, lse, dq, dk, dv;
  explicit Result(const Operands& x)
      : out(x.dout),
        lse(x.tokens(), kShape.heads),
        dq(Matrix<double>::Zero(x.tokens(), x.q.cols())),
        dk(Matrix<double>::Zero(x.tokens(), x.k.cols())),
        dv(Matrix<double>::Zero(x.tokens(), x.v.cols())) {}
};

template <class Rule>
Result whole(const Operands& x, const Rule& rule) {
  Result y(x);
  const AttentionTensors<double> tensors{.row_scale = &x.row_scale, .sinks = &x.sinks};
  const auto saved = attention_forward(x.q, x.k, x.v, y.out, kShape, rule, tensors);
  y.lse = saved.lse;
  attention_backward(saved, x.q, x.k, x.v, y.out, x.dout, y.dq, y.dk, y.dv, kShape, rule, tensors);
  return y;
}

/// Every rank's steps, one rank after the other.
template <class Rule>
Result ring(const Operands& x, const Rule& rule, RingLayout layout, Index ranks) {
  Result y(x);
  std::vector<std::vector<Index>> held;
  for (Index r = 0; r < ranks; ++r) held.push_back(ring_positions(layout, ranks, x.tokens(), r));
  const auto rows = [](const Matrix<double>& m, const std::vector<Index>& at) {
    return Matrix<double>(m(at, Eigen::all));
  };
  for (const bool backward : {false, true}) {
    for (Index r = 0; r < ranks; ++r) {
      const std::vector<Index>& mine = held[static_cast<std::size_t>(r)];
      const Vector<double> row_scale = x.row_scale(mine);
      const AttentionTensors<double> tensors{.row_scale = &row_scale, .sinks = &x.sinks};
      const Matrix<double> q = rows(x.q, mine), dout = rows(x.dout, mine);
      Matrix<double> out = rows(y.out, mine), lse = rows(y.lse, mine), dq = rows(y.dq, mine);
      for (Index s = 0; s < ranks; ++s) {
        const std::vector<Index>& theirs = held[static_cast<std::size_t>((r - s + ranks) % ranks)];
        const Matrix<double> k = rows(x.k, theirs), v = rows(x.v, theirs);
        if (!backward) {
          ring_step_forward(q, k, v, out, lse, kShape, rule, mine, theirs, s == 0, tensors);
          continue;
        }
        Matrix<double> dk = rows(y.dk, theirs), dv = rows(y.dv, theirs);
        ring_step_backward(lse, q, k, v, out, dout, dq, dk, dv, kShape, rule, mine, theirs,
                           tensors);
        y.dk(theirs, Eigen::all) = dk;
        y.dv(theirs, Eigen::all) = dv;
      }
      y.out(mine, Eigen::all) = out;
      y.lse(mine, Eigen::all) = lse;
      y.dq(mine, Eigen::all) = dq;
    }
  }
  return y;
}

double distance(const Matrix<double>& a, const Matrix<double>& b) {
  double worst = 0;
  for (Index i = 0; i < a.size(); ++i) {
    const double x = a.data()[i], y = b.data()[i];
    const double d = x == y ? 0.0 : std::abs(x - y);
    worst = std::isnan(d) ? std::numeric_limits<double>::infinity() : std::max(worst, d);
  }
  return worst;
}

template <class Rule>
void check_ring(const Operands& x, const Rule& rule) {
  const Result want = whole(x, rule);
  for (const RingLayout layout : kLayouts) {
    for (const Index ranks : {1, 2, 3, 4}) {
      CAPTURE(static_cast<int>(layout));
      CAPTURE(ranks);
      const Result got = ring(x, rule, layout, ranks);
      CHECK(distance(got.out, want.out) < 1e-13);
      CHECK(distance(got.lse, want.lse) < 1e-13);
      CHECK(distance(got.dq, want.dq) < 1e-12);
      CHECK(distance(got.dk, want.dk) < 1e-12);
      CHECK(distance(got.dv, want.dv) < 1e-12);
    }
  }
}

}  // namespace

TEST_CASE("every layout and number of ranks equals one process: masks") {
  const Operands x(48);
  std::vector<Index> documents(48);
  for (std::size_t i = 0; i < documents.size(); ++i) documents[i] = i < 10 ? 0 : i < 31 ? 1 : 2;
  for (const AnyMask& mask :
       {AnyMask(full()), AnyMask(causal()), AnyMask(causal() & window_left(7)),
        AnyMask(causal() & same_document(documents)), AnyMask(causal() | prefix(20)),
        AnyMask([](Index i, Index j) { return (i + 2 * j) % 7 < 3; })}) {
    check_ring(x, attention_rule(mask));
  }
}

TEST_CASE("score functors see global positions") {
  const Operands x(24);
  check_ring(x, attention_rule(AnyMask(causal()),
                               compose(soft_cap(2.0), alibi(alibi_slopes<double>(kShape.heads)))));
}

TEST_CASE("positions: each token on one rank, ascending; work is balanced as the layouts say") {
  for (const RingLayout layout : kLayouts) {
    for (const Index ranks : {1, 2, 3, 5}) {
      std::vector<Index> all;
      for (Index r = 0; r < ranks; ++r) {
        const std::vector<Index> mine = ring_positions(layout, ranks, 60, r);
        CHECK(std::is_sorted(mine.begin(), mine.end()));
        CHECK(mine.size() == static_cast<std::size_t>(60 / ranks));
        all.insert(all.end(), mine.begin(), mine.end());
      }
      std::sort(all.begin(), all.end());
      std::vector<Index> expected(60);
      std::iota(expected.begin(), expected.end(), 0);
      CHECK(all == expected);
      CHECK(ring_pairs(layout, ranks, 60, true).sum() == 60 * 61 / 2);
      CHECK((ring_pairs(layout, ranks, 60, false).array() == 3600 / (ranks * ranks)).all());
    }
  }
  CHECK(ring_positions(RingLayout::zigzag, 2, 8, 0) == std::vector<Index>{0, 1, 6, 7});
  CHECK(ring_positions(RingLayout::zigzag, 2, 8, 1) == std::vector<Index>{2, 3, 4, 5});
  CHECK(ring_positions(RingLayout::striped, 3, 6, 1) == std::vector<Index>{1, 4});
  CHECK(ring_positions(RingLayout::contiguous, 3, 6, 1) == std::vector<Index>{2, 3});
  // zigzag: (T/R)^2/2 pairs at every step s >= 1, (T/R)(T/R + 1)/2 at step 0
  const Matrix<Index> zigzag = ring_pairs(RingLayout::zigzag, 4, 64, true);
  CHECK((zigzag.col(0).array() == 16 * 17 / 2).all());
  CHECK((zigzag.rightCols(3).array() == 16 * 16 / 2).all());
  const Matrix<Index> contiguous = ring_pairs(RingLayout::contiguous, 4, 64, true);
  CHECK(contiguous.row(0).sum() == 136);
  CHECK(contiguous.row(3).sum() == 136 + 3 * 256);
}

TEST_CASE("bad input throws, and nothing is written") {
  const auto refuses = [](const auto& call, const char* message) {
    CHECK_THROWS_WITH_AS(call(), doctest::Contains(message), std::invalid_argument);
  };
  using L = RingLayout;
  refuses([] { ring_positions(L::contiguous, 0, 4, 0); }, "ranks (0) must be at least 1");
  refuses([] { ring_positions(L::contiguous, 2, 4, 2); }, "rank (2) must be in [0, 2)");
  refuses([] { ring_positions(L::striped, 3, 4, 0); },
          "tokens (4) must be a multiple of 3 (ranks)");
  refuses([] { ring_positions(L::zigzag, 2, 6, 0); },
          "tokens (6) must be a multiple of 4 (2 ranks)");
  refuses([] { ring_pairs(L::zigzag, 3, 4, true); }, "must be a multiple of 6");
  refuses([] { ring_positions(static_cast<L>(7), 1, 4, 0); }, "layout (7)");

  const Operands x(4);
  const auto rule = attention_rule(AnyMask(causal()));
  Matrix<double> out = Matrix<double>::Constant(4, 12, 7.0),
                 lse = Matrix<double>::Constant(4, 4, 7.0), dq = x.q, dk = x.k, dv = x.v;
  std::vector<Index> mine{0, 1, 2, 3}, theirs = mine;
  AttentionShape shape = kShape;
  AttentionTensors<double> tensors;
  const BoolMatrix keep = BoolMatrix::Constant(4, 4, true);
  const auto check = [&](const char* message) {
    refuses(
        [&] {
          ring_step_forward(x.q, x.k, x.v, out, lse, shape, rule, mine, theirs, true, tensors);
        },
        message);
    refuses(
        [&] {
          ring_step_backward(lse, x.q, x.k, x.v, out, x.dout, dq, dk, dv, shape, rule, mine, theirs,
                             tensors);
        },
        message);
    CHECK(((out.array() == 7.0).all() && (lse.array() == 7.0).all()));
    CHECK((dq == x.q && dk == x.k && dv == x.v));
  };
  mine.pop_back();
  check("query_positions has 3 entries, expected 4");
  mine = {0, 2, 1, 3};
  check("query_positions[2] (1) must be above the entry before it (2)");
  mine = {0, 1, 2, 3};
  theirs = {0, 1, 1, 3};
  check("key_positions[2] (1)");
  theirs = mine;
  shape.query_offset = 4;
  check("query_offset (4) and key_offset (0) must be 0");
  shape = kShape;
  tensors.mask = &keep;
  check("bias and mask tensors have no place in a ring");
  tensors.mask = nullptr;
  shape.heads = 3;
  check("heads (3)");
}
