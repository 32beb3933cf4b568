// Errors: four kinds, one cold thrower, messages that name the argument and print both sides.
//
//   invalid_argument    a shape, an option or a combination of them   (is a std::invalid_argument)
//   std::out_of_range   an id, a target or a cache position outside its range
//   std::length_error   a full cache of fixed capacity
//   data_error          a file or model that does not hold what it should   (is a std::runtime_error)
//   std::domain_error   a numerical failure a caller cannot foresee (singular block), where a header says so
//
// Checks run before anything is written.  The message is only put together on failure:
//
//   detail::require(heads % kv_heads == 0, "kv_heads (", kv_heads, ") must divide heads (", heads, ")");
//   detail::require_shape("key", key.rows(), key.cols(), tokens, kv_heads * dim, "rows = tokens, cols = kv_heads * head_dim");
//
// Without exceptions (-fno-exceptions or EIGENBLOCKS_NO_EXCEPTIONS) the message goes to stderr and the program aborts.
#pragma once

#include <eigenblocks/core/config.hpp>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

/// A shape or option that the function cannot accept.
class invalid_argument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// A file or model whose content is damaged or inconsistent; the message says where.
class data_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

template <class T>
void append_text(std::string& text, const T& part) {
  if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    text += std::string_view(part);
  } else if constexpr (std::is_same_v<T, bool>) {
    text += part ? "true" : "false";
  } else if constexpr (std::is_floating_point_v<T>) {
    char buffer[40];
    std::snprintf(buffer, sizeof(buffer), "%.9g", static_cast<double>(part));
    text += buffer;
  } else if constexpr (std::is_enum_v<T>) {
    text += std::to_string(static_cast<long long>(part));
  } else {
    text += std::to_string(part);
  }
}

template <class... Parts>
std::string join_text(const Parts&... parts) {
  std::string text;
  (append_text(text, parts), ...);
  return text;
}

/// Throws Error(joined parts); prints and aborts where exceptions are off.
template <class Error, class... Parts>
[[noreturn]] EIGENBLOCKS_COLD void raise(const Parts&... parts) {
  const std::string text = join_text("eigenblocks: ", parts...);
#if defined(EIGENBLOCKS_NO_EXCEPTIONS)
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
#else
  throw Error(text);
#endif
}

/// invalid_argument unless `condition` holds.
template <class... Parts>
EIGENBLOCKS_ALWAYS_INLINE void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    raise<invalid_argument>(parts...);
  }
}

/// std::out_of_range unless 0 <= index < size.
template <class Int>
EIGENBLOCKS_ALWAYS_INLINE void require_index(const char* name, Int index, Eigen::Index size) {
  if (index < 0 || static_cast<Eigen::Index>(index) >= size) [[unlikely]] {
    raise<std::out_of_range>(name, " (", index, ") is outside [0, ", size, ")");
  }
}

/// invalid_argument unless rows x cols is the wanted shape; `meaning` says where the wanted numbers come from.
EIGENBLOCKS_ALWAYS_INLINE void require_shape(const char* name, Eigen::Index rows, Eigen::Index cols,
                                             Eigen::Index want_rows, Eigen::Index want_cols,
                                             const char* meaning) {
  if (rows != want_rows || cols != want_cols) [[unlikely]] {
    raise<invalid_argument>(name, " is ", rows, " x ", cols, ", expected ", want_rows, " x ",
                            want_cols, " (", meaning, ")");
  }
}

/// The same for a vector of `size` entries.
EIGENBLOCKS_ALWAYS_INLINE void require_size(const char* name, Eigen::Index size,
                                            Eigen::Index want_size, const char* meaning) {
  if (size != want_size) [[unlikely]] {
    raise<invalid_argument>(name, " has ", size, " entries, expected ", want_size, " (", meaning,
                            ")");
  }
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
