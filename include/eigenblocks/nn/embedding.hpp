// Embedding: rows of a table picked by token ids.
//
//   embedding_forward      y(t, :) = E(ids[t], :)
//   embedding_backward     dE = 0, then dE(ids[t], :) += dy(t, :) for t = 0, 1, ...
//   embedding_accumulate   the same without the zeros: for tables that also serve as output head, whose dense
//                          gradient is there already
//
// Shapes: table E and dE are V x d, ids has T entries, y and dy are T x d.  ids is anything contiguous with data() and
// size(): std::vector, std::array, std::span, an Eigen vector; any integer type.
// Repeated ids are added in the order of their positions, for every executor (which cuts columns, not tokens).
//
// Errors: std::out_of_range for an id outside [0, V), before anything is written; invalid_argument where shapes differ.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/softmax.hpp>

#include <algorithm>
#include <concepts>
#include <span>
#include <stdexcept>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

/// No strided Eigen vectors: their data() is not the whole story.
template <class R>
inline constexpr bool kContiguousVector = true;
template <class R>
  requires requires { int(R::InnerStrideAtCompileTime); }
inline constexpr bool kContiguousVector<R> =
    bool(R::IsVectorAtCompileTime) && int(R::InnerStrideAtCompileTime) == 1;

}  // namespace detail

/// A contiguous sequence of integers.
template <class R>
concept TokenIds = requires(const R& ids) {
  requires std::integral<std::remove_cvref_t<decltype(*ids.data())>>;
  { ids.size() } -> std::convertible_to<std::size_t>;
}
&&detail::kContiguousVector<R>;

namespace detail {

template <TokenIds Ids>
auto token_span(const Ids& ids, Index vocabulary) {
  const std::span tokens(ids.data(), static_cast<std::size_t>(ids.size()));
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const auto id = static_cast<Index>(tokens[t]);  // an unsigned id beyond Index turns negative
    if (id < 0 || id >= vocabulary) [[unlikely]] {
      raise<std::out_of_range>("ids[", t, "] (", id, ") is outside [0, ", vocabulary, ")");
    }
  }
  return tokens;
}

template <class S, class Tokens>
void scatter_add(Tokens tokens, const ConstMatrixRef<S>& dy, MatrixRef<S> dtable, bool overwrite,
                 ExecutorRef executor) {
  constexpr Index block = 256;
  const Index cols = dtable.cols();
  executor.run((cols + block - 1) / block, [&](Index task, int) {
    const Index first = task * block, width = std::min(block, cols - first);
    if (overwrite) dtable.middleCols(first, width).setZero();
    Index t = 0;
    for (const auto id : tokens) {
      S* const to = dtable.row(static_cast<Index>(id)).data() + first;
      const S* const from = dy.row(t++).data() + first;
      for_packets<S>(width, [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
        io.store(to + j, simd::add(io.load(to + j), io.load(from + j)));
      });
    }
  });
}

}  // namespace detail

/// y(t, :) = table(ids[t], :).
template <MatrixLike E, TokenIds Ids, OutputMatrix Y>
  requires SameScalar<E, Y>
void embedding_forward(const E& table, const Ids& ids, Y&& y, ExecutorRef executor = {}) {
  using S = scalar_t<E>;
  const auto tokens = detail::token_span(ids, table.rows());
  detail::require_shape("y", y.rows(), y.cols(), static_cast<Index>(tokens.size()), table.cols(),
                        "number of ids, cols of table");
  const ConstMatrixRef<S> from(table);
  MatrixRef<S> to(y);
  detail::for_row_blocks(to.rows(), to.cols(), executor, [&](Index first, Index rows) {
    for (Index t = first; t < first + rows; ++t) {
      const auto id = static_cast<Index>(tokens[static_cast<std::size_t>(t)]);
      std::copy_n(from.row(id).data(), from.cols(), to.row(t).data());
    }
  });
}

/// The same by value.
template <MatrixLike E, TokenIds Ids>
Matrix<scalar_t<E>> embedding(const E& table, const Ids& ids) {
  Matrix<scalar_t<E>> y(static_cast<Index>(ids.size()), table.cols());
  embedding_forward(table, ids, y);
  return y;
}

/// dtable(v, :) = sum of dy(t, :) over the tokens with ids[t] = v.
template <TokenIds Ids, MatrixLike G, OutputMatrix D>
  requires SameScalar<G, D> && RealScalar<scalar_t<G>>
void embedding_backward(const Ids& ids, const G& dy, D&& dtable, ExecutorRef executor = {}) {
  const auto tokens = detail::token_span(ids, dtable.rows());
  detail::require_shape("dy", dy.rows(), dy.cols(), static_cast<Index>(tokens.size()),
                        dtable.cols(), "number of ids, cols of dtable");
  detail::scatter_add<scalar_t<G>>(tokens, dy, dtable, true, executor);
}

/// Adds that sum to dtable.
template <TokenIds Ids, MatrixLike G, OutputMatrix D>
  requires SameScalar<G, D> && RealScalar<scalar_t<G>>
void embedding_accumulate(const Ids& ids, const G& dy, D&& dtable, ExecutorRef executor = {}) {
  const auto tokens = detail::token_span(ids, dtable.rows());
  detail::require_shape("dy", dy.rows(), dy.cols(), static_cast<Index>(tokens.size()),
                        dtable.cols(), "number of ids, cols of dtable");
  detail::scatter_add<scalar_t<G>>(tokens, dy, dtable, false, executor);
}

EIGENBLOCKS_NAMESPACE_END
