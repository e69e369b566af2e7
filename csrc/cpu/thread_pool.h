// A thread pool for compilers without OpenMP, or with another OpenMP runtime than PyTorch's: Apple's clang, and clang
// on Linux.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace tinystory::cpu {

// Workers wait between calls and end with the process. A call does not wait for workers that have not started on the
// job. So a forked process, which has no workers, does all the work on the calling thread.
class ThreadPool {
 public:
  // Calls f on up to `threads` threads at once, the calling thread included. Returns when no thread runs f any more. A
  // call from inside f, or during a call by another thread, runs f once, on the calling thread. Rethrows one exception
  // of f.
  void run(int64_t threads, const std::function<void()>& f) {
    if (threads <= 1 || busy_.test_and_set()) return f();
    {
      const std::lock_guard lock(mutex_);
      try {
        for (; workers_ < threads - 1; ++workers_) std::thread(&ThreadPool::work, this).detach();
      } catch (const std::system_error&) {
        // no more threads are allowed: fewer workers do the job
      }
      job_ = &f, wanted_ = threads - 1, error_ = nullptr;
    }
    wake_.notify_all();
    call(f);
    std::unique_lock lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [&] { return running_ == 0; });
    const std::exception_ptr error = error_;
    lock.unlock();
    busy_.clear();
    if (error) std::rethrow_exception(error);
  }

  static ThreadPool& shared() {
    static ThreadPool& pool = *new ThreadPool;  // never destroyed, because the workers may outlive main
    return pool;
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return wanted_ > 0; });
      --wanted_, ++running_;
      const auto* job = job_;
      lock.unlock();
      call(*job);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void call(const std::function<void()>& f) {
    try {
      f();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::mutex mutex_;  // guards the members below
  std::condition_variable wake_, done_;
  const std::function<void()>* job_ = nullptr;
  std::exception_ptr error_;
  // number of workers; of workers that may still join the job; of workers that run the job
  int64_t workers_ = 0, wanted_ = 0, running_ = 0;
};

}  // namespace tinystory::cpu
