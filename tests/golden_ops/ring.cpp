// Golden op ring_attention: every rank's steps in one process.
#include "support/golden.hpp"

#include <eigenblocks/attention/ring.hpp>

#include <stdexcept>
#include <string>

namespace {

using namespace eigenblocks;

RingLayout layout_named(const std::string& name) {
  if (name == "contiguous") return RingLayout::contiguous;
  if (name == "striped") return RingLayout::striped;
  if (name == "zigzag") return RingLayout::zigzag;
  throw std::runtime_error("layout " + name + " is unknown");
}

/// Rows of x at the given positions, and back.
template <class S>
Matrix<S> rows_at(const Matrix<S>& x, const std::vector<Index>& positions) {
  return x(positions, Eigen::all);
}

template <class C>
void ring_attention(C& c) {
  using S = golden::scalar_of<C>;
  const RingLayout layout = layout_named(c.param("layout"));
  const Index ranks = c.param_int("world_size");
  const bool is_causal = c.param_flag("causal", false);
  const Matrix<S> q = c.matrix("in.q"), k = c.matrix("in.k"), v = c.matrix("in.v");
  const AttentionShape shape{.heads = c.shape("in.q")[1], .kv_heads = c.shape("in.k")[1]};
  const Index tokens = q.rows(), local = tokens / ranks;
  // causal is window_right(0): one rule for both.
  const auto rule = attention_rule(window_right(is_causal ? 0 : Index{1} << 40));

  std::vector<std::vector<Index>> held;
  std::vector<Index> order;
  for (Index r = 0; r < ranks; ++r) {
    held.push_back(ring_positions(layout, ranks, tokens, r));
    order.insert(order.end(), held.back().begin(), held.back().end());
  }
  c.expect_integers("out.perm", order);
  const Matrix<Index> pairs = ring_pairs(layout, ranks, tokens, is_causal);
  c.expect_integers("out.pairs", std::vector<Index>(pairs.data(), pairs.data() + pairs.size()));

  const auto block = [&](Index r, Index s) {
    return static_cast<std::size_t>((r - s + ranks) % ranks);
  };
  Matrix<S> out(tokens, shape.heads * v.cols() / shape.kv_heads), lse(tokens, shape.heads);
  for (Index r = 0; r < ranks; ++r) {
    const auto& mine = held[static_cast<std::size_t>(r)];
    Matrix<S> local_out(local, out.cols()), local_lse(local, lse.cols());
    for (Index s = 0; s < ranks; ++s) {
      const auto& theirs = held[block(r, s)];
      ring_step_forward(rows_at(q, mine), rows_at(k, theirs), rows_at(v, theirs), local_out,
                        local_lse, shape, rule, mine, theirs, s == 0);
    }
    out(mine, Eigen::all) = local_out;
    lse(mine, Eigen::all) = local_lse;
  }
  c.expect("out.out", out);
  c.expect("out.lse", lse);
  if (!c.has("gout.out")) return;
  const Matrix<S> dout = c.matrix("gout.out");
  Matrix<S> dq = Matrix<S>::Zero(tokens, q.cols()), dk = Matrix<S>::Zero(tokens, k.cols()),
            dv = Matrix<S>::Zero(tokens, v.cols());
  for (Index r = 0; r < ranks; ++r) {
    const auto& mine = held[static_cast<std::size_t>(r)];
    Matrix<S> local_dq = Matrix<S>::Zero(local, q.cols());
    for (Index s = 0; s < ranks; ++s) {
      const auto& theirs = held[block(r, s)];
      Matrix<S> block_dk = rows_at(dk, theirs), block_dv = rows_at(dv, theirs);
      ring_step_backward(rows_at(lse, mine), rows_at(q, mine), rows_at(k, theirs),
                         rows_at(v, theirs), rows_at(out, mine), rows_at(dout, mine), local_dq,
                         block_dk, block_dv, shape, rule, mine, theirs);
      dk(theirs, Eigen::all) = block_dk;
      dv(theirs, Eigen::all) = block_dv;
    }
    dq(mine, Eigen::all) = local_dq;
  }
  c.expect("gin.q", dq);
  c.expect("gin.k", dk);
  c.expect("gin.v", dv);
}

}  // namespace

void register_ring(golden::Registry& registry) {
  registry.add("ring_attention", [](auto& c) { ring_attention(c); });
}
