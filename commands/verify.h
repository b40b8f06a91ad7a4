// olmoe verify: compares what this program computes with a reference file, whose format is in README.md.
//
// Included once, by olmoe.cu, after the model.
#pragma once
#include "../lib/checkpoint.h"
#include "../lib/options.h"
#include "../lib/weights.h"

// ------------------------------------------------------------------------------------------------
// The reference file

template <typename T> std::vector<T> values_of(const SafeTensor& t) {
    std::vector<T> values(t.bytes / sizeof(T));
    memcpy(values.data(), t.data, t.bytes);
    return values;
}

std::vector<float> floats_of(const SafeTensor& t) { return values_of<float>(t); }

struct Reference {
    Safetensors file;
    int64_t B = 0, T = 0;                   // the shape of inputs; with `lengths` 1 and N
    std::vector<int> lengths;               // of the sequences: T, B times, where the file has no `lengths`
    std::vector<int> inputs, targets;       // (B, T); targets are all IGNORED where the file has none
    std::vector<double> weights;            // (B, T) what each target counts in the loss
    bool has_targets = false;
    std::vector<HfTensor> tensors;          // of the model
    std::vector<const SafeTensor*> grads;   // the gradient of each of them, or null
    size_t to_compare = 0;                  // tensors of the file that are no inputs
    bool scalars = false;                   // some of them are losses,
    bool backward = false;                  // or need gradients
    double lb_coef = 0, z_coef = 0;

    const char* path() const { return file.path.c_str(); }
    const SafeTensor* find(const std::string& name) const { return file.find(name); }
    bool has(const std::string& key) const { return file.metadata.count(key) > 0; }
    double number(const std::string& key, double absent) const {
        if (!has(key)) return absent;
        const std::string& value = file.metadata.at(key);
        char* end;
        double x = strtod(value.c_str(), &end);
        if (value.empty() || *end) die("%s: metadata %s '%s' is not a number", path(), key.c_str(), value.c_str());
        return x;
    }
    // Dies where the tensor is of another dtype or shape.
    void expect(const SafeTensor& t, const char* dtype, const std::vector<int64_t>& shape) const {
        const std::string here = Json(t.shape).dump(), there = Json(shape).dump();
        const char* name = t.name.c_str();
        if (t.dtype != dtype) die("%s: %s is %s, it should be %s", path(), name, t.dtype.c_str(), dtype);
        if (t.shape != shape) die("%s: %s has shape %s, it should be %s", path(), name, here.c_str(), there.c_str());
    }
};

// Tensors of the file that say what is computed. All others are compared.
bool is_input(const std::string& name) {
    return name == "inputs" || name == "targets" || name == "lengths" || name == "weights";
}

void reference_read_lengths(Reference* r, const OlmoeConfig& c) {
    const SafeTensor* lengths = r->find("lengths");
    if (!lengths) {
        if (r->T > c.max_T)
            die("%s: inputs of %ld x %ld tokens; max_position_embeddings is %d", r->path(), r->B, r->T, c.max_T);
        r->lengths.assign(r->B, (int)r->T);
        return;
    }
    if (lengths->shape.size() != 1 || lengths->shape[0] < 1) die("%s: lengths should be I32 [S]", r->path());
    r->expect(*lengths, "I32", lengths->shape);
    if (r->B != 1)
        die("%s: with `lengths`, inputs should be I32 [1, N]; they are [%ld, %ld]", r->path(), r->B, r->T);
    r->lengths = values_of<int>(*lengths);
    int64_t sum = 0;
    for (size_t s = 0; s < r->lengths.size(); s++) {
        const int length = r->lengths[s];
        if (length < 1 || length > c.max_T)
            die("%s: lengths[%zu] is %d; it may be 1 to max_position_embeddings, which is %d", r->path(), s, length,
                c.max_T);
        sum += length;
    }
    if (sum != r->T) die("%s: the lengths sum to %ld, inputs has %ld tokens", r->path(), sum, r->T);
}

void reference_read_tokens(Reference* r, const OlmoeConfig& c) {
    const SafeTensor *inputs = r->find("inputs"), *targets = r->find("targets");
    if (!inputs || inputs->shape.size() != 2) die("%s: needs a tensor `inputs` I32 [B, T]", r->path());
    r->B = inputs->shape[0];
    r->T = inputs->shape[1];
    if (r->B < 1 || r->T < 1 || r->B > 1 << 20 || r->T > 1 << 30)
        die("%s: inputs of %ld x %ld tokens", r->path(), r->B, r->T);
    r->expect(*inputs, "I32", {r->B, r->T});
    if (targets) r->expect(*targets, "I32", {r->B, r->T});
    r->inputs = values_of<int>(*inputs);
    r->has_targets = targets;
    if (targets) r->targets = values_of<int>(*targets);
    else r->targets.assign(r->inputs.size(), IGNORED);
    reference_read_lengths(r, c);
}

// What each target counts in the loss: the file's `weights`, or the same for all by ce_divisor
void reference_read_weights(Reference* r) {
    if (const SafeTensor* weights = r->find("weights")) {
        r->expect(*weights, "F32", {r->B, r->T});
        if (!r->has_targets) die("%s: `weights` are those of `targets`, which are not there", r->path());
        if (r->has("ce_divisor")) die("%s: has both `weights` and metadata ce_divisor; leave one out", r->path());
        const std::vector<float> values = floats_of(*weights);
        for (size_t i = 0; i < values.size(); i++)
            if (!std::isfinite(values[i])) die("%s: weights has %g at %zu", r->path(), values[i], i);
        r->weights.assign(values.begin(), values.end());
        return;
    }
    const std::string divisor = r->has("ce_divisor") ? r->file.metadata["ce_divisor"] : "valid";
    if (divisor != "valid" && divisor != "all")
        die("%s: metadata ce_divisor '%s' is neither valid nor all", r->path(), divisor.c_str());
    const int64_t valid = std::count_if(r->targets.begin(), r->targets.end(), [](int t) { return t >= 0; });
    r->weights.assign(r->inputs.size(), divisor == "all" ? 1.0 / (r->B * r->T) : 1.0 / std::max<int64_t>(valid, 1));
}

// Is this the name of what a layer's router has? The format is "router.%d.experts%n", say.
bool is_of_router(const std::string& name, const char* format, const OlmoeConfig& c) {
    int layer = 0, used = 0;
    return sscanf(name.c_str(), format, &layer, &used) == 1 && used == (int)name.size() && layer >= 0 && layer < c.L;
}

// Every tensor of the file must be one that is understood.
void reference_check(Reference* r, const SafeTensor& t, const OlmoeConfig& c) {
    const int64_t B = r->B, T = r->T;
    if (t.name == "logits") return r->expect(t, "F32", {B, T, c.V});
    if (t.name == "logits_mean") return r->expect(t, "F32", {B, T});
    if (t.name == "logits_slice") {
        if (t.shape.size() != 3 || t.shape[1] < 1 || t.shape[1] > T || t.shape[2] < 1 || t.shape[2] > c.V)
            die("%s: logits_slice should be F32 [B, t, n]", r->path());
        return r->expect(t, "F32", {B, t.shape[1], t.shape[2]});
    }
    if (is_of_router(t.name, "router.%d.logits%n", c)) return r->expect(t, "F32", {B, T, c.E});
    if (is_of_router(t.name, "router.%d.experts%n", c)) return r->expect(t, "I32", {B, T, c.K});

    if (t.name == "losses") {
        if (t.shape.size() != 1 || t.shape[0] < 1) die("%s: losses should be F32 [S]", r->path());
        r->expect(t, "F32", t.shape);
        r->backward = true;
    } else if (t.name == "loss" || t.name == "ce_loss" || t.name == "lb_loss" || t.name == "z_loss") {
        r->expect(t, "F32", {1});
        r->scalars = true;
    } else {
        size_t i = 0;
        while (i < r->tensors.size() && t.name != "grad." + r->tensors[i].name) i++;
        if (i == r->tensors.size()) die("%s: unknown tensor %s", r->path(), t.name.c_str());
        r->expect(t, "F32", r->tensors[i].shape);
        r->grads[i] = &t;
        r->backward = true;
    }
    if (!r->has_targets) die("%s: %s can't be compared without `targets`", r->path(), t.name.c_str());
}

// Reads and checks all but the numbers to compare. Gradients point into the file: don't copy the struct.
void reference_open(Reference* r, const std::string& path, const OlmoeConfig& c) {
    safetensors_open(&r->file, path);
    reference_read_tokens(r, c);
    reference_read_weights(r);
    r->tensors = hf_tensors(c);
    r->grads.assign(r->tensors.size(), nullptr);
    for (const SafeTensor& t : r->file.tensors) {
        if (is_input(t.name)) continue;
        reference_check(r, t, c);
        r->to_compare++;
    }
    if (r->to_compare == 0) die("%s: nothing to compare", r->path());

    r->lb_coef = r->number("lb_coef", 0);
    r->z_coef = r->number("z_coef", 0);
}

MicroBatch reference_batch(const Reference& r) {
    MicroBatch batch;
    for (int T : r.lengths) batch_add(&batch, &r.inputs[batch.N()], &r.targets[batch.N()], T);
    batch.weights = r.weights;
    return batch;
}

// ------------------------------------------------------------------------------------------------
// The comparison

struct Verify {
    OlmoeConfig config;
    Reference reference;
    Olmoe model;
    double asked = -1;                      // --rtol
    double tolerance = 0;                   // relative, of most tensors
    // Of what comes next: elementwise atol + rtol |ref| where atol > 0, else rtol of the relative L2 error
    double rtol = 0, atol = 0;
    int compared = 0, failed = 0;
    size_t sets = 0, other_sets = 0;        // expert sets of tokens, over all layers; those that differ
};

void verify_tolerances(Verify* v) {
    const Reference& r = v->reference;
    const bool for_bf16 = BF16 && r.has("bf16_rtol");           // then rtol and atol are those of fp32
    if (v->asked >= 0) v->tolerance = v->asked;
    else v->tolerance = for_bf16 ? r.number("bf16_rtol", 0) : r.number("rtol", BF16 ? 3e-2 : 1e-4);
    v->atol = for_bf16 ? 0 : r.number("atol", 0);
}

// In BF16, where the file reports how far PyTorch's own bf16 runs are from it: 1.25 times, or so many, the worse of its
// two attentions
double peers_limit(const Verify& v, const std::string& what, double otherwise, double times = 1.25) {
    const std::string eager = "bf16_eager_" + what, sdpa = "bf16_sdpa_" + what;
    const Reference& r = v.reference;
    if (!BF16 || v.asked >= 0 || !r.has(eager) || !r.has(sdpa)) return otherwise;
    return times * std::max(r.number(eager, 0), r.number(sdpa, 0));
}

void verify_line(Verify* v, const std::string& name, double error, double tolerance, const std::string& worst) {
    bool ok = error <= tolerance;           // false for NaN
    v->failed += !ok;
    printf("%-58s %9.2e  %6.1f %%  %s%s\n", name.c_str(), error, 100 * error / tolerance, ok ? "ok" : "FAILED",
           worst.empty() ? "" : (" (worst " + worst + ")").c_str());
}

// `largest` is the largest norm of a gradient: an all-zero reference allows 1e-6 of it.
void verify_tensor(Verify* v, const std::string& name, const std::vector<float>& ours, const std::vector<float>& ref,
                   double largest = 1) {
    double difference = 0, square = 0, worst = -1, excess = 0;
    size_t at = 0;
    v->compared++;
    for (size_t i = 0; i < ref.size(); i++) {
        double d = std::fabs((double)ours[i] - ref[i]);
        difference += d * d;
        square += (double)ref[i] * ref[i];
        if (!std::isnan(worst) && !(d <= worst)) { worst = d; at = i; }     // a NaN stays the worst
        double e = d / (v->atol + v->rtol * std::fabs(ref[i]));
        if (v->atol > 0 && !std::isnan(excess) && !(e <= excess)) excess = e;
    }
    std::string where = text("%.6g for %.6g at %zu", (double)ours[at], (double)ref[at], at);
    if (v->atol > 0) verify_line(v, name + " (elementwise)", excess, 1, where);
    else if (square == 0) verify_line(v, name + " (zero)", sqrt(difference), 1e-6 * largest, where);
    else verify_line(v, name, sqrt(difference / square), v->rtol, where);
}

void verify_logits(Verify* v) {
    const Reference& r = v->reference;
    const int64_t B = r.B, T = r.T;
    const int V = v->config.V;
    const std::vector<float> logits = device_floats(v->model.acts.logits, (size_t)B * T * V);
    v->rtol = peers_limit(*v, "logits", v->tolerance);
    if (const SafeTensor* t = r.find("logits")) verify_tensor(v, "logits", logits, floats_of(*t));
    v->rtol = v->tolerance;
    if (const SafeTensor* t = r.find("logits_mean")) {
        std::vector<float> mean(B * T);
        for (int64_t i = 0; i < B * T; i++) {
            double sum = 0;
            for (int j = 0; j < V; j++) sum += logits[i * V + j];
            mean[i] = (float)(sum / V);
        }
        verify_tensor(v, "logits_mean", mean, floats_of(*t));
    }
    if (const SafeTensor* t = r.find("logits_slice")) {
        std::vector<float> slice;
        for (int64_t b = 0; b < B; b++)
            for (int64_t i = 0; i < t->shape[1]; i++) {
                const float* row = &logits[(b * T + i) * V];
                slice.insert(slice.end(), row, row + t->shape[2]);
            }
        verify_tensor(v, "logits_slice", slice, floats_of(*t));
    }
}

// Each token's experts in layer l. They may differ where the reference's own logits of the two experts are as good as
// equal.
void verify_experts(Verify* v, int l, const SafeTensor& reference, const std::vector<float>& logits /* or none */) {
    const int E = v->config.E, K = v->config.K;
    const std::string name = text("router.%d.experts", l);
    std::vector<int> ref = values_of<int>(reference), ids(ref.size());
    copy_to_host(ids.data(), v->model.acts.layers[l].experts, ids.size());
    size_t differ = 0, first = 0;
    for (size_t i = 0; i < ids.size(); i++) {
        if (ref[i] < 0 || ref[i] >= E)
            die("%s: %s holds the id %d, there are %d experts", v->reference.path(), name.c_str(), ref[i], E);
        const size_t row = i / K * E;
        bool close = !logits.empty() && std::fabs(logits[row + ids[i]] - logits[row + ref[i]]) < 1e-5f;
        if (ids[i] != ref[i] && !close && differ++ == 0) first = i;
    }
    std::string where = differ ? text("expert %d for %d at token %zu", ids[first], ref[first], first / K) : "";
    double share = (double)differ / ids.size();
    v->compared++;
    verify_line(v, text("%s (%.2f %% agree)", name.c_str(), 100 * (1 - share)), share, BF16 ? 1 : 1e-12, where);

    for (size_t t = 0; t < ids.size(); t += K, v->sets++) {     // now in any order
        std::sort(&ids[t], &ids[t] + K);
        std::sort(&ref[t], &ref[t] + K);
        v->other_sets += !std::equal(&ids[t], &ids[t] + K, &ref[t]);
    }
}

void verify_routers(Verify* v) {
    const Reference& r = v->reference;
    v->rtol = peers_limit(*v, "router", v->tolerance);
    for (int l = 0; l < v->config.L; l++) {
        const std::string prefix = "router." + std::to_string(l);
        std::vector<float> ref;
        if (const SafeTensor* t = r.find(prefix + ".logits")) {
            ref = floats_of(*t);
            std::vector<float> ours(ref.size());
            copy_to_host(ours.data(), v->model.acts.layers[l].router_logits, ours.size());
            verify_tensor(v, prefix + ".logits", ours, ref);
        }
        if (const SafeTensor* t = r.find(prefix + ".experts")) verify_experts(v, l, *t, ref);
    }
    if (double limit = peers_limit(*v, "experts", 0); limit > 0 && v->sets > 0) {
        std::string name = text("tokens with other experts, all layers (%zu of %zu)", v->other_sets, v->sets);
        verify_line(v, name, (double)v->other_sets / v->sets, limit, "");
    }
    v->rtol = v->tolerance;
}

// The worst of many tensors depends on luck more than all together: the gradient of an expert that few tokens chose has
// the error of their router's weight. So three times PyTorch's worst is allowed.
void verify_gradients(Verify* v) {
    const Reference& r = v->reference;
    const Olmoe& m = v->model;
    double largest = 0;
    for (const SafeTensor* t : r.grads) {
        double square = 0;
        if (t) for (float x : floats_of(*t)) square += (double)x * x;
        largest = std::max(largest, sqrt(square));
    }
    v->rtol = std::max(v->tolerance, peers_limit(*v, "worst_grad", 0, 3));
    for (size_t i = 0; i < r.tensors.size(); i++) {
        if (!r.grads[i]) continue;
        const floatX* ours = element_at(m.tensors, m.grads, r.tensors[i].offset);
        verify_tensor(v, r.grads[i]->name, device_floats(ours, r.tensors[i].count), floats_of(*r.grads[i]), largest);
    }
    v->rtol = v->tolerance;
}

// The losses of the batch and their gradients; then, where the file has `losses`, AdamW steps on it
void verify_losses(Verify* v) {
    const Reference& r = v->reference;
    Olmoe* m = &v->model;
    if (!r.scalars && !r.backward) return;
    const SafeTensor* all = r.find("losses");
    const int steps = all ? (int)all->shape[0] : 1;
    AdamWOptions o;
    o.lr = r.number("lr", 4e-4); o.weight_decay = r.number("weight_decay", 0.1); o.grad_clip = r.number("grad_clip", 0);
    o.beta1 = r.number("beta1", 0.9); o.beta2 = r.number("beta2", 0.95); o.eps = r.number("eps", 1e-8);
    std::vector<float> losses;
    for (int s = 0; s < steps; s++) {
        if (s > 0) olmoe_forward(m);
        olmoe_head(m, r.backward);
        if (r.backward) olmoe_backward(m, r.lb_coef, r.z_coef, 1);
        const Losses l = olmoe_losses(m, r.lb_coef, r.z_coef);
        losses.push_back((float)l.loss);
        if (s == 0) {
            const std::pair<const char*, double> terms[] =
                {{"loss", l.loss}, {"ce_loss", l.ce}, {"lb_loss", l.lb}, {"z_loss", l.z}};
            for (auto& [name, value] : terms)
                if (const SafeTensor* t = r.find(name)) verify_tensor(v, name, {(float)value}, floats_of(*t));
            verify_gradients(v);
        }
        if (s + 1 < steps) olmoe_update(m, s + 1, olmoe_grad_norm(m), o);
    }
    if (all) verify_tensor(v, "losses", losses, floats_of(*all));
}

int command_verify(int argc, char** argv) {
    Verify v;
    std::string dir, path;
    options_parse(argc, argv, "verify --model DIR --reference FILE.safetensors [options]", with_launch_checks({
        {"model", &dir, "DIR", "Hugging Face directory"},
        {"reference", &path, "FILE", "safetensors: inputs, targets and what is to be compared"},
        {"rtol", &v.asked, "X",
         "relative L2 tolerance of a tensor; -1: as the file says (README.md), else 1e-4 in FP32, 3e-2 in BF16",
         -1, 1e3},
    }));
    if (dir.empty() || path.empty()) die("verify needs --model DIR and --reference FILE");
    const Reference& r = v.reference;
    config_read(&v.config, dir);
    reference_open(&v.reference, path, v.config);
    verify_tolerances(&v);

    const Use use = r.find("losses") ? Use::training : r.backward ? Use::gradients : Use::inference;
    device_open();
    Capacity capacity = capacity_of_rows(v.config, r.B, r.T, use);
    capacity.T = *std::max_element(r.lengths.begin(), r.lengths.end());
    capacity.classified = capacity.N;       // all logits are compared
    olmoe_allocate(&v.model, v.config, capacity);
    olmoe_load(&v.model, dir);
    printf("%-58s %9s  %8s\n", "tensor", "error", "of limit");
    olmoe_set_batch(&v.model, reference_batch(r));
    olmoe_forward(&v.model);
    olmoe_classify(&v.model, 0, v.model.N);
    verify_logits(&v);
    verify_routers(&v);
    verify_losses(&v);

    if ((size_t)v.compared != r.to_compare)
        die("%s: %zu tensors are to be compared, %d were; is a router's layer written with zeros?", path.c_str(),
            r.to_compare, v.compared);
    printf("%d tensors compared, %zu in the reference, %zu parameters in the model: %s\n", v.compared, r.to_compare,
           r.tensors.size(), v.failed ? "they DIFFER" : "they agree");
    olmoe_free(&v.model);
    device_close();
    safetensors_close(&v.reference.file);
    return v.failed > 0;
}
