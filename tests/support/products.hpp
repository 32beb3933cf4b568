// Every test file would compile Eigen's matrix products anew, a third of its time.  Included before anything else (by the
// precompiled header), this leaves them to support/products.cpp.
#pragma once

#include <eigenblocks/core/product.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

#define EIGENBLOCKS_TEST_PRODUCT(keyword, name, S)                                                \
  keyword template void name<S>(const ConstMatrixRef<S>&, const ConstMatrixRef<S>&, MatrixRef<S>, \
                                Write);
#define EIGENBLOCKS_TEST_PRODUCTS(keyword)              \
  EIGENBLOCKS_TEST_PRODUCT(keyword, product_nn, float)  \
  EIGENBLOCKS_TEST_PRODUCT(keyword, product_nn, double) \
  EIGENBLOCKS_TEST_PRODUCT(keyword, product_nt, float)  \
  EIGENBLOCKS_TEST_PRODUCT(keyword, product_nt, double) \
  EIGENBLOCKS_TEST_PRODUCT(keyword, product_tn, float)  \
  EIGENBLOCKS_TEST_PRODUCT(keyword, product_tn, double)

EIGENBLOCKS_TEST_PRODUCTS(extern)

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
