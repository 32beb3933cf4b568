// Layers of a hybrid plan: every kind against its definition, steps, gradients, what a token depends on, and the caches' memory.
#include "mha_case.hpp"
#include "support/alloc_guard.hpp"
#include "support/attention_case.hpp"
#include "support/layer_checks.hpp"

#include <eigenblocks/attention/hwfa_layer.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <string>
#include <vector>

namespace {

using namespace eigenblocks;
namespace mha = mha_case;

constexpr Index kWidth = 10;
constexpr Index kLength = 6;  // of log n
// Sums of at most ~100 terms of size 1: two roundings each, far below 1e-12.
constexpr double kSame = 1e-12;

using Layers = std::vector<Mha<double>>;
using Weights = std::vector<MhaWeights<double>>;

MhaOptions small_options() {
  return {.heads = 4, .kv_heads = 2, .head_dim = 6, .logn_length = kLength};
}

Matrix<double> random_rows(Index rows, std::uint64_t seed) {
  Random random(seed);
  return normal_matrix<double>(random, rows, kWidth);
}

MhaWeights<double> random_weights(std::uint64_t seed, const MhaOptions& o = small_options()) {
  Random random(seed);
  const Index q = o.heads * o.head_dim, kv = o.kv_heads * o.head_dim;
  MhaWeights<double> w;
  w.w_q = normal_matrix<double>(random, kWidth, q, 0.4);
  w.w_k = normal_matrix<double>(random, kWidth, kv, 0.4);
  w.w_v = normal_matrix<double>(random, kWidth, kv, 0.4);
  w.w_o = normal_matrix<double>(random, q, kWidth, 0.4);
  w.b_q = normal_matrix<double>(random, q, 1);
  w.sinks = normal_matrix<double>(random, o.heads, 1);
  return w;
}

Weights random_weights(const Layers& layers, std::uint64_t seed) {
  Weights all;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    all.push_back(random_weights(seed + i));
    all.back().w_o *= 0.2;  // the stream keeps its size, and with it the roundings theirs
  }
  return all;
}

Matrix<double> forward(const Mha<double>& layer, const MhaWeights<double>& w,
                       const Matrix<double>& x, const MhaBatch& batch = {}) {
  Matrix<double> y(x.rows(), x.cols());
  MhaSaved<double> saved;
  mha::forward(layer, w, x, y, saved, batch);
  return y;
}

/// x = x + attention(x), layer by layer.
Matrix<double> forward(const Layers& layers, const Weights& w, Matrix<double> x) {
  for (std::size_t i = 0; i < layers.size(); ++i) x += forward(layers[i], w[i], x);
  return x;
}

/// The gradient by x of <upstream, forward(layers, w, x)>.
Matrix<double> backward(const Layers& layers, const Weights& w, Matrix<double> x,
                        Matrix<double> upstream) {
  std::vector<Matrix<double>> inputs;
  std::vector<MhaSaved<double>> saved(layers.size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    inputs.push_back(x);
    Matrix<double> y(x.rows(), x.cols());
    mha::forward(layers[i], w[i], x, y, saved[i]);
    x += y;
  }
  for (std::size_t i = layers.size(); i-- > 0;) {
    Matrix<double> dx(x.rows(), x.cols());
    MhaWeights<double> g;
    mha::backward(layers[i], w[i], saved[i], inputs[i], upstream, dx, g);
    upstream += dx;
  }
  return upstream;
}

void step(const Layers& layers, const Weights& w, HwfaState<double>& state, Matrix<double> x,
          Matrix<double>& out) {
  for (std::size_t i = 0; i < layers.size(); ++i) {
    Matrix<double> y(x.rows(), x.cols());
    mha::step(layers[i], w[i], state.layers[i], x, y);
    x += y;
  }
  out = x;
}

HwfaLayer full(HwfaPosition position, bool logn = false, LognMode mode = LognMode::plain) {
  return {.span = HwfaSpan::full,
          .position = position,
          .logn = logn,
          .rerope_window = position == HwfaPosition::rerope ? 7 : 0,
          .logn_mode = mode};
}
HwfaLayer window(Index tokens, HwfaPosition position, bool logn = false) {
  return {.position = position,
          .logn = logn,
          .window = tokens,
          .rerope_window = position == HwfaPosition::rerope ? 7 : 0};
}

std::vector<HwfaLayer> all_kinds() {
  using enum HwfaPosition;
  return {full(rope),
          full(nope),
          full(rerope),
          full(nope, true),
          full(rerope, true, LognMode::clipped),
          window(5, rope),
          window(5, nope),
          window(7, rerope),
          window(5, rope, true),
          window(1, rope)};
}

Mha<double> layer_of(const HwfaLayer& kind) {
  return mha::hwfa_layers({.layers = {kind}}, small_options()).front();
}

/// One layer by its definition, pair by pair.
Matrix<double> brute_force(const HwfaLayer& kind, const MhaWeights<double>& w,
                           const Matrix<double>& x) {
  const MhaOptions o = small_options();
  const Index rows = x.rows(), d = o.head_dim, group = o.heads / o.kv_heads;
  const RotaryTable<double> table(rope_frequencies(d, o.rope_base), RopeLayout::half);
  const Matrix<double> q = x.lazyProduct(w.w_q).eval().rowwise() + w.b_q.transpose(),
                       k = x.lazyProduct(w.w_k), v = x.lazyProduct(w.w_v);
  Matrix<double> attended = Matrix<double>::Zero(rows, q.cols());
  for (Index i = 0; i < rows; ++i) {
    const Index first = kind.span == HwfaSpan::window ? std::max<Index>(0, i - kind.window + 1) : 0;
    double rho = kind.logn ? std::log(double(i - first + 1)) / std::log(double(kLength)) : 1.0;
    if (kind.logn_mode == LognMode::clipped) rho = std::max(rho, 1.0);
    Matrix<double> p(o.heads, i - first + 1);
    for (Index j = first; j <= i; ++j) {
      double relative = static_cast<double>(i - j);
      if (kind.position == HwfaPosition::nope) relative = 0;
      if (kind.position == HwfaPosition::rerope)
        relative = std::min(relative, static_cast<double>(kind.rerope_window));
      const Matrix<double> turned =
          rope(q.row(i).eval(), std::vector<double>{relative}, table, {.heads = o.heads});
      for (Index h = 0; h < o.heads; ++h) {
        const double s = turned.row(0).segment(h * d, d).dot(k.row(j).segment(h / group * d, d));
        p(h, j - first) = std::exp(rho * s / std::sqrt(double(d)));
      }
    }
    for (Index h = 0; h < o.heads; ++h) {
      const double sum = p.row(h).sum() + std::exp(w.sinks[h]);
      for (Index j = first; j <= i; ++j) {
        attended.row(i).segment(h * d, d) +=
            p(h, j - first) / sum * v.row(j).segment(h / group * d, d);
      }
    }
  }
  return attended.lazyProduct(w.w_o);
}

/// Rows of x in another order.
Matrix<double> permuted(const Matrix<double>& x, const std::vector<Index>& order) {
  Matrix<double> y(x.rows(), x.cols());
  for (Index i = 0; i < x.rows(); ++i) y.row(i) = x.row(order[static_cast<std::size_t>(i)]);
  return y;
}

}  // namespace

TEST_CASE("every kind of layer is its definition, and steps of any size give its rows") {
  const Matrix<double> x = random_rows(41, 1);
  const MhaWeights<double> w = random_weights(2);
  for (const HwfaLayer& kind : all_kinds()) {
    CAPTURE(int(kind.span));
    CAPTURE(int(kind.position));
    CAPTURE(kind.logn);
    const Layers layers = mha::hwfa_layers({.layers = {kind}}, small_options());
    const Matrix<double> whole = forward(layers[0], w, x);
    CHECK(largest_difference(whole, brute_force(kind, w, x)) < kSame);
    for (const auto& [prompt, chunk, ring] : std::vector<std::array<Index, 3>>{
             {0, 1, 64}, {0, 3, 1}, {0, 20, 64}, {41, 1, 2}, {18, 1, 1}, {30, 5, 8}}) {
      HwfaState<double> state = hwfa_state(layers, 0, 5, ring);
      Matrix<double> y(41, kWidth);
      for (Index t = 0; t < 41;) {
        const Index n = std::min(t < prompt ? prompt : chunk, 41 - t);
        mha::step(layers[0], w, state.layers[0], x.middleRows(t, n), y.middleRows(t, n));
        t += n;
      }
      CHECK(largest_difference(y, whole) < kSame);
      CHECK(state.size() == 41);
    }
  }
}

TEST_CASE("gradients of every kind equal central differences, over packed sequences") {
  Matrix<double> x = random_rows(13, 3);
  const Matrix<double> upstream = random_rows(13, 4);
  const std::vector<Index> cu = {0, 3, 3, 13};
  const MhaBatch batch{.cu_seqlens = cu, .first_position = 2};
  for (const HwfaLayer& kind : all_kinds()) {
    CAPTURE(int(kind.span));
    CAPTURE(int(kind.position));
    CAPTURE(kind.logn);
    const Mha<double> layer = layer_of(kind);
    MhaWeights<double> w = random_weights(5), g;
    Matrix<double> y(13, kWidth), dx(13, kWidth);
    MhaSaved<double> saved;
    mha::forward(layer, w, x, y, saved, batch);
    CHECK(largest_difference(y.bottomRows(10), forward(layer, w, x.bottomRows(10))) < kSame);
    mha::backward(layer, w, saved, x, upstream, dx, g, batch);
    const auto loss = [&] { return forward(layer, w, x, batch).cwiseProduct(upstream).sum(); };
    const auto check = [&](const char* name, Matrix<double>& parameter,
                           const Matrix<double>& gradient) {
      const GradcheckResult r = gradcheck(loss, parameter, gradient);
      CHECK_MESSAGE(r.passed, name, ": ", r.message());
    };
    check("x", x, dx);
    check("w_q", w.w_q, g.w_q);
    check("w_k", w.w_k, g.w_k);
    check("w_v", w.w_v, g.w_v);
    check("w_o", w.w_o, g.w_o);
    const auto check_vector = [&](const char* name, Vector<double>& parameter,
                                  const Vector<double>& gradient) {
      Eigen::Map<Matrix<double>> p(parameter.data(), parameter.size(), 1);
      const GradcheckResult r = gradcheck(loss, p, Matrix<double>(gradient));
      CHECK_MESSAGE(r.passed, name, ": ", r.message());
    };
    check_vector("b_q", w.b_q, g.b_q);
    check_vector("sinks", w.sinks, g.sinks);
  }
}

TEST_CASE("windows only: a token depends on exactly the last (w - 1) L + 1 inputs") {
  for (const auto& [depth, tokens] : std::vector<std::array<Index, 2>>{{3, 4}, {4, 2}, {2, 1}}) {
    HwfaPlan plan;
    plan.layers.assign(static_cast<std::size_t>(depth), window(tokens, HwfaPosition::rope));
    const Layers layers = mha::hwfa_layers(plan, small_options());
    const Weights w = random_weights(layers, 6);
    const Index rows = 20, t = 17, field = plan.receptive_field();
    CHECK(field == (tokens - 1) * depth + 1);
    const Matrix<double> x = random_rows(rows, 7);
    Matrix<double> upstream = Matrix<double>::Zero(rows, kWidth);
    upstream.row(t) = random_rows(1, 8);
    const Matrix<double> dx = backward(layers, w, x, upstream), y = forward(layers, w, x);
    for (Index j = 0; j < rows; ++j) {
      const bool inside = j <= t && j > t - field;
      CHECK((dx.row(j).cwiseAbs().maxCoeff() > 1e-9) == inside);
      if (!inside) CHECK(dx.row(j).isZero(0));
      Matrix<double> other = x;
      other.row(j) *= -3;
      CHECK((forward(layers, w, other).row(t) == y.row(t)) == !inside);
    }
    // Shifted behind other tokens, rows with a full field do not change; those before them do.
    Matrix<double> shifted(rows + 9, kWidth);
    shifted << random_rows(9, 9), x;
    const Matrix<double> later = forward(layers, w, shifted);
    const Index same = rows - field + 1;
    CHECK(largest_difference(later.bottomRows(same), y.bottomRows(same)) < kSame);
    if (field > 1) CHECK(largest_difference(later.middleRows(9, 1), y.topRows(1)) > 1e-3);
  }
}

TEST_CASE("NoPE: what order means with and without a causal mask") {
  const Index rows = 12;
  const std::vector<Index> past = {7, 2, 9, 0, 10, 4, 1, 8, 3, 6, 5, 11};  // the last stays
  const Matrix<double> x = random_rows(rows, 10), y = permuted(x, past);
  const MhaWeights<double> w = random_weights(11);
  const Mha<double> nope = layer_of(full(HwfaPosition::nope)),
                    rope = layer_of(full(HwfaPosition::rope));
  const Matrix<double> a = forward(nope, w, x), b = forward(nope, w, y);
  // One causal layer: the last row sees the same set; the others do not.
  CHECK(largest_difference(a.bottomRows(1), b.bottomRows(1)) < kSame);
  CHECK(largest_difference(permuted(a, past), b) > 1e-3);
  CHECK(largest_difference(forward(rope, w, x).bottomRows(1), forward(rope, w, y).bottomRows(1)) >
        1e-3);
  // Two layers: the order of the past shows.
  const Layers two{nope, nope};
  const Weights weights = random_weights(two, 12);
  CHECK(largest_difference(forward(two, weights, x).bottomRows(1),
                           forward(two, weights, y).bottomRows(1)) > 1e-3);
  // Without a mask attention does not know order at all: permuted inputs, permuted outputs.
  attention_test::Problem p({.queries = rows, .keys = rows, .heads = 2}), turned = p;
  turned.q = permuted(p.q, past);
  turned.k = permuted(p.k, past);
  turned.v = permuted(p.v, past);
  const auto out = attention_test::tiled<double>(p, {}, {}, false).out;
  const auto out_turned = attention_test::tiled<double>(turned, {}, {}, false).out;
  CHECK(largest_difference(permuted(out, past), out_turned) < kSame);
  // Queries of zero: row n is the mean of the first n values, which tells n.
  MhaWeights<double> uniform = w;
  uniform.w_q.setZero();
  uniform.b_q.setZero();
  uniform.sinks.resize(0);
  MhaSaved<double> saved;
  Matrix<double> ignored(rows, kWidth);
  mha::forward(nope, uniform, x, ignored, saved);
  for (Index n = 1; n <= rows; ++n) {
    const Matrix<double> mean = x.topRows(n).lazyProduct(w.w_v).eval().colwise().mean();
    CHECK(largest_difference(saved.attended.block(n - 1, 0, 1, 6), mean.leftCols(6)) < kSame);
  }
}

TEST_CASE("HWFA and HWFA2 plans: the whole stack, its steps, and what inference changes") {
  const Hwfa2Options two{.window = 4, .full_layers = 2, .rerope_window = 9};
  const std::vector<HwfaPlan> plans = {hwfa_plan(4, 3), hwfa2_plan(5, two, HwfaPhase::training),
                                       hwfa2_plan(5, two, HwfaPhase::inference)};
  const Matrix<double> x = random_rows(33, 13);
  std::vector<Matrix<double>> wholes;
  for (const HwfaPlan& plan : plans) {
    const Layers layers = mha::hwfa_layers(plan, small_options());
    REQUIRE(layers.size() == plan.layers.size());
    const Weights w = random_weights(layers, 14);
    Matrix<double> whole = forward(layers, w, x), y(33, kWidth);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const HwfaLayer& kind = plan.layers[i];
      CHECK(layers[i].options().window_left == kind.window - 1);
      CHECK((layers[i].rotary() != nullptr) == (kind.position != HwfaPosition::nope));
      CHECK((layers[i].relative() != nullptr) == (kind.position == HwfaPosition::rerope));
      CHECK(layers[i].options().logn_length == (kind.logn ? kLength : 0));
    }
    HwfaState<double> state = hwfa_state(layers, 40);
    Matrix<double> out;
    for (Index t = 0, n = 21; t < 33; t += n, n = 1) {
      step(layers, w, state, x.middleRows(t, n), out);
      y.middleRows(t, n) = out;
    }
    CHECK(largest_difference(y, whole) < kSame);
    wholes.push_back(std::move(whole));
  }
  // ReRoPE and clipped log n change nothing before its window or the trained length ends.
  CHECK(wholes[1].topRows(kLength) == wholes[2].topRows(kLength));
  CHECK(largest_difference(wholes[1].row(kLength), wholes[2].row(kLength)) > 1e-6);
}

TEST_CASE("the caches of a plan hold 2 kv_heads head_dim (N f + (L-f) min(N, w)) scalars") {
  const MhaOptions options{.heads = 2, .kv_heads = 1, .head_dim = 16, .logn_length = 8};
  const Matrix<double> x = random_rows(1, 15);
  for (const HwfaPlan& plan :
       {hwfa_plan(4, 16), hwfa_plan(3, 5),
        hwfa2_plan(4, {.window = 16, .rerope_window = 20}, HwfaPhase::inference)}) {
    const auto layers = mha::hwfa_layers(plan, options);
    const MhaWeights<double> w = random_weights(16, options);
    HwfaState<double> state = hwfa_state(layers, 48, 0, 1);
    Matrix<double> y(1, kWidth);
    CHECK(state.memory().tokens == 0);
    const bool near = plan.layers[2].position == HwfaPosition::rerope;
    for (Index n = 1; n <= 48; ++n) {
      for (std::size_t i = 0; i < layers.size(); ++i)
        mha::step(layers[i], w, state.layers[i], x, y);
      const HwfaMemory m = state.memory();
      CHECK(m.tokens == sizeof(double) * static_cast<std::size_t>(plan.cache_scalars(n, 1, 16)));
      CHECK(m.total() == state.bytes());
      CHECK(m.near_keys == (near ? 48 * 16 * sizeof(double) : 0));  // 20 - 1 + 16, rounded up to 16
      if (n == 48 && plan.layers[0].window == 16) CHECK(m.room == 0);  // to the byte
    }
    CHECK(state.bytes_per_token() ==
          2 * 16 * plan.full_layers() * static_cast<Index>(sizeof(double)));
  }
  // Sizes alone: 24 layers of which one grows.
  const auto layers = mha::hwfa_layers(
      hwfa_plan(24, 16), {.heads = 8, .kv_heads = 2, .head_dim = 64, .logn_length = 512});
  CHECK(hwfa_state(layers).bytes_per_token() == 8 * 2 * 2 * 64);
  CHECK(hwfa_state(layers, 4096, 0, 1).bytes() == 8 * (2 * 2 * 64 * (4096 + 23 * 16)));
}

TEST_CASE("snapshot, rollback, and a rollback that a ring refuses changes nothing") {
  const HwfaPlan plan = {.layers = {full(HwfaPosition::nope), window(4, HwfaPosition::rope),
                                    full(HwfaPosition::rerope), window(3, HwfaPosition::nope)}};
  const Layers layers = mha::hwfa_layers(plan, small_options());
  const Weights w = random_weights(layers, 17);
  const Matrix<double> x = random_rows(60, 18), whole = forward(layers, w, x);
  HwfaState<double> state = hwfa_state(layers, 0, 0, 16);
  Matrix<double> out;
  step(layers, w, state, x.topRows(40), out);
  const HwfaState<double> snapshot = state;
  step(layers, w, state, random_rows(11, 19), out);
  CHECK(state.size() == 51);
  state.truncate(40);
  CHECK(state.size() == 40);
  step(layers, w, state, x.bottomRows(20), out);
  CHECK(largest_difference(out, whole.bottomRows(20)) < kSame);
  const auto sizes_stay = [&] {
    for (const MhaState<double>& layer : state.layers) CHECK(layer.size() == 60);
  };
  // Far back: the first ring refuses, then, without windows, that of ReRoPE.
  check_throws<std::out_of_range>(
      [&] { state.truncate(5); },
      "KvCache: truncate(5) needs position 2, but the ring starts at 28");
  sizes_stay();
  check_throws<std::out_of_range>([&] { state.truncate(61); },
                                  "HwfaState: truncate(61) is outside [0, 60]");
  check_throws<std::out_of_range>([&] { state.truncate(-1); },
                                  "HwfaState: truncate(-1) is outside [0, 60]");
  sizes_stay();
  // The ring of near keys has 32 slots: 7 - 1 + 16, rounded up.
  HwfaState<double> without{.layers = {state.layers[0], state.layers[2]}};
  check_throws<std::out_of_range>([&] { without.truncate(33); },
                                  "ReropeCache: truncate(33) needs the near key of 27, but the "
                                  "ring starts at 28");
  for (const MhaState<double>& layer : without.layers) CHECK(layer.size() == 60);
  state = snapshot;
  step(layers, w, state, x.bottomRows(20), out);
  CHECK(largest_difference(out, whole.bottomRows(20)) < kSame);
  // Layers that have not all seen a token: the least counts.
  Matrix<double> y(1, kWidth);
  mha::step(layers[0], w[0], state.layers[0], x.topRows(1), y);
  CHECK(state.size() == 60);
  state.truncate(60);
  CHECK(state.layers[0].size() == 60);
  CHECK(HwfaState<double>{}.size() == 0);
}

TEST_CASE("a step allocates nothing once warm, and executors do not change a bit") {
  const Matrix<double> x = random_rows(150, 20), dy = random_rows(150, 21);
  const MhaWeights<double> w = random_weights(22);
  for (const HwfaLayer& kind : all_kinds()) {
    const Layers layers = mha::hwfa_layers({.layers = {kind}}, small_options());
    HwfaState<double> state = hwfa_state(layers, 150);
    Matrix<double> y(150, kWidth);
    const auto steps = [&](Index from, Index to) {
      for (Index t = from; t < to; ++t)
        mha::step(layers[0], w, state.layers[0], x.middleRows(t, 1), y.middleRows(t, 1));
    };
    steps(0, 60);
    if (AllocationCount::available) {
      const AllocationCount count;
      steps(60, 140);
      CHECK(count.calls() == 0);
    }
  }
  const Mha<double> layer = layer_of(full(HwfaPosition::rerope, true));
  const auto run = [&](ExecutorRef executor, Matrix<double>& y, Matrix<double>& dx,
                       MhaWeights<double>& g) {
    MhaSaved<double> saved;
    y.resize(150, kWidth);
    dx.resize(150, kWidth);
    mha::forward(layer, w, x, y, saved, {}, executor);
    mha::backward(layer, w, saved, x, dy, dx, g, {}, executor);
  };
  Matrix<double> y, dx, y2, dx2;
  MhaWeights<double> g, g2;
  run(serial, y, dx, g);
  for (const int workers : {2, 3, 7}) {
    const thread_pool pool(workers);
    run(pool, y2, dx2, g2);
    CHECK(y == y2);
    CHECK(dx == dx2);
    CHECK(g.w_q == g2.w_q);
    CHECK(g.w_k == g2.w_k);
    CHECK(g.sinks == g2.sinks);
  }
}

TEST_CASE("no rows, Leaky ReRoPE, and a window under a policy") {
  Matrix<double> none(0, kWidth);
  const MhaWeights<double> w = random_weights(23);
  const Mha<double> layer = layer_of(full(HwfaPosition::rerope, true));
  CHECK(forward(layer, w, none).rows() == 0);
  MhaState<double> state = mha_state(layer);
  mha::step(layer, w, state, none, none);
  CHECK(state.size() == 0);
  // Leak 1 is RoPE, and so is a window of positions beyond the mask's.
  const Matrix<double> x = random_rows(30, 24);
  MhaOptions o = small_options();
  CHECK(largest_difference(forward(mha::rerope_mha(o, leaky_rerope(4, 1.0)), w, x),
                           forward(Mha<double>(o), w, x)) < kSame);
  o.window_left = 3;
  const Mha<double> bent = mha::rerope_mha(o, rerope(4));
  const Matrix<double> plain = forward(Mha<double>(o), w, x);
  CHECK(forward(bent, w, x) == plain);
  state = mha_state(bent);
  Matrix<double> y(30, kWidth);
  mha::step(bent, w, state, x, y);
  CHECK(largest_difference(y, plain) < kSame);
}

TEST_CASE("bad input is named") {
  using invalid = invalid_argument;
  const auto plan_of = [](std::vector<HwfaLayer> kinds, const MhaOptions& o = small_options()) {
    return [=] { mha::hwfa_layers({.layers = kinds}, o); };
  };
  using enum HwfaPosition;
  MhaOptions bad_window = small_options(), no_base = small_options(), no_length = small_options(),
             one = small_options(), capped = small_options();
  bad_window.window_left = 3;
  no_base.rope_base = 0;
  no_length.logn_length = 0;
  one.logn_length = 1;
  capped.soft_cap = 2;
  HwfaLayer wide = window(8, rerope), full_window = full(rope), stray = full(rope),
            missing = full(rerope);
  full_window.window = 4;
  stray.rerope_window = 3;
  missing.rerope_window = 0;
  check_throws<invalid>(plan_of({}), "the plan has no layers");
  check_throws<invalid>(plan_of({full(rope)}, bad_window),
                        "window_left (3) must be -1: the plan has the windows");
  check_throws<invalid>(plan_of({full(rope), window(0, rope)}),
                        "layers[1].window (0) must be at least 1");
  check_throws<invalid>(plan_of({full_window}),
                        "layers[0].window (4) must be 0: the layer is full");
  check_throws<invalid>(plan_of({missing}), "layers[0].rerope_window (0) must be at least 1");
  check_throws<invalid>(plan_of({stray}),
                        "layers[0].rerope_window (3) must be 0: the layer has no ReRoPE");
  check_throws<invalid>(plan_of({wide}),
                        "layers[0].window (8) must be at most its rerope_window (7): a ring has no "
                        "keys for longer ones");
  check_throws<invalid>(plan_of({full(nope), full(rope)}, no_base),
                        "rope_base (0) must be positive: layers[1] has rotary positions");
  check_throws<invalid>(plan_of({full(nope, true)}, no_length),
                        "logn_length (0) must be at least 2: layers[0] has log-n scaling");
  check_throws<invalid>([&] { Mha<double> layer(one); },
                        "logn_length (1) must be at least 2, or 0 for no log-n scaling");
  check_throws<invalid>([&] { mha::rerope_mha(capped, eigenblocks::rerope(3)); },
                        "soft_cap (2) must be 0: a layer with a position policy has none");
  check_throws<invalid>([&] { mha::rerope_mha(no_base, eigenblocks::rerope(3)); },
                        "rope_base (0) must be positive: a position policy bends rotary positions");
  check_throws<invalid>([&] { mha::rerope_mha(one, NearFarPosition{.window = 0}); },
                        "window (0) must be at least 1");
  plan_of({full(nope), window(2, nope)}, no_base)();
  // States of other layers.
  const Mha<double> bent = layer_of(full(rerope)), plain = layer_of(full(rope)),
                    narrow = layer_of(window(3, rope));
  const MhaWeights<double> w = random_weights(25);
  Matrix<double> x = random_rows(1, 26), y = Matrix<double>::Constant(1, kWidth, 7.0);
  MhaState<double> for_plain = mha_state(plain), for_bent = mha_state(bent),
                   for_narrow = mha_state(narrow);
  check_throws<invalid>([&] { mha::step(bent, w, for_plain, x, y); },
                        "the state is not one of a layer with a position policy, the layer is one");
  check_throws<invalid>([&] { mha::step(plain, w, for_bent, x, y); },
                        "the state is one of a layer with a position policy, the layer is not");
  check_throws<invalid>([&] { mha::step(plain, w, for_narrow, x, y); },
                        "the state keeps a window of 2, the layer's window_left is -1");
  CHECK(for_plain.size() + for_bent.size() + for_narrow.size() == 0);
  CHECK(y == Matrix<double>::Constant(1, kWidth, 7.0));
}
