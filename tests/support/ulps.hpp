// Accuracy of elementary functions: arguments to walk and the unit of the last place to count in.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace ulps {

/// Wide enough to judge double: 64 mantissa bits on x86, 113 elsewhere.
using Real = long double;
template <class S>
constexpr Real real(S x) {
  return static_cast<Real>(x);
}

template <class S>
inline constexpr Real kSmallest = real(std::numeric_limits<S>::min());

/// The unit of the last place of S at `value`; below the normal numbers that of the smallest one.
template <class S>
Real ulp(Real value) {
  const int digits = std::numeric_limits<S>::digits;
  return std::ldexp(Real(1), std::ilogb(std::max(std::abs(value), kSmallest<S>)) - digits + 1);
}

/// Finite arguments: 40000 bit patterns at an even stride (so all exponents), and grids up to 100 and 720.
template <class S>
std::vector<S> walk() {
  std::vector<S> all;
  using Bits = std::conditional_t<sizeof(S) == 4, std::uint32_t, std::uint64_t>;
  const Bits stride = std::numeric_limits<Bits>::max() / 40'009 | 1;
  for (Bits k = 0; k < 40'009; ++k) {
    if (const S x = std::bit_cast<S>(static_cast<Bits>(k * stride)); std::isfinite(x))
      all.push_back(x);
  }
  for (int k = -20'000; k <= 20'000; ++k) all.push_back(static_cast<S>(k * 0.005001));
  for (int k = -2000; k <= 2000; ++k) all.push_back(static_cast<S>(k * 0.36));
  return all;
}

}  // namespace ulps
