#define RAGGED_ISA avx2
#define RAGGED_ISA_NAME "avx2"
#include "kernels.h"
