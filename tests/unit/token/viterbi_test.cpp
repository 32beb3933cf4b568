// UnigramModel, and Viterbi against the definition: every segmentation, and the package's order of candidates.
#include <doctest/doctest.h>
#include <eigenblocks/token/viterbi.hpp>

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "support/alloc_guard.hpp"

namespace eb = eigenblocks;
using eb::TokenId;
using eb::UnigramModel;

namespace {

using Counts = std::vector<std::pair<std::string, double>>;
using Pieces = std::vector<eb::UnigramPiece>;

double small(std::mt19937& random) { return static_cast<double>(1 + random() % 4); }

/// All strings up to a length are pieces with some probability; counts are small, so that scores tie.
UnigramModel tied_model(std::mt19937& random) {
  Counts counts{{"a", small(random)}, {"b", small(random)}};
  std::vector<std::string> longer{"a", "b"};
  for (std::size_t i = 0; i < longer.size() && longer[i].size() < 4; ++i) {
    for (const char* c : {"a", "b"}) {
      longer.push_back(longer[i] + c);
      if (random() % 2 != 0) counts.emplace_back(longer.back(), small(random));
    }
  }
  return UnigramModel::from_counts(counts);
}

/// As the package: ends from left to right, starts from left to right, strictly better wins.
std::vector<TokenId> pull_encode(const UnigramModel& model, const std::string& text, double& best) {
  const double none = -std::numeric_limits<double>::infinity();
  std::vector<double> score(text.size() + 1, none);
  std::vector<std::size_t> from(text.size() + 1);
  score[0] = 0;
  for (std::size_t e = 1; e <= text.size(); ++e) {
    for (std::size_t s = 0; s < e; ++s) {
      const auto p = model.find(text.substr(s, e - s));
      if (p == eb::ByteTrie::kNone || score[s] == none) continue;
      if (score[s] + model.log_prob(p) > score[e]) {
        score[e] = score[s] + model.log_prob(p);
        from[e] = s;
      }
    }
  }
  best = score[text.size()];
  std::vector<TokenId> ids;
  for (std::size_t e = text.size(); e > 0; e = from[e]) {
    ids.insert(ids.begin(), model.id(model.find(text.substr(from[e], e - from[e]))));
  }
  return ids;
}

double brute_force_best(const UnigramModel& model, const std::string& text) {
  double best = -std::numeric_limits<double>::infinity();
  std::function<void(std::size_t, double)> go = [&](std::size_t at, double score) {
    if (at == text.size()) best = std::max(best, score);
    for (std::size_t length = 1; at + length <= text.size(); ++length) {
      const auto p = model.find(text.substr(at, length));
      if (p != eb::ByteTrie::kNone) go(at + length, score + model.log_prob(p));
    }
  };
  go(0, 0.0);
  return best;
}

}  // namespace

TEST_CASE("viterbi: equals the pull form to the bit, ties included, and beats every segmentation") {
  std::mt19937 random(3);
  eb::Viterbi viterbi;
  for (int trial = 0; trial < 300; ++trial) {
    const UnigramModel model = tied_model(random);
    std::string text(random() % 14, 'a');
    for (char& c : text) c = random() % 2 != 0 ? 'a' : 'b';
    CAPTURE(text);
    double want = 0;
    const auto ids = pull_encode(model, text, want);
    CHECK(viterbi.run(model, text) == want);
    CHECK(want == brute_force_best(model, text));
    std::vector<TokenId> got{7};  // what is there stays
    viterbi.append_ids(model, got);
    CHECK(got.front() == 7);
    got.erase(got.begin());
    CHECK(got == ids);
    CHECK(eb::viterbi_encode(model, text) == ids);
    std::vector<std::uint32_t> pieces;
    viterbi.append_pieces(model, pieces);
    std::string joined;
    for (const auto p : pieces) joined += model.piece(p);
    CHECK(joined == text);
  }
}

TEST_CASE("viterbi: of two equal segmentations the longest last piece stays") {
  // p(a) p(aa) = p(aa) p(a): "a|aa" and "aa|a" tie, and the last piece decides.
  const auto model = UnigramModel::from_counts(Counts{{"a", 1}, {"aa", 4}});
  CHECK(eb::viterbi_encode(model, "aaa") == std::vector<TokenId>{3, 4});
}

TEST_CASE("viterbi: the tables are allocated once") {
  std::mt19937 random(5);
  const UnigramModel model = tied_model(random);
  eb::Viterbi viterbi;
  const std::string text(1000, 'a');
  std::vector<TokenId> ids;
  ids.reserve(5000);
  viterbi.run(model, text);
  if (!AllocationCount::available) return;
  const AllocationCount count;
  for (const std::size_t size : {1000u, 10u, 0u, 999u}) {
    viterbi.run(model, std::string_view(text).substr(0, size));
    viterbi.append_ids(model, ids);
  }
  CHECK(count.calls() == 0);
}

TEST_CASE("viterbi: a byte that is no piece") {
  const auto model = UnigramModel::from_counts(Counts{{"a", 1}, {"ab", 1}});
  eb::Viterbi viterbi;
  CHECK_FALSE(model.covers_all_bytes());
  CHECK(viterbi.search(model, "abaab"));
  CHECK_FALSE(viterbi.search(model, "aab\xff..."));
  const char* message =
      "eigenblocks: no piece of the model reaches past byte 3 of the text (\"\\xff...\"..)";
  CHECK_THROWS_WITH_AS(viterbi.run(model, "aab\xff..."), message, eb::data_error);
  CHECK_THROWS_AS(eb::viterbi_encode(model, "b"), eb::data_error);
  CHECK(viterbi.run(model, "") == 0.0);  // and the object is none the worse
  CHECK(eb::viterbi_encode(UnigramModel(), "").empty());
  CHECK_THROWS_AS(eb::viterbi_encode(UnigramModel(), "a"), eb::data_error);
}

TEST_CASE("unigram model: numbers") {
  const auto model = UnigramModel::from_counts(Counts{{"bb", 2}, {"a", 5}, {"b", 7}, {"ab", 2}});
  CHECK(model.size() == 4);
  CHECK(model.vocab_size() == 7);
  CHECK(model.max_piece_length() == 2);
  CHECK(model.total_count() == 16);
  const Pieces want{{"a", 3, 5}, {"b", 4, 7}, {"ab", 5, 2}, {"bb", 6, 2}};
  CHECK(model.pieces() == want);
  for (const auto& piece : want) {
    const auto p = model.find(piece.bytes);
    CHECK(model.piece(p) == piece.bytes);
    CHECK(model.length(p) == piece.bytes.size());
    CHECK(model.id(p) == piece.id);
    CHECK(model.index(piece.id) == p);
    CHECK(model.count(p) == piece.count);
    CHECK(model.log_prob(p) == std::log(piece.count) - std::log(16.0));
  }
  CHECK(model.find("ba") == eb::ByteTrie::kNone);
  CHECK(model.bytes() > model.trie().bytes());
}

TEST_CASE("unigram model: ids of any order, with gaps and far away") {
  const Pieces pieces{{"x", 2147483647, 1}, {"y", 3, 1}, {"z", 100000, 1}};
  const auto model = UnigramModel::from_counts(pieces);
  for (const auto& piece : pieces) CHECK(model.piece(model.index(piece.id)) == piece.bytes);
  for (const TokenId id : {-1, 0, 2, 4, 99999, 2147483646}) {
    CAPTURE(id);
    CHECK_THROWS_AS(model.index(id), std::out_of_range);
  }
}

TEST_CASE("unigram model: bad pieces are named") {
  const auto bad = [](const Pieces& pieces, const char* message) {
    const std::string want = std::string("eigenblocks: UnigramModel: ") + message;
    CHECK_THROWS_WITH_AS(UnigramModel::from_counts(pieces), want.c_str(), eb::invalid_argument);
  };
  bad({{"a", 3, 1}, {"\xff", 2, 1}}, "piece \"\\xff\" has id 2, must be at least 3");
  bad({{"a", 3, 0}}, "piece \"a\" has count 0, must be positive and finite");
  bad({{"a", 3, -1}}, "piece \"a\" has count -1, must be positive and finite");
  bad({{"a", 3, std::nan("")}}, "piece \"a\" has count nan, must be positive and finite");
  bad({{"a", 3, HUGE_VAL}}, "piece \"a\" has count inf, must be positive and finite");
  bad({{"a", 3, 1e308}, {"b", 4, 1e308}}, "the sum of all counts is infinite");
  bad({{"", 3, 1}}, "the piece with id 3 is empty");
  bad({{"a", 3, 1}, {"b", 4, 1}, {"a", 5, 1}}, "piece \"a\" occurs twice");
  bad({{"a", 3, 1}, {"b", 3, 1}}, "pieces \"a\" and \"b\" have the same id 3");
}
