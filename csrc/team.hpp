// Threads that go through a list of phases together, each taking pieces of the phase until none is left.
//
// A phase is over when its pieces are done, not when every thread has come: one that the system has put aside between
// two pieces holds nobody up, and walks through the phases it missed when it is back. The threads are the ones that
// torch computes with (its OpenMP runtime's function is handed in), so that they do not fight with torch's own.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace fastrl {

// GOMP_parallel of the OpenMP runtime: run(data) on `threads` threads, the caller's among them; returns when all have.
using Parallel = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

class Phases {
 public:
  explicit Phases(int64_t count) : phases_(new Phase[static_cast<size_t>(count)]()) {}

  // Does pieces of phase `number` until none is left, and waits for those that others do. Each phase is run once.
  template <class Piece>
  void run(int64_t number, int64_t pieces, const Piece& piece) {
    Phase& phase = phases_[static_cast<size_t>(number)];
    for (int64_t i; (i = phase.taken.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      piece(i);
      phase.done.fetch_add(1, std::memory_order_release);
    }
    for (int64_t turn = 0; phase.done.load(std::memory_order_acquire) < pieces; ++turn) {
      if (turn < kSpins) {
        pause();
      } else {
        std::this_thread::yield();  // whoever does the last piece may need this core for it
      }
    }
  }

 private:
  struct Phase {
    std::atomic<int64_t> taken{0}, done{0};
  };
  static constexpr int64_t kSpins = 2000;  // some 30 us: pieces take about as long

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::unique_ptr<Phase[]> phases_;
};

// body(thread) on each of `threads` threads, without `parallel` on the caller's alone.
template <class Body>
void on_threads(Parallel parallel, int threads, const Body& body) {
  struct Shared {
    const Body* body;
    std::atomic<int> next{0};
  } shared{&body};
  const auto run = [](void* data) {
    auto* all = static_cast<Shared*>(data);
    (*all->body)(all->next.fetch_add(1));
  };
  if (parallel && threads > 1) {
    parallel(run, &shared, static_cast<unsigned>(threads), 0);
  } else {
    run(&shared);
  }
}

}  // namespace fastrl
