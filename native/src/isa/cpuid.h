// Questions to an x86-64 processor that __builtin_cpu_supports does not answer with every compiler.
#pragma once

#include <cpuid.h>

namespace easydel_ragged {

enum CpuidRegister { kEax, kEbx, kEcx, kEdx };

inline bool cpuid_bit(unsigned leaf, unsigned subleaf, CpuidRegister reg, int bit) {
  unsigned r[4] = {0, 0, 0, 0};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) != 0 && (r[reg] >> bit & 1u) != 0;
}

inline bool made_by_amd() {
  unsigned most = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &most, &b, &c, &d) != 0 && b == 0x68747541u && d == 0x69746e65u && c == 0x444d4163u;
}

}  // namespace easydel_ragged
