// Attention forward and backward over whole sequences, one thread.
//
//   attention_forward/float/causal/T:512/H:8/d:64          variants: full causal window:256 softcap alibi gqa
//   attention_documents/float/packed/T:512,2,1022,512      one call; apart: a call per document; mask: same_document
//   attention_backward/float/causal/T:512/H:8/d:64         the backward alone, from a saved forward
//
// FLOPS counts the visible pairs: 4 d flop each forward, 10 d backward (half of T^2 for causal).  limit is the share of
// the FMA peak.  error is max |out - reference| / max |v| over the last rows, against attention_reference in double.
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/reference.hpp>
#include <eigenblocks/attention/varlen.hpp>

#include "harness.hpp"

#include <vector>

namespace {

using bench::Index;
namespace eb = eigenblocks;

struct Sizes {
  Index tokens, heads, kv_heads, dim;
  eb::AttentionShape shape() const { return {.heads = heads, .kv_heads = kv_heads, .scale = {}}; }
};

template <class S>
struct Operands {
  eb::Matrix<S> q, k, v, out;
  explicit Operands(const Sizes& n)
      : q(bench::random_matrix<S>(n.tokens, n.heads * n.dim, 1)),
        k(bench::random_matrix<S>(n.tokens, n.kv_heads * n.dim, 2)),
        v(bench::random_matrix<S>(n.tokens, n.kv_heads * n.dim, 3)),
        out(q) {}
};

template <class S, class Rule>
double forward_error(const Operands<S>& x, const Sizes& n, const Rule& rule) {
  const Index rows = std::min<Index>(4, n.tokens);
  eb::AttentionShape shape = n.shape();
  shape.query_offset = n.tokens - rows;
  eb::Matrix<double> want(rows, x.out.cols()), lse(rows, n.heads);
  const eb::Matrix<double> q = x.q.bottomRows(rows).template cast<double>(),
                           k = x.k.template cast<double>(), v = x.v.template cast<double>();
  eb::attention_reference(q, k, v, want, lse, shape, rule);
  return (x.out.bottomRows(rows).template cast<double>() - want).cwiseAbs().maxCoeff() /
         v.cwiseAbs().maxCoeff();
}

/// `visible`: share of the T^2 pairs.
template <class S, class Rule>
void forward(const std::string& variant, const Sizes& n, double visible, const Rule& rule) {
  const std::string name = std::string("attention_forward/") + bench::scalar_name<S>() + "/" +
                           variant + "/T:" + std::to_string(n.tokens) +
                           "/H:" + std::to_string(n.heads) +
                           (n.kv_heads != n.heads ? "/HK:" + std::to_string(n.kv_heads) : "") +
                           "/d:" + std::to_string(n.dim);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    Operands<S> x(n);
    const double pairs = visible * static_cast<double>(n.tokens * n.tokens * n.heads);
    const double flops = 4 * static_cast<double>(n.dim) * pairs;
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)},
                   [&] { eb::attention_forward(x.q, x.k, x.v, x.out, n.shape(), rule); });
    state.counters["error"] = forward_error(x, n, rule);
  })->Unit(benchmark::kMillisecond);
}

template <class S, class Rule>
void backward(const std::string& variant, const Sizes& n, double visible, const Rule& rule) {
  const std::string name = std::string("attention_backward/") + bench::scalar_name<S>() + "/" +
                           variant + "/T:" + std::to_string(n.tokens) +
                           "/H:" + std::to_string(n.heads) + "/d:" + std::to_string(n.dim);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    Operands<S> x(n);
    const eb::Matrix<S> dout = bench::random_matrix<S>(x.out.rows(), x.out.cols(), 4);
    eb::Matrix<S> dq = x.q, dk = x.k, dv = x.v;
    const auto saved = eb::attention_forward(x.q, x.k, x.v, x.out, n.shape(), rule);
    const double flops = visible * 10 * static_cast<double>(n.dim * n.tokens * n.tokens * n.heads);
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)}, [&] {
      eb::attention_backward(saved, x.q, x.k, x.v, x.out, dout, dq, dk, dv, n.shape(), rule);
    });
  })->Unit(benchmark::kMillisecond);
}

/// Causal attention inside each of several documents in one sequence.
void documents(const std::vector<Index>& lengths) {
  std::string list;
  Index tokens = 0;
  double pairs = 0;
  std::vector<Index> ends{0}, ids;
  for (Index length : lengths) {
    list.append(list.empty() ? "" : ",").append(std::to_string(length));
    tokens += length;
    pairs += 0.5 * static_cast<double>(length * length);
    ids.insert(ids.end(), static_cast<std::size_t>(length), static_cast<Index>(ends.size()));
    ends.push_back(tokens);
  }
  const Sizes n{tokens, 8, 8, 64};
  const auto add = [=](const char* variant, auto run) {
    const std::string name =
        std::string("attention_documents/float/") + variant + "/T:" + list + "/H:8/d:64";
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
      Operands<float> x(n);
      const double flops = 4.0 * 64 * 8 * pairs;
      bench::measure(state, {.flops = flops, .limit = bench::fma_limit<float>(flops)},
                     [&] { run(x); });
    })->Unit(benchmark::kMillisecond);
  };
  add("packed", [=](Operands<float>& x) {
    eb::attention_varlen_forward(x.q, x.k, x.v, ends, ends, x.out, n.shape(),
                                 eb::attention_rule(eb::causal()));
  });
  add("apart", [=](Operands<float>& x) {
    for (std::size_t b = 0; b + 1 < ends.size(); ++b) {
      const auto rows = [&](auto& m) { return m.middleRows(ends[b], ends[b + 1] - ends[b]); };
      eb::attention_forward(rows(x.q), rows(x.k), rows(x.v), rows(x.out), n.shape(),
                            eb::attention_rule(eb::causal()));
    }
  });
  add("mask", [=](Operands<float>& x) {
    eb::attention_forward(x.q, x.k, x.v, x.out, n.shape(),
                          eb::attention_rule(eb::causal() & eb::same_document(ids)));
  });
}

double window_share(Index tokens, Index window) {
  const double t = static_cast<double>(tokens),
               w = static_cast<double>(std::min(window, tokens - 1));
  return ((w + 1) * t - w * (w + 1) / 2) / (t * t);
}

template <class S>
void register_scalar() {
  const auto full = eb::attention_rule();
  const auto causal = eb::attention_rule(eb::causal());
  for (Index dim : {64, 128}) {
    for (Index tokens : {512, 2048}) {
      const Sizes n{tokens, 8, 8, dim};
      forward<S>("full", n, 1, full);
      forward<S>("causal", n, 0.5, causal);
      backward<S>("full", n, 1, full);
      backward<S>("causal", n, 0.5, causal);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  register_scalar<float>();
  register_scalar<double>();
  for (Index dim : {80, 96})
    forward<float>("causal", {2048, 8, 8, dim}, 0.5, eb::attention_rule(eb::causal()));
  // What the policies cost, against float/causal/T:2048/H:8/d:64.
  const Sizes n{2048, 8, 8, 64};
  const eb::Vector<float> slopes = eb::alibi_slopes<float>(n.heads);
  forward<float>("window:256", n, window_share(n.tokens, 256),
                 eb::attention_rule(eb::causal() & eb::window_left(256)));
  forward<float>("softcap", n, 0.5, eb::attention_rule(eb::causal(), eb::soft_cap(30.0)));
  forward<float>("alibi", n, 0.5, eb::attention_rule(eb::causal(), eb::alibi(slopes)));
  forward<float>("gqa", {2048, 32, 8, 128}, 0.5, eb::attention_rule(eb::causal()));
  forward<float>("causal", {8192, 8, 8, 64}, 0.5, eb::attention_rule(eb::causal()));
  documents({512, 2, 1022, 512});
  for (Index tokens : {16, 32, 64, 128, 256}) {
    forward<float>("full", {tokens, 8, 8, 64}, 1, eb::attention_rule());
    forward<float>("causal", {tokens, 8, 8, 64}, 0.5, eb::attention_rule(eb::causal()));
  }
  return bench::run(argc, argv);
}
