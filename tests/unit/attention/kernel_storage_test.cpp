// half and bfloat16 as storage: converted exactly on the way in, computed in float, rounded once on the way out.
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <type_traits>

namespace {

using namespace eigenblocks;

constexpr AttentionShape kShape{.heads = 4, .kv_heads = 2};

template <class T>
struct Results {
  Matrix<T> out, dq, dk, dv;
  Matrix<float> lse;
};

template <class T>
Results<T> run(const Matrix<T>& q, const Matrix<T>& k, const Matrix<T>& v, const Matrix<T>& dout,
               const Matrix<T>* out_for_backward = nullptr, ExecutorRef executor = {}) {
  Results<T> r{Matrix<T>(dout.rows(), dout.cols()), q, k, v, {}};
  const auto rule = attention_rule(causal());
  const auto saved = attention_forward(q, k, v, r.out, kShape, rule, {}, executor);
  attention_backward(saved, q, k, v, out_for_backward ? *out_for_backward : r.out, dout, r.dq, r.dk,
                     r.dv, kShape, rule, {}, nullptr, executor);
  r.lse = saved.lse;
  return r;
}

float largest(const Matrix<float>& m) { return m.cwiseAbs().maxCoeff(); }

/// max |got - want| beyond half a unit of the last place of T at each entry.
template <class T>
float beyond_rounding(const Matrix<T>& got, const Matrix<float>& want) {
  const float half_ulp = std::is_same_v<T, Eigen::half> ? 0x1p-11f : 0x1p-8f;
  const auto size = want.array().abs().max(0x1p-14f);  // the smallest normal half
  return ((got.template cast<float>() - want).array().abs() - half_ulp * size).maxCoeff();
}

}  // namespace

TEST_CASE_TEMPLATE("16-bit storage is float on the converted operands, rounded once", T,
                   Eigen::half, Eigen::bfloat16) {
  Random random(1);
  for (const Index keys : {1, 33, 130}) {
    Matrix<T> q(53, 4 * 7), k(keys, 2 * 7), v(keys, 2 * 5), dout(53, 4 * 5);
    for (Matrix<T>* m : {&q, &k, &v, &dout}) fill_normal(random, *m);
    const Results<T> got = run<T>(q, k, v, dout);
    // The backward's D = <dout, out> uses the stored output, so float gets the same one.
    const Matrix<float> stored = got.out.template cast<float>();
    const Results<float> want =
        run<float>(q.template cast<float>(), k.template cast<float>(), v.template cast<float>(),
                   dout.template cast<float>(), &stored);
    // Tiles differ in nothing but where the operands come from: the same bits before rounding.
    CHECK(got.lse == want.lse);
    CHECK(got.out == want.out.template cast<T>());
    CHECK(got.dv == want.dv.template cast<T>());
    // Only D is a sum over operands in place, whose order is Eigen's: 5 products, then times k or q, over 2 heads of 53 rows.
    const float d_error = std::numeric_limits<float>::epsilon() * 5 *
                          largest(dout.template cast<float>()) * largest(stored);
    const float scale = 1 / std::sqrt(7.0f);
    CHECK(beyond_rounding(got.dq, want.dq) <= scale * largest(k.template cast<float>()) * d_error);
    CHECK(beyond_rounding(got.dk, want.dk) <=
          106 * scale * largest(q.template cast<float>()) * d_error);

    const thread_pool pool(3);
    const Results<T> threaded = run<T>(q, k, v, dout, nullptr, pool);
    CHECK(threaded.out == got.out);
    CHECK(threaded.dq == got.dq);
    CHECK(threaded.dk == got.dk);
    CHECK(threaded.dv == got.dv);
  }
}

TEST_CASE_TEMPLATE("strided 16-bit views and dead rows", T, Eigen::half, Eigen::bfloat16) {
  Random random(2);
  Matrix<T> fused(20, 3 * 4);
  fill_normal(random, fused);
  const AttentionShape shape{.heads = 2, .query_offset = -5};
  const auto rule = attention_rule(causal());
  Matrix<T> out(20, 4), frame = Matrix<T>::Constant(20, 9, T(7));
  const auto saved = attention_forward(fused.leftCols(4), fused.middleCols(4, 4),
                                       fused.rightCols(4), out, shape, rule);
  for (Index i = 0; i < 5; ++i) {
    for (Index c = 0; c < 4; ++c) CHECK(static_cast<float>(out(i, c)) == 0.0f);
    CHECK(saved.lse(i, 0) == -std::numeric_limits<float>::infinity());
  }
  attention_forward(fused.leftCols(4), fused.middleCols(4, 4), fused.rightCols(4),
                    frame.middleCols(3, 4), shape, rule);
  CHECK(frame.middleCols(3, 4) == out);
  CHECK(static_cast<float>(frame(0, 2)) == 7.0f);
  CHECK(static_cast<float>(frame(19, 7)) == 7.0f);
}
