// Everything in eigenblocks that needs no more than Eigen. What needs other libraries, eigenblocks/io
// and eigenblocks/mpi, is included by its own name.
//
// Written by `cmake -DWRITE=ON -P tests/include_graph.cmake`; a test keeps it complete.
#pragma once

#include <eigenblocks/attention/backward_tiles.hpp>
#include <eigenblocks/attention/bias.hpp>
#include <eigenblocks/attention/cache.hpp>
#include <eigenblocks/attention/cache_size.hpp>
#include <eigenblocks/attention/decode.hpp>
#include <eigenblocks/attention/decode_rows.hpp>
#include <eigenblocks/attention/forward_tiles.hpp>
#include <eigenblocks/attention/hwfa.hpp>
#include <eigenblocks/attention/hwfa_layer.hpp>
#include <eigenblocks/attention/kernel.hpp>
#include <eigenblocks/attention/key_norm.hpp>
#include <eigenblocks/attention/linear.hpp>
#include <eigenblocks/attention/linear_tiles.hpp>
#include <eigenblocks/attention/mask.hpp>
#include <eigenblocks/attention/mha.hpp>
#include <eigenblocks/attention/mha_options.hpp>
#include <eigenblocks/attention/mha_rerope.hpp>
#include <eigenblocks/attention/mla.hpp>
#include <eigenblocks/attention/mla_cache.hpp>
#include <eigenblocks/attention/mla_decode.hpp>
#include <eigenblocks/attention/near_far.hpp>
#include <eigenblocks/attention/online_softmax.hpp>
#include <eigenblocks/attention/paged_cache.hpp>
#include <eigenblocks/attention/partial.hpp>
#include <eigenblocks/attention/quantized_cache.hpp>
#include <eigenblocks/attention/reference.hpp>
#include <eigenblocks/attention/rerope.hpp>
#include <eigenblocks/attention/rerope_cache.hpp>
#include <eigenblocks/attention/ring.hpp>
#include <eigenblocks/attention/rule.hpp>
#include <eigenblocks/attention/scale.hpp>
#include <eigenblocks/attention/score.hpp>
#include <eigenblocks/attention/sink_cache.hpp>
#include <eigenblocks/attention/varlen.hpp>
#include <eigenblocks/attention/vq.hpp>
#include <eigenblocks/attention/vq_attention.hpp>
#include <eigenblocks/attention/vq_backward.hpp>
#include <eigenblocks/attention/vq_codebook.hpp>
#include <eigenblocks/attention/vq_encoder.hpp>
#include <eigenblocks/attention/vq_options.hpp>
#include <eigenblocks/attention/vq_reference.hpp>
#include <eigenblocks/attention/vq_tiles.hpp>

#include <eigenblocks/core/config.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/math.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/product.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/simd.hpp>
#include <eigenblocks/core/softmax.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/core/tile.hpp>
#include <eigenblocks/core/tile_product.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <eigenblocks/loss/cross_entropy.hpp>
#include <eigenblocks/loss/linear_cross_entropy.hpp>

#include <eigenblocks/nn/activation.hpp>
#include <eigenblocks/nn/embedding.hpp>
#include <eigenblocks/nn/glu.hpp>
#include <eigenblocks/nn/linear.hpp>
#include <eigenblocks/nn/norm.hpp>
#include <eigenblocks/nn/sampling.hpp>

#include <eigenblocks/optim/adamw.hpp>
#include <eigenblocks/optim/clip.hpp>
#include <eigenblocks/optim/muon.hpp>
#include <eigenblocks/optim/schedule.hpp>
#include <eigenblocks/optim/sgd.hpp>
#include <eigenblocks/optim/tensor_ref.hpp>

#include <eigenblocks/position/base_bound.hpp>
#include <eigenblocks/position/frequencies.hpp>
#include <eigenblocks/position/frequency_scaling.hpp>
#include <eigenblocks/position/logn.hpp>
#include <eigenblocks/position/positions.hpp>
#include <eigenblocks/position/rerope.hpp>
#include <eigenblocks/position/rope.hpp>
#include <eigenblocks/position/rope_nd.hpp>
#include <eigenblocks/position/xpos.hpp>

#include <eigenblocks/version.hpp>
