// Long causal convolution along time, one kernel per channel, with gradients.
//
//   y_t = sum_{j <= min(t, L-1)} k_j u_{t-j} + D u_t        u, y: T x H      k: L x H, any L      D: H entries, or none
//
//   causal_conv(u, k, y, skip);                              // skip is D
//   CausalConvSaved<float> saved;                            // keeps its memory from call to call
//   causal_conv_forward(saved, u, k, y, skip, {}, pool);
//   causal_conv_backward(saved, u, k, dy, du, dk, dskip, skip, pool);
//
//   du_s = sum_{t >= s} k_{t-s} dy_t + D dy_s        dk_j = sum_t dy_t u_{t-j}        dD = sum_t dy_t u_t
//
// Methods, equal up to rounding (the automatic choice takes the one with the least work, by the shape alone):
//   direct         T min(L, T) products per channel; for short kernels or sequences
//   fft            one transform of a power of two >= T + min(L, T) - 1; errors grow like eps log n |k| |u|
//   overlap_save   transforms of a few L: for L << T, with less memory
// The fft method keeps the spectra of k and u in `saved` (2 n numbers per channel): 3 transforms forward, 3 backward.
// Decode with the recurrence that made the kernel, or with the last L - 1 inputs and `direct`.
//
// y must not be u, nor du dy.  Blocks of 64 bytes of channels are the tasks of an executor; nothing depends on its workers.
// Errors: invalid_argument for shapes, L = 0 with T > 0, a block that is not a power of two >= 2 min(L, T) (or of another method),
// a `saved` that belongs to other shapes.       float and double.
// Source: S4, arXiv 2111.00396; kexue.fm 10162.  Short depthwise convolutions: nn/conv1d.hpp.
#pragma once

#include <eigenblocks/core/convolution_kernel.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/fft.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class ConvMethod { automatic, direct, fft, overlap_save };

struct CausalConvOptions {
  ConvMethod method = ConvMethod::automatic;
  Index block =
      0;  ///< overlap_save: length of its transforms, a power of two >= 2 min(L, T); 0: chosen
};

/// How a convolution of `rows` samples with `taps` <= rows coefficients is done.
struct CausalConvPlan {
  ConvMethod method = ConvMethod::direct;
  Index rows = 0, taps = 0, size = 0;  ///< size: length of the transforms, 0 if direct
  friend bool operator==(const CausalConvPlan&, const CausalConvPlan&) = default;
};

namespace detail {

inline Index power_of_two_from(Index n) {
  return static_cast<Index>(std::bit_ceil(static_cast<std::uint64_t>(std::max<Index>(n, 2))));
}

/// Work in units of one multiply-add per channel; kTransform of them per point and level of a transform (measured).
inline constexpr double kTransform = 0.8;
inline double transform_cost(Index n) {
  return kTransform * static_cast<double>(n) *
         static_cast<double>(std::bit_width(static_cast<std::uint64_t>(n)));
}
inline double overlap_cost(Index rows, Index taps, Index n) {
  const Index blocks = (rows + n - taps) / (n - taps + 1);
  return (1 + 2 * static_cast<double>(blocks)) * transform_cost(n);
}

inline Index overlap_block(Index rows, Index taps) {
  Index best = power_of_two_from(2 * taps);
  for (Index n = 2 * best; n <= power_of_two_from(rows + taps); n *= 2) {
    if (overlap_cost(rows, taps, n) < overlap_cost(rows, taps, best)) best = n;
  }
  return best;
}

}  // namespace detail

/// The plan for T rows and L coefficients.  Errors: as above.
inline CausalConvPlan causal_conv_plan(Index rows, Index taps,
                                       const CausalConvOptions& options = {}) {
  detail::require(taps >= 1 || rows == 0, "kernel has 0 rows, expected at least 1");
  CausalConvPlan plan{
      .method = options.method, .rows = rows, .taps = std::min(rows, taps), .size = 0};
  detail::require(options.block == 0 || options.method == ConvMethod::overlap_save, "block (",
                  options.block, ") must be 0 unless method is overlap_save");
  detail::require(
      options.block == 0 || (options.block >= 2 * plan.taps && options.block >= 2 &&
                             std::has_single_bit(static_cast<std::uint64_t>(options.block))),
      "block (", options.block, ") must be a power of two, at least ",
      std::max<Index>(2, 2 * plan.taps), " (2 min(L, T))");
  const Index whole = detail::power_of_two_from(rows + plan.taps - 1);
  const Index block = options.block != 0 ? options.block : detail::overlap_block(rows, plan.taps);
  if (plan.method == ConvMethod::automatic) {
    const double direct = static_cast<double>(rows) * static_cast<double>(plan.taps);
    const double transforms = 3 * detail::transform_cost(whole);
    const double blocks = detail::overlap_cost(rows, plan.taps, block);
    plan.method = direct <= std::min(transforms, blocks) ? ConvMethod::direct
                  : blocks < transforms                  ? ConvMethod::overlap_save
                                                         : ConvMethod::fft;
  }
  if (plan.method == ConvMethod::fft) plan.size = whole;
  if (plan.method == ConvMethod::overlap_save) plan.size = block;
  return plan;
}

/// What the backward pass needs of the forward pass, and tables and memory that later calls use again.
template <RealScalar S>
class CausalConvSaved {
 public:
  const CausalConvPlan& plan() const { return plan_; }
  Index channels() const { return channels_; }
  std::size_t bytes() const { return sizeof(S) * (kernel_.capacity() + input_.capacity()); }

  // For the functions below.
  const detail::RealFftTables<S>& prepare(const CausalConvPlan& plan, Index channels, bool keep) {
    plan_ = plan;
    channels_ = channels;
    const Index size = std::max<Index>(plan.size, 2);
    if (!tables_ || tables_->size() != size) tables_.emplace(size);
    if (keep && plan.method == ConvMethod::fft) {
      const Index blocks = (channels + detail::kFftLanes<S> - 1) / detail::kFftLanes<S>;
      kernel_.resize(static_cast<std::size_t>(blocks * size * detail::kFftLanes<S>));
      input_.resize(kernel_.size());
    }
    return tables_->tables();
  }
  const detail::RealFftTables<S>& tables() const { return tables_->tables(); }
  S* kernel(Index first) { return kernel_.data() + first * plan_.size; }
  S* input(Index first) { return input_.data() + first * plan_.size; }
  const S* kernel(Index first) const { return kernel_.data() + first * plan_.size; }
  const S* input(Index first) const { return input_.data() + first * plan_.size; }
  Workspace& workspace() { return workspace_; }

 private:
  CausalConvPlan plan_;
  Index channels_ = 0;
  std::optional<RealFft<S>> tables_;
  std::vector<S> kernel_, input_;  // spectra of blocks of channels
  Workspace workspace_;
};

namespace detail {

inline void require_causal_conv(Index channels, Index k_cols, Index skip_size) {
  require(k_cols == channels, "kernel has ", k_cols, " columns, expected ", channels,
          " (channels of u)");
  require(skip_size == 0 || skip_size == channels, "skip has ", skip_size, " entries, expected ",
          channels, " (channels), or none");
}

template <RealScalar S>
void causal_conv(CausalConvSaved<S>& saved, bool keep, const ConstMatrixRef<S>& u,
                 const ConstMatrixRef<S>& k, MatrixRef<S> y, const ConstVectorRef<S>& skip,
                 const CausalConvPlan& plan, ExecutorRef executor) {
  const RealFftTables<S>& t = saved.prepare(plan, u.cols(), keep);
  if (plan.rows == 0) return;
  constexpr Index kLanes = kFftLanes<S>;
  const Index n = plan.size, taps = plan.taps, buffer = n * kLanes;
  const auto u_all = channel_rows(u), k_all = channel_rows(k);
  const auto y_all = channel_rows(y);
  for_channel_blocks<S>(
      u.cols(), 2 * buffer, executor, &saved.workspace(), [&](Index first, Index lanes, S* z) {
        const auto input = u_all.columns(first);
        auto kernel = k_all.columns(first);
        const auto out = y_all.columns(first);
        kernel.rows = taps;
        const S* const d = skip.size() == 0 ? nullptr : skip.data() + first;
        if (plan.method == ConvMethod::direct) {
          return direct_block<1, -1>(kernel, input, d, input, out, lanes);
        }
        const bool whole = plan.method == ConvMethod::fft;
        S* const kf = whole && keep ? saved.kernel(first) : z + buffer;
        load_block(kernel, 0, 0, n, lanes, kf);
        t.inner().forward(kf);
        block_spectrum(t, kf, kf);
        const Index lead = whole ? 0 : taps - 1, step = whole ? plan.rows : n - taps + 1;
        for (Index at = 0; at < plan.rows; at += step) {
          load_block(input, at - lead, 0, n, lanes, z);
          t.inner().forward(z);
          block_product(t, z, kf, whole && keep ? saved.input(first) : nullptr);
          t.inner().inverse(z);
          store_block<false>(t, z, lead, std::min(step, plan.rows - at), out, at, d, input, lanes);
        }
      });
}

template <RealScalar S>
void causal_conv_backward(CausalConvSaved<S>& saved, const ConstMatrixRef<S>& u,
                          const ConstMatrixRef<S>& k, const ConstMatrixRef<S>& dy, MatrixRef<S> du,
                          MatrixRef<S> dk, VectorRef<S> dskip, const ConstVectorRef<S>& skip,
                          ExecutorRef executor) {
  const CausalConvPlan plan = saved.plan();
  constexpr Index kLanes = kFftLanes<S>;
  const Index n = plan.size, taps = plan.taps, rows = plan.rows, buffer = n * kLanes;
  dk.bottomRows(dk.rows() - taps).setZero();
  dskip.setZero();
  if (rows == 0) return;
  const RealFftTables<S>& t = saved.tables();
  const auto u_all = channel_rows(u), k_all = channel_rows(k), dy_all = channel_rows(dy);
  const auto du_all = channel_rows(du), dk_all = channel_rows(dk);
  const bool whole = plan.method == ConvMethod::fft;
  for_channel_blocks<S>(
      u.cols(), (whole ? 2 : 4) * buffer, executor, &saved.workspace(),
      [&](Index first, Index lanes, S* z) {
        const auto input = u_all.columns(first), upstream = dy_all.columns(first);
        auto kernel = k_all.columns(first);
        const auto dinput = du_all.columns(first);
        auto dkernel = dk_all.columns(first);
        kernel.rows = dkernel.rows = taps;
        const S* const d = skip.size() == 0 ? nullptr : skip.data() + first;
        if (dskip.size() != 0) {
          double sum[std::size_t(kLanes)] = {};
          for (Index r = 0; r < rows; ++r) {
            for (Index c = 0; c < lanes; ++c) {
              sum[c] +=
                  static_cast<double>(upstream.row(r)[c]) * static_cast<double>(input.row(r)[c]);
            }
          }
          for (Index c = 0; c < lanes; ++c) dskip[first + c] = static_cast<S>(sum[c]);
        }
        if (plan.method == ConvMethod::direct) {
          direct_block<1, 1>(kernel, upstream, d, upstream, dinput, lanes);
          return direct_block<-1, 1>(upstream, input, static_cast<const S*>(nullptr), upstream,
                                     dkernel, lanes);
        }
        S* const sum = z + buffer;
        if (whole) {
          load_block(upstream, 0, 0, n, lanes, z);
          t.inner().forward(z);
          block_gradients<false>(t, z, saved.kernel(first), saved.input(first), sum);
          t.inner().inverse(z);
          store_block<false>(t, z, 0, rows, dinput, 0, d, upstream, lanes);
        } else {
          S *const kf = z + 2 * buffer, *const uf = z + 3 * buffer;
          load_block(kernel, 0, 0, n, lanes, kf);
          t.inner().forward(kf);
          block_spectrum(t, kf, kf);
          std::fill(sum, sum + buffer, S(0));
          for (Index r = 0; r < rows; ++r) {
            for (Index c = 0; c < lanes; ++c) {
              dinput.row(r)[c] = d == nullptr ? S(0) : d[c] * upstream.row(r)[c];
            }
          }
          const Index lead = taps - 1, step = n - lead;
          for (Index at = 0; at < rows; at += step) {
            load_block(input, at - lead, 0, n, lanes, uf);
            t.inner().forward(uf);
            block_spectrum(t, uf, uf);
            load_block(upstream, at - lead, lead, n, lanes, z);
            t.inner().forward(z);
            block_gradients<true>(t, z, kf, uf, sum);
            t.inner().inverse(z);
            const Index skipped = std::max<Index>(0, lead - at), to = at - lead + skipped;
            store_block<true>(t, z, skipped, std::min(n - skipped, rows - to), dinput, to,
                              static_cast<const S*>(nullptr), upstream, lanes);
          }
          block_pack(t, sum);
        }
        t.inner().inverse(sum);
        store_block<false>(t, sum, 0, taps, dkernel, 0, static_cast<const S*>(nullptr), upstream,
                           lanes);
      });
}

}  // namespace detail

/// y, and what the backward pass needs into saved.
template <MatrixLike U, MatrixLike K, OutputMatrix O>
  requires SameScalar<U, K, O> && RealScalar<scalar_t<U>>
void causal_conv_forward(CausalConvSaved<scalar_t<U>>& saved, const U& u, const K& kernel, O&& y,
                         const ConstVectorRef<scalar_t<U>>& skip = Vector<scalar_t<U>>(),
                         const CausalConvOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_causal_conv(u.cols(), kernel.cols(), skip.size());
  detail::require_shape("y", y.rows(), y.cols(), u.rows(), u.cols(), "shape of u");
  const CausalConvPlan plan = causal_conv_plan(u.rows(), kernel.rows(), options);
  detail::causal_conv<scalar_t<U>>(saved, true, u, kernel, y, skip, plan, executor);
}

/// y alone.
template <MatrixLike U, MatrixLike K, OutputMatrix O>
  requires SameScalar<U, K, O> && RealScalar<scalar_t<U>>
void causal_conv(const U& u, const K& kernel, O&& y,
                 const ConstVectorRef<scalar_t<U>>& skip = Vector<scalar_t<U>>(),
                 const CausalConvOptions& options = {}, ExecutorRef executor = {}) {
  detail::require_causal_conv(u.cols(), kernel.cols(), skip.size());
  detail::require_shape("y", y.rows(), y.cols(), u.rows(), u.cols(), "shape of u");
  const CausalConvPlan plan = causal_conv_plan(u.rows(), kernel.rows(), options);
  CausalConvSaved<scalar_t<U>> once;
  detail::causal_conv<scalar_t<U>>(once, false, u, kernel, y, skip, plan, executor);
}

/// du, dk and dskip (H entries, or none) from dy, after causal_conv_forward(saved, u, kernel, ..) with the same skip.
template <MatrixLike U, MatrixLike K, MatrixLike G, OutputMatrix DU, OutputMatrix DK>
  requires SameScalar<U, K, G, DU, DK> && RealScalar<scalar_t<U>>
void causal_conv_backward(CausalConvSaved<scalar_t<U>>& saved, const U& u, const K& kernel,
                          const G& dy, DU&& du, DK&& dk, VectorRef<scalar_t<U>> dskip,
                          const ConstVectorRef<scalar_t<U>>& skip = Vector<scalar_t<U>>(),
                          ExecutorRef executor = {}) {
  const Index rows = u.rows(), channels = u.cols();
  detail::require_causal_conv(channels, kernel.cols(), skip.size());
  detail::require_shape("dy", dy.rows(), dy.cols(), rows, channels, "shape of u");
  detail::require_shape("du", du.rows(), du.cols(), rows, channels, "shape of u");
  detail::require_shape("dk", dk.rows(), dk.cols(), kernel.rows(), channels, "shape of kernel");
  detail::require(dskip.size() == 0 || dskip.size() == channels, "dskip has ", dskip.size(),
                  " entries, expected ", channels, " (channels), or none");
  detail::require(saved.plan().rows == rows && saved.channels() == channels &&
                      saved.plan().taps == std::min(rows, kernel.rows()),
                  "saved is of ", saved.plan().rows, " x ", saved.channels(), " with ",
                  saved.plan().taps, " coefficients, expected ", rows, " x ", channels, " with ",
                  std::min(rows, kernel.rows()), " (forward pass of u and kernel)");
  detail::causal_conv_backward<scalar_t<U>>(saved, u, kernel, dy, du, dk, dskip, skip, executor);
}

EIGENBLOCKS_NAMESPACE_END
