// The arguments of the entries of attention, as ctypes passes them.
#pragma once

#include "cuda/attention_backward_plan.h"
#include "cuda/attention_forward_plan.h"
#include "driver.h"

namespace fastldm::cuda::attention {

// `sizes`: B, H, Sq, Sk, D, causal, MaskType; `strides`: four of the mask, then three of each tensor.
inline Arguments arguments_of(const std::int64_t* sizes, double scale, const void* mask, const std::int64_t* strides) {
  return {sizes[0],      sizes[1], sizes[2], sizes[3], sizes[4],
          sizes[5] != 0, scale,    mask,     static_cast<MaskType>(sizes[6]),
          {strides[0], strides[1], strides[2], strides[3]}};
}

inline HeadsArgument heads_argument(const void* data, const std::int64_t* strides) {
  return {const_cast<void*>(data), {strides[0], strides[1], strides[2]}};
}

// The parameters of the entries `forward` and `backward`, and what they say.
#define FASTLDM_FORWARD_PARAMETERS                                                                                  \
  const std::int64_t *sizes, double scale, const void *mask, const std::int64_t *strides, const void *q,           \
      const void *k, const void *v, const void *out, float *lse, float *workspace, int dtype, int capability
#define FASTLDM_FORWARD_ARGUMENTS                                                                                  \
  {arguments_of(sizes, scale, mask, strides), heads_argument(q, strides + 4), heads_argument(k, strides + 7),      \
   heads_argument(v, strides + 10), heads_argument(out, strides + 13), lse, workspace}
#define FASTLDM_BACKWARD_PARAMETERS                                                                                \
  const std::int64_t *sizes, double scale, const void *mask, const std::int64_t *strides, const void *grad,        \
      const void *q, const void *k, const void *v, const void *out, const float *lse, const void *dq,              \
      const void *dk, const void *dv, float *workspace, int dtype, int capability
#define FASTLDM_BACKWARD_ARGUMENTS                                                                                 \
  {arguments_of(sizes, scale, mask, strides), heads_argument(grad, strides + 4), heads_argument(q, strides + 7),   \
   heads_argument(k, strides + 10), heads_argument(v, strides + 13), heads_argument(out, strides + 16), lse,        \
   heads_argument(dq, strides + 19), heads_argument(dk, strides + 22), heads_argument(dv, strides + 25), workspace}

// That of driver.h; 1 is an A100 of one multiprocessor, on which a block has much to do.
inline Context device(int capability) {
  if (capability != 1) return gpu(capability);
  Context context = gpu(80);
  context.device.multiprocessors = 1;
  return context;
}

// Floats of working memory.
inline std::int64_t workspace_of(const std::int64_t* sizes, int capability, bool backward) {
  const std::int64_t none[4] = {};
  const Arguments call = arguments_of(sizes, 1.0, nullptr, none);
  const Device on = device(capability).device;
  return backward ? backward_workspace(call, on) : forward_workspace(call, on);
}

template <class Body>
void half_switch(int dtype, const Body& body) {
  dtype_switch(dtype, [&](auto zero) {
    if constexpr (sizeof(zero) == 2) body(zero);
  });
}

}  // namespace fastldm::cuda::attention
