// Optimisers, clipping, schedules and softmax cross entropy.  (Blocks of nn/ are in nn.cpp, the
// decoder in llama.cpp.)
#include "support/golden.hpp"

#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/optim/adamw.hpp>
#include <eigenblocks/optim/clip.hpp>
#include <eigenblocks/optim/muon.hpp>
#include <eigenblocks/optim/schedule.hpp>
#include <eigenblocks/optim/sgd.hpp>

#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;

/// Runs `step(weight, gradient)` on the N gradients of in.G [N, m, n] from in.W; returns the N
/// values of the weight as N x (m n).
template <class C, class Step>
auto trajectory(C& c, Step&& step) {
  using S = golden::scalar_of<C>;
  Matrix<S> weight = c.matrix("in.W");
  const Matrix<S> gradients = c.matrix("in.G");
  const Index rows = weight.rows(), cols = weight.cols();
  if (c.param_int("steps") != gradients.rows())
    throw std::runtime_error("steps is not rows of in.G");
  Matrix<S> weights(gradients.rows(), rows * cols);
  for (Index t = 0; t < gradients.rows(); ++t) {
    step(weight, Eigen::Map<const Matrix<S>>(gradients.row(t).data(), rows, cols));
    weights.row(t) = Eigen::Map<const RowVector<S>>(weight.data(), rows * cols);
  }
  return weights;
}

/// The same with weight and gradient as blocks of larger matrices.
template <class S, class Step>
auto strided(Step step) {
  return [step](Matrix<S>& weight, const auto& gradient) mutable {
    Matrix<S> w = Matrix<S>::Constant(weight.rows() + 1, weight.cols() + 3, S(7)), g = w;
    auto inner = w.block(1, 2, weight.rows(), weight.cols());
    inner = weight;
    g.block(1, 1, weight.rows(), weight.cols()) = gradient;
    step(inner, g.block(1, 1, weight.rows(), weight.cols()));
    weight = inner;
  };
}

template <class C>
void adamw_case(C& c) {
  using S = golden::scalar_of<C>;
  const AdamWOptions options{.lr = c.param_real("lr"),
                             .beta1 = c.param_real("beta1"),
                             .beta2 = c.param_real("beta2"),
                             .eps = c.param_real("eps"),
                             .weight_decay = c.param_real("weight_decay")};
  AdamWState<S> state;
  const auto step = [&](auto& w, const auto& g) { adamw_step(w, g, state, options); };
  c.expect("out.W", trajectory(c, step));
  c.expect("out.m", state.m);
  c.expect("out.v", state.v);
  c.form("strided");
  state = {};
  c.expect("out.W", trajectory(c, strided<S>(step)));
  c.expect("out.m", state.m);
  c.expect("out.v", state.v);
}

template <class C>
void sgd_case(C& c) {
  using S = golden::scalar_of<C>;
  const SgdOptions options{.lr = c.param_real("lr"),
                           .momentum = c.param_real("momentum"),
                           .dampening = c.param_real("dampening"),
                           .nesterov = c.param_flag("nesterov"),
                           .weight_decay = c.param_real("weight_decay")};
  SgdState<S> state;
  const auto step = [&](auto& w, const auto& g) { sgd_step(w, g, state, options); };
  c.expect("out.W", trajectory(c, step));
  c.form("strided");
  state = {};
  c.expect("out.W", trajectory(c, strided<S>(step)));
}

template <class C>
void clip_case(C& c) {
  using S = golden::scalar_of<C>;
  const ClipOptions options{.max_norm = c.param_real("max_norm")};
  Matrix<S> g0 = c.matrix("in.g0"), g1 = c.matrix("in.g1");
  c.expect("out.norm", clip_grad_norm(options, g0, g1));
  c.expect("out.g0", g0);
  c.expect("out.g1", g1);
  c.form("list");
  g0 = c.matrix("in.g0");
  Vector<S> flat = c.vector("in.g1");
  const std::vector<TensorRef<S>> list{g0, flat};
  c.expect("out.norm", clip_grad_norm<S>(list, options));
  c.expect("out.g0", g0);
  c.expect("out.g1", flat);
}

ScheduleKind kind_named(const std::string& name) {
  if (name == "linear") return ScheduleKind::linear;
  if (name == "cosine") return ScheduleKind::cosine;
  if (name == "cosine_min") return ScheduleKind::cosine_min;
  if (name == "wsd") return ScheduleKind::wsd;
  throw std::runtime_error("kind " + name + " is none of linear, cosine, cosine_min, wsd");
}

template <class C>
void lr_schedule_case(C& c) {
  const ScheduleOptions options{.kind = kind_named(c.param("kind")),
                                .peak = c.param_real("peak"),
                                .warmup = c.param_int("warmup"),
                                .total = c.param_int("total"),
                                .stable = c.param_int("stable", 0),
                                .min_ratio = c.param_real("min_ratio", 0.0)};
  Vector<double> rates(c.param_int("n"));
  for (Index t = 0; t < rates.size(); ++t) rates[t] = lr_schedule(t, options);
  c.expect_exact("out.lr", rates);
}

template <class C>
void muon_ns_case(C& c) {
  using S = golden::scalar_of<C>;
  const NewtonSchulzCoefficients triple{
      .a = c.param_real("a"), .b = c.param_real("b"), .c = c.param_real("c")};
  const NewtonSchulzOptions options{
      .steps = c.param_int("steps"), .coefficients = triple, .eps = c.param_real("eps")};
  const Matrix<S> g = c.matrix("in.G");
  c.expect("out.X", newton_schulz(g, options));
  c.form("schedule, in place, three threads");
  NewtonSchulzOptions scheduled = options;
  scheduled.coefficients = {};
  scheduled.schedule = {&triple, 1};
  Matrix<S> x = g;
  Workspace workspace;
  const thread_pool pool(3);
  newton_schulz(x, x, scheduled, workspace, pool);
  c.expect("out.X", x);
}

MuonAdjust adjust_named(const std::string& name) {
  if (name == "original") return MuonAdjust::original;
  if (name == "match_rms_adamw") return MuonAdjust::match_rms_adamw;
  if (name == "spectral_unclamped") return MuonAdjust::spectral_unclamped;
  if (name == "naive") return MuonAdjust::naive;
  throw std::runtime_error("unknown adjust " + name);
}

MuonLayout layout_named(const std::string& name) {
  if (name == "in_out") return MuonLayout::in_out;
  if (name == "out_in") return MuonLayout::out_in;
  throw std::runtime_error("layout " + name + " is neither in_out nor out_in");
}

template <class C>
void muon_step_case(C& c) {
  using S = golden::scalar_of<C>;
  const MuonOptions options{.lr = c.param_real("lr"),
                            .momentum = c.param_real("momentum"),
                            .nesterov = c.param_flag("nesterov"),
                            .weight_decay = c.param_real("weight_decay"),
                            .adjust = adjust_named(c.param("adjust")),
                            .layout = layout_named(c.param("layout")),
                            .newton_schulz = {.steps = c.param_int("ns_steps")}};
  MuonState<S> state;
  const auto step = [&](auto& w, const auto& g) { muon_step(w, g, state, options); };
  c.expect("out.W", trajectory(c, step));
  c.expect("out.momentum", state.momentum);
  c.form("strided");
  state = {};
  c.expect("out.W", trajectory(c, strided<S>(step)));
  c.expect("out.momentum", state.momentum);
  c.form("transposed, the other layout");
  state = {};
  MuonOptions other = options;
  other.layout = options.layout == MuonLayout::in_out ? MuonLayout::out_in : MuonLayout::in_out;
  c.expect("out.W", trajectory(c, [&](Matrix<S>& w, const auto& g) {
             Matrix<S> wt = w.transpose();
             const Matrix<S> gt = g.transpose();
             muon_step(wt, gt, state, other);
             w = wt.transpose();
           }));
}

template <class C>
void softmax_ce_case(C& c) {
  using S = golden::scalar_of<C>;
  const CrossEntropyOptions options{.label_smoothing = c.param_real("label_smoothing"),
                                    .z_loss = c.param_real("z_loss"),
                                    .ignore_index = c.param_int("ignore_index")};
  Matrix<S> logits = c.matrix("in.logits");
  const std::vector<Index> targets = c.integers("in.targets");
  const CrossEntropySaved saved = cross_entropy_forward(logits, targets, options);
  c.expect("out.loss", saved.loss);
  cross_entropy_backward(saved, logits, targets, 1.0, logits, options);
  c.expect("gin.logits", logits);
}

}  // namespace

void register_optim_structured(golden::Registry& registry) {
  registry.add("adamw_step", [](auto& c) { adamw_case(c); });
  registry.add("sgd_step", [](auto& c) { sgd_case(c); });
  registry.add("clip_grad_norm", [](auto& c) { clip_case(c); });
  registry.add("lr_schedule", [](auto& c) { lr_schedule_case(c); });
  registry.add("muon_ns", [](auto& c) { muon_ns_case(c); });
  registry.add("muon_step", [](auto& c) { muon_step_case(c); });
  registry.add("softmax_ce", [](auto& c) { softmax_ce_case(c); });
}
