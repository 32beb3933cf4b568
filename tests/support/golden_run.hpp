// Runs golden cases: finds them, hands them to their handlers, counts and reports.  golden.hpp says what a case is.
//
// A case is a `*.safetensors` file, or a row with an "op" of a `*.jsonl` file; files in folders named corpora and
// models are material for rows.  Each case counts once, whatever the number of forms tried on it: as
//   passed    every expectation met and nothing in the file overlooked
//   failed    anything else, an unknown op and a file that cannot be read included
//   skipped   its op belongs to a later issue; or, in the float run, the case cannot be one of float: a value beyond
//             1e15 or a non-zero one below 1e-30, a file named huge, junk or extreme, an op that is double by nature
//             (registered with its reason), a row (rows have no float form), or a handler that says so
//
// Included by the runner and by the test that shows it can fail; handlers need golden.hpp, those of rows
// golden_rows.hpp, only.
#pragma once

#include "support/golden.hpp"
#include "support/golden_rows.hpp"

#include <eigenblocks/io/safetensors.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace golden {

inline constexpr double kFloatLargest = 1e15;
inline constexpr double kFloatSmallest = 1e-30;

/// Reads a fixture.  Throws for a damaged file, a dtype other than F64 and I64, and metadata that has no meaning.
inline Fixture load_fixture(const std::string& path) {
  const auto file = eigenblocks::SafetensorsFile::open(path);
  Fixture fixture;
  std::set<std::string> missing{"op", "source", "atol", "rtol"};
  for (const auto& [key, value] : file.metadata()) {
    missing.erase(key);
    if (key == "op") {
      fixture.op = value;
    } else if (key == "atol") {
      fixture.atol = parse_number<double>(key, value);
    } else if (key == "rtol") {
      fixture.rtol = parse_number<double>(key, value);
    } else if (key.starts_with("param.")) {
      fixture.params[key.substr(6)] = value;
    } else if (key != "source") {
      throw std::runtime_error("unknown metadata " + key + " = " + value);
    }
  }
  if (!missing.empty()) throw std::runtime_error("metadata " + *missing.begin() + " is missing");
  // A tolerance that is NaN, infinite or negative would accept or refuse everything.
  for (const double tolerance : {fixture.atol, fixture.rtol}) {
    if (!(tolerance >= 0 && std::isfinite(tolerance))) {
      throw std::runtime_error("atol and rtol must be finite and not negative");
    }
  }
  for (const auto& entry : file.tensors()) {
    Tensor tensor;
    tensor.shape = entry.shape;
    tensor.integer = entry.dtype == eigenblocks::SafetensorsDtype::i64;
    if (tensor.integer) {
      tensor.integers = file.integers(entry.name);
      for (const Index value : tensor.integers) tensor.values.push_back(static_cast<double>(value));
    } else if (entry.dtype == eigenblocks::SafetensorsDtype::f64) {
      const auto values = file.vector<double>(entry.name);
      tensor.values.assign(values.data(), values.data() + values.size());
    } else {
      throw std::runtime_error("tensor " + entry.name + " is " + entry.dtype_name +
                               ", fixtures hold F64 and I64");
    }
    fixture.tensors[entry.name] = std::move(tensor);
  }
  return fixture;
}

struct Options {
  std::vector<std::filesystem::path> directories;
  bool in_float = false;
  std::set<std::string, std::less<>> only;  ///< ops; empty: all
};

struct Totals {
  int passed = 0, failed = 0, skipped = 0;
};

class Runner {
 public:
  /// `later`: ops without a handler that are not an error yet, each with the issue that brings them.
  Runner(const Registry& registry, std::map<std::string, int, std::less<>> later, Options options,
         std::function<void(const std::string&)> print, RowRegistry rows = {})
      : registry_(registry),
        rows_(std::move(rows)),
        later_(std::move(later)),
        options_(std::move(options)),
        print_(std::move(print)) {}

  /// Runs everything; prints a line for each failure, then the counts.
  Totals run() {
    for (const auto& directory : options_.directories) run_directory(directory);
    Totals all;
    for (const auto& [area, totals] : areas_) {
      print_(area + ": " + text(totals));
      all.passed += totals.passed;
      all.failed += totals.failed;
      all.skipped += totals.skipped;
    }
    for (const auto& [reason, count] : skips_) {
      print_("skipped " + std::to_string(count) + ": " + reason);
    }
    print_(text(all));
    return all;
  }

 private:
  struct Place {
    std::string area;   // the folder's name
    std::string where;  // file, or file:line
  };

  void run_directory(const std::filesystem::path& directory) {
    namespace fs = std::filesystem;
    if (!fs::is_directory(directory)) {
      return failed({directory.string(), directory.string()}, {"there is no such directory"});
    }
    std::vector<fs::path> files;
    for (auto entry = fs::recursive_directory_iterator(
             directory, fs::directory_options::follow_directory_symlink);
         entry != fs::recursive_directory_iterator(); ++entry) {
      const fs::path& path = entry->path();
      if (entry->is_directory()) {
        if (path.filename() == "corpora" || path.filename() == "models") {
          entry.disable_recursion_pending();
        }
      } else if (path.extension() == ".safetensors" || path.extension() == ".jsonl") {
        files.push_back(path);
      }
    }
    std::sort(files.begin(), files.end());
    for (const auto& path : files) {
      const Place place{fs::absolute(path).parent_path().filename().string(), path.string()};
      if (path.extension() == ".jsonl") {
        run_rows(path, place);
      } else {
        run_fixture(path, place);
      }
    }
  }

  void run_fixture(const std::filesystem::path& path, const Place& place) {
    Fixture fixture;
    try {
      fixture = load_fixture(path.string());
    } catch (const std::exception& error) {
      return failed(place, {error.what()});
    }
    if (!select(fixture.op, place)) return;
    const auto found = registry_.ops().find(fixture.op);
    if (found == registry_.ops().end()) {
      return failed(place, {"op " + fixture.op + " is an op of rows, not of files"});
    }
    const Registry::Op* op = &found->second;
    if (options_.in_float) {
      if (!op->in_float)
        return skipped(place, fixture.op + " is double by nature: " + op->double_reason);
      if (const char* reason = not_for_float(path, fixture)) return skipped(place, reason);
    }
    Record record(fixture, options_.in_float, op->compare);
    try {
      if (options_.in_float) {
        Case<float> c(record);
        op->in_float(c);
      } else {
        Case<double> c(record);
        op->in_double(c);
      }
      if (record.skip_reason().empty()) record.require_complete();
    } catch (const std::exception& error) {
      record.fail(std::string("the handler threw: ") + error.what());
    } catch (...) {
      record.fail("the handler threw something that is not a std::exception");
    }
    if (!record.failures().empty()) return failed(place, record.failures());
    if (!record.skip_reason().empty()) return skipped(place, record.skip_reason());
    ++areas_[place.area].passed;
  }

  void run_rows(const std::filesystem::path& path, const Place& file) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) return failed(file, {"cannot open the file"});
    std::string line;
    for (int number = 1; std::getline(stream, line); ++number) {
      if (line.find_first_not_of(" \t\r") == line.npos) continue;
      const Place place{file.area, file.where + ":" + std::to_string(number)};
      const auto row = nlohmann::json::parse(line, nullptr, false);
      if (row.is_discarded()) {
        failed(place, {"the row is not valid JSON"});
        continue;
      }
      if (!row.is_object() || !row.contains("op")) continue;
      if (!row["op"].is_string()) {
        failed(place, {"the row's op is not a string"});
        continue;
      }
      const auto op = row["op"].get<std::string>();
      if (!select(op, place)) continue;
      const auto found = rows_.ops().find(op);
      if (found == rows_.ops().end()) {
        failed(place, {"op " + op + " is an op of files, not of rows"});
      } else if (options_.in_float) {
        skipped(place, "rows have no float form");
      } else {
        run_row(Row(row, path.parent_path()), found->second, place);
      }
    }
  }

  void run_row(Row row, const RowRegistry::Handler& handler, const Place& place) {
    try {
      handler(row);
      row.require_complete();
    } catch (const std::exception& error) {
      row.fail(std::string("the handler threw: ") + error.what());
    } catch (...) {
      row.fail("the handler threw something that is not a std::exception");
    }
    if (!row.failures().empty()) return failed(place, row.failures());
    ++areas_[place.area].passed;
  }

  /// Whether there is a handler to run; if not, the case has been counted where it counts.
  bool select(const std::string& name, const Place& place) {
    if (!options_.only.empty() && !options_.only.contains(name)) return false;
    if (registry_.ops().contains(name) || rows_.ops().contains(name)) return true;
    const auto later = later_.find(name);
    if (later == later_.end()) {
      failed(place, {"unknown op " + name});
    } else {
      skipped(place, "ops of issue " + std::to_string(later->second));
    }
    return false;
  }

  static const char* not_for_float(const std::filesystem::path& path, const Fixture& fixture) {
    const std::string name = path.filename().string();
    for (const char* word : {"huge", "junk", "extreme"}) {
      if (name.find(word) != name.npos) return "named huge, junk or extreme";
    }
    for (const auto& [tensor_name, tensor] : fixture.tensors) {
      for (const double value : tensor.values) {
        const double size = std::abs(value);
        if (std::isfinite(value) &&
            (size > kFloatLargest || (size != 0 && size < kFloatSmallest))) {
          return "holds values beyond 1e15 or below 1e-30";
        }
      }
    }
    return nullptr;
  }

  void failed(const Place& place, const std::vector<std::string>& reasons) {
    ++areas_[place.area].failed;
    for (const auto& reason : reasons) print_("FAIL " + place.where + " " + reason);
  }

  void skipped(const Place& place, const std::string& reason) {
    ++areas_[place.area].skipped;
    ++skips_[reason];
  }

  static std::string text(const Totals& totals) {
    return std::to_string(totals.passed) + " passed, " + std::to_string(totals.failed) +
           " failed, " + std::to_string(totals.skipped) + " skipped";
  }

  const Registry& registry_;
  RowRegistry rows_;
  std::map<std::string, int, std::less<>> later_;
  Options options_;
  std::function<void(const std::string&)> print_;
  std::map<std::string, Totals> areas_;
  std::map<std::string, int> skips_;
};

}  // namespace golden
