// Transformer-VQ: causal attention over quantised keys in linear time, forward, backward and step by step.
//
//   z_j = nearest code of k_j                                                     (vq_codebook.hpp)
//   s_ij = <q_i + u, C_z(j)> + [i - j <= M] <q_i + v_bias, r_(i-j)>      j <= i
//   out_i = sum_j softmax_j(s_i) v_j                                     no further scale: it is in q and k
//
// Keys beyond M share one score per code, so they are kept as a count n_s and a mean value mu_s (the compressive cache):
//   exp(s_ij) summed over older j with code s  =  exp(<q_i + u, C_s> + log n_s),   their values: mu_s
//
//   VqBias<float> bias{.u = u, .v_bias = v_bias, .r = r};                  // Transformer-XL's; each may be empty
//   const VqAttentionOptions options{.heads = H, .block_len = 512, .mem_len = 512};
//   const auto saved = vq_attention_forward(q, k, v, codebook, out, options, bias, pool);
//   vq_attention_backward(saved, q, v, codebook, out, dout, dq, dk, dv, options, bias, &dbias, pool);
//   VqState<float> state = vq_state(codebook, e, options);                 // a value: copying it is a snapshot
//   vq_attention_step(state, q_rows, k_rows, v_rows, codebook, out_rows, options, bias);
//
// Shapes: query and key T x (heads * d), value and out T x (heads * e), codebook (heads * codes) x d.  Query and key
// come normalised and scaled by d^(-1/4) (VqLayer in vq.hpp does it).  The codebook gets no gradient: it learns by
// averages; the commitment loss adds its own gradient to the keys (vq_commit_backward).
// Cost of a token and head: O((S + M)(d + e)), without r O(S (d + e)); the state holds S (e + 1) + M (e + 1) numbers per head.
// The output does not depend on block_len, which says what the backward sends to keys and values (VqGradient).
// A NaN in a value, a query or dout shows wherever it is attended to and nowhere else.  A key that is NaN has code 0.
// Executors do not change a bit: forward tasks are heads x chunks of 512 tokens or more, backward tasks are heads.
// Sources: arXiv 2309.16354, github.com/transformer-vq/transformer_vq, kexue.fm/archives/9844.
//
// Errors (invalid_argument): an empty codebook, shapes that do not fit, block_len < 1, mem_len < 0, a state of other
// sizes.  Zero rows are valid.
#pragma once

#include <eigenblocks/attention/vq_backward.hpp>
#include <eigenblocks/attention/vq_tiles.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

/// What the backward needs besides the operands and the output.
template <RealScalar S>
struct VqSaved {
  VqCodes codes;  ///< T x heads
  Matrix<S> lse;  ///< T x heads
};

/// Everything a sequence leaves behind.  Counts are exact; `scratch` is not part of the value.
template <RealScalar S>
struct VqState {
  Index tokens = 0;
  VqCodes memory_codes;    ///< M x heads, token t in row t % M
  Matrix<S> memory_value;  ///< M x (heads * e)
  Matrix<Index> count;     ///< heads x codes, of the tokens [0, tokens - M)
  Matrix<S> mean;          ///< (heads * codes) x e, their mean value; 0 for a code without
  Workspace scratch;
  detail::ScratchBlock new_codes;

  /// Forgets the sequence, at a document border for instance.
  void reset() {
    tokens = 0;
    count.setZero();
    mean.setZero();
  }
  std::size_t bytes() const {
    return sizeof(S) * static_cast<std::size_t>(memory_value.size() + mean.size()) +
           sizeof(Index) * static_cast<std::size_t>(memory_codes.size() + count.size());
  }
};

/// The state before the first token.
template <MatrixLike C>
  requires RealScalar<scalar_t<C>> VqState<scalar_t<C>> vq_state(
      const C& codebook, Index value_dim, const VqAttentionOptions& options) {
    const detail::VqSizes n = detail::vq_sizes(0, options.heads * codebook.cols(), codebook.rows(),
                                               codebook.cols(), options.heads);
    detail::require(value_dim >= 0, "value_dim (", value_dim, ") must not be negative");
    detail::require(options.mem_len >= 0, "mem_len (", options.mem_len, ") must not be negative");
    VqState<scalar_t<C>> state;
    state.memory_codes.setZero(options.mem_len, n.heads);
    state.memory_value.setZero(options.mem_len, n.heads * value_dim);
    state.count.setZero(n.heads, n.codes);
    state.mean.setZero(n.heads * n.codes, value_dim);
    return state;
  }

namespace detail {

template <class Q, class V, class C, RealScalar S>
VqAttentionOperands<S> vq_operands(const Q& query, const V& value, const C& codebook,
                                   const Index* code, const VqBias<S>& bias) {
  const auto data = [](const Matrix<S>& m) { return m.size() == 0 ? nullptr : m.data(); };
  VqAttentionOperands<S> x;
  x.query = query.data();
  x.query_stride = query.outerStride();
  x.value = value.data();
  x.value_stride = value.outerStride();
  x.code = code;
  x.codebook = codebook.data();
  x.codebook_stride = codebook.outerStride();
  x.u = data(bias.u);
  x.v_bias = data(bias.v_bias);
  x.r = data(bias.r);
  return x;
}

/// The token of absolute number `tokens` comes in: the one that leaves the memory goes into the aggregate.
template <RealScalar S>
void vq_remember(VqState<S>& state, Index tokens, Index h, Index code, const S* value, Index e) {
  const Index m = state.memory_codes.rows(), codes = state.count.cols();
  const VqAggregate<S> older{state.count.data() + h * codes, state.mean.data() + h * codes * e};
  if (m == 0) return older.add(code, value, e);
  const Index slot = tokens % m;
  S* const memory = state.memory_value.data() + slot * state.memory_value.cols() + h * e;
  if (tokens >= m) older.add(state.memory_codes(slot, h), memory, e);
  state.memory_codes(slot, h) = code;
  std::copy_n(value, e, memory);
}

template <RealScalar S>
void require_vq_state(const VqState<S>& state, const VqAttentionSizes& n) {
  require_shape("state.memory_codes", state.memory_codes.rows(), state.memory_codes.cols(),
                n.mem_len, n.heads, "mem_len x heads");
  require_shape("state.memory_value", state.memory_value.rows(), state.memory_value.cols(),
                n.mem_len, n.heads * n.value_dim, "mem_len x columns of value");
  require_shape("state.count", state.count.rows(), state.count.cols(), n.heads, n.codes,
                "heads x codes");
  require_shape("state.mean", state.mean.rows(), state.mean.cols(), n.heads * n.codes, n.value_dim,
                "heads * codes x columns of a head's value");
  require(state.tokens >= 0, "state.tokens (", state.tokens, ") must not be negative");
}

/// One token of one head against the state, everything as it lies, by products of one row.
template <RealScalar S>
class VqRow {
  using Row = Eigen::Map<RowVector<S>>;
  using Rows = Eigen::Map<const Matrix<S>, 0, Eigen::OuterStride<>>;

 public:
  static std::size_t bytes(const VqAttentionSizes& n) {
    return 2 * padded_bytes<S>(n.dim) + 2 * padded_bytes<S>(n.codes) +
           2 * padded_bytes<S>(n.mem_len + 1);
  }

  /// The nearest code of a key, as VqSearch finds it.
  static Index nearest(const VqAttentionSizes& n, const VqAttentionOperands<S>& x, Index h,
                       const S* key, Arena arena) {
    S* const score = arena.take<S>(n.codes);
    const S* const codebook = x.codebook + h * n.codes * x.codebook_stride;
    product_nt<S>(Eigen::Map<const RowVector<S>>(key, n.dim),
                  Rows(codebook, n.codes, n.dim, Eigen::OuterStride<>(x.codebook_stride)),
                  Row(score, n.codes));
    S best = -std::numeric_limits<S>::infinity();
    Index found = 0;
    for (Index s = 0; s < n.codes; ++s) {
      const S now =
          score[s] -
          Eigen::Map<const Vector<S>>(codebook + s * x.codebook_stride, n.dim).squaredNorm() / S(2);
      if (now > best) {  // false for NaN
        best = now;
        found = s;
      }
    }
    return found;
  }

  /// out (e entries) of row `row`, `tokens` being all tokens before it.
  static void attend(const VqAttentionSizes& n, const VqAttentionOperands<S>& x, Index h, Index row,
                     const VqState<S>& state, Index tokens, S* out, Arena arena) {
    const Index d = n.dim, e = n.value_dim, m = n.mem_len, cached = std::min(tokens, m);
    S* const q_u = arena.take<S>(d);
    S* const q_v = arena.take<S>(d);
    S* const product = arena.take<S>(n.codes);
    S* const older = arena.take<S>(n.codes);
    S* const bias = arena.take<S>(m + 1);
    S* const recent = arena.take<S>(m + 1);  // by slot; the token itself comes last
    for (Index k = 0; k < d; ++k) {
      const S q = x.query[row * x.query_stride + h * d + k];
      q_u[k] = x.u != nullptr ? q + x.u[h * d + k] : q;
      q_v[k] = x.v_bias != nullptr ? q + x.v_bias[h * d + k] : q;
    }
    const auto rows = [](const S* data, Index count, Index width, Index stride) {
      return Rows(data, count, width, Eigen::OuterStride<>(stride));
    };
    product_nt<S>(Row(q_u, d),
                  rows(x.codebook + h * n.codes * x.codebook_stride, n.codes, d, x.codebook_stride),
                  Row(product, n.codes));
    if (x.r != nullptr) {
      product_nt<S>(Row(q_v, d), rows(x.r + h * (m + 1) * d, cached + 1, d, d),
                    Row(bias, cached + 1));
    } else {
      std::fill_n(bias, cached + 1, S(0));
    }
    S top = product[x.code[row * n.heads + h]] + bias[0];
    recent[m] = top;
    for (Index distance = 1; distance <= cached; ++distance) {
      const Index slot = (tokens - distance) % m;
      recent[slot] = product[state.memory_codes(slot, h)] + bias[distance];
      top = std::max(top, recent[slot]);
    }
    const Index* const count = state.count.data() + h * n.codes;
    if (n.aggregate && tokens > m) {
      logarithms(count, n.codes, older);
      for (Index s = 0; s < n.codes; ++s) {
        older[s] = count[s] == 0 ? -std::numeric_limits<S>::infinity() : older[s] + product[s];
        top = std::max(top, older[s]);
      }
    }
    if (top == -std::numeric_limits<S>::infinity()) top = 0;
    Row to(out, e);
    recent[m] = simd::exp(recent[m] - top);
    S sum = recent[m];
    to = recent[m] * Eigen::Map<const RowVector<S>>(x.value + row * x.value_stride + h * e, e);
    if (cached > 0) {
      sum += exponentials(recent, cached, top);
      product_nn<S>(Row(recent, cached),
                    rows(state.memory_value.data() + h * e, cached, e, n.heads * e), to,
                    Write::add);
    }
    if (n.aggregate && tokens > m) {
      sum += exponentials(older, n.codes, top);
      product_nn<S>(Row(older, n.codes), rows(state.mean.data() + h * n.codes * e, n.codes, e, e),
                    to, Write::add);
    }
    to *= sum == S(0) ? S(0) : S(1) / sum;
  }

 private:
  static void logarithms(const Index* count, Index codes, S* to) {
    using P = simd::Packet<S>;
    constexpr Index w = simd::kLanes<S>;
    for (Index s = 0; s < codes; ++s) to[s] = static_cast<S>(count[s]);
    Index s = 0;
    for (; s + w <= codes; s += w) simd::store<P>(to + s, simd::log(simd::load<P>(to + s)));
    for (; s < codes; ++s) to[s] = simd::log(to[s]);
  }
};

}  // namespace detail

/// out from query, key and value, by tiles.
template <MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike C, OutputMatrix O>
  requires SameScalar<Q, K, V, C, O> && RealScalar<scalar_t<Q>> VqSaved<scalar_t<Q>>
  vq_attention_forward(const Q& query, const K& key, const V& value, const C& codebook, O&& out,
                       const VqAttentionOptions& options = {}, const VqBias<scalar_t<Q>>& bias = {},
                       ExecutorRef executor = {}) {
    using S = scalar_t<Q>;
    detail::VqAttentionSizes n =
        detail::vq_attention_sizes(query, key, value, codebook, options, bias);
    detail::require_shape("out", out.rows(), out.cols(), n.rows, value.cols(), "shape of value");
    // Without a relative bias the window says nothing: every key may go into the aggregate at once.
    if (n.aggregate && bias.r.size() == 0) n.mem_len = 0;
    VqSaved<S> saved{vq_nearest(key, codebook, n.heads, executor), Matrix<S>(n.rows, n.heads)};
    Workspace workspace;
    detail::VqTiles<S>(n, detail::vq_operands(query, value, codebook, saved.codes.data(), bias),
                       out.data(), out.outerStride(), saved.lse.data())
        .run(executor, workspace, nullptr, nullptr);
    return saved;
  }

/// dq, dk (straight-through) and dv from dout, after vq_attention_forward of the whole sequence; every output is
/// overwritten.  dbias, if not null, is resized: absent operands have absent gradients.  The commitment loss is not in dk.
template <MatrixLike Q, MatrixLike V, MatrixLike C, MatrixLike O, MatrixLike DO, OutputMatrix DQ,
          OutputMatrix DK, OutputMatrix DV>
  requires SameScalar<Q, V, C, O, DO, DQ, DK, DV> && RealScalar<scalar_t<Q>>
void vq_attention_backward(const VqSaved<scalar_t<Q>>& saved, const Q& query, const V& value,
                           const C& codebook, const O& out, const DO& dout, DQ&& dq, DK&& dk,
                           DV&& dv, const VqAttentionOptions& options = {},
                           const VqBias<scalar_t<Q>>& bias = {},
                           VqBias<scalar_t<Q>>* dbias = nullptr, ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  const detail::VqAttentionSizes n =
      detail::vq_attention_sizes(query, query, value, codebook, options, bias);
  detail::require_shape("out", out.rows(), out.cols(), n.rows, value.cols(), "shape of value");
  detail::require_shape("dout", dout.rows(), dout.cols(), n.rows, value.cols(), "shape of value");
  detail::require_shape("dq", dq.rows(), dq.cols(), n.rows, query.cols(), "shape of query");
  detail::require_shape("dk", dk.rows(), dk.cols(), n.rows, query.cols(), "shape of query");
  detail::require_shape("dv", dv.rows(), dv.cols(), n.rows, value.cols(), "shape of value");
  detail::require_codes(saved.codes, {n.rows, n.heads, n.dim, n.codes});
  detail::require_shape("saved.lse", saved.lse.rows(), saved.lse.cols(), n.rows, n.heads,
                        "tokens x heads");
  const auto like = [&](Matrix<S> VqBias<S>::*which) -> S* {
    if (dbias == nullptr) return nullptr;
    (dbias->*which).resize((bias.*which).rows(), (bias.*which).cols());
    return (bias.*which).size() == 0 ? nullptr : (dbias->*which).data();
  };
  detail::VqGradients<S> gradients{
      dq, dk, dv, like(&VqBias<S>::u), like(&VqBias<S>::v_bias), like(&VqBias<S>::r)};
  if (n.rows == 0) {
    for (S* const gradient : {gradients.du, gradients.dv_bias}) {
      if (gradient != nullptr) std::fill_n(gradient, n.heads * n.dim, S(0));
    }
    if (gradients.dr != nullptr) std::fill_n(gradients.dr, bias.r.size(), S(0));
    return;
  }
  Workspace workspace;
  detail::VqBackward<S>(n, options,
                        detail::vq_operands(query, value, codebook, saved.codes.data(), bias),
                        saved.lse.data(), out, dout, gradients)
      .run(executor, workspace);
}

/// The next rows of a sequence, any number of them: out as vq_attention_forward gives it for the whole.  Allocates nothing
/// once the state has seen as many rows in one call.
template <MatrixLike Q, MatrixLike K, MatrixLike V, MatrixLike C, OutputMatrix O>
  requires SameScalar<Q, K, V, C, O> && RealScalar<scalar_t<Q>>
void vq_attention_step(VqState<scalar_t<Q>>& state, const Q& query, const K& key, const V& value,
                       const C& codebook, O&& out, const VqAttentionOptions& options = {},
                       const VqBias<scalar_t<Q>>& bias = {}, ExecutorRef executor = {}) {
  using S = scalar_t<Q>;
  detail::VqAttentionSizes n =
      detail::vq_attention_sizes(query, key, value, codebook, options, bias);
  detail::require_shape("out", out.rows(), out.cols(), n.rows, value.cols(), "shape of value");
  detail::require_vq_state(state, n);
  const Index e = n.value_dim, m = n.mem_len;
  n.seen = state.tokens;
  n.cached = m;
  Index* const codes = reinterpret_cast<Index*>(
      state.new_codes.reserve(detail::padded_bytes<Index>(n.rows * n.heads)));
  detail::VqAttentionOperands<S> x = detail::vq_operands(query, value, codebook, codes, bias);
  const auto value_row = [&](Index t, Index h) {
    return value.data() + t * value.outerStride() + h * e;
  };
  if (n.rows < detail::VqTiles<S>::kWorthwhile) {
    const std::size_t bytes = detail::VqRow<S>::bytes(n);
    state.scratch.prepare(executor.workers(), bytes);
    executor.run(n.heads, [&](Index h, int worker) {
      for (Index t = 0; t < n.rows; ++t) {
        Index& code = codes[t * n.heads + h];
        code = detail::VqRow<S>::nearest(n, x, h, key.data() + t * key.outerStride() + h * n.dim,
                                         state.scratch.arena(worker, bytes));
        detail::VqRow<S>::attend(n, x, h, t, state, state.tokens + t,
                                 out.data() + t * out.outerStride() + h * e,
                                 state.scratch.arena(worker, bytes));
        detail::vq_remember(state, state.tokens + t, h, code, value_row(t, h), e);
      }
    });
  } else {
    // Room as for a full memory: the scratch does not grow with every call.
    const detail::VqTiles<S> full(n, x, out.data(), out.outerStride(), nullptr);
    state.scratch.prepare(executor.workers(), std::max(full.scratch_bytes(),
                                                       detail::VqSearch<S>::bytes(n.codes, n.dim)));
    detail::vq_nearest_into(key, codebook, {n.rows, n.heads, n.dim, n.codes}, codes, executor,
                            state.scratch);
    n.cached = std::min(state.tokens, m);
    x.memory_code = state.memory_codes.data();
    x.memory_value = state.memory_value.data();
    detail::VqTiles<S>(n, x, out.data(), out.outerStride(), nullptr)
        .run(executor, state.scratch, state.count.data(), state.mean.data());
    for (Index t = std::max<Index>(0, n.rows - m); t < n.rows; ++t) {
      const Index slot = (state.tokens + t) % m;
      for (Index h = 0; h < n.heads; ++h) state.memory_codes(slot, h) = codes[t * n.heads + h];
      std::copy_n(value.data() + t * value.outerStride(), n.heads * e,
                  state.memory_value.data() + slot * n.heads * e);
    }
  }
  state.tokens += n.rows;
}

EIGENBLOCKS_NAMESPACE_END
