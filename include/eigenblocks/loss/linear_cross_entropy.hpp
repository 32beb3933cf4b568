// Cross entropy of a linear output layer without ever holding the T x V logits.
//
//   x = h W^T + b;   if softcap > 0 (Gemma 2: 30)  x <- softcap tanh(x / softcap)
//   loss as in loss/cross_entropy.hpp
//
// Shapes: hidden h T x d, targets T, bias b V.  The weight W is V x d, one row per class like an
// embedding table (HeadLayout::class_rows), or d x V like any other weight, x = h W + b
// (HeadLayout::class_columns).
//
//   auto saved = linear_cross_entropy_forward(h, embedding, targets);
//   linear_cross_entropy_backward(saved, h, embedding, targets, 1.0, dh, d_embedding);
//
//   auto both = linear_cross_entropy_fused(h, embedding, targets, 1.0, dh, d_embedding);
//
// forward    takes tiles of token_tile x vocab_tile logits and keeps only the running log-sum-exp,
//            the target's logit and (with label smoothing) the sum of each row.
// backward   recomputes a tile, turns it into its gradient G in place, then dh += G W and
//            dW += G^T h.  With forward that makes four products ("Cut your losses", arXiv
//            2411.09009, without its lossy filter).
// fused      holds token_tile x V logits at a time and recomputes nothing: three products.  The
//            upstream gradient must be a number known beforehand, so Reduction::none is out
//            (Liger Kernel, arXiv 2410.10989).
//
// Memory beyond the operands: forward 256 x vocab_tile per worker and 24 bytes per token of a
// tile and vocabulary tile; backward token_tile x vocab_tile; fused token_tile x V; `saved` holds
// 2 T doubles.
//
// Values equal cross_entropy on explicit logits to rounding, for every tile size.  Every product is
// cut into blocks by shape and sums run in a fixed order: every executor gives the same bits.
//
// Errors: those of cross_entropy; invalid_argument for shapes, softcap < 0, token_tile < 0,
// vocab_tile < 1, and for linear_cross_entropy_fused with Reduction::none.
#pragma once

#include <eigenblocks/core/math.hpp>
#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/workspace.hpp>
#include <eigenblocks/loss/cross_entropy.hpp>

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class HeadLayout { class_rows, class_columns };

struct LinearCrossEntropyOptions {
  CrossEntropyOptions loss{};
  double softcap = 0;  ///< 0 = off
  HeadLayout layout = HeadLayout::class_rows;
  Index token_tile =
      0;  ///< 0: 1024, in the fused form max(256, T d / V) (its logits are then as large as h)
  Index vocab_tile = 1024;
};

namespace detail {

/// Output blocks of one task.  At 256 Eigen's product runs at about 85 % of its best speed, at 64
/// at 60 %; with tiles of 1024 it leaves 16 tasks.
inline constexpr Index kHeadBlock = 256;

inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

/// The output layer: its operands and what is done with a block of its logits.
template <RealScalar S>
struct LinearHead {
  const ConstMatrixRef<S>& hidden;
  const ConstMatrixRef<S>& weight;
  const S* bias;  ///< may be null
  std::span<const Index> targets;
  const LinearCrossEntropyOptions& options;
  Index valid;

  Index tokens() const { return hidden.rows(); }
  Index dim() const { return hidden.cols(); }
  bool class_rows() const { return options.layout == HeadLayout::class_rows; }
  Index classes() const { return class_rows() ? weight.rows() : weight.cols(); }

  /// Logits of tokens [t, t + x.rows()) and classes [v, v + x.cols()).
  void logits(Index t, Index v, MatrixRef<S> x) const {
    const auto rows = hidden.middleRows(t, x.rows());
    if (class_rows()) {
      product_nt<S>(rows, weight.middleRows(v, x.cols()), x);
    } else {
      product_nn<S>(rows, weight.middleCols(v, x.cols()), x);
    }
    using P = simd::Packet<S>;
    const P cap = simd::set1<P>(static_cast<S>(options.softcap));
    for (Index i = 0; i < x.rows(); ++i) {
      S* const row = x.data() + i * x.outerStride();
      if (bias != nullptr) x.row(i) += Eigen::Map<const RowVector<S>>(bias + v, x.cols());
      if (options.softcap > 0) {
        for_packets<S>(x.cols(), [&](Index j, auto io) {
          io.store(row + j, simd::mul(cap, simd::tanh(simd::div(io.load(row + j), cap))));
        });
      }
    }
  }

  /// Replaces those logits by their gradient.
  void gradient(const CrossEntropySaved& saved, const LossUpstream<S>& upstream, Index t, Index v,
                MatrixRef<S> x) const {
    using P = simd::Packet<S>;
    const double cap = options.softcap;
    const P one = simd::set1<P>(S(1)), per_cap = simd::set1<P>(static_cast<S>(1 / cap));
    for (Index i = 0; i < x.rows(); ++i) {
      S* const row = x.data() + i * x.outerStride();
      const Index y = targets[static_cast<std::size_t>(t + i)];
      if (y == options.loss.ignore_index) {
        std::fill_n(row, x.cols(), S(0));
        continue;
      }
      const LossSlope slope(loss_gamma(upstream, t + i, valid, options.loss), saved.lse[t + i],
                            classes(), options.loss);
      const bool has_target = y >= v && y < v + x.cols();
      const double target_logit = has_target ? static_cast<double>(row[y - v]) : 0.0;
      double at_target = slope.target(target_logit);
      if (cap > 0) {
        at_target *= 1 - target_logit / cap * (target_logit / cap);
        slope.row(row, row, x.cols(), [&](const P& g, const P& value) {
          const P ratio = simd::mul(value, per_cap);
          return simd::mul(g, simd::sub(one, simd::mul(ratio, ratio)));
        });
      } else {
        slope.row(row, row, x.cols());
      }
      if (has_target) row[y - v] = static_cast<S>(at_target);
    }
  }
};

/// Checks all that forward, backward and fused have in common; returns the number of valid targets.
template <RealScalar S>
Index check_head(const ConstMatrixRef<S>& hidden, const ConstMatrixRef<S>& weight,
                 const ConstVectorRef<S>* bias, std::span<const Index> targets,
                 const LinearCrossEntropyOptions& options) {
  const bool rows = options.layout == HeadLayout::class_rows;
  const Index classes = rows ? weight.rows() : weight.cols(), dim = hidden.cols();
  require_shape("linear_cross_entropy: weight", weight.rows(), weight.cols(), rows ? classes : dim,
                rows ? dim : classes,
                rows ? "classes x columns of hidden" : "columns of hidden x classes");
  if (bias != nullptr) {
    require_size("linear_cross_entropy: bias", bias->size(), classes, "one for each class");
  }
  require(options.softcap >= 0, "linear_cross_entropy: softcap (", options.softcap,
          ") must not be negative");
  require(options.token_tile >= 0, "linear_cross_entropy: token_tile (", options.token_tile,
          ") must not be negative");
  require(options.vocab_tile >= 1, "linear_cross_entropy: vocab_tile (", options.vocab_tile,
          ") must be at least 1");
  return check_cross_entropy(targets, hidden.rows(), classes, options.loss);
}

/// What one block of logits contributes to the loss of a token.
template <RealScalar S>
struct LossPart {
  RunningLogSumExp<S> lse;
  double sum = 0;
};

/// Losses of tokens [first, first + count) into `saved`.  The logits are left in `kept` (count x V)
/// unless it is null.
template <RealScalar S>
void head_losses(const LinearHead<S>& head, Index first, Index count, S* kept,
                 CrossEntropySaved& saved, Workspace& workspace, ExecutorRef executor) {
  const Index classes = head.classes(), width = std::min(head.options.vocab_tile, classes);
  const Index row_blocks = ceil_div(count, kHeadBlock), tiles = ceil_div(classes, width);
  std::vector<LossPart<S>> parts(static_cast<std::size_t>(count * tiles));
  std::vector<double> target_logits(static_cast<std::size_t>(count));
  const std::size_t bytes = padded_bytes<S>(std::min(count, kHeadBlock) * width);
  workspace.prepare(executor.workers());
  executor.run(row_blocks * tiles, [&](Index task, int worker) {
    const Index tile = task / row_blocks, v = tile * width, row = task % row_blocks * kHeadBlock;
    const Index rows = std::min(kHeadBlock, count - row), cols = std::min(width, classes - v);
    S* const data = kept != nullptr ? kept + row * classes + v
                                    : workspace.arena(worker, bytes).template take<S>(rows * cols);
    const Index stride = kept != nullptr ? classes : cols;
    head.logits(first + row, v,
                Eigen::Map<Matrix<S>, 0, Eigen::OuterStride<>>(data, rows, cols,
                                                               Eigen::OuterStride<>(stride)));
    for (Index i = 0; i < rows; ++i) {
      const S* const x = data + i * stride;
      LossPart<S>& part = parts[static_cast<std::size_t>((row + i) * tiles + tile)];
      for_row_parts(x, cols, [&](Index, const S* block, Index n) {
        part.lse.add(block, n);
        if (head.options.loss.label_smoothing > 0) part.sum += row_sum(block, n);
      });
      const Index y = head.targets[static_cast<std::size_t>(first + row + i)];
      if (y >= v && y < v + cols) {
        target_logits[static_cast<std::size_t>(row + i)] = static_cast<double>(x[y - v]);
      }
    }
  });
  for (Index i = 0; i < count; ++i) {
    LossPart<S> whole;
    for (Index tile = 0; tile < tiles; ++tile) {
      const LossPart<S>& part = parts[static_cast<std::size_t>(i * tiles + tile)];
      whole.lse.merge(part.lse);
      whole.sum += part.sum;
    }
    const bool ignored =
        head.targets[static_cast<std::size_t>(first + i)] == head.options.loss.ignore_index;
    saved.lse[first + i] = whole.lse.value();
    saved.losses[first + i] = ignored ? 0.0
                                      : whole.lse.loss(target_logits[static_cast<std::size_t>(i)],
                                                       whole.sum, classes, head.options.loss);
  }
}

/// Where the gradients go.
template <RealScalar S>
struct HeadGradients {
  MatrixRef<S>& hidden;
  MatrixRef<S>& weight;
  VectorRef<S>* bias;  ///< may be null
};

/// From the gradient G of the logits of tokens t.. and classes v..: dh += G W, dW += G^T h, db +=
/// column sums of G.  The first tile that touches an output overwrites it.
template <RealScalar S>
void head_products(const LinearHead<S>& head, Index t, Index v, const ConstMatrixRef<S>& gradient,
                   const HeadGradients<S>& out, ExecutorRef executor) {
  const Index dim_blocks = std::max<Index>(1, ceil_div(head.dim(), kHeadBlock));
  const Index weight_tasks = dim_blocks * ceil_div(gradient.cols(), kHeadBlock);
  const Index hidden_tasks = dim_blocks * ceil_div(gradient.rows(), kHeadBlock);
  const Write to_hidden = v == 0 ? Write::set : Write::add;
  const Write to_weight = t == 0 ? Write::set : Write::add;
  const bool class_rows = head.class_rows();
  executor.run(weight_tasks + hidden_tasks, [&](Index task, int) {
    const bool is_weight = task < weight_tasks;
    const Index block = (is_weight ? task : task - weight_tasks) / dim_blocks * kHeadBlock;
    const Index c = task % dim_blocks * kHeadBlock;  // weight_tasks is a multiple of dim_blocks
    const Index cols = std::min(kHeadBlock, head.dim() - c);
    if (!is_weight) {
      const Index rows = std::min(kHeadBlock, gradient.rows() - block);
      const auto g = gradient.middleRows(block, rows);
      auto dh = out.hidden.block(t + block, c, rows, cols);
      if (class_rows) {
        product_nn<S>(g, head.weight.block(v, c, gradient.cols(), cols), dh, to_hidden);
      } else {
        product_nt<S>(g, head.weight.block(c, v, cols, gradient.cols()), dh, to_hidden);
      }
      return;
    }
    const Index size = std::min(kHeadBlock, gradient.cols() - block);
    const auto g = gradient.middleCols(block, size);
    const auto h = head.hidden.block(t, c, gradient.rows(), cols);
    if (class_rows) {
      product_tn<S>(g, h, out.weight.block(v + block, c, size, cols), to_weight);
    } else {
      product_tn<S>(h, g, out.weight.block(c, v + block, cols, size), to_weight);
    }
    if (out.bias != nullptr && c == 0) {
      Eigen::Map<RowVector<S>> db(out.bias->data() + v + block, size);
      if (to_weight == Write::set) db.setZero();
      for (Index i = 0; i < g.rows(); ++i) db += g.row(i);
    }
  });
}

/// work(row block, column block as a view) for the 256 x 256 blocks of a tile.
template <RealScalar S, class Work>
void for_tile_blocks(MatrixRef<S> tile, ExecutorRef executor, Work&& work) {
  const Index across = ceil_div(tile.cols(), kHeadBlock), down = ceil_div(tile.rows(), kHeadBlock);
  executor.run(across * down, [&](Index task, int) {
    const Index i = task % down * kHeadBlock, j = task / down * kHeadBlock;
    work(i, j,
         MatrixRef<S>(tile.block(i, j, std::min(kHeadBlock, tile.rows() - i),
                                 std::min(kHeadBlock, tile.cols() - j))));
  });
}

template <RealScalar S>
void check_head_gradients(const LinearHead<S>& head, const HeadGradients<S>& out) {
  require_shape("linear_cross_entropy: dhidden", out.hidden.rows(), out.hidden.cols(),
                head.tokens(), head.dim(), "shape of hidden");
  require_shape("linear_cross_entropy: dweight", out.weight.rows(), out.weight.cols(),
                head.weight.rows(), head.weight.cols(), "shape of weight");
  if (out.bias != nullptr) {
    require_size("linear_cross_entropy: dbias", out.bias->size(), head.classes(), "size of bias");
  }
}

template <RealScalar S>
void head_forward(CrossEntropySaved& saved, const ConstMatrixRef<S>& hidden,
                  const ConstMatrixRef<S>& weight, const ConstVectorRef<S>* bias,
                  std::span<const Index> targets, const LinearCrossEntropyOptions& options,
                  ExecutorRef executor) {
  const Index valid = check_head(hidden, weight, bias, targets, options);
  const LinearHead<S> head{hidden,  weight,  bias != nullptr ? bias->data() : nullptr,
                           targets, options, valid};
  saved.valid = valid;
  saved.losses.resize(head.tokens());
  saved.lse.resize(head.tokens());
  const Index tile = options.token_tile > 0 ? options.token_tile : 1024;
  Workspace workspace;
  for (Index t = 0; t < head.tokens(); t += tile) {
    head_losses<S>(head, t, std::min(tile, head.tokens() - t), nullptr, saved, workspace, executor);
  }
  reduce_losses(saved, options.loss);
}

template <RealScalar S>
void head_backward(const CrossEntropySaved& saved, const ConstMatrixRef<S>& hidden,
                   const ConstMatrixRef<S>& weight, const ConstVectorRef<S>* bias,
                   std::span<const Index> targets, const LossUpstream<S>& upstream,
                   const HeadGradients<S>& out, const LinearCrossEntropyOptions& options,
                   ExecutorRef executor) {
  const Index valid = check_head(hidden, weight, bias, targets, options);
  const LinearHead<S> head{hidden,  weight,  bias != nullptr ? bias->data() : nullptr,
                           targets, options, valid};
  require_size("linear_cross_entropy: saved.lse", saved.lse.size(), head.tokens(),
               "rows of hidden");
  check_head_gradients(head, out);
  check_upstream(upstream, head.tokens(), options.loss);

  const Index tokens = head.tokens(), classes = head.classes();
  const Index height = std::min(tokens, options.token_tile > 0 ? options.token_tile : 1024);
  const Index width = std::min(classes, options.vocab_tile);
  ScratchBlock scratch;
  S* const data = reinterpret_cast<S*>(scratch.reserve(padded_bytes<S>(height * width)));
  for (Index t = 0; t < tokens; t += height) {
    for (Index v = 0; v < classes; v += width) {
      Eigen::Map<Matrix<S>> tile(data, std::min(height, tokens - t), std::min(width, classes - v));
      for_tile_blocks<S>(tile, executor, [&](Index i, Index j, MatrixRef<S> block) {
        head.logits(t + i, v + j, block);
        head.gradient(saved, upstream, t + i, v + j, block);
      });
      head_products<S>(head, t, v, tile, out, executor);
    }
  }
  if (tokens == 0) {
    out.weight.setZero();
    if (out.bias != nullptr) out.bias->setZero();
  }
}

template <RealScalar S>
void head_fused(CrossEntropySaved& saved, const ConstMatrixRef<S>& hidden,
                const ConstMatrixRef<S>& weight, const ConstVectorRef<S>* bias,
                std::span<const Index> targets, double upstream, const HeadGradients<S>& out,
                const LinearCrossEntropyOptions& options, ExecutorRef executor) {
  const Index valid = check_head(hidden, weight, bias, targets, options);
  const LinearHead<S> head{hidden,  weight,  bias != nullptr ? bias->data() : nullptr,
                           targets, options, valid};
  require(options.loss.reduction != Reduction::none,
          "linear_cross_entropy_fused: Reduction::none has no single upstream gradient; use "
          "linear_cross_entropy_forward and _backward");
  check_head_gradients(head, out);

  const Index tokens = head.tokens(), classes = head.classes();
  saved.valid = valid;
  saved.losses.resize(tokens);
  saved.lse.resize(tokens);
  const Index automatic = std::max<Index>(256, tokens * head.dim() / classes);
  const Index height = std::min(tokens, options.token_tile > 0 ? options.token_tile : automatic);
  ScratchBlock scratch;
  Workspace workspace;
  S* const data = reinterpret_cast<S*>(scratch.reserve(padded_bytes<S>(height * classes)));
  for (Index t = 0; t < tokens; t += height) {
    Eigen::Map<Matrix<S>> tile(data, std::min(height, tokens - t), classes);
    head_losses<S>(head, t, tile.rows(), data, saved, workspace, executor);
    for_tile_blocks<S>(tile, executor, [&](Index i, Index j, MatrixRef<S> block) {
      head.gradient(saved, LossUpstream<S>(upstream), t + i, j, block);
    });
    head_products<S>(head, t, 0, tile, out, executor);
  }
  if (tokens == 0) {
    out.weight.setZero();
    if (out.bias != nullptr) out.bias->setZero();
  }
  reduce_losses(saved, options.loss);
}

}  // namespace detail

/// Loss, per-token losses and log-sum-exps; formula, shapes and errors: top of the file.
template <MatrixLike H, MatrixLike W>
  requires SameScalar<H, W> && RealScalar<scalar_t<H>> CrossEntropySaved
  linear_cross_entropy_forward(const H& hidden, const W& weight, std::span<const Index> targets,
                               const LinearCrossEntropyOptions& options = {},
                               ExecutorRef executor = {}) {
    using S = scalar_t<H>;
    CrossEntropySaved saved;
    detail::head_forward<S>(saved, hidden, weight, nullptr, targets, options, executor);
    return saved;
  }

/// The same with a bias of V entries.
template <MatrixLike H, MatrixLike W>
  requires SameScalar<H, W> && RealScalar<scalar_t<H>> CrossEntropySaved
  linear_cross_entropy_forward(const H& hidden, const W& weight,
                               const std::type_identity_t<ConstVectorRef<scalar_t<H>>>& bias,
                               std::span<const Index> targets,
                               const LinearCrossEntropyOptions& options = {},
                               ExecutorRef executor = {}) {
    using S = scalar_t<H>;
    CrossEntropySaved saved;
    detail::head_forward<S>(saved, hidden, weight, &bias, targets, options, executor);
    return saved;
  }

/// Overwrites dhidden and dweight (shapes of hidden and weight, no overlap with them).  `saved` and
/// `options` are those of the forward pass; tile sizes may differ.  Errors: top of the file.
template <MatrixLike H, MatrixLike W, OutputMatrix DH, OutputMatrix DW>
  requires SameScalar<H, W, DH, DW> && RealScalar<scalar_t<H>>
void linear_cross_entropy_backward(const CrossEntropySaved& saved, const H& hidden, const W& weight,
                                   std::span<const Index> targets,
                                   const LossUpstream<scalar_t<H>>& upstream, DH&& dhidden,
                                   DW&& dweight, const LinearCrossEntropyOptions& options = {},
                                   ExecutorRef executor = {}) {
  using S = scalar_t<H>;
  MatrixRef<S> dh(dhidden), dw(dweight);
  detail::head_backward<S>(saved, hidden, weight, nullptr, targets, upstream, {dh, dw, nullptr},
                           options, executor);
}

/// The same with a bias; dbias (V) is overwritten too.
template <MatrixLike H, MatrixLike W, OutputMatrix DH, OutputMatrix DW>
  requires SameScalar<H, W, DH, DW> && RealScalar<scalar_t<H>>
void linear_cross_entropy_backward(const CrossEntropySaved& saved, const H& hidden, const W& weight,
                                   const std::type_identity_t<ConstVectorRef<scalar_t<H>>>& bias,
                                   std::span<const Index> targets,
                                   const LossUpstream<scalar_t<H>>& upstream, DH&& dhidden,
                                   DW&& dweight, std::type_identity_t<VectorRef<scalar_t<H>>> dbias,
                                   const LinearCrossEntropyOptions& options = {},
                                   ExecutorRef executor = {}) {
  using S = scalar_t<H>;
  MatrixRef<S> dh(dhidden), dw(dweight);
  detail::head_backward<S>(saved, hidden, weight, &bias, targets, upstream, {dh, dw, &dbias},
                           options, executor);
}

/// Loss and gradients (of `upstream` times the loss) in one go, three products instead of four;
/// dhidden and dweight are overwritten.  Not for Reduction::none.  Errors: top of the file.
template <MatrixLike H, MatrixLike W, OutputMatrix DH, OutputMatrix DW>
  requires SameScalar<H, W, DH, DW> && RealScalar<scalar_t<H>> CrossEntropySaved
  linear_cross_entropy_fused(const H& hidden, const W& weight, std::span<const Index> targets,
                             double upstream, DH&& dhidden, DW&& dweight,
                             const LinearCrossEntropyOptions& options = {},
                             ExecutorRef executor = {}) {
    using S = scalar_t<H>;
    MatrixRef<S> dh(dhidden), dw(dweight);
    CrossEntropySaved saved;
    detail::head_fused<S>(saved, hidden, weight, nullptr, targets, upstream, {dh, dw, nullptr},
                          options, executor);
    return saved;
  }

/// The same with a bias; dbias (V) is overwritten too.
template <MatrixLike H, MatrixLike W, OutputMatrix DH, OutputMatrix DW>
  requires SameScalar<H, W, DH, DW> && RealScalar<scalar_t<H>> CrossEntropySaved
  linear_cross_entropy_fused(const H& hidden, const W& weight,
                             const std::type_identity_t<ConstVectorRef<scalar_t<H>>>& bias,
                             std::span<const Index> targets, double upstream, DH&& dhidden,
                             DW&& dweight, std::type_identity_t<VectorRef<scalar_t<H>>> dbias,
                             const LinearCrossEntropyOptions& options = {},
                             ExecutorRef executor = {}) {
    using S = scalar_t<H>;
    MatrixRef<S> dh(dhidden), dw(dweight);
    CrossEntropySaved saved;
    detail::head_fused<S>(saved, hidden, weight, &bias, targets, upstream, {dh, dw, &dbias},
                          options, executor);
    return saved;
  }

EIGENBLOCKS_NAMESPACE_END
