// Unicode canonical composition (NFC) and decimal digits, through utf8proc.
//
//   to_nfc("e\u0301")           "é" as one code point
//   nfc(text, buffer)           without a copy where the text is NFC already (a Normalizer, token/normalize.hpp)
//   is_decimal_digit(U'５')     general category Nd, not only ASCII
//
// A text of bytes below 0xCC (code points below U+0300) is NFC.  In any other text a character is settled if NFC leaves
// it alone, its combining class is 0 and it is the second half of no composition: NFC then neither changes it nor joins it to
// what comes before.  The full algorithm runs only from the settled character before one that is not to the next that is.
// Errors: to_nfc throws invalid_argument, with the byte, for text that is not valid UTF-8.
// The Unicode version is utf8proc's (2.8: Unicode 14).  Needs utf8proc: link eigenblocks::io.
// Source: Unicode Standard Annex 15.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/token/normalize.hpp>

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Unicode general category Nd.
inline bool is_decimal_digit(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c)) == UTF8PROC_CATEGORY_ND;
}

namespace detail {

inline int combining_class(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

/// Appends the full canonical decomposition of c.
inline void append_decomposition(utf8proc_int32_t c, std::vector<utf8proc_int32_t>& out) {
  utf8proc_int32_t parts[32];
  int last_boundclass = 0;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
  const auto count = utf8proc_decompose_char(c, parts, 32, options, &last_boundclass);
  out.insert(out.end(), parts, parts + std::clamp<utf8proc_ssize_t>(count, 0, 32));
}

/// Puts runs of combining marks into canonical order.  (utf8proc's own ordering takes quadratic time on long runs.)
inline void order_marks(std::vector<utf8proc_int32_t>& text) {
  for (auto begin = text.begin(); begin != text.end();) {
    if (combining_class(*begin) == 0) {
      ++begin;
      continue;
    }
    auto end = begin;
    while (end != text.end() && combining_class(*end) != 0) ++end;
    std::stable_sort(begin, end,
                     [](auto a, auto b) { return combining_class(a) < combining_class(b); });
    begin = end;
  }
}

inline void compose(std::vector<utf8proc_int32_t>& text) {
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const auto size =
      utf8proc_normalize_utf32(text.data(), static_cast<utf8proc_ssize_t>(text.size()), options);
  text.resize(static_cast<std::size_t>(std::max<utf8proc_ssize_t>(size, 0)));
}

/// For each code point whether it is settled.
class NfcSettled {
 public:
  NfcSettled() : bits_(0x110000 / 64, ~std::uint64_t{0}) {
    std::vector<utf8proc_int32_t> parts, composed;
    for (utf8proc_int32_t c = 0x80; c < kEnd; ++c) {
      if (is_ideograph(c) || (c >= 0xac00 && c < 0xd7a4))
        continue;  // Hangul syllables: U+1100..11FF below
      if (combining_class(c) != 0) unsettle(c);
      parts.clear();
      append_decomposition(c, parts);
      if (parts.size() == 1 && parts[0] == c) continue;
      composed = parts;
      compose(composed);
      // Of a primary composite, the second half is the last character of the whole decomposition.
      unsettle(composed.size() == 1 && composed[0] == c ? parts.back() : c);
    }
    for (utf8proc_int32_t c = 0x1161; c < 0x1176; ++c) unsettle(c);
    for (utf8proc_int32_t c = 0x11a8; c < 0x11c3; ++c) unsettle(c);
  }
  bool operator()(char32_t c) const { return bits_[c / 64] >> c % 64 & 1; }

  static const NfcSettled& table() {
    static const NfcSettled settled;
    return settled;
  }

 private:
  // Marks lie below U+1E94B or in the tags and selectors of plane 14, whose class is 0; decompositions below U+2FA1E.
  static constexpr utf8proc_int32_t kEnd = 0x30000;
  static bool is_ideograph(utf8proc_int32_t c) {
    return (c >= 0x3400 && c < 0xa000) || (c >= 0x20000 && c < 0x2f800);
  }
  void unsettle(utf8proc_int32_t c) {
    bits_[static_cast<std::size_t>(c) / 64] &= ~(std::uint64_t{1} << c % 64);
  }
  std::vector<std::uint64_t> bits_;
};

/// Appends NFC of a valid text to `out`, without looking for what is settled.
inline void append_nfc(std::string_view text, std::string& out) {
  std::vector<utf8proc_int32_t> points;
  for_each_code_point(text, [&](char32_t c, std::string_view) {
    append_decomposition(static_cast<utf8proc_int32_t>(c), points);
  });
  order_marks(points);
  compose(points);
  for (const auto c : points) append_utf8(out, static_cast<char32_t>(c));
}

}  // namespace detail

/// NFC of the text: a view of the text itself where nothing changes, of `buffer` otherwise.
inline NormalizedText nfc(std::string_view text, std::string& buffer) {
  const detail::NfcSettled* settled = nullptr;
  buffer.clear();
  std::size_t copied = 0;   // text[0, copied) is in the buffer, normalised
  std::size_t starter = 0;  // the last settled character
  for (std::size_t i = 0; i < text.size();) {
    if (i + 8 <= text.size() && detail::eight_ascii(text.data() + i)) {
      i += 8;
      starter = i - 1;
      continue;
    }
    const auto lead = static_cast<std::uint8_t>(text[i]);
    // U+4000..U+9FFF: ideographs, all settled.
    if (lead >= 0xe4 && lead <= 0xe9 && i + 3 <= text.size() &&
        (static_cast<std::uint8_t>(text[i + 1]) & 0xc0) == 0x80 &&
        (static_cast<std::uint8_t>(text[i + 2]) & 0xc0) == 0x80) {
      starter = i;
      i += 3;
      continue;
    }
    const std::size_t length = utf8_length(text.substr(i, 4));
    if (length == 0) return {{}, i};
    if (lead < 0xcc) {
      starter = i;
      i += length;
      continue;
    }
    if (!settled) settled = &detail::NfcSettled::table();
    if ((*settled)(utf8_code_point(text.substr(i), length))) {
      starter = i;
      i += length;
      continue;
    }
    const std::size_t begin = starter;  // never before `copied`
    std::size_t end = i + length;
    while (end < text.size()) {
      const std::size_t next = utf8_length(text.substr(end, 4));
      if (next == 0) return {{}, end};
      if ((*settled)(utf8_code_point(text.substr(end), next))) break;
      end += next;
    }
    buffer.append(text, copied, begin - copied);
    detail::append_nfc(text.substr(begin, end - begin), buffer);
    copied = starter = i = end;
  }
  if (copied == 0) return {text};
  buffer.append(text, copied);
  return {buffer};
}

/// NFC of a valid text.
inline std::string to_nfc(std::string_view text) {
  std::string buffer;
  const NormalizedText normal = nfc(text, buffer);
  detail::require(normal.error == kUtf8Valid, "to_nfc: the text is not valid UTF-8 at byte ",
                  normal.error);
  return std::string(normal.text);
}

EIGENBLOCKS_NAMESPACE_END
