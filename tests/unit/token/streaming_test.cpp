#include <eigenblocks/token/streaming.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include <doctest/doctest.h>

#include <string>
#include <string_view>
#include <vector>

#include "toy_lattice.hpp"

namespace {

namespace eb = eigenblocks;
using eb::StreamingEncoder;
using eb::TokenId;
using eb::UnigramModel;
using Ids = std::vector<TokenId>;

/// Lines one by one, the way the whole text is encoded.
Ids at_once(const UnigramModel& model, std::string_view text, bool split_lines) {
  Ids ids;
  eb::Viterbi viterbi;
  while (!text.empty()) {
    std::size_t n = text.size();
    if (split_lines && text.find('\n') != text.npos)
      n = std::min(n, text.find_first_not_of('\n', text.find('\n')));
    viterbi.run(model, text.substr(0, n));
    viterbi.append_ids(model, ids);
    text.remove_prefix(n);
  }
  return ids;
}

std::string decoded(const UnigramModel& model, const Ids& ids) {
  std::string text;
  for (const TokenId id : ids) text += model.piece(model.index(id));
  return text;
}

std::string sample(eb::Random& random, int kind) {
  const auto length = static_cast<std::size_t>(random.below(3000));
  switch (kind % 4) {
    case 0:
      return toy::random_text(random, length, "the watrigncb");
    case 1:
      return toy::random_text(random, length, "the wat\n\n");
    case 2:
      return std::string(length, 'a') + toy::random_text(random, 40, "ab\n\xe4\xb8\xad");
    default: {
      std::string text;
      while (text.size() < length) text += random.uniform() < 0.1 ? "ab" : "watching the water";
      return text;
    }
  }
}

TEST_CASE("any pushes give the ids of the whole text; what is given out never changes") {
  const UnigramModel words = toy::word_model(), dense = toy::dense_model(2, 5, 3, true);
  eb::Random random(1);
  for (int round = 0; round < 48; ++round) {
    const UnigramModel& model = round % 3 ? words : dense;
    const std::string text = sample(random, round);
    const bool split = round % 8 < 4;
    const Ids want = at_once(model, text, split);
    StreamingEncoder encoder(model, {.split_lines = split});
    Ids ids;
    bool prefix = true;
    for (std::size_t at = 0; at < text.size();) {
      const auto most = round % 5 == 0 ? 1 : round % 5 == 1 ? 5000 : 40;
      const auto n = static_cast<std::size_t>(random.below(most + 1));
      const auto part = std::string_view(text).substr(at, n);
      encoder.push(part, ids);
      at += part.size();
      prefix =
          prefix && ids.size() <= want.size() && std::equal(ids.begin(), ids.end(), want.begin());
    }
    CHECK(prefix);
    CHECK(decoded(model, ids).size() + encoder.pending() == text.size());
    encoder.finish(ids);
    CHECK_MESSAGE(ids == want, "round ", round);
    CHECK(encoder.pending() == 0);
    // As new: the same again.
    Ids again = encoder.push(text);
    const Ids rest = encoder.finish();
    again.insert(again.end(), rest.begin(), rest.end());
    CHECK(again == want);
  }
}

TEST_CASE("exact ties are those of the whole text") {
  // "ab" = "a" "b" in real arithmetic, and many more; scores from 0 on decide by rounding.
  const UnigramModel model =
      toy::model_of({{"a", 2}, {"b", 2}, {"ab", 1}, {"ba", 1}, {"aba", 1}, {"c", 2}});
  std::vector<double> third(model.size());
  eb::Random random(2);
  for (int round = 0; round < 20; ++round) {
    const std::string text = toy::random_text(random, 2000, "abc");
    StreamingEncoder encoder(model);
    Ids ids;
    for (const char c : text) encoder.push({&c, 1}, ids);
    encoder.finish(ids);
    CHECK(ids == at_once(model, text, true));
  }
}

TEST_CASE("the window stays small in ordinary text, and ids come early") {
  const UnigramModel model = toy::word_model();
  eb::Random random(3);
  const std::string text = toy::random_text(random, 100000, "the watrigncb");
  for (const std::size_t part : {std::size_t{1}, std::size_t{100}, text.size()}) {
    StreamingEncoder encoder(model, {.split_lines = false});
    Ids ids;
    std::size_t largest = 0;
    for (std::size_t at = 0; at < text.size(); at += part) {
      encoder.push(std::string_view(text).substr(at, part), ids);
      largest = std::max(largest, encoder.pending());
    }
    CHECK(largest < 200);
  }
  // A cut is seen with the byte that shows it, survivors that agree without one.
  StreamingEncoder lines(model);
  CHECK(decoded(model, lines.push("the\n")) == "the");
  CHECK(decoded(model, lines.push("x")) == "\n");
  StreamingEncoder cut(model);
  CHECK(decoded(model, cut.push("watch?!")) == "watch?");
  const UnigramModel pairs = toy::model_of({{"ab", 9}, {"ba", 1}, {"a", 1}, {"b", 1}});
  StreamingEncoder merged(pairs);
  std::string periodic;
  for (int i = 0; i < 1000; ++i) periodic += "ab";
  CHECK(decoded(pairs, merged.push(periodic)).size() > 1900);
}

TEST_CASE("max_window bounds the window; bytes stay right") {
  const UnigramModel model = toy::dense_model(1, 5, 3, true);
  std::string text(20000, 'a');
  StreamingEncoder free(model);
  free.push(text);
  for (const std::size_t window : {10u, 11u, 64u, 1000u}) {
    for (const std::size_t part : {1u, 7u, 20000u}) {
      StreamingEncoder encoder(model, {.max_window = window});
      Ids ids;
      bool bounded = true;
      for (std::size_t at = 0; at < text.size(); at += part) {
        encoder.push(std::string_view(text).substr(at, part), ids);
        bounded = bounded && encoder.pending() < window;
      }
      CHECK(bounded);
      encoder.finish(ids);
      CHECK(decoded(model, ids) == text);
    }
  }
  // Where the window never fills nothing changes.
  const UnigramModel words = toy::word_model();
  eb::Random random(5);
  const std::string ordinary = toy::random_text(random, 20000, "the watrigncb");
  StreamingEncoder encoder(words, {.max_window = 2000});
  Ids ids = encoder.push(ordinary);
  encoder.finish(ids);
  CHECK(ids == at_once(words, ordinary, true));
}

TEST_CASE("a forced flush keeps what agrees with it: survivors elsewhere are dropped") {
  // Odd and even segmentations of aaaa.. never merge; the flush must not mix them.
  const UnigramModel model = toy::model_of({{"a", 1}, {"aa", 1000}, {"b", 1}});
  StreamingEncoder encoder(model, {.max_window = 8});
  Ids ids;
  const std::string text = std::string(101, 'a') + "b";
  for (const char c : text) encoder.push({&c, 1}, ids);
  encoder.finish(ids);
  CHECK(decoded(model, ids) == text);
  CHECK(ids.size() == 52);  // 50 pairs, one single, b
}

TEST_CASE("a copy goes on by itself") {
  const UnigramModel model = toy::word_model();
  eb::Random random(6);
  const std::string head = toy::random_text(random, 300, "the wat"), a = "ing the", b = "er aaaa";
  StreamingEncoder first(model);
  Ids ids_a = first.push(head);
  StreamingEncoder second = first;
  Ids ids_b = ids_a;
  first.push(a, ids_a);
  second.push(b, ids_b);
  first.finish(ids_a);
  second.finish(ids_b);
  CHECK(ids_a == at_once(model, head + a, true));
  CHECK(ids_b == at_once(model, head + b, true));
}

TEST_CASE("bad input") {
  const UnigramModel model = toy::model_of({{"a", 2}, {"abc", 1}, {"\n", 1}});
  CHECK(toy::message_of([&] { StreamingEncoder(model, {.max_window = 5}); }) ==
        "eigenblocks: StreamingEncoder: max_window (5) must be 0 or at least twice the longest "
        "piece (3 bytes)");
  CHECK_THROWS_AS(StreamingEncoder(model, {.max_window = 1}), eb::invalid_argument);
  StreamingEncoder encoder(model);
  Ids ids;
  encoder.push("aa\naab", ids);
  CHECK(toy::message_of([&] { encoder.push("x", ids); }) ==
        "eigenblocks: no piece of the model reaches past byte 5 of the stream");
  CHECK(decoded(model, ids) == "aa\na");
  CHECK(encoder.pending() == 0);  // as new
  ids.clear();
  encoder.push("aab", ids);
  CHECK_THROWS_AS(encoder.finish(ids), eb::data_error);
  ids.clear();
  encoder.push("abca", ids);
  encoder.finish(ids);
  CHECK(decoded(model, ids) == "abca");
  CHECK(encoder.finish().empty());
}

}  // namespace
