// The launches of group_norm_backward_plan.h for ctypes.
#include "cuda/group_norm_backward_plan.h"

#include "group_norm.h"

using namespace fastldm;
using namespace fastldm::cuda;

extern "C" void choose_backward(const std::int64_t* problem, std::int64_t* choice, int capability) {
  shim::guarded([&] {
    const GroupNormProblem of = problem_of(problem);
    of_type(of.dtype, [&](auto zero) {
      write_choice(choose_group_norm_backward<decltype(zero)>(of, gpu(capability)), choice);
    });
  });
}

extern "C" void backward(const void* grad, const void* x, const float* mean, const float* rstd,
                         const std::int64_t* given, void* dx, const std::int64_t* gradients,
                         const std::int64_t* problem, const std::int64_t* choice, bool silu, int capability) {
  shim::guarded([&] {
    const GroupNormBackwardCall call{problem_of(problem), grad, x,  mean, rstd, arguments_of(given),
                                     silu,                dx,   arguments_of(gradients)};
    of_type(call.problem.dtype, [&](auto zero) {
      group_norm_backward<decltype(zero)>(call, choice_of(choice), Memory(), gpu(capability));
    });
  });
}
