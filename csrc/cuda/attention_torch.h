// What the launchers of attention share: PyTorch's tensors as arguments, checked once more.
#pragma once

#include "cuda/attention_problem.h"
#include "cuda/common/torch.h"

namespace fastldm::cuda::attention {

// `x` is (B, H, length, D) of q's dtype, on q's device.
inline HeadsArgument heads_argument(const Tensor& x, const Tensor& q, std::int64_t length) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == length &&
                      x.size(3) == q.size(3) && x.scalar_type() == q.scalar_type(),
                  "fastldm_cuda attention: a tensor has another shape or dtype than q, k and v say");
  STD_TORCH_CHECK(x.stride(3) == 1 && x.get_device_index() == q.get_device_index(),
                  "fastldm_cuda attention: tensors must be on one device, their last dimension dense");
  const auto stride = [&](int i) { return x.size(i) == 1 ? 0 : x.stride(i); };
  return {data_of(x), {stride(0), stride(1), stride(2)}};
}

inline Arguments arguments_of(const Tensor& q, const Tensor& k, const OptionalTensor& mask, bool causal,
                              double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "fastldm_cuda attention: q and k must be (B, H, S, D)");
  Arguments call = {q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), causal, scale, nullptr, {}, {}};
  if (mask) {
    const auto type = mask->scalar_type();
    const bool known = type == ScalarType::Bool || type == ScalarType::Float || type == q.scalar_type();
    STD_TORCH_CHECK(mask->dim() == 4 && known && mask->get_device_index() == q.get_device_index(),
                    "fastldm_cuda attention: the mask must be 4-D, bool, float32 or of q's dtype, on q's device");
    const std::int64_t wanted[4] = {call.batch, call.heads, call.queries, call.keys};
    for (int i = 0; i < 4; ++i) {
      const std::int64_t size = mask->size(i);
      STD_TORCH_CHECK(size == 1 || size == wanted[i], "fastldm_cuda attention: the mask must broadcast to scores");
      call.mask_strides[i] = size == 1 ? 0 : mask->stride(i);
    }
    call.mask = data_of(*mask);
    call.mask_type = type == ScalarType::Bool    ? MaskType::boolean
                     : type == ScalarType::Float ? MaskType::single
                                                 : MaskType::half;
  }
  return call;
}

// body(T{}) with q's dtype.
template <class Body>
void half_switch(const Tensor& q, const Body& body) {
  switch (dtype_of(q)) {
    case DType::bfloat16:
      return body(bfloat16{});
    case DType::float16:
      return body(float16{});
    default:
      STD_TORCH_CHECK(false, "fastldm_cuda attention takes float16 and bfloat16");
  }
}

}  // namespace fastldm::cuda::attention
