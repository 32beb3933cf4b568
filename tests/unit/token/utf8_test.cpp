// UTF-8 and segments against slow definitions of their own.
#include <doctest/doctest.h>
#include <eigenblocks/token/segment.hpp>
#include <eigenblocks/token/utf8.hpp>

#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace eb = eigenblocks;
using eb::Index;

namespace {

/// Bytes of the well-formed sequence at the start: decode as if the lead byte were right, then look at the number.
std::size_t length_by_value(std::string_view text) {
  const auto byte = [&](std::size_t i) {
    return static_cast<unsigned>(static_cast<unsigned char>(text[i]));
  };
  const unsigned least[] = {0, 0x80, 0x800, 0x10000}, most[] = {0x7f, 0x7ff, 0xffff, 0x10ffff};
  const unsigned mark[] = {0x00, 0xc0, 0xe0, 0xf0}, mask[] = {0x80, 0xe0, 0xf0, 0xf8};
  for (std::size_t n = 0; n < 4 && n < text.size(); ++n) {
    if ((byte(0) & mask[n]) != mark[n]) continue;
    unsigned value = byte(0) & ~mask[n];
    bool ok = true;
    for (std::size_t i = 1; i <= n; ++i) {
      ok = ok && (byte(i) & 0xc0) == 0x80;
      value = value << 6 | (byte(i) & 0x3f);
    }
    ok = ok && value >= least[n] && value <= most[n] && (value < 0xd800 || value > 0xdfff);
    if (ok) return n + 1;
  }
  return 0;
}

std::string kept(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const std::size_t length = length_by_value(text);
    out += text.substr(0, length);
    text.remove_prefix(std::max<std::size_t>(length, 1));
  }
  return out;
}

const std::string kEdges(
    "\x00\x41\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe1\xec\xed\xee\xef\xf0\xf1\xf3\xf4"
    "\xf5\xff",
    25);

std::string edge_bytes(std::mt19937& random, std::size_t size) {
  std::string text(size, ' ');
  for (char& c : text) c = kEdges[random() % kEdges.size()];
  return text;
}

}  // namespace

TEST_CASE("utf8: every sequence of four bytes at the edges of the ranges") {
  std::string text(4, ' ');
  int differ = 0, well_formed = 0;
  for (const char a : kEdges) {
    for (const char b : kEdges) {
      for (const char c : kEdges) {
        for (const char d : kEdges) {
          text = {a, b, c, d};
          const std::size_t length = length_by_value(text);
          differ += eb::utf8_length(text) != length;
          for (std::size_t n = 0; n < 4; ++n)
            differ += eb::utf8_length(text.substr(0, n)) != (length <= n ? length : 0);
          if (length == 0) continue;
          ++well_formed;
          std::string again;
          eb::append_utf8(again, eb::utf8_code_point(text, length));
          differ += again != text.substr(0, length);
        }
      }
    }
  }
  CHECK(differ == 0);
  CHECK(well_formed > 1000);
}

TEST_CASE("utf8: validation, filter and stream on random bytes") {
  std::mt19937 random(11);
  for (int trial = 0; trial < 2000; ++trial) {
    std::string text = edge_bytes(random, random() % 30);
    if (trial % 3 == 0) text = "plain ASCII of some length" + text + "and more of the same";
    if (trial % 5 == 0) text = kept(text);
    CHECK(eb::valid_utf8(text) == kept(text));
    std::size_t error = 0;
    while (error < text.size() && length_by_value(std::string_view(text).substr(error)) != 0)
      error += length_by_value(std::string_view(text).substr(error));
    CHECK(eb::utf8_error(text) == (error == text.size() ? eb::kUtf8Valid : error));

    eb::Utf8Stream stream;
    std::string out;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t part = random() % 4;
      out += stream.push(std::string_view(text).substr(at, part));
      at += part;
      CHECK(stream.held() <= 3);
    }
    const std::size_t held = stream.held();
    CHECK(stream.finish() == held);
    CHECK(stream.held() == 0);
    CHECK(out == kept(text));
  }
}

TEST_CASE("utf8: the stream gives a character as soon as it is whole") {
  eb::Utf8Stream stream;
  CHECK(stream.push("a\xe6\x98") == "a");
  CHECK(stream.held() == 2);
  CHECK(stream.push("\xa5") == "\xe6\x98\xa5");
  CHECK(stream.push("\xe6\x98z") == "z");  // it never will be
  CHECK(stream.held() == 0);
  CHECK(stream.push("\xf0\x9f\x98") == "");
  CHECK(stream.finish() == 3);
  CHECK(stream.push("ok") == "ok");
}

TEST_CASE("utf8: code points in order") {
  std::u32string points;
  std::string bytes;
  eb::for_each_code_point("a\xc3\xa9\xe6\x98\xa5\xf0\x9f\x98\x80",
                          [&](char32_t c, std::string_view sequence) {
                            points += c;
                            bytes += sequence;
                          });
  CHECK(points == std::u32string{0x61, 0xe9, 0x6625, 0x1f600});
  CHECK(bytes == "a\xc3\xa9\xe6\x98\xa5\xf0\x9f\x98\x80");
}

namespace {

bool ascii_digit(char32_t c) { return c >= U'0' && c <= U'9'; }
using Parts = std::vector<std::string_view>;

}  // namespace

TEST_CASE("segments: lines") {
  CHECK(eb::segments("").empty());
  CHECK(eb::segments("one\n\ntwo\nthree") == Parts{"one\n\n", "two\n", "three"});
  CHECK(eb::segments("\n\na\n") == Parts{"\n\n", "a\n"});
  CHECK(eb::segments("a\r\xe2\x80\xa8\xc2\x85"
                     "b") == Parts{"a\r\xe2\x80\xa8\xc2\x85"
                                   "b"});
  CHECK(eb::segments("\xff\n\x80") == Parts{"\xff\n", "\x80"});
}

TEST_CASE("segments: limited, and digits on their own") {
  CHECK(eb::segments("\nabcde", {.max_length = 2}) == Parts{"\n", "ab", "cd", "e"});
  CHECK(eb::segments("ab\ncd", {.max_length = 2}) == Parts{"ab\n", "cd"});
  CHECK(eb::segments("\xe6\x98\xa5\xe6\x98\xa5z", {.max_length = 2}) ==
        Parts{"\xe6\x98\xa5\xe6\x98\xa5", "z"});
  const std::string lines = "x" + std::string(250, '\n') + "y";
  std::vector<std::size_t> sizes;
  for (const auto segment : eb::segments(lines, {.max_length = 10}))
    sizes.push_back(segment.size());
  CHECK(sizes == std::vector<std::size_t>{101, 100, 50, 1});
  CHECK(eb::segments(lines)[0].size() == 251);
  CHECK(eb::segments("x12\n3ab", {.is_digit = ascii_digit}) ==
        Parts{"x", "1", "2", "\n", "3", "ab"});
  CHECK(eb::segments("abc1", {.max_length = 2, .is_digit = ascii_digit}) == Parts{"ab", "c", "1"});
  CHECK_THROWS_WITH_AS(eb::segments("a", {.max_length = -1}),
                       "eigenblocks: segments: max_length (-1) must not be negative",
                       eb::invalid_argument);
}

TEST_CASE("segments: blocks end where lines do, and their segments are those of the whole") {
  std::mt19937 random(2);
  for (int trial = 0; trial < 300; ++trial) {
    std::string text(random() % 60, ' ');
    for (char& c : text) c = "a1\n"[random() % 3];
    for (const eb::SegmentOptions& options :
         {eb::SegmentOptions{}, eb::SegmentOptions{.max_length = 3},
          eb::SegmentOptions{.max_length = 2, .is_digit = ascii_digit}}) {
      const auto whole = eb::segments(text, options);
      std::string joined;
      for (const auto segment : whole) joined += segment;
      CHECK(joined == text);
      Parts parts;
      const std::size_t least = 1 + random() % 20;
      eb::detail::for_each_block(text, least, [&](std::size_t begin, std::size_t end) {
        CHECK((end == text.size() || end - begin >= least));
        eb::for_each_segment(
            std::string_view(text).substr(begin, end - begin),
            [&](std::string_view s) { parts.push_back(s); }, options);
      });
      CHECK(parts == whole);
    }
  }
}
