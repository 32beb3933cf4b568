// The gated attention layer of Transformer-VQ: quantised keys, values and a gate in the manner of GAU.
//
//   q = d^(-1/4) rms(x W_q),  k = d^(-1/4) rms(x W_k)         rms of each head, without gain: q.k has the usual 1/sqrt(d)
//   v = silu(x W_v),  g = silu(x W_g)
//   r_D = d^(-1/4) sinusoid(D) W_r, D = 0 .. M;   u, v_bias likewise times d^(-1/4)
//   y = (vq_attention(q, k, v) * g) W_o
//   sinusoid(D) = [sin(D f_0), .., cos(D f_0), ..],  f_i = wave_base^(-2i/width)
//
// Shapes: x and y T x D; W_q, W_k D x (H d); W_v, W_g D x (H e); W_r D x (H d); u, v_bias H x d; W_o (H e) x D; the codebook
// (H codes) x d.  heads = 1 with e = 2 D is the paper's model; more heads are multi-head attention with a gate.  The norm
// before the layer and the residual around it are the caller's.
//
//   const VqLayer<float> layer({.heads = 1, .key_dim = 128, .value_dim = 2 * D});
//   vq_layer_forward(layer, weights, codebook, x, y, saved);         // saved.commit: add commit_weight * it to the loss
//   vq_layer_backward(layer, weights, codebook, saved, x, dy, dx, dweights);       // the commitment's gradient is in it
//   vq_average_update(average, saved.k, saved.attention.codes);      // then codebook = vq_codebook(average)
//   VqLayerState<float> state = vq_layer_state(layer, weights, codebook);
//   vq_layer_step(layer, weights, codebook, state, rows, out);       // any number of rows
//
// A step allocates nothing once the state has seen as many rows.  The state keeps r, u and v_bias of its first weights.
// Sources: arXiv 2309.16354, github.com/transformer-vq/transformer_vq (eps 1e-6, wave base 1e5, commit weight 1e-4); GAU arXiv
// 2202.10447.
#pragma once

#include <eigenblocks/attention/vq_attention.hpp>
#include <eigenblocks/nn/glu.hpp>
#include <eigenblocks/nn/norm.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

struct VqLayerOptions {
  Index heads = 1;
  Index key_dim = 128;    ///< d
  Index value_dim = 128;  ///< e
  Index block_len = 512;
  Index mem_len = 512;
  bool aggregate = true;
  VqGradient gradient = VqGradient::through_cache;
  double norm_eps = 1e-6;
  double wave_base = 1e5;
  double commit_weight = 1e-4;  ///< of the commitment loss in the gradient
};

/// Parameters, or their gradients.
template <RealScalar S>
struct VqLayerWeights {
  Matrix<S> w_q, w_k, w_v, w_g, w_r, w_o, u, v_bias;
};

/// Options, validated.  Errors: heads, key_dim, value_dim or block_len < 1, mem_len < 0, wave_base <= 0, commit_weight < 0.
template <RealScalar S>
class VqLayer {
 public:
  explicit VqLayer(const VqLayerOptions& options) : options_(options) {
    const auto positive = [](const char* name, Index value) {
      detail::require(value >= 1, name, " (", value, ") must be at least 1");
    };
    positive("heads", options.heads);
    positive("key_dim", options.key_dim);
    positive("value_dim", options.value_dim);
    positive("block_len", options.block_len);
    detail::require(options.mem_len >= 0, "mem_len (", options.mem_len, ") must not be negative");
    detail::require(options.wave_base > 0, "wave_base (", options.wave_base, ") must be positive");
    detail::require(options.commit_weight >= 0, "commit_weight (", options.commit_weight,
                    ") must not be negative");
    gain_.setConstant(options.key_dim, scale());
  }

  const VqLayerOptions& options() const { return options_; }
  VqAttentionOptions attention() const {
    return {.heads = options_.heads,
            .block_len = options_.block_len,
            .mem_len = options_.mem_len,
            .aggregate = options_.aggregate,
            .gradient = options_.gradient};
  }
  RmsNormOptions norm() const { return {.eps = options_.norm_eps, .heads = options_.heads}; }
  /// d^(-1/4), alone and as the gain of the norms.
  S scale() const { return static_cast<S>(std::pow(static_cast<double>(options_.key_dim), -0.25)); }
  const Vector<S>& gain() const { return gain_; }

  /// Rows are the distances 0 .. M.
  Matrix<S> sinusoids(Index width) const {
    Matrix<S> waves(options_.mem_len + 1, width);
    for (Index i = 0; i < width / 2; ++i) {
      const double f =
          std::pow(options_.wave_base, -2.0 * static_cast<double>(i) / static_cast<double>(width));
      for (Index distance = 0; distance < waves.rows(); ++distance) {
        waves(distance, i) = static_cast<S>(std::sin(static_cast<double>(distance) * f));
        waves(distance, width / 2 + i) =
            static_cast<S>(std::cos(static_cast<double>(distance) * f));
      }
    }
    return waves;
  }

 private:
  VqLayerOptions options_;
  Vector<S> gain_;
};

/// What the backward needs; its buffers are reused when the same object is passed again.
template <RealScalar S>
struct VqLayerSaved {
  Matrix<S> q_raw, k_raw, v_raw, g_raw;  ///< projections
  Vector<S> q_rstd, k_rstd;
  Matrix<S> q, k, v, attended;
  VqBias<S> bias;
  Matrix<S> waves;       ///< the sinusoids, recomputed when the layer or the width of x is another
  double wave_base = 0;  ///< theirs
  VqSaved<S> attention;
  S commit = 0;  ///< the commitment loss, without its weight
};

/// A sequence in progress; copying it is a snapshot.
template <RealScalar S>
struct VqLayerState {
  VqState<S> attention;
  VqBias<S> bias;
  Matrix<S> q, k, v, g, attended;  ///< scratch
};

namespace detail {

template <RealScalar S, class C>
void require_vq_layer(const VqLayer<S>& layer, const VqLayerWeights<S>& w, const C& codebook,
                      Index width) {
  const VqLayerOptions& o = layer.options();
  const Index key = o.heads * o.key_dim, value = o.heads * o.value_dim;
  require(width % 2 == 0, "x has ", width, " columns, expected an even number (sines and cosines)");
  require_shape("w_q", w.w_q.rows(), w.w_q.cols(), width, key, "columns of x, heads * key_dim");
  require_shape("w_k", w.w_k.rows(), w.w_k.cols(), width, key, "columns of x, heads * key_dim");
  require_shape("w_v", w.w_v.rows(), w.w_v.cols(), width, value, "columns of x, heads * value_dim");
  require_shape("w_g", w.w_g.rows(), w.w_g.cols(), width, value, "columns of x, heads * value_dim");
  require_shape("w_r", w.w_r.rows(), w.w_r.cols(), width, key, "columns of x, heads * key_dim");
  require_shape("w_o", w.w_o.rows(), w.w_o.cols(), value, width, "heads * value_dim, columns of x");
  require_shape("u", w.u.rows(), w.u.cols(), o.heads, o.key_dim, "heads x key_dim");
  require_shape("v_bias", w.v_bias.rows(), w.v_bias.cols(), o.heads, o.key_dim, "heads x key_dim");
  vq_sizes(0, key, codebook.rows(), codebook.cols(), o.heads);
}

/// (M + 1) x (heads d) to (heads (M + 1)) x d.
template <RealScalar S>
void heads_to_rows(const Matrix<S>& from, Index heads, Matrix<S>& to) {
  const Index d = from.cols() / heads, rows = from.rows();
  to.resize(heads * rows, d);
  for (Index h = 0; h < heads; ++h) to.middleRows(h * rows, rows) = from.middleCols(h * d, d);
}

template <RealScalar S>
void vq_layer_bias(const VqLayer<S>& layer, const VqLayerWeights<S>& w, const Matrix<S>& waves,
                   VqBias<S>& bias, ExecutorRef executor) {
  Matrix<S> r(waves.rows(), w.w_r.cols());
  linear_forward(waves, w.w_r, r, executor);
  heads_to_rows(r, layer.options().heads, bias.r);
  bias.r *= layer.scale();
  bias.u = layer.scale() * w.u;
  bias.v_bias = layer.scale() * w.v_bias;
}

}  // namespace detail

/// y (T x D) from x (T x D); fills `saved` for the backward.
template <MatrixLike X, MatrixLike C, OutputMatrix Y>
  requires SameScalar<X, C, Y> && RealScalar<scalar_t<X>>
void vq_layer_forward(const VqLayer<scalar_t<X>>& layer, const VqLayerWeights<scalar_t<X>>& weights,
                      const C& codebook, const X& x, Y&& y, VqLayerSaved<scalar_t<X>>& saved,
                      ExecutorRef executor = {}) {
  const VqLayerOptions& o = layer.options();
  const Index rows = x.rows(), key = o.heads * o.key_dim, value = o.heads * o.value_dim;
  detail::require_vq_layer(layer, weights, codebook, x.cols());
  detail::require_shape("y", y.rows(), y.cols(), rows, x.cols(), "shape of x");
  if (saved.waves.rows() != o.mem_len + 1 || saved.waves.cols() != x.cols() ||
      saved.wave_base != o.wave_base) {
    saved.waves = layer.sinusoids(x.cols());
    saved.wave_base = o.wave_base;
  }
  detail::vq_layer_bias(layer, weights, saved.waves, saved.bias, executor);
  for (auto* m : {&saved.q_raw, &saved.k_raw, &saved.q, &saved.k}) m->resize(rows, key);
  for (auto* m : {&saved.v_raw, &saved.g_raw, &saved.v, &saved.attended}) m->resize(rows, value);
  saved.q_rstd.resize(rows * o.heads);
  saved.k_rstd.resize(rows * o.heads);
  linear_forward(x, weights.w_q, saved.q_raw, executor);
  linear_forward(x, weights.w_k, saved.k_raw, executor);
  linear_forward(x, weights.w_v, saved.v_raw, executor);
  linear_forward(x, weights.w_g, saved.g_raw, executor);
  rms_norm_forward(saved.q_raw, layer.gain(), saved.q, saved.q_rstd, layer.norm(), executor);
  rms_norm_forward(saved.k_raw, layer.gain(), saved.k, saved.k_rstd, layer.norm(), executor);
  activation_forward(Activation::silu, saved.v_raw, saved.v, executor);
  saved.attention = vq_attention_forward(saved.q, saved.k, saved.v, codebook, saved.attended,
                                         layer.attention(), saved.bias, executor);
  saved.commit = vq_commit_forward(saved.k, codebook, saved.attention.codes);
  Matrix<scalar_t<X>> gated(rows, value);
  glu_forward(saved.g_raw, saved.attended, gated, Activation::silu, executor);
  linear_forward(gated, weights.w_o, y, executor);
}

/// dx (T x D) and every gradient of the weights (dweights is resized and overwritten) of <dy, y> + commit_weight * commit.
template <MatrixLike X, MatrixLike C, MatrixLike DY, OutputMatrix DX>
  requires SameScalar<X, C, DY, DX> && RealScalar<scalar_t<X>>
void vq_layer_backward(const VqLayer<scalar_t<X>>& layer,
                       const VqLayerWeights<scalar_t<X>>& weights, const C& codebook,
                       const VqLayerSaved<scalar_t<X>>& saved, const X& x, const DY& dy, DX&& dx,
                       VqLayerWeights<scalar_t<X>>& dweights, ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const VqLayerOptions& o = layer.options();
  const Index rows = x.rows(), width = x.cols(), key = o.heads * o.key_dim,
              value = o.heads * o.value_dim;
  detail::require_vq_layer(layer, weights, codebook, width);
  detail::require_shape("dy", dy.rows(), dy.cols(), rows, width, "shape of x");
  detail::require_shape("dx", dx.rows(), dx.cols(), rows, width, "shape of x");
  detail::require_shape("saved.q", saved.q.rows(), saved.q.cols(), rows, key,
                        "rows of x, heads * key_dim");
  detail::require_shape("saved.waves", saved.waves.rows(), saved.waves.cols(), o.mem_len + 1, width,
                        "mem_len + 1, columns of x");
  for (auto* m : {&dweights.w_q, &dweights.w_k, &dweights.w_r}) m->resize(width, key);
  for (auto* m : {&dweights.w_v, &dweights.w_g}) m->resize(width, value);
  dweights.w_o.resize(value, width);

  Matrix<S> gated(rows, value), dgated(rows, value), dg(rows, value), dattended(rows, value);
  glu_forward(saved.g_raw, saved.attended, gated, Activation::silu, executor);
  linear_backward(gated, weights.w_o, dy, dgated, dweights.w_o, executor);
  glu_backward(saved.g_raw, saved.attended, dgated, dg, dattended, Activation::silu, executor);

  Matrix<S> dq(rows, key), dk(rows, key), dcommit(rows, key), dv(rows, value);
  VqBias<S> dbias;
  vq_attention_backward(saved.attention, saved.q, saved.v, codebook, saved.attended, dattended, dq,
                        dk, dv, layer.attention(), saved.bias, &dbias, executor);
  vq_commit_backward(saved.k, codebook, saved.attention.codes, static_cast<S>(o.commit_weight),
                     dcommit);
  dk += dcommit;
  Vector<S> dgain(o.key_dim);  // the gain is a constant
  rms_norm_backward(saved.q_raw, layer.gain(), saved.q_rstd, dq, dq, dgain, layer.norm(), executor);
  rms_norm_backward(saved.k_raw, layer.gain(), saved.k_rstd, dk, dk, dgain, layer.norm(), executor);
  activation_backward(Activation::silu, saved.v_raw, dv, dv, executor);

  linear_backward_weight(x, dq, dweights.w_q, executor);
  linear_backward_weight(x, dk, dweights.w_k, executor);
  linear_backward_weight(x, dv, dweights.w_v, executor);
  linear_backward_weight(x, dg, dweights.w_g, executor);
  linear_backward_input(dq, weights.w_q, dx, executor);
  linear_accumulate_input(dk, weights.w_k, dx, executor);
  linear_accumulate_input(dv, weights.w_v, dx, executor);
  linear_accumulate_input(dg, weights.w_g, dx, executor);

  dweights.u = layer.scale() * dbias.u;
  dweights.v_bias = layer.scale() * dbias.v_bias;
  const Index distances = o.mem_len + 1;
  Matrix<S> dr(distances, key);
  for (Index h = 0; h < o.heads; ++h) {
    dr.middleCols(h * o.key_dim, o.key_dim) =
        layer.scale() * dbias.r.middleRows(h * distances, distances);
  }
  linear_backward_weight(saved.waves, dr, dweights.w_r, executor);
}

/// The state before the first token.
template <RealScalar S, MatrixLike C>
  requires std::same_as<S, scalar_t<C>> VqLayerState<S> vq_layer_state(
      const VqLayer<S>& layer, const VqLayerWeights<S>& weights, const C& codebook,
      ExecutorRef executor = {}) {
    detail::require_vq_layer(layer, weights, codebook, weights.w_q.rows());
    VqLayerState<S> state;
    state.attention = vq_state(codebook, layer.options().value_dim, layer.attention());
    detail::vq_layer_bias(layer, weights, layer.sinusoids(weights.w_r.rows()), state.bias,
                          executor);
    return state;
  }

/// The next rows of a sequence: out (n x D) as vq_layer_forward gives it for the whole.
template <MatrixLike X, MatrixLike C, OutputMatrix Y>
  requires SameScalar<X, C, Y> && RealScalar<scalar_t<X>>
void vq_layer_step(const VqLayer<scalar_t<X>>& layer, const VqLayerWeights<scalar_t<X>>& weights,
                   const C& codebook, VqLayerState<scalar_t<X>>& state, const X& x, Y&& out,
                   ExecutorRef executor = {}) {
  const VqLayerOptions& o = layer.options();
  const Index rows = x.rows(), key = o.heads * o.key_dim, value = o.heads * o.value_dim;
  detail::require_vq_layer(layer, weights, codebook, x.cols());
  detail::require_shape("out", out.rows(), out.cols(), rows, x.cols(), "shape of x");
  detail::require_shape("state.bias.u", state.bias.u.rows(), state.bias.u.cols(), o.heads,
                        o.key_dim, "heads x key_dim");
  for (auto* m : {&state.q, &state.k}) m->resize(rows, key);
  for (auto* m : {&state.v, &state.g, &state.attended}) m->resize(rows, value);
  linear_forward(x, weights.w_q, state.q, executor);
  linear_forward(x, weights.w_k, state.k, executor);
  linear_forward(x, weights.w_v, state.v, executor);
  linear_forward(x, weights.w_g, state.g, executor);
  rms_norm_forward(state.q, layer.gain(), state.q, layer.norm(), executor);
  rms_norm_forward(state.k, layer.gain(), state.k, layer.norm(), executor);
  activation_forward(Activation::silu, state.v, state.v, executor);
  vq_attention_step(state.attention, state.q, state.k, state.v, codebook, state.attended,
                    layer.attention(), state.bias, executor);
  glu_forward(state.g, state.attended, state.g, Activation::silu, executor);
  linear_forward(state.g, weights.w_o, out, executor);
}

EIGENBLOCKS_NAMESPACE_END
