// The header of a safetensors file: its entries, and the reader that believes none of them.
//
// safetensors.hpp is what users include; it says what the format is and which damage is found.  Everything that decides
// whether a file is sound happens here, in this order: the length; the JSON, event by event, so that a hostile header
// can neither nest deeply nor build a tree in memory; then the offsets, sorted, against the shapes and the file's size.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

static_assert(std::endian::native == std::endian::little,
              "safetensors data is little-endian and is read without swapping bytes");

enum class SafetensorsDtype { f64, f32, f16, bf16, i64, i32, i16, i8, u8, boolean, other };

/// A tensor's entry in the header.
struct SafetensorsTensor {
  std::string name;
  std::string dtype_name;  ///< as written: "F32"
  SafetensorsDtype dtype = SafetensorsDtype::other;
  std::vector<Index> shape;
  std::size_t begin = 0, end = 0;  ///< bytes, counted from the start of the data

  /// Product of the shape; 1 for a scalar.
  Index size() const { return product_from(0); }
  /// As a matrix: shape[0] rows, the other dimensions side by side; fewer than two dimensions make one row.
  Index rows() const { return shape.size() < 2 ? 1 : shape[0]; }
  Index cols() const { return product_from(shape.size() < 2 ? 0 : 1); }

 private:
  Index product_from(std::size_t axis) const {
    Index product = 1;
    for (; axis < shape.size(); ++axis) product *= shape[axis];
    return product;
  }
};

using SafetensorsMetadata = std::map<std::string, std::string, std::less<>>;

namespace detail {

inline constexpr std::uint64_t kSafetensorsMaxHeader = 100'000'000;  // the official reader's limit

struct SafetensorsDtypeRow {
  const char* name;
  SafetensorsDtype dtype;
  std::size_t size;  // bytes of an element
};
inline constexpr SafetensorsDtypeRow kSafetensorsDtypes[] = {
    {"F64", SafetensorsDtype::f64, 8}, {"F32", SafetensorsDtype::f32, 4},
    {"F16", SafetensorsDtype::f16, 2}, {"BF16", SafetensorsDtype::bf16, 2},
    {"I64", SafetensorsDtype::i64, 8}, {"I32", SafetensorsDtype::i32, 4},
    {"I16", SafetensorsDtype::i16, 2}, {"I8", SafetensorsDtype::i8, 1},
    {"U8", SafetensorsDtype::u8, 1},   {"BOOL", SafetensorsDtype::boolean, 1},
};

/// nullptr for SafetensorsDtype::other.
constexpr const SafetensorsDtypeRow* safetensors_row(SafetensorsDtype dtype) {
  for (const auto& row : kSafetensorsDtypes) {
    if (row.dtype == dtype) return &row;
  }
  return nullptr;
}

/// a * b of non-negative numbers, or -1 when it does not fit.
constexpr Index product_or_negative(Index a, Index b) {
  return a != 0 && b > std::numeric_limits<Index>::max() / a ? -1 : a * b;
}

/// For messages: 'name', cut when it is long.
inline std::string in_quotes(std::string_view name) {
  constexpr std::size_t kLongest = 120;
  return join_text("'", name.substr(0, kLongest), name.size() > kLongest ? "..." : "", "'");
}

/// Listens to the JSON parser and accepts nothing but a safetensors header.
/// Returning false stops the parser; error() then says why.
class SafetensorsHeaderReader {
 public:
  std::vector<SafetensorsTensor> tensors;
  SafetensorsMetadata metadata;
  const std::string& error() const { return error_; }

  bool start_object(std::size_t) {
    if (place_ == Place::start) return go(Place::root);
    if (place_ != Place::root) return unexpected("an object");
    return go(key_ == "__metadata__" ? Place::metadata : Place::tensor);
  }

  bool key(const std::string& text) {
    if (place_ == Place::root) {
      key_ = text;
      seen_ = {};
      if (key_ == "__metadata__") {
        return !std::exchange(metadata_seen_, true) || refuse("__metadata__ occurs twice");
      }
      tensors.emplace_back().name = key_;
      return true;
    }
    field_ = text;
    if (place_ == Place::metadata) {
      return !metadata.contains(field_) || refuse(in_quotes(field_), " occurs twice");
    }
    for (std::size_t i = 0; i < kFields.size(); ++i) {
      if (field_ != kFields[i]) continue;
      return !std::exchange(seen_[i], true) || refuse(in_quotes(field_), " occurs twice");
    }
    return refuse(in_quotes(field_), " is not a key of a tensor");
  }

  bool string(const std::string& text) {
    if (place_ == Place::metadata) {
      metadata[field_] = text;
      return true;
    }
    if (place_ != Place::tensor || field_ != kFields[0]) return unexpected("a string");
    SafetensorsTensor& tensor = tensors.back();
    tensor.dtype_name = text;
    for (const auto& row : kSafetensorsDtypes) {
      if (text == row.name) tensor.dtype = row.dtype;
    }
    return true;
  }

  bool start_array(std::size_t) {
    if (place_ != Place::tensor || field_ == kFields[0]) return unexpected("an array");
    return go(field_ == kFields[1] ? Place::shape : Place::offsets);
  }

  bool number_unsigned(std::uint64_t value) {
    if (place_ != Place::shape && place_ != Place::offsets) return unexpected("a number");
    if (value > std::uint64_t{std::numeric_limits<Index>::max()}) {
      return refuse(in_quotes(field_), " holds ", value, ", which is too large");
    }
    if (place_ == Place::shape) {
      tensors.back().shape.push_back(static_cast<Index>(value));
      return true;
    }
    if (offsets_ == 2) return refuse("'data_offsets' must hold 2 numbers");
    (offsets_++ == 0 ? tensors.back().begin : tensors.back().end) = static_cast<std::size_t>(value);
    return true;
  }

  bool end_array() {
    if (place_ == Place::offsets && std::exchange(offsets_, 0) != 2) {
      return refuse("'data_offsets' must hold 2 numbers");
    }
    return go(Place::tensor);
  }

  bool end_object() {
    if (place_ == Place::tensor) {
      for (std::size_t i = 0; i < kFields.size(); ++i) {
        if (!seen_[i]) return refuse("'", kFields[i], "' is missing");
      }
    }
    return go(place_ == Place::root ? Place::start : Place::root);
  }

  bool number_integer(std::int64_t value) { return unexpected(std::to_string(value)); }
  bool number_float(double, const std::string& text) { return unexpected(text); }
  bool boolean(bool) { return unexpected("true or false"); }
  bool null() { return unexpected("null"); }
  bool binary(const std::vector<std::uint8_t>&) { return unexpected("binary data"); }
  bool parse_error(std::size_t at, const std::string&, const nlohmann::detail::exception& e) {
    error_ = join_text("the header is not valid JSON at byte ", at, ": ", e.what());
    return false;
  }

 private:
  enum class Place { start, root, metadata, tensor, shape, offsets };
  static constexpr std::array<const char*, 3> kFields = {"dtype", "shape", "data_offsets"};

  bool go(Place place) {
    place_ = place;
    return true;
  }

  template <class... Parts>
  bool refuse(const Parts&... parts) {
    error_ = place_ == Place::root ? join_text("header: ", parts...)
                                   : join_text("header entry ", in_quotes(key_), ": ", parts...);
    return false;
  }

  bool unexpected(std::string_view found) {
    if (place_ == Place::root) return refuse(in_quotes(key_), " must be an object, not ", found);
    if (place_ == Place::metadata)
      return refuse(in_quotes(field_), " must be a string, not ", found);
    if (place_ == Place::tensor) return refuse(in_quotes(field_), " cannot be ", found);
    return refuse(in_quotes(field_), " must hold integers >= 0 and not ", found);
  }

  Place place_ = Place::start;
  std::string key_, field_, error_;
  std::array<bool, 3> seen_{};
  bool metadata_seen_ = false;
  int offsets_ = 0;
};

/// Number of elements of a shape, or -1 if it overflows.  Zeros do not excuse an overflow of the other dimensions:
/// every partial product is safe to compute afterwards.
inline Index checked_size(const std::vector<Index>& shape) {
  Index size = 1;
  bool empty = false;
  for (const Index extent : shape) {
    empty |= extent == 0;
    if (extent != 0 && size > 0) size = product_or_negative(size, extent);
  }
  return empty && size > 0 ? 0 : size;
}

/// What a sound file says about itself: the tensors in the order of their data, all offsets safe to use.
struct SafetensorsHeader {
  std::vector<SafetensorsTensor> tensors;
  SafetensorsMetadata metadata;
  std::map<std::string, std::size_t, std::less<>> by_name;  // positions in `tensors`
  std::size_t data_start = 0;
};

/// Sorts the tensors and checks them against each other and the data.  Errors: data_error.
inline void check_safetensors_layout(const std::string& source, SafetensorsHeader& header,
                                     std::size_t data_size) {
  std::sort(header.tensors.begin(), header.tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::size_t reached = 0;
  for (std::size_t at = 0; at < header.tensors.size(); ++at) {
    const SafetensorsTensor& tensor = header.tensors[at];
    const auto require_sound = [&](bool sound, const auto&... parts) {
      if (!sound) raise<data_error>(source, ": tensor ", in_quotes(tensor.name), ": ", parts...);
    };
    require_sound(header.by_name.emplace(tensor.name, at).second, "the name occurs twice");
    require_sound(tensor.begin <= tensor.end && tensor.end <= data_size, "data_offsets [",
                  tensor.begin, ", ", tensor.end, "] do not lie in [0, ", data_size, "]");
    require_sound(tensor.begin >= reached, "data_offsets begin at ", tensor.begin,
                  " and overlap the tensor before, which ends at ", reached);
    require_sound(tensor.begin == reached, "data_offsets begin at ", tensor.begin,
                  " and leave a hole after ", reached);
    reached = tensor.end;
    const Index size = checked_size(tensor.shape);
    require_sound(size >= 0, "the product of the shape overflows");
    if (const auto* row = safetensors_row(tensor.dtype)) {
      const Index bytes = product_or_negative(size, static_cast<Index>(row->size));
      require_sound(bytes >= 0 && static_cast<std::size_t>(bytes) == tensor.end - tensor.begin,
                    size, " elements of ", row->size, " bytes (", row->name,
                    ") do not fill data_offsets [", tensor.begin, ", ", tensor.end, "]");
    }
  }
  if (reached != data_size) {
    raise<data_error>(source, ": the data has ", data_size, " bytes, the tensors take ", reached);
  }
}

/// Reads and checks the header of a whole file; `source` is what messages call the file.  Errors: data_error.
inline SafetensorsHeader read_safetensors_header(const std::string& source,
                                                 std::span<const std::byte> file) {
  std::uint64_t length = 0;
  if (file.size() < sizeof(length)) {
    raise<data_error>(source, ": the file has ", file.size(), " bytes, fewer than the ",
                      sizeof(length), " of the header length");
  }
  std::memcpy(&length, file.data(), sizeof(length));
  const std::size_t rest = file.size() - sizeof(length);
  if (length > rest) {
    raise<data_error>(source, ": the header length (", length, ") exceeds the ", rest,
                      " bytes left");
  }
  if (length > kSafetensorsMaxHeader) {
    raise<data_error>(source, ": the header length (", length, ") exceeds ", kSafetensorsMaxHeader);
  }
  const auto* begin = reinterpret_cast<const char*>(file.data()) + sizeof(length);
  const std::string_view text(begin, static_cast<std::size_t>(length));
  if (!text.starts_with('{')) {
    raise<data_error>(source, ": the header does not begin with '{'");
  }
  // The JSON parser takes a zero byte for the end of its input and would let anything follow.
  if (text.find('\0') != text.npos) {
    raise<data_error>(source, ": the header contains a zero byte");
  }
  SafetensorsHeaderReader reader;
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &reader)) {
    raise<data_error>(source, ": ", reader.error());
  }
  SafetensorsHeader header;
  header.tensors = std::move(reader.tensors);
  header.metadata = std::move(reader.metadata);
  header.data_start = sizeof(length) + text.size();
  check_safetensors_layout(source, header, rest - text.size());
  return header;
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
