// What every primitive stands on: where code runs, and the errors of host code.
//
// The same kernel source is compiled by nvcc for GPUs and, with FASTLDM_HOST_SHIM, by a C++ compiler for the
// CPU (cuda/shim). Each primitive of this folder has both meanings side by side.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/types.h"

#ifdef FASTLDM_HOST_SHIM
#include "cuda/shim/machine.h"
#define FASTLDM_DEVICE inline
#define FASTLDM_HOST_DEVICE inline
#else
#include <cuda_runtime.h>
#define FASTLDM_DEVICE __device__ __forceinline__
#define FASTLDM_HOST_DEVICE __host__ __device__ __forceinline__
#endif

namespace fastldm::cuda {

// What code is compiled for, as in sm_90: 90. The shim can do everything; 0 in nvcc's pass for the host.
#if defined(FASTLDM_HOST_SHIM)
inline constexpr int kArch = 1000;
#elif defined(__CUDA_ARCH__)
inline constexpr int kArch = __CUDA_ARCH__ / 10;
#else
inline constexpr int kArch = 0;
#endif

inline constexpr int kWarp = 32;

template <class T>
inline void require(bool condition, const T& message) {
  if (!condition) throw std::runtime_error(message);
}

// For code that an architecture does not have, and that `Kernel::min_capability` keeps from being launched.
FASTLDM_DEVICE void unreachable_on_this_architecture() {
#ifndef FASTLDM_HOST_SHIM
  __trap();
#endif
}

}  // namespace fastldm::cuda
