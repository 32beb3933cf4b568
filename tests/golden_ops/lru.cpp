// Golden ops s5, lru and lru_init: every form against the same file.
#include "support/golden.hpp"

#include <eigenblocks/ssm/lru.hpp>
#include <eigenblocks/ssm/s5.hpp>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

/// Runs step(first row, rows) over `total` rows in chunks of `size`.
template <class F>
void chunks(Index total, Index size, F&& step) {
  for (Index t = 0; t < total; t += size) step(t, std::min(size, total - t));
}

template <class C, class S = golden::scalar_of<C>>
Matrix<std::complex<S>> complex_matrix(const C& c, const std::string& name) {
  const Matrix<S> re = c.matrix(name + "_re"), im = c.matrix(name + "_im");
  Matrix<std::complex<S>> m(re.rows(), re.cols());
  m.real() = re;
  m.imag() = im;
  return m;
}
template <class C, class S = golden::scalar_of<C>>
Vector<std::complex<S>> complex_vector(const C& c, const std::string& name) {
  return complex_matrix(c, name).row(0).transpose();
}
template <class C, class M>
void expect_complex(C& c, const std::string& name, const M& got) {
  c.expect(name + "_re", got.real().eval());
  c.expect(name + "_im", got.imag().eval());
}

struct S5Op {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const eb::S5Parameters<S> p{complex_vector(c, "in.Lambda"), complex_matrix(c, "in.B"),
                                complex_matrix(c, "in.C"), c.vector("in.D"), c.vector("in.dt")};
    const Matrix<S> u = c.matrix("in.u");
    const std::string disc = c.param("disc");
    if (disc != "zoh" && disc != "bilinear") throw std::runtime_error("unknown disc " + disc);
    const eb::S5Options options{
        .method = disc == "zoh" ? eb::Discretization::zoh : eb::Discretization::bilinear,
        .conj_sym = c.param_flag("conj_sym")};
    Matrix<S> y(u.rows(), u.cols());
    c.form("forward");
    eb::s5_forward(u, p, y, options);
    c.expect("out.y", y);
    for (const Index rows : {Index{1}, Index{3}, Index{9}}) {
      c.form("steps of " + std::to_string(rows));
      auto state = eb::s5_state(p, options);
      chunks(u.rows(), rows,
             [&](Index t, Index n) { eb::s5_step(state, u.middleRows(t, n), y.middleRows(t, n)); });
      c.expect("out.y", y);
    }
    if (!c.has("gout.y")) return;
    c.form("backward");
    Matrix<S> du(u.rows(), u.cols());
    eb::S5Parameters<S> dp;
    eb::s5_backward(u, p, c.matrix("gout.y"), du, dp, options);
    expect_complex(c, "gin.Lambda", dp.lambda);
    expect_complex(c, "gin.B", dp.b);
    expect_complex(c, "gin.C", dp.c);
    c.expect("gin.D", dp.d);
    c.expect("gin.dt", dp.dt);
    c.expect("gin.u", du);
  }
};

struct LruOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const eb::LruParameters<S> p{c.vector("in.nu_log"),     c.vector("in.theta_log"),
                                 c.vector("in.gamma_log"),  complex_matrix(c, "in.B"),
                                 complex_matrix(c, "in.C"), c.vector("in.D")};
    const Matrix<S> u = c.matrix("in.u");
    const Vector<std::complex<S>> h0 = complex_vector(c, "in.h0");
    Vector<std::complex<S>> last;
    Matrix<S> y(u.rows(), u.cols());
    c.form("forward");
    eb::lru_forward(u, p, y, h0, &last);
    c.expect("out.y", y);
    expect_complex(c, "out.hT", last);
    for (const Index rows : {Index{1}, Index{3}, Index{9}}) {
      c.form("steps of " + std::to_string(rows));
      auto state = eb::lru_state(p, h0);
      chunks(u.rows(), rows, [&](Index t, Index n) {
        eb::lru_step(state, u.middleRows(t, n), y.middleRows(t, n));
      });
      c.expect("out.y", y);
      expect_complex(c, "out.hT", state.h);
    }
    const bool has_y = c.has("gout.y"), has_last = c.has("gout.hT_re");
    if (!has_y && !has_last) return;
    c.form("backward");
    const Matrix<S> dy =
        has_y ? c.matrix("gout.y") : Matrix<S>(Matrix<S>::Zero(u.rows(), u.cols()));
    Vector<std::complex<S>> dlast, dh0;
    if (has_last) dlast = complex_vector(c, "gout.hT");
    Matrix<S> du(u.rows(), u.cols());
    eb::LruParameters<S> dp;
    eb::lru_backward(u, p, dy, du, dp, h0, has_last ? &dlast : nullptr, &dh0);
    c.expect("gin.nu_log", dp.nu_log);
    c.expect("gin.theta_log", dp.theta_log);
    c.expect("gin.gamma_log", dp.gamma_log);
    expect_complex(c, "gin.B", dp.b);
    expect_complex(c, "gin.C", dp.c);
    c.expect("gin.D", dp.d);
    expect_complex(c, "gin.h0", dh0);
    c.expect("gin.u", du);
  }
};

struct LruInitOp {
  template <class C>
  void operator()(C& c) const {
    const eb::LruRing ring = eb::lru_init(c.exact("in.u1"), c.exact("in.u2"),
                                          {.r_min = c.param_real("r_min"),
                                           .r_max = c.param_real("r_max"),
                                           .max_phase = c.param_real("max_phase")});
    c.expect("out.nu_log", ring.nu_log);
    c.expect("out.theta_log", ring.theta_log);
    c.expect("out.gamma_log", ring.gamma_log);
  }
};

}  // namespace

void register_lru(golden::Registry& registry) {
  const auto max_norm = golden::Compare::max_norm;
  registry.add("s5", S5Op{}, max_norm);
  registry.add("lru", LruOp{}, max_norm);
  registry.add("lru_init", LruInitOp{}, max_norm);
}
