// Long causal convolutions: every method against the definition, gradients, executors, memory, bad input.
#include <eigenblocks/core/convolution.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include "support/alloc_guard.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <string>

namespace {

using namespace eigenblocks;

constexpr ConvMethod kMethods[] = {ConvMethod::automatic, ConvMethod::direct, ConvMethod::fft,
                                   ConvMethod::overlap_save};

Matrix<double> random(Index rows, Index cols, std::uint64_t seed) {
  Random generator(seed);
  Matrix<double> x(rows, cols);
  fill_normal(generator, x);
  return x;
}

struct Case {
  Matrix<double> u, k, g, d;
  Case(Index rows, Index taps, Index channels)
      : u(random(rows, channels, 1)),
        k(random(taps, channels, 2)),
        g(random(rows, channels, 3)),
        d(random(1, channels, 4)) {}

  Matrix<double> definition() const {
    Matrix<double> y = u.array().rowwise() * d.row(0).array();
    for (Index t = 0; t < u.rows(); ++t) {
      for (Index j = 0; j <= std::min(t, k.rows() - 1); ++j) {
        y.row(t).array() += k.row(j).array() * u.row(t - j).array();
      }
    }
    return y;
  }
};

struct Gradients {
  Matrix<double> u, k, d;
};

Gradients backward(CausalConvSaved<double>& saved, const Case& c, ExecutorRef executor = {}) {
  Gradients out{c.u, c.k, c.d};
  causal_conv_backward(saved, c.u, c.k, c.g, out.u, out.k, out.d.row(0), c.d.row(0), executor);
  return out;
}

Matrix<double> forward(CausalConvSaved<double>& saved, const Case& c,
                       const CausalConvOptions& options, ExecutorRef executor = {}) {
  Matrix<double> y = Matrix<double>::Constant(c.u.rows(), c.u.cols(), 9);
  causal_conv_forward(saved, c.u, c.k, y, c.d.row(0), options, executor);
  return y;
}

double scale(const Case& c) {
  return 1 + c.k.cwiseAbs().maxCoeff() * c.u.cwiseAbs().maxCoeff() * double(c.u.rows());
}

TEST_CASE("causal_conv: every method equals the definition, and their gradients one another") {
  struct Shape {
    Index rows, taps, channels;
  };
  CausalConvSaved<double> saved, first;  // one object for all shapes
  for (const Shape shape : {Shape{1, 1, 1},
                            {1, 5, 3},
                            {5, 9, 3},
                            {12, 5, 19},
                            {8, 8, 8},
                            {63, 64, 2},
                            {65, 65, 9},
                            {130, 3, 17},
                            {300, 33, 2}}) {
    const Case c(shape.rows, shape.taps, shape.channels);
    const Matrix<double> want = c.definition();
    const double tolerance = 1e-15 * scale(c);
    forward(first, c, {.method = ConvMethod::direct});
    const Gradients exact = backward(first, c);
    for (const ConvMethod method : kMethods) {
      for (const Index block : {0, 256}) {
        if (block != 0 && method != ConvMethod::overlap_save) continue;
        CAPTURE(shape.rows);
        CAPTURE(shape.taps);
        CAPTURE(int(method));
        CAPTURE(block);
        const CausalConvOptions options{.method = method, .block = block};
        const Matrix<double> y = forward(saved, c, options);
        CHECK((y - want).cwiseAbs().maxCoeff() <= tolerance);
        Matrix<double> alone(y.rows(), y.cols());
        causal_conv(c.u, c.k, alone, c.d.row(0), options);
        CHECK(alone == y);
        const Gradients got = backward(saved, c);
        CHECK((got.u - exact.u).cwiseAbs().maxCoeff() <= tolerance);
        CHECK((got.k - exact.k).cwiseAbs().maxCoeff() <= tolerance);
        CHECK(got.d == exact.d);
        CHECK((saved.plan().method == method || method == ConvMethod::automatic));
      }
    }
  }
}

TEST_CASE("causal_conv: gradients by finite differences, with and without skip") {
  for (const ConvMethod method : {ConvMethod::direct, ConvMethod::fft, ConvMethod::overlap_save}) {
    for (const Index taps : {4, 15}) {
      Case c(11, taps, 3);
      CausalConvSaved<double> saved, other;
      forward(saved, c, {.method = method});
      const Gradients got = backward(saved, c);
      const auto loss = [&] {
        return (forward(other, c, {.method = method}).array() * c.g.array()).sum();
      };
      const auto u = gradcheck(loss, c.u, got.u), k = gradcheck(loss, c.k, got.k),
                 d = gradcheck(loss, c.d, got.d);
      CHECK_MESSAGE(u.passed, u.message());
      CHECK_MESSAGE(k.passed, k.message());
      CHECK_MESSAGE(d.passed, d.message());
      if (taps > 11) CHECK(got.k.bottomRows(taps - 11).isZero(0));

      Case zero = c;
      zero.d.setZero();
      Gradients bare{c.u, c.k, Matrix<double>(1, 0)};
      causal_conv_backward(saved, c.u, c.k, c.g, bare.u, bare.k, bare.d.row(0));
      CHECK((bare.u - backward(saved, zero).u).cwiseAbs().maxCoeff() < 1e-14);
      Matrix<double> y(11, 3);
      causal_conv(c.u, c.k, y, Vector<double>(), {.method = method});
      CHECK((y - zero.definition()).cwiseAbs().maxCoeff() < 1e-13);
    }
  }
}

TEST_CASE("causal_conv: impulse response, causality, views") {
  Case c(40, 40, 5);
  c.d.setZero();
  const Matrix<double> before = c.definition();
  for (const ConvMethod method : kMethods) {
    CausalConvSaved<double> saved;
    Case impulse = c;
    impulse.u.setZero();
    impulse.u.row(0).setOnes();
    CHECK((forward(saved, impulse, {.method = method}) - c.k).cwiseAbs().maxCoeff() < 1e-14);
    Case later = c;
    later.u.bottomRows(10).setConstant(1e3);
    const Matrix<double> y = forward(saved, later, {.method = method});
    CHECK((y - before).topRows(30).cwiseAbs().maxCoeff() < 1e-15 * scale(later));
    Matrix<double> wide = Matrix<double>::Constant(40, 9, 4);
    causal_conv(c.u, c.k, wide.middleCols(2, 5), Vector<double>(), {.method = method});
    CHECK((wide.middleCols(2, 5) - before).cwiseAbs().maxCoeff() < 1e-15 * scale(c));
    CHECK((wide.leftCols(2).array() == 4).all());
    CHECK((wide.rightCols(2).array() == 4).all());
  }
}

TEST_CASE("causal_conv: the automatic method by shape") {
  const auto method = [](Index rows, Index taps) { return causal_conv_plan(rows, taps).method; };
  CHECK(method(4096, 4) == ConvMethod::direct);
  CHECK(method(16, 16) == ConvMethod::direct);
  CHECK(method(4096, 4096) == ConvMethod::fft);
  CHECK(method(100000, 200) == ConvMethod::overlap_save);
  CHECK(causal_conv_plan(4096, 9999).size == 8192);
  CHECK(causal_conv_plan(10, 3, {.method = ConvMethod::fft}).size == 16);
  CHECK(causal_conv_plan(14, 3, {.method = ConvMethod::fft}).size == 16);
  CHECK(causal_conv_plan(15, 3, {.method = ConvMethod::fft}).size == 32);
}

TEST_CASE("causal_conv: float, workers, memory, copies, empty input") {
  const thread_pool two(2), seven(7);
  const Case c(90, 30, 70);
  for (const ConvMethod method : {ConvMethod::direct, ConvMethod::fft, ConvMethod::overlap_save}) {
    CausalConvSaved<double> saved, pooled;
    const Matrix<double> y = forward(saved, c, {.method = method});
    const Gradients want = backward(saved, c);
    for (const thread_pool* pool : {&two, &seven}) {
      CHECK(forward(pooled, c, {.method = method}, *pool) == y);
      CausalConvSaved<double> copy = pooled;
      for (CausalConvSaved<double>* s : {&pooled, &copy}) {
        const Gradients got = backward(*s, c, *pool);
        CHECK(got.u == want.u);
        CHECK(got.k == want.k);
        CHECK(got.d == want.d);
      }
    }
    if (AllocationCount::available) {
      Matrix<double> out = y, du = c.u, dk = c.k, d = c.d;
      const AllocationCount count;
      causal_conv_forward(saved, c.u, c.k, out, c.d.row(0), {.method = method});
      causal_conv_backward(saved, c.u, c.k, c.g, du, dk, d.row(0), c.d.row(0));
      CHECK(count.calls() == 0);
    }
    const Case none(0, 3, 2);
    CHECK(forward(saved, none, {.method = method}).rows() == 0);
    const Gradients got = backward(saved, none);
    CHECK(got.k.isZero(0));
    CHECK(got.d.isZero(0));
  }
  const Matrix<float> u = c.u.cast<float>(), k = c.k.cast<float>();
  Matrix<float> y(90, 70);
  causal_conv(u, k, y, Vector<float>(c.d.row(0).transpose().cast<float>()),
              {.method = ConvMethod::fft});
  CHECK((y.cast<double>() - c.definition()).cwiseAbs().maxCoeff() <
        1e-5 * c.definition().cwiseAbs().maxCoeff());
}

TEST_CASE("causal_conv: bad input is refused before anything is written") {
  const Case c(6, 3, 2);
  Matrix<double> y = Matrix<double>::Constant(6, 2, 7), du = y,
                 dk = Matrix<double>::Constant(3, 2, 7);
  Vector<double> dskip = Vector<double>::Constant(2, 7), three(3);
  CausalConvSaved<double> saved;
  const Matrix<double> narrow(3, 1), nothing(0, 2);
  Matrix<double> small(5, 2);
  CHECK_THROWS_WITH_AS(causal_conv(c.u, narrow, y),
                       "eigenblocks: kernel has 1 columns, expected 2 (channels of u)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(causal_conv(c.u, nothing, y),
                       "eigenblocks: kernel has 0 rows, expected at least 1", invalid_argument);
  CHECK_THROWS_WITH_AS(causal_conv(c.u, c.k, y, three),
                       "eigenblocks: skip has 3 entries, expected 2 (channels), or none",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(causal_conv(c.u, c.k, small),
                       "eigenblocks: y is 5 x 2, expected 6 x 2 (shape of u)", invalid_argument);
  CHECK_THROWS_WITH_AS(
      causal_conv(c.u, c.k, y, Vector<double>(), {.method = ConvMethod::fft, .block = 8}),
      "eigenblocks: block (8) must be 0 unless method is overlap_save", invalid_argument);
  for (const Index block : {4, 12, -8}) {
    CHECK_THROWS_WITH_AS(causal_conv(c.u, c.k, y, Vector<double>(),
                                     {.method = ConvMethod::overlap_save, .block = block}),
                         ("eigenblocks: block (" + std::to_string(block) +
                          ") must be a power of two, at least 6 (2 min(L, T))")
                             .c_str(),
                         invalid_argument);
  }
  CHECK_THROWS_WITH_AS(causal_conv_backward(saved, c.u, c.k, c.g, du, dk, dskip),
                       "eigenblocks: saved is of 0 x 0 with 0 coefficients, expected 6 x 2 with 3 "
                       "(forward pass of u and kernel)",
                       invalid_argument);
  causal_conv_forward(saved, c.u, c.k, small = c.u);
  CHECK_THROWS_WITH_AS(causal_conv_backward(saved, c.u, c.k, c.g, du, du, dskip),
                       "eigenblocks: dk is 6 x 2, expected 3 x 2 (shape of kernel)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(causal_conv_backward(saved, c.u, c.k, c.g, dk, dk, dskip),
                       "eigenblocks: du is 3 x 2, expected 6 x 2 (shape of u)", invalid_argument);
  CHECK_THROWS_WITH_AS(causal_conv_backward(saved, c.u, c.k, c.k, du, dk, dskip),
                       "eigenblocks: dy is 3 x 2, expected 6 x 2 (shape of u)", invalid_argument);
  CHECK_THROWS_WITH_AS(causal_conv_backward(saved, c.u, c.k, c.g, du, dk, three),
                       "eigenblocks: dskip has 3 entries, expected 2 (channels), or none",
                       invalid_argument);
  CHECK((y.array() == 7).all());
  CHECK((du.array() == 7).all());
  CHECK((dk.array() == 7).all());
  CHECK((dskip.array() == 7).all());
}

}  // namespace
