// Fresh S5 layers (ssm/s5.hpp): blocks of the normal part of HiPPO-LegS.
//
//   S5Parameters<float> p = s5_parameters<float>(random, 64, 32, {.blocks = 4});    // 64 modes, 32 channels
//
// With N = 2 modes / blocks states a block: Lambda holds the N/2 eigenvalues with negative imaginary part of the normal part of
// LegS for each block, B = V^* B0 and C = C0 V with V its eigenvectors, B0 and C0 real normal of standard deviation 1/sqrt(H) and
// 1/sqrt(states) (bidirectional: a C0 for each direction).  dt is log-uniform in [dt_min, dt_max], D standard normal.
// Modes stand for conjugate pairs: use conj_sym.  Errors (invalid_argument): blocks not dividing modes, 0 < dt_min <= dt_max not met.
// Source: arXiv 2208.04933, lindermanlab/S5.
#pragma once

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/ssm/nplr.hpp>
#include <eigenblocks/ssm/s5.hpp>

#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

struct S5InitOptions {
  Index blocks = 1;
  double dt_min = 1e-3;
  double dt_max = 1e-1;
  bool bidirectional = false;
};

/// A layer of `modes` modes (conjugate pairs) for `channels` channels.
template <RealScalar S>
S5Parameters<S> s5_parameters(Random& random, Index modes, Index channels,
                              const S5InitOptions& options = {}) {
  using Complex = std::complex<double>;
  detail::require(modes >= 1 && channels >= 1, "modes (", modes, ") and channels (", channels,
                  ") must be at least 1");
  detail::require(options.blocks >= 1 && modes % options.blocks == 0, "blocks (", options.blocks,
                  ") must divide modes (", modes, ")");
  detail::require(
      0 < options.dt_min && options.dt_min <= options.dt_max && std::isfinite(options.dt_max),
      "dt_min (", options.dt_min, ") and dt_max (", options.dt_max,
      ") must be positive and ordered");
  const Index half = modes / options.blocks, directions = options.bidirectional ? 2 : 1;
  const Nplr legs = nplr(HippoMeasure::legs, 2 * half);
  Vector<Complex> lambda(modes);
  Matrix<Complex> b(modes, channels), c(channels, directions * modes);
  for (Index block = 0; block < options.blocks; ++block) {
    const Index at = block * half;
    lambda.segment(at, half) = legs.lambda;
    const Matrix<double> b0 =
        normal_matrix<double>(random, 2 * half, channels, 1 / std::sqrt(double(channels)));
    b.middleRows(at, half).noalias() = legs.v.adjoint() * b0.cast<Complex>();
    for (Index way = 0; way < directions; ++way) {
      const Matrix<double> c0 =
          normal_matrix<double>(random, channels, 2 * half, 1 / std::sqrt(double(2 * modes)));
      c.middleCols(way * modes + at, half).noalias() = c0.cast<Complex>() * legs.v;
    }
  }
  S5Parameters<S> p{lambda.cast<std::complex<S>>(), b.cast<std::complex<S>>(),
                    c.cast<std::complex<S>>(), Vector<S>(channels), Vector<S>(modes)};
  for (Index i = 0; i < channels; ++i) p.d[i] = static_cast<S>(random.normal());
  const double low = std::log(options.dt_min), high = std::log(options.dt_max);
  for (Index i = 0; i < modes; ++i) {
    p.dt[i] = static_cast<S>(std::exp(low + (high - low) * random.uniform()));
  }
  return p;
}

EIGENBLOCKS_NAMESPACE_END
