// One of two translation units that include everything: a function defined in a header without
// `inline` would be defined twice, and this program would not link.
#include <eigenblocks/eigenblocks.hpp>

eigenblocks::Matrix<float> make_matrix();

int main() {
  const eigenblocks::Matrix<float> matrix = make_matrix();
  return matrix.rows() == 2 && matrix(1, 2) == 6.0f ? 0 : 1;
}
