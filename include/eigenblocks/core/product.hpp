// Matrix products of row-major views: the three forms that forward and backward passes of linear
// maps need.
//
//   product_nn   c  = a b        or  c += a b          forward          y = x W
//   product_nt   c  = a b^T      or  c += a b^T        input gradient   dx = dy W^T
//   product_tn   c  = a^T b      or  c += a^T b        weight gradient  dW = x^T dy
//
// Eigen does the work (one thread, no temporaries; c must not overlap a or b).  They exist because
// a product expression costs over a second to compile each time it is spelled: here every scalar
// has one instantiation of each form, shared by all blocks.
#pragma once

#include <eigenblocks/core/types.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

enum class Write { set, add };  ///< c = or c +=

/// c (m x n) from a (m x k) and b (k x n).
template <RealScalar S>
EIGENBLOCKS_NOINLINE void product_nn(const ConstMatrixRef<S>& a, const ConstMatrixRef<S>& b,
                                     MatrixRef<S> c, Write write = Write::set) {
  if (write == Write::set) c.setZero();
  c.noalias() += a * b;
}

/// c (m x n) from a (m x k) and b (n x k).
template <RealScalar S>
EIGENBLOCKS_NOINLINE void product_nt(const ConstMatrixRef<S>& a, const ConstMatrixRef<S>& b,
                                     MatrixRef<S> c, Write write = Write::set) {
  if (write == Write::set) c.setZero();
  c.noalias() += a * b.transpose();
}

/// c (m x n) from a (k x m) and b (k x n).
template <RealScalar S>
EIGENBLOCKS_NOINLINE void product_tn(const ConstMatrixRef<S>& a, const ConstMatrixRef<S>& b,
                                     MatrixRef<S> c, Write write = Write::set) {
  if (write == Write::set) c.setZero();
  c.noalias() += a.transpose() * b;
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
