// Non-linear recurrences h_t = f(h_{t-1}, u_t): what a cell is, and the kernels that cells are made of.
//
// A cell holds views of its parameters.  Rows are independent: row t of `out` is f(prev.row(t), u.row(t)).
//
//   struct LeakyCell {                                        // h' = c h + tanh(u), elementwise: a user's cell
//     using Scalar = double;
//     double c;  Index width;
//     Index size() const { return width; }                    // entries of h
//     Index input_size() const { return width; }              // entries of a row of u
//     void forward(const ConstMatrixRef<double>& prev, const ConstMatrixRef<double>& u, MatrixRef<double> out) const;
//     void jacobian(const ConstMatrixRef<double>& prev, const ConstMatrixRef<double>& u,
//                   const ConstMatrixRef<double>& out, MatrixRef<double> J) const;
//   };                                                        // J(t, i * size() + j) = d out(t, i) / d prev(t, j)
//
//   recurrent_forward(cell, u, initial, out)                  // one step after the other
//   deer_forward(cell, u, initial, out)                       // all steps at once, ssm/deer.hpp
//
// Optional members, for speed or for a method that needs them
//   Index scratch_size(Index rows) const        numbers of scratch; then forward and jacobian take a trailing Scalar*, and
//                                               jacobian finds there what forward left for the same rows
//   jacobian_diagonal(prev, u, out, d)          d T x size(): else the diagonal is taken out of the Jacobian
//   constant_jacobian(C)                        C size() x size(), a constant stand-in for the Jacobian (DeerMethod::su_const)
//   tangent_size(), tangents(prev, u, out, K)   J in factored form, tangent_size() numbers a row (K T x that), and its products:
//   multiply(k, v, y, tmp)                      y += J v      of a row k of K; v, y size() numbers, tmp twice that
//   multiply_transposed(k, v, y, tmp)           y += J^T v    newton and deer_adjoint then never form a Jacobian
//   sequential(u, h, out)                       the recurrence from h (not null, size() numbers): else forward is called row by row
// They are called from several threads at once and must not write to the cell.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/math.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

template <class C>
concept CellWithScratch = requires(const C& cell, Index rows) {
  { cell.scratch_size(rows) } -> std::convertible_to<Index>;
};

template <class C, class... Last>
concept CellFunctions = requires(const C& cell, const ConstMatrixRef<typename C::Scalar>& rows,
                                 MatrixRef<typename C::Scalar> out, Last... last) {
  cell.forward(rows, rows, out, last...);
  cell.jacobian(rows, rows, rows, out, last...);
};

}  // namespace detail

/// A non-linear recurrence; see the top of this header.
template <class C>
concept RecurrentCell = RealScalar<typename C::Scalar> && requires(const C& cell) {
  { cell.size() } -> std::convertible_to<Index>;
  { cell.input_size() } -> std::convertible_to<Index>;
} &&(detail::CellFunctions<C> || detail::CellFunctions<C, typename C::Scalar*>);

namespace detail {

template <RecurrentCell C>
Index cell_scratch(const C& cell, Index rows) {
  if constexpr (CellWithScratch<C>) return cell.scratch_size(rows);
  return 0;
}

template <RecurrentCell C>
void cell_forward(const C& cell, const ConstMatrixRef<scalar_t<C>>& prev,
                  const ConstMatrixRef<scalar_t<C>>& u, MatrixRef<scalar_t<C>> out,
                  scalar_t<C>* scratch) {
  if constexpr (CellWithScratch<C>) {
    cell.forward(prev, u, out, scratch);
  } else {
    (void)scratch;
    cell.forward(prev, u, out);
  }
}

template <RecurrentCell C>
void cell_jacobian(const C& cell, const ConstMatrixRef<scalar_t<C>>& prev,
                   const ConstMatrixRef<scalar_t<C>>& u, const ConstMatrixRef<scalar_t<C>>& out,
                   MatrixRef<scalar_t<C>> jacobian, scalar_t<C>* scratch) {
  if constexpr (CellWithScratch<C>) {
    cell.jacobian(prev, u, out, jacobian, scratch);
  } else {
    (void)scratch;
    cell.jacobian(prev, u, out, jacobian);
  }
}

template <class C>
concept CellWithSequential = requires(const C& cell, const ConstMatrixRef<scalar_t<C>>& rows,
                                      const scalar_t<C>* h, MatrixRef<scalar_t<C>> out) {
  cell.sequential(rows, h, out);
};

template <class C>
concept CellWithTangents = requires(const C& cell, const scalar_t<C>* k, scalar_t<C>* y) {
  { cell.tangent_size() } -> std::convertible_to<Index>;
  cell.multiply(k, k, y, y);
  cell.multiply_transposed(k, k, y, y);
};

/// The recurrence from the state `initial` (size() numbers), row after row.
template <RecurrentCell C>
void cell_sequential(const C& cell, const ConstMatrixRef<scalar_t<C>>& u,
                     const scalar_t<C>* initial, MatrixRef<scalar_t<C>> out) {
  if constexpr (CellWithSequential<C>) {
    cell.sequential(u, initial, out);
  } else {
    using S = scalar_t<C>;
    const Index n = cell.size();
    ScratchBlock block;
    S* const scratch = Arena(block.reserve(padded_bytes<S>(cell_scratch(cell, 1))))
                           .template take<S>(cell_scratch(cell, 1));
    for (Index t = 0; t < u.rows(); ++t) {
      const S* const before = t == 0 ? initial : &out.coeffRef(t - 1, 0);
      cell_forward<C>(cell, Eigen::Map<const Matrix<S>>(before, 1, n), u.middleRows(t, 1),
                      out.middleRows(t, 1), scratch);
    }
  }
}

template <RecurrentCell C>
void require_cell_operands(const C& cell, const ConstMatrixRef<scalar_t<C>>& u,
                           const ConstVectorRef<scalar_t<C>>& initial, Index rows, Index cols) {
  const Index size = cell.size();
  require(size >= 1, "the cell's size (", size, ") must be at least 1");
  require_shape("u", u.rows(), u.cols(), u.rows(), cell.input_size(),
                "any rows, input_size of the cell");
  require_size("initial", initial.size(), size, "size of the cell");
  require_shape("out", rows, cols, u.rows(), size, "rows of u, size of the cell");
}

// ---- Kernels: rows times matrices in registers -------------------------------------------------------

/// What G gates read: x[g] (n numbers) times the columns from j on of w[g] (n rows, `stride` apart), on top of start[g].
template <class S, std::size_t G>
struct GateRows {
  const S* x[G];
  const S* w[G];
  const S* start[G];  ///< null: 0
  Index n, stride;
};

/// finish(j, sums) for the columns j .. j + K packets; sums has G packets.
template <class P, std::size_t K, std::size_t G, class S, class F>
EIGENBLOCKS_ALWAYS_INLINE void gate_block(const GateRows<S, G>& in, Index j, F&& finish) {
  constexpr Index lanes = simd::kPacketSize<P>;
  constexpr std::size_t chains = G * K <= 2   ? 4
                                 : G * K <= 4 ? 2
                                              : 1;  // hide the latency of the additions
  P sum[chains][G][K];
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t k = 0; k < K; ++k) {
      sum[0][g][k] =
          in.start[g] ? simd::load<P>(in.start[g] + j + Index(k) * lanes) : simd::zero<P>();
      for (std::size_t c = 1; c < chains; ++c) sum[c][g][k] = simd::zero<P>();
    }
  }
  const auto add_row = [&](Index i, std::size_t c) EIGENBLOCKS_INLINE_LAMBDA {
    for (std::size_t g = 0; g < G; ++g) {
      const P x = simd::set1<P>(in.x[g][i]);
      const S* const row = in.w[g] + i * in.stride + j;
      for (std::size_t k = 0; k < K; ++k) {
        sum[c][g][k] = simd::fma(x, simd::load<P>(row + Index(k) * lanes), sum[c][g][k]);
      }
    }
  };
  Index i = 0;
  for (; i + Index(chains) <= in.n; i += Index(chains)) {
    for (std::size_t c = 0; c < chains; ++c) add_row(i + Index(c), c);
  }
  for (; i < in.n; ++i) add_row(i, 0);
  for (std::size_t k = 0; k < K; ++k) {
    P total[G];
    for (std::size_t g = 0; g < G; ++g) {
      total[g] = sum[0][g][k];
      for (std::size_t c = 1; c < chains; ++c) total[g] = simd::add(total[g], sum[c][g][k]);
    }
    finish(j + Index(k) * lanes, total);
  }
}

/// finish(j, sums) over all m columns, in packets and at the end in scalars.
template <class S, std::size_t G, class F>
EIGENBLOCKS_ALWAYS_INLINE void gate_rows(const GateRows<S, G>& in, Index m, F&& finish) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  constexpr std::size_t wide = G == 1 ? 8 : 4;
  Index j = 0;
  for (; j + Index(wide) * w <= m; j += Index(wide) * w) gate_block<P, wide, G>(in, j, finish);
  for (; j + 2 * w <= m; j += 2 * w) gate_block<P, 2, G>(in, j, finish);
  for (; j + w <= m; j += w) gate_block<P, 1, G>(in, j, finish);
  if constexpr (w > 1) {
    for (; j < m; ++j) gate_block<S, 1, G>(in, j, finish);
  }
}

/// out = x W (+ start), one row: x n numbers, w n rows `stride` apart, start null or m numbers, out m numbers (may be start).
template <RealScalar S>
EIGENBLOCKS_NOINLINE void row_product(const S* x, Index n, const S* w, Index stride, const S* start,
                                      Index m, S* out) {
  const GateRows<S, 1> in{{x}, {w}, {start}, n, stride};
  gate_rows<S, 1>(in, m, [&]<class P>(Index j, const P(&sum)[1]) EIGENBLOCKS_INLINE_LAMBDA {
    simd::store<P>(out + j, sum[0]);
  });
}

/// f(offset, P{}) over n numbers: packets, then scalars.
template <class S, class F>
EIGENBLOCKS_ALWAYS_INLINE void lanes_of(Index n, F&& f) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  Index j = 0;
  for (; j + w <= n; j += w) f(j, P{});
  if constexpr (w > 1) {
    for (; j < n; ++j) f(j, S{});
  }
}

}  // namespace detail

/// h_t = f(h_{t-1}, u_t) step by step from `initial`; out T x size() gets all states.  Errors: wrong shapes.
template <RecurrentCell C, MatrixLike U, OutputMatrix O>
  requires SameScalar<C, U, O>
void recurrent_forward(const C& cell, const U& u, const ConstVectorRef<scalar_t<C>>& initial,
                       O&& out) {
  detail::require_cell_operands<C>(cell, u, initial, out.rows(), out.cols());
  detail::cell_sequential<C>(cell, u, initial.data(), out);
}

EIGENBLOCKS_NAMESPACE_END
