// A linear time-invariant system over a sequence: the recurrent form of S4 and its relatives (arXiv 2111.00396).
//
//   x_t = A x_{t-1} + B u_t      y_t = C x_t + D u_t        LtiOutput::post: update, then read (S4, Mamba; the default)
//                                y_t = C x_{t-1} + D u_t    LtiOutput::pre: classical control, scipy's dlsim
//
//   const LtiSystem<double> system{.a = d.a, .b = d.b, .c = c, .d = skip};          // d of discretize.hpp: Abar, Bbar
//   lti_forward(system, u, y, {}, &x0, &xt);                                        // x0 null is 0, xt null not wanted
//   lti_backward(system, u, dy, du, dsystem, {}, &x0, &dxt, &dx0);                  // states are recomputed
//   auto state = lti_state(system);                                                 // a regular value
//   lti_step(system, state, rows, out);                                             // any number of rows, no allocation
//   const Matrix<double> k = lti_kernel(system, 100);                               // impulse response, L x (P*M)
//
//   A N x N   B N x M   C P x N   D P x M (0 x 0: none)   u T x M   y T x P   x0, xt 1 x N
//
// Inputs and outputs go through products of whole sequences (in chunks of 64 rows); what is sequential is x A^T.  Memory
// beyond the outputs: forward and step O(64 N), backward 2 T N.  Forms and cuts agree up to rounding.
// Errors (invalid_argument, nothing written): wrong shapes.  No rows: the state passes.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class LtiOutput { post, pre };

struct LtiOptions {
  LtiOutput output = LtiOutput::post;
};

/// The matrices of the system, or their gradients.
template <RealScalar S>
struct LtiSystem {
  Matrix<S> a, b, c, d;

  Index states() const { return a.rows(); }
  Index inputs() const { return b.cols(); }
  Index outputs() const { return c.rows(); }
};

/// Where the system stands: a regular value, a copy is a snapshot.
template <RealScalar S>
struct LtiState {
  LtiOptions options;
  Matrix<S> x;        ///< 1 x N
  Matrix<S> scratch;  ///< states of a chunk, no part of the value
};

namespace detail {

inline constexpr Index kLtiChunk = 64;

template <RealScalar S>
void require_lti(const LtiSystem<S>& m) {
  const Index n = m.states();
  require(m.a.cols() == n, "a is ", n, " x ", m.a.cols(), ", expected square");
  require_shape("b", m.b.rows(), m.b.cols(), n, m.b.cols(), "states of a, inputs");
  require_shape("c", m.c.rows(), m.c.cols(), m.c.rows(), n, "outputs, states of a");
  if (m.d.size() != 0)
    require_shape("d", m.d.rows(), m.d.cols(), m.outputs(), m.inputs(), "rows of c, cols of b");
}

template <RealScalar S>
void require_lti_rows(const LtiSystem<S>& m, Index rows, Index inputs, Index out_rows,
                      Index out_cols, const char* out_name) {
  require_lti(m);
  require_shape("u", rows, inputs, rows, m.inputs(), "steps, cols of b");
  require_shape(out_name, out_rows, out_cols, rows, m.outputs(), "rows of u, rows of c");
}

template <RealScalar S>
void require_lti_state(const char* name, const Matrix<S>* x, const LtiSystem<S>& m) {
  if (x != nullptr) require_shape(name, x->rows(), x->cols(), 1, m.states(), "1, states of a");
}

/// Rows 1.. of `x` from its row 0 and the inputs u, one fewer.
template <RealScalar S>
void lti_states(const LtiSystem<S>& m, const ConstMatrixRef<S>& u, MatrixRef<S> x) {
  const Index rows = u.rows();
  product_nt<S>(u, m.b, x.middleRows(1, rows));
  for (Index t = 0; t < rows; ++t) product_nt<S>(x.row(t), m.a, x.row(t + 1), Write::add);
}

/// A chunk of at most kLtiChunk rows from and to `x` (1 x N); scratch has a row more than that.
template <RealScalar S>
void lti_chunk(const LtiSystem<S>& m, const LtiOptions& options, const ConstMatrixRef<S>& u,
               MatrixRef<S> y, Matrix<S>& x, Matrix<S>& scratch) {
  const Index rows = u.rows();
  scratch.row(0) = x.row(0);
  lti_states<S>(m, u, scratch.topRows(rows + 1));
  const Index shift = options.output == LtiOutput::post ? 1 : 0;
  product_nt<S>(scratch.middleRows(shift, rows), m.c, y);
  if (m.d.size() != 0) product_nt<S>(u, m.d, y, Write::add);
  x.row(0) = scratch.row(rows);
}

}  // namespace detail

/// A state at `x0`, or at rest.
template <RealScalar S>
LtiState<S> lti_state(const LtiSystem<S>& system, const LtiOptions& options = {},
                      const std::type_identity_t<Matrix<S>>* x0 = nullptr) {
  detail::require_lti(system);
  detail::require_lti_state("x0", x0, system);
  LtiState<S> state{.options = options, .x = {}, .scratch = {}};
  if (x0 != nullptr) {
    state.x = *x0;
  } else {
    state.x.setZero(1, system.states());
  }
  state.scratch.resize(detail::kLtiChunk + 1, system.states());
  return state;
}

/// The rows that follow what the state has seen.  Allocates nothing of its own.
template <MatrixLike U, OutputMatrix Y>
  requires SameScalar<U, Y> && RealScalar<scalar_t<U>>
void lti_step(const LtiSystem<scalar_t<U>>& system, LtiState<scalar_t<U>>& state, const U& u,
              Y&& y) {
  using S = scalar_t<U>;
  detail::require_lti_rows(system, u.rows(), u.cols(), y.rows(), y.cols(), "y");
  detail::require_lti_state("state.x", &state.x, system);
  state.scratch.resize(detail::kLtiChunk + 1, system.states());
  for (Index first = 0; first < u.rows(); first += detail::kLtiChunk) {
    const Index rows = std::min(detail::kLtiChunk, u.rows() - first);
    detail::lti_chunk<S>(system, state.options, u.middleRows(first, rows),
                         y.middleRows(first, rows), state.x, state.scratch);
  }
}

/// y, and the last state into xt unless null.
template <MatrixLike U, OutputMatrix Y>
  requires SameScalar<U, Y> && RealScalar<scalar_t<U>>
void lti_forward(const LtiSystem<scalar_t<U>>& system, const U& u, Y&& y,
                 const LtiOptions& options = {}, const Matrix<scalar_t<U>>* x0 = nullptr,
                 Matrix<scalar_t<U>>* xt = nullptr) {
  auto state = lti_state(system, options, x0);
  detail::require_lti_state("xt", xt, system);
  lti_step(system, state, u, y);
  if (xt != nullptr) *xt = state.x;
}

/// Gradients from dy and, unless null, that of the last state.  Overwrites du, dsystem (sized here) and, unless null, dx0.
template <MatrixLike U, MatrixLike DY, OutputMatrix DU>
  requires SameScalar<U, DY, DU> && RealScalar<scalar_t<U>>
void lti_backward(const LtiSystem<scalar_t<U>>& system, const U& u, const DY& dy, DU&& du,
                  LtiSystem<scalar_t<U>>& dsystem, const LtiOptions& options = {},
                  const Matrix<scalar_t<U>>* x0 = nullptr, const Matrix<scalar_t<U>>* dxt = nullptr,
                  Matrix<scalar_t<U>>* dx0 = nullptr) {
  using S = scalar_t<U>;
  using detail::Write;
  detail::require_lti_rows(system, u.rows(), u.cols(), dy.rows(), dy.cols(), "dy");
  detail::require_shape("du", du.rows(), du.cols(), u.rows(), u.cols(), "shape of u");
  detail::require_lti_state("x0", x0, system);
  detail::require_lti_state("dxt", dxt, system);
  detail::require_lti_state("dx0", dx0, system);
  const Index steps = u.rows(), n = system.states();
  const bool post = options.output == LtiOutput::post;
  Matrix<S> x(steps + 1, n);  // x_{-1}, x_0, ..
  if (x0 != nullptr) {
    x.row(0) = *x0;
  } else {
    x.row(0).setZero();
  }
  detail::lti_states<S>(system, u, x);
  // Row t is the gradient of x_{t-1}: first what y says to it, then what the next state does.
  Matrix<S> lambda = Matrix<S>::Zero(steps + 1, n);
  detail::product_nn<S>(dy, system.c, lambda.middleRows(post ? 1 : 0, steps));
  if (dxt != nullptr) lambda.row(steps) += *dxt;
  for (Index t = steps; t > 0; --t)
    detail::product_nn<S>(lambda.row(t), system.a, lambda.row(t - 1), Write::add);
  dsystem.a.resize(n, n);
  dsystem.b.resize(n, u.cols());
  dsystem.c.resize(dy.cols(), n);
  dsystem.d.resize(system.d.rows(), system.d.cols());
  const auto after = lambda.bottomRows(steps);
  detail::product_tn<S>(after, x.topRows(steps), dsystem.a);
  detail::product_tn<S>(after, u, dsystem.b);
  detail::product_tn<S>(dy, x.middleRows(post ? 1 : 0, steps), dsystem.c);
  detail::product_nn<S>(after, system.b, du);
  if (system.d.size() != 0) {
    detail::product_tn<S>(dy, u, dsystem.d);
    detail::product_nn<S>(dy, system.d, du, Write::add);
  }
  if (dx0 != nullptr) *dx0 = lambda.topRows(1);
}

/// Impulse response: row l, entry p M + m is what input m at time 0 makes of output p at time l, D left out.
///   post  C A^l B      pre  0, C B, C A B, ..
template <RealScalar S>
Matrix<S> lti_kernel(const LtiSystem<S>& system, Index length, const LtiOptions& options = {}) {
  detail::require_lti(system);
  detail::require(length >= 0, "length (", length, ") must not be negative");
  const Index inputs = system.inputs(), outputs = system.outputs();
  Matrix<S> kernel(length, outputs * inputs), x = system.b, next = x, y(outputs, inputs);
  for (Index l = 0; l < length; ++l) {
    if (l == 0 && options.output == LtiOutput::pre) {
      kernel.row(0).setZero();
      continue;
    }
    detail::product_nn<S>(system.c, x, y);
    kernel.row(l) = Eigen::Map<const RowVector<S>>(y.data(), y.size());
    detail::product_nn<S>(system.a, x, next);
    x.swap(next);
  }
  return kernel;
}

EIGENBLOCKS_NAMESPACE_END
