// The accuracy table of core/math.hpp and the exponentials of core/simd.hpp, walked over the bit patterns of both scalars
// in packet and in scalar form.  The oracle is libm in long double.
#include <eigenblocks/core/math.hpp>

#include "support/ulps.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;

using ulps::kSmallest;
using ulps::Real;
using ulps::real;
using ulps::ulp;
template <class S>
using Rows = void (*)(const S* in, S* out, Index n);

template <class S>
struct Function {
  std::string name;
  Rows<S> packets, scalars;
  Real (*oracle)(Real);
  Real (*bound)(Real x);  // bound, in units of the last place of the result
  Real (*inside)(
      Real
          x);  // the exponential the function is made of: the bound holds where it is a normal number
  Real (*limit)(Real);  // exact value beyond
  Real (*scale)(Real) =
      nullptr;  // for sums that cancel: the larger term, in whose units the error is then counted
};

template <class S>
void check(const Function<S>& f, const std::vector<S>& in) {
  INFO(f.name, " of scalars of ", sizeof(S), " bytes");
  for (const bool scalar : {false, true}) {
    CAPTURE(scalar);
    std::vector<S> out(in.size());
    (scalar ? f.scalars : f.packets)(in.data(), out.data(), static_cast<Index>(in.size()));
    Real worst = 0;  // error over bound
    S at = 0, got = 0, not_limit = 0;
    for (std::size_t i = 0; i < in.size(); ++i) {
      const Real x = real(in[i]), y = real(out[i]);
      if (f.inside(x) < kSmallest<S> * (1 + Real(1e-3))) {
        // The limit, or a last product of a subnormal number with x, x^2 or the slope of gelu_tanh's cubic.
        const Real dust = kSmallest<S> * std::min(1 + x * x + std::abs(x * x * x) / 4, Real(1500));
        if (out[i] != static_cast<S>(f.limit(x)) && !(std::abs(y - f.limit(x)) <= dust))
          not_limit = in[i];
        continue;
      }
      const Real want = f.oracle(x), error = std::abs(y - want);
      if (std::abs(want) < kSmallest<S> && error <= kSmallest<S>) continue;
      const Real ratio = error / ulp<S>(f.scale ? f.scale(x) : want) / f.bound(x);
      if (!(ratio <= worst)) {
        worst = ratio;
        at = in[i];
        got = out[i];
      }
    }
    INFO("worst at ", at, ": ", got, ", the bound being ", static_cast<double>(f.bound(real(at))),
         " ulp");
    CHECK(static_cast<double>(worst) <= 1.0);
    CHECK_MESSAGE(not_limit == S(0), "not the limit at ", not_limit);
  }
}

#define EIGENBLOCKS_TEST_FUNCTION(name) \
#name, [](const S* in, S* out, Index n) { simd::transform(in, out, n, [](auto x) { return simd::name(x); }); }, \
      [](const S* in, S* out, Index n) {                                                                           \
        for (Index i = 0; i < n; ++i) out[i] = simd::name(in[i]);                                                  \
      }

Real zero_or_one(Real x) { return x > 0 ? 1 : 0; }
Real zero_or_x(Real x) { return x > 0 ? x : 0; }
Real sign(Real x) { return x > 0 ? 1 : -1; }

Real sigmoid(Real x) { return 1 / (1 + std::exp(-x)); }
Real silu(Real x) { return x * sigmoid(x); }
Real silu_slope(Real x) { return x * sigmoid(x) * sigmoid(-x); }
Real softplus(Real x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }
Real normal_cdf(Real x) { return std::erfc(-x * std::sqrt(Real(0.5))) / 2; }
Real gelu_slope(Real x) { return x * std::exp(-x * x / 2) * 0.398942280401432677939946059934L; }
constexpr Real kScale = 0.797884560802865355879892119868763737L;  // sqrt(2 / pi)
Real twice_inner(Real x) { return 2 * kScale * (x + 0.044715L * x * x * x); }
Real gate(Real x) { return sigmoid(twice_inner(x)); }
Real gate_slope(Real x) {
  return x * gate(x) * gate(-x) * 2 * kScale * (1 + 3 * 0.044715L * x * x);
}

template <int N>
Real constant(Real) {
  return N;
}
// e^y inherits the rounding of y, |y| units of its last place; where that is not put back it shows in the lower tail.
Real gate_ulps(Real x) { return 8 + 3 * std::abs(twice_inner(x)) * (x < 0); }
Real gaussian_ulps(Real x) { return 8 + x * x; }

Real exponential(Real x) { return std::exp(-std::abs(x)); }
Real normal_tail(Real x) { return normal_cdf(-std::abs(x)); }
Real gate_tail(Real x) { return gate(-std::abs(x)); }

template <class S>
std::vector<Function<S>> table() {
  return {
      {EIGENBLOCKS_TEST_FUNCTION(sigmoid), sigmoid, constant<4>, exponential, zero_or_one},
      {EIGENBLOCKS_TEST_FUNCTION(silu), silu, constant<4>, exponential, zero_or_x},
      {EIGENBLOCKS_TEST_FUNCTION(tanh), [](Real x) { return std::tanh(x); }, constant<4>,
       constant<1>, sign},
      {EIGENBLOCKS_TEST_FUNCTION(softplus), softplus, constant<4>, exponential, zero_or_x},
      {EIGENBLOCKS_TEST_FUNCTION(normal_cdf), normal_cdf, constant<8>, normal_tail, zero_or_one},
      {EIGENBLOCKS_TEST_FUNCTION(gelu), [](Real x) { return x * normal_cdf(x); }, constant<8>,
       normal_tail, zero_or_x},
      {EIGENBLOCKS_TEST_FUNCTION(gelu_tanh), [](Real x) { return x * gate(x); }, gate_ulps,
       gate_tail, zero_or_x},
      {EIGENBLOCKS_TEST_FUNCTION(silu_grad), [](Real x) { return sigmoid(x) + silu_slope(x); },
       constant<6>, exponential, zero_or_one,
       [](Real x) { return std::max(sigmoid(x), std::abs(silu_slope(x))); }},
      {EIGENBLOCKS_TEST_FUNCTION(gelu_grad), [](Real x) { return normal_cdf(x) + gelu_slope(x); },
       gaussian_ulps, normal_tail, zero_or_one,
       [](Real x) { return std::max(normal_cdf(x), std::abs(gelu_slope(x))); }},
      {EIGENBLOCKS_TEST_FUNCTION(gelu_tanh_grad), [](Real x) { return gate(x) + gate_slope(x); },
       gate_ulps, gate_tail, zero_or_one,
       [](Real x) { return std::max(gate(x), std::abs(gate_slope(x))); }},
  };
}

}  // namespace

TEST_CASE_TEMPLATE("activations stay within their table of errors", S, float, double) {
  const std::vector<S> in = ulps::walk<S>();
  REQUIRE(in.size() > 80'000);
  for (const Function<S>& f : table<S>()) check(f, in);
}

TEST_CASE_TEMPLATE("limits at infinity are exact, NaN stays NaN, zero is exact", S, float, double) {
  constexpr S inf = std::numeric_limits<S>::infinity();
  const S in[] = {-inf,
                  inf,
                  std::numeric_limits<S>::quiet_NaN(),
                  S(0),
                  S(-0.0),
                  std::numeric_limits<S>::max(),
                  std::numeric_limits<S>::lowest(),
                  std::numeric_limits<S>::denorm_min()};
  for (const Function<S>& f : table<S>()) {
    INFO(f.name);
    for (const Rows<S> rows : {f.packets, f.scalars}) {
      S out[8];
      rows(in, out, 8);
      CHECK(out[0] == static_cast<S>(f.limit(real(-inf))));
      CHECK(out[1] == static_cast<S>(f.limit(real(inf))));
      CHECK(std::isnan(out[2]));
      CHECK(out[3] == static_cast<S>(f.oracle(0)));
      CHECK(out[4] == static_cast<S>(f.oracle(0)));
      CHECK(out[5] == static_cast<S>(f.limit(real(in[5]))));
      CHECK(out[6] == static_cast<S>(f.limit(real(in[6]))));
      const Real smallest = f.oracle(real(in[7]));
      CHECK(std::abs(real(out[7]) - smallest) <= ulp<S>(smallest));
    }
  }
}

TEST_CASE_TEMPLATE("sigmoid_pair gives the value and its complement with full relative accuracy", S,
                   float, double) {
  for (const S x : {S(-80), S(-3), S(0), S(0.25), S(50)}) {
    S value, complement;
    simd::sigmoid_pair(x, value, complement);
    CHECK(value == simd::sigmoid(x));
    CHECK(complement == simd::sigmoid(-x));
  }
}

TEST_CASE_TEMPLATE("transform covers every length, whole packets and tails, in place as well", S,
                   float, double) {
  constexpr Index w = simd::kLanes<S>;
  for (Index n = 0; n <= 2 * w + 1; ++n) {
    std::vector<S> in(static_cast<std::size_t>(n) + 1, S(7)), out(in);
    for (Index i = 0; i < n; ++i) in[static_cast<std::size_t>(i)] = static_cast<S>(i) / S(8) - S(1);
    simd::transform(in.data(), out.data(), n, [](auto x) { return simd::add(x, x); });
    for (Index i = 0; i < n; ++i)
      CHECK(out[static_cast<std::size_t>(i)] == S(2) * in[static_cast<std::size_t>(i)]);
    CHECK(out.back() == S(7));
    simd::transform(in.data(), in.data(), n, [](auto x) { return simd::add(x, x); });
    CHECK(in == out);
  }
}
