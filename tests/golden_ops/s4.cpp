// Golden ops of the kernel-based state space models: S4 (s4_kernel, s4_ssm), S4D (s4d_kernel, s4d_ssm, s4d_init) and RTF
// (rtf_kernel, ss_to_tf): kernels, convolution, recurrence in steps of several sizes.
#include "support/golden.hpp"

#include <eigenblocks/ssm/rational.hpp>
#include <eigenblocks/ssm/s4.hpp>
#include <eigenblocks/ssm/s4d.hpp>

#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

template <class C>
using ComplexMatrix = Matrix<std::complex<golden::scalar_of<C>>>;

/// name_re and name_im, rows x cols.
template <class C>
ComplexMatrix<C> complex_in(C& c, const std::string& name, Index rows, Index cols) {
  const auto re = c.vector(name + "_re"), im = c.vector(name + "_im");
  if (re.size() != rows * cols || im.size() != rows * cols)
    throw std::runtime_error("tensor " + name + " does not hold " + std::to_string(rows) + " x " +
                             std::to_string(cols) + " numbers");
  ComplexMatrix<C> out(rows, cols);
  for (Index i = 0; i < out.size(); ++i) out.data()[i] = {re[i], im[i]};
  return out;
}
template <class C, class M>
void expect_complex(C& c, const std::string& name, const M& got) {
  c.expect(name + "_re", got.real());
  c.expect(name + "_im", got.imag());
}
template <class C, class M>
void compare_complex(C& c, const std::string& name, const M& got) {
  if (c.has(name + "_re")) c.expect(name + "_re", got.real());
  if (c.has(name + "_im")) c.expect(name + "_im", got.imag());
}
template <class C, class M>
void compare(C& c, const std::string& name, const M& got) {
  if (c.has(name)) c.expect(name, got);
}

/// lambda, b, c and dt under the names of the files; skip if there is a D.
template <class C, class P>
void load_modes(C& c, P& p) {
  const auto shape = c.shape("in.A_re");
  p.lambda = complex_in(c, "in.A", shape.at(0), shape.at(1));
  p.b = complex_in(c, "in.B", shape.at(0), shape.at(1));
  p.c = complex_in(c, "in.C", shape.at(0), shape.at(1));
  p.dt = c.vector("in.dt");
  if (c.has("in.D")) p.skip = c.vector("in.D");
}
template <class C, class P>
void compare_modes(C& c, const P& dp) {
  compare_complex(c, "gin.A", dp.lambda);
  compare_complex(c, "gin.B", dp.b);
  compare_complex(c, "gin.C", dp.c);
  compare(c, "gin.dt", dp.dt);
  if (dp.skip.size() != 0) compare(c, "gin.D", dp.skip);
}
template <class C>
auto load_s4(C& c) {
  eb::S4Parameters<golden::scalar_of<C>> p;
  load_modes(c, p);
  const Index rank = c.shape("in.P_re").at(0);
  p.p = complex_in(c, "in.P", rank * p.channels(), p.modes());
  return p;
}

template <class C>
eb::S4dOptions s4d_options(C& c) {
  const std::string disc = c.param("disc");
  if (disc == "zoh") return {.discretization = eb::Discretization::zoh};
  if (disc == "bilinear") return {.discretization = eb::Discretization::bilinear};
  throw std::runtime_error("unknown disc " + disc);
}

/// Upstream gradients of y and xT, zeros where the file has none; false if it has neither.
template <class C>
bool load_upstream(C& c, Index rows, Index channels, Index modes, Matrix<golden::scalar_of<C>>& dy,
                   ComplexMatrix<C>& dxt) {
  const bool has_y = c.has("gout.y"), has_x = c.has("gout.xT_re") || c.has("gout.xT_im");
  dy.setZero(rows, channels);
  dxt.setZero(channels, modes);
  if (has_y) dy = c.matrix("gout.y");
  if (has_x) dxt = complex_in(c, "gout.xT", channels, modes);
  return has_y || has_x;
}

/// y and xT by steps of `rows` rows; state is a copy made for it, step advances it.
template <class C, class State, class F>
void expect_steps(C& c, State state, const Matrix<golden::scalar_of<C>>& u, Index rows, F&& step) {
  c.form("steps of " + std::to_string(rows));
  Matrix<golden::scalar_of<C>> y(u.rows(), u.cols());
  for (Index t = 0; t < u.rows(); t += rows) {
    const Index n = std::min(rows, u.rows() - t);
    if (t > 0) state = State(state);  // a snapshot goes on like the original
    step(state, u.middleRows(t, n), y.middleRows(t, n));
  }
  c.expect("out.y", y);
  expect_complex(c, "out.xT", state.value());
}
constexpr Index kSteps[] = {1, 2, 3, 5, 1000};

struct S4dKernelOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    eb::S4dParameters<S> p, dp;
    load_modes(c, p);
    const eb::S4dOptions options = s4d_options(c);
    const Index length = c.param_int("L");
    c.form("kernel");
    c.expect("out.K", eb::s4d_kernel(p, length, options));
    c.form("impulse response");
    Matrix<S> u = Matrix<S>::Zero(length, p.channels()), y = u;
    u.row(0).setOnes();
    auto state = eb::s4d_state(p, options);
    eb::s4d_step(state, u, y);
    c.expect("out.K", y);
    if (!c.has("gout.K")) return;
    c.form("kernel");
    eb::s4d_kernel_backward(p, c.matrix("gout.K"), dp, options);
    compare_modes(c, dp);
  }
};

struct S4dSsmOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    eb::S4dParameters<S> p, dp;
    load_modes(c, p);
    const eb::S4dOptions options = s4d_options(c);
    const Matrix<S> u = c.matrix("in.u");
    const ComplexMatrix<C> x0 = complex_in(c, "in.x0", p.channels(), p.modes());
    c.form("convolution");
    eb::KernelLayerSaved<S> saved;
    Matrix<S> y(u.rows(), u.cols()), dy, du = y;
    ComplexMatrix<C> xt, dxt, dx0;
    eb::s4d_forward(saved, p, u, y, options, &x0, &xt);
    c.expect("out.y", y);
    expect_complex(c, "out.xT", xt);
    if (load_upstream(c, u.rows(), p.channels(), p.modes(), dy, dxt)) {
      eb::s4d_backward(saved, p, u, dy, du, dp, options, &x0, &dxt, &dx0);
      compare_modes(c, dp);
      compare(c, "gin.u", du);
      compare_complex(c, "gin.x0", dx0);
    }
    for (const Index rows : kSteps) {
      expect_steps(c, eb::s4d_state(p, options, &x0), u, rows,
                   [](auto& state, const auto& in, auto&& out) { eb::s4d_step(state, in, out); });
    }
  }
};

struct S4KernelOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const eb::S4Parameters<S> p = load_s4(c);
    const Index length = c.param_int("L");
    const std::string mode = c.param("c_mode");
    if (mode != "tilde" && mode != "true") throw std::runtime_error("unknown c_mode " + mode);
    const bool plain = mode == "true";
    const eb::S4Options options{.output = plain ? eb::S4Output::plain : eb::S4Output::truncated};
    c.form("kernel");
    c.expect("out.K", eb::s4_kernel(p, length, options));
    if constexpr (std::is_same_v<S, double>) {
      c.form("powers");
      c.expect("out.K", eb::s4_kernel_reference(p, length, options));
    }
    eb::S4Parameters<S> decode = p;
    bool reliable = true;
    if (!plain) {
      auto c_of = eb::s4_untruncate(p, length);
      decode.c = c_of.c;
      reliable = c_of.reliable && (std::is_same_v<S, double> || c_of.rcond.minCoeff() > 1e-2);
    }
    if (reliable) {
      c.form("impulse response");
      Matrix<S> u = Matrix<S>::Zero(length, p.channels()), y = u;
      u.row(0).setOnes();
      auto state = eb::s4_state(decode);
      eb::s4_step(state, u, y);
      c.expect("out.K", y);
    }
    if (!c.has("gout.K")) return;
    c.form("kernel");
    eb::S4Parameters<S> dp;
    eb::s4_kernel_backward(p, c.matrix("gout.K"), dp, options);
    compare_modes(c, dp);
    compare_complex(c, "gin.P", dp.p);
  }
};

struct S4SsmOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const eb::S4Parameters<S> p = load_s4(c);
    const Matrix<S> u = c.matrix("in.u");
    const ComplexMatrix<C> x0 = complex_in(c, "in.x0", p.channels(), p.modes());
    const auto step = [](auto& state, const auto& in, auto&& out) { eb::s4_step(state, in, out); };
    for (const Index rows : kSteps) expect_steps(c, eb::s4_state(p, &x0), u, rows, step);
    c.form("convolution");  // the response to u by the kernel, that to x0 by steps without input
    eb::KernelLayerSaved<S> saved;
    Matrix<S> y(u.rows(), u.cols()), free(u.rows(), u.cols()), dy, du = y;
    eb::s4_forward(saved, p, u, y, {.output = eb::S4Output::plain});
    auto state = eb::s4_state(p, &x0);
    eb::s4_step(state, Matrix<S>::Zero(u.rows(), u.cols()).eval(), free);
    c.expect("out.y", (y + free).eval());
    ComplexMatrix<C> dxt, dx0;
    if (!load_upstream(c, u.rows(), p.channels(), p.modes(), dy, dxt)) return;
    c.form("recurrence");
    eb::S4Parameters<S> dp;
    eb::s4_recurrent_backward(p, u, dy, du, dp, &x0, &dxt, &dx0);
    compare_modes(c, dp);
    compare_complex(c, "gin.P", dp.p);
    compare(c, "gin.u", du);
    compare_complex(c, "gin.x0", dx0);
  }
};

struct S4dInitOp {
  template <class C>
  void operator()(C& c) const {
    constexpr struct {
      const char* name;
      eb::S4dInit init;
    } kInits[] = {{"lin", eb::S4dInit::lin},   {"inv", eb::S4dInit::inv},
                  {"inv2", eb::S4dInit::inv2}, {"quad", eb::S4dInit::quad},
                  {"real", eb::S4dInit::real}, {"legs", eb::S4dInit::legs}};
    const std::string wanted = c.param("init");
    for (const auto& entry : kInits) {
      if (wanted == entry.name)
        return expect_complex(c, "out.A", eb::s4d_modes(entry.init, c.param_int("N")));
    }
    throw std::runtime_error("unknown init " + wanted);
  }
};

struct RtfKernelOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const std::string form = c.param("form");
    eb::RationalOptions options;
    if (form == "proper_true") {
      options.form = eb::RationalForm::proper_true;
    } else if (form == "delayed") {
      options.form = eb::RationalForm::delayed;
    } else if (form != "proper") {
      throw std::runtime_error("unknown form " + form);
    }
    const eb::RationalParameters<S> p{
        .a = c.matrix("in.a"), .b = c.matrix("in.b"), .h0 = c.vector("in.h0")};
    const Index length = c.param_int("L");
    c.form("kernel");
    const Matrix<S> kernel = eb::rational_kernel(p, length, options);
    c.expect("out.k", kernel);
    c.expect("out.C", eb::rational_output(p, length, options));
    c.form("impulse response");
    Matrix<S> u = Matrix<S>::Zero(length, p.channels()), y = u;
    u.row(0).setOnes();
    auto state = eb::rational_state(p, length, options);
    eb::rational_step(state, u, y);
    if (form == "delayed") y.row(0) = kernel.row(0);  // the alias, which the recurrence has not
    c.expect("out.k", y);
    if (!c.has("gout.k")) return;
    c.form("kernel");
    eb::RationalParameters<S> dp;
    eb::rational_kernel_backward(p, c.matrix("gout.k"), dp, options);
    compare(c, "gin.a", dp.a);
    compare(c, "gin.b", dp.b);
    compare(c, "gin.h0", dp.h0);
  }
};

struct SsToTfOp {
  void operator()(golden::Case<double>& c) const {
    const eb::TransferFunction tf =
        eb::ss_to_tf(c.matrix("in.A"), c.vector("in.B"), c.vector("in.C"));
    c.expect("out.a", tf.a);
    c.expect("out.b", tf.b);
  }
};

}  // namespace

void register_s4(golden::Registry& registry) {
  constexpr auto norm = golden::Compare::max_norm;
  registry.add("s4_kernel", S4KernelOp{}, norm);
  registry.add("s4_ssm", S4SsmOp{}, norm);
  registry.add("s4d_kernel", S4dKernelOp{}, norm);
  registry.add("s4d_ssm", S4dSsmOp{}, norm);
  registry.add_double("s4d_init", "initial values are computed in double", S4dInitOp{}, norm);
  registry.add("rtf_kernel", RtfKernelOp{}, norm);
  registry.add_double("ss_to_tf", "the conversion is done in double", SsToTfOp{}, norm);
}
