#include "scratch.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace easydel_ragged {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kPageBytes = 4096;

struct Registry {
  std::mutex mutex;
  std::vector<Scratch*> all;
};
Registry& registry() {
  static Registry* of_process = new Registry;  // never destroyed: a thread may end after main
  return *of_process;
}

std::atomic<uint32_t> calls{0};

}  // namespace

Scratch::Scratch() {
  Registry& every = registry();
  std::lock_guard<std::mutex> lock(every.mutex);
  every.all.push_back(this);
}

Scratch::~Scratch() {
  {
    Registry& every = registry();
    std::lock_guard<std::mutex> lock(every.mutex);
    every.all.erase(std::find(every.all.begin(), every.all.end(), this));
  }
  ::operator delete(memory_, kAlignment);
}

void Scratch::acquire() {
  while (used_.exchange(true, std::memory_order_acquire)) std::this_thread::yield();
}

void Scratch::resize(size_t bytes) {
  ::operator delete(memory_, kAlignment);
  memory_ = nullptr;
  size_ = 0;
  if (bytes == 0) return;
  memory_ = static_cast<char*>(::operator new(bytes, kAlignment));
  size_ = bytes;
}

Scratch::Use::Use(Scratch& scratch, size_t bytes) : scratch_(scratch) {
  scratch.acquire();
  try {
    if (bytes > scratch.size_) scratch.resize((bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
  } catch (...) {
    scratch.release();
    throw;
  }
  scratch.most_ = std::max(scratch.most_, bytes);
}

void Scratch::end_period() {
  if (size_ >= kLeastFreed && most_ < size_ / 4) resize(0);
  most_ = 0;
}

void Scratch::end_call() {
  if (calls.fetch_add(1, std::memory_order_relaxed) % kPeriod != kPeriod - 1) return;
  Registry& every = registry();
  std::lock_guard<std::mutex> lock(every.mutex);
  for (Scratch* each : every.all) {
    if (each->used_.exchange(true, std::memory_order_acquire)) continue;  // at work: it is looked at next time
    each->end_period();
    each->release();
  }
}

size_t Scratch::kept_bytes() {
  Registry& every = registry();
  std::lock_guard<std::mutex> lock(every.mutex);
  size_t bytes = 0;
  for (Scratch* each : every.all) {
    each->acquire();
    bytes += each->size_;
    each->release();
  }
  return bytes;
}

}  // namespace easydel_ragged
