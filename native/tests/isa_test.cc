// What is found of the processor, against what the system says of it; and names of instruction sets.
#include "isa.h"

#include <fstream>
#include <sstream>
#include <string>
#include <utility>

#include "unit.h"

namespace easydel_ragged {
namespace {

bool lists(const std::string& names, char separator, const std::string& name) {
  std::stringstream rest(names);
  for (std::string each; std::getline(rest, each, separator);)
    if (each == name) return true;
  return false;
}

const char* const kBuilt[] = {
#define RAGGED_INSTRUCTION_SET(name) #name,
#include "instruction_sets.inc"
#undef RAGGED_INSTRUCTION_SET
};

#if defined(__linux__) && defined(__x86_64__)
TEST(the_instruction_sets_are_those_that_the_system_lists) {
  std::ifstream lines("/proc/cpuinfo");
  std::string flags;
  while (std::getline(lines, flags) && flags.rfind("flags", 0) != 0) {
  }
  if (flags.empty()) return;  // an emulator whose system is another machine's
  const std::pair<const char*, const char*> needed[] = {
      {"baseline", ""},
      {"avx2", "avx2 fma f16c"},
      {"avx512", "avx2 fma f16c avx512f avx512bw avx512dq avx512vl"},
      {"avx512_bf16", "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512vbmi"},
      {"amx_bf16", "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512vbmi amx_tile amx_bf16"},
  };
  for (const char* built : kBuilt) {
    bool known = false;
    for (const auto& [name, all] : needed) {
      if (std::string(name) != built) continue;
      known = true;
      bool wanted = true;
      std::stringstream words(all);
      for (std::string flag; words >> flag;) wanted = wanted && lists(flags, ' ', flag);
      CHECK(lists(isa_levels(), ',', name) == wanted);
    }
    CHECK(known);
  }
}
#endif

TEST(all_that_is_built_is_listed_best_first) {
  std::string all;
  for (const char* built : kBuilt) all += (all.empty() ? "" : ",") + std::string(built);
  CHECK(isa_built() == all);
}

TEST(a_name_is_taken_as_it_is_or_not_at_all) {
  CHECK(set_isa(nullptr));
  const std::string best = isa_name();
  CHECK(lists(isa_levels(), ',', best));
  for (const char* built : kBuilt) {
    const std::string name = built;
    CHECK(set_isa(built) == lists(isa_levels(), ',', name));
    const std::string chosen = isa_name();
    for (const std::string& wrong : {name + " ", " " + name, name + ",", std::string("none"), std::string()}) {
      CHECK(!set_isa(wrong.c_str()));
      CHECK(isa_name() == chosen);
    }
  }
  CHECK(set_isa(nullptr));
  CHECK(isa_name() == best);
}

}  // namespace
}  // namespace easydel_ragged
