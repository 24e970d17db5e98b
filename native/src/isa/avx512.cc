// The subsets of AVX-512 that Intel has since Skylake's servers (2017) and AMD since Zen 4 (2022).
#include <initializer_list>

#include "isa/cpuid.h"

namespace easydel_ragged::avx2 {
bool available();
}
namespace easydel_ragged::avx512 {

bool available() {
  constexpr int kF = 16, kDQ = 17, kBW = 30, kVL = 31;
  for (int subset : {kF, kDQ, kBW, kVL})
    if (!cpuid_bit(7, 0, kEbx, subset)) return false;
  return avx2::available() && system_saves(kSavesWideVectors);
}
bool preferred() { return true; }

}  // namespace easydel_ragged::avx512
