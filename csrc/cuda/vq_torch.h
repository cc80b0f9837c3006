// z as both launchers on codebooks take it.
#pragma once

#include "cuda/common/torch.h"
#include "cuda/vq_plan.h"

namespace fastldm::cuda {

// Row r of z (..., D) begins r / inner * stride_outer + r % inner * stride_inner elements after its data.
inline VqGiven vq_given(const Tensor& z, std::int64_t rows, std::int64_t inner, std::int64_t stride_outer,
                        std::int64_t stride_inner, std::int64_t stride_dim) {
  STD_TORCH_CHECK(z.dim() > 0 && rows > 0 && inner > 0 && rows % inner == 0 && z.numel() == rows * z.size(-1),
                  "fastldm_cuda: rows and inner do not fit the shape of z");
  STD_TORCH_CHECK(stride_outer >= 0 && stride_inner >= 0 && stride_dim >= 0, "fastldm_cuda: a stride is negative");
  return {data_of(z), dtype_of(z), rows, inner, stride_outer, stride_inner, stride_dim, static_cast<int>(z.size(-1))};
}

}  // namespace fastldm::cuda
