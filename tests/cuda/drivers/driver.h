// What the drivers of all kernels share: the GPUs that plans are made for, and element types by number.
#pragma once

#include "cuda/common/launch.h"

// Of libgcov, in a driver whose lines are counted.
extern "C" void __gcov_dump() __attribute__((weak));

extern "C" inline __attribute__((used)) void shim_write_coverage() {
  if (__gcov_dump != nullptr) __gcov_dump();
}

namespace fastldm::cuda {

// An A100 (80), an L40S (89) or an H200 (90) as `Device` describes them.
inline Context gpu(int capability) {
  switch (capability) {
    case 80:
      return {{0, 80, 108, 163 << 10, 164 << 10}, nullptr};
    case 89:
      return {{0, 89, 142, 99 << 10, 100 << 10}, nullptr};
    default:
      require(capability == 90, "the drivers know capabilities 80, 89 and 90");
      return {{0, 90, 132, 227 << 10, 228 << 10}, nullptr};
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
