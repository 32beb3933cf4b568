// Text into segments: the parts that are tokenized on their own.  No piece reaches across a newline that something else follows.
//
//   segments("one\n\ntwo\nthree")                        {"one\n\n", "two\n", "three"}
//   segments("\nabcde", {.max_length = 2})               {"\n", "ab", "cd", "e"}
//   segments("x12", {.is_digit = is_decimal_digit})      {"x", "1", "2"}          is_decimal_digit: io/nfc.hpp
//   for_each_segment(text, [](std::string_view segment) { ... });
//
//   max_length = 0   what is not a newline, with all newlines that follow (encoding)
//   max_length = m   at most m characters (code points) that are no newline; if a newline comes next, at most 100 of them too,
//                    otherwise the run is a segment (training: 10000)
//   is_digit         each character for which it holds is a segment of its own (training with isolated digits)
// Only U+000A is a newline.  The parts put together are the text; the empty text has none.
// The text need be valid UTF-8 only where characters are counted or tested.  Errors: negative max_length.
// Source: BytePiece 0.6.3, https://kexue.fm/archives/9752.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/token/utf8.hpp>

#include <algorithm>
#include <string_view>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

using DigitTest = bool (*)(char32_t);

struct SegmentOptions {
  Index max_length = 0;          ///< characters; 0: no limit
  DigitTest is_digit = nullptr;  ///< null: digits are ordinary
};

namespace detail {

inline constexpr std::size_t kMostNewlines = 100;  // in a segment, where there is a limit at all

/// The first newline at or after `at` that does not belong to a run there, i.e. the end of the segment at `at`.
inline std::size_t line_end(std::string_view text, std::size_t at) {
  const std::size_t newline = text.find('\n', at);
  return newline == text.npos ? text.size()
                              : std::min(text.find_first_not_of('\n', newline), text.size());
}

/// The end of the segment that starts at `begin`.
inline std::size_t segment_end(std::string_view text, std::size_t begin,
                               const SegmentOptions& options) {
  const std::size_t most =
      options.max_length == 0 ? text.size() : static_cast<std::size_t>(options.max_length);
  std::size_t at = begin;
  for (std::size_t taken = 0; taken < most && at < text.size() && text[at] != '\n'; ++taken) {
    const std::size_t length = std::max<std::size_t>(utf8_length(text.substr(at, 4)), 1);
    if (options.is_digit && options.is_digit(utf8_code_point(text.substr(at), length))) {
      return taken == 0 ? at + length : at;
    }
    at += length;
  }
  const std::size_t newlines = options.max_length == 0 ? text.size() : kMostNewlines;
  for (std::size_t taken = 0; taken < newlines && at < text.size() && text[at] == '\n'; ++taken)
    ++at;
  return at;
}

}  // namespace detail

/// f(segment) from left to right; the views point into `text`.
template <class F>
void for_each_segment(std::string_view text, F&& f, const SegmentOptions& options = {}) {
  detail::require(options.max_length >= 0, "segments: max_length (", options.max_length,
                  ") must not be negative");
  const bool lines = options.max_length == 0 && !options.is_digit;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end =
        lines ? detail::line_end(text, begin) : detail::segment_end(text, begin, options);
    f(text.substr(begin, end - begin));
    begin = end;
  }
}

inline std::vector<std::string_view> segments(std::string_view text,
                                              const SegmentOptions& options = {}) {
  std::vector<std::string_view> list;
  for_each_segment(
      text, [&](std::string_view segment) { list.push_back(segment); }, options);
  return list;
}

namespace detail {

/// f(begin, end) for parts of at least `size` bytes (the last may be shorter) that end where a segment does.  Normalisation
/// and segmentation of the parts are those of the whole: a newline composes with nothing.
template <class F>
void for_each_block(std::string_view text, std::size_t size, F&& f) {
  for (std::size_t begin = 0; begin < text.size();) {
    std::size_t end = text.size();
    if (end - begin > size) end = line_end(text, begin + size);
    f(begin, end);
    begin = end;
  }
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
