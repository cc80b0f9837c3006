// Kernels that use every device primitive: a product of matrices, a reduction over a cluster, and one step of each of
// the rest. They compute nothing that fastldm needs; they show that the primitives mean the same on a GPU and under
// the shim.
#pragma once

#include "cuda/common/device.h"

namespace fastldm::cuda {

// c (m, n) = a (m, k) times b, in float32. b is (n, k), or transposed (k, n). Rows of a and b begin at multiples of 16
// bytes: k (and n, of a transposed b) is a multiple of 16 / sizeof(T).
//
// A block makes a tile of 64 x 64, each of its 4 warps 16 rows of it; slices of 32 of k come in by asynchronous copies,
// two ahead of the one that is multiplied. T: float16, bfloat16, or float, which is multiplied in tf32.
template <class T, bool Transposed>
struct SelftestMatmul {
  static constexpr int threads = 128;
  static constexpr int min_blocks = 2;
  static constexpr int min_capability = 80;
  static constexpr int tile = 64, slice = 32, stages = 3;

  struct Params {
    Global<const T> a, b;
    Global<float> c;
    int m, n, k;
  };

  static constexpr int vector = 16 / sizeof(T);
  // A row more than its elements, so that the 8 rows of a matrix lie in different banks.
  static constexpr int a_pitch = slice + vector;
  static constexpr int b_rows = Transposed ? slice : tile;
  static constexpr int b_pitch = (Transposed ? tile : slice) + vector;

  struct Layout {
    int a, b, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout() {
    SharedLayout shared;
    const int a = shared.take<T>(stages * tile * a_pitch);
    const int b = shared.take<T>(stages * b_rows * b_pitch);
    return {a, b, shared.bytes()};
  }

  // Rows `row0` .. and columns `column0` .. of a matrix into shared memory; 0 beyond its edges.
  template <int Rows, int Columns>
  FASTLDM_DEVICE static void fetch(const Shared<T>& to, int pitch, const Global<const T>& from, int rows, int columns,
                                   int row0, int column0) {
    constexpr int per_row = Columns / vector;
#pragma unroll
    for (int i = thread_id(); i < Rows * per_row; i += threads) {
      const int row = i / per_row, column = i % per_row * vector;
      const bool inside = row0 + row < rows && column0 + column < columns;
      const std::int64_t at = static_cast<std::int64_t>(row0 + row) * columns + column0 + column;
      copy_async<16>(to + row * pitch + column, from + (inside ? at : 0), inside ? 16 : 0);
    }
  }

  FASTLDM_DEVICE static void fetch_slice(const Params& params, const Shared<T>& a, const Shared<T>& b, int index) {
    const int stage = index % stages, k0 = index * slice;
    if (k0 < params.k) {
      fetch<tile, slice>(a + stage * tile * a_pitch, a_pitch, params.a, params.m, params.k, block_y() * tile, k0);
      const Shared<T> to = b + stage * b_rows * b_pitch;
      if constexpr (Transposed) {
        fetch<slice, tile>(to, b_pitch, params.b, params.k, params.n, k0, block_x() * tile);
      } else {
        fetch<tile, slice>(to, b_pitch, params.b, params.n, params.k, block_x() * tile, k0);
      }
    }
    commit_group();
  }

  FASTLDM_DEVICE static void multiply(float (&c)[8][4], const Shared<const T>& a, const Shared<const T>& b) {
    constexpr int depth = 32 / sizeof(T);  // of one product: 16, in tf32 8
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < slice; k += depth) {
      std::uint32_t a_fragment[4];
      const int a_row = warp_id() * 16 + lane % 16, a_column = k + lane / 16 * (depth / 2);
      load_matrices(a_fragment, a + a_row * a_pitch + a_column);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        std::uint32_t b_fragment[2];
        if constexpr (Transposed) {
          load_matrices<2, true>(b_fragment, b + (k + lane % 16) * b_pitch + n * 8);
        } else {
          load_matrices(b_fragment, b + (n * 8 + lane % 8) * b_pitch + k + lane / 8 % 2 * (depth / 2));
        }
        if constexpr (sizeof(T) == 4) {
          round(a_fragment);
          round(b_fragment);
          mma_16x8x8_tf32(c[n], a_fragment, b_fragment);
        } else {
          mma_16x8x16<T>(c[n], a_fragment, b_fragment);
        }
      }
    }
  }

  template <int N>
  FASTLDM_DEVICE static void round(std::uint32_t (&fragment)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) fragment[i] = to_tf32(bits_as_float(fragment[i]));
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const auto a = dynamic_shared<T>(layout().a, stages * tile * a_pitch);
    const auto b = dynamic_shared<T>(layout().b, stages * b_rows * b_pitch);
    float c[8][4] = {};
    const int slices = (params.k + slice - 1) / slice;
    for (int i = 0; i < stages - 1; ++i) fetch_slice(params, a, b, i);
    for (int i = 0; i < slices; ++i) {
      wait_group<stages - 2>();
      block_sync();
      fetch_slice(params, a, b, i + stages - 1);
      multiply(c, a + i % stages * tile * a_pitch, b + i % stages * b_rows * b_pitch);
    }
    const int row0 = block_y() * tile + warp_id() * 16 + lane_id() / 4;
    const int column0 = block_x() * tile + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + 8 * (i / 2), column = column0 + 8 * n + i % 2;
        if (row < params.m && column < params.n) {
          params.c.store(static_cast<std::int64_t>(row) * params.n + column, c[n][i]);
        }
      }
    }
  }
};

// sums[r] = the sum of row r of x (rows, columns): a cluster reads a row, each block a part of it, and every block adds
// up the parts in the order of the ranks; block 0 writes.
struct SelftestClusterSum {
  static constexpr int threads = 64;
  static constexpr int min_blocks = 1;
  static constexpr int min_capability = 90;

  struct Params {
    Global<const float> x;
    Global<float> sums;
    int columns;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    FASTLDM_SHARED(float, scratch, threads / kWarp);
    FASTLDM_SHARED(float, part, 1);
    const int row = block_x() / cluster_blocks();
    float sum = 0.0f;
    for (int i = cluster_rank() * threads + thread_id(); i < params.columns; i += cluster_blocks() * threads) {
      sum += params.x.load<Cache::streaming>(static_cast<std::int64_t>(row) * params.columns + i);
    }
    sum = block_reduce<threads>(sum, Sum(), scratch);
    if (thread_id() == 0) part.store(0, sum);
    cluster_sync();
    float total = 0.0f;
    for (int rank = 0; rank < cluster_blocks(); ++rank) total += peer(part, rank).load(0);
    cluster_sync();
    if (cluster_rank() == 0 && thread_id() == 0) params.sums.store(row, total);
  }
};

// Counts the values 0 .. 15 of `values` with integer atomics: per block in shared memory, then in global memory.
struct SelftestHistogram {
  static constexpr int threads = 96;
  static constexpr int min_blocks = 1;
  static constexpr int min_capability = 80;

  struct Params {
    Global<const std::int32_t> values;
    Global<std::int32_t> counts;
    Global<std::int32_t> least;  // of each block's values
    Global<std::int64_t> first;  // of all: the least value above its lowest position, in 32 bits each
    int count;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    FASTLDM_SHARED(std::int32_t, counts, 16);
    FASTLDM_SHARED(std::int32_t, least, 1);
    if (thread_id() < 16) counts.store(thread_id(), 0);
    if (thread_id() == 16) least.store(0, 16);
    block_sync();
    const int i = block_x() * threads + thread_id();
    if (i < params.count) {
      const int value = params.values.load(i);
      counts.atomic_add(value, 1);
      least.atomic_min(0, value);
      params.first.atomic_min(0, static_cast<std::int64_t>(value) << 32 | i);
    }
    block_sync();
    if (thread_id() < 16) params.counts.atomic_add(thread_id(), counts.load(thread_id()));
    if (thread_id() == 0) params.least.store(block_x(), least.load(0));
  }
};

// What the lanes of one warp exchange: row r of `out` (10, 32) is noted beside each line.
struct SelftestWarp {
  static constexpr int threads = 32;
  static constexpr int min_blocks = 1;
  static constexpr int min_capability = 80;

  struct Params {
    Global<const float> x;  // (32,)
    Global<float> out;
  };

  struct Pair {
    float value;
    std::int32_t lane;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    const int lane = lane_id();
    const float x = params.x.load(lane);
    const auto put = [&](int row, float value) { params.out.store(row * kWarp + lane, value); };
    put(0, shuffle_xor(x, 5));
    put(1, shuffle_down(x, 3));
    put(2, shuffle_from(x, 7));
    put(3, static_cast<float>(ballot(x > 0.0f) >> lane & 1));
    put(4, warp_reduce(x, Sum()));
    put(5, warp_reduce<8>(x, Max()));
    const auto larger = [](const Pair& a, const Pair& b) {
      return a.value > b.value || (a.value == b.value && a.lane < b.lane) ? a : b;
    };
    put(6, static_cast<float>(warp_reduce(Pair{x, lane}, larger).lane));
    put(7, static_cast<float>(any_lane(x > 2.0f)) + 2.0f * static_cast<float>(all_lanes(x > -9.0f)));
    FASTLDM_SHARED(float, exchanged, kWarp);
    exchanged.store(lane, x);
    warp_sync();
    put(8, exchanged.load(kWarp - 1 - lane));
    // a[i][k] = i + k % 2 above row 8, 0 below; b[k][j] = j + 1 where k is even, else 2.
    const float group = static_cast<float>(lane / 4);
    const std::uint32_t a[2] = {pack<bfloat16>(group, group + 1.0f), pack<bfloat16>(0.0f, 0.0f)};
    const std::uint32_t b[1] = {pack<bfloat16>(group + 1.0f, 2.0f)};
    float c[4] = {};
    mma_16x8x8<bfloat16>(c, a, b);
    put(9, c[1]);
  }
};

// y = x through everything that moves data: narrow asynchronous copies, a warp that only arrives at a named barrier,
// vectors of every alignment. count is a multiple of 128; x and y are only known to be aligned to 4 bytes.
struct SelftestCopy {
  static constexpr int threads = 64;
  static constexpr int min_blocks = 1;
  static constexpr int min_capability = 80;

  struct Params {
    Global<const float> x;
    Global<float> y;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    const auto narrow = dynamic_shared<float>(0, 128);
    const int lane = lane_id();
    const Global<const float> x = params.x + block_x() * 128;
    const Global<float> y = params.y + opaque(std::int64_t{block_x()} * 128);
    if (warp_id() == 0) {
      // The producer: half of the block's elements in copies, half through registers.
      for (int i = lane; i < 64; i += kWarp) copy_async<4>(narrow + i, x + i);
      commit_group();
      if (lane < 16) narrow.store_vector<4>(64 + lane * 4, x.load_vector<4, 4, Cache::streaming>(64 + lane * 4));
      wait_group<0>();
      named_arrive<1>(threads);
    } else {
      named_sync<1>(threads);
      const Vec<float, 4> four = narrow.load_vector<4>(lane * 4);
      y.store_vector<4, 4, Cache::streaming>(lane * 4, four);
    }
  }
};

// Numbers one by one: row r of `out` (9, count) is noted beside each line.
struct SelftestMath {
  static constexpr int threads = 128;
  static constexpr int min_blocks = 1;
  static constexpr int min_capability = 80;

  struct Params {
    Global<const float> x;
    Global<float> out;
    int count;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    const int i = block_x() * threads + thread_id();
    if (i >= params.count) return;
    const float x = params.x.load(i);
    const auto put = [&](int row, float value) { params.out.store(row * params.count + i, value); };
    const float positive = x < 0.0f ? -x : x;
    put(0, to_float(from_float<float16>(x)));
    put(1, to_float(from_float<bfloat16>(x)));
    put(2, bits_as_float(to_tf32(x)));
    float low, high;
    unpack<float16>(pack<float16>(x, -x), low, high);
    put(3, low + 2.0f * high);
    put(4, exp_approx(x));
    put(5, log2_approx(positive));
    put(6, reciprocal_approx(x));
    put(7, fused_multiply_add(divide(x, 3.0f), square_root(positive), max_number(x, min_number(1.0f, x))));
    // The square of a third, and nothing more unless it was not rounded before the subtraction.
    const double third = x / 3.0, square = fused_multiply_add(third, third, 0.0);
    put(8, static_cast<float>(square + 1e30 * (multiply(third, third) - square)));
  }
};

}  // namespace fastldm::cuda
