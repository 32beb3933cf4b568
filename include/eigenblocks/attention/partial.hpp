// Attention over disjoint sets of keys, merged through the log-sum-exp.
//
//   lse = log sum_p exp(lse_p),   out = sum_p exp(lse_p - lse) out_p
// Associative and commutative, identity element (out, lse) = (0, -inf).  A sink belongs to exactly one part (or is a part of
// its own with out = 0, lse = sink).  Backward, with w_p = exp(lse_p - lse):
//   dout_p = w_p dout,   dlse_p = w_p (<dout, out_p - out> + dlse)
//
// Layout: out_p is Tq x (heads * e) and lse_p is Tq x heads, as attention_forward gives them.
// Used by split-KV decoding, ring attention and the key chunks of the kernel itself.
// Sources: FlashDecoding; arXiv 2307.08691; ring attention arXiv 2310.01889.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

#include <cmath>
#include <limits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// log(e^a + e^b) without overflow; (-inf, -inf) gives -inf, NaN stays NaN.
template <RealScalar S>
S log_add_exp(S a, S b) {
  const S top = a > b ? a : b;
  if (top == -std::numeric_limits<S>::infinity()) return a + b;  // NaN + -inf is NaN
  return top + std::log1p(std::exp(-std::abs(a - b)));
}

/// e^(part - total), 0 for an empty part even when the total is empty too.
template <RealScalar S>
S merge_weight(S part, S total) {
  return part == -std::numeric_limits<S>::infinity() ? S(0) : std::exp(part - total);
}

inline void require_partial(const char* name, Index rows, Index cols, Index lse_rows, Index heads) {
  require(heads >= 1 || rows == 0, "lse has no columns");
  require(lse_rows == rows && (heads == 0 || cols % heads == 0), name, " is ", rows, " x ", cols,
          ", its lse ", lse_rows, " x ", heads,
          ": expected the same rows and heads dividing the columns");
}

}  // namespace detail

/// Merges the part (part_out, part_lse) into (out, lse) in place.  Error: shapes differ.
template <MatrixLike PO, MatrixLike PL, OutputMatrix O, OutputMatrix L>
  requires SameScalar<PO, PL, O, L> && RealScalar<scalar_t<O>>
void attention_merge_into(O&& out, L&& lse, const PO& part_out, const PL& part_lse) {
  using S = scalar_t<O>;
  const Index heads = lse.cols();
  detail::require_partial("out", out.rows(), out.cols(), lse.rows(), heads);
  detail::require_shape("part_out", part_out.rows(), part_out.cols(), out.rows(), out.cols(),
                        "shape of out");
  detail::require_shape("part_lse", part_lse.rows(), part_lse.cols(), lse.rows(), lse.cols(),
                        "shape of lse");
  if (heads == 0) return;
  const Index e = out.cols() / heads;
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index h = 0; h < heads; ++h) {
      const S total = detail::log_add_exp<S>(lse(i, h), part_lse(i, h));
      const S keep = detail::merge_weight<S>(lse(i, h), total);
      const S take = detail::merge_weight<S>(part_lse(i, h), total);
      auto row = out.row(i).segment(h * e, e);
      if (keep == S(0)) {
        row.setZero();  // an empty part contributes nothing, whatever its rows hold
      } else {
        row *= keep;
      }
      if (take != S(0)) row += take * part_out.row(i).segment(h * e, e);
      lse(i, h) = total;
    }
  }
}

/// Backward of one part of a merge: gradients of part_out and part_lse, given the merged out and lse, the upstream dout and
/// (optionally) dlse.  Overwrites dpart_out and dpart_lse.
template <MatrixLike PO, MatrixLike PL, MatrixLike O, MatrixLike L, MatrixLike DO, OutputMatrix DPO,
          OutputMatrix DPL>
  requires SameScalar<PO, PL, O, L, DO, DPO, DPL> && RealScalar<scalar_t<O>>
void attention_merge_backward(const PO& part_out, const PL& part_lse, const O& out, const L& lse,
                              const DO& dout, DPO&& dpart_out, DPL&& dpart_lse,
                              const Matrix<scalar_t<O>>* dlse = nullptr) {
  using S = scalar_t<O>;
  const Index heads = lse.cols(), rows = out.rows();
  detail::require_partial("out", rows, out.cols(), lse.rows(), heads);
  detail::require_shape("part_out", part_out.rows(), part_out.cols(), rows, out.cols(),
                        "shape of out");
  detail::require_shape("part_lse", part_lse.rows(), part_lse.cols(), rows, heads, "shape of lse");
  detail::require_shape("dout", dout.rows(), dout.cols(), rows, out.cols(), "shape of out");
  detail::require_shape("dpart_out", dpart_out.rows(), dpart_out.cols(), rows, out.cols(),
                        "shape of out");
  detail::require_shape("dpart_lse", dpart_lse.rows(), dpart_lse.cols(), rows, heads,
                        "shape of lse");
  if (dlse != nullptr)
    detail::require_shape("dlse", dlse->rows(), dlse->cols(), rows, heads, "shape of lse");
  if (heads == 0) return;
  const Index e = out.cols() / heads;
  for (Index i = 0; i < rows; ++i) {
    for (Index h = 0; h < heads; ++h) {
      const S weight = detail::merge_weight<S>(part_lse(i, h), lse(i, h));
      auto row = dpart_out.row(i).segment(h * e, e);
      if (weight == S(0)) {
        row.setZero();
        dpart_lse(i, h) = S(0);
        continue;
      }
      const auto upstream = dout.row(i).segment(h * e, e);
      row = weight * upstream;
      dpart_lse(i, h) =
          weight * (upstream.dot(part_out.row(i).segment(h * e, e) - out.row(i).segment(h * e, e)) +
                    (dlse ? (*dlse)(i, h) : S(0)));
    }
  }
}

EIGENBLOCKS_NAMESPACE_END
