/*
Tests of olmoe.cu. Every kernel, forward and backward, and the whole model against twins in double precision that are
written from the formulas alone; the model against what PyTorch computed (tests/fixtures); its gradient against finite
differences of its loss.

    test_olmoe                    all of them
    test_olmoe --only kernel      those whose name contains "kernel"
    test_olmoe --list             their names

It prints a line for each tensor: its relative L2 error, and how much of its tolerance the worse of two measures used,
that error and the largest error of one element (against 8 tolerances of the element and of the tensor's root mean
square; not where tensors of different size are compared as one vector). NaN fails.
The checksum at the end is of all that the device computed: equal checksums mean equal bits.
*/
#define TESTING
#include "olmoe.cu"             // the program
#include <array>
#include <random>
#include <set>
#include <sys/wait.h>

// ------------------------------------------------------------------------------------------------
// Comparing

constexpr int CHUNK = WARP == 1 ? 64 : 512; // columns; odd sizes are beside its multiples
typedef std::vector<double> Vec;
typedef std::vector<int> Ints;

static int passed, failed;
static uint64_t checksum = 1469598103934665603u;                // FNV-1a

static void add_to_checksum(const void* bytes, size_t n) {
    for (size_t i = 0; i < n; i++) checksum = (checksum ^ ((const unsigned char*)bytes)[i]) * 1099511628211u;
}

static double l2(const Vec& v) {
    double sum = 0;
    for (double x : v) sum += x * x;
    return sqrt(sum);
}

// Relative L2; share of the tolerance, of which at most 1 is right
struct Difference { double error, share; };

static Difference difference(const Vec& got, const Vec& want, double tolerance, bool elementwise = true) {
    if (got.size() != want.size()) return {NAN, NAN};
    double square = 0, norm = l2(want), rms = norm / sqrt((double)std::max<size_t>(want.size(), 1)), worst = 0;
    for (size_t i = 0; i < got.size(); i++) {
        double d = fabs(got[i] - want[i]), allowed = 8 * tolerance * (fabs(want[i]) + rms);
        square += d * d;
        if (elementwise && !(d <= allowed * worst)) worst = d == 0 ? worst : d / allowed;
    }
    double error = square == 0 ? 0 : sqrt(square) / norm;       // infinite where all should be zero and is not
    double share = error == 0 ? 0 : error / tolerance;
    return {error, worst > share || std::isnan(worst) ? worst : share};
}

static void verdict(const std::string& name, bool ok) {
    (ok ? passed : failed)++;
    if (!ok) printf("%-64s FAILED\n", name.c_str());
}

static void check(const std::string& name, const Vec& got, const Vec& want, double tolerance, bool elementwise = true) {
    for (double x : got) add_to_checksum(&x, sizeof x);
    Difference d = difference(got, want, tolerance, elementwise);
    bool ok = d.error <= tolerance && d.share <= 1;
    (ok ? passed : failed)++;
    printf("%-64s error %.1e  %5.1f %% of its tolerance  %s\n", name.c_str(), d.error, 100 * d.share,
           ok ? "ok" : "FAILED");
}

static void check(const std::string& name, double got, double want, double tolerance) {
    check(name, Vec{got}, Vec{want}, tolerance);
}

// Equal values, element by element; a NaN equals nothing.
template <typename T>
static void check_equal(const std::string& name, const std::vector<T>& got, const std::vector<T>& want) {
    for (const T& x : got) add_to_checksum(&x, sizeof x);
    size_t wrong = got.size() == want.size() ? 0 : std::max(got.size(), want.size());
    if (!wrong) for (size_t i = 0; i < got.size(); i++) wrong += !(got[i] == want[i]);
    (wrong == 0 ? passed : failed)++;
    printf("%-64s %zu of %zu differ  %s\n", name.c_str(), wrong, want.size(), wrong == 0 ? "ok" : "FAILED");
}

static void check_true(const std::string& name, bool ok) {
    verdict(name, ok);
    if (ok) printf("%-64s ok\n", name.c_str());
}

// Unit roundoff of fp32 and of floatX. A tolerance is given by how many roundings to floatX and to fp32 an element goes
// through; a sum of n terms, of equal or of random signs, moves by about sqrt(n) roundings of its result. exp and log
// count 8.
constexpr double U32 = 0x1p-24, UX = BF16 ? 0x1p-8 : 0x1p-24;
static double roundings(double to_floatX, double to_fp32) { return to_floatX * UX + to_fp32 * U32; }

// ------------------------------------------------------------------------------------------------
// Data

static std::mt19937_64 engine;
static double random_uniform() { return (double)(engine() >> 11) * 0x1p-53; }      // [0, 1)
static int random_below(int n) { return (int)(engine() % (uint64_t)n); }

template <typename T> double rounded(double x) { return (double)(float)(T)(float)x; }

// Uniform with mean 0 and variance scale^2, rounded as the device will hold it
template <typename T = floatX>
static Vec random_vec(size_t n, double scale = 1) {
    Vec v(n);
    for (double& x : v) x = rounded<T>((2 * random_uniform() - 1) * sqrt(3.) * scale);
    return v;
}

static Ints random_ints(size_t n, int below) {
    Ints v(n);
    for (int& x : v) x = random_below(below);
    return v;
}

// Elements [first, first + count)
template <typename T> static std::vector<T> slice(const std::vector<T>& v, size_t first, size_t count) {
    return std::vector<T>(v.begin() + first, v.begin() + first + count);
}

template <typename T> static void append(std::vector<T>* all, const std::vector<T>& part) {
    all->insert(all->end(), part.begin(), part.end());
}

// An array on the device, filled from the host or not at all
template <typename T>
struct Device {
    T* p = nullptr;
    size_t n;

    explicit Device(size_t count) : n(count) { cudaCheck(cudaMalloc((void**)&p, std::max<size_t>(n, 1) * sizeof(T))); }
    explicit Device(const Vec& values) : Device(values.size()) { put(values); }
    explicit Device(const Ints& values) : Device(values.size()) { put(Vec(values.begin(), values.end())); }
    Device(const Device&) = delete;
    ~Device() { cudaCheck(cudaStreamSynchronize(main_stream.stream)); cudaCheck(cudaFree(p)); }
    operator T*() const { return p; }

    void put(const Vec& values) {
        std::vector<T> v(values.size());
        for (size_t i = 0; i < v.size(); i++) v[i] = (T)(float)values[i];
        copy_to_device(p, v);
        cudaCheck(cudaStreamSynchronize(main_stream.stream));
    }
    Vec get() const { return get_from(p, n); }
    static Vec get_from(const T* from, size_t count) {
        std::vector<T> v(count);
        copy_to_host(v.data(), from, count);
        Vec values(count);
        for (size_t i = 0; i < count; i++) values[i] = (double)(float)v[i];
        return values;
    }
    void spoil() { cudaCheck(cudaMemsetAsync(p, 0xff, n * sizeof(T), main_stream.stream)); }      // all NaN
    Ints ints() const {
        Vec v = get();
        return Ints(v.begin(), v.end());
    }
};

// Sequences of these lengths, of random tokens below V with random targets
static MicroBatch random_sequences(const Ints& lengths, int V, double weight = 0) {
    size_t N = std::accumulate(lengths.begin(), lengths.end(), 0);
    Ints inputs = random_ints(N, V), targets = random_ints(N, V);
    MicroBatch batch;
    for (int T : lengths) batch_add(&batch, &inputs[batch.N()], &targets[batch.N()], T, weight);
    return batch;
}

static std::string joined(const Ints& numbers) {
    std::string all;
    for (int n : numbers) all += (all.empty() ? "" : ",") + std::to_string(n);
    return all;
}

// ------------------------------------------------------------------------------------------------
// The layers in double precision. Backward functions add to what they are given.

static void twin_linear(Vec& y, const Vec& x, const Vec& w, int N, int I, int O) {
    y.assign((size_t)N * O, 0);
    for (int n = 0; n < N; n++)
        for (int o = 0; o < O; o++)
            for (int i = 0; i < I; i++) y[(size_t)n * O + o] += x[(size_t)n * I + i] * w[(size_t)o * I + i];
}

static void twin_linear_backward(Vec& dx, Vec& dw, const Vec& dy, const Vec& x, const Vec& w, int N, int I, int O) {
    for (int n = 0; n < N; n++)
        for (int o = 0; o < O; o++)
            for (int i = 0; i < I; i++) {
                dx[(size_t)n * I + i] += dy[(size_t)n * O + o] * w[(size_t)o * I + i];
                dw[(size_t)o * I + i] += dy[(size_t)n * O + o] * x[(size_t)n * I + i];
            }
}

static double twin_rms_scale(const double* x, int C, double eps) {
    double square = 0;
    for (int i = 0; i < C; i++) square += x[i] * x[i];
    return 1 / sqrt(square / C + eps);
}

static void twin_rmsnorm(Vec& y, Vec& r, const Vec& x, const Vec& w, int N, int C, double eps) {
    y.resize((size_t)N * C);
    r.resize(N);
    for (int n = 0; n < N; n++) {
        r[n] = twin_rms_scale(&x[(size_t)n * C], C, eps);
        for (int i = 0; i < C; i++) y[(size_t)n * C + i] = w[i] * x[(size_t)n * C + i] * r[n];
    }
}

static void twin_rmsnorm_backward(Vec& dx, Vec& dw, const Vec& dy, const Vec& x, const Vec& w, int N, int C,
                                  double eps) {
    for (int n = 0; n < N; n++) {
        const double *xn = &x[(size_t)n * C], *dyn = &dy[(size_t)n * C];
        double r = twin_rms_scale(xn, C, eps), mean = 0;
        for (int i = 0; i < C; i++) mean += w[i] * dyn[i] * r * xn[i] / C;
        for (int i = 0; i < C; i++) {
            dw[i] += dyn[i] * r * xn[i];
            dx[(size_t)n * C + i] += r * (w[i] * dyn[i] - r * xn[i] * mean);
        }
    }
}

struct TwinRope { Vec cosine, sine; };                          // tables (positions, D/2)

// The angle's product is in fp32, as in every implementation of the model; its cosine and sine are exact.
static TwinRope twin_rope_tables(int positions, int D, double theta) {
    TwinRope tables;
    for (int t = 0; t < positions; t++)
        for (int j = 0; j < D / 2; j++) {
            float angle = (float)t * (float)pow(theta, -2. * j / D);
            tables.cosine.push_back(cos((double)angle));
            tables.sine.push_back(sin((double)angle));
        }
    return tables;
}

// Rotates each pair (j, j + D/2) of each head by direction * angle
static void twin_rope(Vec& x, const TwinRope& tables, const Ints& positions, int C, int D, int direction) {
    for (size_t n = 0; n < positions.size(); n++)
        for (int h = 0; h < C; h += D)
            for (int j = 0; j < D / 2; j++) {
                double &a = x[n * C + h + j], &b = x[n * C + h + j + D / 2], a0 = a, b0 = b;
                size_t at = (size_t)positions[n] * (D / 2) + j;
                double c = tables.cosine[at], s = direction * tables.sine[at];
                a = a0 * c - b0 * s;
                b = b0 * c + a0 * s;
            }
}

// Columns [first, first + count) of a (N, width) matrix
static Vec columns(const Vec& x, int N, int width, int first, int count) {
    Vec y((size_t)N * count);
    for (int n = 0; n < N; n++)
        for (int i = 0; i < count; i++) y[(size_t)n * count + i] = x[(size_t)n * width + first + i];
    return y;
}
static void set_columns(Vec& x, const Vec& y, int N, int width, int first, int count) {
    for (int n = 0; n < N; n++)
        for (int i = 0; i < count; i++) x[(size_t)n * width + first + i] = y[(size_t)n * count + i];
}

// One row of attention: its probabilities over keys 0..t of head h, and its log-sum-exp
static double twin_attention_row(Vec& p, const double* q, const double* k, int t, int C, int D) {
    p.assign(t + 1, 0);
    double max = -INFINITY, sum = 0;
    for (int j = 0; j <= t; j++) {
        for (int d = 0; d < D; d++) p[j] += q[d] * k[(size_t)j * C + d] / sqrt((double)D);
        max = std::max(max, p[j]);
    }
    for (double& s : p) sum += exp(s - max);
    double lse = max + log(sum);
    for (double& s : p) s = exp(s - lse);
    return lse;
}

// body(t, first element of the sequence's head, element of its token t, index of the token's lse) for all sequences,
// which begin at `starts`, all heads and all tokens. The lse of a sequence are (H, T).
template <typename Body> static void for_queries(const Ints& starts, int C, int H, Body body) {
    for (size_t b = 0; b + 1 < starts.size(); b++)
        for (int h = 0; h < H; h++)
            for (int t = 0, T = starts[b + 1] - starts[b]; t < T; t++) {
                size_t base = (size_t)starts[b] * C + h * (C / H);
                body(t, base, base + (size_t)t * C, (size_t)starts[b] * H + (size_t)h * T + t);
            }
}

static void twin_attention(Vec& o, Vec& lse, const Vec& q, const Vec& k, const Vec& v, const Ints& starts, int C,
                           int H) {
    int D = C / H;
    o.assign(q.size(), 0);
    lse.resize(q.size() / C * H);
    Vec p;
    for_queries(starts, C, H, [&](int t, size_t base, size_t at, size_t lse_at) {
        lse[lse_at] = twin_attention_row(p, &q[at], &k[base], t, C, D);
        for (int j = 0; j <= t; j++)
            for (int d = 0; d < D; d++) o[at + d] += p[j] * v[base + (size_t)j * C + d];
    });
}

static void twin_attention_backward(Vec& dq, Vec& dk, Vec& dv, const Vec& dout, const Vec& q, const Vec& k,
                                    const Vec& v, const Ints& starts, int C, int H) {
    int D = C / H;
    Vec p, dp;
    for_queries(starts, C, H, [&](int t, size_t base, size_t at, size_t) {
        twin_attention_row(p, &q[at], &k[base], t, C, D);
        dp.assign(t + 1, 0);
        double delta = 0;
        for (int j = 0; j <= t; j++) {
            for (int d = 0; d < D; d++) dp[j] += dout[at + d] * v[base + (size_t)j * C + d];
            delta += p[j] * dp[j];
        }
        for (int j = 0; j <= t; j++)
            for (int d = 0; d < D; d++) {
                double ds = p[j] * (dp[j] - delta) / sqrt((double)D);
                dq[at + d] += ds * k[base + (size_t)j * C + d];
                dk[base + (size_t)j * C + d] += ds * q[at + d];
                dv[base + (size_t)j * C + d] += p[j] * dout[at + d];
            }
    });
}

// The experts in order of probability, of equal ones the lower id first
static void twin_router(Vec& p, Vec& lse, Ints& experts, Vec& weights, const Vec& z, int N, int E, int K,
                        bool normalize) {
    p.resize((size_t)N * E); lse.resize(N); experts.resize((size_t)N * K); weights.resize((size_t)N * K);
    for (int n = 0; n < N; n++) {
        const double* zn = &z[(size_t)n * E];
        double* pn = &p[(size_t)n * E];
        double max = *std::max_element(zn, zn + E), sum = 0, total = 0;
        for (int i = 0; i < E; i++) sum += exp(zn[i] - max);
        for (int i = 0; i < E; i++) pn[i] = exp(zn[i] - max) / sum;
        lse[n] = max + log(sum);
        Ints order(E);
        for (int i = 0; i < E; i++) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return zn[a] > zn[b]; });
        for (int k = 0; k < K; k++) total += pn[order[k]];
        for (int k = 0; k < K; k++) {
            experts[(size_t)n * K + k] = order[k];
            weights[(size_t)n * K + k] = pn[order[k]] / (normalize ? total : 1);
        }
    }
}

// dL/dp_i is `per_expert`[i] for every token, and through the chosen experts' weights; dL/dlse is 2 z_per_lse lse. By
// the chain rule through the full Jacobians of the softmax and of the division by the chosen sum.
static void twin_router_backward(Vec& dz, const Vec& dweights, const Vec& p, const Vec& lse, const Ints& experts, int N,
                                 int E, int K, bool normalize, const Vec& per_expert, double z_per_lse) {
    for (int n = 0; n < N; n++) {
        const double *pn = &p[(size_t)n * E], *dw = &dweights[(size_t)n * K];
        const int* id = &experts[(size_t)n * K];
        Vec dp(per_expert);
        double s = 0;
        for (int k = 0; k < K; k++) s += pn[id[k]];
        for (int k = 0; k < K; k++)
            if (!normalize) dp[id[k]] += dw[k];
            else for (int j = 0; j < K; j++) dp[id[j]] += dw[k] * ((j == k) / s - pn[id[k]] / (s * s));
        for (int i = 0; i < E; i++) {
            for (int j = 0; j < E; j++) dz[(size_t)n * E + j] += dp[i] * pn[i] * ((i == j) - pn[j]);
            dz[(size_t)n * E + i] += 2 * z_per_lse * lse[n] * pn[i];
        }
    }
}

static double logistic(double x) { return 1 / (1 + exp(-x)); }

// y_a of assignment a = n K + k: the output of its expert for its token, not weighted. gate_up (E, 2F, C), down
// (E, C, F)
static void twin_expert(Vec& h, Vec& gate_up, Vec& y, const double* x, int e, const Vec& w_gate_up, const Vec& w_down,
                        int C, int F) {
    gate_up.assign(2 * F, 0); h.resize(F); y.assign(C, 0);
    for (int f = 0; f < 2 * F; f++)
        for (int i = 0; i < C; i++) gate_up[f] += w_gate_up[((size_t)e * 2 * F + f) * C + i] * x[i];
    for (int f = 0; f < F; f++) h[f] = gate_up[f] * logistic(gate_up[f]) * gate_up[F + f];
    for (int i = 0; i < C; i++)
        for (int f = 0; f < F; f++) y[i] += w_down[((size_t)e * C + i) * F + f] * h[f];
}

static void twin_experts(Vec& y, const Vec& x, const Ints& experts, const Vec& w_gate_up, const Vec& w_down, int N,
                         int K, int C, int F) {
    y.resize((size_t)N * K * C);
    Vec h, gate_up, ya;
    for (int a = 0; a < N * K; a++) {
        twin_expert(h, gate_up, ya, &x[(size_t)(a / K) * C], experts[a], w_gate_up, w_down, C, F);
        std::copy(ya.begin(), ya.end(), y.begin() + (size_t)a * C);
    }
}

// dout is the gradient of sum_k w_k y_k. dx_rows (N, K, C) is what each assignment sends back to its token.
static void twin_experts_backward(Vec& dx_rows, Vec& dw_gate_up, Vec& dw_down, Vec& dweights, const Vec& dout,
                                  const Vec& x, const Ints& experts, const Vec& weights, const Vec& w_gate_up,
                                  const Vec& w_down, int N, int K, int C, int F) {
    Vec h, gate_up, y;
    for (int a = 0; a < N * K; a++) {
        const double *xa = &x[(size_t)(a / K) * C], *d = &dout[(size_t)(a / K) * C];
        size_t e = experts[a];
        twin_expert(h, gate_up, y, xa, (int)e, w_gate_up, w_down, C, F);
        for (int i = 0; i < C; i++) dweights[a] += d[i] * y[i];
        for (int f = 0; f < F; f++) {
            size_t gate_row = (e * 2 * F + f) * C, up_row = gate_row + (size_t)F * C;
            double dh = 0, g = gate_up[f], u = gate_up[F + f], s = logistic(g);
            for (int i = 0; i < C; i++) {
                dh += weights[a] * d[i] * w_down[(e * C + i) * F + f];
                dw_down[(e * C + i) * F + f] += weights[a] * d[i] * h[f];
            }
            double dg = dh * u * (s + g * s * (1 - s)), du = dh * g * s;
            for (int i = 0; i < C; i++) {
                dw_gate_up[gate_row + i] += dg * xa[i];
                dw_gate_up[up_row + i] += du * xa[i];
                dx_rows[(size_t)a * C + i] += dg * w_gate_up[gate_row + i] + du * w_gate_up[up_row + i];
            }
        }
    }
}

// losses (N), not weighted, and dlogits, the gradient of the sum of weights times losses
static void twin_cross_entropy(Vec& losses, Vec& dlogits, const Vec& logits, const Ints& targets, const Vec& weights,
                               int N, int V) {
    losses.assign(N, 0);
    dlogits.assign((size_t)N * V, 0);
    for (int n = 0; n < N; n++) {
        if (targets[n] < 0) continue;
        const double* z = &logits[(size_t)n * V];
        double max = *std::max_element(z, z + V), sum = 0;
        for (int i = 0; i < V; i++) sum += exp(z[i] - max);
        losses[n] = max + log(sum) - z[targets[n]];
        for (int i = 0; i < V; i++)
            dlogits[(size_t)n * V + i] = weights[n] * (exp(z[i] - max) / sum - (i == targets[n]));
    }
}

// ------------------------------------------------------------------------------------------------
// Kernels

static void test_linear() {
    int shapes[][3] = {{1, 1, 1}, {7, 13, 5}, {33, 40, 65}, {3, 130, 17}};
    for (auto& [N, I, O] : shapes) {
        std::string name = text("linear N %d I %d O %d ", N, I, O);
        Vec x = random_vec((size_t)N * I), w = random_vec((size_t)O * I), dy = random_vec((size_t)N * O);
        Vec y, y_old = random_vec((size_t)N * O), dx_old = random_vec((size_t)N * I);
        Vec dw_old = random_vec((size_t)O * I), dx((size_t)N * I), dw(dw_old.size());
        Vec y_added = y_old, dx_added = dx_old, dw_added = dw_old;
        twin_linear(y, x, w, N, I, O);
        twin_linear_backward(dx, dw, dy, x, w, N, I, O);
        for (size_t i = 0; i < y.size(); i++) y_added[i] += y[i];
        for (size_t i = 0; i < dx.size(); i++) dx_added[i] += dx[i];
        for (size_t i = 0; i < dw.size(); i++) dw_added[i] += dw[i];

        Device<floatX> d_x(x), d_w(w), d_dy(dy), d_y(y.size()), d_y_added(y_old);
        Device<floatX> d_dx(dx.size()), d_dx_added(dx_old), d_dw(dw.size()), d_dw_added(dw_old);
        Device<float> d_y32(y.size());
        d_dw.spoil();
        matmul_forward(main_stream, (floatX*)d_y, d_x, d_w, N, I, O);
        matmul_forward(main_stream, (floatX*)d_y_added, d_x, d_w, N, I, O, 1);
        matmul_forward(main_stream, (float*)d_y32, d_x, d_w, N, I, O);
        matmul_backward_input(main_stream, d_dx, d_dy, d_w, N, I, O);
        matmul_backward_input(main_stream, d_dx_added, d_dy, d_w, N, I, O, 1);
        matmul_backward_weight(main_stream, d_dw.p, d_dy, d_x, N, I, O, false);
        matmul_backward_weight(main_stream, d_dw_added.p, d_dy, d_x, N, I, O, true);
        check(name + "y", d_y.get(), y, roundings(1, 2 + sqrt(I)));
        check(name + "y in fp32", d_y32.get(), y, roundings(0, 2 + sqrt(I)));
        check(name + "y +=", d_y_added.get(), y_added, roundings(1, 2 + sqrt(I)));
        check(name + "dx", d_dx.get(), dx, roundings(1, 2 + sqrt(O)));
        check(name + "dx +=", d_dx_added.get(), dx_added, roundings(1, 2 + sqrt(O)));
        check(name + "dw", d_dw.get(), dw, roundings(1, 2 + sqrt(N)));
        check(name + "dw +=", d_dw_added.get(), dw_added, roundings(1, 2 + sqrt(N)));
    }
}

static void test_embedding() {
    int shapes[][3] = {{1, 1, 1}, {40, 11, 5}, {9, 3, 2 * CHUNK + 7}, {6, 6, CHUNK}, {2, 1, 4200},
                       {TOKEN_RUN + 1, 1, 8}, {3000, 1, 16}, {700, 3, 40}};
    for (auto& [N, V, C] : shapes) {
        std::string name = text("embedding N %d V %d C %d ", N, V, C);
        Vec w = random_vec((size_t)V * C), dx = random_vec((size_t)N * C), dw = random_vec((size_t)V * C);
        Ints ids = random_ints(N, V);
        ids.back() = ids[0];                                    // some id occurs twice
        Device<floatX> d_w(w), d_x((size_t)N * C), d_dx(dx), d_dw(dw);
        Device<int> d_ids(ids), tokens(N);
        Device<TokenRun> runs(N);
        Device<float> partial((size_t)2 * SLABS * C);
        Vec x((size_t)N * C);
        for (int n = 0; n < N; n++)
            for (int i = 0; i < C; i++) {
                x[(size_t)n * C + i] = w[(size_t)ids[n] * C + i];
                dw[(size_t)ids[n] * C + i] += dx[(size_t)n * C + i];
            }
        embedding_forward(d_x, d_ids, d_w, N, C);
        check_equal(name + "x", d_x.get(), x);

        Olmoe m;
        m.batch.inputs = ids; m.N = N;
        m.scratch.dx = d_dx;
        m.scratch.sorted_tokens = tokens; m.scratch.runs = runs; m.scratch.partial = partial;
        index_tokens(&m);
        embedding_backward(d_dw, m.scratch, m.runs, C);
        check(name + "dw +=", d_dw.get(), dw, roundings(1, 2 + sqrt(N)));
    }
}

static void test_rmsnorm() {
    // Even where there are several blocks: the rows of two would meet in a word, a race detector's unit
    int shapes[][2] = {{1, 1}, {3, 5}, {37, 60}, {5, 2 * CHUNK + 1}, {SLABS * 16 + 37, 6},
                       {40, 1024}, {9, 2056}, {2, 4160}};
    const float eps = 1e-3f;
    for (auto& [N, C] : shapes) {
        std::string name = text("rmsnorm N %d C %d ", N, C);
        Vec x = random_vec((size_t)N * C, 0.3), w = random_vec(C), dy = random_vec((size_t)N * C);
        Vec dx = random_vec((size_t)N * C), dw = random_vec(C), first(C), y, r;
        Device<floatX> d_x(x), d_w(w), d_dy(dy), d_dx(dx), d_dw(dw), d_first(C), d_y(x.size());
        Device<float> d_r(N), partial((size_t)SLABS * C);
        twin_rmsnorm(y, r, x, w, N, C, eps);
        for (int i = 0; i < C; i++) first[i] = -dw[i];
        twin_rmsnorm_backward(dx, dw, dy, x, w, N, C, eps);
        for (int i = 0; i < C; i++) first[i] += dw[i];
        rmsnorm_forward(d_y, d_r, d_x, d_w, N, C, eps);
        check(name + "y", d_y.get(), y, roundings(2, 5 + sqrt(C)));
        check(name + "1/rms", d_r.get(), r, roundings(0, 5 + sqrt(C)));
        rmsnorm_backward(d_dx, d_dw, true, partial, d_dy, d_x, d_w, d_r, N, C);
        check(name + "dx +=", d_dx.get(), dx, roundings(1, 10 + 2 * sqrt(C)));
        check(name + "dw +=", d_dw.get(), dw, roundings(1, 10 + sqrt(C) + sqrt(N)));
        d_first.spoil();
        rmsnorm_backward(d_dx, d_first, false, partial, d_dy, d_x, d_w, d_r, N, C);
        check(name + "dw", d_first.get(), first, roundings(1, 10 + sqrt(C) + sqrt(N)));

        Vec out = x;                                            // rounded sums of rounded numbers, of which y is
        for (size_t i = 0; i < out.size(); i++) out[i] = rounded<floatX>(x[i] + dy[i]);
        twin_rmsnorm(y, r, out, w, N, C, eps);
        add_rmsnorm_forward(d_y, d_dy, d_r, d_x, d_w, N, C, eps);
        check_equal(name + "x + y", d_y.get(), out);
        check(name + "rmsnorm(x + y)", d_dy.get(), y, roundings(2, 5 + sqrt(C)));
        check(name + "1/rms of x + y", d_r.get(), r, roundings(0, 5 + sqrt(C)));
    }
}

// Tokens at these positions, with tables of `rows` positions; flash: gradients come as from flash attention
static void check_qk_norm_rope(const std::string& name, const Ints& positions, int rows, int C, int H,
                               bool flash = false) {
    const float eps = 1e-3f;
    const int N = (int)positions.size(), D = C / H;
    Vec qkv = random_vec((size_t)N * 3 * C), q_norm = random_vec(C), k_norm = random_vec(C);
    Vec dqkv32 = flash ? random_vec((size_t)N * 3 * C) : random_vec<float>((size_t)N * 3 * C);
    Vec dq_norm = random_vec(C), dk_norm = random_vec(C);
    TwinRope tables = twin_rope_tables(rows, D, 100);
    for (double& x : tables.cosine) x = rounded<float>(x);
    for (double& x : tables.sine) x = rounded<float>(x);
    Device<floatX> d_qkv(qkv), d_q_norm(q_norm), d_k_norm(k_norm), d_qk((size_t)N * 2 * C), d_dqkv(qkv.size());
    Device<floatX> d_dq_norm(dq_norm), d_dk_norm(dk_norm);
    Device<float> d_cosine(tables.cosine), d_sine(tables.sine), d_r((size_t)N * 2), d_dqkv32(dqkv32);
    Device<float> partial((size_t)2 * SLABS * C);
    Device<int> d_positions(positions);

    Vec qk((size_t)N * 2 * C), dqkv = dqkv32, y, r;
    for (int part = 0; part < 2; part++) {
        Vec x = columns(qkv, N, 3 * C, part * C, C), dy = columns(dqkv32, N, 3 * C, part * C, C), dx((size_t)N * C);
        const Vec& norm = part ? k_norm : q_norm;
        twin_rmsnorm(y, r, x, norm, N, C, eps);
        twin_rope(y, tables, positions, C, D, 1);
        set_columns(qk, y, N, 2 * C, part * C, C);
        twin_rope(dy, tables, positions, C, D, -1);
        twin_rmsnorm_backward(dx, part ? dk_norm : dq_norm, dy, x, norm, N, C, eps);
        set_columns(dqkv, dx, N, 3 * C, part * C, C);
    }

    OlmoeConfig c;
    c.C = C; c.H = H; c.rms_norm_eps = eps;
    LayerParameters p = {}, g = {};
    p.q_norm = d_q_norm; p.k_norm = d_k_norm;
    g.q_norm = d_dq_norm; g.k_norm = d_dk_norm;
    LayerActivations a = {};
    a.qkv = d_qkv; a.qk = d_qk; a.qk_r = d_r;
    Scratch s = {};
    s.cosine = d_cosine; s.sine = d_sine; s.dqkv32 = d_dqkv32; s.dqkv = d_dqkv; s.partial = partial;
    qk_norm_rope_forward(a, p, s, d_positions, N, c);
    check(name + "q and k", d_qk.get(), qk, roundings(3, 9 + sqrt(C)));
    if (flash) {
        d_dqkv.put(dqkv32);
        qk_norm_rope_backward<floatX>(s, d_dqkv, g, true, a, p, d_positions, N, c);
    } else {
        qk_norm_rope_backward(s, g, true, a, p, d_positions, N, c);
    }
    const int x = flash ? 2 : 1;                                // what leaves the rotation is rounded, too
    check(name + "dqkv", d_dqkv.get(), dqkv, roundings(x, 14 + 2 * sqrt(C)));
    check(name + "dq_norm +=", d_dq_norm.get(), dq_norm, roundings(x, 14 + sqrt(C) + sqrt(N)));
    check(name + "dk_norm +=", d_dk_norm.get(), dk_norm, roundings(x, 14 + sqrt(C) + sqrt(N)));
}

static void test_qk_norm_rope() {
    int shapes[][4] = {{1, 1, 2, 1}, {2, 7, 30, 3}, {1, 3, 2 * CHUNK + 4, 2}, {1, SLABS * 16 + 5, 4, 2},
                       {1, 5, 64, 2}, {2, 9, 2048, 8}, {1, 3, 4352, 2}};
    for (auto& [B, T, C, H] : shapes) {
        Ints positions(B * T);
        for (int n = 0; n < B * T; n++) positions[n] = n % T;
        check_qk_norm_rope(text("qk-norm and rope B %d T %d C %d H %d ", B, T, C, H), positions, T, C, H);
    }
    check_qk_norm_rope("qk-norm and rope, position 8 alone ", {8}, 9, 6, 1);
    Ints positions = random_ints(50, 11);
    positions[20] = 10;                                         // the last of the tables
    check_qk_norm_rope("qk-norm and rope, any positions ", positions, 11, 12, 2);
    check_qk_norm_rope("qk-norm and rope, of flash attention ", positions, 11, 256, 2, true);
    check_qk_norm_rope("qk-norm and rope, of flash attention, odd ", positions, 11, 30, 3, true);
    check_qk_norm_rope("qk-norm and rope, of flash attention, wide ", positions, 11, 2048, 16, true);
}

static void check_attention(const std::string& name, const Ints& lengths, int C, int H) {
    MicroBatch batch;
    batch.starts = {0};
    for (int T : lengths) batch.starts.push_back(batch.starts.back() + T);
    const int longest = *std::max_element(lengths.begin(), lengths.end());
    size_t N = batch.starts.back(), square = (size_t)H * std::min(ATTENTION_BLOCK, longest) * longest;
    Vec qk = random_vec(N * 2 * C, 1.5), qkv = random_vec(N * 3 * C), dout = random_vec(N * C), out, lse;
    Vec q = columns(qk, N, 2 * C, 0, C), k = columns(qk, N, 2 * C, C, C), v = columns(qkv, N, 3 * C, 2 * C, C);
    Vec dq(N * C), dk(N * C), dv(N * C);
    twin_attention(out, lse, q, k, v, batch.starts, C, H);
    twin_attention_backward(dq, dk, dv, dout, q, k, v, batch.starts, C, H);

    Device<floatX> d_qk(qk), d_qkv(qkv), d_dout(dout), d_out(N * C), probs(square), dscores(square);
    Device<float> d_lse(lse.size()), scores(square), dprobs(square), dqkv32(N * 3 * C);
    OlmoeConfig c;
    c.C = C; c.H = H;
    LayerActivations a = {};
    a.qk = d_qk; a.qkv = d_qkv; a.attn = d_out; a.attn_lse = d_lse;
    Scratch s = {};
    s.scores = scores; s.probs = probs;
    double t = 40 + 2 * sqrt(C / H) + 2 * sqrt(longest);        // two exponentials, two products, sums over D and keys
    attention_forward(a, s, batch, c);
    check(name + "out", d_out.get(), out, roundings(2, t));
    check(name + "lse", d_lse.get(), lse, roundings(0, t));
    s.dattn = d_dout; s.dqkv32 = dqkv32; s.dprobs = dprobs; s.dscores = dscores;
    attention_backward(s, a, batch, c);
    Vec d = dqkv32.get();
    if (longest > 1) {                                          // at T = 1 both are one p (dp - delta), which is 0
        check(name + "dq", columns(d, N, 3 * C, 0, C), dq, roundings(2, t));
        check(name + "dk", columns(d, N, 3 * C, C, C), dk, roundings(2, t));
    } else {
        check_true(name + "dq and dk vanish", l2(columns(d, N, 3 * C, 0, 2 * C)) <= roundings(2, t) * l2(dv));
    }
    check(name + "dv", columns(d, N, 3 * C, 2 * C, C), dv, roundings(1, t));
}

static void test_attention() {
    int shapes[][4] = {{1, 1, 2, 1}, {2, 5, 6, 3}, {1, ATTENTION_BLOCK, 8, 2}, {2, ATTENTION_BLOCK + 1, 6, 1},
                       {1, 2 * ATTENTION_BLOCK + 13, 20, 2}};
    for (auto& [B, T, C, H] : shapes)
        check_attention(text("attention B %d T %d C %d H %d ", B, T, C, H), Ints(B, T), C, H);
    struct { Ints lengths; int C, H; } ragged[] = {{{1, 1}, 4, 2}, {{3, 1, 7, 2}, 6, 3}, {{1, 9}, 10, 1},
                                                   {{5, ATTENTION_BLOCK + 2, 1, ATTENTION_BLOCK, 3}, 8, 2}};
    for (auto& [lengths, C, H] : ragged)
        check_attention(text("attention T %s C %d H %d ", joined(lengths).c_str(), C, H), lengths, C, H);
}

// Attention of a batch by one of its forms, from what the device holds
struct AttentionRun {
    Vec out, lse, dq, dk, dv;

    AttentionRun(const MicroBatch& batch, const Vec& qk, const Vec& qkv, const Vec& dout, int C, int H, bool flash) {
        const size_t N = batch.N();
        int longest = 0;
        for (int b = 0; b < batch.B(); b++) longest = std::max(longest, batch.length(b));
        const size_t square = flash ? 0 : (size_t)H * std::min(ATTENTION_BLOCK, longest) * longest;
        Device<floatX> d_qk(qk), d_qkv(qkv), d_dout(dout), d_out(N * C), probs(square), dscores(square);
        Device<floatX> dqkv(flash ? N * 3 * C : 0);
        Device<float> d_lse(N * H), scores(square), dprobs(square), dqkv32(flash ? 0 : N * 3 * C);
        Device<float2> terms(flash ? N * H : 0);
        Device<AttentionTile> tiles(2 * N);
        OlmoeConfig c;
        c.C = C; c.H = H;
        LayerActivations a = {};
        a.qk = d_qk; a.qkv = d_qkv; a.attn = d_out; a.attn_lse = d_lse;
        Scratch s = {};
        s.scores = scores; s.probs = probs; s.dattn = d_dout; s.dqkv32 = dqkv32; s.dprobs = dprobs; s.dscores = dscores;
        s.tiles = tiles; s.dqkv = dqkv; s.attn_terms = terms;
        copy_to_device(s.tiles, attention_tiles(batch));
        if (flash) attention_forward(a, s, batch, c); else blocked_attention_forward(a, s, batch, c);
        if (flash) attention_backward(s, a, batch, c); else blocked_attention_backward(s, a, batch, c);
        out = d_out.get(); lse = d_lse.get();
        const Vec d = flash ? dqkv.get() : dqkv32.get();
        dq = columns(d, N, 3 * C, 0, C);
        dk = columns(d, N, 3 * C, C, C);
        dv = columns(d, N, 3 * C, 2 * C, C);
    }

    Vec all() const {
        Vec v;
        for (const Vec* part : {&out, &lse, &dq, &dk, &dv}) append(&v, *part);
        return v;
    }
    // Of one sequence; its lse are (H, T)
    Vec of_sequence(size_t first, size_t T, int C, int H) const {
        Vec v = slice(out, first * C, T * C);
        append(&v, slice(lse, first * H, T * H));
        for (const Vec* part : {&dq, &dk, &dv}) append(&v, slice(*part, first * C, T * C));
        return v;
    }
};

// Flash attention and, as a second opinion, the blocked one against the twin. q_scale: how large q is. A deviation of P
// and dS is their rounding to bf16, as in the products; then each result is rounded.
static void check_flash(const std::string& name, const Ints& lengths, int C, int H, double q_scale, double dout_scale) {
    MicroBatch batch;
    for (int T : lengths) batch.starts.push_back(batch.N() + T);
    const size_t N = batch.N();
    Vec q = random_vec(N * C, q_scale), k = random_vec(N * C, 1.5), v = random_vec(N * C);
    Vec dout = random_vec(N * C, dout_scale), out, lse, dq(N * C), dk(N * C), dv(N * C), qk(N * 2 * C), qkv(N * 3 * C);
    set_columns(qk, q, N, 2 * C, 0, C);
    set_columns(qk, k, N, 2 * C, C, C);
    set_columns(qkv, v, N, 3 * C, 2 * C, C);
    twin_attention(out, lse, q, k, v, batch.starts, C, H);
    twin_attention_backward(dq, dk, dv, dout, q, k, v, batch.starts, C, H);

    const AttentionRun run(batch, qk, qkv, dout, C, H, true), again(batch, qk, qkv, dout, C, H, true);
    const AttentionRun blocked(batch, qk, qkv, dout, C, H, false);
    check_equal(name + "two runs", again.all(), run.all());
    const double t = 40 + 2 * sqrt(C / H) + 2 * sqrt(*std::max_element(lengths.begin(), lengths.end()));
    const double x = q_scale > 2 ? 2 : 1.5;                     // dP - delta is a difference, and delta of a rounded O
    auto check_part = [&](const char* part, Vec AttentionRun::*of, const Vec& want, double tolerance) {
        if (l2(want) > 1e-9 * N) check(name + part, run.*of, want, tolerance);
        else check_true(name + part + " is 0", l2(run.*of) <= 1e-5 * l2(dout));
        if (l2(want) > 1e-9 * N) check(name + part + ", blocked", blocked.*of, want, tolerance);
    };
    check_part("out", &AttentionRun::out, out, roundings(1, t));
    check_part("lse", &AttentionRun::lse, lse, roundings(0, t));
    check_part("dq", &AttentionRun::dq, dq, roundings(x, t));
    check_part("dk", &AttentionRun::dk, dk, roundings(x, t));
    check_part("dv", &AttentionRun::dv, dv, roundings(1, t));
    for (int b = 0; batch.B() > 1 && b < batch.B(); b++) {
        const size_t first = batch.begin(b), T = batch.length(b);
        MicroBatch alone;
        alone.starts.push_back(T);
        const AttentionRun one(alone, slice(qk, first * 2 * C, T * 2 * C), slice(qkv, first * 3 * C, T * 3 * C),
                               slice(dout, first * C, T * C), C, H, true);
        check_equal(name + text("T %zu alone", T), one.all(), run.of_sequence(first, T, C, H));
    }
}

static void test_flash_attention() {
    const MicroBatch batch = batch_of_rows(Ints(600).data(), nullptr, 2, 300);
    Ints rows;
    for (const AttentionTile& t : attention_tiles(batch)) append(&rows, {t.first, t.T, t.row});
    check_equal("tiles by queries, then by keys", rows, {0, 300, 256, 300, 300, 256, 0, 300, 128, 300, 300, 128,
                                                         0, 300, 0, 300, 300, 0, 0, 300, 0, 300, 300, 0,
                                                         0, 300, 128, 300, 300, 128, 0, 300, 256, 300, 300, 256});
    check_true("number of tiles", num_attention_tiles(batch) == 6 && num_attention_tiles({}) == 0);
    for (int D : {64, 128}) {
        OlmoeConfig c;
        c.C = D; c.H = 1;
        if (!c.flash()) continue;
        for (int T : {1, 63, 64, 65, 127, 128, 129, 257})
            check_flash(text("flash D %d T %d ", D, T), {T}, D, 1, 1.5, 1);
        check_flash(text("flash D %d mixed ", D), {65, 1, 129, 63, 2, 128}, 2 * D, 2, 1.5, 1);
        check_flash(text("flash D %d large scores ", D), {129, 64}, D, 1, 12, 1);
        check_flash(text("flash D %d equal scores ", D), {130}, D, 1, 0, 1);
        check_flash(text("flash D %d no gradient ", D), {66}, D, 1, 1.5, 0);
    }
}

// Logits that differ by 1/8 at least, so that rounding can't change an expert; with ties, some are equal instead
static Vec random_logits(int N, int E, bool ties) {
    Vec z((size_t)N * E);
    Ints order(E);
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < E; i++) order[i] = i;
        for (int i = E - 1; i > 0; i--) std::swap(order[i], order[random_below(i + 1)]);
        for (int i = 0; i < E; i++) z[(size_t)n * E + i] = 0.125 * (ties ? order[i] / 3 : order[i]) - 1;
    }
    return z;
}

// A layer's activations and scratch memory for the router alone
struct DeviceRouter {
    Device<float> logits, p, lse, weights, sums, partial, dweights, g;
    Device<int> experts, counts;
    Device<floatX> dz;
    LayerActivations a = {};
    Scratch s = {};
    OlmoeConfig c;

    DeviceRouter(const Vec& z, const Vec& dweights_, const Ints& counts_, int N, int E, int K, bool normalize)
        : logits(z), p(z.size()), lse(N), weights((size_t)N * K), sums(E), partial((size_t)SLABS * E),
          dweights(dweights_), g(z.size()), experts((size_t)N * K), counts(counts_), dz(z.size()) {
        a.router_logits = logits; a.router_probs = p; a.router_lse = lse; a.router_sums = sums;
        a.experts = experts; a.weights = weights;
        s.drouter = dz; s.drouter_probs = g; s.dweights = dweights; s.router_partial = partial;
        c.E = E; c.K = K; c.norm_topk_prob = normalize;
    }
};

static void test_router() {
    struct { int N, E, K; bool normalize, ties; } shapes[] = {
        {1, 1, 1, false, false}, {9, 5, 1, false, false}, {9, 5, 5, true, false}, {13, 70, 8, false, true},
        {13, 33, 7, true, false}, {SLABS * 16 + 3, 3, 2, false, true}, {40, 64, 8, false, true}};
    for (auto& [N, E, K, normalize, ties] : shapes) {
        const char *normalized = normalize ? " normalized" : "", *tied = ties ? " ties" : "";
        std::string name = text("router N %d E %d K %d%s%s ", N, E, K, normalized, tied);
        Vec z = random_logits(N, E, ties), dweights = random_vec<float>((size_t)N * K);
        Vec p, lse, weights, dz((size_t)N * E), mean(E), per_expert(E);
        Ints experts, counts(E);
        twin_router(p, lse, experts, weights, z, N, E, K, normalize);
        for (int e : experts) counts[e]++;
        float lb_scale = 0.37f / (float)N, z_scale = 0.53f;
        for (int i = 0; i < E; i++) per_expert[i] = (double)lb_scale * counts[i];
        twin_router_backward(dz, dweights, p, lse, experts, N, E, K, normalize, per_expert, (double)z_scale / 2);
        for (int n = 0; n < N; n++)
            for (int i = 0; i < E; i++) mean[i] += p[(size_t)n * E + i];

        DeviceRouter d(z, dweights, counts, N, E, K, normalize);
        router_forward(d.a, d.s, N, d.c);
        check_equal(name + "experts", d.experts.ints(), experts);
        check(name + "p", d.p.get(), p, roundings(0, 24 + sqrt(E)));
        check(name + "lse", d.lse.get(), lse, roundings(0, 24 + sqrt(E)));
        check(name + "weights", d.weights.get(), weights, roundings(0, 26 + sqrt(E)));
        check(name + "sum of p", d.sums.get(), mean, roundings(0, 24 + sqrt(E) + sqrt(N)));
        router_backward(d.s, d.a, d.counts, lb_scale, z_scale, N, d.c);
        check(name + "dz", d.dz.get(), dz, roundings(1, 40 + 2 * sqrt(E) + sqrt(K)));
    }
}

// A layer's activations and scratch memory for the dispatch alone
struct DeviceDispatch {
    Device<int> experts, counts, row_of, assignment_of, histogram;
    LayerActivations a = {};
    Scratch s = {};

    DeviceDispatch(const Ints& experts_, int E)
        : experts(experts_), counts(E), row_of(experts_.size()), assignment_of(experts_.size()),
          histogram((size_t)ceil_div(experts_.size(), DISPATCH_SLAB) * E) {
        a.experts = experts; a.counts = counts; a.row_of = row_of; a.assignment_of = assignment_of;
        s.histogram = histogram;
    }
};

static void test_dispatch() {
    struct { int N, K, E, C, used; } shapes[] = {{1, 1, 1, 1, 1}, {7, 3, 5, 6, 5}, {150, 2, 70, CHUNK + 3, 60},
                                                 {DISPATCH_SLAB * 3 + 1, 1, 4, 2, 1}, {DISPATCH_SLAB, 4, 9, 5, 9},
                                                 {DISPATCH_SLAB * 35, 1, 3, 2, 3}, {9, 3, 40, 2056, 40}};
    for (auto& [N, K, E, C, used] : shapes) {
        int R = N * K;
        std::string name = text("dispatch N %d K %d E %d C %d ", N, K, E, C);
        Ints experts = random_ints(R, used), counts(E), row_of(R), assignment_of(R), order(R);
        for (int a = 0; a < R; a++) { order[a] = a; counts[experts[a]]++; }
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return experts[a] < experts[b]; });
        for (int row = 0; row < R; row++) { assignment_of[row] = order[row]; row_of[order[row]] = row; }

        DeviceDispatch d(experts, E);
        dispatch(d.counts, d.row_of, d.assignment_of, d.histogram, d.experts, R, E);
        check_equal(name + "counts", d.counts.ints(), counts);
        check_equal(name + "row_of", d.row_of.ints(), row_of);
        check_equal(name + "assignment_of", d.assignment_of.ints(), assignment_of);

        Vec x = random_vec((size_t)N * C), residual = random_vec((size_t)N * C), y = random_vec((size_t)R * C);
        Vec weights = random_vec<float>(R), rows((size_t)R * C), out = residual, sum((size_t)N * C);
        for (int a = 0; a < R; a++)
            for (int i = 0; i < C; i++) {
                size_t token = (size_t)(a / K) * C + i, row = (size_t)row_of[a] * C + i;
                rows[row] = x[token];
                out[token] += weights[a] * y[row];
                sum[token] += y[row];
            }
        Device<floatX> d_x(x), d_residual(residual), d_y(y), d_rows(rows.size()), d_out(out.size()), d_sum(sum.size());
        Device<float> d_weights(weights);
        gather(d_rows.p, d_x.p, d.assignment_of, R, C, K);
        check_equal(name + "gather", d_rows.get(), rows);
        combine(d_out, d_residual, d_y, d_weights, d.row_of, N, C, K);
        check(name + "combine", d_out.get(), out, roundings(1, 2 + sqrt(K)));
        combine(d_sum, nullptr, d_y, nullptr, d.row_of, N, C, K);
        check(name + "gather's backward", d_sum.get(), sum, roundings(1, 2 + sqrt(K)));

        Vec norm = random_vec(C), normed, r, before = d_out.get();
        Device<floatX> d_norm(norm), d_normed(out.size());
        Device<float> d_r(N);
        combine(d_out, d_residual, d_y, d_weights, d.row_of, N, C, K, d_normed, d_r, d_norm, 1e-3f);
        twin_rmsnorm(normed, r, before, norm, N, C, 1e-3f);
        check_equal(name + "combine before a norm", d_out.get(), before);
        check(name + "combine's norm", d_normed.get(), normed, roundings(2, 5 + sqrt(C)));
        check(name + "combine's 1/rms", d_r.get(), r, roundings(0, 5 + sqrt(C)));
    }
}

struct ExpertsShape { int N, K, E, C, F; bool one; };

// The largest first, to the stream with the fewest rows; of equal ones the lower number
static void test_expert_order() {
    const Ints rows = {5, 0, 9, 5, 1, 7, 5, 5, 5, 5, 5, 3};
    Ints experts, streams, firsts, counts;
    for (const ExpertRows& e : expert_order(rows, {0, rows.size(), 0, 0})) {
        experts.push_back((int)e.expert); streams.push_back(e.stream);
        firsts.push_back((int)e.first); counts.push_back(e.n);
    }
    check_equal("order of experts", experts, Ints{2, 5, 0, 3, 6, 7, 8, 9, 10, 11, 4});
    check_equal("their rows", counts, Ints{9, 7, 5, 5, 5, 5, 5, 5, 5, 3, 1});
    check_equal("their first rows", firsts, Ints{5, 20, 0, 14, 27, 32, 37, 42, 47, 52, 19});
    check_equal("their streams", streams, Ints{0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4});
    const std::vector<ExpertRows> part = expert_order(rows, {2, 5, 5, 15});
    check_equal("of a piece", Ints{(int)part[0].first, (int)part[1].first, (int)part[2].first}, Ints{5, 14, 19});
    check_true("no rows", expert_order(Ints(4, 0), {0, 4, 0, 0}).empty());
}

// Through dispatch and gather, so that the twin needs to know nothing of the order of rows
static void check_experts(const std::vector<ExpertsShape>& shapes) {
    for (auto& [N, K, E, C, F, one] : shapes) {
        size_t R = (size_t)N * K;
        std::string name = text("experts N %d K %d E %d C %d F %d%s ", N, K, E, C, F, one ? " all to one" : "");
        Ints experts(R), counts(E);
        for (int n = 0; n < N; n++)                             // different ones for a token; expert E - 2 gets none
            for (int k = 0; k < K; k++)
                experts[n * K + k] = one ? 3 : E == 1 ? 0 : ((n * n + k) % (E - 1) + E - 1) % E;
        for (int e : experts) counts[e]++;
        Vec x = random_vec((size_t)N * C), weights = random_vec<float>(R, 0.5), dout = random_vec((size_t)N * C);
        Vec w_gate_up = random_vec((size_t)E * 2 * F * C, 1 / sqrt(C));
        Vec w_down = random_vec((size_t)E * C * F, 1 / sqrt(F));
        Vec dw_gate_up = random_vec(w_gate_up.size()), dw_down = random_vec(w_down.size()), y, dx(R * C), dweights(R);
        Device<floatX> d_x(x), d_dout(dout), d_w_gate_up(w_gate_up), d_w_down(w_down);
        Device<floatX> d_dw_gate_up(dw_gate_up), d_dw_down(dw_down);
        twin_experts(y, x, experts, w_gate_up, w_down, N, K, C, F);
        Vec first_gate_up(dw_gate_up.size()), first_down(dw_down.size()), unused = dx, unused_too = dweights;
        twin_experts_backward(unused, first_gate_up, first_down, unused_too, dout, x, experts, weights, w_gate_up,
                              w_down, N, K, C, F);
        twin_experts_backward(dx, dw_gate_up, dw_down, dweights, dout, x, experts, weights, w_gate_up, w_down, N, K, C,
                              F);

        DeviceDispatch d(experts, E);
        Device<floatX> rows(R * C), gate_up(R * 2 * F), h(R * F), d_y(R * C), dy(R * C), d_dx(R * C), dh(R * F);
        Device<floatX> weighted_h(R * F), dgate_up(R * 2 * F);
        Device<float> d_weights(weights), d_dweights(R);
        OlmoeConfig c;
        c.C = C; c.F = F;
        LayerParameters p = {}, g = {};
        p.gate_up = d_w_gate_up; p.down = d_w_down;
        g.gate_up = d_dw_gate_up; g.down = d_dw_down;
        d.a.expert_in = rows; d.a.gate_up = gate_up;
        d.a.here_weights = d_weights; d.a.here_assignment_of = d.assignment_of;
        d.s.h = h; d.s.weighted_h = weighted_h; d.s.expert_out = d_y; d.s.dexpert_in = d_dx;
        d.s.dexpert_out = dy; d.s.dh = dh; d.s.dgate_up = dgate_up;
        RowCounts row_counts;
        row_counts.arrived = counts;
        cut_rows(&row_counts);
        dispatch(d.counts, d.row_of, d.assignment_of, d.histogram, d.experts, (int)R, E);
        gather(rows.p, d_x.p, d.assignment_of, (int)R, C, K);
        experts_gate_up(d.a, p, row_counts, 0, c);
        swiglu_forward(d.s, d.a, row_counts.pieces[0], F);
        experts_down(d.s, p, row_counts, 0, c);
        gather(dy.p, d_dout.p, d.assignment_of, (int)R, C, K);
        experts_backward(d.s, g, true, d_dweights, d.a, p, row_counts, 0, c);
        Ints row = d.row_of.ints();
        auto by_assignment = [&row](const Vec& v) {
            Vec sorted;
            for (size_t a = 0, width = v.size() / row.size(); a < row.size(); a++)
                append(&sorted, slice(v, row[a] * width, width));
            return sorted;
        };
        // Rounded on the way: gate and up, h (once for each of its two factors), y; dh, dgate and dup, dx
        double t = 24 + 2 * sqrt(C) + 2 * sqrt(F);
        check(name + "y", by_assignment(d_y.get()), y, roundings(4, t));
        check(name + "dx", by_assignment(d_dx.get()), dx, roundings(6, t));
        check(name + "dw_gate_up +=", d_dw_gate_up.get(), dw_gate_up, roundings(6, t + sqrt(N)));
        check(name + "dw_down +=", d_dw_down.get(), dw_down, roundings(4, t + sqrt(N)));
        check(name + "dweights", d_dweights.get(), dweights, roundings(4, t));
        d_dw_gate_up.spoil();
        d_dw_down.spoil();
        experts_backward(d.s, g, false, d_dweights, d.a, p, row_counts, 0, c);
        check(name + "dw_gate_up", d_dw_gate_up.get(), first_gate_up, roundings(6, t + sqrt(N)));
        check(name + "dw_down", d_dw_down.get(), first_down, roundings(4, t + sqrt(N)));
        // a rank to which no rows came
        d_dw_gate_up.spoil();
        d_dw_down.spoil();
        row_counts.arrived.assign(E, 0);
        cut_rows(&row_counts);
        experts_backward(d.s, g, false, d_dweights, d.a, p, row_counts, 0, c);
        check_true(name + "dw without rows", l2(d_dw_gate_up.get()) == 0 && l2(d_dw_down.get()) == 0);
    }
}

static void test_experts() {
    check_experts({{9, 2, 5, 14, 10, false}, {21, 3, EXPERT_STREAMS + 3, 24, 34, false}, {17, 1, 6, 10, 40, true}});
}

// Of odd width: matrices of neighbouring experts, which different streams work on, meet inside a word of 4 bytes in
// bf16. That is right, but a tool that looks for races word by word would complain, and leaves these tests out.
static void test_experts_odd_width() {
    check_experts({{1, 1, 1, 1, 1, false}, {9, 2, 5, 13, 9, false}, {21, 3, EXPERT_STREAMS + 3, 24, 33, false}});
}

static void test_swiglu() {
    int shapes[][2] = {{1, 1}, {6, 7}, {40, 2 * WARP + 3}, {5, 1024}, {3, 1040}};
    for (auto& [R, F] : shapes) {
        std::string name = text("swiglu R %d F %d ", R, F);
        Vec gate_up = random_vec((size_t)R * 2 * F, 3), dh = random_vec((size_t)R * F), weights = random_vec<float>(R);
        gate_up[0] = 90;                                        // exp(-90), and exp(100) at the last gate
        gate_up[(size_t)(2 * R - 1) * F - 1 + (R == 1)] = R == 1 ? 1 : -100;
        Vec h((size_t)R * F), dgate_up((size_t)R * 2 * F), weighted_h((size_t)R * F), dweights(R);
        Ints assignment(R);
        for (int row = 0; row < R; row++) assignment[row] = (row + 1) % R;
        for (int row = 0; row < R; row++)
            for (int f = 0; f < F; f++) {
                size_t at = (size_t)row * F + f, g_at = (size_t)row * 2 * F + f;
                double g = gate_up[g_at], u = gate_up[g_at + F], s = logistic(g), w = weights[assignment[row]];
                h[at] = g * s * u;
                weighted_h[at] = w * h[at];
                dgate_up[g_at] = w * dh[at] * u * s * (1 + g * (1 - s));
                dgate_up[g_at + F] = w * dh[at] * g * s;
                dweights[assignment[row]] += dh[at] * h[at];
            }
        Device<floatX> d_gate_up(gate_up), d_dh(dh), d_h(h.size()), d_weighted_h(h.size()), d_dgate_up(gate_up.size());
        Device<float> d_weights(weights), d_dweights(R);
        Device<int> d_assignment(assignment);
        LayerActivations a = {};
        a.gate_up = d_gate_up; a.here_weights = d_weights; a.here_assignment_of = d_assignment;
        Scratch s = {};
        s.h = d_h; s.weighted_h = d_weighted_h; s.dh = d_dh; s.dgate_up = d_dgate_up;
        swiglu_forward(s, a, {0, 1, 0, R}, F);
        swiglu_backward(s, d_dweights, a, {0, 1, 0, R}, F);
        check(name + "h", d_h.get(), h, roundings(1, 16));
        check(name + "w h", d_weighted_h.get(), weighted_h, roundings(1, 16));
        check(name + "dgate and dup", d_dgate_up.get(), dgate_up, roundings(1, 20));
        check(name + "dweights", d_dweights.get(), dweights, roundings(0, 20 + sqrt(F)));
    }
}

// Where weights_given is null, weights are drawn, some of them negative and one of them 0.
static void check_cross_entropy(const std::string& name, int N, int V, const Vec* weights_given) {
    Vec logits = random_vec((size_t)N * V, 3), losses, dlogits;
    for (int i = 0; i < V; i++) logits[i] += 96;                // exp would overflow
    for (double& x : logits) x = rounded<floatX>(x);
    Ints targets = random_ints(N, V);
    if (N > 1) targets[N / 2] = targets[N - 1] = IGNORED;
    Vec weights = weights_given ? *weights_given : random_vec<float>(N);
    if (!weights_given) weights[0] = 0;
    twin_cross_entropy(losses, dlogits, logits, targets, weights, N, V);
    Device<floatX> d_logits(logits);
    Device<float> d_losses(N), d_weights(weights);
    Device<int> d_targets(targets);
    Activations a = {};
    a.logits = d_logits; a.losses = d_losses; a.targets = d_targets; a.target_weights = d_weights;
    // A logit near 100 and a log-sum-exp like it are right to 100 roundings, and so is their difference
    cross_entropy(a, false, 0, N, V);
    if (V > 1) check(name + "losses", d_losses.get(), losses, roundings(0, 120 + sqrt(V)));
    else check_true(name + "losses are 0", l2(d_losses.get()) == 0);
    check_equal(name + "logits without a gradient", d_logits.get(), logits);
    cross_entropy(a, true, 0, N, V);
    if (V > 1) check(name + "losses with dlogits", d_losses.get(), losses, roundings(0, 120 + sqrt(V)));
    if (V > 1) check(name + "dlogits", d_logits.get(), dlogits, roundings(1, 120 + sqrt(V)));
    else check_true(name + "dlogits are 0", l2(d_logits.get()) == 0);
}

static void test_cross_entropy() {
    int shapes[][2] = {{1, 1}, {9, 211}, {5, 50}, {300, 3}, {5, 2056}, {3, 4096}};
    for (auto& [N, V] : shapes) {
        Vec equal(N, (double)0.3f);
        check_cross_entropy(text("cross entropy N %d V %d ", N, V), N, V, &equal);
    }
    for (auto& [N, V] : shapes)
        if (N > 1) check_cross_entropy(text("cross entropy, weights, N %d V %d ", N, V), N, V, nullptr);
}

// fp32 -> bf16 by the definitions: the two neighbours in bf16 of a finite x, as doubles, toward zero and away from it
static std::pair<double, double> bf16_neighbours(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    float toward, away;
    uint32_t lower = bits & 0xffff0000u, upper = lower + (lower == bits ? 0 : 0x10000u);
    memcpy(&toward, &lower, 4);
    memcpy(&away, &upper, 4);
    return {toward, away};
}
static double half_away(float x) {
    auto [toward, away] = bf16_neighbours(x);
    return fabs((double)x - toward) < fabs(away - (double)x) ? toward : away;
}

// How AdamW's state is rounded: every lower half of some upper ones
static void test_store() {
    const float uppers[] = {0.f, -0.f, 1.f, -1.f, 0.01f, -3e38f, 1e-38f, 1e-45f, 3.14159f};
    bool nearest = true, together = true, exact = true;
    for (float x : uppers)
        for (unsigned low = 0; low < 65536; low++) {
            float master;
            uint32_t bits = (float_bits(x) & 0xffff0000u) | low;
            memcpy(&master, &bits, 4);
            __nv_bfloat16 p;
            floatX weight;
            Remainder remainder;
            store(&p, master, HALF_AWAY);
            const bool same_sign = (float_bits((float)p) ^ bits) >> 31 == 0;    // bits: the compiler may take -0 for 0
            nearest = nearest && (double)(float)p == half_away(master) && same_sign;
            store(&weight, master, HALF_AWAY);
            store(&remainder, master, 0);
            if (BF16) together = together && float_bits(master_of(&remainder, &weight)) == bits;
        }
    check_true("halves are rounded away from zero", nearest);
    check_true("weight and remainder are the master, bit for bit", together);
    // Of the 65,536 random numbers as many round away from zero as the lower half says, and none moves what is exact.
    for (float x : {1.f, 1.00001f, -0.3f, 1e-40f, 6e-8f, 255.9f}) {
        auto [toward, away] = bf16_neighbours(x);
        unsigned up = 0;
        for (unsigned random = 0; random < 65536; random++) {
            __nv_bfloat16 p;
            store(&p, x, random);
            exact = exact && ((double)(float)p == toward || (double)(float)p == away);
            up += (double)(float)p == away && away != toward;
        }
        exact = exact && up == (float_bits(x) & 0xffff);
    }
    check_true("random rounding is right in the mean", exact);
    __nv_bfloat16 p;
    uint32_t nan_bits = 0x7fffffffu;
    float nan;
    memcpy(&nan, &nan_bits, 4);
    bool stays = true;
    for (unsigned addend : {0u, HALF_AWAY, 0xffffu})
        for (float x : {nan, -nan, INFINITY, -INFINITY}) {
            store(&p, x, addend);
            stays = stays && (std::isnan(x) ? std::isnan((float)p) : (float)p == x);
        }
    check_true("NaN and infinity stay what they are", stays);
}

static AdamWOptions adamw_options(double lr, double beta1, double beta2, double eps, double decay, uint64_t seed) {
    AdamWOptions o;
    o.lr = lr; o.beta1 = beta1; o.beta2 = beta2; o.eps = eps; o.weight_decay = decay; o.seed = seed;
    return o;
}

template <typename Master, typename Moment>
static void check_adamw(const char* how, bool rmsprop = false) {
    constexpr bool no_master = std::is_same<Master, NoMaster>::value, narrow = sizeof(Moment) == 2;
    for (int step : {1, 2, 1000}) {
        const size_t n = 2 * BLOCK + (step == 1 ? 3 : 8);       // alone, and in packs
        std::string name = text("%s, %s, step %d ", rmsprop ? "rmsprop" : "adamw", how, step);
        Vec value = random_vec<float>(n), g = random_vec(n), m = random_vec<Moment>(n, 0.1);
        Vec v = random_vec<Moment>(n, 0.1);
        for (double& x : v) x = fabs(x);
        g[1] = m[1] = v[1] = 0;                                 // a weight that never had a gradient is only decayed
        std::vector<Master> masters(n);
        std::vector<floatX> weights(n);
        for (size_t i = 0; i < n; i++) {
            store(&masters[i], (float)value[i], 0);
            store(&weights[i], (float)value[i], HALF_AWAY);
            if (no_master) value[i] = (double)(float)weights[i];
        }
        Device<floatX> d_p(n), d_g(g);
        Device<Master> d_master(n);
        Device<Moment> d_m(m), d_v(v);
        copy_to_device(d_p.p, weights);
        copy_to_device(d_master.p, masters);
        AdamWOptions o = adamw_options(3e-2, 0.8, 0.9, 1e-3, 0.2, 6198);
        o.rmsprop = rmsprop;
        const double grad_scale = 0.25;
        for (size_t i = 0; i < n; i++) {
            double grad = grad_scale * g[i];
            if (rmsprop) {
                grad += o.weight_decay * value[i];
                m[i] = grad;
                v[i] = 0.99 * v[i] + (1 - 0.99) * grad * grad;
                value[i] -= o.lr * grad / (sqrt(v[i]) + o.eps);
                continue;
            }
            m[i] = o.beta1 * m[i] + (1 - o.beta1) * grad;
            v[i] = o.beta2 * v[i] + (1 - o.beta2) * grad * grad;
            double m_hat = m[i] / (1 - pow(o.beta1, step)), v_hat = v[i] / (1 - pow(o.beta2, step));
            value[i] = value[i] * (1 - o.lr * o.weight_decay) - o.lr * m_hat / (sqrt(v_hat) + o.eps);
        }
        adamw(d_p.p, d_master.p, d_g.p, d_m.p, d_v.p, n, step, (float)grad_scale, o, 1000);
        copy_to_host(weights.data(), d_p.p, n);
        copy_to_host(masters.data(), d_master.p, n);
        // rounded at random: twice the roundoff of rounding to nearest
        check(name + "p", d_p.get(), value, roundings(no_master ? 2 : 1, 12));
        if (!no_master) {
            Vec got(n), nearest(n);
            for (size_t i = 0; i < n; i++) {
                got[i] = master_of(&masters[i], &weights[i]);
                nearest[i] = half_away((float)got[i]);
            }
            check(name + "master", got, value, roundings(0, 12));
            check_equal(name + "p is its master's rounding", d_p.get(), nearest);
        }
        check(name + "m", d_m.get(), m, narrow ? 0x1p-7 + roundings(0, 6) : roundings(0, 6));
        check(name + "v", d_v.get(), v, narrow ? 0x1p-7 + roundings(0, 8) : roundings(0, 8));
    }
}

// Weights and remainders are the bits of fp32 masters, also after many steps.
template <typename Remainders> static void check_remainders() {
    const size_t n = 2 * BLOCK + 3;
    Vec start = random_vec<float>(n);
    for (size_t i = 0; i < n; i += 5)                           // halfway between neighbours in bf16
        start[i] = ldexp(1 + 0x1p-8 * (double)(i % 7 + 1), -(int)(i % 120)) * (i % 2 ? 1 : -1);
    Device<float> master(start), m(Vec(n, 0.)), v(Vec(n, 0.)), m2(Vec(n, 0.)), v2(Vec(n, 0.));
    Device<floatX> p(n), p2(n);
    Device<Remainders> remainder(n);
    std::vector<floatX> weights(n), weights2(n);
    std::vector<Remainders> remainders(n);
    std::vector<float> masters(n);
    for (size_t i = 0; i < n; i++) {
        store(&weights[i], (float)start[i], HALF_AWAY);
        store(&remainders[i], (float)start[i], 0);
    }
    copy_to_device(p.p, weights);
    copy_to_device(p2.p, weights);
    copy_to_device(remainder.p, remainders);
    size_t different = 0;
    for (int step = 1; step <= 30; step++) {
        Device<floatX> g(random_vec(n));
        const double lr = step % 3 ? 1e-3 : 0.3;                // below the last bit of bf16, and far above
        const AdamWOptions o = adamw_options(lr, .9, .95, 1e-8, .1, 1);
        adamw(p.p, master.p, g.p, m.p, v.p, n, step, 1, o, 0);
        adamw(p2.p, remainder.p, g.p, m2.p, v2.p, n, step, 1, o, 0);
        copy_to_host(weights.data(), p.p, n);
        copy_to_host(weights2.data(), p2.p, n);
        copy_to_host(masters.data(), master.p, n);
        copy_to_host(remainders.data(), remainder.p, n);
        for (size_t i = 0; i < n; i++)
            different += memcmp(&weights[i], &weights2[i], 2) != 0
                         || float_bits(masters[i]) != float_bits(master_of(&remainders[i], &weights2[i]));
    }
    check_true("remainders give the bits of fp32 masters", different == 0);
}

static double mean_of(const Vec& x) { return std::accumulate(x.begin(), x.end(), 0.) / (double)x.size(); }

// Of two vectors of 0 and 1, in standard errors
static double correlation_of_bits(const Vec& a, const Vec& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i++) sum += (2 * a[i] - 1) * (2 * b[i] - 1);
    return sum / sqrt((double)a.size());
}

// Random rounding forgets nothing and is never stuck: a decay of 1/1000 a step, a quarter of bf16's last bit below 1,
// which rounding to nearest would never show. The numbers of p, m and v, of steps and of positions are independent, and
// follow the position alone.
template <typename Master, typename Moment>
static void check_random_rounding(const char* how) {
    constexpr bool narrow = sizeof(Moment) == 2;
    const size_t n = 2 * BLOCK + 8;
    const int steps = 200;
    Device<floatX> p(Vec(n, 1.)), g(Vec(n, 0.));
    Device<Master> master(n);
    Device<Moment> m(Vec(n, 0.)), v(Vec(n, 1.));
    const AdamWOptions small_decay = adamw_options(1e-2, .9, .999, 1e-8, .1, 6198);
    for (int step = 1; step <= steps; step++) adamw(p.p, master.p, g.p, m.p, v.p, n, step, 1, small_decay, 0);
    // each rounding moves an element by a variance of at most 2^-16 / 4; five standard errors of the mean
    const double bound = 5 * sqrt((double)steps) * 0x1p-8 / 2 / sqrt((double)n), want = pow(0.999, steps);
    check_true(text("%s, small decay of p in the mean", how), fabs(mean_of(p.get()) - want) <= (BF16 ? bound : 1e-5));
    check_true(text("%s, small decay of v in the mean", how), fabs(mean_of(v.get()) - want) <= (narrow ? bound : 1e-5));

    // Of p (0), m (1) or v (2): 1 where a value halfway between two of bf16 went away from zero
    auto ups = [&](int step, size_t position, size_t count, int which) {
        Device<floatX> p(Vec(count, 1.)), g(Vec(count, 0.));
        Device<Moment> m(Vec(count, 1.)), v(Vec(count, 1.));
        const double half = 1 - 0x1p-9;
        const AdamWOptions to_half = adamw_options(which == 0 ? 0x1p-9 : 0, half, half, 1e30, 1, 6198);
        adamw(p.p, master.p, g.p, m.p, v.p, count, step, 1, to_half, position);
        Vec x = which == 0 ? p.get() : which == 1 ? m.get() : v.get();
        for (double& a : x) a = a == 1;
        return x;
    };
    std::vector<Vec> all;
    for (int which = BF16 ? 0 : 1; which <= (narrow ? 2 : 0); which++)
        for (int step : {1, 2}) all.push_back(ups(step, 7, n, which));
    for (size_t i = 0; i < all.size(); i++) {
        check_true(text("%s, half go up, %zu", how, i), fabs(mean_of(all[i]) - 0.5) <= 4 * 0.5 / sqrt((double)n));
        for (size_t j = 0; j < i; j++)
            check_true(text("%s, independent, %zu and %zu", how, j, i), fabs(correlation_of_bits(all[i], all[j])) <= 4);
    }
    const int which = BF16 ? 0 : 1;
    const size_t cut = 100;
    Vec pieces = ups(1, 7, cut, which);
    append(&pieces, ups(1, 7 + cut, n - cut, which));
    check_equal(text("%s, in two pieces", how), pieces, all[0]);
}

static void test_adamw() {
    test_store();
    check_adamw<NoMaster, float>(BF16 ? "no master" : "fp32");
    check_adamw<NoMaster, float>(BF16 ? "no master" : "fp32", true);
    check_adamw<NoMaster, __nv_bfloat16>("no master, bf16 moments");
    check_random_rounding<NoMaster, __nv_bfloat16>("no master, bf16 moments");
#ifdef PRECISION_BF16
    check_random_rounding<NoMaster, float>("no master");
    check_adamw<float, float>("fp32 master");
    check_adamw<float, __nv_bfloat16>("fp32 master, bf16 moments");
    check_adamw<Remainder, float>("remainder");
    check_adamw<Remainder, float>("remainder", true);
    check_adamw<Remainder, __nv_bfloat16>("remainder, bf16 moments");
    check_remainders<Remainder>();
#endif
}

static void test_square_sum() {
    for (size_t n : {(size_t)1, (size_t)SQUARE_SUM_RUN, (size_t)2 * SQUARE_SUM_RUN + 5}) {
        Vec x = random_vec(n), want((n + SQUARE_SUM_RUN - 1) / SQUARE_SUM_RUN);
        for (size_t i = 0; i < n; i++) want[i / SQUARE_SUM_RUN] += x[i] * x[i];
        Device<floatX> d_x(x);
        Device<float> sums(want.size());
        square_sum(sums, d_x, n);
        check(text("square sum n %zu", n), sums.get(), want, roundings(0, 4 + sqrt(SQUARE_SUM_RUN)));
    }
}

// Philox from its paper, for any counter and key
static std::array<uint32_t, 4> twin_philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
    for (int round = 0; round < 10; round++) {
        uint64_t left = 0xD2511F53ull * c[0], right = 0xCD9E8D57ull * c[2];
        c = {(uint32_t)(right >> 32) ^ c[1] ^ k[0], (uint32_t)right,
             (uint32_t)(left >> 32) ^ c[3] ^ k[1], (uint32_t)left};
        k = {k[0] + 0x9E3779B9u, k[1] + 0xBB67AE85u};
    }
    return c;
}

static void test_philox() {
    typedef std::array<uint32_t, 4> Four;
    const uint32_t ones = 0xffffffff;
    struct { Four counter; std::array<uint32_t, 2> key; Four answer; } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{ones, ones, ones, ones}, {ones, ones}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
    bool same = true;
    for (auto& [counter, key, answer] : known) same = same && twin_philox(counter, key) == answer;
    check_true("philox twin, known answers", same);
    same = true;
    for (int i = 0; i < 100; i++) {
        uint64_t seed = i == 0 ? 0 : engine(), counter = i == 0 ? 0 : engine();
        Philox ours = philox(seed, counter);
        Four want = twin_philox({(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0},
                                {(uint32_t)seed, (uint32_t)(seed >> 32)});
        for (int j = 0; j < 4; j++) same = same && ours.x[j] == want[j];
    }
    check_true("philox against its twin", same);
}

// By the formula, in double: of four deviates the first within 3 standard deviations
static double twin_init(size_t position, uint32_t seed, double std) {
    const auto u = twin_philox({(uint32_t)position, 0, 0, 0}, {seed, 0});
    auto unit = [](uint32_t word) { return ((double)(word >> 8) + 0.5) * 0x1p-24; };
    for (int j = 0; j < 4; j++) {
        double radius = sqrt(-2 * log(unit(u[j / 2 * 2]))), angle = 2 * M_PI * unit(u[j / 2 * 2 + 1]);
        double value = radius * (j % 2 ? sin(angle) : cos(angle));
        if (fabs(value) <= 3) return value * std;
    }
    return 0;
}

static void test_init() {
    test_philox();
    const size_t n = 40000, position = 1000;
    const float std = 0.5f;
    Device<floatX> p(n), q(n);
    Device<float> master(n);
    LAUNCH(init_normal_kernel, blocks_for(n), p.p, n, position, 6198, std);
    LAUNCH(init_normal_kernel, blocks_for(n), master.p, n, position, 6198, std);
    Vec x = master.get(), want(n), narrow(n);
    for (size_t i = 0; i < n; i++) {
        want[i] = twin_init(position + i, 6198, std);
        narrow[i] = BF16 ? half_away((float)x[i]) : x[i];
    }
    // The angle, up to 2 pi, is off by a few roundings of itself, and a deviate by as many of up to 5
    check("init values", x, want, roundings(0, 64));
    check_equal("init rounded to floatX", p.get(), narrow);

    double mean = 0, square = 0, cut = 0;
    for (double v : x) { mean += v / n; square += v * v / n; cut = std::max(cut, fabs(v)); }
    check_true("init mean", fabs(mean) <= 4 * std / sqrt((double)n));   // four standard errors, here and in the next
    check("init standard deviation", sqrt(square), 0.98658 * std, 4 / sqrt(2. * n));
    check_true("init stays within 3 standard deviations, and gets there",
               cut <= 3 * std * (1 + U32) && cut >= 2.9 * std);
    // Kolmogorov and Smirnov: the distance from the truncated normal's distribution exceeds 2 / sqrt(n) with
    // probability 7e-4
    Vec sorted = x;
    std::sort(sorted.begin(), sorted.end());
    double distance = 0, inside = erf(3 / sqrt(2.));
    for (size_t i = 0; i < n; i++) {
        double cumulative = (erf(sorted[i] / std / sqrt(2.)) + inside) / (2 * inside);
        distance = std::max({distance, fabs(cumulative - (double)i / n), fabs(cumulative - (double)(i + 1) / n)});
    }
    check_true("init distribution", distance * sqrt((double)n) <= 2);

    // The same numbers in two pieces: they belong to positions, not to launches
    const size_t cut_at = 12345;
    LAUNCH(init_normal_kernel, blocks_for(cut_at), q.p, cut_at, position, 6198, std);
    LAUNCH(init_normal_kernel, blocks_for(n - cut_at), q.p + cut_at, n - cut_at, position + cut_at, 6198, std);
    check_equal("init in two pieces", q.get(), p.get());
    LAUNCH(init_normal_kernel, blocks_for(n), q.p, n, position, 6199, std);
    Vec other = q.get();
    double correlation = 0;
    for (size_t i = 0; i < n; i++) correlation += x[i] * other[i] / (n * std * std);
    check_true("init with another seed is independent", fabs(correlation) <= 4 / sqrt((double)n));

    LAUNCH(fill_kernel, blocks_for(n), p.p, n, 0.7f);
    LAUNCH(fill_kernel, blocks_for(n), master.p, n, 0.7f);
    check_equal("fill", p.get(), Vec(n, rounded<floatX>(0.7f)));
    check_equal("fill, master copy", master.get(), Vec(n, (double)0.7f));
}

// ------------------------------------------------------------------------------------------------
// Vectors that were computed elsewhere, in double precision from the formulas; printed to 8 digits or so

// What was printed with eight digits after the point is right to half of the last
static double printed(double scale) { return 1e-8 / scale; }

static void vectors_router() {
    const int N = 3, E = 4, K = 2;
    Vec z = {.5, -1, 2, 0, 1, 1.5, -.5, .25, -2, .75, .5, 3}, dots = {.3, -.2, .1, .4, -.5, .25};
    Vec p = {.15844471, .03535379, .71009992, .09610157, .29902357, .49300652,
             .06672118, .14124873, .00564212, .08825764, .06873512, .83736513};
    Vec dz = {-.0600139, -.00632015, .08450834, -.01739351, .06945953, -.03338255,
              -.01133822, -.02400302, .0022551, .05734018, .02732005, -.08585617};
    Ints experts = {2, 0, 1, 0, 3, 1}, counts = {2, 2, 1, 1};
    DeviceRouter d(z, dots, counts, N, E, K, false);
    router_forward(d.a, d.s, N, d.c);
    check_equal("router experts", d.experts.ints(), experts);
    check("router p", d.p.get(), p, printed(0.4) + roundings(0, 26));
    Vec w = d.weights.get(), lse = d.lse.get(), lines = Device<float>::get_from(d.partial, E);
    check("router sums of weights", Vec{w[0] + w[1], w[2] + w[3], w[4] + w[5]}, {.86854463, .79203009, .92562276},
          printed(0.8) + roundings(0, 26));
    double lb = 0, zloss = 0;
    for (int i = 0; i < E; i++) lb += 0.01 * E / (N * K) * counts[i] * lines[i] / N;
    for (double x : lse) zloss += 0.001 / (N * K) * x * x;
    check("router load-balancing loss", lb, 0.0090660630, printed(0.9) + roundings(0, 26));
    check("router z-loss", zloss, 0.0034091589, printed(0.34) + roundings(0, 52));
    router_backward(d.s, d.a, d.counts, (float)(0.01 * E / (N * N * K)), (float)(2 * 0.001 / (N * K)), N, d.c);
    check("router dz", d.dz.get(), dz, printed(0.04) + roundings(1, 52));
}

static void vectors_rmsnorm() {
    const int C = 4;
    Device<floatX> x(Vec{1, -2, 3, .5}), w(Vec{1, .5, 2, -1}), dy(Vec{.1, .2, -.3, .4});
    Device<floatX> y(C), dx(Vec(C, 0.)), dw(Vec(C, 0.));
    Device<float> r(1), partial(SLABS * C);
    rmsnorm_forward(y, r, x, w, 1, C, 1e-5f);
    rmsnorm_backward(dx, dw, true, partial, dy, x, w, r, 1, C);
    check("rmsnorm 1/rms", r.get(), {.5298121992}, printed(5) + roundings(0, 6));
    check("rmsnorm y", y.get(), {.5298122, -.5298122, 3.1788732, -.2649061}, printed(.1) + roundings(2, 8));
    // in bf16 dy is rounded also, and dx is a difference
    check("rmsnorm dx", dx.get(), {.13105859, -.10317352, -.08365522, -.1728862}, printed(.1) + roundings(6, 24));
    check("rmsnorm dw", dw.get(), {.05298122, -.21192488, -.47683098, .10596244}, printed(.1) + roundings(2, 12));
}

// Position 3 of a head of 128 whose projection has a mean square of 1 without the norm's help: q_norm undoes it
static void vectors_rope() {
    const int D = 128, T = 4;
    OlmoeConfig c;
    c.L = 1; c.C = D; c.H = 1; c.V = 2; c.E = 1; c.K = 1; c.F = 1; c.max_T = T; c.rms_norm_eps = 0;
    Olmoe m;
    olmoe_allocate(&m, c, capacity_of_rows(c, 1, T, Use::inference));
    Vec qkv(T * 3 * D), ones(D);
    double square = 0;
    for (int i = 0; i < D; i++) {
        double& x = qkv[3 * 3 * D + i];
        x = (i + 1) / 128.;
        square += x * x / D;
    }
    for (double& x : ones) x = sqrt(square);
    for (int t = 0; t < 3; t++) qkv[t * 3 * D] = 1;
    for (int t = 0; t < T; t++) qkv[(t * 3 + 1) * D] = 1;
    Device<floatX> d_qkv(qkv), norm(ones), qk(T * 2 * D);
    Device<float> r(T * 2);
    Device<int> positions(Ints{0, 1, 2, 3});
    LayerParameters p = {};
    p.q_norm = p.k_norm = norm;
    LayerActivations a = {};
    a.qkv = d_qkv; a.qk = qk; a.qk_r = r;
    qk_norm_rope_forward(a, p, m.scratch, positions, T, c);
    Vec out = columns(qk.get(), T, 2 * D, 0, D);
    Vec cosine = Device<float>::get_from(m.scratch.cosine, T * D / 2);
    Vec sine = Device<float>::get_from(m.scratch.sine, T * D / 2);
    check("rope frequencies", Vec{asin(sine[D / 2 + 1]), asin(sine[D / 2 + 63])}, {.8659643234, 1.1547819847e-4},
          roundings(0, 4));
    check("rope cosine", Vec{cosine[D / 2], cosine[3 * D / 2 + 1]}, {cos(1), cos(3 * .8659643234)}, roundings(0, 4));
    Vec at3, want = {-.07939682, -.28010765, .49965354, -.50162806, -.43318932, 1.00017316};
    for (int i : {0, 1, 63, 64, 65, 127}) at3.push_back(out[3 * D + i]);
    check("rope at position 3", at3, want, printed(.5) + roundings(5, 24));
    olmoe_free(&m);
}

static void vectors_swiglu() {
    Device<floatX> gate_up(Vec{.7, -1.3}), dh(Vec{.5}), h(1), weighted_h(1), dgate_up(2);
    Device<float> weights(Vec{1.}), dweights(1);
    Device<int> assignment(Ints{0});
    LayerActivations a = {};
    a.gate_up = gate_up; a.here_weights = weights; a.here_assignment_of = assignment;
    Scratch s = {};
    s.h = h; s.weighted_h = weighted_h; s.dh = dh; s.dgate_up = dgate_up;
    swiglu_forward(s, a, {0, 1, 0, 1}, 1);
    swiglu_backward(s, dweights, a, {0, 1, 0, 1}, 1);
    // in bf16 the two inputs are rounded, and silu's derivative passes 1.3 times its input's rounding on
    check("swiglu h", h.get(), {-.60805087}, printed(.6) + roundings(4, 16));
    check("swiglu dgate and dup", dgate_up.get(), {-.53520141, .23386572}, printed(.2) + roundings(4, 20));
    check("swiglu dweights", dweights.get(), {.5 * -.60805087}, printed(.3) + roundings(4, 20));
}

static void vectors_attention() {
    const int T = 3, C = 4;
    Vec qk = {1, 0, 1, 0, .5, 1, 0, 0,   0, 2, 0, 1, 1, 0, 0, 1,   1, 1, -1, 0, 0, 1, 1, 0};
    // v has two columns in the vectors; the other two stay zero
    Vec qkv(T * 3 * C), v = {1, 2, 3, -1, 0, 1}, dout(T * C), d = {.1, -.2, .3, .4, -.5, .6};
    for (int t = 0; t < T; t++)
        for (int i = 0; i < 2; i++) { qkv[(t * 3 + 2) * C + i] = v[t * 2 + i]; dout[t * C + i] = d[t * 2 + i]; }
    Device<floatX> d_qk(qk), d_qkv(qkv), d_dout(dout), out(T * C), probs(T * T), dscores(T * T);
    Device<float> lse(T), scores(T * T), dprobs(T * T), dqkv32(T * 3 * C);
    MicroBatch batch;
    batch.starts = {0, T};
    OlmoeConfig c;
    c.C = C; c.H = 1;
    LayerActivations a = {};
    a.qk = d_qk; a.qkv = d_qkv; a.attn = out; a.attn_lse = lse;
    Scratch s = {};
    s.scores = scores; s.probs = probs; s.dattn = d_dout; s.dqkv32 = dqkv32; s.dprobs = dprobs; s.dscores = dscores;
    attention_forward(a, s, batch, c);
    attention_backward(s, a, batch, c);
    Vec got = dqkv32.get();
    check("attention out", columns(out.get(), T, C, 0, 2), {1, 2, 1.75508134, .86737799, 1.48207656, .75230559},
          printed(1) + roundings(3, 40));
    // in bf16 dout, P and dS are rounded, and dP - delta is a difference
    check("attention dq", columns(got, T, 3 * C, 0, C),
          {0, 0, 0, 0, -.03525056, .07050111, 0, -.07050111, -.2032436, .31314824, .09333896, -.31314824},
          printed(.1) + roundings(8, 80));
    check("attention dk", columns(got, T, 3 * C, C, C),
          {.21980928, .3608115, -.21980928, .07050111, -.31314824, -.45415046, .31314824, -.07050111,
           .09333896, .09333896, -.09333896, 0}, printed(.1) + roundings(8, 80));
    check("attention dv", columns(got, T, 3 * C, 2 * C, 2),
          {.06463081, .31551212, -.0597149, .35858878, -.10491591, .1258991}, printed(.1) + roundings(6, 60));
}

static void vectors_adamw() {
    Device<floatX> p(Vec{1.}), g(Vec{.1});
    Device<float> master(Vec{1.}), m(Vec{0.}), v(Vec{0.});
    const AdamWOptions o = adamw_options(4e-4, .9, .95, 1e-8, .1, 0);
    auto step = [&](int s) {
#ifdef PRECISION_BF16
        adamw(p.p, master.p, g.p, m.p, v.p, 1, s, 1, o, 0);
        return master.get();
#else
        adamw(p.p, (NoMaster*)nullptr, g.p, m.p, v.p, 1, s, 1, o, 0);
        return p.get();
#endif
    };
    check("adamw step 1", step(1), {.999560000040}, roundings(0, 3));
    g.put({-.2});
    // in bf16 the two gradients are rounded, which moves their ratio, and with it a step of 4e-4
    check("adamw step 2", step(2), {.999665367211}, roundings(0, 5) + 4 * 4e-4 * UX);
}

// OLMoE's published schedule: 2500 steps of warm-up, 5e12 tokens of cosine in steps of 4,194,304; and the anneal after
// it
static void vectors_schedule() {
    Schedule s;
    s.lr = 4e-4; s.min_lr = 4e-5; s.warmup = 10485760000. / 4194304; s.total = 5e12 / 4194304;
    double steps[] = {1, 2500, 5000, 100e3, 600e3, 1192093, 1.3e6};
    double want[] = {4.0144e-5, 4e-4, 3.99996077e-4, 3.94065911e-4, 2.18714846e-4, 4e-5, 4e-5};
    for (int i = 0; i < 7; i++)                                 // nine digits
        check(text("cosine at step %.0f", steps[i]), learning_rate(s, steps[i]), want[i], 5e-9);
    s.kind = "linear"; s.total = 12500;
    check("linear in its middle", learning_rate(s, 7500), 2.2e-4, 1e-12);
    check("linear at its end", learning_rate(s, 20000), 4e-5, 1e-12);
    s.kind = "constant";
    check("constant", learning_rate(s, 1e6), 4e-4, 1e-12);
    check("constant in warm-up", learning_rate(s, 1250), 2.2e-4, 1e-12);
    s.kind = "anneal"; s.lr = 4e-5; s.total = 23842;
    check("anneal at step 1", learning_rate(s, 1), 4e-5 * 23841 / 23842, 1e-12);
    check_true("anneal ends at 0", learning_rate(s, 23842) == 0);
    // OLMoE's SFT and DPO: schedulers of n and w ticks, 32 of them an update. Update s has the rate logged after s - 1.
    s.kind = "hf-linear"; s.lr = 2e-5; s.min_lr = 1e-5; s.warmup = 9119 / 32.; s.total = 303976 / 32.;
    check_true("hf-linear begins at 0", learning_rate(s, 1) == 0);
    auto all_digits = [&](const char* name, double got, double want, double last_digit) {
        check(name, got, want, 0.5 * last_digit / want);
    };
    all_digits("sft, logged after step 1", learning_rate(s, 2), 7.018313e-8, 1e-14);
    all_digits("sft, logged after step 285", learning_rate(s, 286), 1.99999322e-5, 1e-13);
    all_digits("sft, logged after step 1000", learning_rate(s, 1001), 1.844799e-5, 1e-11);
    all_digits("sft, logged after step 9000", learning_rate(s, 9001), 1.0836439e-6, 1e-13);
    check_true("hf-linear ends at 0", learning_rate(s, 9501) == 0 && learning_rate(s, 9500) > 0);
    s.lr = 5e-7; s.warmup = 18275 / 32.; s.total = 182751 / 32.;
    all_digits("dpo, logged after step 1", learning_rate(s, 2), 8.75513e-10, 1e-15);
    s.warmup = 0; s.total = 10;
    check("without warm-up", learning_rate(s, 1), 5e-7, 1e-12);
    check("its last update", learning_rate(s, 10), 5e-8, 1e-12);
}

// The slopes are the derivatives of the losses, by differences of their formulas as papers have them; the measures are
// what the log says. The first loss is ln 2, or 1/2.
static void preference_losses() {
    TrainOptions o;
    Rows rows;
    const Vec reference = random_vec<double>(8, 30);
    const std::vector<size_t> numbers = {3, 0};
    const uint8_t labels[] = {1, 0, 0, 0};                      // row 3 is undesirable, row 0 desirable
    auto sigma = [](double x) { return 1 / (1 + exp(-x)); };
    o.beta = 0.3;
    rows.labels = labels;
    for (RowKind kind : {RowKind::dpo, RowKind::kto}) {
        rows.format.kind = kind;
        const size_t sides = rows.sides();
        Vec logps;
        for (size_t row : numbers)
            for (size_t side = 0; side < sides; side++) logps.push_back(reference[row * sides + side]);
        Vec sums(MEASURES, 0);
        preferences(o, rows, numbers, logps, {reference, {}}, 0, 0.5, &sums);
        check(text("%s, the first loss", name_of(kind)), sums[LOSS], kind == RowKind::dpo ? log(2.0) : 0.5, 1e-15);
        const Vec random = random_vec<double>(logps.size(), 3);
        for (size_t i = 0; i < logps.size(); i++) logps[i] += random[i];
        const double kl = 0.7, h = 1e-5;
        auto loss = [&](const Vec& x, Vec* slopes = nullptr, Vec* measured = nullptr) {
            Vec all(MEASURES, 0), s = preferences(o, rows, numbers, x, {reference, {}}, kl, 0.5, &all);
            if (slopes) *slopes = s;
            if (measured) *measured = all;
            return all[LOSS];
        };
        Vec slopes, differences;
        const double got = loss(logps, &slopes, &sums);
        for (size_t i = 0; i < logps.size(); i++) {
            Vec more = logps, less = logps;
            more[i] += h; less[i] -= h;
            differences.push_back((loss(more) - loss(less)) / (2 * h));
        }
        check(text("%s, slopes", name_of(kind)), slopes, differences, 1e-8);
        double want = 0;
        for (size_t i = 0; i < 2; i++) {
            const double r = logps[i * sides] - reference[numbers[i] * sides];
            if (kind == RowKind::dpo) {
                const double other = logps[2 * i + 1] - reference[numbers[i] * 2 + 1];
                want -= log(sigma(0.3 * (r - other))) / 2;
            } else want += (1 - sigma(0.3 * (numbers[i] == 0 ? r - kl : kl - r))) / 2;
        }
        check(text("%s, the loss", name_of(kind)), got, want, 1e-12);
        const double counted = sums[CHOSENS] + sums[REJECTEDS];
        check_true(text("%s, rows counted", name_of(kind)), counted == (kind == RowKind::dpo ? 4 : 2));
    }
    const double ratios[] = {1, 2};
    check("kl is a mean", kto_kl({3, 5}, ratios), 2.5, 1e-15);
    check_true("kl is not negative", kto_kl({0, 1}, ratios) == 0);
    rows.format.kind = RowKind::dpo;
    Vec sums(MEASURES, 0);
    const Vec slopes = preferences(o, rows, {0}, {-9000, 9000}, {Vec(2, 0), {}}, 0, 1, &sums);
    check("far on the wrong side", Vec{sums[LOSS], slopes[0], slopes[1]}, {0.3 * 18000, -0.3, 0.3}, 1e-12);
}

// Rows dealt to ranks: each once, as many to each rank, micro-batches of all sizes, tokens as even as their lengths let
static void rows_dealt() {
    const Group before = world;
    const std::vector<int> lengths = {7, 100, 3, 50, 50, 9, 90, 1, 60, 2, 30, 5};
    for (int W : {1, 2, 3, 4}) {
        std::vector<size_t> seen;
        std::vector<double> tokens, all;
        bool sorted = true, sizes = true;
        for (int rank = 0; rank < W; rank++) {
            world.rank = rank; world.size = W;
            const Deal d = rows_deal(lengths, 2);
            double sum = 0;
            sizes = sizes && d.mine.size() == (size_t)ceil_div(lengths.size() / W, 2);
            if (rank == 0) all = d.tokens;
            sizes = sizes && all == d.tokens;
            std::vector<size_t> places;
            for (auto& micro_batch : d.mine)
                for (size_t place : micro_batch) { places.push_back(place); sum += lengths[place]; }
            sizes = sizes && places.size() == lengths.size() / W;
            sorted = sorted && std::is_sorted(places.begin(), places.end());
            seen.insert(seen.end(), places.begin(), places.end());
            tokens.push_back(sum);
        }
        std::sort(seen.begin(), seen.end());
        bool each = seen.size() == lengths.size();
        for (size_t i = 0; i < seen.size(); i++) each = each && seen[i] == i;
        const auto [least, most] = std::minmax_element(tokens.begin(), tokens.end());
        const std::string name = text("%d ranks, ", W);
        check_true(name + "each row once, in the step's order", each && sorted && sizes);
        check_true(name + "tokens", std::accumulate(all.begin(), all.end(), 0.0) == 407 && *most - *least <= 40);
    }
    world.size = 3;
    for (world.rank = 0; world.rank < 3; world.rank++) {        // a last block of validation
        const Deal d = rows_deal({5, 6}, 4);
        const size_t mine = world.rank < 2;
        check_true("fewer rows than ranks", d.mine.size() == 1 && d.mine[0].size() == mine && d.tokens[0] == 11);
    }
    world = before;
}

// ------------------------------------------------------------------------------------------------
// The model in double precision: olmoe.cu's forward and backward as compositions of the layers above

struct Outputs {
    Vec logits;             // (N, V)
    Vec losses;             // (N) of each token, not weighted
    Vec grads;              // flat
    Ints experts;           // (L, N, K)
    double loss = 0, lb = 0, z = 0;
};

// The gradient of a micro-batch is that of its weighted sum of -log p, and of its auxiliary losses over micro_batches
struct Batch : MicroBatch {
    double lb_coef = 0, z_coef = 0;
    int micro_batches = 1;
};

// The weights of a layer, or their gradients, in their order in the flat vector
struct TwinWeights {
    Vec attn_norm, qkv, q_norm, k_norm, attn_out, ffn_norm, router, gate_up, down;

    std::array<Vec*, 9> all() {
        return {&attn_norm, &qkv, &q_norm, &k_norm, &attn_out, &ffn_norm, &router, &gate_up, &down};
    }
    explicit TwinWeights(const OlmoeConfig& c) {                // zeros
        const size_t C = c.C, E = c.E, matrix = C * C, expert = c.F * C;
        const size_t sizes[] = {C, 3 * matrix, C, C, matrix, C, E * C, 2 * E * expert, E * expert};
        for (int i = 0; i < 9; i++) all()[i]->assign(sizes[i], 0);
    }
};

struct TwinLayer {
    Vec x, a, qkv, q_pre, k_pre, q, k, v, o, x_mid, m, z, p, lse, weights, y;
    Ints experts;
    Vec counts;             // (E) tokens of each expert
};

// Fills in `a`; x is the residual stream, before the layer and then after it.
static void twin_layer(TwinLayer& a, Vec& x, TwinWeights& w, const OlmoeConfig& c, const TwinRope& rope,
                       const Batch& batch) {
    const int N = batch.N(), C = c.C, D = C / c.H, E = c.E, K = c.K, F = c.F;
    const double eps = (double)c.rms_norm_eps;
    Vec y, r;
    a.x = x;
    twin_rmsnorm(a.a, r, x, w.attn_norm, N, C, eps);
    twin_linear(a.qkv, a.a, w.qkv, N, C, 3 * C);
    a.q_pre = columns(a.qkv, N, 3 * C, 0, C);
    a.k_pre = columns(a.qkv, N, 3 * C, C, C);
    a.v = columns(a.qkv, N, 3 * C, 2 * C, C);
    twin_rmsnorm(a.q, r, a.q_pre, w.q_norm, N, C, eps);
    twin_rmsnorm(a.k, r, a.k_pre, w.k_norm, N, C, eps);
    twin_rope(a.q, rope, batch.positions, C, D, 1);
    twin_rope(a.k, rope, batch.positions, C, D, 1);
    twin_attention(a.o, r, a.q, a.k, a.v, batch.starts, C, c.H);
    twin_linear(y, a.o, w.attn_out, N, C, C);
    for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
    a.x_mid = x;
    twin_rmsnorm(a.m, r, x, w.ffn_norm, N, C, eps);
    twin_linear(a.z, a.m, w.router, N, C, E);
    twin_router(a.p, a.lse, a.experts, a.weights, a.z, N, E, K, c.norm_topk_prob);
    twin_experts(a.y, a.m, a.experts, w.gate_up, w.down, N, K, C, F);
    for (int s = 0; s < N * K; s++)
        for (int i = 0; i < C; i++) x[(size_t)(s / K) * C + i] += a.weights[s] * a.y[(size_t)s * C + i];
    a.counts.assign(E, 0);
    for (int e : a.experts) a.counts[e]++;
}

// dx is the gradient of the residual stream, after the layer and then before it.
static void twin_layer_backward(TwinWeights& g, Vec& dx, const TwinLayer& a, const TwinWeights& w, const OlmoeConfig& c,
                                const TwinRope& rope, const Batch& batch) {
    const int N = batch.N(), C = c.C, D = C / c.H, E = c.E, K = c.K, F = c.F;
    const double eps = (double)c.rms_norm_eps, LNK = (double)c.L * N * K * batch.micro_batches;
    const Vec zeros((size_t)N * C);
    Vec dm = zeros, dx_rows((size_t)N * K * C), dweights((size_t)N * K), dz((size_t)N * E), per_expert(E);
    twin_experts_backward(dx_rows, g.gate_up, g.down, dweights, dx, a.m, a.experts, a.weights, w.gate_up, w.down, N, K,
                          C, F);
    for (int s = 0; s < N * K; s++)
        for (int i = 0; i < C; i++) dm[(size_t)(s / K) * C + i] += dx_rows[(size_t)s * C + i];
    for (int e = 0; e < E; e++) per_expert[e] = batch.lb_coef * E / LNK * a.counts[e] / N;
    twin_router_backward(dz, dweights, a.p, a.lse, a.experts, N, E, K, c.norm_topk_prob, per_expert,
                         batch.z_coef / LNK);
    twin_linear_backward(dm, g.router, dz, a.m, w.router, N, C, E);
    twin_rmsnorm_backward(dx, g.ffn_norm, dm, a.x_mid, w.ffn_norm, N, C, eps);

    Vec dout = zeros, dq = zeros, dk = zeros, dv = zeros, dq_pre = zeros, dk_pre = zeros, da = zeros;
    Vec dqkv(a.qkv.size());
    twin_linear_backward(dout, g.attn_out, dx, a.o, w.attn_out, N, C, C);
    twin_attention_backward(dq, dk, dv, dout, a.q, a.k, a.v, batch.starts, C, c.H);
    twin_rope(dq, rope, batch.positions, C, D, -1);
    twin_rope(dk, rope, batch.positions, C, D, -1);
    twin_rmsnorm_backward(dq_pre, g.q_norm, dq, a.q_pre, w.q_norm, N, C, eps);
    twin_rmsnorm_backward(dk_pre, g.k_norm, dk, a.k_pre, w.k_norm, N, C, eps);
    set_columns(dqkv, dq_pre, N, 3 * C, 0, C);
    set_columns(dqkv, dk_pre, N, 3 * C, C, C);
    set_columns(dqkv, dv, N, 3 * C, 2 * C, C);
    twin_linear_backward(da, g.qkv, dqkv, a.a, w.qkv, N, C, 3 * C);
    twin_rmsnorm_backward(dx, g.attn_norm, da, a.x, w.attn_norm, N, C, eps);
}

// Adds to out.grads. `params` is the flat vector of all parameters.
static void twin_model(Outputs& out, const OlmoeConfig& c, const Vec& params, const Batch& batch) {
    const int N = batch.N(), C = c.C, E = c.E, V = c.V;
    const double eps = (double)c.rms_norm_eps, LNK = (double)c.L * N * c.K * batch.micro_batches;
    const int positions = *std::max_element(batch.positions.begin(), batch.positions.end()) + 1;
    const TwinRope rope = twin_rope_tables(positions, C / c.H, (double)c.rope_theta);
    const size_t vocabulary = (size_t)V * C;
    size_t at = 0;                                              // position in the flat vector
    auto take = [&](size_t n) { at += n; return slice(params, at - n, n); };

    Vec embed = take(vocabulary), x, r;
    for (int id : batch.inputs) append(&x, slice(embed, (size_t)id * C, C));
    std::vector<TwinLayer> layers(c.L);
    std::vector<TwinWeights> weights(c.L, TwinWeights(c));
    out.lb = out.z = 0;
    out.experts.clear();
    for (int l = 0; l < c.L; l++) {
        TwinLayer& a = layers[l];
        for (Vec* w : weights[l].all()) *w = take(w->size());
        twin_layer(a, x, weights[l], c, rope, batch);
        Vec sums(E);
        for (size_t i = 0; i < a.p.size(); i++) sums[i % E] += a.p[i];
        for (int e = 0; e < E; e++) out.lb += batch.lb_coef * E / LNK * a.counts[e] * sums[e] / N;
        for (double lse : a.lse) out.z += batch.z_coef / LNK * lse * lse;
        append(&out.experts, a.experts);
    }
    Vec final_norm = take(C), lm_head = take(vocabulary), final_out, dlogits;
    twin_rmsnorm(final_out, r, x, final_norm, N, C, eps);
    twin_linear(out.logits, final_out, lm_head, N, C, V);
    twin_cross_entropy(out.losses, dlogits, out.logits, batch.targets, batch.weights, N, V);
    out.loss = out.lb + out.z;
    for (int n = 0; n < N; n++) out.loss += batch.weights[n] * out.losses[n];

    out.grads.resize(at);
    auto give = [&](const Vec& v) {                             // from the end of the flat vector to its beginning
        at -= v.size();
        for (size_t i = 0; i < v.size(); i++) out.grads[at + i] += v[i];
    };
    Vec dx((size_t)N * C), d((size_t)N * C), dw(lm_head.size()), dnorm(C), dembed(embed.size());
    twin_linear_backward(d, dw, dlogits, final_out, lm_head, N, C, V);
    twin_rmsnorm_backward(dx, dnorm, d, x, final_norm, N, C, eps);
    give(dw);
    give(dnorm);
    for (int l = c.L - 1; l >= 0; l--) {
        TwinWeights g(c);
        twin_layer_backward(g, dx, layers[l], weights[l], c, rope, batch);
        const auto all = g.all();
        for (auto v = all.rbegin(); v != all.rend(); ++v) give(**v);
    }
    for (int n = 0; n < N; n++)
        for (int i = 0; i < C; i++) dembed[(size_t)batch.inputs[n] * C + i] += dx[(size_t)n * C + i];
    give(dembed);
}

// ------------------------------------------------------------------------------------------------
// The model on the device

// A model of its own for a test, and what a training step of it computes
struct Model {
    Olmoe m;
    Vec params;             // flat, as the device holds them

    Model(const OlmoeConfig& c, const Capacity& capacity, const char* masters = "fp32", const char* moments = "fp32") {
        choose_state(&m, masters, moments);
        olmoe_allocate(&m, c, capacity);
    }
    Model(const OlmoeConfig& c, int B, int T, int recompute = 0, const char* masters = "fp32",
          const char* moments = "fp32")
        : Model(c, capacity_of_rows(c, B, T, Use::training, recompute), masters, moments) {}
    Model(const Model&) = delete;
    ~Model() { olmoe_free(&m); }

    void set(const Vec& values) {
        params = values;
        for (double& x : params) x = rounded<floatX>(x);
        for (const Tensor& t : m.tensors) put(t.offset, t.count);
    }
    // Writes elements [offset, offset + count) of params, which are in one tensor
    void put(size_t offset, size_t count) {
        std::vector<floatX> v(count);
        std::vector<float> wide(count);
        for (size_t i = 0; i < count; i++) {
            v[i] = (floatX)(float)params[offset + i];
            wide[i] = (float)params[offset + i];
        }
        copy_to_device(element_at(m.tensors, m.params, offset), v);
        if (m.master_weights)
            for_updated(m.tensors, offset, count, [&](size_t first, size_t state, size_t n) {
                floatX* p = element_at(m.tensors, m.params, first);
                state_to_device(&m, State::master, state, p, wide.data() + (first - offset), n);
            });
        cudaCheck(cudaStreamSynchronize(main_stream.stream));
    }
    // All parameters or all gradients
    Vec flat(const Parameters& p) const {
        Vec v;
        for (const Tensor& t : m.tensors) append(&v, Device<floatX>::get_from(t.in(p), t.count));
        return v;
    }
    Ints experts() const {
        Ints all;
        for (const LayerActivations& a : m.acts.layers) {
            Vec part = Device<int>::get_from(a.experts, (size_t)m.R);
            all.insert(all.end(), part.begin(), part.end());
        }
        return all;
    }
    // The first micro-batch of a step, which must not need what is in the gradients, or a later one
    void set_batch(const MicroBatch& b, bool accumulate) {
        for (const Tensor& t : m.tensors)
            if (floatX* g = t.in(m.grads); g && !accumulate)
                cudaCheck(cudaMemsetAsync(g, 0xff, t.count * sizeof(floatX), main_stream.stream));      // NaN
        olmoe_set_batch(&m, b, accumulate);
    }
    void forward(const MicroBatch& b, bool accumulate = false) {
        set_batch(b, accumulate);
        olmoe_forward(&m);
    }
    // After forward
    void backward(const Batch& b, int micro_batches, bool last = false) {
        olmoe_head(&m, true);
        olmoe_backward(&m, b.lb_coef, b.z_coef, micro_batches, last);
    }
    // Of all tokens, chunk by chunk
    Vec logits() {
        Vec all;
        for (int first = 0, n; first < m.N; first += n) {
            n = std::min(m.capacity.classified, m.N - first);
            olmoe_classify(&m, first, n);
            append(&all, Device<floatX>::get_from(m.acts.logits, (size_t)n * m.config.V));
        }
        return all;
    }
    // The loss alone, and the experts
    double loss(const Batch& b, Ints* chosen = nullptr) {
        forward(b);
        olmoe_head(&m, false);
        double loss = olmoe_losses(&m, b.lb_coef, b.z_coef).loss;
        if (chosen) *chosen = experts();
        return loss;
    }
    // Forward and backward
    Outputs run(const Batch& b, bool accumulate = false) {
        Outputs out;
        forward(b, accumulate);
        out.logits = logits();
        out.experts = experts();
        backward(b, b.micro_batches);
        Losses losses = olmoe_losses(&m, b.lb_coef / b.micro_batches, b.z_coef / b.micro_batches);
        out.loss = losses.loss; out.lb = losses.lb; out.z = losses.z;
        out.losses.assign(m.losses.begin(), m.losses.end());
        out.grads = flat(m.grads);
        return out;
    }
};

static OlmoeConfig model_shape(int L, int C, int H, int V, int E, int K, int F) {
    OlmoeConfig c;
    c.L = L; c.C = C; c.H = H; c.V = V; c.E = E; c.K = K; c.F = F;
    c.rope_theta = 100;
    c.rms_norm_eps = 1e-3f;
    return c;
}

static bool is_router(const HfTensor& t) { return t.name.find("mlp.gate.") != std::string::npos; }

// Weights that keep activations near 1 and bring gradients of all tensors into sight; router logits spread by 2
static Vec random_params(const OlmoeConfig& c) {
    Vec params;
    for (const HfTensor& t : hf_tensors(c)) {
        const bool norm = t.shape.size() == 1, embed = t.name.find("embed") != std::string::npos;
        const double scale = (is_router(t) ? 2 : 1) / sqrt((double)t.shape.back());
        Vec v = random_vec(t.count, norm ? 0.2 : embed ? 1 : scale);
        if (norm) for (double& x : v) x = rounded<floatX>(1 + x);
        append(&params, v);
    }
    return params;
}

// Sequences of these lengths. All targets count the same, but for two that are ignored, where there are so many.
static Batch random_batch(const OlmoeConfig& c, const Ints& lengths) {
    const int N = std::accumulate(lengths.begin(), lengths.end(), 0);
    Batch b;
    (MicroBatch&)b = random_sequences(lengths, c.V, 1. / std::max(1, N - 2));
    if (N > 3) b.targets[1] = b.targets[N - 2] = IGNORED;
    b.lb_coef = 0.3;
    b.z_coef = 0.2;
    return b;
}

static Batch random_batch(const OlmoeConfig& c, int B, int T) { return random_batch(c, Ints(B, T)); }

// Sequences [first, first + count) of a batch
static Batch part_of(const Batch& all, int first, int count) {
    Batch part = all;
    (MicroBatch&)part = MicroBatch();
    for (int s = first; s < first + count; s++) {
        const int at = all.begin(s), T = all.length(s);
        batch_add(&part, &all.inputs[at], &all.targets[at], T, 0, all.positions[at]);
    }
    part.weights = slice(all.weights, all.begin(first), part.N());
    return part;
}

// Each token's experts in order of id: what a routing decides, however close the chosen ones are
static Ints expert_sets(Ints experts, int K) {
    for (size_t i = 0; i < experts.size(); i += K) std::sort(experts.begin() + i, experts.begin() + i + K);
    return experts;
}

// Makes a batch's routing so decided that rounding can't change it: attention is causal, so the first token of a
// sequence whose K-th and next router logits are closer than `margin` in some layer is drawn again until it is not, and
// the tokens before it stay as good as they were.
static Batch decisive(Batch b, Model& model, double margin) {
    const OlmoeConfig& c = model.m.config;
    for (int attempt = 0; attempt < 200 * b.N(); attempt++) {
        model.forward(b);
        std::vector<bool> close(b.N());
        for (const LayerActivations& a : model.m.acts.layers) {
            Vec z = Device<float>::get_from(a.router_logits, (size_t)b.N() * c.E);
            for (int n = 0; n < b.N() && c.K < c.E; n++) {
                auto first = z.begin() + (size_t)n * c.E;
                std::sort(first, first + c.E, std::greater<double>());
                if (!(first[c.K - 1] - first[c.K] >= margin)) close[n] = true;
            }
        }
        bool any = false;
        for (int s = 0; s < b.B(); s++)
            for (int t = b.begin(s); t < b.begin(s) + b.length(s); t++)
                if (close[t]) { b.inputs[t] = random_below(c.V); any = true; break; }
        if (!any) return b;
    }
    die("test: no tokens found whose routing is decided by %g", margin);
}

static Batch decisive_batch(Model& model, int B, int T, double margin) {
    return decisive(random_batch(model.m.config, B, T), model, margin);
}

// Each tensor of the flat vectors. Where the gradient vanishes, in the twin but for double's rounding, ours may be 1e-6
// of the largest tensor's.
static void check_grads(const std::string& name, const OlmoeConfig& c, const Vec& got, const Vec& want,
                        double tolerance) {
    double largest = 0;
    for (const HfTensor& t : hf_tensors(c)) largest = std::max(largest, l2(slice(want, t.offset, t.count)));
    for (const HfTensor& t : hf_tensors(c)) {
        Vec g = slice(got, t.offset, t.count), w = slice(want, t.offset, t.count);
        if (l2(w) > 1e-12 * largest) check(name + t.name, g, w, tolerance);
        else check_true(name + t.name + " is 0", l2(g) <= 1e-6 * largest);
    }
}

// FP32: the bars of the fixtures. BF16: an element has passed through some 12 roundings a layer forward and as many
// backward, and a few after the layers.
static double model_tolerance(const OlmoeConfig& c, double fp32) { return BF16 ? (24 * c.L + 8) * UX : fp32; }

// The margin of a routing that these roundings don't change
constexpr double MARGIN = BF16 ? 0.3 : 0.02;

// A run against the twin
static void check_outputs(const std::string& name, const OlmoeConfig& c, const Outputs& got, const Outputs& want) {
    const double tolerance = model_tolerance(c, 1e-5);
    check_equal(name + "routing", expert_sets(got.experts, c.K), expert_sets(want.experts, c.K));
    check(name + "logits", got.logits, want.logits, tolerance);
    check(name + "loss", got.loss, want.loss, tolerance);
    check(name + "load-balancing loss", got.lb, want.lb, tolerance);
    check(name + "z-loss", got.z, want.z, tolerance);
    if (BF16) check(name + "gradients", got.grads, want.grads, tolerance, false);
    else check_grads(name, c, got.grads, want.grads, 1e-4);
}

// Shapes at the edges of what a config allows, against the twin
struct ModelShape { int L, C, H, V, E, K, F, B, T; bool normalize, one_token; };

static void check_models(const std::vector<ModelShape>& shapes) {
    for (auto& s : shapes) {
        std::string name = text("model L %d C %d H %d V %d E %d K %d F %d B %d T %d%s ", s.L, s.C, s.H, s.V, s.E, s.K,
                                s.F, s.B, s.T, s.normalize ? " normalized" : "");
        OlmoeConfig c = model_shape(s.L, s.C, s.H, s.V, s.E, s.K, s.F);
        c.norm_topk_prob = s.normalize;
        Model model(c, s.B, s.T);
        model.set(random_params(c));
        Batch b = random_batch(c, s.B, s.T);
        if (s.one_token) b.inputs.assign(b.inputs.size(), 3);
        else b = decisive(b, model, s.T > 100 ? 0.01 : MARGIN);
        if (BF16 && s.T > 100) continue;                        // no margin of 0.3 can be kept over so many tokens
        Outputs got = model.run(b), want;
        twin_model(want, c, model.params, b);
        check_outputs(name, c, got, want);
        std::set<int> first_layer(got.experts.begin(), got.experts.begin() + s.T);
        if (s.one_token) check_true(name + "all to one", first_layer.size() == 1);
    }
}

static void model_shapes() {
    check_models({
        {2, 12, 2, 23, 4, 2, 10, 2, 7, false, false},
        {1, 10, 1, 17, 3, 1, 8, 1, 9, false, false},            // K = 1
        {2, 6, 3, 11, 3, 3, 6, 2, 4, true, false},              // K = E
        {1, 8, 2, 9, 5, 2, 4, 1, 1, true, false},               // T = 1
        {1, 4, 2, 5, 1, 1, 1, 3, 2, false, false},              // E = 1
        {2, 12, 2, 23, 6, 1, 10, 1, 9, false, true},            // all tokens to one expert, five without any
        {1, 4, 1, 7, 2, 1, 4, 1, ATTENTION_BLOCK + 3, false, false},
        {1, 64, 1, 7, 2, 1, 4, 2, 3, false, false},             // a head of flash attention
    });
}

static void model_odd_width() {
    check_models({{1, 10, 1, 17, 3, 1, 7, 1, 9, false, false}, {2, 6, 3, 11, 5, 3, 5, 2, 4, true, false}});
}

// Two micro-batches of one row each add up to the formula; and a batch smaller than what was allocated, after a larger
// one
static void model_batches() {
    OlmoeConfig c = model_shape(2, 12, 2, 23, 4, 2, 10);
    Model model(c, 3, 9);
    model.set(random_params(c));
    const Batch all = decisive_batch(model, 2, 5, MARGIN);
    Outputs got, want;
    double loss = 0, want_loss = 0;
    for (int j = 0; j < 2; j++) {
        Batch part = part_of(all, j, 1);
        part.micro_batches = 2;
        got = model.run(part, j > 0);
        twin_model(want, c, model.params, part);
        loss += got.loss;
        want_loss += want.loss;
    }
    double tolerance = model_tolerance(c, 1e-4);
    check("two micro-batches, loss", loss, want_loss, tolerance / 10);
    check("two micro-batches, gradients", got.grads, want.grads, tolerance, false);

    model.run(random_batch(c, 3, 9));
    Outputs small = model.run(all), exact;
    Model other(c, 2, 5);
    other.set(model.params);
    exact = other.run(all);
    check_equal("smaller than allocated, logits", small.logits, exact.logits);
    check_equal("smaller than allocated, losses", Vec{small.loss, small.lb, small.z}, {exact.loss, exact.lb, exact.z});
    check_equal("smaller than allocated, gradients", small.grads, exact.grads);
}

// The head in chunks: losses alone, then with gradients, then the same added to them; against the twin, and against one
// chunk, from which the gradient of lm_head may differ by the rounding of sums in fp32 only
static void check_head(int N) {
    const std::string name = text("head, N %d ", N);
    const int C = 6, V = 11;
    const OlmoeConfig c = model_shape(1, C, 1, V, 1, 1, 1);
    Capacity capacity = {N, N, Use::gradients};
    Model chunks(c, capacity);
    capacity.classified = N;
    Model one(c, capacity);
    const Batch b = random_batch(c, 1, N);
    const Vec params = random_params(c), x = random_vec((size_t)N * C);
    Vec dw[2], dnorm[2], losses[2], dx[2];                      // one chunk, several
    Model* models[] = {&one, &chunks};
    for (int i : {0, 1}) {
        Olmoe* m = &models[i]->m;
        models[i]->set(params);
        models[i]->set_batch(b, false);
        Device<floatX> there(x);
        copy_on_device(m->acts.x, there.p, there.n);
        auto gradient = [&] { return Device<floatX>::get_from(m->grads.lm_head, (size_t)V * C); };
        olmoe_head(m, false);
        losses[i] = Device<float>::get_from(m->acts.losses, N);
        olmoe_head(m, true);
        check_equal(name + "losses with gradients", Device<float>::get_from(m->acts.losses, N), losses[i]);
        dw[i] = gradient();
        dnorm[i] = Device<floatX>::get_from(m->grads.final_norm, C);
        dx[i] = Device<floatX>::get_from(m->scratch.dx, (size_t)N * C);
        m->accumulate = true;
        olmoe_head(m, true);
        Vec twice = dw[i];
        for (double& g : twice) g *= 2;
        check(name + "dw +=", gradient(), twice, roundings(1, 2 + sqrt(N)));
    }
    const size_t at = one.params.size() - V * C;                // of lm_head, the last tensor; the last norm is before
    const Vec w = slice(one.params, at, V * C), norm = slice(one.params, at - C, C);
    Vec r, out, logits, want, dlogits, dw_want(V * C), dout((size_t)N * C), dx_want((size_t)N * C), dnorm_want(C);
    twin_rmsnorm(out, r, x, norm, N, C, c.rms_norm_eps);
    twin_linear(logits, out, w, N, C, V);
    twin_cross_entropy(want, dlogits, logits, b.targets, b.weights, N, V);
    twin_linear_backward(dout, dw_want, dlogits, out, w, N, C, V);
    twin_rmsnorm_backward(dx_want, dnorm_want, dout, x, norm, N, C, c.rms_norm_eps);
    // Rounded on the way: final_out twice, logits, dlogits, dbranch
    const double t = 40 + 2 * sqrt(C) + sqrt(V);
    check(name + "losses", losses[1], want, roundings(4, t));
    check(name + "dw", dw[1], dw_want, roundings(8, t + sqrt(N)));
    check(name + "dnorm", dnorm[1], dnorm_want, roundings(8, t + sqrt(N)));
    check(name + "dx", dx[1], dx_want, roundings(8, t));
    check(name + "losses of one chunk", losses[1], losses[0], roundings(2, t));
    check(name + "dnorm of one chunk", dnorm[1], dnorm[0], roundings(2, t + sqrt(N)));
    check(name + "dx of one chunk", dx[1], dx[0], roundings(2, t));
    check(name + "dw of one chunk", dw[1], dw[0], roundings(0.1, 2 + sqrt(N)), false);
}

static void model_head() {
    for (int N : {1, HEAD_ROWS - 1, HEAD_ROWS, HEAD_ROWS + 1, 2 * HEAD_ROWS + 3, 5 * HEAD_ROWS}) check_head(N);
    // What the plan has for it. Sums in fp32 have room in the experts' gradients where N K is twice V, at least.
    const int N = 3 * HEAD_ROWS;
    for (int V : {3 * HEAD_ROWS / 2, 3 * HEAD_ROWS / 2 + 1})
        for (int classified : {0, N}) {
            Olmoe m;
            const OlmoeConfig c = model_shape(1, 6, 1, V, 1, 1, 1);
            olmoe_plan(&m, c, {N, N, Use::gradients, 0, classified});
            const size_t rows = classified ? N : HEAD_ROWS;
            const bool own = BF16 && !classified && N < 2 * V;
            size_t logits = 0, sums = 0;
            for (const Memory::Item& i : m.acts_memory.items) if (i.pointer == (void**)&m.acts.logits) logits = i.bytes;
            for (const Memory::Item& i : m.backward_memory.items)
                if (i.pointer == (void**)&m.scratch.dhead) sums = i.bytes;
            check_true(text("logits of %zu tokens, V %d", rows, V), logits == rows * c.V * sizeof(floatX));
            check_true("sums of gradients", sums == (own ? sizeof(float) * c.V * c.C : 0));
        }
}

// Every --recompute level, and the same again, give the same bits
static void model_recompute() {
    OlmoeConfig c = model_shape(3, 20, 2, 23, 7, 3, 10);
    Vec params = random_params(c);
    Batch b = random_batch(c, 2, 11);
    Model first(c, 2, 11);
    first.set(params);
    Outputs want = first.run(b);
    for (int level : {0, 1, 2}) {
        Model model(c, 2, 11, level);
        model.set(params);
        for (int time = 1; time <= 2; time++) {
            Outputs got = model.run(b);
            std::string name = text("recompute %d, time %d, ", level, time);
            check_equal(name + "logits", got.logits, want.logits);
            check_equal(name + "losses", Vec{got.loss, got.lb, got.z}, {want.loss, want.lb, want.z});
            check_equal(name + "gradients", got.grads, want.grads);
        }
    }
}

// Tensors of a frozen group have no gradient, those of the others the same bits as ever; the norm is over these, and an
// update changes these.
static void model_frozen() {
    const OlmoeConfig c = model_shape(2, 12, 2, 23, 4, 2, 10);
    const Vec params = random_params(c);
    Batch b = random_batch(c, 2, 8);
    Model whole(c, 2, 8);
    whole.set(params);
    whole.run(b);
    const Vec want = whole.run(b, true).grads;
    for (const char* group : {"embedding", "norms", "attention", "router", "experts", "head"}) {
        OlmoeConfig part = c;
        part.frozen = {group};
        Model model(part, 2, 8);
        model.set(params);
        for (bool again : {false, true}) {
            model.forward(b, again);
            model.backward(b, 1);
        }
        bool frozen = true, same = true, kept = true, moved = true;
        double squares = 0;
        for (const Tensor& t : model.m.tensors) {
            const bool is = strcmp(t.group, group) == 0;
            const floatX* g = t.in(model.m.grads);
            frozen = frozen && t.frozen == is && !g == is;
            if (!g) continue;
            const Vec got = Device<floatX>::get_from(g, t.count), of_all = slice(want, t.offset, t.count);
            same = same && got == of_all;
            squares += l2(got) * l2(got);
        }
        const double norm = olmoe_grad_norm(&model.m);
        olmoe_update(&model.m, 1, norm, adamw_options(0.1, .9, .95, 1e-8, .1, 6198));
        const Vec after = model.flat(model.m.params);
        for (const Tensor& t : model.m.tensors) {
            const bool equal = slice(after, t.offset, t.count) == slice(model.params, t.offset, t.count);
            kept = kept && (!t.frozen || equal);
            moved = moved && (t.frozen || !equal);
        }
        const std::string name = text("%s frozen, ", group);
        check_true(name + "its gradients are not there, and the others' bits are the same", frozen && same);
        check(name + "norm", norm, sqrt(squares), 1e-5);
        check_true(name + "its weights stay, and the others are updated", kept && moved);
    }
}

// A model that generates, with the weights of another one and room for N tokens at a time, prompts of T tokens, and S
// sequences of P
struct CachedModel {
    Olmoe m;
    Cache cache;
    int slot;                               // tokens of one

    CachedModel(const Model& from, int N, int T, int S, int P) : slot(P) {
        olmoe_plan(&m, from.m.config, {N, T, Use::inference, 0, S, P});
        slots_plan(&cache, &m, S, P);
        olmoe_allocate(&m);
        for (const Tensor& t : m.tensors) copy_on_device(t.in(m.params), t.in(from.m.params), t.count);
    }
    CachedModel(const CachedModel&) = delete;
    ~CachedModel() { olmoe_free(&m); }

    void prefill(const std::vector<Ints>& prompts, const Ints& slots) {
        MicroBatch batch;
        Ints places;
        for (const Ints& ids : prompts) batch_add(&batch, ids.data(), nullptr, (int)ids.size());
        for (int s : slots) places.push_back(s * slot);
        olmoe_prefill(&m, cache, batch, places);
        olmoe_classify(&m, 0, batch.B());
    }
    void decode(const Ints& ids, const Ints& slots, const Ints& positions) {
        MicroBatch batch;
        std::vector<CacheRow> rows;
        for (size_t i = 0; i < ids.size(); i++) {
            batch_add(&batch, &ids[i], nullptr, 1, 0, positions[i]);
            rows.push_back({0, 0, slots[i] * slot, positions[i] + 1});
        }
        olmoe_decode(&m, cache, batch, rows);
        olmoe_classify(&m, 0, batch.N());
    }
    Vec logits(int row) const { return Device<floatX>::get_from(m.acts.logits + (size_t)row * m.config.V, m.config.V); }
};

// The logits of the last token, without a cache
static Vec last_logits(Model& whole, const Ints& ids) {
    whole.forward(batch_of_rows(ids.data(), nullptr, 1, (int)ids.size()));
    const int V = whole.m.config.V;
    return slice(whole.logits(), (ids.size() - 1) * V, V);
}

// With the cache of keys and values the logits are those of the whole sequences without it: prompts of several lengths
// together, in slots in any order, then token by token, sequences leaving in between; the first after another has used
// its slot
static void check_cache(const OlmoeConfig& c) {
    const int S = 3, P = 12;
    const double tolerance = model_tolerance(c, 1e-5);
    Model whole(c, 1, P);
    whole.set(random_params(c));
    CachedModel model(whole, 11, 6, S, P);
    struct { Ints ids; int slot, steps; } sequences[] = {
        {random_ints(6, c.V), 2, 6}, {random_ints(1, c.V), 0, 3}, {random_ints(4, c.V), 1, 5}};
    for (int time : {0, 1}) {                                   // the second time the slots hold what the first left
        std::vector<Ints> prompts;
        Ints slots;
        for (int i = 0; i < 3; i++) {
            auto& s = sequences[i];
            if (time) { s.ids = random_ints(1 + 2 * i, c.V); s.slot = (s.slot + 1) % S; }
            prompts.push_back(s.ids);
            slots.push_back(s.slot);
        }
        model.prefill(prompts, slots);
        for (int i = 0; i < 3; i++)
            check(text("cache, prompt of %zu tokens", prompts[i].size()), model.logits(i),
                  last_logits(whole, prompts[i]), tolerance, false);
        for (int step = 1; step <= 6; step++) {
            Ints ids, at, positions, who;
            for (int i = 2; i >= 0; i--) {
                auto& s = sequences[i];
                if (step > s.steps) continue;
                s.ids.push_back(random_below(c.V));
                ids.push_back(s.ids.back());
                at.push_back(s.slot);
                positions.push_back((int)s.ids.size() - 1);
                who.push_back(i);
            }
            model.decode(ids, at, positions);
            for (size_t row = 0; row < who.size(); row++) {
                const Ints& all = sequences[who[row]].ids;
                check(text("cache, token %zu, %zu sequences", all.size(), who.size()), model.logits((int)row),
                      last_logits(whole, all), tolerance, false);
            }
        }
    }
}

// Queries that read so many keys of a context, and so many of their own, in a cache in which all else is NaN.
// Neighbours with as long a context share one. `spread`: of the scores
static void check_cached_attention(const std::vector<std::pair<int, int>>& keys_of_rows, int H, int D, double spread) {
    const int N = (int)keys_of_rows.size(), C = H * D;
    const std::string name = text("cached attention H %d D %d spread %g ", H, D, spread);
    std::vector<CacheRow> rows;
    int P = 1, most = 0;
    for (int n = N - 1; n >= 0; n--) {                          // in another order than the rows, with gaps between
        const auto [in_context, in_own] = keys_of_rows[n];
        const bool shared = !rows.empty() && in_context == rows[0].in_context;
        const int context = shared ? rows[0].context : P, own = (shared ? P : P + in_context) + 1;
        rows.insert(rows.begin(), {in_context > 0 ? context : 0, in_context, own, in_own});
        P = own + in_own + 1;
        most = std::max(most, cache_parts(rows[0]));
    }
    const size_t layer = (size_t)H * P * D;
    OlmoeConfig c;
    c.C = C; c.H = H;
    Vec qk = random_vec((size_t)N * 2 * C, sqrt(spread)), k(2 * layer, NAN), v(2 * layer, NAN), out((size_t)N * C);
    for (int n = 0; n < N; n++)
        for (int h = 0; h < H; h++) {
            Vec scores, values;
            double largest = -INFINITY, sum = 0;
            for (auto [first, count] : {std::pair(rows[n].context, rows[n].in_context),
                                        std::pair(rows[n].own, rows[n].in_own)})
                for (int place = first; place < first + count; place++) {
                    const size_t at = layer + ((size_t)h * P + place) * D;
                    if (std::isnan(k[at])) {
                        const Vec key = random_vec(D, sqrt(spread)), value = random_vec(D);
                        std::copy(key.begin(), key.end(), k.begin() + at);
                        std::copy(value.begin(), value.end(), v.begin() + at);
                    }
                    double score = 0;
                    for (int i = 0; i < D; i++) score += qk[(size_t)n * 2 * C + h * D + i] * k[at + i] / sqrt(D);
                    scores.push_back(score);
                    largest = std::max(largest, score);
                    values.insert(values.end(), v.begin() + at, v.begin() + at + D);
                }
            for (double& s : scores) sum += s = exp(s - largest);
            for (size_t j = 0; j < scores.size(); j++)
                for (int i = 0; i < D; i++) out[(size_t)n * C + h * D + i] += scores[j] / sum * values[j * D + i];
        }
    Device<floatX> d_qk(qk), d_k(k), d_v(v), d_out(out.size());
    Device<float> partial((size_t)N * C * most);
    Device<float2> terms((size_t)N * H * most);
    Device<CacheRow> d_rows(rows.size());
    copy_to_device((CacheRow*)d_rows, rows);
    LayerActivations a = {};
    a.qk = d_qk; a.attn = d_out;
    Cache cache;
    cache.P = P; cache.keys = d_k; cache.values = d_v; cache.partial = partial; cache.terms = terms;
    cache.rows = d_rows;
    attention_cached(a, cache, 1, N, most, c);
    const Vec together = d_out.get();
    check(name + "o", together, out, roundings(1, 40 + 8 * spread + sqrt(P)));
    Vec alone;
    for (int n = 0; n < N; n++) {
        cache.rows = d_rows + n;
        a.qk = d_qk + (size_t)n * 2 * C;
        attention_cached(a, cache, 1, 1, cache_parts(rows[n]), c);
        append(&alone, Device<floatX>::get_from(d_out, C));
    }
    check_equal(name + "alone", alone, together);
}

static void test_cached_attention() {
    // the ends of parts, of both runs; the longest row is neither the first nor the last
    const std::vector<std::pair<int, int>> keys = {{0, 64}, {0, 1}, {0, 65}, {64, 193}, {64, 1}, {65, 64}, {0, 257},
                                                   {1, 63}, {1, 300}, {128, 1}, {300, 2}};
    for (auto& [H, D] : std::initializer_list<std::pair<int, int>>{{2, 3}, {3, 8}, {1, 20}, {2, 64}, {1, 72}, {2, 128},
                                                                   {1, 136}, {1, 264}})
        for (double spread : {1., 20.}) check_cached_attention(keys, H, D, spread);
    check_cached_attention({{0, 1}}, 1, 16, 1);
    check_cached_attention({{700, 300}}, 1, 64, 5);
}

// Prompts of very different lengths at the same time, one of them longer than a block of attention, against each alone.
// Every token goes to all experts, so that rounding can't change the routing.
static void check_prompts() {
    const OlmoeConfig c = model_shape(2, 12, 3, 11, 4, 4, 6);
    const int longest = ATTENTION_BLOCK + 3, P = longest + 1;
    const double tolerance = model_tolerance(c, 1e-5);
    Model whole(c, 1, P);
    whole.set(random_params(c));
    CachedModel together(whole, longest + 8, longest, 4, P), alone(whole, longest, longest, 4, P);
    std::vector<Ints> prompts;
    for (int n : {2, longest, 1, 5}) prompts.push_back(random_ints(n, c.V));
    const Ints slots = {2, 0, 3, 1};
    together.prefill(prompts, slots);
    std::vector<Vec> logits;
    for (int i = 0; i < 4; i++) logits.push_back(together.logits(i));
    Ints next = random_ints(4, c.V), positions;
    for (int i = 0; i < 4; i++) {
        const std::string name = text("cache, prompts together, %zu tokens", prompts[i].size());
        alone.prefill({prompts[i]}, {slots[i]});
        check(name, logits[i], alone.logits(0), tolerance);
        positions.push_back((int)prompts[i].size());
        prompts[i].push_back(next[i]);
    }
    together.decode(next, slots, positions);
    for (int i = 0; i < 4; i++)
        check(text("cache, prompts together, token %zu", prompts[i].size()), together.logits(i),
              last_logits(whole, prompts[i]), tolerance);
}

// Sequences that begin with one context of the cache go on from it, several tokens of each at once: as the whole
// sequences without it, while another context and its own lie beside them
static void check_continuations() {
    const OlmoeConfig c = model_shape(2, 12, 3, 11, 4, 4, 6);
    const int lengths[] = {70, 3}, more[] = {1, 5, 66, 2}, P = 73 + 74;
    const double tolerance = model_tolerance(c, 1e-5);
    Model whole(c, 1, 140);
    whole.set(random_params(c));
    CachedModel model(whole, 100, 70, 100, P);                  // with room for all parts
    std::vector<Ints> contexts;
    MicroBatch prompts, batch;
    for (int n : lengths) {
        contexts.push_back(random_ints(n, c.V));
        batch_add(&prompts, contexts.back().data(), nullptr, n);
    }
    olmoe_prefill(&model.m, model.cache, prompts, {4, 4 + 70 + 1});
    std::vector<CacheRow> rows;
    std::vector<Ints> sequences;
    for (int i = 0; i < 4; i++) {
        const int context = i == 3, n = lengths[context], own = 4 + 75 + (int)rows.size();
        const Ints ids = random_ints(more[i], c.V);
        batch_add(&batch, ids.data(), nullptr, more[i], 0, n);
        for (int t = 0; t < more[i]; t++) rows.push_back({context ? 75 : 4, n, own, t + 1});
        sequences.push_back(contexts[context]);
        append(&sequences.back(), ids);
    }
    olmoe_decode(&model.m, model.cache, batch, rows);
    olmoe_classify(&model.m, 0, batch.N());
    for (int i = 0; i < 4; i++)
        check(text("cache, context of %zu and %d more", sequences[i].size() - more[i], more[i]),
              model.logits(batch.begin(i) + more[i] - 1), last_logits(whole, sequences[i]), tolerance);
}

static void model_cache() {
    for (const OlmoeConfig& c : {model_shape(2, 20, 2, 23, 7, 3, 10), model_shape(1, 12, 3, 11, 4, 4, 6),
                                 model_shape(3, 24, 1, 17, 5, 1, 9)}) check_cache(c);
    check_prompts();
    check_continuations();
}

// Which token is chosen, against the definitions written out over the whole vocabulary
static int twin_choose(const std::vector<float>& z, const SamplingOptions& o, const Ints& seen, double random) {
    const int V = (int)z.size();
    Vec p(V);
    Ints order(V), kept;
    for (int i = 0; i < V; i++) {
        float x = z[i];
        if (std::count(seen.begin(), seen.end(), i))
            x = (float)(x > 0 ? x / o.repetition_penalty : x * o.repetition_penalty);
        p[i] = o.temperature > 0 ? exp(x / o.temperature) : x;
        order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return p[a] > p[b]; });
    if (o.temperature == 0) order.resize(1);
    if (o.top_k > 0 && o.top_k < (int)order.size()) order.resize(o.top_k);
    double total = 0, before = 0;
    for (int i : order) total += p[i];
    for (int i : order) {
        const bool enough = before >= o.top_p * total * (1 - 1e-12), rare = p[i] < o.min_p * p[order[0]] * (1 + 1e-12);
        if (!kept.empty() && (enough || rare)) break;
        kept.push_back(i);
        before += p[i];
    }
    // without a limit the draw goes by id, else by probability
    const bool limit = (o.top_k > 0 && o.top_k < V) || o.top_p < 1 || o.min_p > 0;
    if (o.temperature > 0 && !limit) std::sort(kept.begin(), kept.end());
    total = 0;
    for (int i : kept) total += p[i];
    size_t i = 0;
    for (double r = random * total; o.temperature > 0 && i + 1 < kept.size() && r > p[kept[i]]; i++) r -= p[kept[i]];
    return kept[i];
}

static void sampling() {
    for (int trial = 0; trial < 400; trial++) {
        const int V = 1 + random_below(30);
        std::vector<float> z(V);
        for (float& x : z)                                      // some are equal
            x = (float)(random_below(3) ? 4 * (2 * random_uniform() - 1) : random_below(3));
        Ints seen = random_ints(random_below(5), V + 3);
        SamplingOptions o;
        o.temperature = trial % 7 == 0 ? 0 : 0.3 + random_uniform();
        o.top_k = trial % 2 ? random_below(V + 2) : 0;
        o.top_p = trial % 3 ? 1 : 0.05 + 0.9 * random_uniform();
        o.min_p = trial % 5 ? 0 : random_uniform();
        o.repetition_penalty = trial % 4 ? 1 : 0.5 + random_uniform();
        double random = 1 - random_uniform(), logprob, sum = 0;
        for (float x : z) sum += exp((double)x);
        int got = choose_token(z, o, seen, random, &logprob);
        check_equal(text("sampling %d", trial), Ints{got}, Ints{twin_choose(z, o, seen, random)});
        check(text("sampling %d, log-probability", trial), logprob, z[got] - log(sum),
              8 * U32);                                         // exp in fp32, to 4 units in the last place
    }
    // frequencies, of three tokens with probabilities 1/2, 1/3, 1/6
    std::vector<float> z = {logf(3), logf(2), 0};
    Vec share(3, 0), want = {0.5, 1 / 3., 1 / 6.};
    for (int i = 0; i < 6000; i++) {
        double logprob;
        SamplingOptions o;
        o.temperature = 1;
        share[choose_token(z, o, {}, (i + 0.5) / 6000, &logprob)] += 1 / 6000.;
    }
    check("sampling, frequencies", share, want, 1e-3);
}

// Equal router rows give equal logits; of equal probabilities the lower id comes first
static void model_ties() {
    OlmoeConfig c = model_shape(2, 12, 2, 23, 6, 3, 6);
    Model model(c, 2, 8);
    Vec params = random_params(c);
    std::vector<HfTensor> tensors = hf_tensors(c);
    auto router_row = [&](const HfTensor& t, int e) { return params.begin() + t.offset + e * c.C; };
    for (const HfTensor& t : tensors)
        if (is_router(t)) std::copy(router_row(t, 1), router_row(t, 2), router_row(t, 4));
    model.set(params);
    Batch b = random_batch(c, 2, 8);
    Ints experts = model.run(b).experts;
    int both = 0, wrong = 0;
    for (size_t token = 0; token < experts.size() / 3; token++) {
        const int *id = &experts[token * 3], *at1 = std::find(id, id + 3, 1), *at4 = std::find(id, id + 3, 4);
        both += at4 < id + 3;
        wrong += at4 < id + 3 ? at4 != at1 + 1 : at1 < id + 2;  // 4 right after 1; without 4, 1 came last
    }
    check_true(text("tied experts, of %zu tokens %d chose both", experts.size() / 3, both), wrong == 0 && both > 0);

    for (const HfTensor& t : tensors)
        for (int e = 1; is_router(t) && e < c.E; e++) std::copy(router_row(t, 0), router_row(t, 1), router_row(t, e));
    model.set(params);
    Ints first(experts.size());
    for (size_t i = 0; i < first.size(); i++) first[i] = (int)i % 3;
    check_equal("all experts tied", model.run(b).experts, first);
}

// Perfectly undecided routers: LB is its coefficient, Z is z_coef (ln E)^2 / K; and OLMoE's numbers of parameters
static void vectors_losses() {
    OlmoeConfig c = model_shape(2, 4, 2, 5, 64, 8, 2);
    Model model(c, 1, 3);
    Vec params = random_params(c);
    for (const HfTensor& t : hf_tensors(c))
        if (is_router(t)) std::fill(params.begin() + t.offset, params.begin() + t.offset + t.count, 0.);
    model.set(params);
    Batch b = random_batch(c, 1, 3);
    b.lb_coef = 0.01; b.z_coef = 0.001;
    Outputs out = model.run(b);
    check("load-balancing loss of a uniform router", out.lb, 0.01, roundings(0, 24));
    check("z-loss of a uniform router", out.z, 0.0021620386, printed(.2) + roundings(0, 24));

    OlmoeConfig released = model_shape(16, 2048, 16, 50304, 64, 8, 1024);
    HfTensor last = hf_tensors(released).back();
    check_true("OLMoE-1B-7B has 6,919,161,856 parameters",
               num_parameters(released) == 6919161856u && last.offset + last.count == 6919161856u);
    check_true("of which 1,282,017,280 are active", num_active_parameters(released) == 1282017280u);
    check_true("in 3219 tensors", hf_tensors(released).size() == 3219);
}

// Norm of the gradient, clipping and AdamW over the model's tensors
static void model_update() {
    OlmoeConfig c = model_shape(2, 12, 2, 23, 4, 2, 10);
    Model model(c, 2, 5);
    model.set(random_params(c));
    for (double clip : {0.1, 0., 1e3}) {
        model.set(model.params);
        for (void* moment : {model.m.moment1, model.m.moment2}) clear_on_device((float*)moment, model.params.size());
        Vec g = model.run(random_batch(c, 2, 5)).grads, want = model.params, got;
        std::string name = text("update, clip %g, ", clip);
        double norm = olmoe_grad_norm(&model.m);
        check(name + "norm", norm, l2(g), roundings(0, 4 + sqrt(SQUARE_SUM_RUN)));
        AdamWOptions o;
        o.lr = 0.02; o.eps = 1e-3; o.grad_clip = clip;
        olmoe_update(&model.m, 1, norm, o);
        double scale = clip > 0 ? std::min(1., clip / (l2(g) + 1e-6)) : 1;
        for (size_t i = 0; i < g.size(); i++) {
            double step = o.lr * scale * g[i] / (fabs(scale * g[i]) + o.eps);
            want[i] = want[i] * (1 - o.lr * o.weight_decay) - step;
        }
        check(name + "parameters", model.flat(model.m.params), want, roundings(1, 16));
        if (!BF16) continue;
        check(name + "master", Device<float>::get_from((float*)model.m.master_weights, want.size()), want,
              roundings(0, 16));
    }
}

// Master (the weight where there is none), m and v, flat
static std::array<Vec, 3> state_of(const Olmoe& m) {
    std::array<Vec, 3> all;
    const State states[] = {State::master, State::m, State::v};
    for (const Tensor& t : m.tensors)
        for (int k = 0; k < 3; k++) {
            if (k == 0 && !m.master_weights) {
                append(&all[k], Device<floatX>::get_from(t.in(m.params), t.count));
                continue;
            }
            std::vector<float> part(t.count);
            state_to_host(m, states[k], t.state, t.in(m.params), part.data(), t.count);
            append(&all[k], Vec(part.begin(), part.end()));
        }
    return all;
}

// Elements of a step that are not what their inputs and their random number make them. Rounding keeps order, so the
// result lies between what the ends of the range of the fp32 roundings are rounded to, which mostly is one value.
// Roundings of fp32, one of (float) among them: 4 of the terms of m; 6 of v; of the weight 3 of its decay and 12 of the
// step, of which 4 are m's and 3 the root's.
static size_t wrong_after_step(const Olmoe& m, const std::array<Vec, 3>& before, const std::array<Vec, 3>& after,
                               const Vec& g, int64_t step, double norm, const AdamWOptions& o) {
    const double b1 = (float)o.beta1, b2 = (float)o.beta2, eps = (float)o.eps;
    const double decay = (float)(1 - o.lr * o.weight_decay), scale = (float)std::min(1., o.grad_clip / (norm + 1e-6));
    const double size = (float)(o.lr / (1 - pow(o.beta1, (double)step)));
    const double v_scale = (float)(1 / (1 - pow(o.beta2, (double)step)));
    const bool at_random[] = {BF16 && !m.master_weights, m.narrow_moments, m.narrow_moments};
    const int word[] = {2, 0, 1};                               // of the element's random number
    size_t wrong = 0;
    for (size_t i = 0; i < g.size(); i++) {
        double old = b1 * before[1][i], part = (1 - b1) * scale * g[i], terms = fabs(old) + fabs(part);
        double v = b2 * before[2][i] + (1 - b2) * scale * g[i] * scale * g[i], root = sqrt(v * v_scale) + eps;
        double p = before[0][i];
        const double x[] = {p * decay - size * (old + part) / root, old + part, v};
        const double d[] = {U32 * (3 * fabs(p) + 16 * size * terms / root), 4 * U32 * terms, 6 * U32 * v};
        auto random = twin_philox({(uint32_t)i, 0, (uint32_t)step, 0},
                                  {(uint32_t)o.seed, (uint32_t)(o.seed >> 32)});
        for (int k = 0; k < 3; k++) {
            auto end = [&](double y) {
                __nv_bfloat16 narrow;
                store(&narrow, (float)y, random[word[k]] & 0xffff);
                return (double)(at_random[k] ? (float)narrow : (float)y);
            };
            double margin = d[k] + 0x1p-148;                    // the last below the normal numbers
            wrong += !(end(x[k] - margin) <= after[k][i] && after[k][i] <= end(x[k] + margin));
        }
    }
    return wrong;
}

// Is a state of a tensor, written to the device, read back as it was?
static bool state_comes_back(Model& model, State which, const Tensor& t) {
    floatX* p = t.in(model.m.params);
    std::vector<float> part(t.count), other(t.count, 7), again(t.count);
    state_to_host(model.m, which, t.state, p, part.data(), t.count);
    state_to_device(&model.m, which, t.state, p, other.data(), t.count);
    state_to_device(&model.m, which, t.state, p, part.data(), t.count);
    state_to_host(model.m, which, t.state, p, again.data(), t.count);
    return again == part;
}

// 8 steps with AdamW's state kept like this; returns it
static std::array<Vec, 3> check_state(const std::string& name, const OlmoeConfig& c, const Vec& params,
                                      const Batch& batch, const AdamWOptions& o, const char* masters,
                                      const char* moments) {
    Model model(c, 2, 5, 0, masters, moments);
    model.set(params);
    size_t wrong = 0;
    for (int step = 1; step <= 8; step++) {
        model.forward(batch);
        model.backward(batch, 1);
        double norm = olmoe_grad_norm(&model.m);
        Vec g = model.flat(model.m.grads);
        std::array<Vec, 3> before = state_of(model.m);
        olmoe_update(&model.m, step, norm, o);
        wrong += wrong_after_step(model.m, before, state_of(model.m), g, step, norm, o);
    }
    check_true(name + text("%zu numbers of 8 steps are rounded as they should not be", wrong), wrong == 0);

    std::array<Vec, 3> found = state_of(model.m);
    for (State which : {State::master, State::m, State::v})
        for (const Tensor& t : model.m.tensors)
            if ((which != State::master || model.m.master_weights) && !state_comes_back(model, which, t))
                verdict(name + "what is saved comes back", false);
    const size_t n = params.size(), bytes = model.m.optimizer_memory.bytes();
    const size_t master = !BF16 || !strcmp(masters, "none") ? 0 : !strcmp(masters, "fp32") ? 4 : 2;
    const size_t each = (model.m.narrow_moments ? 4 : 8) + master;
    check_true(name + text("%zu bytes for each weight", each), bytes >= n * each && bytes < n * each + 3 * 256);
    return found;
}

// What --master-weights and --moments promise of a whole model, over some steps: 16-bit remainders are fp32 masters bit
// for bit, the others stay near them; and what is saved comes back.
static void model_state() {
    OlmoeConfig c = model_shape(2, 12, 2, 23, 4, 2, 10);
    Vec params = random_params(c);
    std::array<Vec, 3> of_fp32[2];                              // with fp32 masters, by moments
    Batch batch = random_batch(c, 2, 5);
    AdamWOptions o;
    o.lr = 1e-3;
    for (const char* masters : {"fp32", "remainder", "none"})
        for (const char* moments : {"fp32", "bf16"}) {
            if (!BF16 && strcmp(masters, "fp32") != 0) continue;
            std::string name = text("%s masters, %s moments: ", masters, moments);
            std::array<Vec, 3> found = check_state(name, c, params, batch, o, masters, moments);
            std::array<Vec, 3>& same = of_fp32[!strcmp(moments, "bf16")];
            if (!strcmp(masters, "fp32")) same = found;
            for (int i = 0; i < 3 && !strcmp(masters, "remainder"); i++)
                check_equal(name + (i == 0 ? "masters" : i == 1 ? "m" : "v"), found[i], same[i]);
        }
    if (!BF16) return;
    // Weights that only decay are rounded by the random numbers of their positions in the whole model.
    Model model(c, 2, 5, 0, "none", "fp32");
    model.set(Vec(params.size(), 1));
    for (const Tensor& t : model.m.tensors) clear_on_device(t.in(model.m.grads), t.count);
    o.seed = 77;
    olmoe_update(&model.m, 3, 0, o);
    Vec want;
    for (size_t i = 0; i < params.size(); i++) {
        floatX p;
        store(&p, (float)(1 - o.lr * o.weight_decay), twin_philox({(uint32_t)i, 0, 3, 0}, {77, 0})[2] & 0xffff);
        want.push_back((float)p);
    }
    check_equal("random numbers by position", model.flat(model.m.params), want);
}

// A NaN in a tensor reaches the loss and the norm of the gradients, where training looks; and no comparison here lets
// one pass.
static void model_nan() {
    Vec want = {1, 2, 3}, nan = {1, NAN, 3};
    Difference d = difference(nan, want, 1e9);
    check_true("nan fails a comparison", !(d.error <= 1e9 && d.share <= 1));
    d = difference({1, INFINITY, 3}, want, 1e9);
    check_true("infinity fails a comparison", !(d.error <= 1e9 && d.share <= 1));
    d = difference({1, 2, 3}, {1, NAN, 3}, 1e9);
    check_true("nan in a reference fails", !(d.error <= 1e9 && d.share <= 1));

    OlmoeConfig c = model_shape(2, 12, 2, 23, 3, 2, 10);
    Model model(c, 2, 8);
    Vec params = random_params(c);
    Batch b = random_batch(c, 2, 8);
    for (const Tensor& t : model.m.tensors) {
        Vec spoilt = params;
        const size_t in_use = (size_t)b.inputs[2] * c.C;        // of the embedding, a token that occurs
        const size_t at = t.kind == Kind::lookup ? in_use : t.offset;
        spoilt[at] = NAN;
        model.set(spoilt);
        Outputs out = model.run(b);
        const Tensor* bad = nullptr;
        double norm = olmoe_grad_norm(&model.m, &bad);
        bool inside = true;
        for (int e : out.experts) inside = inside && e >= 0 && e < c.E;
        check_true(text("nan in the parameter at %zu reaches loss and norm", at),
                   !std::isfinite(out.loss) && !std::isfinite(norm) && bad && inside);
    }
}

// ------------------------------------------------------------------------------------------------
// Micro-batches of sequences of any lengths

// The micro-batch sequence by sequence: logits and losses one after another, losses and gradients added up
static Outputs run_one_by_one(Model& model, const Batch& all) {
    Outputs sum;
    for (int s = 0; s < all.B(); s++) {
        Outputs one = model.run(part_of(all, s, 1), s > 0);
        append(&sum.logits, one.logits);
        append(&sum.losses, one.losses);
        sum.loss += one.loss;
        sum.grads = one.grads;
    }
    return sum;
}

// A micro-batch against its sequences alone, without the auxiliary losses, whose means are over all tokens; with them
// against the twin; and at every --recompute level the same bits
static void check_ragged(const OlmoeConfig& c, const Ints& lengths) {
    const std::string name = text("ragged T %s, L %d E %d K %d ", joined(lengths).c_str(), c.L, c.E, c.K);
    const double tolerance = model_tolerance(c, 1e-5);
    const int longest = *std::max_element(lengths.begin(), lengths.end());
    Batch b = random_batch(c, lengths);
    Capacity capacity = {b.N(), longest, Use::training, 0, 0, longest + 3};
    for (int t = 0; t < b.length(b.B() - 1); t++) b.positions[b.begin(b.B() - 1) + t] += 3;     // the last begins later
    for (double& weight : b.weights) weight = 2 * random_uniform() / b.N();     // also where the target is ignored
    b.weights[0] = 0;
    const Vec params = random_params(c);
    Outputs first, want;
    for (int level : {0, 1, 2}) {
        capacity.recompute = level;
        Model model(c, capacity);
        model.set(params);
        if (level == 0) b = decisive(b, model, MARGIN);
        Batch without = b;
        without.lb_coef = without.z_coef = 0;
        const std::string at = name + text("--recompute %d, ", level);
        Outputs whole = model.run(without), alone = run_one_by_one(model, without), got = model.run(b);
        check(at + "logits against each alone", whole.logits, alone.logits, tolerance);
        check(at + "losses of tokens against each alone", whole.losses, alone.losses, tolerance);
        check(at + "loss against each alone", whole.loss, alone.loss, tolerance);
        if (BF16) check(at + "gradients against each alone", whole.grads, alone.grads, tolerance, false);
        else check_grads(at + "against each alone, ", c, whole.grads, alone.grads, 1e-4);
        if (level == 0) {
            twin_model(want, c, model.params, b);
            check_outputs(name, c, got, want);
            check(name + "losses of tokens", got.losses, want.losses, tolerance);
            first = got;
        }
        check_equal(at + "the same logits", got.logits, first.logits);
        check_equal(at + "the same losses", Vec{got.loss, got.lb, got.z}, {first.loss, first.lb, first.z});
        check_equal(at + "the same gradients", got.grads, first.grads);
    }
}

static void batch_ragged() {
    OlmoeConfig normalized = model_shape(2, 6, 3, 11, 3, 3, 6);
    normalized.norm_topk_prob = true;
    check_ragged(model_shape(2, 12, 2, 23, 4, 2, 10), {3, 1, 7, 2, 1});
    check_ragged(model_shape(1, 10, 1, 17, 3, 1, 8), {1, 4, 2});
    check_ragged(normalized, {5, 2});
    // every token to all experts: no margin can be kept over so many
    check_ragged(model_shape(2, 8, 2, 7, 2, 2, 4), {1, ATTENTION_BLOCK + 3, 2, 1, 5});
}

// Rows of equal length are the special case
static void batch_rows() {
    const int B = 3, T = 4, N = B * T;
    const Ints inputs = random_ints(N, 50), none(N, IGNORED);
    Ints targets = random_ints(N, 50), starts, positions;
    targets[5] = IGNORED;
    for (int row = 0; row <= B; row++) starts.push_back(row * T);
    for (int n = 0; n < N; n++) positions.push_back(n % T);
    for (bool with_targets : {true, false}) {
        MicroBatch one_by_one;
        for (int row = 0; row < B; row++)
            batch_add(&one_by_one, &inputs[row * T], with_targets ? &targets[row * T] : nullptr, T, 0.25);
        const MicroBatch rows = batch_of_rows(inputs.data(), with_targets ? targets.data() : nullptr, B, T, 0.25);
        for (const MicroBatch* batch : {&rows, (const MicroBatch*)&one_by_one}) {
            const std::string name = text("%s, %s targets, ", batch == &rows ? "rows" : "one by one",
                                          with_targets ? "with" : "without");
            check_equal(name + "starts", batch->starts, starts);
            check_equal(name + "inputs", batch->inputs, inputs);
            check_equal(name + "targets", batch->targets, with_targets ? targets : none);
            check_equal(name + "weights", batch->weights, Vec(N, 0.25));
            check_equal(name + "positions", batch->positions, positions);
            check_true(name + "sizes",
                       batch->B() == B && batch->N() == N && batch->begin(2) == 2 * T && batch->length(2) == T);
        }
    }
    // sequences that differ in everything
    MicroBatch batch;
    check_true("an empty batch", batch.B() == 0 && batch.N() == 0);
    batch_add(&batch, &inputs[0], &targets[0], 1, 0.5);
    batch_add(&batch, &inputs[1], nullptr, 3, 2, 10);
    check_equal("two sequences, starts", batch.starts, {0, 1, 4});
    check_equal("two sequences, inputs", batch.inputs, slice(inputs, 0, 4));
    check_equal("two sequences, targets", batch.targets, {targets[0], IGNORED, IGNORED, IGNORED});
    check_equal("two sequences, weights", batch.weights, {0.5, 2, 2, 2});
    check_equal("two sequences, positions", batch.positions, {0, 10, 11, 12});
    const Capacity capacity = capacity_of_rows(model_shape(1, 4, 1, 5, 2, 1, 2), B, T, Use::gradients, 2);
    check_true("capacity", capacity.N == N && capacity.T == T && capacity.use == Use::gradients
                           && capacity.recompute == 2 && capacity.classified == 0 && capacity.positions == 0);
}

// The message with which body() ends the program, and "" where it does not. body() runs in a process of its own, where
// a GPU must not be touched; the CPU machine works there on one core.
template <typename Body> static std::string error_message(Body body) {
    int ends[2];
    if (pipe(ends) != 0) die("test: no pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        atexit([] { _exit(1); });                               // before what the device's libraries do at the end
        dup2(ends[1], 2);
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string message;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0; ) message.append(buffer, n);
    close(ends[0]);
    waitpid(child, nullptr, 0);
    return message;
}

// Copies of any size, longer than the staging memory too, with sources that change as soon as the call returns
static void test_copies() {
    const size_t most = STAGING_BYTES / sizeof(int);
    for (size_t n : {(size_t)0, (size_t)1, (size_t)7, most - 1, most, most + 1, 3 * most + 5}) {
        Device<int> there(n);
        Ints values = random_ints(n, 1 << 30), source = values, back(n, -1), large(n, -1);
        copy_to_device(there.p, source);
        std::fill(source.begin(), source.end(), -2);
        copy_to_host(back.data(), there.p, n);
        check_equal(text("copy of %zu numbers", n), back, values);
        copy_to_host_sync(large.data(), there.p, n);
        check_equal(text("copy of %zu numbers, without staging", n), large, values);
    }
    const size_t n = most / 3, many = 20;       // three fit into a slab; the device is late
    Device<int> there(n * many);
    Ints all, source(n), back(n * many);
    for (size_t i = 0; i < many; i++) {
        Ints values = random_ints(n, 1 << 30);
        append(&all, values);
        source = values;
        copy_to_device(there + i * n, source.data(), n);
        std::fill(source.begin(), source.end(), -3);
    }
    copy_to_host(back.data(), there.p, back.size());
    check_equal("many copies", back, all);
}

// The message of a launch that fails, and of a result that is not finite. On a CPU whose launches return errors
static void test_launch_messages() {
    static int lanes = WARP;                // no constant: what follows is to compile everywhere
    if (lanes > 1) return;
    float *x, *y;
    Memory memory;
    memory.add(5000, &x, &y);
    check_true("memory", memory.allocate(1, true));
    check_true("bytes to the end of a tensor", Memory::bytes_from(x) == 20000 && Memory::bytes_from(y + 4999) == 4
                   && Memory::bytes_from(y + 5000) == 0 && Memory::bytes_from(y + 5001) == 0);
    const std::string failed = error_message([&] { at_layer(3); LAUNCH(fill_kernel, 0, x, 5000, 1.f); });
    check_true("a launch that fails", failed.find("olmoe: fill_kernel of layer 3 (main stream), or what ran before it: "
                                                  "invalid configuration") == 0);
    launch_checks.finite = true;
    LAUNCH(fill_kernel, blocks_for(4990), x + 10, 4990, 1.f);
    const std::string found = error_message([&] { LAUNCH(fill_kernel, 1, y + 4100, 100, INFINITY); });
    check_true("a result that is not finite",
               found == "olmoe: fill_kernel: what it wrote to y + 4100 is not finite, first inf at 0 of 900\n");
    const float nan = NAN;
    copy_to_device(y + 4500, &nan, 1);
    const std::string late = error_message([&] { LAUNCH(fill_kernel, 1, y, 10, 1.f); });
    check_true("one beyond the first run", late.find("nan at 4500 of 5000") != std::string::npos);
    launch_checks.finite = false;
    memory.release();
    check_true("bytes of what is freed", Memory::bytes_from(x) == 0);
}

// What olmoe_set_batch refuses, each time of a batch that is good but for one thing. It checks before it copies: the
// model here has no memory.
static void batch_checks() {
    OlmoeConfig c = model_shape(1, 4, 1, 11, 2, 1, 2);
    Olmoe m;
    olmoe_plan(&m, c, {7, 4, Use::training, 0, 0, 6});
    auto refused = [&](const char* name, const char* message, auto change) {
        MicroBatch b = random_sequences({4, 2}, c.V, 0.1);
        change(&b);
        const std::string printed = error_message([&] { olmoe_set_batch(&m, b); });
        check_true(std::string("refused: ") + name, printed.find(message) != std::string::npos);
    };
    const int V = c.V;
    refused("no token", "a micro-batch of 0 tokens", [](MicroBatch* b) { *b = {}; });
    refused("a first sequence that begins late", "begins at token 1", [](MicroBatch* b) { b->starts[0] = 1; });
    refused("no input for a token", "6 tokens has arrays of 5", [](MicroBatch* b) { b->inputs.pop_back(); });
    refused("a target too many", "6 tokens has arrays of 7", [](MicroBatch* b) { b->targets.push_back(1); });
    refused("no weight for a token", "6 tokens has arrays of 5", [](MicroBatch* b) { b->weights.pop_back(); });
    refused("no position for a token", "6 tokens has arrays of 5", [](MicroBatch* b) { b->positions.pop_back(); });
    refused("more tokens than there is room for", "8 tokens, where there is room for 7",
            [](MicroBatch* b) { const int id = 1; batch_add(b, &id, &id, 1); batch_add(b, &id, &id, 1); });
    refused("a sequence that is too long", "sequence 0 of a micro-batch has 5 tokens; there may be 1 to 4",
            [](MicroBatch* b) { b->starts[1] = 5; });
    refused("an empty sequence", "sequence 1 of a micro-batch has 0 tokens",
            [](MicroBatch* b) { b->starts.insert(b->starts.begin() + 1, 4); });
    refused("an id outside the vocabulary", "token id 11 at position 3", [=](MicroBatch* b) { b->inputs[3] = V; });
    refused("a negative id", "token id -1 at position 0", [](MicroBatch* b) { b->inputs[0] = -1; });
    refused("a target outside the vocabulary", "target 11 at position 5", [=](MicroBatch* b) { b->targets[5] = V; });
    refused("a negative target", "target -1 at position 2", [](MicroBatch* b) { b->targets[2] = -1; });
    refused("a position without an angle", "position 6 at token 4", [](MicroBatch* b) { b->positions[4] = 6; });
    refused("a negative position", "position -1 at token 1", [](MicroBatch* b) { b->positions[1] = -1; });
    refused("a weight that is not a number", "weight of target 2", [](MicroBatch* b) { b->weights[2] = NAN; });
    refused("an infinite weight", "weight of target 5", [](MicroBatch* b) { b->weights[5] = INFINITY; });
}

// ------------------------------------------------------------------------------------------------
// The table of tensors

// Names and sizes in files, in their order, written out for a small shape
static void check_file_tensors(const OlmoeConfig& c) {
    const std::vector<std::pair<std::string, size_t>> layer = {
        {"input_layernorm", 4}, {"self_attn.q_proj", 16}, {"self_attn.k_proj", 16}, {"self_attn.v_proj", 16},
        {"self_attn.q_norm", 4}, {"self_attn.k_norm", 4}, {"self_attn.o_proj", 16}, {"post_attention_layernorm", 4},
        {"mlp.gate", 8},
        {"mlp.experts.0.gate_proj", 12}, {"mlp.experts.0.up_proj", 12},
        {"mlp.experts.1.gate_proj", 12}, {"mlp.experts.1.up_proj", 12},
        {"mlp.experts.0.down_proj", 12}, {"mlp.experts.1.down_proj", 12}};
    std::vector<std::string> names, want_names = {"model.embed_tokens.weight"};
    std::vector<size_t> counts, want_counts = {20};
    for (int l : {0, 1})
        for (auto& [name, count] : layer) {
            want_names.push_back("model.layers." + std::to_string(l) + "." + name + ".weight");
            want_counts.push_back(count);
        }
    for (const char* name : {"model.norm.weight", "lm_head.weight"}) want_names.push_back(name);
    for (size_t count : {4, 20}) want_counts.push_back(count);

    bool tile = true;
    size_t end = 0;
    for (const HfTensor& t : hf_tensors(c)) {
        names.push_back(t.name);
        counts.push_back(t.count);
        size_t elements = 1;
        for (int64_t n : t.shape) elements *= (size_t)n;
        tile = tile && t.offset == end && t.count == elements;
        end += t.count;
    }
    verdict("names in files", names == want_names);
    check_equal("elements in files", counts, want_counts);
    check_true("tensors in files tile the flat order", tile && end == num_parameters(c));
}

// Of the ranks together each element of the model has its place: on every rank, of the experts on one rank of each
// expert group; and one rank, or all that hold it, updates it.
static void check_shares(const OlmoeConfig& c, int ranks, int ep, bool zero_1) {
    const std::string name = text("%d ranks, --ep %d, --zero %d, ", ranks, ep, zero_1);
    const size_t n = num_parameters(c);
    Ints held(n), updated(n), want_held, want_updated;
    bool tile = true, layers = true, found = true;
    for (int rank = 0; rank < ranks; rank++) {
        layout_set(rank, ranks, ep, zero_1);
        const std::vector<Tensor> tensors = model_tensors(c);
        size_t base = 0, state = 0, first = 0;
        for (const Tensor& t : tensors) {
            tile = tile && t.base == base && t.state == state && t.offset >= base && t.count <= t.allocated()
                   && t.offset + t.count <= base + t.whole;
            for (size_t i = t.offset; i < t.offset + t.count; i++) held[i]++;
            for (size_t i = 0; i < t.update_count(); i++) updated[t.offset + t.update_begin() + i]++;
            for (size_t i : {t.base, t.base + t.whole - 1}) found = found && &tensor_at(tensors, i) == &t;
            base += t.whole;
            state += t.update_count();
        }
        tile = tile && base == n && state == num_updated(tensors);
        for (int l = -1; l <= c.L; l++) {                       // one after another they are the whole list
            const auto [begin, end] = layer_range(tensors, l);
            layers = layers && begin == first && begin < end;
            for (size_t i = begin; i < end; i++) layers = layers && tensors[i].layer == l;
            first = end;
        }
        layers = layers && first == tensors.size();
    }
    layout_set(0, 1, 1, false);
    for (const Tensor& t : model_tensors(c)) {
        want_held.insert(want_held.end(), t.whole, t.expert() ? ranks / ep : ranks);
        want_updated.insert(want_updated.end(), t.whole, zero_1 ? 1 : want_held.back());
    }
    check_true(name + "tensors tile the flat order", tile);
    check_true(name + "layers cover all tensors", layers);
    check_true(name + "elements are found", found);
    check_equal(name + "holders of each element", held, want_held);
    check_equal(name + "updates of each element", updated, want_updated);
}

static void table_of_tensors() {
    const OlmoeConfig c = model_shape(2, 4, 1, 5, 2, 1, 3);
    check_file_tensors(c);
    check_shares(c, 1, 1, false);
    for (int ep : {1, 2})
        for (bool zero_1 : {false, true}) check_shares(c, 4, ep, zero_1);

    // each tensor has a pointer of its own, in the parameters and in the gradients
    Model model(c, 1, 2);
    std::set<floatX**> pointers;
    Vec params;
    for (const Tensor& t : model.m.tensors) {
        pointers.insert(&t.in(model.m.params));
        pointers.insert(&t.in(model.m.grads));
        for (size_t i = 0; i < t.count; i++) params.push_back((double)(params.size() % 251));
    }
    check_true("each tensor has a pointer of its own", pointers.size() == 2 * model.m.tensors.size());
    model.set(params);
    check_equal("elements by their position", model.flat(model.m.params), params);
    const LayerParameters& last = model.m.params.layers[1];
    const size_t in_down = 20 + 2 * 160 - 1;                    // the last element of the last layer
    check_true("an element's address", element_at(model.m.tensors, model.m.params, in_down) == last.down + 23);
}

// ------------------------------------------------------------------------------------------------
// The gradient against finite differences of the loss

static Vec random_direction(size_t n) {
    Vec d(n);
    for (double& x : d) x = sqrt(-2 * log(1 - random_uniform())) * cos(2 * M_PI * random_uniform());
    double norm = l2(d);
    for (double& x : d) x /= norm;
    return d;
}

static double dot(const Vec& a, const Vec& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.); }

// From f(-3h), f(-2h), ..., f(3h): f'(0) by central differences extrapolated twice (Richardson), exact for polynomials
// of degree 6, and extrapolated once, for degree 4
static double central_difference(const double* f, double h) {
    return (45 * (f[4] - f[2]) - 9 * (f[5] - f[1]) + (f[6] - f[0])) / (60 * h);
}
static double central_difference_4(const double* f, double h) {
    return (8 * (f[4] - f[2]) - (f[5] - f[1])) / (12 * h);
}

// The twin's own gradient, so that it can judge: in double precision the difference is right to 1e-7.
static void gradient_of_twin() {
    for (bool normalize : {false, true}) {
        OlmoeConfig c = model_shape(2, 8, 2, 11, 4, 2, 5);
        c.norm_topk_prob = normalize;
        Vec params = random_params(c);
        Batch b = random_batch(c, 2, 5);
        b.lb_coef = b.z_coef = 1;
        Outputs base;
        twin_model(base, c, params, b);
        for (const HfTensor& t : hf_tensors(c)) {
            Vec g = slice(base.grads, t.offset, t.count), d;
            double f[7], h = 1e-3;
            for (bool same = false; !same;) {
                d = random_direction(t.count);
                same = true;
                for (int k = -3; k <= 3; k++) {
                    Vec moved = params;
                    for (size_t i = 0; i < t.count; i++) moved[t.offset + i] += k * h * d[i];
                    Outputs out;
                    twin_model(out, c, moved, b);
                    f[k + 3] = out.loss;
                    same = same && expert_sets(out.experts, c.K) == expert_sets(base.experts, c.K);
                }
            }
            const double want = dot(g, d), scale = std::max(fabs(want), l2(g) / sqrt((double)t.count));
            const double error = fabs(central_difference(f, h) - want);
            const bool ok = error <= 1e-7 * scale;
            (ok ? passed : failed)++;
            printf("%-64s derivative % .6e  error %.1e  %s\n", ("twin's gradient " + t.name).c_str(), want,
                   scale > 0 ? error / scale : error, ok ? "ok" : "FAILED");
        }
    }
}

// The losses f[k + 3] of parameters moved by k steps along a direction in a tensor, k = -3 ... 3 without 0. False where
// some token's experts change.
static bool losses_along(double* f, Model& model, const Batch& b, const HfTensor& t, const Vec& params, const Vec& d,
                         double step, const Ints& sets) {
    for (int k : {-3, 3, -2, 2, -1, 1}) {
        Ints chosen;
        for (size_t i = 0; i < t.count; i++) model.params[t.offset + i] = params[t.offset + i] + k * step * d[i];
        model.put(t.offset, t.count);
        f[k + 3] = model.loss(b, &chosen);
        if (expert_sets(chosen, model.m.config.K) != sets) return false;
    }
    return true;
}

// For each tensor, along its gradient and 8 random directions. The step is 4 % of the tensor's norm at first, so that
// the roundings of an fp32 loss near 3, some 1e-7, move the derivative of n elements by less than 1e-3 |gradient| /
// sqrt(n); it is halved, at most four times, while the two orders of extrapolation differ by more than a quarter of the
// tolerance, and the step at which they differ least is taken. All this without regard to the gradient that is tested.
// Directions that change a token's experts are drawn again, with a step a tenth shorter; the gradient, of which there
// is one, is kept.
static void gradient_differences(double lb_coef, double z_coef) {
    OlmoeConfig c = model_shape(2, 12, 2, 23, 5, 2, 9);
    Model model(c, 3, 8);
    model.set(random_params(c));
    Batch b = decisive_batch(model, 3, 8, 0.25);
    b.lb_coef = lb_coef; b.z_coef = z_coef;
    Outputs base = model.run(b);
    const Ints sets = expert_sets(base.experts, c.K);
    const Vec params = model.params;
    int redrawn = 0;
    for (const HfTensor& t : hf_tensors(c)) {
        const Vec g = slice(base.grads, t.offset, t.count);
        const double norm = l2(g), least_scale = norm / sqrt((double)t.count);
        double worst = 0, at_worst = 0;
        for (int direction = 0; direction < 9; direction++) {
            const bool along = direction == 0 && norm > 0;
            Vec d = along ? g : random_direction(t.count);
            if (along) for (double& x : d) x /= norm;
            double f[7], start = 0.04 * l2(slice(params, t.offset, t.count)), step = start, got = NAN, least = INFINITY;
            for (int halvings = 0; halvings <= 4;) {
                if (!losses_along(f, model, b, t, params, d, step, sets)) {
                    if (++redrawn > 3000) die("test: %s: no direction keeps the experts", t.name.c_str());
                    if (direction > 0) d = random_direction(t.count);
                    step = start *= 0.9;
                    halvings = 0;
                    continue;
                }
                const double derivative = central_difference(f, step);
                const double apart = fabs(derivative - central_difference_4(f, step));
                if (apart < least || halvings == 0) { least = apart; got = derivative; }
                if (apart <= 0.25e-3 * std::max(fabs(derivative), least_scale)) break;
                step *= 0.5;
                halvings++;
            }
            const double want = dot(g, d), scale = std::max(fabs(got), least_scale);
            const double error = got == want ? 0 : fabs(got - want) / scale;
            if (!(error <= worst)) { worst = error; at_worst = want; }
        }
        model.params = params;
        model.put(t.offset, t.count);
        (worst <= 1e-3 ? passed : failed)++;
        printf("%-64s derivative % .2e  error %.1e  %5.1f %% of its tolerance  %s\n",
               text("lb %g z %g %s", lb_coef, z_coef, t.name.c_str()).c_str(), at_worst, worst, 100 * worst / 1e-3,
               worst <= 1e-3 ? "ok" : "FAILED");
    }
    printf("%d directions changed an expert and were drawn again\n", redrawn);
}

static void gradient_as_trained() { gradient_differences(0.01, 0.001); }
static void gradient_raised() { gradient_differences(1, 1); }

// ------------------------------------------------------------------------------------------------
// PyTorch's numbers (scripts/reference.py)

static std::string fixtures = "tests/fixtures";

static Vec reference(const Safetensors& f, const std::string& name) {
    const SafeTensor* t = f.find(name);
    if (!t) die("%s: has no tensor %s", f.path.c_str(), name.c_str());
    Vec v;
    if (t->dtype == "I32") {
        std::vector<int> x(t->bytes / 4);
        memcpy(x.data(), t->data, t->bytes);
        v.assign(x.begin(), x.end());
    } else {
        std::vector<float> x(t->bytes / dtype_bytes(t->dtype));
        tensor_to_float(x.data(), *t, 0, x.size());
        v.assign(x.begin(), x.end());
    }
    return v;
}

static Ints reference_ints(const Safetensors& f, const std::string& name) {
    Vec v = reference(f, name);
    return Ints(v.begin(), v.end());
}

static double reference_number(const Safetensors& f, const char* key) {
    auto it = f.metadata.find(key);
    if (it == f.metadata.end()) die("%s: its metadata has no %s", f.path.c_str(), key);
    return atof(it->second.c_str());
}

static Batch reference_batch(const Safetensors& f) {
    const std::vector<int64_t>& shape = f.find("inputs")->shape;
    const int B = (int)shape.at(0), T = (int)shape.at(1);
    const Ints inputs = reference_ints(f, "inputs"), targets = reference_ints(f, "targets");
    const int ignored = (int)std::count(targets.begin(), targets.end(), IGNORED);
    const int divisor = f.metadata.at("ce_divisor") == "all" ? B * T : B * T - ignored;
    Batch b;
    (MicroBatch&)b = batch_of_rows(inputs.data(), targets.data(), B, T, 1. / divisor);
    b.lb_coef = reference_number(f, "lb_coef");
    b.z_coef = reference_number(f, "z_coef");
    return b;
}

// Router logits and routing of each layer
static void check_reference_routing(const std::string& name, const Safetensors& f, const Model& model,
                                    const Ints& experts) {
    const OlmoeConfig& c = model.m.config;
    const size_t N = model.m.N, R = N * c.K;
    int differ = 0;
    for (int l = 0; l < c.L; l++) {
        Vec z = reference(f, text("router.%d.logits", l));
        Vec ours = Device<float>::get_from(model.m.acts.layers[l].router_logits, N * c.E);
        check(name + text("router logits of layer %d", l), ours, z, BF16 ? 12 * (l + 1) * UX : 1e-5);
        Ints want = reference_ints(f, text("router.%d.experts", l)), chosen = slice(experts, l * R, R);
        if (BF16) { want = expert_sets(want, c.K); chosen = expert_sets(chosen, c.K); }
        // in fp32 also the order, but where the reference's own rounding may decide it
        for (size_t i = 0; i < want.size(); i++) {
            const double* logits = &z[i / c.K * c.E];
            const bool close = !BF16 && fabs(logits[want[i]] - logits[chosen[i]]) < 1e-5;
            differ += want[i] != chosen[i] && !close;
        }
    }
    check_true(name + text("routing, %d of %zu differ", differ, experts.size()), differ == 0);
}

static void fixture(const std::string& shape) {
    std::string dir = fixtures + "/" + shape, name = shape + " ";
    Safetensors f;
    safetensors_open(&f, dir + "/reference.safetensors");
    auto number = [&](const char* key) { return reference_number(f, key); };
    OlmoeConfig c;
    config_read(&c, dir + "/config.json");
    const Batch b = reference_batch(f);
    Model model(c, b.B(), b.length(0));
    olmoe_load(&model.m, dir);
    Outputs got = model.run(b);
    Losses losses = olmoe_losses(&model.m, b.lb_coef, b.z_coef);
    check_reference_routing(name, f, model, got.experts);

    // In BF16 the bars are PyTorch's own errors, of the worse of its two attention paths
    auto bar = [&](const std::string& what) {
        return 1.25 * std::max(number(("bf16_eager_" + what).c_str()), number(("bf16_sdpa_" + what).c_str()));
    };
    Vec grads;
    for (const HfTensor& t : hf_tensors(c)) append(&grads, reference(f, "grad." + t.name));
    double loss_tolerance = BF16 ? 0x1p-8 : 1e-5;
    check(name + "logits", got.logits, reference(f, "logits"), BF16 ? bar("logits") : 1e-5, !BF16);
    check(name + "loss", losses.loss, reference(f, "loss")[0], loss_tolerance);
    check(name + "cross entropy", losses.ce, reference(f, "ce_loss")[0], loss_tolerance);
    check(name + "load-balancing loss", losses.lb, reference(f, "lb_loss")[0], loss_tolerance);
    check(name + "z-loss", losses.z, reference(f, "z_loss")[0], loss_tolerance);
    if (BF16) check(name + "gradients", got.grads, grads, bar("grads"), false);
    else check_grads(name, c, got.grads, grads, 1e-4);

    AdamWOptions o;
    o.lr = number("lr"); o.beta1 = number("beta1"); o.beta2 = number("beta2"); o.eps = number("eps");
    o.weight_decay = number("weight_decay"); o.grad_clip = number("grad_clip");
    Vec want = reference(f, "losses");
    for (size_t step = 0; step < want.size(); step++) {
        Outputs out = model.run(b);
        check(name + text("loss after %zu steps", step), out.loss, want[step], loss_tolerance);
        olmoe_update(&model.m, (int64_t)step + 1, olmoe_grad_norm(&model.m), o);
    }
    safetensors_close(&f);
}

// Against PyTorch's own bf16 attention, sdpa, on the same inputs: errors of at most 1.25 times its, which are in a file
// of scripts/reference_attention.py. The numbers here are made as there.
static Vec sdpa_numbers(unsigned array, size_t n) {
    Vec v(n);
    for (size_t i = 0; i < n; i++) {
        unsigned bits = ((unsigned)i + (array << 24)) * 2654435761u;
        bits = (bits ^ bits >> 15) * 2246822519u;
        v[i] = ((int)(bits >> 13 & 255) - 128) / 64.;
    }
    return v;
}

static void test_flash_attention_sdpa() {
    Safetensors f;
    safetensors_open(&f, fixtures + "/attention.safetensors");
    for (int C : {64, 128})
        for (int T : {63, 257, 1000}) {
            OlmoeConfig c;
            c.C = C; c.H = 1;
            if (!c.flash()) continue;
            const size_t n = (size_t)T * C;
            const Vec q = sdpa_numbers(0, n), k = sdpa_numbers(1, n), v = sdpa_numbers(2, n), dout = sdpa_numbers(3, n);
            Vec qk(2 * n), qkv(3 * n), out, lse, dq(n), dk(n), dv(n);
            set_columns(qk, q, T, 2 * C, 0, C);
            set_columns(qk, k, T, 2 * C, C, C);
            set_columns(qkv, v, T, 3 * C, 2 * C, C);
            MicroBatch batch;
            batch.starts.push_back(T);
            twin_attention(out, lse, q, k, v, batch.starts, C, 1);
            twin_attention_backward(dq, dk, dv, dout, q, k, v, batch.starts, C, 1);
            const AttentionRun run(batch, qk, qkv, dout, C, 1, true);
            const std::string name = text("D%d T%d ", C, T);
            auto check_part = [&](const char* part, const Vec& got, const Vec& want) {
                const double bar = reference_number(f, (name + part).c_str());
                check(name + part + text(", sdpa %.1e", bar), got, want, 1.25 * bar, false);
            };
            check_part("out", run.out, out);
            check_part("dq", run.dq, dq);
            check_part("dk", run.dk, dk);
            check_part("dv", run.dv, dv);
        }
    safetensors_close(&f);
}

static void fixture_regular() { fixture("regular"); }
static void fixture_odd() { fixture("odd"); }
static void fixture_all_experts() { fixture("all_experts"); }
static void fixture_normalized() { fixture("normalized"); }
static void fixture_bf16() { fixture("bf16"); }

// ------------------------------------------------------------------------------------------------
// Several ranks: mpirun -np N test_olmoe --ranks. Every rank knows what all of them send, from the same random numbers.

// All ranks in groups of ep that share the experts, with or without ZeRO-1, as long as this exists
struct Layout {
    Layout(int ep, bool zero_1) { comm_close(); layout_set(world.rank, world.size, ep, zero_1); comm_open(); }
    ~Layout() { comm_close(); layout_set(world.rank, world.size, 1, false); comm_open(); }
};

// Groups of one rank have no communicator, and groups of all ranks have that of all.
static void ranks_communicators() {
    for (int ep = 1; ep <= world.size; ep++) {
        if (world.size % ep != 0) continue;
        Layout layout(ep, false);
        for (const Group* g : {&expert_group, &replica_group})
            check_true(text("--ep %d, communicator of %d ranks", ep, g->size),
                       (g->comm == nullptr) == (g->size == 1) && (g->comm == world.comm) == (g->size == world.size));
        check_true("no error of the communicators", comm_error().empty());
    }
}

// Rows to the ranks that their tokens visit and back, for routings that a model would hardly choose, and for more calls
// than one group of NCCL's holds
static void ranks_exchange() {
    const int G = world.size, self = world.rank, mine = 6, E = G * mine, kinds = num_kinds(PIECES);
    Layout layout(G, false);
    const char* patterns[] = {"random", "none at all", "all of one kind", "all to the first rank",
                              "none to the last rank", "only to oneself", "one rank sends nothing", "many groups"};
    const int most_calls = group_calls;
    for (int pattern = 0; pattern < 8; pattern++) {
        if (pattern == 7) group_calls = 4 * G;                  // of two kinds
        std::vector<Ints> sent(G, Ints(G * kinds, 0)), needed(G);       // by rank, and kind or expert
        for (int g = 0; g < G; g++) {
            for (int i = 0; i < G * kinds; i++) {
                int n = random_below(6), owner = i / kinds;
                bool some = pattern == 0 || pattern == 7
                            || (pattern == 2 && i == 4) || (pattern == 3 && owner == 0)
                            || (pattern == 4 && owner != G - 1) || (pattern == 5 && owner == g)
                            || (pattern == 6 && g != G - 1);
                sent[g][i] = some ? pattern == 2 ? n + 20 : n : 0;
            }
            needed[g] = random_ints(E, 9);
        }
        // the value in column i of row j that rank g sends to a rank and of a kind; up to 250, which floatX holds
        auto value = [](int g, int to, int j, int i) { return (double)((g * 59 + to * 17 + j * 5 + i) % 251); };
        std::string name = text("exchange, %s, ", patterns[pattern]);
        RowCounts rows;
        rows.sent = needed[self];
        rows.visits_sent = sent[self];
        Ints arrived;
        for (int g = 0; g < G; g++) append(&arrived, slice(needed[g], self * mine, mine));
        for (int g = 0; g < G; g++) append(&arrived, slice(sent[g], self * kinds, kinds));
        Device<int> counts(rows.sent), values(sent[self]), visits(values.n), arrivals(arrived.size());
        copy_on_device(visits.p, values.p, values.n);           // for which nothing has waited yet
        cudaCheck(cudaEventRecord(copy_event, main_stream.stream));
        exchange_counts(arrivals, counts, visits, E, 0);
        cudaCheck(cudaStreamWaitEvent(copy_stream, copy_event, 0));
        counts_to_host(&rows, visits, arrivals);
        Ints got = rows.arrived;
        append(&got, rows.visits_arrived);
        check_equal(name + "arrivals", got, arrived);
        check_equal(name + "visits", rows.visits_sent, sent[self]);
        cut_rows(&rows);
        for (int width : {1, 7, 24}) {
            Vec out, want;
            auto add = [&](Vec* to, int g, int i) {
                for (int j = 0; j < sent[g][i]; j++)
                    for (int column = 0; column < width; column++) to->push_back(value(g, i, j, column));
            };
            for (int i = 0; i < G * kinds; i++) add(&out, self, i);
            for (int kind = 0; kind < kinds; kind++)
                for (int g = 0; g < G; g++) add(&want, g, self * kinds + kind);
            Device<floatX> made(out), from(out.size()), to(want.size()), answer(want.size()), back(out.size());
            copy_on_device(from.p, made.p, out.size());         // for which nothing has waited yet
            const double before = traffic[ROWS];
            double travelling = 0;                              // rows to other ranks, and answers to theirs
            for (int i = 0; i < G * kinds; i++)
                if (i / kinds != self) travelling += sent[self][i] + rows.visits_arrived[i];
            in_pieces((int)rows.pieces.size(), [&](int i) {
                bring_rows({{to.p, from.p, width * sizeof(floatX)}}, rows, i, "test", 0);
            }, [&](int i) {
                const size_t first = rows.pieces[i].first_visit * width;
                copy_on_device(answer.p + first, to.p + first, (size_t)rows.pieces[i].visits * width);
            }, [&](int i) {
                return_rows({{back.p, answer.p, width * sizeof(floatX)}}, rows, i, "test", 0);
            });
            check_equal(name + text("%d columns", width), to.get(), want);
            check_equal(name + text("%d columns, back", width), back.get(), out);
            check_true(name + text("%d columns, bytes sent", width),
                       traffic[ROWS] - before == travelling * width * sizeof(floatX));
        }
        group_calls = most_calls;
    }
}

// Which visits tokens make, and what a rank makes of their experts, against their definitions
static void ranks_visits() {
    const int G = world.size;
    Layout layout(G, false);
    const int shapes[][3] = {{200, 3, 6}, {7, 5, 5}, {1, 1, 1}, {300, 2, 3}, {90, 8, 9}};   // N, K, experts of a rank
    for (auto& [N, K, mine] : shapes) {
        const int R = N * K, pieces = num_pieces(mine), kinds = num_kinds(pieces);
        std::string name = text("visits N %d K %d, %d experts a rank, ", N, K, mine);
        const Ints experts = random_ints(R, G * mine);
        Ints visits(R, -1), leaders(R), own(R);
        Vec of_visits, dweights(R);
        for (int a = 0; a < R; a++) {
            const int rank = experts[a] / mine;
            Ints with;                                          // assignments of the visit
            for (int b = a / K * K; b < (a / K + 1) * K; b++) if (experts[b] / mine == rank) with.push_back(b);
            int first = pieces, last = -1;
            for (int b : with)
                for (int p = 0; p < pieces; p++) {
                    const int e = experts[b] % mine;
                    if (e < mine * p / pieces || e >= mine * (p + 1) / pieces) continue;
                    first = std::min(first, p);
                    last = std::max(last, p);
                }
            leaders[a] = with[0];
            if (with[0] == a) visits[a] = rank * kinds + visit_kind(first, last);
            own[a] = rank == G - 1 ? experts[a] % mine : -1;
        }
        Ints row_of = random_ints(R, R);
        of_visits = random_vec<float>((size_t)R * K);
        for (int a = 0; a < R; a++) dweights[a] = of_visits[row_of[leaders[a]] * K + a % K];
        Device<int> d_experts(experts), d_visits(R), d_row_of(row_of);
        Device<float> d_of_visits(of_visits), d_dweights(R);
        LAUNCH(visits_kernel, blocks_for(R), d_visits.p, d_experts.p, R, K, mine, pieces);
        LAUNCH(visit_dweights_kernel, blocks_for(R), d_dweights.p, d_of_visits.p, d_row_of.p, d_experts.p, R, K,
               mine);
        LAUNCH(own_experts_kernel, blocks_for(R), d_experts.p, R, (G - 1) * mine, mine);
        check_equal(name + "kinds", d_visits.ints(), visits);
        check_equal(name + "dweights", d_dweights.get(), dweights);
        check_equal(name + "own experts", d_experts.ints(), own);
    }
}

// A model on all ranks, with the experts shared or not, against the formula for the rows of all of them. one_token: all
// rows of all ranks go to the same experts.
struct RanksModel { int ep; bool one_token, lb_global; int recompute; bool zero; };

static void check_ranks_model(const RanksModel& r) {
    const int W = world.size, self = world.rank, B = 2, T = 5;
    OlmoeConfig c = model_shape(2, 12, 2, 23, 5 * W, 2, 10);
    Vec params = random_params(c), want_logits, want_grads(params.size(), 0);
    Batch all;
    layout_set(0, 1, 1, false);
    {
        Model alone(c, B * W, T);
        alone.set(params);
        params = alone.params;
        all = random_batch(c, B * W, T);
        if (!r.one_token) all = decisive(all, alone, MARGIN);
    }
    layout_set(self, W, 1, false);
    if (r.one_token) all.inputs.assign(all.inputs.size(), 3);
    auto rows_of = [&](int rank) {
        Batch part = part_of(all, rank * B, B);
        part.micro_batches = W;
        return part;
    };
    // Load balancing and z of each rank's rows, cross entropy of all: the mean over the ranks of what each would be
    // alone, with its own divisor. With load balancing over all of them it is what one rank would compute of the whole
    // batch.
    for (int rank = 0; rank < W; rank++) {
        Outputs want;
        twin_model(want, c, params, rows_of(rank));
        if (rank == self) want_logits = want.logits;
        for (size_t i = 0; i < params.size(); i++) want_grads[i] += want.grads[i];
    }
    if (r.lb_global) {
        Outputs want;
        twin_model(want, c, params, all);
        want_grads = want.grads;
    }

    Layout layout(r.ep, r.zero);
    Model model(c, B, T, r.recompute);
    model.m.lb_global = r.lb_global;
    model.set(params);
    std::string name = text("%d ranks, --ep %d, --zero %d, --recompute %d%s%s, ", W, r.ep, r.zero, r.recompute,
                            r.one_token ? ", one token" : "", r.lb_global ? ", --lb global" : "");
    const double traffic_before = traffic[ROWS];
    model.forward(rows_of(self));
    // Reading the logits waits for all streams, and would hide a missing wait for the counts of all ranks.
    if (!r.lb_global) check(name + "logits", model.logits(), want_logits, model_tolerance(c, 1e-5));
    model.backward(rows_of(self), 1, true);
    // Read before anything else that waits for the collectives, which would hide a missing wait for the last sums.
    Vec got, want;
    for (const Tensor& t : model.m.tensors) {                   // under ZeRO-1 a rank's share of the sums
        const size_t begin = t.update_begin(), n = t.update_count();
        append(&got, Device<floatX>::get_from(t.in(model.m.grads) + begin, n));
        append(&want, slice(want_grads, t.offset + begin, n));
    }
    check(name + "gradients", got, want, model_tolerance(c, 1e-4), false);
    std::vector<double> visits(W * W, 0);                       // of the tokens of one rank to another
    for (const LayerActivations& a : model.m.acts.layers) {
        const Vec experts = Device<int>::get_from(a.experts, (size_t)model.m.R);
        for (int t = 0; t < model.m.N; t++) {
            std::set<int> ranks_visited;
            for (int k = 0; k < c.K; k++) ranks_visited.insert((int)experts[t * c.K + k] / (c.E / r.ep));
            for (int g : ranks_visited) visits[self * W + self / r.ep * r.ep + g]++;
        }
    }
    host_sum(&visits);
    double bytes = 0;
    for (int g = 0; g < W; g++)
        if (g != self) {
            bytes += visits[self * W + g] * ((r.recompute ? 3 : 2) * c.C * sizeof(floatX) + 8 * c.K);
            bytes += visits[g * W + self] * (2 * c.C * sizeof(floatX) + 4 * c.K);
        }
    check_true(name + "bytes of rows", traffic[ROWS] - traffic_before == bytes);
}

static void ranks_model() {
    const int W = world.size;
    for (int ep : {1, W})
        for (bool one_token : {false, true}) check_ranks_model({ep, one_token, false, 0, false});
    for (int recompute : {1, 2}) check_ranks_model({W, false, true, recompute, false});
    check_ranks_model({1, false, true, 0, true});
    if (W % 2 == 0) check_ranks_model({2, false, false, 0, true});      // at 4 ranks the experts are shared and spread
}

// Two steps with AdamW's state spread over the ranks come to the same parameters as with all of it on each. The sizes
// divide by no rank count.
static void check_ranks_zero(const char* masters, const char* moments) {
    const int W = world.size, B = 1, T = 5;
    OlmoeConfig c = model_shape(2, 10, 1, 17, 5, 2, 7);
    Vec params = random_params(c);
    Batch batch = random_batch(c, B, T);
    for (int& id : batch.inputs) id = (id + world.rank) % c.V;  // each rank its own rows
    Vec results[2];
    Vec padding;                                                // of the last share: the collectives send it
    double norms[2];
    size_t states[2];
    AdamWOptions o;
    o.lr = 0.02;                                                // far above the roundings, with an eps that keeps
    o.eps = 1e-3;                                               // small gradients' small
    for (int with : {0, 1}) {
        Layout layout(1, with);
        Model model(c, B, T, 0, masters, moments);
        model.set(params);
        for (int step = 1; step <= 2; step++) {
            model.forward(batch);
            model.backward(batch, 1, true);
            norms[with] = olmoe_grad_norm(&model.m);
            olmoe_update(&model.m, step, norms[with], o);
        }
        results[with] = model.flat(model.m.params);
        states[with] = num_updated(model.m.tensors);
        for (const Tensor& t : model.m.tensors)
            for (floatX* p : {t.in(model.m.params), t.in(model.m.grads)})
                append(&padding, Device<floatX>::get_from(p + t.count, t.allocated() - t.count));
    }
    std::string name = text("zero, %s masters, %s moments, ", masters, moments);
    const double rounding = BF16 ? UX : !strcmp(moments, "fp32") ? 1e-6 : 1e-3;
    check(name + "gradient norm", norms[1], norms[0], BF16 ? 1e-2 : 1e-6);
    // MPI adds in the order of the ranks, whatever the collective
    if (NCCL_BY_MPI) check_equal(name + "parameters", results[1], results[0]);
    else check(name + "parameters", results[1], results[0], rounding);
    check_true(name + text("%zu numbers fill up the last shares", padding.size()), l2(padding) == 0);
    check_true(name + "state is spread",
               states[0] == params.size() && states[1] < params.size() / W + model_tensors(c).size());
    // what one rank holds, all hold
    std::vector<double> sums(results[1].size() * W);
    std::copy(results[1].begin(), results[1].end(), sums.begin() + world.rank * results[1].size());
    host_sum(&sums);
    bool same = true;
    for (int r = 0; r < W; r++)
        same = same && std::equal(results[1].begin(), results[1].end(), sums.begin() + r * results[1].size());
    check_true(name + "the same on all ranks", same);
}

static void ranks_zero() {
    for (const char* masters : {"fp32", "remainder", "none"})
        for (const char* moments : {"fp32", "bf16"})
            if (BF16 || !strcmp(masters, "fp32")) check_ranks_zero(masters, moments);
}

// ------------------------------------------------------------------------------------------------
// The device's peak

// Names as drivers give them
static void peak_names() {
    const std::vector<std::pair<const char*, double>> known = {
        {"NVIDIA A100-SXM4-80GB", 312}, {"A100-PCIE-40GB", 312}, {"NVIDIA A100 80GB PCIe", 312}, {"NVIDIA A10", 125},
        {"NVIDIA H100 80GB HBM3", 989.4}, {"NVIDIA H100 PCIe", 756}, {"NVIDIA H100 NVL", 835.5}, {"NVIDIA H200", 989.5},
        {"NVIDIA H200 NVL", 835.5}, {"NVIDIA GH200 480GB", 989.5}, {"NVIDIA B200", 2250}, {"NVIDIA L4", 121},
        {"NVIDIA L40", 181.05}, {"NVIDIA L40S", 362.05}, {"NVIDIA GeForce RTX 3090", 71},
        {"NVIDIA GeForce RTX 4090", 165.2}, {"NVIDIA GeForce RTX 5090", 209.5}, {"NVIDIA RTX A6000", 154.8},
        {"NVIDIA RTX 6000 Ada Generation", 364.2}, {"Tesla V100-SXM2-32GB", 0}, {"Tesla T4", 0},
    };
    for (auto& [device, bf16] : known) {
        const PublishedPeak* p = published_peak(device);
        verdict(text("peak of %s", device), p && p->bf16 == bf16 && p->fp32 > 0);
    }
    for (const char* device : {"NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA A10G",
                               "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100",
                               "NVIDIA GeForce RTX 3090 Ti", "AMD EPYC 9B45, 2 cores", "NVIDIA", ""})
        verdict(text("no peak of %s", device), !published_peak(device));
    check_equal("peaks of V100 and H100 in FP32", Vec{published_peak("Tesla V100-SXM2-16GB")->fp32,
                published_peak("NVIDIA H100 80GB HBM3")->fp32}, Vec{15.7, 66.9});
    for (const PublishedPeak& p : published_peaks)
        verdict(text("the line of %s is found", p.device), published_peak(p.device) == &p);
    const Peak given = machine_peak(2.5);
    verdict("a given peak", given.flops == 2.5e12 && given.source == "given");
}

// The product that is timed is of independent normal numbers, cut off at three: variance 0.9733.
static void peak_product() {
    const int n = 256;
    const PeakProduct p = product_open(n);
    check_true("it takes time", product_run(p) > 0);
    const std::tuple<const char*, floatX*, double> all[] = {{"a", p.a, 0.9866}, {"b", p.b, 0.9866},
                                                            {"c", p.c, 0.9733 * 16}};
    for (auto& [name, matrix, deviation] : all) {
        const std::vector<float> x = device_floats(matrix, (size_t)n * n);
        check(text("deviation of %s", name), l2(Vec(x.begin(), x.end())) / n, deviation, 0.02);
    }
    product_close(p);
}

// ------------------------------------------------------------------------------------------------

struct Test { const char* name; void (*run)(); bool bf16; };    // bf16: also where floatX is bf16
static const Test tests[] = {
    {"kernel copies", test_copies, true},
    {"kernel launch messages", test_launch_messages, true},
    {"kernel linear", test_linear, true},
    {"kernel embedding", test_embedding, true},
    {"kernel rmsnorm", test_rmsnorm, true},
    {"kernel qk-norm and rope", test_qk_norm_rope, true},
    {"kernel attention", test_attention, true},
    {"kernel flash attention", test_flash_attention, true},
    {"kernel flash attention sdpa", test_flash_attention_sdpa, true},
    {"kernel cached attention", test_cached_attention, true},
    {"kernel router", test_router, true},
    {"kernel dispatch and combine", test_dispatch, true},
    {"kernel swiglu", test_swiglu, true},
    {"kernel experts, their order", test_expert_order, true},
    {"kernel experts", test_experts, true},
    {"kernel experts, odd width", test_experts_odd_width, true},
    {"kernel cross entropy", test_cross_entropy, true},
    {"kernel adamw", test_adamw, true},
    {"kernel square sum", test_square_sum, true},
    {"kernel init", test_init, true},
    {"vectors router", vectors_router, true},
    {"vectors rmsnorm", vectors_rmsnorm, true},
    {"vectors rope", vectors_rope, true},
    {"vectors swiglu", vectors_swiglu, true},
    {"vectors attention", vectors_attention, true},
    {"vectors adamw", vectors_adamw, true},
    {"vectors schedule", vectors_schedule, true},
    {"vectors losses", vectors_losses, true},
    {"preference losses", preference_losses, true},
    {"rows dealt", rows_dealt, true},
    {"model shapes", model_shapes, true},
    {"model, odd width", model_odd_width, true},
    {"model batches", model_batches, true},
    {"model head", model_head, true},
    {"model recompute", model_recompute, true},
    {"model frozen", model_frozen, true},
    {"model cache", model_cache, true},
    {"batch ragged", batch_ragged, true},
    {"batch rows", batch_rows, true},
    {"batch checks", batch_checks, true},
    {"table of tensors", table_of_tensors, true},
    {"sampling", sampling, false},
    {"model ties", model_ties, true},
    {"model update", model_update, true},
    {"model state", model_state, true},
    {"model nan", model_nan, true},
    {"peak names", peak_names, true},
    {"peak product", peak_product, true},
    {"fixture regular", fixture_regular, false},
    {"fixture odd", fixture_odd, false},
    {"fixture all_experts", fixture_all_experts, false},
    {"fixture normalized", fixture_normalized, false},
    {"fixture bf16", fixture_bf16, true},
    {"ranks communicators", ranks_communicators, true},
    {"ranks exchange", ranks_exchange, true},
    {"ranks visits", ranks_visits, true},
    {"ranks model", ranks_model, true},
    {"ranks zero", ranks_zero, true},
    {"gradient of the twin", gradient_of_twin, false},
    {"gradient as trained", gradient_as_trained, false},
    {"gradient with raised coefficients", gradient_raised, false},
};

int main(int argc, char** argv) {
    std::vector<std::string> only, without;
    bool list = false, on_ranks = false;
    for (int i = 1; i < argc; i++) {
        std::string arg = argv[i];
        if (arg == "--list") list = true;
        else if (arg == "--ranks") on_ranks = true;
        else if (arg == "--only" && i + 1 < argc) only.push_back(argv[++i]);
        else if (arg == "--without" && i + 1 < argc) without.push_back(argv[++i]);
        else if (arg == "--fixtures" && i + 1 < argc) fixtures = argv[++i];
        else
            die("usage: test_olmoe [--list] [--ranks] [--only SUBSTRING]... [--without SUBSTRING]... [--fixtures DIR]; "
                "'%s' is none of it", argv[i]);
    }
    auto any = [](const std::vector<std::string>& parts, const char* name) {
        for (const std::string& part : parts) if (strstr(name, part.c_str())) return true;
        return false;
    };
    int run = 0;
    if (on_ranks) {
        ranks = ranks_start("", NCCL_BY_MPI);
        layout_set(ranks.rank, ranks.size, 1, false);
    }
    if (!list) device_open();
    if (on_ranks) comm_open();
    for (const Test& t : tests) {
        if ((strncmp(t.name, "ranks ", 6) == 0) != on_ranks && !list) continue;
        if ((BF16 && !t.bf16) || (!only.empty() && !any(only, t.name)) || any(without, t.name)) continue;
        run++;
        if (list) { printf("%s\n", t.name); continue; }
        double start = seconds_now();
        uint64_t seed = 14695981039346656037u;                  // of the name, so that a test alone is the same test
        for (const char* c = t.name; *c; c++) seed = (seed ^ (unsigned char)*c) * 1099511628211u;
        engine.seed(seed);
        printf("\n%s\n", t.name);
        t.run();
        fflush(stdout);
        fprintf(stderr, "%-36s %6.2f s\n", t.name, seconds_now() - start);
    }
    if (run == 0) die("test: nothing has such a name; see --list");
    if (list) return 0;
    if (on_ranks) comm_close();
    device_close();
    if (on_ranks) ranks_leave();
    printf("\nchecksum %016llx\n%d passed, %d failed\n", (unsigned long long)checksum, passed, failed);
    return failed > 0;
}
