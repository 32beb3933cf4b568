// Linear recurrences: every form against the loop that defines them, gradients, executors, extremes, bad input.
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/scan.hpp>
#include <eigenblocks/core/thread_pool.hpp>

#include "support/alloc_guard.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace eigenblocks;
using Complex = std::complex<double>;

template <class S>
struct Case {
  Matrix<S> a, b, dh;
  Vector<S> h0;
  Case(Index rows, Index lanes, bool constant = false) {
    std::srand(unsigned(7 * rows + lanes));
    a = Matrix<S>::Random(constant ? 1 : rows, lanes) * real_t<S>(1.1);
    b = Matrix<S>::Random(rows, lanes);
    dh = Matrix<S>::Random(rows, lanes);
    h0 = Vector<S>::Random(lanes);
    if (rows > 2 && lanes > 0 && !constant) a(1, 0) = S(0);  // legal, and the end of every division
  }
};

/// The definition.  Without h0 (empty), h_0 = b_0.
template <class S>
Matrix<S> definition(const Matrix<S>& a, const Matrix<S>& b, const Vector<S>& h0, bool reverse) {
  Matrix<S> h(b.rows(), b.cols());
  for (Index i = 0; i < b.rows(); ++i) {
    const Index t = reverse ? b.rows() - 1 - i : i, before = reverse ? t + 1 : t - 1;
    for (Index d = 0; d < b.cols(); ++d) {
      h(t, d) = b(t, d);
      if (i == 0 && h0.size() == 0) continue;
      h(t, d) += a(a.rows() == 1 ? 0 : t, d) * (i == 0 ? h0[d] : h(before, d));
    }
  }
  return h;
}

template <class S>
double difference(const Matrix<S>& x, const Matrix<S>& y) {
  if (x.rows() != y.rows() || x.cols() != y.cols()) return 1e300;
  double worst = 0;
  for (Index i = 0; i < x.size(); ++i) {
    const double error = double(std::abs(x.data()[i] - y.data()[i]));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

template <class S>
bool same_bits(const Matrix<S>& x, const Matrix<S>& y) {
  return x.size() == y.size() &&
         (x.size() == 0 || std::memcmp(x.data(), y.data(), std::size_t(x.size()) * sizeof(S)) == 0);
}

template <class S>
Matrix<S> forward(const Case<S>& c, const Vector<S>& h0, const ScanOptions& options,
                  ExecutorRef executor = {}) {
  Matrix<S> h = Matrix<S>::Constant(c.b.rows(), c.b.cols(), S(99));
  scan_forward(c.a, c.b, h, h0, options, executor);
  return h;
}

template <class S>
void check_forms() {
  const double tolerance = 200 * double(std::numeric_limits<real_t<S>>::epsilon());
  const Vector<S> none;
  for (const Index rows : {0, 1, 2, 7, 33}) {
    for (const Index lanes : {0, 1, 3, 8, 37, 150}) {
      for (const bool constant : {false, true}) {
        const Case<S> c(rows, lanes, constant);
        for (const bool reverse : {false, true}) {
          for (const Vector<S>& h0 : {c.h0, none}) {
            const Matrix<S> want = definition(c.a, c.b, h0, reverse);
            const double scale = want.size() == 0 ? 1 : 1 + double(want.cwiseAbs().maxCoeff());
            for (const Index chunk : {0, 1, 5, 16}) {
              CAPTURE(rows);
              CAPTURE(lanes);
              CAPTURE(chunk);
              const ScanOptions options{.reverse = reverse, .wide = false, .time_chunk = chunk};
              CHECK(difference(forward(c, h0, options), want) <= tolerance * scale);
              Matrix<S> in_place = c.b;
              scan_forward(c.a, in_place, in_place, h0, options);
              CHECK(same_bits(in_place, forward(c, h0, options)));
            }
          }
        }
      }
    }
  }
}

/// The real numbers of a real or complex matrix: its complex gradients are the gradients of those.
template <class S>
Eigen::Map<Matrix<double>> reals(Matrix<S>& x) {
  return {reinterpret_cast<double*>(x.data()), x.rows(),
          x.cols() * Index(sizeof(S) / sizeof(double))};
}

template <class S>
void check_gradients(Case<S> c, bool with_state, const ScanOptions& options) {
  Vector<S> h0 = with_state ? c.h0 : Vector<S>();
  Matrix<S> h(c.b.rows(), c.b.cols()), da = c.a, db = c.dh;
  Matrix<S> dh0(1, h0.size());
  scan_forward(c.a, c.b, h, h0, options);
  scan_backward(c.a, h, db, da, db, dh0.row(0), h0, options);  // db is dh
  const auto loss = [&] {
    Matrix<S> out = forward(c, h0, options);
    return (reals(out).array() * reals(c.dh).array()).sum();
  };
  const auto a = gradcheck(loss, reals(c.a), reals(da));
  CHECK_MESSAGE(a.passed, a.message());
  const auto b = gradcheck(loss, reals(c.b), reals(db));
  CHECK_MESSAGE(b.passed, b.message());
  if (!with_state) return;
  Matrix<S> state = h0.transpose();
  const auto state_loss = [&] {
    h0 = state.row(0).transpose();
    return loss();
  };
  const auto s = gradcheck(state_loss, reals(state), reals(dh0));
  CHECK_MESSAGE(s.passed, s.message());

  Matrix<S> lam(c.b.rows(), c.b.cols()), dstate(1, h0.size());
  scan_adjoint(c.a, c.dh, lam, dstate.row(0), options);
  CHECK(same_bits(lam, db));
  CHECK(same_bits(dstate, dh0));
}

Matrix<double> dense_definition(const Matrix<double>& a, const Matrix<double>& b,
                                const Vector<double>& x0, bool reverse) {
  Matrix<double> x = b;
  const Index n = b.cols();
  for (Index i = 0; i < b.rows(); ++i) {
    const Index t = reverse ? b.rows() - 1 - i : i, before = reverse ? t + 1 : t - 1;
    if (i == 0 && x0.size() == 0) continue;
    const Vector<double> state = i == 0 ? x0 : Vector<double>(x.row(before).transpose());
    x.row(t) += (a.middleRows(a.rows() == n ? 0 : t * n, n) * state).transpose();
  }
  return x;
}

TEST_CASE("scan: every form equals the definition") {
  check_forms<double>();
  check_forms<Complex>();
  check_forms<float>();
}

TEST_CASE(
    "scan: chunks of any size with a carried state are the whole, bit for bit, and in strided "
    "memory") {
  const Case<double> c(23, 11);
  const Matrix<double> want = forward(c, c.h0, {});
  for (const Index chunk : {1, 4, 22}) {
    Matrix<double> wide = Matrix<double>::Constant(23, 20, 5.0);
    auto h = wide.middleCols(3, 11);
    for (Index t = 0; t < 23; t += chunk) {
      const Index n = std::min(chunk, 23 - t);
      if (t == 0) {
        scan_forward(c.a.topRows(n), c.b.topRows(n), h.topRows(n), c.h0);
      } else {
        scan_forward(c.a.middleRows(t, n), c.b.middleRows(t, n), h.middleRows(t, n), h.row(t - 1));
      }
    }
    CHECK(same_bits(Matrix<double>(h), want));
    CHECK((wide.leftCols(3).array() == 5.0).all());
    CHECK((wide.rightCols(6).array() == 5.0).all());
  }
  // The state may be the row that is overwritten last.
  Matrix<double> h = want;
  const Vector<double> last = want.row(22).transpose();
  scan_forward(c.a, c.b, h, h.row(22));
  CHECK(same_bits(h, definition(c.a, c.b, last, false)) ==
        same_bits(want, definition(c.a, c.b, c.h0, false)));
  CHECK(difference(h, definition(c.a, c.b, last, false)) < 1e-13);
}

TEST_CASE("scan: gradients") {
  for (const bool reverse : {false, true}) {
    for (const Index chunk : {0, 3}) {
      const ScanOptions options{.reverse = reverse, .wide = false, .time_chunk = chunk};
      for (const bool with_state : {false, true}) {
        check_gradients(Case<double>(8, 5), with_state, options);
        check_gradients(Case<Complex>(7, 3), with_state, options);
        check_gradients(Case<double>(8, 5, true), with_state, options);
        check_gradients(Case<Complex>(7, 3, true), with_state, options);
        check_gradients(Case<double>(1, 2), with_state, options);
      }
    }
  }
  // A long sum over time, over parts of it.
  const Case<double> c(20000, 2, true);
  const Matrix<double> small = c.a * 0.5;
  Matrix<double> h = c.b, da = small, db = c.b;
  Vector<double> dh0(2);
  scan_forward(small, c.b, h, c.h0);
  scan_backward(small, h, c.dh, da, db, dh0, c.h0);
  for (Index d = 0; d < 2; ++d) {
    double sum = db(0, d) * c.h0[d];
    for (Index t = 1; t < 20000; ++t) sum += db(t, d) * h(t - 1, d);
    CHECK(da(0, d) == doctest::Approx(sum).epsilon(1e-12));
  }
}

TEST_CASE("scan: without a state the first coefficient is not read; NaN stays in its lane") {
  Case<double> c(9, 6);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const bool reverse : {false, true}) {
    for (const Index chunk : {0, 4}) {
      const ScanOptions options{.reverse = reverse, .wide = false, .time_chunk = chunk};
      Case<double> bad = c;
      bad.a.row(reverse ? 8 : 0).setConstant(nan);
      CHECK(same_bits(forward(bad, Vector<double>(), options),
                      forward(c, Vector<double>(), options)));
      Matrix<double> h = forward(bad, Vector<double>(), options), da = bad.a, db = c.dh;
      Vector<double> none;
      scan_backward(bad.a, h, c.dh, da, db, none, Vector<double>(), options);
      CHECK(da.row(reverse ? 8 : 0).isZero(0));
      CHECK(db.allFinite());
      bad = c;
      bad.b(4, 2) = nan;
      h = forward(bad, c.h0, options);
      for (Index t = 0; t < 9; ++t) {
        CHECK(std::isnan(h(t, 2)) == (reverse ? t <= 4 : t >= 4));
      }
      h.col(2).setZero();
      CHECK(h.allFinite());
    }
  }
}

TEST_CASE("scan: results do not depend on the workers") {
  const thread_pool two(2), three(3), seven(7);
  const Case<double> c(50, 300), constant(50, 300, true);
  for (const Index chunk : {0, 7}) {
    const ScanOptions options{.reverse = false, .wide = false, .time_chunk = chunk};
    const Matrix<double> want = forward(c, c.h0, options);
    for (const thread_pool* pool : {&two, &three, &seven}) {
      CHECK(same_bits(forward(c, c.h0, options, *pool), want));
      for (const Case<double>* k : {&c, &constant}) {
        const Matrix<double> h = forward(*k, k->h0, options);
        Matrix<double> da = k->a, db = k->b, da2 = da, db2 = db, d0(1, 300), d1(1, 300);
        scan_backward(k->a, h, k->dh, da, db, d0.row(0), k->h0, options);
        scan_backward(k->a, h, k->dh, da2, db2, d1.row(0), k->h0, options, *pool);
        CHECK(same_bits(da, da2));
        CHECK(same_bits(db, db2));
        CHECK(same_bits(d0, d1));
      }
    }
  }
}

TEST_CASE("scan: a chunk at a time allocates nothing") {
  if (!AllocationCount::available) return;
  const Case<float> c(6, 40);
  Matrix<float> h = c.b;
  const AllocationCount count;
  for (int i = 0; i < 5; ++i) scan_forward(c.a, c.b, h, h.row(5));
  CHECK(count.calls() == 0);
}

TEST_CASE("scan: wide keeps the phase of a state on the unit circle") {
  using C = std::complex<float>;
  const Index rows = 100000;
  Matrix<C> a = Matrix<C>::Constant(1, 3, C(0.6f, 0.8f)), b = Matrix<C>::Zero(rows, 3);
  b.row(0).setOnes();
  Matrix<C> plain = b, wide = b;
  scan_forward(a, b, plain);
  scan_forward(a, b, wide, Vector<C>(), {.reverse = false, .wide = true, .time_chunk = 0});
  // The exact power of the float coefficient.
  const Complex exact = std::polar(std::pow(std::abs(Complex(a(0, 0))), double(rows - 1)),
                                   std::arg(Complex(a(0, 0))) * double(rows - 1));
  const auto error = [&](const Matrix<C>& h) { return std::abs(Complex(h(rows - 1, 2)) - exact); };
  CHECK(error(wide) < 1e-6);
  CHECK(error(plain) > 10 * error(wide));
  CHECK(error(plain) < 1e-2);  // T eps
}

TEST_CASE("associative_scan: order, direction, chunks, workers") {
  const thread_pool three(3);
  const auto join = [](const std::string& first, const std::string& then) { return first + then; };
  for (const Index n : {0, 1, 2, 10, 13}) {
    for (const bool reverse : {false, true}) {
      for (const Index chunk : {0, 1, 4, 13, 50}) {
        std::vector<std::string> items, want;
        for (Index i = 0; i < n; ++i) items.push_back(std::string(1, char('a' + i)));
        want = items;
        for (Index i = 1; i < n; ++i) {
          const auto at = [&](Index k) { return std::size_t(reverse ? n - 1 - k : k); };
          want[at(i)] = want[at(i - 1)] + want[at(i)];
        }
        associative_scan(std::span(items), join, {.reverse = reverse, .chunk = chunk}, three);
        CHECK(items == want);
      }
    }
  }
  std::vector<double> items(3, 1.0);
  CHECK_THROWS_WITH_AS(associative_scan(std::span(items), [](double x, double y) { return x + y; },
                                        {.reverse = false, .chunk = -1}),
                       "eigenblocks: chunk (-1) must be positive, or 0 for none", invalid_argument);
}

TEST_CASE("scan_dense: forms, gradients, workers") {
  const thread_pool two(2), seven(7);
  for (const Index n : {1, 3, 9}) {
    for (const Index rows : {0, 1, 2, 11}) {
      for (const bool constant : {false, true}) {
        std::srand(unsigned(n + 100 * rows));
        Matrix<double> a = Matrix<double>::Random((constant ? 1 : rows) * n, n) * 0.7;
        Matrix<double> b = Matrix<double>::Random(rows, n), g = Matrix<double>::Random(rows, n);
        Matrix<double> state = Matrix<double>::Random(1, n);
        for (const bool reverse : {false, true}) {
          for (const Index chunk : {0, 1, 4}) {
            CAPTURE(n);
            CAPTURE(rows);
            CAPTURE(chunk);
            const ScanOptions options{.reverse = reverse, .wide = false, .time_chunk = chunk};
            const auto run = [&](const Vector<double>& x0, ExecutorRef executor = {}) {
              Matrix<double> x = b;  // in place
              scan_dense_forward(a, x, x, x0, options, executor);
              return x;
            };
            const Vector<double> x0 = state.row(0).transpose(), none;
            CHECK(difference(run(x0), dense_definition(a, b, x0, reverse)) < 1e-13);
            CHECK(difference(run(none), dense_definition(a, b, none, reverse)) < 1e-13);
            CHECK(same_bits(run(x0), run(x0, seven)));
            if (n == 9 && chunk == 1) continue;
            for (const bool with_state : {false, true}) {
              const Vector<double> start = with_state ? x0 : none;
              const Matrix<double> x = run(start);
              Matrix<double> da = a, db = g, dstate(1, start.size()), da2 = a, db2 = g;
              scan_dense_backward(a, x, db, da, db, dstate.row(0), start, options);
              scan_dense_backward(a, x, g, da2, db2, dstate.row(0), start, options, two);
              CHECK(same_bits(da, da2));
              CHECK(same_bits(db, db2));
              const auto loss = [&] {
                const Vector<double> from =
                    with_state ? Vector<double>(state.row(0).transpose()) : none;
                return (run(from).array() * g.array()).sum();
              };
              const GradcheckOptions few{.max_entries = 40};
              const auto ra = gradcheck(loss, a, da, few), rb = gradcheck(loss, b, db, few);
              CHECK_MESSAGE(ra.passed, ra.message());
              CHECK_MESSAGE(rb.passed, rb.message());
              if (!with_state) continue;
              const auto rs = gradcheck(loss, state, dstate, few);
              CHECK_MESSAGE(rs.passed, rs.message());
            }
          }
        }
      }
    }
  }
}

TEST_CASE("scan: bad input is refused before anything is written") {
  const Case<double> c(4, 3);
  const Matrix<double> untouched = Matrix<double>::Constant(4, 3, 7.0);
  Matrix<double> h = untouched, da = untouched, db = untouched;
  Vector<double> dh0 = Vector<double>::Constant(3, 7.0), four(4);
  const Matrix<double> wrong(3, 3), wrong_lanes(4, 2), dense(12, 3);
  CHECK_THROWS_WITH_AS(
      scan_forward(wrong, c.b, h),
      "eigenblocks: a is 3 x 3, expected 4 x 3 or 1 x 3 (rows of time, or one; lanes)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(scan_forward(wrong_lanes, c.b, h), doctest::Contains("a is 4 x 2"),
                       invalid_argument);
  CHECK_THROWS_WITH_AS(scan_forward(c.a, c.b, h, four),
                       "eigenblocks: h0 has 4 entries, expected 3 (lanes), or none",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(
      scan_forward(c.a, c.b, h, c.h0, {.reverse = false, .wide = false, .time_chunk = -2}),
      "eigenblocks: time_chunk (-2) must be positive, or 0 for none", invalid_argument);
  CHECK_THROWS_WITH_AS(
      scan_forward(c.a, c.b, h, c.h0, {.reverse = false, .wide = true, .time_chunk = 2}),
      "eigenblocks: time_chunk (2) must be 0 where wide is set", invalid_argument);
  Matrix<double> small(3, 3);
  CHECK_THROWS_WITH_AS(scan_forward(c.a, c.b, small),
                       "eigenblocks: h is 3 x 3, expected 4 x 3 (shape of b)", invalid_argument);
  CHECK_THROWS_WITH_AS(scan_backward(c.a, c.b, c.dh, small, db, dh0),
                       "eigenblocks: da is 3 x 3, expected 4 x 3 (shape of a)", invalid_argument);
  CHECK_THROWS_WITH_AS(scan_backward(c.a, wrong, c.dh, da, db, dh0),
                       "eigenblocks: h is 3 x 3, expected 4 x 3 (shape of dh)", invalid_argument);
  CHECK_THROWS_WITH_AS(scan_backward(c.a, c.b, c.dh, da, db, four),
                       "eigenblocks: dh0 has 4 entries, expected 3 (lanes), or none",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(scan_adjoint(c.a, c.dh, small, dh0),
                       "eigenblocks: db is 3 x 3, expected 4 x 3 (shape of dh)", invalid_argument);
  CHECK_THROWS_WITH_AS(
      scan_dense_forward(c.a, c.b, h),
      "eigenblocks: A is 4 x 3, expected 12 x 3 or 3 x 3 (time * state rows, or state)",
      invalid_argument);
  CHECK_THROWS_WITH_AS(scan_dense_forward(dense, c.b, h, four),
                       "eigenblocks: x0 has 4 entries, expected 3 (state), or none",
                       invalid_argument);
  CHECK_THROWS_WITH_AS(
      scan_dense_forward(dense, c.b, h, c.h0, {.reverse = false, .wide = true, .time_chunk = 0}),
      "eigenblocks: wide must be false for scans with matrices", invalid_argument);
  CHECK_THROWS_WITH_AS(scan_dense_backward(dense, c.b, c.dh, da, db, dh0),
                       "eigenblocks: dA is 4 x 3, expected 12 x 3 (shape of A)", invalid_argument);
  CHECK(same_bits(h, untouched));
  CHECK(same_bits(da, untouched));
  CHECK(same_bits(db, untouched));
  CHECK((dh0.array() == 7.0).all());
}

}  // namespace
