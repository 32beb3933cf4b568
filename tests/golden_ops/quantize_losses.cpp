// Token losses: cross_entropy and linear_cross_entropy.  (Quantisers, densities and the rest of the
// folder: later.)
#include "support/golden.hpp"

#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/loss/linear_cross_entropy.hpp>

#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;

Reduction reduction_named(const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  if (name == "none") return Reduction::none;
  throw std::runtime_error("reduction " + name + " is none of mean, sum, none");
}

template <class C>
CrossEntropyOptions options_of(C& c) {
  return {.label_smoothing = c.param_real("label_smoothing"),
          .z_loss = c.param_real("z_loss"),
          .ignore_index = c.param_int("ignore_index"),
          .reduction = reduction_named(c.param("reduction"))};
}

template <class C>
void expect_losses(C& c, const CrossEntropySaved& saved, const CrossEntropyOptions& options) {
  if (options.reduction == Reduction::none) {
    c.expect("out.loss", saved.losses);
  } else {
    c.expect("out.loss", saved.loss);
  }
  c.expect("out.lse", saved.lse);
}

/// gout.loss as the reduction wants it.  `storage` keeps the vector alive.
template <class C, class S>
LossUpstream<S> upstream_of(C& c, const CrossEntropyOptions& options, Vector<S>& storage) {
  storage = c.vector("gout.loss");
  if (options.reduction == Reduction::none) return storage;
  return static_cast<double>(storage[0]);
}

template <class C>
void cross_entropy_case(C& c) {
  using S = golden::scalar_of<C>;
  const CrossEntropyOptions options = options_of(c);
  const Matrix<S> logits = c.matrix("in.logits");
  const std::vector<Index> targets = c.integers("in.targets");
  Vector<S> storage;
  const LossUpstream<S> upstream = upstream_of(c, options, storage);

  const CrossEntropySaved saved = cross_entropy_forward(logits, targets, options);
  expect_losses(c, saved, options);
  Matrix<S> gradient(logits.rows(), logits.cols());
  cross_entropy_backward(saved, logits, targets, upstream, gradient, options);
  c.expect("gin.logits", gradient);

  c.form("in place, three threads");
  const thread_pool pool(3);
  gradient = logits;
  expect_losses(c, cross_entropy_forward(gradient, targets, options, pool), options);
  cross_entropy_backward(saved, gradient, targets, upstream, gradient, options, pool);
  c.expect("gin.logits", gradient);
}

template <class C>
void linear_cross_entropy_case(C& c) {
  using S = golden::scalar_of<C>;
  LinearCrossEntropyOptions options{.loss = options_of(c), .softcap = c.param_real("softcap")};
  const Matrix<S> hidden = c.matrix("in.hidden"), weight = c.matrix("in.weight");
  const std::vector<Index> targets = c.integers("in.targets");
  const bool has_bias = c.has("in.bias");
  const Vector<S> bias = has_bias ? c.vector("in.bias") : Vector<S>(0);
  Vector<S> storage;
  const LossUpstream<S> upstream = upstream_of(c, options.loss, storage);
  Matrix<S> dh(hidden.rows(), hidden.cols()), dw(weight.rows(), weight.cols());
  Vector<S> db(bias.size());

  const auto expect_gradients = [&] {
    c.expect("gin.hidden", dh);
    c.expect("gin.weight", dw);
    if (has_bias) c.expect("gin.bias", db);
  };
  const auto two_passes = [&] {
    const CrossEntropySaved saved =
        has_bias ? linear_cross_entropy_forward(hidden, weight, bias, targets, options)
                 : linear_cross_entropy_forward(hidden, weight, targets, options);
    expect_losses(c, saved, options.loss);
    if (has_bias) {
      linear_cross_entropy_backward(saved, hidden, weight, bias, targets, upstream, dh, dw, db,
                                    options);
    } else {
      linear_cross_entropy_backward(saved, hidden, weight, targets, upstream, dh, dw, options);
    }
    expect_gradients();
  };
  const auto fused = [&] {
    const double gout = upstream[0];
    const CrossEntropySaved saved =
        has_bias
            ? linear_cross_entropy_fused(hidden, weight, bias, targets, gout, dh, dw, db, options)
            : linear_cross_entropy_fused(hidden, weight, targets, gout, dh, dw, options);
    expect_losses(c, saved, options.loss);
    expect_gradients();
  };
  two_passes();
  for (const Index tokens : {1, 4, 100}) {
    for (const Index classes : {1, 7, 100}) {
      options.token_tile = tokens;
      options.vocab_tile = classes;
      const std::string tile = std::to_string(tokens) + " x " + std::to_string(classes);
      c.form("tiles " + tile);
      two_passes();
      if (options.loss.reduction == Reduction::none) continue;
      c.form("fused, tiles " + tile);
      fused();
    }
  }
  c.form("weight d x V");
  options.layout = HeadLayout::class_columns;
  const Matrix<S> transposed = weight.transpose();
  Matrix<S> dtransposed(transposed.rows(), transposed.cols());
  const CrossEntropySaved saved = linear_cross_entropy_forward(
      hidden, transposed, has_bias ? bias : Vector<S>::Zero(weight.rows()), targets, options);
  expect_losses(c, saved, options.loss);
  db.resize(weight.rows());
  linear_cross_entropy_backward(saved, hidden, transposed,
                                has_bias ? bias : Vector<S>::Zero(weight.rows()), targets, upstream,
                                dh, dtransposed, db, options);
  dw = dtransposed.transpose();
  expect_gradients();
}

}  // namespace

void register_quantize_losses(golden::Registry& registry) {
  registry.add("cross_entropy", [](auto& c) { cross_entropy_case(c); });
  registry.add("linear_cross_entropy", [](auto& c) { linear_cross_entropy_case(c); });
}
