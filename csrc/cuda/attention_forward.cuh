// Attention forward for head dims up to 256: softmax over tiles of keys (FlashAttention, arXiv 2205.14135).
//
// Floor: 4 Sq Sk D operations of each head on tensor cores, Sq Sk exponentials at 16 a cycle and multiprocessor; q, k,
// v and out once through memory. At D = 40 and 1.7 GHz on 132 multiprocessors the exponentials (3.6e12 a second) allow
// 570 TFLOP/s, so nothing is computed on padding; from D = 64 on mma.sync, about 0.62 of wgmma's 989, is the bound.
//
// A warp owns 32 queries, so that each fragment of k and v that it reads from shared memory (256 bytes, 2 cycles) goes
// into two products (2048 multiply-adds each, 2 cycles of an A100, about 1.6 of an H100): with 16 queries shared
// memory would be the bound. A row never leaves its quarter of a warp, weights stay in registers, and there is one
// barrier a tile: the copies of the next tile run while this one is multiplied. Above D = 160 the accumulators of 32
// rows would be more than the registers: 16 queries.
//
//   Dim                     40    64    72    80    96    128   160   256
//   queries                 128   128   128   128   128   128   128   64
//   keys a step             64    64    64    64    32    32    32    32
//   shared memory, KiB      30    54    54    66    52    68    84    99
//   blocks, sm_80 / sm_90   3/3   2/2   2/2   2/2   2/2   2/2   1/2   1/2     (by shared memory and registers)
#pragma once

#include "cuda/attention_mask.cuh"

namespace fastldm::cuda::attention {

template <class T, int Dim>
struct Forward {
  static constexpr int warps = 4, threads = warps * kWarp;
  static constexpr int min_blocks = Dim == 40 ? 3 : 2;
  static constexpr int min_capability = 80;
  static constexpr int m = Dim <= 160 ? 2 : 1, rows = warps * 16 * m;
  static constexpr int step = Dim <= 80 ? 64 : 32;  // keys
  static constexpr int pitch = pitch_of(Dim), stages = 2;
  static constexpr bool held = Dim <= 64;
  static constexpr bool takes_score_masks = Dim != 40;  // three blocks leave no registers for it

  struct Params {
    Problem problem;
    Heads<const T> q, k, v;
    Heads<T> out;
    Global<float> lse;  // (B, H, Sq), or empty
    int tiles;
  };

  struct Layout {
    int q, k, v, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout() {
    SharedLayout shared;
    const int q = shared.take<T>(rows * pitch);
    const int k = shared.take<T>(stages * step * pitch);
    const int v = shared.take<T>(stages * step * pitch);
    return {q, k, v, shared.bytes()};
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const Problem& problem = params.problem;
    Place place = place_of(problem, params.tiles);
    // The longest rows first: what is begun last is short.
    if (problem.causal) place.tile = params.tiles - 1 - place.tile;
    const int block_query = place.tile * rows, query0 = block_query + warp_id() * 16 * m;
    const auto q = dynamic_shared<T>(layout().q, rows * pitch);
    const auto k = dynamic_shared<T>(layout().k, stages * step * pitch);
    const auto v = dynamic_shared<T>(layout().v, stages * step * pitch);
    const auto mask = mask_of(problem, place);
    const auto key_rows = params.k.at(place.batch, place.head), value_rows = params.v.at(place.batch, place.head);
    const auto fetch_step = [&](int index) {
      const int at = index % stages * step * pitch;
      fetch<step, Dim, threads>(k + at, key_rows, params.k.row, index * step, problem.keys, problem.dim, thread_id());
      fetch<step, Dim, threads>(v + at, value_rows, params.v.row, index * step, problem.keys, problem.dim,
                                thread_id());
    };
    const int last = problem.causal && block_query + rows < problem.keys ? block_query + rows : problem.keys;
    const int steps = ceil_div(last, step);

    fetch<rows, Dim, threads>(q, params.q.at(place.batch, place.head), params.q.row, block_query, problem.queries,
                              problem.dim, thread_id());
    fetch_step(0);
    commit_group();
    const auto own_q = q + warp_id() * 16 * m * pitch;
    Left<T, m, Dim, held> left{own_q, problem.flip, {}};
    Softmax<m> softmax;
    softmax.begin();
    float acc[m][Dim / 8][4];
    clear(acc);

    for (int index = 0; index < steps; ++index) {
      wait_group<0>();
      block_sync();
      if (index + 1 < steps) fetch_step(index + 1);
      commit_group();
      if (index == 0) left.hold();
      const int key0 = index * step;
      if (problem.causal && key0 > query0 + 16 * m - 1) continue;
      const bool whole = is_whole(problem, key0, step, query0);
      OpenKeys<step> open;
      if (!whole) {
        open.find(problem, mask, key0);
        if (open.none()) continue;
      }
      const int at = index % stages * step * pitch;
      float s[m][step / 8][4];
      inner<T, Dim>(s, left, Shared<const T>(k + at));
      if (!whole) {
        if constexpr (takes_score_masks) {
          mask_columns<T>(s, problem, mask, open, key0, query0);
        } else {
          close_columns(s, problem, open, key0, query0);
        }
      }
#pragma unroll
      for (int row = 0; row < 2 * m; ++row) {
        scale_row(acc, row, softmax.weigh(s, row, softmax.largest(s, row), problem.unit));
      }
      outer<T, Dim>(acc, s, Shared<const T>(v + at));
    }

    softmax.add_up_lanes();
#pragma unroll
    for (int row = 0; row < 2 * m; ++row) {
      scale_row(acc, row, inverse(softmax.total[row]));
      const int query = query0 + lane_id() / 4 + 8 * row;
      if (params.lse && lane_id() % 4 == 0 && query < problem.queries) {
        params.lse.store(place.both * problem.queries + query, softmax.log_sum(row, problem.size));
      }
    }
    warp_sync();
    store_rows<T, pitch>(acc, own_q, params.out.at(place.batch, place.head), params.out.row, query0, problem.queries,
                          problem.dim);
  }
};

}  // namespace fastldm::cuda::attention
