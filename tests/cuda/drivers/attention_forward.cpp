// The plan of attention_forward_plan.h for ctypes.
#include "attention.h"

using namespace fastldm;
using namespace fastldm::cuda;
using namespace fastldm::cuda::attention;

extern "C" void forward_workspace(const std::int64_t* sizes, int capability, std::int64_t* floats) {
  shim::guarded([&] { *floats = workspace_of(sizes, capability, false); });
}

extern "C" void forward(FASTLDM_FORWARD_PARAMETERS) {
  shim::guarded([&] {
    const ForwardArguments all = FASTLDM_FORWARD_ARGUMENTS;
    half_switch(dtype, [&](auto zero) { attention::forward<decltype(zero)>(all, device(capability)); });
  });
}
