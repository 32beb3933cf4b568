// HiPPO-LegS memory: N Legendre coefficients of the whole history of every channel, O(N) per input and channel.
// Sources: arXiv 2008.07669, kexue.fm 10114 and 10137, arXiv 2412.08595.
//
//   x' = (A x + B u)/t    discretised; the size of a time step drops out, the memory has no time scale to be chosen
//
//   auto memory = legs_memory<float>({.states = 64}, channels);                  // a regular value: a copy is a snapshot
//   legs_step(memory, rows);                                                     // any number of inputs, R x H
//   hippo_reconstruct(HippoMeasure::legs, points, memory.coefficients, past);    // basis.hpp: 0 is the beginning, 1 now
//   legs_forward(u, last, {.states = 64}, &states);                              // the whole sequence; states T x (N*H) or null
//   legs_backward(&dlast, &dstates, du, {.states = 64});                         // either upstream gradient may be null
//   legs_project(u, last);                                                       // the exact projection, by products
//
//   u T x H    coefficients, last N x H    states T x (N*H): row t, block n holds coefficient n of all channels after input t
//
// LegsTiming, how the weights of step k -> k + 1 are read off the ODE (lambda of the old, mu of the new state, f of the input):
//   paper        lambda = (1-alpha)/k   mu = alpha/(k+1)   f = 1/k               default; starts from u_0 e_0, exact for one input
//   code         all three over k + 1, starts from 0                              hippo-code, s4
//   consistent   as paper with f = lambda + mu                                    keeps a constant exactly; the most accurate
// Reconstruction error at T = 2000, N = 128, bilinear: consistent 2.3e-3, paper 7.4e-3, code 1.6e-2; the projection 1.0e-4.
// Bilinear has such a floor, so take T >= 20 N; backward stops at 0.24.  forward grows violently in the first N steps.
//
// zoh is exact for a signal that is constant between inputs (timing paper and consistent; the code's timing is one step
// late), but takes an exponential, O(N^3), at every step: for that signal legs_project gives the same numbers in O(N T).
//
// The backward pass keeps no state.  Steps other than zoh allocate nothing once a step has run; results are bitwise the same for
// every executor and every cut of the sequence.  Inputs of a NaN stay in their channel.
// Errors (invalid_argument, nothing written): states < 1, channels < 0, alpha outside [0, 1], wrong shapes.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/workspace.hpp>
#include <eigenblocks/ssm/discretize.hpp>
#include <eigenblocks/ssm/hippo.hpp>
#include <eigenblocks/ssm/legs_structure.hpp>

#include <cmath>
#include <cstring>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class LegsTiming { paper, code, consistent };

struct LegsOptions {
  Index states = 64;  ///< N
  Discretization method = Discretization::bilinear;
  double alpha = 0.5;  ///< of method gbt: 0 is forward, 1 backward
  LegsTiming timing = LegsTiming::paper;
};

/// The memory of H channels after `inputs` inputs.
template <RealScalar S>
struct LegsMemory {
  LegsOptions options;
  Matrix<S> coefficients;  ///< N x H, zero before the first input
  Index inputs = 0;
  Workspace scratch;  ///< no part of the value
};

namespace detail {

inline void require_legs(const LegsOptions& options) {
  require_hippo_states(HippoMeasure::legs, options.states);
  require_discretization({.method = options.method, .alpha = options.alpha});
  require(options.timing >= LegsTiming::paper && options.timing <= LegsTiming::consistent,
          "timing (", options.timing, ") is not a LegsTiming");
}

/// True where input `at` makes the state u e_0 by itself.
inline bool legs_starts(const LegsOptions& options, Index at) {
  return at == 0 && options.timing != LegsTiming::code;
}

/// The weights of the step that takes input `at` (0-based), not the first of the paper's timing.
struct LegsWeights {
  double lambda, mu, input;
};
inline LegsWeights legs_weights(const LegsOptions& options, Index at) {
  const double k = static_cast<double>(at);
  const double alpha = gbt_alpha({.method = options.method, .alpha = options.alpha});
  if (options.timing == LegsTiming::code) {
    return {(1 - alpha) / (k + 1), alpha / (k + 1), 1 / (k + 1)};
  }
  const double lambda = (1 - alpha) / k, mu = alpha / (k + 1);
  return {lambda, mu, options.timing == LegsTiming::paper ? 1 / k : lambda + mu};
}

/// e^(A log((k+1)/k)) of zoh; the code takes the k of the step after.
template <RealScalar S>
Matrix<S> legs_exponential(const Hippo& legs, const LegsOptions& options, Index at) {
  const double k = static_cast<double>(options.timing == LegsTiming::code ? at + 1 : at);
  return expm(std::log1p(1 / k) * legs.a).template cast<S>();
}

template <RealScalar S>
std::size_t legs_bytes(Index states) {
  return LegsCoefficients<S>::bytes(states) + padded_bytes<S>(states);
}

/// Inputs `at`, at + 1, ..: from `state`, whose last value stays there; every value goes to `states` as well unless null.
template <RealScalar S>
void legs_run(const LegsOptions& options, Index at, const ConstMatrixRef<S>& u, Matrix<S>& state,
              Matrix<S>* states, Workspace& workspace, ExecutorRef executor) {
  const Index n = options.states, channels = u.cols();
  if (u.size() == 0) return;
  if (options.method == Discretization::zoh) {
    const Hippo legs = hippo_matrix(HippoMeasure::legs, n);
    Matrix<S> next(n, channels);
    for (Index t = 0; t < u.rows(); ++t) {
      if (legs_starts(options, at + t)) {
        state.setZero();
      } else {  // int e^(sA) ds B = (1 - e^A) e_0, because A e_0 = -B
        state.row(0) -= u.row(t);
        product_nn<S>(legs_exponential<S>(legs, options, at + t), state, next);
        state.swap(next);
      }
      state.row(0) += u.row(t);
      if (states != nullptr)
        std::memcpy(states->row(t).data(), state.data(),
                    static_cast<std::size_t>(state.size()) * sizeof(S));
    }
    return;
  }
  // Rows of many channels lie a power of two apart, which the first cache dislikes: for several inputs a block is worth moving.
  const bool moved = states == nullptr && u.rows() >= 4 && channels > kLegsChannels;
  const std::size_t bytes =
      legs_bytes<S>(n) + (moved ? padded_bytes<S>(n * kLegsChannels) : std::size_t(0));
  workspace.prepare(executor.workers(), bytes);
  legs_channel_blocks(channels, executor, [&](Index first, Index count, int worker) {
    Arena arena = workspace.arena(worker, bytes);
    LegsCoefficients<S> c(arena, n);
    S* norms = arena.take<S>(n);
    legs_norms(norms, n);
    const Index stride = moved ? count : channels;
    S* home = state.data() + first;
    S* now = moved ? arena.take<S>(n * count) : home;
    const auto copy_block = [&](const S* from, Index from_stride, S* to, Index to_stride) {
      for (Index i = 0; i < n; ++i)
        std::memcpy(to + i * to_stride, from + i * from_stride,
                    static_cast<std::size_t>(count) * sizeof(S));
    };
    if (moved) copy_block(home, channels, now, stride);
    S carry[kLegsChannels];
    for (Index t = 0; t < u.rows(); ++t) {
      const S* input = u.data() + t * u.outerStride() + first;
      const S* from = now;
      if (states != nullptr) now = states->row(t).data() + first;
      if (legs_starts(options, at + t)) {
        for (Index i = 0; i < n; ++i)
          for (Index h = 0; h < count; ++h) now[i * stride + h] = i == 0 ? input[h] : S(0);
      } else {
        const LegsWeights weights = legs_weights(options, at + t);
        c.set(norms, static_cast<S>(weights.lambda), static_cast<S>(weights.mu));
        const S f = -static_cast<S>(weights.input);
        for (Index h = 0; h < count; ++h) carry[h] = f * input[h];
        legs_sweep<false, S>(c, count, from, stride, now, stride, carry);
      }
    }
    if (now != home) copy_block(now, stride, home, channels);
  });
}

}  // namespace detail

/// An empty memory of `channels` channels.
template <RealScalar S>
LegsMemory<S> legs_memory(const LegsOptions& options, Index channels) {
  detail::require_legs(options);
  detail::require(channels >= 0, "channels (", channels, ") must not be negative");
  LegsMemory<S> memory{.options = options, .coefficients = {}, .inputs = 0, .scratch = {}};
  memory.coefficients.setZero(options.states, channels);
  return memory;
}

/// Takes the rows of u, one input after the other.  `states`, unless null, R x (N*H), gets the coefficients after each.
template <MatrixLike U>
  requires RealScalar<scalar_t<U>>
void legs_step(LegsMemory<scalar_t<U>>& memory, const U& u, Matrix<scalar_t<U>>* states = nullptr,
               ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  detail::require_legs(memory.options);
  const Index n = memory.options.states, channels = memory.coefficients.cols();
  detail::require_shape("coefficients", memory.coefficients.rows(), channels, n, channels,
                        "states, channels");
  detail::require(memory.inputs >= 0, "inputs (", memory.inputs, ") must not be negative");
  detail::require_shape("u", u.rows(), u.cols(), u.rows(), channels, "inputs, channels");
  if (states != nullptr) {
    detail::require_shape("states", states->rows(), states->cols(), u.rows(), n * channels,
                          "inputs, states * channels");
  }
  detail::legs_run<S>(memory.options, memory.inputs, u, memory.coefficients, states, memory.scratch,
                      executor);
  memory.inputs += u.rows();
}

/// The coefficients after the last row of u (T x H) into `last` (N x H), and after every row into `states` (T x (N*H))
/// unless null.  The same numbers as legs_step from an empty memory; no input gives zeros.
template <MatrixLike U, OutputMatrix O>
  requires SameScalar<U, O> && RealScalar<scalar_t<U>>
void legs_forward(const U& u, O&& last, const LegsOptions& options = {},
                  std::type_identity_t<Matrix<scalar_t<U>>>* states = nullptr,
                  ExecutorRef executor = {}) {
  using S = scalar_t<U>;
  LegsMemory<S> memory = legs_memory<S>(options, u.cols());
  detail::require_shape("last", last.rows(), last.cols(), options.states, u.cols(),
                        "states, channels");
  legs_step(memory, u, states, executor);
  last = memory.coefficients;
}

/// The gradient with respect to u of <dlast, last> + <dstates, states>; null is zero.  Overwrites du (T x H).
template <OutputMatrix DU>
  requires RealScalar<scalar_t<DU>>
void legs_backward(const Matrix<scalar_t<DU>>* dlast, const Matrix<scalar_t<DU>>* dstates, DU&& du,
                   const LegsOptions& options = {}, ExecutorRef executor = {}) {
  using S = scalar_t<DU>;
  detail::require_legs(options);
  const Index n = options.states, steps = du.rows(), channels = du.cols();
  if (dlast != nullptr) {
    detail::require_shape("dlast", dlast->rows(), dlast->cols(), n, channels, "states, channels");
  }
  if (dstates != nullptr) {
    detail::require_shape("dstates", dstates->rows(), dstates->cols(), steps, n * channels,
                          "rows of du, states * channels");
  }
  if (du.size() == 0) return;
  MatrixRef<S> out = du;
  if (options.method == Discretization::zoh) {
    const Hippo legs = hippo_matrix(HippoMeasure::legs, n);
    Matrix<S> g = dlast != nullptr ? *dlast : Matrix<S>(Matrix<S>::Zero(n, channels));
    Matrix<S> before(n, channels);
    for (Index t = steps - 1; t >= 0; --t) {
      if (dstates != nullptr) g += Eigen::Map<const Matrix<S>>(dstates->row(t).data(), n, channels);
      out.row(t) = g.row(0);
      if (detail::legs_starts(options, t)) return;
      detail::product_tn<S>(detail::legs_exponential<S>(legs, options, t), g, before);
      out.row(t) -= before.row(0);
      g.swap(before);
    }
    return;
  }
  Workspace workspace;
  const std::size_t bytes =
      detail::legs_bytes<S>(n) + detail::padded_bytes<S>(n * detail::kLegsChannels);
  workspace.prepare(executor.workers(), bytes);
  detail::legs_channel_blocks(channels, executor, [&](Index first, Index count, int worker) {
    detail::Arena arena = workspace.arena(worker, bytes);
    detail::LegsCoefficients<S> c(arena, n);
    S* norms = arena.take<S>(n);
    detail::legs_norms(norms, n);
    S* g = arena.take<S>(n * count);
    for (Index i = 0; i < n; ++i) {
      for (Index h = 0; h < count; ++h)
        g[i * count + h] = dlast != nullptr ? (*dlast)(i, first + h) : S(0);
    }
    for (Index t = steps - 1; t >= 0; --t) {
      if (dstates != nullptr) {
        const S* from = dstates->row(t).data() + first;
        for (Index i = 0; i < n; ++i) {
          for (Index h = 0; h < count; ++h) g[i * count + h] += from[i * channels + h];
        }
      }
      S* to = out.data() + t * out.outerStride() + first;
      if (detail::legs_starts(options, t)) {
        std::copy(g, g + count, to);
        break;
      }
      // f B^T (I - mu A^T)^-1 g, which the sweep leaves behind: T = (lambda + mu) B^T (I - mu A^T)^-1 g.
      const detail::LegsWeights weights = detail::legs_weights(options, t);
      c.set(norms, static_cast<S>(weights.lambda), static_cast<S>(weights.mu));
      S carry[detail::kLegsChannels] = {};
      detail::legs_sweep<true, S>(c, count, g, count, g, count, carry);
      const S f = static_cast<S>(weights.input / (weights.lambda + weights.mu));
      for (Index h = 0; h < count; ++h) to[h] = f * carry[h];
    }
  });
}

// ---- The exact projection -----------------------------------------------------------------------

namespace detail {

inline constexpr Index kLegsTile = 256;  // samples of a product

/// Columns `first`, .. of the N x T matrix of the projection of a signal that is u_j on [j, j+1), T = `inputs`:
///   r_n [Q_n(2 (j+1)/T - 1) - Q_n(2 j/T - 1)],   Q_n = (P_{n+1} - P_{n-1})/(2 (2n+1)),  Q_0 = x/2.
inline void legs_projection_tile(Index inputs, Index first, MatrixRef<double> tile) {
  const Index n = tile.rows(), m = tile.cols();
  RowVector<double> x(m + 1);
  for (Index j = 0; j <= m; ++j)
    x[j] = static_cast<double>(2 * (first + j) - inputs) / static_cast<double>(inputs);
  RowVector<double> before = RowVector<double>::Ones(m + 1), now = x, next(m + 1);
  tile.row(0) = 0.5 * (x.tail(m) - x.head(m));
  for (Index i = 1; i < n; ++i) {
    const double degree = static_cast<double>(i);
    next = ((2 * degree + 1) * x.cwiseProduct(now) - degree * before) / (degree + 1);
    before = next - before;  // 2 (2n+1) Q_n
    tile.row(i) = (0.5 / legendre_norm(i)) * (before.tail(m) - before.head(m));
    before.swap(now);
    now.swap(next);
  }
}

}  // namespace detail

/// The first N Legendre coefficients of the step function with the values u (T x H), into last (N x H): what zoh in the
/// paper's timing arrives at, in O(N T) for each channel.  No input gives zeros.
template <MatrixLike U, OutputMatrix O>
  requires SameScalar<U, O> && RealScalar<scalar_t<U>>
void legs_project(const U& u, O&& last) {
  using S = scalar_t<U>;
  const Index n = last.rows(), inputs = u.rows();
  detail::require_hippo_states(HippoMeasure::legs, n);
  detail::require_shape("last", n, last.cols(), n, u.cols(), "states, channels");
  Matrix<double> sum = Matrix<double>::Zero(n, u.cols()), tile;
  for (Index first = 0; first < inputs; first += detail::kLegsTile) {
    const Index m = std::min(detail::kLegsTile, inputs - first);
    tile.resize(n, m);
    detail::legs_projection_tile(inputs, first, tile);
    detail::product_nn<double>(tile, u.middleRows(first, m).template cast<double>(), sum,
                               detail::Write::add);
  }
  last = sum.template cast<S>();
}

/// Its gradient: du (T x H) from dlast (N x H); overwrites.
template <MatrixLike G, OutputMatrix DU>
  requires SameScalar<G, DU> && RealScalar<scalar_t<G>>
void legs_project_backward(const G& dlast, DU&& du) {
  using S = scalar_t<G>;
  const Index n = dlast.rows(), inputs = du.rows();
  detail::require_hippo_states(HippoMeasure::legs, n);
  detail::require_shape("dlast", n, dlast.cols(), n, du.cols(), "states, channels");
  const Matrix<double> upstream = dlast.template cast<double>();
  Matrix<double> tile, rows;
  for (Index first = 0; first < inputs; first += detail::kLegsTile) {
    const Index m = std::min(detail::kLegsTile, inputs - first);
    tile.resize(n, m);
    rows.resize(m, du.cols());
    detail::legs_projection_tile(inputs, first, tile);
    detail::product_tn<double>(tile, upstream, rows);
    du.middleRows(first, m) = rows.template cast<S>();
  }
}

EIGENBLOCKS_NAMESPACE_END
