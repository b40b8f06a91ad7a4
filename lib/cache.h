// A cache of keys and values: sequences go on from tokens that went through the layers before. olmoe generate and olmoe
// evaluate work with it.
//
// Included once, by olmoe.cu, after the model.
#pragma once

// ------------------------------------------------------------------------------------------------
// Cached attention. Keys and values of a layer stay in a cache (H, P, D) of P places, one a token. A head's are
// together, because they are read together. The tokens of a sequence have places side by side, or are in two such runs:
// those of a context, which several sequences may share, and the sequence's own.
//
// One query attends to all keys before it. Alone, a head has too little work for a GPU, and so its keys are split into
// parts of CACHE_PART, each a warp's, which a second kernel combines (flash-decoding, Dao et al. 2023). The parts
// depend on positions alone: what a sequence gets does not depend on the others.

constexpr int CACHE_PART = 64;
constexpr int CACHE_KEYS = WARP == 1 ? 1 : 8;                               // that a warp loads at the same time
constexpr int CACHE_COLUMNS = WARP == 1 ? 64 : 16 / (int)sizeof(floatX);    // of one that a lane takes at a time
constexpr int COMBINE_LANE = WARP == 1 ? 64 : 1;                            // of a head that a lane combines

// The places that a row of the micro-batch reads: so many from the first on, of its context, then of its own sequence.
// The last of these is the row's own, where its key and value go.
struct alignas(16) CacheRow { int context, in_context, own, in_own; };

constexpr __host__ __device__ int cache_parts(const CacheRow& r) {
    return ceil_div(r.in_context, CACHE_PART) + ceil_div(r.in_own, CACHE_PART);
}

struct Cache {
    int P = 0;                  // places
    floatX* keys;               // (L, H, P, D)
    floatX* values;             // (L, H, P, D)
    float* partial;             // (parts, H, D) scratch: attention to a part of the keys, ...
    float2* terms;              // (parts, H) ... its largest score m, and the sum of exp(score - m)
    CacheRow* rows;             // (N) of the micro-batch
    int* last;                  // (prompts) rows that the last layer goes on with
    floatX* x;                  // (prompts, C) their residual stream
};

// One warp per row and head: its k and v into the cache
__global__ void cache_store_kernel(floatX* keys, floatX* values, const floatX* qk, const floatX* qkv,
                                   const CacheRow* rows, int N, int H, int D, int P) {
    size_t warp = thread_index() / WARP, row = warp / H, head = warp % H;
    int lane = threadIdx.x % WARP, C = H * D;
    if (row >= (size_t)N) return;
    const floatX *k = qk + row * 2 * C + C + head * D, *v = qkv + row * 3 * C + 2 * C + head * D;
    size_t to = (head * P + rows[row].own + rows[row].in_own - 1) * D;
    for (int i = lane; i < D; i += WARP) keys[to + i] = k[i];
    for (int i = lane; i < D; i += WARP) values[to + i] = v[i];
}

// sum_i a_i b_i of a lane's n columns: 16 bytes, or few, or a CPU's whole row
template <int COLUMNS> __device__ inline float product(const floatX* a, const floatX* b, int n) {
    float sum = 0;
    if constexpr (COLUMNS * sizeof(floatX) == 16) {
        const Floats<COLUMNS> x = load_floats<COLUMNS>(a), y = load_floats<COLUMNS>(b);
        UNROLL for (int i = 0; i < COLUMNS; i++) sum += x[i] * y[i];
    } else {
        for (int i = 0; i < n; i++) sum += (float)a[i] * (float)b[i];
    }
    return sum;
}

// sum_i += p v_i, for the first n of a lane's columns
template <int COLUMNS> __device__ inline void add_scaled(Floats<COLUMNS>& sum, float p, const floatX* v, int n) {
    if constexpr (COLUMNS * sizeof(floatX) == 16) {
        const Floats<COLUMNS> x = load_floats<COLUMNS>(v);
        UNROLL for (int i = 0; i < COLUMNS; i++) sum[i] += p * x[i];
    } else if (n >= COLUMNS) {
        for (int i = 0; i < COLUMNS; i++) sum[i] += p * (float)v[i];
    } else {
        for (int i = 0; i < n; i++) sum[i] += p * (float)v[i];
    }
}

// One query q and one part of the keys j that it reads; the context's parts come first:
//     s_j = q k_j / sqrt(D),   m = max_j s_j,   o = sum_j exp(s_j - m) v_j,   l = sum_j exp(s_j - m)
// One warp per row, head and part. Key j of the part is lane j % WARP's. Reads the part of the cache once: 2 D floatX a
// key.
template <int COLUMNS>
__global__ void attention_cached_kernel(float* partial, float2* terms, const floatX* __restrict__ qk,
                                        const floatX* __restrict__ keys, const floatX* __restrict__ values,
                                        const CacheRow* rows, int N, int H, int D, int P, int parts, float scale) {
    const size_t warp = thread_index() / WARP, row = warp / parts / H, head = warp / parts % H;
    if (row >= (size_t)N) return;
    const CacheRow r = rows[row];
    const int lane = threadIdx.x % WARP, part = (int)(warp % parts), of_context = ceil_div(r.in_context, CACHE_PART);
    const bool own = part >= of_context;
    const int first = (own ? part - of_context : part) * CACHE_PART;
    const int keys_left = (own ? r.in_own : r.in_context) - first;
    if (keys_left <= 0) return;
    const int last = min(CACHE_PART, keys_left) - 1;
    const size_t cached = (head * P + (own ? r.own : r.context) + first) * D;
    const floatX *q = qk + row * 2 * H * D + head * D, *k = keys + cached, *v = values + cached;

    float scores[CACHE_PART / WARP], max = -INFINITY, sum = 0;
    const int width = WARP == 1 ? D : COLUMNS;
    UNROLL for (int i = 0; i < CACHE_PART / WARP; i++) {
        scores[i] = -INFINITY;
        for (int at = 0; at < WARP && i * WARP + at <= last; at += CACHE_KEYS) {
            float dots[CACHE_KEYS] = {};
            for (int c = lane * width; c < D; c += WARP * width)
                UNROLL for (int j = 0; j < CACHE_KEYS; j++)
                    dots[j] += product<COLUMNS>(q + c, k + (min(i * WARP + at + j, last) * D + c), width);
            UNROLL for (int j = 0; j < CACHE_KEYS; j++) {
                const float dot = warp_sum(dots[j]) * scale;
                if (lane == at + j && i * WARP + at + j <= last) scores[i] = dot;
            }
        }
    }
    UNROLL for (int i = 0; i < CACHE_PART / WARP; i++) max = fmaxf(max, scores[i]);
    max = warp_max(max);
    UNROLL for (int i = 0; i < CACHE_PART / WARP; i++) sum += scores[i] = expf(scores[i] - max);
    sum = warp_sum(sum);
    if (lane == 0) terms[warp] = {max, sum};

    for (int begin = 0; begin < D; begin += WARP * COLUMNS) {
        const int c = begin + lane * COLUMNS;
        Floats<COLUMNS> total = {};
        UNROLL for (int i = 0; i < CACHE_PART / WARP; i++)
            for (int at = 0; at < WARP && i * WARP + at <= last; at += CACHE_KEYS)
                UNROLL for (int j = 0; j < CACHE_KEYS; j++) {
                    const float p = __shfl_sync(0xffffffff, scores[i], at + j);     // 0 for keys after the last
                    const int at_value = min(i * WARP + at + j, last) * D + c;
                    if (c < D) add_scaled<COLUMNS>(total, p, v + at_value, D - c);
                }
        float* to = partial + warp * D + c;
        if constexpr (COLUMNS * sizeof(floatX) == 16) {
            if (c < D) store_pack(to, total);
        } else {
            for (int i = 0; i < COLUMNS; i++) if (c + i < D) to[i] = total[i];
        }
    }
}

// The parts i of all keys:   m = max_i m_i,   o = sum_i exp(m_i - m) o_i / sum_i exp(m_i - m) l_i
// One warp per row, head and slice of WARP * COMBINE_LANE columns.
__global__ void attention_combine_kernel(floatX* out, const float* __restrict__ partial,
                                         const float2* __restrict__ terms, const CacheRow* rows, int N, int H, int D,
                                         int parts, int slices) {
    const size_t warp = thread_index() / WARP, head = warp / slices;        // of all rows
    const int lane = threadIdx.x % WARP, column = (int)(warp % slices) * WARP * COMBINE_LANE + lane;
    if (head >= (size_t)N * H) return;
    const int mine = cache_parts(rows[head / H]);
    partial += head * parts * D; terms += head * parts;

    float max = -INFINITY, sum = 0, total[COMBINE_LANE] = {};
    for (int i = lane; i < mine; i += WARP) max = fmaxf(max, terms[i].x);
    max = warp_max(max);
    for (int i = 0; i < mine; i++) {
        const float factor = expf(terms[i].x - max);
        sum += factor * terms[i].y;
        for (int c = 0; c < COMBINE_LANE; c++)
            if (column + c * WARP < D) total[c] += factor * partial[(size_t)i * D + column + c * WARP];
    }
    for (int c = 0; c < COMBINE_LANE; c++)
        if (column + c * WARP < D) out[head * D + column + c * WARP] = (floatX)(total[c] / sum);
}

// The keys and values of layer l into the cache
void cache_store(const Cache& cache, const LayerActivations& a, int l, int N, const OlmoeConfig& c) {
    const size_t layer = (size_t)l * cache.P * c.C;
    LAUNCH(cache_store_kernel, blocks_for_rows((size_t)N * c.H), cache.keys + layer, cache.values + layer, a.qk, a.qkv,
           cache.rows, N, c.H, c.C / c.H, cache.P);
}

// attn from qk and the cache of layer l. parts: the most of a row. COLUMNS: of a lane at a time
template <int COLUMNS>
void attention_cached(LayerActivations& a, const Cache& cache, int l, int N, int parts, const OlmoeConfig& c) {
    const int H = c.H, D = c.C / H, slices = ceil_div(D, WARP * COMBINE_LANE);
    const size_t layer = (size_t)l * cache.P * c.C, heads = (size_t)N * H;
    LAUNCH(attention_cached_kernel<COLUMNS>, blocks_for_rows(heads * parts), cache.partial, cache.terms, a.qk,
           cache.keys + layer, cache.values + layer, cache.rows, N, H, D, cache.P, parts, 1 / sqrtf((float)D));
    LAUNCH(attention_combine_kernel, blocks_for_rows(heads * slices), a.attn, cache.partial, cache.terms, cache.rows, N,
           H, D, parts, slices);
}

void attention_cached(LayerActivations& a, const Cache& cache, int l, int N, int parts, const OlmoeConfig& c) {
    if (WARP == 1 || c.C / c.H % CACHE_COLUMNS == 0) attention_cached<CACHE_COLUMNS>(a, cache, l, N, parts, c);
    else attention_cached<1>(a, cache, l, N, parts, c);
}

// Between olmoe_plan and olmoe_allocate: room for the keys and values of P tokens, for so many prompts at a time in
// olmoe_prefill, and for rows of so many parts, together, in olmoe_decode.
void cache_plan(Cache* cache, Olmoe* m, size_t P, int prompts, size_t parts) {
    const OlmoeConfig& c = m->config;
    if (P > INT32_MAX) die("a cache of %zu tokens is too large; use a smaller --batch", P);
    cache->P = (int)P;
    m->cache_memory.add(c.L * P * c.C, &cache->keys);
    m->cache_memory.add(c.L * P * c.C, &cache->values);
    m->cache_memory.add(parts * c.C, &cache->partial);
    m->cache_memory.add(parts * c.H, &cache->terms);
    m->cache_memory.add(m->capacity.N, &cache->rows);
    m->cache_memory.add(prompts, &cache->last);
    m->cache_memory.add((size_t)prompts * c.C, &cache->x);
}

// A layer against the keys and values before its rows, and those of its rows
void decode_layer(Olmoe* m, const Cache& cache, int l, int parts) {
    LayerActivations& a = m->acts.layers[l];
    attention_inputs(m, l);
    cache_store(cache, a, l, m->N, m->config);
    attention_cached(a, cache, l, m->N, parts, m->config);
    attention_output(m, l);
    experts_block(m, l);
}

// The rows' places to the device; returns the most parts that one of them has
int cache_set_rows(const Cache& cache, const std::vector<CacheRow>& rows) {
    int parts = 0;
    for (const CacheRow& r : rows) parts = std::max(parts, cache_parts(r));
    copy_to_device(cache.rows, rows);
    return parts;
}

// Tokens after those in the cache, of a sequence each or neighbours in one: their keys and values go into the cache,
// what the layers make of them, the residual stream (N, C), to acts.x. The sequences of `batch` matter to nothing.
void olmoe_decode(Olmoe* m, const Cache& cache, const MicroBatch& batch, const std::vector<CacheRow>& rows /* (N) */) {
    olmoe_set_batch(m, batch);
    const int parts = cache_set_rows(cache, rows);
    embedding_forward(m->acts.layers[0].x, m->acts.inputs, m->params.embed, m->N, m->config.C);
    for (int l = 0; l < m->config.L; l++) {
        at_layer(l);
        decode_layer(m, cache, l, parts);
    }
}

// Prompts of any lengths, each to the places from places[b] on: their keys and values go into the cache, the residual
// stream (B, C) of each one's last token to acts.x. The last layer's other tokens matter to nothing: it gives its keys
// and values, and then the last tokens go through it as in olmoe_decode.
void olmoe_prefill(Olmoe* m, const Cache& cache, const MicroBatch& prompts, const std::vector<int>& places /* (B) */) {
    const OlmoeConfig& c = m->config;
    const int L = c.L, B = prompts.B();
    Activations& a = m->acts;
    std::vector<CacheRow> rows, last_rows;
    std::vector<int> last;
    MicroBatch last_tokens;
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < prompts.length(b); t++) rows.push_back({0, 0, places[b], t + 1});
        last.push_back(prompts.begin(b) + prompts.length(b) - 1);
        last_rows.push_back(rows.back());
        batch_add(&last_tokens, &prompts.inputs[last[b]], nullptr, 1, 0, prompts.positions[last[b]]);
    }
    olmoe_set_batch(m, prompts);
    cache_set_rows(cache, rows);
    copy_to_device(cache.last, last);
    embedding_forward(a.layers[0].x, a.inputs, m->params.embed, m->N, c.C);
    for (int l = 0; l < L; l++) {
        at_layer(l);
        attention_inputs(m, l);
        cache_store(cache, a.layers[l], l, m->N, c);
        if (l + 1 == L) break;
        attention_forward(a.layers[l], m->scratch, m->batch, c);
        attention_output(m, l);
        experts_block(m, l);
    }
    gather(cache.x, a.layers[L - 1].x, cache.last, B, c.C, 1);
    copy_on_device(a.layers[L - 1].x, cache.x, (size_t)B * c.C);
    olmoe_set_batch(m, last_tokens);
    const int parts = cache_set_rows(cache, last_rows);
    attention_norm(m, L - 1);
    decode_layer(m, cache, L - 1, parts);
}
