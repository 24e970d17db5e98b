// The subsets of AVX-512 that Intel has since Skylake's servers (2017) and AMD since Zen 4 (2022).

namespace easydel_ragged::avx2 {
bool available();
}
namespace easydel_ragged::avx512 {

bool available() {
  return avx2::available() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool preferred() { return true; }

}  // namespace easydel_ragged::avx512
