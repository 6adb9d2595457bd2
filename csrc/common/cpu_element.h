// Element types at run time, as a table of CPU kernels takes them. Plain: included by kernels and by cpu.cpp alike.
#pragma once

#ifndef CONVNEXT_KERNELS_X86  // whether there are builds of the kernels for avx2 and beyond
#if defined(__x86_64__)
#define CONVNEXT_KERNELS_X86 1
#else
#define CONVNEXT_KERNELS_X86 0
#endif
#endif

namespace convnext_kernels {

// Everything is computed in float, only kFloat64 in double.
enum class Element { kFloat32, kFloat64, kFloat16, kBFloat16 };

}  // namespace convnext_kernels
