#include <doctest/doctest.h>
#include <eigenblocks/io/mapped_file.hpp>

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/temporary_folder.hpp"

namespace eb = eigenblocks;
namespace fs = std::filesystem;

namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string text_of_file(const std::string& path) { return text_of(eb::read_file(path)); }

}  // namespace

static_assert(std::is_nothrow_move_constructible_v<eb::MappedFile>);
static_assert(std::is_nothrow_move_assignable_v<eb::MappedFile>);
static_assert(!std::is_copy_constructible_v<eb::MappedFile>);

TEST_CASE("a mapped file, a read file and what was written are the same bytes") {
  const TemporaryFolder folder;
  const std::string path = folder.file("data");
  for (const std::size_t size : {0u, 1u, 4095u, 4096u, 4097u, 100'003u}) {
    std::string text(size, '\0');
    for (std::size_t i = 0; i < size; ++i) text[i] = static_cast<char>(i * 131 + i / 256);
    eb::replace_file(path, {bytes_of(text)});
    const eb::MappedFile mapped(path);
    CHECK(text_of(mapped.bytes()) == text);
    CHECK(text_of_file(path) == text);
  }
}

TEST_CASE("a mapping moves and leaves nothing behind") {
  const TemporaryFolder folder;
  eb::replace_file(folder.file("a"), {bytes_of("first")});
  eb::replace_file(folder.file("b"), {bytes_of("second")});
  eb::MappedFile a(folder.file("a"));
  const auto* address = a.bytes().data();
  eb::MappedFile moved(std::move(a));
  CHECK(moved.bytes().data() == address);
  CHECK(
      a.bytes()
          .empty());  // NOLINT(bugprone-use-after-move): the state after a move is part of the contract
  moved = eb::MappedFile(folder.file("b"));
  CHECK(text_of(moved.bytes()) == "second");
  auto& same = moved;
  moved = std::move(same);
  CHECK(text_of(moved.bytes()) == "second");
  CHECK(eb::MappedFile().bytes().empty());
}

TEST_CASE("a mapping outlives the name of the file") {
  const TemporaryFolder folder;
  const std::string path = folder.file("data");
  eb::replace_file(path, {bytes_of("old content")});
  const eb::MappedFile mapped(path);
  eb::replace_file(path, {bytes_of("new")});
  CHECK(text_of(mapped.bytes()) == "old content");
  CHECK(text_of_file(path) == "new");
  fs::remove(path);
  CHECK(text_of(mapped.bytes()) == "old content");
}

TEST_CASE("replace_file joins its parts and leaves no temporary file") {
  const TemporaryFolder folder;
  const std::string path = folder.file("data");
  eb::replace_file(path, {bytes_of("one "), {}, bytes_of("two")});
  CHECK(text_of_file(path) == "one two");
  eb::replace_file(path, {});
  CHECK(text_of_file(path).empty());
  CHECK(std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()) == 1);
}

TEST_CASE("replace_file leaves the old file alone when it fails") {
  const TemporaryFolder folder;
  const std::string path = folder.file("data");
  fs::create_directories(path + "/occupied");  // a folder that is not empty cannot be renamed over
  CHECK_THROWS_WITH_AS(eb::replace_file(path, {bytes_of("x")}), doctest::Contains("cannot write"),
                       eb::data_error);
  CHECK(fs::is_directory(path + "/occupied"));
  CHECK(std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()) == 1);
}

TEST_CASE("threads that replace one file leave one of their contents") {
  const TemporaryFolder folder;
  const std::string path = folder.file("data");
  std::vector<std::thread> threads;
  for (char letter = 'a'; letter < 'e'; ++letter) {
    threads.emplace_back([&, letter] {
      const std::string text(10'000, letter);
      for (int i = 0; i < 10; ++i) eb::replace_file(path, {bytes_of(text)});
    });
  }
  for (auto& thread : threads) thread.join();
  const std::string left = text_of_file(path);
  REQUIRE(left.size() == 10'000);
  CHECK(std::count(left.begin(), left.end(), left[0]) == 10'000);
  CHECK(std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()) == 1);
}

TEST_CASE("what cannot be read is a data_error with the path and the reason") {
  const TemporaryFolder folder;
  const std::string missing = folder.file("missing");
  const std::string pipe = folder.file("pipe");
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  const auto refuses = [](const std::string& path, const std::string& message) {
    CHECK_THROWS_WITH_AS(eb::MappedFile{path}, doctest::Contains(message.c_str()), eb::data_error);
    CHECK_THROWS_WITH_AS(eb::read_file(path), doctest::Contains(message.c_str()), eb::data_error);
  };
  refuses(missing, "cannot open '" + missing + "': No such file or directory");
  refuses(folder.path().string(), "cannot read '" + folder.path().string() + "': Is a directory");
  refuses(pipe, "cannot read '" + pipe + "': Invalid argument");
  CHECK_THROWS_WITH_AS(eb::replace_file(folder.file("no/such"), {}),
                       doctest::Contains("No such file or directory"), eb::data_error);
}
