// The launches of vq_ema_update_plan.h for ctypes.
#include "cuda/vq_ema_update_plan.h"
#include "driver.h"

using namespace fastldm;
using namespace fastldm::cuda;

// Bytes of working memory to `bytes`; with memory, the sums too.
extern "C" void vq_ema_update(const void* z, int dtype, std::int64_t rows, std::int64_t inner,
                              std::int64_t stride_outer, std::int64_t stride_inner, std::int64_t stride_dim, int dim,
                              const std::int32_t* ordered, const std::int64_t* order, const std::int64_t* starts,
                              int num_codes, void* memory, float* sums, std::int64_t* bytes, int capability) {
  shim::guarded([&] {
    const VqGiven given = {z, static_cast<DType>(dtype), rows, inner, stride_outer, stride_inner, stride_dim, dim};
    *bytes = vq_ema_update_memory(rows, num_codes, dim);
    if (memory != nullptr) {
      fastldm::cuda::vq_ema_update(given, ordered, order, starts, memory, sums, num_codes, gpu(capability));
    }
  });
}
