// UTF-8: well-formed sequences (Unicode, table 3-7), and what to do with the rest.
//
//   utf8_error("a\xff")                 1: the first byte at which no well-formed sequence starts; kUtf8Valid if none
//   valid_utf8("a\xffz")                "az": at each place a well-formed sequence is kept, or one byte is skipped
//   for_each_code_point(text, [](char32_t c, std::string_view sequence) { ... });       // text must be valid
//   Utf8Stream stream;                  // bytes in, whole characters out
//   stream.push("\xe6\x98")             ""     an incomplete character is held back (at most 3 bytes)
//   stream.push("\xa5")                 "春"   and put out as soon as it is whole
//   stream.finish()                     forgets what is held: it can become nothing any more
//
// Overlong forms, surrogates (ED A0..BF) and everything above U+10FFFF (F4 90.., F5..) are ill-formed.
// However a text is cut into pushes, the stream's outputs put together are valid_utf8 of the whole.
#pragma once

#include <eigenblocks/core/config.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

EIGENBLOCKS_NAMESPACE_BEGIN

inline constexpr std::size_t kUtf8Valid = static_cast<std::size_t>(-1);

namespace detail {

/// The bytes a lead byte allows second, and how many bytes there are in all (0: it starts nothing).
struct Utf8Lead {
  std::uint8_t length, low, high;
};
constexpr Utf8Lead utf8_lead(std::uint8_t lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead < 0xc2) return {0, 0, 0};
  if (lead < 0xe0) return {2, 0x80, 0xbf};
  if (lead < 0xf0) {
    return {3, static_cast<std::uint8_t>(lead == 0xe0 ? 0xa0 : 0x80),
            static_cast<std::uint8_t>(lead == 0xed ? 0x9f : 0xbf)};
  }
  if (lead < 0xf5) {
    return {4, static_cast<std::uint8_t>(lead == 0xf0 ? 0x90 : 0x80),
            static_cast<std::uint8_t>(lead == 0xf4 ? 0x8f : 0xbf)};
  }
  return {0, 0, 0};
}

/// How many bytes at the start of `text` agree with the start of one sequence, and how many that sequence needs.
struct Utf8Prefix {
  std::size_t have, need;  // need == 0: nothing starts here
};
constexpr Utf8Prefix utf8_prefix(std::string_view text) {
  if (text.empty()) return {0, 0};
  const auto at = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  const Utf8Lead lead = utf8_lead(at(0));
  std::size_t have = lead.length == 0 ? 0 : 1;
  if (lead.length > 1 && text.size() > 1 && at(1) >= lead.low && at(1) <= lead.high) {
    have = 2;
    while (have < lead.length && have < text.size() && (at(have) & 0xc0) == 0x80) ++have;
  }
  return {have, lead.length};
}

/// Whether the 8 bytes at `at` are all ASCII.
inline bool eight_ascii(const char* at) {
  std::uint64_t word;
  std::memcpy(&word, at, 8);
  return (word & 0x8080808080808080u) == 0;
}

/// f(begin, length) for what starts at each place: a sequence of 1 to 4 bytes, ASCII also in runs of 8; length 0 where no
/// sequence does (one byte is skipped).  f returns whether to go on.
template <class F>
void scan_utf8(std::string_view text, F&& f) {
  for (std::size_t i = 0; i < text.size();) {
    if (i + 8 <= text.size() && eight_ascii(text.data() + i)) {
      if (!f(i, std::size_t{8})) return;
      i += 8;
      continue;
    }
    const Utf8Prefix prefix = utf8_prefix(text.substr(i));
    const std::size_t length = prefix.have == prefix.need ? prefix.need : 0;
    if (!f(i, length)) return;
    i += length == 0 ? 1 : length;
  }
}

}  // namespace detail

/// Bytes of the well-formed sequence at the start of `text`, 1 to 4; 0 if there is none.
constexpr std::size_t utf8_length(std::string_view text) {
  const auto prefix = detail::utf8_prefix(text);
  return prefix.have == prefix.need ? prefix.need : 0;
}

/// The code point of a well-formed sequence of `length` bytes.
constexpr char32_t utf8_code_point(std::string_view text, std::size_t length) {
  const auto at = [&](std::size_t i) {
    return static_cast<char32_t>(static_cast<std::uint8_t>(text[i]));
  };
  if (length == 1) return at(0);
  if (length == 2) return (at(0) & 0x1f) << 6 | (at(1) & 0x3f);
  if (length == 3) return (at(0) & 0x0f) << 12 | (at(1) & 0x3f) << 6 | (at(2) & 0x3f);
  return (at(0) & 0x07) << 18 | (at(1) & 0x3f) << 12 | (at(2) & 0x3f) << 6 | (at(3) & 0x3f);
}

/// Appends a code point (not a surrogate, at most U+10FFFF; not checked).
inline void append_utf8(std::string& text, char32_t c) {
  const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | c >> 6), put(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    put(0xe0 | c >> 12), put(0x80 | (c >> 6 & 0x3f)), put(0x80 | (c & 0x3f));
  } else {
    put(0xf0 | c >> 18), put(0x80 | (c >> 12 & 0x3f));
    put(0x80 | (c >> 6 & 0x3f)), put(0x80 | (c & 0x3f));
  }
}

/// The first byte at which no well-formed sequence starts, kUtf8Valid if the text is valid.
inline std::size_t utf8_error(std::string_view text) {
  std::size_t error = kUtf8Valid;
  detail::scan_utf8(text, [&](std::size_t at, std::size_t length) {
    if (length == 0) error = at;
    return length != 0;
  });
  return error;
}

/// The text without what is ill-formed.
inline std::string valid_utf8(std::string_view text) {
  std::string valid;
  valid.reserve(text.size());
  detail::scan_utf8(text, [&](std::size_t at, std::size_t length) {
    valid.append(text, at, length);
    return true;
  });
  return valid;
}

/// f(code point, its bytes) for each character of a valid text.
template <class F>
void for_each_code_point(std::string_view text, F&& f) {
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = detail::utf8_lead(static_cast<std::uint8_t>(text[i])).length;
    f(utf8_code_point(text.substr(i), length), text.substr(i, length));
    i += length;
  }
}

/// valid_utf8 of a text that arrives in parts.
class Utf8Stream {
 public:
  /// Takes bytes; returns the characters that are whole now.
  std::string push(std::string_view bytes) {
    held_ += bytes;
    // Only the last 3 bytes can be the start of a character that is not whole.
    std::size_t end = held_.size();
    for (std::size_t i = end > 3 ? end - 3 : 0; i < held_.size(); ++i) {
      const auto prefix = detail::utf8_prefix(std::string_view(held_).substr(i));
      if (prefix.have < prefix.need && prefix.have == held_.size() - i) {
        end = i;
        break;
      }
    }
    std::string out = valid_utf8(std::string_view(held_).substr(0, end));
    held_.erase(0, end);
    return out;
  }
  /// Bytes that wait for the rest of their character, 0 to 3.
  std::size_t held() const { return held_.size(); }
  /// The text ends here: what is held is ill-formed.  Returns how many bytes that were.
  std::size_t finish() {
    const std::size_t dropped = held_.size();
    held_.clear();
    return dropped;
  }

 private:
  std::string held_;
};

EIGENBLOCKS_NAMESPACE_END
