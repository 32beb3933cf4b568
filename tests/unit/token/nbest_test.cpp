#include <eigenblocks/token/nbest.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "toy_lattice.hpp"

namespace {

namespace eb = eigenblocks;
using eb::nbest;
using eb::UnigramModel;
using toy::Pieces;

/// All, sorted by score, then ends.  Scores are whole numbers here, so that equal means equal.
std::vector<Pieces> sorted(const UnigramModel& model, const std::vector<double>& theta,
                           const std::string& text) {
  std::vector<Pieces> all = toy::segmentations(model, text);  // by ends
  std::stable_sort(all.begin(), all.end(), [&](const Pieces& a, const Pieces& b) {
    return toy::score(theta, a) > toy::score(theta, b);
  });
  return all;
}

TEST_CASE("the k best in their order, ties by ends") {
  const UnigramModel model = toy::dense_model(2, 3, 1);
  eb::Random random(1);
  for (int round = 0; round < 30; ++round) {
    // Few different scores: many ties.
    std::vector<double> theta(model.size());
    const eb::Index kinds = 1 + round % 4 * 3;
    for (double& t : theta) t = -static_cast<double>(1 + random.below(kinds));
    if (round % 2) {  // each piece as dear as its length: everything is equal
      for (std::uint32_t p = 0; p < model.size(); ++p) theta[p] = -1.0 * model.length(p);
    }
    const std::string text = toy::random_text(random, static_cast<std::size_t>(round % 11), "ab");
    const std::vector<Pieces> want = sorted(model, theta, text);
    const std::size_t size = want.size();
    for (const std::size_t k : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{7},
                                size - 1, size, size + 5, std::size_t{1} << 60}) {
      const auto got = nbest(model, theta, text, static_cast<std::ptrdiff_t>(k));
      REQUIRE(got.size() == std::min(k, size));
      bool same = true;
      for (std::size_t i = 0; i < got.size(); ++i)
        same = same && got[i].pieces == want[i] && got[i].score == toy::score(theta, want[i]);
      CHECK_MESSAGE(same, "round ", round, ", k ", k);
    }
  }
}

TEST_CASE("scores of a model: the same as by sorting all") {
  const UnigramModel model = toy::dense_model(3, 4, 5);
  eb::Random random(3);
  for (int round = 0; round < 5; ++round) {
    const std::string text = toy::random_text(random, 12, "abc");
    const std::vector<Pieces> want = sorted(model, model.log_probs(), text);
    const auto got = nbest(model, text, 300);
    REQUIRE(got.size() == 300);
    for (std::size_t i = 0; i < got.size(); ++i) {
      CHECK_MESSAGE(std::abs(got[i].score - toy::score(model.log_probs(), want[i])) < 1e-12, i);
      CHECK_MESSAGE(got[i].score == toy::score(model.log_probs(), got[i].pieces), i);
      // Where the order is not one of rounding, it is that of permutations: exactly equal, by ends.
      if (i > 0 && std::abs(got[i].score - got[i - 1].score) < 1e-12) {
        Pieces a = got[i - 1].pieces, b = got[i].pieces;
        std::sort(a.begin(), a.end());
        std::sort(b.begin(), b.end());
        if (a == b)
          CHECK_MESSAGE(eb::segmentation_ends(model, got[i - 1].pieces) <
                            eb::segmentation_ends(model, got[i].pieces),
                        i);
      }
    }
    eb::Viterbi viterbi;
    CHECK(viterbi.run(model, text) == doctest::Approx(got[0].score).epsilon(1e-14));
  }
}

TEST_CASE("a long text of equal segmentations") {
  const UnigramModel model = toy::model_of({{"a", 1}, {"aa", 1}});
  const std::string text(600, 'a');
  std::vector<double> theta(2);
  for (std::uint32_t p = 0; p < 2; ++p) theta[p] = -0.1 * model.length(p);
  const auto got = nbest(model, theta, text, 500);
  REQUIRE(got.size() == 500);
  // All single bytes first, then the latest pair first: 1 1 .. 1 2, 1 1 .. 2 1, ..
  CHECK(got[0].pieces.size() == 600);
  CHECK(got[1].pieces.size() == 599);
  bool ordered = true;
  for (std::size_t i = 1; i < got.size(); ++i) {
    ordered = ordered && eb::segmentation_ends(model, got[i - 1].pieces) <
                             eb::segmentation_ends(model, got[i].pieces);
  }
  CHECK(ordered);
  // Few pieces best: one pair less after the other.
  const auto few = nbest(model, text, 302);
  CHECK(few[0].pieces.size() == 300);
  CHECK(few[1].pieces.size() == 301);
  CHECK(few[301].pieces.size() == 301);
  CHECK(eb::segmentation_ends(model, few[1].pieces).front() == 1);
  CHECK(eb::segmentation_ends(model, few[1].pieces)[1] == 2);
}

TEST_CASE("empty text, bad input") {
  const UnigramModel model = toy::model_of({{"a", 2}, {"ab", 1}});
  REQUIRE(nbest(model, "", 3).size() == 1);
  CHECK(nbest(model, "", 3)[0] == eb::Segmentation{});
  CHECK(nbest(model, "a", 0).empty());
  CHECK(eb::segmentation_ends(model, Pieces{}).empty());
  CHECK(toy::message_of([&] { nbest(model, "a", -1); }) ==
        "eigenblocks: nbest: k (-1) must be at least 0");
  CHECK_THROWS_AS(nbest(model, "a", -1), eb::invalid_argument);
  CHECK_THROWS_AS(nbest(model, "aba?", 1), eb::data_error);
  CHECK(toy::message_of([&] { nbest(model, "aba?", 1); }) ==
        "eigenblocks: no piece of the model reaches past byte 3 of the text (\"?\"..)");
  CHECK(toy::message_of([&] { nbest(model, std::vector<double>{1}, "a", 1); }) ==
        "eigenblocks: nbest: theta has 1 entries, expected 2 (one for each piece)");
  const double inf = std::numeric_limits<double>::infinity();
  CHECK_THROWS_AS(nbest(model, std::vector<double>{1, -inf}, "a", 1), eb::invalid_argument);
}

}  // namespace
