// The convolution kernel of a diagonal state space model (S4D), and its gradients.
//
//   x_t = a x_{t-1} + phi B u_t,  y_t = 2 Re sum_n C x_t     =>     K_l = 2 Re sum_n C_n B_n phi_n a_n^l
//
// a and phi discretise the modes lambda with the channel's step dt (ssm/discretize.hpp): zero-order hold or bilinear.
// Every channel has n complex modes, which stand for 2n states: the other half are their conjugates (hence 2 Re).
//
//   S4dParameters<float> p = ...;                                  // s4d.hpp initialises them
//   const Matrix<float> k = s4d_kernel(p, 1024);                   // 1024 x H
//   s4d_kernel_backward(p, dk, dp);                                // dp.lambda, dp.b, dp.c, dp.dt; parameters only, nothing saved
//
//   lambda, b, c  H x n complex     dt  H     skip  H or empty (D of the layer, not part of the kernel)
//   Complex gradients are dL/dRe + i dL/dIm.  Models that train log dt: d log dt = dt * ddt.
//
// A Vandermonde sum in O(n L) per channel.  With l = Q m + j it is a product of matrices, [c a^(Qm)] (L/Q x n) times [a^j]
// (n x Q), Q about sqrt(L), so nearly all of the work is a matrix product; the two tables hold powers in double whose every
// 64th is a fresh exponential of log a (repeated multiplication drifts by l eps).  The gradient is the transposed product.
// Measured against the recurrence with channels in SIMD lanes (one complex multiply for each n, l): 3-4 times faster.
//
// lambda = 0 is a mode like any other; Re lambda < 0 decays.  Bitwise equal for every executor (channels are the tasks).
// Errors (invalid_argument, nothing written): shapes, no channels or modes, Re lambda > 0, dt not positive and finite, anything
// else not finite, length < 1, a discretization other than zoh and bilinear.
//
// Source: arXiv 2206.11893; state-spaces/s4 (models/s4/s4d.py).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/ssm/discretize.hpp>
#include <eigenblocks/ssm/kernel_layer.hpp>

#include <algorithm>
#include <cmath>
#include <complex>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Parameters of H independent channels, or the gradients of a loss with respect to them.
template <RealScalar S>
struct S4dParameters {
  Matrix<std::complex<S>> lambda;  ///< H x n, Re <= 0
  Matrix<std::complex<S>> b, c;    ///< H x n
  Vector<S> dt;                    ///< H, > 0
  Vector<S> skip{};                ///< H, or empty for none

  Index channels() const { return lambda.rows(); }
  Index modes() const { return lambda.cols(); }
};

struct S4dOptions {
  Discretization discretization = Discretization::zoh;  ///< or bilinear
};

namespace detail {

template <class M>
bool all_finite(const M& m) {
  for (Index i = 0; i < m.size(); ++i) {
    if (!std::isfinite(std::real(m.data()[i])) || !std::isfinite(std::imag(m.data()[i])))
      return false;
  }
  return true;
}

/// Modes that decay, steps that are positive, everything finite and of one shape.
template <RealScalar S>
void require_modes(const Matrix<std::complex<S>>& lambda, const Matrix<std::complex<S>>& b,
                   const Matrix<std::complex<S>>& c, const Vector<S>& dt, const Vector<S>& skip) {
  const Index channels = lambda.rows(), modes = lambda.cols();
  require(channels >= 1 && modes >= 1, "lambda is ", channels, " x ", modes,
          ", expected at least 1 x 1 (channels x modes)");
  require_shape("b", b.rows(), b.cols(), channels, modes, "shape of lambda");
  require_shape("c", c.rows(), c.cols(), channels, modes, "shape of lambda");
  require_size("dt", dt.size(), channels, "channels");
  require(skip.size() == 0 || skip.size() == channels, "skip has ", skip.size(),
          " entries, expected ", channels, " (channels) or none");
  require(all_finite(lambda), "lambda must be finite");
  require(all_finite(b), "b must be finite");
  require(all_finite(c), "c must be finite");
  require(all_finite(skip), "skip must be finite");
  for (Index h = 0; h < channels; ++h) {
    require(dt[h] > 0 && std::isfinite(dt[h]), "dt[", h, "] (", dt[h],
            ") must be positive and finite");
    for (Index n = 0; n < modes; ++n) {
      require(lambda(h, n).real() <= 0, "lambda(", h, ", ", n, ") has real part ",
              lambda(h, n).real(), ", which must not be positive");
    }
  }
}

template <RealScalar S>
void require_s4d(const S4dParameters<S>& p, const S4dOptions& options) {
  require(options.discretization == Discretization::zoh ||
              options.discretization == Discretization::bilinear,
          "discretization (", options.discretization, ") must be zoh or bilinear");
  require_modes(p.lambda, p.b, p.c, p.dt, p.skip);
}

/// A number by its logarithm, so that any power of it is one exponential.
struct PowerMode {
  double log_abs, angle;

  /// The a that the discretisation makes of lambda dt.
  static PowerMode of(std::complex<double> x, Discretization method) {
    if (method == Discretization::zoh) return {x.real(), x.imag()};
    const std::complex<double> up = 1.0 + 0.5 * x, down = 1.0 - 0.5 * x;
    const double square = std::norm(up) / std::norm(down);  // = 1 + 2 Re x / |down|^2; 0 at x = -2
    return {0.5 * (square < 0.25 ? std::log(square) : std::log1p(2 * x.real() / std::norm(down))),
            std::arg(up) - std::arg(down)};
  }
  std::complex<double> power(Index l) const {
    if (l == 0) return 1.0;
    const double exponent = static_cast<double>(l), size = std::exp(log_abs * exponent);
    return {size * std::cos(angle * exponent), size * std::sin(angle * exponent)};
  }
};

/// re[i] + i im[i] = factor a^(stride i) for i < count; imaginary parts times `sign`.
template <RealScalar T>
void fill_powers(const PowerMode& mode, Index stride, Index count, std::complex<double> factor,
                 double sign, T* re, T* im) {
  using P = simd::Packet<double>;
  constexpr int w = simd::kLanes<double>;
  constexpr Index fresh = 64;
  // Lane i of a packet starts at a^(stride i); every step multiplies by a^(stride w).
  const std::complex<double> one_step = mode.power(stride);
  double start_re[std::size_t(w)], start_im[std::size_t(w)];
  std::complex<double> power = 1.0;
  for (int i = 0; i < w; ++i) {
    start_re[i] = power.real();
    start_im[i] = power.imag();
    power *= one_step;
  }
  const P lane_re = simd::load<P>(start_re), lane_im = simd::load<P>(start_im);
  const P step_re = simd::set1<P>(power.real()), step_im = simd::set1<P>(power.imag());
  const P flip = simd::set1<P>(sign);
  for (Index base = 0; base < count; base += fresh) {
    const std::complex<double> first = factor * mode.power(stride * base);
    const P first_re = simd::set1<P>(first.real()), first_im = simd::set1<P>(first.imag());
    P x = simd::sub(simd::mul(first_re, lane_re), simd::mul(first_im, lane_im));
    P y = simd::fma(first_re, lane_im, simd::mul(first_im, lane_re));
    const Index end = std::min(count, base + fresh);
    for (Index i = base; i < end; i += w) {
      double out_re[std::size_t(w)], out_im[std::size_t(w)];
      simd::store<P>(out_re, x);
      simd::store<P>(out_im, simd::mul(y, flip));
      for (Index k = 0; k < std::min<Index>(w, end - i); ++k) {
        re[i + k] = static_cast<T>(out_re[k]);
        im[i + k] = static_cast<T>(out_im[k]);
      }
      const P next = simd::sub(simd::mul(x, step_re), simd::mul(y, step_im));
      y = simd::fma(x, step_im, simd::mul(y, step_re));
      x = next;
    }
  }
}

/// Sums of powers of one channel's modes: sum_n c_n a_n^l for every l < L, and sum_l g_l a_n^l for every n.
template <RealScalar S>
class Vandermonde {
 public:
  using Complex = std::complex<double>;

  Vandermonde(Index modes, Index length)
      : modes_(modes),
        block_(block_of(length)),
        blocks_((length + block_ - 1) / block_),
        powers_(2 * modes, block_),
        starts_(2 * modes, blocks_),
        mode_(static_cast<std::size_t>(modes)) {}

  /// Length with the last block filled up; rows are as long.
  Index padded() const { return block_ * blocks_; }

  const PowerMode& mode(Index n) const { return mode_[static_cast<std::size_t>(n)]; }

  void set(Index n, const PowerMode& mode) {
    mode_[static_cast<std::size_t>(n)] = mode;
    fill_powers<S>(mode, 1, block_, 1.0, 1.0, row(powers_, n), row(powers_, modes_ + n));
  }

  /// out[l] = Re sum_n c[n] a_n^l, padded() of them.
  void rows(const Complex* c, S* out) {
    for (Index n = 0; n < modes_; ++n) {
      fill_powers<S>(mode(n), block_, blocks_, c[n], -1.0, row(starts_, n),
                     row(starts_, modes_ + n));
    }
    product_tn<S>(starts_, powers_, Eigen::Map<Matrix<S>>(out, blocks_, block_));
  }

  /// sum[n] = sum_l g[l] a_n^l and slope[n] = sum_l l g[l] a_n^(l-1) for the first `length` of g.
  void moments(const S* g, Index length, Complex* sum, Complex* slope) {
    if (gathered_.size() == 0) {
      gathered_.resize(2 * blocks_, block_);
      partial_.resize(2 * blocks_, 2 * modes_);
      factors_.resize(2, blocks_);
    }
    S* const values = gathered_.data();
    S* const slopes = values + padded();
    for (Index l = 0; l < padded(); ++l) {
      values[l] = l < length ? g[l] : S(0);
      slopes[l] = l + 1 < length ? static_cast<S>(l + 1) * g[l + 1] : S(0);
    }
    product_nt<S>(gathered_, powers_, partial_);
    for (Index n = 0; n < modes_; ++n) {
      fill_powers<double>(mode(n), block_, blocks_, 1.0, 1.0, row(factors_, 0), row(factors_, 1));
      Complex s = 0, d = 0;
      for (Index m = 0; m < blocks_; ++m) {
        const double re = factors_(0, m), im = factors_(1, m);
        const auto times = [&](Index r) {
          const double x = static_cast<double>(partial_(r, n));
          const double y = static_cast<double>(partial_(r, modes_ + n));
          return Complex(re * x - im * y, re * y + im * x);
        };
        s += times(m);
        d += times(blocks_ + m);
      }
      sum[n] = s;
      slope[n] = d;
    }
  }

 private:
  static Index block_of(Index length) {
    const Index root = static_cast<Index>(std::sqrt(static_cast<double>(length)));
    return std::clamp<Index>((root + 7) / 8 * 8, 8, 256);
  }
  template <class T>
  static T* row(Matrix<T>& m, Index i) {
    return m.data() + i * m.cols();
  }

  Index modes_, block_, blocks_;
  Matrix<S> powers_, starts_;  // rows: Re of the modes, then Im
  Matrix<S> gathered_, partial_;
  Matrix<double> factors_;
  std::vector<PowerMode> mode_;
};

/// One channel of an S4D in double.
struct S4dChannel {
  using Complex = std::complex<double>;
  std::vector<DiagonalStep<double>> steps;
  std::vector<Complex> coefficient;  ///< of the kernel: 2 C B phi

  template <RealScalar S>
  void load(const S4dParameters<S>& p, Index h, Discretization method, Vandermonde<S>& powers) {
    const auto modes = static_cast<std::size_t>(p.modes());
    steps.resize(modes);
    coefficient.resize(modes);
    const double dt = static_cast<double>(p.dt[h]);
    for (Index n = 0; n < p.modes(); ++n) {
      const auto i = static_cast<std::size_t>(n);
      const Complex lambda(p.lambda(h, n));
      steps[i] = discretize_diagonal<double>(lambda, dt, method);
      coefficient[i] = 2.0 * Complex(p.c(h, n)) * Complex(p.b(h, n)) * steps[i].phi;
      powers.set(n, PowerMode::of(lambda * dt, method));
    }
  }
};

/// Gradients of one channel in double: of a, phi, b and c of every mode.
struct S4dGradients {
  using Complex = std::complex<double>;
  std::vector<Complex> a, phi, b, c;
  std::vector<Complex> sum, slope;  ///< moments of the sequence at hand

  explicit S4dGradients(Index modes)
      : a(static_cast<std::size_t>(modes)), phi(a), b(a), c(a), sum(a), slope(a) {}

  /// Sets them to what the gradient of the kernel makes.
  template <RealScalar S>
  void set_kernel(const S4dParameters<S>& p, Index h, const S4dChannel& channel,
                  Vandermonde<S>& powers, const S* dkernel, Index length) {
    powers.moments(dkernel, length, sum.data(), slope.data());
    for (Index n = 0; n < p.modes(); ++n) {
      const auto i = static_cast<std::size_t>(n);
      const Complex pb(p.b(h, n)), pc(p.c(h, n)), hold = channel.steps[i].phi;
      // conj(sum) is the gradient of the coefficient 2 C B phi
      b[i] = 2.0 * std::conj(pc * hold * sum[i]);
      c[i] = 2.0 * std::conj(pb * hold * sum[i]);
      phi[i] = 2.0 * std::conj(pc * pb * sum[i]);
      a[i] = std::conj(channel.coefficient[i] * slope[i]);
    }
  }
  template <RealScalar S>
  void store(const S4dParameters<S>& p, Index h, Discretization method,
             S4dParameters<S>& out) const {
    const double dt = static_cast<double>(p.dt[h]);
    double ddt = 0;
    for (Index n = 0; n < p.modes(); ++n) {
      const auto i = static_cast<std::size_t>(n);
      const auto g =
          discretize_diagonal_backward<double>(Complex(p.lambda(h, n)), dt, a[i], phi[i], method);
      out.lambda(h, n) = std::complex<S>(g.lambda);
      out.b(h, n) = std::complex<S>(b[i]);
      out.c(h, n) = std::complex<S>(c[i]);
      ddt += g.dt;
    }
    out.dt[h] = static_cast<S>(ddt);
  }
};

template <RealScalar S>
void resize_like(S4dParameters<S>& out, const S4dParameters<S>& p) {
  out.lambda.resize(p.channels(), p.modes());
  out.b.resize(p.channels(), p.modes());
  out.c.resize(p.channels(), p.modes());
  out.dt.resize(p.channels());
  out.skip.setZero(p.skip.size());
}

}  // namespace detail

/// K, L x H; L is the number of rows of `kernel`.
template <RealScalar S, OutputMatrix O>
  requires std::same_as<scalar_t<O>, S>
void s4d_kernel_forward(const S4dParameters<S>& p, O&& kernel, const S4dOptions& options = {},
                        ExecutorRef executor = {}) {
  detail::require_s4d(p, options);
  detail::require_length(kernel.rows());
  detail::require_shape("kernel", kernel.rows(), kernel.cols(), kernel.rows(), p.channels(),
                        "length x channels");
  MatrixRef<S> out = kernel;
  const Index length = kernel.rows();
  detail::for_channels(p.channels(), executor, [&](Index first, Index last) {
    detail::Vandermonde<S> powers(p.modes(), length);
    detail::S4dChannel channel;
    Matrix<S> lines(last - first, powers.padded());
    for (Index h = first; h < last; ++h) {
      channel.load(p, h, options.discretization, powers);
      powers.rows(channel.coefficient.data(), lines.data() + (h - first) * lines.cols());
    }
    out.middleCols(first, last - first) = lines.leftCols(length).transpose();
  });
}

/// The same, returned.
template <RealScalar S>
Matrix<S> s4d_kernel(const S4dParameters<S>& p, Index length, const S4dOptions& options = {},
                     ExecutorRef executor = {}) {
  detail::require_length(length);
  detail::require_s4d(p, options);
  Matrix<S> kernel(length, p.channels());
  s4d_kernel_forward(p, kernel, options, executor);
  return kernel;
}

/// Gradients of <dkernel, K>; resizes and overwrites `dp` (skip, which K does not have, gets zeros).
template <RealScalar S, MatrixLike DK>
  requires std::same_as<scalar_t<DK>, S>
void s4d_kernel_backward(const S4dParameters<S>& p, const DK& dkernel, S4dParameters<S>& dp,
                         const S4dOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_s4d(p, options);
  detail::require_length(dkernel.rows());
  detail::require_shape("dkernel", dkernel.rows(), dkernel.cols(), dkernel.rows(), p.channels(),
                        "length x channels");
  const Index length = dkernel.rows();
  const ConstMatrixRef<S> dk = dkernel;
  detail::resize_like(dp, p);
  detail::for_channels(p.channels(), executor, [&](Index first, Index last) {
    detail::Vandermonde<S> powers(p.modes(), length);
    detail::S4dChannel channel;
    const Matrix<S> lines = dk.middleCols(first, last - first).transpose();
    detail::S4dGradients g(p.modes());
    for (Index h = first; h < last; ++h) {
      channel.load(p, h, options.discretization, powers);
      g.set_kernel(p, h, channel, powers, lines.data() + (h - first) * length, length);
      g.store(p, h, options.discretization, dp);
    }
  });
}

EIGENBLOCKS_NAMESPACE_END
