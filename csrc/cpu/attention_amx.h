// The bfloat16 products of attention on AMX tiles. Included by attention_gemm.h only.
//
// A tile is 16 rows of 64 bytes: 16 x 32 bfloat16 of A, 16 units x 16 columns of B, 16 x 16 floats of C, from the
// same layouts that the other instruction sets use. Four tiles of C, two of A and two of B make one load per
// multiplication.
#pragma once

namespace fastldm::FASTLDM_ISA {

template <>
struct Operand<bfloat16> {
  static constexpr int unit = 2;
  static constexpr int row_step = 16;
  static constexpr int depth_step = 16;
  static constexpr int query_vectors = 4;

  static int64_t rows(int64_t count) { return round_up(count, row_step); }
  static int64_t depth(int64_t count) { return round_up(divide_up(count, unit), depth_step); }
  static int64_t stride(int64_t units) { return units % 64 == 0 ? units + 16 : units; }
};

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static const TileConfig kTileConfig;

// The tile registers of this thread, from here to the end of the scope. PyTorch's own kernels on this thread set
// them up anew each time.
struct Tiles {
  Tiles() { _tile_loadconfig(&kTileConfig); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Tiles 0 .. 3 are C, tile (m, n) in 2 m + n; 4 and 5 are A, 6 and 7 are B.
template <int M, int N>
static inline void multiply_tiles(float* c, int64_t ldc, const bfloat16* a, int64_t lda, const bfloat16* b,
                                  int64_t ldb, int64_t depth, bool accumulate) {
  const int64_t c_bytes = 4 * ldc, a_bytes = 4 * lda, b_bytes = 4 * ldb;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (N > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (M > 1) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16) {
    _tile_loadd(4, a + 2 * k, a_bytes);
    _tile_loadd(6, b + 2 * k * ldb, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, b + 2 * (k * ldb + 16), b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, a + 2 * (k + 16 * lda), a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (N > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (M > 1) _tile_stored(2, c + 16 * ldc, c_bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

template <>
inline void multiply<bfloat16>(float* c, int64_t ldc, const bfloat16* a, int64_t lda, const bfloat16* b,
                               int64_t ldb, int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  // Tile loads are not known to the compiler as reads of memory: what was stored before must be there.
  asm volatile("" ::: "memory");
  for (int64_t j = 0; j < columns; j += 32) {
    const bool wide = columns - j > 16;
    for (int64_t i = 0; i < rows; i += 32) {
      const bool tall = rows - i > 16;
      float* const target = c + i * ldc + j;
      const bfloat16* const left = a + 2 * i * lda;
      const bfloat16* const right = b + 2 * j;
      if (tall && wide) multiply_tiles<2, 2>(target, ldc, left, lda, right, ldb, depth, accumulate);
      if (tall && !wide) multiply_tiles<2, 1>(target, ldc, left, lda, right, ldb, depth, accumulate);
      if (!tall && wide) multiply_tiles<1, 2>(target, ldc, left, lda, right, ldb, depth, accumulate);
      if (!tall && !wide) multiply_tiles<1, 1>(target, ldc, left, lda, right, ldb, depth, accumulate);
    }
  }
}

}  // namespace fastldm::FASTLDM_ISA
