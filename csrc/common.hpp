// Common to all source files here: SIMD types, per-ISA compilation, aligned scratch, batch threads.
//
// No torch headers and no Python objects: Python passes raw pointers through ctypes (which releases the GIL).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace fastrl {

constexpr double kInf = std::numeric_limits<double>::infinity();

// GCC/Clang vector extensions: compiled to AVX2 where a caller targets it, to pairs of SSE2/NEON registers elsewhere.
using f64x4 = double __attribute__((vector_size(32)));
using i64x4 = int64_t __attribute__((vector_size(32)));
using f32x4 = float __attribute__((vector_size(16)));
using i32x4 = int32_t __attribute__((vector_size(16)));
constexpr int64_t kLanes = 8;  // inner loops process two f64x4 per iteration, so rows are padded to a multiple of 8

#define FASTRL_INLINE inline __attribute__((always_inline))

// One function body for two instruction sets. FMA is not used, so that both versions round the same and results do not
// depend on the machine.
#if defined(__x86_64__)
#define FASTRL_HAS_AVX2_BUILD 1
#define FASTRL_AVX2 __attribute__((target("avx2")))
inline bool has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2");
  return yes;
}
#else
#define FASTRL_HAS_AVX2_BUILD 0
#endif

FASTRL_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Growable, 64-byte aligned, uninitialised storage.
template <class T>
class Buffer {
 public:
  T* reserve(int64_t n) {
    if (n > capacity_) {
      const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!data_) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
      capacity_ = n;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

// State shared by the threads of one call. Helper threads are detached and keep it alive: one that is scheduled too
// late finds no problem left and exits, and nothing waits for it.
struct Progress {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;
};

// Runs work(scratch, b) for every b in [0, n), one Scratch per thread. Problems differ in cost, so threads draw small
// blocks from a counter. Threads live for the call only: a thread pool would not survive fork(). Returns 0, or 1 if out
// of memory.
template <class Scratch, class Work>
int for_each_problem(int64_t n, int threads, double steps_per_problem, const Work& work) {
  // Starting a thread takes about 50 us, 1e6 inner-loop steps about 300 us: use one more thread per 1e6 steps.
  const int64_t useful = 1 + static_cast<int64_t>(static_cast<double>(n) * steps_per_problem / 1e6);
  const int64_t count = useful < threads ? useful : threads;
  const int64_t per_block = count > 0 ? n / (count * 8) : n;
  const int64_t block = per_block > 1 ? per_block : 1;
  auto progress = std::make_shared<Progress>();
  const Work* task = &work;  // outlives every block: the caller waits until all are done
  auto run = [progress, task, n, block]() {
    std::unique_ptr<Scratch> scratch;
    for (;;) {
      const int64_t from = progress->next.fetch_add(block);
      if (from >= n) return;
      const int64_t to = from + block < n ? from + block : n;
      try {
        if (!scratch) scratch = std::make_unique<Scratch>();
        for (int64_t b = from; b < to; ++b) (*task)(*scratch, b);
      } catch (const std::bad_alloc&) {
        progress->failed = 1;
      }
      const std::lock_guard<std::mutex> lock(progress->mutex);
      progress->done += to - from;
      if (progress->done == n) progress->all_done.notify_one();
    }
  };
  try {
    for (int64_t t = 1; t < count; ++t) std::thread(run).detach();
  } catch (const std::exception&) {
    // no further thread could be started: the running ones do all the work
  }
  run();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == n; });
  return progress->failed;
}

}  // namespace fastrl
