// Element types of the tensors that kernels read and write.
#pragma once

#include <cstdint>

namespace fastldm {

enum class DType : int { float32, bfloat16, float16 };

// Storage only; arithmetic happens in float32 (cpu/vec.h converts).
struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

}  // namespace fastldm
