// An expression as a large operand is refused: it would be evaluated into a hidden temporary.
// expect: (satisfaction of|satisfy|because) 'MatrixLike
#include <eigenblocks/attention/kernel.hpp>

namespace eb = eigenblocks;

void call(const eb::Matrix<float>& query, const eb::Matrix<float>& key, eb::Matrix<float>& out) {
#ifdef EIGENBLOCKS_FAIL
  eb::attention_forward(query * 2.0f, key, key, out, {.heads = 2});
#else
  eb::attention_forward(query.leftCols(4), key, key, out, {.heads = 2});
#endif
}
