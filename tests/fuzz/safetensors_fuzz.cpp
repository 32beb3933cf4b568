// libFuzzer target for the safetensors reader.
//
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Iinclude -Itests -isystem /usr/include/eigen3
//           tests/fuzz/safetensors_fuzz.cpp -o safetensors_fuzz
//   mkdir corpus && cp tests/golden/optim_structured/*bigram*.safetensors corpus
//   ./safetensors_fuzz -dict=tests/fuzz/safetensors.dict -max_len=2048 -max_total_time=600 corpus
#include "fuzz/visit_safetensors.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::byte> content(size);
  if (size != 0) std::memcpy(content.data(), data, size);
  try {
    visit(eigenblocks::SafetensorsFile::parse(std::move(content), "fuzz"));
  } catch (const eigenblocks::data_error&) {
  }
  return 0;
}
