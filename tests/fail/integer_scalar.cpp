// Integer matrices are refused: a softmax of integers is a mistake, not a request.
// expect: (satisfaction of|satisfy|because) 'StorageScalar|not satisfied for alias template 'compute_t'
#include <eigenblocks/attention/kernel.hpp>

namespace eb = eigenblocks;

#ifdef EIGENBLOCKS_FAIL
using Operand = eb::Matrix<int>;
#else
using Operand = eb::Matrix<double>;
#endif

void call(const Operand& query, Operand& out) {
  eb::attention_forward(query, query, query, out, {.heads = 2});
}
