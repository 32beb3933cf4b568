#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

using namespace eigenblocks;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

std::vector<Index> random_targets(Random& random, Index tokens, Index classes, Index ignore) {
  std::vector<Index> targets;
  for (Index t = 0; t < tokens; ++t) {
    targets.push_back(t % 4 == 3 ? ignore : random.below(classes));
  }
  return targets;
}

/// The formulas of the header, in double, one number at a time.
struct Reference {
  double loss = 0;
  Vector<double> losses, lse;
  Matrix<double> gradient;  ///< for upstream 1
  Reference(const Matrix<double>& x, const std::vector<Index>& targets,
            const CrossEntropyOptions& o)
      : losses(Vector<double>::Zero(x.rows())),
        lse(x.rows()),
        gradient(Matrix<double>::Zero(x.rows(), x.cols())) {
    const double classes = static_cast<double>(x.cols());
    double valid = 0;
    for (const Index y : targets) valid += y != o.ignore_index;
    const double gamma = o.reduction == Reduction::mean ? 1 / valid : 1;
    for (Index t = 0; t < x.rows(); ++t) {
      const double m = x.row(t).maxCoeff();
      double sum = 0, mean = 0;
      for (Index j = 0; j < x.cols(); ++j) {
        sum += std::exp(x(t, j) - m);
        mean += x(t, j) / classes;
      }
      lse[t] = m + std::log(sum);
      const Index y = targets[static_cast<std::size_t>(t)];
      if (y == o.ignore_index) continue;
      const double s = o.label_smoothing;
      losses[t] = (1 - s) * (lse[t] - x(t, y)) + s * (lse[t] - mean) + o.z_loss * lse[t] * lse[t];
      for (Index j = 0; j < x.cols(); ++j) {
        const double p = std::exp(x(t, j) - lse[t]);
        gradient(t, j) =
            gamma * ((1 + 2 * o.z_loss * lse[t]) * p - (j == y ? 1 - s : 0) - s / classes);
      }
    }
    loss = losses.sum() * gamma;
  }
};

constexpr CrossEntropyOptions kVariants[] = {
    {},
    {.label_smoothing = 0.1},
    {.label_smoothing = 1.0, .reduction = Reduction::sum},
    {.z_loss = 1e-2, .reduction = Reduction::none},
    {.label_smoothing = 0.3, .z_loss = 0.1, .ignore_index = 0}};

}  // namespace

TEST_CASE_TEMPLATE("cross_entropy is the formula, across block sizes of the row loop", S, float,
                   double) {
  Random random(21);
  const double eps = double(std::numeric_limits<S>::epsilon());
  for (const CrossEntropyOptions& options : kVariants) {
    for (const auto& [tokens, classes] : {std::pair<Index, Index>{5, 1},
                                          {1, 2},
                                          {9, 13},
                                          {4, 97},
                                          {3, 2048},
                                          {5, 2051},
                                          {2, 4999}}) {
      const Matrix<S> x = normal_matrix<S>(random, tokens, classes, 3.0);
      CAPTURE(x.cols());
      const std::vector<Index> targets =
          random_targets(random, tokens, classes, options.ignore_index);
      const Reference want(x.template cast<double>(), targets, options);
      const CrossEntropySaved saved = cross_entropy_forward(x, targets, options);
      // Logits are below 20; exponentials are good to (2 + 40) eps where they are small, 2 eps
      // where they count, a block's sum to about 50 eps.
      const double tolerance = 100 * eps;
      CHECK((saved.lse - want.lse).cwiseAbs().maxCoeff() <= tolerance);
      CHECK((saved.losses - want.losses).cwiseAbs().maxCoeff() <= 20 * tolerance);
      if (saved.valid > 0) {
        CHECK(saved.loss == doctest::Approx(want.loss).epsilon(20 * tolerance));
      } else {
        CHECK(std::isnan(saved.loss));
      }
      Matrix<S> gradient = x;
      if (options.reduction == Reduction::none) {
        const Vector<S> ones = Vector<S>::Ones(tokens);
        cross_entropy_backward(saved, gradient, targets, ones, gradient, options);
      } else {
        cross_entropy_backward(saved, gradient, targets, 1.0, gradient, options);
      }
      CHECK((gradient.template cast<double>() - want.gradient).cwiseAbs().maxCoeff() <= tolerance);
    }
  }
}

TEST_CASE_TEMPLATE("cross_entropy: equal bits for every executor, in blocks and in place", S, float,
                   double) {
  Random random(22);
  const Index tokens = 71, classes = 1501;  // several blocks of rows
  Matrix<S> wide = normal_matrix<S>(random, tokens, classes + 5);
  const Matrix<S> x = wide.middleCols(3, classes);
  const std::vector<Index> targets = random_targets(random, tokens, classes, -100);
  const CrossEntropyOptions options{.label_smoothing = 0.1, .z_loss = 1e-3};
  const CrossEntropySaved want = cross_entropy_forward(x, targets, options);
  Matrix<S> gradient(tokens, classes);
  cross_entropy_backward(want, x, targets, 0.5, gradient, options);
  CrossEntropySaved saved;
  for (const int workers : {1, 2, 3, 7}) {
    const thread_pool pool(workers);
    Matrix<S> other = wide;
    auto block = other.middleCols(3, classes);
    cross_entropy_forward(saved, block, targets, options, pool);
    CHECK(saved.loss == want.loss);
    CHECK(saved.lse == want.lse);
    CHECK(saved.losses == want.losses);
    cross_entropy_backward(saved, block, targets, 0.5, block, options, pool);
    CHECK(Matrix<S>(block) == gradient);
    CHECK(other.leftCols(3) == wide.leftCols(3));
    CHECK(other.rightCols(2) == wide.rightCols(2));
  }
  CHECK(cross_entropy(x, targets, options) == want.loss);
}

TEST_CASE_TEMPLATE("cross_entropy: masked classes are exactly absent", S, float, double) {
  Matrix<S> x(3, 5);
  const S low = -std::numeric_limits<S>::infinity();
  x << S(1), low, S(2), low, S(0.5),  //
      low, low, low, S(3), low,       //
      S(4), low, S(1), S(1), S(1);
  const std::vector<Index> targets{2, 3, 0};
  const CrossEntropySaved saved = cross_entropy_forward(x, targets);
  CHECK(saved.losses[1] == 0.0);
  CHECK(std::isfinite(saved.loss));
  Matrix<S> d(3, 5);
  cross_entropy_backward(saved, x, targets, 1.0, d);
  for (Index t = 0; t < 3; ++t) {
    for (Index j = 0; j < 5; ++j) {
      if (x(t, j) == low) CHECK(d(t, j) == S(0));
    }
    CHECK(std::abs(double(d.row(t).sum())) <= 10 * double(std::numeric_limits<S>::epsilon()));
  }
  CHECK(d(1, 3) == S(0));
  // A masked target or smoothing over a masked class: infinite, not NaN.
  CHECK(cross_entropy(x, std::vector<Index>{1, 3, 0}) == kInf);
  CHECK(cross_entropy(x, targets, {.label_smoothing = 0.1}) == kInf);
  CHECK(cross_entropy(x, targets, {.label_smoothing = 1.0}) == kInf);
  CHECK(cross_entropy(x, std::vector<Index>{1, 3, 0}, {.label_smoothing = 1.0}) == kInf);
}

TEST_CASE_TEMPLATE("cross_entropy: NaN, +inf and all-masked rows give NaN and touch no other row",
                   S, float, double) {
  const S inf = std::numeric_limits<S>::infinity(), nan = std::numeric_limits<S>::quiet_NaN();
  for (const Index classes : {4, 33, 5000}) {
    for (const S bad : {nan, inf, -inf}) {
      for (const Index at : {Index{0}, Index{2}, classes - 1}) {
        Matrix<S> x = Matrix<S>::Constant(3, classes, S(1));
        x.row(1).setConstant(bad == nan && at == 2 ? -inf : bad == -inf ? -inf : S(7));
        x(1, at) = bad;
        std::vector<Index> targets{1, 1, 1};
        const CrossEntropySaved saved =
            cross_entropy_forward(x, targets, {.reduction = Reduction::none});
        CHECK(std::isnan(saved.losses[1]));
        CHECK(saved.losses[0] == doctest::Approx(std::log(double(classes))).epsilon(1e-6));
        CHECK(saved.losses[2] == saved.losses[0]);
        Matrix<S> d(3, classes);
        cross_entropy_backward(saved, x, targets, 1.0, d, {.reduction = Reduction::sum});
        CHECK(d.row(1).hasNaN());
        CHECK(d.row(0) == d.row(2));
        CHECK_FALSE(d.row(0).hasNaN());
        // Ignored, the row does no harm.
        targets[1] = -100;
        const CrossEntropySaved ignoring = cross_entropy_forward(x, targets);
        CHECK(ignoring.loss == saved.losses[0]);
        cross_entropy_backward(ignoring, x, targets, 1.0, d);
        CHECK(d.row(1).isZero(0));
      }
    }
  }
}

TEST_CASE_TEMPLATE("cross_entropy: large logits, shifts and near-certain answers", S, float,
                   double) {
  const double eps = double(std::numeric_limits<S>::epsilon());
  Random random(23);
  const Matrix<S> x = normal_matrix<S>(random, 4, 50);
  const std::vector<Index> targets{3, 0, 49, 20};
  const double want = cross_entropy(x, targets);
  for (const double shift : {1e3, -1e3, 1e5}) {
    Matrix<S> moved = (x.array() + S(shift)).matrix();
    const CrossEntropySaved saved = cross_entropy_forward(moved, targets);
    CHECK(std::abs(saved.loss - want) <=
          4 * eps * std::abs(shift));  // what x + shift lost in rounding
    // lse is kept in double: float probabilities add up to 1 although a float lse would be off by
    // an ulp of shift.
    Matrix<S> d(4, 50);
    cross_entropy_backward(saved, moved, targets, 1.0, d, {.reduction = Reduction::sum});
    const double lse_error = std::numeric_limits<double>::epsilon() * std::abs(shift);
    CHECK(double(d.rowwise().sum().cwiseAbs().maxCoeff()) <= 100 * eps + lse_error);
  }
  // The other class has p = e^-30; its gradient keeps its digits (ratios: Approx has an absolute
  // scale of 1), and so does the loss where log(1 + e^-30) can be told from 0.
  Matrix<S> sure = Matrix<S>::Zero(1, 2);
  sure(0, 0) = S(30);
  const std::vector<Index> first{0};
  const CrossEntropySaved saved = cross_entropy_forward(sure, first);
  const double other = std::exp(-30.0);
  CHECK(std::abs(saved.loss / other - 1) <= eps / other);
  Matrix<S> d(1, 2);
  cross_entropy_backward(saved, sure, first, 1.0, d);
  CHECK(double(d(0, 1)) / other == doctest::Approx(1).epsilon(1e-4));
}

TEST_CASE("cross_entropy: no tokens, no valid tokens, one class") {
  const Matrix<float> none(0, 7), x = Matrix<float>::Ones(3, 7);
  const std::vector<Index> empty, ignored(3, -100);
  CHECK(std::isnan(cross_entropy(none, empty)));
  CHECK(cross_entropy(none, empty, {.empty_is_zero = true}) == 0.0);
  CHECK(cross_entropy(none, empty, {.reduction = Reduction::sum}) == 0.0);
  CHECK(std::isnan(cross_entropy(x, ignored)));
  CHECK(cross_entropy(x, ignored, {.reduction = Reduction::sum}) == 0.0);
  const CrossEntropySaved saved = cross_entropy_forward(x, ignored, {.empty_is_zero = true});
  CHECK(saved.loss == 0.0);
  CHECK(saved.valid == 0);
  Matrix<float> d = Matrix<float>::Constant(3, 7, 5.0f);
  cross_entropy_backward(saved, x, ignored, 1.0, d);
  CHECK(d.isZero(0));
  const Matrix<float> one = Matrix<float>::Constant(2, 1, -3.0f);
  const std::vector<Index> zeros(2, 0);
  CHECK(cross_entropy(one, zeros) == 0.0);
}

TEST_CASE_TEMPLATE("cross_entropy: 16-bit storage computes in float", S, Eigen::half,
                   Eigen::bfloat16) {
  Random random(24);
  const Matrix<S> x = normal_matrix<float>(random, 5, 2100).cast<S>();
  const Matrix<float> same = x.template cast<float>();
  const std::vector<Index> targets = random_targets(random, 5, 2100, -100);
  const CrossEntropyOptions options{.label_smoothing = 0.1, .z_loss = 1e-3};
  const CrossEntropySaved want = cross_entropy_forward(same, targets, options);
  const CrossEntropySaved got = cross_entropy_forward(x, targets, options);
  CHECK(got.loss == want.loss);
  CHECK(got.lse == want.lse);
  Matrix<float> gradient(5, 2100);
  cross_entropy_backward(want, same, targets, 100.0, gradient, options);
  Matrix<S> in_place = x;
  cross_entropy_backward(got, in_place, targets, 100.0, in_place, options);
  CHECK(in_place.template cast<float>() == gradient.cast<S>().template cast<float>());
}

TEST_CASE("cross_entropy: bad input leaves the outputs as they were") {
  const Matrix<double> x = Matrix<double>::Zero(2, 3);
  const std::vector<Index> targets{0, 2};
  const auto run = [&](const std::vector<Index>& ids, const CrossEntropyOptions& options) {
    return cross_entropy(x, ids, options);
  };
  CHECK_THROWS_WITH_AS(
      run({0, 3}, {}),
      "eigenblocks: cross_entropy: targets[1] (3) is outside [0, 3) and is not ignore_index (-100)",
      std::out_of_range);
  CHECK_THROWS_WITH_AS(
      run({-1, 3}, {.ignore_index = 3}),
      "eigenblocks: cross_entropy: targets[0] (-1) is outside [0, 3) and is not ignore_index (3)",
      std::out_of_range);
  CHECK_NOTHROW(run({0, 3}, {.ignore_index = 3}));
  CHECK_THROWS_WITH_AS(
      run({0}, {}),
      "eigenblocks: cross_entropy: targets has 1 entries, expected 2 (one for each token)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(run(targets, {.label_smoothing = 1.5}),
                       "eigenblocks: cross_entropy: label_smoothing (1.5) must be in [0, 1]",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(run(targets, {.z_loss = -1}),
                       "eigenblocks: cross_entropy: z_loss (-1) must not be negative",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(cross_entropy(Matrix<double>(2, 0), targets),
                       "eigenblocks: cross_entropy: the number of classes (0) must be at least 1",
                       invalid_argument);

  const CrossEntropySaved saved = cross_entropy_forward(x, targets);
  Matrix<double> d = Matrix<double>::Constant(2, 3, 7.0), wrong(3, 3);
  const CrossEntropyOptions none{.reduction = Reduction::none};
  const Vector<double> two = Vector<double>::Ones(2), three = Vector<double>::Ones(3);
  CHECK_THROWS_WITH_AS(
      cross_entropy_backward(saved, x, targets, 1.0, wrong),
      "eigenblocks: cross_entropy: dlogits is 3 x 3, expected 2 x 3 (shape of logits)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(
      cross_entropy_backward(saved, x, targets, 1.0, d, none),
      "eigenblocks: cross_entropy: upstream must be a vector with one entry per token (2) for "
      "Reduction::none, not a single number",
      invalid_argument);
  CHECK_THROWS_WITH_AS(
      cross_entropy_backward(saved, x, targets, three, d, none),
      "eigenblocks: cross_entropy: upstream has 3 entries, expected 2 (one for each token)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(cross_entropy_backward(saved, x, targets, two, d),
                       "eigenblocks: cross_entropy: upstream has 2 entries, expected a single "
                       "number (Reduction::mean and Reduction::sum)",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(
      cross_entropy_backward(CrossEntropySaved{}, x, targets, 1.0, d),
      "eigenblocks: cross_entropy: saved.lse has 0 entries, expected 2 (rows of logits)",
      invalid_argument);
  CHECK(d == Matrix<double>::Constant(2, 3, 7.0));
}
