// BytePiece's trainer: text -> a vocabulary with counts.
//
//   std::vector<std::string> texts = ...;
//   auto trained = train_bytepiece(texts, {.max_vocab_size = {8000, 4000}, .normalizer = nfc}, pool);
//   save_bytepiece_models(trained, "en.model");        // io/bytepiece_model.hpp: en.model.8000, en.model.4000
//   BytePiece tokenizer(trained[0].model, nfc);
//
// 1. Every text is normalised and cut into segments of at most 10000 characters.   2. Windows of up to `order` bytes are
// counted, 3. and the n-gram model they give cuts every segment into pieces (ngram_model.hpp).   4. Pieces are counted; bytes
// that are no piece get the count 1.   5. Pieces that are too long or too rare are cut by the unigram model of the others,
// which get their counts.   6. So is every piece by the model of all, until their number stays the same.   7. For each size
// asked, largest first: the most frequent size - 3 pieces stay (all bytes; then by count, length, bytes), then 5 and 6 again.
// A vocabulary may come out smaller than asked.  The files are those of the package, byte for byte.
// The result depends neither on the executor nor on the order of the texts.  Parallel over blocks of whole lines of about
// 64 KB; memory grows with the distinct windows and pieces, times the workers while they are counted.  Limit: 2^23 pieces.
//
// Options with the package's defaults; `normalizer` must be named (nfc of io/nfc.hpp, as the package, or no_normalization), and
// with isolate_digits so must `is_digit` (is_decimal_digit of io/nfc.hpp).  `progress` is called on the calling thread.
// Errors: invalid_argument for options out of range (a size below 259 cannot hold all bytes), data_error for a text that is
// not valid UTF-8, with its number and the byte.
// Sources: https://kexue.fm/archives/9752; BytePiece 0.6.3.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/token/ngram_model.hpp>
#include <eigenblocks/token/normalize.hpp>
#include <eigenblocks/token/segment.hpp>
#include <eigenblocks/token/unigram_model.hpp>
#include <eigenblocks/token/viterbi.hpp>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct BytePieceTrainerOptions {
  Index order = 6;
  std::vector<Index> max_vocab_size = {10000};  ///< each at least 259; special ids included
  Index max_piece_length = 36;                  ///< bytes
  Index min_count = 2;
  bool isolate_digits = false;
  bool ensure_unicode = true;
  bool rescue = false;  ///< not the package's: see ngram_model.hpp
  Normalizer normalizer = nullptr;
  DigitTest is_digit = nullptr;
  /// What is being done ("counting", "cutting", "pruning"), and how much of it, 0 to 1.
  std::function<void(std::string_view stage, double done)> progress = {};
};

struct TrainedVocabulary {
  Index max_vocab_size = 0;  ///< as asked
  UnigramModel model;
};

namespace detail {

inline constexpr Index kTrainerSegment = 10000;  // characters
inline constexpr std::size_t kTrainerBlock = 1 << 16;

/// Hashes string views and strings alike, so that counting a piece that is known copies nothing.
struct BytesHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view bytes) const {
    return std::hash<std::string_view>()(bytes);
  }
};
using PieceCounts = std::unordered_map<std::string, std::int64_t, BytesHash, std::equal_to<>>;

/// A vocabulary in the making.
struct CountedPiece {
  std::string bytes;
  std::int64_t count;
};

inline UnigramModel counted_model(const std::vector<CountedPiece>& pieces) {
  std::vector<std::pair<std::string, double>> counts;
  counts.reserve(pieces.size());
  for (const CountedPiece& piece : pieces)
    counts.emplace_back(piece.bytes, static_cast<double>(piece.count));
  return UnigramModel::from_counts(counts);
}

/// Cuts `pieces` by the model and returns the counts its pieces get, by index of the model.
inline std::vector<std::int64_t> recount(const UnigramModel& model,
                                         const std::vector<CountedPiece>& pieces,
                                         ExecutorRef executor) {
  struct Worker {
    Viterbi viterbi;
    std::vector<std::uint32_t> cut;
    std::vector<std::int64_t> counts;
  };
  std::vector<Worker> workers(static_cast<std::size_t>(executor.workers()));
  constexpr std::size_t kChunk = 4096;
  const std::size_t chunks = (pieces.size() + kChunk - 1) / kChunk;
  executor.run(static_cast<Index>(chunks), [&](Index chunk, int w) {
    Worker& worker = workers[static_cast<std::size_t>(w)];
    worker.counts.resize(model.size());
    const std::size_t begin = static_cast<std::size_t>(chunk) * kChunk;
    for (std::size_t i = begin; i < std::min(begin + kChunk, pieces.size()); ++i) {
      worker.cut.clear();
      worker.viterbi.run(model, pieces[i].bytes);  // all bytes are pieces
      worker.viterbi.append_pieces(model, worker.cut);
      for (const std::uint32_t p : worker.cut) worker.counts[p] += pieces[i].count;
    }
  });
  std::vector<std::int64_t> counts(model.size());
  for (const Worker& worker : workers) {
    for (std::size_t p = 0; p < worker.counts.size(); ++p) counts[p] += worker.counts[p];
  }
  return counts;
}

/// Gives the counts of `dropped` to the pieces of `keep` that make them up.
inline void hand_over(std::vector<CountedPiece>& keep, const std::vector<CountedPiece>& dropped,
                      ExecutorRef executor) {
  if (dropped.empty()) return;
  const UnigramModel model = counted_model(keep);
  const std::vector<std::int64_t> more = recount(model, dropped, executor);
  for (CountedPiece& piece : keep) piece.count += more[model.find(piece.bytes)];
}

/// Drops pieces that the model itself cuts otherwise, until none are left.
inline void prune_unused(std::vector<CountedPiece>& keep, ExecutorRef executor) {
  for (std::size_t before = 0; before != keep.size();) {
    before = keep.size();
    const UnigramModel model = counted_model(keep);
    const std::vector<std::int64_t> counts = recount(model, keep, executor);
    for (CountedPiece& piece : keep) piece.count = counts[model.find(piece.bytes)];
    std::erase_if(keep, [](const CountedPiece& piece) { return piece.count == 0; });
  }
}

/// Steps 5 to 7; every byte is among the pieces.
inline std::vector<TrainedVocabulary> prune_pieces(
    std::vector<CountedPiece> pieces, std::size_t max_length, std::int64_t min_count,
    std::vector<Index> sizes, ExecutorRef executor,
    const std::function<void(std::string_view, double)>& progress) {
  const auto report = [&](double done) {
    if (progress) progress("pruning", done);
  };
  std::sort(sizes.begin(), sizes.end(), std::greater<>());
  const double steps = static_cast<double>(sizes.size()) + 1;
  report(0);
  const auto stays = [&](const CountedPiece& piece) {
    return piece.bytes.size() == 1 ||
           (piece.bytes.size() <= max_length && piece.count >= min_count);
  };
  std::vector<CountedPiece> dropped;
  for (const CountedPiece& piece : pieces) {
    if (!stays(piece)) dropped.push_back(piece);
  }
  std::erase_if(pieces, [&](const CountedPiece& piece) { return !stays(piece); });
  hand_over(pieces, dropped, executor);
  prune_unused(pieces, executor);

  std::vector<TrainedVocabulary> result;
  for (const Index size : sizes) {
    report((static_cast<double>(result.size()) + 1) / steps);
    const auto most = static_cast<std::size_t>(size - kFirstPieceId);
    if (pieces.size() > most) {
      std::sort(pieces.begin(), pieces.end(), [](const CountedPiece& a, const CountedPiece& b) {
        const bool a_long = a.bytes.size() > 1, b_long = b.bytes.size() > 1;
        if (a_long != b_long) return b_long;
        if (a.count != b.count) return a.count > b.count;
        if (a.bytes.size() != b.bytes.size()) return a.bytes.size() > b.bytes.size();
        return a.bytes < b.bytes;
      });
      dropped.assign(pieces.begin() + static_cast<std::ptrdiff_t>(most), pieces.end());
      pieces.resize(most);
      hand_over(pieces, dropped, executor);
      prune_unused(pieces, executor);
    }
    result.push_back({size, counted_model(pieces)});
  }
  report(1);
  return result;
}

/// Step 4: a list, with the bytes that are missing.
inline std::vector<CountedPiece> with_all_bytes(PieceCounts counts) {
  for (int c = 0; c < 256; ++c) counts.try_emplace(std::string(1, static_cast<char>(c)), 1);
  std::vector<CountedPiece> pieces;
  pieces.reserve(counts.size());
  for (const auto& [bytes, count] : counts) pieces.push_back({bytes, count});
  return pieces;
}

inline void check_trainer_options(const BytePieceTrainerOptions& options) {
  check_ngram_order(options.order);
  require(!options.max_vocab_size.empty(), "max_vocab_size must hold at least one size");
  for (const Index size : options.max_vocab_size) {
    require(size >= 259, "max_vocab_size (", size,
            ") must be at least 259 (256 bytes and 3 special ids)");
  }
  require(options.max_piece_length >= 1, "max_piece_length (", options.max_piece_length,
          ") must be at least 1");
  require(options.min_count >= 1, "min_count (", options.min_count, ") must be at least 1");
  require(options.normalizer != nullptr, "normalizer is null, must be nfc, no_normalization or a ",
          "function of your own");
  require(!options.isolate_digits || options.is_digit != nullptr,
          "isolate_digits needs is_digit (is_decimal_digit of io/nfc.hpp)");
}

/// A corpus in blocks, read as often as needed.
class TrainerCorpus {
 public:
  TrainerCorpus(std::span<const std::string_view> texts, const BytePieceTrainerOptions& options)
      : options_(options) {
    for (std::size_t t = 0; t < texts.size(); ++t) {
      for_each_block(texts[t], kTrainerBlock, [&](std::size_t begin, std::size_t end) {
        blocks_.push_back({t, begin, texts[t].substr(begin, end - begin)});
      });
    }
  }

  /// f(segment, worker) for every segment of every text, in no order.
  template <class F>
  void for_each_segment(std::string_view stage, ExecutorRef executor, F&& f) const {
    const SegmentOptions cut{.max_length = kTrainerSegment,
                             .is_digit = options_.isolate_digits ? options_.is_digit : nullptr};
    std::vector<std::string> buffers(static_cast<std::size_t>(executor.workers()));
    constexpr std::size_t kGroup = 64;  // blocks between two reports
    std::vector<std::size_t> errors(kGroup);
    for (std::size_t begin = 0; begin < blocks_.size(); begin += kGroup) {
      const std::size_t size = std::min(kGroup, blocks_.size() - begin);
      if (options_.progress)
        options_.progress(stage, static_cast<double>(begin) / static_cast<double>(blocks_.size()));
      executor.run(static_cast<Index>(size), [&](Index i, int worker) {
        const auto at = static_cast<std::size_t>(i);
        const NormalizedText normal = options_.normalizer(
            blocks_[begin + at].bytes, buffers[static_cast<std::size_t>(worker)]);
        errors[at] = normal.error;
        if (normal.error != kUtf8Valid) return;
        eigenblocks::for_each_segment(
            normal.text, [&](std::string_view segment) { f(segment, worker); }, cut);
      });
      for (std::size_t i = 0; i < size; ++i) {
        if (errors[i] == kUtf8Valid) continue;
        const Block& block = blocks_[begin + i];
        raise<data_error>("text ", block.text, " is not valid UTF-8 at byte ",
                          block.begin + errors[i]);
      }
    }
    if (options_.progress) options_.progress(stage, 1.0);
  }

 private:
  struct Block {
    std::size_t text, begin;
    std::string_view bytes;
  };
  const BytePieceTrainerOptions& options_;
  std::vector<Block> blocks_;
};

inline NgramModel count_ngrams(const TrainerCorpus& corpus, const BytePieceTrainerOptions& options,
                               ExecutorRef executor) {
  std::vector<NgramCounter> counters(static_cast<std::size_t>(executor.workers()),
                                     NgramCounter(options.order));
  corpus.for_each_segment("counting", executor, [&](std::string_view segment, int worker) {
    counters[static_cast<std::size_t>(worker)].add(segment);
  });
  for (std::size_t w = 1; w < counters.size(); ++w) {
    counters[0].add(counters[w]);
    counters[w] = NgramCounter(options.order);
  }
  return NgramModel(counters[0].sorted(), {.order = options.order,
                                           .min_count = options.min_count,
                                           .ensure_unicode = options.ensure_unicode,
                                           .rescue = options.rescue});
}

}  // namespace detail

/// The n-gram model of step 2 alone.
inline NgramModel train_ngram_model(std::span<const std::string_view> texts,
                                    const BytePieceTrainerOptions& options,
                                    ExecutorRef executor = serial) {
  detail::check_trainer_options(options);
  return detail::count_ngrams(detail::TrainerCorpus(texts, options), options, executor);
}

/// A vocabulary for each size asked, largest first.
inline std::vector<TrainedVocabulary> train_bytepiece(std::span<const std::string_view> texts,
                                                      const BytePieceTrainerOptions& options,
                                                      ExecutorRef executor = serial) {
  detail::check_trainer_options(options);
  const detail::TrainerCorpus corpus(texts, options);
  const NgramModel ngrams = detail::count_ngrams(corpus, options, executor);
  struct Worker {
    NgramSegmenter segmenter;
    detail::PieceCounts counts;
  };
  std::vector<Worker> workers(static_cast<std::size_t>(executor.workers()),
                              {NgramSegmenter(ngrams), {}});
  corpus.for_each_segment("cutting", executor, [&](std::string_view segment, int w) {
    Worker& worker = workers[static_cast<std::size_t>(w)];
    worker.segmenter.run(segment, [&](std::string_view piece) {
      const auto found = worker.counts.find(piece);
      if (found != worker.counts.end()) {
        ++found->second;
      } else {
        worker.counts.emplace(piece, 1);
      }
    });
  });
  detail::PieceCounts counts = std::move(workers[0].counts);
  for (std::size_t w = 1; w < workers.size(); ++w) {
    for (const auto& [bytes, count] : workers[w].counts) counts[bytes] += count;
  }
  workers.clear();
  return detail::prune_pieces(detail::with_all_bytes(std::move(counts)),
                              static_cast<std::size_t>(options.max_piece_length), options.min_count,
                              options.max_vocab_size, executor, options.progress);
}

inline std::vector<TrainedVocabulary> train_bytepiece(const std::vector<std::string>& texts,
                                                      const BytePieceTrainerOptions& options,
                                                      ExecutorRef executor = serial) {
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  return train_bytepiece(std::span<const std::string_view>(views), options, executor);
}

/// A vocabulary from counts that were made elsewhere (another tokenizer's, say): bytes that are missing are added, then
/// steps 5 to 7 with min_count 1, any length and room for all.  Errors (invalid_argument): an empty piece, one that occurs
/// twice, a count below 1.
inline UnigramModel convert_to_bytepiece(
    const std::vector<std::pair<std::string, std::int64_t>>& counted,
    ExecutorRef executor = serial) {
  detail::PieceCounts counts;
  for (const auto& [bytes, count] : counted) {
    detail::require(!bytes.empty(), "convert_to_bytepiece: a piece is empty");
    detail::require(count >= 1, "convert_to_bytepiece: piece ", detail::quoted_bytes(bytes),
                    " has count ", count, ", must be at least 1");
    detail::require(counts.emplace(bytes, count).second, "convert_to_bytepiece: piece ",
                    detail::quoted_bytes(bytes), " occurs twice");
  }
  return detail::prune_pieces(detail::with_all_bytes(std::move(counts)),
                              std::numeric_limits<std::size_t>::max(), 1,
                              {static_cast<Index>(counted.size()) + 259}, executor, {})[0]
      .model;
}

EIGENBLOCKS_NAMESPACE_END
