// The loops of SSD (ssm/ssd.hpp): a strip of heads that share B and C, chunk by chunk, on products of small tiles.
//
// A head's chunk of n tokens starts from the state S (N x P, the transpose of the interface's) and ends with S'.  With e_t =
// e^{a_t}, G = C B^T (made once for the strip), L_ij = e_{j+1}..e_i for j <= i:
//
//   Y = M X + p (C S),        M = L o G on and below the diagonal,    p_i = e_0..e_i
//   S' = p_last S + B^T (r X),                                        r_j = e_{j+1}..e_last
//
// Row i of L is e_i times row i - 1: one exponential for each token and head, no division, no difference of cumulative
// sums, nothing above 1 where a <= 0, so any decay is safe, e^{-inf} = 0 included.
//
// Backward, from dY and dS':  with dM = dY X^T,  W = dM o L (added up over the strip's heads),  K = W o G
//   dX = M^T dY + r (B dS')                  dS = p_last dS' + C^T (p dY)
//   dC = W B + U,  U = (p dY) S^T            dB = W^T C + V,  V = (r X) dS'^T
//   da_t = sum_{j < t <= i} K_ij + sum_{i >= t} <c_i, U_i> + sum_{j < t} <b_j, V_j> + p_last <S, dS'>
// da is a sum of what decays through t: no cancellation.
#pragma once

#include <eigenblocks/core/tile_product.hpp>
#include <eigenblocks/core/workspace.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Sizes of one call, checked.
struct SsdSizes {
  Index tokens, heads, groups, head_dim, states, chunk;
  Index group_heads() const { return heads / groups; }
  /// Heads of a strip: about 512 columns.
  Index strip_heads() const {
    return std::clamp<Index>(512 / head_dim, 1, std::min<Index>(group_heads(), 16));
  }
  Index strips() const { return (group_heads() + strip_heads() - 1) / strip_heads(); }
  Index chunks() const { return (tokens + chunk - 1) / chunk; }
};

/// Operands; x begins at the strip's first head, b and c at its group, states at its first head's rows (or null).
template <RealScalar S>
struct SsdInputs {
  HeadRows<const S> x, decay, b, c, initial;
};

template <RealScalar S>
struct SsdUpstream {
  HeadRows<const S> dout, dfinal;
  HeadRows<S> dx, ddecay, dinitial;
  S *db, *dc;  ///< the strip's shares, tokens x states
};

/// The tiles of one worker, for `heads` heads.
template <RealScalar S>
class SsdTiles {
  using P = simd::Packet<S>;
  static constexpr Index kW = simd::kLanes<S>;
  static constexpr Index kRowBlock = TileShape<S>::kGradientRows;

  static Index padded(Index n) { return (n + kW - 1) / kW * kW; }
  struct Layout {
    Index np, pp, cp;  ///< row strides of tiles with state, channel and token columns
    Index keys, values, pairs, state;
    explicit Layout(const SsdSizes& n)
        : np(padded(n.states)),
          pp(padded(n.head_dim)),
          cp(padded(n.chunk)),
          keys(std::max(n.chunk * np, n.states * cp)),
          values(std::max(n.chunk * pp, n.head_dim * cp)),
          pairs(n.chunk * cp),
          state(std::max(n.states * pp, n.head_dim * np)) {}
  };

 public:
  static std::size_t bytes(const SsdSizes& n, bool backward) {
    const Layout l(n);
    const std::size_t keys = padded_bytes<S>(l.keys), values = padded_bytes<S>(l.values);
    const std::size_t pairs = padded_bytes<S>(l.pairs), state = padded_bytes<S>(l.state);
    const Index heads = n.strip_heads();
    std::size_t sum = 3 * keys + 3 * values + 3 * pairs + 4 * padded_bytes<S>(l.cp) +
                      padded_bytes<S>(heads * l.state);
    if (backward) {
      sum += keys + 2 * values + 2 * pairs + state +
             padded_bytes<S>((1 + n.chunks()) * heads * l.state);
    }
    return sum;
  }

  SsdTiles(const SsdSizes& sizes, Index heads, Arena arena, bool backward)
      : n_(sizes), l_(sizes), heads_(heads) {
    for (S** t : {&b_, &c_, &across_}) *t = arena.take<S>(l_.keys);
    for (S** t : {&x_, &scaled_, &y_}) *t = arena.take<S>(l_.values);
    for (S** t : {&products_, &decays_, &m_}) *t = arena.take<S>(l_.pairs);
    for (S** t : {&e_, &p_, &r_, &work_}) *t = arena.take<S>(l_.cp);
    state_ = arena.take<S>(n_.strip_heads() * l_.state);
    std::fill_n(across_, l_.keys, S(0));
    if (!backward) return;
    u_ = arena.take<S>(l_.keys);
    for (S** t : {&dy_, &xt_}) *t = arena.take<S>(l_.values);
    for (S** t : {&dm_, &w_}) *t = arena.take<S>(l_.pairs);
    flipped_ = arena.take<S>(l_.state);
    dstate_ = arena.take<S>((1 + n_.chunks()) * n_.strip_heads() * l_.state);
    saved_ = dstate_ + n_.strip_heads() * l_.state;
    std::fill_n(xt_, l_.values, S(0));
    std::fill_n(flipped_, l_.state, S(0));
  }

  /// Outputs of the strip; the last states to `final` unless null.
  void forward(const SsdInputs<S>& in, HeadRows<S> out, HeadRows<S> final) {
    load_states(in.initial, state_);
    for (Index t = 0; t < n_.tokens; t += n_.chunk) {
      const Index n = std::min(n_.chunk, n_.tokens - t);
      load_group(in, t, n);
      load_rows(n, n_.states, in.c, t, 0, c_, l_.np);
      group_products(n);
      for (Index h = 0; h < heads_; ++h) {
        S* const state = state_ + h * l_.state;
        load_head(in, h, t, n);
        multiply_decays(n);
        strided_product(n, l_.pp, n_.states, left_factor(c_, l_.np), state, l_.pp, y_, l_.pp,
                        ProductStart::zero);
        scale_rows(n, y_, p_, y_);
        add_lower_product(n, l_.pp, m_, l_.cp, x_, l_.pp, x_finite_, y_);
        update_state(n, state);
        store_rows(n, n_.head_dim, y_, l_.pp, out, t, h * n_.head_dim);
      }
    }
    store_states(state_, final);
  }

  void backward(const SsdInputs<S>& in, const SsdUpstream<S>& g) {
    const Index all = heads_ * l_.state;
    load_states(in.initial, state_);
    for (Index chunk = 0; chunk < n_.chunks(); ++chunk) {
      std::copy_n(state_, all, saved_ + chunk * all);
      if (chunk + 1 == n_.chunks()) break;
      load_group(in, chunk * n_.chunk, n_.chunk);
      for (Index h = 0; h < heads_; ++h) {
        load_head(in, h, chunk * n_.chunk, n_.chunk);
        update_state(n_.chunk, state_ + h * l_.state);
      }
    }
    load_states(g.dfinal, dstate_);
    for (Index chunk = n_.chunks(); chunk-- > 0;)
      backward_chunk(in, g, chunk * n_.chunk, saved_ + chunk * all);
    store_states(dstate_, g.dinitial);
  }

 private:
  // ---- In and out of the tiles; columns beyond the operand's are 0.

  static void load_rows(Index n, Index cols, HeadRows<const S> from, Index t, Index column, S* to,
                        Index stride) {
    for (Index i = 0; i < n; ++i, to += stride) {
      std::copy_n(from.row(t + i) + column, cols, to);
      std::fill(to + cols, to + stride, S(0));
    }
  }
  static void store_rows(Index n, Index cols, const S* from, Index stride, HeadRows<S> to, Index t,
                         Index column) {
    for (Index i = 0; i < n; ++i) std::copy_n(from + i * stride, cols, to.row(t + i) + column);
  }
  void load_states(HeadRows<const S> from, S* to) const {
    std::fill_n(to, heads_ * l_.state, S(0));
    for (Index h = 0; from.data != nullptr && h < heads_; ++h) {
      transpose_into<S, int(kW)>(n_.head_dim, n_.states, from.row(h * n_.head_dim), from.stride,
                                 to + h * l_.state, l_.pp);
    }
  }
  void store_states(const S* from, HeadRows<S> to) const {
    for (Index h = 0; to.data != nullptr && h < heads_; ++h) {
      transpose_into<S, int(kW)>(n_.states, n_.head_dim, from + h * l_.state, l_.pp,
                                 to.row(h * n_.head_dim), to.stride);
    }
  }

  void load_group(const SsdInputs<S>& in, Index t, Index n) {
    load_rows(n, n_.states, in.b, t, 0, b_, l_.np);
  }
  /// The head's x and the factors e, p and r.
  void load_head(const SsdInputs<S>& in, Index h, Index t, Index n) {
    load_rows(n, n_.head_dim, in.x, t, h * n_.head_dim, x_, l_.pp);
    x_finite_ = tile_is_finite(x_, n * l_.pp);
    for (Index i = 0; i < n; ++i) e_[i] = in.decay.row(t + i)[h];
    std::fill(e_ + n, e_ + padded(n), S(0));
    for (Index i = 0; i < n; i += kW) simd::store<P>(e_ + i, simd::exp(simd::load<P>(e_ + i)));
    p_[0] = e_[0];
    for (Index i = 1; i < n; ++i) p_[i] = p_[i - 1] * e_[i];
    r_[n - 1] = S(1);
    for (Index i = n - 1; i > 0; --i) r_[i - 1] = r_[i] * e_[i];
  }

  // ---- Tiles.

  /// products_ = C B^T on and below the diagonal (and some above).
  void group_products(Index n) {
    transpose_into<S, int(kW)>(n, n_.states, b_, l_.np, across_, l_.cp);
    for (Index i = 0; i < n; i += kRowBlock) {
      const Index count = std::min(kRowBlock, n - i);
      strided_product(count, padded(i + count), n_.states, left_factor(c_ + i * l_.np, l_.np),
                      across_, l_.cp, products_ + i * l_.cp, l_.cp, ProductStart::zero);
    }
  }

  /// decays_ = L and m_ = L o products_; 0 above the diagonal as far as a block of rows reaches.
  void multiply_decays(Index n) {
    for (Index i = 0; i < n; ++i) {
      S* const now = decays_ + i * l_.cp;
      const P e = simd::set1<P>(e_[i]);
      for (Index j = 0; j < i; j += kW)
        simd::store<P>(now + j, simd::mul(simd::load<P>(now + j - l_.cp), e));
      std::fill(now + i, now + l_.cp, S(0));
      now[i] = S(1);
      multiply_lower(i, now, products_ + i * l_.cp, m_ + i * l_.cp);
    }
  }
  /// to_j = a_j b_j for j <= i, 0 beyond.
  void multiply_lower(Index i, const S* a, const S* b, S* to) const {
    for (Index j = 0; j <= i; j += kW)
      simd::store<P>(to + j, simd::mul(simd::load<P>(a + j), simd::load<P>(b + j)));
    std::fill(to + i + 1, to + l_.cp, S(0));
  }

  void scale_rows(Index n, const S* from, const S* factor, S* to) const {
    for (Index i = 0; i < n; ++i) {
      const P f = simd::set1<P>(factor[i]);
      for (Index at = i * l_.pp; at < (i + 1) * l_.pp; at += kW)
        simd::store<P>(to + at, simd::mul(simd::load<P>(from + at), f));
    }
  }

  /// state = p_last state + B^T (r X)
  void update_state(Index n, S* state) {
    scale_rows(n, x_, r_, scaled_);
    advance_state(n, b_, state);
  }
  /// state = p_last state + rows^T scaled_
  void advance_state(Index n, const S* keys, S* state) {
    const P keep = simd::set1<P>(p_[n - 1]);
    for (Index at = 0; at < n_.states * l_.pp; at += kW)
      simd::store<P>(state + at, simd::mul(simd::load<P>(state + at), keep));
    strided_product(n_.states, l_.pp, n, transposed_factor(keys, l_.np), scaled_, l_.pp, state,
                    l_.pp, ProductStart::keep);
  }

  static S dot(const S* a, const S* b, Index count) {
    P sum = simd::zero<P>();
    for (Index i = 0; i < count; i += kW)
      sum = simd::fma(simd::load<P>(a + i), simd::load<P>(b + i), sum);
    return simd::sum(sum);
  }

  // ---- Backward.

  void backward_chunk(const SsdInputs<S>& in, const SsdUpstream<S>& g, Index t, const S* states) {
    const Index n = std::min(n_.chunk, n_.tokens - t);
    load_group(in, t, n);
    load_rows(n, n_.states, in.c, t, 0, c_, l_.np);
    group_products(n);
    std::fill_n(w_, n * l_.cp, S(0));
    HeadRows<S> dc{g.dc + t * n_.states, n_.states}, db{g.db + t * n_.states, n_.states};
    for (Index i = 0; i < n; ++i) {
      std::fill_n(dc.row(i), n_.states, S(0));
      std::fill_n(db.row(i), n_.states, S(0));
    }
    for (Index h = 0; h < heads_; ++h) {
      const S* const state = states + h * l_.state;
      S* const dstate = dstate_ + h * l_.state;
      load_head(in, h, t, n);
      multiply_decays(n);
      load_rows(n, n_.head_dim, g.dout, t, h * n_.head_dim, dy_, l_.pp);
      const bool dy_finite = tile_is_finite(dy_, n * l_.pp);
      std::fill_n(work_, l_.cp, S(0));
      pair_gradients(n);

      // dX, while scaled_ = r X serves V too
      strided_product(n, l_.pp, n_.states, left_factor(b_, l_.np), dstate, l_.pp, y_, l_.pp,
                      ProductStart::zero);
      scale_rows(n, y_, r_, y_);
      add_lower_transposed_product(n, l_.pp, m_, l_.cp, dy_, l_.pp, dy_finite, y_);
      store_rows(n, n_.head_dim, y_, l_.pp, g.dx, t, h * n_.head_dim);

      const S passing = p_[n - 1] * dot(state, dstate, n_.states * l_.pp);
      scale_rows(n, x_, r_, scaled_);
      S run = 0;  // of the tokens before
      key_share(n, dstate, db);
      for (Index i = 0; i < n; ++i) {
        work_[i] += run + passing;
        run += dot(b_ + i * l_.np, u_ + i * l_.np, l_.np);
      }
      scale_rows(n, dy_, p_, scaled_);
      key_share(n, state, dc);
      run = 0;  // of this token and those after
      for (Index i = n; i-- > 0;) {
        run += dot(c_ + i * l_.np, u_ + i * l_.np, l_.np);
        g.ddecay.row(t + i)[h] = work_[i] + run;
      }
      advance_state(n, c_, dstate);
    }
    const bool finite = tile_is_finite(b_, n * l_.np) && tile_is_finite(c_, n * l_.np);
    std::fill_n(u_, n * l_.np, S(0));
    add_lower_product(n, l_.np, w_, l_.cp, b_, l_.np, finite, u_);
    add_share(n, dc);
    std::fill_n(u_, n * l_.np, S(0));
    add_lower_transposed_product(n, l_.np, w_, l_.cp, c_, l_.np, finite, u_);
    add_share(n, db);
  }

  /// W, and what pairs of the chunk give to the decay of each token (to work_).
  void pair_gradients(Index n) {
    transpose_into<S, int(kW)>(n, n_.head_dim, x_, l_.pp, xt_, l_.cp);
    for (Index i = 0; i < n; i += kRowBlock) {
      const Index count = std::min(kRowBlock, n - i);
      strided_product(count, padded(i + count), n_.head_dim, left_factor(dy_ + i * l_.pp, l_.pp),
                      xt_, l_.cp, dm_ + i * l_.cp, l_.cp, ProductStart::zero);
    }
    S* const below = y_;  // [cp]: sum_{i >= t} K_ij
    std::fill_n(below, l_.cp, S(0));
    for (Index t = n; t-- > 0;) {
      S* const row = dm_ + t * l_.cp;
      S* const w = w_ + t * l_.cp;
      multiply_lower(t, row, decays_ + t * l_.cp, row);
      for (Index j = 0; j <= t; j += kW)
        simd::store<P>(w + j, simd::add(simd::load<P>(w + j), simd::load<P>(row + j)));
      multiply_lower(t, row, products_ + t * l_.cp, row);
      P sum = simd::zero<P>();
      Index j = 0;
      for (; j + kW <= t; j += kW) {
        const P all = simd::add(simd::load<P>(below + j), simd::load<P>(row + j));
        simd::store<P>(below + j, all);
        sum = simd::add(sum, all);
      }
      S rest = simd::sum(sum);
      for (; j < t; ++j) rest += below[j] += row[j];
      work_[t] += rest;
    }
  }

  /// u_ = scaled_ state^T, also added to `to`.
  void key_share(Index n, const S* state, HeadRows<S> to) {
    transpose_into<S, int(kW)>(n_.states, n_.head_dim, state, l_.pp, flipped_, l_.np);
    strided_product(n, l_.np, n_.head_dim, left_factor(scaled_, l_.pp), flipped_, l_.np, u_, l_.np,
                    ProductStart::zero);
    add_share(n, to);
  }
  void add_share(Index n, HeadRows<S> to) const {
    for (Index i = 0; i < n; ++i) {
      for (Index k = 0; k < n_.states; ++k) to.row(i)[k] += u_[i * l_.np + k];
    }
  }

  const SsdSizes n_;
  const Layout l_;
  const Index heads_;
  bool x_finite_ = true;
  S *b_, *c_, *across_;              // n x N; N x n
  S *x_, *scaled_, *y_;              // n x P
  S *products_, *decays_, *m_;       // n x n: G, L, M
  S *e_, *p_, *r_, *work_;           // n
  S* state_;                         // heads x N x P
  S *dy_ = nullptr, *xt_ = nullptr;  // n x P, P x n
  S *dm_ = nullptr, *w_ = nullptr;   // n x n
  S *u_ = nullptr, *flipped_ = nullptr, *dstate_ = nullptr, *saved_ = nullptr;
};

/// The recurrence, token by token, in place on a head's P x N state.
template <RealScalar S>
void ssd_recurrence(const SsdSizes& n, const SsdInputs<S>& in, HeadRows<S> out, HeadRows<S> state) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  for (Index t = 0; t < n.tokens; ++t) {
    const S keep = simd::exp(*in.decay.row(t));
    const S* const b = in.b.row(t);
    const S* const c = in.c.row(t);
    for (Index p = 0; p < n.head_dim; ++p) {
      S* const row = state.row(p);
      const S x = in.x.row(t)[p];
      P sum[2] = {simd::zero<P>(), simd::zero<P>()};
      Index k = 0;
      const auto step = [&](P& total) EIGENBLOCKS_INLINE_LAMBDA {
        const P next = simd::fma(simd::set1<P>(keep), simd::load<P>(row + k),
                                 simd::mul(simd::set1<P>(x), simd::load<P>(b + k)));
        simd::store<P>(row + k, next);
        total = simd::fma(next, simd::load<P>(c + k), total);
        k += w;
      };
      while (k + 2 * w <= n.states) {
        step(sum[0]);
        step(sum[1]);
      }
      if (k + w <= n.states) step(sum[0]);
      S y = simd::sum(simd::add(sum[0], sum[1]));
      for (; k < n.states; ++k) {
        row[k] = keep * row[k] + x * b[k];
        y += row[k] * c[k];
      }
      out.row(t)[p] = y;
    }
  }
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
