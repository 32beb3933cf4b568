// Every optional member of a mask must tell the same story as its operator().
#include "support/attention_rule.hpp"

#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

namespace {

using namespace attention_test;
using eb::KeyRange;
using eb::TileClass;

/// A mask of a user: blocks on the diagonal, with an exact classification but no lanes.
struct Blocks {
  Index size = 4;
  bool operator()(Index i, Index j, Index) const { return i / size == j / size; }
  TileClass classify(Index i0, Index i1, Index j0, Index j1) const {
    const Index i_first = i0 / size, i_last = (i1 - 1) / size, j_first = j0 / size,
                j_last = (j1 - 1) / size;
    if (i_first > j_last || j_first > i_last) return TileClass::empty;
    return i_first == i_last && j_first == j_last && i_first == j_first ? TileClass::full
                                                                        : TileClass::partial;
  }
};

struct Named {
  std::string name;
  AnyMask mask;
  bool exact = false;  // classify says partial only where visible and hidden pairs are mixed
};

const auto kOddPairs = [](Index i, Index j) { return (i + 3 * j) % 4 != 1; };
const auto kHeadWindow = [](Index i, Index j, Index h) { return j >= i - 2 * h; };

std::vector<Named> all_masks() {
  using namespace eigenblocks;
  return {
      {"full", full(), true},
      {"causal", causal(), true},
      {"window_left 0", window_left(0), true},
      {"window_left 5", window_left(5), true},
      {"window_left max", window_left(std::numeric_limits<Index>::max()), true},
      {"window_right 0", window_right(0), true},
      {"window_right 7", window_right(7), true},
      {"window_right max", window_right(std::numeric_limits<Index>::max()), true},
      {"prefix 0", prefix(0), true},
      {"prefix 9", prefix(9), true},
      {"blocks", Blocks{}, true},
      {"lambda", kOddPairs},
      {"lambda with heads", kHeadWindow},
      {"causal & window_left", causal() & window_left(6)},
      {"window_left & window_right", window_left(3) & window_right(2)},
      {"causal | prefix", causal() | prefix(8)},
      {"(causal | prefix) & window", (causal() | prefix(8)) & window_left(11)},
      {"causal & lambda", causal() & kOddPairs},
      {"lambda & causal", kHeadWindow & causal()},
      {"prefix | window & blocks", prefix(2) | (window_left(4) & Blocks{})},
      {"prefix 0 | causal", prefix(0) | causal()},
      {"causal & full", causal() & full()},
      {"causal | full", causal() | full()},
      {"disjoint", window_left(0) & window_right(0) & prefix(3)},
  };
}

}  // namespace

TEST_CASE("classify: empty means nothing visible, full means everything") {
  eb::Random random(1);
  for (const Named& m : all_masks()) {
    CAPTURE(m.name);
    for (int trial = 0; trial < 400; ++trial) {
      const Index i0 = random.below(30), j0 = random.below(30), i1 = i0 + 1 + random.below(12),
                  j1 = j0 + 1 + random.below(12);
      const Index h = random.below(3);
      int visible = 0, pairs = 0;
      for (Index i = i0; i < i1; ++i) {
        for (Index j = j0; j < j1; ++j, ++pairs) visible += m.mask(i, j, h);
      }
      const TileClass kind = m.mask.classify(i0, i1, j0, j1);
      if (kind == TileClass::empty) CHECK(visible == 0);
      if (kind == TileClass::full) CHECK(visible == pairs);
      if (m.exact) CHECK((kind == TileClass::partial) == (visible > 0 && visible < pairs));
    }
  }
}

TEST_CASE("key_range holds every visible key") {
  eb::Random random(2);
  for (const Named& m : all_masks()) {
    CAPTURE(m.name);
    for (int trial = 0; trial < 200; ++trial) {
      const Index i0 = random.below(60) - 20,
                  i1 = i0 + 1 + random.below(12);  // queries may come before key 0
      const KeyRange range = m.mask.key_range(i0, i1);
      for (Index i = i0; i < i1; ++i) {
        for (Index j = 0; j < 50; ++j) {
          if (m.mask(i, j, 1)) CHECK((range.begin <= j && j < range.end));
        }
      }
    }
  }
}

TEST_CASE("key_range is tight where work would be wasted") {
  using namespace eigenblocks;
  const auto same = [](KeyRange a, Index begin, Index end) {
    return a.begin == begin && a.end == end;
  };
  constexpr Index kEnd = std::numeric_limits<Index>::max();
  CHECK(same(causal().key_range(5, 8), 0, 8));
  CHECK(same(causal().key_range(-5, -2), 0, 0));
  CHECK(same(window_left(3).key_range(5, 8), 2, kEnd));
  CHECK(same(window_left(3).key_range(1, 8), 0, kEnd));
  CHECK(same(window_right(3).key_range(5, 8), 0, 11));
  CHECK(same(prefix(4).key_range(5, 8), 0, 4));
  CHECK(same((causal() & window_left(3)).key_range(5, 8), 2, 8));
  CHECK(same((causal() | prefix(20)).key_range(5, 8), 0, 20));
  CHECK(same((causal() & kOddPairs).key_range(5, 8), 0, 8));
  CHECK(same((prefix(0) | (causal() & window_left(1))).key_range(5, 8), 4,
             8));  // an empty side adds nothing
}

TEST_CASE_TEMPLATE("lanes agree with operator() for every lane, near and far", S, float, double) {
  using P = eb::simd::Packet<S>;
  constexpr int w = eb::simd::kLanes<S>;
  eb::Random random(3);
  for (const Named& m : all_masks()) {
    CAPTURE(m.name);
    for (int trial = 0; trial < 300; ++trial) {
      // Positions up to 10^9: floats could not hold them, differences must.
      const Index base = trial % 3 == 0 ? 0 : trial % 3 == 1 ? 10'000'019 : 1'000'000'007;
      const Index i0 = base + random.below(40), j = (trial % 5 == 0 ? 0 : base) + random.below(60);
      const Index first = w * random.below(3), h = random.below(3);
      const P keep = m.mask.lanes(eb::simd::iota<P>(static_cast<S>(first)), i0, j, h);
      S visible[std::size_t(w)];
      eb::simd::store<P>(visible,
                         eb::simd::select(keep, eb::simd::set1<P>(S(1)), eb::simd::zero<P>()));
      for (int x = 0; x < w; ++x) CHECK(visible[x] == (m.mask(i0 + first + x, j, h) ? S(1) : S(0)));
    }
  }
}

TEST_CASE("masks without lanes are never asked about queries beyond the last") {
  using P = eb::simd::Packet<double>;
  Index most = 0;
  const auto spy =
      eb::detail::as_mask([&](Index i, Index) { return most = std::max(most, i), true; });
  (void)eb::detail::mask_lanes<P>(spy, eb::simd::iota<P>(0.0), 100, 0, 101, 5, 0);
  CHECK(most <= 101);
  CHECK(most >= 100);
}

TEST_CASE("same_document compares ids and refuses positions it has none for") {
  const std::vector<Index> ids{0, 0, 1, 1, 1, 0};
  const auto mask = eb::same_document(ids);
  for (Index i = 0; i < 6; ++i) {
    for (Index j = 0; j < 6; ++j) {
      CHECK(mask(i, j, 0) ==
            (ids[static_cast<std::size_t>(i)] == ids[static_cast<std::size_t>(j)]));
    }
  }
  CHECK_THROWS_WITH_AS((void)mask(6, 0, 0),
                       "eigenblocks: same_document: position (6) is outside [0, 6)",
                       std::out_of_range);
  CHECK_THROWS_AS((void)mask(0, -1, 0), std::out_of_range);
}

TEST_CASE("same_document: tiles and ranges of sorted and of interleaved documents") {
  using eb::Index;
  eb::Random random(6);
  for (const bool sorted : {true, false}) {
    std::vector<Index> ids(40);
    for (Index& id : ids) id = random.below(5);
    if (sorted) std::sort(ids.begin(), ids.end());
    const auto mask = eb::same_document(ids);
    int known = 0;
    for (int trial = 0; trial < 600; ++trial) {
      const Index i0 = random.below(40), j0 = random.below(40);
      const Index i1 = i0 + 1 + random.below(std::min<Index>(6, 40 - i0)),
                  j1 = j0 + 1 + random.below(std::min<Index>(6, 40 - j0));
      const TileClass kind = mask.classify(i0, i1, j0, j1);
      const KeyRange range = mask.key_range(i0, i1);
      int visible = 0;
      for (Index i = i0; i < i1; ++i) {
        for (Index j = j0; j < j1; ++j) {
          visible += mask(i, j, 0);
          if (mask(i, j, 0)) CHECK((range.begin <= j && j < range.end));
        }
      }
      if (kind == TileClass::empty) CHECK(visible == 0);
      if (kind == TileClass::full) CHECK(visible == (i1 - i0) * (j1 - j0));
      known += kind != TileClass::partial;
      if (sorted) {
        CHECK((kind == TileClass::empty) == (visible == 0));
        CHECK((range.begin == 0 ||
               ids[static_cast<std::size_t>(range.begin - 1)] < ids[static_cast<std::size_t>(i0)]));
      }
    }
    CHECK(known > 50);
    CHECK_THROWS_AS((void)mask.classify(38, 41, 0, 1), std::out_of_range);
    CHECK_THROWS_AS((void)mask.classify(0, 1, 39, 41), std::out_of_range);
  }
  const std::vector<Index> ids{0, 0, 1};
  CHECK_THROWS_AS((void)eb::same_document(ids).key_range(2, 4), std::out_of_range);
}

TEST_CASE("what is a mask: two or three positions, anything convertible to bool") {
  using namespace eigenblocks;
  struct Nothing {};
  const auto integer = [](Index i, Index j) { return static_cast<int>(i - j); };
  static_assert(Mask<CausalMask> && Mask<decltype(kOddPairs)> && Mask<decltype(kHeadWindow)> &&
                Mask<decltype(integer)>);
  static_assert(!Mask<Nothing> && !Mask<int>);
  CHECK((causal() & integer)(5, 4, 0));
  CHECK_FALSE((causal() & integer)(5, 5, 0));
  CHECK((causal() | integer)(4, 5, 0));
}

TEST_CASE("sizes must not be negative") {
  CHECK_THROWS_WITH_AS(eb::window_left(-1),
                       "eigenblocks: window_left: window (-1) must not be negative",
                       eb::invalid_argument);
  CHECK_THROWS_WITH_AS(eb::window_right(-2),
                       "eigenblocks: window_right: window (-2) must not be negative",
                       eb::invalid_argument);
  CHECK_THROWS_WITH_AS(eb::prefix(-3), "eigenblocks: prefix: length (-3) must not be negative",
                       eb::invalid_argument);
}
