// Matrices, views and the concepts that keep copies from happening silently.
//
// Rows are tokens.  A tensor [T, heads, d] is a T x (heads*d) matrix: head h is the column block
// [h*d, (h+1)*d), which is how PyTorch and numpy lay out a contiguous [T, heads, d].  Weights are in x out.
//
//   Matrix<S>, RowVector<S>, Vector<S>    owning, dynamic; Matrix is row-major
//   ConstMatrixRef<S>, MatrixRef<S>       views with an outer stride: head blocks, row ranges and padded buffers bind
//   ConstVectorRef<S>, VectorRef<S>       views of small vectors (gains, slopes), either orientation
//
// Eigen::Ref<const RowMajor> silently copies a column-major matrix or an expression.  Public functions
// therefore take large operands as templates constrained by the concepts below and make the view inside:
//
//   template <MatrixLike Q, MatrixLike K, OutputMatrix O> requires SameScalar<Q, K, O>
//   void f(const Q& query, const K& key, O&& out);
//
//   MatrixLike      row-major storage with direct access and inner stride 1: binds without a copy
//   OutputMatrix    the same, writable, and not a temporary that owns its storage (a result nobody could read)
//   SameScalar      all operands share one scalar
//   RealScalar      float or double
//   StorageScalar   RealScalar, or the 16-bit types Eigen::half and Eigen::bfloat16 (storage only: compute is float)
#pragma once

#include <eigenblocks/core/config.hpp>

#include <concepts>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

using Index = Eigen::Index;

template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class Scalar>
using RowVector = Eigen::Matrix<Scalar, 1, Eigen::Dynamic, Eigen::RowMajor>;
template <class Scalar>
using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

template <class Scalar>
using ConstMatrixRef = Eigen::Ref<const Matrix<Scalar>, 0, Eigen::OuterStride<>>;
template <class Scalar>
using MatrixRef = Eigen::Ref<Matrix<Scalar>, 0, Eigen::OuterStride<>>;
template <class Scalar>
using ConstVectorRef = Eigen::Ref<const Vector<Scalar>>;
template <class Scalar>
using VectorRef = Eigen::Ref<Vector<Scalar>>;

template <class S>
concept RealScalar = std::same_as<S, float> || std::same_as<S, double>;

template <class S>
concept StorageScalar =
    RealScalar<S> || std::same_as<S, Eigen::half> || std::same_as<S, Eigen::bfloat16>;

namespace detail {

template <class M>
concept EigenDense = std::derived_from<M, Eigen::DenseBase<M>>;

template <class M>
inline constexpr bool kRowMajorDirect = (int(M::Flags) & int(Eigen::DirectAccessBit)) != 0 &&
                                        (int(M::Flags) & int(Eigen::RowMajorBit)) != 0 &&
                                        int(M::InnerStrideAtCompileTime) == 1;

template <class M>
inline constexpr bool kOwnsStorage = std::derived_from<M, Eigen::PlainObjectBase<M>>;

template <class S>
struct ComputeScalar {
  using type = S;
};
template <>
struct ComputeScalar<Eigen::half> {
  using type = float;
};
template <>
struct ComputeScalar<Eigen::bfloat16> {
  using type = float;
};

}  // namespace detail

/// The scalar a block computes in when its operands are stored as S: float for the 16-bit types.
template <StorageScalar S>
using compute_t = typename detail::ComputeScalar<S>::type;

template <class M>
using scalar_t = typename std::remove_cvref_t<M>::Scalar;

template <class M>
concept MatrixLike = detail::EigenDense<std::remove_cvref_t<M>> && StorageScalar<scalar_t<M>> &&
    detail::kRowMajorDirect<std::remove_cvref_t<M>>;

/// To be used with a forwarding reference (`O&& out`): lvalues, and views made on the spot such as `out.middleCols(0, 4)`.
template <class M>
concept OutputMatrix =
    MatrixLike<M> && !std::is_const_v<std::remove_reference_t<M>> &&
    (int(std::remove_cvref_t<M>::Flags) & int(Eigen::LvalueBit)) != 0 &&
    (std::is_lvalue_reference_v<M> || !detail::kOwnsStorage<std::remove_cvref_t<M>>);

template <class First, class... Rest>
concept SameScalar = (std::same_as<scalar_t<First>, scalar_t<Rest>> && ...);

EIGENBLOCKS_NAMESPACE_END
