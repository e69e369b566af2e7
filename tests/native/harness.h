// The native tests' harness: CHECK, seeded random values, and a range split over threads that start together.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

// CHECK(condition) or CHECK(condition, "printf format", values...): ends the test where it is false.
#define CHECK(condition, ...)                                                       \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false  ", __FILE__, __LINE__, #condition); \
      __VA_OPT__(std::fprintf(stderr, __VA_ARGS__);)                                \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

inline std::vector<float> normal(size_t n, unsigned seed, float scale = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = draw(engine);
  return x;
}

// That two buffers agree to within a tolerance.
inline void check_near(const std::vector<float>& got, const std::vector<float>& want, double tolerance,
                       const char* what) {
  CHECK(got.size() == want.size(), "%s", what);
  for (size_t i = 0; i < want.size(); ++i)
    CHECK(std::fabs(double(got[i]) - want[i]) < tolerance, "%s: element %zu is %g, not %g", what, i, got[i], want[i]);
}

// Calls f(begin, end) over [0, n) in equal parts, one thread per part.
template <class F>
void parallel(int64_t n, int threads, const F& f) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([=] {
      if (n * t / threads < n * (t + 1) / threads) f(n * t / threads, n * (t + 1) / threads);
    });
  for (std::thread& t : pool) t.join();
}
