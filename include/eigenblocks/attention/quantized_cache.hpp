// A key/value cache of 8-bit codes: a quarter of the memory of floats, and of the memory traffic that decoding waits for.
//
//   QuantizedKvCache cache({.kv_heads = 8, .head_dim = 128});          // options of KvCache: ring, sinks and fixed too
//   attention_step(cache, q, k, v, out, shape, rule);                  // decode.hpp; q of any scalar, computed in float or double
//   attention_over_cache(cache, q, out, shape, rule);
//   Matrix<float> rows = cache.keys(0, cache.size());                  // de-quantised
//
// Symmetric, per token and key/value head, for keys and values apart:
//
//   s = max |x| / 127,   code = x / s rounded half to even, in [-127, 127],   x' = s code
//
// Rounding: |x - x'| <= s/2 for every entry (up to a rounding of x); a zero row has s = 0 and comes back as zeros.  The smallest
// s but 0 is 2^-126, because below it s would lose digits.  A row with a NaN or an infinity comes back as NaN, so it shows where
// it is attended to.
// Soft-max attention: with e_ij = scale sum_c |q_ic| s_kj / 2 the score of key j errs by at most e_ij, and the output by
//
//   |out - exact| <= max_j s_vj / 2 + (exp(2 max_j e_ij) - 1) max_j |v_j|        over the visible j, in each channel
//
// the first term from the values, the second because no probability changes by a factor outside exp(+-2 max e).
//
// bytes_per_token = kv_heads (head_dim + value_dim + 8): d + 4 instead of 4 d per row.  Nothing is de-quantised in memory when
// few rows ask: score_ij = s_kj <q_i, code_j> and out_i = sum_j (p_ij s_vj) code_j, codes widened in registers.
//
// An appended row is quantised once, on its own: any chunking stores the same bits, and truncate() loses nothing.
// Source: absmax quantisation by rows, as in LLM.int8() (arXiv 2208.07339).
#pragma once

#include <eigenblocks/attention/cache.hpp>
#include <eigenblocks/attention/decode.hpp>

#include <cmath>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Scale of a row; put(i, code) is called for every i in order.
template <StorageScalar T, class Put>
float quantize_row(const T* x, Index count, const Put& put) {
  using S = compute_t<T>;
  S top = 0;
  bool finite = true;
  for (Index i = 0; i < count; ++i) {
    const S size = std::abs(static_cast<S>(x[i]));
    finite = finite && size <= static_cast<S>(std::numeric_limits<float>::max());
    top = std::max(top, size);
  }
  if (!finite || top == 0) {
    for (Index i = 0; i < count; ++i) put(i, std::int8_t{0});
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(static_cast<float>(top / 127), std::numeric_limits<float>::min());
  for (Index i = 0; i < count; ++i)
    put(i, static_cast<std::int8_t>(std::nearbyint(static_cast<S>(x[i]) / static_cast<S>(scale))));
  return scale;
}

}  // namespace detail

class QuantizedKvCache : public detail::PanelStore<std::int8_t> {
 public:
  /// Queries of every scalar are served.
  template <StorageScalar U>
  static constexpr bool serves = true;

  QuantizedKvCache() : QuantizedKvCache(KvCacheOptions{}) {}
  /// Errors: those of KvCache.
  explicit QuantizedKvCache(const KvCacheOptions& options)
      : PanelStore("QuantizedKvCache", options) {}

  Index bytes_per_token() const {
    const KvCacheOptions& o = options();
    return o.kv_heads * (o.head_dim + o.value_dim + 2 * static_cast<Index>(sizeof(float)));
  }

  /// Quantises and appends key and value rows of any scalars.  Errors: invalid_argument for shapes; std::length_error when a
  /// fixed cache is full; nothing is written then.
  template <MatrixLike K, MatrixLike V>
  void append(const K& key, const V& value) {
    require_rows(key.rows(), key.cols(), value.rows(), value.cols());
    require_room(key.rows());
    const Index d = options().head_dim, e = options().value_dim;
    append_rows(key.rows(), [&](Index r, Index at) {
      for (Index h = 0; h < options().kv_heads; ++h) {
        std::int8_t* const k = key_to_fill(h, at);
        key_scale_to_fill(h, at) =
            detail::quantize_row(key.data() + r * key.outerStride() + h * d, d,
                                 [k](Index c, std::int8_t code) { k[c * kPanel] = code; });
        std::int8_t* const v = value_to_fill(h, at);
        value_scale_to_fill(h, at) =
            detail::quantize_row(value.data() + r * value.outerStride() + h * e, e,
                                 [v](Index c, std::int8_t code) { v[c] = code; });
      }
    });
  }

  /// De-quantised rows of positions [begin, end), token-major.  std::out_of_range unless they are stored, as in KvCache.
  Matrix<float> keys(Index begin, Index end) const {
    return rows(begin, end, options().head_dim, [this](Index h, Index at, Index c) {
      return key_scales(h)[at] * static_cast<float>(key(h, at)[c * kPanel]);
    });
  }
  Matrix<float> values(Index begin, Index end) const {
    return rows(begin, end, options().value_dim, [this](Index h, Index at, Index c) {
      return value_scales(h)[at] * static_cast<float>(value_row(h, at)[c]);
    });
  }
  /// The scales s of positions [begin, end): token-major, tokens x kv_heads.
  Matrix<float> key_scale_rows(Index begin, Index end) const {
    return rows(begin, end, 1, [this](Index h, Index at, Index) { return key_scales(h)[at]; });
  }
  Matrix<float> value_scale_rows(Index begin, Index end) const {
    return rows(begin, end, 1, [this](Index h, Index at, Index) { return value_scales(h)[at]; });
  }

  /// Same options, positions, codes and scales.
  friend bool operator==(const QuantizedKvCache& a, const QuantizedKvCache& b) {
    return a.same_positions(b, [&](Index begin, Index end) {
      return begin == end || (a.keys(begin, end) == b.keys(begin, end) &&
                              a.values(begin, end) == b.values(begin, end) &&
                              a.key_scale_rows(begin, end) == b.key_scale_rows(begin, end) &&
                              a.value_scale_rows(begin, end) == b.value_scale_rows(begin, end));
    });
  }

 private:
  template <class Entry>
  Matrix<float> rows(Index begin, Index end, Index cols, const Entry& entry) const {
    require_range(begin, end);
    Matrix<float> out(end - begin, options().kv_heads * cols);
    for (Index p = begin; p < end; ++p) {
      for (Index h = 0; h < options().kv_heads; ++h) {
        for (Index c = 0; c < cols; ++c) out(p - begin, h * cols + c) = entry(h, slot(p), c);
      }
    }
    return out;
  }
};

EIGENBLOCKS_NAMESPACE_END
