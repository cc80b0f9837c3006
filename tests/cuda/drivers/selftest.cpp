// The launches of selftest_plan.h for ctypes.
#include "cuda/selftest_plan.h"
#include "driver.h"

using namespace fastldm;
using namespace fastldm::cuda;

extern "C" void matmul(const void* a, const void* b, float* c, int m, int n, int k, int dtype, bool transposed) {
  shim::guarded([&] {
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      const auto *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
      if constexpr (sizeof(T) == 2) {
        if (transposed) return selftest_matmul<T, true>(left, right, c, m, n, k, gpu(90));
      }
      return selftest_matmul<T, false>(left, right, c, m, n, k, gpu(90));
    };
    dtype_switch(dtype, run);
  });
}

extern "C" void cluster_sum(const float* x, float* sums, int rows, int columns, int cluster, int capability) {
  shim::guarded([&] { selftest_cluster_sum(x, sums, rows, columns, cluster, gpu(capability)); });
}

extern "C" void histogram(const std::int32_t* values, std::int32_t* counts, std::int32_t* least, std::int64_t* first,
                          int count) {
  shim::guarded([&] { selftest_histogram(values, counts, least, first, count, gpu(80)); });
}

extern "C" void warp(const float* x, float* out) {
  shim::guarded([&] { selftest_warp(x, out, gpu(80)); });
}

extern "C" void copy(const float* x, float* y, int count) {
  shim::guarded([&] { selftest_copy(x, y, count, gpu(80)); });
}

extern "C" void math(const float* x, float* out, int count) {
  shim::guarded([&] { selftest_math(x, out, count, gpu(80)); });
}
