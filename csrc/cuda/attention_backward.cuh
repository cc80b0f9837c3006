// Attention backward for head dims up to 256, deterministic and without atomics: dk and dv by tiles of keys, dq by
// tiles of queries, each of which computes the scores again (FlashAttention, arXiv 2205.14135, appendix B.2).
//
// Floor: 14 Sq Sk D operations of each head. Sharing the scores would be 10, but dq would then be summed over tiles of
// keys in float32: by atomics in any order, or written down and read again, 8 Sq D bytes for every tile of 128 keys,
// which costs as much time as the two products (4 x 128 operations of an element of q at 600 TFLOP/s, 0.85 ps; 8 bytes
// at 4 TB/s, 2 ps).
//
// In BackwardKeys scores are transposed, keys by queries: weights and dS then are, in the registers where they were
// made, what the products that give dv and dk want at their left. A warp owns 32 keys up to Dim 64, 16 above, where
// accumulators of 32 are too many registers. Shared memory by warp and step of 32 queries: q and g twice each (256 Dim
// bytes), k and v once unless held in registers; 10.7 multiply-adds a byte with 32 keys, 8 with 16 held, 6.4 with 16
// not held, of the 8 that an A100 can use.
//
//   Dim                              40      64      72      80      96      128     160     256
//   keys of a block                  128     128     128     128     128     64      64      64, dk and dv apart
//   BackwardKeys, shared memory, KiB 31      55      56      67      79      69      85      99
//   queries of a block               128     128     128     128     128     64      64      64
//   BackwardQueries, KiB             30      54      54      66      78      68      84      99
//   blocks, sm_80 / sm_90            2/2     2/2     1/1     1/1     1/1     2/2     1/2     1/2
//
// Few keys are few blocks: so queries may be split into chunks, whose float32 sums BackwardReduce adds in order.
#pragma once

#include "cuda/attention_mask.cuh"

namespace fastldm::cuda::attention {

// What BackwardStatistics found of each query, (B, H, Sq) each: weight = factor exp(score - reference).
struct QueryStatistics {
  Global<const float> values;  // (3, B, H, Sq): reference, factor, delta
  std::int64_t all;            // B H Sq
};

enum class Part { both, key, value };

template <class T, int Dim, Part Wanted>
struct BackwardKeys {
  static constexpr int m = Dim <= 64 ? 2 : 1;
  static constexpr int warps = Dim > 64 && Dim <= 96 ? 8 : 4, threads = warps * kWarp;
  static constexpr int min_blocks = warps == 4 ? 2 : 1;
  static constexpr int min_capability = 80;
  static constexpr int keys = warps * 16 * m;
  static constexpr int step = Dim <= 160 ? 32 : 16;  // queries, copied at a time
  static constexpr int at_once = Dim == 64 || Dim == 160 ? 16 : step;  // multiplied at a time: 32 would spill
  static constexpr int pitch = pitch_of(Dim), stages = 2;
  static constexpr bool held = m == 1 && Dim <= 96;
  static constexpr bool want_k = Wanted != Part::value, want_v = Wanted != Part::key;

  struct Params {
    Problem problem;
    float scale;
    Heads<const T> q, k, v, grad;
    QueryStatistics statistics;
    Heads<T> dk, dv;
    Global<float> partial;  // (2, chunks, B, H, Sk, D) of dk and dv, where there are chunks
    int tiles, chunks;
  };

  struct Layout {
    int k, v, q, grad, statistics, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout() {
    SharedLayout shared;
    const int k = shared.take<T>(keys * pitch);
    const int v = shared.take<T>(keys * pitch);
    const int q = shared.take<T>(stages * step * pitch);
    const int grad = shared.take<T>(stages * step * pitch);
    const int statistics = shared.take<float>(stages * 3 * step);
    return {k, v, q, grad, statistics, shared.bytes()};
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const Problem& problem = params.problem;
    const Place place = place_of(problem, params.tiles * params.chunks);
    const int chunk = place.tile / params.tiles, block_key = place.tile % params.tiles * keys;
    const int own_row = warp_id() * 16 * m, key0 = block_key + own_row;
    const auto k = dynamic_shared<T>(layout().k, keys * pitch);
    const auto v = dynamic_shared<T>(layout().v, keys * pitch);
    const auto q = dynamic_shared<T>(layout().q, stages * step * pitch);
    const auto grad = dynamic_shared<T>(layout().grad, stages * step * pitch);
    const auto statistics = dynamic_shared<float>(layout().statistics, stages * 3 * step);
    const auto query_rows = params.q.at(place.batch, place.head);
    const auto grad_rows = params.grad.at(place.batch, place.head);
    const auto statistics_row = params.statistics.values + place.both * problem.queries;
    const auto fetch_step = [&](int index) {
      const int stage = index % stages, at = stage * step * pitch, query0 = index * step;
      fetch<step, Dim, threads>(q + at, query_rows, params.q.row, query0, problem.queries, problem.dim, thread_id());
      fetch<step, Dim, threads>(grad + at, grad_rows, params.grad.row, query0, problem.queries, problem.dim,
                                thread_id());
      if (thread_id() < 3 * step) {
        // Past the end factor is 0, and so are weights.
        const int kind = thread_id() / step, query = query0 + thread_id() % step;
        const bool inside = query < problem.queries;
        copy_async<4>(statistics + stage * 3 * step + thread_id(),
                      statistics_row + (inside ? kind * params.statistics.all + query : 0), inside ? 4 : 0);
      }
    };

    const int steps = ceil_div(problem.queries, step), per_chunk = ceil_div(steps, params.chunks);
    const int first = chunk * per_chunk, diagonal = problem.causal ? block_key / step : 0;
    const int begin = first > diagonal ? first : diagonal;
    const int end = first + per_chunk < steps ? first + per_chunk : steps;
    fetch<keys, Dim, threads>(k, params.k.at(place.batch, place.head), params.k.row, block_key, problem.keys,
                              problem.dim, thread_id());
    if constexpr (want_k) {
      fetch<keys, Dim, threads>(v, params.v.at(place.batch, place.head), params.v.row, block_key, problem.keys,
                                problem.dim, thread_id());
    }
    if (begin < end) fetch_step(begin);
    commit_group();

    const auto mask = mask_of(problem, place);
    const unsigned open = open_rows<m>(problem, mask, key0);
    const bool none_open = !any_lane(open != 0);
    const bool all_open = all_lanes(open == (1u << 2 * m) - 1) && !masks_scores(problem);
    Left<T, m, Dim, held> key_rows{k + own_row * pitch, problem.flip, {}}, value_rows{v + own_row * pitch, 0, {}};
    float dk[m][Dim / 8][4], dv[m][Dim / 8][4];
    clear(dk);
    clear(dv);

    for (int index = begin; index < end; ++index) {
      wait_group<0>();
      block_sync();
      if (index + 1 < end) fetch_step(index + 1);
      commit_group();
      if (index == begin) {
        key_rows.hold();
        if constexpr (want_k) value_rows.hold();
      }
      const int stage = index % stages;
#pragma unroll 1
      for (int part = 0; part < step; part += at_once) {
        const int query0 = index * step + part, row = stage * step + part;
        if (none_open || (problem.causal && query0 + at_once - 1 < key0)) continue;
        const Shared<const T> query_tile = q + row * pitch, grad_tile = grad + row * pitch;
        const auto columns = statistics + (stage * 3 * step + part + lane_id() % 4 * 2);
        float p[m][at_once / 8][4];
        inner<T, Dim>(p, key_rows, query_tile);
        if (!all_open || (problem.causal && key0 + 16 * m - 1 > query0)) {
          mask_rows<T>(p, problem, mask, open, key0, query0);
        }
        weigh(p, columns, problem.unit);
        if constexpr (want_v) outer<T, Dim>(dv, p, grad_tile);
        if constexpr (want_k) {
          float ds[m][at_once / 8][4];
          inner<T, Dim>(ds, value_rows, grad_tile);
          differentiate(ds, p, columns);
          outer<T, Dim>(dk, ds, query_tile);
        }
      }
    }

    wait_group<0>();
    block_sync();
    if constexpr (want_k) {
#pragma unroll
      for (int row = 0; row < 2 * m; ++row) scale_row(dk, row, params.scale);
      if (params.chunks == 1) {
        store_rows<T, pitch>(dk, k + own_row * pitch, params.dk.at(place.batch, place.head), params.dk.row, key0,
                             problem.keys, problem.dim);
      } else {
        store_partial(dk, params, place, chunk, 0, key0);
      }
    }
    if constexpr (want_v) {
      if (params.chunks == 1) {
        store_rows<T, pitch>(dv, v + own_row * pitch, params.dv.at(place.batch, place.head), params.dv.row, key0,
                             problem.keys, problem.dim);
      } else {
        store_partial(dv, params, place, chunk, 1, key0);
      }
    }
  }

  // Scores to weights. `statistics` are those of this lane's columns: reference, then factor and delta.
  FASTLDM_DEVICE static void weigh(float (&s)[m][at_once / 8][4], const Shared<float>& statistics, float unit) {
#pragma unroll
    for (int n = 0; n < at_once / 8; ++n) {
      const auto reference = statistics.template load_vector<2>(8 * n);
      const auto factor = statistics.template load_vector<2>(step + 8 * n);
#pragma unroll
      for (int i = 0; i < 4 * m; ++i) {
        float& x = s[i / 4][n][i % 4];
        x = exp2_approx((x - reference[i % 2]) * unit) * factor[i % 2];
      }
    }
  }

  // dP to dS.
  FASTLDM_DEVICE static void differentiate(float (&dp)[m][at_once / 8][4], const float (&p)[m][at_once / 8][4],
                                           const Shared<float>& statistics) {
#pragma unroll
    for (int n = 0; n < at_once / 8; ++n) {
      const auto delta = statistics.template load_vector<2>(2 * step + 8 * n);
#pragma unroll
      for (int i = 0; i < 4 * m; ++i) {
        const float weight = p[i / 4][n][i % 4];
        float& x = dp[i / 4][n][i % 4];
        // What stands where a key is closed may have made the product infinite.
        x = weight == 0.0f ? 0.0f : weight * (x - delta[i % 2]);
      }
    }
  }

  FASTLDM_DEVICE static void store_partial(const float (&c)[m][Dim / 8][4], const Params& params, const Place& place,
                                           int chunk, int which, int key0) {
    const Problem& problem = params.problem;
    const std::int64_t heads = grid_x() / (params.tiles * params.chunks);
    const std::int64_t first = ((which * params.chunks + chunk) * heads + place.both) * problem.keys;
#pragma unroll
    for (int row = 0; row < 2 * m; ++row) {
      const int key = key0 + lane_id() / 4 + 8 * row;
#pragma unroll
      for (int n = 0; n < Dim / 8; ++n) {
        const float(&pair)[4] = c[row / 2][n];
        if (key < problem.keys && 8 * n < problem.dim) {
          params.partial.template store_vector<2>((first + key) * problem.dim + 8 * n + lane_id() % 4 * 2,
                                                  {{pair[row % 2 * 2], pair[row % 2 * 2 + 1]}});
        }
      }
    }
  }
};

template <class T, int Dim>
struct BackwardQueries {
  static constexpr int m = Dim <= 64 ? 2 : 1;
  static constexpr int warps = Dim > 64 && Dim <= 96 ? 8 : 4, threads = warps * kWarp;
  static constexpr int min_blocks = warps == 4 ? 2 : 1;
  static constexpr int min_capability = 80;
  static constexpr int rows = warps * 16 * m;
  static constexpr int step = Dim <= 160 ? 32 : 16;  // keys
  static constexpr int pitch = pitch_of(Dim), stages = 2;
  static constexpr bool held = m == 1 && Dim <= 128;

  struct Params {
    Problem problem;
    float scale;
    Heads<const T> q, k, v, grad;
    QueryStatistics statistics;
    Heads<T> dq;
    int tiles;
  };

  struct Layout {
    int q, grad, k, v, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout() {
    SharedLayout shared;
    const int q = shared.take<T>(rows * pitch);
    const int grad = shared.take<T>(rows * pitch);
    const int k = shared.take<T>(stages * step * pitch);
    const int v = shared.take<T>(stages * step * pitch);
    return {q, grad, k, v, shared.bytes()};
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const Problem& problem = params.problem;
    Place place = place_of(problem, params.tiles);
    if (problem.causal) place.tile = params.tiles - 1 - place.tile;  // the longest rows first
    const int block_query = place.tile * rows, own_row = warp_id() * 16 * m, query0 = block_query + own_row;
    const auto q = dynamic_shared<T>(layout().q, rows * pitch);
    const auto grad = dynamic_shared<T>(layout().grad, rows * pitch);
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
    fetch<rows, Dim, threads>(grad, params.grad.at(place.batch, place.head), params.grad.row, block_query,
                              problem.queries, problem.dim, thread_id());
    fetch_step(0);
    commit_group();
    float reference[2 * m], factor[2 * m], delta[2 * m];
#pragma unroll
    for (int row = 0; row < 2 * m; ++row) {
      const int query = query0 + lane_id() / 4 + 8 * row;
      const bool inside = query < problem.queries;
      const auto from = params.statistics.values + (place.both * problem.queries + (inside ? query : 0));
      reference[row] = from.load();
      factor[row] = inside ? from.load(params.statistics.all) : 0.0f;
      delta[row] = from.load(2 * params.statistics.all);
    }
    Left<T, m, Dim, held> query_left{q + own_row * pitch, problem.flip, {}}, grad_left{grad + own_row * pitch, 0, {}};
    float dq[m][Dim / 8][4];
    clear(dq);

    for (int index = 0; index < steps; ++index) {
      wait_group<0>();
      block_sync();
      if (index + 1 < steps) fetch_step(index + 1);
      commit_group();
      if (index == 0) {
        query_left.hold();
        grad_left.hold();
      }
      const int key0 = index * step;
      if (problem.causal && key0 > query0 + 16 * m - 1) continue;
      const bool whole = is_whole(problem, key0, step, query0);
      OpenKeys<step> open;
      if (!whole) {
        open.find(problem, mask, key0);
        if (open.none()) continue;
      }
      const Shared<const T> key_tile = k + index % stages * step * pitch, value_tile = v + index % stages * step * pitch;
      float p[m][step / 8][4], ds[m][step / 8][4];
      inner<T, Dim>(p, query_left, key_tile);
      if (!whole) mask_columns<T>(p, problem, mask, open, key0, query0);
      inner<T, Dim>(ds, grad_left, value_tile);
#pragma unroll
      for (int n = 0; n < step / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4 * m; ++i) {
          const float weight =
              exp2_approx((p[i / 4][n][i % 4] - reference[i / 2]) * problem.unit) * factor[i / 2];
          float& x = ds[i / 4][n][i % 4];
          x = weight == 0.0f ? 0.0f : weight * (x - delta[i / 2]);
        }
      }
      outer<T, Dim>(dq, ds, key_tile);
    }

#pragma unroll
    for (int row = 0; row < 2 * m; ++row) scale_row(dq, row, params.scale);
    warp_sync();
    store_rows<T, pitch>(dq, q + own_row * pitch, params.dq.at(place.batch, place.head), params.dq.row, query0,
                         problem.queries, problem.dim);
  }
};

// Gradients of the sums of chunks, added in order. A thread makes 8 elements; along y are the gradients, dk and dv, or
// of a wide head dq.
template <class T>
struct BackwardReduce {
  static constexpr int threads = 256;
  static constexpr int min_blocks = 4;
  static constexpr int min_capability = 80;

  struct Params {
    Global<const float> partial;  // (1 or 2, chunks, B, H, rows, D)
    Heads<T> first, second;
    std::int64_t size;  // B H rows D
    int heads, rows, dim, chunks;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    const std::int64_t at = (static_cast<std::int64_t>(block_x()) * threads + thread_id()) * 8;
    if (at >= params.size) return;
    const auto from = params.partial + (block_y() * params.chunks * params.size + at);
    float sum[8] = {};
    for (int chunk = 0; chunk < params.chunks; ++chunk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto part = from.template load_vector<4>(chunk * params.size + 4 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[4 * half + i] += part[i];
      }
    }
    Vec<std::uint32_t, 4> packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = pack<T>(sum[2 * i], sum[2 * i + 1]);
    Vec<T, 8> result;
    memcpy(&result, &packed, sizeof(result));
    const std::int64_t row = at / params.dim, both = row / params.rows;
    const Heads<T>& to = block_y() == 0 ? params.first : params.second;
    to.at(both / params.heads, both % params.heads)
        .template store_vector<8>(row % params.rows * to.row + at % params.dim, result);
  }
};

}  // namespace fastldm::cuda::attention
