// olmoe evaluate: how likely a model finds token files, and the right answers of multiple-choice tasks. Training runs
// evaluate with it, too.
//
// Included once, by olmoe.cu, after the model.
#pragma once
#include "../dataloader.h"
#include "../lib/cache.h"
#include "../lib/file_kinds.h"
#include "../lib/options.h"
#include "../lib/reports.h"
#include "../lib/weights.h"

// ------------------------------------------------------------------------------------------------
// Tasks: files of requests, one a line, as OLMo ships them,
//     {"request": {"context": TEXT, "continuation": TEXT}, "doc_id": 7, "idx": 0, "label": 2, ...}
// Choice idx of a document is a continuation and what stands before it; the label is the right one. The model's choice
// is the likeliest (spec section 8.2).

constexpr int64_t UNCONDITIONAL = 1000000;  // requests of this doc_id and above have no context: they are left out
constexpr int MOST_CHOICES = 4096;

// Continuations of one context, which goes through the model once. No two of them are equal.
struct Continuation { std::vector<int> ids; double logp = 0; };
struct EvalContext { std::vector<int> ids; std::vector<Continuation> continuations; };

struct EvalChoice {
    int line = 0;                           // in the file; 0: none came yet
    size_t context = 0, continuation = 0;   // by number in the task, and in the context
    int characters = 0, bytes = 0;          // of the continuation, without its one leading space
};
struct EvalDocument { int64_t id = 0, label = 0; std::vector<EvalChoice> choices; };

struct Task {
    std::string name, path;
    std::vector<EvalDocument> documents;    // in the order of their first lines
    std::vector<EvalContext> contexts;

    const Continuation& of(const EvalChoice& c) const { return contexts[c.context].continuations[c.continuation]; }
};

// arc_easy of eval/arc_easy.jsonl.gz: what keys are named after. No two files may have one name.
std::string evaluation_name(const std::string& path, std::set<std::string>* names) {
    const std::string file = path.substr(path.rfind('/') + 1), name = utf8_replace(file.substr(0, file.find('.')));
    if (name.empty()) die("%s: no name is left before the first dot", path.c_str());
    if (!names->insert(name).second) die("%s: another file is named %s, too", path.c_str(), name.c_str());
    return name;
}

// A field of a request; `where` is its file and line.
template <typename T> T request_field(const Json& j, const char* name, bool right, const std::string& where) {
    if (!right)
        die("%s: %s is %s", where.c_str(), name, j.contains(name) ? json_shown(j[name]).c_str() : "missing");
    return j[name].get<T>();
}

int64_t request_number(const Json& j, const char* name, const std::string& where, int64_t most = INT32_MAX) {
    const bool right = j.contains(name) && j[name].is_number_integer() && j[name] >= 0 && j[name] <= most;
    return request_field<int64_t>(j, name, right, where);
}

// A request file while it is read
struct TaskReader {
    Task task;
    const Tokenizer* tokenizer;
    size_t T, limit;                        // tokens that the model reads at most; documents, 0: all
    std::map<int64_t, size_t> numbers = {}; // of the documents, by id
    std::string last = "";                  // the last context, and its ids: it often comes again
    std::vector<int> ids = {};
};

// The context of a request as ids; an empty one is EOS.
const std::vector<int>& context_ids(TaskReader* r, const std::string& context) {
    if (r->ids.empty() || context != r->last) {
        r->last = context;
        r->ids = tokenizer_encode(*r->tokenizer, context);
        if (r->ids.empty()) r->ids = {r->tokenizer->eos};
    }
    return r->ids;
}

// Where a choice of a document finds its log p: in the context and the continuation of another choice, if it has these.
void task_add(Task* task, const EvalDocument& d, EvalChoice* choice, const std::vector<int>& context,
              const std::vector<int>& ids, size_t T) {
    // the last T tokens of context + continuation, whose last one is predicted and not read
    const size_t room = T + 1 - ids.size(), cut = context.size() - std::min(context.size(), room);
    const std::vector<int> kept(context.begin() + (ptrdiff_t)cut, context.end());
    const auto other = std::find_if(d.choices.begin(), d.choices.end(), [&](const EvalChoice& c) {
        return c.line > 0 && task->contexts[c.context].ids == kept;
    });
    choice->context = other == d.choices.end() ? task->contexts.size() : other->context;
    if (other == d.choices.end()) task->contexts.push_back({kept, {}});
    std::vector<Continuation>& all = task->contexts[choice->context].continuations;
    const auto same = std::find_if(all.begin(), all.end(), [&](const Continuation& c) { return c.ids == ids; });
    choice->continuation = (size_t)(same - all.begin());
    if (same == all.end()) all.push_back({ids, 0});
}

// The document of a request, and in it the place of its choice; null where it is left out
EvalChoice* task_choice(TaskReader* r, const Json& j, const std::string& where, EvalDocument** document) {
    const int64_t id = request_number(j, "doc_id", where, INT64_MAX);
    if (id >= UNCONDITIONAL) return nullptr;
    const Json type = j.value("request_type", Json("loglikelihood"));
    if (type != "loglikelihood")
        die("%s: request_type is %s, not \"loglikelihood\"", where.c_str(), json_shown(type).c_str());
    const int64_t idx = request_number(j, "idx", where), label = request_number(j, "label", where);
    std::vector<EvalDocument>& documents = r->task.documents;
    auto found = r->numbers.find(id);
    if (found == r->numbers.end()) {
        if (r->limit > 0 && documents.size() == r->limit) return nullptr;
        found = r->numbers.emplace(id, documents.size()).first;
        documents.push_back({id, label, {}});
    }
    EvalDocument& d = documents[found->second];
    *document = &d;
    if (label != d.label)
        die("%s: label is %ld, but %ld on an earlier line of document %ld", where.c_str(), label, d.label, id);
    if (idx >= MOST_CHOICES) die("%s: idx is %ld; a document has at most %d choices", where.c_str(), idx, MOST_CHOICES);
    if (d.choices.size() <= (size_t)idx) d.choices.resize(idx + 1);
    const int before = d.choices[idx].line;
    if (before > 0) die("%s: document %ld has idx %ld already, on line %d", where.c_str(), id, idx, before);
    return &d.choices[idx];
}

// A task's request from its line
void task_read_line(TaskReader* r, const std::string& request_text, int line) {
    const std::string where = r->task.path + ":" + std::to_string(line);
    const Json j = json_parse(request_text);
    if (!j.is_object()) die("%s: not a JSON object", where.c_str());
    EvalDocument* d = nullptr;
    EvalChoice* choice = task_choice(r, j, where, &d);
    if (!choice) return;
    const Json request = request_field<Json>(j, "request", j.contains("request") && j["request"].is_object(), where);
    auto string = [&](const char* name) {
        return request_field<std::string>(request, name, request.contains(name) && request[name].is_string(), where);
    };
    const std::string context = string("context"), continuation = string("continuation");
    const std::string bare = continuation.substr(continuation[0] == ' ');
    if (bare.empty()) die("%s: the continuation is empty", where.c_str());
    choice->bytes = (int)bare.size();
    choice->characters = (int)std::count_if(bare.begin(), bare.end(), [](char c) { return (c & 0xc0) != 0x80; });
    const std::vector<int> ids = tokenizer_encode(*r->tokenizer, continuation);
    if (ids.size() > r->T)
        die("%s: the continuation has %zu tokens, more than --seq %zu", where.c_str(), ids.size(), r->T);
    task_add(&r->task, *d, choice, context_ids(r, context), ids, r->T);
    choice->line = line;
}

// The first `limit` documents of a task, 0: all. T: tokens that the model reads at most
Task task_read(const std::string& path, const std::string& name, const Tokenizer& t, size_t T, size_t limit) {
    TaskReader r = {{name, path, {}, {}}, &t, T, limit};
    LineReader lines;
    std::string line;
    json_lines_refuse(path, "requests", "scripts/render_tasks.py");
    if (!lines_open(&lines, path)) die("%s: cannot be read: %s", path.c_str(), strerror(errno));
    int number = 0;
    while (lines_next(&lines, &line)) {
        number++;
        if (!strip(line).empty()) task_read_line(&r, line, number);
        if (number % 1024 == 0) ranks_alive();
    }
    gzclose(lines.file);
    if (lines.failed)
        die("%s:%d: cannot be read from here on; the file is damaged or cut short", path.c_str(), number + 1);
    if (r.task.documents.empty()) die("%s: no request in it", path.c_str());
    for (const EvalDocument& d : r.task.documents) {
        for (size_t i = 0; i < d.choices.size(); i++)
            if (d.choices[i].line == 0) die("%s: document %ld has no request with idx %zu", path.c_str(), d.id, i);
        if (d.label >= (int64_t)d.choices.size())
            die("%s: the label of document %ld is %ld, of %zu choices", path.c_str(), d.id, d.label, d.choices.size());
    }
    return r.task;
}

// ------------------------------------------------------------------------------------------------
// Micro-batches. A context goes through the layers once, and its last token predicts the first of each continuation.
// Their other tokens follow in passes against the keys and values of all contexts of the micro-batch.

constexpr size_t PASS_PARTS = 1 << 14;      // of the cache, for the rows of a pass, unless one continuation needs more

struct Continued { size_t context, continuation; };  // by number in the task, and in the context

struct EvalBatch {
    Task* task;
    size_t first, last;                     // its contexts are [first, last) of the task's
    std::vector<std::vector<Continued>> passes; // continuations of two tokens and more
};

// What the largest micro-batch needs
struct EvalNeeds {
    size_t rows = 1, longest = 1;           // tokens of a forward, of a sequence
    size_t places = 1, prompts = 1, parts = 1;      // of the cache
};

void at_least(size_t* most, size_t n) { *most = std::max(*most, n); }

// The continuations of a batch whose contexts have `tokens` tokens, in passes of at most T rows
void batch_passes(EvalBatch* b, size_t tokens, size_t T, EvalNeeds* needs) {
    size_t rows = 0, widest = 0;            // of the last pass; parts of its widest row
    for (size_t i = b->first; i < b->last; i++) {
        const EvalContext& c = b->task->contexts[i];
        for (size_t k = 0; k < c.continuations.size(); k++) {
            const size_t n = c.continuations[k].ids.size() - 1;
            if (n == 0) continue;
            const size_t parts = cache_parts({0, (int)c.ids.size(), 0, (int)n}), most = std::max(widest, parts);
            if (b->passes.empty() || rows + n > T || (rows + n) * most > PASS_PARTS) {
                b->passes.emplace_back();
                rows = widest = 0;
            }
            b->passes.back().push_back({i, k});
            rows += n;
            widest = std::max(widest, parts);
            at_least(&needs->rows, rows);
            at_least(&needs->longest, n);
            at_least(&needs->places, tokens + rows);
            at_least(&needs->parts, rows * widest);
        }
    }
}

// Adds the task's batches, each of as many contexts as have `most` tokens together, or of one.
void task_batches(std::vector<EvalBatch>* batches, Task* task, size_t most, size_t T, EvalNeeds* needs) {
    for (size_t first = 0, last; first < task->contexts.size(); first = last) {
        size_t tokens = 0, longest = 0;
        for (last = first; last < task->contexts.size(); last++) {
            const size_t n = task->contexts[last].ids.size();
            if (last > first && tokens + n > most) break;
            tokens += n;
            longest = std::max(longest, n);
        }
        at_least(&needs->rows, tokens);
        at_least(&needs->longest, longest);
        at_least(&needs->places, tokens);
        at_least(&needs->prompts, last - first);
        at_least(&needs->parts, (last - first) * ceil_div(longest, CACHE_PART));
        batches->push_back({task, first, last, {}});
        batch_passes(&batches->back(), tokens, T, needs);
    }
}

// After olmoe_head: the sums of log p over the targets of each sequence of the micro-batch
std::vector<double> batch_logps(Olmoe* m) {
    const MicroBatch& b = m->batch;
    std::vector<double> logps(b.B(), 0.0);
    m->losses.resize(m->N);
    copy_to_host(m->losses.data(), m->acts.losses, m->losses.size());
    for (int s = 0; s < b.B(); s++)
        for (int t = b.begin(s); t < b.begin(s) + b.length(s); t++)
            if (b.targets[t] != IGNORED) logps[s] -= m->losses[t];
    return logps;
}

// The contexts into the cache, one after another, and log p of each continuation's first token. Returns the contexts'
// first places, and after these that of what follows them.
std::vector<int> batch_contexts(Olmoe* m, const Cache& cache, const EvalBatch& b) {
    EvalContext* contexts = &b.task->contexts[b.first];
    const int B = (int)(b.last - b.first);
    MicroBatch prompts;
    for (int i = 0; i < B; i++) batch_add(&prompts, contexts[i].ids.data(), nullptr, (int)contexts[i].ids.size());
    olmoe_prefill(m, cache, prompts, prompts.starts);
    for (int first = 0, rows; first < B; first += rows) {
        rows = std::min(m->capacity.classified, B - first);
        olmoe_classify(m, first, rows);
        bool any = true;
        for (size_t k = 0; any; k++) {      // the logits stay: continuation k of each context
            std::vector<int> targets(rows, IGNORED);
            std::vector<float> losses(rows);
            auto of = [&](int row) -> Continuation* {
                std::vector<Continuation>& all = contexts[first + row].continuations;
                return k < all.size() ? &all[k] : nullptr;
            };
            any = false;
            for (int row = 0; row < rows; row++) if (of(row)) { targets[row] = of(row)->ids[0]; any = true; }
            if (!any) break;
            copy_to_device(m->acts.targets + first, targets);
            cross_entropy(m->acts, false, first, rows, m->config.V);
            copy_to_host(losses.data(), m->acts.losses + first, losses.size());
            for (int row = 0; row < rows; row++) if (of(row)) of(row)->logp = -losses[row];
        }
    }
    return prompts.starts;
}

// Adds log p of the continuations' other tokens.
void batch_pass(Olmoe* m, const Cache& cache, const EvalBatch& b, const std::vector<Continued>& pass,
                const std::vector<int>& places) {
    MicroBatch batch;
    std::vector<CacheRow> rows;
    for (const Continued& p : pass) {
        const EvalContext& c = b.task->contexts[p.context];
        const std::vector<int>& ids = c.continuations[p.continuation].ids;
        const int n = (int)ids.size() - 1, in_context = (int)c.ids.size(), own = places.back() + batch.N();
        for (int t = 0; t < n; t++) rows.push_back({places[p.context - b.first], in_context, own, t + 1});
        batch_add(&batch, ids.data(), &ids[1], n, 0, in_context);
    }
    olmoe_decode(m, cache, batch, rows);
    olmoe_head(m, false);
    const std::vector<double> logps = batch_logps(m);
    for (size_t i = 0; i < pass.size(); i++)
        b.task->contexts[pass[i].context].continuations[pass[i].continuation].logp += logps[i];
}

// How far it is, on the terminal; nothing where standard error is none.
void show_progress(const char* what, size_t done, size_t all) {
    if (ranks.rank > 0 || !isatty(2)) return;
    fprintf(stderr, "\r%s: %.0f %%", what, 100.0 * done / all);
    if (done == all) fprintf(stderr, "\r%*s\r", (int)strlen(what) + 7, "");
}

// Was a training run asked to stop? It may not have long, and its last steps are to be saved. All ranks together
bool evaluation_stops() { return stopping_saves && host_sum((double)stop_requested) > 0; }

// log p of all continuations of all tasks; false where it stopped. The ranks take turns; one that has no batch or pass
// left joins the others' exchanges with a token or two that count for nothing.
bool tasks_score(Olmoe* m, const Cache& cache, std::vector<Task>* tasks, const std::vector<EvalBatch>& batches) {
    Task nothing;
    nothing.contexts = {{{0}, {{{0, 0}, 0}}}};
    const EvalBatch idle = {&nothing, 0, 1, {{{0, 0}}}};
    const size_t n = batches.size(), ranks_n = (size_t)world.size;
    for (Task& t : *tasks) for (EvalContext& c : t.contexts) for (Continuation& k : c.continuations) k.logp = 0;
    for (size_t round = 0; round < n; round += ranks_n) {
        if (evaluation_stops()) return false;
        const size_t mine = round + world.rank, end = std::min(n, round + ranks_n);
        const EvalBatch& b = mine < n ? batches[mine] : idle;
        size_t passes = 0;
        for (size_t i = round; i < end; i++) passes = std::max(passes, batches[i].passes.size());
        const std::vector<int> places = batch_contexts(m, cache, b);
        for (size_t i = 0; i < passes; i++) {
            const bool more = mine < n && i < b.passes.size();
            if (more) batch_pass(m, cache, b, b.passes[i], places);
            else batch_pass(m, cache, idle, idle.passes[0], {0, 1});
        }
        ranks_alive();
        show_progress("evaluating", end, n);
    }
    std::vector<double> logps;
    for (Task& t : *tasks)
        for (EvalContext& c : t.contexts) for (Continuation& k : c.continuations) logps.push_back(k.logp);
    host_sum(&logps);
    auto next = logps.begin();
    for (Task& t : *tasks) for (EvalContext& c : t.contexts) for (Continuation& k : c.continuations) k.logp = *next++;
    return true;
}

// ------------------------------------------------------------------------------------------------
// Token files

// The first `batches` batches of B sequences through the layers, by `forward(m)`; then `body(first, rows)` with the
// number of the batch's first sequence. The ranks take turns; one that has no batch left joins the others' exchanges
// with a row that counts for nothing.
template <typename Forward, typename Body>
void for_batches(Olmoe* m, DataLoader* data, int B, int64_t batches, Forward forward, Body body) {
    const int T = data->T;
    std::vector<int> inputs((size_t)B * T), targets((size_t)B * T);
    for (int64_t round = 0; round < batches; round += world.size) {
        const int64_t batch = round + world.rank;
        const size_t first = (size_t)batch * B;
        const int rows = batch < batches ? (int)dataloader_rows(data, first, B, inputs.data(), targets.data()) : 0;
        olmoe_set_batch(m, batch_of_rows(inputs.data(), rows > 0 ? targets.data() : nullptr, std::max(rows, 1), T));
        forward(m);
        if (rows == 0) continue;
        body(first, rows);
        ranks_alive();
    }
}

// A file of tokens in pieces of T: each predicts its T - 1 others from its first
struct PerplexitySet { std::string name; DataLoader data; double nll = 0, tokens = 0, bytes = 0; };

// bytes_of: of each token's text, where that is known
void set_score(Olmoe* m, PerplexitySet* s, int B, const std::vector<int>& bytes_of) {
    std::vector<double> sums(3, 0.0);
    for_batches(m, &s->data, B, ceil_div(s->data.instances, B), olmoe_forward, [&](size_t, int) {
        olmoe_head(m, false);
        const Losses l = olmoe_losses(m);
        sums[0] += l.nll;
        sums[1] += (double)l.valid;
        for (int target : m->batch.targets)
            if (target != IGNORED && !bytes_of.empty()) sums[2] += bytes_of[target];
    });
    host_sum(&sums);
    s->nll = sums[0]; s->tokens = sums[1]; s->bytes = sums[2];
}

// ------------------------------------------------------------------------------------------------
// Figures

// Means over the documents. bpb and ce_loss: -log p of the right choice, in bits a byte, in nats a character
struct TaskFigures { double n = 0, acc = 0, acc_norm = 0, acc_bytes = 0, acc_stderr = 0, bpb = 0, ce_loss = 0; };

// Of equal ones the first
size_t largest_of(const std::vector<double>& x) { return (size_t)(std::max_element(x.begin(), x.end()) - x.begin()); }

// samples: gets a line for each document, or null
TaskFigures task_figures(const Task& task, std::string* samples) {
    TaskFigures f;
    for (const EvalDocument& d : task.documents) {
        std::vector<double> logps, by_character, by_byte;
        std::vector<int> tokens, characters, bytes;
        for (const EvalChoice& c : d.choices) {
            logps.push_back(task.of(c).logp);
            by_character.push_back(logps.back() / c.characters);
            by_byte.push_back(logps.back() / c.bytes);
            tokens.push_back((int)task.of(c).ids.size());
            characters.push_back(c.characters);
            bytes.push_back(c.bytes);
        }
        const size_t right = (size_t)d.label;
        const int acc = largest_of(logps) == right, acc_norm = largest_of(by_character) == right;
        const int acc_bytes = largest_of(by_byte) == right;
        f.n++; f.acc += acc; f.acc_norm += acc_norm; f.acc_bytes += acc_bytes;
        f.bpb -= by_byte[right] / log(2.0);
        f.ce_loss -= by_character[right];
        if (!samples) continue;
        const Json line = {{"task", task.name}, {"doc_id", d.id}, {"label", d.label}, {"logprobs", logps},
                           {"tokens", tokens}, {"characters", characters}, {"bytes", bytes}, {"acc", acc},
                           {"acc_norm", acc_norm}, {"acc_bytes", acc_bytes}};
        *samples += line.dump() + "\n";
    }
    for (double* sum : {&f.acc, &f.acc_norm, &f.acc_bytes, &f.bpb, &f.ce_loss}) *sum /= f.n;
    f.acc_stderr = f.n > 1 ? sqrt(f.acc * (1 - f.acc) / (f.n - 1)) : NAN;
    return f;
}

// The metric that OLMo reports for the tasks that it was watched by (spec section 8.3), "" for others
std::string olmo_metric(const std::string& task) {
    std::string name;
    for (char c : task) if (c != '_') name += c;
    for (const char* acc : {"winogrande", "boolq", "sciq", "arceasy", "copa"}) if (name.find(acc) == 0) return "acc";
    for (const char* norm : {"piqa", "hellaswag", "openbookqa", "arcchallenge", "commonsenseqa", "csqa", "socialiqa",
                             "mmlu"})
        if (name.find(norm) == 0) return "len_norm";
    return "";
}

// ------------------------------------------------------------------------------------------------
// An evaluation, on its own or in a training run

struct EvalOptions {
    std::vector<std::string> tasks, perplexity;
    int64_t B = 4, T = 0, limit = 0, every = 0;     // T: 0 is 2048, or what the model has positions for
    bool start = false;                     // before the first step, too

    bool any() const { return !tasks.empty() || !perplexity.empty(); }
};

struct Evaluation {
    EvalOptions o;
    std::vector<Task> tasks;
    std::vector<PerplexitySet> sets;
    std::vector<EvalBatch> batches;         // of the tasks
    std::vector<int> bytes_of;              // (V) of each token's text; none where there is no tokenizer. EOS has none
    EvalNeeds needs;
    Cache cache;
};

constexpr int64_t EVAL_T = 2048;            // of OLMo's tasks, also where a model was trained with more

// Reads and checks all files. tokenizer: or null
void evaluation_open(Evaluation* e, const OlmoeConfig& c, const Tokenizer* tokenizer, const std::string& token_type) {
    EvalOptions& o = e->o;
    if (!o.any()) return;
    if (o.T == 0) o.T = std::min<int64_t>(EVAL_T, c.max_T);
    if (o.T > c.max_T) die("pieces of %ld tokens are longer than the model's max_position_embeddings %d", o.T, c.max_T);
    if (o.T < 2) die("pieces of %ld token predict nothing", o.T);
    capacity_of_rows(c, o.B, o.T, Use::inference);              // or it is too large
    if (!o.tasks.empty() && !tokenizer) die("tasks need a tokenizer: give --tokenizer NAME");
    std::set<std::string> names, set_names;
    for (const std::string& path : o.tasks) {
        e->tasks.push_back(task_read(path, evaluation_name(path, &names), *tokenizer, (size_t)o.T, (size_t)o.limit));
        ranks_alive();
    }
    for (Task& task : e->tasks) task_batches(&e->batches, &task, (size_t)(o.B * o.T), (size_t)o.T, &e->needs);
    for (const std::string& path : o.perplexity) {
        e->sets.push_back({evaluation_name(path, &set_names), {}});
        DataLoader& d = e->sets.back().data;
        dataloader_open(&d, {path}, (int)o.T, c.V, DataOrder::sequential, 0, false, token_type);
        dataloader_check(&d, d.instances, ranks_alive);
        at_least(&e->needs.rows, std::min<size_t>((size_t)o.B, d.instances) * (size_t)o.T);
        at_least(&e->needs.longest, (size_t)o.T);
    }
    for (int id = 0; tokenizer && id < c.V; id++)
        e->bytes_of.push_back(id == tokenizer->eos ? 0 : (int)tokenizer_decode(*tokenizer, id).size());
}

// Room for its micro-batches, before olmoe_plan
void evaluation_capacity(const Evaluation& e, Capacity* capacity) {
    capacity->N = std::max(capacity->N, (int)e.needs.rows);
    capacity->T = std::max(capacity->T, (int)e.needs.longest);
    capacity->positions = std::max(capacity->positions, (int)e.o.T);
}

// Ends the run where a rank has read other requests or tokens than rank 0. All ranks together
void evaluation_agree(const Evaluation& e) {
    uint64_t hash = FNV_BASIS;
    auto add = [&](const void* bytes, size_t n) { hash = fnv1a(hash, (const unsigned char*)bytes, n); };
    auto add_ids = [&](const std::vector<int>& ids) {
        const size_t n = ids.size();
        add(&n, sizeof n);
        add(ids.data(), n * sizeof ids[0]);
    };
    for (const Task& t : e.tasks)
        for (const EvalContext& c : t.contexts) {
            add_ids(c.ids);
            for (const Continuation& k : c.continuations) add_ids(k.ids);
        }
    for (const PerplexitySet& s : e.sets) {
        const uint64_t fingerprint = dataloader_fingerprint(&s.data);
        add(&fingerprint, sizeof fingerprint);
    }
    const double seen = (double)(hash >> 11);                   // as many bits as a double has
    if (host_sum(world.rank == 0 ? seen : 0) != seen)
        die("the files of --eval-tasks or --eval-perplexity are not those that rank 0 sees");
}

// Between olmoe_plan and olmoe_allocate
void evaluation_plan(Evaluation* e, Olmoe* m) {
    evaluation_agree(*e);
    if (!e->tasks.empty()) cache_plan(&e->cache, m, e->needs.places, (int)e->needs.prompts, e->needs.parts);
}

// False where a training run was asked to stop: there are no figures then. All ranks together
bool evaluation_score(Evaluation* e, Olmoe* m) {
    if (!tasks_score(m, e->cache, &e->tasks, e->batches)) return false;
    for (PerplexitySet& s : e->sets) {
        if (evaluation_stops()) return false;
        set_score(m, &s, (int)e->o.B, e->bytes_of);
    }
    return true;
}

double bits_per_byte(const PerplexitySet& s) { return s.bytes > 0 ? s.nll / s.bytes / log(2.0) : NAN; }

// A table of the tasks, in which a * marks what OLMo reports, and one of the token files
void evaluation_print(const Evaluation& e) {
    size_t width = 4;
    for (const Task& t : e.tasks) width = std::max(width, t.name.size());
    for (const PerplexitySet& s : e.sets) width = std::max(width, s.name.size());
    const int w = (int)width;
    auto if_defined = [](double x) { return std::isfinite(x) ? text("%.4f", x) : ""; };
    if (!e.tasks.empty())
        printf("  %-*s  %9s  %-8s %-8s  %-9s  %6s  %7s  %7s\n", w, "task", "documents", "acc", "acc_norm", "acc_bytes",
               "stderr", "bpb", "ce_loss");
    for (const Task& t : e.tasks) {
        const TaskFigures f = task_figures(t, nullptr);
        const std::string metric = olmo_metric(t.name);
        printf("  %-*s  %9.0f  %.4f%c  %.4f%c   %.4f     %6s  %7.4f  %7.4f\n", w, t.name.c_str(), f.n, f.acc,
               metric == "acc" ? '*' : ' ', f.acc_norm, metric == "len_norm" ? '*' : ' ', f.acc_bytes,
               if_defined(f.acc_stderr).c_str(), f.bpb, f.ce_loss);
    }
    if (!e.sets.empty())
        printf("  %-*s  %9s  %-7s  %10s  %13s\n", w, "set", "tokens", "loss", "perplexity", "bits per byte");
    for (const PerplexitySet& s : e.sets) {
        const double loss = s.nll / s.tokens;
        printf("  %-*s  %9.0f  %.4f  %10.4f  %13s\n", w, s.name.c_str(), s.tokens, loss, exp(loss),
               if_defined(bits_per_byte(s)).c_str());
    }
}

// ------------------------------------------------------------------------------------------------
// In a training run

std::vector<Option> evaluation_options(EvalOptions* o) {
    return {
        {"eval-tasks", &o->tasks, "FILES",
         "request files of multiple-choice tasks to evaluate on (.jsonl, gzipped or not)"},
        {"eval-perplexity", &o->perplexity, "FILES", "token files to evaluate on, each on its own"},
        {"eval-every", &o->every, "S", "steps between evaluations; 0: only at the end"},
        {"eval-start", &o->start, "", "evaluate before the first step, too"},
        {"eval-seq", &o->T, "T", "tokens that the model reads at most in an evaluation; 0: 2048, or "
         "max_position_embeddings of the config if less", 0, 1 << 20},
    };
}

// By the weights of now: on the screen, and in a line of the log under the keys of OLMo's
void evaluation_in_run(Evaluation* e, Olmoe* m, Json* line) {
    at_step("evaluation");
    const bool whole = evaluation_score(e, m);
    at_step("");
    if (!whole) { printf("  no evaluation: the run was asked to stop\n"); return; }
    evaluation_print(*e);
    auto add = [&](const std::string& key, double x) { (*line)["eval/" + key] = std::isfinite(x) ? Json(x) : Json(); };
    for (const Task& t : e->tasks) {
        const TaskFigures f = task_figures(t, nullptr);
        add("downstream/" + t.name + "_acc", f.acc);
        add("downstream/" + t.name + "_len_norm", f.acc_norm);
        add("downstream_bpb/" + t.name + "_bpb", f.bpb);
        add("downstream_ce_loss/" + t.name + "_ce_loss", f.ce_loss);
    }
    for (const PerplexitySet& s : e->sets) {
        add(s.name + "/CrossEntropyLoss", s.nll / s.tokens);
        add(s.name + "/Perplexity", exp(s.nll / s.tokens));
    }
}

// ------------------------------------------------------------------------------------------------
// The command

struct EvaluateCommand {
    std::string model, tokenizer_name, json, samples;
    Choice token_type = "uint16";
    OlmoeConfig config;
    Tokenizer tokenizer;
    Evaluation e;
    Olmoe olmoe;
};

std::vector<Option> evaluate_options(EvaluateCommand* v) {
    EvalOptions& o = v->e.o;
    return with_launch_checks({
        {"model", &v->model, "DIR", "Hugging Face directory, or a checkpoint"},
        {"tasks", &o.tasks, "FILES", "request files of multiple-choice tasks (.jsonl, gzipped or not)"},
        {"perplexity", &o.perplexity, "FILES",
         "token files (.npy of uint16 or uint32, or llm.c's .bin), each on its own"},
        {"tokenizer", &v->tokenizer_name, "NAME", "bytes, or a tokenizer.json; default: the model's"},
        {"token-type", &v->token_type, "uint16|uint32", "what token files without a header hold"},
        {"batch", &o.B, "B", "pieces of a token file at a time, or contexts of as many tokens", 1, 1 << 20},
        {"seq", &o.T, "T",
         "tokens that the model reads at most: requests are cut on the left, token files into pieces; 0: 2048, "
         "or max_position_embeddings if less", 0, 1 << 20},
        {"limit", &o.limit, "N", "only the first N documents of each task; 0: all", 0, 1e15},
        {"json", &v->json, "OUT.json", "the figures as JSON"},
        {"samples", &v->samples, "OUT.jsonl", "each document's log-probabilities, a line of JSON each"},
    });
}

Json evaluation_json(const Evaluation& e) {
    Json all = {{"tasks", Json::object()}, {"perplexity", Json::object()}};
    auto number = [](double x) { return std::isfinite(x) ? Json(x) : Json(); };
    for (const Task& t : e.tasks) {
        const TaskFigures f = task_figures(t, nullptr);
        all["tasks"][t.name] = {{"n", (int64_t)f.n}, {"acc", f.acc}, {"acc_norm", f.acc_norm},
                                {"acc_bytes", f.acc_bytes}, {"acc_stderr", number(f.acc_stderr)},
                                {"bpb", number(f.bpb)}, {"ce_loss", number(f.ce_loss)}};
    }
    for (const PerplexitySet& s : e.sets) {
        const double loss = s.nll / s.tokens, bits = bits_per_byte(s);
        Json& j = all["perplexity"][s.name];
        j = {{"loss", number(loss)}, {"perplexity", number(exp(loss))}, {"tokens", (int64_t)s.tokens}};
        if (std::isfinite(bits)) j["bits_per_byte"] = bits;
    }
    return all;
}

// Damaged weights would give figures like any others.
void evaluation_check(const Evaluation& e) {
    for (const Task& t : e.tasks)
        for (const EvalContext& c : t.contexts)
            for (const Continuation& k : c.continuations)
                if (!std::isfinite(k.logp))
                    die("%s: a log-probability is not finite; are the model's weights damaged?", t.path.c_str());
    for (const PerplexitySet& s : e.sets)
        if (!std::isfinite(s.nll)) die("%s: the loss is not finite; are the model's weights damaged?", s.name.c_str());
}

int command_evaluate(int argc, char** argv) {
    EvaluateCommand v;
    Evaluation& e = v.e;
    options_parse(argc, argv, "evaluate --model DIR [--tasks FILES] [--perplexity FILES] [options]",
                  evaluate_options(&v));
    if (v.model.empty()) die("evaluate needs --model DIR");
    if (!e.o.any()) die("evaluate needs --tasks FILES or --perplexity FILES");
    if (!v.samples.empty() && e.o.tasks.empty()) die("--samples needs --tasks");
    outputs_check({{"json", {v.json}}, {"samples", {v.samples}}},
                  {{"tasks", e.o.tasks}, {"perplexity", e.o.perplexity}});
    for (const std::string* path : {&v.json, &v.samples}) if (!path->empty()) file_check_writable(*path);
    config_read(&v.config, v.model);
    const bool own = access((v.model + "/tokenizer.json").c_str(), F_OK) == 0;
    if (v.tokenizer_name.empty() && own) v.tokenizer_name = v.model;
    const bool has_tokenizer = !v.tokenizer_name.empty();
    if (has_tokenizer) tokenizer_open(&v.tokenizer, v.tokenizer_name);
    if (v.tokenizer.vocab > v.config.V)
        die("the tokenizer's %d ids don't fit the model's vocabulary of %d", v.tokenizer.vocab, v.config.V);
    evaluation_open(&e, v.config, has_tokenizer ? &v.tokenizer : nullptr, v.token_type);

    device_open();
    Capacity capacity;
    evaluation_capacity(e, &capacity);
    capacity.classified = std::min(capacity.N, HEAD_ROWS);
    olmoe_plan(&v.olmoe, v.config, capacity);
    evaluation_plan(&e, &v.olmoe);
    olmoe_allocate(&v.olmoe);
    olmoe_load(&v.olmoe, v.model);
    evaluation_score(&e, &v.olmoe);
    evaluation_check(e);
    evaluation_print(e);
    std::string samples;
    for (const Task& t : e.tasks) task_figures(t, &samples);
    if (!v.json.empty()) file_replace(v.json, json_text(evaluation_json(e)));
    if (!v.samples.empty()) file_replace(v.samples, samples);
    olmoe_free(&v.olmoe);
    device_close();
    return 0;
}
