// The tiled forward and backward against the reference: every tensor, over a grid of shapes, tile sizes and options.
#include "support/attention_case.hpp"

#include <doctest/doctest.h>

#include <vector>

namespace {

using namespace attention_test;

constexpr Index kTile =
    eb::simd::kLanes<double> * 3;  // queries of a register tile in double, on most targets
constexpr Index kFloatTile = eb::simd::kLanes<float> * 3;

/// Both scalars against the reference, and a few tile sizes in double.
void check_case(const ProblemOptions& options, const AnyRule& rule = {}) {
  const Problem p(options);
  CAPTURE(options.queries);
  CAPTURE(options.keys);
  CAPTURE(options.dim);
  CAPTURE(options.value_dim);
  const Outcome<double> want = oracle(p, rule);
  check_close(tiled<double>(p, rule), want, p);
  check_close(tiled<float>(p, rule), want, p);
}

/// Masks of every kind; offsets move the diagonal through the problem.
std::vector<AnyRule> masks(Index keys) {
  return {
      {},
      {eb::causal()},
      {eb::window_left(3)},
      {eb::causal() & eb::window_left(keys / 3)},
      {eb::window_left(2) & eb::window_right(1)},
      {eb::causal() | eb::prefix(keys / 2)},
      {AnyMask([](Index i, Index j) { return (i * 7 + j * 3) % 5 != 0; }) & eb::window_right(4)}};
}

}  // namespace

TEST_CASE("numbers of queries and keys around the tile sizes") {
  for (const Index queries :
       {Index{0}, Index{1}, kTile - 1, kTile, kTile + 1, Index{53}, kFloatTile + 1}) {
    for (const Index keys : {0, 1, 5, 16, 37, 129}) {
      check_case({.queries = queries,
                  .keys = keys,
                  .heads = 2,
                  .dim = 5,
                  .value_dim = 7,
                  .upstream_lse = keys > 0});
      check_case({.queries = queries,
                  .keys = keys,
                  .heads = 2,
                  .kv_heads = 1,
                  .dim = 8,
                  .value_dim = 3,
                  .query_offset = keys - queries},
                 {eb::causal()});
    }
  }
}

TEST_CASE("widths: one channel, odd, different for keys and values, wider than a register block") {
  for (const Index dim : {1, 2, 7, 16, 31, 64}) {
    for (const Index value_dim : {0, 1, 3, 17, 40}) {
      check_case({.queries = 21,
                  .keys = 26,
                  .heads = 2,
                  .dim = dim,
                  .value_dim = value_dim,
                  .query_offset = 5},
                 {eb::causal()});
    }
  }
}

TEST_CASE("every mask, offsets before, inside and beyond the keys") {
  for (const AnyRule& rule : masks(41)) {
    for (const Index offset : {-60, -11, 0, 13, 80}) {
      check_case({.queries = 33, .keys = 41, .heads = 2, .kv_heads = 1, .query_offset = offset},
                 rule);
    }
    check_case(
        {.queries = 33, .keys = 41, .heads = 1, .query_offset = 1'000'017, .key_offset = 1'000'000},
        rule);
  }
}

TEST_CASE("each optional operand alone and all together, under plain, capped and biased scores") {
  const AnyScore scores[] = {eb::identity(), eb::soft_cap(1.5), eb::alibi(eb::alibi_slopes(4)),
                             eb::compose(eb::soft_cap(2.0), eb::alibi(eb::alibi_slopes(4)))};
  std::vector<AnyRule> rules{{}, {eb::causal()}};
  for (const AnyScore& score : scores) rules.push_back({eb::causal() & eb::window_left(30), score});
  for (const AnyRule& rule : rules) {
    for (int bits = 0; bits <= 6; ++bits) {
      const bool all = bits == 6;
      check_case({.queries = 45,
                  .keys = 52,
                  .heads = 4,
                  .kv_heads = 2,
                  .query_offset = 7,
                  .bias = bits == 1 || all,
                  .shared_bias = bits == 2,
                  .keep = bits == 3 || all,
                  .row_scale = bits == 4 || all,
                  .sinks = bits == 5 || all,
                  .upstream_lse = all},
                 rule);
    }
  }
}

TEST_CASE("scale: default, zero, negative, large") {
  for (const double scale : {0.0, -0.7, 1e-3, 5.0}) {
    check_case({.queries = 30, .keys = 40, .heads = 2, .scale = scale}, {eb::causal()});
    check_case(
        {.queries = 30, .keys = 40, .heads = 2, .scale = scale, .bias = true, .row_scale = true});
  }
  // scale 0 is the mean over the visible keys.
  const Problem p({.queries = 5, .keys = 5, .scale = 0.0});
  const Outcome<double> got = tiled<double>(p, {eb::causal()});
  for (Index i = 0; i < 5; ++i) {
    CHECK((got.out.row(i) - p.v.topRows(i + 1).colwise().mean()).cwiseAbs().maxCoeff() < 1e-15 * 8);
    CHECK(got.lse(i, 0) == doctest::Approx(std::log(static_cast<double>(i + 1))).epsilon(1e-14));
  }
  CHECK((got.dq.array() == 0.0).all());
  CHECK((got.dk.array() == 0.0).all());
}

TEST_CASE("tile sizes, key chunks and register tiles change nothing but rounding") {
  const ProblemOptions options{.queries = 67,
                               .keys = 150,
                               .heads = 4,
                               .kv_heads = 2,
                               .dim = 9,
                               .value_dim = 6,
                               .query_offset = 83,
                               .bias = true,
                               .keep = true,
                               .row_scale = true,
                               .sinks = true,
                               .upstream_lse = true};
  ProblemOptions plain = options;
  plain.bias = plain.row_scale = false;
  ProblemOptions plainest = plain;  // nothing but the rule: tiles that are fully visible
  plainest.keep = false;
  for (const AnyRule& rule :
       {AnyRule{}, AnyRule{eb::causal()},
        AnyRule{eb::causal() & eb::window_left(20), eb::soft_cap(2.0)},
        AnyRule{AnyMask([](Index i, Index j) { return (i + 2 * j) % 7 < 4; })}}) {
    for (const ProblemOptions& o : {options, plain, plainest}) {
      const Problem p(o);
      const Outcome<double> want = oracle(p, rule);
      for (const Index block : {1, 3, 64, 1000}) {
        CAPTURE(block);
        for (const auto& [tiles, packed] :
             {std::pair<Index, Index>{1, 700}, {3, 1}, {16, Index{1} << 20}, {100, 700}}) {
          CAPTURE(tiles);
          CAPTURE(packed);
          const eb::detail::TileTuning tuning{
              .key_block = block, .query_tiles = tiles, .packed_scalars = packed};
          check_close(tiled<double>(p, rule, {.tuning = tuning}), want, p);
        }
        const auto narrow = [&](Index tiles) {
          return Run{.tuning = {.key_block = block, .query_tiles = tiles, .packed_scalars = 900},
                     .narrow = true};
        };
        check_close(tiled<double>(p, rule, narrow(1)), want, p);
        check_close(tiled<float>(p, rule, narrow(5)), want, p);
      }
    }
  }
}

TEST_CASE("many keys: several packed chunks by default sizes as well") {
  // 2 x 64 channels: a chunk of 2^20 packed scalars is 8192 keys.
  check_case({.queries = 3,
              .keys = 9001,
              .heads = 1,
              .dim = 64,
              .value_dim = 64,
              .query_offset = 8998,
              .sinks = true},
             {eb::causal()});
}
