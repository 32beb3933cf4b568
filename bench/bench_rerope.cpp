// What a position policy with a window costs beside plain RoPE, one thread.  Each iteration runs both, in turn.
//
//   rerope_forward/float/rerope/T:4096/H:8/d:64/w:512      the kernel, rotations aside
//   rerope_backward/...                                    the same for the backward
//   rerope_whole/...                                       forward with the rotations, against rotating and attending
//   rerope_step/float/rerope/Tk:16384/H:32/HK:8/d:128      one token through the cache, against rotating and a plain step
//
// cost: time / time of plain, the median over the iterations.  mixed: share of the register tiles computed twice, counted.
// rerotate (steps): what rotating all keys at every step, as the official code does, would cost, / plain.
// FLOPS counts the visible pairs once.
#include <eigenblocks/attention/rerope.hpp>

#include "harness.hpp"

#include <algorithm>
#include <vector>

namespace {

using bench::Index;
namespace eb = eigenblocks;

enum class Form { forward, backward, whole };

struct Shape {
  Index tokens, heads, kv_heads, dim, window;
  eb::AttentionShape attention() const { return {.heads = heads, .kv_heads = kv_heads}; }
};

eb::NearFarPosition policy(const std::string& kind, Index window) {
  if (kind == "leaky") return eb::leaky_rerope(window, 16);
  if (kind == "self_extend") return eb::self_extend(window, 8);
  return eb::rerope(window);
}

/// Runs `plain` and `other` in turn and sets the counter `cost`.
template <class Plain, class Other>
void compare(benchmark::State& state, double flops, const Plain& plain, const Other& other) {
  std::vector<double> ratios;
  for (auto _ : state) {
    const double start = bench::cpu_seconds();
    plain();
    const double middle = bench::cpu_seconds();
    other();
    const double end = bench::cpu_seconds();
    state.SetIterationTime(end - middle);
    ratios.push_back((end - middle) / (middle - start));
  }
  std::nth_element(ratios.begin(), ratios.begin() + std::ptrdiff_t(ratios.size() / 2),
                   ratios.end());
  state.counters["cost"] = ratios[ratios.size() / 2];
  if (flops > 0) {
    state.counters["FLOPS"] = benchmark::Counter(
        flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::OneK::kIs1000);
  }
}

void sequence(const char* op, Form form, const std::string& kind, const Shape& n) {
  const std::string name = std::string(op) + "/float/" + kind + "/T:" + std::to_string(n.tokens) +
                           "/H:" + std::to_string(n.heads) + "/d:" + std::to_string(n.dim) +
                           "/w:" + std::to_string(n.window);
  benchmark::RegisterBenchmark(
      name.c_str(),
      [=](benchmark::State& state) {
        const eb::RotaryTable<float> table(eb::rope_frequencies(n.dim), eb::RopeLayout::half);
        const auto q = bench::random_matrix<float>(n.tokens, n.heads * n.dim, 1);
        const auto k = bench::random_matrix<float>(n.tokens, n.kv_heads * n.dim, 2);
        const auto v = bench::random_matrix<float>(n.tokens, n.kv_heads * n.dim, 3);
        const auto dout = bench::random_matrix<float>(n.tokens, n.heads * n.dim, 4);
        eb::Matrix<float> out = q, dq = q, dk = k, dv = v, far_dq = q, far_dk = k;
        const auto rule = eb::attention_rule(eb::causal(), {}, policy(kind, n.window));
        const auto plain_rule = eb::attention_rule(eb::causal());
        const eb::AttentionShape shape = n.attention();
        const eb::detail::RotatedOperands<float> x(q, k, shape, table, rule.position, {});
        auto near_far = x.rule(rule);
        near_far.position.dquery = far_dq.data();
        near_far.position.dquery_stride = far_dq.outerStride();
        near_far.position.dkey = far_dk.data();
        near_far.position.dkey_stride = far_dk.outerStride();
        const double pairs =
            0.5 * static_cast<double>(n.tokens * n.tokens) * static_cast<double>(n.heads * n.dim);
        eb::Workspace workspace;
        eb::Matrix<float> lse(n.tokens, n.heads);
        const auto forward = [&](const auto& with) {
          eb::detail::attention_forward_into(x.near_query, x.near_key, v, out, lse, shape, with, {},
                                             {}, workspace);
        };
        const auto backward = [&](const auto& with) {
          eb::detail::attention_backward_into(lse, x.near_query, x.near_key, v, out, dout, dq, dk,
                                              dv, shape, with, {}, nullptr, {}, workspace);
        };
        if (form == Form::forward) {
          compare(
              state, 4 * pairs, [&] { forward(plain_rule); }, [&] { forward(near_far); });
        } else if (form == Form::backward) {
          forward(near_far);
          compare(
              state, 10 * pairs, [&] { backward(plain_rule); }, [&] { backward(near_far); });
        } else {
          compare(
              state, 4 * pairs,
              [&] {
                const auto rq = eb::rope(q, 0, table, {.heads = n.heads}),
                           rk = eb::rope(k, 0, table, {.heads = n.kv_heads});
                eb::attention_forward(rq, rk, v, out, shape, plain_rule);
              },
              [&] { eb::rerope_attention_forward(q, k, v, out, shape, table, rule); });
        }
        using Tile = eb::detail::TileShape<float>;
        const auto count = eb::detail::near_far_count(n.tokens, n.tokens, 0, n.window,
                                                      Tile::kQueries, Tile::kRows);
        state.counters["mixed"] =
            static_cast<double>(count.mixed) / static_cast<double>(count.tiles);
      })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

void step(const std::string& kind, const Shape& n) {
  const std::string name = "rerope_step/float/" + kind + "/Tk:" + std::to_string(n.tokens) +
                           "/H:" + std::to_string(n.heads) + "/HK:" + std::to_string(n.kv_heads) +
                           "/d:" + std::to_string(n.dim) + "/w:" + std::to_string(n.window);
  benchmark::RegisterBenchmark(
      name.c_str(),
      [=](benchmark::State& state) {
        const eb::RotaryTable<float> table(eb::rope_frequencies(n.dim), eb::RopeLayout::half);
        const auto position = policy(kind, n.window);
        const auto rule = eb::attention_rule(eb::causal(), {}, position);
        const eb::KvCacheOptions options{
            .kv_heads = n.kv_heads, .head_dim = n.dim, .capacity = n.tokens};
        eb::KvCache<float> plain(options);
        eb::ReropeCache<float> cache(position, options);
        const Index last = n.tokens - 1;
        const auto q = bench::random_matrix<float>(last, n.heads * n.dim, 1);
        const auto k = bench::random_matrix<float>(last, n.kv_heads * n.dim, 2);
        plain.append(k, k);
        // The prompt's keys without its attention, which would take long.
        const auto far_k = eb::rope(k, eb::detail::far_positions(position, 0, last, true), table,
                                    {.heads = n.kv_heads});
        auto all_keys = k;
        cache.far().append(far_k, k);
        cache.put_near(0, k.data(), k.outerStride());
        const eb::AttentionShape shape = n.attention();
        const eb::Matrix<float> q1 = q.topRows(1), k1 = k.topRows(1);
        eb::Matrix<float> out = q1, rq = q1, rk = k1;
        compare(
            state, 0,
            [&] {
              eb::rope_forward(q1, last, table, rq, {.heads = n.heads});
              eb::rope_forward(k1, last, table, rk, {.heads = n.kv_heads});
              eb::attention_step(plain, rq, rk, k1, out, shape);
              plain.truncate(last);
            },
            [&] {
              eb::rerope_attention_step(cache, q1, k1, k1, out, shape, table, rule);
              cache.truncate(last);
            });
        // Rotating all keys anew, without what else the step does, in the unit of `cost`.
        std::vector<double> rotate, steps;
        for (int round = 0; round < 7; ++round) {
          const double start = bench::cpu_seconds();
          eb::rope_in_place(all_keys, 0, table, {.heads = n.kv_heads});
          const double middle = bench::cpu_seconds();
          eb::attention_step(plain, rq, rk, k1, out, shape);
          plain.truncate(last);
          rotate.push_back(middle - start);
          steps.push_back(bench::cpu_seconds() - middle);
        }
        std::sort(rotate.begin(), rotate.end());
        std::sort(steps.begin(), steps.end());
        state.counters["rerotate"] = 1 + rotate[3] / steps[3];
      })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* kind : {"rerope", "leaky", "self_extend"}) {
    for (const Shape& n : {Shape{512, 8, 8, 64, 128}, Shape{4096, 8, 8, 64, 512},
                           Shape{4096, 8, 8, 64, 500}, Shape{16384, 2, 2, 64, 1024}}) {
      sequence("rerope_forward", Form::forward, kind, n);
    }
    sequence("rerope_backward", Form::backward, kind, {4096, 2, 2, 64, 512});
    sequence("rerope_whole", Form::whole, kind, {4096, 8, 8, 64, 512});
    for (const Index keys : {512, 4096, 16384}) step(kind, {keys, 32, 8, 128, 512});
  }
  return bench::run(argc, argv);
}
