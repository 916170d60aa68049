// Just enough of a test framework: TEST registers a function, CHECK counts and reports.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

#define TEST(name)                                                                \
  static void name();                                                             \
  static const bool name##_registered = (tests().push_back({#name, name}), true); \
  static void name()

#define CHECK(condition)                                                 \
  do {                                                                   \
    if (!(condition)) {                                                  \
      ++failures();                                                      \
      std::printf("%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
    }                                                                    \
  } while (false)

// The statement must throw std::invalid_argument whose message contains `part`.
#define CHECK_REFUSED(statement, part)                                              \
  do {                                                                              \
    std::string message = "(nothing thrown)";                                       \
    try {                                                                           \
      statement;                                                                    \
    } catch (const std::invalid_argument& error) {                                  \
      message = error.what();                                                       \
    }                                                                               \
    if (message.find(part) == std::string::npos) {                                  \
      ++failures();                                                                 \
      std::printf("%s:%d: expected \"%s\", got \"%s\"\n", __FILE__, __LINE__, part, \
                  message.c_str());                                                 \
    }                                                                               \
  } while (false)

inline int run_tests() {
  int failed = 0;
  for (const Test& test : tests()) {
    const int before = failures();
    test.run();
    const bool bad = failures() != before;
    failed += bad;
    std::printf("%s %s\n", bad ? "FAIL" : "ok  ", test.name);
  }
  std::printf("%zu passed, %d failed\n", tests().size() - failed, failed);
  return failed == 0 ? 0 : 1;
}
