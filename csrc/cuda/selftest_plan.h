// How the kernels of selftest.cuh are launched, on a GPU and under the shim alike.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/selftest.cuh"

namespace fastldm::cuda {

// `a`, `b`: (m, k) and (n, k), or transposed (k, n), of T; `c`: (m, n).
template <class T, bool Transposed>
void selftest_matmul(const T* a, const T* b, float* c, int m, int n, int k, const Context& context) {
  using Kernel = SelftestMatmul<T, Transposed>;
  require(k % Kernel::vector == 0 && (!Transposed || n % Kernel::vector == 0), "rows must be of whole vectors");
  const std::int64_t rows = m, columns = n, depth = k;
  Shape shape;
  shape.grid_x = (n + Kernel::tile - 1) / Kernel::tile;
  shape.grid_y = (m + Kernel::tile - 1) / Kernel::tile;
  shape.shared_bytes = Kernel::layout().bytes;
  launch<Kernel>(shape, {{a, rows * depth}, {b, columns * depth}, {c, rows * columns}, m, n, k}, context);
}

inline void selftest_cluster_sum(const float* x, float* sums, int rows, int columns, int cluster,
                                 const Context& context) {
  Shape shape;
  shape.grid_x = rows * cluster;
  shape.cluster = cluster;
  launch<SelftestClusterSum>(shape, {{x, static_cast<std::int64_t>(rows) * columns}, {sums, rows}, columns}, context);
}

// `counts` begins at 0, `first` at the largest number.
inline void selftest_histogram(const std::int32_t* values, std::int32_t* counts, std::int32_t* least,
                               std::int64_t* first, int count, const Context& context) {
  Shape shape;
  shape.grid_x = (count + SelftestHistogram::threads - 1) / SelftestHistogram::threads;
  launch<SelftestHistogram>(shape, {{values, count}, {counts, 16}, {least, shape.grid_x}, {first, 1}, count}, context);
}

inline void selftest_warp(const float* x, float* out, const Context& context) {
  launch<SelftestWarp>({}, {{x, kWarp}, {out, 10 * kWarp}}, context);
}

inline void selftest_copy(const float* x, float* y, int count, const Context& context) {
  Shape shape;
  shape.grid_x = count / 128;
  shape.shared_bytes = 128 * sizeof(float);
  launch<SelftestCopy>(shape, {{x, count}, {y, count}}, context);
}

inline void selftest_math(const float* x, float* out, int count, const Context& context) {
  Shape shape;
  shape.grid_x = (count + SelftestMath::threads - 1) / SelftestMath::threads;
  launch<SelftestMath>(shape, {{x, count}, {out, std::int64_t{9} * count}, count}, context);
}

}  // namespace fastldm::cuda
