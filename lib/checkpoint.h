// checkpoint.h: Hugging Face OLMoE directories in and out, and the training state beside the weights.
//
// A checkpoint is a directory that transformers, vLLM and llama.cpp's converter open as it is:
//   config.json, generation_config.json   the shape, the special tokens
//   model.safetensors                     the weights, F32 or BF16, a tensor per expert and matrix as on the hub;
//                                         or, where one file would pass max_shard_bytes,
//                                         model-00001-of-00003.safetensors and so on
//   model.safetensors.index.json          which file holds which tensor; written for one file as well, because vLLM
//                                         without an index reads every .safetensors file, also the optimizer's
//   tokenizer.json                        a copy, where there is one; and what else came with the model that the run
//                                         started from: ModelFiles
// with what training needs to go on:
//   optimizer.safetensors                 F32: m.<name>, v.<name>, and master.<name> where BF16 weights have masters
//   trainer_state.json                    {"step", "trainer": the caller's, "files": {name: {"bytes", "crc32"}},
//                                         "crc32": of the rest}
// Its bytes follow from the arguments of checkpoint_save alone, never from a path, the time, the host, or the number of
// ranks that wrote it.
//
// It is written as OUT/.step-00000020.tmp, synced to the disk, and renamed to OUT/step-00000020. So a directory whose
// name begins with "step-" is complete, at whatever moment a process was killed. What a killed process left begins with
// a dot, and the next save removes it.
//
// All ranks save together, into one directory on a file system that they share, and any rank may read what it needs.
// But what renames, deletes, or reads every byte of a directory is for rank 0 alone: checkpoint_leftovers, _newest,
// _check and _prune.
//
// Included once, by olmoe.cu, after die(), OlmoeConfig and hf_tensors(). Host code only. Every error is one line from
// die().
#pragma once
#include <algorithm>
#include <cerrno>
#include <cfloat>
#include <charconv>
#include <climits>
#include <cmath>
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
#include <zlib.h>
#include "safetensors.h"

// ------------------------------------------------------------------------------------------------
// config.json

// The double that prints as the float does: 1e-05 and not 9.999999747378752e-06.
inline double shortest_double(float f) {
    char shortest[32];
    *std::to_chars(shortest, shortest + sizeof shortest - 1, f).ptr = 0;
    return strtod(shortest, nullptr);
}

// A config.json while it is read. What is wrong with a field is an error that names the file and the field.
struct ConfigFile {
    std::string path;
    Json j;

    bool present(const char* name) const { return j.contains(name) && !j[name].is_null(); }

    int integer(const char* name, int low, int high) const {
        if (!present(name)) die("%s: %s is missing", path.c_str(), name);
        return integer(j[name], name, low, high);
    }

    int integer(const Json& v, const char* name, int low, int high) const {
        const double number = v.is_number() ? v.get<double>() : NAN;          // 24.0 is 24
        if (!(number >= low && number <= high && number == std::floor(number)))
            die("%s: %s is %s, but must be an integer from %d to %d",
                path.c_str(), name, json_shown(v).c_str(), low, high);
        return (int)number;
    }

    // A number of the object `in`: above 0, or where `or_zero` from 0 on.
    float positive(const Json& in, const char* name, float absent, bool or_zero = false) const {
        if (!in.contains(name) || in[name].is_null()) return absent;
        double v = in[name].is_number() ? in[name].get<double>() : -1;
        if (!(v >= (or_zero ? 0 : FLT_MIN) && v <= FLT_MAX))
            die("%s: %s is %s, but must be a number %s 0", path.c_str(), name, json_shown(in[name]).c_str(),
                or_zero ? "not below" : "above");
        return (float)v;
    }

    // The ids of a special token, which may be a list. Null and -1: the model has no such token.
    std::vector<int> tokens(const char* name, const std::vector<int>& absent) const {
        if (!j.contains(name)) return absent;
        std::vector<int> ids;
        for (const Json& v : j[name].is_array() ? j[name] : Json::array({j[name]})) {
            const int id = v.is_null() ? -1 : integer(v, name, -1, INT_MAX);
            if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
        }
        return ids;
    }

    void only(const char* name, const Json& value) const {
        if (present(name) && j[name] != value)
            die("%s: %s %s is not supported, only %s",
                path.c_str(), name, json_shown(j[name]).c_str(), value.dump().c_str());
    }
};

inline void config_read_shape(const ConfigFile& f, OlmoeConfig* c) {
    const char* at = f.path.c_str();
    c->L = f.integer("num_hidden_layers", 1, 1024);
    c->C = f.integer("hidden_size", 2, 1 << 20);
    c->H = f.integer("num_attention_heads", 1, 1 << 16);
    c->V = f.integer("vocab_size", 1, 1 << 26);
    c->E = f.integer("num_experts", 1, 4096);
    c->K = f.integer("num_experts_per_tok", 1, 4096);
    c->F = f.integer("intermediate_size", 1, 1 << 20);
    if (f.present("max_position_embeddings")) c->max_T = f.integer("max_position_embeddings", 1, 1 << 30);

    if (c->C % c->H != 0) die("%s: hidden_size %d is not a multiple of num_attention_heads %d", at, c->C, c->H);
    if (c->C / c->H % 2 != 0)
        die("%s: hidden_size / num_attention_heads is %d, but must be even: RoPE turns pairs", at, c->C / c->H);
    if (c->K > c->E) die("%s: num_experts_per_tok %d is more than num_experts %d", at, c->K, c->E);
    double layer = 4.0 * c->C * c->C + (double)c->E * c->C + 3.0 * c->E * c->F * c->C;
    double elements = 2.0 * c->V * c->C + (double)c->L * layer;
    if (!(elements < 0x1p43))
        die("%s: the shape has %.3g parameters, more than any machine holds; is a size mistyped?", at, elements);
}

inline void config_read_numbers(const ConfigFile& f, OlmoeConfig* c) {
    c->rms_norm_eps = f.positive(f.j, "rms_norm_eps", c->rms_norm_eps, true);
    c->initializer_range = f.positive(f.j, "initializer_range", c->initializer_range, true);
    c->eos_token_ids = f.tokens("eos_token_id", c->eos_token_ids);
    const std::vector<int> pads = f.tokens("pad_token_id", {c->pad_token_id});
    if (pads.size() > 1)
        die("%s: pad_token_id is %s, but must be one id", f.path.c_str(), json_shown(f.j["pad_token_id"]).c_str());
    c->pad_token_id = pads.empty() ? -1 : pads[0];
    if (f.present("norm_topk_prob")) {
        const Json& v = f.j["norm_topk_prob"];
        if (!v.is_boolean())
            die("%s: norm_topk_prob is %s, but must be true or false", f.path.c_str(), json_shown(v).c_str());
        c->norm_topk_prob = v.get<bool>();
    }
}

// transformers 5 keeps theta in rope_parameters, earlier versions as rope_theta, with rope_scaling for other kinds.
// Both may be there and say that the kind is the default.
inline void config_read_rope(const ConfigFile& f, OlmoeConfig* c) {
    const char* at = f.path.c_str();
    c->rope_theta = f.positive(f.j, "rope_theta", c->rope_theta);
    std::string known = f.present("rope_theta") ? "rope_theta" : "";
    for (const std::string name : {"rope_parameters", "rope_scaling"}) {
        if (!f.present(name.c_str())) continue;
        const Json& rope = f.j[name];
        if (!rope.is_object())
            die("%s: %s is %s, but must be an object", at, name.c_str(), json_shown(rope).c_str());
        for (auto& [key, value] : rope.items()) {
            bool type = key == "rope_type" || key == "type", one = key == "partial_rotary_factor" || key == "factor";
            bool plain = value.is_null() || key == "rope_theta" || (one && value == 1);
            if (!plain && !(type && value == "default"))
                die("%s: %s.%s %s is not supported, only rope_theta and rope_type \"default\"",
                    at, name.c_str(), key.c_str(), json_shown(value).c_str());
        }
        if (!rope.contains("rope_theta") || rope["rope_theta"].is_null()) continue;
        const float theta = f.positive(rope, "rope_theta", 0);
        if (!known.empty() && theta != c->rope_theta)
            die("%s: %s is %g, but %s.rope_theta is %g; which one?", at, known.c_str(), c->rope_theta, name.c_str(),
                theta);
        c->rope_theta = theta;
        known = name + ".rope_theta";
    }
}

// Refuses what the released OLMoE models don't use, by its name.
inline void config_refuse_unsupported(const ConfigFile& f, const OlmoeConfig& c) {
    const char* at = f.path.c_str();
    const std::vector<std::pair<const char*, Json>> supported = {
        {"clip_qkv", nullptr}, {"num_key_value_heads", c.H}, {"head_dim", c.C / c.H},
        {"tie_word_embeddings", false}, {"attention_bias", false}, {"attention_dropout", 0.0},
        {"quantization_config", nullptr}};
    for (auto& [name, value] : supported) f.only(name, value);
    if (f.present("hidden_act") && f.j["hidden_act"] != "swish") f.only("hidden_act", "silu");  // one, with two names

    // One field under its new and its old name. Nothing else depends on it: tensors name their own dtype.
    const Json& j = f.j;
    for (const char* name : {"dtype", "torch_dtype"})
        if (f.present(name) && j[name] != "float32" && j[name] != "bfloat16" && j[name] != "float16")
            die("%s: %s %s is not supported, only \"float32\", \"bfloat16\" and \"float16\"",
                at, name, json_shown(j[name]).c_str());
    if (f.present("dtype") && f.present("torch_dtype") && j["dtype"] != j["torch_dtype"])
        die("%s: dtype is %s, but torch_dtype, its old name, is %s; which one?",
            at, j["dtype"].dump().c_str(), j["torch_dtype"].dump().c_str());
}

// Reads a config.json, or the one of a directory.
inline void config_read(OlmoeConfig* config, const std::string& path) {
    std::error_code ignored;
    const std::string file = std::filesystem::is_directory(path, ignored) ? path + "/config.json" : path;
    const ConfigFile f = {file, json_read(file)};
    if (!f.present("model_type")) die("%s: model_type is missing; an OLMoE config says \"olmoe\"", file.c_str());
    f.only("model_type", "olmoe");
    OlmoeConfig c;
    config_read_shape(f, &c);
    config_read_numbers(f, &c);
    config_read_rope(f, &c);
    config_refuse_unsupported(f, c);
    *config = c;
}

// The ids that end a text of the model in a directory: as in transformers those of its generation_config.json, where
// it names some.
inline std::vector<int> eos_read(const std::string& dir, const OlmoeConfig& c) {
    const std::string path = dir + "/generation_config.json";
    if (access(path.c_str(), F_OK) != 0) return c.eos_token_ids;
    const ConfigFile f = {path, json_read(path)};
    return f.present("eos_token_id") ? f.tokens("eos_token_id", {}) : c.eos_token_ids;
}

inline Json eos_json(const OlmoeConfig& c) {
    const std::vector<int>& ids = c.eos_token_ids;
    return ids.empty() ? Json(nullptr) : ids.size() == 1 ? Json(ids[0]) : Json(ids);
}

// The config.json that transformers 4 and 5 read alike: keys sorted as they sort them, theta and dtype under names that
// both know.
inline Json config_json(const OlmoeConfig& c, bool bf16) {
    return Json{
        {"architectures", Json::array({"OlmoeForCausalLM"})}, {"attention_bias", false}, {"attention_dropout", 0.0},
        {"bos_token_id", nullptr}, {"clip_qkv", nullptr}, {"eos_token_id", eos_json(c)},
        {"hidden_act", "silu"}, {"hidden_size", c.C}, {"initializer_range", shortest_double(c.initializer_range)},
        {"intermediate_size", c.F}, {"max_position_embeddings", c.max_T}, {"model_type", "olmoe"},
        {"norm_topk_prob", c.norm_topk_prob}, {"num_attention_heads", c.H}, {"num_experts", c.E},
        {"num_experts_per_tok", c.K}, {"num_hidden_layers", c.L}, {"num_key_value_heads", c.H},
        {"output_router_logits", false}, {"pad_token_id", c.pad_token_id < 0 ? Json(nullptr) : Json(c.pad_token_id)},
        {"rms_norm_eps", shortest_double(c.rms_norm_eps)},
        {"rope_parameters", {{"rope_theta", shortest_double(c.rope_theta)}, {"rope_type", "default"}}},
        {"rope_theta", shortest_double(c.rope_theta)}, {"router_aux_loss_coef", 0.01}, {"tie_word_embeddings", false},
        {"torch_dtype", bf16 ? "bfloat16" : "float32"}, {"use_cache", true}, {"vocab_size", c.V}};
}

// ------------------------------------------------------------------------------------------------
// What comes with a model beside its weights

using Texts = std::vector<std::pair<std::string, std::string>>;      // names and contents of files

// Goes into every checkpoint of what is trained from it.
struct ModelFiles {
    Json config;                    // its config.json; null where the run starts from a shape alone
    Texts files;                    // generation_config.json, those of tokenizer and chat
};

// Weights of other formats have other names, or are larger.
inline bool is_of_tokenizer(const std::filesystem::directory_entry& entry) {
    std::error_code ec;
    const std::string name = entry.path().filename().string();
    bool is = name == "special_tokens_map.json" || name == "added_tokens.json" || entry.path().extension() == ".model";
    for (const char* begin : {"tokenizer", "chat_template.", "merges.", "vocab."}) is |= name.rfind(begin, 0) == 0;
    return is && entry.is_regular_file(ec) && entry.file_size(ec) < 1 << 28;
}

inline void files_add(Texts* files, const std::string& path, const std::string& name) {
    files->push_back({name, ""});
    if (!file_contents(&files->back().second, path)) die("cannot read %s: %s", path.c_str(), strerror(errno));
}

// All that comes with the model in `dir`, with the tokenizer of another directory, or "": of none.
inline ModelFiles model_files_read(const std::string& dir, const std::string& tokenizer_dir) {
    ModelFiles model = {json_read(dir + "/config.json"), {}};
    std::error_code ec;
    std::set<std::string> names;
    if (!tokenizer_dir.empty())
        for (const auto& entry : std::filesystem::directory_iterator(tokenizer_dir, ec))
            if (is_of_tokenizer(entry)) names.insert(entry.path().filename().string());
    const std::string generation = "generation_config.json", path = dir + "/" + generation;
    if (access(path.c_str(), F_OK) == 0) files_add(&model.files, path, generation);
    for (const std::string& name : names) files_add(&model.files, tokenizer_dir + "/" + name, name);
    return model;
}

// The config.json of a checkpoint: the model's, but for what training sets, the dtype of the weights. Where that has
// nothing, ours.
inline Json config_of_checkpoint(const OlmoeConfig& c, bool bf16, const Json& original) {
    const Json ours = config_json(c, bf16);
    if (original.is_null()) return ours;
    nlohmann::json merged = ours;                         // which sorts its keys
    for (auto& [key, value] : original.items())
        if (key == "dtype") merged[key] = ours["torch_dtype"];
        else if (key != "torch_dtype") merged[key] = value;
    return merged;
}

// The texts of a checkpoint, which do not depend on its step, in the order of its list of files.
inline Texts checkpoint_texts(const OlmoeConfig& c, bool bf16, const ModelFiles& model) {
    Texts texts = {{"config.json", json_text(config_of_checkpoint(c, bf16, model.config))}};
    if (model.files.empty() || model.files[0].first != "generation_config.json") {
        Json generation = {{"_from_model_config", true}};
        if (!c.eos_token_ids.empty()) generation["eos_token_id"] = eos_json(c);
        if (c.pad_token_id >= 0) generation["pad_token_id"] = c.pad_token_id;
        texts.push_back({"generation_config.json", json_text(generation)});
    }
    texts.insert(texts.end(), model.files.begin(), model.files.end());
    return texts;
}

// ------------------------------------------------------------------------------------------------
// The tensors of a model

// A tensor as files have it: Hugging Face's name, a row-major shape, and its elements [offset, offset + count) in the
// flat order of all parameters
struct HfTensor {
    std::string name;
    std::vector<int64_t> shape;
    size_t offset, count;
    bool frozen = false;            // not trained: it has no state
};

// All of them, in the flat order, which they tile. The includer defines it.
std::vector<HfTensor> hf_tensors(const OlmoeConfig& c);

// ------------------------------------------------------------------------------------------------
// The weights of a model directory, ours or the hub's

// Whose names the tensors have, where they are those of a known layout that is not read; "" otherwise.
inline std::string layout_named(const std::vector<Safetensors>& files) {
    const std::vector<std::pair<std::string, const char*>> layouts = {
        {"base_model.model.", "an adapter of PEFT; merge it into its model"},
        {"transformer.blocks.", "OLMo's own; transformers' convert_olmoe_weights_to_hf.py makes them Hugging Face's"},
        {"blk.", "llama.cpp's (GGUF)"}, {"_orig_mod.", "a torch.compile'd module's; save the module inside"},
        {"module.", "a DistributedDataParallel's; save its .module"},
        {"layers.", "an OlmoeModel's, which has no lm_head; save the OlmoeForCausalLM"}};
    for (const Safetensors& f : files)
        for (const SafeTensor& t : f.tensors)
            for (const auto& [begin, whose] : layouts)
                if (t.name.rfind(begin, 0) == 0) return "; its names are " + std::string(whose);
    return "";
}

// Finds every expected tensor, in that order; dtype "" means F32, BF16 or F16. Dies when one is missing, or has another
// shape or dtype, or when the files hold any other.
inline std::vector<const SafeTensor*> tensors_expect(const std::vector<Safetensors>& files,
                                                     const std::vector<TensorInfo>& expected) {
    const char* where = files.size() == 1 ? files[0].path.c_str() : "the model's shards";
    std::vector<const SafeTensor*> found;
    std::set<std::string> names;
    for (const TensorInfo& want : expected) {
        const SafeTensor* t = nullptr;
        const Safetensors* f = files.data();
        for (; f < files.data() + files.size() && !(t = f->find(want.name)); f++) {}
        if (!t) die("%s: tensor %s is missing%s", where, want.name.c_str(), layout_named(files).c_str());
        if (t->shape != want.shape)
            die("%s: tensor %s has shape %s, but config.json makes it %s",
                f->path.c_str(), t->name.c_str(), Json(t->shape).dump().c_str(), Json(want.shape).dump().c_str());
        const bool any = want.dtype.empty();
        if (any ? t->dtype != "F32" && t->dtype != "BF16" && t->dtype != "F16" : t->dtype != want.dtype)
            die("%s: tensor %s is %s; only %s is supported",
                f->path.c_str(), t->name.c_str(), t->dtype.c_str(), any ? "F32, BF16 or F16" : want.dtype.c_str());
        found.push_back(t);
        names.insert(t->name);
    }
    for (const Safetensors& f : files)
        for (const SafeTensor& t : f.tensors)
            if (!names.count(t.name))
                die("%s: unexpected tensor %s; the model of config.json has none of this name",
                    f.path.c_str(), json_shown(t.name).c_str());
    return found;
}

struct ModelWeights {
    std::vector<Safetensors> files;
    std::vector<const SafeTensor*> tensors;       // as hf_tensors orders them; they point into files: don't copy
};

// What else holds weights in a directory, by its name; or a question.
inline std::string other_weights(const std::string& dir) {
    std::error_code ec;
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(dir, ec))
        names.insert(entry.path().filename().string());
    for (const std::string& name : names) {
        const std::string end = std::filesystem::path(name).extension().string();
        const bool adapter = name.rfind("adapter_model.", 0) == 0, tensors = end == ".safetensors";
        const bool pickle = end == ".pt" || end == ".pth" || (end == ".bin" && name.rfind("pytorch_model", 0) == 0);
        const char* what = adapter ? "an adapter of PEFT; merge it into its model"
            : tensors && name.find("-of-") != std::string::npos ? "a shard; fetch the index, too"
            : tensors ? "which is no name of a model's weights"
            : pickle ? "PyTorch's pickle; transformers saves safetensors of it"
            : end == ".gguf" ? "llama.cpp's GGUF; take the model that it was made of"
            : end == ".distcp" ? "of PyTorch's distributed checkpoints; save the model with transformers" : nullptr;
        if (what && name != "optimizer.safetensors") return "only " + name + ", " + what;
    }
    return "is it a model's directory?";
}

// The index of a model in several files: tensor -> file.
inline std::map<std::string, std::string> weight_map_read(const std::string& dir) {
    const std::string path = dir + "/model.safetensors.index.json";
    if (access(path.c_str(), F_OK) != 0)
        die("%s: neither model.safetensors nor model.safetensors.index.json; %s", dir.c_str(),
            other_weights(dir).c_str());
    const Json j = json_read(path);
    if (!j.contains("weight_map") || !j["weight_map"].is_object()) die("%s: weight_map is missing", path.c_str());
    std::map<std::string, std::string> map;
    for (auto& [name, shard] : j["weight_map"].items()) {
        std::string file = shard.is_string() ? shard.get<std::string>() : "/";
        if (file.rfind("./", 0) == 0) file = file.substr(2);
        if (file.find('/') != std::string::npos)
            die("%s: tensor %s: %s is not the name of a file beside it",
                path.c_str(), json_shown(name).c_str(), json_shown(shard).c_str());
        map[name] = file;
    }
    return map;
}

// Makes the tensors those of the hub, one for each expert and matrix, where a layer has its experts in two, as in
// transformers 5's memory: gate_up_proj (E, 2F, C), of each expert the rows of gate and then those of up, and
// down_proj (E, C, F). Leaves out what transformers does not load: the frequencies that old versions saved.
inline void tensors_split(Safetensors* f, const OlmoeConfig& c) {
    std::vector<SafeTensor> split;
    for (const SafeTensor& t : f->tensors) {
        const size_t end = t.name.rfind('.') + 1;
        const std::string prefix = t.name.substr(0, end), part = t.name.substr(end);
        const bool gate_up = part == "gate_up_proj", down = part == "down_proj";
        const std::vector<int64_t> shape = gate_up ? std::vector<int64_t>{c.E, 2 * c.F, c.C}
                                                   : std::vector<int64_t>{c.E, c.C, c.F};
        if (t.name.find(".rotary_emb.inv_freq") != std::string::npos) continue;
        if (!(gate_up || down)) { split.push_back(t); continue; }
        if (t.shape != shape)
            die("%s: tensor %s, of all experts, has shape %s, but config.json makes it %s",
                f->path.c_str(), t.name.c_str(), Json(t.shape).dump().c_str(), Json(shape).dump().c_str());
        const size_t parts = (gate_up ? 2 : 1) * (size_t)c.E, bytes = t.bytes / parts;
        for (size_t i = 0; i < parts; i++) {
            const char* name = down ? ".down_proj.weight" : i % 2 ? ".up_proj.weight" : ".gate_proj.weight";
            split.push_back({prefix + std::to_string(gate_up ? i / 2 : i) + name, t.dtype,
                             {gate_up ? c.F : c.C, gate_up ? c.C : c.F}, t.data + i * bytes, bytes});
        }
    }
    f->tensors = std::move(split);
    f->index.clear();
    for (size_t i = 0; i < f->tensors.size(); i++) f->index[f->tensors[i].name] = i;
}

// model.safetensors where there is one, else the shards of the index. Exactly the tensors of the config, in F32, BF16
// or F16.
inline void weights_open(ModelWeights* w, const std::string& dir, const OlmoeConfig& c) {
    const std::string single = "model.safetensors";
    const bool sharded = access((dir + "/" + single).c_str(), F_OK) != 0;
    std::map<std::string, std::string> map;
    std::set<std::string> shards;
    if (sharded) map = weight_map_read(dir);
    else shards.insert(single);
    for (const auto& [name, shard] : map) shards.insert(shard);

    w->files.resize(shards.size());
    size_t n = 0;
    for (const std::string& shard : shards) {
        Safetensors& f = w->files[n++];
        safetensors_open(&f, dir + "/" + shard);
        // Where memory is short, the system gives up what was read, not what comes next.
        madvise(f.map, f.map_bytes, MADV_SEQUENTIAL);
        for (const SafeTensor& t : f.tensors)
            if (!map.empty() && (!map.count(t.name) || map[t.name] != shard))
                die("%s: tensor %s is not in the index under this file", f.path.c_str(), json_shown(t.name).c_str());
        tensors_split(&f, c);
    }

    std::vector<TensorInfo> expected;
    for (const HfTensor& h : hf_tensors(c)) expected.push_back({h.name, "", h.shape});
    w->tensors = tensors_expect(w->files, expected);
}

// i: as in hf_tensors.
inline const SafeTensor& weights_tensor(const ModelWeights& w, size_t i) { return *w.tensors[i]; }

inline void weights_close(ModelWeights* w) {
    for (Safetensors& f : w->files) safetensors_close(&f);
    *w = ModelWeights();
}

// ------------------------------------------------------------------------------------------------
// Files and directories on the disk

// A file in the directory `scratch`, which an error removes before it ends the program. On the disk when close()
// returns.
struct FileWriter {
    std::string path, scratch;
    int fd = -1;

    [[noreturn]] void fail() {
        const int error = errno;
        const bool gone = error == ENOENT || error == ESTALE;
        std::error_code ignored;
        std::filesystem::remove_all(scratch, ignored);
        if (gone) sleep(3);                               // the rank that failed reports it meanwhile and ends this one
        die("cannot write %s: %s; nothing of it was kept. %s", path.c_str(), strerror(error),
            gone ? "Another rank failed and says why, or the ranks do not share this file system"
                 : "Make room, or write elsewhere");
    }
    void open(const std::string& directory, const std::string& name, int create = 0) {
        scratch = directory, path = scratch + "/" + name;
        fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | create, 0666);
        if (fd < 0) fail();
    }
    void write(const void* data, size_t bytes, size_t at) {
        for (size_t done = 0; done < bytes;) {
            const size_t n = std::min(bytes - done, (size_t)1 << 30);
            ssize_t written = pwrite(fd, (const char*)data + done, n, (off_t)(at + done));
            if (written < 0 && errno == EINTR) continue;
            if (written <= 0) fail();
            done += (size_t)written;
        }
    }
    void close() {
        if (fsync(fd) != 0 || ::close(fd) != 0) fail();
        fd = -1;
    }
};

inline void directory_sync(const std::string& path) {
    if (!folder_sync(path)) die("cannot sync %s: %s", path.c_str(), strerror(errno));
}

inline std::string crc_text(uint32_t crc) {
    char hex[9];
    snprintf(hex, sizeof hex, "%08x", crc);
    return hex;
}

// Steps of OUT's checkpoints, complete by their names, newest first.
inline std::vector<std::pair<int64_t, std::string>> checkpoint_list(const std::string& out_dir) {
    std::vector<std::pair<int64_t, std::string>> list;
    std::error_code ec;
    for (const auto& entry : std::filesystem::directory_iterator(out_dir, ec)) {
        const std::string name = entry.path().filename().string();
        if (name.compare(0, 5, "step-") != 0 || name.size() < 13 || name.size() > 23) continue;
        if (name.find_first_not_of("0123456789", 5) != std::string::npos) continue;
        if (entry.is_directory(ec)) list.push_back({std::stoll(name.substr(5)), out_dir + "/" + name});
    }
    std::sort(list.rbegin(), list.rend());
    return list;
}

// What a killed run left: .tmp is half-written or was just replaced, .trash is half-deleted, .old is an earlier
// checkpoint of a step that was being replaced. .old goes back to its place if its successor is not there; the
// others are of no use, and are deleted when `clean`. Rank 0 alone.
inline void checkpoint_leftovers(const std::string& out_dir, bool clean) {
    std::error_code ec;
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(out_dir, ec))
        names.push_back(entry.path().filename().string());
    for (const std::string& name : names) {
        const std::string path = out_dir + "/" + name, end = std::filesystem::path(name).extension().string();
        if (name.compare(0, 6, ".step-") != 0 || (end != ".tmp" && end != ".old" && end != ".trash")) continue;
        const std::string step = out_dir + "/" + name.substr(1, name.size() - 1 - end.size());
        if (end == ".old" && access(step.c_str(), F_OK) != 0) rename(path.c_str(), step.c_str());
        else if (clean) std::filesystem::remove_all(path, ec);
    }
}

// ------------------------------------------------------------------------------------------------
// Saving

enum class State { weights, m, v, master };

// Copies flat elements [offset, offset + count) of a state to dst: weights in the file's dtype (BF16 or F32), the
// others as float. The range never crosses a tensor of hf_tensors, nor a run of Savers::owner, and has at most
// checkpoint_chunk elements; ranges come in ascending order, all weights first, then m, v and master.
using ReadState = std::function<void(State, size_t offset, size_t count, void* dst)>;
constexpr size_t checkpoint_chunk = 1 << 20;

// The ranks that save together. One: the default.
struct Savers {
    int rank = 0, size = 1;
    // Flat element -> the rank that writes it, and the flat end of the run of elements that this rank writes from
    // there. The same on each rank.
    std::function<std::pair<int, size_t>(size_t offset)> owner = [](size_t) { return std::make_pair(0, SIZE_MAX); };
    // Element-wise sum over the ranks, the same on each. It is also the barrier: no rank leaves before all have come.
    std::function<void(std::vector<double>*)> sum = [](std::vector<double>*) {};
};

struct StateInfo { State state; const char* prefix; };
inline std::vector<StateInfo> optimizer_states(bool masters) {
    std::vector<StateInfo> states = {{State::m, "m."}, {State::v, "v."}};
    if (masters) states.push_back({State::master, "master."});
    return states;
}

inline bool has_state(const HfTensor& t, State state) { return state == State::weights || !t.frozen; }

// Elements [offset, offset + count) of a state, which one rank writes at byte `at` of a file.
struct SavedPiece {
    int rank;
    State state;
    size_t offset, count, at, bytes;
};
static_assert(std::has_unique_object_representations_v<SavedPiece>);    // SavePlan::crc is of the pieces' bytes

// A file is a text, which rank 0 writes, and then pieces [first, last) of the plan, each written by its owner.
struct SavedFile {
    std::string name, text;
    size_t bytes, first, last;
};

// What a save writes, and which rank writes what; the same on every rank.
struct SavePlan {
    int64_t step;
    std::string out_dir, final, tmp, old;         // OUT and names of the checkpoint in it
    std::vector<HfTensor> tensors;
    std::vector<SavedPiece> pieces;
    std::vector<SavedFile> files;                 // as the manifest lists them
    double crc;                                   // 1 + the checksum of the pieces: it is never 0
};

inline void plan_text(SavePlan* plan, const std::string& file, const std::string& contents) {
    plan->files.push_back({file, contents, contents.size(), plan->pieces.size(), plan->pieces.size()});
}

// A file with tensors [first, last) of each of the states that they have.
inline void plan_tensors(SavePlan* plan, const std::string& file, const std::vector<StateInfo>& states,
                         size_t first, size_t last, const char* dtype, const Savers& savers) {
    std::vector<TensorInfo> infos;
    for (const StateInfo& s : states)
        for (size_t i = first; i < last; i++)
            if (has_state(plan->tensors[i], s.state))
                infos.push_back({s.prefix + plan->tensors[i].name, dtype, plan->tensors[i].shape});
    plan_text(plan, file, safetensors_header(infos));

    SavedFile& f = plan->files.back();
    for (const StateInfo& s : states)
        for (size_t i = first; i < last; i++) {
            const HfTensor& t = plan->tensors[i];
            if (!has_state(t, s.state)) continue;
            for (size_t offset = t.offset, end = offset + t.count, n; offset < end; offset += n) {
                auto [rank, run] = savers.owner(offset);
                if (rank < 0 || rank >= savers.size || run <= offset)
                    die("cannot save %s: no rank owns element %zu", plan->final.c_str(), offset);
                n = std::min({run, end, offset + checkpoint_chunk}) - offset;
                plan->pieces.push_back({rank, s.state, offset, n, f.bytes, n * dtype_bytes(dtype)});
                f.bytes += plan->pieces.back().bytes;
            }
        }
    f.last = plan->pieces.size();
}

inline std::string index_text(size_t total, const Json& map) {
    return json_text({{"metadata", {{"total_size", total}}}, {"weight_map", map}});
}

// The weights, in as many shards as they need, and their index.
inline void plan_weights(SavePlan* plan, const char* dtype, const Savers& savers, size_t max_shard_bytes) {
    const std::vector<HfTensor>& tensors = plan->tensors;
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
        if (first.size() > 2)
            snprintf(file, sizeof file, "model-%05zu-of-%05zu.safetensors", s + 1, first.size() - 1);
        plan_tensors(plan, file, {{State::weights, ""}}, first[s], first[s + 1], dtype, savers);
        for (size_t i = first[s]; i < first[s + 1]; i++) map[tensors[i].name] = file;
    }
    plan_text(plan, "model.safetensors.index.json", index_text(total, map));
}

inline SavePlan save_plan(const std::string& out_dir, int64_t step, const OlmoeConfig& c, bool bf16, bool masters,
                          const ModelFiles& model, const Savers& savers, size_t max_shard_bytes) {
    char name[32];
    snprintf(name, sizeof name, "step-%08lld", (long long)step);
    SavePlan plan;
    plan.step = step;
    plan.out_dir = out_dir;
    plan.final = out_dir + "/" + name;
    plan.tmp = out_dir + "/." + name + ".tmp";
    plan.old = out_dir + "/." + name + ".old";
    plan.tensors = hf_tensors(c);

    for (const auto& [file, contents] : checkpoint_texts(c, bf16, model)) plan_text(&plan, file, contents);
    plan_weights(&plan, bf16 ? "BF16" : "F32", savers, max_shard_bytes);
    plan_tensors(&plan, "optimizer.safetensors", optimizer_states(masters), 0, plan.tensors.size(), "F32", savers);

    plan.crc = 1 + (double)crc32_z(0, (const Bytef*)plan.pieces.data(), plan.pieces.size() * sizeof(SavedPiece));
    return plan;
}

// Sums values over the ranks, and makes sure that all ranks took part and have the same plan: with different plans,
// an element could have two writers, or none and the file a hole.
inline std::vector<double> save_meet(const SavePlan& plan, const Savers& savers, std::vector<double> values) {
    values.push_back(plan.crc);
    savers.sum(&values);
    if (values.back() == plan.crc * savers.size) return values;
    std::error_code ignored;
    std::filesystem::remove_all(plan.tmp, ignored);
    die("cannot save %s: the ranks disagree about which of them writes what", plan.final.c_str());
}

// Makes the files, empty but in their full size. Rank 0 alone.
inline void save_create(const SavePlan& plan) {
    std::error_code ignored;
    std::filesystem::create_directories(plan.out_dir, ignored);
    checkpoint_leftovers(plan.out_dir, true);
    std::filesystem::remove_all(plan.tmp, ignored);       // where OUT can't be listed
    if (mkdir(plan.tmp.c_str(), 0777) != 0)
        die("cannot create %s: %s; nothing was saved", plan.tmp.c_str(), strerror(errno));
    for (const SavedFile& f : plan.files) {
        FileWriter w;
        w.open(plan.tmp, f.name, O_CREAT);
        if (ftruncate(w.fd, (off_t)f.bytes) != 0) w.fail();
        close(w.fd);                                      // save_write syncs it, with the text
    }
}

// n numbers of fp32, or of bf16: none is a NaN or an infinity, whose exponents are all ones
inline bool all_finite(const char* numbers, size_t n, bool bf16) {
    bool all = true;
    for (size_t i = 0; i < n; i++) {
        uint16_t upper;
        memcpy(&upper, numbers + (bf16 ? 2 * i : 4 * i + 2), 2);
        all &= (upper & 0x7f80) != 0x7f80;
    }
    return all;
}

[[noreturn]] inline void save_not_finite(const SavePlan& plan, const SavedPiece& p) {
    std::error_code ignored;
    std::filesystem::remove_all(plan.tmp, ignored);
    auto before = [](size_t offset, const HfTensor& t) { return offset < t.offset; };
    const HfTensor& t = *(std::upper_bound(plan.tensors.begin(), plan.tensors.end(), p.offset, before) - 1);
    die("step %lld is not saved: %s has a number that is not finite%s. Earlier checkpoints are untouched",
        (long long)plan.step, t.name.c_str(), p.state == State::weights ? "" : " in AdamW's state");
}

// Writes this rank's pieces into the files, on rank 0 the texts also. Returns the pieces' checksums, 0 for those of
// other ranks; a uint32_t is exact in a double.
inline std::vector<double> save_write(const SavePlan& plan, const Savers& savers, const ReadState& read_state) {
    std::vector<double> crcs(plan.pieces.size());
    std::vector<char> buffer(checkpoint_chunk * sizeof(float));
    for (const SavedFile& f : plan.files) {
        FileWriter w;
        if (savers.rank == 0) w.open(plan.tmp, f.name), w.write(f.text.data(), f.text.size(), 0);
        for (size_t i = f.first; i < f.last; i++) {
            const SavedPiece& p = plan.pieces[i];
            if (p.rank != savers.rank) continue;
            if (w.fd < 0) w.open(plan.tmp, f.name);
            read_state(p.state, p.offset, p.count, buffer.data());
            if (!all_finite(buffer.data(), p.count, p.bytes == 2 * p.count)) save_not_finite(plan, p);
            crcs[i] = (double)crc32_z(0, (const Bytef*)buffer.data(), p.bytes);
            w.write(buffer.data(), p.bytes, p.at);
        }
        if (w.fd >= 0) w.close();
    }
    return crcs;
}

// Writes trainer_state.json, the manifest of the other files. Rank 0 alone.
inline void save_manifest(const SavePlan& plan, const std::vector<double>& crcs, const Json& trainer) {
    Json listed = Json::object();
    for (const SavedFile& f : plan.files) {
        uLong crc = crc32_z(0, (const Bytef*)f.text.data(), f.text.size());
        for (size_t i = f.first; i < f.last; i++)
            crc = crc32_combine(crc, (uLong)crcs[i], (z_off_t)plan.pieces[i].bytes);
        listed[f.name] = {{"bytes", f.bytes}, {"crc32", crc_text((uint32_t)crc)}};
    }
    Json state = {{"step", plan.step}, {"trainer", trainer}, {"files", listed}};
    std::string contents = json_text(state);
    state["crc32"] = crc_text((uint32_t)crc32_z(0, (const Bytef*)contents.data(), contents.size()));
    contents = json_text(state);
    FileWriter w;
    w.open(plan.tmp, "trainer_state.json", O_CREAT);
    w.write(contents.data(), contents.size(), 0);
    w.close();
    directory_sync(plan.tmp);
}

// Gives the directory its final name. Rank 0 alone.
inline void save_rename(const SavePlan& plan) {
    const char *tmp = plan.tmp.c_str(), *final = plan.final.c_str();
    const bool existed = access(final, F_OK) == 0;
    const bool exchanged = existed && renameat2(AT_FDCWD, tmp, AT_FDCWD, final, RENAME_EXCHANGE) == 0;
    if (existed && !exchanged && rename(final, plan.old.c_str()) != 0)
        die("cannot rename %s: %s; the new checkpoint is %s", final, strerror(errno), tmp);
    if (!exchanged && rename(tmp, final) != 0) die("cannot rename %s: %s", tmp, strerror(errno));
    directory_sync(plan.out_dir);
    // OUT itself may be new.
    std::error_code ignored;
    directory_sync(std::filesystem::weakly_canonical(plan.out_dir, ignored).parent_path().string());
    checkpoint_leftovers(plan.out_dir, true);             // the directory that was replaced
    for (const std::string& replaced : {plan.tmp, plan.old}) std::filesystem::remove_all(replaced, ignored);
}

// Saves OUT/step-<step>. trainer: any JSON but numbers that aren't finite. Where the step exists (the run went back to
// an earlier one), the new directory takes its name in one exchange. On a file system without it, the earlier one is
// first renamed to .step-<step>.old, where checkpoint_newest and the next save find it if nothing came after.
//
// Every rank calls it with the same arguments, and returns when the checkpoint is complete. A rank that fails ends the
// program before it comes to the next sum, where the others wait until the job is ended.
inline void checkpoint_save(const std::string& out_dir, int64_t step, const OlmoeConfig& c, bool bf16, bool masters,
                            const ReadState& read_state, const Json& trainer, const ModelFiles& model,
                            const Savers& savers = {}, size_t max_shard_bytes = 5000000000) {
    const SavePlan plan = save_plan(out_dir, step, c, bf16, masters, model, savers, max_shard_bytes);
    if (savers.rank == 0) save_create(plan);
    save_meet(plan, savers, {});                          // the files are there
    std::vector<double> crcs = save_write(plan, savers, read_state);
    crcs = save_meet(plan, savers, crcs);                 // all ranks' pieces are on the disk
    if (savers.rank == 0) {
        save_manifest(plan, crcs, trainer);
        save_rename(plan);
    }
    save_meet(plan, savers, {});                          // the checkpoint is complete
}

// ------------------------------------------------------------------------------------------------
// Checking, resuming, deleting

// What a run would save now beside weights and state. A checkpoint's JSON is compared with it by meaning, where its
// bytes are not those that were saved.
struct WouldSave { Texts texts; Json trainer; };

// j with its keys in the order of `like`, then the others by name, and with a fraction where `like` has one: as it was
// before a tool sorted it.
inline Json json_ordered(const Json& j, const Json& like) {
    if (j.is_number_integer() && like.is_number_float()) return j.get<double>();
    if (!j.is_object()) return j;
    Json ordered = Json::object();
    if (like.is_object())
        for (auto& [key, value] : like.items())
            if (j.contains(key)) ordered[key] = json_ordered(j[key], value);
    std::map<std::string, Json> rest;
    for (auto& [key, value] : j.items()) if (!ordered.contains(key)) rest[key] = json_ordered(value, nullptr);
    for (auto& [key, value] : rest) ordered[key] = value;
    return ordered;
}

// trainer_state.json, if it is whole. Returns why not, or "".
inline std::string checkpoint_manifest(Json* state, const std::string& dir, const WouldSave& now) {
    std::string contents;
    if (!file_contents(&contents, dir + "/trainer_state.json"))
        return std::string("trainer_state.json: ") + strerror(errno) + "; it is no checkpoint, or a partial one";
    *state = json_parse(contents);
    if (!state->is_object() || !state->contains("crc32"))
        return "trainer_state.json is damaged: not the JSON that was saved";
    const Json crc = (*state)["crc32"];
    state->erase("crc32");
    Json like = {{"step", 0}, {"trainer", now.trainer}, {"files", Json::object()}};
    for (const auto& [name, contents_now] : now.texts) like["files"][name] = nullptr;
    for (const Json& j : {*state, json_ordered(*state, like)}) {
        contents = json_text(j);
        if (crc != crc_text((uint32_t)crc32_z(0, (const Bytef*)contents.data(), contents.size()))) continue;
        *state = j;
        return "";
    }
    return "trainer_state.json is damaged: its checksum differs";
}

// Two JSON texts differ in what no reader sees: layout, order, spelling. A config may also have more keys than was
// saved: config_read refuses those that count.
inline bool json_same(const std::string& name, const std::string& found, const std::string& saved) {
    const nlohmann::json a = json_parse(found), b = json_parse(saved);
    if (!a.is_object() || !b.is_object()) return false;
    if (name != "config.json" && name != "generation_config.json") return a == b;
    auto plain = [](const nlohmann::json& x) { return x.is_array() && x.size() == 1 ? x[0] : x; };     // a list of one
    bool same = true;
    for (auto& [key, value] : b.items()) same = same && plain(a.value(key, nlohmann::json())) == plain(value);
    return same;
}

// What the index of a checkpoint has to be, from its weights.
inline std::string index_of_weights(const std::string& dir, const Json& listed) {
    Json map = Json::object();
    size_t total = 0;
    for (auto& [name, sum] : listed.items()) {
        if (name.rfind("model", 0) != 0 || std::filesystem::path(name).extension() != ".safetensors") continue;
        Safetensors f;
        safetensors_open(&f, dir + "/" + name);
        for (const SafeTensor& t : f.tensors) map[t.name] = name, total += t.bytes;
        safetensors_close(&f);
    }
    return index_text(total, map);
}

// Why a checkpoint can't be trusted, or "". Sizes cost nothing; contents reads every file once, and calls alive()
// meanwhile.
inline std::string checkpoint_damage(const std::string& dir, bool contents, const WouldSave& now = {},
                                     const std::function<void()>& alive = [] {}) {
    Json state;
    const std::string why = checkpoint_manifest(&state, dir, now);
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
        const bool whole = bytes == expected && n == 0 && (!contents || sum["crc32"] == crc_text(crc));
        std::string found, saved;
        for (const auto& [file, its] : now.texts) if (file == name) saved = its;
        // the weights come before their index in the list: they are whole
        if (!whole && name == "model.safetensors.index.json") saved = index_of_weights(dir, state["files"]);
        if (whole || (!saved.empty() && file_contents(&found, dir + "/" + name) && json_same(name, found, saved)))
            continue;
        if (bytes != expected)
            return name + " has " + std::to_string(bytes) + " bytes, saved were " + std::to_string(expected);
        return name + " is damaged: its checksum differs";
    }
    return "";
}

// Dies with the reason when dir is no checkpoint, a partial or a damaged one. Reads every byte of it, so rank 0 does.
inline void checkpoint_check(const std::string& dir, const WouldSave& now = {},
                             const std::function<void()>& alive = [] {}) {
    const std::string why = checkpoint_damage(dir, true, now, alive);
    if (!why.empty()) die("cannot resume from %s: %s", dir.c_str(), why.c_str());
}

// The newest checkpoint of OUT that is whole, or "". A warning on standard error for each newer one that isn't.
// Rank 0 alone.
inline std::string checkpoint_newest(const std::string& out_dir, const WouldSave& now = {},
                                     const std::function<void()>& alive = [] {}) {
    checkpoint_leftovers(out_dir, false);
    for (auto& [step, dir] : checkpoint_list(out_dir)) {
        const std::string why = checkpoint_damage(dir, true, now, alive);
        if (why.empty()) return dir;
        fprintf(stderr, "warning: passing over %s: %s\n", dir.c_str(), why.c_str());
    }
    return "";
}

// What the caller gave to checkpoint_save as `trainer`.
inline Json checkpoint_trainer_state(const std::string& dir, const WouldSave& now = {}) {
    Json state;
    const std::string why = checkpoint_manifest(&state, dir, now);
    if (!why.empty()) die("cannot resume from %s: %s", dir.c_str(), why.c_str());
    return state["trainer"];
}

// Hands over m, v and, when `masters`, master where the file has it, in the ranges and the order that ReadState
// describes: a tensor's chunks, as one rank saves them. Asks for each whether any of it is wanted; no page of the
// others is read.
inline void checkpoint_optimizer_read(
    const std::string& dir, const OlmoeConfig& c, bool masters,
    const std::function<void(State, size_t offset, size_t count, const float* src)>& put,
    const std::function<bool(size_t offset, size_t count)>& wanted = [](size_t, size_t) { return true; }) {
    std::vector<Safetensors> files(1);
    safetensors_open(&files[0], dir + "/optimizer.safetensors");
    std::vector<HfTensor> tensors = hf_tensors(c);
    auto frozen = [](const HfTensor& t) { return t.frozen; };
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), frozen), tensors.end());
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
            if (s.state == State::master && !masters) continue;
            for (size_t done = 0, n; done < h.count; done += n) {
                n = std::min(checkpoint_chunk, h.count - done);
                if (!wanted(h.offset + done, n)) continue;
                tensor_to_float(buffer.data(), t, done, n);
                put(s.state, h.offset + done, n, buffer.data());
            }
        }
    safetensors_close(&files[0]);
}

// Deletes all but the newest keep_last (0: keeps all) and every step that keep_every divides (0: none). A damaged one
// is neither counted nor deleted. Renamed first, so that a kill never leaves a partial directory under a checkpoint's
// name. Rank 0 alone.
inline void checkpoint_prune(const std::string& out_dir, int keep_last, int keep_every, const WouldSave& now = {}) {
    int newer = 0;
    if (keep_last <= 0) return;
    for (auto& [step, dir] : checkpoint_list(out_dir)) {
        if (!checkpoint_damage(dir, false, now).empty() || newer++ < keep_last) continue;
        if (keep_every > 0 && step % keep_every == 0) continue;
        const std::string trash = out_dir + "/." + std::filesystem::path(dir).filename().string() + ".trash";
        std::error_code ignored;
        if (rename(dir.c_str(), trash.c_str()) != 0) die("cannot delete %s: %s", dir.c_str(), strerror(errno));
        directory_sync(out_dir);
        std::filesystem::remove_all(trash, ignored);
    }
}
