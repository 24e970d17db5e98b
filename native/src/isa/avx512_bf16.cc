// AVX-512 with products of bfloat16: Intel since Cooper Lake (2020), AMD since Zen 4 (2022).
#include "isa/cpuid.h"

namespace easydel_ragged::avx512 {
bool available();
}
namespace easydel_ragged::avx512_bf16 {

bool available() { return avx512::available() && cpuid_bit(7, 1, kEax, 5); }
// AMD's vdpbf16ps has twice the rate of its float products; Intel's has less than the float products.
bool preferred() { return made_by_amd(); }

}  // namespace easydel_ragged::avx512_bf16
