// The constant of global response normalisation (ConvNeXt V2, arXiv:2301.00808, section 3.2).
#pragma once

namespace convnext_kernels {

constexpr double kGrnEps = 1e-6;

}  // namespace convnext_kernels
