// Damaged files: a table of what is refused with which words, and thousands of mutations of a sound file that must
// either be refused with a data_error or be safe to read in every way (meant to run under ASan and UBSan as well).
#include <doctest/doctest.h>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/io/safetensors.hpp>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fuzz/visit_safetensors.hpp"
#include "support/temporary_folder.hpp"

namespace eb = eigenblocks;
using eb::Index;

namespace {

std::vector<std::byte> file_with(std::uint64_t length, std::string_view rest) {
  std::vector<std::byte> content(8 + rest.size());
  std::memcpy(content.data(), &length, 8);
  if (!rest.empty()) std::memcpy(content.data() + 8, rest.data(), rest.size());
  return content;
}

std::vector<std::byte> file_of(std::string_view header, std::size_t data_size = 0) {
  return file_with(header.size(), std::string(header) + std::string(data_size, '\0'));
}

void refuses(std::vector<std::byte> content, const std::string& message) {
  const std::string whole = "eigenblocks: memory: " + message;
  CHECK_THROWS_WITH_AS(eb::SafetensorsFile::parse(std::move(content), "memory"),
                       doctest::Contains(whole.c_str()), eb::data_error);
}

/// The header of one F32 tensor 'x' with the given shape and offsets.
std::string one(const std::string& shape, const std::string& offsets) {
  return R"({"x":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

/// The header of U8 tensors a, b, .. of which each occupies the bytes of one pair.
std::string many(const std::vector<std::pair<int, int>>& spans) {
  std::string text = "{";
  char name = 'a';
  for (const auto& [begin, end] : spans) {
    if (name != 'a') text += ',';
    text += "\"" + std::string(1, name++) + R"(":{"dtype":"U8","shape":[)" +
            std::to_string(end - begin) + R"(],"data_offsets":[)" + std::to_string(begin) + "," +
            std::to_string(end) + "]}";
  }
  return text + "}";
}

}  // namespace

TEST_CASE("the length of the header") {
  refuses({}, "the file has 0 bytes, fewer than the 8 of the header length");
  refuses(std::vector<std::byte>(7), "the file has 7 bytes");
  refuses(file_with(3, "{}"), "the header length (3) exceeds the 2 bytes left");
  refuses(file_with(~std::uint64_t{0}, "{}"),
          "the header length (18446744073709551615) exceeds the 2 bytes left");
  refuses(file_with(0, "{}"), "the header does not begin with '{'");
  std::string large(100'000'001, ' ');
  large[0] = '{';
  large[1] = '}';
  refuses(file_of(large), "the header length (100000001) exceeds 100000000");
  large.pop_back();
  CHECK_NOTHROW(eb::SafetensorsFile::parse(file_of(large), "memory"));
}

TEST_CASE("text that is not JSON") {
  refuses(file_of(" {}"), "the header does not begin with '{'");
  refuses(file_of("[]"), "the header does not begin with '{'");
  refuses(file_of("{"), "the header is not valid JSON at byte ");
  refuses(file_of("{}{}"), "the header is not valid JSON at byte 3");
  refuses(file_of("{} x"), "the header is not valid JSON");
  refuses(file_of(R"({"x":nan})"), "the header is not valid JSON");
  refuses(file_of("{\"\xff\":{}}"), "the header is not valid JSON");
  refuses(file_of(R"({"\ud800":{}})"), "the header is not valid JSON");
  refuses(file_of(R"({/**/})"), "the header is not valid JSON");
  refuses(file_of(std::string_view("{}\0{}", 5)), "the header contains a zero byte");
  CHECK_NOTHROW(eb::SafetensorsFile::parse(file_of("{}   "), "memory"));
}

TEST_CASE("JSON of another structure") {
  refuses(file_of(R"({"x":1})"), "header: 'x' must be an object, not a number");
  refuses(file_of(R"({"x":[]})"), "header: 'x' must be an object, not an array");
  refuses(file_of(R"({"x":"F32"})"), "header: 'x' must be an object, not a string");
  refuses(file_of(R"({"x":null})"), "header: 'x' must be an object, not null");
  refuses(file_of(R"({"x":true})"), "header: 'x' must be an object, not true or false");
  refuses(file_of(R"({"x":{}})"), "header entry 'x': 'dtype' is missing");
  refuses(file_of(R"({"x":{"dtype":"F32"}})"), "header entry 'x': 'shape' is missing");
  refuses(file_of(R"({"x":{"dtype":"F32","shape":[]}})"),
          "header entry 'x': 'data_offsets' is missing");
  refuses(file_of(R"({"x":{"dtype":1}})"), "header entry 'x': 'dtype' cannot be a number");
  refuses(file_of(R"({"x":{"dtype":["F32"]}})"), "header entry 'x': 'dtype' cannot be an array");
  refuses(file_of(R"({"x":{"dtype":{}}})"), "header entry 'x': 'dtype' cannot be an object");
  refuses(file_of(R"({"x":{"shape":3}})"), "header entry 'x': 'shape' cannot be a number");
  refuses(file_of(R"({"x":{"shape":"3"}})"), "header entry 'x': 'shape' cannot be a string");
  refuses(file_of(R"({"x":{"stride":[1]}})"),
          "header entry 'x': 'stride' is not a key of a tensor");
  refuses(file_of(R"({"x":{"dtype":"F32","dtype":"F32"}})"),
          "header entry 'x': 'dtype' occurs twice");
  refuses(file_of(R"({"__metadata__":[]})"),
          "header: '__metadata__' must be an object, not an array");
  refuses(file_of(R"({"__metadata__":{"k":1}})"),
          "header entry '__metadata__': 'k' must be a string, not a number");
  refuses(file_of(R"({"__metadata__":{"k":null}})"),
          "header entry '__metadata__': 'k' must be a string, not null");
  refuses(file_of(R"({"__metadata__":{"k":{}}})"),
          "header entry '__metadata__': 'k' must be a string, not an object");
  refuses(file_of(R"({"__metadata__":{"k":"","k":""}})"),
          "header entry '__metadata__': 'k' occurs twice");
  refuses(file_of(R"({"__metadata__":{},"__metadata__":{}})"), "header: __metadata__ occurs twice");
  const std::string x = R"("x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  refuses(file_of("{" + x + "," + x + "}"), "tensor 'x': the name occurs twice");
}

TEST_CASE("nesting does not cost stack") {
  const std::string deep(1'000'000, '[');
  refuses(file_of(R"({"x":{"shape":)" + deep),
          "header entry 'x': 'shape' must hold integers >= 0 and not an array");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += R"({"x":)";
  refuses(file_of(objects), "header entry 'x': 'x' is not a key of a tensor");
}

TEST_CASE("shapes") {
  refuses(file_of(one("[-1]", "[0,4]"), 4),
          "header entry 'x': 'shape' must hold integers >= 0 and not -1");
  refuses(file_of(one("[1.0]", "[0,4]"), 4),
          "header entry 'x': 'shape' must hold integers >= 0 and not 1.0");
  refuses(file_of(one("[1e0]", "[0,4]"), 4),
          "header entry 'x': 'shape' must hold integers >= 0 and not 1e0");
  refuses(file_of(one("[\"1\"]", "[0,4]"), 4),
          "header entry 'x': 'shape' must hold integers >= 0 and not a string");
  refuses(file_of(one("[null]", "[0,4]"), 4),
          "header entry 'x': 'shape' must hold integers >= 0 and not null");
  refuses(file_of(one("[9223372036854775808]", "[0,4]"), 4),
          "header entry 'x': 'shape' holds 9223372036854775808, which is too large");
  refuses(file_of(one("[18446744073709551616]", "[0,4]"), 4),
          "header entry 'x': 'shape' must hold integers >= 0 and not");
  refuses(file_of(one("[2]", "[0,4]"), 4),
          "tensor 'x': 2 elements of 4 bytes (F32) do not fill data_offsets [0, 4]");
  refuses(file_of(one("[0]", "[0,4]"), 4), "tensor 'x': 0 elements of 4 bytes (F32)");
  refuses(file_of(one("[]", "[0,0]")), "tensor 'x': 1 elements of 4 bytes (F32)");
  // 2^32 * 2^32 = 2^64 wraps to 0, and 2^62 elements of 4 bytes do too.
  refuses(file_of(one("[4294967296,4294967296]", "[0,0]")),
          "tensor 'x': the product of the shape overflows");
  refuses(file_of(one("[4611686018427387904]", "[0,0]")),
          "tensor 'x': 4611686018427387904 elements of 4 bytes");
  refuses(file_of(one("[0,4294967296,4294967296]", "[0,0]")),
          "tensor 'x': the product of the shape overflows");
  refuses(file_of(R"({"x":{"dtype":"F8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})"),
          "tensor 'x': the product of the shape overflows");
  CHECK_NOTHROW(eb::SafetensorsFile::parse(file_of(one("[0,4294967296]", "[0,0]")), "memory"));
}

TEST_CASE("offsets") {
  refuses(file_of(one("[1]", "[0]"), 4), "header entry 'x': 'data_offsets' must hold 2 numbers");
  refuses(file_of(one("[1]", "[]"), 4), "header entry 'x': 'data_offsets' must hold 2 numbers");
  refuses(file_of(one("[1]", "[0,4,4]"), 4),
          "header entry 'x': 'data_offsets' must hold 2 numbers");
  refuses(file_of(one("[1]", "[-4,0]"), 4),
          "header entry 'x': 'data_offsets' must hold integers >= 0 and not -4");
  refuses(file_of(one("[1]", "[4,0]"), 4), "tensor 'x': data_offsets [4, 0] do not lie in [0, 4]");
  refuses(file_of(one("[1]", "[0,4]"), 3), "tensor 'x': data_offsets [0, 4] do not lie in [0, 3]");
  refuses(
      file_of(one("[1]", "[9223372036854775804,9223372036854775807]"), 4),
      "tensor 'x': data_offsets [9223372036854775804, 9223372036854775807] do not lie in [0, 4]");
  refuses(file_of(one("[1]", "[4,8]"), 8),
          "tensor 'x': data_offsets begin at 4 and leave a hole after 0");
  refuses(file_of(one("[1]", "[0,4]"), 5), "the data has 5 bytes, the tensors take 4");
  refuses(file_of("{}", 1), "the data has 1 bytes, the tensors take 0");
  refuses(file_of(many({{0, 2}, {1, 3}}), 3),
          "tensor 'b': data_offsets begin at 1 and overlap the tensor before, which ends at 2");
  refuses(file_of(many({{0, 2}, {0, 2}}), 2), "tensor 'b': data_offsets begin at 0 and overlap");
  refuses(file_of(many({{3, 4}, {0, 2}}), 4),
          "tensor 'a': data_offsets begin at 3 and leave a hole after 2");
  const auto file =
      eb::SafetensorsFile::parse(file_of(many({{2, 4}, {2, 2}, {0, 2}, {4, 4}}), 4), "memory");
  CHECK(visit(file) == 4);  // any order, and empty tensors anywhere on a border
}

TEST_CASE("a long hostile name is cut in the message") {
  const std::string name(1'000'000, 'n');
  try {
    eb::SafetensorsFile::parse(file_of("{\"" + name + "\":1}"), "memory");
    FAIL("accepted");
  } catch (const eb::data_error& error) {
    CHECK(std::string_view(error.what()).size() < 300);
  }
}

TEST_CASE("the message names the file") {
  const TemporaryFolder folder;
  const std::string path = folder.file("broken.safetensors");
  eb::replace_file(path, {std::as_bytes(std::span(std::string_view("abc")))});
  const std::string message = "eigenblocks: " + path + ": the file has 3 bytes";
  CHECK_THROWS_WITH_AS(eb::SafetensorsFile::open(path), doctest::Contains(message.c_str()),
                       eb::data_error);
  CHECK_THROWS_WITH_AS(eb::SafetensorsFile::load(path), doctest::Contains(message.c_str()),
                       eb::data_error);
}

namespace {

/// A file with something of everything.
std::vector<std::byte> sound_file() {
  eb::Matrix<double> values(3, 5);
  for (Index i = 0; i < values.size(); ++i) values.data()[i] = 0.25 * static_cast<double>(i) - 1;
  const std::vector<Index> ids{3, 1, 4, 1, 5};
  eb::SafetensorsWriter writer;
  writer.add("f64", values).add_as<float>("f32", values, {3, 1, 5});
  writer.add_as<Eigen::half>("f16", values.row(0)).add_as<Eigen::bfloat16>("bf16", values.row(1));
  writer.add_integers("ids", ids)
      .add("scalar", values.topLeftCorner(1, 1), {})
      .add("none", values.topRows(0));
  writer.metadata("op", "softmax").metadata("note", "\xe8\x8b\x8f \"quoted\"");
  return writer.bytes();
}

struct Outcome {
  int accepted = 0, refused = 0;
  void operator()(std::vector<std::byte> content) {
    content.shrink_to_fit();  // a read past the end is a read past the allocation
    try {
      visit(eb::SafetensorsFile::parse(std::move(content), "mutant"));
      ++accepted;
    } catch (const eb::data_error&) {
      ++refused;
    }
  }
};

std::uint64_t header_length(const std::vector<std::byte>& content) {
  std::uint64_t length = 0;
  std::memcpy(&length, content.data(), 8);
  return length;
}

}  // namespace

TEST_CASE("every truncation is refused") {
  const auto sound = sound_file();
  Outcome outcome;
  for (std::size_t size = 0; size < sound.size(); ++size)
    outcome({sound.begin(), sound.begin() + static_cast<long>(size)});
  CHECK(outcome.accepted == 0);
  outcome(sound);
  CHECK(outcome.accepted == 1);
}

TEST_CASE("every single bit of the length and of the header") {
  const auto sound = sound_file();
  Outcome outcome;
  const std::size_t end = 8 + static_cast<std::size_t>(header_length(sound));
  for (std::size_t bit = 0; bit < 8 * end; ++bit) {
    auto mutant = sound;
    mutant[bit / 8] ^= std::byte{1} << (bit % 8);
    outcome(std::move(mutant));
  }
  CHECK(outcome.refused > 100);
  CHECK(outcome.accepted > 100);  // letters of names and of metadata are free
}

TEST_CASE("thousands of edits of the header's text") {
  const auto sound = sound_file();
  const auto length = static_cast<std::size_t>(header_length(sound));
  const std::string header(reinterpret_cast<const char*>(sound.data()) + 8, length);
  const std::string data(reinterpret_cast<const char*>(sound.data()) + 8 + length,
                         sound.size() - 8 - length);
  const std::string_view words[] = {"0",
                                    "1",
                                    "-1",
                                    "4",
                                    "8",
                                    "120",
                                    "1.0",
                                    "1e9",
                                    "9223372036854775807",
                                    "18446744073709551615",
                                    "4294967296",
                                    "null",
                                    "true",
                                    "\"\"",
                                    "\"F64\"",
                                    "\"F32\"",
                                    "\"BF16\"",
                                    "\"I64\"",
                                    "\"U8\"",
                                    "\"F8_E5M2\"",
                                    "[",
                                    "]",
                                    "{",
                                    "}",
                                    ",",
                                    ":",
                                    "\"",
                                    "\\",
                                    "\\u0000",
                                    "\xff",
                                    "\"shape\":",
                                    "\"dtype\":",
                                    "\"data_offsets\":",
                                    "\"__metadata__\":",
                                    "[0,0]",
                                    "{}"};
  eb::Random random(2024);
  const auto below = [&](std::size_t n) {
    return static_cast<std::size_t>(random.below(static_cast<Index>(n)));
  };
  Outcome outcome;
  for (int round = 0; round < 6000; ++round) {
    std::string text = header;
    std::string tail = data;
    for (std::size_t edits = 1 + below(3); edits > 0; --edits) {
      const std::size_t at = below(text.size());
      const std::string_view word = words[below(std::size(words))];
      switch (below(6)) {
        case 0:
          text.insert(at, word);
          break;
        case 1:
          text.replace(at, word.size(), word);
          break;
        case 2:
          text.erase(at, 1 + below(12));
          break;
        case 3:
          text.insert(at, text.substr(below(text.size()), 1 + below(60)));
          break;
        case 4: {  // another number in the place of a number
          const std::size_t digit = text.find_first_of("0123456789", at);
          if (digit == text.npos) break;
          const std::size_t digits = text.find_first_not_of("0123456789", digit) - digit;
          text.replace(digit, digits, std::to_string(below(200)));
          break;
        }
        default:
          tail.resize(below(2 * data.size()));
          break;
      }
      if (text.empty()) text = "{}";
    }
    // Mostly with the length that fits the edited text, so that the parser gets to see it.
    outcome(file_with(random.below(8) == 0 ? length : text.size(), text + tail));
  }
  CHECK(outcome.accepted + outcome.refused == 6000);
  CHECK(outcome.accepted > 100);
  CHECK(outcome.refused > 1000);
}
