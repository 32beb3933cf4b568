#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/optim/tensor_ref.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

using namespace eigenblocks;

namespace {

using ColumnMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic>;

static_assert(std::is_convertible_v<Matrix<float>&, TensorRef<float>>);
static_assert(std::is_convertible_v<Vector<float>&, TensorRef<float>>);
static_assert(std::is_convertible_v<RowVector<float>&, TensorRef<float>>);
static_assert(std::is_convertible_v<const Matrix<float>&, TensorRef<const float>>);
static_assert(std::is_convertible_v<TensorRef<float>, TensorRef<const float>>);
// What would copy, dangle or drop const does not bind.
static_assert(!std::is_convertible_v<ColumnMajor&, TensorRef<float>>);
static_assert(!std::is_convertible_v<const Matrix<float>&, TensorRef<float>>);
static_assert(!std::is_convertible_v<Matrix<float>, TensorRef<float>>);
static_assert(!std::is_convertible_v<Matrix<float>, TensorRef<const float>>);
static_assert(!std::is_convertible_v<Matrix<double>&, TensorRef<float>>);
static_assert(!std::is_convertible_v<TensorRef<const float>, TensorRef<float>>);
static_assert(
    !std::is_convertible_v<decltype(std::declval<Matrix<float>&>().col(0)), TensorRef<float>>);

}  // namespace

TEST_CASE("a TensorRef sees the memory it was made from") {
  Matrix<double> m = Matrix<double>::Zero(5, 7);
  const TensorRef<double> whole(m);
  CHECK(whole.data() == m.data());
  CHECK(whole.size() == 35);
  CHECK(whole.contiguous());

  const TensorRef<double> head = m.middleCols(2, 3);
  CHECK(head.rows() == 5);
  CHECK(head.cols() == 3);
  CHECK(head.stride() == 7);
  CHECK_FALSE(head.contiguous());
  head.row(4)[1] = 3.0;
  CHECK(m(4, 3) == 3.0);

  Vector<double> column(6);
  RowVector<double> row(6);
  for (const TensorRef<double>& tensor : {TensorRef<double>(column), TensorRef<double>(row)}) {
    CHECK(tensor.rows() == 1);
    CHECK(tensor.cols() == 6);
  }
  const TensorRef<double> part = column.segment(1, 4);
  CHECK(part.data() == column.data() + 1);
  CHECK(part.size() == 4);
}

TEST_CASE("pieces cover every entry once, whatever the shape") {
  constexpr Index piece = detail::kPiece;
  const Index shapes[][2] = {{0, 5},         {5, 0},         {1, 1},     {3, 7},
                             {1, piece},     {2, piece + 1}, {1000, 97}, {piece + 3, 1},
                             {3, 2 * piece}, {40, piece / 2}};
  for (const auto& shape : shapes) {
    const Index rows = shape[0], cols = shape[1];
    for (const bool flat : {false, true}) {
      CAPTURE(rows);
      CAPTURE(cols);
      CAPTURE(flat);
      std::vector<int> seen(static_cast<std::size_t>(rows * cols), 0);
      const detail::Pieces pieces(rows, cols, flat);
      for (Index task = 0; task < pieces.count(); ++task) {
        Index numbers = 0;
        pieces.visit(task, [&](Index row, Index col, Index n) {
          for (Index k = 0; k < n; ++k) ++seen[static_cast<std::size_t>(row * cols + col + k)];
          numbers += n;
        });
        CHECK(numbers <= piece);
      }
      CHECK(std::count(seen.begin(), seen.end(), 1) == rows * cols);
    }
  }
}

TEST_CASE_TEMPLATE("square_sum: every length, any alignment, the whole range of float", S, float,
                   double) {
  Random random(1);
  Matrix<S> x = normal_matrix<S>(random, 1, 1300);
  for (const Index n : {0, 1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 511, 512, 513, 1031, 1299}) {
    double want = 0;
    for (Index i = 0; i < n; ++i) want += double(x(0, i)) * double(x(0, i));
    const double got = detail::square_sum<S>(x.data(), n);
    // At most 512 terms are added in S, all positive: relative error below 512 eps.
    CHECK(std::abs(got - want) <= 512 * double(std::numeric_limits<S>::epsilon()) * want);
    for (Index shift = 1; shift < 5; ++shift) {
      Matrix<S> moved(1, n + shift);
      moved.rightCols(n) = x.leftCols(n);
      CHECK(detail::square_sum<S>(moved.data() + shift, n) == got);
    }
  }
  for (const double size : {1e-45, 1e-30, 1e-19, 1e-10, 1e10, 1e19, 1e30, 3e38}) {
    CAPTURE(size);
    Matrix<float> one = Matrix<float>::Constant(1, 9, float(size));
    const double value = double(one(0, 0));
    // As a ratio: Approx compares with an absolute scale of 1.
    CHECK(detail::square_sum<float>(one.data(), 9) / (9 * value * value) ==
          doctest::Approx(1).epsilon(1e-5));
  }
  Matrix<float> bad = Matrix<float>::Ones(1, 600);
  bad(0, 599) = std::numeric_limits<float>::infinity();
  CHECK(std::isinf(detail::square_sum<float>(bad.data(), 600)));
  bad(0, 3) = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(detail::square_sum<float>(bad.data(), 600)));
}
