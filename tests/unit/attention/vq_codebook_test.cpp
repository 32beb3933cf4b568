#include <eigenblocks/attention/vq_codebook.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <string>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Matrix<double> normal(Index rows, Index cols, std::uint64_t seed) {
  eb::Random random(seed);
  return eb::normal_matrix<double>(random, rows, cols);
}

template <class S>
eb::VqCodes nearest_by_definition(const Matrix<S>& key, const Matrix<S>& codebook, Index heads) {
  const Index codes = codebook.rows() / heads, d = codebook.cols();
  eb::VqCodes z = eb::VqCodes::Zero(key.rows(), heads);
  for (Index t = 0; t < key.rows(); ++t) {
    for (Index h = 0; h < heads; ++h) {
      S best = std::numeric_limits<S>::infinity();
      for (Index s = 0; s < codes; ++s) {
        const S distance =
            (key.row(t).segment(h * d, d) - codebook.row(h * codes + s)).squaredNorm();
        if (distance < best) {
          best = distance;
          z(t, h) = s;
        }
      }
    }
  }
  return z;
}

template <class F>
std::string message(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  } catch (const std::out_of_range& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("the nearest code, for every head and any executor") {
  eb::thread_pool pool(3);
  for (const Index tokens : {0, 1, 5, 37, 2100}) {
    for (const Index codes : {1, 2, 7, 8, 33, 260}) {
      for (const Index heads : {1, 3}) {
        for (const Index dim : {1, 4, 9}) {
          const Matrix<double> key = normal(tokens, heads * dim, 1),
                               codebook = normal(heads * codes, dim, 2);
          const eb::VqCodes z = eb::vq_nearest(key, codebook, heads);
          CHECK(z == nearest_by_definition(key, codebook, heads));
          CHECK(z == eb::vq_nearest(key, codebook, heads, pool));
        }
      }
    }
  }
  const Matrix<float> key = normal(50, 6, 3).cast<float>(),
                      codebook = normal(20, 3, 4).cast<float>();
  CHECK(eb::vq_nearest(key, codebook, 2) == nearest_by_definition(key, codebook, 2));
}

TEST_CASE("ties go to the lowest index, NaN keys to 0, operands may have strides") {
  Matrix<double> codebook(6, 2);
  codebook << 5, 5, 1, 0, 1, 0, 0, 1, -1, 0, 1, 0;
  Matrix<double> key(4, 2);
  key << 2, 0, 0, 0, kNaN, 1, 0, -4;
  const eb::VqCodes z = eb::vq_nearest(key, codebook);
  CHECK(z(0, 0) == 1);  // rows 1, 2 and 5 are the same
  CHECK(z(1, 0) == 1);  // rows 1 .. 5 are as far
  CHECK(z(2, 0) == 0);
  CHECK(z(3, 0) == 1);
  Matrix<double> wide_key = Matrix<double>::Constant(4, 7, kNaN),
                 wide_codebook = Matrix<double>::Constant(6, 5, kNaN);
  wide_key.middleCols(3, 2) = key;
  wide_codebook.middleCols(1, 2) = codebook;
  CHECK(eb::vq_nearest(wide_key.middleCols(3, 2), wide_codebook.middleCols(1, 2)) == z);
  codebook.row(1).setConstant(kNaN);  // a code that is NaN is never nearest
  CHECK(eb::vq_nearest(key, codebook)(0, 0) == 2);
  codebook.setConstant(kNaN);
  CHECK((eb::vq_nearest(key, codebook).array() == 0).all());
}

TEST_CASE("commitment loss and its gradient") {
  Matrix<double> key = normal(9, 6, 5);
  const Matrix<double> codebook = normal(8, 3, 6);
  const eb::VqCodes z = eb::vq_nearest(key, codebook, 2);
  eb::VqTokenMask mask = eb::VqTokenMask::Constant(9, true);
  mask[2] = mask[7] = false;
  double sum = 0, all = 0;
  for (Index t = 0; t < 9; ++t) {
    for (Index h = 0; h < 2; ++h) {
      const double error =
          (key.row(t).segment(3 * h, 3) - codebook.row(4 * h + z(t, h))).squaredNorm();
      CHECK(eb::vq_squared_error(key, codebook, z)(t, h) == doctest::Approx(error).epsilon(1e-14));
      all += error;
      if (mask[t]) sum += error;
    }
  }
  CHECK(eb::vq_commit_forward(key, codebook, z) == doctest::Approx(all / 9).epsilon(1e-14));
  CHECK(eb::vq_commit_forward(key, codebook, z, &mask) == doctest::Approx(sum / 9).epsilon(1e-14));
  Matrix<double> dkey = Matrix<double>::Constant(9, 6, 1e9);
  eb::vq_commit_backward(key, codebook, z, 1.5, dkey, &mask);
  CHECK(dkey.row(2).isZero(0));
  const auto r = eb::gradcheck([&] { return 1.5 * eb::vq_commit_forward(key, codebook, z, &mask); },
                               key, dkey);
  CHECK_MESSAGE(r.passed, r.message());
  mask.setConstant(false);
  key.setConstant(kNaN);  // masked tokens are dropped, not multiplied by 0
  CHECK(eb::vq_commit_forward(key, codebook, z, &mask) == 0);
  eb::vq_commit_backward(key, codebook, z, 1.0, dkey, &mask);
  CHECK(dkey.isZero(0));
  CHECK(eb::vq_commit_forward(Matrix<double>(0, 6), codebook, eb::VqCodes(0, 2)) == 0);
}

TEST_CASE("moving averages and the codebook they give") {
  Matrix<double> key(3, 2);
  key << 1, 2, 3, 4, kNaN, kNaN;
  eb::VqCodes z(3, 1);
  z << 1, 1, 0;
  eb::VqTokenMask mask(3);
  mask << true, true, false;
  eb::VqCodebookAverage<double> average{Matrix<double>::Constant(2, 2, 8),
                                        Matrix<double>::Constant(1, 2, 4)};
  eb::vq_average_update(average, key, z, &mask, {.decay = 0.75});
  Matrix<double> sum(2, 2), count(1, 2);
  sum << 6, 6, 6 + 0.25 * 4, 6 + 0.25 * 6;
  count << 3, 3 + 0.25 * 2;
  CHECK((average.sum - sum).norm() < 1e-15);
  CHECK((average.count - count).norm() < 1e-15);
  CHECK((eb::vq_codebook(average).row(1) - sum.row(1) / 3.5).norm() < 1e-15);
  average.count(0, 0) = 1e-9;  // a dead code: the floor keeps it finite
  CHECK((eb::vq_codebook(average).row(0) - sum.row(0) / 0.01).norm() < 1e-12);
  CHECK((eb::vq_codebook(average, {.count_floor = 2}).row(0) - sum.row(0) / 2).norm() < 1e-15);

  // The fixed point under constant keys is their mean.
  average = {Matrix<double>::Zero(2, 2), Matrix<double>::Zero(1, 2)};
  for (int step = 0; step < 200; ++step)
    eb::vq_average_update(average, key, z, &mask, {.decay = 0.9});
  CHECK((eb::vq_codebook(average).row(1) - Eigen::RowVector2d(2, 3)).norm() < 1e-12);

  // Heads have their own codes.
  const Matrix<double> two = normal(5, 4, 8);
  average = {Matrix<double>::Zero(6, 2), Matrix<double>::Zero(2, 3)};
  eb::VqCodes both(5, 2);
  both << 0, 2, 1, 2, 2, 2, 0, 0, 0, 1;
  eb::vq_average_update(average, two, both, nullptr, {.decay = 0});
  CHECK((average.sum.row(5) - two.topRows(3).rightCols(2).colwise().sum()).norm() < 1e-14);
  CHECK(average.count(0, 0) == 3);
  CHECK(average.count(1, 2) == 3);
}

TEST_CASE("bad input is named, and nothing is written") {
  const Matrix<double> key = normal(4, 6, 9), codebook = normal(10, 3, 10);
  eb::VqCodes z = eb::vq_nearest(key, codebook, 2);
  CHECK(message([&] { eb::vq_nearest(key, codebook, 0); }) ==
        "eigenblocks: heads (0) must be at least 1");
  CHECK(message([&] { eb::vq_nearest(key, Matrix<double>(0, 3), 2); }) ==
        "eigenblocks: codebook has 0 rows, expected a positive multiple of heads (2)");
  CHECK(message([&] { eb::vq_nearest(key, Matrix<double>(9, 3), 2); }) ==
        "eigenblocks: codebook has 9 rows, expected a positive multiple of heads (2)");
  CHECK(message([&] { eb::vq_nearest(key, Matrix<double>(10, 0), 2); }) ==
        "eigenblocks: codebook has 0 columns, expected at least 1");
  CHECK(message([&] { eb::vq_nearest(key, Matrix<double>(10, 4), 2); }) ==
        "eigenblocks: key has 6 columns, expected 8 (heads * columns of the codebook)");
  CHECK(message([&] { eb::vq_squared_error(key, codebook, eb::VqCodes(3, 2)); }) ==
        "eigenblocks: codes is 3 x 2, expected 4 x 2 (tokens x heads)");
  const eb::VqTokenMask mask = eb::VqTokenMask::Constant(3, true);
  CHECK(message([&] { eb::vq_commit_forward(key, codebook, z, &mask); }) ==
        "eigenblocks: mask has 3 entries, expected 4 (tokens)");
  Matrix<double> dkey = Matrix<double>::Constant(4, 5, 7);
  CHECK(message([&] { eb::vq_commit_backward(key, codebook, z, 1.0, dkey); }) ==
        "eigenblocks: dkey is 4 x 5, expected 4 x 6 (shape of key)");
  CHECK((dkey.array() == 7).all());
  eb::VqCodebookAverage<double> average{Matrix<double>::Constant(10, 3, 7),
                                        Matrix<double>::Constant(2, 5, 7)};
  CHECK(message([&] { eb::vq_average_update(average, key, z, nullptr, {.decay = 1.5}); }) ==
        "eigenblocks: decay (1.5) must be in [0, 1]");
  CHECK(message([&] { eb::vq_codebook(average, {.count_floor = 0}); }) ==
        "eigenblocks: count_floor (0) must be positive");
  z(1, 1) = 5;
  CHECK(message([&] { eb::vq_average_update(average, key, z); }) ==
        "eigenblocks: code (5) is outside [0, 5)");
  average.count.resize(1, 5);
  CHECK(message([&] { eb::vq_average_update(average, key, z); }) ==
        "eigenblocks: count is 1 x 5, expected 2 x 5 (heads x codes)");
  CHECK(message([&] { eb::vq_codebook(average); }) ==
        "eigenblocks: sum has 10 rows, count has 5 entries, expected equal numbers");
  CHECK((average.sum.array() == 7).all());
}
