// Unit tests of what surrounds the kernels: rows, plan and job.
#include "unit.h"

std::atomic<int> unit_failures{0};

std::vector<UnitTest>& unit_tests() {
  static std::vector<UnitTest> all;
  return all;
}

int main() {
  for (const UnitTest& test : unit_tests()) {
    const int before = unit_failures;
    test.run();
    std::printf("%-60s %s\n", test.name, unit_failures == before ? "ok" : "FAILED");
  }
  std::printf("%zu tests, %d failures\n", unit_tests().size(), unit_failures.load());
  return unit_failures == 0 && !unit_tests().empty() ? 0 : 1;
}
