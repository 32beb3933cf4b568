#include "support/layer_checks.hpp"

#include <eigenblocks/ssm/nplr.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <complex>

namespace {

namespace eb = eigenblocks;
using eb::HippoMeasure;
using eb::Index;
using Complex = std::complex<double>;
using ComplexMatrix = eb::Matrix<Complex>;

/// sum over the kept modes and their conjugates, plainly: 2 Re of a product over n.
template <class F>
double both_halves(Index modes, F&& term) {
  double sum = 0;
  for (Index n = 0; n < modes; ++n) sum += 2 * term(n).real();
  return sum;
}

/// |A - V (lambda - sum p p^*) V^*| and the like, over the full modes.
void check_form(HippoMeasure measure, Index states, Index rank) {
  CAPTURE(eb::hippo_name(measure));
  const eb::Hippo h = eb::hippo_matrix(measure, states);
  const eb::Nplr f = eb::nplr(measure, states, rank);
  const Index half = states / 2, r = f.p.rows();
  REQUIRE(f.lambda.size() == half);
  REQUIRE(f.v.rows() == states);
  const double size = h.a.cwiseAbs().maxCoeff();
  // V p^* x over all modes is real: project both sides once per rank.
  eb::Matrix<double> vp(r, states);
  for (Index k = 0; k < r; ++k) {
    for (Index i = 0; i < states; ++i)
      vp(k, i) = both_halves(half, [&](Index n) { return f.v(i, n) * f.p(k, n); });
  }
  double worst = 0, identity = 0, input = 0;
  for (Index i = 0; i < states; ++i) {
    input = std::max(
        input, std::abs(h.b[i] - both_halves(half, [&](Index n) { return f.v(i, n) * f.b[n]; })));
    for (Index j = 0; j < states; ++j) {
      double a = both_halves(
          half, [&](Index n) { return f.v(i, n) * f.lambda[n] * std::conj(f.v(j, n)); });
      for (Index k = 0; k < r; ++k) a -= vp(k, i) * vp(k, j);
      worst = std::max(worst, std::abs(a - h.a(i, j)));
      const double one =
          both_halves(half, [&](Index n) { return f.v(i, n) * std::conj(f.v(j, n)); });
      identity = std::max(identity, std::abs(one - (i == j ? 1.0 : 0.0)));
    }
  }
  CHECK(worst < 1e-12 * size);
  CHECK(identity < 1e-13 * static_cast<double>(states));
  CHECK(input < 1e-12 * h.b.cwiseAbs().maxCoeff());
  for (Index n = 0; n < half; ++n) {
    CHECK(f.lambda[n].real() == h.shift);
    CHECK(f.lambda[n].imag() <= 0);
    if (n > 0) CHECK(f.lambda[n].imag() > f.lambda[n - 1].imag());
    CHECK(f.b[n].imag() == 0.0);
    CHECK(f.b[n].real() > 0);
    CHECK(f.v.col(n).norm() == doctest::Approx(1.0));
  }
}

}  // namespace

TEST_CASE("V (lambda - p p^*) V^* is A, for every measure and small and padded ranks") {
  for (const Index states : {Index{2}, Index{8}, Index{30}}) {
    for (const HippoMeasure m :
         {HippoMeasure::legs, HippoMeasure::legsd, HippoMeasure::legt, HippoMeasure::lagt,
          HippoMeasure::tlagt, HippoMeasure::fourier, HippoMeasure::fourier2,
          HippoMeasure::fourier_decay, HippoMeasure::foud})
      check_form(m, states, 0);
  }
  check_form(HippoMeasure::legs, 8, 3);
  CHECK(eb::nplr(HippoMeasure::legs, 8, 3).p.bottomRows(2).cwiseAbs().maxCoeff() == 0.0);
}

TEST_CASE("facts about legs") {
  const eb::Nplr f = eb::nplr(HippoMeasure::legs, 64);
  CHECK(f.lambda[0].imag() == doctest::Approx(-1303).epsilon(1e-3));
  CHECK(f.lambda[31].imag() == doctest::Approx(-0.264).epsilon(2e-3));
  CHECK((f.lambda.real().array() == -0.5).all());
  const eb::Vector<double> p = f.p.row(0).real().transpose();
  CHECK(p.minCoeff() == doctest::Approx(0.42).epsilon(2e-2));
  CHECK(p.maxCoeff() == doctest::Approx(28.8).epsilon(2e-3));
  CHECK(largest_difference(std::sqrt(2.0) * p, f.b.real()) < 1e-12);
  const ComplexMatrix gram = f.v.adjoint().lazyProduct(f.v);
  CHECK((gram - ComplexMatrix::Identity(32, 32)).cwiseAbs().maxCoeff() < 1e-14);
  const ComplexMatrix cross = f.v.transpose().lazyProduct(f.v);  // to the conjugates
  CHECK(cross.cwiseAbs().maxCoeff() < 1e-13);
}

TEST_CASE("the zero frequency of the Fourier family has the mode (e_0 + i e_1)/sqrt 2") {
  for (const HippoMeasure m : {HippoMeasure::fourier, HippoMeasure::foud}) {
    const eb::Nplr f = eb::nplr(m, 8);
    const auto v = f.v.col(3);
    CHECK(f.lambda[3].imag() == 0.0);
    CHECK(std::abs(v[0] - Complex(std::sqrt(0.5), 0)) < 1e-14);
    CHECK(std::abs(v[1] - Complex(0, std::sqrt(0.5))) < 1e-14);
    CHECK(v.tail(6).cwiseAbs().maxCoeff() < 1e-14);
  }
}

TEST_CASE("windows carry over") {
  const eb::Nplr s4 = eb::nplr(HippoMeasure::legt, 8);
  const eb::Nplr paper = eb::nplr(HippoMeasure::legt, 8, 0, {.window = eb::HippoWindow::paper});
  CHECK((2.0 * s4.lambda - paper.lambda).cwiseAbs().maxCoeff() < 1e-12);
  CHECK((std::sqrt(2.0) * s4.p - paper.p).cwiseAbs().maxCoeff() < 1e-12);
  CHECK((2.0 * s4.b - paper.b).cwiseAbs().maxCoeff() < 1e-12);
}

TEST_CASE("bad input") {
  using eb::invalid_argument;
  check_throws<invalid_argument>([] { (void)eb::nplr(HippoMeasure::legs, 7); },
                                 "states (7) must be even and in [2, 32768]");
  check_throws<invalid_argument>([] { (void)eb::nplr(HippoMeasure::legs, 0); },
                                 "states (0) must be even and in [2, 32768]");
  check_throws<invalid_argument>([] { (void)eb::nplr(HippoMeasure::lmu, 8); },
                                 "measure lmu has no normal plus low-rank form in its own basis");
  check_throws<invalid_argument>([] { (void)eb::nplr(HippoMeasure::legt, 8, 1); },
                                 "rank (1) must be 0 or in [2, 8] for measure legt");
  check_throws<invalid_argument>([] { (void)eb::nplr(HippoMeasure::legs, 8, -1); },
                                 "rank (-1) must be 0 or in [1, 8] for measure legs");
}
