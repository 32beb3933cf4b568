// LRU, the linear recurrent unit: a diagonal complex recurrence made stable and well scaled by its parameters.
//
//   lambda = exp(-e^nu + i e^theta)        h_t = lambda h_{t-1} + e^gamma (B u_t)        y_t = Re(C h_t) + D u_t
//
//   LruParameters<float> p = lru_parameters<float>(random, N, H, {.r_min = 0.9, .r_max = 0.999});
//   lru_forward(u, p, y, initial, &final);                // u, y T x H; states complex, N
//   lru_backward(u, p, dy, du, dp, initial, &dfinal, &dinitial);
//   auto state = lru_state(p);                            // h = 0; a regular value
//   lru_step(state, u, y);                                // any number of rows
//   const LruRing ring = lru_init(u1, u2);                // nu, theta, gamma from uniform draws
//
// |lambda| = exp(-e^nu) < 1 for every nu.  lru_init draws lambda uniformly on the ring r_min <= |lambda| <= r_max with phases
// up to max_phase, and sets e^gamma = sqrt(1 - |lambda|^2), by expm1: then E|h|^2 = E|B u|^2 for white u in the long run.
// kexue.fm 9554's real variant is theta = -inf (phase 0) with real B and C.
// Forward works in blocks of rows, the backward recomputes states (4 T N numbers).  Chunks agree up to rounding; results are
// bitwise the same for every executor.  Complex gradients are dL/dRe + i dL/dIm.  Outputs must not overlap inputs.
// Errors (invalid_argument, nothing written): shapes; r_min, r_max not 0 <= r_min <= r_max <= 1, draws outside [0, 1].
// Sources: arXiv 2303.06349, NicolasZucchet/minimal-LRU; kexue.fm 9554.
#pragma once

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/ssm/diagonal_mimo.hpp>

#include <cmath>
#include <limits>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Parameters, or their gradients.
template <RealScalar S>
struct LruParameters {
  using Complex = std::complex<S>;
  Vector<S> nu_log, theta_log, gamma_log;  ///< N
  Matrix<Complex> b;                       ///< N x H
  Matrix<Complex> c;                       ///< H x N
  Vector<S> d;                             ///< H

  Index modes() const { return nu_log.size(); }
  Index channels() const { return d.size(); }
};

struct LruInitOptions {
  double r_min = 0;
  double r_max = 1;
  double max_phase = 6.28;
};

/// nu, theta and gamma (their logarithms, as they are stored).
struct LruRing {
  Vector<double> nu_log, theta_log, gamma_log;
};

/// From uniform draws u1 (squared radii) and u2 (phases).
inline LruRing lru_init(const ConstVectorRef<double>& u1, const ConstVectorRef<double>& u2,
                        const LruInitOptions& options = {}) {
  const double low = options.r_min, high = options.r_max;
  detail::require(0 <= low && low <= high && high <= 1, "r_min (", low, ") and r_max (", high,
                  ") must be ordered within [0, 1]");
  detail::require(options.max_phase >= 0 && std::isfinite(options.max_phase), "max_phase (",
                  options.max_phase, ") must be non-negative and finite");
  detail::require_size("u2", u2.size(), u1.size(), "entries of u1");
  for (Index i = 0; i < u1.size(); ++i) {
    detail::require(0 <= u1[i] && u1[i] <= 1 && 0 <= u2[i] && u2[i] <= 1, "draw ", i, " (", u1[i],
                    ", ", u2[i], ") is outside [0, 1]");
  }
  LruRing ring{Vector<double>(u1.size()), Vector<double>(u1.size()), Vector<double>(u1.size())};
  for (Index i = 0; i < u1.size(); ++i) {
    const double square =
        std::max(u1[i] * (high * high - low * low) + low * low, std::numeric_limits<double>::min());
    const double nu = -0.5 * std::log(square);
    ring.nu_log[i] = std::log(nu);
    ring.theta_log[i] = std::log(options.max_phase * u2[i]);
    ring.gamma_log[i] = 0.5 * std::log(-std::expm1(-2 * nu));
  }
  return ring;
}

/// A fresh layer: the ring, B of standard deviation 1/sqrt(2H) and C of 1/sqrt(N) in each part, D standard normal.
template <RealScalar S>
LruParameters<S> lru_parameters(Random& random, Index modes, Index channels,
                                const LruInitOptions& options = {}) {
  detail::require(modes >= 0 && channels >= 0, "modes (", modes, ") and channels (", channels,
                  ") must not be negative");
  Vector<double> u1(modes), u2(modes);
  for (Index i = 0; i < modes; ++i) u1[i] = random.uniform();
  for (Index i = 0; i < modes; ++i) u2[i] = random.uniform();
  const LruRing ring = lru_init(u1, u2, options);
  const auto normal = [&](Index rows, Index cols, double spread) {
    Matrix<std::complex<S>> m(rows, cols);
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) {
        const double re = spread * random.normal(), im = spread * random.normal();
        m(i, j) = {static_cast<S>(re), static_cast<S>(im)};
      }
    }
    return m;
  };
  LruParameters<S> p{ring.nu_log.cast<S>(),
                     ring.theta_log.cast<S>(),
                     ring.gamma_log.cast<S>(),
                     normal(modes, channels, std::sqrt(0.5 / static_cast<double>(channels))),
                     normal(channels, modes, 1 / std::sqrt(static_cast<double>(modes))),
                     Vector<S>(channels)};
  for (Index i = 0; i < channels; ++i) p.d[i] = static_cast<S>(random.normal());
  return p;
}

namespace detail {

template <RealScalar S>
void require_lru(const LruParameters<S>& p, const Vector<std::complex<S>>& initial) {
  const Index n = p.modes(), h = p.channels();
  require_size("theta_log", p.theta_log.size(), n, "entries of nu_log");
  require_size("gamma_log", p.gamma_log.size(), n, "entries of nu_log");
  require_shape("b", p.b.rows(), p.b.cols(), n, h, "entries of nu_log, entries of d");
  require_shape("c", p.c.rows(), p.c.cols(), h, n, "entries of d, entries of nu_log");
  require(initial.size() == 0 || initial.size() == n, "initial has ", initial.size(),
          " entries, expected ", n, " (modes), or none");
}

/// lambda of mode n, in double.
template <RealScalar S>
std::complex<double> lru_lambda(const LruParameters<S>& p, Index n) {
  const double radius = std::exp(-std::exp(static_cast<double>(p.nu_log[n])));
  const double phase = std::exp(static_cast<double>(p.theta_log[n]));
  return {radius * std::cos(phase), radius * std::sin(phase)};
}

template <RealScalar S>
DiagonalMimo<S> lru_layer(const LruParameters<S>& p) {
  const Index n = p.modes();
  Vector<std::complex<S>> a(n);
  Matrix<std::complex<S>> b = p.b;
  for (Index i = 0; i < n; ++i) {
    a[i] = std::complex<S>(lru_lambda(p, i));
    b.row(i) *= std::exp(p.gamma_log[i]);
  }
  DiagonalMimo<S> layer;
  layer.set(a, b, p.c, p.d, S(1));
  return layer;
}

template <RealScalar S>
Vector<std::complex<S>> lru_initial(const Vector<std::complex<S>>& initial, Index modes) {
  if (initial.size() != 0) return initial;
  return Vector<std::complex<S>>::Zero(modes);
}

}  // namespace detail

/// y (T x H) from u (T x H), behind the state `initial` (empty: 0); the last state into *final unless that is null.
template <MatrixLike U, OutputMatrix Y>
  requires SameScalar<U, Y> && RealScalar<scalar_t<U>>
void lru_forward(const U& u, const LruParameters<scalar_t<U>>& parameters, Y&& y,
                 const Vector<std::complex<scalar_t<U>>>& initial = {},
                 Vector<std::complex<scalar_t<U>>>* final = nullptr, ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  detail::require_lru(parameters, initial);
  detail::require_shape("u", u.rows(), u.cols(), u.rows(), parameters.channels(),
                        "any rows, entries of d");
  detail::require_shape("y", y.rows(), y.cols(), u.rows(), u.cols(), "shape of u");
  const detail::DiagonalMimo<S> layer = detail::lru_layer(parameters);
  Vector<std::complex<S>> h = detail::lru_initial<S>(initial, parameters.modes());
  Workspace workspace;
  layer.forward(u, y, h, workspace.shared(layer.bytes(u.rows())), executor);
  if (final != nullptr) *final = std::move(h);
}

/// Gradients of all parameters, of u and, unless null, of the initial state, from dy and, unless null, that of the last
/// state.  Overwrites du; dparameters and dinitial get the shapes of what they are gradients of.
template <MatrixLike U, MatrixLike G, OutputMatrix DU>
  requires SameScalar<U, G, DU> && RealScalar<scalar_t<U>>
void lru_backward(const U& u, const LruParameters<scalar_t<U>>& parameters, const G& dy, DU&& du,
                  LruParameters<scalar_t<U>>& dparameters,
                  const Vector<std::complex<scalar_t<U>>>& initial = {},
                  const Vector<std::complex<scalar_t<U>>>* dfinal = nullptr,
                  Vector<std::complex<scalar_t<U>>>* dinitial = nullptr,
                  ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  const Index n = parameters.modes();
  detail::require_lru(parameters, initial);
  detail::require_shape("u", u.rows(), u.cols(), u.rows(), parameters.channels(),
                        "any rows, entries of d");
  detail::require_shape("dy", dy.rows(), dy.cols(), u.rows(), u.cols(), "shape of u");
  detail::require_shape("du", du.rows(), du.cols(), u.rows(), u.cols(), "shape of u");
  if (dfinal != nullptr) detail::require_size("dfinal", dfinal->size(), n, "modes");
  const detail::DiagonalMimo<S> layer = detail::lru_layer(parameters);
  detail::DiagonalMimoGradients<S> g;
  g.set(layer, S(1), u, detail::lru_initial<S>(initial, n), dy, dfinal, du, executor);
  dparameters.nu_log.resize(n);
  dparameters.theta_log.resize(n);
  dparameters.gamma_log.resize(n);
  for (Index i = 0; i < n; ++i) {
    // lambda' = -e^nu lambda by nu, i e^theta lambda by theta
    const std::complex<double> pulled =
        std::conj(std::complex<double>(g.a[i])) * detail::lru_lambda(parameters, i);
    dparameters.nu_log[i] =
        static_cast<S>(-std::exp(static_cast<double>(parameters.nu_log[i])) * pulled.real());
    dparameters.theta_log[i] =
        static_cast<S>(-std::exp(static_cast<double>(parameters.theta_log[i])) * pulled.imag());
    g.b.row(i) *= std::exp(parameters.gamma_log[i]);
    dparameters.gamma_log[i] =
        g.b.row(i).conjugate().cwiseProduct(parameters.b.row(i)).sum().real();
  }
  dparameters.b = std::move(g.b);
  dparameters.c = std::move(g.c);
  dparameters.d = std::move(g.d);
  if (dinitial != nullptr) *dinitial = std::move(g.initial);
}

/// What a step needs: the layer, prepared once, and h.  A regular value; a copy is a snapshot.
template <RealScalar S>
struct LruState {
  detail::DiagonalMimo<S> layer;
  Vector<std::complex<S>> h;
  Workspace scratch{};  ///< not part of the value
};

/// The state `initial` (empty: 0) of these parameters, which are copied.
template <RealScalar S>
LruState<S> lru_state(const LruParameters<S>& parameters,
                      const std::type_identity_t<Vector<std::complex<S>>>& initial = {}) {
  detail::require_lru(parameters, initial);
  return {.layer = detail::lru_layer(parameters),
          .h = detail::lru_initial<S>(initial, parameters.modes())};
}

/// The rows that follow.  Up to 8 rows allocate nothing once the state has seen a call.
template <MatrixLike U, OutputMatrix Y>
  requires SameScalar<U, Y> && RealScalar<scalar_t<U>>
void lru_step(LruState<scalar_t<U>>& state, const U& u, Y&& y, ExecutorRef executor = {}) {
  detail::require_shape("u", u.rows(), u.cols(), u.rows(), state.layer.channels(),
                        "any rows, channels of the state");
  detail::require_shape("y", y.rows(), y.cols(), u.rows(), u.cols(), "shape of u");
  state.layer.forward(u, y, state.h, state.scratch.shared(state.layer.bytes(u.rows())), executor);
}

EIGENBLOCKS_NAMESPACE_END
