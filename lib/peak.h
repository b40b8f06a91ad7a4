// The most that a device can compute, in FLOP/s: as NVIDIA publishes it, or as a large product shows. Of it MFU (model
// FLOPs utilization, Chowdhery et al. 2022, arXiv 2204.02311) is a share.
//
// Included once, by olmoe.cu, after matmul_forward and init_normal_kernel.
#pragma once
#include <cctype>
#include "cuda.h"

// In TFLOP/s: dense BF16 with fp32 sums, by tensor cores, and FP32 without them, since no TF32 is used; 0: none is
// published. `device` is what the driver calls it, without NVIDIA, Tesla, GeForce and the size of its memory.
struct PublishedPeak { const char* device; double bf16, fp32; const char* source; };

// Where a source has only the figure with sparsity, half of it. The sources:
//   V100, T4, A10, A30, A40, A100, L4, L40, L40S, GH200 data sheets: nvidia.com/en-us/data-center/, under the name
//   H100 white paper: "NVIDIA H100 Tensor Core GPU Architecture", table 3 (the PCIe and SXM5 cards)
//   H100, H200, HGX, GB200 NVL72 pages: nvidia.com/en-us/data-center/{h100,h200,hgx,gb200-nvl72}/; HGX over its 8 GPUs,
//   GB200 NVL72 over its 72
//   GA102, Ada and RTX Blackwell white papers: "NVIDIA Ampere GA102 GPU Architecture", "NVIDIA Ada GPU Architecture",
//   "NVIDIA RTX Blackwell GPU Architecture", "NVIDIA Ada Lovelace Professional GPU Architecture", appendices
static const PublishedPeak published_peaks[] = {
    {"V100 PCIE", 0, 14, "V100 data sheet"},
    {"V100 SXM2", 0, 15.7, "V100 data sheet"},
    {"V100S PCIE", 0, 16.4, "V100 data sheet"},
    {"T4", 0, 8.1, "T4 data sheet"},
    {"A10", 125, 31.2, "A10 data sheet"},
    {"A30", 165, 10.3, "A30 data sheet"},
    {"A40", 149.7, 37.4, "A40 data sheet"},
    {"A100 PCIE", 312, 19.5, "A100 data sheet"},
    {"A100 SXM4", 312, 19.5, "A100 data sheet"},
    {"RTX A6000", 154.8, 38.7, "GA102 white paper"},
    {"RTX 3080", 59.5, 29.8, "GA102 white paper"},
    {"RTX 3090", 71, 35.6, "GA102 white paper"},
    {"RTX 4080", 97.5, 48.7, "Ada white paper"},
    {"RTX 4090", 165.2, 82.6, "Ada white paper"},
    {"RTX 6000 ADA GENERATION", 364.2, 91.1, "Ada professional white paper"},
    {"L4", 121, 30.3, "L4 data sheet"},
    {"L40", 181.05, 90.5, "L40 data sheet"},
    {"L40S", 362.05, 91.6, "L40S data sheet"},
    {"H100 PCIE", 756, 51.2, "H100 white paper"},
    {"H100 HBM3", 989.4, 66.9, "H100 white paper"},           // SXM5
    {"H100 NVL", 835.5, 60, "H100 page"},
    {"H200", 989.5, 67, "H200 page"},
    {"H200 NVL", 835.5, 60, "H200 page"},
    {"GH200", 989.5, 67, "GH200 data sheet"},
    {"B200", 2250, 75, "HGX page"},
    {"GB200", 2500, 80, "GB200 NVL72 page"},
    {"RTX 5080", 112.6, 56.3, "RTX Blackwell white paper"},
    {"RTX 5090", 209.5, 104.8, "RTX Blackwell white paper"},
};

// The line of a device, or null. A name has to agree in all words that matter: what is appended to a known name (MIG,
// Laptop GPU, Ti, D) is another device.
const PublishedPeak* published_peak(const std::string& device) {
    std::string key, word;
    for (char ch : device + " ") {
        if (ch != ' ' && ch != '-') { word += (char)toupper((unsigned char)ch); continue; }
        const size_t number = word.find_first_not_of("0123456789");
        const bool memory = number != 0 && number != std::string::npos && word.substr(number) == "GB";
        if (!word.empty() && !memory && word != "NVIDIA" && word != "TESLA" && word != "GEFORCE")
            key += (key.empty() ? "" : " ") + word;
        word.clear();
    }
    for (const PublishedPeak& p : published_peaks) if (key == p.device) return &p;
    return nullptr;
}

// c = a b^T of (n, n) matrices; a and b are random numbers. A product of zeros takes less power, so that a GPU runs at
// a higher clock than training ever sees.
struct PeakProduct { floatX *a, *b, *c; int n; };

PeakProduct product_open(int n) {
    PeakProduct p = {nullptr, nullptr, nullptr, n};
    const size_t count = (size_t)n * n;
    for (floatX** matrix : {&p.a, &p.b, &p.c}) {
        cudaCheck(cudaMalloc((void**)matrix, count * sizeof(floatX)));
        const size_t position = matrix == &p.b ? count : 0;
        if (matrix != &p.c) LAUNCH(init_normal_kernel, blocks_for(count), *matrix, count, position, 0, 1.f);
    }
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
    return p;
}

// Seconds that the product takes
double product_run(const PeakProduct& p) {
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
    const double start = seconds_now();
    matmul_forward(main_stream, p.c, p.a, p.b, p.n, p.n, p.n);
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
    return seconds_now() - start;
}

void product_close(const PeakProduct& p) { for (floatX* matrix : {p.a, p.b, p.c}) cudaCheck(cudaFree(matrix)); }

// FLOP/s of the fastest product in floatX: of matrices of 1024 rows, then twice as many, until one takes 2 ms or has
// 8192
double measure_peak() {
    double best = 0, seconds = 0;
    for (int n = 1024; n <= 8192 && seconds <= 2e-3; n *= 2) {
        const PeakProduct p = product_open(n);
        for (int i = 0; i < 4; i++) {
            seconds = product_run(p);
            best = std::max(best, 2.0 * n * n * n / seconds);
        }
        product_close(p);
    }
    return best;
}

// FLOP/s of a rank, and where the figure is from, for the run's table
struct Peak { double flops = 0; std::string source; };

// `given`: --peak-tflops, in TFLOP/s; 0: look for it
Peak machine_peak(double given) {
    if (given > 0) return {given * 1e12, "given"};
    const PublishedPeak* p = published_peak(machine_name());
    const double published = !p ? 0 : BF16 ? p->bf16 : p->fp32;
    if (published > 0)
        return {published * 1e12, text("%s, of NVIDIA's %s", BF16 ? "dense BF16" : "FP32", p->source)};
    return {measure_peak(), "a large product of random numbers, measured"};
}
