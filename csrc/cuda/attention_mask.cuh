// Which scores a mask, the end of the keys and causality leave open.
#pragma once

#include "cuda/attention_tile.cuh"

namespace fastldm::cuda::attention {

// Which of some keys are there and open, a bit each; the same in all lanes of a warp.
template <int Keys>
struct OpenKeys {
  std::uint32_t words[ceil_div(Keys, kWarp)];

  FASTLDM_DEVICE void find(const Problem& problem, const Global<const std::uint8_t>& mask, int first) {
#pragma unroll
    for (int word = 0; word < ceil_div(Keys, kWarp); ++word) {
      const int key = first + word * kWarp + lane_id();
      bool yes = key < problem.keys && word * kWarp + lane_id() < Keys;
      if (yes && mask) yes = mask.load(key * problem.mask.key) != 0;
      words[word] = ballot(yes);
    }
  }

  FASTLDM_DEVICE bool none() const {
    std::uint32_t any = 0;
#pragma unroll
    for (std::uint32_t word : words) any |= word;
    return any == 0;
  }
};

FASTLDM_DEVICE Global<const std::uint8_t> mask_of(const Problem& problem, const Place& place) {
  if (!problem.mask.data) return problem.mask.data;
  return problem.mask.data + (place.batch * problem.mask.batch + place.head * problem.mask.head);
}

// -infinity for scores of closed keys. Columns of c are keys from `key0` on; rows are queries from `query0` on.
template <int M, int N, int Keys>
FASTLDM_DEVICE void close_columns(float (&c)[M][N][4], const Problem& problem, const OpenKeys<Keys>& open, int key0,
                                  int query0) {
  const int row = query0 + lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // 8 n is known when this is compiled, so the word is too.
        const bool is_open = open.words[8 * n / kWarp] >> (8 * n % kWarp + column + i % 2) & 1;
        const bool seen = !problem.causal || key0 + 8 * n + column + i % 2 <= row + 16 * m + i / 2 * 8;
        if (!is_open || !seen) c[m][n][i] = -kInfinity;
      }
    }
  }
}

// Whether the tile of keys needs no look at single scores.
FASTLDM_DEVICE bool is_whole(const Problem& problem, int key0, int keys, int query0) {
  return !problem.mask.data && key0 + keys <= problem.keys && !(problem.causal && key0 + keys - 1 > query0);
}

// The same where rows are keys: bit i says that row i of this lane's rows is a key that is there and open.
template <int M>
FASTLDM_DEVICE unsigned open_rows(const Problem& problem, const Global<const std::uint8_t>& mask, int key0) {
  unsigned open = 0;
#pragma unroll
  for (int row = 0; row < 2 * M; ++row) {
    const int key = key0 + lane_id() / 4 + 8 * row;
    bool yes = key < problem.keys;
    if (yes && mask) yes = mask.load(key * problem.mask.key) != 0;
    open |= static_cast<unsigned>(yes) << row;
  }
  return open;
}

// -infinity for scores of closed keys, which here are the rows of c; columns are queries from `query0` on.
template <int M, int N>
FASTLDM_DEVICE void close_rows(float (&c)[M][N][4], const Problem& problem, unsigned open, int key0, int query0) {
  const int row = key0 + lane_id() / 4, column = query0 + lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4 * M; ++i) {
    const bool is_open = open >> (i / 2) & 1;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const bool seen = !problem.causal || row + i / 2 * 8 <= column + 8 * n + i % 2;
      if (!is_open || !seen) c[i / 4][n][i % 4] = -kInfinity;
    }
  }
}

}  // namespace fastldm::cuda::attention
