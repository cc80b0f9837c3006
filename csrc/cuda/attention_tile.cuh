// What the attention kernels share: rows of heads in shared memory, products of 16-bit tiles, the softmax.
//
// A tile of head vectors lies row by row in shared memory. The pitch of its rows is an odd number of 16-byte units, so
// the 8 rows of a matrix that ldmatrix reads, and the 8 lanes of a quarter warp that copy, lie in different banks: 40
// and 72 need nothing for that, an even number of units one more unit.
//
// Dim is a multiple of 8. Products over it take steps of 16 and, for what 40 or 72 have beyond, one of 8: nothing is
// computed on padding. A head dim for which no Dim was made takes the next larger one; fetch makes the rest 0.
#pragma once

#include "cuda/common/device.h"

namespace fastldm::cuda::attention {

inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kLn2 = 0.6931471805599453f;

FASTLDM_HOST_DEVICE constexpr int pitch_of(int dim) { return dim / 8 % 2 == 1 ? dim : dim + 8; }

// A (B, H, S, D) tensor with a dense last dimension, rows at multiples of 16 bytes; strides in elements.
template <class T>
struct Heads {
  Global<T> data;
  std::int64_t batch, head, row;

  FASTLDM_DEVICE Global<T> at(std::int64_t b, std::int64_t h) const { return data + (b * batch + h * head); }
};

// What a mask says: which keys are open, to all queries or to each; or what is added to scores, in T or in float32.
enum class MaskKind { none, keys, scores, added, added_floats };

// Strides are in bytes, 0 where the mask is broadcast. Without a mask `data` is empty.
struct Mask {
  Global<const std::uint8_t> data;
  std::int64_t batch, head, query, key;
  MaskKind kind;
};

// What every kernel is told of the problem. Scores begin as products q k, their sign turned by `flip` (0x80008000)
// where the scale is negative. Where a mask is added they become |scale| q k + mask, else they stay. A unit of them
// is `size`, and exp(size x) = exp2(unit x): what is subtracted of scores is so before anything is multiplied, as a
// score may be 1e10.
struct Problem {
  int heads, queries, keys, dim;
  int causal;
  std::uint32_t flip;
  float scale;  // |scale|, not 0
  float size;   // |scale|, or 1 where a mask is added
  float unit;
  Mask mask;
};

// The block's place: along x run the tiles of one head, so that blocks that run together share its rows in the L2.
struct Place {
  std::int64_t batch, head, both;
  int tile;
};

FASTLDM_DEVICE Place place_of(const Problem& problem, int tiles) {
  const int both = block_x() / tiles;
  return {both / problem.heads, both % problem.heads, both, block_x() % tiles};
}

FASTLDM_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rows first .. first + Rows - 1 of a head, `Lanes` threads of which this is number `lane`. Rows from `count` on and
// columns from `dim` on are 0.
template <int Rows, int Dim, int Lanes, class T>
FASTLDM_DEVICE void fetch(const Shared<T>& to, const Global<const T>& from, std::int64_t stride, int first, int count,
                          int dim, int lane) {
  constexpr int units = Dim / 8;
#pragma unroll
  for (int i = lane; i < Rows * units; i += Lanes) {
    const int row = i / units, column = i % units * 8;
    const bool inside = first + row < count && column < dim;
    copy_async<16>(to + row * pitch_of(Dim) + column, from + (inside ? (first + row) * stride + column : 0),
                   inside ? 16 : 0);
  }
}

// The left factor of a product over Dim: M times 16 rows of a tile, from `tile` on. `Held` keeps it in registers.
template <class T, int M, int Dim, bool Held>
struct Left {
  Shared<const T> tile;
  std::uint32_t flip;
  std::uint32_t held[Held ? M : 1][Held ? Dim / 8 : 1][2];

  FASTLDM_DEVICE void hold() {
    if constexpr (Held) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int k = 0; k + 16 <= Dim; k += 16) {
          std::uint32_t a[4];
          read(a, m, k);
          held[m][k / 8][0] = a[0], held[m][k / 8][1] = a[1];
          held[m][k / 8 + 1][0] = a[2], held[m][k / 8 + 1][1] = a[3];
        }
        if constexpr (Dim % 16 == 8) {
          std::uint32_t a[2];
          read(a, m, Dim - 8);
          held[m][Dim / 8 - 1][0] = a[0], held[m][Dim / 8 - 1][1] = a[1];
        }
      }
    }
  }

  // Columns k .. k + 4 N - 1.
  template <int N>
  FASTLDM_DEVICE void get(std::uint32_t (&a)[N], int m, int k) const {
    if constexpr (Held) {
#pragma unroll
      for (int i = 0; i < N; ++i) a[i] = held[m][k / 8 + i / 2][i % 2];
    } else {
      read(a, m, k);
    }
  }

 private:
  template <int N>
  FASTLDM_DEVICE void read(std::uint32_t (&a)[N], int m, int k) const {
    const int lane = lane_id();
    load_matrices(a, tile + ((16 * m + lane % 16) * pitch_of(Dim) + k + (N == 4 ? lane / 16 * 8 : 0)));
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] ^= flip;
  }
};

template <int M, int N>
FASTLDM_DEVICE void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
    }
  }
}

// c = left right^T over Dim: `right` is a tile whose rows 0 .. 8 N - 1 are the columns of c. N is even, or 1 where Dim
// is a multiple of 32.
template <class T, int Dim, int M, int N, bool Held>
FASTLDM_DEVICE void inner(float (&c)[M][N][4], const Left<T, M, Dim, Held>& left, const Shared<const T>& right) {
  static_assert(N % 2 == 0 || (N == 1 && Dim % 32 == 0), "columns come in pairs of 8");
  constexpr int pitch = pitch_of(Dim);
  const int lane = lane_id();
  clear(c);
  if constexpr (N == 1) {
#pragma unroll
    for (int k = 0; k < Dim; k += 32) {
      std::uint32_t b[4];
      load_matrices(b, right + (lane % 8 * pitch + k + lane / 8 * 8));
      const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        std::uint32_t a[4];
        left.get(a, m, k);
        mma_16x8x16<T>(c[m][0], a, first);
        left.get(a, m, k + 16);
        mma_16x8x16<T>(c[m][0], a, second);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k + 16 <= Dim; k += 16) {
      std::uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) left.get(a[m], m, k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        std::uint32_t b[4];
        load_matrices(b, right + ((8 * n + lane / 16 * 8 + lane % 8) * pitch + k + lane / 8 % 2 * 8));
        const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma_16x8x16<T>(c[m][n], a[m], first);
          mma_16x8x16<T>(c[m][n + 1], a[m], second);
        }
      }
    }
  }
  if constexpr (Dim % 16 == 8) {
    std::uint32_t a[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) left.get(a[m], m, Dim - 8);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      std::uint32_t b[2];
      load_matrices(b, right + ((8 * n + lane % 16) * pitch + Dim - 8));
      const std::uint32_t first[1] = {b[0]}, second[1] = {b[1]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_16x8x8<T>(c[m][n], a[m], first);
        mma_16x8x8<T>(c[m][n + 1], a[m], second);
      }
    }
  }
}

// c += left right, 16 deep: the left factor in fragments, 16 rows of a tile with the pitch of Dim from `right` on.
template <class T, int Dim, int M, int N>
FASTLDM_DEVICE void outer_step(float (&c)[M][N][4], const std::uint32_t (&a)[M][4], const Shared<const T>& right) {
  constexpr int pitch = pitch_of(Dim);
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n + 2 <= N; n += 2) {
    std::uint32_t b[4];
    load_matrices<4, true>(b, right + (lane % 16 * pitch + 8 * n + lane / 16 * 8));
    const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma_16x8x16<T>(c[m][n], a[m], first);
      mma_16x8x16<T>(c[m][n + 1], a[m], second);
    }
  }
  if constexpr (N % 2 == 1) {
    std::uint32_t b[2];
    load_matrices<2, true>(b, right + (lane % 16 * pitch + 8 * (N - 1)));
#pragma unroll
    for (int m = 0; m < M; ++m) mma_16x8x16<T>(c[m][N - 1], a[m], b);
  }
}

// c += w right, for weights w in float32 as a product left them, rounded to T; `right` has 8 W rows.
template <class T, int Dim, int M, int N, int W>
FASTLDM_DEVICE void outer(float (&c)[M][N][4], const float (&w)[M][W][4], const Shared<const T>& right) {
  static_assert(W % 2 == 0, "rows come in pairs of 8");
#pragma unroll
  for (int k = 0; k < W; k += 2) {
    std::uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      a[m][0] = pack<T>(w[m][k][0], w[m][k][1]);
      a[m][1] = pack<T>(w[m][k][2], w[m][k][3]);
      a[m][2] = pack<T>(w[m][k + 1][0], w[m][k + 1][1]);
      a[m][3] = pack<T>(w[m][k + 1][2], w[m][k + 1][3]);
    }
    outer_step<T, Dim>(c, a, right + 8 * k * pitch_of(Dim));
  }
}

struct MaxNumber {
  FASTLDM_DEVICE float operator()(float a, float b) const { return max_number(a, b); }
};

// Softmax over tiles of keys, for the rows of M fragments: row i of a lane is row lane / 4 + 8 i.
template <int M>
struct Softmax {
  float top[2 * M], total[2 * M];  // the largest score; this lane's part of the sum of exp(score - top)

  FASTLDM_DEVICE void begin() {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) top[i] = -kInfinity, total[i] = 0.0f;
  }

  // The largest of the scores of a row in this warp.
  template <int N>
  FASTLDM_DEVICE static float largest(const float (&s)[M][N][4], int row) {
    float most = -kInfinity;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      most = max_number(most, max_number(s[row / 2][n][row % 2 * 2], s[row / 2][n][row % 2 * 2 + 1]));
    }
    return warp_reduce<4>(most, MaxNumber());
  }

  // Scores of a row become weights below the new `most`; gives what all before is to be multiplied by.
  template <int N>
  FASTLDM_DEVICE float weigh(float (&s)[M][N][4], int row, float most, float unit) {
    most = max_number(top[row], most);
    // A row without an open key has -infinity, and -infinity minus -infinity would be NaN.
    const float base = most == -kInfinity ? 0.0f : most;
    const float shrink = exp2_approx((top[row] - base) * unit);
    float sum = total[row] * shrink;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = row % 2 * 2; i < row % 2 * 2 + 2; ++i) {
        // Subtracted before it is multiplied: a score may be 1e10.
        s[row / 2][n][i] = exp2_approx((s[row / 2][n][i] - base) * unit);
        sum += s[row / 2][n][i];
      }
    }
    top[row] = most;
    total[row] = sum;
    return shrink;
  }

  FASTLDM_DEVICE void add_up_lanes() {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) total[i] = warp_reduce<4>(total[i], Sum());
  }

  FASTLDM_DEVICE float log_sum(int row, float size) const {
    return total[row] == 0.0f ? -kInfinity : top[row] * size + log2_approx(total[row]) * kLn2;
  }
};

FASTLDM_DEVICE float inverse(float total) { return total == 0.0f ? 0.0f : divide(1.0f, total); }

template <int M, int N>
FASTLDM_DEVICE void scale_row(float (&c)[M][N][4], int row, float factor) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    c[row / 2][n][row % 2 * 2] *= factor;
    c[row / 2][n][row % 2 * 2 + 1] *= factor;
  }
}

// A warp's 16 M rows of c, through a part of shared memory that only this warp uses, to rows first .. of a head, of
// which columns below `dim` are there: so that whole vectors are written. Lanes have synchronised since they last read
// in `scratch`, whose rows are `Pitch` elements apart.
template <class T, int Pitch, int M, int N>
FASTLDM_DEVICE void store_rows(const float (&c)[M][N][4], const Shared<T>& scratch, const Global<T>& to,
                               std::int64_t stride, int first, int count, int dim) {
  const int lane = lane_id();
  const auto pairs = scratch.template as<std::uint32_t>();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = (16 * m + 8 * i + lane / 4) * Pitch + 8 * n + lane % 4 * 2;
        pairs.store(at / 2, pack<T>(c[m][n][2 * i], c[m][n][2 * i + 1]));
      }
    }
  }
  warp_sync();
  for (int i = lane; i < 16 * M * N; i += kWarp) {
    const int row = i / N, column = i % N * 8;
    if (first + row < count && column < dim) {
      to.template store_vector<8>((first + row) * stride + column,
                                  scratch.template load_vector<8>(row * Pitch + column));
    }
  }
}

}  // namespace fastldm::cuda::attention
