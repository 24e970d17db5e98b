// libFuzzer target: sizes, options and every index array come from the input. Run with -max_total_time.
#include <cstdint>

#include "problems.h"
#include "run.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace easydel_ragged;
  Bytes bytes(data, size);
  Arrays arrays;
  const Problem problem = make_problem(bytes, arrays, false);
  if (check(problem) == nullptr) run(problem, Executor{});
  return 0;
}
