// Runs random problems at every instruction set that the machine has, on one thread and on several, and compares the
// results. Built with sanitizers it also shows that no run-time value leads outside the buffers.
//
//   ragged_harness [problems] [first seed] [instruction set | all]
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>

#include "problems.h"

namespace easydel_ragged {
namespace {

// A pool that starts tasks late, as a busy one does.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) workers_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  void spawn(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void serve() {
    for (int served = 0;; ++served) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return stopped_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      if (served % 7 == 3) std::this_thread::sleep_for(std::chrono::microseconds(300));
      task();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> workers_;
  bool stopped_ = false;
};

float element(const std::vector<uint8_t>& all, size_t i, DType dtype) {
  float result;
  uint32_t bits;
  if (dtype == DType::kF32) {
    std::memcpy(&bits, &all[i * 4], 4);
  } else {
    uint16_t half;
    std::memcpy(&half, &all[i * 2], 2);
    if (dtype == DType::kF16) {
      const int exponent = half >> 10 & 31, mantissa = half & 1023;
      const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                              : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                              : std::ldexp(float(mantissa + 1024), exponent - 25);
      return half & 0x8000 ? -magnitude : magnitude;
    }
    bits = uint32_t(half) << 16;
  }
  std::memcpy(&result, &bits, 4);
  return result;
}

int failures = 0;

void compare(uint32_t seed, const std::string& what, const Problem& p, const Arrays& wanted, const Arrays& got,
             double tolerance) {
  if (wanted.pages != got.pages) {
    std::printf("seed %u, %s: pages differ\n", seed, what.c_str());
    ++failures;
  }
  const size_t count = wanted.output.size() / bytes_of(p.query_dtype);
  for (size_t i = 0; i < count; ++i) {
    const float a = element(wanted.output, i, p.query_dtype), b = element(got.output, i, p.query_dtype);
    if (std::isnan(a) && std::isnan(b)) continue;
    if (a == b || std::fabs(a - b) <= tolerance * (1 + std::fabs(a))) continue;
    std::printf("seed %u, %s: element %zu is %g, wanted %g\n", seed, what.c_str(), i, b, a);
    ++failures;
    return;
  }
}

void run_one(uint32_t seed, Pool& pool, const std::vector<std::string>& levels, const std::string& reference) {
  const bool orderly = seed % 2 == 0;
  const auto attempt = [&](const std::string& level, int threads, Arrays& arrays) {
    std::vector<uint8_t> stream(600);
    uint32_t state = seed * 2654435761u + 12345u;
    for (uint8_t& byte : stream) {
      state = state * 1664525u + 1013904223u;
      byte = uint8_t(state >> 24);
    }
    Bytes bytes(stream.data(), stream.size());
    const Problem p = make_problem(bytes, arrays, orderly);
    if (const char* reason = check(p)) {
      std::printf("seed %u: %s\n", seed, reason);
      std::exit(1);
    }
    set_isa(level.c_str());
    Executor executor;
    executor.threads = threads;
    executor.spawn = [&pool](std::function<void()> task) { pool.spawn(std::move(task)); };
    run(p, executor);
    return p;
  };
  Arrays wanted;
  const Problem p = attempt(reference, 1, wanted);
  const bool small = p.query_dtype != DType::kF32;
  for (const std::string& level : levels) {
    Arrays alone, together, again;
    attempt(level, 1, alone);
    compare(seed, level, p, wanted, alone, small ? 3e-2 : 2e-4);
    // Rows that share a page may write one slot from several threads: malformed input, with no defined result.
    if (!orderly) continue;
    attempt(level, 4, together);
    compare(seed, level + " on 4 threads", p, wanted, together, small ? 3e-2 : 2e-4);
    attempt(level, 4, again);
    if (together.output != again.output || together.pages != again.pages) {
      std::printf("seed %u, %s: two runs on 4 threads differ\n", seed, level.c_str());
      ++failures;
    }
  }
}

}  // namespace
}  // namespace easydel_ragged

int main(int argc, char** argv) {
  using namespace easydel_ragged;
  const int problems = argc > 1 ? std::atoi(argv[1]) : 200;
  const uint32_t first = argc > 2 ? uint32_t(std::atoi(argv[2])) : 0;
  const std::string only = argc > 3 ? argv[3] : "all";
  std::vector<std::string> levels;
  std::stringstream names(isa_levels());
  for (std::string name; std::getline(names, name, ',');) levels.push_back(name);
  const std::string reference = only == "all" ? levels.back() : only;
  if (only != "all") levels = {only};
  Pool pool(3);
  for (int i = 0; i < problems; ++i) run_one(first + uint32_t(i), pool, levels, reference);
  std::printf("%d problems, %zu instruction sets, %d failures\n", problems, levels.size(), failures);
  return failures == 0 ? 0 : 1;
}
