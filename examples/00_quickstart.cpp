// Causal attention with grouped key/value heads and rotary positions, all at once and token by token.
#include <eigenblocks/eigenblocks.hpp>

#include <cstdio>

int main() {
  namespace eb = eigenblocks;
  const eb::Index tokens = 6, heads = 4, kv_heads = 2, dim = 8;

  // A tensor [tokens, heads, dim] is a tokens x (heads * dim) matrix, as in PyTorch's memory.
  eb::Random random(42);
  eb::Matrix<float> q = eb::normal_matrix<float>(random, tokens, heads * dim);
  eb::Matrix<float> k = eb::normal_matrix<float>(random, tokens, kv_heads * dim);
  const eb::Matrix<float> v = eb::normal_matrix<float>(random, tokens, kv_heads * dim);

  const eb::RotaryTable<float> rotary(eb::rope_frequencies(dim), eb::RopeLayout::half);
  eb::rope_in_place(q, 0, rotary, {.heads = heads});  // rows at positions 0, 1, 2, ...
  eb::rope_in_place(k, 0, rotary, {.heads = kv_heads});

  const eb::AttentionShape shape{.heads = heads, .kv_heads = kv_heads};
  const eb::Matrix<float> out = eb::attention(q, k, v, shape, eb::attention_rule(eb::causal()));
  std::printf("out is %d x %d, out(5, 0..3) = %.4f %.4f %.4f %.4f\n", int(out.rows()),
              int(out.cols()), double(out(5, 0)), double(out(5, 1)), double(out(5, 2)),
              double(out(5, 3)));

  // The same, one token at a time over a key/value cache.
  eb::KvCache<float> cache({.kv_heads = kv_heads, .head_dim = dim});
  eb::Matrix<float> step(1, heads * dim);
  for (eb::Index t = 0; t < tokens; ++t) {
    eb::attention_step(cache, q.middleRows(t, 1), k.middleRows(t, 1), v.middleRows(t, 1), step,
                       shape);
  }
  std::printf("the last step differs by %.1e\n",
              double((step.row(0) - out.row(tokens - 1)).cwiseAbs().maxCoeff()));
}
