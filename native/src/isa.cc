#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>

namespace easydel_ragged {

// CMake makes instruction_sets.inc: a line RAGGED_INSTRUCTION_SET(name) for each that is built, best first.
#define RAGGED_INSTRUCTION_SET(name) \
  namespace name {                   \
  extern const Routines kRoutines;   \
  bool available();                  \
  bool preferred();                  \
  }
#include "instruction_sets.inc"
#undef RAGGED_INSTRUCTION_SET

namespace {

struct Level {
  const Routines* routines;
  bool (*available)();  // whether this machine runs it
  bool (*preferred)();  // whether it is used where none is named
};

const Level kLevels[] = {
#define RAGGED_INSTRUCTION_SET(name) {&name::kRoutines, name::available, name::preferred},
#include "instruction_sets.inc"
#undef RAGGED_INSTRUCTION_SET
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
    now = find(nullptr);
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
  static const std::string names = [] {
    std::string all;
    for (const Level& level : kLevels)
      if (level.available()) all += (all.empty() ? "" : ",") + std::string(level.routines->name);
    return all;
  }();
  return names.c_str();
}

const char* isa_built() {
  static const char names[] =
#define RAGGED_INSTRUCTION_SET(name) "," #name
#include "instruction_sets.inc"
#undef RAGGED_INSTRUCTION_SET
      ;
  return names + 1;
}

}  // namespace easydel_ragged
