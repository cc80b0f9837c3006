// fastldm_cuda::attention_forward.

#include "cuda/attention_forward_plan.h"
#include "cuda/attention_torch.h"

namespace fastldm::cuda {
namespace {

std::int64_t attention_forward_workspace(Tensor q, Tensor k) {
  return attention::forward_workspace(attention::arguments_of(q, k, std::nullopt, false, 1.0),
                                      device_of(q.get_device_index()));
}

void attention_forward(Tensor q, Tensor k, Tensor v, OptionalTensor mask, bool is_causal, double scale, Tensor out,
                       OptionalTensor lse, OptionalTensor workspace) {
  const Launching launching(q);
  const attention::Arguments call = attention::arguments_of(q, k, mask, is_causal, scale);
  const std::int64_t needed = attention::forward_workspace(call, device_of(q.get_device_index()));
  const attention::ForwardArguments all = {call,
                                           attention::heads_argument(q, q, call.queries),
                                           attention::heads_argument(k, q, call.keys),
                                           attention::heads_argument(v, q, call.keys),
                                           attention::heads_argument(out, q, call.queries),
                                           floats(lse, call.batch * call.heads * call.queries),
                                           needed > 0 ? floats(workspace, needed) : nullptr};
  attention::half_switch(q, [&](auto zero) { attention::forward<decltype(zero)>(all, launching); });
}

}  // namespace
}  // namespace fastldm::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastldm_cuda, library) {
  library.def("attention_forward_workspace(Tensor q, Tensor k) -> int");
  library.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, Tensor(a!) out, "
      "Tensor(b!)? lse, Tensor(c!)? workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastldm_cuda, CompositeExplicitAutograd, library) {
  library.impl("attention_forward_workspace", TORCH_BOX(&fastldm::cuda::attention_forward_workspace));
  library.impl("attention_forward", TORCH_BOX(&fastldm::cuda::attention_forward));
}
