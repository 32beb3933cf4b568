// Normal plus low rank: a HiPPO matrix in the basis of its normal part (S4, arXiv 2111.00396; kexue.fm 10162).
//
//   A = V (diag(lambda) - sum_r p_r p_r^*) V^*,   p_r = V^* P_r^T,   b = V^* B,   V unitary
// with A + P^T P = shift I + S, S real and skew, so that -i S is Hermitian; A - shift I + P^T P has eigenvalues in pairs +-i w.
//
//   const Nplr legs = nplr(HippoMeasure::legs, 64);      // lambda 32, p 1 x 32, b 32, v 64 x 32
//   const Nplr legt = nplr(HippoMeasure::legt, 64);      // p 2 x 32
//   const Nplr flat = nplr(HippoMeasure::legs, 64, 2);   // rank 2: a row of zeros behind p
//
// Half storage: of every pair the member with negative imaginary part is kept, N/2 in all, the most negative first (as s4).
// The other half are the conjugates, so sums over all modes are 2 Re of sums over these.  Row r of the member p holds p_r.
// An output row C goes over to C V.
//
// Eigenvectors have no phase of their own.  Canonical here: b is real and positive, which for legs makes p positive too
// (b = sqrt 2 p).  The zero frequency of the Fourier family, a pair of real null vectors q0, q1, is kept as (q0 + i q1)/sqrt 2:
// (e_0 + i e_1)/sqrt 2.  s4's clamp of Im b (B_clip) depends on the phase and has no place here.
//
// In double, O(N^3) once: S is brought to skew tridiagonal form by reflections, which a diagonal of powers of i makes symmetric,
// and that goes to the QL iteration; all in real arithmetic (Eigen's complex solver costs ten seconds of compile time).  Re lambda is the shift exactly (-1/2 for legs).
// Errors (invalid_argument): an odd or non-positive number of states, lmu and glagt (no such form), rank below the measure's.
#pragma once

#include <eigenblocks/core/product.hpp>
#include <eigenblocks/ssm/hippo.hpp>

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <numeric>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

struct Nplr {
  Vector<std::complex<double>> lambda;  ///< N/2, Im <= 0, ascending
  Matrix<std::complex<double>> p;       ///< R x N/2
  Vector<std::complex<double>> b;       ///< N/2, real and positive
  Matrix<std::complex<double>> v;       ///< N x N/2, orthonormal columns
};

namespace detail {

/// s = q t q^T with t skew and tridiagonal, t(k + 1, k) = off[k]; s is used up.
inline void skew_tridiagonal(Matrix<double>& s, Matrix<double>& q, Vector<double>& off) {
  const Index n = s.rows();
  q = Matrix<double>::Identity(n, n);
  off = Vector<double>::Zero(n);
  Vector<double> v(n), w(n);
  for (Index k = 0; k + 1 < n; ++k) {
    const Index m = n - k - 1;
    auto x = v.head(m);
    x = s.col(k).tail(m);
    const double size = x.norm();
    const double alpha = x[0] > 0 ? -size : size;
    off[k] = alpha;
    x[0] -= alpha;
    const double square = x.squaredNorm();
    if (square == 0) continue;
    const double beta = 2 / square;
    // (1 - beta v v^T) s (1 - beta v v^T) = s + v w^T - w v^T, w = beta s v, because v^T s v = 0.
    for (Index i = 0; i < m; ++i) w[i] = beta * s.row(k + 1 + i).tail(m).dot(x);
    for (Index i = 0; i < m; ++i)
      s.row(k + 1 + i).tail(m) += x[i] * w.head(m).transpose() - w[i] * x.transpose();
    for (Index i = 0; i < n; ++i) {
      const double projection = beta * q.row(i).tail(m).dot(x);
      q.row(i).tail(m) -= projection * x.transpose();
    }
  }
}

/// Eigenvalues into d (diagonal on entry) and eigenvectors into the rows of z (the identity on entry) of the symmetric
/// tridiagonal matrix with off-diagonal e: implicit QL with Wilkinson's shift.
inline void tridiagonal_eigen(Vector<double>& d, Vector<double>& e, Matrix<double>& z) {
  const Index n = d.size();
  constexpr double eps = std::numeric_limits<double>::epsilon();
  const double least = eps * eps * e.cwiseAbs().maxCoeff();
  for (Index l = 0; l < n; ++l) {
    for (int round = 0; round < 100; ++round) {
      Index m = l;
      while (m + 1 < n &&
             std::abs(e[m]) > std::max(least, 0.5 * eps * (std::abs(d[m]) + std::abs(d[m + 1]))))
        ++m;
      if (m == l) break;
      double g = (d[l + 1] - d[l]) / (2 * e[l]), r = std::hypot(g, 1.0);
      g = d[m] - d[l] + e[l] / (g + std::copysign(r, g));
      double s = 1, c = 1, p = 0;
      Index i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        r = std::hypot(f, g);
        e[i + 1] = r;
        if (r == 0) {
          d[i + 1] -= p;
          e[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        r = (d[i] - g) * s + 2 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
        double *low = &z(i, 0), *high = &z(i + 1, 0);
        for (Index k = 0; k < n; ++k) {
          const double x = high[k];
          high[k] = s * low[k] + c * x;
          low[k] = c * low[k] - s * x;
        }
      }
      if (r == 0 && i >= l) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0;
    }
  }
}

/// The eigenvalues w of -i s in ascending order and its eigenvectors as columns of v, for a real skew s (used up).
inline void skew_eigen(Matrix<double>& s, Vector<double>& w, Matrix<std::complex<double>>& v) {
  const Index n = s.rows();
  Matrix<double> q, z = Matrix<double>::Identity(n, n);
  Vector<double> off, d = Vector<double>::Zero(n);
  skew_tridiagonal(s, q, off);
  // With D = diag((-i)^k), D^* (-i t) D is symmetric with the same off-diagonal.  v = q D z^T: even k are its real part.
  tridiagonal_eigen(d, off, z);
  std::vector<Index> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), Index{0});
  std::sort(order.begin(), order.end(), [&](Index a, Index b) { return d[a] < d[b]; });
  Matrix<double> part = Matrix<double>::Zero(n, n), product(n, n);
  w.resize(n);
  v.resize(n, n);
  for (int parity = 0; parity < 2; ++parity) {
    part.setZero();
    for (Index k = parity; k < n; k += 2)
      part.col(k) = ((k + 1) / 2 % 2 == 0 ? 1.0 : -1.0) * q.col(k);
    product_nt<double>(part, z, product);
    for (Index j = 0; j < n; ++j) {
      const Index from = order[static_cast<std::size_t>(j)];
      w[j] = d[from];
      for (Index i = 0; i < n; ++i) {
        if (parity == 0) {
          v(i, j) = product(i, from);
        } else {
          v(i, j) += std::complex<double>(0, product(i, from));
        }
      }
    }
  }
}

/// Makes the pair of modes that spans a two-dimensional null space of the real S unique: v = (q0 + i q1)/sqrt 2, q0 the
/// projection of the first unit vector that is not orthogonal to the space.
inline void canonical_null_mode(const Matrix<std::complex<double>>& both,
                                Eigen::Ref<Vector<std::complex<double>>> v) {
  const Matrix<double> projector = (both * both.adjoint()).real();
  Index first = 0;
  while (first + 1 < projector.rows() && projector(first, first) < 0.25) ++first;
  const Vector<double> q0 = projector.col(first).normalized();
  const Matrix<double> rest = projector - q0 * q0.transpose();
  Index second = 0;
  rest.diagonal().maxCoeff(&second);
  const Vector<double> q1 = rest.col(second).normalized();
  for (Index i = 0; i < v.size(); ++i) {
    v[i] = std::complex<double>(q0[i], q1[i]) * std::sqrt(0.5);
  }
}

}  // namespace detail

/// The NPLR form of hippo_matrix(measure, states, options); `rank` 0 takes the measure's own.
inline Nplr nplr(HippoMeasure measure, Index states, Index rank = 0,
                 const HippoOptions& options = {}) {
  using Complex = std::complex<double>;
  const std::string_view name = hippo_name(measure);
  detail::require(states >= 2 && states % 2 == 0 && states <= detail::kMaxHippoStates, "states (",
                  states, ") must be even and in [2, ", detail::kMaxHippoStates, "]");
  detail::require(measure != HippoMeasure::lmu && measure != HippoMeasure::glagt, "measure ", name,
                  " has no normal plus low-rank form in its own basis");
  const Index own = measure == HippoMeasure::legt ? 2 : 1;
  detail::require(rank == 0 || (rank >= own && rank <= states), "rank (", rank,
                  ") must be 0 or in [", own, ", ", states, "] for measure ", name);
  if (rank == 0) rank = own;
  const Hippo hippo = hippo_matrix(measure, states, options);

  // S from one triangle: exactly skew.
  Matrix<double> skew(states, states);
  for (Index i = 0; i < states; ++i) {
    skew(i, i) = 0;
    for (Index k = 0; k < i; ++k) {
      skew(i, k) = hippo.a(i, k) + hippo.p.col(i).dot(hippo.p.col(k));
      skew(k, i) = -skew(i, k);
    }
  }
  Vector<double> w;
  Matrix<Complex> modes;
  detail::skew_eigen(skew, w, modes);
  const Index half = states / 2;
  Nplr out{.lambda = Vector<Complex>(half),
           .p = Matrix<Complex>::Zero(rank, half),
           .b = Vector<Complex>(half),
           .v = modes.leftCols(half)};
  for (Index j = 0; j < half; ++j) out.lambda[j] = Complex(hippo.shift, std::min(w[j], 0.0));
  if (hippo_is_fourier(measure)) {
    out.lambda[half - 1] = Complex(hippo.shift, 0);
    Vector<Complex> mode(states);
    detail::canonical_null_mode(modes.middleCols(half - 1, 2), mode);
    out.v.col(half - 1) = mode;
  }
  for (Index j = 0; j < half; ++j) {
    const auto project = [&](const auto& real) {
      Complex sum = 0;
      for (Index i = 0; i < states; ++i) sum += std::conj(out.v(i, j)) * real[i];
      return sum;
    };
    const Complex b = project(hippo.b);
    const double size = std::abs(b);
    if (size > 0) out.v.col(j) *= b / size;
    out.b[j] = size;
    for (Index r = 0; r < hippo.p.rows(); ++r) out.p(r, j) = project(hippo.p.row(r));
    // The correction of legs is B/sqrt 2, so p is real as well; its imaginary part would be rounding.
    if (measure == HippoMeasure::legs) out.p(0, j) = out.p(0, j).real();
  }
  return out;
}

EIGENBLOCKS_NAMESPACE_END
