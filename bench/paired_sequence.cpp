// Fourier transforms and long convolutions of D channels and L samples; the selective scan.
#include "paired.hpp"

#include <eigenblocks/core/convolution.hpp>
#include <eigenblocks/core/fft.hpp>
#include <eigenblocks/ssm/selective_scan.hpp>

#include <complex>

namespace paired {
namespace {

template <class S>
Case rfft_case(const Parameters& given, eb::ExecutorRef executor) {
  Parameters p = given;
  struct Data {
    eb::RealFft<S> plan;
    eb::Matrix<S> x;
    eb::Matrix<std::complex<S>> spectrum;
    eb::Workspace workspace;
  };
  const Index n = p["L"], channels = p["D"];
  const auto data =
      std::make_shared<Data>(Data{eb::RealFft<S>(n), random_matrix<S>(n, channels, 1), {}, {}});
  data->spectrum.setZero(n / 2 + 1, channels);
  return [=] { eb::rfft(data->plan, data->x, data->spectrum, executor, &data->workspace); };
}

template <class S>
Case longconv_case(const Parameters& given, eb::ExecutorRef executor) {
  Parameters p = given;
  struct Data {
    eb::Matrix<S> u, k, y;
    eb::CausalConvSaved<S> saved;
  };
  const Index rows = p["L"], channels = p["D"];
  const auto data = std::make_shared<Data>(Data{random_matrix<S>(rows, channels, 1),
                                                random_matrix<S>(rows, channels, 2),
                                                eb::Matrix<S>::Zero(rows, channels),
                                                {}});
  return [=] {
    eb::causal_conv_forward(data->saved, data->u, data->k, data->y, eb::Vector<S>(), {}, executor);
  };
}

/// peers.py's selective scan: no bias, soft-plus, skip or gate, an A that has no powers.
template <class S>
Case scan_case(const Parameters& given, eb::ExecutorRef executor) {
  Parameters p = given;
  const Index batch = p["B"], channels = p["D"], tokens = p["L"], states = p["S"];
  const eb::Matrix<S> delta = random_matrix<S>(batch * tokens, channels, 2, 0.05).cwiseAbs();
  const eb::Matrix<S> a =
      (-random_matrix<S>(channels, states, 3, 0.5).array().abs() - S(0.5)).matrix();
  return [=, u = random_matrix<S>(batch * tokens, channels, 1),
          b = random_matrix<S>(batch * tokens, states, 4),
          c = random_matrix<S>(batch * tokens, states, 5),
          out = random_matrix<S>(batch * tokens, channels, 6)]() mutable {
    for (Index i = 0; i < batch; ++i) {
      const auto rows = [&](auto& m) { return m.middleRows(i * tokens, tokens); };
      eb::selective_scan_forward(rows(u), rows(delta), a, rows(b), rows(c), rows(out), {}, {},
                                 nullptr, executor);
    }
    bench::touch(out.data());
  };
}

constexpr Op kOps[] = {{"scan", scan_case<float>, scan_case<double>},
                       {"rfft", rfft_case<float>, rfft_case<double>},
                       {"longconv", longconv_case<float>, longconv_case<double>}};

}  // namespace

std::span<const Op> sequence_ops() { return kOps; }

}  // namespace paired
