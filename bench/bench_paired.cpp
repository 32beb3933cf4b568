// One case, timed once per input line: the half of a paired comparison that runs our code.
//
//   bench_paired OP key=value ... [threads=N] [--l3=MB]
//   yes go | head -5 | bench_paired sdpa T=2048 d=128 causal=1
//
// For every line on standard input the case runs once and its time in milliseconds is printed (and flushed): processor
// time at threads=1, wall clock with more, where a thread_pool of N workers is the executor.  A program that
// alternates the lines between this and a rival gets paired times (compare.py, or ../shared/peers/peers.py --cmd).
//
// Ops, keys (B H HK T TK d causal window dtype N D M K L S seed) and defaults are those of peers.py: see kDefaults in
// paired.hpp and the kOps of each paired_<family>.cpp.  HK = 0 means H, TK = 0 means T.  dtype is fp32, fp64, fp16 or bf16; an op that does not compute in it says so.
//
// What is timed is the public function a user calls in a loop, with outputs and gradients allocated and touched
// before: attention_forward and attention_backward therefore include their own scratch memory and log-sum-exp.
// sdpa with T <= 16 and TK >= 512 is decoding: attention_over_cache on a cache filled before, which owns its scratch.
//   causal=1 aligns at the top left as PyTorch's is_causal does, at the bottom right when decoding; window=W is
//   causal & window_left(W) with the last query on the last key.
//   rope rotates q (all heads) and a k of one head, both out of place, with a table made before.
//   *_fb is forward plus backward for a given upstream gradient.
//   sdpa_eigen is the same attention as two Eigen products and a soft-max, with a T x TK matrix.
#include "paired.hpp"

#include <eigenblocks/core/thread_pool.hpp>

namespace {

using namespace paired;

Make find_op(const std::string& name, const std::string& dtype) {
  std::string known;
  for (const std::span<const Op> ops : {attention_ops(), row_ops(), sequence_ops()}) {
    for (const Op& op : ops) {
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
