// Depthwise 3x3x3 convolutions of channels-last volumes (D, H, W, C): plain, of stride 2, and transposed.
//
// C is 8 or a multiple of 16. Where s is given it receives the sums over voxels and the sums of squares, (2, C).
#include "vectors.h"

// p: zero padded (D+2, H+2, W+2, C) with 64 floats of slack
extern "C" void dw_pad(const float* x, float* p, long D, long H, long W, long C) {
    long row = W * C, prow = (W + 2) * C, plane = (H + 2) * prow;
    memset(p, 0, plane * 4);
    for (long d = 0; d < D; d++) {
        float* q = p + (d + 1) * plane;
        memset(q, 0, prow * 4);
        for (long h = 0; h < H; h++) {
            float* r = q + (h + 1) * prow;
            memset(r, 0, C * 4);
            memcpy(r + C, x + (d * H + h) * row, row * 4);
            memset(r + C + row, 0, C * 4);
        }
        memset(q + (H + 1) * prow, 0, prow * 4);
    }
    memset(p + (D + 1) * plane, 0, (plane + 64) * 4);
}
static void weights16(const float* w, std::vector<float>& t, long C, bool flip) {  // w (27, C) -> (P, 27, 16)
    long P = C <= 16 ? 1 : C / 16;
    t.assign(P * 27 * 16, 0);
    for (long q = 0; q < P; q++)
        for (long k = 0; k < 27; k++)
            for (long l = 0; l < 16; l++) t[(q * 27 + k) * 16 + l] = w[(flip ? 26 - k : k) * C + (q * 16 + l) % C];
}
template <int M>
static inline void taps(const float* const* base, long off, const float* w, v16 b, v16* acc, long step) {
    for (int m = 0; m < M; m++) acc[m] = b;
    for (int k = 0; k < 27; k++) {
        v16 v = ld(w + k * 16);
        for (int m = 0; m < M; m++) acc[m] += v * ld(base[k] + off + m * step);
    }
}
// y (D, H, W, C) = depthwise of padded p, with sums and sums of squares over voxels where s is given
extern "C" void dw_fwd(
    const float* p, const float* w, const float* b, float* y, double* s, long D, long H, long W, long C, int flip) {
    std::vector<float> t;
    weights16(w, t, C, flip);
    long P = C <= 16 ? 1 : C / 16, row = W * C, prow = (W + 2) * C, plane = (H + 2) * prow, n = (row + 15) / 16;
    std::vector<float> buf(n * 16 + 64), bias(P * 16, 0.f);
    if (b)
        for (long i = 0; i < P * 16; i++) bias[i] = b[i % C];
    std::vector<double> S(P * 32, 0.0);
    for (long d = 0; d < D; d++)
        for (long h = 0; h < H; h++) {
            const float* base[27];
            for (int k = 0; k < 27; k++) base[k] = p + (d + k / 9) * plane + (h + k / 3 % 3) * prow + (k % 3) * C;
            for (long q = 0; q < P; q++) {
                const float* wt = t.data() + q * 27 * 16;
                v16 bv = ld(bias.data() + q * 16);
                long j = q;
                for (; j + 3 * P < n; j += 4 * P) {
                    v16 a[4];
                    taps<4>(base, j * 16, wt, bv, a, P * 16);
                    for (int m = 0; m < 4; m++) st(buf.data() + (j + m * P) * 16, a[m]);
                }
                for (; j < n; j += P) {
                    v16 a[1];
                    taps<1>(base, j * 16, wt, bv, a, 0);
                    st(buf.data() + j * 16, a[0]);
                }
            }
            if (row % 16) memset(buf.data() + row, 0, (n * 16 - row) * 4);
            memcpy(y + (d * H + h) * row, buf.data(), row * 4);
            if (s)
                for (long q = 0; q < P; q++) {
                    v16 a = v16{}, c = v16{};
                    for (long j = q; j < n; j += P) {
                        v16 v = ld(buf.data() + j * 16);
                        a += v;
                        c += v * v;
                    }
                    for (int l = 0; l < 16; l++) {
                        S[q * 32 + l] += a[l];
                        S[q * 32 + 16 + l] += c[l];
                    }
                }
        }
    if (s) {
        for (long c = 0; c < 2 * C; c++) s[c] = 0;
        for (long q = 0; q < P; q++)
            for (int l = 0; l < 16; l++) {
                s[(q * 16 + l) % C] += S[q * 32 + l];
                s[C + (q * 16 + l) % C] += S[q * 32 + 16 + l];
            }
    }
}
// gw (27, C), gb (C) of padded p and g (D, H, W, C)
extern "C" void dw_wgrad(const float* p, const float* g, float* gw, float* gb, long D, long H, long W, long C) {
    long P = C <= 16 ? 1 : C / 16, row = W * C, prow = (W + 2) * C, plane = (H + 2) * prow, n = (row + 15) / 16;
    std::vector<float> buf(n * 16, 0.f);
    std::vector<double> A(P * 28 * 16, 0.0);
    for (long d = 0; d < D; d++)
        for (long h = 0; h < H; h++) {
            const float* base[27];
            for (int k = 0; k < 27; k++) base[k] = p + (d + k / 9) * plane + (h + k / 3 % 3) * prow + (k % 3) * C;
            const float* gr = g + (d * H + h) * row;
            if (row % 16) {
                memcpy(buf.data(), gr, row * 4);
                gr = buf.data();
            }
            for (long q = 0; q < P; q++) {
                v16 a[28];
                for (int k = 0; k < 28; k++) a[k] = v16{};
                for (long j = q; j < n; j += P) {
                    v16 v = ld(gr + j * 16);
                    a[27] += v;
#pragma GCC unroll 27
                    for (int k = 0; k < 27; k++) a[k] += v * ld(base[k] + j * 16);
                }
                double* B = A.data() + q * 28 * 16;
                for (int k = 0; k < 28; k++)
                    for (int l = 0; l < 16; l++) B[k * 16 + l] += a[k][l];
            }
        }
    memset(gw, 0, 27 * C * 4);
    memset(gb, 0, C * 4);
    for (long q = 0; q < P; q++)
        for (int k = 0; k < 28; k++)
            for (int l = 0; l < 16; l++) (k < 27 ? gw + k * C : gb)[(q * 16 + l) % C] += A[(q * 28 + k) * 16 + l];
}
// stride 2: y (D, H, W, C) from padded p of (2D, 2H, 2W, C)
template <int C>
static void dws(
    const float* p, const float* w, const float* b, float* y, double* s, long D, long H, long W, long PH, long PW) {
    typedef Vec<C> X;
    typedef typename X::T vc;
    long prow = PW * C, plane = PH * prow;
    double S[2 * C] = {};
    for (long d = 0; d < D; d++)
        for (long h = 0; h < H; h++)
            for (int q = 0; q < X::M; q++) {
                vc a1 = vc{}, a2 = vc{};
                const float* base = p + 2 * d * plane + 2 * h * prow + q * X::L;
                for (long x = 0; x < W; x++) {
                    const float* u = base + 2 * x * C;
                    vc a[3] = {b ? get<vc>(b + q * X::L) : vc{}};
#pragma GCC unroll 27
                    for (int k = 0; k < 27; k++)
                        a[k % 3] += get<vc>(u + (k / 9) * plane + (k / 3 % 3) * prow + (k % 3) * C) *
                                    get<vc>(w + k * C + q * X::L);
                    vc o = a[0] + a[1] + a[2];
                    put<vc>(y + ((d * H + h) * W + x) * C + q * X::L, o);
                    a1 += o;
                    a2 += o * o;
                }
                for (int l = 0; l < X::L; l++) {
                    S[q * X::L + l] += a1[l];
                    S[C + q * X::L + l] += a2[l];
                }
            }
    if (s)
        for (int c = 0; c < 2 * C; c++) s[c] = S[c];
}
template <int C>
static void dws_wgrad(const float* p, const float* g, float* gw, float* gb, long D, long H, long W, long PH, long PW) {
    typedef Vec<C> X;
    typedef typename X::T vc;
    long prow = PW * C, plane = PH * prow;
    memset(gw, 0, 27 * C * 4);
    memset(gb, 0, C * 4);
    for (long d = 0; d < D; d++)
        for (long h = 0; h < H; h++)
            for (int q = 0; q < X::M; q++) {
                vc a[28];
                for (int k = 0; k < 28; k++) a[k] = vc{};
                const float* v = g + (d * H + h) * W * C + q * X::L;
                const float* r = p + 2 * d * plane + 2 * h * prow + q * X::L;
                for (long x = 0; x < W; x++) {
                    vc gv = get<vc>(v + x * C);
                    const float* u = r + 2 * x * C;
                    a[27] += gv;
#pragma GCC unroll 27
                    for (int k = 0; k < 27; k++)
                        a[k] += gv * get<vc>(u + (k / 9) * plane + (k / 3 % 3) * prow + (k % 3) * C);
                }
                for (int k = 0; k < 28; k++)
                    for (int l = 0; l < X::L; l++) (k < 27 ? gw + k * C : gb)[q * X::L + l] += a[k][l];
            }
}
#define CASES(F, ...)            \
    switch (C) {                 \
        case 8:                  \
            F<8>(__VA_ARGS__);   \
            break;               \
        case 16:                 \
            F<16>(__VA_ARGS__);  \
            break;               \
        case 32:                 \
            F<32>(__VA_ARGS__);  \
            break;               \
        case 64:                 \
            F<64>(__VA_ARGS__);  \
            break;               \
        case 128:                \
            F<128>(__VA_ARGS__); \
            break;               \
        default:                 \
            abort();             \
    }
extern "C" void dws_fwd(const float* p, const float* w, const float* b, float* y, double* s, long D, long H, long W,
    long PH, long PW, long C) {
    CASES(dws, p, w, b, y, s, D, H, W, PH, PW)
}
extern "C" void dws_wg(
    const float* p, const float* g, float* gw, float* gb, long D, long H, long W, long PH, long PW, long C) {
    CASES(dws_wgrad, p, g, gw, gb, D, H, W, PH, PW)
}
// transposed, stride 2: y (2D-1, 2H-1, 2W-1, C) of x (D, H, W, C): y[o] = sum over 2i + k - 1 = o of x[i] w[k]
template <int C>
static void dwt(const float* x, const float* w, const float* b, float* y, double* s, long D, long H, long W) {
    typedef Vec<C> X;
    typedef typename X::T vc;
    long OD = 2 * D - 1, OH = 2 * H - 1, OW = 2 * W - 1;
    double S[2 * C] = {};
    for (long d = 0; d < OD; d++)
        for (long h = 0; h < OH; h++) {
            const float* r[4];
            int kk[4];
            int n = 0;
            for (int kd = 0; kd < 3; kd++)
                if ((d + 1 - kd) % 2 == 0)
                    for (int kh = 0; kh < 3; kh++)
                        if ((h + 1 - kh) % 2 == 0) {
                            r[n] = x + ((d + 1 - kd) / 2 * H + (h + 1 - kh) / 2) * W * C;
                            kk[n++] = (kd * 3 + kh) * 3;
                        }
            for (int q = 0; q < X::M; q++) {
                vc a1 = vc{}, a2 = vc{}, bv = get<vc>(b + q * X::L), w0[4], w1[4], w2[4];
                for (int j = 0; j < n; j++) {
                    w0[j] = get<vc>(w + kk[j] * C + q * X::L);
                    w1[j] = get<vc>(w + (kk[j] + 1) * C + q * X::L);
                    w2[j] = get<vc>(w + (kk[j] + 2) * C + q * X::L);
                }
                float* o = y + (d * OH + h) * OW * C + q * X::L;
                for (long i = 0; i < W; i++) {
                    vc e = bv, f = bv;
                    for (int j = 0; j < n; j++) {
                        vc v = get<vc>(r[j] + i * C + q * X::L);
                        e += v * w1[j];
                        if (i + 1 < W) f += v * w2[j] + get<vc>(r[j] + (i + 1) * C + q * X::L) * w0[j];
                    }
                    put<vc>(o + 2 * i * C, e);
                    a1 += e;
                    a2 += e * e;
                    if (i + 1 < W) {
                        put<vc>(o + (2 * i + 1) * C, f);
                        a1 += f;
                        a2 += f * f;
                    }
                }
                for (int l = 0; l < X::L; l++) {
                    S[q * X::L + l] += a1[l];
                    S[C + q * X::L + l] += a2[l];
                }
            }
        }
    for (int c = 0; c < 2 * C; c++) s[c] = S[c];
}
extern "C" void dwt_fwd(
    const float* x, const float* w, const float* b, float* y, double* s, long D, long H, long W, long C) {
    CASES(dwt, x, w, b, y, s, D, H, W)
}
// g + gs + 2 y gq in place of g
extern "C" void moments_bwd(float* g, const float* y, const float* gs, const float* gq, long V, long C) {
    for (long v = 0; v < V; v++)
        for (long c = 0; c < C; c++) g[v * C + c] += gs[c] + 2 * y[v * C + c] * gq[c];
}
