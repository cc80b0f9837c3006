// The launches of vq_nearest_plan.h for ctypes.
#include "cuda/vq_nearest_plan.h"
#include "driver.h"

using namespace fastldm;
using namespace fastldm::cuda;

// Bytes of working memory to `bytes`; with memory, the indices too.
extern "C" void vq_nearest(const void* z, int z_dtype, std::int64_t rows, std::int64_t inner, std::int64_t stride_outer,
                           std::int64_t stride_inner, std::int64_t stride_dim, int dim, const void* codebook,
                           int codebook_dtype, std::int64_t stride_code, std::int64_t codebook_stride_dim,
                           int num_codes, void* memory, std::int64_t* index, std::int64_t* bytes, int capability) {
  shim::guarded([&] {
    const VqGiven given = {
        z, static_cast<DType>(z_dtype), rows, inner, stride_outer, stride_inner, stride_dim, dim};
    const VqGivenCodebook codes = {
        codebook, static_cast<DType>(codebook_dtype), stride_code, codebook_stride_dim, num_codes};
    *bytes = vq_nearest_memory(given, codes, gpu(capability));
    if (memory != nullptr) fastldm::cuda::vq_nearest(given, codes, memory, index, gpu(capability));
  });
}
