// The matrix products of attention, in registers. Included by attention.cpp only.
//
// All of them are C (+)= A B with C in float32 and operands made for it by attention_pack.h:
//
//   A  row-major, the contraction dimension dense: `a[row * lda + k]`
//   B  a panel with the columns dense:             `b[k * ldb + column]`
//
// Strides and k count units of 32 bits: one float, or two bfloat16 that are neighbours along the contraction, as
// the dot product instructions want them. So float32 and bfloat16 share every loop and every layout.
//
// Columns are vector lanes. In S^T = K Q^T and O^T += V^T P^T they are queries, so that the softmax between the
// two works lane by lane, with no sum or maximum across a register, and a head dim of 40 costs 40 and not 48.
#pragma once

#include "vec.h"

namespace fastldm::FASTLDM_ISA {

using std::int64_t;

static constexpr int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// A tile of C is `rows` x `vectors` registers: 24 (AVX-512) or 12 (AVX2) accumulators, which covers latency times
// throughput of the multiply-add, and leaves room for `vectors` of B and one broadcast of A. Plain: 16 SSE
// registers, two to a Vec.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4, kVectors = 3;
#else
constexpr int kRows = 4, kVectors = 1;
#endif

// The products sum this many units at a time, so that the columns of B that all rows share stay in the first-level
// cache.
constexpr int64_t kMaxDepth = 160;

// What the products of one element type ask of their operands.
template <class E>
struct Operand {
  static constexpr int unit = 4 / sizeof(E);  // elements
  static constexpr int row_step = kRows;      // C has a multiple of these rows
  static constexpr int depth_step = 1;        // and the contraction of these units
  static constexpr int query_vectors = kVectors > 1 ? kVectors : 4;  // lanes of queries in a forward tile

  static int64_t rows(int64_t count) { return round_up(count, row_step); }
  // Units for `count` elements along the contraction.
  static int64_t depth(int64_t count) { return round_up(divide_up(count, unit), depth_step); }
  // Dense rows of `units`, kept off the powers of two that would map the rows of a tile onto few cache sets.
  static int64_t stride(int64_t units) { return units % 64 == 0 ? units + 16 : units; }
};

// How many vectors of the next tile, of `remaining`: a tile of one vector cannot keep the multipliers busy, so
// four are two and two.
static inline int next_vectors(int64_t remaining) {
  return static_cast<int>(kVectors == 3 && remaining == 4 ? 2 : lesser(remaining, kVectors));
}

template <class E>
struct MultiplyAdd;

template <>
struct MultiplyAdd<float> {
  using Register = Vec;
  static Register load(const float* p) { return Vec::load(p); }
  static Register broadcast(const float* p) { return Vec::broadcast(*p); }
  static Vec apply(Register a, Register b, Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
template <>
struct MultiplyAdd<bfloat16> {
  using Register = __m512i;
  static Register load(const bfloat16* p) { return _mm512_loadu_si512(p); }
  static Register broadcast(const bfloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Vec apply(Register a, Register b, Vec c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)}; }
};
#endif

template <class E, int vectors>
static inline void multiply_tile(float* c, int64_t ldc, const E* a, int64_t lda, const E* b, int64_t ldb,
                                 int64_t depth, bool accumulate) {
  using Mac = MultiplyAdd<E>;
  constexpr int unit = Operand<E>::unit;
  const E* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = a + i * lda * unit;
  Vec sum[kRows][vectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < vectors; ++j) sum[i][j] = Vec::broadcast(0.0f);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    typename Mac::Register column[vectors];
    for (int j = 0; j < vectors; ++j) column[j] = Mac::load(b + j * Vec::lanes * unit);
    for (int i = 0; i < kRows; ++i) {
      const typename Mac::Register value = Mac::broadcast(row[i] + k * unit);
      for (int j = 0; j < vectors; ++j) sum[i][j] = Mac::apply(value, column[j], sum[i][j]);
    }
    b += ldb * unit;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < vectors; ++j) {
      float* const target = c + i * ldc + j * Vec::lanes;
      (accumulate ? Vec::load(target) + sum[i][j] : sum[i][j]).store(target);
    }
  }
}

template <class E, int vectors>
static void multiply_columns(float* c, int64_t ldc, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t rows,
                             int64_t depth, bool accumulate) {
  constexpr int unit = Operand<E>::unit;
  for (int64_t k = 0; k < depth; k += kMaxDepth) {
    for (int64_t i = 0; i < rows; i += kRows) {
      multiply_tile<E, vectors>(c + i * ldc, ldc, a + (i * lda + k) * unit, lda, b + k * ldb * unit, ldb,
                                lesser(kMaxDepth, depth - k), accumulate || k > 0);
    }
  }
}

// C (+)= A B for `rows` (a multiple of row_step), `columns` (of the lanes) and `depth` units (of depth_step). The
// order of summation of an element depends on `depth` alone.
template <class E>
static inline void multiply(float* c, int64_t ldc, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t rows,
                            int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t j = 0; j < columns;) {
    const int vectors = next_vectors((columns - j) / Vec::lanes);
    float* const target = c + j;
    const E* const panel = b + j * Operand<E>::unit;
    if constexpr (kVectors == 3) {
      if (vectors == 3) multiply_columns<E, 3>(target, ldc, a, lda, panel, ldb, rows, depth, accumulate);
      if (vectors == 2) multiply_columns<E, 2>(target, ldc, a, lda, panel, ldb, rows, depth, accumulate);
    }
    if (vectors == 1) multiply_columns<E, 1>(target, ldc, a, lda, panel, ldb, rows, depth, accumulate);
    j += vectors * Vec::lanes;
  }
}

}  // namespace fastldm::FASTLDM_ISA

#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif
