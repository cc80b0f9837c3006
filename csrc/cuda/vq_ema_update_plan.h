// How the kernels of vq_ema_update.cuh are launched, on a GPU and under the shim alike.
#pragma once

#include "cuda/vq_ema_update.cuh"
#include "cuda/vq_plan.h"

namespace fastldm::cuda {

// Rows that a warp adds: two units for the rows that a code has on average, within 64 and 512.
inline int vq_ema_unit(std::int64_t rows, int num_codes) {
  const std::int64_t wanted = 2 * vq_ceil_div<std::int64_t>(rows, num_codes);
  return static_cast<int>(wanted < 64 ? 64 : wanted > 512 ? 512 : wanted);
}

// Bytes of working memory, for the sums of later units: 4 D for each 64 rows or more.
inline std::int64_t vq_ema_update_memory(std::int64_t rows, int num_codes, int dim) {
  VqMemory memory(nullptr);
  memory.take<float>(vq_ceil_div<std::int64_t>(rows, vq_ema_unit(rows, num_codes)) * dim);
  return memory.bytes();
}

// `ordered` (N,) int32, the codes in order; `order` (N,), which rows have them; `starts` (K + 1,), where each code's
// begin; `sums` (K, D). Rows before the first segment and after the last have indices that are no codes.
inline void vq_ema_update(const VqGiven& z, const std::int32_t* ordered, const std::int64_t* order,
                          const std::int64_t* starts, void* memory, float* sums, int num_codes,
                          const Context& context) {
  const VqRows rows = vq_rows(z);
  const int unit = vq_ema_unit(z.rows, num_codes);
  const std::int64_t later = vq_ceil_div<std::int64_t>(z.rows, unit);
  require(num_codes + later < std::int64_t{1} << 31, "vq_ema_update takes fewer codes and rows");
  VqLanes lanes = {1};
  while (lanes.dims < z.dim && lanes.dims < kWarp) lanes.dims *= 2;

  const Global<float> to(sums, static_cast<std::int64_t>(num_codes) * z.dim);
  const Global<float> partials = VqMemory(memory).take<float>(later * z.dim);
  const Global<const std::int64_t> begins(starts, num_codes + 1);
  constexpr int warps = VqSumUnits::threads / kWarp;
  Shape shape;
  shape.grid_x = vq_ceil_div(num_codes + static_cast<int>(later) - 1, warps);
  shape.grid_y = vq_ceil_div(z.dim, lanes.dims);
  launch<VqSumUnits>(shape,
                     {rows,
                      {ordered, z.rows},
                      {order, z.rows},
                      begins,
                      to,
                      partials,
                      num_codes,
                      static_cast<int>(later),
                      unit,
                      lanes},
                     context);
  if (later > 1) {
    shape.grid_x = vq_ceil_div(num_codes, warps);
    launch<VqSumPartials>(shape, {begins, to, partials, num_codes, z.dim, unit, lanes}, context);
  }
}

}  // namespace fastldm::cuda
