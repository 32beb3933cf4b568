// Muon: momentum, orthogonalised by a Newton-Schulz iteration, for hidden matrices.
//
//   buf <- mu buf + (1 - mu) G
//   U    = nesterov ? (1 - mu) G + mu buf : buf
//   W   <- (1 - lr weight_decay) W - lr scale newton_schulz(U)
//
//   newton_schulz(M):   X = M / max(|M|_F, eps)
//                       `steps` times  X <- a X + (b A + c A^2) X,   A = X X^T
//
//   MuonState<float> state;                    // one per matrix, kept between steps
//   muon_step(weight, d_weight, state, {.lr = 0.02, .weight_decay = 0.1});
//
// The iteration acts on every singular value as p(s) = a s + b s^3 + c s^5 and leaves the singular
// vectors alone.  The default triple (3.4445, -4.7750, 2.0315) brings them near 1 quickly (five
// steps: 0.68 .. 1.14 from 0.01 on) but does not converge to 1; (15/8, -10/8, 3/8) and
// (2, -1.5, 0.5) do, slowly.  A `schedule` gives every step its own triple, which is what Polar
// Express (arXiv 2505.16932) needs.
//
// Weights are fan_in x fan_out (MuonLayout::in_out, this library's) or fan_out x fan_in (out_in,
// PyTorch's).  The scale:
//   original             sqrt(max(1, fan_out / fan_in))      K. Jordan, torch.optim.Muon; lr 0.02
//   match_rms_adamw      0.2 sqrt(max(fan_in, fan_out))      Moonlight, arXiv 2502.16982: takes
//                                                            AdamW's lr and weight decay unchanged
//   spectral_unclamped   sqrt(fan_out / fan_in)              Bernstein, muP
//   naive                1
// `heads` > 1 cuts fan_out into that many equal blocks, each a matrix of its own.
//
// Use it for hidden matrices (Wq, Wk, Wv apart, Wo, feed-forward); AdamW for embeddings, output
// head, gains, biases.
//
// Cost: with k = min, n = max of the two sizes, one step of the iteration is k^2 n (A), k^3 (A^2)
// and 2 k^2 n flop: of symmetric products only half of the blocks are computed, always on the
// smaller side, without a transposed copy.
// Memory: the momentum, and scratch of 2 k n + 2 k^2 numbers, made at the first step and kept in
// the state; later steps allocate nothing but what Eigen's products may need to pack operands.
// Copies and comparisons of a state concern the momentum alone.  A run resumed from it gives equal
// bits, and so does every executor.
//
// A zero gradient gives a zero update; a non-finite M gives NaN.
// Sources: K. Jordan, "Muon: an optimizer for hidden layers" (2024); kexue.fm 10592, 10739, 11416;
// torch.optim.Muon, which computes in bfloat16 where this code stays in S.
#pragma once

#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/workspace.hpp>
#include <eigenblocks/optim/clip.hpp>
#include <eigenblocks/optim/tensor_ref.hpp>

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

struct NewtonSchulzCoefficients {
  double a = 3.4445, b = -4.7750, c = 2.0315;
};

struct NewtonSchulzOptions {
  Index steps = 5;  ///< 0 .. 99
  NewtonSchulzCoefficients coefficients{};
  /// If not empty: the coefficients of step 1, 2, ... in place of `coefficients`, the last for all
  /// further steps.
  std::span<const NewtonSchulzCoefficients> schedule{};
  double eps = 1e-7;  ///< smallest norm divided by; > 0
};

enum class MuonAdjust { original, match_rms_adamw, spectral_unclamped, naive };
enum class MuonLayout { in_out, out_in };

struct MuonOptions {
  double lr = 1e-3;        ///< >= 0
  double momentum = 0.95;  ///< mu >= 0
  bool nesterov = true;
  double weight_decay = 0.1;  ///< >= 0; multiplied by lr, not by the scale
  MuonAdjust adjust = MuonAdjust::original;
  MuonLayout layout = MuonLayout::in_out;
  Index heads = 1;  ///< divides fan_out
  NewtonSchulzOptions newton_schulz{};
};

template <RealScalar S>
struct MuonState {
  Matrix<S> momentum{};   ///< shape of the weight; empty before the first step
  Workspace workspace{};  ///< scratch, not part of the value

  friend bool operator==(const MuonState& a, const MuonState& b) {
    return detail::same_matrix(a.momentum, b.momentum);
  }
};

/// The factor on the orthogonalised update; table at the top.
inline double muon_scale(Index fan_in, Index fan_out, MuonAdjust adjust) {
  const double in = static_cast<double>(fan_in), out = static_cast<double>(fan_out);
  switch (adjust) {
    case MuonAdjust::original:
      return std::sqrt(std::max(1.0, out / in));
    case MuonAdjust::match_rms_adamw:
      return 0.2 * std::sqrt(std::max(in, out));
    case MuonAdjust::spectral_unclamped:
      return std::sqrt(out / in);
    case MuonAdjust::naive:
      break;
  }
  return 1.0;
}

namespace detail {

inline void check_newton_schulz(const NewtonSchulzOptions& options) {
  require(options.steps >= 0 && options.steps < 100, "newton_schulz: steps (", options.steps,
          ") must be in [0, 100)");
  require(options.eps > 0, "newton_schulz: eps (", options.eps, ") must be positive");
}

/// Scratch of one iteration: two matrices of the size of X, two of its Gram matrix.
template <RealScalar S>
struct NewtonSchulzScratch {
  S *x, *next, *gram, *polynomial;

  NewtonSchulzScratch(Workspace& workspace, Index rows, Index cols) {
    const Index size = rows * cols, side = std::min(rows, cols);
    Arena arena = workspace.shared(2 * padded_bytes<S>(size) + 2 * padded_bytes<S>(side * side));
    x = arena.take<S>(size);
    next = arena.take<S>(size);
    gram = arena.take<S>(side * side);
    polynomial = arena.take<S>(side * side);
  }
};

/// block(i, j, rows, cols) for the blocks on and below the diagonal of a symmetric side x side
/// matrix.  Measured: blocks of 64 are best up to 512, 128 beyond; both reach 1.5 times the rate of
/// the full product at 1024.
template <class F>
void for_lower_blocks(Index side, ExecutorRef executor, F&& block) {
  const Index size = side <= 512 ? 64 : 128, count = (side + size - 1) / size;
  executor.run(count * (count + 1) / 2, [&](Index task, int) {
    Index i = 0, j = task;  // row i of the triangle has i + 1 blocks
    while (j > i) j -= ++i;
    i *= size;
    j *= size;
    block(i, j, std::min(size, side - i), std::min(size, side - j));
  });
}

/// out(rows x cols) = a (rows x k) b (k x cols), in blocks of 256 x 256.
template <RealScalar S>
void blocked_product(const ConstMatrixRef<S>& a, const ConstMatrixRef<S>& b, MatrixRef<S> out,
                     ExecutorRef executor) {
  constexpr Index size = 256;
  const Index down = (out.rows() + size - 1) / size, across = (out.cols() + size - 1) / size;
  executor.run(down * across, [&](Index task, int) {
    const Index i = task / across * size, j = task % across * size;
    const Index rows = std::min(size, out.rows() - i), cols = std::min(size, out.cols() - j);
    product_nn<S>(a.middleRows(i, rows), b.middleCols(j, cols), out.block(i, j, rows, cols));
  });
}

/// Normalises and iterates scratch.x (rows x cols, contiguous); returns where the result is
/// (scratch.x or .next).
template <RealScalar S>
S* newton_schulz_in_scratch(NewtonSchulzScratch<S> scratch, Index rows, Index cols,
                            const NewtonSchulzOptions& options, ExecutorRef executor) {
  using View = Eigen::Map<Matrix<S>>;
  const TensorRef<S> start(scratch.x, rows, cols, cols);
  const double norm = joint_norm<S>({&start, 1}, executor);
  // Written so that a NaN norm is kept.
  scale_tensor(start, static_cast<S>(1.0 / (norm < options.eps ? options.eps : norm)), executor);

  const bool wide = rows <= cols;
  const Index side = std::min(rows, cols);
  View gram(scratch.gram, side, side), polynomial(scratch.polynomial, side, side);
  for (Index step = 0; step < options.steps; ++step) {
    const Index planned = static_cast<Index>(options.schedule.size());
    const NewtonSchulzCoefficients& use =
        planned == 0 ? options.coefficients
                     : options.schedule[static_cast<std::size_t>(std::min(step, planned - 1))];
    const View x(scratch.x, rows, cols);
    for_lower_blocks(side, executor, [&](Index i, Index j, Index ni, Index nj) {
      auto block = gram.block(i, j, ni, nj);
      if (wide) {
        product_nt<S>(x.middleRows(i, ni), x.middleRows(j, nj), block);
      } else {
        product_tn<S>(x.middleCols(i, ni), x.middleCols(j, nj), block);
      }
      if (i != j) gram.block(j, i, nj, ni) = block.transpose();
    });
    // a I + b A + c A^2: with the a inside, X <- polynomial X is a plain product.
    for_lower_blocks(side, executor, [&](Index i, Index j, Index ni, Index nj) {
      auto block = polynomial.block(i, j, ni, nj);
      product_nt<S>(gram.middleRows(i, ni), gram.middleRows(j, nj), block);
      block = static_cast<S>(use.c) * block + static_cast<S>(use.b) * gram.block(i, j, ni, nj);
      if (i == j) {
        block.diagonal().array() += static_cast<S>(use.a);
      } else {
        polynomial.block(j, i, nj, ni) = block.transpose();
      }
    });
    View next(scratch.next, rows, cols);
    if (wide) {
      blocked_product<S>(polynomial, x, next, executor);
    } else {
      blocked_product<S>(x, polynomial, next, executor);
    }
    std::swap(scratch.x, scratch.next);
  }
  return scratch.x;
}

}  // namespace detail

/// out = `steps` iterations on g (m x n, any shape; out has the same and may be g).  `workspace`
/// keeps the scratch for further calls.  Errors: invalid_argument for shapes, steps outside [0,
/// 100), eps <= 0.
template <MatrixLike G, OutputMatrix O>
  requires SameScalar<G, O> && RealScalar<scalar_t<G>>
void newton_schulz(const G& g, O&& out, const NewtonSchulzOptions& options, Workspace& workspace,
                   ExecutorRef executor = {}) {
  using S = scalar_t<G>;
  detail::check_newton_schulz(options);
  const Index rows = g.rows(), cols = g.cols();
  detail::require_shape("newton_schulz: out", out.rows(), out.cols(), rows, cols, "shape of g");
  if (rows == 0 || cols == 0) return;
  const detail::NewtonSchulzScratch<S> scratch(workspace, rows, cols);
  Eigen::Map<Matrix<S>>(scratch.x, rows, cols) = ConstMatrixRef<S>(g);
  const S* const result = detail::newton_schulz_in_scratch(scratch, rows, cols, options, executor);
  MatrixRef<S> target(out);
  target = Eigen::Map<const Matrix<S>>(result, rows, cols);
}

/// The same by value.
template <MatrixLike G>
  requires RealScalar<scalar_t<G>> Matrix<scalar_t<G>> newton_schulz(
      const G& g, const NewtonSchulzOptions& options = {}, ExecutorRef executor = {}) {
    Matrix<scalar_t<G>> out(g.rows(), g.cols());
    Workspace workspace;
    newton_schulz(g, out, options, workspace, executor);
    return out;
  }

/// One step: updates `weight` and `state` in place.  `grad` has the shape of `weight` and must not
/// overlap it.
/// Errors: invalid_argument for a shape that differs between weight, grad and a started state, for
/// lr, momentum or weight_decay negative, for heads that do not divide fan_out, and those of
/// newton_schulz.
template <OutputMatrix W, MatrixLike G>
  requires SameScalar<W, G> && RealScalar<scalar_t<W>>
void muon_step(W&& weight, const G& grad, MuonState<scalar_t<W>>& state,
               const MuonOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<W>;
  detail::require(options.lr >= 0, "muon_step: lr (", options.lr, ") must not be negative");
  detail::require(options.momentum >= 0, "muon_step: momentum (", options.momentum,
                  ") must not be negative");
  detail::require(options.weight_decay >= 0, "muon_step: weight_decay (", options.weight_decay,
                  ") must not be negative");
  detail::check_newton_schulz(options.newton_schulz);
  const Index rows = weight.rows(), cols = weight.cols();
  detail::require_shape("muon_step: grad", grad.rows(), grad.cols(), rows, cols, "shape of weight");
  const bool in_out = options.layout == MuonLayout::in_out;
  const Index fan_out = in_out ? cols : rows;
  detail::require(options.heads >= 1 && fan_out % options.heads == 0, "muon_step: heads (",
                  options.heads, ") must divide fan_out (", fan_out, ")");
  if (state.momentum.size() > 0) {
    detail::require_shape("muon_step: state.momentum", state.momentum.rows(), state.momentum.cols(),
                          rows, cols, "shape of weight");
  } else {
    state.momentum.setZero(rows, cols);
  }
  if (rows == 0 || cols == 0) return;

  using P = simd::Packet<S>;
  const auto constant = [](double value) { return simd::set1<P>(static_cast<S>(value)); };
  const P mu = constant(options.momentum), fresh = constant(1.0 - options.momentum);
  const auto accumulate = [&](S* buf, const S* gradient, S* update) {
    const P g = simd::load<P>(gradient), old = simd::load<P>(buf);
    const P m = simd::fma(fresh, simd::sub(g, old), old);
    simd::store<P>(buf, m);
    simd::store<P>(update, options.nesterov ? simd::fma(mu, m, simd::mul(fresh, g)) : m);
  };

  const Index block_out = fan_out / options.heads, fan_in = in_out ? rows : cols;
  const Index block_rows = in_out ? rows : block_out, block_cols = in_out ? block_out : cols;
  const P keep = constant(1.0 - options.lr * options.weight_decay);
  const P rate = constant(options.lr * muon_scale(fan_in, block_out, options.adjust));
  const auto apply = [&](S* w, const S* o) {
    simd::store<P>(w,
                   simd::sub(simd::mul(keep, simd::load<P>(w)), simd::mul(rate, simd::load<P>(o))));
  };

  MatrixRef<S> w(weight);
  S* const w_data = w.data();
  const Index w_stride = w.outerStride();
  const ConstMatrixRef<S> g(grad);
  const detail::NewtonSchulzScratch<S> scratch(state.workspace, block_rows, block_cols);
  const detail::Pieces pieces(block_rows, block_cols, false);
  for (Index head = 0; head < options.heads; ++head) {
    const Index top = in_out ? 0 : head * block_out, left = in_out ? head * block_out : 0;
    executor.run(pieces.count(), [&](Index task, int) {
      pieces.visit(task, [&](Index row, Index col, Index n) {
        const Index i = top + row, j = left + col;
        detail::for_each_packet<S>(n, accumulate, state.momentum.data() + i * cols + j,
                                   g.data() + i * g.outerStride() + j,
                                   scratch.x + row * block_cols + col);
      });
    });
    const S* const update = detail::newton_schulz_in_scratch(scratch, block_rows, block_cols,
                                                             options.newton_schulz, executor);
    executor.run(pieces.count(), [&](Index task, int) {
      pieces.visit(task, [&](Index row, Index col, Index n) {
        detail::for_each_packet<S>(n, apply, w_data + (top + row) * w_stride + left + col,
                                   update + row * block_cols + col);
      });
    });
  }
}

EIGENBLOCKS_NAMESPACE_END
