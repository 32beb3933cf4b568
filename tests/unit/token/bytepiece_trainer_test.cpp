// The trainer: the n-gram model against its definition, and what must hold of every vocabulary.  (Equality with the package's
// files: golden op train.)
#include <doctest/doctest.h>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/token/bytepiece_trainer.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace eb = eigenblocks;
using eb::Index;

namespace {

using Texts = std::vector<std::string>;

/// g by counting substrings, one at a time.
std::map<std::string, double> gains_by_definition(const Texts& segments,
                                                  const eb::NgramOptions& options) {
  std::map<std::string, double> count, gain;
  for (const std::string& segment : segments) {
    for (std::size_t i = 0; i < segment.size(); ++i) {
      ++count[""];
      for (std::size_t n = 1;
           n <= static_cast<std::size_t>(options.order) && i + n <= segment.size(); ++n)
        ++count[segment.substr(i, n)];
    }
  }
  for (int c = 0; c < 256; ++c) {
    if (count.try_emplace(std::string(1, static_cast<char>(c)), 1).second) ++count[""];
  }
  for (const auto& [w, c] : count) {
    if (w.empty() || (w.size() > 1 && c < static_cast<double>(options.min_count))) continue;
    gain[w] = std::log(c) - std::log(count[w.substr(0, w.size() - 1)]);
  }
  return gain;
}

/// The package's dense recursion: every state may follow every other, most with weight -inf.
Texts cut_by_definition(const std::map<std::string, double>& gain, const eb::NgramOptions& options,
                        const std::string& text) {
  const double none = -std::numeric_limits<double>::infinity();
  const auto K = static_cast<std::size_t>(options.order);
  std::vector<std::vector<double>> v(text.size(), std::vector<double>(K, none));
  std::vector<std::vector<std::size_t>> from(text.size(), std::vector<std::size_t>(K, 0));
  for (std::size_t i = 0; i < text.size(); ++i) {
    for (std::size_t j = 0; j < K; ++j) {
      double emission = none;
      if (j <= i) {
        const auto found = gain.find(text.substr(i - j, j + 1));
        if (found != gain.end()) emission = found->second;
      }
      if (options.ensure_unicode && j == 0 && (static_cast<unsigned char>(text[i]) & 0xc0) == 0x80)
        emission = none;
      if (i == 0) {
        v[i][j] = emission;
        continue;
      }
      for (std::size_t k = 0; k < K; ++k) {
        const bool allowed = j == 0 || j == std::min(k + 1, K - 1);
        const double x = v[i - 1][k] + (allowed ? 0 : none) + emission;
        if (x > v[i][j]) {
          v[i][j] = x;
          from[i][j] = k;
        }
      }
    }
  }
  std::vector<bool> starts(text.size());
  std::size_t state = static_cast<std::size_t>(std::max_element(v.back().begin(), v.back().end()) -
                                               v.back().begin());
  for (std::size_t i = text.size(); i-- > 0;) {
    starts[i] = state == 0;
    state = from[i][state];
  }
  Texts pieces;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (i == 0 || starts[i]) pieces.emplace_back();
    pieces.back() += text[i];
  }
  return pieces;
}

Texts cut(const eb::NgramModel& model, const std::string& text) {
  Texts pieces;
  eb::NgramSegmenter segmenter(model);
  segmenter.run("something before", [](std::string_view) {});  // tables are used again
  segmenter.run(text, [&](std::string_view piece) { pieces.emplace_back(piece); });
  return pieces;
}

eb::NgramModel counted(const Texts& segments, const eb::NgramOptions& options) {
  eb::NgramCounter even(options.order), odd(options.order);
  for (std::size_t i = 0; i < segments.size(); ++i) (i % 2 == 0 ? even : odd).add(segments[i]);
  even.add(odd);
  return eb::NgramModel(even.sorted(), options);
}

std::string words(std::mt19937& random, std::size_t count) {
  static const std::string parts[] = {"the ",         "watch",    "wat",
                                      "ing ",         "ab",       "a",
                                      "12",           "\n",       "\xe6\x98\xa5\xe7\x9c\xa0",
                                      "\xe6\x98\xa5", "\xc3\xa9", "\xf0\x9f\x98\x80",
                                      "\xe9\xbe\x98"};
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = random() % (std::size(parts) * 2);
    text += parts[at < std::size(parts) ? at : at % 4];
  }
  return text;
}

bool ascii_digit(char32_t c) { return c >= U'0' && c <= U'9'; }

eb::BytePieceTrainerOptions options_for_tests() {
  return {.max_vocab_size = {1000, 300, 280, 259},
          .normalizer = eb::no_normalization,
          .is_digit = ascii_digit};
}

using Trained = std::vector<eb::TrainedVocabulary>;
void check_equal(const Trained& a, const Trained& b) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    CHECK(a[i].max_vocab_size == b[i].max_vocab_size);
    CHECK(a[i].model.pieces() == b[i].model.pieces());
  }
}

}  // namespace

TEST_CASE("n-gram model: cuts as its definition does") {
  std::mt19937 random(1);
  for (const Index order : {1, 2, 3, 4, 6, 7, 8, 11}) {
    for (int trial = 0; trial < 12; ++trial) {
      const eb::NgramOptions options{
          .order = order, .min_count = 1 + trial % 3, .ensure_unicode = trial % 2 == 0};
      Texts segments;
      for (int i = 0; i < 6; ++i) segments.push_back(words(random, 1 + random() % 12));
      if (trial % 4 == 3) segments.push_back(std::string(40, 'a'));
      const auto gain = gains_by_definition(segments, options);
      const eb::NgramModel model = counted(segments, options);
      CHECK(model.size() == gain.size() - 256);
      segments.push_back(words(random, 10));
      segments.push_back("\xe9\xbe\x99 not seen");
      for (const std::string& segment : segments)
        CHECK(cut(model, segment) == cut_by_definition(gain, options, segment));
    }
  }
  CHECK(cut(counted({"ab"}, {}), "").empty());
}

TEST_CASE("n-gram model: a character that was dropped breaks its segment, unless rescued") {
  const std::string rare = "\xe9\xbe\x98", spring = "\xe6\x98\xa5\xe7\x9c\xa0";
  Texts segments(5, spring + spring);
  segments.push_back(spring + rare + spring);
  const eb::NgramModel broken = counted(segments, {.min_count = 2});
  const eb::NgramModel rescued = counted(segments, {.min_count = 2, .rescue = true});
  CHECK(cut(broken, segments.back()).size() == 1 + 3 + 6);
  const Texts pieces = cut(rescued, segments.back());
  CHECK(pieces == Texts{spring, "\xe9", "\xbe", "\x98", spring});
  CHECK(cut(rescued, segments[0]) == cut(broken, segments[0]));
  CHECK(cut(rescued, rare) == Texts{"\xe9", "\xbe", "\x98"});
  CHECK(cut(rescued, rare + rare + "a") ==
        Texts{"\xe9", "\xbe", "\x98", "\xe9", "\xbe", "\x98", "a"});
  // The bytes of the character start no window either, although "\x98" "a" is a frequent one.
  for (const std::string frequent :
       {"\xe6\xbe\x98", "\xc2\xbe"}) {  // with the last, or the second, byte of `rare`
    Texts common(5, frequent + "a");
    common.push_back(rare + "a");
    CHECK(cut(counted(common, {.rescue = true}), common.back()) ==
          Texts{"\xe9", "\xbe", "\x98", "a"});
  }
  const eb::NgramModel order_one = counted(segments, {.order = 1, .rescue = true});
  CHECK(cut(order_one, spring).size() == 6);
}

TEST_CASE("trainer: the same vocabularies for every order of the texts and number of workers") {
  std::mt19937 random(2);
  Texts texts;
  for (int i = 0; i < 8; ++i) texts.push_back(words(random, i == 3 ? 60000 : 300));
  const Trained want = eb::train_bytepiece(texts, options_for_tests());
  REQUIRE(want.size() == 4);
  CHECK(want[3].model.size() == 256);
  std::reverse(texts.begin(), texts.end());
  for (const int workers : {1, 2, 3, 7}) {
    const eb::thread_pool pool(workers);
    check_equal(eb::train_bytepiece(texts, options_for_tests(), pool), want);
  }
}

TEST_CASE("trainer: what holds of every vocabulary") {
  std::mt19937 random(3);
  for (int trial = 0; trial < 12; ++trial) {
    Texts texts;
    for (int i = 0; i < 5; ++i) texts.push_back(words(random, 200));
    texts.push_back("a character met once: \xe9\xbe\x99 and more of the watch the watching");
    auto options = options_for_tests();
    options.order = 2 + trial % 6;
    options.min_count = 1 + trial % 3;
    options.max_piece_length = trial % 2 == 0 ? 36 : 5;
    options.isolate_digits = trial % 4 < 2;
    options.rescue = trial % 3 == 0;
    std::size_t larger = ~std::size_t{0};
    double bytes = 0;
    for (const std::string& text : texts) bytes += static_cast<double>(text.size());
    for (const auto& [size, model] : eb::train_bytepiece(texts, options)) {
      CHECK(model.covers_all_bytes());
      CHECK(model.vocab_size() <= static_cast<std::size_t>(size));
      CHECK(model.size() <= larger);
      larger = model.size();
      double covered = 0;
      for (const auto& [piece, id, count] : model.pieces()) {
        covered += static_cast<double>(piece.size()) * count;
        CHECK(eb::viterbi_encode(model, piece) == std::vector<eb::TokenId>{id});
        if (piece.size() == 1) continue;
        CHECK(eb::utf8_error(piece) == eb::kUtf8Valid);
        CHECK(piece.size() <= static_cast<std::size_t>(options.max_piece_length));
        if (options.isolate_digits) CHECK(piece.find_first_of("0123456789") == piece.npos);
      }
      CHECK(covered >=
            bytes);  // every byte of the corpus is in a piece; bytes that never occur add one each
      CHECK(covered <= bytes + 256);
    }
  }
}

TEST_CASE("trainer: progress goes up, in order of the stages") {
  std::vector<std::pair<std::string, double>> seen;
  auto options = options_for_tests();
  options.progress = [&](std::string_view stage, double done) { seen.emplace_back(stage, done); };
  eb::train_bytepiece(Texts{"the watch", "watching"}, options);
  std::vector<std::string> stages;
  for (std::size_t i = 0; i < seen.size(); ++i) {
    if (i == 0 || seen[i].first != seen[i - 1].first) {
      stages.push_back(seen[i].first);
    } else {
      CHECK(seen[i].second >= seen[i - 1].second);
    }
    if (i + 1 == seen.size() || seen[i].first != seen[i + 1].first) CHECK(seen[i].second == 1.0);
  }
  CHECK(stages == std::vector<std::string>{"counting", "cutting", "pruning"});
}

TEST_CASE("trainer: no text at all") {
  const Trained none = eb::train_bytepiece(Texts{}, options_for_tests());
  CHECK(none[0].model.size() == 256);
  CHECK(none[0].model.total_count() == 256);
  check_equal(none, eb::train_bytepiece(Texts{"", ""}, options_for_tests()));
}

TEST_CASE("trainer: bad options and texts") {
  const auto bad = [](auto change, const std::string& message) {
    auto options = options_for_tests();
    change(options);
    CHECK_THROWS_WITH_AS(eb::train_bytepiece(Texts{"a"}, options),
                         ("eigenblocks: " + message).c_str(), eb::invalid_argument);
  };
  using Options = eb::BytePieceTrainerOptions;
  bad([](Options& o) { o.order = 0; }, "order (0) must be in [1, 255]");
  bad([](Options& o) { o.order = 256; }, "order (256) must be in [1, 255]");
  bad([](Options& o) { o.max_vocab_size = {}; }, "max_vocab_size must hold at least one size");
  bad(
      [](Options& o) {
        o.max_vocab_size = {300, 258};
      },
      "max_vocab_size (258) must be at least 259 (256 bytes and 3 special ids)");
  bad([](Options& o) { o.max_piece_length = 0; }, "max_piece_length (0) must be at least 1");
  bad([](Options& o) { o.min_count = 0; }, "min_count (0) must be at least 1");
  bad([](Options& o) { o.normalizer = nullptr; },
      "normalizer is null, must be nfc, no_normalization or a function of your own");
  bad([](Options& o) { o.isolate_digits = true, o.is_digit = nullptr; },
      "isolate_digits needs is_digit (is_decimal_digit of io/nfc.hpp)");
  const eb::thread_pool pool(2);
  CHECK_THROWS_WITH_AS(eb::train_bytepiece(Texts{"fine", "a\xff"}, options_for_tests(), pool),
                       "eigenblocks: text 1 is not valid UTF-8 at byte 1", eb::data_error);
}

TEST_CASE("vocabularies from counts of one's own") {
  const std::vector<std::pair<std::string, std::int64_t>> counts{
      {"watch", 50}, {"the", 70}, {"watchthe", 1}, {"a", 9}, {std::string(100, 'x'), 3}};
  const eb::UnigramModel model = eb::convert_to_bytepiece(counts);
  CHECK(model.count(model.find("watch")) ==
        51);  // "watchthe" is likelier as two, which get its count
  CHECK(model.count(model.find("the")) == 71);
  CHECK(model.find("watchthe") == eb::ByteTrie::kNone);
  CHECK(model.find(std::string(100, 'x')) != eb::ByteTrie::kNone);
  CHECK(model.count(model.find("a")) == 9);
  CHECK(model.count(model.find("b")) == 1);
  CHECK(model.size() == 256 + 3);
  using Counts = std::vector<std::pair<std::string, std::int64_t>>;
  CHECK_THROWS_AS(eb::convert_to_bytepiece(Counts{{"", 1}}), eb::invalid_argument);
  CHECK_THROWS_AS(eb::convert_to_bytepiece(Counts{{"a", 0}}), eb::invalid_argument);
  CHECK_THROWS_AS(eb::convert_to_bytepiece(Counts{{"a", 1}, {"a", 2}}), eb::invalid_argument);
}

TEST_CASE(
    "pruning: equal counts go by length, rare pieces stay at the limit, and rounds go on until "
    "nothing changes") {
  auto pieces = eb::detail::with_all_bytes({{"abcd", 5}, {"xy", 5}, {"pqr", 5}});
  const auto kept = eb::detail::prune_pieces(pieces, 36, 5, {260}, eb::serial, {})[0].model;
  CHECK(kept.size() == 257);
  CHECK(kept.find("abcd") != eb::ByteTrie::kNone);
  CHECK(eb::detail::prune_pieces(pieces, 36, 6, {260}, eb::serial, {})[0].model.size() == 256);
  CHECK(eb::detail::prune_pieces(pieces, 3, 5, {300}, eb::serial, {})[0].model.size() == 258);
  // First "abcd" falls, 50 * 50 / 471 > 5; that makes "ab" frequent enough for "abx" to fall too: 50 * 100 / 471 < 11 but
  // 55 * 100 / 476 > 11.
  const auto model =
      eb::convert_to_bytepiece({{"ab", 50}, {"cd", 50}, {"abcd", 5}, {"x", 100}, {"abx", 11}});
  CHECK(model.find("abcd") == eb::ByteTrie::kNone);
  CHECK(model.find("abx") == eb::ByteTrie::kNone);
  CHECK(model.count(model.find("ab")) == 66);
  CHECK(model.count(model.find("x")) == 111);
}
