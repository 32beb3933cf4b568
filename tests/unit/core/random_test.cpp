#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using namespace eigenblocks;

using Words = std::array<std::uint32_t, 4>;
constexpr std::uint32_t kOnes = 0xffffffff;

// The known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds).
static_assert(detail::philox4x32({0, 0, 0, 0}, {0, 0}) ==
              Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(detail::philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
              Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(detail::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                                 {0xa4093822, 0x299f31d0}) ==
              Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

/// Kolmogorov-Smirnov statistic sqrt(n) sup |F_n - F| of samples already mapped to [0, 1] by F.
double kolmogorov_smirnov(std::vector<double> u) {
  std::sort(u.begin(), u.end());
  const double n = static_cast<double>(u.size());
  double d = 0;
  for (std::size_t i = 0; i < u.size(); ++i) {
    const double at = static_cast<double>(i);
    d = std::max({d, u[i] - at / n, (at + 1) / n - u[i]});
  }
  return std::sqrt(n) * d;
}
constexpr double kKsLimit = 1.95;  // exceeded with probability 0.001 by a true sample

constexpr int kSamples = 200'000;

}  // namespace

TEST_CASE("words come block by block: key = seed, counter = (block, stream), low halves first") {
  const std::uint64_t seed = 0x0123456789abcdef, stream = 0xfedcba9876543210;
  Random random(seed, stream);
  for (std::uint32_t block = 0; block < 3; ++block) {
    const Words want =
        detail::philox4x32({block, 0, 0x76543210, 0xfedcba98}, {0x89abcdef, 0x01234567});
    for (const std::uint32_t word : want) CHECK(random.bits32() == word);
  }
  CHECK(random.position() == 12);
  Random halves(seed, stream), whole(seed, stream);
  const std::uint64_t low = halves.bits32();
  CHECK(whole.bits64() == (low | std::uint64_t{halves.bits32()} << 32));
}

TEST_CASE("recorded first values: the same on every platform") {
  Random words(42);
  for (const std::uint32_t want : {0x9ceaf053u, 0x77f5493bu, 0x12bf50adu, 0x5742b3d7u, 0xfcdb2127u})
    CHECK(words.bits32() == want);
  Random uniforms(42);
  for (const double want : {0x1.dfd524ee73abcp-2, 0x1.5d0acf5c4afd4p-2, 0x1.4ee9b3f7f36c8p-2})
    CHECK(uniforms.uniform() == want);
  Random normals(42);
  for (const double want : {-0x1.42dc65ce0ff8ap-4, -0x1.a3f4a5b3e5026p-2, -0x1.caca1d20ed485p-2,
                            -0x1.d61412d6e269fp-4, 0x1.a1a8bc2f2eb4fp-2, 0x1.805c509d131d7p-1})
    CHECK(normals.normal() == want);
  Random indices(42);
  for (const Index want : {859, 189, 703, 790, 77, 209}) CHECK(indices.below(1000) == want);
  // Far tails take the third branch of the quantile; their bits are recorded as well.
  CHECK(detail::normal_quantile(0x1p-54) == -0x1.095b059d67c4cp+3);
  CHECK(detail::normal_quantile(0x1p-30) == -0x1.80993fb2838ddp+2);
}

TEST_CASE("any position can be reached directly") {
  Random walked(7, 3);
  std::vector<std::uint32_t> words;
  for (int i = 0; i < 50; ++i) words.push_back(walked.bits32());
  Random jumping(7, 3);
  for (const std::size_t at : {49u, 0u, 17u, 18u, 4u, 3u, 48u, 1u}) {
    jumping.set_position(at);
    CHECK(jumping.bits32() == words[at]);
    CHECK(jumping.position() == at + 1);
  }
  // Block numbers beyond 2^32 reach the second counter word.
  jumping.set_position(std::uint64_t{5} << 34);
  CHECK(jumping.bits32() == detail::philox4x32({0, 5, 3, 0}, {7, 0})[0]);
}

TEST_CASE("a copy is a snapshot") {
  Random random(9);
  (void)random.normal();
  (void)random.bits32();
  const Random snapshot = random;
  CHECK(snapshot == random);
  const double next = random.normal();
  CHECK_FALSE(snapshot == random);
  Random restored = snapshot;
  CHECK(restored.normal() == next);
  CHECK(restored == random);
  CHECK_FALSE(Random(1) == Random(2));
  CHECK_FALSE(Random(1, 0) == Random(1, 1));
}

TEST_CASE("seeds and streams give unrelated numbers") {
  Random a(1, 0), b(1, 1), c(2, 0);
  int equal_ab = 0, equal_ac = 0, bits_ab = 0;
  for (int i = 0; i < 10'000; ++i) {
    const std::uint32_t x = a.bits32(), y = b.bits32(), z = c.bits32();
    equal_ab += x == y;
    equal_ac += x == z;
    bits_ab += std::popcount(x ^ y);
  }
  CHECK(equal_ab <= 1);
  CHECK(equal_ac <= 1);
  // 320000 bits, half of them different: standard deviation 283.
  CHECK(std::abs(bits_ab - 160'000) < 4 * 283);
}

TEST_CASE("uniform: range, moments, distribution, independence of neighbours") {
  Random random(3);
  std::vector<double> u;
  double sum = 0, square = 0, neighbours = 0;
  for (int i = 0; i < kSamples; ++i) {
    u.push_back(random.uniform());
    sum += u.back() - 0.5;
    square += (u.back() - 0.5) * (u.back() - 0.5);
    if (i > 0) neighbours += (u[u.size() - 2] - 0.5) * (u.back() - 0.5);
  }
  CHECK(*std::min_element(u.begin(), u.end()) >= 0.0);
  CHECK(*std::max_element(u.begin(), u.end()) < 1.0);
  // Standard deviations: sqrt(n/12), sqrt(n/180), sqrt(n)/12; four of them allowed.
  const double root = std::sqrt(static_cast<double>(kSamples));
  CHECK(std::abs(sum) < 4 * root / std::sqrt(12.0));
  CHECK(std::abs(square - kSamples / 12.0) < 4 * root / std::sqrt(180.0));
  CHECK(std::abs(neighbours) < 4 * root / 12);
  CHECK(kolmogorov_smirnov(u) < kKsLimit);
  // The largest and smallest values that the top 53 bits can give.
  CHECK(static_cast<double>(~std::uint64_t{0} >> 11) * 0x1p-53 == 1.0 - 0x1p-53);
}

TEST_CASE("normal: moments and distribution") {
  Random random(5);
  std::vector<double> u;
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0;
  for (int i = 0; i < kSamples; ++i) {
    const double z = random.normal();
    u.push_back(std::erfc(-z * std::sqrt(0.5)) / 2);
    m1 += z;
    m2 += z * z;
    m3 += z * z * z;
    m4 += z * z * z * z;
  }
  // Variances of z, z^2, z^3, z^4: 1, 2, 15, 96.
  const double root = std::sqrt(static_cast<double>(kSamples));
  CHECK(std::abs(m1) < 4 * root);
  CHECK(std::abs(m2 - kSamples) < 4 * root * std::sqrt(2.0));
  CHECK(std::abs(m3) < 4 * root * std::sqrt(15.0));
  CHECK(std::abs(m4 - 3.0 * kSamples) < 4 * root * std::sqrt(96.0));
  CHECK(kolmogorov_smirnov(u) < kKsLimit);
}

TEST_CASE("the normal quantile inverts the distribution function") {
  // d log Phi / dz = phi / Phi is about |z| in the tail, so an error of eps |z| in z is z^2 eps in p: 70 eps at 8.3.
  double worst = 0;
  for (int k = 1; k <= 540; ++k) {
    const double p = std::exp2(-k / 10.0);
    const double z = detail::normal_quantile(p);
    const double back = std::erfc(-z * std::sqrt(0.5)) / 2;
    worst = std::max(worst, std::abs(back - p) / p / std::max(1.0, z * z));
  }
  CHECK(worst < 8e-16);
  CHECK(detail::normal_quantile(0.5) == 0.0);
  for (const double p : {0.25, 0.125, 0.0625, 0x1p-10}) {  // 1 - p is exact
    CHECK(detail::normal_quantile(p) == -detail::normal_quantile(1 - p));
  }
  // Across the seams of the three branches the function does not jump.
  for (const double seam : {0.075, std::exp(-25.0)}) {
    const double below = detail::normal_quantile(seam * (1 - 1e-12)),
                 above = detail::normal_quantile(seam * (1 + 1e-12));
    CHECK(above > below);
    CHECK(above - below < 1e-11);
  }
}

TEST_CASE("portable_log is accurate to 1e-15") {
  double worst = 0;
  Random random(6);
  for (int i = 0; i < 100'000; ++i) {
    const double x = i % 2 ? random.uniform() : std::exp2(-70 * random.uniform());
    if (x == 0) continue;
    const long double want = std::log(static_cast<long double>(x));
    const long double got = static_cast<long double>(detail::portable_log(x));
    worst = std::max(worst, static_cast<double>(std::abs((got - want) / want)));
  }
  CHECK(worst < 1e-15);
}

TEST_CASE("below: range, evenness, no bias") {
  Random random(8);
  CHECK(random.below(1) == 0);
  std::array<int, 6> counts{};
  for (int i = 0; i < 60'000; ++i) {
    const Index k = random.below(6);
    REQUIRE((k >= 0 && k < 6));
    ++counts[static_cast<std::size_t>(k)];
  }
  double chi = 0;
  for (const int c : counts) chi += (c - 10'000.0) * (c - 10'000.0) / 10'000.0;
  CHECK(chi < 20.5);  // five degrees of freedom, probability 0.001

  // n = 3 * 2^61: without rejection the lowest 2^62 numbers would come 3/4 of the time instead of 2/3.
  const Index n = Index{3} << 61, low = Index{1} << 62;
  int hits = 0;
  for (int i = 0; i < 10'000; ++i) {
    const Index k = random.below(n);
    REQUIRE((k >= 0 && k < n));
    hits += k < low;
  }
  CHECK(std::abs(hits - 6666.7) < 4 * std::sqrt(10'000 * 2.0 / 9.0));

  CHECK_THROWS_WITH_AS(random.below(0), "eigenblocks: Random::below: n (0) must be at least 1",
                       eigenblocks::invalid_argument);
  CHECK_THROWS_AS(random.below(-3), eigenblocks::invalid_argument);
}

TEST_CASE("matrices are filled row by row, in any storage scalar and through views") {
  Random a(10), b(10);
  const Matrix<double> x = normal_matrix<double>(a, 3, 4, 0.5);
  for (Index i = 0; i < 3; ++i) {
    for (Index j = 0; j < 4; ++j) CHECK(x(i, j) == 0.5 * b.normal());
  }
  CHECK(a == b);

  Random c(10);
  Matrix<float> wide = Matrix<float>::Constant(3, 7, 9.0f);
  fill_normal(c, wide.middleCols(2, 4), 0.5);
  CHECK(wide.middleCols(2, 4) == x.cast<float>());
  CHECK((wide.leftCols(2).array() == 9.0f).all());
  CHECK((wide.rightCols(1).array() == 9.0f).all());

  Random d(10);
  Matrix<Eigen::half> h(3, 4);
  fill_normal(d, h, 0.5);
  CHECK(h(2, 3) == static_cast<Eigen::half>(x(2, 3)));

  Random e(11), f(11);
  Matrix<double> u(2, 3);
  fill_uniform(e, u, -1.0, 3.0);
  for (Index i = 0; i < u.size(); ++i) CHECK(u.data()[i] == std::fma(4.0, f.uniform(), -1.0));
  CHECK(normal_matrix<float>(e, 0, 5).size() == 0);
}
