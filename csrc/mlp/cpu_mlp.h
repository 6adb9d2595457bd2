// What layer_norm_mlp and its backward share on the CPU: checked arguments, parameters in the types they are read in,
// and the chunks that rows are taken through the matrix products in.
#pragma once
#include "common/cpu_operator.h"
#include "layer_norm/cpu_table.h"
#include "mlp/arguments.h"
#include "mlp/cpu_gemm.h"
#include "mlp/cpu_grn.h"
#include "mlp/cpu_rows.h"
#include "mlp/cpu_table.h"
#include "mlp/plan.h"

namespace convnext_kernels {

struct Chunk {
  int64_t first, rows;
  RowGroups groups;  // of rows 0 to `rows`
};

// Neighbouring rows of one sample and one group.
struct Run {
  int64_t group;
  bool first;        // of its group
  int64_t row;       // of its chunk
  int64_t position;  // in the tensors
  int64_t rows;
  double scale;  // the sample's
};

class Mlp : public MlpArguments {
 public:
  // The parameters become dense: those that matrix products take in z's type, the others in the accumulation type.
  Mlp(const char* op, const Tensor& z, const MlpParameters& given)
      : MlpArguments(op, check_on_cpu, z, given),
        parameters(prepared(given)),
        products(z, type),
        live(parameters.sample_scale, samples, rows_per_sample),
        norm_weight(parameters.norm_weight),
        norm_bias(parameters.norm_bias),
        grn_weight(parameters.grn_weight),
        grn_bias(parameters.grn_bias),
        fc2_bias(parameters.fc2_bias),
        layer_scale(parameters.layer_scale) {}

  // row_bytes: workspace per row.
  std::vector<Chunk> chunks(int64_t row_bytes) const {
    std::vector<Chunk> result;
    const int64_t unit = grn_weight ? rows_per_sample : 1, rows = live.count();
    if (rows == 0) return result;
    const int64_t hidden_bytes = hidden * static_cast<int64_t>(parameters.fc1_weight.element_size());
    const int64_t chunk_rows = mlp_chunk_rows(rows, unit, hidden_bytes, row_bytes);
    for (int64_t first = 0; first < rows; first += chunk_rows) {
      const int64_t count = std::min(chunk_rows, rows - first);
      result.push_back({first, count, row_groups(count, grn_weight ? rows_per_sample : count)});
    }
    return result;
  }

  // Calls f(run) in parallel over the chunk's groups.
  template <class F>
  void for_each_run(const Chunk& chunk, const F& f) const {
    for_each_group(chunk.groups, [&](int64_t group, int64_t begin, int64_t end) {
      live.for_each_run(chunk.first + begin, chunk.first + end,
                        [&](int64_t row, int64_t position, int64_t rows, double scale) {
                          const int64_t chunk_row = row - chunk.first;
                          f(Run{group, chunk_row == begin, chunk_row, position, rows, scale});
                        });
    });
  }

  // A chunk's images, of which GRN needs the norms; 0 without it.
  int64_t images(const Chunk& chunk) const { return grn_weight ? chunk.rows / rows_per_sample : 0; }

  // With GRN, calls f(image in the chunk, first of its groups, GRN's weight) in parallel.
  template <class F>
  void for_each_image(const Chunk& chunk, const F& f) const {
    torch::stable::parallel_for(0, images(chunk), 1, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        const int64_t group = image * chunk.groups.groups_per_block;
        if (accumulation == ScalarType::Double) {
          f(image, group, static_cast<const double*>(grn_weight.at(0)));
        } else {
          f(image, group, static_cast<const float*>(grn_weight.at(0)));
        }
      }
    });
  }

  const MlpParameters parameters;
  const MatrixProducts products;
  const LiveRows live;
  const Elements norm_weight, norm_bias, grn_weight, grn_bias, fc2_bias, layer_scale;

 private:
  MlpParameters prepared(const MlpParameters& given) const {
    return {parameter_as(given.norm_weight, accumulation), parameter_as(given.norm_bias, accumulation),
            parameter_as(given.fc1_weight, type),          parameter_as(given.fc1_bias, type),
            parameter_as(given.grn_weight, accumulation),  parameter_as(given.grn_bias, accumulation),
            parameter_as(given.fc2_weight, type),          parameter_as(given.fc2_bias, accumulation),
            parameter_as(given.layer_scale, accumulation), given.sample_scale};
  }
};

inline int64_t most_groups(const std::vector<Chunk>& chunks) {
  int64_t most = 0;
  for (const Chunk& chunk : chunks) most = std::max(most, chunk.groups.count);
  return most;
}

}  // namespace convnext_kernels
