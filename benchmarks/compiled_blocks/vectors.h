// Vectors of floats as GCC has them; on a processor without AVX-512 one is worked off in two or four pieces.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>
typedef float v16 __attribute__((vector_size(64)));
static inline v16 ld(const float* p) {
    v16 v;
    memcpy(&v, p, 64);
    return v;
}
static inline void st(float* p, v16 v) { memcpy(p, &v, 64); }

typedef float v8 __attribute__((vector_size(32)));
template <int N>
struct Vec {
    typedef v16 T;
    static constexpr int L = 16, M = N / 16;
};
typedef float v4 __attribute__((vector_size(16)));
template <>
struct Vec<4> {
    typedef v4 T;
    static constexpr int L = 4, M = 1;
};
template <>
struct Vec<8> {
    typedef v8 T;
    static constexpr int L = 8, M = 1;
};
template <class T>
static inline T get(const float* p) {
    T v;
    memcpy(&v, p, sizeof(T));
    return v;
}
template <class T>
static inline void put(float* p, T v) {
    memcpy(p, &v, sizeof(T));
}
