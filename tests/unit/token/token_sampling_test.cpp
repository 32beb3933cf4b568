#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/token/lattice.hpp>
#include <eigenblocks/token/sampling.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "support/alloc_guard.hpp"
#include "support/chi_square.hpp"
#include "toy_lattice.hpp"

namespace {

namespace eb = eigenblocks;
using eb::SamplingRule;
using eb::UnigramModel;
using eb::UnigramWeights;
using toy::Pieces;
using Law = std::map<Pieces, double>;

Law exact_law(const UnigramWeights& weights, const std::string& text) {
  Law law;
  double total = 0;
  for (const Pieces& y : toy::segmentations(weights.model(), text))
    total += law[y] = std::exp(weights.alpha() * toy::score(weights.theta(), y));
  for (auto& [y, p] : law) p /= total;
  return law;
}

template <class Draw>
double chi_square_p(const Law& law, int draws, Draw&& draw) {
  std::map<Pieces, double> seen;
  for (int i = 0; i < draws; ++i) ++seen[draw()];
  std::vector<double> observed, probability;
  std::size_t known = 0;
  for (const auto& [y, p] : law) {
    const auto found = seen.find(y);
    known += found != seen.end();
    observed.push_back(found == seen.end() ? 0 : found->second);
    probability.push_back(p);
  }
  return known == seen.size() ? stats::chi_square_p(observed, probability) : 0;
}

TEST_CASE("the chi-square test itself") {
  CHECK(stats::gamma_q(0.5, 3.841458820694124 / 2) == doctest::Approx(0.05));
  CHECK(stats::gamma_q(5, 18.307038053275146 / 2) == doctest::Approx(0.05));
  CHECK(stats::chi_square_p({50, 50}, {0.5, 0.5}) == doctest::Approx(1));
  CHECK(stats::chi_square_p({90, 10}, {0.5, 0.5}) < 1e-12);
  CHECK(stats::chi_square_p({1, 99}, {0, 1}) == 0);
}

TEST_CASE("exact samplers have the law of the model") {
  const UnigramModel model = toy::dense_model(2, 3, 1);
  const std::string text = "abbaba";
  for (const double alpha : {0.0, 0.3, 1.0}) {
    const UnigramWeights weights(model, alpha);
    const Law law = exact_law(weights, text);
    eb::LatticeSampler sampler;
    Pieces pieces;
    for (const SamplingRule rule : {SamplingRule::perfect, SamplingRule::reservoir}) {
      eb::Random random(11, static_cast<std::uint64_t>(rule));
      double worst = 0;
      const double p = chi_square_p(law, 20000, [&] {
        pieces.clear();
        const double log_p = eb::sample_segmentation(sampler, weights, text, random, pieces, rule);
        worst = std::max(worst, std::abs(log_p - std::log(law.at(pieces))));
        return pieces;
      });
      CHECK(p > 1e-4);
      CHECK(worst < 1e-12);
    }
    std::mt19937 standard(5);
    sampler.run(weights, text);
    CHECK(chi_square_p(law, 20000, [&] {
            pieces.clear();
            sampler.draw(standard, pieces);
            return pieces;
          }) > 1e-4);
    const std::vector<eb::Segmentation> all = eb::nbest(model, text, 1000);
    eb::Random random(12);
    CHECK(chi_square_p(law, 20000,
                       [&] { return all[eb::sample_from(all, alpha, random)].pieces; }) > 1e-4);
  }
}

TEST_CASE("mean log probability of samples is minus the entropy") {
  const UnigramModel model = toy::word_model();
  const std::string text = "the watching of the water, aaaa";
  const UnigramWeights weights(model, 0.3);
  eb::Lattice lattice;
  lattice.run(weights, text);
  eb::LatticeSampler sampler;
  CHECK(sampler.run(weights, text) == doctest::Approx(lattice.log_partition()).epsilon(1e-13));
  eb::Random random(1);
  Pieces pieces;
  double sum = 0, square = 0;
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) {
    pieces.clear();
    const double log_p = sampler.draw(random, pieces);
    CHECK_MESSAGE(std::abs(log_p - lattice.log_prob(pieces)) < 1e-12, i);
    sum += log_p;
    square += log_p * log_p;
  }
  const double mean = sum / kDraws, deviation = std::sqrt((square / kDraws - mean * mean) / kDraws);
  CHECK(std::abs(mean + lattice.moments().entropy) < 4 * deviation);
}

TEST_CASE("the legacy rule has its own, biased law") {
  // Three equal segmentations of "watching": the one whose last piece is shortest gets a half.
  const UnigramModel watch =
      toy::model_of({{"watching", 1}, {"w", 1}, {"atching", 1}, {"watch", 1}, {"ing", 1}});
  std::vector<double> theta(watch.size(), -1.0);
  theta[watch.find("watching")] = -2;
  const UnigramWeights weights(watch, theta, 0.7);
  const auto law = eb::legacy_law(weights, "watching");
  REQUIRE(law.size() == 3);
  CHECK(law[0].pieces == Pieces{watch.find("w"), watch.find("atching")});
  CHECK(law[0].probability == doctest::Approx(0.25));
  CHECK(law[1].pieces == Pieces{watch.find("watch"), watch.find("ing")});
  CHECK(law[1].probability == doctest::Approx(0.5));
  CHECK(law[2].probability == doctest::Approx(0.25));

  const UnigramModel model = toy::dense_model(2, 3, 1);
  const std::string text = "abbab";
  for (const double alpha : {0.0, 0.2, 1.0}) {
    const UnigramWeights dense(model, alpha);
    Law legacy;
    double total = 0, variation = 0;
    for (const auto& y : eb::legacy_law(dense, text)) total += legacy[y.pieces] = y.probability;
    CHECK(total == doctest::Approx(1).epsilon(1e-12));
    for (const auto& [y, p] : exact_law(dense, text)) variation += std::abs(p - legacy[y]) / 2;
    CHECK(variation > 1e-3);
    eb::LatticeSampler sampler;
    eb::Random random(3);
    Pieces pieces;
    double log_p = 0;
    CHECK(chi_square_p(legacy, 20000, [&] {
            pieces.clear();
            log_p =
                eb::sample_segmentation(sampler, dense, text, random, pieces, SamplingRule::legacy);
            return pieces;
          }) > 1e-4);
    CHECK(std::isnan(log_p));
    if (alpha == 0) {
      eb::Viterbi viterbi;
      viterbi.run(model, text);
      Pieces best;
      viterbi.append_pieces(model, best);
      CHECK(legacy[best] == 1);
    }
  }
}

TEST_CASE("without replacement: distinct, first as single draws, inclusion as promised") {
  const UnigramModel model = toy::dense_model(2, 3, 7);
  const std::string text = "abba";
  const UnigramWeights weights(model, 0.5);
  const Law law = exact_law(weights, text);
  eb::Random random(4);
  CHECK(chi_square_p(law, 20000, [&] {
          return eb::sample_without_replacement(weights, text, 1, random).samples.at(0).pieces;
        }) > 1e-4);
  // The second, given the first: proportional to what is left.
  Law pairs;
  for (const auto& [a, p] : law) {
    for (const auto& [b, q] : law) {
      if (a == b) continue;
      Pieces both = a;
      both.push_back(999);
      both.insert(both.end(), b.begin(), b.end());
      pairs[both] = p * q / (1 - p);
    }
  }
  CHECK(chi_square_p(pairs, 40000, [&] {
          const auto s = eb::sample_without_replacement(weights, text, 2, random);
          Pieces both = s.samples.at(0).pieces;
          both.push_back(999);
          both.insert(both.end(), s.samples.at(1).pieces.begin(), s.samples.at(1).pieces.end());
          return both;
        }) > 1e-4);
  // Sum over samples of 1 / inclusion probability is an unbiased count of the segmentations (Horvitz and Thompson).
  double count = 0;
  constexpr int kRounds = 4000;
  for (int i = 0; i < kRounds; ++i) {
    const auto s = eb::sample_without_replacement(weights, text, 4, random);
    for (std::size_t j = 0; j < s.samples.size(); ++j) {
      count += 1 / s.inclusion_probability(j) / kRounds;
      CHECK_MESSAGE(std::abs(s.samples[j].log_prob - std::log(law.at(s.samples[j].pieces))) < 1e-12,
                    j);
      CHECK_MESSAGE(s.samples[j].perturbed > s.kappa, j);
    }
  }
  CHECK(count == doctest::Approx(static_cast<double>(law.size())).epsilon(0.05));

  const auto all = eb::sample_without_replacement(weights, text, 1000, random);
  std::set<Pieces> distinct;
  for (const auto& s : all.samples) distinct.insert(s.pieces);
  CHECK(distinct.size() == law.size());
  CHECK(all.samples.size() == law.size());
  CHECK(all.kappa == -std::numeric_limits<double>::infinity());
  CHECK(eb::sample_without_replacement(weights, text, 0, random).samples.empty());
  const auto empty = eb::sample_without_replacement(weights, "", 3, random);
  REQUIRE(empty.samples.size() == 1);
  CHECK(empty.samples[0].pieces.empty());
  CHECK(empty.samples[0].log_prob == 0);
  // A long text: the agenda is cut, samples stay distinct.
  const std::string text_of_many = toy::random_text(random, 300, "ab");
  const auto many = eb::sample_without_replacement(weights, text_of_many, 40, random);
  distinct.clear();
  for (const auto& s : many.samples) distinct.insert(s.pieces);
  CHECK(distinct.size() == 40);
}

TEST_CASE("one of the n best") {
  const UnigramModel model = toy::dense_model(2, 3, 1);
  const auto five = eb::nbest(model, "abbaba", 5);
  Law law;
  double total = 0;
  for (const auto& y : five) total += law[y.pieces] = std::exp(0.8 * y.score);
  for (auto& [y, p] : law) p /= total;
  eb::Random random(8);
  CHECK(chi_square_p(law, 20000, [&] { return five[eb::sample_from(five, 0.8, random)].pieces; }) >
        1e-4);
  CHECK(eb::sample_from(std::span(five).first(1), 0.8, random) == 0);
  CHECK(eb::sample_from(five, 1e6, random) == 0);  // weights that underflow are never drawn
}

TEST_CASE("documents draw from streams of their own") {
  const UnigramModel model = toy::word_model();
  const UnigramWeights weights(model, 0.2);
  eb::Random random(1);
  std::vector<std::string> strings;
  for (int i = 0; i < 40; ++i)
    strings.push_back(toy::random_text(random, static_cast<std::size_t>(i), "the watrigncb\n"));
  const std::vector<std::string_view> texts(strings.begin(), strings.end());
  const auto ids = eb::sample_encode(weights, texts, 17, 100);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    std::string joined;
    for (const eb::TokenId id : ids[i]) joined += model.piece(model.index(id));
    CHECK(joined == texts[i]);
  }
  for (const int workers : {2, 3, 7}) {
    eb::thread_pool pool(workers);
    CHECK(eb::sample_encode(weights, texts, 17, 100, pool) == ids);
  }
  CHECK(eb::sample_encode(weights, std::span(texts).subspan(25, 5), 17, 125) ==
        std::vector(ids.begin() + 25, ids.begin() + 30));
  CHECK(eb::sample_encode(weights, texts, 18, 100) != ids);
  CHECK(eb::sample_encode(weights, texts, 17, 101) != ids);
}

TEST_CASE("weights far apart, long texts, no allocation") {
  const UnigramModel model = toy::word_model();
  std::string text;
  for (int i = 0; i < 400; ++i) text += "the water watching ";
  eb::LatticeSampler sampler;
  Pieces pieces, best;
  eb::Viterbi viterbi;
  const double score = viterbi.run(model, text);
  for (const double alpha : {0.0, 1.0, 30.0, 1e5}) {
    const UnigramWeights weights(model, alpha);
    for (const SamplingRule rule : {SamplingRule::perfect, SamplingRule::reservoir}) {
      eb::Random random(9);
      pieces.clear();
      const double log_p = eb::sample_segmentation(sampler, weights, text, random, pieces, rule);
      CHECK(eb::segmentation_ends(model, pieces).back() == text.size());
      CHECK(log_p <= 1e-6);
      if (alpha == 1e5)
        CHECK(toy::score(model.log_probs(), pieces) == doctest::Approx(score).epsilon(1e-12));
    }
  }
  // A text and its second half: the draws are the same over the part that both have.
  constexpr std::size_t kHalf = std::size_t{1} << 16;
  while (text.size() <= kHalf) text += text;
  for (const double alpha : {0.1, 30.0}) {
    const UnigramWeights weights(model, alpha);
    const std::string_view end = std::string_view(text).substr(text.size() / 2);
    eb::Random random(9), same(9);
    Pieces walked;
    pieces.clear();
    sampler.run(weights, end.substr(0, 0));
    sampler.run(weights, text);
    eb::Lattice lattice;
    lattice.run(weights, text);
    const double log_p = sampler.draw(random, walked);
    CHECK(log_p == doctest::Approx(lattice.log_prob(walked)).epsilon(1e-12));
    // B of equal ends is equal: from the same uniform number comes the same piece.
    REQUIRE(end.size() <= kHalf);
    sampler.run(weights, end);
    sampler.draw(same, pieces);
    CHECK(eb::segmentation_ends(model, pieces).back() == end.size());
    CHECK(std::equal(pieces.begin(), pieces.begin() + 1000, walked.begin()));
  }
  text.resize(7000);
  if (!AllocationCount::available) return;
  const UnigramWeights weights(model, 1);
  sampler.run(weights, text);
  eb::Random random(9);
  pieces.clear();
  pieces.reserve(text.size());
  const AllocationCount count;
  sampler.run(weights, text);
  sampler.draw(random, pieces);
  CHECK(count.calls() == 0);
}

TEST_CASE("bad input") {
  const UnigramModel model = toy::model_of({{"a", 2}, {"ab", 1}});
  const UnigramWeights weights(model, 1);
  eb::LatticeSampler sampler;
  eb::Random random(1);
  Pieces pieces{5};
  CHECK(toy::message_of([&] { sampler.draw(random, pieces); }) ==
        "eigenblocks: LatticeSampler: run() must come first");
  const std::string error =
      "eigenblocks: no piece of the model reaches past byte 3 of the text (\"ba\"..)";
  for (const SamplingRule rule :
       {SamplingRule::perfect, SamplingRule::reservoir, SamplingRule::legacy}) {
    CHECK(toy::message_of([&] {
            eb::sample_segmentation(sampler, weights, "aabba", random, pieces, rule);
          }) == error);
  }
  CHECK(toy::message_of([&] { eb::legacy_law(weights, "aabba"); }) == error);
  CHECK_THROWS_AS(eb::sample_without_replacement(weights, "aabba", 1, random), eb::data_error);
  CHECK_THROWS_AS(sampler.log_partition(), eb::invalid_argument);
  CHECK(toy::message_of([&] { eb::sample_without_replacement(weights, "a", -1, random); }) ==
        "eigenblocks: sample_without_replacement: k (-1) must be at least 0");
  CHECK_THROWS_AS(eb::sample_from({}, 1, random), eb::invalid_argument);
  const auto one = eb::nbest(model, "a", 1);
  CHECK_THROWS_AS(eb::sample_from(one, -1, random), eb::invalid_argument);
  CHECK_THROWS_AS(
      eb::sample_segmentation(sampler, weights, "a", random, pieces, static_cast<SamplingRule>(9)),
      eb::invalid_argument);
  const std::vector<std::string_view> texts{"a", "b"};
  CHECK(toy::message_of([&] { eb::sample_encode(weights, texts, 1); }) ==
        "eigenblocks: sample_encode: text 1: no piece of the model reaches past byte 0 (\"b\"..)");
  const UnigramModel dense = toy::dense_model(2, 3, 1);
  CHECK(toy::message_of([&] { eb::legacy_law(UnigramWeights(dense, 1), "abb", 5); }) ==
        "eigenblocks: legacy_law: 6 combinations of decisions, the limit is 5");
  CHECK(eb::legacy_law(UnigramWeights(dense, 1), "abb", 6).size() == 4);
  CHECK(pieces == Pieces{5});
}

}  // namespace
