// A runtime of our own behind the calls that -fsanitize=thread puts before every load and store of the kernels' file.
//
// ThreadSanitizer's own library must not be linked: it knows threads of the operating system, is slow, and misses what
// orders CUDA threads. Here the order is exact: block barriers count epochs, and within a warp vector clocks follow the
// lanes of each mask. Two accesses to the same bytes, one of them a write and not both atomic, that are not ordered
// are a race, whatever values this run happened to see.
#include "race_hooks.h"

#include "engine.h"

#ifndef EMU_RACE_HOOKS
namespace emu {
void register_buffer(const void*, size_t, size_t, const char*) {}
void unregister_buffer(const void*) {}
void note_atomic(const void*, size_t, const void*) {}
void note_access(const void*, size_t, bool, const void*) {}
}  // namespace emu
#else
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <utility>

namespace emu {
namespace {

struct Access {
  const void* caller = nullptr;
  uint32_t block = 0, clock = 0, epoch = 0;
  int thread = -1;  // -1: there was none
  bool atomic = false;
};

// The last write of some bytes, and the last reads by two different threads since.
struct Cell {
  Access write, read, other_read;
};

struct Tracked {
  uintptr_t begin, end;
  size_t granule;
  bool shared;
  std::string name;
  std::vector<Cell> cells;
};

struct Report {
  std::string kind;
  std::string name;
  size_t offset;
  Access earlier, later;
  uint64_t count;
};

std::vector<std::unique_ptr<Tracked> > buffers;
Tracked* last_buffer = nullptr;
int shared_pieces = 0;
int thread = -1;
uint32_t block = 0, epoch = 0;
std::vector<uint32_t> clocks;  // [thread][lane of its warp]: how far into that lane's past this thread sees
std::map<std::string, Report> reports;

bool happened_before_now(const Access& access) {
  if (access.block != block) return false;
  if (access.thread == thread || access.epoch < epoch) return true;
  const bool same_warp = access.thread / 32 == thread / 32;
  return same_warp && clocks[static_cast<size_t>(thread) * 32 + access.thread % 32] >= access.clock;
}

void report(const char* kind, const Tracked& buffer, size_t offset, const Access& earlier, const Access& later) {
  char key[200];
  std::snprintf(key, sizeof(key), "%s|%s|%p|%p", kind, buffer.name.c_str(), earlier.caller, later.caller);
  const auto [found, is_new] = reports.try_emplace(key, Report{kind, buffer.name, offset, earlier, later, 0});
  ++found->second.count;
}

Tracked* find(uintptr_t address) {
  if (last_buffer && address >= last_buffer->begin && address < last_buffer->end) return last_buffer;
  for (const auto& buffer : buffers)
    if (address >= buffer->begin && address < buffer->end) return last_buffer = buffer.get();
  return nullptr;
}

void access(const void* data, size_t bytes, bool write, bool atomic, const void* caller) {
  if (thread < 0 || bytes == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const Access now{caller, block, clocks[static_cast<size_t>(thread) * 32 + thread % 32], epoch, thread, atomic};
  Tracked* buffer = find(address);
  if (!buffer) {
    for (const auto& near : buffers)
      if (address + bytes + kPadding > near->begin && address < near->end + kPadding)
        return report("out of bounds", *near, address - near->begin, {}, now);
    return;  // a stack, a constant, the engine
  }
  if (address + bytes > buffer->end) {
    report("out of bounds", *buffer, address - buffer->begin, {}, now);
    bytes = buffer->end - address;
  }
  const size_t first = (address - buffer->begin) / buffer->granule;
  const size_t last = (address - buffer->begin + bytes - 1) / buffer->granule;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = buffer->cells[i];
    const size_t offset = i * buffer->granule;
    const auto check = [&](const Access& earlier, const char* kind) {
      if (earlier.thread >= 0 && !(earlier.atomic && atomic) && !happened_before_now(earlier))
        report(kind, *buffer, offset, earlier, now);
    };
    check(cell.write, write ? "race: write after write" : "race: read after write");
    if (write) {
      check(cell.read, "race: write after read");
      check(cell.other_read, "race: write after read");
      cell = {now, {}, {}};
    } else {
      if (buffer->shared && cell.write.thread < 0) report("read of unwritten shared memory", *buffer, offset, {}, now);
      const bool keep =
          cell.read.thread >= 0 && cell.read.thread != thread &&
          (cell.read.thread / 32 != thread / 32 || cell.read.block != block || cell.other_read.thread < 0);
      if (keep) cell.other_read = cell.read;
      cell.read = now;
    }
  }
}

void track(const void* data, size_t bytes, size_t granule, bool shared, std::string name) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  buffers.push_back(std::make_unique<Tracked>(
      Tracked{begin, begin + bytes, granule, shared, std::move(name), std::vector<Cell>(bytes / granule + 1)}));
}

// File and line of a return address.
std::string where(const void* caller) {
  if (!caller) return "?";
  Dl_info info;
  if (!dladdr(caller, &info)) return "?";
  char command[600];
  std::snprintf(command, sizeof(command), "addr2line -e %s 0x%zx", info.dli_fname,
                reinterpret_cast<uintptr_t>(caller) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1);
  std::string out;
  if (FILE* pipe = popen(command, "r")) {
    char line[512];
    if (std::fgets(line, sizeof(line), pipe)) out = line;
    pclose(pipe);
  }
  out.erase(std::min(out.find('\n'), out.size()));
  out.erase(std::min(out.find(" (discriminator"), out.size()));
  const size_t slash = out.rfind('/');
  return slash == std::string::npos ? out : out.substr(slash + 1);
}

}  // namespace

void register_buffer(const void* data, size_t bytes, size_t granule, const char* name) {
  track(data, bytes, granule, false, name);
}

void unregister_buffer(const void* data) {
  last_buffer = nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto found =
      std::find_if(buffers.begin(), buffers.end(), [&](const auto& buffer) { return buffer->begin == begin; });
  if (found != buffers.end()) buffers.erase(found);
}

void note_atomic(const void* data, size_t bytes, const void* caller) {
  access(data, bytes, true, true, caller);
}

void note_access(const void* data, size_t bytes, bool write, const void* caller) {
  access(data, bytes, write, false, caller);
}

namespace race {

void begin_launch(unsigned threads) {
  clocks.assign(static_cast<size_t>((threads + 31) / 32) * 32 * 32, 0);
  for (const auto& buffer : buffers) std::fill(buffer->cells.begin(), buffer->cells.end(), Cell{});
}

void begin_block(uint32_t number) {
  block = number;
  epoch = 1;
  std::fill(clocks.begin(), clocks.end(), 0u);
  for (size_t i = 0; i < clocks.size() / 32; ++i) clocks[i * 32 + i % 32] = 1;
}

void set_thread(int number) {
  thread = number;
}

void join_block() {
  ++epoch;
}

void join_warp(unsigned warp, unsigned mask) {
  uint32_t* const of_warp = &clocks[static_cast<size_t>(warp) * 32 * 32];
  uint32_t joined[32] = {};
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1)
      for (int i = 0; i < 32; ++i) joined[i] = std::max(joined[i], of_warp[lane * 32 + i]);
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::copy(joined, joined + 32, of_warp + lane * 32);
    ++of_warp[lane * 32 + lane];
  }
}

void add_shared(void* data, size_t bytes) {
  track(data, bytes, 2, true, "shared piece " + std::to_string(shared_pieces++));
}

void drop_shared() {
  last_buffer = nullptr;
  shared_pieces = 0;
  std::erase_if(buffers, [](const auto& buffer) { return buffer->shared; });
}

void end_launch() {
  thread = -1;
}

std::vector<std::string> take_reports() {
  std::vector<std::string> lines;
  for (const auto& [key, found] : std::exchange(reports, {})) {
    std::string line = found.kind + ": " + found.name + " byte " +
                       std::to_string(static_cast<ptrdiff_t>(found.offset)) + ": thread " +
                       std::to_string(found.later.thread) + " of block " + std::to_string(found.later.block) + " at " +
                       where(found.later.caller);
    if (found.earlier.thread >= 0)
      line += ", after thread " + std::to_string(found.earlier.thread) + " of block " +
              std::to_string(found.earlier.block) + " at " + where(found.earlier.caller);
    lines.push_back(line + " (" + std::to_string(found.count) + " times)");
  }
  return lines;
}

}  // namespace race
}  // namespace emu

// The interface of the instrumentation.
extern "C" {
#define EMU_CALLER __builtin_return_address(0)
#define EMU_HOOKS(bytes)                                \
  void __tsan_read##bytes(void* data) {                 \
    emu::access(data, bytes, false, false, EMU_CALLER); \
  }                                                     \
  void __tsan_write##bytes(void* data) {                \
    emu::access(data, bytes, true, false, EMU_CALLER);  \
  }                                                     \
  void __tsan_unaligned_read##bytes(void* data) {       \
    emu::access(data, bytes, false, false, EMU_CALLER); \
  }                                                     \
  void __tsan_unaligned_write##bytes(void* data) {      \
    emu::access(data, bytes, true, false, EMU_CALLER);  \
  }
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
void __tsan_read_range(void* data, size_t bytes) {
  emu::access(data, bytes, false, false, EMU_CALLER);
}
void __tsan_write_range(void* data, size_t bytes) {
  emu::access(data, bytes, true, false, EMU_CALLER);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
char __tsan_atomic8_load(const volatile char* data, int) {
  return *data;
}  // the guards of static variables
}
#endif
