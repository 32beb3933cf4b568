// S4, a state space layer with HiPPO dynamics: convolution for training, recurrence for decoding.
//
//   x_t = Abar x_{t-1} + Bbar u_t      y_t = C x_t + D u_t        A = diag(lambda) - sum_r p_r p_r^*, bilinear transform
//
//   Random random(1);
//   S4Parameters<float> p = s4_parameters<float>(H, 64, random);       // HiPPO-LegS, 64 states = 32 modes; c is C
//   p.c = s4_truncate(p, T);                                           // C~ of the training length, as s4 trains it
//   KernelLayerSaved<float> saved;
//   s4_forward(saved, p, u, y);                                        // kernel of length T and one long convolution
//   s4_backward(saved, p, u, dy, du, dp);                              // every parameter, skip (D) included
//   p.c = s4_untruncate(p, T).c;                                       // C again, to decode (check .reliable)
//   auto state = s4_state(p);                                          // a regular value: a copy is a snapshot
//   s4_step(state, rows, out);                                         // any number of rows, O(n R H) each, no allocation
//   s4_recurrent_backward(p, u, dy, du, dp, &x0, &dxt, &dx0);          // gradients of the recurrence from state to state
//
//   u, y T x H.  Both forms, and any cut into steps, agree up to rounding.  Parameters, C and C~, gradients of complex numbers,
//   errors: s4_kernel.hpp.  A step needs no inverse: Abar is a diagonal minus rank R (s4_discrete.hpp).
//   Options: S4Options of s4_kernel.hpp; the recurrence always reads c as C.  T = 0 is valid.
//
// Unlike LegS with 1/t (ssm/legs.hpp), S4 holds A and dt constant and so forgets exponentially (kexue.fm 10162).
// Sources: arXiv 2111.00396; state-spaces/s4 (models/s4/s4.py).
#pragma once

#include <eigenblocks/ssm/s4_kernel.hpp>
#include <eigenblocks/ssm/s4d.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

struct S4InitOptions {
  HippoMeasure measure = HippoMeasure::legs;  ///< any that nplr.hpp takes
  Index rank = 0;                             ///< 0: the measure's own (1, legt 2)
  double dt_min = 1e-3, dt_max = 1e-1;
};

/// Initial parameters of H channels with N states: A and B of the measure, C complex normal (C, not C~), D normal, dt
/// log-uniform.  Errors: those of nplr, channels < 1, a range of dt that is none.
template <RealScalar S>
S4Parameters<S> s4_parameters(Index channels, Index states, Random& random,
                              const S4InitOptions& options = {}) {
  detail::require_steps(channels, options.dt_min, options.dt_max);
  const Nplr form = nplr(options.measure, states, options.rank);
  const Index modes = form.lambda.size();
  S4Parameters<S> p;
  p.lambda = form.lambda.transpose().template cast<std::complex<S>>().replicate(channels, 1);
  p.b = form.b.transpose().template cast<std::complex<S>>().replicate(channels, 1);
  p.p.resize(form.p.rows() * channels, modes);
  for (Index r = 0; r < p.p.rows(); ++r)
    p.p.row(r) = form.p.row(r / channels).template cast<std::complex<S>>();
  detail::draw_outputs(p, channels, modes, options.dt_min, options.dt_max, random);
  return p;
}

/// y of u from the zero state, by the kernel of length T.
template <RealScalar S, MatrixLike U, OutputMatrix O>
  requires SameScalar<U, O> && std::same_as<scalar_t<U>, S>
void s4_forward(KernelLayerSaved<S>& saved, const S4Parameters<S>& p, const U& u, O&& y,
                const S4Options& options = {}, ExecutorRef executor = {}) {
  detail::require_s4(p);
  detail::require_s4_options(options);
  detail::require_layer("u", u, "y", y, p.channels());
  saved.kernel.resize(u.rows(), p.channels());
  if (u.rows() > 0) s4_kernel_forward(p, saved.kernel, options, executor);
  causal_conv_forward(saved.conv, u, saved.kernel, y, p.skip, {}, executor);
}

/// Gradients of <dy, y> after s4_forward with the same arguments.  Overwrites du and dp (resized).
template <RealScalar S, MatrixLike U, MatrixLike DY, OutputMatrix DU>
  requires SameScalar<U, DY, DU> && std::same_as<scalar_t<U>, S>
void s4_backward(KernelLayerSaved<S>& saved, const S4Parameters<S>& p, const U& u, const DY& dy,
                 DU&& du, S4Parameters<S>& dp, const S4Options& options = {},
                 ExecutorRef executor = {}) {
  detail::require_s4(p);
  detail::require_s4_options(options);
  detail::require_layer("u", u, "dy", dy, p.channels());
  detail::require_layer("u", u, "du", du, p.channels());
  detail::require_saved(saved, u);
  if (u.rows() == 0) return detail::resize_like(dp, p);
  Matrix<S> dkernel(u.rows(), p.channels());
  Vector<S> dskip(p.skip.size());
  causal_conv_backward(saved.conv, u, saved.kernel, dy, du, dkernel, dskip, p.skip, executor);
  s4_kernel_backward(p, dkernel, dp, options, executor);
  dp.skip.swap(dskip);
}

// ---- Recurrence -----------------------------------------------------------------------------------

/// All that decoding needs: a regular value, a copy is a snapshot.  Channels are columns, SIMD lanes.
template <RealScalar S>
struct S4State {
  Matrix<S> e_re, e_im;        ///< n x H, the diagonal
  Matrix<S> f_re, f_im;        ///< (R*n) x H, what is taken off: f_r z_r
  Matrix<S> zeta_re, zeta_im;  ///< (R*n) x H: 2 Re zeta, -2 Im zeta
  Matrix<S> b_re, b_im;        ///< Bbar
  Matrix<S> c_re, c_im;        ///< 2 Re C, -2 Im C
  RowVector<S> skip;           ///< H
  Matrix<S> x_re, x_im;        ///< the state, n x H
  Matrix<S> z;                 ///< R x H, scratch of a step

  Index channels() const { return e_re.cols(); }
  Index modes() const { return e_re.rows(); }
  Index rank() const { return z.rows(); }
  /// x, H x n.
  Matrix<std::complex<S>> value() const {
    Matrix<std::complex<S>> x(channels(), modes());
    x.real() = x_re.transpose();
    x.imag() = x_im.transpose();
    return x;
  }
};

/// The state before the first row, of parameters whose c is C: 0, or `initial` (H x n).
template <RealScalar S>
S4State<S> s4_state(const S4Parameters<S>& p,
                    const std::type_identity_t<Matrix<std::complex<S>>>* initial = nullptr) {
  detail::require_s4(p);
  detail::require_ssm_state("initial", initial, p.channels(), p.modes());
  const Index modes = p.modes(), rank = p.rank();
  S4State<S> s;
  for (Matrix<S>* m : {&s.e_re, &s.e_im, &s.b_re, &s.b_im, &s.c_re, &s.c_im, &s.x_re, &s.x_im})
    m->setZero(modes, p.channels());
  for (Matrix<S>* m : {&s.f_re, &s.f_im, &s.zeta_re, &s.zeta_im})
    m->setZero(rank * modes, p.channels());
  s.z.setZero(rank, p.channels());
  s.skip.setZero(p.channels());
  if (p.skip.size() != 0) s.skip = p.skip.transpose();
  const auto put = [](std::complex<double> value, Index row, Index h, Matrix<S>& re,
                      Matrix<S>& im) {
    re(row, h) = static_cast<S>(value.real());
    im(row, h) = static_cast<S>(value.imag());
  };
  for (Index h = 0; h < p.channels(); ++h) {
    const detail::S4Channel channel(p, h);
    const detail::S4Discrete step(channel);
    for (Index n = 0; n < modes; ++n) {
      put(step.e[n], n, h, s.e_re, s.e_im);
      put(step.bbar[n], n, h, s.b_re, s.b_im);
      put(2.0 * std::conj(channel.c[n]), n, h, s.c_re, s.c_im);
      for (Index r = 0; r < rank; ++r) {
        put(step.f(r, n), r * modes + n, h, s.f_re, s.f_im);
        put(2.0 * std::conj(step.zeta(r, n)), r * modes + n, h, s.zeta_re, s.zeta_im);
      }
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
void s4_step_lanes(S4State<S>& s, Index h, const S* u, Index u_stride, S* y, Index y_stride,
                   Index rows) {
  const Index modes = s.modes(), rank = s.rank(), stride = s.channels();
  for (Index t = 0; t < rows; ++t) {
    const P input = simd::load<P>(u + t * u_stride + h);
    for (Index r = 0; r < rank; ++r) {
      P sum = simd::zero<P>(), other = sum;
      const S* const zeta_re = s.zeta_re.data() + r * modes * stride + h;
      const S* const zeta_im = s.zeta_im.data() + r * modes * stride + h;
      for (Index n = 0; n < modes; ++n) {
        sum = simd::fma(simd::load<P>(zeta_re + n * stride),
                        simd::load<P>(s.x_re.data() + n * stride + h), sum);
        other = simd::fma(simd::load<P>(zeta_im + n * stride),
                          simd::load<P>(s.x_im.data() + n * stride + h), other);
      }
      simd::store<P>(s.z.data() + r * stride + h, simd::neg(simd::add(sum, other)));
    }
    P sum = simd::mul(input, simd::load<P>(s.skip.data() + h)), other = simd::zero<P>();
    for (Index n = 0; n < modes; ++n) {
      const Index at = n * stride + h;
      const P e_re = simd::load<P>(s.e_re.data() + at), e_im = simd::load<P>(s.e_im.data() + at);
      const P re = simd::load<P>(s.x_re.data() + at), im = simd::load<P>(s.x_im.data() + at);
      P x = simd::fma(e_re, re, simd::mul(simd::load<P>(s.b_re.data() + at), input));
      P v = simd::fma(e_re, im, simd::mul(simd::load<P>(s.b_im.data() + at), input));
      x = simd::fma(simd::neg(e_im), im, x);
      v = simd::fma(e_im, re, v);
      for (Index r = 0; r < rank; ++r) {
        const P minus_z = simd::load<P>(s.z.data() + r * stride + h);
        x = simd::fma(simd::load<P>(s.f_re.data() + r * modes * stride + at), minus_z, x);
        v = simd::fma(simd::load<P>(s.f_im.data() + r * modes * stride + at), minus_z, v);
      }
      simd::store<P>(s.x_re.data() + at, x);
      simd::store<P>(s.x_im.data() + at, v);
      sum = simd::fma(simd::load<P>(s.c_re.data() + at), x, sum);
      other = simd::fma(simd::load<P>(s.c_im.data() + at), v, other);
    }
    simd::store<P>(y + t * y_stride + h, simd::add(sum, other));
  }
}

}  // namespace detail

/// The rows that follow what the state has seen; out may be rows.
template <MatrixLike U, OutputMatrix O>
  requires SameScalar<U, O> && RealScalar<scalar_t<U>>
void s4_step(S4State<scalar_t<U>>& state, const U& rows, O&& out) {
  detail::step_channels(rows, out, state.channels(), [&](auto packet, auto... operands) {
    detail::s4_step_lanes<decltype(packet)>(state, operands..., rows.rows());
  });
}

/// Gradients of <dy, y> + <dfinal, x_T> of the recurrence from `initial` (null: 0) over u; p.c is C.  Overwrites du, dp and,
/// unless null, dinitial (both resized).  In double; of the states only every 64th is kept, the others are recomputed.
template <RealScalar S, MatrixLike U, MatrixLike DY, OutputMatrix DU>
  requires SameScalar<U, DY, DU> && std::same_as<scalar_t<U>, S>
void s4_recurrent_backward(const S4Parameters<S>& p, const U& u, const DY& dy, DU&& du,
                           S4Parameters<S>& dp,
                           const std::type_identity_t<Matrix<std::complex<S>>>* initial = nullptr,
                           const std::type_identity_t<Matrix<std::complex<S>>>* dfinal = nullptr,
                           std::type_identity_t<Matrix<std::complex<S>>>* dinitial = nullptr,
                           ExecutorRef executor = {}) {
  using Complex = std::complex<double>;
  constexpr Index kKept = 64;
  detail::require_s4(p);
  detail::require_layer("u", u, "dy", dy, p.channels());
  detail::require_layer("u", u, "du", du, p.channels());
  detail::require_ssm_state("initial", initial, p.channels(), p.modes());
  detail::require_ssm_state("dfinal", dfinal, p.channels(), p.modes());
  const Index length = u.rows(), modes = p.modes();
  const ConstMatrixRef<S> input = u, upstream = dy;
  MatrixRef<S> dinput = du;
  detail::resize_like(dp, p);
  Matrix<std::complex<S>> dx0(p.channels(), modes);
  executor.run(p.channels(), [&](Index h, int) {
    const detail::S4Channel channel(p, h);
    detail::S4Discrete step(channel);
    detail::S4Discrete gstep = detail::S4Discrete::zero(modes, p.rank());
    detail::S4Channel g = detail::S4Channel::zero(modes, p.rank());
    const double skip = p.skip.size() != 0 ? static_cast<double>(p.skip[h]) : 0.0;
    double dskip = 0;
    Vector<Complex> x = Vector<Complex>::Zero(modes);
    if (initial != nullptr) x = initial->row(h).transpose().template cast<Complex>();
    std::vector<Vector<Complex>> kept, states(static_cast<std::size_t>(kKept + 1));
    for (Index t = 0; t < length; ++t) {
      if (t % kKept == 0) kept.push_back(x);
      step.advance(x, static_cast<double>(input(t, h)));
    }
    Vector<Complex> adjoint = Vector<Complex>::Zero(modes);
    if (dfinal != nullptr) adjoint = dfinal->row(h).transpose().template cast<Complex>();
    for (Index block = static_cast<Index>(kept.size()) - 1; block >= 0; --block) {
      const Index first = block * kKept, count = std::min(kKept, length - first);
      states[0] = kept[static_cast<std::size_t>(block)];
      for (Index i = 0; i < count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        states[at + 1] = states[at];
        step.advance(states[at + 1], static_cast<double>(input(first + i, h)));
      }
      for (Index i = count - 1; i >= 0; --i) {
        const auto at = static_cast<std::size_t>(i);
        const double up = static_cast<double>(upstream(first + i, h));
        const double in = static_cast<double>(input(first + i, h));
        for (Index n = 0; n < modes; ++n) {
          g.c[n] += 2 * up * std::conj(states[at + 1][n]);
          adjoint[n] += 2 * up * std::conj(channel.c[n]);
        }
        dskip += up * in;
        dinput(first + i, h) =
            static_cast<S>(step.advance_backward(states[at], in, adjoint, gstep) + skip * up);
      }
    }
    gstep.backward(channel, g);
    g.store(dp, h);
    if (p.skip.size() != 0) dp.skip[h] = static_cast<S>(dskip);
    dx0.row(h) = adjoint.transpose().template cast<std::complex<S>>();
  });
  if (dinitial != nullptr) dinitial->swap(dx0);
}

EIGENBLOCKS_NAMESPACE_END
