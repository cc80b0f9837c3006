// The fused score-and-minimum kernels of vq_nearest. Included by vq.cpp only.
//
// A kernel goes over the packed codes, a vector of codes at a time, with several rows of z, and keeps for each row
// and lane the least score, the place where it was, and the least score of all other places: `Lanes`. A place is a
// vector of codes or a block of several. Then the lanes are merged. Indices are exact where the next best score is
// more than `slack` above the best, and only there are they used, so it does not matter which of equals is kept.
//
// Two kernels: `FewDimensions` holds z in registers and does nothing per vector but D multiply-adds and one
// minimum; `ManyDimensions` is a register-blocked matrix product.
#pragma once

#include "vq_codes.h"

namespace fastldm::FASTLDM_ISA {

struct alignas(64) Lanes {
  float best[Vec::lanes];
  float second[Vec::lanes];
  float place[Vec::lanes];  // whole numbers, below 2^24: a chunk has fewer than 10000 vectors
};

static inline void clear(Lanes& lanes) {
  const Vec infinity = Vec::broadcast(__builtin_inff());
  infinity.store(lanes.best);
  infinity.store(lanes.second);
  Vec::broadcast(0.0f).store(lanes.place);
}

static inline void note(Vec score, Vec place, Vec& best, Vec& second, Vec& best_place) {
  second = min(second, max(best, score));
  best_place = select_less(score, best, place, best_place);
  best = min(best, score);
}

// The least score of a row, its lane and place, and a score that no other place of any lane is below.
struct Least {
  float best, second;
  int lane;
  int64_t place;
};

static inline float reduce_min(Vec a) { return -reduce_max(-a); }

static inline Least merge(const Lanes& lanes) {
  const Vec best = Vec::load(lanes.best);
  const float least = reduce_min(best);
  const Vec bound = Vec::broadcast(least);
  const std::uint32_t at = bits_not_greater(best, bound);
  const int lane = __builtin_ctz(at);
  const bool shared = (at & (at - 1)) != 0;
  const float others = reduce_min(select_less(bound, best, best, Vec::load(lanes.second)));
  return {least, shared ? least : others, lane, static_cast<int64_t>(lanes.place[lane])};
}

// z - c of one row times `factor`, rounded to float32.
static inline void centre_row(const float* __restrict row, const double* __restrict centre, double factor,
                              int64_t count, float* __restrict target) {
  for (int64_t d = 0; d < count; ++d) {
    target[d] = static_cast<float>((static_cast<double>(row[d]) - centre[d]) * factor);
  }
}

// D <= 8. The least score of a block of vectors is noted as one; `find` looks for it in the block again.
template <int Dim>
struct FewDimensions {
  static constexpr int panel_vectors = 1;
  static constexpr int block = 16;
#if defined(__AVX512F__)
  static constexpr int rows_together = 4;
#else
  static constexpr int rows_together = 2;
#endif
  static constexpr int rows_ranked = 1;
  // With their Lanes, and the codes that stay beside them, these fit in the first-level cache.
  static int64_t rows_at_once(int64_t) { return 64; }
  static constexpr int64_t resident_bytes = 16 << 10;
  static constexpr int panel_floats = (1 + Dim) * Vec::lanes;

  static int64_t row_floats(int64_t) { return Dim; }
  static float* row_of(float* z, int64_t row, int, int64_t) { return z + row * Dim; }

  // Writes -2 z' for one row; its squared length.
  static float pack_row(const float* row, const double* centre, double scale, int64_t, int, float* target) {
    float sum = 0.0f;
    centre_row(row, centre, -2.0 * scale, Dim, target);
    for (int d = 0; d < Dim; ++d) sum += target[d] * target[d];
    return sum;
  }

  static void clear_row(float* target, int64_t, int) {
    for (int d = 0; d < Dim; ++d) target[d] = 0.0f;
  }

  static void scan(const float* z, int64_t rows, const Codes& codes, int64_t, Lanes* lanes) {
    constexpr int64_t resident = larger_constant(resident_bytes / (block * panel_floats * 4));
    const int64_t blocks = codes.panels() / block;
    for (int64_t first = 0; first < blocks; first += resident) {
      const int64_t last = smaller(first + resident, blocks);
      for (int64_t r = 0; r < rows; r += rows_together) {
        scan_blocks(z + r * Dim, codes.packed(), first, last, lanes + r);
      }
    }
  }

  // Calls hit(0, vector, bits) for each of `count` vectors from `first` on that holds codes with a score of at most
  // *limit.
  template <class Hit>
  static void find(const float* z, const float* limit, const float* packed, int64_t first, int64_t count, int64_t,
                   const Hit& hit) {
    Vec row[Dim];
    for (int d = 0; d < Dim; ++d) row[d] = Vec::broadcast(z[d]);
    const Vec bound = Vec::broadcast(*limit);
    const float* panel = packed + first * panel_floats;
    for (int64_t v = first; v < first + count; ++v, panel += panel_floats) {
      Vec score = Vec::load(panel);
      for (int d = 0; d < Dim; ++d) score = fma(row[d], Vec::load(panel + (1 + d) * Vec::lanes), score);
      const std::uint32_t bits = bits_not_greater(score, bound);
      if (bits != 0) hit(0, v, bits);
    }
  }

 private:
  static constexpr int64_t larger_constant(int64_t x) { return x > 1 ? x : 1; }

  static void scan_blocks(const float* z, const float* packed, int64_t first, int64_t last, Lanes* lanes) {
    Vec row[rows_together][Dim];
    for (int r = 0; r < rows_together; ++r) {
      for (int d = 0; d < Dim; ++d) row[r][d] = Vec::broadcast(z[r * Dim + d]);
    }
    const float* panel = packed + first * block * panel_floats;
    for (int64_t b = first; b < last; ++b) {
      Vec least[rows_together];
      for (int r = 0; r < rows_together; ++r) least[r] = Vec::broadcast(__builtin_inff());
      for (int v = 0; v < block; ++v, panel += panel_floats) {
        const Vec norm = Vec::load(panel);
        Vec code[Dim];
        for (int d = 0; d < Dim; ++d) code[d] = Vec::load(panel + (1 + d) * Vec::lanes);
        for (int r = 0; r < rows_together; ++r) {
          Vec score = norm;
          for (int d = 0; d < Dim; ++d) score = fma(row[r][d], code[d], score);
          least[r] = min(least[r], score);
        }
      }
      const Vec place = Vec::broadcast(static_cast<float>(b));
      for (int r = 0; r < rows_together; ++r) {
        Vec best = Vec::load(lanes[r].best), second = Vec::load(lanes[r].second);
        Vec best_place = Vec::load(lanes[r].place);
        note(least[r], place, best, second, best_place);
        best.store(lanes[r].best);
        second.store(lanes[r].second);
        best_place.store(lanes[r].place);
      }
    }
  }
};

// Any D. Rows are packed in tiles of `tile` rows: 64 components of each row of the tile, then the next 64.
struct ManyDimensions {
#if defined(__AVX512F__)
  static constexpr int rows_together = 12, panel_vectors = 2;
#elif defined(__AVX2__)
  static constexpr int rows_together = 6, panel_vectors = 2;
#else
  static constexpr int rows_together = 4, panel_vectors = 1;
#endif
  static constexpr int block = 1;
  static constexpr int rows_ranked = 4;
  static constexpr int width = panel_vectors * Vec::lanes;
  static constexpr int depth = 64;

  // Packed rows beside which a panel goes round in the second-level cache.
  static int64_t rows_at_once(int64_t dim) {
    const int64_t room = (96 << 10) / num_threads() * 2;
    const int64_t tile_bytes = rows_together * row_floats(dim) * static_cast<int64_t>(sizeof(float));
    return rows_together * larger(1, smaller(96 / rows_together, room / tile_bytes));
  }

  static int64_t row_floats(int64_t dim) { return ceil_div(dim, depth) * depth; }
  static float* row_of(float* z, int64_t row, int tile, int64_t dim) {
    return z + row / tile * tile * row_floats(dim) + row % tile * depth;
  }

  // Writes -2 z' for one row of a tile; its squared length.
  static float pack_row(const float* row, const double* centre, double scale, int64_t dim, int tile, float* target) {
    Vec sum = Vec::broadcast(0.0f);
    for (int64_t first = 0; first < dim; first += depth, target += tile * depth) {
      const int64_t size = smaller(depth, dim - first);
      centre_row(row + first, centre + first, -2.0 * scale, size, target);
      for (int64_t d = 0; d < size; d += Vec::lanes) {
        const Vec part = Vec::load_partial(target + d, static_cast<int>(smaller(Vec::lanes, size - d)));
        sum = fma(part, part, sum);
      }
    }
    return reduce_add(sum);
  }

  static void clear_row(float* target, int64_t dim, int tile) {
    for (int64_t first = 0; first < dim; first += depth, target += tile * depth) {
      for (int d = 0; d < depth; ++d) target[d] = 0.0f;
    }
  }

  static void scan(const float* z, int64_t rows, const Codes& codes, int64_t dim, Lanes* lanes) {
    const float* panel = codes.packed();
    for (int64_t p = 0; p < codes.panels(); ++p, panel += codes.panel_floats) {
      for (int64_t first = 0; first < rows; first += rows_together) {
        Vec score[rows_together][panel_vectors];
        score_tile(z + first * row_floats(dim), panel, dim, score);
        for (int r = 0; r < rows_together; ++r) {
          Lanes& row = lanes[first + r];
          Vec best = Vec::load(row.best), second = Vec::load(row.second), place = Vec::load(row.place);
          for (int v = 0; v < panel_vectors; ++v) {
            note(score[r][v], Vec::broadcast(static_cast<float>(p * panel_vectors + v)), best, second, place);
          }
          best.store(row.best);
          second.store(row.second);
          place.store(row.place);
        }
      }
    }
  }

  // Calls hit(r, vector, bits) for each of `count` vectors from `first` on that holds codes whose score with row r
  // of a tile of rows_ranked is at most limits[r].
  template <class Hit>
  static void find(const float* z, const float* limits, const float* packed, int64_t first, int64_t count,
                   int64_t dim, const Hit& hit) {
    for (int64_t p = first / panel_vectors; p < (first + count) / panel_vectors; ++p) {
      Vec score[rows_ranked][panel_vectors];
      score_tile(z, packed + p * (1 + dim) * width, dim, score);
      for (int r = 0; r < rows_ranked; ++r) {
        const Vec bound = Vec::broadcast(limits[r]);
        for (int v = 0; v < panel_vectors; ++v) {
          const std::uint32_t bits = bits_not_greater(score[r][v], bound);
          if (bits != 0) hit(r, p * panel_vectors + v, bits);
        }
      }
    }
  }

 private:
  template <int Rows>
  __attribute__((always_inline)) static inline void score_tile(const float* z, const float* panel, int64_t dim,
                                                               Vec (&score)[Rows][panel_vectors]) {
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < panel_vectors; ++v) score[r][v] = Vec::load(panel + v * Vec::lanes);
    }
    const float* codes = panel + width;
    for (int64_t first = 0; first < dim; first += depth, z += Rows * depth) {
      const int size = static_cast<int>(smaller(depth, dim - first));
      for (int d = 0; d < size; ++d, codes += width) {
        Vec code[panel_vectors];
#pragma GCC unroll 2
        for (int v = 0; v < panel_vectors; ++v) code[v] = Vec::load(codes + v * Vec::lanes);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
          const Vec x = Vec::broadcast(z[r * depth + d]);
#pragma GCC unroll 2
          for (int v = 0; v < panel_vectors; ++v) score[r][v] = fma(x, code[v], score[r][v]);
        }
      }
    }
  }
};

}  // namespace fastldm::FASTLDM_ISA
