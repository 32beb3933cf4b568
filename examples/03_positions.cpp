// Draws positions: what a query thinks how far a key is, and where the patches of an image stand among words.
//
//   03_positions               text on the screen, positions_relative.svg and positions_mixed.svg beside the program
//   03_positions --out FOLDER
//
// Relative positions (kexue.fm 9708, 9728, arXiv 2306.15595, 2401.01325), d = i - j, window w, leak k, group G:
//   RoPE d | PI d/k | window d, keys from w on hidden | ReRoPE min(d, w) | Leaky d, then w + (d - w)/k |
//   Self-Extend d, then i div G - j div G + w - w div G
// Positions of a mixed sequence: RoPE-Tie v1 and v2 (kexue.fm 10040, 10352) and M-RoPE (arXiv 2409.12191), position/positions.hpp.
#include "support/arguments.hpp"
#include "support/svg.hpp"

#include <eigenblocks/position/positions.hpp>
#include <eigenblocks/position/rerope.hpp>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

namespace {

using namespace example;
namespace eb = eigenblocks;
using eb::Index;

// ---- Relative positions --------------------------------------------------------------------------

constexpr Index kTokens = 16, kWindow = 6, kGroup = 2;
constexpr double kFactor = 2, kLeak = 4;
constexpr double kHidden = std::numeric_limits<double>::quiet_NaN();

struct Family {
  const char* name;
  std::string formula;
  eb::Matrix<double> relative;  ///< queries x keys; kHidden where the query does not see the key
};

std::vector<Family> families() {
  const auto relative = [](const auto& policy, Index seen = kTokens) {
    eb::Matrix<double> table = eb::rope_relative_positions(policy, kTokens, kTokens);
    for (Index i = 0; i < kTokens; ++i) {
      for (Index j = 0; j < kTokens; ++j) {
        if (j > i || j <= i - seen) table(i, j) = kHidden;
      }
    }
    return table;
  };
  const auto w = static_cast<long long>(kWindow), group = static_cast<long long>(kGroup);
  return {{"RoPE", "d", relative(eb::linear_position())},
          {"PI", format("d/k, k = %.0f", kFactor), relative(eb::linear_position(kFactor))},
          {"sliding window", format("d < w, w = %lld; the rest unseen", w),
           relative(eb::linear_position(), kWindow)},
          {"ReRoPE", format("min(d, w), w = %lld", w), relative(eb::rerope(kWindow))},
          {"Leaky ReRoPE", format("beyond w = %lld: w + (d - w)/k, k = %.0f", w, kLeak),
           relative(eb::leaky_rerope(kWindow, kLeak))},
          {"Self-Extend", format("beyond w = %lld: groups of %lld share an id", w, group),
           relative(eb::self_extend(kWindow, kGroup))}};
}

/// 3, 2.5, 2.25: as many digits as it takes.
std::string number(double value) { return format("%.4g", value); }

void print_family(const Family& family) {
  std::printf("\n%s: %s\n", family.name, family.formula.c_str());
  for (Index i = 0; i < kTokens; ++i) {
    for (Index j = 0; j <= i; ++j) {
      const double r = family.relative(i, j);
      std::printf("%5s", std::isnan(r) ? "." : number(r).c_str());
    }
    std::printf("\n");
  }
}

void draw_family(Svg& svg, double left, double top, const Family& family) {
  constexpr double kCell = 24;
  svg.text(left, top - 28, family.name, {.size = 17, .bold = true});
  svg.text(left, top - 9, family.formula, {.size = 13, .colour = "#555"});
  for (Index i = 0; i < kTokens; ++i) {
    const double y = top + kCell * static_cast<double>(i);
    for (Index j = 0; j < kTokens; ++j) {
      const double x = left + kCell * static_cast<double>(j);
      const double r = family.relative(i, j);
      const double share = r / static_cast<double>(kTokens - 1);
      svg.rect(x, y, kCell - 1, kCell - 1,
               j > i           ? "#f7f7f7"
               : std::isnan(r) ? "#d0d0d0"
                               : heat_colour(share));
      if (!std::isnan(r)) {
        svg.text(x + kCell / 2 - 0.5, y + 15, number(r),
                 {.size = number(r).size() > 3 ? 8.5 : 10.5,
                  .anchor = "middle",
                  .colour = share > 0.6 ? "#222" : "white"});
      }
    }
    if (i % 5 == 0) {
      svg.text(left - 6, y + 16, format("%lld", static_cast<long long>(i)),
               {.size = 11, .anchor = "end", .colour = "#777"});
      svg.text(left + kCell * (static_cast<double>(i) + 0.5),
               top + kCell * static_cast<double>(kTokens) + 14,
               format("%lld", static_cast<long long>(i)),
               {.size = 11, .anchor = "middle", .colour = "#777"});
    }
  }
}

void relative_positions(const std::string& path) {
  constexpr double kPanel = 460, kRow = 480;
  Svg svg(3 * kPanel + 20, 2 * kRow + 115);
  svg.text(40, 34, "How far a key seems to be from a query", {.size = 22, .bold = true});
  svg.text(40, 57,
           "rows: queries i, columns: keys j <= i; the number and the colour are the relative "
           "position that the rotation shows, d = i - j the true one",
           {.colour = "#555"});
  svg.text(40, 76, "dark grey: masked although it is in the past", {.colour = "#555"});
  const std::vector<Family> all = families();
  for (std::size_t at = 0; at < all.size(); ++at) {
    print_family(all[at]);
    draw_family(svg, 50 + kPanel * static_cast<double>(at % 3),
                145 + kRow * static_cast<double>(at / 3), all[at]);
  }
  // The scale of colours, common to all pictures.
  const double y = 2 * kRow + 88;
  for (int step = 0; step < 60; ++step)
    svg.rect(50 + 5 * step, y, 5.5, 14, heat_colour(step / 59.0));
  svg.text(355, y + 12,
           format("relative position 0 ... %lld", static_cast<long long>(kTokens - 1)));
  svg.save(path);
}

// ---- A mixed sequence ----------------------------------------------------------------------------

/// (row, column) of every token of one scheme.
struct Placement {
  const char* name;
  const char* what;
  eb::Matrix<double> at;
  double next;
};

struct Sequence {
  std::vector<eb::TokenSegment> segments;
  std::vector<std::string> labels;
  std::vector<bool> is_text;
};

Sequence example_sequence() {
  Sequence s{{eb::text_tokens(3), eb::image_patches(3, 4), eb::text_tokens(3)}, {}, {}};
  int word = 0;
  for (const eb::TokenSegment& segment : s.segments) {
    if (segment.kind == eb::SegmentKind::text) {
      for (Index i = 0; i < segment.t; ++i) {
        s.labels.push_back(format("t%d", word++));
        s.is_text.push_back(true);
      }
      continue;
    }
    for (Index r = 0; r < segment.h; ++r) {
      for (Index c = 0; c < segment.w; ++c) {
        s.labels.push_back(
            format("%lld,%lld", static_cast<long long>(r), static_cast<long long>(c)));
        s.is_text.push_back(false);
      }
    }
  }
  return s;
}

std::vector<Placement> placements(const Sequence& s) {
  const auto tie = [&](eb::RopeTieVariant variant) {
    return eb::rope_tie_positions(s.segments, variant);
  };
  const auto v1 = tie(eb::RopeTieVariant::v1_integer), v1e = tie(eb::RopeTieVariant::v1_equivalent),
             v2 = tie(eb::RopeTieVariant::v2);
  const auto m = eb::mrope_positions(s.segments, {.spatial_merge = 1});
  return {
      {"RoPE-Tie v1, integers", "text on the diagonal, the image spread over (w+1)(h+1) - 1 places",
       v1.positions, v1.next},
      {"RoPE-Tie v1, equivalent", "the image takes wh places, its steps are fractions",
       v1e.positions, v1e.next},
      {"RoPE-Tie v2", "unit steps, the image centred in its wh places", v2.positions, v2.next},
      {"M-RoPE (rows and columns)", "the image in the corner: short, but not symmetric",
       m.positions.rightCols(2).cast<double>(), static_cast<double>(m.next)},
  };
}

void print_placement(const Placement& p, const Sequence& s) {
  std::printf("\n%s: %s\n  %-8s", p.name, p.what, "token");
  for (const std::string& label : s.labels) std::printf("%6s", label.c_str());
  const char* names[] = {"row", "column"};
  for (Index axis = 0; axis < 2; ++axis) {
    std::printf("\n  %-8s", names[axis]);
    for (Index t = 0; t < p.at.rows(); ++t) std::printf("%6s", number(p.at(t, axis)).c_str());
  }
  std::printf("\n  text behind it would stand at %s\n", number(p.next).c_str());
}

void draw_placement(Svg& svg, double left, double top, const Placement& p, const Sequence& s,
                    double largest) {
  constexpr double kSize = 470;
  const auto x = [&](double column) { return left + kSize * (column + 0.5) / (largest + 1); };
  const auto y = [&](double row) { return top + kSize * (row + 0.5) / (largest + 1); };
  svg.text(left, top - 32, p.name, {.size = 17, .bold = true});
  svg.text(left, top - 13, p.what, {.size = 13, .colour = "#555"});
  for (double tick = 0; tick <= largest; ++tick) {
    svg.line(x(tick), y(0), x(tick), y(largest), {"#ececec"});
    svg.line(x(0), y(tick), x(largest), y(tick), {"#ececec"});
    if (std::fmod(tick, 5) == 0) {
      svg.text(x(tick), top + kSize + 12, number(tick),
               {.size = 11, .anchor = "middle", .colour = "#777"});
      svg.text(left - 4, y(tick) + 4, number(tick),
               {.size = 11, .anchor = "end", .colour = "#777"});
    }
  }
  svg.line(x(0), y(0), x(largest), y(largest), {"#bbbbbb", 1, "4 4"});
  for (Index t = 0; t < p.at.rows(); ++t) {
    const auto at = static_cast<std::size_t>(t);
    const double px = x(p.at(t, 1)), py = y(p.at(t, 0));
    if (s.is_text[at]) {
      svg.circle(px, py, 8, "#d1495b");
    } else {
      svg.rect(px - 9, py - 7, 18, 14, "#1f77b4");
    }
    svg.text(px, py + 3, s.labels[at], {.size = 8, .anchor = "middle", .colour = "white"});
  }
}

void mixed_sequence(const std::string& path) {
  const Sequence s = example_sequence();
  const std::vector<Placement> all = placements(s);
  double largest = 0;
  for (const Placement& p : all) {
    print_placement(p, s);
    largest = std::max(largest, p.at.maxCoeff());
  }
  Svg svg(1120, 1250);
  svg.text(40, 34, "Where three words, an image of 3 x 4 patches and three words stand",
           {.size = 22, .bold = true});
  svg.text(40, 57,
           "red: words t0 ... t5; blue: patches, named row,column in the image. Downwards the "
           "position on the row axis, to the right on the column axis.",
           {.colour = "#555"});
  for (std::size_t i = 0; i < all.size(); ++i) {
    draw_placement(svg, 50 + 550 * static_cast<double>(i % 2),
                   130 + 580 * static_cast<double>(i / 2), all[i], s, largest);
  }
  svg.save(path);
}

int run(int argc, char** argv) {
  const std::string here = std::filesystem::path(argv[0]).parent_path().string();
  Arguments arguments({{"out", here.empty() ? "." : here}});
  arguments.parse(argc, argv);
  const std::string out = arguments.text("out");
  relative_positions(out + "/positions_relative.svg");
  mixed_sequence(out + "/positions_mixed.svg");
  std::printf("\nwrote %s/positions_relative.svg and positions_mixed.svg\n", out.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return example::run_program("03_positions", run, argc, argv); }
