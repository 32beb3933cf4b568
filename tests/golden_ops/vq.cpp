// Golden ops tvq_attention (tiles, definition, backward, steps of several sizes) and tvq_codebook_ema.
#include "support/golden.hpp"

#include <eigenblocks/attention/vq_attention.hpp>
#include <eigenblocks/attention/vq_reference.hpp>

#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

std::vector<Index> flat(const eb::VqCodes& codes) {
  return {codes.data(), codes.data() + codes.size()};
}

/// The codes of the file where float rounding cannot tell the distances apart.
template <class C, class S>
void expect_codes(C& c, const Matrix<S>& key, const Matrix<S>& codebook, const eb::VqCodes& codes) {
  const eb::VqCodes best =
      eb::vq_nearest(Matrix<double>(key.template cast<double>()),
                     Matrix<double>(codebook.template cast<double>()), codes.cols());
  const auto error = [&](const eb::VqCodes& of) {
    return eb::vq_squared_error(Matrix<double>(key.template cast<double>()),
                                Matrix<double>(codebook.template cast<double>()), of);
  };
  const Matrix<double> excess = error(codes) - error(best);
  const double size = key.squaredNorm() + codebook.squaredNorm();
  c.expect_integers("out.codes", flat(codes),
                    [&](Index i) { return excess.data()[i] <= 1e-6 * static_cast<double>(size); });
}

struct TvqAttentionOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const auto shape = c.shape("in.q");
    const auto codebook_shape = c.shape("in.codebook");
    const Index tokens = shape.at(0), heads = shape.at(1), dim = shape.at(2);
    const Matrix<S> q = c.matrix("in.q"), k = c.matrix("in.k"), v = c.matrix("in.v");
    const auto rows_of = [&](const char* name) {  // [H, n, d] as (H n) x d
      const Matrix<S> m = c.matrix(name);
      return Matrix<S>(Eigen::Map<const Matrix<S>>(m.data(), m.size() / dim, dim));
    };
    const Matrix<S> codebook = rows_of("in.codebook");
    const Index codes = codebook_shape.at(1), width = v.cols() / heads;
    eb::VqBias<S> bias;
    if (c.has("in.u")) bias.u = rows_of("in.u");
    if (c.has("in.r")) bias.r = rows_of("in.r");
    if (c.has("in.v_bias")) bias.v_bias = rows_of("in.v_bias");
    eb::VqAttentionOptions options{.heads = heads,
                                   .block_len = c.param_int("block_len"),
                                   .mem_len = c.param_int("mem_len"),
                                   .aggregate = c.param_flag("agg_cache", true)};
    options.gradient = c.param_flag("grad_thru_cache", true) ? eb::VqGradient::through_cache
                                                             : eb::VqGradient::block_only;

    Matrix<S> out(tokens, v.cols()), lse(tokens, heads);
    const eb::VqSaved<S> saved = eb::vq_attention_forward(q, k, v, codebook, out, options, bias);
    c.expect("out.out", out);
    expect_codes(c, k, codebook, saved.codes);
    c.expect("out.commit", eb::vq_commit_forward(k, codebook, saved.codes));
    if (c.has("gin.commit_k")) {
      Matrix<S> dk(tokens, k.cols());
      eb::vq_commit_backward(k, codebook, saved.codes, S(1), dk);
      c.expect("gin.commit_k", dk);
    }
    if (c.has("gout.out")) {
      Matrix<S> dq(tokens, q.cols()), dk(tokens, k.cols()), dv(tokens, v.cols());
      eb::VqBias<S> dbias;
      eb::vq_attention_backward(saved, q, v, codebook, out, c.matrix("gout.out"), dq, dk, dv,
                                options, bias, &dbias);
      const auto expect = [&](const char* name, const Matrix<S>& got) {
        if (c.has(name)) c.expect(name, got);
      };
      expect("gin.q", dq);
      expect("gin.k", dk);
      expect("gin.v", dv);
      expect("gin.u", dbias.u);
      expect("gin.v_bias", dbias.v_bias);
      expect("gin.r", dbias.r);
    }

    c.form("definition");
    eb::vq_attention_reference(q, saved.codes, v, codebook, out, lse, options, bias);
    c.expect("out.out", out);

    for (const Index chunk : {Index{1}, Index{3}, Index{16}, std::max<Index>(1, tokens)}) {
      c.form("steps of " + std::to_string(chunk));
      eb::VqState<S> state = eb::vq_state(codebook, width, options);
      out.setZero();
      for (Index t = 0; t < tokens; t += chunk) {
        const Index n = std::min(chunk, tokens - t);
        eb::vq_attention_step(state, q.middleRows(t, n), k.middleRows(t, n), v.middleRows(t, n),
                              codebook, out.middleRows(t, n), options, bias);
      }
      c.expect("out.out", out);
      c.expect("out.agg_count", Matrix<double>(state.count.template cast<double>()));
      c.expect("out.agg_mean", state.mean);
      if (state.count.cols() != codes) throw std::runtime_error("codes of the state");
    }
  }
};

struct TvqCodebookEmaOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const auto shape = c.shape("in.c_sum");
    const Index heads = shape.at(0), dim = shape.at(2);
    const Matrix<S> key = c.matrix("in.k"), sum = c.matrix("in.c_sum");
    eb::VqCodebookAverage<S> average{Eigen::Map<const Matrix<S>>(sum.data(), sum.size() / dim, dim),
                                     c.matrix("in.c_count")};
    eb::VqAverageOptions options;
    options.decay = c.param_real("gamma", options.decay);
    options.count_floor = c.param_real("count_floor", options.count_floor);
    eb::VqTokenMask mask = eb::VqTokenMask::Constant(key.rows(), true);
    if (c.has("in.loss_mask")) {
      const std::vector<Index> keep = c.integers("in.loss_mask");
      for (Index t = 0; t < key.rows(); ++t) mask[t] = keep.at(static_cast<std::size_t>(t)) != 0;
    }
    const Matrix<S> codebook = eb::vq_codebook(average, options);
    const eb::VqCodes codes = eb::vq_nearest(key, codebook, heads);
    c.expect("out.codebook", codebook);
    expect_codes(c, key, codebook, codes);
    c.expect("out.err2", eb::vq_squared_error(key, codebook, codes));
    c.expect("out.commit", eb::vq_commit_forward(key, codebook, codes, &mask));
    if (c.has("gin.k")) {
      Matrix<S> dk(key.rows(), key.cols());
      eb::vq_commit_backward(key, codebook, codes, S(1), dk, &mask);
      c.expect("gin.k", dk);
    }
    eb::vq_average_update(average, key, codes, &mask, options);
    c.expect("out.c_sum", average.sum);
    c.expect("out.c_count", average.count);
  }
};

}  // namespace

void register_vq(golden::Registry& registry) {
  registry.add("tvq_attention", TvqAttentionOp{});
  registry.add("tvq_codebook_ema", TvqCodebookEmaOp{});
}
