// Fourier transforms along time of T x H matrices, any length, with gradients.
//
//   X_k = sum_j x_j exp(-2 pi i j k / n), k = 0 .. n/2          x_j = (1/n) sum over all k of X_k exp(+2 pi i j k / n)
//
//   const RealFft<double> plan(n);                 // tables; copies share them, any number of threads may use one
//   rfft(plan, x, X);                              // x: T x H, cut or zero-padded to n rows; X: (n/2 + 1) x H complex
//   irfft(plan, X, y, pool);                       // y: up to n rows, the first of the result
//   rfft_backward(plan, dX, dx);                   // dx: the shape of x
//   irfft_backward(plan, dy, dX);                  // dy: the shape of y
//   Matrix<std::complex<float>> S = rfft(x);       // n = T
//   const ComplexFft<float> all(n);                // complex: fft(all, z, Z), ifft(all, Z, z), n x H, Z may be z
//
// Frequencies come in their natural order.  irfft ignores the imaginary parts of X_0 and, for even n, X_{n/2}.
// Gradients (complex ones as in complex.hpp): dx_j = Re sum_k dX_k exp(+2 pi i j k / n) over the stored k;
// dX_k = (w_k / n) rfft(dy)_k, w = 1 at k = 0 and k = n/2 (n even), else 2.  Of fft: n ifft; of ifft: fft / n.
//
// Channels are SIMD lanes: a block of 64 bytes of a row (16 float channels) is one task and costs the same when it is not
// full, so a few channels are transformed at the price of a block.  Powers of two are fastest; other lengths take about four
// times as long (even) or ten (odd), primes included.  Errors grow like eps log n.
// Errors: invalid_argument for n < 1 and for shapes.      float and double.
// Source: Cooley and Tukey 1965; Bluestein 1970.
#pragma once

#include <eigenblocks/core/complex.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/fft_kernel.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <algorithm>
#include <complex>
#include <cstddef>
#include <memory>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Plan of real transforms of length n >= 1.
template <RealScalar S>
class RealFft {
 public:
  explicit RealFft(Index n) {
    detail::require(n >= 1, "n (", n, ") must be at least 1");
    tables_ = std::make_shared<const detail::RealFftTables<S>>(n);
  }
  Index size() const { return tables_->size(); }
  /// n/2 + 1
  Index spectrum_rows() const { return size() / 2 + 1; }
  const detail::RealFftTables<S>& tables() const { return *tables_; }

 private:
  std::shared_ptr<const detail::RealFftTables<S>> tables_;
};

/// Plan of complex transforms of length n >= 1.
template <RealScalar S>
class ComplexFft {
 public:
  explicit ComplexFft(Index n) {
    detail::require(n >= 1, "n (", n, ") must be at least 1");
    tables_ = std::make_shared<const detail::AnyFft<S>>(n);
  }
  Index size() const { return tables_->size(); }
  const detail::AnyFft<S>& tables() const { return *tables_; }

 private:
  std::shared_ptr<const detail::AnyFft<S>> tables_;
};

namespace detail {

/// Rows of `lanes` <= kFftLanes channels into rows of a whole block.
template <RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void copy_lanes(const S* from, S* to, Index lanes) {
  if (lanes == kFftLanes<S>) {
    for (Index r = 0; r < kFftLanes<S>; r += simd::kLanes<S>) {
      simd::store<simd::Packet<S>>(to + r, simd::load<simd::Packet<S>>(from + r));
    }
  } else {
    for (Index r = 0; r < lanes; ++r) to[r] = from[r];
    for (Index r = lanes; r < kFftLanes<S>; ++r) to[r] = S(0);
  }
}

/// Real rows into the buffer: [0, rows) from x, zeros up to n.
template <RealScalar S>
void load_real(const RealFftTables<S>& t, const S* x, Index stride, Index rows, Index lanes, S* z) {
  const Index step = t.halved() ? kFftLanes<S> : kFftRow<S>;
  if (!t.halved()) std::fill(z, z + t.size() * step, S(0));
  for (Index j = 0; j < rows; ++j) copy_lanes(x + j * stride, z + j * step, lanes);
  std::fill(z + rows * step, z + t.size() * step, S(0));
}
template <RealScalar S>
void store_real(const RealFftTables<S>& t, const S* z, S* x, Index stride, Index rows,
                Index lanes) {
  const Index step = t.halved() ? kFftLanes<S> : kFftRow<S>;
  for (Index j = 0; j < rows; ++j) {
    if (lanes == kFftLanes<S>) {
      copy_lanes(z + j * step, x + j * stride, lanes);
    } else {
      std::copy(z + j * step, z + j * step + lanes, x + j * stride);
    }
  }
}

/// The spectrum in natural order from a transformed buffer: edges are k = 0 and n/2, the others inner.
template <RealScalar S>
void store_spectrum(const RealFftTables<S>& t, const S* z, std::complex<S>* out, Index stride,
                    Index lanes, S edge, S inner) {
  constexpr Index w = simd::kLanes<S>, kLanes = kFftLanes<S>;
  const Index half = t.inner().size();
  const auto zero = simd::zero<simd::Packet<S>>();
  for (Index r = 0; r < kLanes; r += w) {
    const auto first = scaled(load_lanes<S>(z + r), edge);
    if (t.halved()) {
      put_complex<S>(out, r, lanes, {simd::add(first.re, first.im), zero});
      put_complex<S>(out + half * stride, r, lanes, {simd::sub(first.re, first.im), zero});
    } else {
      put_complex<S>(out, r, lanes, {first.re, zero});
    }
  }
  if (!t.halved()) {
    for (Index k = 1; k <= t.size() / 2; ++k) {
      const S* const from = z + t.inner().position(k) * kFftRow<S>;
      for (Index r = 0; r < kLanes; r += w) {
        put_complex(out + k * stride, r, lanes, scaled(load_lanes<S>(from + r), inner));
      }
    }
    return;
  }
  t.for_each_frequency([&](Index p, Index q, Index k, Index at) EIGENBLOCKS_INLINE_LAMBDA {
    const auto turn = set_lanes<S>(t.turn(at));
    for (Index r = 0; r < kLanes; r += w) {
      auto a = load_lanes<S>(z + p * kFftRow<S> + r), b = load_lanes<S>(z + q * kFftRow<S> + r);
      unpack_real(a, b, turn);
      put_complex(out + k * stride, r, lanes, scaled(a, inner / 2));
      put_complex(out + (half - k) * stride, r, lanes, scaled(b, inner / 2));
    }
  });
}

/// The packed buffer of a spectrum in natural order, ready to be inverted.
template <RealScalar S>
void load_spectrum(const RealFftTables<S>& t, const std::complex<S>* in, Index stride, Index lanes,
                   S* z, S edge, S inner) {
  constexpr Index w = simd::kLanes<S>, kLanes = kFftLanes<S>;
  const Index half = t.inner().size();
  const auto zero = simd::zero<simd::Packet<S>>();
  for (Index r = 0; r < kLanes; r += w) {
    const auto first = get_complex(in, r, lanes);
    if (t.halved()) {
      const auto last = get_complex(in + half * stride, r, lanes);
      store_lanes<S>(z + r,
                     scaled<S>({simd::add(first.re, last.re), simd::sub(first.re, last.re)}, edge));
    } else {
      store_lanes<S>(z + r, scaled<S>({first.re, zero}, edge));
    }
  }
  if (!t.halved()) {
    for (Index k = 1; k <= t.size() / 2; ++k) {
      S* const a = z + t.inner().position(k) * kFftRow<S>;
      S* const b = z + t.inner().position(t.size() - k) * kFftRow<S>;
      for (Index r = 0; r < kLanes; r += w) {
        const auto x = scaled(get_complex(in + k * stride, r, lanes), inner);
        store_lanes(a + r, x);
        store_lanes(b + r, conjugate(x));
      }
    }
    return;
  }
  t.for_each_frequency([&](Index p, Index q, Index k, Index at) EIGENBLOCKS_INLINE_LAMBDA {
    const auto turn = set_lanes<S>(t.turn(at));
    for (Index r = 0; r < kLanes; r += w) {
      auto a = get_complex(in + k * stride, r, lanes),
           b = get_complex(in + (half - k) * stride, r, lanes);
      pack_real(a, b, turn);
      store_lanes(z + p * kFftRow<S> + r, scaled(a, inner));
      store_lanes(z + q * kFftRow<S> + r, scaled(b, inner));
    }
  });
}

/// Calls f(first channel, channels, buffer) for blocks of channels.
template <RealScalar S, class F>
void for_channel_blocks(Index channels, Index buffer, ExecutorRef executor, Workspace* workspace,
                        F&& f) {
  Workspace own;
  Workspace& scratch = workspace == nullptr ? own : *workspace;
  const std::size_t bytes = padded_bytes<S>(buffer);
  scratch.prepare(executor.workers(), bytes);
  executor.run((channels + kFftLanes<S> - 1) / kFftLanes<S>, [&](Index task, int worker) {
    const Index first = task * kFftLanes<S>;
    f(first, std::min(kFftLanes<S>, channels - first),
      scratch.arena(worker, bytes).template take<S>(buffer));
  });
}

template <RealScalar S>
void real_to_complex(const RealFftTables<S>& t, const ConstMatrixRef<S>& x,
                     MatrixRef<std::complex<S>> out, S edge, S inner, ExecutorRef executor,
                     Workspace* workspace) {
  for_channel_blocks<S>(
      x.cols(), t.buffer_size(), executor, workspace, [&](Index first, Index lanes, S* z) {
        load_real(t, x.data() + first, x.outerStride(), std::min(x.rows(), t.size()), lanes, z);
        t.inner().forward(z);
        store_spectrum(t, z, out.data() + first, out.outerStride(), lanes, edge, inner);
      });
}
/// Scales include 1/n.
template <RealScalar S>
void complex_to_real(const RealFftTables<S>& t, const ConstMatrixRef<std::complex<S>>& in,
                     MatrixRef<S> x, S edge, S inner, ExecutorRef executor, Workspace* workspace) {
  const Index rows = std::min(x.rows(), t.size());
  for_channel_blocks<S>(
      x.cols(), t.buffer_size(), executor, workspace, [&](Index first, Index lanes, S* z) {
        load_spectrum(t, in.data() + first, in.outerStride(), lanes, z, edge, inner);
        t.inner().inverse(z);
        store_real(t, z, x.data() + first, x.outerStride(), rows, lanes);
      });
  x.bottomRows(x.rows() - rows).setZero();
}

template <class Plan>
void require_spectrum(const char* name, const Plan& plan, Index rows, Index cols, Index channels) {
  require_shape(name, rows, cols, plan.spectrum_rows(), channels, "n/2 + 1, channels");
}
inline void require_inverse_rows(const char* name, Index rows, Index n) {
  require(rows <= n, name, " has ", rows, " rows, expected at most ", n, " (n)");
}

}  // namespace detail

/// spectrum ((n/2 + 1) x H) of x (cut or zero-padded to n rows).  A workspace kept by the caller saves the allocation.
template <MatrixLike X, ComplexOutputMatrix O, RealScalar S = scalar_t<X>>
void rfft(const RealFft<scalar_t<X>>& plan, const X& x, O&& spectrum, ExecutorRef executor = {},
          Workspace* workspace = nullptr) {
  detail::require_spectrum("spectrum", plan, spectrum.rows(), spectrum.cols(), x.cols());
  detail::real_to_complex<S>(plan.tables(), x, spectrum, S(1), S(1), executor, workspace);
}

/// The first rows (at most n) of the inverse transform.
template <ComplexMatrixLike X, OutputMatrix O, RealScalar S = scalar_t<O>>
void irfft(const RealFft<scalar_t<O>>& plan, const X& spectrum, O&& x, ExecutorRef executor = {},
           Workspace* workspace = nullptr) {
  detail::require_spectrum("spectrum", plan, spectrum.rows(), spectrum.cols(), x.cols());
  detail::require_inverse_rows("x", x.rows(), plan.size());
  const S scale = S(1) / static_cast<S>(plan.size());
  detail::complex_to_real<S>(plan.tables(), spectrum, x, scale, scale, executor, workspace);
}

/// Gradient of rfft: dx (any number of rows; zero beyond n) from dspectrum.
template <ComplexMatrixLike X, OutputMatrix O, RealScalar S = scalar_t<O>>
void rfft_backward(const RealFft<scalar_t<O>>& plan, const X& dspectrum, O&& dx,
                   ExecutorRef executor = {}, Workspace* workspace = nullptr) {
  detail::require_spectrum("dspectrum", plan, dspectrum.rows(), dspectrum.cols(), dx.cols());
  detail::complex_to_real<S>(plan.tables(), dspectrum, dx, S(1), S(0.5), executor, workspace);
}

/// Gradient of irfft: dspectrum from dx (at most n rows, those of the forward pass).
template <MatrixLike X, ComplexOutputMatrix O, RealScalar S = scalar_t<X>>
void irfft_backward(const RealFft<scalar_t<X>>& plan, const X& dx, O&& dspectrum,
                    ExecutorRef executor = {}, Workspace* workspace = nullptr) {
  detail::require_spectrum("dspectrum", plan, dspectrum.rows(), dspectrum.cols(), dx.cols());
  detail::require_inverse_rows("dx", dx.rows(), plan.size());
  const S scale = S(1) / static_cast<S>(plan.size());
  detail::real_to_complex<S>(plan.tables(), dx, dspectrum, scale, 2 * scale, executor, workspace);
}

namespace detail {

template <bool kInverse, RealScalar S>
void complex_fft(const AnyFft<S>& t, const ConstMatrixRef<std::complex<S>>& in,
                 MatrixRef<std::complex<S>> out, ExecutorRef executor, Workspace* workspace) {
  const Index n = t.size();
  const auto block = [&](Index first, Index lanes, S* z) {
    for (Index j = 0; j < n; ++j) {
      S* const row = z + (kInverse ? t.position(j) : j) * kFftRow<S>;
      for (Index r = 0; r < kFftLanes<S>; r += simd::kLanes<S>) {
        store_lanes(row + r, get_complex(in.data() + j * in.outerStride() + first, r, lanes));
      }
    }
    kInverse ? t.inverse(z) : t.forward(z);
    const S scale = kInverse ? S(1) / static_cast<S>(n) : S(1);
    for (Index j = 0; j < n; ++j) {
      const S* const row = z + (kInverse ? j : t.position(j)) * kFftRow<S>;
      for (Index r = 0; r < kFftLanes<S>; r += simd::kLanes<S>) {
        put_complex(out.data() + j * out.outerStride() + first, r, lanes,
                    scaled(load_lanes<S>(row + r), scale));
      }
    }
  };
  for_channel_blocks<S>(in.cols(), t.rows() * kFftRow<S>, executor, workspace, block);
}

}  // namespace detail

/// out_k = sum_j in_j exp(-2 pi i j k / n), n x H; out may be in.
template <ComplexMatrixLike X, ComplexOutputMatrix O>
  requires SameScalar<X, O>
void fft(const ComplexFft<real_t<scalar_t<X>>>& plan, const X& in, O&& out,
         ExecutorRef executor = {}, Workspace* workspace = nullptr) {
  detail::require(in.rows() == plan.size(), "in has ", in.rows(), " rows, expected ", plan.size(),
                  " (n)");
  detail::require_shape("out", out.rows(), out.cols(), in.rows(), in.cols(), "shape of in");
  detail::complex_fft<false, real_t<scalar_t<X>>>(plan.tables(), in, out, executor, workspace);
}

/// out_j = (1/n) sum_k in_k exp(+2 pi i j k / n), n x H; out may be in.
template <ComplexMatrixLike X, ComplexOutputMatrix O>
  requires SameScalar<X, O>
void ifft(const ComplexFft<real_t<scalar_t<X>>>& plan, const X& in, O&& out,
          ExecutorRef executor = {}, Workspace* workspace = nullptr) {
  detail::require(in.rows() == plan.size(), "in has ", in.rows(), " rows, expected ", plan.size(),
                  " (n)");
  detail::require_shape("out", out.rows(), out.cols(), in.rows(), in.cols(), "shape of in");
  detail::complex_fft<true, real_t<scalar_t<X>>>(plan.tables(), in, out, executor, workspace);
}

/// rfft of length n, returned; n = 0: as many as x has rows.
template <MatrixLike X>
  requires RealScalar<scalar_t<X>> Matrix<std::complex<scalar_t<X>>> rfft(const X& x, Index n = 0) {
    const RealFft<scalar_t<X>> plan(n == 0 ? x.rows() : n);
    Matrix<std::complex<scalar_t<X>>> spectrum(plan.spectrum_rows(), x.cols());
    rfft(plan, x, spectrum);
    return spectrum;
  }

/// irfft of length n, returned.
template <ComplexMatrixLike X>
Matrix<real_t<scalar_t<X>>> irfft(const X& spectrum, Index n) {
  const RealFft<real_t<scalar_t<X>>> plan(n);
  Matrix<real_t<scalar_t<X>>> x(n, spectrum.cols());
  irfft(plan, spectrum, x);
  return x;
}

EIGENBLOCKS_NAMESPACE_END
