// What the backward of attention needs of every query, found before it.
//
// delta = sum(grad out), one read of both. The weights are exp(score - lse), which is off by half a last place of lse;
// where |lse| is above 64 that is more than 4e-6, and where scores are 1e5 nothing is left. There the largest score and
// the sum of exp(score - largest) are found anew, by the products in the order of the other kernels: it happens to
// hardly any model, so fragments come straight from global memory. A warp has 16 queries and waits for no other.
#pragma once

#include "cuda/attention_mask.cuh"

namespace fastldm::cuda::attention {

template <class T>
struct BackwardStatistics {
  static constexpr int warps = 4, threads = warps * kWarp, rows = 16 * warps;
  static constexpr int min_blocks = 8;
  static constexpr int min_capability = 80;
  static constexpr float large = 64.0f;

  struct Params {
    Problem problem;
    Heads<const T> q, k, out, grad;
    Global<const float> lse;
    Global<float> values;  // (3, B, H, Sq): reference, factor, delta
    std::int64_t all;      // B H Sq
    int tiles;
    int eight;  // whether the other kernels take the last 8 columns in a step of their own
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    const Problem& problem = params.problem;
    const Place place = place_of(problem, params.tiles);
    const int query0 = place.tile * rows + warp_id() * 16, lane = lane_id();
    const auto grad = params.grad.at(place.batch, place.head), out = params.out.at(place.batch, place.head);
    const auto to = params.values + place.both * problem.queries;
    float lse[2], delta[2] = {};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int query = query0 + lane / 4 + 8 * row;
      const bool inside = query < problem.queries;
      lse[row] = inside ? params.lse.load(place.both * problem.queries + query) : 0.0f;
      for (int column = lane % 4 * 8; inside && column < problem.dim; column += 32) {
        const auto x = grad.template load_vector<8>(query * params.grad.row + column);
        const auto y = out.template load_vector<8>(query * params.out.row + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) delta[row] = fused_multiply_add(to_float(x[i]), to_float(y[i]), delta[row]);
      }
      delta[row] = warp_reduce<4>(delta[row], Sum());
    }
    // A row without an open key: exp(-inf - inf) is 0, where exp(-inf + inf) would be NaN.
    float reference[2], factor[2] = {1.0f, 1.0f};
    bool is_large[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      reference[row] = lse[row] == -kInfinity ? kInfinity : divide(lse[row], problem.size);
      is_large[row] = (lse[row] > large || lse[row] < -large) && lse[row] != -kInfinity;
    }
    if (any_lane(is_large[0] || is_large[1])) {
      Softmax<1> softmax;
      find(softmax, params, place, query0);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (is_large[row]) {
          reference[row] = softmax.top[row];
          factor[row] = divide(1.0f, softmax.total[row]);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int query = query0 + lane / 4 + 8 * row;
      if (lane % 4 == 0 && query < problem.queries) {
        to.store(query, reference[row]);
        to.store(params.all + query, factor[row]);
        to.store(2 * params.all + query, delta[row]);
      }
    }
  }

  // Columns column, column + 1 of a row; 0 past the end.
  FASTLDM_DEVICE static std::uint32_t pair_of(const Global<const T>& from, std::int64_t stride, int row, int count,
                                              int column, int dim) {
    std::uint32_t pair = 0;
    if (row < count && column < dim) {
      const auto found = from.template load_vector<2>(row * stride + column);
      memcpy(&pair, &found, sizeof(pair));
    }
    return pair;
  }

  FASTLDM_DEVICE static void find(Softmax<1>& softmax, const Params& params, const Place& place, int query0) {
    const Problem& problem = params.problem;
    const int row = query0 + lane_id() / 4, column = lane_id() % 4 * 2;
    const auto q = params.q.at(place.batch, place.head), k = params.k.at(place.batch, place.head);
    const auto mask = mask_of(problem, place);
    const int last = problem.causal && query0 + 16 < problem.keys ? query0 + 16 : problem.keys;
    softmax.begin();
    for (int key0 = 0; key0 < last; key0 += 8) {
      float s[1][1][4] = {};
      int at = column;
      for (; at - column + (params.eight ? 16 : 1) <= problem.dim; at += 16) {
        std::uint32_t a[4], b[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = problem.flip ^ pair_of(q, params.q.row, row + i % 2 * 8, problem.queries, at + i / 2 * 8, problem.dim);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          b[i] = pair_of(k, params.k.row, key0 + lane_id() / 4, problem.keys, at + 8 * i, problem.dim);
        }
        mma_16x8x16<T>(s[0][0], a, b);
      }
      if (params.eight) {
        std::uint32_t a[2], b[1];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i] = problem.flip ^ pair_of(q, params.q.row, row + i * 8, problem.queries, at, problem.dim);
        }
        b[0] = pair_of(k, params.k.row, key0 + lane_id() / 4, problem.keys, at, problem.dim);
        mma_16x8x8<T>(s[0][0], a, b);
      }
      OpenKeys<8> open;
      open.find(problem, mask, key0);
      mask_columns<T>(s, problem, mask, open, key0, query0);
#pragma unroll
      for (int i = 0; i < 2; ++i) softmax.weigh(s, i, softmax.largest(s, i), problem.unit);
    }
    softmax.add_up_lanes();
  }
};

}  // namespace fastldm::cuda::attention
