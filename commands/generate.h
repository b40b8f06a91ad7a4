// olmoe generate: prompts go through the layers all at once, then each step runs one row of every sequence at work,
// against a cache of keys and values. Training runs sample with it.
//
// Included once, by olmoe.cu, after the model.
#pragma once
#include <fstream>
#include <iostream>
#include <set>
#include "../lib/cache.h"
#include "../lib/checkpoint.h"
#include "../lib/options.h"
#include "../lib/weights.h"

// ------------------------------------------------------------------------------------------------
// Sampling

struct SamplingOptions {
    double temperature = 0.8, top_p = 1, min_p = 0, repetition_penalty = 1;
    int64_t top_k = 0;
};

// An index of logits, by temperature, top_k, top_p and min_p; `best` is the index of the largest. random: uniform in
// (0, 1].
int sample_index(const std::vector<float>& logits, int best, const SamplingOptions& o, double random) {
    // probability over the largest's, and -id: of equal ones the lower is the larger pair
    std::vector<std::pair<double, int>> p(logits.size());
    double total = 0, kept = 0;
    for (size_t i = 0; i < p.size(); i++) {
        p[i] = {exp(((double)logits[i] - logits[best]) / o.temperature), -(int)i};
        total += p[i].first;
    }
    size_t n = 0, sorted = 0;
    auto sort_to = [&](size_t end) {
        std::partial_sort(p.begin() + sorted, p.begin() + end, p.end(), std::greater<>());
        sorted = end;
    };
    if (o.top_k > 0 && o.top_k < (int64_t)p.size()) {
        sort_to(o.top_k);
        p.resize(o.top_k);
        total = 0;
        for (auto& [probability, id] : p) total += probability;
    }
    if (o.top_p < 1 || o.min_p > 0) {                           // sorted only as far as it matters
        for (; n < p.size(); kept += p[n++].first) {
            if (n == sorted) sort_to(std::min(p.size(), 4 * sorted + 64));
            if (n > 0 && ((o.top_p < 1 && kept >= o.top_p * total) || p[n].first < o.min_p)) break;
        }
        p.resize(n);
        total = kept;
    }
    size_t i = 0;
    for (double r = random * total; i + 1 < p.size() && r > p[i].first; i++) r -= p[i].first;
    return -p[i].second;
}

// The next token after logits (V), and the log of its probability in the model as it is. In this order, as in
// transformers: the penalty (Keskar et al. 2019) of tokens seen before, temperature, the top_k largest, the fewest that
// have top_p of the probability together, and of these the ones that have min_p of the largest's. temperature 0: the
// largest, of equal ones the lowest id. random: uniform in (0, 1].
int choose_token(const std::vector<float>& unchanged, const SamplingOptions& o, const std::vector<int>& seen,
                 double random, double* logprob) {
    const int V = (int)unchanged.size();
    float largest = -INFINITY;
    for (int i = 0; i < V; i++) largest = fmaxf(largest, unchanged[i]);
    double sum = 0;
    for (int i = 0; i < V; i++) sum += expf(unchanged[i] - largest);
    const double lse = largest + log(sum);
    if (!std::isfinite(lse)) die("the model's logits are not finite; are its weights damaged?");
    std::vector<float> penalised;
    if (o.repetition_penalty != 1) {
        penalised = unchanged;
        for (int id : std::set<int>(seen.begin(), seen.end()))
            if (id < V) {
                float& z = penalised[id];
                z = (float)(z > 0 ? z / o.repetition_penalty : z * o.repetition_penalty);
            }
        largest = *std::max_element(penalised.begin(), penalised.end());
    }
    const std::vector<float>& logits = penalised.empty() ? unchanged : penalised;
    int best = (int)(std::find(logits.begin(), logits.end(), largest) - logits.begin());
    int chosen = o.temperature > 0 ? sample_index(logits, best, o, random) : best;
    *logprob = unchanged[chosen] - lse;
    return chosen;
}

// ------------------------------------------------------------------------------------------------
// Sequences

// A text to be continued
struct Sequence {
    std::vector<int> ids;                   // the prompt's tokens, then those generated
    size_t prompt = 0;                      // tokens of the prompt
    int number = 0, sample = 0;             // of the prompt among the inputs, of the sample among its prompt's
    Json id;                                // what the input calls it
    int place = -1;                         // its first in the cache
    std::vector<double> logprobs;           // of the tokens generated
    TextStream stream;
    std::string text;                       // generated
    std::string finish;                     // "eos", "stop" (a stop string, which is not part of text), "length"
};

struct GenerateOptions {
    SamplingOptions sampling;
    std::vector<std::string> stop;
    int64_t max_tokens = 128, seed = 0;
    std::vector<int> eos;                   // any of them ends a sequence
    const Tokenizer* tokenizer = nullptr;

    bool ends(int id) const { return std::find(eos.begin(), eos.end(), id) != eos.end(); }
};

struct GenerateCounts { size_t prompt = 0, generated = 0; double prefill_seconds = 0, decode_seconds = 0; };

// Appends the next token to a sequence, and says in `finish` whether it was the last.
void sequence_append(Sequence* s, const std::vector<float>& logits, const GenerateOptions& o, size_t most) {
    const size_t generated = s->ids.size() - s->prompt;
    const uint64_t position = (uint64_t)s->number << 40 | (uint64_t)s->sample << 20 | generated;
    double logprob, random = uniform(philox((uint64_t)o.seed, position).x[0]);
    int id = choose_token(logits, o.sampling, s->ids, random, &logprob);
    if (world.size > 1) id = (int)host_sum(world.rank == 0 ? id : 0);   // rounding may differ between ranks
    s->ids.push_back(id);
    s->logprobs.push_back(logprob);
    if (o.ends(id)) s->finish = "eos";
    else if ((int64_t)generated + 1 == o.max_tokens || s->ids.size() == most) s->finish = "length";
    if (!o.tokenizer) return;
    size_t before = s->text.size();
    if (!o.ends(id)) s->text += stream_next(&s->stream, *o.tokenizer, id);
    if (!s->finish.empty()) s->text += stream_end(&s->stream);
    size_t found = std::string::npos;
    for (const std::string& stop : o.stop)
        found = std::min(found, s->text.find(stop, before - std::min(before, stop.size() - 1)));
    if (found != std::string::npos) { s->text.resize(found); s->finish = "stop"; }
}

// Copies the keys and values of n tokens from one place to another.
void cache_copy(const Cache& cache, size_t to, size_t from, size_t n, const OlmoeConfig& c) {
    const size_t D = c.C / c.H;
    for (size_t h = 0; h < (size_t)c.L * c.H; h++)              // heads of all layers
        for (floatX* all : {cache.keys, cache.values}) {
            floatX* head = all + h * cache.P * D;
            copy_on_device(head + to * D, head + from * D, n * D);
        }
}

// Between olmoe_plan and olmoe_allocate: a cache of S slots, each of places for a sequence of up to P tokens
void slots_plan(Cache* cache, Olmoe* m, int S, int P) {
    cache_plan(cache, m, (size_t)S * P, S, (size_t)S * ceil_div(P, CACHE_PART));
}

// Continues all sequences, S at a time, each of which has a slot of the cache. `report` is called with a sequence
// whenever it has a new token. What a sequence becomes depends neither on the others nor on their number, but for
// rounding in the matmuls.
template <typename Report>
GenerateCounts generate(Olmoe* m, const Cache& cache, int S, std::vector<Sequence>* sequences, const GenerateOptions& o,
                        Report report) {
    const OlmoeConfig& c = m->config;
    const int slot = cache.P / S;
    const size_t V = c.V, usable = o.tokenizer ? std::min<size_t>(V, o.tokenizer->vocab) : V, rows = m->capacity.N;
    std::vector<floatX> logits;
    std::vector<Sequence*> active;
    std::vector<int> free, places;          // first ones of slots: of those that are free, of the prompts at work
    GenerateCounts counts;
    for (int i = S - 1; i >= 0; i--) free.push_back(i * slot);
    auto append = [&](Sequence* s, size_t row) {                // the padding of the vocabulary is never chosen
        auto first = logits.begin() + row * V;
        sequence_append(s, std::vector<float>(first, first + usable), o, slot);
        counts.generated++;
        report(s);
    };
    auto fetch = [&](int n) {
        olmoe_classify(m, 0, n);
        logits.resize(n * V);
        copy_to_host(logits.data(), m->acts.logits, n * V);
    };
    if (o.max_tokens == 0) for (Sequence& s : *sequences) { s.finish = "length"; report(&s); }
    for (size_t next = o.max_tokens > 0 ? 0 : sequences->size(); next < sequences->size() || !active.empty(); ) {
        // prompts into free slots, as many as fit into a micro-batch; samples of one prompt share its sequence there,
        // and then copy its keys and values
        double start = seconds_now();
        MicroBatch prompts;
        std::vector<std::pair<Sequence*, int>> begun;           // and its number in prompts
        places.clear();
        for (; next < sequences->size() && begun.size() < free.size(); next++) {
            Sequence* s = &(*sequences)[next];
            bool same = !begun.empty() && begun.back().first->number == s->number;
            if (!same && prompts.N() + s->ids.size() > rows) break;
            s->place = free[free.size() - 1 - begun.size()];
            if (!same) { batch_add(&prompts, s->ids.data(), nullptr, (int)s->ids.size()); places.push_back(s->place); }
            begun.push_back({s, prompts.B() - 1});
        }
        if (!begun.empty()) {
            free.resize(free.size() - begun.size());
            olmoe_prefill(m, cache, prompts, places);
            fetch(prompts.B());
            for (auto& [s, prompt] : begun) {
                if (s->place != places[prompt]) cache_copy(cache, s->place, places[prompt], prompts.length(prompt), c);
                append(s, prompt);
                active.push_back(s);
            }
            counts.prompt += prompts.N();
            counts.prefill_seconds += seconds_now() - start;
        }
        for (size_t i = 0; i < active.size(); )
            if (active[i]->finish.empty()) i++;
            else { free.push_back(active[i]->place); active.erase(active.begin() + i); }
        if (active.empty()) continue;
        start = seconds_now();
        MicroBatch batch;
        std::vector<CacheRow> seen;
        for (Sequence* s : active) {
            const int n = (int)s->ids.size();
            batch_add(&batch, &s->ids[n - 1], nullptr, 1, 0, n - 1);
            seen.push_back({0, 0, s->place, n});
        }
        olmoe_decode(m, cache, batch, seen);
        fetch((int)active.size());
        for (size_t i = 0; i < active.size(); i++) append(active[i], i);
        counts.decode_seconds += seconds_now() - start;
    }
    return counts;
}

// ------------------------------------------------------------------------------------------------
// Samples of a training run

std::vector<int> sample_prompt(const Tokenizer& tokenizer, const std::string& prompt) {
    std::vector<int> ids = tokenizer_encode(tokenizer, prompt);
    ids.insert(ids.begin(), tokenizer.eos);
    return ids;
}

// Continues a prompt, of which it takes the last tokens where it is longer than there is room for. All ranks together.
std::string sample_text(Olmoe* m, const Cache& cache, const Tokenizer& tokenizer, const std::string& prompt,
                        int64_t tokens, uint64_t seed) {
    GenerateOptions o;
    o.max_tokens = tokens;
    o.seed = (int64_t)seed;
    o.eos = m->config.eos_token_ids;
    o.eos.push_back(tokenizer.eos);
    o.tokenizer = &tokenizer;
    std::vector<Sequence> one(1);
    one[0].ids = sample_prompt(tokenizer, prompt);
    const int most = std::min(m->capacity.T, cache.P - 1), n = (int)one[0].ids.size();
    if (most < 1) return "";
    if (n > most) one[0].ids.erase(one[0].ids.begin(), one[0].ids.end() - most);
    one[0].prompt = one[0].ids.size();
    generate(m, cache, 1, &one, o, [](Sequence*) {});
    return one[0].text;
}

// ------------------------------------------------------------------------------------------------
// The command

struct GenerateCommand {
    GenerateOptions o;
    std::string model, input, ids, tokenizer_name, system;
    std::vector<std::string> prompts;
    int64_t samples = 1, batch = 8;
    bool chat = false, json = false, logprobs = false, stats = false;
    bool talk = false;                      // with the user, instead of prompts
    OlmoeConfig config;
    Tokenizer tokenizer;
    std::vector<Sequence> sequences;
    std::vector<std::string> too_long;      // prompts that leave no room for a token after them
    std::vector<ChatMessage> messages;      // before each prompt of --chat
    Olmoe olmoe;
    Cache cache;
    int at_once = 1;                        // sequences that it has slots for
};

std::vector<Option> generate_options(GenerateCommand* g) {
    SamplingOptions& s = g->o.sampling;
    return with_launch_checks({
        {"model", &g->model, "DIR", "Hugging Face directory, or a checkpoint"},
        {"prompt", &g->prompts, "TEXTS", "texts to continue"},
        {"ids", &g->ids, "1,2,3", "token ids to continue, where there is no tokenizer"},
        {"input", &g->input, "FILE.jsonl", "a JSON object a line: {\"prompt\": TEXT}, {\"ids\": [...]} or "
         "{\"messages\": [{\"role\", \"content\"}, ...]}, and any \"id\"; - is standard input"},
        {"tokenizer", &g->tokenizer_name, "NAME", "bytes, or a tokenizer.json; default: the model's"},
        {"chat", &g->chat, "", "prompts are messages to an Instruct model; without any, talk to it"},
        {"system", &g->system, "TEXT", "with --chat: a system message before"},
        {"max-tokens", &g->o.max_tokens, "N", "tokens to generate at most", 0, 1 << 20},
        {"temperature", &s.temperature, "X", "0: always the likeliest token", 0, 1e3},
        {"top-k", &s.top_k, "K", "only of the K likeliest tokens; 0: of all", 0, 1 << 30},
        {"top-p", &s.top_p, "P", "only of the likeliest that have P of the probability together", 0, 1},
        {"min-p", &s.min_p, "P", "only of those that are P times as likely as the likeliest", 0, 1},
        {"repetition-penalty", &s.repetition_penalty, "X",
         "divides positive logits of tokens seen before, and multiplies negative ones", 1e-3, 1e3},
        {"stop", &g->o.stop, "TEXTS", "texts that end a sequence"},
        {"seed", &g->o.seed, "N", "of the random choices", 0, 9e15},
        {"n", &g->samples, "N", "samples of each prompt", 1, 1 << 20},
        {"batch", &g->batch, "B", "sequences at a time", 1, 1 << 16},
        {"json", &g->json, "", "a JSON object a sample, a line each"},
        {"logprobs", &g->logprobs, "", "with --json: log-probabilities of the tokens in the model, at temperature 1"},
        {"stats", &g->stats, "", "tokens a second, on standard error"},
    });
}

// The options against one another, and the tokenizer
void generate_check(GenerateCommand* g) {
    if (g->model.empty()) die("generate needs --model DIR");
    const int sources = !g->prompts.empty() + !g->ids.empty() + !g->input.empty();
    g->talk = g->chat && sources == 0;
    if (!g->talk && sources != 1) die("generate needs one of --prompt TEXTS, --ids IDS, --input FILE.jsonl, or --chat");
    for (const std::string& stop : g->o.stop)
        if (stop.empty()) die("--stop: an empty text would end every sequence at once");
    if (g->logprobs && !g->json) die("--logprobs needs --json");
    if (g->talk && (g->json || g->samples > 1)) die("--%s needs prompts: --prompt or --input", g->json ? "json" : "n");
    if (g->chat && !g->ids.empty()) die("--chat takes texts, not --ids");
    if (!g->system.empty() && !g->chat) die("--system needs --chat");
    config_read(&g->config, g->model);
    const bool own = access((g->model + "/tokenizer.json").c_str(), F_OK) == 0;
    if (g->tokenizer_name.empty() && own) g->tokenizer_name = g->model;
    if (!g->tokenizer_name.empty()) {
        tokenizer_open(&g->tokenizer, g->tokenizer_name);
        if (g->tokenizer.vocab > g->config.V)
            die("the tokenizer's %d ids don't fit the model's vocabulary of %d", g->tokenizer.vocab, g->config.V);
        g->o.tokenizer = &g->tokenizer;
    }
    g->o.eos = eos_read(g->model, g->config);
    if (g->o.tokenizer) g->o.eos.push_back(g->tokenizer.eos);
    if (!g->o.tokenizer && (g->chat || !g->prompts.empty() || !g->o.stop.empty()))
        die("%s has no tokenizer.json; give --tokenizer, or token ids by --ids", g->model.c_str());
}

// Token ids from text: 1,306,4658
std::vector<int> parse_ids(const std::string& list, int V) {
    std::vector<int> ids;
    for (const char* p = list.c_str(); ; p++) {
        char* end;
        long id = strtol(p, &end, 10);
        if (end == p || (*end && *end != ',') || id < 0 || id >= V)
            die("--ids %s: numbers from 0 to %d with commas between them", list.c_str(), V - 1);
        ids.push_back((int)id);
        p = end;
        if (!*p) return ids;
    }
}

std::vector<int> prompt_ids(const GenerateCommand& g, const std::string& prompt) {
    std::vector<int> ids = tokenizer_encode(g.tokenizer, prompt);
    if (ids.empty()) ids.push_back(g.tokenizer.eos);
    return ids;
}

// As fine-tuning has them. Among bytes EOS has no text: one that is in no UTF-8 stands for it.
std::vector<int> chat_ids(const GenerateCommand& g, const std::vector<ChatMessage>& messages) {
    const Tokenizer& t = g.tokenizer;
    std::vector<int> ids = prompt_ids(g, chat_prompt(messages, true, t.bytes ? "\xff" : tokenizer_decode(t, t.eos)));
    if (t.bytes) std::replace(ids.begin(), ids.end(), 0xff, t.eos);
    return ids;
}

// A prompt as the user means it: with --chat a message to the model
std::vector<int> text_ids(const GenerateCommand& g, const std::string& prompt) {
    if (!g.chat) return prompt_ids(g, prompt);
    std::vector<ChatMessage> messages = g.messages;
    messages.push_back({"user", prompt});
    return chat_ids(g, messages);
}

// A prompt that leaves no room for a token after it is noted in g->too_long; `where` names it there.
void add_prompt(GenerateCommand* g, const std::vector<int>& ids, const std::string& where, const Json& id = nullptr) {
    int number = g->sequences.empty() ? 0 : g->sequences.back().number + 1;
    if (ids.size() >= (size_t)g->config.max_T)
        g->too_long.push_back(where + " (" + std::to_string(ids.size()) + " tokens)");
    for (int i = 0; i < g->samples; i++) {
        Sequence s;
        s.ids = ids; s.prompt = ids.size(); s.number = number; s.sample = i; s.id = id;
        g->sequences.push_back(s);
    }
}

// A line of --input; `where` names it in messages
void add_line(GenerateCommand* g, const std::string& line, const std::string& where) {
    const bool texts = g->o.tokenizer;
    const char* at = where.c_str();
    const Json j = json_parse(line);
    std::vector<int> tokens;
    if (j.is_object() && j.contains("ids")) {
        const Json& list = j["ids"];
        if (!list.is_array() || list.empty()) die("%s: ids is no list of token ids", at);
        for (const Json& id : list) {
            if (!id.is_number_integer() || id < 0 || id >= g->config.V)
                die("%s: the id %s is none from 0 to %d", at, json_shown(id).c_str(), g->config.V - 1);
            tokens.push_back(id);
        }
    } else if (texts && j.is_object() && (j.contains("messages") || j.contains("prompt"))) {
        try {
            tokens = j.contains("messages") ? chat_ids(*g, messages_of(j["messages"]))
                                            : text_ids(*g, text_of(j["prompt"], "prompt", false));
        } catch (const RowError& e) { die("%s: %s", at, e.what()); }
    } else {
        die("%s: not a JSON object with %s", at,
            texts ? "\"prompt\", \"ids\" or \"messages\"" : "\"ids\" (there is no tokenizer)");
    }
    add_prompt(g, tokens, where, j.value("id", Json()));
}

void read_input(GenerateCommand* g) {
    std::ifstream file;
    if (g->input != "-") file.open(g->input);
    std::istream& in = g->input == "-" ? std::cin : file;
    if (!in) die("%s: cannot be read: %s", g->input.c_str(), strerror(errno));
    std::string line;
    for (size_t number = 1; std::getline(in, line); number++) {
        if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
        add_line(g, line, g->input + ":" + std::to_string(number));
    }
    if (g->sequences.empty()) die("%s: no prompt in it", g->input.c_str());
}

// Names all prompts that are too long, on the error's line or, where they are many, on a line each before it.
void check_lengths(const GenerateCommand& g) {
    std::string names;
    for (const std::string& name : g.too_long) names += (names.empty() ? "" : ", ") + name;
    const bool many = names.size() > 3000;
    if (many) for (const std::string& name : g.too_long) fprintf(stderr, "%s\n", name.c_str());
    if (!names.empty())
        die("too long a prompt, max_position_embeddings is %d: %s", g.config.max_T,
            many ? (std::to_string(g.too_long.size()) + " prompts").c_str() : names.c_str());
}

void generate_prompts(GenerateCommand* g) {
    if (!g->system.empty()) g->messages.push_back({"system", g->system});
    for (size_t i = 0; i < g->prompts.size(); i++)
        add_prompt(g, text_ids(*g, g->prompts[i]), "prompt " + std::to_string(i));
    if (!g->ids.empty()) add_prompt(g, parse_ids(g->ids, g->config.V), "--ids");
    if (!g->input.empty()) read_input(g);
    if (g->talk) add_prompt(g, text_ids(*g, ""), g->system.empty() ? "an empty message" : "--system");
    check_lengths(*g);
    if (g->talk) g->sequences.clear();
}

// Device, memory and weights, for the prompts that there are
void generate_start(GenerateCommand* g) {
    const OlmoeConfig& c = g->config;
    size_t longest = 0, total = 0;
    for (const Sequence& s : g->sequences) {
        longest = std::max(longest, s.ids.size());
        total += s.sample == 0 ? s.ids.size() : 0;
    }
    if (g->talk) longest = c.max_T - 1;
    const int S = g->at_once = g->talk ? 1 : (int)std::min<int64_t>(g->batch, g->sequences.size());
    const int P = (int)std::min<int64_t>(c.max_T, longest + g->o.max_tokens);
    const int rows = (int)std::max({longest, std::min<size_t>(total, 2048), (size_t)S});

    device_open();
    olmoe_plan(&g->olmoe, c, {rows, (int)longest, Use::inference, 0, S, P});
    slots_plan(&g->cache, &g->olmoe, S, P);
    olmoe_allocate(&g->olmoe);
    olmoe_load(&g->olmoe, g->model);
}

// Prints what is new of a sequence's text; what could still become a stop string is held back.
void print_stream(const Sequence& s, const std::vector<std::string>& stops, size_t* printed) {
    size_t hold = 0;
    if (s.finish.empty())
        for (const std::string& stop : stops)
            for (size_t k = std::min(stop.size() - 1, s.text.size()); k > hold; k--)
                if (s.text.compare(s.text.size() - k, k, stop, 0, k) == 0) hold = k;
    size_t end = s.text.size() - hold;
    fwrite(s.text.data() + *printed, 1, end - *printed, stdout);
    *printed = end;
    fflush(stdout);
}

// The tokens of the conversation so far. Where they leave no room for an answer, the oldest messages are forgotten, and
// where the newest alone leaves none, it is taken back, and there are no tokens.
std::vector<int> talk_ids(GenerateCommand* g) {
    const size_t most = g->config.max_T, first = !g->system.empty();
    std::vector<int> ids = chat_ids(*g, g->messages);
    if (ids.size() < most) return ids;
    const size_t room = std::min<size_t>(g->o.max_tokens, most / 4);
    std::vector<ChatMessage> kept = g->messages;
    while (ids.size() + room > most && kept.size() > first + 1) {
        kept.erase(kept.begin() + first, kept.begin() + first + 2);     // a message and its answer
        ids = chat_ids(*g, kept);
    }
    if (ids.size() >= most) {
        fprintf(stderr, "note: this message is too long and is left out: %zu tokens, max_position_embeddings is %zu\n",
                ids.size(), most);
        g->messages.pop_back();
        return {};
    }
    fprintf(stderr, "note: the conversation is too long, max_position_embeddings is %zu: its oldest %zu messages are "
            "forgotten\n", most, g->messages.size() - kept.size());
    g->messages = kept;
    return ids;
}

// A conversation, until the end of standard input
void generate_talk(GenerateCommand* g) {
    for (std::string line; ; ) {
        if (isatty(STDIN_FILENO)) { printf("> "); fflush(stdout); }
        if (!std::getline(std::cin, line)) return;
        g->messages.push_back({"user", line});
        g->sequences.clear();
        const std::vector<int> ids = talk_ids(g);
        if (ids.empty()) continue;
        add_prompt(g, ids, "");
        size_t printed = 0;
        generate(&g->olmoe, g->cache, 1, &g->sequences, g->o,
                 [&](Sequence* s) { print_stream(*s, g->o.stop, &printed); });
        printf("\n");
        print_check();
        g->messages.push_back({"assistant", g->sequences[0].text});
    }
}

void print_sequence(const GenerateCommand& g, const Sequence& s, bool first) {
    std::vector<int> generated(s.ids.begin() + s.prompt, s.ids.end());
    if (g.json) {
        Json j = {{"prompt", s.number}, {"sample", s.sample}};
        if (!s.id.is_null()) j["id"] = s.id;
        if (g.o.tokenizer) j["text"] = s.text;
        j["ids"] = generated;
        j["finish"] = s.finish;
        j["prompt_tokens"] = s.prompt;
        if (g.logprobs) j["logprobs"] = s.logprobs;
        printf("%s\n", j.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
        return;
    }
    if (g.sequences.size() > 1) printf("%s--- prompt %d, sample %d\n", first ? "" : "\n", s.number, s.sample);
    if (g.o.tokenizer) { fwrite(s.text.data(), 1, s.text.size(), stdout); printf("\n"); }
    else
        for (size_t i = 0; i < generated.size(); i++)
            printf("%d%s", generated[i], i + 1 < generated.size() ? "," : "\n");
}

// All prompts, printed in the order of the input
void generate_all(GenerateCommand* g) {
    const bool streaming = g->sequences.size() == 1 && !g->json && g->o.tokenizer;
    size_t printed = 0, reported = 0;       // bytes of the one text; sequences that are printed
    GenerateCounts n = generate(&g->olmoe, g->cache, g->at_once, &g->sequences, g->o, [&](Sequence* s) {
        if (streaming) print_stream(*s, g->o.stop, &printed);
        else
            for (; reported < g->sequences.size() && !g->sequences[reported].finish.empty(); reported++)
                print_sequence(*g, g->sequences[reported], reported == 0);
        print_check();
    });
    if (streaming) printf("\n");
    if (g->stats)
        fprintf(stderr, "prompts: %zu tokens, %.1f a second; "
                "generated: %zu tokens, %.1f a second after the first of each\n",
                n.prompt, n.prompt / std::max(n.prefill_seconds, 1e-9), n.generated,
                n.generated == 0 ? 0 : (n.generated - g->sequences.size()) / std::max(n.decode_seconds, 1e-9));
}

int command_generate(int argc, char** argv) {
    GenerateCommand g;
    const char* usage = "generate --model DIR --prompt TEXTS | --ids IDS | --input FILE.jsonl | --chat  [options]";
    options_parse(argc, argv, usage, generate_options(&g));
    generate_check(&g);
    generate_prompts(&g);
    generate_start(&g);
    if (g.talk) generate_talk(&g);
    else generate_all(&g);
    olmoe_free(&g.olmoe);
    device_close();
    return 0;
}
