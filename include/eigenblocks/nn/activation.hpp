// Activation functions over matrices, and as Eigen expressions.
//
//   silu       x sigmoid(x)                               slope  s (1 + x (1 - s)), s = sigmoid(x)
//   gelu       x Phi(x)                                          Phi(x) + x phi(x)
//   gelu_tanh  x/2 (1 + tanh(k (x + 0.044715 x^3))), k = sqrt(2/pi)
//   relu       max(x, 0)                                         1 for x > 0, else 0
//   sigmoid    1 / (1 + e^-x)                                    s (1 - s)
//
//   activation_forward(kind, x, y)          y = f(x)
//   activation_backward(kind, x, dy, dx)    dx = dy f'(x)
//   y = silu(a.array()) * b.array()         expressions: lazy, vectorised, fused with what surrounds them
//
// Shapes: x, y, dy, dx are T x n; an output may be the memory of an input.  Accuracy and limits: core/math.hpp; nothing
// overflows on the way, +-inf give the limits, NaN stays NaN (relu's slope at NaN is 0).
// The loops are bound by the exponentials, not by memory (one for silu, sigmoid and gelu_tanh, and one for gelu).
//
// Errors: invalid_argument where shapes differ.
// Sources: SiLU arXiv 1710.05941, GELU arXiv 1606.08415 (gelu_tanh is the approximation of BERT and GPT-2).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/math.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/softmax.hpp>

#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class Activation { silu, gelu, gelu_tanh, relu, sigmoid };

namespace detail {

/// value(x), and both(x, value, slope) for backward passes that need the two: they share the exponential.
template <Activation A>
struct ActivationMath {
  template <class P>
  static EIGENBLOCKS_ALWAYS_INLINE P value(const P& x) {
    if constexpr (A == Activation::silu) return simd::silu(x);
    if constexpr (A == Activation::gelu) return simd::gelu(x);
    if constexpr (A == Activation::gelu_tanh) return simd::gelu_tanh(x);
    if constexpr (A == Activation::relu) {
      const P none = simd::zero<P>();
      return simd::select(simd::less(x, none), none, x);
    }
    if constexpr (A == Activation::sigmoid) return simd::sigmoid(x);
  }

  // Where a factor has vanished the other may be infinite; the limit is selected instead of 0 * inf.
  template <class P>
  static EIGENBLOCKS_ALWAYS_INLINE void both(const P& x, P& f, P& slope) {
    using S = simd::lane_t<P>;
    const P none = simd::zero<P>();
    if constexpr (A == Activation::silu) {
      P gate, rest;
      simd::sigmoid_pair(x, gate, rest);
      const P bend = simd::mul(gate, rest);
      f = times(gate, x);
      slope = simd::select(simd::equal(bend, none), gate, simd::fma(x, bend, gate));
    } else if constexpr (A == Activation::gelu) {
      const P half_square = simd::mul(simd::mul(x, x), simd::set1<P>(S(-0.5)));
      const P density =
          simd::mul(simd::exp_nonpositive(half_square), simd::set1<P>(S(0.39894228040143267794)));
      const P cdf = simd::normal_cdf(x);
      f = times(cdf, x);
      slope = simd::select(simd::equal(density, none), cdf, simd::fma(x, density, cdf));
    } else if constexpr (A == Activation::gelu_tanh) {
      f = simd::gelu_tanh(x);
      slope = simd::gelu_tanh_grad(x);
    } else if constexpr (A == Activation::relu) {
      f = value(x);
      slope = simd::select(simd::less(none, x), simd::set1<P>(S(1)), none);
    } else {
      P rest;
      simd::sigmoid_pair(x, f, rest);
      slope = simd::mul(f, rest);
    }
  }

 private:
  template <class P>
  static EIGENBLOCKS_ALWAYS_INLINE P times(const P& factor, const P& x) {
    return simd::select(simd::equal(factor, simd::zero<P>()), simd::zero<P>(),
                        simd::mul(factor, x));
  }
};

/// Calls f with the ActivationMath of a kind known at run time.
template <class F>
void with_activation(Activation kind, F&& f) {
  switch (kind) {
    case Activation::silu:
      return f(ActivationMath<Activation::silu>{});
    case Activation::gelu:
      return f(ActivationMath<Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(ActivationMath<Activation::gelu_tanh>{});
    case Activation::relu:
      return f(ActivationMath<Activation::relu>{});
    case Activation::sigmoid:
      return f(ActivationMath<Activation::sigmoid>{});
  }
  raise<invalid_argument>("activation (", static_cast<int>(kind), ") is not one of the five kinds");
}

/// The same as an Eigen functor.
template <Activation A>
struct ActivationFunctor {
  template <class S>
  S operator()(const S& x) const {
    return ActivationMath<A>::value(x);
  }
  template <class P>
  P packetOp(const P& x) const {
    return ActivationMath<A>::value(x);
  }
};

template <Activation A, RealExpression D>
auto activation_expression(const D& x) {
  using Plain = std::remove_cvref_t<decltype(x.derived())>;
  return Eigen::CwiseUnaryOp<ActivationFunctor<A>, const Plain>(x.derived());
}

}  // namespace detail

/// y = f(x); x and y are T x n.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void activation_forward(Activation kind, const X& x, Y&& y, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  detail::require_shape("y", y.rows(), y.cols(), x.rows(), x.cols(), "shape of x");
  const ConstMatrixRef<S> from(x);
  MatrixRef<S> to(y);
  detail::with_activation(kind, [&](auto math) {
    detail::for_row_blocks(from.rows(), from.cols(), executor, [&](Index first, Index rows) {
      for (Index i = first; i < first + rows; ++i) {
        const S* const in = from.row(i).data();
        S* const out = to.row(i).data();
        detail::for_packets<S>(from.cols(), [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
          io.store(out + j, decltype(math)::value(io.load(in + j)));
        });
      }
    });
  });
}

/// dx = dy f'(x) from the input x; all T x n.
template <MatrixLike X, MatrixLike G, OutputMatrix D>
  requires SameScalar<X, G, D> && RealScalar<scalar_t<X>>
void activation_backward(Activation kind, const X& x, const G& dy, D&& dx,
                         ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  using P = simd::Packet<S>;
  detail::require_shape("dy", dy.rows(), dy.cols(), x.rows(), x.cols(), "shape of x");
  detail::require_shape("dx", dx.rows(), dx.cols(), x.rows(), x.cols(), "shape of x");
  const ConstMatrixRef<S> from(x), upstream(dy);
  MatrixRef<S> to(dx);
  detail::with_activation(kind, [&](auto math) {
    detail::for_row_blocks(from.rows(), from.cols(), executor, [&](Index first, Index rows) {
      for (Index i = first; i < first + rows; ++i) {
        const S* const in = from.row(i).data();
        const S* const up = upstream.row(i).data();
        S* const out = to.row(i).data();
        detail::for_packets<S>(from.cols(), [&](Index j, auto io) EIGENBLOCKS_INLINE_LAMBDA {
          P value, slope;
          decltype(math)::both(io.load(in + j), value, slope);
          io.store(out + j, simd::mul(io.load(up + j), slope));
        });
      }
    });
  });
}

/// Lazy element-wise expressions.
template <RealExpression D>
auto silu(const D& x) {
  return detail::activation_expression<Activation::silu>(x);
}
template <RealExpression D>
auto gelu(const D& x) {
  return detail::activation_expression<Activation::gelu>(x);
}
template <RealExpression D>
auto gelu_tanh(const D& x) {
  return detail::activation_expression<Activation::gelu_tanh>(x);
}
template <RealExpression D>
auto relu(const D& x) {
  return detail::activation_expression<Activation::relu>(x);
}
template <RealExpression D>
auto sigmoid(const D& x) {
  return detail::activation_expression<Activation::sigmoid>(x);
}

EIGENBLOCKS_NAMESPACE_END

/// Tells Eigen that the functor has a packet form.
template <eigenblocks::Activation A>
struct Eigen::internal::functor_traits<eigenblocks::detail::ActivationFunctor<A>> {
  enum { Cost = 40, PacketAccess = true };
};
