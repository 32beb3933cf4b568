// Linear recurrences over time: h_t = a_t h_{t-1} + b_t, with gradients; and scans with a user's own operator.
//
//   a    T x D, or 1 x D for the same coefficients at every step      b, h   T x D, lanes = channels
//   h0   D entries: the state before the first step; left out: none, so that h_0 = b_0 and a_0 is not read
// float, double, std::complex of both.  Any a is legal: 0, negative, |a| > 1; no prefix product is ever divided by.
//
//   scan_forward(a, b, h, h0);                             // h may be b: in place
//   scan_forward(a, b, h, h0, {.reverse = true}, pool);    // h_t = a_t h_{t+1} + b_t
//   scan_backward(a, h, dh, da, db, dh0, h0);              // db may be dh; da has the shape of a
//   scan_adjoint(a, dh, db, dh0);                          // without da: one reverse scan of conj(a)
//   scan_forward(a.middleRows(t, n), b.middleRows(t, n), h.middleRows(t, n), h.row(t - 1));    // any chunk: allocates nothing
//   scan_dense_forward(A, b, x, x0);                       // x_t = A_t x_{t-1} + b_t, see scan_dense.hpp
//   associative_scan(std::span(items), combine);           // items[t] = combine(items[t-1], items[t])
//
// Backward (complex gradients as in complex.hpp): lam_t = dh_t + conj(a_{t+1}) lam_{t+1}; db = lam,
// da_t = lam_t conj(h_{t-1}), dh0 = conj(a_0) lam_0.  The gradient of a state handed on belongs in the last row of dh.
//
// One step is one fused multiply-add per number, so a scan runs at the speed of memory and the order of the rows is kept.
// Executors get blocks of lanes.  ScanOptions::time_chunk also cuts T (for few lanes and many cores): 5/3 of the memory
// traffic, and rounding that depends on time_chunk; scan_time_chunk(T, D) proposes one.  Nothing ever depends on the number of workers.
// ScanOptions::wide: near |a| = 1 a float state loses about T eps |h|; wide carries it in double within a call.
// Errors: invalid_argument for shapes, a negative time_chunk, wide together with time_chunk.
// Source: Blelloch 1990; S5, arXiv 2208.04933; LRU, arXiv 2303.06349; kexue.fm 9554.
#pragma once

#include <eigenblocks/core/complex.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/scan_dense.hpp>
#include <eigenblocks/core/scan_lanes.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

/// A time_chunk by the shape alone: 0 (none) where blocks of lanes are enough work for many cores or T is short.
inline Index scan_time_chunk(Index rows, Index lanes) {
  if (lanes >= 1024 || rows < 4096) return 0;
  return std::max<Index>(1024, rows / 64);
}

namespace detail {

template <FieldScalar S>
void require_scan(Index a_rows, Index a_cols, Index rows, Index lanes, Index h0_size,
                  const ScanOptions& options) {
  require_scan_options(options);
  require((a_rows == rows || a_rows == 1) && a_cols == lanes, "a is ", a_rows, " x ", a_cols,
          ", expected ", rows, " x ", lanes, " or 1 x ", lanes, " (rows of time, or one; lanes)");
  require(h0_size == 0 || h0_size == lanes, "h0 has ", h0_size, " entries, expected ", lanes,
          " (lanes), or none");
}

template <FieldScalar S>
ScanJob<S> scan_job(const ConstMatrixRef<S>& a, const ConstMatrixRef<S>& b, MatrixRef<S>& h,
                    const ConstVectorRef<S>& h0, bool reverse) {
  const Index rows = b.rows(), first = reverse ? rows - 1 : 0, way = reverse ? -1 : 1;
  const Index a_step = a.rows() == 1 ? 0 : a.outerStride();
  return {rows,
          b.cols(),
          a.data() + first * a_step,
          way * a_step,
          b.data() + first * b.outerStride(),
          way * b.outerStride(),
          h.data() + first * h.outerStride(),
          way * h.outerStride(),
          h0.size() == 0 ? nullptr : h0.data()};
}

/// lam into db, and conj(a_0) lam_0 into dh0 unless that is empty.
template <FieldScalar S>
void scan_adjoint(const ConstMatrixRef<S>& a, const ConstMatrixRef<S>& dh, MatrixRef<S> db,
                  VectorRef<S> dh0, const ScanOptions& options, ExecutorRef executor) {
  if (dh.rows() == 0) {
    dh0.setZero();
    return;
  }
  const Vector<S> none;
  ScanJob<S> job = scan_job<S>(a, dh, db, none, !options.reverse);
  job.a -=
      job.a_step;  // lam of a row takes the coefficient of the row before it in this scan's order
  if (dh0.size() != 0) {
    // The scan may overwrite dh, but not a: one more step with an input of zero gives dh0.
    scan_all<true>(job, options, executor);
    const Index last = options.reverse ? dh.rows() - 1 : 0, at = a.rows() == 1 ? 0 : last;
    for (Index d = 0; d < dh0.size(); ++d) {
      dh0[d] = scan_fma<true, S>(a(at, d), db(last, d), S(0));
    }
    return;
  }
  scan_all<true>(job, options, executor);
}

/// da of rows [0, rows) in the order of the scan; h_before is null in front of the first one without h0.
template <FieldScalar S>
void scan_coefficients(const S* lam, Index lam_step, const S* h, Index h_step, const S* before,
                       Index rows, Index lanes, S* da, Index da_step, bool sum) {
  using P = FieldPacket<S>;
  constexpr Index w = kFieldLanes<S>;
  for (Index t = 0; t < rows; ++t) {
    const S *l = lam + t * lam_step, *prev = t == 0 ? before : h + (t - 1) * h_step;
    S* const to = da + t * da_step;
    if (prev == nullptr) {
      if (!sum) std::fill(to, to + lanes, S(0));
      continue;
    }
    const auto step = [&]<class V>(Index d) {
      const V old = sum ? field_load<V>(to + d) : simd::ei::pset1<V>(S(0));
      simd::ei::pstoreu<S>(to + d,
                           scan_fma<true, V>(field_load<V>(prev + d), field_load<V>(l + d), old));
    };
    Index d = 0;
    for (; d + w <= lanes; d += w) step.template operator()<P>(d);
    for (; d < lanes; ++d) step.template operator()<S>(d);
  }
}

}  // namespace detail

/// h_t = a_t h_{t-1} + b_t into h (T x D), which may be b itself; h0 may be a row of h.
template <FieldMatrixLike A, FieldMatrixLike B, FieldOutputMatrix O>
  requires SameScalar<A, B, O>
void scan_forward(const A& a, const B& b, O&& h,
                  const ConstVectorRef<scalar_t<A>>& h0 = Vector<scalar_t<A>>(),
                  const ScanOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<A>;
  detail::require_scan<S>(a.rows(), a.cols(), b.rows(), b.cols(), h0.size(), options);
  detail::require_shape("h", h.rows(), h.cols(), b.rows(), b.cols(), "shape of b");
  if (b.rows() == 0) return;
  const ConstMatrixRef<S> a_view(a), b_view(b);
  MatrixRef<S> h_view(h);
  detail::scan_all<false>(detail::scan_job<S>(a_view, b_view, h_view, h0, options.reverse), options,
                          executor);
}

/// db (T x D, may be dh) and dh0 (D entries, or none) from dh; a as in the forward pass, options too.
template <FieldMatrixLike A, FieldMatrixLike G, FieldOutputMatrix O>
  requires SameScalar<A, G, O>
void scan_adjoint(const A& a, const G& dh, O&& db, VectorRef<scalar_t<A>> dh0,
                  const ScanOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<A>;
  detail::require_scan<S>(a.rows(), a.cols(), dh.rows(), dh.cols(), 0, options);
  detail::require_shape("db", db.rows(), db.cols(), dh.rows(), dh.cols(), "shape of dh");
  detail::require(dh0.size() == 0 || dh0.size() == dh.cols(), "dh0 has ", dh0.size(),
                  " entries, expected ", dh.cols(), " (lanes), or none");
  detail::scan_adjoint<S>(a, dh, db, dh0, options, executor);
}

/// Gradients da (shape of a), db (T x D, may be dh) and dh0 (D entries, or none) from the output h and dh.
/// h0: the one of the forward pass.
template <FieldMatrixLike A, FieldMatrixLike H, FieldMatrixLike G, FieldOutputMatrix DA,
          FieldOutputMatrix DB>
  requires SameScalar<A, H, G, DA, DB>
void scan_backward(const A& a, const H& h, const G& dh, DA&& da, DB&& db,
                   VectorRef<scalar_t<A>> dh0,
                   const ConstVectorRef<scalar_t<A>>& h0 = Vector<scalar_t<A>>(),
                   const ScanOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<A>;
  const Index rows = dh.rows(), lanes = dh.cols();
  detail::require_scan<S>(a.rows(), a.cols(), rows, lanes, h0.size(), options);
  detail::require_shape("h", h.rows(), h.cols(), rows, lanes, "shape of dh");
  detail::require_shape("da", da.rows(), da.cols(), a.rows(), lanes, "shape of a");
  detail::require_shape("db", db.rows(), db.cols(), rows, lanes, "shape of dh");
  detail::require(dh0.size() == 0 || dh0.size() == lanes, "dh0 has ", dh0.size(),
                  " entries, expected ", lanes, " (lanes), or none");
  const ConstMatrixRef<S> a_view(a), h_view(h), dh_view(dh);
  MatrixRef<S> da_view(da), db_view(db);
  detail::scan_adjoint<S>(a_view, dh_view, db_view, dh0, options, executor);
  const bool constant = a.rows() == 1 && rows != 1;
  if (constant) da_view.setZero();
  if (rows == 0 || lanes == 0) return;
  const Index first = options.reverse ? rows - 1 : 0, way = options.reverse ? -1 : 1;
  const Index h_step = way * h_view.outerStride(), lam_step = way * db_view.outerStride();
  const S* const lam = db_view.data() + first * db_view.outerStride();
  const S* const out = h_view.data() + first * h_view.outerStride();
  const S* const before = h0.size() == 0 ? nullptr : h0.data();
  if (!constant) {
    const Index da_step = way * da_view.outerStride();
    S* const to = da_view.data() + first * da_view.outerStride();
    constexpr Index kRows = 1024;
    executor.run(detail::scan_tasks(rows, kRows), [&](Index task, int) {
      const Index t = task * kRows;
      detail::scan_coefficients(lam + t * lam_step, lam_step, out + t * h_step, h_step,
                                t == 0 ? before : out + (t - 1) * h_step, std::min(kRows, rows - t),
                                lanes, to + t * da_step, da_step, false);
    });
    return;
  }
  // A sum over time: parts of 256 rows in S, the parts in double.
  using W = std::conditional_t<ComplexScalar<S>, std::complex<double>, double>;
  constexpr Index kRows = 256, kParts = 64;
  const Index tasks = detail::scan_tasks(rows, kRows * kParts);
  Matrix<W> sums = Matrix<W>::Zero(tasks, lanes);
  executor.run(tasks, [&](Index task, int) {
    Vector<S> part(lanes);
    for (Index t = task * kRows * kParts; t < std::min(rows, (task + 1) * kRows * kParts);
         t += kRows) {
      part.setZero();
      detail::scan_coefficients(lam + t * lam_step, lam_step, out + t * h_step, h_step,
                                t == 0 ? before : out + (t - 1) * h_step, std::min(kRows, rows - t),
                                lanes, part.data(), Index(0), true);
      sums.row(task) += part.transpose().template cast<W>();
    }
  });
  for (Index task = 1; task < tasks; ++task) sums.row(0) += sums.row(task);
  da_view.row(0) = sums.row(0).template cast<S>();
}

/// How associative_scan runs.
struct AssociativeScanOptions {
  bool reverse = false;  ///< items[t] = combine(items[t+1], items[t])
  Index chunk = 0;       ///< items per chunk of the three-pass scheme (twice the work); 0: in order
};

/// Inclusive scan in place: items[t] = combine(items[t-1], items[t]) for an associative `T combine(const T& earlier,
/// const T& later)`, "earlier" in the order of the scan.  chunk > 0 runs chunks in parallel, and `combine` from several
/// threads; the grouping depends on chunk only.
template <class T, class Combine>
void associative_scan(std::span<T> items, Combine&& combine,
                      const AssociativeScanOptions& options = {}, ExecutorRef executor = {}) {
  detail::require(options.chunk >= 0, "chunk (", options.chunk,
                  ") must be positive, or 0 for none");
  const Index n = static_cast<Index>(items.size());
  const auto at = [&](Index i) -> T& {
    return items[static_cast<std::size_t>(options.reverse ? n - 1 - i : i)];
  };
  const auto run = [&](Index begin, Index end) {
    for (Index i = begin + 1; i < end; ++i) at(i) = combine(std::as_const(at(i - 1)), at(i));
  };
  const Index chunk = options.chunk == 0 ? n : options.chunk;
  if (n <= chunk) return run(0, n);
  const Index chunks = detail::scan_tasks(n, chunk);
  const auto last = [&](Index c) { return std::min(n, (c + 1) * chunk) - 1; };
  executor.run(chunks, [&](Index c, int) { run(c * chunk, last(c) + 1); });
  for (Index c = 1; c < chunks; ++c) {
    at(last(c)) = combine(std::as_const(at(last(c - 1))), at(last(c)));
  }
  executor.run(chunks - 1, [&](Index task, int) {
    const Index c = task + 1;
    for (Index i = c * chunk; i < last(c); ++i) {
      at(i) = combine(std::as_const(at(last(c - 1))), at(i));
    }
  });
}

EIGENBLOCKS_NAMESPACE_END
