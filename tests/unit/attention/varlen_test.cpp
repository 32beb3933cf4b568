// Packed sequences: the bits of one call per sequence, the numbers of a document mask.
#include "support/attention_rule.hpp"

#include <eigenblocks/attention/varlen.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <string>
#include <vector>

namespace {

using namespace attention_test;
using eb::Matrix;
using eb::Vector;
using Lengths = std::vector<Index>;

constexpr Index kHeads = 4, kKvHeads = 2, kDim = 5, kValueDim = 3;

struct Packed {
  Lengths cu_q, cu_k;
  Matrix<double> q, k, v, dout, dlse;
  Vector<double> row_scale, sinks;
  eb::AttentionShape shape{.heads = kHeads, .kv_heads = kKvHeads};

  Packed(const Lengths& q_lengths, const Lengths& k_lengths) : cu_q{0}, cu_k{0} {
    for (const Index n : q_lengths) cu_q.push_back(cu_q.back() + n);
    for (const Index n : k_lengths) cu_k.push_back(cu_k.back() + n);
    eb::Random random(1);
    q = eb::normal_matrix<double>(random, cu_q.back(), kHeads * kDim);
    k = eb::normal_matrix<double>(random, cu_k.back(), kKvHeads * kDim);
    v = eb::normal_matrix<double>(random, cu_k.back(), kKvHeads * kValueDim);
    dout = eb::normal_matrix<double>(random, cu_q.back(), kHeads * kValueDim);
    dlse = eb::normal_matrix<double>(random, cu_q.back(), kHeads);
    row_scale = eb::normal_matrix<double>(random, cu_q.back(), 1);
    sinks = eb::normal_matrix<double>(random, kHeads, 1);
  }
  std::size_t sequences() const { return cu_q.size() - 1; }
};

struct Results {
  Matrix<double> out, lse, dq, dk, dv;
  Vector<double> drow_scale, dsinks;
  explicit Results(const Packed& p)
      : out(p.dout.rows(), p.dout.cols()),
        lse(p.q.rows(), kHeads),
        dq(p.q),
        dk(p.k),
        dv(p.v),
        drow_scale(p.q.rows()),
        dsinks(Vector<double>::Zero(kHeads)) {}
  friend bool operator==(const Results&, const Results&) = default;
};

template <class Rule>
Results packed(const Packed& p, const Rule& rule, bool extras, eb::ExecutorRef executor = {}) {
  Results r(p);
  eb::AttentionTensors<double> tensors;
  eb::AttentionTensorGradients<double> gradients{.upstream_lse = &p.dlse};
  if (extras) {
    tensors = {.row_scale = &p.row_scale, .sinks = &p.sinks};
    gradients.row_scale = &r.drow_scale;
    gradients.sinks = &r.dsinks;
  } else {
    r.drow_scale.setZero();
  }
  const auto saved = eb::attention_varlen_forward(p.q, p.k, p.v, p.cu_q, p.cu_k, r.out, p.shape,
                                                  rule, tensors, executor);
  r.lse = saved.lse;
  eb::attention_varlen_backward(saved, p.q, p.k, p.v, p.cu_q, p.cu_k, r.out, p.dout, r.dq, r.dk,
                                r.dv, p.shape, rule, tensors, &gradients, executor);
  return r;
}

/// One call per sequence, aligned at the bottom right.
template <class Rule>
Results one_by_one(const Packed& p, const Rule& rule, bool extras) {
  Results r(p);
  if (!extras) r.drow_scale.setZero();
  for (std::size_t b = 0; b < p.sequences(); ++b) {
    const Index q0 = p.cu_q[b], tq = p.cu_q[b + 1] - q0, k0 = p.cu_k[b], tk = p.cu_k[b + 1] - k0;
    eb::AttentionShape shape = p.shape;
    shape.query_offset = tk - tq;
    const Vector<double> rho = p.row_scale.segment(q0, tq);
    const Matrix<double> dlse = p.dlse.middleRows(q0, tq);
    Vector<double> drho(tq), dsinks(kHeads);
    eb::AttentionTensors<double> tensors;
    eb::AttentionTensorGradients<double> gradients{.upstream_lse = &dlse};
    if (extras) {
      tensors = {.row_scale = &rho, .sinks = &p.sinks};
      gradients.row_scale = &drho;
      gradients.sinks = &dsinks;
    }
    const auto q = p.q.middleRows(q0, tq);
    const auto k = p.k.middleRows(k0, tk);
    const auto v = p.v.middleRows(k0, tk);
    auto out = r.out.middleRows(q0, tq);
    const auto saved = eb::attention_forward(q, k, v, out, shape, rule, tensors);
    r.lse.middleRows(q0, tq) = saved.lse;
    eb::attention_backward(saved, q, k, v, out, p.dout.middleRows(q0, tq), r.dq.middleRows(q0, tq),
                           r.dk.middleRows(k0, tk), r.dv.middleRows(k0, tk), shape, rule, tensors,
                           &gradients);
    if (extras) {
      r.drow_scale.segment(q0, tq) = drho;
      r.dsinks += dsinks;
    }
  }
  return r;
}

void check_same(const Results& got, const Results& want) {
  CHECK(got.out == want.out);
  CHECK(got.lse == want.lse);
  CHECK(got.dq == want.dq);
  CHECK(got.dk == want.dk);
  CHECK(got.dv == want.dv);
  CHECK(got.drow_scale == want.drow_scale);
  CHECK((got.dsinks - want.dsinks).cwiseAbs().maxCoeff() < 1e-13);  // added in another order
}

}  // namespace

TEST_CASE("the bits of one call per sequence, sequences of length zero included") {
  const Lengths cases[][2] = {{{5, 17, 1, 30}, {5, 17, 1, 30}},
                              {{3, 0, 8}, {3, 0, 8}},
                              {{4, 9, 2}, {11, 9, 1}},
                              {{5, 6}, {0, 40}},
                              {{0, 7}, {12, 0}},
                              {{0, 0}, {0, 0}},
                              {{60}, {60}},
                              {{}, {}},
                              {{1, 1, 1, 1, 1, 1, 1}, {3, 1, 4, 1, 5, 9, 2}}};
  const AnyRule rules[] = {{eb::causal()}, {eb::window_left(4), eb::soft_cap(2.0)}};
  for (const auto& lengths : cases) {
    const Packed p(lengths[0], lengths[1]);
    for (const AnyRule& rule : rules) {
      for (const bool extras : {false, true}) {
        rule.visit([&](const auto& concrete) {
          const Results want = one_by_one(p, concrete, extras);
          check_same(packed(p, concrete, extras), want);
          for (const int workers : {1, 2, 3, 7}) {
            const eb::thread_pool pool(workers);
            CHECK(packed(p, concrete, extras, pool) == packed(p, concrete, extras));
          }
        });
      }
    }
  }
}

TEST_CASE("self-attention over packed documents is a document mask over the whole") {
  const Packed p({9, 1, 0, 20, 14}, {9, 1, 0, 20, 14});
  std::vector<Index> ids;
  for (std::size_t b = 0; b < p.sequences(); ++b) {
    ids.insert(ids.end(), static_cast<std::size_t>(p.cu_q[b + 1] - p.cu_q[b]),
               static_cast<Index>(b));
  }
  const AnyRule causal{eb::causal()};
  causal.visit([&](const auto& rule) {
    const Results want = packed(p, rule, false);
    Results got(p);
    const auto documents = eb::attention_rule(eb::causal() & eb::same_document(ids));
    eb::AttentionTensorGradients<double> gradients{.upstream_lse = &p.dlse};
    const auto saved = eb::attention_forward(p.q, p.k, p.v, got.out, p.shape, documents);
    eb::attention_backward(saved, p.q, p.k, p.v, got.out, p.dout, got.dq, got.dk, got.dv, p.shape,
                           documents, {}, &gradients);
    const auto close = [](const Matrix<double>& a, const Matrix<double>& b) {
      return (a - b).cwiseAbs().maxCoeff() < 1e-13;
    };
    CHECK(close(got.out, want.out));
    CHECK(close(saved.lse, want.lse));
    CHECK(close(got.dq, want.dq));
    CHECK(close(got.dk, want.dk));
    CHECK(close(got.dv, want.dv));
  });
}

TEST_CASE("more queries than keys: the first rows of a causal sequence are dead") {
  const Packed p({10, 3}, {4, 3});
  const Results r = packed(p, eb::attention_rule(AnyMask(eb::causal())), false);
  CHECK((r.out.topRows(6).array() == 0.0).all());
  CHECK((r.dq.topRows(6).array() == 0.0).all());
  CHECK((r.lse.topRows(6).array() == -std::numeric_limits<double>::infinity()).all());
  CHECK(r.lse.bottomRows(7).allFinite());
}

TEST_CASE("bad packings are refused with the numbers, before anything is written") {
  const Packed p({3, 4}, {5, 2});
  Matrix<double> out = Matrix<double>::Constant(7, kHeads * kValueDim, 9.0);
  const auto rule = eb::attention_rule(AnyMask(eb::causal()));
  const auto refuse = [&](const Lengths& cu_q, const Lengths& cu_k, const std::string& text,
                          const eb::AttentionShape& shape = {.heads = kHeads, .kv_heads = kKvHeads},
                          const eb::AttentionTensors<double>& tensors = {}) {
    CHECK_THROWS_WITH_AS(
        eb::attention_varlen_forward(p.q, p.k, p.v, cu_q, cu_k, out, shape, rule, tensors),
        ("eigenblocks: " + text).c_str(), eb::invalid_argument);
    CHECK((out.array() == 9.0).all());
  };
  const Lengths q{0, 3, 7}, k{0, 5, 7};
  refuse({}, k, "cu_seqlens_q is empty, expected one entry more than there are sequences");
  refuse(q, {}, "cu_seqlens_k is empty, expected one entry more than there are sequences");
  refuse({1, 3, 7}, k, "cu_seqlens_q starts at 1, expected 0");
  refuse(q, {0, 6, 5, 7}, "cu_seqlens_k decreases at entry 2: 6 then 5");
  refuse({0, 3, 6}, k, "cu_seqlens_q ends at 6, expected the 7 rows of query");
  refuse(q, {0, 5, 9}, "cu_seqlens_k ends at 9, expected the 7 rows of key");
  refuse(q, {0, 5, 6, 7}, "cu_seqlens_q has 3 entries, cu_seqlens_k has 4: expected as many");
  refuse(q, k,
         "query_offset (1) and key_offset (0) must be 0: packing aligns each sequence at the "
         "bottom right",
         {.heads = kHeads, .kv_heads = kKvHeads, .query_offset = 1});
  const Matrix<double> bias(7, 7);
  refuse(q, k,
         "bias and mask tensors have no place over packed sequences; express them in the rule",
         {.heads = kHeads, .kv_heads = kKvHeads}, {.bias = &bias});
  const Vector<double> rho(6);
  refuse(q, k, "row_scale has 6 entries, expected 7 (one per query row)",
         {.heads = kHeads, .kv_heads = kKvHeads}, {.row_scale = &rho});
  refuse(q, k, "kv_heads (3) must divide heads (4)", {.heads = 4, .kv_heads = 3});
}
