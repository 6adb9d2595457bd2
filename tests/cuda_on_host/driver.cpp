// The few functions of the CUDA runtime and driver that PyTorch calls before any kernel runs, for a process without a
// GPU: one device, streams, events. Preloaded under the driver's name, it lets PyTorch's own streams, events, autocast
// and autograd engine work with tensors "on cuda:0" whose memory tests/gpu_rehearsal.py keeps on the host.
//
// Work is never late here, but what would be is known: every stream counts its launches, and knows which of another
// stream's launches it comes after (a vector clock), by events or by what the host waited for.
#include <cstdint>
#include <map>
#include <mutex>

namespace {

using Clock = std::map<uintptr_t, long>;  // launches of each stream that are known to have ended before

constexpr int kSuccess = 0, kInvalidDevice = 101, kCaptureUnsupported = 900;

std::mutex mutex;
std::map<uintptr_t, Clock> streams;
std::map<uintptr_t, Clock> events;
Clock host;
uintptr_t next_handle = 1 << 20;
bool capturing = false;

void merge(Clock& into, const Clock& other) {
  for (const auto& [stream, time] : other)
    if (into[stream] < time) into[stream] = time;
}

}  // namespace

extern "C" {

int cudaGetDeviceCount(int* count) {
  *count = 1;
  return kSuccess;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
int cudaSetDevice(int device) {
  return device == 0 ? kSuccess : kInvalidDevice;
}
int cudaGetLastError() {
  return kSuccess;
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return kSuccess;
}
int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}
int cudaStreamCreateWithPriority(uintptr_t* stream, unsigned, int) {
  const std::lock_guard<std::mutex> lock(mutex);
  *stream = next_handle++;
  return kSuccess;
}
int cudaStreamIsCapturing(uintptr_t, int* status) {
  *status = capturing;
  return kSuccess;
}
int cudaStreamGetCaptureInfo(uintptr_t, int* status, ...) {
  *status = capturing;
  return kSuccess;
}
int cudaStreamGetCaptureInfo_v2(uintptr_t, int* status, ...) {  // its name in CUDA 12
  *status = capturing;
  return kSuccess;
}
int cudaThreadExchangeStreamCaptureMode(int*) {
  return kSuccess;
}
int cudaEventCreateWithFlags(uintptr_t* event, unsigned) {
  const std::lock_guard<std::mutex> lock(mutex);
  *event = next_handle++;
  return kSuccess;
}
int cudaEventDestroy(uintptr_t event) {
  const std::lock_guard<std::mutex> lock(mutex);
  events.erase(event);
  return kSuccess;
}
int cudaEventRecord(uintptr_t event, uintptr_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  events[event] = streams[stream];
  return kSuccess;
}
int cudaEventRecordWithFlags(uintptr_t event, uintptr_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
int cudaStreamWaitEvent(uintptr_t stream, uintptr_t event, unsigned) {
  const std::lock_guard<std::mutex> lock(mutex);
  merge(streams[stream], events[event]);
  return kSuccess;
}
int cudaEventQuery(uintptr_t) {
  return kSuccess;
}
int cudaEventElapsedTime(float* milliseconds, uintptr_t, uintptr_t) {
  *milliseconds = 1;
  return kSuccess;
}
int cudaEventSynchronize(uintptr_t event) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (capturing) return kCaptureUnsupported;
  merge(host, events[event]);
  return kSuccess;
}
int cudaStreamQuery(uintptr_t) {
  return capturing ? kCaptureUnsupported : kSuccess;
}
int cudaStreamSynchronize(uintptr_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (capturing) return kCaptureUnsupported;
  merge(host, streams[stream]);
  return kSuccess;
}
int cudaDeviceSynchronize() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (capturing) return kCaptureUnsupported;
  for (const auto& [stream, clock] : streams) merge(host, clock);
  return kSuccess;
}

// --- for gpu_rehearsal.py

void rehearsal_capture(int on) {
  capturing = on;
}
// The number of a new launch on a stream.
long rehearsal_launch(uintptr_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  Clock& clock = streams[stream];
  merge(clock, host);
  return ++clock[stream];
}
// Whether what is launched next on `stream` comes after launch `time` of `other`.
int rehearsal_is_after(uintptr_t stream, uintptr_t other, long time) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = [&](const Clock& clock) {
    const auto found = clock.find(other);
    return found != clock.end() && found->second >= time;
  };
  return stream == other || known(host) || known(streams[stream]);
}

}  // extern "C"
