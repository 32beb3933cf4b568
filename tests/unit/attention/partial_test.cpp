#include <eigenblocks/attention/partial.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace {

using namespace eigenblocks;

template <class S>
constexpr S kNone = -std::numeric_limits<S>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

constexpr Index kRows = 5, kHeads = 3, kWidth = 4;

struct Part {
  Matrix<double> out, lse;
};

Part empty_part() {
  return {Matrix<double>::Zero(kRows, kHeads * kWidth),
          Matrix<double>::Constant(kRows, kHeads, kNone<double>)};
}

std::vector<Part> random_parts(Index count, double spread = 3.0) {
  Random random(1);
  std::vector<Part> parts;
  for (Index p = 0; p < count; ++p) {
    parts.push_back({normal_matrix<double>(random, kRows, kHeads * kWidth),
                     normal_matrix<double>(random, kRows, kHeads, spread)});
  }
  return parts;
}

Part merge(const std::vector<Part>& parts) {
  Part total = empty_part();
  for (const Part& p : parts) attention_merge_into(total.out, total.lse, p.out, p.lse);
  return total;
}

/// The definition, with one common maximum.
Part direct(const std::vector<Part>& parts) {
  Part total = empty_part();
  for (Index i = 0; i < kRows; ++i) {
    for (Index h = 0; h < kHeads; ++h) {
      double top = kNone<double>, sum = 0;
      for (const Part& p : parts) top = std::max(top, p.lse(i, h));
      if (top == kNone<double>) continue;
      for (const Part& p : parts) sum += std::exp(p.lse(i, h) - top);
      total.lse(i, h) = top + std::log(sum);
      for (const Part& p : parts) {
        total.out.row(i).segment(h * kWidth, kWidth) +=
            std::exp(p.lse(i, h) - top) / sum * p.out.row(i).segment(h * kWidth, kWidth);
      }
    }
  }
  return total;
}

void check_close(const Part& a, const Part& b) {
  CHECK((a.out - b.out).cwiseAbs().maxCoeff() < 1e-14);
  for (Index i = 0; i < a.lse.size(); ++i) {
    CHECK((a.lse.data()[i] == b.lse.data()[i] ||
           std::abs(a.lse.data()[i] - b.lse.data()[i]) < 1e-14));
  }
}

}  // namespace

TEST_CASE("any number of parts, in any order, equals the definition") {
  for (const Index count : {1, 2, 3, 7}) {
    std::vector<Part> parts = random_parts(count);
    const Part want = direct(parts);
    check_close(merge(parts), want);
    std::reverse(parts.begin(), parts.end());
    check_close(merge(parts), want);
    // associative: merge a merged pair
    if (count >= 3) {
      const Part pair = merge({parts[0], parts[1]});
      std::vector<Part> rest(parts.begin() + 2, parts.end());
      rest.push_back(pair);
      check_close(merge(rest), want);
    }
  }
}

TEST_CASE("the identity is exact, also next to garbage, and two empty parts are empty") {
  const Part part = random_parts(1)[0];
  Part garbage = empty_part();
  garbage.out.setConstant(kNaN);  // an empty part contributes nothing, whatever its rows hold
  for (const Part& nothing : {empty_part(), garbage}) {
    Part a = part;
    attention_merge_into(a.out, a.lse, nothing.out, nothing.lse);
    CHECK(a.out == part.out);
    CHECK(a.lse == part.lse);
    Part b = nothing;
    attention_merge_into(b.out, b.lse, part.out, part.lse);
    CHECK(b.out == part.out);
    CHECK(b.lse == part.lse);
    Part c = empty_part();
    attention_merge_into(c.out, c.lse, nothing.out, nothing.lse);
    CHECK((c.out.array() == 0.0).all());
    CHECK((c.lse.array() == kNone<double>).all());
  }
}

TEST_CASE_TEMPLATE("far-apart and huge log-sum-exps neither overflow nor lose the larger part", S,
                   float, double) {
  for (const S far : {S(1e4), S(1e30)}) {
    for (const bool larger_first : {true, false}) {
      Matrix<S> out = Matrix<S>::Constant(1, 2, larger_first ? S(1) : S(2)),
                lse = Matrix<S>::Constant(1, 1, larger_first ? far : -far);
      const Matrix<S> part = Matrix<S>::Constant(1, 2, larger_first ? S(2) : S(1)), part_lse = -lse;
      attention_merge_into(out, lse, part, part_lse);
      CHECK((out.array() == S(1)).all());
      CHECK(lse(0, 0) == far);
    }
  }
  CHECK(detail::log_add_exp<S>(S(700), S(700)) == doctest::Approx(700 + std::log(2.0)));
  CHECK(detail::log_add_exp<S>(kNone<S>, kNone<S>) == kNone<S>);
  CHECK(detail::log_add_exp<S>(kNone<S>, S(3)) == S(3));
  CHECK(detail::log_add_exp<S>(S(3), kNone<S>) == S(3));
}

TEST_CASE("NaN in one part stays in its rows and survives later parts, empty ones included") {
  std::vector<Part> parts = random_parts(2);
  parts[0].lse(2, 1) = kNaN;
  parts[0].out.row(2).segment(kWidth, kWidth).setConstant(kNaN);
  for (const std::vector<Part>& order : {std::vector<Part>{parts[0], parts[1]},
                                         {parts[1], parts[0]},
                                         {parts[0], empty_part(), parts[1]},
                                         {empty_part(), parts[0]}}) {
    const Part total = merge(order);
    for (Index i = 0; i < kRows; ++i) {
      for (Index h = 0; h < kHeads; ++h) {
        const bool spoilt = i == 2 && h == 1;
        CHECK(std::isnan(total.lse(i, h)) == spoilt);
        CHECK(total.out.row(i).segment(h * kWidth, kWidth).hasNaN() == spoilt);
      }
    }
  }
}

TEST_CASE("a sink as a part of its own") {
  // lse' = log(e^lse + e^sink), out' = out e^(lse - lse')
  const Part part = random_parts(1)[0];
  Part sink = empty_part();
  sink.lse.setConstant(0.5);
  const Part total = merge({part, sink});
  for (Index i = 0; i < kRows; ++i) {
    for (Index h = 0; h < kHeads; ++h) {
      const double lse = std::log(std::exp(part.lse(i, h)) + std::exp(0.5));
      CHECK(total.lse(i, h) == doctest::Approx(lse).epsilon(1e-14));
      CHECK(
          total.out(i, h * kWidth) ==
          doctest::Approx(part.out(i, h * kWidth) * std::exp(part.lse(i, h) - lse)).epsilon(1e-13));
    }
  }
}

TEST_CASE(
    "merge backward against finite differences, with and without an upstream for lse, with an "
    "empty part") {
  std::vector<Part> parts = random_parts(3, 1.0);
  Random random(5);
  const Matrix<double> dout = normal_matrix<double>(random, kRows, kHeads * kWidth);
  const Matrix<double> dlse = normal_matrix<double>(random, kRows, kHeads);
  for (const bool with_lse : {false, true}) {
    const Part total = merge(parts);
    for (Part& part : parts) {
      Matrix<double> dpart_out = Matrix<double>::Constant(kRows, kHeads * kWidth, kNaN),
                     dpart_lse(kRows, kHeads);
      attention_merge_backward(part.out, part.lse, total.out, total.lse, dout, dpart_out, dpart_lse,
                               with_lse ? &dlse : nullptr);
      const auto loss = [&] {
        const Part y = merge(parts);
        return y.out.cwiseProduct(dout).sum() + (with_lse ? y.lse.cwiseProduct(dlse).sum() : 0.0);
      };
      GradcheckResult result = gradcheck(loss, part.out, dpart_out);
      CHECK_MESSAGE(result.passed, result.message());
      result = gradcheck(loss, part.lse, dpart_lse);
      CHECK_MESSAGE(result.passed, result.message());
    }
    const Part nothing = empty_part();
    Matrix<double> dpart_out(kRows, kHeads * kWidth), dpart_lse(kRows, kHeads);
    attention_merge_backward(nothing.out, nothing.lse, total.out, total.lse, dout, dpart_out,
                             dpart_lse, &dlse);
    CHECK((dpart_out.array() == 0.0).all());
    CHECK((dpart_lse.array() == 0.0).all());
    // all parts empty: still zeros, not exp(-inf - -inf)
    attention_merge_backward(nothing.out, nothing.lse, nothing.out, nothing.lse, dout, dpart_out,
                             dpart_lse, &dlse);
    CHECK((dpart_out.array() == 0.0).all());
    CHECK((dpart_lse.array() == 0.0).all());
  }
}

TEST_CASE("views, and sizes of zero") {
  const std::vector<Part> parts = random_parts(2);
  const Part want = merge(parts);
  Matrix<double> wide = Matrix<double>::Zero(kRows, kHeads * kWidth + 5),
                 wide_lse = Matrix<double>::Constant(kRows, kHeads + 2, kNone<double>);
  for (const Part& p : parts) {
    attention_merge_into(wide.middleCols(3, kHeads * kWidth), wide_lse.middleCols(1, kHeads), p.out,
                         p.lse);
  }
  CHECK(wide.middleCols(3, kHeads * kWidth) == want.out);
  CHECK(wide_lse.middleCols(1, kHeads) == want.lse);
  Matrix<double> none(0, 8), none_lse(0, 2), narrow(3, 0), narrow_lse = Matrix<double>::Zero(3, 2);
  CHECK_NOTHROW(attention_merge_into(none, none_lse, none, none_lse));
  CHECK_NOTHROW(
      attention_merge_into(narrow, narrow_lse, Matrix<double>(3, 0), Matrix<double>(narrow_lse)));
  CHECK(narrow_lse(0, 0) == doctest::Approx(std::log(2.0)));
}

TEST_CASE("shapes that do not fit are refused before anything is written") {
  Part total = random_parts(1)[0];
  const Part before = total, part = random_parts(2)[1];
  const auto refuse = [&](const Matrix<double>& out, const Matrix<double>& lse, const char* text) {
    CHECK_THROWS_WITH_AS(attention_merge_into(total.out, total.lse, out, lse), text,
                         eigenblocks::invalid_argument);
    CHECK(total.out == before.out);
    CHECK(total.lse == before.lse);
  };
  refuse(part.out.topRows(4), part.lse,
         "eigenblocks: part_out is 4 x 12, expected 5 x 12 (shape of out)");
  refuse(part.out, part.lse.leftCols(2),
         "eigenblocks: part_lse is 5 x 2, expected 5 x 3 (shape of lse)");
  Matrix<double> narrow(5, 11), lse(5, 3);
  CHECK_THROWS_WITH_AS(attention_merge_into(narrow, lse, narrow, lse),
                       "eigenblocks: out is 5 x 11, its lse 5 x 3: expected the same rows and "
                       "heads dividing the columns",
                       eigenblocks::invalid_argument);
  Matrix<double> headless(5, 0);
  CHECK_THROWS_WITH_AS(attention_merge_into(narrow, headless, narrow, headless),
                       "eigenblocks: lse has no columns", eigenblocks::invalid_argument);
  Matrix<double> dpart(5, 12), dlse(5, 2);
  CHECK_THROWS_WITH_AS(
      attention_merge_backward(part.out, part.lse, before.out, before.lse, before.out, dpart, dlse),
      "eigenblocks: dpart_lse is 5 x 2, expected 5 x 3 (shape of lse)",
      eigenblocks::invalid_argument);
}
