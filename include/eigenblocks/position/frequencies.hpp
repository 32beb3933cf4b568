// Rotary frequencies, positions, and the cosines and sines they give.
//
// A rotary embedding turns pair p of a head by the angle n f_p at position n.  Here are n and f:
//
//   RotaryFrequencies   f_p ("inv_freq") of the R/2 pairs, the factor on cos and sin, and one for the
//                       soft-max scale
//   rope_frequencies    f_p = base^(-2p/R), the plain ladder (RoFormer, arXiv 2104.09864)
//   RopePositions       n of each row: a run first, first + 1, ..., or a list, real or integer
//   rope_cos_sin        a cos(n f_p) and a sin(n f_p) as T x R/2 tables
//
// position/rope.hpp applies them, position/frequency_scaling.hpp stretches them to longer contexts.
// Frequencies of a checkpoint are taken as they are:
//
//   const RotaryFrequencies ours = rope_frequencies(128, 500000.0);
//   const RotaryFrequencies theirs{.inv_freq = checkpoint.inv_freq.cast<double>()};
//
// Angles are formed in double whatever the scalar of the activations: a float product n f is off by
// 0.06 rad at n = 1e6 and worthless at 1e7.  The rounding error of n f is recovered by a fused
// multiply-add and taken out of cos and sin, so both are right to about 2e-16 for the given f_p, as
// long as |n f_p| < 1e10.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <type_traits>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Angles per position of the R/2 pairs, and two factors of the methods that stretch a context.
/// attention_factor (YaRN, LongRoPE) is on every cos and sin.  Queries and keys both carry it: the
/// rotated part of a logit is multiplied by its square, and the rotation applies it.
/// softmax_factor (DeepSeek's mscale_all_dim) belongs to the whole logit, rotated or not.  Nothing
/// here applies it: multiply the scale of the attention by it, 1/sqrt(head size) by default.
struct RotaryFrequencies {
  Vector<double> inv_freq;
  double attention_factor = 1.0;
  double softmax_factor = 1.0;

  Index pairs() const { return inv_freq.size(); }
  Index rotary_dim() const { return 2 * inv_freq.size(); }
};

/// f_p = base^(-2p/R), p = 0 .. R/2 - 1.  R counts the *rotated* channels (partial rotary: fewer
/// than the head size).  Source: arXiv 2104.09864 section 3.2.2.
/// Errors: rotary_dim odd or below 2; base not positive and finite.
inline RotaryFrequencies rope_frequencies(Index rotary_dim, double base = 10000.0) {
  detail::require(rotary_dim >= 2 && rotary_dim % 2 == 0, "rotary_dim (", rotary_dim,
                  ") must be even and at least 2");
  detail::require(base > 0 && std::isfinite(base), "base (", base, ") must be positive and finite");
  RotaryFrequencies frequencies{.inv_freq = Vector<double>(rotary_dim / 2)};
  for (Index p = 0; p < rotary_dim / 2; ++p) {
    frequencies.inv_freq[p] =
        std::pow(base, -static_cast<double>(2 * p) / static_cast<double>(rotary_dim));
  }
  return frequencies;
}

namespace detail {

template <class List>
using list_entry_t = std::remove_cvref_t<decltype(*std::declval<const List&>().data())>;

template <class List>
concept PositionList = (std::same_as<list_entry_t<List>, double> ||
                        std::same_as<list_entry_t<List>, Index>)&&requires(const List& list) {
  list.size();
};

}  // namespace detail

/// The position of each row, without owning or copying anything.  Made implicitly from
///
///   an integer n   rows 0, 1, 2, ... stand at n, n + 1, n + 2, ..., any number of them
///   a list         anything with data() and size() of double or Index: std::vector, std::span,
///                  an Eigen vector, a column of a matrix
///
/// Positions may be negative, and those of a list fractional (position interpolation, RoPE-Tie).
/// The list must outlive the object; as a function argument a temporary is fine.
class RopePositions {
 public:
  template <std::integral Int>
  RopePositions(Int first) : first_(static_cast<Index>(first)) {}  // NOLINT: implicit by design

  template <class List>
    requires(detail::PositionList<List>)
  RopePositions(const List& list)  // NOLINT: implicit by design
      : size_(static_cast<Index>(list.size())) {
    if constexpr (std::same_as<detail::list_entry_t<List>, double>) {
      reals_ = list.data();
    } else {
      integers_ = list.data();
    }
    if constexpr (detail::EigenDense<List>) {
      static_assert(List::IsVectorAtCompileTime,
                    "positions are a vector: take a column or a row of the matrix");
      stride_ = list.innerStride();
    }
  }

  bool is_run() const { return size_ < 0; }
  /// Number of listed positions; -1 for a run.
  Index size() const { return size_; }

  /// True when row i stands at an integer that `n` can hold; then n is set.
  bool integer(Index i, Index& n) const {
    if (reals_ != nullptr) {
      const double position = reals_[i * stride_];
      // From 2^53 on neighbouring integers are not told apart, and the cast would soon overflow.
      if (!(std::abs(position) < 0x1p53) || std::trunc(position) != position) return false;
      n = static_cast<Index>(position);
      return true;
    }
    n = integers_ != nullptr ? integers_[i * stride_] : first_ + i;
    return true;
  }
  double real(Index i) const {
    if (reals_ != nullptr) return reals_[i * stride_];
    return static_cast<double>(integers_ != nullptr ? integers_[i * stride_] : first_ + i);
  }

 private:
  Index first_ = 0;
  Index size_ = -1;
  const double* reals_ = nullptr;
  const Index* integers_ = nullptr;
  Index stride_ = 1;
};

namespace detail {

/// factor * (cos, sin) of position * frequency; see the top of the file for the accuracy.
inline std::pair<double, double> rotary_cos_sin(double position, double frequency, double factor) {
  const double angle = position * frequency;
  const double rest = std::fma(position, frequency, -angle);  // angle + rest is the exact product
  const double shrink = 1.0 - 0.5 * rest * rest;              // cos(rest); sin(rest) is rest
  const double c = std::cos(angle), s = std::sin(angle);
  return {factor * (c * shrink - s * rest), factor * (s * shrink + c * rest)};
}

/// Frequencies may come from anywhere: at least one pair, all finite.
inline void require_frequencies(const RotaryFrequencies& frequencies) {
  require(frequencies.pairs() >= 1, "inv_freq has ", frequencies.pairs(),
          " entries, expected at least 1 (half of the rotated channels)");
  for (Index p = 0; p < frequencies.pairs(); ++p) {
    require(std::isfinite(frequencies.inv_freq[p]), "inv_freq[", p, "] (", frequencies.inv_freq[p],
            ") must be finite");
  }
  require(frequencies.attention_factor > 0 && std::isfinite(frequencies.attention_factor),
          "attention_factor (", frequencies.attention_factor, ") must be positive and finite");
}

inline void require_positions(const RopePositions& positions, Index rows, const char* meaning) {
  if (!positions.is_run()) require_size("positions", positions.size(), rows, meaning);
}

}  // namespace detail

/// cos(i, p) = a cos(n_i f_p), sin(i, p) = a sin(n_i f_p), a = attention_factor; both T x R/2, one
/// value per pair (transformers repeats each for the two channels of its pair).  Formed in double,
/// rounded once.
/// Errors: the shape of cos or sin; a list of positions whose size is not T; bad frequencies.
template <OutputMatrix C, OutputMatrix S>
  requires SameScalar<C, S> && RealScalar<scalar_t<C>>
void rope_cos_sin(const RopePositions& positions, const RotaryFrequencies& frequencies, C&& cos,
                  S&& sin) {
  using Scalar = scalar_t<C>;
  detail::require_frequencies(frequencies);
  detail::require_shape("cos", cos.rows(), cos.cols(), cos.rows(), frequencies.pairs(),
                        "cols = rotary_dim / 2");
  detail::require_shape("sin", sin.rows(), sin.cols(), cos.rows(), frequencies.pairs(),
                        "rows of cos x rotary_dim / 2");
  detail::require_positions(positions, cos.rows(), "one for each row of cos");
  for (Index i = 0; i < cos.rows(); ++i) {
    for (Index p = 0; p < frequencies.pairs(); ++p) {
      const auto [c, s] = detail::rotary_cos_sin(positions.real(i), frequencies.inv_freq[p],
                                                 frequencies.attention_factor);
      cos(i, p) = static_cast<Scalar>(c);
      sin(i, p) = static_cast<Scalar>(s);
    }
  }
}

EIGENBLOCKS_NAMESPACE_END
