// Recurrences, one thread.
//
//   recurrence/float/lru_scan/T:65536/N:256      the constant complex scan inside LRU and S5, in place; limit: reading and
//                                                writing back that memory
//   recurrence/float/lru/T:65536/N:256/H:128     the whole layer; limit: the FMA peak for its two products
//   recurrence/float/s5/...                      the same for S5 (the discretisation comes on top)
//   recurrence/float/gru/T:4096/H:128            step by step; limit: the FMA peak for x W_i and h W_h
//   recurrence/float/rnn_tanh/T:4096/N:128       step by step; limit: the FMA peak for h W
//   recurrence/double/deer:newton/T:4096/N:16    one sweep, all steps; `steps` is the time of one step of the sweep
//   recurrence/double/deer:quasi/...             likewise
#include <eigenblocks/ssm/deer.hpp>
#include <eigenblocks/ssm/gru.hpp>
#include <eigenblocks/ssm/lru.hpp>
#include <eigenblocks/ssm/rnn.hpp>
#include <eigenblocks/ssm/s5.hpp>

#include "harness.hpp"

#include <cmath>

namespace {

using bench::Index;
namespace eb = eigenblocks;

template <class S>
std::string title(const char* what, Index tokens, const char* width, Index n) {
  return std::string("recurrence/") + bench::scalar_name<S>() + "/" + what +
         "/T:" + std::to_string(tokens) + "/" + width + ":" + std::to_string(n);
}

template <class F>
void add(const std::string& name, F body) {
  benchmark::RegisterBenchmark(name.c_str(), body)->Unit(benchmark::kMillisecond);
}

void step_time(benchmark::State& state, Index steps) {
  state.counters["steps"] =
      benchmark::Counter(static_cast<double>(steps), benchmark::Counter::kIsIterationInvariantRate |
                                                         benchmark::Counter::kInvert);
}

template <class S>
void scan(Index tokens, Index n) {
  add(title<S>("lru_scan", tokens, "N", n), [=](benchmark::State& state) {
    using Complex = std::complex<S>;
    eb::Random random(1);
    const auto p = eb::lru_parameters<S>(random, n, 1, {.r_min = 0.9, .r_max = 0.999});
    const auto layer = eb::detail::lru_layer(p);
    const eb::Vector<Complex> h0 = eb::Vector<Complex>::Zero(n);
    eb::Matrix<Complex> x(tokens, n);
    decltype(layer)::real(x) = bench::random_matrix<S>(tokens, 2 * n, 2);
    const double bytes = 2.0 * static_cast<double>(tokens * n) * sizeof(Complex);
    bench::measure(state, {.bytes = bytes, .limit = bench::in_place_limit(bytes)}, [&] {
      eb::scan_forward(layer.a, x, x, h0);
      bench::touch(x.data());
    });
    step_time(state, tokens);
  });
}

template <class S>
void layers(Index tokens, Index n, Index channels) {
  const double flops = 8.0 * static_cast<double>(tokens * n * channels);
  const std::string width = "/H:" + std::to_string(channels);
  add(title<S>("lru", tokens, "N", n) + width, [=](benchmark::State& state) {
    eb::Random random(1);
    const auto p = eb::lru_parameters<S>(random, n, channels, {.r_min = 0.9, .r_max = 0.999});
    const auto u = bench::random_matrix<S>(tokens, channels, 2);
    eb::Matrix<S> y(tokens, channels);
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)}, [&] {
      eb::lru_forward(u, p, y);
      bench::touch(y.data());
    });
    step_time(state, tokens);
  });
  add(title<S>("s5", tokens, "N", n) + width, [=](benchmark::State& state) {
    eb::Random random(1);
    const auto l = eb::lru_parameters<S>(random, n, channels);
    eb::S5Parameters<S> p{eb::Vector<std::complex<S>>::Constant(n, {S(-0.5), S(3)}), l.b, l.c, l.d,
                          eb::Vector<S>::Constant(n, S(0.05))};
    const auto u = bench::random_matrix<S>(tokens, channels, 2);
    eb::Matrix<S> y(tokens, channels);
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)}, [&] {
      eb::s5_forward(u, p, y);
      bench::touch(y.data());
    });
    step_time(state, tokens);
  });
}

template <class S>
void sequential(Index tokens, Index n) {
  add(title<S>("gru", tokens, "H", n), [=](benchmark::State& state) {
    auto w = eb::gru_zeros<S>(n, n);
    w.input = bench::random_matrix<S>(n, 3 * n, 1, 0.1);
    w.hidden = bench::random_matrix<S>(n, 3 * n, 2, 0.1);
    const auto x = bench::random_matrix<S>(tokens, n, 3);
    const eb::Vector<S> h0 = eb::Vector<S>::Zero(n);
    eb::Matrix<S> h(tokens, n);
    const double flops = 12.0 * static_cast<double>(tokens * n * n);
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)}, [&] {
      eb::gru_forward(x, w, h0, h);
      bench::touch(h.data());
    });
    step_time(state, tokens);
  });
  add(title<S>("rnn_tanh", tokens, "N", n), [=](benchmark::State& state) {
    const auto w = bench::random_matrix<S>(n, n, 1, 0.1), u = bench::random_matrix<S>(tokens, n, 3);
    const eb::Vector<S> x0 = eb::Vector<S>::Zero(n);
    eb::Matrix<S> x(tokens, n);
    const double flops = 2.0 * static_cast<double>(tokens * n * n);
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)}, [&] {
      eb::rnn_tanh_forward(u, w, x0, x);
      bench::touch(x.data());
    });
    step_time(state, tokens);
  });
}

template <class S>
void sweep(const char* name, eb::DeerMethod method, Index tokens, Index n) {
  add(title<S>(name, tokens, "N", n), [=](benchmark::State& state) {
    const auto w = bench::random_matrix<S>(n, n, 1, 0.6 / std::sqrt(static_cast<double>(n)));
    const auto u = bench::random_matrix<S>(tokens, n, 3, 0.5);
    const eb::Vector<S> x0 = eb::Vector<S>::Zero(n);
    const auto cell = eb::tanh_cell(w);
    eb::Matrix<S> x = eb::Matrix<S>::Zero(tokens, n);
    const double flops = 2.0 * static_cast<double>(tokens * n * n);
    bench::measure(state, {.flops = flops, .limit = bench::fma_limit<S>(flops)}, [&] {
      eb::deer_sweeps(cell, u, x0, x, 1, {.method = method});
      bench::touch(x.data());
    });
    step_time(state, tokens);
  });
}

}  // namespace

int main(int argc, char** argv) {
  for (const Index tokens : {1024, 65536}) {
    scan<float>(tokens, 256);
    scan<double>(tokens, 256);
    layers<float>(tokens, 256, 128);
  }
  for (const Index n : {16, 64, 128, 256}) sequential<float>(2048, n);
  for (const Index n : {4, 16, 64}) {
    sweep<double>("deer:newton", eb::DeerMethod::newton, 2048, n);
    sweep<double>("deer:quasi", eb::DeerMethod::quasi, 2048, n);
    sweep<double>("deer:jacobi", eb::DeerMethod::jacobi, 2048, n);
    sequential<double>(2048, n);
  }
  return bench::run(argc, argv);
}
