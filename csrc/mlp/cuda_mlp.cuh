// What layer_norm_mlp and its backward share on CUDA: checked arguments, parameters as they are read, chunks of rows.
//
// All rows go through the matrix products, those of dropped samples too: which samples are dropped is known on the
// device only. The passes around them neither read nor count such rows, by selection, and write zeros.
#pragma once
#include "common/cuda_context.h"
#include "common/cuda_gemm.h"
#include "layer_norm/layer_norm.cuh"
#include "mlp/arguments.h"
#include "mlp/chunk_plan.h"
#include "mlp/passes.cuh"

namespace convnext_kernels {

inline Gelu gelu_of(const char* op, const std::string& approximate) {
  return is_tanh(op, approximate) ? Gelu::kTanh : Gelu::kErf;
}

template <class T>
T* data_of(const Tensor& tensor, int64_t first = 0) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr()) + first;
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr()) + first;
  }
}
template <class T>
T* data_of(const OptionalTensor& tensor, int64_t first = 0) {
  return tensor ? data_of<T>(*tensor, first) : nullptr;
}

// Elements of any type, from number `first` on.
inline Parameter parameter_from(const OptionalTensor& tensor, int64_t first) {
  Parameter parameter = as_parameter(tensor);
  if (tensor)
    parameter.data = static_cast<const char*>(parameter.data) + first * static_cast<int64_t>(tensor->element_size());
  return parameter;
}

struct CudaChunk {
  int64_t first, rows;
};

class CudaMlp : public MlpArguments {
 public:
  // The parameters become dense; those of the matrix products in z's type.
  CudaMlp(const char* op, const Tensor& z, const MlpParameters& given, const std::string& approximate,
          int64_t workspace_bytes)
      : MlpArguments(op, check_cuda, z, given),
        parameters(prepared(given)),
        has_grn(parameters.grn_weight.has_value()),
        gelu(gelu_of(op, approximate)),
        element_bytes(z.element_size()),
        sum_bytes(static_cast<int64_t>(type == ScalarType::Double ? sizeof(double) : sizeof(float))),
        most_bytes(workspace_bytes),
        context(z) {
    if (has_grn && rows_per_sample > kMostChunkRows)
      fail(op, "z", "at most 2^30 rows a sample, which GRN takes at once", std::to_string(rows_per_sample));
  }

  std::vector<CudaChunk> chunks(const MlpWorkspace& workspace) const {
    std::vector<CudaChunk> result;
    if (rows() == 0) return result;
    const int64_t chunk_rows =
        mlp_cuda_chunk_rows(rows(), has_grn ? rows_per_sample : 1, workspace, most_bytes, kMostChunkRows);
    for (int64_t first = 0; first < rows(); first += chunk_rows)
      result.push_back({first, std::min(chunk_rows, rows() - first)});
    return result;
  }

  // A chunk's images with GRN; without it, one group of all its rows.
  int64_t groups(const CudaChunk& chunk) const { return has_grn ? chunk.rows / rows_per_sample : 1; }

  template <class T>
  SampleRows<Accumulation<T>> samples_of(const CudaChunk& chunk) const {
    return sample_rows(data_of<const Accumulation<T>>(parameters.sample_scale), chunk.first, rows_per_sample);
  }
  GroupedRows hidden_rows(const CudaChunk& chunk) const { return {groups(chunk), chunk.rows / groups(chunk), hidden}; }

  // LayerNorm of a chunk's rows of z into `normalised`: statistics of all rows.
  template <class T>
  LayerNormParams<T, T> norm_rows(const CudaChunk& chunk, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                  const Tensor& normalised) const {
    LayerNormParams<T, T> params;
    params.x = data_of<const T>(z, chunk.first * channels);
    params.weight = as_parameter(parameters.norm_weight);
    params.bias = as_parameter(parameters.norm_bias);
    params.sample_scale = data_of<const Accumulation<T>>(parameters.sample_scale);
    params.first_row = chunk.first;
    params.rows_per_sample = rows_per_sample;
    params.y = data_of<T>(normalised);
    params.mean = data_of<Accumulation<T>>(mean, chunk.first);
    params.rstd = data_of<Accumulation<T>>(rstd, chunk.first);
    params.rows = chunk.rows;
    params.channels = channels;
    return params;
  }

  // `pass` over a chunk's hidden rows. `aligned`: all its tensors begin at multiples of 16 bytes.
  RowPassPlan plan_hidden(RowPass pass, const CudaChunk& chunk, bool aligned) const {
    const GroupedRows shape = hidden_rows(chunk);
    return plan_row_pass(row_pass_tuning(pass, has_grn, element_bytes), shape.groups, shape.group_rows, hidden,
                         row_pass_vector_size(hidden, element_bytes, aligned), context.chip().multiprocessors);
  }
  // `pass` over rows of channels; `vectors`: there is a kernel for these types, and all its tensors begin at multiples
  // of 16 bytes.
  RowPassPlan plan_channels(RowPass pass, bool heavy, int64_t chunk_rows, bool vectors) const {
    return plan_row_pass(row_pass_tuning(pass, heavy, element_bytes), 1, chunk_rows, channels,
                         row_pass_vector_size(channels, element_bytes, vectors), context.chip().multiprocessors);
  }

  // The most rows of partial sums that `pass` writes, whatever the chunk: those of GRN, beyond one an image.
  int64_t most_hidden_partials(RowPass pass) const {
    int64_t most = 0;
    for (bool aligned : {false, true}) {
      const RowPassPlan plan =
          plan_row_pass(row_pass_tuning(pass, has_grn, element_bytes), 1, kMostChunkRows, hidden,
                        row_pass_vector_size(hidden, element_bytes, aligned), context.chip().multiprocessors);
      most = std::max<int64_t>(most, plan.row_blocks);
    }
    return most;
  }

  Tensor workspace(int64_t rows, int64_t columns) const { return empty(checks.beside, {rows, columns}, type); }
  Tensor sums(int64_t rows, int64_t columns) const { return empty(checks.beside, {rows, columns}, accumulation); }

  const MlpParameters parameters;
  const bool has_grn;
  const Gelu gelu;
  const size_t element_bytes;
  const int64_t sum_bytes;  // of an element of the accumulation type
  const int64_t most_bytes;
  const CudaContext context;

 private:
  MlpParameters prepared(const MlpParameters& given) const {
    const auto dense = [](const OptionalTensor& tensor) {
      return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
    };
    return {dense(given.norm_weight),
            dense(given.norm_bias),
            parameter_as(given.fc1_weight, type),
            parameter_as(given.fc1_bias, type),
            dense(given.grn_weight),
            dense(given.grn_bias),
            parameter_as(given.fc2_weight, type),
            parameter_as(given.fc2_bias, type),
            dense(given.layer_scale),
            given.sample_scale};
  }
};

}  // namespace convnext_kernels
