// Weights and AdamW's state: from the files of checkpoint.h into a model, and back.
//
// Included once, by olmoe.cu, after its structs.
#pragma once
#include <thread>
#include "checkpoint.h"

// Groups of the table of tensors that are not trained
void freeze(OlmoeConfig* c, const std::vector<std::string>& groups) {
    std::set<std::string> known;
    for (const TensorRow& row : tensor_table(*c)) known.insert(row.group);
    std::string list;
    for (const std::string& group : known) list += (list.empty() ? "" : ", ") + group;
    for (const std::string& group : std::set<std::string>(groups.begin(), groups.end())) {
        if (!known.count(group)) die("--freeze %s: the groups are %s", group.c_str(), list.c_str());
        c->frozen.push_back(group);
    }
    if (c->frozen.size() == known.size()) die("--freeze leaves nothing to train");
}

// For micro-batches of B rows of T tokens
Capacity capacity_of_rows(const OlmoeConfig& c, int64_t B, int64_t T, Use use, int recompute = 0) {
    if (B * T * c.K > INT32_MAX / 2)
        die("--batch %ld x --seq %ld is too large for one micro-batch; use a smaller --batch", B, T);
    return {(int)(B * T), (int)T, use, recompute, 0, 0};
}

constexpr const char *MASTERS_CHOICE = "fp32|remainder|none", *MOMENTS_CHOICE = "fp32|bf16";

// How olmoe_plan and olmoe_allocate will keep AdamW's state; call it before them. Refuses what needs a BF16 build.
void choose_state(Olmoe* m, const std::string& masters, const std::string& moments) {
    if (!BF16 && masters != "fp32")
        die("--master-weights %s needs a BF16 build (make PRECISION=BF16): here the weights are fp32", masters.c_str());
    if (BF16 && masters == "none") m->masters = Masters::none;
    if (BF16 && masters == "remainder") m->masters = Masters::remainder;
    m->narrow_moments = moments == "bf16";
}

// All of them in the flat order, which they tile: in memory the tensors of one row of the table, of all experts, are
// contiguous.
std::vector<HfTensor> hf_tensors(const OlmoeConfig& c) {
    std::vector<HfTensor> files;
    for (const Tensor& t : model_tensors(c)) {
        const std::string prefix = t.layer >= 0 && t.layer < c.L ? "model.layers." + std::to_string(t.layer) + "." : "";
        size_t parts = t.names.size() * (t.expert() ? c.E : 1);
        for (size_t i = 0; i < parts; i++) {
            std::string name = t.names[i % t.names.size()];
            if (t.expert()) name.replace(name.find('#'), 1, std::to_string(i / t.names.size()));
            files.push_back({prefix + name + ".weight", t.shape, t.base + i * (t.whole / parts), t.whole / parts,
                             t.frozen});
        }
    }
    return files;
}

const Tensor& tensor_at(const std::vector<Tensor>& tensors, size_t offset) {
    auto before = [](size_t o, const Tensor& t) { return o < t.base; };
    return std::upper_bound(tensors.begin(), tensors.end(), offset, before)[-1];
}

// The element at a flat position, in parameters or gradients; null where another rank has it
floatX* element_at(const std::vector<Tensor>& tensors, const Parameters& p, size_t offset) {
    const Tensor& t = tensor_at(tensors, offset);
    return offset >= t.offset && offset < t.offset + t.count ? t.in(p) + (offset - t.offset) : nullptr;
}

// Who saves the element at a flat position, and where its run of elements ends
std::pair<int, size_t> owner_of(const std::vector<Tensor>& tensors, size_t offset) {
    const Tensor& t = tensor_at(tensors, offset);
    size_t part = (offset - t.base) / t.count, at = (offset - t.base) % t.count, r = at / t.share;
    return {t.expert() ? (int)(r * expert_group.size + part) : (int)r, offset - at + t.end((int)r)};
}

// Of the flat elements [offset, offset + count), which are in one tensor, those that this rank updates: body(first of
// them, where their state is, how many)
template <typename Body>
void for_updated(const std::vector<Tensor>& tensors, size_t offset, size_t count, Body body) {
    const Tensor& t = tensor_at(tensors, offset);
    size_t mine = t.offset + t.update_begin();
    size_t begin = std::max(offset, mine), end = std::min(offset + count, mine + t.update_count());
    if (begin < end) body(begin, t.state + begin - mine, end - begin);
}

// n elements of AdamW's state from element `at` on, whose weights are p, as fp32 on the host: to it, and back
void state_to_host(const Olmoe& m, State which, size_t at, const floatX* p, float* to, size_t n) {
    with_state(m, at, [&](auto* master, auto* moment1, auto* moment2) {
        std::vector<std::decay_t<decltype(*moment1)>> moments(which == State::master ? 0 : n);
        std::vector<std::decay_t<decltype(*master)>> masters(n - moments.size());
        std::vector<floatX> weights(masters.size());
        copy_to_host_sync(moments.data(), which == State::m ? moment1 : moment2, moments.size());
        copy_to_host_sync(masters.data(), master, masters.size());
        copy_to_host_sync(weights.data(), p, weights.size());
        for (size_t i = 0; i < moments.size(); i++) to[i] = (float)moments[i];
        for (size_t i = 0; i < masters.size(); i++) to[i] = master_of(&masters[i], &weights[i]);
    });
}

// A master also sets the weight.
void state_to_device(Olmoe* m, State which, size_t at, floatX* p, const float* from, size_t n) {
    with_state(*m, at, [&](auto* master, auto* moment1, auto* moment2) {
        std::vector<std::decay_t<decltype(*moment1)>> moments(which == State::master ? 0 : n);
        std::vector<std::decay_t<decltype(*master)>> masters(n - moments.size());
        std::vector<floatX> weights(masters.size());
        for (size_t i = 0; i < moments.size(); i++) store(&moments[i], from[i], HALF_AWAY);
        for (size_t i = 0; i < masters.size(); i++) {
            store(&masters[i], from[i], 0);
            store(&weights[i], from[i], HALF_AWAY);
        }
        copy_to_device_sync(which == State::m ? moment1 : moment2, moments.data(), moments.size());
        copy_to_device_sync(master, masters.data(), masters.size());
        copy_to_device_sync(p, weights.data(), weights.size());
    });
}

// body(first, count) for parts of [0, n), a thread of the host each
template <typename Body> void on_threads(size_t n, Body body) {
    size_t parts = std::max<size_t>(1, std::min<size_t>(std::thread::hardware_concurrency(), n >> 18));
    std::vector<std::thread> threads;
    for (size_t i = 1; i < parts; i++) threads.emplace_back(body, n * i / parts, n * (i + 1) / parts - n * i / parts);
    body(0, n / parts);
    for (std::thread& t : threads) t.join();
}

// How far rank 0 is, on the terminal; nothing where standard error is none.
struct Progress {
    const char* what;
    double bytes, done = 0, begin = seconds_now(), shown = 0;
    bool on = ranks.rank == 0 && isatty(2);

    Progress(const char* what_, double bytes_) : what(what_), bytes(bytes_) {}
    void add(double n) {
        double now = seconds_now();
        done += n;
        if (!on || now - shown < 0.2) return;
        fprintf(stderr, "\r%s: %.0f %% of %.2f GB, %.2f GB/s ", what, 100 * done / bytes, bytes / 1e9,
                done / 1e9 / (now - begin));
        shown = now;
    }
    ~Progress() {
        double seconds = seconds_now() - begin, gb = done / 1e9;
        if (shown > 0) fprintf(stderr, "\r%s: %.2f GB in %.1f s, %.2f GB/s\n", what, gb, seconds, gb / seconds);
    }
};

// Elements [begin, begin + n) of a file's tensor into the model, at flat position `offset`. What the file holds as
// floatX goes from its pages straight into place; the rest, and the master, is converted by way of floats.
void load_part(Olmoe* m, const SafeTensor& t, size_t begin, size_t n, size_t offset, std::vector<float>* floats,
               std::vector<floatX>* narrow) {
    const bool same = t.dtype == (BF16 ? "BF16" : "F32"), masters = m->master_weights;
    floatX* to = element_at(m->tensors, m->params, offset);
    if (same) copy_to_device_sync(to, (const floatX*)t.data + begin, n);     // at any alignment
    if (same && !masters) return;
    floats->resize(n);
    narrow->resize(same ? 0 : n);
    on_threads(n, [&](size_t first, size_t count) {
        tensor_to_float(floats->data() + first, t, begin + first, count);
        for (size_t j = first; j < first + count && !same; j++)
            if (masters) store(&(*narrow)[j], (*floats)[j], HALF_AWAY);
            else (*narrow)[j] = (floatX)(*floats)[j];
    });
    if (!same) copy_to_device_sync(to, narrow->data(), narrow->size());
    if (masters)
        for_updated(m->tensors, offset, n, [&](size_t first, size_t state, size_t count) {
            floatX* p = element_at(m->tensors, m->params, first);
            state_to_device(m, State::master, state, p, floats->data() + (first - offset), count);
        });
}

constexpr size_t COPY_CHUNK = 1 << 22;      // elements copied or converted at a time

// Weights from a Hugging Face directory, in the order of the file, of the experts those of this rank
void olmoe_load(Olmoe* m, const std::string& dir) {
    ModelWeights weights;
    weights_open(&weights, dir, m->config);
    const std::vector<HfTensor> tensors = hf_tensors(m->config);
    std::vector<size_t> order;
    double bytes = 0;
    for (size_t i = 0; i < tensors.size(); i++)
        if (element_at(m->tensors, m->params, tensors[i].offset)) {
            order.push_back(i);
            bytes += (double)weights_tensor(weights, i).bytes;
        }
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return weights_tensor(weights, a).data < weights_tensor(weights, b).data;
    });

    Progress progress("loading", bytes);
    std::vector<float> floats;
    std::vector<floatX> narrow;
    for (size_t i : order) {
        const SafeTensor& t = weights_tensor(weights, i);
        for (size_t begin = 0; begin < tensors[i].count; begin += COPY_CHUNK) {
            size_t n = std::min(COPY_CHUNK, tensors[i].count - begin);
            ranks_alive();
            load_part(m, t, begin, n, tensors[i].offset + begin, &floats, &narrow);
            tensor_read(t, begin, n);
            progress.add((double)(n * dtype_bytes(t.dtype)));
        }
    }
    cudaCheck(cudaStreamSynchronize(main_stream.stream));
    weights_close(&weights);
}

// n elements of a state at a flat position, as checkpoint_save asks for them: weights in floatX, the others as float
void state_read(const Olmoe& m, State which, size_t offset, size_t n, void* to) {
    ranks_alive();
    if (which == State::weights) {
        copy_to_host_sync((floatX*)to, element_at(m.tensors, m.params, offset), n);
        return;
    }
    for_updated(m.tensors, offset, n, [&](size_t first, size_t at, size_t count) {
        state_to_host(m, which, at, element_at(m.tensors, m.params, first), (float*)to, count);
    });
}

// AdamW's state from a checkpoint, of this rank's share
void olmoe_load_state(Olmoe* m, const std::string& dir) {
    auto wanted = [&](size_t offset, size_t n) {
        bool any = false;
        ranks_alive();
        for_updated(m->tensors, offset, n, [&](size_t, size_t, size_t) { any = true; });
        return any;
    };
    auto put = [&](State which, size_t offset, size_t n, const float* from) {
        for_updated(m->tensors, offset, n, [&](size_t first, size_t at, size_t count) {
            state_to_device(m, which, at, element_at(m->tensors, m->params, first), from + (first - offset), count);
        });
    };
    checkpoint_optimizer_read(dir, m->config, m->masters != Masters::none, put, wanted);
}
