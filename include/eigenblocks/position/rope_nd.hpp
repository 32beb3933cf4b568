// Rotary position embedding (RoPE) along several axes: time, row and column of a patch.
// Source: posts kexue.fm 8397, 10040, 10352; Qwen2-VL, arXiv 2409.12191; Qwen3-VL.
//
// A token stands at a vector (n_0, .., n_{A-1}); pair p turns by n_{a(p)} f_p.  An allocation gives
// a(p) and f_p.  With P = R/2 pairs, and f a ladder of as many frequencies as said:
//
//   axial_axes(f, A)               a = p div (P/A), f of P/A     each axis has a part of the head
//   alternating_axes(f, A)         a = p mod A, f of P/A         the same, pairs shuffled
//   cyclic_axes(f, A)              a = p mod A, f of P           RoPE-Tie, HunyuanImage-3.0
//   section_axes(f, {16, 24, 24})  contiguous sections, f of P   M-RoPE: Qwen2-VL, Qwen2.5-VL
//   interleaved_section_axes(f, {24, 20, 20})     f of P         M-RoPE: Qwen3-VL
//
// The last three leave a text model as it was: a token at (n, .., n) turns exactly as in RoPE with f,
// bit for bit.  Any other allocation can be written down as RotaryAxes.
//
//   const RotaryNdTable<float> table(section_axes(rope_frequencies(128, 1e6), {16, 24, 24}),
//                                    RopeLayout::half);
//   const MropePositions at = mrope_positions(segments);                   // position/positions.hpp
//   rope_in_place(q, at.positions, table, {.heads = 28});                  // T x (28*128), T x 3
//   rope_in_place(next_q, n + at.delta, table, {.heads = 28});             // decoding: all axes alike
//   rope_backward_in_place(dq, at.positions, table, {.heads = 28});
//
//   RotaryAxes           the allocation              RopeNdPositions   T x A coordinates, a view
//   RotaryNdTable        cosines and sines           rope_position_backward   dL/dn, T x A
//   rope_forward, rope_in_place, rope, rope_backward, rope_backward_in_place   those of rope.hpp
//
// Layouts: interleaved and half pair the channels of the whole head (half with axial_axes: the vision
// towers of Qwen).  RopeLayout::half_per_axis cuts the R channels into A equal parts and is half in
// each (dust3r).  All that rope.hpp promises holds here too: any position, 16-bit activations, rows
// that depend on their position and content only.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/position/frequencies.hpp>
#include <eigenblocks/position/rope.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <span>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

/// Which axis turns which pair: pair p by coordinate axis[p], at frequencies.inv_freq[p].
struct RotaryAxes {
  RotaryFrequencies frequencies;  ///< of all P pairs
  std::vector<Index> axis;        ///< P entries in [0, axes)
  Index axes = 1;                 ///< A; an axis may turn no pair
};

namespace detail {

inline void require_axes(Index axes) { require(axes >= 1, "axes (", axes, ") must be at least 1"); }

/// P = A P' pairs from the P' frequencies of one axis; index(p) is {axis, which frequency}.
template <class At>
RotaryAxes share_ladder(RotaryFrequencies per_axis, Index axes, At&& index) {
  require_frequencies(per_axis);
  require_axes(axes);
  require(axes <= kMaxRotaryDim / per_axis.rotary_dim(), "axes (", axes, ") * rotary_dim (",
          per_axis.rotary_dim(), ") must be at most ", kMaxRotaryDim);
  RotaryAxes out{.frequencies = per_axis, .axis = {}, .axes = axes};
  out.frequencies.inv_freq.resize(axes * per_axis.pairs());
  for (Index p = 0; p < out.frequencies.pairs(); ++p) {
    const auto [axis, at] = index(p);
    out.axis.push_back(axis);
    out.frequencies.inv_freq[p] = per_axis.inv_freq[at];
  }
  return out;
}

inline Index require_sections(const RotaryFrequencies& frequencies,
                              std::span<const Index> sections) {
  require(!sections.empty(), "sections has 0 entries, expected one for each axis");
  Index sum = 0;
  for (std::size_t a = 0; a < sections.size(); ++a) {
    require(sections[a] >= 0 && sections[a] <= kMaxRotaryDim, "sections[", a, "] (", sections[a],
            ") must be in [0, ", kMaxRotaryDim, "]");
    sum += sections[a];
  }
  require(sum == frequencies.pairs(), "the sum of sections (", sum,
          ") must be the number of pairs (", frequencies.pairs(), ")");
  return static_cast<Index>(sections.size());
}

}  // namespace detail

/// a(p) = p div P', f = per_axis[p mod P'], P' = per_axis.pairs(): RoPE in each of A equal parts.
/// With rope_frequencies(R/A) that is b^(-2 (p mod P') / (R/A)).  (n, .., n) is not RoPE-1D.
/// Errors: axes < 1; R above 2048; bad frequencies.
inline RotaryAxes axial_axes(const RotaryFrequencies& per_axis, Index axes) {
  const Index part = per_axis.pairs();
  return detail::share_ladder(per_axis, axes,
                              [=](Index p) { return std::pair(p / part, p % part); });
}

/// a(p) = p mod A, f = per_axis[p div A] (post 8397; the second option of post 10352): axial_axes with
/// its pairs in another order.  Errors: as there.
inline RotaryAxes alternating_axes(const RotaryFrequencies& per_axis, Index axes) {
  return detail::share_ladder(per_axis, axes,
                              [=](Index p) { return std::pair(p % axes, p / axes); });
}

/// a(p) = p mod A, the whole ladder (RoPE-Tie, posts 10040 and 10352).  A need not divide P.
/// Errors: axes < 1; bad frequencies.
inline RotaryAxes cyclic_axes(RotaryFrequencies frequencies, Index axes) {
  detail::require_frequencies(frequencies);
  detail::require_axes(axes);
  RotaryAxes out{.frequencies = std::move(frequencies), .axis = {}, .axes = axes};
  for (Index p = 0; p < out.frequencies.pairs(); ++p) out.axis.push_back(p % axes);
  return out;
}

/// The first sections[0] pairs turn with axis 0, the next sections[1] with axis 1, ...; the whole
/// ladder, so that axis 0, the time of M-RoPE, has the highest frequencies.
/// Errors: no sections; a negative one; their sum is not P; bad frequencies.
inline RotaryAxes section_axes(RotaryFrequencies frequencies, std::span<const Index> sections) {
  detail::require_frequencies(frequencies);
  const Index axes = detail::require_sections(frequencies, sections);
  RotaryAxes out{.frequencies = std::move(frequencies), .axis = {}, .axes = axes};
  for (Index a = 0; a < axes; ++a) {
    out.axis.insert(out.axis.end(), static_cast<std::size_t>(sections[static_cast<std::size_t>(a)]),
                    a);
  }
  return out;
}
inline RotaryAxes section_axes(RotaryFrequencies frequencies,
                               std::initializer_list<Index> sections) {
  return section_axes(std::move(frequencies), std::span(sections.begin(), sections.size()));
}

/// Axis 1 has p = 1, 4, 7, .. < 3 sections[1], axis 2 has p = 2, 5, 8, .. < 3 sections[2], axis 0 the
/// rest; the whole ladder.
/// Errors: not three sections; a negative one; their sum is not P; 3 sections[1] > P + 1 or
/// 3 sections[2] > P, which would leave an axis with fewer pairs than it was given; bad frequencies.
inline RotaryAxes interleaved_section_axes(RotaryFrequencies frequencies,
                                           std::span<const Index> sections) {
  detail::require_frequencies(frequencies);
  detail::require(sections.size() == 3, "sections has ", sections.size(),
                  " entries, expected 3 (time, row, column)");
  detail::require_sections(frequencies, sections);
  const Index pairs = frequencies.pairs();
  detail::require(3 * sections[1] <= pairs + 1, "3 * sections[1] (", sections[1],
                  ") must be at most the number of pairs (", pairs, ") + 1");
  detail::require(3 * sections[2] <= pairs, "3 * sections[2] (", sections[2],
                  ") must be at most the number of pairs (", pairs, ")");
  RotaryAxes out{.frequencies = std::move(frequencies), .axis = {}, .axes = 3};
  for (Index p = 0; p < pairs; ++p) {
    const Index a = p % 3;
    out.axis.push_back(p < 3 * sections[static_cast<std::size_t>(a)] ? a : 0);
  }
  return out;
}
inline RotaryAxes interleaved_section_axes(RotaryFrequencies frequencies,
                                           std::initializer_list<Index> sections) {
  return interleaved_section_axes(std::move(frequencies),
                                  std::span(sections.begin(), sections.size()));
}

/// The coordinates of each row, without owning or copying anything.  Made implicitly from
///
///   a T x A matrix of double or Index   row i stands at (m(i, 0), .., m(i, A-1)); any storage order
///   an integer n                        row i stands at n + i on every axis: text
///
/// The matrix must outlive the object; as a function argument a temporary is fine.
class RopeNdPositions {
 public:
  template <std::integral Int>
  RopeNdPositions(Int first) : run_(first) {}  // NOLINT: implicit by design

  template <class M>
    requires(detail::EigenDense<M> && (int(M::Flags) & int(Eigen::DirectAccessBit)) != 0 &&
             (std::same_as<typename M::Scalar, double> || std::same_as<typename M::Scalar, Index>))
  RopeNdPositions(const M& coordinates)  // NOLINT: implicit by design
      : rows_(coordinates.rows()),
        axes_(coordinates.cols()),
        row_stride_(M::IsRowMajor ? coordinates.outerStride() : coordinates.innerStride()),
        axis_stride_(M::IsRowMajor ? coordinates.innerStride() : coordinates.outerStride()) {
    if constexpr (std::same_as<typename M::Scalar, double>) {
      reals_ = coordinates.data();
    } else {
      integers_ = coordinates.data();
    }
  }

  bool is_run() const { return rows_ < 0; }
  /// -1 for a run.
  Index rows() const { return rows_; }
  Index axes() const { return axes_; }

  /// The coordinates of one axis.
  RopePositions axis(Index a) const {
    if (is_run()) return run_;
    if (reals_ != nullptr) return column(reals_ + a * axis_stride_);
    return column(integers_ + a * axis_stride_);
  }
  /// True when all `axes` coordinates of row i are the same.
  bool equal(Index i, Index axes) const {
    if (is_run()) return true;
    return reals_ != nullptr ? equal_from(reals_ + i * row_stride_, axes)
                             : equal_from(integers_ + i * row_stride_, axes);
  }

 private:
  template <class Number>
  RopePositions column(const Number* data) const {
    using Strided = Eigen::Map<const Vector<Number>, 0, Eigen::InnerStride<>>;
    return Strided(data, rows_, Eigen::InnerStride<>(row_stride_));
  }
  template <class Number>
  bool equal_from(const Number* data, Index axes) const {
    for (Index a = 1; a < axes; ++a) {
      if (data[a * axis_stride_] != data[0]) return false;
    }
    return true;
  }

  RopePositions run_ = 0;
  Index rows_ = -1, axes_ = -1;
  Index row_stride_ = 0, axis_stride_ = 0;
  const double* reals_ = nullptr;
  const Index* integers_ = nullptr;
};

namespace detail {

/// to[c] = from[c] where mask[c] has its bits set; `count` entries, in packets P, then one by one.
/// P comes as a null pointer, as in turn_halves.
template <class P, class S>
EIGENBLOCKS_ALWAYS_INLINE void copy_where(const P*, const S* mask, const S* from, S* to,
                                          Index count) {
  constexpr Index kSize = simd::kPacketSize<P>;
  Index c = 0;
  for (; c + kSize <= count; c += kSize) {
    simd::store<P>(to + c, simd::select(simd::load<P>(mask + c), simd::load<P>(from + c),
                                        simd::load<P>(to + c)));
  }
  if constexpr (kSize > 1) {
    copy_where(static_cast<const S*>(nullptr), mask + c, from + c, to + c, count - c);
  }
}

}  // namespace detail

/// Cosines and sines for coordinates on several axes, from the two small tables of a RotaryTable over
/// all P pairs: the row of a token is put together from the rows of its coordinates, an axis at a
/// time.  Where all coordinates are equal it is the row of RotaryTable, to the bit.
///
/// Integer coordinates in [0, positions) are served by the tables, others cost the sines of the pairs
/// of their axis (integers all P, once for all axes within the same 256).  Immutable after
/// construction: threads share it.
/// Errors: axis not P entries, or one of them outside [0, axes); half_per_axis where axes does not
/// divide P; and those of RotaryTable.
template <RealScalar S>
class RotaryNdTable {
 public:
  using Scalar = S;
  using Positions = RopeNdPositions;
  static constexpr bool kSeveralAxes = true;

  RotaryNdTable(RotaryAxes axes, RopeLayout layout, Index positions = 65536)
      : axis_(std::move(axes.axis)),
        axes_(axes.axes),
        layout_(layout),
        table_(checked(std::move(axes.frequencies)), per_axis() ? RopeLayout::half : layout_,
               positions, {.blocks = per_axis() ? axes_ : 1}) {
    masks_.setZero(axes_, rotary_dim());
    unit_.setZero(rotary_dim());
    for (Index p = 0; p < pairs(); ++p) {
      const auto [a, b] = table_.channels(p);
      set_bits(masks_(axis(p), a));
      set_bits(masks_(axis(p), b));
      unit_[a] = S(1);
    }
  }

  const RotaryFrequencies& frequencies() const { return table_.frequencies(); }
  RopeLayout layout() const { return layout_; }
  Index axes() const { return axes_; }
  /// The axis of pair p.
  Index axis(Index p) const { return axis_[static_cast<std::size_t>(p)]; }
  Index pairs() const { return table_.pairs(); }
  Index rotary_dim() const { return table_.rotary_dim(); }
  /// Integer coordinates below this need no sine.
  Index positions() const { return table_.positions(); }
  std::size_t bytes() const {
    return table_.bytes() + static_cast<std::size_t>(masks_.size() + unit_.size()) * sizeof(S);
  }

  // For the functions of rope.hpp.

  void require_positions(const RopeNdPositions& positions, Index rows) const {
    if (positions.is_run()) return;
    detail::require_shape("positions", positions.rows(), positions.axes(), rows, axes_,
                          "rows of the input x axes");
  }
  detail::PairBlocks cut() const { return table_.cut(); }
  double growth(Index p) const { return table_.growth(p); }
  std::pair<Index, Index> channels(Index p) const { return table_.channels(p); }

  /// As RotaryTable::Rows.
  template <RopeLayout kLayout>
  class Rows {
   public:
    Rows(const RotaryNdTable& table, const RopeNdPositions& positions)
        : nd_(table), positions_(positions), equal_(table.table_, positions.axis(0)) {}

    const S* operator()(Index i) {
      if (positions_.equal(i, nd_.axes_)) return equal_(i);
      std::fill_n(row_, nd_.rotary_dim(), S(0));
      bool far = false;  // a coordinate outside [0, 256): the row needs coarse rows
      for (Index a = 0; a < nd_.axes_; ++a) {
        const RopePositions coordinates = positions_.axis(a);
        Index n = 0;
        if (coordinates.integer(i, n)) {
          const Split at(n);
          put(a, nd_.table_.fine_row(at.l), row_);
          far |= at.h != 0;
        } else {
          const auto turn = nd_.table_.real_turn(coordinates.real(i));
          for (Index p = 0; p < nd_.pairs(); ++p) {
            if (nd_.axis(p) == a) nd_.table_.compute_pair(turn, p, row_);
          }
        }
      }
      if (!far) return row_;
      std::copy_n(nd_.unit_.data(), nd_.rotary_dim(), coarse_);
      for (Index a = 0; a < nd_.axes_; ++a) {
        Index n = 0;
        if (!positions_.axis(a).integer(i, n)) continue;
        const Split at(n);
        if (at.h != 0) put(a, equal_.coarse(at.h), coarse_);
      }
      detail::turn_channels<false, kLayout>(row_, coarse_, row_, nd_.cut());
      return row_;
    }

   private:
    using Split = typename RotaryTable<S>::Split;
    void put(Index a, const S* from, S* to) const {
      detail::copy_where(static_cast<const simd::Packet<S>*>(nullptr), nd_.masks_.row(a).data(),
                         from, to, nd_.rotary_dim());
    }

    const RotaryNdTable& nd_;
    const RopeNdPositions positions_;
    typename RotaryTable<S>::template Rows<kLayout> equal_;
    alignas(64) S row_[detail::kMaxRotaryDim];
    alignas(64) S coarse_[detail::kMaxRotaryDim];
  };

 private:
  bool per_axis() const { return layout_ == RopeLayout::half_per_axis; }

  /// The checks of the allocation, before a table is made of it.
  RotaryFrequencies checked(RotaryFrequencies frequencies) const {
    detail::require_frequencies(frequencies);
    detail::require_axes(axes_);
    detail::require(layout_ == RopeLayout::interleaved || layout_ == RopeLayout::half || per_axis(),
                    "layout (", layout_, ") must be interleaved (", RopeLayout::interleaved,
                    "), half (", RopeLayout::half, ") or half_per_axis (",
                    RopeLayout::half_per_axis, ")");
    detail::require_size("axis", static_cast<Index>(axis_.size()), frequencies.pairs(),
                         "one for each pair");
    for (std::size_t p = 0; p < axis_.size(); ++p) {
      detail::require(axis_[p] >= 0 && axis_[p] < axes_, "axis[", p, "] (", axis_[p],
                      ") is outside [0, axes), axes = ", axes_);
    }
    detail::require(!per_axis() || frequencies.pairs() % axes_ == 0, "axes (", axes_,
                    ") must divide the number of pairs (", frequencies.pairs(),
                    ") for half_per_axis");
    return frequencies;
  }
  static void set_bits(S& mask) { std::memset(&mask, 0xFF, sizeof(S)); }

  std::vector<Index> axis_;
  Index axes_;
  RopeLayout layout_;
  RotaryTable<S> table_;
  Matrix<S> masks_;    // A x R: all bits set where a channel belongs to the axis
  RowVector<S> unit_;  // the row of position 0, without attention_factor
};

/// dL/dn of each row and axis:
/// d_positions(i, a) = sum over heads and the pairs of axis a of f_p (dy_b y_a - dy_a y_b), in double.
///   y, dy   the rotated activations (not x) and the gradient with respect to them, T x (heads * D)
/// Errors: shapes of dy and d_positions (T x A); heads and first_channel as in rope_forward.
template <MatrixLike Y, MatrixLike DY>
  requires SameScalar<Y, DY>
void rope_position_backward(const Y& y, const DY& dy,
                            const RotaryNdTable<compute_t<scalar_t<Y>>>& table,
                            MatrixRef<double> d_positions, const RopeOptions& options) {
  detail::require_heads("y", y.cols(), table.rotary_dim(), options);
  detail::require_shape("dy", dy.rows(), dy.cols(), y.rows(), y.cols(), "the shape of y");
  detail::require_shape("d_positions", d_positions.rows(), d_positions.cols(), y.rows(),
                        table.axes(), "rows of y x axes");
  d_positions.setZero();
  detail::position_gradient(y, dy, table, options, [&](Index i, Index p, double d) {
    d_positions(i, table.axis(p)) += d;
  });
}

EIGENBLOCKS_NAMESPACE_END
