#include <eigenblocks/attention/vq_encoder.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <string>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Problem {
  Index heads, dim, value_dim;
  Matrix<double> q, k, v, codebook, out;
  eb::VqTokenMask mask;

  Problem(Index queries, Index keys, Index heads_, Index codes)
      : heads(heads_), dim(3), value_dim(2), mask(eb::VqTokenMask::Constant(keys, true)) {
    eb::Random random(5);
    const auto matrix = [&](Index rows, Index cols) {
      return Matrix<double>(eb::normal_matrix<double>(random, rows, cols));
    };
    q = matrix(queries, heads * dim);
    k = matrix(keys, heads * dim);
    v = matrix(keys, heads * value_dim);
    codebook = matrix(heads * codes, dim);
    out = Matrix<double>(queries, heads * value_dim);
    for (Index t = 0; t < keys; t += 3) mask[t] = false;
  }
  eb::VqEncoderSaved<double> forward(const eb::VqTokenMask* keep, eb::ExecutorRef executor = {}) {
    return eb::vq_encoder_forward(q, k, v, codebook, out, {.heads = heads}, keep, executor);
  }
  /// softmax over all keys that count, at their codewords.
  Matrix<double> definition(const eb::VqCodes& z, const eb::VqTokenMask* keep) const {
    Matrix<double> want = Matrix<double>::Zero(out.rows(), out.cols());
    const Index codes = codebook.rows() / heads;
    for (Index h = 0; h < heads; ++h) {
      for (Index i = 0; i < q.rows(); ++i) {
        double total = 0;
        for (Index j = 0; j < k.rows(); ++j) {
          if (keep != nullptr && !(*keep)[j]) continue;
          const double p =
              std::exp(q.row(i).segment(h * dim, dim).dot(codebook.row(h * codes + z(j, h))));
          total += p;
          want.row(i).segment(h * value_dim, value_dim) +=
              p * v.row(j).segment(h * value_dim, value_dim);
        }
        if (total > 0) want.row(i).segment(h * value_dim, value_dim) /= total;
      }
    }
    return want;
  }
};

std::string text(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("codes and counts give what every key gives, with and without a mask") {
  for (const Index queries : {0, 1, 70, 130}) {
    for (const Index keys : {1, 5, 90}) {
      for (const Index codes : {1, 7, 40}) {
        Problem p(queries, keys, 2, codes);
        for (const eb::VqTokenMask* keep : {static_cast<const eb::VqTokenMask*>(nullptr),
                                            static_cast<const eb::VqTokenMask*>(&p.mask)}) {
          if (keep != nullptr && keys == 1) continue;
          const auto saved = p.forward(keep);
          CHECK((p.out - p.definition(saved.codes, keep)).norm() < 1e-12);
        }
      }
    }
  }
}

TEST_CASE("finite differences") {
  for (const bool masked : {false, true}) {
    Problem p(70, 23, 2, 6);
    const eb::VqTokenMask* const keep = masked ? &p.mask : nullptr;
    eb::Random random(6);
    const Matrix<double> dout = eb::normal_matrix<double>(random, 70, 4);
    Matrix<double> dq = Matrix<double>::Constant(70, 6, 1e9),
                   dv = Matrix<double>::Constant(23, 4, 1e9);
    const auto loss = [&] {
      p.forward(keep);
      return dout.cwiseProduct(p.out).sum();
    };
    const auto saved = p.forward(keep);
    eb::vq_encoder_backward(saved, p.q, p.codebook, p.out, dout, dq, dv, {.heads = 2}, keep);
    auto r = eb::gradcheck(loss, p.q, dq);
    CHECK_MESSAGE(r.passed, r.message());
    r = eb::gradcheck(loss, p.v, dv);
    CHECK_MESSAGE(r.passed, r.message());
    if (masked) CHECK(dv.row(3).isZero(0));
  }
}

TEST_CASE("executors do not change a bit, masked keys may hold anything, no key gives zeros") {
  Problem p(200, 150, 3, 9);
  const auto saved = p.forward(&p.mask);
  const Matrix<double> out = p.out, dout = p.q.leftCols(6);
  Matrix<double> dq = p.q, dv = p.v, dq2 = p.q, dv2 = p.v;
  eb::vq_encoder_backward(saved, p.q, p.codebook, out, dout, dq, dv, {.heads = 3}, &p.mask);
  for (const int workers : {1, 2, 3, 7}) {
    eb::thread_pool pool(workers);
    CHECK(p.forward(&p.mask, pool).lse == saved.lse);
    CHECK(p.out == out);
    eb::vq_encoder_backward(saved, p.q, p.codebook, out, dout, dq2, dv2, {.heads = 3}, &p.mask,
                            pool);
    CHECK(dq2 == dq);
    CHECK(dv2 == dv);
  }
  for (Index t = 0; t < 150; t += 3) {
    p.k.row(t).setConstant(kNaN);
    p.v.row(t).setConstant(kNaN);
  }
  p.forward(&p.mask);
  CHECK(p.out == out);
  p.codebook.row(0).setConstant(1e9);  // no key is near
  const auto unused = p.forward(&p.mask);
  eb::vq_encoder_backward(unused, p.q, p.codebook, p.out, dout, dq, dv, {.heads = 3}, &p.mask);
  p.codebook.row(0).setConstant(std::numeric_limits<double>::infinity());
  CHECK(p.forward(&p.mask).lse == unused.lse);
  eb::vq_encoder_backward(unused, p.q, p.codebook, p.out, dout, dq2, dv2, {.heads = 3}, &p.mask);
  CHECK((dq2 - dq).norm() < 1e-12);
  CHECK(dv2 == dv);
  p.codebook.row(0).setZero();

  p.q *= 1e4;  // scores of thousands
  p.v.setOnes();
  p.forward(&p.mask);
  CHECK((p.out.array() - 1).abs().maxCoeff() < 1e-12);

  p.mask.setConstant(false);
  const auto none = p.forward(&p.mask);
  CHECK(p.out.isZero(0));
  CHECK((none.lse.array() == -std::numeric_limits<double>::infinity()).all());
  eb::vq_encoder_backward(none, p.q, p.codebook, p.out, dout, dq, dv, {.heads = 3}, &p.mask);
  CHECK(dq.isZero(0));
  CHECK(dv.isZero(0));
  Problem empty(4, 0, 1, 3);
  empty.forward(nullptr);
  CHECK(empty.out.isZero(0));
}

TEST_CASE("bad input is named, and nothing is written") {
  Problem p(5, 7, 2, 4);
  p.out.setConstant(7);
  const auto forward = [&](const char* want, auto change) {
    Problem bad = p;
    change(bad);
    const Matrix<double> before = bad.out;
    const std::string got = text([&] { bad.forward(&bad.mask); });
    CHECK_MESSAGE(got == std::string("eigenblocks: ") + want, got);
    CHECK(bad.out == before);
  };
  forward("heads (0) must be at least 1", [](Problem& b) { b.heads = 0; });
  forward("query has 5 columns, expected 6 (heads * columns of the codebook)",
          [](Problem& b) { b.q.resize(5, 5); });
  forward("key has 5 columns, expected 6 (columns of query)", [](Problem& b) { b.k.resize(7, 5); });
  forward("value has 6 rows, expected 7 (rows of key)", [](Problem& b) { b.v.resize(6, 4); });
  forward("value has 3 columns, expected a multiple of 2 (heads)",
          [](Problem& b) { b.v.resize(7, 3); });
  forward("codebook has 0 rows, expected a positive multiple of heads (2)",
          [](Problem& b) { b.codebook.resize(0, 3); });
  forward("mask has 6 entries, expected 7 (tokens)", [](Problem& b) { b.mask.resize(6); });
  forward("out is 5 x 6, expected 5 x 4 (rows of query, columns of value)",
          [](Problem& b) { b.out.setConstant(5, 6, 7.0); });

  auto saved = p.forward(nullptr);
  Matrix<double> dq = Matrix<double>::Constant(5, 6, 7), dv = Matrix<double>::Constant(6, 4, 7);
  const auto backward = [&] {
    return text([&] {
      eb::vq_encoder_backward(saved, p.q, p.codebook, p.out, p.out, dq, dv, {.heads = 2});
    });
  };
  CHECK(backward() == "eigenblocks: dv is 6 x 4, expected 7 x 4 (rows of key, columns of out)");
  dv = Matrix<double>::Constant(7, 4, 7);
  saved.lse.resize(4, 2);
  CHECK(backward() == "eigenblocks: saved.lse is 4 x 2, expected 5 x 2 (rows of query x heads)");
  CHECK((dq.array() == 7).all());
  CHECK((dv.array() == 7).all());
}
