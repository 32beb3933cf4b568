// Encoding of a text that arrives in parts: ids as soon as they are certain, the same as those of the whole text at once.
//
//   StreamingEncoder encoder(model);                     // {.split_lines = true, .max_window = 0}
//   std::vector<TokenId> ids;
//   while (read(part)) encoder.push(part, ids);          // appends the ids that no later byte can change
//   encoder.finish(ids);                                 // the rest; the encoder is as new
//
// Works byte by byte: the trie walks of all open starts advance together, in ascending order, so that candidates for an end
// come in the order of Viterbi, and scores are added up from the start of the line, never rebased: ids are equal to the bit,
// ties included, however the text is cut.  Certain are
//   - all bytes up to a forced cut: the walks that began before have ended, and no piece they met reaches past it;
//   - what all survivors share: the segmentations up to the open starts have one way back from some point on.  Looked for
//     when the undecided window has grown by a share of itself, so that looking costs O(1) for each byte.
//   - with split_lines, all bytes before the first byte after newlines: a piece never spans "newline, other byte" (BytePiece
//     encodes such lines separately), and the next line begins anew with score 0.
// The window is some hundred bytes in ordinary text.  In periodic text (aaaa..) nothing may ever be certain; it grows with the
// text then, unless max_window > 0: when it reaches max_window bytes, its first half is given out as the segmentation that is best
// so far has it, and what disagrees is dropped.  Ids may then differ from those of the whole text, their bytes do not.
//
// State: one value, copyable at any point between pushes; memory O(window + longest piece).  Bytes are taken as they are:
// normalise before.  Errors: invalid_argument if max_window is not 0 and less than twice the longest piece; data_error, with
// its position, for a byte that no piece reaches past (only if the model does not cover all bytes); ids appended before remain,
// and the encoder is as new.
// Source: https://kexue.fm/archives/9768 for the encoding.
#pragma once

#include <eigenblocks/token/unigram_model.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct StreamingOptions {
  bool split_lines =
      true;  ///< lines of text are encoded separately; false: all bytes are one segment
  std::size_t max_window = 0;  ///< bytes that may stay undecided; 0: no limit
};

class StreamingEncoder {
 public:
  explicit StreamingEncoder(const UnigramModel& model, const StreamingOptions& options = {})
      : model_(&model), options_(options) {
    detail::require(options.max_window == 0 || options.max_window >= 2 * model.max_piece_length(),
                    "StreamingEncoder: max_window (", options.max_window,
                    ") must be 0 or at least twice the longest piece (", model.max_piece_length(),
                    " bytes)");
    reset();
  }

  void push(std::string_view bytes, std::vector<TokenId>& ids) {
    for (const char byte : bytes) {
      if (options_.split_lines) {
        if (after_newline_ && byte != '\n') end_segment(ids);
        after_newline_ = byte == '\n';
      }
      advance(static_cast<std::uint8_t>(byte));
      const std::size_t window = pending();
      if (options_.max_window > 0 && window >= options_.max_window) {
        // The survivors' common part first: only what is undecided after that has to be forced.
        emit_shared(ids);
        if (pending() >= options_.max_window) force(ids);
      } else if (window >= next_look_) {
        emit_shared(ids);
      }
    }
    if (cut_ > 0) emit(cut_, ids);
    if (pending() >= looked_ + std::max(kLook, looked_) / 4) emit_shared(ids);
  }
  std::vector<TokenId> push(std::string_view bytes) {
    std::vector<TokenId> ids;
    push(bytes, ids);
    return ids;
  }

  void finish(std::vector<TokenId>& ids) {
    end_segment(ids);
    reset();
  }
  std::vector<TokenId> finish() {
    std::vector<TokenId> ids;
    finish(ids);
    return ids;
  }

  /// Forgets everything.
  void reset() {
    start_segment();
    seen_ = 0;
    after_newline_ = false;
  }

  const StreamingOptions& options() const { return options_; }
  /// Bytes taken in whose ids have not been given out.
  std::size_t pending() const { return piece_.size() - 1; }

 private:
  static constexpr std::size_t kLook = 256;  // within a push, smaller windows are not looked at
  static constexpr double kNone = -std::numeric_limits<double>::infinity();

  /// A start whose walk may go on.
  struct Walk {
    std::size_t start;  // relative to the window
    std::uint32_t base;
    std::uint32_t longest;  // piece so far, in bytes
    double score;
  };

  void start_segment() {
    piece_.assign(1, ByteTrie::kNone);
    walks_.assign(1, {0, 0, 0, 0.0});
    closed_ = 0;
    cut_ = 0;
    looked_ = 0;
    next_look_ = kLook;
  }

  /// One more byte.
  void advance(std::uint8_t byte) {
    const ByteTrie::Unit* const units = model_->trie().units();
    const double* const log_probs = model_->log_probs().data();
    double best = kNone;
    std::uint32_t best_piece = ByteTrie::kNone;
    std::size_t alive = 0;
    const std::size_t end = piece_.size();
    for (Walk walk : walks_) {
      const ByteTrie::Unit unit = units[walk.base + byte];
      if (!unit.is(byte)) {
        closed_ = std::max(closed_, walk.start + walk.longest);
        continue;
      }
      if (unit.key() != ByteTrie::kNone) {
        const double x = walk.score + log_probs[unit.key()];
        walk.longest = static_cast<std::uint32_t>(end - walk.start);
        if (x > best) {
          best = x;
          best_piece = unit.key();
        }
      }
      walk.base = unit.base;
      walks_[alive++] = walk;
    }
    walks_.resize(alive);
    piece_.push_back(best_piece);
    ++seen_;
    if (best_piece != ByteTrie::kNone) walks_.push_back({end, 0, 0, best});
    if (walks_.empty()) fail();
    // No piece from before the first open start reaches past it.
    if (walks_.front().start >= closed_) cut_ = walks_.front().start;
  }

  /// The ids of [0, end) of the window; what follows becomes the window.
  void emit(std::size_t end, std::vector<TokenId>& ids) {
    const auto begin = static_cast<std::ptrdiff_t>(ids.size());
    for (std::size_t e = end; e > 0; e -= model_->length(piece_[e]))
      ids.push_back(model_->id(piece_[e]));
    std::reverse(ids.begin() + begin, ids.end());
    piece_.erase(piece_.begin(), piece_.begin() + static_cast<std::ptrdiff_t>(end));
    for (Walk& walk : walks_) walk.start -= end;
    cut_ -= std::min(cut_, end);
    closed_ -= std::min(closed_, end);
    looked_ = 0;
    next_look_ = std::max(kLook, 2 * pending());
  }

  /// Follows all open starts back until they meet.
  void emit_shared(std::vector<TokenId>& ids) {
    mark_.assign(piece_.size(), 0);
    for (const Walk& walk : walks_) mark_[walk.start] = 1;
    std::size_t open = walks_.size(), at = piece_.size() - 1;
    for (;; --at) {
      if (!mark_[at]) continue;
      if (open == 1) break;
      char& before = mark_[at - model_->length(piece_[at])];
      open -= before ? 1 : 0;
      before = 1;
    }
    if (at > 0) emit(at, ids);
    looked_ = pending();
    next_look_ = std::max(kLook, 2 * pending());
  }

  /// Decides the first half of the window by the segmentation up to the last open start, and drops what disagrees.
  void force(std::vector<TokenId>& ids) {
    // No open start, and no piece, is longer than half of the window: the way back does not miss (0, half].
    const std::size_t half = (pending() + 1) / 2;
    std::size_t at = walks_.back().start;
    while (at > half) at -= model_->length(piece_[at]);
    // mark_[e]: the best segmentation up to e goes through `at`.
    mark_.assign(piece_.size(), 0);
    mark_[at] = 1;
    for (std::size_t e = at + 1; e < piece_.size(); ++e) {
      if (piece_[e] != ByteTrie::kNone) mark_[e] = mark_[e - model_->length(piece_[e])];
    }
    std::erase_if(walks_, [&](const Walk& walk) { return !mark_[walk.start]; });
    emit(at, ids);
  }

  void end_segment(std::vector<TokenId>& ids) {
    const std::size_t end = pending();
    if (end > 0 && piece_[end] == ByteTrie::kNone) fail();
    emit(end, ids);
    start_segment();
  }

  /// No piece reaches past the last position that has a segmentation.
  [[noreturn]] EIGENBLOCKS_COLD void fail() {
    std::size_t last = pending();
    while (last > 0 && piece_[last] == ByteTrie::kNone) --last;
    const std::size_t position = seen_ - pending() + last;
    reset();
    detail::raise<data_error>("no piece of the model reaches past byte ", position,
                              " of the stream");
  }

  const UnigramModel* model_;
  StreamingOptions options_;
  std::vector<std::uint32_t> piece_;  // that ends at each position of the window; [0] is not used
  std::vector<Walk> walks_;           // ascending by start
  std::vector<char> mark_;
  std::size_t cut_ = 0;     // the last forced cut in the window
  std::size_t closed_ = 0;  // how far the pieces of starts that are no longer open reach
  std::size_t looked_ = 0;  // size of the window when the survivors were last compared
  std::size_t next_look_ = kLook;
  std::size_t seen_ = 0;  // bytes
  bool after_newline_ = false;
};

EIGENBLOCKS_NAMESPACE_END
