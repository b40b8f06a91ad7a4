/*
OLMoE in one file of CUDA: the model of "OLMoE: Open Mixture-of-Experts Language Models" (Muennighoff et al. 2024,
arXiv 2409.02060), trained by hand-written forward and backward passes.

Read it from the top: collectives between GPUs; the model in memory as structs of named pointers; each layer's forward
beside its backward, and AdamW; olmoe_forward and olmoe_backward as short lists of calls; then a training run, from
opening its files to its last checkpoint. docs/tour.md follows a token through the model and a step through the program.

Letters, used everywhere:
    N  tokens of a micro-batch          C  channels (hidden size)     E  experts of a layer
    T  tokens of a sequence             H  attention heads            K  experts that each token visits
    B  sequences of a micro-batch       D  C/H, size of a head        F  width of an expert
    L  layers                           V  vocabulary (padded)        R  N*K, rows routed to experts
Matrices are row-major. A linear layer's weight is (out, in) and computes y = x W^T, as in PyTorch. Only gemm, which
knows no tokens, has letters of its own: M, N, K for rows, columns and the length of the sums.

Kernels have two shapes. Elementwise: a thread for each element. Row: a warp for each row, whose lanes take packs of
columns (lib/packs.h) and meet only in warp_sum and its like. So the same text runs fast on a CPU, where a warp has one
lane (cpu/). Only flash attention is made for tensor cores, with tiles in shared memory; attention has a form without,
too. There are no atomics, so that the same inputs give the same bits.
*/
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <variant>
#include <vector>

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_profiler_api.h>
#include <tensor_core.h>

// ------------------------------------------------------------------------------------------------
// Build-time choices

#ifdef PRECISION_BF16
typedef __nv_bfloat16 floatX;               // parameters, gradients, activations; all arithmetic is fp32
constexpr bool BF16 = true;
#else
typedef float floatX;
constexpr bool BF16 = false;
#endif

#ifndef WARP
#define WARP 32                             // lanes of a warp: 32 on a GPU, 1 in the fast CPU build
#endif
#ifndef SEPARATE_ALLOCATIONS
#define SEPARATE_ALLOCATIONS 0              // 1: every tensor in an allocation of its own, so that an overrun is seen
#endif
#ifndef ATTENTION_BLOCK
#define ATTENTION_BLOCK 256                 // queries whose scores exist at the same time
#endif
#ifndef HEAD_ROWS
#define HEAD_ROWS 4096                      // tokens whose logits exist at the same time in training
#endif
#ifndef CUBLAS_WORKSPACE_BYTES
#define CUBLAS_WORKSPACE_BYTES (32 << 20)   // what cuBLAS recommends for Hopper; one for each stream
#endif
#ifndef NCCL_BY_MPI
#define NCCL_BY_MPI 0                       // 1: collectives go through MPI (cpu/), so it has to start the ranks
#endif

constexpr int TOKEN_RUN = 64;               // tokens of the same id whose gradients one warp adds up
constexpr int TILE_ROWS = 128;              // queries, or keys, of a block of flash attention
constexpr int DISPATCH_SLAB = 256;          // assignments to experts that one warp counts and places

#include "lib/cuda.h"           // die, checked calls, streams, memory, copies, warps, random numbers
#include "lib/trace.h"          // LAUNCH of a kernel, and where the program is, for --trace and for messages
#include "lib/packs.h"          // rows in packs of 16 bytes a lane, and sums over rows
#include "lib/tiles.h"          // tiles in shared memory, and their products on tensor cores
#include "tokenizer.h"          // text <-> token ids
#include "dataloader.h"         // token files -> batches, in OLMo's order

// ------------------------------------------------------------------------------------------------
// Many GPUs, one process ("rank") each:
//   data parallel      every rank trains on its own rows of a batch; gradients are summed over the ranks
//   expert parallel    --ep G: G neighbouring ranks share the experts, E/G each, and send one another the rows to
//                      compute. All else is data parallel, and so are the experts over ranks that hold the same ones
//   ZeRO-1             --zero 1: of each tensor a rank keeps AdamW's state for an even share, updates it, and gathers
//                      the others' (Rajbhandari et al. 2020)
// All collectives run in one stream, in the program's order, which is the same on all ranks: where two run at the same
// time, NCCL does not promise that either ends. The main stream goes on meanwhile; events hold back what has to wait.

struct Group { ncclComm_t comm = nullptr; int rank = 0, size = 1; };
static Group world;             // all ranks
static Group expert_group;      // ranks that share the experts, neighbours
static Group replica_group;     // ranks that hold the same experts as this one
static bool shard_optimizer = false;            // ZeRO-1

static cudaEvent_t comm_event, arrival_events[2];
constexpr size_t COMM_BUFFER = 1 << 14;
static double *comm_buffer, *comm_host;         // (COMM_BUFFER) on the device, and pinned: for numbers of the host

// Bytes that this rank gave to collectives since the start, by purpose; docs/scaling.md has the formulas
enum Traffic { GRADIENTS, PARAMETERS, ROWS, COUNTS, SUMS, TRAFFICS };
static double traffic[TRAFFICS];

// Sizes of the groups for n ranks of which this is number `rank`; `olmoe info` plans with it, without communicating.
void layout_set(int rank, int n, int ep, bool zero_1) {
    world.rank = rank; world.size = n;
    expert_group.rank = rank % ep; expert_group.size = ep;
    replica_group.rank = rank / ep; replica_group.size = n / ep;
    shard_optimizer = zero_1 && n > 1;
}

// Later collectives wait for the work that is in the main stream now; main_after_comm is the reverse.
void comm_after_main() {
    cudaCheck(cudaEventRecord(main_stream.event, main_stream.stream));
    cudaCheck(cudaStreamWaitEvent(comm_stream, main_stream.event, 0));
    waited(comm_stream);
}

void main_after_comm() {
    cudaCheck(cudaEventRecord(comm_event, comm_stream));
    cudaCheck(cudaStreamWaitEvent(main_stream.stream, comm_event, 0));
    waited(main_stream.stream);
}

// The calls that `body` makes are one collective, of a layer or, with -1, of none. Messages and the trace use the name.
template <typename Body> void collective(const char* name, int layer, Traffic purpose, size_t bytes, Body body) {
    at_collective(name, layer);
    traffic[purpose] += (double)bytes;
    ncclCheck(ncclGroupStart());
    body();
    ncclCheck(ncclGroupEnd());
    launched(name, comm_stream, layer);
}

// Adds up x, which is on the host, over all ranks; all get the same bits.
void host_sum(std::vector<double>* x) {
    if (world.size == 1) return;
    for (size_t begin = 0; begin < x->size(); begin += COMM_BUFFER) {
        size_t n = std::min(COMM_BUFFER, x->size() - begin);
        double* part = x->data() + begin;
        std::copy_n(part, n, comm_host);
        cudaCheck(cudaMemcpyAsync(comm_buffer, comm_host, n * sizeof(double), cudaMemcpyHostToDevice, comm_stream));
        collective("sum of numbers", -1, SUMS, n * sizeof(double), [&] {
            ncclCheck(ncclAllReduce(comm_buffer, comm_buffer, n, ncclDouble, ncclSum, world.comm, comm_stream));
        });
        cudaCheck(cudaMemcpyAsync(comm_host, comm_buffer, n * sizeof(double), cudaMemcpyDeviceToHost, comm_stream));
        cudaCheck(cudaStreamSynchronize(comm_stream));
        std::copy_n(comm_host, n, part);
    }
}

double host_sum(double x) {
    std::vector<double> v = {x};
    host_sum(&v);
    return v[0];
}

#include "lib/connect.h"        // comm_open and comm_close: the communicators of the groups
#include "lib/exchange.h"       // rows between the ranks that share the experts: a token goes once to each

// ------------------------------------------------------------------------------------------------
// The model's shape and its parameters

struct OlmoeConfig {
    int L = 0;                              // layers                     num_hidden_layers
    int C = 0;                              // channels                   hidden_size
    int H = 0;                              // heads; D = C / H           num_attention_heads
    int V = 0;                              // vocabulary, padded         vocab_size
    int E = 0, K = 0;                       // experts, of each token     num_experts, num_experts_per_tok
    int F = 0;                              // width of an expert         intermediate_size
    int max_T = 4096;                       // longest sequence           max_position_embeddings
    float rope_theta = 10000.f;
    float rms_norm_eps = 1e-5f;
    bool norm_topk_prob = false;            // divide the K weights by their sum; OLMoE does not
    float initializer_range = 0.02f;
    std::vector<int> eos_token_ids = {50279};     // any of them ends a text
    int pad_token_id = 1;                   // -1: none
    std::vector<std::string> frozen;        // groups of tensors that a run does not train; in no file

    // Is attention flash attention, or else blocked?
    bool flash() const { return TENSOR_CORES && BF16 && (C / H == 64 || C / H == 128); }
};

struct LayerParameters {
    floatX* attn_norm;      // (C)
    floatX* qkv;            // (3C, C)  rows of q, k, v
    floatX* q_norm;         // (C)
    floatX* k_norm;         // (C)
    floatX* attn_out;       // (C, C)
    floatX* ffn_norm;       // (C)
    floatX* router;         // (E, C)
    floatX* gate_up;        // (E, 2F, C)  each expert's rows of gate, then of up; with --ep the rank's experts
    floatX* down;           // (E, C, F)   likewise
};
struct Parameters {
    floatX* embed;          // (V, C)
    std::vector<LayerParameters> layers;
    floatX* final_norm;     // (C)
    floatX* lm_head;        // (V, C)
};

// What a tensor is to a token: one row is looked up; a vector scales it; a matrix multiplies it; or so do K of E
// matrices
enum class Kind { lookup, norm, matrix, experts };

struct TensorRow {
    std::variant<floatX* Parameters::*, floatX* LayerParameters::*> where;  // in the model, or in each of its layers
    std::vector<const char*> names; // Hugging Face's, without ".weight"; several are stacked; # is an expert's number
    std::vector<int64_t> shape;     // of each of them, row-major
    Kind kind;
    const char* group;              // under which `olmoe info` counts it, and --freeze names it
};

// The tensors of the model, in their order in memory and in files; those of the layers are together. Whatever is done
// with all tensors follows from this table: a tensor is added by its pointer in the struct and its line here.
std::vector<TensorRow> tensor_table(const OlmoeConfig& c) {
    using M = Parameters; using P = LayerParameters;
    const int64_t V = c.V, C = c.C, E = c.E, F = c.F;
    return {
        {&M::embed,      {"model.embed_tokens"},                                    {V, C}, Kind::lookup,  "embedding"},
        {&P::attn_norm,  {"input_layernorm"},                                       {C},    Kind::norm,    "norms"},
        {&P::qkv,        {"self_attn.q_proj", "self_attn.k_proj",
                          "self_attn.v_proj"},                                      {C, C}, Kind::matrix,  "attention"},
        {&P::q_norm,     {"self_attn.q_norm"},                                      {C},    Kind::norm,    "norms"},
        {&P::k_norm,     {"self_attn.k_norm"},                                      {C},    Kind::norm,    "norms"},
        {&P::attn_out,   {"self_attn.o_proj"},                                      {C, C}, Kind::matrix,  "attention"},
        {&P::ffn_norm,   {"post_attention_layernorm"},                              {C},    Kind::norm,    "norms"},
        {&P::router,     {"mlp.gate"},                                              {E, C}, Kind::matrix,  "router"},
        {&P::gate_up,    {"mlp.experts.#.gate_proj", "mlp.experts.#.up_proj"},      {F, C}, Kind::experts, "experts"},
        {&P::down,       {"mlp.experts.#.down_proj"},                               {C, F}, Kind::experts, "experts"},
        {&M::final_norm, {"model.norm"},                                            {C},    Kind::norm,    "norms"},
        {&M::lm_head,    {"lm_head"},                                               {V, C}, Kind::matrix,  "head"},
    };
}

// A tensor of the model, or of one of its layers, and what this rank holds of it. All parameters have one order, in
// which `base` and `offset` count elements; random numbers and checkpoints depend on it. Of the experts a rank holds
// its part: elements [base + g count, base + (g+1) count) on rank g of an expert group.
struct Tensor : TensorRow {
    int layer;                              // -1: before the layers; L: after them
    size_t base, whole;                     // the first element of all ranks' parts, and their number
    size_t offset, count;                   // this rank's first element, and their number
    size_t share;                           // elements of a rank's even share; the last ranks' may be smaller or empty
    size_t state;                           // where in AdamW's arrays the first element is that this rank updates
    bool frozen;                            // has neither gradient nor state

    bool expert() const { return kind == Kind::experts; }
    const Group& group_of_ranks() const { return expert() ? replica_group : world; }        // the ranks that hold it
    size_t allocated() const { return shard_optimizer ? share * group_of_ranks().size : count; }
    // The elements of a rank's share, [begin, end): its to save and, under ZeRO-1, to update
    size_t begin(int rank) const { return std::min(rank * share, count); }
    size_t end(int rank) const { return std::min((rank + 1) * share, count); }
    // Those that this rank updates
    size_t update_begin() const { return shard_optimizer ? begin(group_of_ranks().rank) : 0; }
    size_t update_count() const {
        return frozen ? 0 : shard_optimizer ? end(group_of_ranks().rank) - update_begin() : count;
    }
    // Its pointer in the parameters or in the gradients
    floatX*& in(Parameters& p) const {
        if (auto once = std::get_if<floatX* Parameters::*>(&where)) return p.**once;
        return p.layers[layer].*std::get<floatX* LayerParameters::*>(where);
    }
    floatX* in(const Parameters& p) const { return in(const_cast<Parameters&>(p)); }
};

std::vector<Tensor> model_tensors(const OlmoeConfig& c) {
    const std::vector<TensorRow> table = tensor_table(c);
    auto in_layer = [](const TensorRow& r) { return std::holds_alternative<floatX* LayerParameters::*>(r.where); };
    auto first = std::find_if(table.begin(), table.end(), in_layer);
    auto last = std::find_if_not(first, table.end(), in_layer);
    std::vector<Tensor> tensors;
    size_t base = 0, state = 0;
    auto add = [&](const TensorRow& row, int layer) {
        const bool frozen = std::count(c.frozen.begin(), c.frozen.end(), row.group) > 0;
        Tensor t = {row, layer, base, row.names.size(), 0, 0, 0, state, frozen};
        for (int64_t n : row.shape) t.whole *= (size_t)n;
        if (t.expert()) t.whole *= c.E;
        t.count = t.expert() ? t.whole / expert_group.size : t.whole;
        t.offset = t.expert() ? base + expert_group.rank * t.count : base;
        t.share = (t.count + t.group_of_ranks().size - 1) / t.group_of_ranks().size;
        base += t.whole;
        state += t.update_count();
        tensors.push_back(t);
    };
    for (auto row = table.begin(); row != first; ++row) add(*row, -1);
    for (int l = 0; l < c.L; l++) for (auto row = first; row != last; ++row) add(*row, l);
    for (auto row = last; row != table.end(); ++row) add(*row, c.L);
    return tensors;
}

// Where the tensors of a layer begin and end in the list; -1 and L: those before and after the layers
std::pair<size_t, size_t> layer_range(const std::vector<Tensor>& tensors, int layer) {
    auto before = [](const Tensor& t, int l) { return t.layer < l; };
    auto first = std::lower_bound(tensors.begin(), tensors.end(), layer, before);
    auto last = std::lower_bound(first, tensors.end(), layer + 1, before);
    return {first - tensors.begin(), last - tensors.begin()};
}

// Elements of AdamW's moments and of the masters on this rank
size_t num_updated(const std::vector<Tensor>& tensors) { return tensors.back().state + tensors.back().update_count(); }

// ------------------------------------------------------------------------------------------------
// A micro-batch: sequences of any lengths, one after another. Rows of equal length are the special case of pretraining.
// Nothing is ever computed for padding: there is none.

struct MicroBatch {
    std::vector<int> starts = {0};          // (B+1) first token of each sequence, then N
    std::vector<int> inputs;                // (N) token ids
    std::vector<int> targets;               // (N) the token to predict at each position, or IGNORED
    std::vector<double> weights;            // (N) the factor of its -log p in the loss, as 1 / number of tokens
    std::vector<int> positions;             // (N) of a token in its sequence, for RoPE
    double world_N = 0;                     // of all ranks' micro-batches; 0: N of each

    int B() const { return (int)starts.size() - 1; }
    int N() const { return starts.back(); }
    int begin(int sequence) const { return starts[sequence]; }
    int length(int sequence) const { return starts[sequence + 1] - starts[sequence]; }
};
constexpr int IGNORED = -100;               // a target that does not count, as PyTorch's ignore_index

// Adds a sequence of T tokens, the first of them at `position`. Null targets are all IGNORED.
void batch_add(MicroBatch* b, const int* inputs, const int* targets, int T, double weight = 0, int position = 0) {
    b->starts.push_back(b->N() + T);
    b->inputs.insert(b->inputs.end(), inputs, inputs + T);
    if (targets) b->targets.insert(b->targets.end(), targets, targets + T);
    b->targets.resize(b->N(), IGNORED);
    b->weights.resize(b->N(), weight);
    for (int t = 0; t < T; t++) b->positions.push_back(position + t);
}

// B rows of T tokens
MicroBatch batch_of_rows(const int* inputs, const int* targets, int B, int T, double weight = 0) {
    MicroBatch batch;
    for (size_t row = 0; row < (size_t)B * T; row += T)
        batch_add(&batch, inputs + row, targets ? targets + row : nullptr, T, weight);
    return batch;
}

// The rows of one block of flash attention: TILE_ROWS of a sequence, or less at its end, from its token `row` on. The
// sequence has T tokens from `first` on.
struct alignas(16) AttentionTile { int first, T, row, unused; };

int num_attention_tiles(const MicroBatch& batch) {
    int n = 0;
    for (int b = 0; b < batch.B(); b++) n += ceil_div(batch.length(b), TILE_ROWS);
    return n;
}

// A micro-batch's tiles by queries, then the same by keys, each those with the most work first: the blocks that begin
// last should be short.
std::vector<AttentionTile> attention_tiles(const MicroBatch& batch) {
    std::vector<AttentionTile> queries;
    for (int b = 0; b < batch.B(); b++)
        for (int T = batch.length(b), row = 0; row < T; row += TILE_ROWS)
            queries.push_back({batch.begin(b), T, row, 0});
    std::vector<AttentionTile> keys = queries;
    auto sort = [](std::vector<AttentionTile>& tiles, int (*work)(const AttentionTile&)) {
        std::stable_sort(tiles.begin(), tiles.end(), [&](auto& a, auto& b) { return work(a) > work(b); });
    };
    sort(queries, [](const AttentionTile& t) { return std::min(t.T, t.row + TILE_ROWS); });     // keys that they see
    sort(keys, [](const AttentionTile& t) { return t.T - t.row; });                             // queries that see them
    queries.insert(queries.end(), keys.begin(), keys.end());
    return queries;
}

// ------------------------------------------------------------------------------------------------
// Activations

// What backward needs of a layer. Marked 1 or 2: at that --recompute level or above, one buffer for all layers, and
// computed again.
struct LayerActivations {
    floatX* x;              // (N, C)      residual stream at the layer's input
    floatX* attn_in;        // (N, C)    1 rmsnorm(x)
    float* attn_r;          // (N)         its 1/rms
    floatX* qkv;            // (N, 3C)   2 projections, before norm and rotation
    float* qk_r;            // (N, 2)      1/rms of q and k
    floatX* qk;             // (N, 2C)   1 q and k after norm and rotation
    float* attn_lse;        // (N, H)      of each sequence (H, T)
    floatX* attn;           // (N, C)    2 attention's output, heads side by side
    floatX* x_mid;          // (N, C)    2 residual stream after attention
    floatX* ffn_in;         // (N, C)    1 rmsnorm(x_mid)
    float* ffn_r;           // (N)         its 1/rms
    float* router_logits;   // (N, E)    2
    float* router_probs;    // (N, E)    2
    float* router_lse;      // (N)         one array for all layers: the host reads it
    float* router_sums;     // (E)         sums of router_probs over the tokens; likewise
    int* experts;           // (N, K)      ids, by probability; likewise
    float* weights;         // (N, K)      their probabilities; with norm_topk_prob over their sum
    int* counts;            // (E)         rows of each expert; likewise
    int* row_of;            // (R)         row of an assignment; with --ep of the visit that it leads, or -1
    int* assignment_of;     // (R)         assignment of a row; with --ep (V), that leads a visit
    int* here_row_of;       // (A, K)      with --ep, of the A visits that arrive: row of an expert here, or -1
    int* here_assignment_of;// (R)         with --ep, assignment (of A K) of a row here; else assignment_of
    float* here_weights;    // (A, K)      with --ep, of the visits that arrive; else weights
    floatX* expert_in;      // (R, C)    1 rows of ffn_in by expert. With --ep, R here and below is rows of all ranks
    floatX* gate_up;        // (R, 2F)   2
};

struct Activations {
    int* inputs;            // (N) token ids
    int* targets;           // (N) or IGNORED
    float* target_weights;  // (N)
    int* positions;         // (N)
    std::vector<LayerActivations> layers;
    floatX* x;              // (N, C) residual stream after the last layer
    float* final_r;         // (N)    1/rms of it
    floatX* final_out;      // (classified, C) rmsnorm of it, of a chunk of the tokens, see Capacity
    floatX* logits;         // (classified, V) likewise
    floatX* dlogits;        // (classified, V) in the place of the logits
    float* losses;          // (N) -log p(target), not weighted
};

// Neighbours of Scratch::sorted_tokens that have the same id. line: of the sums of an id's several runs; -1: it has one
struct alignas(16) TokenRun { int id, begin, end, line; };

// What all layers share. A buffer that serves twice has a name for each use; the second use ends the first.
struct Scratch {
    float* cosine;          // (positions, D/2) RoPE's tables, see Capacity
    float* sine;            // (positions, D/2)
    float* scores;          // (H, ATTENTION_BLOCK, T)  of blocked attention
    floatX* probs;          // (H, ATTENTION_BLOCK, T)  likewise
    AttentionTile* tiles;   // (2, tiles)  of flash attention, by queries and by keys; there is room for N tiles
    float* router_partial;  // (SLABS, E)  sums of router_probs over slabs of tokens
    int* histogram;         // (ceil(R / DISPATCH_SLAB), E)
    floatX* h;              // (R, F)  silu(gate) up
    floatX* weighted_h;     // (R, F)  in the place of h: times the router's weight, in backward
    floatX* expert_out;     // (R, C)
    floatX* dexpert_in;     // (R, C)  in the place of expert_out
    int* global_counts;     // (L, E)  with --lb global: rows of each expert over all ranks
    // of backward
    float* dhead;           // (V, C)  sum of chunks' gradients of lm_head, in BF16; null: dexpert_out has room for it
    int* sorted_tokens;     // (N) the tokens of the micro-batch sorted by id, ...
    TokenRun* runs;         // (N) ... and divided into so many runs or fewer
    floatX* dx;             // (N, C)  gradient of the residual stream, all the way down
    floatX* dbranch;        // (N, C)  gradient inside a branch
    floatX* dattn;          // (N, C)
    float* dqkv32;          // (N, 3C)  of blocked attention
    float* dprobs;          // (H, ATTENTION_BLOCK, T)  likewise
    floatX* dscores;        // (H, ATTENTION_BLOCK, T)  likewise
    float2* attn_terms;     // (N, H)  likewise: log2(e) lse and delta, of each sequence (H, T)
    floatX* dqkv;           // (N, 3C)
    floatX* drouter;        // (N, E)  gradient of the router's logits
    float* drouter_probs;   // (N, E)
    float* dweights;        // (N, K)
    floatX* dexpert_out;    // (R, C)
    floatX* dh;             // (R, F)
    floatX* dgate_up;       // (R, 2F)
    float* partial;         // (2, slabs, C), or the lines of TokenRun, which are 2N / TOKEN_RUN at most
    float* square_sums;     // one for each run of SQUARE_SUM_RUN gradients
    // of expert parallelism
    int* visits;            // (R)        the rank and kind of the visit that an assignment leads, or -1
    int* visit_counts;      // (G, kinds) RowCounts::visits_sent, on the device
    int* arrivals;          // (G, E/G), (G, kinds)  RowCounts::arrived and visits_arrived, on the device
    floatX* home_rows;      // (V, C)     rows of this rank's tokens, on their way to the experts or back
    floatX* dhome_rows;     // (V, C)     their gradients, in the place of the rows
    int* home_experts;      // (V, K)     of the visits' tokens
    float* home_weights;    // (V, K)
    float* home_dweights;   // (V, K)     in the place of home_weights; of experts elsewhere, not set
    floatX* arrived_rows;   // (A, C)     rows of the visits here, in whose place the experts' sums leave
    int* arrived_experts;   // (A, K)
    float* arrived_dweights;// (A, K)     as home_dweights
    int* here_counts;       // (E/G)      rows of each expert here
    int* here_histogram;    // (ceil(A K / DISPATCH_SLAB), E/G)
};

// ------------------------------------------------------------------------------------------------
// Matrix multiplication, by cuBLAS

// out (M, N) = alpha op(a) op(b) + beta out, row-major with row lengths ld*, for each of `batch` matrices that are
// stride_* elements apart. op(a) is (M, K) and op(b) is (K, N). cuBLAS is column-major and so computes out^T = op(b)^T
// op(a)^T, which in memory is the same.
template <typename Out>
void gemm(const Stream& s, Out* out, int ldo, const floatX* a, int lda, bool transpose_a, const floatX* b, int ldb,
          bool transpose_b, int M, int N, int K, float alpha, float beta,
          int batch = 1, size_t stride_o = 0, size_t stride_a = 0, size_t stride_b = 0) {
    if (M == 0 || N == 0) return;
    cublasOperation_t op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cudaDataType type = cuda_type(a), out_type = cuda_type(out);
    if (batch == 1)
        cublasCheck(cublasGemmEx(s.cublas, op_b, op_a, N, M, K, &alpha, b, type, ldb, a, type, lda, &beta,
                                 out, out_type, ldo, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    else
        cublasCheck(cublasGemmStridedBatchedEx(s.cublas, op_b, op_a, N, M, K, &alpha, b, type, ldb, (long long)stride_b,
                                               a, type, lda, (long long)stride_a, &beta, out, out_type, ldo,
                                               (long long)stride_o, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    launched("matmul", s.stream);
    if (!launch_checks.finite) return;
    cudaCheck(cudaStreamSynchronize(s.stream));
    for (int i = 0; i < batch; i++)
        check_finite("matmul", "its output", out + i * stride_o, (size_t)(M - 1) * ldo + N);
}

// y (N, O) = x (N, I) W^T, with W (O, I); added to y where beta is 1
template <typename Out>
void matmul_forward(const Stream& s, Out* y, const floatX* x, const floatX* w, int N, int I, int O, float beta = 0) {
    gemm(s, y, O, x, I, false, w, I, true, N, O, I, 1, beta);
}

// dx (N, I) = dy (N, O) W; added to dx where beta is 1
void matmul_backward_input(const Stream& s, floatX* dx, const floatX* dy, const floatX* w, int N, int I, int O,
                           float beta = 0) {
    gemm(s, dx, I, dy, O, false, w, I, false, N, I, O, 1, beta);
}

// dW (O, I) = dy^T x, or dW += dy^T x with `add`, as for all gradients of parameters: after a step's first micro-batch.
// Null, as all of them: a frozen tensor has no gradient.
template <typename T>
void matmul_backward_weight(const Stream& s, T* dw, const floatX* dy, const floatX* x, int N, int I, int O, bool add) {
    if (dw) gemm(s, dw, I, dy, O, true, x, I, false, O, I, N, 1, add ? 1.f : 0.f);
}

// ------------------------------------------------------------------------------------------------
// Token embedding:   x_t = W[id_t]

// One warp per token.
template <int P>
__global__ void embedding_forward_kernel(Out<floatX> x, In<int> ids, In<floatX> w, int N, int C) {
    size_t row = thread_index() / WARP;
    if (row >= (size_t)N) return;
    copy_row<P>(x + row * C, w + (size_t)ids[row] * C, C);
}

// dW[id] += sum of dx_t over the tokens t with this id. The host has sorted the tokens by id and divided those of an id
// into runs (index_tokens below). One warp adds the rows of a run, in the order of their positions: to dW or, where its
// id has several runs, into a line of sums, so that no warp has thousands of rows.
template <int P>
__global__ void embedding_backward_kernel(Out<floatX> dw, Out<float> lines, In<floatX> dx, In<TokenRun> runs,
                                          In<int> tokens, int n, int C) {
    const size_t warp = thread_index() / WARP;
    if (warp >= (size_t)n) return;
    const TokenRun run = runs[warp];
    for_chunks<P>(C, [&](auto columns) {
        Floats<P> sum[columns.K];
        columns.kept([&](auto at) { sum[at.k] = {}; });
        for (int j = run.begin; j < run.end; j++) {
            const Row row(dx + (size_t)tokens[j] * C, columns);
            columns.kept([&](auto at) { sum[at.k] = sum[at.k] + row[at]; });
        }
        columns.kept([&](auto at) {
            floatX* to = dw + (size_t)run.id * C + at.column;
            if (run.line < 0) store_pack(to, load_floats<P>(to) + sum[at.k]);
            else store_pack(lines + (size_t)run.line * C + at.column, sum[at.k]);
        });
    });
}

void embedding_forward(floatX* x /* (N, C) */, const int* ids /* (N) */, const floatX* w /* (V, C) */, int N, int C) {
    LAUNCH_PACKS(embedding_forward_kernel, C % PACK == 0, blocks_for_rows(N), x, ids, w, N, C);
}

// runs: s.runs, on the host
void embedding_backward(floatX* dw /* (V, C) += */, const Scratch& s, const std::vector<TokenRun>& runs, int C) {
    const int n = (int)runs.size();
    if (!dw) return;
    LAUNCH_PACKS(embedding_backward_kernel, C % PACK == 0, blocks_for_rows(n), dw, s.partial, s.dx, s.runs,
                 s.sorted_tokens, n, C);
    for (int i = 0, of_id; i < n; i += of_id) {
        for (of_id = 1; i + of_id < n && runs[i + of_id].id == runs[i].id; of_id++) {}
        if (of_id > 1) sum_slabs(dw + (size_t)runs[i].id * C, s.partial + (size_t)runs[i].line * C, C, of_id, true);
    }
}

// ------------------------------------------------------------------------------------------------
// RMSNorm (Zhang & Sennrich 2019):   y_i = w_i x_i r,   r = 1 / sqrt(mean_j x_j^2 + eps)
// Before attention, before the experts, and at the end.

// y and r of a row x, for its warp, from the sum of the lane's x^2
template <typename T, typename Columns>
__device__ inline void rmsnorm_row(floatX* y, float* r, const Row<T, Columns>& x, const floatX* w, float square,
                                   const Columns& columns, float eps) {
    const Row weight(w, columns);
    const float scale = 1 / sqrtf(warp_sum(square) / columns.n + eps);
    columns.all([&](auto at) {                                  // rounded before w, as OLMo does
        store_pack(y + at.column, in_floatX(x[at] * scale) * weight[at]);
    });
    if (threadIdx.x % WARP == 0) *r = scale;                    // kept for backward
}

// One warp per row. Reads x, writes y: 2 floatX an element.
template <int P>
__global__ void rmsnorm_forward_kernel(Out<floatX> y, Out<float> r, In<floatX> x, In<floatX> w, int N, int C,
                                       float eps) {
    const size_t row = thread_index() / WARP;
    if (row >= (size_t)N) return;
    const Columns<P> columns{C};
    const Row in(x + row * C, columns);
    float square = 0;
    columns.all([&](auto at) { square += (in[at] * in[at]).sum(); });
    rmsnorm_row(y + row * C, r + row, in, w, square, columns, eps);
}

// The end of a block of the residual stream, and the norm at the next one's start:   out = x + y,   y <- rmsnorm(out)
// y is the block's output, rounded. One warp per row: 4 floatX an element.
template <int P>
__global__ void add_rmsnorm_forward_kernel(Out<floatX> out, floatX* y, Out<float> r, In<floatX> x, In<floatX> w, int N,
                                           int C, float eps) {
    const size_t row = thread_index() / WARP;
    if (row >= (size_t)N) return;
    const Columns<P> columns{C};
    const Row in(x + row * C, columns);
    const Row branch(y + row * C, columns);
    Row<floatX, Columns<P>> sum(out + row * C);
    float square = 0;
    columns.all([&](auto at) {
        const Floats<P> rounded_sum = sum.set(at, in[at] + branch[at]);
        square += (rounded_sum * rounded_sum).sum();
    });
    rmsnorm_row(y + row * C, r + row, sum, w, square, columns, eps);
}

// With g_i = dy_i w_i:   dx_i = r (g_i - x_i r^2 mean_j g_j x_j)
//                        term 1: through the numerator; term 2: through r, which every x_j moves
//                        dw_i = sum over rows of dy_i x_i r
// One warp per slab of rows. Accumulates into dx, because the residual stream's own gradient is already there: 4 floatX
// an element, and a line of sums of dw a slab.
template <int P>
__global__ void rmsnorm_backward_kernel(Out<floatX> dx, Out<float> partial, In<floatX> dy, In<floatX> x, In<floatX> w,
                                        In<float> r, int N, int C, int slabs) {
    const size_t slab = thread_index() / WARP;
    if (slab >= (size_t)slabs) return;
    const Columns<P> columns{C};
    LineOfSums dw(partial + slab * C, columns);
    for (size_t row = N * slab / slabs; row < N * (slab + 1) / slabs; row++) {
        const Row in(x + row * C, columns), g(dy + row * C, columns);
        float dot = 0, scale = r[row];
        columns.all([&](auto at) { dot += (g[at] * load_floats<P>(w + at.column) * in[at]).sum(); });
        const float term2 = warp_sum(dot) / C * scale * scale;
        columns.all([&](auto at) {
            const Floats<P> branch = (g[at] * load_floats<P>(w + at.column) - in[at] * term2) * scale;
            store_pack(dx + row * C + at.column, load_floats<P>(dx + row * C + at.column) + branch);
            dw.add(at, g[at] * in[at] * scale);
        });
    }
    dw.store(columns);
}

void rmsnorm_forward(floatX* y /* (N, C) */, float* r /* (N) */, const floatX* x /* (N, C) */,
                     const floatX* w /* (C) */, int N, int C, float eps) {
    LAUNCH_PACKS(rmsnorm_forward_kernel, C % PACK == 0, blocks_for_rows(N), y, r, x, w, N, C, eps);
}

void add_rmsnorm_forward(floatX* out /* (N, C) */, floatX* y /* (N, C) */, float* r /* (N) */,
                         const floatX* x /* (N, C) */, const floatX* w /* (C) */, int N, int C, float eps) {
    LAUNCH_PACKS(add_rmsnorm_forward_kernel, C % PACK == 0, blocks_for_rows(N), out, y, r, x, w, N, C, eps);
}

void rmsnorm_backward(floatX* dx /* (N, C) += */, floatX* dw /* (C) */, bool add, float* partial /* (SLABS, C) */,
                      const floatX* dy, const floatX* x, const floatX* w, const float* r, int N, int C) {
    const int slabs = slabs_for(N);
    LAUNCH_PACKS(rmsnorm_backward_kernel, C % PACK == 0, blocks_for_rows(slabs), dx, partial, dy, x, w, r, N, C,
                 slabs);
    sum_slabs(dw, partial, C, slabs, add);
}

// ------------------------------------------------------------------------------------------------
// QK-norm and RoPE.  q and k are normalised over the whole projection, all heads together (Dehghani et al. 2023; OLMoE
// §4.2.5), and then rotated in pairs (j, j + D/2) of each head by the angle  t theta^(-2j/D)  at position t of the
// sequence (Su et al. 2021). Statistics, tables and rotation are fp32; results are rounded where OLMo rounds: after r,
// after w, after the rotation.

// One warp per token. qk (N, 2C) receives q and k; v stays where the projection left it.
template <int P>
__global__ void qk_norm_rope_forward_kernel(Out<floatX> qk, Out<float> r, In<floatX> qkv, In<floatX> q_norm,
                                            In<floatX> k_norm, In<float> cosine, In<float> sine, In<int> positions,
                                            int N, int C, int D, float eps) {
    const size_t row = thread_index() / WARP;
    if (row >= (size_t)N) return;
    const int half = D / 2;
    const Pairs<P> pairs{C / 2, 0, half};
    cosine += (size_t)positions[row] * half; sine += (size_t)positions[row] * half;

    for (int part = 0; part < 2; part++) {                      // q, then k
        const floatX *x = qkv + (row * 3 + part) * C, *w = part ? k_norm : q_norm;
        floatX* y = qk + (row * 2 + part) * C;
        const Row x_a(x, pairs), x_b(x + half, pairs), w_a(w, pairs), w_b(w + half, pairs);
        float square = 0;
        pairs.all([&](auto at) { square += (x_a[at] * x_a[at] + x_b[at] * x_b[at]).sum(); });
        const float scale = 1 / sqrtf(warp_sum(square) / C + eps);
        pairs.all([&](auto at) {
            const Floats<P> a = in_floatX(in_floatX(x_a[at] * scale) * w_a[at]);
            const Floats<P> b = in_floatX(in_floatX(x_b[at] * scale) * w_b[at]);
            const Floats<P> cos_t = load_floats<P>(cosine + at.j), sin_t = load_floats<P>(sine + at.j);
            store_pack(y + at.column, a * cos_t - b * sin_t);
            store_pack(y + at.column + half, b * cos_t + a * sin_t);
        });
        if (threadIdx.x % WARP == 0) r[row * 2 + part] = scale;
    }
}

// The rotation's transpose is the rotation by the opposite angle, after which the gradients are rounded to T; after it
// comes RMSNorm's backward over the whole projection. One warp per slab of tokens and part, q or k; where the gradients
// (N, 3C) are not dqkv (N, 3C) itself, a third part is v, which is copied. Lines of partial: those of q, then of k.
template <int P, typename T>
__global__ void qk_norm_rope_backward_kernel(floatX* dqkv, Out<float> partial, T* gradients, In<floatX> qkv,
                                             In<float> r, In<floatX> q_norm, In<floatX> k_norm, In<float> cosine,
                                             In<float> sine, In<int> positions, int N, int C, int D, int slabs,
                                             int parts) {
    const size_t slab = thread_index() / WARP / parts, part = thread_index() / WARP % parts;
    if (slab >= (size_t)slabs) return;
    const size_t begin = N * slab / slabs, end = N * (slab + 1) / slabs;
    if (part == 2) {
        for (size_t row = 3 * begin + 2; row < 3 * end; row += 3) copy_row<P>(dqkv + row * C, gradients + row * C, C);
        return;
    }
    const int half = D / 2;
    const Pairs<P> pairs{C / 2, 0, half};
    const floatX* w = part ? k_norm : q_norm;
    float* line = partial + (part * slabs + slab) * C;
    LineOfSums dw_a(line, pairs), dw_b(line + half, pairs);
    for (size_t row = begin; row < end; row++) {
        const size_t first = (row * 3 + part) * C;
        const float *cos_t = cosine + (size_t)positions[row] * half, *sin_t = sine + (size_t)positions[row] * half;
        const Row x_a(qkv + first, pairs), x_b(qkv + first + half, pairs);
        Row g_a(gradients + first, pairs), g_b(gradients + first + half, pairs);
        float dot = 0, scale = r[row * 2 + part];
        pairs.all([&](auto at) {
            const Floats<P> a = g_a[at], b = g_b[at];
            const Floats<P> c = load_floats<P>(cos_t + at.j), s = load_floats<P>(sin_t + at.j);
            const Floats<P> w_a = load_floats<P>(w + at.column), w_b = load_floats<P>(w + at.column + half);
            dot += (g_a.keep(at, a * c + b * s) * w_a * x_a[at]).sum();
            dot += (g_b.keep(at, b * c - a * s) * w_b * x_b[at]).sum();
        });
        const float term2 = warp_sum(dot) / C * scale * scale;
        pairs.all([&](auto at) {
            const Floats<P> a = g_a[at], b = g_b[at];
            const Floats<P> w_a = load_floats<P>(w + at.column), w_b = load_floats<P>(w + at.column + half);
            store_pack(dqkv + first + at.column, (a * w_a - x_a[at] * term2) * scale);
            store_pack(dqkv + first + at.column + half, (b * w_b - x_b[at] * term2) * scale);
            dw_a.add(at, a * x_a[at] * scale);
            dw_b.add(at, b * x_b[at] * scale);
        });
    }
    dw_a.store(pairs);
    dw_b.store(pairs);
}

// qk and qk_r from qkv
void qk_norm_rope_forward(LayerActivations& a, const LayerParameters& p, const Scratch& s,
                          const int* positions /* (N) */, int N, const OlmoeConfig& c) {
    const int half = c.C / c.H / 2;
    LAUNCH_PACKS(qk_norm_rope_forward_kernel, half % PACK == 0, blocks_for_rows(N), a.qk, a.qk_r, a.qkv, p.q_norm,
                 p.k_norm, s.cosine, s.sine, positions, N, c.C, 2 * half, c.rms_norm_eps);
}

// dqkv, and into the norms' gradients, from the gradients of q, k and v: dqkv32, which changes, or dqkv itself
template <typename T>
void qk_norm_rope_backward(Scratch& s, T* gradients /* (N, 3C) */, LayerParameters& g, bool add,
                           const LayerActivations& a, const LayerParameters& p, const int* positions /* (N) */, int N,
                           const OlmoeConfig& c) {
    const int C = c.C, half = C / c.H / 2, slabs = slabs_for(N), parts = (void*)gradients == s.dqkv ? 2 : 3;
    LAUNCH_PACKS(qk_norm_rope_backward_kernel, half % PACK == 0, blocks_for_rows(slabs * parts), s.dqkv, s.partial,
                 gradients, a.qkv, a.qk_r, p.q_norm, p.k_norm, s.cosine, s.sine, positions, N, C, 2 * half, slabs,
                 parts);
    sum_slabs(g.q_norm, s.partial, C, slabs, add);
    sum_slabs(g.k_norm, s.partial + (size_t)slabs * C, C, slabs, add);
}

void qk_norm_rope_backward(Scratch& s, LayerParameters& g, bool add, const LayerActivations& a,
                           const LayerParameters& p, const int* positions /* (N) */, int N, const OlmoeConfig& c) {
    if (c.flash()) qk_norm_rope_backward<floatX>(s, s.dqkv, g, add, a, p, positions, N, c);
    else qk_norm_rope_backward<float>(s, s.dqkv32, g, add, a, p, positions, N, c);
}

// ------------------------------------------------------------------------------------------------
// Causal attention of each sequence:   S = q k^T / sqrt(D),   P_ij = exp(S_ij - lse_i) for j <= i, else 0,   o = P v
// In blocks of ATTENTION_BLOCK queries against all keys up to the block's end: no T x T matrix ever exists, and the
// causal half of the work is left out, except in the blocks on the diagonal. lse is kept, the rest is recomputed by
// backward.

// One warp per query row i of a head: scores (H, n, S) of the queries t0 .. t0+n-1, keys 0 .. S-1.
__global__ void attention_softmax_forward_kernel(floatX* probs, float* lse, const float* scores, int H, int n, int S,
                                                 int t0, int T) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)H * n) return;
    int head = (int)(row / n), t = t0 + (int)(row % n);
    scores += row * S; probs += row * S;

    float max = -INFINITY, sum = 0;
    for (int j = lane; j <= t; j += WARP) max = fmaxf(max, scores[j]);
    max = warp_max(max);
    for (int j = lane; j <= t; j += WARP) sum += expf(scores[j] - max);
    float total = max + logf(warp_sum(sum));
    for (int j = lane; j <= t; j += WARP) probs[j] = (floatX)expf(scores[j] - total);
    for (int j = t + 1 + lane; j < S; j += WARP) probs[j] = (floatX)0.f;
    if (lane == 0) lse[(size_t)head * T + t] = total;
}

// dS_ij = P_ij (dP_ij - delta_i) / sqrt(D),   delta_i = sum_j P_ij dP_ij    (the factor is in the matmuls that read dS)
// One warp per query row. Recomputes P. Only dv takes it rounded to floatX, because forward multiplied v by that.
__global__ void attention_softmax_backward_kernel(floatX* probs, floatX* dscores, const float* dprobs,
                                                  const float* scores, const float* lse, int H, int n, int S, int t0,
                                                  int T) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)H * n) return;
    int head = (int)(row / n), t = t0 + (int)(row % n);
    scores += row * S; probs += row * S; dprobs += row * S; dscores += row * S;

    float total = lse[(size_t)head * T + t], delta = 0;
    for (int j = lane; j <= t; j += WARP) {
        float p = expf(scores[j] - total);
        probs[j] = (floatX)p;
        delta += p * dprobs[j];
    }
    delta = warp_sum(delta);
    for (int j = lane; j <= t; j += WARP)
        dscores[j] = (floatX)((BF16 ? expf(scores[j] - total) : (float)probs[j]) * (dprobs[j] - delta));
    for (int j = t + 1 + lane; j < S; j += WARP) { probs[j] = (floatX)0.f; dscores[j] = (floatX)0.f; }
}

// attn and attn_lse from qk and, for v, qkv
void blocked_attention_forward(LayerActivations& a, Scratch& s, const MicroBatch& batch, const OlmoeConfig& c) {
    const int C = c.C, H = c.H, D = C / H;
    const float scale = 1 / sqrtf((float)D);
    for (int b = 0; b < batch.B(); b++) {
        const size_t first = batch.begin(b);
        const int T = batch.length(b);
        const floatX *k = a.qk + first * 2 * C + C, *v = a.qkv + first * 3 * C + 2 * C;
        float* lse = a.attn_lse + first * H;                    // (H, T)
        for (int t0 = 0; t0 < T; t0 += ATTENTION_BLOCK) {
            int n = std::min(ATTENTION_BLOCK, T - t0), S = t0 + n;
            size_t square = (size_t)n * S;
            const floatX* q = a.qk + (first + t0) * 2 * C;
            gemm(main_stream, s.scores, S, q, 2 * C, false, k, 2 * C, true, n, S, D, scale, 0, H, square, D, D);
            LAUNCH(attention_softmax_forward_kernel, blocks_for_rows((size_t)H * n), s.probs, lse, s.scores, H, n, S,
                   t0, T);
            floatX* out = a.attn + (first + t0) * C;
            gemm(main_stream, out, C, s.probs, S, false, v, 3 * C, false, n, D, S, 1, 0, H, D, square, D);
        }
    }
}

// dqkv32 from dattn:   dv = P^T do,   dP = do v^T,   dq = dS k,   dk = dS^T q. A sequence's last block covers all keys
// and comes first, so that it sets dk and dv, and the others add to them, in fp32.
void blocked_attention_backward(Scratch& s, const LayerActivations& a, const MicroBatch& batch, const OlmoeConfig& c) {
    const int C = c.C, H = c.H, D = C / H;
    const float scale = 1 / sqrtf((float)D);
    for (int b = 0; b < batch.B(); b++) {
        const size_t first = batch.begin(b);
        const int T = batch.length(b);
        const floatX *k = a.qk + first * 2 * C + C, *v = a.qkv + first * 3 * C + 2 * C;
        const float* lse = a.attn_lse + first * H;
        float *dk = s.dqkv32 + first * 3 * C + C, *dv = dk + C;
        for (int t0 = (T - 1) / ATTENTION_BLOCK * ATTENTION_BLOCK; t0 >= 0; t0 -= ATTENTION_BLOCK) {
            int n = std::min(ATTENTION_BLOCK, T - t0), S = t0 + n;
            size_t square = (size_t)n * S;
            float add = S == T ? 0.f : 1.f;
            const floatX *q = a.qk + (first + t0) * 2 * C, *dO = s.dattn + (first + t0) * C;
            float* dq = s.dqkv32 + (first + t0) * 3 * C;
            gemm(main_stream, s.scores, S, q, 2 * C, false, k, 2 * C, true, n, S, D, scale, 0, H, square, D, D);
            gemm(main_stream, s.dprobs, S, dO, C, false, v, 3 * C, true, n, S, D, 1, 0, H, square, D, D);
            LAUNCH(attention_softmax_backward_kernel, blocks_for_rows((size_t)H * n), s.probs, s.dscores, s.dprobs,
                   s.scores, lse, H, n, S, t0, T);
            gemm(main_stream, dv, 3 * C, s.probs, S, true, dO, C, false, S, D, n, 1, add, H, D, square, D);
            gemm(main_stream, dq, 3 * C, s.dscores, S, false, k, 2 * C, false, n, D, S, scale, 0, H, D, square, D);
            gemm(main_stream, dk, 3 * C, s.dscores, S, true, q, 2 * C, false, S, D, n, scale, add, H, D, square, D);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Flash attention (FlashAttention-2, Dao 2023): the same on tensor cores, in bf16, for heads of 64 or 128 columns. S,
// P, dP and dS exist a tile at a time, and never in global memory. A block has 128 queries, or keys, of one head, and
// goes over tiles of the keys, or of the queries that see them. Each output is written once, by one block, so that the
// same inputs give the same bits. Backward therefore has one kernel for dq and one for dk and dv, which both compute P
// and dS: 7 products of tiles, where 5 would do if blocks added to the same dq.

[[maybe_unused]] constexpr float LOG2E = 1.44269504f;       // exp(x) is a power of 2 below: 2^(x log2 e)

// What the kernels work on
struct FlashArguments {
    const AttentionTile* tiles;             // of blockIdx.x; blockIdx.y is the head
    const floatX *qk, *qkv, *dO;            // (N, 2C), (N, 3C), of which only v is read, and (N, C)
    floatX *o, *dqkv;                       // (N, C), (N, 3C)
    float* lse;                             // of each sequence (H, T)
    float2* terms;                          // likewise: log2(e) lse and delta
    int H;
};

// Where in these the block's sequence and head begin. Kernels build it again where they can, because in their loops all
// registers are taken: what is kept there, spills.
template <int D> struct FlashHead {
    size_t q, k, v, o, lse;                 // in qk, in qk, in qkv and dqkv, in o and dO, in lse and terms
    int T, row, C;                          // row: of the sequence, where the block's tile begins

    __device__ explicit FlashHead(const FlashArguments& f) {
        const int4 tile = *(const int4*)(f.tiles + blockIdx.x);
        const size_t first = tile.x, column = (size_t)blockIdx.y * D;
        T = tile.y; row = tile.z; C = f.H * D;
        q = first * 2 * C + column; k = q + C; v = first * 3 * C + 2 * C + column; o = first * C + column;
        lse = first * f.H + (size_t)blockIdx.y * T;
    }
};

// Online softmax (Milakov & Gimelshein 2018; FlashAttention-2, algorithm 1), for the scores S of the next keys:
//     m' = max(m, rowmax S),   P = exp(S - m'),   l' = exp(m - m') l + rowsum P,   O' = exp(m - m') O
// S comes undivided by sqrt(D), and so does m: scale = log2(e) / sqrt(D). P takes the place of S. Four lanes share a
// row; each keeps the part of l that is of its columns.
template <int M, int N, int O>
__device__ inline void online_softmax(float (&s)[M][N][4], float (&o)[M][O][4], float (&m)[M][2], float (&l)[M][2],
                                      float scale) {
    UNROLL for (int i = 0; i < 2 * M; i++) {
        const int r = i / 2, e = i % 2 * 2;                     // the lane's row i: elements e and e + 1 of s[r], o[r]
        float best = m[r][i % 2], sum = 0;
        UNROLL for (int n = 0; n < N; n++) best = fmaxf(best, fmaxf(s[r][n][e], s[r][n][e + 1]));
        best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 2));
        const float shrink = fast_exp2((m[r][i % 2] - best) * scale), base = best * scale;
        UNROLL for (int n = 0; n < 2 * N; n++) {
            float& x = s[r][n / 2][e + n % 2];
            x = fast_exp2(fmaf(x, scale, -base));
            sum += x;
        }
        UNROLL for (int n = 0; n < 2 * O; n++) o[r][n / 2][e + n % 2] *= shrink;
        m[r][i % 2] = best;
        l[r][i % 2] = l[r][i % 2] * shrink + sum;
    }
}

// Scores of keys after their query become -infinity. `query` and `key`: of the first row and column.
template <int M, int N> __device__ inline void mask_scores(float (&s)[M][N][4], int query, int key) {
    query += threadIdx.x % 32 / 4; key += threadIdx.x % 4 * 2;
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int e = 0; e < 4; e++)
                if (key + n * 8 + e % 2 > query + m * 16 + e / 2 * 8) s[m][n][e] = -INFINITY;
}

// O and lse. A warp has 32 queries: with 16, each fragment of K and V would be loaded for half as many products. Of K
// and V two tiles of 64 keys each are in shared memory, one to work on, one that is coming. 4 D FLOP for each query and
// key.
constexpr int FORWARD_THREADS = 128, FORWARD_KEYS = 64;
constexpr int forward_bytes(int D) { return (TILE_ROWS + 4 * FORWARD_KEYS) * D * 2; }

template <int D> __global__ void __launch_bounds__(FORWARD_THREADS) flash_forward_kernel(FlashArguments f) {
    constexpr int KEYS = FORWARD_KEYS, THREADS = FORWARD_THREADS;
    constexpr unsigned Q = 0, K = TILE_ROWS * D * 2, TILE = KEYS * D * 2, V = K + 2 * TILE;
    const auto load_k = [&](unsigned which, int key) {
        const FlashHead<D> h(f);
        load_tile<D, KEYS, THREADS>(K + which, f.qk + h.k, 2 * h.C, key, h.T);
        copy_commit();
    };
    const auto load_v = [&](unsigned which, int key) {
        const FlashHead<D> h(f);
        load_tile<D, KEYS, THREADS>(V + which, f.qkv + h.v, 3 * h.C, key, h.T);
        copy_commit();
    };
    const FlashHead<D> h(f);
    const int first = threadIdx.x / 32 * 32, query = h.row + first, end = min(h.row + TILE_ROWS, h.T);
    load_tile<D, TILE_ROWS, THREADS>(Q, f.qk + h.q, 2 * h.C, h.row, h.T);
    load_k(0, 0);
    load_v(0, 0);

    float o[2][D / 8][4] = {}, m[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, l[2][2] = {};
    unsigned which = 0;                     // of the two tiles of K, and of V
    for (int key = 0; key < end; key += KEYS, which ^= TILE) {
        copy_wait<1>();                     // for all but V
        __syncthreads();                    // K is there for all, and no warp reads its other tile any more
        if (key + KEYS < end) load_k(which ^ TILE, key + KEYS); else copy_commit();
        float s[2][KEYS / 8][4] = {};
        add_product<D>(s, Q + first * D * 2 + operand_a<D>(), K + which + operand_b<D>());
        if (key + KEYS - 1 > query) mask_scores(s, query, key);
        online_softmax(s, o, m, l, LOG2E / sqrtf((float)D));
        copy_wait<1>();                     // for all but the next K
        __syncthreads();
        if (key + KEYS < end) load_v(which ^ TILE, key + KEYS); else copy_commit();
        add_product_of_sums<D>(o, s, V + which + operand_a<D>());
    }
    const FlashHead<D> out(f);
    UNROLL for (int i = 0; i < 4; i++) {
        float &sum = l[i / 2][i % 2], log = m[i / 2][i % 2] / sqrtf((float)D);
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        const int row = out.row + first + i * 8 + threadIdx.x % 32 / 4;
        if (threadIdx.x % 4 == 0 && row < out.T) f.lse[out.lse + row] = log + logf(sum);
        UNROLL for (int n = 0; n < D / 4; n++) o[i / 2][n / 2][i % 2 * 2 + n % 2] *= 1 / sum;
    }
    put_rows<D>(Q, o, 1, first, 0);         // in the place of the warp's queries, which no other warp reads
    __syncthreads();
    store_tile<D, TILE_ROWS, THREADS>(f.o + out.o, Q, out.C, out.row, out.T);
}

// delta_i = sum_j P_ij dP_ij = <dO_i, O_i>. D/8 lanes a row, 16 bytes each: 2 floatX an element.
template <int D> __global__ void flash_delta_kernel(FlashArguments f) {
    constexpr int LANES = D / 8;
    const FlashHead<D> h(f);
    for (int r = threadIdx.x / LANES; r < TILE_ROWS; r += BLOCK / LANES) {
        const int row = h.row + r;
        const size_t at = h.o + (size_t)row * h.C + threadIdx.x % LANES * 8;
        float sum = row < h.T ? (load_floats<8>(f.o + at) * load_floats<8>(f.dO + at)).sum() : 0;
        UNROLL for (int i = LANES / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
        if (threadIdx.x % LANES == 0 && row < h.T) f.terms[h.lse + row] = {f.lse[h.lse + row] * LOG2E, sum};
    }
}

// The terms of ROWS queries, to shared memory. Beyond T any will do: dO is 0 there, and all that comes of it.
template <int ROWS> __device__ inline void load_terms(unsigned to, const float2* terms, int row, int T) {
    const int i = threadIdx.x;
    if (i < ROWS) ((float2*)(shared_memory() + to))[i] = row + i < T ? terms[row + i] : float2{0, 0};
}

// P = exp(S - lse), 0 for keys after their query;   dS = P (dP - delta), in the place of S and dP. As in forward, the
// factor 1/sqrt(D) of S comes later: dq and dk get it when they are complete.
__device__ inline void gradient_of_score(float& p, float& ds, float scale, float2 terms, bool masked) {
    p = masked ? 0 : fast_exp2(fmaf(p, scale, -terms.x));
    ds = p * (ds - terms.y);
}

// dQ = dS K / sqrt(D). As forward, with tiles of 32 keys: S and dP take as many registers as the S of 64. 6 D FLOP for
// each query and key.
constexpr int DQ_THREADS = 128, DQ_KEYS = 32;
constexpr int dq_bytes(int D) { return (2 * TILE_ROWS + 4 * DQ_KEYS) * D * 2 + TILE_ROWS * 8; }

template <int D> __global__ void __launch_bounds__(DQ_THREADS) flash_dq_kernel(FlashArguments f) {
    constexpr int KEYS = DQ_KEYS, THREADS = DQ_THREADS;
    constexpr unsigned Q = 0, DO = TILE_ROWS * D * 2, K = 2 * DO, TILE = KEYS * D * 2, V = K + 2 * TILE;
    constexpr unsigned TERMS = V + 2 * TILE;
    const FlashHead<D> h(f);
    const auto load_kv = [&](unsigned which, int key) {
        const FlashHead<D> h(f);            // again: with all of it kept, registers would spill
        load_tile<D, KEYS, THREADS>(K + which, f.qk + h.k, 2 * h.C, key, h.T);
        load_tile<D, KEYS, THREADS>(V + which, f.qkv + h.v, 3 * h.C, key, h.T);
        copy_commit();
    };
    const int first = threadIdx.x / 32 * 32, query = h.row + first, end = min(h.row + TILE_ROWS, h.T);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    load_tile<D, TILE_ROWS, THREADS>(Q, f.qk + h.q, 2 * h.C, h.row, h.T);
    load_tile<D, TILE_ROWS, THREADS>(DO, f.dO + h.o, h.C, h.row, h.T);
    load_kv(0, 0);
    load_terms<TILE_ROWS>(TERMS, f.terms + h.lse, h.row, h.T);

    float dq[2][D / 8][4] = {};
    unsigned which = 0;
    for (int key = 0; key < end; key += KEYS, which ^= TILE) {
        copy_wait<0>();
        __syncthreads();                    // K and V are there for all, and no warp reads their other tiles any more
        if (key + KEYS < end) load_kv(which ^ TILE, key + KEYS);
        float p[2][KEYS / 8][4] = {}, ds[2][KEYS / 8][4] = {};
        add_product<D>(p, Q + first * D * 2 + operand_a<D>(), K + which + operand_b<D>());
        add_product<D>(ds, DO + first * D * 2 + operand_a<D>(), V + which + operand_b<D>());
        const bool diagonal = key + KEYS - 1 > query;
        UNROLL for (int i = 0; i < 4; i++) {
            const float2 terms = ((const float2*)(shared_memory() + TERMS))[first + i * 8 + g];
            UNROLL for (int n = 0; n < KEYS / 4; n++) {
                const int e = i % 2 * 2 + n % 2;
                const bool masked = diagonal && key + n / 2 * 8 + t * 2 + n % 2 > query + i * 8 + g;
                gradient_of_score(p[i / 2][n / 2][e], ds[i / 2][n / 2][e], LOG2E / sqrtf((float)D), terms, masked);
            }
        }
        add_product_of_sums<D>(dq, ds, K + which + operand_a<D>());
    }
    const FlashHead<D> out(f);
    put_rows<D>(Q, dq, 1 / sqrtf((float)D), first, 0);
    __syncthreads();
    store_tile<D, TILE_ROWS, THREADS>(f.dqkv + out.v - 2 * out.C, Q, 3 * out.C, out.row, out.T);
}

// dV = P^T dO,   dK = dS^T Q / sqrt(D). A block has 128 keys and goes over tiles of 64 queries, from the diagonal on.
// Each of 8 warps computes S^T = K Q^T and dP^T = V dO^T for 32 keys and 32 queries, writes P^T and dS^T to shared
// memory, and then adds to half of the columns of dK and dV of 32 keys. Without the exchange dK and dV of 16 keys would
// fill its registers, and it would load each fragment of Q and dO for half as many products. 8 D FLOP for each query
// and key.
constexpr int DKV_THREADS = 256, DKV_QUERIES = 64;
constexpr int dkv_bytes(int D) {
    return (2 * TILE_ROWS + 4 * DKV_QUERIES) * D * 2 + 2 * TILE_ROWS * DKV_QUERIES * 2 + 2 * DKV_QUERIES * 8;
}

template <int D> __global__ void __launch_bounds__(DKV_THREADS) flash_dkv_kernel(FlashArguments f) {
    constexpr int QUERIES = DKV_QUERIES, THREADS = DKV_THREADS;
    constexpr unsigned K = 0, V = TILE_ROWS * D * 2, Q = 2 * V, TILE = QUERIES * D * 2, DO = Q + 2 * TILE;
    constexpr unsigned P = DO + 2 * TILE, DS = P + TILE_ROWS * QUERIES * 2, TERMS = DS + TILE_ROWS * QUERIES * 2;
    const auto load_queries = [&](int which, int query) {
        const FlashHead<D> h(f);
        load_tile<D, QUERIES, THREADS>(Q + which * TILE, f.qk + h.q, 2 * h.C, query, h.T);
        load_tile<D, QUERIES, THREADS>(DO + which * TILE, f.dO + h.o, h.C, query, h.T);
        copy_commit();
        load_terms<QUERIES>(TERMS + which * QUERIES * 8, f.terms + h.lse, query, h.T);
    };
    const FlashHead<D> h(f);
    const int first = threadIdx.x / 32 % 4 * 32, half = threadIdx.x / 128, key = h.row + first;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    load_tile<D, TILE_ROWS, THREADS>(K, f.qk + h.k, 2 * h.C, h.row, h.T);
    load_tile<D, TILE_ROWS, THREADS>(V, f.qkv + h.v, 3 * h.C, h.row, h.T);
    load_queries(0, h.row);

    float dk[2][D / 16][4] = {}, dv[2][D / 16][4] = {};
    int which = 0;
    for (int query = h.row; query < h.T; query += QUERIES, which ^= 1) {
        copy_wait<0>();
        __syncthreads();                    // all is there for all; no warp reads the other tiles or P and dS any more
        if (query + QUERIES < h.T) load_queries(which ^ 1, query + QUERIES);
        const unsigned columns = which * TILE + half * 32 * D * 2 + operand_b<D>();
        float p[2][4][4] = {}, ds[2][4][4] = {};
        add_product<D>(p, K + first * D * 2 + operand_a<D>(), Q + columns);
        add_product<D>(ds, V + first * D * 2 + operand_a<D>(), DO + columns);
        const bool diagonal = key + 31 > query + half * 32;
        UNROLL for (int i = 0; i < 8; i++) {
            const int column = half * 32 + i / 2 * 8 + t * 2 + i % 2;
            const float2 terms = ((const float2*)(shared_memory() + TERMS))[which * QUERIES + column];
            UNROLL for (int m = 0; m < 4; m++) {
                const int e = m % 2 * 2 + i % 2;
                const bool masked = diagonal && key + m * 8 + g > query + column;
                gradient_of_score(p[m / 2][i / 2][e], ds[m / 2][i / 2][e], LOG2E / sqrtf((float)D), terms, masked);
            }
        }
        put_rows<QUERIES>(P, p, 1, first, half * 32);
        put_rows<QUERIES>(DS, ds, 1, first, half * 32);
        __syncthreads();
        UNROLL for (int k = 0; k < QUERIES / 16; k++) {
            const unsigned rows = (first * QUERIES * 2 + operand_a<QUERIES>()) ^ 32 * k;
            const unsigned of_half = which * TILE + k * 16 * D * 2 + (operand_a<D>() ^ half * D);
            unsigned a[2][4];
            UNROLL for (int m = 0; m < 2; m++) ldmatrix(a[m], shared_memory() + P + rows + m * 16 * QUERIES * 2);
            add_outer_product(dv, a, DO + of_half);
            UNROLL for (int m = 0; m < 2; m++) ldmatrix(a[m], shared_memory() + DS + rows + m * 16 * QUERIES * 2);
            add_outer_product(dk, a, Q + of_half);
        }
    }
    put_rows<D>(K, dk, 1 / sqrtf((float)D), first, half * D / 2);   // K and V were last read before a barrier
    put_rows<D>(V, dv, 1, first, half * D / 2);
    __syncthreads();
    store_tile<D, TILE_ROWS, THREADS>(f.dqkv + h.v - h.C, K, 3 * h.C, h.row, h.T);
    store_tile<D, TILE_ROWS, THREADS>(f.dqkv + h.v, V, 3 * h.C, h.row, h.T);
}

FlashArguments flash_arguments(const LayerActivations& a, const Scratch& s, const OlmoeConfig& c) {
    return {s.tiles, a.qk, a.qkv, s.dattn, a.attn, s.dqkv, a.attn_lse, s.attn_terms, c.H};
}

// attn and attn_lse from qk and, for v, qkv
template <int D>
void flash_attention_forward(LayerActivations& a, Scratch& s, const MicroBatch& batch, const OlmoeConfig& c) {
    const dim3 blocks(num_attention_tiles(batch), c.H);
    LAUNCH_SHARED(flash_forward_kernel<D>, blocks, FORWARD_THREADS, forward_bytes(D), flash_arguments(a, s, c));
    if (launch_checks.finite) check_finite("flash_forward_kernel", "attn", a.attn, (size_t)batch.N() * c.C);
}

// dq, dk and dv in dqkv, from dattn
template <int D>
void flash_attention_backward(Scratch& s, const LayerActivations& a, const MicroBatch& batch, const OlmoeConfig& c) {
    FlashArguments arguments = flash_arguments(a, s, c);
    const dim3 blocks(num_attention_tiles(batch), c.H);
    LAUNCH_SHARED(flash_delta_kernel<D>, blocks, BLOCK, 0, arguments);
    LAUNCH_SHARED(flash_dq_kernel<D>, blocks, DQ_THREADS, dq_bytes(D), arguments);
    arguments.tiles += blocks.x;
    LAUNCH_SHARED(flash_dkv_kernel<D>, blocks, DKV_THREADS, dkv_bytes(D), arguments);
    if (launch_checks.finite) check_finite("flash_dkv_kernel", "dqkv", s.dqkv, (size_t)batch.N() * 3 * c.C);
}

// Flash attention where c.flash(), else the blocked one
void attention_forward(LayerActivations& a, Scratch& s, const MicroBatch& batch, const OlmoeConfig& c) {
    if constexpr (TENSOR_CORES && BF16) {
        if (c.C / c.H == 64) return flash_attention_forward<64>(a, s, batch, c);
        if (c.C / c.H == 128) return flash_attention_forward<128>(a, s, batch, c);
    }
    blocked_attention_forward(a, s, batch, c);
}

void attention_backward(Scratch& s, const LayerActivations& a, const MicroBatch& batch, const OlmoeConfig& c) {
    if constexpr (TENSOR_CORES && BF16) {
        if (c.C / c.H == 64) return flash_attention_backward<64>(s, a, batch, c);
        if (c.C / c.H == 128) return flash_attention_backward<128>(s, a, batch, c);
    }
    blocked_attention_backward(s, a, batch, c);
}

// ------------------------------------------------------------------------------------------------
// Router:   z = m Wr^T,   p = softmax(z) over all E experts; m is ffn_in. The K largest p are the token's experts and
// their weights (OLMoE eq. 1), not renormalised, unless norm_topk_prob. Of equal z the lower id comes first.
//
// Auxiliary losses, for one micro-batch (as trained, which is not quite as printed in the paper):
//     LB = alpha E / (L N K) sum_l sum_i c_li Pbar_li     c: tokens sent to expert i, a constant; Pbar: mean p
//     Z  = beta / (L N K) sum_l sum_t lse_lt^2            lse = log sum_i exp z_i        (Shazeer 2017; Zoph 2022)

// One warp per token. Writes p (N, E), lse (N), and the chosen ids and weights (N, K) in order of probability.
__global__ void router_forward_kernel(float* probs, float* lse, int* experts, float* weights, const float* logits,
                                      int N, int E, int K, bool normalize) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)N) return;
    const float* z = logits + row * E;
    float* p = probs + row * E;

    float max = -INFINITY, sum = 0;
    for (int i = lane; i < E; i += WARP) max = fmaxf(max, z[i]);
    max = warp_max(max);
    for (int i = lane; i < E; i += WARP) sum += expf(z[i] - max);
    sum = warp_sum(sum);
    for (int i = lane; i < E; i += WARP) p[i] = expf(z[i] - max) / sum;
    if (lane == 0) lse[row] = max + logf(sum);

    // K times the best of those that come after the one chosen last. By z, not p: where exp is vectorised, equal z in
    // different lanes of a vector can give p that differ in the last bit.
    __syncwarp();                                               // p is read by lanes that did not write it
    float last = INFINITY, total = 0;
    int last_id = -1;
    for (int k = 0; k < K; k++) {
        float best = -INFINITY;
        int best_id = E;
        for (int i = lane; i < E; i += WARP) {
            bool left = z[i] < last || (z[i] == last && i > last_id);
            if (left && (z[i] > best || best_id == E)) { best = z[i]; best_id = i; }
        }
        warp_argmax(best, best_id);
        bool found = best_id < E;           // not where z is NaN: then any valid id, and the loss is NaN
        float weight = found ? p[best_id] : NAN;
        if (!found) best_id = k;
        if (lane == 0) { experts[row * K + k] = best_id; weights[row * K + k] = weight; }
        total += weight;
        last = best; last_id = best_id;
    }
    __syncwarp();
    if (normalize) for (int k = lane; k < K; k += WARP) weights[row * K + k] /= total;
}

// With g_i = dLoss/dp_i:   dz_j = p_j (g_j - sum_i p_i g_i) + 2 beta lse p_j / (L N K)
//     term 1: the K experts' weights w_k; with norm_topk_prob w_k = p_k / s, s the sum of the chosen p, and so
//             g_k = (dw_k - sum_i w_i dw_i) / s
//     term 2: load balancing, g_i = alpha E c_i / (L N^2 K), the same for every token
//     term 3: the z-loss
// One warp per token; g (N, E) is its scratch. lb_scale = alpha E / (L N^2 K) and z_scale = 2 beta / (L N K), both
// divided by the micro-batches of a step on all ranks; with --lb global N^2 is N times the N of all ranks.
__global__ void router_backward_kernel(floatX* dlogits, float* g, const float* dweights, const float* probs,
                                       const float* lse, const int* experts, const float* weights, const int* counts,
                                       int N, int E, int K, bool normalize, float lb_scale, float z_scale) {
    size_t row = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (row >= (size_t)N) return;
    const float *p = probs + row * E, *w = weights + row * K, *dw = dweights + row * K;
    const int* id = experts + row * K;
    dlogits += row * E; g += row * E;

    float chosen = 1, mean = 0;
    if (normalize) {
        chosen = 0;
        for (int k = lane; k < K; k += WARP) { chosen += p[id[k]]; mean += w[k] * dw[k]; }
        chosen = warp_sum(chosen);
        mean = warp_sum(mean);
    }
    for (int i = lane; i < E; i += WARP) g[i] = lb_scale * (float)counts[i];
    __syncwarp();
    for (int k = lane; k < K; k += WARP) g[id[k]] += (dw[k] - mean) / chosen;
    __syncwarp();
    float dot = 0;
    for (int i = lane; i < E; i += WARP) dot += p[i] * g[i];
    dot = warp_sum(dot);
    float z_term = z_scale * lse[row];
    for (int i = lane; i < E; i += WARP) dlogits[i] = (floatX)(p[i] * (g[i] - dot + z_term));
}

// Sum of p over a slab of tokens, for Pbar. One warp per slab.
template <int P>
__global__ void router_mean_kernel(Out<float> partial, In<float> probs, int N, int E, int slabs) {
    const size_t slab = thread_index() / WARP;
    if (slab >= (size_t)slabs) return;
    const Columns<P, 1> columns{E};
    LineOfSums sum(partial + slab * E, columns);
    for (size_t row = N * slab / slabs; row < N * (slab + 1) / slabs; row++) {
        const Row p(probs + row * E, columns);
        columns.all([&](auto at) { sum.add(at, p[at]); });
    }
    sum.store(columns);
}

// Probabilities, experts, weights and, for the losses, lse and sums of p, from the logits
void router_forward(LayerActivations& a, const Scratch& s, int N, const OlmoeConfig& c) {
    int slabs = slabs_for(N);
    LAUNCH(router_forward_kernel, blocks_for_rows(N), a.router_probs, a.router_lse, a.experts, a.weights,
           a.router_logits, N, c.E, c.K, c.norm_topk_prob);
    LAUNCH_PACKS(router_mean_kernel, c.E % PACK == 0, blocks_for_rows(slabs),
                 s.router_partial, a.router_probs, N, c.E, slabs);
    sum_slabs(a.router_sums, s.router_partial, c.E, slabs, false);
}

// drouter from dweights; counts (E) are those of the load-balancing loss
void router_backward(Scratch& s, const LayerActivations& a, const int* counts, float lb_scale, float z_scale, int N,
                     const OlmoeConfig& c) {
    LAUNCH(router_backward_kernel, blocks_for_rows(N), s.drouter, s.drouter_probs, s.dweights, a.router_probs,
           a.router_lse, a.experts, a.weights, counts, N, c.E, c.K, c.norm_topk_prob, lb_scale, z_scale);
}

// ------------------------------------------------------------------------------------------------
// Dispatch: the R = N K assignments a = t K + k, sorted by expert; within an expert they keep their order. Dropless: an
// expert takes whatever it is sent. A counting sort in three kernels over slabs of assignments: count, scan, place. An
// expert's counter belongs to one lane (expert % WARP), so that nothing is atomic.

// One warp per slab: histogram (slabs, E)
__global__ void dispatch_count_kernel(int* histogram, const int* experts, int R, int E, int slabs) {
    size_t slab = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (slab >= (size_t)slabs) return;
    histogram += slab * E;

    int begin = (int)slab * DISPATCH_SLAB, end = begin + DISPATCH_SLAB < R ? begin + DISPATCH_SLAB : R;
    for (int e = lane; e < E; e += WARP) histogram[e] = 0;
    for (int base = begin; base < end; base += WARP) {
        int mine = base + lane < end ? experts[base + lane] : -1;
        for (int j = 0; j < WARP; j++) {
            int e = __shfl_sync(0xffffffff, mine, j);
            if (e >= 0 && e % WARP == lane) histogram[e]++;
        }
    }
}

// One warp per expert: its counts become its first row in each slab, relative to the expert's first row
__global__ void dispatch_scan_kernel(int* counts, int* histogram, int E, int slabs) {
    size_t e = thread_index() / WARP;
    int lane = threadIdx.x % WARP, sum = 0;
    if (e >= (size_t)E) return;
    for (int base = 0; base < slabs; base += WARP) {
        int* count = histogram + (size_t)(base + lane) * E + e;
        int n = base + lane < slabs ? *count : 0, upto = warp_prefix(n);
        if (base + lane < slabs) *count = sum + upto - n;
        sum += __shfl_sync(0xffffffff, upto, WARP - 1);
    }
    if (lane == 0) counts[e] = sum;
}

// One warp per slab: row_of (R) gives an assignment's row, assignment_of (R) a row's assignment
__global__ void dispatch_place_kernel(int* row_of, int* assignment_of, int* histogram, const int* counts,
                                      const int* experts, int R, int E, int slabs) {
    size_t slab = thread_index() / WARP;
    int lane = threadIdx.x % WARP;
    if (slab >= (size_t)slabs) return;
    histogram += slab * E;

    for (int e = lane, first = 0; e - lane < E; e += WARP) {    // first: rows of the experts before
        int n = e < E ? counts[e] : 0, upto = warp_prefix(n);
        if (e < E) histogram[e] += first + upto - n;
        first += __shfl_sync(0xffffffff, upto, WARP - 1);
    }
    int begin = (int)slab * DISPATCH_SLAB, end = begin + DISPATCH_SLAB < R ? begin + DISPATCH_SLAB : R;
    for (int base = begin; base < end; base += WARP) {
        int mine = base + lane < end ? experts[base + lane] : -1;
        for (int j = 0; j < WARP; j++) {
            int e = __shfl_sync(0xffffffff, mine, j);
            if (e >= 0 && e % WARP == lane) {
                int row = histogram[e]++;
                row_of[base + j] = row;
                assignment_of[row] = base + j;
            }
        }
    }
}

// out_row = x_i with i = index_row / K. Where index is assignment_of, i is the row's token: so the experts get their
// input, and in backward the gradient of their output. With K = 1 it is rows in another order. One warp per row.
template <int P, typename T>
__global__ void gather_kernel(Out<T> out, In<T> x, In<int> index, int R, int C, int K) {
    const size_t row = thread_index() / WARP;
    if (row >= (size_t)R) return;
    copy_row<P>(out + row * C, x + (size_t)(index[row] / K) * C, C);
}

// row_of, assignment_of and counts, from the experts; where one is -1, its row_of stays as it is. The host may have the
// counts before the rest is done.
void dispatch(int* counts /* (E) */, int* row_of /* (R) */, int* assignment_of /* (R) */, int* histogram,
              const int* experts /* (R) */, int R, int E) {
    int slabs = ceil_div(R, DISPATCH_SLAB);
    LAUNCH(dispatch_count_kernel, blocks_for_rows(slabs), histogram, experts, R, E, slabs);
    LAUNCH(dispatch_scan_kernel, blocks_for_rows(E), counts, histogram, E, slabs);
    cudaCheck(cudaEventRecord(copy_event, main_stream.stream));
    LAUNCH(dispatch_place_kernel, blocks_for_rows(slabs), row_of, assignment_of, histogram, counts, experts, R, E,
           slabs);
}

template <typename T>
void gather(T* out /* (R, C) */, const T* x /* (N, C) */, const int* index /* (R) */, int R, int C, int K) {
    LAUNCH_PACKS(gather_kernel, C % PACK == 0, blocks_for_rows(R), out, x, index, R, C, K);
}

// ------------------------------------------------------------------------------------------------
// Experts (SwiGLU, Shazeer 2020):   g = x W_gate^T,   u = x W_up^T,   h = silu(g) u,   y = h W_down^T
// with silu(g) = g sigmoid(g). gate and up are one matrix (2F, C). Each expert multiplies its own run of rows; experts
// without rows are left out.

// One warp per row: h (R, F) from gate_up (R, 2F).
template <int P>
__global__ void swiglu_forward_kernel(Out<floatX> h, In<floatX> gate_up, int R, int F) {
    const size_t row = thread_index() / WARP;
    if (row >= (size_t)R) return;
    for_chunks<P, 4>(F, [&](auto columns) {
        const Row gate(gate_up + row * 2 * F, columns), up(gate_up + row * 2 * F + F, columns);
        columns.kept([&](auto at) {
            Floats<P> x = gate[at];
            UNROLL for (int e = 0; e < P; e++) x[e] = x[e] / (1 + expf(-x[e]));
            store_pack(h + row * F + at.column, x * up[at]);
        });
    });
}

// The expert's output is weighted by the router: y' = w y. Let dh = dy' W_down, not yet weighted. Then
//     dw = <dy', y> = <dh, h>                         so y need not be kept
//     dgate = w dh u s (1 + g (1 - s)),   dup = w dh g s,   s = sigmoid(g)
//     dW_down = (w dy')^T h = dy'^T (w h)             so w h is written for that matmul
// One warp per routed row. Reads gate_up, dh; writes dgate_up and w h: 6 floatX for each of F columns.
template <int P>
__global__ void swiglu_backward_kernel(Out<floatX> dgate_up, Out<floatX> weighted_h, Out<float> dweights, In<floatX> dh,
                                       In<floatX> gate_up, In<float> weights, In<int> assignment_of, int R, int F) {
    const size_t row = thread_index() / WARP;
    if (row >= (size_t)R) return;
    const size_t a = assignment_of[row];
    const float w = weights[a];
    float dot = 0;
    for_chunks<P, 4>(F, [&](auto columns) {
        const Row gate(gate_up + row * 2 * F, columns), up(gate_up + row * 2 * F + F, columns);
        const Row gradient(dh + row * F, columns);
        columns.kept([&](auto at) {
            const Floats<P> x = gate[at], u = up[at], d = gradient[at];
            Floats<P> silu, dg;
            UNROLL for (int e = 0; e < P; e++) {
                const float s = 1 / (1 + expf(-x[e]));
                silu[e] = x[e] * s;
                dg[e] = w * d[e] * u[e] * s * (1 + x[e] * (1 - s));
            }
            const Floats<P> h = silu * u;
            dot += (h * d).sum();
            store_pack(dgate_up + row * 2 * F + at.column, dg);
            store_pack(dgate_up + row * 2 * F + F + at.column, d * silu * w);
            store_pack(weighted_h + row * F + at.column, h * w);
        });
    });
    dot = warp_sum(dot);
    if (threadIdx.x % WARP == 0) dweights[a] = dot;
}

// gate_up from expert_in, of a piece of the experts
void experts_gate_up(LayerActivations& a, const LayerParameters& p, const RowCounts& rows, int piece,
                     const OlmoeConfig& c) {
    const size_t C = c.C, F = c.F;
    for_experts(rows, piece, [&](const Stream& stream, size_t e, size_t first, int n) {
        const floatX *x = a.expert_in + first * C, *w = p.gate_up + e * 2 * F * C;
        matmul_forward(stream, a.gate_up + first * 2 * F, x, w, n, C, 2 * F);
    });
}

// h from gate_up, likewise
void swiglu_forward(Scratch& s, const LayerActivations& a, const Piece& piece, int F) {
    const size_t first = piece.first;
    if (piece.rows == 0) return;            // no rank sent anything
    LAUNCH_PACKS(swiglu_forward_kernel, F % PACK == 0, blocks_for_rows(piece.rows), s.h + first * F,
                 a.gate_up + first * 2 * F, piece.rows, F);
}

// expert_out from h, likewise
void experts_down(Scratch& s, const LayerParameters& p, const RowCounts& rows, int piece, const OlmoeConfig& c) {
    const size_t C = c.C, F = c.F;
    for_experts(rows, piece, [&](const Stream& stream, size_t e, size_t first, int n) {
        matmul_forward(stream, s.expert_out + first * C, s.h + first * F, p.down + e * C * F, n, F, C);
    });
}

// dgate_up, weighted_h and dweights, from dh and gate_up, likewise
void swiglu_backward(Scratch& s, float* dweights /* (N, K) */, const LayerActivations& a, const Piece& piece, int F) {
    const size_t first = piece.first;
    LAUNCH_PACKS(swiglu_backward_kernel, F % PACK == 0, blocks_for_rows(piece.rows), s.dgate_up + first * 2 * F,
                 s.weighted_h + first * F, dweights, s.dh + first * F, a.gate_up + first * 2 * F, a.here_weights,
                 a.here_assignment_of + first, piece.rows, F);
}

// dexpert_in and dweights, and into g's gate_up and down, from dexpert_out, which is not yet weighted by the router; of
// a piece of the experts
void experts_backward(Scratch& s, LayerParameters& g, bool add, float* dweights /* (N, K) */, const LayerActivations& a,
                      const LayerParameters& p, const RowCounts& rows, int piece, const OlmoeConfig& c) {
    const size_t C = c.C, F = c.F;
    const bool trained = g.down;            // if so, gate_up too: they are of one group
    for (size_t e = rows.pieces[piece].begin; e < rows.pieces[piece].end && trained && !add; e++)
        if (rows.here[e] == 0) {            // no matmul sets its gradient
            clear_on_device(g.gate_up + e * 2 * F * C, 2 * F * C);
            clear_on_device(g.down + e * C * F, C * F);
        }
    if (rows.pieces[piece].rows == 0) return;
    for_experts(rows, piece, [&](const Stream& stream, size_t e, size_t first, int n) {
        matmul_backward_input(stream, s.dh + first * F, s.dexpert_out + first * C, p.down + e * C * F, n, F, C);
    });
    swiglu_backward(s, dweights, a, rows.pieces[piece], c.F);
    for_experts(rows, piece, [&](const Stream& stream, size_t e, size_t first, int n) {
        const floatX *dy = s.dexpert_out + first * C, *dgate_up = s.dgate_up + first * 2 * F;
        matmul_backward_input(stream, s.dexpert_in + first * C, dgate_up, p.gate_up + e * 2 * F * C, n, C, 2 * F);
        if (!trained) return;
        matmul_backward_weight(stream, g.down + e * C * F, dy, s.weighted_h + first * F, n, F, C, add);
        matmul_backward_weight(stream, g.gate_up + e * 2 * F * C, dgate_up, a.expert_in + first * C, n, C, 2 * F, add);
    });
}

// ------------------------------------------------------------------------------------------------
// Combine:   out_t = residual_t + sum_k w_tk y_tk,   y_tk the row of assignment t K + k; where it is -1, there is none

// One warp per token; sums in fp32, k by k, and rounds once. Null weights are all 1 and a null residual is 0: the
// backward of gather, where the gradient of ffn_in is the sum of its K rows of dexpert_in. Where normed is not null it
// gets rmsnorm(out), the next layer's input: K + 3 floatX an element.
template <int P>
__global__ void combine_kernel(Out<floatX> out, Out<floatX> normed, Out<float> r, In<floatX> residual, In<floatX> y,
                               In<float> weights, In<int> row_of, In<floatX> norm, int N, int C, int K, float eps) {
    const size_t token = thread_index() / WARP;
    if (token >= (size_t)N) return;
    const Columns<P> columns{C};
    Row<floatX, Columns<P>> result(out + token * C);            // the first chunk is kept for the norm
    float square = 0;
    for_chunks<P>(C, [&](auto chunk) {
        Floats<P> sum[chunk.K];
        if (residual) {
            const Row stream(residual + token * C, chunk);
            chunk.kept([&](auto at) { sum[at.k] = stream[at]; });
        } else chunk.kept([&](auto at) { sum[at.k] = {}; });
        for (int k = 0; k < K; k++) {
            const int row = row_of[token * K + k];
            if (row < 0) continue;
            const float w = weights ? weights[token * K + k] : 1.f;
            const Row from(y + (size_t)row * C, chunk);
            chunk.kept([&](auto at) { sum[at.k] = sum[at.k] + from[at] * w; });
        }
        chunk.kept([&](auto at) {
            const Floats<P> x = result.set(at, sum[at.k], chunk.first == 0);
            square += (x * x).sum();
        });
    });
    if (normed) rmsnorm_row(normed + token * C, r + token, result, norm, square, columns, eps);
}

// normed (N, C), r (N) and norm (C): of the rmsnorm that comes next, or null
void combine(floatX* out /* (N, C) */, const floatX* residual /* (N, C) or null */, const floatX* y /* (R, C) */,
             const float* weights /* (N, K) or null */, const int* row_of /* (R) */, int N, int C, int K,
             floatX* normed = nullptr, float* r = nullptr, const floatX* norm = nullptr, float eps = 0) {
    LAUNCH_PACKS(combine_kernel, C % PACK == 0, blocks_for_rows(N), out, normed, r, residual,
                 y, weights, row_of, norm, N, C, K, eps);
}

// ------------------------------------------------------------------------------------------------
// Cross entropy, with its gradient:   loss = sum_t w_t (lse_t - z_target),   dz_v = w_t (softmax_v - [v = target])
// w_t is what the target counts. The softmax goes over all V columns, padding included, as OLMoE trained. An IGNORED
// target has no loss and no gradient.

// One warp per token. Writes the losses, not weighted. The gradient overwrites the logits, unless weights is null. The
// maximum and the sum are of one pass: where a chunk has a larger logit, the sum of those before it shrinks to match.
template <int P>
__global__ void cross_entropy_kernel(Out<float> losses, Out<floatX> logits, In<int> targets, In<float> weights, int N,
                                     int V) {
    const size_t row = thread_index() / WARP;
    if (row >= (size_t)N) return;
    logits += row * V;
    const int target = targets[row];

    float max = -INFINITY, sum = 0;         // of this lane's columns
    for_chunks<P, 4>(V, [&](auto columns) {
        const Row z(logits, columns);
        const float before = max;
        max = z.largest(columns, max);
        if (max > before) sum *= expf(before - max);
        columns.kept([&](auto at) {
            UNROLL for (int e = 0; e < P; e++) sum += expf(z[at][e] - max);
        });
    });
    const float largest = warp_max(max);
    const float lse = largest + logf(warp_sum(sum * expf(max - largest)));
    if (threadIdx.x % WARP == 0) losses[row] = target >= 0 ? lse - (float)logits[target] : 0.f;
    if (!weights) return;
    __syncwarp();                           // the target's logit is read before it is overwritten
    const float factor = target >= 0 ? weights[row] : 0.f;
    for_chunks<P, 4>(V, [&](auto columns) {
        const Row z(logits, columns);
        columns.kept([&](auto at) {
            Floats<P> dz = z[at];
            UNROLL for (int e = 0; e < P; e++)
                dz[e] = factor * (expf(dz[e] - lse) - (at.column + e == target ? 1.f : 0.f));
            store_pack(logits + at.column, dz);
        });
    });
}

// losses and, with `gradient`, dlogits in the place of the logits: of `n` tokens from `first` on
void cross_entropy(Activations& a, bool gradient, int first, int n, int V) {
    const float* weights = gradient ? a.target_weights + first : nullptr;
    LAUNCH_PACKS(cross_entropy_kernel, V % PACK == 0, blocks_for_rows(n), a.losses + first, a.logits, a.targets + first,
                 weights, n, V);
}

// dw = sum, or dw += sum: of the chunks' gradients of lm_head, rounded once. One thread per pack.
template <int P> __global__ void head_gradient_kernel(Out<floatX> dw, In<float> sum, size_t n, bool add) {
    const size_t i = thread_index() * P;
    if (i >= n) return;
    const Floats<P> all = load_floats<P>(sum + i);
    store_pack(dw + i, add ? load_floats<P>(dw + i) + all : all);
}

// ------------------------------------------------------------------------------------------------
// AdamW (Loshchilov & Hutter 2019), for one element at step s = 1, 2, ...; everything is decayed, norms and embeddings
// too:
//     p <- p (1 - lr wd);   m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2
//     p <- p - lr m / (1-b1^s) / (sqrt(v / (1-b2^s)) + eps)
// g is the gradient times grad_scale, which clips the global norm. RMSprop, as torch has it, is a case of it: b1 = 0, v
// uncorrected, and the decay a part of the gradient:
//     g <- g + wd p;   v <- a v + (1-a) g^2;   p <- p - lr g / (sqrt(v) + eps)

constexpr double RMSPROP_ALPHA = 0.99;      // torch's, which OLMoE's KTO used

struct AdamWOptions {
    bool rmsprop = false;
    double lr = 4e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, grad_clip = 1.0;
    uint64_t seed = 6198;                   // of rounding at random
};

// One thread per pack: 28 bytes an element moved in fp32, 28 with bf16 parameters and gradients and an fp32 master.
// position: of p[0] in the model. A sum with l2 * old where l2 is 0 could be rounded otherwise in another instance.
template <int P, typename Master, typename Moment>
__global__ void adamw_kernel(Out<floatX> p, Out<Master> master, In<floatX> g, Out<Moment> m, Out<Moment> v, size_t n,
                             float grad_scale, float decay, float l2, float step_size, float beta1, float beta2,
                             float v_scale, float eps, uint64_t seed, size_t position, unsigned step) {
    constexpr bool no_master = std::is_same<Master, NoMaster>::value;
    constexpr bool at_random = sizeof(Moment) == 2 || (BF16 && no_master);
    const size_t first = thread_index() * P;
    if (first >= n) return;
    auto weights = load_pack<P>(p + first);
    auto masters = Pack<Master, P>{};
    if constexpr (!no_master) masters = load_pack<P>(master + first);
    const Floats<P> gradients = load_floats<P>(g + first);
    auto means = load_pack<P>(m + first), squares = load_pack<P>(v + first);
    UNROLL for (int e = 0; e < P; e++) {
        Philox random = {};
        if constexpr (at_random) random = philox(seed, position + first + e, step);
        const float old = master_of(&masters.v[e], &weights.v[e]);
        const float grad = l2 == 0 ? gradients[e] * grad_scale : gradients[e] * grad_scale + l2 * old;
        const float m_new = beta1 * (float)means.v[e] + (1 - beta1) * grad;
        const float v_new = beta2 * (float)squares.v[e] + (1 - beta2) * grad * grad;
        const float value = old * decay - step_size * m_new / (sqrtf(v_new * v_scale) + eps);
        store(&means.v[e], m_new, random.x[0] & 0xffff);
        store(&squares.v[e], v_new, random.x[1] & 0xffff);
        store(&masters.v[e], value, 0);
        store(&weights.v[e], value, no_master ? random.x[2] & 0xffff : HALF_AWAY);
    }
    store_pack(m + first, means);
    store_pack(v + first, squares);
    if constexpr (!no_master) store_pack(master + first, masters);
    store_pack(p + first, weights);
}

// Update number `step`
template <typename Master, typename Moment>
void adamw(floatX* p /* (n) */, Master* master /* (n), or null for NoMaster */, const floatX* g /* (n) */,
           Moment* m /* (n) */, Moment* v /* (n) */, size_t n, int64_t step, float grad_scale, const AdamWOptions& o,
           size_t position) {
    const bool rms = o.rmsprop;
    const double beta1 = rms ? 0 : o.beta1, beta2 = rms ? RMSPROP_ALPHA : o.beta2;
    const float decay = (float)(rms ? 1 : 1 - o.lr * o.weight_decay), l2 = rms ? (float)o.weight_decay : 0;
    const float step_size = (float)(o.lr / (1 - pow(beta1, (double)step)));
    const float v_scale = (float)(rms ? 1 : 1 / (1 - pow(beta2, (double)step)));
    LAUNCH_PACKS(adamw_kernel, packs_fit(n, p, master, g, m, v), blocks_for(n / P), p, master, g, m, v, n, grad_scale,
                 decay, l2, step_size, (float)beta1, (float)beta2, v_scale, (float)o.eps, o.seed, position,
                 (unsigned)step);
}

// ------------------------------------------------------------------------------------------------
// Initialisation:   weights ~ normal(0, std) truncated at 3 std, norms 1 (OLMoE Table 10)

// One thread per element. Each gets four normal deviates (Box & Muller 1958) and takes the first within 3 std. With
// probability 5e-11 there is none, and the value is 0.
template <typename T> __global__ void init_normal_kernel(T* p, size_t n, size_t position, uint64_t seed, float std) {
    size_t i = thread_index();
    if (i >= n) return;
    Philox random = philox(seed, position + i);
    float value = 0;
    for (int pair = 1; pair >= 0; pair--) {
        float radius = sqrtf(-2 * logf(uniform(random.x[2 * pair])));
        float angle = 6.2831853f * uniform(random.x[2 * pair + 1]);
        float a = radius * cosf(angle), b = radius * sinf(angle);
        value = fabsf(b) <= 3 ? b : value;
        value = fabsf(a) <= 3 ? a : value;
    }
    store(p + i, value * std, HALF_AWAY);
}

template <typename T> __global__ void fill_kernel(T* p, size_t n, float value) {
    size_t i = thread_index();
    if (i >= n) return;
    store(p + i, value, HALF_AWAY);
}

// ------------------------------------------------------------------------------------------------
// The model in memory

// Buffers of rows whose number follows the routing, under expert parallelism; an item has the bytes of one row. They
// grow when more rows arrive than ever before.
struct RowBuffers : Memory { size_t rows = 0; };

enum class Use { inference, gradients, training };      // training: gradients and AdamW's state

// What a model is asked to hold
struct Capacity {
    int N = 0, T = 0;           // most tokens of a micro-batch, and of one sequence
    Use use = Use::inference;
    int recompute = 0;
    int classified = 0;         // most tokens that have logits at the same time; 0: N, with backward at most HEAD_ROWS
    int positions = 0;          // rows of RoPE's tables; 0: T
};

struct Olmoe {
    OlmoeConfig config;
    Capacity capacity;
    Parameters params = {}, grads = {};
    std::vector<Tensor> tensors;
    Masters masters = BF16 ? Masters::fp32 : Masters::none;
    bool narrow_moments = false;
    void *moment1 = nullptr, *moment2 = nullptr, *master_weights = nullptr;     // AdamW's state, flat; see with_state
    Activations acts = {};
    Scratch scratch = {};
    Memory params_memory, grads_memory, optimizer_memory, acts_memory, backward_memory, cache_memory;
    std::vector<RowBuffers> layer_rows;     // (L) with --ep: expert_in and gate_up of a layer, where each keeps its own
    RowBuffers scratch_rows;                // with --ep: what all layers share
    bool lb_global = false;                 // load balancing over the rows of all ranks

    MicroBatch batch;                       // whose activations these are
    bool accumulate = false;                // its gradients are added to those before it, and don't take their place
    int N = 0, R = 0;                       // its tokens, and rows routed to experts
    std::vector<TokenRun> runs;             // Scratch::runs
    std::vector<RowCounts> rows;            // (L)
    std::vector<float> losses, router_lse, router_sums;     // (N), (L, N), (L, E) on the host

    bool backward() const { return capacity.use != Use::inference; }
    // Tokens that the load-balancing loss is over
    double lb_tokens() const { return !lb_global ? N : batch.world_N > 0 ? batch.world_N : (double)N * world.size; }
};

// A micro-batch's losses; loss = ce + lb + z is what was differentiated.
struct Losses {
    double loss = 0, ce = 0, lb = 0, z = 0; // ce: sum of weight times -log p(target)
    double nll = 0;                         // the same without weights
    int64_t valid = 0;                      // targets that count

    void add(const Losses& l) {
        loss += l.loss; ce += l.ce; lb += l.lb; z += l.z; nll += l.nll; valid += l.valid;
    }
};

// What a layer's activations take: some layers share a buffer with the first, see share_activations
void plan_layer(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    const bool first = l == 0;
    const int level = m->capacity.recompute;
    const bool keep1 = first || level < 1, keep2 = first || level < 2;
    const size_t N = m->capacity.N, C = c.C, E = c.E, R = N * c.K;
    LayerActivations& a = m->acts.layers[l];
    Memory& mem = m->acts_memory;

    if (first || m->backward()) mem.add(N * C, &a.x);
    if (keep2 || !m->backward()) mem.add(N * E, &a.router_logits);
    if (!m->backward() && !first) return;   // without backward, one layer's buffers serve all but the router's logits
    if (keep1) { mem.add(N * C, &a.attn_in, &a.ffn_in); mem.add(N * 2 * C, &a.qk); }
    if (keep2) { mem.add(N * 3 * C, &a.qkv); mem.add(N * C, &a.attn, &a.x_mid); mem.add(N * E, &a.router_probs); }
    mem.add(N, &a.attn_r, &a.ffn_r); mem.add(N * 2, &a.qk_r); mem.add(N * c.H, &a.attn_lse);
    mem.add(R, &a.weights); mem.add(R, &a.row_of, &a.assignment_of);
    if (expert_group.size > 1) {
        auto rows = [&](int shared_from) -> Memory& {
            return m->backward() && level < shared_from ? m->layer_rows[l] : m->scratch_rows;
        };
        if (keep1) rows(1).add(C, &a.expert_in);
        if (keep2) rows(2).add(2 * c.F, &a.gate_up);
        rows(3).add(c.K, &a.here_row_of); rows(3).add(c.K, &a.here_weights); rows(3).add(1, &a.here_assignment_of);
    } else {
        if (keep1) mem.add(R * C, &a.expert_in);
        if (keep2) mem.add(R * 2 * c.F, &a.gate_up);
    }
}

void plan_scratch(Olmoe* m) {
    const OlmoeConfig& c = m->config;
    const size_t N = m->capacity.N, T = m->capacity.T, C = c.C, E = c.E, F = c.F, R = N * c.K;
    const size_t square = (size_t)c.H * std::min<size_t>(ATTENTION_BLOCK, T) * T;
    const bool several_ranks = expert_group.size > 1;           // share the experts: rows are what arrives
    Scratch& s = m->scratch;
    Memory &mem = m->acts_memory, &back = m->backward_memory;
    Memory &rows = several_ranks ? (Memory&)m->scratch_rows : mem, &back_rows = several_ranks ? rows : back;
    const size_t r = several_ranks ? 1 : R;

    mem.add((size_t)m->capacity.positions * (C / c.H / 2), &s.cosine, &s.sine);
    if (c.flash()) mem.add(2 * N, &s.tiles);
    else { mem.add(square, &s.scores); mem.add(square, &s.probs); }
    const size_t G = expert_group.size, V = N * std::min<size_t>(c.K, G), kinds = num_kinds(num_pieces((int)(E / G)));
    mem.add(SLABS * E, &s.router_partial); mem.add(ceil_div(R, DISPATCH_SLAB) * std::max(E, G * kinds), &s.histogram);
    mem.add(c.L * E, &s.global_counts);
    if (several_ranks) {
        mem.add(R, &s.visits); mem.add(G * kinds, &s.visit_counts); mem.add(E + G * kinds, &s.arrivals);
        mem.add(V * C, &s.home_rows); mem.add(V * c.K, &s.home_experts); mem.add(V * c.K, &s.home_weights);
        mem.add(E / G, &s.here_counts); rows.add(E / G * ceil_div(c.K, DISPATCH_SLAB), &s.here_histogram);
        rows.add(C, &s.arrived_rows); rows.add(c.K, &s.arrived_experts);
    }
    rows.add(r * F, &s.h); rows.add(r * C, &s.expert_out);
    if (!m->backward()) return;

    const bool room = R >= 2 * (size_t)c.V && !launch_checks.finite;   // whose check takes all of a buffer for one type
    if (BF16 && (size_t)m->capacity.classified < N && !room) back.add(c.V * C, &s.dhead);
    back.add(N, &s.sorted_tokens); back.add(N, &s.runs);
    back.add(N * C, &s.dx, &s.dbranch, &s.dattn); back.add(N * 3 * C, &s.dqkv);
    if (c.flash()) back.add(N * c.H, &s.attn_terms);
    else { back.add(N * 3 * C, &s.dqkv32); back.add(square, &s.dprobs); back.add(square, &s.dscores); }
    back.add(N * E, &s.drouter); back.add(N * E, &s.drouter_probs); back.add(R, &s.dweights);
    back_rows.add(r * C, &s.dexpert_out); back_rows.add(r * F, &s.dh); back_rows.add(r * 2 * F, &s.dgate_up);
    if (several_ranks) rows.add(c.K, &s.arrived_dweights);
    back.add(std::max<size_t>(2 * slabs_for((int)N), 2 * N / TOKEN_RUN) * C, &s.partial);
    size_t runs = 0;
    for (const Tensor& t : m->tensors) runs += t.frozen ? 0 : ceil_div(t.share, SQUARE_SUM_RUN);
    back.add(runs, &s.square_sums);
}

// Fills in what a model of this shape needs, without allocating: `olmoe info` prints it, olmoe_allocate allocates it.
void olmoe_plan(Olmoe* m, const OlmoeConfig& config, Capacity capacity) {
    if (capacity.classified == 0)
        capacity.classified = capacity.use == Use::inference ? capacity.N : std::min(capacity.N, HEAD_ROWS);
    capacity.positions = std::max(capacity.positions, capacity.T);
    m->config = config;
    m->capacity = capacity;
    m->tensors = model_tensors(config);
    m->params.layers.resize(config.L);
    m->grads.layers.resize(config.L);
    for (const Tensor& t : m->tensors) {
        m->params_memory.add(t.allocated(), &t.in(m->params));
        if (m->backward() && !t.frozen) m->grads_memory.add(t.allocated(), &t.in(m->grads));
    }
    if (capacity.use == Use::training) {
        const size_t n = num_updated(m->tensors), moment = m->narrow_moments ? 2 : 4;
        const size_t master = m->masters == Masters::remainder ? 2 : 4;
        m->optimizer_memory.add(n * moment, (char**)&m->moment1, (char**)&m->moment2);
        if (m->masters != Masters::none) m->optimizer_memory.add(n * master, (char**)&m->master_weights);
    }

    const size_t N = capacity.N, C = config.C, L = config.L, R = N * config.K, classified = capacity.classified;
    Activations& a = m->acts;
    Memory& mem = m->acts_memory;
    a.layers.resize(L);
    m->layer_rows.assign(L, {});
    m->scratch_rows = {};
    mem.add(N, &a.inputs, &a.targets, &a.target_weights, &a.positions);
    LayerActivations& all = a.layers[0];    // what the host reads is one array for all layers, see share_activations
    mem.add(L * N, &all.router_lse); mem.add(L * config.E, &all.router_sums);
    mem.add(L * R, &all.experts); mem.add(L * config.E, &all.counts);
    for (int l = 0; l < config.L; l++) plan_layer(m, l);
    mem.add(N * C, &a.x); mem.add(N, &a.final_r, &a.losses);
    mem.add(classified * C, &a.final_out); mem.add(classified * config.V, &a.logits);
    plan_scratch(m);
}

// Layers that share a buffer with layer 0 get its address; arrays over all layers, which the host reads, get their
// layer's part for this micro-batch; second uses of a buffer get the address of the first.
void share_activations(Olmoe* m) {
    const OlmoeConfig& c = m->config;
    const size_t N = m->N;
    const int level = m->capacity.recompute;
    LayerActivations& first = m->acts.layers[0];
    for (int l = 1; l < c.L; l++) {
        LayerActivations& a = m->acts.layers[l];
        if (!m->backward()) { float* logits = a.router_logits; a = first; a.router_logits = logits; }
        if (m->backward() && level >= 1) {
            a.attn_in = first.attn_in; a.qk = first.qk; a.ffn_in = first.ffn_in; a.expert_in = first.expert_in;
        }
        if (m->backward() && level >= 2) {
            a.qkv = first.qkv; a.attn = first.attn; a.x_mid = first.x_mid; a.gate_up = first.gate_up;
            a.router_logits = first.router_logits; a.router_probs = first.router_probs;
        }
        a.router_lse = first.router_lse + l * N;
        a.router_sums = first.router_sums + (size_t)l * c.E;
        a.experts = first.experts + l * N * c.K;
        a.counts = first.counts + (size_t)l * c.E;
    }
    for (LayerActivations& a : m->acts.layers)
        if (expert_group.size == 1) { a.here_assignment_of = a.assignment_of; a.here_weights = a.weights; }
    Scratch& s = m->scratch;
    m->acts.dlogits = m->acts.logits;
    s.weighted_h = s.h;
    s.dexpert_in = s.expert_out;
    s.home_dweights = s.home_weights;
    s.dhome_rows = s.home_rows;
}

// What the plan needs, part by part
std::vector<MemoryPart> memory_plan(const Olmoe& m) {
    std::vector<MemoryPart> plan;
    auto add = [&](const char* name, double bytes, const char* remark = "") {
        if (bytes > 0) plan.push_back({name, bytes, remark});
    };
    add("parameters", (double)m.params_memory.bytes());
    add("gradients", (double)m.grads_memory.bytes());
    add("optimizer", (double)m.optimizer_memory.bytes());
    add("activations", (double)m.acts_memory.bytes());
    add("backward", (double)m.backward_memory.bytes());
    add("cache", (double)m.cache_memory.bytes());
    size_t rows = (size_t)m.capacity.N * m.config.K * 5 / 4;     // with the quarter that reserve_rows adds
    size_t arriving = m.scratch_rows.bytes(rows);
    for (const RowBuffers& r : m.layer_rows) arriving += r.bytes(rows);
    if (expert_group.size > 1) add("arriving rows", (double)arriving, " at even routing");
    add("workspaces", (1.0 + EXPERT_STREAMS) * CUBLAS_WORKSPACE_BYTES, " of cuBLAS");
    for (const MemoryPart& part : device_overhead) add(part.name, part.bytes, part.remark);
    return plan;
}

void memory_allocate(const Olmoe& m, Memory* memory, const std::string& what, size_t times = 1) {
    if (memory->allocate(times, launch_checks.finite)) return;      // what is not written yet is finite
    std::string plan;
    double sum = 0;
    for (const MemoryPart& part : memory_plan(m)) {
        plan += text("%s %s, ", part.name, human(part.bytes, "B").c_str());
        sum += part.bytes;
    }
    plan += "sum " + human(sum, "B");
    die("no memory for %s (%s); the plan: %s. Smaller --batch or --seq, or --recompute, make room", what.c_str(),
        human((double)memory->bytes(times), "B").c_str(), plan.c_str());
}

// Room for so many rows, and a quarter more, in the row buffers of layer l and in those that all layers share. What
// was in a buffer that grows is lost. Growing waits for the device: it is rare.
void reserve_rows(Olmoe* m, int l, size_t rows) {
    for (RowBuffers* b : {&m->layer_rows[l], &m->scratch_rows}) {
        if (rows <= b->rows || b->items.empty()) continue;
        if (b->rows > 0)
            fprintf(stderr, "note: rank %d: %zu rows arrive for the experts of layer %d, there was room for %zu; "
                    "it grows\n", world.rank, rows, l, b->rows);
        cudaCheck(cudaDeviceSynchronize());
        b->release();
        b->rows = rows + rows / 4;
        memory_allocate(*m, b, text("%zu rows for the experts of layer %d", b->rows, l), b->rows);
    }
    share_activations(m);
}

// RoPE's angles in fp32, as everyone computes them: at position 4000 a more exact product would be another model
void rope_tables(Olmoe* m) {
    const int half = m->config.C / m->config.H / 2, T = m->capacity.positions;
    std::vector<float> cosine((size_t)T * half), sine((size_t)T * half);
    for (int j = 0; j < half; j++) {
        float inverse = (float)(1 / pow((double)m->config.rope_theta, 2.0 * j / (2 * half)));
        for (int t = 0; t < T; t++) {
            float angle = (float)t * inverse;
            cosine[(size_t)t * half + j] = (float)cos((double)angle);
            sine[(size_t)t * half + j] = (float)sin((double)angle);
        }
    }
    copy_to_device(m->scratch.cosine, cosine);
    copy_to_device(m->scratch.sine, sine);
}

// Allocates what olmoe_plan, called before, has planned.
void olmoe_allocate(Olmoe* m) {
    memory_allocate(*m, &m->params_memory, "the parameters");
    memory_allocate(*m, &m->acts_memory, "the activations");
    if (!m->cache_memory.items.empty()) memory_allocate(*m, &m->cache_memory, "the cache of keys and values");
    if (m->backward()) {
        memory_allocate(*m, &m->grads_memory, "the gradients");
        memory_allocate(*m, &m->backward_memory, "backward");
    }
    if (m->capacity.use == Use::training) {
        memory_allocate(*m, &m->optimizer_memory, "the optimizer");
        size_t bytes = num_updated(m->tensors) * (m->narrow_moments ? 2 : 4);
        for (void* moment : {m->moment1, m->moment2}) clear_on_device((char*)moment, bytes);
    }
    for (const Tensor& t : m->tensors)
        for (floatX* p : {t.in(m->params), t.in(m->grads)})         // ZeRO-1 also sends what fills up the last share
            if (p && t.allocated() > t.count) clear_on_device(p + t.count, t.allocated() - t.count);
    if (expert_group.size > 1)
        for (int l = 0; l < m->config.L; l++) reserve_rows(m, l, (size_t)m->capacity.N * m->config.K);
    share_activations(m);
    rope_tables(m);
}

void olmoe_allocate(Olmoe* m, const OlmoeConfig& config, const Capacity& capacity) {
    olmoe_plan(m, config, capacity);
    olmoe_allocate(m);
}

void olmoe_free(Olmoe* m) {
    cudaCheck(cudaDeviceSynchronize());
    for (Memory* memory : {&m->params_memory, &m->grads_memory, &m->optimizer_memory, &m->acts_memory,
                           &m->backward_memory, &m->cache_memory})
        memory->release();
    for (RowBuffers& rows : m->layer_rows) rows.release();
    m->scratch_rows.release();
}

// AdamW's state from element `at` on: body(master, moment1, moment2), pointers of the types that they are kept in
template <typename Body> void with_state(const Olmoe& m, size_t at, Body body) {
    auto with_moments = [&](auto* master) {
        if (m.narrow_moments) body(master, (__nv_bfloat16*)m.moment1 + at, (__nv_bfloat16*)m.moment2 + at);
        else body(master, (float*)m.moment1 + at, (float*)m.moment2 + at);
    };
    if constexpr (BF16) {
        if (m.masters == Masters::fp32) return with_moments((float*)m.master_weights + at);
        if (m.masters == Masters::remainder) return with_moments((Remainder*)m.master_weights + at);
    }
    with_moments((NoMaster*)nullptr);
}

void olmoe_init(Olmoe* m, uint64_t seed) {
    for (const Tensor& t : m->tensors) {
        auto fill = [&](auto* p, size_t offset, size_t n) {
            if (n == 0) return;
            if (t.kind == Kind::norm) LAUNCH(fill_kernel, blocks_for(n), p, n, 1.f);
            else LAUNCH(init_normal_kernel, blocks_for(n), p, n, offset, seed, m->config.initializer_range);
        };
        fill(t.in(m->params), t.offset, t.count);
        if (m->master_weights)
            with_state(*m, t.state, [&](auto* master, auto*, auto*) {
                fill(master, t.offset + t.update_begin(), t.update_count());
            });
    }
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
}

// ------------------------------------------------------------------------------------------------
// Forward: a layer is two blocks, each of which adds to the residual stream. The kernel that adds a block's output also
// computes the next block's norm, except before the first layer and after the last.

// attn_in from x
void attention_norm(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    LayerActivations& a = m->acts.layers[l];
    rmsnorm_forward(a.attn_in, a.attn_r, a.x, m->params.layers[l].attn_norm, m->N, c.C, c.rms_norm_eps);
}

// qkv and qk from attn_in, which the layer before has left
void attention_inputs(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    LayerActivations& a = m->acts.layers[l];
    if (l == 0) attention_norm(m, l);
    matmul_forward(main_stream, a.qkv, a.attn_in, p.qkv, m->N, c.C, 3 * c.C);
    qk_norm_rope_forward(a, p, m->scratch, m->acts.positions, m->N, c);
}

// x_mid = x + attn Wo^T, and ffn_in, in whose place the product is before
void attention_output(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    LayerActivations& a = m->acts.layers[l];
    matmul_forward(main_stream, a.ffn_in, a.attn, p.attn_out, m->N, c.C, c.C);
    add_rmsnorm_forward(a.x_mid, a.ffn_in, a.ffn_r, a.x, p.ffn_norm, m->N, c.C, c.rms_norm_eps);
}

void attention_block(Olmoe* m, int l) {
    attention_inputs(m, l);
    attention_forward(m->acts.layers[l], m->scratch, m->batch, m->config);
    attention_output(m, l);
}

// Each token's experts, their weights, and the order of rows by expert, with --ep of visits by rank, from ffn_in
void route(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    LayerActivations& a = m->acts.layers[l];
    Scratch& s = m->scratch;
    matmul_forward(main_stream, a.router_logits, a.ffn_in, m->params.layers[l].router, m->N, c.C, c.E);
    router_forward(a, s, m->N, c);
    dispatch(a.counts, a.row_of, a.assignment_of, s.histogram, a.experts, m->R, c.E);
    if (expert_group.size == 1) return;
    const int G = expert_group.size, mine = c.E / G, pieces = num_pieces(mine);
    cudaCheck(cudaMemsetAsync(a.row_of, 0xff, m->R * sizeof(int), main_stream.stream));
    LAUNCH(visits_kernel, blocks_for(m->R), s.visits, a.experts, m->R, c.K, mine, pieces);
    dispatch(s.visit_counts, a.row_of, a.assignment_of, s.histogram, s.visits, m->R, G * num_kinds(pieces));
}

// Waits until dispatch has counted, and not for what the main stream does next: the host gives the experts' matmuls
// their shapes.
void count_rows(Olmoe* m, int l) {
    const int E = m->config.E, *counts = m->acts.layers[l].counts;
    const Scratch& s = m->scratch;
    RowCounts& rows = m->rows[l];
    const bool alone = expert_group.size == 1;
    if (!alone) exchange_counts(s.arrivals, counts, s.visit_counts, E, l);
    cudaCheck(cudaStreamWaitEvent(copy_stream, copy_event, 0));
    waited(copy_stream);
    rows.sent.resize(E);
    copy_to_host(rows.sent.data(), counts, E, copy_stream);
    launched("counts to the host", copy_stream);
    rows.arrived = rows.sent;
    if (!alone) counts_to_host(&rows, s.visit_counts, s.arrivals);
    cut_rows(&rows);
    if (!alone) reserve_rows(m, l, rows.total());
}

// Rows of ffn_in in the order of the experts: expert_in. With --ep those of the visits: home_rows
void gather_rows(Olmoe* m, int l) {
    LayerActivations& a = m->acts.layers[l];
    const bool alone = expert_group.size == 1;
    gather(alone ? a.expert_in : m->scratch.home_rows, a.ffn_in, a.assignment_of,
           alone ? m->R : m->rows[l].num_sent(), m->config.C, m->config.K);
}

// With --ep, the order by expert of the rows of the visits that arrived
void dispatch_arrived(Olmoe* m, int l) {
    LayerActivations& a = m->acts.layers[l];
    Scratch& s = m->scratch;
    const int n = m->rows[l].num_arrived() * m->config.K, mine = m->config.E / expert_group.size;
    if (n == 0) return;
    cudaCheck(cudaMemsetAsync(a.here_row_of, 0xff, n * sizeof(int), main_stream.stream));
    LAUNCH(own_experts_kernel, blocks_for(n), s.arrived_experts, n, expert_group.rank * mine, mine);
    dispatch(s.here_counts, a.here_row_of, a.here_assignment_of, s.here_histogram, s.arrived_experts, n, mine);
}

// With --ep: the rows (R, C) of a piece of the experts, from those that arrived
void gather_piece(Olmoe* m, int l, int piece, floatX* rows) {
    const Piece& p = m->rows[l].pieces[piece];
    const size_t C = m->config.C;
    if (expert_group.size == 1 || p.rows == 0) return;
    gather(rows + p.first * C, m->scratch.arrived_rows, m->acts.layers[l].here_assignment_of + p.first, p.rows,
           m->config.C, m->config.K);
}

// With --ep: of the visits that end with this piece, the sums over this rank's experts, to where their rows were
void sum_piece(Olmoe* m, int l, int piece, const floatX* y /* (R, C) */, const float* weights /* (A, K) or null */) {
    const Piece& p = m->rows[l].pieces[piece];
    const size_t C = m->config.C, at = p.first_visit * m->config.K;
    if (expert_group.size == 1 || p.visits == 0) return;
    combine(m->scratch.arrived_rows + p.first_visit * C, nullptr, y, weights ? weights + at : nullptr,
            m->acts.layers[l].here_row_of + at, p.visits, m->config.C, m->config.K);
}

// compute(piece) on expert_in; with --ep it is of all ranks' tokens, and give(piece) sends back what came of it. The
// first time without --ep, expert_in is there already; again: with --ep, the experts' numbers and weights are.
template <typename Compute, typename Give>
void rows_to_experts(Olmoe* m, int l, bool again, Compute compute, Give give) {
    const RowCounts& rows = m->rows[l];
    const LayerActivations& a = m->acts.layers[l];
    const Scratch& s = m->scratch;
    const size_t C = m->config.C, K = m->config.K;
    const bool first_time = expert_group.size > 1 && !again;
    if (expert_group.size > 1 || again) gather_rows(m, l);
    if (first_time) {
        gather(s.home_experts, a.experts, a.assignment_of, rows.num_sent(), (int)K, (int)K);
        gather(s.home_weights, a.weights, a.assignment_of, rows.num_sent(), (int)K, (int)K);
    }
    in_pieces((int)rows.pieces.size(), [&](int i) {
        if (i == 0 && first_time)
            bring_rows({{s.arrived_experts, s.home_experts, K * sizeof(int)},
                        {a.here_weights, s.home_weights, K * sizeof(float)}}, rows, -1, "dispatch of weights", l);
        bring_rows({{s.arrived_rows, s.home_rows, C * sizeof(floatX)}}, rows, i, "dispatch to the experts", l);
    }, [&](int i) {
        if (i == 0 && first_time) dispatch_arrived(m, l);
        gather_piece(m, l, i, a.expert_in);
        compute(i);
    }, give);
}

// The residual stream after the layer: x_mid + sum_k w_k y_k. In it the next layer begins: attn_in.
void experts_block(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    const RowCounts& rows = m->rows[l];
    LayerActivations& a = m->acts.layers[l];
    Scratch& s = m->scratch;
    const bool alone = expert_group.size == 1;
    route(m, l);
    if (alone) gather_rows(m, l);           // while the host waits for the counts
    count_rows(m, l);
    rows_to_experts(m, l, false, [&](int piece) {
        experts_gate_up(a, p, rows, piece, c);
        swiglu_forward(s, a, rows.pieces[piece], c.F);
        experts_down(s, p, rows, piece, c);
        sum_piece(m, l, piece, s.expert_out, a.here_weights);
    }, [&](int piece) {
        return_rows({{s.home_rows, s.arrived_rows, c.C * sizeof(floatX)}}, rows, piece, "return from the experts", l);
    });
    const floatX* y = alone ? s.expert_out : s.home_rows;
    const float* weights = alone ? a.weights : nullptr;         // those of other ranks' experts are in their sums
    if (l + 1 == c.L) return combine(m->acts.x, a.x_mid, y, weights, a.row_of, m->N, c.C, c.K);
    LayerActivations& next = m->acts.layers[l + 1];
    combine(next.x, a.x_mid, y, weights, a.row_of, m->N, c.C, c.K, next.attn_in, next.attn_r,
            m->params.layers[l + 1].attn_norm, c.rms_norm_eps);
}

// What backward needs of a layer and --recompute has not kept
void recompute_layer(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    LayerActivations& a = m->acts.layers[l];
    auto nothing = [](int) {};
    if (m->capacity.recompute > 0) attention_norm(m, l);
    if (m->capacity.recompute == 1) {
        qk_norm_rope_forward(a, p, m->scratch, m->acts.positions, m->N, c);
        rmsnorm_forward(a.ffn_in, a.ffn_r, a.x_mid, p.ffn_norm, m->N, c.C, c.rms_norm_eps);
        rows_to_experts(m, l, true, nothing, nothing);
    }
    if (m->capacity.recompute == 2) {
        attention_block(m, l);
        route(m, l);
        rows_to_experts(m, l, true, [&](int piece) { experts_gate_up(a, p, m->rows[l], piece, c); }, nothing);
    }
}

// Checks a micro-batch and makes it the one that the next calls work on. `accumulate`: it is not the first of its step.
void olmoe_set_batch(Olmoe* m, const MicroBatch& batch, bool accumulate = false) {
    const int N = batch.N(), V = m->config.V;
    for (size_t n : {batch.inputs.size(), batch.targets.size(), batch.weights.size(), batch.positions.size()})
        if (N < 1 || n != (size_t)N) die("a micro-batch of %d tokens has arrays of %zu", N, n);
    if (batch.starts[0] != 0) die("the first sequence of a micro-batch begins at token %d", batch.starts[0]);
    if (N > m->capacity.N) die("a micro-batch of %d tokens, where there is room for %d", N, m->capacity.N);
    for (int b = 0; b < batch.B(); b++)
        if (batch.length(b) < 1 || batch.length(b) > m->capacity.T)
            die("sequence %d of a micro-batch has %d tokens; there may be 1 to %d", b, batch.length(b), m->capacity.T);
    for (int t = 0; t < N; t++) {
        const int id = batch.inputs[t], target = batch.targets[t], position = batch.positions[t];
        if (id < 0 || id >= V) die("token id %d at position %d of the batch is outside the vocabulary of %d", id, t, V);
        if (target != IGNORED && (target < 0 || target >= V))
            die("target %d at position %d of the batch is outside the vocabulary of %d", target, t, V);
        if (position < 0 || position >= m->capacity.positions)
            die("position %d at token %d of the batch; there are %d", position, t, m->capacity.positions);
        if (!std::isfinite(batch.weights[t])) die("the weight of target %d of the batch is not finite", t);
    }
    m->batch = batch;
    m->accumulate = accumulate;
    m->N = N;
    m->R = N * m->config.K;
    m->rows.assign(m->config.L, {});
    share_activations(m);
    Activations& a = m->acts;
    copy_to_device(a.inputs, batch.inputs);
    copy_to_device(a.positions, batch.positions);
    copy_to_device(a.targets, batch.targets);
    copy_to_device(a.target_weights, std::vector<float>(batch.weights.begin(), batch.weights.end()));
    if (m->config.flash()) copy_to_device(m->scratch.tiles, attention_tiles(batch));
}

// The layers: the residual stream after the last one
void olmoe_forward(Olmoe* m) {
    const OlmoeConfig& c = m->config;
    Activations& a = m->acts;
    at_phase("forward");
    embedding_forward(a.layers[0].x, a.inputs, m->params.embed, m->N, c.C);
    for (int l = 0; l < c.L; l++) {
        at_layer(l);
        attention_block(m, l);
        experts_block(m, l);
    }
    if (m->lb_global && world.size > 1) {
        size_t n = (size_t)c.L * c.E;
        comm_after_main();
        collective("sum of the experts' rows", -1, COUNTS, n * sizeof(int), [&] {
            const int* counts = a.layers[0].counts;
            ncclCheck(ncclAllReduce(counts, m->scratch.global_counts, n, ncclInt, ncclSum, world.comm, comm_stream));
        });
        main_after_comm();
    }
}

// Logits (rows, V) of `rows` tokens from `first` on
void olmoe_classify(Olmoe* m, int first, int rows) {
    const OlmoeConfig& c = m->config;
    Activations& a = m->acts;
    const floatX* x = a.x + (size_t)first * c.C;
    at_layer(-1);
    rmsnorm_forward(a.final_out, a.final_r + first, x, m->params.final_norm, rows, c.C, c.rms_norm_eps);
    matmul_forward(main_stream, a.logits, a.final_out, m->params.lm_head, rows, c.C, c.V);
}

// dbranch of a chunk, and into the gradient of lm_head, from the chunk's dlogits and final_out. In BF16 several chunks
// are added up in fp32, so that the gradient is rounded once in a micro-batch.
void head_backward(Olmoe* m, int first, int rows) {
    const int C = m->config.C, V = m->config.V;
    const size_t n = (size_t)V * C;
    const bool narrow = BF16 && rows < m->N, last = first + rows == m->N;
    Activations& a = m->acts;
    Scratch& s = m->scratch;
    floatX* dw = m->grads.lm_head;
    float* sums = s.dhead ? s.dhead : (float*)s.dexpert_out;
    if (narrow && dw) matmul_backward_weight(main_stream, sums, a.dlogits, a.final_out, rows, C, V, first > 0);
    else matmul_backward_weight(main_stream, dw, a.dlogits, a.final_out, rows, C, V, m->accumulate || first > 0);
    if (narrow && last && dw)
        LAUNCH_PACKS(head_gradient_kernel, n % PACK == 0, blocks_for(n / P), dw, sums, n, m->accumulate);
    matmul_backward_input(main_stream, s.dbranch + (size_t)first * C, a.dlogits, m->params.lm_head, rows, C, V);
}

// losses of all tokens, after olmoe_forward. With `gradient` also that of their sum, each times its target_weights: of
// the head's parameters, and of the residual stream (dx). In chunks: all logits would be as large as a layer's rows.
void olmoe_head(Olmoe* m, bool gradient) {
    const int N = m->N, C = m->config.C, chunk = m->capacity.classified;
    Scratch& s = m->scratch;
    at_phase("head");
    for (int first = 0; first < N; first += chunk) {
        const int rows = std::min(chunk, N - first);
        olmoe_classify(m, first, rows);
        cross_entropy(m->acts, gradient, first, rows, m->config.V);
        if (gradient) head_backward(m, first, rows);
    }
    if (!gradient) return;
    clear_on_device(s.dx, (size_t)N * C);
    rmsnorm_backward(s.dx, m->grads.final_norm, m->accumulate, s.partial, s.dbranch, m->acts.x, m->params.final_norm,
                     m->acts.final_r, N, C);
}

// After olmoe_head: waits for the device and returns the losses of the micro-batch. The formulas of lb and z are
// above router_forward_kernel; with lb_global, lb is that of the tokens of all ranks.
Losses olmoe_losses(Olmoe* m, double lb_coef = 0, double z_coef = 0) {
    const OlmoeConfig& c = m->config;
    const size_t N = m->N, E = c.E;
    const LayerActivations& all = m->acts.layers[0];
    at_phase("losses");
    m->losses.resize(N);
    m->router_lse.resize(c.L * N);
    m->router_sums.resize(c.L * E);
    copy_to_host(m->losses.data(), m->acts.losses, N);
    copy_to_host(m->router_lse.data(), all.router_lse, m->router_lse.size());
    copy_to_host(m->router_sums.data(), all.router_sums, m->router_sums.size());

    Losses r;
    for (size_t t = 0; t < N; t++) {
        if (m->batch.targets[t] == IGNORED) continue;
        r.nll += m->losses[t];
        r.ce += m->batch.weights[t] * m->losses[t];
        r.valid++;
    }
    std::vector<double> counts, p(m->router_sums.begin(), m->router_sums.end());    // (L, E) rows; sums of p
    for (int l = 0; l < c.L; l++) {
        counts.insert(counts.end(), m->rows[l].sent.begin(), m->rows[l].sent.end());
        for (size_t t = 0; t < N; t++) r.z += (double)m->router_lse[l * N + t] * m->router_lse[l * N + t];
    }
    const double tokens = m->lb_tokens();
    if (m->lb_global && lb_coef != 0) { host_sum(&counts); host_sum(&p); }
    for (size_t i = 0; i < c.L * E; i++) r.lb += counts[i] * (p[i] / tokens);
    r.lb *= lb_coef * E / (c.L * tokens * c.K);
    r.z *= z_coef / ((double)c.L * N * c.K);
    r.loss = r.ce + r.lb + r.z;
    return r;
}

// ------------------------------------------------------------------------------------------------
// Backward: the same blocks in reverse. dx is the gradient of the residual stream, all the way down.

// The inverse of the embedding's look-up: which ids occur, and where. The host sorts by id; the sort is stable, so that
// the positions of an id stay in order. An id's tokens are runs of at most TOKEN_RUN.
void index_tokens(Olmoe* m) {
    const std::vector<int>& inputs = m->batch.inputs;
    std::vector<int> tokens(inputs.size());
    std::iota(tokens.begin(), tokens.end(), 0);
    std::stable_sort(tokens.begin(), tokens.end(), [&](int a, int b) { return inputs[a] < inputs[b]; });
    m->runs.clear();
    for (int i = 0, end, lines = 0; i < m->N; i = end) {
        const int id = inputs[tokens[i]];
        for (end = i; end < m->N && inputs[tokens[end]] == id; end++) {}
        for (int begin = i; begin < end; begin += TOKEN_RUN)
            m->runs.push_back({id, begin, std::min(end, begin + TOKEN_RUN), end - i > TOKEN_RUN ? lines++ : -1});
    }
    copy_to_device(m->scratch.sorted_tokens, tokens);
    copy_to_device(m->scratch.runs, m->runs);
}

// The gradient of ffn_in, a row for each visit (dhome_rows), and dweights, from dx, by the ranks that have the experts
void experts_backward_over_ranks(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    const RowCounts& rows = m->rows[l];
    LayerActivations& a = m->acts.layers[l];
    Scratch& s = m->scratch;
    const size_t row = c.C * sizeof(floatX), weights = c.K * sizeof(float);
    gather(s.dhome_rows, s.dx, a.assignment_of, rows.num_sent(), c.C, c.K);
    in_pieces((int)rows.pieces.size(), [&](int i) {
        bring_rows({{s.arrived_rows, s.dhome_rows, row}}, rows, i, "gradients to the experts", l);
    }, [&](int i) {
        gather_piece(m, l, i, s.dexpert_out);
        experts_backward(s, m->grads.layers[l], m->accumulate, s.arrived_dweights, a, m->params.layers[l], rows, i, c);
        sum_piece(m, l, i, s.dexpert_in, nullptr);
    }, [&](int i) {
        return_rows({{s.dhome_rows, s.arrived_rows, row}, {s.home_dweights, s.arrived_dweights, weights}}, rows, i,
                    "gradients from the experts", l);
    });
    LAUNCH(visit_dweights_kernel, blocks_for(m->R), s.dweights, s.home_dweights, a.row_of, a.experts, m->R, c.K,
           c.E / expert_group.size);
}

// experts_block: x_next = x_mid + sum_k w_k y_k, so dx goes on to x_mid as it is, and to the experts. Calls exchanged()
// after its last exchange of rows, where there is one.
template <typename Body> void experts_block_backward(Olmoe* m, int l, float lb_scale, float z_scale, Body exchanged) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    LayerParameters& g = m->grads.layers[l];
    LayerActivations& a = m->acts.layers[l];
    Scratch& s = m->scratch;
    const int N = m->N, C = c.C, E = c.E;
    const floatX* dexpert_in = s.dexpert_in;
    if (expert_group.size == 1) {
        gather(s.dexpert_out, s.dx, a.assignment_of, m->R, C, c.K);
        experts_backward(s, g, m->accumulate, s.dweights, a, p, m->rows[l], 0, c);
    } else {
        experts_backward_over_ranks(m, l);
        dexpert_in = s.dhome_rows;
        exchanged();
    }
    combine(s.dbranch, nullptr, dexpert_in, nullptr, a.row_of, N, C, c.K);
    const int* counts = m->lb_global && world.size > 1 ? s.global_counts + (size_t)l * E : a.counts;
    router_backward(s, a, counts, lb_scale, z_scale, N, c);
    matmul_backward_weight(main_stream, g.router, s.drouter, a.ffn_in, N, C, E, m->accumulate);
    matmul_backward_input(main_stream, s.dbranch, s.drouter, p.router, N, C, E, 1);
    rmsnorm_backward(s.dx, g.ffn_norm, m->accumulate, s.partial, s.dbranch, a.x_mid, p.ffn_norm, a.ffn_r, N, C);
}

// attention_block: x_mid = x + attn Wo^T
void attention_block_backward(Olmoe* m, int l) {
    const OlmoeConfig& c = m->config;
    const LayerParameters& p = m->params.layers[l];
    LayerParameters& g = m->grads.layers[l];
    LayerActivations& a = m->acts.layers[l];
    Scratch& s = m->scratch;
    const int N = m->N, C = c.C;
    matmul_backward_weight(main_stream, g.attn_out, s.dx, a.attn, N, C, C, m->accumulate);
    matmul_backward_input(main_stream, s.dattn, s.dx, p.attn_out, N, C, C);
    attention_backward(s, a, m->batch, c);
    qk_norm_rope_backward(s, g, m->accumulate, a, p, m->acts.positions, N, c);
    matmul_backward_weight(main_stream, g.qkv, s.dqkv, a.attn_in, N, C, 3 * C, m->accumulate);
    matmul_backward_input(main_stream, s.dbranch, s.dqkv, p.qkv, N, C, 3 * C);
    rmsnorm_backward(s.dx, g.attn_norm, m->accumulate, s.partial, s.dbranch, a.x, p.attn_norm, a.attn_r, N, C);
}

// What is trained of a layer (-1 and L: before and after the layers) by the ranks that hold it: all ranks, or of
// experts replica_group. Calls body(group, tensors, are they experts, layer or -1 for messages) where a group has
// several ranks.
template <typename Body> void for_groups(const Olmoe& m, int layer, Body body) {
    const auto [first, last] = layer_range(m.tensors, layer);
    for (bool experts : {false, true}) {
        const Group& group = experts ? replica_group : world;
        std::vector<const Tensor*> tensors;
        for (size_t i = first; i < last; i++)
            if (m.tensors[i].expert() == experts && !m.tensors[i].frozen) tensors.push_back(&m.tensors[i]);
        if (group.size > 1 && !tensors.empty()) body(group, tensors, experts, layer < m.config.L ? layer : -1);
    }
}

// Sums the gradients of a layer over the ranks that hold them, or of each tensor the rank's share under ZeRO-1, while
// the main stream goes on.
void reduce_gradients(Olmoe* m, int layer) {
    for_groups(*m, layer, [&](const Group& group, const std::vector<const Tensor*>& tensors, bool experts, int named) {
        size_t bytes = 0;
        for (const Tensor* t : tensors) bytes += t->allocated() * sizeof(floatX);
        comm_after_main();
        const char* name = experts ? "reduction of the experts' gradients" : "reduction of gradients";
        collective(name, named, GRADIENTS, bytes, [&] {
            for (const Tensor* t : tensors) {
                floatX *g = t->in(m->grads), *share = g + group.rank * t->share;
                if (shard_optimizer)
                    ncclCheck(ncclReduceScatter(g, share, t->share, nccl_type(g), ncclSum, group.comm, comm_stream));
                else ncclCheck(ncclAllReduce(g, g, t->count, nccl_type(g), ncclSum, group.comm, comm_stream));
            }
        });
    });
}

// The layers' gradients, after olmoe_head with a gradient. The auxiliary losses count 1 / (micro_batches * ranks) each.
// In the `last` micro-batch of a step each layer's gradients are summed over the ranks as soon as they are complete,
// while the main stream goes on with the layer below. With --ep they are summed a little later, after the exchanges of
// the layer below: an exchange after a sum in the same stream would wait for it, and the main stream for the exchange.
void olmoe_backward(Olmoe* m, double lb_coef, double z_coef, int micro_batches, bool last = false) {
    const OlmoeConfig& c = m->config;
    const double LK = (double)c.L * c.K * micro_batches, lb_N = m->lb_tokens(), lb_of = m->lb_global ? 1 : world.size;
    const float lb_scale = (float)(lb_coef * c.E / (LK * lb_of * lb_N * lb_N));
    const float z_scale = (float)(2 * z_coef / (LK * world.size * m->N));
    at_phase("backward");
    index_tokens(m);
    const bool later = expert_group.size > 1;
    auto complete = [&](int layer) { if (last) reduce_gradients(m, layer); };
    if (!later) complete(c.L);
    for (int l = c.L - 1; l >= 0; l--) {
        at_layer(l);
        recompute_layer(m, l);
        experts_block_backward(m, l, lb_scale, z_scale, [&] { complete(l + 1); });
        attention_block_backward(m, l);
        if (!later) complete(l);
    }
    if (later) complete(0);
    at_layer(-1);
    if (!m->accumulate && m->grads.embed) clear_on_device(m->grads.embed, (size_t)c.V * c.C);
    embedding_backward(m->grads.embed, m->scratch, m->runs, c.C);
    complete(-1);
    if (last) main_after_comm();
}

// ------------------------------------------------------------------------------------------------
// Update

// Global L2 norm of the gradients. Where it is not finite, *bad is the first tensor that is not.
double olmoe_grad_norm(Olmoe* m, const Tensor** bad = nullptr, std::vector<double>* by_tensor = nullptr) {
    std::vector<size_t> parts;              // runs of each tensor, in this rank's share: the ranks' sums are added
    size_t runs = 0;
    for (const Tensor& t : m->tensors) {
        int rank = t.group_of_ranks().rank;
        size_t n = t.frozen ? 0 : t.end(rank) - t.begin(rank);
        parts.push_back((size_t)ceil_div(n, SQUARE_SUM_RUN));
        const floatX* share = t.in(m->grads) + t.begin(rank);
        if (n > 0) square_sum(m->scratch.square_sums + runs, share, n);
        runs += parts.back();
    }
    std::vector<float> sums(runs);
    copy_to_host(sums.data(), m->scratch.square_sums, runs);

    std::vector<double> squares;            // by tensor
    auto sum = sums.begin();
    for (size_t n : parts) {
        squares.push_back(std::accumulate(sum, sum + n, 0.0));
        sum += n;
    }
    host_sum(&squares);
    if (by_tensor) *by_tensor = squares;
    double total = 0;
    if (bad) *bad = nullptr;
    for (size_t i = 0; i < squares.size(); i++) {
        if (bad && !*bad && !std::isfinite(squares[i])) *bad = &m->tensors[i];
        total += squares[i];
    }
    return sqrt(total);
}

// Under ZeRO-1: the shares of a layer's tensors that the others updated, while the main stream goes on.
void gather_parameters(Olmoe* m, int layer) {
    if (!shard_optimizer) return;
    for_groups(*m, layer, [&](const Group& group, const std::vector<const Tensor*>& tensors, bool experts, int named) {
        size_t bytes = 0;
        for (const Tensor* t : tensors) bytes += t->share * sizeof(floatX);
        comm_after_main();
        const char* name = experts ? "gathering of the experts" : "gathering of parameters";
        collective(name, named, PARAMETERS, bytes, [&] {
            for (const Tensor* t : tensors) {
                floatX* p = t->in(m->params);
                ncclCheck(ncclAllGather(p + group.rank * t->share, p, t->share, nccl_type(p), group.comm, comm_stream));
            }
        });
    });
}

// One step of AdamW or RMSprop, step = 1, 2, ...; clips as torch.nn.utils.clip_grad_norm_ does.
void olmoe_update(Olmoe* m, int64_t step, double grad_norm, const AdamWOptions& o) {
    float grad_scale = o.grad_clip > 0 ? (float)std::min(1.0, o.grad_clip / (grad_norm + 1e-6)) : 1.f;
    for (int layer = -1; layer <= m->config.L; layer++) {
        const auto [first, last] = layer_range(m->tensors, layer);
        for (size_t i = first; i < last; i++) {
            const Tensor& t = m->tensors[i];
            size_t begin = t.update_begin(), n = t.update_count();
            if (n == 0) continue;
            with_state(*m, t.state, [&](auto* master, auto* moment1, auto* moment2) {
                floatX *p = t.in(m->params) + begin, *g = t.in(m->grads) + begin;
                adamw(p, master, g, moment1, moment2, n, step, grad_scale, o, t.offset + begin);
            });
        }
        gather_parameters(m, layer);
    }
    if (shard_optimizer) main_after_comm();
}

// ------------------------------------------------------------------------------------------------
// What is neither model nor training. Only the training run and main use it.

#include "lib/options.h"        // the command line: one table parses, checks, and prints --help
#include "lib/checkpoint.h"     // Hugging Face directories and the training state beside the weights, as files
#include "lib/weights.h"        // weights and AdamW's state from files into a model, and back
#include "lib/reports.h"        // printed tables, balance of the experts, the first NaN
#include "lib/peak.h"           // the most FLOP/s that a device can do, published or measured
#include "lib/output.h"         // the output directory and its log, Ctrl-C
#include "commands/generate.h"  // olmoe generate, and the samples of a training run
#include "commands/evaluate.h"  // olmoe evaluate, and the evaluations of a training run
#include "commands/verify.h"    // olmoe verify: a comparison with a reference file
#include "commands/tokenize.h"  // olmoe tokenize: text files -> token files
#include "commands/routing.h"   // olmoe routing, and what a training run writes of its experts
#include "commands/info.h"      // olmoe info: parameters, FLOPs, memory and traffic of a shape
#include "lib/rows.h"           // files of conversations and preferences -> rows, kept in a run's directory

// ------------------------------------------------------------------------------------------------
// Learning rate

struct Schedule {
    std::string kind = "cosine";
    double lr = 4e-4, min_lr = 4e-5;
    double warmup = 0, total = 1;           // in steps; fractions come from counts of tokens
};

// Learning rate of step s = 1, 2, ..., as OLMo counts: the tokens of step s are already seen. Warm-up is linear from
// 0.1 lr. The cosine and the line end at min_lr after `total` steps; anneal is a line from lr to 0 without warm-up
// (OLMoE's last 100 B tokens). hf-linear is transformers' get_linear_schedule_with_warmup, a line from 0 to lr and one
// to 0, which counts the updates before this one: the first has rate 0.
double learning_rate(const Schedule& s, double step) {
    if (s.kind == "hf-linear") {
        const double done = step - 1;
        return s.lr * (done < s.warmup ? done / s.warmup : std::max(0.0, (s.total - done) / fabs(s.total - s.warmup)));
    }
    if (s.kind == "anneal") return s.lr * std::max(0.0, 1 - step / s.total);
    if (step < s.warmup) return s.lr * (0.1 + 0.9 * step / s.warmup);
    if (s.kind == "constant") return s.lr;
    double x = s.total > s.warmup ? std::min(1.0, (step - s.warmup) / (s.total - s.warmup)) : 1;
    if (s.kind == "linear") return s.lr + (s.min_lr - s.lr) * x;
    return s.min_lr + (s.lr - s.min_lr) * (1 + cos(M_PI * x)) / 2;
}

// ------------------------------------------------------------------------------------------------
// A training run

// train_options in lib/run.h says what each is. Defaults are OLMoE-1B-7B's (configs/OLMoE-1B-7B-0924.yml of
// allenai/OLMoE), as far as they don't depend on the machine.
struct TrainOptions {
    std::string config, model, out, tokenizer, prompt, trace, rendezvous, reference, ce_divisor = "all";
    std::vector<std::string> data, val, freeze, skip_batches, command;
    Optional resume;
    Steps steps, warmup = "2500", decay_steps;
    Choice objective = "pretrain", schedule = "cosine", order = "global", lb = "rank", optimizer = "adamw";
    Choice master_weights = "fp32", moments = "fp32", token_type = "uint16", label_mask = "assistant";
    int64_t B = 4, T = 0, global_batch = 0, seed = 6198, recompute = 0, ep = 1, zero = 0;
    int64_t save_every = 0, keep_last = 0, keep_every = 0, val_every = 0, val_batches = 0, routing_every = 0;
    int64_t sample_every = 0, sample_tokens = 200, log_every = 1;
    double lr = 4e-4, min_lr = -1, lb_coef = 0.01, z_coef = 0.001, skip_spikes = 0, peak_tflops = 0, timeout = 600;
    double epochs = 0, beta = 0.1;
    AdamWOptions adamw;
    bool no_filter = false, profile = false;
    EvalOptions eval;
};

// The last losses and gradient norms. They are part of a checkpoint, so that a resumed run decides the same.
constexpr size_t SPIKE_WINDOW = 128;
struct SpikeWindow { std::vector<double> losses, norms; };

// Is x an outlier of the window? Adds it.
bool is_spike(std::vector<double>* window, double x, double deviations) {
    double mean = 0, square = 0;
    for (double v : *window) mean += v / window->size();
    for (double v : *window) square += (v - mean) * (v - mean) / window->size();
    bool spike = window->size() >= SPIKE_WINDOW / 2 && x > mean + deviations * sqrt(square);
    window->push_back(x);
    if (window->size() > SPIKE_WINDOW) window->erase(window->begin());
    return spike;
}

struct TrainingRun;
struct StepResult;

// What a run trains for; `pretraining` below is one. In each step run_step asks for the micro-batches, and in each
// micro-batch, between the layers' forward and backward, for the losses and the head's backward.
struct Objective {
    const char* name;
    bool of_rows;                           // of conversations or preferences, `rows`; else of token files
    RowKind rows;
    // This rank's in the next step, as many as on each other rank; with --lb global of as many tokens, too
    std::vector<MicroBatch> (*micro_batches)(TrainingRun* run);
    // The residual stream after the layers is there: fills in the losses, dx, and the gradients of the head, as
    // olmoe_head does. Where weights depend on losses, olmoe_head without a gradient comes first. Returns the loss, or
    // NaN where it is the sum of weights times -log p.
    double (*gradient)(TrainingRun* run);
};

struct TrainingRun {
    TrainOptions o;
    OlmoeConfig config;
    const Objective* objective = nullptr;
    Schedule schedule;
    DataLoader data, val;
    Tokenizer tokenizer;
    bool has_tokenizer = false;
    ModelFiles came_with;                   // for the checkpoints
    DomainTable domains;                    // of the validation file, where its documents have few
    RoutingInput routing;                   // of --routing-every
    Evaluation eval;
    Finetuning rows;                        // in the place of token files; `data` has their order
    int micro_batch = 0;                    // of the step, at work
    std::vector<double> measures;           // Measure: of this rank's rows in the step
    double tokens_per_step = 0;             // of token files
    int64_t steps = 0;                      // the run ends after so many
    int micro_batches = 1;                  // of this rank in a step

    Olmoe model;
    Cache cache;                            // of the samples
    Peak peak;                              // FLOP/s of a rank
    std::string from;                       // the checkpoint that it resumed from, or ""
    std::vector<std::pair<std::string, std::string>> changed;   // what of its recipe is different now

    int64_t step = 0, first_step = 0;       // steps done; when this process started
    int64_t updates = 0;                    // steps that were not skipped: AdamW's count
    SpikeWindow spikes;
    Balance balance;                        // of the steps since the last run_validate; in it, of the validation data
    FILE* log = nullptr;
    double started = 0;
    bool stop = false;                      // a signal asked for it

    // olmoe batch --replay: the step that is looked into, 0 for a run that trains and writes. at_gradient is called
    // before its update, with the squares of the gradient's norm by tensor
    int64_t replayed = 0;
    std::function<void(const std::vector<MicroBatch>&, const StepResult&, const std::vector<double>&)> at_gradient;
};

struct StepResult {
    Losses losses;                          // of all ranks
    Balance balance;                        // of all ranks' micro-batches
    std::vector<double> measures;           // of all ranks
    double norm = 0, lr = 0, seconds = 0, tokens = 0, length = 0;   // tokens of the step; of its sequences, FLOPs' mean
    bool skipped = false;
    double sent[TRAFFICS] = {};             // bytes that this rank gave to collectives

    // Cross entropy of a token, whatever the divisor that trains
    double ce() const { return losses.valid ? losses.nll / losses.valid : 0; }
};

// ------------------------------------------------------------------------------------------------
// What preference tuning minimises. logp is the sum of log p over a sequence's targets, r = logp - logp_reference its
// log-ratio, s the sigmoid. A slope is the loss's derivative by a logp; what it makes of logits is olmoe_head's.
//
//   DPO (Rafailov et al. 2023), of a pair:    loss = -log s(beta (r_chosen - r_rejected))
//                                             dloss/dr_chosen = -dloss/dr_rejected
//                                                             = -beta s(-beta (r_chosen - r_rejected))
//   KTO (Ethayarajh et al. 2024), of a row:   loss = 1 - s(x),   x = beta (r - kl) if desirable, else beta (kl - r)
//                                             dloss/dr = -+beta s(x) (1 - s(x))
//   kl = max(0, mean of r over the step's mismatched rows), a constant

double sigmoid(double x) { return 1 / (1 + exp(-x)); }

double kto_kl(const std::vector<double>& logps, const double* reference) {
    double sum = 0;
    for (size_t i = 0; i < logps.size(); i++) sum += logps[i] - reference[i];
    return std::max(0.0, sum / (double)logps.size());
}

// The slopes of the sequences of rows `numbers`, and their part of the measures; each row counts `weight` in the loss.
std::vector<double> preferences(const TrainOptions& o, const Rows& rows, const std::vector<size_t>& numbers,
                                const std::vector<double>& logps, const ReferenceLogps& reference, double kl,
                                double weight, std::vector<double>* sums) {
    std::vector<double> slopes, &sum = *sums;
    const size_t sides = rows.sides();
    for (size_t i = 0; i < numbers.size(); i++) {
        auto ratio = [&](size_t side) { return logps[i * sides + side] - reference.rows[numbers[i] * sides + side]; };
        if (sides == 2) {
            const double x = o.beta * (ratio(0) - ratio(1)), slope = o.beta * sigmoid(-x) * weight;
            sum[LOSS] += weight * (std::max(-x, 0.0) + log1p(exp(-fabs(x))));
            sum[CHOSEN] += logps[2 * i]; sum[REJECTED] += logps[2 * i + 1]; sum[CHOSENS]++; sum[REJECTEDS]++;
            sum[REWARD_MARGIN] += x; sum[ACCURATE] += x > 0;
            slopes.insert(slopes.end(), {-slope, slope});
        } else {
            const double sign = rows.labels[numbers[i]] ? 1 : -1, s = sigmoid(sign * o.beta * (ratio(0) - kl));
            sum[LOSS] += weight * (1 - s);
            sum[sign > 0 ? CHOSEN : REJECTED] += o.beta * ratio(0); sum[sign > 0 ? CHOSENS : REJECTEDS]++;
            slopes.push_back(-sign * o.beta * s * (1 - s) * weight);
        }
    }
    return slopes;
}

// The loss is what the weights say.
double weighted_gradient(TrainingRun* run) {
    olmoe_head(&run->model, true);
    return NAN;
}

#include "lib/finetune.h"       // sft, dpo, kto: rows dealt to ranks, what the reference says of them, validation
#include "lib/run.h"            // a run's options, table, report, and its checkpoints: saving and resuming

// Every target counts the same: 1 / all positions of the step, or 1 / those with a target.
std::vector<MicroBatch> pretraining_micro_batches(TrainingRun* run) {
    const TrainOptions& o = run->o;
    const size_t rows = (size_t)o.B * o.T;
    std::vector<int> inputs(rows * run->micro_batches), targets(inputs.size());
    dataloader_next(&run->data, (int)o.global_batch, world.rank, world.size, inputs.data(), targets.data());
    double valid = 0;
    if (o.ce_divisor == "valid")
        valid = host_sum((double)std::count_if(targets.begin(), targets.end(), [](int t) { return t != IGNORED; }));
    const double weight = 1 / divisor_of(o.ce_divisor, run->tokens_per_step, valid);
    std::vector<MicroBatch> batches;
    for (int i = 0; i < run->micro_batches; i++)
        batches.push_back(batch_of_rows(&inputs[i * rows], &targets[i * rows], (int)o.B, (int)o.T, weight));
    return batches;
}

static const Objective pretraining = {"pretrain", false, RowKind::sft, pretraining_micro_batches, weighted_gradient};

// Sequences of a validation
size_t validated_instances(const TrainingRun& run) {
    const size_t all = run.val.instances;
    return run.o.val_batches > 0 ? std::min(all, (size_t)(run.o.val_batches * run.o.B)) : all;
}

// Ranks and files, when the options are there; nothing of the device
void run_open(TrainingRun* run) {
    TrainOptions& o = run->o;
    choose_state(&run->model, o.master_weights, o.moments);

    ranks_open(o.rendezvous, o.timeout, o.ep, o.zero == 1);
    stopping_saves = ranks.size > 1;        // a signal to one rank must not end the others: they make one step

    config_read(&run->config, o.config.empty() ? o.model : o.config);
    run->objective = o.objective == "pretrain" ? &pretraining : finetune_objective(o.objective);
    run_check_options(run);
    const OlmoeConfig& c = run->config;
    run_open_files(run);
    if (run->objective->of_rows) return;    // run_start opens them, when the ranks share OUT
    const DataOrder order = o.order == "global" ? DataOrder::global : DataOrder::sequential;
    dataloader_open(&run->data, o.data, (int)o.T, c.V, order, o.seed, !o.no_filter, o.token_type);
    if (o.global_batch > (int64_t)run->data.instances)
        die("--global-batch %ld is more than the %zu sequences of the data; use a smaller one, or a smaller --seq",
            o.global_batch, run->data.instances);
    if (!o.val.empty()) {                   // all of it is checked now, not after hours
        dataloader_open(&run->val, o.val, (int)o.T, c.V, DataOrder::sequential, 0, false, o.token_type);
        dataloader_check(&run->val, validated_instances(*run), ranks_alive);
    }
    if (o.routing_every > 0) routing_of_run_open(&run->routing, c, run->val, validated_instances(*run));
    if (run->val.files.size() == 1) domains_open(&run->domains, run->val.files[0], c);
    run_set_steps(run);
}

// Device, memory, and weights: random, of a model, or of a checkpoint
void run_start(TrainingRun* run) {
    TrainOptions& o = run->o;
    Olmoe& m = run->model;
    const bool writes = run->replayed == 0;
    if (writes) output_make(o.out);
    device_open();
    comm_open();
    if (writes) output_lock(o.out);
    if (run->objective->of_rows) run_open_rows(run);
    run->from = writes ? checkpoint_to_resume(*run) : checkpoint_to_replay(*run);
    if (writes) output_check(o.out);

    run->peak = machine_peak(o.peak_tflops);
    const int prompt = run->has_tokenizer ? (int)sample_prompt(run->tokenizer, o.prompt).size() : 0;
    const int positions = std::min(run->config.max_T, prompt + (int)o.sample_tokens);
    const int64_t sequences = o.B * sides_of(*run->objective);
    Capacity capacity = capacity_of_rows(run->config, sequences, o.T, Use::training, (int)o.recompute);
    if (run->has_tokenizer) capacity.positions = positions;
    evaluation_capacity(run->eval, &capacity);
    olmoe_plan(&m, run->config, capacity);
    if (run->has_tokenizer) slots_plan(&run->cache, &m, 1, positions);
    evaluation_plan(&run->eval, &m);
    olmoe_allocate(&m);
    m.lb_global = o.lb == "global";
    if (!run->from.empty()) run_resume(run);
    if (run->objective->of_rows) finetune_reference(run);
    if (!run->from.empty()) run_load(run);
    else if (!o.model.empty()) olmoe_load(&m, o.model);
    else olmoe_init(&m, o.seed);
    run->first_step = run->step;
    log_open(run);
    if (!o.trace.empty()) trace_write(trace_path(o));           // an error now, not after a step
    stopping_saves = true;
    run->started = seconds_now();
}

// Sums the losses and the experts' rows over the ranks, and finds out together whether to stop, or who met a NaN: the
// same numbers on each rank, so that all decide the same. not_finite: where this rank met the first, or "".
void run_agree(TrainingRun* run, StepResult* r, const std::string& not_finite) {
    Losses& l = r->losses;
    std::vector<double>& counts = r->balance.counts;
    std::vector<double> sums = {l.loss, l.lb, l.z, l.nll, (double)l.valid, (double)stop_requested};
    r->measures = run->measures;
    sums.insert(sums.end(), r->measures.begin(), r->measures.end());
    const size_t n = sums.size();
    sums.resize(n + world.size, 0);
    sums[n + world.rank] = !not_finite.empty();
    sums.insert(sums.end(), counts.begin(), counts.end());
    host_sum(&sums);
    l.loss = sums[0]; l.lb = sums[1]; l.z = sums[2]; l.nll = sums[3]; l.valid = (int64_t)sums[4];
    l.ce = l.loss - l.lb - l.z;
    std::copy(sums.end() - counts.size(), sums.end(), counts.begin());
    run->stop = sums[5] > 0;
    std::copy_n(sums.begin() + 6, r->measures.size(), r->measures.begin());
    for (int rank = 0; rank < world.size; rank++) {
        if (sums[n + rank] == 0) continue;
        if (rank == world.rank)
            die("step %ld: the loss is not finite; first in %s. The last checkpoint in %s is untouched", run->step,
                not_finite.c_str(), run->o.out.c_str());
        sleep(3);                           // that rank's line comes first, and its end ends all
    }
}

// Forward and backward of each micro-batch, then one update, unless the step is a spike
StepResult run_step(TrainingRun* run) {
    const TrainOptions& o = run->o;
    Olmoe* m = &run->model;
    StepResult r;
    const double start = seconds_now();
    double before[TRAFFICS];
    std::copy(traffic, traffic + TRAFFICS, before);
    run->step++;
    if (o.profile && run->step == run->steps) cudaCheck(cudaProfilerStart());
    at_step(text("step %ld", run->step));
    if (!o.trace.empty() && run->step == run->first_step + 1) trace_begin();    // its first two micro-batches

    run->measures.assign(run->objective->of_rows ? MEASURES : 0, 0.0);
    const std::vector<MicroBatch> batches = run->objective->micro_batches(run);
    const int parts = (int)batches.size() * world.size;         // the step takes the mean of their auxiliary losses
    std::string not_finite;
    for (size_t i = 0; i < batches.size(); i++) {
        olmoe_set_batch(m, batches[i], i > 0);
        olmoe_forward(m);
        run->micro_batch = (int)i;
        const double own = run->objective->gradient(run);
        olmoe_backward(m, o.lb_coef, o.z_coef, (int)batches.size(), i + 1 == batches.size());
        Losses l = olmoe_losses(m, o.lb_coef / parts, o.z_coef / parts);
        if (!std::isnan(own)) l.loss += own - l.ce;
        if (!std::isfinite(l.loss) && not_finite.empty()) not_finite = find_non_finite(m);
        r.losses.add(l);
        r.balance.add(*m);
        if (trace.on && (i == 1 || i + 1 == batches.size())) trace_end(trace_path(o));
    }
    at_phase("agreement");
    run_agree(run, &r, not_finite);
    run->balance.add(r.balance);

    at_phase("update");
    const Tensor* bad = nullptr;
    std::vector<double> squares;
    r.norm = olmoe_grad_norm(m, &bad, &squares);
    if (!std::isfinite(r.norm))
        die("step %ld: the gradient is not finite; first in %s. The last checkpoint in %s is untouched", run->step,
            bad ? ("the tensor that begins with " + file_name_of(*bad, run->config)).c_str() : "all of them together",
            o.out.c_str());
    if (run->step == run->replayed) run->at_gradient(batches, r, squares);
    if (o.skip_spikes > 0) {
        bool loss = is_spike(&run->spikes.losses, r.losses.loss, o.skip_spikes);
        r.skipped = is_spike(&run->spikes.norms, r.norm, o.skip_spikes) || loss;
    }
    AdamWOptions optimizer = o.adamw;
    optimizer.lr = r.lr = learning_rate(run->schedule, (double)run->step);
    if (!r.skipped) olmoe_update(m, ++run->updates, r.norm, optimizer);
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
    at_step("");
    const RowStep& rows = run->rows.step;
    r.tokens = run->objective->of_rows ? rows.tokens : run->tokens_per_step;
    r.length = run->objective->of_rows ? rows.squares / rows.tokens : (double)o.T;
    if (o.profile && run->step == run->steps) cudaCheck(cudaProfilerStop());
    r.seconds = seconds_now() - start;
    for (int i = 0; i < TRAFFICS; i++) r.sent[i] = traffic[i] - before[i];
    return r;
}

// In nats a token, and in bits a byte, where tokens are bytes, EOS not counted as one
struct Validation { double loss = 0, bits_per_byte = 0; };

// One pass over the sequences of the validation data, or over its first --val-batches batches
Validation validate(TrainingRun* run, bool by_domain) {
    Olmoe* m = &run->model;
    const int B = (int)run->o.B, eos = run->has_tokenizer ? run->tokenizer.eos : -1;
    double nll = 0, tokens = 0, ends = 0;
    const int64_t batches = ceil_div(validated_instances(*run), B);
    for_batches(m, &run->val, B, batches, olmoe_forward, [&](size_t first, int) {
        olmoe_head(m, false);
        const Losses l = olmoe_losses(m);
        nll += l.nll;
        tokens += l.valid;
        ends += std::count(m->batch.targets.begin(), m->batch.targets.end(), eos);
        run->balance.add(*m);
        if (by_domain) domains_add(&run->domains, m, first * run->o.T);
    });
    std::vector<double> sums = {nll, tokens, ends};
    host_sum(&sums);
    nll = sums[0]; tokens = sums[1]; ends = sums[2];
    if (by_domain) host_sum(&run->domains.counts);
    Validation v;
    v.loss = tokens > 0 ? nll / tokens : 0;
    if (run->has_tokenizer && run->tokenizer.bytes && tokens > ends) v.bits_per_byte = nll / (tokens - ends) / log(2.0);
    return v;
}

// Validation loss, and how evenly the experts are used: on the screen and in the step's line for the log
void run_validate(TrainingRun* run, Json* line) {
    const bool by_domain = run->step == run->steps && run->domains.names.size() > 1;
    at_step("validation");
    const bool any = !run->o.val.empty(), of_rows = run->objective->of_rows;
    if (any) run->balance.reset(run->config);                   // of the validation data alone
    if (any && of_rows) finetune_validate(run, line);
    if (any && !of_rows) {
        const Validation v = validate(run, by_domain);
        const bool in_bits = v.bits_per_byte > 0 && std::isfinite(v.loss);
        const std::string bits = in_bits ? text(", %.4f bits per byte", v.bits_per_byte) : "";
        printf("  validation loss %.4f%s\n", v.loss, bits.c_str());
        (*line)["val_loss"] = digits(v.loss);
        if (in_bits) (*line)["val_bpb"] = digits(v.bits_per_byte);
        if (by_domain) print_domains(run->domains, run->config);
        host_sum(&run->balance.counts);
    }
    print_balance(run->balance);
    (*line)["balance"] = balance_json(run->balance);
    run->balance.reset(run->config);
    at_step("");
}

// What the experts do with a part of the validation data, in files beside the checkpoints
void run_routing(TrainingRun* run) {
    const Tokenizer* tokenizer = run->has_tokenizer ? &run->tokenizer : nullptr;
    output_follow(&run->o.out);
    routing_in_run(&run->model, &run->routing, (int)run->o.B, tokenizer, run->o.out, run->step);
}

// A text that the model continues
void run_sample(TrainingRun* run) {
    const TrainOptions& o = run->o;
    const uint64_t seed = o.seed + run->step;
    at_step("sample");
    print_sample(o.prompt, sample_text(&run->model, run->cache, run->tokenizer, o.prompt, o.sample_tokens, seed));
    at_step("");
}

void run_close(TrainingRun* run) {
    if (run->stop) printf("stopped at step %ld and saved; go on with --resume\n", run->step);
    if (double masked = host_sum((double)dataloader_masked(&run->data)))
        printf("%.0f sequences were repetitive and had no targets\n", masked);
    log_close(run);
    olmoe_free(&run->model);
    comm_close();
    device_close();
    ranks_leave();
    dataloader_close(&run->data);
    if (!run->o.val.empty()) dataloader_close(&run->val);
}

int command_train(int argc, char** argv) {
    TrainingRun run;
    const TrainOptions& o = run.o;
    ranks.rank = ranks_number();            // until they have met
    train_options_parse(&run.o, argc, argv);
    run_open(&run);
    run_start(&run);
    run_table(run);
    if (o.eval.start && run.step == 0) run_evaluate_start(&run);
    while (run.step < run.steps && !run.stop) {
        const StepResult result = run_step(&run);
        auto due = [&](int64_t every) { return every > 0 && run.step % every == 0; };
        const bool last = run.step == run.steps;    // a run that is stopped only saves: it may not have long
        Json line = run_report(run, result);
        if (last || due(o.val_every)) run_validate(&run, &line);
        if (run.eval.o.any() && (last || due(o.eval.every))) evaluation_in_run(&run.eval, &run.model, &line);
        log_line(run, line);
        if (last || run.stop || due(o.save_every)) run_save(&run);
        if (o.routing_every > 0 && (last || due(o.routing_every))) run_routing(&run);
        if (run.has_tokenizer && (last || due(o.sample_every))) run_sample(&run);
        fflush(stdout);
    }
    run_close(&run);
    return 0;
}

#include "commands/batch.h"     // olmoe batch: what was in a step, and its gradients

// ------------------------------------------------------------------------------------------------

#ifndef TESTING
int main(int argc, char** argv) {
    struct { const char* name; int (*run)(int, char**); const char* help; } commands[] = {
        {"train", command_train, "train a model, from random weights or from a Hugging Face directory"},
        {"generate", command_generate, "continue texts, or talk to an Instruct model"},
        {"batch", command_batch, "what a step of a run trained on"},
        {"evaluate", command_evaluate, "perplexity of token files, and accuracy on multiple-choice tasks"},
        {"routing", command_routing, "which experts texts go to: figures, and a page to look through"},
        {"verify", command_verify, "compare logits, losses, gradients and routing with a reference file"},
        {"tokenize", command_tokenize, "text to token files"},
        {"info", command_info, "parameters, FLOPs and memory plan of a config or a model"},
    };
    process_prepare();
    for (auto& c : commands)
        if (argc > 1 && strcmp(argv[1], c.name) == 0) {
            int code = 1;
            try { code = c.run(argc, argv); } catch (const std::bad_alloc&) { die("out of memory"); }
            print_check();
            return code;
        }
    bool help = false;
    for (const char* word : {"--help", "-h", "help"}) help |= argc > 1 && strcmp(argv[1], word) == 0;
    if (argc > 1 && !help) die("unknown command '%s'; see olmoe --help", argv[1]);
    printf("usage: olmoe COMMAND [options]; olmoe COMMAND --help lists them\n");
    for (auto& c : commands) printf("  %-10s %s\n", c.name, c.help);
    print_check();
    return help ? 0 : 1;
}
#endif
