// Reads everything a safetensors file offers, in every way there is.  Shared by the fuzzer and the mutation test: with
// a sanitizer watching, a file that is accepted must also be safe to use.
#pragma once

#include <eigenblocks/io/safetensors.hpp>

#include <cstddef>
#include <string>

/// The number of tensors that could be read as anything but bytes.  data_error is the only exception it expects.
inline int visit(const eigenblocks::SafetensorsFile& file) {
  using eigenblocks::Index;
  // A sum keeps the reads from being optimised away, and integers are free of NaN.
  std::size_t sum = 0;
  int readable = 0;
  const auto attempt = [&](auto&& read) {
    try {
      read();
      return true;
    } catch (const eigenblocks::data_error&) {
      return false;
    }
  };
  for (const auto& [key, value] : file.metadata()) sum += key.size() + value.size();
  for (const auto& entry : file.tensors()) {
    const std::string& name = entry.name;
    for (const std::byte byte : file.bytes(name)) sum += static_cast<std::size_t>(byte);
    const auto add = [&](const auto& values) {
      for (Index i = 0; i < values.size(); ++i) sum += values.data()[i] == values.data()[i];
    };
    const bool real = attempt([&] { add(file.matrix<double>(name)); });
    attempt([&] { add(file.matrix<float>(name)); });
    attempt([&] { add(file.vector<Eigen::half>(name)); });
    attempt([&] { add(file.vector<Eigen::bfloat16>(name)); });
    attempt([&] { add(file.view<double>(name)); });
    attempt([&] { add(file.view<float>(name)); });
    attempt([&] { add(file.view<Eigen::half>(name)); });
    attempt([&] { add(file.view<Eigen::bfloat16>(name)); });
    const bool integer = attempt([&] {
      for (const Index value : file.integers(name)) sum += static_cast<std::size_t>(value);
    });
    readable += real || integer;
  }
  [[maybe_unused]] static volatile std::size_t sink = 0;
  sink = sum;
  return readable;
}
