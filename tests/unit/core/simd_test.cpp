// The packet layer: every function lane by lane against plain scalars, and the contracts of exp2, exp and log.
#include <eigenblocks/core/simd.hpp>

#include "support/ulps.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using namespace eigenblocks;

template <class S>
constexpr S kInf = std::numeric_limits<S>::infinity();
template <class S>
constexpr S kNaN = std::numeric_limits<S>::quiet_NaN();

template <class P>
std::vector<simd::lane_t<P>> lanes(const P& p) {
  std::vector<simd::lane_t<P>> out(static_cast<std::size_t>(simd::kPacketSize<P>));
  simd::store<P>(out.data(), p);
  return out;
}

/// Lanes with mixed signs, ties and different sizes: 0.5 k for k = -w/2 ...
template <class P>
P sample(int shift) {
  using S = simd::lane_t<P>;
  std::vector<S> in(static_cast<std::size_t>(simd::kPacketSize<P>));
  for (std::size_t i = 0; i < in.size(); ++i) {
    in[i] = S(0.5) * (static_cast<S>(i) * static_cast<S>(i % 2 ? 1 : -1)) + static_cast<S>(shift);
  }
  return simd::load<P>(in.data());
}

template <class P>
void check_arithmetic() {
  using S = simd::lane_t<P>;
  constexpr std::size_t w = std::size_t(simd::kPacketSize<P>);
  const P a = sample<P>(1), b = sample<P>(-2), c = simd::set1<P>(S(3));
  const auto x = lanes(a), y = lanes(b);
  const auto equal_to = [&](const P& got, auto want) {
    const auto values = lanes(got);
    for (std::size_t i = 0; i < w; ++i) CHECK(values[i] == static_cast<S>(want(x[i], y[i])));
  };
  equal_to(simd::zero<P>(), [](S, S) { return S(0); });
  equal_to(c, [](S, S) { return S(3); });
  equal_to(simd::add(a, b), [](S p, S q) { return p + q; });
  equal_to(simd::sub(a, b), [](S p, S q) { return p - q; });
  equal_to(simd::mul(a, b), [](S p, S q) { return p * q; });
  equal_to(simd::div(a, c), [](S p, S) { return p / S(3); });
  equal_to(simd::neg(a), [](S p, S) { return -p; });
  equal_to(simd::fma(a, b, c), [](S p, S q) { return p * q + S(3); });  // exact in these numbers
  equal_to(simd::max(a, b), [](S p, S q) { return std::max(p, q); });
  equal_to(simd::min(a, b), [](S p, S q) { return std::min(p, q); });
  equal_to(simd::abs(a), [](S p, S) { return std::abs(p); });

  const auto roots =
      lanes(simd::sqrt(simd::abs(a)));  // Eigen refines an estimate with AVX-512: 2 ulp
  for (std::size_t i = 0; i < w; ++i) {
    const S want = std::sqrt(std::abs(x[i]));
    CHECK(std::abs(roots[i] - want) <= 2 * std::numeric_limits<S>::epsilon() * want);
  }

  const P one = simd::set1<P>(S(1)), none = simd::zero<P>();
  const auto as_number = [&](const P& mask) { return simd::select(mask, one, none); };
  equal_to(as_number(simd::less(a, b)), [](S p, S q) { return p < q; });
  equal_to(as_number(simd::less_equal(a, b)), [](S p, S q) { return p <= q; });
  equal_to(as_number(simd::equal(a, simd::abs(a))), [](S p, S) { return p == std::abs(p); });
  const P low = simd::less(a, one), high = simd::less(none, a);
  equal_to(as_number(simd::mask_and(low, high)), [](S p, S) { return p < 1 && 0 < p; });
  equal_to(as_number(simd::mask_or(low, high)), [](S p, S) { return p < 1 || 0 < p; });
}

/// Largest error of f over `in`, in ulps of the oracle, where the oracle is a normal number.
template <class S, class F>
double worst_ulps(const std::vector<S>& in, F f, ulps::Real (*oracle)(ulps::Real)) {
  using P = simd::Packet<S>;
  ulps::Real worst = 0;
  std::vector<S> padded = in;
  padded.resize((in.size() + std::size_t(simd::kLanes<S>)), S(0));
  for (std::size_t i = 0; i < in.size(); i += std::size_t(simd::kLanes<S>)) {
    const auto packet = lanes(f(simd::load<P>(&padded[i])));
    for (std::size_t x = 0; x < packet.size(); ++x) {
      const ulps::Real want = oracle(ulps::real(padded[i + x]));
      if (want < ulps::kSmallest<S>) {
        CHECK(packet[x] >= S(0));
        CHECK(packet[x] <= std::numeric_limits<S>::min());
        continue;
      }
      if (want > ulps::real(std::numeric_limits<S>::max())) {
        CHECK(packet[x] >= std::numeric_limits<S>::max());
        continue;
      }
      const ulps::Real error = std::abs(ulps::real(packet[x]) - want),
                       scalar_error = std::abs(ulps::real(f(padded[i + x])) - want);
      worst = std::max({worst, error / ulps::ulp<S>(want), scalar_error / ulps::ulp<S>(want)});
    }
  }
  return static_cast<double>(worst);
}

/// The arguments in [low, high], and the ends with their neighbours.
template <class S>
std::vector<S> arguments(S low, S high) {
  std::vector<S> in;
  for (const S x : ulps::walk<S>()) {
    if (x >= low && x <= high) in.push_back(x);
  }
  for (const S edge : {low, high}) {
    S x = edge;
    for (int k = 0; k < 20; ++k, x = std::nextafter(x, S(0))) in.push_back(x);
  }
  return in;
}

/// f on a whole packet of x and on x itself; both must agree in kind.
template <class S, class F>
S value_of(F f, S x) {
  const auto packet = lanes(f(simd::set1<simd::Packet<S>>(x)));
  for (const S lane : packet) CHECK((lane == f(x) || (std::isnan(lane) && std::isnan(f(x)))));
  return packet[0];
}

constexpr auto exp2_of = [](const auto& x) { return simd::exp2(x); };
constexpr auto exp_of = [](const auto& x) { return simd::exp(x); };
constexpr auto log_of = [](const auto& x) { return simd::log(x); };
constexpr auto log1p_of = [](const auto& x) { return simd::log1p(x); };
constexpr auto exp_nonpositive_of = [](const auto& x) { return simd::exp_nonpositive(x); };

}  // namespace

TEST_CASE_TEMPLATE("arithmetic, comparisons and selection, lane by lane", S, float, double) {
  using P = simd::Packet<S>;
  static_assert(simd::kPacketSize<S> == 1);
  check_arithmetic<P>();
  check_arithmetic<S>();
}

TEST_CASE_TEMPLATE("select takes the chosen side as it is", S, float, double) {
  using P = simd::Packet<S>;
  const P yes = simd::equal(simd::zero<P>(), simd::zero<P>()),
          no = simd::less(simd::zero<P>(), simd::zero<P>());
  for (const S value : {kInf<S>, -kInf<S>, S(-0.0), std::numeric_limits<S>::denorm_min()}) {
    const P p = simd::set1<P>(value), nan = simd::set1<P>(kNaN<S>);
    for (const S lane : lanes(simd::select(yes, p, nan)))
      CHECK((lane == value && std::signbit(lane) == std::signbit(value)));
    for (const S lane : lanes(simd::select(no, nan, p))) CHECK(lane == value);
    for (const S lane : lanes(simd::select(no, p, nan))) CHECK(std::isnan(lane));
  }
  // Comparisons with NaN are false.
  const P nan = simd::set1<P>(kNaN<S>), one = simd::set1<P>(S(1));
  for (const P& mask : {simd::less(nan, one), simd::less_equal(one, nan), simd::equal(nan, nan)}) {
    for (const S lane : lanes(simd::select(mask, one, simd::zero<P>()))) CHECK(lane == S(0));
  }
}

TEST_CASE_TEMPLATE("iota, loads from anywhere, reductions", S, float, double) {
  using P = simd::Packet<S>;
  constexpr std::size_t w = std::size_t(simd::kLanes<S>);
  const auto counted = lanes(simd::iota<P>(S(5)));
  for (std::size_t i = 0; i < w; ++i) CHECK(counted[i] == S(5) + static_cast<S>(i));
  std::vector<S> memory(2 * w + 3);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<S>(i * i % 7);
  for (std::size_t offset = 0; offset <= w; ++offset) {
    P p = simd::load<P>(&memory[offset]);
    simd::keep_in_register(p);
    S sum = 0, most = -kInf<S>;
    for (std::size_t i = 0; i < w; ++i) {
      CHECK(lanes(p)[i] == memory[offset + i]);
      sum += memory[offset + i];
      most = std::max(most, memory[offset + i]);
    }
    CHECK(simd::sum(p) == sum);
    CHECK(simd::max_lane(p) == most);
  }
}

TEST_CASE_TEMPLATE("horner evaluates c0 + c1 x + c2 x^2", S, float, double) {
  constexpr double c[] = {1, -2, 0.5};
  CHECK(simd::horner(c, S(3)) == S(1 - 6 + 4.5));
  CHECK(lanes(simd::horner(c, simd::set1<simd::Packet<S>>(S(3))))[0] == S(1 - 6 + 4.5));
}

TEST_CASE_TEMPLATE("exp2 is within 1.5 ulp up to 2^127 and 2^1023", S, float, double) {
  const S limit = static_cast<S>(std::numeric_limits<S>::max_exponent - 1);
  const auto in = arguments<S>(std::numeric_limits<S>::lowest(), limit);
  const double worst = worst_ulps<S>(in, exp2_of, [](ulps::Real x) { return std::exp2(x); });
  CHECK(worst <= 1.5);
  for (int k = std::numeric_limits<S>::min_exponent - 1; k < std::numeric_limits<S>::max_exponent;
       ++k) {
    CHECK(value_of<S>(exp2_of, static_cast<S>(k)) ==
          std::ldexp(S(1), k));  // powers of two are exact
  }
}

TEST_CASE_TEMPLATE("exp is within 1.5 ulp everywhere", S, float, double) {
  const auto in = arguments<S>(std::numeric_limits<S>::lowest(), std::numeric_limits<S>::max());
  CHECK(worst_ulps<S>(in, exp_of, [](ulps::Real x) { return std::exp(x); }) <= 1.5);
  const S low = std::log(std::numeric_limits<S>::min()),
          high = std::log(std::numeric_limits<S>::max());
  CHECK(worst_ulps<S>(arguments<S>(low, high), exp_of, [](ulps::Real x) { return std::exp(x); }) <=
        1.5);
}

TEST_CASE_TEMPLATE("exp_nonpositive is within 1.5 ulp up to 0", S, float, double) {
  const auto exact = [](ulps::Real x) { return std::exp(x); };
  const auto in = arguments<S>(std::numeric_limits<S>::lowest(), S(0));
  CHECK(worst_ulps<S>(in, exp_nonpositive_of, exact) <= 1.5);
  const auto near = arguments<S>(std::log(std::numeric_limits<S>::min()), S(0));
  CHECK(worst_ulps<S>(near, exp_nonpositive_of, exact) <= 1.5);
}

TEST_CASE_TEMPLATE("half and bfloat16 widen exactly, all of them", T, Eigen::half,
                   Eigen::bfloat16) {
  using P = simd::Packet<float>;
  std::vector<T> in(65536 + std::size_t(simd::kLanes<float>));
  for (std::size_t i = 0; i < 65536; ++i)
    in[i] = Eigen::numext::bit_cast<T>(static_cast<std::uint16_t>(i));
  for (std::size_t i = 0; i < 65536; ++i) {
    const float got = lanes(simd::load_as<P>(&in[i]))[0], want = static_cast<float>(in[i]);
    if (std::isnan(want) ? !std::isnan(got)
                         : std::bit_cast<std::uint32_t>(got) != std::bit_cast<std::uint32_t>(want))
      FAIL("bits ", i, ": ", got, ", not ", want);
  }
}

TEST_CASE_TEMPLATE("storing as half and bfloat16 rounds as Eigen's casts do", T, Eigen::half,
                   Eigen::bfloat16) {
  std::vector<float> in;
  for (const float x : ulps::walk<float>()) in.push_back(x);
  for (std::uint32_t upper = 0; upper < 65536; ++upper) {  // ties, their neighbours, every exponent
    for (const std::uint32_t lower :
         {0x0000u, 0x7fffu, 0x8000u, 0x8001u, 0x1000u, 0x0fffu, 0x1001u})
      in.push_back(std::bit_cast<float>(upper << 16 | lower));
  }
  std::vector<T> out(in.size());
  simd::convert_row(in.data(), out.data(), static_cast<Index>(in.size()));
  std::vector<float> back(in.size());
  simd::convert_row(out.data(), back.data(), static_cast<Index>(in.size()));
  for (std::size_t i = 0; i < in.size(); ++i) {
    const T want = static_cast<T>(in[i]);
    const auto bits = Eigen::numext::bit_cast<std::uint16_t>(out[i]);
    const bool same = std::isnan(in[i])
                          ? std::isnan(static_cast<float>(out[i])) && std::isnan(back[i])
                          : bits == Eigen::numext::bit_cast<std::uint16_t>(want) &&
                                back[i] == static_cast<float>(want);
    if (!same) FAIL(in[i], " became bits ", bits);
  }
}

TEST_CASE("exp just below and above the overflow limit of float") {
  const float last = 88.72283172607421875f;  // the largest float whose exponential is one
  CHECK(value_of<float>(exp_of, last) <= std::numeric_limits<float>::max());
  CHECK(value_of<float>(exp_of, std::nextafter(last, 100.0f)) == kInf<float>);
}

TEST_CASE_TEMPLATE("edge values of the exponentials", S, float, double) {
  for (const auto& f :
       {+[](S x) { return value_of<S>(exp2_of, x); }, +[](S x) { return value_of<S>(exp_of, x); },
        +[](S x) { return value_of<S>(exp_nonpositive_of, x); }}) {
    CHECK(f(S(0)) == S(1));
    CHECK(f(S(-0.0)) == S(1));
    CHECK(f(-kInf<S>) == S(0));
    CHECK(f(std::numeric_limits<S>::lowest()) == S(0));
    CHECK(f(S(-1e30)) == S(0));
    CHECK(f(S(-2000)) == S(0));
    CHECK(f(std::numeric_limits<S>::denorm_min()) == S(1));
    CHECK(std::isnan(f(kNaN<S>)));
    CHECK(std::isnan(f(-kNaN<S>)));
  }
  // NaN with an arbitrary payload, such as uninitialised memory holds, is still NaN.
  using Bits = std::conditional_t<sizeof(S) == 4, std::uint32_t, std::uint64_t>;
  const Bits infinity = std::bit_cast<Bits>(kInf<S>);
  for (Bits payload = 1; payload < (infinity & -infinity);
       payload = static_cast<Bits>(payload * 2 + 1)) {
    CHECK(
        std::isnan(value_of<S>(exp2_of, std::bit_cast<S>(static_cast<Bits>(infinity | payload)))));
    CHECK(std::isnan(value_of<S>(exp_of, std::bit_cast<S>(static_cast<Bits>(infinity | payload)))));
    CHECK(std::isnan(
        value_of<S>(exp_nonpositive_of, std::bit_cast<S>(static_cast<Bits>(infinity | payload)))));
  }
  CHECK(value_of<S>(exp_of, kInf<S>) == kInf<S>);
  CHECK(value_of<S>(exp_of, std::numeric_limits<S>::max()) == kInf<S>);
}

namespace {

/// Largest error of f over `in`, in ulps of the oracle, packets and scalars; any sign, subnormal arguments included.
template <class S, class F>
double worst_signed_ulps(std::vector<S> in, F f, ulps::Real (*oracle)(ulps::Real)) {
  constexpr std::size_t w = std::size_t(simd::kLanes<S>);
  in.resize((in.size() + w - 1) / w * w, S(1));
  ulps::Real worst = 0;
  for (std::size_t i = 0; i < in.size(); i += w) {
    const auto packet = lanes(f(simd::load<simd::Packet<S>>(&in[i])));
    for (std::size_t x = 0; x < w; ++x) {
      const ulps::Real want = oracle(ulps::real(in[i + x])), unit = ulps::ulp<S>(want);
      for (const S got : {packet[x], f(in[i + x])}) {
        const ulps::Real error = std::abs(ulps::real(got) - want) / unit;
        if (!(error <= worst)) worst = error;  // NaN stays
      }
    }
  }
  return static_cast<double>(worst);
}

/// Positive numbers: all exponents, subnormals, the neighbourhoods of 1 and of the ends of the reduced interval.
template <class S>
std::vector<S> logarithm_arguments() {
  std::vector<S> in;
  for (const S x : ulps::walk<S>()) {
    if (x > 0) in.push_back(x);
  }
  for (int k = -3; k <= 3; ++k) {
    for (const double centre : {1.0, 0.70710678118654752440}) {
      S up = std::ldexp(static_cast<S>(centre), k), down = up;
      for (int step = 0; step < 2000; ++step) {
        in.push_back(up), in.push_back(down);
        up = std::nextafter(up, S(100)), down = std::nextafter(down, S(0));
      }
    }
  }
  for (int k = 1; k < 4000; ++k) in.push_back(S(1) + static_cast<S>(k - 2000) / S(2500));
  for (int k = std::numeric_limits<S>::min_exponent - std::numeric_limits<S>::digits;
       k < std::numeric_limits<S>::max_exponent; ++k) {
    in.push_back(std::ldexp(S(1), k)), in.push_back(std::ldexp(S(1.37), k));
  }
  in.push_back(std::numeric_limits<S>::denorm_min());
  in.push_back(std::numeric_limits<S>::max());
  return in;
}

}  // namespace

TEST_CASE_TEMPLATE("log is within 1 ulp of every positive number, log1p within 2", S, float,
                   double) {
  std::vector<S> in = logarithm_arguments<S>();
  REQUIRE(in.size() > 50'000);
  CHECK(worst_signed_ulps<S>(in, log_of, [](ulps::Real x) { return std::log(x); }) <= 1.0);
  CHECK(worst_signed_ulps<S>(in, log1p_of, [](ulps::Real x) { return std::log1p(x); }) <= 2.0);
}

TEST_CASE_TEMPLATE("edge values of the logarithms", S, float, double) {
  using Limits = std::numeric_limits<S>;
  const auto log = [](S x) { return value_of<S>(log_of, x); };
  const auto log1p = [](S x) { return value_of<S>(log1p_of, x); };
  CHECK(log(S(1)) == S(0));
  CHECK(log(S(0)) == -kInf<S>);
  CHECK(log(S(-0.0)) == -kInf<S>);
  CHECK(log(kInf<S>) == kInf<S>);
  for (const S x : {-kInf<S>, S(-1), -Limits::min(), -Limits::denorm_min(), Limits::lowest(),
                    kNaN<S>, -kNaN<S>})
    CHECK(std::isnan(log(x)));
  CHECK(log(Limits::denorm_min()) ==
        doctest::Approx(std::log(2.0) * (Limits::min_exponent - Limits::digits)).epsilon(1e-6));
  CHECK(log1p(S(0)) == S(0));
  CHECK(log1p(kInf<S>) == kInf<S>);
  CHECK(std::isnan(log1p(kNaN<S>)));
  for (const S x : {Limits::denorm_min(), Limits::min(), Limits::epsilon() / 8})
    CHECK(log1p(x) == x);  // where 1 + x is 1
  CHECK(log1p(Limits::max()) == log(Limits::max()));
}
