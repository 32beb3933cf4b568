// What the layers share whose forward pass is a kernel and a long convolution (S4D, S4, RTF).
#pragma once

#include <eigenblocks/core/convolution.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>

EIGENBLOCKS_NAMESPACE_BEGIN

/// What forward leaves for backward: the kernel and the spectra of kernel and input.  Keeps its memory from call to call.
template <RealScalar S>
struct KernelLayerSaved {
  Matrix<S> kernel;  ///< T x H
  CausalConvSaved<S> conv;
};

namespace detail {

inline constexpr Index kChannelTask =
    8;  ///< channels of a task: half or all of a cache line of a row

/// f(first, last) over all channels, kChannelTask at a time.
template <class F>
void for_channels(Index channels, ExecutorRef executor, F&& f) {
  executor.run((channels + kChannelTask - 1) / kChannelTask, [&](Index task, int) {
    f(task * kChannelTask, std::min(channels, (task + 1) * kChannelTask));
  });
}

inline void require_length(Index length) {
  require(length >= 1, "length (", length, ") must be at least 1");
}

/// `in` has a column for each channel, `out` the shape of `in`.
template <class U, class Y>
void require_layer(const char* name, const U& in, const char* out_name, const Y& out,
                   Index channels) {
  require(in.cols() == channels, name, " has ", in.cols(), " columns, expected ", channels,
          " (channels)");
  if (out.rows() != in.rows() || out.cols() != in.cols()) {
    raise<invalid_argument>(out_name, " is ", out.rows(), " x ", out.cols(), ", expected ",
                            in.rows(), " x ", in.cols(), " (shape of ", name, ")");
  }
}

/// A recurrence over rows, channels side by side: step(P(), h, u, u_stride, y, y_stride) with a packet P of channels from h on,
/// then one by one (P = S) for those that are left.
template <class U, class O, class Step>
void step_channels(const U& rows, O& out, Index channels, const Step& step) {
  using S = scalar_t<U>;
  require_layer("rows", rows, "out", out, channels);
  const auto take = [&]<class P>(P packet, Index h) {
    step(packet, h, rows.data(), Index(rows.outerStride()), out.data(), Index(out.outerStride()));
  };
  constexpr Index w = simd::kLanes<S>;
  Index h = 0;
  for (; h + w <= channels; h += w) take(simd::zero<simd::Packet<S>>(), h);
  for (; h < channels; ++h) take(S(0), h);
}

template <RealScalar S, class U>
void require_saved(const KernelLayerSaved<S>& saved, const U& u) {
  require(saved.kernel.rows() == u.rows() && saved.kernel.cols() == u.cols(),
          "saved is of a forward pass over ", saved.kernel.rows(), " x ", saved.kernel.cols(),
          ", but u is ", u.rows(), " x ", u.cols());
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
