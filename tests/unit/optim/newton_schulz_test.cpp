#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/optim/muon.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

using namespace eigenblocks;

namespace {

// Products through the library's wrappers: every further product expression costs seconds of
// compile time here.
Matrix<double> nn(const Matrix<double>& a, const Matrix<double>& b) {
  Matrix<double> c(a.rows(), b.cols());
  detail::product_nn<double>(a, b, c);
  return c;
}
Matrix<double> nt(const Matrix<double>& a, const Matrix<double>& b) {
  Matrix<double> c(a.rows(), b.rows());
  detail::product_nt<double>(a, b, c);
  return c;
}

/// rows x cols with orthonormal columns (rows >= cols): Gram-Schmidt, twice.
Matrix<double> orthonormal(Random& random, Index rows, Index cols) {
  Matrix<double> q = normal_matrix<double>(random, rows, cols);
  for (Index j = 0; j < cols; ++j) {
    for (int pass = 0; pass < 2; ++pass) {
      for (Index i = 0; i < j; ++i) q.col(j) -= q.col(i).dot(q.col(j)) * q.col(i);
    }
    q.col(j).normalize();
  }
  return q;
}

/// A matrix made from its singular value decomposition, u diag(s) v^T.
struct Decomposed {
  Decomposed(Random& random, Index rows, Index cols)
      : u(orthonormal(random, rows, std::min(rows, cols))),
        v(orthonormal(random, cols, std::min(rows, cols))),
        s(std::min(rows, cols)) {
    for (double& value : s) value = 0.05 + random.uniform();
  }
  Matrix<double> with(const Vector<double>& values) const { return nt(u * values.asDiagonal(), v); }
  Matrix<double> u, v;
  Vector<double> s;
};

double scalar_map(double s, const NewtonSchulzOptions& options) {
  for (Index step = 0; step < options.steps; ++step) {
    const Index planned = static_cast<Index>(options.schedule.size());
    const NewtonSchulzCoefficients use =
        planned ? options.schedule[static_cast<std::size_t>(std::min(step, planned - 1))]
                : options.coefficients;
    s = use.a * s + use.b * s * s * s + use.c * s * s * s * s * s;
  }
  return s;
}

constexpr NewtonSchulzCoefficients kTaylor{15.0 / 8, -10.0 / 8, 3.0 / 8};

}  // namespace

TEST_CASE("newton_schulz maps singular values by the polynomial and keeps singular vectors") {
  const NewtonSchulzCoefficients plan[] = {{}, kTaylor, {2, -1.5, 0.5}};
  const NewtonSchulzOptions variants[] = {
      {}, {.steps = 0}, {.steps = 8, .coefficients = kTaylor}, {.steps = 5, .schedule = plan}};
  const Index shapes[][2] = {{1, 1}, {1, 6}, {6, 1}, {7, 7}, {5, 11}, {11, 5}, {67, 71}, {71, 67}};
  Random random(7);
  for (const NewtonSchulzOptions& options : variants) {
    for (const auto& shape : shapes) {
      const Index rows = shape[0], cols = shape[1];
      CAPTURE(rows);
      CAPTURE(cols);
      CAPTURE(options.steps);
      const Decomposed svd(random, rows, cols);
      const Matrix<double> g = svd.with(svd.s);
      Vector<double> mapped = svd.s / svd.s.norm();
      for (double& s : mapped) s = scalar_map(s, options);
      // Steps amplify rounding by at most the slope of p, 3.4445 each: 5 steps, 485 eps; 12 leaves
      // room for products.
      CHECK((newton_schulz(g, options) - svd.with(mapped)).norm() <= 1e-12 * g.norm());
    }
  }
}

TEST_CASE("newton_schulz: blocks of both sizes against one another and the plain formula") {
  Random random(8);
  for (const auto& [rows, cols] :
       {std::pair<Index, Index>{130, 200}, {200, 130}, {515, 520}, {300, 300}}) {
    const Matrix<double> g = normal_matrix<double>(random, rows, cols);
    const Matrix<double> x = g / g.norm();
    const NewtonSchulzCoefficients k;
    const Matrix<double> a = nt(x, x), ax = nn(a, x);
    const Matrix<double> want = k.a * x + k.b * ax + k.c * nn(a, ax);
    CHECK((newton_schulz(g, {.steps = 1}) - want).cwiseAbs().maxCoeff() <= 1e-14);
  }
}

TEST_CASE_TEMPLATE("newton_schulz: five steps bring singular values into 0.68 .. 1.14", S, float,
                   double) {
  Random random(9);
  const Decomposed svd(random, 24, 40);
  Vector<double> values(24);
  for (Index i = 0; i < 24; ++i) values[i] = 0.011 + 0.2 * static_cast<double>(i) / 24;
  REQUIRE(values.minCoeff() / values.norm() >= 0.01);
  const Matrix<double> got =
      newton_schulz(Matrix<S>(svd.with(values).cast<S>())).template cast<double>();
  const Vector<double> s = nn(nn(svd.u.transpose(), got), svd.v).diagonal();
  CHECK(s.maxCoeff() <= 1.134 + 1e-3);
  CHECK(s.minCoeff() >= 0.682 - 1e-3);
}

TEST_CASE("newton_schulz: a convergent triple reaches the polar factor; scale and transposition") {
  Random random(10);
  const Decomposed svd(random, 9, 14);
  const Matrix<double> g = svd.with(svd.s);
  const NewtonSchulzOptions options{.steps = 40, .coefficients = kTaylor};
  const Matrix<double> sign = newton_schulz(g, options);
  CHECK((sign - nt(svd.u, svd.v)).norm() <= 1e-13);
  CHECK((newton_schulz(Matrix<double>(1e-3 * g), options) - sign).norm() <= 1e-13);
  CHECK((newton_schulz(Matrix<double>(g.transpose()), options) - sign.transpose()).norm() <= 1e-13);
}

TEST_CASE_TEMPLATE("newton_schulz: zero, tiny and non-finite matrices, empty shapes", S, float,
                   double) {
  const Matrix<S> zero = Matrix<S>::Zero(3, 5);
  CHECK(newton_schulz(zero) == zero);
  // Below eps the matrix is divided by eps, not by its norm.
  const Matrix<S> tiny = Matrix<S>::Constant(1, 1, S(1e-9));
  CHECK(double(newton_schulz(tiny, {.steps = 0})(0, 0)) == doctest::Approx(1e-2));
  for (const S bad : {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity()}) {
    Matrix<S> g = Matrix<S>::Ones(3, 5);
    g(1, 1) = bad;
    CHECK(newton_schulz(g).hasNaN());
  }
  CHECK(newton_schulz(Matrix<S>(0, 4)).size() == 0);
  CHECK(newton_schulz(Matrix<S>(4, 0)).size() == 0);
}

TEST_CASE_TEMPLATE("newton_schulz: equal bits for every executor, in place and in strided memory",
                   S, float, double) {
  Random random(11);
  const Matrix<S> g = normal_matrix<S>(random, 131, 277);
  const NewtonSchulzOptions options{.steps = 2};
  const Matrix<S> want = newton_schulz(g, options);
  Workspace workspace;
  for (const int workers : {1, 2, 3, 7}) {
    const thread_pool pool(workers);
    Matrix<S> x = g;
    newton_schulz(x, x, options, workspace, pool);
    CHECK(x == want);
  }
  const std::size_t bytes = workspace.bytes();
  Matrix<S> wide = Matrix<S>::Zero(131, 300);
  wide.middleCols(3, 277) = g;
  newton_schulz(wide.middleCols(3, 277), wide.middleCols(3, 277), options, workspace);
  CHECK(Matrix<S>(wide.middleCols(3, 277)) == want);
  CHECK(wide.leftCols(3).isZero(0));
  CHECK(workspace.bytes() == bytes);
}

TEST_CASE("newton_schulz: bad input") {
  const Matrix<double> g = Matrix<double>::Ones(2, 3);
  CHECK_THROWS_WITH_AS(newton_schulz(g, {.steps = -1}),
                       "eigenblocks: newton_schulz: steps (-1) must be in [0, 100)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(newton_schulz(g, {.steps = 100}),
                       "eigenblocks: newton_schulz: steps (100) must be in [0, 100)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(newton_schulz(g, {.eps = 0}),
                       "eigenblocks: newton_schulz: eps (0) must be positive", invalid_argument);
  Matrix<double> wrong(3, 2);
  Workspace workspace;
  CHECK_THROWS_WITH_AS(newton_schulz(g, wrong, {}, workspace),
                       "eigenblocks: newton_schulz: out is 3 x 2, expected 2 x 3 (shape of g)",
                       invalid_argument);
}
