// Shared by the tests: counted checks, random inputs, properties of the element types.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/cuda/primitives.cuh"

namespace test {

inline int checks = 0, failures = 0;

inline void check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
  if (std::getenv("SIMT_STOP_AT_FIRST")) std::exit(1);
}

// Runs f; an exception, such as an Error of the SIMT machine, is a failed check with the exception's message.
template <class F>
void run(const std::string& what, const F& f) {
  try {
    f();
  } catch (const std::exception& e) {
    check(false, what + ": " + e.what());
  }
}

inline int report(const char* name) {
  std::printf("%s: %d passed, %d failed\n", name, checks - failures, failures);
  return failures ? 1 : 0;
}

using tinystory::DType;
using tinystory::cuda::bf16;
using tinystory::cuda::f16;

template <class Element>
struct Type;
template <>
struct Type<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr const char* name = "f32";
  static constexpr double unit = 0x1p-24;  // unit roundoff
};
template <>
struct Type<bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr const char* name = "bf16";
  static constexpr double unit = 0x1p-8;
};
template <>
struct Type<f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr const char* name = "f16";
  static constexpr double unit = 0x1p-11;
};

template <class Element>
std::vector<double> to_doubles(const std::vector<Element>& v) {
  std::vector<double> r(v.size());
  for (size_t i = 0; i < v.size(); ++i) r[i] = tinystory::cuda::to_float(v[i]);
  return r;
}
template <class Element>
std::vector<Element> normal(std::mt19937_64& random, size_t n, double scale = 1) {
  std::normal_distribution<double> d(0, scale);
  std::vector<Element> r(n);
  for (Element& x : r) x = tinystory::cuda::from_float<Element>(float(d(random)));
  return r;
}

// Checks |got - want| <= bound for every element, and reports the worst.
inline void check_close(const std::vector<double>& got, const std::vector<double>& want,
                        const std::vector<double>& bound, const std::string& what) {
  double worst = 0;
  size_t where = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double excess = std::fabs(got[i] - want[i]) / bound[i];
    if (!(excess <= worst)) worst = excess, where = i;
    if (std::isnan(excess)) break;
  }
  char line[200];
  std::snprintf(line, sizeof line, ": element %zu is %g, not %g (%.3g of the bound)", where, got[where], want[where],
                worst);
  check(worst <= 1, what + line);
  if (std::getenv("SIMT_VERBOSE")) std::printf("%s%s\n", what.c_str(), line);
}

}  // namespace test
