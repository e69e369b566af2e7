// What each instruction computes in a lane, from the PTX ISA. Floats are rounded to nearest even by this processor; ex2
// and lg2 are as wrong as the ISA allows, always alike for the same argument.
#include <bit>
#include <cmath>
#include <type_traits>
#include <unordered_map>

#include "ptx.h"

namespace ptx {
namespace {

template <class T>
T as(uint64_t x) {
  if constexpr (std::is_same_v<T, bool>) return x & 1;
  else if constexpr (std::is_same_v<T, float>) return std::bit_cast<float>(uint32_t(x));
  else if constexpr (std::is_same_v<T, double>) return std::bit_cast<double>(x);
  else return T(x);
}
template <class T>
uint64_t bits(T x) {
  if constexpr (std::is_same_v<T, bool>) return x;
  else if constexpr (std::is_same_v<T, float>) return std::isnan(x) ? 0x7fffffffu : std::bit_cast<uint32_t>(x);
  else if constexpr (std::is_same_v<T, double>) return std::bit_cast<uint64_t>(x);
  else return std::make_unsigned_t<T>(x);
}

// A lambda on typed values as an instruction on rows.
template <class F, class R, class... A, size_t... i>
Arithmetic each(F, R (*)(A...), std::index_sequence<i...>) {
  return [](uint64_t* to, const uint64_t* const* from, uint32_t lanes) {
    for (int lane = 0; lane < simt::kWarpSize; ++lane)
      if (lanes >> lane & 1) to[lane] = bits<R>(F{}(as<A>(from[i][lane])...));
  };
}
template <class F, class R, class... A>
Arithmetic each(F f, R (*call)(A...)) {
  return each(f, call, std::index_sequence_for<A...>{});
}
template <class F>
Arithmetic each(F f) {
  return each(f, +f);
}

using Table = std::unordered_map<std::string, Arithmetic>;

template <class T>
T divisor(T x) {
  if (!x) throw simt::Error("division by 0");
  return x;
}

template <class T>  // integers: what depends on the sign
void add_ordered(Table& t, const std::string& type) {
  t["setp.eq." + type] = each([](T a, T b) { return a == b; });
  t["setp.ne." + type] = each([](T a, T b) { return a != b; });
  t["setp.lt." + type] = each([](T a, T b) { return a < b; });
  t["setp.le." + type] = each([](T a, T b) { return a <= b; });
  t["setp.gt." + type] = each([](T a, T b) { return a > b; });
  t["setp.ge." + type] = each([](T a, T b) { return a >= b; });
  t["min." + type] = each([](T a, T b) { return a < b ? a : b; });
  t["max." + type] = each([](T a, T b) { return a > b ? a : b; });
  t["div." + type] = each([](T a, T b) { return T(a / divisor(b)); });
  t["rem." + type] = each([](T a, T b) { return T(a % divisor(b)); });
  t["shr." + type] = each([](T a, uint32_t b) {  // fills with the sign
    constexpr uint32_t n = 8 * sizeof(T) - 1;
    return b > n ? T(a >> n >> (std::is_signed_v<T> ? 0 : 1)) : T(a >> b);
  });
}

template <class U>
void add_integers(Table& t, const std::string& width) {
  using S = std::make_signed_t<U>;
  for (const std::string& type : {"u" + width, "s" + width, "b" + width}) {
    t["mov." + type] = each([](U a) { return a; });
    t["selp." + type] = each([](U a, U b, bool c) { return c ? a : b; });
    t["add." + type] = each([](U a, U b) { return U(a + b); });
    t["sub." + type] = each([](U a, U b) { return U(a - b); });
    t["mul.lo." + type] = each([](U a, U b) { return U(a * b); });
    t["mad.lo." + type] = each([](U a, U b, U c) { return U(a * b + c); });
  }
  t["setp.eq.b" + width] = each([](U a, U b) { return a == b; });
  t["setp.ne.b" + width] = each([](U a, U b) { return a != b; });
  t["and.b" + width] = each([](U a, U b) { return U(a & b); });
  t["or.b" + width] = each([](U a, U b) { return U(a | b); });
  t["xor.b" + width] = each([](U a, U b) { return U(a ^ b); });
  t["not.b" + width] = each([](U a) { return U(~a); });
  t["shl.b" + width] = each([](U a, uint32_t b) { return b >= 8 * sizeof(U) ? U(0) : U(a << b); });
  t["neg.s" + width] = each([](U a) { return U(0 - a); });
  t["abs.s" + width] = each([](S a) { return a < 0 ? U(0 - U(a)) : U(a); });
  add_ordered<U>(t, "u" + width);
  add_ordered<S>(t, "s" + width);
}

template <class From, class... To>
void add_conversions(Table& t, const std::string& from) {
  ((t[std::string("cvt.") + (std::is_signed_v<To> ? "s" : "u") + std::to_string(8 * sizeof(To)) + "." + from] =
        each([](From a) { return To(a); })),
   ...);
}

template <class F>
void add_floats(Table& t, const std::string& type) {
  using U = std::conditional_t<sizeof(F) == 4, uint32_t, uint64_t>;
  constexpr U sign = U(1) << (8 * sizeof(F) - 1);
  t["mov." + type] = each([](U a) { return a; });
  t["selp." + type] = each([](U a, U b, bool c) { return c ? a : b; });
  t["neg." + type] = each([](U a) { return U(a ^ sign); });
  t["abs." + type] = each([](U a) { return U(a & ~sign); });
  t["copysign." + type] = each([](U a, U b) { return U((a & sign) | (b & ~sign)); });
  for (const char* rounding : {".", ".rn."}) {
    t["add" + (rounding + type)] = each([](F a, F b) { return a + b; });
    t["sub" + (rounding + type)] = each([](F a, F b) { return a - b; });
    t["mul" + (rounding + type)] = each([](F a, F b) { return a * b; });
  }
  t["fma.rn." + type] = each([](F a, F b, F c) { return std::fma(a, b, c); });
  t["div.rn." + type] = each([](F a, F b) { return a / b; });
  t["rcp.rn." + type] = each([](F a) { return 1 / a; });
  t["sqrt.rn." + type] = each([](F a) { return std::sqrt(a); });
  // The result is the number if the other is NaN, and -0 is less than 0.
  t["min." + type] = each([](F a, F b) { return a < b || (a == b && std::signbit(a)) || std::isnan(b) ? a : b; });
  t["max." + type] = each([](F a, F b) { return a > b || (a == b && !std::signbit(a)) || std::isnan(b) ? a : b; });
  // Comparisons with a NaN are false; with u, true.
  t["setp.eq." + type] = each([](F a, F b) { return a == b; });
  t["setp.ne." + type] = each([](F a, F b) { return a < b || a > b; });
  t["setp.lt." + type] = each([](F a, F b) { return a < b; });
  t["setp.le." + type] = each([](F a, F b) { return a <= b; });
  t["setp.gt." + type] = each([](F a, F b) { return a > b; });
  t["setp.ge." + type] = each([](F a, F b) { return a >= b; });
  t["setp.equ." + type] = each([](F a, F b) { return !(a < b || a > b); });
  t["setp.neu." + type] = each([](F a, F b) { return !(a == b); });
  t["setp.ltu." + type] = each([](F a, F b) { return !(a >= b); });
  t["setp.leu." + type] = each([](F a, F b) { return !(a > b); });
  t["setp.gtu." + type] = each([](F a, F b) { return !(a <= b); });
  t["setp.geu." + type] = each([](F a, F b) { return !(a < b); });
  t["setp.num." + type] = each([](F a, F b) { return !std::isnan(a) && !std::isnan(b); });
  t["setp.nan." + type] = each([](F a, F b) { return std::isnan(a) || std::isnan(b); });
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
// In [-2^-22, 2^-22], always alike for the same x.
double error_at(float x) { return int32_t(std::bit_cast<uint32_t>(x) * 0x9E3779B9u) * 0x1p-53; }
float ex2(float x) { return float(std::exp2(double(x)) * (1 + error_at(x))); }
float lg2(float x) {
  const double y = std::log2(double(x));
  return float(std::isfinite(y) ? y + error_at(x) * std::max(1.0, std::fabs(y)) : y);
}

uint16_t to_f16(float x) { return std::isnan(x) ? 0x7fff : std::bit_cast<uint16_t>(_Float16(x)); }
// The nearest bfloat16; a tie goes to the one with a last bit of 0.
uint16_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t u = std::bit_cast<uint32_t>(x), low = u & 0xffff0000u, rest = u - low;
  return uint16_t((low >> 16) + (rest > 0x8000 || (rest == 0x8000 && (low >> 16 & 1))));
}

Table table() {
  Table t;
  add_integers<uint16_t>(t, "16");
  add_integers<uint32_t>(t, "32");
  add_integers<uint64_t>(t, "64");
  add_conversions<uint16_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(t, "u16");
  add_conversions<int16_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(t, "s16");
  add_conversions<uint32_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(t, "u32");
  add_conversions<int32_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(t, "s32");
  add_conversions<uint64_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(t, "u64");
  add_conversions<int64_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>(t, "s64");
  t["mul.wide.u32"] = each([](uint32_t a, uint32_t b) { return uint64_t(a) * b; });
  t["mul.wide.s32"] = each([](int32_t a, int32_t b) { return int64_t(a) * b; });
  t["mul.hi.u32"] = each([](uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); });
  t["mul.hi.s32"] = each([](int32_t a, int32_t b) { return int32_t(int64_t(a) * b >> 32); });
  t["mul.hi.u64"] = each([](uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); });
  t["brev.b32"] = each([](uint32_t a) {
    uint32_t r = 0;
    for (int i = 0; i < 32; ++i) r |= (a >> i & 1) << (31 - i);
    return r;
  });
  t["bfind.shiftamt.u32"] = each([](uint32_t a) { return a ? uint32_t(std::countl_zero(a)) : ~0u; });
  t["bfi.b32"] = each([](uint32_t a, uint32_t into, uint32_t at, uint32_t length) {
    const uint64_t field = ((1ull << std::min(length & 255, 32u)) - 1) << std::min(at & 255, 32u);
    return uint32_t((into & ~field) | ((uint64_t(a) << std::min(at & 255, 32u)) & field));
  });
  t["bfi.b64"] = each([](uint64_t a, uint64_t into, uint32_t at, uint32_t length) {
    using Wide = unsigned __int128;
    const Wide field = ((Wide(1) << std::min(length & 255, 64u)) - 1) << std::min(at & 255, 64u);
    return uint64_t((into & ~field) | ((Wide(a) << std::min(at & 255, 64u)) & field));
  });
  // Each digit of c chooses one of the eight bytes of b and a; a digit with the top bit set gives the byte's sign eight
  // times.
  t["prmt.b32"] = each([](uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t digit = c >> (4 * i) & 15, byte = uint32_t((uint64_t(b) << 32 | a) >> (8 * (digit & 7))) & 255;
      r |= (digit & 8 ? (byte >> 7) * 255 : byte) << (8 * i);
    }
    return r;
  });
  t["and.pred"] = each([](bool a, bool b) { return a && b; });
  t["or.pred"] = each([](bool a, bool b) { return a || b; });
  t["xor.pred"] = each([](bool a, bool b) { return a != b; });
  t["not.pred"] = each([](bool a) { return !a; });
  t["mov.pred"] = each([](bool a) { return a; });
  t["cvta.to.global.u64"] = each([](uint64_t a) { return a + kGlobal; });
  t["cvta.global.u64"] = each([](uint64_t a) { return a - kGlobal; });
  add_floats<float>(t, "f32");
  add_floats<double>(t, "f64");
  t["ex2.approx.f32"] = each([](float a) { return ex2(a); });
  t["ex2.approx.ftz.f32"] = each([](float a) { return flushed(ex2(flushed(a))); });
  t["lg2.approx.ftz.f32"] = each([](float a) { return flushed(lg2(flushed(a))); });
  t["rcp.approx.ftz.f64"] = each([](uint64_t a) {  // of the upper words alone
    return std::bit_cast<uint64_t>(1 / std::bit_cast<double>(a >> 32 << 32)) >> 32 << 32;
  });
  t["cvt.f32.f16"] = each([](uint16_t a) { return float(std::bit_cast<_Float16>(a)); });
  t["cvt.rn.f16x2.f32"] = each([](float high, float low) { return uint32_t(to_f16(high)) << 16 | to_f16(low); });
  t["cvt.rn.bf16x2.f32"] = each([](float high, float low) { return uint32_t(to_bf16(high)) << 16 | to_bf16(low); });
  t["cvt.f64.f32"] = each([](float a) { return double(a); });
  t["cvt.rn.f32.f64"] = each([](double a) { return float(a); });
  t["cvt.rn.f32.s32"] = each([](int32_t a) { return float(a); });
  t["cvt.rn.f64.u64"] = each([](uint64_t a) { return double(a); });
  t["cvt.rni.f32.f32"] = each([](float a) { return std::nearbyint(a); });
  t["cvt.rzi.u32.f32"] = each([](float a) { return !(a > 0) ? 0u : a >= 0x1p32f ? ~0u : uint32_t(a); });
  return t;
}

}  // namespace

Arithmetic find_arithmetic(const std::string& opcode) {
  static const Table all = table();
  const auto found = all.find(opcode);
  return found == all.end() ? nullptr : found->second;
}

}  // namespace ptx
