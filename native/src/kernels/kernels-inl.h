// The loops of one instruction set. CMake makes a unit for each from unit.cc.in; it defines RAGGED_ISA and
// RAGGED_ISA_NAME, includes this file, and is compiled with that set's options. No function of the standard library may
// be instantiated here, and everything lives in the unit's own namespace: the linker keeps one copy of a shared inline
// function, and it might be a wrong one.
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "routines.h"
#include "visible.h"

#if !defined(__clang__)  // GCC 11 compiles this, too: no builtin that came later
#pragma GCC poison __builtin_shufflevector __builtin_assoc_barrier __builtin_dynamic_object_size
#endif

namespace easydel_ragged {
namespace RAGGED_ISA {
namespace {

// Parts of this file, by subject, which are included nowhere else.
// clang-format off
#include "kernels/simd-inl.h"
#include "kernels/common-inl.h"
#include "kernels/update-inl.h"
#include "kernels/finish-inl.h"
#include "kernels/codes-inl.h"
#include "kernels/few_block-inl.h"
#include "kernels/few_products-inl.h"
#include "kernels/few_pairs-inl.h"
#include "kernels/few_lanes-inl.h"
#include "kernels/few_stage-inl.h"
#include "kernels/few-inl.h"
#include "kernels/many_products-inl.h"
#include "kernels/many_pack-inl.h"
#include "kernels/many_weights-inl.h"
#include "kernels/many-inl.h"
#include "kernels/rotate-inl.h"
// clang-format on

}  // namespace

extern const Routines kRoutines;
const Routines kRoutines = {RAGGED_ISA_NAME, write,        most_few,        few_scratch, attend_few,
                            most_many,       many_scratch, attend_many,     finish,      element_dtype,
                            rotate_scratch,  rotate,       restore_scratch, restore};

}  // namespace RAGGED_ISA
}  // namespace easydel_ragged
