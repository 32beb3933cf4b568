// Tokenization, one thread.
//
//   encode/LANGUAGE/nfc            text to ids, as a user calls it: normalise, cut, Viterbi
//   encode/LANGUAGE/viterbi        Viterbi and ids alone, line by line
//   decode/LANGUAGE                ids to text
//   nfc/LANGUAGE                   normalisation alone; nfc_share: its time as a share of encode's, timed in the same run
//   train/LANGUAGE/KB:N            the first N KB of the text to a vocabulary
//
// bytes_per_second counts bytes of text.  limit: copying the text (a tokenizer that only moves bytes would reach 1); walks
// through a trie wait for memory and stay far below it.  English: examples/data/kjv.txt; Chinese: the poems of
// tests/golden/tokenize/corpora, which are few (86 KB) and so a vocabulary that the cache holds.  Vocabularies are trained
// at the start, on the text itself.
#include <eigenblocks/io/bytepiece_model.hpp>
#include <eigenblocks/io/mapped_file.hpp>
#include <eigenblocks/io/nfc.hpp>
#include <eigenblocks/token/bytepiece.hpp>
#include <eigenblocks/token/bytepiece_trainer.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "harness.hpp"

namespace {

namespace eb = eigenblocks;

std::string file_text(const std::string& name) {
  const auto bytes = eb::read_file(EIGENBLOCKS_SOURCE_DIR "/" + name);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string read_text(bool english) {
  if (english) return file_text("examples/data/kjv.txt");
  std::string all;
  std::istringstream lines(file_text("tests/golden/tokenize/corpora/zh_tang.jsonl"));
  for (std::string line; std::getline(lines, line);)
    all += nlohmann::json::parse(line).get<std::string>() + "\n";
  return all;
}

eb::BytePieceTrainerOptions options() { return {.max_vocab_size = {40000}, .normalizer = eb::nfc}; }

/// A language's text and vocabulary, made when a benchmark first asks.
struct Language {
  explicit Language(bool english) : text(read_text(english)) {
    const std::vector<std::string> texts{text};
    tokenizer =
        std::make_unique<eb::BytePiece>(eb::train_bytepiece(texts, options())[0].model, eb::nfc);
    if (text.size() > 1000000) text.resize(1000000);  // ASCII there
    ids = tokenizer->encode(text);
  }
  std::string text;
  std::unique_ptr<eb::BytePiece> tokenizer;
  std::vector<eb::TokenId> ids;
};

const Language& language(bool english) {
  static std::unique_ptr<Language> made[2];
  auto& slot = made[english ? 1 : 0];
  if (!slot) slot = std::make_unique<Language>(english);
  return *slot;
}

void describe(benchmark::State& state, const Language& l) {
  state.counters["vocabulary"] = static_cast<double>(l.tokenizer->vocab_size());
  state.counters["bytes_per_token"] =
      static_cast<double>(l.text.size()) / static_cast<double>(l.ids.size());
}

bench::Work work(std::size_t size) {
  const double bytes = static_cast<double>(size);
  return {.bytes = bytes, .limit = bench::copy_limit(2 * bytes)};
}

template <class F>
void add(const std::string& name, bool english, F&& run) {
  benchmark::RegisterBenchmark((name).c_str(), [=](benchmark::State& state) {
    const Language& l = language(english);
    run(state, l);
    describe(state, l);
  })->Unit(benchmark::kMillisecond);
}

void add_language(const std::string& name, bool english) {
  add("encode/" + name + "/nfc", english, [](benchmark::State& state, const Language& l) {
    bench::measure(state, work(l.text.size()),
                   [&] { benchmark::DoNotOptimize(l.tokenizer->encode(l.text)); });
  });
  add("encode/" + name + "/viterbi", english, [](benchmark::State& state, const Language& l) {
    eb::Viterbi viterbi;
    std::vector<eb::TokenId> ids;
    bench::measure(state, work(l.text.size()), [&] {
      ids.clear();
      eb::for_each_segment(l.text, [&](std::string_view segment) {
        viterbi.run(l.tokenizer->model(), segment);
        viterbi.append_ids(l.tokenizer->model(), ids);
      });
    });
  });
  add("decode/" + name, english, [](benchmark::State& state, const Language& l) {
    bench::measure(state, work(l.text.size()),
                   [&] { benchmark::DoNotOptimize(l.tokenizer->decode(l.ids)); });
  });
  add("nfc/" + name, english, [](benchmark::State& state, const Language& l) {
    std::string buffer;
    const auto normalise = [&] { benchmark::DoNotOptimize(eb::nfc(l.text, buffer)); };
    bench::measure(state, work(l.text.size()), normalise);
    const double encode =
        bench::best_seconds([&] { benchmark::DoNotOptimize(l.tokenizer->encode(l.text)); });
    state.counters["nfc_share"] = bench::best_seconds(normalise) / encode;
  });
}

void add_training(const std::string& name, bool english, std::size_t kb) {
  benchmark::RegisterBenchmark(
      ("train/" + name + "/KB:" + std::to_string(kb)).c_str(),
      [=](benchmark::State& state) {
        std::string text = read_text(english);
        if (text.size() > kb * 1024) text.resize(kb * 1024);
        const std::vector<std::string> texts{text};
        bench::measure(state, {.bytes = static_cast<double>(text.size()), .limit = {}},
                       [&] { benchmark::DoNotOptimize(eb::train_bytepiece(texts, options())); });
      })
      ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  add_language("english", true);
  add_language("chinese", false);
  add_training("english", true, 64);
  add_training("english", true, 1024);
  add_training("chinese", false, 80);
  return bench::run(argc, argv);
}
