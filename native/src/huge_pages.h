// Huge pages for caches. JAX's memory has pages of 4 KiB where Linux gives larger ones on request only, and decoding
// then waits for the translation of addresses. A cache is moved while it serves: a few MiB in a call, and a small share
// of the time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace easydel_ragged {

class HugePages {
 public:
  static constexpr size_t kPage = size_t{1} << 21;
  static constexpr size_t kLeastCache = 8 * kPage;     // smaller ones stay
  static constexpr size_t kStep = 4 * kPage;           // of one call
  static constexpr int kLeastCalls = 8;                // that find a cache at its place: a copy for one call stays
  static constexpr int64_t kPause = 20;                // after each step, in times of what it took
  static constexpr int kMostFailures = 16;             // steps in a row that fail; after them there are no more
  static constexpr size_t kMostCaches = 4096;          // whose places are remembered
  static constexpr int64_t kForgottenNs = 1000000000;  // without a call: another cache may have the place since

  struct System {
    bool (*collapse)(char* memory, size_t bytes);  // into huge pages, of which both are multiples; false: it can't
    int64_t (*now_ns)();
  };
  explicit HugePages(const System& system) : system_(system) {}

  // A call has found a cache here. Any thread may say so.
  void seen(void* cache, size_t bytes);
  // Moves all of a cache at once. Any thread may do so.
  void move(void* cache, size_t bytes);

 private:
  struct Cache {
    size_t bytes = 0;
    int calls = 0;
    int64_t called_ns = 0;
    size_t next = 0;  // bytes before it were moved, or could not be
  };
  Cache& known(void* cache, size_t bytes);
  bool step(void* cache, Cache& known);  // false: nothing is left to move

  const System system_;
  std::mutex mutex_;
  std::unordered_map<void*, Cache> caches_;
  int64_t next_step_ns_ = 0;
  int failures_ = 0;
};

// A call has found a cache here: nothing happens where this system does not collapse pages, or is not to.
void cache_seen(void* cache, size_t bytes);
// All of it is moved now, or nothing where cache_seen() does nothing.
void move_cache(void* cache, size_t bytes);
void use_huge_pages(bool use);  // at first they are used
// Whether they are, and this system collapses pages: Linux from 6.1 on, unless its transparent huge pages are off.
bool huge_pages_used();

}  // namespace easydel_ragged
