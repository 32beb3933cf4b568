// Golden rows: a case that is one line of a *.jsonl file, and what a handler may ask of it.
//
//   rows.add("segment", [](golden::Row& row) {
//     const std::string text = row.text("text");
//     row.expect("segments", segments(text, row.integer("maxlen")));       // exactly equal
//     row.form("by bytes");                                                // the same row against another form of the op
//     row.expect("segments", ...);
//   });
//
// A row is a JSON object with an "op".  Nothing in it may be overlooked: after the handler the case fails if a key other
// than op and source was neither asked for nor compared, or if nothing was compared.  Asking for a key that is not there,
// or for another type, throws, and so fails the case; `has` is for what is optional, and does not count as asking.
// Paths are relative to the folder of the row's file (`path`); `bytes` decodes base64.
// `want` hands out an expected value for a comparison of the handler's own, which then calls `fail`.
// Numbers: |got - want| <= atol + rtol |want|, as in golden.hpp; both from the handler.
#pragma once

#include <eigenblocks/core/types.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace golden {

using nlohmann::json;

/// Bytes of a padded base64 text, slowly; the library's own codec is not asked about itself.
inline std::string bytes_of_base64(std::string_view text) {
  constexpr std::string_view alphabet =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  unsigned bits = 0;
  int held = 0;
  for (const char c : text.substr(0, text.find('='))) {
    const auto at = alphabet.find(c);
    if (at == alphabet.npos) throw std::runtime_error("not base64: " + std::string(text));
    bits = bits << 6 | static_cast<unsigned>(at);
    held += 6;
    if (held >= 8) {
      held -= 8;
      bytes.push_back(static_cast<char>(bits >> held & 0xffu));
    }
  }
  return bytes;
}

inline std::string base64_of_bytes(std::string_view bytes) {
  constexpr char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    unsigned bits = 0;
    for (std::size_t j = i; j < i + 3; ++j) {
      bits = bits << 8 | (j < bytes.size() ? static_cast<unsigned char>(bytes[j]) : 0u);
    }
    for (std::size_t j = 0; j < 4; ++j) {
      text += i + j > bytes.size() ? '=' : alphabet[bits >> (18 - 6 * j) & 63u];
    }
  }
  return text;
}

/// The file's bytes; throws if it cannot be read.
inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot open " + path.string());
  return {std::istreambuf_iterator<char>(stream), {}};
}

class Row {
 public:
  Row(const json& row, std::filesystem::path folder) : row_(row), folder_(std::move(folder)) {}

  // Inputs ----------------------------------------------------------------------------------------
  bool has(const std::string& key) const { return row_.contains(key); }
  const json& value(const std::string& key) {
    const auto found = row_.find(key);
    if (found == row_.end()) throw std::runtime_error("key " + key + " is not in the row");
    used_.insert(key);
    return *found;
  }
  /// Any type nlohmann-json can give: get<std::vector<std::string>>("texts").
  template <class T>
  T get(const std::string& key) {
    try {
      return value(key).get<T>();
    } catch (const json::exception& error) {
      throw std::runtime_error("key " + key + ": " + error.what());
    }
  }
  std::string text(const std::string& key) { return get<std::string>(key); }
  std::string bytes(const std::string& key) { return bytes_of_base64(text(key)); }
  eigenblocks::Index integer(const std::string& key) {
    if (!value(key).is_number_integer())
      throw std::runtime_error("key " + key + " is not an integer");
    return get<eigenblocks::Index>(key);
  }
  double real(const std::string& key) { return get<double>(key); }
  bool flag(const std::string& key) { return get<bool>(key); }

  /// The row itself, for helpers that read what the handler has asked for.
  const json& object() const { return row_; }
  /// The folder of the row's file.
  const std::filesystem::path& folder() const { return folder_; }
  /// The file that the key names.
  std::filesystem::path path(const std::string& key) { return folder_ / text(key); }

  // Expected values -------------------------------------------------------------------------------
  /// An expected value, for a comparison of the handler's own.
  const json& want(const std::string& key) {
    compared_ = true;
    return value(key);
  }
  /// Exactly equal; `got` is what nlohmann-json makes of it (strings must be UTF-8).
  void expect(const std::string& key, const json& got) {
    const json& wanted = want(key);
    if (got == wanted) return;
    if (got.is_array() && wanted.is_array()) {
      const std::size_t size = std::min(got.size(), wanted.size());
      std::size_t i = 0;
      while (i < size && got[i] == wanted[i]) ++i;
      if (i < size) {
        return fail(key + "[" + std::to_string(i) + "]: got " + shown(got[i]) + ", want " +
                    shown(wanted[i]));
      }
      return fail(key + ": got " + std::to_string(got.size()) + " entries, want " +
                  std::to_string(wanted.size()));
    }
    fail(key + ": got " + shown(got) + ", want " + shown(wanted));
  }
  /// A number within atol + rtol |want|.
  void expect_near(const std::string& key, double got, double atol, double rtol) {
    near(key, got, want(key), atol, rtol);
  }
  /// As many numbers.
  void expect_near(const std::string& key, const std::vector<double>& got, double atol,
                   double rtol) {
    const json& wanted = want(key);
    if (!wanted.is_array() || wanted.size() != got.size()) {
      return fail(key + ": got " + std::to_string(got.size()) + " entries, want " +
                  std::to_string(wanted.size()));
    }
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (!near(key + "[" + std::to_string(i) + "]", got[i], wanted[i], atol, rtol)) return;
    }
  }
  /// One comparison inside a value the handler took with `want`; false (and a failure) when it is off.
  bool near(const std::string& what, double got, const json& wanted, double atol, double rtol) {
    if (wanted.is_number()) {
      const double number = wanted.get<double>();
      if (got == number || std::abs(got - number) <= atol + rtol * std::abs(number)) return true;
    }
    char text[40];
    std::snprintf(text, sizeof(text), "%.17g", got);
    fail(what + ": got " + text + ", want " + shown(wanted));
    return false;
  }

  /// Names the form that the following expectations belong to.
  void form(std::string name) { form_ = std::move(name); }
  void fail(const std::string& what) { failures_.push_back("[" + form_ + "] " + what); }

  // For the runner --------------------------------------------------------------------------------
  void require_complete() {
    form_ = "whole row";
    for (const auto& [key, value] : row_.items()) {
      if (key != "op" && key != "source" && !used_.contains(key)) fail("unknown key " + key);
    }
    if (!compared_) fail("nothing was compared");
  }
  const std::vector<std::string>& failures() const { return failures_; }

 private:
  static std::string shown(const json& value) {
    std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
    if (text.size() > 300) text = text.substr(0, 300) + "...";
    return text;
  }

  const json& row_;
  std::filesystem::path folder_;
  std::string form_ = "direct";
  bool compared_ = false;
  std::set<std::string, std::less<>> used_;
  std::vector<std::string> failures_;
};

/// The first row of this op in the folder's *.jsonl files whose `key` is `value`.
inline json find_row(const std::filesystem::path& folder, const std::string& op,
                     const std::string& key, const std::string& value) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".jsonl") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  for (const auto& path : files) {
    std::ifstream stream(path, std::ios::binary);
    for (std::string line; std::getline(stream, line);) {
      json row = json::parse(line, nullptr, false);
      if (row.is_object() && row.value("op", "") == op && row.contains(key) && row[key] == value) {
        return row;
      }
    }
  }
  throw std::runtime_error("no row of op " + op + " has " + key + " = " + value);
}

/// The ops of rows.
class RowRegistry {
 public:
  using Handler = std::function<void(Row&)>;

  void add(std::string op, Handler handler) {
    if (!ops_.emplace(op, std::move(handler)).second) {
      throw std::logic_error("two handlers for rows of op " + op);
    }
  }
  const std::map<std::string, Handler, std::less<>>& ops() const { return ops_; }

 private:
  std::map<std::string, Handler, std::less<>> ops_;
};

}  // namespace golden

void register_tokenize(golden::RowRegistry& rows);  // golden_ops/tokenize.cpp
void register_lattice(golden::RowRegistry& rows);   // golden_ops/tokenize_lattice.cpp
