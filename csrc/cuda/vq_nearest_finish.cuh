// vq_nearest, after the search: from the least scores of each row and split to its nearest code.
//
// Every code whose float64 distance may be the least has a score up to `limit`, the least score of all plus the slack
// of kernels/vq/bound.py. So of each split there may be the nearest code
//
//   nowhere, if its least score is past the limit;
//   in the place of its least score, if all others are past it;
//   anywhere else, and then all its codes are looked at, in float64.
//
// In more than 16 dimensions most rows have one split of the second kind, and with places of one code nothing is left
// to do. Distances are added up as in fastldm/reference/vq.py, each square rounded on its own.
//
// A warp has `rows_per_warp` rows; its lanes go over the splits of all of them, and then, row by row, over codes. What
// it reads, 12 bytes for each row and split, comes out of the second level cache: 8 splits of 65536 rows are 6 MB. A
// row with a place of 32 codes in 3 dimensions takes about 150 instructions of a warp, 65536 rows 10 us on an H100.
#pragma once

#include "cuda/vq_rows.cuh"

namespace fastldm::cuda {

struct VqFinish {
  static constexpr int threads = 128;
  static constexpr int min_blocks = 8;
  static constexpr int min_capability = 80;
  static constexpr int max_splits = 32;  // bits of a word

  struct Params {
    VqRows rows;
    VqCodebook codebook;
    VqFound found;
    Global<const float> largest;  // the largest of them is E^2
    Global<std::int64_t> index;
    float relative;
    int largest_count, splits, codes_per_split, place;
    int rows_per_warp;  // a power of two
  };

  // Of one row. Bit s of a mask stands for split s.
  struct Task {
    std::uint32_t near, crowded;  // where there is a code up to the limit; where there is one beside the place
  };

  struct Nearest {
    double distance;
    std::int64_t code;
  };

  // As `slack` there; NaN or infinity where a score may be.
  FASTLDM_DEVICE static float slack(const Params& params, float squares, float largest_squares) {
    const float dim = static_cast<float>(params.rows.dim);
    // Squares that underflow are missing in the sums.
    const float missing = dim * 0x1p-120f;
    const float length = square_root(squares + missing), largest = square_root(largest_squares + missing);
    const float size = largest * (largest + 2.0f * length), reach = length + largest;
    const float truth = (dim + 4.0f) * 0x1p-53f * (reach * reach);
    const float tiny = dim * 0x1p-107f + dim * 0x1p-124f * reach;
    const float error = params.relative * size + truth + tiny;
    return size < 1e38f ? 2.0f * (1.0f + 0x1p-9f) * error : vq_infinity();
  }

  FASTLDM_DEVICE static float largest_squares(const Params& params) {
    float largest = 0.0f;
    for (int i = lane_id(); i < params.largest_count; i += kWarp) {
      const float one = params.largest.load(i);
      largest = one > largest ? one : largest;
    }
    return warp_reduce(largest, Max());
  }

  // All of this looks at row `row` with the lanes lane % rows_per_warp, each at its share of the splits.
  FASTLDM_DEVICE static Task task_of(const Params& params, std::int64_t row, bool inside, float squares,
                                     float largest_squares) {
    const int step = kWarp / params.rows_per_warp, own = lane_id() / params.rows_per_warp;
    float least = vq_infinity();
    if (inside) {
      for (int s = own; s < params.splits; s += step) {
        least = min_number(least, params.found.least.load(s * params.rows.count + row));
      }
    }
    for (int distance = params.rows_per_warp; distance < kWarp; distance *= 2) {
      least = min_number(least, shuffle_xor(least, distance));
    }
    const double limit = static_cast<double>(least) + static_cast<double>(slack(params, squares, largest_squares));
    Task task = {0u, 0u};
    if (inside) {
      for (int s = own; s < params.splits; s += step) {
        const std::int64_t at = s * params.rows.count + row;
        // Not "up to": with a limit that is no number every code is looked at.
        if (!(params.found.least.load(at) > limit)) task.near |= 1u << s;
        if (!(params.found.others.load(at) > limit)) task.crowded |= 1u << s;
      }
    }
    for (int distance = params.rows_per_warp; distance < kWarp; distance *= 2) {
      task.near |= shuffle_xor(task.near, distance);
      task.crowded |= shuffle_xor(task.crowded, distance);
    }
    return task;
  }

  FASTLDM_DEVICE static double distance_to(const Params& params, std::int64_t start, std::int64_t code) {
    double total = 0.0;
#pragma unroll 4
    for (int d = 0; d < params.rows.dim; ++d) {
      const double value = params.rows.numbers.load(start + d * params.rows.stride_dim);
      const double difference = value - static_cast<double>(params.codebook.load(code, d));
      total += multiply(difference, difference);
    }
    return total;
  }

  // The nearest code of a row, by all lanes. Where all distances are infinite or no number it is the first.
  FASTLDM_DEVICE static std::int64_t rank(const Params& params, std::int64_t row, const Task& task) {
    const std::int64_t start = params.rows.start(row);
    Nearest nearest = {static_cast<double>(vq_infinity()), 0};
    for (int s = 0; s < params.splits; ++s) {
      if ((task.near >> s & 1u) != 0u) {
        const bool all = (task.crowded >> s & 1u) != 0u;
        const std::int64_t first = all ? static_cast<std::int64_t>(s) * params.codes_per_split
                                       : params.found.place.load(s * params.rows.count + row);
        const std::int64_t past = first + (all ? params.codes_per_split : params.place);
        const std::int64_t end = past < params.codebook.count ? past : params.codebook.count;
        for (std::int64_t code = first + lane_id(); code < end; code += kWarp) {
          const double distance = distance_to(params, start, code);
          if (distance < nearest.distance) nearest = {distance, code};
        }
      }
    }
    const auto nearer = [](const Nearest& a, const Nearest& b) {
      return b.distance < a.distance || (b.distance == a.distance && b.code < a.code) ? b : a;
    };
    return warp_reduce(nearest, nearer).code;
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const std::int64_t warp = static_cast<std::int64_t>(block_x()) * (threads / kWarp) + warp_id();
    const std::int64_t row0 = warp * params.rows_per_warp;
    const std::int64_t row = row0 + lane_id() % params.rows_per_warp;
    const bool inside = row < params.rows.count;
    const float squares = inside ? params.found.squares.load(row) : 0.0f;
    const Task task = task_of(params, row, inside, squares, largest_squares(params));

    const bool none = squares != squares;  // of a row with NaN or infinity no code is the nearest: it gets 0
    const bool only = (task.near & (task.near - 1u)) == 0u && (task.near & task.crowded) == 0u;
    const bool known = none || (params.place == 1 && only);
    if (inside && known && lane_id() < params.rows_per_warp) {
      std::int64_t found = 0;
      for (int s = 0; !none && s < params.splits; ++s) {
        if ((task.near >> s & 1u) != 0u) found = params.found.place.load(s * params.rows.count + row);
      }
      params.index.store(row, found);
    }
    const std::uint32_t waiting = ballot(inside && !known);
    for (int i = 0; i < params.rows_per_warp; ++i) {
      if ((waiting >> i & 1u) != 0u) {
        const std::int64_t found = rank(params, row0 + i, shuffle_from(task, i));
        if (lane_id() == 0) params.index.store(row0 + i, found);
      }
    }
  }
};

}  // namespace fastldm::cuda
