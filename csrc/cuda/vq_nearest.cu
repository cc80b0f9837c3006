// fastldm_cuda::vq_nearest: PyTorch's tensors to the plan.

#include "cuda/vq_nearest_plan.h"
#include "cuda/vq_torch.h"

namespace fastldm::cuda {
namespace {

VqGivenCodebook codebook_of(const Tensor& codebook, std::int64_t dim) {
  STD_TORCH_CHECK(codebook.dim() == 2 && codebook.size(1) == dim && codebook.size(0) <= kVqMaxCodes,
                  "fastldm_cuda::vq_nearest: codebook must be (K, D), K up to 2^28, with the D of z");
  return {data_of(codebook), dtype_of(codebook), codebook.stride(0), codebook.stride(1),
          static_cast<int>(codebook.size(0))};
}

std::int64_t memory_bytes(Tensor z, std::int64_t rows, Tensor codebook) {
  const Launching launching(z);
  // The layout of z does not matter here.
  const VqGiven given = vq_given(z, rows, rows, 0, 0, 0);
  return vq_nearest_memory(given, codebook_of(codebook, given.dim), launching);
}

void nearest(Tensor z, std::int64_t rows, std::int64_t inner, std::int64_t stride_outer, std::int64_t stride_inner,
             std::int64_t stride_dim, Tensor codebook, Tensor memory, Tensor index) {
  const Launching launching(z);
  const VqGiven given = vq_given(z, rows, inner, stride_outer, stride_inner, stride_dim);
  const VqGivenCodebook codes = codebook_of(codebook, given.dim);
  void* bytes = contiguous<std::uint8_t>(memory, vq_nearest_memory(given, codes, launching), ScalarType::Byte);
  vq_nearest(given, codes, bytes, contiguous<std::int64_t>(index, rows, ScalarType::Long), launching);
}

}  // namespace
}  // namespace fastldm::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastldm_cuda, library) {
  library.def("vq_nearest_memory(Tensor z, int rows, Tensor codebook) -> int");
  library.def(
      "vq_nearest(Tensor z, int rows, int inner, int stride_outer, int stride_inner, int stride_dim, "
      "Tensor codebook, Tensor(a!) memory, Tensor(b!) index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastldm_cuda, CompositeExplicitAutograd, library) {
  library.impl("vq_nearest_memory", TORCH_BOX(&fastldm::cuda::memory_bytes));
  library.impl("vq_nearest", TORCH_BOX(&fastldm::cuda::nearest));
}
