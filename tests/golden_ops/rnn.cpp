// Golden ops rnn_tanh, gru, deer_rnn_tanh, deer_gru and elk_rnn_tanh: every form against the same file.
#include "support/golden.hpp"

#include <eigenblocks/ssm/deer.hpp>
#include <eigenblocks/ssm/gru.hpp>
#include <eigenblocks/ssm/rnn.hpp>

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

eb::DeerMethod deer_method(const std::string& name) {
  if (name == "newton") return eb::DeerMethod::newton;
  if (name == "quasi") return eb::DeerMethod::quasi;
  if (name == "su_const") return eb::DeerMethod::su_const;
  if (name == "jacobi") return eb::DeerMethod::jacobi;
  throw std::runtime_error("unknown method " + name);
}

eb::GruOptions gru_options(const std::string& variant) {
  if (variant == "reset_after") return {.variant = eb::GruVariant::reset_after};
  if (variant == "reset_before") return {.variant = eb::GruVariant::reset_before};
  throw std::runtime_error("unknown variant " + variant);
}

/// A fixed point found by sweeps: as tight as the scalar allows, and never by falling back.
template <class S>
eb::DeerOptions tight(eb::DeerMethod method, Index rows) {
  const bool wide = std::is_same_v<S, double>;
  return {.method = method,
          .atol = wide ? 1e-13 : 1e-6,
          .rtol = wide ? 1e-13 : 1e-6,
          .max_sweeps = rows + 20,
          .patience = rows + 20,
          .fallback = false};
}

constexpr struct {
  const char* name;
  eb::DeerMethod method;
} kMethods[] = {{"newton", eb::DeerMethod::newton},
                {"quasi", eb::DeerMethod::quasi},
                {"su_const", eb::DeerMethod::su_const},
                {"jacobi", eb::DeerMethod::jacobi}};

template <class C, class S>
void require_found(const C& name, const eb::DeerStatus& status, S) {
  if (!status.converged) throw std::runtime_error(std::string(name) + " did not converge");
}

// ---- rnn_tanh ------------------------------------------------------------------------------------

struct RnnTanhOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Matrix<S> w = c.matrix("in.W"), u = c.matrix("in.u");
    const Vector<S> x0 = c.vector("in.x0");
    const bool has_gradient = c.has("gout.x");
    const Matrix<S> dx = has_gradient ? c.matrix("gout.x") : Matrix<S>();
    Matrix<S> x(u.rows(), u.cols()), du(u.rows(), u.cols()), dw(w.rows(), w.cols());
    Vector<S> dx0(x0.size());
    const auto compare = [&] {
      c.expect("gin.W", dw);
      c.expect("gin.u", du);
      c.expect("gin.x0", dx0);
    };

    c.form("sequential");
    eb::rnn_tanh_forward(u, w, x0, x);
    c.expect("out.x", x);
    if (has_gradient) {
      c.form("through time");
      eb::rnn_tanh_backward(w, x0, x, dx, du, dw, dx0);
      compare();
    }
    for (const Index rows : {Index{1}, Index{3}}) {
      c.form("steps of " + std::to_string(rows));
      auto state = eb::rnn_tanh_state<S>(w.rows());
      state.x = x0;
      chunks(u.rows(), rows, [&](Index t, Index n) {
        eb::rnn_tanh_step(state, w, u.middleRows(t, n), x.middleRows(t, n));
      });
      c.expect("out.x", x);
    }
    const auto cell = eb::tanh_cell(w);
    for (const auto& [name, method] : kMethods) {
      c.form(std::string("deer ") + name);
      require_found(name, eb::deer_forward(cell, u, x0, x, tight<S>(method, u.rows())), S{});
      c.expect("out.x", x);
      if (!has_gradient) continue;
      Matrix<S> lambda(x.rows(), x.cols());
      eb::deer_adjoint(cell, u, x0, x, dx, lambda, dx0);
      eb::rnn_tanh_parameter_gradients(x0, x, lambda, du, dw);
      compare();
    }
  }
};

struct DeerRnnTanhOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Matrix<S> w = c.matrix("in.W"), u = c.matrix("in.u");
    const Vector<S> x0 = c.vector("in.x0");
    Matrix<S> x = c.matrix("in.guess");
    const auto residuals = eb::deer_sweeps(eb::tanh_cell(w), u, x0, x, c.param_int("iters"),
                                           {.method = deer_method(c.param("method"))});
    c.expect("out.x", x);
    c.expect("out.res", Eigen::Map<const Vector<double>>(residuals.data(),
                                                         static_cast<Index>(residuals.size())));
  }
};

struct ElkRnnTanhOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Matrix<S> w = c.matrix("in.W"), u = c.matrix("in.u");
    const Vector<S> x0 = c.vector("in.x0");
    Matrix<S> x = c.matrix("in.guess");
    const bool quasi = c.param_flag("quasi");
    eb::deer_sweeps(eb::tanh_cell(w), u, x0, x, c.param_int("iters"),
                    {.method = quasi ? eb::DeerMethod::quasi : eb::DeerMethod::newton,
                     .observation_variance = c.param_real("sigmasq")});
    c.expect("out.x", x);
  }
};

// ---- gru -----------------------------------------------------------------------------------------

template <class C, class S = golden::scalar_of<C>>
eb::GruWeights<S> gru_weights(const C& c) {
  return {c.matrix("in.W_ih"), c.matrix("in.W_hh"), c.vector("in.b_ih"), c.vector("in.b_hh")};
}

struct GruOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Matrix<S> x = c.matrix("in.x");
    const eb::GruWeights<S> w = gru_weights(c);
    const Vector<S> h0 = c.vector("in.h0");
    const eb::GruOptions options = gru_options(c.param("variant"));
    const bool has_gradient = c.has("gout.h");
    const Matrix<S> dh = has_gradient ? c.matrix("gout.h") : Matrix<S>();
    Matrix<S> h(x.rows(), w.size()), dx(x.rows(), x.cols());
    Vector<S> dh0(w.size());
    auto dw = eb::gru_zeros<S>(x.cols(), w.size());
    const auto compare = [&] {
      c.expect("gin.x", dx);
      c.expect("gin.W_ih", dw.input);
      c.expect("gin.W_hh", dw.hidden);
      c.expect("gin.b_ih", dw.input_bias);
      c.expect("gin.b_hh", dw.hidden_bias);
      c.expect("gin.h0", dh0);
    };

    c.form("sequential");
    eb::gru_forward(x, w, h0, h, options);
    c.expect("out.h", h);
    if (has_gradient) {
      c.form("through time");
      eb::gru_backward(x, w, h0, h, dh, dx, dw, dh0, options);
      compare();
    }
    for (const Index rows : {Index{1}, Index{3}, Index{9}}) {
      c.form("steps of " + std::to_string(rows));
      auto state = eb::gru_state(w);
      state.h = h0;
      chunks(x.rows(), rows, [&](Index t, Index n) {
        eb::gru_step(state, w, x.middleRows(t, n), h.middleRows(t, n), options);
      });
      c.expect("out.h", h);
    }
    const auto cell = eb::gru_cell(w, options);
    const Matrix<S> gates = eb::gru_inputs(x, w);
    for (const auto& [name, method] : kMethods) {
      c.form(std::string("deer ") + name);
      require_found(name, eb::deer_forward(cell, gates, h0, h, tight<S>(method, x.rows())), S{});
      c.expect("out.h", h);
      if (!has_gradient) continue;
      Matrix<S> lambda(h.rows(), h.cols());
      eb::deer_adjoint(cell, gates, h0, h, dh, lambda, dh0);
      eb::gru_parameter_gradients(x, w, h0, h, lambda, dx, dw, options);
      compare();
    }
  }
};

struct DeerGruOp {
  template <class C>
  void operator()(C& c) const {
    using S = golden::scalar_of<C>;
    const Matrix<S> x = c.matrix("in.x");
    const eb::GruWeights<S> w = gru_weights(c);
    const Vector<S> h0 = c.vector("in.h0");
    Matrix<S> h = c.matrix("in.guess");
    const auto residuals =
        eb::deer_sweeps(eb::gru_cell(w, gru_options(c.param("variant"))), eb::gru_inputs(x, w), h0,
                        h, c.param_int("iters"), {.method = deer_method(c.param("method"))});
    c.expect("out.h", h);
    c.expect("out.res", Eigen::Map<const Vector<double>>(residuals.data(),
                                                         static_cast<Index>(residuals.size())));
  }
};

}  // namespace

void register_rnn(golden::Registry& registry) {
  const auto max_norm = golden::Compare::max_norm;
  registry.add("rnn_tanh", RnnTanhOp{}, max_norm);
  registry.add("gru", GruOp{}, max_norm);
  registry.add("deer_rnn_tanh", DeerRnnTanhOp{}, max_norm);
  registry.add("deer_gru", DeerGruOp{}, max_norm);
  registry.add("elk_rnn_tanh", ElkRnnTanhOp{}, max_norm);
}
