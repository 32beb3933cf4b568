// Golden ops of attention: sdpa, sdpa_varlen, attention_merge, sdpa_split_kv, alibi_slopes.
#include "support/golden.hpp"

#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/reference.hpp>
#include <eigenblocks/attention/varlen.hpp>

#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

constexpr Index kUnbounded = Index{1} << 40;

/// One case of sdpa as the library describes it.
template <class S>
struct Sdpa {
  Matrix<S> q, k, v, bias, dout, dlse;
  eb::BoolMatrix mask;
  Vector<S> slopes, sinks, row_scale;
  bool has_bias = false, has_mask = false, has_sinks = false, has_row_scale = false,
       has_slopes = false;
  bool causal = false;
  Index window_left = kUnbounded, window_right = kUnbounded, prefix = 0;
  double softcap = 0;
  eb::AttentionShape shape;

  eb::AttentionTensors<S> tensors() const {
    eb::AttentionTensors<S> t;
    if (has_bias) t.bias = &bias;
    if (has_mask) t.mask = &mask;
    if (has_sinks) t.sinks = &sinks;
    if (has_row_scale) t.row_scale = &row_scale;
    return t;
  }
};

template <class C>
Sdpa<golden::scalar_of<C>> read_sdpa(C& c) {
  using S = golden::scalar_of<C>;
  Sdpa<S> x;
  x.q = c.matrix("in.q");
  x.k = c.matrix("in.k");
  x.v = c.matrix("in.v");
  x.shape.heads = c.shape("in.q")[1];
  x.shape.kv_heads = c.shape("in.k")[1];
  x.shape.query_offset = c.param_int("q_offset", 0);
  if (c.has_param("scale")) x.shape.scale = c.param_real("scale");
  x.causal = c.param_flag("causal", false);
  if (const Index w = c.param_int("window_left", -1); w >= 0) x.window_left = w;
  if (const Index w = c.param_int("window_right", -1); w >= 0) x.window_right = w;
  x.prefix = c.param_int("prefix_len", 0);
  x.softcap = c.param_real("softcap", 0.0);
  if ((x.has_bias = c.has("in.bias"))) {
    const auto dims = c.shape("in.bias");
    const Vector<S> flat = c.vector("in.bias");
    x.bias = Eigen::Map<const Matrix<S>>(flat.data(), dims[0] * dims[1], dims[2]);
  }
  if ((x.has_mask = c.has("in.mask"))) {
    const auto keep = c.integers("in.mask");
    x.mask.resize(x.q.rows(), x.k.rows());
    for (Index i = 0; i < x.mask.size(); ++i)
      x.mask.data()[i] = keep[static_cast<std::size_t>(i)] != 0;
  }
  if ((x.has_slopes = c.has("in.alibi_slopes"))) x.slopes = c.vector("in.alibi_slopes");
  if ((x.has_sinks = c.has("in.sinks"))) x.sinks = c.vector("in.sinks");
  if ((x.has_row_scale = c.has("in.row_scale"))) x.row_scale = c.vector("in.row_scale");
  if (c.has("gout.out")) x.dout = c.matrix("gout.out");
  if (c.has("gout.lse")) x.dlse = c.matrix("gout.lse");
  return x;
}

/// Calls f(rule) with the rule of the case.  Few types on purpose: each is one instantiation of the kernels.
template <class S, class F>
void with_rule(const Sdpa<S>& x, F&& f) {
  // causal is window_right(0), with the prefix visible past it.
  const auto mask = (eb::window_right(x.causal ? 0 : kUnbounded) | eb::prefix(x.prefix)) &
                    eb::window_left(x.window_left) & eb::window_right(x.window_right);
  if (x.softcap == 0 && !x.has_slopes) {
    f(eb::attention_rule(mask));
  } else {
    const Vector<S> slopes = x.has_slopes ? x.slopes : Vector<S>::Zero(x.shape.heads);
    f(eb::attention_rule(mask, eb::compose(eb::soft_cap(x.softcap), eb::alibi(slopes))));
  }
}

/// Forward and backward through the kernel with given tile sizes, checked against the file.
template <class Shape, class C, class S, class Rule>
void run_kernel(C& c, const Sdpa<S>& x, const Rule& rule, const eb::detail::TileTuning& tuning) {
  const Index heads = x.shape.heads, e = x.v.cols() / x.shape.kv_heads;
  Matrix<S> out(x.q.rows(), heads * e), lse(x.q.rows(), heads);
  const auto tensors = x.tensors();
  eb::Workspace workspace;
  eb::detail::attention_forward_into<Shape>(x.q, x.k, x.v, out, lse, x.shape, rule, tensors,
                                            eb::serial, workspace, tuning);
  c.expect("out.out", out);
  c.expect("out.lse", lse);
  if (!c.has("gin.q")) return;
  Matrix<S> dq(x.q.rows(), x.q.cols()), dk(x.k.rows(), x.k.cols()), dv(x.v.rows(), x.v.cols());
  Matrix<S> dbias(x.bias.rows(), x.bias.cols());
  Vector<S> dsinks(x.sinks.size());
  eb::AttentionTensorGradients<S> gradients;
  if (c.has("gin.bias")) gradients.bias = &dbias;
  if (c.has("gin.sinks")) gradients.sinks = &dsinks;
  if (x.dlse.size() > 0) gradients.upstream_lse = &x.dlse;
  const Matrix<S> dout = x.dout.size() > 0 ? x.dout : Matrix<S>::Zero(out.rows(), out.cols());
  eb::detail::attention_backward_into<Shape>(lse, x.q, x.k, x.v, out, dout, dq, dk, dv, x.shape,
                                             rule, tensors, &gradients, eb::serial, workspace,
                                             tuning);
  c.expect("gin.q", dq);
  c.expect("gin.k", dk);
  c.expect("gin.v", dv);
  if (gradients.bias) c.expect("gin.bias", dbias);
  if (gradients.sinks) c.expect("gin.sinks", dsinks);
}

/// `splits` disjoint key ranges, each with its own call, merged; and the backward through the merge.
template <class C, class S, class Rule>
void run_splits(C& c, const Sdpa<S>& x, const Rule& rule, Index splits) {
  const Index rows = x.q.rows(), heads = x.shape.heads, e = x.v.cols() / x.shape.kv_heads;
  const Index chunk = (x.k.rows() + splits - 1) / splits;
  Matrix<S> out = Matrix<S>::Zero(rows, heads * e);
  Matrix<S> lse = Matrix<S>::Constant(rows, heads, -std::numeric_limits<S>::infinity());
  for (Index s = 0; s < splits; ++s) {
    const Index begin = std::min(s * chunk, x.k.rows()),
                count = std::min(chunk, x.k.rows() - begin);
    eb::AttentionShape shape = x.shape;
    shape.key_offset = begin;
    eb::AttentionTensors<S> tensors = x.tensors();
    const Matrix<S> bias = x.has_bias ? Matrix<S>(x.bias.middleCols(begin, count)) : Matrix<S>();
    const eb::BoolMatrix mask =
        x.has_mask ? eb::BoolMatrix(x.mask.middleCols(begin, count)) : eb::BoolMatrix();
    if (x.has_bias) tensors.bias = &bias;
    if (x.has_mask) tensors.mask = &mask;
    if (s > 0) tensors.sinks = nullptr;  // a sink belongs to one part
    Matrix<S> part(rows, heads * e);
    const auto saved =
        eb::attention_forward(x.q, x.k.middleRows(begin, count), x.v.middleRows(begin, count), part,
                              shape, rule, tensors);
    eb::attention_merge_into(out, lse, part, saved.lse);
  }
  c.expect("out.out", out);
  c.expect("out.lse", lse);
}

/// The rule of the case seen from a cache that ends at its last key: query position `size - 1` stands for `actual`, and
/// bias and mask tensors become part of the functors.
template <class S, class Rule>
struct RowScore {
  const Sdpa<S>* x;
  const Rule* rule;
  Index row;
  S operator()(S s, Index, Index j, Index h) const {
    s = rule->score(s, row + x->shape.query_offset, j, h);
    return x->has_bias ? s + x->bias(x->bias.rows() == x->q.rows() ? row : h * x->q.rows() + row, j)
                       : s;
  }
  S grad(S, Index, Index, Index) const { return S(1); }
};

template <class C, class S, class Rule>
void run_cache_rows(C& c, const Sdpa<S>& x, const Rule& rule) {
  const Index rows = x.q.rows(), heads = x.shape.heads, e = x.v.cols() / x.shape.kv_heads;
  if (x.k.rows() == 0) return;  // a query needs a position in the cache
  eb::KvCache<S> cache(
      {.kv_heads = x.shape.kv_heads, .head_dim = x.k.cols() / x.shape.kv_heads, .value_dim = e});
  cache.append(x.k, x.v);
  Matrix<S> out(rows, heads * e), lse(rows, heads);
  eb::AttentionShape shape = x.shape;
  shape.query_offset = 0;
  for (Index i = 0; i < rows; ++i) {
    const auto keep = [&](Index, Index j, Index h) {
      const bool bias_hides = x.has_bias && x.bias(x.bias.rows() == rows ? i : h * rows + i, j) ==
                                                -std::numeric_limits<S>::infinity();
      return rule.mask(i + x.shape.query_offset, j, h) && (!x.has_mask || x.mask(i, j)) &&
             !bias_hides;
    };
    eb::AttentionTensors<S> tensors;
    if (x.has_sinks) tensors.sinks = &x.sinks;
    Vector<S> rho;
    if (x.has_row_scale) {
      rho = x.row_scale.segment(i, 1);
      tensors.row_scale = &rho;
    }
    Matrix<S> row_lse(1, heads);
    auto row = out.middleRows(i, 1);
    eb::attention_over_cache(cache, x.q.middleRows(i, 1), row, shape,
                             eb::attention_rule(keep, RowScore<S, Rule>{&x, &rule, i}), tensors,
                             &row_lse);
    lse.row(i) = row_lse.row(0);
  }
  c.expect("out.out", out);
  c.expect("out.lse", lse);
}

/// The public oracle, in double whatever the run.
template <class C, class Rule>
void run_reference(C& c, const Sdpa<double>& x, const Rule& rule) {
  Matrix<double> out(x.q.rows(), x.shape.heads * x.v.cols() / x.shape.kv_heads),
      lse(x.q.rows(), x.shape.heads);
  eb::attention_reference(x.q, x.k, x.v, out, lse, x.shape, rule, x.tensors());
  c.expect("out.out", out);
  c.expect("out.lse", lse);
  if (!c.has("gin.q")) return;
  Matrix<double> dq = x.q, dk = x.k, dv = x.v, dbias = x.bias;
  Vector<double> dsinks = x.sinks;
  eb::AttentionTensorGradients<double> gradients;
  if (c.has("gin.bias")) gradients.bias = &dbias;
  if (c.has("gin.sinks")) gradients.sinks = &dsinks;
  if (x.dlse.size() > 0) gradients.upstream_lse = &x.dlse;
  const Matrix<double> dout =
      x.dout.size() > 0 ? x.dout : Matrix<double>::Zero(out.rows(), out.cols());
  eb::attention_reference_backward(x.q, x.k, x.v, dout, dq, dk, dv, x.shape, rule, x.tensors(),
                                   &gradients);
  c.expect("gin.q", dq);
  c.expect("gin.k", dk);
  c.expect("gin.v", dv);
  if (gradients.bias) c.expect("gin.bias", dbias);
  if (gradients.sinks) c.expect("gin.sinks", dsinks);
}

/// A register tile that no target has, with odd row counts: nothing may depend on the native one.
template <class S>
struct NarrowTile {
  static constexpr int kRows = 2, kVectors = 1, kGradientRows = 3;
};

struct SdpaOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Sdpa<S> x = read_sdpa(c);
    with_rule(x, [&](const auto& rule) {
      run_kernel<void>(c, x, rule, {});
      for (const Index block : {1, 3, 16, 64}) {
        c.form("key block " + std::to_string(block));
        run_kernel<void>(c, x, rule, {.key_block = block, .query_tiles = 2});
      }
      c.form("one tile, many key chunks");
      run_kernel<void>(c, x, rule, {.key_block = 1, .query_tiles = 1, .packed_scalars = 1});
      c.form("narrow register tile");
      run_kernel<NarrowTile<S>>(c, x, rule, {.key_block = 5, .query_tiles = 3});
      for (const Index splits : {1, 2, 3, 4}) {
        c.form("kv splits " + std::to_string(splits));
        run_splits(c, x, rule, splits);
      }
      c.form("row by row over a cache");
      run_cache_rows(c, x, rule);
      if constexpr (std::is_same_v<S, double>) {
        c.form("reference");
        run_reference(c, x, rule);
      }
    });
  }
};

struct VarlenOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Sdpa<S> x = read_sdpa(c);
    const auto cu_q = c.integers("in.cu_seqlens_q"), cu_k = c.integers("in.cu_seqlens_k");
    with_rule(x, [&](const auto& rule) {
      Matrix<S> out(x.q.rows(), x.shape.heads * x.v.cols() / x.shape.kv_heads);
      const auto saved =
          eb::attention_varlen_forward(x.q, x.k, x.v, cu_q, cu_k, out, x.shape, rule);
      c.expect("out.out", out);
      c.expect("out.lse", saved.lse);
      if (!c.has("gin.q")) return;
      Matrix<S> dq = x.q, dk = x.k, dv = x.v;
      eb::AttentionTensorGradients<S> gradients;
      if (x.dlse.size() > 0) gradients.upstream_lse = &x.dlse;
      const Matrix<S> dout = x.dout.size() > 0 ? x.dout : Matrix<S>::Zero(out.rows(), out.cols());
      eb::attention_varlen_backward(saved, x.q, x.k, x.v, cu_q, cu_k, out, dout, dq, dk, dv,
                                    x.shape, rule, {}, &gradients);
      c.expect("gin.q", dq);
      c.expect("gin.k", dk);
      c.expect("gin.v", dv);
    });
  }
};

struct SplitOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Sdpa<S> x = read_sdpa(c);
    const Index splits = c.param_int("n_splits"), rows = x.q.rows(), heads = x.shape.heads;
    const Index width = heads * x.v.cols() / x.shape.kv_heads,
                chunk = (x.k.rows() + splits - 1) / splits;
    Matrix<S> out_parts(splits * rows, width), lse_parts(splits * rows, heads);
    Matrix<S> out = Matrix<S>::Zero(rows, width);
    Matrix<S> lse = Matrix<S>::Constant(rows, heads, -std::numeric_limits<S>::infinity());
    with_rule(x, [&](const auto& rule) {
      for (Index s = 0; s < splits; ++s) {
        const Index begin = std::min(s * chunk, x.k.rows()),
                    count = std::min(chunk, x.k.rows() - begin);
        eb::AttentionShape shape = x.shape;
        shape.key_offset = begin;
        auto part = out_parts.middleRows(s * rows, rows);
        const auto saved = eb::attention_forward(x.q, x.k.middleRows(begin, count),
                                                 x.v.middleRows(begin, count), part, shape, rule);
        lse_parts.middleRows(s * rows, rows) = saved.lse;
        eb::attention_merge_into(out, lse, part, saved.lse);
      }
    });
    c.expect("out.out_parts", out_parts);
    c.expect("out.lse_parts", lse_parts);
    c.expect("out.out", out);
    c.expect("out.lse", lse);
  }
};

struct MergeOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const auto dims = c.shape("in.out_parts");
    const Index parts = dims[0], rows = dims[1], heads = dims[2], width = dims[2] * dims[3];
    const Vector<S> out_flat = c.vector("in.out_parts"), lse_flat = c.vector("in.lse_parts");
    const Eigen::Map<const Matrix<S>> out_parts(out_flat.data(), parts * rows, width);
    const Eigen::Map<const Matrix<S>> lse_parts(lse_flat.data(), parts * rows, heads);
    Matrix<S> out, lse;
    for (const bool reversed : {true, false}) {
      c.form(reversed ? "last part first" : "first part first");
      out = Matrix<S>::Zero(rows, width);
      lse = Matrix<S>::Constant(rows, heads, -std::numeric_limits<S>::infinity());
      for (Index p = 0; p < parts; ++p) {
        const Index at = (reversed ? parts - 1 - p : p) * rows;
        eb::attention_merge_into(out, lse, out_parts.middleRows(at, rows),
                                 lse_parts.middleRows(at, rows));
      }
      c.expect("out.out", out);
      c.expect("out.lse", lse);
    }
    if (!c.has("gin.out_parts") && !c.has("gin.lse_parts")) return;
    const Matrix<S> dout = c.has("gout.out") ? c.matrix("gout.out") : Matrix<S>::Zero(rows, width);
    const Matrix<S> dlse = c.has("gout.lse") ? c.matrix("gout.lse") : Matrix<S>::Zero(rows, heads);
    Matrix<S> dout_parts(parts * rows, width), dlse_parts(parts * rows, heads);
    for (Index p = 0; p < parts; ++p) {
      auto dpart = dout_parts.middleRows(p * rows, rows);
      auto dpart_lse = dlse_parts.middleRows(p * rows, rows);
      eb::attention_merge_backward(out_parts.middleRows(p * rows, rows),
                                   lse_parts.middleRows(p * rows, rows), out, lse, dout, dpart,
                                   dpart_lse, &dlse);
    }
    if (c.has("gin.out_parts")) c.expect("gin.out_parts", dout_parts);
    if (c.has("gin.lse_parts")) c.expect("gin.lse_parts", dlse_parts);
  }
};

struct AlibiSlopesOp {
  template <class C>
  void operator()(C& c) const {
    const std::string convention = c.param("convention", "bloom");
    if (convention != "bloom" && convention != "mpt")
      throw std::runtime_error("unknown convention " + convention);
    c.expect("out.slopes",
             eb::alibi_slopes<golden::scalar_of<C>>(
                 c.param_int("n_heads"),
                 convention == "bloom" ? eb::AlibiConvention::bloom : eb::AlibiConvention::mpt));
  }
};

}  // namespace

void register_attention(golden::Registry& registry) {
  registry.add("sdpa", SdpaOp{});
  registry.add("sdpa_varlen", VarlenOp{});
  registry.add("sdpa_split_kv", SplitOp{});
  registry.add("attention_merge", MergeOp{});
  registry.add("alibi_slopes", AlibiSlopesOp{});
}
