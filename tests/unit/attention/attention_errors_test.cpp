// The bad-input table of the fixed-shape functions: each error with its message, nothing written.  Packed sequences and caches
// have theirs in varlen_test.cpp, cache_test.cpp and decode_test.cpp; functors in mask_test.cpp and score_test.cpp.
#include <eigenblocks/attention/kernel.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <string>

namespace {

using namespace eigenblocks;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

/// 3 queries, 5 keys, 4 heads over 2 kv heads, 6 channels, 2 value channels; each row of a table spoils one thing.
struct Call {
  Matrix<double> q = Matrix<double>::Zero(3, 24), k = Matrix<double>::Zero(5, 12),
                 v = Matrix<double>::Zero(5, 4);
  Matrix<double> dout = Matrix<double>::Zero(3, 8);
  Matrix<double> out = Matrix<double>::Constant(3, 8, 7.0),
                 dq = Matrix<double>::Constant(3, 24, 7.0),
                 dk = Matrix<double>::Constant(5, 12, 7.0),
                 dv = Matrix<double>::Constant(5, 4, 7.0);
  Matrix<double> bias = Matrix<double>::Zero(12, 5), dbias = bias,
                 dlse = Matrix<double>::Zero(3, 4);
  BoolMatrix keep = BoolMatrix::Constant(3, 5, true);
  Vector<double> rho = Vector<double>::Ones(3), sinks = Vector<double>::Zero(4), drho = rho,
                 dsinks = sinks;
  AttentionShape shape{.heads = 4, .kv_heads = 2};
  AttentionTensors<double> tensors;
  AttentionTensorGradients<double> gradients;
  AttentionSaved<double> saved{Matrix<double>::Zero(3, 4)};

  void forward() { (void)attention_forward(q, k, v, out, shape, DefaultRule{}, tensors); }
  void backward() {
    attention_backward(saved, q, k, v, out, dout, dq, dk, dv, shape, DefaultRule{}, tensors,
                       &gradients);
  }
  bool untouched() const {
    const auto kept = [](const Matrix<double>& m) { return (m.array() == 7.0).all(); };
    return kept(out) && kept(dq) && kept(dk) && kept(dv);
  }
};

struct Error {
  std::function<void(Call&)> spoil;
  std::string text;
};

void check(const Error& error, void (Call::*run)()) {
  Call call;
  error.spoil(call);
  const bool was_untouched = call.untouched();  // a result of another size is its own spoil
  CHECK_THROWS_WITH_AS((call.*run)(), ("eigenblocks: " + error.text).c_str(),
                       eigenblocks::invalid_argument);
  CHECK(call.untouched() == was_untouched);
}

Matrix<double> sevens(Index rows, Index cols) { return Matrix<double>::Constant(rows, cols, 7.0); }

}  // namespace

TEST_CASE("the good call is good") {
  Call call;
  CHECK_NOTHROW(call.forward());
  CHECK_NOTHROW(call.backward());
  CHECK_FALSE(call.untouched());
}

TEST_CASE("shapes and options, forward and backward alike") {
  const Error errors[] = {
      {[](Call& c) { c.shape.heads = 0; }, "heads (0) must be at least 1"},
      {[](Call& c) { c.shape.heads = -4; }, "heads (-4) must be at least 1"},
      {[](Call& c) { c.shape.kv_heads = -1; }, "kv_heads (-1) must be at least 1"},
      {[](Call& c) { c.shape.kv_heads = 3; }, "kv_heads (3) must divide heads (4)"},
      {[](Call& c) { c.shape.kv_heads = 8; }, "kv_heads (8) must divide heads (4)"},
      {[](Call& c) { c.q.resize(3, 23); }, "heads (4) must divide the 23 columns of query"},
      {[](Call& c) { c.v.resize(5, 5); }, "kv_heads (2) must divide the 5 columns of value"},
      {[](Call& c) { c.q.resize(3, 0); }, "query has no columns"},
      {[](Call& c) { c.k.resize(5, 10); },
       "key is 5 x 10, expected 5 x 12 (cols = kv_heads * head_dim, head_dim as in query)"},
      {[](Call& c) { c.v.resize(4, 4); }, "value is 4 x 4, expected 5 x 4 (one row per key)"},
      {[](Call& c) { c.shape.scale = kNaN; }, "scale (nan) must be finite"},
      {[](Call& c) { c.shape.scale = -kInf; }, "scale (-inf) must be finite"},
      {[](Call& c) { c.shape.key_offset = -2; }, "key_offset (-2) must not be negative"},
      {[](Call& c) { c.out = sevens(2, 8); },
       "out is 2 x 8, expected 3 x 8 (queries x heads * value_dim)"},
      {[](Call& c) { c.out = sevens(3, 24); },
       "out is 3 x 24, expected 3 x 8 (queries x heads * value_dim)"},
  };
  for (const Error& error : errors) check(error, &Call::forward);
  for (const Error& error : errors) check(error, &Call::backward);
}

TEST_CASE("optional tensors, forward and backward alike") {
  const Error errors[] = {
      {[](Call& c) { c.bias.resize(6, 5), c.tensors.bias = &c.bias; },
       "bias is 6 x 5, expected 3 x 5 or 12 x 5 (queries or heads * queries, keys)"},
      {[](Call& c) { c.bias.resize(3, 4), c.tensors.bias = &c.bias; },
       "bias is 3 x 4, expected 3 x 5 or 12 x 5 (queries or heads * queries, keys)"},
      {[](Call& c) { c.keep.resize(5, 3), c.tensors.mask = &c.keep; },
       "mask is 5 x 3, expected 3 x 5 (queries x keys)"},
      {[](Call& c) { c.rho.resize(4), c.tensors.row_scale = &c.rho; },
       "row_scale has 4 entries, expected 3 (one per query row)"},
      {[](Call& c) { c.sinks.resize(2), c.tensors.sinks = &c.sinks; },
       "sinks has 2 entries, expected 4 (one per query head)"},
  };
  for (const Error& error : errors) check(error, &Call::forward);
  for (const Error& error : errors) check(error, &Call::backward);
}

TEST_CASE("backward: results, upstream, and gradients of what is not there") {
  const Error errors[] = {
      {[](Call& c) { c.saved.lse.resize(3, 2); },
       "saved.lse is 3 x 2, expected 3 x 4 (queries x heads)"},
      {[](Call& c) { c.saved.lse.resize(0, 0); },
       "saved.lse is 0 x 0, expected 3 x 4 (queries x heads)"},
      {[](Call& c) { c.dout.resize(3, 9); }, "dout is 3 x 9, expected 3 x 8 (shape of out)"},
      {[](Call& c) { c.dq = sevens(3, 12); }, "dquery is 3 x 12, expected 3 x 24 (shape of query)"},
      {[](Call& c) { c.dk = sevens(4, 12); }, "dkey is 4 x 12, expected 5 x 12 (shape of key)"},
      {[](Call& c) { c.dv = sevens(5, 8); }, "dvalue is 5 x 8, expected 5 x 4 (shape of value)"},
      {[](Call& c) { c.gradients.bias = &c.dbias; },
       "a gradient of bias was asked for, but there is no bias"},
      {[](Call& c) { c.gradients.row_scale = &c.drho; },
       "a gradient of row_scale was asked for, but there is no row_scale"},
      {[](Call& c) { c.gradients.sinks = &c.dsinks; },
       "a gradient of sinks was asked for, but there are no sinks"},
      {[](Call& c) { c.tensors.bias = &c.bias, c.dbias.resize(3, 5), c.gradients.bias = &c.dbias; },
       "gradient of bias is 3 x 5, expected 12 x 5 (shape of bias)"},
      {[](Call& c) {
         c.tensors.row_scale = &c.rho, c.drho.resize(2), c.gradients.row_scale = &c.drho;
       },
       "gradient of row_scale has 2 entries, expected 3 (one per query row)"},
      {[](Call& c) {
         c.tensors.sinks = &c.sinks, c.dsinks.resize(5), c.gradients.sinks = &c.dsinks;
       },
       "gradient of sinks has 5 entries, expected 4 (one per query head)"},
      {[](Call& c) { c.dlse.resize(4, 4), c.gradients.upstream_lse = &c.dlse; },
       "upstream_lse is 4 x 4, expected 3 x 4 (queries x heads)"},
  };
  for (const Error& error : errors) check(error, &Call::backward);
}

TEST_CASE("slopes of ALiBi must be one per query head, however deep in a composition") {
  Call call;
  const auto rule = attention_rule(full(), compose(soft_cap(2.0), alibi(alibi_slopes(2))));
  CHECK_THROWS_WITH_AS((void)attention_forward(call.q, call.k, call.v, call.out, call.shape, rule),
                       "eigenblocks: alibi slopes has 2 entries, expected 4 (one per query head)",
                       eigenblocks::invalid_argument);
  CHECK(call.untouched());
}

TEST_CASE("empty operands are good input") {
  Matrix<double> none(0, 24), out(0, 8);
  Call call;
  CHECK(attention(none, call.k, call.v, call.shape).rows() == 0);
  CHECK((attention(call.q, Matrix<double>(0, 12), Matrix<double>(0, 4), call.shape).array() == 0.0)
            .all());
  CHECK(attention(Matrix<double>(0, 0), Matrix<double>(0, 0), Matrix<double>(0, 0), call.shape)
            .size() == 0);
}
