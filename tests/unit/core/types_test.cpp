// Most of the contract is checked by the compiler: which operands bind without a copy, which are refused.
#include <eigenblocks/attention/cache.hpp>
#include <eigenblocks/attention/quantized_cache.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <doctest/doctest.h>

#include <concepts>

namespace {

using namespace eigenblocks;

using RowMajor = Matrix<double>;
using ColMajor = Eigen::MatrixXd;
using HeadBlock = decltype(std::declval<RowMajor&>().middleCols(1, 2));
using ConstHeadBlock = decltype(std::declval<const RowMajor&>().middleCols(1, 2));
using StridedMap = Eigen::Map<RowMajor, 0, Eigen::OuterStride<>>;
using GappedMap = Eigen::Map<RowMajor, 0, Eigen::Stride<Eigen::Dynamic, 2>>;
using Sum = decltype(std::declval<RowMajor>() + std::declval<RowMajor>());
using Transposed = decltype(std::declval<RowMajor&>().transpose());

// Inputs: row-major storage with direct access.
static_assert(MatrixLike<RowMajor> && MatrixLike<const RowMajor&> && MatrixLike<RowVector<float>>);
static_assert(MatrixLike<HeadBlock> && MatrixLike<ConstHeadBlock> && MatrixLike<StridedMap>);
static_assert(MatrixLike<ConstMatrixRef<double>> && MatrixLike<Matrix<Eigen::half>>);
static_assert(!MatrixLike<ColMajor> && !MatrixLike<Transposed> && !MatrixLike<Sum>);
static_assert(!MatrixLike<GappedMap> && !MatrixLike<Matrix<int>> && !MatrixLike<Matrix<bool>>);
static_assert(!MatrixLike<double> && !MatrixLike<double*>);

// Outputs: lvalues, and views that are temporaries themselves.
static_assert(OutputMatrix<RowMajor&> && OutputMatrix<HeadBlock> && OutputMatrix<HeadBlock&>);
static_assert(OutputMatrix<MatrixRef<double>&> && OutputMatrix<StridedMap>);
static_assert(!OutputMatrix<RowMajor> && !OutputMatrix<const RowMajor&> &&
              !OutputMatrix<ColMajor&>);
static_assert(!OutputMatrix<ConstHeadBlock> && !OutputMatrix<ConstMatrixRef<double>&>);
static_assert(!OutputMatrix<Eigen::Map<const RowMajor>>);

static_assert(SameScalar<RowMajor&, HeadBlock, const RowMajor> &&
              !SameScalar<RowMajor, Matrix<float>>);

static_assert(RealScalar<float> && RealScalar<double> && !RealScalar<Eigen::half> &&
              !RealScalar<int>);
static_assert(!RealScalar<long double>);
static_assert(StorageScalar<Eigen::half> && StorageScalar<Eigen::bfloat16> && !StorageScalar<int>);
static_assert(std::same_as<compute_t<double>, double> && std::same_as<compute_t<float>, float>);
static_assert(std::same_as<compute_t<Eigen::half>, float>);
static_assert(std::same_as<compute_t<Eigen::bfloat16>, float>);
static_assert(std::same_as<scalar_t<const Matrix<float>&>, float>);

// States are regular values: default, copy, move, assign, compare.
static_assert(std::regular<KvCache<float>> && std::regular<KvCache<Eigen::half>>);
static_assert(std::regular<KvCacheOptions> && std::regular<QuantizedKvCache> &&
              std::regular<Random>);
static_assert(std::copyable<Workspace>);

}  // namespace

TEST_CASE("views bind to head blocks, row ranges and padded buffers without a copy") {
  RowMajor x(5, 12);
  const MatrixRef<double> head = x.middleCols(4, 4);
  const ConstMatrixRef<double> rows = x.middleRows(2, 3);
  const ConstMatrixRef<double> padded = StridedMap(x.data() + 1, 5, 7, Eigen::OuterStride<>(12));
  CHECK(head.data() == x.data() + 4);
  CHECK(head.outerStride() == 12);
  CHECK(rows.data() == &x(2, 0));
  CHECK(padded.data() == x.data() + 1);
  CHECK(padded.outerStride() == 12);
}
