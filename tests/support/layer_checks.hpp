// Comparing results, and exact messages, in the tests of layers.
#pragma once

#include <eigenblocks/core/types.hpp>

#include <doctest/doctest.h>

#include <string>

/// max |a - b|; 0 for empty matrices.
inline double largest_difference(const eigenblocks::Matrix<double>& a,
                                 const eigenblocks::Matrix<double>& b) {
  return a.size() == 0 ? 0.0 : (a - b).cwiseAbs().maxCoeff();
}

/// f() must throw Error with exactly this text behind the library's name.
template <class Error, class F>
void check_throws(F&& f, const std::string& text) {
  try {
    f();
    FAIL("nothing was thrown, expected: ", text);
  } catch (const Error& error) {
    CHECK(std::string(error.what()) == "eigenblocks: " + text);
  }
}
