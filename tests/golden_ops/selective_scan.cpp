// Golden ops selective_scan (Mamba) and ssd (Mamba-2), in every form.
#include "support/golden.hpp"

#include <eigenblocks/ssm/selective_scan.hpp>
#include <eigenblocks/ssm/ssd.hpp>

#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;
using eb::Vector;

template <class M>
M zeros_like(const M& m) {
  return M::Zero(m.rows(), m.cols());
}

template <class C>
class SelectiveScanCase {
  using S = golden::scalar_of<C>;

 public:
  explicit SelectiveScanCase(C& c)
      : c_(c),
        u_(c.matrix("in.u")),
        delta_(c.matrix("in.delta")),
        a_(c.matrix("in.A")),
        b_(c.matrix("in.B")),
        c_in_(c.matrix("in.C")) {
    options_.groups = c.shape("in.B").at(1);
    options_.delta_softplus = c.param_flag("delta_softplus");
    optional("in.D", c.param_flag("has_D"), skip_, extra_.skip);
    optional("in.delta_bias", c.param_flag("has_bias"), bias_, extra_.delta_bias);
    if (c.param_flag("has_z") != c.has("in.z"))
      throw std::runtime_error("has_z and tensor in.z disagree");
    if (c.has("in.z")) {
      gate_ = c.matrix("in.z");
      extra_.gate = &gate_;
    }
  }

  void run() {
    for (const bool powers : {true, false}) {
      options_.powers = powers;
      c_.form(powers ? "whole" : "whole, powers off");
      forward([&](auto& out, auto& last) {
        eb::selective_scan_forward(u_, delta_, a_, b_, c_in_, out, options_, extra_, &last);
      });
      backward();
    }
    for (const Index rows : {Index{1}, Index{2}, Index{3}, Index{65}}) {
      c_.form("steps of " + std::to_string(rows));
      forward([&](auto& out, auto& last) { steps(rows, out, last); });
    }
    for (Index at = 1; at < u_.rows(); ++at) {
      c_.form("split at " + std::to_string(at));
      forward([&](auto& out, auto& last) { split(at, out, last); });
    }
    if constexpr (std::is_same_v<S, double>) {
      c_.form("reference");
      forward([&](auto& out, auto& last) {
        eb::selective_scan_reference(u_, delta_, a_, b_, c_in_, out, options_, extra_, &last);
      });
    }
  }

 private:
  void optional(const char* name, bool wanted, Vector<S>& to, const Vector<S>*& pointer) {
    if (wanted != c_.has(name))
      throw std::runtime_error(std::string(name) + " and its flag disagree");
    if (!wanted) return;
    to = c_.vector(name);
    pointer = &to;
  }

  template <class F>
  void forward(F&& f) {
    Matrix<S> out = zeros_like(u_), last = zeros_like(a_);
    f(out, last);
    c_.expect("out.y", out);
    c_.expect("out.h", last);
  }

  eb::SelectiveScanTensors<S> rows_of(Index t, Index rows, Matrix<S>& gate) const {
    eb::SelectiveScanTensors<S> extra = extra_;
    if (extra.gate != nullptr) {
      gate = gate_.middleRows(t, rows);
      extra.gate = &gate;
    }
    return extra;
  }

  void steps(Index rows, Matrix<S>& out, Matrix<S>& last) {
    auto state = eb::selective_scan_state<S>(a_.rows(), a_.cols(), options_);
    Matrix<S> gate;
    for (Index t = 0; t < u_.rows(); t += rows) {
      const Index n = std::min(rows, u_.rows() - t);
      eb::selective_scan_step(state, u_.middleRows(t, n), delta_.middleRows(t, n), a_,
                              b_.middleRows(t, n), c_in_.middleRows(t, n), out.middleRows(t, n),
                              rows_of(t, n, gate));
    }
    last = state.memory;
  }

  void split(Index at, Matrix<S>& out, Matrix<S>& last) {
    Matrix<S> gate;
    for (const auto& [t, n] : {std::pair{Index{0}, at}, std::pair{at, u_.rows() - at}}) {
      auto extra = rows_of(t, n, gate);
      if (t > 0) extra.state = &last;
      eb::selective_scan_forward(u_.middleRows(t, n), delta_.middleRows(t, n), a_,
                                 b_.middleRows(t, n), c_in_.middleRows(t, n), out.middleRows(t, n),
                                 options_, extra, &last);
    }
  }

  void backward() {
    const bool has_dy = c_.has("gout.y"), has_dh = c_.has("gout.h");
    if (!has_dy && !has_dh) return;
    const Matrix<S> dy = has_dy ? c_.matrix("gout.y") : zeros_like(u_);
    const Matrix<S> dh = has_dh ? c_.matrix("gout.h") : zeros_like(a_);
    Matrix<S> du = zeros_like(u_), ddelta = du, da = zeros_like(a_), db = zeros_like(b_), dc = db;
    Matrix<S> dz = zeros_like(gate_);
    Vector<S> dskip = zeros_like(skip_), dbias = zeros_like(bias_);
    eb::selective_scan_backward(u_, delta_, a_, b_, c_in_, dy, du, ddelta, da, db, dc, options_,
                                extra_, has_dh ? &dh : nullptr,
                                {.skip = extra_.skip != nullptr ? &dskip : nullptr,
                                 .delta_bias = extra_.delta_bias != nullptr ? &dbias : nullptr,
                                 .gate = extra_.gate != nullptr ? &dz : nullptr});
    const auto compare = [&](const char* name, const auto& got) {
      if (c_.has(name)) c_.expect(name, got);
    };
    compare("gin.u", du);
    compare("gin.delta", ddelta);
    compare("gin.A", da);
    compare("gin.B", db);
    compare("gin.C", dc);
    compare("gin.D", dskip);
    compare("gin.delta_bias", dbias);
    compare("gin.z", dz);
  }

  C& c_;
  Matrix<S> u_, delta_, a_, b_, c_in_, gate_;
  Vector<S> skip_, bias_;
  eb::SelectiveScanOptions options_;
  eb::SelectiveScanTensors<S> extra_;
};

template <class C>
class SsdCase {
  using S = golden::scalar_of<C>;

 public:
  explicit SsdCase(C& c)
      : c_(c),
        x_(c.matrix("in.X")),
        a_(c.matrix("in.a")),
        b_(c.matrix("in.B")),
        c_in_(c.matrix("in.C")),
        head_dim_(c.shape("in.X").at(2)),
        states_(c.shape("in.B").at(2)) {
    options_.heads = c.shape("in.X").at(1);
    options_.groups = c.shape("in.B").at(1);
    first_ = states("in.h0");
  }

  void run() {
    const Index tokens = x_.rows();
    for (const Index chunk : {Index{0}, Index{1}, Index{2}, Index{3}, Index{5},
                              c_.param_int("chunk"), std::max<Index>(tokens, 1)}) {
      c_.form("chunk " + std::to_string(chunk));
      options_.chunk = chunk;
      forward([&](auto& out, auto& last) {
        eb::ssd_forward(x_, a_, b_, c_in_, out, options_, &first_, &last);
      });
      backward();
    }
    c_.form("recurrent");
    forward([&](auto& out, auto& last) {
      eb::ssd_recurrent(x_, a_, b_, c_in_, out, options_, &first_, &last);
    });
    if constexpr (std::is_same_v<S, double>) {
      c_.form("quadratic");
      forward([&](auto& out, auto& last) {
        eb::ssd_reference(x_, a_, b_, c_in_, out, options_, &first_, &last);
      });
    }
    for (const Index rows : {Index{1}, Index{3}, Index{9}}) {
      c_.form("steps of " + std::to_string(rows));
      forward([&](auto& out, auto& last) {
        auto state = eb::ssd_state<S>(options_, head_dim_, states_, &first_);
        for (Index t = 0; t < tokens; t += rows) {
          const Index n = std::min(rows, tokens - t);
          eb::ssd_step(state, x_.middleRows(t, n), a_.middleRows(t, n), b_.middleRows(t, n),
                       c_in_.middleRows(t, n), out.middleRows(t, n));
        }
        last = state.memory;
      });
    }
  }

 private:
  /// [H, P, N] as (H*P) x N.
  Matrix<S> states(const char* name) const {
    const Matrix<S> flat = c_.matrix(name);
    if (flat.size() != x_.cols() * states_)
      throw std::runtime_error(std::string(name) + " does not hold heads * head_dim * states");
    return Eigen::Map<const Matrix<S>>(flat.data(), x_.cols(), states_);
  }

  template <class F>
  void forward(F&& f) {
    Matrix<S> out = zeros_like(x_), last = zeros_like(first_);
    f(out, last);
    c_.expect("out.Y", out);
    c_.expect("out.hT", last);
  }

  void backward() {
    const bool has_dy = c_.has("gout.Y"), has_dh = c_.has("gout.hT");
    if (!has_dy && !has_dh) return;
    const Matrix<S> dy = has_dy ? c_.matrix("gout.Y") : zeros_like(x_);
    const Matrix<S> dh = has_dh ? states("gout.hT") : zeros_like(first_);
    Matrix<S> dx = zeros_like(x_), da = zeros_like(a_), db = zeros_like(b_), dc = db;
    Matrix<S> dfirst = zeros_like(first_);
    eb::ssd_backward(x_, a_, b_, c_in_, dy, dx, da, db, dc, options_, &first_,
                     has_dh ? &dh : nullptr, &dfirst);
    const auto compare = [&](const char* name, const Matrix<S>& got) {
      if (c_.has(name)) c_.expect(name, got);
    };
    compare("gin.X", dx);
    compare("gin.a", da);
    compare("gin.B", db);
    compare("gin.C", dc);
    compare("gin.h0", dfirst);
  }

  C& c_;
  Matrix<S> x_, a_, b_, c_in_, first_;
  Index head_dim_, states_;
  eb::SsdOptions options_;
};

struct SelectiveScanOp {
  template <class C>
  void operator()(C& c) const {
    SelectiveScanCase<C>(c).run();
  }
};
struct SsdOp {
  template <class C>
  void operator()(C& c) const {
    SsdCase<C>(c).run();
  }
};

}  // namespace

void register_selective_scan(golden::Registry& registry) {
  registry.add("selective_scan", SelectiveScanOp{}, golden::Compare::max_norm);
  registry.add("ssd", SsdOp{}, golden::Compare::max_norm);
}
