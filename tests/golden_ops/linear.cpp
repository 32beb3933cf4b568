// Golden ops gated_linear_attention (a gate per head) and gla (a gate per key channel): one implementation, every form.
#include "support/golden.hpp"

#include <eigenblocks/attention/linear.hpp>

#include <cmath>
#include <string>

namespace {

namespace eb = eigenblocks;
using eb::Index;
using eb::Matrix;

/// What the two schemas call the same things.
struct Names {
  const char *gate, *state, *out, *last;
};
constexpr Names kAttention{"log_decay", "state", "out", "state"};
constexpr Names kGla{"gk", "h0", "o", "hT"};

template <class C>
class LinearCase {
  using S = golden::scalar_of<C>;

 public:
  LinearCase(C& c, const Names& names, eb::LinearAttentionOptions options)
      : c_(c),
        names_(names),
        options_(options),
        q_(c.matrix("in.q")),
        k_(c.matrix("in.k")),
        v_(c.matrix("in.v")),
        key_dim_(c.shape("in.q").at(2)),
        value_dim_(c.shape("in.v").at(2)) {
    options_.heads = c.shape("in.q").at(1);
    if (c.has(in(names.gate))) gate_ = c.matrix(in(names.gate));
    if (c.has(in(names.state))) state_ = states(in(names.state));
    if (gate_.size() != 0) tensors_.log_decay = &gate_;
    if (state_.size() != 0) tensors_.state = &state_;
  }

  void run(Index file_chunk) {
    for (const Index chunk : {Index{0}, Index{1}, Index{2}, Index{3}, Index{5}, file_chunk}) {
      c_.form("chunk " + std::to_string(chunk));
      options_.chunk = chunk;
      forward([&](auto& out, auto& last) {
        eb::linear_attention_forward(q_, k_, v_, out, options_, tensors_, &last);
      });
      backward();
    }
    c_.form("recurrent");
    forward([&](auto& out, auto& last) {
      eb::linear_attention_recurrent(q_, k_, v_, out, options_, tensors_, &last);
    });
    if constexpr (std::is_same_v<S, double>) {
      c_.form("quadratic");
      forward([&](auto& out, auto& last) {
        eb::linear_attention_reference(q_, k_, v_, out, options_, tensors_, &last);
      });
    }
    for (const Index rows : {Index{1}, Index{3}, Index{9}}) {
      c_.form("steps of " + std::to_string(rows));
      forward([&](auto& out, auto& last) { steps(rows, out, last); });
    }
  }

 private:
  static std::string in(const char* name) { return std::string("in.") + name; }

  /// [H, d, e] as (H*d) x e.
  Matrix<S> states(const std::string& name) const {
    const Matrix<S> flat = c_.matrix(name);
    if (flat.size() != options_.heads * key_dim_ * value_dim_)
      throw std::runtime_error("tensor " + name + " does not hold heads * d * e numbers");
    return Eigen::Map<const Matrix<S>>(flat.data(), options_.heads * key_dim_, value_dim_);
  }

  template <class F>
  void forward(F&& f) {
    Matrix<S> out(v_.rows(), v_.cols()), last(options_.heads * key_dim_, value_dim_);
    f(out, last);
    c_.expect(std::string("out.") + names_.out, out);
    c_.expect(std::string("out.") + names_.last, last);
  }

  void steps(Index rows, Matrix<S>& out, Matrix<S>& last) {
    auto state = eb::linear_attention_state<S>(options_, key_dim_, value_dim_, tensors_.state);
    for (Index t = 0; t < q_.rows(); t += rows) {
      const Index n = std::min(rows, q_.rows() - t);
      const Matrix<S> gate = gate_.size() != 0 ? Matrix<S>(gate_.middleRows(t, n)) : Matrix<S>();
      eb::linear_attention_step(state, q_.middleRows(t, n), k_.middleRows(t, n),
                                v_.middleRows(t, n), out.middleRows(t, n),
                                gate.size() != 0 ? &gate : nullptr);
    }
    last = state.memory;
  }

  void backward() {
    const std::string dout_name = std::string("gout.") + names_.out;
    const std::string dlast_name = std::string("gout.") + names_.last;
    const bool has_dout = c_.has(dout_name), has_dlast = c_.has(dlast_name);
    if (!has_dout && !has_dlast) return;
    const Matrix<S> dout =
        has_dout ? c_.matrix(dout_name) : Matrix<S>(Matrix<S>::Zero(v_.rows(), v_.cols()));
    const Matrix<S> dlast = has_dlast ? states(dlast_name) : Matrix<S>();
    Matrix<S> dq(q_.rows(), q_.cols()), dk = dq, dv(v_.rows(), v_.cols());
    Matrix<S> dgate(gate_.rows(), gate_.cols());
    Matrix<S> dstate(options_.heads * key_dim_, value_dim_);
    eb::linear_attention_backward(
        q_, k_, v_, dout, dq, dk, dv, options_, tensors_, has_dlast ? &dlast : nullptr,
        {.log_decay = gate_.size() != 0 ? &dgate : nullptr, .state = &dstate});
    const auto compare = [&](const std::string& name, const Matrix<S>& got) {
      if (c_.has("gin." + name)) c_.expect("gin." + name, got);
    };
    compare("q", dq);
    compare("k", dk);
    compare("v", dv);
    compare(names_.gate, dgate);
    compare(names_.state, dstate);
  }

  C& c_;
  const Names& names_;
  eb::LinearAttentionOptions options_;
  Matrix<S> q_, k_, v_, gate_, state_;
  Index key_dim_, value_dim_;
  eb::LinearAttentionTensors<S> tensors_;
};

struct GatedLinearAttentionOp {
  template <class C>
  void operator()(C& c) const {
    LinearCase<C>(c, kAttention, {.scale = c.param_real("scale", 1.0)})
        .run(c.param_int("chunk", 64));
  }
};

struct GlaOp {
  template <class C>
  void operator()(C& c) const {
    const double width = static_cast<double>(c.shape("in.q").at(2));
    LinearCase<C>(c, kGla, {.scale = c.param_real("scale", 1.0 / std::sqrt(width))})
        .run(c.param_int("chunk", 64));
  }
};

}  // namespace

void register_linear(golden::Registry& registry) {
  registry.add("gated_linear_attention", GatedLinearAttentionOp{});
  registry.add("gla", GlaOp{}, golden::Compare::max_norm);
}
