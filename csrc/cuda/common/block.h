// What the threads of a block do together.
#pragma once

#include "cuda/common/memory.h"
#include "cuda/common/warp.h"

namespace fastldm::cuda {

// Waits for every thread of the block; what they wrote before is seen by all after.
FASTLDM_DEVICE void block_sync() {
#ifdef FASTLDM_HOST_SHIM
  shim::barrier(0, block_threads(), true);
#else
  __syncthreads();
#endif
}

// Barriers 1 .. 15 for whole warps that together are `threads` threads: those that wait and those that only
// arrive, as a producer does that says "filled" and goes on (PTX ISA: bar.sync, bar.arrive).
template <int Id>
FASTLDM_DEVICE void named_sync(int threads) {
  static_assert(Id >= 1 && Id <= 15, "barrier 0 is block_sync's");
#ifdef FASTLDM_HOST_SHIM
  shim::barrier(Id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "r"(threads) : "memory");
#endif
}

template <int Id>
FASTLDM_DEVICE void named_arrive(int threads) {
  static_assert(Id >= 1 && Id <= 15, "barrier 0 is block_sync's");
#ifdef FASTLDM_HOST_SHIM
  shim::barrier(Id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"n"(Id), "r"(threads) : "memory");
#endif
}

// `combine` over the block, in every thread: each warp's tree (warp_reduce), then the warps in order. `scratch` has
// an element per warp and is free again on return.
template <int Threads, class T, class Combine>
FASTLDM_DEVICE T block_reduce(T value, const Combine& combine, const Shared<T>& scratch) {
  constexpr int warps = Threads / kWarp;
  value = warp_reduce(value, combine);
  if constexpr (warps == 1) return value;
  if (lane_id() == 0) scratch.store(warp_id(), value);
  block_sync();
  value = scratch.load(0);
#pragma unroll
  for (int warp = 1; warp < warps; ++warp) value = combine(value, scratch.load(warp));
  block_sync();
  return value;
}

}  // namespace fastldm::cuda
