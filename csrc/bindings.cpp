// The compiled kernels as PyTorch operations `fastldm_cpu::*`, through PyTorch's stable ABI: one binary serves
// every Python and every PyTorch from 2.11 on. They write into tensors made by the caller (fastldm/native), who
// has checked shapes and dtypes; the layouts that a kernel relies on are checked here once more, for a wrong one
// would read memory that is not ours.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/parallel.h"
#include "cpu/isa.h"

namespace fastldm {

void parallel_ranges(std::int64_t count, std::int64_t grain,
                     void (*body)(std::int64_t begin, std::int64_t end, void* context), void* context) {
  if (count > 0) TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

const Isa& isa() {
  const Isa* found = find_isa();
  STD_TORCH_CHECK(found != nullptr, "FASTLDM_CPU_ISA names no instruction set that this build and machine have; ",
                  "use one of: ", runnable_isas());
  return *found;
}

void check_memory(bool enough) { STD_TORCH_CHECK(enough, "fastldm: out of memory"); }

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "fastldm_cpu kernels take float32, bfloat16 and float16");
  }
}

void* data_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "fastldm_cpu kernels take tensors on the CPU");
  return x.data_ptr();
}

template <class T>
T* contiguous(const Tensor& x, std::int64_t numel, ScalarType type) {
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == numel && x.scalar_type() == type,
                  "fastldm_cpu: a tensor is not contiguous or of another size or dtype than its kernel expects");
  return static_cast<T*>(data_of(x));
}

float* floats(const OptionalTensor& x, std::int64_t numel) {
  return x ? contiguous<float>(*x, numel, ScalarType::Float) : nullptr;
}

template <class Pointer>
Heads<Pointer> heads(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.stride(3) == 1 || x.size(3) == 1),
                  "fastldm_cpu attention takes 4-D tensors with a dense last dimension");
  return {data_of(x), x.stride(0), x.stride(1), x.stride(2)};
}

Mask mask_of(const OptionalTensor& mask, const Tensor& q) {
  if (!mask) return {MaskKind::none, nullptr, 0, 0, 0, 0};
  STD_TORCH_CHECK(mask->dim() == 4, "fastldm_cpu attention takes a 4-D mask");
  const auto stride = [&](int dim) { return mask->size(dim) == 1 ? std::int64_t{0} : mask->stride(dim); };
  MaskKind kind = MaskKind::same_as_q;
  if (mask->scalar_type() == ScalarType::Bool) {
    kind = MaskKind::boolean;
  } else if (mask->scalar_type() == ScalarType::Float) {
    kind = MaskKind::float32;
  } else {
    STD_TORCH_CHECK(mask->scalar_type() == q.scalar_type(),
                    "fastldm_cpu attention takes a mask of bool, float32 or the dtype of q");
  }
  return {kind, data_of(*mask), stride(0), stride(1), stride(2), stride(3)};
}

void fill_problem(AttentionProblem& problem, const Tensor& q, const Tensor& k, const Tensor& v,
                  const OptionalTensor& mask, bool is_causal, double scale) {
  problem.dtype = dtype_of(q);
  problem.batch = q.size(0);
  problem.heads = q.size(1);
  problem.queries = q.size(2);
  problem.keys = k.size(2);
  problem.head_dim = q.size(3);
  problem.causal = is_causal;
  problem.scale = static_cast<float>(scale);
  problem.q = heads<const void*>(q);
  problem.k = heads<const void*>(k);
  problem.v = heads<const void*>(v);
  problem.mask = mask_of(mask, q);
}

void attention_forward(Tensor q, Tensor k, Tensor v, OptionalTensor mask, bool is_causal, double scale, Tensor out,
                       OptionalTensor lse) {
  AttentionForward call;
  fill_problem(call, q, k, v, mask, is_causal, scale);
  call.out = heads<void*>(out);
  call.lse = floats(lse, call.batch * call.heads * call.queries);
  check_memory(isa().attention->forward(call));
}

void attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor mask,
                        bool is_causal, double scale, Tensor grad_q, Tensor grad_k, Tensor grad_v) {
  AttentionBackward call;
  fill_problem(call, q, k, v, mask, is_causal, scale);
  call.grad_out = heads<const void*>(grad_out);
  call.out = heads<const void*>(out);
  call.lse = floats(lse, call.batch * call.heads * call.queries);
  call.grad_q = heads<void*>(grad_q);
  call.grad_k = heads<void*>(grad_k);
  call.grad_v = heads<void*>(grad_v);
  check_memory(isa().attention->backward(call));
}

void fill_problem(GroupNormProblem& problem, const Tensor& x, bool channels_last, std::int64_t groups, double eps,
                  bool silu, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& channel_bias, const OptionalTensor& scale, const OptionalTensor& shift) {
  const std::int64_t batch = x.size(0), channels = x.size(1);
  problem.dtype = dtype_of(x);
  problem.channels_last = channels_last;
  problem.silu = silu;
  problem.batch = batch;
  problem.channels = channels;
  problem.pixels = x.numel() / (batch * channels);
  problem.groups = groups;
  problem.eps = static_cast<float>(eps);
  problem.x = data_of(x);
  problem.weight = floats(weight, channels);
  problem.bias = floats(bias, channels);
  problem.channel_bias = floats(channel_bias, batch * channels);
  problem.scale = floats(scale, batch * channels);
  problem.shift = floats(shift, batch * channels);
}

void group_norm_forward(Tensor x, bool channels_last, std::int64_t groups, double eps, bool silu,
                        OptionalTensor weight, OptionalTensor bias, OptionalTensor channel_bias,
                        OptionalTensor scale, OptionalTensor shift, Tensor y, Tensor mean, Tensor rstd) {
  GroupNormForward call;
  fill_problem(call, x, channels_last, groups, eps, silu, weight, bias, channel_bias, scale, shift);
  call.y = data_of(y);
  call.mean = contiguous<float>(mean, call.batch * groups, ScalarType::Float);
  call.rstd = contiguous<float>(rstd, call.batch * groups, ScalarType::Float);
  check_memory(isa().group_norm->forward(call));
}

void group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, bool channels_last, std::int64_t groups,
                         double eps, bool silu, OptionalTensor weight, OptionalTensor bias,
                         OptionalTensor channel_bias, OptionalTensor scale, OptionalTensor shift,
                         OptionalTensor grad_x, OptionalTensor grad_weight, OptionalTensor grad_bias,
                         OptionalTensor grad_channel_bias, OptionalTensor grad_scale, OptionalTensor grad_shift) {
  GroupNormBackward call;
  fill_problem(call, x, channels_last, groups, eps, silu, weight, bias, channel_bias, scale, shift);
  const std::int64_t per_sample = call.batch * call.channels;
  call.grad = data_of(grad);
  call.mean = contiguous<float>(mean, call.batch * groups, ScalarType::Float);
  call.rstd = contiguous<float>(rstd, call.batch * groups, ScalarType::Float);
  call.grad_x = grad_x ? data_of(*grad_x) : nullptr;
  call.grad_weight = floats(grad_weight, call.channels);
  call.grad_bias = floats(grad_bias, call.channels);
  call.grad_channel_bias = floats(grad_channel_bias, per_sample);
  call.grad_scale = floats(grad_scale, per_sample);
  call.grad_shift = floats(grad_shift, per_sample);
  check_memory(isa().group_norm->backward(call));
}

void vq_nearest(Tensor z, Tensor codebook, Tensor indices) {
  VQNearest call;
  call.z_dtype = dtype_of(z);
  call.codebook_dtype = dtype_of(codebook);
  call.codes = codebook.size(0);
  call.dim = codebook.size(1);
  call.rows = z.numel() / call.dim;
  call.z = contiguous<void>(z, call.rows * call.dim, z.scalar_type());
  call.codebook = contiguous<void>(codebook, call.codes * call.dim, codebook.scalar_type());
  call.indices = contiguous<std::int64_t>(indices, call.rows, ScalarType::Long);
  check_memory(isa().vq->nearest(call));
}

void vq_ema_update(Tensor z, Tensor indices, Tensor counts, Tensor sums) {
  VQEmaUpdate call;
  call.z_dtype = dtype_of(z);
  call.codes = sums.size(0);
  call.dim = sums.size(1);
  call.rows = indices.numel();
  call.z = contiguous<void>(z, call.rows * call.dim, z.scalar_type());
  call.indices = contiguous<std::int64_t>(indices, call.rows, ScalarType::Long);
  call.counts = contiguous<std::int64_t>(counts, call.codes, ScalarType::Long);
  call.sums = contiguous<float>(sums, call.codes * call.dim, ScalarType::Float);
  check_memory(isa().vq->ema_update(call));
}

std::string isa_name() { return isa().name; }

std::string runnable() { return runnable_isas(); }

}  // namespace
}  // namespace fastldm

STABLE_TORCH_LIBRARY(fastldm_cpu, library) {
  library.def("isa() -> str");
  library.def("runnable_isas() -> str");
  library.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, Tensor(a!) out, "
      "Tensor(b!)? lse) -> ()");
  library.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, "
      "bool is_causal, float scale, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
  library.def(
      "group_norm_forward(Tensor x, bool channels_last, int groups, float eps, bool silu, Tensor? weight, "
      "Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, Tensor(a!) y, Tensor(b!) mean, "
      "Tensor(c!) rstd) -> ()");
  library.def(
      "group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, bool channels_last, int groups, "
      "float eps, bool silu, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, "
      "Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor(d!)? grad_channel_bias, "
      "Tensor(e!)? grad_scale, Tensor(f!)? grad_shift) -> ()");
  library.def("vq_nearest(Tensor z, Tensor codebook, Tensor(a!) indices) -> ()");
  library.def("vq_ema_update(Tensor z, Tensor indices, Tensor(a!) counts, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastldm_cpu, CompositeExplicitAutograd, library) {
  library.impl("isa", TORCH_BOX(&fastldm::isa_name));
  library.impl("runnable_isas", TORCH_BOX(&fastldm::runnable));
  library.impl("attention_forward", TORCH_BOX(&fastldm::attention_forward));
  library.impl("attention_backward", TORCH_BOX(&fastldm::attention_backward));
  library.impl("group_norm_forward", TORCH_BOX(&fastldm::group_norm_forward));
  library.impl("group_norm_backward", TORCH_BOX(&fastldm::group_norm_backward));
  library.impl("vq_nearest", TORCH_BOX(&fastldm::vq_nearest));
  library.impl("vq_ema_update", TORCH_BOX(&fastldm::vq_ema_update));
}
