// olmoe batch: what a step of a run trained on. The order of the data follows from the options, so it needs no log of
// it. With a model, how likely that finds each sequence; with --replay, the step's gradients.
//
// Included once, by olmoe.cu, after the training run.
#pragma once
#include <filesystem>
#include <map>
#include "evaluate.h"
#include "../lib/run.h"

// ------------------------------------------------------------------------------------------------
// Which run, and which step

struct BatchCommand {
    std::string run, model;
    int64_t step = 0, most = 5;
    bool json = false, replay = false;
    TrainingRun r;                          // of which only the data are opened, unless it is replayed
    Json logged;                            // the step's line in the log, or null
    Json config, begun;                     // of the log's first line; begun: the checkpoint that it goes on from
    int64_t micro_batch = 0;                // of all ranks together, when the step was trained; 0: not known
    int64_t resumed = 0;                    // the step after which the options hold that it was trained by
    std::vector<BatchRange> skipped;        // that the log names
    Json found = Json::object();            // what is printed
    std::vector<double> losses, targets, norms;     // (G) of the step's sequences or rows, see replay_gradients
};

std::string string_of(const Json& j) { return j.is_string() ? j.get<std::string>() : ""; }

// The command's own options, and train's where it has none of that name
std::vector<Option> batch_options(BatchCommand* b) {
    std::vector<Option> options = {
        {"run", &b->run, "OUT",
         "the directory of a run, whose log has its options; train's options given here take their place"},
        {"step", &b->step, "S", "of the run", 1, 1e15},
        {"model", &b->model, "DIR", "weights, for the losses of each sequence"},
        {"most", &b->most, "N", "how many documents, tokens and tensors are listed", 1, 1e9},
        {"json", &b->json, "", "a JSON object, of all tensors"},
        {"replay", &b->replay, "",
         "train from the newest checkpoint before the step through the steps between, and show its gradients: "
         "the norm of each tensor's, and of each sequence's share"},
    };
    const size_t own = options.size();
    for (const Option& t : train_options(&b->r.o))
        if (std::none_of(options.begin(), options.begin() + own, [&](auto& o) { return !strcmp(o.name, t.name); }))
            options.push_back(t);
    return options;
}

void skipped_add(std::vector<BatchRange>* all, const Json& ranges) {
    for (const Json& r : ranges) all->push_back({r.at(0), r.at(1)});
}

// The options that the step was trained by, as a command line had them: the first line of the log has the one that the
// run was started by, and each other one that it was resumed by. Finds the step's line, too.
void batch_read_log(BatchCommand* b) {
    TrainOptions& o = b->r.o;
    const std::string path = b->run + "/log.jsonl", step_begins = text("{\"step\":%ld,", b->step);
    std::string all, folder;
    if (!file_contents(&all, path)) die("%s: cannot be read: %s", path.c_str(), strerror(errno));
    for (size_t begin = 0, end; (end = all.find('\n', begin)) != std::string::npos; begin = end + 1)
        if (all.compare(begin, step_begins.size(), step_begins) == 0)
            b->logged = json_parse(all.substr(begin, end - begin));
    try {
        const Json first = json_parse(all.substr(0, all.find('\n'))), none = Json::array();
        Json how = first;
        how.update(first.at("config"));
        skipped_add(&b->skipped, how.value("skip_batches", none));
        for (const Json& resumed : first.value("resumed", none)) {
            skipped_add(&b->skipped, resumed.at("skip_batches"));
            if (resumed.at("step") < b->step) how = resumed;
        }
        b->config = first.at("config");
        b->begun = first.value("from", Json());
        b->micro_batch = how.value("micro_batch", (int64_t)0);
        b->resumed = how.value("step", (int64_t)0);
        const std::vector<std::string> words = how.at("command");
        std::vector<char*> argv;
        for (const std::string& word : words) argv.push_back((char*)word.c_str());
        finetune_defaults(&o, (int)argv.size(), argv.data());
        options_parse((int)argv.size(), argv.data(), "", train_options(&o));
        o.global_batch = b->config.at("global_batch");
        folder = how.at("folder");
    } catch (const Json::exception&) {
        die("%s: its first line does not name the run's options; give them in the place of --run", path.c_str());
    }
    o.rendezvous.clear();                                       // of other ranks than these
    auto anchor = [&](std::string* file) {                      // it was relative to the folder
        if (!file->empty() && file->front() != '/') *file = folder + "/" + *file;
    };
    if (o.tokenizer != "bytes") anchor(&o.tokenizer);
    for (std::string* file : {&o.config, &o.model, &o.reference}) anchor(file);
    for (std::vector<std::string>* files : {&o.data, &o.val}) for (std::string& file : *files) anchor(&file);
}

void batch_parse(BatchCommand* b, int argc, char** argv) {
    const char* usage = "batch --run OUT --step S [--model DIR] [--replay] [options of train]";
    TrainOptions& o = b->r.o;
    BatchCommand given;
    options_parse(argc, argv, usage, batch_options(&given));
    if (given.step == 0) die("batch needs --step S");
    if (given.replay && given.run.empty()) die("--replay needs --run OUT");
    if (given.replay && !given.model.empty()) die("--replay has the run's own weights; leave out --model");
    b->run = given.run;
    b->step = given.step;
    b->r.rows.of_out = true;
    finetune_defaults(&o, argc, argv);
    if (!b->run.empty()) batch_read_log(b);
    for (auto list : {&TrainOptions::data, &TrainOptions::val, &TrainOptions::freeze, &TrainOptions::skip_batches})
        if (!(given.r.o.*list).empty()) (o.*list).clear();
    options_parse(argc, argv, usage, batch_options(b));
    if (!b->run.empty()) o.out = b->run;
    if (o.out.empty()) o.out = ".";
    if (b->run.empty() && o.config.empty()) o.model = b->model;
    o.val.clear();                          // what a step trains on does not depend on these
    o.routing_every = 0;
    o.trace.clear();
    o.resume.clear();
    if (b->begun.is_object()) o.resume.assign(string_of(b->begun.value("checkpoint", Json())));
    if (!b->replay) o.ep = 1;
    if (!b->replay) o.zero = 0;
    o.eval = EvalOptions();
    o.profile = false;
    train_options_check(&o);
}

// ------------------------------------------------------------------------------------------------
// What the step trains on

// At most so many bytes of valid UTF-8, and ... for the rest
std::string shortened(const std::string& s, size_t most) {
    if (s.size() <= most) return s;
    while (most > 0 && (s[most] & 0xc0) == 0x80) most--;        // not within a character
    return s.substr(0, most) + "...";
}

// Text for a table: on one line, and cut where it is long
std::string one_line(const std::string& all, size_t most) {
    std::string line = Json(all.substr(0, 4 * most)).dump(-1, ' ', false, Json::error_handler_t::replace);
    return line.size() > most ? shortened(line, most - 4) + "\"" : line;
}

// The beginning of a text of tokens, or their numbers
std::string tokens_shown(const TrainingRun& r, const int* ids, size_t n) {
    const size_t shown = std::min<size_t>(n, 40);
    if (r.tokenizer.vocab > 0) return tokenizer_decode(r.tokenizer, std::vector<int>(ids, ids + shown), false);
    std::string numbers;
    for (size_t i = 0; i < shown; i++) numbers += (i ? " " : "") + std::to_string(ids[i]);
    return numbers;
}

// The documents of the files of a step's sequences that have a part in one of these or end where it begins: whole lists
// may be long
using DocumentLists = std::map<std::string, std::vector<Document>>;
DocumentLists documents_of_step(const DataLoader& d, const std::vector<size_t>& numbers) {
    std::map<std::string, std::vector<size_t>> starts;
    std::map<std::string, const TokenFile*> files;
    for (size_t instance : numbers) {
        const TokenFile& f = token_file_of(d, instance);
        files[f.path] = &f;
        starts[f.path].push_back((instance - f.first) * d.T);
    }
    DocumentLists lists;
    for (auto& [path, at] : starts) {
        std::string problem;
        std::vector<Document> all = documents_read(*files[path], &problem);
        if (!problem.empty()) fprintf(stderr, "note: %s\n", problem.c_str());
        std::sort(at.begin(), at.end());
        auto elsewhere = [&, &at = at](const Document& document) {
            auto next = std::upper_bound(at.begin(), at.end(), document.start);     // the first that begins after it
            const bool within = next != at.begin() && document.start < *(next - 1) + d.T;
            return !within && (next == at.end() || document.end < *next);
        };
        all.erase(std::remove_if(all.begin(), all.end(), elsewhere), all.end());
        lists[path] = std::vector<Document>(all);               // without the room of the others
    }
    return lists;
}

// The documents of a sequence, tokens [start, start + n) of a file: by the list beside it, else as EOS ends them
Json sequence_documents(const TrainingRun& r, const std::vector<Document>& documents, size_t start, const int* ids,
                        int n) {
    Json list = Json::array();
    auto add = [&](size_t begin, size_t end, const Document* d) {
        Json j;
        if (d) j = {{"id", d->id}, {"source", d->source}};
        j["tokens"] = {begin, end - 1};
        j["text"] = tokens_shown(r, ids + begin, end - begin);
        list.push_back(j);
    };
    auto ends_before = [](const Document& d, size_t at) { return d.end <= at; };
    for (auto d = std::lower_bound(documents.begin(), documents.end(), start, ends_before);
         d != documents.end() && d->start < start + n; d++)
        if (d->start < d->end) add(std::max(d->start, start) - start, std::min(d->end, start + n) - start, &*d);
    const int eos = r.tokenizer.vocab > 0 ? r.tokenizer.eos : r.config.eos_token_ids[0];
    for (int begin = 0, t = 0; documents.empty() && t < n; t++)
        if (ids[t] == eos || t + 1 == n) { add(begin, t + 1, nullptr); begin = t + 1; }
    return list;
}

// A sequence of a token file, with all that is known of it but by a model; `targets` may all be ignored.
Json token_sequence(TrainingRun* r, size_t instance, const DocumentLists& lists, std::vector<int>* ids,
                    std::vector<int>* targets) {
    DataLoader& d = r->data;
    const TokenFile& f = token_file_of(d, instance);
    const size_t start = (instance - f.first) * d.T;
    ids->resize(d.T);
    targets->resize(d.T);
    dataloader_row(&d, instance, ids->data(), targets->data());
    return {{"instance", instance}, {"file", f.path}, {"tokens", {start, start + d.T - 1}},
            {"masked", d.T > 1 && (*targets)[0] == IGNORED},
            {"documents", sequence_documents(*r, lists.at(f.path), start, ids->data(), d.T)}};
}

// The lines of a step's rows, by file and number, as far as they are there
using RowLines = std::map<std::pair<int64_t, int64_t>, std::string>;
RowLines lines_of_step(const TrainingRun& r, const std::vector<size_t>& numbers) {
    std::map<int64_t, std::vector<int64_t>> wanted;             // of each file, so that it is read once
    for (size_t row : numbers) {
        const int64_t* at = r.rows.training.lines + 2 * row;
        wanted[at[0]].push_back(at[1]);
    }
    RowLines found;
    for (auto& [file, of_file] : wanted) {
        std::sort(of_file.begin(), of_file.end());
        LineReader lines;
        std::string line;
        if (!lines_open(&lines, r.o.data[file])) continue;
        for (int64_t i = 1; i <= of_file.back() && lines_next(&lines, &line); i++)
            if (std::binary_search(of_file.begin(), of_file.end(), i)) found[{file, i}] = line;
        gzclose(lines.file);
    }
    return found;
}

// Whether a line still is what the run read as this row
bool row_is(const TrainingRun& r, size_t row, const std::string& line) {
    const Rows& rows = r.rows.training;
    try {
        const RowData now = row_read(line, row_format(r));
        for (int side = 0; side < rows.sides(); side++) {
            const std::vector<int>& ids = now.sides[side].ids;
            const RowSequence then = row_sequence(rows, row * rows.sides() + side);
            const size_t n = std::min<size_t>(ids.size(), r.o.T);
            if (!std::equal(ids.begin(), ids.begin() + n, then.ids.begin(), then.ids.end())) return false;
        }
        return true;
    } catch (const std::exception&) { return false; }
}

Json row_of_step(const TrainingRun& r, size_t row, const RowLines& lines) {
    const Rows& rows = r.rows.training;
    const int64_t* at = rows.lines + 2 * row;
    Json lengths = Json::array();
    for (int side = 0; side < rows.sides(); side++) lengths.push_back(rows.length(row * rows.sides() + side));
    const auto line = lines.find({at[0], at[1]});
    const bool there = line != lines.end() && row_is(r, row, line->second);
    return {{"row", row}, {"file", r.o.data[at[0]]}, {"line", at[1]}, {"lengths", lengths},
            {"text", there ? Json(line->second) : Json()}};
}

// ------------------------------------------------------------------------------------------------
// By a model

// Adds to a sequence's JSON: -log p a target, the tokens that it finds the least likely, and its experts' load.
void sequence_by_model(const BatchCommand& b, Olmoe* m, const MicroBatch& batch, Json* j) {
    olmoe_set_batch(m, batch);
    olmoe_forward(m);
    olmoe_head(m, false);
    const Losses l = olmoe_losses(m);
    (*j)["targets"] = l.valid;
    (*j)["loss"] = l.valid > 0 ? digits(l.nll / (double)l.valid) : Json();
    std::vector<int> order;
    for (int t = 0; t < m->N; t++) if (batch.targets[t] != IGNORED) order.push_back(t);
    std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return m->losses[x] > m->losses[y]; });
    if (order.size() > (size_t)b.most) order.resize(b.most);
    (*j)["worst"] = Json::array();
    for (int t : order) {
        const bool second = t >= batch.length(0);               // of a pair
        Json worst = {{"token", t + 1 - (second ? batch.length(0) : 0)}, {"id", batch.targets[t]},
                      {"text", tokens_shown(b.r, &batch.targets[t], 1)}, {"loss", digits(m->losses[t])}};
        if (batch.B() == 2) worst["side"] = second ? "rejected" : "chosen";
        (*j)["worst"].push_back(worst);
    }
    Balance balance;
    balance.add(*m);
    (*j)["experts"] = balance_json(balance);
}

// ------------------------------------------------------------------------------------------------
// Replay

// Sequences [first, last) of a micro-batch
MicroBatch batch_part(const MicroBatch& all, size_t first, size_t last) {
    MicroBatch part;
    for (size_t s = first; s < last; s++) {
        const int begin = all.begin((int)s);
        batch_add(&part, &all.inputs[begin], &all.targets[begin], all.length((int)s), all.weights[begin]);
    }
    return part;
}

// Before the update of the step: norms of its gradient by tensor, then those of each sequence's share, which is of its
// own part of the cross entropy, or of the preference loss, and not of the auxiliary losses. Each share goes through
// the model alone, on the rank that had it, while the others join in with a token that counts for nothing.
void replay_gradients(BatchCommand* b, const std::vector<MicroBatch>& batches, const StepResult& result,
                      const std::vector<double>& squares) {
    TrainingRun* run = &b->r;
    Olmoe* m = &run->model;
    const bool of_rows = run->objective->of_rows;
    const size_t B = run->o.B, G = run->o.global_batch, ranks_n = world.size, sides = sides_of(*run->objective);
    b->found["loss"] = digits(result.losses.loss);
    b->found["grad_norm"] = digits(result.norm);
    for (size_t i = 0; i < squares.size(); i++)
        if (!m->tensors[i].frozen)
            b->found["tensors"][file_name_of(m->tensors[i], run->config)] = digits(sqrt(squares[i]));
    for (auto* all : {&b->losses, &b->targets, &b->norms}) all->assign(G, 0.0);
    const Deal dealt = run->rows.step.deal;
    const int nothing = 0;
    for (size_t rank = 0; rank < ranks_n; rank++)
        for (size_t i = 0; i < G / ranks_n; i++) {
            const bool mine = rank == (size_t)world.rank;
            MicroBatch one = batch_of_rows(&nothing, nullptr, 1, 1);
            if (mine) one = batch_part(batches[i / B], i % B * sides, (i % B + 1) * sides);
            olmoe_set_batch(m, one);
            olmoe_forward(m);
            double own = NAN;                                   // of DPO and KTO
            if (mine && of_rows) {
                run->rows.step.deal.mine = {{dealt.mine[i / B][i % B]}};
                run->micro_batch = 0;
                own = run->objective->gradient(run) * (double)G;
            } else {
                olmoe_head(m, true);
            }
            olmoe_backward(m, 0, 0, 1, true);
            const double norm = olmoe_grad_norm(m);
            if (!mine) continue;
            const Losses l = olmoe_losses(m);
            const size_t place = of_rows ? dealt.mine[i / B][i % B] : i * ranks_n + rank;
            b->norms[place] = norm;
            b->losses[place] = std::isnan(own) ? l.nll / std::max<double>(1, (double)l.valid) : own;
            b->targets[place] = (double)l.valid;
        }
    for (auto* all : {&b->losses, &b->targets, &b->norms}) host_sum(all);
}

// The data, or rows, are those that the log names.
void batch_check_data(const BatchCommand& b) {
    const TrainingRun& r = b.r;
    const bool of_rows = r.objective->of_rows;
    const std::string now = text("%016lx", of_rows ? r.rows.training.fingerprint : dataloader_fingerprint(&r.data));
    const std::string then = b.config.is_object() ? string_of(b.config.value("data_fingerprint", Json())) : "";
    if (!then.empty() && then != now)
        die("%s: not the data of %s, or changed since, or in another order (fingerprint %s, not %s); "
            "name the run's by --data", join(r.o.data).c_str(), b.run.c_str(), now.c_str(), then.c_str());
}

void batch_replay(BatchCommand* b) {
    TrainingRun& r = b->r;
    r.replayed = b->step;
    r.at_gradient = [b](const std::vector<MicroBatch>& batches, const StepResult& result,
                        const std::vector<double>& squares) { replay_gradients(b, batches, result, squares); };
    run_start(&r);
    if (r.objective->of_rows) batch_check_data(*b);
    if (b->step > r.steps) die("--step %ld: the run has %ld", b->step, r.steps);
    if (b->step <= r.step)
        die("--step %ld: the log of %s goes on from step %ld, of %s", b->step, b->run.c_str(), r.step, r.from.c_str());
    if (r.step < b->resumed && world.rank == 0)
        fprintf(stderr, "note: until step %ld the run had other options, and there is no checkpoint of that step\n",
                b->resumed);
    if (!b->json) printf("from %s\n", r.from.empty() ? "the beginning" : r.from.c_str());
    while (r.step < b->step) {
        run_step(&r);
        if (r.stop) die("stopped at step %ld", r.step);
    }
}

// ------------------------------------------------------------------------------------------------
// The command

// Names and lines of files, without what would end or move a line of the screen
std::string on_screen(const std::string& all) {
    std::string s = utf8_replace(all);
    for (char& c : s) if ((unsigned char)c < 32 || c == 127) c = '?';
    return s;
}

void batch_print_documents(const BatchCommand& b, const Json& documents) {
    const size_t n = documents.size(), shown = std::min(n, (size_t)b.most);
    for (size_t i = 0; i < shown; i++) {
        const Json& d = documents[i];
        const std::string name = d.contains("id") ? string_of(d["id"]) + " (" + string_of(d["source"]) + ") " : "";
        printf("      from %-5ld %s%s\n", (int64_t)d["tokens"][0], on_screen(name).c_str(),
               one_line(d["text"], 70).c_str());
    }
    if (n > shown) printf("      and %zu documents more\n", n - shown);
}

void batch_print_sequence(const BatchCommand& b, const Json& j) {
    const bool row = j.contains("row");
    const std::string file = on_screen(string_of(j["file"]));
    printf("#%-4ld ", (int64_t)j["place"]);
    if (row) printf("row %ld: %s:%ld", (int64_t)j["row"], file.c_str(), (int64_t)j["line"]);
    else printf("instance %ld: %s, tokens %ld to %ld", (int64_t)j["instance"], file.c_str(), (int64_t)j["tokens"][0],
                (int64_t)j["tokens"][1]);
    if (j.contains("loss"))
        printf(", loss %s", j["loss"].is_null() ? "none" : text("%.4f", (double)j["loss"]).c_str());
    if (j.contains("grad_norm")) printf(", gradient %.4g", (double)j["grad_norm"]);
    printf("%s\n", !row && j["masked"] ? ", repetitive: no targets" : "");
    const Json parsed = row ? json_parse(string_of(j["text"])) : Json();        // it may have \u041f for a letter
    const std::string line = on_screen(parsed.dump(-1, ' ', false, Json::error_handler_t::replace));
    if (row && j["text"].is_null()) printf("      (the file has another row there now, or none)\n");
    else if (row) printf("      %s\n", shortened(line, 100).c_str());
    else batch_print_documents(b, j["documents"]);
    if (!j.contains("worst")) return;
    if (j["worst"].empty()) return;
    printf("      worst:");
    for (const Json& w : j["worst"])
        printf(" %s at %ld%s (%.2f)", one_line(w["text"], 20).c_str(), (int64_t)w["token"],
               w.contains("side") ? (" of " + string_of(w["side"])).c_str() : "", (double)w["loss"]);
    printf("\n      experts, max/mean load by layer:");
    for (const Json& layer : j["experts"]) printf(" %.2f", (double)layer["max_over_mean"]);
    printf("\n");
}

void batch_print(const BatchCommand& b) {
    const Json& f = b.found;
    if (b.json) { printf("%s\n", f.dump(-1, ' ', false, Json::error_handler_t::replace).c_str()); return; }
    const Json line = b.logged.is_object() ? b.logged : Json::object();
    printf("step %ld: batch %ld of the data, in epoch %ld%s\n", b.step, (int64_t)f["batch"], (int64_t)f["epoch"],
           line.empty() && !b.run.empty() ? "; not in the log" : "");
    if (b.replay) {
        auto logged = [&](const char* name) {
            const Json then = line.value(name, Json());
            return then.is_null() ? "not in the log" : then == f[name] ? "as logged" : "logged: " + then.dump();
        };
        printf("loss %s (%s), gradient norm %s (%s)\n", f["loss"].dump().c_str(), logged("loss").c_str(),
               f["grad_norm"].dump().c_str(), logged("grad_norm").c_str());
        const int64_t now = b.r.o.B * world.size;
        if (b.micro_batch > 0 && b.micro_batch != now)
            printf("micro-batches of %ld on all ranks together, and the run had %ld: sums are rounded otherwise\n", now,
                   b.micro_batch);
        std::vector<std::pair<double, std::string>> tensors;
        for (auto& [name, norm] : f["tensors"].items()) tensors.push_back({norm, name});
        std::sort(tensors.rbegin(), tensors.rend());
        for (size_t i = 0; i < std::min(tensors.size(), (size_t)b.most); i++)
            printf("  %10.4g  %s\n", tensors[i].first, tensors[i].second.c_str());
    }
    for (const Json& j : f["sequences"]) batch_print_sequence(b, j);
}

// The sequences of the step; `model`: or null
void batch_sequences_find(BatchCommand* b, Olmoe* model) {
    TrainingRun& r = b->r;
    DataLoader& d = r.data;
    const int G = (int)r.o.global_batch;
    dataloader_go_to(&d, G, batch_of_step(b->step, d.skipped));
    const std::vector<size_t> numbers = dataloader_draw(&d, G);
    b->found["step"] = b->step;
    b->found["batch"] = batch_of_step(b->step, d.skipped);
    b->found["epoch"] = d.epoch;
    const bool of_rows = r.objective->of_rows;
    const DocumentLists lists = of_rows ? DocumentLists() : documents_of_step(d, numbers);
    const RowLines lines = of_rows ? lines_of_step(r, numbers) : RowLines();
    for (size_t i = 0; i < numbers.size(); i++) {
        MicroBatch batch;
        std::vector<int> ids, targets;
        Json j = {{"place", i}};
        if (of_rows) {
            j.update(row_of_step(r, numbers[i], lines));
            const RowBlock block = block_of_rows(r.rows.training, {numbers[i]});
            for (const RowSequence& s : block[0]) batch_add(&batch, s, 0);
        } else {
            j.update(token_sequence(&r, numbers[i], lists, &ids, &targets));
            batch = batch_of_rows(ids.data(), targets.data(), 1, d.T);
        }
        if (model) sequence_by_model(*b, model, batch, &j);
        if (b->replay) {
            j["targets"] = (int64_t)b->targets[i];
            j["loss"] = b->targets[i] > 0 ? digits(b->losses[i]) : Json();
            j["grad_norm"] = digits(b->norms[i]);
        }
        b->found["sequences"].push_back(j);
    }
}

// The batches that the run skipped: those of its log and of its newest checkpoint, too
void batch_skipped(const BatchCommand& b, TrainingRun* r) {
    r->data.skipped.insert(r->data.skipped.end(), b.skipped.begin(), b.skipped.end());
    r->data.skipped = batch_ranges_joined(r->data.skipped);
    const auto checkpoints = checkpoint_list(r->o.out);
    std::string contents;
    if (checkpoints.empty() || !file_contents(&contents, checkpoints[0].second + "/trainer_state.json")) return;
    const Json state = json_parse(contents);
    try {
        if (state.is_object())
            skipped_add(&r->data.skipped, state.at("trainer").value("skip_batches", Json::array()));
    } catch (const Json::exception& e) { die("%s/trainer_state.json: %s", checkpoints[0].second.c_str(), e.what()); }
    r->data.skipped = batch_ranges_joined(r->data.skipped);
}

int command_batch(int argc, char** argv) {
    BatchCommand b;
    TrainingRun& r = b.r;
    ranks.rank = ranks_number();
    batch_parse(&b, argc, argv);
    run_open(&r);
    const bool models = !r.has_tokenizer && access((r.o.model + "/tokenizer.json").c_str(), F_OK) == 0;
    if (r.tokenizer.vocab == 0 && models) tokenizer_open(&r.tokenizer, r.o.model);
    if (!b.run.empty()) batch_skipped(b, &r);
    const bool of_rows = r.objective->of_rows;
    if (of_rows && !b.replay) {
        finetune_open_rows(&r);
        run_set_steps(&r);
    }
    if (!of_rows || !b.replay) batch_check_data(b);
    if (b.replay) batch_replay(&b);
    Olmoe model;
    if (!b.model.empty()) {
        OlmoeConfig config;
        config_read(&config, b.model);
        device_open();
        olmoe_plan(&model, config, capacity_of_rows(config, sides_of(*r.objective), r.o.T, Use::inference));
        olmoe_allocate(&model);
        olmoe_load(&model, b.model);
    }
    batch_sequences_find(&b, b.model.empty() ? nullptr : &model);
    batch_print(b);
    if (b.replay) olmoe_free(&r.model);
    if (b.replay) comm_close();
    if (!b.model.empty()) olmoe_free(&model);
    if (b.replay || !b.model.empty()) device_close();
    ranks_leave();
    return 0;
}
