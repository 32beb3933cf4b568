// A trie over byte strings as a double array: the vocabulary of a tokenizer, walked once for every byte of its text.
//
//   const std::vector<std::string_view> keys = {"a", "ab", "b"};
//   const ByteTrie trie(keys, weights);                       // key i has the value i; weights: how often each is met
//   trie.find("ab")                                           // 1, or ByteTrie::kNone
//   trie.walk("abc", [](std::size_t length, std::uint32_t key) { ... });       // every key that starts the text, shortest first
//   trie.walk_all("a", [](std::string_view key, std::uint32_t value) { ... }); // every key that the bytes start, in byte order
//
// A node is 8 bytes: where its children lie (child c at base + c), its own byte, its key.  No two nodes share a base, so a
// byte that fits is proof of the parent.  Nodes are placed by weight, heaviest first: those that are met again and again lie
// in a few neighbouring cache lines (at 160k pieces the whole array does not fit a second-level cache).
// Limits: keys of at least one byte, all distinct, fewer than 2^23.  Errors (invalid_argument): empty or equal keys, too many,
// sizes of keys and weights that differ.
// Source: J. Aoe, "An efficient digital search algorithm by using a double-array structure", IEEE TSE 15 (1989).
#pragma once

#include <eigenblocks/core/error.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

class ByteTrie {
 public:
  static constexpr std::uint32_t kNone = (1u << 23) - 1;

  ByteTrie() : ByteTrie(std::span<const std::string_view>{}) {}
  explicit ByteTrie(std::span<const std::string_view> keys, std::span<const double> weights = {}) {
    detail::require(keys.size() < kNone, "ByteTrie: ", keys.size(), " keys, at most ", kNone - 1);
    detail::require(weights.empty() || weights.size() == keys.size(), "ByteTrie: weights has ",
                    weights.size(), " entries, expected ", keys.size(), " (one for each key)");
    std::vector<std::uint32_t> order(keys.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](auto a, auto b) { return keys[a] < keys[b]; });
    for (std::size_t i = 0; i < order.size(); ++i) {
      detail::require(!keys[order[i]].empty(), "ByteTrie: key ", order[i], " is empty");
      detail::require(i == 0 || keys[order[i - 1]] != keys[order[i]], "ByteTrie: keys ",
                      order[i == 0 ? 0 : i - 1], " and ", order[i], " are equal");
    }
    Builder(keys, weights, order).build(units_);
    size_ = keys.size();
  }

  std::size_t size() const { return size_; }
  std::size_t bytes() const { return units_.size() * sizeof(Unit); }

  /// A node.  The child of byte c is units()[base + c], if that unit `is(c)`; the root's base is 0.
  struct Unit {
    std::uint32_t base;  ///< of the children
    std::uint32_t tag;   ///< key << 9 | 1 << 8 (in use) | byte

    bool is(std::uint8_t byte) const { return (tag & 0x1ffu) == (0x100u | byte); }
    /// The key that ends here, or kNone.
    std::uint32_t key() const { return tag >> 9; }
  };
  const Unit* units() const { return units_.data(); }

  /// The key equal to `text`, or kNone.
  std::uint32_t find(std::string_view text) const {
    std::uint32_t base = 0, key = kNone;
    for (const char c : text) {
      const Unit u = units_[base + static_cast<std::uint8_t>(c)];
      if (!u.is(static_cast<std::uint8_t>(c))) return kNone;
      base = u.base;
      key = u.key();
    }
    return key;
  }

  /// f(length, key) for every key at the start of `text`, shortest first.
  template <class F>
  void walk(std::string_view text, F&& f) const {
    std::uint32_t base = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const auto c = static_cast<std::uint8_t>(text[i]);
      const Unit u = units_[base + c];
      if (!u.is(c)) return;
      if (u.key() != kNone) f(i + 1, u.key());
      base = u.base;
    }
  }

  /// f(key's bytes, key) for every key that starts with `prefix`, in byte order.
  template <class F>
  void walk_all(std::string_view prefix, F&& f) const {
    std::uint32_t base = 0, key = kNone;
    for (const char c : prefix) {
      const Unit u = units_[base + static_cast<std::uint8_t>(c)];
      if (!u.is(static_cast<std::uint8_t>(c))) return;
      base = u.base;
      key = u.key();
    }
    std::string bytes(prefix);
    struct Level {
      std::uint32_t base;
      int next;
    };
    if (key != kNone) f(std::string_view(bytes), key);
    std::vector<Level> stack{{base, 0}};
    while (!stack.empty()) {
      Level& level = stack.back();
      if (level.next == 256) {
        stack.pop_back();
        if (!stack.empty()) bytes.pop_back();
        continue;
      }
      const auto c = static_cast<std::uint8_t>(level.next++);
      const Unit u = units_[level.base + c];
      if (!u.is(c)) continue;
      bytes.push_back(static_cast<char>(c));
      if (u.key() != kNone) f(std::string_view(bytes), u.key());
      stack.push_back({u.base, 0});
    }
  }

 private:
  /// Puts nodes into the array, the heaviest first.
  class Builder {
   public:
    Builder(std::span<const std::string_view> keys, std::span<const double> weights,
            const std::vector<std::uint32_t>& order)
        : keys_(keys), order_(order), sum_(keys.size() + 1, 0.0) {
      for (std::size_t i = 0; i < keys.size(); ++i)
        sum_[i + 1] = sum_[i] + (weights.empty() ? 1.0 : weights[order[i]]);
    }

    void build(std::vector<Unit>& units) {
      units_ = &units;
      grow(512);
      std::priority_queue<Pending> queue;
      queue.push({0.0, 0, order_.size(), 0, 0});
      bool first = true;
      std::vector<Pending> children;
      while (!queue.empty()) {
        const Pending node = queue.top();
        queue.pop();
        collect(node, children);
        if (children.empty() && !first) continue;
        const std::uint32_t base = first ? 0 : place(children);
        if (first) use_base(0);
        if (!first) units[node.at].base = base;
        first = false;
        for (Pending& child : children) {
          child.at = base + child_byte(child);
          take(child.at);
          units[child.at] = {kLeaf, unit_tag(child)};
          queue.push(child);
        }
      }
      finish();
    }

   private:
    static constexpr std::uint32_t kLeaf = ~std::uint32_t{0};

    /// Keys [begin, end) of the order share `depth` bytes.
    struct Pending {
      double weight;
      std::size_t begin, end, depth;
      std::uint32_t at;
      bool operator<(const Pending& other) const {
        return weight != other.weight ? weight < other.weight : begin > other.begin;
      }
    };

    std::string_view key(std::size_t i) const { return keys_[order_[i]]; }
    std::uint8_t child_byte(const Pending& node) const {
      return static_cast<std::uint8_t>(key(node.begin)[node.depth - 1]);
    }
    std::uint32_t unit_tag(const Pending& node) const {
      const bool ends = key(node.begin).size() == node.depth;
      return (ends ? order_[node.begin] : kNone) << 9 | 0x100u | child_byte(node);
    }

    void collect(const Pending& node, std::vector<Pending>& children) const {
      children.clear();
      std::size_t i = node.begin;
      while (i < node.end && key(i).size() == node.depth) ++i;
      while (i < node.end) {
        const char c = key(i)[node.depth];
        std::size_t end = i + 1;
        while (end < node.end && key(end)[node.depth] == c) ++end;
        children.push_back({sum_[end] - sum_[i], i, end, node.depth + 1, 0});
        i = end;
      }
    }

    /// The least base, not used before, at which all children are free.
    std::uint32_t place(const std::vector<Pending>& children) {
      const std::uint32_t low = child_byte(children.front());
      for (std::uint32_t at = next_free(low + 1);; at = next_free(at + 1)) {
        const std::uint32_t base = at - low;
        if (base + 256 > free_.size()) grow(base + 512);
        if (used_base_[base]) continue;
        bool fits = true;
        for (const Pending& child : children) fits = fits && free_[base + child_byte(child)];
        if (!fits) {
          if (++misses_ > 64 && at == first_free_) skip();
          continue;
        }
        use_base(base);
        return base;
      }
    }
    std::uint32_t next_free(std::uint32_t at) {
      at = std::max(at, first_free_);
      for (;; ++at) {
        if (at + 512 > free_.size()) grow(at + 1024);
        if (free_[at]) return at;
      }
    }
    /// A slot that nothing fitted 64 times is given up.
    void skip() {
      misses_ = 0;
      do ++first_free_;
      while (first_free_ < free_.size() && !free_[first_free_]);
    }
    void take(std::uint32_t at) {
      free_[at] = 0;
      while (first_free_ < free_.size() && !free_[first_free_]) ++first_free_;
    }
    void use_base(std::uint32_t base) { used_base_[base] = 1; }
    void grow(std::size_t size) {
      if (size <= free_.size()) return;
      size = std::max(size, free_.size() + free_.size() / 2);
      units_->resize(size, Unit{0, 0});
      free_.resize(size, 1);
      used_base_.resize(size, 0);
      if (first_free_ == 0) first_free_ = 256;  // slots below are for the root's children
    }
    /// Leaves get a base at which nothing lies, and every base 256 units to look at.
    void finish() {
      std::size_t last = 256;
      for (std::size_t i = 0; i < free_.size(); ++i) {
        if (!free_[i]) last = std::max(last, i + 1);
        if (used_base_[i]) last = std::max(last, i + 256);
      }
      units_->resize(last + 256, Unit{0, 0});
      for (Unit& unit : *units_) {
        if (unit.base == kLeaf) unit.base = static_cast<std::uint32_t>(last);
      }
      units_->shrink_to_fit();
    }

    std::span<const std::string_view> keys_;
    const std::vector<std::uint32_t>& order_;
    std::vector<double> sum_;
    std::vector<Unit>* units_ = nullptr;
    std::vector<std::uint8_t> free_, used_base_;
    std::uint32_t first_free_ = 0;
    int misses_ = 0;
  };

  std::vector<Unit> units_;
  std::size_t size_ = 0;
};

EIGENBLOCKS_NAMESPACE_END
