// BytePiece model files: what is written, what is read, and files that mean harm.
#include <doctest/doctest.h>
#include <eigenblocks/io/base64.hpp>
#include <eigenblocks/io/bytepiece_model.hpp>

#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "support/golden_rows.hpp"
#include "support/sha256.hpp"
#include "support/temporary_folder.hpp"

namespace eb = eigenblocks;

namespace {

const std::string kModels = EIGENBLOCKS_SOURCE_DIR "/tests/golden/tokenize/models/";

eb::UnigramModel model_of(const char* json) { return eb::parse_bytepiece_model(json, "m"); }

void refused(const std::string& json, const std::string& message) {
  CAPTURE(json);
  CHECK_THROWS_WITH_AS(eb::parse_bytepiece_model(json, "m"), ("eigenblocks: m: " + message).c_str(),
                       eb::data_error);
}

}  // namespace

TEST_CASE("sha256: the standard's examples") {
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256(std::string(1000000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("base64: both ways, and one text for each byte string") {
  std::mt19937 random(1);
  std::string back;
  for (int trial = 0; trial < 500; ++trial) {
    std::string bytes(random() % 12, ' ');
    for (char& c : bytes) c = static_cast<char>(random());
    const std::string text = eb::base64_encode(bytes);
    CHECK(text == golden::base64_of_bytes(bytes));
    CHECK(golden::bytes_of_base64(text) == bytes);
    CHECK(eb::base64_decode(text, back));
    CHECK(back == bytes);
  }
  CHECK(eb::base64_encode("watch") == "d2F0Y2g=");
  for (const char* bad : {"d2F0Y2g", "d2F0Y2h=", "YR==", "Y===", "====", "=", "YQ==YQ==", "YQ=a",
                          "Y Q=", "Y-_=", "YQ==\n"})
    CHECK_FALSE(eb::base64_decode(bad, back));
}

TEST_CASE("model files: written byte for byte") {
  for (const char* name :
       {"en.500.model", "en.1000.model", "zh.1500.model", "toy_watch.model", "toy_dense.model"}) {
    const eb::UnigramModel model = eb::load_bytepiece_model(kModels + name);
    CHECK(eb::bytepiece_model_json(model) == golden::read_bytes(kModels + name));
    TemporaryFolder folder;
    eb::save_bytepiece_model(model, folder.file("m"));
    CHECK(eb::load_bytepiece_model(folder.file("m")).pieces() == model.pieces());
  }
  const auto model = eb::UnigramModel::from_counts(
      std::vector<eb::UnigramPiece>{{"\"\\\n\r\t\f\b", 5, 2.5},
                                    {std::string("\x01\x1f\x7f\0", 4), 3, 1e300},
                                    {"\xff\xe6\x98\xa5\xe6", 4, 9007199254740993.0}});
  CHECK(eb::bytepiece_model_json(model) ==
        "{\n    \"AR9/AA==\": [\n        3,\n        \"\\u0001\\u001f\x7f\\u0000\",\n        "
        "1e+300\n    ],\n"
        "    \"/+aYpeY=\": [\n        4,\n        \"\xe6\x98\xa5\",\n        9007199254740992\n    "
        "],\n"
        "    \"IlwKDQkMCA==\": [\n        5,\n        \"\\\"\\\\\\n\\r\\t\\f\\b\",\n        2.5\n  "
        "  ]\n}");
  CHECK(model_of(eb::bytepiece_model_json(model).c_str()).pieces() == model.pieces());
}

TEST_CASE("model files: any layout is read") {
  const std::vector<eb::UnigramPiece> want{{"a", 3, 5}, {"bc", 7, 2.5}};
  CHECK(model_of(R"({"YQ==":[3,5],"YmM=":[7,"x",null,true,[1,{"k":[2]}],{},2.5]})").pieces() ==
        want);
  CHECK(model_of("\xef\xbb\xbf \n{ \"YmM=\" : [ 7 ,\"\\u0000\", 25e-1 ] ,\n\"YQ\\u003d=\" : [3, "
                 "\"\", 5.0 ] } \n")
            .pieces() == want);
  CHECK_FALSE(model_of(R"({"YQ==":[3,5]})").covers_all_bytes());
}

TEST_CASE("model files: damage is found, with its place") {
  refused("",
          "line 1, byte 0: not valid JSON: [json.exception.parse_error.101] parse error at line 1, "
          "column 1: "
          "syntax error while parsing value - unexpected end of input; expected '[', '{', or a "
          "literal");
  refused("[]", "line 1, byte 1: expected one object, of pieces");
  refused("7", "line 1, byte 1: expected one object, of pieces");
  refused("\"YQ==\"", "line 1, byte 6: expected one object, of pieces");
  refused("{}", "the model has no pieces");
  refused("{\n\"YR==\":[3,1]}", "line 2, byte 8: key \"YR==\" is not base64");
  refused(R"({"":[3,1]})", "line 1, byte 3: key \"\" is an empty piece");
  refused(R"({"YQ==":[3,1],"YQ==":[4,1]})",
          "line 1, byte 20: key \"YQ==\" is a piece that occurs twice");
  refused(R"({"YQ==":[3,1],"Yg==":[3,1]})",
          "line 1, byte 24: key \"Yg==\" has id 3, which occurs twice");
  refused(R"({"YQ==":[2,1]})", "line 1, byte 11: key \"YQ==\" has id 2, must be in [3, 2^31)");
  refused(R"({"YQ==":[-3,1]})", "line 1, byte 12: key \"YQ==\" has id -3, must be in [3, 2^31)");
  refused(R"({"YQ==":[2147483648,1]})",
          "line 1, byte 20: key \"YQ==\" has id 2147483648, must be in [3, 2^31)");
  refused(R"({"YQ==":[3.0,1]})",
          "line 1, byte 13: key \"YQ==\" has id 3.0, must be an integer in [3, 2^31)");
  refused(R"({"YQ==":["3",1]})", "line 1, byte 12: key \"YQ==\" has an id that is not a number");
  refused(R"({"YQ==":[[3],1]})", "line 1, byte 10: key \"YQ==\" has an id that is not a number");
  refused(R"({"YQ==":[3]})",
          "line 1, byte 11: key \"YQ==\" has an array of 1 elements, expected [id, ..., count]");
  refused(R"({"YQ==":[]})",
          "line 1, byte 10: key \"YQ==\" has an array of 0 elements, expected [id, ..., count]");
  refused(R"({"YQ==":[3,"a","5"]})",
          "line 1, byte 19: key \"YQ==\" has a count that is not a number");
  refused(R"({"YQ==":[3,5,[5]]})",
          "line 1, byte 17: key \"YQ==\" has a count that is not a number");
  refused(R"({"YQ==":[3,0]})",
          "line 1, byte 13: key \"YQ==\" has count 0, must be positive and finite");
  refused(R"({"YQ==":[3,-1.5]})",
          "line 1, byte 16: key \"YQ==\" has count -1.5, must be positive and finite");
  refused(R"({"YQ==":[3,1e308],"Yg==":[4,1e308]})",
          "line 1, byte 34: key \"Yg==\" makes the sum of all counts infinite");
  refused(R"({"YQ==":5})",
          "line 1, byte 10: key \"YQ==\" is followed by a single value, expected an array");
  refused(R"({"YQ==":{"id":3}})",
          "line 1, byte 9: key \"YQ==\" is followed by an object, expected an array");
  refused(std::string("{\"YQ==\":[3,1]}\0", 15), "byte 14: a zero byte");
  for (const char* bad :
       {R"({"YQ==":[3,1]} x)", R"({"YQ==":[3,1])", R"({"YQ==":[3,1],})", R"({"YQ==":[3,1e999]})",
        "{\"YQ==\":[3,\"\xff\",1]}", R"({"YQ==":[3,"\ud800",1]})", R"({"YQ==":[03,1]})",
        R"({'YQ==':[3,1]})", R"({"YQ==":[3,NaN]})"}) {
    CAPTURE(bad);
    CHECK_THROWS_AS(model_of(bad), eb::data_error);
  }
  CHECK_THROWS_AS(model_of(("{\"YQ==\":[3," + std::string(100000, '[')).c_str()), eb::data_error);
  CHECK_THROWS_AS(eb::load_bytepiece_model("/nonexistent/en.model"), eb::data_error);
}

TEST_CASE("model files: mutations of a sound one are read or refused, nothing else") {
  const std::string sound = golden::read_bytes(kModels + "toy_watch.model");
  std::mt19937 random(9);
  int read = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    std::string file = sound;
    for (std::size_t n = 1 + random() % 3; n > 0; --n) {
      const std::size_t at = random() % file.size();
      switch (random() % 4) {
        case 0:
          file[at] = static_cast<char>(random());
          break;
        case 1:
          file.erase(at, 1 + random() % 9);
          break;
        case 2:
          file.insert(at, file.substr(random() % file.size(), random() % 9));
          break;
        default:
          file[at] = "[]{},:\"0-e"[random() % 10];
      }
      if (file.empty()) file = "{";
    }
    try {
      const eb::UnigramModel model = eb::parse_bytepiece_model(file, "m");
      read += eb::parse_bytepiece_model(eb::bytepiece_model_json(model), "again").pieces() ==
              model.pieces();
    } catch (const eb::data_error&) {
      continue;
    }
  }
  CHECK(read > 100);
}

TEST_CASE("model files: one vocabulary to the path, several to PATH.SIZE") {
  const std::vector<std::string> texts{"watching the watch watching the watch"};
  TemporaryFolder folder;
  eb::BytePieceTrainerOptions options{.max_vocab_size = {262, 300}, .normalizer = eb::nfc};
  const auto names =
      eb::save_bytepiece_models(eb::train_bytepiece(texts, options), folder.file("m"));
  CHECK(names == std::vector<std::string>{folder.file("m.300"), folder.file("m.262")});
  options.max_vocab_size = {300};
  const auto one = eb::save_bytepiece_models(eb::train_bytepiece(texts, options), folder.file("m"));
  CHECK(one == std::vector<std::string>{folder.file("m")});
  CHECK(golden::read_bytes(folder.file("m")) == golden::read_bytes(folder.file("m.300")));
  CHECK(eb::load_bytepiece(folder.file("m"))
            .decode(eb::load_bytepiece(folder.file("m")).encode("watch e\u0301")) ==
        "watch \u00e9");
}
