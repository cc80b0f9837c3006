// The instruction sets that the kernels were compiled for, and the one in use.
#pragma once

#include "attention.h"
#include "group_norm.h"
#include "vq.h"

namespace fastldm {

struct Isa {
  const char* name;
  const AttentionKernels* attention;
  const GroupNormKernels* group_norm;
  const VQKernels* vq;
};

// The best that this build holds and this machine runs, or the one that FASTLDM_CPU_ISA names. Null where that
// name is unknown here.
const Isa* find_isa();

// Names of what this build holds and this machine runs, best first, separated by spaces.
const char* runnable_isas();

}  // namespace fastldm
