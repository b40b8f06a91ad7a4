// bfloat16: the upper half of a float. Arithmetic is done in float. The conversions work on the bits and without
// branches: loops with them vectorise, and NaN stays NaN whatever the compiler may assume about floating point.
#pragma once
#include <stdint.h>
#include <string.h>
#include <type_traits>

struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    template <class T, class = std::enable_if_t<std::is_arithmetic<T>::value>>
    inline __attribute__((always_inline)) __nv_bfloat16(T value) : bits(round((float)value)) {}

    inline __attribute__((always_inline)) operator float() const {
        uint32_t u = (uint32_t)bits << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }

    static inline __attribute__((always_inline)) __nv_bfloat16 of_bits(uint16_t bits) {
        __nv_bfloat16 x;
        x.bits = bits;
        return x;
    }

private:
    // To nearest, ties to even; every NaN becomes 0x7fff, as on the GPU.
    static inline __attribute__((always_inline)) uint16_t round(float f) {
        uint32_t u;
        memcpy(&u, &f, 4);
        uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
    }
};
static_assert(sizeof(__nv_bfloat16) == 2 && std::is_trivially_copyable<__nv_bfloat16>::value, "as on the GPU");
typedef __nv_bfloat16 nv_bfloat16;

static inline float __bfloat162float(__nv_bfloat16 x) { return (float)x; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return __nv_bfloat16::of_bits(x); }
static inline __nv_bfloat16 __float2bfloat16(float x) { return (__nv_bfloat16)x; }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) { return (__nv_bfloat16)x; }

// Each operation is done in float and rounded, as on the GPU. Without these operators x * y would be a float here and a
// __nv_bfloat16 with nvcc.
static inline __nv_bfloat16 operator+(__nv_bfloat16 a, __nv_bfloat16 b) { return (__nv_bfloat16)((float)a + (float)b); }
static inline __nv_bfloat16 operator-(__nv_bfloat16 a, __nv_bfloat16 b) { return (__nv_bfloat16)((float)a - (float)b); }
static inline __nv_bfloat16 operator*(__nv_bfloat16 a, __nv_bfloat16 b) { return (__nv_bfloat16)((float)a * (float)b); }
static inline __nv_bfloat16 operator/(__nv_bfloat16 a, __nv_bfloat16 b) { return (__nv_bfloat16)((float)a / (float)b); }
