// A temporary matrix as output is refused: nobody could read the result. A view made on the spot,
// such as a block of columns, writes into a matrix that stays and is accepted.
// expect: (satisfaction of|satisfy|because) 'OutputMatrix
#include <eigenblocks/attention/kernel.hpp>

namespace eb = eigenblocks;

void call(const eb::Matrix<float>& query, const eb::Matrix<float>& key, eb::Matrix<float>& out) {
#ifdef EIGENBLOCKS_FAIL
  eb::attention_forward(query, key, key, eb::Matrix<float>(out), {.heads = 2});
#else
  eb::attention_forward(query, key, key, out.leftCols(4), {.heads = 2});
#endif
}
