// What the blocks of a cluster do together (sm_90; `Kernel::min_capability` must say so). In a launch without
// clusters a block is alone in its cluster.
#pragma once

#include "cuda/common/memory.h"

namespace fastldm::cuda {

FASTLDM_DEVICE int cluster_rank() {
#if defined(FASTLDM_HOST_SHIM)
  return shim::here().cluster_rank;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

FASTLDM_DEVICE int cluster_blocks() {
#if defined(FASTLDM_HOST_SHIM)
  return shim::here().cluster_blocks;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
#else
  return 1;
#endif
}

// Waits for every thread of the cluster; what they wrote before is seen by all after. One is needed before the
// first access to a peer (it may not have started) and after the last (it may have ended).
FASTLDM_DEVICE void cluster_sync() {
#if defined(FASTLDM_HOST_SHIM)
  shim::cluster_barrier();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  // Not ".aligned": the lanes of a warp may come here one after the other, out of a loop whose end differs.
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#else
  unreachable_on_this_architecture();
#endif
}

// The array of block `rank` of the cluster that lies where `own` lies in this block: for load, store and
// load_vector, store_vector only.
template <class T>
FASTLDM_DEVICE Shared<T> peer(const Shared<T>& own, int rank) {
#if defined(FASTLDM_HOST_SHIM)
  return Access::moved(own, shim::peer_distance(rank));
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  char* address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(Access::address(own)), "r"(rank));
  return {address, 0};
#else
  unreachable_on_this_architecture();
  return own;
#endif
}

}  // namespace fastldm::cuda
