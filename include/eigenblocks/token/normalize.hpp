// What a tokenizer does to a text before it cuts it: a function that the caller names.
//
//   BytePiece tokenizer(model, nfc);               // canonical composition, the package's default: io/nfc.hpp
//   BytePiece bytes_kept(model, no_normalization); // decode(encode(text)) == text to the byte
//
// A Normalizer returns the normalised text, which may be `text` itself or lie in `buffer`, and in any case says where the
// text stops being valid UTF-8.  It must commute with cutting after a newline.
#pragma once

#include <eigenblocks/token/utf8.hpp>

#include <string>
#include <string_view>

EIGENBLOCKS_NAMESPACE_BEGIN

struct NormalizedText {
  std::string_view text;
  std::size_t error =
      kUtf8Valid;  ///< first byte at which the given text is not valid; `text` is then meaningless
};

using Normalizer = NormalizedText (*)(std::string_view text, std::string& buffer);

/// The text as it is, if it is valid UTF-8.
inline NormalizedText no_normalization(std::string_view text, std::string&) {
  return {text, utf8_error(text)};
}

EIGENBLOCKS_NAMESPACE_END
