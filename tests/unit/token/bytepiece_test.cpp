// BytePiece: ids, bytes and text, whatever the text, the cut into blocks and the number of workers.
#include <doctest/doctest.h>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/token/bytepiece.hpp>

#include <map>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace eb = eigenblocks;
using eb::BytePiece;
using eb::TokenId;

namespace {

using Ids = std::vector<TokenId>;

eb::UnigramModel word_model() {
  std::vector<std::pair<std::string, double>> counts;
  for (int c = 0; c < 256; ++c)
    counts.emplace_back(std::string(1, static_cast<char>(c)), 1 + c % 3);
  for (const char* word : {"the", "the ", " wat", "watch", "ch", "ching", "ing ", "in", "\n\n",
                           "e\n", "\n t", "\xe6\x98\xa5", "\xe6\x98\xa5\xe7\x9c\xa0", "\xe6\x98",
                           "\xf0\x9f\x98\x80", "aa", "aaa", "aaaaaaaa"})
    counts.emplace_back(word, 20);
  return eb::UnigramModel::from_counts(counts);
}

/// Small letters become capitals, and an e grows: enough of a normaliser to see where it is called.
eb::NormalizedText shout(std::string_view text, std::string& buffer) {
  buffer.clear();
  for (const char c : text) buffer += c == 'e' ? "EE" : std::string(1, c);
  return {buffer, eb::utf8_error(text)};
}

std::string random_text(std::mt19937& random, std::size_t words) {
  static const std::string parts[] = {
      "the ",         "watch",        "ing ", "\n",   "\n\n",
      "\xe6\x98\xa5", "\xe7\x9c\xa0", "a",    "aaaa", "\xf0\x9f\x98\x80",
      "\xc3\xa9",     "<bos>"};
  std::string text;
  while (words-- > 0) text += parts[random() % std::size(parts)];
  return text;
}

}  // namespace

TEST_CASE("bytepiece: decode(encode(x)) == x, and pieces stay inside their lines") {
  std::mt19937 random(1);
  const BytePiece tokenizer(word_model(), eb::no_normalization);
  for (int trial = 0; trial < 300; ++trial) {
    const std::string text = random_text(random, random() % 30);
    const Ids ids = tokenizer.encode(text);
    CHECK(tokenizer.decode(ids) == text);
    CHECK(tokenizer.decode_bytes(ids) == text);
    for (const TokenId id : ids) {
      const auto piece = tokenizer.token_bytes(id);
      const auto newline = piece.find('\n');
      CHECK((newline == piece.npos || piece.find_first_not_of('\n', newline) == piece.npos));
    }
    Ids joined, framed{eb::kBosId};
    tokenizer.for_each_segment(text, [&](std::string_view segment) {
      for (const TokenId id : tokenizer.encode_bytes(segment)) joined.push_back(id);
    });
    CHECK(joined == ids);
    framed.insert(framed.end(), ids.begin(), ids.end());
    CHECK(tokenizer.encode(text, {.add_bos = true}) == framed);
    framed.push_back(eb::kEosId);
    CHECK(tokenizer.encode(text, {.add_bos = true, .add_eos = true}) == framed);
    framed.erase(framed.begin());
    CHECK(tokenizer.encode(text, {.add_eos = true}) == framed);
    CHECK(tokenizer.decode(framed) == text);
  }
  CHECK(tokenizer.encode("").empty());
  CHECK(tokenizer.encode("", {.add_bos = true, .add_eos = true}) == Ids{1, 2});
  // "\n t" is a piece, but no segment holds it; as bytes it is one.
  CHECK(tokenizer.encode("\n t").size() > 1);
  CHECK(tokenizer.encode_bytes("\n t").size() == 1);
  CHECK(tokenizer.vocab_size() == 256 + 18 + 3);
}

TEST_CASE("bytepiece: batches are the same for every number of workers") {
  std::mt19937 random(2);
  for (const eb::Normalizer normalizer :
       {eb::Normalizer(eb::no_normalization), eb::Normalizer(shout)}) {
    const BytePiece tokenizer(word_model(), normalizer);
    std::vector<std::string> texts;
    for (const std::size_t words : {0u, 3u, 100000u, 1u, 0u, 20000u, 50u})
      texts.push_back(random_text(random, words));
    texts.push_back(std::string(200000, 'a'));  // one segment longer than a block
    std::vector<Ids> want;
    for (const std::string& text : texts)
      want.push_back(tokenizer.encode(text, {.add_bos = true, .add_eos = true}));
    for (const int workers : {1, 2, 3, 7}) {
      const eb::thread_pool pool(workers);
      CHECK(tokenizer.encode_batch(texts, {.add_bos = true, .add_eos = true}, pool) == want);
      CHECK(tokenizer.encode(texts[2], {.add_bos = true, .add_eos = true}, pool) == want[2]);
    }
    Ids whole;  // without blocks
    tokenizer.for_each_segment(texts[2], [&](std::string_view segment) {
      for (const TokenId id : tokenizer.encode_bytes(segment)) whole.push_back(id);
    });
    CHECK(tokenizer.encode(texts[2]) == whole);
  }
  CHECK(BytePiece(word_model(), shout).decode(BytePiece(word_model(), shout).encode("the e")) ==
        "thEE EE");
  CHECK(BytePiece(word_model(), shout).encode_batch(std::vector<std::string>{}).empty());
}

TEST_CASE("bytepiece: text that is not valid UTF-8") {
  const BytePiece strict(word_model(), shout);
  CHECK_THROWS_WITH_AS(strict.encode("the\xff"), "eigenblocks: text is not valid UTF-8 at byte 3",
                       eb::invalid_argument);
  CHECK_THROWS_AS(strict.for_each_segment("\xff", [](std::string_view) {}), eb::invalid_argument);
  std::string longer;
  for (int i = 0; i < 20000; ++i) longer += "watching\n";
  const std::vector<std::string> texts{"fine", longer + "\xe6\x98"};
  const std::string message =
      "eigenblocks: text 1 is not valid UTF-8 at byte " + std::to_string(longer.size());
  const eb::thread_pool pool(3);
  CHECK_THROWS_WITH_AS(strict.encode_batch(texts, {}, pool), message.c_str(), eb::invalid_argument);

  const BytePiece lenient(word_model(), shout, eb::InvalidUtf8::passthrough);
  const std::string raw = "the\xff\n\xe6\x98 e";
  CHECK(lenient.decode_bytes(lenient.encode(raw)) == raw);  // not normalised
  CHECK(lenient.decode(lenient.encode(raw)) == "the\n e");
  CHECK(lenient.decode(lenient.encode("the")) == "thEE");  // valid text is
  CHECK(lenient.decode_bytes(lenient.encode(longer + "e\xff")) == longer + "e\xff");
}

TEST_CASE("bytepiece: bytes and ids that the model does not have") {
  const BytePiece few(eb::UnigramModel::from_counts({{"a", 3, 1}, {"b", 9, 1}}),
                      eb::no_normalization);
  const eb::thread_pool pool(2);
  const std::vector<std::string> texts{"ab", "ab\nabc"};
  CHECK_THROWS_WITH_AS(
      few.encode_batch(texts, {}, pool),
      "eigenblocks: no piece of the model reaches past byte 2 of the text (\"\\x0a\"..)",
      eb::data_error);
  CHECK_THROWS_AS(few.encode("abc"), eb::data_error);
  for (const TokenId id : {-1, 4, 8, 10, 2147483647}) {
    CHECK_THROWS_AS(few.decode(Ids{3, id}), std::out_of_range);
    CHECK_THROWS_AS(few.token_bytes(id), std::out_of_range);
    CHECK_THROWS_AS(eb::BytePieceDecoder(few).push(id), std::out_of_range);
  }
  CHECK(few.decode(Ids{0, 3, 1, 9, 2}) == "ab");
  CHECK_THROWS_AS(BytePiece(word_model(), nullptr), eb::invalid_argument);
}

TEST_CASE("bytepiece: the decoder's outputs put together are decode's") {
  std::mt19937 random(3);
  const BytePiece tokenizer(word_model(), eb::no_normalization);
  for (int trial = 0; trial < 500; ++trial) {
    Ids ids;
    for (std::size_t n = random() % 20; n > 0; --n)
      ids.push_back(
          static_cast<TokenId>(random() % (random() % 2 != 0 ? tokenizer.vocab_size() : 20) + 0));
    eb::BytePieceDecoder one(tokenizer), many(tokenizer);
    std::string text, chunks;
    for (const TokenId id : ids) text += one.push(id);
    for (std::size_t at = 0; at < ids.size();) {
      const std::size_t part = std::min<std::size_t>(random() % 5, ids.size() - at);
      chunks += many.push(std::span(ids).subspan(at, part));
      at += part;
    }
    CHECK(text == tokenizer.decode(ids));
    CHECK(chunks == text);
    CHECK(one.finish() == many.finish());
  }
  eb::BytePieceDecoder stream(tokenizer);
  const auto id_of = [&](const char* bytes) {
    return tokenizer.model().id(tokenizer.model().find(bytes));
  };
  CHECK(stream.push(id_of("\xe6\x98")) == "");
  CHECK(stream.held() == 2);
  CHECK(stream.push(id_of("\xa5")) == "\xe6\x98\xa5");
}

TEST_CASE("bytepiece: pieces with a prefix") {
  const BytePiece tokenizer(word_model(), eb::no_normalization);
  std::map<std::string, TokenId> all;
  for (const auto& piece : tokenizer.model().pieces()) all[piece.bytes] = piece.id;
  for (const std::string prefix : {"", "t", "the", "the ", "the x", "\xe6\x98", "a", "\xff"}) {
    Ids want;
    for (const auto& [bytes, id] : all) {
      if (bytes.starts_with(prefix)) want.push_back(id);
    }
    CHECK(tokenizer.pieces_with_prefix(prefix) == want);
  }
  CHECK(tokenizer.pieces_with_prefix("a").size() == 4);
}
