// Attention forward for head dim 512, the one wide head of a VAE.
//
// 64 queries of the output are half of the registers of a multiprocessor, so a block is 8 warps of 64 queries, shared
// out as 2 groups of 32 queries by 4 parts: a part computes the scores of a quarter of the keys over the whole head dim
// and a quarter of the columns of the output. So each score is computed once; weights and the largest scores of rows go
// through shared memory. Of k and v there is one tile each: v is copied while scores are made, the next k while values
// are added up.
//
// Floor: 4 Sq Sk 512 operations. By shared memory: a step of 64 keys reads q and k for 8 warps (48 KB each), v (16 KB
// each) and weights (4 KB each), 544 KB in 4250 cycles; its products are 4.2 million multiply-adds, 4096 cycles of an
// A100. Shared memory: 205 KiB by 64 keys (sm_90), 136 by 32 (sm_80); one block on a multiprocessor. With one head of
// 4096 queries that is 64 blocks, so where blocks do not fill the device the keys are split; the parts (queries x 2 KB
// each, in float32) are added up in order.
#pragma once

#include "cuda/attention_mask.cuh"

namespace fastldm::cuda::attention {

template <class T, int Step>
struct WideForward {
  static constexpr int dim = 512, rows = 64, parts = 4, m = 2;
  static constexpr int warps = 8, threads = warps * kWarp;
  static constexpr int min_blocks = 1;
  static constexpr int min_capability = 80;
  static constexpr int columns = dim / parts, part_keys = Step / parts;
  static constexpr int pitch = pitch_of(dim), weight_pitch = pitch_of(Step);

  struct Params {
    Problem problem;
    Heads<const T> q, k, v;
    Heads<T> out;
    Global<float> lse;      // (B, H, Sq), or empty
    Global<float> partial;  // (splits, B, H, Sq, 512) where the keys are split
    Global<float> sums;     // (2, splits, B, H, Sq): the largest scores, and the sums below them
    int tiles, splits;
  };

  struct Layout {
    int q, k, v, weights, most, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout() {
    SharedLayout shared;
    const int q = shared.take<T>(rows * pitch);
    const int k = shared.take<T>(Step * pitch);
    const int v = shared.take<T>(Step * pitch);
    const int weights = shared.take<T>(rows * weight_pitch);
    const int most = shared.take<float>(parts * rows);
    return {q, k, v, weights, most, shared.bytes()};
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const Problem& problem = params.problem;
    const Place place = place_of(problem, params.tiles * params.splits);
    const int split = place.tile / params.tiles;
    const int block_query = place.tile % params.tiles * rows;
    const int group = warp_id() / parts, part = warp_id() % parts, lane = lane_id();
    const int row0 = group * 16 * m, query0 = block_query + row0;
    const auto q = dynamic_shared<T>(layout().q, rows * pitch);
    const auto k = dynamic_shared<T>(layout().k, Step * pitch);
    const auto v = dynamic_shared<T>(layout().v, Step * pitch);
    const auto weights = dynamic_shared<T>(layout().weights, rows * weight_pitch);
    const auto shared_most = dynamic_shared<float>(layout().most, parts * rows);
    const auto mask = mask_of(problem, place);
    const auto key_rows = params.k.at(place.batch, place.head), value_rows = params.v.at(place.batch, place.head);
    const auto fetch_keys = [&](int index) {
      fetch<Step, dim, threads>(k, key_rows, params.k.row, index * Step, problem.keys, dim, thread_id());
    };

    const int last = problem.causal && block_query + rows < problem.keys ? block_query + rows : problem.keys;
    const int steps = ceil_div(last, Step), per_split = ceil_div(ceil_div(problem.keys, Step), params.splits);
    const int begin = split * per_split, end = begin + per_split < steps ? begin + per_split : steps;
    fetch<rows, dim, threads>(q, params.q.at(place.batch, place.head), params.q.row, block_query, problem.queries, dim,
                              thread_id());
    if (begin < end) fetch_keys(begin);
    commit_group();
    const Left<T, m, dim, false> left{q + row0 * pitch, problem.flip, {}};
    Softmax<m> softmax;
    softmax.begin();
    float acc[m][columns / 8][4];
    clear(acc);

    for (int index = begin; index < end; ++index) {
      wait_group<0>();
      block_sync();
      fetch<Step, dim, threads>(v, value_rows, params.v.row, index * Step, problem.keys, dim, thread_id());
      commit_group();
      const int key0 = index * Step + part * part_keys;
      float s[m][part_keys / 8][4];
      inner<T, dim>(s, left, Shared<const T>(k + part * part_keys * pitch));
      if (!is_whole(problem, key0, part_keys, query0)) {
        OpenKeys<part_keys> open;
        open.find(problem, mask, key0);
        mask_columns<T>(s, problem, mask, open, key0, query0);
      }
#pragma unroll
      for (int row = 0; row < 2 * m; ++row) {
        const float most = softmax.largest(s, row);
        if (lane % 4 == 0) shared_most.store(part * rows + row0 + lane / 4 + 8 * row, most);
      }
      block_sync();
      if (index + 1 < end) fetch_keys(index + 1);
      commit_group();
      const auto pairs = weights.template as<std::uint32_t>();
#pragma unroll
      for (int row = 0; row < 2 * m; ++row) {
        const int at = row0 + lane / 4 + 8 * row;
        float most = shared_most.load(at);
#pragma unroll
        for (int other = 1; other < parts; ++other) most = max_number(most, shared_most.load(other * rows + at));
        scale_row(acc, row, softmax.weigh(s, row, most, problem.unit));
#pragma unroll
        for (int n = 0; n < part_keys / 8; ++n) {
          const float(&pair)[4] = s[row / 2][n];
          pairs.store((at * weight_pitch + part * part_keys + 8 * n + lane % 4 * 2) / 2,
                      pack<T>(pair[row % 2 * 2], pair[row % 2 * 2 + 1]));
        }
      }
      wait_group<1>();
      block_sync();
#pragma unroll
      for (int key = 0; key < Step; key += 16) {
        std::uint32_t a[m][4];
#pragma unroll
        for (int i = 0; i < m; ++i) {
          load_matrices(a[i], weights + (row0 + 16 * i + lane % 16) * weight_pitch + key + lane / 16 * 8);
        }
        outer_step<T, dim>(acc, a, Shared<const T>(v + key * pitch + part * columns));
      }
    }

    wait_group<0>();
    add_up_parts(softmax, shared_most, row0, part);
    if (params.splits > 1) {
      store_partial(params, place, split, softmax, acc, query0, part);
      return;
    }
#pragma unroll
    for (int row = 0; row < 2 * m; ++row) {
      scale_row(acc, row, inverse(softmax.total[row]));
      const int query = query0 + lane / 4 + 8 * row;
      if (params.lse && part == 0 && lane % 4 == 0 && query < problem.queries) {
        params.lse.store(place.both * problem.queries + query, softmax.log_sum(row, problem.size));
      }
    }
    store_rows<T, pitch>(acc, q + row0 * pitch + part * columns,
                         params.out.at(place.batch, place.head) + part * columns, params.out.row, query0,
                         problem.queries, columns);
  }

  // The sums of rows over the lanes, then over the parts in order. All of the block is done with shared memory after.
  FASTLDM_DEVICE static void add_up_parts(Softmax<m>& softmax, const Shared<float>& sums, int row0, int part) {
    softmax.add_up_lanes();
    block_sync();
#pragma unroll
    for (int row = 0; row < 2 * m; ++row) {
      if (lane_id() % 4 == 0) sums.store(part * rows + row0 + lane_id() / 4 + 8 * row, softmax.total[row]);
    }
    block_sync();
#pragma unroll
    for (int row = 0; row < 2 * m; ++row) {
      const int at = row0 + lane_id() / 4 + 8 * row;
      softmax.total[row] = sums.load(at);
#pragma unroll
      for (int other = 1; other < parts; ++other) softmax.total[row] += sums.load(other * rows + at);
    }
  }

  FASTLDM_DEVICE static void store_partial(const Params& params, const Place& place, int split,
                                           const Softmax<m>& softmax, const float (&acc)[m][columns / 8][4],
                                           int query0, int part) {
    const std::int64_t queries = params.problem.queries, all = grid_x() / (params.tiles * params.splits) * queries;
#pragma unroll
    for (int row = 0; row < 2 * m; ++row) {
      const int query = query0 + lane_id() / 4 + 8 * row;
      if (query >= queries) continue;
      const std::int64_t at = split * all + place.both * queries + query;
      if (part == 0 && lane_id() % 4 == 0) {
        params.sums.store(at, softmax.top[row]);
        params.sums.store(params.splits * all + at, softmax.total[row]);
      }
#pragma unroll
      for (int n = 0; n < columns / 8; ++n) {
        const float(&c)[4] = acc[row / 2][n];
        const Vec<float, 2> pair{{c[row % 2 * 2], c[row % 2 * 2 + 1]}};
        params.partial.template store_vector<2>(at * dim + part * columns + 8 * n + lane_id() % 4 * 2, pair);
      }
    }
  }
};

// out and lse of the parts of split keys. A block is a query, a thread four columns.
template <class T>
struct WideCombine {
  static constexpr int dim = 512;
  static constexpr int threads = dim / 4;
  static constexpr int min_blocks = 8;
  static constexpr int min_capability = 80;

  struct Params {
    Problem problem;
    Global<const float> partial, sums;
    Heads<T> out;
    Global<float> lse;
    int splits;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    const Problem& problem = params.problem;
    const std::int64_t row = block_x(), all = grid_x();
    float most = -kInfinity;
    for (int split = 0; split < params.splits; ++split) {
      most = max_number(most, params.sums.load(split * all + row));
    }
    const float base = most == -kInfinity ? 0.0f : most;
    float total = 0.0f;
    Vec<float, 4> sum = {{0.0f, 0.0f, 0.0f, 0.0f}};
    for (int split = 0; split < params.splits; ++split) {
      const float weight = exp2_approx((params.sums.load(split * all + row) - base) * problem.unit);
      total = fused_multiply_add(weight, params.sums.load((params.splits + split) * all + row), total);
      const auto part = params.partial.template load_vector<4>((split * all + row) * dim + 4 * thread_id());
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fused_multiply_add(weight, part[i], sum[i]);
    }
    const float factor = inverse(total);
    Vec<std::uint32_t, 2> packed = {
        {pack<T>(sum[0] * factor, sum[1] * factor), pack<T>(sum[2] * factor, sum[3] * factor)}};
    Vec<T, 4> result;
    memcpy(&result, &packed, sizeof(result));
    const std::int64_t both = row / problem.queries, query = row % problem.queries;
    params.out.at(both / problem.heads, both % problem.heads)
        .template store_vector<4>(query * params.out.row + 4 * thread_id(), result);
    if (params.lse && thread_id() == 0) {
      const float lse = total == 0.0f ? -kInfinity : most * problem.size + log2_approx(total) * kLn2;
      params.lse.store(row, lse);
    }
  }
};

}  // namespace fastldm::cuda::attention
