// What every source file here shares: SIMD value types, per-ISA compilation, aligned scratch, batch threads.
//
// No torch headers and no Python objects: Python hands over raw pointers through ctypes (which releases the GIL).
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
constexpr int64_t kLanes = 8;  // every inner loop takes two f64x4 a turn, so rows are padded to a multiple of 8

#define FASTRL_INLINE inline __attribute__((always_inline))

// One body, two instruction sets. FMA is left out on purpose: both versions round alike, so results do not depend on
// the machine.
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

// What the threads of one call share. Helper threads are detached and keep it alive: one that the system schedules too
// late finds no problem left and leaves, and nobody waits for it.
struct Progress {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;
};

// Runs work(scratch, b) for every b in [0, n), one Scratch per thread. Problems differ in cost, so threads draw small
// blocks from a counter. Threads live for the call only: a kept pool would not survive fork(). Returns 0, or 1 when
// memory ran out.
template <class Scratch, class Work>
int for_each_problem(int64_t n, int threads, double steps_per_problem, const Work& work) {
  // A thread costs some 50 us to start, 1e6 inner-loop steps take some 300 us: one more thread for each such load.
  const int64_t useful = 1 + static_cast<int64_t>(static_cast<double>(n) * steps_per_problem / 1e6);
  const int64_t count = useful < threads ? useful : threads;
  const int64_t share = count > 0 ? n / (count * 8) : n;
  const int64_t block = share > 1 ? share : 1;
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
    // the system would not start another thread: those that run do all the work
  }
  run();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == n; });
  return progress->failed;
}

}  // namespace fastrl
