// Pointwise layers on rows (V, C) of V voxels: expansion with GELU, and plain linear ones.
#include "vectors.h"

typedef int i16 __attribute__((vector_size(64)));
static inline v16 bc(float x) { return v16{} + x; }
// exp by Cephes' polynomial.
static inline v16 vexp(v16 x) {  // x <= 0
    x = x < -87.f ? bc(-87.f) : x;
    v16 n = x * 1.44269504088896341f;
    i16 k = __builtin_convertvector(n - 0.5f, i16);
    v16 f = __builtin_convertvector(k, v16);
    x = x - f * 0.693359375f + f * 2.12194440e-4f;
    v16 p = bc(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * (x * x) + x + 1.f;
    i16 e = (k + 127) << 23;
    v16 s;
    memcpy(&s, &e, 64);
    return p * s;
}
// Cumulative distribution and density of the standard normal at a: erf by Abramowitz and Stegun 7.1.26, off by 1.5e-7
// at most.
static inline void normal(v16 a, v16& cdf, v16& pdf) {
    v16 m = a < 0.f ? -a : a;
    v16 e = vexp(-0.5f * a * a);
    v16 t = 1.f / (1.f + 0.3275911f * 0.70710678118f * m);
    v16 p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    v16 tail = 0.5f * p * e;
    cdf = a < 0.f ? tail : 1.f - tail;
    pdf = e * 0.3989422804f;
}

// h (V, E) = gelu(y (V, C) w (C, E) + b), n = sum of squares over voxels
template <int C, int E>
static void expand(const float* y, const float* w, const float* b, float* h, double* n, long V) {
    constexpr int T = E / 16;
    v16 W[C][T];
    for (int c = 0; c < C; c++)
        for (int t = 0; t < T; t++) W[c][t] = ld(w + c * E + t * 16);
    double N[E] = {};
    for (long v0 = 0; v0 < V; v0 += 512) {
        v16 s[T];
        for (int t = 0; t < T; t++) s[t] = v16{};
        for (long v = v0; v < V && v < v0 + 512; v++)
            for (int t = 0; t < T; t++) {
                v16 a = ld(b + t * 16);
#pragma GCC unroll 16
                for (int c = 0; c < C; c++) a += y[v * C + c] * W[c][t];
                v16 cdf, pdf;
                normal(a, cdf, pdf);
                a *= cdf;
                s[t] += a * a;
                st(h + v * E + t * 16, a);
            }
        for (int t = 0; t < T; t++)
            for (int l = 0; l < 16; l++) N[t * 16 + l] += s[t][l];
    }
    for (int e = 0; e < E; e++) n[e] = N[e];
}
template <int C, int E>
static void expand_bwd(const float* y, const float* w, const float* b, const float* h, const float* gh, const float* gn,
    float* gy, float* gw, float* gb, long V) {
    constexpr int T = E / 16;
    double GW[C][E] = {}, GB[E] = {};
    typedef Vec<C> X;
    typedef typename X::T vc;
    alignas(64) float wt[E][C];
    for (int c = 0; c < C; c++)
        for (int e = 0; e < E; e++) wt[e][c] = w[c * E + e];
    alignas(64) float ga[8][E];
    for (long v0 = 0; v0 < V; v0 += 512) {
        long v1 = v0 + 512 < V ? v0 + 512 : V;
        v16 A[T][C], B[T];
        for (int t = 0; t < T; t++) {
            B[t] = v16{};
            for (int c = 0; c < C; c++) A[t][c] = v16{};
        }
        for (long v = v0; v < v1; v += 8) {
            int m = v1 - v < 8 ? v1 - v : 8;
            for (int t = 0; t < T; t++) {
                v16 g2 = 2.f * ld(gn + t * 16), bb = ld(b + t * 16);
                for (int i = 0; i < m; i++) {
                    const float* yv = y + (v + i) * C;
                    v16 a = bb, a2 = v16{};
#pragma GCC unroll 16
                    for (int c = 0; c < C; c += 2) {
                        a += yv[c] * ld(w + c * E + t * 16);
                        a2 += yv[c + 1] * ld(w + (c + 1) * E + t * 16);
                    }
                    a += a2;
                    v16 cdf, pdf;
                    normal(a, cdf, pdf);
                    long o = (v + i) * E + t * 16;
                    v16 g = (ld(gh + o) + g2 * ld(h + o)) * (cdf + a * pdf);
                    st(&ga[i][t * 16], g);
                }
                v16 Bt = B[t], At[C];
#pragma GCC unroll 16
                for (int c = 0; c < C; c++) At[c] = A[t][c];
                for (int i = 0; i < m; i++) {
                    const float* yv = y + (v + i) * C;
                    v16 g = ld(&ga[i][t * 16]);
                    Bt += g;
#pragma GCC unroll 16
                    for (int c = 0; c < C; c++) At[c] += yv[c] * g;
                }
                B[t] = Bt;
#pragma GCC unroll 16
                for (int c = 0; c < C; c++) A[t][c] = At[c];
            }
            for (int i = 0; i < m; i++) {
                vc o[X::M][4] = {};
#pragma GCC unroll 4
                for (int e = 0; e < E; e += 4)
#pragma GCC unroll 4
                    for (int q = 0; q < 4; q++)
                        for (int p = 0; p < X::M; p++) o[p][q] += ga[i][e + q] * get<vc>(&wt[e + q][p * X::L]);
                for (int p = 0; p < X::M; p++)
                    put<vc>(gy + (v + i) * C + p * X::L, (o[p][0] + o[p][1]) + (o[p][2] + o[p][3]));
            }
        }
        for (int t = 0; t < T; t++)
            for (int l = 0; l < 16; l++) {
                GB[t * 16 + l] += B[t][l];
                for (int c = 0; c < C; c++) GW[c][t * 16 + l] += A[t][c][l];
            }
    }
    for (int e = 0; e < E; e++) {
        gb[e] = GB[e];
        for (int c = 0; c < C; c++) gw[c * E + e] = GW[c][e];
    }
}
// z (V, O) = h (V, E) w (E, O) + b + r
template <int E, int O>
static void linear(const float* h, const float* w, const float* b, const float* r, float* z, long V) {
    if constexpr (O % 8) {
        for (long v = 0; v < V; v++) {
            float a[O];
            for (int o = 0; o < O; o++) a[o] = b[o];
#pragma GCC unroll 16
            for (int e = 0; e < E; e++)
                for (int o = 0; o < O; o++) a[o] += h[v * E + e] * w[e * O + o];
            for (int o = 0; o < O; o++) z[v * O + o] = a[o];
        }
    } else {
        typedef Vec<O> X;
        typedef typename X::T vo;
        constexpr int K = 4;
        for (long v = 0; v < V; v += K) {
            long n = V - v < K ? V - v : K;
            vo a[K][X::M];
            long at[K];
#pragma GCC unroll 4
            for (int i = 0; i < K; i++) {
                at[i] = v + (i < n ? i : 0);
                for (int p = 0; p < X::M; p++) {
                    a[i][p] = get<vo>(b + p * X::L);
                    if (r) a[i][p] += get<vo>(r + at[i] * O + p * X::L);
                }
            }
#pragma GCC unroll 4
            for (int e = 0; e < E; e++)
                for (int p = 0; p < X::M; p++) {
                    vo wv = get<vo>(w + e * O + p * X::L);
#pragma GCC unroll 4
                    for (int i = 0; i < K; i++) a[i][p] += h[at[i] * E + e] * wv;
                }
            for (int i = 0; i < n; i++)
                for (int p = 0; p < X::M; p++) put<vo>(z + at[i] * O + p * X::L, a[i][p]);
        }
    }
}
template <int E, int O>
static void linear_bwd(const float* h, const float* w, const float* gz, float* gh, float* gw, float* gb, long V) {
    typedef Vec<E> X;
    typedef typename X::T ve;
    constexpr int Lh = X::L, M = X::M;
    alignas(64) float wt[O][E];
    for (int e = 0; e < E; e++)
        for (int o = 0; o < O; o++) wt[o][e] = w[e * O + o];
    double GW[O][E] = {}, GB[O] = {};
    for (long v0 = 0; v0 < V; v0 += 512) {
        long v1 = v0 + 512 < V ? v0 + 512 : V;
        float B[O] = {};
        for (long v = v0; v < v1; v++)
            for (int o = 0; o < O; o++) B[o] += gz[v * O + o];
        for (int m = 0; m < M; m++) {
            if (gh)
                for (long v = v0; v < v1; v++) {
                    ve a = ve{}, c = ve{};
#pragma GCC unroll 16
                    for (int o = 0; o < O; o++) (o % 2 ? a : c) += gz[v * O + o] * get<ve>(&wt[o][m * Lh]);
                    put<ve>(gh + v * E + m * Lh, a + c);
                }
            for (int o0 = 0; o0 < O; o0 += 16) {
                constexpr int K = O < 16 ? O : 16;
                ve A[K];
#pragma GCC unroll 16
                for (int o = 0; o < K; o++) A[o] = ve{};
                for (long v = v0; v < v1; v++) {
                    ve x = get<ve>(h + v * E + m * Lh);
#pragma GCC unroll 16
                    for (int o = 0; o < K; o++) A[o] += gz[v * O + o0 + o] * x;
                }
                for (int o = 0; o < K; o++)
                    for (int l = 0; l < Lh; l++) GW[o0 + o][m * Lh + l] += A[o][l];
            }
        }
        for (int o = 0; o < O; o++) GB[o] += B[o];
    }
    for (int o = 0; o < O; o++) {
        gb[o] = GB[o];
        for (int e = 0; e < E; e++) gw[e * O + o] = GW[o][e];
    }
}
// Channels in and out that are compiled: EXPANSIONS and LINEARS of blocks.py.
#define EXPANSIONS(F) F(8, 16) F(8, 32) F(16, 16) F(16, 32) F(16, 48)
#define LINEARS(F)                                                                                            \
    F(4, 8) F(4, 16) F(8, 3) F(8, 16) F(16, 3) F(16, 8) F(16, 16) F(16, 32) F(32, 8) F(32, 16) F(48, 16) F(48, 32)

extern "C" void expand_fwd(
    const float* y, const float* w, const float* b, float* h, double* n, long V, long C, long E) {
#define CASE(c, e) \
    if (C == c && E == e) return expand<c, e>(y, w, b, h, n, V);
    EXPANSIONS(CASE)
#undef CASE
    abort();
}
extern "C" void expand_back(const float* y, const float* w, const float* b, const float* h, const float* gh,
    const float* gn, float* gy, float* gw, float* gb, long V, long C, long E) {
#define CASE(c, e) \
    if (C == c && E == e) return expand_bwd<c, e>(y, w, b, h, gh, gn, gy, gw, gb, V);
    EXPANSIONS(CASE)
#undef CASE
    abort();
}
extern "C" void linear_fwd(
    const float* h, const float* w, const float* b, const float* r, float* z, long V, long E, long O) {
#define CASE(e, o) \
    if (E == e && O == o) return linear<e, o>(h, w, b, r, z, V);
    LINEARS(CASE)
#undef CASE
    abort();
}
extern "C" void linear_back(
    const float* h, const float* w, const float* gz, float* gh, float* gw, float* gb, long V, long E, long O) {
#define CASE(e, o) \
    if (E == e && O == o) return linear_bwd<e, o>(h, w, gz, gh, gw, gb, V);
    LINEARS(CASE)
#undef CASE
    abort();
}
