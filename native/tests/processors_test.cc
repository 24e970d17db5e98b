// Quotas of control groups, in folders that look like the system's; and where threads run.
#include "processors.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif

#include "unit.h"

namespace easydel_ragged {
namespace {

const char* const kVersion2 = "31 23 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
const char* const kVersion1 =
    "33 32 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 32 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 master:1 - cgroup cgroup rw,cpu,cpuacct\n";

using Files = std::initializer_list<std::pair<const char*, std::string>>;

// The quota where the system has these files.
double quota(Files files) {
  namespace fs = std::filesystem;
  static int count = 0;
  const fs::path root = fs::temp_directory_path() / ("ragged_unit_" + std::to_string(std::rand()) + "_" +
                                                     std::to_string(++count) + "_" + std::to_string(time(nullptr)));
  fs::create_directories(root);
  for (const auto& [name, text] : files) {
    const fs::path path = root / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  const double found = quota_in_processors(root.string());
  fs::remove_all(root);
  return found;
}

bool is_none(double quota) { return std::isinf(quota) && quota > 0; }

TEST(without_control_groups_there_is_no_quota) {
  CHECK(is_none(quota({})));
  CHECK(is_none(quota({{"proc/self/mountinfo", "broken\n - \n31 23\n"}, {"proc/self/cgroup", "x\n:\n"}})));
  CHECK(is_none(quota({{"proc/self/mountinfo", kVersion2}, {"proc/self/cgroup", "0::/\n"}})));
}

TEST(version_2_has_the_least_of_its_groups) {
  const auto of = [](const std::string& name, const std::string& whole, const std::string& outer,
                     const std::string& inner) {
    return quota({{"proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + std::string(kVersion2)},
                  {"proc/self/cgroup", "0::" + name + "\n"},
                  {"sys/fs/cgroup/cpu.max", whole},
                  {"sys/fs/cgroup/outer/cpu.max", outer},
                  {"sys/fs/cgroup/outer/inner/cpu.max", inner}});
  };
  CHECK(of("/", "150000 100000\n", "", "") == 1.5);  // in a container with a name space of its own
  CHECK(of("/outer/inner", "", "max 100000\n", "200000 100000\n") == 2.0);
  CHECK(of("/outer/inner", "", "50000 100000\n", "200000 100000\n") == 0.5);
  CHECK(of("/outer", "", "400000 100000\n", "200000 100000\n") == 4.0);
  CHECK(is_none(of("/outer/inner", "max 100000\n", "max 100000\n", "max 100000\n")));
  CHECK(is_none(of("/outer", "", "no number", "100000 100000\n")));
  CHECK(is_none(of("/outer", "", "100000 0\n", "")));
  CHECK(of("/elsewhere/inner", "300000 100000\n", "", "") == 3.0);  // a group without files of its own
  CHECK(of("/../sibling", "300000 100000\n", "", "") == 3.0);       // outside of what is mounted
}

TEST(version_1_has_a_time_and_a_period) {
  const auto of = [](const std::string& time, const std::string& period) {
    return quota({{"proc/self/mountinfo", kVersion1},
                  {"proc/self/cgroup", "5:memory:/other\n4:cpu,cpuacct:/group\n1:name=systemd:/\n"},
                  {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"},
                  {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"},
                  {"sys/fs/cgroup/cpu,cpuacct/group/cpu.cfs_quota_us", time},
                  {"sys/fs/cgroup/cpu,cpuacct/group/cpu.cfs_period_us", period},
                  {"sys/fs/cgroup/memory/other/cpu.cfs_quota_us", "1000\n"}});
  };
  CHECK(of("250000\n", "100000\n") == 2.5);
  CHECK(is_none(of("-1\n", "100000\n")));
  CHECK(is_none(of("", "")));
}

TEST(a_container_may_show_its_own_group_alone_and_name_it_from_outside) {
  const auto of = [](const std::string& mounted, const std::string& name) {
    return quota(
        {{"proc/self/mountinfo", "34 32 0:31 " + mounted + " /sys/fs/cgroup/cpu\\040here ro - cgroup cgroup rw,cpu\n"},
         {"proc/self/cgroup", "4:cpu:" + name + "\n"},
         {"sys/fs/cgroup/cpu here/cpu.cfs_quota_us", "300000\n"},
         {"sys/fs/cgroup/cpu here/cpu.cfs_period_us", "100000\n"},
         {"sys/fs/cgroup/cpu here/below/cpu.cfs_quota_us", "100000\n"},
         {"sys/fs/cgroup/cpu here/below/cpu.cfs_period_us", "100000\n"}});
  };
  CHECK(of("/docker/abc", "/docker/abc") == 3.0);
  CHECK(of("/docker/abc", "/docker/abc/below") == 1.0);
  CHECK(of("/docker/abc", "/docker/abcbelow") == 3.0);
  CHECK(of("/docker/abc", "/below") == 3.0);
  CHECK(of("/", "/below") == 1.0);
}

TEST(both_versions_at_once_count) {
  CHECK(quota({{"proc/self/mountinfo", std::string(kVersion1) + kVersion2},
               {"proc/self/cgroup", "4:cpu,cpuacct:/\n0::/\n"},
               {"sys/fs/cgroup/cpu.max", "700000 100000"},
               {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "500000"},
               {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000"}}) == 5.0);
}

TEST(a_process_has_at_least_one_processor) { CHECK(usable_processors() >= 1); }

#if defined(__linux__)
// What becomes of a thread that shares the processor `shared` with another of its job and may run on those of `all`.
int moved_from(int shared, const cpu_set_t& all) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(shared, &one);
  CHECK(sched_setaffinity(0, sizeof(one), &one) == 0);
  Places places(2);
  places.stay(0);
  CHECK(sched_setaffinity(0, sizeof(all), &all) == 0);
  places.move(1);
  const int now = sched_getcpu();
  cpu_set_t after;
  CHECK(sched_getaffinity(0, sizeof(after), &after) == 0 && CPU_EQUAL(&all, &after));
  return now;
}

TEST(a_thread_leaves_a_processor_that_its_job_has_already) {
  std::thread([] {
    cpu_set_t all;
    CHECK(sched_getaffinity(0, sizeof(all), &all) == 0);
    int shared = 0, moved = 0;
    while (!CPU_ISSET(shared, &all)) ++shared;
    for (int round = 0; round < 20; ++round) moved += moved_from(shared, all) != shared;  // the system may move it, too
    CHECK(CPU_COUNT(&all) > 1 ? moved >= 10 : moved == 0);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(shared, &one);
    CHECK(moved_from(shared, one) == shared);  // there is no other
  }).join();
}
#endif

}  // namespace
}  // namespace easydel_ragged
