// Gated linear attention: linear time, a state of fixed size in the place of a cache.
//
//   S_t = diag(e^{g_t}) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t           per head, S is d x e, g_t <= 0
//
// The gate g is absent (linear attention), a scalar per head (RetNet, Mamba-2) or one for each key channel (GLA); which one
// is read off its shape, and all three are one implementation.
//
//   LinearAttentionOptions options{.heads = 8};                                    // scale 1, no gate unless given
//   linear_attention_forward(q, k, v, out, options, {.log_decay = &g, .state = &s0}, &s1);
//   linear_attention_backward(q, k, v, dout, dq, dk, dv, options, {.log_decay = &g, .state = &s0}, &ds1,
//                             {.log_decay = &dg, .state = &ds0});                  // nothing saved: states are recomputed
//   auto state = linear_attention_state<float>(options, d, e);                     // a regular value: a copy is a snapshot
//   linear_attention_step(state, q, k, v, out, &g);                                // any number of rows
//   linear_attention_recurrent(...), linear_attention_reference(...)               // token by token; quadratic, the oracle
//
//   q, k T x (key_heads*d)   v, out T x (heads*e)   log_decay T x heads or T x (heads*d)   state (heads*d) x e
//
// Forms and step sizes agree up to rounding; results are bitwise the same for every executor (heads are the tasks).  Any
// decay is safe, -inf (forget everything) included; linear_tiles.hpp says how.  g > 0 grows and may overflow.  A NaN in
// token t stays out of earlier outputs and, a NaN of dout, out of later tokens' gradients.  Outputs must not overlap inputs;
// the first and the last state may be the same matrix.
//
// Errors (invalid_argument, nothing written): heads or key_heads < 1, key_heads not dividing heads, chunk < 0, scale not
// finite, widths that do not fit, wrong shapes of log_decay, states, outputs and gradients.  No tokens: the state passes.
//
// Sources: arXiv 2006.16236 (linear attention), 2307.08621 (RetNet), 2312.06635 (GLA), 2405.21060 (Mamba-2).
#pragma once

#include <eigenblocks/attention/linear_tiles.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>

#include <cmath>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct LinearAttentionOptions {
  Index heads = 1;
  Index key_heads =
      0;  ///< heads of q and k, each shared by heads / key_heads neighbours (Mamba-2's groups); 0 means heads
  double scale = 1.0;  ///< GLA's is 1/sqrt(d)
  Index chunk = 0;     ///< tokens of a chunk; 0 takes 32.  No effect but on speed and rounding
};

/// Optional inputs; null is absent.
template <RealScalar S>
struct LinearAttentionTensors {
  const Matrix<S>* log_decay = nullptr;  ///< T x heads or T x (heads*d); absent: no decay
  const Matrix<S>* state = nullptr;      ///< (heads*d) x e before the first token; absent: 0
};

/// Where their gradients go, in the same shapes; null is not wanted.
template <RealScalar S>
struct LinearAttentionGradients {
  Matrix<S>* log_decay = nullptr;
  Matrix<S>* state = nullptr;
};

/// RetNet's gate of head h: log(1 - 2^{-5-h}).
inline double retnet_log_decay(Index head) {
  return std::log1p(-std::exp2(-5.0 - static_cast<double>(head)));
}

namespace detail {

inline LinearSizes linear_sizes(Index tokens, Index q_cols, Index k_rows, Index k_cols,
                                Index v_rows, Index v_cols, const LinearAttentionOptions& o) {
  const Index key_heads = o.key_heads == 0 ? o.heads : o.key_heads;
  require(o.heads >= 1, "heads (", o.heads, ") must be at least 1");
  require(key_heads >= 1, "key_heads (", o.key_heads, ") must be at least 1, or 0 for heads");
  require(o.heads % key_heads == 0, "key_heads (", key_heads, ") must divide heads (", o.heads,
          ")");
  require(o.chunk >= 0, "chunk (", o.chunk, ") must be positive, or 0 for the default");
  require(std::isfinite(o.scale), "scale (", o.scale, ") must be finite");
  require(q_cols >= 1 && q_cols % key_heads == 0, "query is ", tokens, " x ", q_cols,
          ", expected columns in a positive multiple of key_heads (", key_heads, ")");
  require_shape("key", k_rows, k_cols, tokens, q_cols, "shape of query");
  require(v_rows == tokens && v_cols >= 1 && v_cols % o.heads == 0, "value is ", v_rows, " x ",
          v_cols, ", expected ", tokens, " rows and columns in a positive multiple of heads (",
          o.heads, ")");
  LinearSizes n{.tokens = tokens,
                .heads = o.heads,
                .group = o.heads / key_heads,
                .key_dim = q_cols / key_heads,
                .value_dim = v_cols / o.heads,
                .gate_dim = 0,
                .chunk = o.chunk};
  if (n.chunk == 0) n.chunk = 32;  // measured: 16 to 64 are within 15 %
  n.chunk = std::clamp<Index>(n.chunk, 1, std::max<Index>(tokens, 1));
  return n;
}

/// Checks the gate and leaves its width in n.
template <RealScalar S>
void require_log_decay(const Matrix<S>* log_decay, LinearSizes& n) {
  if (log_decay == nullptr) return;
  const Index cols = log_decay->cols();
  require(log_decay->rows() == n.tokens && (cols == n.heads || cols == n.heads * n.key_dim),
          "log_decay is ", log_decay->rows(), " x ", cols, ", expected ", n.tokens, " x ", n.heads,
          " or ", n.tokens, " x ", n.heads * n.key_dim, " (tokens x heads, or x heads * d)");
  n.gate_dim = cols / n.heads;
}

template <RealScalar S>
void require_state(const char* name, const Matrix<S>* state, const LinearSizes& n) {
  if (state == nullptr) return;
  require_shape(name, state->rows(), state->cols(), n.heads * n.key_dim, n.value_dim,
                "heads * d, e");
}

/// The d rows of a head's state; null for none.
template <class M>
auto head_state(M* state, Index h, const LinearSizes& n) {
  return head_rows(state, h * n.key_dim);
}

template <RealScalar S>
struct LinearOperands {
  ConstMatrixRef<S> q, k, v;
  const Matrix<S>* gate;
  S scale;

  typename LinearTiles<S>::Inputs head(Index h, const LinearSizes& n) const {
    const Index key = h / n.group * n.key_dim;
    HeadRows<const S> g{nullptr, 0};
    if (gate != nullptr) g = {gate->data() + h * n.gate_dim, gate->cols()};
    return {head_columns(q, key), head_columns(k, key), head_columns(v, h * n.value_dim), g, scale};
  }
};

/// All heads, chunk by chunk or token by token.
template <RealScalar S>
void linear_heads(const LinearOperands<S>& in, const LinearSizes& n, MatrixRef<S> out,
                  const Matrix<S>* initial, Matrix<S>* final, Workspace& workspace,
                  ExecutorRef executor) {
  const std::size_t bytes = LinearTiles<S>::bytes(n, false);
  workspace.prepare(executor.workers(), bytes);
  executor.run(n.heads, [&](Index h, int worker) {
    LinearTiles<S> tiles(n, workspace.arena(worker, bytes), false);
    tiles.forward(in.head(h, n), head_columns(out, h * n.value_dim), head_state(initial, h, n),
                  head_state(final, h, n));
  });
}
template <RealScalar S>
void linear_heads_recurrent(const LinearOperands<S>& in, const LinearSizes& n, MatrixRef<S> out,
                            Matrix<S>& state, Workspace& workspace, ExecutorRef executor) {
  const std::size_t bytes = LinearRecurrence<S>::bytes(n);
  workspace.prepare(executor.workers(), bytes);
  executor.run(n.heads, [&](Index h, int worker) {
    LinearRecurrence<S>::run(n, workspace.arena(worker, bytes), in.head(h, n),
                             head_columns(out, h * n.value_dim), head_state(&state, h, n));
  });
}

template <MatrixLike Q, MatrixLike K, MatrixLike V, class O, RealScalar S = scalar_t<Q>>
LinearSizes checked_linear_sizes(const Q& q, const K& k, const V& v, const O& out,
                                 const LinearAttentionOptions& options,
                                 const LinearAttentionTensors<S>& tensors,
                                 const std::type_identity_t<Matrix<S>>* final_state) {
  LinearSizes n = linear_sizes(q.rows(), q.cols(), k.rows(), k.cols(), v.rows(), v.cols(), options);
  require_shape("out", out.rows(), out.cols(), n.tokens, v.cols(), "shape of value");
  require_log_decay(tensors.log_decay, n);
  require_state("state", tensors.state, n);
  require_state("final_state", final_state, n);
  return n;
}

}  // namespace detail

/// out, and the state after the last token into final_state unless null.  The chunked form: products of tiles.
template <MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O>
  requires SameScalar<Q, K, V, O> && RealScalar<scalar_t<Q>>
void linear_attention_forward(const Q& query, const K& key, const V& value, O&& out,
                              const LinearAttentionOptions& options = {},
                              const LinearAttentionTensors<scalar_t<Q>>& tensors = {},
                              Matrix<scalar_t<Q>>* final_state = nullptr,
                              ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  const detail::LinearSizes n =
      detail::checked_linear_sizes(query, key, value, out, options, tensors, final_state);
  Workspace workspace;
  detail::linear_heads<S>({query, key, value, tensors.log_decay, static_cast<S>(options.scale)}, n,
                          out, tensors.state, final_state, workspace, executor);
}

/// The same, returned.
template <MatrixLike Q, MatrixLike K, MatrixLike V>
  requires SameScalar<Q, K, V> && RealScalar<scalar_t<Q>> Matrix<scalar_t<Q>> linear_attention(
      const Q& query, const K& key, const V& value, const LinearAttentionOptions& options = {},
      const LinearAttentionTensors<scalar_t<Q>>& tensors = {}, ExecutorRef executor = {}) {
    Matrix<scalar_t<Q>> out(value.rows(), value.cols());
    linear_attention_forward(query, key, value, out, options, tensors, nullptr, executor);
    return out;
  }

/// linear_attention_forward by the recurrence: one pass over the state per token.
template <MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O>
  requires SameScalar<Q, K, V, O> && RealScalar<scalar_t<Q>>
void linear_attention_recurrent(const Q& query, const K& key, const V& value, O&& out,
                                const LinearAttentionOptions& options = {},
                                const LinearAttentionTensors<scalar_t<Q>>& tensors = {},
                                Matrix<scalar_t<Q>>* final_state = nullptr,
                                ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  const detail::LinearSizes n =
      detail::checked_linear_sizes(query, key, value, out, options, tensors, final_state);
  Matrix<S> state;
  if (tensors.state != nullptr) {
    state = *tensors.state;
  } else {
    state.setZero(n.heads * n.key_dim, n.value_dim);
  }
  Workspace workspace;
  detail::linear_heads_recurrent<S>(
      {query, key, value, tensors.log_decay, static_cast<S>(options.scale)}, n, out, state,
      workspace, executor);
  if (final_state != nullptr) final_state->swap(state);
}

/// Gradients from dout and, unless null, that of the final state.  Overwrites dq, dk, dv and what `gradients` points to.
/// Memory beyond the outputs, per worker: one state for every 16 chunks.
template <MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike DO, OutputMatrix DQ, OutputMatrix DK,
          OutputMatrix DV>
  requires SameScalar<Q, K, V, DO, DQ, DK, DV> && RealScalar<scalar_t<Q>>
void linear_attention_backward(const Q& query, const K& key, const V& value, const DO& dout,
                               DQ&& dquery, DK&& dkey, DV&& dvalue,
                               const LinearAttentionOptions& options = {},
                               const LinearAttentionTensors<scalar_t<Q>>& tensors = {},
                               const Matrix<scalar_t<Q>>* dfinal_state = nullptr,
                               const LinearAttentionGradients<scalar_t<Q>>& gradients = {},
                               ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  using Tiles = detail::LinearTiles<S>;
  detail::LinearSizes n = detail::linear_sizes(query.rows(), query.cols(), key.rows(), key.cols(),
                                               value.rows(), value.cols(), options);
  detail::require_log_decay(tensors.log_decay, n);
  detail::require_state("state", tensors.state, n);
  detail::require_state("dfinal_state", dfinal_state, n);
  detail::require_state("gradients.state", gradients.state, n);
  detail::require_shape("dout", dout.rows(), dout.cols(), n.tokens, value.cols(), "shape of value");
  detail::require_shape("dquery", dquery.rows(), dquery.cols(), n.tokens, query.cols(),
                        "shape of query");
  detail::require_shape("dkey", dkey.rows(), dkey.cols(), n.tokens, key.cols(), "shape of key");
  detail::require_shape("dvalue", dvalue.rows(), dvalue.cols(), n.tokens, value.cols(),
                        "shape of value");
  if (gradients.log_decay != nullptr) {
    detail::require(tensors.log_decay != nullptr,
                    "gradients.log_decay is wanted, but there is no log_decay");
    detail::require_shape("gradients.log_decay", gradients.log_decay->rows(),
                          gradients.log_decay->cols(), n.tokens, n.heads * n.gate_dim,
                          "shape of log_decay");
  }
  const detail::LinearOperands<S> in{query, key, value, tensors.log_decay,
                                     static_cast<S>(options.scale)};
  const ConstMatrixRef<S> dout_ref = dout;
  MatrixRef<S> dq = dquery, dk = dkey, dv = dvalue;
  const std::size_t bytes = Tiles::bytes(n, true);
  Workspace workspace;
  workspace.prepare(executor.workers(), bytes);
  executor.run(n.key_heads(), [&](Index group, int worker) {  // heads that share dq and dk
    Tiles tiles(n, workspace.arena(worker, bytes), true);
    for (Index h = group * n.group; h < (group + 1) * n.group; ++h) {
      detail::HeadRows<S> dgate{nullptr, 0};
      if (gradients.log_decay != nullptr) {
        dgate = {gradients.log_decay->data() + h * n.gate_dim, gradients.log_decay->cols()};
      }
      tiles.backward(in.head(h, n), detail::head_state(tensors.state, h, n),
                     {.dout = detail::head_columns(dout_ref, h * n.value_dim),
                      .dq = detail::head_columns(dq, group * n.key_dim),
                      .dk = detail::head_columns(dk, group * n.key_dim),
                      .dv = detail::head_columns(dv, h * n.value_dim),
                      .dgate = dgate,
                      .add_keys = h > group * n.group},
                     detail::head_state(dfinal_state, h, n),
                     detail::head_state(gradients.state, h, n));
    }
  });
}

/// All that decoding needs between two calls: a regular value, a copy is a snapshot.
template <RealScalar S>
struct LinearAttentionState {
  LinearAttentionOptions options;
  Matrix<S> memory;     ///< (heads*d) x e
  Index tokens = 0;     ///< seen so far
  Workspace scratch{};  ///< not part of the value

  Index size() const { return tokens; }
  /// Bytes of the memory; unlike a cache's they do not grow.
  Index bytes() const { return memory.size() * Index(sizeof(S)); }
};

/// The state before the first token, or `initial` ((heads*d) x e).
/// Errors: key_dim or value_dim < 1, options as above, wrong shape of initial.
template <RealScalar S>
LinearAttentionState<S> linear_attention_state(const LinearAttentionOptions& options, Index key_dim,
                                               Index value_dim,
                                               const Matrix<S>* initial = nullptr) {
  detail::require(key_dim >= 1 && value_dim >= 1, "key_dim (", key_dim, ") and value_dim (",
                  value_dim, ") must be at least 1");
  const Index keys = (options.key_heads == 0 ? options.heads : options.key_heads) * key_dim;
  const detail::LinearSizes n =
      detail::linear_sizes(0, std::max<Index>(keys, 1), 0, std::max<Index>(keys, 1), 0,
                           std::max<Index>(options.heads, 1) * value_dim, options);
  detail::require_state("initial", initial, n);
  LinearAttentionState<S> state{.options = options, .memory = {}};
  if (initial != nullptr) {
    state.memory = *initial;
  } else {
    state.memory.setZero(n.heads * n.key_dim, n.value_dim);
  }
  return state;
}

/// The rows that follow what the state has seen.  A few go by the recurrence, more by chunks.  Allocates nothing once the
/// state has seen a call of this kind; on an error nothing is changed.
template <MatrixLike Q, MatrixLike K, MatrixLike V, OutputMatrix O>
  requires SameScalar<Q, K, V, O> && RealScalar<scalar_t<Q>>
void linear_attention_step(LinearAttentionState<scalar_t<Q>>& state, const Q& query, const K& key,
                           const V& value, O&& out, const Matrix<scalar_t<Q>>* log_decay = nullptr,
                           ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  constexpr Index few = 8;
  const detail::LinearSizes n = detail::checked_linear_sizes(query, key, value, out, state.options,
                                                             {.log_decay = log_decay}, nullptr);
  detail::require_state("state", &state.memory, n);
  const detail::LinearOperands<S> in{query, key, value, log_decay,
                                     static_cast<S>(state.options.scale)};
  if (n.tokens <= few) {
    detail::linear_heads_recurrent<S>(in, n, out, state.memory, state.scratch, executor);
  } else {
    detail::linear_heads<S>(in, n, out, &state.memory, &state.memory, state.scratch, executor);
  }
  state.tokens += n.tokens;
}

/// The quadratic form, one loop over the pairs, in double: o_i = scale sum_j <q_i e^{g_{j+1} + .. + g_i}, k_j> v_j.  The
/// oracle of the other forms, from which it shares nothing but the checks; decays are sums of gates from j up to i.
inline void linear_attention_reference(const ConstMatrixRef<double>& query,
                                       const ConstMatrixRef<double>& key,
                                       const ConstMatrixRef<double>& value, MatrixRef<double> out,
                                       const LinearAttentionOptions& options = {},
                                       const LinearAttentionTensors<double>& tensors = {},
                                       Matrix<double>* final_state = nullptr) {
  const detail::LinearSizes n =
      detail::checked_linear_sizes(query, key, value, out, options, tensors, final_state);
  const Index d = n.key_dim, e = n.value_dim;
  const auto gate = [&](Index t, Index h, Index c) {
    if (n.gate_dim == 0) return 0.0;
    return (*tensors.log_decay)(t, h * n.gate_dim + (n.gate_dim == d ? c : 0));
  };
  const Matrix<double> initial = tensors.state != nullptr
                                     ? *tensors.state
                                     : Matrix<double>(Matrix<double>::Zero(n.heads * d, e));
  std::vector<double> sum(static_cast<std::size_t>(d));
  for (Index h = 0; h < n.heads; ++h) {
    const Index first = h / n.group * d;
    // row(c) += weight(c, j) v_j over j = i, i - 1, .., 0 and the initial state last
    const auto walk = [&](Index i, auto&& token, auto&& start) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (Index j = i; j >= 0; --j) {
        token(j);
        for (Index c = 0; c < d; ++c) sum[static_cast<std::size_t>(c)] += gate(j, h, c);
      }
      start();
    };
    const auto decay = [&](Index c) { return std::exp(sum[static_cast<std::size_t>(c)]); };
    for (Index i = 0; i < n.tokens; ++i) {
      auto row = out.row(i).segment(h * e, e);
      row.setZero();
      walk(
          i,
          [&](Index j) {
            double score = 0;
            for (Index c = 0; c < d; ++c)
              score += query(i, first + c) * decay(c) * key(j, first + c);
            row += options.scale * score * value.row(j).segment(h * e, e);
          },
          [&] {
            for (Index c = 0; c < d; ++c)
              row += options.scale * query(i, first + c) * decay(c) * initial.row(h * d + c);
          });
    }
    if (final_state == nullptr) continue;
    auto last = final_state->middleRows(h * d, d);
    last.setZero();
    walk(
        n.tokens - 1,
        [&](Index j) {
          for (Index c = 0; c < d; ++c)
            last.row(c) += decay(c) * key(j, first + c) * value.row(j).segment(h * e, e);
        },
        [&] {
          for (Index c = 0; c < d; ++c) last.row(c) += decay(c) * initial.row(h * d + c);
        });
  }
}

EIGENBLOCKS_NAMESPACE_END
