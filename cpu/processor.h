// Which of a processor's features this build uses, and which of them the processor has. Bit i of a set is the i-th
// feature of the list. The list has what g++ may use in ordinary code, by name and macro. What only intrinsics use,
// such as sse4a and vaes, is left out: a processor without it runs the program.
#pragma once

#if defined(__x86_64__)
#define PROCESSOR_FEATURES(F) \
    F("sse3", __SSE3__) F("ssse3", __SSSE3__) F("sse4.1", __SSE4_1__) F("sse4.2", __SSE4_2__) F("popcnt", __POPCNT__) \
    F("lzcnt", __LZCNT__) F("movbe", __MOVBE__) F("bmi", __BMI__) F("bmi2", __BMI2__) F("avx", __AVX__) \
    F("avx2", __AVX2__) F("fma", __FMA__) F("f16c", __F16C__) F("fma4", __FMA4__) F("xop", __XOP__) \
    F("tbm", __TBM__) F("gfni", __GFNI__) F("avxvnni", __AVXVNNI__) F("avx512f", __AVX512F__) \
    F("avx512cd", __AVX512CD__) F("avx512bw", __AVX512BW__) F("avx512dq", __AVX512DQ__) F("avx512vl", __AVX512VL__) \
    F("avx512ifma", __AVX512IFMA__) F("avx512vbmi", __AVX512VBMI__) F("avx512vbmi2", __AVX512VBMI2__) \
    F("avx512vnni", __AVX512VNNI__) F("avx512bitalg", __AVX512BITALG__) \
    F("avx512vpopcntdq", __AVX512VPOPCNTDQ__) F("avx512bf16", __AVX512BF16__) F("avx512fp16", __AVX512FP16__) \
    PROCESSOR_FEATURES_OF_GCC_14(F)
#if __GNUC__ >= 14
#define PROCESSOR_FEATURES_OF_GCC_14(F) \
    F("avxifma", __AVXIFMA__) F("avxvnniint8", __AVXVNNIINT8__) F("avxvnniint16", __AVXVNNIINT16__) \
    F("avxneconvert", __AVXNECONVERT__) F("apxf", __APX_F__)
#else
#define PROCESSOR_FEATURES_OF_GCC_14(F)
#endif
#else
#define PROCESSOR_FEATURES(F)
#endif

// What the build uses: a constant, in an object that is compiled with the build's options (device.cpp)
extern const unsigned long long processor_needs;

// Writes the line that reports what is missing into `line` (its end is cut where it does not fit), and returns its
// length: 0 where nothing is missing.
unsigned long processor_report(unsigned long long needs, unsigned long long has, char* line, unsigned long size);
