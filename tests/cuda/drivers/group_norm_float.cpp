// Both directions in float32 alone.
#define FASTLDM_ONLY_FLOAT
#include "group_norm_backward.cpp"
#include "group_norm_forward.cpp"
