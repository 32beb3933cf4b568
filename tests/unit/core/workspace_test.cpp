#include <eigenblocks/core/workspace.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace {

using namespace eigenblocks;

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; }

}  // namespace

TEST_CASE("padded_bytes rounds up to whole cache lines") {
  static_assert(detail::padded_bytes<float>(0) == 0);
  static_assert(detail::padded_bytes<float>(1) == 64 && detail::padded_bytes<float>(16) == 64);
  static_assert(detail::padded_bytes<float>(17) == 128 && detail::padded_bytes<double>(9) == 128);
  static_assert(detail::padded_bytes<char>(65) == 128);
  CHECK(detail::padded_bytes<double>(8) == 64);
}

TEST_CASE("an arena hands out aligned, disjoint pieces that fill what was asked for") {
  Workspace workspace;
  const std::size_t bytes = detail::padded_bytes<float>(7) + detail::padded_bytes<double>(0) +
                            detail::padded_bytes<double>(9) + detail::padded_bytes<char>(1);
  detail::Arena arena = workspace.shared(bytes);
  float* const a = arena.take<float>(7);
  double* const none = arena.take<double>(0);
  double* const b = arena.take<double>(9);
  char* const c = arena.take<char>(1);
  for (const void* p : {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c)}) {
    CHECK(aligned(p));
  }
  CHECK(static_cast<void*>(none) == static_cast<void*>(b));
  CHECK(reinterpret_cast<char*>(b) - reinterpret_cast<char*>(a) == 64);
  CHECK(c - reinterpret_cast<char*>(b) == 128);
  for (int i = 0; i < 7; ++i) a[i] = 1.0f;  // the sanitizer build checks the bounds
  for (int i = 0; i < 9; ++i) b[i] = 2.0;
  *c = 3;
  CHECK(a[6] == 1.0f);
}

TEST_CASE("the same sizes again allocate nothing, larger ones grow, none shrink") {
  Workspace workspace;
  workspace.prepare(2);
  const auto address = [&](int worker, std::size_t bytes) {
    return static_cast<void*>(workspace.arena(worker, bytes).take<char>(0));
  };
  void* const first = address(1, 1000);
  CHECK(workspace.bytes() == 1000);
  CHECK(address(1, 1000) == first);
  CHECK(address(1, 10) == first);
  CHECK(workspace.bytes() == 1000);
  void* const other = address(0, 64);
  CHECK(other != first);
  CHECK(workspace.bytes() == 1064);
  workspace.prepare(1);  // fewer workers keep what is there
  CHECK(address(1, 1000) == first);
  workspace.prepare(5);  // more workers keep it too
  CHECK(address(1, 1000) == first);
  CHECK(aligned(address(4, 100)));
  address(1, 2000);
  CHECK(workspace.bytes() == 2000 + 64 + 100);
}

TEST_CASE("copies are empty and do not share; moves take the memory along") {
  Workspace workspace;
  workspace.prepare(1);
  void* const memory = workspace.arena(0, 640).take<char>(0);
  workspace.shared(64);
  const Workspace copy = workspace;
  CHECK(copy.bytes() == 0);
  CHECK(workspace.bytes() == 704);

  Workspace assigned;
  assigned.prepare(1);
  assigned.arena(0, 128);
  assigned = workspace;  // scratch is no part of the value: each side keeps its own
  CHECK(assigned.bytes() == 128);
  CHECK(workspace.bytes() == 704);

  Workspace moved = std::move(workspace);
  CHECK(moved.bytes() == 704);
  CHECK(static_cast<void*>(moved.arena(0, 640).take<char>(0)) == memory);
}
