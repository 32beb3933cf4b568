// nn/conv1d.hpp: values, states, gradients, errors.
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/nn/conv1d.hpp>

#include "support/alloc_guard.hpp"
#include "support/layer_checks.hpp"

#include <doctest/doctest.h>

#include <limits>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using Vector = eb::Vector<double>;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Case {
  eb::Conv1dOptions options;
  Matrix<double> x, weight, history, dout, dafter;
  Vector bias;

  Case(Index tokens, Index channels, Index width, bool silu) : options{.silu = silu} {
    eb::Random random(5);
    const auto normal = [&](Index rows, Index cols) {
      return eb::normal_matrix<double>(random, rows, cols);
    };
    x = normal(tokens, channels);
    weight = normal(width, channels);
    history = normal(width - 1, channels);
    dout = normal(tokens, channels);
    dafter = normal(width - 1, channels);
    bias = normal(channels, 1);
  }
  /// The formula, on the history and x in one matrix.
  Matrix<double> naive() const {
    Matrix<double> all(history.rows() + x.rows(), x.cols()), out = x;
    all.topRows(history.rows()) = history;
    all.bottomRows(x.rows()) = x;
    for (Index t = 0; t < x.rows(); ++t) {
      for (Index d = 0; d < x.cols(); ++d) {
        double y = bias[d];
        for (Index k = 0; k < weight.rows(); ++k) y += weight(k, d) * all(t + k, d);
        out(t, d) = options.silu ? y / (1 + std::exp(-y)) : y;
      }
    }
    return out;
  }
  Matrix<double> last() const {
    Matrix<double> all(history.rows() + x.rows(), x.cols());
    all.topRows(history.rows()) = history;
    all.bottomRows(x.rows()) = x;
    return all.bottomRows(history.rows());
  }
  double loss() const {
    return (dout.array() * naive().array()).sum() + (dafter.array() * last().array()).sum();
  }
  Matrix<double> whole(eb::ExecutorRef executor = {}) const {
    Matrix<double> out = x * kNan, after = history * kNan;
    eb::conv1d_forward(x, weight, out, options, {.bias = &bias, .history = &history}, &after,
                       executor);
    CHECK(after == last());
    return out;
  }
  struct Gradients {
    Matrix<double> x, weight, history;
    Vector bias;
  };
  Gradients gradients(eb::ExecutorRef executor = {}) const {
    Gradients g{x * kNan, weight * kNan, history * kNan, bias * kNan};
    eb::conv1d_backward(x, weight, dout, g.x, g.weight, options,
                        {.bias = &bias, .history = &history}, &dafter,
                        {.bias = &g.bias, .history = &g.history}, executor);
    return g;
  }
};

}  // namespace

TEST_CASE("conv1d: by hand, PyTorch's order of taps") {
  Matrix<double> x(3, 1), w(2, 1), out(3, 1);
  x << 1, 2, 4;
  w << 10, 1;  // 10 times the token before, 1 times this one
  eb::conv1d_forward(x, w, out);
  CHECK(out(0, 0) == 1);
  CHECK(out(1, 0) == 12);
  CHECK(out(2, 0) == 24);
}

TEST_CASE("conv1d: the formula, at every width and length") {
  for (const Index width : {1, 2, 3, 4, 5, 16}) {
    for (const Index tokens : {0, 1, 2, 3, 5, 70}) {
      for (const bool silu : {false, true}) {
        const Case c(tokens, 11, width, silu);
        CAPTURE(width);
        CAPTURE(tokens);
        CHECK(largest_difference(c.whole(), c.naive()) < 1e-13);
      }
    }
  }
}

TEST_CASE("conv1d: steps of any size are bitwise the whole") {
  for (const Index width : {1, 2, 4, 7}) {
    const Case c(23, 9, width, true);
    Matrix<double> want = c.x, out = c.x;
    eb::conv1d_forward(c.x, c.weight, want, c.options, {.bias = &c.bias});
    for (Index first = 0; first <= 23; ++first) {
      for (const Index rows : {1, 2, 5}) {
        auto state = eb::conv1d_state<double>(width, 9, c.options);
        out.setConstant(kNan);
        for (Index t = 0, n = first; t < 23; t += n, n = rows) {  // no rows at all is a step too
          n = std::min(n, 23 - t);
          eb::conv1d_step(state, c.x.middleRows(t, n), c.weight, out.middleRows(t, n), &c.bias);
        }
        CHECK(out == want);
        CHECK(state.size() == 23);
        CHECK(state.history == c.x.bottomRows(width - 1));
      }
    }
  }
  auto state = eb::conv1d_state<double>(4, 9);
  CHECK(state.bytes() == 3 * 9 * 8);
  const auto before = state;
  const Case c(1, 9, 4, false);
  Matrix<double> one(1, 9), two(1, 9);
  eb::conv1d_step(state, c.x, c.weight, one);
  CHECK(state.history != before.history);
  state = before;
  eb::conv1d_step(state, c.x, c.weight, two);
  CHECK(one == two);
}

TEST_CASE("conv1d: gradients of every input by finite differences") {
  for (const Index width : {1, 3, 4}) {
    for (const Index tokens : {0, 1, 2, 9}) {
      for (const bool silu : {false, true}) {
        Case c(tokens, 3, width, silu);
        const Case::Gradients g = c.gradients();
        CAPTURE(width);
        CAPTURE(tokens);
        const auto check = [&](auto& x, const Matrix<double>& gradient) {
          const auto r =
              eb::gradcheck([&] { return c.loss(); },
                            Eigen::Map<Matrix<double>>(x.data(), x.rows(), x.cols()), gradient);
          CHECK_MESSAGE(r.passed, r.message());
        };
        check(c.x, g.x);
        check(c.weight, g.weight);
        check(c.history, g.history);
        check(c.bias, g.bias);
      }
    }
  }
}

TEST_CASE("conv1d: optional parts are as zeros") {
  const Case c(9, 5, 4, true);
  const Vector none = Vector::Zero(5);
  const Matrix<double> zero = c.history * 0;
  Matrix<double> a = c.x, b = c.x, dx = c.x, dw = c.weight, dx2 = c.x, dw2 = c.weight;
  Matrix<double> dh = c.history, dh2 = c.history;
  eb::conv1d_forward(c.x, c.weight, a, c.options);
  eb::conv1d_forward(c.x, c.weight, b, c.options, {.bias = &none, .history = &zero});
  CHECK(a == b);
  eb::conv1d_backward(c.x, c.weight, c.dout, dx, dw, c.options, {}, nullptr, {.history = &dh});
  eb::conv1d_backward(c.x, c.weight, c.dout, dx2, dw2, c.options, {.bias = &none, .history = &zero},
                      &zero, {.history = &dh2});
  CHECK(dx == dx2);
  CHECK(dw == dw2);
  CHECK(dh == dh2);
}

TEST_CASE("conv1d: executors do not change a bit; NaN stays in its channel and its window") {
  const Case c(200, 150, 4, true);
  const Matrix<double> want = c.whole();
  const Case::Gradients g = c.gradients();
  for (const int workers : {2, 3, 7}) {
    const eb::thread_pool pool(workers);
    CHECK(c.whole(pool) == want);
    const Case::Gradients p = c.gradients(pool);
    CHECK((p.x == g.x && p.weight == g.weight && p.bias == g.bias && p.history == g.history));
  }
  Case bad = c;
  bad.x(100, 7) = kNan;
  const Matrix<double> got = bad.whole();
  for (Index t = 0; t < 200; ++t) {
    for (Index d = 0; d < 150; ++d) {
      const bool sees = d == 7 && t >= 100 && t < 104;
      if (sees != bool(std::isnan(got(t, d))) || (!sees && got(t, d) != want(t, d)))
        FAIL("at ", t, ", ", d);
    }
  }
}

TEST_CASE("conv1d: views with strides; steps allocate nothing; float") {
  const Case c(20, 9, 4, true);
  Matrix<double> wide(20, 30), want = c.x;
  wide.middleCols(5, 9) = c.x;
  eb::conv1d_forward(c.x, c.weight, want, c.options);
  eb::conv1d_forward(wide.middleCols(5, 9), c.weight, wide.rightCols(9), c.options);
  CHECK(wide.rightCols(9) == want);
  auto state = eb::conv1d_state<double>(4, 9, c.options);
  const AllocationCount count;
  eb::conv1d_step(state, c.x.topRows(1), c.weight, want.topRows(1), &c.bias);
  eb::conv1d_step(state, c.x.topRows(7), c.weight, want.topRows(7), &c.bias);
  CHECK(count.calls() == 0);
  Matrix<float> out(20, 9);
  const eb::Vector<float> bias = c.bias.cast<float>();
  const Matrix<float> history = c.history.cast<float>(), x = c.x.cast<float>(),
                      weight = c.weight.cast<float>();
  eb::conv1d_forward(x, weight, out, c.options, {.bias = &bias, .history = &history});
  CHECK(largest_difference(out.cast<double>(), c.naive()) < 3e-6);
}

TEST_CASE("conv1d: bad input is named, and nothing is written") {
  const Case c(3, 4, 4, false);
  const Matrix<double> wrong(2, 7);
  Matrix<double> out = Matrix<double>::Constant(3, 4, 5), dw = Matrix<double>::Constant(4, 4, 5),
                 bad(2, 7), after = dw.topRows(3);
  const Vector short_bias(3);
  Vector bad_bias(3);
  const auto refuse = [&](const Matrix<double>& w, const eb::Conv1dTensors<double>& extra,
                          Matrix<double>& to, Matrix<double>* last, const char* text) {
    check_throws<eb::invalid_argument>([&] { eb::conv1d_forward(c.x, w, to, {}, extra, last); },
                                       text);
  };
  refuse(Matrix<double>(0, 4), {}, out, nullptr, "width (0) must be in [1, 16]");
  refuse(Matrix<double>(17, 4), {}, out, nullptr, "width (17) must be in [1, 16]");
  refuse(wrong, {}, out, nullptr, "weight is 2 x 7, expected 2 x 4 (width, channels of x)");
  refuse(c.weight, {.bias = &short_bias}, out, nullptr,
         "bias has 3 entries, expected 4 (channels of x)");
  refuse(c.weight, {.history = &wrong}, out, nullptr,
         "history is 2 x 7, expected 3 x 4 (width - 1, channels of x)");
  refuse(c.weight, {}, bad, nullptr, "out is 2 x 7, expected 3 x 4 (shape of x)");
  refuse(c.weight, {}, out, &bad, "after is 2 x 7, expected 3 x 4 (width - 1, channels of x)");
  check_throws<eb::invalid_argument>([] { eb::conv1d_state<double>(0, 4); },
                                     "width (0) must be in [1, 16]");
  check_throws<eb::invalid_argument>([] { eb::conv1d_state<double>(4, 0); },
                                     "channels (0) must be at least 1");
  const auto backward = [&](const Matrix<double>& dout, Matrix<double>& dx, Matrix<double>& to_w,
                            const Matrix<double>* dlast, const eb::Conv1dGradients<double>& to,
                            const Vector* bias, const char* text) {
    check_throws<eb::invalid_argument>(
        [&] { eb::conv1d_backward(c.x, c.weight, dout, dx, to_w, {}, {.bias = bias}, dlast, to); },
        text);
  };
  backward(wrong, out, dw, nullptr, {}, nullptr, "dout is 2 x 7, expected 3 x 4 (shape of x)");
  backward(c.x, bad, dw, nullptr, {}, nullptr, "dx is 2 x 7, expected 3 x 4 (shape of x)");
  backward(c.x, out, bad, nullptr, {}, nullptr,
           "dweight is 2 x 7, expected 4 x 4 (shape of weight)");
  backward(c.x, out, dw, &wrong, {}, nullptr,
           "dafter is 2 x 7, expected 3 x 4 (width - 1, channels of x)");
  backward(c.x, out, dw, nullptr, {.history = &bad}, nullptr,
           "gradients.history is 2 x 7, expected 3 x 4 (width - 1, channels of x)");
  backward(c.x, out, dw, nullptr, {.bias = &bad_bias}, nullptr,
           "gradients.bias is wanted, but there is no bias");
  backward(c.x, out, dw, nullptr, {.bias = &bad_bias}, &c.bias,
           "gradients.bias has 3 entries, expected 4 (channels of x)");
  CHECK((out.array() == 5).all());
  CHECK((dw.array() == 5).all());
  CHECK((after.array() == 5).all());
}
