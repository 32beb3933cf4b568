// Matrices of complex numbers: the concepts of types.hpp for std::complex<float> and std::complex<double>.
//
//   ComplexMatrixLike, ComplexOutputMatrix     row-major storage with direct access, as MatrixLike and OutputMatrix
//   FieldMatrixLike, FieldOutputMatrix         real (float, double) or complex
//   real_t<S>                                  the real scalar of a real or complex one
//
// Gradients of complex numbers follow one convention: G_z = dL/dRe z + i dL/dIm z.  For a holomorphic w = f(z),
// G_z = conj(f'(z)) G_w; this is also what PyTorch and JAX (up to a conjugate) return.
#pragma once

#include <eigenblocks/core/types.hpp>

#include <complex>
#include <concepts>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

template <class S>
concept ComplexScalar =
    std::same_as<S, std::complex<float>> || std::same_as<S, std::complex<double>>;

template <class S>
concept FieldScalar = RealScalar<S> || ComplexScalar<S>;

template <FieldScalar S>
using real_t = typename Eigen::NumTraits<S>::Real;

template <class M>
concept FieldMatrixLike = detail::EigenDense<std::remove_cvref_t<M>> && FieldScalar<scalar_t<M>> &&
    detail::kRowMajorDirect<std::remove_cvref_t<M>>;

template <class M>
concept FieldOutputMatrix =
    FieldMatrixLike<M> && !std::is_const_v<std::remove_reference_t<M>> &&
    (int(std::remove_cvref_t<M>::Flags) & int(Eigen::LvalueBit)) != 0 &&
    (std::is_lvalue_reference_v<M> || !detail::kOwnsStorage<std::remove_cvref_t<M>>);

template <class M>
concept ComplexMatrixLike = FieldMatrixLike<M> && ComplexScalar<scalar_t<M>>;

template <class M>
concept ComplexOutputMatrix = FieldOutputMatrix<M> && ComplexScalar<scalar_t<M>>;

EIGENBLOCKS_NAMESPACE_END
