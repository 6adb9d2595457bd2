// launch() of common/machine.cuh against the CUDA runtime of runtime.cpp: how kernels come by their shared memory.
#include <cstdio>
#include <cstdlib>

#include "common/machine.cuh"
#include "runtime.h"

namespace {

constexpr size_t kKiB = 1024;

// Only their addresses count. Of a __global__ function nvcc would make calls of the runtime that change with its
// version.
void kernel(int) {}
void other_kernel(int) {}

void run(void (*function)(int), size_t shared_bytes) {
  convnext_kernels::launch("test", function, {dim3(1), dim3(32), shared_bytes, nullptr}, 1);
}

bool is_refused(void (*function)(int), size_t shared_bytes) {
  try {
    run(function, shared_bytes);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

}  // namespace

int main() {
  run(kernel, 0);
  run(kernel, 48 * kKiB);
  expect(runtime::launches == 2 && runtime::limits_raised == 0, "what is always allowed is not asked for");

  runtime::before_next = [] { run(kernel, 60 * kKiB); };
  expect(!is_refused(kernel, 90 * kKiB) && runtime::launches == 4, "another thread's smaller launch changes nothing");

  runtime::device = 1;
  runtime::before_next = [] { run(other_kernel, 50 * kKiB); };
  expect(!is_refused(kernel, 227 * kKiB) && runtime::launches == 6, "each kernel has its own limit on each device");

  runtime::device = 0;
  expect(is_refused(kernel, 100 * kKiB) && runtime::launches == 6, "more than a device has is refused");
  std::puts("ok");
}
