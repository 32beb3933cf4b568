// The matrix A of HiPPO-LegS in O(N): products and solves without A (arXiv 2008.07669 appendix, kexue.fm 10137).
//
//   legs_multiply(v, out, lambda)               out = (I + lambda A) v
//   legs_multiply_transposed(v, out, lambda)    out = (I + lambda A^T) v
//   legs_solve(v, out, lambda)                  out = (I - lambda A)^-1 v
//   legs_solve_transposed(v, out, lambda)       out = (I - lambda A^T)^-1 v
//
//   v, out   N x H: a row is a coefficient, a column one of H channels; out may be v
//
// Each is linear and the gradient of each is its transposed form.
//
// How.  (A v)_n = n v_n - r_n sum_{k <= n} r_k v_k with r_n = sqrt(2n + 1).  A step of any generalised bilinear method,
//   z = (I - mu A)^-1 [(I + lambda A) v + f B u],
// is one sweep over n with one number T carried along for each channel:
//   T_0 = -f u      z_n = v_n - [(lambda + mu)(n + 1) v_n + r_n T_n] / e_n      e_n = 1 + mu (n + 1)
//                   T_{n+1} = [(1 - mu n) T_n + (lambda + mu) r_n v_n] / e_n
// T is lambda sum r v + mu sum r z - f u so far.  Small steps form z as v plus an increment, so that float loses nothing of it;
// large ones by (1 - lambda (n + 1)) v_n in its place (kexue.fm's z_n = (S_n - S_{n-1})/r_n cancels).  The transposed sweep is the same from n = N - 1 down.  Channels fill the SIMD lanes,
// T stays in registers, v is read and z written once: 4 flop-pairs per coefficient, no scratch but 4 N numbers.
//
// Results are bitwise the same for every executor.  Errors: invalid_argument for shapes and a lambda that is not finite;
// std::domain_error where a solve is singular, 1 + lambda (n + 1) = 0 for an n < N (lambda < 0 only).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline constexpr Index kLegsChannels =
    64;  // of a task: N x 64 of them stay in the first two caches

/// The four coefficients of the sweep, arrays over n.
template <RealScalar S>
struct LegsCoefficients {
  S *carry, *feed, *own,
      *take;  ///< T = carry T + feed v; z = own v + take T, plus v for an increment
  Index states;
  bool increment = false;

  static std::size_t bytes(Index states) { return 4 * padded_bytes<S>(states); }
  LegsCoefficients(Arena& arena, Index n)
      : carry(arena.take<S>(n)),
        feed(arena.take<S>(n)),
        own(arena.take<S>(n)),
        take(arena.take<S>(n)),
        states(n) {}

  /// For the multiplier lambda and the divisor mu; `norms` are the r_n.
  void set(const S* norms, S lambda, S mu) {
    const S largest = static_cast<S>(states);
    increment = mu >= 0 && std::abs(lambda + mu) * largest <= S(0.5) * (S(1) + mu * largest);
    using P = simd::Packet<S>;
    constexpr Index w = simd::kLanes<S>;
    Index n = 0;
    for (; n + w <= states; n += w) set_lanes<P>(n, norms, lambda, mu);
    for (; n < states; ++n) set_lanes<S>(n, norms, lambda, mu);
  }

 private:
  template <class P>
  EIGENBLOCKS_ALWAYS_INLINE void set_lanes(Index at, const S* norms, S lambda, S mu) const {
    using namespace simd;
    const P n = iota<P>(static_cast<S>(at));
    const P one = set1<P>(S(1)), divisor = set1<P>(mu), both = set1<P>(lambda + mu);
    const P r = load<P>(norms + at), next = add(n, one);
    const P inverse = div(one, fma(divisor, next, one));
    store<P>(carry + at, mul(sub(one, mul(divisor, n)), inverse));
    store<P>(feed + at, mul(mul(both, r), inverse));
    const P change = increment ? neg(mul(both, next)) : sub(one, mul(set1<P>(lambda), next));
    store<P>(own + at, mul(change, inverse));
    store<P>(take + at, neg(mul(r, inverse)));
  }
};

template <RealScalar S>
void legs_norms(S* norms, Index states) {
  for (Index n = 0; n < states; ++n)
    norms[n] = static_cast<S>(std::sqrt(2.0 * static_cast<double>(n) + 1.0));
}

/// The sweep over K packets of channels; `carry` holds T, before and after.
template <bool kReverse, bool kIncrement, class P, int K>
EIGENBLOCKS_ALWAYS_INLINE void legs_sweep_packets(const LegsCoefficients<simd::lane_t<P>>& c,
                                                  const simd::lane_t<P>* v, Index v_stride,
                                                  simd::lane_t<P>* z, Index z_stride,
                                                  simd::lane_t<P>* carry) {
  using namespace simd;
  constexpr int w = kPacketSize<P>;
  P t[std::size_t(K)];
  for (int i = 0; i < K; ++i) t[i] = load<P>(carry + i * w);
  for (Index step = 0; step < c.states; ++step) {
    const Index n = kReverse ? c.states - 1 - step : step;
    const P decay = set1<P>(c.carry[n]), feed = set1<P>(c.feed[n]), own = set1<P>(c.own[n]),
            take = set1<P>(c.take[n]);
    for (int i = 0; i < K; ++i) {
      const P x = load<P>(v + n * v_stride + i * w);
      const P kept = kIncrement ? fma(own, x, x) : mul(own, x);
      store<P>(z + n * z_stride + i * w, fma(take, t[i], kept));
      t[i] = fma(decay, t[i], mul(feed, x));
    }
  }
  for (int i = 0; i < K; ++i) store<P>(carry + i * w, t[i]);
}

/// The same over `channels` neighbours.
template <bool kReverse, bool kIncrement, RealScalar S>
EIGENBLOCKS_NOINLINE void legs_sweep_rows(const LegsCoefficients<S>& c, Index channels, const S* v,
                                          Index v_stride, S* z, Index z_stride, S* carry) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  constexpr int group = 4;  // independent chains of multiply-adds
  Index h = 0;
  for (; h + group * w <= channels; h += group * w)
    legs_sweep_packets<kReverse, kIncrement, P, group>(c, v + h, v_stride, z + h, z_stride,
                                                       carry + h);
  for (; h + w <= channels; h += w)
    legs_sweep_packets<kReverse, kIncrement, P, 1>(c, v + h, v_stride, z + h, z_stride, carry + h);
  for (; h < channels; ++h)
    legs_sweep_packets<kReverse, kIncrement, S, 1>(c, v + h, v_stride, z + h, z_stride, carry + h);
}
template <bool kReverse, RealScalar S>
void legs_sweep(const LegsCoefficients<S>& c, Index channels, const S* v, Index v_stride, S* z,
                Index z_stride, S* carry) {
  if (c.increment) {
    legs_sweep_rows<kReverse, true, S>(c, channels, v, v_stride, z, z_stride, carry);
  } else {
    legs_sweep_rows<kReverse, false, S>(c, channels, v, v_stride, z, z_stride, carry);
  }
}

/// Tasks of kLegsChannels channels each: f(first, count, worker).
template <class F>
void legs_channel_blocks(Index channels, ExecutorRef executor, F&& f) {
  executor.run((channels + kLegsChannels - 1) / kLegsChannels, [&](Index task, int worker) {
    const Index first = task * kLegsChannels;
    f(first, std::min(kLegsChannels, channels - first), worker);
  });
}

template <bool kReverse, RealScalar S>
void legs_apply(const ConstMatrixRef<S>& v, MatrixRef<S> out, double lambda, double mu,
                ExecutorRef executor) {
  require(std::isfinite(lambda + mu), "lambda (", lambda + mu, ") must be finite");
  require_shape("out", out.rows(), out.cols(), v.rows(), v.cols(), "shape of v");
  const Index states = v.rows();
  for (Index n = 0; mu < 0 && n < states; ++n) {
    const double divisor = 1 + mu * static_cast<double>(n + 1);
    if (std::abs(divisor) <= 4 * static_cast<double>(std::numeric_limits<S>::epsilon())) {
      raise<std::domain_error>("I - lambda A is singular: 1 + lambda (n + 1) = 0 at lambda ", mu,
                               ", n ", n);
    }
  }
  if (v.size() == 0) return;
  Workspace workspace;
  const std::size_t bytes = LegsCoefficients<S>::bytes(states) + padded_bytes<S>(states);
  Arena arena = workspace.shared(bytes);
  LegsCoefficients<S> c(arena, states);
  S* norms = arena.take<S>(states);
  legs_norms(norms, states);
  c.set(norms, static_cast<S>(lambda), static_cast<S>(mu));
  legs_channel_blocks(v.cols(), executor, [&](Index first, Index count, int) {
    S carry[kLegsChannels] = {};
    legs_sweep<kReverse, S>(c, count, v.data() + first, v.outerStride(), out.data() + first,
                            out.outerStride(), carry);
  });
}

}  // namespace detail

/// out = (I + lambda A) v.
template <MatrixLike V, OutputMatrix O>
  requires SameScalar<V, O> && RealScalar<scalar_t<V>>
void legs_multiply(const V& v, O&& out, double lambda, ExecutorRef executor = {}) {
  detail::legs_apply<false, scalar_t<V>>(v, out, lambda, 0, executor);
}

/// out = (I + lambda A^T) v.
template <MatrixLike V, OutputMatrix O>
  requires SameScalar<V, O> && RealScalar<scalar_t<V>>
void legs_multiply_transposed(const V& v, O&& out, double lambda, ExecutorRef executor = {}) {
  detail::legs_apply<true, scalar_t<V>>(v, out, lambda, 0, executor);
}

/// out = (I - lambda A)^-1 v.
template <MatrixLike V, OutputMatrix O>
  requires SameScalar<V, O> && RealScalar<scalar_t<V>>
void legs_solve(const V& v, O&& out, double lambda, ExecutorRef executor = {}) {
  detail::legs_apply<false, scalar_t<V>>(v, out, 0, lambda, executor);
}

/// out = (I - lambda A^T)^-1 v.
template <MatrixLike V, OutputMatrix O>
  requires SameScalar<V, O> && RealScalar<scalar_t<V>>
void legs_solve_transposed(const V& v, O&& out, double lambda, ExecutorRef executor = {}) {
  detail::legs_apply<true, scalar_t<V>>(v, out, 0, lambda, executor);
}

EIGENBLOCKS_NAMESPACE_END
