// fastldm_cuda::group_norm_backward: grad, x and grad_x dense in one layout; mean and rstd (N, groups) float32,
// contiguous; gradients of parameters contiguous, in any of the dtypes. A gradient that is not given is not made.

#include "cuda/group_norm_backward_plan.h"
#include "cuda/group_norm_torch.h"

namespace fastldm::cuda {
namespace {

void backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, bool channels_last, std::int64_t groups, bool silu,
              OptionalTensor weight, OptionalTensor bias, OptionalTensor channel_bias, OptionalTensor scale,
              OptionalTensor shift, OptionalTensor grad_x, OptionalTensor grad_weight, OptionalTensor grad_bias,
              OptionalTensor grad_channel_bias, OptionalTensor grad_scale, OptionalTensor grad_shift) {
  GroupNormBackwardCall call{};
  GroupNormProblem& problem = call.problem;
  problem = group_norm_problem(x, channels_last, groups);
  call.grad = group_norm_data(grad, problem);
  call.x = group_norm_data(x, problem);
  call.dx = grad_x ? group_norm_data(*grad_x, problem) : nullptr;
  call.mean = contiguous<float>(mean, x.size(0) * groups, ScalarType::Float);
  call.rstd = contiguous<float>(rstd, x.size(0) * groups, ScalarType::Float);
  call.given = group_norm_arguments(weight, bias, channel_bias, scale, shift, problem);
  call.gradients = group_norm_arguments(grad_weight, grad_bias, grad_channel_bias, grad_scale, grad_shift, problem);
  for (const OptionalTensor& made : {grad_channel_bias, grad_scale, grad_shift}) {
    STD_TORCH_CHECK(!made || made->is_contiguous(), "fastldm_cuda: gradients of parameters are contiguous");
  }
  call.silu = silu;
  check_group_norm(problem);
  const Launching launching(x);
  group_norm_dtype(problem, [&](auto zero) {
    using T = decltype(zero);
    group_norm_backward<T>(call, choose_group_norm_backward<T>(problem, launching), GroupNormMemory(x), launching);
  });
}

}  // namespace
}  // namespace fastldm::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastldm_cuda, library) {
  library.def(
      "group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, bool channels_last, int groups, "
      "bool silu, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, "
      "Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor(d!)? grad_channel_bias, "
      "Tensor(e!)? grad_scale, Tensor(f!)? grad_shift) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastldm_cuda, CompositeExplicitAutograd, library) {
  library.impl("group_norm_backward", TORCH_BOX(&fastldm::cuda::backward));
}
