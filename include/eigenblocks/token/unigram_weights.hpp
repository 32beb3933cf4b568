// What the sums over all segmentations of a text are made of: exp(alpha theta) of every piece, and the two passes.
//
//   const UnigramWeights weights(model, 0.5);            // theta = model.log_probs(), alpha = 0.5
//   const UnigramWeights other(model, theta, 0.5);       // any theta, one for each piece of the model: training
//   weights.reset(theta, 0.7);                           // the same tables with other numbers
//
// A segmentation y has the weight exp(alpha S(y)) = product over its pieces of w_p = exp(alpha theta_p).  The exponential is
// taken once for each piece, not once for each edge.  The sums
//
//   F[0] = 1,  F[e] = sum over pieces p = text[s, e) of F[s] w_p          (of everything before e)
//   B[n] = 1,  B[s] = sum over pieces p = text[s, e) of w_p B[e]          (of everything after s)
//
// leave the range of double after some hundred bytes, and may do so within one piece.  Each is held as a
// mantissa in [2^-128, 2^128) and an exponent of 2^256, its own for each position: numbers of neighbouring positions nearly
// always share the exponent, and then an edge costs a multiplication and an addition.
//
// Errors (invalid_argument): alpha negative or not finite; theta not finite, or not of the model's size; a product
// |alpha theta| of 1e11 or more.  data_error: a text without a segmentation.
// Source: T. Kudo, arXiv 1804.10959.
#pragma once

#include <eigenblocks/token/unigram_model.hpp>

#include <cmath>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

class UnigramWeights {
 public:
  explicit UnigramWeights(const UnigramModel& model, double alpha = 1)
      : UnigramWeights(model, model.log_probs(), alpha) {}
  UnigramWeights(const UnigramModel& model, std::span<const double> theta, double alpha)
      : model_(&model) {
    reset(theta, alpha);
  }

  /// Other numbers for the same model; nothing is changed if they are refused.
  void reset(std::span<const double> theta, double alpha) {
    detail::require(std::isfinite(alpha) && alpha >= 0, "UnigramWeights: alpha (", alpha,
                    ") must be finite and at least 0");
    detail::require(theta.size() == model_->size(), "UnigramWeights: theta has ", theta.size(),
                    " entries, expected ", model_->size(), " (one for each piece)");
    for (std::size_t p = 0; p < theta.size(); ++p) {
      detail::require(std::isfinite(theta[p]), "UnigramWeights: theta[", p, "] (", theta[p],
                      ") must be finite");
      detail::require(std::abs(alpha * theta[p]) < 1e11, "UnigramWeights: alpha theta[", p, "] (",
                      alpha * theta[p], ") must be below 1e11 in size");
    }
    alpha_ = alpha;
    theta_.assign(theta.begin(), theta.end());
    mantissa_.resize(theta.size());
    exponent_.assign(theta.size(), 0);
    deep_ = false;
    for (std::size_t p = 0; p < theta.size(); ++p) {
      const double x = alpha * theta_[p];
      const double k = std::abs(x) < kLogHalfStep ? 0 : std::nearbyint(x / (2 * kLogHalfStep));
      mantissa_[p] = std::exp(x - k * (2 * kLogHalfStep));
      exponent_[p] = static_cast<std::int32_t>(k);
      deep_ = deep_ || exponent_[p] != 0;
    }
  }

  const UnigramModel& model() const { return *model_; }
  double alpha() const { return alpha_; }
  const std::vector<double>& theta() const { return theta_; }

  /// w_p = mantissa[p] 2^(256 exponent[p]); deep() says whether any exponent is not 0.
  const double* mantissa() const { return mantissa_.data(); }
  const std::int32_t* exponent() const { return exponent_.data(); }
  bool deep() const { return deep_; }

  static constexpr double kLogHalfStep = 128 * 0.693147180559945309417;

 private:
  const UnigramModel* model_;
  double alpha_ = 1;
  bool deep_ = false;
  std::vector<double> theta_, mantissa_;
  std::vector<std::int32_t> exponent_;
};

namespace detail {

/// m 2^(256 k), m >= 0.
struct Scaled {
  double m = 0;
  std::int64_t k = 0;
};

/// x 2^(256 k); x in [2^-768, 2^768] or 0 and not larger than 1 after the scaling unless k < 0, so that what k outside
/// [-4, 3] would give is below the range of double.
EIGENBLOCKS_ALWAYS_INLINE double scale_by(double x, std::int64_t k) {
  constexpr double kPower[] = {0, 0x1p-1024, 0x1p-768, 0x1p-512, 0x1p-256,
                               1, 0x1p256,   0x1p512,  0x1p768};
  return x * kPower[std::clamp<std::int64_t>(k, -5, 3) + 5];
}

/// sum += x 2^(256 k); the mantissas may grow to the number of terms times 2^256.
EIGENBLOCKS_ALWAYS_INLINE void add_scaled(Scaled& sum, double x, std::int64_t k) {
  if (k == sum.k) [[likely]] {
    sum.m += x;
  } else if (x == 0) {
    return;
  } else if (sum.m == 0) {
    sum = {x, k};
  } else if (k > sum.k) {
    sum = {scale_by(sum.m, sum.k - k) + x, k};
  } else {
    sum.m += scale_by(x, k - sum.k);
  }
}

/// Brings the mantissa back into [2^-128, 2^128).
EIGENBLOCKS_ALWAYS_INLINE void normalise(Scaled& x) {
  while (x.m >= 0x1p128) {
    x.m *= 0x1p-256;
    ++x.k;
  }
  while (x.m < 0x1p-128 && x.m > 0) {
    x.m *= 0x1p256;
    --x.k;
  }
}

inline double log_of(const Scaled& x) {
  return std::log(x.m) + static_cast<double>(x.k) * (2 * UnigramWeights::kLogHalfStep);
}

/// a b / c of three sums, which is known to be a probability.
inline double probability(const Scaled& a, const Scaled& b, const Scaled& c) {
  return scale_by(a.m * b.m / c.m, a.k + b.k - c.k);
}

/// F; `forward` has text.size() + 1 entries.
template <bool kDeep>
void lattice_forward(const UnigramWeights& weights, std::string_view text, Scaled* forward) {
  const ByteTrie& trie = weights.model().trie();
  const double* const w = weights.mantissa();
  const std::int32_t* const exponent = weights.exponent();
  const std::size_t n = text.size(), ahead = weights.model().max_piece_length();
  for (std::size_t e = 1; e <= std::min(n, ahead); ++e) forward[e] = {};
  forward[0] = {1, 0};
  for (std::size_t s = 0; s < n; ++s) {
    Scaled start = forward[s];
    normalise(start);
    forward[s] = start;
    // The exponent that the sums ahead will most likely have.
    if (s + 1 + ahead <= n) forward[s + 1 + ahead] = {0, start.k};
    if (start.m == 0) continue;
    trie.walk(text.substr(s), [&](std::size_t length, std::uint32_t p) EIGENBLOCKS_INLINE_LAMBDA {
      add_scaled(forward[s + length], start.m * w[p], kDeep ? start.k + exponent[p] : start.k);
    });
  }
  normalise(forward[n]);
}

/// B; and with counts, for every piece, counts[p] += scale times its expected number, given F of the same text.
template <bool kDeep, bool kCounts>
void lattice_backward(const UnigramWeights& weights, std::string_view text, Scaled* backward,
                      const Scaled* forward = nullptr, double scale = 1, double* counts = nullptr) {
  const ByteTrie& trie = weights.model().trie();
  const double* const w = weights.mantissa();
  const std::int32_t* const exponent = weights.exponent();
  const std::size_t n = text.size();
  backward[n] = {1, 0};
  for (std::size_t s = n; s-- > 0;) {
    Scaled sum{0, backward[s + 1].k};
    double before = 0;
    std::int64_t k = 0;
    if constexpr (kCounts) {
      before = scale * (forward[s].m / forward[n].m);
      k = forward[s].k - forward[n].k;
    }
    trie.walk(text.substr(s), [&](std::size_t length, std::uint32_t p) EIGENBLOCKS_INLINE_LAMBDA {
      const Scaled& after = backward[s + length];
      const double x = w[p] * after.m;
      const std::int64_t kx = kDeep ? after.k + exponent[p] : after.k;
      add_scaled(sum, x, kx);
      if constexpr (kCounts) counts[p] += scale_by(before * x, k + kx);
    });
    normalise(sum);
    backward[s] = sum;
  }
}

[[noreturn]] EIGENBLOCKS_COLD inline void raise_no_segmentation(std::string_view text,
                                                                std::size_t reached) {
  raise<data_error>(no_segmentation_message(text, reached));
}

/// The last position that has a segmentation before it.
inline std::size_t last_reached(const Scaled* forward, std::size_t n) {
  while (forward[n].m == 0) --n;
  return n;
}

/// As where F is not at hand; only called to report an error.
inline std::size_t last_reached(const ByteTrie& trie, std::string_view text) {
  std::vector<bool> reached(text.size() + 1, false);
  reached[0] = true;
  std::size_t last = 0;
  for (std::size_t s = 0; s < text.size(); ++s) {
    if (!reached[s]) continue;
    last = s;
    trie.walk(text.substr(s),
              [&](std::size_t length, std::uint32_t) { reached[s + length] = true; });
  }
  return reached.back() ? text.size() : last;
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
