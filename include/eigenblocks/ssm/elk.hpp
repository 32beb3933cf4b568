// ELK: damped sweeps for the parallel evaluation of recurrences (ssm/deer.hpp).
//
// A Newton sweep follows its linearisation wherever that leads.  ELK keeps it near the old iterate x by taking the new one
// as the filtered mean of   z_t = J_t z_{t-1} + b_t + N(0, I),   observed as x_t with variance sigma^2:
//
//   S-  = J S J^T + I        K = S- (S- + sigma^2 I)^-1        m = m- + K (x - m-)        S = (I - K) S-
//
// In terms of the update e = m - x and of the residual r_t = f(x_{t-1}, u_t) - x_t, as computed here,
//
//   G = (I + S- / sigma^2)^-1      e_t = G (r_t + J_t e_{t-1})      S = G S-
//
//   deer_forward(cell, u, initial, out, {.observation_variance = 100});                                 // full: N^3 a step
//   deer_forward(cell, u, initial, out, {.method = DeerMethod::quasi, .observation_variance = 100});    // diagonal: N
//
// sigma^2 -> infinity (the default) is DEER.  Like the official code this filters and does not smooth.  Damped sweeps do not
// make the first states exact one by one, so a state only counts as found when its residual is small too.
// Measured (ssm.md 18): with the clipping of deer.hpp plain Newton needs fewer sweeps; damping helps where it overflows.
// Source: arXiv 2407.19115, lindermanlab/elk.
#pragma once

#include <eigenblocks/core/types.hpp>

#include <cmath>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// The filter of one sweep: turns residuals into updates, row after row.
template <RealScalar S>
class ElkFilter {
 public:
  ElkFilter(Index n, bool full, double observation_variance)
      : n_(n),
        full_(full),
        weight_(static_cast<S>(1 / observation_variance)),
        covariance_(full ? n : 1, n) {
    if (full) {
      product_.resize(n, n);
      ahead_.resize(n, n);
      factor_.resize(n, n);
    }
    restart();
  }

  /// Before the first state, which is known: no variance.
  void restart() { covariance_.setZero(); }

  /// e, on entry the residual of the row, becomes its update; `before` is the update of the row before.
  void row(const S* jacobian, const S* before, S* e) {
    if (full_) {
      full_row(jacobian, before, e);
    } else {
      for (Index i = 0; i < n_; ++i) {
        const S j = jacobian[i], ahead = j * j * covariance_(0, i) + S(1);
        const S gain = S(1) / (S(1) + weight_ * ahead);
        e[i] = gain * (e[i] + j * before[i]);
        covariance_(0, i) = gain * ahead;
      }
    }
  }

 private:
  void full_row(const S* jacobian, const S* before, S* e) {
    const Eigen::Map<const Matrix<S>> j(jacobian, n_, n_);
    Eigen::Map<Vector<S>> update(e, n_);
    product_.noalias() = j.lazyProduct(covariance_);
    ahead_.noalias() = product_.lazyProduct(j.transpose());
    ahead_.diagonal().array() += S(1);
    update.noalias() += j.lazyProduct(Eigen::Map<const Vector<S>>(before, n_));
    factorise();
    solve(update.data(), 1, 1);
    covariance_ = ahead_;
    solve(covariance_.data(), n_, n_);
  }

  /// The Cholesky factor of I + ahead / sigma^2, lower triangle.
  void factorise() {
    for (Index i = 0; i < n_; ++i) {
      for (Index k = 0; k <= i; ++k) {
        const S entry = weight_ * S(0.5) * (ahead_(i, k) + ahead_(k, i)) + (i == k ? S(1) : S(0));
        const S sum = entry - factor_.row(i).head(k).dot(factor_.row(k).head(k));
        factor_(i, k) = i == k ? std::sqrt(sum) : sum / factor_(k, k);
      }
    }
  }

  /// x := (L L^T)^-1 x for n x cols numbers, rows `stride` apart.
  void solve(S* x, Index cols, Index stride) const {
    Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>> rows(x, n_, cols, Eigen::OuterStride<>(stride));
    for (Index i = 0; i < n_; ++i) {
      for (Index k = 0; k < i; ++k) rows.row(i) -= factor_(i, k) * rows.row(k);
      rows.row(i) /= factor_(i, i);
    }
    for (Index i = n_ - 1; i >= 0; --i) {
      for (Index k = i + 1; k < n_; ++k) rows.row(i) -= factor_(k, i) * rows.row(k);
      rows.row(i) /= factor_(i, i);
    }
  }

  Index n_;
  bool full_;
  S weight_;
  Matrix<S> covariance_, product_, ahead_, factor_;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
