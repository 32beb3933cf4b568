// S4's diagonal plus low-rank system in discrete time: bilinear transform, one step in O(N R), powers.
//
//   x' = A x + B u,  A = diag(lambda) - sum_r p_r p_r^*       over the full 2n modes: n and their conjugates
//   x_t = Abar x_{t-1} + Bbar u_t,  Abar = (2/dt - A)^-1 (2/dt + A),  Bbar = 2 (2/dt - A)^-1 B
//
// Over half the modes Abar is a diagonal minus rank R with real scalars between, because p^* x over all modes is real:
//
//   x <- e x - sum_r f_r z_r + bbar u,   z_r = 2 Re sum_n zeta_rn x_n
//   Dm = 1/(2/dt - lambda),  e = Dm (2/dt + lambda),  f_r = Dm p_r,  G_rs = 2 Re sum conj(p_r) Dm p_s,
//   zeta_r = 4/dt sum_s (I + G)^-1_rs conj(p_s) Dm,  bbar = 2 Dm b - f (I + G)^-1 [2 Re sum conj(p) 2 Dm b]
//
// I + G is real, R x R and its symmetric part is at least I when Re lambda <= 0: it can always be solved.
// As a real matrix on (Re x, Im x), 2n x 2n, Abar has powers by squaring: what the truncation of the kernel needs,
//   C~ = C (I - Abar^L)   (s4_truncate)      and back      C = C~ (I - Abar^L)^-1   (s4_untruncate, which reports rcond)
//
// Parameters of H channels: lambda, b, c H x n;  p (R*H) x n, row r*H + h (memory of [R, H, n]);  dt, skip H.  All in double
// inside.  The public functions are in s4_kernel.hpp and s4.hpp; here is one channel with its adjoints (tested there).
//
// Source: arXiv 2111.00396; state-spaces/s4 (models/s4/s4.py); kexue.fm 10162.
#pragma once

#include <eigenblocks/core/product.hpp>
#include <eigenblocks/ssm/s4d_kernel.hpp>

#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Parameters of H independent channels, or the gradients of a loss with respect to them.
template <RealScalar S>
struct S4Parameters {
  Matrix<std::complex<S>> lambda;  ///< H x n, Re <= 0
  Matrix<std::complex<S>> p;       ///< (R*H) x n: row r*H + h is p_r of channel h
  Matrix<std::complex<S>> b, c;    ///< H x n
  Vector<S> dt;                    ///< H, > 0
  Vector<S> skip{};                ///< H, or empty for none

  Index channels() const { return lambda.rows(); }
  Index modes() const { return lambda.cols(); }
  Index rank() const { return lambda.rows() == 0 ? 0 : p.rows() / lambda.rows(); }
};

namespace detail {

template <RealScalar S>
void require_s4(const S4Parameters<S>& p) {
  require_modes(p.lambda, p.b, p.c, p.dt, p.skip);
  require(p.p.rows() % p.channels() == 0 && (p.p.rows() == 0 || p.p.cols() == p.modes()), "p is ",
          p.p.rows(), " x ", p.p.cols(), ", expected rank * ", p.channels(), " x ", p.modes(),
          " (rank * channels, modes)");
  require(all_finite(p.p), "p must be finite");
}

template <RealScalar S>
void resize_like(S4Parameters<S>& out, const S4Parameters<S>& p) {
  out.lambda.setZero(p.channels(), p.modes());
  out.p.setZero(p.p.rows(), p.p.cols());
  out.b.setZero(p.channels(), p.modes());
  out.c.setZero(p.channels(), p.modes());
  out.dt.setZero(p.channels());
  out.skip.setZero(p.skip.size());
}

/// One channel's parameters in double, or their gradients.
struct S4Channel {
  using Complex = std::complex<double>;
  using Modes = Vector<Complex>;

  Modes lambda, b, c;
  Matrix<Complex> p;  // R x n
  double dt = 0;

  S4Channel() = default;
  template <RealScalar S>
  S4Channel(const S4Parameters<S>& from, Index h)
      : lambda(from.lambda.row(h).transpose().template cast<Complex>()),
        b(from.b.row(h).transpose().template cast<Complex>()),
        c(from.c.row(h).transpose().template cast<Complex>()),
        p(from.rank(), from.modes()),
        dt(static_cast<double>(from.dt[h])) {
    for (Index r = 0; r < p.rows(); ++r)
      p.row(r) = from.p.row(r * from.channels() + h).template cast<Complex>();
  }
  static S4Channel zero(Index modes, Index rank) {
    S4Channel g;
    g.lambda = g.b = g.c = Modes::Zero(modes);
    g.p = Matrix<Complex>::Zero(rank, modes);
    return g;
  }
  template <RealScalar S>
  void store(S4Parameters<S>& to, Index h) const {
    to.lambda.row(h) = lambda.transpose().template cast<std::complex<S>>();
    to.b.row(h) = b.transpose().template cast<std::complex<S>>();
    to.c.row(h) = c.transpose().template cast<std::complex<S>>();
    for (Index r = 0; r < p.rows(); ++r)
      to.p.row(r * to.lambda.rows() + h) = p.row(r).template cast<std::complex<S>>();
    to.dt[h] = static_cast<S>(dt);
  }
  Index modes() const { return lambda.size(); }
  Index rank() const { return p.rows(); }
};

/// Re <x, y> = Re sum conj(x) y.
template <class X, class Y>
double real_dot(const X& x, const Y& y) {
  double sum = 0;
  for (Index i = 0; i < x.size(); ++i) sum += x(i).real() * y(i).real() + x(i).imag() * y(i).imag();
  return sum;
}

/// Inverse of a small real matrix with pivots that need no search (symmetric part positive definite).
inline Matrix<double> small_inverse(Matrix<double> a) {
  const Index n = a.rows();
  Matrix<double> inverse = Matrix<double>::Identity(n, n);
  for (Index i = 0; i < n; ++i) {
    const double pivot = 1.0 / a(i, i);
    for (Index k = 0; k < n; ++k) {
      a(i, k) *= pivot;
      inverse(i, k) *= pivot;
    }
    for (Index j = 0; j < n; ++j) {
      if (j == i) continue;
      const double factor = a(j, i);
      for (Index k = 0; k < n; ++k) {
        a(j, k) -= factor * a(i, k);
        inverse(j, k) -= factor * inverse(i, k);
      }
    }
  }
  return inverse;
}

/// One channel in discrete time, in double; see the formulas at the top.  Also holds gradients with respect to its members.
struct S4Discrete {
  using Complex = std::complex<double>;
  Vector<Complex> e, bbar;  // n
  Matrix<Complex> f, zeta;  // R x n

  S4Discrete() = default;
  explicit S4Discrete(const S4Channel& s) {
    const Parts parts(s);
    e.resize(s.modes());
    bbar = parts.beta;
    f = parts.f;
    zeta.setZero(s.rank(), s.modes());
    z_.resize(s.rank());
    for (Index n = 0; n < s.modes(); ++n) e[n] = parts.dm[n] * (2.0 / s.dt + s.lambda[n]);
    for (Index r = 0; r < s.rank(); ++r) {
      bbar -= parts.m[r] * f.row(r).transpose();
      for (Index k = 0; k < s.rank(); ++k)
        zeta.row(r) += (4.0 / s.dt * parts.minv(r, k)) * parts.q.row(k);
    }
  }
  static S4Discrete zero(Index modes, Index rank) {
    S4Discrete g;
    g.e = g.bbar = Vector<Complex>::Zero(modes);
    g.f = g.zeta = Matrix<Complex>::Zero(rank, modes);
    return g;
  }

  /// x <- Abar x + Bbar u.
  void advance(Vector<Complex>& x, double u) {
    for (Index r = 0; r < f.rows(); ++r) z_[r] = functional(r, x);
    for (Index n = 0; n < x.size(); ++n) {
      Complex next = e[n] * x[n] + bbar[n] * u;
      for (Index r = 0; r < f.rows(); ++r) next -= f(r, n) * z_[r];
      x[n] = next;
    }
  }
  /// z_r = 2 Re sum zeta x.
  double functional(Index r, const Vector<Complex>& x) const {
    double z = 0;
    for (Index n = 0; n < x.size(); ++n)
      z += zeta(r, n).real() * x[n].real() - zeta(r, n).imag() * x[n].imag();
    return 2 * z;
  }
  /// Adjoint of one step: g is the gradient of Abar x + Bbar u on entry and of x on return; adds to `out`, returns that of u.
  double advance_backward(const Vector<Complex>& x, double u, Vector<Complex>& g, S4Discrete& out) {
    const double du = real_dot(bbar, g);
    for (Index n = 0; n < x.size(); ++n) {
      out.e[n] += std::conj(x[n]) * g[n];
      out.bbar[n] += u * g[n];
    }
    for (Index r = 0; r < f.rows(); ++r) {
      const double z = functional(r, x), dz = -real_dot(f.row(r), g);
      z_[r] = dz;
      for (Index n = 0; n < x.size(); ++n) {
        out.f(r, n) -= z * g[n];
        out.zeta(r, n) += 2 * dz * std::conj(x[n]);
      }
    }
    for (Index n = 0; n < x.size(); ++n) {
      Complex back = std::conj(e[n]) * g[n];
      for (Index r = 0; r < f.rows(); ++r) back += 2 * z_[r] * std::conj(zeta(r, n));
      g[n] = back;
    }
    return du;
  }

  /// Abar as a real matrix on (Re x, Im x).
  Matrix<double> dense() const {
    const Index n = e.size();
    Matrix<double> a = Matrix<double>::Zero(2 * n, 2 * n);
    for (Index i = 0; i < n; ++i) {
      a(i, i) = a(n + i, n + i) = e[i].real();
      a(n + i, i) = e[i].imag();
      a(i, n + i) = -e[i].imag();
    }
    for (Index r = 0; r < f.rows(); ++r) a -= stacked(f, r) * functional_row(zeta, r);
    return a;
  }
  /// Adds the gradients of e, f and zeta that the gradient `g` of dense() makes.
  void dense_backward(const Matrix<double>& g, S4Discrete& out) const {
    const Index n = e.size();
    for (Index i = 0; i < n; ++i)
      out.e[i] += Complex(g(i, i) + g(n + i, n + i), g(n + i, i) - g(i, n + i));
    for (Index r = 0; r < f.rows(); ++r) {
      const RowVector<double> row = functional_row(zeta, r);
      const Vector<double> column = stacked(f, r);
      for (Index i = 0; i < n; ++i) {
        out.f(r, i) -= Complex(g.row(i).dot(row), g.row(n + i).dot(row));
        double re = 0, im = 0;
        for (Index k = 0; k < 2 * n; ++k) {
          re += column[k] * g(k, i);
          im += column[k] * g(k, n + i);
        }
        out.zeta(r, i) += Complex(-2 * re, 2 * im);
      }
    }
  }

  /// Adds to `out` (except c) the gradients of lambda, p, b and dt, *this being the gradients of the members of S4Discrete(s).
  void backward(const S4Channel& s, S4Channel& out) const {
    const Parts parts(s);
    const Index modes = s.modes(), rank = s.rank();
    Vector<Complex> gbeta = bbar, gdm = Vector<Complex>::Zero(modes);
    Matrix<Complex> gf = f, gq = Matrix<Complex>::Zero(rank, modes);
    Matrix<double> gg = Matrix<double>::Zero(rank, rank), gminv = gg;
    double ddt = 0;
    // bbar = beta - sum f_r m_r,  m = (I + G)^-1 [2 Re sum conj(p) beta]
    Vector<double> gm(rank);
    for (Index r = 0; r < rank; ++r) {
      gm[r] = -real_dot(bbar, parts.f.row(r));
      gf.row(r) -= parts.m[r] * bbar.transpose();
    }
    for (Index r = 0; r < rank; ++r) {
      double back = 0;
      for (Index k = 0; k < rank; ++k) back += parts.minv(k, r) * gm[k];
      for (Index k = 0; k < rank; ++k) gg(r, k) -= back * parts.m[k];
      gbeta += 2 * back * s.p.row(r).transpose();
      out.p.row(r) += 2 * back * parts.beta.transpose();
    }
    // zeta_r = 4/dt sum_k (I + G)^-1_rk q_k
    const double scale = 4.0 / s.dt;
    for (Index r = 0; r < rank; ++r) {
      for (Index k = 0; k < rank; ++k) {
        gq.row(k) += scale * parts.minv(r, k) * zeta.row(r);
        gminv(r, k) = scale * real_dot(zeta.row(r), parts.q.row(k));
        ddt -= gminv(r, k) * parts.minv(r, k) / s.dt;
      }
    }
    gg -= parts.minv.transpose() * gminv.lazyProduct(parts.minv.transpose()).eval();
    // G_rk = 2 Re sum conj(p_r) f_k,  q_k = conj(p_k) Dm,  f_r = Dm p_r
    for (Index r = 0; r < rank; ++r) {
      for (Index k = 0; k < rank; ++k) {
        out.p.row(r) += 2 * gg(r, k) * parts.f.row(k);
        gf.row(k) += 2 * gg(r, k) * s.p.row(r);
      }
    }
    for (Index r = 0; r < rank; ++r) {
      for (Index n = 0; n < modes; ++n) {
        out.p(r, n) += std::conj(gq(r, n)) * parts.dm[n] + std::conj(parts.dm[n]) * gf(r, n);
        gdm[n] += s.p(r, n) * gq(r, n) + std::conj(s.p(r, n)) * gf(r, n);
      }
    }
    // beta = 2 Dm b,  e = Dm (2/dt + lambda),  Dm = 1 / (2/dt - lambda)
    for (Index n = 0; n < modes; ++n) {
      const Complex dm = parts.dm[n];
      out.b[n] += 2.0 * std::conj(dm) * gbeta[n];
      gdm[n] += 2.0 * std::conj(s.b[n]) * gbeta[n] + std::conj(2.0 / s.dt + s.lambda[n]) * e[n];
      const Complex through = std::conj(dm * dm) * gdm[n];
      out.lambda[n] += std::conj(dm) * e[n] + through;
      ddt += 2.0 / (s.dt * s.dt) * (through.real() - (std::conj(e[n]) * dm).real());
    }
    out.dt += ddt;
  }

 private:
  /// What the formulas share.
  struct Parts {
    Vector<Complex> dm, beta;
    Matrix<Complex> f, q;
    Matrix<double> minv;
    Vector<double> m;
    explicit Parts(const S4Channel& s)
        : dm(s.modes()), beta(s.modes()), f(s.p), q(s.p), m(s.rank()) {
      for (Index n = 0; n < s.modes(); ++n) {
        dm[n] = s.dt / (2.0 - s.dt * s.lambda[n]);
        beta[n] = 2.0 * dm[n] * s.b[n];
        for (Index r = 0; r < s.rank(); ++r) {
          f(r, n) = dm[n] * s.p(r, n);
          q(r, n) = dm[n] * std::conj(s.p(r, n));
        }
      }
      Matrix<double> g = Matrix<double>::Identity(s.rank(), s.rank());
      Vector<double> gb(s.rank());
      for (Index r = 0; r < s.rank(); ++r) {
        for (Index k = 0; k < s.rank(); ++k) g(r, k) += 2 * real_dot(s.p.row(r), f.row(k));
        gb[r] = 2 * real_dot(s.p.row(r), beta);
      }
      minv = small_inverse(std::move(g));
      m = minv.lazyProduct(gb);
    }
  };
  static Vector<double> stacked(const Matrix<Complex>& rows, Index r) {
    Vector<double> v(2 * rows.cols());
    v << rows.row(r).real().transpose(), rows.row(r).imag().transpose();
    return v;
  }
  static RowVector<double> functional_row(const Matrix<Complex>& rows, Index r) {
    RowVector<double> v(2 * rows.cols());
    v << 2 * rows.row(r).real(), -2 * rows.row(r).imag();
    return v;
  }

  Vector<double> z_;  // of a step
};

/// The real row that takes (Re x, Im x) to 2 Re sum c x, and back.
inline Matrix<double> output_row(const Vector<std::complex<double>>& c) {
  Matrix<double> row(1, 2 * c.size());
  row << 2 * c.real().transpose(), -2 * c.imag().transpose();
  return row;
}
inline Vector<std::complex<double>> output_modes(const Matrix<double>& row) {
  const Index n = row.cols() / 2;
  Vector<std::complex<double>> c(n);
  for (Index i = 0; i < n; ++i) c[i] = {0.5 * row(0, i), -0.5 * row(0, n + i)};
  return c;
}
/// Gradients through the two: dL/dRe + i dL/dIm of c from the gradient of output_row(c), and back.
inline Vector<std::complex<double>> output_row_backward(const Matrix<double>& g) {
  const Index n = g.cols() / 2;
  Vector<std::complex<double>> c(n);
  for (Index i = 0; i < n; ++i) c[i] = {2 * g(0, i), -2 * g(0, n + i)};
  return c;
}
inline Matrix<double> output_modes_backward(const Vector<std::complex<double>>& g) {
  Matrix<double> row(1, 2 * g.size());
  row << 0.5 * g.real().transpose(), -0.5 * g.imag().transpose();
  return row;
}

/// Squares of a matrix, a^(2^k), as far as a power L needs them; row times a^L and its gradients.
class PowerLadder {
 public:
  PowerLadder(Matrix<double> a, Index length) : length_(length) {
    powers_.push_back(std::move(a));
    for (Index rest = length >> 1; rest > 0; rest >>= 1)
      powers_.push_back(dense_product(powers_.back(), powers_.back()));
  }
  /// row a^L
  Matrix<double> apply(Matrix<double> row) const {
    for (std::size_t k = 0; k < powers_.size(); ++k) {
      if (bit(k)) row = dense_product(row, powers_[k]);
    }
    return row;
  }
  /// a^L
  Matrix<double> power() const {
    return apply(Matrix<double>::Identity(powers_[0].rows(), powers_[0].rows()));
  }
  /// Gradient of apply: `g` is that of the result, returned is that of the row, `da` gets that of a.
  Matrix<double> apply_backward(const Matrix<double>& row, Matrix<double> g,
                                Matrix<double>& da) const {
    std::vector<Matrix<double>> before{row};
    for (std::size_t k = 0; k + 1 < powers_.size(); ++k)
      before.push_back(bit(k) ? dense_product(before.back(), powers_[k]) : before.back());
    da.setZero(powers_[0].rows(), powers_[0].rows());
    for (std::size_t k = powers_.size(); k-- > 0;) {
      if (k + 1 < powers_.size()) {  // a^(2^(k+1)) = a^(2^k) a^(2^k)
        const Matrix<double> up = da;
        product_nt<double>(up, powers_[k], da);
        product_tn<double>(powers_[k], up, da, Write::add);
      }
      if (!bit(k)) continue;
      product_tn<double>(before[k], g, da, Write::add);
      Matrix<double> back(g.rows(), g.cols());
      product_nt<double>(g, powers_[k], back);
      g.swap(back);
    }
    return g;
  }

 private:
  bool bit(std::size_t k) const { return ((length_ >> k) & 1) != 0; }
  Index length_;
  std::vector<Matrix<double>> powers_;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
