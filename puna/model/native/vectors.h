// Sixteen numbers at once, in whatever registers the machine has.
//
// A vector is an array of parts, each a GCC vector of the machine's width, so the same code is one
// instruction with AVX-512, two with AVX2 and four with SSE or NEON. Where the machine has an
// instruction for a step it is called by name; elsewhere the step is written out.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PUNA_INLINE inline __attribute__((always_inline))

namespace puna {

constexpr int lanes = 16;
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define PUNA_AVX512 1
constexpr int part_lanes = 16;
#elif defined(__AVX2__)
#define PUNA_AVX2 1
constexpr int part_lanes = 8;
#else
constexpr int part_lanes = 4;
#endif
constexpr int parts = lanes / part_lanes;

typedef float FloatPart __attribute__((vector_size(part_lanes * 4)));
typedef std::int32_t IntPart __attribute__((vector_size(part_lanes * 4)));
typedef std::uint32_t WordPart __attribute__((vector_size(part_lanes * 4)));
typedef std::uint16_t HalfPart __attribute__((vector_size(part_lanes * 2)));
typedef std::int8_t BytePart __attribute__((vector_size(part_lanes)));

struct Floats {
  FloatPart part[parts];
};
struct Ints {
  IntPart part[parts];
};

PUNA_INLINE Floats load(const void* source) {
  Floats value;
  std::memcpy(&value, source, sizeof value);
  return value;
}
PUNA_INLINE Ints load_ints(const void* source) {
  Ints value;
  std::memcpy(&value, source, sizeof value);
  return value;
}
PUNA_INLINE void store(void* target, Floats value) { std::memcpy(target, &value, sizeof value); }

PUNA_INLINE Floats broadcast(float number) {
  Floats value;
  for (int i = 0; i < parts; i++) value.part[i] = number - FloatPart{};
  return value;
}
PUNA_INLINE Ints broadcast(std::int32_t number) {
  Ints value;
  for (int i = 0; i < parts; i++) value.part[i] = number - IntPart{};
  return value;
}
// The 32 bits at `source`, in every lane.
PUNA_INLINE Ints broadcast_word(const void* source) {
  std::int32_t word;
  std::memcpy(&word, source, sizeof word);
  return broadcast(word);
}

#define PUNA_OPERATOR(sign)                                          \
  PUNA_INLINE Floats operator sign(Floats a, Floats b) {             \
    for (int i = 0; i < parts; i++) a.part[i] = a.part[i] sign b.part[i]; \
    return a;                                                        \
  }
PUNA_OPERATOR(+)
PUNA_OPERATOR(-)
PUNA_OPERATOR(*)
PUNA_OPERATOR(/)
#undef PUNA_OPERATOR

PUNA_INLINE FloatPart fused_part(FloatPart a, FloatPart b, FloatPart c) {
#if defined(PUNA_AVX512)
  return (FloatPart)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PUNA_AVX2) && defined(__FMA__)
  return (FloatPart)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (FloatPart)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
// a * b + c; the build forbids the compiler to fuse on its own, so this is the only place that does.
PUNA_INLINE Floats fused(Floats a, Floats b, Floats c) {
  for (int i = 0; i < parts; i++) c.part[i] = fused_part(a.part[i], b.part[i], c.part[i]);
  return c;
}

PUNA_INLINE Floats largest(Floats a, Floats b) {
  for (int i = 0; i < parts; i++) {
#if defined(PUNA_AVX512)
    a.part[i] = (FloatPart)_mm512_max_ps((__m512)a.part[i], (__m512)b.part[i]);
#elif defined(PUNA_AVX2)
    a.part[i] = (FloatPart)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i]);
#else
    a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
#endif
  }
  return a;
}

PUNA_INLINE Floats magnitude(Floats a) {
  for (int i = 0; i < parts; i++) a.part[i] = (FloatPart)((IntPart)a.part[i] & 0x7fffffff);
  return a;
}

// Both folds take the lanes in one fixed order.
PUNA_INLINE float sum(Floats a) {
#if defined(PUNA_AVX512)
  return _mm512_reduce_add_ps((__m512)a.part[0]);
#else
  float lane[lanes];
  store(lane, a);
  for (int step = lanes / 2; step; step /= 2)
    for (int i = 0; i < step; i++) lane[i] += lane[i + step];
  return lane[0];
#endif
}
PUNA_INLINE float maximum(Floats a) {
#if defined(PUNA_AVX512)
  return _mm512_reduce_max_ps((__m512)a.part[0]);
#else
  float lane[lanes];
  store(lane, a);
  for (int step = lanes / 2; step; step /= 2)
    for (int i = 0; i < step; i++) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  return lane[0];
#endif
}

// Nearest whole numbers of |a| < 2^22, halves to even: adding 1.5 * 2^23 leaves them in the low bits.
constexpr float rounding = 12582912.0f;
constexpr std::int32_t rounding_bits = 0x4b400000;
PUNA_INLINE Ints nearest(Floats a) {
  Ints whole;
  for (int i = 0; i < parts; i++) whole.part[i] = (IntPart)(a.part[i] + rounding) - rounding_bits;
  return whole;
}
PUNA_INLINE Floats to_floats(Ints a) {
  Floats value;
  for (int i = 0; i < parts; i++) value.part[i] = __builtin_convertvector(a.part[i], FloatPart);
  return value;
}
PUNA_INLINE void store_bytes(std::int8_t* target, Ints a) {
  for (int i = 0; i < parts; i++) {
    const BytePart bytes = __builtin_convertvector(a.part[i], BytePart);
    std::memcpy(target + i * part_lanes, &bytes, sizeof bytes);
  }
}

// 2^a to about one unit in the last place; zero, or next to it, below the smallest normal number.
PUNA_INLINE Floats exp2(Floats a) {
  // A polynomial of degree 6 through Chebyshev points of [-1/2, 1/2].
  constexpr float c0 = 1.0f, c1 = 0.693147182f, c2 = 0.240226507f, c3 = 0.0555032715f;
  constexpr float c4 = 0.00961805694f, c5 = 0.0013400428f, c6 = 0.000154614449f;
  Floats result;
  for (int i = 0; i < parts; i++) {
#if defined(PUNA_AVX512)
    const FloatPart whole = (FloatPart)_mm512_roundscale_ps((__m512)a.part[i], _MM_FROUND_TO_NEAREST_INT);
    const FloatPart rest = a.part[i] - whole;
#else
    const FloatPart least = FloatPart{} - 126.0f, most = FloatPart{} + 127.0f;
    FloatPart x = a.part[i] < least ? least : a.part[i];
    x = x > most ? most : x;
    const FloatPart shifted = x + rounding;
    const IntPart whole = (IntPart)shifted - rounding_bits;
    const FloatPart rest = x - (shifted - rounding);
#endif
    FloatPart value = fused_part(FloatPart{} + c6, rest, FloatPart{} + c5);
    value = fused_part(value, rest, FloatPart{} + c4);
    value = fused_part(value, rest, FloatPart{} + c3);
    value = fused_part(value, rest, FloatPart{} + c2);
    value = fused_part(value, rest, FloatPart{} + c1);
    value = fused_part(value, rest, FloatPart{} + c0);
#if defined(PUNA_AVX512)
    result.part[i] = (FloatPart)_mm512_scalef_ps((__m512)value, (__m512)whole);
#else
    value = (FloatPart)((IntPart)value + (whole << 23));
    result.part[i] = a.part[i] < least ? FloatPart{} : value;
#endif
  }
  return result;
}

// ---- 16-bit numbers -----------------------------------------------------------------------------

PUNA_INLINE std::uint16_t to_bfloat16(float number) {
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
PUNA_INLINE float from_bfloat16(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}
// Nearest bfloat16 numbers, halves to even.
PUNA_INLINE void store_bfloat16(std::uint16_t* target, Floats a) {
#if defined(PUNA_AVX512) && defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)a.part[0]);
  std::memcpy(target, &halves, sizeof halves);
#else
  for (int i = 0; i < parts; i++) {
    const WordPart bits = (WordPart)a.part[i];
    const WordPart rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const HalfPart halves = __builtin_convertvector(rounded, HalfPart);
    std::memcpy(target + i * part_lanes, &halves, sizeof halves);
  }
#endif
}
// Finite IEEE half precision; moving the exponent by a product is exact, subnormal numbers included.
PUNA_INLINE Floats load_half(const std::uint16_t* source) {
  Floats value;
#if defined(PUNA_AVX512)
  value.part[0] = (FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#else
  constexpr float two_to_112 = 5192296858534827628530496329220096.0f;
  for (int i = 0; i < parts; i++) {
    HalfPart halves;
    std::memcpy(&halves, source + i * part_lanes, sizeof halves);
    const WordPart bits = __builtin_convertvector(halves, WordPart);
    const FloatPart size = (FloatPart)((bits & 0x7fff) << 13) * two_to_112;
    value.part[i] = (FloatPart)((WordPart)size | ((bits & 0x8000) << 16));
  }
#endif
  return value;
}

// ---- dot products -------------------------------------------------------------------------------

// total + the products of two pairs of bfloat16 numbers in each lane.
PUNA_INLINE Floats dot_bfloat16(Floats total, Ints a, Ints b) {
#if defined(PUNA_AVX512) && defined(__AVX512BF16__)
  total.part[0] = (FloatPart)_mm512_dpbf16_ps((__m512)total.part[0], (__m512bh)a.part[0], (__m512bh)b.part[0]);
#else
  for (int i = 0; i < parts; i++) {
    const WordPart left = (WordPart)a.part[i], right = (WordPart)b.part[i];
    total.part[i] = fused_part((FloatPart)(left << 16), (FloatPart)(right << 16), total.part[i]);
    const FloatPart high = (FloatPart)(left & 0xffff0000u);
    total.part[i] = fused_part(high, (FloatPart)(right & 0xffff0000u), total.part[i]);
  }
#endif
  return total;
}

// total + the products of four unsigned bytes with four signed bytes in each lane; exact.
PUNA_INLINE Ints dot_bytes(Ints total, Ints positive, Ints with_sign) {
#if defined(PUNA_AVX512) && defined(__AVX512VNNI__)
  total.part[0] =
      (IntPart)_mm512_dpbusd_epi32((__m512i)total.part[0], (__m512i)positive.part[0], (__m512i)with_sign.part[0]);
#elif defined(PUNA_AVX2) && defined(__AVXVNNI__)
  for (int i = 0; i < parts; i++)
    total.part[i] = (IntPart)_mm256_dpbusd_avx_epi32((__m256i)total.part[i], (__m256i)positive.part[i],
                                                     (__m256i)with_sign.part[i]);
#elif defined(PUNA_AVX2)
  const __m256i low = _mm256_set1_epi16(0xff);
  for (int i = 0; i < parts; i++) {
    const __m256i u = (__m256i)positive.part[i], s = (__m256i)with_sign.part[i];
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    total.part[i] += (IntPart)_mm256_add_epi32(even, odd);
  }
#else
  for (int i = 0; i < parts; i++)
    for (int byte = 0; byte < 4; byte++) {
      const IntPart u = (IntPart)(((WordPart)positive.part[i] >> (8 * byte)) & 0xff);
      const IntPart s = (IntPart)((WordPart)with_sign.part[i] << (24 - 8 * byte)) >> 24;
      total.part[i] += u * s;
    }
#endif
  return total;
}

PUNA_INLINE Ints low_nibbles(Ints a) {
  for (int i = 0; i < parts; i++) a.part[i] &= 0x0f0f0f0f;
  return a;
}
PUNA_INLINE Ints high_nibbles(Ints a) {
  for (int i = 0; i < parts; i++) a.part[i] = (IntPart)((WordPart)a.part[i] >> 4) & 0x0f0f0f0f;
  return a;
}

}  // namespace puna
