// Stochastic gradient descent with momentum (torch.optim.SGD).
//
//   d   = g + weight_decay w                             coupled: decay enters the momentum
//   buf = momentum buf + (1 - dampening) d               at the first step: buf = d
//   d   = nesterov ? d + momentum buf : buf              with momentum = 0: d itself, no buffer
//   w  <- w - lr d
//
//   SgdState<float> state;                     // one per parameter, kept between steps
//   sgd_step(weight, d_weight, state, {.lr = 0.1, .momentum = 0.9});
//
// One pass over w, g and buf.  The first step allocates the buffer, later steps nothing.  The state
// is a regular value: copy, compare, save `buffer` and `started`; a run resumed from it gives equal
// bits.
#pragma once

#include <eigenblocks/optim/tensor_ref.hpp>

#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

struct SgdOptions {
  double lr = 1e-3;         ///< >= 0
  double momentum = 0;      ///< >= 0
  double dampening = 0;     ///< ignored at the first step, as in PyTorch
  bool nesterov = false;    ///< needs momentum > 0 and dampening = 0
  double weight_decay = 0;  ///< >= 0
};

template <RealScalar S>
struct SgdState {
  Matrix<S> buffer{};    ///< shape of the parameter (vectors: 1 x n)
  bool started = false;  ///< the buffer holds something

  friend bool operator==(const SgdState& a, const SgdState& b) {
    return a.started == b.started && detail::same_matrix(a.buffer, b.buffer);
  }
};

/// One step: updates `param` and `state` in place.  `grad` has the shape of `param` and must not
/// overlap it.  Errors: invalid_argument for a shape that differs between param, grad and a started
/// state, for lr, momentum or weight_decay negative, and for nesterov without momentum or with
/// dampening.
template <RealScalar S>
void sgd_step(std::type_identity_t<TensorRef<S>> param,
              std::type_identity_t<TensorRef<const S>> grad, SgdState<S>& state,
              const SgdOptions& options = {}, ExecutorRef executor = {}) {
  detail::require(options.lr >= 0, "sgd_step: lr (", options.lr, ") must not be negative");
  detail::require(options.momentum >= 0, "sgd_step: momentum (", options.momentum,
                  ") must not be negative");
  detail::require(options.weight_decay >= 0, "sgd_step: weight_decay (", options.weight_decay,
                  ") must not be negative");
  detail::require(!options.nesterov || (options.momentum > 0 && options.dampening == 0),
                  "sgd_step: nesterov needs momentum (", options.momentum, ") > 0 and dampening (",
                  options.dampening, ") = 0");
  const Index rows = param.rows(), cols = param.cols();
  detail::require_shape("sgd_step: grad", grad.rows(), grad.cols(), rows, cols, "shape of param");
  if (state.started) {
    detail::require_shape("sgd_step: state.buffer", state.buffer.rows(), state.buffer.cols(), rows,
                          cols, "shape of param");
  }

  const bool use_buffer = options.momentum > 0;
  const bool first = use_buffer && !state.started;
  if (first) {
    state.buffer.setZero(rows, cols);
    state.started = true;
  }
  using P = simd::Packet<S>;
  const P lr = simd::set1<P>(static_cast<S>(options.lr));
  const P decay = simd::set1<P>(static_cast<S>(options.weight_decay));
  const P momentum = simd::set1<P>(static_cast<S>(options.momentum));
  const P fresh = simd::set1<P>(static_cast<S>(first ? 1.0 : 1.0 - options.dampening));
  const auto plain = [&](S* w, const S* g) {
    const P weight = simd::load<P>(w);
    const P d = simd::fma(decay, weight, simd::load<P>(g));
    simd::store<P>(w, simd::sub(weight, simd::mul(lr, d)));
  };
  const auto with_momentum = [&](S* w, const S* g, S* buf) {
    const P weight = simd::load<P>(w);
    const P d = simd::fma(decay, weight, simd::load<P>(g));
    const P b = simd::fma(momentum, simd::load<P>(buf), simd::mul(fresh, d));
    simd::store<P>(buf, b);
    const P step = options.nesterov ? simd::fma(momentum, b, d) : b;
    simd::store<P>(w, simd::sub(weight, simd::mul(lr, step)));
  };
  const detail::Pieces pieces(rows, cols, param.contiguous() && grad.contiguous());
  S* const buffer = state.buffer.data();
  executor.run(pieces.count(), [&](Index task, int) {
    pieces.visit(task, [&](Index row, Index col, Index n) {
      S* const w = param.row(row) + col;
      const S* const g = grad.row(row) + col;
      if (use_buffer) {
        detail::for_each_packet<S>(n, with_momentum, w, g, buffer + row * cols + col);
      } else {
        detail::for_each_packet<S>(n, plain, w, g);
      }
    });
  });
}

EIGENBLOCKS_NAMESPACE_END
