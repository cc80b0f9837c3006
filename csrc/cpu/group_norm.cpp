// Group norm with SiLU and the options of diffusion models, forward and backward. Sums run in float32 over blocks
// of fixed length and in float64 beyond, in a fixed order, so results do not depend on the number of threads.

#include "group_norm_pixels.h"
#include "group_norm_rows.h"

namespace fastldm::FASTLDM_ISA {

namespace {

// Results from this size on bypass the caches: they would not stay there for their reader, and storing through
// the caches reads the memory first.
constexpr std::int64_t kStreamBytes = 16 << 20;

template <class T>
bool stream_to(const GroupNormProblem& call, const void* target) {
  const std::int64_t bytes = call.batch * call.channels * call.pixels * static_cast<std::int64_t>(sizeof(T));
  return bytes >= kStreamBytes &&
         can_stream(static_cast<const T*>(target), call.channels_last ? call.channels : call.pixels);
}

// One pixel is both layouts, and the channels make longer vectors.
bool along_channels(const GroupNormProblem& call) { return call.channels_last || call.pixels == 1; }

template <class T, bool Silu>
bool forward_of(const GroupNormForward& call) {
  if (stream_to<T>(call, call.y)) {
    return along_channels(call) ? forward_pixels<T, Silu, true>(call) : forward_rows<T, Silu, true>(call);
  }
  return along_channels(call) ? forward_pixels<T, Silu, false>(call) : forward_rows<T, Silu, false>(call);
}

template <class T, bool Silu>
bool backward_of(const GroupNormBackward& call, double* parameter_sums) {
  if (stream_to<T>(call, call.grad_x)) {
    return along_channels(call) ? backward_pixels<T, Silu, true>(call, parameter_sums)
                                : backward_rows<T, Silu, true>(call, parameter_sums);
  }
  return along_channels(call) ? backward_pixels<T, Silu, false>(call, parameter_sums)
                              : backward_rows<T, Silu, false>(call, parameter_sums);
}

bool forward(const GroupNormForward& call) {
  switch (call.dtype) {
    case DType::float32:
      return call.silu ? forward_of<float, true>(call) : forward_of<float, false>(call);
    case DType::bfloat16:
      return call.silu ? forward_of<bfloat16, true>(call) : forward_of<bfloat16, false>(call);
    case DType::float16:
      return call.silu ? forward_of<float16, true>(call) : forward_of<float16, false>(call);
  }
  return false;
}

template <class T>
bool backward_of(const GroupNormBackward& call, double* parameter_sums) {
  return call.silu ? backward_of<T, true>(call, parameter_sums) : backward_of<T, false>(call, parameter_sums);
}

bool backward(const GroupNormBackward& call) {
  const bool parameters = call.grad_weight || call.grad_bias;
  Scratch<double> sums(parameters ? 2 * call.batch * call.channels : 1);
  if (sums.data == nullptr) return false;
  double* const parameter_sums = parameters ? sums.data : nullptr;
  bool done = false;
  switch (call.dtype) {
    case DType::float32:
      done = backward_of<float>(call, parameter_sums);
      break;
    case DType::bfloat16:
      done = backward_of<bfloat16>(call, parameter_sums);
      break;
    case DType::float16:
      done = backward_of<float16>(call, parameter_sums);
      break;
  }
  if (done && parameters) sum_parameters(call, parameter_sums);
  return done;
}

}  // namespace

extern const GroupNormKernels group_norm = {forward, backward};

}  // namespace fastldm::FASTLDM_ISA
