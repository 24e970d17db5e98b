#define RAGGED_ISA avx512
#define RAGGED_ISA_NAME "avx512"
#include "kernels.h"
