// Copies from global to shared memory that go on while the thread does (PTX ISA: cp.async; sm_80).
//
// A thread's copies are made visible to itself by wait_group, to others by a barrier after that. Under the shim the
// bytes are NaN and not to be touched until the wait: nothing is copied earlier.
#pragma once

#include "cuda/common/memory.h"

namespace fastldm::cuda {

// Bytes (16, 8 or 4) from `from` to `to`, both aligned to as many; of them the first `valid` are read, the rest
// become 0. With `valid` 0 nothing is read, and `from` may point anywhere.
template <int Bytes, class T, class U>
FASTLDM_DEVICE void copy_async(const Shared<T>& to, const Global<U>& from, int valid = Bytes) {
  static_assert(std::is_same_v<T, std::remove_const_t<U>>, "both are of one type");
  static_assert(Bytes == 16 || Bytes == 8 || Bytes == 4, "cp.async copies 16, 8 or 4 bytes");
#ifdef FASTLDM_HOST_SHIM
  Access::check("shared", to, Bytes, Bytes);
  if (valid > 0) Access::check("global", from, valid, Bytes);
  shim::copy_async(Access::address(to), reinterpret_cast<const char*>(Access::address(from)), Bytes, valid);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const unsigned destination = Access::shared_address(to);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(Access::address(from)),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(Access::address(from)),
                 "n"(Bytes), "r"(valid)
                 : "memory");
  }
#else
  unreachable_on_this_architecture();
#endif
}

// Closes a group: the thread's copies since the last one, also if there are none.
FASTLDM_DEVICE void commit_group() {
#ifdef FASTLDM_HOST_SHIM
  shim::commit_group();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  unreachable_on_this_architecture();
#endif
}

// Waits until all but the latest `Pending` groups of the thread are there.
template <int Pending>
FASTLDM_DEVICE void wait_group() {
#ifdef FASTLDM_HOST_SHIM
  shim::wait_group(Pending);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#else
  unreachable_on_this_architecture();
#endif
}

}  // namespace fastldm::cuda
