// safetensors: named tensors and a few strings in one file; the exchange format for weights and checkpoints.
//
//   const auto file = SafetensorsFile::open("model.safetensors");    // mapped: opening costs only the header
//   Matrix<float> w = file.matrix<float>("layer.0.weight");          // copy, converted from F64, F32, F16 or BF16
//   auto view = file.view<float>("layer.0.weight");                  // no copy: an Eigen::Map into the file
//   std::vector<Index> ids = file.integers("ids");
//
//   SafetensorsWriter writer;
//   writer.add("q", q, {tokens, heads, dim}).add_integers("ids", ids).metadata("step", "1200");
//   writer.add_as<Eigen::bfloat16>("layer.0.weight", w);             // rounded to 16 bits
//   writer.write("model.safetensors");                               // atomic: the old file or the new one
//
// Layout (https://github.com/huggingface/safetensors, section Format): 8 bytes little-endian header length n; n bytes
// of JSON  {"__metadata__": {string: string}, name: {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..},
// padded with spaces; the data, row-major and little-endian, offsets counted from its start.
// A tensor [T, H, d] is read as a T x (H*d) matrix, [n] as 1 x n, a scalar [] as 1 x 1.
// PyTorch and Hugging Face store a linear layer's weight as out x in: transpose it for y = x W.
//
// Files are not trusted.  All of this is checked before the first tensor is handed out, and is a data_error that names
// the file and the place: a truncated file; a header longer than the file or than 100 MB; text that is not JSON or not
// UTF-8; another structure than the above, names or keys that occur twice; a shape that is not made of non-negative
// integers, or whose product overflows; offsets that are decreasing, out of range, overlapping, or leave holes;
// dtype and shape that do not give the number of bytes.  A dtype the library does not know (F8_E4M3, U64, ...) is
// kept: its bytes() can be had, nothing else.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/io/mapped_file.hpp>
#include <eigenblocks/io/safetensors_header.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <StorageScalar S>
inline constexpr SafetensorsDtype kSafetensorsDtypeOf =
    std::is_same_v<S, double>        ? SafetensorsDtype::f64
    : std::is_same_v<S, float>       ? SafetensorsDtype::f32
    : std::is_same_v<S, Eigen::half> ? SafetensorsDtype::f16
                                     : SafetensorsDtype::bf16;

template <StorageScalar To, StorageScalar From>
To convert_stored(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return static_cast<To>(static_cast<compute_t<To>>(static_cast<compute_t<From>>(value)));
  }
}

/// Elements of a file, at any alignment, one by one.
template <class Stored, class Take>
void for_each_stored(std::span<const std::byte> bytes, Take&& take) {
  for (std::size_t at = 0; at + sizeof(Stored) <= bytes.size(); at += sizeof(Stored)) {
    Stored value;
    std::memcpy(static_cast<void*>(&value), bytes.data() + at, sizeof(Stored));
    take(value);
  }
}

}  // namespace detail

/// A safetensors file to read from.  Moves, does not copy; views live as long as the object that gave them.
/// Functions that take a name throw data_error if the file has no such tensor.
class SafetensorsFile {
 public:
  template <StorageScalar S>
  using View = Eigen::Map<const Matrix<S>, Eigen::Unaligned>;

  /// Maps the file: no tensor is read before it is asked for.  Errors: data_error if the file is missing or damaged.
  static SafetensorsFile open(const std::string& path) {
    SafetensorsFile file;
    file.source_ = path;
    file.mapping_ = MappedFile(path);
    file.header_ = detail::read_safetensors_header(path, file.content());
    return file;
  }

  /// Reads the file into memory: for files that may be overwritten in place while they are in use.
  static SafetensorsFile load(const std::string& path) { return parse(read_file(path), path); }

  /// Takes the content of a file; `source` is what messages call it.
  static SafetensorsFile parse(std::vector<std::byte> content, std::string source) {
    SafetensorsFile file;
    file.source_ = std::move(source);
    file.memory_ = std::move(content);
    file.header_ = detail::read_safetensors_header(file.source_, file.content());
    return file;
  }

  /// In the order of their data.
  const std::vector<SafetensorsTensor>& tensors() const { return header_.tensors; }
  const SafetensorsMetadata& metadata() const { return header_.metadata; }
  bool contains(std::string_view name) const { return header_.by_name.contains(name); }

  const SafetensorsTensor& tensor(std::string_view name) const {
    const auto found = header_.by_name.find(name);
    if (found == header_.by_name.end()) {
      detail::raise<data_error>(source_, ": there is no tensor ", detail::in_quotes(name));
    }
    return header_.tensors[found->second];
  }

  /// The tensor as it lies in the file, of any dtype.
  std::span<const std::byte> bytes(std::string_view name) const& { return bytes_of(tensor(name)); }
  std::span<const std::byte> bytes(std::string_view name) const&& = delete;

  /// A copy, converted to S: shape[0] rows, the other dimensions side by side.
  /// Errors: data_error if the tensor is not F64, F32, F16 or BF16.
  template <StorageScalar S>
  Matrix<S> matrix(std::string_view name) const {
    return copied<S, Matrix<S>>(tensor(name), tensor(name).rows(), tensor(name).cols());
  }

  /// The same as a vector of size() entries, in row-major order.
  template <StorageScalar S>
  Vector<S> vector(std::string_view name) const {
    return copied<S, Vector<S>>(tensor(name), tensor(name).size(), 1);
  }

  /// Whether view<S>(name) would work: the dtype is that of S and the data is aligned for it.
  template <StorageScalar S>
  bool viewable(std::string_view name) const {
    const SafetensorsTensor& entry = tensor(name);
    return entry.dtype == detail::kSafetensorsDtypeOf<S> && aligned_for<S>(entry);
  }

  /// The tensor without a copy, shaped as matrix<S>(name).
  /// Errors: data_error if the dtype is not that of S, or the data is not aligned for S (possible in files of other
  /// writers, where a tensor of a narrow dtype precedes one of a wide dtype).
  template <StorageScalar S>
  View<S> view(std::string_view name) const& {
    const SafetensorsTensor& entry = tensor(name);
    constexpr SafetensorsDtype dtype = detail::kSafetensorsDtypeOf<S>;
    if (entry.dtype != dtype) refuse_dtype(entry, detail::safetensors_row(dtype)->name);
    if (!aligned_for<S>(entry)) {
      detail::raise<data_error>(source_, ": tensor ", detail::in_quotes(name),
                                " lies at file byte ", header_.data_start + entry.begin,
                                ", not a multiple of ", alignof(S),
                                ": a view needs that, matrix() does not");
    }
    return {reinterpret_cast<const S*>(bytes_of(entry).data()), entry.rows(), entry.cols()};
  }
  template <StorageScalar S>
  View<S> view(std::string_view name) const&& = delete;

  /// All entries in row-major order.  Errors: data_error if the tensor is not I64, I32, I16, I8, U8 or BOOL.
  std::vector<Index> integers(std::string_view name) const {
    const SafetensorsTensor& entry = tensor(name);
    std::vector<Index> result;
    const auto copy = [&]<class Stored>(Stored) {
      result.reserve(bytes_of(entry).size() / sizeof(Stored));
      detail::for_each_stored<Stored>(
          bytes_of(entry), [&](Stored value) { result.push_back(static_cast<Index>(value)); });
    };
    switch (entry.dtype) {
      case SafetensorsDtype::i64:
        copy(std::int64_t{});
        break;
      case SafetensorsDtype::i32:
        copy(std::int32_t{});
        break;
      case SafetensorsDtype::i16:
        copy(std::int16_t{});
        break;
      case SafetensorsDtype::i8:
        copy(std::int8_t{});
        break;
      case SafetensorsDtype::u8:
      case SafetensorsDtype::boolean:
        copy(std::uint8_t{});
        break;
      default:
        refuse_dtype(entry, "integers");
    }
    return result;
  }

 private:
  SafetensorsFile() = default;

  std::span<const std::byte> content() const {
    return memory_.empty() ? mapping_.bytes() : std::span<const std::byte>(memory_);
  }
  std::span<const std::byte> bytes_of(const SafetensorsTensor& entry) const {
    return content().subspan(header_.data_start + entry.begin, entry.end - entry.begin);
  }
  template <class S>
  bool aligned_for(const SafetensorsTensor& entry) const {
    return reinterpret_cast<std::uintptr_t>(bytes_of(entry).data()) % alignof(S) == 0;
  }

  template <class S, class Result>
  Result copied(const SafetensorsTensor& entry, Index rows, Index cols) const {
    switch (entry.dtype) {
      case SafetensorsDtype::f64:
        return converted<double, S, Result>(entry, rows, cols);
      case SafetensorsDtype::f32:
        return converted<float, S, Result>(entry, rows, cols);
      case SafetensorsDtype::f16:
        return converted<Eigen::half, S, Result>(entry, rows, cols);
      case SafetensorsDtype::bf16:
        return converted<Eigen::bfloat16, S, Result>(entry, rows, cols);
      default:
        refuse_dtype(entry, "floating-point numbers");
    }
  }
  template <class Stored, class S, class Result>
  Result converted(const SafetensorsTensor& entry, Index rows, Index cols) const {
    Result result(rows, cols);
    S* out = result.data();
    detail::for_each_stored<Stored>(
        bytes_of(entry), [&](Stored value) { *out++ = detail::convert_stored<S>(value); });
    return result;
  }

  [[noreturn]] void refuse_dtype(const SafetensorsTensor& entry, const char* wanted) const {
    detail::raise<data_error>(source_, ": tensor ", detail::in_quotes(entry.name), " has dtype ",
                              detail::in_quotes(entry.dtype_name), ", which cannot be read as ",
                              wanted);
  }

  std::string source_;
  MappedFile mapping_;             // open
  std::vector<std::byte> memory_;  // load, parse
  detail::SafetensorsHeader header_;
};

/// Collects tensors (copies of them) and writes a file.  The order of adding does not show: the same tensors and
/// metadata give the same bytes.  The data is sorted by element size, then by name, which aligns every tensor.
class SafetensorsWriter {
 public:
  /// Stores a matrix, a vector or an expression under its own scalar.  Without a shape a vector of n entries is stored
  /// as [n], anything else as [rows, cols].
  /// Errors: invalid_argument if the name was added before, is "__metadata__" or not UTF-8, or if the shape holds
  /// another number of entries.
  template <class M>
  requires StorageScalar<typename M::Scalar> SafetensorsWriter& add(
      const std::string& name, const Eigen::DenseBase<M>& values) {
    return add_as<typename M::Scalar>(name, values);
  }
  template <class M>
  requires StorageScalar<typename M::Scalar> SafetensorsWriter& add(
      const std::string& name, const Eigen::DenseBase<M>& values, const std::vector<Index>& shape) {
    return add_as<typename M::Scalar>(name, values, shape);
  }

  /// Stores the values rounded to another scalar: float, double, Eigen::half or Eigen::bfloat16.  Errors as for add.
  template <StorageScalar Stored, class M>
  requires StorageScalar<typename M::Scalar> SafetensorsWriter& add_as(
      const std::string& name, const Eigen::DenseBase<M>& values) {
    if constexpr (M::IsVectorAtCompileTime) {
      return add_as<Stored>(name, values, {values.size()});
    } else {
      return add_as<Stored>(name, values, {values.rows(), values.cols()});
    }
  }
  template <StorageScalar Stored, class M>
  requires StorageScalar<typename M::Scalar> SafetensorsWriter& add_as(
      const std::string& name, const Eigen::DenseBase<M>& values, const std::vector<Index>& shape) {
    const typename M::PlainObject plain = values.derived();
    Entry entry{detail::kSafetensorsDtypeOf<Stored>, shape, {}};
    entry.data.resize(static_cast<std::size_t>(plain.size()) * sizeof(Stored));
    std::byte* out = entry.data.data();
    for (Index i = 0; i < plain.rows(); ++i) {
      for (Index j = 0; j < plain.cols(); ++j) {
        const Stored value = detail::convert_stored<Stored>(plain(i, j));
        std::memcpy(out, static_cast<const void*>(&value), sizeof(Stored));
        out += sizeof(Stored);
      }
    }
    return insert(name, std::move(entry), plain.size());
  }

  /// Stores integers as I64, without a shape as [n].  Errors as for add.
  SafetensorsWriter& add_integers(const std::string& name, std::span<const Index> values) {
    return add_integers(name, values, {static_cast<Index>(values.size())});
  }
  SafetensorsWriter& add_integers(const std::string& name, std::span<const Index> values,
                                  const std::vector<Index>& shape) {
    static_assert(sizeof(Index) == 8, "I64 is copied from Index");
    const auto bytes = std::as_bytes(values);
    return insert(name, {SafetensorsDtype::i64, shape, {bytes.begin(), bytes.end()}},
                  static_cast<Index>(values.size()));
  }

  /// Sets a string of the file's metadata.  Errors: invalid_argument if key or value is not UTF-8.
  SafetensorsWriter& metadata(const std::string& key, const std::string& value) {
    json_string("metadata key", key);
    json_string("metadata value", value);
    metadata_[key] = value;
    return *this;
  }

  /// The content of the file.
  std::vector<std::byte> bytes() const {
    const std::string head = header();
    std::vector<std::byte> content;
    for (const auto part : parts(head)) content.insert(content.end(), part.begin(), part.end());
    return content;
  }

  /// Writes the file; an older one is replaced only when the new one is complete on the disk.
  /// Errors: data_error if it cannot be written.
  void write(const std::string& path) const {
    const std::string head = header();
    replace_file(path, parts(head));
  }

 private:
  struct Entry {
    SafetensorsDtype dtype;
    std::vector<Index> shape;
    std::vector<std::byte> data;
    std::size_t element_size() const { return detail::safetensors_row(dtype)->size; }
  };
  using Entries = std::map<std::string, Entry>;

  SafetensorsWriter& insert(const std::string& name, Entry entry, Index size) {
    json_string("tensor name", name);
    detail::require(name != "__metadata__", "a tensor cannot be named __metadata__");
    detail::require(!entries_.contains(name), "tensor ", detail::in_quotes(name),
                    " was added before");
    bool negative = false;
    for (const Index extent : entry.shape) negative |= extent < 0;
    const Index holds = negative ? -1 : detail::checked_size(entry.shape);
    detail::require(holds == size, "tensor ", detail::in_quotes(name), " has ", size,
                    " entries, its shape ",
                    negative    ? "has a negative dimension"
                    : holds < 0 ? "overflows"
                                : "holds " + std::to_string(holds));
    entries_.emplace(name, std::move(entry));
    return *this;
  }

  /// `text` as a JSON string.  Of two ways to write text that is not UTF-8, one replaces what is wrong and the other
  /// leaves it out: they differ exactly when something is wrong.
  static std::string json_string(const char* what, const std::string& text) {
    using Json = nlohmann::json;
    const Json json(text);
    std::string result = json.dump(-1, ' ', false, Json::error_handler_t::replace);
    detail::require(result == json.dump(-1, ' ', false, Json::error_handler_t::ignore), what, " ",
                    detail::in_quotes(result), " is not UTF-8");
    return result;
  }

  /// Wide elements first, so that each tensor begins at a multiple of its element size.
  std::vector<const Entries::value_type*> sorted() const {
    std::vector<const Entries::value_type*> order;
    for (const auto& entry : entries_) order.push_back(&entry);
    std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
      return a->second.element_size() > b->second.element_size();
    });
    return order;
  }

  /// The length and the JSON text, padded so that the data begins at a multiple of 8 bytes.
  std::string header() const {
    std::string text = "{";
    const auto separate = [&] {
      if (text.back() != '{') text += ',';
    };
    if (!metadata_.empty()) {
      text += "\"__metadata__\":{";
      for (const auto& [key, value] : metadata_) {
        separate();
        text += json_string("", key) + ":" + json_string("", value);
      }
      text += '}';
    }
    std::size_t offset = 0;
    for (const auto* named : sorted()) {
      const auto& [name, entry] = *named;
      separate();
      text += json_string("", name);
      text += detail::join_text(":{\"dtype\":\"", detail::safetensors_row(entry.dtype)->name,
                                "\",\"shape\":[");
      for (std::size_t axis = 0; axis < entry.shape.size(); ++axis) {
        text += detail::join_text(axis == 0 ? "" : ",", entry.shape[axis]);
      }
      text +=
          detail::join_text("],\"data_offsets\":[", offset, ",", offset + entry.data.size(), "]}");
      offset += entry.data.size();
    }
    text += '}';
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const std::uint64_t length = text.size();
    std::string head(sizeof(length), '\0');
    std::memcpy(head.data(), &length, sizeof(length));
    return head + text;
  }

  std::vector<std::span<const std::byte>> parts(const std::string& head) const {
    std::vector<std::span<const std::byte>> all{std::as_bytes(std::span(head))};
    for (const auto* named : sorted()) all.emplace_back(named->second.data);
    return all;
  }

  Entries entries_;
  SafetensorsMetadata metadata_;
};

EIGENBLOCKS_NAMESPACE_END
