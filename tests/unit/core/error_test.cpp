#include <eigenblocks/core/error.hpp>

#include <doctest/doctest.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace {

using namespace eigenblocks;

enum class Colour { red = 3 };

// Callers who know nothing of eigenblocks catch the standard classes.
static_assert(std::is_base_of_v<std::invalid_argument, eigenblocks::invalid_argument>);
static_assert(std::is_base_of_v<std::runtime_error, data_error>);

}  // namespace

TEST_CASE("messages join text, numbers, flags and enumerators") {
  CHECK(detail::join_text() == "");
  CHECK(detail::join_text("a", std::string("b"), std::string_view("c"), 'd' - 'a') == "abc3");
  CHECK(detail::join_text(true, ' ', false) == "true32false");  // a char is a number
  CHECK(detail::join_text(1.5, " ", 0.1f, " ", -1e300) == "1.5 0.100000001 -1e+300");
  CHECK(detail::join_text(Colour::red, " ", Eigen::Index{-7}, " ", 18446744073709551615ull) ==
        "3 -7 18446744073709551615");
}

TEST_CASE("require throws invalid_argument with the joined message, and only when it fails") {
  CHECK_NOTHROW(detail::require(true, "never read"));
  CHECK_THROWS_WITH_AS(detail::require(false, "kv_heads (", 5, ") must divide heads (", 12, ")"),
                       "eigenblocks: kv_heads (5) must divide heads (12)",
                       eigenblocks::invalid_argument);
  CHECK_THROWS_AS(detail::require(false, "x"), std::invalid_argument);
}

TEST_CASE("raise throws the asked type") {
  CHECK_THROWS_WITH_AS(detail::raise<std::length_error>("full at ", 3), "eigenblocks: full at 3",
                       std::length_error);
  CHECK_THROWS_WITH_AS(detail::raise<data_error>("w.bin:12"), "eigenblocks: w.bin:12",
                       std::runtime_error);
}

TEST_CASE("require_index accepts [0, size)") {
  CHECK_NOTHROW(detail::require_index("id", 0, 3));
  CHECK_NOTHROW(detail::require_index("id", 2, 3));
  CHECK_THROWS_WITH_AS(detail::require_index("id", 3, 3), "eigenblocks: id (3) is outside [0, 3)",
                       std::out_of_range);
  CHECK_THROWS_WITH_AS(detail::require_index("id", -1, 3), "eigenblocks: id (-1) is outside [0, 3)",
                       std::out_of_range);
  CHECK_THROWS_WITH_AS(detail::require_index("id", 0, 0), "eigenblocks: id (0) is outside [0, 0)",
                       std::out_of_range);
}

TEST_CASE("require_shape and require_size name both sides") {
  CHECK_NOTHROW(detail::require_shape("key", 2, 3, 2, 3, "unused"));
  CHECK_THROWS_WITH_AS(detail::require_shape("key", 2, 3, 4, 3, "rows = tokens"),
                       "eigenblocks: key is 2 x 3, expected 4 x 3 (rows = tokens)",
                       eigenblocks::invalid_argument);
  CHECK_THROWS_WITH_AS(detail::require_shape("key", 4, 2, 4, 3, "rows = tokens"),
                       "eigenblocks: key is 4 x 2, expected 4 x 3 (rows = tokens)",
                       eigenblocks::invalid_argument);
  CHECK_NOTHROW(detail::require_size("sinks", 2, 2, "unused"));
  CHECK_THROWS_WITH_AS(detail::require_size("sinks", 2, 3, "one per head"),
                       "eigenblocks: sinks has 2 entries, expected 3 (one per head)",
                       eigenblocks::invalid_argument);
}
