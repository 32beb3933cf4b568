// Operands of a Transformer-VQ test.
#pragma once

#include <eigenblocks/attention/vq_attention.hpp>
#include <eigenblocks/core/random.hpp>

namespace vq_case {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

struct Sizes {
  Index tokens, heads, dim, value_dim, codes, mem_len;
};

struct Problem {
  Sizes n;
  Matrix<double> q, k, v, codebook;
  eb::VqBias<double> bias;
  eb::VqAttentionOptions options;

  explicit Problem(const Sizes& sizes, std::uint64_t seed = 1) : n(sizes) {
    eb::Random random(seed);
    const auto matrix = [&](Index rows, Index cols) {
      return Matrix<double>(eb::normal_matrix<double>(random, rows, cols, 0.8));
    };
    q = matrix(n.tokens, n.heads * n.dim);
    k = matrix(n.tokens, n.heads * n.dim);
    v = matrix(n.tokens, n.heads * n.value_dim);
    codebook = matrix(n.heads * n.codes, n.dim);
    bias = {matrix(n.heads, n.dim), matrix(n.heads, n.dim),
            matrix(n.heads * (n.mem_len + 1), n.dim)};
    options.heads = n.heads;
    options.mem_len = n.mem_len;
  }
  Matrix<double> empty_out() const { return Matrix<double>(n.tokens, n.heads * n.value_dim); }
};

}  // namespace vq_case
