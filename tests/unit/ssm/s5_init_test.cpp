// Fresh S5 layers.
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/ssm/s5_init.hpp>

#include "support/layer_checks.hpp"

#include <doctest/doctest.h>

#include <limits>

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

TEST_CASE("blocks of LegS's normal part; B and C are real ones in its eigenbasis") {
  eb::Random random(3);
  for (const bool both : {false, true}) {
    const auto p = eb::s5_parameters<double>(
        random, 6, 4, {.blocks = 2, .dt_min = 0.01, .dt_max = 0.2, .bidirectional = both});
    const eb::Nplr legs = eb::nplr(eb::HippoMeasure::legs, 6);
    CHECK(p.lambda.size() == 6);
    CHECK(p.c.cols() == (both ? 12 : 6));
    CHECK(p.d.size() == 4);
    for (Index block = 0; block < 2; ++block) {
      CHECK((p.lambda.segment(3 * block, 3) - legs.lambda).cwiseAbs().maxCoeff() == 0);
      // b = V^* B0 with B0 real: B0 = 2 Re(V b)
      const Matrix<std::complex<double>> b = p.b.middleRows(3 * block, 3);
      const Matrix<double> b0 = 2 * (legs.v.lazyProduct(b)).real();
      const Matrix<std::complex<double>> again =
          legs.v.adjoint().lazyProduct(b0.cast<std::complex<double>>());
      CHECK((again - b).cwiseAbs().maxCoeff() < 1e-13);
      CHECK(b.cwiseAbs().minCoeff() > 0);
    }
    CHECK(p.dt.minCoeff() >= 0.01);
    CHECK(p.dt.maxCoeff() <= 0.2);
    Matrix<double> u = Matrix<double>::Ones(5, 4), y(5, 4);
    eb::s5_forward(u, p, y, {.bidirectional = both});
    CHECK(y.allFinite());
  }
  const auto f = eb::s5_parameters<float>(random, 8, 2);
  CHECK(f.lambda.real().isConstant(-0.5f));
}

TEST_CASE("wrong options are named") {
  eb::Random random(3);
  check_throws<eb::invalid_argument>(
      [&] { eb::s5_parameters<double>(random, 6, 4, {.blocks = 4}); },
      "blocks (4) must divide modes (6)");
  check_throws<eb::invalid_argument>([&] { eb::s5_parameters<double>(random, 0, 4); },
                                     "modes (0) and channels (4) must be at least 1");
  check_throws<eb::invalid_argument>(
      [&] { eb::s5_parameters<double>(random, 6, 4, {.dt_min = 0.2, .dt_max = 0.1}); },
      "dt_min (0.2) and dt_max (0.1) must be positive and ordered");
}
