// Fine-tuning on rows: SFT, DPO and KTO. How the rows of a step are dealt to ranks and micro-batches, what the
// reference model says of them, and what is reported. The losses are in olmoe.cu.
//
// Included once, by olmoe.cu, after TrainingRun.
#pragma once
#include "rows.h"
#include "../commands/evaluate.h"

// ------------------------------------------------------------------------------------------------
// A step's rows, dealt to ranks and micro-batches

// The longest of n rows goes to the rank with the fewest tokens so far, then the next one, and so on; each rank gets
// n / ranks rows (the first ranks one more), in their order in the step. One rank: the order of the step.
Deal rows_deal(const std::vector<int>& lengths /* (n) tokens of each row */, int B) {
    const size_t n = lengths.size(), ranks_n = (size_t)world.size;
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return lengths[a] > lengths[b]; });
    std::vector<std::vector<size_t>> of_rank(ranks_n);
    std::vector<int64_t> tokens(ranks_n, 0);
    for (size_t row : order) {
        size_t least = ranks_n;
        for (size_t r = 0; r < ranks_n; r++) {
            const bool room = of_rank[r].size() < n / ranks_n + (r < n % ranks_n);
            if (room && (least == ranks_n || tokens[r] < tokens[least])) least = r;
        }
        of_rank[least].push_back(row);
        tokens[least] += lengths[row];
    }
    Deal d;
    const size_t micro_batches = ceil_div(ceil_div(n, ranks_n), (size_t)B);
    d.mine.resize(micro_batches);
    d.tokens.resize(micro_batches, 0.0);
    for (size_t r = 0; r < ranks_n; r++) {
        std::sort(of_rank[r].begin(), of_rank[r].end());
        for (size_t i = 0; i < of_rank[r].size(); i++) {
            d.tokens[i / B] += lengths[of_rank[r][i]];
            if ((int)r == world.rank) d.mine[i / B].push_back(of_rank[r][i]);
        }
    }
    return d;
}

// Adds a sequence: at each position the next id is the target, where it is one.
void batch_add(MicroBatch* b, const RowSequence& s, double weight) {
    std::vector<int> targets(s.ids.size(), IGNORED);
    for (size_t t = 0; t + 1 < s.ids.size(); t++) if (s.targets[t + 1]) targets[t] = s.ids[t + 1];
    batch_add(b, s.ids.data(), targets.data(), (int)s.ids.size(), weight);
}

// Rows of one or two sequences each, and their tokens
using RowBlock = std::vector<std::vector<RowSequence>>;

std::vector<int> block_lengths(const RowBlock& block) {
    std::vector<int> lengths;
    for (const auto& row : block) {
        lengths.push_back(0);
        for (const RowSequence& s : row) lengths.back() += (int)s.ids.size();
    }
    return lengths;
}

std::vector<MicroBatch> block_batches(const RowBlock& block, const Deal& deal, double weight) {
    std::vector<MicroBatch> batches;
    for (size_t i = 0; i < deal.mine.size(); i++) {
        MicroBatch batch;
        for (size_t row : deal.mine[i]) for (const RowSequence& s : block[row]) batch_add(&batch, s, weight);
        const int nothing = 0;
        if (batch.B() == 0) batch_add(&batch, &nothing, nullptr, 1);    // it joins the others' exchanges
        batch.world_N = deal.tokens[i];
        batches.push_back(batch);
    }
    return batches;
}

// Rows of numbers `rows`, as they are trained
RowBlock block_of_rows(const Rows& rows, const std::vector<size_t>& numbers) {
    RowBlock block;
    for (size_t row : numbers) {
        block.emplace_back();
        for (int side = 0; side < rows.sides(); side++)
            block.back().push_back(row_sequence(rows, row * rows.sides() + side));
    }
    return block;
}

// KTO's: the prompt of each row with the completion of the row as far from the block's end as it is from the beginning
RowBlock block_mismatched(const Rows& rows, const std::vector<size_t>& numbers) {
    RowBlock block;
    for (size_t i = 0; i < numbers.size(); i++)
        block.push_back({row_mismatched(rows, numbers[i], numbers[numbers.size() - 1 - i])});
    return block;
}

// Of all sequences of a block, by the weights of now, on all ranks; `balance` gets the experts' rows of this rank.
std::vector<double> block_logps(TrainingRun* run, const RowBlock& block, Balance* balance = nullptr) {
    Olmoe* m = &run->model;
    const Deal deal = rows_deal(block_lengths(block), (int)run->o.B);
    const std::vector<MicroBatch> batches = block_batches(block, deal, 0);
    const size_t sides = block[0].size();
    std::vector<double> all(block.size() * sides, 0.0);
    for (size_t i = 0; i < batches.size(); i++) {
        olmoe_set_batch(m, batches[i]);
        olmoe_forward(m);
        if (deal.mine[i].empty()) continue;
        olmoe_head(m, false);
        const std::vector<double> logps = batch_logps(m);
        for (size_t s = 0; s < logps.size(); s++) all[deal.mine[i][s / sides] * sides + s % sides] = logps[s];
        if (balance) balance->add(*m);
    }
    host_sum(&all);
    return all;
}

// After olmoe_head without a gradient: the head again, with the gradient of a loss whose derivatives by the sequences'
// log-probabilities are `slopes`. A target's -log p has the weight -slope.
void head_of_slopes(Olmoe* m, const std::vector<double>& slopes) {
    MicroBatch& b = m->batch;
    for (int s = 0; s < b.B(); s++)
        std::fill_n(b.weights.begin() + b.begin(s), b.length(s), -slopes[s]);
    copy_to_device(m->acts.target_weights, std::vector<float>(b.weights.begin(), b.weights.end()));
    olmoe_head(m, true);
}

// ------------------------------------------------------------------------------------------------
// The reference model. Its log-probabilities are computed before the first step, in the micro-batches of the steps, and
// kept in OUT: there is never a second model in memory, and in the first step the ratio to the reference is exactly 1.

constexpr double UNKNOWN = NAN;             // of a log-probability that no step of the run needed so far

// A number that differs between models: of the config, and of each tensor up to 16 blocks of 4 KB, spread evenly. Ends
// the program where a rank sees another model than rank 0.
uint64_t weights_fingerprint(const std::string& dir, const OlmoeConfig& c) {
    ModelWeights w;
    weights_open(&w, dir, c);
    const std::string shape = config_json(c, BF16).dump();
    uint64_t hash = fnv1a(FNV_BASIS, (const unsigned char*)shape.data(), shape.size());
    for (const SafeTensor* t : w.tensors) hash = fnv1a_of_blocks(hash, t->data, t->bytes, 16);
    weights_close(&w);
    const std::vector<double> halves = {(double)(hash >> 32), (double)(uint32_t)hash};
    std::vector<double> of_rank_0 = world.rank == 0 ? halves : std::vector<double>(2, 0.0);
    host_sum(&of_rank_0);
    if (halves != of_rank_0) die("--reference %s holds other weights than on rank 0", dir.c_str());
    return hash;
}

size_t validation_rows(const TrainingRun& run) {
    const size_t n = run.rows.validation.count;
    return run.o.val_batches > 0 ? std::min(n, (size_t)(run.o.val_batches * run.o.B)) : n;
}

// The blocks of rows that validation goes through: as many rows as a step has, in the order of the files
std::vector<std::vector<size_t>> validation_blocks(const TrainingRun& run) {
    std::vector<std::vector<size_t>> blocks;
    for (size_t i = 0; i < validation_rows(run); i++) {
        if (i % run.o.global_batch == 0) blocks.emplace_back();
        blocks.back().push_back(i);
    }
    return blocks;
}

// What log-probabilities depend on. KTO's mismatched rows of validation also do on how many rows the last block has.
std::string reference_key(const TrainingRun& run, const Rows& rows) {
    const TrainOptions& o = run.o;
    const size_t validation = &rows == &run.rows.validation ? validation_rows(run) : 0;
    Json key = {{"data", text("%016lx", rows.fingerprint)}, {"reference", run.rows.reference_fingerprint},
                {"precision", BF16 ? "BF16" : "FP32"}, {"global_batch", o.global_batch}, {"seed", o.seed},
                {"order", std::string(o.order)}, {"validation_rows", validation}};
    // which rows are in a step, and so the mismatched ones
    if (rows.format.kind == RowKind::kto && !run.data.skipped.empty())
        key["skipped"] = batch_ranges_json(run.data.skipped);
    return key.dump();
}

// What is known already, from OUT/NAME.safetensors. Rank 0 reads it: all have to compute the same.
void reference_open(TrainingRun* run, ReferenceLogps* r, const Rows& rows, const std::string& name) {
    Safetensors f;
    r->rows.assign(rows.count * rows.sides(), world.rank == 0 ? UNKNOWN : 0);
    if (world.rank == 0 && table_open(&f, run->o.out, name, reference_key(*run, rows))) {
        const double* known = table_part<double>(f, "rows", r->rows.size());
        r->rows.assign(known, known + r->rows.size());
        const size_t n = f.find("mismatched") ? f.find("mismatched")->bytes / sizeof(double) : 0;
        known = table_part<double>(f, "mismatched", n);
        r->mismatched.assign(known, known + n);
        safetensors_close(&f);
    }
    r->mismatched.resize((size_t)host_sum((double)r->mismatched.size()), 0);
    host_sum(&r->rows);                     // the others' are 0; unknown ones stay NaN
    host_sum(&r->mismatched);
}

void reference_save(const TrainingRun& run, const ReferenceLogps& r, const Rows& rows, const std::string& name) {
    if (world.rank > 0 || run.replayed > 0) return;
    table_write(run.o.out, name, reference_key(run, rows),
                {{"rows", "F64", {(int64_t)r.rows.size()}, r.rows.data()},
                 {"mismatched", "F64", {(int64_t)r.mismatched.size()}, r.mismatched.data()}});
}

// What block number `at` needs is not all known. `first`: of its mismatched rows
bool reference_lacks(const ReferenceLogps& r, const Rows& rows, const std::vector<size_t>& block, size_t first) {
    const size_t sides = rows.sides(), pairs = rows.format.kind == RowKind::kto ? block.size() : 0;
    for (size_t row : block) for (size_t s = 0; s < sides; s++) if (std::isnan(r.rows[row * sides + s])) return true;
    for (size_t i = 0; i < pairs; i++)
        if (first + i >= r.mismatched.size() || std::isnan(r.mismatched[first + i])) return true;
    return false;
}

// Computes what a block lacks, by the weights of now.
void reference_add(TrainingRun* run, ReferenceLogps* r, const Rows& rows, const std::vector<size_t>& block,
                   size_t first) {
    const size_t sides = rows.sides();
    const std::vector<double> logps = block_logps(run, block_of_rows(rows, block));
    const std::vector<std::string>& paths = &rows == &run->rows.validation ? run->o.val : run->o.data;
    for (size_t i = 0; i < logps.size(); i++) {
        const int64_t* line = rows.lines + 2 * block[i / sides];        // its file and number
        if (!std::isfinite(logps[i]))
            die("--reference %s: the log-probability of %s:%ld is not finite", run->o.reference.c_str(),
                paths[line[0]].c_str(), line[1]);
        double& known = r->rows[block[i / sides] * sides + i % sides];
        if (std::isnan(known)) known = logps[i];        // what a step met first, it meets again
    }
    if (rows.format.kind != RowKind::kto) return;
    const std::vector<double> mismatched = block_logps(run, block_mismatched(rows, block));
    r->mismatched.resize(std::max(r->mismatched.size(), first + block.size()), UNKNOWN);
    std::copy(mismatched.begin(), mismatched.end(), r->mismatched.begin() + (ptrdiff_t)first);
}

// Whether every rank goes on; a signal to one of them ends all, and what is known stays.
void reference_alive(const TrainingRun& run, const ReferenceLogps& r, const Rows& rows, const std::string& name) {
    if (host_sum((double)stop_requested) == 0) return;
    reference_save(run, r, rows, name);
    if (world.rank == 0 && run.replayed > 0) die("stopped while the reference's log-probabilities were computed");
    if (world.rank == 0)
        die("stopped while the reference's log-probabilities were computed; those that are known are in %s, "
            "and the same command goes on", run.o.out.c_str());
    sleep(3);
}

// All that the blocks need, from OUT or by the reference's weights, which are then in memory: the caller loads its own.
void reference_fill(TrainingRun* run, ReferenceLogps* r, const Rows& rows, const std::string& name,
                    const std::vector<std::vector<size_t>>& blocks, bool* loaded) {
    reference_open(run, r, rows, name);
    stopping_saves = true;
    const bool writes = run->replayed == 0;
    double saved = seconds_now(), begun = saved;
    size_t first = 0, done = 0, all = 0;
    for (const std::vector<size_t>& block : blocks) all += block.size();
    for (const std::vector<size_t>& block : blocks) {
        if (reference_lacks(*r, rows, block, first)) {
            if (done == 0 && writes)
                printf("%s: log-probabilities of the rows by %s\n", name.c_str(), run->o.reference.c_str());
            if (!*loaded) olmoe_load(&run->model, run->o.reference);
            *loaded = true;
            reference_add(run, r, rows, block, first);
            reference_alive(*run, *r, rows, name);
            done += block.size();
            if (writes && seconds_now() - saved > 20) {
                reference_save(*run, *r, rows, name);
                saved = seconds_now();
                printf("%s: %zu of the run's %zu rows\n", name.c_str(), first + block.size(), all);
            }
        }
        first += block.size();
    }
    if (done == 0 || !writes) return;
    reference_save(*run, *r, rows, name);
    printf("%s: %zu rows through the reference in %s\n", name.c_str(), done,
           human_time(seconds_now() - begun).c_str());
}

// ------------------------------------------------------------------------------------------------
// Opening

RowFormat row_format(const TrainingRun& run) {
    return {run.objective->rows, run.o.label_mask == "olmoe", (int)run.o.T, &run.tokenizer};
}

// The rows to train on, and the order of their steps
void finetune_open_rows(TrainingRun* run) {
    const TrainOptions& o = run->o;
    DataLoader& d = run->data;
    rows_open(&run->rows.training, o.out, "rows", o.data, row_format(*run), !run->rows.of_out);
    d.instances = run->rows.training.count;
    d.order = o.order == "global" ? DataOrder::global : DataOrder::sequential;
    d.seed = o.seed;
    if (o.global_batch > (int64_t)d.instances)
        die("--global-batch %ld is more than the %zu rows; use a smaller one", o.global_batch, d.instances);
}

// After the ranks have met in OUT
void finetune_open(TrainingRun* run) {
    const TrainOptions& o = run->o;
    finetune_open_rows(run);
    if (!o.val.empty()) rows_open(&run->rows.validation, o.out, "val-rows", o.val, row_format(*run));
    if (run->objective->rows != RowKind::sft)
        run->rows.reference_fingerprint = text("%016lx", weights_fingerprint(o.reference, run->config));
}

// The reference's log-probabilities of all rows that the run's steps and validations visit
void finetune_reference(TrainingRun* run) {
    if (run->objective->rows == RowKind::sft) return;
    DataLoader order = run->data;
    dataloader_seek(&order, 0, 0);
    std::vector<std::vector<size_t>> blocks;
    for (int64_t step = 0; step < run->steps; step++)
        blocks.push_back(dataloader_draw(&order, (int)run->o.global_batch));
    bool loaded = false;
    at_step("reference");
    reference_fill(run, &run->rows.reference, run->rows.training, "reference", blocks, &loaded);
    if (!run->o.val.empty())
        reference_fill(run, &run->rows.validation_reference, run->rows.validation, "val-reference",
                       validation_blocks(*run), &loaded);
    at_step("");
}

// ------------------------------------------------------------------------------------------------
// A step

// What the sum of -log p is divided by, of --ce-divisor
double divisor_of(const std::string& choice, double all, double valid) {
    return choice == "all" ? all : choice == "valid" ? std::max(1.0, valid) : atof(choice.c_str());
}

// Draws the step's rows and deals them: this rank's micro-batches, whose targets weigh `weight(targets, tokens)` each.
template <typename Weight> std::vector<MicroBatch> rows_next(TrainingRun* run, Weight weight) {
    RowStep& s = run->rows.step;
    s.rows = dataloader_draw(&run->data, (int)run->o.global_batch);
    const RowBlock block = block_of_rows(run->rows.training, s.rows);
    const std::vector<int> lengths = block_lengths(block);
    s.deal = rows_deal(lengths, (int)run->o.B);
    s.tokens = s.squares = 0;
    double targets = 0;
    for (const auto& row : block)
        for (const RowSequence& q : row) {
            s.tokens += (double)q.ids.size();
            s.squares += (double)q.ids.size() * (double)q.ids.size();
            targets += num_targets(q.targets.data(), q.ids.size(), run->rows.training.format.T);
        }
    return block_batches(block, s.deal, weight(targets, s.tokens));
}

std::vector<MicroBatch> sft_micro_batches(TrainingRun* run) {
    return rows_next(run, [&](double targets, double tokens) {
        return 1 / divisor_of(run->o.ce_divisor, tokens, targets);
    });
}

std::vector<MicroBatch> dpo_micro_batches(TrainingRun* run) {
    return rows_next(run, [](double, double) { return 0; });
}

// The estimate of KL comes before any backward.
std::vector<MicroBatch> kto_micro_batches(TrainingRun* run) {
    std::vector<MicroBatch> batches = dpo_micro_batches(run);
    const RowStep& step = run->rows.step;
    run->rows.step.kl = kto_kl(block_logps(run, block_mismatched(run->rows.training, step.rows)),
                              &run->rows.reference.mismatched[(run->step - 1) * step.rows.size()]);
    return batches;
}

double preference_gradient(TrainingRun* run) {
    Olmoe* m = &run->model;
    const RowStep& step = run->rows.step;
    std::vector<size_t> numbers;
    for (size_t place : step.deal.mine[run->micro_batch]) numbers.push_back(step.rows[place]);
    olmoe_head(m, false);
    const double before = run->measures[LOSS];
    head_of_slopes(m, preferences(run->o, run->rows.training, numbers, batch_logps(m), run->rows.reference, step.kl,
                                  1 / (double)step.rows.size(), &run->measures));
    return run->measures[LOSS] - before;
}

const Objective* finetune_objective(const std::string& name) {
    static const Objective objectives[] = {
        {"sft", true, RowKind::sft, sft_micro_batches, weighted_gradient},
        {"dpo", true, RowKind::dpo, dpo_micro_batches, preference_gradient},
        {"kto", true, RowKind::kto, kto_micro_batches, preference_gradient},
    };
    for (const Objective& o : objectives) if (name == o.name) return &o;
    return nullptr;
}

// ------------------------------------------------------------------------------------------------
// Validation and reports

// The loss over the validation rows, and what else the step's line has, with val_ before it
void finetune_validate(TrainingRun* run, Json* line) {
    const Rows& rows = run->rows.validation;
    std::vector<double> sums(MEASURES, 0.0);
    double targets = 0, n = 0, kl = 0;
    size_t first = 0;
    for (const std::vector<size_t>& numbers : validation_blocks(*run)) {
        const RowBlock block = block_of_rows(rows, numbers);
        const std::vector<double> logps = block_logps(run, block, &run->balance);
        for (const auto& row : block)
            for (const RowSequence& s : row) targets += num_targets(s.targets.data(), s.ids.size(), rows.format.T);
        if (rows.format.kind == RowKind::sft) {
            sums[LOSS] -= std::accumulate(logps.begin(), logps.end(), 0.0);
        } else {
            double block_kl = 0;
            if (rows.format.kind == RowKind::kto)
                block_kl = kto_kl(block_logps(run, block_mismatched(rows, numbers), &run->balance),
                                  &run->rows.validation_reference.mismatched[first]);
            kl += block_kl * (double)numbers.size();
            preferences(run->o, rows, numbers, logps, run->rows.validation_reference, block_kl, 1, &sums);
        }
        n += (double)numbers.size();
        first += numbers.size();
    }
    const bool sft = rows.format.kind == RowKind::sft;
    const double loss = sums[LOSS] / (sft ? targets : n);
    printf("  validation loss %.4f%s\n", loss,
           rows.format.kind == RowKind::dpo ? text(", reward accuracy %.3f", sums[ACCURATE] / n).c_str() : "");
    (*line)["val_loss"] = digits(loss);
    if (rows.format.kind == RowKind::dpo) (*line)["val_reward_accuracy"] = digits(sums[ACCURATE] / n);
    if (rows.format.kind == RowKind::kto) (*line)["val_kl"] = digits(kl / n);
    host_sum(&run->balance.counts);
}

// What the objective adds to a step's line of the log; returns what the screen shows of it.
std::string finetune_report(const TrainingRun& run, const StepResult& r, Json* line) {
    const std::vector<double>& s = r.measures;
    auto mean = [](double sum, double n) { return n > 0 ? sum / n : NAN; };    // NaN: null in the log
    const double chosen = mean(s[CHOSEN], s[CHOSENS]), rejected = mean(s[REJECTED], s[REJECTEDS]);
    (*line)["targets"] = r.losses.valid;
    if (run.objective->rows == RowKind::dpo) {
        const double margin = s[REWARD_MARGIN] / s[CHOSENS], accuracy = s[ACCURATE] / s[CHOSENS];
        line->update({{"chosen_logp", digits(chosen)}, {"rejected_logp", digits(rejected)},
                      {"reward_margin", digits(margin)}, {"reward_accuracy", digits(accuracy)}});
        return text("logp %.2f %.2f, margin %.4f, accuracy %.3f", chosen, rejected, margin, accuracy);
    }
    if (run.objective->rows == RowKind::kto) {
        line->update({{"kl", digits(run.rows.step.kl)}, {"chosen_reward", digits(chosen)},
                      {"rejected_reward", digits(rejected)}});
        return text("kl %.4f, rewards %.4f %.4f", run.rows.step.kl, chosen, rejected);
    }
    return text("%ld targets, %.4f a target", r.losses.valid, r.ce());
}
