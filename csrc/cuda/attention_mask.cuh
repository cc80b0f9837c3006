// What a mask, the end of the keys and causality make of scores. A mask is read here straight from global memory.
#pragma once

#include "cuda/attention_tile.cuh"

namespace fastldm::cuda::attention {

// Whether a mask has something to say to single scores, which mask_scores does.
FASTLDM_HOST_DEVICE bool masks_scores(const Problem& problem) {
  return problem.mask.kind != MaskKind::none && problem.mask.kind != MaskKind::keys;
}

// Where the mask of a head begins.
FASTLDM_DEVICE Global<const std::uint8_t> mask_of(const Problem& problem, const Place& place) {
  if (!problem.mask.data) return problem.mask.data;
  return problem.mask.data + (place.batch * problem.mask.batch + place.head * problem.mask.head);
}

FASTLDM_DEVICE bool is_open(const Problem& problem, const Global<const std::uint8_t>& mask, int key) {
  if (key >= problem.keys) return false;
  return problem.mask.kind != MaskKind::keys || mask.load(key * problem.mask.key) != 0;
}

// Which of some keys are there and open to all queries, a bit each; the same in all lanes of a warp.
template <int Keys>
struct OpenKeys {
  std::uint32_t words[ceil_div(Keys, kWarp)];

  FASTLDM_DEVICE void find(const Problem& problem, const Global<const std::uint8_t>& mask, int first) {
#pragma unroll
    for (int word = 0; word < ceil_div(Keys, kWarp); ++word) {
      const int at = word * kWarp + lane_id();
      words[word] = ballot(at < Keys && is_open(problem, mask, first + at));
    }
  }

  FASTLDM_DEVICE bool none() const {
    std::uint32_t any = 0;
#pragma unroll
    for (std::uint32_t word : words) any |= word;
    return any == 0;
  }
};

// What mask_scores does with a mask of elements E: bool (std::uint8_t), T or float.
template <class E, bool KeysAreRows, int M, int N>
FASTLDM_DEVICE void mask_scores_of(float (&c)[M][N][4], const Problem& problem, const Global<const std::uint8_t>& mask,
                                   int key0, int query0) {
  const Mask& how = problem.mask;
  const int row0 = (KeysAreRows ? key0 : query0) + lane_id() / 4;
  const int column0 = (KeysAreRows ? query0 : key0) + lane_id() % 4 * 2;
  const int rows = KeysAreRows ? problem.keys : problem.queries, columns = KeysAreRows ? problem.queries : problem.keys;
  const std::int64_t row_stride = KeysAreRows ? how.key : how.query, column_stride = KeysAreRows ? how.query : how.key;
  // From one element to the next, or 64 offsets would be kept at once.
  const std::int64_t row_step = 8 * row_stride;
  std::int64_t first = row0 * row_stride + column0 * column_stride;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) {
    const int column = column0 + i / 2 * 8 + i % 2;
    std::int64_t at = first;
#pragma unroll
    for (int r = 0; r < 2 * M; ++r, at = opaque(at + row_step)) {
      if (column >= columns || row0 + 8 * r >= rows) continue;
      const auto bytes = mask.template load_vector<sizeof(E)>(at);
      float& x = c[r / 2][i / 2][r % 2 * 2 + i % 2];
      if constexpr (sizeof(E) == 1) {
        if (bytes[0] == 0) x = -kInfinity;
      } else {
        E element;
        memcpy(&element, &bytes, sizeof(element));
        const float added = to_float(element);
        // What a closed key holds, infinity included, must not show.
        x = added == -kInfinity ? added : fused_multiply_add(x, problem.scale, added);
      }
    }
    first = opaque(first + (i % 2 == 0 ? 1 : 7) * column_stride);
  }
}

// Scores with the mask in them, where masks_scores. Columns of c are keys from `key0` on and rows queries from `query0`
// on, or the other way round. What is past the end stays.
template <class T, bool KeysAreRows, int M, int N>
FASTLDM_DEVICE void mask_scores(float (&c)[M][N][4], const Problem& problem, const Global<const std::uint8_t>& mask,
                                int key0, int query0) {
  if (problem.mask.kind == MaskKind::scores) mask_scores_of<std::uint8_t, KeysAreRows>(c, problem, mask, key0, query0);
  if (problem.mask.kind == MaskKind::added) mask_scores_of<T, KeysAreRows>(c, problem, mask, key0, query0);
  if (problem.mask.kind == MaskKind::added_floats) mask_scores_of<float, KeysAreRows>(c, problem, mask, key0, query0);
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
        const bool key_open = open.words[8 * n / kWarp] >> (8 * n % kWarp + column + i % 2) & 1;
        const bool seen = !problem.causal || key0 + 8 * n + column + i % 2 <= row + 16 * m + i / 2 * 8;
        if (!key_open || !seen) c[m][n][i] = -kInfinity;
      }
    }
  }
}

// Both of the above.
template <class T, int M, int N, int Keys>
FASTLDM_DEVICE void mask_columns(float (&c)[M][N][4], const Problem& problem, const Global<const std::uint8_t>& mask,
                                 const OpenKeys<Keys>& open, int key0, int query0) {
  if (masks_scores(problem)) mask_scores<T, false>(c, problem, mask, key0, query0);
  close_columns(c, problem, open, key0, query0);
}

// Whether the tile of keys needs no look at single scores.
FASTLDM_DEVICE bool is_whole(const Problem& problem, int key0, int keys, int query0) {
  return !problem.mask.data && key0 + keys <= problem.keys && !(problem.causal && key0 + keys - 1 > query0);
}

// OpenKeys where rows are keys: bit i says that row i of this lane's rows is a key that is there and open.
template <int M>
FASTLDM_DEVICE unsigned open_rows(const Problem& problem, const Global<const std::uint8_t>& mask, int key0) {
  unsigned open = 0;
#pragma unroll
  for (int row = 0; row < 2 * M; ++row) {
    open |= static_cast<unsigned>(is_open(problem, mask, key0 + lane_id() / 4 + 8 * row)) << row;
  }
  return open;
}

// mask_columns where rows of c are keys and columns queries.
template <class T, int M, int N>
FASTLDM_DEVICE void mask_rows(float (&c)[M][N][4], const Problem& problem, const Global<const std::uint8_t>& mask,
                              unsigned open, int key0, int query0) {
  if (masks_scores(problem)) mask_scores<T, true>(c, problem, mask, key0, query0);
  const int row = key0 + lane_id() / 4, column = query0 + lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4 * M; ++i) {
    const bool key_open = open >> (i / 2) & 1;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const bool seen = !problem.causal || row + i / 2 * 8 <= column + 8 * n + i % 2;
      if (!key_open || !seen) c[i / 4][n][i % 4] = -kInfinity;
    }
  }
}

}  // namespace fastldm::cuda::attention
