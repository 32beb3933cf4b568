// Linear maps y = x W + b and their gradients.
//
//   linear_forward           y  = x W,  or  x W + b
//   linear_backward          all gradients at once:  dx = dy W^T,  dW = x^T dy,  db = sum over rows of dy
//   linear_backward_input    dx = dy W^T          linear_accumulate_input    dx += ...
//   linear_backward_weight   dW = x^T dy          linear_accumulate_weight   dW += ...
//   linear_backward_bias     db = column sums     linear_accumulate_bias     db += ...
//
// The accumulating forms serve inputs that feed several maps (q, k, v; gate and up) and gradients of several batches.
//
// Shapes: x is T x in, W in x out (PyTorch stores its transpose), b has out entries, y is T x out.  Outputs must not
// overlap inputs.  T, in or out may be 0; a sum over nothing is 0.
//
// Speed: Eigen's product, on blocks of y, dx or dW that are large enough to lose no more than some 5 % by packing an
// operand once per block; the blocks depend on the shape alone and every entry is summed by one task, so each executor
// gives the same bits.  No temporaries beyond Eigen's own packing buffers (none for one row).  Eigen starts threads of
// its own only if the program is compiled with OpenMP; inside openmp_executor it does not.
//
// Errors: invalid_argument where shapes do not fit.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/softmax.hpp>

#include <algorithm>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// Cuts a rows x cols result into blocks of row_block x col_block and runs work(row, rows, col, cols) on each; a last
/// block shorter than half joins its neighbour.  `flops` below 2^23 (a fraction of a millisecond) are not cut.
template <class Work>
void for_product_blocks(Index rows, Index cols, Index depth, Index row_block, Index col_block,
                        ExecutorRef executor, Work&& work) {
  const bool small =
      2.0 * static_cast<double>(rows) * static_cast<double>(cols) * static_cast<double>(depth) <
      8388608.0;
  const auto count = [small](Index size, Index block) {
    return small ? 1 : std::max<Index>(1, (size + block / 2) / block);
  };
  const Index down = count(rows, row_block), across = count(cols, col_block);
  executor.run(down * across, [&](Index task, int) {
    const Index i = task / across, j = task % across;
    const Index row = i * row_block, col = j * col_block;
    work(row, i + 1 == down ? rows - row : row_block, col,
         j + 1 == across ? cols - col : col_block);
  });
}

// Block sizes, from the Eigen 3.4 product on AVX-512 and AVX2: y and dx lose 2-6 % in blocks of 256 columns and
// nothing measurable in 1024 rows; narrow results are cut into 512 rows; dW prefers blocks of rows.
template <class Work>
void for_activation_blocks(Index rows, Index cols, Index depth, ExecutorRef executor, Work&& work) {
  const bool wide = cols >= 512;
  for_product_blocks(rows, cols, depth, wide ? 1024 : 512, wide ? 256 : 512, executor, work);
}
template <class Work>
void for_weight_blocks(Index rows, Index cols, Index depth, ExecutorRef executor, Work&& work) {
  for_product_blocks(rows, cols, depth, rows >= 1024 ? 512 : 256, 1024, executor, work);
}

template <RealScalar S>
void linear_product(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& weight,
                    const ConstVectorRef<S>* bias, MatrixRef<S> y, ExecutorRef executor) {
  require(weight.rows() == x.cols(), "weight has ", weight.rows(), " rows, x has ", x.cols(),
          " cols");
  require_shape("y", y.rows(), y.cols(), x.rows(), weight.cols(), "rows of x, cols of weight");
  if (bias != nullptr) require_size("bias", bias->size(), weight.cols(), "cols of weight");
  for_activation_blocks(y.rows(), y.cols(), x.cols(), executor,
                        [&](Index i, Index rows, Index j, Index cols) {
                          MatrixRef<S> block = y.block(i, j, rows, cols);
                          if (bias != nullptr) block.rowwise() = bias->segment(j, cols).transpose();
                          product_nn<S>(x.middleRows(i, rows), weight.middleCols(j, cols), block,
                                        bias != nullptr ? Write::add : Write::set);
                        });
}

template <RealScalar S>
void linear_input(const ConstMatrixRef<S>& dy, const ConstMatrixRef<S>& weight, MatrixRef<S> dx,
                  Write write, ExecutorRef executor) {
  require(dy.cols() == weight.cols(), "dy has ", dy.cols(), " cols, weight has ", weight.cols());
  require_shape("dx", dx.rows(), dx.cols(), dy.rows(), weight.rows(), "rows of dy, rows of weight");
  for_activation_blocks(dx.rows(), dx.cols(), dy.cols(), executor,
                        [&](Index i, Index rows, Index j, Index cols) {
                          product_nt<S>(dy.middleRows(i, rows), weight.middleRows(j, cols),
                                        dx.block(i, j, rows, cols), write);
                        });
}

template <RealScalar S>
void linear_weight(const ConstMatrixRef<S>& x, const ConstMatrixRef<S>& dy, MatrixRef<S> dweight,
                   Write write, ExecutorRef executor) {
  require(dy.rows() == x.rows(), "dy has ", dy.rows(), " rows, x has ", x.rows());
  require_shape("dweight", dweight.rows(), dweight.cols(), x.cols(), dy.cols(),
                "cols of x, cols of dy");
  for_weight_blocks(dweight.rows(), dweight.cols(), x.rows(), executor,
                    [&](Index i, Index rows, Index j, Index cols) {
                      product_tn<S>(x.middleCols(i, rows), dy.middleCols(j, cols),
                                    dweight.block(i, j, rows, cols), write);
                    });
}

template <RealScalar S>
void linear_bias(const ConstMatrixRef<S>& dy, VectorRef<S> dbias, Write write,
                 ExecutorRef executor) {
  require_size("dbias", dbias.size(), dy.cols(), "cols of dy");
  constexpr Index block = 512;
  executor.run((dy.cols() + block - 1) / block, [&](Index task, int) {
    const Index first = task * block, cols = std::min(block, dy.cols() - first);
    S* const sum = dbias.data() + first;
    if (write == Write::set) std::fill_n(sum, cols, S(0));
    for (Index i = 0; i < dy.rows(); ++i) {
      const S* const row = dy.row(i).data() + first;
      for_packets<S>(cols, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
        io.store(sum + j, simd::add(io.load(sum + j), io.load(row + j)));
      });
    }
  });
}

}  // namespace detail

/// y = x W; x is T x in, weight in x out, y T x out.
template <MatrixLike X, MatrixLike W, OutputMatrix Y>
  requires SameScalar<X, W, Y> && RealScalar<scalar_t<X>>
void linear_forward(const X& x, const W& weight, Y&& y, ExecutorRef executor = {}) {
  detail::linear_product<scalar_t<X>>(x, weight, nullptr, y, executor);
}

/// y = x W + b, the bias (out entries) added to every row.
template <MatrixLike X, MatrixLike W, OutputMatrix Y>
  requires SameScalar<X, W, Y> && RealScalar<scalar_t<X>>
void linear_forward(const X& x, const W& weight, const ConstVectorRef<scalar_t<X>>& bias, Y&& y,
                    ExecutorRef executor = {}) {
  detail::linear_product<scalar_t<X>>(x, weight, &bias, y, executor);
}

/// x W by value.
template <MatrixLike X, MatrixLike W>
  requires SameScalar<X, W> && RealScalar<scalar_t<X>> Matrix<scalar_t<X>> linear(const X& x,
                                                                                  const W& weight) {
    Matrix<scalar_t<X>> y(x.rows(), weight.cols());
    linear_forward(x, weight, y);
    return y;
  }

/// x W + b by value.
template <MatrixLike X, MatrixLike W>
  requires SameScalar<X, W> && RealScalar<scalar_t<X>> Matrix<scalar_t<X>> linear(
      const X& x, const W& weight, const ConstVectorRef<scalar_t<X>>& bias) {
    Matrix<scalar_t<X>> y(x.rows(), weight.cols());
    linear_forward(x, weight, bias, y);
    return y;
  }

/// dx = dy W^T; dy is T x out, weight in x out, dx T x in.
template <MatrixLike G, MatrixLike W, OutputMatrix D>
  requires SameScalar<G, W, D> && RealScalar<scalar_t<G>>
void linear_backward_input(const G& dy, const W& weight, D&& dx, ExecutorRef executor = {}) {
  detail::linear_input<scalar_t<G>>(dy, weight, dx, detail::Write::set, executor);
}

/// dx += dy W^T.
template <MatrixLike G, MatrixLike W, OutputMatrix D>
  requires SameScalar<G, W, D> && RealScalar<scalar_t<G>>
void linear_accumulate_input(const G& dy, const W& weight, D&& dx, ExecutorRef executor = {}) {
  detail::linear_input<scalar_t<G>>(dy, weight, dx, detail::Write::add, executor);
}

/// dW = x^T dy; x is T x in, dy T x out, dweight in x out.
template <MatrixLike X, MatrixLike G, OutputMatrix D>
  requires SameScalar<X, G, D> && RealScalar<scalar_t<X>>
void linear_backward_weight(const X& x, const G& dy, D&& dweight, ExecutorRef executor = {}) {
  detail::linear_weight<scalar_t<X>>(x, dy, dweight, detail::Write::set, executor);
}

/// dW += x^T dy.
template <MatrixLike X, MatrixLike G, OutputMatrix D>
  requires SameScalar<X, G, D> && RealScalar<scalar_t<X>>
void linear_accumulate_weight(const X& x, const G& dy, D&& dweight, ExecutorRef executor = {}) {
  detail::linear_weight<scalar_t<X>>(x, dy, dweight, detail::Write::add, executor);
}

/// db = sum over rows of dy; dy is T x out, dbias has out entries.  Rows are added in order.
template <MatrixLike G>
  requires RealScalar<scalar_t<G>>
void linear_backward_bias(const G& dy, VectorRef<scalar_t<G>> dbias, ExecutorRef executor = {}) {
  detail::linear_bias<scalar_t<G>>(dy, dbias, detail::Write::set, executor);
}

/// db += sum over rows of dy.
template <MatrixLike G>
  requires RealScalar<scalar_t<G>>
void linear_accumulate_bias(const G& dy, VectorRef<scalar_t<G>> dbias, ExecutorRef executor = {}) {
  detail::linear_bias<scalar_t<G>>(dy, dbias, detail::Write::add, executor);
}

/// dx and dW of y = x W.
template <MatrixLike X, MatrixLike W, MatrixLike G, OutputMatrix DX, OutputMatrix DW>
  requires SameScalar<X, W, G, DX, DW> && RealScalar<scalar_t<X>>
void linear_backward(const X& x, const W& weight, const G& dy, DX&& dx, DW&& dweight,
                     ExecutorRef executor = {}) {
  detail::require_shape("x", x.rows(), x.cols(), dy.rows(), weight.rows(),
                        "rows of dy, rows of weight");
  detail::require_shape("dweight", dweight.rows(), dweight.cols(), weight.rows(), weight.cols(),
                        "shape of weight");
  linear_backward_input(dy, weight, dx, executor);
  linear_backward_weight(x, dy, dweight, executor);
}

/// dx, dW and db of y = x W + b.
template <MatrixLike X, MatrixLike W, MatrixLike G, OutputMatrix DX, OutputMatrix DW>
  requires SameScalar<X, W, G, DX, DW> && RealScalar<scalar_t<X>>
void linear_backward(const X& x, const W& weight, const G& dy, DX&& dx, DW&& dweight,
                     VectorRef<scalar_t<X>> dbias, ExecutorRef executor = {}) {
  detail::require_size("dbias", dbias.size(), weight.cols(), "cols of weight");
  linear_backward(x, weight, dy, dx, dweight, executor);
  linear_backward_bias(dy, dbias, executor);
}

EIGENBLOCKS_NAMESPACE_END
