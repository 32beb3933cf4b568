#include <eigenblocks/attention/vq_attention.hpp>
#include <eigenblocks/attention/vq_reference.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/alloc_guard.hpp"
#include "vq_case.hpp"

namespace {

using namespace vq_case;
using State = eb::VqState<double>;

constexpr double kSame = 1e-12;  // soft-max weighted means of numbers of size 1

struct Result {
  Matrix<double> out, lse;
};

Result definition(const Problem& p, const eb::VqCodes& codes) {
  Result r{p.empty_out(), Matrix<double>(p.n.tokens, p.n.heads)};
  eb::vq_attention_reference(p.q, codes, p.v, p.codebook, r.out, r.lse, p.options, p.bias);
  return r;
}

void steps(const Problem& p, State& state, Matrix<double>& out, Index begin, Index end, Index chunk,
           eb::ExecutorRef executor = {}) {
  for (Index t = begin; t < end; t += chunk) {
    const Index n = std::min(chunk, end - t);
    eb::vq_attention_step(state, p.q.middleRows(t, n), p.k.middleRows(t, n), p.v.middleRows(t, n),
                          p.codebook, out.middleRows(t, n), p.options, p.bias, executor);
  }
}

double difference(const Matrix<double>& a, const Matrix<double>& b) {
  return a.size() == 0 ? 0 : (a - b).cwiseAbs().maxCoeff<Eigen::PropagateNaN>();
}

/// What the state must hold after all tokens, summed up from the definition.
void check_state(const Problem& p, const State& state, const eb::VqCodes& codes) {
  const Sizes& n = p.n;
  const Index older = std::max<Index>(0, n.tokens - n.mem_len), e = n.value_dim;
  Matrix<double> sum = Matrix<double>::Zero(n.heads * n.codes, e);
  Matrix<Index> count = Matrix<Index>::Zero(n.heads, n.codes);
  for (Index t = 0; t < older; ++t) {
    for (Index h = 0; h < n.heads; ++h) {
      ++count(h, codes(t, h));
      sum.row(h * n.codes + codes(t, h)) += p.v.row(t).segment(h * e, e);
    }
  }
  for (Index s = 0; s < sum.rows(); ++s)
    sum.row(s) /= std::max<double>(1, static_cast<double>(count.data()[s]));
  CHECK(state.tokens == n.tokens);
  CHECK(state.count == count);
  CHECK(difference(state.mean, sum) < kSame);
  for (Index t = older; t < n.tokens; ++t) {
    CHECK(state.memory_codes.row(t % n.mem_len) == codes.row(t));
    CHECK(state.memory_value.row(t % n.mem_len) == p.v.row(t));
  }
}

template <class F>
std::string message(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("tiles, definition and steps agree, and the state is the summed-up past") {
  for (const bool aggregate : {true, false}) {
    for (const Index tokens : {0, 1, 2, 13, 61, 200}) {
      for (const Index mem_len : {0, 1, 5, 40, 500}) {
        for (const Index codes : {1, 3, 150}) {
          Problem p({tokens, 2, 3, 5, codes, mem_len}, 7);
          p.options.aggregate = aggregate;
          CAPTURE(tokens);
          CAPTURE(mem_len);
          CAPTURE(codes);
          Matrix<double> out = p.empty_out();
          const auto saved =
              eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
          const Result want = definition(p, saved.codes);
          CHECK(difference(out, want.out) < kSame);
          CHECK(difference(saved.lse, want.lse) < kSame);
          for (const Index chunk : {1, 4, 7, 50, 200}) {
            CAPTURE(chunk);
            State state = eb::vq_state(p.codebook, p.n.value_dim, p.options);
            out.setZero();
            steps(p, state, out, 0, tokens, chunk);
            CHECK(difference(out, want.out) < kSame);
            check_state(p, state, saved.codes);
          }
        }
      }
    }
  }
}

TEST_CASE("a sequence of several chunks") {
  Problem p({1500, 1, 4, 3, 6, 37}, 3);
  Matrix<double> out = p.empty_out();
  const auto saved = eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  const Result want = definition(p, saved.codes);
  CHECK(difference(out, want.out) < kSame);
  State state = eb::vq_state(p.codebook, p.n.value_dim, p.options);
  steps(p, state, out, 0, 1500, 700);
  CHECK(difference(out, want.out) < kSame);
  check_state(p, state, saved.codes);
}

TEST_CASE("the block length does not change the output, executors do not change a bit") {
  Problem p({1100, 2, 4, 3, 5, 20}, 4);
  Matrix<double> out = p.empty_out(), other = out;
  const auto saved = eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  p.options.block_len = 3;
  const Matrix<double> whole = out;
  for (const int workers : {1, 2, 3, 7}) {
    eb::thread_pool pool(workers);
    other.setZero();
    const auto again =
        eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, other, p.options, p.bias, pool);
    CHECK(whole == other);
    CHECK(saved.codes == again.codes);
    CHECK(saved.lse == again.lse);
    for (const Index chunk : {5, 600}) {
      State a = eb::vq_state(p.codebook, p.n.value_dim, p.options), b = a;
      steps(p, a, out, 0, 1100, chunk);
      steps(p, b, other, 0, 1100, chunk, pool);
      CHECK(out == other);
      CHECK(a.mean == b.mean);
      CHECK(a.count == b.count);
    }
  }
}

TEST_CASE("each bias may be absent, operands may be parts of larger matrices") {
  for (int which = 0; which < 3; ++which) {
    Problem p({70, 2, 4, 3, 5, 9}, 5);
    if (which == 0) p.bias = {};
    if (which == 1) p.bias.v_bias.resize(0, 0);
    if (which == 2) p.bias.u.resize(0, 0);
    Matrix<double> wide_q(70, 20), wide_k(70, 21), wide_v(70, 22), wide_out(70, 23);
    Matrix<double> wide_codebook(10, 9);
    wide_q.middleCols(3, 8) = p.q;
    wide_k.middleCols(5, 8) = p.k;
    wide_v.middleCols(2, 6) = p.v;
    wide_codebook.middleCols(1, 4) = p.codebook;
    wide_out.setConstant(7);
    const auto run = [&](auto out, State* state) {
      const auto q = wide_q.middleCols(3, 8), k = wide_k.middleCols(5, 8),
                 v = wide_v.middleCols(2, 6), c = wide_codebook.middleCols(1, 4);
      if (state == nullptr)
        return eb::vq_attention_forward(q, k, v, c, out, p.options, p.bias).codes;
      for (Index t = 0; t < 70; t += 35) {
        eb::vq_attention_step(*state, q.middleRows(t, 35), k.middleRows(t, 35), v.middleRows(t, 35),
                              c, out.middleRows(t, 35), p.options, p.bias);
      }
      return eb::VqCodes();
    };
    const Result want = definition(p, run(wide_out.middleCols(4, 6), nullptr));
    CHECK(difference(wide_out.middleCols(4, 6), want.out) < kSame);
    CHECK((wide_out.leftCols(4).array() == 7).all());
    CHECK((wide_out.rightCols(13).array() == 7).all());
    State state = eb::vq_state(p.codebook, 3, p.options);
    run(wide_out.middleCols(4, 6), &state);
    CHECK(difference(wide_out.middleCols(4, 6), want.out) < kSame);
  }
}

TEST_CASE("a state is a value: copies continue alike, reset forgets") {
  const Problem p({90, 2, 3, 4, 6, 8}, 6);
  Matrix<double> out = p.empty_out(), replay = out;
  State state = eb::vq_state(p.codebook, p.n.value_dim, p.options);
  steps(p, state, out, 0, 50, 10);
  const State snapshot = state;
  steps(p, state, out, 50, 90, 1);
  State restored = snapshot;
  steps(p, restored, replay, 50, 90, 1);
  CHECK(out.bottomRows(40) == replay.bottomRows(40));
  CHECK(state.mean == restored.mean);
  CHECK(state.bytes() == snapshot.bytes());
  CHECK(state.bytes() == 8 * (8 * 2 + 8 * 8 + 2 * 6 + 2 * 6 * 4));
  state.reset();
  steps(p, state, replay, 0, 50, 10);
  CHECK(out.topRows(50) == replay.topRows(50));
}

TEST_CASE("a step allocates nothing once warm") {
  const Problem p({400, 2, 16, 16, 40, 48}, 7);
  for (const Index chunk : {1, 3, 40}) {
    State state = eb::vq_state(p.codebook, p.n.value_dim, p.options);
    Matrix<double> out = p.empty_out();
    steps(p, state, out, 0, chunk, chunk);
    const AllocationCount count;
    steps(p, state, out, chunk, 10 * chunk, chunk);
    if (AllocationCount::available) CHECK(count.calls() == 0);
  }
}

TEST_CASE("huge scores, dead codes, NaN keys and masked pairs") {
  Problem p({80, 1, 3, 2, 7, 6}, 8);
  p.q *= 3000;
  p.codebook.row(2).setConstant(1e6);  // no key comes near: never in the aggregate
  Matrix<double> out = p.empty_out();
  auto saved = eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  Result want = definition(p, saved.codes);
  CHECK(out.allFinite());
  CHECK(difference(out, want.out) < 1e-9);
  CHECK((saved.codes.array() != 2).all());

  p = Problem({80, 1, 3, 2, 7, 6}, 8);
  p.k.row(30).setConstant(std::numeric_limits<double>::quiet_NaN());
  State state = eb::vq_state(p.codebook, 2, p.options);
  saved = eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  CHECK(saved.codes(30, 0) == 0);
  CHECK(out.allFinite());
  Matrix<double> stepped = out;
  steps(p, state, stepped, 0, 80, 1);
  CHECK(difference(out, stepped) < kSame);

  // A codeword that only later keys have, of infinite size: earlier rows must not see it.
  p = Problem({80, 1, 3, 2, 7, 6}, 9);
  p.codebook.row(4).setConstant(std::numeric_limits<double>::infinity());
  p.options.aggregate = true;
  saved = eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  want = definition(p, saved.codes);
  CHECK(difference(out, want.out) < kSame);
  p.q.row(40).setConstant(std::numeric_limits<double>::quiet_NaN());
  eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  for (Index i = 0; i < 80; ++i) CHECK(out.row(i).allFinite() == (i != 40));
}

TEST_CASE("of codes equally near, steps and tiles take the lowest") {
  Problem p({60, 1, 3, 2, 8, 9}, 14);
  p.k = (3 * p.k).array().round();  // whole numbers: distances are exact
  p.codebook = (3 * p.codebook).array().round();
  p.codebook.bottomRows(4) = p.codebook.topRows(4);
  Matrix<double> out = p.empty_out();
  const auto saved = eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  CHECK((saved.codes.array() < 4).all());
  for (const Index chunk : {1, 30}) {
    State state = eb::vq_state(p.codebook, 2, p.options);
    steps(p, state, out, 0, 60, chunk);
    check_state(p, state, saved.codes);
  }
}

TEST_CASE("a value that is not finite shows where it is attended to and nowhere else") {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN(),
                   inf = std::numeric_limits<double>::infinity();
  const auto check = [](const Matrix<double>& got, const Matrix<double>& want) {
    for (Index i = 0; i < want.size(); ++i) {
      const double a = got.data()[i], b = want.data()[i];
      if (std::isnan(a) && std::isnan(b)) continue;
      if (a != b && !(std::abs(a - b) < kSame)) {
        FAIL_CHECK("row ", i / want.cols(), ": ", a, ", expected ", b);
        return;
      }
    }
  };
  // 200 rows are several tiles and groups of them for any width of a register.
  for (const bool aggregate : {true, false}) {
    for (const Index mem_len : {0, 5, 70}) {
      for (const Index at : {0, 1, 15, 16, 23, 24, 47, 48, 95, 96, 130, 199}) {
        for (const double bad : {nan, inf}) {
          CAPTURE(aggregate);
          CAPTURE(mem_len);
          CAPTURE(at);
          Problem p({200, 2, 3, 9, 4, mem_len}, 12);
          p.options.aggregate = aggregate;
          p.v(at, 8) = p.v(at, 9) = bad;  // the last of one head, the first of the other
          if (at > 40) p.v(at - 1, 2) = p.v(at - 3, 2) = bad;
          Matrix<double> out = p.empty_out();
          const auto saved =
              eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
          const Result want = definition(p, saved.codes);
          check(out, want.out);
          CHECK(difference(saved.lse, want.lse) < kSame);
          for (const Index chunk : {1, 35, 100}) {
            CAPTURE(chunk);
            State state = eb::vq_state(p.codebook, p.n.value_dim, p.options);
            steps(p, state, out, 0, 200, chunk);
            check(out, want.out);
          }
        }
      }
    }
  }
  // Attended to with a probability that underflows: still NaN.
  Problem p({40, 1, 1, 2, 2, 0}, 13);
  p.bias = {};
  p.codebook << 1, -1;
  p.k.setOnes();
  p.k(20, 0) = -1;
  p.q.setConstant(1000);
  p.v(20, 0) = nan;
  Matrix<double> out = p.empty_out();
  eb::vq_attention_forward(p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
  for (Index i = 0; i < 40; ++i) CHECK(std::isnan(out(i, 0)) == (i >= 20));
  CHECK(out.col(1).allFinite());
}

TEST_CASE("float") {
  const Problem p({300, 2, 8, 8, 30, 24}, 10);
  const Matrix<float> q = p.q.cast<float>(), k = p.k.cast<float>(), v = p.v.cast<float>(),
                      codebook = p.codebook.cast<float>();
  const eb::VqBias<float> bias{p.bias.u.cast<float>(), p.bias.v_bias.cast<float>(),
                               p.bias.r.cast<float>()};
  Matrix<float> out(300, 16);
  const auto saved = eb::vq_attention_forward(q, k, v, codebook, out, p.options, bias);
  CHECK(difference(out.cast<double>(), definition(p, saved.codes).out) < 1e-5);
}

TEST_CASE("bad input is named, and nothing is written") {
  Problem p({10, 2, 3, 4, 5, 6}, 11);
  Matrix<double> out = Matrix<double>::Constant(10, 8, 7);
  State state = eb::vq_state(p.codebook, 4, p.options);
  const auto check = [&](const char* text, auto change) {
    Problem bad = p;
    Matrix<double> bad_out = out;
    change(bad, bad_out);
    const Matrix<double> before = bad_out;
    const std::string forward = message([&] {
      eb::vq_attention_forward(bad.q, bad.k, bad.v, bad.codebook, bad_out, bad.options, bad.bias);
    });
    CHECK_MESSAGE(forward == std::string("eigenblocks: ") + text, forward);
    const std::string step = message([&] {
      eb::vq_attention_step(state, bad.q, bad.k, bad.v, bad.codebook, bad_out, bad.options,
                            bad.bias);
    });
    CHECK_MESSAGE(step == std::string("eigenblocks: ") + text, step);
    CHECK(bad_out == before);
    CHECK(state.tokens == 0);
  };
  check("heads (0) must be at least 1", [](Problem& b, auto&) { b.options.heads = 0; });
  check("query has 5 columns, expected 6 (heads * columns of the codebook)",
        [](Problem& b, auto&) { b.q.resize(10, 5); });
  check("key is 9 x 6, expected 10 x 6 (shape of query)",
        [](Problem& b, auto&) { b.k.resize(9, 6); });
  check("value is 9 x 8, expected 10 rows (rows of query) and a multiple of 2 columns (heads)",
        [](Problem& b, auto&) { b.v.resize(9, 8); });
  check("codebook has 0 rows, expected a positive multiple of heads (2)",
        [](Problem& b, auto&) { b.codebook.resize(0, 3); });
  check("codebook has 9 rows, expected a positive multiple of heads (2)",
        [](Problem& b, auto&) { b.codebook.resize(9, 3); });
  check("block_len (0) must be at least 1", [](Problem& b, auto&) { b.options.block_len = 0; });
  check("mem_len (-1) must not be negative", [](Problem& b, auto&) { b.options.mem_len = -1; });
  check("u is 1 x 3, expected 2 x 3 (heads x columns of codebook, or empty)",
        [](Problem& b, auto&) { b.bias.u.resize(1, 3); });
  check("v_bias is 2 x 4, expected 2 x 3 (heads x columns of codebook, or empty)",
        [](Problem& b, auto&) { b.bias.v_bias.resize(2, 4); });
  check("r is 12 x 3, expected 14 x 3 (heads * (mem_len + 1) x columns of codebook, or empty)",
        [](Problem& b, auto&) { b.bias.r.resize(12, 3); });
  check("v_bias is 2 x 3, r is empty: v_bias needs r",
        [](Problem& b, auto&) { b.bias.r.resize(0, 0); });
  check("out is 10 x 7, expected 10 x 8 (shape of value)",
        [](Problem&, auto& bad_out) { bad_out.setConstant(10, 7, 7.0); });

  p.options.mem_len = 5;
  p.bias.r.setZero(12, 3);
  CHECK(message([&] {
          eb::vq_attention_step(state, p.q, p.k, p.v, p.codebook, out, p.options, p.bias);
        }) == "eigenblocks: state.memory_codes is 6 x 2, expected 5 x 2 (mem_len x heads)");
  CHECK(message([&] { eb::vq_state(p.codebook, -1, p.options); }) ==
        "eigenblocks: value_dim (-1) must not be negative");
  CHECK((out.array() == 7).all());
}
