// Golden cases: values computed by official implementations, and what a handler may ask of them.
//
// One fixture file is one case.  Its metadata names an op; the handler of that op runs the library on the file's
// inputs and hands back what it got:
//
//   registry.add("softmax_rows", [](auto& c) {
//     using S = golden::scalar_of<decltype(c)>;           // double, or float in the --float run
//     const auto x = c.matrix("in.x");                    // [T, H, d] comes as T x (H*d), [n] as 1 x n
//     const S scale = static_cast<S>(c.param_real("scale", 1.0));
//     c.expect("out.y", softmax_rows(x, scale));
//     for (Index tile : {1, 3, 64}) {
//       c.form("tile " + std::to_string(tile));           // the same file against another form of the op
//       c.expect("out.y", softmax_rows_tiled(x, scale, tile));
//     }
//     if (c.has("gin.x")) c.expect("gin.x", softmax_rows_backward(x, scale, c.matrix("gout.y")));
//   });
//
// Nothing in a file may be overlooked: after the handler the case fails if a `param.*`, `in.*` or `gout.*` was never
// asked for, or an `out.*` or `gin.*` never compared.  Asking for something that is not there throws, and so fails
// the case; `has`, `has_param` and fallbacks are for what is optional, and count as asking.
//
// How two numbers are compared (DESIGN section 6)
//   double   |got - want| <= atol + rtol |want|, with atol and rtol from the file; ops registered with
//            Compare::max_norm put max|want| over the tensor in the place of |want|
//   float    |got - want| <= t max|want| over the tensor, t = 5e-5 for values and 5e-4 for gradients (gin.*).
//            A tensor that is nothing but rounding, max|want| <= 2^-20 of the largest float operand (the gradient of
//            a softmax over one key), has no size of its own: there 1/200 of that operand takes its place
//   always   infinities must match, NaN matches NaN only, integers and `expect_exact` get no float allowance
#pragma once

#include <eigenblocks/core/types.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace golden {

using eigenblocks::Index;

inline constexpr double kFloatValues = 5e-5;
inline constexpr double kFloatGradients = 5e-4;
inline constexpr double kFloatRounding = 0x1p-20;
inline constexpr double kFloatCancelled = 1.0 / 200.0;

enum class Compare { elementwise, max_norm };

/// A tensor of a fixture; F64 tensors fill `values`, I64 tensors both.
struct Tensor {
  std::vector<Index> shape;
  bool integer = false;
  std::vector<double> values;
  std::vector<Index> integers;
};

/// A fixture file in memory.  Names are complete: "in.x", "gout.y"; parameters are without their "param.".
struct Fixture {
  std::string op;
  double atol = 0;
  double rtol = 0;
  std::map<std::string, std::string, std::less<>> params;
  std::map<std::string, Tensor, std::less<>> tensors;
};

/// The whole of `text` as an integer or a real; throws if it is not one.
template <class T>
T parse_number(std::string_view name, const std::string& text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    throw std::runtime_error(std::string(name) + " = " + text + " is not " +
                             (std::is_same_v<T, Index> ? "an integer" : "a number"));
  }
  return value;
}

/// What a handler did with a fixture: the part of Case that does not depend on the scalar.
class Record {
 public:
  Record(const Fixture& fixture, bool in_float, Compare compare)
      : fixture_(fixture), in_float_(in_float), compare_(compare) {}

  const Fixture& fixture() const { return fixture_; }
  bool in_float() const { return in_float_; }
  /// One line for each thing that went wrong: "[form] tensor[index]: got ..., want ...".
  const std::vector<std::string>& failures() const { return failures_; }
  const std::string& skip_reason() const { return skip_reason_; }

  const Tensor* find(std::string_view name) {
    used_.emplace(name);
    const auto found = fixture_.tensors.find(name);
    return found == fixture_.tensors.end() ? nullptr : &found->second;
  }

  const Tensor& tensor(std::string_view name) {
    const Tensor* found = find(name);
    if (!found) throw std::runtime_error("tensor " + std::string(name) + " is not in the file");
    return *found;
  }

  const std::string* find_param(std::string_view name) {
    used_.insert("param." + std::string(name));
    const auto found = fixture_.params.find(name);
    return found == fixture_.params.end() ? nullptr : &found->second;
  }

  /// A tensor the handler takes as float operands: their size decides what counts as rounding.
  const Tensor& operand(std::string_view name) {
    const Tensor& found = tensor(name);
    operand_scale_ = std::max(operand_scale_, max_norm(found.values));
    return found;
  }

  void form(std::string name) { form_ = std::move(name); }
  void skip(std::string reason) { skip_reason_ = std::move(reason); }
  void fail(const std::string& what) { failures_.push_back("[" + form_ + "] " + what); }

  /// `exact`: got holds doubles whatever the run.
  void expect(std::string_view name, const std::vector<double>& got, bool exact) {
    const Tensor* want = expected(name, got.size());
    if (!want) return;
    const bool in_float = in_float_ && !exact && !want->integer;
    const double scale = max_norm(want->values);
    const bool cancelled = in_float && scale <= kFloatRounding * operand_scale_;
    const double largest = cancelled ? kFloatCancelled * operand_scale_ : scale;
    const bool gradient = name.starts_with("gin.");
    const auto allowed = [&](double value) {
      if (want->integer) return 0.0;
      if (in_float) return (gradient ? kFloatGradients : kFloatValues) * largest;
      const double size = compare_ == Compare::max_norm ? largest : std::abs(value);
      return fixture_.atol + fixture_.rtol * size;
    };
    std::size_t off = 0, worst = 0;
    double worst_ratio = -1;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double tolerance = allowed(want->values[i]);
      if (agrees(got[i], want->values[i], tolerance)) continue;
      ++off;
      const double error =
          std::abs(got[i] - want->values[i]);  // NaN and infinity are worse than any number
      const double ratio = std::isfinite(error) ? error / std::max(tolerance, 1e-300) : HUGE_VAL;
      if (ratio > worst_ratio) {
        worst_ratio = ratio;
        worst = i;
      }
    }
    if (off == 0) return;
    fail(std::string(name) + index_text(*want, worst) + ": got " + number(got[worst]) + ", want " +
         number(want->values[worst]) + ", tolerance " + number(allowed(want->values[worst]), 3) +
         ", " + std::to_string(off) + " of " + std::to_string(got.size()) + " are off");
  }

  /// `tie(i)`: true where got[i] is as good as the expected integer although it differs.
  template <class Tie>
  void expect_integers(std::string_view name, const std::vector<Index>& got, Tie&& tie) {
    const Tensor* want = expected(name, got.size());
    if (!want) return;
    if (!want->integer)
      return fail(std::string(name).append(" is not an integer tensor in the file"));
    std::size_t off = 0, first = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (got[i] == want->integers[i] || tie(static_cast<Index>(i))) continue;
      if (off++ == 0) first = i;
    }
    if (off == 0) return;
    fail(std::string(name) + index_text(*want, first) + ": got " + std::to_string(got[first]) +
         ", want " + std::to_string(want->integers[first]) + ", " + std::to_string(off) + " of " +
         std::to_string(got.size()) + " are off");
  }

  /// After the handler: whatever it overlooked is a failure.
  void require_complete() {
    form_ = "whole file";
    bool expects_something = false;
    for (const auto& [name, value] : fixture_.params) {
      if (!used_.contains("param." + name)) fail("unknown parameter " + name + " = " + value);
    }
    for (const auto& [name, tensor] : fixture_.tensors) {
      const bool output = name.starts_with("out.") || name.starts_with("gin.");
      const bool input = name.starts_with("in.") || name.starts_with("gout.");
      expects_something |= output;
      if (!output && !input) fail("tensor " + name + " is neither in, out, gout nor gin");
      if (input && !used_.contains(name)) fail("unknown input tensor " + name);
      if (output && !compared_.contains(name))
        fail("expected tensor " + name + " was not compared");
    }
    if (!expects_something) fail("the file expects nothing");
  }

  static double max_norm(const std::vector<double>& values) {
    double largest = 0;
    for (const double value : values) {
      if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
    }
    return largest;
  }

 private:
  static bool agrees(double got, double want, double tolerance) {
    if (std::isnan(want)) return std::isnan(got);
    if (std::isinf(want) || std::isinf(got)) return got == want;
    return std::abs(got - want) <= tolerance;  // false for a NaN in got
  }

  const Tensor* expected(std::string_view name, std::size_t count) {
    if (!name.starts_with("out.") && !name.starts_with("gin.")) {
      fail("expect(" + std::string(name) + "): only out.* and gin.* are compared");
      return nullptr;
    }
    const auto found = fixture_.tensors.find(name);
    if (found == fixture_.tensors.end()) {
      fail("expected tensor " + std::string(name) + " is not in the file");
      return nullptr;
    }
    compared_.emplace(name);
    if (found->second.values.size() != count) {
      fail(std::string(name) + ": got " + std::to_string(count) + " entries, want " +
           std::to_string(found->second.values.size()));
      return nullptr;
    }
    return &found->second;
  }

  /// "[2, 0, 5]" for the flat position `at`.
  static std::string index_text(const Tensor& tensor, std::size_t at) {
    std::string text;
    for (std::size_t axis = tensor.shape.size(); axis-- > 0;) {
      const auto extent = static_cast<std::size_t>(tensor.shape[axis]);
      text = std::to_string(at % extent) + (text.empty() ? "" : ", " + text);
      at /= extent;
    }
    return "[" + text + "]";
  }

  std::string number(double value, int digits = 0) const {
    char text[40];
    std::snprintf(text, sizeof(text), "%.*g", digits ? digits : in_float_ ? 9 : 17, value);
    return text;
  }

  const Fixture& fixture_;
  bool in_float_;
  Compare compare_;
  std::string form_ = "direct";
  std::string skip_reason_;
  double operand_scale_ = 0;
  std::set<std::string, std::less<>> used_, compared_;
  std::vector<std::string> failures_;
};

/// One fixture under the scalar S, as a handler sees it.
template <class S>
class Case {
 public:
  using Scalar = S;

  explicit Case(Record& record) : record_(record) {}

  bool has(std::string_view name) const { return record_.find(name) != nullptr; }
  std::vector<Index> shape(std::string_view name) const { return record_.tensor(name).shape; }

  /// dims[0] x product(the rest), cast to S; [n] gives 1 x n, a scalar 1 x 1.
  eigenblocks::Matrix<S> matrix(std::string_view name) const {
    const Tensor& tensor = record_.operand(name);
    const Index size = static_cast<Index>(tensor.values.size());
    Index rows = 1, cols = size;
    if (tensor.shape.size() > 1) {
      rows = tensor.shape[0];
      cols = 1;
      for (std::size_t axis = 1; axis < tensor.shape.size(); ++axis) cols *= tensor.shape[axis];
    }
    return Eigen::Map<const eigenblocks::Matrix<double>>(tensor.values.data(), rows, cols)
        .template cast<S>();
  }

  /// Flattened, cast to S.
  eigenblocks::Vector<S> vector(std::string_view name) const {
    return flat(record_.operand(name)).template cast<S>();
  }

  /// Flattened, in double whatever the run: positions, angles.
  eigenblocks::Vector<double> exact(std::string_view name) const {
    return flat(record_.tensor(name));
  }

  std::vector<Index> integers(std::string_view name) const {
    const Tensor& tensor = record_.tensor(name);
    if (!tensor.integer) {
      throw std::runtime_error("tensor " + std::string(name) + " does not hold integers");
    }
    return tensor.integers;
  }

  bool has_param(std::string_view name) const { return record_.find_param(name) != nullptr; }

  std::string param(std::string_view name) const {
    const std::string* text = record_.find_param(name);
    if (!text) throw std::runtime_error("parameter " + std::string(name) + " is missing");
    return *text;
  }
  Index param_int(std::string_view name) const { return parse_number<Index>(name, param(name)); }
  double param_real(std::string_view name) const { return parse_number<double>(name, param(name)); }
  bool param_flag(std::string_view name) const {
    const Index value = param_int(name);
    if (value != 0 && value != 1) {
      throw std::runtime_error("parameter " + std::string(name) + " must be 0 or 1");
    }
    return value == 1;
  }

  std::string param(std::string_view name, std::string fallback) const {
    return has_param(name) ? param(name) : std::move(fallback);
  }
  Index param_int(std::string_view name, Index fallback) const {
    return has_param(name) ? param_int(name) : fallback;
  }
  double param_real(std::string_view name, double fallback) const {
    return has_param(name) ? param_real(name) : fallback;
  }
  bool param_flag(std::string_view name, bool fallback) const {
    return has_param(name) ? param_flag(name) : fallback;
  }

  /// Names the form that the following expectations belong to ("tile 3", "step by step").
  void form(std::string name) { record_.form(std::move(name)); }

  /// got: a number, or any Eigen object, taken row by row.  Its shape is free, the number of entries is not.
  template <class M>
  void expect(std::string_view name, const M& got) {
    record_.expect(name, entries(got), false);
  }

  /// The same for doubles that the float run must meet as closely as the double run.
  template <class M>
  void expect_exact(std::string_view name, const M& got) {
    record_.expect(name, entries(got), true);
  }

  void expect_integers(std::string_view name, const std::vector<Index>& got) {
    record_.expect_integers(name, got, [](Index) { return false; });
  }

  /// In the float run got[i] also counts where tie(i) says that float rounding cannot tell it from the expected one.
  template <class Tie>
  void expect_integers(std::string_view name, const std::vector<Index>& got, Tie&& tie) {
    record_.expect_integers(name, got, [&](Index i) { return record_.in_float() && tie(i); });
  }

  /// Says, in the float run only, that float cannot do this case; it is counted as skipped.
  void skip_float(std::string reason) {
    if (record_.in_float()) record_.skip(std::move(reason));
  }

 private:
  static Eigen::Map<const eigenblocks::Vector<double>> flat(const Tensor& tensor) {
    return {tensor.values.data(), static_cast<Index>(tensor.values.size())};
  }

  template <class M>
  static std::vector<double> entries(const M& got) {
    if constexpr (std::is_arithmetic_v<M>) {
      return {static_cast<double>(got)};
    } else {
      const typename M::PlainObject plain = got;
      std::vector<double> values;
      values.reserve(static_cast<std::size_t>(plain.size()));
      for (Index i = 0; i < plain.rows(); ++i) {
        for (Index j = 0; j < plain.cols(); ++j) values.push_back(static_cast<double>(plain(i, j)));
      }
      return values;
    }
  }

  Record& record_;
};

template <class C>
using scalar_of = typename std::remove_cvref_t<C>::Scalar;

/// The ops the runner can run.
class Registry {
 public:
  struct Op {
    std::function<void(Case<double>&)> in_double;
    std::function<void(Case<float>&)> in_float;  ///< empty: double by nature
    std::string double_reason;
    Compare compare = Compare::elementwise;
  };

  /// `handler` is a generic lambda `[](auto& c)`, run in double and in float.
  template <class F>
  void add(std::string op, F handler, Compare compare = Compare::elementwise) {
    insert(std::move(op), {handler, handler, {}, compare});
  }

  /// An op that is double by nature: `--float` skips it for this reason.
  template <class F>
  void add_double(std::string op, std::string reason, F handler,
                  Compare compare = Compare::elementwise) {
    insert(std::move(op), {std::move(handler), {}, std::move(reason), compare});
  }

  const std::map<std::string, Op, std::less<>>& ops() const { return ops_; }

 private:
  void insert(std::string name, Op op) {
    if (!ops_.emplace(name, std::move(op)).second) {
      throw std::logic_error("two handlers for op " + name);
    }
  }

  std::map<std::string, Op, std::less<>> ops_;
};

}  // namespace golden

void register_attention(golden::Registry& registry);         // golden_ops/attention.cpp
void register_attention_rules(golden::Registry& registry);   // golden_ops/attention_rules.cpp
void register_mha(golden::Registry& registry);               // golden_ops/mha.cpp
void register_mla(golden::Registry& registry);               // golden_ops/mla.cpp
void register_linear(golden::Registry& registry);            // golden_ops/linear.cpp
void register_llama(golden::Registry& registry);             // golden_ops/llama.cpp
void register_nn(golden::Registry& registry);                // golden_ops/nn.cpp
void register_ring(golden::Registry& registry);              // golden_ops/ring.cpp
void register_rope(golden::Registry& registry);              // golden_ops/rope.cpp
void register_rope_nd(golden::Registry& registry);           // golden_ops/rope_nd.cpp
void register_rerope(golden::Registry& registry);            // golden_ops/rerope.cpp
void register_rope_frequencies(golden::Registry& registry);  // golden_ops/rope_frequencies.cpp
void register_optim_structured(golden::Registry& registry);  // golden_ops/optim_structured.cpp
void register_quantize_losses(golden::Registry& registry);   // golden_ops/quantize_losses.cpp
void register_vq(golden::Registry& registry);                // golden_ops/vq.cpp
void register_scan(golden::Registry& registry);              // golden_ops/scan.cpp
void register_fft(golden::Registry& registry);               // golden_ops/fft.cpp
void register_hippo(golden::Registry& registry);             // golden_ops/hippo.cpp
void register_s4(golden::Registry& registry);                // golden_ops/s4.cpp
void register_lru(golden::Registry& registry);               // golden_ops/lru.cpp
void register_rnn(golden::Registry& registry);               // golden_ops/rnn.cpp
void register_selective_scan(golden::Registry& registry);    // golden_ops/selective_scan.cpp
