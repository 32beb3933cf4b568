// Gated linear units: the product act(a) * b, and the feed-forward block of LLaMA-like models built on it.
//
//   glu_forward       h = act(a) * b                                   (SwiGLU: act = silu, the default)
//   glu_backward      da = dh * b * act'(a),  db = dh * act(a)
//   glu_ffn_forward   a = x Wg,  b = x Wu,  y = (act(a) * b) Wd
//   glu_ffn_backward  dWd = h^T dy,  dh = dy Wd^T,  dWg = x^T da,  dWu = x^T db,  dx = da Wg^T + db Wu^T
//
// Shapes: x, y T x d; Wg, Wu d x f; Wd f x d_out (d_out = d in models); a, b, h T x f.  No biases.
// Saved between the passes: a and b; h is computed again.  LLaMA takes f = 8 d / 3, rounded, to spend the parameters
// of a plain 4 d block.
//
// The element-wise passes are fused, one read of each input and one write of each output; any output may be the
// memory of any input, outputs must differ.  The FFN takes scratch from a Workspace: 1 (forward) or 2 (backward)
// times T x f, nothing is allocated when it is used again with the same sizes.  Executors do not change a bit.
//
// Errors: invalid_argument where shapes do not fit.
// Source: arXiv 2002.05202.
#pragma once

#include <eigenblocks/core/workspace.hpp>
#include <eigenblocks/nn/activation.hpp>
#include <eigenblocks/nn/linear.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

/// h = act(a) * b; all T x f.
template <MatrixLike A, MatrixLike B, OutputMatrix H>
  requires SameScalar<A, B, H> && RealScalar<scalar_t<A>>
void glu_forward(const A& a, const B& b, H&& h, Activation activation = Activation::silu,
                 ExecutorRef executor = {}) {
  using S = scalar_t<A>;
  detail::require_shape("b", b.rows(), b.cols(), a.rows(), a.cols(), "shape of a");
  detail::require_shape("h", h.rows(), h.cols(), a.rows(), a.cols(), "shape of a");
  const ConstMatrixRef<S> gate(a), up(b);
  MatrixRef<S> to(h);
  detail::with_activation(activation, [&](auto math) {
    detail::for_row_blocks(gate.rows(), gate.cols(), executor, [&](Index first, Index rows) {
      for (Index i = first; i < first + rows; ++i) {
        const S* const ai = gate.row(i).data();
        const S* const bi = up.row(i).data();
        S* const hi = to.row(i).data();
        detail::for_packets<S>(gate.cols(), [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
          io.store(hi + j, simd::mul(decltype(math)::value(io.load(ai + j)), io.load(bi + j)));
        });
      }
    });
  });
}

/// da = dh * b * act'(a) and db = dh * act(a) from the inputs a, b; all T x f.
template <MatrixLike A, MatrixLike B, MatrixLike G, OutputMatrix DA, OutputMatrix DB>
  requires SameScalar<A, B, G, DA, DB> && RealScalar<scalar_t<A>>
void glu_backward(const A& a, const B& b, const G& dh, DA&& da, DB&& db,
                  Activation activation = Activation::silu, ExecutorRef executor = {}) {
  using S = scalar_t<A>;
  using P = simd::Packet<S>;
  detail::require_shape("b", b.rows(), b.cols(), a.rows(), a.cols(), "shape of a");
  detail::require_shape("dh", dh.rows(), dh.cols(), a.rows(), a.cols(), "shape of a");
  detail::require_shape("da", da.rows(), da.cols(), a.rows(), a.cols(), "shape of a");
  detail::require_shape("db", db.rows(), db.cols(), a.rows(), a.cols(), "shape of a");
  const ConstMatrixRef<S> gate(a), up(b), upstream(dh);
  MatrixRef<S> gate_out(da), up_out(db);
  detail::with_activation(activation, [&](auto math) {
    detail::for_row_blocks(gate.rows(), gate.cols(), executor, [&](Index first, Index rows) {
      for (Index i = first; i < first + rows; ++i) {
        const S* const ai = gate.row(i).data();
        const S* const bi = up.row(i).data();
        const S* const gi = upstream.row(i).data();
        S* const dai = gate_out.row(i).data();
        S* const dbi = up_out.row(i).data();
        detail::for_packets<S>(gate.cols(), [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
          P value, slope;
          decltype(math)::both(io.load(ai + j), value, slope);
          const P g = io.load(gi + j), factor = io.load(bi + j);
          io.store(dai + j, simd::mul(simd::mul(g, factor), slope));
          io.store(dbi + j, simd::mul(g, value));
        });
      }
    });
  });
}

struct GluFfnOptions {
  Activation activation = Activation::silu;
};

/// What the backward pass needs besides the operands: the two pre-activations, T x f each.
template <RealScalar S>
struct GluFfnSaved {
  Matrix<S> gate, up;
};

namespace detail {

template <class X, class G, class U, class D>
void require_glu_ffn(const X& x, const G& w_gate, const U& w_up, const D& w_down) {
  require(w_gate.rows() == x.cols(), "w_gate has ", w_gate.rows(), " rows, x has ", x.cols(),
          " cols");
  require_shape("w_up", w_up.rows(), w_up.cols(), w_gate.rows(), w_gate.cols(), "shape of w_gate");
  require(w_down.rows() == w_gate.cols(), "w_down has ", w_down.rows(), " rows, w_gate has ",
          w_gate.cols(), " cols");
}

template <RealScalar S>
Eigen::Map<Matrix<S>> take_matrix(Arena& arena, Index rows, Index cols) {
  return Eigen::Map<Matrix<S>>(arena.take<S>(rows * cols), rows, cols);
}

}  // namespace detail

/// y = (act(x Wg) * (x Wu)) Wd; leaves the pre-activations in saved.
template <MatrixLike X, MatrixLike G, MatrixLike U, MatrixLike D, OutputMatrix Y>
  requires SameScalar<X, G, U, D, Y> && RealScalar<scalar_t<X>>
void glu_ffn_forward(const X& x, const G& w_gate, const U& w_up, const D& w_down, Y&& y,
                     GluFfnSaved<scalar_t<X>>& saved, Workspace& workspace,
                     const GluFfnOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_glu_ffn(x, w_gate, w_up, w_down);
  detail::require_shape("y", y.rows(), y.cols(), x.rows(), w_down.cols(),
                        "rows of x, cols of w_down");
  const Index tokens = x.rows(), width = w_gate.cols();
  saved.gate.resize(tokens, width);
  saved.up.resize(tokens, width);
  detail::Arena arena = workspace.shared(detail::padded_bytes<S>(tokens * width));
  auto hidden = detail::take_matrix<S>(arena, tokens, width);
  linear_forward(x, w_gate, saved.gate, executor);
  linear_forward(x, w_up, saved.up, executor);
  glu_forward(saved.gate, saved.up, hidden, options.activation, executor);
  linear_forward(hidden, w_down, y, executor);
}

/// The same by value, for inference.
template <MatrixLike X, MatrixLike G, MatrixLike U, MatrixLike D>
  requires SameScalar<X, G, U, D> && RealScalar<scalar_t<X>> Matrix<scalar_t<X>> glu_ffn(
      const X& x, const G& w_gate, const U& w_up, const D& w_down,
      const GluFfnOptions& options = {}) {
    Matrix<scalar_t<X>> y(x.rows(), w_down.cols());
    GluFfnSaved<scalar_t<X>> saved;
    Workspace workspace;
    glu_ffn_forward(x, w_gate, w_up, w_down, y, saved, workspace, options);
    return y;
  }

/// All gradients from saved, the operands of the forward pass, and dy; each has the shape of what it is the gradient
/// of.
template <MatrixLike X, MatrixLike G, MatrixLike U, MatrixLike D, MatrixLike DY, OutputMatrix DX,
          OutputMatrix DG, OutputMatrix DU, OutputMatrix DD>
  requires SameScalar<X, G, U, D, DY, DX, DG, DU, DD> && RealScalar<scalar_t<X>>
void glu_ffn_backward(const GluFfnSaved<scalar_t<X>>& saved, const X& x, const G& w_gate,
                      const U& w_up, const D& w_down, const DY& dy, DX&& dx, DG&& dw_gate,
                      DU&& dw_up, DD&& dw_down, Workspace& workspace,
                      const GluFfnOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const Index tokens = x.rows(), width = w_gate.cols();
  detail::require_glu_ffn(x, w_gate, w_up, w_down);
  const auto require = [](const char* name, const auto& m, Index rows, Index cols,
                          const char* why) {
    detail::require_shape(name, m.rows(), m.cols(), rows, cols, why);
  };
  require("saved.gate", saved.gate, tokens, width, "rows of x, cols of w_gate");
  require("saved.up", saved.up, tokens, width, "rows of x, cols of w_gate");
  require("dy", dy, tokens, w_down.cols(), "rows of x, cols of w_down");
  require("dx", dx, tokens, x.cols(), "shape of x");
  require("dw_gate", dw_gate, w_gate.rows(), width, "shape of w_gate");
  require("dw_up", dw_up, w_up.rows(), width, "shape of w_up");
  require("dw_down", dw_down, w_down.rows(), w_down.cols(), "shape of w_down");

  detail::Arena arena = workspace.shared(2 * detail::padded_bytes<S>(tokens * width));
  auto first = detail::take_matrix<S>(arena, tokens, width);   // h, then dh, then da
  auto second = detail::take_matrix<S>(arena, tokens, width);  // db
  glu_forward(saved.gate, saved.up, first, options.activation, executor);
  linear_backward_weight(first, dy, dw_down, executor);
  linear_backward_input(dy, w_down, first, executor);
  glu_backward(saved.gate, saved.up, first, first, second, options.activation, executor);
  linear_backward_weight(x, first, dw_gate, executor);
  linear_backward_weight(x, second, dw_up, executor);
  linear_backward_input(first, w_gate, dx, executor);
  linear_accumulate_input(second, w_up, dx, executor);
}

EIGENBLOCKS_NAMESPACE_END
