// Never compiled with -fsanitize=thread: its own accesses are not the kernel's (race_hooks.cpp).
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_on_host.h"
#include "race_hooks.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, its pointer to *save, and goes on where `to` was saved. Eight times
// faster than swapcontext, which makes a system call for the signal mask.
extern "C" void emu_switch_stack(void** save, void* to);
asm(R"(
.text
.globl emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack,.-emu_switch_stack
)");
#endif

namespace emu {
namespace {

constexpr size_t kGuardBytes = 4096;

// A point of execution to switch to.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

void switch_context(Context& from, Context& to) {
#if defined(__x86_64__)
  emu_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, valid_bytes;
};

enum class State { kReady, kAtBlockBarrier, kAtWarpOperation, kDone };

struct Fiber {
  Context context;
  char* stack = nullptr;  // with a guard page below
  size_t stack_bytes = 0;
  unsigned thread = 0;
  uint3 index{};
  State state = State::kDone;
  Site site{};
  // what it waits for
  unsigned mask = 0;
  WarpFunction function = nullptr;
  int value = 0;
  Vote vote = Vote::kNone;
  LaneSlot slot{};
  // its asynchronous copies: not yet committed, and the groups not yet waited for
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
};

struct SharedPiece {
  unsigned char* data;
  size_t bytes;
};

struct Engine {
  Config config;
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
  unsigned threads = 0;
  Fiber* current = nullptr;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void (*function)(void*) = nullptr;
  void* context = nullptr;
  std::vector<SharedPiece> shared;
  size_t shared_bytes = 0;
  bool failed = false;
  std::string message;
  int vote_result = 0;
  std::mt19937_64 random;
  std::map<std::string, size_t> launches;
};
Engine engine;

std::string text(Site site) {
  return std::string(site.file ? site.file : "?") + ":" + std::to_string(site.line);
}

std::string text(uint3 index) {
  return std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z);
}

// --- fibers

void leave(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber->context.fake_stack, engine.scheduler_stack, engine.scheduler_stack_bytes);
#endif
  switch_context(fiber->context, engine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->context.fake_stack, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
#endif
}

void enter(Fiber* fiber) {
  engine.current = fiber;
  threadIdx = fiber->index;
  race::set_thread(static_cast<int>(fiber->thread));
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&engine.scheduler.fake_stack, fiber->stack, fiber->stack_bytes);
#endif
  switch_context(engine.scheduler, fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(engine.scheduler.fake_stack, nullptr, nullptr);
#endif
  engine.current = nullptr;
  race::set_thread(-1);
}

void fiber_main() {
  Fiber* fiber = engine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
#endif
  for (;;) {  // once for every block of every launch: the stack never unwinds
    engine.function(engine.context);
    fiber->state = State::kDone;
    leave(fiber);
  }
}

std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack_bytes = engine.config.stack_bytes;
  void* memory = mmap(nullptr, fiber->stack_bytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  fiber->stack = static_cast<char*>(memory) + kGuardBytes;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber->stack + fiber->stack_bytes);
  *--top = nullptr;  // leaves the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->context.stack_pointer = top;
#else
  getcontext(&fiber->context.context);
  fiber->context.context.uc_stack.ss_sp = fiber->stack;
  fiber->context.context.uc_stack.ss_size = fiber->stack_bytes;
  fiber->context.context.uc_link = nullptr;
  makecontext(&fiber->context.context, fiber_main, 0);
#endif
  return fiber;
}

// After an error: stacks that were left in the middle cannot be used again.
void drop_fibers() {
  for (auto& fiber : engine.fibers) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
#endif
    munmap(fiber->stack - kGuardBytes, fiber->stack_bytes + kGuardBytes);
  }
  engine.fibers.clear();
}

void drop_shared() {
  race::drop_shared();
  for (const SharedPiece& piece : engine.shared) std::free(piece.data - kPadding);
  engine.shared.clear();
}

void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid_bytes);
  std::memset(static_cast<char*>(copy.to) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
  note_access(copy.to, copy.bytes, true, nullptr);
}

// --- scheduling

// Every thread of the block has come to a barrier or exited.
void release_barrier() {
  Fiber* first = nullptr;
  unsigned exited = 0, waiting = 0;
  int count = 0;
  for (unsigned i = 0; i < engine.threads; ++i) {
    Fiber* fiber = engine.fibers[i].get();
    if (fiber->state == State::kDone) {
      ++exited;
      continue;
    }
    if (!first) first = fiber;
    if (fiber->site.line != first->site.line || std::strcmp(fiber->site.file, first->site.file) != 0)
      throw Error("divergent barrier: thread " + text(first->index) + " at " + text(first->site) + ", thread " +
                  text(fiber->index) + " at " + text(fiber->site));
    ++waiting;
    count += fiber->value != 0;
  }
  if (exited)
    throw Error(std::to_string(exited) + " threads had exited when the others came to the barrier at " +
                text(first->site));
  if (first->vote == Vote::kCount) engine.vote_result = count;
  if (first->vote == Vote::kAll) engine.vote_result = count == static_cast<int>(waiting);
  if (first->vote == Vote::kAny) engine.vote_result = count != 0;
  race::join_block();
  for (unsigned i = 0; i < engine.threads; ++i) engine.fibers[i]->state = State::kReady;
}

[[noreturn]] void report_deadlock() {
  std::string message = "deadlock:";
  const Fiber* last = nullptr;
  for (unsigned i = 0; i < engine.threads; ++i) {
    const Fiber* fiber = engine.fibers[i].get();
    if (fiber->state == State::kDone) continue;
    if (!last || last->state != fiber->state || last->site.line != fiber->site.line)
      message += " thread " + text(fiber->index) +
                 (fiber->state == State::kAtBlockBarrier ? " in a block barrier at " : " in a warp operation at ") +
                 text(fiber->site) + ";";
    last = fiber;
  }
  throw Error(message);
}

bool step(unsigned thread) {
  if (engine.fibers[thread]->state != State::kReady) return false;
  enter(engine.fibers[thread].get());
  if (engine.failed) throw Error(engine.message);
  return true;
}

void run_block() {
  std::vector<unsigned> order(engine.threads);
  std::iota(order.begin(), order.end(), 0u);
  if (engine.config.order == Order::kReverse) std::reverse(order.begin(), order.end());
  for (unsigned i = 0; i < engine.threads; ++i) {
    Fiber* fiber = engine.fibers[i].get();
    fiber->state = State::kReady;
    fiber->site = {};
    fiber->open_copies.clear();
    fiber->copy_groups.clear();
  }
  for (;;) {
    if (engine.config.order == Order::kRandom) std::shuffle(order.begin(), order.end(), engine.random);
    bool moved = false;
    if (engine.config.greedy) {
      for (unsigned leader : order) {
        for (bool any = true; any;) {
          any = false;
          for (unsigned thread : order)
            if (thread / 32 == leader / 32) any |= step(thread);
          moved |= any;
        }
      }
    } else {
      for (unsigned thread : order) moved |= step(thread);
    }
    unsigned done = 0, at_barrier = 0;
    for (unsigned i = 0; i < engine.threads; ++i) {
      done += engine.fibers[i]->state == State::kDone;
      at_barrier += engine.fibers[i]->state == State::kAtBlockBarrier;
    }
    if (done == engine.threads) return;
    if (done + at_barrier == engine.threads) {
      release_barrier();
    } else if (!moved) {
      report_deadlock();
    }
  }
}

}  // namespace

Config& config() {
  return engine.config;
}
LaneSlot& lane_slot() {
  return engine.current->slot;
}
int lane_id() {
  return static_cast<int>(engine.current->thread % 32);
}

namespace {

void run_grid(Size3 grid, Size3 block, size_t shared_bytes, void (*function)(void*), void* context) {
  engine.threads = block.x * block.y * block.z;
  const auto text_of = [](Size3 size) { return text(uint3{size.x, size.y, size.z}); };
  if (!engine.threads || engine.threads > 1024 || block.z > 64)
    throw Error("launch: not a possible block: " + text_of(block));
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Error("launch: not a possible grid: " + text_of(grid));
  if (shared_bytes > engine.config.most_shared_bytes)
    throw Error("launch: too much dynamic shared memory: " + std::to_string(shared_bytes) + " bytes, and a block has " +
                std::to_string(engine.config.most_shared_bytes));
  engine.function = function;
  engine.context = context;
  engine.shared_bytes = shared_bytes;
  engine.failed = false;
  engine.random.seed(engine.config.seed);
  gridDim = dim3(grid.x, grid.y, grid.z);
  blockDim = dim3(block.x, block.y, block.z);
  while (engine.fibers.size() < engine.threads) engine.fibers.push_back(make_fiber());
  for (unsigned i = 0; i < engine.threads; ++i) {
    engine.fibers[i]->thread = i;
    engine.fibers[i]->index = uint3{i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  std::vector<uint32_t> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (engine.config.order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (engine.config.order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), engine.random);

  struct Cleanup {
    ~Cleanup() {
      engine.current = nullptr;
      drop_shared();
      race::end_launch();
    }
  } cleanup;
  race::begin_launch(engine.threads);
  try {
    for (uint32_t number : blocks) {
      blockIdx = uint3{number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
      drop_shared();
      race::begin_block(number);
      run_block();
    }
  } catch (...) {
    drop_fibers();
    throw;
  }
}

}  // namespace

const std::map<std::string, size_t>& launches() {
  return engine.launches;
}

void run(const char* op, Size3 grid, Size3 block, size_t shared_bytes, void (*function)(void*), void* context) {
  try {
    run_grid(grid, block, shared_bytes, function, context);
    ++engine.launches[op];
  } catch (const Error& error) {
    throw Error("convnext_kernels::" + std::string(op) + ": " + error.what());
  }
}

void fail(const std::string& message) {
  if (!engine.failed) {
    engine.failed = true;
    engine.message = message;
    if (const Fiber* fiber = engine.current)
      engine.message += " [block " + text(blockIdx) + " thread " + text(fiber->index) +
                        (fiber->site.file ? " at " + text(fiber->site) : "") + "]";
  }
  if (engine.current) leave(engine.current);  // the scheduler raises it, on its own stack
  throw Error(engine.message);
}

void block_barrier(Site site) {
  block_barrier(0, Vote::kNone, site);
}

int block_barrier(int value, Vote vote, Site site) {
  Fiber* fiber = engine.current;
  fiber->site = site;
  fiber->value = value;
  fiber->vote = vote;
  fiber->state = State::kAtBlockBarrier;
  leave(fiber);
  return engine.vote_result;
}

void warp_operation(unsigned mask, WarpFunction function, const void* context, Site site, bool orders_memory) {
  Fiber* fiber = engine.current;
  fiber->site = site;
  const unsigned first = fiber->thread / 32 * 32;
  if (!(mask >> (fiber->thread - first) & 1)) fail("the calling lane is not in its own mask");
  fiber->mask = mask;
  fiber->function = function;
  fiber->state = State::kAtWarpOperation;
  LaneSlot* lanes[32] = {};
  bool complete = true;
  for (unsigned i = 0; i < 32 && complete; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= engine.threads) fail("the mask names lane " + std::to_string(i) + ", beyond the end of the block");
    Fiber* other = engine.fibers[first + i].get();
    if (other->state == State::kDone) continue;
    if (other->state == State::kAtWarpOperation && (other->mask != mask || other->function != function))
      fail("lanes of one warp wait at different operations or masks (the other at " + text(other->site) + ")");
    complete = other->state == State::kAtWarpOperation;
    lanes[i] = &other->slot;
  }
  if (!complete) return leave(fiber);
  function(lanes, mask, context);
  if (orders_memory) race::join_warp(fiber->thread / 32, mask);
  for (unsigned i = 0; i < 32; ++i)
    if (lanes[i]) engine.fibers[first + i]->state = State::kReady;
}

void* shared_piece(int ordinal, size_t bytes) {
  const auto rounded = [](size_t n) { return (n + 127) / 128 * 128; };
  const auto index = static_cast<size_t>(ordinal);
  if (index > engine.shared.size()) fail("pieces of shared memory taken out of order");
  if (index == engine.shared.size()) {
    size_t sum = rounded(bytes);
    for (const SharedPiece& piece : engine.shared) sum += rounded(piece.bytes);
    if (sum > engine.shared_bytes)
      fail("the kernel takes " + std::to_string(sum) + " bytes of dynamic shared memory, the launch gave " +
           std::to_string(engine.shared_bytes));
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, (bytes ? bytes : 1) + 2 * kPadding)) throw std::bad_alloc();
    auto* data = static_cast<unsigned char*>(memory) + kPadding;
    std::memset(data, 0xFF, bytes);
    engine.shared.push_back({data, bytes});
    race::add_shared(data, bytes);
  }
  if (engine.shared[index].bytes != bytes) fail("threads disagree about the size of a piece of shared memory");
  return engine.shared[index].data;
}

void copy_async(void* shared, const void* global, unsigned bytes, unsigned valid_bytes, Site site) {
  Fiber* fiber = engine.current;
  fiber->site = site;
  if (reinterpret_cast<uintptr_t>(shared) % bytes || (valid_bytes && reinterpret_cast<uintptr_t>(global) % bytes))
    fail("cp.async: misaligned");
  const auto* to = static_cast<unsigned char*>(shared);
  const bool inside = std::any_of(engine.shared.begin(), engine.shared.end(), [&](const SharedPiece& piece) {
    return to >= piece.data && to + bytes <= piece.data + piece.bytes;
  });
  if (!inside) fail("cp.async: the destination is outside dynamic shared memory");
  note_access(global, valid_bytes, false, __builtin_return_address(0));
  note_access(shared, bytes, true, __builtin_return_address(0));
  if (valid_bytes) {  // AddressSanitizer should see the read where it is issued
    const auto* from = static_cast<const volatile unsigned char*>(global);
    static_cast<void>(from[0]);
    static_cast<void>(from[valid_bytes - 1]);
  }
  std::memset(shared, 0xFF, bytes);
  fiber->open_copies.push_back({shared, global, bytes, valid_bytes});
}

void copy_async_commit() {
  Fiber* fiber = engine.current;
  fiber->copy_groups.push_back(std::move(fiber->open_copies));
  fiber->open_copies.clear();
}

void copy_async_wait(int pending) {
  Fiber* fiber = engine.current;
  while (static_cast<int>(fiber->copy_groups.size()) > pending) {
    for (const Copy& copy : fiber->copy_groups.front()) land(copy);
    fiber->copy_groups.pop_front();
  }
}

float approximate(double exact, double bound) {
  double error = 0;
  switch (engine.config.approximation) {
    case Approximation::kExact:
      break;
    case Approximation::kLow:
      error = -bound;
      break;
    case Approximation::kHigh:
      error = bound;
      break;
    case Approximation::kMixed: {  // a hash of the value, so that every schedule sees the same
      uint64_t bits;
      std::memcpy(&bits, &exact, sizeof(bits));
      error = (bits * 0x9E3779B97F4A7C15ull >> 63) ? bound : -bound;
      break;
    }
  }
  return static_cast<float>(exact * (1.0 + error));
}

}  // namespace emu
