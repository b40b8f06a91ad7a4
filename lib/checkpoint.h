// checkpoint.h: Hugging Face OLMoE directories in and out, and the training state beside the weights.
//
// A checkpoint is a directory that transformers, vLLM and llama.cpp's converter open as it is:
//   config.json, generation_config.json   the shape, the special tokens
//   model.safetensors                     the weights, F32 or BF16, a tensor per expert and matrix as on the hub; or, where one
//                                         file would pass max_shard_bytes, model-00001-of-00003.safetensors and so on
//   model.safetensors.index.json          which file holds which tensor; written for one file as well, because vLLM without an
//                                         index reads every .safetensors file, the optimizer's too
//   tokenizer.json                        a copy, where there is one
// with what training needs to go on:
//   optimizer.safetensors                 F32: m.<name>, v.<name>, and master.<name> where BF16 weights have masters
//   trainer_state.json                    {"step", "trainer": the caller's, "files": {name: {"bytes", "crc32"}}, "crc32": of the rest}
// Its bytes follow from the arguments of checkpoint_save alone, never from a path, the time, the host, or how many ranks wrote it.
//
// It is written as OUT/.step-00000020.tmp, synced to the disk, and renamed to OUT/step-00000020. So a name that begins with
// "step-" is complete, whenever a process was killed; what a killed one left behind begins with a dot and goes with the next save.
// All ranks save together, into one directory on a file system that they share, and any rank may read what it needs. But what
// renames, deletes, or reads every byte of a directory is for rank 0 alone: checkpoint_leftovers, _newest, _check and _prune.
//
// Included once, by olmoe.cu, after die() and OlmoeConfig. Host code only. Every error is one line from die().
#pragma once
#include <algorithm>
#include <cerrno>
#include <cfloat>
#include <charconv>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <type_traits>
#include <vector>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <nlohmann/json.hpp>
#include <zlib.h>

using Json = nlohmann::ordered_json;

// ------------------------------------------------------------------------------------------------
// Small files

// The whole file. False, with errno set, when it can't be read.
inline bool file_contents(std::string* text, const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    std::vector<char> buffer(1 << 16);
    ssize_t n;
    while ((n = read(fd, buffer.data(), buffer.size())) > 0) text->append(buffer.data(), (size_t)n);
    int error = errno;
    close(fd);
    errno = error;
    return n == 0;
}

// Discarded where the text is no JSON. Values nested deeper than anything here are dropped: dump() would recurse into them.
inline Json json_parse(const std::string& text) {
    return Json::parse(text, [](int depth, Json::parse_event_t, Json&) { return depth < 100; }, false);
}

inline Json json_read(const std::string& path) {
    std::string text;
    if (!file_contents(&text, path)) die("cannot read %s: %s", path.c_str(), strerror(errno));
    Json j = json_parse(text);
    if (!j.is_object()) die("%s: not a JSON object; the file is damaged, or another kind of file", path.c_str());
    return j;
}

// A value for an error message: JSON, so that it stays on one line, and not more of it than helps.
inline std::string json_shown(const Json& j) {
    std::string s = j.dump(-1, ' ', true, Json::error_handler_t::replace);
    return s.size() <= 80 ? s : s.substr(0, 77) + "...";
}

inline std::string json_text(const Json& j) { return j.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

// ------------------------------------------------------------------------------------------------
// config.json

// The double that prints as the float does: 1e-05 and not 9.999999747378752e-06.
inline double shortest_double(float f) {
    char text[32];
    *std::to_chars(text, text + sizeof text - 1, f).ptr = 0;
    return strtod(text, nullptr);
}

// Reads a config.json, or the one of a directory. Whatever the released OLMoE models don't use is refused by its name.
inline void config_read(OlmoeConfig* config, const std::string& path) {
    std::error_code ignored;
    const std::string file = std::filesystem::is_directory(path, ignored) ? path + "/config.json" : path;
    const char* at = file.c_str();
    const Json j = json_read(file);
    auto present = [&](const char* name) { return j.contains(name) && !j[name].is_null(); };

    auto integer = [&](const char* name, int low, int high) {
        if (!present(name)) die("%s: %s is missing", at, name);
        const Json& v = j[name];
        bool ok = v.is_number_integer() && v.get<int64_t>() >= low && v.get<int64_t>() <= high;
        if (!ok) die("%s: %s is %s, but must be an integer from %d to %d", at, name, json_shown(v).c_str(), low, high);
        return v.get<int>();
    };
    auto positive = [&](const Json& in, const char* name, float absent) {
        if (!in.contains(name) || in[name].is_null()) return absent;
        double v = in[name].is_number() ? in[name].get<double>() : 0;
        if (!(v >= FLT_MIN && v <= FLT_MAX)) die("%s: %s is %s, but must be a number above 0", at, name, json_shown(in[name]).c_str());
        return (float)v;
    };
    auto token = [&](const char* name, int absent) {   // null: there is none
        return !j.contains(name) ? absent : j[name].is_null() ? -1 : integer(name, 0, INT_MAX);
    };
    auto only = [&](const char* name, const Json& value) {
        if (present(name) && j[name] != value)
            die("%s: %s %s is not supported, only %s", at, name, json_shown(j[name]).c_str(), value.dump().c_str());
    };

    if (!present("model_type")) die("%s: model_type is missing; an OLMoE config says \"olmoe\"", at);
    only("model_type", "olmoe");
    OlmoeConfig c;
    c.L = integer("num_hidden_layers", 1, 1024);
    c.C = integer("hidden_size", 2, 1 << 20);
    c.H = integer("num_attention_heads", 1, 1 << 16);
    c.V = integer("vocab_size", 1, 1 << 26);
    c.E = integer("num_experts", 1, 4096);
    c.K = integer("num_experts_per_tok", 1, 4096);
    c.F = integer("intermediate_size", 1, 1 << 20);
    if (present("max_position_embeddings")) c.max_T = integer("max_position_embeddings", 1, 1 << 30);
    if (c.C % c.H != 0) die("%s: hidden_size %d is not a multiple of num_attention_heads %d", at, c.C, c.H);
    if (c.C / c.H % 2 != 0) die("%s: hidden_size / num_attention_heads is %d, but must be even: RoPE turns pairs", at, c.C / c.H);
    if (c.K > c.E) die("%s: num_experts_per_tok %d is more than num_experts %d", at, c.K, c.E);
    double elements = 2.0 * c.V * c.C + (double)c.L * (4.0 * c.C * c.C + (double)c.E * c.C + 3.0 * c.E * c.F * c.C);
    if (!(elements < 0x1p43)) die("%s: the shape has %.3g parameters, more than any machine holds; is a size mistyped?", at, elements);

    c.rms_norm_eps = positive(j, "rms_norm_eps", c.rms_norm_eps);
    c.initializer_range = positive(j, "initializer_range", c.initializer_range);
    c.eos_token_id = token("eos_token_id", c.eos_token_id);
    c.pad_token_id = token("pad_token_id", c.pad_token_id);
    if (present("norm_topk_prob")) {
        const Json& v = j["norm_topk_prob"];
        if (!v.is_boolean()) die("%s: norm_topk_prob is %s, but must be true or false", at, json_shown(v).c_str());
        c.norm_topk_prob = v.get<bool>();
    }

    c.rope_theta = positive(j, "rope_theta", c.rope_theta);
    if (present("rope_parameters")) {   // transformers 5 keeps theta here, earlier ones as rope_theta
        const Json& rope = j["rope_parameters"];
        if (!rope.is_object()) die("%s: rope_parameters is %s, but must be an object", at, json_shown(rope).c_str());
        for (auto& [key, value] : rope.items()) {
            bool type = key == "rope_type" || key == "type", one = key == "partial_rotary_factor";
            if (key != "rope_theta" && !(type && value == "default") && !(one && value == 1))
                die("%s: rope_parameters.%s %s is not supported, only rope_theta and rope_type \"default\"", at, key.c_str(), json_shown(value).c_str());
        }
        float theta = positive(rope, "rope_theta", c.rope_theta);
        if (present("rope_theta") && theta != c.rope_theta)
            die("%s: rope_theta is %g, but rope_parameters.rope_theta is %g; which one?", at, c.rope_theta, theta);
        c.rope_theta = theta;
    }

    const std::vector<std::pair<const char*, Json>> supported = {
        {"hidden_act", "silu"}, {"clip_qkv", nullptr}, {"num_key_value_heads", c.H}, {"head_dim", c.C / c.H}, {"tie_word_embeddings", false},
        {"attention_bias", false}, {"attention_dropout", 0.0}, {"rope_scaling", nullptr}, {"quantization_config", nullptr}};
    for (auto& [name, value] : supported) only(name, value);
    for (const char* name : {"dtype", "torch_dtype"})   // one field under its new and its old name; tensors name their own dtype
        if (present(name) && j[name] != "float32" && j[name] != "bfloat16" && j[name] != "float16")
            die("%s: %s %s is not supported, only \"float32\", \"bfloat16\" and \"float16\"", at, name, json_shown(j[name]).c_str());
    if (present("dtype") && present("torch_dtype") && j["dtype"] != j["torch_dtype"])
        die("%s: dtype is %s, but torch_dtype, its old name, is %s; which one?", at, j["dtype"].dump().c_str(), j["torch_dtype"].dump().c_str());
    *config = c;
}

// The config.json that transformers 4 and 5 read alike: keys sorted as they sort them, theta and dtype under names both know.
inline Json config_json(const OlmoeConfig& c, bool bf16) {
    auto token = [](int id) { return id < 0 ? Json(nullptr) : Json(id); };
    return Json{
        {"architectures", Json::array({"OlmoeForCausalLM"})}, {"attention_bias", false}, {"attention_dropout", 0.0},
        {"bos_token_id", nullptr}, {"clip_qkv", nullptr}, {"eos_token_id", token(c.eos_token_id)}, {"hidden_act", "silu"},
        {"hidden_size", c.C}, {"initializer_range", shortest_double(c.initializer_range)}, {"intermediate_size", c.F},
        {"max_position_embeddings", c.max_T}, {"model_type", "olmoe"}, {"norm_topk_prob", c.norm_topk_prob},
        {"num_attention_heads", c.H}, {"num_experts", c.E}, {"num_experts_per_tok", c.K}, {"num_hidden_layers", c.L},
        {"num_key_value_heads", c.H}, {"output_router_logits", false}, {"pad_token_id", token(c.pad_token_id)},
        {"rms_norm_eps", shortest_double(c.rms_norm_eps)},
        {"rope_parameters", {{"rope_theta", shortest_double(c.rope_theta)}, {"rope_type", "default"}}},
        {"rope_theta", shortest_double(c.rope_theta)}, {"router_aux_loss_coef", 0.01}, {"tie_word_embeddings", false},
        {"torch_dtype", bf16 ? "bfloat16" : "float32"}, {"use_cache", true}, {"vocab_size", c.V}};
}

// ------------------------------------------------------------------------------------------------
// The tensors of the model, in the order of the flat parameter vector

struct HfTensor {
    std::string name;               // Hugging Face's
    std::vector<int64_t> shape;     // row-major; a linear layer's is (out, in)
    size_t offset, count;           // elements [offset, offset + count) of the flat vector
};

// They tile [0, number of parameters). q, k, v follow one another, and so do an expert's gate and up, so that the fused
// qkv (3C, C), gate_up (E, 2F, C) and down (E, C, F) of olmoe.cu are contiguous ranges too.
inline std::vector<HfTensor> hf_tensors(const OlmoeConfig& c) {
    std::vector<HfTensor> tensors;
    size_t offset = 0;
    auto add = [&](const std::string& name, std::vector<int64_t> shape) {
        size_t count = 1;
        for (int64_t n : shape) count *= (size_t)n;
        tensors.push_back({name + ".weight", std::move(shape), offset, count});
        offset += count;
    };
    add("model.embed_tokens", {c.V, c.C});
    for (int l = 0; l < c.L; l++) {
        std::string layer = "model.layers." + std::to_string(l) + ".", experts = layer + "mlp.experts.";
        add(layer + "input_layernorm", {c.C});
        for (const char* name : {"q_proj", "k_proj", "v_proj"}) add(layer + "self_attn." + name, {c.C, c.C});
        add(layer + "self_attn.q_norm", {c.C});
        add(layer + "self_attn.k_norm", {c.C});
        add(layer + "self_attn.o_proj", {c.C, c.C});
        add(layer + "post_attention_layernorm", {c.C});
        add(layer + "mlp.gate", {c.E, c.C});
        for (int e = 0; e < c.E; e++)
            for (const char* name : {".gate_proj", ".up_proj"}) add(experts + std::to_string(e) + name, {c.F, c.C});
        for (int e = 0; e < c.E; e++) add(experts + std::to_string(e) + ".down_proj", {c.C, c.F});
    }
    add("model.norm", {c.C});
    add("lm_head", {c.V, c.C});
    return tensors;
}

// ------------------------------------------------------------------------------------------------
// Reading safetensors:   u64 length of the header | header, JSON: {name: {dtype, shape, data_offsets}} | data, without holes

struct SafeTensor {
    std::string name, dtype;        // dtype as the format spells it: F32, BF16, F16, I32, I64, U8, ...
    std::vector<int64_t> shape;
    const unsigned char* data;      // bytes, in the mapped file; may lie at any alignment
    size_t bytes;
};

struct Safetensors {
    std::string path;
    std::vector<SafeTensor> tensors;              // in the order of their data
    std::map<std::string, std::string> metadata;
    std::map<std::string, size_t> index;          // name -> position in tensors
    void* map = nullptr;
    size_t map_bytes = 0;
    const SafeTensor* find(const std::string& name) const {
        auto it = index.find(name);
        return it == index.end() ? nullptr : &tensors[it->second];
    }
};

// Bytes an element; 0: no such dtype.
inline size_t dtype_bytes(const std::string& dtype) {
    static const std::map<std::string, size_t> sizes = {
        {"F64", 8}, {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4}, {"F16", 2}, {"BF16", 2}, {"I16", 2}, {"U16", 2},
        {"I8", 1}, {"U8", 1}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    auto it = sizes.find(dtype);
    return it == sizes.end() ? 0 : it->second;
}

// Maps the file and checks all that its header claims; nothing of the data is read yet.
inline void safetensors_open(Safetensors* f, const std::string& path) {
    *f = Safetensors();
    f->path = path;
    const char* at = path.c_str();
    int fd = open(at, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0) die("cannot read %s: %s", at, strerror(errno));
    if (!S_ISREG(info.st_mode)) die("%s: not a file", at);
    size_t size = (size_t)info.st_size;
    if (size < 8) die("%s: %zu bytes, too short for a safetensors file; it is truncated", at, size);
    f->map = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (f->map == MAP_FAILED) die("cannot map %s: %s", at, strerror(errno));
    f->map_bytes = size;
    close(fd);

    const unsigned char* bytes = (const unsigned char*)f->map;
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | bytes[i];
    if (header > 100000000 || header > size - 8)
        die("%s: its header claims %llu bytes of a file of %zu; it is truncated, or not a safetensors file", at, (unsigned long long)header, size);
    const unsigned char* data = bytes + 8 + header;
    size_t data_bytes = size - 8 - header;

    // The parser keeps one of two equal keys, so they are counted as they come by. Not Json: its objects search linearly.
    std::set<std::string> names;
    std::string twice;
    auto see = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& key) {
        if (depth == 1 && event == nlohmann::json::parse_event_t::key && !names.insert(key.get<std::string>()).second) twice = json_shown(key);
        return depth < 100;                               // as in json_parse
    };
    nlohmann::json j = nlohmann::json::parse(bytes + 8, data, see, false);
    if (!j.is_object()) die("%s: its header is not a JSON object; it is damaged, or not a safetensors file", at);
    if (!twice.empty()) die("%s: its header names tensor %s twice", at, twice.c_str());

    std::vector<std::pair<size_t, SafeTensor>> order;   // offset of the data, tensor
    for (const auto& item : j.items()) {
        const nlohmann::json& t = item.value();
        const std::string shown = json_shown(item.key());
        if (item.key() == "__metadata__") {
            bool ok = t.is_object();
            if (ok) for (const auto& text : t) ok = ok && text.is_string();
            if (!ok) die("%s: __metadata__ is not an object of strings", at);
            f->metadata = t.get<std::map<std::string, std::string>>();
            continue;
        }
        auto list = [&](const char* key) {              // an array of integers, none negative
            bool ok = t.is_object() && t.contains(key) && t[key].is_array();
            if (ok) for (const auto& n : t[key]) ok = ok && n.is_number_unsigned() && n.get<uint64_t>() <= INT64_MAX;
            if (!ok) die("%s: tensor %s: %s is missing, or not a list of sizes", at, shown.c_str(), key);
            return t[key].get<std::vector<int64_t>>();
        };
        SafeTensor s{item.key(), "", list("shape"), nullptr, 0};
        std::vector<int64_t> range = list("data_offsets");
        if (!t.contains("dtype") || !t["dtype"].is_string() || !dtype_bytes(t["dtype"]))
            die("%s: tensor %s: unknown dtype %s", at, shown.c_str(), json_shown(t.value("dtype", nlohmann::json())).c_str());
        s.dtype = t["dtype"];
        s.bytes = dtype_bytes(s.dtype);
        bool fits = true;
        for (int64_t n : s.shape) fits = fits && !__builtin_mul_overflow(s.bytes, (size_t)n, &s.bytes);
        if (range.size() != 2 || range[1] < range[0] || (size_t)range[1] > data_bytes)
            die("%s: tensor %s: data_offsets %s with %zu bytes of data; the file is truncated or damaged", at, shown.c_str(), json_shown(t["data_offsets"]).c_str(), data_bytes);
        if (!fits || s.bytes != (size_t)(range[1] - range[0]))
            die("%s: tensor %s: %s of shape %s does not take %lld bytes", at, shown.c_str(), s.dtype.c_str(), json_shown(t["shape"]).c_str(), (long long)(range[1] - range[0]));
        s.data = data + range[0];
        order.push_back({(size_t)range[0], std::move(s)});
    }
    // By offset, an empty tensor before the one that begins where it lies.
    std::sort(order.begin(), order.end(), [](auto& a, auto& b) { return a.first != b.first ? a.first < b.first : a.second.bytes < b.second.bytes; });
    size_t end = 0;
    for (auto& [offset, tensor] : order) {
        if (offset != end) die("%s: tensor %s %s the tensor before it", at, json_shown(tensor.name).c_str(), offset < end ? "overlaps" : "leaves a hole after");
        end += tensor.bytes;
        f->index[tensor.name] = f->tensors.size();
        f->tensors.push_back(std::move(tensor));
    }
    if (end != data_bytes) die("%s: %zu bytes of data, but its tensors take %zu; it is damaged", at, data_bytes, end);
}

inline void safetensors_close(Safetensors* f) {
    if (f->map) munmap(f->map, f->map_bytes);
    *f = Safetensors();
}

// IEEE half to float, exact: 1 sign bit, 5 of exponent (bias 15; float's is 127), 10 of fraction.
inline float float_from_half(uint16_t half) {
    uint32_t exponent = half >> 10 & 31, fraction = half & 1023, bits;
    if (exponent == 0) {                              // zero and subnormals: fraction 2^-24, always a normal float
        float f = (float)fraction * 0x1p-24f;
        memcpy(&bits, &f, 4);
    } else {
        bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    }
    bits |= (uint32_t)(half & 0x8000) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// dst[0..count) = elements [begin, begin + count) of t, which is F32, BF16 or F16.
inline void tensor_to_float(float* dst, const SafeTensor& t, size_t begin, size_t count) {
    size_t width = dtype_bytes(t.dtype);
    if (begin + count > t.bytes / width) die("tensor %s: elements [%zu, %zu) asked for, it has %zu", json_shown(t.name).c_str(), begin, begin + count, t.bytes / width);
    const unsigned char* src = t.data + begin * width;
    if (t.dtype == "F32") {
        if (count) memcpy(dst, src, count * 4);
    } else if (t.dtype == "BF16") {                   // the upper half of a float
        for (size_t i = 0; i < count; i++) {
            uint16_t x;
            memcpy(&x, src + 2 * i, 2);
            uint32_t bits = (uint32_t)x << 16;
            memcpy(dst + i, &bits, 4);
        }
    } else if (t.dtype == "F16") {
        for (size_t i = 0; i < count; i++) {
            uint16_t x;
            memcpy(&x, src + 2 * i, 2);
            dst[i] = float_from_half(x);
        }
    } else {
        die("tensor %s: dtype %s is not supported here, only F32, BF16 and F16", json_shown(t.name).c_str(), t.dtype.c_str());
    }
}

// Elements [begin, begin + count) have been read: their pages of the file leave this process, whose memory they would count as; the
// system keeps them cached as long as it has room.
inline void tensor_read(const SafeTensor& t, size_t begin, size_t count) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), width = dtype_bytes(t.dtype);
    const uintptr_t first = (uintptr_t)(t.data + begin * width) / page * page, last = (uintptr_t)(t.data + (begin + count) * width);
    madvise((void*)first, last - first, MADV_DONTNEED);     // of pages that others still read no harm: they come back
}

struct TensorInfo { std::string name, dtype; std::vector<int64_t> shape; };

// Finds every expected tensor, in that order; dtype "" stands for F32, BF16 or F16. Dies when one is missing, of another shape or
// dtype, or when the files hold any other.
inline std::vector<const SafeTensor*> tensors_expect(const std::vector<Safetensors>& files, const std::vector<TensorInfo>& expected) {
    std::vector<const SafeTensor*> found;
    std::set<std::string> names;
    for (const TensorInfo& want : expected) {
        const SafeTensor* t = nullptr;
        const Safetensors* f = files.data();
        for (; f < files.data() + files.size() && !(t = f->find(want.name)); f++) {}
        if (!t) die("%s: tensor %s is missing", files.size() == 1 ? files[0].path.c_str() : "the model's shards", want.name.c_str());
        if (t->shape != want.shape)
            die("%s: tensor %s has shape %s, but config.json makes it %s", f->path.c_str(), t->name.c_str(), Json(t->shape).dump().c_str(), Json(want.shape).dump().c_str());
        if (want.dtype.empty() ? t->dtype != "F32" && t->dtype != "BF16" && t->dtype != "F16" : t->dtype != want.dtype)
            die("%s: tensor %s is %s; only %s is supported", f->path.c_str(), t->name.c_str(), t->dtype.c_str(), want.dtype.empty() ? "F32, BF16 or F16" : want.dtype.c_str());
        found.push_back(t);
        names.insert(t->name);
    }
    for (const Safetensors& f : files)
        for (const SafeTensor& t : f.tensors)
            if (!names.count(t.name)) die("%s: unexpected tensor %s; the model of config.json has none of this name", f.path.c_str(), json_shown(t.name).c_str());
    return found;
}

// ------------------------------------------------------------------------------------------------
// The weights of a model directory, ours or the hub's

struct ModelWeights {
    std::vector<Safetensors> files;
    std::vector<const SafeTensor*> tensors;       // as hf_tensors orders them; into files, so a ModelWeights is not copied
};

// model.safetensors where there is one, else the shards of the index. Exactly the tensors of the config, in F32, BF16 or F16.
inline void weights_open(ModelWeights* w, const std::string& dir, const OlmoeConfig& c) {
    const std::string single = dir + "/model.safetensors", index = dir + "/model.safetensors.index.json";
    std::map<std::string, std::string> map;       // tensor -> shard, from the index
    std::set<std::string> shards;
    if (access(single.c_str(), F_OK) == 0) {
        shards.insert("model.safetensors");
    } else {
        if (access(index.c_str(), F_OK) != 0) die("%s: neither model.safetensors nor model.safetensors.index.json; is it a model's directory?", dir.c_str());
        const Json j = json_read(index);
        if (!j.contains("weight_map") || !j["weight_map"].is_object()) die("%s: weight_map is missing", index.c_str());
        for (auto& [name, shard] : j["weight_map"].items()) {
            if (!shard.is_string() || shard.get<std::string>().find('/') != std::string::npos)
                die("%s: tensor %s: %s is not the name of a file beside it", index.c_str(), json_shown(name).c_str(), json_shown(shard).c_str());
            map[name] = shard.get<std::string>();
            shards.insert(map[name]);
        }
    }
    w->files.resize(shards.size());
    size_t n = 0;
    for (const std::string& shard : shards) {
        Safetensors& f = w->files[n++];
        safetensors_open(&f, dir + "/" + shard);
        madvise(f.map, f.map_bytes, MADV_SEQUENTIAL);       // where memory is short, the system gives up what was read, not what comes
        for (const SafeTensor& t : f.tensors)
            if (!map.empty() && (!map.count(t.name) || map[t.name] != shard)) die("%s: tensor %s is not in the index under this file", f.path.c_str(), json_shown(t.name).c_str());
    }
    std::vector<TensorInfo> expected;
    for (const HfTensor& h : hf_tensors(c)) expected.push_back({h.name, "", h.shape});
    w->tensors = tensors_expect(w->files, expected);
}

inline const SafeTensor& weights_tensor(const ModelWeights& w, size_t i) { return *w.tensors[i]; }   // i as in hf_tensors

inline void weights_close(ModelWeights* w) {
    for (Safetensors& f : w->files) safetensors_close(&f);
    *w = ModelWeights();
}

// ------------------------------------------------------------------------------------------------
// Writing

// A file in the directory `scratch`, which an error removes before it ends the program. On the disk when close() returns.
struct FileWriter {
    std::string path, scratch;
    int fd = -1;

    [[noreturn]] void fail() {
        const int error = errno;
        const bool gone = error == ENOENT || error == ESTALE;
        std::error_code ignored;
        std::filesystem::remove_all(scratch, ignored);
        if (gone) sleep(3);                               // for that rank to say so, which ends this one
        die("cannot write %s: %s; nothing of it was kept. %s", path.c_str(), strerror(error),
            gone ? "Another rank failed and says why, or the ranks do not share this file system" : "Make room, or write elsewhere");
    }
    void open(const std::string& scratch_, const std::string& name, int create = 0) {
        scratch = scratch_, path = scratch + "/" + name;
        fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | create, 0666);
        if (fd < 0) fail();
    }
    void write(const void* data, size_t bytes, size_t at) {
        for (size_t done = 0; done < bytes;) {
            ssize_t n = pwrite(fd, (const char*)data + done, std::min(bytes - done, (size_t)1 << 30), (off_t)(at + done));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) fail();
            done += (size_t)n;
        }
    }
    void close() {
        if (fsync(fd) != 0 || ::close(fd) != 0) fail();
        fd = -1;
    }
};

// What a safetensors file begins with: the length of the header and the header. The tensors' data follow in their order.
inline std::string safetensors_header(const std::vector<TensorInfo>& tensors) {
    std::string header = "{\"__metadata__\":{\"format\":\"pt\"}", length;    // transformers asks for this word
    size_t offset = 0;
    for (const TensorInfo& t : tensors) {
        size_t end = dtype_bytes(t.dtype);
        for (int64_t n : t.shape) end *= (size_t)n;
        end += offset;
        header += "," + Json(t.name).dump() + ":{\"dtype\":\"" + t.dtype + "\",\"shape\":" + Json(t.shape).dump() +
                  ",\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(end) + "]}";
        offset = end;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');      // so that the data is aligned
    for (int i = 0; i < 8; i++) length += (char)(header.size() >> 8 * i);
    return length + header;
}

// Makes the names in a directory as durable as the files. A filesystem that can't sync a directory says EINVAL.
inline void directory_sync(const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL)) die("cannot sync %s: %s", path.c_str(), strerror(errno));
    close(fd);
}

// ------------------------------------------------------------------------------------------------
// Checkpoints

enum class State { weights, m, v, master };

// Copies flat elements [offset, offset + count) of a state to dst: weights in the file's dtype (BF16 or F32), the others as float.
// The range never crosses a tensor of hf_tensors, nor a run of Savers::owner, and has at most checkpoint_chunk elements; ranges come
// in ascending order, all weights first, then m, v and master.
using ReadState = std::function<void(State, size_t offset, size_t count, void* dst)>;
constexpr size_t checkpoint_chunk = 1 << 20;

// The ranks that save together. One: the default.
struct Savers {
    int rank = 0, size = 1;
    // Flat element -> the rank that writes it, and the flat end of the run of elements that this rank writes from there. The same on each.
    std::function<std::pair<int, size_t>(size_t offset)> owner = [](size_t) { return std::make_pair(0, SIZE_MAX); };
    // Element-wise sum over the ranks, the same on each. It is also the barrier: nobody leaves before all have come.
    std::function<void(std::vector<double>*)> sum = [](std::vector<double>*) {};
};

struct StateInfo { State state; const char* prefix; };
inline std::vector<StateInfo> optimizer_states(bool masters) {
    std::vector<StateInfo> states = {{State::m, "m."}, {State::v, "v."}};
    if (masters) states.push_back({State::master, "master."});
    return states;
}

inline std::string crc_text(uint32_t crc) {
    char text[9];
    snprintf(text, sizeof text, "%08x", crc);
    return text;
}

// Steps of OUT's checkpoints, complete by their names, newest first.
inline std::vector<std::pair<int64_t, std::string>> checkpoint_list(const std::string& out_dir) {
    std::vector<std::pair<int64_t, std::string>> list;
    std::error_code ec;
    for (const auto& entry : std::filesystem::directory_iterator(out_dir, ec)) {
        const std::string name = entry.path().filename().string();
        if (name.compare(0, 5, "step-") != 0 || name.size() < 13 || name.size() > 23 || name.find_first_not_of("0123456789", 5) != std::string::npos) continue;
        if (entry.is_directory(ec)) list.push_back({std::stoll(name.substr(5)), out_dir + "/" + name});
    }
    std::sort(list.rbegin(), list.rend());
    return list;
}

// What a killed run left: .tmp half-written or just replaced, .trash half-deleted, .old an earlier checkpoint of a step that was
// being replaced. That one goes back to its place if its successor had not arrived; the others are of no use. Rank 0 alone.
inline void checkpoint_leftovers(const std::string& out_dir, bool remove) {
    std::error_code ec;
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(out_dir, ec)) names.push_back(entry.path().filename().string());
    for (const std::string& name : names) {
        const std::string path = out_dir + "/" + name, end = std::filesystem::path(name).extension().string();
        if (name.compare(0, 6, ".step-") != 0 || (end != ".tmp" && end != ".old" && end != ".trash")) continue;
        const std::string step = out_dir + "/" + name.substr(1, name.size() - 1 - end.size());
        if (end == ".old" && access(step.c_str(), F_OK) != 0) rename(path.c_str(), step.c_str());
        else if (remove) std::filesystem::remove_all(path, ec);
    }
}

// n numbers of fp32, or of bf16: none is a NaN or an infinity, whose exponents are all ones
inline bool all_finite(const char* numbers, size_t n, bool bf16) {
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        uint16_t upper;
        memcpy(&upper, numbers + (bf16 ? 2 * i : 4 * i + 2), 2);
        finite &= (upper & 0x7f80) != 0x7f80;
    }
    return finite;
}

// Saves OUT/step-<step>. The trainer's state may hold any JSON but numbers that aren't finite. Where the step exists (the run went
// back to an earlier one), the new directory takes its name in one exchange; on a filesystem without it, the earlier one first
// steps aside as .step-<step>.old, where checkpoint_newest and the next save find it if nothing came after.
//
// Every rank calls it with the same arguments, and returns when the checkpoint is complete. Rank 0 makes the files in their full
// size; each rank writes its pieces into them; rank 0 writes the manifest, when all ranks' pieces are on the disk, and renames. A
// rank that fails ends the program before it comes to the next sum, where the others wait until the job is ended.
inline void checkpoint_save(const std::string& out_dir, int64_t step, const OlmoeConfig& c, bool bf16, bool masters, const ReadState& read, const Json& trainer_state,
                            const std::string& tokenizer /* text of tokenizer.json, or empty */, const Savers& savers = {}, size_t max_shard_bytes = 5000000000) {
    char name[32];
    snprintf(name, sizeof name, "step-%08lld", (long long)step);
    const std::string final = out_dir + "/" + name, tmp = out_dir + "/." + name + ".tmp", old = out_dir + "/." + name + ".old";
    std::error_code ec;

    // The plan, the same on every rank. A file is a text, which rank 0 writes, and pieces, each its owner's.
    struct Piece { int rank; State state; size_t offset, count, at, bytes; };   // flat elements, bytes of the file
    struct File { std::string name, text; size_t bytes, first, last; };         // its pieces: [first, last)
    std::vector<Piece> pieces;
    std::vector<File> files;                              // as the manifest lists them
    const std::vector<HfTensor> tensors = hf_tensors(c);
    auto add_text = [&](const std::string& file, const std::string& text) { files.push_back({file, text, text.size(), pieces.size(), pieces.size()}); };
    auto add_tensors = [&](const std::string& file, const std::vector<StateInfo>& states, size_t first, size_t last, const char* dtype) {
        std::vector<TensorInfo> infos;
        for (const StateInfo& s : states)
            for (size_t i = first; i < last; i++) infos.push_back({s.prefix + tensors[i].name, dtype, tensors[i].shape});
        add_text(file, safetensors_header(infos));
        File& f = files.back();
        for (const StateInfo& s : states)
            for (size_t i = first; i < last; i++)
                for (size_t offset = tensors[i].offset, end = offset + tensors[i].count, n; offset < end; offset += n) {
                    auto [rank, run] = savers.owner(offset);
                    if (rank < 0 || rank >= savers.size || run <= offset) die("cannot save %s: nobody owns element %zu", final.c_str(), offset);
                    n = std::min({run, end, offset + checkpoint_chunk}) - offset;
                    pieces.push_back({rank, s.state, offset, n, f.bytes, n * dtype_bytes(dtype)});
                    f.bytes += pieces.back().bytes;
                }
        f.last = pieces.size();
    };

    add_text("config.json", json_text(config_json(c, bf16)));
    Json generation = {{"_from_model_config", true}};
    if (c.eos_token_id >= 0) generation["eos_token_id"] = c.eos_token_id;
    if (c.pad_token_id >= 0) generation["pad_token_id"] = c.pad_token_id;
    add_text("generation_config.json", json_text(generation));
    if (!tokenizer.empty()) add_text("tokenizer.json", tokenizer);
    const char* dtype = bf16 ? "BF16" : "F32";
    std::vector<size_t> first = {0};                      // first tensor of every shard, then the end
    size_t total = 0, shard_bytes = 0;
    for (size_t i = 0; i < tensors.size(); i++) {
        size_t bytes = tensors[i].count * dtype_bytes(dtype);
        if (shard_bytes > 0 && shard_bytes + bytes > max_shard_bytes) first.push_back(i), shard_bytes = 0;
        shard_bytes += bytes, total += bytes;
    }
    first.push_back(tensors.size());
    Json map = Json::object();
    for (size_t s = 0; s + 1 < first.size(); s++) {
        char file[64] = "model.safetensors";
        if (first.size() > 2) snprintf(file, sizeof file, "model-%05zu-of-%05zu.safetensors", s + 1, first.size() - 1);
        add_tensors(file, {{State::weights, ""}}, first[s], first[s + 1], dtype);
        for (size_t i = first[s]; i < first[s + 1]; i++) map[tensors[i].name] = file;
    }
    add_text("model.safetensors.index.json", json_text({{"metadata", {{"total_size", total}}}, {"weight_map", map}}));
    add_tensors("optimizer.safetensors", optimizer_states(masters), 0, tensors.size(), "F32");

    // Sums, and makes sure that all ranks took part and are at the same work: two that own an element, or none, would leave a hole.
    static_assert(std::has_unique_object_representations_v<Piece>);
    const double plan = 1 + (double)crc32_z(0, (const Bytef*)pieces.data(), pieces.size() * sizeof(Piece));
    auto meet = [&](std::vector<double> values) {
        values.push_back(plan);
        savers.sum(&values);
        if (values.back() == plan * savers.size) return values;
        std::filesystem::remove_all(tmp, ec);
        die("cannot save %s: the ranks disagree about which of them writes what", final.c_str());
    };

    if (savers.rank == 0) {
        std::filesystem::create_directories(out_dir, ec);
        checkpoint_leftovers(out_dir, true);
        if (mkdir(tmp.c_str(), 0777) != 0) die("cannot create %s: %s; nothing was saved", tmp.c_str(), strerror(errno));
        for (const File& f : files) {
            FileWriter w;
            w.open(tmp, f.name, O_CREAT);
            if (ftruncate(w.fd, (off_t)f.bytes) != 0) w.fail();
            close(w.fd);                                  // synced below, with the text
        }
    }
    meet({});

    std::vector<double> crcs(pieces.size());              // a uint32_t is exact in a double; 0 for another rank's
    std::vector<char> buffer(checkpoint_chunk * sizeof(float));
    for (const File& f : files) {
        FileWriter w;
        if (savers.rank == 0) w.open(tmp, f.name), w.write(f.text.data(), f.text.size(), 0);
        for (size_t i = f.first; i < f.last; i++) {
            const Piece& p = pieces[i];
            if (p.rank != savers.rank) continue;
            if (w.fd < 0) w.open(tmp, f.name);
            read(p.state, p.offset, p.count, buffer.data());
            if (!all_finite(buffer.data(), p.count, p.bytes == 2 * p.count)) {
                std::filesystem::remove_all(tmp, ec);
                const auto tensor = std::upper_bound(tensors.begin(), tensors.end(), p.offset, [](size_t offset, const HfTensor& t) { return offset < t.offset; }) - 1;
                die("step %lld is not saved: %s has a number that is not finite%s. Earlier checkpoints are untouched", (long long)step, tensor->name.c_str(), p.state == State::weights ? "" : " in AdamW's state");
            }
            crcs[i] = (double)crc32_z(0, (const Bytef*)buffer.data(), p.bytes);
            w.write(buffer.data(), p.bytes, p.at);
        }
        if (w.fd >= 0) w.close();
    }
    crcs = meet(crcs);

    if (savers.rank == 0) {
        Json listed = Json::object();
        for (const File& f : files) {
            uLong crc = crc32_z(0, (const Bytef*)f.text.data(), f.text.size());
            for (size_t i = f.first; i < f.last; i++) crc = crc32_combine(crc, (uLong)crcs[i], (z_off_t)pieces[i].bytes);
            listed[f.name] = {{"bytes", f.bytes}, {"crc32", crc_text((uint32_t)crc)}};
        }
        Json state = {{"step", step}, {"trainer", trainer_state}, {"files", listed}};
        std::string text = json_text(state);
        state["crc32"] = crc_text((uint32_t)crc32_z(0, (const Bytef*)text.data(), text.size()));
        text = json_text(state);
        FileWriter w;
        w.open(tmp, "trainer_state.json", O_CREAT);
        w.write(text.data(), text.size(), 0);
        w.close();
        directory_sync(tmp);

        bool existed = access(final.c_str(), F_OK) == 0, exchanged = existed && renameat2(AT_FDCWD, tmp.c_str(), AT_FDCWD, final.c_str(), RENAME_EXCHANGE) == 0;
        if (existed && !exchanged && rename(final.c_str(), old.c_str()) != 0) die("cannot rename %s: %s; the new checkpoint is %s", final.c_str(), strerror(errno), tmp.c_str());
        if (!exchanged && rename(tmp.c_str(), final.c_str()) != 0) die("cannot rename %s: %s", tmp.c_str(), strerror(errno));
        directory_sync(out_dir);
        directory_sync(std::filesystem::weakly_canonical(out_dir).parent_path().string());   // out_dir itself may be new
        checkpoint_leftovers(out_dir, true);              // the directory that was replaced
    }
    meet({});
}

// trainer_state.json, if it is whole. Returns why not, or "".
inline std::string checkpoint_manifest(Json* state, const std::string& dir) {
    std::string text;
    if (!file_contents(&text, dir + "/trainer_state.json")) return std::string("trainer_state.json: ") + strerror(errno) + "; it is no checkpoint, or a partial one";
    *state = json_parse(text);
    if (!state->is_object() || !state->contains("crc32")) return "trainer_state.json is damaged: not the JSON that was saved";
    const Json crc = (*state)["crc32"];
    state->erase("crc32");
    text = json_text(*state);
    if (crc != crc_text((uint32_t)crc32_z(0, (const Bytef*)text.data(), text.size()))) return "trainer_state.json is damaged: its checksum differs";
    return "";
}

// Why a checkpoint can't be trusted, or "". Sizes cost nothing; contents reads every file once, and calls alive() while it does.
inline std::string checkpoint_damage(const std::string& dir, bool contents, const std::function<void()>& alive = [] {}) {
    Json state;
    const std::string why = checkpoint_manifest(&state, dir);
    if (!why.empty()) return why;
    std::vector<unsigned char> buffer(1 << 20);
    for (auto& [name, sum] : state["files"].items()) {
        int fd = open((dir + "/" + name).c_str(), O_RDONLY | O_CLOEXEC);
        struct stat info;
        if (fd < 0 || fstat(fd, &info) != 0) return name + ": " + strerror(errno);
        size_t bytes = (size_t)info.st_size, expected = sum["bytes"].get<size_t>();
        uint32_t crc = 0;
        ssize_t n = 0;
        while (contents && bytes == expected && (n = read(fd, buffer.data(), buffer.size())) > 0) {
            crc = (uint32_t)crc32_z(crc, buffer.data(), (size_t)n);
            alive();
        }
        close(fd);
        if (bytes != expected) return name + " has " + std::to_string(bytes) + " bytes, saved were " + std::to_string(expected);
        if (n < 0 || (contents && sum["crc32"] != crc_text(crc))) return name + " is damaged: its checksum differs";
    }
    return "";
}

// Dies with the reason when dir is no checkpoint, a partial or a damaged one. Reads every byte of it, so rank 0 does.
inline void checkpoint_check(const std::string& dir, const std::function<void()>& alive = [] {}) {
    const std::string why = checkpoint_damage(dir, true, alive);
    if (!why.empty()) die("cannot resume from %s: %s", dir.c_str(), why.c_str());
}

// The newest checkpoint of OUT that is whole, or "". A warning on standard error for each newer one that isn't. Rank 0 alone.
inline std::string checkpoint_newest(const std::string& out_dir, const std::function<void()>& alive = [] {}) {
    checkpoint_leftovers(out_dir, false);
    for (auto& [step, dir] : checkpoint_list(out_dir)) {
        const std::string why = checkpoint_damage(dir, true, alive);
        if (why.empty()) return dir;
        fprintf(stderr, "warning: passing over %s: %s\n", dir.c_str(), why.c_str());
    }
    return "";
}

// What the caller gave to checkpoint_save as trainer_state.
inline Json checkpoint_trainer_state(const std::string& dir) {
    Json state;
    const std::string why = checkpoint_manifest(&state, dir);
    if (!why.empty()) die("cannot resume from %s: %s", dir.c_str(), why.c_str());
    return state["trainer"];
}

// Hands over m, v and, when `masters`, master where the file has it, in the ranges and the order that ReadState describes: a tensor's
// chunks, as one rank saves them. Asks for each whether any of it is wanted; no page of the others is read.
inline void checkpoint_optimizer_read(const std::string& dir, const OlmoeConfig& c, bool masters,
                                      const std::function<void(State, size_t offset, size_t count, const float* src)>& put,
                                      const std::function<bool(size_t offset, size_t count)>& wanted = [](size_t, size_t) { return true; }) {
    std::vector<Safetensors> files(1);
    safetensors_open(&files[0], dir + "/optimizer.safetensors");
    const std::vector<HfTensor> tensors = hf_tensors(c);
    const std::vector<StateInfo> states = optimizer_states(files[0].find("master." + tensors[0].name) != nullptr);
    std::vector<TensorInfo> expected;
    for (const StateInfo& s : states)
        for (const HfTensor& h : tensors) expected.push_back({s.prefix + h.name, "F32", h.shape});
    const std::vector<const SafeTensor*> found = tensors_expect(files, expected);
    std::vector<float> buffer(checkpoint_chunk);
    size_t i = 0;
    for (const StateInfo& s : states)
        for (const HfTensor& h : tensors) {
            const SafeTensor& t = *found[i++];
            for (size_t done = 0, n; done < h.count && (masters || s.state != State::master); done += n) {
                n = std::min(checkpoint_chunk, h.count - done);
                if (!wanted(h.offset + done, n)) continue;
                tensor_to_float(buffer.data(), t, done, n);
                put(s.state, h.offset + done, n, buffer.data());
            }
        }
    safetensors_close(&files[0]);
}

// Deletes all but the newest keep_last (0: keeps all) and every step that keep_every divides (0: none). A damaged one is neither
// counted nor deleted. Renamed first, so that a kill never leaves a partial directory under a checkpoint's name. Rank 0 alone.
inline void checkpoint_prune(const std::string& out_dir, int keep_last, int keep_every) {
    int newer = 0;
    if (keep_last <= 0) return;
    for (auto& [step, dir] : checkpoint_list(out_dir)) {
        if (!checkpoint_damage(dir, false).empty() || newer++ < keep_last || (keep_every > 0 && step % keep_every == 0)) continue;
        const std::string trash = out_dir + "/." + std::filesystem::path(dir).filename().string() + ".trash";
        std::error_code ignored;
        if (rename(dir.c_str(), trash.c_str()) != 0) die("cannot delete %s: %s", dir.c_str(), strerror(errno));
        directory_sync(out_dir);
        std::filesystem::remove_all(trash, ignored);
    }
}
