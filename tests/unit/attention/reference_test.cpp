// The oracle itself: against numbers worked out by hand and against finite differences, sharing no code with the kernels.
#include <eigenblocks/attention/reference.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

namespace {

using namespace eigenblocks;

constexpr double kNone = -std::numeric_limits<double>::infinity();

Matrix<double> column(std::initializer_list<double> values) {
  Matrix<double> m(static_cast<Index>(values.size()), 1);
  Index i = 0;
  for (const double x : values) m(i++, 0) = x;
  return m;
}

struct Values {
  Matrix<double> out, lse;
};
template <class Rule = DefaultRule>
Values reference(const Matrix<double>& q, const Matrix<double>& k, const Matrix<double>& v,
                 const AttentionShape& shape = {}, const Rule& rule = {},
                 const AttentionTensors<double>& tensors = {}) {
  const Index kv_heads = shape.kv_heads == 0 ? shape.heads : shape.kv_heads;
  Values r{Matrix<double>(q.rows(), v.cols() / kv_heads * shape.heads),
           Matrix<double>(q.rows(), shape.heads)};
  attention_reference(q, k, v, r.out, r.lse, shape, rule, tensors);
  return r;
}

}  // namespace

TEST_CASE("one channel, by hand: weights 1/4 and 3/4") {
  const double third = std::log(3.0);
  const Values r = reference(column({1}), column({0, third}), column({8, 4}));
  CHECK(r.out(0, 0) == doctest::Approx(0.25 * 8 + 0.75 * 4).epsilon(1e-15));
  CHECK(r.lse(0, 0) == doctest::Approx(std::log(4.0)).epsilon(1e-15));
}

TEST_CASE("the order of the pipeline: scale, row scale, score functor, bias, mask") {
  // Raw products 2 and 5; scale 3; row_scale 0.5 -> 3 and 7.5; functor adds 1 -> 4 and 8.5; bias 4.5 and 0 -> 8.5 both.
  const auto plus_one = [](double s, Index, Index, Index) { return s + 1; };
  const Matrix<double> bias = column({4.5, 0, 100}).transpose();
  Vector<double> rho = Vector<double>::Constant(1, 0.5);
  BoolMatrix keep(1, 3);
  keep << true, true, false;
  const Values r = reference(column({1}), column({2, 5, 9}), column({10, 20, 1000}), {.scale = 3.0},
                             attention_rule(full(), plus_one),
                             {.bias = &bias, .mask = &keep, .row_scale = &rho});
  CHECK(r.out(0, 0) == doctest::Approx(15.0).epsilon(1e-15));
  CHECK(r.lse(0, 0) == doctest::Approx(8.5 + std::log(2.0)).epsilon(1e-15));
}

TEST_CASE("default scale is 1/sqrt(head_dim)") {
  const Matrix<double> q = Matrix<double>::Ones(1, 4), k = Matrix<double>::Ones(1, 4);
  CHECK(reference(q, k, column({7})).lse(0, 0) == doctest::Approx(4 / 2.0).epsilon(1e-15));
}

TEST_CASE(
    "heads read their group's keys, positions count from the offsets, a shared bias serves all "
    "heads") {
  // 4 heads of 1 channel, 2 kv heads; scores 0: every head is the mean of the values that its row sees.
  const Matrix<double> q = Matrix<double>::Zero(2, 4), k = Matrix<double>::Zero(3, 2);
  Matrix<double> v(3, 2);
  v << 1, 10, 2, 20, 6, 60;
  const Values r =
      reference(q, k, v, {.heads = 4, .kv_heads = 2, .query_offset = 6, .key_offset = 5},
                attention_rule(causal()));
  for (Index h = 0; h < 4; ++h) {
    const double unit = h < 2 ? 1.0 : 10.0;
    CHECK(r.out(0, h) ==
          doctest::Approx(1.5 * unit).epsilon(1e-15));  // position 6 sees keys 5 and 6
    CHECK(r.out(1, h) == doctest::Approx(3.0 * unit).epsilon(1e-15));
  }
  Matrix<double> bias = Matrix<double>::Zero(2, 3);
  bias(0, 0) = kNone;  // counts as masked
  const Values b = reference(q, k, v, {.heads = 4, .kv_heads = 2}, {}, {.bias = &bias});
  for (Index h = 0; h < 4; ++h)
    CHECK(b.out(0, h) == doctest::Approx((h < 2 ? 1.0 : 10.0) * 4.0).epsilon(1e-15));
}

TEST_CASE("scores come from the keys of the head's group") {
  // Heads 0 and 1 weigh the values 8 and 4 by 1/2 and 1/2, heads 2 and 3 by 3/4 and 1/4.
  Matrix<double> k(2, 2), v(2, 2);
  k << 0, std::log(3.0), 0, 0;
  v << 8, 8, 4, 4;
  const Values r = reference(Matrix<double>::Ones(1, 4), k, v, {.heads = 4, .kv_heads = 2});
  for (Index h = 0; h < 4; ++h)
    CHECK(r.out(0, h) == doctest::Approx(h < 2 ? 6.0 : 7.0).epsilon(1e-15));
}

TEST_CASE("sinks join the denominator only; dead rows are zero with lse -inf or the sink") {
  Vector<double> sinks = Vector<double>::Constant(1, 0.0);
  const auto nobody = attention_rule([](Index i, Index) { return i > 0; });
  const Values r =
      reference(column({0, 0}), column({0, 0}), column({3, 6}), {}, nobody, {.sinks = &sinks});
  CHECK(r.out(0, 0) == 0.0);
  CHECK(r.lse(0, 0) == 0.0);
  CHECK(r.out(1, 0) == doctest::Approx((3 + 6) / 3.0).epsilon(1e-15));
  CHECK(r.lse(1, 0) == doctest::Approx(std::log(3.0)).epsilon(1e-15));
  const Values dead = reference(column({0, 0}), column({0, 0}), column({3, 6}), {}, nobody);
  CHECK(dead.out(0, 0) == 0.0);
  CHECK(dead.lse(0, 0) == kNone);
  CHECK(reference(column({1, 2}), Matrix<double>(0, 1), Matrix<double>(0, 1)).lse(1, 0) == kNone);
}

TEST_CASE("a row of finite biases of -1e30 is the uniform average, with its gradients") {
  const Matrix<double> q = column({1}), k = column({1, 2, 3, 4}), v = column({1, 2, 3, 6}),
                       bias = Matrix<double>::Constant(1, 4, -1e30);
  CHECK(reference(q, k, v, {}, {}, {.bias = &bias}).out(0, 0) == 3.0);
  Matrix<double> dq(1, 1), dk(4, 1), dv(4, 1);
  attention_reference_backward(q, k, v, column({1}), dq, dk, dv, {}, DefaultRule{},
                               {.bias = &bias});
  CHECK((dv.array() == 0.25).all());
}

TEST_CASE("NaN shows in the rows that see it") {
  Matrix<double> k = column({1, std::nan(""), 3});
  const Values r = reference(column({1, 1, 1}), k, column({1, 2, 3}), {}, attention_rule(causal()));
  CHECK(r.out(0, 0) == 1.0);
  CHECK(std::isnan(r.out(1, 0)));
  CHECK(std::isnan(r.lse(2, 0)));
}

TEST_CASE("backward against finite differences, every operand") {
  Random random(4);
  Matrix<double> q = normal_matrix<double>(random, 4, 6), k = normal_matrix<double>(random, 5, 3),
                 v = normal_matrix<double>(random, 5, 2),
                 dout = normal_matrix<double>(random, 4, 4),
                 dlse = normal_matrix<double>(random, 4, 2),
                 bias = normal_matrix<double>(random, 8, 5),
                 rho = normal_matrix<double>(random, 4, 1),
                 sinks = normal_matrix<double>(random, 2, 1);
  const AttentionShape shape{.heads = 2, .kv_heads = 1, .query_offset = 1};
  BoolMatrix keep = BoolMatrix::Constant(4, 5, true);
  keep(2, 0) = false;
  Matrix<double> slopes = normal_matrix<double>(random, 2, 1);
  Vector<double> slope_gradient = Vector<double>::Zero(2);
  const auto run = [&](auto&& f) {
    const Vector<double> rho_vector = rho.col(0), sink_vector = sinks.col(0),
                         slope_vector = slopes.col(0);
    const auto rule = attention_rule(
        causal(), compose(alibi_with_gradient(slope_vector, slope_gradient), soft_cap(1.5)));
    return f(rule,
             AttentionTensors<double>{
                 .bias = &bias, .mask = &keep, .row_scale = &rho_vector, .sinks = &sink_vector});
  };
  const auto loss = [&] {
    return run([&](const auto& rule, const auto& tensors) {
      const Values r = reference(q, k, v, shape, rule, tensors);
      return r.out.cwiseProduct(dout).sum() + r.lse.cwiseProduct(dlse).sum();
    });
  };
  Matrix<double> dq = q, dk = k, dv = v, dbias = bias;
  Vector<double> drho(4), dsinks(2);
  AttentionTensorGradients<double> gradients{
      .bias = &dbias, .row_scale = &drho, .sinks = &dsinks, .upstream_lse = &dlse};
  run([&](const auto& rule, const auto& tensors) {
    attention_reference_backward(q, k, v, dout, dq, dk, dv, shape, rule, tensors, &gradients);
    return 0;
  });
  const auto check = [&](const char* name, Matrix<double>& x, const Matrix<double>& gradient) {
    const GradcheckResult result = gradcheck(loss, x, gradient);
    CHECK_MESSAGE(result.passed, std::string(name), ": ", result.message());
  };
  check("query", q, dq);
  check("key", k, dk);
  check("value", v, dv);
  check("bias", bias, dbias);
  check("row_scale", rho, drho);
  check("sinks", sinks, dsinks);
  check("slopes", slopes, slope_gradient);
}

TEST_CASE("shapes of results are checked before anything is written") {
  const Matrix<double> q = column({1, 2}), k = column({1, 2, 3});
  Matrix<double> out = Matrix<double>::Constant(2, 1, 5.0), lse(2, 1), wrong(3, 1), dq(2, 1),
                 dk(3, 1);
  CHECK_THROWS_WITH_AS(attention_reference(q, k, k, wrong, lse, {}),
                       "eigenblocks: out is 3 x 1, expected 2 x 1 (queries x heads * value_dim)",
                       eigenblocks::invalid_argument);
  CHECK_THROWS_WITH_AS(attention_reference(q, k, k, out, wrong, {}),
                       "eigenblocks: lse is 3 x 1, expected 2 x 1 (queries x heads)",
                       eigenblocks::invalid_argument);
  CHECK((out.array() == 5.0).all());
  CHECK_THROWS_WITH_AS(attention_reference_backward(q, k, k, wrong, dq, dk, dk, {}),
                       "eigenblocks: dout is 3 x 1, expected 2 x 1 (shape of out)",
                       eigenblocks::invalid_argument);
  CHECK_THROWS_WITH_AS(attention_reference_backward(q, k, k, out, dk, dk, dk, {}),
                       "eigenblocks: dquery is 3 x 1, expected 2 x 1 (shape of query)",
                       eigenblocks::invalid_argument);
}
