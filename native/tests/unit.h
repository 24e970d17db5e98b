// A unit test is a function, TEST(name) { ... }, of expectations: CHECK(condition). unit.cc runs all.
#pragma once

#include <atomic>
#include <cstdio>
#include <vector>

struct UnitTest {
  const char* name;
  void (*run)();
};
std::vector<UnitTest>& unit_tests();
extern std::atomic<int> unit_failures;

#define TEST(name)                                                                        \
  static void test_##name();                                                              \
  static const bool listed_##name = (unit_tests().push_back({#name, test_##name}), true); \
  static void test_##name()

// Names the condition and the place where it does not hold, and goes on. More than ten are only counted.
#define CHECK(condition)                                                         \
  do {                                                                           \
    if (!(condition) && ++unit_failures <= 10)                                   \
      std::printf("%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
  } while (false)
