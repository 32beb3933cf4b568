// The library's masks and scores compiled into the kernels, as users get them: the same bits as behind virtual calls, which
// the other tests have compared with the reference.
#include "support/attention_case.hpp"

#include <eigenblocks/attention/kernel.hpp>

#include <doctest/doctest.h>

namespace {

using namespace attention_test;

constexpr ProblemOptions kOptions{.queries = 55,
                                  .keys = 140,
                                  .heads = 4,
                                  .kv_heads = 2,
                                  .query_offset = 85,
                                  .sinks = true,
                                  .upstream_lse = true};

template <class M, class F>
void check_rule(const M& mask, const F& score, const AnyRule& erased) {
  const Problem p(kOptions);
  const auto rule = eb::attention_rule(mask, score);
  Outcome<double> got(p);
  const auto saved = eb::attention_forward(p.q, p.k, p.v, got.out, p.shape, rule, p.tensors());
  got.lse = saved.lse;
  const auto gradients = got.gradients(&p.dlse);
  auto copy = gradients;
  eb::attention_backward(saved, p.q, p.k, p.v, got.out, p.dout, got.dq, got.dk, got.dv, p.shape,
                         rule, p.tensors(), &copy);
  CHECK(got == tiled<double>(p, erased));
}

}  // namespace

TEST_CASE("causal, windows, prefix") {
  const auto mask = (eb::causal() | eb::prefix(20)) & eb::window_left(60);
  check_rule(mask, eb::identity(), {mask});
}

TEST_CASE("soft cap and ALiBi") {
  const auto score = eb::compose(eb::soft_cap(2.0), eb::alibi(eb::alibi_slopes(4)));
  check_rule(eb::causal(), score, {eb::causal(), score});
}

TEST_CASE("the defaults of the short form: full attention, 1/sqrt(head_dim), serial") {
  const Problem p({.queries = 9, .keys = 14, .heads = 2});
  const Matrix<double> out = eb::attention(p.q, p.k, p.v, p.shape);
  CHECK(out == tiled<double>(p).out);
}
