// Cross entropy of logits against class ids, with label smoothing and z-loss.
//
//   lse_t  = log sum_j e^(x_tj) = m + log S,   m = max_j x_tj,   S = sum_j e^(x_tj - m)
//   loss_t = (1 - s) (lse_t - x_ty) + s (lse_t - mean_j x_tj) + z lse_t^2,   y the target of t
//   loss   = sum of loss_t over the tokens whose target is not ignore_index;
//            Reduction::mean divides by their number
//   dx_tj  = gamma_t [(1 + 2 z lse_t) e^(x_tj - lse_t) - (1 - s) 1[j = y] - s/V]
//   gamma_t = upstream / number (mean), upstream (sum), upstream_t (none); 0 at ignored tokens
//
// Shapes: logits and their gradient T x V, targets T, lse and losses T.  T = 0 is valid, V = 0 not.
//
//   auto saved = cross_entropy_forward(logits, targets);
//   double perplexity = std::exp(saved.loss);
//   cross_entropy_backward(saved, logits, targets, 1.0, logits);     // in place over the logits
//
// Numerics.  Sums run in the compute scalar over blocks of 2048 and in double across blocks and
// tokens; saved.lse is double.  The loss is (m - x_y) + log S, never the log of a probability.
// Logits of -inf (masked vocabulary) have probability and gradient exactly 0; a masked target, or
// label smoothing over a masked class, gives +inf; a row of nothing but -inf and a row that holds
// +inf or NaN give NaN.
// No valid token: Reduction::mean gives NaN like PyTorch, or 0 with empty_is_zero; gradients are 0.
//
// Storage scalars: float, double, and Eigen::half / bfloat16 (computed in float).  One pass over
// the logits forward, one read and one write backward.  Rows are independent and reduced in order:
// every executor gives the same bits.
//
// Errors: invalid_argument for shapes, V = 0, label_smoothing outside [0, 1], z_loss < 0, an
// upstream gradient that does not fit the reduction; std::out_of_range for a target outside [0, V)
// that is not ignore_index.
// Sources: torch.nn.functional.cross_entropy; label smoothing arXiv 1512.00567; z-loss PaLM, arXiv
// 2204.02311 section 5.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/softmax.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <span>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class Reduction { mean, sum, none };

struct CrossEntropyOptions {
  double label_smoothing = 0;  ///< s: this mass is spread over all classes, the target included
  double z_loss = 0;           ///< z: pulls lse towards 0; PaLM 1e-4
  Index ignore_index = -100;   ///< tokens with this target do not count; may be a legal class id
  Reduction reduction = Reduction::mean;
  bool empty_is_zero = false;  ///< mean over no token: 0 instead of NaN
};

/// What the forward pass leaves behind: the answer, and all the backward pass needs besides the
/// logits.
struct CrossEntropySaved {
  double loss = 0;        ///< the mean, or the sum (for Reduction::none too)
  Index valid = 0;        ///< tokens that count
  Vector<double> losses;  ///< of every token; 0 where ignored
  Vector<double> lse;     ///< of every token, ignored or not
};

/// The gradient that arrives at a loss: a number, or for Reduction::none a vector with one entry
/// per token, which must live as long as the call.
template <RealScalar S>
class LossUpstream {
 public:
  LossUpstream(double value) : value_(value) {}  // NOLINT: implicit by design
  template <class D>
    requires std::same_as<typename D::Scalar, S> &&(bool(D::IsVectorAtCompileTime)) &&
        (int(D::InnerStrideAtCompileTime) == 1)
            LossUpstream(const Eigen::DenseBase<D>& per_token)  // NOLINT: implicit by design
        : data_(per_token.derived().data()),
    size_(per_token.size()), per_token_(true) {}

    bool per_token() const { return per_token_; }
    Index size() const { return size_; }
    double operator[](Index token) const {
      return per_token_ ? static_cast<double>(data_[token]) : value_;
    }

   private:
    double value_ = 0;
    const S* data_ = nullptr;
    Index size_ = 0;
    bool per_token_ = false;
};

namespace detail {

/// Entries of a row handled together: 8 KB of float, read for the maximum and again from the
/// first-level cache for the exponentials.
inline constexpr Index kLossBlock = 2048;

/// visit(first, numbers in the compute scalar, count) for each block of a row.
template <StorageScalar S, class F>
void for_row_parts(const S* x, Index n, F&& visit) {
  for (Index first = 0; first < n; first += kLossBlock) {
    const Index count = std::min(kLossBlock, n - first);
    if constexpr (RealScalar<S>) {
      visit(first, x + first, count);
    } else {
      float part[kLossBlock];
      Eigen::Map<RowVector<float>>(part, count) =
          Eigen::Map<const RowVector<S>>(x + first, count).template cast<float>();
      visit(first, static_cast<const float*>(part), count);
    }
  }
}

/// Running log-sum-exp of the numbers added so far: max + log(sum), sum = sum of e^(x - max).
template <RealScalar C>
struct RunningLogSumExp {
  C max = kMinusInfinity<C>;
  double sum = 0;

  void add(const C* x, Index n) {
    const C m = row_max(x, n);
    if (m == kMinusInfinity<C>) return;
    if (!(m <= max)) {  // also for NaN, which then stays
      sum *= std::exp(static_cast<double>(max) - static_cast<double>(m));
      max = m;
    }
    sum += static_cast<double>(row_exp_sum(x, n, max));
  }
  void merge(const RunningLogSumExp& other) {
    if (other.max == kMinusInfinity<C>) return;
    if (!(other.max <= max)) {
      sum *= std::exp(static_cast<double>(max) - static_cast<double>(other.max));
      max = other.max;
    }
    sum += other.sum * std::exp(static_cast<double>(other.max) - static_cast<double>(max));
  }
  double value() const { return static_cast<double>(max) + std::log(sum); }

  /// loss of a token with target logit x_y, V classes and the sum of its logits (used with label
  /// smoothing only).
  double loss(double target_logit, double logit_sum, Index classes,
              const CrossEntropyOptions& options) const {
    const double s = options.label_smoothing, lse = value();
    double loss = options.z_loss > 0 ? options.z_loss * lse * lse : 0.0;
    // Each part only where it has weight: 0 times an infinite logit would be NaN.
    if (s < 1) loss += (1 - s) * ((static_cast<double>(max) - target_logit) + std::log(sum));
    if (s > 0) loss += s * (lse - logit_sum / static_cast<double>(classes));
    return loss;
  }
};

template <RealScalar C>
double row_sum(const C* x, Index n) {
  return static_cast<double>(sum_packets<C>(n, [x](Index j, auto io) { return io.load(x + j); }));
}

/// One token's gradient:  dx_j = scale e^(x_j - lse) - offset, and at the target also - at_target.
struct LossSlope {
  double lse, scale, offset, at_target;

  LossSlope(double gamma, double lse_value, Index classes, const CrossEntropyOptions& options)
      : lse(lse_value),
        scale(gamma * (options.z_loss > 0 ? 1 + 2 * options.z_loss * lse_value : 1.0)),
        offset(gamma * options.label_smoothing / static_cast<double>(classes)),
        at_target(gamma * (1 - options.label_smoothing)) {}

  /// dx_j without the target's extra term, passed through chain(dx_j, x_j) (packets); in place
  /// allowed.
  template <RealScalar C, class Chain>
  void row(const C* x, C* dx, Index n, Chain&& chain) const {
    using P = simd::Packet<C>;
    // lse rounded to C would shift every probability; what the rounding loses goes into the factor.
    const C rounded = static_cast<C>(lse);
    const P shift = simd::set1<P>(rounded);
    const P factor =
        simd::set1<P>(static_cast<C>(scale * std::exp(static_cast<double>(rounded) - lse)));
    const P minus = simd::set1<P>(static_cast<C>(-offset));
    for_packets<C>(n, [&](Index j, auto io) {
      const P value = io.load(x + j);
      const P e = exp_by_exp2(simd::sub(value, shift));
      io.store(dx + j, chain(simd::fma(e, factor, minus), value));
    });
  }
  template <RealScalar C>
  void row(const C* x, C* dx, Index n) const {
    row(x, dx, n, [](const auto& slope, const auto&) { return slope; });
  }
  /// The gradient at the target, whose logit is x.
  double target(double x) const { return scale * std::exp(x - lse) - offset - at_target; }
};

/// Checks everything a cross entropy over V classes needs; returns the number of valid targets.
inline Index check_cross_entropy(std::span<const Index> targets, Index tokens, Index classes,
                                 const CrossEntropyOptions& options) {
  require(options.label_smoothing >= 0 && options.label_smoothing <= 1,
          "cross_entropy: label_smoothing (", options.label_smoothing, ") must be in [0, 1]");
  require(options.z_loss >= 0, "cross_entropy: z_loss (", options.z_loss, ") must not be negative");
  require(classes > 0, "cross_entropy: the number of classes (", classes, ") must be at least 1");
  require_size("cross_entropy: targets", static_cast<Index>(targets.size()), tokens,
               "one for each token");
  Index valid = 0;
  for (std::size_t t = 0; t < targets.size(); ++t) {
    const Index y = targets[t];
    if (y == options.ignore_index) continue;
    if (y < 0 || y >= classes) [[unlikely]] {
      raise<std::out_of_range>("cross_entropy: targets[", t, "] (", y, ") is outside [0, ", classes,
                               ") and is not ignore_index (", options.ignore_index, ")");
    }
    ++valid;
  }
  return valid;
}

/// Adds up saved.losses in order and divides as the reduction says.
inline void reduce_losses(CrossEntropySaved& saved, const CrossEntropyOptions& options) {
  double sum = 0;
  for (Index t = 0; t < saved.losses.size(); ++t) sum += saved.losses[t];
  saved.loss = sum;
  if (options.reduction != Reduction::mean) return;
  const bool empty = saved.valid == 0 && options.empty_is_zero;
  saved.loss = empty ? 0.0 : sum / static_cast<double>(saved.valid);
}

template <RealScalar S>
void check_upstream(const LossUpstream<S>& upstream, Index tokens,
                    const CrossEntropyOptions& options) {
  if (options.reduction == Reduction::none) {
    require(upstream.per_token(),
            "cross_entropy: upstream must be a vector with one entry per token (", tokens,
            ") for Reduction::none, not a single number");
    require_size("cross_entropy: upstream", upstream.size(), tokens, "one for each token");
  } else {
    require(!upstream.per_token(), "cross_entropy: upstream has ", upstream.size(),
            " entries, expected a single number (Reduction::mean and Reduction::sum)");
  }
}

/// gamma_t of a token that counts.
template <RealScalar S>
double loss_gamma(const LossUpstream<S>& upstream, Index token, Index valid,
                  const CrossEntropyOptions& options) {
  const double gamma = upstream[token];
  return options.reduction == Reduction::mean ? gamma / static_cast<double>(valid) : gamma;
}

}  // namespace detail

/// Fills `saved`, whose memory is reused.  Formula, shapes and errors: top of the file.
template <MatrixLike X>
void cross_entropy_forward(CrossEntropySaved& saved, const X& logits,
                           std::span<const Index> targets, const CrossEntropyOptions& options = {},
                           ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  using C = compute_t<S>;
  const Index tokens = logits.rows(), classes = logits.cols();
  saved.valid = detail::check_cross_entropy(targets, tokens, classes, options);
  saved.losses.resize(tokens);
  saved.lse.resize(tokens);
  const ConstMatrixRef<S> x(logits);
  detail::for_row_blocks(tokens, classes, executor, [&](Index first, Index rows) {
    for (Index t = first; t < first + rows; ++t) {
      const S* const row = x.data() + t * x.outerStride();
      detail::RunningLogSumExp<C> lse;
      double sum = 0;
      detail::for_row_parts(row, classes, [&](Index, const C* part, Index n) {
        lse.add(part, n);
        if (options.label_smoothing > 0) sum += detail::row_sum(part, n);
      });
      const Index y = targets[static_cast<std::size_t>(t)];
      saved.lse[t] = lse.value();
      saved.losses[t] = y == options.ignore_index
                            ? 0.0
                            : lse.loss(static_cast<double>(row[y]), sum, classes, options);
    }
  });
  detail::reduce_losses(saved, options);
}

/// The same, returning a new `saved`.
template <MatrixLike X>
CrossEntropySaved cross_entropy_forward(const X& logits, std::span<const Index> targets,
                                        const CrossEntropyOptions& options = {},
                                        ExecutorRef executor = {}) {
  CrossEntropySaved saved;
  cross_entropy_forward(saved, logits, targets, options, executor);
  return saved;
}

/// Only the loss.
template <MatrixLike X>
double cross_entropy(const X& logits, std::span<const Index> targets,
                     const CrossEntropyOptions& options = {}, ExecutorRef executor = {}) {
  return cross_entropy_forward(logits, targets, options, executor).loss;
}

/// Overwrites `dlogits` (T x V; may be the memory of `logits`) with the gradient.  `saved` and
/// `options` are those of the forward pass, `upstream` the gradient of the loss.  Errors: top of
/// the file.
template <MatrixLike X, OutputMatrix D>
  requires SameScalar<X, D>
void cross_entropy_backward(const CrossEntropySaved& saved, const X& logits,
                            std::span<const Index> targets,
                            const LossUpstream<compute_t<scalar_t<X>>>& upstream, D&& dlogits,
                            const CrossEntropyOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  using C = compute_t<S>;
  const Index tokens = logits.rows(), classes = logits.cols();
  const Index valid = detail::check_cross_entropy(targets, tokens, classes, options);
  detail::require_size("cross_entropy: saved.lse", saved.lse.size(), tokens, "rows of logits");
  detail::require_shape("cross_entropy: dlogits", dlogits.rows(), dlogits.cols(), tokens, classes,
                        "shape of logits");
  detail::check_upstream(upstream, tokens, options);
  const ConstMatrixRef<S> x(logits);
  MatrixRef<S> dx(dlogits);
  detail::for_row_blocks(tokens, classes, executor, [&](Index first, Index rows) {
    for (Index t = first; t < first + rows; ++t) {
      const S* const from = x.data() + t * x.outerStride();
      S* const to = dx.data() + t * dx.outerStride();
      const Index y = targets[static_cast<std::size_t>(t)];
      if (y == options.ignore_index) {
        std::fill_n(to, classes, S(0));
        continue;
      }
      const detail::LossSlope slope(detail::loss_gamma(upstream, t, valid, options), saved.lse[t],
                                    classes, options);
      const double at_target = slope.target(static_cast<double>(from[y]));
      if constexpr (RealScalar<S>) {
        slope.row(from, to, classes);
      } else {
        detail::for_row_parts(from, classes, [&](Index at, const C* part, Index n) {
          C result[detail::kLossBlock];
          slope.row(part, result, n);
          Eigen::Map<RowVector<S>>(to + at, n) =
              Eigen::Map<const RowVector<C>>(result, n).template cast<S>();
        });
      }
      to[y] = static_cast<S>(at_target);
    }
  });
}

EIGENBLOCKS_NAMESPACE_END
