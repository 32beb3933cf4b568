// The Cauchy sums of S4: one channel's truncated generating function at the roots of unity, and its gradients.
//
//   K^(z) = C~ (I - z Abar)^-1 Bbar at z = e^(-i theta), theta = 2 pi k / L, k = 0 .. L/2
//
// s4's own form, g = (2/dt)(1 - z)/(1 + z), is infinite at z = -1.  With 1 - z = 2i sin(theta/2) e^(-i theta/2) and
// 1 + z = 2 cos(theta/2) e^(-i theta/2), denominators cleared, everything is finite at every node and nearly real:
//
//   s = 2 sin(theta/2),  g = dt cos(theta/2),  M = i s - g A = diag(d) + g P P^*,  d_n = i s - g lambda_n
//   K^ = dt e^(i theta/2) C~ M^-1 B = dt e^(i theta/2) [k_CB - g k_CP (I + g k_PP)^-1 k_PB],  k_XY = sum over all modes X Y / d
//
// A mode with v = X Y and its conjugate have one real quadratic between them,
//   v/d + conj(v)/d' = 2 [-g Re(conj(v) lambda) + i s Re v] / q,   q = (g |lambda|)^2 - s^2 - 2i g s Re lambda,
// so a node and mode cost one division, and the sums are a product of real matrices: ((1+R)^2 rows of Re v and of
// Re(conj(v) lambda)) times 1/q.  Nodes are in SIMD lanes, in double: near a resonance 1/q loses |Im lambda / Re lambda| of
// the precision, too much for float.
//
// Re lambda <= 0 makes the Hermitian part of I + g k_PP at least I: it is inverted without pivoting.
//
// Adjoint, with x = M^-1 B and y = M^-T C~ over all modes (no transposed solve is left):
//   dK^ = dt e^(i theta/2) [y.dB + x.dC~ + g y^T dA x] + i s e^(i theta/2) (y.x) d(dt)
#pragma once

#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/ssm/s4_discrete.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// A packet of complex numbers in double.
struct CauchyLanes {
  using P = simd::Packet<double>;
  P re, im;

  static CauchyLanes of(std::complex<double> z) {
    return {simd::set1<P>(z.real()), simd::set1<P>(z.imag())};
  }
  static CauchyLanes zero() { return {simd::zero<P>(), simd::zero<P>()}; }
  static CauchyLanes load(const double* re, const double* im) {
    return {simd::load<P>(re), simd::load<P>(im)};
  }
  void store(double* to_re, double* to_im) const {
    simd::store<P>(to_re, re);
    simd::store<P>(to_im, im);
  }
  std::complex<double> sum() const { return {simd::sum(re), simd::sum(im)}; }
  CauchyLanes inverse() const {
    const P scale = simd::div(simd::set1<P>(1.0), simd::fma(re, re, simd::mul(im, im)));
    return {simd::mul(re, scale), simd::neg(simd::mul(im, scale))};
  }
  friend CauchyLanes operator+(const CauchyLanes& a, const CauchyLanes& b) {
    return {simd::add(a.re, b.re), simd::add(a.im, b.im)};
  }
  friend CauchyLanes operator-(const CauchyLanes& a, const CauchyLanes& b) {
    return {simd::sub(a.re, b.re), simd::sub(a.im, b.im)};
  }
  friend CauchyLanes operator*(const CauchyLanes& a, const CauchyLanes& b) {
    return {simd::sub(simd::mul(a.re, b.re), simd::mul(a.im, b.im)),
            simd::fma(a.re, b.im, simd::mul(a.im, b.re))};
  }
  friend CauchyLanes operator*(const P& s, const CauchyLanes& b) {
    return {simd::mul(s, b.re), simd::mul(s, b.im)};
  }
  friend CauchyLanes conj(const CauchyLanes& a) { return {a.re, simd::neg(a.im)}; }
};

/// sin and cos of theta/2 at the nodes of a length, filled up to whole tiles with the last one.
struct CauchyNodes {
  static constexpr Index kTile = 64;
  Index length, count, padded;
  Vector<double> sine, cosine;  ///< 2 sin(theta/2), cos(theta/2)

  explicit CauchyNodes(Index l)
      : length(l),
        count(l / 2 + 1),
        padded((count + kTile - 1) / kTile * kTile),
        sine(padded),
        cosine(padded) {
    for (Index i = 0; i < padded; ++i) {
      const Index k = std::min(i, count - 1);
      const double half =
          static_cast<double>(EIGEN_PI) * static_cast<double>(k) / static_cast<double>(length);
      sine[i] = 2 * std::sin(half);
      cosine[i] = 2 * k == length ? 0.0 : std::cos(half);
    }
  }
};

/// The sums of one channel, a tile of nodes at a time.
class CauchySums {
 public:
  using P = simd::Packet<double>;
  using C = CauchyLanes;
  using Complex = std::complex<double>;
  static constexpr Index kTile = CauchyNodes::kTile;
  static constexpr Index kWidth = simd::kLanes<double>;
  static constexpr Index kPackets = kTile / kWidth;

  CauchySums(const CauchyNodes& nodes, Index modes, Index rank)
      : nodes_(nodes),
        modes_(modes),
        rank_(rank),
        pairs_((1 + rank) * (1 + rank)),
        weights_(2 * pairs_, modes),
        inverse_(modes, 2 * kTile),
        sums_(2 * pairs_, 2 * kTile),
        k_(static_cast<std::size_t>(pairs_)),
        solve_(static_cast<std::size_t>(rank * rank)),
        right_(static_cast<std::size_t>(rank * kPackets)),
        left_(right_) {}

  /// Takes a channel; its c is C~.
  void set(const S4Channel& s) {
    s_ = &s;
    for (Index x = 0; x <= rank_; ++x) {
      for (Index y = 0; y <= rank_; ++y) {
        for (Index n = 0; n < modes_; ++n) {
          const Complex v =
              (x == 0 ? s.c[n] : std::conj(s.p(x - 1, n))) * (y == 0 ? s.b[n] : s.p(y - 1, n));
          weights_(x * (1 + rank_) + y, n) = v.real();
          weights_(pairs_ + x * (1 + rank_) + y, n) =
              v.real() * s.lambda[n].real() + v.imag() * s.lambda[n].imag();
        }
      }
    }
  }

  /// K^ at the nodes of the tile that begins at `first`, kTile numbers each.  False where a pole lies on a node.
  bool forward(Index first, double* re, double* im) {
    if (!sum_up(first)) return false;
    bool finite = true;
    for (Index i = 0; i < kPackets; ++i) {
      const P g = gamma(first + i * kWidth);
      solve(i, first + i * kWidth);
      C sum = k(0, 0);
      for (Index r = 0; r < rank_; ++r) sum = sum - g * (k(0, r + 1) * right(i, r));
      const C out = simd::set1<P>(s_->dt) * (half_turn(first + i * kWidth) * sum);
      out.store(re + i * kWidth, im + i * kWidth);
      for (Index l = i * kWidth; l < (i + 1) * kWidth; ++l)
        finite = finite && std::isfinite(re[l]) && std::isfinite(im[l]);
    }
    return finite;
  }

  /// Adds to `out` what the gradients (re, im) of the tile's K^ make.
  bool backward(Index first, const double* re, const double* im, S4Channel& out) {
    if (!sum_up(first)) return false;
    C dot[kPackets], weight[kPackets];
    for (Index i = 0; i < kPackets; ++i) {
      solve(i, first + i * kWidth);
      dot[i] = C::zero();
      // h = conj(G) dt e^(i theta/2)
      weight[i] = simd::set1<P>(s_->dt) *
                  (conj(C::load(re + i * kWidth, im + i * kWidth)) * half_turn(first + i * kWidth));
    }
    for (Index n = 0; n < modes_; ++n) {
      const P lambda_re = simd::set1<P>(s_->lambda[n].real());
      const P lambda_im = simd::set1<P>(s_->lambda[n].imag());
      const C b = C::of(s_->b[n]), c = C::of(s_->c[n]);
      C gl = C::zero(), gb = gl, gc = gl;
      for (Index i = 0; i < kPackets; ++i) {
        const P g = gamma(first + i * kWidth), s = sigma(first + i * kWidth);
        const P alpha = simd::neg(simd::mul(g, lambda_re)), beta = simd::mul(g, lambda_im);
        const C d = C{alpha, simd::sub(s, beta)}.inverse();
        const C d_conj = C{alpha, simd::add(s, beta)}.inverse();  // of the conjugate mode
        C x = b, x_conj = conj(b), y = c, y_conj = conj(c);
        for (Index r = 0; r < rank_; ++r) {
          const C p = C::of(s_->p(r, n));
          const C from_right = g * right(i, r), from_left = g * left(i, r);
          x = x - p * from_right;
          x_conj = x_conj - conj(p) * from_right;
          y = y - conj(p) * from_left;
          y_conj = y_conj - p * from_left;
        }
        x = x * d;
        y = y * d;
        x_conj = x_conj * d_conj;
        y_conj = y_conj * d_conj;
        dot[i] = dot[i] + x * y + x_conj * y_conj;
        const C hx = weight[i] * x, hx_conj = weight[i] * x_conj;
        const C hy = weight[i] * y, hy_conj = weight[i] * y_conj;
        gb = gb + conj(hy) + hy_conj;
        gc = gc + conj(hx) + hx_conj;
        gl = gl + g * (conj(hy * x) + hy_conj * x_conj);
        for (Index r = 0; r < rank_; ++r) {
          const C gp = conj(right(i, r) * hy + left(i, r) * hx_conj) +
                       (right(i, r) * hy_conj + left(i, r) * hx);
          out.p(r, n) -= (g * gp).sum();
        }
      }
      out.lambda[n] += gl.sum();
      out.b[n] += gb.sum();
      out.c[n] += gc.sum();
    }
    P ddt = simd::zero<P>();
    for (Index i = 0; i < kPackets; ++i)  // Re (h / dt) i s (y.x)
      ddt = simd::sub(ddt, simd::mul(sigma(first + i * kWidth), (weight[i] * dot[i]).im));
    out.dt += simd::sum(ddt) / s_->dt;
    return true;
  }

 private:
  P sigma(Index k) const { return simd::load<P>(nodes_.sine.data() + k); }
  P gamma(Index k) const {
    return simd::mul(simd::set1<P>(s_->dt), simd::load<P>(nodes_.cosine.data() + k));
  }
  /// e^(i theta/2)
  C half_turn(Index k) const {
    return {simd::load<P>(nodes_.cosine.data() + k), simd::mul(simd::set1<P>(0.5), sigma(k))};
  }
  C& k(Index x, Index y) { return k_[static_cast<std::size_t>(x * (1 + rank_) + y)]; }
  C& right(Index i, Index r) { return right_[static_cast<std::size_t>(i * rank_ + r)]; }
  C& left(Index i, Index r) { return left_[static_cast<std::size_t>(i * rank_ + r)]; }
  C& solve_at(Index r, Index c) { return solve_[static_cast<std::size_t>(r * rank_ + c)]; }

  /// The sums of weights over q for a tile.  False where q is 0.
  bool sum_up(Index first) {
    P smallest = simd::set1<P>(std::numeric_limits<double>::infinity());
    for (Index n = 0; n < modes_; ++n) {
      const P lambda_re = simd::set1<P>(s_->lambda[n].real());
      const P lambda_im = simd::set1<P>(std::abs(s_->lambda[n].imag()));
      double* const to = inverse_.data() + n * inverse_.cols();
      for (Index i = 0; i < kTile; i += kWidth) {
        const P g = gamma(first + i), s = sigma(first + i);
        const P alpha = simd::neg(simd::mul(g, lambda_re)), beta = simd::mul(g, lambda_im);
        const P re = simd::fma(simd::sub(beta, s), simd::add(beta, s), simd::mul(alpha, alpha));
        const P im = simd::mul(simd::add(alpha, alpha), s);
        const P square = simd::fma(re, re, simd::mul(im, im));
        smallest = simd::min(smallest, square);
        const P scale = simd::div(simd::set1<P>(1.0), square);
        simd::store<P>(to + i, simd::mul(re, scale));
        simd::store<P>(to + kTile + i, simd::neg(simd::mul(im, scale)));
      }
    }
    product_nn<double>(weights_, inverse_, sums_);
    double lanes[static_cast<std::size_t>(kWidth)];
    simd::store<P>(lanes, smallest);
    return std::all_of(lanes, lanes + kWidth, [](double q) { return q > 0; });
  }

  /// k_XY of packet i, then right = (I + g k_PP)^-1 k_PB and left = (I + g k_PP)^-T k_CP.
  void solve(Index i, Index node) {
    const P g = gamma(node), s = sigma(node);
    const P minus_g = simd::neg(simd::add(g, g));
    const P twice_s = simd::add(s, s);
    for (Index pair = 0; pair < pairs_; ++pair) {
      const double* const v = sums_.data() + pair * sums_.cols() + i * kWidth;
      const double* const w = sums_.data() + (pairs_ + pair) * sums_.cols() + i * kWidth;
      const C sum_v = C::load(v, v + kTile), sum_w = C::load(w, w + kTile);
      k_[static_cast<std::size_t>(pair)] = {
          simd::sub(simd::mul(minus_g, sum_w.re), simd::mul(twice_s, sum_v.im)),
          simd::fma(minus_g, sum_w.im, simd::mul(twice_s, sum_v.re))};
    }
    // Gauss-Jordan in place: a row and a column at a time, the matrix turns into its inverse.
    for (Index r = 0; r < rank_; ++r) {
      for (Index c = 0; c < rank_; ++c) {
        solve_at(r, c) = g * k(r + 1, c + 1);
        if (r == c) solve_at(r, c).re = simd::add(solve_at(r, c).re, simd::set1<P>(1.0));
      }
    }
    for (Index pivot = 0; pivot < rank_; ++pivot) {
      const C inverse = solve_at(pivot, pivot).inverse();
      solve_at(pivot, pivot) = C::of(1.0);
      for (Index c = 0; c < rank_; ++c) solve_at(pivot, c) = inverse * solve_at(pivot, c);
      for (Index r = 0; r < rank_; ++r) {
        if (r == pivot) continue;
        const C factor = solve_at(r, pivot);
        solve_at(r, pivot) = C::zero();
        for (Index c = 0; c < rank_; ++c)
          solve_at(r, c) = solve_at(r, c) - factor * solve_at(pivot, c);
      }
    }
    for (Index r = 0; r < rank_; ++r) {
      C from_b = C::zero(), from_c = C::zero();
      for (Index c = 0; c < rank_; ++c) {
        from_b = from_b + solve_at(r, c) * k(c + 1, 0);
        from_c = from_c + solve_at(c, r) * k(0, c + 1);
      }
      right(i, r) = from_b;
      left(i, r) = from_c;
    }
  }

  const CauchyNodes& nodes_;
  Index modes_, rank_, pairs_;
  const S4Channel* s_ = nullptr;
  Matrix<double> weights_, inverse_, sums_;
  std::vector<C> k_, solve_, right_, left_;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
