// A training run on the command line, on the screen, and in files: its options, its table, its lines, its checkpoints.
//
// Included once, by olmoe.cu, after TrainingRun.
#pragma once
#include "checkpoint.h"
#include "options.h"
#include "output.h"
#include "reports.h"
#include "weights.h"

// ------------------------------------------------------------------------------------------------
// Options

// What fine-tuning has beside the options of any training
std::vector<Option> finetune_options(TrainOptions* o) {
    return {
        {"objective", &o->objective, "pretrain|sft|dpo|kto",
         "train on token files; or fine-tune on rows: conversations, pairs of a better and a worse one, judged ones"},
        {"reference", &o->reference, "DIR", "dpo, kto: the model that log-ratios refer to, if not that of --model"},
        {"beta", &o->beta, "X", "dpo, kto: what a log-ratio counts", 0, 1e6},
        {"label-mask", &o->label_mask, "assistant|olmoe", "targets of rows: what the assistant says, and EOS; "
         "or as OLMoE was trained: from one token earlier, and headers of an assistant that no one else spoke before"},
        {"optimizer", &o->optimizer, "adamw|rmsprop", "rmsprop: torch's, with alpha 0.99"},
        {"freeze", &o->freeze, "GROUPS", "what is not trained: embedding, norms, attention, router, experts, head"},
    };
}

std::vector<Option> data_options(TrainOptions* o) {
    return {
        {"data", &o->data, "FILES", "token files to train on (.npy of uint16 or uint32, or llm.c's .bin), FILE:2.5 one "
         "that counts two and a half times; or files of rows (.jsonl, gzipped or not)"},
        {"val", &o->val, "FILES", "files of the same kind to validate on"},
        {"token-type", &o->token_type, "uint16|uint32", "what token files without a header hold"},
        {"order", &o->order, "global|sequential",
         "sequences shuffled over the whole data set, or in the order of the files"},
        {"no-filter", &o->no_filter, "", "train on sequences of 32 or more repetitions as well"},
        {"skip-batches", &o->skip_batches, "FROM-TO...",
         "do not train on these batches of the data, counted from 1 as the steps of a run that skips none: the next "
         "one takes their step. Checkpoints remember them"},
    };
}

std::vector<Option> train_options(TrainOptions* o) {
    std::vector<Option> options = {
        {"config", &o->config, "FILE", "start from random weights in the shape of this config.json"},
        {"model", &o->model, "DIR", "start from the weights of a Hugging Face directory"},
        {"out", &o->out, "DIR", "directory for log.jsonl and checkpoints"},
        {"resume", &o->resume, "[DIR]", "go on from the newest complete checkpoint in --out, or from DIR"},
        {"tokenizer", &o->tokenizer, "NAME",
         "to print sampled text, and for the checkpoints: bytes, a tokenizer.json, or a directory that holds one"},
        {"steps", &o->steps, "S", "stop after step S (a T after a number means tokens: 5e12T); without it and --epochs "
         "after step 1000, or with rows after one epoch"},
        {"epochs", &o->epochs, "E", "in the place of --steps: so many times what the data have; 0: as --steps says",
         0, 1e9},
        {"batch", &o->B, "B", "sequences (conversations, pairs, rows) of a micro-batch of a rank", 1, 1 << 20},
        {"seq", &o->T, "T", "tokens of a sequence, of rows at most; 0: max_position_embeddings of the config",
         0, 1 << 20},
        {"global-batch", &o->global_batch, "G",
         "sequences of a step, accumulated over ranks and micro-batches; 0: ranks x --batch", 0, 1 << 24},
        {"lr", &o->lr, "X", "peak learning rate", 0, 1e3},
        {"min-lr", &o->min_lr, "X", "learning rate that cosine and linear end at; -1: 0.1 lr", -1, 1e3},
        {"warmup", &o->warmup, "S", "steps of linear warm-up from 0.1 lr"},
        {"schedule", &o->schedule, "cosine|linear|constant|anneal|hf-linear",
         "course of the learning rate after the warm-up; hf-linear: from 0 to lr and to 0, as in transformers"},
        {"decay-steps", &o->decay_steps, "S", "step at which the schedule ends, if not at --steps"},
        {"beta1", &o->adamw.beta1, "X", "AdamW", 0, 0.999999},
        {"beta2", &o->adamw.beta2, "X", "AdamW", 0, 0.999999},
        {"eps", &o->adamw.eps, "X", "AdamW", 0, 1},
        {"weight-decay", &o->adamw.weight_decay, "X", "AdamW, of all parameters", 0, 10},
        {"grad-clip", &o->adamw.grad_clip, "X", "largest global gradient norm; 0: no limit", 0, INFINITY},
        {"master-weights", &o->master_weights, MASTERS_CHOICE, "what AdamW updates in a BF16 build: an fp32 copy; "
         "the same bits from 16 more for each weight; the weights, rounded at random"},
        {"moments", &o->moments, MOMENTS_CHOICE, "AdamW's moments: in fp32, or rounded at random"},
        {"lb-coef", &o->lb_coef, "X", "weight of the load-balancing loss", 0, 1e3},
        {"lb", &o->lb, "rank|global",
         "load-balancing loss of each rank's micro-batch, as OLMoE trained, or over those of all ranks"},
        {"z-coef", &o->z_coef, "X", "weight of the router z-loss", 0, 1e3},
        {"ce-divisor", &o->ce_divisor, "all|valid|NUMBER",
         "the sum of a step's cross entropy is divided by all positions, as in OLMoE's pretraining, by those with a "
         "target, or by a number"},
        {"seed", &o->seed, "N", "of initialisation and data order", 0, 9e15},
        {"skip-spikes", &o->skip_spikes, "X",
         "skip the update where loss or gradient norm is X deviations above the last 128; 0: never", 0, INFINITY},
        {"recompute", &o->recompute, "0|1|2",
         "keep all activations; recompute the cheap ones; recompute whole layers", 0, 2},
        {"save-every", &o->save_every, "S", "steps between checkpoints; 0: only at the end"},
        {"keep-last", &o->keep_last, "N", "delete all but the newest N checkpoints; 0: keep all", 0, 1 << 30},
        {"keep-every", &o->keep_every, "S", "but never delete those of every S steps", 0, 1 << 30},
        {"val-every", &o->val_every, "S", "steps between validations and reports of expert balance (of the validation "
         "data, else of the steps since the last); 0: only at the end"},
        {"val-batches", &o->val_batches, "N", "batches of a validation; 0: all"},
        {"routing-every", &o->routing_every, "S", "steps between files of what the experts do with up to 20,000 tokens "
         "of the validation data, and at the end; 0: none"},
        {"sample-every", &o->sample_every, "S", "steps between samples of text; 0: only at the end"},
        {"sample-tokens", &o->sample_tokens, "N", "length of a sample", 1, 1 << 20},
        {"sample-prompt", &o->prompt, "TEXT", "what samples begin with"},
        {"log-every", &o->log_every, "S",
         "steps between lines on the screen (log.jsonl has every step); 0: only the first and the last", 0, 1e18},
        {"ep", &o->ep, "G", "expert parallel: so many neighbouring ranks share the experts", 1, 1 << 16},
        {"zero", &o->zero, "0|1",
         "1: AdamW's state is spread over the ranks that hold the same parameters (ZeRO-1)", 0, 1},
        {"rendezvous", &o->rendezvous, "HOST:PORT|FILE",
         "where ranks meet that neither mpirun nor srun with PMIx started"},
        {"timeout", &o->timeout, "S", "seconds after which a rank that does not answer ends the run", 1, 1e6},
        {"trace", &o->trace, "FILE", "when kernels and collectives of the first step's first two micro-batches were "
         "issued and ran, for Perfetto; ranks above 0 add their number to the name"},
        {"profile", &o->profile, "", "profilers see the last step only (nsys profile -c cudaProfilerApi); "
         "a CPU build reports its kernels' times, in JSON on standard error"},
        {"peak-tflops", &o->peak_tflops, "X",
         "the device's peak, of which MFU is a share; 0: what NVIDIA publishes for its name, dense BF16 or FP32 as the "
         "build, or else a large product's, measured", 0, 1e9},
    };
    const std::vector<Option> first = finetune_options(o), data = data_options(o), last = evaluation_options(&o->eval);
    options.insert(options.begin() + 2, data.begin(), data.end());
    options.insert(options.begin(), first.begin(), first.end());
    options.insert(options.end(), last.begin(), last.end());
    return with_launch_checks(options);
}

// The defaults of fine-tuning, OLMoE's, for the objective that the command line names. --warmup and --steps follow from
// the data.
void finetune_defaults(TrainOptions* o, int argc, char** argv) {
    std::string objective;
    for (int i = 2; i < argc; i++) {
        const std::string word = argv[i], name = "--objective";
        if (word == name && i + 1 < argc) objective = argv[i + 1];
        if (word.rfind(name + "=", 0) == 0) objective = word.substr(name.size() + 1);
    }
    if (objective != "sft" && objective != "dpo" && objective != "kto") return;
    o->schedule = "hf-linear";
    o->warmup = "";
    o->ce_divisor = "valid";
    o->lr = objective == "sft" ? 2e-5 : 5e-7;
    o->lb_coef = o->z_coef = 0;
    o->adamw.beta2 = 0.999;
    o->adamw.weight_decay = 0;
}

// What only one kind of objective has
void train_check_objective(const TrainOptions& o) {
    const bool pretrain = o.objective == "pretrain", pairs = o.objective == "dpo" || o.objective == "kto";
    if (!o.reference.empty() && !pairs) die("--reference is for --objective dpo and kto");
    if (pairs && o.beta == 0) die("--beta 0: the loss would not depend on the model; give a larger one");
    if (pairs && o.model.empty() && o.reference.empty())
        die("--objective %s needs --model DIR, or --reference DIR for the log-ratios", o.objective.c_str());
    if (pretrain && o.label_mask != "assistant") die("--label-mask is for the objectives on rows: sft, dpo, kto");
    for (const std::string* steps : {(const std::string*)&o.steps, (const std::string*)&o.warmup,
                                     (const std::string*)&o.decay_steps})
        if (!pretrain && steps->find('T') != std::string::npos)
            die("'%s': rows differ in length, so that a number of tokens is no number of steps", steps->c_str());
    char* end;
    const double divisor = strtod(o.ce_divisor.c_str(), &end);
    const bool number = !o.ce_divisor.empty() && !*end && divisor > 0 && std::isfinite(divisor);
    if (o.ce_divisor != "all" && o.ce_divisor != "valid" && !number)
        die("option --ce-divisor: '%s' is not one of all, valid and a number above 0", o.ce_divisor.c_str());
    if (!o.steps.empty() && o.epochs > 0) die("--steps and --epochs both say how long the run is; give one of them");
}

void train_options_check(TrainOptions* o) {
    if (o->config.empty() == o->model.empty())
        die("train needs either --config FILE (random weights) or --model DIR (a Hugging Face directory)");
    if (o->data.empty() && o->objective != "pretrain")
        die("train needs --data FILES of rows (.jsonl): docs/tour.md has their forms");
    if (o->data.empty())
        die("train needs --data FILES; make them with: olmoe tokenize --tokenizer NAME --out FILE.npy TEXTS");
    if (o->out.empty()) die("train needs --out DIR for its log and checkpoints");
    // A limit of infinity is none. Of moments that are 0, eps 0 makes an update of 0 and not 0 / 0.
    for (double* limit : {&o->adamw.grad_clip, &o->skip_spikes}) if (std::isinf(*limit)) *limit = 0;
    o->adamw.eps = std::max(o->adamw.eps, 1e-30);
    o->adamw.rmsprop = o->optimizer == "rmsprop";
    train_check_objective(*o);
    if (o->routing_every > 0 && (o->val.empty() || o->objective != "pretrain"))
        die("--routing-every needs --val FILES of tokens");
    const EvalOptions& e = o->eval;
    const char* alone = e.start ? "start" : e.every > 0 ? "every" : e.T > 0 ? "seq" : nullptr;
    if (!e.any() && alone) die("--eval-%s needs --eval-tasks FILES or --eval-perplexity FILES", alone);
    if (o->reference.empty() && (o->objective == "dpo" || o->objective == "kto")) o->reference = o->model;
}

void train_options_parse(TrainOptions* o, int argc, char** argv) {
    finetune_defaults(o, argc, argv);
    options_parse(argc, argv, "train --config FILE | --model DIR  --data FILES [--val FILES] --out DIR [options]",
                  train_options(o));
    o->command.assign(argv, argv + argc);
    train_options_check(o);
}

int sides_of(const Objective& objective) { return objective.of_rows && objective.rows == RowKind::dpo ? 2 : 1; }

// The options against one another and the config
void run_check_options(TrainingRun* run) {
    TrainOptions& o = run->o;
    OlmoeConfig& c = run->config;
    const std::string many = world.size > 1 ? text("%d ranks x ", world.size) : "";
    if (c.E % o.ep != 0) die("the model's %d experts can't be divided among --ep %ld ranks", c.E, o.ep);
    o.adamw.seed = (uint64_t)o.seed;
    if (o.T == 0) o.T = c.max_T;
    if (o.T > c.max_T) die("--seq %ld is longer than the config's max_position_embeddings %d", o.T, c.max_T);
    if (o.global_batch == 0) o.global_batch = o.B * world.size;
    if (o.global_batch % (o.B * world.size) != 0)
        die("--global-batch %ld is not a multiple of %s--batch %ld", o.global_batch, many.c_str(), o.B);
    run->micro_batches = (int)(o.global_batch / (o.B * world.size));
    run->tokens_per_step = (double)o.global_batch * o.T;
    freeze(&c, o.freeze);
    if (o.reference.empty()) return;
    OlmoeConfig theirs;
    config_read(&theirs, o.reference);
    auto function_of = [](const OlmoeConfig& config) {          // what of a config changes a probability
        Json j = config_json(config, BF16);
        for (const char* other : {"eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings"})
            j.erase(other);
        return j;
    };
    if (function_of(theirs) != function_of(c))
        die("--reference %s has another shape than the model", o.reference.c_str());
}

// How long the run is, and the course of its learning rate: when the number of instances is known
void run_set_steps(TrainingRun* run) {
    const TrainOptions& o = run->o;
    const bool of_rows = run->objective->of_rows, fractions = o.schedule == "hf-linear";
    const double epoch = (double)((int64_t)run->data.instances / o.global_batch), tokens = run->tokens_per_step;
    if (o.epochs > 0 || (o.steps.empty() && of_rows)) run->steps = (int64_t)ceil((o.epochs > 0 ? o.epochs : 1) * epoch);
    else run->steps = (int64_t)steps_of("steps", o.steps.empty() ? Steps("1000") : o.steps, tokens);
    Schedule& s = run->schedule;
    s.kind = o.schedule;
    s.lr = o.lr;
    s.min_lr = o.min_lr < 0 ? 0.1 * o.lr : o.min_lr;
    s.total = o.decay_steps.empty() ? run->steps : steps_of("decay-steps", o.decay_steps, tokens, fractions);
    if (o.schedule == "anneal") s.warmup = 0;
    else if (!o.warmup.empty()) s.warmup = steps_of("warmup", o.warmup, tokens, fractions);
    else s.warmup = s.total * (o.objective == "sft" ? 0.03 : o.objective == "dpo" ? 0.1 : 0);
    for (const std::string& range : o.skip_batches) run->data.skipped.push_back(batch_range_of(range));
    run->data.skipped = batch_ranges_joined(run->data.skipped);
}

// The chat template of fine-tuning, for transformers, where there is a tokenizer.json and no template came with it. It
// renders the text of chat_prompt.
void chat_template_add(Texts* files, const Tokenizer& t) {
    auto named = [&](const char* name) {
        return std::find_if(files->begin(), files->end(), [&](auto& file) { return file.first == name; });
    };
    if (named("tokenizer.json") == files->end() || named("chat_template.jinja") != files->end()) return;
    auto found = named("tokenizer_config.json");
    Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}};
    if (found != files->end()) config = json_parse(found->second);
    const Json theirs = config.is_object() ? config.value("chat_template", Json()) : Json();
    if (theirs.is_string() && theirs.get<std::string>().find("<|assistant|>") == std::string::npos)
        fprintf(stderr, "note: the chat template that came with the model is kept, but rows have OLMoE's\n");
    if (!config.is_object() || !theirs.is_null()) return;
    for (const char* name : {"bos_token", "eos_token"})
        if (config.value(name, Json()).is_null()) config[name] = tokenizer_decode(t, t.eos);
    config["chat_template"] =
        "{{ eos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}";
    if (found == files->end()) files->push_back({"tokenizer_config.json", json_text(config)});
    else found->second = json_text(config);
}

// A run that does not resume leaves the checkpoints of another one alone.
void checkpoints_refuse(const TrainOptions& o) {
    if (o.resume.empty() && !checkpoint_list(o.out).empty())
        die("%s holds checkpoints already; go on from them with --resume, or choose another --out", o.out.c_str());
}

// Rows are kept in OUT, where the ranks share them: they are opened when that is there.
void run_open_rows(TrainingRun* run) {
    if (run->replayed == 0) output_check(run->o.out);
    if (run->replayed == 0) checkpoints_refuse(run->o);          // before its rows are replaced
    finetune_open(run);
    run_set_steps(run);
}

// The tokenizer, and the files that go into the checkpoints: now, because later they may be gone. With --tokenizer it
// is that one's files of tokenizer and chat, not the model's.
void run_open_files(TrainingRun* run) {
    const TrainOptions& o = run->o;
    Tokenizer& t = run->tokenizer;
    Texts own;                              // the tokenizer.json of --tokenizer
    run->has_tokenizer = !o.tokenizer.empty();
    if (run->has_tokenizer) tokenizer_open(&t, o.tokenizer);
    const bool of_rows = run->objective->of_rows, of_texts = of_rows || !o.eval.tasks.empty();
    const bool models = !o.model.empty() && access((o.model + "/tokenizer.json").c_str(), F_OK) == 0;
    if (!run->has_tokenizer && of_texts && !models)
        die("%s need a tokenizer, and %s has none: give --tokenizer NAME", of_rows ? "rows" : "tasks",
            o.model.empty() ? "a config" : o.model.c_str());
    const bool known = run->has_tokenizer || of_texts;
    if (!run->has_tokenizer && known) tokenizer_open(&t, o.model);
    if (t.vocab > run->config.V)
        die("the tokenizer's %d ids don't fit the model's vocabulary of %d", t.vocab, run->config.V);
    if (run->has_tokenizer && !t.path.empty()) files_add(&own, t.path, "tokenizer.json");

    std::string theirs, from = o.tokenizer.empty() ? o.model : "";
    std::error_code ignored;
    if (!own.empty() && std::filesystem::is_directory(o.tokenizer, ignored)) from = o.tokenizer;
    else if (!own.empty() && file_contents(&theirs, o.model + "/tokenizer.json") && theirs == own[0].second)
        from = o.model;
    if (!o.model.empty()) run->came_with = model_files_read(o.model, from);
    Texts& files = run->came_with.files;
    if (o.model.empty() || from.empty()) files.insert(files.end(), own.begin(), own.end());
    run->eval.o = o.eval;
    run->eval.o.B = o.B;
    evaluation_open(&run->eval, run->config, known ? &t : nullptr, o.token_type);
    if (!of_rows) return;
    chat_template_add(&files, t);
    if (run->rows.of_out) return;
    for (const std::vector<std::string>* paths : {&o.data, &o.val})
        for (const std::string& path : *paths) json_lines_refuse(path, "rows", "scripts/rows.py");
}

// ------------------------------------------------------------------------------------------------
// The screen and the log

void box_skipped(Box* box, const TrainingRun& run) {
    std::string list;
    for (const BatchRange& r : run.data.skipped)
        list += text("%s%ld-%ld", list.empty() ? "" : ", ", r.first, r.last);
    if (!list.empty()) box->add("batches skipped", list);
}

// The data and the steps of a run on token files
void box_tokens(Box* box, const TrainingRun& run) {
    const TrainOptions& o = run.o;
    auto size_of = [](const DataLoader& d) { return human((double)dataloader_tokens(&d)) + " tokens"; };
    box->add("data", text("%s: %s, %s sequences of %ld", join(o.data).c_str(), size_of(run.data).c_str(),
                          human((double)run.data.instances).c_str(), o.T));
    box->add("validation", o.val.empty() ? "none" : join(o.val) + ": " + size_of(run.val));
    box->add("order", o.order + (o.no_filter ? "" : ", repetitive sequences without targets"));
    box_skipped(box, run);
    box->add("step", text("%s tokens: %ld sequences of %ld in micro-batches of %s%ld",
                          human(run.tokens_per_step).c_str(), o.global_batch, o.T,
                          world.size > 1 ? text("%d x ", world.size).c_str() : "", o.B));
    box->add("steps", text("%ld (%s tokens, %.2f epochs)", run.steps, human(run.steps * run.tokens_per_step).c_str(),
                           run.steps * (double)o.global_batch / run.data.instances));
}

// The same on rows
void box_rows(Box* box, const TrainingRun& run) {
    const TrainOptions& o = run.o;
    auto size_of = [](const Rows& r) {
        return text("%s rows of %s tokens", human((double)r.count).c_str(),
                    human((double)r.starts[r.count * r.sides()]).c_str());
    };
    box->add("objective", o.objective + ", targets of " + o.label_mask
             + (o.reference.empty() ? "" : text(", beta %g, reference %s", o.beta, o.reference.c_str())));
    box->add("data", join(o.data) + ": " + size_of(run.rows.training));
    box->add("validation", o.val.empty() ? "none" : join(o.val) + ": " + size_of(run.rows.validation));
    box->add("step", text("%ld rows of at most %ld tokens, in micro-batches of %s%ld", o.global_batch, o.T,
                          world.size > 1 ? text("%d x ", world.size).c_str() : "", o.B));
    box->add("steps", text("%ld (%.2f epochs), order %s", run.steps,
                           run.steps * (double)o.global_batch / run.data.instances, o.order.c_str()));
    box_skipped(box, run);
}

// What a run is and does, in a box
void run_table(const TrainingRun& run) {
    const TrainOptions& o = run.o;
    const Schedule& s = run.schedule;
    const Masters masters = run.model.masters;
    Box box;
    box.add("model", o.config.empty() ? o.model : o.config);
    box_shapes(&box, run.config);
    box.rule();
    box.add("machine", machine_name());
    if (world.size > 1)
        box.add("ranks", text("%d, started by %s; experts over %d, each held by %d; ZeRO-1 %s", world.size,
                              ranks.started_by.c_str(), expert_group.size, replica_group.size,
                              shard_optimizer ? "on" : "off"));
    box.add("precision", BF16 ? "BF16, sums in fp32" : "FP32");
    const char* kept = !BF16 ? "" : masters == Masters::fp32 ? "master weights in fp32, "
                     : masters == Masters::remainder ? "master weights as remainders of 16 bits, "
                     : "no master weights, ";
    box.add("AdamW's state", text("%smoments in %s", kept, o.moments.c_str()));
    box.add("peak", text("%s (%s)", human(run.peak.flops, "FLOP/s").c_str(), run.peak.source.c_str()));
    box_memory(&box, run.model);
    box.rule();
    if (run.objective->of_rows) box_rows(&box, run);
    else box_tokens(&box, run);
    box.add("learning rate", text("%g, %s to %g at step %.10g, warm-up %.10g%s", s.lr, s.kind.c_str(),
                                  learning_rate(s, s.total), s.total, s.warmup,
                                  s.warmup > 0 && s.warmup >= run.steps ? ": longer than the run" : ""));
    const std::string averages = o.adamw.rmsprop ? text("alpha %g", RMSPROP_ALPHA)
                                                 : text("betas %g %g", o.adamw.beta1, o.adamw.beta2);
    box.add(o.adamw.rmsprop ? "RMSprop" : "AdamW", text("%s, eps %g, weight decay %g, clip %g", averages.c_str(),
                                                        o.adamw.eps, o.adamw.weight_decay, o.adamw.grad_clip));
    if (!o.freeze.empty()) box.add("frozen", join(o.freeze));
    const char* over = world.size == 1 ? "" : run.model.lb_global ? " over all ranks" : " rank by rank";
    box.add("auxiliary losses", text("load balancing %g%s, router z %g", o.lb_coef, over, o.z_coef));
    if (o.reference.empty())
        box.add("cross entropy", "divided by " + (isalpha(o.ce_divisor[0]) ? o.ce_divisor + " targets" : o.ce_divisor));
    box.add("recompute, skip spikes", text("%ld, %g", o.recompute, o.skip_spikes));
    box.add("seed", text("%ld", o.seed));
    box.add("out", o.out + (run.from.empty() ? "" : ", resumed from " + run.from));
    for (auto& [key, value] : run.changed) box.add(key, value);
    box.print();
    if (run.step >= run.steps) printf("nothing to do: %s is at step %ld of %ld\n", o.out.c_str(), run.step, run.steps);
}

// A line on the screen, now and then; returns the step's line for the log.
Json run_report(const TrainingRun& run, const StepResult& r) {
    const Losses& l = r.losses;
    const double rate = r.tokens / r.seconds;
    const double mfu = rate * flops_per_token(run.config, r.length) / (run.peak.flops * world.size);
    Json objective = Json::object();
    const std::string of_rows = run.objective->of_rows ? finetune_report(run, r, &objective) : "";
    const LayerBalance balance = whole_balance(r.balance);
    const bool last = run.step == run.steps || run.stop;
    const bool due = run.o.log_every > 0 && run.step % run.o.log_every == 0;
    if (due || last || run.step == run.first_step + 1) {
        const int64_t done = run.step - run.first_step, left = run.steps - run.step;
        const std::string shown = of_rows.empty() ? text("ce %.4f lb %.5f z %.5f", r.ce(), l.lb, l.z) : of_rows;
        printf("step %*ld/%ld | loss %.4f %s | norm %.3f%s | max/mean %.2f | lr %.2e | %.1f ms | "
               "%s tok/s | MFU %.0f%% | eta %s\n", (int)std::to_string(run.steps).size(), run.step, run.steps, l.loss,
               shown.c_str(), r.norm, r.skipped ? " SKIPPED" : "", balance.max_over_mean, r.lr, 1000 * r.seconds,
               human(rate).c_str(), 100 * mfu, human_time((seconds_now() - run.started) / done * left).c_str());
    }
    Json line = {{"step", run.step}, {"loss", digits(l.loss)}, {"ce_loss", digits(r.ce())}, {"lb_loss", digits(l.lb)},
                 {"z_loss", digits(l.z)}, {"grad_norm", digits(r.norm)}, {"lr", digits(r.lr)},
                 {"max_over_mean", digits(balance.max_over_mean)}, {"dead", balance.dead},
                 {"ms", digits(1000 * r.seconds)}, {"tokens_per_s", digits(rate)}, {"mfu", digits(mfu)}};
    if (world.size > 1) {
        const char* names[TRAFFICS] = {"gradients", "parameters", "rows", "counts", "sums"};
        for (int i = 0; i < TRAFFICS; i++) line["sent_bytes"][names[i]] = (int64_t)r.sent[i];
    }
    line.update(objective);
    if (r.skipped) line["skipped"] = true;
    return line;
}

std::string log_path(const TrainOptions& o) { return o.out + "/log.jsonl"; }

std::string trace_path(const TrainOptions& o) {
    return world.rank > 0 ? o.trace + "." + std::to_string(world.rank) : o.trace;
}

std::string log_dump(const Json& line) { return line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n"; }

void log_line(const TrainingRun& run, const Json& line) {
    const bool written = fprintf(run.log, "%s", log_dump(line).c_str()) > 0 && fflush(run.log) == 0;
    if (!written) die("cannot write %s: %s", log_path(run.o).c_str(), strerror(errno));
}

void log_close(TrainingRun* run) {
    if (fclose(run->log) != 0) die("cannot write %s: %s", log_path(run->o).c_str(), strerror(errno));
}

// ------------------------------------------------------------------------------------------------
// Checkpoints

// What a checkpoint holds of the run beside weights and moments; nothing in it depends on the machine, the time, or
// where files are.
Json trainer_state(const TrainingRun& run) {
    const TrainOptions& o = run.o;
    const AdamWOptions& optimizer = o.adamw;
    const Schedule& schedule = run.schedule;
    Json s;
    s["step"] = run.step;
    s["updates"] = run.updates;
    s["epoch"] = run.data.epoch;
    s["position"] = run.data.position;
    s["seed"] = o.seed;
    s["seq"] = o.T;
    s["global_batch"] = o.global_batch;
    s["micro_batch"] = o.B * world.size;    // of all ranks together
    s["load_balancing"] = std::string(o.lb);
    s["order"] = std::string(o.order);
    s["repetition_filter"] = !o.no_filter;
    if (!run.data.skipped.empty()) s["skip_batches"] = batch_ranges_json(run.data.skipped);
    const bool of_rows = run.objective->of_rows;
    s["data_fingerprint"] = text("%016lx", of_rows ? run.rows.training.fingerprint : dataloader_fingerprint(&run.data));
    if (of_rows) {
        s["objective"] = std::string(o.objective);
        s["label_mask"] = std::string(o.label_mask);
        s["reference_fingerprint"] = run.rows.reference_fingerprint;
    }
    if (!o.freeze.empty()) s["freeze"] = run.config.frozen;
    s["precision"] = BF16 ? "BF16" : "FP32";
    s["schedule"] = {{"kind", schedule.kind}, {"lr", schedule.lr}, {"min_lr", schedule.min_lr},
                     {"warmup_steps", schedule.warmup}, {"decay_steps", schedule.total}};
    s["adamw"] = {{"beta1", optimizer.beta1}, {"beta2", optimizer.beta2}, {"eps", optimizer.eps},
                  {"weight_decay", optimizer.weight_decay}, {"grad_clip", optimizer.grad_clip},
                  {"master_weights", std::string(o.master_weights)}, {"moments", std::string(o.moments)}};
    if (optimizer.rmsprop) s["adamw"]["rmsprop"] = true;
    s["losses"] = {{"lb_coef", o.lb_coef}, {"z_coef", o.z_coef}, {"ce_divisor", o.ce_divisor}};
    if (!o.reference.empty()) s["losses"]["beta"] = o.beta;
    s["skip_spikes"] = {{"deviations", o.skip_spikes}, {"losses", run.spikes.losses}, {"norms", run.spikes.norms}};
    return s;
}

// The words of a command but its program, --out and --resume, which do not change what a step computes
std::vector<std::string> recipe_words(const Json& command) {
    const std::vector<std::string> all = command;
    std::vector<std::string> words;
    for (size_t i = 1; i < all.size(); i++) {
        const std::string name = all[i].substr(0, all[i].find('='));
        if (name != "--out" && name != "--resume") words.push_back(all[i]);
        else if (name == all[i] && i + 1 < all.size() && all[i + 1].compare(0, 2, "--") != 0) i++;
    }
    return words;
}

// By which command, from where, a run is started or resumed, and which batches it skips. Names that are not UTF-8 are
// as the log has them.
Json command_json(const TrainingRun& run) {
    std::error_code ignored;
    Json j = {{"command", run.o.command}, {"folder", std::filesystem::current_path(ignored).string()},
              {"micro_batch", run.o.B * world.size}, {"skip_batches", batch_ranges_json(run.data.skipped)}};
    return json_parse(log_dump(j));
}

// Adds to the first line of a log, where the run is resumed by another command than before, that and the step after
// which it holds: what olmoe batch needs to find a step's options. The lines of steps are as if it had never stopped.
void log_resumed(const TrainingRun& run, const std::string& path) {
    std::string log;
    if (!file_contents(&log, path)) return;
    const size_t end = log.find('\n');
    Json first = json_parse(log.substr(0, end)), now = command_json(run);
    if (end == std::string::npos || !first.is_object() || !first.contains("config")) return;
    try {
        const Json said = first.value("resumed", Json::array());
        Json list = Json::array(), last = first;
        for (const Json& r : said)
            if (r.at("step") < run.step) list.push_back(last = r);
        if (list.empty()) last.update(first.at("config"));
        bool other = !last.contains("command") || recipe_words(last["command"]) != recipe_words(now["command"]);
        for (const char* what : {"folder", "micro_batch"}) other |= last.value(what, Json()) != now[what];
        if (other) {
            list.push_back({{"step", run.step}});
            list.back().update(now);
        }
        if (list == said) return;
        first["resumed"] = list;
    } catch (const Json::exception&) { return; }                // a line that no run of this program wrote
    file_replace(path, log_dump(first) + log.substr(end + 1));
}

// The log of this run, after its last line that is still true; a new one begins with the configuration.
void log_open(TrainingRun* run) {
    const std::string path = run->replayed > 0 ? "/dev/null" : log_path(run->o);
    if (!run->from.empty() && world.rank == 0) {
        log_truncate(path, run->step);
        log_resumed(*run, path);
    }
    if (run->replayed == 0 && world.rank == 0) routing_truncate(run->o.out, run->step);
    run->log = fopen(world.rank == 0 ? path.c_str() : "/dev/null", run->from.empty() ? "w" : "a");
    if (!run->log) die("cannot write %s: %s", path.c_str(), strerror(errno));
    if (ftell(run->log) != 0) return;
    Json first = config_json(run->config, BF16), recipe = trainer_state(*run);
    for (const char* progress : {"step", "updates", "epoch", "position"}) recipe.erase(progress);
    first.update(recipe);
    first["steps"] = run->steps;
    const Json how = command_json(*run);
    Json line = {{"config", first}, {"command", how["command"]}, {"folder", how["folder"]}};
    std::error_code ignored;
    if (!run->from.empty())
        line["from"] = {{"step", run->step}, {"checkpoint", std::filesystem::absolute(run->from, ignored).string()}};
    if (run->objective->of_rows) line["dropped_rows"] = run->rows.training.dropped;
    log_line(*run, line);
}

// Before the first step: a line of step 0
void run_evaluate_start(TrainingRun* run) {
    Json line = {{"step", 0}};
    evaluation_in_run(&run->eval, &run->model, &line);
    if (line.size() > 1) log_line(*run, line);
}

WouldSave run_would_save(const TrainingRun& run) {
    return {checkpoint_texts(run.config, BF16, run.came_with), trainer_state(run)};
}

void run_save(TrainingRun* run) {
    const Olmoe& m = run->model;
    const TrainOptions& o = run->o;
    at_step("checkpoint");
    output_follow(&run->o.out);
    cudaCheck(cudaDeviceSynchronize());
    Savers savers = {world.rank, world.size, [&](size_t offset) { return owner_of(m.tensors, offset); },
                     [](std::vector<double>* x) { host_sum(x); }};
    auto read = [&](State which, size_t offset, size_t n, void* to) { state_read(m, which, offset, n, to); };
    checkpoint_save(o.out, run->step, m.config, BF16, m.masters != Masters::none, read, trainer_state(*run),
                    run->came_with, savers);
    if (world.rank == 0) checkpoint_prune(o.out, (int)o.keep_last, (int)o.keep_every, run_would_save(*run));
    at_step("");
}

// The directory to resume from, or "". Rank 0 looks for the newest checkpoint, and reads all of the one to resume from;
// the others take the same.
std::string checkpoint_to_resume(const TrainingRun& run) {
    const TrainOptions& o = run.o;
    const OlmoeConfig& config = run.config;
    const WouldSave now = run_would_save(run);
    std::string from = o.resume;
    const bool newest = o.resume == "newest";
    if (newest && world.rank == 0) from = checkpoint_newest(o.out, now, ranks_alive);
    if (!newest && !from.empty() && world.rank == 0) checkpoint_check(from, now, ranks_alive);
    if (newest) {
        double step = world.rank > 0 || from.empty() ? 0 : atof(from.c_str() + from.rfind("step-") + 5) + 1;
        step = host_sum(step);
        from = step > 0 ? o.out + text("/step-%08ld", (int64_t)step - 1) : "";
    }
    // Its log is there by its name, whoever may list the directory.
    const bool hidden = access(o.out.c_str(), R_OK) != 0 && access(log_path(o).c_str(), F_OK) == 0;
    if (hidden && (o.resume.empty() || newest))
        die("%s cannot be listed, so that the checkpoints of the run that wrote its log can't be found; "
            "allow it with chmod, or choose another --out", o.out.c_str());
    const bool existing = !checkpoint_list(o.out).empty();
    checkpoints_refuse(o);
    if (newest && from.empty() && existing)
        die("no checkpoint in %s is undamaged; to start anew choose another --out", o.out.c_str());
    if (from.empty()) return from;
    OlmoeConfig theirs;
    config_read(&theirs, from);
    if (config_json(theirs, BF16) != config_json(config, BF16))
        die("%s is a checkpoint of another config than %s", from.c_str(),
            (o.config.empty() ? o.model : o.config).c_str());
    return from;
}

// What a resumed run skips: the batches that the checkpoint's run did, and of --skip-batches those still to come
void run_resume_skipped(TrainingRun* run, const Json& recorded) {
    std::vector<BatchRange> before, all = run->data.skipped;
    for (const Json& r : recorded) before.push_back({r.at(0), r.at(1)});
    const int64_t next = batch_of_step(run->step + 1, before);
    for (const BatchRange& r : run->data.skipped) {
        int64_t added = r.first;                                // the first that the checkpoint does not know
        for (const BatchRange& b : before) if (b.first <= added && added <= b.last) added = b.last + 1;
        if (added <= r.last && added < next)
            die("--skip-batches %ld-%ld: %s has trained on batch %ld; resume from a checkpoint before it", r.first,
                r.last, run->from.c_str(), added);
    }
    all.insert(all.end(), before.begin(), before.end());
    run->data.skipped = batch_ranges_joined(all);
}

// From where a step is replayed: the newest whole checkpoint of an earlier step, else the one of another directory that
// the run went on from, or "". Rank 0 looks for it.
std::string checkpoint_to_replay(const TrainingRun& run) {
    const std::string& out = run.o.out;
    double found = 0;
    for (auto& [at, dir] : checkpoint_list(out))
        if (world.rank == 0 && found == 0 && at < run.replayed && checkpoint_damage(dir, true, {}, ranks_alive).empty())
            found = (double)at + 1;
    found = host_sum(found);
    if (found > 0) return out + text("/step-%08ld", (int64_t)found - 1);
    if (!run.o.resume.empty() && world.rank == 0) checkpoint_check(run.o.resume, {}, ranks_alive);
    return run.o.resume;
}

// Step and data position of the checkpoint `from`; refuses one of another run. What is different and may be, the
// recipe, goes to `changed`.
void run_resume(TrainingRun* run) {
    const std::string& dir = run->from;
    const Json now = trainer_state(*run), s = checkpoint_trainer_state(dir, run_would_save(*run));
    try {
        for (const char* what : {"objective", "precision", "seed", "seq", "global_batch", "order", "repetition_filter",
                                 "label_mask", "data_fingerprint", "reference_fingerprint", "freeze"})
            if (s.value(what, Json()) != now.value(what, Json()))
                die("%s: the checkpoint's %s is %s, this run's is %s; they must be equal to resume; "
                    "to start anew choose another --out", dir.c_str(), what, s.value(what, Json()).dump().c_str(),
                    now.value(what, Json()).dump().c_str());
        run->step = s.at("step");
        run_resume_skipped(run, s.value("skip_batches", Json::array()));
        run->updates = s.at("updates");
        run->spikes.losses = s.at("skip_spikes").at("losses").get<std::vector<double>>();
        run->spikes.norms = s.at("skip_spikes").at("norms").get<std::vector<double>>();
        dataloader_seek(&run->data, s.at("epoch"), s.at("position"));
        for (const char* what : {"schedule", "adamw", "losses", "micro_batch", "load_balancing"})
            if (s.at(what) != now.at(what))
                run->changed.push_back({text("%s until step %ld", what, run->step), s.at(what).dump()});
    } catch (const Json::exception& e) {
        die("%s/trainer_state.json: %s", dir.c_str(), e.what());
    }
    auto existing = checkpoint_list(run->o.out);                // (step, directory), newest first
    if (run->o.resume != "newest" && run->replayed == 0 && !existing.empty() && existing[0].first > run->step)
        die("%s holds checkpoints of later steps than %s; choose another --out, or remove them", run->o.out.c_str(),
            dir.c_str());
}

// Weights, moments and masters of the checkpoint that run_resume has read
void run_load(TrainingRun* run) {
    olmoe_load(&run->model, run->from);
    olmoe_load_state(&run->model, run->from);
}
