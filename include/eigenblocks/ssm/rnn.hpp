// The tanh RNN (Elman), as a function pair, a step with state, and a cell for the parallel solvers of ssm/deer.hpp.
//
//   x_t = tanh(x_{t-1} W + u_t)              rows; u is the projected input, bias included (linear_forward)
//
//   rnn_tanh_forward(u, weight, initial, out);
//   rnn_tanh_backward(weight, initial, out, dout, du, dweight, dinitial);         // through time; nothing saved but out
//   auto state = rnn_tanh_state<float>(weight.rows());                            // x_{-1} = 0, or from a vector
//   rnn_tanh_step(state, weight, u, out);                                         // any number of rows
//   deer_forward(tanh_cell(weight), u, initial, out);                             // all steps at once
//
//   u, out, dout, du T x N    weight, dweight N x N    initial, dinitial N
//
// A chunk, a step and the whole give the same bits: they are one kernel, a row times W in registers with the tanh
// on top.  Outputs must not overlap inputs.  The weight gradient is one product, cut by shape over the executor.
// Errors (invalid_argument, nothing written): N < 1, a weight that is not square, shapes that do not fit.
// Sources: Elman 1990; kexue.fm 9783, whose A is W^T.
#pragma once

#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/ssm/recurrent_cell.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// out = tanh(x W + u), one row.
template <RealScalar S>
EIGENBLOCKS_NOINLINE void tanh_rnn_row(const S* x, const ConstMatrixRef<S>& weight, const S* u,
                                       S* out) {
  const GateRows<S, 1> in{{x}, {weight.data()}, {u}, weight.rows(), weight.outerStride()};
  gate_rows<S, 1>(in, weight.cols(),
                  [&]<class P>(Index j, const P(&sum)[1])
                      EIGENBLOCKS_INLINE_LAMBDA { simd::store<P>(out + j, simd::tanh(sum[0])); });
}

template <RealScalar S>
void tanh_rnn_rows(const ConstMatrixRef<S>& u, const ConstMatrixRef<S>& weight, const S* before,
                   MatrixRef<S> out) {
  for (Index t = 0; t < u.rows(); ++t) {
    S* const row = out.data() + t * out.outerStride();
    tanh_rnn_row<S>(before, weight, u.data() + t * u.outerStride(), row);
    before = row;
  }
}

template <RealScalar S>
void require_tanh_rnn(Index rows, Index cols) {
  require(rows >= 1, "weight is ", rows, " x ", cols, ", expected at least 1 x 1");
  require_shape("weight", rows, cols, rows, rows, "a square matrix");
}

/// dweight = prev^T delta, prev = the initial state and then all rows of x but the last.
template <RealScalar S>
void recurrent_weight_gradient(const S* initial, const ConstMatrixRef<S>& x,
                               const ConstMatrixRef<S>& delta, MatrixRef<S> dweight,
                               ExecutorRef executor) {
  const Index t = x.rows(), n = x.cols();
  if (t <= 1) {
    dweight.setZero();
  } else {
    linear_backward_weight(x.topRows(t - 1), delta.bottomRows(t - 1), dweight, executor);
  }
  if (t == 0) return;
  for (Index i = 0; i < n; ++i) dweight.row(i) += initial[i] * delta.row(0);
}

}  // namespace detail

/// The tanh RNN as a RecurrentCell.  Refers to the weight it was made of (tanh_cell); u is the projected input.
template <RealScalar S>
class TanhCell {
 public:
  using Scalar = S;
  explicit TanhCell(const ConstMatrixRef<S>& weight)
      : weight_(weight), transposed_(weight.transpose()) {}

  Index size() const { return weight_.rows(); }
  Index input_size() const { return weight_.rows(); }

  void forward(const ConstMatrixRef<S>& prev, const ConstMatrixRef<S>& u, MatrixRef<S> out) const {
    detail::product_nn<S>(prev, weight_, out);
    for (Index t = 0; t < out.rows(); ++t) {
      S* const row = out.data() + t * out.outerStride();
      const S* const input = u.data() + t * u.outerStride();
      detail::lanes_of<S>(size(), [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<P>(row + j,
                       simd::tanh(simd::add(simd::load<P>(row + j), simd::load<P>(input + j))));
      });
    }
  }

  /// diag(1 - out^2) W^T for every row.
  void jacobian(const ConstMatrixRef<S>&, const ConstMatrixRef<S>&, const ConstMatrixRef<S>& out,
                MatrixRef<S> jacobian) const {
    const Index n = size();
    for (Index t = 0; t < out.rows(); ++t) {
      for (Index i = 0; i < n; ++i) {
        const S slope = S(1) - out(t, i) * out(t, i);
        S* const row = jacobian.data() + t * jacobian.outerStride() + i * n;
        const S* const from = transposed_.data() + i * n;
        detail::lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
          simd::store<P>(row + j, simd::mul(simd::set1<P>(slope), simd::load<P>(from + j)));
        });
      }
    }
  }

  void jacobian_diagonal(const ConstMatrixRef<S>&, const ConstMatrixRef<S>&,
                         const ConstMatrixRef<S>& out, MatrixRef<S> diagonal) const {
    for (Index t = 0; t < out.rows(); ++t) {
      diagonal.row(t).array() =
          (S(1) - out.row(t).array().square()) * weight_.diagonal().transpose().array();
    }
  }

  Index tangent_size() const { return size(); }
  /// 1 - out^2.
  void tangents(const ConstMatrixRef<S>&, const ConstMatrixRef<S>&, const ConstMatrixRef<S>& out,
                MatrixRef<S> slopes) const {
    for (Index t = 0; t < out.rows(); ++t) {
      slopes.row(t).array() = S(1) - out.row(t).array().square();
    }
  }
  void multiply(const S* slope, const S* v, S* y, S* tmp) const {
    const Index n = size();
    detail::row_product<S>(v, n, weight_.data(), weight_.outerStride(), nullptr, n, tmp);
    for (Index i = 0; i < n; ++i) y[i] += slope[i] * tmp[i];
  }
  void multiply_transposed(const S* slope, const S* v, S* y, S* tmp) const {
    const Index n = size();
    for (Index i = 0; i < n; ++i) tmp[i] = slope[i] * v[i];
    detail::row_product<S>(tmp, n, transposed_.data(), n, y, n, y);
  }

  /// W^T, the Jacobian near 0 (kexue.fm 9783, first form).
  void constant_jacobian(MatrixRef<S> jacobian) const { jacobian = transposed_; }

  void sequential(const ConstMatrixRef<S>& u, const S* initial, MatrixRef<S> out) const {
    detail::tanh_rnn_rows<S>(u, weight_, initial, out);
  }

 private:
  ConstMatrixRef<S> weight_;
  Matrix<S> transposed_;
};

/// The cell of x_t = tanh(x_{t-1} W + u_t); `weight` must outlive it.  Errors: weight not square or empty.
template <MatrixLike W>
  requires RealScalar<scalar_t<W>> TanhCell<scalar_t<W>> tanh_cell(const W& weight) {
    detail::require_tanh_rnn<scalar_t<W>>(weight.rows(), weight.cols());
    return TanhCell<scalar_t<W>>(weight);
  }

/// All states, one step after the other.
template <MatrixLike U, MatrixLike W, OutputMatrix O>
  requires SameScalar<U, W, O> && RealScalar<scalar_t<U>>
void rnn_tanh_forward(const U& u, const W& weight, const ConstVectorRef<scalar_t<U>>& initial,
                      O&& out) {
  using S = scalar_t<U>;
  detail::require_tanh_rnn<S>(weight.rows(), weight.cols());
  detail::require_shape("u", u.rows(), u.cols(), u.rows(), weight.rows(),
                        "any rows, rows of weight");
  detail::require_size("initial", initial.size(), weight.rows(), "rows of weight");
  detail::require_shape("out", out.rows(), out.cols(), u.rows(), weight.rows(), "shape of u");
  detail::tanh_rnn_rows<S>(u, weight, initial.data(), out);
}

/// Gradients of the parameters from lambda = dL/dx_t with all later steps counted in (deer_adjoint, ssm/deer.hpp):
/// du = (1 - x^2) lambda and dW = prev^T du.  Overwrites du and dweight.
template <MatrixLike X, MatrixLike L, OutputMatrix DU, OutputMatrix DW>
  requires SameScalar<X, L, DU, DW> && RealScalar<scalar_t<X>>
void rnn_tanh_parameter_gradients(const ConstVectorRef<scalar_t<X>>& initial, const X& out,
                                  const L& lambda, DU&& du, DW&& dweight,
                                  ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const Index n = out.cols();
  detail::require_size("initial", initial.size(), n, "cols of out");
  detail::require_shape("lambda", lambda.rows(), lambda.cols(), out.rows(), n, "shape of out");
  detail::require_shape("du", du.rows(), du.cols(), out.rows(), n, "shape of out");
  detail::require_shape("dweight", dweight.rows(), dweight.cols(), n, n, "cols of out, twice");
  for (Index t = 0; t < out.rows(); ++t) {
    du.row(t).array() = (S(1) - out.row(t).array().square()) * lambda.row(t).array();
  }
  detail::recurrent_weight_gradient<S>(initial.data(), out, du, dweight, executor);
}

/// Backpropagation through time from the states `out`.  Overwrites du, dweight and dinitial.
template <MatrixLike W, MatrixLike X, MatrixLike G, OutputMatrix DU, OutputMatrix DW>
  requires SameScalar<W, X, G, DU, DW> && RealScalar<scalar_t<X>>
void rnn_tanh_backward(const W& weight, const ConstVectorRef<scalar_t<X>>& initial, const X& out,
                       const G& dout, DU&& du, DW&& dweight, VectorRef<scalar_t<X>> dinitial,
                       ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const Index n = weight.rows(), tokens = out.rows();
  detail::require_tanh_rnn<S>(n, weight.cols());
  detail::require_size("initial", initial.size(), n, "rows of weight");
  detail::require_shape("out", tokens, out.cols(), tokens, n, "any rows, rows of weight");
  detail::require_shape("dout", dout.rows(), dout.cols(), tokens, n, "shape of out");
  detail::require_shape("du", du.rows(), du.cols(), tokens, n, "shape of out");
  detail::require_shape("dweight", dweight.rows(), dweight.cols(), n, n, "shape of weight");
  detail::require_size("dinitial", dinitial.size(), n, "rows of weight");
  const ConstMatrixRef<S> x = out, upstream = dout;
  MatrixRef<S> delta = du;
  const Matrix<S> transposed = weight.transpose();
  if (tokens == 0) dinitial.setZero();
  for (Index t = tokens - 1; t >= 0; --t) {
    // lambda_t = dout_t + delta_{t+1} W^T;  delta_t = (1 - x_t^2) lambda_t
    if (t == tokens - 1) {
      delta.row(t) = upstream.row(t);
    } else {
      detail::row_product<S>(&delta.coeffRef(t + 1, 0), n, transposed.data(), n,
                             upstream.data() + t * upstream.outerStride(), n,
                             &delta.coeffRef(t, 0));
    }
    delta.row(t).array() *= S(1) - x.row(t).array().square();
  }
  if (tokens > 0) {
    detail::row_product<S>(delta.data(), n, transposed.data(), n, nullptr, n, dinitial.data());
  }
  detail::recurrent_weight_gradient<S>(initial.data(), x, delta, dweight, executor);
}

/// What a step needs of the past: a regular value, a copy is a snapshot.
template <RealScalar S>
struct RnnTanhState {
  Vector<S> x;  ///< x_{t-1}
  Index size() const { return x.size(); }
};

/// The state 0.
template <RealScalar S>
RnnTanhState<S> rnn_tanh_state(Index size) {
  detail::require(size >= 1, "rnn_tanh_state: size (", size, ") must be at least 1");
  return {Vector<S>::Zero(size)};
}

/// The rows that follow; allocates nothing.
template <MatrixLike U, MatrixLike W, OutputMatrix O>
  requires SameScalar<U, W, O> && RealScalar<scalar_t<U>>
void rnn_tanh_step(RnnTanhState<scalar_t<U>>& state, const W& weight, const U& u, O&& out) {
  rnn_tanh_forward(u, weight, state.x, out);
  if (u.rows() > 0) state.x = out.row(out.rows() - 1).transpose();
}

EIGENBLOCKS_NAMESPACE_END
