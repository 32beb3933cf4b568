// RTF, a state space model by its rational transfer function: the kernel costs O(L log L) whatever the number of states.
//
//   K(z) = h0 + num(z) / den(z),   den = 1 + a_1 z + .. + a_N z^N,   K evaluated at the n-th roots of unity, n = L + L % 2
//
//   form          num                       b is                                     kernel k_l
//   proper        b_1 + .. + b_N z^(N-1)    corrected: C = (I - (Abar^n)^T)^-1 b     C Abar^l B + h0 [l = 0]     (default)
//   proper_true   the same of               C itself                                 the same
//                 (I - (Abar^n)^T) b
//   delayed       b_1 z + .. + b_N z^N      corrected                                h0 at l = 0, else C Abar^(l-1) B
//
// Abar is the companion matrix of den (first row -a, ones below the diagonal), B = e_0: x <- (u - a.x, x_0, .., x_{N-2}).
//
//   RationalParameters<float> p{.a = .., .b = .., .h0 = ..};     // H x N, H x N, H;  a = 0: a window of the last N inputs
//   const Matrix<float> k = rational_kernel(p, 1024);            // 1024 x H
//   rational_kernel_backward(p, dk, dp);
//   rational_forward(saved, p, u, y);  rational_backward(saved, p, u, dy, du, dp);      // the layer: y = k * u
//   auto state = rational_state(p, 1024);                        // for decoding: C of that length, a regular value
//   rational_step(state, rows, out);                             // any number of rows, O(N H) each, no allocation
//   ss_to_tf(A, B, C) -> a, b of sum_l C A^l B z^l
//
// With the official code `delayed` aliases z^n to index 0: k_0 = h0 + C Abar^(n-1) B, which its recurrence does not have
// (rational_step has not either).  Kept, as trained models have it; the other forms equal their recurrence.  The official code
// pads odd L to L + 1 but corrects with Abar^L; here n is one and the same.  `proper_true` costs O(L N) more.
// C comes from the kernel's first N values, C(z) = den(z) k(z) mod z^N, which needs no solve.
//
// Stable where the roots of den lie outside the unit circle; sum |a| < 1 suffices (kexue.fm 10180).
// Bitwise equal for every executor.  Errors, nothing written: invalid_argument for shapes, N >= n, anything not finite,
// length < 1; std::domain_error where den vanishes at a node (to rounding).
//
// Source: arXiv 2405.06147; ruke1ire/RTF; kexue.fm 10180.
#pragma once

#include <eigenblocks/core/convolution.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/fft.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/ssm/kernel_layer.hpp>

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Parameters of H independent channels, or the gradients of a loss with respect to them.
template <RealScalar S>
struct RationalParameters {
  Matrix<S> a;   ///< H x N: a_1 .. a_N
  Matrix<S> b;   ///< H x N: b_1 .. b_N
  Vector<S> h0;  ///< H

  Index channels() const { return a.rows(); }
  Index states() const { return a.cols(); }
};

enum class RationalForm { proper, proper_true, delayed };

struct RationalOptions {
  RationalForm form = RationalForm::proper;
};

namespace detail {

template <RealScalar S>
void require_rational(const RationalParameters<S>& p, Index length,
                      const RationalOptions& options) {
  require(options.form >= RationalForm::proper && options.form <= RationalForm::delayed, "form (",
          options.form, ") must be proper, proper_true or delayed");
  require(p.channels() >= 1 && p.states() >= 1, "a is ", p.channels(), " x ", p.states(),
          ", expected at least 1 x 1 (channels x states)");
  require_shape("b", p.b.rows(), p.b.cols(), p.channels(), p.states(), "shape of a");
  require_size("h0", p.h0.size(), p.channels(), "channels");
  require(p.a.allFinite(), "a must be finite");
  require(p.b.allFinite(), "b must be finite");
  require(p.h0.allFinite(), "h0 must be finite");
  require_length(length);
  require(p.states() < length + length % 2, "states (", p.states(),
          ") must be below the transform's length (", length + length % 2, ")");
}

/// Everything about a kernel in the frequency domain.  Channels are columns.
template <RealScalar S>
class RationalSpectrum {
 public:
  using Complex = std::complex<S>;

  RationalSpectrum(const RationalParameters<S>& p, Index length, RationalForm form,
                   ExecutorRef executor)
      : states_(p.states()),
        delay_(form == RationalForm::delayed ? 1 : 0),
        plan_(length + length % 2),
        a_(p.a.transpose()),
        den_(plan_.spectrum_rows(), p.channels()),
        num_(plan_.spectrum_rows(), p.channels()) {
    Matrix<S> coefficients(states_ + 1, p.channels());
    coefficients.row(0).setOnes();
    coefficients.bottomRows(states_) = a_;
    rfft(plan_, coefficients, den_, executor);
    require_no_zero();
    Matrix<S> b = Matrix<S>::Zero(states_ + delay_, p.channels());
    b.bottomRows(states_) = p.b.transpose();
    if (form == RationalForm::proper_true) {
      Matrix<S> rest = b;
      leading_.resize(plan_.size(), p.channels());
      for (Index i = 0; i < plan_.size(); ++i) {
        leading_.row(i) = rest.row(0);
        companion_transposed(rest);
      }
      b -= rest;
    }
    rfft(plan_, b, num_, executor);
  }

  /// num / den in the place of num.
  Matrix<Complex>& quotient() {
    for (Index i = 0; i < num_.size(); ++i) num_.data()[i] /= den_.data()[i];
    return num_;
  }
  const RealFft<S>& plan() const { return plan_; }

  /// Gradients of a and b from those of the kernel.
  void backward(const ConstMatrixRef<S>& dkernel, RationalParameters<S>& dp, ExecutorRef executor) {
    const Matrix<Complex>& ratio = quotient();
    Matrix<Complex> dnum(den_.rows(), den_.cols());
    irfft_backward(plan_, dkernel, dnum, executor);
    Matrix<Complex> dden(den_.rows(), den_.cols());
    for (Index i = 0; i < den_.size(); ++i) {
      dnum.data()[i] /= std::conj(den_.data()[i]);
      dden.data()[i] = -dnum.data()[i] * std::conj(ratio.data()[i]);
    }
    Matrix<S> da(states_ + 1, den_.cols()), db(states_ + delay_, den_.cols());
    rfft_backward(plan_, dden, da, executor);
    rfft_backward(plan_, dnum, db, executor);
    if (leading_.size() != 0) {
      Matrix<S> g = -db;  // of what the companion matrix left
      for (Index i = plan_.size() - 1; i >= 0; --i) companion_backward(i, g, da);
      db += g;
    }
    dp.a = da.bottomRows(states_).transpose();
    dp.b = db.bottomRows(states_).transpose();
  }

 private:
  /// den is a sum of 1 and the a_j: values within its rounding are 0.
  void require_no_zero() const {
    for (Index h = 0; h < den_.cols(); ++h) {
      const S limit =
          S(8) * std::numeric_limits<S>::epsilon() * (S(1) + a_.col(h).cwiseAbs().sum());
      for (Index k = 0; k < den_.rows(); ++k) {
        if (!(std::abs(den_(k, h)) > limit)) {
          raise<std::domain_error>("rational_kernel: the denominator of channel ", h,
                                   " vanishes at node ", k, " of ", plan_.size());
        }
      }
    }
  }
  /// r <- Abar^T r
  void companion_transposed(Matrix<S>& r) const {
    const RowVector<S> first = r.row(0);
    for (Index j = 0; j < states_; ++j) {
      if (j + 1 < states_) {
        r.row(j) = r.row(j + 1) - first.cwiseProduct(a_.row(j));
      } else {
        r.row(j) = -first.cwiseProduct(a_.row(j));
      }
    }
  }
  /// Adjoint of step i.
  void companion_backward(Index i, Matrix<S>& g, Matrix<S>& da) const {
    RowVector<S> first = RowVector<S>::Zero(g.cols());
    for (Index j = states_ - 1; j >= 0; --j) {
      da.row(j + 1) -= leading_.row(i).cwiseProduct(g.row(j));
      first -= a_.row(j).cwiseProduct(g.row(j));
      if (j + 1 < states_) g.row(j + 1) = g.row(j);
    }
    g.row(0) = first;
  }

  Index states_, delay_;
  RealFft<S> plan_;
  Matrix<S> a_;  // N x H
  Matrix<Complex> den_, num_;
  Matrix<S> leading_;  // first entries of the powers of proper_true, n x H
};

}  // namespace detail

/// k, L x H; L is the number of rows of `kernel`.
template <RealScalar S, OutputMatrix O>
  requires std::same_as<scalar_t<O>, S>
void rational_kernel_forward(const RationalParameters<S>& p, O&& kernel,
                             const RationalOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_rational(p, kernel.rows(), options);
  detail::require_shape("kernel", kernel.rows(), kernel.cols(), kernel.rows(), p.channels(),
                        "length x channels");
  detail::RationalSpectrum<S> spectrum(p, kernel.rows(), options.form, executor);
  irfft(spectrum.plan(), spectrum.quotient(), kernel, executor);
  kernel.row(0) += p.h0.transpose();
}

/// The same, returned.
template <RealScalar S>
Matrix<S> rational_kernel(const RationalParameters<S>& p, Index length,
                          const RationalOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_rational(p, length, options);
  Matrix<S> kernel(length, p.channels());
  rational_kernel_forward(p, kernel, options, executor);
  return kernel;
}

/// Gradients of <dkernel, k>; resizes and overwrites `dp`.
template <RealScalar S, MatrixLike DK>
  requires std::same_as<scalar_t<DK>, S>
void rational_kernel_backward(const RationalParameters<S>& p, const DK& dkernel,
                              RationalParameters<S>& dp, const RationalOptions& options = {},
                              ExecutorRef executor = {}) {
  detail::require_rational(p, dkernel.rows(), options);
  detail::require_shape("dkernel", dkernel.rows(), dkernel.cols(), dkernel.rows(), p.channels(),
                        "length x channels");
  detail::RationalSpectrum<S> spectrum(p, dkernel.rows(), options.form, executor);
  spectrum.backward(dkernel, dp, executor);
  dp.h0 = dkernel.row(0).transpose();
}

/// C of the recurrence, H x N, for parameters of a kernel of this length: C(z) = den(z) k(z) mod z^N.
template <RealScalar S>
Matrix<S> rational_output(const RationalParameters<S>& p, Index length,
                          const RationalOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_rational(p, length, options);
  if (options.form == RationalForm::proper_true) return p.b;
  // The correction of `delayed` is that of `proper`.
  detail::RationalSpectrum<S> spectrum(p, length, RationalForm::proper, executor);
  Matrix<S> k(p.states(), p.channels());
  irfft(spectrum.plan(), spectrum.quotient(), k, executor);
  Matrix<S> c = k.transpose();
  for (Index j = 1; j < p.states(); ++j) {
    for (Index i = 1; i <= j; ++i)
      c.col(j) += p.a.col(i - 1).cwiseProduct(k.row(j - i).transpose());
  }
  return c;
}

// ---- Decoding -------------------------------------------------------------------------------------

/// All that decoding needs: a regular value, a copy is a snapshot.
template <RealScalar S>
struct RationalState {
  Matrix<S> a, c;   ///< N x H
  RowVector<S> h0;  ///< H
  bool delayed = false;
  Matrix<S>
      history;  ///< N x H, the companion state; its first entry is row `head`, the next ones follow around
  Index head = 0;

  Index channels() const { return a.cols(); }
  Index states() const { return a.rows(); }
  /// The companion state x, H x N.
  Matrix<S> value() const {
    Matrix<S> x(channels(), states());
    for (Index j = 0; j < states(); ++j) x.col(j) = history.row((head + j) % states()).transpose();
    return x;
  }
};

/// The state before the first input; `length` is that of the kernel the parameters were trained with.  `initial` is x, H x N.
template <RealScalar S>
RationalState<S> rational_state(const RationalParameters<S>& p, Index length,
                                const RationalOptions& options = {},
                                const Matrix<S>* initial = nullptr) {
  detail::require_rational(p, length, options);
  if (initial != nullptr) {
    detail::require_shape("initial", initial->rows(), initial->cols(), p.channels(), p.states(),
                          "shape of a");
  }
  RationalState<S> state{.a = p.a.transpose(),
                         .c = rational_output(p, length, options).transpose(),
                         .h0 = p.h0.transpose(),
                         .delayed = options.form == RationalForm::delayed,
                         .history = Matrix<S>::Zero(p.states(), p.channels())};
  if (initial != nullptr) state.history = initial->transpose();
  return state;
}

namespace detail {

/// One input of the channels of a packet: w = u - a.x enters the history, y = h0 u + C x after (or before) it.
template <class P, RealScalar S>
EIGENBLOCKS_ALWAYS_INLINE void rational_step_lanes(RationalState<S>& s, Index h, const S* u, S* y) {
  const Index n = s.states(), stride = s.channels();
  const P input = simd::load<P>(u);
  P w = input, sum = simd::mul(simd::load<P>(s.h0.data() + h), input);
  const S* a = s.a.data() + h;
  const S* c =
      s.c.data() + h + (s.delayed ? 0 : stride);  // x_j is multiplied by C_{j+1} of the new state
  const Index read = s.delayed ? n : n - 1;
  Index slot = s.head;
  for (Index j = 0; j < n; ++j) {
    const P x = simd::load<P>(s.history.data() + slot * stride + h);
    w = simd::sub(w, simd::mul(simd::load<P>(a + j * stride), x));
    if (j < read) sum = simd::fma(simd::load<P>(c + j * stride), x, sum);
    slot = slot + 1 == n ? 0 : slot + 1;
  }
  if (!s.delayed) sum = simd::fma(simd::load<P>(s.c.data() + h), w, sum);
  const Index oldest = s.head == 0 ? n - 1 : s.head - 1;
  simd::store<P>(s.history.data() + oldest * stride + h, w);
  simd::store<P>(y, sum);
}

}  // namespace detail

/// The rows that follow what the state has seen.
template <MatrixLike U, OutputMatrix O>
  requires SameScalar<U, O> && RealScalar<scalar_t<U>>
void rational_step(RationalState<scalar_t<U>>& state, const U& rows, O&& out) {
  using S = scalar_t<U>;
  constexpr Index w = simd::kLanes<S>;
  const Index channels = state.channels();
  detail::require_layer("rows", rows, "out", out, channels);
  for (Index t = 0; t < rows.rows(); ++t) {
    const S* const u = rows.data() + t * rows.outerStride();
    S* const y = out.data() + t * out.outerStride();
    Index h = 0;
    for (; h + w <= channels; h += w)
      detail::rational_step_lanes<simd::Packet<S>>(state, h, u + h, y + h);
    for (; h < channels; ++h) detail::rational_step_lanes<S>(state, h, u + h, y + h);
    state.head = state.head == 0 ? state.states() - 1 : state.head - 1;
  }
}

// ---- The layer -------------------------------------------------------------------------------------

/// y = k * u for u T x H, k the kernel of length T (the parameters are those of that length).
template <RealScalar S, MatrixLike U, OutputMatrix O>
  requires SameScalar<U, O> && std::same_as<scalar_t<U>, S>
void rational_forward(KernelLayerSaved<S>& saved, const RationalParameters<S>& p, const U& u, O&& y,
                      const RationalOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_layer("u", u, "y", y, p.channels());
  detail::require_rational(p, std::max(u.rows(), p.states() + 1), options);
  if (u.rows() > 0) saved.kernel = rational_kernel(p, u.rows(), options, executor);
  if (u.rows() == 0) saved.kernel.resize(0, u.cols());
  causal_conv_forward(saved.conv, u, saved.kernel, y, Vector<S>(), {}, executor);
}

/// Gradients of <dy, y> after rational_forward with the same arguments; overwrites du and dp.
template <RealScalar S, MatrixLike U, MatrixLike DY, OutputMatrix DU>
  requires SameScalar<U, DY, DU> && std::same_as<scalar_t<U>, S>
void rational_backward(KernelLayerSaved<S>& saved, const RationalParameters<S>& p, const U& u,
                       const DY& dy, DU&& du, RationalParameters<S>& dp,
                       const RationalOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_layer("u", u, "dy", dy, p.channels());
  detail::require_layer("u", u, "du", du, p.channels());
  detail::require_saved(saved, u);
  detail::require_rational(p, std::max(u.rows(), p.states() + 1), options);
  if (u.rows() == 0) {
    dp.a.setZero(p.channels(), p.states());
    dp.b.setZero(p.channels(), p.states());
    dp.h0.setZero(p.channels());
    return;
  }
  Matrix<S> dkernel(u.rows(), p.channels());
  Vector<S> none;
  causal_conv_backward(saved.conv, u, saved.kernel, dy, du, dkernel, none, Vector<S>(), executor);
  rational_kernel_backward(p, dkernel, dp, options, executor);
}

// ---- From a state space ---------------------------------------------------------------------------

/// a and b with sum_l C A^l B z^l = (b_1 + .. + b_N z^(N-1)) / (1 + a_1 z + .. + a_N z^N).
struct TransferFunction {
  Vector<double> a, b;  ///< N
};

/// The transfer function of a dense system: a = coefficients of det(x I - A) by reduction to Hessenberg form, b from
/// den times the impulse response.  O(N^3).  Coefficients of large N are ill-conditioned: for N up to about 20.
inline TransferFunction ss_to_tf(const ConstMatrixRef<double>& a, const ConstVectorRef<double>& b,
                                 const ConstVectorRef<double>& c) {
  const Index n = a.rows();
  detail::require(n >= 1 && a.cols() == n, "a is ", n, " x ", a.cols(),
                  ", expected square, at least 1 x 1");
  detail::require_size("b", b.size(), n, "states of a");
  detail::require_size("c", c.size(), n, "states of a");
  // Similar to upper Hessenberg by elimination with pivots.
  Matrix<double> h = a;
  for (Index m = 1; m + 1 < n; ++m) {
    Index pivot = m;
    for (Index i = m + 1; i < n; ++i) {
      if (std::abs(h(i, m - 1)) > std::abs(h(pivot, m - 1))) pivot = i;
    }
    if (h(pivot, m - 1) == 0) continue;
    if (pivot != m) {
      h.row(pivot).swap(h.row(m));
      h.col(pivot).swap(h.col(m));
    }
    for (Index i = m + 1; i < n; ++i) {
      const double factor = h(i, m - 1) / h(m, m - 1);
      h.row(i) -= factor * h.row(m);
      h.col(m) += factor * h.col(i);
    }
  }
  // Characteristic polynomials of the leading blocks: p_k = (x - h_kk) p_{k-1} - sum_i h_ik (product of subdiagonals) p_{i-1}.
  Matrix<double> p = Matrix<double>::Zero(n + 1, n + 1);  // row k: coefficients of x^0 .. x^k
  p(0, 0) = 1;
  for (Index k = 1; k <= n; ++k) {
    for (Index j = 0; j < k; ++j) p(k, j + 1) = p(k - 1, j);
    double below = 1;
    for (Index i = k; i >= 1; --i) {
      p.row(k) -= h(i - 1, k - 1) * below * p.row(i - 1);
      if (i > 1) below *= h(i - 1, i - 2);
    }
  }
  TransferFunction out{.a = Vector<double>(n), .b = Vector<double>(n)};
  for (Index j = 0; j < n; ++j) out.a[j] = p(n, n - 1 - j);
  Vector<double> x = b, impulse(n);
  for (Index l = 0; l < n; ++l) {
    impulse[l] = c.dot(x);
    out.b[l] = impulse[l];
    for (Index i = 1; i <= l; ++i) out.b[l] += out.a[i - 1] * impulse[l - i];
    x = a.lazyProduct(x).eval();
  }
  return out;
}

EIGENBLOCKS_NAMESPACE_END
