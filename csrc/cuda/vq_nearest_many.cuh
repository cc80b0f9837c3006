// vq_nearest in more than 16 dimensions: the scores of all codes, on tensor cores.
//
// Rows and codes are split into two float16 numbers for each component, scaled by powers of two: one scale for each
// row, one for each tile of 64 codes. Three products of the parts give z'.e' to about the error of float32
// (kernels/vq/bound.py). float16 and not 3xTF32, which needs no scales: it keeps 22 bits instead of 21, at twice the
// rate and half the shared memory. Not bfloat16: 22 bits would take three parts and five or six products.
//
// A block has a tile of rows, split once and kept in shared memory, and goes over its tiles of codes, which come in
// slices of 32 dimensions, two ahead of the one that is multiplied. Where the rows have too many dimensions for that,
// they are read in chunks of them, anew for each tile of codes. Each warp makes 32 rows by 32 codes, in two sums: of
// the small products and of hi hi, so that the small ones are not rounded to what is large. For each row it keeps the
// least score, whose it is, and the least of all others: a place is one code.
//
// What bounds it, per 16 dimensions of 128 rows by 64 codes: 192 products of 16 x 8 x 16 take 184 cycles of an H100's
// 4096 operations a cycle (mma.sync reaches about two thirds of that, 276); fragments are 64 loads of 512 bytes, 256
// cycles. 65536 rows, 1024 codes, D = 256: 103 GFLOP, 104 us at the peak, 156 us at two thirds; the last 6 operations
// of a pair, 384 instructions of a thread for a tile, are 12 % of that where nothing hides them. z is read once: 67 MB,
// 14 us on an H200. Shared memory, D = 64: 70 KiB, two blocks of 8 warps (128 registers each); D = 256: 166 KiB, one.
#pragma once

#include "cuda/vq_nearest_pack.cuh"

namespace fastldm::cuda {

template <int Rows>
struct VqSearchMany {
  static constexpr int threads = 2 * Rows;
  static constexpr int min_blocks = 256 / Rows;
  static constexpr int min_capability = 80;
  static constexpr int rows = Rows;
  static constexpr int codes = VqPackMany::tile, slice = VqPackMany::slice;
  static constexpr int stages = 3;
  static constexpr int warps = threads / kWarp;  // by pairs: 32 rows, the first and the last 32 codes
  // 8 elements more, so that the 8 rows of a matrix lie in different banks.
  static constexpr int code_pitch = slice + 8;
  static constexpr int part = codes * code_pitch;  // of a stage, hi or mid

  struct Params {
    VqRows rows;
    Global<const float16> packed;  // this and what follows of VqPackMany
    Global<const float> norms, scales, centre;
    VqFound found;
    int tiles, tiles_per_split, slices;
    int chunk_slices;  // that rows are kept of at a time
  };

  struct Layout {
    int rows, codes, starts, downs, scratch, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout(int chunk_slices) {
    SharedLayout shared;
    const int rows = shared.take<float16>(2 * Rows * (chunk_slices * slice + 8));
    const int codes = shared.take<float16>(stages * 2 * part);
    const int starts = shared.take<std::int64_t>(Rows);
    const int downs = shared.take<float>(Rows);
    const int scratch = shared.take<float>(6 * Rows);
    return {rows, codes, starts, downs, scratch, shared.bytes()};
  }

  // The least score, whose code, and the least of the other codes.
  struct Best {
    float least, others;
    int code;
  };

  FASTLDM_DEVICE static Best merge(const Best& a, const Best& b) {
    const bool second = b.least < a.least || (b.least == a.least && b.code < a.code);
    const float others = min_number(min_number(a.others, b.others), max_number(a.least, b.least));
    return {min_number(a.least, b.least), others, second ? b.code : a.code};
  }

  // Where things lie in shared memory.
  struct Tile {
    Shared<float16> hi, mid, codes;
    Shared<std::int64_t> starts;  // of rows; -1 past the last one
    Shared<float> downs;          // what their parts have to be multiplied by
    Shared<float> scratch;
    int pitch;
  };

  struct Size {
    float squares, largest;
  };

  FASTLDM_DEVICE static void add(Size& size, const Params& params, std::int64_t start, int d) {
    const float given = params.rows.numbers.load(start + d * params.rows.stride_dim);
    const float value = given - params.centre.load(d);
    size.squares = vq_is_finite(given) ? fused_multiply_add(value, value, size.squares) : vq_nan();
    size.largest = max_number(size.largest, value < 0.0f ? -value : value);
  }

  // Calls body(row, first, step) for the thread's share of each row, the dimensions first, first + step, ...: lanes go
  // along what is dense, a row or the same dimension of 32 rows.
  template <class Body>
  FASTLDM_DEVICE static void visit_rows(const Params& params, const Body& body) {
    if (params.rows.stride_dim == 1) {
      for (int row = warp_id(); row < Rows; row += warps) body(row, lane_id(), kWarp);
    } else {
      body(warp_id() / 2 * kWarp + lane_id(), warp_id() % 2, 2);
    }
  }

  // ||z'||^2 and the scale of each row.
  FASTLDM_DEVICE static void measure(const Params& params, const Tile& tile) {
    visit_rows(params, [&](int row, int first, int step) {
      const std::int64_t start = tile.starts.load(row);
      Size size = {};
      if (start >= 0) {
#pragma unroll 4
        for (int d = first; d < params.rows.dim; d += step) add(size, params, start, d);
      }
      const int half = first;
      if (step == kWarp) {
        const auto combine = [](const Size& a, const Size& b) {
          return Size{a.squares + b.squares, max_number(a.largest, b.largest)};
        };
        size = warp_reduce(size, combine);
        if (half > 0) size.squares = 0.0f;
      }
      if (half < 2) {
        tile.scratch.store(half * Rows + row, size.squares);
        tile.scratch.store((2 + half) * Rows + row, size.largest);
      }
    });
    block_sync();
    const int row = thread_id();
    if (row < Rows) {
      const float squares = tile.scratch.load(row) + tile.scratch.load(Rows + row);
      const float largest = max_number(tile.scratch.load(2 * Rows + row), tile.scratch.load(3 * Rows + row));
      tile.downs.store(row, vq_scale_for(largest).down);
      if (tile.starts.load(row) >= 0 && block_y() == 0) {
        params.found.squares.store(static_cast<std::int64_t>(block_x()) * Rows + row, squares);
      }
    }
    block_sync();
  }

  // The parts of a chunk of dimensions of all rows.
  FASTLDM_DEVICE static void split_rows(const Params& params, const Tile& tile, int chunk) {
    const int columns = params.chunk_slices * slice, begin = chunk * columns;
    visit_rows(params, [&](int row, int first, int step) {
      const std::int64_t start = tile.starts.load(row);
      const float up = divide(1.0f, tile.downs.load(row));  // exact: both are powers of two
      const int given = start < 0 ? 0 : params.rows.dim - begin;  // columns that there are numbers for
#pragma unroll 4
      for (int column = first; column < columns; column += step) {
        float value = 0.0f;
        if (column < given) {
          const int d = begin + column;
          value = (params.rows.numbers.load(start + d * params.rows.stride_dim) - params.centre.load(d)) * up;
        }
        const VqHalves halves = vq_halves(value);
        tile.hi.store(row * tile.pitch + column, halves.hi);
        tile.mid.store(row * tile.pitch + column, halves.mid);
      }
    });
  }

  // Stage `index` of `count`: a slice of a tile of codes, both parts.
  FASTLDM_DEVICE static void fetch(const Global<const float16>& packed, const Tile& tile, int index, int count) {
    if (index < count) {
      constexpr int per_row = slice / 8;
      const int row = thread_id() / per_row, column = thread_id() % per_row * 8;
      const Global<const float16> from =
          packed + (static_cast<std::int64_t>(index) * 2 * codes * slice + 8 * thread_id());
      const Shared<float16> to = tile.codes + (index % stages * 2 * part + row * code_pitch + column);
#pragma unroll
      for (int i = 0; i < 2 * codes * per_row / threads; ++i) {
        copy_async<16>(to + i * (threads / per_row) * code_pitch, from + i * 8 * threads);
      }
    }
    commit_group();
  }

  FASTLDM_DEVICE static void multiply(float (&small)[2][4][4], float (&large)[2][4][4], const Tile& tile,
                                      const Shared<float16>& stage, int column) {
    const int lane = lane_id(), row0 = warp_id() / 2 * 32, code0 = warp_id() % 2 * 32;
    // Fragments of two steps at once have no room in 128 registers.
#pragma unroll 1
    for (int k = 0; k < slice; k += 16) {
      std::uint32_t hi[2][4], mid[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int at = (row0 + 16 * m + lane % 16) * tile.pitch + column + k + lane / 16 * 8;
        load_matrices(hi[m], tile.hi + at);
        load_matrices(mid[m], tile.mid + at);
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        std::uint32_t code_hi[4], code_mid[4];
        const int at = (code0 + 16 * pair + lane / 16 * 8 + lane % 8) * code_pitch + k + lane / 8 % 2 * 8;
        load_matrices(code_hi, stage + at);
        load_matrices(code_mid, stage + part + at);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const std::uint32_t b_hi[2] = {code_hi[2 * j], code_hi[2 * j + 1]};
          const std::uint32_t b_mid[2] = {code_mid[2 * j], code_mid[2 * j + 1]};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma_16x8x16<float16>(small[m][2 * pair + j], mid[m], b_hi);
            mma_16x8x16<float16>(small[m][2 * pair + j], hi[m], b_mid);
            mma_16x8x16<float16>(large[m][2 * pair + j], hi[m], b_hi);
          }
        }
      }
    }
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const Layout at = layout(params.chunk_slices);
    const int pitch = params.chunk_slices * slice + 8;
    const auto row_parts = dynamic_shared<float16>(at.rows, 2 * Rows * pitch);
    const Tile tile = {row_parts,
                       row_parts + Rows * pitch,
                       dynamic_shared<float16>(at.codes, stages * 2 * part),
                       dynamic_shared<std::int64_t>(at.starts, Rows),
                       dynamic_shared<float>(at.downs, Rows),
                       dynamic_shared<float>(at.scratch, 6 * Rows),
                       pitch};
    const int begin = block_y() * params.tiles_per_split;
    const int past = begin + params.tiles_per_split;
    const int end = past < params.tiles ? past : params.tiles;
    const int count = (end - begin) * params.slices;
    const Global<const float16> packed =
        params.packed + static_cast<std::int64_t>(begin) * params.slices * 2 * codes * slice;
    for (int i = 0; i < stages - 1; ++i) fetch(packed, tile, i, count);

    const std::int64_t row0 = static_cast<std::int64_t>(block_x()) * Rows;
    if (thread_id() < Rows) {
      const std::int64_t row = row0 + thread_id();
      tile.starts.store(thread_id(), row < params.rows.count ? params.rows.start(row) : -1);
    }
    block_sync();
    measure(params, tile);
    const bool at_once = params.chunk_slices == params.slices;
    if (at_once) split_rows(params, tile, 0);

    // The thread's rows: g, g + 8, g + 16 and g + 24 of the warp's.
    const int own_row = warp_id() / 2 * 32 + lane_id() / 4;
    const int own_code = warp_id() % 2 * 32 + lane_id() % 4 * 2;
    Best best[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) best[r] = {vq_infinity(), vq_infinity(), begin * codes};

    int index = 0;
    for (int i = begin; i < end; ++i) {
      float small[2][4][4] = {}, large[2][4][4] = {};
      for (int s = 0; s < params.slices; ++s, ++index) {
        if (!at_once && s % params.chunk_slices == 0) {
          block_sync();
          split_rows(params, tile, s / params.chunk_slices);
        }
        wait_group<stages - 2>();
        block_sync();
        fetch(packed, tile, index + stages - 1, count);
        multiply(small, large, tile, tile.codes + index % stages * 2 * part, s % params.chunk_slices * slice);
      }
      float scale[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) scale[r] = -2.0f * tile.downs.load(own_row + 8 * r) * params.scales.load(i);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int code = i * codes + own_code + 8 * n;
        const Vec<float, 2> norm = params.norms.template load_vector<2>(code);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int element = r % 2 * 2 + j;
            const float product = large[r / 2][n][element] + small[r / 2][n][element];
            const float score = fused_multiply_add(product, scale[r], norm[j]);
            best[r].others = min_number(best[r].others, max_number(best[r].least, score));
            if (score < best[r].least) best[r].code = code + j;
            best[r].least = min_number(best[r].least, score);
          }
        }
      }
    }

    // The four lanes of a row, then the two warps.
    const auto codes_found = (tile.scratch + 4 * Rows).template as<std::int32_t>();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const Best found = warp_reduce<4>(best[r], [](const Best& a, const Best& b) { return merge(a, b); });
      if (lane_id() % 4 == 0) {
        const int to = warp_id() % 2 * Rows + own_row + 8 * r;
        tile.scratch.store(to, found.least);
        tile.scratch.store(2 * Rows + to, found.others);
        codes_found.store(to, found.code);
      }
    }
    block_sync();
    const int row = thread_id();
    if (row < Rows && row0 + row < params.rows.count) {
      const auto of = [&](int half) {
        const int from = half * Rows + row;
        return Best{tile.scratch.load(from), tile.scratch.load(2 * Rows + from), codes_found.load(from)};
      };
      const Best found = merge(of(0), of(1));
      const std::int64_t to = block_y() * params.rows.count + row0 + row;
      params.found.least.store(to, found.least);
      params.found.others.store(to, found.others);
      params.found.place.store(to, found.code);
    }
  }
};

}  // namespace fastldm::cuda
