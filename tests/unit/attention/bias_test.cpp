// KERPLE and Sandwich: the formulas written out, their lanes, their place in the kernels, and the gradients of KERPLE.
#include <eigenblocks/attention/bias.hpp>
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/reference.hpp>
#include <eigenblocks/core/gradcheck.hpp>

#include "support/attention_case.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

namespace {

using namespace attention_test;
using doctest::Approx;

template <class S>
Vector<S> numbers(std::initializer_list<double> list) {
  Vector<S> v(static_cast<Index>(list.size()));
  Index i = 0;
  for (const double x : list) v[i++] = static_cast<S>(x);
  return v;
}

/// The bias of head h at distance i - j, in long double.
using Formula = std::function<long double(Index past, Index h)>;

const Vector<double> kR1 = numbers<double>({0.3, 1.7, 0.01, 2.5});
const Vector<double> kR2 = numbers<double>({1.0, 0.2, 1.9, 0.63});

long double positive(Index past) { return past > 0 ? static_cast<long double>(past) : 0.0L; }
long double log_formula(Index past, Index h) {
  const auto r1 = static_cast<long double>(kR1[h]), r2 = static_cast<long double>(kR2[h]);
  return -r1 * std::log(1 + r2 * positive(past));
}
long double power_formula(Index past, Index h) {
  const auto r1 = static_cast<long double>(kR1[h]), r2 = static_cast<long double>(kR2[h]);
  return past > 0 ? -r1 * std::exp(r2 * std::log(positive(past))) : 0;
}
/// As NVIDIA NeMo and the paper write it: a dot product of two sinusoidal embeddings, less its value at distance 0.
Formula sandwich_formula(Index heads, Index dim) {
  return [=](Index past, Index h) {
    long double product = 0;
    const long double i = positive(past) + 5, j = 5;
    for (Index c = 1; c <= dim / 2; ++c) {
      const long double f =
          std::pow(10000.0L, -2.0L * static_cast<long double>(c) / static_cast<long double>(dim));
      product += std::sin(i * f) * std::sin(j * f) + std::cos(i * f) * std::cos(j * f);
    }
    const long double head = static_cast<long double>(h + 1),
                      half = static_cast<long double>(dim) / 2;
    return (product - half) * static_cast<long double>(heads) / (8 * head);
  };
}

template <class Score>
void check_values(const Score& score, const Formula& formula) {
  for (const Index past : {-1000, -1, 0, 1, 2, 3, 17, 400, 100'000}) {
    for (Index h = 0; h < 4; ++h) {
      CAPTURE(past);
      CAPTURE(h);
      const double want = static_cast<double>(formula(past, h));
      CHECK(score(0.0, 2000 + past, 2000, h) == Approx(want).epsilon(1e-11));
      CHECK(score(1.5, 2000 + past, 2000, h) == Approx(1.5 + want).epsilon(1e-11));
    }
  }
}

/// Lanes over queries and, as decoding uses them, over keys; `ulps` of the formula, r2 log D included.
template <class S, class Score>
void check_lanes(const Score& score, const Formula& formula, double ulps) {
  using P = eb::simd::Packet<S>;
  constexpr int w = eb::simd::kLanes<S>;
  const double unit = static_cast<double>(std::numeric_limits<S>::epsilon());
  for (const Index start : {-40, -3, -1, 0, 1, 60, 5000, 1'000'000}) {
    for (Index h = 0; h < 4; ++h) {
      for (const int sign : {1, -1}) {
        S got[std::size_t(w)];
        const P irel = eb::simd::mul(eb::simd::iota<P>(S(0)), eb::simd::set1<P>(S(sign)));
        eb::simd::store<P>(got, score.lanes(eb::simd::zero<P>(), irel, 100 + start, 100, h));
        for (int x = 0; x < w; ++x) {
          const double want = static_cast<double>(formula(start + sign * x, h));
          CAPTURE(start + sign * x);
          CHECK(std::abs(static_cast<double>(got[x]) - want) <= ulps * unit * std::abs(want));
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("values at all distances, keys after the query included") {
  check_values(eb::kerple_log(kR1, kR2), log_formula);
  check_values(eb::kerple_power(kR1, kR2), power_formula);
  check_values(eb::sandwich<double>(4, 20, 16), sandwich_formula(4, 16));
  check_values(eb::sandwich<double>(4, 3000), sandwich_formula(4, 128));  // from the table
  Vector<double> unused(4);
  check_values(eb::kerple_log_with_gradient(kR1, kR2, unused, unused), log_formula);
  check_values(eb::kerple_power_with_gradient(kR1, kR2, unused, unused), power_formula);
  const auto single = eb::kerple_log<float>(kR1.cast<float>(), kR2.cast<float>());
  CHECK(static_cast<double>(single(0.0f, 30, 10, 1)) ==
        Approx(static_cast<double>(log_formula(20, 1))).epsilon(1e-6));
}

TEST_CASE("lanes: the stated accuracy, in float and double, and where r2 D is tiny") {
  check_lanes<double>(eb::kerple_log(kR1, kR2), log_formula, 5);
  check_lanes<double>(eb::kerple_power(kR1, kR2), power_formula, 2 + 2 * std::log(1e6) + 2);
  // (the parameters themselves are rounded to float: once more r2 log D)
  check_lanes<float>(eb::kerple_log(kR1, kR2), log_formula, 6);
  check_lanes<float>(eb::kerple_power(kR1, kR2), power_formula, 2 + 4 * std::log(1e6) + 2);
  const Vector<double> r1 = numbers<double>({1e6}), r2 = numbers<double>({1e-12});
  using P = eb::simd::Packet<float>;
  float got[eb::simd::kLanes<float>];
  eb::simd::store<P>(
      got, eb::kerple_log(r1, r2).lanes(eb::simd::zero<P>(), eb::simd::zero<P>(), 20, 10, 0));
  CHECK(static_cast<double>(got[0]) == Approx(-1e-5).epsilon(1e-6));
}

TEST_CASE("shapes of the curves: ALiBi is a case of the power form, Sandwich is never positive") {
  const Vector<double> ones = Vector<double>::Ones(4);
  const auto power = eb::kerple_power(kR1, ones);
  const auto alibi = eb::alibi(kR1, eb::AlibiDistance::past);
  for (const Index i : {0, 3, 9, 1000})
    CHECK(power(0.5, i, 5, 2) == Approx(alibi(0.5, i, 5, 2)).epsilon(1e-14));
  CHECK(eb::sandwich_curve(0, 64) == 0.0);
  for (const double d : {0.5, 1.0, 7.0, 1e3, 1e6}) {
    CHECK(eb::sandwich_curve(d) < 0.0);
    CHECK(eb::sandwich_curve(d) == eb::sandwich_curve(-d));
  }
  using Learned = eb::LearnedKerpleScore<double, eb::KerpleKind::log>;
  static_assert(eb::detail::AdditiveScore<Learned> && eb::detail::RelativeScore<Learned>);
  static_assert(
      eb::detail::HasScoreAccumulate<Learned, double> &&
      !eb::detail::HasScoreAccumulate<eb::KerpleScore<double, eb::KerpleKind::log>, double>);
  static_assert(eb::detail::AdditiveScore<eb::SandwichScore<float>> &&
                eb::detail::RelativeScore<eb::SandwichScore<float>>);
}

TEST_CASE("as score functors: the tiled kernels against the reference") {
  const AnyScore scores[] = {eb::kerple_log(kR1, kR2), eb::kerple_power(kR1, kR2),
                             eb::sandwich<double>(4, 10, 16),
                             eb::compose(eb::soft_cap(3.0), eb::kerple_log(kR1, kR2))};
  for (const AnyScore& score : scores) {
    const Problem p({.queries = 21, .keys = 45, .heads = 4, .kv_heads = 2, .query_offset = 20});
    for (const AnyMask& mask : {AnyMask(eb::causal()), AnyMask(eb::full())}) {
      const AnyRule rule{mask, score};
      check_close(tiled<double>(p, rule), oracle(p, rule), p);
    }
    const AnyRule rule{eb::causal(), score};
    check_close(tiled<float>(p, rule), oracle(p, rule), p);
  }
}

TEST_CASE("relative_bias: the same bias as a matrix gives the same attention") {
  const Problem p(
      {.queries = 5, .keys = 9, .heads = 4, .kv_heads = 1, .query_offset = 3, .bias = true});
  const auto score = eb::kerple_log(kR1, kR2);
  const Matrix<double> bias = eb::relative_bias<double>(score, 4, 5, 9, 3);
  REQUIRE(bias.rows() == 20);
  REQUIRE(bias.cols() == 9);
  for (Index h = 0; h < 4; ++h) {
    for (Index i = 0; i < 5; ++i) {
      for (Index j = 0; j < 9; ++j) {
        CHECK(bias(h * 5 + i, j) ==
              Approx(static_cast<double>(log_formula(i + 3 - j, h))).epsilon(1e-13));
      }
    }
  }
  Matrix<double> out(5, p.dout.cols()), lse(5, 4), out2 = out, lse2 = lse;
  eb::attention_reference(p.q, p.k, p.v, out, lse, p.shape, eb::attention_rule(eb::full(), score));
  eb::attention_reference(p.q, p.k, p.v, out2, lse2, p.shape, eb::attention_rule(eb::full()),
                          {.bias = &bias});
  CHECK(difference(out, out2) < 1e-14);
  CHECK(difference(lse, lse2) < 1e-14);
  CHECK(eb::relative_bias<float>(score, 4, 0, 9).size() == 0);
  CHECK(eb::relative_bias<float>(score, 4, 3, 0).rows() == 12);
  const auto both = eb::compose(score, eb::alibi(kR1));
  CHECK(eb::relative_bias<double>(both, 4, 2, 3)(7, 0) ==
        Approx(score(0.0, 1, 0, 3) - kR1[3]).epsilon(1e-14));
}

TEST_CASE(
    "learned parameters: gradients against the reference and finite differences, added to what was "
    "there") {
  // One rule for both forms, since each rule is a kernel to compile.
  const Problem p({.queries = 14,
                   .keys = 17,
                   .heads = 4,
                   .kv_heads = 2,
                   .query_offset = 3,
                   .keep = true,
                   .sinks = true,
                   .upstream_lse = true});
  Matrix<double> parameters(4,
                            4);  // columns: r1 and r2 of the log form, r1 and r2 of the power form
  parameters << kR1, kR2, kR1.reverse() / 4, kR2.reverse();
  struct Gradients {
    Vector<double> column[4] = {
        Vector<double>::Constant(4, 10.0), Vector<double>::Constant(4, 20.0),
        Vector<double>::Constant(4, 30.0), Vector<double>::Constant(4, 40.0)};
  };
  const auto rule_of = [&](Gradients& g) {
    const auto column = [&](Index c) { return Vector<double>(parameters.col(c)); };
    return eb::attention_rule(
        eb::causal(),
        eb::compose(
            eb::kerple_log_with_gradient(column(0), column(1), g.column[0], g.column[1]),
            eb::kerple_power_with_gradient(column(2), column(3), g.column[2], g.column[3])));
  };
  const auto run = [&](Gradients& g, Outcome<double>& r) {
    const auto rule = rule_of(g);
    const auto saved = eb::attention_forward(p.q, p.k, p.v, r.out, p.shape, rule, p.tensors());
    r.lse = saved.lse;
    auto tensors = r.gradients(&p.dlse);
    eb::attention_backward(saved, p.q, p.k, p.v, r.out, p.dout, r.dq, r.dk, r.dv, p.shape, rule,
                           p.tensors(), &tensors);
  };
  Gradients got, want;
  Outcome<double> kernel(p), reference(p);
  run(got, kernel);
  auto tensors = reference.gradients(&p.dlse);
  eb::attention_reference_backward(p.q, p.k, p.v, p.dout, reference.dq, reference.dk, reference.dv,
                                   p.shape, rule_of(want), p.tensors(), &tensors);
  CHECK(difference(kernel.dq, reference.dq) < 1e-13);
  Matrix<double> gradient(4, 4);
  for (Index c = 0; c < 4; ++c) {
    CAPTURE(c);
    CHECK(difference(got.column[c], want.column[c]) < 1e-11);
    gradient.col(c) = got.column[c].array() - 10.0 * static_cast<double>(c + 1);
  }
  const auto loss = [&] {
    Gradients unused;
    Matrix<double> out(p.dout.rows(), p.dout.cols()), lse(p.dlse.rows(), p.dlse.cols());
    eb::attention_reference(p.q, p.k, p.v, out, lse, p.shape, rule_of(unused), p.tensors());
    return out.cwiseProduct(p.dout).sum() + lse.cwiseProduct(p.dlse).sum();
  };
  const eb::GradcheckResult result = eb::gradcheck(loss, parameters, gradient);
  CHECK_MESSAGE(result.passed, result.message());
}

TEST_CASE("accumulate: distance 0 and keys after the query count nothing; no overflow on the way") {
  Vector<double> d1 = Vector<double>::Zero(4), d2 = d1;
  const auto log = eb::kerple_log_with_gradient(kR1, kR2, d1, d2);
  const auto power = eb::kerple_power_with_gradient(kR1, kR2, d1, d2);
  for (const Index j : {5, 6, 900}) {
    log.accumulate(1.0, 0.0, 5, j, 1);
    power.accumulate(1.0, 0.0, 5, j, 1);
  }
  CHECK((d1.array() == 0.0).all());
  CHECK((d2.array() == 0.0).all());
  power.accumulate(1.0, 0.0, 6, 5, 1);  // distance 1: log D = 0
  CHECK(d1[1] == -1.0);
  CHECK(d2[1] == 0.0);
  log.accumulate(0.5, 0.0, 9, 5, 3);
  CHECK(d1[3] == Approx(-0.5 * std::log(1 + 0.63 * 4)).epsilon(1e-14));
  CHECK(d2[3] == Approx(-0.5 * 2.5 * 4 / (1 + 0.63 * 4)).epsilon(1e-14));
  CHECK(d1.head(1)[0] == 0.0);  // other heads are left alone

  Vector<float> f1 = Vector<float>::Zero(1), f2 = f1;
  eb::kerple_log_with_gradient<float>(numbers<float>({1}), numbers<float>({1e38}), f1, f2)
      .accumulate(1.0f, 0.0f, 1000, 0, 0);
  CHECK(static_cast<double>(f2[0]) == Approx(-1e-38).epsilon(1e-5));
}

TEST_CASE("bad input, with its message") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Vector<double> two = numbers<double>({1, 1}), three = numbers<double>({1, 1, 1});
  Vector<double> d2(2), d3(3);
  const struct {
    std::function<void()> call;
    std::string text;
  } errors[] = {
      {[&] { (void)eb::kerple_log(two, three); },
       "kerple: r2 has 3 entries, expected 2 (one per entry of r1)"},
      {[&] { (void)eb::kerple_power_with_gradient(two, two, d3, d2); },
       "kerple: r1_gradient has 3 entries, expected 2 (one per entry of r1)"},
      {[&] { (void)eb::kerple_log_with_gradient(two, two, d2, d3); },
       "kerple: r2_gradient has 3 entries, expected 2 (one per entry of r1)"},
      {[] {
         (void)eb::kerple_log(numbers<double>({1, 0}), numbers<double>({1, 1}));
       },
       "kerple: r1[1] (0) must be finite and > 0"},
      {[=] { (void)eb::kerple_log(numbers<double>({nan}), numbers<double>({1})); },
       "kerple: r1[0] (nan) must be finite and > 0"},
      {[] { (void)eb::kerple_log(numbers<double>({1}), numbers<double>({kInfinity})); },
       "kerple: r2[0] (inf) must be finite and > 0"},
      {[] { (void)eb::kerple_power(numbers<double>({1}), numbers<double>({-0.5})); },
       "kerple: r2[0] (-0.5) must be finite and > 0"},
      {[] { (void)eb::kerple_power(numbers<double>({1}), numbers<double>({2.25})); },
       "kerple: r2[0] (2.25) must be at most 2 in the power form"},
      {[] { (void)eb::sandwich(0, 4); }, "sandwich: heads (0) must be at least 1"},
      {[] { (void)eb::sandwich(4, -1); }, "sandwich: max_distance (-1) must not be negative"},
      {[] { (void)eb::sandwich(4, 4, 7); }, "sandwich: dim (7) must be even and at least 2"},
      {[] { (void)eb::sandwich(4, 4, 0); }, "sandwich: dim (0) must be even and at least 2"},
      {[] { (void)eb::sandwich_curve(1, 3); }, "sandwich: dim (3) must be even and at least 2"},
      {[] { (void)eb::sandwich_curve(kInfinity); }, "sandwich: distance (inf) must be finite"},
      {[&] { (void)eb::relative_bias<double>(eb::kerple_log(two, two), 0, 1, 1); },
       "relative_bias: heads (0) must be at least 1"},
      {[&] { (void)eb::relative_bias<double>(eb::kerple_log(two, two), 2, -1, 4); },
       "relative_bias: queries (-1) and keys (4) must not be negative"},
      {[&] { (void)eb::relative_bias<double>(eb::kerple_log(two, two), 3, 1, 1); },
       "kerple r1 has 2 entries, expected 3 (one per query head)"},
      {[] { (void)eb::relative_bias<double>(eb::sandwich<double>(2, 4), 3, 1, 1); },
       "sandwich slopes has 2 entries, expected 3 (one per query head)"},
  };
  for (const auto& error : errors) {
    CHECK_THROWS_WITH_AS(error.call(), ("eigenblocks: " + error.text).c_str(),
                         eb::invalid_argument);
  }
  // A parameter vector for another number of heads stops every implementation.
  const Problem p({.queries = 2, .keys = 3, .heads = 4});
  Matrix<double> out = Matrix<double>::Constant(2, p.dout.cols(), 7.0), lse(2, 4);
  CHECK_THROWS_WITH_AS(eb::attention_reference(
                           p.q, p.k, p.v, out, lse, p.shape,
                           eb::attention_rule(eb::causal(), eb::compose(eb::soft_cap(2.0),
                                                                        eb::kerple_log(two, two)))),
                       "eigenblocks: kerple r1 has 2 entries, expected 4 (one per query head)",
                       eb::invalid_argument);
  CHECK((out.array() == 7.0).all());
}
