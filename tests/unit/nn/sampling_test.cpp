#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/nn/sampling.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

using namespace eigenblocks;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

/// The definition, one rule after the other, each with its own softmax and a full sort.
Vector<double> reference(const Vector<double>& logits, const SamplingOptions& o) {
  const Index n = logits.size();
  Vector<double> z = logits / o.temperature, p(n);
  const auto softmax = [&] {
    const double m = z.maxCoeff();
    for (Index i = 0; i < n; ++i) p[i] = std::exp(z[i] - m);
    p /= p.sum();
  };
  std::vector<Index> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return z[a] < z[b]; });
  if (o.top_k > 0 && o.top_k < n) {
    const double kth = z[order[static_cast<std::size_t>(n - o.top_k)]];
    for (Index i = 0; i < n; ++i) z[i] = z[i] < kth ? -kInf : z[i];
  }
  softmax();
  double above = 0;
  for (Index rank = 0; rank < n; ++rank) {  // from the largest down
    const Index i = order[static_cast<std::size_t>(n - 1 - rank)];
    if (rank > 0 && o.top_p < 1 && above >= o.top_p) z[i] = -kInf;
    above += p[i];
  }
  softmax();
  const double largest = p.maxCoeff();
  for (Index i = 0; i < n; ++i) z[i] = p[i] < o.min_p * largest ? -kInf : z[i];
  softmax();
  return p;
}

}  // namespace

TEST_CASE_TEMPLATE("sampling_probs follows its definition", S, float, double) {
  Random random(1);
  const SamplingOptions variants[] = {
      {},
      {.temperature = 0.3},
      {.temperature = 2.5},
      {.top_k = 1},
      {.top_k = 7},
      {.top_k = 300},
      {.top_p = 0.4},
      {.top_p = 0.99},
      {.top_p = 0},
      {.min_p = 0.1},
      {.min_p = 1},
      {.temperature = 0.8, .top_k = 50, .top_p = 0.9, .min_p = 0.03},
      {.temperature = 4, .top_k = 500, .top_p = 0.999999, .min_p = 1e-9}};
  for (const Index n : {1, 2, 5, 16, 33, 1009}) {
    const Vector<S> logits = normal_matrix<S>(random, n, 1, 3.0);
    for (const SamplingOptions& options : variants) {
      CAPTURE(n);
      CAPTURE(options.top_p);
      CAPTURE(options.top_k);
      const Vector<S> p = sampling_probs(logits, options);
      const Vector<double> want = reference(logits.template cast<double>(), options);
      // e^t costs (2 + |t|) ulp with |t| < 30 / 0.3; sums of n terms the rest.
      const double tolerance = (200 + double(n) / 16) * double(std::numeric_limits<S>::epsilon());
      for (Index i = 0; i < n; ++i) {
        CHECK((p[i] == S(0)) == (want[i] == 0));
        CHECK(std::abs(double(p[i]) - want[i]) <= tolerance * want[i]);
      }
    }
  }
}

TEST_CASE("sampling_probs: ties, masks, one token, extreme temperatures") {
  Vector<double> logits(6), p;
  logits << 1, 3, 2, 2, 2, 0;
  p = sampling_probs(logits, {.top_k = 2});  // the second largest is shared by three
  CHECK((p.array() > 0).count() == 4);
  CHECK(p[2] == p[4]);
  CHECK(p[0] == 0.0);
  const Vector<double> equal = Vector<double>::Ones(5);
  CHECK((sampling_probs(equal, {.top_k = 1}).array() == 0.2).all());
  // A stable ascending sort drops the lower ids of equal logits first.
  p = sampling_probs(equal, {.top_p = 0.5});
  const double third = 1.0 / 3;
  CHECK(p[0] == 0.0);
  CHECK(p[1] == 0.0);
  for (const Index i : {2, 3, 4}) CHECK(p[i] == doctest::Approx(third));
  p = sampling_probs(equal, {.top_p = 0});
  CHECK(p[4] == 1.0);

  logits << -kInf, 0, -kInf, 1, -kInf, -kInf;
  for (const SamplingOptions& options :
       {SamplingOptions{}, {.top_p = 0.99}, {.top_k = 5}, {.min_p = 0.01}}) {
    p = sampling_probs(logits, options);
    for (const Index i : {0, 2, 4, 5}) CHECK(p[i] == 0.0);
    CHECK(p.sum() == doctest::Approx(1.0));
  }
  logits << -1e308, 2, 1, 0, -1, 1e308;
  CHECK(sampling_probs(logits)[5] == 1.0);
  logits << 0, 2, 1, 0, -1, 1.5;
  for (const double cold : {1e-300, 5e-324})
    CHECK(sampling_probs(logits, {.temperature = cold})[1] == 1.0);
  for (const double hot : {1e300})
    CHECK(sampling_probs(logits, {.temperature = hot})[4] == doctest::Approx(1.0 / 6));

  SamplingWorkspace<double> workspace;
  Vector<double> none(0);
  sampling_probs(none, none, {}, workspace);  // no vocabulary, no probabilities
}

TEST_CASE("sampling_probs: rows of a matrix, and a nucleus among many small tokens") {
  Random random(2);
  const Matrix<float> logits = normal_matrix<float>(random, 3, 40);
  const Vector<float> row = logits.row(1), first = row.head(20);
  CHECK(sampling_probs(row.head(20)) == sampling_probs(first));
  CHECK(sampling_probs(logits.row(1), {.top_p = 0.7}) == sampling_probs(row, {.top_p = 0.7}));
  // 20000 equal tokens hold half of the mass: the bar has to sink below all of them.
  Vector<double> many = Vector<double>::Zero(20001);
  many[77] = std::log(20000.0);
  const Vector<double> p = sampling_probs(many, {.top_p = 0.75});
  const Index kept = (p.array() > 0).count();
  CHECK(kept >= 10001);  // the big one and half of the others, give or take a rounding
  CHECK(kept <= 10002);
  CHECK(p[77] == doctest::Approx(0.5 / 0.75).epsilon(1e-3));
}

TEST_CASE("sample_index: the first index whose cumulative mass exceeds u") {
  Vector<double> p(5);
  p << 0, 0.25, 0, 0.5, 0.25;
  CHECK(sample_index(p, 0.0) == 1);
  CHECK(sample_index(p, 0.2499) == 1);
  CHECK(sample_index(p, 0.25) == 3);  // strictly greater
  CHECK(sample_index(p, 0.7499) == 3);
  CHECK(sample_index(p, 0.75) == 4);
  CHECK(sample_index(p, std::nextafter(1.0, 0.0)) == 4);
  CHECK(sample_index(Vector<double>(8 * p), 0.25) == 3);  // need not sum to 1
  p << 0, 0.1, 0.2, 0, 0;
  CHECK(sample_index(p, std::nextafter(1.0, 0.0)) == 2);  // never a token of probability 0
}

TEST_CASE("sample_index: several blocks of the vocabulary, and zeros at its end") {
  Random random(4);
  for (const Index n : {511, 512, 513, 1024, 2000}) {
    Vector<double> p = Vector<double>::Zero(n + 3);
    for (Index i = 0; i < n; ++i) p[i] = random.uniform();
    double total = 0;
    for (Index i = 0; i < n; ++i) total += p[i];
    // Between two cumulative sums, far from both by the measure of rounding.
    double mass = 0;
    for (Index i = 0; i < n; ++i) {
      if (p[i] > 1e-6) CHECK(sample_index(p, (mass + 0.5 * p[i]) / total) == i);
      mass += p[i];
    }
    // Where the sum of the blocks is above the plain one, u close to 1 passes every entry.
    for (int trial = 0; trial < 20; ++trial) {
      for (Index i = 0; i < n; ++i) p[i] = random.uniform();
      CHECK(p[sample_index(p, std::nextafter(1.0, 0.0))] > 0);
    }
  }
}

TEST_CASE("sample_token draws with the frequencies of sampling_probs") {
  Random random(3);
  const Vector<float> logits = normal_matrix<float>(random, 12, 1);
  const SamplingOptions options{.temperature = 0.9, .top_k = 8, .top_p = 0.95, .min_p = 0.02};
  const Vector<float> p = sampling_probs(logits, options);
  SamplingWorkspace<float> workspace;
  Vector<double> count = Vector<double>::Zero(12);
  const int draws = 20000;
  for (int i = 0; i < draws; ++i)
    count[sample_token(logits, random.uniform(), options, workspace)] += 1;
  for (Index i = 0; i < 12; ++i) {
    const double mean = draws * double(p[i]);
    CHECK(std::abs(count[i] - mean) <=
          5 * std::sqrt(mean));  // five standard deviations; exact at p = 0
  }
}

TEST_CASE("argmax: first of the largest") {
  Vector<float> logits(5);
  logits << 1, 4, 2, 4, 0;
  CHECK(argmax(logits) == 1);
  CHECK(argmax(Vector<float>(-logits)) == 4);
  CHECK(argmax(Vector<double>(Vector<double>::Constant(3, -kInf))) == 0);
  Matrix<float> rows(2, 3);
  rows << 0, 1, 2, 5, 4, 3;
  CHECK(argmax(rows.row(1)) == 0);
}

TEST_CASE("sampling refuses bad options and logits, before writing") {
  Vector<double> logits = Vector<double>::Zero(3), p = Vector<double>::Constant(3, 5.0), two(2);
  SamplingWorkspace<double> workspace;
  const auto run = [&](const SamplingOptions& options) {
    sampling_probs(logits, p, options, workspace);
  };
#define REFUSES(call, kind, text) CHECK_THROWS_WITH_AS(call, "eigenblocks: " text, kind)
  REFUSES(run({.temperature = 0}), invalid_argument,
          "temperature (0) must be positive and finite (greedy decoding: argmax)");
  REFUSES(run({.temperature = -1}), invalid_argument,
          "temperature (-1) must be positive and finite (greedy decoding: argmax)");
  REFUSES(run({.temperature = kInf}), invalid_argument,
          "temperature (inf) must be positive and finite (greedy decoding: argmax)");
  REFUSES(run({.top_k = -1}), invalid_argument, "top_k (-1) must not be negative");
  REFUSES(run({.top_p = 1.5}), invalid_argument, "top_p (1.5) must be in [0, 1]");
  REFUSES(run({.top_p = std::nan("")}), invalid_argument, "top_p (nan) must be in [0, 1]");
  REFUSES(run({.min_p = -0.1}), invalid_argument, "min_p (-0.1) must be in [0, 1]");
  REFUSES(sampling_probs(logits, two, {}, workspace), invalid_argument,
          "probs has 2 entries, expected 3 (size of logits)");
  logits[1] = kInf;
  REFUSES(run({}), std::domain_error, "logits[1] is inf");
  logits.setConstant(-kInf);
  REFUSES(run({}), std::domain_error, "every logit is -inf");
  logits[2] = std::nan("");
  REFUSES(run({}), std::domain_error, "logits[2] is nan");
  REFUSES(argmax(logits), std::domain_error, "logits[2] is NaN");
  CHECK((p.array() == 5.0).all());

  const Vector<double> none(0), zero = Vector<double>::Zero(3);
  REFUSES(argmax(none), invalid_argument, "logits is empty");
  REFUSES(sample_token(none, 0.5, {}, workspace), invalid_argument, "logits is empty");
  REFUSES(sample_index(none, 0.5), invalid_argument, "probs is empty");
  REFUSES(sample_index(p, 1.0), invalid_argument, "u (1) must be in [0, 1)");
  REFUSES(sample_index(p, -0.1), invalid_argument, "u (-0.1) must be in [0, 1)");
  REFUSES(sample_index(zero, 0.5), std::domain_error, "probs sum to 0");
  REFUSES(sample_index(logits, 0.5), std::domain_error, "probs sum to nan");
#undef REFUSES
}
