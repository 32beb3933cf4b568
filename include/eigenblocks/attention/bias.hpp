// Relative position biases b_h(D), D = max(i - j, 0), added to the scaled score; and any bias as a matrix.
//
//   kerple_log(r1, r2)       -r1_h log(1 + r2_h D)        r1, r2 > 0, learned, one per query head
//   kerple_power(r1, r2)     -r1_h D^r2_h                 r1 > 0, 0 < r2 <= 2; r2 = 1 is ALiBi with slopes r1
//   sandwich(heads, ...)     (sum_{c=1..dim/2} cos(D 10000^(-2c/dim)) - dim/2) heads / (8 (h+1))      never positive
//   relative_bias(score, heads, queries, keys, query_offset)     the matrix of an additive score functor
//
// All are score functors (score.hpp): attention_rule(causal(), kerple_log(r1, r2)).  ALiBi is score.hpp's.
// D is clipped: keys after the query get the bias of distance 0, so a mask decides about them, not the bias.
// Gradients of KERPLE, added by the backward (forms *_with_gradient), g = d loss / d score:
//   log    dr1 = -sum g log(1 + r2 D)      dr2 = -sum g r1 D / (1 + r2 D)
//   power  dr1 = -sum g D^r2               dr2 = -sum g r1 D^r2 log D      (D = 0 counts 0)
// Keeping learned parameters in range after a step (the official KERPLE code: at least 0.01, r2 <= 2) is the caller's.
// In lanes log(1 + r2 D) has 4 ulp (simd::log1p), and D^r2 is exp(r2 log D): relative error 2 + r2 log D rounding units.
// Lanes take D in the scalar of the kernel: exact in float up to 2^24.
//
// Errors (invalid_argument): sizes of r1, r2 and their gradients that differ; a parameter outside its range; heads < 1;
// dim odd or < 2; negative max_distance, queries or keys.  A number of parameters that is not the number of query heads is
// refused by the kernels and by relative_bias.
// Sources: arXiv 2205.09921 (KERPLE), 2212.10356 (Sandwich).
#pragma once

#include <eigenblocks/attention/rule.hpp>

#include <algorithm>
#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class KerpleKind { log, power };

/// Made by kerple_log and kerple_power.  The scalar of its parameters need not be that of the scores.
template <RealScalar S, KerpleKind Kind>
struct KerpleScore {
  static constexpr bool additive = true, relative = true;
  static constexpr const char* slopes_name = "kerple r1";
  Vector<S> slopes;  ///< r1, what multiplies the curve of each head
  Vector<S> r2;

  template <class T>
  T operator()(T s, Index i, Index j, Index h) const {
    return s - static_cast<T>(slopes[h]) * curve(distance<T>(i, j), static_cast<T>(r2[h]));
  }
  template <class P>
  P lanes(const P& s, const P& irel, Index i0, Index j, Index h) const {
    using T = simd::lane_t<P>;
    const P zero = simd::zero<P>();
    const P past = simd::add(irel, simd::set1<P>(static_cast<T>(i0 - j)));
    const P d = simd::max(past, zero), shape = simd::set1<P>(static_cast<T>(r2[h]));
    P c;
    if constexpr (Kind == KerpleKind::log) {
      c = simd::log1p(simd::mul(shape, d));
    } else {
      c = simd::exp(simd::mul(shape, simd::log(d)));  // log 0 = -inf, exp(-inf) = 0
    }
    return simd::fma(simd::set1<P>(static_cast<T>(-slopes[h])), c, s);
  }

 protected:
  template <class T>
  static T distance(Index i, Index j) {
    return static_cast<T>(std::max<Index>(i - j, 0));
  }
  template <class T>
  static T curve(T d, T shape) {
    if constexpr (Kind == KerpleKind::log) {
      return std::log1p(shape * d);
    } else {
      return std::pow(d, shape);
    }
  }
};

/// KerpleScore that also adds the gradients of r1 and r2 to vectors of the caller, one entry per head.
template <RealScalar S, KerpleKind Kind>
struct LearnedKerpleScore : KerpleScore<S, Kind> {
  S* r1_gradient = nullptr;
  S* r2_gradient = nullptr;
  template <class T>
  void accumulate(T ds_out, T, Index i, Index j, Index h) const {
    const S d = this->template distance<S>(i, j), shape = this->r2[h];
    if (!(d > 0)) return;
    const S g = static_cast<S>(ds_out), c = this->curve(d, shape), gr1 = g * this->slopes[h];
    r1_gradient[h] -= g * c;
    if constexpr (Kind == KerpleKind::log) {
      r2_gradient[h] -= gr1 / (S(1) / d + shape);
    } else {
      r2_gradient[h] -= gr1 * c * std::log(d);
    }
  }
};

namespace detail {

template <KerpleKind Kind, class Score, class S>
Score kerple(const Vector<S>& r1, const Vector<S>& r2) {
  require_size("kerple: r2", r2.size(), r1.size(), "one per entry of r1");
  for (Index h = 0; h < r1.size(); ++h) {
    require(r1[h] > 0 && std::isfinite(r1[h]), "kerple: r1[", h, "] (", r1[h],
            ") must be finite and > 0");
    require(r2[h] > 0 && std::isfinite(r2[h]), "kerple: r2[", h, "] (", r2[h],
            ") must be finite and > 0");
    if constexpr (Kind == KerpleKind::power) {
      require(r2[h] <= 2, "kerple: r2[", h, "] (", r2[h], ") must be at most 2 in the power form");
    }
  }
  Score score;
  score.slopes = r1;
  score.r2 = r2;
  return score;
}

template <KerpleKind Kind, class S>
LearnedKerpleScore<S, Kind> kerple(const Vector<S>& r1, const Vector<S>& r2, Vector<S>& r1_gradient,
                                   Vector<S>& r2_gradient) {
  auto score = kerple<Kind, LearnedKerpleScore<S, Kind>>(r1, r2);
  require_size("kerple: r1_gradient", r1_gradient.size(), r1.size(), "one per entry of r1");
  require_size("kerple: r2_gradient", r2_gradient.size(), r1.size(), "one per entry of r1");
  score.r1_gradient = r1_gradient.data();
  score.r2_gradient = r2_gradient.data();
  return score;
}

}  // namespace detail

/// s - r1_h log(1 + r2_h D); r1, r2: one entry per query head, finite and > 0.
template <RealScalar S>
KerpleScore<S, KerpleKind::log> kerple_log(const Vector<S>& r1, const Vector<S>& r2) {
  return detail::kerple<KerpleKind::log, KerpleScore<S, KerpleKind::log>>(r1, r2);
}
/// s - r1_h D^r2_h; r1, r2: one entry per query head, finite and > 0, r2 at most 2.
template <RealScalar S>
KerpleScore<S, KerpleKind::power> kerple_power(const Vector<S>& r1, const Vector<S>& r2) {
  return detail::kerple<KerpleKind::power, KerpleScore<S, KerpleKind::power>>(r1, r2);
}
/// kerple_log with learned parameters: the backward ADDS to the gradients, which have the size of r1 and must outlive the rule.
template <RealScalar S>
auto kerple_log_with_gradient(const Vector<S>& r1, const Vector<S>& r2, Vector<S>& r1_gradient,
                              Vector<S>& r2_gradient) {
  return detail::kerple<KerpleKind::log>(r1, r2, r1_gradient, r2_gradient);
}
/// kerple_power with learned parameters, likewise.
template <RealScalar S>
auto kerple_power_with_gradient(const Vector<S>& r1, const Vector<S>& r2, Vector<S>& r1_gradient,
                                Vector<S>& r2_gradient) {
  return detail::kerple<KerpleKind::power>(r1, r2, r1_gradient, r2_gradient);
}

/// sum_{c=1..dim/2} cos(distance 10000^(-2c/dim)) - dim/2, at most 0, and 0 at distance 0.
/// Errors: dim odd or < 2; distance not finite.
inline double sandwich_curve(double distance, Index dim = 128) {
  detail::require(dim >= 2 && dim % 2 == 0, "sandwich: dim (", dim,
                  ") must be even and at least 2");
  detail::require(std::isfinite(distance), "sandwich: distance (", distance, ") must be finite");
  double sum = 0;
  for (Index c = 1; c <= dim / 2; ++c) {
    const double exponent = -2.0 * static_cast<double>(c) / static_cast<double>(dim);
    sum += std::cos(distance * std::pow(10000.0, exponent)) - 1.0;
  }
  return sum;
}

/// Made by sandwich.
template <RealScalar S>
struct SandwichScore {
  static constexpr bool additive = true, relative = true;
  static constexpr const char* slopes_name = "sandwich slopes";
  Vector<S> slopes;  ///< heads / (8 (h+1))
  Vector<S> table;   ///< the curve up to max_distance; beyond, it is computed
  Index dim = 128;
  template <class T>
  T operator()(T s, Index i, Index j, Index h) const {
    const Index d = std::max<Index>(i - j, 0);
    const T curve = static_cast<T>(
        d < table.size() ? table[d] : static_cast<S>(sandwich_curve(static_cast<double>(d), dim)));
    return s + static_cast<T>(slopes[h]) * curve;
  }
};

/// s + the Sandwich bias for `heads` query heads.  Distances up to max_distance come from a table; those beyond are right, but
/// cost dim/2 cosines each.  dim, 128 in the paper, need not be the model's.
template <RealScalar S = float>
SandwichScore<S> sandwich(Index heads, Index max_distance, Index dim = 128) {
  detail::require(heads >= 1, "sandwich: heads (", heads, ") must be at least 1");
  detail::require(max_distance >= 0, "sandwich: max_distance (", max_distance,
                  ") must not be negative");
  sandwich_curve(0, dim);  // for its checks
  SandwichScore<S> score;
  score.dim = dim;
  score.slopes.resize(heads);
  for (Index h = 0; h < heads; ++h) {
    score.slopes[h] =
        static_cast<S>(static_cast<double>(heads) / (8.0 * static_cast<double>(h + 1)));
  }
  score.table.resize(max_distance + 1);
  for (Index d = 0; d <= max_distance; ++d)
    score.table[d] = static_cast<S>(sandwich_curve(static_cast<double>(d), dim));
  return score;
}

/// The bias of an additive functor as AttentionTensors::bias takes it: (heads * queries) x keys, head h in rows
/// [h queries, (h+1) queries), query row i at position i + query_offset.  For reference and plots.
template <RealScalar S, Score F>
  requires detail::AdditiveScore<F> Matrix<S> relative_bias(const F& score, Index heads,
                                                            Index queries, Index keys,
                                                            Index query_offset = 0) {
    detail::require(heads >= 1, "relative_bias: heads (", heads, ") must be at least 1");
    detail::require(queries >= 0 && keys >= 0, "relative_bias: queries (", queries, ") and keys (",
                    keys, ") must not be negative");
    detail::require_score_heads(score, heads);
    Matrix<S> bias(heads * queries, keys);
    for (Index h = 0; h < heads; ++h) {
      for (Index i = 0; i < queries; ++i) {
        for (Index j = 0; j < keys; ++j)
          bias(h * queries + i, j) = score(S(0), i + query_offset, j, h);
      }
    }
    return bias;
  }

EIGENBLOCKS_NAMESPACE_END
