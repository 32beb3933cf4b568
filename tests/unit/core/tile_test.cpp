// The register-blocked loops and the packing around them, each against the loop it stands for.
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/tile.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <vector>

namespace {

using namespace eigenblocks;

/// Integers of a few bits: every product and sum below is exact, in any order.
template <class S>
std::vector<S> small_integers(Index count, std::uint64_t seed) {
  Random random(seed);
  std::vector<S> x(static_cast<std::size_t>(count));
  for (S& value : x) value = static_cast<S>(static_cast<float>(random.below(9) - 4));
  return x;
}
template <class S>
std::vector<S> nans(Index count) {
  return std::vector<S>(static_cast<std::size_t>(count), std::numeric_limits<S>::quiet_NaN());
}
std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// The native register tile and one that no target has.
template <class S, int MR, int NV>
void check_products() {
  constexpr int nq = NV * simd::kLanes<S>;
  for (const Index depth : {0, 1, 5, 16}) {
    for (const Index groups : {0, 1, 3}) {
      const std::vector<S> a = small_integers<S>(groups * depth * MR, 1),
                           b = small_integers<S>(depth * nq, 2),
                           before = small_integers<S>(groups * MR * nq, 3),
                           factor = small_integers<S>(nq, 4);
      std::vector<S> scores = nans<S>(groups * MR * nq), top(at(nq), S(1));
      detail::tile_scores<S, MR, NV, true>(groups, depth, a.data(), b.data(), scores.data(),
                                           top.data());
      std::vector<S> keep = before, zero = nans<S>(groups * MR * nq), rescale = before;
      detail::tile_accumulate<S, MR, NV, detail::TileStart::keep>(
          groups, depth, a.data(), depth * MR, b.data(), keep.data(), nullptr);
      detail::tile_accumulate<S, MR, NV, detail::TileStart::zero>(
          groups, depth, a.data(), depth * MR, b.data(), zero.data(), nullptr);
      detail::tile_accumulate<S, MR, NV, detail::TileStart::rescale>(
          groups, depth, a.data(), depth * MR, b.data(), rescale.data(), factor.data());
      for (Index x = 0; x < nq; ++x) {
        S most = 1;
        for (Index row = 0; row < groups * MR; ++row) {
          S sum = 0;
          for (Index k = 0; k < depth; ++k)
            sum += a[at((row / MR * depth + k) * MR + row % MR)] * b[at(k * nq + x)];
          const std::size_t entry = at(row * nq + x);
          CHECK(scores[entry] == sum);
          CHECK(zero[entry] == sum);
          CHECK(keep[entry] == before[entry] + sum);
          CHECK(rescale[entry] == before[entry] * factor[at(x)] + sum);
          most = std::max(most, sum);
        }
        CHECK(top[at(x)] == most);
      }
    }
  }
}

template <class T>
T stored(Index r, Index c) {
  return static_cast<T>(static_cast<float>((r * 7 + c * 3) % 50) / 4);
}

template <class S, class T, int MR>
void check_packing() {
  constexpr int w = simd::kLanes<S>, nq = 3 * w;
  for (const Index rows : {1, MR - 1, MR, 2 * MR + 1, nq}) {
    for (const Index cols : {1, MR - 1, MR, 2 * MR + 3}) {
      if (rows < 1 || cols < 1) continue;
      const Index stride = cols + 5, row_panels = (rows + MR - 1) / MR,
                  column_panels = (cols + MR - 1) / MR;
      std::vector<T> from(at(rows * stride), std::numeric_limits<T>::quiet_NaN());  // gaps hold NaN
      for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < cols; ++c) from[at(r * stride + c)] = stored<T>(r, c);
      }
      const auto want = [&](Index r, Index c) {
        return r < rows && c < cols ? static_cast<S>(stored<T>(r, c)) : S(0);
      };
      std::vector<S> scratch = nans<S>(std::max(nq, MR) * cols),
                     panels = nans<S>(row_panels * MR * cols);
      detail::pack_row_panels<MR>(rows, cols, from.data(), stride, panels.data(), scratch.data());
      for (Index r = 0; r < row_panels * MR; ++r) {
        for (Index c = 0; c < cols; ++c)
          CHECK(panels[at((r / MR * cols + c) * MR + r % MR)] == want(r, c));
      }
      panels = nans<S>(column_panels * MR * rows);
      detail::pack_column_panels<MR>(rows, cols, from.data(), stride, panels.data(), rows * MR,
                                     scratch.data());
      for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < column_panels * MR; ++c)
          CHECK(panels[at((c / MR * rows + r) * MR + c % MR)] == want(r, c));
      }
      if (rows > nq) continue;
      std::vector<S> factor(at(nq), S(2)), tile = nans<S>(nq * cols);
      detail::pack_query_tile<S>(rows, cols, from.data(), stride, nq, factor.data(), tile.data(),
                                 scratch.data());
      for (Index c = 0; c < cols; ++c) {
        for (Index x = 0; x < nq; ++x) CHECK(tile[at(c * nq + x)] == S(2) * want(x, c));
      }
      std::vector<T> back(at(rows * stride), T(99));
      detail::unpack_query_tile<S>(rows, cols, tile.data(), nq, back.data(), stride,
                                   scratch.data());
      for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < stride; ++c) {
          CHECK(static_cast<float>(back[at(r * stride + c)]) ==
                (c < cols ? 2 * static_cast<float>(stored<T>(r, c)) : 99.0f));
        }
      }
    }
  }
}

}  // namespace

TEST_CASE_TEMPLATE("score and output tiles", S, float, double) {
  using Tile = detail::TileShape<S>;
  check_products<S, Tile::kRows, Tile::kVectors>();
  check_products<S, 2, 1>();
}

TEST_CASE_TEMPLATE("gradient rows: weights of several tiles times rows", S, float, double) {
  constexpr int mr = detail::TileShape<S>::kGradientRows, nq = 2 * simd::kLanes<S>;
  for (const Index tiles : {0, 1, 3}) {
    for (const Index columns : {1, 2, 5}) {  // in registers
      const Index width = columns * simd::kLanes<S>, tile_stride = (mr + 2) * nq,
                  row_stride = width + 3, out_stride = width + 1;
      const std::vector<S> weights = small_integers<S>(tiles * tile_stride + 1, 1),
                           rows = small_integers<S>(tiles * nq * row_stride + 1, 2),
                           before = small_integers<S>(mr * out_stride, 3);
      std::vector<S> out = before;
      detail::tile_rows<S, mr>(width, tiles, tile_stride, nq, weights.data(), rows.data(),
                               row_stride, out.data(), out_stride);
      for (Index m = 0; m < mr; ++m) {
        for (Index c = 0; c < out_stride; ++c) {
          S want = before[at(m * out_stride + c)];
          for (Index t = 0; t < tiles && c < width; ++t) {
            for (Index q = 0; q < nq; ++q)
              want += weights[at(t * tile_stride + m * nq + q)] *
                      rows[at((t * nq + q) * row_stride + c)];
          }
          CHECK(out[at(m * out_stride + c)] == want);
        }
      }
    }
  }
}

TEST_CASE(
    "packing: panels, query tiles and the way back, for every storage scalar and sizes that do not "
    "fit") {
  check_packing<double, double, 4>();
  check_packing<float, float, 8>();
  check_packing<float, float, 6>();
  check_packing<float, Eigen::half, 4>();
  check_packing<float, Eigen::bfloat16, 8>();
}

TEST_CASE("round_up-like sizes of the native tile fit its registers") {
  using Tile = detail::TileShape<float>;
  static_assert(Tile::kQueries == Tile::kVectors * simd::kLanes<float>);
  static_assert(Tile::kRows * Tile::kVectors + Tile::kVectors + 1 <= 32);
  CHECK(Tile::kQueries >= Tile::kVectors);
}
