// AVX2 with FMA and F16C: Intel since Haswell (2013), AMD since Excavator (2015).
#include "isa/cpuid.h"

namespace easydel_ragged::avx2 {

bool available() {
  const bool fma = cpuid_bit(1, 0, kEcx, 12), f16c = cpuid_bit(1, 0, kEcx, 29), avx2 = cpuid_bit(7, 0, kEbx, 5);
  return fma && f16c && avx2 && system_saves(kSavesVectors);
}
bool preferred() { return true; }

}  // namespace easydel_ragged::avx2
