// Rules over a cache: score functors by lanes (those that depend on i - j only) and one by one, masks of users, float.
#include "unit/attention/decode_case.hpp"

namespace {

using namespace attention_test;

ProblemOptions self(Index tokens) {
  return {.queries = tokens,
          .keys = tokens,
          .heads = 4,
          .kv_heads = 2,
          .dim = 6,
          .value_dim = 5,
          .sinks = true};
}

/// Depends on i and j separately, has no lanes: decoding must ask it pair by pair.
struct ByPosition {
  template <class S>
  S operator()(S s, Index i, Index j, Index h) const {
    return s + S(0.1) * static_cast<S>((i * 3 + j * 5) % 7) - S(0.2) * static_cast<S>(h);
  }
  template <class S>
  S grad(S, Index, Index, Index) const {
    return S(1);
  }
};

}  // namespace

TEST_CASE("soft cap and ALiBi through their lanes, in float, growing and in a ring") {
  const auto score = eb::compose(eb::soft_cap(2.0), eb::alibi(eb::alibi_slopes(4)));
  static_assert(decltype(score)::relative);
  const auto rule = eb::attention_rule(eb::causal(), score);
  check_decode<float>(Problem(self(80)), rule, {eb::causal(), score});
  check_decode<float>(Problem(self(200)), rule, {eb::causal(), score}, {.window = 50, .chunk = 9});
}

TEST_CASE("a user's functor of both positions, a user's mask, in double") {
  const auto keep = [](Index i, Index j) { return i == j || (i + j) % 3 != 0; };
  const auto rule = eb::attention_rule(eb::causal() & keep, ByPosition{});
  check_decode<double>(Problem(self(80)), rule, {eb::causal() & keep, ByPosition{}});
  check_decode<double>(Problem(self(120)), rule, {eb::causal() & keep, ByPosition{}},
                       {.window = 31, .chunk = 4});
}

TEST_CASE("slopes must match the heads") {
  const Problem p(self(3));
  eb::KvCache<float> cache(cache_options(p));
  const auto rule = eb::attention_rule(
      eb::causal(), eb::compose(eb::soft_cap(2.0), eb::alibi(eb::alibi_slopes(3))));
  CHECK_THROWS_WITH_AS(step_through<float>(p, cache, rule, [](Index) { return Index{1}; }),
                       "eigenblocks: alibi slopes has 3 entries, expected 4 (one per query head)",
                       eb::invalid_argument);
  CHECK(cache.size() == 0);
}
