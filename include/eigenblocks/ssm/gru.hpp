// The gated recurrent unit, as a function pair, a step with state, and a cell for the parallel solvers of ssm/deer.hpp.
//
//   r, z = sigmoid(x W_i[r,z] + b_i[r,z] + h W_h[r,z] + b_h[r,z])
//   reset_after    n = tanh(x W_in + b_in + r (h W_hn + b_hn))          PyTorch, cuDNN; default
//   reset_before   n = tanh(x W_in + b_in + (r h) W_hn + b_hn)          Cho et al. 2014, kexue.fm 9783
//   h' = (1 - z) n + z h                                                (Cho and kexue.fm call 1 - z what is z here)
//
//   GruWeights<float> w = ...;                                          // .input I x 3H, .hidden H x 3H, biases 3H; columns r, z, n
//   gru_forward(x, w, h0, out);                                         // x T x I, out T x H
//   gru_backward(x, w, h0, out, dout, dx, dw, dh0);                     // dw a GruWeights; nothing saved but out
//   auto state = gru_state<float>(w);                                   // h = 0
//   gru_step(state, w, x, out);                                         // any number of rows
//   const auto gates = gru_inputs(x, w);                                // x W_i + b_i, T x 3H: the u of the cell
//   deer_forward(gru_cell(w), gates, h0, out);                          // all steps at once
//
// Forward: input products in blocks of rows, then one fused kernel per step (three gates in registers).  Backward recomputes
// the gates of all steps with products (7 T H numbers), runs back through time, and ends with products.  Steps of other
// sizes agree up to the rounding of the input products.  Outputs must not overlap inputs.
// Errors (invalid_argument, nothing written): shapes that do not fit, H < 1.
#pragma once

#include <eigenblocks/ssm/gru_cell.hpp>
#include <eigenblocks/ssm/rnn.hpp>

#include <algorithm>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline constexpr Index kGruBlock = 128;  // rows of input gates held at a time
inline constexpr Index kGruFew = 8;  // up to here rows are projected one by one, without a product

template <RealScalar S>
std::size_t gru_run_bytes(const GruWeights<S>& w, Index rows) {
  return padded_bytes<S>(3 * w.size() * (rows <= kGruFew ? 1 : std::min(rows, kGruBlock))) +
         padded_bytes<S>(w.size());
}

/// All rows of x from the state h, whose memory may be a row before `out`.
template <RealScalar S>
void gru_run(const ConstMatrixRef<S>& x, const GruWeights<S>& w, GruVariant variant, const S* h,
             MatrixRef<S> out, Arena arena, ExecutorRef executor) {
  const Index n = w.size(), rows = x.rows();
  const Index block = rows <= kGruFew ? 1 : std::min(rows, kGruBlock);
  S* const gates = arena.take<S>(3 * n * block);
  S* const scratch = arena.take<S>(n);
  for (Index first = 0; first < rows; first += block) {
    const Index count = std::min(block, rows - first);
    if (block == 1) {
      row_product<S>(x.data() + first * x.outerStride(), x.cols(), w.input.data(), 3 * n,
                     w.input_bias.data(), 3 * n, gates);
    } else {
      gru_inputs<S>(x.middleRows(first, count), w, Eigen::Map<Matrix<S>>(gates, count, 3 * n),
                    executor);
    }
    for (Index t = 0; t < count; ++t) {
      S* const row = out.data() + (first + t) * out.outerStride();
      gru_row<S>(w, variant, h, gates + t * 3 * n, row, scratch);
      h = row;
    }
  }
}

template <RealScalar S>
void require_gru_rows(const GruWeights<S>& w, const GruOptions& options, Index x_rows, Index x_cols,
                      Index h_size, Index out_rows, Index out_cols) {
  require_gru("weights", w, options);
  require_shape("x", x_rows, x_cols, x_rows, w.input.rows(), "any rows, rows of weights.input");
  require_size("initial", h_size, w.size(), "rows of weights.hidden");
  require_shape("out", out_rows, out_cols, x_rows, w.size(), "rows of x, rows of weights.hidden");
}

/// From the gates g of a row (r, z, n, a or r h) and lambda, its gradients with respect to the pre-activations of r, z, n into
/// d (3n), to a (reset_before: to r h) into da, and what goes straight back to h into back.  fresh_t: W_hn^T (reset_before).
template <RealScalar S>
void gru_row_backward(const S* g, const S* h, const S* lambda, Index n, GruVariant variant,
                      const S* fresh_t, S* d, S* da, S* back) {
  const S *r = g, *z = g + n, *fresh = g + 2 * n, *a = g + 3 * n;
  S *dr = d, *dz = d + n, *dfresh = d + 2 * n;
  lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
    const P one = simd::set1<P>(S(1)), up = simd::load<P>(lambda + j);
    const P zj = simd::load<P>(z + j), nj = simd::load<P>(fresh + j), hj = simd::load<P>(h + j);
    const P rest = simd::sub(one, zj);
    const P through = simd::mul(simd::mul(up, rest), simd::fma(simd::neg(nj), nj, one));
    simd::store<P>(dfresh + j, through);
    simd::store<P>(dz + j, simd::mul(simd::mul(up, simd::sub(hj, nj)), simd::mul(zj, rest)));
    simd::store<P>(back + j, simd::mul(up, zj));
    if (variant == GruVariant::reset_after) {
      const P rj = simd::load<P>(r + j);
      const P slope = simd::mul(rj, simd::sub(one, rj));
      simd::store<P>(da + j, simd::mul(through, rj));
      simd::store<P>(dr + j, simd::mul(simd::mul(through, simd::load<P>(a + j)), slope));
    }
  });
  if (variant == GruVariant::reset_after) return;
  row_product<S>(dfresh, n, fresh_t, n, nullptr, n, da);  // the gradient of r h
  lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
    const P rj = simd::load<P>(r + j), hj = simd::load<P>(h + j), dj = simd::load<P>(da + j);
    const P slope = simd::mul(rj, simd::sub(simd::set1<P>(S(1)), rj));
    simd::store<P>(dr + j, simd::mul(simd::mul(dj, hj), slope));
    simd::store<P>(back + j, simd::fma(dj, rj, simd::load<P>(back + j)));
  });
}

/// Gates of all steps and the gradients that are made of them.
template <RealScalar S>
class GruBackward {
 public:
  GruBackward(const ConstMatrixRef<S>& x, const GruWeights<S>& w, const S* initial,
              const ConstMatrixRef<S>& out, const GruOptions& options, ExecutorRef executor)
      : x_(x),
        w_(w),
        initial_(initial),
        out_(out),
        variant_(options.variant),
        executor_(executor),
        transposed_(w.hidden.transpose()),
        gates_(x.rows(), 4 * w.size()),
        inputs_(x.rows(), 3 * w.size()) {
    const Index n = w.size();
    gru_inputs<S>(x, w, inputs_, executor);
    const Index tiles = (x.rows() + kGruBlock - 1) / kGruBlock;
    executor.run(tiles, [&](Index tile, int) {
      const Index first = tile * kGruBlock, rows = std::min(kGruBlock, x.rows() - first);
      Matrix<S> prev(rows, n);
      for (Index t = 0; t < rows; ++t) {
        prev.row(t) = Eigen::Map<const RowVector<S>>(before(first + t), n);
      }
      gru_gates<S>(w, variant_, prev, inputs_.middleRows(first, rows),
                   gates_.middleRows(first, rows));
    });
  }

  /// lambda of every row: dout and what flows back from later steps; or lambda itself (`given`).  Then the parameters.
  void run(const ConstMatrixRef<S>& upstream, bool given, MatrixRef<S> dx, GruWeights<S>& dw,
           S* dinitial) {
    const Index n = w_.size(), rows = x_.rows();
    const bool after = variant_ == GruVariant::reset_after;
    Vector<S> lambda(n), back = Vector<S>::Zero(n), hidden(3 * n);
    for (Index t = rows - 1; t >= 0; --t) {
      S* const d =
          &inputs_(t, 0);  // the input gates are no longer needed: their gradient takes their place
      lambda = upstream.row(t).transpose();
      if (!given) lambda += back;
      gru_row_backward<S>(&gates_(t, 0), before(t), lambda.data(), n, variant_,
                          transposed_.data() + 2 * n * n, d, hidden.data() + 2 * n, back.data());
      if (after) {  // only W_hn's part differs between input and hidden side: it takes a's place
        gates_.row(t).tail(n) = hidden.tail(n).transpose();
      }
      if (given) continue;
      hidden.head(2 * n) = inputs_.row(t).head(2 * n).transpose();
      row_product<S>(hidden.data(), after ? 3 * n : 2 * n, transposed_.data(), n, back.data(), n,
                     back.data());
    }
    if (dinitial != nullptr) std::copy(back.data(), back.data() + n, dinitial);
    parameters(dx, dw);
  }

 private:
  const S* before(Index t) const {
    return t == 0 ? initial_ : out_.data() + (t - 1) * out_.outerStride();
  }

  void parameters(MatrixRef<S> dx, GruWeights<S>& dw) {
    const Index n = w_.size();
    const bool after = variant_ == GruVariant::reset_after;
    linear_backward_input(inputs_, w_.input, dx, executor_);
    linear_backward_weight(x_, inputs_, dw.input, executor_);
    linear_backward_bias(inputs_, dw.input_bias, executor_);
    dw.hidden_bias = dw.input_bias;
    recurrent_weight_gradient<S>(initial_, out_, inputs_.leftCols(2 * n), dw.hidden.leftCols(2 * n),
                                 executor_);
    if (after) {
      linear_backward_bias(gates_.rightCols(n), dw.hidden_bias.tail(n), executor_);
      recurrent_weight_gradient<S>(initial_, out_, gates_.rightCols(n), dw.hidden.rightCols(n),
                                   executor_);
    } else {
      linear_backward_weight(gates_.rightCols(n), inputs_.rightCols(n), dw.hidden.rightCols(n),
                             executor_);
    }
  }

  ConstMatrixRef<S> x_;
  const GruWeights<S>& w_;
  const S* initial_;
  ConstMatrixRef<S> out_;
  GruVariant variant_;
  ExecutorRef executor_;
  Matrix<S> transposed_, gates_, inputs_;
};

template <RealScalar S>
void require_gru_gradients(const GruWeights<S>& w, const GruWeights<S>& dw, Index up_rows,
                           Index up_cols, const char* up_name, Index dx_rows, Index dx_cols,
                           Index rows) {
  const Index n = w.size(), in = w.input.rows();
  require_shape(up_name, up_rows, up_cols, rows, n, "shape of out");
  require_shape("dx", dx_rows, dx_cols, rows, in, "shape of x");
  require_shape("dweights.input", dw.input.rows(), dw.input.cols(), in, 3 * n,
                "shape of weights.input");
  require_shape("dweights.hidden", dw.hidden.rows(), dw.hidden.cols(), n, 3 * n,
                "shape of weights.hidden");
  require_size("dweights.input_bias", dw.input_bias.size(), 3 * n, "3H");
  require_size("dweights.hidden_bias", dw.hidden_bias.size(), 3 * n, "3H");
}

}  // namespace detail

/// Weights of zeros: inputs of `input_size`, states of `size`.  The shape for gradients.
template <RealScalar S>
GruWeights<S> gru_zeros(Index input_size, Index size) {
  return {Matrix<S>::Zero(input_size, 3 * size), Matrix<S>::Zero(size, 3 * size),
          Vector<S>::Zero(3 * size), Vector<S>::Zero(3 * size)};
}

/// All states, one step after the other.
template <MatrixLike X, OutputMatrix O>
  requires SameScalar<X, O> && RealScalar<scalar_t<X>>
void gru_forward(const X& x, const GruWeights<scalar_t<X>>& weights,
                 const ConstVectorRef<scalar_t<X>>& initial, O&& out,
                 const GruOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_gru_rows<S>(weights, options, x.rows(), x.cols(), initial.size(), out.rows(),
                              out.cols());
  Workspace workspace;
  detail::gru_run<S>(x, weights, options.variant, initial.data(), out,
                     workspace.shared(detail::gru_run_bytes(weights, x.rows())), executor);
}

/// Backpropagation through time from the states `out`.  Overwrites dx, dweights (sized by the caller) and dinitial.
template <MatrixLike X, MatrixLike H, MatrixLike G, OutputMatrix DX>
  requires SameScalar<X, H, G, DX> && RealScalar<scalar_t<X>>
void gru_backward(const X& x, const GruWeights<scalar_t<X>>& weights,
                  const ConstVectorRef<scalar_t<X>>& initial, const H& out, const G& dout, DX&& dx,
                  GruWeights<scalar_t<X>>& dweights, VectorRef<scalar_t<X>> dinitial,
                  const GruOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_gru_rows<S>(weights, options, x.rows(), x.cols(), initial.size(), out.rows(),
                              out.cols());
  detail::require_gru_gradients<S>(weights, dweights, dout.rows(), dout.cols(), "dout", dx.rows(),
                                   dx.cols(), x.rows());
  detail::require_size("dinitial", dinitial.size(), weights.size(), "rows of weights.hidden");
  detail::GruBackward<S>(x, weights, initial.data(), out, options, executor)
      .run(dout, false, dx, dweights, dinitial.data());
}

/// The same from lambda = dL/dh_t with all later steps counted in (deer_adjoint, ssm/deer.hpp): products only.
template <MatrixLike X, MatrixLike H, MatrixLike G, OutputMatrix DX>
  requires SameScalar<X, H, G, DX> && RealScalar<scalar_t<X>>
void gru_parameter_gradients(const X& x, const GruWeights<scalar_t<X>>& weights,
                             const ConstVectorRef<scalar_t<X>>& initial, const H& out,
                             const G& lambda, DX&& dx, GruWeights<scalar_t<X>>& dweights,
                             const GruOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_gru_rows<S>(weights, options, x.rows(), x.cols(), initial.size(), out.rows(),
                              out.cols());
  detail::require_gru_gradients<S>(weights, dweights, lambda.rows(), lambda.cols(), "lambda",
                                   dx.rows(), dx.cols(), x.rows());
  detail::GruBackward<S>(x, weights, initial.data(), out, options, executor)
      .run(lambda, true, dx, dweights, nullptr);
}

/// What a step needs of the past: a regular value, a copy is a snapshot.
template <RealScalar S>
struct GruState {
  Vector<S> h;          ///< h_{t-1}
  Workspace scratch{};  ///< not part of the value
  Index size() const { return h.size(); }
};

/// The state 0.
template <RealScalar S>
GruState<S> gru_state(const GruWeights<S>& weights) {
  detail::require_gru("weights", weights, {});
  return {.h = Vector<S>::Zero(weights.size())};
}

/// The rows that follow.  Up to 8 rows allocate nothing once the state has seen a call.
template <MatrixLike X, OutputMatrix O>
  requires SameScalar<X, O> && RealScalar<scalar_t<X>>
void gru_step(GruState<scalar_t<X>>& state, const GruWeights<scalar_t<X>>& weights, const X& x,
              O&& out, const GruOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_gru_rows<S>(weights, options, x.rows(), x.cols(), state.h.size(), out.rows(),
                              out.cols());
  if (x.rows() == 0) return;
  detail::gru_run<S>(x, weights, options.variant, state.h.data(), out,
                     state.scratch.shared(detail::gru_run_bytes(weights, x.rows())), executor);
  state.h = out.row(out.rows() - 1).transpose();
}

EIGENBLOCKS_NAMESPACE_END
