// Choice of the instruction set: the best one that this machine runs well, or another that is named. No environment
// variable is read here: cpu_native.py reads it, and can refuse a name.
#pragma once

#include "routines.h"

namespace easydel_ragged {

// Of the instruction set in use.
const Routines& routines();

const char* isa_name();    // of the one in use
const char* isa_levels();  // all that the library and this machine have, best first, comma separated
const char* isa_built();   // all that the library has, whatever the machine: in the same way

// Uses another from the next call on; null for the best. False, and no change, if there is none of that name here.
bool set_isa(const char* name);

}  // namespace easydel_ragged
