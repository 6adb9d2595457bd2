// Happens-before checking of a kernel's memory accesses. Without EMU_RACE_HOOKS all of it vanishes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emu::race {

#ifdef EMU_RACE_HOOKS
// The engine tells what happens.
void begin_launch(unsigned threads);
void begin_block(uint32_t block);
void set_thread(int thread);  // -1: none
void join_block();            // all threads met at a block barrier
void join_warp(unsigned warp, unsigned mask);
void add_shared(void* data, size_t bytes);
void drop_shared();
void end_launch();

// What was found since the last call, one line a distinct pair of accesses, with file and line of both.
std::vector<std::string> take_reports();
#else
inline void begin_launch(unsigned) {}
inline void begin_block(uint32_t) {}
inline void set_thread(int) {}
inline void join_block() {}
inline void join_warp(unsigned, unsigned) {}
inline void add_shared(void*, size_t) {}
inline void drop_shared() {}
inline void end_launch() {}
inline std::vector<std::string> take_reports() {
  return {};
}
#endif

}  // namespace emu::race
