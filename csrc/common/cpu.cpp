// What the CPU library does once, when it is loaded.
#include <cstddef>
#include <cstdlib>

namespace {

#if defined(__GLIBC__)
// glibc gives freed memory back to the system when the end of the heap has more of it than twice the largest block that
// was ever mapped for itself and freed. A block's temporaries are a few MB: they are given back, and faulted in page by
// page, in every call, until something larger has been freed once, which a small batch never does. Freeing the largest
// block that counts (32 MB on 64 bits) settles it: up to 64 MB stay in the process. No page of it is touched, and where
// the user has set a threshold (MALLOC_TRIM_THRESHOLD_, mallopt) glibc lets nothing change it.
const bool memory_is_kept = [] {
  constexpr size_t kLargest = 4 * 1024 * 1024 * sizeof(long), kHeader = 64 * 1024;
  void* volatile block = std::malloc(kLargest - kHeader);  // volatile: the compiler would leave both calls out
  std::free(block);
  return true;
}();
#endif

}  // namespace
