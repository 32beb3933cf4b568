// Golden ops scan_diag, scan_diag_complex and scan_dense: in order, in chunks, step by step, by a user's operator.
#include "support/golden.hpp"

#include <eigenblocks/core/scan.hpp>

#include <algorithm>
#include <complex>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::ScanOptions;
using eb::Vector;

constexpr Index kChunks[] = {0, 1, 2, 3, 5};

/// Tensors of real numbers, or pairs of tensors `name_re`, `name_im`.
template <class S, class C>
Matrix<S> load(const C& c, const std::string& name) {
  if constexpr (eb::ComplexScalar<S>) {
    const auto re = c.matrix(name + "_re"), im = c.matrix(name + "_im");
    Matrix<S> z(re.rows(), re.cols());
    z.real() = re;
    z.imag() = im;
    return z;
  } else {
    return c.matrix(name);
  }
}
template <class S>
std::string probe(const std::string& name) {
  return eb::ComplexScalar<S> ? name + "_re" : name;
}
template <class C, class S>
void compare(C& c, const std::string& name, const Matrix<S>& got) {
  if constexpr (eb::ComplexScalar<S>) {
    using R = eb::real_t<S>;
    c.expect(name + "_re", Matrix<R>(got.real()));
    c.expect(name + "_im", Matrix<R>(got.imag()));
  } else {
    c.expect(name, got);
  }
}

template <class S>
struct DiagonalCase {
  Matrix<S> a, b;
  Vector<S> h0;
  ScanOptions options;

  template <class C>
  void run(C& c) {
    for (const Index chunk : kChunks) {
      options.time_chunk = chunk;
      c.form("chunk " + std::to_string(chunk));
      Matrix<S> h(b.rows(), b.cols());
      eb::scan_forward(a, b, h, h0, options);
      compare(c, "out.h", h);
      if (c.has(probe<S>("gout.h"))) backward(c, h);
    }
    options.time_chunk = 0;
    c.form("in place");
    Matrix<S> h = b;
    eb::scan_forward(a, h, h, h0, options);
    compare(c, "out.h", h);
    if constexpr (std::is_same_v<eb::real_t<S>, float>) {
      c.form("wide");
      options.wide = true;
      eb::scan_forward(a, b, h, h0, options);
      compare(c, "out.h", h);
      if (c.has(probe<S>("gout.h"))) backward(c, h);
      options.wide = false;
    }
    for (const Index rows : {Index(1), Index(3)}) {
      c.form("steps of " + std::to_string(rows));
      compare(c, "out.h", steps(rows));
    }
    if constexpr (!eb::ComplexScalar<S>) {
      c.form("user operator");
      compare(c, "out.h", by_operator());
    }
  }

  template <class C>
  void backward(C& c, const Matrix<S>& h) {
    const Matrix<S> dh = load<S>(c, "gout.h");
    Matrix<S> da(a.rows(), a.cols()), db = dh, dh0(1, h0.size());
    eb::scan_backward(a, h, db, da, db, dh0.row(0), h0, options);
    compare(c, "gin.a", da);
    compare(c, "gin.b", db);
    compare(c, "gin.h0", dh0);
  }

  Matrix<S> steps(Index rows) const {
    Matrix<S> h(b.rows(), b.cols());
    Vector<S> state = h0;
    for (Index done = 0; done < b.rows(); done += rows) {
      const Index n = std::min(rows, b.rows() - done);
      const Index at = options.reverse ? b.rows() - done - n : done;
      eb::scan_forward(a.middleRows(at, n), b.middleRows(at, n), h.middleRows(at, n), state,
                       options);
      state = h.row(options.reverse ? at : at + n - 1).transpose();
    }
    return h;
  }

  Matrix<S> by_operator() const {
    struct Affine {
      Eigen::Array<S, Eigen::Dynamic, 1> a, b;
    };
    std::vector<Affine> items;
    for (Index t = 0; t < b.rows(); ++t) items.push_back({a.row(t).array(), b.row(t).array()});
    eb::associative_scan(std::span(items),
                         [](const Affine& first, const Affine& then) {
                           return Affine{then.a * first.a, then.a * first.b + then.b};
                         },
                         {.reverse = options.reverse, .chunk = 2});
    Matrix<S> h(b.rows(), b.cols());
    for (Index t = 0; t < b.rows(); ++t) {
      const Affine& map = items[static_cast<std::size_t>(t)];
      h.row(t) = (map.a * h0.array() + map.b).matrix().transpose();
    }
    return h;
  }
};

template <class S, class C>
void run_diagonal(C& c) {
  DiagonalCase<S> test{load<S>(c, "in.a"),
                       load<S>(c, "in.b"),
                       load<S>(c, "in.h0").row(0).transpose(),
                       {.reverse = c.param_flag("reverse", false)}};
  test.run(c);
}

struct DiagonalOp {
  template <class C>
  void operator()(C& c) const {
    run_diagonal<golden::scalar_of<C>>(c);
  }
};
struct ComplexOp {
  template <class C>
  void operator()(C& c) const {
    run_diagonal<std::complex<golden::scalar_of<C>>>(c);
  }
};

struct DenseOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Matrix<S> b = c.matrix("in.b"), flat = c.matrix("in.A");
    const Vector<S> x0 = c.vector("in.x0");
    const Index rows = b.rows(), n = b.cols();
    const Matrix<S> a = Eigen::Map<const Matrix<S>>(flat.data(), rows * n, n);
    ScanOptions options{.reverse = c.param_flag("reverse", false)};
    Matrix<S> x(rows, n);
    for (const Index chunk : kChunks) {
      options.time_chunk = chunk;
      c.form("chunk " + std::to_string(chunk));
      eb::scan_dense_forward(a, b, x, x0, options);
      c.expect("out.x", x);
      if (!c.has("gout.x")) continue;
      Matrix<S> da(a.rows(), n), db = c.matrix("gout.x");
      Vector<S> dx0(n);
      eb::scan_dense_backward(a, x, db, da, db, dx0, x0, options);
      c.expect("gin.A", da);
      c.expect("gin.b", db);
      c.expect("gin.x0", dx0);
    }
    options.time_chunk = 0;
    c.form("in place");
    x = b;
    eb::scan_dense_forward(a, x, x, x0, options);
    c.expect("out.x", x);
    c.form("steps of 2");
    Vector<S> state = x0;
    for (Index done = 0; done < rows; done += 2) {
      const Index m = std::min<Index>(2, rows - done),
                  at = options.reverse ? rows - done - m : done;
      eb::scan_dense_forward(a.middleRows(at * n, m * n), b.middleRows(at, m), x.middleRows(at, m),
                             state, options);
      state = x.row(options.reverse ? at : at + m - 1).transpose();
    }
    c.expect("out.x", x);
  }
};

}  // namespace

void register_scan(golden::Registry& registry) {
  constexpr auto kNorm = golden::Compare::max_norm;
  registry.add("scan_diag", DiagonalOp{}, kNorm);
  registry.add("scan_diag_complex", ComplexOp{}, kNorm);
  registry.add("scan_dense", DenseOp{}, kNorm);
}
