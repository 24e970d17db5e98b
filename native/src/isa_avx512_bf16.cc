#define RAGGED_ISA avx512_bf16
#define RAGGED_ISA_NAME "avx512_bf16"
#include "kernels.h"
