// fastldm_cuda::group_norm_forward: x, y dense in one layout; mean and rstd (N, groups) float32, contiguous.

#include "cuda/group_norm_forward_plan.h"
#include "cuda/group_norm_torch.h"

namespace fastldm::cuda {
namespace {

void forward(Tensor x, bool channels_last, std::int64_t groups, double eps, bool silu, OptionalTensor weight,
             OptionalTensor bias, OptionalTensor channel_bias, OptionalTensor scale, OptionalTensor shift, Tensor y,
             Tensor mean, Tensor rstd) {
  GroupNormForwardCall call{};
  GroupNormProblem& problem = call.problem;
  problem = group_norm_problem(x, channels_last, groups);
  call.x = group_norm_data(x, problem);
  call.y = group_norm_data(y, problem);
  call.mean = contiguous<float>(mean, x.size(0) * groups, ScalarType::Float);
  call.rstd = contiguous<float>(rstd, x.size(0) * groups, ScalarType::Float);
  call.given = group_norm_arguments(weight, bias, channel_bias, scale, shift, problem);
  call.eps = static_cast<float>(eps);
  call.silu = silu;
  check_group_norm(problem);
  const Launching launching(x);
  group_norm_dtype(problem, [&](auto zero) {
    using T = decltype(zero);
    group_norm_forward<T>(call, choose_group_norm_forward<T>(problem, launching), GroupNormMemory(x), launching);
  });
}

}  // namespace
}  // namespace fastldm::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastldm_cuda, library) {
  library.def(
      "group_norm_forward(Tensor x, bool channels_last, int groups, float eps, bool silu, Tensor? weight, "
      "Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, Tensor(a!) y, Tensor(b!) mean, "
      "Tensor(c!) rstd) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastldm_cuda, CompositeExplicitAutograd, library) {
  library.impl("group_norm_forward", TORCH_BOX(&fastldm::cuda::forward));
}
