// Inside of s5.hpp and lru.hpp: a diagonal complex recurrence between two products.
//
//   x_t = a x_{t-1} + Bbar u_t        y_t = factor Re(C x_t) + D u_t            a P, Bbar P x H, C H x P, D H
//
// Complex rows are interleaved real ones, so both products are real: u (T x H) times (H x 2P), and x (T x 2P) times (2P x H).
// The forward pass goes in blocks of rows that stay in the cache.  Bidirectional: C has 2P columns, the right half reads a
// second scan that runs from the end.
#pragma once

#include <eigenblocks/core/scan.hpp>
#include <eigenblocks/core/workspace.hpp>
#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/ssm/recurrent_cell.hpp>

#include <complex>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline constexpr Index kMimoFew = 8;  // up to here rows go one by one, without a product

/// The layer in the form that runs: a, Bbar and C as real matrices.
template <RealScalar S>
struct DiagonalMimo {
  using Complex = std::complex<S>;
  Matrix<Complex> a;  ///< 1 x P
  Matrix<S> in;       ///< H x 2P: Re and Im of Bbar alternate
  Matrix<S> out;      ///< 2P x H: Re and -Im of factor C
  Matrix<S> back;     ///< the same for the scan from the end; no rows if there is none
  Vector<S> feed;     ///< D

  Index modes() const { return a.cols(); }
  Index channels() const { return in.rows(); }

  void set(const Vector<Complex>& a_in, const Matrix<Complex>& b, const Matrix<Complex>& c,
           const Vector<S>& d, S factor) {
    const Index p = a_in.size(), h = b.cols();
    a = a_in.transpose();
    in.resize(h, 2 * p);
    for (Index n = 0; n < p; ++n) {
      in.col(2 * n) = b.row(n).real().transpose();
      in.col(2 * n + 1) = b.row(n).imag().transpose();
    }
    out = read(c.leftCols(p), factor);
    back = read(c.rightCols(c.cols() - p), factor);
    feed = d;
  }

  static Index block(Index modes, Index rows) {
    return std::min(rows, std::clamp<Index>(32768 / std::max<Index>(1, modes), 64, 1024));
  }
  bool by_row(Index rows) const { return rows <= kMimoFew && back.rows() == 0; }
  std::size_t bytes(Index rows) const {
    return padded_bytes<S>(2 * modes() * (by_row(rows) ? 1 : block(modes(), rows)));
  }

  /// y from u; x is the state before and after (of the scan from the start).
  void forward(const ConstMatrixRef<S>& u, MatrixRef<S> y, Vector<Complex>& x, Arena arena,
               ExecutorRef executor) const {
    const Index rows = u.rows(), p = modes();
    if (by_row(rows)) {
      S* const scratch = arena.take<S>(2 * p);
      for (Index t = 0; t < rows; ++t)
        row(u.data() + t * u.outerStride(), &y.coeffRef(t, 0), x, scratch);
      return;
    }
    const Index size = block(p, rows);
    S* const buffer = arena.take<S>(2 * p * std::max<Index>(size, 1));
    for (Index t = 0; t < rows; t += size) {
      const Index n = std::min(size, rows - t);
      block_forward(u.middleRows(t, n), y.middleRows(t, n), x, buffer, executor);
    }
    if (back.rows() == 0) return;
    Vector<Complex> after = Vector<Complex>::Zero(p);
    for (Index end = rows; end > 0; end -= std::min(size, end)) {
      const Index n = std::min(size, end), t = end - n;
      block_backward(u.middleRows(t, n), y.middleRows(t, n), after, buffer, executor);
    }
  }

  /// States of all rows, T x P.
  void states(const ConstMatrixRef<S>& u, const Vector<Complex>& before, bool reverse,
              Matrix<Complex>& x, ExecutorRef executor) const {
    x.resize(u.rows(), modes());
    linear_forward(u, in, real(x), executor);
    scan_forward(a, x, x, before, {.reverse = reverse}, executor);
  }

  /// A complex matrix as the real one of its parts.
  template <class M>
  static Eigen::Map<Matrix<S>> real(M& x) {
    return {reinterpret_cast<S*>(x.data()), x.rows(), 2 * x.cols()};
  }

 private:
  static Matrix<S> read(const Eigen::Ref<const Matrix<Complex>, 0, Eigen::OuterStride<>>& c,
                        S factor) {
    Matrix<S> v(2 * c.cols(), c.cols() == 0 ? 0 : c.rows());
    for (Index n = 0; n < c.cols(); ++n) {
      v.row(2 * n) = factor * c.col(n).real().transpose();
      v.row(2 * n + 1) = -factor * c.col(n).imag().transpose();
    }
    return v;
  }

  void block_forward(const ConstMatrixRef<S>& u, MatrixRef<S> y, Vector<Complex>& x, S* buffer,
                     ExecutorRef executor) const {
    const Index p = modes();
    Eigen::Map<Matrix<S>> parts(buffer, u.rows(), 2 * p);
    Eigen::Map<Matrix<Complex>> state(reinterpret_cast<Complex*>(buffer), u.rows(), p);
    linear_forward(u, in, parts, executor);
    scan_forward(a, state, state, x, {}, executor);
    x = state.row(u.rows() - 1).transpose();
    linear_forward(parts, out, y, executor);
    for (Index t = 0; t < u.rows(); ++t) {
      y.row(t).array() += feed.transpose().array() * u.row(t).array();
    }
  }

  void block_backward(const ConstMatrixRef<S>& u, MatrixRef<S> y, Vector<Complex>& after, S* buffer,
                      ExecutorRef executor) const {
    const Index p = modes();
    Eigen::Map<Matrix<S>> parts(buffer, u.rows(), 2 * p);
    Eigen::Map<Matrix<Complex>> state(reinterpret_cast<Complex*>(buffer), u.rows(), p);
    linear_forward(u, in, parts, executor);
    scan_forward(a, state, state, after, {.reverse = true}, executor);
    after = state.row(0).transpose();
    Matrix<S> add(u.rows(), y.cols());
    linear_forward(parts, back, add, executor);
    y += add;
  }

  void row(const S* u, S* y, Vector<Complex>& x, S* scratch) const {
    const Index p = modes(), h = channels();
    row_product<S>(u, h, in.data(), 2 * p, nullptr, 2 * p, scratch);
    for (Index n = 0; n < p; ++n) {
      x[n] = scan_fma<false, Complex>(a(0, n), x[n], Complex(scratch[2 * n], scratch[2 * n + 1]));
    }
    row_product<S>(reinterpret_cast<const S*>(x.data()), 2 * p, out.data(), h, nullptr, h, y);
    for (Index j = 0; j < h; ++j) y[j] += feed[j] * u[j];
  }
};

/// Gradients with respect to what a DiagonalMimo was set from.
template <RealScalar S>
struct DiagonalMimoGradients {
  using Complex = std::complex<S>;
  Vector<Complex> a;
  Matrix<Complex> b, c;
  Vector<S> d;
  Vector<Complex> initial;

  /// From dy, and dfinal unless it is null.  Overwrites du too.
  void set(const DiagonalMimo<S>& layer, S factor, const ConstMatrixRef<S>& u,
           const Vector<Complex>& before, const ConstMatrixRef<S>& dy,
           const Vector<Complex>* dfinal, MatrixRef<S> du, ExecutorRef executor) {
    const Index p = layer.modes(), h = layer.channels(), rows = u.rows();
    const bool both = layer.back.rows() != 0;
    for (Index t = 0; t < rows; ++t) {
      du.row(t).array() = layer.feed.transpose().array() * dy.row(t).array();
    }
    d = Vector<S>::Zero(h);
    for (Index t = 0; t < rows; ++t)
      d.array() += (dy.row(t).array() * u.row(t).array()).transpose();
    a = Vector<Complex>::Zero(p);
    b = Matrix<Complex>::Zero(p, h);
    c.resize(h, both ? 2 * p : p);
    initial = Vector<Complex>::Zero(p);
    direction(layer, layer.out, factor, u, before, false, dy, dfinal, du, 0, executor);
    if (both) {
      Vector<Complex> kept = initial, zero = Vector<Complex>::Zero(p);
      direction(layer, layer.back, factor, u, zero, true, dy, nullptr, du, p, executor);
      initial = kept;
    }
  }

 private:
  void direction(const DiagonalMimo<S>& layer, const Matrix<S>& read, S factor,
                 const ConstMatrixRef<S>& u, const Vector<Complex>& before, bool reverse,
                 const ConstMatrixRef<S>& dy, const Vector<Complex>* dfinal, MatrixRef<S> du,
                 Index first_column, ExecutorRef executor) {
    using Layer = DiagonalMimo<S>;
    const Index p = layer.modes(), h = layer.channels(), rows = u.rows();
    Matrix<Complex> x, lambda(rows, p), da(1, p);
    layer.states(u, before, reverse, x, executor);
    linear_backward_input(dy, read, Layer::real(lambda), executor);
    if (rows > 0 && dfinal != nullptr) lambda.row(rows - 1) += dfinal->transpose();
    Matrix<S> dread(2 * p, h), din(h, 2 * p);
    linear_backward_weight(Layer::real(x), dy, dread, executor);
    scan_backward(layer.a, x, lambda, da, lambda, initial, before, {.reverse = reverse}, executor);
    if (rows == 0 && dfinal != nullptr) initial = *dfinal;
    linear_accumulate_input(Layer::real(lambda), layer.in, du, executor);
    linear_backward_weight(u, Layer::real(lambda), din, executor);
    a += da.row(0).transpose();
    for (Index n = 0; n < p; ++n) {
      for (Index j = 0; j < h; ++j) {
        b(n, j) += Complex(din(j, 2 * n), din(j, 2 * n + 1));
        c(j, first_column + n) = factor * Complex(dread(2 * n, j), -dread(2 * n + 1, j));
      }
    }
  }
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
