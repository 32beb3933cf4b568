// Small models with dense lattices, and the segmentations of a text one by one.
#pragma once

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/token/unigram_model.hpp>

#include <exception>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace toy {

namespace eb = eigenblocks;
using Pieces = std::vector<std::uint32_t>;

/// What f throws.
template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// Counts by pieces; the name says which from_counts a braced list is for.
inline eb::UnigramModel model_of(const std::vector<std::pair<std::string, double>>& counts) {
  return eb::UnigramModel::from_counts(counts);
}

/// All strings over the first letters of the alphabet up to a length, with counts 1 .. 9; `bytes`: all single bytes too.
inline eb::UnigramModel dense_model(int letters, int length, std::uint64_t seed,
                                    bool bytes = false) {
  eb::Random random(seed);
  std::vector<std::pair<std::string, double>> counts;
  std::vector<std::string> level{""};
  for (int n = 1; n <= length; ++n) {
    std::vector<std::string> next;
    for (const std::string& head : level) {
      for (int c = 0; c < letters; ++c) next.push_back(head + static_cast<char>('a' + c));
    }
    level = next;
    for (const std::string& piece : level)
      counts.emplace_back(piece, static_cast<double>(1 + random.below(9)));
  }
  for (int c = 0; bytes && c < 256; ++c) {
    if (c < 'a' || c >= 'a' + letters) counts.emplace_back(std::string(1, static_cast<char>(c)), 1);
  }
  return model_of(counts);
}

/// English-like pieces, all bytes among them.
inline eb::UnigramModel word_model() {
  std::vector<std::pair<std::string, double>> counts{
      {"the", 50}, {"th", 9},  {"he", 12},   {" the", 60}, {"in", 20},          {"ing", 30},
      {" w", 11},  {"wat", 5}, {"watch", 8}, {"ching", 3}, {"er", 25},          {"aa", 3},
      {"aaa", 2},  {"ab", 7},  {"ba", 7},    {"\n\n", 6},  {"\xe4\xb8\xad", 4}, {" water", 6},
      {"ater", 4}, {"e w", 5}, {"\nthe", 2}};
  for (int c = 0; c < 256; ++c)
    counts.emplace_back(std::string(1, static_cast<char>(c)), c < 128 ? 4 + c % 7 : 1);
  return eb::UnigramModel::from_counts(counts);
}

/// Every segmentation, by the ends in lexicographic order.
inline void collect(const eb::UnigramModel& model, std::string_view text, Pieces& head,
                    std::vector<Pieces>& all) {
  if (text.empty()) return all.push_back(head);
  for (std::size_t n = 1; n <= text.size(); ++n) {
    const std::uint32_t p = model.find(text.substr(0, n));
    if (p == eb::ByteTrie::kNone) continue;
    head.push_back(p);
    collect(model, text.substr(n), head, all);
    head.pop_back();
  }
}
inline std::vector<Pieces> segmentations(const eb::UnigramModel& model, std::string_view text) {
  Pieces head;
  std::vector<Pieces> all;
  collect(model, text, head, all);
  return all;
}

inline double score(const std::vector<double>& theta, const Pieces& y) {
  double sum = 0;
  for (const std::uint32_t p : y) sum += theta[p];
  return sum;
}

inline std::string random_text(eb::Random& random, std::size_t length, std::string_view alphabet) {
  std::string text;
  for (std::size_t i = 0; i < length; ++i)
    text +=
        alphabet[static_cast<std::size_t>(random.below(static_cast<eb::Index>(alphabet.size())))];
  return text;
}

}  // namespace toy
