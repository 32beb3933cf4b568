// A parameter or a gradient as optimisers see it: numbers with a shape, owned by somebody else.
//
//   TensorRef<S>         writable          TensorRef<const S>     read-only
//
// Binds without a copy to everything an optimiser may be asked to update: row-major matrices, head
// blocks and row ranges of them, Eigen::Map, and vectors of either orientation (seen as 1 x n).
// Column-major matrices, expressions and temporaries that own their storage do not compile.  Being
// a small regular value it also goes into lists, which is how many tensors are handed over at once:
//
//   std::vector<TensorRef<float>> gradients{d_embedding, d_gain, d_weight};
//   double norm = clip_grad_norm<float>(gradients, {.max_norm = 1.0});
//
// The element-wise optimisers and the norms below run on whole packets from the first element to
// the last (the tail is padded), so what happens to an element depends neither on where it stands
// nor on how the memory is aligned, split or strided: bitwise the same for every executor and after
// a resume.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <type_traits>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// An Eigen object, derived classes such as VectorBlock included.
template <class M>
concept DerivesFromDense = requires(const M& m) {
  []<class D>(const Eigen::DenseBase<D>&) {}(m);
};

template <class M>
concept TensorShaped = DerivesFromDense<M> &&(int(M::Flags) & int(Eigen::DirectAccessBit)) != 0 &&
                       int(M::InnerStrideAtCompileTime) == 1 &&
                       (kRowMajorDirect<M> || bool(M::IsVectorAtCompileTime));

/// M (a deduced forwarding reference) may be seen as TensorRef<S>.
template <class M, class S>
concept BindsToTensor =
    TensorShaped<std::remove_cvref_t<M>> &&
    std::same_as<typename std::remove_cvref_t<M>::Scalar, std::remove_const_t<S>> &&
    (std::is_const_v<S> || (!std::is_const_v<std::remove_reference_t<M>> &&
                            (int(std::remove_cvref_t<M>::Flags) & int(Eigen::LvalueBit)) != 0)) &&
    (std::is_lvalue_reference_v<M> || !kOwnsStorage<std::remove_cvref_t<M>>);

}  // namespace detail

/// Non-owning rows x cols view with a row stride; see the top of the file.
template <class S>
  requires RealScalar<std::remove_const_t<S>>
class TensorRef {
 public:
  TensorRef(S* data, Index rows, Index cols, Index stride)
      : data_(data), rows_(rows), cols_(cols), stride_(stride) {}

  template <class M>
    requires detail::BindsToTensor<M, S> TensorRef(M&& m)  // NOLINT: implicit by design
        : data_(m.data()), rows_(m.rows()), cols_(m.cols()), stride_(m.cols()) {
      if constexpr (bool(std::remove_cvref_t<M>::IsVectorAtCompileTime)) {
        rows_ = 1;
        cols_ = stride_ = m.size();
      } else {
        stride_ = m.outerStride();
      }
    }

    /// A writable view reads as well.
    template <class T>
      requires std::is_const_v<S> && std::same_as<T, std::remove_const_t<S>> TensorRef(
          const TensorRef<T>& other)  // NOLINT: implicit by design
          : TensorRef(other.data(), other.rows(), other.cols(), other.stride()) {}

      S* data() const { return data_; }
      S* row(Index i) const { return data_ + i * stride_; }
      Index rows() const { return rows_; }
      Index cols() const { return cols_; }
      Index stride() const { return stride_; }
      Index size() const { return rows_ * cols_; }
      bool contiguous() const { return stride_ == cols_ || rows_ <= 1; }

     private:
      S* data_;
      Index rows_, cols_, stride_;
};

namespace detail {

/// Equal in shape and in every number.
template <RealScalar S>
bool same_matrix(const Matrix<S>& a, const Matrix<S>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() && a == b;
}

/// Numbers handled by one task.  32768 floats of the four arrays of AdamW are 512 KB: long enough
/// to make handing out a task (about a microsecond) invisible, short enough to spread a layer's
/// weights.
inline constexpr Index kPiece = 32768;

/// The pieces that cover a rows x cols tensor, the same for every executor.  With `flat` the tensor
/// is one run of memory and is cut without regard to rows.
class Pieces {
 public:
  Pieces(Index rows, Index cols, bool flat)
      : rows_(flat ? std::min<Index>(1, rows) : rows), cols_(flat ? rows * cols : cols) {
    if (rows_ == 0 || cols_ == 0) return;
    per_row_ = (cols_ + kPiece - 1) / kPiece;
    rows_per_task_ = per_row_ > 1 ? 1 : kPiece / cols_;
    count_ = per_row_ > 1 ? rows_ * per_row_ : (rows_ + rows_per_task_ - 1) / rows_per_task_;
  }

  Index count() const { return count_; }

  /// run(row, first column, numbers) for each run of memory of piece `index`.
  template <class F>
  void visit(Index index, F&& run) const {
    if (per_row_ > 1) {
      const Index first = index % per_row_ * kPiece;
      run(index / per_row_, first, std::min(kPiece, cols_ - first));
      return;
    }
    const Index end = std::min(rows_, (index + 1) * rows_per_task_);
    for (Index i = index * rows_per_task_; i < end; ++i) run(i, Index{0}, cols_);
  }

 private:
  Index rows_, cols_, count_ = 0, per_row_ = 1, rows_per_task_ = 1;
};

/// Fills a packet's worth of memory from `from`, the rest with zeros.
template <RealScalar S>
void load_tail(const S* from, Index n, S* padded) {
  for (Index k = 0; k < simd::kLanes<S>; ++k) padded[k] = k < n ? from[k] : S(0);
}
template <RealScalar S>
void store_tail(const S* padded, Index n, S* to) {
  for (Index k = 0; k < simd::kLanes<S>; ++k) {
    if (k < n) to[k] = padded[k];
  }
}
template <RealScalar S>
void store_tail(const S*, Index, const S*) {}  // an input

/// f(pointers + i...) for every packet of n numbers; each pointer is S* (read and written) or const
/// S*.  The tail goes through padded copies, so f always sees whole packets and rounds every
/// element alike.
template <RealScalar S, class F, class... T>
EIGENBLOCKS_ALWAYS_INLINE void for_each_packet(Index n, const F& f, T*... at) {
  constexpr Index w = simd::kLanes<S>;
  Index i = 0;
  for (; i + w <= n; i += w) f((at + i)...);
  if (i == n) return;
  S tail[sizeof...(T)][simd::kLanes<S>];
  int k = 0;
  (load_tail<S>(at + i, n - i, tail[k++]), ...);
  [&]<std::size_t... K>(std::index_sequence<K...>) { f(static_cast<T*>(tail[K])...); }
  (std::index_sequence_for<T...>{});
  k = 0;
  (store_tail<S>(tail[k++], n - i, at + i), ...);
}

/// Sum of (scale x[i])^2 over at most a few hundred numbers, in S.
template <RealScalar S>
S scaled_square_sum(const S* x, Index n, S scale) {
  using P = simd::Packet<S>;
  constexpr Index w = simd::kLanes<S>;
  const P factor = simd::set1<P>(scale);
  P sums[4] = {simd::zero<P>(), simd::zero<P>(), simd::zero<P>(), simd::zero<P>()};
  const auto add = [&](const P& value, P& sum) {
    const P scaled = simd::mul(factor, value);
    sum = simd::fma(scaled, scaled, sum);
  };
  Index i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    for (int k = 0; k < 4; ++k) add(simd::load<P>(x + i + k * w), sums[k]);
  }
  for (; i < n; i += w) {
    S padded[simd::kLanes<S>];
    load_tail(x + i, std::min(w, n - i), padded);
    add(simd::load<P>(padded), sums[0]);
  }
  return simd::sum(simd::add(simd::add(sums[0], sums[1]), simd::add(sums[2], sums[3])));
}

/// Sum of x[i]^2 in double: blocks of 512 are summed in S.  A float block whose squares leave the
/// range of float (|x| beyond 1e17 or all below 1e-17) is summed again, scaled by a power of two.
template <RealScalar S>
double square_sum(const S* x, Index n) {
  constexpr Index block = 512;
  double total = 0;
  for (Index begin = 0; begin < n; begin += block) {
    const Index size = std::min(block, n - begin);
    double sum = double(scaled_square_sum(x + begin, size, S(1)));
    if constexpr (std::is_same_v<S, float>) {
      if (!(sum < 1e38)) sum = double(scaled_square_sum(x + begin, size, 0x1p-100f)) * 0x1p200;
      if (sum < 1e-31) sum = double(scaled_square_sum(x + begin, size, 0x1p100f)) * 0x1p-200;
    }
    total += sum;
  }
  return total;
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
