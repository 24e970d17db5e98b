// Choice of the instruction set: the best one that this machine has, or a lower one that is asked for.
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "routines.h"

namespace easydel_ragged {

#define RAGGED_DECLARE(isa)        \
  namespace isa {                  \
  extern const Routines kRoutines; \
  }
RAGGED_DECLARE(baseline)
RAGGED_DECLARE(avx2)
RAGGED_DECLARE(avx512)
RAGGED_DECLARE(avx512_bf16)
RAGGED_DECLARE(amx_bf16)

namespace {

struct Level {
  const Routines* routines;
  bool (*available)();
  bool (*preferred)();  // false: runs here, but only where it is asked for
};

#if defined(__x86_64__)
// What __builtin_cpu_supports does not know in every compiler.
bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {0, 0, 0, 0};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) != 0 && (r[reg] >> bit & 1u) != 0;
}
[[maybe_unused]] bool made_by_amd() {
  unsigned most = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &most, &b, &c, &d) != 0 && b == 0x68747541u && d == 0x69746e65u && c == 0x444d4163u;
}
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_bit(1, 0, 2, 29);  // F16C
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && cpuid_bit(7, 1, 0, 5); }
// Linux gives a process the tile registers when it asks.
[[maybe_unused]] bool has_amx_bf16() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = has_avx512_bf16() && cpuid_bit(7, 0, 3, 22) && cpuid_bit(7, 0, 3, 24) &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif
bool always() { return true; }

// Best first. The build says which there are.
const Level kLevels[] = {
#if defined(RAGGED_HAS_amx_bf16)
    {&amx_bf16::kRoutines, has_amx_bf16, always},
#endif
#if defined(RAGGED_HAS_avx512_bf16)
    // AMD's vdpbf16ps has twice the rate of its float products; Intel's has less than the float products.
    {&avx512_bf16::kRoutines, has_avx512_bf16, made_by_amd},
#endif
#if defined(RAGGED_HAS_avx512)
    {&avx512::kRoutines, has_avx512, always},
#endif
#if defined(RAGGED_HAS_avx2)
    {&avx2::kRoutines, has_avx2, always},
#endif
    {&baseline::kRoutines, always, always},
};

std::atomic<const Routines*> chosen{nullptr};

const Routines* find(const char* name) {
  for (const Level& level : kLevels)
    if (level.available() && (name == nullptr ? level.preferred() : std::strcmp(name, level.routines->name) == 0))
      return level.routines;
  return nullptr;
}

}  // namespace

const Routines& routines() {
  const Routines* now = chosen.load(std::memory_order_acquire);
  if (now == nullptr) {
    const char* wanted = std::getenv("EASYDEL_RAGGED_ISA");
    now = wanted != nullptr && *wanted != '\0' ? find(wanted) : nullptr;
    if (now == nullptr) now = find(nullptr);
    chosen.store(now, std::memory_order_release);
  }
  return *now;
}

const char* isa_name() { return routines().name; }

bool set_isa(const char* name) {
  const Routines* found = name != nullptr ? find(name) : nullptr;
  if (name != nullptr && found == nullptr) return false;
  chosen.store(found, std::memory_order_release);
  return true;
}

const char* isa_levels() {
  static const char* const names = [] {
    static char text[128];
    for (const Level& level : kLevels) {
      if (!level.available()) continue;
      if (text[0] != '\0') std::strcat(text, ",");
      std::strcat(text, level.routines->name);
    }
    return static_cast<const char*>(text);
  }();
  return names;
}

}  // namespace easydel_ragged
