// Everything in eigenblocks that needs no more than Eigen. What needs other libraries, eigenblocks/io
// and eigenblocks/mpi, is included by its own name.
//
// Written by `cmake -DWRITE=ON -P tests/include_graph.cmake`; a test keeps it complete.
#pragma once

#include <eigenblocks/core/config.hpp>
#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/gradcheck.hpp>
#include <eigenblocks/core/parallel.hpp>
#include <eigenblocks/core/random.hpp>
#include <eigenblocks/core/thread_pool.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <eigenblocks/version.hpp>
