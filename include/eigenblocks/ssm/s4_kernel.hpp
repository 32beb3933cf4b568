// The convolution kernel of S4, a state space model with A = diag(lambda) - sum_r p_r p_r^*, and its gradients.
//
//   K_l = C Abar^l Bbar, l = 0 .. L-1;  Abar, Bbar by the bilinear transform; sums over n modes and their conjugates
//
//   S4Parameters<float> p = ...;                              // s4.hpp initialises them from HiPPO
//   const Matrix<float> k = s4_kernel(p, 1024);               // 1024 x H; p.c is C~ = C (I - Abar^1024), as s4 trains it
//   s4_kernel(p, 1024, {.output = S4Output::plain});          // p.c is C
//   s4_kernel_backward(p, dk, dp);                            // every member of dp but skip; parameters only, nothing saved
//   s4_truncate(p, L) -> C~ of C       s4_untruncate(p, L) -> C of C~ with rcond       s4_double_length(p, L) -> C~ for 2 L
//   s4_kernel_reference(p, L)                                 // powers of a dense matrix: the oracle
//
//   lambda, b, c  H x n complex    p  (R*H) x n complex, row r*H + h    dt  H    skip  H or empty (D of the layer)
//   Complex gradients are dL/dRe + i dL/dIm.  Models that train log dt: d log dt = dt * ddt; likewise for log(-Re lambda).
//
// The generating function of the kernel is evaluated at the L-th roots of unity by Cauchy sums (s4_cauchy.hpp), O(n L), and
// goes back by an inverse real FFT of any length, odd or even.  `plain` first makes C~ with log2(L) squarings of a real
// 2n x 2n matrix.  Against the oracle (legs, N = 64, L = 1024): 1e-14 max |K|.  In double inside, also for float.
//
// C~ -> C solves with I - Abar^L, which is nearly singular where the state hardly decays within L (dt L small): s4_untruncate
// returns a reciprocal condition that counts the cancellation in the difference too; `reliable` is false below 1e-10.
//
// Bitwise equal for every executor (channels are the tasks).  Errors, nothing written: invalid_argument for shapes, Re lambda
// > 0, dt not positive and finite, anything else not finite, length < 1; std::domain_error where a pole lies on a node
// (lambda = 0, or an undamped mode in tune with L) or, in s4_untruncate, I - Abar^L is singular.
//
// Source: arXiv 2111.00396; state-spaces/s4 (models/s4/s4.py); kexue.fm 10162.
#pragma once

#include <eigenblocks/core/fft.hpp>
#include <eigenblocks/ssm/s4_cauchy.hpp>

#include <algorithm>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

/// What the member c of the parameters is.
enum class S4Output {
  truncated,  ///< C~ = C (I - Abar^L) of the kernel's own length, the trained form
  plain       ///< C itself
};

struct S4Options {
  S4Output output = S4Output::truncated;
};

namespace detail {

inline void require_s4_options(const S4Options& options) {
  require(options.output == S4Output::truncated || options.output == S4Output::plain, "output (",
          options.output, ") must be truncated or plain");
}

/// C~ of a channel that holds C.
inline Vector<std::complex<double>> truncated_output(const S4Channel& s, Index length) {
  const Matrix<double> row = output_row(s.c);
  const PowerLadder powers(S4Discrete(s).dense(), length);
  return output_modes(row - powers.apply(row));
}

/// Turns the gradient of C~ in g.c into that of C, and adds what the powers of Abar make of it to the others.
inline void truncated_output_backward(const S4Channel& s, Index length, S4Channel& g) {
  const S4Discrete step(s);
  const PowerLadder powers(step.dense(), length);
  const Matrix<double> grow = output_modes_backward(g.c);
  Matrix<double> ga;
  const Matrix<double> through = powers.apply_backward(output_row(s.c), -grow, ga);
  g.c = output_row_backward(grow + through);
  S4Discrete gstep = S4Discrete::zero(s.modes(), s.rank());
  step.dense_backward(ga, gstep);
  gstep.backward(s, g);
}

inline void require_no_pole(const std::vector<char>& bad) {
  const auto found = std::find(bad.begin(), bad.end(), 1);
  if (found != bad.end()) {
    raise<std::domain_error>("s4_kernel: a pole of channel ", found - bad.begin(),
                             " lies on a node of the kernel's transform");
  }
}

template <RealScalar S, class F>
Matrix<std::complex<S>> map_outputs(const S4Parameters<S>& p, ExecutorRef executor, F&& f) {
  Matrix<std::complex<S>> out(p.channels(), p.modes());
  executor.run(p.channels(), [&](Index h, int) {
    out.row(h) = f(S4Channel(p, h)).transpose().template cast<std::complex<S>>();
  });
  return out;
}

}  // namespace detail

/// K, L x H; L is the number of rows of `kernel`.
template <RealScalar S, OutputMatrix O>
  requires std::same_as<scalar_t<O>, S>
void s4_kernel_forward(const S4Parameters<S>& p, O&& kernel, const S4Options& options = {},
                       ExecutorRef executor = {}) {
  using Sums = detail::CauchySums;
  detail::require_s4(p);
  detail::require_s4_options(options);
  detail::require_length(kernel.rows());
  detail::require_shape("kernel", kernel.rows(), kernel.cols(), kernel.rows(), p.channels(),
                        "length x channels");
  const Index length = kernel.rows();
  const detail::CauchyNodes nodes(length);
  Matrix<std::complex<S>> spectrum(nodes.count, p.channels());
  std::vector<char> bad(static_cast<std::size_t>(p.channels()), 0);
  detail::for_channels(p.channels(), executor, [&](Index first, Index last) {
    Sums sums(nodes, p.modes(), p.rank());
    double re[Sums::kTile] = {}, im[Sums::kTile] = {};
    for (Index h = first; h < last; ++h) {
      detail::S4Channel s(p, h);
      if (options.output == S4Output::plain) s.c = detail::truncated_output(s, length);
      sums.set(s);
      for (Index k = 0; k < nodes.count; k += Sums::kTile) {
        if (!sums.forward(k, re, im)) bad[static_cast<std::size_t>(h)] = 1;
        for (Index i = 0; i < std::min(Sums::kTile, nodes.count - k); ++i)
          spectrum(k + i, h) = {static_cast<S>(re[i]), static_cast<S>(im[i])};
      }
    }
  });
  detail::require_no_pole(bad);
  irfft(RealFft<S>(length), spectrum, kernel, executor);
}

/// The same, returned.
template <RealScalar S>
Matrix<S> s4_kernel(const S4Parameters<S>& p, Index length, const S4Options& options = {},
                    ExecutorRef executor = {}) {
  detail::require_length(length);
  detail::require_s4(p);
  Matrix<S> kernel(length, p.channels());
  s4_kernel_forward(p, kernel, options, executor);
  return kernel;
}

/// Gradients of <dkernel, K>; resizes and overwrites `dp` (skip, which K does not have, gets zeros).
template <RealScalar S, MatrixLike DK>
  requires std::same_as<scalar_t<DK>, S>
void s4_kernel_backward(const S4Parameters<S>& p, const DK& dkernel, S4Parameters<S>& dp,
                        const S4Options& options = {}, ExecutorRef executor = {}) {
  using Sums = detail::CauchySums;
  detail::require_s4(p);
  detail::require_s4_options(options);
  detail::require_length(dkernel.rows());
  detail::require_shape("dkernel", dkernel.rows(), dkernel.cols(), dkernel.rows(), p.channels(),
                        "length x channels");
  const Index length = dkernel.rows();
  const detail::CauchyNodes nodes(length);
  Matrix<std::complex<S>> dspectrum(nodes.count, p.channels());
  irfft_backward(RealFft<S>(length), dkernel, dspectrum, executor);
  std::vector<char> bad(static_cast<std::size_t>(p.channels()), 0);
  S4Parameters<S> out;
  detail::resize_like(out, p);
  detail::for_channels(p.channels(), executor, [&](Index first, Index last) {
    Sums sums(nodes, p.modes(), p.rank());
    double re[Sums::kTile] = {}, im[Sums::kTile] = {};
    for (Index h = first; h < last; ++h) {
      detail::S4Channel s(p, h), g = detail::S4Channel::zero(p.modes(), p.rank());
      const detail::S4Channel given = s;
      if (options.output == S4Output::plain) s.c = detail::truncated_output(s, length);
      sums.set(s);
      for (Index k = 0; k < nodes.count; k += Sums::kTile) {
        for (Index i = 0; i < Sums::kTile; ++i) {
          const bool inside = k + i < nodes.count;
          re[i] = inside ? static_cast<double>(dspectrum(k + i, h).real()) : 0.0;
          im[i] = inside ? static_cast<double>(dspectrum(k + i, h).imag()) : 0.0;
        }
        if (!sums.backward(k, re, im, g)) bad[static_cast<std::size_t>(h)] = 1;
      }
      if (options.output == S4Output::plain) detail::truncated_output_backward(given, length, g);
      g.store(out, h);
    }
  });
  detail::require_no_pole(bad);
  dp = std::move(out);
}

/// C~ = C (I - Abar^L) for p.c = C, H x n.
template <RealScalar S>
Matrix<std::complex<S>> s4_truncate(const S4Parameters<S>& p, Index length,
                                    ExecutorRef executor = {}) {
  detail::require_s4(p);
  detail::require_length(length);
  return detail::map_outputs(
      p, executor, [&](const detail::S4Channel& s) { return detail::truncated_output(s, length); });
}

/// C~ for length 2 L from p.c = C~ for length L: C~ (I + Abar^L).  How s4 lets sequences grow.
template <RealScalar S>
Matrix<std::complex<S>> s4_double_length(const S4Parameters<S>& p, Index length,
                                         ExecutorRef executor = {}) {
  detail::require_s4(p);
  detail::require_length(length);
  return detail::map_outputs(p, executor, [&](const detail::S4Channel& s) {
    const Matrix<double> row = detail::output_row(s.c);
    const detail::PowerLadder powers(detail::S4Discrete(s).dense(), length);
    return detail::output_modes(row + powers.apply(row));
  });
}

/// What s4_untruncate found.
template <RealScalar S>
struct S4Untruncated {
  Matrix<std::complex<S>> c;  ///< C, H x n
  Vector<double> rcond;       ///< 1 / (max(1, |I - Abar^L|) |(I - Abar^L)^-1|), for each channel
  bool reliable = true;       ///< every rcond is at least 1e-10
};

/// C for decoding from p.c = C~ for length L.  Check `reliable`: below it C is the noise of an ill-conditioned system.
template <RealScalar S>
S4Untruncated<S> s4_untruncate(const S4Parameters<S>& p, Index length, ExecutorRef executor = {}) {
  detail::require_s4(p);
  detail::require_length(length);
  S4Untruncated<S> out{.c = {}, .rcond = Vector<double>(p.channels())};
  Matrix<std::complex<S>> c(p.channels(), p.modes());
  executor.run(p.channels(), [&](Index h, int) {
    const detail::S4Channel s(p, h);
    const Matrix<double> power = detail::PowerLadder(detail::S4Discrete(s).dense(), length).power();
    const Matrix<double> rest = Matrix<double>::Identity(power.rows(), power.rows()) - power;
    Matrix<double> used = rest, inverse = Matrix<double>::Identity(rest.rows(), rest.rows());
    detail::dense_solve(used, inverse);
    // Abar^L is known to eps of its own size, about 1, however small the difference is.
    out.rcond[h] = 1.0 / (std::max(1.0, detail::one_norm(rest)) * detail::one_norm(inverse));
    const Matrix<double> row = detail::dense_product(detail::output_row(s.c), inverse);
    c.row(h) = detail::output_modes(row).transpose().template cast<std::complex<S>>();
  });
  for (Index h = 0; h < p.channels(); ++h) {
    if (!(out.rcond[h] > 0)) {
      detail::raise<std::domain_error>("s4_untruncate: I - Abar^", length, " of channel ", h,
                                       " is singular");
    }
    out.reliable = out.reliable && out.rcond[h] >= 1e-10;
  }
  out.c = std::move(c);
  return out;
}

/// The oracle: A as a dense real matrix on (Re x, Im x), discretised as any other, its powers one by one.  O(n^2 L) per
/// channel; shares nothing with the fast kernel but the checks.
inline Matrix<double> s4_kernel_reference(const S4Parameters<double>& p, Index length,
                                          const S4Options& options = {}) {
  detail::require_s4(p);
  detail::require_s4_options(options);
  detail::require_length(length);
  const Index n = p.modes();
  Matrix<double> kernel(length, p.channels());
  for (Index h = 0; h < p.channels(); ++h) {
    Matrix<double> a = Matrix<double>::Zero(2 * n, 2 * n), b(2 * n, 1), c(1, 2 * n);
    for (Index i = 0; i < n; ++i) {
      a(i, i) = a(n + i, n + i) = p.lambda(h, i).real();
      a(n + i, i) = p.lambda(h, i).imag();
      a(i, n + i) = -p.lambda(h, i).imag();
      b(i, 0) = p.b(h, i).real();
      b(n + i, 0) = p.b(h, i).imag();
      c(0, i) = 2 * p.c(h, i).real();
      c(0, n + i) = -2 * p.c(h, i).imag();
    }
    for (Index r = 0; r < p.rank(); ++r) {
      const auto low = p.p.row(r * p.channels() + h);
      for (Index i = 0; i < n; ++i) {
        for (Index k = 0; k < n; ++k) {  // p_i 2 Re(conj(p_k) x_k)
          a(i, k) -= 2 * low[i].real() * low[k].real();
          a(i, n + k) -= 2 * low[i].real() * low[k].imag();
          a(n + i, k) -= 2 * low[i].imag() * low[k].real();
          a(n + i, n + k) -= 2 * low[i].imag() * low[k].imag();
        }
      }
    }
    const Discretized d = discretize(a, b, p.dt[h], {.method = Discretization::bilinear});
    if (options.output == S4Output::truncated) {
      Matrix<double> power = Matrix<double>::Identity(2 * n, 2 * n);
      for (Index l = 0; l < length; ++l) power = detail::dense_product(power, d.a);
      const Matrix<double> rest = Matrix<double>::Identity(2 * n, 2 * n) - power;
      Matrix<double> used = rest.transpose(), column = c.transpose();
      detail::dense_solve(used, column);
      c = column.transpose();
    }
    Matrix<double> x = d.b;
    for (Index l = 0; l < length; ++l) {
      kernel(l, h) = c.row(0).dot(x.col(0));
      x = detail::dense_product(d.a, x);
    }
  }
  return kernel;
}

EIGENBLOCKS_NAMESPACE_END
