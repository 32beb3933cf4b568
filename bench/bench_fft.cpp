// Fourier transforms and long convolutions: core/fft.hpp, core/convolution.hpp.
//
//   rfft, irfft      H channels of length n, natural order; FLOPS counts 2.5 n log2 n per channel
//   longconv         T x H with kernels of T rows, by transforms of 2T; longconv_fb: with the gradients
//   causal_conv      methods side by side for short kernels
//
// limit: for transforms, copying input and output once (1 would mean that the arithmetic is free).
#include <eigenblocks/core/convolution.hpp>
#include <eigenblocks/core/fft.hpp>

#include "harness.hpp"

#include <cmath>
#include <complex>
#include <string>

namespace {

using bench::Index;
namespace eb = eigenblocks;

template <class S>
void transform(Index n, Index channels, bool inverse) {
  const std::string name = std::string(inverse ? "irfft/" : "rfft/") + bench::scalar_name<S>() +
                           "/n:" + std::to_string(n) + "/H:" + std::to_string(channels);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::RealFft<S> plan(n);
    eb::Matrix<S> x = bench::random_matrix<S>(n, channels, 1);
    eb::Matrix<std::complex<S>> spectrum(plan.spectrum_rows(), channels);
    eb::Workspace workspace;
    eb::rfft(plan, x, spectrum, {}, &workspace);
    const double size = static_cast<double>(n) * static_cast<double>(channels);
    const double bytes = 2 * size * sizeof(S);
    bench::measure(state,
                   {.flops = 2.5 * size * std::log2(static_cast<double>(n)),
                    .bytes = bytes,
                    .limit = bench::copy_limit(bytes)},
                   [&] {
                     if (inverse) {
                       eb::irfft(plan, spectrum, x, {}, &workspace);
                     } else {
                       eb::rfft(plan, x, spectrum, {}, &workspace);
                     }
                     bench::touch(x.data());
                     bench::touch(spectrum.data());
                   });
  })->Unit(benchmark::kMicrosecond);
}

template <class S>
void convolve(const char* op, Index rows, Index taps, Index channels, eb::ConvMethod method,
              bool gradients) {
  static constexpr const char* kMethods[] = {"automatic", "direct", "fft", "overlap_save"};
  const std::string name = std::string(op) + "/" + bench::scalar_name<S>() + "/" +
                           kMethods[static_cast<int>(method)] + "/T:" + std::to_string(rows) +
                           "/L:" + std::to_string(taps) + "/H:" + std::to_string(channels);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    const eb::Matrix<S> u = bench::random_matrix<S>(rows, channels, 1);
    const eb::Matrix<S> k = bench::random_matrix<S>(taps, channels, 2);
    const eb::Vector<S> skip = eb::Vector<S>::Ones(channels);
    eb::Matrix<S> y = u, du = u, dk = k;
    eb::Vector<S> dskip = skip;
    eb::CausalConvSaved<S> saved;
    const double bytes = 2 * static_cast<double>(u.size()) * sizeof(S);
    bench::measure(state, {.bytes = bytes, .limit = bench::copy_limit(bytes)}, [&] {
      eb::causal_conv_forward(saved, u, k, y, skip, {.method = method});
      if (gradients) eb::causal_conv_backward(saved, u, k, u, du, dk, dskip, skip);
      bench::touch(y.data());
      bench::touch(du.data());
    });
  })->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  for (Index n = 256; n <= 131072; n *= 2) transform<float>(n, 64, false);
  for (const Index n : {Index(1000), Index(2018), Index(4099), Index(60000)}) {
    transform<float>(n, 64, false);
  }
  for (const Index n : {Index(4096), Index(65536)}) {
    transform<float>(n, 64, true);
    transform<float>(n, 1, false);
    transform<double>(n, 64, false);
  }
  for (Index rows = 1024; rows <= 65536; rows *= 4) {
    convolve<float>("longconv", rows, rows, 64, eb::ConvMethod::fft, false);
    convolve<float>("longconv_fb", rows, rows, 64, eb::ConvMethod::fft, true);
  }
  for (const eb::ConvMethod method :
       {eb::ConvMethod::direct, eb::ConvMethod::fft, eb::ConvMethod::overlap_save}) {
    for (const Index taps : {Index(16), Index(64), Index(256)}) {
      convolve<float>("causal_conv", 4096, taps, 64, method, false);
    }
  }
  return bench::run(argc, argv);
}
