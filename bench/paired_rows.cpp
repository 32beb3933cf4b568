// Products, and what works on rows one by one: normalisations, activations, losses, optimisers.
#include "paired.hpp"

#include <eigenblocks/core/softmax.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/nn/activation.hpp>
#include <eigenblocks/nn/glu.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/optim/adamw.hpp>

namespace paired {
namespace {

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

/// An op on Rows, given as a lambda of (rows, executor).
template <class F>
Op on_rows(const char* name, F) {
  return {name, rows_case<float, F>, rows_case<double, F>};
}

using eb::Activation;
using Executor = eb::ExecutorRef;

const Op kOps[] = {
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

}  // namespace

std::span<const Op> row_ops() { return kOps; }

}  // namespace paired
