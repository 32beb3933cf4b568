// Golden ops of tokenization: BytePiece's trainer, its n-gram model, encoding, decoding, segments and NFC.
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/io/bytepiece_model.hpp>
#include <eigenblocks/io/nfc.hpp>
#include <eigenblocks/token/bytepiece.hpp>
#include <eigenblocks/token/bytepiece_trainer.hpp>
#include <eigenblocks/token/ngram_model.hpp>
#include <eigenblocks/token/segment.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "support/golden_rows.hpp"
#include "support/sha256.hpp"

namespace eb = eigenblocks;
using eb::Index;
using eb::TokenId;
using golden::json;
using golden::Row;

namespace {

/// Models are read once for all the rows that name them.
const eb::BytePiece& tokenizer(const std::filesystem::path& path) {
  static std::map<std::string, std::unique_ptr<eb::BytePiece>> loaded;
  auto& slot = loaded[path.string()];
  if (!slot) slot = std::make_unique<eb::BytePiece>(eb::load_bytepiece(path.string()));
  return *slot;
}

const eb::thread_pool& three_workers() {
  static const eb::thread_pool pool(3);
  return pool;
}

double score_of(const eb::UnigramModel& model, const std::vector<TokenId>& ids) {
  double score = 0;
  for (const TokenId id : ids) {
    if (id >= eb::kFirstPieceId) score += model.log_prob(model.index(id));
  }
  return score;
}

/// The ids; or, where the row says that a tie may go either way, others of the same bytes and score.
void expect_ids(Row& row, const std::string& key, const eb::BytePiece& tokens,
                const std::vector<TokenId>& got, bool tie) {
  const auto want = row.want(key).get<std::vector<TokenId>>();
  if (tie && got != want && tokens.decode_bytes(got) == tokens.decode_bytes(want) &&
      std::abs(score_of(tokens.model(), got) - score_of(tokens.model(), want)) < 1e-8) {
    return;
  }
  row.expect(key, got);
}

/// The text in which each id is put out by itself must be that of all.
void expect_stream(Row& row, const std::string& key, const eb::BytePiece& tokens,
                   const std::vector<TokenId>& ids) {
  row.form("streaming decode");
  eb::BytePieceDecoder stream(tokens);
  std::string text;
  for (const TokenId id : ids) text += stream.push(id);
  stream.finish();
  row.expect(key, text);
}

void encode(Row& row) {
  const eb::BytePiece& tokens = tokenizer(row.path("model"));
  const std::string text = row.text("text");
  const eb::EncodeOptions options{.add_bos = row.flag("add_bos"), .add_eos = row.flag("add_eos")};
  const bool tie = row.flag("tie");
  const auto ids = tokens.encode(text, options);
  expect_ids(row, "ids", tokens, ids, tie);
  row.expect("roundtrip", tokens.decode(ids));
  if (row.has("pieces")) {
    std::vector<std::string> pieces;
    for (const TokenId id : ids) {
      if (id >= eb::kFirstPieceId) pieces.push_back(eb::base64_encode(tokens.token_bytes(id)));
    }
    if (tie) {
      row.want("pieces");
    } else {
      row.expect("pieces", pieces);
    }
  }
  row.form("batch on three workers");
  const std::vector<std::string> texts{text, "other", text};
  const auto batch = tokens.encode_batch(texts, options, three_workers());
  expect_ids(row, "ids", tokens, batch[0], tie);
  expect_ids(row, "ids", tokens, batch[2], tie);
  row.form("segment by segment");
  std::vector<TokenId> joined;
  if (options.add_bos) joined.push_back(eb::kBosId);
  tokens.for_each_segment(text, [&](std::string_view segment) {
    const auto part = tokens.encode_bytes(segment);
    joined.insert(joined.end(), part.begin(), part.end());
  });
  if (options.add_eos) joined.push_back(eb::kEosId);
  expect_ids(row, "ids", tokens, joined, tie);
  expect_stream(row, "roundtrip", tokens, ids);
}

void encode_bytes(Row& row) {
  const eb::BytePiece& tokens = tokenizer(row.path("model"));
  const std::string bytes = row.bytes("b64");
  const auto ids = tokens.encode_bytes(bytes);
  expect_ids(row, "ids", tokens, ids, row.flag("tie"));
  if (tokens.decode_bytes(ids) != bytes) row.fail("decode_bytes of the ids is not the input");
}

void encode_long(Row& row) {
  const eb::BytePiece& tokens = tokenizer(row.path("model"));
  std::string text;
  for (const json& part : row.value("parts")) {
    for (Index i = 0; i < part.at(1).get<Index>(); ++i) text += part.at(0).get<std::string>();
  }
  const bool tie = row.flag("tie");
  const auto check = [&](const std::vector<TokenId>& ids) {
    std::string listed;
    for (const TokenId id : ids) listed += (listed.empty() ? "" : ",") + std::to_string(id);
    const auto count = static_cast<std::ptrdiff_t>(std::min<std::size_t>(8, ids.size()));
    row.expect("n_bytes", tokens.decode_bytes(ids).size());
    for (const char* key : {"n_ids", "head", "tail", "ids_sha256"}) row.want(key);
    if (tie && sha256(listed) != row.text("ids_sha256"))
      return;  // another segmentation of the same score
    row.expect("n_ids", ids.size());
    row.expect("head", std::vector<TokenId>(ids.begin(), ids.begin() + count));
    row.expect("tail", std::vector<TokenId>(ids.end() - count, ids.end()));
    row.expect("ids_sha256", sha256(listed));
  };
  check(tokens.encode(text));
  row.form("three workers");
  check(tokens.encode(text, {}, three_workers()));
}

void decode(Row& row) {
  const eb::BytePiece& tokens = tokenizer(row.path("model"));
  const auto ids = row.get<std::vector<TokenId>>("ids");
  row.expect("text", tokens.decode(ids));
  row.expect("bytes_b64", eb::base64_encode(tokens.decode_bytes(ids)));
  expect_stream(row, "text", tokens, ids);
}

void segment(Row& row) {
  const std::string text = eb::to_nfc(row.text("text"));
  const eb::SegmentOptions options{
      .max_length = row.integer("maxlen"),
      .is_digit = row.flag("isolate_digits") ? eb::is_decimal_digit : nullptr};
  const auto list = eb::segments(text, options);
  row.expect("segments", std::vector<std::string>(list.begin(), list.end()));
  row.form("by blocks of whole lines");
  std::vector<std::string> joined;
  eb::detail::for_each_block(text, 1, [&](std::size_t begin, std::size_t end) {
    const std::string_view block = std::string_view(text).substr(begin, end - begin);
    eb::for_each_segment(
        block, [&](std::string_view s) { joined.emplace_back(s); }, options);
  });
  row.expect("segments", joined);
}

void nfc(Row& row) {
  const std::string text = row.text("text");
  row.expect("nfc", eb::to_nfc(text));
  row.form("full algorithm");
  std::string whole;
  eb::detail::append_nfc(text, whole);
  row.expect("nfc", whole);
  row.form("again");
  row.expect("nfc", eb::to_nfc(eb::to_nfc(text)));
}

// ---- Training ------------------------------------------------------------------------------------

struct Training {
  std::vector<std::string> texts;
  eb::BytePieceTrainerOptions options;
};

Training training(const json& row, const std::filesystem::path& folder) {
  Training t;
  if (row.contains("texts")) t.texts = row["texts"].get<std::vector<std::string>>();
  if (row.contains("corpus")) {
    std::ifstream stream(folder / row["corpus"].get<std::string>(), std::ios::binary);
    if (!stream) throw std::runtime_error("cannot open the corpus");
    const std::size_t most = row.value("corpus_docs", ~std::size_t{0});
    for (std::string line; t.texts.size() < most && std::getline(stream, line);) {
      if (!line.empty()) t.texts.push_back(json::parse(line).get<std::string>());
    }
  }
  for (const auto& [key, value] : row.at("params").items()) {
    if (key == "order") {
      t.options.order = value.get<Index>();
    } else if (key == "max_vocab_size") {
      t.options.max_vocab_size = value.is_array() ? value.get<std::vector<Index>>()
                                                  : std::vector<Index>{value.get<Index>()};
    } else if (key == "max_piece_length") {
      t.options.max_piece_length = value.get<Index>();
    } else if (key == "min_count") {
      t.options.min_count = value.get<Index>();
    } else if (key == "isolate_digits") {
      t.options.isolate_digits = value.get<bool>();
    } else if (key == "ensure_unicode") {
      t.options.ensure_unicode = value.get<bool>();
    } else {
      throw std::runtime_error("unknown parameter " + key);
    }
  }
  t.options.normalizer = eb::nfc;
  t.options.is_digit = eb::is_decimal_digit;
  return t;
}

void expect_trained(Row& row, const std::vector<eb::TrainedVocabulary>& trained) {
  const json& want = row.want("result");
  if (want.size() != trained.size())
    return row.fail("got " + std::to_string(trained.size()) + " vocabularies");
  for (std::size_t i = 0; i < trained.size(); ++i) {
    const eb::UnigramModel& model = trained[i].model;
    const std::string file = eb::bytepiece_model_json(model);
    json got = {{"max_vocab_size", trained[i].max_vocab_size},
                {"pieces", model.size()},
                {"total", static_cast<std::int64_t>(model.total_count())},
                {"bytes", file.size()},
                {"sha256", sha256(file)},
                {"file", want[i].at("file")}};
    if (got != want[i])
      row.fail("result[" + std::to_string(i) + "]: got " + got.dump() + ", want " + want[i].dump());
    if (want[i].at("file").is_string() &&
        golden::read_bytes(row.folder() / want[i]["file"].get<std::string>()) != file) {
      row.fail("result[" + std::to_string(i) + "]: the model file differs");
    }
    // Every piece is its own best segmentation, and what was written reads back.
    const eb::UnigramModel again = eb::parse_bytepiece_model(file, "written");
    if (eb::bytepiece_model_json(again) != file)
      row.fail("the file changes when it is read and written");
    for (std::uint32_t p = 0; p < again.size(); ++p) {
      if (eb::viterbi_encode(again, again.piece(p)) != std::vector<TokenId>{again.id(p)}) {
        row.fail("piece " + eb::detail::quoted_bytes(again.piece(p)) + " is not encoded as itself");
        break;
      }
    }
  }
}

void train(Row& row) {
  for (const char* key : {"name", "params", "corpus_docs", "texts", "corpus"}) {
    if (row.has(key)) row.value(key);
  }
  Training t = training(row.object(), row.folder());
  expect_trained(row, eb::train_bytepiece(t.texts, t.options));
  row.form("three workers, texts in reverse");
  std::reverse(t.texts.begin(), t.texts.end());
  expect_trained(row, eb::train_bytepiece(t.texts, t.options, three_workers()));
}

/// The n-gram model of the train row with this name.
const eb::NgramModel& ngrams(const std::filesystem::path& folder, const std::string& name) {
  static std::map<std::string, std::unique_ptr<eb::NgramModel>> made;
  auto& slot = made[(folder / name).string()];
  if (slot) return *slot;
  const json found = golden::find_row(folder, "train", "name", name);
  const Training t = training(found, folder);
  const std::vector<std::string_view> texts(t.texts.begin(), t.texts.end());
  slot = std::make_unique<eb::NgramModel>(eb::train_ngram_model(texts, t.options));
  return *slot;
}

void bnlm(Row& row) {
  eb::NgramSegmenter segmenter(ngrams(row.folder(), row.text("train")));
  std::vector<std::string> pieces;
  segmenter.run(row.text("text"),
                [&](std::string_view piece) { pieces.push_back(eb::base64_encode(piece)); });
  row.expect("pieces", pieces);
}

}  // namespace

void register_tokenize(golden::RowRegistry& rows) {
  rows.add("train", train);
  rows.add("bnlm", bnlm);
  rows.add("encode", encode);
  rows.add("encode_bytes", encode_bytes);
  rows.add("encode_long", encode_long);
  rows.add("decode", decode);
  rows.add("segment", segment);
  rows.add("nfc", nfc);
}
