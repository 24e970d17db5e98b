// What every machine of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define RAGGED_ISA baseline
#if defined(__aarch64__)
#define RAGGED_ISA_NAME "neon"
#else
#define RAGGED_ISA_NAME "baseline"
#endif
#include "kernels.h"
