// How many processors this process may use.
#pragma once

#include <string>

namespace easydel_ragged {

// The quota of the control groups (cgroups) that this process is in, v1 and v2, as a number of processors: time per
// period, of the group or of one above it, whichever has least. Infinity where there is none. `root` stands before
// every path that is read.
double quota_in_processors(const std::string& root = "");

// What the scheduler gives this process: its affinity, and no more than the quota, rounded up. A very large number
// where the system does not say. The quota is read once, with the first call.
int usable_processors();

}  // namespace easydel_ragged
