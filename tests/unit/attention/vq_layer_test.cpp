#include <eigenblocks/attention/vq.hpp>
#include <eigenblocks/attention/vq_reference.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <string>

#include "support/alloc_guard.hpp"

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

namespace {

constexpr Index kWidth = 6, kCodes = 4;

struct Problem {
  eb::VqLayerOptions options{.heads = 2,
                             .key_dim = 3,
                             .value_dim = 5,
                             .block_len = 40,
                             .mem_len = 7,
                             .norm_eps = 1e-3,
                             .wave_base = 50,
                             .commit_weight = 0.3};
  eb::VqLayerWeights<double> w;
  Matrix<double> codebook, x, y;

  explicit Problem(Index tokens) {
    eb::Random random(3);
    const auto matrix = [&](Index rows, Index cols) {
      return Matrix<double>(eb::normal_matrix<double>(random, rows, cols, 0.7));
    };
    w = {matrix(kWidth, 6), matrix(kWidth, 6),  matrix(kWidth, 10), matrix(kWidth, 10),
         matrix(kWidth, 6), matrix(10, kWidth), matrix(2, 3),       matrix(2, 3)};
    codebook = matrix(2 * kCodes, 3);
    x = matrix(tokens, kWidth);
    y = x;
  }
};

Matrix<double> silu(const Matrix<double>& x) { return x.array() / (1 + (-x.array()).exp()); }

/// d^(-1/4) times each head's rows over their root mean square.
Matrix<double> normed(Matrix<double> x, double eps) {
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index h = 0; h < 2; ++h) {
      auto head = x.row(t).segment(3 * h, 3);
      head *= std::pow(3.0, -0.25) / std::sqrt(head.squaredNorm() / 3 + eps);
    }
  }
  return x;
}

}  // namespace

TEST_CASE("the layer is what its formulas say, whole and in steps") {
  Problem p(60);
  const eb::VqLayer<double> layer(p.options);
  eb::VqLayerSaved<double> saved;
  eb::vq_layer_forward(layer, p.w, p.codebook, p.x, p.y, saved);

  const Matrix<double> q = normed(p.x * p.w.w_q, 1e-3), k = normed(p.x * p.w.w_k, 1e-3);
  const double scale = std::pow(3.0, -0.25);
  eb::VqBias<double> bias{scale * p.w.u, scale * p.w.v_bias, Matrix<double>(16, 3)};
  for (Index distance = 0; distance < 8; ++distance) {
    Eigen::RowVectorXd wave(kWidth);
    for (Index i = 0; i < 3; ++i) {
      const double angle =
          static_cast<double>(distance) * std::pow(50.0, -static_cast<double>(i) / 3);
      wave[i] = std::sin(angle);
      wave[3 + i] = std::cos(angle);
    }
    const Eigen::RowVectorXd r = scale * wave * p.w.w_r;
    bias.r.row(distance) = r.head(3);
    bias.r.row(8 + distance) = r.tail(3);
  }
  const eb::VqCodes codes = eb::vq_nearest(k, p.codebook, 2);
  Matrix<double> attended(60, 10), lse(60, 2);
  eb::vq_attention_reference(q, codes, silu(p.x * p.w.w_v), p.codebook, attended, lse,
                             layer.attention(), bias);
  const Matrix<double> want = attended.cwiseProduct(silu(p.x * p.w.w_g)) * p.w.w_o;
  CHECK((p.y - want).norm() < 1e-11);
  CHECK(saved.commit ==
        doctest::Approx(eb::vq_commit_forward(k, p.codebook, codes)).epsilon(1e-12));

  for (const Index chunk : {1, 4, 30}) {
    eb::VqLayerState<double> state = eb::vq_layer_state(layer, p.w, p.codebook);
    Matrix<double> out(60, kWidth);
    for (Index t = 0; t < 60; t += chunk) {
      const AllocationCount count;
      eb::vq_layer_step(layer, p.w, p.codebook, state, p.x.middleRows(t, chunk),
                        out.middleRows(t, chunk));
      if (AllocationCount::available && t > 0) CHECK(count.calls() == 0);
    }
    CHECK((out - want).norm() < 1e-11);
  }
}

TEST_CASE("what is saved may come from another layer") {
  Problem p(20);
  const eb::VqLayer<double> first(p.options);
  eb::VqLayerSaved<double> saved, fresh;
  eb::vq_layer_forward(first, p.w, p.codebook, p.x, p.y, saved);
  const auto same = [&](const eb::VqLayerOptions& options) {
    const eb::VqLayer<double> layer(options);
    Matrix<double> want = p.x, dx = p.x, want_dx = p.x;
    eb::VqLayerWeights<double> g, want_g;
    eb::vq_layer_forward(layer, p.w, p.codebook, p.x, p.y, saved);
    eb::vq_layer_forward(layer, p.w, p.codebook, p.x, want, fresh = {});
    CHECK(p.y == want);
    eb::vq_layer_backward(layer, p.w, p.codebook, saved, p.x, p.y, dx, g);
    eb::vq_layer_backward(layer, p.w, p.codebook, fresh, p.x, p.y, want_dx, want_g);
    CHECK(dx == want_dx);
    CHECK(g.w_r == want_g.w_r);
  };
  p.options.wave_base = 7;
  same(p.options);
  p.options.mem_len = 9;
  same(p.options);
}

TEST_CASE("finite differences of the layer where the convention is a true gradient") {
  // With the commitment loss; w_k without what goes through the codes, that is with a constant output.
  Problem p(24);
  const eb::VqLayer<double> layer(p.options);
  eb::VqLayerSaved<double> saved;
  eb::Random random(5);
  Matrix<double> dy = eb::normal_matrix<double>(random, 24, kWidth), dx(24, kWidth);
  eb::VqLayerWeights<double> g;
  const auto loss = [&] {
    eb::vq_layer_forward(layer, p.w, p.codebook, p.x, p.y, saved);
    return dy.cwiseProduct(p.y).sum() + 0.3 * saved.commit;
  };
  loss();
  eb::vq_layer_backward(layer, p.w, p.codebook, saved, p.x, dy, dx, g);
  const auto check = [&](const char* name, Matrix<double>& x, const Matrix<double>& gradient) {
    const auto r = eb::gradcheck(loss, x, gradient, {.step = 1e-4});
    CHECK_MESSAGE(r.passed, name, ": ", r.message());
  };
  check("w_q", p.w.w_q, g.w_q);
  check("w_v", p.w.w_v, g.w_v);
  check("w_g", p.w.w_g, g.w_g);
  check("w_r", p.w.w_r, g.w_r);
  check("w_o", p.w.w_o, g.w_o);
  check("u", p.w.u, g.u);
  check("v_bias", p.w.v_bias, g.v_bias);
  dy.setZero();
  loss();
  eb::vq_layer_backward(layer, p.w, p.codebook, saved, p.x, dy, dx, g);
  check("w_k", p.w.w_k, g.w_k);
  check("x", p.x, dx);
}

TEST_CASE("the key gradient is straight-through: that of the codewords, through the norm") {
  Problem p(24);
  p.options.commit_weight = 0;
  const eb::VqLayer<double> layer(p.options);
  eb::VqLayerSaved<double> saved;
  eb::Random random(6);
  const Matrix<double> dy = eb::normal_matrix<double>(random, 24, kWidth);
  Matrix<double> dx(24, kWidth), dq(24, 6), dk(24, 6), dv(24, 10), dgated(24, 10);
  eb::VqLayerWeights<double> g;
  eb::vq_layer_forward(layer, p.w, p.codebook, p.x, p.y, saved);
  eb::vq_layer_backward(layer, p.w, p.codebook, saved, p.x, dy, dx, g);
  dgated = (dy * p.w.w_o.transpose()).cwiseProduct(silu(saved.g_raw));
  eb::vq_attention_backward(saved.attention, saved.q, saved.v, p.codebook, saved.attended, dgated,
                            dq, dk, dv, layer.attention(), saved.bias);
  const auto surrogate = [&] { return dk.cwiseProduct(normed(p.x * p.w.w_k, 1e-3)).sum(); };
  const auto r = eb::gradcheck(surrogate, p.w.w_k, g.w_k);
  CHECK_MESSAGE(r.passed, r.message());
}

TEST_CASE("bad input is named") {
  Problem p(5);
  const auto text = [](auto&& f) {
    try {
      f();
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  p.options.heads = 0;
  CHECK(text([&] { eb::VqLayer<double>{p.options}; }) ==
        "eigenblocks: heads (0) must be at least 1");
  p.options.heads = 2;
  p.options.wave_base = 0;
  CHECK(text([&] { eb::VqLayer<double>{p.options}; }) ==
        "eigenblocks: wave_base (0) must be positive");
  p.options.wave_base = 1;
  const eb::VqLayer<double> layer(p.options);
  eb::VqLayerSaved<double> saved;
  Matrix<double> odd(5, 5);
  CHECK(text([&] { eb::vq_layer_forward(layer, p.w, p.codebook, odd, odd, saved); }) ==
        "eigenblocks: x has 5 columns, expected an even number (sines and cosines)");
  CHECK(text([&] { eb::vq_layer_forward(layer, p.w, p.codebook, p.x, odd, saved); }) ==
        "eigenblocks: y is 5 x 5, expected 5 x 6 (shape of x)");
  p.w.w_g.resize(6, 9);
  CHECK(text([&] { eb::vq_layer_state(layer, p.w, p.codebook); }) ==
        "eigenblocks: w_g is 6 x 9, expected 6 x 10 (columns of x, heads * value_dim)");
}
