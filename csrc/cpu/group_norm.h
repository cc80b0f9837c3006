// Group norm on the CPU: arguments and entry points. Contract: fastldm/ops/group_norm.py.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace fastldm {

// y = act(GN(x + channel_bias) * (1 + scale) + shift). x, y and their gradients are dense: (batch, channels,
// pixels) in memory or, channels_last, (batch, pixels, channels).
struct GroupNormProblem {
  DType dtype;  // of x, y and their gradients
  bool channels_last;
  bool silu;
  std::int64_t batch, channels, pixels, groups;
  float eps;
  const void* x;
  // Contiguous float32; null where absent.
  const float* weight;        // (channels)
  const float* bias;          // (channels)
  const float* channel_bias;  // (batch, channels)
  const float* scale;         // (batch, channels)
  const float* shift;         // (batch, channels)
};

struct GroupNormForward : GroupNormProblem {
  void* y;
  float* mean;  // (batch, groups) float32
  float* rstd;  // (batch, groups) float32
};

struct GroupNormBackward : GroupNormProblem {
  const void* grad;  // in the layout of x
  const float* mean;
  const float* rstd;
  void* grad_x;  // null where not needed, as all below; float32
  float* grad_weight;
  float* grad_bias;
  float* grad_channel_bias;
  float* grad_scale;
  float* grad_shift;
};

// Both return false where memory has run out.
struct GroupNormKernels {
  bool (*forward)(const GroupNormForward&);
  bool (*backward)(const GroupNormBackward&);
};

}  // namespace fastldm
