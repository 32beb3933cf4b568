// Positions of sequences that mix text, images and videos.
//
// A sequence is a list of segments; each function gives one row of positions per token, one column
// per axis, ready for position/rope_nd.hpp.  P is the next free position, 0 at the start; text token
// i of a segment stands at P + i on every axis.
//
//   mrope_positions      M-RoPE, axes (time, row, column), integers
//                        Qwen2-VL arXiv 2409.12191, Qwen2.5-VL, Qwen3-VL (transformers)
//   rope_tie_positions   RoPE-Tie, posts kexue.fm 10040 (v1) and 10352 (v2), real numbers
//
//   const std::vector<TokenSegment> segments{text_tokens(5), image_patches(4, 6), text_tokens(3)};
//   const MropePositions m = mrope_positions(segments, {.spatial_merge = 2});
//   const RopeTiePositions t = rope_tie_positions(segments, RopeTieVariant::v2);
//
// M-RoPE, after the spatial merge m: H = h/m, W = w/m, token (a, r, c) at (P + tau_a, P + r, P + c)
// with tau_a = a; in Qwen2.5-VL tau = 0 for images and trunc(a * second_per_grid *
// tokens_per_second), in float as transformers does, for videos.  Next text at P + max(H, W,
// tau_last + 1), or P + max(H, W) for MropeAdvance::spatial, where text overlaps a long video.
//
// RoPE-Tie asks that text is RoPE-1D, that an image of h x w moves the text behind it by hw
// (equivalence), and that last text -> first patch = last patch -> next text on each axis
// (symmetry).  Image after P:
//
//   v1_integer      (P-1 + (r+1)(w+1), P-1 + (c+1)(h+1)),  next P-1 + (w+1)(h+1)   not equivalent
//   v1_equivalent   (P-1 + (r+1)(wh+1)/(h+1), P-1 + (c+1)(wh+1)/(w+1)),  next P + wh
//   v2              (P + (wh-h)/2 + r, P + (wh-w)/2 + c),  next P + wh
//                   video, N = thw: (P + (N-t)/2 + a, P + (N-h)/2 + r, P + (N-w)/2 + c), next P + N
//   v2_frames       as v2, each frame of a video a video of one frame: can be streamed
//
// Tokens of a grid come in the order time, row, column; a, r, c count from 0.  Frequencies that go
// with them: section_axes or interleaved_section_axes for M-RoPE, cyclic_axes for RoPE-Tie.
// Cost: O(T).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class SegmentKind { text, image, video };

/// Text: t tokens, h = w = 0.  Image or video: a grid of t x h x w patches, before any merge.
struct TokenSegment {
  SegmentKind kind = SegmentKind::text;
  Index t = 0, h = 0, w = 0;
};

inline TokenSegment text_tokens(Index count) { return {SegmentKind::text, count, 0, 0}; }
inline TokenSegment image_patches(Index h, Index w) { return {SegmentKind::image, 1, h, w}; }
inline TokenSegment video_patches(Index t, Index h, Index w) {
  return {SegmentKind::video, t, h, w};
}

namespace detail {

/// Positions and counts stay below this: exact in double, and no sum of two overflows.
inline constexpr Index kMaxTokens = Index{1} << 50;

/// Checks one segment; returns its patches or tokens before a merge.
inline Index require_segment(std::size_t at, const TokenSegment& s) {
  require(
      s.kind == SegmentKind::text || s.kind == SegmentKind::image || s.kind == SegmentKind::video,
      "kind (", s.kind, ") of segment ", at, " must be text (0), image (1) or video (2)");
  require(s.t >= 1, "t (", s.t, ") of segment ", at, " must be at least 1");
  if (s.kind == SegmentKind::text) {
    require(s.h == 0 && s.w == 0, "h (", s.h, ") and w (", s.w, ") of text segment ", at,
            " must be 0");
    require(s.t <= kMaxTokens, "t (", s.t, ") of segment ", at, " must be at most ", kMaxTokens);
    return s.t;
  }
  require(s.h >= 1, "h (", s.h, ") of segment ", at, " must be at least 1");
  require(s.w >= 1, "w (", s.w, ") of segment ", at, " must be at least 1");
  require(s.t <= kMaxTokens && s.h <= kMaxTokens / s.t && s.w <= kMaxTokens / (s.t * s.h), "t (",
          s.t, ") * h (", s.h, ") * w (", s.w, ") of segment ", at, " must be at most ",
          kMaxTokens);
  return s.t * s.h * s.w;
}

/// What `at` segments add up to.
inline void require_total(const char* what, std::size_t at, Index total) {
  require(total <= kMaxTokens, what, " (", total, ") after segment ", at, " must be at most ",
          kMaxTokens);
}

}  // namespace detail

enum class MropeVariant { qwen2_vl, qwen2_5_vl, qwen3_vl };

/// Where the text behind a grid starts: all ids passed (paper, transformers 4), or the spatial ones
/// only (transformers 5).
enum class MropeAdvance { all, spatial };

struct MropeOptions {
  MropeVariant variant = MropeVariant::qwen2_vl;
  Index spatial_merge = 2;
  double tokens_per_second = 0.0;  ///< qwen2_5_vl videos; 0: tau_a = a
  MropeAdvance advance = MropeAdvance::all;
};

struct MropePositions {
  Matrix<Index> positions;  ///< T x 3: time, row, column
  Index next = 0;           ///< where following text starts
  Index delta = 0;          ///< max(positions) + 1 - T: transformers decodes token n at n + delta
};

namespace detail {

/// tau_a, the time of frame a after the start of its segment.
inline Index mrope_time(const MropeOptions& options, SegmentKind kind, double seconds, Index a) {
  if (options.variant != MropeVariant::qwen2_5_vl) return a;
  if (kind == SegmentKind::image) return 0;
  if (options.tokens_per_second == 0.0) return a;
  const float time = static_cast<float>(a) * static_cast<float>(seconds) *
                     static_cast<float>(options.tokens_per_second);
  // (the cast of a float beyond Index is undefined; positions that large are refused)
  return time < static_cast<float>(2 * kMaxTokens) ? static_cast<Index>(time) : 2 * kMaxTokens;
}

/// How far a grid of t x h x w, after the merge, moves the text behind it.
inline Index mrope_advance(const MropeOptions& options, SegmentKind kind, double seconds, Index t,
                           Index h, Index w) {
  const Index spatial = std::max(h, w);
  if (options.advance == MropeAdvance::spatial) return spatial;
  return std::max(spatial, mrope_time(options, kind, seconds, t - 1) + 1);
}

}  // namespace detail

/// See the top of the file.  second_per_grid: one entry per video segment, or empty for 1 each.
/// Left padding: call it for the tokens without padding.
/// Errors: counts below 1; h or w of text not 0; h or w of a grid not divisible by spatial_merge;
/// a qwen3_vl video with t > 1 (give one segment per frame); second_per_grid of another size than
/// the number of videos; it or tokens_per_second negative or not finite; spatial_merge < 1; positions
/// or tokens beyond 2^50.
inline MropePositions mrope_positions(std::span<const TokenSegment> segments,
                                      const MropeOptions& options = {},
                                      std::span<const double> second_per_grid = {}) {
  using detail::require;
  const Index merge = options.spatial_merge;
  const MropeVariant variant = options.variant;
  require(variant == MropeVariant::qwen2_vl || variant == MropeVariant::qwen2_5_vl ||
              variant == MropeVariant::qwen3_vl,
          "variant (", variant, ") must be qwen2_vl (0), qwen2_5_vl (1) or qwen3_vl (2)");
  require(options.advance == MropeAdvance::all || options.advance == MropeAdvance::spatial,
          "advance (", options.advance, ") must be all (0) or spatial (1)");
  require(merge >= 1, "spatial_merge (", merge, ") must be at least 1");
  require(options.tokens_per_second >= 0 && std::isfinite(options.tokens_per_second),
          "tokens_per_second (", options.tokens_per_second, ") must be finite and at least 0");
  for (const double seconds : second_per_grid) {
    require(seconds >= 0 && std::isfinite(seconds), "second_per_grid (", seconds,
            ") must be finite and at least 0");
  }
  Index videos = 0;
  for (const TokenSegment& s : segments) videos += s.kind == SegmentKind::video;
  if (!second_per_grid.empty()) {
    detail::require_size("second_per_grid", static_cast<Index>(second_per_grid.size()), videos,
                         "one for each video");
  }
  const auto seconds_of = [&](Index video) {
    return second_per_grid.empty() ? 1.0 : second_per_grid[static_cast<std::size_t>(video)];
  };

  Index tokens = 0, p = 0, video = 0;
  for (std::size_t at = 0; at < segments.size(); ++at) {
    const TokenSegment& s = segments[at];
    const Index patches = detail::require_segment(at, s);
    if (s.kind == SegmentKind::text) {
      tokens += patches;
      p += patches;
    } else {
      require(s.h % merge == 0, "spatial_merge (", merge, ") must divide h (", s.h, ") of segment ",
              at);
      require(s.w % merge == 0, "spatial_merge (", merge, ") must divide w (", s.w, ") of segment ",
              at);
      const bool is_video = s.kind == SegmentKind::video;
      require(!is_video || variant != MropeVariant::qwen3_vl || s.t == 1, "t (", s.t,
              ") of qwen3_vl video segment ", at, " must be 1: one segment per frame");
      const double seconds = is_video ? seconds_of(video++) : 1.0;
      detail::require_total("the time of the last frame", at,
                            detail::mrope_time(options, s.kind, seconds, s.t - 1));
      tokens += patches / (merge * merge);
      p += detail::mrope_advance(options, s.kind, seconds, s.t, s.h / merge, s.w / merge);
    }
    detail::require_total("the number of tokens", at, tokens);
    detail::require_total("the next position", at, p);
  }

  MropePositions out{.positions = Matrix<Index>(tokens, 3)};
  Index row = 0, largest = -1;
  const auto put = [&](Index t, Index r, Index c) {
    out.positions(row, 0) = t;
    out.positions(row, 1) = r;
    out.positions(row, 2) = c;
    largest = std::max({largest, t, r, c});
    ++row;
  };
  p = 0;
  video = 0;
  for (const TokenSegment& s : segments) {
    if (s.kind == SegmentKind::text) {
      for (Index i = 0; i < s.t; ++i) put(p + i, p + i, p + i);
      p += s.t;
      continue;
    }
    const double seconds = s.kind == SegmentKind::video ? seconds_of(video++) : 1.0;
    const Index h = s.h / merge, w = s.w / merge;
    for (Index a = 0; a < s.t; ++a) {
      const Index time = p + detail::mrope_time(options, s.kind, seconds, a);
      for (Index r = 0; r < h; ++r) {
        for (Index c = 0; c < w; ++c) put(time, p + r, p + c);
      }
    }
    p += detail::mrope_advance(options, s.kind, seconds, s.t, h, w);
  }
  out.next = p;
  out.delta = largest + 1 - tokens;
  return out;
}

enum class RopeTieVariant { v1_integer, v1_equivalent, v2, v2_frames };

struct RopeTiePositions {
  Matrix<double> positions;  ///< T x 2 (row, column); T x 3 (time, row, column) if there is a video
  double next = 0;           ///< where following text starts
};

/// See the top of the file.  No spatial merge: h and w count tokens.  In a sequence with a video an
/// image is a video of one frame.
/// Errors: counts below 1; h or w of text not 0; an image with t > 1; v1 with a video; an unknown
/// variant; more than 2^50 tokens.
inline RopeTiePositions rope_tie_positions(std::span<const TokenSegment> segments,
                                           RopeTieVariant variant) {
  using detail::require;
  require(variant == RopeTieVariant::v1_integer || variant == RopeTieVariant::v1_equivalent ||
              variant == RopeTieVariant::v2 || variant == RopeTieVariant::v2_frames,
          "variant (", variant,
          ") must be v1_integer (0), v1_equivalent (1), v2 (2) or v2_frames (3)");
  const bool v1 = variant == RopeTieVariant::v1_integer || variant == RopeTieVariant::v1_equivalent;
  Index tokens = 0, axes = 2;
  for (std::size_t at = 0; at < segments.size(); ++at) {
    const TokenSegment& s = segments[at];
    tokens += detail::require_segment(at, s);
    detail::require_total("the number of tokens", at, tokens);
    require(s.kind != SegmentKind::image || s.t == 1, "t (", s.t, ") of image segment ", at,
            " must be 1");
    if (s.kind != SegmentKind::video) continue;
    require(!v1, "segment ", at, " is a video (2): variant (", variant,
            ") is v1, which has images only; v2 (2) and v2_frames (3) have videos");
    axes = 3;
  }

  RopeTiePositions out{.positions = Matrix<double>(tokens, axes)};
  Index row = 0;
  double p = 0;
  const auto put = [&](double time, double r, double c) {
    if (axes == 3) out.positions(row, 0) = time;
    out.positions(row, axes - 2) = r;
    out.positions(row, axes - 1) = c;
    ++row;
  };
  const auto number = [](Index n) { return static_cast<double>(n); };
  /// A block of unit steps whose centre is the middle of the t h w positions it takes.
  const auto put_block = [&](Index t, Index h, Index w) {
    const double n = number(t * h * w);
    const auto from_first = [&](Index extent, Index at) {
      return p + (n - number(extent)) / 2 + number(at);
    };
    for (Index a = 0; a < t; ++a) {
      for (Index r = 0; r < h; ++r) {
        for (Index c = 0; c < w; ++c) put(from_first(t, a), from_first(h, r), from_first(w, c));
      }
    }
    p += n;
  };
  /// Steps that lead from the text before to the text behind, P' = P - 1 + (h+1) down.
  const auto put_stretched = [&](Index h, Index w, double down, double right, double taken) {
    for (Index r = 0; r < h; ++r) {
      for (Index c = 0; c < w; ++c) {
        put(0.0, p - 1 + number(r + 1) * down, p - 1 + number(c + 1) * right);
      }
    }
    p += taken;
  };
  for (const TokenSegment& s : segments) {
    const double h = number(s.h), w = number(s.w);
    if (s.kind == SegmentKind::text) {
      for (Index i = 0; i < s.t; ++i) put(p + number(i), p + number(i), p + number(i));
      p += number(s.t);
    } else if (variant == RopeTieVariant::v1_integer) {
      put_stretched(s.h, s.w, w + 1, h + 1, (w + 1) * (h + 1) - 1);
    } else if (variant == RopeTieVariant::v1_equivalent) {
      put_stretched(s.h, s.w, (w * h + 1) / (h + 1), (w * h + 1) / (w + 1), w * h);
    } else if (variant == RopeTieVariant::v2_frames) {
      for (Index a = 0; a < s.t; ++a) put_block(1, s.h, s.w);
    } else {
      put_block(s.t, s.h, s.w);
    }
  }
  out.next = p;
  return out;
}

EIGENBLOCKS_NAMESPACE_END
