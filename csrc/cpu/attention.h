// Attention on the CPU: arguments and entry points. Contract: fastldm/ops/attention.py.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace fastldm {

// A (batch, heads, rows, head_dim) tensor: strides in elements, the last dimension dense.
template <class Pointer>
struct Heads {
  Pointer data;
  std::int64_t batch_stride, head_stride, row_stride;
};

enum class MaskKind : int { none, boolean, float32, same_as_q };

// (batch, heads, queries, keys), stride 0 where it is broadcast. True or 0 = attend; the rest is added.
struct Mask {
  MaskKind kind;
  const void* data;
  std::int64_t batch_stride, head_stride, query_stride, key_stride;
};

struct AttentionProblem {
  DType dtype;  // of q, k, v, out and their gradients
  std::int64_t batch, heads, queries, keys, head_dim;
  bool causal;
  float scale;
  Heads<const void*> q, k, v;
  Mask mask;
};

struct AttentionForward : AttentionProblem {
  Heads<void*> out;
  // (batch, heads, queries) contiguous float32, natural logarithm, -infinity in a row without keys; or null.
  float* lse;
};

struct AttentionBackward : AttentionProblem {
  Heads<const void*> grad_out, out;
  const float* lse;
  Heads<void*> grad_q, grad_k, grad_v;
};

// Both return false where memory has run out.
struct AttentionKernels {
  bool (*forward)(const AttentionForward&);
  bool (*backward)(const AttentionBackward&);
};

}  // namespace fastldm
