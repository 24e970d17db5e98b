// Memory that a thread keeps from call to call: fresh memory costs a page fault for every 4 KiB of it.
//
// What is kept follows the calls. After every kPeriod calls of the process, memory is freed that no call of the period
// used, or of which none used more than a quarter; the next call that needs some gets as much as it needs. This holds
// for the memory of threads that do nothing any more, too.
#pragma once

#include <atomic>
#include <cstddef>

namespace easydel_ragged {

// Of one thread. What it keeps is freed when the thread ends.
class Scratch {
 public:
  static constexpr int kPeriod = 256;                     // calls
  static constexpr size_t kLeastFreed = size_t{1} << 16;  // bytes; less is kept

  Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // A part of a thread's memory in use: at least `bytes`, aligned to a cache line, holding anything. Throws
  // std::bad_alloc. One at a time, and only in the thread whose memory it is.
  class Use {
   public:
    Use(Scratch& scratch, size_t bytes);
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use() { scratch_.release(); }
    char* memory() const { return scratch_.memory_; }

   private:
    Scratch& scratch_;
  };

  static void end_call();      // of the whole library, on any thread
  static size_t kept_bytes();  // by all threads; waits for those that use theirs

 private:
  void acquire();  // waits for end_call, which may look at it from another thread
  void release() { used_.store(false, std::memory_order_release); }
  void resize(size_t bytes);
  void end_period();

  // The other fields belong to whoever has set this.
  std::atomic<bool> used_{false};
  char* memory_ = nullptr;
  size_t size_ = 0;
  size_t most_ = 0;  // bytes that a call of this period used
};

}  // namespace easydel_ragged
