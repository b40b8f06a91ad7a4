// Routing: what the experts of a model do with texts, as tables that do not grow with these. commands/routing.h makes
// figures of them.
//
// The definitions are those of the paper's section 5 (spec section 10). All counts are of this rank's pieces until
// routing_sum.
//
// Included once, by commands/routing.h.
#pragma once
#include <functional>
#include <thread>
#include "../commands/evaluate.h"
#include "../commands/tokenize.h"

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
    size_t sampled = 0;                     // tokens of the sample
    std::string hash;                       // of all tokens, once they are read
};

constexpr size_t ROUTING_SAMPLE = 20000;    // tokens whose choices are kept: of a page, or of a step of training

// A file without a name, which goes when it is closed
FILE* file_temporary() {
    std::error_code error;
    const std::filesystem::path folder = std::filesystem::temp_directory_path(error);
    if (error) die("no folder for temporary files: %s; TMPDIR names one", error.message().c_str());
    std::string name = (folder / "olmoe-XXXXXX").string();
    const int fd = mkostemp(&name[0], O_CLOEXEC);
    if (fd < 0) die("cannot write a temporary file %s: %s", name.c_str(), strerror(errno));
    unlink(name.c_str());
    return fdopen(fd, "w+b");
}

template <typename T> void temporary_write(FILE* f, const std::vector<T>& all) {
    if (fwrite(all.data(), sizeof(T), all.size(), f) != all.size() || fflush(f) != 0)
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
        if (f.tokens == 0 && part.size() >= 32 && !looks_like_text({std::string_view(part).substr(0, BLOCK_BYTES)}))
            die("%s: not text in UTF-8; name tokens .npy or .bin", path.c_str());
        tokenizer_encode(t, part, &ids);
        temporary_write(file, ids);
        f.tokens += ids.size();
        ranks_alive();
    }
    gzclose(lines.file);
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
        if (in->domains.size() > before) return runs;
        die("%s: a domain of documents is named %s, too", f.path.c_str(), name.c_str());
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
    std::set<std::string> names;            // also of files that are split: one that is given twice would count twice
    for (const std::string& path : paths) {
        TokenFile f;
        evaluation_name(path, &names);
        if (ends_with(path, ".txt") || ends_with(path, ".txt.gz")) {
            if (!tokenizer) die("%s: text needs a tokenizer: give --tokenizer NAME", path.c_str());
            f = text_tokens(path, *tokenizer, most);
        } else if (ends_with(path, ".npy") || ends_with(path, ".bin")) {
            token_file_open(&f, path, token_type == "uint32" ? 4 : 2);
            if (f.header == 0) token_file_check(f, V, token_file_blocks(f, 8), true);
        } else {
            token_file_refuse(path, "");
            die("%s: neither .txt (text) nor .npy or .bin (tokens); rename it if it is one of them", path.c_str());
        }
        const size_t pieces = std::min(f.tokens, most) / T;
        if (pieces == 0) die("%s: its %zu tokens are less than one piece of --seq %d", path.c_str(), f.tokens, T);
        input_add(in, f, pieces, {domain_runs(in, f)});
    }
    dataloader_check(&d, d.instances, ranks_alive);
}

// Ends the program where a rank reads other tokens than rank 0, or of other domains. All ranks together
void input_agree(const RoutingInput& in) {
    uint64_t hash = dataloader_fingerprint(&in.data);
    auto add = [&](const void* bytes, size_t n) { hash = fnv1a(hash, (const unsigned char*)bytes, n); };
    for (const std::string& name : in.domains) add(name.c_str(), name.size() + 1);
    for (const RoutingFile& f : in.files)
        for (const DomainRun& run : f.runs) { add(&run.end, sizeof run.end); add(&run.domain, sizeof run.domain); }
    const double seen = (double)(hash >> 11);                   // as many bits as a double has
    if (host_sum(world.rank == 0 ? seen : 0) != seen) die("the files of --data are not those that rank 0 sees");
}

// The first tokens of each file as a sample of at most `most`: as many of each, or all where it has fewer, which leaves
// more to the others.
void input_sample(RoutingInput* in, size_t most) {
    std::vector<size_t> shortest_first(in->files.size());
    std::iota(shortest_first.begin(), shortest_first.end(), 0);
    std::stable_sort(shortest_first.begin(), shortest_first.end(), [&](size_t a, size_t b) {
        return in->data.files[a].instances < in->data.files[b].instances;
    });
    size_t sampled = 0, left = in->files.size();
    for (size_t i : shortest_first) {
        const size_t all = in->data.files[i].instances * in->data.T;
        in->files[i].sampled = std::min(all, (most - sampled) / left--);
        sampled += in->files[i].sampled;
    }
    for (RoutingFile& file : in->files) { file.sample = in->sampled; in->sampled += file.sampled; }
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
    std::vector<double> counts, top1;               // (domains, E) assignments, first choices
    std::vector<double> balancing;                  // (domains + 1) sums of load-balancing losses times tokens, of all
                                                    // pieces, and of those parts of pieces that are of a domain
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

void routing_begin(Routing* r, const OlmoeConfig& c, const RoutingInput& in) {
    const size_t domains = in.domains.size(), E = c.E, sampled = in.sampled;
    r->config = c;
    r->tokens.assign(domains, 0);
    r->layers.assign(c.L, {});
    for (LayerRouting& l : r->layers) {
        for (auto* of_domains : {&l.counts, &l.top1}) of_domains->assign(domains * E, 0);
        l.balancing.assign(domains + 1, 0);
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
    for (float z : out->logits)
        if (!std::isfinite(z)) die("a router's logit is not finite; are the model's weights damaged?");
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

// Some tokens of a layer. Their load-balancing loss, on the scale of the paper's Table 6, is
// E sum_i counts_i / N mean_t p_i, whose ideal is K.
struct BalancedPart {
    std::vector<double> counts, probs;              // (E) assignments, sums of p
    double N = 0;

    explicit BalancedPart(int E) : counts(E, 0.0), probs(E, 0.0) {}
    // Adds the loss times N, and begins again.
    void end(double* sum) {
        for (size_t e = 0; N > 0 && e < counts.size(); e++) *sum += (double)counts.size() * counts[e] * probs[e] / N;
        *this = BalancedPart((int)counts.size());
    }
};

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
    const int E = c.E, K = c.K, N = batch.N(), T = batch.length(0);
    LayerRouting& a = r->layers[l];
    std::vector<double> p(E);
    BalancedPart piece(E), part(E);                 // part: of one domain
    for (int t = 0; t < N; t++) {
        const int* ids = &out.experts[((size_t)l * N + t) * K];
        const float* z = &out.logits[((size_t)l * N + t) * E];
        const size_t row = (size_t)places[t].domain * E;
        a.entropy += router_probabilities(z, E, &p);
        double chosen = 1;
        if (c.norm_topk_prob) { chosen = 0; for (int k = 0; k < K; k++) chosen += p[ids[k]]; }
        for (int e = 0; e < E; e++) {
            a.logits += z[e];
            a.max_logit = std::max<double>(a.max_logit, z[e]);
        }
        for (BalancedPart* b : {&piece, &part}) {
            b->N++;
            for (int e = 0; e < E; e++) b->probs[e] += p[e];
            for (int k = 0; k < K; k++) b->counts[ids[k]]++;
        }
        const bool ends = (t + 1) % T == 0;
        if (ends) piece.end(&a.balancing.back());
        if (ends || places[t + 1].domain != places[t].domain) part.end(&a.balancing[places[t].domain]);
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
        show_progress("the later model", std::min(pieces, first + B * world.size), pieces);
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
        show_progress("routing", std::min(pieces, first + B * world.size), pieces);
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
            for (auto* table : {&l.counts, &l.top1, &l.balancing, &l.together, &l.ranked}) sum_over_ranks(table);
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
