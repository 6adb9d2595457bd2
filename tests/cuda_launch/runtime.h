// What the CUDA runtime of runtime.cpp lets a test see and do.
#pragma once
#include <cstddef>

namespace runtime {

extern int device;             // the current one: 0 has 99 KiB of shared memory for a block, 1 has 227
extern int launches;           // that were accepted
extern int limits_raised;      // calls of cudaFuncSetAttribute
extern void (*before_next)();  // what another host thread does just before the next launch

}  // namespace runtime
