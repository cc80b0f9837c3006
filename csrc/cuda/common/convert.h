// Between float32 and the 16-bit types, tf32, and pairs of 16 bits in a register. To nearest, ties to even,
// except tf32, which rounds ties away from zero as cvt.rna does.
#pragma once

#include "cuda/common/platform.h"

#ifndef FASTLDM_HOST_SHIM
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastldm::cuda {

FASTLDM_DEVICE float bits_as_float(std::uint32_t bits) {
#ifdef FASTLDM_HOST_SHIM
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#else
  return __uint_as_float(bits);
#endif
}

FASTLDM_DEVICE std::uint32_t float_as_bits(float value) {
#ifdef FASTLDM_HOST_SHIM
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#else
  return __float_as_uint(value);
#endif
}

FASTLDM_DEVICE float to_float(float x) { return x; }

FASTLDM_DEVICE float to_float(bfloat16 x) { return bits_as_float(static_cast<std::uint32_t>(x.bits) << 16); }

FASTLDM_DEVICE float to_float(float16 x) {
#ifdef FASTLDM_HOST_SHIM
  return shim::half_to_float(x.bits);
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}

template <class T>
FASTLDM_DEVICE T from_float(float x);

template <>
FASTLDM_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
FASTLDM_DEVICE float16 from_float<float16>(float x) {
#ifdef FASTLDM_HOST_SHIM
  return {shim::float_to_half(x)};
#else
  return {__half_as_ushort(__float2half_rn(x))};
#endif
}

template <>
FASTLDM_DEVICE bfloat16 from_float<bfloat16>(float x) {
#ifdef FASTLDM_HOST_SHIM
  return {shim::float_to_bfloat16(x)};
#else
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#endif
}

// Two elements in one register, the first in the low half, as fragments of matrices hold them.
template <class T>
FASTLDM_DEVICE std::uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2, "pairs are of 16-bit elements");
#ifndef FASTLDM_HOST_SHIM
  std::uint32_t pair;
  if constexpr (std::is_same_v<T, float16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return from_float<T>(low).bits | static_cast<std::uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

template <class T>
FASTLDM_DEVICE void unpack(std::uint32_t pair, float& low, float& high) {
  low = to_float(T{static_cast<std::uint16_t>(pair)});
  high = to_float(T{static_cast<std::uint16_t>(pair >> 16)});
}

// The bits of x rounded to 10 bits of mantissa, as mma_16x8x8_tf32 takes them.
FASTLDM_DEVICE std::uint32_t to_tf32(float x) {
#ifdef FASTLDM_HOST_SHIM
  const std::uint32_t bits = float_as_bits(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
#else
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

}  // namespace fastldm::cuda
