// Vec on AVX2 with FMA and F16C. Included by vec.h only.
#pragma once

#include <immintrin.h>

namespace fastldm::FASTLDM_ISA {

struct Vec {
  static constexpr int lanes = 8;
  __m256 v;

  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) {
    return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Vec load(const float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }

  // The first `count` (0 .. lanes) elements; the other lanes are 0 and their memory is not touched.
  static Vec load_partial(const float* p, int count) { return {_mm256_maskload_ps(p, mask(count))}; }
  static Vec load_partial(const bfloat16* p, int count) { return widen_bf16(load_halves(p, count)); }
  static Vec load_partial(const float16* p, int count) { return {_mm256_cvtph_ps(load_halves(p, count))}; }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bfloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16()); }
  void store(float16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_fp16()); }

  void store_partial(float* p, int count) const { _mm256_maskstore_ps(p, mask(count), v); }
  void store_partial(bfloat16* p, int count) const { store_halves(p, narrow_bf16(), count); }
  void store_partial(float16* p, int count) const { store_halves(p, narrow_fp16(), count); }

  static __m256i mask(int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
  }

 private:
  static __m128i load_halves(const void* p, int count) {
    __m128i halves = _mm_setzero_si128();
    std::memcpy(&halves, p, 2 * static_cast<std::size_t>(count));
    return halves;
  }

  static void store_halves(void* p, __m128i halves, int count) {
    std::memcpy(p, &halves, 2 * static_cast<std::size_t>(count));
  }

  static Vec widen_bf16(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }

  // Rounds to nearest even; NaN stays NaN.
  __m128i narrow_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }

  __m128i narrow_fp16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
// a * b + c
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

static inline float reduce_add(Vec a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

static inline float reduce_max(Vec a) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}

// x * 2^n for whole n in -150 .. 129 and x in 0.5 .. 2, with underflow to 0 and overflow to infinity.
static inline Vec scale_by_power_of_two(Vec x, Vec n) {
  // In two steps: 2^n itself may be out of range.
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}
// `result`, but NaN where `x` is.
static inline Vec keep_nan(Vec result, Vec x) {
  return {_mm256_blendv_ps(result.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
}
// x where a < b, else y; y where either is NaN.
static inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
// Bit i is 1 unless a > b in lane i, so also where either is NaN.
static inline std::uint32_t bits_not_greater(Vec a, Vec b) {
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NGT_UQ)));
}

}  // namespace fastldm::FASTLDM_ISA
