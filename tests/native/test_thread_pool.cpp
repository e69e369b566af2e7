// The thread pool: every thread asked for takes part, calls inside calls and from other threads finish, an exception
// reaches the caller, a forked process does not wait for threads that it does not have.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <stdexcept>
#include <vector>

#include "cpu/thread_pool.h"
#include "harness.h"

using namespace tinystory;

int main() {
  cpu::ThreadPool& pool = cpu::ThreadPool::shared();
  std::mutex mutex;
  std::set<std::thread::id> ids;
  const auto all_meet = [&](size_t n) {  // returns on each thread only when n of them are inside
    const std::lock_guard clear(mutex);
    ids.clear();
    return [&, n] {
      for (;;) {
        const std::lock_guard lock(mutex);
        ids.insert(std::this_thread::get_id());
        if (ids.size() == n) return;
      }
    };
  };
  for (int64_t threads : {1, 2, 5, 3}) {
    pool.run(threads, all_meet(threads));
    CHECK(int64_t(ids.size()) == threads);
    CHECK(ids.count(std::this_thread::get_id()) == 1);
  }

  // Many short jobs: every item is done once, whichever threads wake in time.
  for (int round = 0; round < 2000; ++round) {
    std::atomic<int> next{0}, sum{0};
    pool.run(4, [&] {
      for (int i; (i = next++) < 10;) sum += i;
    });
    CHECK(sum == 45);
  }

  std::atomic<int> inner{0};
  pool.run(3, [&] { pool.run(3, [&] { ++inner; }); });
  CHECK(inner >= 1 && inner <= 3);

  std::atomic<int> others{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int j = 0; j < 200; ++j) {
        std::atomic<int> next{0};
        pool.run(3, [&] {
          while (next++ < 5) ++others;
        });
      }
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(others == 4 * 200 * 5);

  bool caught = false;
  try {
    pool.run(2, [] { throw std::runtime_error("of an item"); });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  CHECK(caught);
  pool.run(2, all_meet(2));  // it goes on
  CHECK(ids.size() == 2);

  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> next{0};
    pool.run(5, [&] {
      while (next++ < 10) {
      }
    });
    _exit(next >= 10 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
  std::puts("thread pool: ok");
}
