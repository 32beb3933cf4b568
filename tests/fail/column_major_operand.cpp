// A column-major operand is refused: Eigen::Ref would copy it on every call without a word.
// expect: (satisfaction of|satisfy|because) 'MatrixLike
#include <eigenblocks/attention/kernel.hpp>

namespace eb = eigenblocks;

#ifdef EIGENBLOCKS_FAIL
using Query = Eigen::MatrixXf;
#else
using Query = eb::Matrix<float>;
#endif

void call(const Query& query, const eb::Matrix<float>& key, eb::Matrix<float>& out) {
  eb::attention_forward(query, key, key, out, {.heads = 2});
}
