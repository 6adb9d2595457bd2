// layer_norm_mlp on the CPU. Included by cpu.cpp alone.
#pragma once
#include <cstring>

#include "mlp/cpu_mlp.h"

namespace convnext_kernels {

inline std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp_forward(const Tensor& z,
                                                                         const OptionalTensor& residual,
                                                                         const MlpParameters& given, double eps,
                                                                         const std::string& approximate,
                                                                         ScalarType out_dtype, bool keep_hidden) {
  constexpr const char* kName = "layer_norm_mlp";
  const Mlp mlp(kName, z, given);
  const int64_t channels = mlp.channels, hidden_columns = mlp.hidden;
  const bool tanh = is_tanh(kName, approximate), has_grn = static_cast<bool>(mlp.grn_weight);
  mlp.check_forward(residual, out_dtype);

  const ScalarType y_type = accumulation_type(out_dtype) == mlp.accumulation ? out_dtype : mlp.accumulation;
  const bool some_dropped = !mlp.live.dropped_samples().empty();
  const auto allocate = some_dropped ? zeros : empty;
  const Tensor y = empty(z, shape_of(z), y_type);
  const Tensor mean = allocate(z, shape_without_last(z), mlp.accumulation);
  const Tensor rstd = allocate(z, shape_without_last(z), mlp.accumulation);
  const Tensor kept = keep_hidden ? allocate(z, shape_with_last(z, hidden_columns), mlp.type) : empty(z, {0}, mlp.type);

  const int64_t element_bytes = static_cast<int64_t>(z.element_size());
  const auto chunks = mlp.chunks((2 * channels + hidden_columns) * element_bytes);
  const int64_t chunk_rows = chunks.empty() ? 0 : chunks.front().rows,
                most_images = chunks.empty() ? 0 : mlp.images(chunks.front());
  const Tensor normalised_buffer = empty(z, {chunk_rows, channels}, mlp.type);
  const ColumnSums squares(z, has_grn, most_groups(chunks), hidden_columns, mlp.accumulation);
  const ColumnSums norms(z, has_grn, most_images, hidden_columns, mlp.accumulation);
  const ColumnSums factors(z, has_grn, most_images, hidden_columns, mlp.accumulation);

  const auto& kernels = mlp_kernels();
  const auto& norm_kernels = layer_norm_kernels();
  const Elements z_data(z), residual_data(residual), y_data(y), mean_data(mean), rstd_data(rstd), kept_data(kept);
  const Elements normalised_data(normalised_buffer);
  const Element type = z_data.type();
  const size_t hidden_row_bytes = static_cast<size_t>(hidden_columns * z.element_size());

  for (const Chunk& chunk : chunks) {
    mlp.for_each_run(chunk, [&](const Run& run) {
      norm_kernels.forward(type, type, run.rows, channels, eps, z_data.at(run.position * channels),
                           mlp.norm_weight.at(0), mlp.norm_bias.at(0), normalised_data.at(run.row * channels),
                           mean_data.at(run.position), rstd_data.at(run.position));
    });
    const Tensor normalised = rows_of(normalised_buffer, 0, chunk.rows);

    const MlpParameters& p = mlp.parameters;
    const bool with_gelu = mlp.products.onednn() && !keep_hidden;
    const Tensor activated = with_gelu ? mlp.products.linear_gelu(normalised, p.fc1_weight, p.fc1_bias, tanh)
                                       : mlp.products.linear(normalised, p.fc1_weight, p.fc1_bias);
    const Elements wide(activated);
    if (keep_hidden)
      mlp.for_each_run(chunk, [&](const Run& run) {
        std::memcpy(kept_data.at(run.position * hidden_columns), wide.at(run.row * hidden_columns),
                    static_cast<size_t>(run.rows) * hidden_row_bytes);
      });
    if (!with_gelu || has_grn)
      for_each_group(chunk.groups, [&](int64_t group, int64_t begin, int64_t end) {
        void* rows = wide.at(begin * hidden_columns);
        if (with_gelu) {
          kernels.squares(type, end - begin, hidden_columns, rows, squares.part(group, true));
        } else {
          kernels.gelu(type, tanh, end - begin, hidden_columns, rows, nullptr, rows, squares.part(group, true));
        }
      });
    if (has_grn) {
      mlp.for_each_image(chunk, [&](int64_t image, int64_t group, const auto* weight) {
        squares.sum(group, chunk.groups.groups_per_block, norms.part(image));
        grn_factors(hidden_columns, weight, norms.part(image), factors.part(image));
      });
      for_each_group(chunk.groups, [&](int64_t group, int64_t begin, int64_t end) {
        kernels.apply_grn(type, end - begin, hidden_columns, factors.part(group / chunk.groups.groups_per_block),
                          mlp.grn_bias.at(0), wide.at(begin * hidden_columns));
      });
    }
    const Tensor result = mlp.products.product(activated, transposed(p.fc2_weight));
    const Elements branch(result);
    mlp.for_each_run(chunk, [&](const Run& run) {
      kernels.add_branch(type, residual ? residual_data.type() : type, y_data.type(), run.rows, channels,
                         branch.at(run.row * channels), mlp.fc2_bias.at(0), residual_data.at(run.position * channels),
                         mlp.layer_scale.at(0), run.scale, y_data.at(run.position * channels));
    });
  }

  const auto& dropped = mlp.live.dropped_samples();
  torch::stable::parallel_for(0, static_cast<int64_t>(dropped.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = dropped[i] * mlp.rows_per_sample * channels;
      kernels.add_branch(type, residual ? residual_data.type() : type, y_data.type(), mlp.rows_per_sample, channels,
                         nullptr, nullptr, residual_data.at(start), nullptr, 1, y_data.at(start));
    }
  });
  return {y_type == out_dtype ? y : torch::stable::to(y, out_dtype), mean, rstd, kept};
}

}  // namespace convnext_kernels
