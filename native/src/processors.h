// How many processors this process may use, and which of them the threads of a job take.
#pragma once

#include <atomic>
#include <string>
#include <vector>

namespace easydel_ragged {

// The quota of the control groups (cgroups) that this process is in, v1 and v2, as a number of processors: time per
// period, of the group or of one above it, whichever has least. Infinity where there is none. `root` stands before
// every path that is read.
double quota_in_processors(const std::string& root = "");

// What the scheduler gives this process: its affinity, and no more than the quota, rounded up. A very large number
// where the system does not say. The quota is read once, with the first call.
int usable_processors();

// Where the threads of a job run. Linux may wake a thread on the processor of the one that woke it, although another is
// idle, if most were busy of late; then both have half of one for longer than an attention call takes.
class Places {
 public:
  explicit Places(int threads) : processor_(size_t(threads)) {
    for (auto& each : processor_) each.store(kNowhere, std::memory_order_relaxed);
  }

  // Says where thread `index`, the calling one, runs.
  void stay(int index);
  // The same, and first moves it to a processor of its affinity where no other thread of the job is, should it share
  // one. It may run wherever it might before.
  void move(int index);

 private:
  static constexpr int kNowhere = -1;
  bool taken(int index, int processor) const;

  std::vector<std::atomic<int>> processor_;
};

}  // namespace easydel_ragged
