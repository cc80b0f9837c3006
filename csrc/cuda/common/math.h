// Functions of float32 that GPUs do in one or two instructions. The approximate ones are good to about 2 units in
// the last place there (PTX ISA: ex2, lg2, rcp, rsqrt .approx); the shim computes them to within one.
#pragma once

#include <cmath>

#include "cuda/common/platform.h"

namespace fastldm::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;

// 2^x; results below the normal range are 0.
FASTLDM_DEVICE float exp2_approx(float x) {
#ifdef FASTLDM_HOST_SHIM
  const float value = std::exp2(x);
  return value < 1.17549435e-38f ? 0.0f : value;
#else
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#endif
}

FASTLDM_DEVICE float exp_approx(float x) { return exp2_approx(x * kLog2E); }

FASTLDM_DEVICE float log2_approx(float x) {
#ifdef FASTLDM_HOST_SHIM
  return std::log2(x);
#else
  float value;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#endif
}

FASTLDM_DEVICE float reciprocal_approx(float x) {
#ifdef FASTLDM_HOST_SHIM
  return 1.0f / x;
#else
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#endif
}

// Correctly rounded, for what is computed once per row or group.
FASTLDM_DEVICE float divide(float x, float y) {
#ifdef FASTLDM_HOST_SHIM
  return x / y;
#else
  return __fdiv_rn(x, y);
#endif
}

FASTLDM_DEVICE float square_root(float x) {
#ifdef FASTLDM_HOST_SHIM
  return std::sqrt(x);
#else
  return __fsqrt_rn(x);
#endif
}

FASTLDM_DEVICE float fused_multiply_add(float x, float y, float z) {
#ifdef FASTLDM_HOST_SHIM
  return std::fma(x, y, z);
#else
  return __fmaf_rn(x, y, z);
#endif
}

FASTLDM_DEVICE double fused_multiply_add(double x, double y, double z) {
#ifdef FASTLDM_HOST_SHIM
  return std::fma(x, y, z);
#else
  return __fma_rn(x, y, z);
#endif
}

// Rounded on its own: nvcc would fuse a plain product with the sum that it goes into.
FASTLDM_DEVICE double multiply(double x, double y) {
#ifdef FASTLDM_HOST_SHIM
  return x * y;
#else
  return __dmul_rn(x, y);
#endif
}

// A number, where one of the two is not one.
FASTLDM_DEVICE float max_number(float x, float y) {
#ifdef FASTLDM_HOST_SHIM
  return std::fmax(x, y);
#else
  return fmaxf(x, y);
#endif
}

FASTLDM_DEVICE float min_number(float x, float y) {
#ifdef FASTLDM_HOST_SHIM
  return std::fmin(x, y);
#else
  return fminf(x, y);
#endif
}

}  // namespace fastldm::cuda
