#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/embedding.hpp>

#include <array>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

using namespace eigenblocks;

static_assert(TokenIds<std::vector<int>> && TokenIds<std::span<const std::uint16_t>> &&
              TokenIds<Eigen::VectorXi>);
static_assert(!TokenIds<std::vector<float>> && !TokenIds<Eigen::Matrix<float, 3, 1>> &&
              !TokenIds<Eigen::MatrixXi>);
static_assert(TokenIds<decltype(std::declval<Eigen::VectorXi&>().head(2))>);
static_assert(!TokenIds<decltype(std::declval<Matrix<int>&>().col(0))> &&
                  !TokenIds<decltype(std::declval<Matrix<int>&>().col(0).head(2))>,
              "a strided column is not contiguous");

TEST_CASE_TEMPLATE("embedding copies rows and adds gradients in the order of positions", S, float,
                   double) {
  Random random(1);
  for (const Index d : {0, 1, 5, 16, 33, 300}) {
    CAPTURE(d);
    const Matrix<S> table = normal_matrix<S>(random, 7, d);
    const std::vector<int> ids{3, 0, 3, 6, 3, 0};
    const Matrix<S> dy = normal_matrix<S>(random, 6, d);
    const Matrix<S> y = embedding(table, ids);
    Matrix<S> want = Matrix<S>::Zero(7, d);
    for (Index t = 0; t < 6; ++t) {
      const Index id = ids[static_cast<std::size_t>(t)];
      CHECK(y.row(t) == table.row(id));
      want.row(id) += dy.row(t);  // in order: the bits are part of the contract
    }
    Matrix<S> dtable = Matrix<S>::Constant(7, d, S(9));
    embedding_backward(ids, dy, dtable);
    CHECK(dtable == want);
    CHECK((dtable.row(1).array() == S(0)).all());
    const thread_pool pool(3);
    embedding_backward(ids, dy, dtable, pool);
    CHECK(dtable == want);

    dtable = table;
    embedding_accumulate(ids, dy, dtable, pool);
    Matrix<S> sum = table;
    for (Index t = 0; t < 6; ++t) sum.row(ids[static_cast<std::size_t>(t)]) += dy.row(t);
    CHECK(dtable == sum);
  }
}

TEST_CASE("embedding: any contiguous ids, views of tables, 16-bit tables, no tokens") {
  Random random(2);
  const Matrix<float> frame = normal_matrix<float>(random, 6, 9);
  const auto table = frame.block(1, 2, 4, 5);
  const std::vector<std::int64_t> wide{3, 1};
  const std::array<std::uint8_t, 2> bytes{3, 1};
  Eigen::VectorXi eigen(2);
  eigen << 3, 1;
  const Matrix<float> y = embedding(table, wide);
  CHECK(y.row(0) == frame.row(4).segment(2, 5));
  CHECK(embedding(table, bytes) == y);
  CHECK(embedding(table, eigen) == y);
  CHECK(embedding(table, std::span<const std::int64_t>(wide)) == y);

  const Matrix<Eigen::bfloat16> half = frame.cast<Eigen::bfloat16>();
  CHECK(embedding(half, wide).row(1).cast<float>() == half.row(1).cast<float>());

  const std::vector<int> none;
  CHECK(embedding(table, none).rows() == 0);
  Matrix<float> dtable = Matrix<float>::Ones(4, 5);
  embedding_backward(none, Matrix<float>(0, 5), dtable);
  CHECK((dtable.array() == 0.f).all());
}

TEST_CASE("embedding refuses ids and shapes that do not fit, before writing") {
  const Matrix<float> table = Matrix<float>::Zero(4, 3);
  Matrix<float> y = Matrix<float>::Constant(2, 3, 5.f), dtable = Matrix<float>::Constant(4, 3, 5.f);
  CHECK_THROWS_WITH_AS(embedding_forward(table, std::vector{0, 4}, y),
                       "eigenblocks: ids[1] (4) is outside [0, 4)", std::out_of_range);
  CHECK_THROWS_WITH_AS(embedding_forward(table, std::vector{-1, 0}, y),
                       "eigenblocks: ids[0] (-1) is outside [0, 4)", std::out_of_range);
  CHECK_THROWS_AS(embedding_forward(table, std::vector<std::uint64_t>{0, ~std::uint64_t{0}}, y),
                  std::out_of_range);
  CHECK_THROWS_WITH_AS(embedding_backward(std::vector{0, 9}, y, dtable),
                       "eigenblocks: ids[1] (9) is outside [0, 4)", std::out_of_range);
  CHECK_THROWS_WITH_AS(embedding_forward(table, std::vector{0}, y),
                       "eigenblocks: y is 2 x 3, expected 1 x 3 (number of ids, cols of table)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(embedding_backward(std::vector{0}, y, dtable),
                       "eigenblocks: dy is 2 x 3, expected 1 x 3 (number of ids, cols of dtable)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(embedding_accumulate(std::vector{0}, y, dtable),
                       "eigenblocks: dy is 2 x 3, expected 1 x 3 (number of ids, cols of dtable)",
                       invalid_argument);
  CHECK((y.array() == 5.f).all());
  CHECK((dtable.array() == 5.f).all());
}
