// The launches of group_norm_forward_plan.h for ctypes.
#include "cuda/group_norm_forward_plan.h"

#include "group_norm.h"

using namespace fastldm;
using namespace fastldm::cuda;

extern "C" void choose_forward(const std::int64_t* problem, std::int64_t* choice, int capability) {
  shim::guarded([&] {
    const GroupNormProblem of = problem_of(problem);
    of_type(of.dtype, [&](auto zero) {
      write_choice(choose_group_norm_forward<decltype(zero)>(of, gpu(capability)), choice);
    });
  });
}

// The choice with another answer to how many clusters the device holds.
extern "C" void choose_with(const std::int64_t* problem, std::int64_t* choice, int capability, int most_blocks) {
  shim::guarded([&] {
    const auto clusters = [&](const GroupNormChoice& of, int) { return of.cluster <= most_blocks ? 16 : 0; };
    write_choice(choose_group_norm(problem_of(problem), gpu(capability).device, 1, 2, clusters), choice);
  });
}

extern "C" void forward(const void* x, void* y, float* mean, float* rstd, const std::int64_t* given,
                        const std::int64_t* problem, const std::int64_t* choice, double eps, bool silu,
                        int capability) {
  shim::guarded([&] {
    const GroupNormForwardCall call{problem_of(problem), x,    y, mean, rstd, arguments_of(given),
                                    static_cast<float>(eps), silu};
    of_type(call.problem.dtype, [&](auto zero) {
      group_norm_forward<decltype(zero)>(call, choice_of(choice), Memory(), gpu(capability));
    });
  });
}
