// Fourier transforms: against the sum that defines them and Eigen's FFT, adjoints, executors, memory, bad input.
#include <eigenblocks/core/fft.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include "support/alloc_guard.hpp"

#include <doctest/doctest.h>

#if __has_include(<unsupported/Eigen/FFT>)
#define EIGENBLOCKS_TEST_EIGEN_FFT 1
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wold-style-cast"
#endif
#include <unsupported/Eigen/FFT>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <numbers>
#include <vector>

namespace {

using namespace eigenblocks;
using Complex = std::complex<double>;
using Spectrum = Matrix<Complex>;

// Powers of two of both parities of the exponent and beyond the leaf of 128 rows; even, odd, prime.
constexpr Index kSizes[] = {1,  2,  3,  4,   5,   6,   8,   10,  13,  16,
                            27, 32, 64, 100, 128, 131, 256, 512, 1024};

Matrix<double> random(Index rows, Index cols, std::uint64_t seed) {
  Random generator(seed);
  Matrix<double> x(rows, cols);
  fill_normal(generator, x);
  return x;
}
Spectrum random_complex(Index rows, Index cols, std::uint64_t seed) {
  Spectrum z(rows, cols);
  z.real() = random(rows, cols, seed);
  z.imag() = random(rows, cols, seed + 1000);
  return z;
}

/// sum_j z_j exp(-+ 2 pi i j k / n) for k < rows, in long double.
Spectrum definition(const Spectrum& z, Index rows, bool inverse) {
  using Long = std::complex<long double>;
  const Index n = z.rows();
  std::vector<Long> roots;
  for (Index j = 0; j < n; ++j) {
    roots.push_back(std::polar(1.0L, (inverse ? 2 : -2) * std::numbers::pi_v<long double> *
                                         static_cast<long double>(j) /
                                         static_cast<long double>(n)));
  }
  Spectrum out(rows, z.cols());
  for (Index k = 0; k < rows; ++k) {
    for (Index c = 0; c < z.cols(); ++c) {
      Long sum = 0;
      for (Index j = 0; j < n; ++j)
        sum += Long(z(j, c)) * roots[static_cast<std::size_t>(j * k % n)];
      out(k, c) = Complex(sum);
    }
  }
  return out;
}

/// eps log2 n, relative to the length of the vector.
double tolerance(Index n, double eps = std::numeric_limits<double>::epsilon()) {
  return 2 * eps * (2 + std::log2(static_cast<double>(n)));
}

double dot(const Spectrum& a, const Spectrum& b) {
  return (a.real().array() * b.real().array() + a.imag().array() * b.imag().array()).sum();
}

TEST_CASE("rfft and irfft equal the definition; lanes of every fill") {
  for (const Index n : kSizes) {
    for (const Index channels : {1, 8, 19}) {
      if (n > 200 && channels == 19) continue;
      CAPTURE(n);
      CAPTURE(channels);
      const Matrix<double> x = random(n, channels, 1);
      const RealFft<double> plan(n);
      CHECK(plan.size() == n);
      CHECK(plan.spectrum_rows() == n / 2 + 1);
      Spectrum got = Spectrum::Constant(n / 2 + 1, channels, Complex(9, 9));
      rfft(plan, x, got);
      const Spectrum want = definition(x.cast<Complex>(), n / 2 + 1, false);
      CHECK((got - want).norm() <= tolerance(n) * want.norm());
      CHECK(got.row(0).imag().isZero(0));
      if (n % 2 == 0) CHECK(got.row(n / 2).imag().isZero(0));
      Matrix<double> back = Matrix<double>::Constant(n, channels, 9);
      // Imaginary parts that a real signal has not are ignored.
      got.row(0).imag().setConstant(5);
      if (n % 2 == 0) got.row(n / 2).imag().setConstant(-5);
      irfft(plan, got, back);
      CHECK((back - x).norm() <= 2 * tolerance(n) * x.norm());
      Matrix<double> part(n / 3, channels);
      irfft(plan, got, part);
      CHECK(part == back.topRows(n / 3));
    }
  }
}

TEST_CASE("fft and ifft equal the definition, in place too") {
  for (const Index n : kSizes) {
    if (n > 512) continue;
    CAPTURE(n);
    const Spectrum z = random_complex(n, 11, 3);
    const ComplexFft<double> plan(n);
    Spectrum got(n, 11), back = z;
    fft(plan, z, got);
    CHECK((got - definition(z, n, false)).norm() <= tolerance(n) * got.norm());
    ifft(plan, z, got);
    CHECK((got * double(n) - definition(z, n, true)).norm() <=
          tolerance(n) * got.norm() * double(n));
    fft(plan, back, back);
    ifft(plan, back, back);
    CHECK((back - z).norm() <= 2 * tolerance(n) * z.norm());
  }
}

TEST_CASE("rfft cuts and pads; strided memory; values returned") {
  const Matrix<double> x = random(20, 5, 4);
  for (const Index n : {7, 16, 20, 33, 64}) {
    Matrix<double> exact = Matrix<double>::Zero(n, 5);
    exact.topRows(std::min<Index>(n, 20)) = x.topRows(std::min<Index>(n, 20));
    const Spectrum want = definition(exact.cast<Complex>(), n / 2 + 1, false);
    Spectrum wide = Spectrum::Constant(n / 2 + 1, 9, Complex(3, 4));
    rfft(RealFft<double>(n), x, wide.middleCols(2, 5));
    CHECK((wide.middleCols(2, 5) - want).norm() <= tolerance(n) * want.norm());
    CHECK((wide.leftCols(2).array() == Complex(3, 4)).all());
    CHECK((wide.rightCols(2).array() == Complex(3, 4)).all());
    CHECK(rfft(x, n) == Spectrum(wide.middleCols(2, 5)));
    Matrix<double> y = Matrix<double>::Constant(n, 8, 6);
    irfft(RealFft<double>(n), want, y.middleCols(1, 5));
    CHECK((y.middleCols(1, 5) - exact).norm() <= 2 * tolerance(n) * exact.norm());
    CHECK((y.rightCols(2).array() == 6).all());
    CHECK((irfft(want, n) - exact).norm() <= 2 * tolerance(n) * exact.norm());
  }
  CHECK(rfft(x).rows() == 11);
  const Matrix<double> empty(0, 5), none(8, 0);
  CHECK(rfft(empty, 8).isZero(0));
  CHECK(rfft(none).cols() == 0);
}

TEST_CASE("gradients are the adjoints: <G, rfft(x)> = <rfft_backward(G), x>") {
  for (const Index n : {1, 2, 5, 8, 12, 64, 131}) {
    for (const Index rows : {n, n + 3, std::max<Index>(1, n / 2)}) {
      CAPTURE(n);
      CAPTURE(rows);
      const RealFft<double> plan(n);
      const Matrix<double> x = random(rows, 3, 5);
      const Spectrum g = random_complex(n / 2 + 1, 3, 6);
      Spectrum forward(n / 2 + 1, 3), dspectrum = forward;
      Matrix<double> dx = Matrix<double>::Constant(rows, 3, 9);
      rfft(plan, x, forward);
      rfft_backward(plan, g, dx);
      const double scale = static_cast<double>(n) + g.norm() * forward.norm();
      CHECK(std::abs(dot(g, forward) - (dx.array() * x.array()).sum()) <= 1e-15 * scale);
      if (rows > n) {
        CHECK(dx.bottomRows(rows - n).isZero(0));
        continue;
      }
      Matrix<double> y(rows, 3);
      irfft(plan, g, y);
      irfft_backward(plan, x, dspectrum);
      CHECK(std::abs(dot(dspectrum, g) - (x.array() * y.array()).sum()) <= 1e-15 * scale);
    }
  }
}

TEST_CASE("float is good to eps log n, large primes included") {
  for (const Index n : {64, 1024, 4099, 5000, 16384}) {
    CAPTURE(n);
    const Matrix<double> x = random(n, 2, 7);
    const Spectrum want = rfft(x);
    const Matrix<float> single = x.cast<float>();
    const Matrix<std::complex<float>> got = rfft(single);
    const Spectrum exact = rfft(Matrix<double>(single.cast<double>()));
    CHECK((got.cast<Complex>() - exact).norm() <= tolerance(n, 6e-8) * exact.norm());
    CHECK((want - exact).norm() < 1e-6 * want.norm());
    CHECK(double((irfft(got, n) - single).norm()) <=
          2 * tolerance(n, 6e-8) * double(single.norm()));
  }
}

#if defined(EIGENBLOCKS_TEST_EIGEN_FFT)
TEST_CASE("rfft equals Eigen's FFT") {
  Eigen::FFT<double> other;
  for (const Index n : {60, 256, 2048, 8192}) {
    const Matrix<double> x = random(n, 1, 8);
    std::vector<double> in(x.data(), x.data() + n);
    std::vector<Complex> out;
    other.fwd(out, in);
    const Spectrum got = rfft(x);
    double error = 0;
    for (Index k = 0; k <= n / 2; ++k) {
      error = std::max(error, std::abs(got(k, 0) - out[static_cast<std::size_t>(k)]));
    }
    CHECK(error <= 4 * tolerance(n) * std::sqrt(static_cast<double>(n)));
  }
}
#endif

TEST_CASE("transforms do not depend on the workers, and allocate nothing with a workspace") {
  const thread_pool two(2), seven(7);
  const Matrix<double> x = random(96, 70, 9);
  for (const Index n : {96, 128}) {
    const RealFft<double> plan(n), copy = plan;
    Spectrum want(n / 2 + 1, 70), got = want;
    Matrix<double> back(n, 70), again = back;
    Workspace workspace;
    rfft(plan, x, want, {}, &workspace);
    irfft(plan, want, back, {}, &workspace);
    for (const thread_pool* pool : {&two, &seven}) {
      rfft(copy, x, got, *pool);
      irfft(copy, got, again, *pool);
      CHECK(got == want);
      CHECK(again == back);
    }
    if (!AllocationCount::available) continue;
    const AllocationCount count;
    rfft(plan, x, want, {}, &workspace);
    irfft(plan, want, back, {}, &workspace);
    CHECK(count.calls() == 0);
  }
}

TEST_CASE("a NaN stays in its channel") {
  Matrix<double> x = random(24, 5, 10);
  x(3, 2) = std::numeric_limits<double>::quiet_NaN();
  Spectrum got = rfft(x);
  CHECK(std::isnan(got(1, 2).real()));
  got.col(2).setZero();
  CHECK(got.real().allFinite());
  CHECK(got.imag().allFinite());
}

TEST_CASE("bad input is refused before anything is written") {
  CHECK_THROWS_WITH_AS(RealFft<double>(0), "eigenblocks: n (0) must be at least 1",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(ComplexFft<double>(-3), "eigenblocks: n (-3) must be at least 1",
                       invalid_argument);
  const RealFft<double> plan(6);
  const Matrix<double> x = random(6, 2, 11);
  Spectrum out = Spectrum::Constant(3, 2, Complex(1, 2)), good(4, 2);
  CHECK_THROWS_WITH_AS(rfft(plan, x, out),
                       "eigenblocks: spectrum is 3 x 2, expected 4 x 2 (n/2 + 1, channels)",
                       invalid_argument);
  Matrix<double> seven = Matrix<double>::Constant(7, 2, 4), three = Matrix<double>::Zero(6, 3);
  CHECK_THROWS_WITH_AS(irfft(plan, good, seven),
                       "eigenblocks: x has 7 rows, expected at most 6 (n)", invalid_argument);
  CHECK_THROWS_WITH_AS(irfft_backward(plan, seven, good),
                       "eigenblocks: dx has 7 rows, expected at most 6 (n)", invalid_argument);
  CHECK_THROWS_WITH_AS(rfft_backward(plan, good, three),
                       "eigenblocks: dspectrum is 4 x 2, expected 4 x 3 (n/2 + 1, channels)",
                       invalid_argument);
  const ComplexFft<double> all(3);
  CHECK_THROWS_WITH_AS(fft(all, good, good), "eigenblocks: in has 4 rows, expected 3 (n)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(ifft(all, out, good),
                       "eigenblocks: out is 4 x 2, expected 3 x 2 (shape of in)", invalid_argument);
  CHECK((out.array() == Complex(1, 2)).all());
  CHECK((seven.array() == 4).all());
}

}  // namespace
