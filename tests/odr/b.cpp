#include <eigenblocks/eigenblocks.hpp>

eigenblocks::Matrix<float> make_matrix();

eigenblocks::Matrix<float> make_matrix() {
  eigenblocks::Matrix<float> matrix(2, 3);
  matrix << 1, 2, 3, 4, 5, 6;
  return matrix;
}
