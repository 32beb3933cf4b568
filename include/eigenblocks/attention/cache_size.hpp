// How many scalars the cache of a decoder holds for each token, by kind of attention.
//
//   mha 2 H d L      gqa 2 KV d L      mqa 2 d L      mla (r_kv + d_r) L
//
//   kv_cache_size(KvCacheKind::mla, {.layers = 60, .kv_rank = 512, .rope_dim = 64})  ->  34 560   (DeepSeek-V2)
//
// Source: arXiv 2405.04434 table 1.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>

EIGENBLOCKS_NAMESPACE_BEGIN

enum class KvCacheKind { mha, gqa, mqa, mla };

/// Each kind reads its own fields only.
struct KvCacheSizeOptions {
  Index layers = 1;
  Index heads = 0;     ///< mha
  Index kv_heads = 0;  ///< gqa
  Index head_dim = 0;  ///< mha, gqa, mqa
  Index kv_rank = 0;   ///< mla
  Index rope_dim = 0;  ///< mla; may be 0
};

/// Scalars per token over all layers.  Errors: a field that the kind reads below 1 (rope_dim: below 0); unknown kind.
inline Index kv_cache_size(KvCacheKind kind, const KvCacheSizeOptions& o) {
  const auto positive = [](const char* name, Index value) {
    detail::require(value >= 1, name, " (", value, ") must be at least 1");
    return value;
  };
  const Index layers = positive("layers", o.layers);
  switch (kind) {
    case KvCacheKind::mha:
      return 2 * positive("heads", o.heads) * positive("head_dim", o.head_dim) * layers;
    case KvCacheKind::gqa:
      return 2 * positive("kv_heads", o.kv_heads) * positive("head_dim", o.head_dim) * layers;
    case KvCacheKind::mqa:
      return 2 * positive("head_dim", o.head_dim) * layers;
    case KvCacheKind::mla:
      detail::require(o.rope_dim >= 0, "rope_dim (", o.rope_dim, ") must not be negative");
      return (positive("kv_rank", o.kv_rank) + o.rope_dim) * layers;
  }
  detail::raise<invalid_argument>("kind (", kind, ") must be mha, gqa, mqa or mla");
}

EIGENBLOCKS_NAMESPACE_END
