// Rows of q, k, v and gradients as operands of attention_gemm.h, and back. Included by attention.cpp only.
//
// Three element types come in: float32 and float16 become float operands, bfloat16 stays what it is where the
// machine multiplies it and becomes float elsewhere.
#pragma once

#include "attention_gemm.h"

namespace fastldm::FASTLDM_ISA {

template <class T>
struct OperandType {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct OperandType<bfloat16> {
  using type = bfloat16;
};
#endif

// `count` rows of one head; rows from `count` on read as 0.
template <class T>
struct RowsOf {
  const T* data;
  int64_t stride, count;

  const T* row(int64_t index) const { return data + index * stride; }
  RowsOf from(int64_t first) const { return {data + first * stride, stride, count - first}; }
};

// x[i] lane j becomes x[j] lane i.
#if defined(__AVX512F__)
static inline void transpose(Vec (&x)[16]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(t[i + half]), high = _mm512_castps_pd(t[i + half + 2]);
      u[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      u[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // u[i + c]: its 128-bit part p holds column 4 p + c of rows i .. i + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 even_top = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
    const __m512 even_bottom = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 odd_top = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 odd_bottom = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    x[c].v = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
    x[4 + c].v = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
    x[8 + c].v = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
    x[12 + c].v = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
  }
}
#elif defined(__AVX2__)
static inline void transpose(Vec (&x)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m256d low = _mm256_castps_pd(t[i + half]), high = _mm256_castps_pd(t[i + half + 2]);
      u[i + 2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      u[i + 2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int c = 0; c < 4; ++c) {
    x[c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    x[4 + c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}
#else
static inline void transpose(Vec (&x)[Vec::lanes]) {
  for (int i = 0; i < Vec::lanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = swapped;
    }
  }
}
#endif

// target[column][row] = load(row, column, columns left), for `rows`, a multiple of the lanes.
template <class Load>
static inline void transpose_into(float* target, int64_t ld, int64_t rows, int64_t columns, const Load& load) {
  for (int64_t row = 0; row < rows; row += Vec::lanes) {
    for (int64_t column = 0; column < columns; column += Vec::lanes) {
      const int count = static_cast<int>(lesser(Vec::lanes, columns - column));
      Vec x[Vec::lanes];
      for (int i = 0; i < Vec::lanes; ++i) x[i] = load(row + i, column, count);
      transpose(x);
      for (int j = 0; j < count; ++j) x[j].store(target + (column + j) * ld + row);
    }
  }
}

static inline void zero(float* target, int64_t count) {
  if (count > 0) std::memset(target, 0, sizeof(float) * static_cast<std::size_t>(count));
}

// Packed operands are addressed in units of 32 bits.
static inline float* units(float* p) { return p; }
static inline float* units(bfloat16* p) { return reinterpret_cast<float*>(p); }

// Elements column .. column + count - 1 of a row, in float32 times `factor`.
template <class T>
static inline Vec read_units(const RowsOf<T>& source, int64_t row, int64_t column, int count, Vec factor, float) {
  if (row >= source.count) return Vec::broadcast(0.0f);
  const T* const p = source.row(row) + column;
  return (count == Vec::lanes ? Vec::load(p) : Vec::load_partial(p, count)) * factor;
}

// The same where two neighbouring rows are neighbours along the contraction.
template <class T>
static inline Vec read_row_units(const RowsOf<T>& source, int64_t row, int64_t column, int count, float) {
  if (row >= source.count) return Vec::broadcast(0.0f);
  const T* const p = source.row(row) + column;
  return count == Vec::lanes ? Vec::load(p) : Vec::load_partial(p, count);
}

#if defined(__AVX512BF16__)
// Pairs of neighbours in a row. The sign of `factor` is all of it that bfloat16 can take without rounding; the
// softmax applies the rest.
static inline Vec read_units(const RowsOf<bfloat16>& source, int64_t row, int64_t column, int count, Vec factor,
                             bfloat16) {
  if (row >= source.count) return Vec::broadcast(0.0f);
  const __m512i bits = _mm512_maskz_loadu_epi32(Vec::mask(count), source.row(row) + 2 * column);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(factor.v), _mm512_set1_epi32(int(0x80000000u)));
  const __m512i signs = _mm512_or_si512(sign, _mm512_srli_epi32(sign, 16));
  return {_mm512_castsi512_ps(_mm512_xor_si512(bits, signs))};
}

// Pairs of one column: rows 2 row and 2 row + 1.
static inline Vec read_row_units(const RowsOf<bfloat16>& source, int64_t row, int64_t column, int count, bfloat16) {
  const __mmask16 mask = Vec::mask(count);
  __m512i low = _mm512_setzero_si512(), high = low;
  if (2 * row < source.count) {
    low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source.row(2 * row) + column));
  }
  if (2 * row + 1 < source.count) {
    high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source.row(2 * row + 1) + column));
  }
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
#endif

// Operand A with the head dim along the contraction: target[row][unit of d].
template <class E, class T>
static void pack_rows(E* target, int64_t ld, const RowsOf<T>& source, int64_t rows, int64_t head_dim) {
  const int64_t width = head_dim / Operand<E>::unit;
  const Vec one = Vec::broadcast(1.0f);
  for (int64_t row = 0; row < rows; ++row) {
    float* const line = units(target) + row * ld;
    for (int64_t column = 0; column < width; column += Vec::lanes) {
      const int count = static_cast<int>(lesser(Vec::lanes, width - column));
      read_units(source, row, column, count, one, E{}).store_partial(line + column, count);
    }
    zero(line + width, Operand<E>::depth(head_dim) - width);
  }
}

// Operand A with the rows along the contraction: target[d][unit of rows].
template <class E, class T>
static void pack_columns(E* target, int64_t ld, const RowsOf<T>& source, int64_t rows, int64_t head_dim) {
  const int64_t width = round_up(divide_up(rows, Operand<E>::unit), Vec::lanes);
  transpose_into(units(target), ld, width, head_dim, [&](int64_t row, int64_t column, int count) {
    return read_row_units(source, row, column, count, E{});
  });
  for (int64_t row = head_dim; row < Operand<E>::rows(head_dim); ++row) zero(units(target) + row * ld, width);
}

// Operand B with the head dim along the contraction: target[unit of d][row], times `factor`.
template <class E, class T>
static void pack_panel(E* target, int64_t ld, const RowsOf<T>& source, int64_t rows, int64_t head_dim, float factor) {
  const int64_t width = head_dim / Operand<E>::unit;
  const Vec times = Vec::broadcast(factor);
  transpose_into(units(target), ld, rows, width, [&](int64_t row, int64_t column, int count) {
    return read_units(source, row, column, count, times, E{});
  });
  for (int64_t row = width; row < Operand<E>::depth(head_dim); ++row) zero(units(target) + row * ld, rows);
}

// Operand B with the rows along the contraction: target[unit of rows][d], columns filled up to the lanes.
template <class E, class T>
static void pack_row_panel(E* target, int64_t ld, const RowsOf<T>& source, int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < Operand<E>::depth(rows); ++row) {
    for (int64_t column = 0; column < head_dim; column += Vec::lanes) {
      const int count = static_cast<int>(lesser(Vec::lanes, head_dim - column));
      read_row_units(source, row, column, count, E{}).store(units(target) + row * ld + column);
    }
  }
}

template <class T>
static inline void write_units(T* target, Vec x, int count) {
  if (count == Vec::lanes) {
    x.store(target);
  } else {
    x.store_partial(target, count);
  }
}

// Rows of a tensor from source[d][row] times factors[row].
template <class T>
static void write_columns(T* target, int64_t stride, const float* source, int64_t ld, const float* factors,
                          int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows; row += Vec::lanes) {
    const Vec factor = Vec::load(factors + row);
    const int row_count = static_cast<int>(lesser(Vec::lanes, rows - row));
    for (int64_t d = 0; d < head_dim; d += Vec::lanes) {
      const int count = static_cast<int>(lesser(Vec::lanes, head_dim - d));
      Vec x[Vec::lanes];
      for (int i = 0; i < Vec::lanes; ++i) {
        x[i] = i < count ? Vec::load(source + (d + i) * ld + row) * factor : Vec::broadcast(0.0f);
      }
      transpose(x);
      for (int j = 0; j < row_count; ++j) write_units(target + (row + j) * stride + d, x[j], count);
    }
  }
}

// Rows of a tensor from source[row][d] times `factor`.
template <class T>
static void write_rows(T* target, int64_t stride, const float* source, int64_t ld, float factor, int64_t rows,
                       int64_t head_dim) {
  const Vec times = Vec::broadcast(factor);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < head_dim; d += Vec::lanes) {
      const int count = static_cast<int>(lesser(Vec::lanes, head_dim - d));
      write_units(target + row * stride + d, Vec::load(source + row * ld + d) * times, count);
    }
  }
}

}  // namespace fastldm::FASTLDM_ISA
