// Reading and writing sound files; what happens to damaged ones is in safetensors_hostile_test.cpp.
#include <doctest/doctest.h>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/io/safetensors.hpp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/temporary_folder.hpp"

namespace eb = eigenblocks;
using eb::Index;

namespace {

eb::SafetensorsFile reread(const eb::SafetensorsWriter& writer) {
  return eb::SafetensorsFile::parse(writer.bytes(), "memory");
}

/// A file from its two halves, for dtypes and layouts that the writer does not make.
eb::SafetensorsFile from_text(const std::string& header, std::string_view data) {
  std::vector<std::byte> content(8 + header.size() + data.size());
  const std::uint64_t length = header.size();
  std::memcpy(content.data(), &length, 8);
  std::memcpy(content.data() + 8, header.data(), header.size());
  if (!data.empty()) std::memcpy(content.data() + 8 + header.size(), data.data(), data.size());
  return eb::SafetensorsFile::parse(std::move(content), "memory");
}

template <class S>
eb::Matrix<S> random_matrix(Index rows, Index cols) {
  eb::Random random(7);
  eb::Matrix<S> values(rows, cols);
  for (Index i = 0; i < values.size(); ++i)
    values.data()[i] = S(static_cast<float>(random.normal()));
  return values;
}

template <class A, class B>
bool same_bits(const A& a, const B& b) {
  const auto size = static_cast<std::size_t>(a.size()) * sizeof(typename A::Scalar);
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (size == 0 || std::memcmp(a.data(), b.data(), size) == 0);
}

}  // namespace

static_assert(eb::MatrixLike<eb::SafetensorsFile::View<float>>,
              "a view must do as an operand of any block");
static_assert(!std::is_copy_constructible_v<eb::SafetensorsFile>);

TEST_CASE_TEMPLATE("every floating-point dtype comes back bit by bit", S, double, float,
                   Eigen::half, Eigen::bfloat16) {
  for (const auto& [rows, cols] :
       {std::pair<Index, Index>{0, 0}, {0, 5}, {5, 0}, {1, 1}, {7, 13}}) {
    const eb::Matrix<S> values = random_matrix<S>(rows, cols);
    const eb::SafetensorsFile file = reread(eb::SafetensorsWriter().add("x", values));
    CHECK(file.tensor("x").shape == std::vector<Index>{rows, cols});
    CHECK(same_bits(file.matrix<S>("x"), values));
    CHECK(file.viewable<S>("x"));
    CHECK(same_bits(file.view<S>("x"), values));
    CHECK(file.vector<S>("x").size() == values.size());
    CHECK(file.bytes("x").size() == static_cast<std::size_t>(values.size()) * sizeof(S));
  }
}

TEST_CASE("values that are not finite, and the smallest, survive") {
  eb::Matrix<double> values(1, 6);
  values << HUGE_VAL, -HUGE_VAL, std::nan(""), -0.0, std::numeric_limits<double>::denorm_min(),
      std::numeric_limits<double>::max();
  const auto file = reread(eb::SafetensorsWriter().add("x", values));
  CHECK(same_bits(file.matrix<double>("x"), values));
}

TEST_CASE("a matrix is converted from any floating-point dtype") {
  eb::Matrix<double> values(2, 3);
  values << 1.5, -2.0, 0.25, 1.0 + 0x1p-20, 0.1, -1.0 / 3.0;
  eb::SafetensorsWriter writer;
  writer.add("f64", values).add_as<float>("f32", values);
  writer.add_as<Eigen::half>("f16", values).add_as<Eigen::bfloat16>("bf16", values);
  const auto file = reread(writer);
  CHECK(file.tensor("bf16").dtype == eb::SafetensorsDtype::bf16);
  CHECK(file.tensor("bf16").dtype_name == "BF16");
  CHECK(file.matrix<double>("f64") == values);
  CHECK(file.matrix<float>("f64") == values.cast<float>());
  CHECK(file.matrix<double>("f32") == values.cast<float>().cast<double>());
  // Half has 11 significant bits and bfloat16 has 8; rounding to nearest errs by half a unit of the last at most.
  for (Index i = 0; i < values.size(); ++i) {
    const double exact = values.data()[i];
    CHECK(std::abs(file.matrix<double>("f16").data()[i] - exact) <= 0x1p-11 * std::abs(exact));
    CHECK(std::abs(file.matrix<double>("bf16").data()[i] - exact) <= 0x1p-8 * std::abs(exact));
    CHECK(file.matrix<float>("f64").data()[i] == static_cast<float>(exact));
  }
  CHECK(file.matrix<double>("f16")(0, 0) == 1.5);
  CHECK(same_bits(file.matrix<Eigen::half>("f64"), file.matrix<Eigen::half>("f16")));
  CHECK(same_bits(file.matrix<Eigen::bfloat16>("f32"), file.matrix<Eigen::bfloat16>("bf16")));
}

TEST_CASE("integers of every dtype widen with their sign") {
  const std::string data(
      "\xff\xff\xff\xff\xff\xff\xff\xff\x02\0\0\0\xfe\xff\xff\x7f\x00\x80\x80\x7f\xff\x01", 22);
  const auto file = from_text(R"({"i64":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                              R"("i32":{"dtype":"I32","shape":[2],"data_offsets":[8,16]},)"
                              R"("i16":{"dtype":"I16","shape":[1],"data_offsets":[16,18]},)"
                              R"("i8":{"dtype":"I8","shape":[2],"data_offsets":[18,20]},)"
                              R"("u8":{"dtype":"U8","shape":[1],"data_offsets":[20,21]},)"
                              R"("bool":{"dtype":"BOOL","shape":[1],"data_offsets":[21,22]}})",
                              data);
  CHECK(file.integers("i64") == std::vector<Index>{-1});
  CHECK(file.integers("i32") == std::vector<Index>{2, 0x7ffffffe});
  CHECK(file.integers("i16") == std::vector<Index>{-32768});
  CHECK(file.integers("i8") == std::vector<Index>{-128, 127});
  CHECK(file.integers("u8") == std::vector<Index>{255});
  CHECK(file.integers("bool") == std::vector<Index>{1});
}

TEST_CASE("integers are written as I64") {
  const std::vector<Index> ids{0, -1, std::numeric_limits<Index>::max(),
                               std::numeric_limits<Index>::min()};
  eb::SafetensorsWriter writer;
  writer.add_integers("ids", ids).add_integers("square", ids, {2, 2}).add_integers("none", {});
  const auto file = reread(writer);
  CHECK(file.integers("ids") == ids);
  CHECK(file.tensor("ids").shape == std::vector<Index>{4});
  CHECK(file.integers("square") == ids);
  CHECK(file.tensor("square").shape == std::vector<Index>{2, 2});
  CHECK(file.integers("none").empty());
}

TEST_CASE("shapes: scalars, vectors, more than two dimensions") {
  const eb::Matrix<float> values = random_matrix<float>(4, 6);
  eb::SafetensorsWriter writer;
  writer.add("tensor", values, {4, 3, 2}).add("scalar", values.topLeftCorner(1, 1), {});
  writer.add("column", values.col(1))
      .add("row", values.row(2))
      .add("empty", values.topRows(0), {2, 0, 3});
  const auto file = reread(writer);
  CHECK(same_bits(file.matrix<float>("tensor"), values));
  CHECK(file.tensor("tensor").shape == std::vector<Index>{4, 3, 2});
  CHECK(file.tensor("scalar").shape.empty());
  CHECK(file.tensor("scalar").size() == 1);
  CHECK(file.matrix<float>("scalar")(0, 0) == values(0, 0));
  CHECK(file.tensor("column").shape == std::vector<Index>{4});
  CHECK(file.matrix<float>("column") == values.col(1).transpose());
  CHECK(file.vector<float>("row") == values.row(2).transpose());
  CHECK(file.matrix<float>("empty").rows() == 2);
  CHECK(file.matrix<float>("empty").cols() == 0);
}

TEST_CASE("expressions, blocks and column-major matrices are written row by row") {
  const eb::Matrix<double> values = random_matrix<double>(5, 7);
  eb::SafetensorsWriter writer;
  writer.add("column_major", Eigen::MatrixXd(values)).add("block", values.block(1, 2, 3, 4));
  writer.add("product", values * values.transpose()).add("array", values.array() * 2.0);
  const auto file = reread(writer);
  CHECK(file.matrix<double>("column_major") == values);
  CHECK(file.matrix<double>("block") == values.block(1, 2, 3, 4));
  CHECK(file.matrix<double>("product") == eb::Matrix<double>(values * values.transpose()));
  CHECK(file.matrix<double>("array") == values * 2.0);
}

TEST_CASE("names and metadata may be any UTF-8") {
  const std::string long_name(70'000, 'n');
  const std::string odd =
      std::string("quote \" backslash \\ newline \n zero \0", 36) + "\xe8\x8b\x8f";
  eb::SafetensorsWriter writer;
  writer.add("", eb::Vector<float>::Ones(1)).add(odd, eb::Vector<float>::Ones(2));
  writer.add(long_name, eb::Vector<float>::Ones(3)).metadata(odd, long_name).metadata("", "");
  const auto file = reread(writer);
  CHECK(file.tensors().size() == 3);
  CHECK(file.vector<float>("").size() == 1);
  CHECK(file.vector<float>(odd).size() == 2);
  CHECK(file.vector<float>(long_name).size() == 3);
  CHECK(file.metadata() == eb::SafetensorsMetadata{{"", ""}, {odd, long_name}});
  CHECK(file.contains(odd));
  CHECK_FALSE(file.contains("another"));
}

TEST_CASE("an empty writer makes an empty file") {
  const auto file = reread(eb::SafetensorsWriter());
  CHECK(file.tensors().empty());
  CHECK(file.metadata().empty());
}

TEST_CASE("the bytes do not depend on the order of adding, and every tensor is aligned") {
  const eb::Vector<double> wide = eb::Vector<double>::Ones(3);
  const eb::Vector<Eigen::half> narrow = eb::Vector<Eigen::half>::Ones(3);
  eb::SafetensorsWriter one, two;
  one.add("a", narrow)
      .add("b", wide)
      .add_as<float>("c", wide)
      .metadata("k", "1")
      .metadata("j", "2");
  two.metadata("j", "2").metadata("k", "0").metadata("k", "1");
  two.add_as<float>("c", wide).add("b", wide).add("a", narrow);
  CHECK(one.bytes() == two.bytes());
  const auto file = reread(one);
  REQUIRE(file.tensors().size() == 3);
  CHECK(file.tensors()[0].name == "b");
  CHECK(file.tensors()[1].name == "c");
  CHECK(file.tensors()[2].name == "a");
  std::uint64_t header_length = 0;
  std::memcpy(&header_length, one.bytes().data(), 8);
  CHECK(header_length % 8 == 0);
  CHECK(file.viewable<double>("b"));
  CHECK(file.viewable<float>("c"));
  CHECK(file.viewable<Eigen::half>("a"));
  CHECK_FALSE(file.viewable<float>("b"));
}

TEST_CASE("a file on the disk: mapped and loaded agree, views follow a moved file") {
  const TemporaryFolder folder;
  const std::string path = folder.file("model.safetensors");
  const eb::Matrix<float> values = random_matrix<float>(17, 31);
  eb::SafetensorsWriter writer;
  writer.add("x", values).metadata("step", "12").write(path);
  auto mapped = eb::SafetensorsFile::open(path);
  const auto loaded = eb::SafetensorsFile::load(path);
  const auto view = mapped.view<float>("x");
  const auto moved = std::move(mapped);
  CHECK(view.data() == moved.view<float>("x").data());
  CHECK(view == values);
  CHECK(loaded.matrix<float>("x") == values);
  CHECK(loaded.metadata() == moved.metadata());
  writer.add("y", values).write(path);  // the mapping keeps the old file
  CHECK(view == values);
  CHECK(eb::SafetensorsFile::open(path).tensors().size() == 2);
}

TEST_CASE("data at an odd address is copied correctly, and refused as a view") {
  std::string data(9, '\0');
  const double value = 1.25;
  std::memcpy(data.data() + 1, &value, 8);
  std::string header = R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                       R"("x":{"dtype":"F64","shape":[1],"data_offsets":[1,9]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const auto file = from_text(header, data);
  CHECK(file.matrix<double>("x")(0, 0) == 1.25);
  CHECK_FALSE(file.viewable<double>("x"));
  const std::string place =
      "tensor 'x' lies at file byte " + std::to_string(header.size() + 9) + ", not a multiple of 8";
  CHECK_THROWS_WITH_AS(file.view<double>("x"), doctest::Contains(place.c_str()), eb::data_error);
}

TEST_CASE("a dtype the library does not know is kept as bytes") {
  const auto file = from_text(R"({"a":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]},)"
                              R"("b":{"dtype":"F4","shape":[2],"data_offsets":[3,4]}})",
                              "\x01\x02\x03\x04");
  CHECK(file.tensor("a").dtype == eb::SafetensorsDtype::other);
  CHECK(file.tensor("a").dtype_name == "F8_E4M3");
  CHECK(file.bytes("a").size() == 3);
  CHECK(file.bytes("b")[0] == std::byte{4});
  CHECK_THROWS_WITH_AS(file.matrix<float>("a"),
                       "eigenblocks: memory: tensor 'a' has dtype 'F8_E4M3', which cannot be read "
                       "as floating-point numbers",
                       eb::data_error);
  CHECK_THROWS_AS(file.integers("a"), eb::data_error);
}

TEST_CASE("reading as the wrong kind is a data_error that names file, tensor and dtype") {
  const std::vector<Index> ids{1};
  const auto file =
      reread(eb::SafetensorsWriter().add_integers("ids", ids).add("x", eb::Vector<float>::Ones(1)));
  CHECK_THROWS_WITH_AS(file.matrix<float>("ids"),
                       "eigenblocks: memory: tensor 'ids' has dtype 'I64', which cannot be read as "
                       "floating-point numbers",
                       eb::data_error);
  CHECK_THROWS_WITH_AS(
      file.integers("x"),
      "eigenblocks: memory: tensor 'x' has dtype 'F32', which cannot be read as integers",
      eb::data_error);
  CHECK_THROWS_WITH_AS(
      file.view<double>("x"),
      "eigenblocks: memory: tensor 'x' has dtype 'F32', which cannot be read as F64",
      eb::data_error);
  CHECK_THROWS_WITH_AS(file.matrix<float>("y"), "eigenblocks: memory: there is no tensor 'y'",
                       eb::data_error);
  CHECK_THROWS_AS(file.bytes("y"), eb::data_error);
  CHECK_THROWS_AS(file.viewable<float>("y"), eb::data_error);
}

TEST_CASE("the writer refuses what no reader would take, and stays usable") {
  const eb::Vector<float> six = eb::Vector<float>::Ones(6);
  eb::SafetensorsWriter writer;
  writer.add("x", six);
  const auto before = writer.bytes();
  const auto refuses = [&](auto&& action, const char* message) {
    CHECK_THROWS_WITH_AS(action(), message, eb::invalid_argument);
    CHECK(writer.bytes() == before);
  };
  refuses([&] { writer.add("x", six); }, "eigenblocks: tensor 'x' was added before");
  refuses([&] { writer.add("__metadata__", six); },
          "eigenblocks: a tensor cannot be named __metadata__");
  refuses(
      [&] {
        writer.add("y", six, {2, 2});
      },
      "eigenblocks: tensor 'y' has 6 entries, its shape holds 4");
  refuses([&] { writer.add("y", six, {}); },
          "eigenblocks: tensor 'y' has 6 entries, its shape holds 1");
  refuses(
      [&] {
        writer.add("y", six, {-2, -3});
      },
      "eigenblocks: tensor 'y' has 6 entries, its shape has a negative dimension");
  const Index large = Index{1} << 40;
  refuses(
      [&] {
        writer.add("y", six, {large, large});
      },
      "eigenblocks: tensor 'y' has 6 entries, its shape overflows");
  refuses([&] { writer.add_integers("y", {}, {1}); },
          "eigenblocks: tensor 'y' has 0 entries, its shape holds 1");
  CHECK_THROWS_WITH_AS(writer.add("bad \xff", six), doctest::Contains("is not UTF-8"),
                       eb::invalid_argument);
  CHECK_THROWS_WITH_AS(writer.metadata("k", "\xe8\x8b"), doctest::Contains("metadata value"),
                       eb::invalid_argument);
  CHECK_THROWS_WITH_AS(writer.metadata("\x80", "v"), doctest::Contains("metadata key"),
                       eb::invalid_argument);
  CHECK(writer.bytes() == before);
  CHECK_THROWS_AS(writer.write("/no/such/folder/x.safetensors"), eb::data_error);
}

TEST_CASE("text that holds the replacement character is UTF-8") {
  const std::string replacement = "\xef\xbf\xbd";
  const auto file = reread(eb::SafetensorsWriter().metadata("k", replacement));
  CHECK(file.metadata().at("k") == replacement);
}
