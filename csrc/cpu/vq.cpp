// Vector quantisation on the CPU: nearest code and codebook sums. Contract: fastldm/ops/vq.py.
#include "vq.h"

#include "vq_search.h"
#include "vq_sums.h"

namespace fastldm::FASTLDM_ISA {

template <class Kernel>
static bool search(const VQNearest& call) {
  return Search<Kernel>(call).run();
}

static bool nearest(const VQNearest& call) {
  switch (call.dim) {
    case 1:
      return search<FewDimensions<1>>(call);
    case 2:
      return search<FewDimensions<2>>(call);
    case 3:
      return search<FewDimensions<3>>(call);
    case 4:
      return search<FewDimensions<4>>(call);
    case 5:
      return search<FewDimensions<5>>(call);
    case 6:
      return search<FewDimensions<6>>(call);
    case 7:
      return search<FewDimensions<7>>(call);
    case 8:
      return search<FewDimensions<8>>(call);
    default:
      return search<ManyDimensions>(call);
  }
}

extern const VQKernels vq = {nearest, ema_update};

}  // namespace fastldm::FASTLDM_ISA
