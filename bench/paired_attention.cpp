// Attention and rotary positions.
#include "paired.hpp"

#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/core/softmax.hpp>
#include <eigenblocks/position/rope.hpp>

namespace paired {
namespace {

struct Attention {
  Index batch, heads, kv_heads, queries, keys, dim, window;
  bool causal;
  std::uint64_t seed;

  explicit Attention(Parameters p)
      : batch(p["B"]),
        heads(p["H"]),
        kv_heads(p["HK"] ? p["HK"] : p["H"]),
        queries(p["T"]),
        keys(p["TK"] ? p["TK"] : p["T"]),
        dim(p["d"]),
        window(p["window"]),
        causal(p["causal"] != 0),
        seed(static_cast<std::uint64_t>(p["seed"])) {}
  eb::AttentionShape shape() const {
    return {.heads = heads,
            .kv_heads = kv_heads,
            .query_offset = window > 0 ? keys - queries : 0,
            .scale = {}};
  }
  template <class T>
  eb::Matrix<T> query_like(std::uint64_t stream) const {
    return random_matrix<T>(batch * queries, heads * dim, seed * 8 + stream);
  }
  template <class T>
  eb::Matrix<T> key_like(std::uint64_t stream) const {
    return random_matrix<T>(batch * keys, kv_heads * dim, seed * 8 + stream);
  }
  /// f(rule): each kind of mask is a kernel of its own.
  template <class F>
  Case with_rule(F&& f) const {
    if (window > 0) return f(eb::attention_rule(eb::causal() & eb::window_left(window)));
    if (causal) return f(eb::attention_rule(eb::causal()));
    return f(eb::attention_rule());
  }
};

template <class T, class Rule>
Case forward_case(const Attention& a, const Rule& rule, eb::ExecutorRef executor) {
  return [=, q = a.query_like<T>(1), k = a.key_like<T>(2), v = a.key_like<T>(3),
          out = a.query_like<T>(4)]() mutable {
    for (Index b = 0; b < a.batch; ++b) {
      eb::attention_forward(q.middleRows(b * a.queries, a.queries),
                            k.middleRows(b * a.keys, a.keys), v.middleRows(b * a.keys, a.keys),
                            out.middleRows(b * a.queries, a.queries), a.shape(), rule, {},
                            executor);
    }
    bench::touch(out.data());
  };
}

template <class T, class Rule>
Case forward_backward_case(const Attention& a, const Rule& rule, eb::ExecutorRef executor) {
  return [=, q = a.query_like<T>(1), k = a.key_like<T>(2), v = a.key_like<T>(3),
          out = a.query_like<T>(4), dout = a.query_like<T>(5), dq = a.query_like<T>(4),
          dk = a.key_like<T>(4), dv = a.key_like<T>(4)]() mutable {
    for (Index b = 0; b < a.batch; ++b) {
      const auto rows = [&](auto& m) { return m.middleRows(b * a.queries, a.queries); };
      const auto key_rows = [&](auto& m) { return m.middleRows(b * a.keys, a.keys); };
      auto o = rows(out);
      const auto saved = eb::attention_forward(rows(q), key_rows(k), key_rows(v), o, a.shape(),
                                               rule, {}, executor);
      eb::attention_backward(saved, rows(q), key_rows(k), key_rows(v), o, rows(dout), rows(dq),
                             key_rows(dk), key_rows(dv), a.shape(), rule, {}, nullptr, executor);
    }
    bench::touch(dq.data());
  };
}

template <class T, class Rule>
Case decode_case(const Attention& a, const Rule& rule, eb::ExecutorRef executor) {
  auto caches = std::make_shared<std::vector<eb::KvCache<T>>>();
  const eb::Matrix<T> k = a.key_like<T>(2), v = a.key_like<T>(3);
  for (Index b = 0; b < a.batch; ++b) {
    caches->emplace_back(
        eb::KvCacheOptions{.kv_heads = a.kv_heads, .head_dim = a.dim, .capacity = a.keys});
    caches->back().append(k.middleRows(b * a.keys, a.keys), v.middleRows(b * a.keys, a.keys));
  }
  return [=, q = a.query_like<T>(1), out = a.query_like<T>(4)]() mutable {
    for (Index b = 0; b < a.batch; ++b) {
      eb::attention_over_cache(
          (*caches)[static_cast<std::size_t>(b)], q.middleRows(b * a.queries, a.queries),
          out.middleRows(b * a.queries, a.queries),
          {.heads = a.heads, .kv_heads = a.kv_heads, .scale = {}}, rule, {}, nullptr, executor);
    }
    bench::touch(out.data());
  };
}

template <class T>
Case sdpa(const Parameters& p, eb::ExecutorRef executor) {
  const Attention a(p);
  const bool decode = a.queries <= 16 && a.keys >= 512;
  return a.with_rule([&](const auto& rule) {
    return decode ? decode_case<T>(a, rule, executor) : forward_case<T>(a, rule, executor);
  });
}

/// What one writes without this library: two Eigen products and a soft-max per head, through a T x TK matrix.
template <class S>
Case sdpa_eigen(const Parameters& p, eb::ExecutorRef) {
  const Attention a(p);
  if (a.window > 0) fail("sdpa_eigen has no window");
  return [=, q = a.query_like<S>(1), k = a.key_like<S>(2), v = a.key_like<S>(3),
          out = a.query_like<S>(4),
          scores = eb::Matrix<S>(eb::Matrix<S>::Zero(a.queries, a.keys))]() mutable {
    const S scale = S(1) / std::sqrt(static_cast<S>(a.dim));
    for (Index b = 0; b < a.batch; ++b) {
      const auto head = [&](auto& m, Index rows, Index h) {
        return m.block(b * rows, h * a.dim, rows, a.dim);
      };
      for (Index h = 0; h < a.heads; ++h) {
        const Index kv = h / (a.heads / a.kv_heads);
        scores.noalias() = head(q, a.queries, h) * head(k, a.keys, kv).transpose() * scale;
        for (Index i = 0; a.causal && i < a.queries; ++i) {
          scores.row(i)
              .tail(std::max<Index>(0, a.keys - 1 - i))
              .setConstant(-std::numeric_limits<S>::infinity());
        }
        eb::softmax_forward(scores, scores);
        head(out, a.queries, h).noalias() = scores * head(v, a.keys, kv);
      }
    }
    bench::touch(out.data());
  };
}

template <class T>
Case sdpa_fb(const Parameters& p, eb::ExecutorRef executor) {
  const Attention a(p);
  return a.with_rule([&](const auto& rule) { return forward_backward_case<T>(a, rule, executor); });
}

template <class T>
Case rope(const Parameters& p, eb::ExecutorRef executor) {
  using S = eb::compute_t<T>;
  const Attention a(p);
  const auto table =
      std::make_shared<eb::RotaryTable<S>>(eb::rope_frequencies(a.dim), eb::RopeLayout::half);
  eb::Matrix<T> one_head = a.query_like<T>(2).leftCols(a.dim);
  return [=, q = a.query_like<T>(1), k = one_head, q_out = a.query_like<T>(3),
          k_out = one_head]() mutable {
    for (Index b = 0; b < a.batch; ++b) {
      const auto rows = [&](auto& m) { return m.middleRows(b * a.queries, a.queries); };
      eb::rope_forward(rows(q), 0, *table, rows(q_out), {.heads = a.heads}, executor);
      eb::rope_forward(rows(k), 0, *table, rows(k_out), {.heads = 1}, executor);
    }
    bench::touch(q_out.data());
    bench::touch(k_out.data());
  };
}

const Op kOps[] = {
    {"sdpa", sdpa<float>, sdpa<double>, sdpa<Eigen::half>, sdpa<Eigen::bfloat16>},
    {"sdpa_fb", sdpa_fb<float>, sdpa_fb<double>, sdpa_fb<Eigen::half>, sdpa_fb<Eigen::bfloat16>},
    {"sdpa_eigen", sdpa_eigen<float>, sdpa_eigen<double>},
    {"rope", rope<float>, rope<double>, rope<Eigen::half>, rope<Eigen::bfloat16>},
};

}  // namespace

std::span<const Op> attention_ops() { return kOps; }

}  // namespace paired
