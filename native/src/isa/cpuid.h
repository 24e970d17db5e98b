// What an x86-64 processor has, and which of its registers the system saves. The instructions are asked themselves:
// __builtin_cpu_supports lacks some bits with every compiler, and says no to everything where the compiler's runtime
// library does not fill its table in, as in what zig links.
#pragma once

#include <cpuid.h>

#include <cstdint>

namespace easydel_ragged {

enum CpuidRegister { kEax, kEbx, kEcx, kEdx };

inline bool cpuid_bit(unsigned leaf, unsigned subleaf, CpuidRegister reg, int bit) {
  unsigned r[4] = {0, 0, 0, 0};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) != 0 && (r[reg] >> bit & 1u) != 0;
}

// Bits of XCR0: registers that the system saves when it switches threads. Others must not be used.
constexpr uint64_t kSavesVectors = 0x6;       // of AVX
constexpr uint64_t kSavesWideVectors = 0xe0;  // of AVX-512, beside those
constexpr uint64_t kSavesTiles = 0x60000;     // of AMX

inline bool system_saves(uint64_t registers) {
#if defined(__APPLE__)
  registers &= ~kSavesWideVectors;  // macOS sets these bits when a thread first uses the registers
#endif
  if (!cpuid_bit(1, 0, kEcx, 27)) return false;  // the system has not enabled what is asked for next
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t(high) << 32 | low) & registers) == registers;
}

inline bool made_by_amd() {
  unsigned most = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &most, &b, &c, &d) != 0 && b == 0x68747541u && d == 0x69746e65u && c == 0x444d4163u;
}

}  // namespace easydel_ragged
