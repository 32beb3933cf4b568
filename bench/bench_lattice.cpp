// Sums over all segmentations and random ones: token/lattice.hpp, token/sampling.hpp, as a share of Viterbi.
//
//   viterbi     deterministic encoding, ids included
//   sums        log Z and expected counts at alpha = 1
//   sample      one random segmentation at alpha = 0.1, ids included
//   reservoir   the same in one pass, a uniform number for each edge
//   legacy      the rule of BytePiece 0.4.x
//   streaming   the text in pushes of 4096 bytes
//
// limit: Viterbi over the same lines.  Text and vocabulary are made up here: words drawn by Zipf's law from random
// letters, pieces counted from the text, so that a position has about three edges.
#include <eigenblocks/token/lattice.hpp>
#include <eigenblocks/token/sampling.hpp>
#include <eigenblocks/token/streaming.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include "harness.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

namespace eb = eigenblocks;

struct Material {
  explicit Material(std::size_t bytes, std::size_t pieces) {
    eb::Random random(1);
    constexpr std::string_view letters = "eeeeeetttttaaaaoooiiinnnssshhhrrrddlluccmmfwgypbvk";
    std::vector<std::string> words;
    for (int i = 0; i < 20000; ++i) {
      std::string word = " ";
      const auto length = 1 + random.below(4) + random.below(5);
      for (eb::Index j = 0; j < length; ++j)
        word +=
            letters[static_cast<std::size_t>(random.below(static_cast<eb::Index>(letters.size())))];
      words.push_back(word);
    }
    std::size_t line = 0;
    while (text.size() < bytes) {
      // Rank with density 1 / rank.
      const double rank = std::exp(random.uniform() * std::log(20000.0));
      text += words[static_cast<std::size_t>(rank) - 1];
      if (text.size() - line > 120) text += '\n', line = text.size();
    }
    std::unordered_map<std::string, double> seen;
    for (std::size_t at = 0; at + 10 < std::min<std::size_t>(text.size(), 400000); ++at) {
      for (std::size_t n = 2; n <= 10; ++n) seen[text.substr(at, n)] += 1;
    }
    std::vector<std::pair<std::string, double>> counts(seen.begin(), seen.end());
    std::erase_if(counts, [](const auto& c) { return c.first.find('\n') != c.first.npos; });
    std::sort(counts.begin(), counts.end(), [](const auto& a, const auto& b) {
      const double x = a.second * static_cast<double>(a.first.size());
      const double y = b.second * static_cast<double>(b.first.size());
      return x != y ? x > y : a.first < b.first;
    });
    counts.resize(std::min(counts.size(), pieces));
    for (int c = 0; c < 256; ++c) {
      const char byte = static_cast<char>(c);
      counts.emplace_back(
          std::string(1, byte),
          1.0 + static_cast<double>(std::count(text.begin(), text.end(), byte)) / 8);
    }
    model = eb::UnigramModel::from_counts(counts);
    std::size_t edges = 0;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = std::min(text.find('\n', at), text.size() - 1) + 1;
      lines.push_back(std::string_view(text).substr(at, end - at));
      at = end;
    }
    for (const std::string_view l : lines) {
      for (std::size_t s = 0; s < l.size(); ++s)
        model.trie().walk(l.substr(s), [&](std::size_t, std::uint32_t) { ++edges; });
    }
    edges_per_byte = static_cast<double>(edges) / static_cast<double>(text.size());
  }

  std::string text;
  std::vector<std::string_view> lines;
  eb::UnigramModel model;
  double edges_per_byte = 0;
};

const Material& material(std::size_t pieces) {
  static std::unordered_map<std::size_t, Material> made;
  return made.try_emplace(pieces, std::size_t{1} << 20, pieces).first->second;
}

void viterbi(const Material& m, std::vector<eb::TokenId>& ids) {
  static eb::Viterbi tables;
  ids.clear();
  for (const std::string_view line : m.lines) {
    tables.run(m.model, line);
    tables.append_ids(m.model, ids);
  }
}

void sample(const Material& m, const eb::UnigramWeights& weights, eb::SamplingRule rule,
            std::vector<eb::TokenId>& ids) {
  static eb::LatticeSampler sampler;
  std::vector<std::uint32_t> pieces;
  ids.clear();
  eb::Random random(1);
  for (const std::string_view line : m.lines) {
    pieces.clear();
    eb::sample_segmentation(sampler, weights, line, random, pieces, rule);
    for (const std::uint32_t p : pieces) ids.push_back(m.model.id(p));
  }
}

enum class Form { viterbi, sums, sample, reservoir, legacy, streaming };
constexpr const char* kForms[] = {"viterbi", "sums", "sample", "reservoir", "legacy", "streaming"};

void add(Form form, std::size_t pieces) {
  const std::string name =
      std::string(kForms[static_cast<int>(form)]) + "/pieces:" + std::to_string(pieces);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const Material& m = material(pieces);
    const eb::UnigramWeights one(m.model, 1), tenth(m.model, 0.1);
    std::vector<eb::TokenId> ids;
    std::vector<double> counts(m.model.size());
    eb::Lattice lattice;
    ids.reserve(m.text.size());
    bench::measure(state,
                   {.bytes = static_cast<double>(m.text.size()),
                    .limit = [&] { return bench::best_seconds([&] { viterbi(m, ids); }, 0.3); }},
                   [&] {
                     switch (form) {
                       case Form::viterbi:
                         viterbi(m, ids);
                         break;
                       case Form::sums:
                         std::fill(counts.begin(), counts.end(), 0.0);
                         for (const std::string_view line : m.lines)
                           lattice.run_counts(one, line, 1, counts);
                         break;
                       case Form::sample:
                         sample(m, tenth, eb::SamplingRule::perfect, ids);
                         break;
                       case Form::reservoir:
                         sample(m, tenth, eb::SamplingRule::reservoir, ids);
                         break;
                       case Form::legacy:
                         sample(m, tenth, eb::SamplingRule::legacy, ids);
                         break;
                       case Form::streaming: {
                         ids.clear();
                         eb::StreamingEncoder encoder(m.model);
                         for (std::size_t at = 0; at < m.text.size(); at += 4096)
                           encoder.push(std::string_view(m.text).substr(at, 4096), ids);
                         encoder.finish(ids);
                         break;
                       }
                     }
                     bench::touch(ids.data());
                     bench::touch(counts.data());
                   });
    state.counters["edges/byte"] = m.edges_per_byte;
  })->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const std::size_t pieces : {std::size_t{8000}, std::size_t{40000}}) {
    for (const Form form : {Form::viterbi, Form::sums, Form::sample, Form::reservoir, Form::legacy,
                            Form::streaming}) {
      add(form, pieces);
    }
  }
  return bench::run(argc, argv);
}
