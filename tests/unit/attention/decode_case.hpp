// Feeding a problem through a cache piece by piece, for the decode tests.
#pragma once

#include "support/attention_case.hpp"

#include <eigenblocks/attention/decode.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <vector>

namespace attention_test {

inline eb::KvCacheOptions cache_options(const Problem& p, eb::KvCacheOptions options = {}) {
  options.kv_heads = p.kv_heads();
  options.head_dim = p.options.dim;
  options.value_dim = p.options.value_dim;
  return options;
}

/// All rows of p through attention_step, `chunk(t)` of them at a time from row t on.  Unwritten rows stay NaN.
template <class T, class Rule>
Matrix<T> step_through(const Problem& p, eb::KvCache<T>& cache, const Rule& rule,
                       const std::function<Index(Index)>& chunk, eb::ExecutorRef executor = {}) {
  using S = eb::compute_t<T>;
  const Matrix<T> q = p.q.template cast<T>(), k = p.k.template cast<T>(),
                  v = p.v.template cast<T>();
  const Vector<S> sinks = p.sinks.template cast<S>();
  Matrix<T> out =
      Matrix<T>::Constant(p.dout.rows(), p.dout.cols(), std::numeric_limits<T>::quiet_NaN());
  for (Index t = 0; t < q.rows();) {
    const Index n = std::min(chunk(t), q.rows() - t);
    const Vector<S> row_scale = p.row_scale.segment(t, n).template cast<S>();
    const eb::AttentionTensors<S> tensors{.row_scale = p.options.row_scale ? &row_scale : nullptr,
                                          .sinks = p.options.sinks ? &sinks : nullptr};
    eb::attention_step(cache, q.middleRows(t, n), k.middleRows(t, n), v.middleRows(t, n),
                       out.middleRows(t, n), p.shape, rule, tensors, executor);
    t += n;
  }
  return out;
}

struct Chunking {
  const char* name;
  std::function<Index(Index)> chunk;
};
/// Steps of one, small and large chunks around the switch at 16 rows, a prompt and then single tokens, everything at once.
inline std::vector<Chunking> chunkings(Index total) {
  std::vector<Chunking> all{
      {"half, then one by one", [total](Index t) { return t == 0 ? (total + 1) / 2 : 1; }},
      {"changing", [](Index t) { return t % 23 + 1; }},
      {"all", [total](Index) { return total; }}};
  for (const Index n : {1, 2, 7, 16, 17, 64}) all.push_back({"constant", [n](Index) { return n; }});
  return all;
}

/// The oracle's rows for a self-attention whose keys are visible under `rule`, with a ring's window if there is one.
inline Outcome<double> cache_oracle(const Problem& p, const AnyRule& rule, Index window = -1) {
  return oracle(
      p, {window >= 0 ? AnyMask(rule.mask & eb::window_left(window)) : rule.mask, rule.score});
}

/// Every chunking of p through a fresh cache gives the rows of the oracle.
template <class T, class Rule>
void check_decode(const Problem& p, const Rule& rule, const AnyRule& erased,
                  const eb::KvCacheOptions& options = {}) {
  const Outcome<double> want = cache_oracle(p, erased, options.window);
  const Bounds bounds(p, want,
                      static_cast<double>(std::numeric_limits<eb::compute_t<T>>::epsilon()));
  for (const Chunking& c : chunkings(p.q.rows())) {
    CAPTURE(c.name);
    eb::KvCache<T> cache(cache_options(p, options));
    const double error = difference(step_through<T>(p, cache, rule, c.chunk), want.out);
    CHECK(error <= bounds.out);
    CHECK(cache.size() == p.q.rows());
  }
}

}  // namespace attention_test
