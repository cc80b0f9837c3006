// What the drivers of all kernels share: the GPUs that plans are made for, and element types by number.
#pragma once

#include "cuda/common/launch.h"

// Of libgcov, in a driver whose lines are counted.
extern "C" void __gcov_dump() __attribute__((weak));

extern "C" inline __attribute__((used)) void shim_write_coverage() {
  if (__gcov_dump != nullptr) __gcov_dump();
}

namespace fastldm::cuda {

// The GPUs of kernels/common/target.py as `Device` describes them: an A100 (80), an RTX A6000 (86), an L40S (89), an
// H200 (90), a B200 (100) or an RTX PRO 6000 (120). A multiprocessor has 1 KiB more than a block may ask for.
inline Context gpu(int capability) {
  const auto with = [&](int multiprocessors, int kib) {
    return Context{{0, capability, multiprocessors, kib << 10, (kib + 1) << 10}, nullptr};
  };
  switch (capability) {
    case 80:
      return with(108, 163);
    case 86:
      return with(84, 99);
    case 89:
      return with(142, 99);
    case 90:
      return with(132, 227);
    case 100:
      return with(148, 227);
    default:
      require(capability == 120, "the drivers know capabilities 80, 86, 89, 90, 100 and 120");
      return with(188, 99);
  }
}

// Calls body(T{}) with the type of an fastldm::DType.
template <class Body>
void dtype_switch(int dtype, const Body& body) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32:
      return body(float{});
    case DType::bfloat16:
      return body(bfloat16{});
    case DType::float16:
      return body(float16{});
  }
}

}  // namespace fastldm::cuda
