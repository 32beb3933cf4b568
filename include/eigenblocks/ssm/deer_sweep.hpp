// Inside of deer.hpp: one sweep over a sequence, in blocks of rows.
//
// A sweep solves y_t = J_t y_{t-1} + (f_t - J_t prev_t).  With d = y - x, x the old iterate, that is
//
//   d_t = J_t d_{t-1} + r_t,     r_t = f(x_{t-1}, u_t) - x_t,     d before the first row = 0
//
// which needs no product for the right hand side and loses nothing near the solution.  Tiles of rows (r and J: products and
// element-wise work) are tasks of the executor; the scan over a finished block is one more task beside the tiles of the next.
// Tiles are cut by shape, so results do not depend on the number of workers.
#pragma once

#include <eigenblocks/core/scan.hpp>
#include <eigenblocks/ssm/elk.hpp>
#include <eigenblocks/ssm/recurrent_cell.hpp>

#include <array>
#include <cmath>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

/// What stands for the Jacobian df/dh in a sweep.
enum class DeerMethod {
  newton,    ///< itself (DEER): quadratic convergence, N^2 numbers a step
  quasi,     ///< its diagonal: N numbers a step, linear convergence
  su_const,  ///< the cell's constant_jacobian (kexue.fm 9783)
  jacobi     ///< 0: the states move on by one step a sweep, faster where f contracts
};

namespace detail {

inline constexpr double kDeerClip = 1e8;

/// How J is stored for a sweep.
enum class SweepMatrix { full, tangents, diagonal, constant, none };

/// The cell's own factored form for Newton, unless the filter of ELK needs the matrix.
template <RecurrentCell C>
SweepMatrix sweep_matrix(DeerMethod method, bool damped) {
  switch (method) {
    case DeerMethod::newton:
      return CellWithTangents<C> && !damped ? SweepMatrix::tangents : SweepMatrix::full;
    case DeerMethod::quasi:
      return SweepMatrix::diagonal;
    case DeerMethod::su_const:
      return SweepMatrix::constant;
    default:
      return SweepMatrix::none;
  }
}

/// Blocks of tiles over `rows` rows, and the pipeline that runs them.
struct SweepBlocks {
  Index rows, tile, tiles_per_block;
  bool pipelined;

  SweepBlocks(Index rows_in, Index n, SweepMatrix matrix, int workers)
      : rows(rows_in),
        tile(matrix == SweepMatrix::full ? std::clamp<Index>(65536 / (n * n), 16, 128) : 128),
        tiles_per_block(workers == 1 ? 1 : 4 * Index(workers)),
        pipelined(workers > 1) {}

  Index block() const { return tile * tiles_per_block; }
  Index count() const { return (rows + block() - 1) / block(); }
  Index first(Index b) const { return b * block(); }
  Index size(Index b) const { return std::min(block(), rows - first(b)); }
  Index tiles(Index b) const { return (size(b) + tile - 1) / tile; }

  /// prepare(b), then evaluate(b, first row in the block, rows, worker) for every tile, then finish(b), blocks in order;
  /// finish(b) runs beside the tiles of b + 1 where there are several workers.
  template <class Prepare, class Evaluate, class Finish>
  void run(ExecutorRef executor, Prepare&& prepare, Evaluate&& evaluate, Finish&& finish) const {
    const Index blocks = count();
    for (Index b = 0; b < blocks; ++b) {
      prepare(b);
      const Index ahead = pipelined && b > 0 ? 1 : 0;
      executor.run(tiles(b) + ahead, [&](Index task, int worker) {
        if (task < ahead) return finish(b - 1);
        const Index at = (task - ahead) * tile;
        evaluate(b, at, std::min(tile, size(b) - at), worker);
      });
      if (!pipelined) finish(b);
    }
    if (pipelined && blocks > 0) finish(blocks - 1);
  }
};

/// Numbers of scratch for the Jacobian of a tile, and the Jacobian itself as the sweep wants it.
template <RecurrentCell C>
class CellJacobians {
 public:
  using S = scalar_t<C>;
  static constexpr bool kDiagonal =
      requires(const C& cell, const ConstMatrixRef<S>& rows, MatrixRef<S> out) {
    cell.jacobian_diagonal(rows, rows, rows, out);
  }
  || requires(const C& cell, const ConstMatrixRef<S>& rows, MatrixRef<S> out, S* scratch) {
    cell.jacobian_diagonal(rows, rows, rows, out, scratch);
  };
  static constexpr bool kConstant = requires(const C& cell, MatrixRef<S> out) {
    cell.constant_jacobian(out);
  };

  /// Numbers kept for a row.
  static Index width(const C& cell, SweepMatrix matrix) {
    const Index n = cell.size();
    if constexpr (CellWithTangents<C>) {
      if (matrix == SweepMatrix::tangents) return cell.tangent_size();
    }
    return matrix == SweepMatrix::full ? n * n : matrix == SweepMatrix::diagonal ? n : 0;
  }
  static Index scratch(const C& cell, SweepMatrix matrix, Index rows) {
    const Index n = cell.size();
    return matrix == SweepMatrix::diagonal && !kDiagonal ? rows * n * n : 0;
  }

  /// to: rows x width(matrix) numbers.
  static void evaluate(const C& cell, SweepMatrix matrix, const ConstMatrixRef<S>& prev,
                       const ConstMatrixRef<S>& u, const ConstMatrixRef<S>& f, S* to,
                       S* cell_scratch, S* full) {
    const Index n = cell.size(), rows = prev.rows();
    if (matrix == SweepMatrix::full) {
      cell_jacobian<C>(cell, prev, u, f, Eigen::Map<Matrix<S>>(to, rows, n * n), cell_scratch);
    } else if (matrix == SweepMatrix::tangents) {
      if constexpr (CellWithTangents<C>) {
        Eigen::Map<Matrix<S>> tangents(to, rows, cell.tangent_size());
        if constexpr (CellWithScratch<C>) {
          cell.tangents(prev, u, f, tangents, cell_scratch);
        } else {
          cell.tangents(prev, u, f, tangents);
        }
      }
    } else if (matrix == SweepMatrix::diagonal) {
      Eigen::Map<Matrix<S>> diagonal(to, rows, n);
      if constexpr (!kDiagonal) {
        Eigen::Map<Matrix<S>> jacobian(full, rows, n * n);
        cell_jacobian<C>(cell, prev, u, f, jacobian, cell_scratch);
        for (Index i = 0; i < n; ++i) diagonal.col(i) = jacobian.col(i * n + i);
      } else if constexpr (CellWithScratch<C>) {
        cell.jacobian_diagonal(prev, u, f, diagonal, cell_scratch);
      } else {
        cell.jacobian_diagonal(prev, u, f, diagonal);
      }
    }
  }
};

/// When is a row of the iterate found, and what happens to runaway ones.
struct SweepRules {
  double atol = 0, rtol = 0;
  bool guard = false;
};

struct SweepResult {
  double residual = 0;  ///< max |new - old|
  Index found = 0;  ///< leading rows whose update (and, damped, residual) is within the tolerance
  bool first_bad = false;  ///< the guard changed the first row
};

/// Sweeps over the rows of x, in place.
template <RecurrentCell C>
class DeerSweep {
 public:
  using S = scalar_t<C>;

  DeerSweep(const C& cell, DeerMethod method, double observation_variance, Index rows,
            ExecutorRef executor)
      : cell_(cell),
        damped_(std::isfinite(observation_variance)),
        matrix_(sweep_matrix<C>(method, damped_)),
        executor_(executor),
        n_(cell.size()),
        filter_(n_, matrix_ == SweepMatrix::full && damped_, observation_variance),
        carry_(n_),
        next_(n_),
        multiply_scratch_(2 * n_) {
    const SweepBlocks blocks(rows, n_, matrix_, executor.workers());
    const Index block = std::min(blocks.block(), std::max<Index>(rows, 1));
    for (Slot& slot : slots_) {
      if (&slot != &slots_[0] && !blocks.pipelined) break;
      slot.update.resize(block, n_);
      slot.jacobian.resize(block * width());
    }
    for (Vector<S>& edge : edges_) edge.resize(n_);
    if (damped_) sizes_.resize(block);
    if (matrix_ == SweepMatrix::constant) {
      constant_.resize(n_, n_);
      if constexpr (CellJacobians<C>::kConstant) cell.constant_jacobian(constant_);
    }
    scratch_bytes_ = padded_bytes<S>(blocks.tile * n_) +
                     padded_bytes<S>(cell_scratch(cell, blocks.tile)) +
                     padded_bytes<S>(CellJacobians<C>::scratch(cell, matrix_, blocks.tile));
    workspace_.prepare(executor.workers(), scratch_bytes_);
  }

  bool damped() const { return damped_; }

  /// One sweep of x (all its rows) behind the state `initial`.
  SweepResult sweep(const ConstMatrixRef<S>& u, const S* initial, MatrixRef<S> x,
                    const SweepRules& rules) {
    const SweepBlocks blocks(x.rows(), n_, matrix_, executor_.workers());
    result_ = {};
    open_ = true;
    carry_.setZero();
    if (damped_) filter_.restart();
    edges_[0] = Eigen::Map<const Vector<S>>(initial, n_);
    blocks.run(
        executor_,
        [&](Index b) {  // the old row in front of the next block, before finish(b) overwrites it
          edges_[edge(b + 1)] = x.row(blocks.first(b) + blocks.size(b) - 1).transpose();
        },
        [&](Index b, Index at, Index rows, int worker) {
          evaluate(u, x, blocks.first(b), at, rows, edges_[edge(b)], slot(blocks, b), worker);
        },
        [&](Index b) {
          finish(x.middleRows(blocks.first(b), blocks.size(b)), blocks.first(b), slot(blocks, b),
                 rules);
        });
    return result_;
  }

 private:
  struct Slot {
    Matrix<S> update;
    Vector<S> jacobian;
  };

  static std::size_t edge(Index b) { return static_cast<std::size_t>(b % 2); }
  Slot& slot(const SweepBlocks& blocks, Index b) { return slots_[blocks.pipelined ? edge(b) : 0]; }
  Index width() const { return CellJacobians<C>::width(cell_, matrix_); }

  /// Residuals and Jacobians of the rows [first + at, first + at + rows).
  void evaluate(const ConstMatrixRef<S>& u, const MatrixRef<S>& x, Index first, Index at,
                Index rows, const Vector<S>& before, Slot& slot, int worker) {
    Arena arena = workspace_.arena(worker, scratch_bytes_);
    Eigen::Map<Matrix<S>> prev(arena.take<S>(rows * n_), rows, n_);
    S* const scratch = arena.take<S>(cell_scratch(cell_, rows));
    S* const full = arena.take<S>(CellJacobians<C>::scratch(cell_, matrix_, rows));
    if (at == 0) {
      prev.row(0) = before.transpose();
      prev.bottomRows(rows - 1) = x.middleRows(first, rows - 1);
    } else {
      prev = x.middleRows(first + at - 1, rows);
    }
    const auto inputs = u.middleRows(first + at, rows);
    auto update = slot.update.middleRows(at, rows);
    cell_forward<C>(cell_, prev, inputs, update, scratch);
    CellJacobians<C>::evaluate(cell_, matrix_, prev, inputs, update,
                               slot.jacobian.data() + at * width(), scratch, full);
    update -= x.middleRows(first + at, rows);
  }

  /// The scan over a block and the step to the new iterate.
  void finish(MatrixRef<S> x, Index first, Slot& slot, const SweepRules& rules) {
    const Index rows = x.rows();
    auto update = slot.update.topRows(rows);
    if (damped_) {
      for (Index t = 0; t < rows; ++t) sizes_[t] = update.row(t).cwiseAbs().maxCoeff();
      for (Index t = 0; t < rows; ++t) {
        filter_.row(slot.jacobian.data() + t * width(),
                    t == 0 ? carry_.data() : &slot.update(t - 1, 0), &slot.update(t, 0));
      }
    } else if (matrix_ == SweepMatrix::full) {
      scan_dense_forward(Eigen::Map<const Matrix<S>>(slot.jacobian.data(), rows * n_, n_), update,
                         update, carry_);
    } else if (matrix_ == SweepMatrix::tangents) {
      if constexpr (CellWithTangents<C>) {
        for (Index t = 0; t < rows; ++t) {
          cell_.multiply(slot.jacobian.data() + t * width(),
                         t == 0 ? carry_.data() : &slot.update(t - 1, 0), &slot.update(t, 0),
                         multiply_scratch_.data());
        }
      }
    } else if (matrix_ == SweepMatrix::diagonal) {
      scan_forward(Eigen::Map<const Matrix<S>>(slot.jacobian.data(), rows, n_), update, update,
                   carry_);
    } else if (matrix_ == SweepMatrix::constant) {
      scan_dense_forward(constant_, update, update, carry_);
    }
    next_ = update.row(rows - 1).transpose();
    for (Index t = 0; t < rows; ++t) {
      const bool within = step(&slot.update(t, 0), &x.coeffRef(t, 0), first + t == 0, rules) &&
                          (!damped_ || small(t, x, rules));
      open_ = open_ && within;
      if (open_) ++result_.found;
    }
    carry_.swap(next_);
  }

  bool small(Index t, const MatrixRef<S>& x, const SweepRules& rules) const {
    return static_cast<double>(sizes_[t]) <=
           rules.atol + rules.rtol * static_cast<double>(x.row(t).cwiseAbs().minCoeff());
  }

  /// x += update, guarded; true where every entry moved by no more than the tolerance.
  bool step(const S* update, S* x, bool first, const SweepRules& rules) {
    const S limit = rules.guard ? S(kDeerClip) : std::numeric_limits<S>::infinity();
    bool within = true, good = true;
    S largest = 0;
    for (Index j = 0; j < n_; ++j) {
      const S old = x[j];
      S now = old + update[j], by = std::abs(update[j]);
      if (!(std::abs(now) <= limit)) [[unlikely]] {
        good = false;
        if (rules.guard) {
          now = now > limit ? limit : now < -limit ? -limit : S(0);
          by = std::abs(now - old);
        }
      }
      within = within && by <= S(rules.atol) + S(rules.rtol) * std::abs(now);
      largest = by > largest || std::isnan(by) ? by : largest;  // (a NaN stays)
      x[j] = now;
    }
    if (static_cast<double>(largest) > result_.residual || std::isnan(largest)) {
      result_.residual = static_cast<double>(largest);
    }
    if (first && !good) result_.first_bad = true;
    return within && good;
  }

  const C& cell_;
  bool damped_;
  SweepMatrix matrix_;
  ExecutorRef executor_;
  Index n_;
  ElkFilter<S> filter_;
  Vector<S> carry_, next_, multiply_scratch_, sizes_;
  std::array<Slot, 2> slots_;
  std::array<Vector<S>, 2> edges_;
  Matrix<S> constant_;
  Workspace workspace_;
  std::size_t scratch_bytes_ = 0;
  SweepResult result_;
  bool open_ = true;
};

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
