#include "support/products.hpp"

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

EIGENBLOCKS_TEST_PRODUCTS()

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
