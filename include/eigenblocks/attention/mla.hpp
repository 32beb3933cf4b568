// Multi-head latent attention (MLA), the attention layer of DeepSeek-V2 and V3.
//
//   c_q = rms_norm(x W_dq + b_dq; g_q),  q = c_q W_uq              or, with q_rank = 0,  q = x W_q
//   [c' | k'] = x W_dkv + b_dkv,  c = rms_norm(c'; g_kv),  k_rope = R(pos) k'           one rope key for all heads
//   [k_nope | v]_h = c W_ukv,h                                                          per head
//   s = scale (<q_nope, k_nope> + <R(pos) q_rope, k_rope>),  y = concat_h(softmax(s) v) W_o + b_o       causal
//
//   W_dq D x q_rank       W_uq q_rank x H (nope + rope), per head [nope | rope]      W_q D x H (nope + rope)
//   W_dkv D x (kv_rank + rope), latent columns first      W_ukv kv_rank x H (nope + value), per head [k_nope | v]
//   W_o (H value) x D     Biases as in the official code: on the down projections and W_o only.
//
//   const Mla<float> layer({.heads = 16, .nope_dim = 128, .rope_dim = 64, .value_dim = 128, .kv_rank = 512});
//   mla_forward(layer, weights, x, y, saved, {.cu_seqlens = cu});        // expanded: keys and values of every head
//   mla_backward(layer, weights, saved, x, dy, dx, dweights, {.cu_seqlens = cu});
//   MlaState<float> state = mla_state(layer, capacity);                   // caches [c | k_rope] only
//   mla_step(layer, weights, state, rows, out);                          // any number of rows; = the rows of the full pass
//
// A step has two equal forms.  Absorbed: <q_nope, c W_uk> = <q_nope W_uk^T, c>, so queries meet the latents themselves and
// W_uv acts on their mixture (mla_decode.hpp); W_q W_uk^T is never multiplied out, that costs and rounds more.  Expanded:
// keys and values are formed from all cached latents.  MlaForm::automatic takes the one with fewer flops (mla_step_flops):
// absorbed for fewer rows than kv_rank (nope + value) / (2 kv_rank + rope - nope - rope - value), 170 at DeepSeek's sizes
// over a long cache.  Absorbed steps of one row allocate nothing once warm; with more rows only Eigen's product buffers.
//
// Under YaRN with mscale_all_dim pass its frequencies: their softmax_factor multiplies the scale (or give the number).
// Sources: arXiv 2405.04434, 2412.19437; transformers' DeepseekV2Attention and DeepseekV3Attention; kexue.fm 10091.
#pragma once

#include <eigenblocks/attention/mha.hpp>
#include <eigenblocks/attention/mla_decode.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

struct MlaOptions {
  Index heads = 1;
  Index nope_dim = 1;      ///< d_n, channels of a head without position
  Index rope_dim = 0;      ///< d_r, rotated channels: even; 0 for no positions at all
  Index value_dim = 1;     ///< d_v
  Index q_rank = 0;        ///< 0: queries come from x by one product
  Index kv_rank = 1;       ///< r_kv
  double norm_eps = 1e-6;  ///< of both latent norms, whatever rms_norm_eps says
  double rope_base = 10000.0;
  RopeLayout rope_layout = RopeLayout::interleaved;  ///< DeepSeek's weights; half is another model
  std::optional<double> scale = std::nullopt;        ///< default 1/sqrt(nope_dim + rope_dim)
  /// Multiplies the scale, given or not: YaRN's mscale^2.  Default: that of the frequencies, 1 without.
  std::optional<double> softmax_factor = std::nullopt;
};

/// Parameters, or their gradients.  Empty vectors are absent (a norm without gain keeps its division).
template <RealScalar S>
struct MlaWeights {
  Matrix<S> w_q;         ///< q_rank = 0 only
  Matrix<S> w_dq, w_uq;  ///< q_rank > 0 only
  Matrix<S> w_dkv, w_ukv, w_o;
  Vector<S> b_dq, b_dkv, b_o;
  Vector<S> q_norm, kv_norm;
};

enum class MlaForm { automatic, absorbed, expanded };

/// Options, validated, with the rotary table.  Immutable: threads share it.
template <RealScalar S>
class Mla {
 public:
  /// Errors: heads, nope_dim, value_dim, kv_rank < 1; q_rank < 0; rope_dim negative or odd; scale or softmax_factor not finite;
  /// frequencies (which replace the plain ones of rope_base) for another number of channels than rope_dim.
  explicit Mla(const MlaOptions& options, const RotaryFrequencies* frequencies = nullptr,
               Index positions = 4096)
      : options_(options) {
    const MlaOptions& o = options_;
    const auto positive = [](const char* name, Index value) {
      detail::require(value >= 1, name, " (", value, ") must be at least 1");
    };
    positive("heads", o.heads);
    positive("nope_dim", o.nope_dim);
    positive("value_dim", o.value_dim);
    positive("kv_rank", o.kv_rank);
    detail::require(o.q_rank >= 0, "q_rank (", o.q_rank, ") must not be negative");
    detail::require(o.rope_dim >= 0 && o.rope_dim % 2 == 0, "rope_dim (", o.rope_dim,
                    ") must be even and not negative");
    // (from the argument: g++ 12 takes the optionals of the copy for uninitialised)
    const double factor =
        options.softmax_factor.value_or(frequencies != nullptr ? frequencies->softmax_factor : 1.0);
    const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim())));
    scale_ = factor * scale;
    detail::require(std::isfinite(scale_), "scale (", scale, ") times softmax_factor (", factor,
                    ") must be finite");
    if (frequencies != nullptr) {
      detail::require(frequencies->rotary_dim() == o.rope_dim, "the frequencies turn ",
                      frequencies->rotary_dim(), " channels, rope_dim is ", o.rope_dim);
    }
    if (o.rope_dim > 0) {
      table_.emplace(frequencies ? *frequencies : rope_frequencies(o.rope_dim, o.rope_base),
                     o.rope_layout, positions);
    }
  }

  const MlaOptions& options() const { return options_; }
  /// Null without rotary positions.
  const RotaryTable<S>* rotary() const { return table_ ? &*table_ : nullptr; }
  /// Of the scores, softmax_factor included.
  double scale() const { return scale_; }
  Index head_dim() const { return options_.nope_dim + options_.rope_dim; }
  AttentionShape shape() const {
    AttentionShape shape;
    shape.heads = options_.heads;
    shape.scale = scale_;
    return shape;
  }

 private:
  MlaOptions options_;
  double scale_ = 1;
  std::optional<RotaryTable<S>> table_;
};

/// Flops of a step of `rows` queries over a cache that then holds `tokens`, projections common to both forms left out.
struct MlaStepFlops {
  double absorbed, expanded;
};
inline MlaStepFlops mla_step_flops(const MlaOptions& o, Index rows, Index tokens) {
  const auto real = [](Index n) { return static_cast<double>(n); };
  const double h = real(o.heads), r = real(o.kv_rank), q = real(rows), k = real(tokens);
  const double up = 2 * r * real(o.nope_dim + o.value_dim);  // one token's k_nope and v of one head
  return {h * (q * up + q * k * 2 * real(2 * o.kv_rank + o.rope_dim)),
          h * (k * up + q * k * 2 * real(o.nope_dim + o.rope_dim + o.value_dim))};
}

/// What the backward needs; its buffers are reused when the same object is passed again.
template <RealScalar S>
struct MlaSaved {
  Matrix<S> q_raw, q_latent;  ///< x W_dq + b_dq and its norm; empty without q_rank
  Vector<S> q_rstd;
  Matrix<S> kv_raw;  ///< x W_dkv + b_dkv
  Vector<S> kv_rstd;
  Matrix<S> latent;    ///< [c | k_rope], as cached
  Matrix<S> q, k, v;   ///< as attended to
  Matrix<S> attended;  ///< concatenated heads, before W_o
  AttentionSaved<S> attention;
};

namespace detail {

template <RealScalar S>
void require_mla_weights(const Mla<S>& layer, const MlaWeights<S>& w, Index width) {
  const MlaOptions& o = layer.options();
  const Index q = o.heads * layer.head_dim();
  const auto optional = [](const char* name, const Vector<S>& v, Index size, const char* meaning) {
    if (v.size() != 0) require_size(name, v.size(), size, meaning);
  };
  if (o.q_rank == 0) {
    require_shape("w_q", w.w_q.rows(), w.w_q.cols(), width, q,
                  "columns of x, heads * (nope_dim + rope_dim)");
  } else {
    require_shape("w_dq", w.w_dq.rows(), w.w_dq.cols(), width, o.q_rank, "columns of x, q_rank");
    require_shape("w_uq", w.w_uq.rows(), w.w_uq.cols(), o.q_rank, q,
                  "q_rank, heads * (nope_dim + rope_dim)");
    optional("b_dq", w.b_dq, o.q_rank, "q_rank, or none");
    optional("q_norm", w.q_norm, o.q_rank, "q_rank, or none");
  }
  require_shape("w_dkv", w.w_dkv.rows(), w.w_dkv.cols(), width, o.kv_rank + o.rope_dim,
                "columns of x, kv_rank + rope_dim");
  require_shape("w_ukv", w.w_ukv.rows(), w.w_ukv.cols(), o.kv_rank,
                o.heads * (o.nope_dim + o.value_dim), "kv_rank, heads * (nope_dim + value_dim)");
  require_shape("w_o", w.w_o.rows(), w.w_o.cols(), o.heads * o.value_dim, width,
                "heads * value_dim, columns of x");
  optional("b_dkv", w.b_dkv, o.kv_rank + o.rope_dim, "kv_rank + rope_dim, or none");
  optional("kv_norm", w.kv_norm, o.kv_rank, "kv_rank, or none");
  optional("b_o", w.b_o, width, "columns of x, or none");
}

/// Where head h's parts lie.
struct MlaColumns {
  const MlaOptions& o;
  Index head_dim() const { return o.nope_dim + o.rope_dim; }
  template <class M>
  auto q_nope(M& q, Index h) const {
    return q.middleCols(h * head_dim(), o.nope_dim);
  }  // and k_nope
  template <class M>
  auto q_rope(M& q, Index h) const {
    return q.middleCols(h * head_dim() + o.nope_dim, o.rope_dim);
  }
  template <class M>
  auto value(M& v, Index h) const {
    return v.middleCols(h * o.value_dim, o.value_dim);
  }
  template <class M>
  auto up_key(M& w, Index h) const {
    return w.middleCols(h * (o.nope_dim + o.value_dim), o.nope_dim);
  }
  template <class M>
  auto up_value(M& w, Index h) const {
    return w.middleCols(h * (o.nope_dim + o.value_dim) + o.nope_dim, o.value_dim);
  }
};

/// Queries (rotated) and latents (normed and rotated) of all rows.
template <MatrixLike X, RealScalar S>
void mla_project(const Mla<S>& layer, const MlaWeights<S>& w, const X& x, MlaSaved<S>& saved,
                 const MhaBatch& batch, ExecutorRef executor) {
  const MlaOptions& o = layer.options();
  const Index rows = x.rows();
  const RmsNormOptions norm{.eps = o.norm_eps};
  saved.q.resize(rows, o.heads * layer.head_dim());
  if (o.q_rank == 0) {
    linear_forward(x, w.w_q, saved.q, executor);
  } else {
    saved.q_raw.resize(rows, o.q_rank);
    saved.q_latent.resize(rows, o.q_rank);
    saved.q_rstd.resize(rows);
    project(x, w.w_dq, w.b_dq, saved.q_raw, executor);
    rms_norm_forward(saved.q_raw, w.q_norm, saved.q_latent, saved.q_rstd, norm, executor);
    linear_forward(saved.q_latent, w.w_uq, saved.q, executor);
  }
  saved.kv_raw.resize(rows, o.kv_rank + o.rope_dim);
  saved.latent.resize(rows, o.kv_rank + o.rope_dim);
  saved.kv_rstd.resize(rows);
  project(x, w.w_dkv, w.b_dkv, saved.kv_raw, executor);
  rms_norm_forward(saved.kv_raw.leftCols(o.kv_rank), w.kv_norm, saved.latent.leftCols(o.kv_rank),
                   saved.kv_rstd, norm, executor);
  if (layer.rotary() == nullptr) return;
  saved.latent.rightCols(o.rope_dim) = saved.kv_raw.rightCols(o.rope_dim);
  for_each_batch_part(batch, rows, [&](Index first, Index count) {
    rope_in_place(saved.q.middleRows(first, count), batch.first_position, *layer.rotary(),
                  {.heads = o.heads, .first_channel = o.nope_dim}, executor);
    rope_in_place(saved.latent.middleRows(first, count).rightCols(o.rope_dim), batch.first_position,
                  *layer.rotary(), {.heads = 1}, executor);
  });
}

/// Keys and values of every head from latent rows [c | k_rope].
template <MatrixLike L, RealScalar S>
void mla_expand(const Mla<S>& layer, const MlaWeights<S>& w, const L& latent, Matrix<S>& k,
                Matrix<S>& v, ExecutorRef executor) {
  const MlaOptions& o = layer.options();
  const MlaColumns at{o};
  k.resize(latent.rows(), o.heads * layer.head_dim());
  v.resize(latent.rows(), o.heads * o.value_dim);
  const ConstMatrixRef<S> c = latent.leftCols(o.kv_rank);
  executor.run(o.heads, [&](Index h, int) {
    product_nn<S>(c, at.up_key(w.w_ukv, h), at.q_nope(k, h));
    product_nn<S>(c, at.up_value(w.w_ukv, h), at.value(v, h));
    at.q_rope(k, h) = latent.rightCols(o.rope_dim);
  });
}

}  // namespace detail

/// y (T x D) from x (T x D); fills `saved` for the backward.  The expanded form.
template <MatrixLike X, OutputMatrix Y>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void mla_forward(const Mla<scalar_t<X>>& layer, const MlaWeights<scalar_t<X>>& weights, const X& x,
                 Y&& y, MlaSaved<scalar_t<X>>& saved, const MhaBatch& batch = {},
                 ExecutorRef executor = {}) {
  const Index rows = x.rows();
  detail::require_mla_weights(layer, weights, x.cols());
  detail::require_shape("y", y.rows(), y.cols(), rows, x.cols(), "shape of x");
  detail::require_batch(batch, rows);
  detail::mla_project(layer, weights, x, saved, batch, executor);
  detail::mla_expand(layer, weights, saved.latent, saved.k, saved.v, executor);
  saved.attended.resize(rows, saved.v.cols());
  const Index whole[] = {0, rows};
  const std::span<const Index> cu =
      batch.cu_seqlens.empty() ? std::span<const Index>(whole) : batch.cu_seqlens;
  saved.attention = attention_varlen_forward(saved.q, saved.k, saved.v, cu, cu, saved.attended,
                                             layer.shape(), CausalRule{}, {}, executor);
  detail::project(saved.attended, weights.w_o, weights.b_o, y, executor);
}

/// dx (T x D) and every gradient of the weights (dweights is resized and overwritten) from dy.
template <MatrixLike X, MatrixLike DY, OutputMatrix DX>
  requires SameScalar<X, DY, DX> && RealScalar<scalar_t<X>>
void mla_backward(const Mla<scalar_t<X>>& layer, const MlaWeights<scalar_t<X>>& weights,
                  const MlaSaved<scalar_t<X>>& saved, const X& x, const DY& dy, DX&& dx,
                  MlaWeights<scalar_t<X>>& dweights, const MhaBatch& batch = {},
                  ExecutorRef executor = {}) {
  using S = scalar_t<X>;
  const MlaOptions& o = layer.options();
  const detail::MlaColumns at{o};
  const RmsNormOptions norm{.eps = o.norm_eps};
  const Index rows = x.rows();
  detail::require_mla_weights(layer, weights, x.cols());
  detail::require_shape("dy", dy.rows(), dy.cols(), rows, x.cols(), "shape of x");
  detail::require_shape("dx", dx.rows(), dx.cols(), rows, x.cols(), "shape of x");
  detail::require_shape("saved.k", saved.k.rows(), saved.k.cols(), rows, o.heads * layer.head_dim(),
                        "rows of x, heads * (nope_dim + rope_dim)");
  detail::require_batch(batch, rows);
  MlaWeights<S>& g = dweights;
  const auto like = [](auto& gradient, const auto& of) { gradient.resize(of.rows(), of.cols()); };
  like(g.w_q, weights.w_q);
  like(g.w_dq, weights.w_dq);
  like(g.w_uq, weights.w_uq);
  like(g.w_dkv, weights.w_dkv);
  like(g.w_ukv, weights.w_ukv);
  like(g.w_o, weights.w_o);
  like(g.b_dq, weights.b_dq);
  like(g.b_dkv, weights.b_dkv);
  like(g.b_o, weights.b_o);
  like(g.q_norm, weights.q_norm);
  like(g.kv_norm, weights.kv_norm);

  Matrix<S> dattended(rows, saved.attended.cols());
  linear_backward_input(dy, weights.w_o, dattended, executor);
  detail::project_backward(saved.attended, dy, g.w_o, g.b_o, executor);
  Matrix<S> dq(rows, saved.q.cols()), dk(rows, saved.k.cols()), dv(rows, saved.v.cols());
  const Index whole[] = {0, rows};
  const std::span<const Index> cu =
      batch.cu_seqlens.empty() ? std::span<const Index>(whole) : batch.cu_seqlens;
  attention_varlen_backward(saved.attention, saved.q, saved.k, saved.v, cu, cu, saved.attended,
                            dattended, dq, dk, dv, layer.shape(), CausalRule{}, {}, nullptr,
                            executor);

  // Keys and values: [dc | dk_rope] in dlatent, which becomes the gradient of kv_raw in place.
  Matrix<S> dlatent = Matrix<S>::Zero(rows, o.kv_rank + o.rope_dim);
  auto dc = dlatent.leftCols(o.kv_rank);
  const auto c = saved.latent.leftCols(o.kv_rank);
  for (Index h = 0; h < o.heads; ++h) {
    linear_accumulate_input(at.q_nope(dk, h), at.up_key(weights.w_ukv, h), dc, executor);
    linear_accumulate_input(at.value(dv, h), at.up_value(weights.w_ukv, h), dc, executor);
    linear_backward_weight(c, at.q_nope(dk, h), at.up_key(g.w_ukv, h), executor);
    linear_backward_weight(c, at.value(dv, h), at.up_value(g.w_ukv, h), executor);
    dlatent.rightCols(o.rope_dim) += at.q_rope(dk, h);
  }
  if (layer.rotary() != nullptr) {
    detail::for_each_batch_part(batch, rows, [&](Index first, Index count) {
      rope_backward_in_place(dq.middleRows(first, count), batch.first_position, *layer.rotary(),
                             {.heads = o.heads, .first_channel = o.nope_dim}, executor);
      rope_backward_in_place(dlatent.middleRows(first, count).rightCols(o.rope_dim),
                             batch.first_position, *layer.rotary(), {.heads = 1}, executor);
    });
  }
  rms_norm_backward(saved.kv_raw.leftCols(o.kv_rank), weights.kv_norm, saved.kv_rstd, dc, dc,
                    g.kv_norm, norm, executor);
  detail::project_backward(x, dlatent, g.w_dkv, g.b_dkv, executor);
  linear_backward_input(dlatent, weights.w_dkv, dx, executor);

  if (o.q_rank == 0) {
    linear_backward_weight(x, dq, g.w_q, executor);
    linear_accumulate_input(dq, weights.w_q, dx, executor);
    return;
  }
  Matrix<S> dq_latent(rows, o.q_rank);
  linear_backward_weight(saved.q_latent, dq, g.w_uq, executor);
  linear_backward_input(dq, weights.w_uq, dq_latent, executor);
  rms_norm_backward(saved.q_raw, weights.q_norm, saved.q_rstd, dq_latent, dq_latent, g.q_norm, norm,
                    executor);
  detail::project_backward(x, dq_latent, g.w_dq, g.b_dq, executor);
  linear_accumulate_input(dq_latent, weights.w_dq, dx, executor);
}

/// Everything that decoding needs between two calls: a regular value, a copy is a snapshot.  T: how the cache is stored.
template <RealScalar S, StorageScalar T = S>
  requires std::same_as<compute_t<T>, S>
struct MlaState {
  LatentCache<T> cache;
  Index first_position = 0;  ///< position of the first token, where rotation starts to count
  MlaSaved<S> scratch;       ///< buffers, reused from call to call
  Matrix<S> absorbed;        ///< [q_nope W_uk^T | q_rope] per head
  Matrix<S> mixture;         ///< soft-max average of latents per head

  Index size() const { return cache.size(); }
  void truncate(Index n) { cache.truncate(n); }
  Index bytes_per_token() const { return cache.bytes_per_token(); }
};

/// An empty state with room for `capacity` tokens; mla_state<Eigen::bfloat16>(layer) halves the cache of a float layer.
template <class T = void, RealScalar S,
          StorageScalar Stored = std::conditional_t<std::is_void_v<T>, S, T>>
MlaState<S, Stored> mla_state(const Mla<S>& layer, Index capacity = 0, Index first_position = 0) {
  const MlaOptions& o = layer.options();
  MlaState<S, Stored> state;
  state.cache =
      LatentCache<Stored>({.latent_dim = o.kv_rank, .rope_dim = o.rope_dim, .capacity = capacity});
  state.first_position = first_position;
  return state;
}

namespace detail {

template <RealScalar S, StorageScalar T>
void mla_attend_absorbed(const Mla<S>& layer, const MlaWeights<S>& w, MlaState<S, T>& state,
                         ExecutorRef executor) {
  const MlaOptions& o = layer.options();
  const MlaColumns at{o};
  MlaSaved<S>& s = state.scratch;
  const Index rows = s.q.rows(), width = o.kv_rank + o.rope_dim;
  state.absorbed.resize(rows, o.heads * width);
  state.mixture.resize(rows, o.heads * o.kv_rank);
  executor.run(o.heads, [&](Index h, int) {
    product_nt<S>(at.q_nope(s.q, h), at.up_key(w.w_ukv, h),
                  state.absorbed.middleCols(h * width, o.kv_rank));
    state.absorbed.middleCols(h * width + o.kv_rank, o.rope_dim) = at.q_rope(s.q, h);
  });
  latent_attention(state.cache, state.absorbed, state.mixture, o.heads, layer.scale(), executor);
  executor.run(o.heads, [&](Index h, int) {
    product_nn<S>(state.mixture.middleCols(h * o.kv_rank, o.kv_rank), at.up_value(w.w_ukv, h),
                  at.value(s.attended, h));
  });
}

template <RealScalar S, StorageScalar T>
void mla_attend_expanded(const Mla<S>& layer, const MlaWeights<S>& w, MlaState<S, T>& state,
                         ExecutorRef executor) {
  MlaSaved<S>& s = state.scratch;
  if constexpr (std::same_as<S, T>) {
    mla_expand(layer, w, state.cache.view(), s.k, s.v, executor);
  } else {
    const Matrix<S> latent = state.cache.view().template cast<S>();
    mla_expand(layer, w, latent, s.k, s.v, executor);
  }
  AttentionShape shape = layer.shape();
  shape.query_offset = state.cache.size() - s.q.rows();
  attention_forward(s.q, s.k, s.v, s.attended, shape, CausalRule{}, {}, executor);
}

}  // namespace detail

/// The rows that follow what the state has seen; y is rows x D.  On an error nothing is changed.
template <MatrixLike X, OutputMatrix Y, StorageScalar T>
  requires SameScalar<X, Y> && RealScalar<scalar_t<X>>
void mla_step(const Mla<scalar_t<X>>& layer, const MlaWeights<scalar_t<X>>& weights,
              MlaState<scalar_t<X>, T>& state, const X& x, Y&& y, MlaForm form = MlaForm::automatic,
              ExecutorRef executor = {}) {
  const Index rows = x.rows();
  const MlaOptions& o = layer.options();
  detail::require_mla_weights(layer, weights, x.cols());
  detail::require_shape("y", y.rows(), y.cols(), rows, x.cols(), "shape of x");
  detail::require(
      state.cache.options().latent_dim == o.kv_rank && state.cache.options().rope_dim == o.rope_dim,
      "state caches ", state.cache.options().latent_dim, " + ", state.cache.options().rope_dim,
      " channels, the layer has kv_rank (", o.kv_rank, ") + rope_dim (", o.rope_dim, ")");
  state.cache.require_room(rows);
  if (rows == 0) return;
  MlaSaved<scalar_t<X>>& s = state.scratch;
  detail::mla_project(layer, weights, x, s,
                      {.first_position = state.first_position + state.cache.size()}, executor);
  state.cache.append(s.latent);
  s.attended.resize(rows, o.heads * o.value_dim);
  const MlaStepFlops flops = mla_step_flops(o, rows, state.cache.size());
  if (form == MlaForm::absorbed ||
      (form == MlaForm::automatic && flops.absorbed <= flops.expanded)) {
    detail::mla_attend_absorbed(layer, weights, state, executor);
  } else {
    detail::mla_attend_expanded(layer, weights, state, executor);
  }
  detail::project(s.attended, weights.w_o, weights.b_o, y, executor);
}

EIGENBLOCKS_NAMESPACE_END
