// Rotary position embedding (RoPE) along one axis.
// Source: RoFormer, arXiv 2104.09864; posts kexue.fm 8265 and 10040.
//
// The first R channels of each head form R/2 pairs; at position n pair p turns by n f_p:
//
//   y_a = a (x_a cos(n f_p) - x_b sin(n f_p))
//   y_b = a (x_a sin(n f_p) + x_b cos(n f_p))       <R_m q, R_n k> depends on m - n only
//
// with a = attention_factor, 1 unless YaRN or LongRoPE set it.  Channels R .. D-1 of a head pass
// through (partial rotary).  There are two ways to form the pairs; checkpoints of one are garbage
// in the other, so the layout has no default:
//
//   RopeLayout::interleaved   pair p = channels (2p, 2p+1)    RoFormer, GPT-J, Meta Llama, DeepSeek
//   RopeLayout::half          pair p = channels (p, p + R/2)  transformers' Llama, NeoX, Qwen
//
// (A third one, half_per_axis, needs several axes: position/rope_nd.hpp.)
//
//   const RotaryTable<float> table(rope_frequencies(64), RopeLayout::half);
//   rope_in_place(q, 0, table, {.heads = 8});             // q: T x (8*D), rows at 0, 1, 2, ...
//   rope_in_place(k, 0, table, {.heads = 2});
//   rope_backward_in_place(dq, 0, table, {.heads = 8});
//
//   RotaryTable                              cos and sin, by two small tables, for any position
//   rope_forward, rope_in_place, rope        rotate; also by the tables of rope_nd.hpp and xpos.hpp
//   rope_backward, rope_backward_in_place    the transposed rotation; saves nothing but positions
//   rope_position_backward                   dL/dn
//   rope_convert_layout                      interleaved <-> half: activations, weights, biases
//
// One row of cosines serves all heads of a token: positions outside, heads inside, one pass over
// memory.  A row at position 0 is left bitwise unchanged when a = 1.  Every other row depends only
// on its position and its content: not on the table's size, other rows, chunks or threads.
// 16-bit activations use RotaryTable<float>: angles in double, arithmetic in float, one rounding.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/position/frequencies.hpp>

#include <algorithm>
#include <cmath>
#include <complex>
#include <concepts>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <utility>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class RopeLayout { interleaved, half, half_per_axis };

/// How a row of activations is cut.  A head has D = cols / heads channels; R of them rotate, from
/// first_channel on.  MLA's queries [nope | rope] have first_channel = D - R.
struct RopeOptions {
  Index heads = 0;  ///< must be given: one head would be a plausible wrong guess
  Index first_channel = 0;
};

namespace detail {

inline constexpr Index kRopeTableRows = 256;  // B: the rows of the fine table
// Heads that share a loaded cosine: measured 1.2x to 1.5x faster than one by one in the cache and
// no slower outside; all 32 heads of 128 channels at once are up to 1.3x slower.
inline constexpr Index kHeadsAtOnce = 4;
inline constexpr Index kMaxRotaryDim = 2048;  // rows of cos and sin are put together on the stack

inline void require_layout(const char* name, RopeLayout layout) {
  require(layout == RopeLayout::interleaved || layout == RopeLayout::half, name, " (", layout,
          ") must be interleaved (", RopeLayout::interleaved, ") or half (", RopeLayout::half, ")");
}

/// Turns (x_a, x_b) by (c, s), or back for kTranspose.  For packets and scalars.
template <bool kTranspose, class P>
EIGENBLOCKS_ALWAYS_INLINE void turn(const P& x_a, const P& x_b, const P& c, const P& s, P& y_a,
                                    P& y_b) {
  if constexpr (kTranspose) {
    y_a = simd::fma(x_a, c, simd::mul(x_b, s));
    y_b = simd::sub(simd::mul(x_b, c), simd::mul(x_a, s));
  } else {
    y_a = simd::sub(simd::mul(x_a, c), simd::mul(x_b, s));
    y_b = simd::fma(x_a, s, simd::mul(x_b, c));
  }
}

/// `heads` heads of one token, `stride` channels apart, which share a row of cosines and sines.
struct HeadGroup {
  Index heads, stride;
};

/// Pairs [p, pairs) of layout `half` while they fill a packet P, then the rest in smaller packets.
/// Heads run innermost: a cosine and a sine are loaded once for all of them.
/// P comes as a null pointer: g++ warns about vector types spelled as template arguments.
template <bool kTranspose, class P, class S>
EIGENBLOCKS_ALWAYS_INLINE void turn_halves(const P*, const S* x, const S* row, S* y, Index pairs,
                                           HeadGroup group, Index p = 0) {
  constexpr Index kSize = simd::kPacketSize<P>;
  for (; p + kSize <= pairs; p += kSize) {
    const P c = simd::load<P>(row + p), s = simd::load<P>(row + pairs + p);
    const S* from = x + p;
    S* to = y + p;
    for (Index head = 0; head < group.heads; ++head) {
      P y_a, y_b;
      turn<kTranspose>(simd::load<P>(from), simd::load<P>(from + pairs), c, s, y_a, y_b);
      simd::store<P>(to, y_a);
      simd::store<P>(to + pairs, y_b);
      from += group.stride;
      to += group.stride;
    }
  }
  if constexpr (kSize > 1) {
    using Half = typename simd::ei::unpacket_traits<P>::half;
    if constexpr (sizeof(Half) < sizeof(P)) {
      turn_halves<kTranspose>(static_cast<const Half*>(nullptr), x, row, y, pairs, group, p);
    } else {
      turn_halves<kTranspose>(static_cast<const S*>(nullptr), x, row, y, pairs, group, p);
    }
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
// g++ 12 complains about the insides of its own AVX-512 intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/// The same for `interleaved`, where a pair is a complex number and its rotation the product with
/// c + i s (back: c - i s).  P is Eigen's packet of complex numbers, which knows the lane swaps of
/// each instruction set.
template <bool kTranspose, class P, class S>
EIGENBLOCKS_ALWAYS_INLINE void turn_interleaved(const P*, const S* x, const S* row, S* y,
                                                Index pairs, HeadGroup group, Index p = 0) {
  using Complex = std::complex<S>;
  if constexpr (!std::is_same_v<P, Complex>) {
    constexpr Index kSize = simd::kPacketSize<P>;
    for (; p + kSize <= pairs; p += kSize) {
      P turn_by = simd::ei::ploadu<P>(reinterpret_cast<const Complex*>(row + 2 * p));
      if constexpr (kTranspose) turn_by = simd::ei::pconj(turn_by);
      const S* from = x + 2 * p;
      S* to = y + 2 * p;
      for (Index head = 0; head < group.heads; ++head) {
        const P pair = simd::ei::ploadu<P>(reinterpret_cast<const Complex*>(from));
        simd::ei::pstoreu(reinterpret_cast<Complex*>(to), simd::ei::pmul(turn_by, pair));
        from += group.stride;
        to += group.stride;
      }
    }
    using Half = typename simd::ei::unpacket_traits<P>::half;
    if constexpr (sizeof(Half) < sizeof(P)) {
      turn_interleaved<kTranspose>(static_cast<const Half*>(nullptr), x, row, y, pairs, group, p);
      return;
    }
  }
  for (; p < pairs; ++p) {
    const S c = row[2 * p], s = row[2 * p + 1];
    for (Index head = 0; head < group.heads; ++head) {
      const Index at = head * group.stride + 2 * p;
      S y_a, y_b;
      turn<kTranspose>(x[at], x[at + 1], c, s, y_a, y_b);
      y[at] = y_a;
      y[at + 1] = y_b;
    }
  }
}

template <class From, class To>
EIGENBLOCKS_ALWAYS_INLINE void convert_channels(const From* from, To* to, Index count) {
  Eigen::Map<RowVector<To>>(to, count) =
      Eigen::Map<const RowVector<From>>(from, count).template cast<To>();
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

/// The pairs of a head.  half_per_axis is `half` in `blocks` equal parts, one behind the other; the
/// other layouts have one.
struct PairBlocks {
  Index blocks, pairs;  // pairs of one block
};

/// y = x turned by `row`, which has cos and sin where x has the channels a and b.  y may be x.
template <bool kTranspose, RopeLayout kLayout, class S>
EIGENBLOCKS_ALWAYS_INLINE void turn_channels(const S* x, const S* row, S* y, PairBlocks cut,
                                             HeadGroup group = {1, 0}) {
  if constexpr (kLayout == RopeLayout::half_per_axis) {
    for (Index block = 0; block < cut.blocks; ++block) {
      const Index at = block * 2 * cut.pairs;
      turn_channels<kTranspose, RopeLayout::half>(x + at, row + at, y + at, {1, cut.pairs}, group);
    }
  } else if constexpr (kLayout == RopeLayout::half) {
    turn_halves<kTranspose>(static_cast<const simd::Packet<S>*>(nullptr), x, row, y, cut.pairs,
                            group);
  } else {
    using P = typename simd::ei::packet_traits<std::complex<S>>::type;
    turn_interleaved<kTranspose>(static_cast<const P*>(nullptr), x, row, y, cut.pairs, group);
  }
}

/// What rope_nd.hpp and xpos.hpp add to a table of one axis.
struct RotaryExtras {
  Index blocks = 1;       // see PairBlocks; divides the pairs
  Vector<double> zeta{};  // XPOS: cos and sin of pair p times zeta_p^((n - center) / scale_base)
  double scale_base = 1.0, center = 0.0;
};

}  // namespace detail

/// cos(n f_p) and sin(n f_p) for any position n, from two small tables: n = 256 h + l, and the row
/// of n is the row of l turned by the row of 256 h, one complex product per pair and token.  Both
/// tables are computed in double and rounded once.  However large n is, a float row is within
/// 1.74e-7 of the truth (1.33e-7 measured), a double row within 4.5e-16.
///
/// Integer positions [0, positions) are served by the tables, of (256 + positions/256) R scalars.
/// Other integers cost R/2 sines for each run of 256 of them, with the same result bit for bit.
/// Real positions cost R/2 sines each.
///
/// A row has R scalars, arranged like the channels it turns: cos | sin for `half`, cos, sin, cos,
/// sin, ... for `interleaved`.  Immutable after construction: threads share it.
/// (extras is for rope_nd.hpp and xpos.hpp, which build tables from this one.)
/// Errors: an unknown layout; R above 2048; positions < 0; inv_freq empty or not finite;
/// attention_factor not positive.
template <RealScalar S>
class RotaryTable {
 public:
  using Scalar = S;
  using Positions = RopePositions;
  static constexpr bool kSeveralAxes = false;

  RotaryTable(RotaryFrequencies frequencies, RopeLayout layout, Index positions = 65536,
              detail::RotaryExtras extras = {})
      : frequencies_(std::move(frequencies)),
        layout_(layout),
        extras_(std::move(extras)),
        cut_{extras_.blocks, pairs() / extras_.blocks} {
    detail::require_frequencies(frequencies_);
    detail::require_layout("layout", layout);
    detail::require(rotary_dim() <= detail::kMaxRotaryDim, "rotary_dim (", rotary_dim(),
                    ") must be at most ", detail::kMaxRotaryDim);
    detail::require(positions >= 0, "positions (", positions, ") must not be negative");
    fine_.resize(detail::kRopeTableRows, rotary_dim());
    for (Index l = 0; l < fine_.rows(); ++l) {
      const Turn turn{static_cast<double>(l), frequencies_.attention_factor, 0.0};
      compute_row(turn, fine_.row(l).data());
    }
    coarse_.resize((positions + detail::kRopeTableRows - 1) / detail::kRopeTableRows, rotary_dim());
    for (Index h = 0; h < coarse_.rows(); ++h) coarse_row(h, coarse_.row(h).data());
  }

  const RotaryFrequencies& frequencies() const { return frequencies_; }
  RopeLayout layout() const { return layout_; }
  Index pairs() const { return frequencies_.pairs(); }
  Index rotary_dim() const { return frequencies_.rotary_dim(); }
  /// Integer positions below this need no sine.
  Index positions() const { return coarse_.rows() * detail::kRopeTableRows; }
  std::size_t bytes() const {
    return static_cast<std::size_t>(fine_.size() + coarse_.size()) * sizeof(S);
  }
  /// g_p, where cos and sin of pair p grow like exp(g_p n): 0 but for XPOS.
  double growth(Index p) const {
    return extras_.zeta.size() == 0 ? 0.0 : std::log(extras_.zeta[p]) / extras_.scale_base;
  }

  // For the functions below and rope_nd.hpp.

  void require_positions(const RopePositions& positions, Index rows) const {
    detail::require_positions(positions, rows, "one for each row of the input");
  }
  detail::PairBlocks cut() const { return cut_; }

  /// Rows for one position after the other, kLayout being the table's.  One per thread: it keeps
  /// the last coarse row that was not in the table.
  template <RopeLayout kLayout>
  class Rows {
   public:
    Rows(const RotaryTable& table, const RopePositions& positions)
        : table_(table),
          positions_(positions),
          identity_at_zero_(table.identity_at_zero()),
          centered_(table.centered()) {}

    /// The row of positions' entry i, valid until the next call; nullptr for the identity.
    const S* operator()(Index i) {
      Index n = 0;
      if (!positions_.integer(i, n)) {
        table_.compute_row(table_.real_turn(positions_.real(i)), row_);
        return row_;
      }
      if (n == 0 && identity_at_zero_) return nullptr;
      const Split at(n);
      const S* const fine = table_.fine_row(at.l);
      if (at.h == 0 && !centered_) return fine;
      detail::turn_channels<false, kLayout>(fine, coarse(at.h), row_, table_.cut());
      return row_;
    }

    /// The row of position 256 h, valid until the next call.
    const S* coarse(Index h) {
      if (h >= 0 && h < table_.coarse_.rows()) return table_.coarse_.row(h).data();
      if (h != cached_) table_.coarse_row(h, coarse_);
      cached_ = h;
      return coarse_;
    }

   private:
    const RotaryTable& table_;
    const RopePositions positions_;
    const bool identity_at_zero_, centered_;
    Index cached_ = std::numeric_limits<Index>::min();  // no n / 256
    alignas(64) S row_[detail::kMaxRotaryDim];
    alignas(64) S coarse_[detail::kMaxRotaryDim];
  };

  /// n = 256 h + l, 0 <= l < 256, for negative n as well.
  struct Split {
    explicit Split(Index n) : h(n >> 8), l(n - (h << 8)) {}
    static_assert(detail::kRopeTableRows == 1 << 8);
    Index h, l;
  };
  /// A rotation: the angles of `position`, and what multiplies cos and sin.
  struct Turn {
    double position, factor, center;
  };
  Turn real_turn(double position) const {
    return {position, frequencies_.attention_factor, extras_.center};
  }
  const S* fine_row(Index l) const { return fine_.row(l).data(); }
  /// True if coarse row 0 is not the identity (XPOS).
  bool centered() const { return extras_.center != 0.0; }
  bool identity_at_zero() const { return frequencies_.attention_factor == 1.0 && !centered(); }

  void compute_pair(Turn turn, Index p, S* row) const {
    double factor = turn.factor;
    if (extras_.zeta.size() != 0) {
      factor *= std::pow(extras_.zeta[p], (turn.position - turn.center) / extras_.scale_base);
    }
    const auto [c, s] = detail::rotary_cos_sin(turn.position, frequencies_.inv_freq[p], factor);
    const auto [a, b] = channels(p);
    row[a] = static_cast<S>(c);
    row[b] = static_cast<S>(s);
  }
  /// The channels a and b of pair p, counted from the first that turns.
  std::pair<Index, Index> channels(Index p) const {
    if (layout_ == RopeLayout::interleaved) return {2 * p, 2 * p + 1};
    if (cut_.blocks == 1) return {p, p + cut_.pairs};
    const Index a = p + p / cut_.pairs * cut_.pairs;
    return {a, a + cut_.pairs};
  }

 private:
  void compute_row(Turn turn, S* row) const {
    for (Index p = 0; p < pairs(); ++p) compute_pair(turn, p, row);
  }
  void coarse_row(Index h, S* row) const {
    const double position = static_cast<double>(h) * static_cast<double>(detail::kRopeTableRows);
    compute_row({position, 1.0, extras_.center}, row);
  }

  RotaryFrequencies frequencies_;
  RopeLayout layout_;
  detail::RotaryExtras extras_;
  detail::PairBlocks cut_;
  Matrix<S> fine_;    // 256 x R: positions 0 .. 255, times attention_factor
  Matrix<S> coarse_;  // positions 0, 256, 512, ...
};

namespace detail {

/// Channels per head, after all checks of one operand.
inline Index require_heads(const char* name, Index cols, Index rotary_dim,
                           const RopeOptions& options) {
  require(options.heads >= 1, "heads (", options.heads, ") must be at least 1");
  require(cols % options.heads == 0, "heads (", options.heads, ") must divide the columns of ",
          name, " (", cols, ")");
  const Index head_dim = cols / options.heads;
  require(options.first_channel >= 0, "first_channel (", options.first_channel,
          ") must not be negative");
  require(options.first_channel + rotary_dim <= head_dim, "first_channel (", options.first_channel,
          ") + rotary_dim (", rotary_dim, ") must be at most the head size (", head_dim, ")");
  return head_dim;
}

/// RotaryTable, or RotaryNdTable of rope_nd.hpp, for activations like X.
template <class Table, class X>
concept RotaryTableFor = std::same_as<typename Table::Scalar, compute_t<scalar_t<X>>> && requires {
  typename Table::Positions;
  Table::kSeveralAxes;
};

/// Turns all heads of one token; copies the channels that do not rotate unless y is x.
template <bool kTranspose, RopeLayout kLayout, class X, class S>
EIGENBLOCKS_ALWAYS_INLINE void turn_token(const X* x, const S* row, X* y, PairBlocks cut,
                                          Index first, HeadGroup group) {
  const Index rotary_dim =
      2 * cut.pairs * (kLayout == RopeLayout::half_per_axis ? cut.blocks : Index{1});
  if constexpr (std::is_same_v<X, S>) {
    for (Index head = 0; head < group.heads; head += kHeadsAtOnce) {
      const Index at = head * group.stride + first;
      turn_channels<kTranspose, kLayout>(
          x + at, row, y + at, cut, {std::min(kHeadsAtOnce, group.heads - head), group.stride});
    }
  } else {
    S tile[kMaxRotaryDim];
    for (Index head = 0; head < group.heads; ++head) {
      const Index at = head * group.stride + first;
      convert_channels(x + at, tile, rotary_dim);
      turn_channels<kTranspose, kLayout>(tile, row, tile, cut);
      convert_channels(tile, y + at, rotary_dim);
    }
  }
  if (x == y || rotary_dim == group.stride) return;
  for (Index head = 0; head < group.heads; ++head, x += group.stride, y += group.stride) {
    std::copy(x, x + first, y);
    std::copy(x + first + rotary_dim, x + group.stride, y + first + rotary_dim);
  }
}

/// The loop over tokens, for all kinds of positions: Table::Rows gives the cosines and sines.
template <bool kTranspose, RopeLayout kLayout, class X, class Table>
void turn_rows(const ConstMatrixRef<X>& x, const typename Table::Positions& positions,
               const Table& table, MatrixRef<X> y, const RopeOptions& options,
               ExecutorRef executor) {
  const HeadGroup group{options.heads, x.cols() / options.heads};
  const PairBlocks cut = table.cut();
  // About 128 KB of floats per task: enough to hide the hand-over, and half of a small L2.
  const Index task_rows = std::clamp<Index>(32768 / x.cols(), 16, 1024);
  const auto task = [&](Index index, int) {
    typename Table::template Rows<kLayout> rows(table, positions);
    const Index end = std::min(x.rows(), (index + 1) * task_rows);
    for (Index i = index * task_rows; i < end; ++i) {
      const X* const from = x.data() + i * x.outerStride();
      X* const to = y.data() + i * y.outerStride();
      const compute_t<X>* const row = rows(i);
      if (row == nullptr) {
        if (to != from) std::copy(from, from + x.cols(), to);
        continue;
      }
      turn_token<kTranspose, kLayout>(from, row, to, cut, options.first_channel, group);
    }
  };
  executor.run((x.rows() + task_rows - 1) / task_rows, task);
}

template <bool kTranspose, class X, class Table>
void rope_apply(const char* x_name, const ConstMatrixRef<X>& x,
                const typename Table::Positions& positions, const Table& table, const char* y_name,
                MatrixRef<X> y, const RopeOptions& options, ExecutorRef executor) {
  require_heads(x_name, x.cols(), table.rotary_dim(), options);
  require_shape(y_name, y.rows(), y.cols(), x.rows(), x.cols(), "the shape of the input");
  table.require_positions(positions, x.rows());
  if constexpr (Table::kSeveralAxes) {
    if (table.layout() == RopeLayout::half_per_axis) {
      return turn_rows<kTranspose, RopeLayout::half_per_axis, X>(x, positions, table, y, options,
                                                                 executor);
    }
  }
  if (table.layout() == RopeLayout::interleaved) {
    turn_rows<kTranspose, RopeLayout::interleaved, X>(x, positions, table, y, options, executor);
  } else {
    turn_rows<kTranspose, RopeLayout::half, X>(x, positions, table, y, options, executor);
  }
}

}  // namespace detail

/// y = x with each head turned to its row's position.
///   x, y        T x (heads * D); y may be x itself, but must not overlap it otherwise
///   positions   a first position (rows follow one by one), or a list of T
///   table       RotaryTable<float> for float, half and bfloat16; RotaryTable<double> for double.
///               A RotaryNdTable has several axes and T x A coordinates (rope_nd.hpp); xpos.hpp has
///               tables that also scale
/// T = 0 does nothing.  Cost: 6 flops per pair, one pass over memory.
/// Errors: heads < 1 or not dividing the columns; first_channel + R > D; a list of positions of
/// another size than T; the shape of y.
template <MatrixLike X, class Table, OutputMatrix Y>
  requires SameScalar<X, Y> && detail::RotaryTableFor<Table, X>
void rope_forward(const X& x, const typename Table::Positions& positions, const Table& table, Y&& y,
                  const RopeOptions& options, ExecutorRef executor = {}) {
  detail::rope_apply<false, scalar_t<X>>("x", x, positions, table, "y", y, options, executor);
}

/// rope_forward with y = x.
template <OutputMatrix X, class Table>
  requires detail::RotaryTableFor<Table, X>
void rope_in_place(X&& x, const typename Table::Positions& positions, const Table& table,
                   const RopeOptions& options, ExecutorRef executor = {}) {
  detail::rope_apply<false, scalar_t<X>>("x", x, positions, table, "x", x, options, executor);
}

/// The rotated copy of x, which may be any Eigen expression or storage order.
template <class X, class Table>
  requires(detail::EigenDense<X>&& StorageScalar<scalar_t<X>>&& detail::RotaryTableFor<Table, X>)
Matrix<scalar_t<X>> rope(const X& x, const typename Table::Positions& positions, const Table& table,
                         const RopeOptions& options, ExecutorRef executor = {}) {
  Matrix<scalar_t<X>> y = x;
  rope_in_place(y, positions, table, options, executor);
  return y;
}

/// dx = dL/dx from dy = dL/dy: pairs turn back by -n f_p, times attention_factor.  Overwrites dx,
/// which may be dy.  Errors as rope_forward.
template <MatrixLike DY, class Table, OutputMatrix DX>
  requires SameScalar<DY, DX> && detail::RotaryTableFor<Table, DY>
void rope_backward(const DY& dy, const typename Table::Positions& positions, const Table& table,
                   DX&& dx, const RopeOptions& options, ExecutorRef executor = {}) {
  detail::rope_apply<true, scalar_t<DY>>("dy", dy, positions, table, "dx", dx, options, executor);
}

/// rope_backward with dx = dy.
template <OutputMatrix DY, class Table>
  requires detail::RotaryTableFor<Table, DY>
void rope_backward_in_place(DY&& dy, const typename Table::Positions& positions, const Table& table,
                            const RopeOptions& options, ExecutorRef executor = {}) {
  detail::rope_apply<true, scalar_t<DY>>("dy", dy, positions, table, "dy", dy, options, executor);
}

namespace detail {

/// add(i, p, d) for every row i, head and pair p, d being what dL/dn of the pair's axis gains.
template <MatrixLike Y, MatrixLike DY, class Table, class Add>
void position_gradient(const Y& y, const DY& dy, const Table& table, const RopeOptions& options,
                       Add&& add) {
  const Index head_dim = y.cols() / options.heads;
  for (Index i = 0; i < y.rows(); ++i) {
    for (Index head = 0; head < options.heads; ++head) {
      const Index at = head * head_dim + options.first_channel;
      for (Index p = 0; p < table.pairs(); ++p) {
        const auto [first, second] = table.channels(p);
        const auto value = [&](const auto& m, Index channel) {
          return static_cast<double>(m(i, at + channel));
        };
        const double y_a = value(y, first), y_b = value(y, second);
        const double dy_a = value(dy, first), dy_b = value(dy, second);
        add(i, p, table.frequencies().inv_freq[p] * (dy_b * y_a - dy_a * y_b));
        if (const double g = table.growth(p); g != 0.0) add(i, p, g * (dy_a * y_a + dy_b * y_b));
      }
    }
  }
}

}  // namespace detail

/// dL/dn of each row, for learned or optimised positions:
/// d_positions[i] = sum over heads and pairs of f_p (dy_b y_a - dy_a y_b), in double; XPOS adds
/// g_p (dy_a y_a + dy_b y_b) of its scale exp(g_p n).
///   y, dy   the rotated activations (not x) and the gradient with respect to them, T x (heads * D)
/// Errors: shapes of dy and d_positions; heads and first_channel as in rope_forward.
template <MatrixLike Y, MatrixLike DY>
  requires SameScalar<Y, DY>
void rope_position_backward(const Y& y, const DY& dy,
                            const RotaryTable<compute_t<scalar_t<Y>>>& table,
                            VectorRef<double> d_positions, const RopeOptions& options) {
  detail::require_heads("y", y.cols(), table.rotary_dim(), options);
  detail::require_shape("dy", dy.rows(), dy.cols(), y.rows(), y.cols(), "the shape of y");
  detail::require_size("d_positions", d_positions.size(), y.rows(), "one for each row of y");
  d_positions.setZero();
  detail::position_gradient(y, dy, table, options,
                            [&](Index i, Index, double d) { d_positions[i] += d; });
}

/// Reorders the rotary channels of each head from one layout to the other; the rest stays.
///
///   activations   T x (heads * D)
///   W_q, W_k      in x (heads * D): their columns, never those of W_v or W_o
///   biases        1 x (heads * D), or a Vector (below)
///   q/k gains     the same; heads = 1 where all heads share one
///
/// Scores do not change when queries and keys are converted alike.  The backward pass is the
/// conversion back: rope_convert_layout(dy, to, from, rotary_dim, dx, options).
/// Errors: x and y the same; the shape of y; rotary_dim odd or below 2; unknown layouts; heads and
/// first_channel as in rope_forward.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y>
void rope_convert_layout(const X& x, RopeLayout from, RopeLayout to, Index rotary_dim, Y&& y,
                         const RopeOptions& options) {
  detail::require_layout("from", from);
  detail::require_layout("to", to);
  detail::require(rotary_dim >= 2 && rotary_dim % 2 == 0, "rotary_dim (", rotary_dim,
                  ") must be even and at least 2");
  const Index head_dim = detail::require_heads("x", x.cols(), rotary_dim, options);
  detail::require_shape("y", y.rows(), y.cols(), x.rows(), x.cols(), "the shape of x");
  detail::require(x.size() == 0 || x.data() != y.data(),
                  "y must not be x: the conversion cannot work in place");
  y = x;
  if (from == to) return;
  const Index pairs = rotary_dim / 2;
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index head = 0; head < options.heads; ++head) {
      const auto* source = x.data() + i * x.outerStride() + head * head_dim + options.first_channel;
      auto* target = y.data() + i * y.outerStride() + head * head_dim + options.first_channel;
      for (Index p = 0; p < pairs; ++p) {
        if (to == RopeLayout::half) {
          target[p] = source[2 * p];
          target[p + pairs] = source[2 * p + 1];
        } else {
          target[2 * p] = source[p];
          target[2 * p + 1] = source[p + pairs];
        }
      }
    }
  }
}

/// The converted copy of a matrix.
template <MatrixLike X>
Matrix<scalar_t<X>> rope_convert_layout(const X& x, RopeLayout from, RopeLayout to,
                                        Index rotary_dim, const RopeOptions& options) {
  Matrix<scalar_t<X>> y(x.rows(), x.cols());
  rope_convert_layout(x, from, to, rotary_dim, y, options);
  return y;
}

/// The converted copy of a bias or a gain.
template <StorageScalar S>
Vector<S> rope_convert_layout(const Vector<S>& x, RopeLayout from, RopeLayout to, Index rotary_dim,
                              const RopeOptions& options) {
  Vector<S> y(x.size());
  rope_convert_layout(Eigen::Map<const RowVector<S>>(x.data(), x.size()), from, to, rotary_dim,
                      Eigen::Map<RowVector<S>>(y.data(), y.size()), options);
  return y;
}

EIGENBLOCKS_NAMESPACE_END
