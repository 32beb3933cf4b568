// Attention with normalised queries or keys: the formulas written out, finite differences, and what the norm makes invariant.
#include <eigenblocks/attention/key_norm.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include "support/attention_case.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using namespace attention_test;
using doctest::Approx;
using Mode = eb::NormalizedAttention;
using Options = eb::NormalizedAttentionOptions;

/// x / max(|x|, eps), head by head, as on paper.
Matrix<double> unit_heads(Matrix<double> x, Index heads, double eps) {
  const Index d = x.cols() / heads;
  for (Index h = 0; h < heads; ++h) {
    for (Index i = 0; i < x.rows(); ++i) {
      auto part = x.row(i).segment(h * d, d);
      part /= std::max(part.norm(), eps);
    }
  }
  return x;
}

/// Causal attention with scores `factor(position)` <q, k>; lse of rows without keys is -inf.
void paper(const Problem& p, const Options& o, Matrix<double>& out, Matrix<double>& lse) {
  const Index heads = p.options.heads, group = heads / p.kv_heads(), d = p.options.dim,
              e = p.options.value_dim;
  const Matrix<double> q = o.mode == Mode::kna ? p.q : unit_heads(p.q, heads, o.eps);
  const Matrix<double> k = o.mode == Mode::qna ? p.k : unit_heads(p.k, p.kv_heads(), o.eps);
  out = Matrix<double>::Zero(p.q.rows(), heads * e);
  lse.resize(p.q.rows(), heads);
  for (Index h = 0; h < heads; ++h) {
    for (Index i = 0; i < q.rows(); ++i) {
      const Index position = i + p.shape.query_offset, kv = h / group;
      const double log_n = std::log(static_cast<double>(position + 1));
      const double factor = o.mode == Mode::cosa ? (o.dynamic ? o.lambda * log_n : o.lambda)
                                                 : (o.dynamic ? log_n / std::log(o.base) : 1.0);
      double sum = 0;
      auto row = out.row(i).segment(h * e, e);
      for (Index j = 0; j <= std::min(position, k.rows() - 1); ++j) {
        const double w =
            std::exp(factor * q.row(i).segment(h * d, d).dot(k.row(j).segment(kv * d, d)));
        sum += w;
        row += w * p.v.row(j).segment(kv * e, e);
      }
      lse(i, h) = std::log(sum);
      if (sum > 0) row /= sum;
    }
  }
}

std::vector<Options> all_options() {
  std::vector<Options> all;
  for (const Mode mode : {Mode::qna, Mode::kna, Mode::cosa}) {
    for (const bool dynamic : {false, true})
      all.push_back({.mode = mode, .lambda = 2.5, .dynamic = dynamic, .base = 20});
  }
  return all;
}

using Rule = decltype(eb::attention_rule(eb::causal()));

template <class S>
struct Result {
  Outcome<S> y;
  eb::NormalizedAttentionSaved<S> saved;
};

/// Forward, and backward for p.dout (and p.dlse).
template <class S>
Result<S> run(const Problem& p, const Options& options, bool backward = true,
              eb::ExecutorRef executor = {}) {
  const Matrix<S> q = p.q.cast<S>(), k = p.k.cast<S>(), v = p.v.cast<S>(), dout = p.dout.cast<S>(),
                  dlse = p.dlse.cast<S>(), bias = p.bias.cast<S>();
  const Vector<S> sinks = p.sinks.cast<S>();
  const eb::AttentionTensors<S> tensors{.bias = p.has_bias() ? &bias : nullptr,
                                        .sinks = p.options.sinks ? &sinks : nullptr};
  Result<S> r{Outcome<S>(p), {}};
  r.saved = eb::normalized_attention_forward(q, k, v, r.y.out, p.shape, options, Rule{}, tensors,
                                             executor);
  r.y.lse = r.saved.attention.lse;
  if (!backward) return r;
  auto gradients = r.y.gradients(p.options.upstream_lse ? &dlse : nullptr);
  eb::normalized_attention_backward(r.saved, q, k, v, r.y.out, dout, r.y.dq, r.y.dk, r.y.dv,
                                    p.shape, options, Rule{}, tensors, &gradients, executor);
  return r;
}

void check_gradients(Problem& p, const Options& options) {
  const Outcome<double> g = run<double>(p, options).y;
  const auto loss = [&] {
    const Outcome<double> y = run<double>(p, options, false).y;
    double sum = y.out.cwiseProduct(p.dout).sum();
    for (Index i = 0; p.options.upstream_lse && i < y.lse.size(); ++i) {
      if (y.lse.data()[i] != -kInfinity) sum += p.dlse.data()[i] * y.lse.data()[i];
    }
    return sum;
  };
  const auto check = [&](const char* name, Eigen::Ref<Matrix<double>, 0, Eigen::OuterStride<>> x,
                         const Matrix<double>& gradient) {
    const eb::GradcheckResult result = eb::gradcheck(loss, x, gradient);
    CHECK_MESSAGE(result.passed, std::string(name), ": ", result.message());
  };
  check("query", p.q, g.dq);
  check("key", p.k, g.dk);
  check("value", p.v, g.dv);
  if (p.has_bias()) check("bias", p.bias, g.dbias);
  using Column = Eigen::Map<Matrix<double>>;
  if (p.options.sinks) check("sinks", Column(p.sinks.data(), p.sinks.size(), 1), g.dsinks);
}

constexpr ProblemOptions kSmall{.queries = 6,
                                .keys = 8,
                                .heads = 4,
                                .kv_heads = 2,
                                .dim = 3,
                                .value_dim = 2,
                                .query_offset = 1,
                                .upstream_lse = true};

}  // namespace

TEST_CASE("all modes are the formulas: values and log-sum-exp") {
  for (const Options& options : all_options()) {
    CAPTURE(static_cast<int>(options.mode));
    CAPTURE(options.dynamic);
    for (const Index offset : {0, 4}) {
      const Problem p({.queries = 23,
                       .keys = 30,
                       .heads = 4,
                       .kv_heads = 2,
                       .dim = 5,
                       .value_dim = 3,
                       .query_offset = offset});
      Matrix<double> out, lse;
      paper(p, options, out, lse);
      const Outcome<double> got = run<double>(p, options, false).y;
      CHECK(difference(got.out, out) < 1e-13);
      CHECK(difference(got.lse, lse) < 1e-13);
    }
  }
}

TEST_CASE("float: values and gradients within rounding of double") {
  const Problem p(kSmall);
  const Options options{.mode = Mode::cosa, .dynamic = true};
  const Outcome<float> got = run<float>(p, options).y;
  const Outcome<double> want = run<double>(p, options).y;
  CHECK(difference(got.out, want.out) < 1e-5);
  CHECK(difference(got.lse, want.lse) < 1e-5);
  CHECK(difference(got.dq, want.dq) < 1e-4);
  CHECK(difference(got.dk, want.dk) < 1e-4);
  CHECK(difference(got.dv, want.dv) < 1e-5);
}

TEST_CASE("gradients of every operand by finite differences, in every mode") {
  for (const Options& options : all_options()) {
    CAPTURE(static_cast<int>(options.mode));
    CAPTURE(options.dynamic);
    Problem p(kSmall);
    check_gradients(p, options);
  }
  ProblemOptions everything = kSmall;
  everything.bias = everything.sinks = true;
  Problem p(everything);
  check_gradients(p, {.mode = Mode::cosa, .dynamic = true});
  check_gradients(p,
                  {.mode = Mode::kna, .eps = 100});  // every row is shorter than eps: y = x / eps
}

TEST_CASE("a zero row normalises to zero and has a gradient of size 1 / eps") {
  Problem p(kSmall);
  p.k.row(2).setZero();
  p.q.row(3).setZero();
  const Options options{.mode = Mode::cosa, .lambda = 2.5, .eps = 1e-3};
  Matrix<double> out, lse;
  paper(p, options, out, lse);
  const Result<double> r = run<double>(p, options);
  CHECK(difference(r.y.out, out) < 1e-14);
  CHECK(r.saved.key.row(2).isZero(0));
  CHECK(r.y.dk.allFinite());
  CHECK(r.y.dk.row(2).norm() > 10.0);
  CHECK(r.y.dk.row(1).norm() < 10.0);
}

TEST_CASE("KeyNorm: no length of a key matters, and its gradient is orthogonal to it") {
  Problem p(kSmall);
  const Options options{.mode = Mode::kna};
  const Outcome<double> before = run<double>(p, options).y;
  for (Index j = 0; j < p.k.rows(); ++j) {
    for (Index h = 0; h < 2; ++h) {
      CHECK(std::abs(before.dk.row(j).segment(3 * h, 3).dot(p.k.row(j).segment(3 * h, 3))) < 1e-14);
    }
    p.k.row(j) *= std::ldexp(1.0, static_cast<int>(3 * j) - 9);  // exact
  }
  const Outcome<double> after = run<double>(p, options).y;
  CHECK(difference(after.out, before.out) < 1e-15);
  CHECK(difference(after.dq, before.dq) < 1e-14);
  p.q *= 2.0;
  CHECK(difference(run<double>(p, options).y.out, before.out) > 1e-3);  // but queries keep theirs
  // In cosa neither matters, and scores stay within lambda: no row is more peaked than e^(2 lambda).
  p.q *= 1e150;
  p.k *= 1e-150;
  const Outcome<double> cosine = run<double>(p, {.mode = Mode::cosa, .lambda = 3}).y;
  CHECK(cosine.out.allFinite());
  for (Index i = 0; i < cosine.lse.rows(); ++i) {
    const double keys = std::log(static_cast<double>(i + 2));
    CHECK(cosine.lse.row(i).maxCoeff() <= 3 + keys);
    CHECK(cosine.lse.row(i).minCoeff() >= -3 + keys);
  }
}

TEST_CASE("rows without keys: zero output, -inf, zero gradients") {
  ProblemOptions o = kSmall;
  o.query_offset = -2;
  Problem p(o);
  const Outcome<double> r = run<double>(p, {.mode = Mode::cosa}).y;
  CHECK(r.out.topRows(2).isZero(0));
  CHECK((r.lse.topRows(2).array() == -kInfinity).all());
  CHECK(r.dq.topRows(2).isZero(0));
  CHECK(r.dk.allFinite());
  CHECK_FALSE(r.out.row(2).isZero(0));
  check_gradients(p, {.mode = Mode::cosa});
}

TEST_CASE("what is saved: only operands that were normalised, and row scales only if dynamic") {
  const Problem p(kSmall);
  const auto kna = run<double>(p, {.mode = Mode::kna}, false).saved;
  CHECK(kna.query.size() + kna.query_norm.size() + kna.row_scale.size() == 0);
  CHECK(kna.key.rows() == 8);
  CHECK(kna.key_norm.size() == 16);
  const auto qna = run<double>(p, {.mode = Mode::qna, .dynamic = true, .base = 9}, false).saved;
  CHECK(qna.key.size() + qna.key_norm.size() == 0);
  CHECK(qna.query_norm.size() == 24);
  REQUIRE(qna.row_scale.size() == 6);
  CHECK(qna.row_scale[2] == Approx(std::log(4.0) / std::log(9.0)).epsilon(1e-15));
}

TEST_CASE("the executor changes no bit; strided views are operands and results") {
  ProblemOptions o = kSmall;
  o.queries = o.keys = 70;
  const Problem p(o);
  const Options options{.mode = Mode::cosa, .dynamic = true};
  const Outcome<double> want = run<double>(p, options).y;
  const eb::thread_pool pool(3);
  CHECK(run<double>(p, options, true, pool).y == want);

  // q, k, v and their gradients side by side in one matrix each, as after a fused projection.
  const Index wq = p.q.cols(), wk = p.k.cols(), wv = p.v.cols();
  Matrix<double> all(70, wq + wk + wv), dall = all;
  all << p.q, p.k, p.v;
  Matrix<double> out(70, p.dout.cols());
  const auto saved = eb::normalized_attention_forward(all.leftCols(wq), all.middleCols(wq, wk),
                                                      all.rightCols(wv), out, p.shape, options);
  CHECK(out == want.out);
  eb::AttentionTensorGradients<double> gradients{.upstream_lse = &p.dlse};
  eb::normalized_attention_backward(saved, all.leftCols(wq), all.middleCols(wq, wk),
                                    all.rightCols(wv), out, p.dout, dall.leftCols(wq),
                                    dall.middleCols(wq, wk), dall.rightCols(wv), p.shape, options,
                                    Rule{}, {}, &gradients);
  CHECK(dall.leftCols(wq) == want.dq);
  CHECK(dall.middleCols(wq, wk) == want.dk);
  CHECK(dall.rightCols(wv) == want.dv);
}

TEST_CASE("empty operands are good input") {
  const Problem none({.queries = 0, .keys = 0, .heads = 2});
  CHECK(run<double>(none, {.mode = Mode::cosa, .dynamic = true}).y.out.size() == 0);
  const Problem keyless({.queries = 3, .keys = 0, .heads = 2});
  const Outcome<double> r = run<double>(keyless, {.mode = Mode::kna}).y;
  CHECK(r.out.isZero(0));
  CHECK(r.dq.isZero(0));
}

namespace {

/// A good call; each row of the table spoils one thing.
struct Call {
  Problem p{kSmall};
  Options options{.mode = Mode::cosa, .dynamic = true};
  Vector<double> rho = Vector<double>::Ones(6);
  eb::AttentionTensors<double> tensors;
  Result<double> r{Outcome<double>(p), {}};
  eb::AttentionTensorGradients<double> gradients;

  void forward() {
    r.saved =
        eb::normalized_attention_forward(p.q, p.k, p.v, r.y.out, p.shape, options, Rule{}, tensors);
  }
  void backward() {
    eb::normalized_attention_backward(r.saved, p.q, p.k, p.v, r.y.out, p.dout, r.y.dq, r.y.dk,
                                      r.y.dv, p.shape, options, Rule{}, tensors, &gradients);
  }
};

bool all_nan(const Matrix<double>& m) { return m.array().isNaN().all(); }

}  // namespace

TEST_CASE("bad input, with its message, and nothing written") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  struct Error {
    std::function<void(Call&)> spoil;
    std::string text;
    bool both = true;  // in the forward as well
  };
  const Error errors[] = {
      {[](Call& c) { c.p.shape.scale = 0.5; },
       "normalized attention: shape.scale (0.5) must not be given, use lambda"},
      {[&](Call& c) { c.options.lambda = nan; },
       "normalized attention: lambda (nan) must be finite"},
      {[](Call& c) { c.tensors.row_scale = &c.rho; },
       "normalized attention: tensors.row_scale must be null, the rule sets it"},
      {[](Call& c) { c.p.shape.kv_heads = 3; }, "kv_heads (3) must divide heads (4)"},
      {[](Call& c) { c.p.k.setZero(8, 5); },
       "key is 8 x 5, expected 8 x 6 (cols = kv_heads * head_dim, head_dim as in query)"},
      {[](Call& c) { c.options.eps = 0; }, "eps (0) must be a positive normal number"},
      {[&](Call& c) { c.options.eps = nan; }, "eps (nan) must be a positive normal number"},
      {[](Call& c) { c.r.saved.query.resize(5, 12); },
       "saved.query is 5 x 12, expected 6 x 12 (shape of the operand)", false},
      {[](Call& c) { c.r.saved.key.resize(0, 0); },
       "saved.key is 0 x 0, expected 8 x 6 (shape of the operand)", false},
      {[](Call& c) { c.r.saved.key_norm.resize(8); },
       "saved.key_norm has 8 entries, expected 16 (rows * heads)", false},
      {[](Call& c) { c.r.saved.row_scale.resize(0); },
       "saved.row_scale has 0 entries, expected 6 (one per query row if dynamic, else none)",
       false},
      {[](Call& c) { c.options.dynamic = false; },
       "saved.row_scale has 6 entries, expected 0 (one per query row if dynamic, else none)",
       false},
      {[](Call& c) { c.options.mode = Mode::kna; },
       "saved.query is 6 x 12, expected 0 x 0 (not normalised in this mode)", false},
      {[](Call& c) { c.r.saved.attention.lse.resize(6, 3); },
       "saved.lse is 6 x 3, expected 6 x 4 (queries x heads)", false},
      {[](Call& c) { c.p.dout.setZero(6, 7); }, "dout is 6 x 7, expected 6 x 8 (shape of out)",
       false},
  };
  for (const Error& error : errors) {
    CAPTURE(error.text);
    const auto prefixed = "eigenblocks: " + error.text;
    if (error.both) {
      Call call;
      error.spoil(call);
      CHECK_THROWS_WITH_AS(call.forward(), prefixed.c_str(), eb::invalid_argument);
      CHECK(all_nan(call.r.y.out));
    }
    Call call;
    call.forward();
    error.spoil(call);
    CHECK_THROWS_WITH_AS(call.backward(), prefixed.c_str(), eb::invalid_argument);
    CHECK((all_nan(call.r.y.dq) && all_nan(call.r.y.dk) && all_nan(call.r.y.dv)));
  }
  for (const Mode mode : {Mode::qna, Mode::kna}) {
    Call one;
    one.options.mode = mode;
    one.forward();
    one.options.eps = -1;
    CHECK_THROWS_WITH_AS(one.backward(), "eigenblocks: eps (-1) must be a positive normal number",
                         eb::invalid_argument);
    CHECK((all_nan(one.r.y.dq) && all_nan(one.r.y.dk) && all_nan(one.r.y.dv)));
  }
  Call call;
  call.options.mode = Mode::kna;
  call.options.base = 1;
  CHECK_THROWS_WITH_AS(call.forward(),
                       "eigenblocks: attention_scale: base (1) must be finite and above 1",
                       eb::invalid_argument);
  call.options.base = 512;
  call.p.shape.query_offset = -1;
  CHECK_THROWS_WITH_AS(
      call.forward(),
      "eigenblocks: causal_attention_scales: query_offset (-1) must not be negative",
      eb::invalid_argument);
  CHECK(all_nan(call.r.y.out));
}
