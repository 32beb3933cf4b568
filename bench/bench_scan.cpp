// Linear recurrences: core/scan.hpp, as a share of the speed of memory.
//
//   scan        h_t = a_t h_{t-1} + b_t: two streams read, one written; constant: b read, h written
//   scan_back   da, db from a, h, dh: 5 streams
//   scan_chunk  the three-pass form in chunks of 4096 rows, on one thread: what the cut costs
//   scan_dense  x_t = A_t x_{t-1} + b_t: A is read once
//
// limit: streaming the same bytes without arithmetic (triad; copy where a is constant; reading A for scan_dense).
#include <eigenblocks/core/scan.hpp>

#include "harness.hpp"

#include <complex>
#include <string>
#include <type_traits>

namespace {

using bench::Index;
namespace eb = eigenblocks;

enum class Form { forward, constant, back, chunk, wide };
constexpr const char* kForms[] = {"scan", "scan_constant", "scan_back", "scan_chunk", "scan_wide"};

template <class S>
void scan(Form form, Index rows, Index lanes) {
  constexpr bool complex = eb::ComplexScalar<S>;
  using R = eb::real_t<S>;
  const std::string name = std::string(kForms[static_cast<int>(form)]) + "/" +
                           bench::scalar_name<R>() + (complex ? "/complex" : "/real") +
                           "/T:" + std::to_string(rows) + "/D:" + std::to_string(lanes);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const auto random = [&](std::uint64_t seed) {
      const eb::Matrix<R> x = bench::random_matrix<R>(rows, lanes, seed, 0.3);
      return eb::Matrix<S>(x.template cast<S>());
    };
    eb::Matrix<S> a = random(1), b = random(2), h = b, da, db;
    if (form == Form::constant) a = eb::Matrix<S>(a.row(0));
    if (form == Form::back) da = a, db = b;
    const eb::Vector<S> h0 = eb::Vector<S>::Ones(lanes);
    eb::Vector<S> dh0 = h0;
    const double size = static_cast<double>(b.size()) * sizeof(S);
    const double bytes = size * (form == Form::constant ? 2 : form == Form::back ? 5 : 3);
    const auto limit =
        form == Form::constant
            ? bench::copy_limit(bytes)
            : std::function<double()>([=] { return bytes / bench::triad_rate(bytes); });
    eb::ScanOptions options;
    if (form == Form::chunk) options.time_chunk = 4096;
    if (form == Form::wide) options.wide = true;
    bench::measure(state, {.bytes = bytes, .limit = limit}, [&] {
      if (form == Form::back) {
        eb::scan_backward(a, h, b, da, db, dh0, h0, options);
      } else {
        eb::scan_forward(a, b, h, h0, options);
      }
      bench::touch(h.data());
    });
  })->Unit(benchmark::kMicrosecond);
}

void dense(Index rows, Index n) {
  const std::string name = "scan_dense/float/T:" + std::to_string(rows) + "/N:" + std::to_string(n);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Matrix<float> a = bench::random_matrix<float>(rows * n, n, 1, 0.1);
    const eb::Matrix<float> b = bench::random_matrix<float>(rows, n, 2);
    eb::Matrix<float> x = b;
    const double bytes = static_cast<double>(a.size()) * sizeof(float);
    bench::measure(state,
                   {.flops = 2.0 * static_cast<double>(a.size()),
                    .bytes = bytes,
                    .limit = [=] { return bytes / bench::read_rate(bytes); }},
                   [&] {
                     eb::scan_dense_forward(a, b, x);
                     bench::touch(x.data());
                   });
  })->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (const auto& [rows, lanes] :
       {std::pair<Index, Index>{1024, 64}, {65536, 8}, {65536, 64}, {65536, 256}, {4096, 4096}}) {
    scan<float>(Form::forward, rows, lanes);
    scan<std::complex<float>>(Form::forward, rows, lanes);
  }
  scan<double>(Form::forward, 65536, 64);
  scan<float>(Form::constant, 65536, 64);
  scan<float>(Form::back, 65536, 64);
  scan<std::complex<float>>(Form::back, 65536, 64);
  scan<float>(Form::chunk, 65536, 8);
  scan<float>(Form::wide, 65536, 64);
  for (const Index n : {Index(4), Index(16), Index(64)}) dense(4096, n);
  return bench::run(argc, argv);
}
