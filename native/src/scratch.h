// Memory that a thread keeps from call to call: fresh memory costs a page fault for every 4 KiB of it.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace easydel_ragged {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // At least so many bytes, aligned to a cache line, holding anything. Invalidates what was reserved before.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = 0;
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_ = static_cast<char*>(std::aligned_alloc(64, rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace easydel_ragged
