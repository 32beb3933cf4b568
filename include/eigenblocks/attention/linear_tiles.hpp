// The loops of linear attention (attention/linear.hpp): one head, chunk by chunk, on products of small tiles.
//
// A chunk of n tokens starts from the state S (d x e) and ends with S'.  With a_t = e^{g_t} (d factors, each <= 1):
//
//   o_i  = (q_i a_1..a_i) S + sum_{j <= i} A_ij v_j         A_ij = <q_i a_{j+1}..a_i, k_j>,  A_ii = <q_i, k_i>
//   S'   = (a_1..a_n) S + sum_j (k_j a_{j+1}..a_n)^T v_j
//
// The textbook splits a_{j+1}..a_i into e^{G_i} e^{-G_j}, which overflows.  Here blocks of tokens are merged in pairs, of
// size 1, 2, 4, ...: with m the first token of the right block, the factor is (a_{j+1}..a_{m-1}) (a_m..a_i), what the left
// block needs to reach its end times what the right block needs from its start.  Both are products of factors that the
// level below already holds:
//
//   level s     Q_i = q_i a_{first of i's block}..a_i,   K_j = k_j a_{j+1}..a_{last of j's block},   D = the product of a block
//   scores      A[right][left] = Q[right] K[left]^T
//   merge       Q[right] *= D[left],  K[left] *= D[right],  D = D[left] D[right]
//
// One exponential per gate, no division, no difference of cumulative sums, nothing above 1 where the gates are not: any
// decay is safe, e^{-inf} = 0 included.  After the last level Q and K are what S and S' take.
//
// The gradients climb the same levels.  With P the factors of Q, R those of K, and dA = dO V^T (one level's block of it):
//   X = dA K,    dq_i += P_i X_i,   dg_t += sum_{i >= t} Q_i X_i   (t in the right block)
//   Y = dA^T Q,  dk_j += R_j Y_j,   dg_t += sum_{j < t}  K_j Y_j   (t in the left block)
// and once more with S and dS' in the place of the other block.  dg is a sum of what decays through t: no cancellation.
#pragma once

#include <eigenblocks/core/math.hpp>
#include <eigenblocks/core/tile_product.hpp>
#include <eigenblocks/core/workspace.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Sizes of one call, checked.
struct LinearSizes {
  Index tokens, heads, group, key_dim, value_dim;
  Index gate_dim;  ///< 0: no gate, 1: a scalar per head, key_dim: one for each key channel
  Index chunk;
  Index key_heads() const { return heads / group; }
};

/// The tiles of one worker.
template <RealScalar S>
class LinearTiles {
  using P = simd::Packet<S>;
  static constexpr Index kW = simd::kLanes<S>;
  static constexpr Index kRowBlock = TileShape<S>::kGradientRows;
  static constexpr Index kSegment = 16;  ///< chunks whose first states the backward holds at once

 public:
  struct Inputs {
    HeadRows<const S> q, k, v, gate;
    S scale;
  };

  static std::size_t bytes(const LinearSizes& n, bool backward) {
    const Layout l(n);
    std::size_t sum = 4 * padded_bytes<S>(l.keys) + 2 * padded_bytes<S>(l.values) +
                      2 * padded_bytes<S>(l.pairs) + 3 * padded_bytes<S>(l.state) +
                      padded_bytes<S>(l.across);
    if (backward) {
      sum += 5 * padded_bytes<S>(l.keys) + 2 * padded_bytes<S>(l.values) +
             padded_bytes<S>((segments(n) + kSegment) * l.state);
    }
    return sum;
  }

  LinearTiles(const LinearSizes& sizes, Arena arena, bool backward)
      : n_(sizes), l_(sizes), gated_(sizes.gate_dim > 0) {
    for (S** tile : {&q_, &k_, &decay_, &work_}) *tile = arena.take<S>(l_.keys);
    for (S** tile : {&v_, &out_}) *tile = arena.take<S>(l_.values);
    scores_ = arena.take<S>(l_.pairs);
    dscores_ = arena.take<S>(l_.pairs);
    for (S** tile : {&state_, &dstate_, &flipped_}) *tile = arena.take<S>(l_.state);
    across_ = arena.take<S>(l_.across);
    std::fill_n(scores_, l_.pairs, S(0));  // above the diagonal it stays 0
    std::fill_n(across_, l_.across, S(0));
    std::fill_n(flipped_, l_.state, S(0));
    if (!backward) return;
    for (S** tile : {&p_, &r_, &dq_, &dk_, &dgate_}) *tile = arena.take<S>(l_.keys);
    for (S** tile : {&dout_, &dv_}) *tile = arena.take<S>(l_.values);
    saved_ = arena.take<S>((segments(n_) + kSegment) * l_.state);
  }

  /// Outputs of one head from the state `initial` (d x e, or null for 0); the last state to `final` unless null.
  void forward(const Inputs& in, HeadRows<S> out, HeadRows<const S> initial, HeadRows<S> final) {
    load_state(initial, state_);
    for (Index t = 0; t < n_.tokens; t += n_.chunk) {
      const Index n = std::min(n_.chunk, n_.tokens - t);
      load(in, t, n);
      pair_up<false>(n);
      strided_product(n, l_.ep, n_.key_dim, left_factor(q_, l_.dp), state_, l_.ep, out_, l_.ep,
                      ProductStart::zero);
      add_lower_product(n, l_.ep, scores_, l_.cp, v_, l_.ep, v_finite_, out_);
      update_state(n);
      store_rows(n, n_.value_dim, out_, l_.ep, out, t, S(1), false);
    }
    store_state(state_, final);
  }

  struct Gradients {
    HeadRows<const S> dout;
    HeadRows<S> dq, dk, dv, dgate;
    bool add_keys;  ///< dq and dk are shared with a head that came before
  };

  /// Gradients of one head; dfinal is that of the last state (null: 0), dinitial receives that of the first (null: not).
  void backward(const Inputs& in, HeadRows<const S> initial, const Gradients& g,
                HeadRows<const S> dfinal, HeadRows<S> dinitial) {
    const Index chunks = (n_.tokens + n_.chunk - 1) / n_.chunk, count = segments(n_);
    S* const segment = saved_ + count * l_.state;
    load_state(initial, state_);
    for (Index s = 0; s + 1 < count; ++s) {
      std::copy_n(state_, l_.state, saved_ + s * l_.state);
      for (Index c = s * kSegment; c < (s + 1) * kSegment; ++c) absorb(in, c);
    }
    if (count > 0) std::copy_n(state_, l_.state, saved_ + (count - 1) * l_.state);
    load_state(dfinal, dstate_);
    for (Index s = count; s-- > 0;) {
      const Index first = s * kSegment, last = std::min(first + kSegment, chunks);
      std::copy_n(saved_ + s * l_.state, l_.state, state_);
      for (Index c = first; c < last; ++c) {
        std::copy_n(state_, l_.state, segment + (c - first) * l_.state);
        if (c + 1 < last) absorb(in, c);
      }
      for (Index c = last; c-- > first;) {
        backward_chunk(in, g, c * n_.chunk, segment + (c - first) * l_.state);
      }
    }
    store_state(dstate_, dinitial);
  }

 private:
  static Index padded(Index n) { return (n + kW - 1) / kW * kW; }
  static Index segments(const LinearSizes& n) {
    const Index chunks = (n.tokens + n.chunk - 1) / n.chunk;
    return (chunks + kSegment - 1) / kSegment;
  }

  struct Layout {
    Index dp, ep, cp;  ///< row strides of tiles with key, value and token columns
    Index keys, values, pairs, state, across;
    explicit Layout(const LinearSizes& n)
        : dp(padded(n.key_dim)),
          ep(padded(n.value_dim)),
          cp(padded(n.chunk)),
          keys(n.chunk * dp),
          values(n.chunk * ep),
          pairs(n.chunk * cp),
          state(std::max(n.key_dim * ep, n.value_dim * dp)),
          across(std::max(n.key_dim, n.value_dim) * cp) {}
  };

  // ---- In and out of the tiles; columns beyond the operand's are 0.

  EIGENBLOCKS_NOINLINE static void load_rows(Index n, Index cols, HeadRows<const S> from, Index t,
                                             S* to, Index stride, S factor = S(1)) {
    const P times = simd::set1<P>(factor);
    const Index whole = cols / kW * kW;
    for (Index i = 0; i < n; ++i, to += stride) {
      const S* const row = from.row(t + i);
      for (Index c = 0; c < whole; c += kW)
        simd::store<P>(to + c, simd::mul(simd::load<P>(row + c), times));
      for (Index c = whole; c < stride; ++c) to[c] = c < cols ? row[c] * factor : S(0);
    }
  }

  EIGENBLOCKS_NOINLINE static void store_rows(Index n, Index cols, const S* from, Index stride,
                                              HeadRows<S> to, Index t, S factor, bool add) {
    const P times = simd::set1<P>(factor);
    const Index whole = cols / kW * kW;
    for (Index i = 0; i < n; ++i, from += stride) {
      S* const row = to.row(t + i);
      for (Index c = 0; c < whole; c += kW) {
        const P x = simd::mul(simd::load<P>(from + c), times);
        simd::store<P>(row + c, add ? simd::add(simd::load<P>(row + c), x) : x);
      }
      for (Index c = whole; c < cols; ++c) row[c] = from[c] * factor + (add ? row[c] : S(0));
    }
  }

  void load_state(HeadRows<const S> from, S* to) const {
    if (from.data == nullptr) {
      std::fill_n(to, l_.state, S(0));
    } else {
      load_rows(n_.key_dim, n_.value_dim, from, 0, to, l_.ep);
    }
  }
  void store_state(const S* from, HeadRows<S> to) const {
    if (to.data != nullptr) store_rows(n_.key_dim, n_.value_dim, from, l_.ep, to, 0, S(1), false);
  }

  void load_keys(const Inputs& in, Index t, Index n) {
    load_rows(n, n_.key_dim, in.k, t, k_, l_.dp);
    load_rows(n, n_.value_dim, in.v, t, v_, l_.ep);
    if (n_.gate_dim == n_.key_dim) {
      load_rows(n, n_.key_dim, in.gate, t, decay_, l_.dp);
      simd::transform(decay_, decay_, n * l_.dp,
                      [](const auto& x) EIGENBLOCKS_INLINE_LAMBDA { return simd::exp(x); });
    } else if (gated_) {
      for (Index i = 0; i < n; ++i)
        std::fill_n(decay_ + i * l_.dp, l_.dp, simd::exp(*in.gate.row(t + i)));
    }
  }
  void load(const Inputs& in, Index t, Index n) {
    load_rows(n, n_.key_dim, in.q, t, q_, l_.dp, in.scale);
    load_keys(in, t, n);
    v_finite_ = tile_is_finite(v_, n * l_.ep);
  }

  // ---- The levels.

  void multiply_rows(Index count, const S* factor, S* x) const {
    for (Index r = 0; r < count; ++r, x += l_.dp) {
      for (Index c = 0; c < l_.dp; c += kW)
        simd::store<P>(x + c, simd::mul(simd::load<P>(x + c), simd::load<P>(factor + c)));
    }
  }

  /// out[j] = <a, b_j> for N rows of b.
  template <int N>
  EIGENBLOCKS_ALWAYS_INLINE void dots(const S* a, const S* b, S* out) const {
    P sum[std::size_t(N)];
    unroll<N>([&](auto j) EIGENBLOCKS_INLINE_LAMBDA { sum[j] = simd::zero<P>(); });
    for (Index c = 0; c < l_.dp; c += kW) {
      const P x = simd::load<P>(a + c);
      unroll<N>([&](auto j) EIGENBLOCKS_INLINE_LAMBDA {
        sum[j] = simd::fma(x, simd::load<P>(b + j * l_.dp + c), sum[j]);
      });
    }
    unroll<N>([&](auto j) EIGENBLOCKS_INLINE_LAMBDA { out[j] = simd::sum(sum[j]); });
  }

  /// scores[right][left] = Q K^T for a left block of `size` and a right block of `count` tokens.
  EIGENBLOCKS_NOINLINE void pair_scores(Index left, Index size, Index right, Index count) {
    const S* const k = k_ + left * l_.dp;
    S* to = scores_ + right * l_.cp + left;
    if (size >= kW) {
      transpose_into<S, int(kW)>(size, n_.key_dim, k, l_.dp, across_, size);
      strided_product(count, size, n_.key_dim, left_factor(q_ + right * l_.dp, l_.dp), across_,
                      size, to, l_.cp, ProductStart::zero);
      return;
    }
    const S* q = q_ + right * l_.dp;
    for (Index i = 0; i < count; ++i, q += l_.dp, to += l_.cp) {
      if (size == 1) {
        dots<1>(q, k, to);
      } else if (size == 2) {
        dots<2>(q, k, to);
      } else {
        for (Index j = 0; j < size; j += 4) dots<4>(q, k + j * l_.dp, to + j);
      }
    }
  }

  /// work holds X of tokens [first, first + count): dq and dgate take their shares.
  void collect_queries(Index first, Index count) {
    for (Index c = 0; c < l_.dp; c += kW) {
      P run = simd::zero<P>();
      for (Index i = count; i-- > 0;) {
        const Index at = (first + i) * l_.dp + c;
        const P x = simd::load<P>(work_ + i * l_.dp + c);
        simd::store<P>(dq_ + at, simd::fma(simd::load<P>(p_ + at), x, simd::load<P>(dq_ + at)));
        run = simd::fma(simd::load<P>(q_ + at), x, run);
        simd::store<P>(dgate_ + at, simd::add(simd::load<P>(dgate_ + at), run));
      }
    }
  }
  /// The same for Y, dk and dgate.
  void collect_keys(Index first, Index count) {
    for (Index c = 0; c < l_.dp; c += kW) {
      P run = simd::zero<P>();
      for (Index j = 0; j < count; ++j) {
        const Index at = (first + j) * l_.dp + c;
        const P y = simd::load<P>(work_ + j * l_.dp + c);
        simd::store<P>(dk_ + at, simd::fma(simd::load<P>(r_ + at), y, simd::load<P>(dk_ + at)));
        simd::store<P>(dgate_ + at, simd::add(simd::load<P>(dgate_ + at), run));
        run = simd::fma(simd::load<P>(k_ + at), y, run);
      }
    }
  }

  /// X of tokens [first, first + count) is the product of a and b (depth rows).
  void query_gradients(Index first, Index count, Index depth, ProductFactor<S> a, const S* b) {
    if (!gated_) {
      strided_product(count, l_.dp, depth, a, b, l_.dp, dq_ + first * l_.dp, l_.dp,
                      ProductStart::keep);
    } else {
      strided_product(count, l_.dp, depth, a, b, l_.dp, work_, l_.dp, ProductStart::zero);
      collect_queries(first, count);
    }
  }
  void key_gradients(Index first, Index count, Index depth, ProductFactor<S> a, const S* b) {
    if (!gated_) {
      strided_product(count, l_.dp, depth, a, b, l_.dp, dk_ + first * l_.dp, l_.dp,
                      ProductStart::keep);
    } else {
      strided_product(count, l_.dp, depth, a, b, l_.dp, work_, l_.dp, ProductStart::zero);
      collect_keys(first, count);
    }
  }

  void start_gradients(Index i) {
    const P w = simd::set1<P>(dscores_[i * l_.cp + i]);
    for (Index at = i * l_.dp; at < (i + 1) * l_.dp; at += kW) {
      simd::store<P>(dq_ + at, simd::mul(w, simd::load<P>(k_ + at)));
      simd::store<P>(dk_ + at, simd::mul(w, simd::load<P>(q_ + at)));
    }
    if (!gated_) return;
    std::copy_n(decay_ + i * l_.dp, l_.dp, p_ + i * l_.dp);
    std::fill_n(r_ + i * l_.dp, l_.dp, S(1));
    std::fill_n(dgate_ + i * l_.dp, l_.dp, S(0));
  }

  /// Fills scores on and below the diagonal and leaves Q and K as after the last level, the decay of the chunk in the
  /// first row of decay_.
  template <bool kBackward>
  void pair_up(Index n) {
    for (Index i = 0; i < n; ++i) {
      dots<1>(q_ + i * l_.dp, k_ + i * l_.dp, scores_ + i * l_.cp + i);
      if constexpr (kBackward) start_gradients(i);
      if (gated_) multiply_rows(1, decay_ + i * l_.dp, q_ + i * l_.dp);
    }
    for (Index size = 1; size < n; size *= 2) {
      for (Index right = size; right < n; right += 2 * size) {
        const Index left = right - size, count = std::min(size, n - right);
        pair_scores(left, size, right, count);
        if constexpr (kBackward) {
          const S* const d = dscores_ + right * l_.cp + left;
          query_gradients(right, count, size, left_factor(d, l_.cp), k_ + left * l_.dp);
          key_gradients(left, size, count, transposed_factor(d, l_.cp), q_ + right * l_.dp);
        }
        if (!gated_) continue;
        S* const before = decay_ + left * l_.dp;
        const S* const after = decay_ + right * l_.dp;
        multiply_rows(count, before, q_ + right * l_.dp);
        multiply_rows(size, after, k_ + left * l_.dp);
        if constexpr (kBackward) {
          multiply_rows(count, before, p_ + right * l_.dp);
          multiply_rows(size, after, r_ + left * l_.dp);
        }
        multiply_rows(1, after, before);
      }
    }
  }

  /// state = decay of the chunk times state + K^T V, K as after the last level.
  void update_state(Index n) {
    strided_product(n_.key_dim, l_.ep, n, transposed_factor(k_, l_.dp), v_, l_.ep, state_, l_.ep,
                    gated_ ? ProductStart::scale_rows : ProductStart::keep, decay_);
  }

  /// The state alone passes over a chunk.
  void absorb(const Inputs& in, Index chunk) {
    const Index t = chunk * n_.chunk, n = std::min(n_.chunk, n_.tokens - t);
    load_keys(in, t, n);
    for (Index j = n - 1; gated_ && j > 0; --j) {  // row j becomes the decay from j to the end
      multiply_rows(1, decay_ + j * l_.dp, k_ + (j - 1) * l_.dp);
      multiply_rows(1, decay_ + j * l_.dp, decay_ + (j - 1) * l_.dp);
    }
    update_state(n);
  }

  void backward_chunk(const Inputs& in, const Gradients& g, Index t, const S* state) {
    const Index n = std::min(n_.chunk, n_.tokens - t), d = n_.key_dim, e = n_.value_dim;
    load(in, t, n);
    load_rows(n, e, g.dout, t, dout_, l_.ep);
    const bool dout_finite = tile_is_finite(dout_, n * l_.ep);

    transpose_into<S, int(kW)>(n, e, v_, l_.ep, across_, l_.cp);
    for (Index i = 0; i < n; i += kRowBlock) {
      const Index count = std::min(kRowBlock, n - i);
      strided_product(count, padded(i + count), e, left_factor(dout_ + i * l_.ep, l_.ep), across_,
                      l_.cp, dscores_ + i * l_.cp, l_.cp, ProductStart::zero);
    }
    pair_up<true>(n);

    transpose_into<S, int(kW)>(d, e, state, l_.ep, flipped_, l_.dp);
    query_gradients(0, n, e, left_factor(dout_, l_.ep), flipped_);
    transpose_into<S, int(kW)>(d, e, dstate_, l_.ep, flipped_, l_.dp);
    key_gradients(0, n, e, left_factor(v_, l_.ep), flipped_);
    if (gated_) add_passing_state(n, state);

    strided_product(n, l_.ep, d, left_factor(k_, l_.dp), dstate_, l_.ep, dv_, l_.ep,
                    ProductStart::zero);
    add_lower_transposed_product(n, l_.ep, scores_, l_.cp, dout_, l_.ep, dout_finite, dv_);
    strided_product(d, l_.ep, n, transposed_factor(q_, l_.dp), dout_, l_.ep, dstate_, l_.ep,
                    gated_ ? ProductStart::scale_rows : ProductStart::keep, decay_);

    store_rows(n, d, dq_, l_.dp, g.dq, t, in.scale, g.add_keys);
    store_rows(n, d, dk_, l_.dp, g.dk, t, S(1), g.add_keys);
    store_rows(n, e, dv_, l_.ep, g.dv, t, S(1), false);
    if (g.dgate.data != nullptr) store_gate(n, g.dgate, t);
  }

  /// What the state carries over the whole chunk decays at each of its tokens.
  void add_passing_state(Index n, const S* state) {
    for (Index c = 0; c < n_.key_dim; ++c) {
      P sum = simd::zero<P>();
      for (Index at = c * l_.ep; at < (c + 1) * l_.ep; at += kW)
        sum = simd::fma(simd::load<P>(state + at), simd::load<P>(dstate_ + at), sum);
      work_[c] = simd::sum(sum) * decay_[c];
    }
    for (Index i = 0; i < n; ++i) {
      for (Index c = 0; c < n_.key_dim; ++c) dgate_[i * l_.dp + c] += work_[c];
    }
  }

  void store_gate(Index n, HeadRows<S> to, Index t) const {
    if (n_.gate_dim == n_.key_dim) {
      return store_rows(n, n_.key_dim, dgate_, l_.dp, to, t, S(1), false);
    }
    for (Index i = 0; i < n; ++i) {
      S sum = 0;
      for (Index c = 0; c < n_.key_dim; ++c) sum += dgate_[i * l_.dp + c];
      *to.row(t + i) = sum;
    }
  }

  const LinearSizes n_;
  const Layout l_;
  const bool gated_;
  bool v_finite_ = true;
  S *q_, *k_, *decay_, *work_;  // n x d
  S *v_, *out_;                 // n x e
  S *scores_, *dscores_;        // n x n
  S *state_, *dstate_;          // d x e
  S *flipped_, *across_;        // transposes: e x d, and d or e x n
  S *p_ = nullptr, *r_ = nullptr, *dq_ = nullptr, *dk_ = nullptr, *dgate_ = nullptr;
  S *dout_ = nullptr, *dv_ = nullptr, *saved_ = nullptr;
};

/// The recurrence, token by token, in place on a state of any stride.  Blocks of columns stay in the first-level cache.
template <RealScalar S>
class LinearRecurrence {
  using P = simd::Packet<S>;
  static constexpr Index kW = simd::kLanes<S>;
  static constexpr Index kTokens = 16;  ///< whose decays are made at once

 public:
  static std::size_t bytes(const LinearSizes& n) { return padded_bytes<S>(kTokens * n.key_dim); }

  static void run(const LinearSizes& n, Arena arena, const typename LinearTiles<S>::Inputs& in,
                  HeadRows<S> out, HeadRows<S> state) {
    S* const decay = arena.take<S>(kTokens * n.key_dim);
    const Index d = n.key_dim, e = n.value_dim;
    for (Index t = 0; t < n.tokens; t += kTokens) {
      const Index end = std::min(t + kTokens, n.tokens);
      for (Index i = t; i < end && n.gate_dim > 0; ++i) {
        S* const row = decay + (i - t) * d;
        if (n.gate_dim == d) {
          simd::transform(in.gate.row(i), row, d,
                          [](const auto& x) EIGENBLOCKS_INLINE_LAMBDA { return simd::exp(x); });
        } else {
          std::fill_n(row, d, simd::exp(*in.gate.row(i)));
        }
      }
      Index c = 0;
      for (; c + 4 * kW <= e; c += 4 * kW) columns<P, 4>(n, t, end, c, decay, in, out, state);
      for (; c + kW <= e; c += kW) columns<P, 1>(n, t, end, c, decay, in, out, state);
      for (; c < e; ++c) columns<S, 1>(n, t, end, c, decay, in, out, state);
    }
  }

 private:
  template <class Q, int NV>
  static void columns(const LinearSizes& n, Index begin, Index end, Index column, const S* decay,
                      const typename LinearTiles<S>::Inputs& in, HeadRows<S> out,
                      HeadRows<S> state) {
    constexpr int w = simd::kPacketSize<Q>;
    const bool gated = n.gate_dim > 0;
    for (Index t = begin; t < end; ++t, decay += n.key_dim) {
      const S* const q = in.q.row(t);
      const S* const k = in.k.row(t);
      Q value[std::size_t(NV)], sum[std::size_t(NV)];
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        value[v] = simd::load<Q>(in.v.row(t) + column + v * w);
        sum[v] = simd::zero<Q>();
      });
      S* row = state.data + column;
      for (Index c = 0; c < n.key_dim; ++c, row += state.stride) {
        const Q keep = simd::set1<Q>(gated ? decay[c] : S(1));
        const Q key = simd::set1<Q>(k[c]), query = simd::set1<Q>(q[c]);
        unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          const Q next = simd::fma(keep, simd::load<Q>(row + v * w), simd::mul(key, value[v]));
          simd::store<Q>(row + v * w, next);
          sum[v] = simd::fma(query, next, sum[v]);
        });
      }
      unroll<NV>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<Q>(out.row(t) + column + v * w, simd::mul(sum[v], simd::set1<Q>(in.scale)));
      });
    }
  }
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
