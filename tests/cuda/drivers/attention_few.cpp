// One instance of each kernel of attention, of float16 with head dim 40 or 512: quick to compile again, broken.
#include "attention.h"

using namespace fastldm;
using namespace fastldm::cuda;
using namespace fastldm::cuda::attention;

extern "C" void forward_workspace(const std::int64_t* sizes, int capability, std::int64_t* floats) {
  shim::guarded([&] { *floats = workspace_of(sizes, capability, false); });
}

extern "C" void backward_workspace(const std::int64_t* sizes, int capability, std::int64_t* floats) {
  shim::guarded([&] { *floats = workspace_of(sizes, capability, true); });
}

extern "C" void forward(FASTLDM_FORWARD_PARAMETERS) {
  shim::guarded([&] {
    const ForwardArguments all = FASTLDM_FORWARD_ARGUMENTS;
    require(static_cast<DType>(dtype) == DType::float16, "this driver knows float16");
    if (all.call.dim == kWide) return wide_forward<float16, 64>(all, device(capability));
    is_short(all.call) ? short_forward<float16, 40, 80>(all, device(capability))
                       : long_forward<float16, 40>(all, device(capability));
  });
}

extern "C" void backward(FASTLDM_BACKWARD_PARAMETERS) {
  shim::guarded([&] {
    const BackwardArguments all = FASTLDM_BACKWARD_ARGUMENTS;
    require(static_cast<DType>(dtype) == DType::float16, "this driver knows float16");
    backward_statistics<float16>(all, all.call.dim == 40, device(capability));
    if (all.call.dim == kWide) {
      wide_backward<float16, 2, Side::keys>(all, device(capability));
      return wide_backward<float16, 2, Side::queries>(all, device(capability));
    }
    backward_keys<float16, 40, Part::both>(all, device(capability));
    backward_queries<float16, 40>(all, device(capability));
  });
}
