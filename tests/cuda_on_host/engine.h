// Executes CUDA kernels on the CPU, for tests: every CUDA thread of a block is a fiber, and a schedule decides which of
// them runs on. What a GPU would leave undefined is an error here: divergent barriers, deadlocks, shuffles from lanes
// outside the mask, misaligned or misplaced asynchronous copies. Shared memory holds NaN before each block, and so does
// the destination of an asynchronous copy until it has been waited for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <string>

namespace emu {

struct Site {
  const char* file;
  int line;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Size3 {
  unsigned x, y, z;
};

// The order of threads in a block and of blocks in the grid.
enum class Order { kForward, kReverse, kRandom };

// Where inside its error bound an approximate instruction's result lies.
enum class Approximation { kExact, kLow, kHigh, kMixed };

struct Config {
  Order order = Order::kForward;
  uint64_t seed = 1;
  // Greedy: each warp runs to its block barrier before the next warp starts. Otherwise all threads step in turn. A
  // missing barrier before a buffer is refilled shows in this schedule only.
  bool greedy = false;
  Approximation approximation = Approximation::kExact;
  size_t stack_bytes = 128 * 1024;
  size_t most_shared_bytes = 99 * 1024;  // what every architecture from sm_80 on gives a block
};
Config& config();

// --- launch: `function(context)` once in each thread. Errors name the operator `op`.
void run(const char* op, Size3 grid, Size3 block, size_t shared_bytes, void (*function)(void*), void* context);

// How often each operator has launched a kernel.
const std::map<std::string, size_t>& launches();

// Ends the launch with an Error that names block, thread and site.
[[noreturn]] void fail(const std::string& message);

// --- barriers of a block
enum class Vote { kNone, kCount, kAll, kAny };
void block_barrier(Site site);
int block_barrier(int value, Vote vote, Site site);

// --- operations of a warp: each lane fills its slot and calls; when the last lane of the mask has come, `function`
// runs once for all of them. Lanes that are not in the mask or have exited are null in its array of 32. Only what
// orders memory lets lanes see what others wrote: on a GPU __syncwarp does, and shuffles, votes, ldmatrix and mma do
// not.
constexpr size_t kSlotBytes = 64;
struct LaneSlot {
  unsigned char value[kSlotBytes], result[kSlotBytes];
  int number;
};
using WarpFunction = void (*)(LaneSlot* const* lane, unsigned mask, const void* context);
LaneSlot& lane_slot();
int lane_id();
void warp_operation(unsigned mask, WarpFunction function, const void* context, Site site, bool orders_memory = false);

// --- dynamic shared memory: the ordinal'th piece of this block, a heap block of its own with guarded ends
void* shared_piece(int ordinal, size_t bytes);

// --- cp.async: bytes land when they are waited for
void copy_async(void* shared, const void* global, unsigned bytes, unsigned valid_bytes, Site site);
void copy_async_commit();
void copy_async_wait(int pending);

// `exact` off by up to the relative error `bound`, as config().approximation says.
float approximate(double exact, double bound);

// --- memory that tests hand to kernels: NaN at first, of exact size, known to the race hooks by name
void register_buffer(const void* data, size_t bytes, size_t granule, const char* name);
void unregister_buffer(const void* data);
void note_atomic(const void* data, size_t bytes, const void* caller);
void note_access(const void* data, size_t bytes, bool write, const void* caller);

#ifdef EMU_RACE_HOOKS
constexpr size_t kPadding = 256;  // owned bytes before and after, where the race hooks report an access out of bounds
#else
constexpr size_t kPadding = 0;  // AddressSanitizer has red zones of its own
#endif

template <class T>
class Buffer {
 public:
  Buffer(size_t count, const char* name) : count_(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, (count ? count * sizeof(T) : 1) + 2 * kPadding)) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>(static_cast<char*>(memory) + kPadding);
    std::memset(static_cast<void*>(data_), 0xFF, count * sizeof(T));
    register_buffer(data_, count * sizeof(T), sizeof(T) < 4 ? sizeof(T) : 4, name);
  }
  ~Buffer() {
    unregister_buffer(data_);
    std::free(reinterpret_cast<char*>(data_) - kPadding);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
  size_t count_;
};

}  // namespace emu
