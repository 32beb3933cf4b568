// State space duality (Mamba-2's SSD): a state space with one decay per head, as products of matrices.
//
//   S_t = e^{a_t} S_{t-1} + x_t^T B_t        y_t = S_t C_t^T           per head; S is P x N, a_t <= 0, B and C shared by a group
//   the same as  Y = (L o C B^T) X,  L_ij = e^{a_{j+1} + .. + a_i} for j <= i: linear attention with q = C, k = B, v = x
//
//   SsdOptions options{.heads = 24, .groups = 1};
//   ssd_forward(x, a, b, c, out, options, &first, &last, pool);                 // first, last may be null
//   ssd_backward(x, a, b, c, dout, dx, da, db, dc, options, &first, &dlast, &dfirst, pool);
//   auto state = ssd_state<float>(options, head_dim, states);                   // a regular value: a copy is a snapshot
//   ssd_step(state, x, a, b, c, out);                                           // any number of rows
//   ssd_recurrent(...), ssd_reference(...)                                      // token by token; quadratic, the oracle
//
//   x, out T x (heads*P)   a T x heads   b, c T x (groups*N)   states (heads*P) x N
// x is already multiplied by the step size, and a = step size times A; the skip, gate and norm of a Mamba-2 layer are others'
// business.  Head h is of group h / (heads/groups).
//
// The chunked form costs chunk (N/heads of a strip + P) + 2 N P multiply-adds for each token and head, all in products;
// C B^T is made once for a strip of about 512 columns of x.  It is the faster one of two in this library for a decay per head:
// attention/linear.hpp does without the sharing but takes a decay for each key channel too.
//
// Forms and step sizes agree up to rounding; results are bitwise the same for every executor (strips of heads are the
// tasks).  Any decay is safe, -inf (forget everything) included; ssd_tiles.hpp says how.  a > 0 grows and may overflow.  A
// NaN in token t stays out of earlier outputs.  Outputs must not overlap inputs; the first and the last state may be the same
// matrix.  The backward saves nothing: states are recomputed, one for each chunk and head of a strip is kept.
//
// Errors (invalid_argument, nothing written): heads or groups < 1, groups not dividing heads, chunk < 0, widths that do not
// fit, wrong shapes of states, outputs and gradients.  No tokens: the state passes.
//
// Source: arXiv 2405.21060 and its ssd_minimal_discrete (which wants T to be a multiple of the chunk; this does not).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/ssm/ssd_tiles.hpp>

#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

struct SsdOptions {
  Index heads = 1;
  Index groups = 1;  ///< of heads that share b and c
  Index chunk = 0;   ///< tokens of a chunk; 0 takes 64.  No effect but on speed and rounding
};

namespace detail {

template <RealScalar S>
struct SsdOperands {
  ConstMatrixRef<S> x, decay, b, c;
};

template <RealScalar S>
SsdSizes ssd_sizes(const SsdOperands<S>& in, const SsdOptions& o) {
  require(o.heads >= 1, "heads (", o.heads, ") must be at least 1");
  require(o.groups >= 1, "groups (", o.groups, ") must be at least 1");
  require(o.heads % o.groups == 0, "groups (", o.groups, ") must divide heads (", o.heads, ")");
  require(o.chunk >= 0, "chunk (", o.chunk, ") must be positive, or 0 for the default");
  const Index tokens = in.x.rows(), width = in.x.cols();
  require(width >= 1 && width % o.heads == 0, "x is ", tokens, " x ", width,
          ", expected columns in a positive multiple of heads (", o.heads, ")");
  require_shape("log_decay", in.decay.rows(), in.decay.cols(), tokens, o.heads, "tokens, heads");
  require(in.b.rows() == tokens && in.b.cols() >= 1 && in.b.cols() % o.groups == 0, "b is ",
          in.b.rows(), " x ", in.b.cols(), ", expected ", tokens,
          " rows and columns in a positive multiple of groups (", o.groups, ")");
  require_shape("c", in.c.rows(), in.c.cols(), tokens, in.b.cols(), "shape of b");
  const Index chunk = o.chunk == 0 ? 64 : o.chunk;
  return {.tokens = tokens,
          .heads = o.heads,
          .groups = o.groups,
          .head_dim = width / o.heads,
          .states = in.b.cols() / o.groups,
          .chunk = std::clamp<Index>(chunk, 1, std::max<Index>(tokens, 1))};
}
template <RealScalar S>
void require_ssd_state(const char* name, const Matrix<S>* state, const SsdSizes& n) {
  if (state != nullptr)
    require_shape(name, state->rows(), state->cols(), n.heads * n.head_dim, n.states,
                  "heads * head_dim, states");
}
template <RealScalar S>
SsdSizes checked_ssd_sizes(const SsdOperands<S>& in, const SsdOptions& options,
                           const Matrix<S>* initial, const Matrix<S>* final, Index out_rows,
                           Index out_cols) {
  const SsdSizes n = ssd_sizes(in, options);
  require_ssd_state("state", initial, n);
  require_ssd_state("final_state", final, n);
  require_shape("out", out_rows, out_cols, n.tokens, in.x.cols(), "shape of x");
  return n;
}

template <RealScalar S>
SsdInputs<S> ssd_inputs(const SsdOperands<S>& in, const Matrix<S>* initial, const SsdSizes& n,
                        Index head) {
  const Index group = head / n.group_heads() * n.states;
  return {head_columns(in.x, head * n.head_dim), head_columns(in.decay, head),
          head_columns(in.b, group), head_columns(in.c, group),
          head_rows(initial, head * n.head_dim)};
}
/// f(first head, heads) for strip `task`.
template <class F>
void ssd_strip(const SsdSizes& n, Index task, F&& f) {
  const Index at = task % n.strips() * n.strip_heads();
  f(task / n.strips() * n.group_heads() + at, std::min(n.strip_heads(), n.group_heads() - at));
}

template <RealScalar S>
void ssd_chunked(const SsdOperands<S>& in, const SsdSizes& n, MatrixRef<S> out,
                 const Matrix<S>* initial, Matrix<S>* final, Workspace& workspace,
                 ExecutorRef executor) {
  const std::size_t bytes = SsdTiles<S>::bytes(n, false);
  workspace.prepare(executor.workers(), bytes);
  executor.run(n.groups * n.strips(), [&](Index task, int worker) {
    ssd_strip(n, task, [&](Index head, Index heads) {
      SsdTiles<S> tiles(n, heads, workspace.arena(worker, bytes), false);
      tiles.forward(ssd_inputs(in, initial, n, head), head_columns(out, head * n.head_dim),
                    head_rows(final, head * n.head_dim));
    });
  });
}
template <RealScalar S>
void ssd_heads_recurrent(const SsdOperands<S>& in, const SsdSizes& n, MatrixRef<S> out,
                         Matrix<S>& state, ExecutorRef executor) {
  executor.run(n.heads, [&](Index head, int) {
    ssd_recurrence<S>(n, ssd_inputs<S>(in, nullptr, n, head), head_columns(out, head * n.head_dim),
                      head_rows(&state, head * n.head_dim));
  });
}

}  // namespace detail

/// out, and the state after the last token into final_state unless null; `state` is the one before the first (null: 0).
/// The chunked form.
template <MatrixLike X, MatrixLike A, MatrixLike B, MatrixLike C, OutputMatrix O>
  requires SameScalar<X, A, B, C, O> && RealScalar<scalar_t<X>>
void ssd_forward(const X& x, const A& log_decay, const B& b, const C& c, O&& out,
                 const SsdOptions& options = {}, const Matrix<scalar_t<X>>* state = nullptr,
                 Matrix<scalar_t<X>>* final_state = nullptr, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const detail::SsdOperands<S> in{x, log_decay, b, c};
  const detail::SsdSizes n =
      detail::checked_ssd_sizes<S>(in, options, state, final_state, out.rows(), out.cols());
  Workspace workspace;
  detail::ssd_chunked<S>(in, n, out, state, final_state, workspace, executor);
}

/// ssd_forward by the recurrence: one pass over the state per token.
template <MatrixLike X, MatrixLike A, MatrixLike B, MatrixLike C, OutputMatrix O>
  requires SameScalar<X, A, B, C, O> && RealScalar<scalar_t<X>>
void ssd_recurrent(const X& x, const A& log_decay, const B& b, const C& c, O&& out,
                   const SsdOptions& options = {}, const Matrix<scalar_t<X>>* state = nullptr,
                   Matrix<scalar_t<X>>* final_state = nullptr, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const detail::SsdOperands<S> in{x, log_decay, b, c};
  const detail::SsdSizes n =
      detail::checked_ssd_sizes<S>(in, options, state, final_state, out.rows(), out.cols());
  Matrix<S> memory;
  if (state != nullptr) {
    memory = *state;
  } else {
    memory.setZero(n.heads * n.head_dim, n.states);
  }
  detail::ssd_heads_recurrent<S>(in, n, out, memory, executor);
  if (final_state != nullptr) final_state->swap(memory);
}

/// Gradients from dout and, unless null, that of the final state.  Overwrites dx .. dc and, unless null, dstate.
template <MatrixLike X, MatrixLike A, MatrixLike B, MatrixLike C, MatrixLike DO, OutputMatrix DX,
          OutputMatrix DA, OutputMatrix DB, OutputMatrix DC>
  requires SameScalar<X, A, B, C, DO, DX, DA, DB, DC> && RealScalar<scalar_t<X>>
void ssd_backward(const X& x, const A& log_decay, const B& b, const C& c, const DO& dout, DX&& dx,
                  DA&& dlog_decay, DB&& db, DC&& dc, const SsdOptions& options = {},
                  const Matrix<scalar_t<X>>* state = nullptr,
                  const Matrix<scalar_t<X>>* dfinal_state = nullptr,
                  Matrix<scalar_t<X>>* dstate = nullptr, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  using detail::require_shape;
  const detail::SsdOperands<S> in{x, log_decay, b, c};
  const detail::SsdSizes n = detail::ssd_sizes<S>(in, options);
  detail::require_ssd_state("state", state, n);
  detail::require_ssd_state("dfinal_state", dfinal_state, n);
  detail::require_ssd_state("dstate", dstate, n);
  require_shape("dout", dout.rows(), dout.cols(), n.tokens, x.cols(), "shape of x");
  require_shape("dx", dx.rows(), dx.cols(), n.tokens, x.cols(), "shape of x");
  require_shape("dlog_decay", dlog_decay.rows(), dlog_decay.cols(), n.tokens, n.heads,
                "shape of log_decay");
  require_shape("db", db.rows(), db.cols(), n.tokens, b.cols(), "shape of b");
  require_shape("dc", dc.rows(), dc.cols(), n.tokens, b.cols(), "shape of c");
  const ConstMatrixRef<S> dout_ref = dout;
  MatrixRef<S> dx_ref = dx, da_ref = dlog_decay, db_ref = db, dc_ref = dc;
  const std::size_t bytes = detail::SsdTiles<S>::bytes(n, true);
  const Index share = n.tokens * n.states, strips = n.strips();
  Workspace workspace;
  workspace.prepare(executor.workers(), bytes);
  S* const shares =
      workspace.shared(detail::padded_bytes<S>(n.groups * strips * 2 * share)).template take<S>(0);
  executor.run(n.groups * strips, [&](Index task, int worker) {
    detail::ssd_strip(n, task, [&](Index head, Index heads) {
      detail::SsdTiles<S> tiles(n, heads, workspace.arena(worker, bytes), true);
      S* const own = shares + task * 2 * share;
      tiles.backward(detail::ssd_inputs(in, state, n, head),
                     {.dout = detail::head_columns(dout_ref, head * n.head_dim),
                      .dfinal = detail::head_rows(dfinal_state, head * n.head_dim),
                      .dx = detail::head_columns(dx_ref, head * n.head_dim),
                      .ddecay = detail::head_columns(da_ref, head),
                      .dinitial = detail::head_rows(dstate, head * n.head_dim),
                      .db = own,
                      .dc = own + share});
    });
  });
  for (Index group = 0; group < n.groups; ++group) {  // in order: the same for every executor
    for (Index strip = 0; strip < strips; ++strip) {
      const S* const from = shares + (group * strips + strip) * 2 * share;
      const Eigen::Map<const Matrix<S>> own_b(from, n.tokens, n.states);
      const Eigen::Map<const Matrix<S>> own_c(from + share, n.tokens, n.states);
      auto to_b = db_ref.middleCols(group * n.states, n.states);
      auto to_c = dc_ref.middleCols(group * n.states, n.states);
      if (strip == 0) {
        to_b = own_b;
        to_c = own_c;
      } else {
        to_b += own_b;
        to_c += own_c;
      }
    }
  }
}

/// All that decoding needs between two calls: a regular value, a copy is a snapshot.
template <RealScalar S>
struct SsdState {
  SsdOptions options;
  Matrix<S> memory;     ///< (heads*P) x N
  Index tokens = 0;     ///< seen so far
  Workspace scratch{};  ///< not part of the value

  Index size() const { return tokens; }
  /// Bytes of the memory; they do not grow.
  Index bytes() const { return memory.size() * Index(sizeof(S)); }
};

/// The state before the first token, or `initial` ((heads*head_dim) x states).
/// Errors: head_dim or states < 1, options as above, wrong shape of initial.
template <RealScalar S>
SsdState<S> ssd_state(const SsdOptions& options, Index head_dim, Index states,
                      const Matrix<S>* initial = nullptr) {
  detail::require(head_dim >= 1 && states >= 1, "head_dim (", head_dim, ") and states (", states,
                  ") must be at least 1");
  const Matrix<S> x(0, std::max<Index>(options.heads, 0) * head_dim);
  const Matrix<S> a(0, std::max<Index>(options.heads, 0));
  const Matrix<S> b(0, std::max<Index>(options.groups, 0) * states);
  const detail::SsdSizes n = detail::ssd_sizes<S>({x, a, b, b}, options);
  detail::require_ssd_state("initial", initial, n);
  SsdState<S> state{.options = options, .memory = {}};
  if (initial != nullptr) {
    state.memory = *initial;
  } else {
    state.memory.setZero(n.heads * n.head_dim, n.states);
  }
  return state;
}

/// The rows that follow what the state has seen.  A few go by the recurrence, more by chunks.  Allocates nothing once the
/// state has seen a call of this size; on an error nothing is changed.
template <MatrixLike X, MatrixLike A, MatrixLike B, MatrixLike C, OutputMatrix O>
  requires SameScalar<X, A, B, C, O> && RealScalar<scalar_t<X>>
void ssd_step(SsdState<scalar_t<X>>& state, const X& x, const A& log_decay, const B& b, const C& c,
              O&& out, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  constexpr Index few = 8;
  const detail::SsdOperands<S> in{x, log_decay, b, c};
  const detail::SsdSizes n = detail::checked_ssd_sizes<S>(in, state.options, &state.memory,
                                                          &state.memory, out.rows(), out.cols());
  if (n.tokens <= few) {
    detail::ssd_heads_recurrent<S>(in, n, out, state.memory, executor);
  } else {
    detail::ssd_chunked<S>(in, n, out, &state.memory, &state.memory, state.scratch, executor);
  }
  state.tokens += n.tokens;
}

/// The quadratic form (L o C B^T) X plus what the first state gives, one loop over the pairs, in double: the oracle, which
/// shares nothing with the other forms but the checks.  Decays are sums of a from j up to i.
inline void ssd_reference(const ConstMatrixRef<double>& x, const ConstMatrixRef<double>& log_decay,
                          const ConstMatrixRef<double>& b, const ConstMatrixRef<double>& c,
                          MatrixRef<double> out, const SsdOptions& options = {},
                          const Matrix<double>* state = nullptr,
                          Matrix<double>* final_state = nullptr) {
  const detail::SsdSizes n = detail::checked_ssd_sizes<double>({x, log_decay, b, c}, options, state,
                                                               final_state, out.rows(), out.cols());
  Matrix<double> first = Matrix<double>::Zero(n.heads * n.head_dim, n.states);
  if (state != nullptr) first = *state;
  for (Index h = 0; h < n.heads; ++h) {
    const Index p = h * n.head_dim, g = h / n.group_heads() * n.states;
    const auto channels = [&](Index t) { return x.row(t).segment(p, n.head_dim); };
    for (Index i = 0; i < n.tokens; ++i) {
      auto y = out.row(i).segment(p, n.head_dim);
      y.setZero();
      double sum = 0;
      for (Index j = i; j >= 0; --j) {
        const double score = c.row(i).segment(g, n.states).dot(b.row(j).segment(g, n.states));
        y += std::exp(sum) * score * channels(j);
        sum += log_decay(j, h);
      }
      for (Index k = 0; k < n.head_dim; ++k)
        y[k] += std::exp(sum) * first.row(p + k).dot(c.row(i).segment(g, n.states));
    }
    if (final_state == nullptr) continue;
    auto last = final_state->middleRows(p, n.head_dim);
    last.setZero();
    double sum = 0;
    for (Index j = n.tokens - 1; j >= 0; --j) {
      for (Index k = 0; k < n.head_dim; ++k)
        last.row(k) += std::exp(sum) * channels(j)[k] * b.row(j).segment(g, n.states);
      sum += log_decay(j, h);
    }
    last += std::exp(sum) * first.middleRows(p, n.head_dim);
  }
}

EIGENBLOCKS_NAMESPACE_END
