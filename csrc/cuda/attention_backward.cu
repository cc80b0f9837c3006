// fastldm_cuda::attention_backward.

#include "cuda/attention_backward_plan.h"
#include "cuda/attention_torch.h"

namespace fastldm::cuda {
namespace {

std::int64_t attention_backward_workspace(Tensor q, Tensor k) {
  return attention::backward_workspace(attention::arguments_of(q, k, std::nullopt, false, 1.0),
                                       device_of(q.get_device_index()));
}

void attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor mask,
                        bool is_causal, double scale, Tensor dq, Tensor dk, Tensor dv, Tensor workspace) {
  const Launching launching(q);
  const attention::Arguments call = attention::arguments_of(q, k, mask, is_causal, scale);
  const auto queries = [&](const Tensor& x) { return attention::heads_argument(x, q, call.queries); };
  const auto keys = [&](const Tensor& x) { return attention::heads_argument(x, q, call.keys); };
  const std::int64_t needed = attention::backward_workspace(call, device_of(q.get_device_index()));
  const attention::BackwardArguments all = {
      call,
      queries(grad),
      queries(q),
      keys(k),
      keys(v),
      queries(out),
      contiguous<float>(lse, call.batch * call.heads * call.queries, ScalarType::Float),
      queries(dq),
      keys(dk),
      keys(dv),
      contiguous<float>(workspace, needed, ScalarType::Float)};
  attention::half_switch(q, [&](auto zero) { attention::backward<decltype(zero)>(all, launching); });
}

}  // namespace
}  // namespace fastldm::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastldm_cuda, library) {
  library.def("attention_backward_workspace(Tensor q, Tensor k) -> int");
  library.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, "
      "bool is_causal, float scale, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastldm_cuda, CompositeExplicitAutograd, library) {
  library.impl("attention_backward_workspace", TORCH_BOX(&fastldm::cuda::attention_backward_workspace));
  library.impl("attention_backward", TORCH_BOX(&fastldm::cuda::attention_backward));
}
