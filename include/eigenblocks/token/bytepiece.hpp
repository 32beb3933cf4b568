// BytePiece: a byte-level tokenizer with a unigram model.  Text -> normalise -> segments -> the best pieces of each -> ids.
//
//   BytePiece tokenizer(UnigramModel::from_counts(counts), no_normalization);
//   BytePiece tokenizer = load_bytepiece("en.model");                    // with NFC, io/bytepiece_model.hpp
//   std::vector<TokenId> ids = tokenizer.encode("some text", {.add_bos = true});
//   std::string text = tokenizer.decode(ids);                            // decode(encode(x)) == normalised x
//   auto batch = tokenizer.encode_batch(documents, {}, pool);            // the same ids for every number of workers
//   BytePieceDecoder stream(tokenizer);                                  // stream.push(id): the characters that are whole now
//   auto ids = tokenizer.pieces_with_prefix("wat");                      // ids of pieces that start with these bytes
//
// Ids 0, 1, 2 are <pad>, <bos>, <eos>: encode puts bos and eos only where asked, decode drops all three.  Texts that write
// "<bos>" are ordinary text.
// invalid = passthrough: a text that is not valid UTF-8 is encoded byte for byte, without normalisation.
// Errors: invalid_argument (with the byte) for text that is not valid UTF-8, unless passed through; data_error for a byte that
// is no piece of the model (`model().covers_all_bytes()` excludes that); std::out_of_range for ids the model does not have.
// Nothing is put out then.  Random and other segmentations: sampling.hpp, nbest.hpp, with `for_each_segment`.
// Sources: BytePiece 0.6.3, https://kexue.fm/archives/9752.
#pragma once

#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/token/normalize.hpp>
#include <eigenblocks/token/segment.hpp>
#include <eigenblocks/token/unigram_model.hpp>
#include <eigenblocks/token/utf8.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class InvalidUtf8 { error, passthrough };

struct EncodeOptions {
  bool add_bos = false;
  bool add_eos = false;
};

class BytePiece {
 public:
  /// `normalizer`: nfc (io/nfc.hpp) for the ids of the package, or no_normalization.
  BytePiece(UnigramModel model, Normalizer normalizer, InvalidUtf8 invalid = InvalidUtf8::error)
      : model_(std::move(model)), normalizer_(normalizer), invalid_(invalid) {
    detail::require(normalizer != nullptr, "BytePiece: normalizer is null, must be nfc, ",
                    "no_normalization or a function of your own");
  }

  const UnigramModel& model() const { return model_; }
  std::size_t vocab_size() const { return model_.vocab_size(); }

  std::vector<TokenId> encode(std::string_view text, const EncodeOptions& options = {},
                              ExecutorRef executor = serial) const {
    return std::move(encode_batch(std::span(&text, 1), options, executor)[0]);
  }

  /// Each text's ids.  Work is cut into blocks of whole lines, whatever the executor.
  std::vector<std::vector<TokenId>> encode_batch(std::span<const std::string_view> texts,
                                                 const EncodeOptions& options = {},
                                                 ExecutorRef executor = serial) const {
    std::vector<Block> blocks;
    for (std::size_t t = 0; t < texts.size(); ++t) {
      const bool raw = passes_raw(texts[t]);
      detail::for_each_block(texts[t], kBlockSize, [&](std::size_t begin, std::size_t end) {
        blocks.push_back({t, begin, texts[t].substr(begin, end - begin), raw, {}, kUtf8Valid, {}});
      });
    }
    std::vector<Scratch> scratch(static_cast<std::size_t>(executor.workers()));
    executor.run(static_cast<Index>(blocks.size()), [&](Index i, int worker) {
      encode_block(blocks[static_cast<std::size_t>(i)], scratch[static_cast<std::size_t>(worker)]);
    });
    for (const Block& block : blocks) check(block, texts.size());

    std::vector<std::vector<TokenId>> ids(texts.size());
    for (std::size_t t = 0, b = 0; t < texts.size(); ++t) {
      std::size_t size = 2, end = b;
      for (; end < blocks.size() && blocks[end].text == t; ++end) size += blocks[end].ids.size();
      if (end == b + 1 && !options.add_bos) ids[t] = std::move(blocks[b++].ids);
      ids[t].reserve(size);
      if (options.add_bos) ids[t].push_back(kBosId);
      for (; b < end; ++b) ids[t].insert(ids[t].end(), blocks[b].ids.begin(), blocks[b].ids.end());
      if (options.add_eos) ids[t].push_back(kEosId);
    }
    return ids;
  }
  std::vector<std::vector<TokenId>> encode_batch(const std::vector<std::string>& texts,
                                                 const EncodeOptions& options = {},
                                                 ExecutorRef executor = serial) const {
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    return encode_batch(std::span<const std::string_view>(views), options, executor);
  }

  /// f(segment) for each normalised segment of the text: what is tokenized on its own.
  template <class F>
  void for_each_segment(std::string_view text, F&& f) const {
    std::string buffer;
    if (!passes_raw(text)) {
      const NormalizedText normal = normalizer_(text, buffer);
      if (normal.error != kUtf8Valid) raise_invalid(normal.error, 0, 1);
      text = normal.text;
    }
    eigenblocks::for_each_segment(text, std::forward<F>(f));
  }

  /// Ids of bytes taken as one segment: no normalisation, no cutting at newlines, any bytes.
  std::vector<TokenId> encode_bytes(std::string_view bytes) const {
    return viterbi_encode(model_, bytes);
  }

  /// The pieces' bytes, special ids left out; may be invalid UTF-8.
  std::string decode_bytes(std::span<const TokenId> ids) const {
    std::string bytes;
    for (const TokenId id : ids) bytes += token_bytes(id);
    return bytes;
  }
  /// The same with ill-formed sequences dropped.
  std::string decode(std::span<const TokenId> ids) const { return valid_utf8(decode_bytes(ids)); }

  /// The bytes of an id; empty for the special ones.
  std::string_view token_bytes(TokenId id) const {
    if (id >= 0 && id < kFirstPieceId) return {};
    return model_.piece(model_.index(id));
  }

  /// Ids of all pieces that start with these bytes, in byte order of the pieces.  After a prompt that may end inside a token:
  /// take the last token off, and draw the next from the pieces that start with its bytes (https://kexue.fm/archives/9762).
  std::vector<TokenId> pieces_with_prefix(std::string_view bytes) const {
    std::vector<TokenId> ids;
    model_.trie().walk_all(bytes,
                           [&](std::string_view, std::uint32_t p) { ids.push_back(model_.id(p)); });
    return ids;
  }

 private:
  static constexpr std::size_t kBlockSize = 1 << 16;

  struct Block {
    std::size_t text, begin;
    std::string_view bytes;
    bool raw;
    std::vector<TokenId> ids;
    std::size_t error;        // byte that is not valid UTF-8
    std::string unreachable;  // the message, if some byte is no piece
  };
  struct Scratch {
    Viterbi viterbi;
    std::string buffer;
  };

  bool passes_raw(std::string_view text) const {
    return invalid_ == InvalidUtf8::passthrough && utf8_error(text) != kUtf8Valid;
  }

  /// Never throws for the text's sake: a task of OpenMP must not.
  void encode_block(Block& block, Scratch& scratch) const {
    std::string_view text = block.bytes;
    if (!block.raw) {
      const NormalizedText normal = normalizer_(text, scratch.buffer);
      block.error = normal.error;
      if (normal.error != kUtf8Valid) return;
      text = normal.text;
    }
    block.ids.reserve(text.size() / 3);
    eigenblocks::for_each_segment(text, [&](std::string_view segment) {
      if (!block.unreachable.empty()) return;
      if (scratch.viterbi.search(model_, segment)) {
        scratch.viterbi.append_ids(model_, block.ids);
      } else {
        block.unreachable = scratch.viterbi.unreachable_message(segment);
      }
    });
  }
  void check(const Block& block, std::size_t texts) const {
    if (block.error != kUtf8Valid) raise_invalid(block.begin + block.error, block.text, texts);
    if (!block.unreachable.empty()) detail::raise<data_error>(block.unreachable);
  }
  [[noreturn]] EIGENBLOCKS_COLD static void raise_invalid(std::size_t at, std::size_t text,
                                                          std::size_t texts) {
    if (texts == 1) detail::raise<invalid_argument>("text is not valid UTF-8 at byte ", at);
    detail::raise<invalid_argument>("text ", text, " is not valid UTF-8 at byte ", at);
  }

  UnigramModel model_;
  Normalizer normalizer_;
  InvalidUtf8 invalid_;
};

/// decode() for ids that come one by one: what it returns, put together, is decode of them all.
class BytePieceDecoder {
 public:
  /// The tokenizer must outlive it.
  explicit BytePieceDecoder(const BytePiece& tokenizer) : tokenizer_(&tokenizer) {}

  std::string push(TokenId id) { return stream_.push(tokenizer_->token_bytes(id)); }
  std::string push(std::span<const TokenId> ids) {
    return stream_.push(tokenizer_->decode_bytes(ids));
  }
  /// Bytes held back: the start of a character, at most 3.
  std::size_t held() const { return stream_.held(); }
  /// No more ids: an incomplete character is dropped.  Returns how many bytes that were.
  std::size_t finish() { return stream_.finish(); }

 private:
  const BytePiece* tokenizer_;
  Utf8Stream stream_;
};

EIGENBLOCKS_NAMESPACE_END
