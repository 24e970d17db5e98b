// AVX-512 with products of bfloat16 and lookups of bytes: AMD since Zen 4 (2022), Intel's servers since Sapphire Rapids
// (2023).
#include "isa/cpuid.h"

namespace easydel_ragged::avx512 {
bool available();
}
namespace easydel_ragged::avx512_bf16 {

bool available() { return avx512::available() && cpuid_bit(7, 1, kEax, 5) && cpuid_bit(7, 0, kEcx, 1); }
// AMD's vdpbf16ps has twice the rate of its float products; Intel's has less than the float products.
bool preferred() { return made_by_amd(); }

}  // namespace easydel_ragged::avx512_bf16
