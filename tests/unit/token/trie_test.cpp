// ByteTrie against a sorted map of the same keys.
#include <doctest/doctest.h>
#include <eigenblocks/token/trie.hpp>

#include <map>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace eb = eigenblocks;
using eb::ByteTrie;

namespace {

std::string random_bytes(std::mt19937& random, std::string_view alphabet, std::size_t longest) {
  std::string bytes(1 + random() % longest, ' ');
  for (char& c : bytes) c = alphabet[random() % alphabet.size()];
  return bytes;
}

using Found = std::vector<std::pair<std::string, std::uint32_t>>;

void check_against_map(const std::map<std::string, std::uint32_t>& keys, const ByteTrie& trie,
                       const std::vector<std::string>& texts) {
  CHECK(trie.size() == keys.size());
  for (const auto& [key, value] : keys) CHECK(trie.find(key) == value);
  for (const std::string& text : texts) {
    CAPTURE(text);
    const auto found = keys.find(text);
    CHECK(trie.find(text) == (found == keys.end() ? ByteTrie::kNone : found->second));
    Found starts, want_starts, ends, want_ends;
    trie.walk(text, [&](std::size_t length, std::uint32_t key) {
      starts.emplace_back(text.substr(0, length), key);
    });
    for (std::size_t length = 1; length <= text.size(); ++length) {
      const auto at = keys.find(text.substr(0, length));
      if (at != keys.end()) want_starts.push_back(*at);
    }
    CHECK(starts == want_starts);
    trie.walk_all(text, [&](std::string_view key, std::uint32_t value) {
      ends.emplace_back(std::string(key), value);
    });
    for (auto at = keys.lower_bound(text); at != keys.end() && at->first.starts_with(text); ++at)
      want_ends.push_back(*at);
    CHECK(ends == want_ends);
  }
}

}  // namespace

TEST_CASE("trie: random keys, with and without weights") {
  std::mt19937 random(1);
  const std::string all_bytes = [] {
    std::string bytes;
    for (int c = 0; c < 256; ++c) bytes += static_cast<char>(c);
    return bytes;
  }();
  for (const std::string& alphabet :
       {std::string("ab"), std::string("\x00\xff\x80z", 4), all_bytes}) {
    for (const std::size_t count : {1u, 30u, 800u}) {
      std::map<std::string, std::uint32_t> keys;
      for (std::size_t i = 0; i < count; ++i) keys[random_bytes(random, alphabet, 9)] = 0;
      std::vector<std::string_view> list;
      std::vector<double> weights;
      for (auto& [key, value] : keys) list.push_back(key);
      std::shuffle(list.begin(), list.end(), random);
      for (std::size_t i = 0; i < list.size(); ++i) {
        keys[std::string(list[i])] = static_cast<std::uint32_t>(i);
        weights.push_back(static_cast<double>(random() % 100));
      }
      std::vector<std::string> texts{""};
      for (int i = 0; i < 60; ++i) texts.push_back(random_bytes(random, alphabet, 12));
      for (std::size_t i = 0; i < list.size(); i += 7) texts.emplace_back(list[i].substr(0, 3));
      check_against_map(keys, ByteTrie(list), texts);
      check_against_map(keys, ByteTrie(list, weights), texts);
    }
  }
}

TEST_CASE("trie: one long key, nested keys, no keys") {
  const std::string longest(5000, 'x');
  std::vector<std::string_view> list;
  std::map<std::string, std::uint32_t> keys;
  for (std::size_t length = 1; length <= longest.size(); length += 499) {
    keys[longest.substr(0, length)] = static_cast<std::uint32_t>(list.size());
    list.push_back(std::string_view(longest).substr(0, length));
  }
  check_against_map(keys, ByteTrie(list), {longest, longest + "x", "x", "xx", "y"});
  check_against_map({}, ByteTrie(), {"", "a"});
  const ByteTrie copy = ByteTrie(list);
  CHECK(copy.bytes() > 0);
  CHECK(copy.find("x") == 0);
}

TEST_CASE("trie: bad keys") {
  using Keys = std::vector<std::string_view>;
  CHECK_THROWS_WITH_AS(ByteTrie(Keys{"a", ""}), "eigenblocks: ByteTrie: key 1 is empty",
                       eb::invalid_argument);
  CHECK_THROWS_AS(ByteTrie(Keys{"b", "a", "b"}), eb::invalid_argument);
  const Keys one{"a"};
  const std::vector<double> two{1, 2};
  CHECK_THROWS_WITH_AS(
      ByteTrie(one, two),
      "eigenblocks: ByteTrie: weights has 2 entries, expected 1 (one for each key)",
      eb::invalid_argument);
}
