// vq_nearest, before the search: the codebook as the search wants it.
//
// Scores are computed of z' = z - c and e' = e - c, for c near the mean of the codes: the smaller e', the smaller the
// errors (kernels/vq/bound.py has the analysis; the letters here are its). Every block computes c by itself, from 64
// codes; the first one keeps it. Codes past the last one are 0 at the distance infinity.
#pragma once

#include "cuda/vq_rows.cuh"

namespace fastldm::cuda {

inline constexpr int kVqSample = 64;  // codes whose mean is c

FASTLDM_DEVICE float vq_sampled(const VqCodebook& codebook, int sample, int d) {
  const std::int64_t code = static_cast<std::int64_t>(sample) * codebook.count / kVqSample;
  return codebook.load(code, d) * (1.0f / kVqSample);
}

// float32, for VqSearchFew. Four codes stand together, ||e'||^2 of the four, e'_1 of the four, ..., so that a search
// of any D reads whole vectors. `slots`: D, padded with zeros, and one for the norm. A thread packs one code.
struct VqPackFew {
  static constexpr int threads = 128;
  static constexpr int min_blocks = 4;
  static constexpr int min_capability = 80;
  static constexpr int max_dim = 16;

  struct Params {
    VqCodebook codebook;
    Global<float> packed;   // (codes / 4, slots, 4)
    Global<float> centre;   // (D,)
    Global<float> largest;  // of each block, the largest ||e'||^2
    int codes;              // with those past the last one
    int slots;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    FASTLDM_SHARED(float, centre, max_dim);
    FASTLDM_SHARED(float, scratch, threads / kWarp);
    const VqCodebook& codebook = params.codebook;
    for (int d = warp_id(); d < codebook.dim; d += threads / kWarp) {
      float part = 0.0f;
#pragma unroll
      for (int i = lane_id(); i < kVqSample; i += kWarp) part += vq_sampled(codebook, i, d);
      part = warp_reduce(part, Sum());
      if (lane_id() == 0) {
        centre.store(d, part);
        if (block_x() == 0) params.centre.store(d, part);
      }
    }
    block_sync();

    const int code = block_x() * threads + thread_id();
    const bool exists = code < codebook.count;
    float norm = 0.0f;
    if (code < params.codes) {
      const Global<float> to = params.packed + static_cast<std::int64_t>(code / 4) * params.slots * 4 + code % 4;
      double squares = 0.0;
      for (int d = 0; d < params.slots - 1; ++d) {
        const bool given = exists && d < codebook.dim;
        const double shifted =
            given ? static_cast<double>(codebook.load(code, d)) - static_cast<double>(centre.load(d)) : 0.0;
        squares += shifted * shifted;
        to.store(4 * (d + 1), static_cast<float>(shifted));
      }
      norm = static_cast<float>(squares);
      to.store(0, exists ? norm : vq_infinity());
    }
    const float largest = block_reduce<threads>(norm, Max(), scratch);
    if (thread_id() == 0) params.largest.store(block_x(), largest);
  }
};

// Powers of two: `up`, for which up * largest is in 2^7 .. 2^8 or below, and 1 / up.
struct VqScale {
  float up, down;
};

FASTLDM_DEVICE VqScale vq_scale_for(float largest) {
  const std::uint32_t found = float_as_bits(largest) >> 23 & 255u;
  const std::uint32_t exponent = found < 8u ? 8u : found;
  return {bits_as_float((261u - exponent) << 23), bits_as_float((exponent - 7u) << 23)};
}

// hi + mid, which is value but for the rounding of mid.
struct VqHalves {
  float16 hi, mid;
};

FASTLDM_DEVICE VqHalves vq_halves(float value) {
  const float16 hi = from_float<float16>(value);
  return {hi, from_float<float16>(value - to_float(hi))};
}

// Two float16 parts with a scale for each tile of 64 codes, for VqSearchMany. For each tile and each slice of 32
// dimensions (64, 32) of the one part, then of the other: what a stage of the search copies lies in one piece. A block
// packs one tile.
struct VqPackMany {
  static constexpr int threads = 256;
  static constexpr int min_blocks = 2;
  static constexpr int min_capability = 80;
  static constexpr int tile = 64;
  static constexpr int slice = 32;

  struct Params {
    VqCodebook codebook;
    Global<float16> packed;  // (tiles, slices, 2, tile, slice)
    Global<float> norms;     // (tiles * tile,)
    Global<float> scales;    // of each tile, what its parts have to be multiplied by
    Global<float> centre;    // (D,)
    Global<float> largest;   // of each tile, the largest ||e'||^2
    int slices;
  };

  FASTLDM_HOST_DEVICE static constexpr int shared_bytes(int slices) {
    return slices * slice * static_cast<int>(sizeof(float));
  }

  FASTLDM_DEVICE static double shifted(const Params& params, const Shared<float>& centre, int code, int d) {
    if (code >= params.codebook.count || d >= params.codebook.dim) return 0.0;
    return static_cast<double>(params.codebook.load(code, d)) - static_cast<double>(centre.load(d));
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const auto centre = dynamic_shared<float>(0, params.slices * slice);
    FASTLDM_SHARED(float, scratch, threads / kWarp);
    for (int d = thread_id(); d < params.codebook.dim; d += threads) {
      float sum = 0.0f;
#pragma unroll 8
      for (int i = 0; i < kVqSample; ++i) sum += vq_sampled(params.codebook, i, d);
      centre.store(d, sum);
      if (block_x() == 0) params.centre.store(d, sum);
    }
    block_sync();

    float largest_norm = 0.0f, largest = 0.0f;
    for (int row = warp_id(); row < tile; row += threads / kWarp) {
      const int code = block_x() * tile + row;
      double squares = 0.0;
      for (int d = lane_id(); d < params.slices * slice; d += kWarp) {
        const double value = shifted(params, centre, code, d);
        const float magnitude = static_cast<float>(value < 0.0 ? -value : value);
        squares += value * value;
        largest = max_number(largest, magnitude);
      }
      const float norm = static_cast<float>(warp_reduce(squares, Sum()));
      largest_norm = max_number(largest_norm, norm);
      if (lane_id() == 0) {
        params.norms.store(code, code < params.codebook.count ? norm : vq_infinity());
      }
    }
    largest_norm = block_reduce<threads>(largest_norm, Max(), scratch);
    const VqScale scale = vq_scale_for(block_reduce<threads>(largest, Max(), scratch));
    if (thread_id() == 0) {
      params.largest.store(block_x(), largest_norm);
      params.scales.store(block_x(), scale.down);
    }

    for (int row = warp_id(); row < tile; row += threads / kWarp) {
      const int code = block_x() * tile + row;
      for (int i = 0; i < params.slices; ++i) {
        const float value = static_cast<float>(shifted(params, centre, code, i * slice + lane_id()));
        const VqHalves halves = vq_halves(value * scale.up);
        const std::int64_t part = (static_cast<std::int64_t>(block_x()) * params.slices + i) * 2;
        params.packed.store((part * tile + row) * slice + lane_id(), halves.hi);
        params.packed.store(((part + 1) * tile + row) * slice + lane_id(), halves.mid);
      }
    }
  }
};

}  // namespace fastldm::cuda
