// Attention forward to few keys, as in cross-attention to 77 words: k and v of a head stay in shared memory, and the
// softmax takes one pass.
//
// Floor: q read and out written once; at batch 32, 8 heads, 4096 queries and Dim 40 that is 168 MB, 42 microseconds at
// 4 of an H200's 4.8 TB/s. Products of 80 keys by 40 are 27 GFLOP, 45 microseconds of mma.sync at 600 TFLOP/s; 77 keys
// padded to 128 and 40 to 64 would be 69.
//
// Blocks are as many as the device holds at once. After k and v are there a warp is on its own: it walks tiles of
// queries, copies of the next one running while it computes, and waits for no other.
//
// A warp takes 16 queries: k and v then are 6.3 cycles of shared memory a query at 80 keys and Dim 40 (4 Keys Dim / 16
// bytes, 128 a cycle), while memory takes 9 (4 Dim bytes at 17.8 a cycle and multiprocessor).
//
//   Dim x Keys                     40 x 80  64 x 80  80 x 80  160 x 80  40 x 128  64 x 128  80 x 128
//   shared memory, KiB             22       40       49       94        30        54        66
//   blocks, sm_80 / sm_90          3/3      3/3      3/3      1/2       3/3       2/2       2/2
#pragma once

#include "cuda/attention_mask.cuh"

namespace fastldm::cuda::attention {

template <class T, int Dim, int Keys>
struct ShortForward {
  static constexpr int warps = 4, threads = warps * kWarp;
  static constexpr int min_blocks = Dim <= 80 && Keys <= 80 ? 3 : 2;
  static constexpr int min_capability = 80;
  static constexpr int m = 1, rows = 16;  // of a warp
  static constexpr int pitch = pitch_of(Dim), stages = 2;

  struct Params {
    Problem problem;
    Heads<const T> q, k, v;
    Heads<T> out;
    Global<float> lse;  // (B, H, Sq), or empty
    int tiles, chunks;
  };

  struct Layout {
    int k, v, q, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout() {
    SharedLayout shared;
    const int k = shared.take<T>(Keys * pitch);
    const int v = shared.take<T>(Keys * pitch);
    const int q = shared.take<T>(warps * stages * rows * pitch);
    return {k, v, q, shared.bytes()};
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const Problem& problem = params.problem;
    const Place place = place_of(problem, params.chunks);
    const auto k = dynamic_shared<T>(layout().k, Keys * pitch);
    const auto v = dynamic_shared<T>(layout().v, Keys * pitch);
    const auto own = dynamic_shared<T>(layout().q, warps * stages * rows * pitch) + warp_id() * stages * rows * pitch;
    const auto queries = params.q.at(place.batch, place.head);
    const auto out = params.out.at(place.batch, place.head);
    const auto fetch_tile = [&](int tile, int stage) {
      fetch<rows, Dim, kWarp>(own + stage * rows * pitch, queries, params.q.row, tile * rows, problem.queries,
                              problem.dim, lane_id());
    };
    const int first = place.tile * warps + warp_id(), stride = params.chunks * warps;

    fetch<Keys, Dim, threads>(k, params.k.at(place.batch, place.head), params.k.row, 0, problem.keys, problem.dim,
                              thread_id());
    fetch<Keys, Dim, threads>(v, params.v.at(place.batch, place.head), params.v.row, 0, problem.keys, problem.dim,
                              thread_id());
    if (first < params.tiles) fetch_tile(first, 0);
    commit_group();
    const auto mask = mask_of(problem, place);
    OpenKeys<Keys> open;
    open.find(problem, mask, 0);
    wait_group<0>();
    block_sync();

    for (int tile = first, stage = 0; tile < params.tiles; tile += stride, stage ^= 1) {
      if (tile + stride < params.tiles) fetch_tile(tile + stride, stage ^ 1);
      commit_group();
      wait_group<1>();
      warp_sync();
      const auto q = own + stage * rows * pitch;
      const Left<T, m, Dim, false> left{q, problem.flip, {}};
      const int query0 = tile * rows;
      float s[m][Keys / 8][4];
      inner<T, Dim>(s, left, Shared<const T>(k));
      if (!is_whole(problem, 0, Keys, query0)) mask_columns<T>(s, problem, mask, open, 0, query0);
      Softmax<m> softmax;
      softmax.begin();
#pragma unroll
      for (int row = 0; row < 2 * m; ++row) softmax.weigh(s, row, softmax.largest(s, row), problem.unit);
      softmax.add_up_lanes();
      float acc[m][Dim / 8][4];
      clear(acc);
      outer<T, Dim>(acc, s, Shared<const T>(v));
#pragma unroll
      for (int row = 0; row < 2 * m; ++row) {
        scale_row(acc, row, inverse(softmax.total[row]));
        const int query = query0 + lane_id() / 4 + 8 * row;
        if (params.lse && lane_id() % 4 == 0 && query < problem.queries) {
          params.lse.store(place.both * problem.queries + query, softmax.log_sum(row, problem.size));
        }
      }
      warp_sync();
      // A lane reads there what its own next copies overwrite.
      store_rows<T, pitch>(acc, q, out, params.out.row, query0, problem.queries, problem.dim);
    }
  }
};

}  // namespace fastldm::cuda::attention
