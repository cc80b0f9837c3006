// Tensors of PyTorch as the arguments of group norm, for the launchers of both directions.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cuda/common/torch.h"
#include "cuda/group_norm_plan.h"

namespace fastldm::cuda {

// Of a dense x, (N, C, pixels) or with the channels last (N, pixels, C), and others of the same layout.
inline GroupNormProblem group_norm_problem(const Tensor& x, bool channels_last, std::int64_t groups) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "fastldm_cuda: group norm takes (N, C, ...), not empty");
  const std::int64_t batch = x.size(0), channels = x.size(1), pixels = x.numel() / (batch * channels);
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "fastldm_cuda: the groups do not divide the channels");
  STD_TORCH_CHECK(batch <= kGroupNormMaxSize && channels <= kGroupNormMaxSize && pixels <= kGroupNormMaxSize,
                  "fastldm_cuda: group norm takes up to 2^30 samples, channels and pixels");
  GroupNormProblem problem{};
  problem.dtype = dtype_of(x);
  problem.batch = static_cast<int>(batch);
  problem.channels = static_cast<int>(channels);
  problem.num_groups = static_cast<int>(groups);
  problem.pixels = static_cast<int>(pixels);
  // One pixel is in both layouts; the one with the channels last reads it in vectors.
  problem.channels_last = channels_last || pixels == 1;
  problem.aligned = true;
  return problem;
}

// The address of a tensor in the layout of x; narrows what the problem says of alignment.
inline void* group_norm_data(const Tensor& tensor, GroupNormProblem& problem) {
  STD_TORCH_CHECK(tensor.numel() == problem.numel() && dtype_of(tensor) == problem.dtype,
                  "fastldm_cuda: x, its gradient and the results are of one size and dtype");
  // Dense in an order of the dimensions: the largest offset is that of the last of as many elements.
  std::int64_t last = 0;
  for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  STD_TORCH_CHECK(last == problem.numel() - 1, "fastldm_cuda: a tensor of group norm is not dense");
  void* data = data_of(tensor);
  problem.aligned = problem.aligned && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  return data;
}

// (C,), or (N, C) with a dense last dimension, or nothing.
inline GroupNormArgument group_norm_argument(const OptionalTensor& parameter, const GroupNormProblem& problem,
                                             bool per_sample) {
  if (!parameter) return {nullptr, DType::float32, 0};
  const Tensor& tensor = *parameter;
  const std::int64_t rank = per_sample ? 2 : 1, channels = problem.channels;
  STD_TORCH_CHECK(tensor.dim() == rank && tensor.size(rank - 1) == channels &&
                      (channels == 1 || tensor.stride(rank - 1) == 1) &&
                      (!per_sample || tensor.size(0) == problem.batch),
                  "fastldm_cuda: a parameter of group norm is not (C,) or (N, C) with dense rows");
  return {data_of(tensor), dtype_of(tensor), per_sample ? tensor.stride(0) : 0};
}

inline GroupNormArguments group_norm_arguments(const OptionalTensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& channel_bias, const OptionalTensor& scale,
                                               const OptionalTensor& shift, const GroupNormProblem& problem) {
  return {group_norm_argument(weight, problem, false), group_norm_argument(bias, problem, false),
          group_norm_argument(channel_bias, problem, true), group_norm_argument(scale, problem, true),
          group_norm_argument(shift, problem, true)};
}

// Working memory, once, as long as this lives; PyTorch keeps it from others on the stream until the launches have run.
class GroupNormMemory {
 public:
  explicit GroupNormMemory(const Tensor& like) : like_(like) {}

  float* operator()(std::int64_t count) {
    made_ = torch::stable::new_empty(like_, {count}, ScalarType::Float);
    return static_cast<float*>(made_->data_ptr());
  }

 private:
  const Tensor& like_;
  OptionalTensor made_;
};

// body(T{}) with the type of the elements.
template <class Body>
void group_norm_dtype(const GroupNormProblem& problem, const Body& body) {
  switch (problem.dtype) {
    case DType::float32:
      return body(float{});
    case DType::bfloat16:
      return body(bfloat16{});
    case DType::float16:
      return body(float16{});
  }
}

}  // namespace fastldm::cuda
