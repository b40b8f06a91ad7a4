// olmoe info: parameters, FLOPs and memory of a shape, and what its training on many GPUs sends and how long it takes.
//
// Included once, by olmoe.cu, after the model.
#pragma once
#include "../lib/checkpoint.h"
#include "../lib/options.h"
#include "../lib/reports.h"
#include "../lib/weights.h"

struct InfoOptions {
    std::string config, model;
    std::vector<std::string> freeze;
    Choice master_weights = "fp32", moments = "fp32", objective = "pretrain";
    int64_t B = 4, T = 0, global_batch = 0, recompute = 0, gpus = 1, ep = 1, zero = 0, per_node = 8, rows = 0;
    double length = 0, epochs = 1, memory = 80, tflops = 400, memory_bandwidth = 3000;
    double node_bandwidth = 300, network_bandwidth = 40;
    bool json = false;

    const std::string& path() const { return config.empty() ? model : config; }
    bool of_rows() const { return objective != "pretrain"; }
    double sides() const { return objective == "dpo" ? 2 : 1; }         // sequences of a row
    double tokens() const { return of_rows() ? sides() * length : (double)T; }     // of a row
};

std::vector<Option> info_options(InfoOptions* o) {
    return {
        {"config", &o->config, "FILE", "a config.json"},
        {"model", &o->model, "DIR", "a Hugging Face directory"},
        {"json", &o->json, "", "print shape, tensors and memory as one JSON object, for scripts"},
        {"objective", &o->objective, "pretrain|sft|dpo|kto", "as in train"},
        {"rows", &o->rows, "N", "rows of the data: how long --epochs of them take", 0, 1e12},
        {"epochs", &o->epochs, "E", "of the rows", 0, 1e9},
        {"mean-length", &o->length, "X", "mean tokens of a row's sequence; 0: --seq", 0, 1 << 20},
        {"freeze", &o->freeze, "GROUPS", "as in train"},
        {"batch", &o->B, "B", "sequences (conversations, pairs, rows) of a micro-batch", 1, 1 << 20},
        {"seq", &o->T, "T", "tokens of a sequence; 0: max_position_embeddings", 0, 1 << 20},
        {"recompute", &o->recompute, "0|1|2", "as in train", 0, 2},
        {"master-weights", &o->master_weights, MASTERS_CHOICE, "as in train"},
        {"moments", &o->moments, MOMENTS_CHOICE, "as in train"},
        {"memory", &o->memory, "X", "GB of a GPU's memory", 1e-6, 1e9},
        {"gpus", &o->gpus, "N", "plan of one of N GPUs: memory, bytes sent, time", 1, 1 << 16},
        {"ep", &o->ep, "G", "as in train", 1, 1 << 16},
        {"zero", &o->zero, "0|1", "as in train", 0, 1},
        {"global-batch", &o->global_batch, "G", "as in train", 0, 1 << 24},
        {"gpus-per-node", &o->per_node, "N", "GPUs that a fast network joins", 1, 1 << 16},
        {"tflops", &o->tflops, "X", "TFLOP/s that a GPU sustains over forward and backward", 1e-6, 1e9},
        {"memory-bandwidth", &o->memory_bandwidth, "X", "GB/s of a GPU's memory", 1e-6, 1e9},
        {"node-bandwidth", &o->node_bandwidth, "X", "GB/s that a GPU sends to others of its node", 1e-6, 1e9},
        {"network-bandwidth", &o->network_bandwidth, "X", "GB/s that a GPU sends to other nodes", 1e-6, 1e9},
    };
}

// Fills in what was left to the config, and checks the options against it.
void info_check(InfoOptions* o, const OlmoeConfig& c) {
    if (o->T == 0) o->T = c.max_T;
    if (o->length == 0) o->length = (double)o->T;
    if (o->length > (double)o->T) die("--mean-length %g is more than --seq %ld", o->length, o->T);
    if (!o->of_rows() && o->rows > 0) die("--rows is for --objective sft, dpo and kto");
    if (o->gpus % o->ep != 0) die("%ld ranks can't be divided into groups of --ep %ld", o->gpus, o->ep);
    if (c.E % o->ep != 0) die("the model's %d experts can't be divided among --ep %ld ranks", c.E, o->ep);
    if (o->global_batch == 0) o->global_batch = o->B * o->gpus;
    if (o->global_batch % (o->B * o->gpus) != 0)
        die("--global-batch %ld is not a multiple of %ld ranks x --batch %ld", o->global_batch, o->gpus, o->B);
}

void info_plan(Olmoe* m, const OlmoeConfig& c, const InfoOptions& o, const std::string& masters,
               const std::string& moments) {
    choose_state(m, masters, moments);
    olmoe_plan(m, c, capacity_of_rows(c, o.B * (int64_t)o.sides(), o.T, Use::training, (int)o.recompute));
}

// Which ways of keeping AdamW's state leave room for the rest
void box_fits(Box* box, const OlmoeConfig& c, const InfoOptions& o) {
    box->add(text("fits %g GB?", o.memory), "--master-weights, --moments: all of the plan");
    for (const char* masters : {"fp32", "remainder", "none"})
        for (const char* moments : {"fp32", "bf16"}) {
            if (!BF16 && strcmp(masters, "fp32") != 0) continue;
            Olmoe other;
            info_plan(&other, c, o, masters, moments);
            const double sum = memory_sum(other);
            const bool fits = sum + overhead_estimate() <= o.memory * 1e9;
            box->add(fits ? "yes" : "no", text("%s, %s: %s", masters, moments, human(sum, "B").c_str()));
        }
}

// ------------------------------------------------------------------------------------------------
// Many GPUs

// Of G ranks with E/G experts each, how many a token visits that draws K of the E experts at random
double visited_ranks(double E, double K, double G) {
    double missed = 1;                      // that a rank has none of them: C(E - E/G, K) / C(E, K)
    for (double k = 0; k < K; k++) missed *= std::max(0.0, E - E / G - k) / (E - k);
    return G * (1 - missed);
}

// What a rank gives to each kind of collective in a step, in bytes; rows at even routing. The formulas are in
// docs/scaling.md; the training log has what was really sent.
struct PlannedTraffic { double gradients = 0, expert_gradients = 0, parameters = 0, expert_parameters = 0, rows = 0; };

PlannedTraffic plan_traffic(const Olmoe& m, double tokens /* of a rank and step */) {
    const OlmoeConfig& c = m.config;
    PlannedTraffic sent;
    const double x = sizeof(floatX), G = expert_group.size;
    for (const Tensor& t : m.tensors) {
        if (t.group_of_ranks().size == 1) continue;
        (t.expert() ? sent.expert_gradients : sent.gradients) += (double)t.allocated() * x;
        if (shard_optimizer) (t.expert() ? sent.expert_parameters : sent.parameters) += (double)t.share * x;
    }
    // For each visit to another rank: a row there and back, its gradient there and back, and of K experts the numbers,
    // the weights, and their gradients. What --recompute does not keep is sent again.
    const double times = m.capacity.recompute >= 1 ? 5 : 4, visits = visited_ranks(c.E, c.K, G) * (G - 1) / G;
    sent.rows = tokens * c.L * visits * (times * c.C * x + 3 * c.K * sizeof(float));
    return sent;
}

struct PlannedTimes {                       // seconds of a step
    double compute = 0, rows = 0, reduce = 0, gather = 0, update = 0;
    double hidden = 0;                      // of reduce, during the last backward
    double hidden_rows = 0;                 // of rows, during the experts' matmuls

    double step() const { return compute + rows - hidden_rows + reduce - hidden + update + gather; }
};

// Of a token, forward and backward, and what an objective adds: DPO's and KTO's first pass of the head; and of KTO's
// mismatched row as many tokens, forward
double objective_flops(const OlmoeConfig& c, const InfoOptions& o) {
    const double once = flops_per_token(c, o.of_rows() ? o.length : (double)o.T);
    return once + (o.objective == "dpo" || o.objective == "kto" ? 2.0 * c.V * c.C : 0)
         + (o.objective == "kto" ? forward_flops(c, o.length) : 0);
}

PlannedTimes plan_times(const Olmoe& m, const InfoOptions& o, const PlannedTraffic& sent, double tokens) {
    const OlmoeConfig& c = m.config;
    const double flops = objective_flops(c, o);
    const double dense = world.size, copies = replica_group.size, G = expert_group.size;
    auto seconds = [&](double bytes, double ranks) {
        return bytes / (1e9 * (ranks <= o.per_node ? o.node_bandwidth : o.network_bandwidth));
    };
    PlannedTimes t;
    t.compute = tokens * flops / (o.tflops * 1e12);
    t.rows = seconds(sent.rows, G);
    // Of each exchange all pieces but one run during the matmuls of another, where those take as long; what --recompute
    // sends again does not.
    const double experts = 18.0 * c.L * c.K * c.C * c.F / flops, pieces = std::min<double>(PIECES, c.E / G);
    const double again = m.capacity.recompute >= 1 ? 4. / 5 : 1;
    t.hidden_rows = std::min(t.rows * again, t.compute * experts) * (1 - 1 / pieces);
    // Of n ranks one sends (n-1)/n of an array to reduce-scatter it, n-1 shares to gather one, and both to all-reduce.
    const double both = shard_optimizer ? 1 : 2;
    t.reduce = seconds(sent.gradients * (dense - 1) / dense * both, dense);
    if (copies > 1) t.reduce += seconds(sent.expert_gradients * (copies - 1) / copies * both, copies * G);
    t.gather = seconds(sent.parameters * (dense - 1), dense);
    t.gather += seconds(sent.expert_parameters * (copies - 1), copies * G);
    // AdamW reads and writes its state, reads gradients, writes weights, and reads them where there is no fp32 copy.
    const double passes = m.masters == Masters::fp32 ? 2 : 3;
    const double moved = 2.0 * m.optimizer_memory.bytes() + passes * sizeof(floatX) * num_updated(m.tensors);
    t.update = moved / (o.memory_bandwidth * 1e9);
    // A reduction runs during the last backward; with --ep not while the experts compute (see olmoe_backward).
    const double not_experts = o.ep > 1 ? 1 - experts : 1;
    t.hidden = std::min(t.reduce, t.compute * 2 / 3 * (o.B * o.gpus) / o.global_batch * not_experts);
    return t;
}

void box_layout(Box* box, const Olmoe& m, const InfoOptions& o) {
    const double all_tokens = (double)o.global_batch * o.tokens(), tokens = all_tokens / o.gpus;
    const PlannedTraffic sent = plan_traffic(m, tokens);
    const PlannedTimes t = plan_times(m, o, sent, tokens);
    const double rate = tokens / t.step();
    box->add("layout", text("%ld GPUs, experts over %ld, each held by %d, ZeRO-1 %s", o.gpus, o.ep, replica_group.size,
                            shard_optimizer ? "on" : "off"));
    box->add("step", text("%s tokens, %s a GPU", human(all_tokens).c_str(), human(tokens).c_str()));
    box->add("sent: gradients", human(sent.gradients + sent.expert_gradients, "B") + " a step");
    box->add("sent: parameters", human(sent.parameters + sent.expert_parameters, "B") + " a step");
    box->add("sent: rows", text("%s a step, %s a token", human(sent.rows, "B").c_str(),
                                human(sent.rows / tokens, "B").c_str()));
    box->add("time: compute", text("%.2f ms at %s", 1e3 * t.compute, human(o.tflops * 1e12, "FLOP/s").c_str()));
    box->add("time: rows", text("%.2f ms, of which %.2f during the experts' matmuls", 1e3 * t.rows,
                                1e3 * t.hidden_rows));
    box->add("time: gradients", text("%.2f ms, of which %.2f during the last backward", 1e3 * t.reduce,
                                     1e3 * t.hidden));
    box->add("time: update, gathering", text("%.2f ms, %.2f ms", 1e3 * t.update, 1e3 * t.gather));
    box->add("time: step (estimate)", text("%.2f ms, %s tokens/s a GPU, %s in all", 1e3 * t.step(), human(rate).c_str(),
                                           human(o.gpus * rate).c_str()));
}

// What fine-tuning takes: by an objective, the reference's part, and in all
void box_objective(Box* box, const Olmoe& m, const InfoOptions& o) {
    const OlmoeConfig& c = m.config;
    const double tokens = (double)o.global_batch * o.tokens(), cluster = o.tflops * 1e12 * o.gpus;
    const double step = plan_times(m, o, plan_traffic(m, tokens / o.gpus), tokens / o.gpus).step();
    const bool dpo = o.objective == "dpo", kto = o.objective == "kto";
    if (dpo || kto)
        box->add("head's first pass", text("%s a token more, for the losses that weights depend on",
                                           human(2.0 * c.V * c.C, "FLOP").c_str()));
    if (kto) box->add("mismatched rows", human(forward_flops(c, o.length), "FLOP") + " a token more, forward");
    if (!m.config.frozen.empty()) box->add("frozen", join(m.config.frozen) + ": neither gradients nor state");
    box->add("time: step of rows", text("%.4g s: %ld rows of %.4g tokens in the mean at %s", step, o.global_batch,
                                        o.tokens(), human(cluster, "FLOP/s").c_str()));
    if (o.rows == 0) return;
    const double steps = ceil(o.epochs * floor((double)o.rows / (double)o.global_batch));
    const double visits = (double)o.rows + (kto ? steps * (double)o.global_batch : 0);
    const double reference = dpo || kto ? visits * o.tokens() * forward_flops(c, o.length) / cluster : 0;
    if (dpo || kto)
        box->add("time: reference", text("%s: %.4g rows forward, once", human_time(reference).c_str(), visits));
    box->add("time: run", text("%s: %.0f steps, %g epochs of %ld rows", human_time(steps * step + reference).c_str(),
                               steps, o.epochs, o.rows));
}

// ------------------------------------------------------------------------------------------------
// The files of a model

// How many parameters they hold in each dtype. Dies where they are not those of the config.
Json parameters_by_dtype(const std::string& dir, const OlmoeConfig& c) {
    ModelWeights w;
    weights_open(&w, dir, c);
    const std::vector<HfTensor> tensors = hf_tensors(c);
    Json dtypes = Json::object();
    for (size_t i = 0; i < tensors.size(); i++) {
        const std::string& dtype = weights_tensor(w, i).dtype;
        dtypes[dtype] = dtypes.value(dtype, (size_t)0) + tensors[i].count;
    }
    weights_close(&w);
    return dtypes;
}

// ------------------------------------------------------------------------------------------------
// For scripts

const char* name_of(Kind kind) {
    switch (kind) {
        case Kind::lookup: return "lookup";
        case Kind::norm: return "norm";
        case Kind::matrix: return "matrix";
        case Kind::experts: return "experts";
    }
    return "";
}

// All tensors as files have them, in the flat order
Json tensors_json(const OlmoeConfig& c) {
    const std::vector<Tensor> tensors = model_tensors(c);
    Json list = Json::array();
    for (const HfTensor& t : hf_tensors(c)) {
        const Tensor& row = tensor_at(tensors, t.offset);
        Json layer = row.layer >= 0 && row.layer < c.L ? Json(row.layer) : Json(nullptr);
        list.push_back({{"name", t.name}, {"shape", t.shape}, {"group", row.group}, {"kind", name_of(row.kind)},
                        {"layer", layer}, {"offset", t.offset}, {"count", t.count}});
    }
    return list;
}

Json info_json(const Olmoe& m, const InfoOptions& o) {
    const OlmoeConfig& c = m.config;
    Json groups = Json::object(), memory = Json::object();
    for (const Tensor& t : m.tensors) groups[t.group] = groups.value(t.group, (size_t)0) + t.whole;
    for (const MemoryPart& part : memory_plan(m)) memory[part.name] = (int64_t)part.bytes;
    memory["sum"] = (int64_t)memory_sum(m);
    Json j = {{"config", config_json(c, BF16)}, {"precision", BF16 ? "BF16" : "FP32"},
              {"parameters", num_parameters(c)}, {"active_parameters", num_active_parameters(c)},
              {"flops_per_token", (int64_t)flops_per_token(c, (double)o.T)}, {"seq", o.T},
              {"groups", groups}, {"tensors", tensors_json(c)}, {"memory", memory},
              {"overhead_estimate", (int64_t)overhead_estimate()}};
    if (!o.model.empty()) j["dtypes"] = parameters_by_dtype(o.model, c);
    return j;
}

// ------------------------------------------------------------------------------------------------

int command_info(int argc, char** argv) {
    InfoOptions o;
    options_parse(argc, argv, "info --config FILE | --model DIR [options]", info_options(&o));
    if (o.config.empty() == o.model.empty()) die("info needs either --config FILE or --model DIR");
    OlmoeConfig c;
    config_read(&c, o.path());
    freeze(&c, o.freeze);
    info_check(&o, c);
    layout_set(0, (int)o.gpus, (int)o.ep, o.zero == 1);
    Olmoe m;
    info_plan(&m, c, o, o.master_weights, o.moments);
    if (o.json) {
        printf("%s\n", info_json(m, o).dump().c_str());
        return 0;
    }

    Box box;
    box.add("model", o.path());
    box_shapes(&box, c);
    box.rule();
    box.add("FLOP a token", text("%s forward and backward at T = %ld, causal",
                                 human(flops_per_token(c, (double)o.T), "FLOP").c_str(), o.T));
    box.rule();
    box.add("training", text("%s, %ld x %ld tokens a micro-batch, --recompute %ld", BF16 ? "BF16" : "FP32",
                             o.B * (int64_t)o.sides(), o.T, o.recompute));
    box_memory(&box, m);
    box.add("CUDA, NCCL", "about " + human(overhead_estimate(), "B") + " more of a GPU (estimate)");
    box.rule();
    box_fits(&box, c, o);
    if (o.gpus > 1) {
        box.rule();
        box_layout(&box, m, o);
    }
    if (o.of_rows()) {
        box.rule();
        box.add("objective", o.objective);
        box_objective(&box, m, o);
    }
    box.print();
    if (o.model.empty()) return 0;

    const Json dtypes = parameters_by_dtype(o.model, c);
    printf("%zu tensors, all there:", hf_tensors(c).size());
    for (auto& [dtype, count] : dtypes.items()) printf(" %s in %s", human(count.get<double>()).c_str(), dtype.c_str());
    printf("\n");
    return 0;
}
