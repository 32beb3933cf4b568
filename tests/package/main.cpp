// The program of a user: built in four ways, each from one folder beside this file.
#include <eigenblocks/eigenblocks.hpp>

#include <cstdio>

namespace eb = eigenblocks;

int main() {
  // Attention averages the values, so equal values come out as they went in.
  const eb::Matrix<float> q = eb::Matrix<float>::Random(5, 8);
  const eb::Matrix<float> v = eb::Matrix<float>::Constant(5, 8, 2.0f);
  const eb::Matrix<float> out = eb::attention(q, q, v, {.heads = 2});
  std::printf("eigenblocks %s\n", EIGENBLOCKS_VERSION_STRING);
  return out.isApprox(v) ? 0 : 1;
}
