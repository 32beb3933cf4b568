// S5: one diagonal state space system of P complex modes for all H channels.
//
//   x_t = a x_{t-1} + phi (B u_t)        y_t = k Re(C x_t) + D u_t        a, phi from (Lambda, dt), ssm/discretize.hpp
//   k = 2 with conj_sym (the modes stand for conjugate pairs), else 1
//
//   S5Parameters<float> p = ...;                          // .lambda P, .b P x H, .c H x P, .d H, .dt P (or 1)
//   s5_forward(u, p, y);                                  // u, y T x H; zoh, conj_sym
//   s5_backward(u, p, dy, du, dp);                        // dp an S5Parameters; states are recomputed
//   auto state = s5_state(p);                             // x = 0; a regular value
//   s5_step(state, u, y);                                 // any number of rows
//   s5_forward(u, p, y, {.bidirectional = true});         // c is H x 2P: the right half reads a scan from the end
//   p = s5_parameters<float>(random, P, H, {.blocks = 4})  // ssm/s5_init.hpp: blocks of the normal part of HiPPO-LegS
//
// Two real products (2 P H each a token and direction) and a scan; the forward pass goes in blocks of rows and needs memory for
// one of them, the backward for 4 T P numbers.  Chunks agree up to rounding; results are bitwise the same for every executor.
// Complex gradients are dL/dRe + i dL/dIm.  Outputs must not overlap inputs.
// Errors (invalid_argument, nothing written): shapes, dt not positive and finite, forward and gbt discretisations (use zoh,
// bilinear, backward), bidirectional with s5_state.
// Source: arXiv 2208.04933, lindermanlab/S5.
#pragma once

#include <eigenblocks/ssm/diagonal_mimo.hpp>
#include <eigenblocks/ssm/discretize.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Parameters, or their gradients.
template <RealScalar S>
struct S5Parameters {
  using Complex = std::complex<S>;
  Vector<Complex> lambda;  ///< P
  Matrix<Complex> b;       ///< P x H
  Matrix<Complex> c;       ///< H x P; bidirectional: H x 2P
  Vector<S> d;             ///< H
  Vector<S> dt;            ///< P, or 1 for all

  Index modes() const { return lambda.size(); }
  Index channels() const { return d.size(); }
};

struct S5Options {
  Discretization method = Discretization::zoh;  ///< zoh, bilinear or backward
  bool conj_sym = true;
  bool bidirectional = false;
};

namespace detail {

template <RealScalar S>
void require_s5(const S5Parameters<S>& p, const S5Options& o) {
  const Index n = p.modes(), h = p.channels();
  require(o.method == Discretization::zoh || o.method == Discretization::bilinear ||
              o.method == Discretization::backward,
          "method (", o.method, ") must be zoh, bilinear or backward");
  require_shape("b", p.b.rows(), p.b.cols(), n, h, "entries of lambda, entries of d");
  require_shape("c", p.c.rows(), p.c.cols(), h, o.bidirectional ? 2 * n : n,
                "entries of d, entries of lambda (twice if bidirectional)");
  require(p.dt.size() == n || p.dt.size() == 1, "dt has ", p.dt.size(), " entries, expected 1 or ",
          n, " (one for each lambda)");
  for (Index i = 0; i < p.dt.size(); ++i) require_step(static_cast<double>(p.dt[i]));
}

template <RealScalar S>
DiagonalMimo<S> s5_layer(const S5Parameters<S>& p, const S5Options& o) {
  Vector<std::complex<S>> a, phi;
  discretize_diagonal<S>(p.lambda, p.dt, a, phi, o.method);
  DiagonalMimo<S> layer;
  layer.set(a, phi.asDiagonal() * p.b, p.c, p.d, o.conj_sym ? S(2) : S(1));
  return layer;
}

}  // namespace detail

/// y (T x H) from u (T x H), from the state 0.
template <MatrixLike U, OutputMatrix Y>
  requires SameScalar<U, Y> && RealScalar<scalar_t<U>>
void s5_forward(const U& u, const S5Parameters<scalar_t<U>>& parameters, Y&& y,
                const S5Options& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  detail::require_s5(parameters, options);
  detail::require_shape("u", u.rows(), u.cols(), u.rows(), parameters.channels(),
                        "any rows, entries of d");
  detail::require_shape("y", y.rows(), y.cols(), u.rows(), u.cols(), "shape of u");
  const detail::DiagonalMimo<S> layer = detail::s5_layer(parameters, options);
  Vector<std::complex<S>> x = Vector<std::complex<S>>::Zero(parameters.modes());
  Workspace workspace;
  layer.forward(u, y, x, workspace.shared(layer.bytes(u.rows())), executor);
}

/// Gradients of all parameters and of u from dy.  Overwrites du; dparameters gets the shapes of parameters.
template <MatrixLike U, MatrixLike G, OutputMatrix DU>
  requires SameScalar<U, G, DU> && RealScalar<scalar_t<U>>
void s5_backward(const U& u, const S5Parameters<scalar_t<U>>& parameters, const G& dy, DU&& du,
                 S5Parameters<scalar_t<U>>& dparameters, const S5Options& options = {},
                 ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  using Complex = std::complex<S>;
  detail::require_s5(parameters, options);
  detail::require_shape("u", u.rows(), u.cols(), u.rows(), parameters.channels(),
                        "any rows, entries of d");
  detail::require_shape("dy", dy.rows(), dy.cols(), u.rows(), u.cols(), "shape of u");
  detail::require_shape("du", du.rows(), du.cols(), u.rows(), u.cols(), "shape of u");
  const detail::DiagonalMimo<S> layer = detail::s5_layer(parameters, options);
  detail::DiagonalMimoGradients<S> g;
  const Vector<Complex> zero = Vector<Complex>::Zero(parameters.modes());
  g.set(layer, options.conj_sym ? S(2) : S(1), u, zero, dy, nullptr, du, executor);
  Vector<Complex> a, phi, dphi(parameters.modes());
  discretize_diagonal<S>(parameters.lambda, parameters.dt, a, phi, options.method);
  for (Index n = 0; n < parameters.modes(); ++n) {
    dphi[n] = parameters.b.row(n).conjugate().cwiseProduct(g.b.row(n)).sum();
    g.b.row(n) *= std::conj(phi[n]);
  }
  discretize_diagonal_backward<S>(parameters.lambda, parameters.dt, g.a, dphi, dparameters.lambda,
                                  dparameters.dt, options.method);
  dparameters.b = std::move(g.b);
  dparameters.c = std::move(g.c);
  dparameters.d = std::move(g.d);
}

/// What a step needs: the layer, discretised once, and x.  A regular value; a copy is a snapshot.
template <RealScalar S>
struct S5State {
  detail::DiagonalMimo<S> layer;
  Vector<std::complex<S>> x;
  Workspace scratch{};  ///< not part of the value
};

/// The state 0 of these parameters, which are copied.
template <RealScalar S>
S5State<S> s5_state(const S5Parameters<S>& parameters, const S5Options& options = {}) {
  detail::require(!options.bidirectional, "bidirectional layers have no steps");
  detail::require_s5(parameters, options);
  return {.layer = detail::s5_layer(parameters, options),
          .x = Vector<std::complex<S>>::Zero(parameters.modes())};
}

/// The rows that follow.  Up to 8 rows allocate nothing once the state has seen a call.
template <MatrixLike U, OutputMatrix Y>
  requires SameScalar<U, Y> && RealScalar<scalar_t<U>>
void s5_step(S5State<scalar_t<U>>& state, const U& u, Y&& y, ExecutorRef executor = {}) {
  detail::require_shape("u", u.rows(), u.cols(), u.rows(), state.layer.channels(),
                        "any rows, channels of the state");
  detail::require_shape("y", y.rows(), y.cols(), u.rows(), u.cols(), "shape of u");
  state.layer.forward(u, y, state.x, state.scratch.shared(state.layer.bytes(u.rows())), executor);
}

EIGENBLOCKS_NAMESPACE_END
