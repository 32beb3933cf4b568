// AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), in the form of
// torch.optim.AdamW.
//
//   w <- w (1 - lr weight_decay)
//   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
//   w <- w - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps),     t = 1, 2, ...
//
// eps stands outside the bias-corrected root.  weight_decay = 0 is Adam.
//
//   AdamWState<float> state;                   // one per parameter, kept between steps
//   adamw_step(weight, d_weight, state, {.lr = rate, .beta2 = 0.95, .weight_decay = 0.1});
//
// One pass over w, g, m, v (7 memory streams, the limit of this loop).  The first step allocates m
// and v, later steps nothing.  The state is a regular value: copy, compare, save `m`, `v` and
// `step`; a run resumed from it gives equal bits.
#pragma once

#include <eigenblocks/optim/tensor_ref.hpp>

#include <cmath>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

struct AdamWOptions {
  double lr = 1e-3;      ///< >= 0
  double beta1 = 0.9;    ///< in [0, 1)
  double beta2 = 0.999;  ///< in [0, 1); language models: 0.95
  double eps = 1e-8;     ///< >= 0
  double weight_decay =
      0.01;  ///< >= 0; language models: 0.1 on matrices, 0 on gains and embeddings
};

template <RealScalar S>
struct AdamWState {
  Matrix<S> m{}, v{};  ///< shape of the parameter (vectors: 1 x n); empty before the first step
  Index step = 0;      ///< steps done

  friend bool operator==(const AdamWState& a, const AdamWState& b) {
    return a.step == b.step && detail::same_matrix(a.m, b.m) && detail::same_matrix(a.v, b.v);
  }
};

namespace detail {

// The square root of the hardware.  Eigen 3.4's psqrt is a refined estimate there: its last bits
// differ between processors and it turns infinity into NaN.  (maskz: g++ 12 warns about its own
// _mm512_sqrt_ps.)
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P exact_sqrt(const P& x) {
  return simd::sqrt(x);
}
#if !defined(EIGEN_DONT_VECTORIZE)
#if defined(__SSE2__)
EIGENBLOCKS_ALWAYS_INLINE __m128 exact_sqrt(const __m128& x) { return _mm_sqrt_ps(x); }
EIGENBLOCKS_ALWAYS_INLINE __m128d exact_sqrt(const __m128d& x) { return _mm_sqrt_pd(x); }
#endif
#if defined(__AVX__)
EIGENBLOCKS_ALWAYS_INLINE __m256 exact_sqrt(const __m256& x) { return _mm256_sqrt_ps(x); }
EIGENBLOCKS_ALWAYS_INLINE __m256d exact_sqrt(const __m256d& x) { return _mm256_sqrt_pd(x); }
#endif
#if defined(__AVX512F__)
EIGENBLOCKS_ALWAYS_INLINE __m512 exact_sqrt(const __m512& x) {
  return _mm512_maskz_sqrt_ps(0xffff, x);
}
EIGENBLOCKS_ALWAYS_INLINE __m512d exact_sqrt(const __m512d& x) {
  return _mm512_maskz_sqrt_pd(0xff, x);
}
#endif
#endif

}  // namespace detail

/// One step: updates `param` and `state` in place.  `grad` has the shape of `param` and must not
/// overlap it.  Errors: invalid_argument for a shape that differs between param, grad and a started
/// state, and for options outside the ranges given at AdamWOptions.
template <RealScalar S>
void adamw_step(std::type_identity_t<TensorRef<S>> param,
                std::type_identity_t<TensorRef<const S>> grad, AdamWState<S>& state,
                const AdamWOptions& options = {}, ExecutorRef executor = {}) {
  detail::require(options.lr >= 0, "adamw_step: lr (", options.lr, ") must not be negative");
  detail::require(options.beta1 >= 0 && options.beta1 < 1, "adamw_step: beta1 (", options.beta1,
                  ") must be in [0, 1)");
  detail::require(options.beta2 >= 0 && options.beta2 < 1, "adamw_step: beta2 (", options.beta2,
                  ") must be in [0, 1)");
  detail::require(options.eps >= 0, "adamw_step: eps (", options.eps, ") must not be negative");
  detail::require(options.weight_decay >= 0, "adamw_step: weight_decay (", options.weight_decay,
                  ") must not be negative");
  const Index rows = param.rows(), cols = param.cols();
  detail::require_shape("adamw_step: grad", grad.rows(), grad.cols(), rows, cols, "shape of param");
  if (state.step > 0) {
    detail::require_shape("adamw_step: state.m", state.m.rows(), state.m.cols(), rows, cols,
                          "shape of param");
    detail::require_shape("adamw_step: state.v", state.v.rows(), state.v.cols(), rows, cols,
                          "shape of param");
  } else {
    state.m.setZero(rows, cols);
    state.v.setZero(rows, cols);
  }

  const double t = static_cast<double>(++state.step);
  const double bias1 = 1.0 - std::pow(options.beta1, t);
  const double bias2 = 1.0 - std::pow(options.beta2, t);
  using P = simd::Packet<S>;
  const auto constant = [](double value) { return simd::set1<P>(static_cast<S>(value)); };
  const P keep = constant(1.0 - options.lr * options.weight_decay);
  const P fresh1 = constant(1.0 - options.beta1);
  const P beta2 = constant(options.beta2), fresh2 = constant(1.0 - options.beta2);
  const P root_scale = constant(1.0 / std::sqrt(bias2)), eps = constant(options.eps);
  const P rate = constant(options.lr / bias1);
  const auto update = [&](S* w, const S* gradient, S* first, S* second) {
    const P g = simd::load<P>(gradient);
    const P m = simd::load<P>(first);
    const P new_m = simd::fma(fresh1, simd::sub(g, m), m);
    const P new_v = simd::fma(beta2, simd::load<P>(second), simd::mul(simd::mul(fresh2, g), g));
    simd::store<P>(first, new_m);
    simd::store<P>(second, new_v);
    const P bottom = simd::fma(detail::exact_sqrt(new_v), root_scale, eps);
    const P decayed = simd::mul(simd::load<P>(w), keep);
    simd::store<P>(w, simd::sub(decayed, simd::mul(rate, simd::div(new_m, bottom))));
  };
  const detail::Pieces pieces(rows, cols, param.contiguous() && grad.contiguous());
  S* const m = state.m.data();
  S* const v = state.v.data();
  executor.run(pieces.count(), [&](Index task, int) {
    pieces.visit(task, [&](Index row, Index col, Index n) {
      const Index at = row * cols + col;
      detail::for_each_packet<S>(n, update, param.row(row) + col, grad.row(row) + col, m + at,
                                 v + at);
    });
  });
}

EIGENBLOCKS_NAMESPACE_END
