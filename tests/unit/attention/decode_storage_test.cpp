// Caches of 16-bit scalars: converted on reading, computed in float, rounded once on the way out.
#include "unit/attention/decode_case.hpp"

namespace {

using namespace attention_test;

const eb::CausalRule kCausal = eb::attention_rule(eb::causal());

}  // namespace

TEST_CASE_TEMPLATE("the rows of the oracle on the stored operands, up to one rounding", T,
                   Eigen::half, Eigen::bfloat16) {
  Problem p({.queries = 70, .keys = 70, .heads = 4, .kv_heads = 2, .dim = 7, .value_dim = 5});
  for (Matrix<double>* m : {&p.q, &p.k, &p.v}) *m = m->cast<T>().template cast<double>().eval();
  for (const eb::KvCacheOptions& options :
       {eb::KvCacheOptions{}, eb::KvCacheOptions{.window = 13, .chunk = 6}}) {
    const Outcome<double> want = cache_oracle(p, {eb::causal()}, options.window);
    const double half_ulp =
        std::is_same_v<T, Eigen::half> ? 0x1p-11 : 0x1p-8;  // of a number below 2
    const double float_error =
        Bounds(p, want, static_cast<double>(std::numeric_limits<float>::epsilon())).out;
    for (const Chunking& c : chunkings(70)) {
      CAPTURE(c.name);
      eb::KvCache<T> cache(cache_options(p, options));
      const Matrix<double> out =
          step_through<T>(p, cache, kCausal, c.chunk).template cast<double>();
      for (Index i = 0; i < out.size(); ++i) {
        const double w = want.out.data()[i];
        CHECK(std::abs(out.data()[i] - w) <=
              half_ulp * std::max(std::abs(w), 6.2e-5) + float_error);
      }
    }
  }
}
