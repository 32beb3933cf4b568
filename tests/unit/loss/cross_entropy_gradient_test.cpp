#include <doctest/doctest.h>

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/loss/linear_cross_entropy.hpp>

#include <vector>

using namespace eigenblocks;

namespace {

const std::vector<Index> kTargets{3, 0, -100, 6, 3};

constexpr CrossEntropyOptions kVariants[] = {
    {},
    {.label_smoothing = 0.2, .reduction = Reduction::sum},
    {.z_loss = 0.05},
    {.label_smoothing = 0.1, .z_loss = 0.01, .reduction = Reduction::none}};

/// The number whose gradient is asked for: 1.3 times the loss, or the losses weighted by 1, 2, 3,
/// ...
double objective(const CrossEntropySaved& saved, const CrossEntropyOptions& options,
                 const Vector<double>& weights) {
  return options.reduction == Reduction::none ? saved.losses.dot(weights) : 1.3 * saved.loss;
}

LossUpstream<double> upstream(const CrossEntropyOptions& options, const Vector<double>& weights) {
  if (options.reduction == Reduction::none) return weights;
  return 1.3;
}

}  // namespace

TEST_CASE("cross_entropy: gradient against finite differences") {
  Random random(31);
  const Vector<double> weights = Vector<double>::LinSpaced(5, 1, 5);
  for (const CrossEntropyOptions& options : kVariants) {
    Matrix<double> x = normal_matrix<double>(random, 5, 7, 2.0), d(5, 7);
    const CrossEntropySaved saved = cross_entropy_forward(x, kTargets, options);
    cross_entropy_backward(saved, x, kTargets, upstream(options, weights), d, options);
    const auto result = gradcheck(
        [&] { return objective(cross_entropy_forward(x, kTargets, options), options, weights); }, x,
        d);
    CHECK_MESSAGE(result.passed, result.message());
    CHECK(d.row(2).isZero(0));
  }
}

TEST_CASE("linear_cross_entropy: gradients of hidden, weight and bias against finite differences") {
  Random random(32);
  const Vector<double> weights = Vector<double>::LinSpaced(5, 1, 5);
  for (const CrossEntropyOptions& loss : kVariants) {
    for (const double softcap : {0.0, 2.0}) {
      const LinearCrossEntropyOptions options{
          .loss = loss, .softcap = softcap, .token_tile = 2, .vocab_tile = 3};
      Matrix<double> h = normal_matrix<double>(random, 5, 3),
                     w = normal_matrix<double>(random, 7, 3);
      Matrix<double> b = normal_matrix<double>(random, 1, 7);
      Matrix<double> dh(5, 3), dw(7, 3);
      RowVector<double> db(7);
      const auto forward = [&] {
        return linear_cross_entropy_forward(h, w, b.row(0), kTargets, options);
      };
      linear_cross_entropy_backward(forward(), h, w, b.row(0), kTargets, upstream(loss, weights),
                                    dh, dw, db, options);
      const auto value = [&] { return objective(forward(), loss, weights); };
      for (const GradcheckResult& result : {gradcheck(value, h, dh), gradcheck(value, w, dw),
                                            gradcheck(value, b, Matrix<double>(db))}) {
        CHECK_MESSAGE(result.passed, result.message());
      }
    }
  }
}
