// Inside of gru.hpp: the parameters of a GRU, one step of it, and the cell with its Jacobian.
//
// With a = h W_hn + b_hn and everything at the previous state h,
//   dh'/dh = diag(z) + diag((h - n) z (1 - z)) W_hz^T + diag((1 - z)(1 - n^2)) N
//   N = diag(r) W_hn^T + diag(a r (1 - r)) W_hr^T                 reset_after, H^2 a step
//   N = W_hn^T (diag(r) + diag(h r (1 - r)) W_hr^T)               reset_before, H^3 a step (the diagonal H^2)
#pragma once

#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/ssm/recurrent_cell.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class GruVariant {
  reset_after,  ///< the reset gate behind the product with W_hn
  reset_before  ///< in front of it
};

/// Parameters, or their gradients.  Column blocks of H: r, z, n.
template <RealScalar S>
struct GruWeights {
  Matrix<S> input;        ///< I x 3H
  Matrix<S> hidden;       ///< H x 3H
  Vector<S> input_bias;   ///< 3H
  Vector<S> hidden_bias;  ///< 3H

  Index size() const { return hidden.rows(); }
};

struct GruOptions {
  GruVariant variant = GruVariant::reset_after;
};

namespace detail {

template <RealScalar S>
void require_gru(const char* name, const GruWeights<S>& w, const GruOptions& options) {
  const Index h = w.hidden.rows();
  require(options.variant == GruVariant::reset_after || options.variant == GruVariant::reset_before,
          "variant (", options.variant, ") is not a GruVariant");
  require(h >= 1, name, ".hidden has ", h, " rows, expected at least 1");
  require(w.hidden.cols() == 3 * h, name, ".hidden is ", h, " x ", w.hidden.cols(), ", expected ",
          h, " x ", 3 * h, " (H, 3H)");
  require(w.input.cols() == 3 * h, name, ".input has ", w.input.cols(), " columns, expected ",
          3 * h, " (3H)");
  require(w.input_bias.size() == 3 * h, name, ".input_bias has ", w.input_bias.size(),
          " entries, expected ", 3 * h, " (3H)");
  require(w.hidden_bias.size() == 3 * h, name, ".hidden_bias has ", w.hidden_bias.size(),
          " entries, expected ", 3 * h, " (3H)");
}

/// h' of one row; `inputs` are its 3H input gates, `scratch` H numbers (reset_before only).
template <RealScalar S>
EIGENBLOCKS_NOINLINE void gru_row(const GruWeights<S>& w, GruVariant variant, const S* h,
                                  const S* inputs, S* out, S* scratch) {
  const Index n = w.size(), stride = 3 * n;
  const S *weight = w.hidden.data(), *bias = w.hidden_bias.data();
  if (variant == GruVariant::reset_after) {
    const GateRows<S, 3> in{
        {h, h, h}, {weight, weight + n, weight + 2 * n}, {bias, bias + n, bias + 2 * n}, n, stride};
    gate_rows<S, 3>(in, n, [&]<class P>(Index j, const P(&sum)[3]) EIGENBLOCKS_INLINE_LAMBDA {
      P keep, rest;
      const P r = simd::sigmoid(simd::add(sum[0], simd::load<P>(inputs + j)));
      simd::sigmoid_pair(simd::add(sum[1], simd::load<P>(inputs + n + j)), keep, rest);
      const P fresh = simd::tanh(simd::fma(r, sum[2], simd::load<P>(inputs + 2 * n + j)));
      simd::store<P>(out + j, simd::fma(keep, simd::load<P>(h + j), simd::mul(rest, fresh)));
    });
    return;
  }
  row_product<S>(h, n, weight, stride, bias, n, scratch);
  lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
    const P r = simd::sigmoid(simd::add(simd::load<P>(scratch + j), simd::load<P>(inputs + j)));
    simd::store<P>(scratch + j, simd::mul(r, simd::load<P>(h + j)));
  });
  const GateRows<S, 2> in{
      {h, scratch}, {weight + n, weight + 2 * n}, {bias + n, bias + 2 * n}, n, stride};
  gate_rows<S, 2>(in, n, [&]<class P>(Index j, const P(&sum)[2]) EIGENBLOCKS_INLINE_LAMBDA {
    P keep, rest;
    simd::sigmoid_pair(simd::add(sum[0], simd::load<P>(inputs + n + j)), keep, rest);
    const P fresh = simd::tanh(simd::add(sum[1], simd::load<P>(inputs + 2 * n + j)));
    simd::store<P>(out + j, simd::fma(keep, simd::load<P>(h + j), simd::mul(rest, fresh)));
  });
}

/// The gates of many rows: r, z, n and, in the last H of 4H columns, h W_hn + b_hn (reset_after) or r h (reset_before).
template <RealScalar S>
void gru_gates(const GruWeights<S>& w, GruVariant variant, const ConstMatrixRef<S>& prev,
               const ConstMatrixRef<S>& inputs, MatrixRef<S> gates) {
  const Index n = w.size(), rows = prev.rows();
  const bool after = variant == GruVariant::reset_after;
  const S* const bias = w.hidden_bias.data();
  product_nn<S>(prev, w.hidden.leftCols(after ? 3 * n : 2 * n),
                gates.leftCols(after ? 3 * n : 2 * n));
  const auto row_of = [](auto& m, Index t) { return m.data() + t * m.outerStride(); };
  for (Index t = 0; t < rows; ++t) {
    S* const g = row_of(gates, t);
    const S *const in = row_of(inputs, t), *const h = row_of(prev, t);
    lanes_of<S>(2 * n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
      const P sum = simd::add(simd::load<P>(g + j), simd::load<P>(bias + j));
      simd::store<P>(g + j, simd::sigmoid(simd::add(sum, simd::load<P>(in + j))));
    });
    lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
      const P r = simd::load<P>(g + j);
      if (after) {
        const P a = simd::add(simd::load<P>(g + 2 * n + j), simd::load<P>(bias + 2 * n + j));
        simd::store<P>(g + 3 * n + j, a);
        simd::store<P>(g + 2 * n + j, simd::tanh(simd::fma(r, a, simd::load<P>(in + 2 * n + j))));
      } else {
        simd::store<P>(g + 3 * n + j, simd::mul(r, simd::load<P>(h + j)));
      }
    });
  }
  if (after) return;
  product_nn<S>(gates.rightCols(n), w.hidden.rightCols(n), gates.middleCols(2 * n, n));
  for (Index t = 0; t < rows; ++t) {
    S* const g = row_of(gates, t) + 2 * n;
    const S* const in = row_of(inputs, t) + 2 * n;
    lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
      const P sum = simd::add(simd::load<P>(g + j), simd::load<P>(bias + 2 * n + j));
      simd::store<P>(g + j, simd::tanh(simd::add(sum, simd::load<P>(in + j))));
    });
  }
}

template <RealScalar S>
void gru_inputs(const ConstMatrixRef<S>& x, const GruWeights<S>& w, MatrixRef<S> gates,
                ExecutorRef executor) {
  linear_forward(x, w.input, w.input_bias, gates, executor);
}

}  // namespace detail

/// The GRU as a RecurrentCell over input gates u = gru_inputs(x, weights), T x 3H.  Refers to the weights it was made of.
template <RealScalar S>
class GruCell {
 public:
  using Scalar = S;
  GruCell(const GruWeights<S>& weights, const GruOptions& options)
      : w_(&weights), variant_(options.variant), transposed_(weights.hidden.transpose()) {
    const Index n = size();
    if (variant_ == GruVariant::reset_before) {  // W_hn(k, i) W_hr(i, k), for the diagonal
      cross_ = transposed_.bottomRows(n).transpose().cwiseProduct(transposed_.topRows(n));
    }
  }

  Index size() const { return w_->size(); }
  Index input_size() const { return 3 * w_->size(); }
  Index scratch_size(Index rows) const { return (4 * rows + 1) * size(); }

  void forward(const ConstMatrixRef<S>& prev, const ConstMatrixRef<S>& u, MatrixRef<S> out,
               S* scratch) const {
    const Index n = size();
    Eigen::Map<Matrix<S>> gates(scratch, prev.rows(), 4 * n);
    detail::gru_gates<S>(*w_, variant_, prev, u, gates);
    for (Index t = 0; t < prev.rows(); ++t) {
      const auto z = gates.row(t).segment(n, n).array();
      out.row(t).array() =
          (S(1) - z) * gates.row(t).segment(2 * n, n).array() + z * prev.row(t).array();
    }
  }

  void jacobian(const ConstMatrixRef<S>& prev, const ConstMatrixRef<S>&, const ConstMatrixRef<S>&,
                MatrixRef<S> jacobian, S* scratch) const {
    const Index n = size();
    S* const factors = scratch + 4 * prev.rows() * n;
    for (Index t = 0; t < prev.rows(); ++t) {
      const Row g = row(prev, scratch, t);
      if (variant_ == GruVariant::reset_before) {
        for (Index k = 0; k < n; ++k) factors[k] = g.h[k] * g.r[k] * (S(1) - g.r[k]);
      }
      for (Index i = 0; i < n; ++i) {
        S* const to = jacobian.data() + t * jacobian.outerStride() + i * n;
        const S update = g.update_slope(i), fresh = g.fresh_slope(i);
        const S* const by_reset = transposed_.data() + i * n;
        const S *const by_update = by_reset + n * n, *const by_fresh = by_reset + 2 * n * n;
        if (variant_ == GruVariant::reset_after) {
          const S through = fresh * g.r[i], reset = fresh * g.a[i] * g.r[i] * (S(1) - g.r[i]);
          detail::lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
            P sum = simd::mul(simd::set1<P>(update), simd::load<P>(by_update + j));
            sum = simd::fma(simd::set1<P>(through), simd::load<P>(by_fresh + j), sum);
            sum = simd::fma(simd::set1<P>(reset), simd::load<P>(by_reset + j), sum);
            simd::store<P>(to + j, sum);
          });
        } else {
          detail::lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
            const P through = simd::mul(simd::load<P>(g.r + j), simd::load<P>(by_fresh + j));
            const P sum = simd::mul(simd::set1<P>(update), simd::load<P>(by_update + j));
            simd::store<P>(to + j, simd::fma(simd::set1<P>(fresh), through, sum));
          });
          // sum over k of W_hn(k, i) (h r (1 - r))_k W_hr(j, k)
          for (Index k = 0; k < n; ++k) {
            const S weight = fresh * by_fresh[k] * factors[k];
            const S* const from = transposed_.data() + k * n;
            detail::lanes_of<S>(n, [&]<class P>(Index j, P) EIGENBLOCKS_INLINE_LAMBDA {
              simd::store<P>(to + j, simd::fma(simd::set1<P>(weight), simd::load<P>(from + j),
                                               simd::load<P>(to + j)));
            });
          }
        }
        to[i] += g.z[i];
      }
    }
  }

  void jacobian_diagonal(const ConstMatrixRef<S>& prev, const ConstMatrixRef<S>&,
                         const ConstMatrixRef<S>&, MatrixRef<S> diagonal, S* scratch) const {
    const Index n = size();
    S* const factors = scratch + 4 * prev.rows() * n;
    const auto weight = [&](Index gate, Index i) { return w_->hidden(i, gate * n + i); };
    for (Index t = 0; t < prev.rows(); ++t) {
      const Row g = row(prev, scratch, t);
      S* const to = diagonal.data() + t * diagonal.outerStride();
      if (variant_ == GruVariant::reset_before) {
        for (Index k = 0; k < n; ++k) factors[k] = g.h[k] * g.r[k] * (S(1) - g.r[k]);
        detail::row_product<S>(factors, n, cross_.data(), n, nullptr, n, to);
      } else {
        for (Index i = 0; i < n; ++i) to[i] = g.a[i] * g.r[i] * (S(1) - g.r[i]) * weight(0, i);
      }
      for (Index i = 0; i < n; ++i) {
        to[i] = g.z[i] + g.update_slope(i) * weight(1, i) +
                g.fresh_slope(i) * (g.r[i] * weight(2, i) + to[i]);
      }
    }
  }

  Index tangent_size() const { return 5 * size(); }
  /// Per row: z, (h - n) z (1 - z), (1 - z)(1 - n^2), r, and a r (1 - r) or (reset_before) h r (1 - r).
  void tangents(const ConstMatrixRef<S>& prev, const ConstMatrixRef<S>&, const ConstMatrixRef<S>&,
                MatrixRef<S> k, const S* scratch) const {
    const Index n = size();
    for (Index t = 0; t < prev.rows(); ++t) {
      const Row g = row(prev, scratch, t);
      const S* const inside = variant_ == GruVariant::reset_after ? g.a : g.h;
      S* const to = k.data() + t * k.outerStride();
      for (Index i = 0; i < n; ++i) {
        to[i] = g.z[i];
        to[n + i] = g.update_slope(i);
        to[2 * n + i] = g.fresh_slope(i);
        to[3 * n + i] = g.r[i];
        to[4 * n + i] = inside[i] * g.r[i] * (S(1) - g.r[i]);
      }
    }
  }
  void multiply(const S* k, const S* v, S* y, S* tmp) const {
    const Index n = size();
    const S *const w = w_->hidden.data(), *const z = k, *const update = k + n;
    const S* const fresh = k + 2 * n;
    const S *const r = k + 3 * n, *const reset = k + 4 * n;
    if (variant_ == GruVariant::reset_after) {
      const detail::GateRows<S, 3> in{
          {v, v, v}, {w, w + n, w + 2 * n}, {nullptr, nullptr, nullptr}, n, 3 * n};
      detail::gate_rows<S, 3>(
          in, n, [&]<class P>(Index j, const P(&sum)[3]) EIGENBLOCKS_INLINE_LAMBDA {
            const P inner = simd::fma(simd::load<P>(r + j), sum[2],
                                      simd::mul(simd::load<P>(reset + j), sum[0]));
            P total = simd::fma(simd::load<P>(z + j), simd::load<P>(v + j), simd::load<P>(y + j));
            total = simd::fma(simd::load<P>(update + j), sum[1], total);
            simd::store<P>(y + j, simd::fma(simd::load<P>(fresh + j), inner, total));
          });
      return;
    }
    S *const inner = tmp, *const sum = tmp + n;
    detail::row_product<S>(v, n, w, 3 * n, nullptr, n, inner);
    detail::row_product<S>(v, n, w + n, 3 * n, nullptr, n, sum);
    for (Index i = 0; i < n; ++i) {
      inner[i] = r[i] * v[i] + reset[i] * inner[i];
      y[i] += z[i] * v[i] + update[i] * sum[i];
    }
    detail::row_product<S>(inner, n, w + 2 * n, 3 * n, nullptr, n, sum);
    for (Index i = 0; i < n; ++i) y[i] += fresh[i] * sum[i];
  }
  void multiply_transposed(const S* k, const S* v, S* y, S* tmp) const {
    const Index n = size();
    const S *const z = k, *const update = k + n, *const fresh = k + 2 * n;
    const S *const r = k + 3 * n, *const reset = k + 4 * n;
    const S* const wt = transposed_.data();  // rows: r, z, n
    const auto add = [&](Index gate) {
      detail::row_product<S>(tmp, n, wt + gate * n * n, n, y, n, y);
    };
    for (Index i = 0; i < n; ++i) y[i] += z[i] * v[i];
    for (Index i = 0; i < n; ++i) tmp[i] = update[i] * v[i];
    add(1);
    if (variant_ == GruVariant::reset_after) {
      for (Index i = 0; i < n; ++i) tmp[i] = fresh[i] * r[i] * v[i];
      add(2);
      for (Index i = 0; i < n; ++i) tmp[i] = fresh[i] * reset[i] * v[i];
      add(0);
      return;
    }
    for (Index i = 0; i < n; ++i) tmp[i] = fresh[i] * v[i];
    S* const inner = tmp + n;  // the gradient of r h
    detail::row_product<S>(tmp, n, wt + 2 * n * n, n, nullptr, n, inner);
    for (Index i = 0; i < n; ++i) y[i] += r[i] * inner[i];
    for (Index i = 0; i < n; ++i) tmp[i] = reset[i] * inner[i];
    add(0);
  }

  /// (I + W_hn^T / 2) / 2: all gates 1/2 and n in its linear range (kexue.fm 9783).
  void constant_jacobian(MatrixRef<S> jacobian) const {
    jacobian = S(0.25) * transposed_.bottomRows(size());
    jacobian.diagonal().array() += S(0.5);
  }

  void sequential(const ConstMatrixRef<S>& u, const S* h, MatrixRef<S> out) const {
    Vector<S> scratch(variant_ == GruVariant::reset_before ? size() : 0);
    for (Index t = 0; t < u.rows(); ++t) {
      S* const row = out.data() + t * out.outerStride();
      detail::gru_row<S>(*w_, variant_, h, u.data() + t * u.outerStride(), row, scratch.data());
      h = row;
    }
  }

 private:
  struct Row {
    const S *h, *r, *z, *fresh, *a;
    S update_slope(Index i) const { return (h[i] - fresh[i]) * z[i] * (S(1) - z[i]); }
    S fresh_slope(Index i) const { return (S(1) - z[i]) * (S(1) - fresh[i] * fresh[i]); }
  };
  Row row(const ConstMatrixRef<S>& prev, const S* gates, Index t) const {
    const Index n = size();
    const S* const g = gates + t * 4 * n;
    return {prev.data() + t * prev.outerStride(), g, g + n, g + 2 * n, g + 3 * n};
  }

  const GruWeights<S>* w_;
  GruVariant variant_;
  Matrix<S> transposed_, cross_;
};

/// The cell; `weights` must outlive it.
template <RealScalar S>
GruCell<S> gru_cell(const GruWeights<S>& weights, const GruOptions& options = {}) {
  detail::require_gru("weights", weights, options);
  return GruCell<S>(weights, options);
}

/// x W_i + b_i, T x 3H.
template <MatrixLike X>
  requires RealScalar<scalar_t<X>> Matrix<scalar_t<X>> gru_inputs(
      const X& x, const GruWeights<scalar_t<X>>& weights, ExecutorRef executor = {}) {
    Matrix<scalar_t<X>> gates(x.rows(), weights.input.cols());
    detail::gru_inputs<scalar_t<X>>(x, weights, gates, executor);
    return gates;
  }

EIGENBLOCKS_NAMESPACE_END
