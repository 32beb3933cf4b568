// The loops of the selective scan (ssm/selective_scan.hpp): a strip of channels, tile by tile of 64 tokens.
//
// Lanes are channels.  A block is two registers of neighbours that share B and C, so that B_tn and C_tn are broadcasts,
// nothing is summed across lanes in the forward, and a block's row is one cache line of u, delta, z and the output.  A strip
// is a few blocks: rows of wide operands lie in pages of their own, and a strip's blocks share the page walks.  For each tile
// and block, and a few states n at a time, the recurrence runs over the tile with h_n in registers:
//
//   load      D_t = softplus(delta_t + bias), D_t u_t, y_t = skip u_t             [rows][channels], first-level cache
//   scan      h = e^{D_t A_n} h + B_tn D_t u_t;  y_t += C_tn h                    for each n
//   store     y_t silu(z_t)
//
// The exponentials are the cost: one for each t, channel and n.  Three ways to them, chosen by the values:
//   powers    A_dn = (n+1) A_d0 exactly: one e^{D A_d0} for each t and channel, then a product for each n
//   decay     D >= 0 and A <= 0: exp2 of D (A log2 e), which needs no upper bound
//   any       exp
//
// A few tokens (steps) take exp with the states in the lanes instead: nothing is transposed.
#pragma once

#include <eigenblocks/core/math.hpp>
#include <eigenblocks/core/tile_product.hpp>
#include <eigenblocks/core/workspace.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Sizes of one call, checked.
struct ScanSizes {
  Index tokens, channels, states, groups;
  Index group_channels() const { return channels / groups; }
};

/// log(1 + e^x), x itself above 20 (PyTorch's threshold).
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P scan_softplus(const P& x) {
  return simd::select(simd::less(simd::set1<P>(simd::lane_t<P>(20)), x), x, simd::softplus(x));
}
template <class P>
EIGENBLOCKS_ALWAYS_INLINE P scan_softplus_grad(const P& x) {
  return simd::select(simd::less(simd::set1<P>(simd::lane_t<P>(20)), x),
                      simd::set1<P>(simd::lane_t<P>(1)), simd::sigmoid(x));
}

enum class ScanExp { powers, decay, any };

/// Operands; optional ones are null.
template <RealScalar S>
struct ScanInputs {
  HeadRows<const S> u, delta, a, b, c, gate;
  const S* skip;
  const S* bias;
  bool softplus, powers;
};

/// The tiles of one worker, and the forward; the backward's take theirs behind them (selective_scan_backward.hpp).
template <RealScalar S>
class ScanTiles {
 protected:
  using P = simd::Packet<S>;
  static constexpr Index kW = simd::kLanes<S>;
  static constexpr int kVectors = 2;

 public:
  static constexpr Index kChannels = kVectors * kW;  ///< of a block
  static constexpr Index kRows = 64;                 ///< tokens of a tile

  static constexpr Index kFew = 4;    ///< tokens that go without tiles
  static constexpr Index kStrip = 4;  ///< blocks of a strip at most

  static std::size_t bytes(const ScanSizes& n) {
    return 5 * padded_bytes<S>(tile_size(n)) + kStrip * 3 * padded_bytes<S>(n.states * kChannels);
  }

  ScanTiles(const ScanSizes& sizes, Arena arena) : ScanTiles(sizes, arena, false) {}

  /// Chooses channels [first, first + count), all of one group, a strip's at most.
  void strip(const ScanInputs<S>& in, Index first, Index count) {
    group_ = first / n_.group_channels() * n_.states;
    used_ = (count + kChannels - 1) / kChannels;
    for_each_block([&] {
      on_->first = first;
      on_->count = std::min(kChannels, count);
      first += kChannels;
      count -= kChannels;
      if (n_.tokens <= kFew && !backward_) return;
      load_state(in.a, on_->a);
      on_->nonpositive = true;
      for (Index i = 0; i < n_.states * kChannels; ++i) {
        on_->nonpositive = on_->nonpositive && on_->a[i] <= S(0);
        on_->a2[i] = on_->a[i] * S(1.44269504088896340736);
      }
    });
  }

  /// Outputs of the strip from the state `initial` (null: 0); the last state to `final` unless null.
  void forward(const ScanInputs<S>& in, HeadRows<S> out, HeadRows<const S> initial,
               HeadRows<S> final) {
    if (n_.tokens <= kFew) return forward_few(in, out, initial, final);
    for_each_block([&] { load_state(initial, on_->h); });
    for (Index t = 0; t < n_.tokens; t += kRows) {
      const Index rows = std::min(kRows, n_.tokens - t);
      for_each_block([&] {
        load(in, t, rows);
        scan_all(in, t, rows);
        for (Index i = 0; i < rows; ++i) store_output(in, t + i, y_ + i * kChannels, out);
      });
    }
    for_each_block([&] { store_state(on_->h, final); });
  }

 protected:
  struct Block {
    Index first = 0, count = 0;                   ///< channels
    bool nonpositive = false;                     ///< A
    S *a = nullptr, *a2 = nullptr, *h = nullptr;  // [states][channels]; a2 = a log2 e
    S *carry = nullptr, *da = nullptr, *saved = nullptr;
    P dskip[std::size_t(kVectors)], dbias[std::size_t(kVectors)];
  };
  ScanTiles(const ScanSizes& sizes, Arena& arena, bool backward) : n_(sizes), backward_(backward) {
    const Index tile = tile_size(n_), state = n_.states * kChannels;
    for (S** t : {&delta_, &input_, &y_, &power_, &ratio_}) *t = arena.take<S>(tile);
    for (Block& b : blocks_) {
      for (S** t : {&b.a, &b.a2, &b.h}) *t = arena.take<S>(state);
    }
  }
  template <class F>
  void for_each_block(F&& f) {
    for (Index i = 0; i < used_; ++i) {
      on_ = blocks_ + i;
      f();
    }
  }

  static Index tiles(const ScanSizes& n) { return (n.tokens + kRows - 1) / kRows; }

  /// One row more than there are tokens: for `before_`, and to keep the tiles' rows out of each other's cache sets.
  static Index tile_size(const ScanSizes& n) { return (std::min(kRows, n.tokens) + 1) * kChannels; }

  // ---- In and out.  Lanes beyond the block's channels are 0.

  /// The block's part of a row; `padding` holds it where the block is not whole.
  const S* row(HeadRows<const S> from, Index t, S* padding) const {
    const S* const at = from.row(t) + on_->first;
    if (on_->count == kChannels) return at;
    std::copy_n(at, on_->count, padding);
    std::fill_n(padding + on_->count, kChannels - on_->count, S(0));
    return padding;
  }
  void store_row(const S* from, HeadRows<S> to, Index t) const {
    std::copy_n(from, on_->count, to.row(t) + on_->first);
  }
  /// channels x states to [states][channels].
  void load_state(HeadRows<const S> from, S* to) const {
    if (from.data == nullptr || on_->count < kChannels)
      std::fill_n(to, n_.states * kChannels, S(0));
    if (from.data == nullptr) return;
    transpose_into<S, int(kW)>(on_->count, n_.states, from.row(on_->first), from.stride, to,
                               kChannels);
  }
  void store_state(const S* from, HeadRows<S> to) const {
    if (to.data == nullptr) return;
    transpose_into<S, int(kW)>(n_.states, on_->count, from, kChannels, to.row(on_->first),
                               to.stride);
  }
  void store_sums(const P* sums, S* to) const {
    if (to == nullptr) return;
    S lanes[std::size_t(kChannels)];
    for (int v = 0; v < kVectors; ++v) simd::store<P>(lanes + v * kW, sums[v]);
    std::copy_n(lanes, on_->count, to + on_->first);
  }
  void load_channels(const S* from, S (&to)[std::size_t(kChannels)]) const {
    std::fill_n(to, kChannels, S(0));
    if (from != nullptr) std::copy_n(from + on_->first, on_->count, to);
  }

  EIGENBLOCKS_NOINLINE void load(const ScanInputs<S>& in, Index t, Index rows) {
    S bias[std::size_t(kChannels)], skip[std::size_t(kChannels)];
    S padding[3][std::size_t(kChannels)];
    load_channels(in.bias, bias);
    load_channels(in.skip, skip);
    const bool last = on_ + 1 == blocks_ + used_;  // what comes next: this tile's next block, or
    const Index next = last ? t + kRows : t;       // the next tile's first
    const Index column = last ? blocks_->first : on_->first + kChannels;
    P least = simd::zero<P>();
    for (Index i = 0; i < rows; ++i) {
      const S* const u = row(in.u, t + i, padding[0]);
      const S* const delta = row(in.delta, t + i, padding[1]);
      if (next + i < n_.tokens) {  // rows lie far apart: the hardware does not foresee them
        simd::prefetch(in.u.row(next + i) + column);
        simd::prefetch(in.delta.row(next + i) + column);
        if (in.gate.data != nullptr) simd::prefetch(in.gate.row(next + i) + column);
      }
      for (int v = 0; v < kVectors; ++v) {
        const Index at = i * kChannels + v * kW;
        P d = simd::add(simd::load<P>(delta + v * kW), simd::load<P>(bias + v * kW));
        if (in.softplus) d = scan_softplus(d);
        least = simd::min(least, d);
        const P x = simd::load<P>(u + v * kW);
        simd::store<P>(delta_ + at, d);
        simd::store<P>(input_ + at, simd::mul(d, x));
        simd::store<P>(y_ + at, simd::mul(x, simd::load<P>(skip + v * kW)));
        if (!in.powers) continue;
        simd::store<P>(ratio_ + at, simd::exp(simd::mul(d, simd::load<P>(on_->a + v * kW))));
        simd::store<P>(power_ + at, simd::set1<P>(S(1)));
      }
    }
    const bool decays = on_->nonpositive && simd::sum(least) == S(0);
    exp_ = in.powers ? ScanExp::powers : decays ? ScanExp::decay : ScanExp::any;
  }

  void store_output(const ScanInputs<S>& in, Index t, S* y, HeadRows<S> out) const {
    if (in.gate.data != nullptr) {
      S padding[std::size_t(kChannels)];
      const S* const z = row(in.gate, t, padding);
      for (int v = 0; v < kVectors; ++v) {
        simd::store<P>(y + v * kW,
                       simd::mul(simd::load<P>(y + v * kW), simd::silu(simd::load<P>(z + v * kW))));
      }
    }
    store_row(y, out, t);
  }

  // ---- Forward.

  /// e^{D_t A_n}; for powers the last power times the ratio.
  template <ScanExp kExp>
  EIGENBLOCKS_ALWAYS_INLINE static P decay(const P& delta, const P& a, const P& ratio, P& power) {
    if constexpr (kExp == ScanExp::powers) {
      power = simd::mul(power, ratio);
      return power;
    } else if constexpr (kExp == ScanExp::decay) {
      return simd::exp2(simd::mul(delta, a));
    } else {
      return simd::exp(simd::mul(delta, a));
    }
  }

  /// NB neighbouring states over the tile.
  template <ScanExp kExp, int NB>
  EIGENBLOCKS_NOINLINE void scan(Index rows, const S* a, S* state, HeadRows<const S> b,
                                 HeadRows<const S> c) {
    // (local copies: a packet may alias anything, so members would be read again after each store)
    const S *const delta_at = delta_, *const input_at = input_, *const ratio_at = ratio_;
    S *const y_at = y_, *const power_at = power_;
    constexpr std::size_t nb = std::size_t(NB), nv = std::size_t(kVectors);
    P h[nb][nv], factor[nb][nv];
    unroll<NB>([&](auto n) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<kVectors>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        h[n][v] = simd::load<P>(state + n * kChannels + v * kW);
        factor[n][v] = simd::load<P>(a + n * kChannels + v * kW);
      });
    });
    const S* from_b = b.data;
    const S* from_c = c.data;
    for (Index i = 0; i < rows * kChannels; i += kChannels) {
      unroll<kVectors>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        const Index at = i + v * kW;
        const P delta = simd::load<P>(delta_at + at), x = simd::load<P>(input_at + at);
        P y = simd::load<P>(y_at + at), ratio = delta, power = delta;
        if constexpr (kExp == ScanExp::powers) {
          ratio = simd::load<P>(ratio_at + at);
          power = simd::load<P>(power_at + at);
        }
        unroll<NB>([&](auto n) EIGENBLOCKS_INLINE_LAMBDA {
          const P e = decay<kExp>(delta, factor[n][v], ratio, power);
          h[n][v] = simd::fma(e, h[n][v], simd::mul(simd::set1<P>(from_b[n]), x));
          y = simd::fma(simd::set1<P>(from_c[n]), h[n][v], y);
        });
        simd::store<P>(y_at + at, y);
        if constexpr (kExp == ScanExp::powers) simd::store<P>(power_at + at, power);
      });
      from_b += b.stride;
      from_c += c.stride;
    }
    unroll<NB>([&](auto n) EIGENBLOCKS_INLINE_LAMBDA {
      unroll<kVectors>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<P>(state + n * kChannels + v * kW, h[n][v]);
      });
    });
  }

  template <ScanExp kExp>
  void scan_states(const ScanInputs<S>& in, Index t, Index rows) {
    constexpr int most = kExp == ScanExp::powers ? kPowerStates : kExpStates;
    const S* const a = kExp == ScanExp::decay ? on_->a2 : on_->a;
    const auto at = [&](HeadRows<const S> m, Index n) {
      return HeadRows<const S>{m.row(t) + group_ + n, m.stride};
    };
    Index n = 0;
    for (; n + most <= n_.states; n += most)
      scan<kExp, most>(rows, a + n * kChannels, on_->h + n * kChannels, at(in.b, n), at(in.c, n));
    for (; n < n_.states; ++n)
      scan<kExp, 1>(rows, a + n * kChannels, on_->h + n * kChannels, at(in.b, n), at(in.c, n));
  }
  void scan_all(const ScanInputs<S>& in, Index t, Index rows) {
    switch (exp_) {
      case ScanExp::powers:
        return scan_states<ScanExp::powers>(in, t, rows);
      case ScanExp::decay:
        return scan_states<ScanExp::decay>(in, t, rows);
      case ScanExp::any:
        return scan_states<ScanExp::any>(in, t, rows);
    }
  }

  /// Lanes are states: A and h are read as they lie, with nothing to transpose, for one sum across the lanes a token.
  EIGENBLOCKS_NOINLINE void forward_few(const ScanInputs<S>& in, HeadRows<S> out,
                                        HeadRows<const S> initial, HeadRows<S> final) {
    for_each_block([&] {
      load(in, 0, n_.tokens);
      for (Index d = 0; d < on_->count; ++d) {
        S* const h = on_->h;
        if (initial.data != nullptr) {
          std::copy_n(initial.row(on_->first + d), n_.states, h);
        } else {
          std::fill_n(h, n_.states, S(0));
        }
        for (Index t = 0; t < n_.tokens; ++t) scan_token(in, t, d, h);
        if (final.data != nullptr) std::copy_n(h, n_.states, final.row(on_->first + d));
      }
      for (Index t = 0; t < n_.tokens; ++t) store_output(in, t, y_ + t * kChannels, out);
    });
  }
  EIGENBLOCKS_ALWAYS_INLINE void scan_token(const ScanInputs<S>& in, Index t, Index d, S* h) {
    const S delta = delta_[t * kChannels + d], x = input_[t * kChannels + d];
    const S* const a = in.a.row(on_->first + d);
    const S* const b = in.b.row(t) + group_;
    const S* const c = in.c.row(t) + group_;
    const auto step = [&]<class Q>(Index n, Q& y) EIGENBLOCKS_INLINE_LAMBDA {
      const Q e = simd::exp(simd::mul(simd::set1<Q>(delta), simd::load<Q>(a + n)));
      const Q next =
          simd::fma(e, simd::load<Q>(h + n), simd::mul(simd::load<Q>(b + n), simd::set1<Q>(x)));
      simd::store<Q>(h + n, next);
      y = simd::fma(simd::load<Q>(c + n), next, y);
    };
    P sum = simd::zero<P>();
    Index n = 0;
    for (; n + kW <= n_.states; n += kW) step(n, sum);
    S y = y_[t * kChannels + d] + simd::sum(sum);
    for (; n < n_.states; ++n) step(n, y);
    y_[t * kChannels + d] = y;
  }

  // Measured with AVX2: more states at once save loads until the registers are full.
  static constexpr int kPowerStates = 4, kExpStates = 4;

  const ScanSizes n_;
  const bool backward_;
  Index used_ = 0, group_ = 0;  ///< blocks of the strip; where its group's columns of B and C begin
  ScanExp exp_ = ScanExp::any;
  S *delta_, *input_, *y_, *power_, *ratio_;  // rows x channels
  Block blocks_[std::size_t(kStrip)];
  Block* on_ = blocks_;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
