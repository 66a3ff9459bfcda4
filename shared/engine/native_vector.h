// Vectors of floats, in the compiler's own notation: the same source for AVX2, AVX-512 and NEON.
// `a * b + c` is contracted to one fused multiply-add (-ffp-contract=fast is GCC's default).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
// Of 32 registers; from 18 on GCC 12 keeps a tile's sums on the stack, at half the speed.
constexpr int MAX_ACCUMULATORS = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int MAX_ACCUMULATORS = 12;  // of 16
#else
constexpr int LANES = 4;
constexpr int MAX_ACCUMULATORS = 16;  // NEON: of 32
#endif

// For inner loops that fill the registers: inlined into a caller with values of its own, GCC 12 spilled their sums to
// the stack and lost a third of the speed.
#define NOINLINE __attribute__((noinline))

constexpr int PANEL = 16;  // outputs, query rows or head dimensions that are worked on together
constexpr int PANEL_VECTORS = PANEL / LANES;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2)));

struct Bf16 {
  uint16_t bits;
};

static inline float widen(float value) { return value; }
static inline float widen(Bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest, ties to even, as torch does.
static inline void narrow(float value, float* to) { *to = value; }
static inline void narrow(float value, Bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) {
    to->bits = 0x7fc0;
    return;
  }
  to->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
static inline Vec load(const Bf16* from) {
  VecHalf halves;
  std::memcpy(&halves, from, sizeof halves);
  VecBits bits = __builtin_convertvector(halves, VecBits) << 16;
  Vec value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }
static inline Vec broadcast(float value) { return value - Vec{}; }

// The lanes are added in one fixed order, so a row's sum does not depend on which rows it stands with.
static inline float sum_lanes(Vec value) {
  float lanes[LANES];
  store(lanes, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// {sum of a, sum of b, sum of c, sum of d}: the lanes are added in one fixed order here too.
static inline Four sum_four(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  const VecInt low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  const VecInt high = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  const VecInt first = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const VecInt second = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
#elif defined(__AVX2__)
  const VecInt low = {0, 8, 1, 9, 4, 12, 5, 13};
  const VecInt high = {2, 10, 3, 11, 6, 14, 7, 15};
  const VecInt first = {0, 1, 8, 9, 4, 5, 12, 13};
  const VecInt second = {2, 3, 10, 11, 6, 7, 14, 15};
#else
  const VecInt low = {0, 4, 1, 5};
  const VecInt high = {2, 6, 3, 7};
  const VecInt first = {0, 1, 4, 5};
  const VecInt second = {2, 3, 6, 7};
#endif
  const Vec ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const Vec cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  const Vec sums = __builtin_shuffle(ab, cd, first) + __builtin_shuffle(ab, cd, second);
  Four parts[LANES / 4];
  std::memcpy(parts, &sums, sizeof parts);
  for (int i = 1; i < LANES / 4; ++i) parts[0] += parts[i];
  return parts[0];
}

static inline float largest_lane(Vec value) {
  float lanes[LANES];
  store(lanes, value);
  for (int i = 1; i < LANES; ++i) lanes[0] = lanes[0] > lanes[i] ? lanes[0] : lanes[i];
  return lanes[0];
}

static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 0, to about 1 unit in the last place (the polynomial is Cephes' expf); e^-87.3 and below is not 0.
static inline Vec exp_nonpositive(Vec x) {
  x = maximum(x, broadcast(-87.3f));
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vec shifted = x * 1.44269504f + magic;
  Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  VecInt exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = exponent << 23;  // the integer n stands in the low bits of `shifted`
  VecInt bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits = bits + exponent;
  Vec result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
