// A text as bytes, cut into training and held-out blocks, and batches of it.
#pragma once

#include "arguments.hpp"

#include <eigenblocks/core/random.hpp>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

namespace example {

using eigenblocks::Index;

/// Blocks of 8192 bytes; block i with i % 20 == 19 is held out.  A text of fewer than 20 blocks holds out its last 5 %.
struct Corpus {
  std::vector<Index> training;
  std::vector<std::vector<Index>> held_out;
};

inline Corpus read_corpus(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw usage_error("cannot read text file " + path);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::vector<Index> bytes(text.size());
  std::transform(text.begin(), text.end(), bytes.begin(),
                 [](char c) { return Index(static_cast<unsigned char>(c)); });
  constexpr std::size_t kBlock = 8192;
  Corpus corpus;
  const auto block = [&](std::size_t first, std::size_t last) {
    return std::vector<Index>(bytes.begin() + static_cast<std::ptrdiff_t>(first),
                              bytes.begin() + static_cast<std::ptrdiff_t>(last));
  };
  if (bytes.size() < 20 * kBlock) {
    const std::size_t cut = bytes.size() - bytes.size() / 20;
    corpus.training = block(0, cut);
    corpus.held_out.push_back(block(cut, bytes.size()));
    return corpus;
  }
  for (std::size_t at = 0, i = 0; at < bytes.size(); at += kBlock, ++i) {
    std::vector<Index> part = block(at, std::min(at + kBlock, bytes.size()));
    if (i % 20 == 19) {
      corpus.held_out.push_back(std::move(part));
    } else {
      corpus.training.insert(corpus.training.end(), part.begin(), part.end());
    }
  }
  return corpus;
}

/// Packed sequences and, one position later, what should follow.
struct Batch {
  std::vector<Index> ids, targets;
  void add(std::span<const Index> text, Index first, Index length) {
    const auto from = text.begin() + first;
    ids.insert(ids.end(), from, from + length);
    targets.insert(targets.end(), from + 1, from + length + 1);
  }
};

/// `sequences` windows at random places, a pure function of (seed, step): nothing to save for a resumed run.
inline Batch training_batch(const Corpus& corpus, std::uint64_t seed, Index step, Index sequences,
                            Index length) {
  eigenblocks::Random random(seed, static_cast<std::uint64_t>(step) + 1);
  Batch batch;
  for (Index b = 0; b < sequences; ++b) {
    batch.add(corpus.training, random.below(static_cast<Index>(corpus.training.size()) - length),
              length);
  }
  return batch;
}

/// `count` windows spread evenly over the held-out blocks, none across a border.
inline Batch validation_batch(const Corpus& corpus, Index count, Index length) {
  Batch batch;
  const Index blocks = static_cast<Index>(corpus.held_out.size());
  for (Index b = 0; b < blocks; ++b) {
    const Index first = b * count / blocks, here = (b + 1) * count / blocks - first;
    const std::vector<Index>& text = corpus.held_out[static_cast<std::size_t>(b)];
    const Index room = static_cast<Index>(text.size()) - length - 1;
    for (Index i = 0; i < here && room >= 0; ++i) {
      batch.add(text, here > 1 ? i * room / (here - 1) : room / 2, length);
    }
  }
  return batch;
}

inline void require_length(const Corpus& corpus, Index length, const std::string& path) {
  Index longest = 0;
  for (const auto& block : corpus.held_out)
    longest = std::max(longest, static_cast<Index>(block.size()));
  if (static_cast<Index>(corpus.training.size()) <= length + 1 || longest <= length) {
    throw usage_error("text " + path + " is too short for sequences of " + std::to_string(length) +
                      ": " + std::to_string(corpus.training.size()) +
                      " bytes to train on, at most " + std::to_string(longest) +
                      " held out in a row");
  }
}

}  // namespace example
