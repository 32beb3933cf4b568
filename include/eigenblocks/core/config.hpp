// Build configuration: required Eigen, exceptions on or off, the versioned inline namespace.
//
// Everything lives in `eigenblocks::<inline namespace>`.  The inline namespace encodes the version and every switch
// that changes generated code (instruction set, exceptions), so two copies of the library compiled with
// different flags can meet in one binary without sharing inline functions.  Users never spell it.
//
// Macros a user may define before the first include
//   EIGENBLOCKS_NO_EXCEPTIONS   failures print and abort; implied by -fno-exceptions
//
// Nothing here, or anywhere in the library, sets EIGEN_* macros or instruction-set flags for the user.
#pragma once

#include <Eigen/Core>

#include <eigenblocks/version.hpp>

#if !EIGEN_VERSION_AT_LEAST(3, 4, 0)
#error "eigenblocks needs Eigen 3.4.0 or newer"
#endif

#if !defined(EIGENBLOCKS_NO_EXCEPTIONS) && !defined(__cpp_exceptions)
#define EIGENBLOCKS_NO_EXCEPTIONS 1
#endif

#if defined(EIGEN_DONT_VECTORIZE)
#define EIGENBLOCKS_ISA scalar
#elif defined(__AVX512F__)
#define EIGENBLOCKS_ISA avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define EIGENBLOCKS_ISA avx2
#elif defined(__AVX__)
#define EIGENBLOCKS_ISA avx
#else
#define EIGENBLOCKS_ISA base
#endif

#if defined(EIGENBLOCKS_NO_EXCEPTIONS)
#define EIGENBLOCKS_FAILURE abort
#else
#define EIGENBLOCKS_FAILURE throw
#endif

#define EIGENBLOCKS_JOIN_EXPANDED(major, minor, isa, failure) v##major##_##minor##_##isa##_##failure
#define EIGENBLOCKS_JOIN(major, minor, isa, failure) \
  EIGENBLOCKS_JOIN_EXPANDED(major, minor, isa, failure)
#define EIGENBLOCKS_ABI_NAMESPACE                                                         \
  EIGENBLOCKS_JOIN(EIGENBLOCKS_VERSION_MAJOR, EIGENBLOCKS_VERSION_MINOR, EIGENBLOCKS_ISA, \
                   EIGENBLOCKS_FAILURE)

#define EIGENBLOCKS_NAMESPACE_BEGIN \
  namespace eigenblocks {           \
  inline namespace EIGENBLOCKS_ABI_NAMESPACE {
#define EIGENBLOCKS_NAMESPACE_END \
  }                               \
  }

#if defined(__GNUC__) || defined(__clang__)
#define EIGENBLOCKS_NOINLINE __attribute__((noinline))
#define EIGENBLOCKS_COLD __attribute__((cold, noinline))
#define EIGENBLOCKS_ALWAYS_INLINE inline __attribute__((always_inline))
// Follows a lambda's parameters in hot loops: g++ calls a lambda that has several call sites.
#define EIGENBLOCKS_INLINE_LAMBDA __attribute__((always_inline))
#define EIGENBLOCKS_RESTRICT __restrict__
#else
#define EIGENBLOCKS_NOINLINE
#define EIGENBLOCKS_COLD
#define EIGENBLOCKS_ALWAYS_INLINE inline
#define EIGENBLOCKS_INLINE_LAMBDA
#define EIGENBLOCKS_RESTRICT
#endif
