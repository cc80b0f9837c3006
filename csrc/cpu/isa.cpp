#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastldm {

// Each source of kernels defines its table in the namespace of every instruction set it is compiled for.
#define FASTLDM_DECLARE(isa)                 \
  namespace isa {                            \
  extern const AttentionKernels attention;   \
  extern const GroupNormKernels group_norm;  \
  extern const VQKernels vq;                 \
  }

FASTLDM_DECLARE(plain)
#ifdef FASTLDM_BUILT_avx2
FASTLDM_DECLARE(avx2)
#endif
#ifdef FASTLDM_BUILT_avx512
FASTLDM_DECLARE(avx512)
#endif
#ifdef FASTLDM_BUILT_avx512_bf16
FASTLDM_DECLARE(avx512_bf16)
#endif
#ifdef FASTLDM_BUILT_amx
FASTLDM_DECLARE(amx)
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The tile registers need the kernel's leave, which holds for the whole process and costs it nothing more than
// larger signal frames.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tiles = (d >> 24 & 1u) && (d >> 22 & 1u);
  constexpr long request_permission = 0x1023, tile_data = 18;
  return tiles && has_avx512_bf16() && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  Isa isa;
  bool (*runs_here)();
};

// Best first. A source that gains nothing from an instruction set stands in with its next lower table.
const Candidate candidates[] = {
#ifdef FASTLDM_BUILT_amx
    {{"amx", &amx::attention, &avx512::group_norm, &avx512::vq}, has_amx},
#endif
#ifdef FASTLDM_BUILT_avx512_bf16
    {{"avx512_bf16", &avx512_bf16::attention, &avx512::group_norm, &avx512::vq}, has_avx512_bf16},
#endif
#ifdef FASTLDM_BUILT_avx512
    {{"avx512", &avx512::attention, &avx512::group_norm, &avx512::vq}, has_avx512},
#endif
#ifdef FASTLDM_BUILT_avx2
    {{"avx2", &avx2::attention, &avx2::group_norm, &avx2::vq}, has_avx2},
#endif
    {{"plain", &plain::attention, &plain::group_norm, &plain::vq}, always},
};

const Isa* choose() {
  const char* wanted = std::getenv("FASTLDM_CPU_ISA");
  for (const Candidate& candidate : candidates) {
    const bool named = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, candidate.isa.name) == 0;
    if (named && candidate.runs_here()) return &candidate.isa;
  }
  return nullptr;
}

}  // namespace

const Isa* find_isa() {
  static const Isa* const chosen = choose();
  return chosen;
}

const char* runnable_isas() {
  static const std::string names = [] {
    std::string list;
    for (const Candidate& candidate : candidates) {
      if (candidate.runs_here()) list += (list.empty() ? "" : " ") + std::string(candidate.isa.name);
    }
    return list;
  }();
  return names.c_str();
}

}  // namespace fastldm
