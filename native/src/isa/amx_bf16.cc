// Tile registers with products of bfloat16: Intel's servers since Sapphire Rapids (2023).
#include "isa/cpuid.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace easydel_ragged::avx512_bf16 {
bool available();
}
namespace easydel_ragged::amx_bf16 {

bool available() {
#if defined(RAGGED_EMULATE_AMX)
  return avx512_bf16::available();
#elif defined(__linux__)
  // A process has to request the tile registers from Linux.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = avx512_bf16::available() && cpuid_bit(7, 0, kEdx, 22) && cpuid_bit(7, 0, kEdx, 24) &&
                              system_saves(kSavesTiles) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
bool preferred() { return true; }

}  // namespace easydel_ragged::amx_bf16
