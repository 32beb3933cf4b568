// The gradients of the selective scan (ssm/selective_scan.hpp), on the tiles of the forward.
//
// States at tile starts are kept (T/64 of them, per worker) and a tile is recomputed for one n at a time, so
// that scratch is [rows][channels] again.  With lam_t = gy_t C_t + e_{t+1} lam_{t+1}, gy = dy silu(z):
//   dC_tn = sum_d gy h_t   dB_tn = sum_d lam D u   d(Du)_t = sum_n lam B   dD_t = sum_n A w + u d(Du)   dA = sum_t D w
// where w = lam e_t h_{t-1}.  dB and dC of a strip of blocks are added up in order; strips are cut by shape.
#pragma once

#include <eigenblocks/ssm/selective_scan_tiles.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <RealScalar S>
struct ScanUpstream {
  HeadRows<const S> dout, dfinal;
  HeadRows<S> du, ddelta, da, dgate, dinitial;
  S *dskip, *dbias;
};

/// The tiles of one worker, for both directions.
template <RealScalar S>
class ScanGradientTiles : public ScanTiles<S> {
  using Base = ScanTiles<S>;
  using P = simd::Packet<S>;
  using Base::blocks_, Base::on_, Base::used_, Base::n_, Base::group_, Base::exp_;
  using Base::delta_, Base::input_, Base::y_, Base::power_, Base::ratio_;
  using Base::for_each_block, Base::load, Base::load_channels, Base::load_state, Base::row;
  using Base::kVectors, Base::kW, Base::scan_all, Base::store_row, Base::store_state;
  using Base::store_sums, Base::tile_size, Base::tiles;
  using typename Base::Block;

 public:
  using Base::kChannels, Base::kRows, Base::kStrip;

  static std::size_t bytes(const ScanSizes& n) {
    const Index state = n.states * kChannels;
    return Base::bytes(n) + 5 * padded_bytes<S>(tile_size(n)) +
           kStrip * (2 * padded_bytes<S>(state) + padded_bytes<S>(tiles(n) * state));
  }

  ScanGradientTiles(const ScanSizes& sizes, Arena arena) : Base(sizes, arena, true) {
    const Index state = n_.states * kChannels;
    for (S** t : {&dy_, &decay_, &before_, &dinput_, &ddelta_}) *t = arena.take<S>(tile_size(n_));
    for (Block& b : blocks_) {
      for (S** t : {&b.carry, &b.da}) *t = arena.take<S>(state);
      b.saved = arena.take<S>(tiles(n_) * state);
    }
  }

  /// Gradients of the strip; db and dc (states x tokens) receive its share, added.
  void backward(const ScanInputs<S>& in, HeadRows<const S> initial, const ScanUpstream<S>& g, S* db,
                S* dc) {
    const Index state = n_.states * kChannels;
    for_each_block([&] { load_state(initial, on_->h); });
    for (Index t = 0; t < n_.tokens; t += kRows) {
      for_each_block([&] {
        std::copy_n(on_->h, state, on_->saved + t / kRows * state);
        if (t + kRows >= n_.tokens) return;
        load(in, t, kRows);
        scan_all(in, t, kRows);
      });
    }
    for_each_block([&] {
      load_state(g.dfinal, on_->carry);
      std::fill_n(on_->da, state, S(0));
      for (P* sum : {on_->dskip, on_->dbias}) std::fill_n(sum, kVectors, simd::zero<P>());
    });
    for (Index tile = tiles(n_); tile-- > 0;) {
      const Index t = tile * kRows, rows = std::min(kRows, n_.tokens - t);
      for_each_block([&] {
        std::copy_n(on_->saved + tile * state, state, on_->h);
        load(in, t, rows);
        load_upstream(in, g, t, rows);
        switch (exp_) {
          case ScanExp::powers:
            reverse<ScanExp::powers>(in, t, rows, db, dc);
            break;
          case ScanExp::decay:
            reverse<ScanExp::decay>(in, t, rows, db, dc);
            break;
          case ScanExp::any:
            reverse<ScanExp::any>(in, t, rows, db, dc);
            break;
        }
        store_gradients(in, g, t, rows);
      });
    }
    for_each_block([&] {
      store_state(on_->carry, g.dinitial);
      store_state(on_->da, g.da);
      store_sums(on_->dskip, g.dskip);
      store_sums(on_->dbias, g.dbias);
    });
  }

 private:
  /// dy_ = dout silu(z); dinput_ and ddelta_ = 0.
  void load_upstream(const ScanInputs<S>& in, const ScanUpstream<S>& g, Index t, Index rows) {
    S padding[2][std::size_t(kChannels)];
    for (Index i = 0; i < rows; ++i) {
      S* const to = dy_ + i * kChannels;
      const S* const dout = row(g.dout, t + i, padding[0]);
      const S* const z = in.gate.data != nullptr ? row(in.gate, t + i, padding[1]) : nullptr;
      for (int v = 0; v < kVectors; ++v) {
        const P d = simd::load<P>(dout + v * kW);
        simd::store<P>(to + v * kW,
                       z == nullptr ? d : simd::mul(d, simd::silu(simd::load<P>(z + v * kW))));
      }
    }
    std::fill_n(dinput_, rows * kChannels, S(0));
    std::fill_n(ddelta_, rows * kChannels, S(0));
  }

  template <ScanExp kExp>
  EIGENBLOCKS_NOINLINE void reverse(const ScanInputs<S>& in, Index t, Index rows, S* db, S* dc) {
    const S *const delta_at = delta_, *const input_at = input_, *const ratio_at = ratio_,
                   *const dy_at = dy_;
    S *const y_at = y_, *const power_at = power_, *const decay_at = decay_,
             *const before_at = before_, *const dinput_at = dinput_, *const ddelta_at = ddelta_;
    const Index b_stride = in.b.stride, c_stride = in.c.stride, states = n_.states,
                tokens = n_.tokens;
    S *const carry_at = on_->carry, *const da_at = on_->da;
    const S *const h_at = on_->h, *const a_at = on_->a;
    const S* const exponent = kExp == ScanExp::decay ? on_->a2 : on_->a;
    for (Index n = 0; n < states; ++n) {
      const Index at = n * kChannels;
      const S* const b = in.b.row(t) + group_ + n;
      const S* const c = in.c.row(t) + group_ + n;
      P factor[std::size_t(kVectors)], a[std::size_t(kVectors)], h[std::size_t(kVectors)],
          carry[std::size_t(kVectors)], da[std::size_t(kVectors)];
      unroll<kVectors>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        factor[v] = simd::load<P>(exponent + at + v * kW);
        a[v] = simd::load<P>(a_at + at + v * kW);
        h[v] = simd::load<P>(h_at + at + v * kW);
        carry[v] = simd::load<P>(carry_at + at + v * kW);
        da[v] = simd::load<P>(da_at + at + v * kW);
        simd::store<P>(before_at + v * kW, h[v]);
      });
      for (Index i = 0; i < rows; ++i) {
        const P times_b = simd::set1<P>(b[i * b_stride]), times_c = simd::set1<P>(c[i * c_stride]);
        unroll<kVectors>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          const Index to = i * kChannels + v * kW;
          const P delta = simd::load<P>(delta_at + to);
          P ratio = delta, power = delta;
          if constexpr (kExp == ScanExp::powers) {
            ratio = simd::load<P>(ratio_at + to);
            power = simd::load<P>(power_at + to);
          }
          const P e = Base::template decay<kExp>(delta, factor[v], ratio, power);
          if constexpr (kExp == ScanExp::powers) simd::store<P>(power_at + to, power);
          h[v] = simd::fma(e, h[v], simd::mul(times_b, simd::load<P>(input_at + to)));
          simd::store<P>(decay_at + to, e);
          simd::store<P>(before_at + to + kChannels, h[v]);
          simd::store<P>(y_at + to, simd::fma(times_c, h[v], simd::load<P>(y_at + to)));
        });
      }
      for (Index i = rows; i-- > 0;) {
        const P times_b = simd::set1<P>(b[i * b_stride]), times_c = simd::set1<P>(c[i * c_stride]);
        P sum_b = simd::zero<P>(), sum_c = simd::zero<P>();
        unroll<kVectors>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
          const Index from = i * kChannels + v * kW;
          const P dy = simd::load<P>(dy_at + from), delta = simd::load<P>(delta_at + from);
          const P lam = simd::fma(dy, times_c, carry[v]);
          sum_c = simd::fma(dy, simd::load<P>(before_at + from + kChannels), sum_c);
          sum_b = simd::fma(lam, simd::load<P>(input_at + from), sum_b);
          simd::store<P>(dinput_at + from,
                         simd::fma(lam, times_b, simd::load<P>(dinput_at + from)));
          carry[v] = simd::mul(lam, simd::load<P>(decay_at + from));
          const P w = simd::mul(carry[v], simd::load<P>(before_at + from));
          simd::store<P>(ddelta_at + from, simd::fma(a[v], w, simd::load<P>(ddelta_at + from)));
          da[v] = simd::fma(delta, w, da[v]);
        });
        simd::store<P>(decay_at + i * kChannels, sum_b);  // in the place of what was used up
        simd::store<P>(before_at + (i + 1) * kChannels, sum_c);
      }
      add_lane_sums(rows, decay_at, db + n * tokens + t);
      add_lane_sums(rows, before_at + kChannels, dc + n * tokens + t);
      unroll<kVectors>([&](auto v) EIGENBLOCKS_INLINE_LAMBDA {
        simd::store<P>(carry_at + at + v * kW, carry[v]);
        simd::store<P>(da_at + at + v * kW, da[v]);
      });
    }
  }

  /// to[i] += the sum over the lanes of the first register of row i, W rows at a time.
  static void add_lane_sums(Index rows, const S* from, S* to) {
    Index i = 0;
    if constexpr (kW > 1) {
      for (; i + kW <= rows; i += kW, from += kW * kChannels) {
        Eigen::internal::PacketBlock<PanelPacket<S, int(kW)>, int(kW)> block;
        unroll<int(kW)>([&](auto r) EIGENBLOCKS_INLINE_LAMBDA {
          block.packet[r] = simd::load<P>(from + r * kChannels);
        });
        Eigen::internal::ptranspose(block);
        P sum = simd::load<P>(to + i);
        unroll<int(kW)>([&](auto r)
                            EIGENBLOCKS_INLINE_LAMBDA { sum = simd::add(sum, block.packet[r]); });
        simd::store<P>(to + i, sum);
      }
    }
    for (; i < rows; ++i, from += kChannels) to[i] += simd::sum(simd::load<P>(from));
  }

  void store_gradients(const ScanInputs<S>& in, const ScanUpstream<S>& g, Index t, Index rows) {
    S bias[std::size_t(kChannels)], skip[std::size_t(kChannels)];
    S padding[4][std::size_t(kChannels)], du[std::size_t(kChannels)];
    load_channels(in.bias, bias);
    load_channels(in.skip, skip);
    for (Index i = 0; i < rows; ++i) {
      const S* const u = row(in.u, t + i, padding[0]);
      const S* const raw = row(in.delta, t + i, padding[1]);
      S* const ddelta = ddelta_ + i * kChannels;
      for (int v = 0; v < kVectors; ++v) {
        const Index at = i * kChannels + v * kW;
        const P dinput = simd::load<P>(dinput_ + at), dy = simd::load<P>(dy_ + at);
        const P x = simd::load<P>(u + v * kW);
        simd::store<P>(du + v * kW, simd::fma(simd::load<P>(delta_ + at), dinput,
                                              simd::mul(simd::load<P>(skip + v * kW), dy)));
        P d = simd::fma(x, dinput, simd::load<P>(ddelta_ + at));
        if (in.softplus) {
          d = simd::mul(d, scan_softplus_grad(simd::add(simd::load<P>(raw + v * kW),
                                                        simd::load<P>(bias + v * kW))));
        }
        simd::store<P>(ddelta + v * kW, d);
        on_->dbias[v] = simd::add(on_->dbias[v], d);
        on_->dskip[v] = simd::fma(dy, x, on_->dskip[v]);
      }
      store_row(du, g.du, t + i);
      store_row(ddelta, g.ddelta, t + i);
      if (g.dgate.data == nullptr) continue;
      const S* const z = row(in.gate, t + i, padding[2]);
      const S* const dout = row(g.dout, t + i, padding[3]);
      for (int v = 0; v < kVectors; ++v) {
        const P y =
            simd::mul(simd::load<P>(y_ + i * kChannels + v * kW), simd::load<P>(dout + v * kW));
        simd::store<P>(du + v * kW, simd::mul(y, simd::silu_grad(simd::load<P>(z + v * kW))));
      }
      store_row(du, g.dgate, t + i);
    }
  }

  S *dy_, *decay_, *before_, *dinput_, *ddelta_;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
