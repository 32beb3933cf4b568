// A rule with a position policy needs unrotated operands: attention_forward, which takes them as they are, refuses it.
// expect: belongs to rerope_attention_forward
#include <eigenblocks/attention/rerope.hpp>

using namespace eigenblocks;

void good(const Matrix<float>& x, Matrix<float>& out, const RotaryTable<float>& table) {
  rerope_attention_forward(x, x, x, out, {}, table, attention_rule(causal(), {}, rerope(8)));
}
#ifdef EIGENBLOCKS_FAIL
void bad(const Matrix<float>& x, Matrix<float>& out) {
  attention_forward(x, x, x, out, {}, attention_rule(causal(), {}, rerope(8)));
}
#endif
