// One case, timed once per input line: the half of a paired comparison that runs our code.
//
//   bench_paired OP key=value ... [threads=N] [--l3=MB]
//   yes go | head -5 | bench_paired sdpa T=2048 d=128 causal=1
//
// For every line on standard input the case runs once and its time in milliseconds is printed (and flushed): processor
// time at threads=1, wall clock with more, where a thread_pool of N workers is the executor.  A program that
// alternates the lines between this and a rival gets paired times (compare.py, or ../shared/peers/peers.py --cmd).
//
// Ops, keys (B H HK T TK d causal window dtype N D M K L S seed) and defaults are those of peers.py: see kDefaults and
// kOps below.  HK = 0 means H, TK = 0 means T.  dtype is fp32, fp64, fp16 or bf16; an op that does not compute in it says so.
//
// What is timed is the public function a user calls in a loop, with outputs and gradients allocated and touched
// before: attention_forward and attention_backward therefore include their own scratch memory and log-sum-exp.
// sdpa with T <= 16 and TK >= 512 is decoding: attention_over_cache on a cache filled before, which owns its scratch.
//   causal=1 aligns at the top left as PyTorch's is_causal does, at the bottom right when decoding; window=W is
//   causal & window_left(W) with the last query on the last key.
//   rope rotates q (all heads) and a k of one head, both out of place, with a table made before.
//   *_fb is forward plus backward for a given upstream gradient.
//   sdpa_eigen is the same attention as two Eigen products and a soft-max, with a T x TK matrix.
#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/core/softmax.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/nn/activation.hpp>
#include <eigenblocks/nn/glu.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/optim/adamw.hpp>
#include <eigenblocks/position/rope.hpp>

#include "support.hpp"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace {

using bench::Index;
using bench::random_matrix;
namespace eb = eigenblocks;

struct Default {
  const char* key;
  Index value;
};
constexpr Default kDefaults[] = {{"B", 1},    {"H", 8},    {"HK", 0},     {"T", 512},
                                 {"TK", 0},   {"d", 64},   {"causal", 0}, {"window", 0},
                                 {"N", 4096}, {"D", 1024}, {"M", 1024},   {"K", 1024},
                                 {"L", 4096}, {"S", 16},   {"seed", 0},   {"threads", 1}};

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "bench_paired: %s\n", text.c_str());
  std::exit(1);
}

/// The keys of the command line over the defaults.
struct Parameters {
  std::vector<Index> values;
  std::string dtype = "fp32";

  Parameters() {
    for (const Default& d : kDefaults) values.push_back(d.value);
  }
  Index& operator[](const std::string& key) {
    for (std::size_t i = 0; i < std::size(kDefaults); ++i) {
      if (key == kDefaults[i].key) return values[i];
    }
    std::string known = "dtype";
    for (const Default& d : kDefaults) known += std::string(" ") + d.key;
    fail("unknown key " + key + "; known: " + known);
  }
  void set(const std::string& argument) {
    const std::size_t at = argument.find('=');
    if (at == std::string::npos) fail("'" + argument + "' is not key=value");
    const std::string key = argument.substr(0, at), text = argument.substr(at + 1);
    if (key == "dtype") {
      dtype = text;
      return;
    }
    char* end = nullptr;
    (*this)[key] = std::strtol(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || (*this)[key] < 0)
      fail(argument + ": expected a number >= 0");
  }
};

using Case = std::function<void()>;

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

/// The N x D operands of the element-wise ops and losses; what a case writes is allocated and touched here.
template <class S>
struct Rows {
  eb::Matrix<S> x, x2, g, y, dx, dx2;
  eb::Vector<S> gain, bias, dgain, dbias, rstd;
  std::vector<Index> targets;
  eb::CrossEntropySaved saved;
  eb::AdamWState<S> adamw;

  explicit Rows(Parameters p) {
    const Index n = p["N"], d = p["D"];
    x = random_matrix<S>(n, d, 1);
    x2 = random_matrix<S>(n, d, 2);
    g = random_matrix<S>(n, d, 3);
    y = dx = dx2 = x;
    gain.setOnes(d);
    bias = dgain = dbias = eb::Vector<S>::Zero(d);
    rstd.setZero(n);
    eb::Random random(4);
    targets.resize(static_cast<std::size_t>(n));
    for (Index& target : targets) target = random.below(d);
  }
};

template <class S, class F>
Case rows_case(const Parameters& p, eb::ExecutorRef executor) {
  return [executor, rows = std::make_shared<Rows<S>>(p)] {
    F{}(*rows, executor);
    bench::touch(rows.get());
  };
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

/// Eigen's product as it is; with threads, in blocks of rows.
template <class S>
Case gemm(const Parameters& parameters, eb::ExecutorRef executor) {
  Parameters p = parameters;
  const Index m = p["M"], n = p["N"], k = p["K"];
  return [=, a = random_matrix<S>(m, k, 1), b = random_matrix<S>(k, n, 2),
          c = random_matrix<S>(m, n, 3)]() mutable {
    const Index block = (m + executor.workers() - 1) / executor.workers();
    executor.run((m + block - 1) / block, [&](Index task, int) {
      const Index first = task * block, rows = std::min(block, m - first);
      c.middleRows(first, rows).noalias() = a.middleRows(first, rows) * b;
    });
    bench::touch(c.data());
  };
}

using Make = Case (*)(const Parameters&, eb::ExecutorRef);
struct Op {
  const char* name;
  Make fp32, fp64, fp16 = nullptr, bf16 = nullptr;
};

/// An op on Rows, given as a lambda of (rows, executor).
template <class F>
Op on_rows(const char* name, F) {
  return {name, rows_case<float, F>, rows_case<double, F>};
}

using eb::Activation;
using Executor = eb::ExecutorRef;
const Op kOps[] = {
    {"sdpa", sdpa<float>, sdpa<double>, sdpa<Eigen::half>, sdpa<Eigen::bfloat16>},
    {"sdpa_fb", sdpa_fb<float>, sdpa_fb<double>, sdpa_fb<Eigen::half>, sdpa_fb<Eigen::bfloat16>},
    {"sdpa_eigen", sdpa_eigen<float>, sdpa_eigen<double>},
    {"rope", rope<float>, rope<double>, rope<Eigen::half>, rope<Eigen::bfloat16>},
    {"gemm", gemm<float>, gemm<double>},
    on_rows("copy", [](auto& r, Executor) { r.y = r.x; }),
    on_rows("softmax", [](auto& r, Executor e) { eb::softmax_forward(r.x, r.y, e); }),
    on_rows("softmax_fb",
            [](auto& r, Executor e) {
              eb::softmax_forward(r.x, r.y, e);
              eb::softmax_backward(r.y, r.g, r.dx, e);
            }),
    on_rows("layernorm",
            [](auto& r, Executor e) { eb::layer_norm_forward(r.x, r.gain, r.bias, r.y, {}, e); }),
    on_rows("layernorm_fb",
            [](auto& r, Executor e) {
              eb::layer_norm_forward(r.x, r.gain, r.bias, r.y, r.rstd, {}, e);
              eb::layer_norm_backward(r.x, r.gain, r.rstd, r.g, r.dx, r.dgain, r.dbias, {}, e);
            }),
    on_rows("rmsnorm", [](auto& r, Executor e) { eb::rms_norm_forward(r.x, r.gain, r.y, {}, e); }),
    on_rows("rmsnorm_fb",
            [](auto& r, Executor e) {
              eb::rms_norm_forward(r.x, r.gain, r.y, r.rstd, {}, e);
              eb::rms_norm_backward(r.x, r.gain, r.rstd, r.g, r.dx, r.dgain, {}, e);
            }),
    on_rows("silu",
            [](auto& r, Executor e) { eb::activation_forward(Activation::silu, r.x, r.y, e); }),
    on_rows("silu_fb",
            [](auto& r, Executor e) {
              eb::activation_forward(Activation::silu, r.x, r.y, e);
              eb::activation_backward(Activation::silu, r.x, r.g, r.dx, e);
            }),
    on_rows("swiglu",
            [](auto& r, Executor e) { eb::glu_forward(r.x, r.x2, r.y, Activation::silu, e); }),
    on_rows("swiglu_fb",
            [](auto& r, Executor e) {
              eb::glu_forward(r.x, r.x2, r.y, Activation::silu, e);
              eb::glu_backward(r.x, r.x2, r.g, r.dx, r.dx2, Activation::silu, e);
            }),
    // N tokens, D classes
    on_rows("cross_entropy",
            [](auto& r, Executor e) { eb::cross_entropy_forward(r.saved, r.x, r.targets, {}, e); }),
    on_rows("cross_entropy_fb",
            [](auto& r, Executor e) {
              eb::cross_entropy_forward(r.saved, r.x, r.targets, {}, e);
              eb::cross_entropy_backward(r.saved, r.x, r.targets, 1.0, r.dx, {}, e);
            }),
    on_rows("adamw", [](auto& r, Executor e) { eb::adamw_step(r.x, r.g, r.adamw, {}, e); }),
};

Make find_op(const std::string& name, const std::string& dtype) {
  std::string known;
  for (const Op& op : kOps) {
    known += std::string(" ") + op.name;
    if (name != op.name) continue;
    const Make make = dtype == "fp32"   ? op.fp32
                      : dtype == "fp64" ? op.fp64
                      : dtype == "fp16" ? op.fp16
                      : dtype == "bf16" ? op.bf16
                                        : nullptr;
    if (make == nullptr) fail(name + " does not compute in dtype " + dtype);
    return make;
  }
  fail("unknown op " + name + "; known:" + known);
}

}  // namespace

int main(int argc, char** argv) {
  bench::take_l3_option(argc, argv);
  if (argc < 2)
    fail("usage: bench_paired OP key=value ... [threads=N]; one timing per line of standard input");
  Parameters p;
  for (int i = 2; i < argc; ++i) p.set(argv[i]);
  const Make make = find_op(argv[1], p.dtype);
  if (p["threads"] < 1) fail("threads must be at least 1");
  std::unique_ptr<eb::thread_pool> pool;
  if (p["threads"] > 1) pool = std::make_unique<eb::thread_pool>(static_cast<int>(p["threads"]));
  const Case run = make(p, pool ? eb::ExecutorRef(*pool) : eb::ExecutorRef());
  run();  // touches outputs and workspaces
  const auto clock = pool ? bench::wall_seconds : bench::cpu_seconds;
  for (int c = std::getchar(); c != EOF; c = std::getchar()) {
    if (c != '\n') continue;
    const double start = clock();
    run();
    std::printf("%.6f\n", (clock() - start) * 1e3);
    std::fflush(stdout);
  }
  return 0;
}
