// BytePiece's model files: JSON, byte for byte as the package writes them.
//
//   BytePiece tokenizer = load_bytepiece("en.model");                    // with NFC; {.normalizer = no_normalization}
//   UnigramModel model = load_bytepiece_model("en.model");               // the vocabulary alone
//   UnigramModel model = parse_bytepiece_model(json, "a name for messages");
//   save_bytepiece_model(model, "en.model");                             // bytepiece_model_json(model) is the text
//   save_bytepiece_models(train_bytepiece(texts, options), "en.model");  // one vocabulary: to the path; more: to PATH.SIZE
//
// One object; a key is the base64 of a piece, its value [id, surface, count]; the surface, the piece as text without what
// is not valid UTF-8, is for the reader's eyes.  Any JSON layout is read: the id is the first element and the count the last.
// Written are ids in order, 4 spaces of indent, every element on a line of its own, non-ASCII as it is, no newline at the end.
// A piece's count may be fractional; integers are written without a point.
// Errors (data_error, with file, line and byte): what is not JSON, a base64 that is none, an empty piece, a piece or an id
// that occurs twice, an id outside [3, 2^31), a count that is not positive and finite, no pieces at all; and files that
// cannot be opened or written.  A model without all 256 bytes is read: see UnigramModel::covers_all_bytes().
// Needs nlohmann-json and utf8proc: link eigenblocks::io.  Source: BytePiece 0.6.3.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/io/base64.hpp>
#include <eigenblocks/io/mapped_file.hpp>
#include <eigenblocks/io/nfc.hpp>
#include <eigenblocks/token/bytepiece.hpp>
#include <eigenblocks/token/bytepiece_trainer.hpp>
#include <eigenblocks/token/unigram_model.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Listens to the JSON parser and accepts nothing but a model.  Returning false stops the parser; error() says why.
class BytePieceModelReader {
 public:
  std::vector<UnigramPiece> pieces;
  const std::string& error() const { return error_; }

  bool start_object(std::size_t) {
    if (depth_ == 1) return refuse("is followed by an object, expected an array");
    return (depth_ == 0 || element(Kind::other)) && ++depth_;
  }
  bool end_object() {
    --depth_;
    return true;
  }
  bool key(const std::string& text) {
    if (depth_ != 1) return true;
    key_ = text;
    std::string bytes;
    if (!base64_decode(text, bytes)) return refuse("is not base64");
    if (bytes.empty()) return refuse("is an empty piece");
    if (!seen_.insert(bytes).second) return refuse("is a piece that occurs twice");
    if (pieces.size() >= ByteTrie::kNone - 1) return refuse("is one piece too many");
    pieces.push_back({std::move(bytes), 0, 0});
    elements_ = 0;
    return true;
  }
  bool start_array(std::size_t) {
    if (depth_ == 0) return not_an_object();
    return (depth_ == 1 || element(Kind::other)) && ++depth_;
  }
  bool end_array() {
    if (--depth_ != 1) return true;
    if (elements_ < 2)
      return refuse("has an array of ", elements_, " elements, expected [id, ..., count]");
    if (last_ != Kind::number) return refuse("has a count that is not a number");
    if (!(count_ > 0) || !std::isfinite(count_))
      return refuse("has count ", count_, ", must be positive and finite");
    total_ += count_;
    if (!std::isfinite(total_)) return refuse("makes the sum of all counts infinite");
    pieces.back().count = count_;
    return true;
  }
  bool number_unsigned(std::uint64_t value) {
    if (depth_ == 2 && elements_ == 0) {
      if (value < kFirstPieceId || value > std::uint64_t{std::numeric_limits<TokenId>::max()}) {
        return refuse("has id ", value, ", must be in [3, 2^31)");
      }
      pieces.back().id = static_cast<TokenId>(value);
      if (!ids_.insert(pieces.back().id).second)
        return refuse("has id ", value, ", which occurs twice");
    }
    return number(static_cast<double>(value));
  }
  bool number_integer(std::int64_t value) {
    if (depth_ == 2 && elements_ == 0) return refuse("has id ", value, ", must be in [3, 2^31)");
    return number(static_cast<double>(value));
  }
  bool number_float(double value, const std::string& text) {
    if (depth_ == 2 && elements_ == 0)
      return refuse("has id ", text, ", must be an integer in [3, 2^31)");
    return number(value);
  }
  bool string(const std::string&) { return element(Kind::other); }
  bool boolean(bool) { return element(Kind::other); }
  bool null() { return element(Kind::other); }
  bool binary(const std::vector<std::uint8_t>&) { return element(Kind::other); }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& e) {
    error_ = join_text("not valid JSON: ", e.what());
    return false;
  }

 private:
  enum class Kind { number, other };

  bool number(double value) {
    if (!element(Kind::number)) return false;
    if (depth_ == 2) count_ = value;
    return true;
  }
  /// One more element of a piece's array; what lies deeper is passed over.
  bool element(Kind kind) {
    if (depth_ == 0) return not_an_object();
    if (depth_ == 1) return refuse("is followed by a single value, expected an array");
    if (depth_ > 2) return true;
    if (elements_ == 0 && kind != Kind::number) return refuse("has an id that is not a number");
    ++elements_;
    last_ = kind;
    return true;
  }
  bool not_an_object() {
    error_ = "expected one object, of pieces";
    return false;
  }
  template <class... Parts>
  bool refuse(const Parts&... parts) {
    error_ =
        join_text("key \"", key_.substr(0, 80), key_.size() > 80 ? "..." : "", "\" ", parts...);
    return false;
  }

  std::string key_, error_;
  std::unordered_set<std::string> seen_;
  std::unordered_set<TokenId> ids_;
  std::size_t depth_ = 0, elements_ = 0;
  Kind last_ = Kind::other;
  double count_ = 0, total_ = 0;
};

/// An iterator that tells how far it has come, for the place in messages.
class CountingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  CountingIterator(const char* at, const char** furthest) : at_(at), furthest_(furthest) {}
  reference operator*() const { return *at_; }
  CountingIterator& operator++() {
    *furthest_ = ++at_;
    return *this;
  }
  CountingIterator operator++(int) {
    CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const { return at_ == other.at_; }
  bool operator!=(const CountingIterator& other) const { return at_ != other.at_; }

 private:
  const char* at_;
  const char** furthest_;
};

inline void append_json_string(std::string& out, std::string_view text) {
  static constexpr char digits[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const char* const named = "\"\\\n\r\t\f\b";
    const char* const letters = "\"\\nrtfb";
    const auto at = std::string_view(named).find(c);
    if (at != std::string_view::npos) {
      out += '\\';
      out += letters[at];
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += "\\u00";
      out += digits[static_cast<unsigned char>(c) >> 4];
      out += digits[static_cast<unsigned char>(c) & 15];
    } else {
      out += c;
    }
  }
  out += '"';
}

/// Shortest text that reads back as the same number; no exponent for integers below 2^63.
inline void append_count(std::string& out, double count) {
  char text[40];
  const bool integer = count == std::floor(count) && count < 0x1p63;
  const auto end = integer
                       ? std::to_chars(text, text + sizeof(text), static_cast<std::int64_t>(count))
                       : std::to_chars(text, text + sizeof(text), count);
  out.append(text, end.ptr);
}

}  // namespace detail

/// The model in a JSON text; `name` stands for the file in messages.
inline UnigramModel parse_bytepiece_model(std::string_view json, const std::string& name) {
  if (json.find('\0') != json.npos) {  // to the JSON parser that would be the end
    detail::raise<data_error>(name, ": byte ", json.find('\0'), ": a zero byte");
  }
  detail::BytePieceModelReader reader;
  const char* const begin = json.data();
  const char* furthest = begin;
  const bool parsed =
      nlohmann::json::sax_parse(detail::CountingIterator(begin, &furthest),
                                detail::CountingIterator(begin + json.size(), &furthest), &reader);
  if (!parsed) {
    const auto lines = std::count(begin, furthest, '\n');
    detail::raise<data_error>(name, ": line ", lines + 1, ", byte ", furthest - begin, ": ",
                              reader.error());
  }
  if (reader.pieces.empty()) detail::raise<data_error>(name, ": the model has no pieces");
  return UnigramModel::from_counts(reader.pieces);
}

inline UnigramModel load_bytepiece_model(const std::string& path) {
  const std::vector<std::byte> content = read_file(path);
  return parse_bytepiece_model({reinterpret_cast<const char*>(content.data()), content.size()},
                               path);
}

struct BytePieceLoadOptions {
  Normalizer normalizer = nfc;
  InvalidUtf8 invalid = InvalidUtf8::error;
};

/// The tokenizer of a model file.
inline BytePiece load_bytepiece(const std::string& path, const BytePieceLoadOptions& options = {}) {
  return BytePiece(load_bytepiece_model(path), options.normalizer, options.invalid);
}

/// The model as the package writes it.
inline std::string bytepiece_model_json(const UnigramModel& model) {
  std::string out = "{";
  const char* before = "\n";
  for (const UnigramPiece& piece : model.pieces()) {
    out += before;
    out += "    \"" + base64_encode(piece.bytes) + "\": [\n        " + std::to_string(piece.id) +
           ",\n        ";
    detail::append_json_string(out, valid_utf8(piece.bytes));
    out += ",\n        ";
    detail::append_count(out, piece.count);
    out += "\n    ]";
    before = ",\n";
  }
  return out += model.size() == 0 ? "}" : "\n}";
}

inline void save_bytepiece_model(const UnigramModel& model, const std::string& path) {
  const std::string text = bytepiece_model_json(model);
  replace_file(path, {std::as_bytes(std::span(text))});
}

/// One vocabulary to `path`, several each to `path`.SIZE with the size that was asked for.  Returns the names.
inline std::vector<std::string> save_bytepiece_models(const std::vector<TrainedVocabulary>& trained,
                                                      const std::string& path) {
  std::vector<std::string> names;
  for (const TrainedVocabulary& vocabulary : trained) {
    names.push_back(trained.size() == 1 ? path
                                        : path + "." + std::to_string(vocabulary.max_vocab_size));
    save_bytepiece_model(vocabulary.model, names.back());
  }
  return names;
}

EIGENBLOCKS_NAMESPACE_END
