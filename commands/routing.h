// olmoe routing: what the experts of a model do with texts. Training runs write it down as they go.
//
// The definitions are those of the paper's section 5 (spec section 10). All counts are of this rank's pieces until
// routing_sum; none of the tables grows with the text.
//
// Included once, by olmoe.cu, after the model.
#pragma once
#include <functional>
#include <thread>
#include "evaluate.h"
#include "routing_page.h"
#include "tokenize.h"

// ------------------------------------------------------------------------------------------------
// What is read: token files, and texts that become one

// A document, or a whole file: its tokens, up to `end`, are of a domain.
struct DomainRun { size_t end; int domain; };

// A file of RoutingInput's data
struct RoutingFile {
    std::vector<DomainRun> runs;            // in order; the last one's end is that of the tokens, or after it
    size_t offset = 0;                      // of its first token, in what `runs` counts
    size_t sampled = 0, sample = 0;         // its first `sampled` tokens are in the sample, from there on
};

struct RoutingInput {
    DataLoader data;                        // the pieces, in the order of reading
    std::vector<RoutingFile> files;         // as those of data
    std::vector<std::string> domains;
    std::set<std::string> names;            // of files that are a domain
    std::string hash;                       // of all tokens, once they are read
};

constexpr size_t ROUTING_SAMPLE = 20000;    // tokens whose choices are kept: of a page, or of a step of training

// A file without a name, which goes when it is closed
FILE* file_temporary() {
    std::error_code none;
    std::string name = (std::filesystem::temp_directory_path(none) / "olmoe-XXXXXX").string();
    const int fd = mkostemp(&name[0], O_CLOEXEC);
    if (fd < 0) die("cannot write a temporary file %s: %s", name.c_str(), strerror(errno));
    unlink(name.c_str());
    return fdopen(fd, "w+b");
}

template <typename T> void temporary_write(FILE* f, const std::vector<T>& all) {
    if (fwrite(all.data(), sizeof(T), all.size(), f) != all.size())
        die("cannot write a temporary file: %s; TMPDIR names another folder for it", strerror(errno));
}

// A text's tokens, all of it unstripped and without special ones, as a token file of uint32 without a name: texts may
// be larger than the memory. At least `most` of them, if there are so many.
TokenFile text_tokens(const std::string& path, const Tokenizer& t, size_t most) {
    InputReader as_tokenize;
    inputs_check(&as_tokenize, {path});
    LineReader lines;
    if (!lines_open(&lines, path)) die("%s: cannot be read: %s", path.c_str(), strerror(errno));
    TokenFile f;
    f.path = path;
    f.width = 4;
    FILE* file = file_temporary();
    bool last = false;
    std::string part;
    for (std::vector<int> ids; !last && f.tokens < most; ids.clear()) {
        lines_piece(&lines, &part, BATCH_BYTES, &last);
        if (lines.failed) die("%s: cannot be read to its end; the file is damaged or cut short", path.c_str());
        if (f.tokens == 0 && utf16_mark(part)) die("%s: UTF-16, and not UTF-8", path.c_str());
        tokenizer_encode(t, part, &ids);
        temporary_write(file, ids);
        f.tokens += ids.size();
        ranks_alive();
    }
    gzclose(lines.file);
    if (fflush(file) != 0) temporary_write(file, std::vector<int>(1));  // says why
    f.bytes = f.tokens * sizeof(int);
    void* map = f.bytes == 0 ? nullptr : mmap(nullptr, f.bytes, PROT_READ, MAP_SHARED, fileno(file), 0);
    if (map == MAP_FAILED) die("%s: its tokens cannot be memory-mapped: %s", path.c_str(), strerror(errno));
    f.map = (const unsigned char*)map;
    fclose(file);
    return f;
}

int domain_named(RoutingInput* in, const std::string& name) {
    const auto found = std::find(in->domains.begin(), in->domains.end(), name);
    if (found == in->domains.end()) { in->domains.push_back(name); return (int)in->domains.size() - 1; }
    return (int)(found - in->domains.begin());
}

// Where which domain is in a file: those of its documents, if they have several, else that of the file's own name. The
// domain of documents may be in several files.
std::vector<DomainRun> domain_runs(RoutingInput* in, const TokenFile& f) {
    std::string problem;
    std::vector<DomainRun> runs;
    DomainNames of_documents;
    const std::vector<Document> documents = documents_read(f, &problem);
    if (!problem.empty() && world.rank == 0) fprintf(stderr, "note: %s; the file is one domain\n", problem.c_str());
    if (!domains_of(documents, &of_documents) || of_documents.names.size() < 2) {
        const std::string name = evaluation_name(f.path, &in->names);
        const size_t before = in->domains.size();
        runs.push_back({f.tokens, domain_named(in, name)});
        if (in->domains.size() == before) die("%s: a domain of documents is named %s, too", f.path.c_str(), name.c_str());
        return runs;
    }
    for (size_t i = 0; i < documents.size(); i++) {
        const std::string& name = of_documents.names[of_documents.of[i]];
        if (in->names.count(name)) die("%s: another file is named as its domain %s", f.path.c_str(), name.c_str());
        runs.push_back({documents[i].end, domain_named(in, name)});
    }
    return runs;
}

// Adds a file whose pieces are `pieces`, from its first token on.
void input_add(RoutingInput* in, TokenFile f, size_t pieces, RoutingFile more) {
    f.instances = pieces;
    f.first = in->data.instances;
    in->data.instances += pieces;
    in->data.files.push_back(f);
    in->files.push_back(std::move(more));
}

// Text and token files whole, or the whole pieces in the first max_tokens of each; 0: no limit
void input_open(RoutingInput* in, const std::vector<std::string>& paths, const Tokenizer* tokenizer, int T, int V,
               int64_t max_tokens, const std::string& token_type) {
    DataLoader& d = in->data;
    d.T = T;
    d.V = V;
    d.order = DataOrder::sequential;
    const size_t most = max_tokens > 0 ? (size_t)max_tokens : SIZE_MAX;
    if (most < (size_t)T) die("--max-tokens %ld is less than one piece of --seq %d", max_tokens, T);
    for (const std::string& path : paths) {
        TokenFile f;
        if (ends_with(path, ".txt") || ends_with(path, ".txt.gz")) {
            if (!tokenizer) die("%s: text needs a tokenizer: give --tokenizer NAME", path.c_str());
            f = text_tokens(path, *tokenizer, most);
        } else if (ends_with(path, ".npy") || ends_with(path, ".bin")) {
            token_file_open(&f, path, token_type == "uint32" ? 4 : 2);
            if (f.header == 0) token_file_check(f, V, token_file_blocks(f, 8), true);
        } else {
            die("%s: neither .txt (text) nor .npy or .bin (tokens); rename it if it is one of them", path.c_str());
        }
        const size_t pieces = std::min(f.tokens, most) / T;
        if (pieces == 0) die("%s: its %zu tokens are less than one piece of --seq %d", path.c_str(), f.tokens, T);
        input_add(in, f, pieces, {domain_runs(in, f)});
    }
    dataloader_check(&d, d.instances, ranks_alive);
}

// The first tokens of each file as a sample of at most `most`. Returns how many there are.
size_t input_sample(RoutingInput* in, size_t most) {
    size_t sampled = 0;
    for (size_t i = 0; i < in->files.size(); i++) {
        const size_t all = in->data.files[i].instances * in->data.T, left = in->files.size() - i;
        in->files[i].sample = sampled;
        in->files[i].sampled = std::min(all, (most - sampled) / left);
        sampled += in->files[i].sampled;
    }
    return sampled;
}

// ------------------------------------------------------------------------------------------------
// What is counted

// How often an id had an expert as its first choice, and the position where it first had
struct FirstChoices { int expert; int64_t count, first; };
using IdTable = std::vector<std::vector<FirstChoices>>;         // (V)

enum Word { INPUT, TARGET, PREDICTED, WORDS };
constexpr const char* WORD_NAMES[WORDS] = {"input", "target", "predicted"};

// Tables of a layer, by expert
struct LayerRouting {
    std::vector<double> counts, top1, probs;        // (domains, E) assignments, first choices, sums of p
    std::vector<double> together, ranked;           // (E, E)
    double entropy = 0, logits = 0, max_logit = -INFINITY;      // sums over tokens, over tokens and experts; largest
    double same_top1 = 0, same = 0;                 // as the later model: first choices, and experts of the K
    IdTable words[WORDS];
};

struct Routing {
    OlmoeConfig config;
    std::vector<double> tokens;                     // (domains)
    std::vector<LayerRouting> layers;
    double hash[2] = {0, 0};                        // halves of the sum of the pieces' hashes, modulo 2^32
    // the sample, (n), (n, L, K) and, of each token given those before it, -log p
    std::vector<int> ids;
    std::vector<uint8_t> choices, weights;          // weights in 255ths
    std::vector<float> losses;                      // NaN where nothing is before it
};

constexpr int SAMPLE_EXPERTS = 256;         // a byte for each choice

// A micro-batch's routers, on the host
struct RouterOutput {
    std::vector<float> logits;              // (L, N, E)
    std::vector<int> experts;               // (L, N, K)
    std::vector<int> predicted;             // (N)
};

void routing_begin(Routing* r, const OlmoeConfig& c, const RoutingInput& in, size_t sampled) {
    const size_t domains = in.domains.size(), E = c.E;
    r->config = c;
    r->tokens.assign(domains, 0);
    r->layers.assign(c.L, {});
    for (LayerRouting& l : r->layers) {
        for (auto* of_domains : {&l.counts, &l.top1, &l.probs}) of_domains->assign(domains * E, 0);
        for (auto* pairs : {&l.together, &l.ranked}) pairs->assign(E * E, 0);
        for (IdTable& table : l.words) table.resize(c.V);
    }
    r->ids.assign(sampled, 0);
    r->choices.assign(sampled * c.L * c.K, 0);
    r->weights = r->choices;
    r->losses.assign(sampled, 0);
}

// olmoe_forward, which hands the host what each router said before the next layer takes its place
void routing_forward(Olmoe* m, RouterOutput* out) {
    const OlmoeConfig& c = m->config;
    const size_t N = m->N;
    at_phase("forward");
    out->logits.resize(c.L * N * c.E);
    out->experts.resize(c.L * N * c.K);
    embedding_forward(m->acts.layers[0].x, m->acts.inputs, m->params.embed, m->N, c.C);
    for (int l = 0; l < c.L; l++) {
        const LayerActivations& a = m->acts.layers[l];
        at_layer(l);
        attention_block(m, l);
        experts_block(m, l);
        copy_to_host(&out->logits[l * N * c.E], a.router_logits, N * c.E);
        copy_to_host(&out->experts[l * N * c.K], a.experts, N * c.K);
    }
}

// The likeliest id of each token, of equal ones the lowest, in the place of its target. One warp per token.
__global__ void predict_kernel(int* targets, const floatX* logits, int N, int V) {
    const size_t row = thread_index() / WARP;
    if (row >= (size_t)N) return;
    logits += row * V;
    float best = -INFINITY;
    int id = V;
    for (int i = threadIdx.x % WARP; i < V; i += WARP)
        if ((float)logits[i] > best) { best = (float)logits[i]; id = i; }
    warp_argmax(best, id);
    if (threadIdx.x % WARP == 0) targets[row] = id < V ? id : 0;        // where all are NaN, the loss is, too
}

// olmoe_head without a gradient, with the likeliest id at each position
void routing_head(Olmoe* m, std::vector<int>* predicted) {
    Activations& a = m->acts;
    at_phase("head");
    for (int first = 0, rows; first < m->N; first += rows) {
        rows = std::min(m->capacity.classified, m->N - first);
        olmoe_classify(m, first, rows);
        cross_entropy(a, false, first, rows, m->config.V);
        LAUNCH(predict_kernel, blocks_for_rows(rows), a.targets + first, a.logits, rows, m->config.V);
    }
    predicted->resize(m->N);
    m->losses.resize(m->N);
    copy_to_host(predicted->data(), a.targets, predicted->size());
    copy_to_host(m->losses.data(), a.losses, m->losses.size());
}

// Body(layer) for all layers, on threads of the host
template <typename Body> void for_layers(int L, Body body) {
    const int n = std::min<int>(L, std::max(1u, std::thread::hardware_concurrency()));
    auto some = [&](int thread) { for (int l = thread; l < L; l += n) body(l); };
    std::vector<std::thread> threads;
    for (int i = 1; i < n; i++) threads.emplace_back(some, i);
    some(0);
    for (std::thread& t : threads) t.join();
}

void word_add(IdTable* table, int id, int expert, int64_t position) {
    std::vector<FirstChoices>& all = (*table)[id];
    for (FirstChoices& f : all) if (f.expert == expert) { f.count++; return; }
    all.push_back({expert, 1, position});
}

// A token's domain, and its place in the sample or -1
struct TokenPlace { int domain; int64_t sample; };

// Of the tokens of pieces from `first` on
std::vector<TokenPlace> token_places(const RoutingInput& in, size_t first, int B) {
    std::vector<TokenPlace> places;
    const size_t T = in.data.T;
    for (size_t piece = first; piece < first + B; piece++) {
        const TokenFile& f = token_file_of(in.data, piece);
        const RoutingFile& file = in.files[&f - in.data.files.data()];
        const size_t begin = (piece - f.first) * T;
        auto ends_before = [](const DomainRun& run, size_t at) { return run.end <= at; };
        auto run = std::lower_bound(file.runs.begin(), file.runs.end(), file.offset + begin, ends_before);
        for (size_t t = begin; t < begin + T; t++) {
            while (run + 1 < file.runs.end() && run->end <= file.offset + t) ++run;
            places.push_back({run->domain, t < file.sampled ? (int64_t)(file.sample + t) : -1});
        }
    }
    return places;
}

// p (E) from the logits, and the sum of -p log p
double router_probabilities(const float* z, int E, std::vector<double>* p) {
    const double max = *std::max_element(z, z + E);
    double sum = 0, mean = 0;
    for (int e = 0; e < E; e++) sum += (*p)[e] = exp(z[e] - max);
    for (int e = 0; e < E; e++) { (*p)[e] /= sum; mean += (*p)[e] * (z[e] - max); }
    return log(sum) - mean;
}

// Adds a layer's choices. `later`: those of the later model (N, L, K), or null. `position`: of the first token in all
// of the text
void layer_add(Routing* r, int l, const MicroBatch& batch, const RouterOutput& out, int64_t position,
               const std::vector<TokenPlace>& places, const uint16_t* later) {
    const OlmoeConfig& c = r->config;
    const int E = c.E, K = c.K, N = batch.N();
    LayerRouting& a = r->layers[l];
    std::vector<double> p(E);
    for (int t = 0; t < N; t++) {
        const int* ids = &out.experts[((size_t)l * N + t) * K];
        const float* z = &out.logits[((size_t)l * N + t) * E];
        const size_t row = (size_t)places[t].domain * E;
        a.entropy += router_probabilities(z, E, &p);
        double chosen = 1;
        if (c.norm_topk_prob) { chosen = 0; for (int k = 0; k < K; k++) chosen += p[ids[k]]; }
        for (int e = 0; e < E; e++) {
            a.probs[row + e] += p[e];
            a.logits += z[e];
            a.max_logit = std::max<double>(a.max_logit, z[e]);
        }
        a.top1[row + ids[0]]++;
        for (int k = 0; k < K; k++) {
            a.counts[row + ids[k]]++;
            for (int j = 0; j < K; j++) a.together[(size_t)ids[k] * E + ids[j]]++;
            if (k == 0) continue;
            a.ranked[(size_t)ids[k - 1] * E + ids[k]]++;
            a.ranked[(size_t)ids[k] * E + ids[k - 1]]++;
        }
        word_add(&a.words[INPUT], batch.inputs[t], ids[0], position + t);
        if (batch.targets[t] != IGNORED) word_add(&a.words[TARGET], batch.targets[t], ids[0], position + t);
        word_add(&a.words[PREDICTED], out.predicted[t], ids[0], position + t);
        if (later) {
            const uint16_t* theirs = later + ((size_t)t * c.L + l) * K;
            a.same_top1 += theirs[0] == ids[0];
            for (int k = 0; k < K; k++) a.same += std::count(theirs, theirs + K, ids[k]);
        }
        if (places[t].sample < 0) continue;
        for (int k = 0; k < K; k++) {
            const size_t at = ((size_t)places[t].sample * c.L + l) * K + k;
            r->choices[at] = (uint8_t)ids[k];
            r->weights[at] = (uint8_t)lround(255 * std::min(1.0, p[ids[k]] / chosen));
        }
    }
}

// What is of no layer: tokens by domain, the hash, and of the sample ids and losses. T: of a piece
void tokens_add(Routing* r, const Olmoe& m, int64_t position, const std::vector<TokenPlace>& places, int T) {
    const MicroBatch& batch = m.batch;
    for (int t = 0; t < batch.N(); t++) {
        r->tokens[places[t].domain]++;
        if (places[t].sample < 0) continue;
        r->ids[places[t].sample] = batch.inputs[t];
        r->losses[places[t].sample] = t % T == 0 ? NAN : m.losses[t - 1];
    }
    for (int s = 0; s < batch.B(); s++) {
        const int64_t piece = position / T + s;
        uint64_t hash = fnv1a(FNV_BASIS, (const unsigned char*)&piece, sizeof piece);
        hash = fnv1a(hash, (const unsigned char*)&batch.inputs[batch.begin(s)], T * sizeof(int));
        r->hash[0] = fmod(r->hash[0] + (double)(hash >> 32), 0x1p32);
        r->hash[1] = fmod(r->hash[1] + (double)(uint32_t)hash, 0x1p32);
    }
}

void routing_progress(size_t done, size_t all, const char* what) {
    if (ranks.rank > 0 || !isatty(2)) return;
    fprintf(stderr, "\r%s: %.0f %%%s", what, 100.0 * done / all, done < all ? "" : "\r                    \r");
}

// The experts that a model chooses, (N, L, K) of each of this rank's micro-batches in turn, into a temporary file
FILE* routing_choices(Olmoe* m, RoutingInput* in, int B) {
    FILE* file = file_temporary();
    RouterOutput out;
    const size_t L = m->config.L, K = m->config.K, pieces = in->data.instances;
    auto forward = [&](Olmoe* model) { routing_forward(model, &out); };
    for_batches(m, &in->data, B, ceil_div(pieces, B), forward, [&](size_t first, int) {
        const size_t N = m->N;
        std::vector<uint16_t> choices(N * L * K);
        for (size_t l = 0; l < L; l++)
            for (size_t t = 0; t < N; t++)
                for (size_t k = 0; k < K; k++)
                    choices[(t * L + l) * K + k] = (uint16_t)out.experts[(l * N + t) * K + k];
        temporary_write(file, choices);
        routing_progress(std::min(pieces, first + B * world.size), pieces, "the later model");
    });
    rewind(file);
    return file;
}

// Adds all of the text. `later`: of routing_choices, or null
void routing_add(Routing* r, Olmoe* m, RoutingInput* in, int B, FILE* later) {
    RouterOutput out;
    std::vector<uint16_t> theirs;
    const size_t pieces = in->data.instances;
    const int T = in->data.T;
    auto forward = [&](Olmoe* model) { routing_forward(model, &out); };
    for_batches(m, &in->data, B, ceil_div(pieces, B), forward, [&](size_t first, int rows) {
        routing_head(m, &out.predicted);
        for (int t = 0; t < rows * T; t++)
            if (m->batch.targets[t] != IGNORED && !std::isfinite(m->losses[t]))
                die("the loss is not finite; are the model's weights damaged?");
        if (later) {
            theirs.resize((size_t)m->N * m->config.L * m->config.K);
            if (fread(theirs.data(), sizeof theirs[0], theirs.size(), later) != theirs.size())
                die("cannot read a temporary file: %s", strerror(errno));
        }
        const int64_t position = (int64_t)first * T;
        const std::vector<TokenPlace> places = token_places(*in, first, rows);
        tokens_add(r, *m, position, places, T);
        for_layers(m->config.L, [&](int l) {
            layer_add(r, l, m->batch, out, position, places, later ? theirs.data() : nullptr);
        });
        routing_progress(std::min(pieces, first + B * world.size), pieces, "routing");
    });
}

// ------------------------------------------------------------------------------------------------
// Over the ranks

template <typename T> void sum_over_ranks(std::vector<T>* x) {
    const size_t part = 1 << 20;
    for (size_t begin = 0; world.size > 1 && begin < x->size(); begin += part) {
        const size_t n = std::min(part, x->size() - begin);
        std::vector<double> sums(x->begin() + begin, x->begin() + begin + n);
        host_sum(&sums);
        for (size_t i = 0; i < n; i++) (*x)[begin + i] = (T)sums[i];
    }
}

// The counts of all ranks, in a table of one; where two experts of an id are equal, the one that was met first has to
// be known: `first` is, over all ranks, of those.
void words_sum(IdTable* table, int E) {
    if (world.size == 1) return;
    const size_t V = table->size(), ids = std::max<size_t>(1, (1 << 20) / E);
    for (size_t begin = 0; begin < V; begin += ids) {
        const size_t end = std::min(V, begin + ids);
        std::vector<double> counts((end - begin) * E, 0.0), firsts;
        for (size_t id = begin; id < end; id++)
            for (const FirstChoices& f : (*table)[id]) counts[(id - begin) * E + f.expert] = (double)f.count;
        host_sum(&counts);
        std::vector<FirstChoices*> best;    // of ids with several, all of them
        for (size_t id = begin; id < end; id++) {
            std::vector<FirstChoices> all;
            const double* count = &counts[(id - begin) * E];
            for (int e = 0; e < E; e++) {
                if (count[e] == 0) continue;
                all.push_back({e, (int64_t)count[e], -1});
                for (const FirstChoices& f : (*table)[id]) if (f.expert == e) all.back().first = f.first;
            }
            (*table)[id] = all;
            const double most = *std::max_element(count, count + E);
            if (std::count(count, count + E, most) > 1)
                for (FirstChoices& f : (*table)[id]) if ((double)f.count == most) best.push_back(&f);
        }
        firsts.assign(best.size() * world.size, 0.0);
        for (size_t i = 0; i < best.size(); i++) firsts[i * world.size + world.rank] = (double)best[i]->first;
        host_sum(&firsts);
        for (size_t i = 0; i < best.size(); i++) {
            best[i]->first = INT64_MAX;
            for (int rank = 0; rank < world.size; rank++)
                if (const double first = firsts[i * world.size + rank]; first >= 0)
                    best[i]->first = std::min(best[i]->first, (int64_t)first);
        }
    }
}

// All ranks together; all have the sums then. An id of the sample is on one rank, and 0 on the others.
void routing_sum(Routing* r, RoutingInput* in) {
    const int E = r->config.E;
    if (world.size > 1) {
        std::vector<double> hash(r->hash, r->hash + 2);
        sum_over_ranks(&hash);
        for (int i : {0, 1}) r->hash[i] = fmod(hash[i], 0x1p32);
        sum_over_ranks(&r->tokens);
        for (LayerRouting& l : r->layers) {
            for (auto* table : {&l.counts, &l.top1, &l.probs, &l.together, &l.ranked}) sum_over_ranks(table);
            std::vector<double> sums = {l.entropy, l.logits, l.same_top1, l.same}, largest(world.size, 0.0);
            host_sum(&sums);
            l.entropy = sums[0]; l.logits = sums[1]; l.same_top1 = sums[2]; l.same = sums[3];
            const bool any = std::isfinite(l.max_logit);                // not where a rank had no piece
            std::vector<double> has(world.size, 0.0);
            largest[world.rank] = any ? l.max_logit : 0;
            has[world.rank] = any;
            host_sum(&largest);
            host_sum(&has);
            for (int rank = 0; rank < world.size; rank++)
                if (has[rank] > 0) l.max_logit = std::max(l.max_logit, largest[rank]);
            for (IdTable& table : l.words) words_sum(&table, E);
        }
        sum_over_ranks(&r->ids);
        sum_over_ranks(&r->choices);
        sum_over_ranks(&r->weights);
        sum_over_ranks(&r->losses);
    }
    in->hash = text("%08lx%08lx", (long)r->hash[0], (long)r->hash[1]);
}

// ------------------------------------------------------------------------------------------------
// Figures

constexpr int64_t TOP_OCCURRENCES = 10;     // that an id of a list of favourites has at least
constexpr size_t TOP_IDS = 15;              // of a list

// An id that an expert owns: of `count` occurrences the share with this expert as first choice
struct Favourite { int id; double share; int64_t count; };

// Of a layer, by input, target or predicted ids. The expert of an id is its most frequent first choice, of equal ones
// the one that was met first; all ids count the same (spec section 10.2).
struct Specialisation {
    double mean = NAN;                      // over the ids
    std::vector<double> by_expert;          // (E) over those that the expert owns, NaN where it owns none
    std::vector<std::vector<Favourite>> top;        // (E)
};

Specialisation specialisation(const IdTable& table, int E) {
    Specialisation s;
    std::vector<double> owned(E, 0);
    double sum = 0, ids = 0;
    s.by_expert.assign(E, 0);
    s.top.resize(E);
    for (size_t id = 0; id < table.size(); id++) {
        const FirstChoices* best = nullptr;
        int64_t count = 0;
        for (const FirstChoices& f : table[id]) {
            count += f.count;
            if (!best || f.count > best->count || (f.count == best->count && f.first < best->first)) best = &f;
        }
        if (!best) continue;
        const double share = (double)best->count / (double)count;
        sum += share;
        ids++;
        s.by_expert[best->expert] += share;
        owned[best->expert]++;
        if (count >= TOP_OCCURRENCES) s.top[best->expert].push_back({(int)id, share, count});
    }
    if (ids > 0) s.mean = sum / ids;
    for (int e = 0; e < E; e++) {
        s.by_expert[e] = owned[e] > 0 ? s.by_expert[e] / owned[e] : NAN;
        std::stable_sort(s.top[e].begin(), s.top[e].end(), [](const Favourite& a, const Favourite& b) {
            return a.share != b.share ? a.share > b.share : a.count > b.count;
        });
        if (s.top[e].size() > TOP_IDS) s.top[e].resize(TOP_IDS);
    }
    return s;
}

// A token for the reader; bytes that are no characters as \xe2
std::string token_shown(const Tokenizer& t, int id) {
    const std::string bytes = tokenizer_decode(t, id);
    if (utf8_replace(bytes) == bytes) return bytes;
    std::string shown;
    for (unsigned char c : bytes) shown += c < 128 ? std::string(1, (char)c) : text("\\x%02x", c);
    return shown;
}

Json number_or_null(double x) { return std::isfinite(x) ? Json(x) : Json(); }

// Rows of numbers, (n / columns, columns)
template <typename T> Json table_json(const double* x, size_t n, size_t columns) {
    Json rows = Json::array();
    for (size_t i = 0; i < n; i += columns) rows.push_back(std::vector<T>(x + i, x + i + columns));
    return rows;
}

// The load-balancing loss of the paper's Table 6, whose ideal is K: the mean over layers of
// E sum_i counts_i / N mean_t p_i. domain: or -1, of all
double balancing_loss(const Routing& r, int domain) {
    const size_t E = r.config.E, domains = r.tokens.size();
    double loss = 0, N = 0;
    for (size_t d = 0; d < domains; d++) if (domain < 0 || d == (size_t)domain) N += r.tokens[d];
    for (const LayerRouting& l : r.layers)
        for (size_t e = 0; e < E; e++) {
            double counts = 0, p = 0;
            for (size_t d = 0; d < domains; d++) {
                if (domain >= 0 && d != (size_t)domain) continue;
                counts += l.counts[d * E + e];
                p += l.probs[d * E + e];
            }
            loss += E * (counts / N) * (p / N);
        }
    return loss / r.config.L;
}

// Assignments over all domains
Balance routing_balance(const Routing& r) {
    Balance b;
    b.reset(r.config);
    for (int l = 0; l < b.L; l++)
        for (size_t i = 0; i < r.layers[l].counts.size(); i++) b.counts[l * b.E + i % b.E] += r.layers[l].counts[i];
    return b;
}

Json domains_json(const Routing& r, const RoutingInput& in) {
    const size_t E = r.config.E;
    Json all = Json::object();
    for (size_t d = 0; d < in.domains.size(); d++) {
        Json& j = all[in.domains[d]];
        j = {{"tokens", (int64_t)r.tokens[d]}, {"load_balancing_loss", number_or_null(balancing_loss(r, (int)d))},
             {"counts", Json::array()}, {"top1", Json::array()}};
        for (const LayerRouting& l : r.layers) {
            j["counts"].push_back(table_json<int64_t>(&l.counts[d * E], E, E)[0]);
            j["top1"].push_back(table_json<int64_t>(&l.top1[d * E], E, E)[0]);
        }
    }
    return all;
}

// Of a kind of ids; `shown` gets the texts of those that are listed. tokenizer: or null
Json vocabulary_json(const Routing& r, Word word, const Tokenizer* tokenizer, Json* shown) {
    Json j = {{"by_layer", Json::array()}, {"by_expert", Json::array()}, {"top", Json::array()}};
    for (const LayerRouting& l : r.layers) {
        const Specialisation s = specialisation(l.words[word], r.config.E);
        Json by_expert = Json::array(), tops = Json::array();
        for (double share : s.by_expert) by_expert.push_back(number_or_null(share));
        for (const std::vector<Favourite>& favourites : s.top) {
            Json list = Json::array();
            for (const Favourite& f : favourites) {
                list.push_back({{"id", f.id}, {"share", f.share}, {"count", f.count}});
                if (tokenizer) (*shown)[std::to_string(f.id)] = token_shown(*tokenizer, f.id);
            }
            tops.push_back(list);
        }
        j["by_layer"].push_back(number_or_null(s.mean));
        j["by_expert"].push_back(by_expert);
        j["top"].push_back(tops);
    }
    return j;
}

// What is of the routers themselves, by layer
Json routers_json(const Routing& r, double tokens) {
    const Balance balance = routing_balance(r);
    Json j;
    for (int l = 0; l < r.config.L; l++) {
        const LayerBalance load = layer_balance(balance, l);
        const LayerRouting& a = r.layers[l];
        j["entropy"].push_back(number_or_null(a.entropy / tokens));
        j["max_over_mean"].push_back(load.max_over_mean);
        j["dead"].push_back(load.dead);
        j["mean_logit"].push_back(number_or_null(a.logits / tokens / r.config.E));
        j["max_logit"].push_back(number_or_null(a.max_logit));
    }
    return j;
}

// After routing_sum. `head`: what comes first. compared: with a later model
Json routing_json(const Routing& r, const RoutingInput& in, const Tokenizer* tokenizer, bool compared, Json head) {
    const OlmoeConfig& c = r.config;
    const size_t E = c.E;
    const double tokens = std::accumulate(r.tokens.begin(), r.tokens.end(), 0.0);
    Json j = std::move(head), shown = Json::object();
    j["seq"] = in.data.T;
    j["tokens"] = (int64_t)tokens;
    j["text"] = in.hash;
    j["layers"] = c.L;
    j["experts"] = c.E;
    j["k"] = c.K;
    j["domains"] = domains_json(r, in);
    for (const LayerRouting& l : r.layers) {
        j["coactivation"].push_back(table_json<int64_t>(l.together.data(), E * E, E));
        j["coactivation_ranked"].push_back(table_json<int64_t>(l.ranked.data(), E * E, E));
    }
    for (const LayerRouting& l : r.layers) {
        if (!compared) break;
        j["saturation"]["top1"].push_back(l.same_top1 / tokens);
        j["saturation"]["topk"].push_back(l.same / tokens / c.K);
    }
    for (Word word : {INPUT, TARGET, PREDICTED})
        j["vocabulary"][WORD_NAMES[word]] = vocabulary_json(r, word, tokenizer, &shown);
    if (tokenizer) j["texts"] = shown;
    j["router"] = routers_json(r, tokens);
    j["load_balancing_loss"] = number_or_null(balancing_loss(r, -1));
    return j;
}

std::string compact_json(const Json& j) { return j.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n"; }

// What a reader wants to know first, from OUT.json
void routing_print(const Json& j) {
    size_t width = 6;
    for (const auto& [name, d] : j["domains"].items()) width = std::max(width, name.size());
    printf("  %-*s  %10s  load-balancing loss (ideal %d)\n", (int)width, "domain", "tokens", (int)j["k"]);
    auto line = [&](const std::string& name, const Json& d) {
        const Json& loss = d["load_balancing_loss"];
        printf("  %-*s  %10ld  %s\n", (int)width, name.c_str(), (int64_t)d["tokens"],
               loss.is_null() ? "" : text("%.2f", (double)loss).c_str());
    };
    for (const auto& [name, d] : j["domains"].items()) line(name, d);
    if (j["domains"].size() > 1) line("all", j);
    const bool compared = j.contains("saturation");
    printf("  layer  max/mean  dead  entropy  vocabulary: input target predicted%s\n",
           compared ? "  saturation: first all" : "");
    for (size_t l = 0; l < (size_t)j["layers"]; l++) {
        auto share = [&](const Json& x) { return x.is_null() ? NAN : 100 * (double)x; };
        const Json &router = j["router"], &words = j["vocabulary"];
        printf("  %5zu  %8.2f  %4ld  %7.3f  %17.1f%% %5.1f%% %8.1f%%", l, (double)router["max_over_mean"][l],
               (int64_t)router["dead"][l], router["entropy"][l].is_null() ? NAN : (double)router["entropy"][l],
               share(words["input"]["by_layer"][l]), share(words["target"]["by_layer"][l]),
               share(words["predicted"]["by_layer"][l]));
        if (compared)
            printf("  %16.1f%% %5.1f%%", share(j["saturation"]["top1"][l]), share(j["saturation"]["topk"][l]));
        printf("\n");
    }
}

// ------------------------------------------------------------------------------------------------
// The page

constexpr size_t PAGE_BYTES = 8000000;      // it has as many tokens as fit, and ROUTING_SAMPLE at most

std::string base64(const std::vector<uint8_t>& bytes) {
    const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string all;
    for (size_t i = 0; i < bytes.size(); i += 3) {
        const size_t n = std::min<size_t>(3, bytes.size() - i);
        uint32_t word = 0;
        for (size_t k = 0; k < 3; k++) word = word << 8 | (k < n ? bytes[i + k] : 0);
        for (size_t k = 0; k < 4; k++) all += k <= n ? digits[word >> (18 - 6 * k) & 63] : '=';
    }
    return all;
}

// 16 bits each, the low byte first
std::string base64_of_words(const std::vector<uint16_t>& words) {
    std::vector<uint8_t> bytes;
    for (uint16_t w : words) { bytes.push_back((uint8_t)w); bytes.push_back((uint8_t)(w >> 8)); }
    return base64(bytes);
}

// The tokens of a page: of the sample, their texts, choices and losses, and where documents and pieces begin
struct PageText {
    std::vector<uint16_t> words, losses;    // by number in vocab; in thousandths, 65535 where there is none
    std::vector<uint8_t> choices, weights;
    std::vector<std::string> vocab;
    std::map<int, uint16_t> numbers;        // in vocab, of ids
    Json shown = Json::array(), sections = Json::array();
};

// The first `n` tokens of a file's sample
void page_add(PageText* page, const Routing& r, const RoutingInput& in, size_t number, size_t n, const Tokenizer* t) {
    const TokenFile& f = in.data.files[number];
    const RoutingFile& file = in.files[number];
    const size_t T = in.data.T, each = (size_t)r.config.L * r.config.K;
    auto run = file.runs.begin();
    TextStream stream;
    for (size_t i = 0; i < n; i++) {
        const size_t at = file.sample + i;
        const int id = r.ids[at];
        bool begins = i % T == 0;
        for (; run + 1 < file.runs.end() && run->end <= file.offset + i; ++run) begins = true;
        if (begins) {
            stream = {};
            page->sections.push_back({{"domain", run->domain}, {"begin", page->words.size()},
                                      {"piece", f.first + i / T}});
        }
        const auto [known, is_new] = page->numbers.emplace(id, (uint16_t)page->vocab.size());
        if (is_new) page->vocab.push_back(t ? token_shown(*t, id) : "#" + std::to_string(id));
        if (t)
            if (const std::string shown = stream_next(&stream, *t, id); shown != page->vocab[known->second])
                page->shown.push_back({page->words.size(), shown});
        page->words.push_back(known->second);
        const float loss = r.losses[at];
        page->losses.push_back(std::isnan(loss) ? 65535 : (uint16_t)std::min(65534.0, round(1000.0 * loss)));
        for (auto [to, from] : {std::pair{&page->choices, &r.choices}, std::pair{&page->weights, &r.weights}})
            to->insert(to->end(), from->begin() + at * each, from->begin() + (at + 1) * each);
    }
}

// The data of a page, of that share of the sample; `j` is OUT.json. commands/routing_page.h says what they are.
Json page_json(const Routing& r, const RoutingInput& in, const Json& j, const Tokenizer* t, double share) {
    PageText page;
    for (size_t i = 0; i < in.files.size(); i++)
        page_add(&page, r, in, i, (size_t)ceil(share * (double)in.files[i].sampled), t);
    Json domains = Json::array(), top = Json::array();
    for (const auto& [name, d] : j["domains"].items())
        domains.push_back({{"name", name}, {"tokens", d["tokens"]}, {"counts", d["counts"]}});
    for (const Json& experts : j["vocabulary"]["input"]["top"]) {
        top.push_back(Json::array());
        for (const Json& list : experts) {
            Json of_expert = Json::array();
            for (const Json& f : list)
                of_expert.push_back({{"text", t ? token_shown(*t, f["id"]) : text("#%d", (int)f["id"])},
                                     {"share", f["share"]}, {"count", f["count"]}});
            top.back().push_back(of_expert);
        }
    }
    return {{"title", j["model"]}, {"layers", j["layers"]}, {"experts", j["experts"]}, {"k", j["k"]},
            {"tokens", page.words.size()}, {"of", j["tokens"]}, {"domains", domains}, {"vocab", page.vocab},
            {"ids", base64_of_words(page.words)}, {"shown", page.shown}, {"sections", page.sections},
            {"choices", base64(page.choices)}, {"weights", base64(page.weights)},
            {"losses", base64_of_words(page.losses)}, {"saturation", j.value("saturation", Json())},
            {"router", j["router"]}, {"top", top}};
}

std::string routing_page(const Routing& r, const RoutingInput& in, const Json& j, const Tokenizer* t) {
    double share = 1;
    std::string page;
    do {
        page = routing_page(page_json(r, in, j, t, share));
        share *= 0.95 * std::min(1.0, (double)PAGE_BYTES / (double)page.size());
    } while (page.size() > PAGE_BYTES && share > 1e-6);
    return page;
}

// ------------------------------------------------------------------------------------------------
// In a training run: every so many steps a file of figures, and the choices for a part of the validation data

std::string routing_file(const std::string& out, int64_t step, const char* suffix) {
    return out + text("/routing-%08ld", step) + suffix;
}

// Pieces of the first `pieces` of the validation data, spread evenly: ROUTING_SAMPLE tokens at most
void input_spread(RoutingInput* in, const DataLoader& val, size_t pieces) {
    const size_t T = val.T, n = std::min(pieces, std::max<size_t>(1, ROUTING_SAMPLE / T));
    std::map<std::string, std::vector<DomainRun>> known;
    in->data.T = val.T;
    in->data.V = val.V;
    in->data.order = DataOrder::sequential;
    for (size_t i = 0; i < n; i++) {
        const size_t piece = i * pieces / n;
        TokenFile f = token_file_of(val, piece);
        const size_t begin = (piece - f.first) * T;
        if (!known.count(f.path)) known[f.path] = domain_runs(in, f);
        f.header += begin * f.width;        // it begins with the piece
        f.tokens -= begin;
        input_add(in, f, 1, {known[f.path], begin});
    }
}

// A .npy of bytes, (tokens, L, K)
std::string choices_npy(const Routing& r) {
    std::string dict = text("{'descr': '|u1', 'fortran_order': False, 'shape': (%zu, %d, %d), }", r.ids.size(),
                            r.config.L, r.config.K);
    dict.resize((dict.size() + 10 + 1 + 63) / 64 * 64 - 10 - 1, ' ');
    dict += '\n';
    const std::string length = {(char)(dict.size() & 255), (char)(dict.size() >> 8)};
    return std::string("\x93NUMPY\x01\x00", 8) + length + dict + std::string(r.choices.begin(), r.choices.end());
}

// Ends the run before its first step where there is nothing to write of, or no way to.
void routing_check(const OlmoeConfig& c, const DataLoader& val) {
    if (c.E > SAMPLE_EXPERTS) die("--routing-every keeps a byte for each expert: there may be %d", SAMPLE_EXPERTS);
    RoutingInput in;
    std::set<std::string> paths;
    for (const TokenFile& f : val.files) if (paths.insert(f.path).second) domain_runs(&in, f);
}

// All ranks together. pieces: of the validation data
void routing_in_run(Olmoe* m, const DataLoader& val, size_t pieces, int B, const Tokenizer* tokenizer,
                    const std::string& out, int64_t step) {
    at_step("routing");
    RoutingInput in;
    Routing r;
    input_spread(&in, val, pieces);
    routing_begin(&r, m->config, in, input_sample(&in, ROUTING_SAMPLE));
    routing_add(&r, m, &in, B, nullptr);
    routing_sum(&r, &in);
    if (world.rank == 0) {
        const std::string choices = routing_file(out, step, ".npy");
        const Json head = {{"step", step}, {"choices", choices.substr(choices.rfind('/') + 1)}};
        file_replace(choices, choices_npy(r));
        file_replace(routing_file(out, step, ".json"), compact_json(routing_json(r, in, tokenizer, false, head)));
    }
    at_step("");
}

// Removes what later steps wrote: a run that goes on from `step` writes its own.
void routing_truncate(const std::string& out, int64_t step) {
    std::error_code none;
    std::vector<std::string> later;
    for (const auto& entry : std::filesystem::directory_iterator(out, none)) {
        const std::string name = entry.path().filename().string();
        for (const char* suffix : {".json", ".npy"}) {
            const int64_t number = name.rfind("routing-", 0) == 0 ? atoll(name.c_str() + 8) : 0;
            if (number > step && out + "/" + name == routing_file(out, number, suffix)) later.push_back(name);
        }
    }
    for (const std::string& name : later) unlink((out + "/" + name).c_str());
}

// ------------------------------------------------------------------------------------------------
// The command

struct RoutingCommand {
    std::string model, later, tokenizer_name, out, page, rendezvous;
    std::vector<std::string> data;
    Choice token_type = "uint16";
    int64_t T = 0, B = 4, max_tokens = 0, ep = 1;
    double timeout = 600;
    OlmoeConfig config, later_config;
    Tokenizer tokenizer;
    RoutingInput in;
    Olmoe olmoe;
    Routing routing;
};

std::vector<Option> routing_options(RoutingCommand* v) {
    return with_launch_checks({
        {"model", &v->model, "DIR", "Hugging Face directory, or a checkpoint"},
        {"data", &v->data, "FILES", "texts (.txt, gzipped or not), or token files (.npy of uint16 or uint32, or llm.c's "
         ".bin): each is a domain, or has those of its documents"},
        {"tokenizer", &v->tokenizer_name, "NAME", "bytes, or a tokenizer.json; default: the model's"},
        {"token-type", &v->token_type, "uint16|uint32", "what token files without a header hold"},
        {"seq", &v->T, "T", "tokens of a piece, which the model reads alone; 0: 2048, or max_position_embeddings if less",
         0, 1 << 20},
        {"batch", &v->B, "B", "pieces at a time", 1, 1 << 20},
        {"max-tokens", &v->max_tokens, "N", "only the whole pieces in the first N tokens of each file; 0: all", 0, 1e15},
        {"later", &v->later, "DIR", "a later checkpoint: how many of its choices are made already"},
        {"out", &v->out, "OUT.json", "the figures, as JSON"},
        {"page", &v->page, "OUT.html", "a page to look through: each token with its experts"},
        {"ep", &v->ep, "G", "expert parallel: so many neighbouring ranks share the experts", 1, 1 << 16},
        {"rendezvous", &v->rendezvous, "HOST:PORT|FILE",
         "where ranks meet that neither mpirun nor srun with PMIx started"},
        {"timeout", &v->timeout, "S", "seconds after which a rank that does not answer ends the run", 1, 1e6},
    });
}

void routing_parse(RoutingCommand* v, int argc, char** argv) {
    options_parse(argc, argv, "routing --model DIR --data FILES --out OUT.json [--page OUT.html] [options]",
                  routing_options(v));
    if (v->model.empty()) die("routing needs --model DIR");
    if (v->data.empty()) die("routing needs --data FILES");
    if (v->out.empty()) die("routing needs --out OUT.json");
    if (v->out == v->page) die("--out and --page are the same file; name two");
}

// Files and shapes; nothing of the device
void routing_open(RoutingCommand* v) {
    OlmoeConfig& c = v->config;
    for (const std::string* path : {&v->out, &v->page})
        if (!path->empty() && world.rank == 0) file_check_writable(*path);
    config_read(&c, v->model);
    if (c.E % v->ep != 0) die("the model's %d experts can't be divided among --ep %ld ranks", c.E, v->ep);
    if (!v->page.empty() && c.E > SAMPLE_EXPERTS)
        die("--page has a byte for each expert: there may be %d, and the model has %d", SAMPLE_EXPERTS, c.E);
    if (!v->later.empty()) {
        config_read(&v->later_config, v->later);
        const OlmoeConfig& b = v->later_config;
        if (b.L != c.L || b.E != c.E || b.K != c.K || b.V != c.V)
            die("--later %s has another number of layers, experts or ids than --model %s", v->later.c_str(),
                v->model.c_str());
    }
    if (v->T == 0) v->T = std::min<int64_t>(EVAL_T, c.max_T);
    for (const OlmoeConfig* config : {&c, v->later.empty() ? &c : &v->later_config})
        if (v->T > config->max_T)
            die("--seq %ld is longer than the model's max_position_embeddings %d", v->T, config->max_T);
    const bool own = access((v->model + "/tokenizer.json").c_str(), F_OK) == 0;
    if (v->tokenizer_name.empty() && own) v->tokenizer_name = v->model;
    if (!v->tokenizer_name.empty()) tokenizer_open(&v->tokenizer, v->tokenizer_name);
    if (v->tokenizer.vocab > c.V)
        die("the tokenizer's %d ids don't fit the model's vocabulary of %d", v->tokenizer.vocab, c.V);
    const Tokenizer* tokenizer = v->tokenizer_name.empty() ? nullptr : &v->tokenizer;
    input_open(&v->in, v->data, tokenizer, (int)v->T, c.V, v->max_tokens, v->token_type);
    v->B = std::min<int64_t>(v->B, (int64_t)v->in.data.instances);
}

// Memory for a model's micro-batches, and its weights
void routing_load(RoutingCommand* v, const OlmoeConfig& c, const std::string& dir) {
    Capacity capacity = capacity_of_rows(c, v->B, v->T, Use::inference);
    capacity.classified = std::min(capacity.N, HEAD_ROWS);
    olmoe_plan(&v->olmoe, c, capacity);
    olmoe_allocate(&v->olmoe);
    olmoe_load(&v->olmoe, dir);
}

int command_routing(int argc, char** argv) {
    RoutingCommand v;
    ranks.rank = ranks_number();            // until they have met
    routing_parse(&v, argc, argv);
    ranks_open(v.rendezvous, v.timeout, v.ep, false);
    routing_open(&v);
    device_open();
    comm_open();
    FILE* later = nullptr;
    if (!v.later.empty()) {                 // one model at a time
        routing_load(&v, v.later_config, v.later);
        later = routing_choices(&v.olmoe, &v.in, (int)v.B);
        olmoe_free(&v.olmoe);
        v.olmoe = Olmoe();
    }
    routing_load(&v, v.config, v.model);
    routing_begin(&v.routing, v.config, v.in, v.page.empty() ? 0 : input_sample(&v.in, ROUTING_SAMPLE));
    routing_add(&v.routing, &v.olmoe, &v.in, (int)v.B, later);
    routing_sum(&v.routing, &v.in);
    if (world.rank == 0) {
        Json head = {{"model", v.model}};
        if (later) head["later"] = v.later;
        const Tokenizer* tokenizer = v.tokenizer_name.empty() ? nullptr : &v.tokenizer;
        const Json j = routing_json(v.routing, v.in, tokenizer, later, head);
        routing_print(j);
        file_replace(v.out, compact_json(j));
        if (!v.page.empty()) file_replace(v.page, routing_page(v.routing, v.in, j, tokenizer));
    }
    if (later) fclose(later);
    olmoe_free(&v.olmoe);
    comm_close();
    device_close();
    ranks_leave();
    return 0;
}
