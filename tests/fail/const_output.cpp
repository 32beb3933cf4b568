// A const output is refused at the call, not deep inside Eigen::Ref.
// expect: (satisfaction of|satisfy|because) 'OutputMatrix
#include <eigenblocks/attention/kernel.hpp>

namespace eb = eigenblocks;

#ifdef EIGENBLOCKS_FAIL
using Out = const eb::Matrix<float>;
#else
using Out = eb::Matrix<float>;
#endif

void call(const eb::Matrix<float>& query, const eb::Matrix<float>& key, Out& out) {
  eb::attention_forward(query, key, key, out, {.heads = 2});
}
