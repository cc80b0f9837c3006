// vq_ema_update: the sum of the rows of each code, in a fixed order.
//
// The rows are sorted by code, equal ones in their order. The segment of a code is cut into units of `unit` rows from
// its beginning. One warp for each code adds its first unit, and one for each multiple q >= 1 of `unit` adds the later
// unit that begins among the sorted rows q unit .. (q + 1) unit - 1: there is no more than one, as a code begins but
// once in so many rows, and another code's later unit begins `unit` rows after that code. So no warp adds more than
// `unit` rows, however they fall on the codes. A second kernel adds the later units of a code, which have places that
// follow one another.
//
// A warp takes up to 32 dimensions, and where there are fewer several rows at once, whose sums are added by shuffles.
// Bytes are the floor: z once, gathered by rows (at least 32 bytes of each), 8 for each row's place in the order, and
// the sums. 65536 rows of 256 float32: 67 MB, 20 us on an H100 at 3.35 TB/s, 14 us on an H200 at 4.8 TB/s.
#pragma once

#include "cuda/vq_rows.cuh"

namespace fastldm::cuda {

// How a warp is divided: `dims` lanes, a power of two, along a row, and 32 / dims rows at a time.
struct VqLanes {
  int dims;

  FASTLDM_DEVICE int rows() const { return kWarp / dims; }
  FASTLDM_DEVICE int row() const { return lane_id() / dims; }
  FASTLDM_DEVICE int dim() const { return block_y() * dims + lane_id() % dims; }

  // The sum over the rows, in every lane.
  FASTLDM_DEVICE float sum(float value) const {
    for (int distance = kWarp / 2; distance >= dims; distance /= 2) value += shuffle_xor(value, distance);
    return value;
  }
};

struct VqSumUnits {
  static constexpr int threads = 128;
  static constexpr int min_blocks = 8;
  static constexpr int min_capability = 80;

  struct Params {
    VqRows rows;
    Global<const std::int32_t> ordered;  // the codes of the sorted rows
    Global<const std::int64_t> order;    // which rows those are
    Global<const std::int64_t> starts;   // (K + 1,), where the segment of each code begins
    Global<float> sums;                  // (K, D)
    Global<float> partials;              // (later units, D)
    int num_codes, later_units, unit;    // later_units counts a place 0, which is not used
    VqLanes lanes;
  };

  // The sorted rows begin .. end - 1, and where their sum goes; nowhere if there are none to be added.
  struct Unit {
    std::int64_t begin, end;
    Global<float> to;
  };

  FASTLDM_DEVICE static Unit unit_of(const Params& params, int item) {
    if (item < params.num_codes) {
      const std::int64_t begin = params.starts.load(item), past = begin + params.unit;
      const std::int64_t end = params.starts.load(item + 1);
      return {begin, past < end ? past : end, params.sums + static_cast<std::int64_t>(item) * params.rows.dim};
    }
    const std::int64_t place = item - params.num_codes + 1, at = place * params.unit;
    const int code = params.ordered.load(at);
    if (code < 0 || code >= params.num_codes) return {};
    const std::int64_t first = params.starts.load(code), last = params.starts.load(code + 1);
    const std::int64_t begin = at + (params.unit - (at - first) % params.unit) % params.unit;
    if (first >= at || begin >= last) return {};
    const std::int64_t past = begin + params.unit;
    return {begin, past < last ? past : last, params.partials + place * params.rows.dim};
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const int item = block_x() * (threads / kWarp) + warp_id();
    if (item < params.num_codes + params.later_units - 1) {
      const Unit unit = unit_of(params, item);
      const VqLanes& lanes = params.lanes;
      const bool inside = lanes.dim() < params.rows.dim;
      const std::int64_t offset = inside ? lanes.dim() * params.rows.stride_dim : 0;
      float total = 0.0f;
#pragma unroll 4
      for (std::int64_t at = unit.begin + lanes.row(); at < unit.end; at += lanes.rows()) {
        total += params.rows.numbers.load(params.rows.start(params.order.load(at)) + offset);
      }
      total = lanes.sum(total);
      if (unit.to && inside && lanes.row() == 0) unit.to.store(lanes.dim(), total);
    }
  }
};

// Adds the later units of each code to its first, a warp for each code.
struct VqSumPartials {
  static constexpr int threads = 128;
  static constexpr int min_blocks = 8;
  static constexpr int min_capability = 80;

  struct Params {
    Global<const std::int64_t> starts;
    Global<float> sums;
    Global<const float> partials;
    int num_codes, dim, unit;
    VqLanes lanes;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    const int code = block_x() * (threads / kWarp) + warp_id();
    if (code < params.num_codes) {
      const std::int64_t begin = params.starts.load(code), count = params.starts.load(code + 1) - begin;
      const std::int64_t later = (count + params.unit - 1) / params.unit - 1, first = begin / params.unit + 1;
      const VqLanes& lanes = params.lanes;
      const bool inside = lanes.dim() < params.dim;
      if (later > 0) {
        float total = 0.0f;
#pragma unroll 4
        for (std::int64_t unit = lanes.row(); unit < later; unit += lanes.rows()) {
          total += params.partials.load((first + unit) * params.dim + (inside ? lanes.dim() : 0));
        }
        total = lanes.sum(total);
        const std::int64_t at = static_cast<std::int64_t>(code) * params.dim + lanes.dim();
        if (inside && lanes.row() == 0) params.sums.store(at, params.sums.load(at) + total);
      }
    }
  }
};

}  // namespace fastldm::cuda
