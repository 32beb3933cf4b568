// Short causal convolution along time, one filter per channel: what Mamba, RWKV-like and Hyena blocks put before their mixer.
//
//   y_t = act( bias + sum_k w_k * x_{t - (K-1) + k} )         k = 0 .. K-1, the last tap is the current token's; act = silu or none
//
//   const Conv1dOptions options{.silu = true};
//   conv1d_forward(x, weight, out, options, {.bias = &bias, .history = &before}, &after);      // bias, history optional
//   conv1d_backward(x, weight, dout, dx, dweight, options, {.bias = &bias}, nullptr, {.bias = &dbias}, pool);
//   auto state = conv1d_state<float>(width, channels, options);       // a regular value: a copy is a snapshot
//   conv1d_step(state, x, weight, out, &bias);                        // any number of rows
//
//   x, out T x D   weight K x D (PyTorch's conv1d.weight [D, 1, K] transposed)   bias D   history (K-1) x D, oldest row first
//
// history holds the inputs before the first row (absent: 0), `after` those before the next.  Nothing is saved: the backward
// computes the convolution again for silu'.  Steps allocate nothing.  Results are bitwise the same for every executor and for
// every cut into steps.  A NaN in token t stays out of earlier outputs and out of other channels.  Outputs must not overlap
// inputs; history and `after` may be the same matrix.
//
// Errors (invalid_argument, nothing written): width outside [1, 16], wrong shapes, a gradient wanted of an input that is absent.
// Source: arXiv 2312.00752 (causal_conv1d of the official code).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/math.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <array>

EIGENBLOCKS_NAMESPACE_BEGIN

struct Conv1dOptions {
  bool silu = false;
};

/// Optional inputs; null is absent.
template <RealScalar S>
struct Conv1dTensors {
  const Vector<S>* bias = nullptr;
  const Matrix<S>* history = nullptr;
};

/// Where their gradients go, in the same shapes; null is not wanted.
template <RealScalar S>
struct Conv1dGradients {
  Vector<S>* bias = nullptr;
  Matrix<S>* history = nullptr;  ///< also where no history was given: that of the zeros
};

namespace detail {

inline constexpr Index kConv1dMaxWidth = 16;
inline constexpr Index kConv1dRows = 64;     ///< tokens of a forward task
inline constexpr Index kConv1dColumns = 64;  ///< channels of a backward task

inline void require_conv1d_width(Index width) {
  require(width >= 1 && width <= kConv1dMaxWidth, "width (", width, ") must be in [1, ",
          kConv1dMaxWidth, "]");
}

template <RealScalar S>
void require_conv1d(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& weight,
                    const Conv1dTensors<S>& tensors) {
  require_conv1d_width(weight.rows());
  require_shape("weight", weight.rows(), weight.cols(), weight.rows(), x.cols(),
                "width, channels of x");
  if (tensors.bias != nullptr)
    require_size("bias", tensors.bias->size(), x.cols(), "channels of x");
  if (tensors.history != nullptr) {
    require_shape("history", tensors.history->rows(), tensors.history->cols(), weight.rows() - 1,
                  x.cols(), "width - 1, channels of x");
  }
}

/// The operands of one call, and the convolution at one row.
template <RealScalar S>
struct Conv1dRows {
  ConstMatrixRef<S> x, weight;
  const S* bias;
  const Matrix<S>* history;
  using Rows = std::array<const S*, std::size_t(kConv1dMaxWidth)>;

  Index width() const { return weight.rows(); }
  const S* taps(Index k) const { return weight.data() + k * weight.outerStride(); }
  /// Row t of the input, before the first from history; null for what is 0.
  const S* row(Index t) const {
    if (t >= 0) return x.data() + t * x.outerStride();
    return history != nullptr ? history->data() + (width() - 1 + t) * history->cols() : nullptr;
  }
  /// The rows that token t sees; returns the first tap that has one.
  Index window(Index t, Rows& rows) const {
    Index first = 0;
    for (Index k = 0; k < width(); ++k) {
      rows[std::size_t(k)] = row(t - (width() - 1) + k);
      if (rows[std::size_t(k)] == nullptr) first = k + 1;
    }
    return first;
  }
  /// f(channel, convolution) for packets, then single channels of [begin, end).
  template <int kFirst, int kWidth, class F>
  EIGENBLOCKS_ALWAYS_INLINE void sweep(const Rows& rows, Index first, Index begin, Index end,
                                       F&& f) const {
    const Index stride = weight.outerStride(), last = kWidth > 0 ? kWidth : width();
    const S* const w = weight.data();
    const auto at = [&]<class P>(Index c, P sum) EIGENBLOCKS_INLINE_LAMBDA {
      if (bias != nullptr) sum = simd::load<P>(bias + c);
      for (Index k = kWidth > 0 ? kFirst : first; k < last; ++k)
        sum = simd::fma(simd::load<P>(w + k * stride + c), simd::load<P>(rows[std::size_t(k)] + c),
                        sum);
      f(c, sum);
    };
    using P = simd::Packet<S>;
    constexpr Index lanes = simd::kLanes<S>;
    Index c = begin;
    for (; c + lanes <= end; c += lanes) at(c, simd::zero<P>());
    for (; c < end; ++c) at(c, S(0));
  }
  template <class F>
  void each(Index t, Index begin, Index end, F&& f) const {
    Rows rows;
    const Index first = window(t, rows);
    if (first == 0 && width() == 4) {
      sweep<0, 4>(rows, 0, begin, end, f);
    } else {
      sweep<0, 0>(rows, first, begin, end, f);
    }
  }
};

/// The K - 1 inputs before the next row.
template <RealScalar S>
void conv1d_advance(const Conv1dRows<S>& in, Matrix<S>& after) {
  const Index tokens = in.x.rows(), keep = in.width() - 1;
  for (Index i = 0; i < keep; ++i) {  // upwards, so that it can be in place
    const S* const from = in.row(tokens - keep + i);
    S* const to = after.data() + i * after.cols();
    if (from == nullptr) {
      std::fill_n(to, after.cols(), S(0));
    } else if (from != to) {
      std::copy_n(from, after.cols(), to);
    }
  }
}

/// Channels [begin, end) from the last token to the first; dW, db and the gradients of K tokens stay in scratch.
template <RealScalar S>
void conv1d_backward_columns(const Conv1dRows<S>& in, bool silu, const ConstMatrixRef<S>& dout,
                             const Matrix<S>* dafter, MatrixRef<S>& dx, MatrixRef<S>& dweight,
                             S* dbias, Matrix<S>* dhistory, Index begin, Index end) {
  const Index width = in.width(), tokens = in.x.rows(), count = end - begin, keep = width - 1;
  std::array<S, std::size_t(kConv1dMaxWidth * kConv1dColumns)> ring, sums;
  std::array<S, std::size_t(kConv1dColumns)> bias_sum{}, dinput;
  ring.fill(S(0));
  sums.fill(S(0));
  const auto slot = [&](Index t) { return ring.data() + (t + keep) % width * kConv1dColumns; };
  typename Conv1dRows<S>::Rows rows;
  for (Index t = tokens - 1; t >= -keep; --t) {
    S* const now = slot(t);
    if (t >= 0) {
      const S* const upstream = dout.data() + t * dout.outerStride() + begin;
      if (silu) {
        in.each(t, begin, end, [&]<class P>(Index c, const P& y) EIGENBLOCKS_INLINE_LAMBDA {
          simd::store<P>(now + (c - begin),
                         simd::mul(simd::load<P>(upstream + (c - begin)), simd::silu_grad(y)));
        });
      } else {
        std::copy_n(upstream, count, now);
      }
      for (Index k = in.window(t, rows); k < width; ++k) {
        const S* const x = rows[std::size_t(k)] + begin;
        S* const sum = sums.data() + k * kConv1dColumns;
        for (Index c = 0; c < count; ++c) sum[c] += now[c] * x[c];
      }
      for (Index c = 0; c < count; ++c) bias_sum[std::size_t(c)] += now[c];
    } else {
      std::fill_n(now, count, S(0));
    }
    // token t is tap k of token t + K-1-k; after the last token it is history
    const Index after = t - (tokens - keep);
    for (Index c = 0; c < count; ++c) {
      dinput[std::size_t(c)] = dafter != nullptr && after >= 0
                                   ? dafter->data()[after * dafter->cols() + begin + c]
                                   : S(0);
    }
    for (Index k = std::max<Index>(0, t + width - tokens); k < width; ++k) {
      const S* const w = in.taps(k) + begin;
      const S* const from = slot(t + keep - k);
      for (Index c = 0; c < count; ++c) dinput[std::size_t(c)] += w[c] * from[c];
    }
    if (t >= 0) {
      std::copy_n(dinput.data(), count, dx.data() + t * dx.outerStride() + begin);
    } else if (dhistory != nullptr) {
      std::copy_n(dinput.data(), count, dhistory->data() + (keep + t) * dhistory->cols() + begin);
    }
  }
  for (Index k = 0; k < width; ++k) {
    std::copy_n(sums.data() + k * kConv1dColumns, count,
                dweight.data() + k * dweight.outerStride() + begin);
  }
  if (dbias != nullptr) std::copy_n(bias_sum.data(), count, dbias + begin);
}

}  // namespace detail

/// out, and the last width - 1 inputs into `after` unless null.
template <MatrixLike X, MatrixLike W, OutputMatrix O>
  requires SameScalar<X, W, O> && RealScalar<scalar_t<X>>
void conv1d_forward(const X& x, const W& weight, O&& out, const Conv1dOptions& options = {},
                    const Conv1dTensors<scalar_t<X>>& tensors = {},
                    Matrix<scalar_t<X>>* after = nullptr, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const detail::Conv1dRows<S> in{
      x, weight, tensors.bias != nullptr ? tensors.bias->data() : nullptr, tensors.history};
  detail::require_conv1d<S>(in.x, in.weight, tensors);
  detail::require_shape("out", out.rows(), out.cols(), x.rows(), x.cols(), "shape of x");
  if (after != nullptr) {
    detail::require_shape("after", after->rows(), after->cols(), weight.rows() - 1, x.cols(),
                          "width - 1, channels of x");
  }
  MatrixRef<S> to = out;
  constexpr Index block = detail::kConv1dRows;
  executor.run((x.rows() + block - 1) / block, [&](Index task, int) {
    for (Index t = task * block; t < std::min((task + 1) * block, in.x.rows()); ++t) {
      S* const row = to.data() + t * to.outerStride();
      in.each(t, 0, in.x.cols(), [&]<class P>(Index c, const P& y) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<P>(row + c, options.silu ? simd::silu(y) : y);
      });
    }
  });
  if (after != nullptr) detail::conv1d_advance(in, *after);
}

/// Gradients from dout and, unless null, that of `after`.  Overwrites dx, dweight and what `gradients` points to.
template <MatrixLike X, MatrixLike W, MatrixLike DO, OutputMatrix DX, OutputMatrix DW>
  requires SameScalar<X, W, DO, DX, DW> && RealScalar<scalar_t<X>>
void conv1d_backward(const X& x, const W& weight, const DO& dout, DX&& dx, DW&& dweight,
                     const Conv1dOptions& options = {},
                     const Conv1dTensors<scalar_t<X>>& tensors = {},
                     const Matrix<scalar_t<X>>* dafter = nullptr,
                     const Conv1dGradients<scalar_t<X>>& gradients = {},
                     ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  using detail::require_shape;
  const detail::Conv1dRows<S> in{
      x, weight, tensors.bias != nullptr ? tensors.bias->data() : nullptr, tensors.history};
  detail::require_conv1d<S>(in.x, in.weight, tensors);
  require_shape("dout", dout.rows(), dout.cols(), x.rows(), x.cols(), "shape of x");
  require_shape("dx", dx.rows(), dx.cols(), x.rows(), x.cols(), "shape of x");
  require_shape("dweight", dweight.rows(), dweight.cols(), weight.rows(), x.cols(),
                "shape of weight");
  const auto require_history = [&](const char* name, const Matrix<S>* m) {
    if (m != nullptr)
      require_shape(name, m->rows(), m->cols(), weight.rows() - 1, x.cols(),
                    "width - 1, channels of x");
  };
  require_history("dafter", dafter);
  require_history("gradients.history", gradients.history);
  if (gradients.bias != nullptr) {
    detail::require(tensors.bias != nullptr, "gradients.bias is wanted, but there is no bias");
    detail::require_size("gradients.bias", gradients.bias->size(), x.cols(), "channels of x");
  }
  const ConstMatrixRef<S> upstream = dout;
  MatrixRef<S> to_x = dx, to_weight = dweight;
  constexpr Index block = detail::kConv1dColumns;
  executor.run((x.cols() + block - 1) / block, [&](Index task, int) {
    detail::conv1d_backward_columns<S>(in, options.silu, upstream, dafter, to_x, to_weight,
                                       gradients.bias != nullptr ? gradients.bias->data() : nullptr,
                                       gradients.history, task * block,
                                       std::min((task + 1) * block, in.x.cols()));
  });
}

/// All that decoding needs between two calls: a regular value, a copy is a snapshot.
template <RealScalar S>
struct Conv1dState {
  Conv1dOptions options;
  Matrix<S> history;  ///< the last width - 1 inputs, oldest first
  Index tokens = 0;   ///< seen so far

  Index size() const { return tokens; }
  Index bytes() const { return history.size() * Index(sizeof(S)); }
};

/// The state before the first token.  Errors: width outside [1, 16], channels < 1.
template <RealScalar S>
Conv1dState<S> conv1d_state(Index width, Index channels, const Conv1dOptions& options = {}) {
  detail::require_conv1d_width(width);
  detail::require(channels >= 1, "channels (", channels, ") must be at least 1");
  return {.options = options, .history = Matrix<S>::Zero(width - 1, channels)};
}

/// The rows that follow what the state has seen.  Allocates nothing; on an error nothing is changed.
template <MatrixLike X, MatrixLike W, OutputMatrix O>
  requires SameScalar<X, W, O> && RealScalar<scalar_t<X>>
void conv1d_step(Conv1dState<scalar_t<X>>& state, const X& x, const W& weight, O&& out,
                 const Vector<scalar_t<X>>* bias = nullptr, ExecutorRef executor = {}) {
  conv1d_forward(x, weight, out, state.options, {.bias = bias, .history = &state.history},
                 &state.history, executor);
  state.tokens += x.rows();
}

EIGENBLOCKS_NAMESPACE_END
