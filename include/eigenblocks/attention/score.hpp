// Score functors: what happens to a scaled score s = scale * rho_i <q_i, k_j> before the soft-max.
//
//   identity()                 s
//   soft_cap(cap)              cap tanh(s / cap)                        Gemma 2 (cap 50); 0 means off
//   alibi(slopes)              s - slope_h |i - j|                      arXiv 2108.12409, flash-attention's form
//   alibi(slopes, AlibiDistance::past)   s - slope_h max(i - j, 0)      the same under a causal mask
//   compose(f, g, ...)         f first: compose(soft_cap(30.0), alibi(slopes)) caps the score, then adds the bias
//   alibi_slopes(heads)        the usual slopes, in the convention of BLOOM or MPT
//
// A score of your own needs, for a scalar S in {float, double},
//   S operator()(S s, Index i, Index j, Index h) const
//   S grad(S s, Index i, Index j, Index h) const           d out / d s at the incoming s (for the backward)
// and may add
//   static constexpr bool additive = true;                 out - s does not depend on s: grad is 1 and is never called
//   static constexpr bool relative = true;                 depends on i and j only through i - j: decoding may use lanes too
//   P lanes(P s, P irel, Index i0, Index j, Index h) const             lanes = queries i0 + irel[lane], one key j
//   P grad_lanes(P s, P irel, Index i0, Index j, Index h) const        the same for grad
//   void accumulate(S ds_out, S s, Index i, Index j, Index h) const    gradients of its own parameters, called for every visible
//                                                          pair in the backward; may write only to storage of head h
// A functor without lanes is called lane by lane: fine for arithmetic, 5x slower for a tanh (use simd::tanh in lanes).
// i and j are absolute positions, h the query head.
//
//   struct Decay {                                         // a per-distance bias, in both forms
//     static constexpr bool additive = true, relative = true;
//     template <class S> S operator()(S s, Index i, Index j, Index) const { return s - S(0.1) * S(i - j); }
//     template <class P> P lanes(P s, P irel, Index i0, Index j, Index) const {
//       return simd::fma(simd::add(irel, simd::set1<P>(i0 - j)), simd::set1<P>(-0.1f), s);
//     }
//   };
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/math.hpp>

#include <cmath>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

template <class F, class S>
concept ScoreFor = requires(const F& f, S s, Index i) {
  { f(s, i, i, i) } -> std::convertible_to<S>;
};
/// What attention_rule accepts as a score functor.
template <class F>
concept Score = ScoreFor<F, float> || ScoreFor<F, double>;

namespace detail {

template <class F>
concept AdditiveScore = requires {
  requires F::additive;
};
template <class F>
concept RelativeScore = requires {
  requires F::relative;
};
template <class F, class P>
concept HasScoreLanes = requires(const F& f, P s, Index i) {
  { f.lanes(s, s, i, i, i) } -> std::convertible_to<P>;
};
template <class F, class P>
concept HasScoreGradLanes = requires(const F& f, P s, Index i) {
  { f.grad_lanes(s, s, i, i, i) } -> std::convertible_to<P>;
};
template <class F, class S>
concept HasScoreAccumulate = requires(const F& f, S s, Index i) {
  f.accumulate(s, s, i, i, i);
};

/// d out / d s, 1 for additive functors.
template <class F, class S>
S score_grad(const F& f, S s, Index i, Index j, Index h) {
  if constexpr (AdditiveScore<F>) {
    return S(1);
  } else {
    return f.grad(s, i, j, h);
  }
}

/// f on a packet of queries i0 + irel[lane]; lifted lane by lane when f has no lane form, padding lanes asked as last_query.
template <class P, class F>
EIGENBLOCKS_ALWAYS_INLINE P score_lanes(const F& f, const P& s, const P& irel, Index i0,
                                        Index first_lane, Index last_query, Index j, Index h) {
  if constexpr (HasScoreLanes<F, P>) {
    (void)first_lane;
    (void)last_query;
    return f.lanes(s, irel, i0, j, h);
  } else {
    constexpr int w = simd::kPacketSize<P>;
    simd::lane_t<P> value[std::size_t(w)];
    simd::store<P>(value, s);
    for (int x = 0; x < w; ++x)
      value[x] = f(value[x], std::min(i0 + first_lane + x, last_query), j, h);
    return simd::load<P>(value);
  }
}
template <class P, class F>
EIGENBLOCKS_ALWAYS_INLINE P score_grad_lanes(const F& f, const P& s, const P& irel, Index i0,
                                             Index first_lane, Index last_query, Index j, Index h) {
  if constexpr (AdditiveScore<F>) {
    return simd::set1<P>(simd::lane_t<P>(1));
  } else if constexpr (HasScoreGradLanes<F, P>) {
    return f.grad_lanes(s, irel, i0, j, h);
  } else {
    constexpr int w = simd::kPacketSize<P>;
    simd::lane_t<P> value[std::size_t(w)];
    simd::store<P>(value, s);
    for (int x = 0; x < w; ++x) {
      value[x] = score_grad(f, value[x], std::min(i0 + first_lane + x, last_query), j, h);
    }
    return simd::load<P>(value);
  }
}

}  // namespace detail

struct IdentityScore {
  static constexpr bool additive = true, relative = true;
  template <class S>
  S operator()(S s, Index, Index, Index) const {
    return s;
  }
  template <class P>
  P lanes(const P& s, const P&, Index, Index, Index) const {
    return s;
  }
};
/// The score as it is.
inline IdentityScore identity() { return {}; }

struct SoftCapScore {
  static constexpr bool relative = true;
  double cap = 0;
  template <class S>
  S operator()(S s, Index, Index, Index) const {
    return cap > 0 ? S(cap) * std::tanh(s / S(cap)) : s;
  }
  template <class S>
  S grad(S s, Index, Index, Index) const {
    if (!(cap > 0)) return S(1);
    const S t = std::tanh(s / S(cap));
    return S(1) - t * t;
  }
  template <class P>
  P lanes(const P& s, const P&, Index, Index, Index) const {
    using S = simd::lane_t<P>;
    if (!(cap > 0)) return s;
    return simd::mul(simd::set1<P>(S(cap)), simd::tanh(simd::mul(s, simd::set1<P>(S(1 / cap)))));
  }
  template <class P>
  P grad_lanes(const P& s, const P&, Index, Index, Index) const {
    using S = simd::lane_t<P>;
    if (!(cap > 0)) return simd::set1<P>(S(1));
    const P t = simd::tanh(simd::mul(s, simd::set1<P>(S(1 / cap))));
    return simd::fma(simd::neg(t), t, simd::set1<P>(S(1)));
  }
};
/// cap tanh(s / cap); cap = 0 switches it off.  Error: cap negative or not finite.
inline SoftCapScore soft_cap(double cap) {
  detail::require(cap >= 0 && std::isfinite(cap), "soft_cap: cap (", cap,
                  ") must be finite and >= 0");
  SoftCapScore score;
  score.cap = cap;
  return score;
}

enum class AlibiDistance { absolute, past };

template <RealScalar S>
struct AlibiScore {
  static constexpr bool additive = true, relative = true;
  static constexpr const char* slopes_name = "alibi slopes";
  Vector<S> slopes;  // one per query head
  AlibiDistance distance = AlibiDistance::absolute;
  S* slopes_gradient = nullptr;  // set by alibi_with_gradient

  template <class T>
  T operator()(T s, Index i, Index j, Index h) const {
    return s - static_cast<T>(slopes[h]) * static_cast<T>(length(i - j));
  }
  template <class P>
  P lanes(const P& s, const P& irel, Index i0, Index j, Index h) const {
    using T = simd::lane_t<P>;
    const P past = simd::add(irel, simd::set1<P>(static_cast<T>(i0 - j)));
    const P d =
        distance == AlibiDistance::absolute ? simd::abs(past) : simd::max(past, simd::zero<P>());
    return simd::fma(simd::set1<P>(static_cast<T>(-slopes[h])), d, s);
  }

 protected:
  Index length(Index past) const {
    return distance == AlibiDistance::past ? std::max<Index>(past, 0) : past < 0 ? -past : past;
  }
};

/// AlibiScore that also adds d loss / d slope_h = -sum dS |i - j| to a vector of the caller.
template <RealScalar S>
struct LearnedAlibiScore : AlibiScore<S> {
  template <class T>
  void accumulate(T ds_out, T, Index i, Index j, Index h) const {
    this->slopes_gradient[h] -= static_cast<S>(ds_out) * static_cast<S>(this->length(i - j));
  }
};

/// s - slopes[h] |i - j|, or max(i - j, 0) in place of |i - j|.  One slope per query head (checked by the kernel).
template <class V>
AlibiScore<scalar_t<V>> alibi(const V& slopes, AlibiDistance distance = AlibiDistance::absolute) {
  AlibiScore<scalar_t<V>> score;
  score.slopes = slopes;
  score.distance = distance;
  return score;
}
/// The same with learned slopes: the backward ADDS to slopes_gradient, which must outlive the rule and have the same size.
template <RealScalar S>
LearnedAlibiScore<S> alibi_with_gradient(const Vector<S>& slopes, Vector<S>& slopes_gradient,
                                         AlibiDistance distance = AlibiDistance::absolute) {
  detail::require_size("alibi_with_gradient: slopes_gradient", slopes_gradient.size(),
                       slopes.size(), "one per slope");
  LearnedAlibiScore<S> score;
  score.slopes = slopes;
  score.distance = distance;
  score.slopes_gradient = slopes_gradient.data();
  return score;
}

enum class AlibiConvention { bloom, mpt };

/// Slopes 2^(-8 (h+1) / heads) for heads a power of two.  Otherwise, with c the power of two below and 2c the one above:
/// bloom: the c slopes of c heads, then every second slope of 2c heads; mpt: the odd-indexed then the even-indexed of 2c.
/// Error: heads < 1.
template <RealScalar S = double>
Vector<S> alibi_slopes(Index heads, AlibiConvention convention = AlibiConvention::bloom) {
  detail::require(heads >= 1, "alibi_slopes: heads (", heads, ") must be at least 1");
  Index lower = 1;
  while (lower * 2 <= heads) lower *= 2;
  const auto slope = [](Index h, Index of) {
    return static_cast<S>(std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(of)));
  };
  Vector<S> slopes(heads);
  for (Index h = 0; h < heads; ++h) {
    if (lower == heads) {
      slopes[h] = slope(h, heads);
    } else if (convention == AlibiConvention::bloom) {
      slopes[h] = h < lower ? slope(h, lower) : slope(2 * (h - lower), 2 * lower);
    } else {
      slopes[h] = h < lower ? slope(2 * h + 1, 2 * lower) : slope(2 * (h - lower), 2 * lower);
    }
  }
  return slopes;
}

/// f, then g.
template <class F, class G>
struct ComposedScore {
  static constexpr bool additive = detail::AdditiveScore<F> && detail::AdditiveScore<G>;
  static constexpr bool relative = detail::RelativeScore<F> && detail::RelativeScore<G>;
  F f;
  G g;
  template <class S>
  S operator()(S s, Index i, Index j, Index h) const {
    return g(f(s, i, j, h), i, j, h);
  }
  template <class S>
  S grad(S s, Index i, Index j, Index h) const {
    return detail::score_grad(g, f(s, i, j, h), i, j, h) * detail::score_grad(f, s, i, j, h);
  }
  template <class P>
    requires detail::HasScoreLanes<F, P> && detail::HasScoreLanes<G, P> P lanes(const P& s,
                                                                                const P& irel,
                                                                                Index i0, Index j,
                                                                                Index h)
  const { return g.lanes(f.lanes(s, irel, i0, j, h), irel, i0, j, h); }
  template <class P>
    requires(detail::HasScoreLanes<F, P> &&
             (detail::AdditiveScore<F> ||
              detail::HasScoreGradLanes<F, P>)&&(detail::AdditiveScore<G> ||
                                                 detail::HasScoreGradLanes<G, P>))
  P grad_lanes(const P& s, const P& irel, Index i0, Index j, Index h)
  const {
    const P inner = f.lanes(s, irel, i0, j, h);
    return simd::mul(detail::score_grad_lanes<P>(g, inner, irel, i0, 0, i0, j, h),
                     detail::score_grad_lanes<P>(f, s, irel, i0, 0, i0, j, h));
  }
  template <class S>
    requires(detail::HasScoreAccumulate<F, S> || detail::HasScoreAccumulate<G, S>)
  void accumulate(S ds_out, S s, Index i, Index j, Index h) const {
    const S inner = f(s, i, j, h);
    if constexpr (detail::HasScoreAccumulate<G, S>) g.accumulate(ds_out, inner, i, j, h);
    if constexpr (detail::HasScoreAccumulate<F, S>) {
      f.accumulate(ds_out * detail::score_grad(g, inner, i, j, h), s, i, j, h);
    }
  }
};

/// Applies the functors from left to right.
template <Score F, Score G>
ComposedScore<F, G> compose(F f, G g) {
  return {std::move(f), std::move(g)};
}
template <Score F, Score G, Score... Rest>
auto compose(F f, G g, Rest... rest) {
  return compose(compose(std::move(f), std::move(g)), std::move(rest)...);
}

EIGENBLOCKS_NAMESPACE_END
