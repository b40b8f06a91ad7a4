// olmoe routing: what the experts of a model do with texts, as figures and as a page. Training runs write it down as
// they go.
//
// Included once, by olmoe.cu, after the model.
#pragma once
#include "../lib/routing.h"
#include "routing_page.h"

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

// The load-balancing loss of the paper's Table 6, whose ideal is K: a mean over layers and, as in the paper's script,
// over pieces. Of a domain, over its parts of pieces, which count as their tokens.
double balancing_loss(const Routing& r, size_t domain) {
    const double all = std::accumulate(r.tokens.begin(), r.tokens.end(), 0.0);
    double sum = 0;
    for (const LayerRouting& l : r.layers) sum += l.balancing[domain];
    return sum / r.config.L / (domain < r.tokens.size() ? r.tokens[domain] : all);
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
        j = {{"tokens", (int64_t)r.tokens[d]}, {"load_balancing_loss", number_or_null(balancing_loss(r, d))},
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
    j["load_balancing_loss"] = number_or_null(balancing_loss(r, r.tokens.size()));
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
        auto share = [&](const Json& x) { return x.is_null() ? std::string("-") : text("%.1f%%", 100 * (double)x); };
        const Json &router = j["router"], &words = j["vocabulary"];
        printf("  %5zu  %8.2f  %4ld  %7.3f  %18s %6s %9s", l, (double)router["max_over_mean"][l],
               (int64_t)router["dead"][l], router["entropy"][l].is_null() ? NAN : (double)router["entropy"][l],
               share(words["input"]["by_layer"][l]).c_str(), share(words["target"]["by_layer"][l]).c_str(),
               share(words["predicted"]["by_layer"][l]).c_str());
        if (compared)
            printf("  %17s %6s", share(j["saturation"]["top1"][l]).c_str(), share(j["saturation"]["topk"][l]).c_str());
        printf("\n");
    }
}

// ------------------------------------------------------------------------------------------------
// The page

constexpr size_t PAGE_BYTES = 8000000;      // it has as many tokens as fit, and ROUTING_SAMPLE at most

std::string base64(const std::vector<uint8_t>& bytes) {
    const char* alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string all;
    for (size_t i = 0; i < bytes.size(); i += 3) {
        const size_t n = std::min<size_t>(3, bytes.size() - i);
        uint32_t word = 0;
        for (size_t k = 0; k < 3; k++) word = word << 8 | (k < n ? bytes[i + k] : 0);
        for (size_t k = 0; k < 4; k++) all += k <= n ? alphabet[word >> (18 - 6 * k) & 63] : '=';
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

// As many tokens as fit; `shown` gets how many these are.
std::string routing_page(const Routing& r, const RoutingInput& in, const Json& j, const Tokenizer* t, size_t* shown) {
    double share = 1;
    std::string page;
    do {
        const Json data = page_json(r, in, j, t, share);
        page = routing_page(data);
        *shown = data["tokens"];
        share *= 0.95 * std::min(1.0, (double)PAGE_BYTES / (double)page.size());
    } while (page.size() > PAGE_BYTES && share > 1e-6);
    return page;
}

// ------------------------------------------------------------------------------------------------
// In a training run: every so many steps a file of figures, and the choices for a part of the validation data

std::string routing_file(const std::string& out, int64_t step, const char* suffix) {
    return out + text("/routing-%08ld", step) + suffix;
}

// Pieces of the first `pieces` of the validation data, spread evenly: ROUTING_SAMPLE tokens at most. The lists of
// documents are read only now: later, in the middle of a run, they may be gone.
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
    input_sample(in, ROUTING_SAMPLE);
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

// Before the first step: what of the validation data is looked at. Ends the run where there is no way to.
void routing_of_run_open(RoutingInput* in, const OlmoeConfig& c, const DataLoader& val, size_t pieces) {
    if (c.E > SAMPLE_EXPERTS) die("--routing-every keeps a byte for each expert: there may be %d", SAMPLE_EXPERTS);
    input_spread(in, val, pieces);
}

// All ranks together
void routing_in_run(Olmoe* m, RoutingInput* in, int B, const Tokenizer* tokenizer, const std::string& out,
                    int64_t step) {
    at_step("routing");
    Routing r;
    routing_begin(&r, m->config, *in);
    routing_add(&r, m, in, B, nullptr);
    routing_sum(&r, in);
    if (world.rank == 0) {
        const std::string choices = routing_file(out, step, ".npy");
        const Json head = {{"step", step}, {"choices", choices.substr(choices.rfind('/') + 1)}};
        file_replace(choices, choices_npy(r));
        file_replace(routing_file(out, step, ".json"), compact_json(routing_json(r, *in, tokenizer, false, head)));
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
        {"data", &v->data, "FILES", "texts (.txt, gzipped or not), or token files (.npy of uint16 or uint32, or "
         "llm.c's .bin): each is a domain, or has those of its documents"},
        {"tokenizer", &v->tokenizer_name, "NAME", "bytes, or a tokenizer.json; default: the model's"},
        {"token-type", &v->token_type, "uint16|uint32", "what token files without a header hold"},
        {"seq", &v->T, "T",
         "tokens of a piece, which the model reads alone; 0: 2048, or max_position_embeddings if less", 0, 1 << 20},
        {"batch", &v->B, "B", "pieces at a time", 1, 1 << 20},
        {"max-tokens", &v->max_tokens, "N", "only the whole pieces in the first N tokens of each file; 0: all",
         0, 1e15},
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
    outputs_check({{"out", {v->out}}, {"page", {v->page}}}, {{"data", v->data}});
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
    input_agree(v.in);
    FILE* later = nullptr;
    if (!v.later.empty()) {                 // one model at a time
        routing_load(&v, v.later_config, v.later);
        later = routing_choices(&v.olmoe, &v.in, (int)v.B);
        olmoe_free(&v.olmoe);
        v.olmoe = Olmoe();
    }
    routing_load(&v, v.config, v.model);
    if (!v.page.empty()) input_sample(&v.in, ROUTING_SAMPLE);
    routing_begin(&v.routing, v.config, v.in);
    routing_add(&v.routing, &v.olmoe, &v.in, (int)v.B, later);
    routing_sum(&v.routing, &v.in);
    if (world.rank == 0) {
        Json head = {{"model", v.model}};
        if (later) head["later"] = v.later;
        const Tokenizer* tokenizer = v.tokenizer_name.empty() ? nullptr : &v.tokenizer;
        const Json j = routing_json(v.routing, v.in, tokenizer, later, head);
        routing_print(j);
        file_replace(v.out, compact_json(j));
        if (!v.page.empty()) {
            size_t shown = 0;
            file_replace(v.page, routing_page(v.routing, v.in, j, tokenizer, &shown));
            printf("%s: a page of %zu of the %ld tokens\n", v.page.c_str(), shown, (int64_t)j["tokens"]);
        }
    }
    if (later) fclose(later);
    olmoe_free(&v.olmoe);
    comm_close();
    device_close();
    ranks_leave();
    return 0;
}
