// Attention over the latent cache against the written-out soft-max.
#include <eigenblocks/attention/mla_decode.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

namespace {

struct Case {
  Index heads, latent, rope, tokens, rows;
};

/// The definition, in double.
Matrix<double> brute_force(const Matrix<double>& cache, const Matrix<double>& query, const Case& c,
                           double scale) {
  Matrix<double> out = Matrix<double>::Zero(c.rows, c.heads * c.latent);
  const Index width = c.latent + c.rope;
  for (Index t = 0; t < c.rows; ++t) {
    const Index keys = c.tokens - c.rows + t + 1;
    for (Index h = 0; h < c.heads; ++h) {
      Eigen::VectorXd s(keys);
      for (Index j = 0; j < keys; ++j)
        s[j] = scale * query.row(t).segment(h * width, width).dot(cache.row(j));
      s = (s.array() - s.maxCoeff()).exp();
      s /= s.sum();
      for (Index j = 0; j < keys; ++j)
        out.row(t).segment(h * c.latent, c.latent) += s[j] * cache.row(j).head(c.latent);
    }
  }
  return out;
}

template <class S, class T>
double error_of(const Case& c, double scale, eb::ExecutorRef executor = {}) {
  eb::Random random(7);
  const Index width = c.latent + c.rope;
  const Matrix<S> rows = eb::normal_matrix<S>(random, c.tokens, width);
  const Matrix<S> query = eb::normal_matrix<S>(random, c.rows, c.heads * width);
  eb::LatentCache<T> cache({.latent_dim = c.latent, .rope_dim = c.rope});
  cache.append(rows);
  Matrix<S> out =
      Matrix<S>::Constant(c.rows, c.heads * c.latent, std::numeric_limits<S>::quiet_NaN());
  eb::latent_attention(cache, query, out, c.heads, scale, executor);
  const Matrix<double> want =
      brute_force(cache.view().template cast<double>(), query.template cast<double>(), c, scale);
  const double error = (out.template cast<double>() - want).cwiseAbs().maxCoeff();
  return std::isfinite(error) ? error : 1e30;
}

// Register tiles full, partial and of one register; channels over and under a multiple of the rows of a tile; depth over
// one chunk; keys around a block, a part and all parts; more pairs than one call takes.
const Case kCases[] = {{1, 1, 0, 1, 1},     {1, 5, 2, 47, 1},     {3, 7, 2, 48, 2},
                       {16, 16, 8, 49, 1},  {5, 13, 0, 100, 100}, {16, 300, 6, 130, 3},
                       {4, 6, 2, 1009, 17}, {2, 6, 2, 2100, 5},   {1, 3, 2, 20000, 2},
                       {128, 12, 4, 60, 4}, {9, 4, 4, 70, 70}};

}  // namespace

TEST_CASE("latent attention equals the definition") {
  for (const Case& c : kCases) {
    CAPTURE(c.heads);
    CAPTURE(c.tokens);
    CAPTURE(c.rows);
    // Averages of entries below 5; scores of size sqrt(channels) are rounded relative to their terms.
    CHECK(error_of<double, double>(c, 0.3) < 1e-13);
    CHECK(error_of<float, float>(c, 0.3) < 5e-5);
  }
  CHECK(error_of<float, Eigen::bfloat16>(kCases[3], 0.3) < 5e-5);
  CHECK(error_of<double, double>(kCases[3], 0.0) < 1e-13);
  CHECK(error_of<double, double>(kCases[3], -0.7) < 1e-13);
  CHECK(error_of<double, double>(kCases[6], 1e4) < 1e-9);  // one key takes all
}

TEST_CASE("latent attention: executors do not change a bit, views with a stride do") {
  const Case c{4, 6, 2, 2500, 20};
  eb::Random random(8);
  const Matrix<float> rows = eb::normal_matrix<float>(random, c.tokens, 8);
  const Matrix<float> query = eb::normal_matrix<float>(random, c.rows, 40);
  eb::LatentCache<float> cache({.latent_dim = 6, .rope_dim = 2});
  cache.append(rows);
  const auto part = query.middleCols(3, 32);
  Matrix<float> plain(c.rows, 24), wide = Matrix<float>::Constant(c.rows, 30, 9.0f);
  eb::latent_attention(cache, Matrix<float>(part), plain, 4, 0.5);
  for (const int workers : {2, 5}) {
    const eb::thread_pool pool(workers);
    Matrix<float> out(c.rows, 24);
    eb::latent_attention(cache, Matrix<float>(part), out, 4, 0.5, pool);
    CHECK(out == plain);
  }
  eb::latent_attention(cache, part, wide.middleCols(2, 24), 4, 0.5);
  CHECK(wide.middleCols(2, 24) == plain);
  CHECK((wide.leftCols(2).array() == 9.0f).all());
  CHECK((wide.rightCols(4).array() == 9.0f).all());
}

TEST_CASE("latent attention: nothing forgotten is read, NaN in sight is passed on") {
  eb::Random random(9);
  const Matrix<double> rows = eb::normal_matrix<double>(random, 60, 6);
  const Matrix<double> query = eb::normal_matrix<double>(random, 1, 12);
  eb::LatentCache<double> clean({.latent_dim = 4, .rope_dim = 2}), stale = clean;
  clean.append(rows.topRows(50));
  stale.append(Matrix<double>(Matrix<double>::Constant(60, 6, std::nan(""))));
  stale.truncate(0);
  stale.append(rows.topRows(50));
  Matrix<double> a(1, 8), b(1, 8);
  eb::latent_attention(clean, query, a, 2, 1.0);
  eb::latent_attention(stale, query, b, 2, 1.0);
  CHECK(a == b);
  stale.truncate(49);
  stale.append(Matrix<double>(Matrix<double>::Constant(1, 6, std::nan(""))));
  eb::latent_attention(stale, query, b, 2, 1.0);
  CHECK(b.array().isNaN().all());
}

TEST_CASE("latent attention: no rows, and errors") {
  eb::LatentCache<float> cache({.latent_dim = 4, .rope_dim = 2});
  Matrix<float> query(0, 12), out(0, 8);
  eb::latent_attention(cache, query, out, 2, 1.0);
  const auto message = [&](Index rows, Index q_cols, Index o_cols, Index heads, double scale) {
    Matrix<float> q = Matrix<float>::Zero(rows, q_cols);
    Matrix<float> o = Matrix<float>::Constant(rows, o_cols, 3.0f);
    std::string text;
    try {
      eb::latent_attention(cache, q, o, heads, scale);
    } catch (const eb::invalid_argument& error) {
      text = error.what();
    }
    CHECK((o.array() == 3.0f).all());
    return text.substr(std::min<std::size_t>(text.size(), 13));
  };
  cache.append(Matrix<float>(Matrix<float>::Ones(1, 6)));
  CHECK(message(1, 12, 8, 0, 1.0) == "heads (0) must be at least 1");
  CHECK(message(1, 11, 8, 2, 1.0) ==
        "query is 1 x 11, expected 1 x 12 (cols = heads * (latent_dim + rope_dim) of the cache)");
  CHECK(message(1, 12, 12, 2, 1.0) ==
        "out is 1 x 12, expected 1 x 8 (rows of query, heads * latent_dim)");
  CHECK(message(2, 12, 8, 2, 1.0) == "query has 2 rows, but the cache holds only 1 tokens");
  CHECK(message(1, 12, 8, 2, HUGE_VAL) == "scale (inf) must be finite");
}
