#include "processors.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>

#if defined(__linux__)
#include <sched.h>
#endif

namespace easydel_ragged {
namespace {

constexpr double kNoQuota = std::numeric_limits<double>::infinity();
constexpr int kUnknown = 1 << 20;

bool has(const std::string& names, const std::string& name) {  // among others, separated by commas
  return ("," + names + ",").find("," + name + ",") != std::string::npos;
}

// A hierarchy of groups as /proc/self/mountinfo describes it: where it is mounted, and which of its groups is there.
struct Mount {
  std::string group, folder;
};

std::string unescaped(const std::string& path) {  // of mountinfo: \040 is a blank
  std::string plain;
  for (size_t i = 0; i < path.size(); ++i) {
    if (path[i] == '\\' && i + 3 < path.size()) {
      plain += char((path[i + 1] - '0') * 64 + (path[i + 2] - '0') * 8 + (path[i + 3] - '0'));
      i += 3;
    } else {
      plain += path[i];
    }
  }
  return plain;
}

// That of version 2, or of version 1 with the controller `cpu`. The folder is empty where there is none.
Mount find_mount(const std::string& root, bool version_2) {
  std::ifstream lines(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(lines, line);) {
    // id parent device root mount-point options [optional fields] - type source super-options
    std::istringstream words(line);
    std::string skipped, group, folder, type, options;
    words >> skipped >> skipped >> skipped >> group >> folder;
    while (words >> skipped && skipped != "-") {
    }
    words >> type >> skipped >> options;
    if (version_2 ? type == "cgroup2" : type == "cgroup" && has(options, "cpu"))
      return {unescaped(group), unescaped(folder)};
  }
  return {};
}

// The name of this process' group: in a line `0::/name`, or `4:cpu,cpuacct:/name`.
std::string group_name(const std::string& root, bool version_2) {
  std::ifstream lines(root + "/proc/self/cgroup");
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (version_2 ? controllers.empty() : has(controllers, "cpu")) return line.substr(second + 1);
  }
  return "";
}

double ratio(double time, double period) { return time > 0 && period > 0 ? time / period : kNoQuota; }

double quota_of_folder(const std::string& folder, bool version_2) {
  double time = 0, period = 0;
  if (version_2) {
    std::ifstream file(folder + "/cpu.max");  // "150000 100000", or "max 100000", which is no number
    file >> time >> period;
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> time;  // -1: none
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return ratio(time, period);
}

double quota_of_hierarchy(const std::string& root, bool version_2) {
  const Mount mount = find_mount(root, version_2);
  if (mount.folder.empty()) return kNoQuota;
  std::string name = group_name(root, version_2);
  // In a container the mount may show the container's own group alone, while the name begins at the machine's. A name
  // from outside of what is mounted tells nothing.
  const std::string above = mount.group == "/" ? "" : mount.group;
  name = name.compare(0, above.size(), above) == 0 ? name.substr(above.size()) : "";
  if (name.find("/..") != std::string::npos || name.empty() || name[0] != '/') name = "";
  // A group has what its own quota and those above it leave.
  double least = kNoQuota;
  for (;; name.resize(name.rfind('/'))) {
    if (name == "/") name = "";
    least = std::min(least, quota_of_folder(root + mount.folder + name, version_2));
    if (name.empty()) return least;
  }
}

}  // namespace

double quota_in_processors(const std::string& root) {
  return std::min(quota_of_hierarchy(root, true), quota_of_hierarchy(root, false));
}

int usable_processors() {
#if defined(__linux__)
  static const int quota = [](double processors) {  // rounded up
    if (processors >= kUnknown) return kUnknown;
    const int whole = int(processors);
    return std::max(1, whole + (processors > whole ? 1 : 0));
  }(quota_in_processors());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::min(quota, CPU_COUNT(&set));
  return quota;
#else
  return kUnknown;
#endif
}

bool Places::taken(int index, int processor) const {
  for (size_t i = 0; i < processor_.size(); ++i)
    if (int(i) != index && processor_[i].load(std::memory_order_relaxed) == processor) return true;
  return false;
}

#if defined(__linux__)
void Places::stay(int index) { processor_[size_t(index)].store(sched_getcpu(), std::memory_order_relaxed); }

void Places::move(int index) {
  stay(index);
  const int now = processor_[size_t(index)].load(std::memory_order_relaxed);
  cpu_set_t all, one;
  if (now < 0 || !taken(index, now) || sched_getaffinity(0, sizeof(all), &all) != 0) return;
  for (int other = 0; other < CPU_SETSIZE; ++other) {
    if (!CPU_ISSET(other, &all) || taken(index, other)) continue;
    processor_[size_t(index)].store(other, std::memory_order_relaxed);
    CPU_ZERO(&one);
    CPU_SET(other, &one);
    if (sched_setaffinity(0, sizeof(one), &one) == 0) sched_setaffinity(0, sizeof(all), &all);
    return;
  }
}
#else
void Places::stay(int) {}
void Places::move(int) {}
#endif

}  // namespace easydel_ragged
