// float and double operands in one call are refused: converting one of them would copy it.
// expect: (satisfaction of|satisfy|because) 'SameScalar
#include <eigenblocks/attention/kernel.hpp>

namespace eb = eigenblocks;

#ifdef EIGENBLOCKS_FAIL
using Key = eb::Matrix<double>;
#else
using Key = eb::Matrix<float>;
#endif

void call(const eb::Matrix<float>& query, const Key& key, eb::Matrix<float>& out) {
  eb::attention_forward(query, key, key, out, {.heads = 2});
}
