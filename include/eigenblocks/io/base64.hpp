// Base64 with the standard alphabet and padding (RFC 4648, section 4).
//
//   base64_encode("watch")               "d2F0Y2g="
//   base64_decode("d2F0Y2g=", bytes)     true; bytes == "watch"
//
// One text for each byte string: decoding refuses missing padding, other characters and bits that are left over.
#pragma once

#include <eigenblocks/core/config.hpp>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {
inline constexpr std::string_view kBase64 =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
}

inline std::string base64_encode(std::string_view bytes) {
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t bits = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      bits = bits << 8 | (i + j < bytes.size() ? static_cast<std::uint8_t>(bytes[i + j]) : 0u);
    }
    for (std::size_t j = 0; j < 4; ++j) {
      text += i + j > bytes.size() ? '=' : detail::kBase64[bits >> (18 - 6 * j) & 63u];
    }
  }
  return text;
}

/// Whether `text` is base64; if so `bytes` is what it stands for.
inline bool base64_decode(std::string_view text, std::string& bytes) {
  static constexpr auto values = [] {
    std::array<std::uint8_t, 256> table{};
    table.fill(64);
    for (std::size_t i = 0; i < 64; ++i) {
      table[static_cast<std::uint8_t>(detail::kBase64[i])] = static_cast<std::uint8_t>(i);
    }
    return table;
  }();
  bytes.clear();
  if (text.size() % 4 != 0) return false;
  for (std::size_t i = 0; i < text.size(); i += 4) {
    const bool last = i + 4 == text.size();
    const std::size_t padding = !last || text[i + 3] != '=' ? 0 : text[i + 2] != '=' ? 1 : 2;
    std::uint32_t bits = 0;
    for (std::size_t j = 0; j < 4; ++j) {
      const std::uint8_t value =
          j + padding >= 4 ? 0 : values[static_cast<std::uint8_t>(text[i + j])];
      if (value == 64) return false;
      bits = bits << 6 | value;
    }
    if ((bits & ((1u << 8 * padding) - 1)) != 0) return false;
    for (std::size_t j = 0; j + padding < 3; ++j) {
      bytes.push_back(static_cast<char>(bits >> (16 - 8 * j) & 0xff));
    }
  }
  return true;
}

EIGENBLOCKS_NAMESPACE_END
