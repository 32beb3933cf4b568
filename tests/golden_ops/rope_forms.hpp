// What the golden ops of rotations share: names of layouts, and the forms every table has.
#pragma once

#include "support/golden.hpp"

#include <eigenblocks/position/rope.hpp>

#include <stdexcept>
#include <string>

namespace golden {

inline eigenblocks::RopeLayout layout_named(const std::string& name) {
  using eigenblocks::RopeLayout;
  if (name == "interleaved") return RopeLayout::interleaved;
  if (name == "half") return RopeLayout::half;
  if (name == "half_per_axis") return RopeLayout::half_per_axis;
  throw std::runtime_error("layout " + name + " is unknown");
}

/// x and dy turned out of place, in place with `small` (a table of few positions), and row by row; each against out.y and,
/// where the file has it, gin.x.  positions: one row per row of x.
template <class C, class S, class Positions, class Table>
void check_rope_forms(C& c, const eigenblocks::Matrix<S>& x, const eigenblocks::Matrix<S>& dy,
                      const Positions& positions, const Table& table, const Table& small,
                      const eigenblocks::RopeOptions& options) {
  eigenblocks::Matrix<S> y(x.rows(), x.cols()), dx(x.rows(), x.cols());
  const auto expect = [&] {
    c.expect("out.y", y);
    if (c.has("gin.x")) c.expect("gin.x", dx);
  };
  rope_forward(x, positions, table, y, options);
  rope_backward(dy, positions, table, dx, options);
  expect();

  c.form("in place, without coarse table");
  y = x;
  dx = dy;
  rope_in_place(y, positions, small, options);
  rope_backward_in_place(dx, positions, small, options);
  expect();

  c.form("row by row");
  for (eigenblocks::Index i = 0; i < x.rows(); ++i) {
    const auto at = positions.middleRows(i, 1);
    rope_forward(x.middleRows(i, 1), at, table, y.middleRows(i, 1), options);
    rope_backward(dy.middleRows(i, 1), at, table, dx.middleRows(i, 1), options);
  }
  expect();
}

}  // namespace golden
