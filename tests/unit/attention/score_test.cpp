// Score functors: packets against scalars, derivatives against differences, parameter gradients, slopes.
#include "support/attention_rule.hpp"

#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

namespace {

using namespace attention_test;
using eb::Vector;

/// A user's functor without lanes: s + 0.1 s^2 + a bias by head and distance.
struct Quadratic {
  template <class S>
  S operator()(S s, Index i, Index j, Index h) const {
    return s + S(0.1) * s * s + S(0.25) * static_cast<S>(h) - S(0.01) * static_cast<S>(i - j);
  }
  template <class S>
  S grad(S s, Index, Index, Index) const {
    return S(1) + S(0.2) * s;
  }
};

struct Named {
  std::string name;
  AnyScore score;
};

std::vector<Named> all_scores() {
  using namespace eigenblocks;
  const Vector<double> slopes = alibi_slopes(3);
  return {{"identity", identity()},
          {"soft_cap", soft_cap(2.0)},
          {"soft_cap off", soft_cap(0.0)},
          {"alibi", alibi(slopes)},
          {"alibi past", alibi(slopes, AlibiDistance::past)},
          {"quadratic", Quadratic{}},
          {"cap then alibi", compose(soft_cap(2.0), alibi(slopes))},
          {"alibi then cap", compose(alibi(slopes), soft_cap(2.0))},
          {"three", compose(soft_cap(3.0), Quadratic{}, soft_cap(1.5))},
          {"two biases", compose(alibi(slopes), alibi(slopes, AlibiDistance::past))}};
}

}  // namespace

TEST_CASE_TEMPLATE("lanes and grad_lanes agree with the scalar forms", S, float, double) {
  using P = eb::simd::Packet<S>;
  constexpr int w = eb::simd::kLanes<S>;
  eb::Random random(1);
  // A tanh may differ by a few ulp between the packet polynomial and libm, relative to the cap.
  const double tolerance = 16 * static_cast<double>(std::numeric_limits<S>::epsilon());
  for (const Named& n : all_scores()) {
    CAPTURE(n.name);
    for (int trial = 0; trial < 200; ++trial) {
      const Index i0 = random.below(50), j = random.below(50), first = w * random.below(3),
                  h = random.below(3);
      S s[std::size_t(w)], value[std::size_t(w)], slope[std::size_t(w)];
      for (S& x : s) x = static_cast<S>(3 * random.normal());
      const P packet = eb::simd::load<P>(s), irel = eb::simd::iota<P>(static_cast<S>(first));
      eb::simd::store<P>(value, n.score.lanes(packet, irel, i0, j, h));
      eb::simd::store<P>(slope, n.score.grad_lanes(packet, irel, i0, j, h));
      for (int x = 0; x < w; ++x) {
        const Index i = i0 + first + x;
        const double want = static_cast<double>(n.score(s[x], i, j, h));
        CHECK(std::abs(static_cast<double>(value[x]) - want) <=
              tolerance * std::max(4.0, std::abs(want)));
        CHECK(std::abs(static_cast<double>(slope[x] - n.score.grad(s[x], i, j, h))) <=
              tolerance * 4);
      }
    }
  }
}

TEST_CASE("grad is the derivative at the incoming score") {
  for (const Named& n : all_scores()) {
    CAPTURE(n.name);
    for (const double s : {-4.0, -0.3, 0.0, 1.2, 5.0}) {
      const double h = 1e-4;
      const auto f = [&](double x) { return n.score(x, 9, 4, 2); };
      const double numeric = (8 * (f(s + h) - f(s - h)) - (f(s + 2 * h) - f(s - 2 * h))) / (12 * h);
      CHECK(n.score.grad(s, 9, 4, 2) == doctest::Approx(numeric).epsilon(1e-9));
    }
  }
}

TEST_CASE("soft_cap: odd, bounded by cap, identity when off, linear near zero") {
  const auto cap = eb::soft_cap(30.0);
  CHECK(cap(1e6, 0, 0, 0) == doctest::Approx(30.0));
  CHECK(cap(-1e6, 0, 0, 0) == doctest::Approx(-30.0));
  CHECK(cap(1e-3, 0, 0, 0) == doctest::Approx(1e-3).epsilon(1e-9));
  CHECK(cap(7.0, 0, 0, 0) == -cap(-7.0, 0, 0, 0));
  CHECK(eb::soft_cap(0.0)(1e6, 0, 0, 0) == 1e6);
  CHECK(eb::soft_cap(0.0).grad(1e6, 0, 0, 0) == 1.0);
  CHECK(cap.grad(0.0, 0, 0, 0) == 1.0);
  CHECK_THROWS_WITH_AS(eb::soft_cap(-1.0),
                       "eigenblocks: soft_cap: cap (-1) must be finite and >= 0",
                       eb::invalid_argument);
  CHECK_THROWS_AS(eb::soft_cap(std::numeric_limits<double>::infinity()), eb::invalid_argument);
  CHECK_THROWS_AS(eb::soft_cap(std::numeric_limits<double>::quiet_NaN()), eb::invalid_argument);
}

TEST_CASE("alibi: distance, both conventions, additive and relative flags") {
  Vector<double> slopes(2);
  slopes << 0.5, 0.25;
  const auto both = eb::alibi(slopes);
  const auto past = eb::alibi(slopes, eb::AlibiDistance::past);
  CHECK(both(1.0, 7, 3, 0) == 1.0 - 0.5 * 4);
  CHECK(both(1.0, 3, 7, 1) == 1.0 - 0.25 * 4);
  CHECK(past(1.0, 7, 3, 0) == 1.0 - 0.5 * 4);
  CHECK(past(1.0, 3, 7, 1) == 1.0);
  CHECK(both(0.0, 10'000'019, 12, 1) == -0.25 * 10'000'007);
  // Distances that float can hold are exact in lanes, whatever the positions.
  using P = eb::simd::Packet<float>;
  float out[eb::simd::kLanes<float>];
  eb::simd::store<P>(out, eb::alibi(slopes).lanes(eb::simd::zero<P>(), eb::simd::iota<P>(0.0f),
                                                  1'000'000'007, 1'000'000'000, 0));
  CHECK(out[0] == -3.5f);

  using Both = decltype(both);
  static_assert(eb::detail::AdditiveScore<Both> && eb::detail::RelativeScore<Both>);
  using Capped = decltype(eb::compose(eb::soft_cap(1.0), both));
  static_assert(!Capped::additive && Capped::relative);
  static_assert(decltype(eb::compose(both, past))::additive);
  static_assert(!eb::ComposedScore<Both, Quadratic>::relative &&
                !eb::ComposedScore<Both, Quadratic>::additive);
  static_assert(eb::Score<Quadratic> && !eb::Score<int>);
}

TEST_CASE("the order of a composition matters: cap then bias is not bias then cap") {
  Vector<double> slopes = Vector<double>::Ones(1);
  const auto cap = eb::soft_cap(2.0);
  const auto bias = eb::alibi(slopes);
  CHECK(eb::compose(cap, bias)(3.0, 4, 1, 0) == bias(cap(3.0, 4, 1, 0), 4, 1, 0));
  CHECK(eb::compose(bias, cap)(3.0, 4, 1, 0) == cap(bias(3.0, 4, 1, 0), 4, 1, 0));
  CHECK(std::abs(eb::compose(cap, bias)(3.0, 4, 1, 0) - eb::compose(bias, cap)(3.0, 4, 1, 0)) >
        1.0);
}

TEST_CASE("learned slopes: accumulate adds -ds |i - j|, through what comes after") {
  Vector<double> slopes(2), gradient = Vector<double>::Constant(2, 100.0);
  slopes << 0.5, 0.25;
  const auto learned = eb::alibi_with_gradient(slopes, gradient);
  CHECK(learned(1.0, 7, 3, 0) == eb::alibi(slopes)(1.0, 7, 3, 0));
  learned.accumulate(0.5, 1.0, 7, 3, 1);
  CHECK(gradient[0] == 100.0);
  CHECK(gradient[1] == 100.0 - 0.5 * 4);
  // alibi first: its gradient passes the derivative of the cap at the biased score
  gradient.setZero();
  eb::compose(learned, eb::soft_cap(2.0)).accumulate(0.5, 1.0, 7, 3, 0);
  const double biased = 1.0 - 0.5 * 4, slope = 1 - std::pow(std::tanh(biased / 2.0), 2);
  CHECK(gradient[0] == doctest::Approx(-0.5 * slope * 4).epsilon(1e-14));
  // alibi last: the upstream as it is
  gradient.setZero();
  eb::compose(eb::soft_cap(2.0), learned).accumulate(0.5, 1.0, 7, 3, 0);
  CHECK(gradient[0] == -0.5 * 4);

  Vector<double> wrong(3);
  CHECK_THROWS_WITH_AS(
      eb::alibi_with_gradient(slopes, wrong),
      "eigenblocks: alibi_with_gradient: slopes_gradient has 3 entries, expected 2 (one per slope)",
      eb::invalid_argument);
}

TEST_CASE("alibi_slopes: powers of two, and both conventions elsewhere") {
  for (const Index heads : {1, 2, 8, 16}) {
    for (const auto convention : {eb::AlibiConvention::bloom, eb::AlibiConvention::mpt}) {
      const Vector<double> slopes = eb::alibi_slopes(heads, convention);
      for (Index h = 0; h < heads; ++h) {
        CHECK(slopes[h] ==
              std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(heads)));
      }
    }
  }
  // 6 heads: 4 slopes of 4 heads, then every second of 8; MPT: odd-indexed of 8, then even-indexed.
  const Vector<double> bloom = eb::alibi_slopes(6),
                       mpt = eb::alibi_slopes(6, eb::AlibiConvention::mpt);
  const double bloom_exponents[] = {2, 4, 6, 8, 1, 3}, mpt_exponents[] = {2, 4, 6, 8, 1, 3};
  for (Index h = 0; h < 6; ++h) {
    CHECK(bloom[h] == std::exp2(-bloom_exponents[h]));
    CHECK(mpt[h] == std::exp2(-mpt_exponents[h]));
  }
  CHECK(eb::alibi_slopes<float>(12).size() == 12);
  CHECK_THROWS_WITH_AS(eb::alibi_slopes(0),
                       "eigenblocks: alibi_slopes: heads (0) must be at least 1",
                       eb::invalid_argument);
}
