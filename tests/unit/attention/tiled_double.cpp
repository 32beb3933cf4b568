#include "unit/attention/tiled_kernel.hpp"

namespace attention_test {
template Outcome<double> tiled<double>(const Problem&, const AnyRule&, const Run&, bool);
}
