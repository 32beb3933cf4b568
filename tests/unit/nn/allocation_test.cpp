// What the blocks allocate: nothing in passes that decode token by token.  malloc is counted; sanitizers bring their
// own, so there the test only runs the calls.
#include <doctest/doctest.h>

#include <eigenblocks/core/random.hpp>
#include <eigenblocks/nn/embedding.hpp>
#include <eigenblocks/nn/glu.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/nn/sampling.hpp>

#include <array>
#include <cstdlib>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#endif

#if defined(__GLIBC__) && !defined(SANITIZED)
#define COUNTS_MALLOC 1
namespace {
long allocations = 0;
}
extern "C" void* __libc_malloc(std::size_t);  // NOLINT: glibc's own name
extern "C" void* malloc(std::size_t bytes) {
  ++allocations;
  return __libc_malloc(bytes);
}
#endif

using namespace eigenblocks;

namespace {

template <class F>
long allocations_of(F&& f) {
#if defined(COUNTS_MALLOC)
  const long before = allocations;
  f();
  return allocations - before;
#else
  f();
  return 0;
#endif
}

}  // namespace

TEST_CASE("the counter counts") {
#if defined(COUNTS_MALLOC)
  CHECK(allocations_of([] {
          Matrix<float> m(100, 100);
          m.setZero();
          CHECK(m(3, 3) == 0.f);
        }) >= 1);
#endif
}

TEST_CASE_TEMPLATE("one token allocates nothing once the workspaces are made", S, float, double) {
  Random random(1);
  const Index d = 96, f = 256, vocabulary = 1009;
  const Matrix<S> table = normal_matrix<S>(random, vocabulary, d),
                  wg = normal_matrix<S>(random, d, f), wu = normal_matrix<S>(random, d, f),
                  wd = normal_matrix<S>(random, f, d),
                  head = normal_matrix<S>(random, d, vocabulary);
  const Vector<S> gain = normal_matrix<S>(random, d, 1);
  Matrix<S> x(1, d), y(1, d), logits(1, vocabulary);
  GluFfnSaved<S> saved;
  Workspace workspace;
  SamplingWorkspace<S> sampling;
  const SamplingOptions options{.temperature = 0.8, .top_k = 300, .top_p = 0.9, .min_p = 0.01};
  std::array<Index, 1> token{5};
  const auto step = [&] {
    embedding_forward(table, token, x);
    rms_norm_forward(x, gain, y);
    layer_norm_forward(x, gain, gain, y);
    l2_normalize_forward(y, y, {.heads = 4});
    glu_ffn_forward(y, wg, wu, wd, x, saved, workspace);
    linear_forward(x, head, logits);
    token[0] = sample_token(logits.row(0), random.uniform(), options, sampling);
    softmax_forward(logits, logits);
    activation_forward(Activation::gelu, x, x);
  };
  step();
  CHECK(allocations_of([&] {
          for (int i = 0; i < 20; ++i) step();
        }) == 0);
}

TEST_CASE("whole passes allocate only what they document") {
  Random random(2);
  const Index tokens = 40, d = 24, f = 32;
  const Matrix<float> x = normal_matrix<float>(random, tokens, d), dy = x,
                      wg = normal_matrix<float>(random, d, f), wu = wg,
                      wd = normal_matrix<float>(random, f, d);
  const Vector<float> gain = Vector<float>::Ones(d);
  Matrix<float> y = x, dx = x, dwg = wg, dwu = wu, dwd = wd;
  Vector<float> r(tokens), dgain(d), dbias(d);
  GluFfnSaved<float> saved;
  Workspace workspace;
  const auto ffn = [&] {
    glu_ffn_forward(x, wg, wu, wd, y, saved, workspace);
    glu_ffn_backward(saved, x, wg, wu, wd, dy, dx, dwg, dwu, dwd, workspace);
  };
  ffn();
  CHECK(allocations_of(ffn) == 0);  // Eigen's packing buffers fit the stack at this size
  CHECK(allocations_of([&] {
          softmax_forward(x, y);
          softmax_backward(y, dy, dx);
          layer_norm_forward(x, gain, gain, y, r);
        }) == 0);
  // The sums of dgain and dbias over blocks of rows.
  CHECK(allocations_of([&] { layer_norm_backward(x, gain, r, dy, dx, dgain, dbias); }) <= 1);
}
