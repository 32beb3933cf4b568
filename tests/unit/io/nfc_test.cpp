// NFC against the textbook algorithm on the tables of tests/golden/tokenize/nfc_data.tsv (Unicode 14).
#include <doctest/doctest.h>
#include <eigenblocks/io/nfc.hpp>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace eb = eigenblocks;

namespace {

class Textbook {
 public:
  Textbook() {
    std::ifstream stream(EIGENBLOCKS_SOURCE_DIR "/tests/golden/tokenize/nfc_data.tsv");
    REQUIRE(stream);
    for (std::string line; std::getline(stream, line);) {
      std::istringstream fields(line);
      std::string kind;
      unsigned first = 0, second = 0, value = 0;
      fields >> kind >> std::hex >> first;
      if (kind == "D") {
        std::u32string parts;
        while (fields >> value) parts += static_cast<char32_t>(value);
        decompositions_[first] = parts;
      } else if (kind == "X") {
        excluded_.insert(first);
      } else if (kind == "C" && fields >> second >> std::dec >> value) {
        for (char32_t c = first; c <= second; ++c) classes_[c] = static_cast<int>(value);
      }
    }
    REQUIRE(decompositions_.size() > 2000);
    REQUIRE(classes_.size() > 800);
    for (const auto& [c, parts] : decompositions_) {
      if (parts.size() == 2 && !excluded_.contains(c)) compositions_[{parts[0], parts[1]}] = c;
    }
  }

  std::u32string operator()(const std::u32string& text) const {
    std::u32string all;
    for (const char32_t c : text) decompose(c, all);
    for (std::size_t begin = 0; begin < all.size(); ++begin) {
      std::size_t end = begin;
      while (end < all.size() && ccc(all[end]) > 0) ++end;
      const auto at = all.begin();
      std::stable_sort(at + static_cast<std::ptrdiff_t>(begin),
                       at + static_cast<std::ptrdiff_t>(end),
                       [&](char32_t a, char32_t b) { return ccc(a) < ccc(b); });
      begin = end;
    }
    std::u32string out;
    std::size_t starter = all.npos;
    int last = -1;  // class of what was put out after the starter
    for (const char32_t c : all) {
      const int k = ccc(c);
      if (starter != all.npos && last < k) {
        if (const char32_t joined = compose(out[starter], c)) {
          out[starter] = joined;
          continue;
        }
      }
      if (k == 0) {
        starter = out.size();
        last = -1;
      } else {
        last = k;
      }
      out += c;
    }
    return out;
  }
  const std::map<char32_t, std::u32string>& decompositions() const { return decompositions_; }
  const std::map<char32_t, int>& classes() const { return classes_; }

 private:
  int ccc(char32_t c) const {
    const auto found = classes_.find(c);
    return found == classes_.end() ? 0 : found->second;
  }
  void decompose(char32_t c, std::u32string& out) const {
    if (c >= 0xac00 && c < 0xac00 + 11172) {
      const char32_t s = c - 0xac00;
      out += {0x1100 + s / 588, 0x1161 + s % 588 / 28};
      if (s % 28 != 0) out += 0x11a7 + s % 28;
      return;
    }
    const auto found = decompositions_.find(c);
    if (found == decompositions_.end()) {
      out += c;
    } else {
      for (const char32_t part : found->second) decompose(part, out);
    }
  }
  char32_t compose(char32_t a, char32_t b) const {
    if (a >= 0x1100 && a < 0x1113 && b >= 0x1161 && b < 0x1176)
      return 0xac00 + ((a - 0x1100) * 21 + (b - 0x1161)) * 28;
    if (a >= 0xac00 && a < 0xac00 + 11172 && (a - 0xac00) % 28 == 0 && b > 0x11a7 && b < 0x11c3)
      return a + (b - 0x11a7);
    const auto found = compositions_.find({a, b});
    return found == compositions_.end() ? 0 : found->second;
  }

  std::map<char32_t, std::u32string> decompositions_;
  std::set<char32_t> excluded_;
  std::map<char32_t, int> classes_;
  std::map<std::pair<char32_t, char32_t>, char32_t> compositions_;
};

const Textbook& textbook() {
  static const Textbook book;
  return book;
}

std::string to_utf8(const std::u32string& text) {
  std::string bytes;
  for (const char32_t c : text) eb::append_utf8(bytes, c);
  return bytes;
}

bool assigned(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c)) != UTF8PROC_CATEGORY_CN;
}

}  // namespace

TEST_CASE("nfc: every code point alone, and between letters and marks") {
  std::vector<std::string> off;
  for (char32_t c = 1; c < 0x110000; ++c) {
    if (c >= 0xd800 && c < 0xe000) continue;
    if (c >= 0x3400 && c < 0xa000 && c % 16 != 0) continue;  // ideographs
    if (c >= 0x20000 && c % 64 != 0 && !(c >= 0x2f800 && c < 0x2fa20)) continue;
    const std::u32string alone{c};
    if (eb::to_nfc(to_utf8(alone)) != to_utf8(textbook()(alone))) off.push_back(to_utf8(alone));
    if (c < 0x2000 && assigned(c)) {
      const std::u32string between{U'o', c, 0x323, 0x301, 0x1100, 0x1161, c, U'z'};
      if (eb::to_nfc(to_utf8(between)) != to_utf8(textbook()(between)))
        off.push_back(to_utf8(between));
    }
  }
  CHECK(off == std::vector<std::string>{});
}

TEST_CASE("nfc: random sequences of whatever changes, combines or stays") {
  std::mt19937 random(4);
  std::u32string pool =
      U"aeozAE \n\u4e2d\u3002\u3042\u3099\u1100\u1161\u11a8\uac00\uac01\U0001f600";
  std::vector<std::u32string> pairs;
  for (const auto& [c, parts] : textbook().decompositions()) {
    pool += std::u32string{c} + parts;
    pairs.push_back(parts);
  }
  std::u32string marks;
  for (const auto& [c, k] : textbook().classes()) marks += c;
  int off = 0, changed = 0;
  std::string buffer;
  for (int trial = 0; trial < 20000; ++trial) {
    std::u32string text;
    for (std::size_t n = random() % 12; n > 0; --n) {
      const std::u32string& from = random() % 3 == 0 ? marks : pool;
      text += from[random() % from.size()];
      if (random() % 16 == 0) text += U"some plain text";
      if (random() % 3 == 0) text += pairs[random() % pairs.size()];
    }
    const std::string bytes = to_utf8(text), want = to_utf8(textbook()(text));
    const eb::NormalizedText got = eb::nfc(bytes, buffer);
    off += got.error != eb::kUtf8Valid || got.text != want;
    changed += want != bytes;
    off += eb::to_nfc(want) != want;
  }
  CHECK(off == 0);
  CHECK(changed > 5000);
}

TEST_CASE("nfc: ordinary text is not copied") {
  std::string buffer;
  for (const std::string_view text :
       {std::string_view(""), std::string_view("plain"), std::string_view("caf\u00e9 \u00c0\u024f"),
        std::string_view("\u6625\u7720\u4e0d\u89c9\u6653\uff0c\u5904\u5904\u95fb\u557c\u9ce5\u3002"
                         "\uac00\U0001f600")}) {
    CHECK(eb::nfc(text, buffer).text.data() == text.data());
    CHECK(eb::nfc(text, buffer).text == text);
  }
}

TEST_CASE("nfc: the place of what is not valid") {
  std::string buffer;
  CHECK(eb::nfc("\u4e2d\xff", buffer).error == 3);
  CHECK(eb::nfc("e\u0301\xe6\x98", buffer).error == 3);
  CHECK(eb::nfc("12345678\x80", buffer).error == 8);
  CHECK(eb::nfc("\xe4\xb8"
                "a",
                buffer)
            .error == 0);
  CHECK(eb::nfc("\xed\xa0\x80", buffer).error == 0);
  CHECK_THROWS_WITH_AS(eb::to_nfc("ab\xc0\xaf"),
                       "eigenblocks: to_nfc: the text is not valid UTF-8 at byte 2",
                       eb::invalid_argument);
}

TEST_CASE("nfc: a long run of marks in the worst order takes no quadratic time") {
  std::u32string text = U"a";
  for (int i = 0; i < 200000; ++i) text += i < 100000 ? U'\u0301' : U'\u0323';
  const std::string bytes = to_utf8(text);
  const auto start = std::chrono::steady_clock::now();
  const std::string normal = eb::to_nfc(bytes);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  CHECK(took.count() < 10);  // bubble sort: 10^10 swaps
  CHECK(normal.starts_with("\u1ea1"));
}

TEST_CASE("decimal digits of all scripts") {
  for (const char32_t c : {U'0', U'9', U'\uff15', U'\u0663', U'\u0966', char32_t{0x1d7ce}})
    CHECK(eb::is_decimal_digit(c));
  for (const char32_t c : {U'a', U'\u00b2', U'\u2460', U'\u4e00', U'\u00bd'})
    CHECK_FALSE(eb::is_decimal_digit(c));
}
