// Who a thread is. Blocks are one-dimensional, of whole warps; a cluster is a run of neighbours along x.
#pragma once

#include "cuda/common/platform.h"

namespace fastldm::cuda {

#ifdef FASTLDM_HOST_SHIM
FASTLDM_DEVICE int thread_id() { return shim::here().thread; }
FASTLDM_DEVICE int block_threads() { return shim::here().threads; }
FASTLDM_DEVICE int block_x() { return shim::here().block[0]; }
FASTLDM_DEVICE int block_y() { return shim::here().block[1]; }
FASTLDM_DEVICE int block_z() { return shim::here().block[2]; }
FASTLDM_DEVICE int grid_x() { return shim::here().grid[0]; }
FASTLDM_DEVICE int grid_y() { return shim::here().grid[1]; }
FASTLDM_DEVICE int grid_z() { return shim::here().grid[2]; }
#else
FASTLDM_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
FASTLDM_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FASTLDM_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FASTLDM_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FASTLDM_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
FASTLDM_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
FASTLDM_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }
FASTLDM_DEVICE int grid_z() { return static_cast<int>(gridDim.z); }
#endif

FASTLDM_DEVICE int lane_id() { return thread_id() % kWarp; }
FASTLDM_DEVICE int warp_id() { return thread_id() / kWarp; }

// x, of which the compiler is to know nothing: offsets that follow from it are computed where they are used, and kept
// in no registers until then.
FASTLDM_DEVICE std::int64_t opaque(std::int64_t x) {
#ifndef FASTLDM_HOST_SHIM
  asm volatile("" : "+l"(x));
#endif
  return x;
}

}  // namespace fastldm::cuda
