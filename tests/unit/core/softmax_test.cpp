#include <doctest/doctest.h>

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/softmax.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <cmath>
#include <limits>
#include <utility>

using namespace eigenblocks;

namespace {

template <class S>
constexpr S kInf = std::numeric_limits<S>::infinity();
template <class S>
constexpr S kNaN = std::numeric_limits<S>::quiet_NaN();

// 0, 1, primes, and every side of the packet and four-packet borders of 4, 8 and 16 lanes.
constexpr std::pair<Index, Index> kShapes[] = {
    {0, 5},  {3, 0},  {1, 1},  {2, 3},  {3, 7},  {2, 8},  {2, 15},  {2, 16},   {2, 17},
    {3, 31}, {2, 33}, {1, 63}, {2, 64}, {2, 65}, {1, 97}, {2, 257}, {37, 1000}};

/// The textbook in double, row by row.
struct Reference {
  Matrix<double> p, log_p;
  Vector<double> lse;
  explicit Reference(const Matrix<double>& x)
      : p(x.rows(), x.cols()), log_p(x.rows(), x.cols()), lse(x.rows()) {
    for (Index i = 0; i < x.rows(); ++i) {
      double m = -kInf<double>, sum = 0;
      for (Index j = 0; j < x.cols(); ++j) m = std::max(m, x(i, j));
      for (Index j = 0; j < x.cols(); ++j) sum += std::exp(x(i, j) - m);
      lse[i] = m + std::log(sum);
      for (Index j = 0; j < x.cols(); ++j) {
        p(i, j) = std::exp(x(i, j) - m) / sum;
        log_p(i, j) = x(i, j) - lse[i];
      }
    }
  }
};

bool all_nan(const auto& m) {
  for (Index i = 0; i < m.rows(); ++i) {
    for (Index j = 0; j < m.cols(); ++j) {
      if (!std::isnan(m(i, j))) return false;
    }
  }
  return m.size() > 0;
}

}  // namespace

TEST_CASE_TEMPLATE("softmax, log_softmax and logsumexp are the textbook, in gapped views too", S,
                   float, double) {
  const double eps = double(std::numeric_limits<S>::epsilon());
  Random random(1);
  for (const auto& s : kShapes) {
    const Index rows = s.first, cols = s.second;
    CAPTURE(rows);
    CAPTURE(cols);
    Matrix<S> frame = Matrix<S>::Constant(rows + 2, cols + 5, kNaN<S>);
    auto x = frame.block(1, 3, rows, cols);
    x = normal_matrix<S>(random, rows, cols, 4.0);
    const Reference want(Matrix<double>(x.template cast<double>()));
    Matrix<S> out = Matrix<S>::Constant(rows + 2, cols + 5, S(7)), log_out = out;
    auto p = out.block(1, 2, rows, cols);
    auto log_p = log_out.block(1, 2, rows, cols);
    Vector<S> lse(rows);
    softmax_forward(x, p);
    log_softmax_forward(x, log_p);
    logsumexp_forward(x, lse);
    for (Index i = 0; i < rows; ++i) {
      if (cols == 0) {
        CHECK(lse[i] == -kInf<S>);
        continue;
      }
      const double largest = double(x.row(i).maxCoeff());
      for (Index j = 0; j < cols; ++j) {
        // The contract for e^t, the same for the weighted terms of the sum, its additions and a quotient.
        const double ulps = 8 + 2 * std::abs(double(x(i, j)) - largest) + double(cols) / 16;
        CHECK(std::abs(double(p(i, j)) - want.p(i, j)) <= ulps * eps * want.p(i, j));
        const double size = std::abs(double(x(i, j))) + std::abs(largest) + std::log(double(cols));
        CHECK(std::abs(double(log_p(i, j)) - want.log_p(i, j)) <=
              (8 + double(cols) / 16) * eps * (1 + size));
      }
      CHECK(std::abs(double(lse[i]) - want.lse[i]) <=
            (8 + double(cols) / 16) * eps * (1 + std::abs(want.lse[i])));
    }
    out.block(1, 2, rows, cols).setConstant(S(7));
    CHECK((out.array() == S(7)).all());  // nothing written beside the view
  }
}

TEST_CASE_TEMPLATE("softmax: large and shifted logits", S, float, double) {
  Matrix<S> x(1, 5);
  x << S(3e30), S(3e30), S(-3e30), S(0), S(3e30);
  const Matrix<S> p = softmax(x);
  CHECK(p(0, 0) == p(0, 1));
  CHECK(p(0, 0) == doctest::Approx(1.0 / 3));
  CHECK(p(0, 2) == S(0));
  CHECK(p(0, 3) == S(0));
  // Adding a constant that is exact in both changes nothing at all.
  Random random(2);
  const Matrix<S> small = (normal_matrix<S>(random, 3, 21) * S(64)).array().round() / S(64);
  CHECK(softmax(small) == softmax((small.array() + S(1024)).matrix()));
}

TEST_CASE_TEMPLATE("softmax: masked entries and rows are exact", S, float, double) {
  Random random(3);
  for (const Index cols : {1, 2, 7, 16, 33, 100}) {
    Matrix<S> x = normal_matrix<S>(random, 3, cols);
    for (Index j = 0; j < cols; j += 2) x(0, j) = -kInf<S>;
    x.row(1).setConstant(-kInf<S>);
    const bool first_empty = cols == 1;
    Matrix<S> p(3, cols), log_p(3, cols);
    Vector<S> lse(3);
    softmax_forward(x, p);
    log_softmax_forward(x, log_p);
    logsumexp_forward(x, lse);
    for (Index j = 0; j < cols; j += 2) {
      CHECK(p(0, j) == S(0));
      CHECK(log_p(0, j) == -kInf<S>);
    }
    CHECK((p.row(1).array() == S(0)).all());
    CHECK((log_p.row(1).array() == -kInf<S>).all());
    CHECK(lse[1] == -kInf<S>);
    if (!first_empty) CHECK(p.row(0).sum() == doctest::Approx(1.0));
    CHECK(p.row(2).sum() == doctest::Approx(1.0));

    // Upstream gradients planted at masked entries do not leak.
    Matrix<S> clean = normal_matrix<S>(random, 3, cols), planted = clean;
    Vector<S> dlse = Vector<S>::Ones(3);
    for (Index j = 0; j < cols; j += 2) {
      clean(0, j) = 0;
      planted(0, j) = j % 4 == 0 ? kNaN<S> : kInf<S>;
    }
    planted.row(1).setConstant(kNaN<S>);
    Matrix<S> a(3, cols), b(3, cols);
    const auto same_and_masked = [&] {
      CHECK(a.row(0) == b.row(0));
      CHECK(a.row(2) == b.row(2));
      for (Index j = 0; j < cols; j += 2) CHECK(b(0, j) == S(0));
      CHECK((b.row(1).array() == S(0)).all());
    };
    softmax_backward(p, clean, a);
    softmax_backward(p, planted, b);
    same_and_masked();
    log_softmax_backward(log_p, clean, a);
    log_softmax_backward(log_p, planted, b);
    same_and_masked();
    logsumexp_backward(x, lse, dlse, a);
    b = a;
    same_and_masked();
  }
}

TEST_CASE_TEMPLATE("softmax: NaN and +inf make their row NaN, wherever they are", S, float,
                   double) {
  Random random(4);
  for (const Index cols : {1, 3, 16, 67}) {
    for (Index at = 0; at < cols; ++at) {
      for (const S bad : {kNaN<S>, kInf<S>}) {
        for (const bool masked : {false, true}) {
          Matrix<S> x = normal_matrix<S>(random, 2, cols);
          if (masked) x.row(0).setConstant(-kInf<S>);
          x(0, at) = bad;
          const Matrix<S> p = softmax(x), log_p = log_softmax(x);
          CHECK(std::isnan(p(0, at)));
          CHECK(all_nan(p.row(0)));
          CHECK(std::isnan(log_p(0, at)));
          CHECK(!std::isfinite(logsumexp(x)[0]));
          CHECK(p.row(1).sum() == doctest::Approx(1.0));
        }
      }
    }
  }
}

TEST_CASE("softmax gradients against finite differences") {
  Random random(5);
  for (const auto& s : {std::pair<Index, Index>{1, 1}, {2, 5}, {3, 17}}) {
    const Index rows = s.first, cols = s.second;
    Matrix<double> x = normal_matrix<double>(random, rows, cols);
    const Matrix<double> up = normal_matrix<double>(random, rows, cols);
    const Vector<double> dlse = normal_matrix<double>(random, rows, 1);
    Matrix<double> y(rows, cols), dx(rows, cols);
    Vector<double> lse(rows);
    const auto against = [&](auto forward) { return gradcheck(forward, x, dx); };

    softmax_forward(x, y);
    softmax_backward(y, up, dx);
    auto result = against([&] { return softmax(x).cwiseProduct(up).sum(); });
    CHECK_MESSAGE(result.passed, result.message());

    log_softmax_forward(x, y);
    log_softmax_backward(y, up, dx);
    result = against([&] { return log_softmax(x).cwiseProduct(up).sum(); });
    CHECK_MESSAGE(result.passed, result.message());

    logsumexp_forward(x, lse);
    logsumexp_backward(x, lse, dlse, dx);
    result = against([&] { return logsumexp(x).dot(dlse); });
    CHECK_MESSAGE(result.passed, result.message());
  }
}

TEST_CASE_TEMPLATE("softmax: in place and on threads the same bits", S, float, double) {
  Random random(6);
  const Matrix<S> x = normal_matrix<S>(random, 67, 1003), up = normal_matrix<S>(random, 67, 1003);
  const thread_pool pool(3);
  Matrix<S> p(67, 1003), dx(67, 1003), again(67, 1003);
  softmax_forward(x, p);
  again = x;
  softmax_forward(again, again, pool);
  CHECK(again == p);
  softmax_backward(p, up, dx);
  again = p;
  softmax_backward(again, up, again, pool);
  CHECK(again == dx);
  again = up;
  softmax_backward(p, again, again, pool);
  CHECK(again == dx);

  log_softmax_forward(x, p);
  again = x;
  log_softmax_forward(again, again, pool);
  CHECK(again == p);
  log_softmax_backward(p, up, dx);
  again = up;
  log_softmax_backward(p, again, again, pool);
  CHECK(again == dx);

  Vector<S> lse(67), dlse = Vector<S>::Ones(67), threaded(67);
  logsumexp_forward(x, lse);
  logsumexp_forward(x, threaded, pool);
  CHECK(lse == threaded);
  logsumexp_backward(x, lse, dlse, dx);
  again = x;
  logsumexp_backward(again, lse, dlse, again, pool);
  CHECK(again == dx);
}

TEST_CASE("softmax takes expressions by value") {
  Random random(7);
  const Matrix<float> x = normal_matrix<float>(random, 3, 9);
  const Matrix<float> doubled = 2 * x;
  CHECK(softmax(2 * x) == softmax(doubled));
  CHECK(log_softmax(2 * x) == log_softmax(doubled));
  CHECK(logsumexp((2 * x).array()) == logsumexp(doubled));
}

TEST_CASE("softmax refuses shapes that differ, before writing") {
  Matrix<float> x = Matrix<float>::Zero(2, 3), small = Matrix<float>::Constant(2, 2, 5.f);
  Vector<float> two = Vector<float>::Zero(2), three = Vector<float>::Zero(3);
  CHECK_THROWS_WITH_AS(softmax_forward(x, small),
                       "eigenblocks: p is 2 x 2, expected 2 x 3 (shape of x)", invalid_argument);
  CHECK_THROWS_WITH_AS(softmax_backward(x, small, x),
                       "eigenblocks: dp is 2 x 2, expected 2 x 3 (shape of p)", invalid_argument);
  CHECK_THROWS_WITH_AS(softmax_backward(x, x, small),
                       "eigenblocks: dx is 2 x 2, expected 2 x 3 (shape of p)", invalid_argument);
  CHECK_THROWS_WITH_AS(log_softmax_forward(x, small),
                       "eigenblocks: y is 2 x 2, expected 2 x 3 (shape of x)", invalid_argument);
  CHECK_THROWS_WITH_AS(log_softmax_backward(x, small, x),
                       "eigenblocks: dy is 2 x 2, expected 2 x 3 (shape of y)", invalid_argument);
  CHECK_THROWS_WITH_AS(log_softmax_backward(x, x, small),
                       "eigenblocks: dx is 2 x 2, expected 2 x 3 (shape of y)", invalid_argument);
  CHECK_THROWS_WITH_AS(logsumexp_forward(x, three),
                       "eigenblocks: lse has 3 entries, expected 2 (rows of x)", invalid_argument);
  CHECK_THROWS_WITH_AS(logsumexp_backward(x, three, two, x),
                       "eigenblocks: lse has 3 entries, expected 2 (rows of x)", invalid_argument);
  CHECK_THROWS_WITH_AS(logsumexp_backward(x, two, three, x),
                       "eigenblocks: dlse has 3 entries, expected 2 (rows of x)", invalid_argument);
  CHECK_THROWS_WITH_AS(logsumexp_backward(x, two, two, small),
                       "eigenblocks: dx is 2 x 2, expected 2 x 3 (shape of x)", invalid_argument);
  CHECK((small.array() == 5.f).all());
}
