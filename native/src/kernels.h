// The loops of one instruction set. Each unit isa_*.cc defines RAGGED_ISA and RAGGED_ISA_NAME and includes this file, and
// is compiled with that set's flags. No function of the standard library may be instantiated here, and everything lives
// in the unit's own namespace: the linker keeps one copy of a shared inline function, and it might be a wrong one.
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "routines.h"

namespace easydel_ragged {
namespace RAGGED_ISA {
namespace {

// Parts of this file, by subject; none is included anywhere else.
#include "simd.h"
#include "common.h"
#include "update.h"
#include "decode.h"
#include "prefill_products.h"
#include "prefill.h"

}  // namespace

extern const Routines kRoutines;
const Routines kRoutines = {RAGGED_ISA_NAME, write, decode_scratch, decode, finish, prefill_chunk, prefill_scratch,
                            prefill};

}  // namespace RAGGED_ISA
}  // namespace easydel_ragged
