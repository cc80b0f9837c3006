// fastldm_cuda::vq_ema_update: PyTorch's tensors to the plan.

#include "cuda/vq_ema_update_plan.h"
#include "cuda/vq_torch.h"

namespace fastldm::cuda {
namespace {

int codes_of(std::int64_t num_codes) {
  STD_TORCH_CHECK(num_codes > 0 && num_codes < (std::int64_t{1} << 31), "fastldm_cuda::vq_ema_update: K is too large");
  return static_cast<int>(num_codes);
}

std::int64_t memory_bytes(std::int64_t rows, std::int64_t num_codes, std::int64_t dim) {
  return vq_ema_update_memory(rows, codes_of(num_codes), static_cast<int>(dim));
}

void ema_update(Tensor z, std::int64_t rows, std::int64_t inner, std::int64_t stride_outer, std::int64_t stride_inner,
                std::int64_t stride_dim, Tensor ordered, Tensor order, Tensor starts, Tensor memory, Tensor sums) {
  const Launching launching(z);
  const VqGiven given = vq_given(z, rows, inner, stride_outer, stride_inner, stride_dim);
  const int num_codes = codes_of(sums.size(0));
  const std::int64_t bytes = vq_ema_update_memory(rows, num_codes, given.dim);
  vq_ema_update(given, contiguous<std::int32_t>(ordered, rows, ScalarType::Int),
                contiguous<std::int64_t>(order, rows, ScalarType::Long),
                contiguous<std::int64_t>(starts, num_codes + std::int64_t{1}, ScalarType::Long),
                contiguous<std::uint8_t>(memory, bytes, ScalarType::Byte),
                contiguous<float>(sums, std::int64_t{num_codes} * given.dim, ScalarType::Float), num_codes, launching);
}

}  // namespace
}  // namespace fastldm::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastldm_cuda, library) {
  library.def("vq_ema_update_memory(int rows, int num_codes, int dim) -> int");
  library.def(
      "vq_ema_update(Tensor z, int rows, int inner, int stride_outer, int stride_inner, int stride_dim, "
      "Tensor ordered, Tensor order, Tensor starts, Tensor(a!) memory, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastldm_cuda, CompositeExplicitAutograd, library) {
  library.impl("vq_ema_update_memory", TORCH_BOX(&fastldm::cuda::memory_bytes));
  library.impl("vq_ema_update", TORCH_BOX(&fastldm::cuda::ema_update));
}
