// Which layer of HWFA attends how: windows, plans, cache sizes, and the receptive field counted by chasing dependencies.
#include <eigenblocks/attention/hwfa.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// How many inputs one late token depends on, by following windows layer by layer.
Index chased_field(const HwfaPlan& plan, Index tokens) {
  Eigen::Matrix<bool, Eigen::Dynamic, 1> reached =
      Eigen::Matrix<bool, Eigen::Dynamic, 1>::Constant(tokens, false);
  reached[tokens - 1] = true;
  for (const HwfaLayer& layer : plan.layers) {
    if (layer.span == HwfaSpan::full) continue;
    const auto before = reached;
    for (Index i = 0; i < tokens; ++i) {
      for (Index j = std::max<Index>(0, i - layer.window + 1); before[i] && j <= i; ++j)
        reached[j] = true;
    }
  }
  return reached.count();
}

bool same(const HwfaLayer& a, const HwfaLayer& b) {
  return a.span == b.span && a.position == b.position && a.logn == b.logn && a.window == b.window &&
         a.rerope_window == b.rerope_window;
}

}  // namespace

TEST_CASE("hwfa_window is the largest window whose receptive field stays within alpha N") {
  CHECK(hwfa_window(24, 512) == 17);  // the post took 16
  CHECK(hwfa_window(12, 128, 0.5) == 6);
  CHECK(hwfa_window(2, 1, 1.0) == 1);
  CHECK(hwfa_window(5, 2, 0.5) == 1);
  CHECK(hwfa_window(11, 1000, 0.1) == 10);  // 99 / 10 rounds down
  CHECK(hwfa_window(12, 1000, 0.1) == 10);  // 99 / 11 = 9 on paper, and alpha is not exact
  CHECK(0.29 * 100 < 29);
  CHECK(hwfa_window(2, 100, 0.29) == 29);  // an integer on paper does not round down
  for (Index layers = 2; layers < 40; ++layers) {
    for (const Index length : {2, 7, 64, 100, 512, 100'000}) {
      for (const Index percent : {50, 57, 58, 75, 90, 100}) {
        if (length > 512 && percent % 25 != 0)
          continue;  // alpha N is off by more than the rule forgives
        const Index w = hwfa_window(layers, length, static_cast<double>(percent) / 100);
        CHECK(100 * hwfa_receptive_field(layers, w) <= percent * length);
        CHECK(100 * hwfa_receptive_field(layers, w + 1) > percent * length);
      }
    }
  }
}

TEST_CASE("hwfa_plan: windows with RoPE, then one full layer without positions") {
  const HwfaPlan plan = hwfa_plan(6, 4);
  REQUIRE(plan.layers.size() == 6);
  for (std::size_t l = 0; l < 5; ++l)
    CHECK(same(plan.layers[l], {HwfaSpan::window, HwfaPosition::rope, false, 4, 0}));
  CHECK(same(plan.layers[5], {HwfaSpan::full, HwfaPosition::nope, true, 0, 0}));
  CHECK(plan.full_layers() == 1);
  CHECK(plan.receptive_field() == 16);
  CHECK(plan.receptive_field() == hwfa_receptive_field(6, 4));
  CHECK(plan.receptive_field() == chased_field(plan, 50));
  CHECK(hwfa_plan(2, 1).receptive_field() == 1);
}

TEST_CASE("hwfa2_plan: full layers at i L / (f + 1); ReRoPE and log n come at inference") {
  const struct {
    Index layers, full;
    std::vector<std::size_t> at;
  } cases[] = {{12, 1, {6}},         {7, 1, {3}}, {24, 2, {8, 16}},       {12, 3, {3, 6, 9}},
               {5, 4, {1, 2, 3, 4}}, {2, 1, {1}}, {7, 5, {1, 2, 3, 4, 5}}};
  for (const auto& c : cases) {
    CAPTURE(c.layers);
    CAPTURE(c.full);
    const Hwfa2Options options{.window = 3, .full_layers = c.full, .rerope_window = 9};
    for (const HwfaPhase phase : {HwfaPhase::training, HwfaPhase::inference}) {
      const bool late = phase == HwfaPhase::inference;
      const HwfaPlan plan = hwfa2_plan(c.layers, options, phase);
      REQUIRE(static_cast<Index>(plan.layers.size()) == c.layers);
      CHECK(plan.full_layers() == c.full);
      CHECK(plan.receptive_field() == 2 * (c.layers - c.full) + 1);
      CHECK(plan.receptive_field() == chased_field(plan, 100));
      for (std::size_t l = 0, next = 0; l < plan.layers.size(); ++l) {
        const bool full = next < c.at.size() && c.at[next] == l;
        if (full) ++next;
        const HwfaLayer want =
            full ? HwfaLayer{HwfaSpan::full, late ? HwfaPosition::rerope : HwfaPosition::rope, late,
                             0, late ? Index(9) : Index(0)}
                 : HwfaLayer{HwfaSpan::window, HwfaPosition::rope, false, 3, 0};
        CHECK(same(plan.layers[l], want));
      }
    }
  }
  const HwfaPlan defaults = hwfa2_plan(24, {}, HwfaPhase::inference);
  CHECK(defaults.layers[12].rerope_window == 256);
  CHECK(defaults.layers[0].window == 64);
}

TEST_CASE("the cache holds 2 kv_heads head_dim (N f + (L - f) min(N, w)) scalars") {
  for (const Index full : {1, 2, 5}) {
    const Index layers = 12, window = 16;
    const HwfaPlan plan =
        hwfa2_plan(layers, {.window = window, .full_layers = full}, HwfaPhase::training);
    for (const Index n : {0, 1, 15, 16, 17, 4096}) {
      CHECK(plan.cache_scalars(n, 2, 64) ==
            2 * 2 * 64 * (n * full + (layers - full) * std::min(n, window)));
    }
  }
  CHECK(hwfa_plan(24, 16).cache_scalars(100'000, 8, 128) ==
        2 * 8 * 128 * (100'000 + Index(23) * 16));
}

TEST_CASE("bad input, with its message") {
  const auto plan2 = [](Index layers, const Hwfa2Options& options) {
    return [=] { (void)hwfa2_plan(layers, options, HwfaPhase::training); };
  };
  const struct {
    std::function<void()> call;
    std::string text;
  } errors[] = {
      {[] { (void)hwfa_window(1, 512); }, "layers (1) must be at least 2"},
      {[] { (void)hwfa_window(24, 0); }, "train_length (0) must be at least 1"},
      {[] { (void)hwfa_window(24, 512, 0.0); }, "alpha (0) must be in (0, 1]"},
      {[] { (void)hwfa_window(24, 512, 1.5); }, "alpha (1.5) must be in (0, 1]"},
      {[] { (void)hwfa_window(24, 512, kNaN); }, "alpha (nan) must be in (0, 1]"},
      {[] { (void)hwfa_window(24, 1, 0.5); },
       "alpha (0.5) times train_length (1) must be at least 1"},
      {[] { (void)hwfa_receptive_field(1, 16); }, "layers (1) must be at least 2"},
      {[] { (void)hwfa_receptive_field(24, 0); }, "window (0) must be at least 1"},
      {[] { (void)hwfa_plan(1, 16); }, "layers (1) must be at least 2"},
      {[] { (void)hwfa_plan(24, -3); }, "window (-3) must be at least 1"},
      {plan2(1, {}), "layers (1) must be at least 2"},
      {plan2(4, {.window = 0}), "window (0) must be at least 1"},
      {plan2(4, {.full_layers = 0}), "full_layers (0) must be in [1, layers - 1], layers is 4"},
      {plan2(4, {.full_layers = 4}), "full_layers (4) must be in [1, layers - 1], layers is 4"},
      {plan2(4, {.rerope_window = 0}), "rerope_window (0) must be at least 1"},
      {[] { (void)hwfa_plan(4, 2).cache_scalars(-1, 1, 1); }, "tokens (-1) must not be negative"},
      {[] { (void)hwfa_plan(4, 2).cache_scalars(1, 0, 1); }, "kv_heads (0) must be at least 1"},
      {[] { (void)hwfa_plan(4, 2).cache_scalars(1, 1, 0); }, "head_dim (0) must be at least 1"},
  };
  for (const auto& error : errors) {
    CHECK_THROWS_WITH_AS(error.call(), ("eigenblocks: " + error.text).c_str(), invalid_argument);
  }
}
