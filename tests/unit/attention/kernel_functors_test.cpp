// Functors of users are first-class: masks and scores without any optional member, and scores with parameters to learn.
#include "support/attention_case.hpp"

#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <atomic>

namespace {

using namespace attention_test;

/// Extremes of the positions that a functor was asked about.
struct Asked {
  std::atomic<Index> i_low{1 << 20}, i_high{-1000}, j_low{1 << 20}, j_high{-1000}, h_high{-1};
  void note(Index i, Index j, Index h) {
    i_low = std::min<Index>(i_low, i);
    i_high = std::max<Index>(i_high, i);
    j_low = std::min<Index>(j_low, j);
    j_high = std::max<Index>(j_high, j);
    h_high = std::max<Index>(h_high, h);
  }
};

/// A mask with operator() only.
struct Stripes {
  Asked* asked;
  bool operator()(Index i, Index j, Index h) const {
    asked->note(i, j, h);
    return (i + 2 * j + h) % 3 != 0;
  }
};

/// A score with operator() and grad only.
struct Bent {
  Asked* asked;
  template <class S>
  S operator()(S s, Index i, Index j, Index h) const {
    asked->note(i, j, h);
    return s + S(0.05) * s * s * static_cast<S>(h + 1) + S(0.1) * static_cast<S>((i - 2 * j) % 5);
  }
  template <class S>
  S grad(S s, Index i, Index j, Index h) const {
    asked->note(i, j, h);
    return S(1) + S(0.1) * s * static_cast<S>(h + 1);
  }
};

template <class Rule>
Outcome<double> run(const Problem& p, const Rule& rule, eb::ExecutorRef executor = {}) {
  Outcome<double> r(p);
  const auto saved =
      eb::attention_forward(p.q, p.k, p.v, r.out, p.shape, rule, p.tensors(), executor);
  r.lse = saved.lse;
  auto gradients = r.gradients(p.options.upstream_lse ? &p.dlse : nullptr);
  eb::attention_backward(saved, p.q, p.k, p.v, r.out, p.dout, r.dq, r.dk, r.dv, p.shape, rule,
                         p.tensors(), &gradients, executor);
  return r;
}

}  // namespace

TEST_CASE(
    "a mask and a score without lanes: values, gradients, and no question about positions that do "
    "not exist") {
  for (const Index queries : {1, 23, 30}) {
    const Problem p({.queries = queries,
                     .keys = 41,
                     .heads = 4,
                     .kv_heads = 2,
                     .query_offset = 7,
                     .key_offset = 3});
    Asked mask, score, unused;
    const auto rule = eb::attention_rule(Stripes{&mask}, Bent{&score});
    const Outcome<double> got = run(p, rule);
    for (const Asked* asked : {&mask, &score}) {
      CHECK(asked->i_low >= 7);
      CHECK(asked->i_high <= 7 + queries - 1);
      CHECK(asked->j_low >= 3);
      CHECK(asked->j_high <= 3 + 40);
      CHECK(asked->h_high == 3);
    }
    check_close(got, oracle(p, {AnyMask(Stripes{&unused}), AnyScore(Bent{&unused})}), p);
  }
}

TEST_CASE(
    "learned ALiBi slopes: gradients against finite differences and the reference, added to what "
    "was there") {
  for (const Index kv_heads : {1, 4}) {
    const Problem p({.queries = 31,
                     .keys = 37,
                     .heads = 4,
                     .kv_heads = kv_heads,
                     .query_offset = 4,
                     .keep = true,
                     .sinks = true,
                     .upstream_lse = true});
    Matrix<double> slopes = 0.3 * eb::alibi_slopes(4);
    const auto rule_of = [&](Vector<double>& gradient) {
      const Vector<double> now = slopes.col(0);
      return eb::attention_rule(
          eb::causal(), eb::compose(eb::alibi_with_gradient(now, gradient), eb::soft_cap(2.0)));
    };
    Vector<double> gradient = Vector<double>::Constant(4, 10.0);
    const Outcome<double> got = run(p, rule_of(gradient));
    check_close(got,
                oracle(p, {eb::causal(), eb::compose(eb::alibi(Vector<double>(slopes.col(0))),
                                                     eb::soft_cap(2.0))}),
                p);

    const auto loss = [&] {
      Vector<double> unused(4);
      Outcome<double> r(p);
      const auto saved =
          eb::attention_forward(p.q, p.k, p.v, r.out, p.shape, rule_of(unused), p.tensors());
      return r.out.cwiseProduct(p.dout).sum() + saved.lse.cwiseProduct(p.dlse).sum();
    };
    const eb::GradcheckResult result =
        eb::gradcheck(loss, slopes, Matrix<double>(gradient.array() - 10.0));
    CHECK_MESSAGE(result.passed, result.message());

    for (const int workers : {2, 7}) {
      const eb::thread_pool pool(workers);
      Vector<double> again = Vector<double>::Constant(4, 10.0);
      CHECK(run(p, rule_of(again), pool) == got);
      CHECK(again == gradient);
    }
  }
}
