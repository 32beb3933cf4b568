#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "vq_case.hpp"

namespace {

using namespace vq_case;
using eb::VqGradient;

struct Gradients {
  Matrix<double> dq, dk, dv;
  eb::VqBias<double> dbias;
};

Gradients backward(const Problem& p, const Matrix<double>& dout, eb::ExecutorRef executor = {}) {
  Matrix<double> out = p.empty_out();
  const auto saved = eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  Gradients g{p.q, p.k, p.v, {}};
  for (Matrix<double>* m : {&g.dq, &g.dk, &g.dv}) m->setConstant(1e9);  // overwritten
  eb::vq_attention_backward(saved, p.q, p.v, p.codebook, out, dout, g.dq, g.dk, g.dv, p.options,
                            p.bias, &g.dbias, executor);
  return g;
}

/// <dout, out> as the convention differentiates it: codewords and values that a query may change are `p.codebook` row +
/// `shift` row and `p.v`; those it may not are the copies in `frozen`.
struct Surrogate {
  const Problem& p;
  const eb::VqCodes& codes;
  const Matrix<double>& shift;
  const Matrix<double> frozen_v;
  const Matrix<double>& dout;

  double operator()() const {
    const Sizes& n = p.n;
    const Index d = n.dim, e = n.value_dim, length = p.options.block_len;
    double loss = 0;
    std::vector<double> score;
    for (Index h = 0; h < n.heads; ++h) {
      for (Index i = 0; i < n.tokens; ++i) {
        const Index block = i / length * length, cache = block - n.mem_len;
        const bool block_only = p.options.gradient == VqGradient::block_only;
        double total = 0, sum = 0;
        for (Index j = 0; j <= i; ++j) {
          if (!p.options.aggregate && i - j > n.mem_len) continue;
          const bool recent = j >= (block_only ? block : cache);
          double s = 0;
          for (Index c = 0; c < d; ++c) {
            const double u = p.bias.u.size() ? p.bias.u(h, c) : 0,
                         w = p.bias.v_bias.size() ? p.bias.v_bias(h, c) : 0;
            s += (p.q(i, h * d + c) + u) *
                 (p.codebook(h * n.codes + codes(j, h), c) + (recent ? shift(j, h * d + c) : 0));
            if (i - j <= n.mem_len && p.bias.r.size())
              s += (p.q(i, h * d + c) + w) * p.bias.r(h * (n.mem_len + 1) + i - j, c);
          }
          const bool live = p.options.gradient == VqGradient::through_cache || recent;
          double value = 0;
          for (Index c = 0; c < e; ++c)
            value += dout(i, h * e + c) * (live ? p.v : frozen_v)(j, h * e + c);
          total += std::exp(s);
          sum += std::exp(s) * value;
        }
        loss += sum / total;
      }
    }
    return loss;
  }
};

void check_gradients(Problem p, Index max_entries) {
  const eb::VqCodes codes = eb::vq_nearest(p.k, p.codebook, p.n.heads);
  eb::Random random(99);
  const Matrix<double> dout =
      eb::normal_matrix<double>(random, p.n.tokens, p.n.heads * p.n.value_dim);
  Matrix<double> shift = Matrix<double>::Zero(p.k.rows(), p.k.cols());
  const Gradients g = backward(p, dout);
  const Surrogate loss{p, codes, shift, p.v, dout};
  const auto check = [&](const char* name, Matrix<double>& x, const Matrix<double>& gradient) {
    if (x.size() == 0) {
      CHECK(gradient.size() == 0);
      return;
    }
    const eb::GradcheckResult r =
        eb::gradcheck(loss, x, gradient, {.rtol = 1e-6, .atol = 1e-8, .max_entries = max_entries});
    CHECK_MESSAGE(r.passed, name, ": ", r.message());
  };
  check("q", p.q, g.dq);
  check("k", shift, g.dk);
  check("v", p.v, g.dv);
  check("u", p.bias.u, g.dbias.u);
  check("v_bias", p.bias.v_bias, g.dbias.v_bias);
  check("r", p.bias.r, g.dbias.r);
}

}  // namespace

TEST_CASE("finite differences under each convention") {
  for (const VqGradient gradient :
       {VqGradient::through_cache, VqGradient::recent_only, VqGradient::block_only}) {
    for (const bool aggregate : {true, false}) {
      for (const Index length : {1, 5, 23, 40}) {
        for (const Index mem_len : {0, 7, 30}) {
          Problem p({23, 2, 2, 2, 3, mem_len}, 21);
          p.options.block_len = length;
          p.options.gradient = gradient;
          p.options.aggregate = aggregate;
          CAPTURE(static_cast<int>(gradient));
          CAPTURE(aggregate);
          CAPTURE(length);
          CAPTURE(mem_len);
          check_gradients(p, 40);
        }
      }
    }
  }
}

TEST_CASE("finite differences across several blocks of rows") {
  for (const VqGradient gradient :
       {VqGradient::through_cache, VqGradient::recent_only, VqGradient::block_only}) {
    for (const Index length : {7, 100}) {
      Problem p({210, 1, 3, 2, 5, 20}, 22);
      p.options.block_len = length;
      p.options.gradient = gradient;
      CAPTURE(static_cast<int>(gradient));
      CAPTURE(length);
      check_gradients(p, 10);
    }
  }
}

TEST_CASE("absent biases") {
  Problem p({30, 2, 3, 2, 4, 6}, 23);
  p.options.block_len = 5;
  p.bias.v_bias.resize(0, 0);
  check_gradients(p, 100);
  p.bias.u.resize(0, 0);
  check_gradients(p, 100);
  p.bias.r.resize(0, 0);
  check_gradients(p, 100);
}

TEST_CASE("what the conventions have in common and where they differ") {
  Problem p({210, 1, 3, 2, 4, 4}, 24);  // several blocks of rows
  const Matrix<double> dout = Matrix<double>::Ones(210, 2) + p.v;
  p.options.block_len = 8;
  const Gradients through = backward(p, dout);
  p.options.gradient = VqGradient::recent_only;
  const Gradients recent = backward(p, dout);
  p.options.gradient = VqGradient::block_only;
  const Gradients block = backward(p, dout);
  CHECK((through.dq - block.dq).norm() < 1e-11);
  CHECK((through.dbias.r - block.dbias.r).norm() < 1e-11);
  CHECK((through.dk - recent.dk).norm() < 1e-11);
  CHECK((through.dv - recent.dv).norm() > 0.1);
  CHECK((recent.dk - block.dk).norm() > 0.01);
  // One block: nothing is in the aggregate, the three are the full straight-through gradient.
  p.options.block_len = 210;
  const Gradients whole = backward(p, dout);
  p.options.gradient = VqGradient::through_cache;
  const Gradients same = backward(p, dout);
  CHECK((whole.dk - same.dk).norm() < 1e-11);
  CHECK((whole.dv - same.dv).norm() < 1e-11);
  CHECK((whole.dv - through.dv).norm() < 1e-11);
  CHECK((whole.dk - through.dk).norm() > 0.01);
}

TEST_CASE("executors do not change a bit") {
  Problem p({150, 5, 3, 2, 4, 11}, 27);
  p.options.block_len = 16;
  const Matrix<double> dout = Matrix<double>::Ones(150, 10) + p.v;
  const Gradients one = backward(p, dout);
  for (const int workers : {1, 2, 3, 7}) {
    eb::thread_pool pool(workers);
    const Gradients threads = backward(p, dout, pool);
    CHECK(threads.dq == one.dq);
    CHECK(threads.dk == one.dk);
    CHECK(threads.dv == one.dv);
    CHECK(threads.dbias.u == one.dbias.u);
    CHECK(threads.dbias.v_bias == one.dbias.v_bias);
    CHECK(threads.dbias.r == one.dbias.r);
  }
}

namespace {

/// Rows of `got` are not finite where `bad` says so, all others are those of `want`.
void check_rows(const char* name, const Matrix<double>& got, const Matrix<double>& want,
                const std::vector<bool>& bad) {
  for (Index t = 0; t < want.rows(); ++t) {
    const bool as_expected =
        bad[static_cast<std::size_t>(t)]
            ? !got.row(t).allFinite()
            : (got.row(t) - want.row(t)).norm() < 1e-11;  // (false for NaN; maxCoeff may skip one)
    if (as_expected) continue;
    FAIL_CHECK(std::string(name), " row ", t, ": ", got(t, 0), ", without NaN ", want(t, 0));
    return;
  }
}

enum class Poison { dout, query, value };

/// A NaN in one row of an operand: which gradients it may reach follows from the pairs that the convention lets through.
void check_poison(Problem p, Poison poison, Index at) {
  const Index tokens = p.n.tokens, m = p.n.mem_len, length = p.options.block_len;
  Matrix<double> dout = Matrix<double>::Ones(tokens, p.n.value_dim) + p.v;
  const Gradients want = backward(p, dout);
  Matrix<double>& operand = poison == Poison::dout ? dout : (poison == Poison::query ? p.q : p.v);
  operand(at, 1) = std::numeric_limits<double>::quiet_NaN();
  const Gradients got = backward(p, dout);
  std::vector<bool> query(static_cast<std::size_t>(tokens)), key = query, value = query;
  std::vector<bool> distance(static_cast<std::size_t>(m + 1));
  for (Index i = 0; i < tokens; ++i) {
    const auto sees = [&](Index j) { return j <= i && (p.options.aggregate || i - j <= m); };
    if (poison == Poison::value ? !sees(at) : i != at) continue;  // row i of dS is NaN
    query[static_cast<std::size_t>(i)] = true;
    const Index block = i / length * length,
                cache = p.options.gradient == VqGradient::block_only ? block : block - m;
    for (Index j = 0; j < tokens; ++j) {
      if (!sees(j)) continue;
      const auto at_j = static_cast<std::size_t>(j);
      if (j >= cache) key[at_j] = true;
      if ((j >= cache || p.options.gradient == VqGradient::through_cache) &&
          poison != Poison::value)
        value[at_j] = true;  // (P does not depend on values)
      if (i - j <= m) distance[static_cast<std::size_t>(i - j)] = true;
    }
  }
  check_rows("dq", got.dq, want.dq, query);
  check_rows("dk", got.dk, want.dk, key);
  check_rows("dv", got.dv, want.dv, value);
  check_rows("dr", got.dbias.r, want.dbias.r, distance);
  CHECK(!got.dbias.u.allFinite());
  CHECK(!got.dbias.v_bias.allFinite());
}

}  // namespace

TEST_CASE("a NaN reaches the gradients of what it is paired with and no others") {
  for (const VqGradient gradient :
       {VqGradient::through_cache, VqGradient::recent_only, VqGradient::block_only}) {
    for (const bool aggregate : {true, false}) {
      for (const Index length : {1, 16, 200}) {
        for (const Index at : {0, 15, 16, 63, 64, 100, 149}) {
          for (const Poison poison : {Poison::dout, Poison::query, Poison::value}) {
            CAPTURE(static_cast<int>(gradient));
            CAPTURE(aggregate);
            CAPTURE(length);
            CAPTURE(at);
            CAPTURE(static_cast<int>(poison));
            Problem p({150, 1, 3, 2, 4, 20}, 28);
            p.options.block_len = length;
            p.options.gradient = gradient;
            p.options.aggregate = aggregate;
            check_poison(p, poison, at);
          }
        }
      }
    }
  }
}

TEST_CASE("codewords that no key has and distances that do not occur may hold anything") {
  Problem p({30, 1, 3, 2, 5, 40}, 29);
  const Matrix<double> dout = Matrix<double>::Ones(30, 2) + p.v;
  p.codebook.row(2).setConstant(1e3);
  const Gradients want = backward(p, dout);
  p.codebook.row(2).setConstant(std::numeric_limits<double>::infinity());
  p.bias.r.row(20).setConstant(std::numeric_limits<double>::quiet_NaN());
  const Gradients got = backward(p, dout);
  CHECK((got.dq - want.dq).topRows(20).norm() < 1e-11);
  for (Index i = 20; i < 30; ++i) CHECK(!got.dq.row(i).allFinite());
}

TEST_CASE("the gradient of the commitment loss is the caller's to add") {
  Problem p({20, 2, 3, 2, 4, 4}, 25);
  const eb::VqCodes codes = eb::vq_nearest(p.k, p.codebook, 2);
  Matrix<double> dk(20, 6);
  eb::vq_commit_backward(p.k, p.codebook, codes, 0.5, dk);
  const auto loss = [&] { return 0.5 * eb::vq_commit_forward(p.k, p.codebook, codes); };
  const auto r = eb::gradcheck(loss, p.k, dk);
  CHECK_MESSAGE(r.passed, r.message());
}

TEST_CASE("no rows, and bad input") {
  Problem p({0, 2, 3, 2, 4, 4}, 26);
  const Gradients g = backward(p, p.empty_out());
  CHECK(g.dbias.u == Matrix<double>::Zero(2, 3));
  CHECK(g.dbias.r == Matrix<double>::Zero(10, 3));

  p = Problem({6, 2, 3, 2, 4, 4}, 26);
  Matrix<double> out = p.empty_out(), dq = Matrix<double>::Constant(6, 6, 7), dk = dq, dv = out;
  auto saved = eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  eb::VqBias<double> dbias;
  const auto text = [&](const Matrix<double>& dout) {
    try {
      eb::vq_attention_backward(saved, p.q, p.v, p.codebook, out, dout, dq, dk, dv, p.options,
                                p.bias, &dbias);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    } catch (const std::out_of_range& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  CHECK(text(Matrix<double>(6, 5)) ==
        "eigenblocks: dout is 6 x 5, expected 6 x 4 (shape of value)");
  dk.setConstant(5, 6, 7.0);
  CHECK(text(out) == "eigenblocks: dk is 5 x 6, expected 6 x 6 (shape of query)");
  dk = dq;
  saved.lse.resize(6, 1);
  CHECK(text(out) == "eigenblocks: saved.lse is 6 x 1, expected 6 x 2 (tokens x heads)");
  saved.lse.resize(6, 2);
  saved.codes(3, 1) = 4;
  CHECK(text(out) == "eigenblocks: code (4) is outside [0, 4)");
  CHECK((dq.array() == 7).all());
  CHECK(dbias.u.size() == 0);
}
