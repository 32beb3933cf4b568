// Gradient clipping by the joint norm (Pascanu et al., arXiv 1211.5063;
// torch.nn.utils.clip_grad_norm_).
//
//   total = sqrt(sum over tensors |g|^2),   coef = min(1, max_norm / (total + 1e-6)),   g <- coef g
//
//   std::vector<TensorRef<float>> gradients{d_embedding, d_gain, d_weight};
//   double norm = clip_grad_norm<float>(gradients, {.max_norm = 1.0});
//   double same = clip_grad_norm({.max_norm = 1.0}, d_embedding, d_gain, d_weight);
//
// The norm is summed in double and float squares cannot overflow or underflow.  If no clipping is
// needed nothing is written.  An infinite norm makes coef 0 (finite entries become 0, infinite ones
// NaN), a NaN norm makes every gradient NaN, as in PyTorch: test the returned norm with
// std::isfinite before the optimiser step.
#pragma once

#include <eigenblocks/optim/tensor_ref.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

struct ClipOptions {
  double max_norm = 1.0;  ///< >= 0; infinity only measures
};

/// Norm of all the numbers of all tensors together; 0 for an empty list.
template <RealScalar S>
double joint_norm(std::span<const TensorRef<S>> tensors, ExecutorRef executor = {}) {
  double total = 0;
  for (const TensorRef<S>& tensor : tensors) {
    const detail::Pieces pieces(tensor.rows(), tensor.cols(), tensor.contiguous());
    // Each piece has its own sum, added in order afterwards; batches of 64 need no allocation.
    double part[64];
    for (Index begin = 0; begin < pieces.count(); begin += 64) {
      const Index batch = std::min<Index>(64, pieces.count() - begin);
      executor.run(batch, [&](Index task, int) {
        double sum = 0;
        pieces.visit(begin + task, [&](Index row, Index col, Index n) {
          sum += detail::square_sum<S>(tensor.row(row) + col, n);
        });
        part[task] = sum;
      });
      for (Index task = 0; task < batch; ++task) total += part[task];
    }
  }
  return std::sqrt(total);
}

namespace detail {

template <RealScalar S>
void scale_tensor(const TensorRef<S>& tensor, S factor, ExecutorRef executor) {
  using P = simd::Packet<S>;
  const P by = simd::set1<P>(factor);
  const auto scale = [&](S* x) { simd::store<P>(x, simd::mul(simd::load<P>(x), by)); };
  const Pieces pieces(tensor.rows(), tensor.cols(), tensor.contiguous());
  executor.run(pieces.count(), [&](Index task, int) {
    pieces.visit(task, [&](Index row, Index col, Index n) {
      for_each_packet<S>(n, scale, tensor.row(row) + col);
    });
  });
}

}  // namespace detail

/// Scales every tensor in place so that the joint norm is at most max_norm; returns the norm before
/// clipping.  Errors: invalid_argument if max_norm is negative or NaN.
template <RealScalar S>
double clip_grad_norm(std::span<const TensorRef<S>> gradients, const ClipOptions& options = {},
                      ExecutorRef executor = {}) {
  detail::require(options.max_norm >= 0, "clip_grad_norm: max_norm (", options.max_norm,
                  ") must not be negative");
  const double norm = joint_norm<S>(gradients, executor);
  const double ratio = options.max_norm / (norm + 1e-6);
  if (ratio >= 1.0) return norm;  // false for NaN
  for (const TensorRef<S>& gradient : gradients) {
    detail::scale_tensor(gradient, static_cast<S>(ratio), executor);
  }
  return norm;
}

/// The same for tensors given one by one, all of one scalar; serial.
template <class First, class... Rest>
  requires detail::BindsToTensor<First, scalar_t<First>> &&
      (detail::BindsToTensor<Rest, scalar_t<First>>&&...) double clip_grad_norm(
          const ClipOptions& options, First&& first, Rest&&... rest) {
    using S = scalar_t<First>;
    const std::array<TensorRef<S>, 1 + sizeof...(Rest)> list{
        TensorRef<S>(std::forward<First>(first)), TensorRef<S>(std::forward<Rest>(rest))...};
    return clip_grad_norm<S>(list, options);
  }

  EIGENBLOCKS_NAMESPACE_END
