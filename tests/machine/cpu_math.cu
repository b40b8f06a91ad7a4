// The fast build's arithmetic: its flags must neither lose NaN and infinity nor cost accuracy, vectorised or not.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

static int failures = 0;
static void check(bool ok, const char* what) {
    if (!ok) { failures++; printf("FAILED %s\n", what); }
}
static float bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

template <int which> __global__ void functions(float* y, const float* x, int n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)n) return;
    y[i] = which == 0 ? expf(x[i])
         : which == 1 ? logf(x[i])
         : which == 2 ? rsqrtf(x[i])
         : which == 3 ? cosf(x[i]) : powf(x[i], 1.25f);
}
__global__ void to_bf16(__nv_bfloat16* y, const float* x, int n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)n) y[i] = (__nv_bfloat16)x[i];
}
__global__ void row_max(float* y, const float* x, int C) {
    float max = -INFINITY;
    for (int i = 0; i < C; i++) max = fmaxf(max, x[i]);
    y[0] = max;
}
__global__ void row_sum(float* y, const float* x, int C) {
    float sum = 0;
    for (int i = 0; i < C; i++) sum += x[i] * x[i];
    y[0] = sum;
}
static bool all_finite(const float* x, int n) {
    bool ok = true;
    for (int i = 0; i < n; i++) ok &= std::isfinite(x[i]);
    return ok;
}
static bool within(const float* x, const float* want, int n, float tolerance) {
    for (int i = 0; i < n; i++) if (!(fabsf(x[i] - want[i]) <= tolerance)) return false;
    return true;
}

static const int n = 4099;              // whole vectors and a rest
static float *dx, *dy;                  // n numbers each

static void test_functions() {
    std::vector<float> x(n), got(n);
    for (int which = 0; which < 5; which++) {
        for (int i = 0; i < n; i++) x[i] = which == 0 ? (i - n / 2) * 0.04f : which == 3 ? i * 1.0f : 1e-3f + i * 0.37f;
        cudaMemcpy(dx, x.data(), n * 4, cudaMemcpyHostToDevice);
        int blocks = (n + 255) / 256;
        if (which == 0) functions<0><<<blocks, 256>>>(dy, dx, n);
        if (which == 1) functions<1><<<blocks, 256>>>(dy, dx, n);
        if (which == 2) functions<2><<<blocks, 256>>>(dy, dx, n);
        if (which == 3) functions<3><<<blocks, 256>>>(dy, dx, n);
        if (which == 4) functions<4><<<blocks, 256>>>(dy, dx, n);
        cudaMemcpy(got.data(), dy, n * 4, cudaMemcpyDeviceToHost);
        double worst = 0;
        for (int i = 0; i < n; i++) {
            double v = x[i], wanted[] = {exp(v), log(v), 1 / sqrt(v), cos(v), pow(v, 1.25)};
            double want = wanted[which], least = which == 0 ? 1e-37 : which == 1 || which == 3 ? 1. : 0.;
            double error = fabs(got[i] - want) / fmax(fabs(want), least);
            if (!(error <= worst)) worst = error;
        }
        printf("function %d: relative error %.1e\n", which, worst);
        check(worst <= 4 * 6e-8, "a function is within 4 units of the last place");       // what libmvec promises
    }
    float special[] = {NAN, INFINITY, -INFINITY, 1000, -1000, 0};
    for (int i = 0; i < n; i++) x[i] = special[i % 6];
    cudaMemcpy(dx, x.data(), n * 4, cudaMemcpyHostToDevice);
    functions<0><<<(n + 255) / 256, 256>>>(dy, dx, n);
    cudaMemcpy(got.data(), dy, n * 4, cudaMemcpyDeviceToHost);
    for (int i = 0; i < n; i++) {
        float want[] = {NAN, INFINITY, 0, INFINITY, 0, 1};
        check(std::isnan(want[i % 6]) ? std::isnan(got[i]) : got[i] == want[i % 6], "expf of NaN, infinity and zero");
    }
}

// NaN and infinity are seen wherever they are
static void test_not_finite() {
    std::vector<float> good(n, 1.f);
    check(all_finite(good.data(), n) && within(good.data(), good.data(), n, 0), "finite numbers pass");
    for (int at : {0, 1, 17, n / 2, n - 1})
        for (float bad : {(float)NAN, -(float)NAN, (float)INFINITY, -(float)INFINITY}) {
            std::vector<float> v = good;
            v[at] = bad;
            check(!all_finite(v.data(), n), "isfinite sees NaN and infinity");
            check(!within(v.data(), good.data(), n, 1e30f), "a comparison with NaN or infinity fails");
            cudaMemcpy(dx, v.data(), n * 4, cudaMemcpyHostToDevice);
            row_sum<<<1, 1>>>(dy, dx, n);
            float sum;
            cudaMemcpy(&sum, dy, 4, cudaMemcpyDeviceToHost);
            check(!(sum <= 1e30f), "a sum keeps NaN and infinity");
            row_max<<<1, 1>>>(dy, dx, n);
            float max;
            cudaMemcpy(&max, dy, 4, cudaMemcpyDeviceToHost);
            check(max == (bad == INFINITY ? INFINITY : 1.f), "fmaxf ignores NaN");
        }
}

// Every bit pattern of bf16 is the same after a conversion to float and back; floats round to nearest even
static void test_bf16() {
    check(sizeof(__nv_bfloat16) == 2, "size of bf16");
    for (uint32_t u = 0; u < 65536; u++) {
        __nv_bfloat16 h;
        uint16_t pattern = (uint16_t)u, back;
        memcpy(&h, &pattern, 2);
        __nv_bfloat16 again = (__nv_bfloat16)(float)h;
        memcpy(&back, &again, 2);
        check(std::isnan((float)h) ? std::isnan((float)again) : back == pattern, "bf16 to float and back");
    }
    std::vector<float> wide(1 << 18);
    for (size_t i = 0; i < wide.size(); i++) {
        size_t rest = i % 7 == 0 ? 0x8000 : i * 2654435761u % 16384;
        wide[i] = bits((uint32_t)(i * 16384 + rest));
    }
    std::vector<__nv_bfloat16> narrow(wide.size());
    float* dw;
    __nv_bfloat16* dn;
    cudaMalloc(&dw, wide.size() * 4);
    cudaMalloc(&dn, wide.size() * 2);
    cudaMemcpy(dw, wide.data(), wide.size() * 4, cudaMemcpyHostToDevice);
    to_bf16<<<(int)wide.size() / 256, 256>>>(dn, dw, (int)wide.size());
    cudaMemcpy(narrow.data(), dn, wide.size() * 2, cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < wide.size(); i++) {
        float f = wide[i], r = (float)narrow[i];
        if (std::isnan(f)) { check(std::isnan(r), "NaN to bf16"); continue; }
        uint32_t u;
        memcpy(&u, &f, 4);
        uint32_t low = u & 0xffff0000, high = low + 0x10000, rest = u & 0xffff;
        uint32_t want = rest > 0x8000 || (rest == 0x8000 && (low >> 16 & 1)) ? high : low, have;
        memcpy(&have, &r, 4);
        check(have == want, "float to bf16, to nearest even");
    }
}

int main() {
    cudaMalloc(&dx, n * 4);
    cudaMalloc(&dy, n * 4);
    test_functions();
    test_not_finite();
    test_bf16();
    printf(failures ? "%d failed\n" : "cpu_math ok\n", failures);
    return failures > 0;
}
