// Scale rules against values of mpmath (60 digits), their properties, and the gradient mass against the Jacobian it is the norm of.
#include <eigenblocks/attention/reference.hpp>
#include <eigenblocks/attention/scale.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

namespace {

using namespace eigenblocks;
using doctest::Approx;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// softmax(alpha s) as on paper.
Vector<double> probabilities(const Vector<double>& s, double alpha) {
  const Vector<double> e = (alpha * (s.array() - s.mean())).exp();
  return e / e.sum();
}

/// sum_j |d p_i / d s_j| / 2 of p = softmax(alpha s).
double half_jacobian_norm(const Vector<double>& s, double alpha) {
  const Vector<double> p = probabilities(s, alpha);
  double sum = 0;
  for (Index i = 0; i < s.size(); ++i) {
    for (Index j = 0; j < s.size(); ++j) sum += std::abs(alpha * p[i] * ((i == j) - p[j]));
  }
  return sum / 2;
}

}  // namespace

TEST_CASE("the closed forms") {
  const double root = 8;  // of head_dim 64
  for (const double n : {1.0, 2.0, 511.0, 512.0, 513.0, 1e7}) {
    CAPTURE(n);
    CHECK(attention_scale(ScaleRule::standard, n, 64) == 1 / root);
    CHECK(attention_scale(ScaleRule::log_n, n, 64) ==
          Approx(std::log(n) / std::log(512) / root).epsilon(1e-14));
    CHECK(attention_scale(ScaleRule::log_n, n, 64, 64) ==
          Approx(std::log(n) / std::log(64) / root).epsilon(1e-14));
    CHECK(attention_scale(ScaleRule::log_n_clamped, n, 64) ==
          Approx(n <= 512 ? 1 / root : std::log(n) / std::log(512) / root).epsilon(1e-14));
    CHECK(attention_scale(ScaleRule::gradmax_normal_fit, n, 64) ==
          Approx(0.84 * std::sqrt(std::log(n)) / root).epsilon(1e-14));
  }
  CHECK(attention_scale(ScaleRule::log_n, 1, 64) == 0.0);
}

TEST_CASE("gradmax_normal is sqrt(W0(n sqrt(e) / 2) - 1/2) / sqrt(head_dim)") {
  const struct {
    double n, want;
  } values[] = {{1.0001, 0.0057734225070090832}, {2, 0.51599283731632386},
                {40, 1.4341988607738381},        {1000, 2.1419077309374327},
                {20000, 2.6781850289955531},     {1e12, 4.8733436992032434},
                {1e300, 26.144872219114773}};
  for (const auto& v : values) {
    CAPTURE(v.n);
    CHECK(attention_scale(ScaleRule::gradmax_normal, v.n, 1) == Approx(v.want).epsilon(1e-12));
    CHECK(attention_scale(ScaleRule::gradmax_normal, v.n, 64) == Approx(v.want / 8).epsilon(1e-12));
    const double a2 = v.want * v.want;
    CHECK(std::exp(a2) * (1 + 2 * a2) == Approx(v.n).epsilon(1e-9));  // the derivative is 0
  }
  CHECK(attention_scale(ScaleRule::gradmax_normal, 1, 64) == 0.0);
}

TEST_CASE("gradmax_cosine for every dimension, by series and by expansion") {
  const struct {
    Index dim;
    double n, want;
  } values[] = {{1, 1.5, 0.45570035100610607},  {2, 2, 0.91991389037874455},
                {2, 40, 226.47840540204413},    {2, 1e4, 14147106.177612914},
                {2, 1e6, 141471060526.25419},   {3, 1000, 500},
                {4, 1e6, 9340.1295939392985},   {6, 1e12, 121618.58032961205},
                {7, 5e4, 89.721473081337251},   {16, 1.01, 0.23074458563945761},
                {64, 4096, 22.853739704403433}, {128, 2, 5.8706778076460026},
                {128, 512, 24.213642893421102}, {256, 1e12, 91.671663479579082},
                {2048, 1e5, 133.86774829964793}};
  for (const auto& v : values) {
    CAPTURE(v.dim);
    CAPTURE(v.n);
    CHECK(attention_scale(ScaleRule::gradmax_cosine, v.n, v.dim) == Approx(v.want).epsilon(1e-11));
  }
  CHECK(attention_scale(ScaleRule::gradmax_cosine, 1, 128) == 0.0);
  // The rule of thumb: 3.5 ln n for d = 128.
  for (const double n : {1000.0, 10'000.0, 20'000.0}) {
    CHECK(attention_scale(ScaleRule::gradmax_cosine, n, 128) ==
          Approx(3.5 * std::log(n)).epsilon(0.15));
  }
  // Both forms of the moments agree where both hold; sqrt(pi / 2 a) (1 - e^-2a) / ... of d = 3 is sinh(a) / a.
  for (const double half : {0.5, 1.0, 1.5, 4.0, 20.0}) {
    const double a = 150 + half * half;
    const auto near = detail::cosine_moment_near(a, half), far = detail::cosine_moment_far(a, half);
    CHECK(near.log_g == Approx(far.log_g).epsilon(1e-12));
    CHECK(near.deficit == Approx(far.deficit).epsilon(1e-10));
  }
  for (const double a : {0.01, 2.0, 50.0, 1e3, 1e9}) {
    const auto m = detail::cosine_moment(a, 1.5);
    CHECK(m.log_g == Approx(std::log((1 - std::exp(-2 * a)) / (2 * a))).epsilon(1e-12));
    if (a > 1) CHECK(m.deficit == Approx(1 - 1 / std::tanh(a) + 1 / a).epsilon(1e-9));
  }
}

TEST_CASE("entropy grows less with the length under log_n than under the standard scale") {
  Random random(5);
  const Index dim = 64;
  const auto entropy = [&](ScaleRule rule, Index n) {
    double sum = 0;
    for (int draw = 0; draw < 8; ++draw) {
      const Vector<double> q = normal_matrix<double>(random, dim, 1);
      const Matrix<double> k = normal_matrix<double>(random, n, dim);
      // (a trained model's scores are larger than those of random vectors)
      const double scale = 2 * attention_scale(rule, static_cast<double>(n), dim, 64);
      const Vector<double> p = probabilities(k * q, scale);
      sum -= (p.array() * p.array().log()).sum() / 8;
    }
    return sum;
  };
  CHECK(entropy(ScaleRule::log_n, 64) == Approx(entropy(ScaleRule::standard, 64)).epsilon(0.15));
  const double plain = entropy(ScaleRule::standard, 4096) - entropy(ScaleRule::standard, 64);
  const double scaled = entropy(ScaleRule::log_n, 4096) - entropy(ScaleRule::log_n, 64);
  CHECK(plain > 3.0);
  CHECK(scaled < 0.7 * plain);
}

TEST_CASE("causal_attention_scales counts position + 1 keys, and is a row_scale") {
  const Vector<double> scales = causal_attention_scales<double>(ScaleRule::log_n, 5, 16, 100, 3);
  REQUIRE(scales.size() == 5);
  for (Index i = 0; i < 5; ++i) {
    CHECK(scales[i] ==
          Approx(std::log(static_cast<double>(i + 4)) / std::log(100) / 4).epsilon(1e-14));
  }
  CHECK(causal_attention_scales<float>(ScaleRule::log_n, 5, 16, 100, 3)[2] ==
        static_cast<float>(scales[2]));
  CHECK(causal_attention_scales<double>(ScaleRule::standard, 0, 16).size() == 0);

  // scale = 1 with these row scales: scores <q, k> ln(i + 1) / (ln base sqrt d).
  Random random(3);
  const Matrix<double> q = normal_matrix<double>(random, 4, 16),
                       k = normal_matrix<double>(random, 4, 16),
                       v = normal_matrix<double>(random, 4, 2);
  const Vector<double> rho = causal_attention_scales<double>(ScaleRule::log_n, 4, 16);
  Matrix<double> out(4, 2), lse(4, 1);
  attention_reference(q, k, v, out, lse, {.heads = 1, .scale = 1.0}, attention_rule(causal()),
                      {.row_scale = &rho});
  for (Index i = 0; i < 4; ++i) {
    double sum = 0;
    for (Index j = 0; j <= i; ++j) {
      sum += std::exp(q.row(i).dot(k.row(j)) / 4 * std::log(static_cast<double>(i + 1)) /
                      std::log(512));
    }
    CHECK(lse(i, 0) == Approx(std::log(sum)).epsilon(1e-13));
  }
}

TEST_CASE("the gradient mass is half the L1 norm of the Jacobian") {
  Random random(7);
  for (const Index n : {1, 2, 3, 24}) {
    const Vector<double> s = normal_matrix<double>(random, n, 1);
    for (const double alpha : {-2.0, 0.0, 1e-3, 0.7, 1.0, 6.0}) {
      CAPTURE(n);
      CAPTURE(alpha);
      const double want = half_jacobian_norm(s, alpha);
      CHECK(std::abs(softmax_gradient_mass(s, alpha)) == Approx(want).epsilon(1e-12));
      CHECK(static_cast<double>(
                softmax_gradient_mass(Vector<float>(s.cast<float>()), static_cast<float>(alpha))) ==
            Approx(std::copysign(want, alpha)).epsilon(1e-5));
    }
    CHECK(softmax_gradient_mass(s, 0.0) == 0.0);
  }
}

TEST_CASE("the mass keeps its small values, and extreme scores do not overflow") {
  // Two scores 80 apart: 1 - sum p^2 = 2 e^-80 to the last digits, which 1 - sum p^2 as written would lose.
  Vector<double> s(2);
  s << 80, 0;
  CHECK(softmax_gradient_mass(s, 1.0) == Approx(2 * std::exp(-80)).epsilon(1e-12));
  CHECK(softmax_gradient_mass(s, -1.0) == Approx(-2 * std::exp(-80)).epsilon(1e-12));
  Vector<double> reversed(3);
  reversed << 800, 0, 0;
  CHECK(softmax_gradient_mass(reversed, -1.0) == -0.5);  // the two smallest share the row
  const double huge = std::numeric_limits<double>::max();
  Vector<double> wide(3), ds(3);
  wide << huge, huge, -huge;
  CHECK(softmax_gradient_mass(wide, 0.5) == 0.25);
  CHECK(softmax_gradient_mass(wide, 0.0) == 0.0);
  CHECK(softmax_gradient_mass_backward(wide, 0.5, ds) == 0.5);
  CHECK((ds.array() == 0.0).all());
  // A masked score is no score.
  Vector<double> masked(4), kept(3), dkept(3), dmasked(4);
  masked << 0.3, -kInf, 1.1, -0.4;
  kept << 0.3, 1.1, -0.4;
  CHECK(softmax_gradient_mass(masked, 1.5) == softmax_gradient_mass(kept, 1.5));
  CHECK(softmax_gradient_mass_backward(masked, 1.5, dmasked) ==
        Approx(softmax_gradient_mass_backward(kept, 1.5, dkept)).epsilon(1e-14));
  CHECK(dmasked[1] == 0.0);
  CHECK(dmasked[2] == Approx(dkept[1]).epsilon(1e-14));
  kept[1] = kNaN;
  CHECK(std::isnan(softmax_gradient_mass(kept, 1.5)));
}

TEST_CASE("gradients of the mass by scores and alpha") {
  Random random(11);
  for (const double alpha : {-1.3, 0.4, 2.5}) {
    Matrix<double> s = normal_matrix<double>(random, 6, 1),
                   a = Matrix<double>::Constant(1, 1, alpha);
    const auto mass = [&] { return softmax_gradient_mass(Vector<double>(s), a(0, 0)); };
    Vector<double> ds = Vector<double>::Constant(6, kNaN);
    const double dalpha = softmax_gradient_mass_backward(Vector<double>(s), alpha, ds);
    const GradcheckResult by_s = gradcheck(mass, s, Matrix<double>(ds));
    CHECK_MESSAGE(by_s.passed, by_s.message());
    const GradcheckResult by_alpha = gradcheck(mass, a, Matrix<double>::Constant(1, 1, dalpha));
    CHECK_MESSAGE(by_alpha.passed, by_alpha.message());
    CHECK(std::abs(ds.sum()) < 1e-14);  // a shift of all scores changes nothing
  }
  Vector<double> s(1), ds(1);
  s << 3;
  CHECK(softmax_gradient_mass_backward(s, 2.0, ds) == 0.0);
  CHECK(ds[0] == 0.0);
}

TEST_CASE("bad input, with its message") {
  const auto scale = [](double n, Index dim, double base = 512,
                        ScaleRule rule = ScaleRule::standard) {
    return [=] { (void)attention_scale(rule, n, dim, base); };
  };
  const Vector<double> none(0), two = Vector<double>::Zero(2);
  Vector<double> three = Vector<double>::Constant(3, 7.0);
  const struct {
    std::function<void()> call;
    std::string text;
  } errors[] = {
      {scale(0.5, 64), "attention_scale: n (0.5) must be finite and at least 1"},
      {scale(kNaN, 64), "attention_scale: n (nan) must be finite and at least 1"},
      {scale(kInf, 64), "attention_scale: n (inf) must be finite and at least 1"},
      {scale(8, 0), "attention_scale: head_dim (0) must be at least 1"},
      {scale(8, 64, 1), "attention_scale: base (1) must be finite and above 1"},
      {scale(8, 64, kInf), "attention_scale: base (inf) must be finite and above 1"},
      {scale(8, 64, kNaN), "attention_scale: base (nan) must be finite and above 1"},
      {scale(3, 1, 512, ScaleRule::gradmax_cosine),
       "gradmax_cosine: head_dim (1) must be at least 2 for n (3) above 2, there is no maximum"},
      {scale(1e160, 2, 512, ScaleRule::gradmax_cosine),
       "gradmax_cosine: no maximum below 1e300 for n (1e+160) and head_dim (2)"},
      {[] { (void)causal_attention_scales<double>(ScaleRule::log_n, -1, 64); },
       "causal_attention_scales: rows (-1) must not be negative"},
      {[] { (void)causal_attention_scales<double>(ScaleRule::log_n, 4, 64, 512, -2); },
       "causal_attention_scales: query_offset (-2) must not be negative"},
      {[] { (void)causal_attention_scales<double>(ScaleRule::log_n, 4, 0); },
       "attention_scale: head_dim (0) must be at least 1"},
      {[&] { (void)softmax_gradient_mass(none, 1.0); },
       "softmax_gradient_mass: s (0 entries) must not be empty"},
      {[&] { (void)softmax_gradient_mass(two, kInf); },
       "softmax_gradient_mass: alpha (inf) must be finite"},
      {[&] { (void)softmax_gradient_mass_backward(two, 1.0, three); },
       "softmax_gradient_mass: ds has 3 entries, expected 2 (size of s)"},
      {[&] { (void)softmax_gradient_mass_backward(Vector<double>(three), kNaN, three); },
       "softmax_gradient_mass: alpha (nan) must be finite"},
  };
  for (const auto& error : errors) {
    CHECK_THROWS_WITH_AS(error.call(), ("eigenblocks: " + error.text).c_str(), invalid_argument);
  }
  CHECK((three.array() == 7.0).all());
}
