#include "support/layer_checks.hpp"

#include <eigenblocks/attention/mla.hpp>
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
constexpr double kSame = 1e-12;  // sums of at most ~100 terms of size 1
constexpr eb::MlaForm kForms[] = {eb::MlaForm::absorbed, eb::MlaForm::expanded,
                                  eb::MlaForm::automatic};

eb::MlaWeights<double> random_weights(const eb::MlaOptions& o, std::uint64_t seed,
                                      bool optional = true) {
  eb::Random random(seed);
  const auto matrix = [&](Index rows, Index cols) {
    return eb::normal_matrix<double>(random, rows, cols, 0.4);
  };
  const auto vector = [&](Index n) {
    return Vector<double>(eb::normal_matrix<double>(random, optional ? n : 0, 1));
  };
  const Index q = o.heads * (o.nope_dim + o.rope_dim);
  eb::MlaWeights<double> w;
  if (o.q_rank == 0) {
    w.w_q = matrix(kWidth, q);
  } else {
    w.w_dq = matrix(kWidth, o.q_rank);
    w.w_uq = matrix(o.q_rank, q);
    w.b_dq = vector(o.q_rank);
    w.q_norm = vector(o.q_rank);
  }
  w.w_dkv = matrix(kWidth, o.kv_rank + o.rope_dim);
  w.w_ukv = matrix(o.kv_rank, o.heads * (o.nope_dim + o.value_dim));
  w.w_o = matrix(o.heads * o.value_dim, kWidth);
  w.b_dkv = vector(o.kv_rank + o.rope_dim);
  w.kv_norm = vector(o.kv_rank);
  w.b_o = vector(kWidth);
  return w;
}

Matrix<double> random_rows(Index rows, std::uint64_t seed) {
  eb::Random random(seed);
  return eb::normal_matrix<double>(random, rows, kWidth);
}

Matrix<double> forward(const eb::Mla<double>& layer, const eb::MlaWeights<double>& w,
                       const Matrix<double>& x, const eb::MhaBatch& batch = {}) {
  Matrix<double> y(x.rows(), x.cols());
  eb::MlaSaved<double> saved;
  eb::mla_forward(layer, w, x, y, saved, batch);
  return y;
}

std::vector<eb::MlaOptions> option_grid() {
  const eb::MlaOptions plain{
      .heads = 3, .nope_dim = 4, .rope_dim = 6, .value_dim = 5, .kv_rank = 7};
  eb::MlaOptions low_rank = plain, nope = plain, half = plain;
  low_rank.q_rank = 6;
  nope.rope_dim = 0;
  half.rope_layout = eb::RopeLayout::half;
  half.scale = 0.7;
  half.softmax_factor = 1.3;
  return {plain, low_rank, nope, half};
}

/// The definition, one number at a time; positions from `first` on.
Matrix<double> brute_force(const eb::MlaOptions& o, const eb::MlaWeights<double>& w,
                           const Matrix<double>& x, Index first) {
  const auto add = [](Matrix<double> m, const Vector<double>& b) {
    if (b.size() != 0) m.rowwise() += b.transpose();
    return m;
  };
  const auto norm = [&](Matrix<double> m, const Vector<double>& gain) {
    for (Index i = 0; i < m.rows(); ++i) {
      m.row(i) /= std::sqrt(m.row(i).squaredNorm() / double(m.cols()) + o.norm_eps);
      if (gain.size() != 0) m.row(i).array() *= gain.transpose().array();
    }
    return m;
  };
  const auto rotated = [&](Eigen::RowVectorXd v, Index position) {
    const Eigen::RowVectorXd u = v;
    const Index pairs = v.size() / 2;
    for (Index p = 0; p < pairs; ++p) {
      const bool half = o.rope_layout == eb::RopeLayout::half;
      const Index a = half ? p : 2 * p, b = half ? p + pairs : 2 * p + 1;
      const double angle =
          double(position) * std::pow(o.rope_base, -2.0 * double(p) / double(o.rope_dim));
      v[a] = u[a] * std::cos(angle) - u[b] * std::sin(angle);
      v[b] = u[a] * std::sin(angle) + u[b] * std::cos(angle);
    }
    return v;
  };
  const Index head = o.nope_dim + o.rope_dim, up = o.nope_dim + o.value_dim;
  const Matrix<double> q = o.q_rank == 0
                               ? Matrix<double>(x * w.w_q)
                               : Matrix<double>(norm(add(x * w.w_dq, w.b_dq), w.q_norm) * w.w_uq);
  const Matrix<double> down = add(x * w.w_dkv, w.b_dkv);
  const Matrix<double> kv = norm(down.leftCols(o.kv_rank), w.kv_norm) * w.w_ukv;
  const double scale =
      o.scale.value_or(1 / std::sqrt(double(head))) * o.softmax_factor.value_or(1.0);
  Matrix<double> heads = Matrix<double>::Zero(x.rows(), o.heads * o.value_dim);
  for (Index h = 0; h < o.heads; ++h) {
    for (Index i = 0; i < x.rows(); ++i) {
      Eigen::VectorXd s(i + 1);
      for (Index j = 0; j <= i; ++j) {
        s[j] = q.row(i).segment(h * head, o.nope_dim).dot(kv.row(j).segment(h * up, o.nope_dim)) +
               rotated(q.row(i).segment(h * head + o.nope_dim, o.rope_dim), first + i)
                   .dot(rotated(down.row(j).tail(o.rope_dim), first + j));
      }
      s = (scale * s).array().exp();
      s /= s.sum();
      for (Index j = 0; j <= i; ++j)
        heads.row(i).segment(h * o.value_dim, o.value_dim) +=
            s[j] * kv.row(j).segment(h * up + o.nope_dim, o.value_dim);
    }
  }
  return add(heads * w.w_o, w.b_o);
}

}  // namespace

TEST_CASE("mla: forward equals the definition") {
  for (const eb::MlaOptions& options : option_grid()) {
    for (const bool optional : {true, false}) {
      const eb::MlaWeights<double> w = random_weights(options, 1, optional);
      const Matrix<double> x = random_rows(13, 2);
      CHECK(largest_difference(forward(eb::Mla<double>(options), w, x, {.first_position = 5}),
                               brute_force(options, w, x, 5)) < kSame);
    }
  }
}

TEST_CASE("mla: every gradient equals central differences") {
  for (const eb::MlaOptions& options : option_grid()) {
    const eb::Mla<double> layer(options);
    eb::MlaWeights<double> w = random_weights(options, 1);
    Matrix<double> x = random_rows(7, 2);
    const Matrix<double> upstream = random_rows(7, 3);
    const std::vector<Index> cu = {0, 2, 7};
    const eb::MhaBatch batch{.cu_seqlens = cu, .first_position = 3};
    Matrix<double> y(7, kWidth), dx(7, kWidth);
    eb::MlaSaved<double> saved;
    eb::MlaWeights<double> g;
    eb::mla_forward(layer, w, x, y, saved, batch);
    eb::mla_backward(layer, w, saved, x, upstream, dx, g, batch);
    const auto loss = [&] {
      return (forward(layer, w, x, batch).array() * upstream.array()).sum();
    };
    const auto check = [&](const char* name, auto& parameter, const auto& gradient) {
      REQUIRE(gradient.size() == parameter.size());
      Eigen::Map<Matrix<double>> p(parameter.data(), parameter.rows(), parameter.cols());
      const Eigen::Map<const Matrix<double>> d(gradient.data(), gradient.rows(), gradient.cols());
      const eb::GradcheckResult r = eb::gradcheck(loss, p, d);
      CHECK_MESSAGE(r.passed, name, ": ", r.message());
    };
    check("x", x, dx);
    check("w_q", w.w_q, g.w_q);
    check("w_dq", w.w_dq, g.w_dq);
    check("w_uq", w.w_uq, g.w_uq);
    check("w_dkv", w.w_dkv, g.w_dkv);
    check("w_ukv", w.w_ukv, g.w_ukv);
    check("w_o", w.w_o, g.w_o);
    check("b_dq", w.b_dq, g.b_dq);
    check("b_dkv", w.b_dkv, g.b_dkv);
    check("b_o", w.b_o, g.b_o);
    check("q_norm", w.q_norm, g.q_norm);
    check("kv_norm", w.kv_norm, g.kv_norm);
  }
}

TEST_CASE("mla: steps of any size and form give the rows of the full pass") {
  for (const eb::MlaOptions& options : option_grid()) {
    const eb::Mla<double> layer(options);
    const eb::MlaWeights<double> w = random_weights(options, 4);
    const Matrix<double> x = random_rows(41, 5), full = forward(layer, w, x, {.first_position = 9});
    for (const eb::MlaForm form : kForms) {
      for (const Index chunk : {1, 2, 7, 20, 41}) {
        eb::MlaState<double> state = eb::mla_state(layer, 0, 9);
        Matrix<double> y(41, kWidth);
        for (Index t = 0; t < 41; t += chunk) {
          const Index n = std::min<Index>(chunk, 41 - t);
          eb::mla_step(layer, w, state, x.middleRows(t, n), y.middleRows(t, n), form);
        }
        CHECK(largest_difference(y, full) < kSame);
        CHECK(state.size() == 41);
      }
    }
  }
}

TEST_CASE("mla: packed sequences are separate ones, a snapshot and a rollback continue") {
  const eb::Mla<double> layer(option_grid()[1]);
  const eb::MlaWeights<double> w = random_weights(layer.options(), 9);
  const Matrix<double> x = random_rows(15, 10);
  const std::vector<Index> cu = {0, 4, 4, 15};
  const Matrix<double> packed = forward(layer, w, x, {.cu_seqlens = cu});
  CHECK(largest_difference(packed.topRows(4), forward(layer, w, x.topRows(4))) < kSame);
  CHECK(largest_difference(packed.bottomRows(11), forward(layer, w, x.bottomRows(11))) < kSame);

  const Matrix<double> full = forward(layer, w, x);
  eb::MlaState<double> state = eb::mla_state(layer, 12);
  Matrix<double> y(15, kWidth);
  eb::mla_step(layer, w, state, x.topRows(8), y.topRows(8));
  const eb::MlaState<double> snapshot = state;
  eb::mla_step(layer, w, state, random_rows(3, 8), y.middleRows(8, 3));  // a wrong guess
  state.truncate(8);
  CHECK(state.cache == snapshot.cache);
  eb::mla_step(layer, w, state, x.bottomRows(7), y.bottomRows(7));
  CHECK(largest_difference(y, full) < kSame);
  state = snapshot;
  eb::mla_step(layer, w, state, x.bottomRows(7), y.bottomRows(7));
  CHECK(largest_difference(y, full) < kSame);
}

TEST_CASE("mla: YaRN's frequencies bring their factor of the scale, a given number replaces it") {
  eb::MlaOptions o = option_grid()[0];
  eb::RotaryFrequencies frequencies = eb::rope_frequencies(6);
  frequencies.softmax_factor = 1.6;
  CHECK(eb::Mla<double>(o, &frequencies).scale() == doctest::Approx(1.6 / std::sqrt(10.0)));
  o.scale = 0.5;
  CHECK(eb::Mla<double>(o, &frequencies).scale() == doctest::Approx(0.8));
  o.softmax_factor = 1.0;
  CHECK(eb::Mla<double>(o, &frequencies).scale() == 0.5);
}

TEST_CASE("mla: the form is chosen by flops") {
  const eb::MlaOptions v2{
      .heads = 16, .nope_dim = 128, .rope_dim = 64, .value_dim = 128, .kv_rank = 512};
  const auto absorbs = [&](Index rows, Index tokens) {
    const eb::MlaStepFlops f = eb::mla_step_flops(v2, rows, tokens);
    return f.absorbed <= f.expanded;
  };
  CHECK(absorbs(1, 4096));
  CHECK(absorbs(160, 1 << 20));
  CHECK(!absorbs(180, 1 << 20));
  CHECK(!absorbs(4096, 4096));
}

TEST_CASE("mla: executors do not change a bit; no rows; bytes") {
  const eb::Mla<double> layer(option_grid()[1]);
  const eb::MlaWeights<double> w = random_weights(layer.options(), 13);
  const Matrix<double> x = random_rows(60, 14), dy = random_rows(60, 15);
  const auto run = [&](eb::ExecutorRef executor, Matrix<double>& y, Matrix<double>& dx,
                       eb::MlaWeights<double>& g) {
    eb::MlaSaved<double> saved;
    y.resize(60, kWidth);
    dx.resize(60, kWidth);
    eb::mla_forward(layer, w, x, y, saved, {}, executor);
    eb::mla_backward(layer, w, saved, x, dy, dx, g, {}, executor);
    eb::MlaState<double> state = eb::mla_state(layer);
    eb::mla_step(layer, w, state, x, y, eb::MlaForm::absorbed, executor);
  };
  Matrix<double> y, dx, y2, dx2;
  eb::MlaWeights<double> g, g2;
  run(eb::serial, y, dx, g);
  const eb::thread_pool pool(3);
  run(pool, y2, dx2, g2);
  CHECK(y == y2);
  CHECK(dx == dx2);
  CHECK(g.w_ukv == g2.w_ukv);
  CHECK(g.kv_norm == g2.kv_norm);

  CHECK(forward(layer, w, Matrix<double>(0, kWidth)).rows() == 0);
  eb::MlaState<double> state = eb::mla_state(layer);
  Matrix<double> none(0, kWidth);
  eb::mla_step(layer, w, state, none, none);
  CHECK(state.size() == 0);
  CHECK(state.bytes_per_token() == (7 + 6) * 8);
}

TEST_CASE("mla: bad options and shapes are named") {
  const auto message = [](auto&& f) {
    std::string text;
    try {
      f();
    } catch (const eb::invalid_argument& error) {
      text = std::string(error.what()).substr(13);
    }
    return text;
  };
  const auto options = [&](auto change) {
    eb::MlaOptions o = option_grid()[1];
    change(o);
    return message([&] { eb::Mla<double> layer(o); });
  };
  CHECK(options([](auto& o) { o.heads = 0; }) == "heads (0) must be at least 1");
  CHECK(options([](auto& o) { o.nope_dim = 0; }) == "nope_dim (0) must be at least 1");
  CHECK(options([](auto& o) { o.value_dim = 0; }) == "value_dim (0) must be at least 1");
  CHECK(options([](auto& o) { o.kv_rank = 0; }) == "kv_rank (0) must be at least 1");
  CHECK(options([](auto& o) { o.q_rank = -1; }) == "q_rank (-1) must not be negative");
  CHECK(options([](auto& o) { o.rope_dim = 5; }) == "rope_dim (5) must be even and not negative");
  CHECK(options([](auto& o) { o.rope_dim = -2; }) == "rope_dim (-2) must be even and not negative");
  CHECK(options([](auto& o) { o.scale = HUGE_VAL; }) ==
        "scale (inf) times softmax_factor (1) must be finite");
  const eb::RotaryFrequencies four = eb::rope_frequencies(4);
  CHECK(message([&] { eb::Mla<double> layer(option_grid()[0], &four); }) ==
        "the frequencies turn 4 channels, rope_dim is 6");

  const eb::Mla<double> layer(option_grid()[1]), plain(option_grid()[0]);
  const Matrix<double> x = random_rows(3, 18);
  const auto weights = [&](const eb::Mla<double>& of, auto change) {
    eb::MlaWeights<double> w = random_weights(of.options(), 17);
    change(w);
    eb::MlaState<double> state = eb::mla_state(of);
    Matrix<double> y(3, kWidth);
    const std::string text = message([&] { forward(of, w, x); });
    CHECK(message([&] { eb::mla_step(of, w, state, x, y); }) == text);
    CHECK(state.size() == 0);
    return text;
  };
  CHECK(weights(plain, [](auto& w) { w.w_q.resize(10, 9); }) ==
        "w_q is 10 x 9, expected 10 x 30 (columns of x, heads * (nope_dim + rope_dim))");
  CHECK(weights(layer, [](auto& w) { w.w_dq.resize(10, 9); }) ==
        "w_dq is 10 x 9, expected 10 x 6 (columns of x, q_rank)");
  CHECK(weights(layer, [](auto& w) { w.w_uq.resize(6, 9); }) ==
        "w_uq is 6 x 9, expected 6 x 30 (q_rank, heads * (nope_dim + rope_dim))");
  CHECK(weights(layer, [](auto& w) { w.w_dkv.resize(10, 7); }) ==
        "w_dkv is 10 x 7, expected 10 x 13 (columns of x, kv_rank + rope_dim)");
  CHECK(weights(layer, [](auto& w) { w.w_ukv.resize(7, 9); }) ==
        "w_ukv is 7 x 9, expected 7 x 27 (kv_rank, heads * (nope_dim + value_dim))");
  CHECK(weights(layer, [](auto& w) { w.w_o.resize(9, 10); }) ==
        "w_o is 9 x 10, expected 15 x 10 (heads * value_dim, columns of x)");
  CHECK(weights(layer, [](auto& w) { w.b_dq.resize(5); }) ==
        "b_dq has 5 entries, expected 6 (q_rank, or none)");
  CHECK(weights(layer, [](auto& w) { w.q_norm.resize(5); }) ==
        "q_norm has 5 entries, expected 6 (q_rank, or none)");
  CHECK(weights(layer, [](auto& w) { w.b_dkv.resize(5); }) ==
        "b_dkv has 5 entries, expected 13 (kv_rank + rope_dim, or none)");
  CHECK(weights(layer, [](auto& w) { w.kv_norm.resize(5); }) ==
        "kv_norm has 5 entries, expected 7 (kv_rank, or none)");
  CHECK(weights(layer, [](auto& w) { w.b_o.resize(5); }) ==
        "b_o has 5 entries, expected 10 (columns of x, or none)");

  const eb::MlaWeights<double> w = random_weights(layer.options(), 17);
  eb::MlaState<double> other = eb::mla_state(eb::Mla<double>(option_grid()[2]));
  Matrix<double> y(3, kWidth), short_y(2, kWidth);
  CHECK(message([&] { eb::mla_step(layer, w, other, x, y); }) ==
        "state caches 7 + 0 channels, the layer has kv_rank (7) + rope_dim (6)");
  eb::MlaState<double> state = eb::mla_state(layer);
  CHECK(message([&] { eb::mla_step(layer, w, state, x, short_y); }) ==
        "y is 2 x 10, expected 3 x 10 (shape of x)");
  state.cache =
      eb::LatentCache<double>({.latent_dim = 7, .rope_dim = 6, .capacity = 2, .fixed = true});
  CHECK_THROWS_AS(eb::mla_step(layer, w, state, x, y), std::length_error);
  CHECK(state.size() == 0);
}
