// A vector of float32 lanes for the instruction set that this translation unit is compiled for, in the
// namespace fastldm::FASTLDM_ISA. Three versions with one interface: AVX-512, AVX2 and plain loops that the
// compiler turns into what the machine has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/types.h"

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_plain.h"
#endif

namespace fastldm::FASTLDM_ISA {

static inline float to_float(float x) { return x; }

static inline float to_float(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

static inline float to_float(float16 x) {
  float lanes[Vec::lanes];
  Vec::load_partial(&x, 1).store(lanes);
  return lanes[0];
}

// Writes float32 `x` rounded to nearest even.
template <class T>
static inline void store_one(T* target, float x) {
  Vec::broadcast(x).store_partial(target, 1);
}

static inline Vec operator-(Vec x) { return Vec::broadcast(0.0f) - x; }

// exp(x) within 2 units in the last place; 0 below -103.97, infinity above 88.72, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts keeps r exact, and the polynomial is the Taylor series
// to r^7, whose remainder is below 2^-25 there.
static inline Vec exp(Vec x) {
  const Vec clamped = min(max(x, Vec::broadcast(-104.0f)), Vec::broadcast(89.0f));
  const Vec n = round(clamped * Vec::broadcast(1.44269504088896341f));
  Vec r = fma(n, Vec::broadcast(-0.693145751953125f), clamped);
  r = fma(n, Vec::broadcast(-1.42860682030941723e-6f), r);
  Vec p = Vec::broadcast(1.0f / 5040.0f);
  p = fma(p, r, Vec::broadcast(1.0f / 720.0f));
  p = fma(p, r, Vec::broadcast(1.0f / 120.0f));
  p = fma(p, r, Vec::broadcast(1.0f / 24.0f));
  p = fma(p, r, Vec::broadcast(1.0f / 6.0f));
  p = fma(p, r, Vec::broadcast(0.5f));
  p = fma(p, r, Vec::broadcast(1.0f));
  p = fma(p, r, Vec::broadcast(1.0f));
  return keep_nan(scale_by_power_of_two(p, n), x);
}

static inline Vec sigmoid(Vec x) {
  const Vec one = Vec::broadcast(1.0f);
  return one / (one + exp(-x));
}

}  // namespace fastldm::FASTLDM_ISA
