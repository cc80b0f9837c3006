// The plan of attention_backward_plan.h for ctypes.
#include "attention.h"

using namespace fastldm;
using namespace fastldm::cuda;
using namespace fastldm::cuda::attention;

extern "C" void backward_workspace(const std::int64_t* sizes, int capability, std::int64_t* floats) {
  shim::guarded([&] { *floats = workspace_of(sizes, capability, true); });
}

extern "C" void backward(FASTLDM_BACKWARD_PARAMETERS) {
  shim::guarded([&] {
    const BackwardArguments all = FASTLDM_BACKWARD_ARGUMENTS;
    half_switch(dtype, [&](auto zero) { attention::backward<decltype(zero)>(all, device(capability)); });
  });
}
