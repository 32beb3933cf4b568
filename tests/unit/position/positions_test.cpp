#include <eigenblocks/core/random.hpp>
#include <eigenblocks/position/positions.hpp>
#include <eigenblocks/position/rope_nd.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <vector>

namespace {

using namespace eigenblocks;
using Segments = std::vector<TokenSegment>;

template <class S>
Matrix<S> rows(std::initializer_list<std::initializer_list<S>> list) {
  Matrix<S> m(static_cast<Index>(list.size()), static_cast<Index>(list.begin()->size()));
  Index i = 0;
  for (const auto& row : list) {
    Index j = 0;
    for (const S value : row) m(i, j++) = value;
    ++i;
  }
  return m;
}

/// A sequence of texts and grids of up to 5 x 5 x 5.
Segments random_segments(Random& random, bool videos) {
  const auto count = [&] { return 1 + static_cast<Index>(random.below(5)); };
  Segments segments;
  for (int s = 0; s < 6; ++s) {
    if (s % 2 == 0) {
      segments.push_back(text_tokens(count()));
    } else if (videos && random.below(2) == 0) {
      segments.push_back(video_patches(count(), count(), count()));
    } else {
      segments.push_back(image_patches(count(), count()));
    }
  }
  return segments;
}

}  // namespace

TEST_CASE("M-RoPE: text, image, text by hand") {
  // 2 x 3 after the merge; the next text stands at 2 + max(2, 3).
  const MropePositions m =
      mrope_positions(Segments{text_tokens(2), image_patches(4, 6), text_tokens(2)});
  CHECK(m.positions == rows<Index>({{0, 0, 0},
                                    {1, 1, 1},
                                    {2, 2, 2},
                                    {2, 2, 3},
                                    {2, 2, 4},
                                    {2, 3, 2},
                                    {2, 3, 3},
                                    {2, 3, 4},
                                    {5, 5, 5},
                                    {6, 6, 6}}));
  CHECK(m.next == 7);
  CHECK(m.delta == -3);
}

TEST_CASE("M-RoPE: a video longer than it is wide") {
  const Segments segments{text_tokens(1), video_patches(3, 2, 2), text_tokens(1)};
  const MropePositions all = mrope_positions(segments, {.spatial_merge = 2});
  CHECK(all.positions == rows<Index>({{0, 0, 0}, {1, 1, 1}, {2, 1, 1}, {3, 1, 1}, {4, 4, 4}}));
  CHECK(all.next == 5);
  CHECK(all.delta == 0);
  const MropePositions spatial =
      mrope_positions(segments, {.spatial_merge = 2, .advance = MropeAdvance::spatial});
  CHECK(spatial.positions == rows<Index>({{0, 0, 0}, {1, 1, 1}, {2, 1, 1}, {3, 1, 1}, {2, 2, 2}}));
  CHECK(spatial.next == 3);
  CHECK(spatial.delta == -1);  // decoding goes on behind the largest id, not at next
}

TEST_CASE("M-RoPE of Qwen2.5-VL: time in seconds, rounded down in float") {
  const MropeOptions options{
      .variant = MropeVariant::qwen2_5_vl, .spatial_merge = 1, .tokens_per_second = 2};
  // 0.75 s per grid and 2 ids per second: 0, 1.5, 3, 4.5; the image stands still; a second video.
  const Segments segments{video_patches(4, 1, 1), image_patches(1, 2), video_patches(2, 1, 1)};
  const std::vector<double> seconds{0.75, 3.0};
  const MropePositions m = mrope_positions(segments, options, seconds);
  CHECK(m.positions == rows<Index>({{0, 0, 0},
                                    {1, 0, 0},
                                    {3, 0, 0},
                                    {4, 0, 0},
                                    {5, 5, 5},
                                    {5, 5, 6},
                                    {7, 7, 7},
                                    {13, 7, 7}}));
  CHECK(m.next == 14);
  CHECK(m.delta == 6);
  // As float, from left to right: 6 * 0.7 * 5 is 21 (in double just below), 9 * 0.7 * 10 just below
  // 63 (in double, or as 9 * (0.7 * 10), it is 63).
  const Segments frames{video_patches(10, 1, 1)};
  const auto time = [&](double rate, Index frame) {
    const MropeOptions fractional{
        .variant = MropeVariant::qwen2_5_vl, .spatial_merge = 1, .tokens_per_second = rate};
    return mrope_positions(frames, fractional, std::vector<double>{0.7}).positions(frame, 0);
  };
  CHECK(time(5, 6) == 21);
  CHECK(time(10, 9) == 62);
  // An image of several grids stands still as well; without a rate frames are counted.
  const Segments thick{{SegmentKind::image, 2, 1, 1}};
  CHECK(mrope_positions(thick, options).positions.isZero());
  CHECK(mrope_positions(frames, {.variant = MropeVariant::qwen2_5_vl, .spatial_merge = 1})
            .positions.col(0) == Vector<Index>::LinSpaced(10, 0, 9));
}

TEST_CASE("M-RoPE of Qwen3-VL: a frame is a segment") {
  const MropeOptions options{.variant = MropeVariant::qwen3_vl, .spatial_merge = 2};
  const MropePositions m = mrope_positions(
      Segments{video_patches(1, 2, 4), text_tokens(1), video_patches(1, 2, 4)}, options);
  CHECK(m.positions == rows<Index>({{0, 0, 0}, {0, 0, 1}, {2, 2, 2}, {3, 3, 3}, {3, 3, 4}}));
  CHECK(m.next == 5);
}

TEST_CASE("nothing, and text alone") {
  const MropePositions none = mrope_positions(Segments{});
  CHECK(none.positions.rows() == 0);
  CHECK(none.positions.cols() == 3);
  CHECK(none.next == 0);
  CHECK(none.delta == 0);
  CHECK(rope_tie_positions(Segments{}, RopeTieVariant::v2).positions.rows() == 0);
  const MropePositions text = mrope_positions(Segments{text_tokens(2), text_tokens(3)});
  CHECK(text.positions == Vector<Index>::LinSpaced(5, 0, 4).replicate(1, 3));
  CHECK(text.next == 5);
  CHECK(text.delta == 0);
  const RopeTiePositions tie = rope_tie_positions(Segments{text_tokens(4)}, RopeTieVariant::v2);
  CHECK(tie.positions == Vector<double>::LinSpaced(4, 0, 3).replicate(1, 2));
  CHECK(tie.next == 4);
}

TEST_CASE("RoPE-Tie v1 by hand: one row of two patches after text at 0") {
  const Segments segments{text_tokens(1), image_patches(1, 2), text_tokens(1)};
  // Rows step by w + 1 = 3, columns by h + 1 = 2, both end at 6.
  const RopeTiePositions integer = rope_tie_positions(segments, RopeTieVariant::v1_integer);
  CHECK(integer.positions == rows<double>({{0, 0}, {3, 2}, {3, 4}, {6, 6}}));
  CHECK(integer.next == 7);
  // wh + 1 = 3: rows step by 3/2, columns by 1.
  const RopeTiePositions equivalent = rope_tie_positions(segments, RopeTieVariant::v1_equivalent);
  CHECK(equivalent.positions == rows<double>({{0, 0}, {1.5, 1}, {1.5, 2}, {3, 3}}));
  CHECK(equivalent.next == 4);
}

TEST_CASE("RoPE-Tie v2 by hand: half-integers where they belong") {
  // h = 1, w = 2 at P = 1: rows from 1 + (2 - 1)/2, columns from 1.
  const RopeTiePositions image = rope_tie_positions(
      Segments{text_tokens(1), image_patches(1, 2), text_tokens(1)}, RopeTieVariant::v2);
  CHECK(image.positions == rows<double>({{0, 0}, {1.5, 1}, {1.5, 2}, {3, 3}}));
  // t = 2, h = 1, w = 2, N = 4 at P = 1: time from 1 + 1, row from 1 + 1.5, column from 1 + 1.
  const Segments video{text_tokens(1), video_patches(2, 1, 2), text_tokens(1)};
  const RopeTiePositions block = rope_tie_positions(video, RopeTieVariant::v2);
  CHECK(block.positions ==
        rows<double>({{0, 0, 0}, {2, 2.5, 2}, {2, 2.5, 3}, {3, 2.5, 2}, {3, 2.5, 3}, {5, 5, 5}}));
  CHECK(block.next == 6);
  // Frame by frame: two images of 1 x 2 at 1 and at 3, time in the middle of each.
  const RopeTiePositions frames = rope_tie_positions(video, RopeTieVariant::v2_frames);
  CHECK(frames.positions ==
        rows<double>(
            {{0, 0, 0}, {1.5, 1.5, 1}, {1.5, 1.5, 2}, {3.5, 3.5, 3}, {3.5, 3.5, 4}, {5, 5, 5}}));
  CHECK(frames.next == 6);
}

TEST_CASE("RoPE-Tie: symmetry and equivalence for any sizes") {
  Random random(1);
  for (int trial = 0; trial < 50; ++trial) {
    for (const RopeTieVariant variant : {RopeTieVariant::v1_integer, RopeTieVariant::v1_equivalent,
                                         RopeTieVariant::v2, RopeTieVariant::v2_frames}) {
      const bool v1 =
          variant == RopeTieVariant::v1_integer || variant == RopeTieVariant::v1_equivalent;
      const Segments segments = random_segments(random, !v1);
      const RopeTiePositions got = rope_tie_positions(segments, variant);
      Index at = 0;
      double before = -1;  // the last text position
      for (const TokenSegment& s : segments) {
        if (s.kind == SegmentKind::text) {
          for (Index i = 0; i < s.t; ++i, ++at) {
            REQUIRE((got.positions.row(at).array() == got.positions(at, 0)).all());
            if (i > 0) REQUIRE(got.positions(at, 0) == before + 1);
            before = got.positions(at, 0);
          }
          continue;
        }
        const Index count = s.t * s.h * s.w;
        const RowVector<double> first = got.positions.row(at),
                                last = got.positions.row(at + count - 1);
        const double after =
            at + count < got.positions.rows() ? got.positions(at + count, 0) : got.next;
        for (Index axis = 0; axis < first.size(); ++axis) {
          REQUIRE(after - last[axis] == doctest::Approx(first[axis] - before).epsilon(1e-12));
        }
        if (variant != RopeTieVariant::v1_integer) {
          REQUIRE(after - before == doctest::Approx(static_cast<double>(count + 1)));
        }
        at += count;
        before = after - 1;
      }
      CHECK(at == got.positions.rows());
    }
  }
}

TEST_CASE("M-RoPE: ids never fall behind, delta leads to the next one") {
  Random random(2);
  for (int trial = 0; trial < 50; ++trial) {
    const Segments segments = random_segments(random, true);
    const MropePositions got = mrope_positions(segments, {.spatial_merge = 1});
    CHECK(got.next == got.positions.maxCoeff() + 1);
    CHECK(got.positions.rows() + got.delta == got.next);
    // What came before never reaches a later segment.
    Index at = 0, largest = -1;
    for (const TokenSegment& s : segments) {
      const Index count = s.kind == SegmentKind::text ? s.t : s.t * s.h * s.w;
      CHECK(got.positions.middleRows(at, count).minCoeff() == largest + 1);
      largest = std::max(largest, got.positions.middleRows(at, count).maxCoeff());
      at += count;
    }
  }
}

TEST_CASE("both feed rope_nd.hpp as they are") {
  const Segments segments{text_tokens(3), image_patches(2, 4), text_tokens(2)};
  const Matrix<float> x = Matrix<float>::Ones(7, 12);
  const RotaryFrequencies f = rope_frequencies(12);
  const Matrix<float> text =
      rope(x.topRows(3), 0, RotaryTable<float>(f, RopeLayout::half), {.heads = 1});
  const MropePositions m = mrope_positions(segments);
  const RotaryNdTable<float> three(section_axes(f, {2, 2, 2}), RopeLayout::half);
  CHECK(rope(x, m.positions, three, {.heads = 1}).topRows(3) == text);
  const RopeTiePositions t = rope_tie_positions(
      Segments{text_tokens(3), image_patches(1, 2), text_tokens(2)}, RopeTieVariant::v2);
  const RotaryNdTable<float> two(cyclic_axes(f, 2), RopeLayout::half);
  CHECK(rope(x, t.positions, two, {.heads = 1}).topRows(3) == text);
}

TEST_CASE("every error names its argument and its segment") {
  const double inf = std::numeric_limits<double>::infinity();
  const auto refuse_m = [](const char* message, const Segments& segments,
                           const MropeOptions& options = {},
                           const std::vector<double>& seconds = {}) {
    CHECK_THROWS_WITH_AS(mrope_positions(segments, options, seconds), message, invalid_argument);
  };
  refuse_m("eigenblocks: t (0) of segment 1 must be at least 1", {text_tokens(1), text_tokens(0)});
  refuse_m("eigenblocks: t (-1) of segment 0 must be at least 1", {video_patches(-1, 2, 2)});
  refuse_m("eigenblocks: h (0) of segment 0 must be at least 1", {image_patches(0, 2)});
  refuse_m("eigenblocks: w (-2) of segment 0 must be at least 1", {image_patches(2, -2)});
  refuse_m("eigenblocks: h (1) and w (0) of text segment 0 must be 0",
           {{SegmentKind::text, 3, 1, 0}});
  refuse_m("eigenblocks: kind (7) of segment 0 must be text (0), image (1) or video (2)",
           {{static_cast<SegmentKind>(7), 1, 1, 1}});
  refuse_m("eigenblocks: spatial_merge (2) must divide h (3) of segment 0", {image_patches(3, 4)});
  refuse_m("eigenblocks: spatial_merge (2) must divide w (5) of segment 0", {image_patches(4, 5)});
  refuse_m("eigenblocks: spatial_merge (0) must be at least 1", {}, {.spatial_merge = 0});
  refuse_m("eigenblocks: t (2) of qwen3_vl video segment 0 must be 1: one segment per frame",
           {video_patches(2, 2, 2)}, {.variant = MropeVariant::qwen3_vl});
  refuse_m("eigenblocks: variant (5) must be qwen2_vl (0), qwen2_5_vl (1) or qwen3_vl (2)", {},
           {.variant = static_cast<MropeVariant>(5)});
  refuse_m("eigenblocks: advance (2) must be all (0) or spatial (1)", {},
           {.advance = static_cast<MropeAdvance>(2)});
  refuse_m("eigenblocks: tokens_per_second (-1) must be finite and at least 0", {},
           {.tokens_per_second = -1});
  refuse_m("eigenblocks: second_per_grid has 2 entries, expected 1 (one for each video)",
           {video_patches(1, 2, 2), image_patches(2, 2)}, {}, {1, 1});
  refuse_m("eigenblocks: second_per_grid (inf) must be finite and at least 0",
           {video_patches(1, 2, 2)}, {}, {inf});
  // Too much to count is refused before anything is allocated.
  constexpr Index kHuge = Index{1} << 49;
  refuse_m(
      "eigenblocks: the number of tokens (1688849860263936) after segment 2 must be at most "
      "1125899906842624",
      {text_tokens(kHuge), text_tokens(kHuge), text_tokens(kHuge)});
  refuse_m(
      "eigenblocks: t (2) * h (4611686018427387904) * w (2) of segment 0 must be at most "
      "1125899906842624",
      {video_patches(2, Index{1} << 62, 2)});
  refuse_m(
      "eigenblocks: the time of the last frame (2251799813685248) after segment 0 must be at most "
      "1125899906842624",
      {video_patches(3, 2, 2)}, {.variant = MropeVariant::qwen2_5_vl, .tokens_per_second = 1e300},
      {1.0});

  const auto refuse_t = [](const char* message, const Segments& segments, RopeTieVariant variant) {
    CHECK_THROWS_WITH_AS(rope_tie_positions(segments, variant), message, invalid_argument);
  };
  refuse_t(
      "eigenblocks: segment 1 is a video (2): variant (0) is v1, which has images only; v2 (2) and "
      "v2_frames (3) have videos",
      {text_tokens(1), video_patches(1, 2, 2)}, RopeTieVariant::v1_integer);
  refuse_t("eigenblocks: t (2) of image segment 0 must be 1", {{SegmentKind::image, 2, 1, 1}},
           RopeTieVariant::v2);
  refuse_t("eigenblocks: t (0) of segment 0 must be at least 1", {text_tokens(0)},
           RopeTieVariant::v2);
  refuse_t("eigenblocks: h (0) and w (4) of text segment 0 must be 0",
           {{SegmentKind::text, 3, 0, 4}}, RopeTieVariant::v2);
  refuse_t(
      "eigenblocks: variant (4) must be v1_integer (0), v1_equivalent (1), v2 (2) or v2_frames (3)",
      {}, static_cast<RopeTieVariant>(4));
  refuse_t(
      "eigenblocks: the number of tokens (1688849860263936) after segment 2 must be at most "
      "1125899906842624",
      {text_tokens(kHuge), text_tokens(kHuge), text_tokens(kHuge)}, RopeTieVariant::v2);
}
