#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/linear.hpp>

#include <limits>

using namespace eigenblocks;

namespace {

struct Sizes {
  Index tokens, in, out;
};

/// sum_k a(i, k) b(k, j) in double, entry by entry.
Matrix<double> naive(const Matrix<double>& a, const Matrix<double>& b) {
  Matrix<double> c = Matrix<double>::Zero(a.rows(), b.cols());
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index k = 0; k < a.cols(); ++k) c.row(i) += a(i, k) * b.row(k);
  }
  return c;
}

/// Every entry is a sum of `terms` products of size 1 or so (|N(0,1)| < 5), each rounded once or twice.
template <class S>
bool close(const Matrix<S>& got, const Matrix<double>& want, Index terms) {
  const double tolerance = 50 * double(terms + 1) * double(std::numeric_limits<S>::epsilon());
  return got.size() == 0 || (got.template cast<double>() - want).cwiseAbs().maxCoeff() <= tolerance;
}

}  // namespace

TEST_CASE_TEMPLATE("linear maps and their gradients are the sums of products, in gapped views too",
                   S, float, double) {
  Random random(1);
  for (const auto& s : {Sizes{0, 3, 2},
                        {3, 0, 2},
                        {3, 2, 0},
                        {1, 1, 1},
                        {1, 5, 7},
                        {7, 1, 3},
                        {2, 3, 1},
                        {17, 13, 19},
                        {65, 33, 31}}) {
    const Index tokens = s.tokens, in = s.in, out = s.out;
    CAPTURE(tokens);
    CAPTURE(in);
    CAPTURE(out);
    Matrix<S> xs(tokens + 1, in + 3), ws(in + 2, out + 1), dys(tokens, out + 5);
    for (Matrix<S>* m : {&xs, &ws, &dys}) m->setConstant(std::numeric_limits<S>::quiet_NaN());
    auto x = xs.block(1, 2, tokens, in);
    auto w = ws.block(2, 0, in, out);
    auto dy = dys.block(0, 3, tokens, out);
    x = normal_matrix<S>(random, tokens, in);
    w = normal_matrix<S>(random, in, out);
    dy = normal_matrix<S>(random, tokens, out);
    const Vector<S> b = normal_matrix<S>(random, out, 1);
    const Matrix<double> xd = x.template cast<double>(), wd = w.template cast<double>(),
                         dyd = dy.template cast<double>();
    Matrix<S> y = Matrix<S>::Constant(tokens, out, S(9));
    linear_forward(x, w, y);
    CHECK(close(y, naive(xd, wd), in));
    CHECK(y == linear(x, w));
    Matrix<double> with_bias = naive(xd, wd);
    with_bias.rowwise() += b.template cast<double>().transpose();
    linear_forward(x, w, b, y);
    CHECK(close(y, with_bias, in + 1));
    CHECK(y == linear(x, w, RowVector<S>(b.transpose())));

    Matrix<S> dx = Matrix<S>::Constant(tokens, in, S(9)), dw = Matrix<S>::Constant(in, out, S(9));
    Vector<S> db = Vector<S>::Constant(out, S(9));
    linear_backward(x, w, dy, dx, dw, db);
    const Matrix<double> dx_want = naive(dyd, wd.transpose()), dw_want = naive(xd.transpose(), dyd);
    const Matrix<double> db_want = dyd.colwise().sum().transpose();
    CHECK(close(dx, dx_want, out));
    CHECK(close(dw, dw_want, tokens));
    CHECK(close(Matrix<S>(db), db_want, tokens));
    linear_accumulate_input(dy, w, dx);
    linear_accumulate_weight(x, dy, dw);
    linear_accumulate_bias(dy, db);
    CHECK(close(dx, 2 * dx_want, 2 * out));
    CHECK(close(dw, 2 * dw_want, 2 * tokens));
    CHECK(close(Matrix<S>(db), 2 * db_want, 2 * tokens));
  }
}

TEST_CASE("linear maps large enough to be cut: right, and equal bits on threads") {
  Random random(2);
  // Wide and tall results, with cuts that do not divide; one row, as in decoding.
  for (const auto& s : {Sizes{270, 70, 1300}, {1700, 65, 130}, {90, 1300, 90}, {1, 1111, 4111}}) {
    const Index tokens = s.tokens, in = s.in, out = s.out;
    CAPTURE(tokens);
    CAPTURE(out);
    const Matrix<float> x = normal_matrix<float>(random, tokens, in),
                        w = normal_matrix<float>(random, in, out),
                        dy = normal_matrix<float>(random, tokens, out);
    const Vector<float> b = normal_matrix<float>(random, out, 1);
    const thread_pool pool(3);
    Matrix<float> y(tokens, out), dx(tokens, in), dw(in, out), y2 = y, dx2 = dx, dw2 = dw;
    Vector<float> db(out), db2(out);
    linear_forward(x, w, b, y);
    linear_forward(x, w, b, y2, pool);
    CHECK(y == y2);
    linear_backward(x, w, dy, dx, dw, db);
    linear_backward(x, w, dy, dx2, dw2, db2, pool);
    CHECK(dx == dx2);
    CHECK(dw == dw2);
    CHECK(db == db2);
    const Matrix<double> xd = x.cast<double>(), wd = w.cast<double>(), dyd = dy.cast<double>();
    Matrix<double> want = xd * wd;
    want.rowwise() += b.cast<double>().transpose();
    CHECK(close(y, want, in));
    CHECK(close(dx, Matrix<double>(dyd * wd.transpose()), out));
    CHECK(close(dw, Matrix<double>(xd.transpose() * dyd), tokens));
  }
}

TEST_CASE("linear blocks cover a result exactly once") {
  for (const Index rows : {0, 1, 511, 768, 769, 2000}) {
    for (const Index cols : {0, 3, 255, 383, 384, 1000}) {
      for (const Index depth : {1, 1 << 20}) {
        Matrix<int> times = Matrix<int>::Zero(rows, cols);
        detail::for_product_blocks(rows, cols, depth, 512, 256, serial,
                                   [&](Index i, Index height, Index j, Index width) {
                                     times.block(i, j, height, width).array() += 1;
                                   });
        CHECK((times.array() == 1).all());
      }
    }
  }
}

TEST_CASE("linear maps refuse what does not fit, before writing") {
  Matrix<float> x(2, 3), w(3, 4), y = Matrix<float>::Constant(2, 4, 5.f);
  Matrix<float> w_short(2, 4), y_wide(2, 5), dx = Matrix<float>::Constant(2, 3, 5.f),
                                             dw = Matrix<float>::Constant(3, 4, 5.f);
  Vector<float> b3(3), db(4);
#define REFUSES(call, text) CHECK_THROWS_WITH_AS(call, "eigenblocks: " text, invalid_argument)
  REFUSES(linear_forward(x, w_short, y), "weight has 2 rows, x has 3 cols");
  REFUSES(linear_forward(x, w, y_wide), "y is 2 x 5, expected 2 x 4 (rows of x, cols of weight)");
  REFUSES(linear_forward(x, w, b3, y), "bias has 3 entries, expected 4 (cols of weight)");
  REFUSES(linear_backward_input(y_wide, w, dx), "dy has 5 cols, weight has 4");
  REFUSES(linear_accumulate_input(y, w, y_wide),
          "dx is 2 x 5, expected 2 x 3 (rows of dy, rows of weight)");
  REFUSES(linear_backward_weight(w, y, dw), "dy has 2 rows, x has 3");
  REFUSES(linear_accumulate_weight(x, y, w_short),
          "dweight is 2 x 4, expected 3 x 4 (cols of x, cols of dy)");
  REFUSES(linear_backward_bias(y, b3), "dbias has 3 entries, expected 4 (cols of dy)");
  REFUSES(linear_backward(w, w, y, dx, dw),
          "x is 3 x 4, expected 2 x 3 (rows of dy, rows of weight)");
  REFUSES(linear_backward(x, w, y, dx, w_short),
          "dweight is 2 x 4, expected 3 x 4 (shape of weight)");
  REFUSES(linear_backward(x, w, y, dx, dw, b3), "dbias has 3 entries, expected 4 (cols of weight)");
#undef REFUSES
  CHECK((y.array() == 5.f).all());
  CHECK((dx.array() == 5.f).all());
  CHECK((dw.array() == 5.f).all());
}
