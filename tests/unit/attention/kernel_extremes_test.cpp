// Numbers at the edge: huge scores, finite "minus infinities", dead rows, NaN where it must and must not show.
#include "support/attention_case.hpp"

#include <doctest/doctest.h>

#include <functional>

namespace {

using namespace attention_test;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// Rows [first, last) of every gradient and output are numbers.
template <class S>
void check_finite(const Outcome<S>& r) {
  CHECK(r.out.allFinite());
  CHECK(r.dq.allFinite());
  CHECK(r.dk.allFinite());
  CHECK(r.dv.allFinite());
}

/// In float with the smallest blocks, and in double: tile borders everywhere.
template <class F>
void with_tiles(F&& f) {
  f(Run{});
  f(Run{.tuning = {.key_block = 1, .query_tiles = 1, .packed_scalars = 1}});
  f(Run{.tuning = {.key_block = 3, .query_tiles = 2, .packed_scalars = 60}, .narrow = true});
}

}  // namespace

TEST_CASE("scores of size 1e5 do not overflow and pick the largest") {
  Problem p({.queries = 20, .keys = 30, .heads = 2, .dim = 4});
  p.q *= 300.0;
  p.k *= 300.0;
  const Outcome<double> want = oracle(p, {eb::causal()});
  REQUIRE(want.lse.cwiseAbs().maxCoeff() > 1e5);
  with_tiles([&](const Run& run) {
    // The rounding of a score is relative to its size: eps * 1e5 = 2e-11, which is what Bounds derives.
    check_close(tiled<double>(p, {eb::causal()}, run), want, p);
    check_finite(tiled<float>(p, {eb::causal()}, run));
    check_finite(tiled<float>(p, {eb::causal(), eb::alibi(eb::alibi_slopes(2))}, run));
  });
  // Gaps between scores are huge: the soft-max is a hard maximum, in float exactly as in double.
  Problem hard({.queries = 6, .keys = 6, .dim = 1, .scale = 1e5});
  hard.q.setOnes();
  for (Index j = 0; j < 6; ++j) hard.k(j, 0) = static_cast<double>((j * 5) % 6);
  const Outcome<float> got = tiled<float>(hard);
  for (Index i = 0; i < 6; ++i) CHECK(got.out.row(i) == hard.v.row(1).cast<float>());
  CHECK((got.lse.array() == 5e5f).all());
}

TEST_CASE("masked keys and values may hold anything finite, even what overflows in the products") {
  for (const bool with_score : {false, true}) {
    AnyRule rule{eb::causal() & eb::window_left(4)};
    if (with_score) rule.score = eb::soft_cap(3.0);
    Problem p({.queries = 17,
               .keys = 40,
               .heads = 2,
               .dim = 5,
               .value_dim = 3,
               .keep = true,
               .upstream_lse = false});
    p.keep.setOnes();
    p.keep.col(7).setZero();
    const Outcome<double> want = oracle(p, rule);
    for (const Index j :
         {7, 17, 18, 25, 39}) {  // by the tensor, right of the diagonal, in tiles never seen
      p.k.row(j).setConstant(j % 2 ? 1e308 : -1e150);
      p.v.row(j).setConstant(j % 2 ? 1.7e308 : 1e150);
    }
    with_tiles([&](const Run& run) {
      const Outcome<double> got = tiled<double>(p, rule, run);
      Problem unharmed(p.options);
      unharmed.keep = p.keep;
      check_close(got, want, unharmed);
    });
  }
}

TEST_CASE("NaN in keys that whole tiles skip is never read") {
  for (const bool with_score : {false, true}) {
    AnyRule rule{eb::causal() & eb::window_left(10)};
    if (with_score) rule.score = eb::alibi(eb::alibi_slopes(2));
    const Problem clean(
        {.queries = 60, .keys = 200, .heads = 2, .query_offset = 90, .sinks = true});
    Problem p = clean;
    for (Matrix<double>* m : {&p.k, &p.v}) {
      m->topRows(80).setConstant(kNaN);     // row 0 sees keys 80 .. 90
      m->bottomRows(50).setConstant(kNaN);  // the last row sees keys 139 .. 149
    }
    const Outcome<double> want = oracle(clean, rule);
    with_tiles([&](const Run& run) { check_close(tiled<double>(p, rule, run), want, clean); });
  }
}

TEST_CASE("NaN in a visible operand shows in exactly the rows that see it") {
  for (const bool with_score : {false, true}) {
    AnyRule rule{eb::causal()};
    if (with_score) rule.score = eb::soft_cap(3.0);
    const ProblemOptions o{
        .queries = 90, .keys = 90, .heads = 2, .kv_heads = 1, .dim = 4, .value_dim = 4};
    const Outcome<double> want = tiled<double>(Problem(o), rule);
    const auto rows_that_changed = [&](const std::function<void(Problem&)>& spoil) {
      Problem p(o);
      spoil(p);
      std::vector<Index> rows;
      with_tiles([&](const Run& run) {
        rows.clear();
        const Outcome<double> got = tiled<double>(p, rule, run);
        for (Index i = 0; i < o.queries; ++i) {
          const bool bad = !got.out.row(i).allFinite();
          if (bad) rows.push_back(i);
          if (!bad) CHECK(difference(got.out.row(i), want.out.row(i)) < 1e-12);
          CHECK((bad && p.v.allFinite()) == std::isnan(got.lse.row(i).sum()));
          if (bad) CHECK(!got.dq.row(i).allFinite());
        }
      });
      return rows;
    };
    const std::vector<Index> query = rows_that_changed([](Problem& p) { p.q(33, 1) = kNaN; });
    CHECK(query == std::vector<Index>{33});
    // A key is computed with by every row of the tiles that reach it, but masked rows select it away.
    CHECK(rows_that_changed([](Problem& p) { p.k(70, 1) = kNaN; }).front() == 70);
    CHECK(rows_that_changed([](Problem& p) { p.k(70, 1) = kNaN; }).size() == 20);
    // A value is multiplied by its probability, 0 where masked: rows of the tile before it may show NaN (as in PyTorch),
    // rows that see it must.
    const std::vector<Index> value = rows_that_changed([](Problem& p) { p.v(70, 1) = kNaN; });
    for (Index i = 70; i < 90; ++i) CHECK(std::find(value.begin(), value.end(), i) != value.end());
    CHECK(value.front() >= 70 - eb::simd::kLanes<double> * 3);
  }
}

TEST_CASE("infinite scores of visible pairs give NaN, not a wrong number") {
  Problem p({.queries = 3, .keys = 5});
  p.q.setOnes();
  p.k(2, 0) = kInfinity;
  const Outcome<double> got = tiled<double>(p);
  CHECK(std::isnan(got.out(0, 0)));
  CHECK(!std::isfinite(got.lse(0, 0)));
}

TEST_CASE("a bias of -inf masks; finite ones of any size do not") {
  const double lowest = static_cast<double>(std::numeric_limits<float>::lowest());
  for (const bool shared : {false, true}) {
    Problem p({.queries = 13, .keys = 31, .heads = 2, .bias = !shared, .shared_bias = shared});
    const Index rows = p.bias.rows();
    p.bias(0, 4) = -kInfinity;
    p.bias.row(5).setConstant(-kInfinity);  // dead
    p.bias.row(6).setConstant(-1e30);       // uniform
    p.bias.row(7).setConstant(lowest);      // uniform
    p.bias.row(8).setConstant(-1e30);       // all on key 3
    p.bias(8, 3) = 0.0;
    p.bias.row(rows - 1).tail(20).setConstant(-kInfinity);
    const Outcome<double> want = oracle(p);
    const auto check = [&](const auto& got, double tolerance) {
      CHECK(difference(got.out.row(6).head(8), p.v.leftCols(8).colwise().mean()) < tolerance);
      CHECK(difference(got.out.row(7).head(8), p.v.leftCols(8).colwise().mean()) < tolerance);
      CHECK(difference(got.out.row(8).head(8), p.v.row(3).head(8)) < tolerance);
      CHECK((got.out.row(5).head(8).array() == 0).all());
      CHECK(static_cast<double>(got.lse(5, 0)) == -kInfinity);
      CHECK((got.dq.row(5).head(8).array() == 0).all());
      CHECK(got.dbias(0, 4) == 0);
      CHECK((got.dbias.row(5).array() == 0).all());
      check_finite(got);
      CHECK(got.dbias.allFinite());
    };
    with_tiles([&](const Run& run) {
      check(tiled<double>(p, {}, run), 1e-14);
      check(tiled<float>(p, {}, run), 1e-6);
      CHECK(difference(tiled<double>(p, {}, run).out, want.out) < 1e-13);
    });
  }
}

TEST_CASE("rows without a visible key: zeros, -inf, no gradients; with a sink, its logarithm") {
  for (const bool with_score : {false, true}) {
    for (const bool sinks : {false, true}) {
      AnyRule rule{eb::causal()};
      if (with_score) rule.score = eb::soft_cap(3.0);
      // The first 40 of 60 queries come before key 0; upstream gradients everywhere, as a caller would have them.
      const Problem p({.queries = 60,
                       .keys = 25,
                       .heads = 2,
                       .query_offset = -40,
                       .sinks = sinks,
                       .upstream_lse = true});
      const Outcome<double> want = oracle(p, rule);
      with_tiles([&](const Run& run) {
        const Outcome<double> got = tiled<double>(p, rule, run);
        CHECK((got.out.topRows(40).array() == 0.0).all());
        CHECK((got.dq.topRows(40).array() == 0.0).all());
        for (Index i = 0; i < 40; ++i) {
          for (Index h = 0; h < 2; ++h) {
            if (sinks) {
              CHECK(std::abs(got.lse(i, h) - p.sinks[h]) < 1e-14);
            } else {
              CHECK(got.lse(i, h) == -kInfinity);
            }
          }
        }
        check_close(got, want, p);
        check_close(tiled<float>(p, rule, run), want, p);
      });
    }
  }
}

TEST_CASE("nothing visible at all, and no keys at all") {
  for (const Index keys : {0, 30}) {
    for (const bool sinks : {false, true}) {
      const Problem p({.queries = 30, .keys = keys, .heads = 4, .kv_heads = 2, .sinks = sinks});
      const AnyRule rule{AnyMask([](Index, Index) { return false; })};
      with_tiles([&](const Run& run) {
        const Outcome<double> got = tiled<double>(p, rule, run);
        CHECK((got.out.array() == 0.0).all());
        CHECK((got.dq.array() == 0.0).all());
        CHECK((got.dk.array() == 0.0).all());
        CHECK((got.dv.array() == 0.0).all());
        if (sinks) {
          CHECK(difference(got.lse, p.sinks.transpose().replicate(30, 1)) < 1e-14);
          CHECK((got.dsinks.array() == 0.0).all());
        } else {
          CHECK((got.lse.array() == -kInfinity).all());
        }
      });
    }
  }
}

TEST_CASE("sinks of every size: -inf is none, a large one takes all") {
  Problem p({.queries = 9, .keys = 12, .heads = 3, .sinks = true});
  p.sinks << -kInfinity, 1e4, -1e30;
  const Outcome<double> got = tiled<double>(p, {eb::causal()});
  ProblemOptions without = p.options;
  without.sinks = false;
  const Outcome<double> plain = tiled<double>(Problem(without), {eb::causal()});
  for (const Index h : {0, 2}) {
    CHECK(difference(got.out.middleCols(h * 8, 8), plain.out.middleCols(h * 8, 8)) < 1e-15);
    CHECK(difference(got.dq.middleCols(h * 8, 8), plain.dq.middleCols(h * 8, 8)) < 1e-15);
    CHECK(got.dsinks[h] == 0.0);
  }
  CHECK((got.out.middleCols(8, 8).array() == 0.0).all());
  CHECK((got.lse.col(1).array() == 1e4).all());
  check_finite(got);
}
