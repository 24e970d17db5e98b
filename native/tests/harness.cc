// Runs random problems at every instruction set that the machine has, on one thread and on several, and compares the
// results with one another and with the oracle. Built with sanitizers it also shows that no run-time value leads
// outside the buffers.
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

#include "isa.h"
#include "oracle.h"
#include "problems.h"
#include "run.h"

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

int failures = 0;

// Of floats, NaN included.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

bool is_close(double wanted, double got, double tolerance) {
  if (std::isnan(wanted) || std::isnan(got)) return std::isnan(wanted) && std::isnan(got);
  if (std::isinf(wanted) || std::isinf(got)) return wanted == got;
  return std::fabs(wanted - got) <= tolerance * (1 + std::fabs(wanted));
}

// Of results of size 1. Products and sums are float32 at every instruction set, so a logsumexp is as good whatever the
// dtype of the queries; outputs are rounded to it, and with bfloat16 so may weights be.
constexpr double kLseTolerance = 2e-5;
// What a query that sees an infinite value gives is not finite, and no more is said: the order of sums decides.
bool is_close_output(double wanted, double got, double tolerance) {
  return (!std::isfinite(wanted) && !std::isfinite(got)) || is_close(wanted, got, tolerance);
}

// Codes times norms may be rounded to bfloat16, and so may the queries of any dtype then.
double output_tolerance(const Problem& p) {
  const bool rounded = p.query_dtype != DType::kF32 || (p.cache_dtype == DType::kCodes && p.float_products == 0);
  return rounded ? 3e-2 : 2e-4;
}
double lse_tolerance(const Problem& p) {
  return p.cache_dtype == DType::kCodes && p.float_products == 0 ? 3e-2 : kLseTolerance;
}

void fail(uint32_t seed, const std::string& what, const char* array, int64_t i, double got, double wanted) {
  std::printf("seed %u, %s: %s[%lld] is %.9g, wanted %.9g\n", seed, what.c_str(), array, static_cast<long long>(i), got,
              wanted);
  ++failures;
}

// Compares two runs of one problem.
void compare(uint32_t seed, const std::string& what, const Problem& p, const Arrays& wanted, const Arrays& got) {
  if (wanted.pages != got.pages || !std::equal(wanted.codes, wanted.codes + Codes::kArrays, got.codes)) {
    std::printf("seed %u, %s: pages differ\n", seed, what.c_str());
    ++failures;
  }
  for (int64_t i = 0; i < p.num_tokens * p.num_q_heads * p.head_dim; ++i) {
    const double a = element(wanted.output.data(), i, p.query_dtype), b = element(got.output.data(), i, p.query_dtype);
    if (!is_close_output(a, b, output_tolerance(p))) return fail(seed, what, "output", i, b, a);
  }
  for (size_t i = 0; i < wanted.lse.size(); ++i)
    if (!is_close(wanted.lse[i], got.lse[i], lse_tolerance(p)))
      return fail(seed, what, "lse", int64_t(i), got.lse[i], wanted.lse[i]);
}

// Compares a run with what the call means: all tokens of no row, and of each row the first, middle and last token,
// where no other row claims them.
void compare_with_oracle(uint32_t seed, const std::string& level, const Problem& p, const Arrays& got) {
  const Claims claims(p);
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    const int64_t row = claims.row[size_t(token)];
    if (claims.count[size_t(token)] > 1) continue;
    if (row >= 0) {
      const int64_t begin = p.query_start_loc[row], end = p.query_start_loc[row + 1];
      if (token != begin && token != (begin + end) / 2 && token != end - 1) continue;
    }
    for (int64_t head = 0; head < p.num_q_heads; ++head) {
      const int64_t at = token * p.num_q_heads + head;
      const Answer wanted =
          row >= 0 ? attend(p, row, token, head) : Answer{std::vector<double>(size_t(p.head_dim), 0.0), -INFINITY};
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const double a = wanted.output[size_t(d)], b = element(got.output.data(), at * p.head_dim + d, p.query_dtype);
        if (!is_close_output(a, b, row >= 0 ? output_tolerance(p) : 0.0))
          return fail(seed, level + " and the oracle", "output", at * p.head_dim + d, b, a);
      }
      if (p.lse && !is_close(wanted.lse, p.lse[at], lse_tolerance(p)))
        return fail(seed, level + " and the oracle", "lse", at, p.lse[at], wanted.lse);
    }
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
  compare_with_oracle(seed, reference, p, wanted);
  for (const std::string& level : levels) {
    Arrays alone, together, again;
    attempt(level, 1, alone);
    compare(seed, level, p, wanted, alone);
    // Rows that share a page may write one slot from several threads: malformed input, with no defined result.
    if (!orderly) continue;
    attempt(level, 4, together);
    compare(seed, level + " on 4 threads", p, wanted, together);
    attempt(level, 4, again);
    if (together.output != again.output || together.pages != again.pages ||
        !std::equal(together.codes, together.codes + Codes::kArrays, again.codes) ||
        !same_bits(together.lse, again.lse)) {
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
