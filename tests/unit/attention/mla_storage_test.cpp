// MLA steps in float: no allocations once warm, and latents stored in 16 bits.
#include "support/alloc_guard.hpp"

#include <eigenblocks/attention/mla.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

TEST_CASE("mla: an absorbed step allocates nothing once warm; 16-bit caches") {
  constexpr Index kWidth = 10, kRows = 120;
  const eb::Mla<float> layer(
      {.heads = 3, .nope_dim = 4, .rope_dim = 6, .value_dim = 5, .q_rank = 6, .kv_rank = 7});
  eb::Random random(16);
  const auto matrix = [&](Index rows, Index cols) {
    return eb::normal_matrix<float>(random, rows, cols, 0.4);
  };
  eb::MlaWeights<float> w;
  w.w_dq = matrix(kWidth, 6);
  w.w_uq = matrix(6, 30);
  w.w_dkv = matrix(kWidth, 13);
  w.w_ukv = matrix(7, 27);
  w.w_o = matrix(15, kWidth);
  w.b_dkv = matrix(13, 1);
  w.b_o = matrix(kWidth, 1);
  const Matrix<float> x = matrix(kRows, kWidth);
  auto state = eb::mla_state(layer, 2 * kRows);
  auto rounded = eb::mla_state<Eigen::bfloat16>(layer, 2 * kRows);
  Matrix<float> y(kRows, kWidth), y16(kRows, kWidth);
  long calls = 0;
  for (Index t = 0; t < kRows; ++t) {
    const AllocationCount count;
    eb::mla_step(layer, w, state, x.middleRows(t, 1), y.middleRows(t, 1), eb::MlaForm::absorbed);
    if (t >= 2) calls += count.calls();
    eb::mla_step(layer, w, rounded, x.middleRows(t, 1), y16.middleRows(t, 1));
  }
  if (AllocationCount::available) CHECK(calls == 0);
  CHECK(rounded.bytes_per_token() * 2 == state.bytes_per_token());
  CHECK((y - y16).norm() < 0.02f * y.norm());  // rounding to 8 bits: 2^-9
  CHECK((y - y16).norm() > 0.0f);
  // The expanded form reads the same rounded latents.
  auto again = eb::mla_state<Eigen::bfloat16>(layer, kRows);
  Matrix<float> expanded(kRows, kWidth);
  eb::mla_step(layer, w, again, x, expanded, eb::MlaForm::expanded);
  CHECK((expanded - y16).norm() < 1e-5f * y16.norm());
}
