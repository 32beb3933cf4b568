// DEER: all steps of a non-linear recurrence at once, as a fixed point found by Newton sweeps over the whole sequence.
//
//   h_t = f(h_{t-1}, u_t)        sweep:  f, J at the old iterate;  solve y_t = J_t y_{t-1} + (f_t - J_t prev_t), y_{-1} = initial
//
//   const auto cell = tanh_cell(weight);                             // ssm/rnn.hpp; gru_cell, ssm/gru.hpp; or your own (recurrent_cell.hpp)
//   const DeerStatus s = deer_forward(cell, u, initial, out);        // out T x N, u T x cell.input_size()
//   if (!s.converged) ...                                            // s.fell_back: out is the sequential result
//   deer_forward(cell, u, initial, out, {.method = DeerMethod::quasi, .guess = DeerGuess::given}, pool);
//   deer_adjoint(cell, u, initial, out, dout, lambda, dinitial);     // implicit gradient: one reverse scan, no unrolling
//   rnn_tanh_parameter_gradients(initial, out, lambda, du, dweight); // and products; gru_parameter_gradients
//   deer_sweeps(cell, u, initial, x, 3)                              // exactly 3 sweeps on the guess x, no guard and no stop
//
// DeerMethod says what J is: newton, quasi (its diagonal), su_const, jacobi (0).  observation_variance damps (ssm/elk.hpp).
// With any of them, undamped, the first k states are exact after k sweeps; Newton converges quadratically near the solution.
// A state is found when |new - old| <= atol + rtol |new|, for it and all before it; found states are kept and the next sweep
// starts behind them (restart).  New iterates are clipped to +-1e8 and NaN becomes 0 (guard): without it sweeps overflow where
// f expands.  What was guarded is not found, so a NaN of u or f reaches `out` by the fallback.
// Fallback: when the largest update has not fallen for `patience` sweeps, at max_sweeps, or when the first open state is not
// finite, everything is computed step by step, bit for bit recurrent_forward, and the status says so.  Without it,
// converged = false and `out` is the iterate.
//
// Cost of a sweep: T N^2 in products, and the scan: O(T N) for quasi, T N^2 one step after the other for newton, which cannot
// be faster than the sequential recurrence unless f is dear or cores are many.  Memory: blocks of some hundred rows of J, or
// nothing like it for cells with tangents (the built-in ones), never T N^2.  Results are bitwise the same for every executor.
// Errors (invalid_argument, nothing written): shapes, tolerances < 0 or not finite, max_sweeps or patience < 1,
// observation_variance <= 0 or with a method without a Jacobian, su_const for a cell without constant_jacobian.
// Sources: arXiv 2309.12252 (DEER), 2407.19115 (quasi, ELK); kexue.fm 9783 (su_const).
#pragma once

#include <eigenblocks/ssm/deer_sweep.hpp>

#include <limits>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Where the sweeps start from.
enum class DeerGuess {
  initial,  ///< the initial state, repeated
  zeros,
  given  ///< what `out` holds
};

struct DeerOptions {
  DeerMethod method = DeerMethod::newton;
  DeerGuess guess = DeerGuess::initial;
  double observation_variance =
      std::numeric_limits<double>::infinity();  ///< sigma^2 of ELK; infinite: no damping
  double atol = -1;                             ///< -1: 1e-10 in double, 1e-5 in float
  double rtol = -1;                             ///< -1: 1e-8 in double, 1e-4 in float
  Index max_sweeps = 100;
  Index patience = 15;   ///< sweeps without a smaller residual before it gives up
  bool guard = true;     ///< clip to +-1e8, NaN to 0
  bool restart = true;   ///< sweep only behind the states already found
  bool fallback = true;  ///< step by step if the sweeps do not find all states
};

/// How the sweeps went.
struct DeerStatus {
  Index sweeps = 0;
  std::vector<double> residuals;  ///< max |new - old| of each sweep
  Index found = 0;                ///< leading states found by sweeps
  bool converged = false;         ///< all of them
  bool fell_back = false;         ///< `out` was computed step by step
};

namespace detail {

template <RecurrentCell C>
void require_deer_method(DeerMethod method, double observation_variance) {
  require(method >= DeerMethod::newton && method <= DeerMethod::jacobi, "method (", method,
          ") is not a DeerMethod");
  require(observation_variance > 0, "observation_variance (", observation_variance,
          ") must be positive");
  require(!std::isfinite(observation_variance) || method == DeerMethod::newton ||
              method == DeerMethod::quasi,
          "observation_variance (", observation_variance,
          ") needs method newton or quasi, others have no Jacobian to filter with");
  require(method != DeerMethod::su_const || CellJacobians<C>::kConstant,
          "method su_const needs a cell with constant_jacobian");
}

template <RealScalar S>
SweepRules deer_rules(const DeerOptions& o) {
  constexpr bool wide = std::is_same_v<S, double>;
  const auto tolerance = [](const char* name, double value, double fallback) {
    require(value == -1 || (value >= 0 && std::isfinite(value)), name, " (", value,
            ") must be non-negative and finite, or -1 for the default");
    return value == -1 ? fallback : value;
  };
  require(o.guess >= DeerGuess::initial && o.guess <= DeerGuess::given, "guess (", o.guess,
          ") is not a DeerGuess");
  require(o.max_sweeps >= 1, "max_sweeps (", o.max_sweeps, ") must be at least 1");
  require(o.patience >= 1, "patience (", o.patience, ") must be at least 1");
  return {tolerance("atol", o.atol, wide ? 1e-10 : 1e-5),
          tolerance("rtol", o.rtol, wide ? 1e-8 : 1e-4), o.guard};
}

}  // namespace detail

/// All states into out.  Errors: see the top.
template <RecurrentCell C, MatrixLike U, OutputMatrix O>
  requires SameScalar<C, U, O> DeerStatus deer_forward(const C& cell, const U& u,
                                                       const ConstVectorRef<scalar_t<C>>& initial,
                                                       O&& out, const DeerOptions& options = {},
                                                       ExecutorRef executor = {}) {
    using S = scalar_t<C>;
    detail::require_deer_method<C>(options.method, options.observation_variance);
    const detail::SweepRules rules = detail::deer_rules<S>(options);
    const ConstMatrixRef<S> inputs(u);
    MatrixRef<S> x(out);
    detail::require_cell_operands(cell, inputs, initial, x.rows(), x.cols());
    if (options.guess == DeerGuess::initial) x.rowwise() = initial.transpose();
    if (options.guess == DeerGuess::zeros) x.setZero();

    DeerStatus status;
    const Index rows = x.rows();
    detail::DeerSweep<C> sweeper(cell, options.method, options.observation_variance, rows,
                                 executor);
    const auto before = [&](Index t) { return t == 0 ? initial.data() : &x.coeffRef(t - 1, 0); };
    double best = std::numeric_limits<double>::infinity();
    Index first = 0, stale = 0;
    while (status.found < rows && status.sweeps < options.max_sweeps && stale < options.patience) {
      const Index open = rows - first;
      const detail::SweepResult result =
          sweeper.sweep(inputs.bottomRows(open), before(first), x.bottomRows(open), rules);
      ++status.sweeps;
      status.residuals.push_back(result.residual);
      // The first open row was computed from a found one, whatever its update was.
      const bool exact = !sweeper.damped() && !result.first_bad;
      status.found = first + std::max<Index>(result.found, exact ? 1 : 0);
      if (options.restart) first = status.found;
      if (result.first_bad && !sweeper.damped()) break;
      stale = result.residual < best ? 0 : stale + 1;
      best = std::min(best, result.residual);
    }
    status.converged = status.found == rows;
    if (!status.converged && options.fallback) {
      // From the start: in a chaotic recurrence a state that is right up to the tolerance leads elsewhere.
      detail::cell_sequential<C>(cell, inputs, initial.data(), x);
      status.fell_back = true;
    }
    return status;
  }

/// Exactly `sweeps` sweeps on the guess that x holds, without guard, restart or stop.  Returns max |new - old| of each.
template <RecurrentCell C, MatrixLike U, OutputMatrix O>
  requires SameScalar<C, U, O> std::vector<double> deer_sweeps(
      const C& cell, const U& u, const ConstVectorRef<scalar_t<C>>& initial, O&& x, Index sweeps,
      const DeerOptions& options = {}, ExecutorRef executor = {}) {
    using S = scalar_t<C>;
    detail::require_deer_method<C>(options.method, options.observation_variance);
    detail::require(sweeps >= 0, "sweeps (", sweeps, ") must not be negative");
    const ConstMatrixRef<S> inputs(u);
    MatrixRef<S> states(x);
    detail::require_cell_operands(cell, inputs, initial, states.rows(), states.cols());
    std::vector<double> residuals;
    detail::DeerSweep<C> sweeper(cell, options.method, options.observation_variance, states.rows(),
                                 executor);
    for (Index k = 0; k < sweeps; ++k) {
      residuals.push_back(sweeper.sweep(inputs, initial.data(), states, {}).residual);
    }
    return residuals;
  }

/// Implicit gradient at the states `out` of the recurrence: lambda_t = dout_t + J_{t+1}^T lambda_{t+1}, that is dL/dh_t with
/// every later step counted in, and dinitial = J_0^T lambda_0.  Exact at the fixed point (the gradient with respect to the
/// guess is 0).  Overwrites lambda (T x N) and dinitial.
template <RecurrentCell C, MatrixLike U, MatrixLike X, MatrixLike G, OutputMatrix L>
  requires SameScalar<C, U, X, G, L>
void deer_adjoint(const C& cell, const U& u, const ConstVectorRef<scalar_t<C>>& initial,
                  const X& out, const G& dout, L&& lambda, VectorRef<scalar_t<C>> dinitial,
                  ExecutorRef executor = {}) {
  using S = scalar_t<C>;
  using detail::SweepMatrix;
  const Index n = cell.size(), rows = u.rows();
  const ConstMatrixRef<S> inputs(u), x(out), upstream(dout);
  MatrixRef<S> lam(lambda);
  detail::require_cell_operands(cell, inputs, initial, x.rows(), x.cols());
  detail::require_shape("dout", upstream.rows(), upstream.cols(), rows, n, "shape of out");
  detail::require_shape("lambda", lam.rows(), lam.cols(), rows, n, "shape of out");
  detail::require_size("dinitial", dinitial.size(), n, "size of the cell");
  using Jacobians = detail::CellJacobians<C>;
  const SweepMatrix matrix = detail::sweep_matrix<C>(DeerMethod::newton, false);
  const detail::SweepBlocks blocks(rows, n, matrix, executor.workers());
  const Index width = Jacobians::width(cell, matrix);
  Matrix<S> jacobians[2];
  for (Matrix<S>& j : jacobians) {
    if (&j == &jacobians[0] || blocks.pipelined) j.resize(std::min(blocks.block(), rows), width);
  }
  Workspace workspace;
  const std::size_t bytes = detail::padded_bytes<S>(2 * blocks.tile * n) +
                            detail::padded_bytes<S>(detail::cell_scratch(cell, blocks.tile));
  workspace.prepare(executor.workers(), bytes);
  Vector<S> edge(width), scratch_row(2 * n);  // edge: the Jacobian of the row behind a block
  // y += J^T v
  const auto multiply = [&](const S* jacobian, const S* v, S* y) {
    if constexpr (detail::CellWithTangents<C>) {
      cell.multiply_transposed(jacobian, v, y, scratch_row.data());
    } else {
      detail::dense_multiply_transposed(jacobian, n, n, v, y);
    }
  };
  // Block b of the pipeline is the b-th from the end, and so are its tiles.
  const auto first_of = [&](Index b) { return rows - blocks.first(b) - blocks.size(b); };
  const auto slot = [&](Index b) -> Matrix<S>& { return jacobians[blocks.pipelined ? b % 2 : 0]; };
  blocks.run(
      executor, [](Index) {},
      [&](Index b, Index at, Index count, int worker) {
        const Index local = blocks.size(b) - at - count, first = first_of(b) + local;
        detail::Arena arena = workspace.arena(worker, bytes);
        Eigen::Map<Matrix<S>> prev(arena.take<S>(2 * blocks.tile * n), count, n);
        Eigen::Map<Matrix<S>> f(prev.data() + count * n, count, n);
        S* const scratch = arena.take<S>(detail::cell_scratch(cell, count));
        for (Index t = 0; t < count; ++t) {
          if (first + t == 0) {
            prev.row(0) = initial.transpose();
          } else {
            prev.row(t) = x.row(first + t - 1);
          }
        }
        const auto in = inputs.middleRows(first, count);
        detail::cell_forward<C>(cell, prev, in, f, scratch);
        Jacobians::evaluate(cell, matrix, prev, in, f, slot(b).data() + local * width, scratch,
                            nullptr);
      },
      [&](Index b) {
        const Index first = first_of(b), count = blocks.size(b);
        for (Index t = count - 1; t >= 0; --t) {
          S* const row = &lam.coeffRef(first + t, 0);
          lam.row(first + t) = upstream.row(first + t);
          if (first + t + 1 == rows) continue;
          multiply(t + 1 == count ? edge.data() : slot(b).data() + (t + 1) * width,
                   &lam.coeffRef(first + t + 1, 0), row);
        }
        edge = slot(b).row(0).transpose();
      });
  dinitial.setZero();
  if (rows > 0) multiply(edge.data(), lam.data(), dinitial.data());
}

EIGENBLOCKS_NAMESPACE_END
