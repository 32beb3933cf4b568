// What the parts of bench_paired share: the keys of a case, and what an op is.  Each paired_<family>.cpp has its table of ops;
// they are apart because compiling them together took as long as all other benchmarks.
#pragma once

#include <eigenblocks/core/parallel.hpp>

#include "support.hpp"

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace paired {

using bench::Index;
using bench::random_matrix;
namespace eb = eigenblocks;

struct Default {
  const char* key;
  Index value;
};
constexpr Default kDefaults[] = {{"B", 1},    {"H", 8},    {"HK", 0},     {"T", 512},
                                 {"TK", 0},   {"d", 64},   {"causal", 0}, {"window", 0},
                                 {"N", 4096}, {"D", 1024}, {"M", 1024},   {"K", 1024},
                                 {"L", 4096}, {"S", 16},   {"seed", 0},   {"threads", 1}};

[[noreturn]] inline void fail(const std::string& text) {
  std::fprintf(stderr, "bench_paired: %s\n", text.c_str());
  std::exit(1);
}

/// The keys of the command line over the defaults.
struct Parameters {
  std::vector<Index> values;
  std::string dtype = "fp32";

  Parameters() {
    for (const Default& d : kDefaults) values.push_back(d.value);
  }
  Index& operator[](const std::string& key) {
    for (std::size_t i = 0; i < std::size(kDefaults); ++i) {
      if (key == kDefaults[i].key) return values[i];
    }
    std::string known = "dtype";
    for (const Default& d : kDefaults) known += std::string(" ") + d.key;
    fail("unknown key " + key + "; known: " + known);
  }
  void set(const std::string& argument) {
    const std::size_t at = argument.find('=');
    if (at == std::string::npos) fail("'" + argument + "' is not key=value");
    const std::string key = argument.substr(0, at), text = argument.substr(at + 1);
    if (key == "dtype") {
      dtype = text;
      return;
    }
    char* end = nullptr;
    (*this)[key] = std::strtol(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || (*this)[key] < 0)
      fail(argument + ": expected a number >= 0");
  }
};

using Case = std::function<void()>;

using Make = Case (*)(const Parameters&, eb::ExecutorRef);
struct Op {
  const char* name;
  Make fp32, fp64, fp16 = nullptr, bf16 = nullptr;
};

std::span<const Op> attention_ops();
std::span<const Op> row_ops();
std::span<const Op> sequence_ops();

}  // namespace paired
