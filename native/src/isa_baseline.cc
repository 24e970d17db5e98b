#define RAGGED_ISA baseline
#define RAGGED_ISA_NAME "baseline"
#include "kernels.h"
