// Choosing the next token from logits: temperature, top-k, top-p, min-p, and a draw.
//
//   z = logits / temperature,  p = softmax(z);  then, each time renormalised over the survivors,
//   top_k   drop logits strictly below the k-th largest: ties with it stay.                      0 = off
//   top_p   keep the largest tokens while the mass before them is below top_p; the first always stays.   1 = off
//           Among equal logits the higher id counts as the larger one (a stable ascending sort, as in transformers).
//   min_p   drop p_i < min_p max_j p_j.                                                          0 = off
//
//   sampling_probs(logits, probs, options, workspace)        the final distribution, dropped tokens exactly 0
//   sample_index(probs, u)                                   first i with p_0 + ... + p_i > u sum(p), 0 <= u < 1
//   sample_token(logits, u, options, workspace)              the two together
//   argmax(logits)                                           greedy decoding: the first of the largest
//
// logits of -inf are masked: probability 0.  Sums over tokens that decide are in double.  With a workspace that has
// seen the vocabulary size nothing is allocated.  Cost: a few vectorised passes; only candidates for the nucleus are
// sorted.  A draw has no gradient.
//
// Errors: invalid_argument for options out of range (temperature must be positive: greedy decoding is argmax), sizes,
// u, and an empty vocabulary to draw from; std::domain_error for logits that hold NaN or +inf or only -inf, and for
// probabilities without a positive finite sum.
// Sources: arXiv 1904.09751 (top-p), 2407.01082 (min-p), transformers' logits processors.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/softmax.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct SamplingOptions {
  double temperature = 1;
  Index top_k = 0;
  double top_p = 1;
  double min_p = 0;
};

/// Scratch, reused from token to token.
template <RealScalar S>
struct SamplingWorkspace {
  Vector<S> probs;
  std::vector<S> values;
  std::vector<Index> order;
};

namespace detail {

inline void require_sampling(const SamplingOptions& options) {
  require(options.temperature > 0 && std::isfinite(options.temperature), "temperature (",
          options.temperature, ") must be positive and finite (greedy decoding: argmax)");
  require(options.top_k >= 0, "top_k (", options.top_k, ") must not be negative");
  require(options.top_p >= 0 && options.top_p <= 1, "top_p (", options.top_p,
          ") must be in [0, 1]");
  require(options.min_p >= 0 && options.min_p <= 1, "min_p (", options.min_p,
          ") must be in [0, 1]");
}

/// The largest logit; domain_error unless it is finite and nothing is NaN.
template <class S>
S largest_logit(const S* logits, Index n) {
  using P = simd::Packet<S>;
  const P none = simd::zero<P>(), one = simd::set1<P>(S(1));
  const P infinity = simd::set1<P>(std::numeric_limits<S>::infinity());
  const S bad = sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    return simd::select(simd::less(io.load(logits + j), infinity), none, one);
  });
  if (bad != 0) {
    Index at = 0;
    while (logits[at] < std::numeric_limits<S>::infinity()) ++at;
    raise<std::domain_error>("logits[", at, "] is ", logits[at]);
  }
  const S largest = row_max(logits, n);
  if (largest == kMinusInfinity<S>) raise<std::domain_error>("every logit is -inf");
  return largest;
}

/// The k-th largest of n numbers, 1 <= k < n.
template <class S>
S kth_largest(const S* x, Index n, Index k, std::vector<S>& values) {
  if (k <= 256) {  // a heap of k turns most numbers away with one comparison
    values.resize(static_cast<std::size_t>(k));
    std::partial_sort_copy(x, x + n, values.begin(), values.end(), std::greater<>{});
    return values.back();
  }
  values.assign(x, x + n);
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<>{});
  return values[static_cast<std::size_t>(k - 1)];
}

/// In double, with four sums to hide the latency of the additions.
template <class S>
double exact_sum(const S* p, Index n) {
  double sum[4] = {};
  Index j = 0;
  for (; j + 4 <= n; j += 4) {
    for (Index k = 0; k < 4; ++k) sum[k] += static_cast<double>(p[j + k]);
  }
  for (; j < n; ++j) sum[0] += static_cast<double>(p[j]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/// Sets to 0 what lies outside the nucleus; p is not normalised and its largest entry is 1.
template <class S>
void keep_nucleus(const S* logits, S* p, Index n, double top_p, std::vector<Index>& order) {
  using P = simd::Packet<S>;
  const double target = top_p * exact_sum(p, n);
  // Lower the bar until the tokens above it hold the nucleus; only those are sorted.
  S bar = S(1);
  double above = 0;
  while (above < target && bar > 0) {
    bar /= 16;
    const P level = simd::set1<P>(bar);
    above = static_cast<double>(sum_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
      const P value = io.load(p + j);
      return simd::select(simd::less(value, level), simd::zero<P>(), value);
    }));
  }
  order.clear();
  for (Index j = 0; j < n; ++j) {
    if (p[j] >= bar && p[j] > 0) order.push_back(j);
  }
  const auto smaller = [logits](Index a, Index b) {
    return logits[a] < logits[b] || (logits[a] == logits[b] && a < b);
  };
  std::make_heap(order.begin(), order.end(), smaller);
  auto end = order.end();
  double mass = 0;
  do {
    std::pop_heap(order.begin(), end, smaller);
    mass += static_cast<double>(p[*--end]);
  } while (mass < target && end != order.begin());
  // [end, order.end()) is the nucleus: mark it in p by its sign, then clear the rest.
  for (auto it = end; it != order.end(); ++it) p[*it] = -p[*it];
  for (Index j = 0; j < n; ++j) p[j] = p[j] < 0 ? -p[j] : S(0);
}

template <class S>
void sampling_probs(const S* logits, S* p, Index n, const SamplingOptions& options,
                    SamplingWorkspace<S>& workspace) {
  using P = simd::Packet<S>;
  const S largest = largest_logit(logits, n);
  const S lowest = options.top_k > 0 && options.top_k < n
                       ? kth_largest(logits, n, options.top_k, workspace.values)
                       : kMinusInfinity<S>;
  const P shift = simd::set1<P>(largest), floor = simd::set1<P>(lowest);
  const P inverse = simd::set1<P>(static_cast<S>(
      std::min(1 / options.temperature, static_cast<double>(std::numeric_limits<S>::max()))));
  for_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    const P z = io.load(logits + j, kMinusInfinity<S>);
    const P e = exp_by_exp2(simd::mul(simd::sub(z, shift), inverse));
    io.store(p + j, simd::select(simd::less(z, floor), simd::zero<P>(), e));
  });
  if (options.top_p < 1) keep_nucleus(logits, p, n, options.top_p, workspace.order);
  if (options.min_p > 0) {
    const S least = static_cast<S>(options.min_p);
    for (Index j = 0; j < n; ++j) p[j] = p[j] < least ? S(0) : p[j];
  }
  const P scale = simd::set1<P>(static_cast<S>(1 / exact_sum(p, n)));
  for_packets<S>(n, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
    io.store(p + j, simd::mul(io.load(p + j), scale));
  });
}

template <class V>
concept RealVector = RealExpression<V> && bool(V::IsVectorAtCompileTime);

}  // namespace detail

/// probs = the distribution that options make of the logits; both have V entries.
template <detail::RealVector L>
void sampling_probs(const L& logits, VectorRef<typename L::Scalar> probs,
                    const SamplingOptions& options,
                    SamplingWorkspace<typename L::Scalar>& workspace) {
  using S = typename L::Scalar;
  detail::require_sampling(options);
  detail::require_size("probs", probs.size(), logits.size(), "size of logits");
  if (logits.size() == 0) return;
  const ConstVectorRef<S> from(logits);
  detail::sampling_probs(from.data(), probs.data(), from.size(), options, workspace);
}

/// The same by value.
template <detail::RealVector L>
Vector<typename L::Scalar> sampling_probs(const L& logits, const SamplingOptions& options = {}) {
  Vector<typename L::Scalar> probs(logits.size());
  SamplingWorkspace<typename L::Scalar> workspace;
  sampling_probs(logits, probs, options, workspace);
  return probs;
}

/// The first i with p_0 + ... + p_i > u (p_0 + ... + p_{V-1}); p need not sum to 1.
template <detail::RealVector V>
Index sample_index(const V& probs, double u) {
  using S = typename V::Scalar;
  detail::require(u >= 0 && u < 1, "u (", u, ") must be in [0, 1)");
  detail::require(probs.size() > 0, "probs is empty");
  const ConstVectorRef<S> p(probs);
  // Sums of blocks first, then the entries of the block in which the bound is passed.
  constexpr Index block = 512;
  const auto block_sum = [&](Index first) {
    return detail::exact_sum(p.data() + first, std::min(block, p.size() - first));
  };
  double total = 0;
  for (Index first = 0; first < p.size(); first += block) total += block_sum(first);
  if (!(total > 0) || !std::isfinite(total)) {
    detail::raise<std::domain_error>("probs sum to ", total);
  }
  const double bound = u * total;
  double mass = 0;
  Index first = 0;
  for (; first + block < p.size(); first += block) {
    const double next = mass + block_sum(first);
    if (next > bound) break;
    mass = next;
  }
  for (Index i = first; i < p.size(); ++i) {
    mass += static_cast<double>(p[i]);
    if (mass > bound && p[i] > 0) return i;
  }
  Index last = p.size() - 1;  // rounding only: u all but 1
  while (!(p[last] > 0)) --last;
  return last;
}

/// Draws a token: sample_index of sampling_probs.
template <detail::RealVector L>
Index sample_token(const L& logits, double u, const SamplingOptions& options,
                   SamplingWorkspace<typename L::Scalar>& workspace) {
  detail::require(logits.size() > 0, "logits is empty");
  workspace.probs.resize(logits.size());
  sampling_probs(logits, workspace.probs, options, workspace);
  return sample_index(workspace.probs, u);
}

/// The first index of the largest logit.
template <detail::RealVector L>
Index argmax(const L& logits) {
  using S = typename L::Scalar;
  detail::require(logits.size() > 0, "logits is empty");
  const ConstVectorRef<S> from(logits);
  Index best = 0;
  for (Index i = 0; i < from.size(); ++i) {
    if (std::isnan(from[i])) detail::raise<std::domain_error>("logits[", i, "] is NaN");
    if (from[i] > from[best]) best = i;
  }
  return best;
}

EIGENBLOCKS_NAMESPACE_END
