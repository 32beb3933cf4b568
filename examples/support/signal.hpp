// Signals from files: one channel of a WAV file or one column of a table.  Errors name the file and the place in it.
//
//   const Signal s = read_signal("speech.wav", "");         // first channel
//   const Signal s = read_signal("cycles.csv", "activity"); // a column by name, or by number from 1; "" is the last
//
// WAV: RIFF, PCM of 8, 16, 24 or 32 bits or IEEE float of 32 or 64, any number of channels (column: its number from 1).
// Tables: one sample a line, fields separated by commas, semicolons or tabs, else by blanks; '#' starts a comment line; the
// first line may name the columns.  Every sample must be a finite number.
#pragma once

#include "arguments.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

namespace example {

struct Signal {
  std::vector<double> values;
  std::string name;               ///< of the column, or "channel 1"
  double samples_per_second = 0;  ///< 0: a table does not say
};

namespace signal_detail {

[[noreturn]] inline void fail(const std::string& path, const std::string& place,
                              const std::string& what) {
  throw usage_error(path + ", " + place + ": " + what);
}

/// The number of a column, or 0 if the text is not one.
inline std::size_t column_number(std::string_view text) {
  std::size_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc{} && end == text.data() + text.size() ? number : 0;
}

// ---- WAV ----------------------------------------------------------------------------------------

class WavReader {
 public:
  WavReader(const std::string& path, const std::string& bytes) : path_(path), bytes_(bytes) {}

  Signal read(const std::string& column) {
    if (bytes_.size() < 12 || bytes_.compare(8, 4, "WAVE") != 0)
      fail(path_, "byte 8", "a RIFF file that is not WAVE");
    std::size_t at = 12;
    bool has_format = false;
    while (at + 8 <= bytes_.size()) {
      const std::string id = bytes_.substr(at, 4);
      const std::size_t size = word(at + 4, 4), body = at + 8;
      if (id == "fmt ") {
        read_format(body, size);
        has_format = true;
      } else if (id == "data") {
        if (!has_format) fail(path_, place(at), "samples before their format");
        // Recorders that were cut off leave 0 or a size beyond the end: take what is there.
        const std::size_t rest = bytes_.size() - body;
        return read_samples(body, size == 0 || size > rest ? rest : size, column);
      }
      if (size > bytes_.size() - body) break;
      at = body + size + size % 2;
    }
    fail(path_, place(std::min(at, bytes_.size())), "the file ends without samples");
  }

 private:
  static std::string place(std::size_t at) { return "byte " + std::to_string(at); }

  /// A little-endian number of `count` bytes.
  std::size_t word(std::size_t at, std::size_t count) const {
    std::size_t value = 0;
    for (std::size_t i = count; i-- > 0;)
      value = value * 256 + static_cast<unsigned char>(bytes_[at + i]);
    return value;
  }

  void read_format(std::size_t at, std::size_t size) {
    if (size < 16 || size > bytes_.size() - at) fail(path_, place(at), "the format is cut off");
    kind_ = word(at, 2);
    channels_ = word(at + 2, 2);
    rate_ = static_cast<double>(word(at + 4, 4));
    bits_ = word(at + 14, 2);
    if (kind_ == 0xFFFE && size >= 26) kind_ = word(at + 24, 2);  // extensible: the true one
    const bool pcm = kind_ == 1 && (bits_ == 8 || bits_ == 16 || bits_ == 24 || bits_ == 32);
    const bool real = kind_ == 3 && (bits_ == 32 || bits_ == 64);
    if (!pcm && !real) {
      fail(path_, place(at),
           "format " + std::to_string(kind_) + " with " + std::to_string(bits_) +
               " bits; known are PCM (1) of 8, 16, 24, 32 and float (3) of 32, 64");
    }
    if (channels_ == 0) fail(path_, place(at + 2), "a file of 0 channels");
  }

  Signal read_samples(std::size_t at, std::size_t size, const std::string& column) const {
    const std::size_t channel = column.empty() ? 1 : column_number(column);
    if (channel == 0 || channel > channels_) {
      throw usage_error(path_ + ": there is no channel " + column + ", the file has " +
                        std::to_string(channels_));
    }
    const std::size_t width = bits_ / 8, frame = width * channels_;
    Signal signal{{}, "channel " + std::to_string(channel), rate_};
    for (std::size_t i = 0; i < size / frame; ++i) {
      const std::size_t from = at + i * frame + (channel - 1) * width;
      const double value = sample(from);
      if (!std::isfinite(value)) fail(path_, place(from), "a sample that is not finite");
      signal.values.push_back(value);
    }
    return signal;
  }

  double sample(std::size_t at) const {
    const std::uint64_t raw = word(at, bits_ / 8);
    if (kind_ == 3) {
      if (bits_ == 64) {
        double value = 0;
        std::memcpy(&value, &raw, sizeof(value));
        return value;
      }
      const auto low = static_cast<std::uint32_t>(raw);
      float value = 0;
      std::memcpy(&value, &low, sizeof(value));
      return static_cast<double>(value);
    }
    const double half = std::ldexp(1.0, static_cast<int>(bits_) - 1);
    const double value = static_cast<double>(raw);
    if (bits_ == 8) return value / half - 1;  // the only unsigned one
    return (value >= half ? value - 2 * half : value) / half;
  }

  const std::string& path_;
  const std::string& bytes_;
  std::size_t kind_ = 0, channels_ = 0, bits_ = 0;
  double rate_ = 0;
};

// ---- Tables -------------------------------------------------------------------------------------

inline std::string_view trimmed(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t' || text.back() == '\r'))
    text.remove_suffix(1);
  if (text.size() >= 2 && text.front() == '"' && text.back() == '"')
    text = text.substr(1, text.size() - 2);
  return text;
}

/// A line cut at commas, else semicolons, else tabs, else runs of blanks.
inline std::vector<std::string_view> fields(std::string_view line) {
  std::vector<std::string_view> all;
  char separator = ' ';
  for (const char candidate : {',', ';', '\t'}) {
    if (line.find(candidate) != line.npos) {
      separator = candidate;
      break;
    }
  }
  while (true) {
    const std::size_t end = line.find(separator);
    const std::string_view field = trimmed(line.substr(0, end));
    if (separator != ' ' || !field.empty()) all.push_back(field);
    if (end == line.npos) return all;
    line.remove_prefix(end + 1);
  }
}

inline bool read_number(std::string_view text, double& value) {
  if (!text.empty() && text.front() == '+') text.remove_prefix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size();
}

inline Signal read_table(const std::string& path, std::string_view text,
                         const std::string& column) {
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  Signal signal;
  std::size_t at = 0;  // of the column, from 0
  bool first = true;
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::size_t end = text.find('\n');
    const std::string_view line = trimmed(text.substr(0, end));
    text.remove_prefix(end == text.npos ? text.size() : end + 1);
    if (line.empty() || line.front() == '#') continue;
    const std::string place = "line " + std::to_string(number);
    const auto row = fields(line);
    double value = 0;
    if (first) {
      first = false;
      const auto named = std::find(row.begin(), row.end(), column);
      const bool header = std::none_of(row.begin(), row.end(),
                                       [&](std::string_view f) { return read_number(f, value); });
      if (column.empty()) {
        at = row.size() - 1;
      } else if (header && named != row.end()) {
        at = static_cast<std::size_t>(named - row.begin());
      } else if (column_number(column) != 0) {
        at = column_number(column) - 1;
      } else {
        fail(path, place, "there is no column '" + column + "'");
      }
      signal.name =
          header && at < row.size() ? std::string(row[at]) : "column " + std::to_string(at + 1);
      if (header) continue;
    }
    if (at >= row.size()) {
      fail(path, place,
           "there are " + std::to_string(row.size()) + " fields, column " + std::to_string(at + 1) +
               " is wanted");
    }
    if (!read_number(row[at], value) || !std::isfinite(value)) {
      fail(path, place,
           "field " + std::to_string(at + 1) + " ('" + std::string(row[at]) +
               "') is not a finite number");
    }
    signal.values.push_back(value);
  }
  return signal;
}

}  // namespace signal_detail

/// The samples of one channel or column; at least two of them.
inline Signal read_signal(const std::string& path, const std::string& column) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw usage_error("cannot open " + path);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad() || bytes.empty()) throw usage_error(path + " is empty or cannot be read");
  Signal signal = bytes.starts_with("RIFF") ? signal_detail::WavReader(path, bytes).read(column)
                                            : signal_detail::read_table(path, bytes, column);
  if (signal.values.size() < 2)
    throw usage_error(path + " holds " + std::to_string(signal.values.size()) +
                      " samples, at least 2 are needed");
  return signal;
}

}  // namespace example
