// What is printed about a model: counts, tables, the balance of the experts, the first NaN.
//
// Included once, by olmoe.cu, after its structs.
#pragma once
#include "checkpoint.h"
#include "weights.h"

// ------------------------------------------------------------------------------------------------
// Counts

size_t num_parameters(const OlmoeConfig& c) {
    const Tensor last = model_tensors(c).back();
    return last.base + last.whole;
}

// Parameters that a token meets: of E experts K
size_t num_active_parameters(const OlmoeConfig& c) {
    size_t n = 0;
    for (const Tensor& t : model_tensors(c)) n += t.expert() ? t.whole / c.E * c.K : t.whole;
    return n;
}

// Forward and backward: 2 FLOP a weight and token forward, twice that backward, of a frozen one once; causal attention
// counted as half of its square
double flops_per_token(const OlmoeConfig& c, double T) {
    double flops = 6.0 * c.L * c.C * T;
    for (const Tensor& t : model_tensors(c))
        if (t.kind != Kind::lookup) flops += (t.frozen ? 4.0 : 6.0) * (t.expert() ? t.whole / c.E * c.K : t.whole);
    return flops;
}

// Forward alone, whatever is frozen
double forward_flops(OlmoeConfig c, double T) {
    c.frozen.clear();
    return flops_per_token(c, T) / 3;
}

// ------------------------------------------------------------------------------------------------
// Tables

// Rows of key and value, and rules between them
struct Box {
    std::vector<std::pair<std::string, std::string>> rows;      // an empty key is a rule

    void add(const std::string& key, const std::string& value) { rows.push_back({key, value}); }
    void rule() { rows.push_back({"", ""}); }
    void print() const {
        size_t key = 0, value = 0;
        for (auto& r : rows) { key = std::max(key, r.first.size()); value = std::max(value, r.second.size()); }
        std::string line = "+" + std::string(key + 2, '-') + "+" + std::string(value + 2, '-') + "+";
        printf("%s\n", line.c_str());
        for (auto& r : rows)
            if (r.first.empty()) printf("%s\n", line.c_str());
            else printf("| %-*s | %-*s |\n", (int)key, r.first.c_str(), (int)value, r.second.c_str());
        printf("%s\n", line.c_str());
    }
};

void box_shapes(Box* box, const OlmoeConfig& c) {
    auto count = [](size_t n) { return text("%zu (%s)", n, human((double)n).c_str()); };
    box->add("layers, channels, heads", text("L %d  C %d  H %d (of size %d)", c.L, c.C, c.H, c.C / c.H));
    box->add("experts", text("%d of %d for each token, width %d", c.K, c.E, c.F));
    box->add("vocabulary", text("%d", c.V));
    box->add("parameters", count(num_parameters(c)));
    box->add("active", count(num_active_parameters(c)));
}

double memory_sum(const Olmoe& m) {
    double sum = 0;
    for (const MemoryPart& part : memory_plan(m)) sum += part.bytes;
    return sum;
}

void box_memory(Box* box, const Olmoe& m) {
    for (const MemoryPart& part : memory_plan(m))
        box->add(std::string("memory: ") + part.name, human(part.bytes, "B") + part.remark);
    box->add("memory: sum", human(memory_sum(m), "B"));
}

// What CUDA and NCCL take of a GPU beside the plan, in bytes: an estimate for H100s. The context and cuBLAS 0.5 GB; a
// communicator 1.6 GB (NVIDIA/nccl, issue 864); the exchange of rows 0.47 GB for each other rank of the expert group
// (issue 1685: 3.3 GB for seven).
double overhead_estimate() {
    int communicators = world.size > 1;
    for (const Group* g : {&expert_group, &replica_group}) communicators += g->size > 1 && g->size < world.size;
    return 0.5e9 + 1.6e9 * communicators + 0.47e9 * (expert_group.size - 1);
}

// Names of files for a table: up to three in full
std::string join(const std::vector<std::string>& words) {
    if (words.size() > 3) return words[0] + text(" and %zu more", words.size() - 1);
    std::string s;
    for (const std::string& w : words) s += (s.empty() ? "" : " ") + w;
    return s;
}

// A number of the log: 9 digits, and null where it is not finite
Json digits(double x) {
    if (!std::isfinite(x)) return nullptr;
    return strtod(text("%.9g", x).c_str(), nullptr);
}

// A sample on the screen: newlines indented, other controls as dots, and what is no UTF-8 as U+FFFD, by the JSON
// library
void print_sample(const std::string& prompt, const std::string& continuation) {
    std::string dumped = Json(prompt + continuation).dump(-1, ' ', false, Json::error_handler_t::replace);
    std::string valid = Json::parse(dumped);
    printf("  sample: ");
    for (char ch : valid) {
        if (ch == '\n') printf("\n    | ");
        else printf("%c", (unsigned char)ch < 32 || ch == 127 ? '.' : ch);
    }
    printf("\n");
}

// ------------------------------------------------------------------------------------------------
// Expert balance: rows that each expert of each layer received

struct Balance {
    int L = 0, E = 0;
    std::vector<double> counts;             // (L, E)

    void reset(const OlmoeConfig& c) { L = c.L; E = c.E; counts.assign((size_t)L * E, 0); }
    // This rank's rows of the micro-batch in m
    void add(const Olmoe& m) {
        if (counts.empty()) reset(m.config);
        for (int l = 0; l < L; l++) for (int e = 0; e < E; e++) counts[(size_t)l * E + e] += m.rows[l].sent[e];
    }
    void add(const Balance& more) {
        if (counts.empty()) { *this = more; return; }
        for (size_t i = 0; i < counts.size(); i++) counts[i] += more.counts[i];
    }
};

// entropy: of the load, over ln E; 1 is even
struct LayerBalance { double max_over_mean = 0, entropy = 0; int dead = 0; };

LayerBalance layer_balance(const Balance& b, int l) {
    const double* counts = &b.counts[(size_t)l * b.E];
    LayerBalance r;
    double sum = 0, max = 0;
    for (int e = 0; e < b.E; e++) { sum += counts[e]; max = std::max(max, counts[e]); }
    for (int e = 0; e < b.E; e++) {
        double share = sum > 0 ? counts[e] / sum : 0;
        if (share > 0) r.entropy -= share * log(share);
        else r.dead++;
    }
    r.entropy = b.E > 1 ? r.entropy / log((double)b.E) : 1;
    r.max_over_mean = sum > 0 ? max * b.E / sum : 0;
    return r;
}

// Of all layers: the largest max_over_mean, and the experts that received no row
LayerBalance whole_balance(const Balance& b) {
    LayerBalance r;
    for (int l = 0; l < b.L; l++) {
        const LayerBalance layer = layer_balance(b, l);
        r.max_over_mean = std::max(r.max_over_mean, layer.max_over_mean);
        r.dead += layer.dead;
    }
    return r;
}

void print_balance(const Balance& b) {
    printf("  experts by layer, max/mean load (entropy, dead):");
    for (int l = 0; l < b.L; l++) {
        LayerBalance r = layer_balance(b, l);
        printf("%s %.2f (%.3f, %d)", l ? "," : "", r.max_over_mean, r.entropy, r.dead);
    }
    printf("\n");
}

Json balance_json(const Balance& b) {
    Json layers = Json::array();
    for (int l = 0; l < b.L; l++) {
        LayerBalance r = layer_balance(b, l);
        std::vector<int64_t> counts(&b.counts[(size_t)l * b.E], &b.counts[(size_t)l * b.E] + b.E);
        layers.push_back({{"max_over_mean", digits(r.max_over_mean)}, {"entropy", digits(r.entropy)}, {"dead", r.dead},
                          {"counts", counts}});
    }
    return layers;
}

// Which experts read which kind of text: assignments (L, domains, E) over a validation file whose documents are known
struct DomainTable {
    std::vector<Document> documents;        // by position in the file
    std::vector<std::string> names;
    std::vector<int> domain_of;             // (documents)
    std::vector<double> counts;             // (L, domains, E)
};

// Domains of documents, by name, and of each document
struct DomainNames { std::vector<std::string> names; std::vector<int> of; };

// False where the documents' ids name more than 64: they are numbers of documents then.
bool domains_of(const std::vector<Document>& documents, DomainNames* d) {
    for (const Document& doc : documents) {
        const std::string name = document_domain(doc);
        const size_t i = std::find(d->names.begin(), d->names.end(), name) - d->names.begin();
        if (i == d->names.size()) d->names.push_back(name);
        if (d->names.size() > 64) return false;
        d->of.push_back((int)i);
    }
    return true;
}

void domains_open(DomainTable* d, const TokenFile& f, const OlmoeConfig& c) {
    std::string problem;
    d->documents = documents_read(f, &problem);
    if (!problem.empty() && world.rank == 0)
        fprintf(stderr, "warning: %s; it is left out, and experts by domain are not reported\n", problem.c_str());
    DomainNames of_documents;
    if (!domains_of(d->documents, &of_documents)) { *d = {}; return; }
    d->names = of_documents.names;
    d->domain_of = of_documents.of;
    d->counts.assign((size_t)c.L * d->names.size() * c.E, 0);
}

// Adds the micro-batch in m, whose tokens are in the file from `first` on.
void domains_add(DomainTable* d, Olmoe* m, size_t first) {
    const OlmoeConfig& c = m->config;
    const size_t stride = (size_t)m->N * c.K, documents = d->documents.size();
    std::vector<int> experts(c.L * stride);
    copy_to_host(experts.data(), m->acts.layers[0].experts, experts.size());
    size_t doc = 0;
    for (int t = 0; t < m->N; t++) {
        while (doc < documents && (size_t)d->documents[doc].end <= first + t) doc++;
        if (doc == documents) return;
        for (int l = 0; l < c.L; l++) {
            double* counts = &d->counts[((size_t)l * d->names.size() + d->domain_of[doc]) * c.E];
            for (int k = 0; k < c.K; k++) counts[experts[l * stride + (size_t)t * c.K + k]]++;
        }
    }
}

// For each layer how many bits an assignment's expert says about its domain, and for the layer where that is most, the
// share of each domain's assignments that each expert gets (100/E would be no preference).
void print_domains(const DomainTable& d, const OlmoeConfig& c) {
    size_t M = d.names.size(), E = c.E;
    std::vector<double> bits(c.L, 0);
    std::vector<double> shares(d.counts.size());                // (L, domains, E)
    for (int l = 0; l < c.L; l++) {
        double* share = &shares[l * M * E];
        const double* counts = &d.counts[l * M * E];
        for (size_t i = 0; i < M; i++) {
            double sum = 0;
            for (size_t e = 0; e < E; e++) sum += counts[i * E + e];
            for (size_t e = 0; e < E; e++) share[i * E + e] = sum > 0 ? counts[i * E + e] / sum : 0;
        }
        for (size_t e = 0; e < E; e++) {
            double mean = 0;
            for (size_t i = 0; i < M; i++) mean += share[i * E + e] / M;
            for (size_t i = 0; i < M; i++)
                if (share[i * E + e] > 0) bits[l] += share[i * E + e] / M * log2(share[i * E + e] / mean);
        }
    }
    int best = (int)(std::max_element(bits.begin(), bits.end()) - bits.begin());
    printf("experts by domain: an assignment's expert shows, of %.2f bits of domain,", log2((double)M));
    for (int l = 0; l < c.L; l++) printf("%s %.2f in layer %d", l ? "," : "", bits[l], l);
    printf("\nlayer %d, %% of a domain's assignments (%.1f = no preference; * = twice that or more):\n  expert", best,
           100.0 / E);
    for (size_t e = 0; e < E; e++) printf(" %5zu", e);
    printf("\n");
    for (size_t i = 0; i < M; i++) {
        printf("  %-12s", d.names[i].c_str());
        for (size_t e = 0; e < E; e++) {
            double s = shares[(best * M + i) * E + e];
            printf("%s%4.1f%s", e ? " " : "", 100 * s, s * E >= 2 ? "*" : " ");
        }
        printf("\n");
    }
}

// ------------------------------------------------------------------------------------------------
// The search for the first NaN

// The first name in files of a tensor of the model
std::string file_name_of(const Tensor& tensor, const OlmoeConfig& c) {
    for (const HfTensor& t : hf_tensors(c)) if (t.offset == tensor.base) return t.name;
    return "";
}

// Names the first tensor, in the order of the forward pass, that holds a NaN or an infinity. Only called when the run
// has to stop.
std::string find_non_finite(Olmoe* m) {
    auto bad = [&](const auto* device, size_t n) {
        for (float x : device_floats(device, n)) if (!std::isfinite(x)) return true;
        return false;
    };
    const size_t N = m->N, C = m->config.C;
    const int level = m->capacity.recompute;
    for (const HfTensor& t : hf_tensors(m->config)) {
        const floatX* here = element_at(m->tensors, m->params, t.offset);
        if (here && bad(here, t.count)) return "the parameter " + t.name;
    }
    for (int l = 0; l < m->config.L; l++) {
        LayerActivations& a = m->acts.layers[l];
        std::string layer = " of layer " + std::to_string(l);
        if (bad(a.x, N * C)) return "the residual stream at the input" + layer;
        if (level < 2 && bad(a.qkv, N * 3 * C)) return "the qkv projection" + layer;
        if (level < 2 && bad(a.attn, N * C)) return "the attention output" + layer;
        if (bad(a.router_lse, N)) return "the router logits" + layer;
        if (level < 2 && bad(a.gate_up, (size_t)m->rows[l].total() * 2 * m->config.F))
            return "the experts' gate and up projections" + layer;
    }
    if (bad(m->acts.x, N * C)) return "the residual stream after the last layer";
    return "the logits";
}
