// Linear recurrences with matrices: x_t = A_t x_{t-1} + b_t (states are columns in the formula, rows in memory).
//
//   A    (T*N) x N, A_t in the rows [t N, (t+1) N); or N x N, the same at every step (T = 1: the same thing)
//   b, x   T x N        x0   N entries: the state before the first step; left out: none, x_0 = b_0
//
//   scan_dense_forward(A, b, x, x0);                   // x may be b
//   scan_dense_backward(A, x, dx, dA, db, dx0, x0);    // db may be dx; dA has the shape of A
//   scan_dense_adjoint(A, dx, db, dx0);                // without dA: lam_t = dx_t + A_{t+1}^T lam_{t+1}
//
// Backward: db = lam, dA_t = lam_t x_{t-1}^T, dx0 = A_0^T lam_0.
// In order a step costs N^2.  ScanOptions::time_chunk cuts T into chunks whose matrix products are formed in parallel:
// about N + 2 times the work, so it pays for more cores than that.  `wide` is not offered here.
// Errors: invalid_argument for shapes, a negative time_chunk, wide.   float and double.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/scan_lanes.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cstddef>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// y += A x; y is not x.
template <RealScalar S>
void dense_multiply(const S* a, Index stride, Index n, const S* x, S* y) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  for (Index i = 0; i < n; ++i) {
    const S* const row = a + i * stride;
    S sum = 0;
    Index j = 0;
    if (n >= w) {
      P lanes = simd::zero<P>();
      for (; j + w <= n; j += w) {
        lanes = simd::fma(simd::load<P>(row + j), simd::load<P>(x + j), lanes);
      }
      sum = simd::sum(lanes);
    }
    for (; j < n; ++j) sum += row[j] * x[j];
    y[i] += sum;
  }
}

/// y += A^T x; y is not x.
template <RealScalar S>
void dense_multiply_transposed(const S* a, Index stride, Index n, const S* x, S* y) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  for (Index i = 0; i < n; ++i) {
    const S* const row = a + i * stride;
    const P factor = simd::set1<P>(x[i]);
    Index j = 0;
    for (; j + w <= n; j += w) {
      simd::store<P>(y + j, simd::fma(simd::load<P>(row + j), factor, simd::load<P>(y + j)));
    }
    for (; j < n; ++j) y[j] += row[j] * x[i];
  }
}

/// Row r in the order of the scan: of A (null: there is none, the state does not pass), b and x.
template <RealScalar S>
struct DenseScanJob {
  Index rows, n;
  const S* a;
  Index a_step, a_stride;
  const S* b;
  Index b_step;
  S* x;
  Index x_step;
  const S* carry;  // null: none
};

template <bool kTransposed, RealScalar S>
void dense_apply(const DenseScanJob<S>& job, Index r, const S* from, S* to) {
  const S* const a = job.a + r * job.a_step;
  if constexpr (kTransposed) {
    dense_multiply_transposed(a, job.a_stride, job.n, from, to);
  } else {
    dense_multiply(a, job.a_stride, job.n, from, to);
  }
}

template <bool kTransposed, RealScalar S>
void dense_scan_rows(const DenseScanJob<S>& job, Index begin, Index end, const S* state) {
  for (Index r = begin; r < end; ++r) {
    const S* const b = job.b + r * job.b_step;
    S* const x = job.x + r * job.x_step;
    if (x != b) std::copy(b, b + job.n, x);
    if (state != nullptr) dense_apply<kTransposed>(job, r, state, x);
    state = x;
  }
}

template <bool kTransposed, RealScalar S>
void dense_scan(const DenseScanJob<S>& job, const ScanOptions& options, ExecutorRef executor) {
  const Index chunk = options.time_chunk, n = job.n;
  if (chunk == 0 || job.rows <= chunk || n == 0) {
    return dense_scan_rows<kTransposed>(job, 0, job.rows, job.carry);
  }
  const Index chunks = scan_tasks(job.rows, chunk);
  // Chunk c: its end from a state of zero, and the product of its matrices, transposed in a transposed scan.
  Matrix<S> ends = Matrix<S>::Zero(chunks - 1, n), products(chunks > 2 ? (chunks - 1) * n : 0, n);
  executor.run(chunks - 1, [&](Index c, int) {
    Vector<S> old(n), now(n);
    const S* state = c == 0 ? job.carry : nullptr;
    for (Index r = c * chunk; r < (c + 1) * chunk; ++r) {
      const S* const b = job.b + r * job.b_step;
      std::copy(b, b + n, now.data());
      if (state != nullptr) dense_apply<kTransposed>(job, r, state, now.data());
      old.swap(now);
      state = old.data();
    }
    ends.row(c) = old.transpose();
    if (c == 0) return;
    Matrix<S> product = Matrix<S>::Identity(n, n), next(n, n);
    for (Index r = c * chunk; r < (c + 1) * chunk; ++r) {
      const Eigen::Map<const Matrix<S>, 0, Eigen::OuterStride<>> a(
          job.a + r * job.a_step, n, n, Eigen::OuterStride<>(job.a_stride));
      if constexpr (kTransposed) {
        next.noalias() = a.transpose() * product;
      } else {
        next.noalias() = a * product;
      }
      product.swap(next);
    }
    products.middleRows(c * n, n) = product;
  });
  for (Index c = 1; c + 1 < chunks; ++c) {
    dense_multiply(products.data() + c * n * n, n, n, ends.data() + (c - 1) * n,
                   ends.data() + c * n);
  }
  executor.run(chunks, [&](Index c, int) {
    dense_scan_rows<kTransposed>(job, c * chunk, std::min(job.rows, (c + 1) * chunk),
                                 c == 0 ? job.carry : ends.data() + (c - 1) * n);
  });
}

inline void require_dense_scan(Index a_rows, Index a_cols, Index rows, Index n, Index x0_size,
                               const char* x0_name, const ScanOptions& options) {
  require_scan_options(options);
  require(!options.wide, "wide must be false for scans with matrices");
  require((a_rows == rows * n || a_rows == n) && a_cols == n, "A is ", a_rows, " x ", a_cols,
          ", expected ", rows * n, " x ", n, " or ", n, " x ", n, " (time * state rows, or state)");
  require(x0_size == 0 || x0_size == n, x0_name, " has ", x0_size, " entries, expected ", n,
          " (state), or none");
}

template <RealScalar S>
DenseScanJob<S> dense_scan_job(const ConstMatrixRef<S>& a, const ConstMatrixRef<S>& b,
                               MatrixRef<S>& x, const S* carry, bool reverse) {
  const Index rows = b.rows(), n = b.cols(), first = reverse ? rows - 1 : 0, way = reverse ? -1 : 1;
  const Index a_step = a.rows() == n ? 0 : n * a.outerStride();
  return {rows,
          n,
          a.data() + first * a_step,
          way * a_step,
          a.outerStride(),
          b.data() + first * b.outerStride(),
          way * b.outerStride(),
          x.data() + first * x.outerStride(),
          way * x.outerStride(),
          carry};
}

template <RealScalar S>
void scan_dense_adjoint(const ConstMatrixRef<S>& a, const ConstMatrixRef<S>& dx, MatrixRef<S> db,
                        VectorRef<S> dx0, const ScanOptions& options, ExecutorRef executor) {
  dx0.setZero();
  if (dx.rows() == 0) return;
  DenseScanJob<S> job = dense_scan_job<S>(a, dx, db, nullptr, !options.reverse);
  job.a -= job.a_step;  // lam of a row takes the matrix of the row before it in this scan's order
  dense_scan<true>(job, options, executor);
  if (dx0.size() == 0) return;
  const Index last = options.reverse ? dx.rows() - 1 : 0;
  dense_multiply_transposed(a.data() + (job.a_step == 0 ? 0 : last * dx.cols() * a.outerStride()),
                            a.outerStride(), dx.cols(), db.data() + last * db.outerStride(),
                            dx0.data());
}

}  // namespace detail

/// x_t = A_t x_{t-1} + b_t into x (T x N), which may be b itself.
template <MatrixLike A, MatrixLike B, OutputMatrix O>
  requires SameScalar<A, B, O> && RealScalar<scalar_t<A>>
void scan_dense_forward(const A& a, const B& b, O&& x,
                        const ConstVectorRef<scalar_t<A>>& x0 = Vector<scalar_t<A>>(),
                        const ScanOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<A>;
  detail::require_dense_scan(a.rows(), a.cols(), b.rows(), b.cols(), x0.size(), "x0", options);
  detail::require_shape("x", x.rows(), x.cols(), b.rows(), b.cols(), "shape of b");
  if (b.rows() == 0) return;
  const ConstMatrixRef<S> a_view(a), b_view(b);
  MatrixRef<S> x_view(x);
  detail::dense_scan<false>(
      detail::dense_scan_job<S>(a_view, b_view, x_view, x0.size() == 0 ? nullptr : x0.data(),
                                options.reverse),
      options, executor);
}

/// db (T x N, may be dx) and dx0 (N entries, or none) from dx; A and options as in the forward pass.
template <MatrixLike A, MatrixLike G, OutputMatrix O>
  requires SameScalar<A, G, O> && RealScalar<scalar_t<A>>
void scan_dense_adjoint(const A& a, const G& dx, O&& db, VectorRef<scalar_t<A>> dx0,
                        const ScanOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_dense_scan(a.rows(), a.cols(), dx.rows(), dx.cols(), dx0.size(), "dx0", options);
  detail::require_shape("db", db.rows(), db.cols(), dx.rows(), dx.cols(), "shape of dx");
  detail::scan_dense_adjoint<scalar_t<A>>(a, dx, db, dx0, options, executor);
}

/// Gradients dA (shape of A), db (T x N, may be dx) and dx0 (N entries, or none) from the output x and dx.
template <MatrixLike A, MatrixLike X, MatrixLike G, OutputMatrix DA, OutputMatrix DB>
  requires SameScalar<A, X, G, DA, DB> && RealScalar<scalar_t<A>>
void scan_dense_backward(const A& a, const X& x, const G& dx, DA&& da, DB&& db,
                         VectorRef<scalar_t<A>> dx0,
                         const ConstVectorRef<scalar_t<A>>& x0 = Vector<scalar_t<A>>(),
                         const ScanOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<A>;
  const Index rows = dx.rows(), n = dx.cols();
  detail::require_dense_scan(a.rows(), a.cols(), rows, n, dx0.size(), "dx0", options);
  detail::require_dense_scan(a.rows(), a.cols(), rows, n, x0.size(), "x0", options);
  detail::require_shape("x", x.rows(), x.cols(), rows, n, "shape of dx");
  detail::require_shape("dA", da.rows(), da.cols(), a.rows(), n, "shape of A");
  detail::require_shape("db", db.rows(), db.cols(), rows, n, "shape of dx");
  const ConstMatrixRef<S> x_view(x);
  MatrixRef<S> da_view(da), lam(db);
  detail::scan_dense_adjoint<S>(a, dx, lam, dx0, options, executor);
  const auto before = [&](Index t) -> const S* {
    const Index prev = options.reverse ? t + 1 : t - 1;
    if (prev < 0 || prev >= rows) return x0.size() == 0 ? nullptr : x0.data();
    return x_view.data() + prev * x_view.outerStride();
  };
  if (a.rows() == n && rows != 1) {  // constant A: a sum over time
    da_view.setZero();
    for (Index t = 0; t < rows; ++t) {
      const S* const prev = before(t);
      if (prev == nullptr) continue;
      da_view.noalias() += lam.row(t).transpose() * Eigen::Map<const RowVector<S>>(prev, n);
    }
    return;
  }
  constexpr Index kRows = 64;
  executor.run(detail::scan_tasks(rows, kRows), [&](Index task, int) {
    for (Index t = task * kRows; t < std::min(rows, (task + 1) * kRows); ++t) {
      const S* const prev = before(t);
      if (prev == nullptr) {
        da_view.middleRows(t * n, n).setZero();
      } else {
        da_view.middleRows(t * n, n).noalias() =
            lam.row(t).transpose() * Eigen::Map<const RowVector<S>>(prev, n);
      }
    }
  });
}

EIGENBLOCKS_NAMESPACE_END
