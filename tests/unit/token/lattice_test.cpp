#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/token/lattice.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/alloc_guard.hpp"
#include "toy_lattice.hpp"

namespace {

namespace eb = eigenblocks;
using eb::Lattice;
using eb::LatticeGrad;
using eb::UnigramModel;
using eb::UnigramWeights;
using toy::Pieces;
using Reals = std::vector<double>;

/// What enumeration says.
struct Truth {
  double log_z = 0, mean = 0, variance = 0, entropy = 0, tokens = 0;
  Reals counts, boundary;
};

Truth enumerate(const UnigramModel& model, const Reals& theta, double alpha,
                const std::string& text) {
  const std::vector<Pieces> all = toy::segmentations(model, text);
  double best = -std::numeric_limits<double>::infinity(), z = 0;
  for (const Pieces& y : all) best = std::max(best, alpha * toy::score(theta, y));
  for (const Pieces& y : all) z += std::exp(alpha * toy::score(theta, y) - best);
  Truth t;
  t.log_z = best + std::log(z);
  t.counts.assign(model.size(), 0.0);
  t.boundary.assign(text.size() + 1, 0.0);
  for (const Pieces& y : all) {
    const double s = toy::score(theta, y), p = std::exp(alpha * s - t.log_z);
    t.mean += p * s;
    t.entropy -= p * (alpha * s - t.log_z);
    t.tokens += p * static_cast<double>(y.size());
    std::size_t at = 0;
    t.boundary[0] += p;
    for (const std::uint32_t v : y) {
      t.counts[v] += p;
      t.boundary[at += model.length(v)] += p;
    }
  }
  for (const Pieces& y : all) {
    const double s = toy::score(theta, y);
    t.variance += std::exp(alpha * s - t.log_z) * (s - t.mean) * (s - t.mean);
  }
  return t;
}

double difference(const Reals& a, const Reals& b) {
  double largest = a.size() == b.size() ? 0 : 1e300;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

bool near(double a, double b, double tolerance = 1e-12) {
  return std::abs(a - b) <= tolerance * std::max(1.0, std::abs(b));
}

TEST_CASE("every sum is that over all segmentations") {
  const UnigramModel model = toy::dense_model(2, 4, 1);
  eb::Random random(2);
  Lattice lattice;
  for (const double alpha : {0.0, 0.1, 1.0, 3.0, 40.0}) {
    for (const std::size_t n : {0u, 1u, 2u, 5u, 10u}) {
      const std::string text = toy::random_text(random, n, "ab");
      const Truth t = enumerate(model, model.log_probs(), alpha, text);
      const UnigramWeights weights(model, alpha);
      CHECK(near(lattice.run(weights, text), t.log_z));
      Reals boundary, counts(model.size(), 0.0), edges(model.size(), 0.0);
      for (std::size_t i = 0; i <= n; ++i) boundary.push_back(lattice.boundary(i));
      CHECK(difference(boundary, t.boundary) < 1e-12);
      CHECK(near(lattice.expected_tokens(), t.tokens));
      lattice.add_expected_counts(counts, 2);
      lattice.edges([&](std::size_t s, std::size_t e, std::uint32_t p, double m) {
        CHECK(text.substr(s, e - s) == model.piece(p));
        edges[p] += 2 * m;
      });
      CHECK(difference(counts, edges) == 0);
      for (double& c : counts) c /= 2;
      CHECK(difference(counts, t.counts) < 1e-12);
      const eb::ScoreMoments m = lattice.moments();
      CHECK(near(m.mean, t.mean));
      CHECK(near(m.variance, t.variance));
      CHECK(near(m.entropy, t.entropy));
      Reals again(model.size(), 1.0);
      CHECK(lattice.run_counts(weights, text, 3, again) == lattice.log_partition());
      for (double& c : again) c = (c - 1) / 3;
      CHECK(difference(again, t.counts) < 1e-12);
      CHECK(eb::count_segmentations(model, text) ==
            static_cast<double>(toy::segmentations(model, text).size()));
      double log_probs = 0;
      for (const Pieces& y : toy::segmentations(model, text))
        log_probs += std::exp(lattice.log_prob(y));
      CHECK(near(log_probs, 1));
    }
  }
}

TEST_CASE("gradients are those of finite differences") {
  const UnigramModel model = toy::dense_model(2, 3, 3);
  const auto pieces = static_cast<eb::Index>(model.size());
  const std::string text = "abaabbab";
  const std::vector<Pieces> all = toy::segmentations(model, text);
  const Pieces path = all[all.size() / 3];
  // Row 0: theta, then alpha.
  eb::Matrix<double> x(1, pieces + 1);
  for (eb::Index p = 0; p < pieces; ++p) x(0, p) = model.log_prob(static_cast<std::uint32_t>(p));
  for (const double alpha : {0.2, 1.0}) {
    x(0, pieces) = alpha;
    const auto run = [&](Lattice& lattice, UnigramWeights& weights) {
      weights.reset({x.data(), model.size()}, x(0, pieces));
      lattice.run(weights, text);
    };
    Lattice lattice;
    UnigramWeights weights(model);
    for (int which = 0; which < 4; ++which) {
      run(lattice, weights);
      Reals theta(model.size(), 0.5);
      LatticeGrad grad{theta, 0.5};
      if (which == 0) lattice.add_log_partition_grad(1.5, grad);
      if (which == 1) lattice.add_log_prob_grad(path, 1.5, grad);
      if (which == 2) lattice.add_score_mean_grad(1.5, grad);
      if (which == 3) lattice.add_entropy_grad(1.5, grad);
      eb::Matrix<double> gradient(1, pieces + 1);
      for (eb::Index p = 0; p < pieces; ++p)
        gradient(0, p) = theta[static_cast<std::size_t>(p)] - 0.5;
      gradient(0, pieces) = grad.alpha - 0.5;
      const auto loss = [&] {
        run(lattice, weights);
        if (which == 0) return 1.5 * lattice.log_partition();
        if (which == 1) return 1.5 * lattice.log_prob(path);
        const eb::ScoreMoments m = lattice.moments();
        return 1.5 * (which == 2 ? m.mean : m.entropy);
      };
      const eb::GradcheckResult r = eb::gradcheck(loss, x, gradient, {.rtol = 1e-8, .atol = 1e-9});
      CHECK_MESSAGE(r.passed, which, " ", r.message());
    }
  }
}

TEST_CASE("the gradient of a corpus reaches the logits") {
  const UnigramModel model = toy::dense_model(2, 2, 4);
  const std::vector<std::string_view> texts{"abba", "", "babab"};
  const Reals frequency{2, 1, 0.5};
  eb::Random random(5);
  eb::Matrix<double> logits =
      eb::normal_matrix<double>(random, 1, static_cast<eb::Index>(model.size()));
  Reals theta(model.size()), counts(model.size());
  const auto loss = [&] {
    eb::unigram_theta_forward({logits.data(), model.size()}, theta);
    return -eb::lattice_expected_counts(UnigramWeights(model, theta, 1), texts, frequency, counts);
  };
  loss();
  double total = 0;
  for (const double t : theta) total += std::exp(t);
  CHECK(near(total, 1));
  for (double& c : counts) c = -c;
  eb::Matrix<double> gradient(1, logits.cols());
  eb::unigram_theta_backward(theta, counts, {gradient.data(), model.size()});
  const eb::GradcheckResult r = eb::gradcheck(loss, logits, gradient, {.rtol = 1e-8, .atol = 1e-9});
  CHECK_MESSAGE(r.passed, r.message());
  loss();
  for (double& c : counts) c = -c;
  eb::unigram_theta_backward(theta, counts, counts);  // in place
  CHECK(difference(counts, Reals(gradient.data(), gradient.data() + gradient.size())) == 0);
}

TEST_CASE("properties of sums in alpha") {
  const UnigramModel model = toy::word_model();
  const std::string text = "the water was watching the thing in the water, aaaab";
  eb::Viterbi viterbi;
  const double best = viterbi.run(model, text);
  Lattice lattice;
  CHECK(near(lattice.run(UnigramWeights(model, 0), text),
             std::log(eb::count_segmentations(model, text))));
  {
    const UnigramWeights weights(model, 0);
    lattice.run(weights, text);
    CHECK(near(lattice.moments().entropy, lattice.log_partition()));
  }
  double last_entropy = 1e300, last = 1e300;
  for (const double alpha : {0.01, 0.1, 0.5, 1.0, 2.0, 8.0, 100.0, 1e4}) {
    const UnigramWeights weights(model, alpha);
    const double log_z = lattice.run(weights, text);
    CHECK(log_z >= alpha * best - 1e-13 * std::abs(log_z));
    CHECK(log_z / alpha - best < last + 1e-9);
    last = log_z / alpha - best;
    const double entropy = lattice.moments().entropy;
    CHECK(entropy >= 0);
    CHECK(entropy <= last_entropy + 1e-8);
    last_entropy = entropy;
    double bytes = 0;
    Reals counts(model.size(), 0.0);
    lattice.add_expected_counts(counts);
    for (std::uint32_t p = 0; p < model.size(); ++p) bytes += counts[p] * model.length(p);
    CHECK(near(bytes, static_cast<double>(text.size())));
  }
  CHECK(last < 1e-3);
}

TEST_CASE("weights far below the range of double, inside one piece and over long texts") {
  // 36 rare bytes against one long piece; theta of a byte is 60 nats here.
  const std::string run(36, 'a');
  const UnigramModel model = toy::model_of({{"a", 1}, {run, 1}, {"b", 1}});
  Reals theta(model.size(), -60.0);
  Lattice lattice;
  theta[model.find("b")] = -1e6;
  theta[model.find(run)] = -60.0 * 36 + 1;
  for (const double alpha : {1.0, 1e-3, 5.0}) {
    const UnigramWeights weights(model, theta, alpha);
    // One path by bytes, one by the piece.
    const double want = alpha * -60 * 36 + std::log1p(std::exp(alpha));
    CHECK(near(lattice.run(weights, run), want, 1e-14));
    Reals counts(model.size(), 0.0);
    lattice.run_counts(weights, run, 1, counts);
    const double share = 1 / (1 + std::exp(-alpha));
    CHECK(near(counts[model.find(run)], share, 1e-11));
    CHECK(near(counts[model.find("a")], 36 * (1 - share), 1e-10));
    const std::string doubled = run + "b" + run;
    const double twice = lattice.run(weights, doubled);
    CHECK(near(twice, 2 * want + alpha * -1e6, 1e-13));
    CHECK(near(lattice.boundary(36), 1));
    CHECK(near(lattice.boundary(1), 1 - share, 1e-10));
    CHECK(near(lattice.moments().mean, -1e6 + 2 * (-60 * 36 + share), 1e-12));
  }
  // Positive theta, growing sums: Fibonacci numbers times e^(5 n).
  const UnigramModel fib = toy::model_of({{"a", 1}, {"aa", 1}});
  const std::string text(20000, 'a');
  Reals growing(2);
  for (std::uint32_t p = 0; p < 2; ++p) growing[p] = 5.0 * fib.length(p);
  const UnigramWeights up(fib, growing, 1);
  const double golden = (1 + std::sqrt(5.0)) / 2;
  CHECK(near(lattice.run(up, text),
             20000 * (5 + std::log(golden)) + std::log(golden / std::sqrt(5.0)), 1e-13));
  CHECK(near(lattice.boundary(10000), golden / std::sqrt(5.0), 1e-10));
}

TEST_CASE("sums add up exactly where no piece straddles, and only there") {
  const UnigramModel model = toy::word_model();
  const UnigramWeights weights(model, 1);
  Lattice lattice;
  const std::string text = "the watching of water";
  for (std::size_t i = 1; i < text.size(); ++i) {
    bool straddled = false;
    lattice.run(weights, text);
    lattice.edges([&](std::size_t s, std::size_t e, std::uint32_t, double) {
      straddled = straddled || (s < i && i < e);
    });
    const double whole = lattice.log_partition();
    const double parts = lattice.run(weights, std::string_view(text).substr(0, i)) +
                         lattice.run(weights, std::string_view(text).substr(i));
    if (straddled) {
      CHECK(whole > parts + 1e-9);
    } else {
      CHECK(near(whole, parts));
    }
  }
}

TEST_CASE("a corpus: the same bits for any number of workers, the sum of its texts") {
  const UnigramModel model = toy::word_model();
  const UnigramWeights weights(model, 0.7);
  eb::Random random(6);
  std::vector<std::string> strings;
  Reals frequency;
  for (int i = 0; i < 70; ++i) {
    strings.push_back(
        toy::random_text(random, static_cast<std::size_t>(random.below(60)), "the watrigncb"));
    frequency.push_back(random.uniform());
  }
  const std::vector<std::string_view> texts(strings.begin(), strings.end());
  Reals first(model.size()), want(model.size(), 0.0);
  const double log_z = eb::lattice_expected_counts(weights, texts, frequency, first);
  double sum = 0;
  Lattice lattice;
  for (std::size_t i = 0; i < texts.size(); ++i)
    sum += frequency[i] * lattice.run_counts(weights, texts[i], frequency[i], want);
  CHECK(near(log_z, sum));
  CHECK(difference(first, want) < 1e-11);
  for (const int workers : {1, 2, 3, 7}) {
    eb::thread_pool pool(workers);
    Reals counts(model.size(), -1.0);
    CHECK(eb::lattice_expected_counts(weights, texts, frequency, counts, pool) == log_z);
    CHECK(difference(counts, first) == 0);
  }
  CHECK(eb::lattice_expected_counts(weights, {}, {}, first) == 0);
  CHECK(difference(first, Reals(model.size(), 0.0)) == 0);
}

TEST_CASE("nothing is allocated once the tables have grown") {
  const UnigramModel model = toy::word_model();
  const UnigramWeights weights(model, 1);
  const std::string text = "watching the water";
  Lattice lattice;
  Reals counts(model.size(), 0.0);
  LatticeGrad grad{counts};
  lattice.run(weights, text);
  lattice.add_entropy_grad(1, grad);
  if (!AllocationCount::available) return;
  const AllocationCount count;
  lattice.run_counts(weights, std::string_view(text).substr(2), 1, counts);
  lattice.moments();
  lattice.add_entropy_grad(1, grad);
  CHECK(count.calls() == 0);
}

TEST_CASE("bad input") {
  const UnigramModel model = toy::model_of({{"a", 2}, {"ab", 1}, {"c", 1}});
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  for (const double alpha : {-0.5, nan, inf, -inf}) {
    CHECK_THROWS_AS(UnigramWeights(model, alpha), eb::invalid_argument);
  }
  CHECK(toy::message_of([&] { UnigramWeights(model, -0.5); }) ==
        "eigenblocks: UnigramWeights: alpha (-0.5) must be finite and at least 0");
  CHECK(toy::message_of([&] {
          UnigramWeights(model, Reals{1, 2}, 1);
        }) == "eigenblocks: UnigramWeights: theta has 2 entries, expected 3 (one for each piece)");
  CHECK(toy::message_of([&] {
          UnigramWeights(model, Reals{1, nan, 2}, 1);
        }) == "eigenblocks: UnigramWeights: theta[1] (nan) must be finite");
  CHECK(toy::message_of([&] { UnigramWeights(model, 1e12); }) ==
        "eigenblocks: UnigramWeights: alpha theta[0] (-6.93147181e+11) must be below 1e11 in size");
  UnigramWeights weights(model, 1);
  CHECK_THROWS_AS(weights.reset(Reals{0, 0, inf}, 2), eb::invalid_argument);
  CHECK(weights.alpha() == 1);
  CHECK(weights.theta() == model.log_probs());

  Lattice lattice;
  CHECK(toy::message_of([&] { lattice.log_partition(); }) ==
        "eigenblocks: Lattice: run() must come first");
  Reals counts(3, 7.0), small(2, 7.0);
  CHECK_THROWS_AS(lattice.run(weights, "aabbc"), eb::data_error);
  CHECK(toy::message_of([&] { lattice.run_counts(weights, "aabbc", 1, counts); }) ==
        "eigenblocks: no piece of the model reaches past byte 3 of the text (\"bc\"..)");
  CHECK(counts == Reals(3, 7.0));
  CHECK_THROWS_AS(lattice.moments(), eb::invalid_argument);
  CHECK(eb::count_segmentations(model, "aabbc") == 0);
  CHECK(lattice.run(weights, "aabc") == doctest::Approx(std::log(0.5 * 0.25 * 0.25)));
  CHECK_THROWS_AS(lattice.boundary(5), std::out_of_range);
  CHECK_THROWS_AS(lattice.add_expected_counts(small), eb::invalid_argument);
  LatticeGrad grad{small};
  CHECK(toy::message_of([&] { lattice.add_entropy_grad(1, grad); }) ==
        "eigenblocks: LatticeGrad::theta has 2 entries, expected 3 (one for each piece)");
  CHECK_THROWS_AS(lattice.run_counts(weights, "a", 1, small), eb::invalid_argument);
  CHECK(small == Reals(2, 7.0));
  const std::uint32_t a = model.find("a"), ab = model.find("ab"), c = model.find("c");
  CHECK(toy::message_of([&] {
          lattice.log_prob(Pieces{a, a, c});
        }) ==
        "eigenblocks: Lattice: piece " + std::to_string(c) + " (\"c\") is not the text at byte 2");
  CHECK_THROWS_AS(lattice.log_prob(Pieces{a, ab}), eb::invalid_argument);
  CHECK_THROWS_AS(lattice.log_prob(Pieces{a, c}), eb::invalid_argument);
  CHECK_THROWS_AS(lattice.log_prob(Pieces{a, ab, 3}), eb::invalid_argument);
  CHECK(lattice.log_prob(Pieces{a, ab, c}) == doctest::Approx(0));

  const std::vector<std::string_view> texts{"a", "cx", "ab", "b"};
  CHECK(toy::message_of([&] { eb::lattice_expected_counts(weights, texts, {}, counts); }) ==
        "eigenblocks: lattice_expected_counts: text 1: no piece of the model reaches past byte 1 "
        "(\"x\"..)");
  CHECK(counts == Reals(3, 7.0));
  CHECK_THROWS_AS(eb::lattice_expected_counts(weights, texts, small, counts), eb::invalid_argument);
  CHECK_THROWS_AS(eb::lattice_expected_counts(weights, texts, {}, small), eb::invalid_argument);
  CHECK_THROWS_AS(eb::unigram_theta_forward(counts, small), eb::invalid_argument);
  CHECK_THROWS_AS(eb::unigram_theta_backward(counts, small, counts), eb::invalid_argument);
  CHECK_THROWS_AS(eb::unigram_theta_backward(counts, counts, small), eb::invalid_argument);
  CHECK(small == Reals(2, 7.0));
}

}  // namespace
