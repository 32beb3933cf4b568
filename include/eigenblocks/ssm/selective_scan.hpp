// Selective scan (Mamba's S6): a diagonal state space whose step size, input and output vectors depend on the token.
//
//   D_t = softplus(delta_t + bias)        h_t = e^{D_t A} h_{t-1} + D_t B_t u_t        y_t = <C_t, h_t> + skip u_t
//   out_t = y_t silu(z_t)                                          per channel; h has N states, B and C are shared by a group
//
//   SelectiveScanOptions options{.groups = 1, .delta_softplus = true};
//   SelectiveScanTensors<float> extra{.skip = &skip, .delta_bias = &bias, .gate = &z};          // all optional
//   selective_scan_forward(u, delta, a, b, c, out, options, extra, &last, pool);
//   selective_scan_backward(u, delta, a, b, c, dout, du, ddelta, da, db, dc, options, extra, &dlast,
//                           {.skip = &dskip, .delta_bias = &dbias, .gate = &dz, .state = &dfirst}, pool);
//   auto state = selective_scan_state<float>(channels, states, options);              // a regular value: a copy is a snapshot
//   selective_scan_step(state, u, delta, a, b, c, out, {.skip = &skip, ...});         // any number of rows
//   selective_scan_reference(...)                                                     // token by token in double: the oracle
//
//   u, delta, z, out T x D   a D x N   b, c T x (groups*N)   state D x N   skip, delta_bias D;  channel d is of group
//   d / (D/groups).  As in the official code B is discretised as D_t B_t (the paper's equation 4 has a zero-order hold).
//
// The exponential e^{D_t A} is the cost, one for each t, d and n; nothing of size T x D x N is stored, the backward keeps
// states at every 64th token and recomputes.  Where A_dn = (n+1) A_d0 holds exactly for every d and n (S4D-Real,
// A = -(1..N)), the exponentials of a channel are powers of one: up to four times faster.  A power is off by at most
// 3 (n+1) units in the last place more than its exponential; `powers = false` turns it off; calls of up to 4 tokens do without.  (-exp(log(1..N)) rounds, so
// that a freshly initialised A_log usually does not qualify; -(1..N) does.)
//
// Steps, chunks and the whole agree up to rounding; results are bitwise the same for every executor (blocks of channels
// are the tasks).  D_t A > 0 grows and may overflow.  A NaN in token t stays out of earlier outputs, and, in u, delta or
// z, out of other channels.  softplus(x) is x above 20, as PyTorch's.  Outputs must not overlap inputs; the first and the
// last state may be the same matrix.
//
// Errors (invalid_argument, nothing written): no channels or states, groups < 1 or not dividing the channels, wrong
// shapes; a gradient wanted of an input that is absent.  No tokens: the state passes.
//
// Source: arXiv 2312.00752 and github.com/state-spaces/mamba (selective_scan_fn).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/ssm/selective_scan_backward.hpp>

#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

struct SelectiveScanOptions {
  Index groups = 1;
  bool delta_softplus = false;
  bool powers = true;  ///< products in place of exponentials where A allows it exactly
};

/// Optional inputs; null is absent.
template <RealScalar S>
struct SelectiveScanTensors {
  const Vector<S>* skip = nullptr;  ///< D: the input's own share of the output (the paper's D)
  const Vector<S>* delta_bias = nullptr;  ///< D
  const Matrix<S>* gate = nullptr;        ///< T x D (the paper's z)
  const Matrix<S>* state = nullptr;       ///< D x N before the first token; absent: 0
};

/// Where their gradients go, in the same shapes; null is not wanted.
template <RealScalar S>
struct SelectiveScanGradients {
  Vector<S>* skip = nullptr;
  Vector<S>* delta_bias = nullptr;
  Matrix<S>* gate = nullptr;
  Matrix<S>* state = nullptr;
};

namespace detail {

template <RealScalar S>
struct ScanOperands {
  ConstMatrixRef<S> u, delta, a, b, c;
};

/// Checks everything that goes in.
template <RealScalar S>
ScanSizes scan_sizes(const ScanOperands<S>& in, const SelectiveScanOptions& o,
                     const SelectiveScanTensors<S>& tensors) {
  const ScanSizes n{
      .tokens = in.u.rows(), .channels = in.u.cols(), .states = in.a.cols(), .groups = o.groups};
  require(n.channels >= 1, "u is ", n.tokens, " x ", n.channels, ", expected at least one channel");
  require_shape("delta", in.delta.rows(), in.delta.cols(), n.tokens, n.channels, "shape of u");
  require(n.states >= 1 && in.a.rows() == n.channels, "a is ", in.a.rows(), " x ", n.states,
          ", expected ", n.channels, " rows (channels of u) and at least one state");
  require(n.groups >= 1, "groups (", n.groups, ") must be at least 1");
  require(n.channels % n.groups == 0, "groups (", n.groups, ") must divide the channels (",
          n.channels, ")");
  require_shape("b", in.b.rows(), in.b.cols(), n.tokens, n.groups * n.states,
                "tokens, groups * states");
  require_shape("c", in.c.rows(), in.c.cols(), n.tokens, n.groups * n.states,
                "tokens, groups * states");
  if (tensors.skip != nullptr) require_size("skip", tensors.skip->size(), n.channels, "channels");
  if (tensors.delta_bias != nullptr)
    require_size("delta_bias", tensors.delta_bias->size(), n.channels, "channels");
  if (tensors.gate != nullptr) {
    require_shape("gate", tensors.gate->rows(), tensors.gate->cols(), n.tokens, n.channels,
                  "shape of u");
  }
  return n;
}
template <RealScalar S>
void require_scan_state(const char* name, const Matrix<S>* state, const ScanSizes& n) {
  if (state != nullptr)
    require_shape(name, state->rows(), state->cols(), n.channels, n.states, "channels, states");
}

/// a(d, n) == (n + 1) a(d, 0) everywhere.
template <RealScalar S>
bool scan_has_powers(const ConstMatrixRef<S>& a) {
  for (Index d = 0; d < a.rows(); ++d) {
    const S* const row = a.data() + d * a.outerStride();
    bool same = std::isfinite(row[a.cols() - 1]);
    for (Index n = 0; n < a.cols(); ++n) same &= row[n] == static_cast<S>(n + 1) * row[0];
    if (!same) return false;
  }
  return true;
}

template <RealScalar S>
ScanInputs<S> scan_inputs(const ScanOperands<S>& in, const SelectiveScanOptions& o,
                          const SelectiveScanTensors<S>& tensors, bool backward = false) {
  const bool few = in.u.rows() <= ScanTiles<S>::kFew && !backward;  // go without powers
  return {.u = head_columns(in.u),
          .delta = head_columns(in.delta),
          .a = head_columns(in.a),
          .b = head_columns(in.b),
          .c = head_columns(in.c),
          .gate = head_rows(tensors.gate),
          .skip = tensors.skip != nullptr ? tensors.skip->data() : nullptr,
          .bias = tensors.delta_bias != nullptr ? tensors.delta_bias->data() : nullptr,
          .softplus = o.delta_softplus,
          .powers = o.powers && !few && in.a.cols() > 1 && scan_has_powers<S>(in.a)};
}

/// f(first, count) for strip `index` of a group's channels.
template <RealScalar S, class F>
void scan_strip(const ScanSizes& n, Index index, F&& f) {
  constexpr Index width = ScanTiles<S>::kChannels * ScanTiles<S>::kStrip;
  const Index channels = n.group_channels(), per_group = (channels + width - 1) / width;
  const Index first = index % per_group * width;
  f(index / per_group * channels + first, std::min(width, channels - first));
}
template <RealScalar S>
Index scan_strips(const ScanSizes& n) {
  constexpr Index width = ScanTiles<S>::kChannels * ScanTiles<S>::kStrip;
  return (n.group_channels() + width - 1) / width;
}

template <RealScalar S>
void scan_channels(const ScanInputs<S>& in, const ScanSizes& n, MatrixRef<S> out,
                   const Matrix<S>* initial, Matrix<S>* final, Workspace& workspace,
                   ExecutorRef executor) {
  const std::size_t bytes = ScanTiles<S>::bytes(n);
  workspace.prepare(executor.workers(), bytes);
  executor.run(n.groups * scan_strips<S>(n), [&](Index task, int worker) {
    ScanTiles<S> tiles(n, workspace.arena(worker, bytes));
    scan_strip<S>(n, task, [&](Index first, Index count) {
      tiles.strip(in, first, count);
      tiles.forward(in, head_columns(out), head_rows(initial), head_rows(final));
    });
  });
}

/// A task is a few strips, whose shares of db and dc one worker adds up; then the tasks' shares are added in order.
template <RealScalar S>
void scan_channels_backward(const ScanInputs<S>& in, const ScanSizes& n, const ScanUpstream<S>& g,
                            const HeadRows<const S>& initial, MatrixRef<S> db, MatrixRef<S> dc,
                            ExecutorRef executor) {
  constexpr Index most = 8;  // tasks of a group; each costs two T x N
  const Index strips = scan_strips<S>(n), per_task = (strips + most - 1) / most;
  const Index tasks = (strips + per_task - 1) / per_task;
  const Index share = n.tokens * n.states;
  const std::size_t bytes = ScanGradientTiles<S>::bytes(n);
  Workspace workspace;
  workspace.prepare(executor.workers(), bytes);
  S* const shares =
      workspace.shared(padded_bytes<S>(n.groups * tasks * 2 * share)).template take<S>(0);
  executor.run(n.groups * tasks, [&](Index task, int worker) {
    ScanGradientTiles<S> tiles(n, workspace.arena(worker, bytes));
    S* const own = shares + task * 2 * share;
    std::fill_n(own, 2 * share, S(0));
    const Index group = task / tasks, from = task % tasks * per_task;
    for (Index i = from; i < std::min(from + per_task, strips); ++i) {
      scan_strip<S>(n, group * strips + i, [&](Index first, Index count) {
        tiles.strip(in, first, count);
        tiles.backward(in, initial, g, own, own + share);
      });
    }
  });
  const auto add_up = [&](MatrixRef<S>& to, Index which) {
    for (Index t = 0; t < n.tokens; ++t) {
      for (Index group = 0; group < n.groups; ++group) {
        S* const row = to.data() + t * to.outerStride() + group * n.states;
        for (Index k = 0; k < n.states; ++k) {
          const S* from = shares + (group * tasks * 2 + which) * share + k * n.tokens + t;
          row[k] = *from;
          for (Index i = 1; i < tasks; ++i) row[k] += from[i * 2 * share];
        }
      }
    }
  };
  add_up(db, 0);
  add_up(dc, 1);
}

template <RealScalar S>
ScanSizes checked_scan_sizes(const ScanOperands<S>& in, const SelectiveScanOptions& options,
                             const SelectiveScanTensors<S>& tensors, const Matrix<S>* final_state,
                             Index out_rows, Index out_cols) {
  const ScanSizes n = scan_sizes(in, options, tensors);
  require_scan_state("state", tensors.state, n);
  require_scan_state("final_state", final_state, n);
  require_shape("out", out_rows, out_cols, n.tokens, n.channels, "shape of u");
  return n;
}

}  // namespace detail

/// out, and the state after the last token into final_state unless null.
template <MatrixLike U, MatrixLike D, MatrixLike A, MatrixLike B, MatrixLike C, OutputMatrix O>
  requires SameScalar<U, D, A, B, C, O> && RealScalar<scalar_t<U>>
void selective_scan_forward(const U& u, const D& delta, const A& a, const B& b, const C& c, O&& out,
                            const SelectiveScanOptions& options = {},
                            const SelectiveScanTensors<scalar_t<U>>& tensors = {},
                            Matrix<scalar_t<U>>* final_state = nullptr, ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  const detail::ScanOperands<S> in{u, delta, a, b, c};
  const detail::ScanSizes n =
      detail::checked_scan_sizes<S>(in, options, tensors, final_state, out.rows(), out.cols());
  Workspace workspace;
  detail::scan_channels<S>(detail::scan_inputs(in, options, tensors), n, out, tensors.state,
                           final_state, workspace, executor);
}

/// Gradients from dout and, unless null, that of the final state.  Overwrites du .. dc and what `gradients` points to.
template <MatrixLike U, MatrixLike D, MatrixLike A, MatrixLike B, MatrixLike C, MatrixLike DO,
          OutputMatrix DU, OutputMatrix DD, OutputMatrix DA, OutputMatrix DB, OutputMatrix DC>
  requires SameScalar<U, D, A, B, C, DO, DU, DD, DA, DB, DC> && RealScalar<scalar_t<U>>
void selective_scan_backward(const U& u, const D& delta, const A& a, const B& b, const C& c,
                             const DO& dout, DU&& du, DD&& ddelta, DA&& da, DB&& db, DC&& dc,
                             const SelectiveScanOptions& options = {},
                             const SelectiveScanTensors<scalar_t<U>>& tensors = {},
                             const Matrix<scalar_t<U>>* dfinal_state = nullptr,
                             const SelectiveScanGradients<scalar_t<U>>& gradients = {},
                             ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  using detail::require;
  using detail::require_shape;
  const detail::ScanOperands<S> in{u, delta, a, b, c};
  const detail::ScanSizes n = detail::scan_sizes<S>(in, options, tensors);
  detail::require_scan_state("state", tensors.state, n);
  detail::require_scan_state("dfinal_state", dfinal_state, n);
  detail::require_scan_state("gradients.state", gradients.state, n);
  require_shape("dout", dout.rows(), dout.cols(), n.tokens, n.channels, "shape of u");
  require_shape("du", du.rows(), du.cols(), n.tokens, n.channels, "shape of u");
  require_shape("ddelta", ddelta.rows(), ddelta.cols(), n.tokens, n.channels, "shape of u");
  require_shape("da", da.rows(), da.cols(), n.channels, n.states, "shape of a");
  require_shape("db", db.rows(), db.cols(), n.tokens, n.groups * n.states, "shape of b");
  require_shape("dc", dc.rows(), dc.cols(), n.tokens, n.groups * n.states, "shape of c");
  const auto require_input = [](bool wanted, bool given, const char* name) {
    require(!wanted || given, "gradients.", name, " is wanted, but there is no ", name);
  };
  require_input(gradients.skip != nullptr, tensors.skip != nullptr, "skip");
  require_input(gradients.delta_bias != nullptr, tensors.delta_bias != nullptr, "delta_bias");
  require_input(gradients.gate != nullptr, tensors.gate != nullptr, "gate");
  if (gradients.skip != nullptr)
    detail::require_size("gradients.skip", gradients.skip->size(), n.channels, "channels");
  if (gradients.delta_bias != nullptr) {
    detail::require_size("gradients.delta_bias", gradients.delta_bias->size(), n.channels,
                         "channels");
  }
  if (gradients.gate != nullptr) {
    require_shape("gradients.gate", gradients.gate->rows(), gradients.gate->cols(), n.tokens,
                  n.channels, "shape of u");
  }
  const ConstMatrixRef<S> dout_ref = dout;
  MatrixRef<S> du_ref = du, ddelta_ref = ddelta, da_ref = da;
  detail::scan_channels_backward<S>(
      detail::scan_inputs(in, options, tensors, true), n,
      {.dout = detail::head_columns(dout_ref),
       .dfinal = detail::head_rows(dfinal_state),
       .du = detail::head_columns(du_ref),
       .ddelta = detail::head_columns(ddelta_ref),
       .da = detail::head_columns(da_ref),
       .dgate = detail::head_rows(gradients.gate),
       .dinitial = detail::head_rows(gradients.state),
       .dskip = gradients.skip != nullptr ? gradients.skip->data() : nullptr,
       .dbias = gradients.delta_bias != nullptr ? gradients.delta_bias->data() : nullptr},
      detail::head_rows(tensors.state), db, dc, executor);
}

/// All that decoding needs between two calls: a regular value, a copy is a snapshot.
template <RealScalar S>
struct SelectiveScanState {
  SelectiveScanOptions options;
  Matrix<S> memory;     ///< D x N
  Index tokens = 0;     ///< seen so far
  Workspace scratch{};  ///< not part of the value

  Index size() const { return tokens; }
  /// Bytes of the memory; they do not grow.
  Index bytes() const { return memory.size() * Index(sizeof(S)); }
};

/// The state before the first token, or `initial` (channels x states).
/// Errors: channels or states < 1, groups as above, wrong shape of initial.
template <RealScalar S>
SelectiveScanState<S> selective_scan_state(Index channels, Index states,
                                           const SelectiveScanOptions& options = {},
                                           const Matrix<S>* initial = nullptr) {
  detail::require(channels >= 1 && states >= 1, "channels (", channels, ") and states (", states,
                  ") must be at least 1");
  detail::require(options.groups >= 1, "groups (", options.groups, ") must be at least 1");
  detail::require(channels % options.groups == 0, "groups (", options.groups,
                  ") must divide the channels (", channels, ")");
  if (initial != nullptr) {
    detail::require_shape("initial", initial->rows(), initial->cols(), channels, states,
                          "channels, states");
  }
  SelectiveScanState<S> state{.options = options, .memory = {}};
  if (initial != nullptr) {
    state.memory = *initial;
  } else {
    state.memory.setZero(channels, states);
  }
  return state;
}

/// The rows that follow what the state has seen (tensors.state must be null).  Allocates nothing once the state has seen
/// a call of this size; on an error nothing is changed.
template <MatrixLike U, MatrixLike D, MatrixLike A, MatrixLike B, MatrixLike C, OutputMatrix O>
  requires SameScalar<U, D, A, B, C, O> && RealScalar<scalar_t<U>>
void selective_scan_step(SelectiveScanState<scalar_t<U>>& state, const U& u, const D& delta,
                         const A& a, const B& b, const C& c, O&& out,
                         const SelectiveScanTensors<scalar_t<U>>& tensors = {},
                         ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  const detail::ScanOperands<S> in{u, delta, a, b, c};
  detail::require(tensors.state == nullptr, "tensors.state must be null: the state is `state`");
  const detail::ScanSizes n = detail::checked_scan_sizes<S>(in, state.options, tensors,
                                                            &state.memory, out.rows(), out.cols());
  detail::scan_channels<S>(detail::scan_inputs(in, state.options, tensors), n, out, &state.memory,
                           &state.memory, state.scratch, executor);
  state.tokens += n.tokens;
}

/// The formulas at the top, one number at a time in double: the oracle, which shares nothing but the checks.
inline void selective_scan_reference(const ConstMatrixRef<double>& u,
                                     const ConstMatrixRef<double>& delta,
                                     const ConstMatrixRef<double>& a,
                                     const ConstMatrixRef<double>& b,
                                     const ConstMatrixRef<double>& c, MatrixRef<double> out,
                                     const SelectiveScanOptions& options = {},
                                     const SelectiveScanTensors<double>& tensors = {},
                                     Matrix<double>* final_state = nullptr) {
  const detail::ScanSizes n = detail::checked_scan_sizes<double>(
      {u, delta, a, b, c}, options, tensors, final_state, out.rows(), out.cols());
  Matrix<double> h = Matrix<double>::Zero(n.channels, n.states);
  if (tensors.state != nullptr) h = *tensors.state;
  for (Index t = 0; t < n.tokens; ++t) {
    for (Index d = 0; d < n.channels; ++d) {
      const Index first = d / n.group_channels() * n.states;
      double step = delta(t, d) + (tensors.delta_bias != nullptr ? (*tensors.delta_bias)[d] : 0.0);
      if (options.delta_softplus && step <= 20) step = std::log1p(std::exp(step));
      double y = tensors.skip != nullptr ? (*tensors.skip)[d] * u(t, d) : 0.0;
      for (Index s = 0; s < n.states; ++s) {
        h(d, s) = std::exp(step * a(d, s)) * h(d, s) + step * b(t, first + s) * u(t, d);
        y += c(t, first + s) * h(d, s);
      }
      const double z = tensors.gate != nullptr ? (*tensors.gate)(t, d) : 0.0;
      out(t, d) = tensors.gate != nullptr ? y * (z / (1 + std::exp(-z))) : y;
    }
  }
  if (final_state != nullptr) final_state->swap(h);
}

EIGENBLOCKS_NAMESPACE_END
