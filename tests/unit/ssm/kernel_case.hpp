// What the tests of S4, S4D and RTF share: gradient checks of complex parameters, distances, the same call by many executors.
#pragma once

#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include "support/layer_checks.hpp"

#include <doctest/doctest.h>

#include <complex>
#include <functional>
#include <string>

namespace kernel_case {

namespace eb = eigenblocks;
using eb::Index;
using Real = eb::Matrix<double>;
using Complex = std::complex<double>;
using ComplexMatrix = eb::Matrix<Complex>;

inline Eigen::Map<Real> parts(ComplexMatrix& z) {
  return {reinterpret_cast<double*>(z.data()), z.rows(), 2 * z.cols()};
}
inline Real parts_of(const ComplexMatrix& z) {
  return Eigen::Map<const Real>(reinterpret_cast<const double*>(z.data()), z.rows(), 2 * z.cols());
}

inline void check_gradient(const std::function<double()>& loss,
                           Eigen::Ref<Real, 0, Eigen::OuterStride<>> x, const Real& gradient,
                           const std::string& name, double step = 7.4e-4) {
  const auto result = eb::gradcheck(loss, x, gradient, {.step = step});
  CHECK_MESSAGE(result.passed, name, ": ", result.message());
}
inline void check_gradient(const std::function<double()>& loss, ComplexMatrix& z,
                           const ComplexMatrix& gradient, const std::string& name) {
  check_gradient(loss, parts(z), parts_of(gradient), name);
}
/// Small steps: these are dt and its like, below 1.
inline void check_gradient(const std::function<double()>& loss, eb::Vector<double>& v,
                           const eb::Vector<double>& gradient, const std::string& name) {
  check_gradient(loss, Eigen::Map<Real>(v.data(), 1, v.size()), gradient.transpose(), name, 1e-4);
}

inline ComplexMatrix random_complex(eb::Random& random, Index rows, Index cols) {
  ComplexMatrix z(rows, cols);
  for (Index i = 0; i < z.size(); ++i) {
    const double re = random.normal();
    z.data()[i] = {re, random.normal()};
  }
  return z;
}

/// <a, b> as of real vectors.
inline double inner(const Real& a, const Real& b) { return a.cwiseProduct(b).sum(); }
inline double inner(const ComplexMatrix& a, const ComplexMatrix& b) {
  return inner(parts_of(a), parts_of(b));
}

/// Largest difference over the largest entry of b (of 1 where b is 0).
inline double relative(const Real& a, const Real& b) {
  const double size = b.size() == 0 ? 0.0 : b.cwiseAbs().maxCoeff();
  return largest_difference(a, b) / (size > 0 ? size : 1.0);
}
inline double relative(const ComplexMatrix& a, const ComplexMatrix& b) {
  return relative(parts_of(a), parts_of(b));
}

/// f(executor) must give the same bits with 1, 2, 3 and 7 workers as without.
inline void check_same_bits(const std::function<Real(eb::ExecutorRef)>& f) {
  const Real serial = f({});
  for (const int workers : {1, 2, 3, 7}) {
    const eb::thread_pool pool(workers);
    CHECK(f(pool) == serial);
  }
}

}  // namespace kernel_case
