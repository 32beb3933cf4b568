#include "unit/attention/tiled_kernel.hpp"

namespace attention_test {
template Outcome<float> tiled<float>(const Problem&, const AnyRule&, const Run&, bool);
}
