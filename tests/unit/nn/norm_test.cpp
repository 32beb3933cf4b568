#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/norm.hpp>

#include <cmath>
#include <limits>
#include <vector>

using namespace eigenblocks;

namespace {

struct Shape {
  Index rows, heads, d;
};
const Shape kShapes[] = {{0, 1, 4},  {3, 1, 0},  {1, 1, 1},   {2, 3, 1},
                         {3, 1, 7},  {2, 2, 16}, {2, 1, 17},  {1, 1, 31},
                         {3, 4, 33}, {2, 1, 65}, {5, 2, 130}, {40, 1, 1009}};

/// The textbook in long double, whose range also covers the extreme rows.  kind: 'r', 'l' or '2'.
struct Reference {
  Matrix<double> y;
  Vector<double> r;
  Reference(char kind, const Matrix<double>& x, const Vector<double>& w, const Vector<double>& b,
            double eps, Index heads)
      : y(x.rows(), x.cols()), r(x.rows() * heads) {
    using Wide = long double;
    const auto wide = [](double v) { return static_cast<Wide>(v); };
    const Index d = x.cols() / heads;
    for (Index g = 0; g < r.size(); ++g) {
      const auto row = x.row(g / heads).segment(g % heads * d, d);
      Wide mean = 0, square = 0;
      for (Index j = 0; j < d && kind == 'l'; ++j) mean += wide(row[j]) / static_cast<Wide>(d);
      for (Index j = 0; j < d; ++j) square += (wide(row[j]) - mean) * (wide(row[j]) - mean);
      const Wide scale = kind == '2' ? 1 / std::max(std::sqrt(square), wide(eps))
                                     : 1 / std::sqrt(square / static_cast<Wide>(d) + wide(eps));
      r[g] = static_cast<double>(scale);
      for (Index j = 0; j < d; ++j) {
        Wide h = (wide(row[j]) - mean) * scale;
        if (w.size() != 0) h *= wide(w[j]);
        if (b.size() != 0) h += wide(b[j]);
        y(g / heads, g % heads * d + j) = static_cast<double>(h);
      }
    }
  }
};

/// |got - want| <= ulps eps (1 + |want|): a dozen roundings, and sums of d terms over at least 16 accumulators.
template <class S>
bool close(const Matrix<S>& got, const Matrix<double>& want, Index d) {
  const double tolerance = (16 + double(d) / 16) * double(std::numeric_limits<S>::epsilon());
  return ((got.template cast<double>() - want).array().abs() <=
          tolerance * (1 + want.array().abs()))
      .all();
}

}  // namespace

TEST_CASE_TEMPLATE("norms are the textbook: heads, odd widths, gapped views", S, float, double) {
  Random random(1);
  for (const auto& s : kShapes) {
    const Index rows = s.rows, heads = s.heads, d = s.d;
    CAPTURE(rows);
    CAPTURE(d);
    const Index cols = heads * d;
    Matrix<S> frame = Matrix<S>::Constant(rows + 1, cols + 4, std::numeric_limits<S>::quiet_NaN());
    auto x = frame.block(1, 3, rows, cols);
    x = normal_matrix<S>(random, rows, cols).array() + S(0.5);
    const Matrix<double> exact = x.template cast<double>();
    Matrix<S> out = Matrix<S>::Constant(rows + 1, cols + 4, S(7));
    auto y = out.block(1, 1, rows, cols);
    for (const bool with_gain : {true, false}) {
      for (const bool with_bias : {true, false}) {
        const Vector<S> w = normal_matrix<S>(random, with_gain ? d : 0, 1);
        const Vector<S> b = normal_matrix<S>(random, with_bias ? d : 0, 1);
        const Vector<double> wd = w.template cast<double>(), bd = b.template cast<double>();
        Vector<S> r(rows * heads);
        layer_norm_forward(x, w, b, y, r, {.heads = heads});
        const Reference layer('l', exact, wd, bd, 1e-5, heads);
        CHECK(close<S>(y, layer.y, d));
        if (d > 0) CHECK(close<S>(Matrix<S>(r), layer.r, d));
        rms_norm_forward(x, w, y, r, {.eps = 1e-6, .heads = heads});
        const Reference rms('r', exact, wd, {}, 1e-6, heads);
        CHECK(close<S>(y, rms.y, d));
        if (d > 0) CHECK(close<S>(Matrix<S>(r), rms.r, d));
      }
    }
    Vector<S> r(rows * heads);
    l2_normalize_forward(x, y, r, {.heads = heads});
    if (d > 0) {
      const Reference l2('2', exact, {}, {}, 1e-12, heads);
      CHECK(close<S>(y, l2.y, d));
      CHECK(close<S>(Matrix<S>(r), l2.r, d));
    }
    out.block(1, 1, rows, cols).setConstant(S(7));
    CHECK((out.array() == S(7)).all());
  }
}

TEST_CASE_TEMPLATE("norms: rows near both ends of the range, against long double", S, float,
                   double) {
  const bool single = sizeof(S) == 4;
  const Index d = 37;
  Random random(2);
  const Matrix<S> unit = normal_matrix<S>(random, 1, d);
  for (const double size : {single ? 1e30 : 1e300, single ? 1e20 : 1e160, single ? 1e-20 : 1e-160,
                            single ? 1e-30 : 1e-290, 1.0}) {
    CAPTURE(size);
    const Matrix<S> x = unit * static_cast<S>(size);
    const Matrix<double> exact = x.template cast<double>();
    for (const double eps : {1e-6, single ? 1e-36 : 1e-300}) {
      CAPTURE(eps);
      CHECK(close<S>(rms_norm(x, Vector<S>(), {.eps = eps}),
                     Reference('r', exact, {}, {}, eps, 1).y, d));
      CHECK(close<S>(layer_norm(x, Vector<S>(), Vector<S>(), {.eps = eps}),
                     Reference('l', exact, {}, {}, eps, 1).y, d));
      CHECK(close<S>(l2_normalize(x, {.eps = eps}), Reference('2', exact, {}, {}, eps, 1).y, d));
    }
    // Backward with the saved r stays finite: dx is of size dy / size, which may itself underflow to 0.
    Vector<S> r(1), dw(d), db(d);
    const Vector<S> w = Vector<S>::Ones(d), b = Vector<S>::Zero(d);
    Matrix<S> y(1, d), dx(1, d);
    const Matrix<S> dy = normal_matrix<S>(random, 1, d);
    rms_norm_forward(x, w, y, r);
    rms_norm_backward(x, w, r, dy, dx, dw);
    CHECK(dx.allFinite());
    CHECK(dw.allFinite());
    layer_norm_forward(x, w, b, y, r);
    layer_norm_backward(x, w, r, dy, dx, dw, db);
    CHECK(dx.allFinite());
    CHECK(dw.allFinite());
    l2_normalize_forward(x, y, r);
    l2_normalize_backward(x, r, dy, dx);
    CHECK(dx.allFinite());
  }
}

TEST_CASE_TEMPLATE("layer_norm: a row whose plain sum overflows", S, float, double) {
  const Index d = 37;
  Matrix<S> x(1, d);
  for (Index j = 0; j < d; ++j) {
    x(0, j) = std::numeric_limits<S>::max() * (S(0.25) + static_cast<S>(j % 5) / 32);
  }
  const Matrix<double> exact = x.template cast<double>();
  const Reference want('l', exact, {}, {}, 1e-5, 1);
  // Entries of 0.3 max differ by a tenth of that: what the mean loses counts ten times.
  CHECK((layer_norm(x, Vector<S>(), Vector<S>()).template cast<double>() - want.y)
            .cwiseAbs()
            .maxCoeff() <= 10 * 16 * double(std::numeric_limits<S>::epsilon()));
}

TEST_CASE_TEMPLATE("norms: zero rows and rows of one entry", S, float, double) {
  // eps^2 vanishes in the scalar too.
  const double least = double(std::numeric_limits<S>::min()) * 4;
  CHECK((l2_normalize(Matrix<S>(Matrix<S>::Zero(2, 5)), {.eps = least}).array() == S(0)).all());
  const Matrix<S> x = Matrix<S>::Zero(1, 5);
  Matrix<S> dy(1, 5), dx(1, 5), y(1, 5);
  dy << 1, -2, 3, 0, S(0.5);
  const Vector<S> w = Vector<S>::Constant(5, S(2)), b = Vector<S>::Constant(5, S(3));
  Vector<S> r(1), dw(5), db(5);
  rms_norm_forward(x, w, y, r, {.eps = 0.25});
  CHECK((y.array() == S(0)).all());
  rms_norm_backward(x, w, r, dy, dx, dw, {.eps = 0.25});
  CHECK(dx == S(4) * dy);  // w dy / sqrt(eps)
  CHECK((dw.array() == S(0)).all());
  layer_norm_forward(x, w, b, y, r);
  CHECK((y.array() == S(3)).all());
  l2_normalize_forward(x, y, r, {.eps = 0.5});
  CHECK((y.array() == S(0)).all());
  l2_normalize_backward(x, r, dy, dx, {.eps = 0.5});
  CHECK(dx == S(2) * dy);

  const Matrix<S> column = Matrix<S>::Constant(3, 1, S(-4));
  Matrix<S> out(3, 1), slope = Matrix<S>::Ones(3, 1);
  Vector<S> r3(3), one = Vector<S>::Constant(1, S(5)), dw1(1), db1(1);
  layer_norm_forward(column, one, one, out, r3);
  CHECK((out.array() == S(5)).all());  // y = b
  layer_norm_backward(column, one, r3, slope, slope, dw1, db1);
  CHECK((slope.array() == S(0)).all());
  CHECK(dw1[0] == S(0));
  CHECK(db1[0] == S(3));
}

TEST_CASE_TEMPLATE("norms: NaN and infinity stay in their row and head", S, float, double) {
  Random random(3);
  for (const S bad : {std::numeric_limits<S>::quiet_NaN(), std::numeric_limits<S>::infinity(),
                      -std::numeric_limits<S>::infinity()}) {
    for (Index at = 0; at < 19; ++at) {
      Matrix<S> x = normal_matrix<S>(random, 2, 38);
      x(1, 19 + at) = bad;
      const Vector<S> none;
      for (const Matrix<S>& y :
           {rms_norm(x, none, {.heads = 2}), layer_norm(x, none, none, {.heads = 2}),
            l2_normalize(x, {.heads = 2})}) {
        CHECK(y.row(0).allFinite());
        CHECK(y.row(1).head(19).allFinite());
        CHECK(y.row(1).tail(19).array().isNaN().all());
      }
    }
  }
}

TEST_CASE_TEMPLATE("norms: in place, and on threads, the same bits", S, float, double) {
  Random random(4);
  const Index rows = 300, heads = 2, d = 257, cols = heads * d;  // several blocks of rows
  const Matrix<S> x = normal_matrix<S>(random, rows, cols),
                  dy = normal_matrix<S>(random, rows, cols);
  const Vector<S> w = normal_matrix<S>(random, d, 1), b = normal_matrix<S>(random, d, 1);
  const thread_pool pool(3);
  Matrix<S> y(rows, cols), again = x, dx(rows, cols);
  Vector<S> r(rows * heads), r2 = r, dw(d), dw2(d), db(d), db2(d);

  rms_norm_forward(x, w, y, r, {.heads = heads});
  rms_norm_forward(again, w, again, r2, {.heads = heads}, pool);
  CHECK(again == y);
  CHECK(r == r2);
  rms_norm_backward(x, w, r, dy, dx, dw, {.heads = heads});
  again = dy;
  rms_norm_backward(x, w, r, again, again, dw2, {.heads = heads}, pool);
  CHECK(again == dx);
  CHECK(dw == dw2);
  again = x;
  rms_norm_backward(again, w, r, dy, again, dw2, {.heads = heads});
  CHECK(again == dx);

  layer_norm_forward(x, w, b, y, r, {.heads = heads});
  again = x;
  layer_norm_forward(again, w, b, again, {.heads = heads}, pool);
  CHECK(again == y);
  layer_norm_backward(x, w, r, dy, dx, dw, db, {.heads = heads});
  again = dy;
  layer_norm_backward(x, w, r, again, again, dw2, db2, {.heads = heads}, pool);
  CHECK(again == dx);
  CHECK(dw == dw2);
  CHECK(db == db2);

  l2_normalize_forward(x, y, r, {.heads = heads});
  again = x;
  l2_normalize_forward(again, again, {.heads = heads}, pool);
  CHECK(again == y);
  l2_normalize_backward(x, r, dy, dx, {.heads = heads});
  again = dy;
  l2_normalize_backward(x, r, again, again, {.heads = heads}, pool);
  CHECK(again == dx);
}

TEST_CASE("norms: heads are rows of their own, and expressions are taken by value") {
  Random random(5);
  const Matrix<double> x = normal_matrix<double>(random, 3, 4 * 6);
  const Vector<double> w = normal_matrix<double>(random, 6, 1);
  const Matrix<double> rows = Eigen::Map<const Matrix<double>>(x.data(), 12, 6);
  const Matrix<double> by_head = rms_norm(x, w, {.heads = 4}), by_row = rms_norm(rows, w);
  CHECK(Eigen::Map<const Matrix<double>>(by_head.data(), 12, 6) == by_row);
  const Matrix<double> doubled = 2 * x;
  CHECK(rms_norm(2 * x, w, {.heads = 4}) == rms_norm(doubled, w, {.heads = 4}));
  CHECK(layer_norm(2 * x, w, w, {.heads = 4}) == layer_norm(doubled, w, w, {.heads = 4}));
  CHECK(l2_normalize((2 * x).array()) == l2_normalize(doubled));
  // KeyNorm does not see positive factors; a power of two is exact.
  CHECK(l2_normalize(doubled) == l2_normalize(x));
}

TEST_CASE("outputs beyond the caches, which are streamed, are the bits of small ones") {
  constexpr Index rows = 1600, cols = 4096;  // 25 MB
  static_assert(rows * cols * 4 >= detail::kStreamBytes);
  Matrix<float> x(rows, cols), dy(rows, cols);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; ++j) {
      x(i, j) = static_cast<float>((i * 7 + j * 13) % 101) / 50.0f - 1.0f;
      dy(i, j) = static_cast<float>((i * 11 + j * 5) % 89) / 40.0f - 1.0f;
    }
  }
  const Vector<float> gain = Vector<float>::LinSpaced(cols, 0.5f, 1.5f);
  Matrix<float> y(rows, cols), dx(rows, cols), y_row(1, cols), dx_row(1, cols);
  Vector<float> rstd(rows), dgain(cols), dbias(cols), dgain_row(cols), dbias_row(cols);
  const thread_pool pool(2);
  layer_norm_forward(x, gain, gain, y, rstd, {}, pool);
  layer_norm_backward(x, gain, rstd, dy, dx, dgain, dbias, {}, pool);
  for (const Index i : {0, 1, 799, 1599}) {
    Vector<float> rstd_row(1);
    layer_norm_forward(x.middleRows(i, 1), gain, gain, y_row, rstd_row);
    layer_norm_backward(x.middleRows(i, 1), gain, rstd_row, dy.middleRows(i, 1), dx_row, dgain_row,
                        dbias_row);
    CHECK(y.row(i) == y_row);
    CHECK(dx.row(i) == dx_row);
  }
  Matrix<float> in_place = x;
  layer_norm_forward(in_place, gain, gain, in_place, rstd);
  CHECK(in_place == y);
}
