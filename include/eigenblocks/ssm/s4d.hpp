// S4D, a state space layer with a diagonal A for every channel: convolution for training, recurrence for decoding.
//
//   x_t = a x_{t-1} + phi B u_t      y_t = 2 Re sum_n C_n x_t,n + D u_t        n complex modes per channel, from x_{-1} = x0
//
//   Random random(1);
//   S4dParameters<float> p = s4d_parameters<float>(H, 64, random);     // N = 64 states = 32 modes; S4D-Lin, see S4dInit
//   KernelLayerSaved<float> saved;
//   s4d_forward(saved, p, u, y);                                       // kernel of length T and one long convolution
//   s4d_backward(saved, p, u, dy, du, dp);                             // every parameter, skip (D) included
//   s4d_forward(saved, p, u, y, {}, &x0, &xt);                         // from a state to a state, H x n complex
//   auto state = s4d_state(p);                                         // a regular value: a copy is a snapshot
//   s4d_step(state, rows, out);                                        // any number of rows, O(n H) each, no allocation
//
//   u, y T x H.  Both forms, and any cut into steps, agree up to rounding.  Parameters, kernel, gradients of complex numbers,
//   errors: s4d_kernel.hpp.  T = 0 is valid: the state passes.
//
// Initial modes, k = 0 .. N/2-1; Re lambda = -1/2 except for `real`.  Imaginary parts are negative as in state-spaces/s4;
// its one-file s4d.py has +pi k, which is the same layer with C conjugated (S4dInitOptions::positive).
//
//   lin   Im = -pi k                   inv    Im = -(N/pi) (N/(2k+1) - 1)         quad  Im = -(2k+1)^2 / pi
//   real  lambda = -(1+k), real        inv2   Im = -(N/pi) (N/(k+1) - 1)          legs  eigenvalues of HiPPO-LegS's normal part
//
// B = 1, for legs V^* B of ssm/nplr.hpp (theory has half of it; the official code drops the factor).  C complex normal, D
// normal, dt log-uniform in [1e-3, 1e-1].
//
// Sources: arXiv 2206.11893; state-spaces/s4.
#pragma once

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/ssm/nplr.hpp>
#include <eigenblocks/ssm/s4d_kernel.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class S4dInit { lin, inv, inv2, quad, real, legs };

struct S4dInitOptions {
  S4dInit init = S4dInit::lin;
  double dt_min = 1e-3, dt_max = 1e-1;
  bool positive = false;  ///< positive imaginary parts
};

/// The N/2 initial modes of N states.  Errors: invalid_argument unless N is even and at least 2.
inline Vector<std::complex<double>> s4d_modes(S4dInit init, Index states) {
  detail::require(init >= S4dInit::lin && init <= S4dInit::legs, "init (", init,
                  ") is not an S4dInit");
  detail::require(states >= 2 && states % 2 == 0, "states (", states,
                  ") must be even and at least 2");
  if (init == S4dInit::legs) return nplr(HippoMeasure::legs, states).lambda;
  const double n = static_cast<double>(states), pi = static_cast<double>(EIGEN_PI);
  Vector<std::complex<double>> lambda(states / 2);
  for (Index i = 0; i < lambda.size(); ++i) {
    const double k = static_cast<double>(i);
    double frequency = 0;
    if (init == S4dInit::lin) frequency = pi * k;
    if (init == S4dInit::inv) frequency = n / pi * (n / (2 * k + 1) - 1);
    if (init == S4dInit::inv2) frequency = n / pi * (n / (k + 1) - 1);
    if (init == S4dInit::quad) frequency = (2 * k + 1) * (2 * k + 1) / pi;
    lambda[i] = {init == S4dInit::real ? -(1 + k) : -0.5, -frequency};
  }
  return lambda;
}

namespace detail {

inline void require_steps(Index channels, double dt_min, double dt_max) {
  require(channels >= 1, "channels (", channels, ") must be at least 1");
  require(dt_min > 0 && dt_min <= dt_max && std::isfinite(dt_max), "dt_min (", dt_min,
          ") must be positive and at most dt_max (", dt_max, "), which must be finite");
}

/// C complex normal of variance 1, D normal, dt log-uniform.
template <class Parameters>
void draw_outputs(Parameters& p, Index channels, Index modes, double dt_min, double dt_max,
                  Random& random) {
  using Complex = scalar_t<decltype(p.c)>;
  using S = typename Complex::value_type;
  p.c.resize(channels, modes);
  p.dt.resize(channels);
  p.skip.resize(channels);
  for (Index h = 0; h < channels; ++h) {
    p.dt[h] = static_cast<S>(dt_min * std::exp(random.uniform() * std::log(dt_max / dt_min)));
    p.skip[h] = static_cast<S>(random.normal());
    for (Index n = 0; n < modes; ++n) {
      const double re = random.normal() * std::sqrt(0.5), im = random.normal() * std::sqrt(0.5);
      p.c(h, n) = {static_cast<S>(re), static_cast<S>(im)};
    }
  }
}

}  // namespace detail

/// Initial parameters of H channels with N states.
template <RealScalar S>
S4dParameters<S> s4d_parameters(Index channels, Index states, Random& random,
                                const S4dInitOptions& options = {}) {
  detail::require_steps(channels, options.dt_min, options.dt_max);
  Vector<std::complex<double>> lambda = s4d_modes(options.init, states);
  Vector<std::complex<double>> b = Vector<std::complex<double>>::Ones(lambda.size());
  if (options.init == S4dInit::legs) b = nplr(HippoMeasure::legs, states).b;
  if (options.positive) {
    lambda = lambda.conjugate().eval();
    b = b.conjugate().eval();
  }
  S4dParameters<S> p;
  p.lambda = lambda.transpose().template cast<std::complex<S>>().replicate(channels, 1);
  p.b = b.transpose().template cast<std::complex<S>>().replicate(channels, 1);
  detail::draw_outputs(p, channels, lambda.size(), options.dt_min, options.dt_max, random);
  return p;
}

namespace detail {

template <class M>
void require_ssm_state(const char* name, const M* x, Index channels, Index modes) {
  if (x != nullptr) require_shape(name, x->rows(), x->cols(), channels, modes, "channels x modes");
}

/// Column `h` from the last row up.
template <RealScalar S>
void reverse_column(const ConstMatrixRef<S>& u, Index h, S* out) {
  for (Index t = 0; t < u.rows(); ++t) out[t] = u(u.rows() - 1 - t, h);
}

}  // namespace detail

/// y of u, and the state after the last row into `final_state` (resized) unless null.
template <RealScalar S, MatrixLike U, OutputMatrix O>
  requires SameScalar<U, O> && std::same_as<scalar_t<U>, S>
void s4d_forward(KernelLayerSaved<S>& saved, const S4dParameters<S>& p, const U& u, O&& y,
                 const S4dOptions& options = {},
                 const std::type_identity_t<Matrix<std::complex<S>>>* initial = nullptr,
                 std::type_identity_t<Matrix<std::complex<S>>>* final_state = nullptr,
                 ExecutorRef executor = {}) {
  using Complex = std::complex<double>;
  detail::require_s4d(p, options);
  detail::require_layer("u", u, "y", y, p.channels());
  detail::require_ssm_state("initial", initial, p.channels(), p.modes());
  const Index length = u.rows(), modes = p.modes();
  saved.kernel.resize(length, p.channels());
  if (length > 0) s4d_kernel_forward(p, saved.kernel, options, executor);
  causal_conv_forward(saved.conv, u, saved.kernel, y, p.skip, {}, executor);
  if (initial == nullptr && final_state == nullptr) return;
  Matrix<std::complex<S>> last =
      initial != nullptr ? *initial : Matrix<std::complex<S>>::Zero(p.channels(), modes).eval();
  if (length > 0) {
    const ConstMatrixRef<S> input = u;
    MatrixRef<S> out = y;
    detail::for_channels(p.channels(), executor, [&](Index first, Index end) {
      detail::Vandermonde<S> powers(modes, length);
      detail::S4dChannel channel;
      std::vector<Complex> sum(static_cast<std::size_t>(modes)), slope(sum);
      Vector<S> line(powers.padded());
      for (Index h = first; h < end; ++h) {
        channel.load(p, h, options.discretization, powers);
        const auto at = [](Index n) { return static_cast<std::size_t>(n); };
        if (initial != nullptr) {  // y_t += 2 Re sum C a^(t+1) x0
          for (Index n = 0; n < modes; ++n)
            sum[at(n)] =
                2.0 * Complex(p.c(h, n)) * channel.steps[at(n)].a * Complex((*initial)(h, n));
          powers.rows(sum.data(), line.data());
          out.col(h) += line.head(length);
        }
        if (final_state == nullptr) continue;
        detail::reverse_column<S>(input, h, line.data());
        powers.moments(line.data(), length, sum.data(), slope.data());
        for (Index n = 0; n < modes; ++n) {
          last(h, n) = std::complex<S>(powers.mode(n).power(length) * Complex(last(h, n)) +
                                       channel.steps[at(n)].phi * Complex(p.b(h, n)) * sum[at(n)]);
        }
      }
    });
  }
  if (final_state != nullptr) final_state->swap(last);
}

/// Gradients of <dy, y> (+ those of the final state) after s4d_forward with the same arguments.  Overwrites du, dp and,
/// unless null, dinitial (both resized).
template <RealScalar S, MatrixLike U, MatrixLike DY, OutputMatrix DU>
  requires SameScalar<U, DY, DU> && std::same_as<scalar_t<U>, S>
void s4d_backward(KernelLayerSaved<S>& saved, const S4dParameters<S>& p, const U& u, const DY& dy,
                  DU&& du, S4dParameters<S>& dp, const S4dOptions& options = {},
                  const std::type_identity_t<Matrix<std::complex<S>>>* initial = nullptr,
                  const std::type_identity_t<Matrix<std::complex<S>>>* dfinal = nullptr,
                  std::type_identity_t<Matrix<std::complex<S>>>* dinitial = nullptr,
                  ExecutorRef executor = {}) {
  using Complex = std::complex<double>;
  detail::require_s4d(p, options);
  detail::require_layer("u", u, "dy", dy, p.channels());
  detail::require_layer("u", u, "du", du, p.channels());
  detail::require_saved(saved, u);
  detail::require_ssm_state("initial", initial, p.channels(), p.modes());
  detail::require_ssm_state("dfinal", dfinal, p.channels(), p.modes());
  const Index length = u.rows(), modes = p.modes();
  detail::resize_like(dp, p);
  Matrix<Complex> dx0 = Matrix<Complex>::Zero(p.channels(), modes);
  if (length == 0) {
    dp.lambda.setZero();
    dp.b.setZero();
    dp.c.setZero();
    dp.dt.setZero();
    if (dfinal != nullptr) dx0 = dfinal->template cast<Complex>();
  } else {
    Matrix<S> dkernel(length, p.channels());
    causal_conv_backward(saved.conv, u, saved.kernel, dy, du, dkernel, dp.skip, p.skip, executor);
    const ConstMatrixRef<S> input = u, upstream = dy;
    MatrixRef<S> dinput = du;
    detail::for_channels(p.channels(), executor, [&](Index first, Index end) {
      detail::Vandermonde<S> powers(modes, length);
      detail::S4dChannel channel;
      detail::S4dGradients g(modes);
      Vector<S> line(powers.padded());
      std::vector<Complex> weight(static_cast<std::size_t>(modes));
      for (Index h = first; h < end; ++h) {
        channel.load(p, h, options.discretization, powers);
        line.head(length) = dkernel.col(h);
        g.set_kernel(p, h, channel, powers, line.data(), length);
        if (initial != nullptr || dinitial != nullptr) {  // y_t += Re sum (2 C a x0) a^t
          line.head(length) = upstream.col(h);
          powers.moments(line.data(), length, g.sum.data(), g.slope.data());
          for (Index n = 0; n < modes; ++n) {
            const auto i = static_cast<std::size_t>(n);
            const Complex a = channel.steps[i].a, c(p.c(h, n));
            const Complex x0 = initial != nullptr ? Complex((*initial)(h, n)) : Complex(0);
            g.c[i] += 2.0 * std::conj(a * x0 * g.sum[i]);
            g.a[i] += 2.0 * std::conj(c * x0 * (g.sum[i] + a * g.slope[i]));
            dx0(h, n) = 2.0 * std::conj(c * a * g.sum[i]);
          }
        }
        if (dfinal != nullptr) {  // x_T = a^T x0 + phi B sum_l u_{T-1-l} a^l
          detail::reverse_column<S>(input, h, line.data());
          powers.moments(line.data(), length, g.sum.data(), g.slope.data());
          for (Index n = 0; n < modes; ++n) {
            const auto i = static_cast<std::size_t>(n);
            const Complex b(p.b(h, n)), phi = channel.steps[i].phi, up((*dfinal)(h, n));
            g.b[i] += std::conj(phi * g.sum[i]) * up;
            g.phi[i] += std::conj(b * g.sum[i]) * up;
            g.a[i] += std::conj(phi * b * g.slope[i]) * up;
            if (initial != nullptr) {
              g.a[i] += std::conj(static_cast<double>(length) * powers.mode(n).power(length - 1) *
                                  Complex((*initial)(h, n))) *
                        up;
            }
            dx0(h, n) += std::conj(powers.mode(n).power(length)) * up;
            weight[i] = std::conj(up) * phi * b;
          }
          powers.rows(weight.data(), line.data());
          for (Index t = 0; t < length; ++t) dinput(t, h) += line[length - 1 - t];
        }
        g.store(p, h, options.discretization, dp);
      }
    });
  }
  if (dinitial != nullptr) *dinitial = dx0.template cast<std::complex<S>>();
}

// ---- Recurrence -----------------------------------------------------------------------------------

/// All that decoding needs: a regular value, a copy is a snapshot.  Channels are columns, SIMD lanes.
template <RealScalar S>
struct S4dState {
  Matrix<S> a_re, a_im;  ///< n x H
  Matrix<S> b_re, b_im;  ///< phi B
  Matrix<S> c_re, c_im;  ///< 2 Re C, -2 Im C
  RowVector<S> skip;     ///< H
  Matrix<S> x_re, x_im;  ///< the state, n x H

  Index channels() const { return a_re.cols(); }
  Index modes() const { return a_re.rows(); }
  /// x, H x n.
  Matrix<std::complex<S>> value() const {
    Matrix<std::complex<S>> x(channels(), modes());
    x.real() = x_re.transpose();
    x.imag() = x_im.transpose();
    return x;
  }
};

/// The state before the first row: 0, or `initial` (H x n).
template <RealScalar S>
S4dState<S> s4d_state(const S4dParameters<S>& p, const S4dOptions& options = {},
                      const std::type_identity_t<Matrix<std::complex<S>>>* initial = nullptr) {
  detail::require_s4d(p, options);
  detail::require_ssm_state("initial", initial, p.channels(), p.modes());
  S4dState<S> s;
  for (Matrix<S>* m : {&s.a_re, &s.a_im, &s.b_re, &s.b_im, &s.c_re, &s.c_im, &s.x_re, &s.x_im})
    m->setZero(p.modes(), p.channels());
  s.skip.setZero(p.channels());
  if (p.skip.size() != 0) s.skip = p.skip.transpose();
  for (Index h = 0; h < p.channels(); ++h) {
    for (Index n = 0; n < p.modes(); ++n) {
      const auto step =
          discretize_diagonal<double>(std::complex<double>(p.lambda(h, n)),
                                      static_cast<double>(p.dt[h]), options.discretization);
      const std::complex<double> b = step.phi * std::complex<double>(p.b(h, n));
      s.a_re(n, h) = static_cast<S>(step.a.real());
      s.a_im(n, h) = static_cast<S>(step.a.imag());
      s.b_re(n, h) = static_cast<S>(b.real());
      s.b_im(n, h) = static_cast<S>(b.imag());
      s.c_re(n, h) = 2 * p.c(h, n).real();
      s.c_im(n, h) = -2 * p.c(h, n).imag();
    }
  }
  if (initial != nullptr) {
    s.x_re = initial->real().transpose();
    s.x_im = initial->imag().transpose();
  }
  return s;
}

namespace detail {

/// All rows for the channels of a packet, the first of which is h.
template <class P, RealScalar S>
void s4d_step_lanes(S4dState<S>& s, Index h, const S* u, Index u_stride, S* y, Index y_stride,
                    Index rows) {
  const Index modes = s.modes(), stride = s.channels();
  for (Index t = 0; t < rows; ++t) {
    const P input = simd::load<P>(u + t * u_stride + h);
    P sum = simd::mul(input, simd::load<P>(s.skip.data() + h)), other = simd::zero<P>();
    Index at = h;
    for (Index n = 0; n < modes; ++n, at += stride) {
      const P a_re = simd::load<P>(s.a_re.data() + at), a_im = simd::load<P>(s.a_im.data() + at);
      const P re = simd::load<P>(s.x_re.data() + at), im = simd::load<P>(s.x_im.data() + at);
      const P x = simd::fma(
          a_re, re,
          simd::fma(simd::neg(a_im), im, simd::mul(simd::load<P>(s.b_re.data() + at), input)));
      const P z = simd::fma(
          a_re, im, simd::fma(a_im, re, simd::mul(simd::load<P>(s.b_im.data() + at), input)));
      simd::store<P>(s.x_re.data() + at, x);
      simd::store<P>(s.x_im.data() + at, z);
      sum = simd::fma(simd::load<P>(s.c_re.data() + at), x, sum);
      other = simd::fma(simd::load<P>(s.c_im.data() + at), z, other);
    }
    simd::store<P>(y + t * y_stride + h, simd::add(sum, other));
  }
}

}  // namespace detail

/// The rows that follow what the state has seen; out may be rows.
template <MatrixLike U, OutputMatrix O>
  requires SameScalar<U, O> && RealScalar<scalar_t<U>>
void s4d_step(S4dState<scalar_t<U>>& state, const U& rows, O&& out) {
  detail::step_channels(rows, out, state.channels(), [&](auto packet, auto... operands) {
    detail::s4d_step_lanes<decltype(packet)>(state, operands..., rows.rows());
  });
}

EIGENBLOCKS_NAMESPACE_END
