#define RAGGED_ISA amx_bf16
#define RAGGED_ISA_NAME "amx_bf16"
#include "kernels.h"
