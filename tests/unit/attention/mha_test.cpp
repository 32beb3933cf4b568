#include "mha_case.hpp"
#include "support/layer_checks.hpp"

#include <eigenblocks/attention/mha.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <string>
#include <vector>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

namespace {

constexpr Index kWidth = 10;

/// Everything a layer can have: biases, norm gains, sinks.
eb::MhaWeights<double> random_weights(const eb::MhaOptions& o, std::uint64_t seed) {
  eb::Random random(seed);
  const Index q = o.heads * o.head_dim, kv = o.kv_heads * o.head_dim;
  eb::MhaWeights<double> w;
  w.w_q = eb::normal_matrix<double>(random, kWidth, q, 0.4);
  w.w_k = eb::normal_matrix<double>(random, kWidth, kv, 0.4);
  w.w_v = eb::normal_matrix<double>(random, kWidth, kv, 0.4);
  w.w_o = eb::normal_matrix<double>(random, q, kWidth, 0.4);
  const auto vector = [&](Index n) {
    return Vector<double>(eb::normal_matrix<double>(random, n, 1));
  };
  w.b_q = vector(q);
  w.b_k = vector(kv);
  w.b_v = vector(kv);
  w.b_o = vector(kWidth);
  w.sinks = vector(o.heads);
  if (o.qk_norm != eb::QkNorm::none) {
    const bool head = o.qk_norm == eb::QkNorm::rms_head;
    w.q_norm = vector(head ? o.head_dim : q);
    w.k_norm = vector(head ? o.head_dim : kv);
  }
  return w;
}

Matrix<double> random_rows(Index rows, std::uint64_t seed) {
  eb::Random random(seed);
  return eb::normal_matrix<double>(random, rows, kWidth);
}

Matrix<double> forward(const eb::Mha<double>& layer, const eb::MhaWeights<double>& w,
                       const Matrix<double>& x, const eb::MhaBatch& batch = {}) {
  Matrix<double> y(x.rows(), x.cols());
  eb::MhaSaved<double> saved;
  mha_case::forward(layer, w, x, y, saved, batch);
  return y;
}

// Sums of at most ~100 terms of size 1: two roundings each, far below 1e-12.
constexpr double kSame = 1e-12;

std::vector<eb::MhaOptions> option_grid() {
  eb::MhaOptions plain{.heads = 4, .kv_heads = 2, .head_dim = 6};
  eb::MhaOptions head_norm = plain, full_norm = plain, window = plain, capped = plain, nope = plain;
  head_norm.qk_norm = eb::QkNorm::rms_head;
  full_norm.qk_norm = eb::QkNorm::rms_full;
  full_norm.rope_layout = eb::RopeLayout::interleaved;
  window.window_left = 3;
  window.rotary_dim = 4;
  capped.soft_cap = 2.0;
  capped.scale = 0.7;
  nope.rope_base = 0;
  nope.kv_heads = 1;
  return {plain, head_norm, full_norm, window, capped, nope};
}

}  // namespace

TEST_CASE("mha: every gradient equals central differences") {
  for (const eb::MhaOptions& options : option_grid()) {
    CAPTURE(options.window_left);
    CAPTURE(int(options.qk_norm));
    const eb::Mha<double> layer(options);
    eb::MhaWeights<double> w = random_weights(options, 1);
    Matrix<double> x = random_rows(7, 2);
    const Matrix<double> upstream = random_rows(7, 3);
    const std::vector<Index> cu = {0, 2, 7};
    const eb::MhaBatch batch{.cu_seqlens = cu, .first_position = 3};
    Matrix<double> y(7, kWidth), dx(7, kWidth);
    eb::MhaSaved<double> saved;
    eb::MhaWeights<double> g;
    mha_case::forward(layer, w, x, y, saved, batch);
    mha_case::backward(layer, w, saved, x, upstream, dx, g, batch);
    const auto loss = [&] {
      return (forward(layer, w, x, batch).array() * upstream.array()).sum();
    };
    const auto check = [&](const char* name, auto& parameter, const auto& gradient) {
      Eigen::Map<Matrix<double>> p(parameter.data(), parameter.rows(), parameter.cols());
      const Eigen::Map<const Matrix<double>> d(gradient.data(), gradient.rows(), gradient.cols());
      const eb::GradcheckResult r = eb::gradcheck(loss, p, d);
      CHECK_MESSAGE(r.passed, name, ": ", r.message());
    };
    check("x", x, dx);
    check("w_q", w.w_q, g.w_q);
    check("w_k", w.w_k, g.w_k);
    check("w_v", w.w_v, g.w_v);
    check("w_o", w.w_o, g.w_o);
    check("b_q", w.b_q, g.b_q);
    check("b_k", w.b_k, g.b_k);
    check("b_v", w.b_v, g.b_v);
    check("b_o", w.b_o, g.b_o);
    check("sinks", w.sinks, g.sinks);
    check("q_norm", w.q_norm, g.q_norm);
    check("k_norm", w.k_norm, g.k_norm);
  }
}

TEST_CASE("mha: steps of any size give the rows of the full pass") {
  for (const eb::MhaOptions& options : option_grid()) {
    const eb::Mha<double> layer(options);
    const eb::MhaWeights<double> w = random_weights(options, 4);
    const Matrix<double> x = random_rows(41, 5), full = forward(layer, w, x);
    for (const Index chunk : {1, 2, 7, 20, 41}) {
      eb::MhaState<double> state = eb::mha_state(layer);
      Matrix<double> y(41, kWidth);
      for (Index t = 0; t < 41; t += chunk) {
        const Index n = std::min<Index>(chunk, 41 - t);
        mha_case::step(layer, w, state, x.middleRows(t, n), y.middleRows(t, n));
      }
      CHECK(largest_difference(y, full) < kSame);
      CHECK(state.size() == 41);
    }
  }
}

TEST_CASE("mha: a snapshot and a rollback continue as if nothing had happened") {
  const eb::Mha<double> layer({.heads = 2, .kv_heads = 1, .head_dim = 4});
  const eb::MhaWeights<double> w = random_weights(layer.options(), 6);
  const Matrix<double> x = random_rows(12, 7), full = forward(layer, w, x);
  eb::MhaState<double> state = eb::mha_state(layer, 12);
  Matrix<double> y(12, kWidth);
  mha_case::step(layer, w, state, x.topRows(8), y.topRows(8));
  const eb::MhaState<double> snapshot = state;
  mha_case::step(layer, w, state, random_rows(3, 8), y.middleRows(8, 3));  // a wrong guess
  state.truncate(8);
  CHECK(state.cache == snapshot.cache);
  mha_case::step(layer, w, state, x.bottomRows(4), y.bottomRows(4));
  CHECK(largest_difference(y, full) < kSame);
  state = snapshot;
  mha_case::step(layer, w, state, x.bottomRows(4), y.bottomRows(4));
  CHECK(largest_difference(y, full) < kSame);
}

TEST_CASE("mha: packed sequences are separate ones") {
  const eb::MhaOptions options{
      .heads = 4, .kv_heads = 2, .head_dim = 6, .qk_norm = eb::QkNorm::rms_head};
  const eb::Mha<double> layer(options);
  const eb::MhaWeights<double> w = random_weights(options, 9);
  const Matrix<double> x = random_rows(15, 10);
  const std::vector<Index> cu = {0, 4, 4, 15};
  const Matrix<double> packed = forward(layer, w, x, {.cu_seqlens = cu});
  CHECK(largest_difference(packed.topRows(4), forward(layer, w, x.topRows(4))) < kSame);
  CHECK(largest_difference(packed.bottomRows(11), forward(layer, w, x.bottomRows(11))) < kSame);
}

TEST_CASE("mha: rotary layouts agree once the weights are converted") {
  eb::MhaOptions half{.heads = 4, .kv_heads = 2, .head_dim = 6}, interleaved = half;
  interleaved.rope_layout = eb::RopeLayout::interleaved;
  eb::MhaWeights<double> w = random_weights(half, 11), converted = w;
  const auto from = eb::RopeLayout::half, to = eb::RopeLayout::interleaved;
  converted.w_q = eb::rope_convert_layout(w.w_q, from, to, 6, {.heads = 4});
  converted.w_k = eb::rope_convert_layout(w.w_k, from, to, 6, {.heads = 2});
  converted.b_q = eb::rope_convert_layout(w.b_q, from, to, 6, {.heads = 4});
  converted.b_k = eb::rope_convert_layout(w.b_k, from, to, 6, {.heads = 2});
  const Matrix<double> x = random_rows(9, 12);
  CHECK(largest_difference(forward(eb::Mha<double>(half), w, x),
                           forward(eb::Mha<double>(interleaved), converted, x)) < kSame);
}

TEST_CASE("mha: executors do not change a bit") {
  const eb::MhaOptions options{
      .heads = 4, .kv_heads = 2, .head_dim = 8, .qk_norm = eb::QkNorm::rms_full};
  const eb::Mha<double> layer(options);
  const eb::MhaWeights<double> w = random_weights(options, 13);
  const Matrix<double> x = random_rows(150, 14), dy = random_rows(150, 15);
  const auto run = [&](eb::ExecutorRef executor, Matrix<double>& y, Matrix<double>& dx,
                       eb::MhaWeights<double>& g) {
    eb::MhaSaved<double> saved;
    y.resize(150, kWidth);
    dx.resize(150, kWidth);
    mha_case::forward(layer, w, x, y, saved, {}, executor);
    mha_case::backward(layer, w, saved, x, dy, dx, g, {}, executor);
  };
  Matrix<double> y, dx;
  eb::MhaWeights<double> g;
  run(eb::serial, y, dx, g);
  for (const int workers : {2, 3, 7}) {
    const eb::thread_pool pool(workers);
    Matrix<double> y2, dx2;
    eb::MhaWeights<double> g2;
    run(pool, y2, dx2, g2);
    CHECK(y == y2);
    CHECK(dx == dx2);
    CHECK(g.w_q == g2.w_q);
    CHECK(g.w_v == g2.w_v);
    CHECK(g.k_norm == g2.k_norm);
    CHECK(g.sinks == g2.sinks);
  }
}

TEST_CASE("mha: no rows") {
  const eb::Mha<double> layer({.heads = 2, .head_dim = 4});
  const eb::MhaWeights<double> w = random_weights(layer.options(), 16);
  CHECK(forward(layer, w, Matrix<double>(0, kWidth)).rows() == 0);
  eb::MhaState<double> state = eb::mha_state(layer);
  Matrix<double> none(0, kWidth);
  mha_case::step(layer, w, state, none, none);
  CHECK(state.size() == 0);
}

TEST_CASE("mha: bytes per token") {
  const eb::Mha<float> layer({.heads = 32, .kv_heads = 8, .head_dim = 128});
  CHECK(eb::mha_state(layer).bytes_per_token() == 2 * 8 * 128 * 4);
}

TEST_CASE("mha: bad options and shapes are named") {
  using invalid = std::invalid_argument;
  const auto layer_of = [](const eb::MhaOptions& o) { return [o] { eb::Mha<double> layer(o); }; };
  check_throws<invalid>(layer_of({.heads = 12, .kv_heads = 5}),
                        "kv_heads (5) must divide heads (12)");
  check_throws<invalid>(layer_of({.heads = 0}), "heads (0) and kv_heads (0) must be at least 1");
  check_throws<invalid>(layer_of({.heads = 1, .head_dim = 0}), "head_dim (0) must be at least 1");
  check_throws<invalid>(layer_of({.heads = 1, .head_dim = 4, .rotary_dim = 6}),
                        "rotary_dim (6) must be at most head_dim (4)");
  check_throws<invalid>(layer_of({.heads = 1, .head_dim = 5}),
                        "rotary_dim (5) must be even and at least 2");
  check_throws<invalid>(layer_of({.heads = 1, .head_dim = 4, .rope_base = -1.0}),
                        "rope_base (-1) must be positive, or 0 for no rotary positions");
  check_throws<invalid>(layer_of({.heads = 1, .head_dim = 4, .window_left = -2}),
                        "window_left (-2) must be -1 (unbounded) or >= 0");
  check_throws<invalid>(layer_of({.heads = 1, .head_dim = 4, .soft_cap = -1.0}),
                        "soft_cap: cap (-1) must be finite and >= 0");

  const eb::Mha<double> layer({.heads = 4, .kv_heads = 2, .head_dim = 6});
  const eb::MhaWeights<double> good = random_weights(layer.options(), 17);
  const Matrix<double> x = random_rows(3, 18);
  const auto with = [&](auto change) {
    return [&, change] {
      eb::MhaWeights<double> w = good;
      change(w);
      forward(layer, w, x);
    };
  };
  check_throws<invalid>(with([](auto& w) { w.w_q.resize(9, 24); }),
                        "w_q is 9 x 24, expected 10 x 24 (columns of x, heads * head_dim)");
  check_throws<invalid>(with([](auto& w) { w.w_v.resize(10, 24); }),
                        "w_v is 10 x 24, expected 10 x 12 (columns of x, kv_heads * head_dim)");
  check_throws<invalid>(with([](auto& w) { w.b_k.resize(24); }),
                        "b_k has 24 entries, expected 12 (kv_heads * head_dim, or none)");
  check_throws<invalid>(with([](auto& w) { w.sinks.resize(2); }),
                        "sinks has 2 entries, expected 4 (heads, or none)");
  const std::vector<Index> cu = {0, 4};
  check_throws<invalid>([&] { forward(layer, good, x, {.cu_seqlens = cu}); },
                        "cu_seqlens ends at 4, expected the 3 rows of x");

  eb::MhaState<double> state{
      .cache = eb::KvCache<double>({.kv_heads = 2, .head_dim = 6, .capacity = 2, .fixed = true}),
      .scratch = {}};
  Matrix<double> y(3, kWidth);
  check_throws<std::length_error>([&] { mha_case::step(layer, good, state, x, y); },
                                  "KvCache: 0 tokens and 3 more exceed the fixed capacity 2");
  CHECK(state.size() == 0);
}
