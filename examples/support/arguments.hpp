// Command-line options `--name value` of the examples, and what their main does.
#pragma once

#include <charconv>
#include <cstdio>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

namespace example {

/// What a program cannot go on with: main prints it as one line and exits with 1.
class usage_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Options with their defaults; reading the command line replaces values and refuses names that have no default.
class Arguments {
 public:
  explicit Arguments(std::map<std::string, std::string, std::less<>> defaults)
      : values_(std::move(defaults)) {}

  void parse(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string name = argv[i];
      const auto found = name.starts_with("--") ? values_.find(name.substr(2)) : values_.end();
      if (found == values_.end())
        throw usage_error("unknown option " + name + "; known:" + names());
      if (i + 1 == argc) throw usage_error("option " + name + " needs a value");
      found->second = argv[++i];
      given_[found->first] = true;
    }
  }

  bool given(const std::string& name) const { return given_.contains(name); }
  const std::string& text(std::string_view name) const { return values_.find(name)->second; }
  long long integer(std::string_view name, long long least) const {
    return number<long long>(name, least);
  }
  double real(std::string_view name, double least) const { return number<double>(name, least); }

 private:
  template <class T>
  T number(std::string_view name, T least) const {
    const std::string& value = text(name);
    T result{};
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
    if (error != std::errc{} || end != value.data() + value.size() || !(result >= least)) {
      throw usage_error("--" + std::string(name) + " " + value +
                        ": expected a number of at least " + std::to_string(least));
    }
    return result;
  }
  std::string names() const {
    std::string all;
    for (const auto& [name, value] : values_) all += " --" + name;
    return all;
  }

  std::map<std::string, std::string, std::less<>> values_;
  std::map<std::string, bool, std::less<>> given_;
};

/// The exit code of run(argc, argv); an exception becomes one line and 1.
inline int run_program(const char* name, int (*run)(int, char**), int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 1;
  }
}

}  // namespace example
