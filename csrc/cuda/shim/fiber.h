// Stacks to switch between: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(FASTLDM_SHIM_UCONTEXT)
#define FASTLDM_SHIM_UCONTEXT 1
#include <ucontext.h>
#endif

namespace fastldm::shim {

#ifndef FASTLDM_SHIM_UCONTEXT

struct Fiber {
  void* top;
};

extern "C" void fastldm_shim_switch(void** save, void* load);

// System V ABI: what a callee must keep is pushed, the rest the compiler has saved around the call.
asm(R"(
.text
.globl fastldm_shim_switch
.hidden fastldm_shim_switch
.type fastldm_shim_switch, @function
fastldm_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastldm_shim_switch, .-fastldm_shim_switch
)");

inline void start_fiber(Fiber& fiber, char* stack, std::size_t bytes, void (*body)()) {
  // As after a call: the stack is 8 more than a multiple of 16 at the first instruction.
  auto* slot = reinterpret_cast<std::uintptr_t*>(stack + bytes - 8);
  *--slot = reinterpret_cast<std::uintptr_t>(body);
  for (int i = 0; i < 6; ++i) *--slot = 0;
  fiber.top = slot;
}

inline void switch_fiber(Fiber& from, Fiber& to) { fastldm_shim_switch(&from.top, to.top); }

#else

struct Fiber {
  ucontext_t context;
};

inline void start_fiber(Fiber& fiber, char* stack, std::size_t bytes, void (*body)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
}

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace fastldm::shim
