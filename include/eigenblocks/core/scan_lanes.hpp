// Inside of scan.hpp: the recurrence over a block of lanes (channels), in registers, and its cut in time.
#pragma once

#include <eigenblocks/core/complex.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <complex>
#include <cstddef>
#include <type_traits>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

/// How the linear scans of scan.hpp run.
struct ScanOptions {
  bool reverse = false;  ///< h_t = a_t h_{t+1} + b_t, from the last row to the first
  bool wide = false;     ///< float only: carry h in double between the rows of one call
  Index time_chunk =
      0;  ///< rows per chunk of the three-pass scheme; 0: rows in order, lanes in parallel only
};

namespace detail {

template <FieldScalar S>
using FieldPacket = typename simd::ei::packet_traits<S>::type;
template <FieldScalar S>
inline constexpr Index kFieldLanes = Index(simd::ei::unpacket_traits<FieldPacket<S>>::size);

/// Lanes per task: 1 KB of a row.  Lanes do not meet, so the cut does not change a bit of the result.
template <FieldScalar S>
inline constexpr Index kScanBlock = Index(1024 / sizeof(S));

/// a or conj(a) times h, plus b.  (std::complex's own product tests for NaN.)
template <bool kConj, class P>
EIGENBLOCKS_ALWAYS_INLINE P scan_fma(const P& a, const P& h, const P& b) {
  if constexpr (ComplexScalar<P>) {
    const auto i = kConj ? -a.imag() : a.imag();
    return P(a.real() * h.real() - i * h.imag() + b.real(),
             a.real() * h.imag() + i * h.real() + b.imag());
  } else if constexpr (kConj && ComplexScalar<typename simd::ei::unpacket_traits<P>::type>) {
    return simd::ei::padd(simd::ei::pmul(simd::ei::pconj(a), h), b);
  } else {
    return simd::ei::pmadd(a, h, b);
  }
}

/// One recurrence over `lanes` channels.  Pointers are at the first row taken, steps lead from it to the next one taken
/// (negative in a reverse scan, 0 for coefficients that stay).  carry: the state before; null for none, h_0 = b_0.
template <FieldScalar S>
struct ScanJob {
  Index rows, lanes;
  const S* a;
  Index a_step;
  const S* b;
  Index b_step;
  S* h;
  Index h_step;
  const S* carry;

  ScanJob skip(Index r) const {
    return {rows - r, lanes,          a + r * a_step, a_step, b + r * b_step,
            b_step,   h + r * h_step, h_step,         carry};
  }
  ScanJob columns(Index first, Index count) const {
    return {rows,      count,     a + first,
            a_step,    b + first, b_step,
            h + first, h_step,    carry == nullptr ? nullptr : carry + first};
  }
};

template <class P>
EIGENBLOCKS_ALWAYS_INLINE P field_load(const typename simd::ei::unpacket_traits<P>::type* from) {
  return simd::ei::ploadu<P>(from);
}

/// K packets of lanes over all rows, the state in registers.
template <bool kConj, int K, class P, FieldScalar S>
EIGENBLOCKS_ALWAYS_INLINE void scan_columns(const ScanJob<S>& job, Index d) {
  constexpr Index w = Index(simd::ei::unpacket_traits<P>::size);
  const S *a = job.a + d, *b = job.b + d;
  S* h = job.h + d;
  P state[std::size_t(K)];
  for (int k = 0; k < K; ++k) state[k] = field_load<P>(job.carry + d + k * w);
  for (Index t = 0; t < job.rows; ++t) {
    for (int k = 0; k < K; ++k) {
      state[k] = scan_fma<kConj, P>(field_load<P>(a + k * w), state[k], field_load<P>(b + k * w));
      simd::ei::pstoreu<S>(h + k * w, state[k]);
    }
    a += job.a_step;
    b += job.b_step;
    h += job.h_step;
  }
}

/// The state after the last row, and (product not null) the product of the coefficients; no row is stored.
template <bool kConj, class P, FieldScalar S>
EIGENBLOCKS_ALWAYS_INLINE void scan_column_summary(const ScanJob<S>& job, Index d, S* product,
                                                   S* end) {
  const S *a = job.a + d, *b = job.b + d;
  const P none = simd::ei::pset1<P>(S(0));
  P state = field_load<P>(b), factor = none;
  if (job.carry != nullptr) {
    state = scan_fma<kConj, P>(field_load<P>(a), field_load<P>(job.carry + d), state);
  }
  if (product != nullptr)
    factor = scan_fma<kConj, P>(field_load<P>(a), simd::ei::pset1<P>(S(1)), none);
  for (Index t = 1; t < job.rows; ++t) {
    a += job.a_step;
    b += job.b_step;
    const P now = field_load<P>(a);
    state = scan_fma<kConj, P>(now, state, field_load<P>(b));
    factor = scan_fma<kConj, P>(now, factor, none);
  }
  if (product != nullptr) simd::ei::pstoreu<S>(product + d, factor);
  simd::ei::pstoreu<S>(end + d, state);
}

template <bool kConj, FieldScalar S>
EIGENBLOCKS_NOINLINE void scan_summary(const ScanJob<S>& job, S* product, S* end) {
  using P = FieldPacket<S>;
  constexpr Index w = kFieldLanes<S>;
  Index d = 0;
  for (; d + w <= job.lanes; d += w) scan_column_summary<kConj, P>(job, d, product, end);
  for (; d < job.lanes; ++d) scan_column_summary<kConj, S>(job, d, product, end);
}

/// The rows in order: the state in registers throughout where it fits, else a few rows at a time, about a page of memory,
/// so that memory is walked along the rows.
template <bool kConj, FieldScalar S>
EIGENBLOCKS_NOINLINE void scan_rows(ScanJob<S> job) {
  using P = FieldPacket<S>;
  constexpr Index w = kFieldLanes<S>;
  constexpr int kGroup = 8;
  const bool fits = job.lanes == kGroup * w || job.lanes <= w;
  const Index turn = fits ? job.rows : std::clamp<Index>(kScanBlock<S> * 4 / job.lanes, 2, 8);
  while (job.rows > 0) {
    ScanJob<S> part = job;
    part.rows = std::min(turn, job.rows);
    Index d = 0;
    for (; d + kGroup * w <= job.lanes; d += kGroup * w) scan_columns<kConj, kGroup, P>(part, d);
    for (; d + w <= job.lanes; d += w) scan_columns<kConj, 1, P>(part, d);
    for (; d < job.lanes; ++d) scan_columns<kConj, 1, S>(part, d);
    job = job.skip(part.rows);
    job.carry = part.h + (part.rows - 1) * part.h_step;
  }
}

/// The same with the state in double.
template <bool kConj, FieldScalar S>
EIGENBLOCKS_NOINLINE void scan_rows_wide(const ScanJob<S>& job) {
  using W = std::conditional_t<ComplexScalar<S>, std::complex<double>, double>;
  constexpr Index kBlock = 32;
  for (Index first = 0; first < job.lanes; first += kBlock) {
    const Index n = std::min(kBlock, job.lanes - first);
    const ScanJob<S> part = job.columns(first, n);
    W state[std::size_t(kBlock)];
    for (Index d = 0; d < n; ++d) state[d] = static_cast<W>(part.carry[d]);
    for (Index t = 0; t < part.rows; ++t) {
      const S *a = part.a + t * part.a_step, *b = part.b + t * part.b_step;
      S* h = part.h + t * part.h_step;
      for (Index d = 0; d < n; ++d) {
        state[d] = scan_fma<kConj, W>(static_cast<W>(a[d]), state[d], static_cast<W>(b[d]));
        h[d] = static_cast<S>(state[d]);
      }
    }
  }
}

template <bool kConj, FieldScalar S>
void scan_block(ScanJob<S> job, bool wide) {
  if (job.rows == 0) return;
  if (job.carry == nullptr) {  // h_0 = b_0
    if (job.h != job.b) std::copy(job.b, job.b + job.lanes, job.h);
    const S* const first = job.h;
    job = job.skip(1);
    job.carry = first;
  }
  if constexpr (std::is_same_v<real_t<S>, float>) {
    if (wide) return scan_rows_wide<kConj>(job);
  }
  scan_rows<kConj>(job);
}

inline Index scan_tasks(Index size, Index part) { return (size + part - 1) / part; }

/// Calls f(first lane, lanes) for blocks of lanes; for all of them at once where that is better.
template <FieldScalar S, class F>
void for_lane_blocks(Index lanes, ExecutorRef executor, F&& f) {
  if (lanes == 0) return;
  if (executor.workers() == 1) return f(Index(0), lanes);
  executor.run(scan_tasks(lanes, kScanBlock<S>), [&](Index task, int) {
    const Index first = task * kScanBlock<S>;
    f(first, std::min(kScanBlock<S>, lanes - first));
  });
}

/// The whole scan: lanes in parallel, or chunks of rows too (three passes: ends and products of the chunks, the states
/// between them in order, the rows from those states).
template <bool kConj, FieldScalar S>
void scan_all(const ScanJob<S>& job, const ScanOptions& options, ExecutorRef executor) {
  const Index chunk = options.time_chunk;
  if (chunk == 0 || job.rows <= chunk) {
    return for_lane_blocks<S>(job.lanes, executor, [&](Index first, Index count) {
      scan_block<kConj>(job.columns(first, count), options.wide);
    });
  }
  const Index chunks = scan_tasks(job.rows, chunk), blocks = scan_tasks(job.lanes, kScanBlock<S>);
  const auto part = [&](Index c) {
    ScanJob<S> rows = job.skip(c * chunk);
    rows.rows = std::min(chunk, rows.rows);
    return rows;
  };
  // Row c of `state`: what chunk c + 1 starts from.
  std::vector<S> product(static_cast<std::size_t>((chunks - 1) * job.lanes));
  std::vector<S> state(product.size());
  executor.run((chunks - 1) * blocks, [&](Index task, int) {
    const Index c = task / blocks, first = task % blocks * kScanBlock<S>;
    ScanJob<S> local = part(c);
    if (c > 0) local.carry = nullptr;
    scan_summary<kConj>(local.columns(first, std::min(kScanBlock<S>, job.lanes - first)),
                        c == 0 ? nullptr : product.data() + c * job.lanes + first,
                        state.data() + c * job.lanes + first);
  });
  for (Index c = 1; c + 1 < chunks; ++c) {
    S* const now = state.data() + c * job.lanes;
    for (Index d = 0; d < job.lanes; ++d) {  // the products are conjugated already
      now[d] = scan_fma<false, S>(product[static_cast<std::size_t>(c * job.lanes + d)],
                                  (now - job.lanes)[d], now[d]);
    }
  }
  executor.run(chunks * blocks, [&](Index task, int) {
    const Index c = task / blocks, first = task % blocks * kScanBlock<S>;
    ScanJob<S> local = part(c);
    if (c > 0) local.carry = state.data() + (c - 1) * job.lanes;
    scan_block<kConj>(local.columns(first, std::min(kScanBlock<S>, job.lanes - first)), false);
  });
}

inline void require_scan_options(const ScanOptions& o) {
  require(o.time_chunk >= 0, "time_chunk (", o.time_chunk, ") must be positive, or 0 for none");
  require(!(o.wide && o.time_chunk > 0), "time_chunk (", o.time_chunk,
          ") must be 0 where wide is set");
}

}  // namespace detail

EIGENBLOCKS_NAMESPACE_END
