// AVX2 with FMA and F16C: Intel since Haswell (2013), AMD since Excavator (2015).
#include "isa/cpuid.h"

namespace easydel_ragged::avx2 {

bool available() {
  const bool f16c = cpuid_bit(1, 0, kEcx, 29);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
}
bool preferred() { return true; }

}  // namespace easydel_ragged::avx2
