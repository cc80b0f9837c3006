// Tensors of PyTorch for the launchers (.cu), through the stable ABI. Never included by kernels or plans.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda/common/launch.h"
#include "cuda/common/memory.h"

namespace fastldm::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Device device_of(int index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  return {index,
          10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

// Makes the device of a tensor current, and PyTorch's current stream there the one to launch on, as long as it lives.
class Launching {
 public:
  explicit Launching(const Tensor& tensor) : guard_(index_of(tensor)), context_{device_of(index_of(tensor)), nullptr} {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(context_.device.index, &context_.stream));
  }

  operator const Context&() const { return context_; }

 private:
  static int index_of(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), "fastldm_cuda kernels take tensors on a CUDA device");
    return tensor.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  Context context_;
};

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "fastldm_cuda kernels take float32, bfloat16 and float16");
  }
}

inline void* data_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), "fastldm_cuda kernels take tensors on a CUDA device");
  return x.data_ptr();
}

template <class T>
T* contiguous(const Tensor& x, std::int64_t numel, ScalarType type) {
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == numel && x.scalar_type() == type,
                  "fastldm_cuda: a tensor is not contiguous or of another size or dtype than its kernel expects");
  return static_cast<T*>(data_of(x));
}

inline float* floats(const OptionalTensor& x, std::int64_t numel) {
  return x ? contiguous<float>(*x, numel, ScalarType::Float) : nullptr;
}

}  // namespace fastldm::cuda
