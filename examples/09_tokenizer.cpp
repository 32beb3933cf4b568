// A tokenizer on the command line: train, encode, decode, sample, info.
//
//   09_tokenizer train  --text kjv.txt --model en.model --size 4000,1000     more than one size: en.model.4000, en.model.1000
//   09_tokenizer encode --model en.model --text in.txt > ids                 ids of a line on a line, separated by spaces
//   09_tokenizer encode --model en.model --pieces 1 < in.txt                 the pieces instead, separated by |
//   09_tokenizer decode --model en.model --text ids > out.txt
//   09_tokenizer sample --model en.model --alpha 0.1 --count 5 --seed 7      random segmentations of each line
//   09_tokenizer info   --model en.model --text in.txt                       the model; bytes per token of a text
//   09_tokenizer                                                             a tour on examples/data/kjv.txt, nothing is written
//
// --text - (the default) is standard input.  Training: --order 6 --min-count 2 --length 36 --digits 1 (each digit on its own)
// --unicode 0 (pieces may cut characters) --rescue 1 --workers N.  --raw 1 encodes without NFC, byte for byte.
// A model file is that of the Python package bytepiece 0.6.3 and can be read by it; sample draws from its exact law.
#include "support/arguments.hpp"

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/io/bytepiece_model.hpp>
#include <eigenblocks/io/mapped_file.hpp>
#include <eigenblocks/token/bytepiece.hpp>
#include <eigenblocks/token/bytepiece_trainer.hpp>
#include <eigenblocks/token/sampling.hpp>

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

using namespace example;
namespace eb = eigenblocks;
using eb::Index;
using eb::TokenId;

std::string read_text(const std::string& path) {
  if (path != "-") {
    const auto bytes = eb::read_file(path);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  std::string text;
  char buffer[1 << 16];
  for (std::size_t size; (size = std::fread(buffer, 1, sizeof(buffer), stdin)) > 0;)
    text.append(buffer, size);
  if (std::ferror(stdin)) throw usage_error("standard input cannot be read");
  return text;
}

void print(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// A bar that stays on its line; nothing where standard error is no terminal.
class ProgressBar {
 public:
  void operator()(std::string_view stage, double done) {
    if (!::isatty(STDERR_FILENO)) return;
    constexpr int kWidth = 40;
    const int filled = static_cast<int>(done * kWidth);
    std::fprintf(stderr, "\r%-8.*s [%-*s] %3.0f %%", static_cast<int>(stage.size()), stage.data(),
                 kWidth, std::string(static_cast<std::size_t>(filled), '#').c_str(), 100 * done);
    if (done >= 1) std::fprintf(stderr, "\n");
  }
};

std::vector<Index> sizes_of(const std::string& list) {
  std::vector<Index> sizes;
  for (std::size_t at = 0; at <= list.size();) {
    const std::size_t end = std::min(list.find(',', at), list.size());
    Index size = 0;
    const auto [stop, error] = std::from_chars(list.data() + at, list.data() + end, size);
    if (error != std::errc{} || stop != list.data() + end)
      throw usage_error("--size " + list + ": expected numbers, separated by commas");
    sizes.push_back(size);
    at = end + 1;
  }
  return sizes;
}

eb::Normalizer normalizer_of(const Arguments& arguments) {
  if (arguments.integer("raw", 0) != 0) return eb::no_normalization;
  return eb::nfc;
}

eb::BytePiece load(const Arguments& arguments) {
  if (!arguments.given("model")) throw usage_error("--model FILE is missing");
  const bool raw = arguments.integer("raw", 0) != 0;
  return eb::load_bytepiece(arguments.text("model"), {.normalizer = normalizer_of(arguments),
                                                      .invalid = raw ? eb::InvalidUtf8::passthrough
                                                                     : eb::InvalidUtf8::error});
}

/// f(line with its newlines) for each line; what f throws is told with the place.
template <class F>
void for_each_line(const Arguments& arguments, const std::string& text, F&& f) {
  long long line = 1;
  eb::for_each_segment(text, [&](std::string_view segment) {
    try {
      f(segment);
    } catch (const std::exception& error) {
      const std::string name =
          arguments.text("text") == "-" ? "standard input" : arguments.text("text");
      throw usage_error(name + ":" + std::to_string(line) + ": " + error.what());
    }
    line += std::count(segment.begin(), segment.end(), '\n');
  });
}

std::string shown(const eb::BytePiece& tokenizer, const std::vector<TokenId>& ids) {
  std::string line;
  for (const TokenId id : ids) {
    const std::string_view piece = tokenizer.token_bytes(id);
    const bool text = eb::utf8_error(piece) == eb::kUtf8Valid;
    if (!line.empty()) line += '|';
    for (const char c : piece) {
      if (c == '\n') {
        line += "\\n";
      } else if (text) {
        line += c;
      } else {
        const std::string quoted = eb::detail::quoted_bytes({&c, 1});
        line += quoted.substr(1, quoted.size() - 2);
      }
    }
  }
  return line;
}

void train(const Arguments& arguments) {
  if (!arguments.given("model")) throw usage_error("--model FILE is missing: where to write");
  const std::vector<std::string> texts{read_text(arguments.text("text"))};
  const eb::BytePieceTrainerOptions options{.order = arguments.integer("order", 1),
                                            .max_vocab_size = sizes_of(arguments.text("size")),
                                            .max_piece_length = arguments.integer("length", 1),
                                            .min_count = arguments.integer("min-count", 1),
                                            .isolate_digits = arguments.integer("digits", 0) != 0,
                                            .ensure_unicode = arguments.integer("unicode", 0) != 0,
                                            .rescue = arguments.integer("rescue", 0) != 0,
                                            .normalizer = normalizer_of(arguments),
                                            .is_digit = eb::is_decimal_digit,
                                            .progress = ProgressBar{}};
  const auto workers = static_cast<int>(arguments.integer("workers", 0));
  const eb::thread_pool pool(
      workers > 0 ? workers : std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  const double start = seconds();
  const auto trained = eb::train_bytepiece(texts, options, pool);
  const double took = seconds() - start;
  const auto names = eb::save_bytepiece_models(trained, arguments.text("model"));
  for (std::size_t i = 0; i < names.size(); ++i) {
    std::printf("%s: %zu pieces (%lld ids asked for)\n", names[i].c_str(), trained[i].model.size(),
                static_cast<long long>(trained[i].max_vocab_size));
  }
  std::printf("%.1f MB in %.1f s\n", static_cast<double>(texts[0].size()) / 1e6, took);
}

void encode(const Arguments& arguments) {
  const eb::BytePiece tokenizer = load(arguments);
  const bool pieces = arguments.integer("pieces", 0) != 0;
  for_each_line(arguments, read_text(arguments.text("text")), [&](std::string_view line) {
    const auto ids = tokenizer.encode(line);
    std::string out;
    if (pieces) {
      out = shown(tokenizer, ids);
    } else {
      for (const TokenId id : ids) out += (out.empty() ? "" : " ") + std::to_string(id);
    }
    print(out + "\n");
  });
}

void decode(const Arguments& arguments) {
  const eb::BytePiece tokenizer = load(arguments);
  eb::BytePieceDecoder stream(tokenizer);
  for_each_line(arguments, read_text(arguments.text("text")), [&](std::string_view line) {
    const char* at = line.data();
    const char* const end = at + line.size();
    for (;;) {
      while (at < end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')) ++at;
      if (at == end) break;
      TokenId id = 0;
      const auto [stop, error] = std::from_chars(at, end, id);
      if (error != std::errc{})
        throw usage_error("column " + std::to_string(at - line.data() + 1) + ": expected an id");
      print(stream.push(id));
      at = stop;
    }
  });
}

/// Random segmentations of one line, segment by segment.
std::vector<TokenId> sample_line(const eb::BytePiece& tokenizer, const eb::UnigramWeights& weights,
                                 std::string_view line, eb::Random& random) {
  eb::LatticeSampler sampler;
  std::vector<std::uint32_t> pieces;
  tokenizer.for_each_segment(line, [&](std::string_view segment) {
    sampler.run(weights, segment);
    sampler.draw(random, pieces);
  });
  std::vector<TokenId> ids;
  for (const std::uint32_t p : pieces) ids.push_back(tokenizer.model().id(p));
  return ids;
}

void sample(const Arguments& arguments) {
  const eb::BytePiece tokenizer = load(arguments);
  const eb::UnigramWeights weights(tokenizer.model(), arguments.real("alpha", 0));
  eb::Random random(static_cast<std::uint64_t>(arguments.integer("seed", 0)));
  const long long count = arguments.integer("count", 1);
  for_each_line(arguments, read_text(arguments.text("text")), [&](std::string_view line) {
    for (long long i = 0; i < count; ++i)
      print(shown(tokenizer, sample_line(tokenizer, weights, line, random)) + "\n");
  });
}

void describe(const eb::UnigramModel& model) {
  auto pieces = model.pieces();
  std::printf(
      "%zu pieces, ids %d to %d, the longest of %zu bytes, counts %.0f in all, %.1f MB in memory\n",
      pieces.size(), pieces.front().id, pieces.back().id, model.max_piece_length(),
      model.total_count(), static_cast<double>(model.bytes()) / 1e6);
  if (!model.covers_all_bytes())
    std::printf("not every byte is a piece: some texts cannot be encoded\n");
  std::stable_sort(pieces.begin(), pieces.end(), [](const auto& a, const auto& b) {
    return static_cast<double>(a.bytes.size() - 1) * a.count >
           static_cast<double>(b.bytes.size() - 1) * b.count;
  });
  std::printf("saving most:");
  for (std::size_t i = 0; i < std::min<std::size_t>(12, pieces.size()); ++i)
    std::printf(" %s", eb::detail::quoted_bytes(pieces[i].bytes).c_str());
  std::printf("\n");
}

void info(const Arguments& arguments) {
  const eb::BytePiece tokenizer = load(arguments);
  describe(tokenizer.model());
  if (!arguments.given("text")) return;
  std::size_t bytes = 0, tokens = 0;
  const double start = seconds();
  for_each_line(arguments, read_text(arguments.text("text")), [&](std::string_view line) {
    bytes += line.size();
    tokens += tokenizer.encode(line).size();
  });
  std::printf("%s: %zu bytes, %zu tokens, %.3f bytes per token, %.1f MB/s\n",
              arguments.text("text").c_str(), bytes, tokens,
              static_cast<double>(bytes) / static_cast<double>(std::max<std::size_t>(tokens, 1)),
              static_cast<double>(bytes) / 1e6 / (seconds() - start));
}

void tour() {
  const std::string text = read_text(EIGENBLOCKS_SOURCE_DIR "/examples/data/kjv.txt");
  const std::size_t cut = text.find('\n', 400000) + 1;
  const std::vector<std::string> training{text.substr(0, cut)};
  const auto trained = eb::train_bytepiece(
      training, {.max_vocab_size = {2000, 600}, .normalizer = eb::nfc, .progress = ProgressBar{}});
  const std::string_view held_out = std::string_view(text).substr(cut, 100000);
  for (const auto& vocabulary : trained) {
    const eb::BytePiece tokenizer(vocabulary.model, eb::nfc);
    std::printf("%lld ids: %.2f bytes per token on text it has not seen\n",
                static_cast<long long>(vocabulary.max_vocab_size),
                static_cast<double>(held_out.size()) /
                    static_cast<double>(tokenizer.encode(held_out).size()));
  }
  const eb::BytePiece tokenizer(trained[0].model, eb::nfc);
  describe(tokenizer.model());
  const std::string line = "And the watchman said, The morning cometh.";
  const auto ids = tokenizer.encode(line);
  std::printf("the best segmentation          %s\n", shown(tokenizer, ids).c_str());
  eb::Random random(1);
  for (const double alpha : {1.0, 0.2}) {
    const eb::UnigramWeights weights(tokenizer.model(), alpha);
    for (int i = 0; i < 2; ++i)
      std::printf("a random one, alpha = %.1f      %s\n", alpha,
                  shown(tokenizer, sample_line(tokenizer, weights, line, random)).c_str());
  }
  std::printf("decoded                        %s\n", tokenizer.decode(ids).c_str());
}

int run(int argc, char** argv) {
  if (argc < 2) {
    tour();
    return 0;
  }
  const std::string command = argv[1];
  Arguments arguments({{"text", "-"},
                       {"model", ""},
                       {"size", "10000"},
                       {"order", "6"},
                       {"length", "36"},
                       {"min-count", "2"},
                       {"digits", "0"},
                       {"unicode", "1"},
                       {"rescue", "0"},
                       {"workers", "0"},
                       {"raw", "0"},
                       {"pieces", "0"},
                       {"alpha", "0.1"},
                       {"count", "1"},
                       {"seed", "1"}});
  arguments.parse(argc - 1, argv + 1);
  if (command == "train") {
    train(arguments);
  } else if (command == "encode") {
    encode(arguments);
  } else if (command == "decode") {
    decode(arguments);
  } else if (command == "sample") {
    sample(arguments);
  } else if (command == "info") {
    info(arguments);
  } else {
    throw usage_error("unknown command " + command + "; known: train encode decode sample info");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return example::run_program("09_tokenizer", run, argc, argv); }
