// A misspelt option is refused: options are aggregates with designated initialisers.
// expect: kv_haeds
#include <eigenblocks/attention/kernel.hpp>

namespace eb = eigenblocks;

#ifdef EIGENBLOCKS_FAIL
const eb::AttentionShape shape{.heads = 4, .kv_haeds = 2};
#else
const eb::AttentionShape shape{.heads = 4, .kv_heads = 2};
#endif
