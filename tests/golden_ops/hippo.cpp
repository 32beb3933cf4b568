// Golden ops of the HiPPO family: hippo_matrix, hippo_reconstruct, discretize, nplr, legs_structured, legs_online, lti_scan.
#include "support/golden.hpp"

#include <eigenblocks/ssm/basis.hpp>
#include <eigenblocks/ssm/discretize.hpp>
#include <eigenblocks/ssm/hippo.hpp>
#include <eigenblocks/ssm/legs.hpp>
#include <eigenblocks/ssm/nplr.hpp>
#include <eigenblocks/ssm/recurrence.hpp>

#include <algorithm>
#include <cmath>
#include <complex>
#include <stdexcept>
#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

using Double = golden::Case<double>;

eb::Discretization discretization(const std::string& name) {
  if (name == "forward") return eb::Discretization::forward;
  if (name == "backward") return eb::Discretization::backward;
  if (name == "bilinear") return eb::Discretization::bilinear;
  if (name == "gbt") return eb::Discretization::gbt;
  if (name == "zoh") return eb::Discretization::zoh;
  throw std::runtime_error("unknown method " + name);
}

void hippo_matrix_op(Double& c) {
  const eb::HippoMeasure measure = eb::hippo_measure(c.param("measure"));
  eb::HippoOptions options{.alpha = c.param_real("alpha", 0.0)};
  if (c.has_param("beta")) options.beta = c.param_real("beta");
  const Index n = c.param_int("N");
  const eb::Hippo hippo = eb::hippo_matrix(measure, n, options);
  c.expect("out.A", hippo.a);
  c.expect("out.B", hippo.b);
  if (c.has("out.P")) c.expect("out.P", hippo.p);
  const double own = eb::hippo_window(measure);
  if (!std::isfinite(own)) return;
  c.form("another window");
  options.window = 4 * own;
  const eb::Hippo wide = eb::hippo_matrix(measure, n, options);
  c.expect("out.A", 4 * wide.a);
  c.expect("out.B", 4 * wide.b);
  if (c.has("out.P")) c.expect("out.P", 2 * wide.p);
}

struct ReconstructOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const eb::HippoMeasure measure = eb::hippo_measure(c.param("measure"));
    const Vector<double> points = c.exact("in.s");
    const Matrix<S> coefficients = c.matrix("in.c").transpose();
    const Index n = c.param_int("N");
    if (coefficients.rows() != n) throw std::runtime_error("in.c does not hold N entries");
    const Matrix<double> e = eb::hippo_basis(measure, n, points);
    c.expect("out.E", e);
    c.form("without E");
    Matrix<S> f(points.size(), 1);
    eb::hippo_reconstruct(measure, points, coefficients, f);
    c.expect("out.f", f);
    c.form("columns of E by the adjoint");
    Matrix<S> rows(points.size(), n);
    for (Index i = 0; i < points.size(); ++i) {
      Matrix<S> unit = Matrix<S>::Zero(points.size(), 1), row(n, 1);
      unit(i, 0) = 1;
      eb::hippo_reconstruct_backward(measure, points, unit, row);
      rows.row(i) = row.transpose();
    }
    c.expect("out.E", rows);
    if (!c.has("gout.f")) return;
    Matrix<S> dc(n, 1);
    eb::hippo_reconstruct_backward(measure, points, Matrix<S>(c.matrix("gout.f").transpose()), dc);
    if (c.has("gin.c")) c.expect("gin.c", dc);
  }
};

/// [n] as a column, [n, m] as it is.
Matrix<double> columns(Double& c, const std::string& name) {
  const Matrix<double> m = c.matrix(name);
  return c.shape(name).size() == 1 ? Matrix<double>(m.transpose()) : m;
}

void discretize_op(Double& c) {
  const std::string name = c.param("method");
  const double alpha = c.param_real("alpha", 0.5);
  const Matrix<double> a = c.matrix("in.A"), b = columns(c, "in.B");
  const double dt = c.matrix("in.dt")(0, 0);
  const auto run = [&](const eb::DiscretizeOptions& options) {
    const eb::Discretized d = eb::discretize(a, b, dt, options);
    c.expect("out.Abar", d.a);
    c.expect("out.Bbar", d.b);
    if (!c.has("gout.Abar") && !c.has("gout.Bbar")) return;
    const Matrix<double> ga = c.has("gout.Abar") ? c.matrix("gout.Abar") : Matrix<double>(0 * a);
    const Matrix<double> gb = c.has("gout.Bbar") ? columns(c, "gout.Bbar") : Matrix<double>(0 * b);
    Matrix<double> da(a.rows(), a.cols()), db(b.rows(), b.cols());
    double ddt = 0;
    eb::discretize_backward(a, b, dt, ga, gb, da, db, ddt, options);
    if (c.has("gin.A")) c.expect("gin.A", da);
    if (c.has("gin.B")) c.expect("gin.B", db);
    if (c.has("gin.dt")) c.expect("gin.dt", ddt);
  };
  const eb::Discretization method = discretization(name);
  if (method == eb::Discretization::gbt) return run({.method = method, .alpha = alpha});
  run({.method = method});
  if (method == eb::Discretization::zoh) return;
  c.form("as gbt");
  run({.method = eb::Discretization::gbt,
       .alpha = method == eb::Discretization::forward    ? 0.0
                : method == eb::Discretization::backward ? 1.0
                                                         : 0.5});
}

void nplr_op(Double& c) {
  const Index rank = c.param_int("rank");
  const eb::Nplr f = eb::nplr(eb::hippo_measure(c.param("measure")), c.param_int("N"), rank);
  const auto expect = [&](const std::string& name, const Matrix<std::complex<double>>& got) {
    c.expect("out." + name + "_re", Matrix<double>(got.real()));
    c.expect("out." + name + "_im", Matrix<double>(got.imag()));
  };
  expect("Lambda", f.lambda.transpose());
  Matrix<std::complex<double>> pp(rank * rank, f.lambda.size()), pb(rank, f.lambda.size());
  for (Index r = 0; r < rank; ++r) {
    for (Index s = 0; s < rank; ++s)
      pp.row(r * rank + s) = f.p.row(r).cwiseProduct(f.p.row(s).conjugate());
    pb.row(r) = f.p.row(r).conjugate().cwiseProduct(f.b.transpose());
  }
  expect("PP", pp);
  expect("PB", pb);
  c.expect("out.BB", Vector<double>(f.b.cwiseAbs2()));
  if (c.has("out.P_abs")) c.expect("out.P_abs", Matrix<double>(f.p.cwiseAbs()));
  if (c.has("out.B_abs")) c.expect("out.B_abs", Vector<double>(f.b.cwiseAbs()));
}

struct LegsStructuredOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Matrix<S> rows = c.matrix("in.v"), v = rows.transpose();
    const double lambda = c.param_real("lambda");
    if (v.rows() != c.param_int("N")) throw std::runtime_error("in.v does not have N columns");
    // Once with the channels of the file, once with enough of them to fill every kind of lane group.
    const Index copies = 1 + 77 / std::max<Index>(1, v.cols());
    for (const Index times : {Index{1}, copies}) {
      c.form(std::to_string(times) + " copies");
      const Matrix<S> many = v.replicate(1, times);
      const auto check = [&](const char* name, auto&& f) {
        Matrix<S> out(many.rows(), many.cols());
        f(many, out);
        for (const Index copy : {Index{0}, times / 2, times - 1})
          c.expect(name, Matrix<S>(out.middleCols(copy * v.cols(), v.cols()).transpose()));
      };
      check("out.mul", [&](auto& x, auto& y) { eb::legs_multiply(x, y, lambda); });
      check("out.mul_t", [&](auto& x, auto& y) { eb::legs_multiply_transposed(x, y, lambda); });
      check("out.solve", [&](auto& x, auto& y) { eb::legs_solve(x, y, lambda); });
      check("out.solve_t", [&](auto& x, auto& y) { eb::legs_solve_transposed(x, y, lambda); });
      check("out.solve", [&](auto& x, auto& y) {
        y = x;
        eb::legs_solve(y, y, lambda);
      });
    }
  }
};

template <class C>
class LegsOnlineCase {
  using S = golden::scalar_of<C>;

 public:
  explicit LegsOnlineCase(C& c) : c_(c), u_(c.matrix("in.u").transpose()) {
    options_ = {.states = c.param_int("N"), .method = discretization(c.param("method"))};
    if (c.has_param("alpha")) {
      const double alpha = c.param_real("alpha");
      if (options_.method == eb::Discretization::gbt) options_.alpha = alpha;
    }
    const std::string timing = c.param("timing", "paper");
    if (timing == "code") {
      options_.timing = eb::LegsTiming::code;
    } else if (timing == "consistent") {
      options_.timing = eb::LegsTiming::consistent;
    } else if (timing != "paper") {
      throw std::runtime_error("unknown timing " + timing);
    }
  }

  void run() {
    for (const Index channels : {Index{1}, Index{71}}) {
      c_.form(std::to_string(channels) + " channels");
      const Matrix<S> u = u_.replicate(1, channels);
      Matrix<S> last(n(), channels), states(u.rows(), n() * channels);
      eb::legs_forward(u, last, options_, &states);
      c_.expect("out.c", channel(states, channels, channels - 1));
      if (c_.has("gout.c")) {
        const Matrix<S> g = c_.matrix("gout.c");
        Matrix<S> all(u.rows(), n() * channels), du(u.rows(), channels);
        for (Index j = 0; j < all.cols(); ++j) all.col(j) = g.col(j / channels);
        eb::legs_backward(nullptr, &all, du, options_);
        c_.expect("gin.u", Matrix<S>(du.rightCols(1)));
      }
    }
    for (const Index rows : {Index{1}, Index{3}}) {
      c_.form("steps of " + std::to_string(rows));
      auto memory = eb::legs_memory<S>(options_, 1);
      Matrix<S> states(u_.rows(), n());
      for (Index t = 0; t < u_.rows(); t += rows) {
        const Index m = std::min(rows, u_.rows() - t);
        Matrix<S> part(m, n());
        eb::legs_step(memory, u_.middleRows(t, m), &part);
        states.middleRows(t, m) = part;
      }
      c_.expect("out.c", states);
    }
    if (options_.method == eb::Discretization::zoh && options_.timing != eb::LegsTiming::code) {
      c_.form("projection");
      Matrix<S> states(u_.rows(), n()), last(n(), 1);
      for (Index t = 0; t < u_.rows(); ++t) {
        eb::legs_project(u_.topRows(t + 1), last);
        states.row(t) = last.transpose();
      }
      c_.expect("out.c", states);
    }
  }

 private:
  Index n() const { return options_.states; }
  Matrix<S> channel(const Matrix<S>& states, Index channels, Index h) const {
    Matrix<S> one(states.rows(), n());
    for (Index i = 0; i < n(); ++i) one.col(i) = states.col(i * channels + h);
    return one;
  }

  C& c_;
  Matrix<S> u_;
  eb::LegsOptions options_;
};

struct LegsOnlineOp {
  template <class C>
  void operator()(C& c) const {
    LegsOnlineCase<C>(c).run();
  }
};

struct LtiScanOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const std::string name = c.param("output");
    if (name != "post" && name != "pre") throw std::runtime_error("unknown output " + name);
    const eb::LtiOptions options{name == "post" ? eb::LtiOutput::post : eb::LtiOutput::pre};
    const eb::LtiSystem<S> system{c.matrix("in.Abar"), c.matrix("in.Bbar"), c.matrix("in.C"),
                                  c.matrix("in.D")};
    const Matrix<S> u = c.matrix("in.u"), x0 = c.matrix("in.x0");
    Matrix<S> y(u.rows(), system.outputs()), xt(1, system.states());
    eb::lti_forward(system, u, y, options, &x0, &xt);
    c.expect("out.y", y);
    c.expect("out.xT", xt);
    for (const Index rows : {Index{1}, Index{3}}) {
      c.form("steps of " + std::to_string(rows));
      auto state = eb::lti_state(system, options, &x0);
      y.setZero();
      for (Index t = 0; t < u.rows(); t += rows) {
        const Index m = std::min(rows, u.rows() - t);
        eb::lti_step(system, state, u.middleRows(t, m), y.middleRows(t, m));
      }
      c.expect("out.y", y);
      c.expect("out.xT", state.x);
    }
    c.form("backward");
    if (!c.has("gout.y") && !c.has("gout.xT")) return;
    const Matrix<S> dy = c.has("gout.y") ? c.matrix("gout.y") : Matrix<S>(0 * y);
    const Matrix<S> dxt = c.has("gout.xT") ? c.matrix("gout.xT") : Matrix<S>(0 * xt);
    Matrix<S> du(u.rows(), u.cols()), dx0(1, system.states());
    eb::LtiSystem<S> d;
    eb::lti_backward(system, u, dy, du, d, options, &x0, &dxt, &dx0);
    const auto compare = [&](const char* tensor, const Matrix<S>& got) {
      if (c.has(tensor)) c.expect(tensor, got);
    };
    compare("gin.Abar", d.a);
    compare("gin.Bbar", d.b);
    compare("gin.C", d.c);
    compare("gin.D", d.d);
    compare("gin.u", du);
    compare("gin.x0", dx0);
  }
};

}  // namespace

void register_hippo(golden::Registry& registry) {
  constexpr auto kNorm = golden::Compare::max_norm;
  const std::string once = "matrices that are made once, in double";
  registry.add_double("hippo_matrix", once, hippo_matrix_op, kNorm);
  registry.add("hippo_reconstruct", ReconstructOp{}, kNorm);
  registry.add_double("discretize", once, discretize_op, kNorm);
  registry.add_double("nplr", once, nplr_op, kNorm);
  registry.add("legs_structured", LegsStructuredOp{}, kNorm);
  registry.add("legs_online", LegsOnlineOp{}, kNorm);
  registry.add("lti_scan", LtiScanOp{}, kNorm);
}
