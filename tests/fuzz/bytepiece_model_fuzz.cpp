// libFuzzer target for the reader of BytePiece models, and for the tokenizer on what it accepts.
//
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Iinclude -isystem /usr/include/eigen3
//           tests/fuzz/bytepiece_model_fuzz.cpp -lutf8proc -o bytepiece_model_fuzz
//   mkdir corpus && cp tests/golden/tokenize/models/toy_watch.model corpus
//   ./bytepiece_model_fuzz -dict=tests/fuzz/bytepiece_model.dict -max_len=4096 -max_total_time=600 corpus
//
// An accepted model must be written and read back the same, and encode and decode any text: here the file itself.
#include <eigenblocks/io/bytepiece_model.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace eb = eigenblocks;
  const std::string_view file(reinterpret_cast<const char*>(data), size);
  try {
    const eb::BytePiece tokenizer(eb::parse_bytepiece_model(file, "fuzz"), eb::nfc,
                                  eb::InvalidUtf8::passthrough);
    const std::string written = eb::bytepiece_model_json(tokenizer.model());
    if (eb::parse_bytepiece_model(written, "written").pieces() != tokenizer.model().pieces())
      std::abort();
    for (const auto& piece : tokenizer.model().pieces()) {
      if (tokenizer.decode_bytes(tokenizer.encode_bytes(piece.bytes)) != piece.bytes) std::abort();
    }
    const auto ids = tokenizer.encode(file);
    if (eb::utf8_error(file) != eb::kUtf8Valid && tokenizer.decode_bytes(ids) != file) std::abort();
  } catch (const eb::data_error&) {
  }
  return 0;
}
