// Attention on the CPU, forward and backward. Contract: fastldm/ops/attention.py.
#include "attention.h"

#include "attention_backward.h"
#include "attention_forward.h"

namespace fastldm::FASTLDM_ISA {

template <template <class> class Kernel, class Call>
static bool run(const Call& call) {
  switch (call.dtype) {
    case DType::float32:
      return Kernel<float>(call).run();
    case DType::bfloat16:
      return Kernel<bfloat16>(call).run();
    default:
      return Kernel<float16>(call).run();
  }
}

extern const AttentionKernels attention = {run<Forward, AttentionForward>, run<Backward, AttentionBackward>};

}  // namespace fastldm::FASTLDM_ISA
