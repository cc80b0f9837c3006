// Attention backward for head dim 512: dk and dv by tiles of 32 keys, dq by tiles of 32 queries, which differ in what
// they walk along and in little else.
//
// A row of the head is 1 KB, so what bounds this is how often it is read. A block holds 32 rows of two tensors and
// walks over 32 rows at a time of the other two: q and g for keys, k and v for queries. dk and dv of 32 rows are half
// of the registers; together they share scores and copies. A block is 8 warps: 4 multiply scores, 16 x 16 each, and 4
// g v^T, so that a fragment from shared memory meets two others (as 16 x 8 of both by all warps it would be half as
// many again). The weights cross over in float32 for dS, in T like dS itself for the outputs, of which a warp has 16
// rows by 128 columns. Scores add up along the whole head dim, in the order of the forward.
//
// Floor: 14 Sq Sk 512 operations. By shared memory: a step of 32 x 32 reads 32 KB for a warp's 16 x 16, 8 KB for each
// output and warp; with keys 404 KB in 3200 cycles, its products 2048 of an A100; with queries 340 KB in 2700, and
// 1536. From the L2 come 64 KB a step, 2700 cycles at 24 bytes a cycle and multiprocessor: with blocks of 16 rows that
// would be the bound.
//
// Shared memory: 205 KiB with two stages (sm_90), 140 with one (sm_80); one block on a multiprocessor.
//
// With one stage g or v is copied while the last product runs, q or k while nothing does. Where blocks do not fill the
// device, what they walk along is split into chunks, whose float32 sums BackwardReduce adds in order.
#pragma once

#include "cuda/attention_backward.cuh"

namespace fastldm::cuda::attention {

// Of what a block holds rows, and so makes the gradients of.
enum class Side { keys, queries };

template <class T, int Stages, Side Rows>
struct WideBackward {
  static constexpr int dim = 512, rows = 32, step = 32, parts = 4;
  static constexpr int warps = 8, threads = warps * kWarp;
  static constexpr int min_blocks = 1;
  static constexpr int min_capability = Stages == 2 ? 90 : 80;
  static constexpr int columns = dim / parts;  // of the outputs, of a warp
  static constexpr int pitch = pitch_of(dim), weight_pitch = pitch_of(step);
  static constexpr bool of_keys = Rows == Side::keys;

  // scores = rows steps^T and dP = row_values step_values^T: of keys k q^T and v g^T, of queries q k^T and g v^T.
  struct Params {
    Problem problem;
    float scale;
    Heads<const T> rows, row_values, steps, step_values;
    QueryStatistics statistics;
    Heads<T> out, out_values;  // dk and dv, or dq and nothing
    Global<float> partial;     // (1 or 2, chunks, B, H, rows, 512) of them, where there are chunks
    int tiles, chunks;
  };

  struct Layout {
    int rows, row_values, steps, step_values, weights, gradients, crossing, statistics, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout() {
    SharedLayout shared;
    const int row = shared.take<T>(rows * pitch), row_value = shared.take<T>(rows * pitch);
    const int steps = shared.take<T>(Stages * step * pitch), step_values = shared.take<T>(Stages * step * pitch);
    const int weights = shared.take<T>(rows * weight_pitch), gradients = shared.take<T>(rows * weight_pitch);
    const int crossing = shared.take<float>(rows * step);
    const int statistics = shared.take<float>(Stages * 3 * step);
    return {row, row_value, steps, step_values, weights, gradients, crossing, statistics, shared.bytes()};
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const Problem& problem = params.problem;
    const Place place = place_of(problem, params.tiles * params.chunks);
    const int chunk = place.tile / params.tiles, block_row = place.tile % params.tiles * rows;
    const int row_count = of_keys ? problem.keys : problem.queries;
    const int step_count = of_keys ? problem.queries : problem.keys;
    const auto own = dynamic_shared<T>(layout().rows, rows * pitch);
    const auto own_values = dynamic_shared<T>(layout().row_values, rows * pitch);
    const auto other = dynamic_shared<T>(layout().steps, Stages * step * pitch);
    const auto other_values = dynamic_shared<T>(layout().step_values, Stages * step * pitch);
    const auto weights = dynamic_shared<T>(layout().weights, rows * weight_pitch);
    const auto gradients = dynamic_shared<T>(layout().gradients, rows * weight_pitch);
    const auto crossing = dynamic_shared<float>(layout().crossing, rows * step);
    const auto statistics = dynamic_shared<float>(layout().statistics, Stages * 3 * step);
    const auto mask = mask_of(problem, place);
    const auto fetch_tile = [&](const Shared<T>& to, const Heads<const T>& from, int first, int count) {
      fetch<32, dim, threads>(to, from.at(place.batch, place.head), from.row, first, count, dim, thread_id());
    };
    const auto fetch_statistics = [&](const Shared<float>& to, int query0) {
      if (thread_id() < 3 * step) {
        // Past the end factor is 0, and so are weights.
        const int kind = thread_id() / step, query = query0 + thread_id() % step;
        const bool inside = query < problem.queries;
        copy_async<4>(to + thread_id(),
                      params.statistics.values + (inside ? kind * params.statistics.all +
                                                               place.both * problem.queries + query
                                                         : 0),
                      inside ? 4 : 0);
      }
    };
    const auto fetch_step = [&](int index) {
      const int stage = index % Stages;
      fetch_tile(other + stage * step * pitch, params.steps, index * step, step_count);
      if constexpr (of_keys) fetch_statistics(statistics + stage * 3 * step, index * step);
    };
    const auto fetch_values = [&](int index) {
      fetch_tile(other_values + index % Stages * step * pitch, params.step_values, index * step, step_count);
    };

    // Causal, keys are seen from the step of their own numbers on, and queries see up to that.
    const int steps = ceil_div(step_count, step), per_chunk = ceil_div(steps, params.chunks);
    int begin = chunk * per_chunk, end = begin + per_chunk < steps ? begin + per_chunk : steps;
    if (problem.causal && of_keys && begin < block_row / step) begin = block_row / step;
    if (problem.causal && !of_keys && end > block_row / step + 1) end = block_row / step + 1;
    fetch_tile(own, params.rows, block_row, row_count);
    fetch_tile(own_values, params.row_values, block_row, row_count);
    if constexpr (!of_keys) fetch_statistics(statistics, block_row);
    if (begin < end) {
      fetch_step(begin);
      fetch_values(begin);
    }
    commit_group();

    // This warp's 16 x 16 of the scores or of dP, and 16 x 128 of the outputs.
    const bool is_score = warp_id() < warps / 2;
    const int row0 = warp_id() / 2 % 2 * 16, column0 = warp_id() % 2 * 16;
    const int out_row = warp_id() / parts * 16, out_column = warp_id() % parts * columns;
    const Left<T, 1, dim, false> left{(is_score ? own : own_values) + row0 * pitch, is_score ? problem.flip : 0, {}};
    const auto lane_crossing = crossing + (warp_id() % 4 * 8 * kWarp + lane_id());
    unsigned open = 0;
    if constexpr (of_keys) open = open_rows<1>(problem, mask, block_row + row0);
    float acc[1][columns / 8][4], acc_values[1][of_keys ? columns / 8 : 1][4];
    clear(acc);
    clear(acc_values);

    for (int index = begin; index < end; ++index) {
      const int stage = index % Stages, at = stage * step * pitch;
      if constexpr (Stages == 1) {
        if (index > begin) {
          block_sync();
          fetch_step(index);
          commit_group();
        }
      }
      wait_group<0>();
      block_sync();
      if constexpr (Stages == 2) {
        if (index + 1 < end) {
          fetch_step(index + 1);
          fetch_values(index + 1);
        }
        commit_group();
      }
      const auto its = statistics + (of_keys ? stage * 3 * step : 0);
      float c[1][2][4];
      inner<T, dim>(c, left, Shared<const T>((is_score ? other : other_values) + (at + column0 * pitch)));
      if (is_score) {
        const int first_row = block_row + row0, first_column = index * step + column0;
        if constexpr (of_keys) {
          mask_rows<T>(c, problem, mask, open, first_row, first_column);
        } else if (!is_whole(problem, first_column, 16, first_row)) {
          OpenKeys<16> keys;
          keys.find(problem, mask, first_column);
          mask_columns<T>(c, problem, mask, keys, first_column, first_row);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int query = query_of(row0, column0, i);
          float& x = c[0][i / 4][i % 4];
          x = exp2_approx((x - its.load(query)) * problem.unit) * its.load(step + query);
          lane_crossing.store(i * kWarp, x);
        }
        if constexpr (of_keys) store_weights(c, weights, row0, column0);
      }
      block_sync();
      if (!is_score) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float weight = lane_crossing.load(i * kWarp);
          float& x = c[0][i / 4][i % 4];
          // What stands where a key is closed may have made the product infinite.
          x = weight == 0.0f ? 0.0f : weight * (x - its.load(2 * step + query_of(row0, column0, i)));
        }
        store_weights(c, gradients, row0, column0);
      }
      if constexpr (of_keys) add(acc_values, weights, out_row, other_values + (at + out_column));
      block_sync();
      if constexpr (Stages == 1) {
        if (index + 1 < end) fetch_values(index + 1);
      }
      add(acc, gradients, out_row, other + (at + out_column));
    }

    wait_group<0>();
    block_sync();
#pragma unroll
    for (int row = 0; row < 2; ++row) scale_row(acc, row, params.scale);
    const auto store = [&](const auto& c, const Shared<T>& scratch, const Heads<T>& to, int which) {
      const int first = block_row + out_row;
      if (params.chunks == 1) {
        store_rows<T, pitch>(c, scratch + (out_row * pitch + out_column), to.at(place.batch, place.head) + out_column,
                             to.row, first, row_count, columns);
      } else {
        const std::int64_t heads = grid_x() / (params.tiles * params.chunks);
        const std::int64_t head = (which * params.chunks + chunk) * heads + place.both;
        store_partial(c, params.partial + head * row_count * dim, first, row_count, out_column);
      }
    };
    store(acc, own, params.out, 0);
    if constexpr (of_keys) store(acc_values, own_values, params.out_values, 1);
  }

  // Which of the 32 queries of rows or columns element i of a lane's 8 belongs to.
  FASTLDM_DEVICE static int query_of(int row0, int column0, int i) {
    return of_keys ? column0 + i / 4 * 8 + lane_id() % 4 * 2 + i % 2 : row0 + i % 4 / 2 * 8 + lane_id() / 4;
  }

  FASTLDM_DEVICE static void store_weights(const float (&c)[1][2][4], const Shared<T>& to, int row0, int column0) {
    const auto pairs = to.template as<std::uint32_t>();
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int row = row0 + i % 4 / 2 * 8 + lane_id() / 4, column = column0 + i / 4 * 8 + lane_id() % 4 * 2;
      pairs.store((row * weight_pitch + column) / 2, pack<T>(c[0][i / 4][i % 4], c[0][i / 4][i % 4 + 1]));
    }
  }

  // acc += the 16 rows of `factors` from `row` on times a step's rows of `right`.
  FASTLDM_DEVICE static void add(float (&acc)[1][columns / 8][4], const Shared<T>& factors, int row,
                                 const Shared<const T>& right) {
#pragma unroll
    for (int k = 0; k < step; k += 16) {
      std::uint32_t a[1][4];
      load_matrices(a[0], Shared<const T>(factors + ((row + lane_id() % 16) * weight_pitch + k + lane_id() / 16 * 8)));
      outer_step<T, dim>(acc, a, right + k * pitch);
    }
  }

  FASTLDM_DEVICE static void store_partial(const float (&c)[1][columns / 8][4], const Global<float>& to, int first,
                                           int count, int out_column) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first + lane_id() / 4 + 8 * i;
#pragma unroll
      for (int n = 0; n < columns / 8; ++n) {
        if (row < count) {
          to.template store_vector<2>(std::int64_t{row} * dim + out_column + 8 * n + lane_id() % 4 * 2,
                                      {{c[0][n][2 * i], c[0][n][2 * i + 1]}});
        }
      }
    }
  }
};

}  // namespace fastldm::cuda::attention
