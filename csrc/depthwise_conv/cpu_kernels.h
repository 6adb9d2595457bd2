// What cpu.cpp hands to the kernels, and the table of kernels that each capability's build of cpu_kernels.cpp fills.
// Only plain structures: an inline function here would be compiled with every instruction set, and the linker keeps
// one.
#pragma once
#include <cstdint>

#include "common/cpu_element.h"

namespace convnext_kernels::depthwise_conv {

constexpr int kMaxKernelSize = 11;
// The most result pixels that any kernel keeps in registers; rows in scratch are this much longer than their tile.
constexpr int kMaxPixels = 14;

// A box of result pixels and channels; a block of channels is one vector of the accumulation type.
struct Tile {
  int64_t first_sample, samples;
  int64_t first_row, rows;
  int64_t first_column, columns;
  int64_t first_block, blocks;
};

// Along one axis, the results j * result_step + phase are sums over `taps` weights t of the sources
// j * source_step + first + t.
struct Phase {
  int64_t taps, first;
};

// A convolution or the gradient of its input: with stride 2 that gradient is, for each of the 2 x 2 parities of its
// position, a convolution of stride 1 with every other weight.
struct Correlation {
  Element source_type, result_type;
  const void* source;        // (N, source_height, source_width, channels)
  const void* residual;      // like result, added before the rounding; may be null
  void* result;              // (N, result_height, result_width, channels)
  const void* sample_scale;  // (N) in the accumulation type; may be null
  const void* weights;  // [block][row phase][column phase][row tap][column tap][lane], after each block [lane] biases
  int64_t channels;
  int64_t source_height, source_width;
  int64_t result_height, result_width;
  int64_t kernel_size;
  int64_t source_step, result_step;
  Phase phases[2];          // result_step of them, the same for rows and columns
  int64_t scratch_columns;  // pixels a row of scratch holds
};

// Sums over positions of grad * (x shifted by each weight's offset), and of grad.
struct WeightGradient {
  Element type;
  const void* grad;          // (N, result_height, result_width, channels)
  const void* x;             // (N, height, width, channels)
  const void* sample_scale;  // (N) in the accumulation type; may be null
  int64_t channels;
  int64_t height, width;
  int64_t result_height, result_width;
  int64_t kernel_size, stride;
  int64_t scratch_columns;
};

struct Kernels {
  int64_t vector_bytes;
  // Writes the tile of the result.
  void (*correlate)(const Correlation& correlation, const Tile& tile, void* scratch);
  // Adds the tile's sums to `sums`, [block][kernel_size^2 weights, then the bias][lane].
  void (*add_weight_gradient)(const WeightGradient& gradient, const Tile& tile, void* sums, void* scratch);
};

}  // namespace convnext_kernels::depthwise_conv

namespace convnext_kernels::portable {
extern const depthwise_conv::Kernels depthwise_conv_kernels;
}
#if CONVNEXT_KERNELS_X86
namespace convnext_kernels::avx2 {
extern const depthwise_conv::Kernels depthwise_conv_kernels;
}
namespace convnext_kernels::avx512 {
extern const depthwise_conv::Kernels depthwise_conv_kernels;
}
namespace convnext_kernels::avx512_bf16 {
extern const depthwise_conv::Kernels depthwise_conv_kernels;
}
#endif
