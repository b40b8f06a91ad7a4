// Tests of checkpoint.h that need to be inside the process: bad files, kills between any two system calls, full disks,
// the order of syncs, several ranks. tests/test_checkpoint.py builds and runs it, and checks the files' format with a
// reader of its own.
//   test_checkpoint list | GROUP DIR        a group of tests, with DIR to write in
//   test_checkpoint save DIR bf16 step bytes_per_shard | load DIR OUT | half OUT
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
struct OlmoeConfig {
    int L = 0, C = 0, H = 0, V = 0, E = 0, K = 0, F = 0, max_T = 4096;
    float rope_theta = 10000.f, rms_norm_eps = 1e-5f;
    bool norm_topk_prob = false;
    float initializer_range = 0.02f;
    std::vector<int> eos_token_ids = {50279};
    int pad_token_id = 1;
};
#include "../lib/checkpoint.h"
#include <atomic>
#include <chrono>
#include <csignal>
#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

void die(const char* format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(1);
}

// What olmoe.cu makes from its table of tensors, written out by hand
std::vector<HfTensor> hf_tensors(const OlmoeConfig& c) {
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

namespace fs = std::filesystem;
using std::string;
static int checks = 0, failures = 0;
static void check(bool ok, const string& what) {
    checks++;
    if (ok) return;
    failures++;
    printf("FAILED: %s\n", what.c_str());
}

// ------------------------------------------------------------------------------------------------
// The system calls that a save makes: each can fail, kill the process, or be recorded

enum class Trap { none, kill, full };        // at call number trap_at: SIGKILL, or ENOSPC
static Trap trap = Trap::none;
static int trap_at = 0, calls = 0;
static bool exchange_works = true;           // false: a filesystem without RENAME_EXCHANGE
static std::vector<string>* trace = nullptr; // "write PATH", "sync PATH", "rename FROM", ..., "sum "

static string fd_path(int fd) {
    char path[4096];
    ssize_t n = readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof path);
    return n < 0 ? "?" : string(path, (size_t)n);
}

// True: the call is to fail with errno set.
static bool trapped(const char* name, const string& path) {
    if (trace) trace->push_back(string(name) + " " + path);
    if (trap == Trap::none || ++calls != trap_at) return false;
    if (trap == Trap::kill) raise(SIGKILL);
    errno = ENOSPC;
    return true;
}

extern "C" ssize_t pwrite(int fd, const void* data, size_t bytes, off_t at) {
    // A kill in the middle of it
    if (trap == Trap::kill && calls + 1 == trap_at) syscall(SYS_pwrite64, fd, data, bytes / 2, at);
    return trapped("write", fd_path(fd)) ? -1 : syscall(SYS_pwrite64, fd, data, bytes, at);
}
extern "C" int ftruncate(int fd, off_t bytes) noexcept {
    return trapped("write", fd_path(fd)) ? -1 : (int)syscall(SYS_ftruncate, fd, bytes);
}
// A rank waits so for the launcher to end it; here there is none.
extern "C" unsigned sleep(unsigned seconds) { usleep(seconds * 10000); return 0; }
static int folder_error = 0;                 // of syncing a directory; 0: it works
extern "C" int fsync(int fd) {
    if (trapped("sync", fd_path(fd))) return -1;
    if (folder_error && fs::is_directory(fd_path(fd))) return errno = folder_error, -1;
    return (int)syscall(SYS_fsync, fd);
}
extern "C" int mkdir(const char* path, mode_t mode) noexcept {
    return trapped("mkdir", path) ? -1 : (int)syscall(SYS_mkdir, path, mode);
}
extern "C" int rename(const char* from, const char* to) noexcept {
    return trapped("rename", from) ? -1 : (int)syscall(SYS_rename, from, to);
}
extern "C" int renameat2(int a, const char* from, int b, const char* to, unsigned flags) noexcept {
    if (!exchange_works) return errno = EINVAL, -1;
    return trapped("rename", from) ? -1 : (int)syscall(SYS_renameat2, a, from, b, to, flags);
}
extern "C" int unlinkat(int fd, const char* path, int flags) noexcept {
    return trapped("unlink", path) ? -1 : (int)syscall(SYS_unlinkat, fd, path, flags);
}

// ------------------------------------------------------------------------------------------------
// Helpers

struct Outcome { int status; string err; };   // of waitpid; its standard error

static bool exited(const Outcome& o, int code) { return WIFEXITED(o.status) && WEXITSTATUS(o.status) == code; }
static bool contains(const string& text, const string& words) { return text.find(words) != string::npos; }
static bool one_line(const string& text) { return std::count(text.begin(), text.end(), '\n') == 1; }

// Rights to files are those of their mode, for root too.
static void without_privileges() {
    __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    if (syscall(SYS_capset, &header, data) != 0) abort();
}

static Outcome in_child(const std::function<void()>& f) {
    int ends[2];
    if (pipe(ends) != 0) abort();
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], 2);
        close(ends[0]), close(ends[1]);
        f();
        _exit(0);
    }
    close(ends[1]);
    Outcome o{0, ""};
    char buffer[4096];
    ssize_t n;
    while ((n = read(ends[0], buffer, sizeof buffer)) > 0) o.err.append(buffer, (size_t)n);
    close(ends[0]);
    waitpid(pid, &o.status, 0);
    return o;
}

// Exit code 1 and one line on standard error that holds every one of the words.
static void dies(const string& what, const std::vector<string>& words, const std::function<void()>& f) {
    Outcome o = in_child(f);
    bool line = !o.err.empty() && o.err.find('\n') == o.err.size() - 1;
    bool ok = exited(o, 1) && line;
    for (const string& w : words) ok = ok && contains(o.err, w);
    string expected;
    for (const string& w : words) expected += " \"" + w + "\"";
    check(ok, what + ": expected one line with" + expected + ", got status " + std::to_string(o.status) + ": " + o.err);
}

static string slurp(const string& path) {
    string text;
    if (!file_contents(&text, path)) { printf("cannot read %s\n", path.c_str()); exit(2); }
    return text;
}
static void spill(const string& path, const string& text) {
    FILE* f = fopen(path.c_str(), "wb");
    bool ok = f && fwrite(text.data(), 1, text.size(), f) == text.size() && fclose(f) == 0;
    if (!ok) { printf("cannot write %s\n", path.c_str()); exit(2); }
}
static void fresh(const string& dir) { fs::remove_all(dir), fs::create_directories(dir); }
static std::map<string, string> files_of(const string& dir) {
    std::map<string, string> all;
    std::error_code none;                     // no directory, no files
    for (auto& e : fs::directory_iterator(dir, none)) all[e.path().filename().string()] = slurp(e.path().string());
    return all;
}
static ptrdiff_t entries_of(const string& dir) {
    return std::distance(fs::directory_iterator(dir), fs::directory_iterator());
}

static OlmoeConfig little() {   // 19 tensors, 192 parameters
    OlmoeConfig c;
    c.L = 1, c.C = 4, c.H = 2, c.V = 5, c.E = 2, c.K = 1, c.F = 3, c.eos_token_ids = {4}, c.pad_token_id = -1;
    return c;
}

// The value of element i of a state in generation g: 24 bits of a hash, so exact in float and in Python's arithmetic.
static float value(State s, size_t i, int g) {
    uint32_t hash = (uint32_t)i * 2654435761u + (uint32_t)s * 40503u + (uint32_t)g * 97u;
    return (float)(hash >> 8) * 0x1p-24f - 0.5f;
}
static uint16_t upper(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (uint16_t)(bits >> 16);
}

// Element i of what checkpoint_save asks for.
static void put(void* dst, size_t i, float f, bool narrow) {
    uint16_t half = upper(f);
    if (narrow) memcpy((char*)dst + 2 * i, &half, 2);
    else memcpy((char*)dst + 4 * i, &f, 4);
}

static void save(const string& out, int64_t step, bool bf16, int g, const OlmoeConfig& c = little(),
                 const string& tokenizer = "", size_t shard = 5000000000, const Savers& savers = {}) {
    auto read = [&](State s, size_t offset, size_t count, void* dst) {
        auto [rank, end] = savers.owner(offset);
        if (rank != savers.rank || offset + count > end)
            die("rank %d is asked for [%zu, %zu)", savers.rank, offset, offset + count);
        for (size_t i = 0; i < count; i++) put(dst, i, value(s, offset + i, g), s == State::weights && bf16);
    };
    const Json state = {{"g", g}, {"seen", 1234567890123456789}, {"loss", 0.1}};
    const ModelFiles files = {nullptr, tokenizer.empty() ? Texts{} : Texts{{"tokenizer.json", tokenizer}}};
    checkpoint_save(out, step, c, bf16, bf16, read, state, files, savers, shard);
}
static int generation(const string& dir) { return checkpoint_trainer_state(dir)["g"].get<int>(); }
static string step_dir(const string& out, int step) {
    char name[32];
    snprintf(name, sizeof name, "/step-%08d", step);
    return out + name;
}
// checkpoint_newest and its standard error; the last number of the path, or -1 for "".
static int newest(const string& out, string* printed = nullptr) {
    FILE* f = tmpfile();
    int err = dup(2);
    dup2(fileno(f), 2);
    string dir = checkpoint_newest(out);
    fflush(stderr);
    dup2(err, 2), close(err);
    rewind(f);
    char line[4096];
    if (printed) printed->clear();
    while (printed && fgets(line, sizeof line, f)) *printed += line;
    fclose(f);
    return dir.empty() ? -1 : atoi(dir.substr(dir.rfind('-') + 1).c_str());
}

// ------------------------------------------------------------------------------------------------
// Groups

static void test_config(const string& dir) {
    const string path = dir + "/config.json";
    auto reads = [&](const Json& j) { spill(path, j.dump()); OlmoeConfig c; config_read(&c, dir); return c; };
    auto refused = [&](const Json& j, const std::vector<string>& words) {
        dies(j.dump().substr(0, 100), words, [&] { reads(j); });
    };
    OlmoeConfig c = little();
    c.rope_theta = 123456.7f, c.rms_norm_eps = 1e-6f, c.norm_topk_prob = true, c.initializer_range = 0.01f;
    c.max_T = 77, c.pad_token_id = 2;
    const Json good = config_json(c, true);
    OlmoeConfig r = reads(good);
    bool sizes = r.L == c.L && r.C == c.C && r.H == c.H && r.V == c.V && r.E == c.E && r.K == c.K && r.F == c.F;
    check(sizes && r.max_T == 77, "sizes come back");
    check(r.rope_theta == c.rope_theta && r.rms_norm_eps == c.rms_norm_eps && r.norm_topk_prob
          && r.initializer_range == c.initializer_range, "numbers come back to the bit");
    check(r.eos_token_ids == std::vector<int>{4} && r.pad_token_id == 2, "tokens come back");
    check(good["rms_norm_eps"].dump() == "1e-06" && good["torch_dtype"] == "bfloat16"
          && config_json(c, false)["torch_dtype"] == "float32", "printed as people write them");

    auto with = [&](const char* key, const Json& v) { Json j = good; j[key] = v; return j; };
    auto without = [&](Json j, const char* key) { j.erase(key); return j; };
    check(reads(with("pad_token_id", nullptr)).pad_token_id == -1, "null is no token");
    check(reads(without(good, "pad_token_id")).pad_token_id == 1
          && reads(without(good, "eos_token_id")).eos_token_ids == OlmoeConfig().eos_token_ids,
          "absent tokens are the class's");
    check(reads(without(good, "rope_parameters")).rope_theta == c.rope_theta, "transformers 4's rope_theta");
    check(reads(without(good, "rope_theta")).rope_theta == c.rope_theta, "transformers 5's rope_parameters");
    check(reads(without(without(good, "rope_theta"), "rope_parameters")).rope_theta == 10000.f, "absent theta");
    const Json spelled_out = {{"rope_theta", c.rope_theta}, {"rope_type", "default"}, {"partial_rotary_factor", 1.0}};
    check(reads(with("rope_parameters", spelled_out)).rope_theta == c.rope_theta, "spelled-out defaults");
    check(reads(with("dtype", "bfloat16")).C == c.C && reads(with("clip_qkv", nullptr)).C == c.C,
          "dtype beside torch_dtype");
    spill(path, good.dump().insert(1, "\"more\": [1e400, -1e999, \"1e400\"], ")), config_read(&r, dir);
    check(r.C == c.C && json_read(path)["more"] == Json({1e308, -1e308, "1e400"}), "numbers that no double holds");
    spill(path, "{\"more\": 1e400, \"none\": 01e400}");
    dies("no number", {path, "not a JSON object"}, [&] { json_read(path); });
    spill(path, without(good, "rms_norm_eps").dump().insert(1, "\"rms_norm_eps\": 1e400, "));
    dies("no number for a float", {path, "rms_norm_eps"}, [&] { config_read(&r, dir); });
    check(reads(without(without(good, "rms_norm_eps"), "norm_topk_prob")).rms_norm_eps == 1e-5f, "absent epsilon");

    // Other spellings of the same
    auto same = [&](const char* key, const Json& v) { return config_json(reads(with(key, v)), true) == good; };
    for (const Json& v : {Json(4.0), Json::array({4}), Json::array({4, 4}), Json::array({nullptr, 4})})
        check(same("eos_token_id", v), "eos_token_id " + v.dump());
    for (const Json& v : {Json(nullptr), Json::object(), Json{{"rope_type", "default"}},
                          Json{{"type", "default"}, {"factor", 1.0}, {"rope_theta", c.rope_theta}},
                          Json{{"rope_type", "default"}, {"attention_factor", nullptr}}})
        check(same("rope_scaling", v) && same("rope_parameters", v), "rope_scaling " + v.dump());
    check(same("hidden_size", 4.0) && same("vocab_size", 5e0), "sizes with a fraction of zero");
    check(same("hidden_act", "swish") && same("dtype", "bfloat16") && same("num_key_value_heads", 2.0), "two names");
    for (const Json& v : {Json(-1), Json(nullptr), Json::array(), Json::array({-1})}) {
        r = reads(with("eos_token_id", v));
        check(r.eos_token_ids.empty() && config_json(r, true)["eos_token_id"].is_null(), "no eos: " + v.dump());
        check(reads(with("pad_token_id", v)).pad_token_id == -1, "no padding: " + v.dump());
    }
    r = reads(with("eos_token_id", Json::array({4, 2, 4})));
    check(r.eos_token_ids == std::vector<int>{4, 2} && config_json(r, true)["eos_token_id"] == Json::array({4, 2}),
          "a list of eos");
    for (double tiny : {0.0, 1e-300, 1e-40})
        check(reads(with("rms_norm_eps", tiny)).rms_norm_eps == (float)tiny
              && reads(with("initializer_range", tiny)).initializer_range == (float)tiny, "the end of the range");

    for (const char* key : {"num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_experts",
                            "num_experts_per_tok", "intermediate_size"}) {
        refused(without(good, key), {path, key, "missing"});
        for (const Json& v : {Json(0), Json(-1), Json(2.5), Json("4"), Json(true), Json(1e30), Json(5000000000),
                              Json(18446744073709551615u), Json::array()})
            refused(with(key, v), {path, key, "must be an integer"});
    }
    for (const Json& v : {Json(0), Json(-1.0), Json("x"), Json(1e300), Json(1e-300), Json(false)})
        refused(with("rope_theta", v), {path, "rope_theta", "must be a number above 0"});
    for (const char* key : {"rms_norm_eps", "initializer_range"})
        for (const Json& v : {Json(-1e-9), Json("x"), Json(1e300), Json(false)})
            refused(with(key, v), {path, key, "must be a number not below 0"});
    refused(with("max_position_embeddings", 0), {"max_position_embeddings"});
    refused(with("num_attention_heads", 3), {"hidden_size 4", "num_attention_heads 3"});
    refused(with("num_attention_heads", 4), {"even"});
    refused(with("num_experts_per_tok", 3), {"num_experts_per_tok 3", "num_experts 2"});
    refused(with("norm_topk_prob", 1), {"norm_topk_prob", "true or false"});
    for (const Json& v : {Json(-2), Json("a"), Json(1.5), Json::array({1, "a"}), Json::array({Json::array({1})})})
        refused(with("eos_token_id", v), {path, "eos_token_id", "must be an integer"});
    refused(with("pad_token_id", Json::array({1, 2})), {"pad_token_id", "[1,2]"});
    Json huge = with("hidden_size", 1 << 20);
    huge["intermediate_size"] = 1 << 20, huge["num_experts"] = 4096, huge["num_hidden_layers"] = 1024;
    refused(huge, {"parameters"});

    const std::vector<std::pair<const char*, Json>> unsupported = {
        {"clip_qkv", 8.0}, {"num_key_value_heads", 1}, {"tie_word_embeddings", true}, {"attention_bias", true},
        {"attention_dropout", 0.1}, {"hidden_act", "gelu"}, {"model_type", "llama"}, {"head_dim", 4},
        {"quantization_config", {{"bits", 4}}}, {"rope_scaling", {{"type", "linear"}, {"factor", 2}}},
        {"rope_scaling", {{"rope_type", "default"}, {"factor", 2}}}, {"rope_scaling", {{"rope_type", "yarn"}}},
        {"torch_dtype", "float8_e4m3fn"}, {"dtype", "int8"}};
    for (auto& [key, v] : unsupported) refused(with(key, v), {path, key, "not supported"});
    refused(without(good, "model_type"), {"model_type", "missing"});
    refused(with("dtype", "float32"), {"dtype", "torch_dtype"});
    refused(with("rope_theta", 5.0), {"rope_theta", "rope_parameters.rope_theta"});
    refused(with("rope_parameters", {{"rope_type", "yarn"}, {"factor", 4}}), {"rope_parameters.rope_type", "yarn"});
    refused(with("rope_parameters", {{"rope_theta", 123456.7}, {"factor", 4}}), {"rope_parameters.factor"});
    refused(with("rope_parameters", {{"partial_rotary_factor", 0.5}}), {"rope_parameters.partial_rotary_factor"});
    refused(with("rope_parameters", 3), {"rope_parameters", "object"});
    refused(with("rope_scaling", "linear"), {"rope_scaling", "object"});
    refused(with("rope_scaling", {{"rope_theta", 5.0}}), {"rope_theta is 123457", "rope_scaling.rope_theta is 5"});
    refused(with("hidden_act", "a\nb\x01"), {"hidden_act", "not supported"});   // still one line
    for (const char* text : {"", "[]", "{", "{\"vocab_size\": }", "\xff\xfe", "nul", "{\"a\":1}}"})
        dies(text, {path, "JSON"}, [&] { spill(path, text); OlmoeConfig d; config_read(&d, path); });
    dies("absent", {"/nowhere", "No such file"}, [] { OlmoeConfig d; config_read(&d, "/nowhere"); });
    fs::remove(path);
    dies("empty directory", {dir, "config.json", "No such file"}, [&] { OlmoeConfig d; config_read(&d, dir); });
}

static void test_tensors(const string&) {
    OlmoeConfig c = little();
    std::vector<HfTensor> t = hf_tensors(c);
    const std::vector<std::pair<string, std::vector<int64_t>>> expected = {
        {"model.embed_tokens", {5, 4}},
        {"model.layers.0.input_layernorm", {4}},
        {"model.layers.0.self_attn.q_proj", {4, 4}},
        {"model.layers.0.self_attn.k_proj", {4, 4}},
        {"model.layers.0.self_attn.v_proj", {4, 4}},
        {"model.layers.0.self_attn.q_norm", {4}},
        {"model.layers.0.self_attn.k_norm", {4}},
        {"model.layers.0.self_attn.o_proj", {4, 4}},
        {"model.layers.0.post_attention_layernorm", {4}},
        {"model.layers.0.mlp.gate", {2, 4}},
        {"model.layers.0.mlp.experts.0.gate_proj", {3, 4}},
        {"model.layers.0.mlp.experts.0.up_proj", {3, 4}},
        {"model.layers.0.mlp.experts.1.gate_proj", {3, 4}},
        {"model.layers.0.mlp.experts.1.up_proj", {3, 4}},
        {"model.layers.0.mlp.experts.0.down_proj", {4, 3}},
        {"model.layers.0.mlp.experts.1.down_proj", {4, 3}},
        {"model.norm", {4}},
        {"lm_head", {5, 4}}};
    check(t.size() == 18, "18 tensors");
    size_t offset = 0;
    for (size_t i = 0; i < t.size() && i < 18; i++) {
        auto& [name, shape] = expected[i];
        check(t[i].name == name + ".weight" && t[i].shape == shape, t[i].name + " in its place");
        check(t[i].offset == offset, t[i].name + " follows the one before");
        offset += t[i].count;
    }
    OlmoeConfig o;
    o.L = 16, o.C = 2048, o.H = 16, o.V = 50304, o.E = 64, o.K = 8, o.F = 1024;
    t = hf_tensors(o);
    check(t.size() == 3219 && t.back().offset + t.back().count == 6919161856,
          "OLMoE-1B-7B has 3219 tensors, 6,919,161,856 elements");
}

static string packed(const string& header, const string& data, int64_t length = -1) {
    uint64_t n = length < 0 ? header.size() : (uint64_t)length;
    return string((const char*)&n, 8) + header + data;
}

static void test_safetensors(const string& dir) {
    const string path = dir + "/x.safetensors";
    auto opens = [&](const string& bytes) { spill(path, bytes); Safetensors f; safetensors_open(&f, path); return f; };
    auto refused = [&](const string& what, const string& bytes, const std::vector<string>& words) {
        dies(what, words, [&] { opens(bytes); });
    };
    const string a = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})", eight(8, 'x'), twelve(12, 'x');
    auto header = [](const string& dtype, const string& shape, const string& range) {
        return "{\"a\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + range + "}}";
    };

    Safetensors f = opens(packed(R"({"z":{"dtype":"U8","shape":[],"data_offsets":[8,9]},)"
                                 R"("e":{"dtype":"F64","shape":[3,0],"data_offsets":[8,8]},)"
                                 R"("__metadata__":{"k":"v"},)" + a + "}   ", "12345678!"));
    check(f.tensors.size() == 3 && f.tensors[0].name == "a" && f.tensors[1].name == "e" && f.tensors[2].name == "z",
          "tensors in the order of their data");
    const SafeTensor* z = f.find("z");
    check(z && *z->data == '!' && z->shape.empty() && z->bytes == 1, "a scalar");
    check(!f.find("b") && f.metadata["k"] == "v", "metadata");
    safetensors_close(&f);
    f = opens(packed("{}", ""));
    check(f.tensors.empty(), "a file without tensors");
    safetensors_close(&f);

    refused("empty file", "", {path, "truncated"});
    refused("seven bytes", "1234567", {path, "truncated"});
    refused("header length past the end", packed("{" + a + "}", eight, 1000), {path, "truncated"});
    refused("header length of 2^63", packed("{}", "", INT64_MAX), {path, "truncated"});
    refused("header length one less", packed("{" + a + "}", eight, (int64_t)a.size() + 1), {path, "JSON"});
    refused("no JSON", packed("hello", ""), {path, "JSON"});
    refused("an array", packed("[1,2]", ""), {path, "JSON"});
    refused("not UTF-8", packed("{\"\xff\":1}", ""), {path, "JSON"});
    refused("twice", packed("{" + a + "," + a + "}", eight), {path, "twice", "\"a\""});
    refused("tensor not an object", packed(R"({"a":3})", ""), {path, "\"a\""});
    refused("metadata not strings", packed(R"({"__metadata__":{"a":1}})", ""), {path, "__metadata__"});
    refused("metadata not an object", packed(R"({"__metadata__":null})", ""), {path, "__metadata__"});
    refused("no offsets", packed(R"({"a":{"dtype":"F32","shape":[2]}})", eight), {path, "\"a\"", "data_offsets"});
    refused("no shape", packed(R"({"a":{"dtype":"F32","data_offsets":[0,8]}})", eight), {path, "\"a\"", "shape"});
    refused("no dtype", packed(R"({"a":{"shape":[2],"data_offsets":[0,8]}})", eight), {path, "\"a\"", "dtype"});
    refused("dtype f32", packed(header("f32", "[2]", "[0,8]"), eight), {path, "\"a\"", "dtype \"f32\""});
    refused("negative size", packed(header("F32", "[-2]", "[0,8]"), eight), {path, "shape"});
    refused("fractional size", packed(header("F32", "[2.0]", "[0,8]"), eight), {path, "shape"});
    refused("size of 2^64", packed(header("F32", "[18446744073709551616]", "[0,8]"), eight), {path, "shape"});
    refused("three offsets", packed(header("F32", "[2]", "[0,8,8]"), eight), {path, "data"});
    refused("offsets reversed", packed(header("F32", "[2]", "[8,0]"), eight), {path, "data"});
    refused("offsets past the end", packed(header("F32", "[2]", "[4,12]"), eight), {path, "truncated"});
    refused("data one byte short", packed(header("F32", "[2]", "[0,8]"), "1234567"), {path, "truncated"});
    refused("shape and bytes differ", packed(header("F32", "[3]", "[0,8]"), eight), {path, "\"a\"", "[3]"});
    // 2^62 * 4 floats wrap to 0 bytes, 2^32 * 2^32 to 0 elements.
    refused("wrapping shape", packed(header("F32", "[4611686018427387904,4]", "[0,0]"), ""),
            {path, "\"a\"", "does not take"});
    refused("wrapping product", packed(header("U8", "[4294967296,4294967296]", "[0,0]"), ""),
            {path, "\"a\"", "does not take"});
    auto and_b = [&](const string& b) { return "{" + a + ",\"b\":" + b + "}"; };
    refused("overlap", packed(and_b(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})"), twelve),
            {path, "\"b\"", "overlaps"});
    refused("same data twice", packed(and_b(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})"), eight),
            {path, "overlaps"});
    refused("hole", packed(and_b(R"({"dtype":"U8","shape":[2],"data_offsets":[10,12]})"), twelve),
            {path, "\"b\"", "hole"});
    refused("hole at the front", packed(header("F32", "[1]", "[4,8]"), eight), {path, "\"a\"", "hole"});
    refused("data after the last tensor", packed("{" + a + "}", twelve), {path, "12 bytes of data", "8"});
    refused("a name of two lines", packed("{\"a\\nb\\u0000\":{}}", ""), {path, "a\\nb"});
    refused("deep nesting", packed(string(200000, '['), ""), {path, "JSON"});
    dies("a directory", {dir}, [&] { Safetensors d; safetensors_open(&d, dir); });
    dies("absent", {"No such file"}, [&] { Safetensors d; safetensors_open(&d, dir + "/absent"); });

    // Every truncation is refused; every flipped bit of the header is refused or harmless, never a crash.
    const string good = packed(and_b(R"({"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]})"), twelve);
    for (size_t n = 0; n < good.size(); n++) refused("cut at " + std::to_string(n), good.substr(0, n), {path});
    for (size_t i = 0; i < good.size() - 12; i++) {
        string bad = good;
        bad[i] = (char)(bad[i] ^ 1 << i % 8);
        Outcome o = in_child([&] { Safetensors g = opens(bad); safetensors_close(&g); });
        bool harmless = exited(o, 0) && o.err.empty(), refused_it = exited(o, 1) && one_line(o.err);
        check(harmless || refused_it, "flip at " + std::to_string(i) + ": " + o.err);
    }

    f = opens(packed(R"({"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}})", eight));
    float two[2];
    dies("I32 as float", {"I32"}, [&] { tensor_to_float(two, f.tensors[0], 0, 2); });
    dies("past the end", {"[1, 3)"}, [&] { tensor_to_float(two, f.tensors[0], 1, 2); });
    safetensors_close(&f);

    const string bytes = safetensors_header({{"a", "F32", {2}}, {"b\"", "U8", {}}}) + "123456786";
    f = opens(bytes);
    check(f.find("a") && f.find("b\"") && *f.find("b\"")->data == '6' && f.metadata["format"] == "pt", "reads back");
    check((size_t)(f.tensors[0].data - (unsigned char*)f.map) % 8 == 0, "aligned");
    safetensors_close(&f);
}

// A directory of weights with the tensors of c, changed by `edit`, in one file or two with an index.
using Edit = std::function<void(std::vector<TensorInfo>&)>;
static void write_model(const string& dir, const OlmoeConfig& c, bool sharded, const Edit& edit) {
    fresh(dir);
    std::vector<TensorInfo> infos;
    for (const HfTensor& h : hf_tensors(c)) infos.push_back({h.name, "F32", h.shape});
    edit(infos);
    Json map = Json::object();
    for (size_t s = 0; s < (sharded ? 2 : 1); s++) {
        const string file = !sharded ? "model.safetensors" : s ? "b.safetensors" : "a.safetensors";
        std::vector<TensorInfo> part(infos.begin() + (s ? 7 : 0), sharded && !s ? infos.begin() + 7 : infos.end());
        string text = safetensors_header(part);
        for (const TensorInfo& t : part) {
            size_t n = dtype_bytes(t.dtype);
            for (int64_t d : t.shape) n *= (size_t)d;
            text.append(n, 0), map[t.name] = file;
        }
        spill(dir + "/" + file, text);
    }
    if (sharded) spill(dir + "/model.safetensors.index.json", Json{{"weight_map", map}}.dump());
}

static void test_weights(const string& base) {
    const OlmoeConfig c = little();
    const string dir = base + "/model", index = dir + "/model.safetensors.index.json";
    auto opens = [&] { ModelWeights w; weights_open(&w, dir, c); weights_close(&w); };
    auto none = [](std::vector<TensorInfo>&) {};
    for (bool sharded : {false, true}) {
        const string kind = sharded ? "shards: " : "one file: ";
        auto refused = [&](const string& what, const std::vector<string>& words, const Edit& edit) {
            write_model(dir, c, sharded, edit);
            dies(kind + what, words, opens);
        };
        write_model(dir, c, sharded, none);
        opens();
        const string bias = "model.layers.0.self_attn.q_proj.bias", second = "model.layers.1.input_layernorm.weight";
        refused("a tensor short", {"model.layers.0.mlp.experts.1.up_proj.weight", "missing"},
                [](auto& t) { t.erase(t.begin() + 13); });
        refused("an extra tensor", {"unexpected", bias}, [&](auto& t) { t.push_back({bias, "F32", {4}}); });
        refused("a layer too many", {"unexpected", second}, [&](auto& t) { t.push_back({second, "F32", {4}}); });
        refused("transposed", {"model.layers.0.mlp.experts.0.down_proj.weight", "[3,4]", "[4,3]"},
                [](auto& t) { t[14].shape = {3, 4}; });
        refused("integers", {"model.norm.weight", "I32"}, [](auto& t) { t[16].dtype = "I32"; });
    }
    write_model(dir, c, true, none);
    fs::remove(dir + "/b.safetensors");
    dies("a shard short", {dir + "/b.safetensors", "No such file"}, opens);
    write_model(dir, c, true, none);
    const string text = slurp(index);
    Json j = Json::parse(text);
    j["weight_map"]["lm_head.weight"] = "a.safetensors";
    spill(index, j.dump());
    dies("index names the wrong shard", {"b.safetensors", "lm_head.weight", "index"}, opens);
    j["weight_map"]["lm_head.weight"] = "../b.safetensors";
    spill(index, j.dump());
    dies("a shard elsewhere", {index, "lm_head.weight"}, opens);
    j["weight_map"]["lm_head.weight"] = 3;
    spill(index, j.dump());
    dies("a shard that is a number", {index, "lm_head.weight"}, opens);
    spill(index, "{}");
    dies("an empty index", {index, "weight_map"}, opens);
    spill(index, text.substr(0, text.size() / 2));
    dies("half an index", {index, "JSON"}, opens);
    const string b = slurp(dir + "/b.safetensors");
    spill(index, text);
    spill(dir + "/b.safetensors", b.substr(0, b.size() - 1));
    dies("a truncated shard", {dir + "/b.safetensors", "truncated"}, opens);
    spill(dir + "/b.safetensors", b);
    string dotted = text;
    for (size_t at = 0; (at = dotted.find("\"b.safe", at)) != string::npos; at += 9) dotted.insert(at + 1, "./");
    spill(index, dotted);
    opens();
    fresh(dir);
    dies("an empty directory", {dir, "model.safetensors", "is it a model's directory?"}, opens);
    const std::vector<std::pair<const char*, const char*>> others = {
        {"pytorch_model.bin", "pickle"}, {"pytorch_model-00001-of-00002.bin", "pickle"}, {"model.pt", "pickle"},
        {"olmoe-q4.gguf", "GGUF"}, {"adapter_model.safetensors", "PEFT"}, {"__0_0.distcp", "distributed"},
        {"model-00001-of-00003.safetensors", "index"}, {"weights.safetensors", "no name"}};
    for (auto& [file, what] : others) {
        fresh(dir);
        spill(dir + "/config.json", "{}"), spill(dir + "/optimizer.safetensors", ""), spill(dir + "/" + file, "");
        dies(file, {dir + ": ", file, what}, opens);
    }
}

// The same model under other names, and its experts in two tensors.
static void test_layouts(const string& base) {
    const OlmoeConfig c = little();
    const string dir = base + "/model", file = dir + "/model.safetensors", layer = "model.layers.0.";
    auto opens = [&] { ModelWeights w; weights_open(&w, dir, c); weights_close(&w); };
    auto write = [&](const std::vector<TensorInfo>& infos) {
        string text = safetensors_header(infos);
        size_t n = 0;
        for (const TensorInfo& t : infos) {
            size_t count = 1;
            for (int64_t d : t.shape) count *= (size_t)d;
            for (size_t i = 0; i < count; i++) {
                const float x = (float)n++;
                text.append((const char*)&x, 4);
            }
        }
        fresh(dir);
        spill(file, text);
    };
    std::vector<TensorInfo> fused, plain;
    for (const HfTensor& h : hf_tensors(c)) {
        plain.push_back({h.name, "F32", h.shape});
        const bool expert = h.name.find(".experts.") != string::npos;
        if (!expert) fused.push_back(plain.back());
        if (h.name == layer + "mlp.experts.0.gate_proj.weight") {
            fused.push_back({layer + "mlp.experts.gate_up_proj", "F32", {2, 6, 4}});
            fused.push_back({layer + "mlp.experts.down_proj", "F32", {2, 4, 3}});
        }
    }
    fused.push_back({layer + "self_attn.rotary_emb.inv_freq", "F32", {1}});
    write(fused);
    ModelWeights w;
    weights_open(&w, dir, c);
    bool same = true;                       // little()'s flat order is that of the file
    for (size_t i = 0; i < plain.size(); i++) {
        const HfTensor h = hf_tensors(c)[i];
        std::vector<float> got(h.count);
        tensor_to_float(got.data(), weights_tensor(w, i), 0, h.count);
        for (size_t k = 0; k < h.count; k++) same = same && got[k] == (float)(h.offset + k);
    }
    check(same, "experts in two tensors are the same experts");
    weights_close(&w);
    for (size_t i : {0, 1}) {
        std::vector<TensorInfo> bad = fused;
        for (TensorInfo& t : bad)
            if (t.name == layer + (i ? "mlp.experts.down_proj" : "mlp.experts.gate_up_proj"))
                std::swap(t.shape[1], t.shape[2]);
        write(bad);
        dies("transposed", {file, i ? "down_proj" : "gate_up_proj", i ? "[2,4,3]" : "[2,6,4]"}, opens);
    }
    auto renamed = [&](const std::function<string(string)>& name, const string& what) {
        std::vector<TensorInfo> other = plain;
        for (TensorInfo& t : other) t.name = name(t.name);
        write(other);
        dies(what, {file, "missing", what}, opens);
    };
    renamed([](string s) { return "module." + s; }, "DistributedDataParallel");
    renamed([](string s) { return "_orig_mod." + s; }, "torch.compile");
    renamed([](string s) { return "base_model.model." + s; }, "PEFT");
    renamed([](string s) { return s.rfind("model.", 0) == 0 ? s.substr(6) : s; }, "OlmoeModel");
    renamed([](string s) { return "transformer.blocks.0." + s; }, "OLMo's own");
    renamed([](string s) { return "blk.0." + s; }, "GGUF");
}

// A number that is not finite is saved under no name, and the earlier checkpoint stays.
static void not_finite(const string& out, bool narrow, State bad, float number) {
    const string name = "model.layers.0.self_attn.q_norm.weight";
    fresh(out);
    save(out, 1, narrow, 1);
    auto kept = files_of(out + "/step-00000001");
    const string where = bad == State::weights ? "finite. E" : "in AdamW's state. E";
    dies("not finite", {"step 2 is not saved", name + " has a number that is not finite", where}, [&] {
        const OlmoeConfig c = little();
        size_t at = 0;
        for (const HfTensor& t : hf_tensors(c))
            if (t.name == name) at = t.offset + t.count - 1;
        checkpoint_save(out, 2, c, narrow, narrow, [&](State s, size_t offset, size_t count, void* dst) {
            for (size_t i = 0; i < count; i++) {
                float f = s == bad && offset + i == at ? number : value(s, offset + i, 1);
                put(dst, i, f, s == State::weights && narrow);
            }
        }, {{"a", 1}}, {});
    });
    check(files_of(out + "/step-00000001") == kept && entries_of(out) == 1, "the earlier checkpoint is all there is");
}

// What was saved comes back, to the bit and in the promised ranges.
static void test_roundtrip(const string& dir) {
    OlmoeConfig c = little();
    c.V = 270000, c.L = 2;   // embedding of 1,080,000 elements: more than a chunk
    const std::vector<HfTensor> tensors = hf_tensors(c);
    size_t total = tensors.back().offset + tensors.back().count;
    for (bool bf16 : {false, true})
        for (size_t shard : {(size_t)5000000000, (size_t)3000000}) {
            const string out = dir + "/out", at = step_dir(out, 7);
            const string what = string(bf16 ? "BF16 " : "FP32 ") + std::to_string(shard) + ": ";
            fresh(out);
            std::vector<size_t> end(4, 0);            // per state, how far it was read
            bool order = true;
            auto follows = [&](State s, size_t offset, size_t count) {   // ascending, inside a tensor, a chunk at most
                bool inside = false;
                for (const HfTensor& h : tensors)
                    inside = inside || (offset >= h.offset && offset + count <= h.offset + h.count);
                for (int later = (int)s + 1; later < 4; later++) order = order && end[(size_t)later] == 0;
                order = order && inside && count <= checkpoint_chunk && offset == end[(size_t)s];
                end[(size_t)s] += count;
            };
            const Json state = {{"a", 1}, {"pi", 3.141592653589793}, {"big", 18446744073709551615u},
                                {"text", "\xc3\xa9\n"}};
            checkpoint_save(out, 7, c, bf16, bf16, [&](State s, size_t offset, size_t count, void* dst) {
                follows(s, offset, count);
                for (size_t i = 0; i < count; i++) put(dst, i, value(s, offset + i, 1), s == State::weights && bf16);
            }, state, {}, {}, shard);
            check(order && end == std::vector<size_t>({total, total, total, bf16 ? total : 0}),
                  what + "states are read as promised");
            checkpoint_check(at);
            const Json t = checkpoint_trainer_state(at);
            check(t.size() == 4 && t["pi"] == 3.141592653589793 && t["big"] == 18446744073709551615u
                  && t["text"] == "\xc3\xa9\n", what + "trainer state");
            check(fs::exists(at + "/model.safetensors") == (shard > 1e9), what + "sharded as asked");

            OlmoeConfig r;
            config_read(&r, at);
            ModelWeights w;
            weights_open(&w, at, r);
            bool same = r.V == c.V && r.L == 2;
            for (size_t i = 0; i < tensors.size(); i++) {
                std::vector<float> got(tensors[i].count);
                tensor_to_float(got.data(), weights_tensor(w, i), 0, 1);
                tensor_to_float(got.data() + 1, weights_tensor(w, i), 1, got.size() - 1);
                for (size_t k = 0; k < got.size(); k++) {
                    float f = value(State::weights, tensors[i].offset + k, 1);
                    uint32_t bits = (uint32_t)upper(f) << 16;
                    if (bf16) memcpy(&f, &bits, 4);
                    same = same && got[k] == f;
                }
            }
            check(same, what + "weights come back");
            weights_close(&w);

            end.assign(4, 0), order = true, same = true;
            checkpoint_optimizer_read(at, r, bf16, [&](State s, size_t offset, size_t count, const float* src) {
                follows(s, offset, count);
                for (size_t i = 0; i < count; i++) same = same && src[i] == value(s, offset + i, 1);
            });
            check(order && end == std::vector<size_t>({0, total, total, bf16 ? total : 0}),
                  what + "optimizer handed over as promised");
            check(same, what + "optimizer comes back");
            size_t asked = 0, wanted = 0, got = 0;
            auto third = [](size_t offset, size_t count) { return (offset + count) % 3 == 0; };
            auto give = [&](State, size_t offset, size_t count, const float*) {
                got += third(offset, count) ? 1 : 1000000;
            };
            checkpoint_optimizer_read(at, r, bf16, give, [&](size_t offset, size_t count) {
                asked += count, wanted += third(offset, count);
                return third(offset, count);
            });
            check(asked == (bf16 ? 3 : 2) * total && wanted > 0 && got == wanted,
                  what + "only what is wanted is handed over");
            end.assign(4, 0), order = true;
            checkpoint_optimizer_read(at, r, !bf16, [&](State s, size_t offset, size_t count, const float*) {
                follows(s, offset, count);
            });
            check(order && end == std::vector<size_t>({0, total, total, 0}),
                  what + "masters that are not there, or not wanted, are not handed over");
            auto reads = [&] { checkpoint_optimizer_read(at, r, bf16, [](State, size_t, size_t, const float*) {}); };
            r.L = 3;
            dies(what + "more layers", {"model.layers.2.input_layernorm.weight", "missing"}, reads);
            r.L = 1;
            dies(what + "fewer layers", {"unexpected", "m.model.layers.1."}, reads);
            r.L = 2, r.F = 4;
            dies(what + "wider experts", {"experts.0.gate_proj.weight", "[3,4]", "[4,4]"}, reads);
        }
    // The bytes are those of the arguments: another place, another save, the same files.
    const string one = dir + "/one", two = dir + "/a/longer/path";
    const string tokenizer = "{\"tokens\": 1}\n";
    save(one, 3, true, 5, little(), tokenizer, 100);
    save(one, 3, true, 6, little(), "", 100);
    save(one, 3, true, 5, little(), tokenizer, 100);
    save(two, 3, true, 5, little(), tokenizer, 100);
    auto left = files_of(one + "/step-00000003"), right = files_of(two + "/step-00000003");
    check(left == right && left.size() >= 8 && left["tokenizer.json"] == tokenizer, "bytes do not depend on the path");
    for (bool narrow : {false, true})
        for (State bad : {State::weights, State::m, State::v, State::master})
            for (float number : {NAN, INFINITY, -INFINITY})
                if (bad != State::master || narrow) not_finite(dir + "/three", narrow, bad, number);
    spill(dir + "/plain", "x");
    dies("out is a file", {dir + "/plain", "nothing was saved"}, [&] { save(dir + "/plain", 1, false, 1); });
}

static void test_damage(const string& dir) {
    const string out = dir + "/out", at = step_dir(out, 2);
    string printed;
    save(out, 1, true, 1), save(out, 2, true, 2, little(), "", 200);
    check(newest(out, &printed) == 2 && printed.empty(), "whole");
    const Json trainer = checkpoint_trainer_state(at);
    auto passed_over = [&](const string& what, const string& file) {
        bool older = newest(out, &printed) == 1;
        check(older && contains(printed, file) && contains(printed, at) && one_line(printed), what + ": " + printed);
        dies(what, {at, file}, [&] { checkpoint_check(at); });
    };
    for (const auto& [name, text] : files_of(at)) {
        const string path = at + "/" + name;
        const size_t end = text.size();
        for (size_t n : {(size_t)0, (size_t)1, (size_t)7, (size_t)8, (size_t)9, end / 2, end - 8, end - 2, end - 1}) {
            if (n >= text.size()) continue;
            spill(path, text.substr(0, n));
            const bool by_meaning = name == "trainer_state.json" || name == "model.safetensors.index.json";
            if (by_meaning && n == text.size() - 1) continue;   // the final line feed
            passed_over(name + " cut at " + std::to_string(n), name);
        }
        spill(path, text + "x");
        passed_over(name + " longer", name);
        fs::remove(path);
        passed_over(name + " missing", name);
        bool found = true;
        const size_t stride = name == "trainer_state.json" ? 1 : 23;   // the others are all found by the same checksum
        for (size_t i = 0; i < text.size(); i += stride) {
            string bad = text;
            bad[i] = (char)(bad[i] ^ 1 << (i * 5) % 8);
            spill(path, bad);
            // White space of trainer_state.json may change: its contents are the same.
            bool same = name == "trainer_state.json" && isspace((unsigned char)text[i])
                && checkpoint_damage(at, true).empty() && checkpoint_trainer_state(at) == trainer;
            found = found && (same || !checkpoint_damage(at, true).empty());
            if (i % (23 * 7) == 0 && !same) passed_over(name + " flipped at " + std::to_string(i), name);
        }
        check(found, name + ": every flipped bit is found");
        spill(path, text);
    }
    check(newest(out, &printed) == 2 && printed.empty(), "whole again");

    // What means the same is whole; what says something else is not.
    const ModelFiles files = {nullptr, {{"tokenizer.json", "{\"a\": 1, \"b\": [1, 2]}"}}};
    save(out, 3, true, 3, little(), files.files[0].second, 200);
    const Json like = {{"g", 0}, {"seen", 0}, {"loss", 0.0}};
    const WouldSave would_save = {checkpoint_texts(little(), true, files), like};
    const string now = step_dir(out, 3);
    auto edited = [&](const string& name, const std::function<string(const string&)>& edit, bool whole) {
        const string text = slurp(now + "/" + name), other = edit(text);
        check(other != text, name + " is edited");
        spill(now + "/" + name, other);
        const string why = checkpoint_damage(now, true, would_save);
        check(why.empty() == whole, name + " as " + other.substr(0, 300) + ": " + why);
        spill(now + "/" + name, text);
    };
    for (const char* name : {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json",
                             "trainer_state.json"}) {
        edited(name, [](const string& s) { return s + "\n\n"; }, true);
        edited(name, [](const string& s) { return json_parse(s).dump(7); }, true);
        edited(name, [](const string& s) {                              // the other way round
            Json j = json_parse(s), back = Json::object();
            for (auto it = j.rbegin(); it != j.rend(); ++it) back[it.key()] = it.value();
            return back.dump(1);
        }, true);
        edited(name, [](const string&) { return "{}"; }, false);
        edited(name, [](const string&) { return "[]"; }, false);
        edited(name, [](const string& s) { return s.substr(0, s.size() / 2); }, false);
    }
    auto set = [](const char* key, const Json& v) {
        return [=](const string& s) { Json j = json_parse(s); j[key] = v; return json_text(j); };
    };
    edited("config.json", set("eos_token_id", Json::array({4})), true);
    edited("config.json", set("rope_theta", 10000), true);
    edited("config.json", set("_name_or_path", "mine"), true);
    edited("trainer_state.json", [](const string& s) { return nlohmann::json(json_parse(s)).dump(3); }, true);
    edited("trainer_state.json", set("step", 4), false);
    edited("config.json", set("hidden_size", 8), false);
    edited("config.json", set("clip_qkv", 8), false);
    edited("generation_config.json", set("temperature", 0.5), true);
    edited("generation_config.json", set("eos_token_id", 3), false);
    edited("tokenizer.json", set("a", 2), false);
    edited("tokenizer.json", set("c", 2), false);
    edited("model.safetensors.index.json", set("weight_map", Json::object()), false);
    edited("model.safetensors.index.json", set("metadata", {{"total_size", 1}}), false);
    fs::remove_all(now);

    fs::remove(at + "/trainer_state.json");
    dies("no trainer state", {at, "trainer_state.json", "No such file"}, [&] { checkpoint_trainer_state(at); });
    fs::remove_all(at), fs::create_directories(at);
    passed_over("an empty directory", "trainer_state.json");
    check(newest(dir + "/nowhere", &printed) == -1 && printed.empty(), "no directory, no checkpoint");
    fs::remove_all(step_dir(out, 1));
    check(newest(out, &printed) == -1 && printed.find("warning") == 0, "only a damaged one");
}

static void no_leftovers(const string& out, const string& at) {
    for (auto& e : fs::directory_iterator(out))
        check(e.path().filename().string()[0] != '.', at + ": " + e.path().string() + " is left");
}

static void kill_by_the_clock(const string& out);

static void test_kill(const string& dir) {
    const string out = dir + "/out", clean = dir + "/clean", two = dir + "/two", four = dir + "/four";
    save(clean, 2, true, 9), save(clean, 3, true, 9);
    for (int s = 1; s < 3; s++) save(two, s, true, s);
    for (int s = 1; s < 5; s++) save(four, s, true, s);
    int points = 0;
    // From a copy of `before`, kills `act` at its n-th system call for every n, then calls `look`, which examines what
    // is left, with a text for messages.
    auto every_kill = [&](const string& what, const string& before, const std::function<void()>& act,
                          const std::function<void(const string&)>& look) {
        for (int n = 1;; n++) {
            fs::remove_all(out);
            fs::copy(before, out, fs::copy_options::recursive);
            Outcome o = in_child([&] { trap = Trap::kill, trap_at = n, calls = 0; act(); });
            bool killed = WIFSIGNALED(o.status) && WTERMSIG(o.status) == SIGKILL;
            const string at = what + ", call " + std::to_string(n);
            check(killed || exited(o, 0), at + ": " + o.err);
            for (auto& [step, path] : checkpoint_list(out))
                check(checkpoint_damage(path, true).empty(), at + ": " + path + " is partial");
            look(at);
            points++;
            if (!killed) { check(n > 10, what + ": " + std::to_string(n - 1) + " calls seen"); return; }
        }
    };
    every_kill("a new step", two, [&] { save(out, 3, true, 9); }, [&](const string& at) {
        string printed;
        int step = newest(out, &printed), g = step > 1 ? generation(step_dir(out, step)) : -1;
        check((step == 2 && g == 2) || (step == 3 && g == 9), at + ": newest is " + std::to_string(step));
        check(printed.empty() && generation(step_dir(out, 1)) == 1, at + ": " + printed);
        save(out, 3, true, 9);
        check(files_of(step_dir(out, 3)) == files_of(step_dir(clean, 3)), at + ": saved again, other bytes");
        no_leftovers(out, at);
    });
    for (bool works : {true, false}) {
        const string what = works ? "exchanging a step" : "replacing a step";
        exchange_works = works;
        every_kill(what, two, [&] { save(out, 2, true, 9); }, [&](const string& at) {
            string printed;
            int step = newest(out, &printed), g = step == 2 ? generation(step_dir(out, 2)) : -1;
            check(printed.empty() && (g == 2 || g == 9), at + ": newest is " + std::to_string(step) + " of generation "
                  + std::to_string(g) + " " + printed);
            save(out, 2, true, 9);
            check(files_of(step_dir(out, 2)) == files_of(step_dir(clean, 2)), at + ": saved again, other bytes");
            no_leftovers(out, at);
        });
        exchange_works = true;
    }
    every_kill("pruning", four, [&] { checkpoint_prune(out, 2, 0); }, [&](const string& at) {
        check(newest(out) == 4 && generation(step_dir(out, 3)) == 3, at + ": newest");
        save(out, 5, true, 5);
        no_leftovers(out, at);
    });
    printf("killed at %d system calls\n", points);
    kill_by_the_clock(out);
}

// The same by the clock: a child saves and prunes again and again, and reports what it finished. It is killed some time
// after its first, second or third report or after its start; how long a save takes is measured, as it depends on what
// else the machine does.
static void kill_by_the_clock(const string& out) {
    srand(1);
    fresh(out);
    int finished = 0, last = 0, rounds = 40;
    int64_t took = 20000;                   // microseconds of the last save
    auto clock = [] { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::microseconds(1); };
    for (int round = 0; round < rounds; round++) {
        int ends[2];
        if (pipe(ends) != 0) abort();
        pid_t pid = fork();
        if (pid == 0) {
            for (int step = last + 1;; step++) {
                save(out, step, true, step);
                if (write(ends[1], &step, sizeof step) != sizeof step) _exit(3);
                checkpoint_prune(out, 2, 0);
            }
        }
        close(ends[1]);
        int step;
        for (int reports = rand() % 4; reports > 0; reports--) {
            const int64_t start = clock();
            if (read(ends[0], &step, sizeof step) != sizeof step) break;
            last = step, finished++;
            took = clock() - start;
        }
        usleep((useconds_t)(rand() % std::min<int64_t>(1 + 2 * took, 999999)));
        kill(pid, SIGKILL);
        waitpid(pid, nullptr, 0);
        while (read(ends[0], &step, sizeof step) == sizeof step) last = step, finished++;
        close(ends[0]);
        string printed;
        int found = newest(out, &printed);
        check((last == 0 || found >= last) && printed.empty(), "after a kill: newest " + std::to_string(found)
              + ", finished " + std::to_string(last) + " " + printed);
        if (found > last) last = found;
        if (found > 0) check(generation(step_dir(out, found)) == found, "contents of " + std::to_string(found));
    }
    check(finished > 3, "saves finished between kills: " + std::to_string(finished));
    printf("%d kills by the clock, %d saves finished between\n", rounds, finished);
}

// What a power failure asks for: data before the rename, names after it, and the earlier checkpoint until then.
static void test_sync(const string& dir) {
    const string out = fs::canonical(dir).string() + "/out", tmp = out + "/.step-00000002.tmp";
    for (int kind = 0; kind < 3; kind++) {
        const string what = kind == 0 ? "a new step: " : kind == 1 ? "exchange: " : "replace: ";
        exchange_works = kind != 2;
        fresh(out);
        if (kind) save(out, 2, true, 1);
        std::vector<string> log;
        trace = &log;
        save(out, 2, true, 2);
        trace = nullptr, exchange_works = true;
        std::map<string, bool> dirty;     // file -> written since its last sync
        bool tmp_synced = false, renamed = false, out_synced = false, parent_synced = false;
        for (const string& event : log) {
            string name = event.substr(0, event.find(' ')), path = event.substr(event.find(' ') + 1);
            if (name == "write") {
                dirty[path] = true, tmp_synced = false;
                check(!renamed, what + "written after the rename: " + path);
            }
            if (name == "sync" && dirty.count(path)) dirty[path] = false;
            if (name == "sync" && path == tmp) tmp_synced = true;
            if (name == "rename" && path == tmp) {
                renamed = true;
                check(tmp_synced, what + "the directory is not synced before its rename");
                for (auto& [file, not_synced] : dirty)
                    check(!not_synced, what + file + " is not synced before the rename");
                check(dirty.size() == 6, what + std::to_string(dirty.size()) + " files written");
            }
            if (name == "sync" && path == out && renamed) out_synced = true;
            if (name == "sync" && path == fs::path(out).parent_path() && renamed) parent_synced = true;
            if (name == "unlink") check(out_synced, what + "the earlier checkpoint goes before the new name is synced");
        }
        check(renamed && out_synced && parent_synced, what + "names are synced");
        check(kind == 0 || log.back().find("unlink") == 0, what + "the earlier checkpoint is removed");
    }
    // A checkpoint's name is gone, also after a power failure, before its files go.
    save(out, 3, true, 3);
    std::vector<string> log;
    trace = &log;
    checkpoint_prune(out, 1, 0);
    trace = nullptr;
    bool in_order = log.size() > 3 && log[0] == "rename " + step_dir(out, 2) && log[1] == "sync " + out
        && log[2].find("unlink") == 0;
    check(in_order, "pruning: rename, sync, unlink");

    // A directory that can't be synced is no error, but where the disk fails or is full.
    for (int error : {EACCES, EINVAL, EROFS, ENOTSUP, EBADF, EIO, ENOSPC, EDQUOT}) {
        const bool disk = error == EIO || error == ENOSPC || error == EDQUOT;
        fresh(out);
        auto act = [&] {
            folder_error = error;
            save(out, 1, true, 1), save(out, 2, true, 2), checkpoint_prune(out, 1, 0);
        };
        if (disk) dies("the disk fails", {"cannot sync", strerror(error)}, act);
        else check(exited(in_child(act), 0) && newest(out) == 2 && entries_of(out) == 1, strerror(error));
    }
    // One that may not be listed: what a killed save left is replaced all the same, and an earlier checkpoint goes.
    for (bool works : {true, false}) {
        fresh(out);
        spill((fs::create_directories(out + "/.step-00000002.tmp"), out + "/.step-00000002.tmp/config.json"), "half");
        fs::permissions(out, fs::perms::owner_write | fs::perms::owner_exec);
        Outcome o = in_child([&] {
            without_privileges();
            exchange_works = works;
            save(out, 2, true, 1), save(out, 2, true, 2);
        });
        fs::permissions(out, fs::perms::owner_all);
        check(exited(o, 0) && o.err.empty(), "a directory that may not be listed: " + o.err);
        check(entries_of(out) == 1 && newest(out) == 2 && generation(step_dir(out, 2)) == 2, "and what is in it");
    }
}

static void test_full(const string& dir) {
    const string out = dir + "/out";
    auto after = [&](const string& what) {
        string printed;
        bool there = newest(out, &printed) == 1 && printed.empty() && generation(step_dir(out, 1)) == 1;
        check(there, what + ": the earlier checkpoint");
        for (auto& e : fs::directory_iterator(out))
            check(e.path().filename() == "step-00000001", what + ": left " + e.path().string());
        check(entries_of(out) == 1, what + ": one entry");
    };
    fresh(out);
    save(out, 1, true, 1);
    size_t largest = 0;
    for (auto& [name, text] : files_of(step_dir(out, 1))) largest = std::max(largest, text.size());
    for (size_t limit : {(size_t)0, (size_t)1, (size_t)100, (size_t)1000, largest / 2, largest - 1}) {
        const string what = "files of at most " + std::to_string(limit);
        dies(what, {"cannot write", "File too large"}, [&] {
            signal(SIGXFSZ, SIG_IGN);
            rlimit r = {limit, limit};
            setrlimit(RLIMIT_FSIZE, &r);
            trap = Trap::none;
            // Standard error is a pipe, so the limit leaves the message alone.
            save(out, 2, true, 2);
        });
        after(what);
    }
    int n = 1;
    for (bool saved = false; !saved; n++) {   // every write, sync, mkdir and rename, refused in turn
        Outcome o = in_child([&] {
            trap = Trap::full, trap_at = n, calls = 0;
            save(out, 2, true, 2);
        });
        saved = exited(o, 0);
        const string what = "no space at call " + std::to_string(n);
        if (saved) break;
        check(exited(o, 1) && contains(o.err, "No space left") && one_line(o.err), what + ": " + o.err);
        if (o.err.find("cannot write") == 0 || o.err.find("cannot create") == 0) after(what);
        else check(newest(out) >= 1, what + ": something whole is left");   // at the rename and the syncs around it
        fs::remove_all(step_dir(out, 2));
        fs::remove_all(out + "/.step-00000002.tmp");
    }
    check(n > 30 && newest(out) == 2, "and with space it is saved");
    printf("no space at %d calls\n", n - 1);
}

static void test_prune(const string& dir) {
    const string out = dir + "/out";
    auto steps = [&] {
        std::vector<int> list;
        for (auto& [step, path] : checkpoint_list(out)) list.push_back((int)step);
        return list;
    };
    auto fill = [&] { fresh(out); for (int s = 10; s <= 80; s += 10) save(out, s, false, s); };
    using Steps = std::vector<int>;
    fill(), checkpoint_prune(out, 0, 0);
    check(steps() == Steps({80, 70, 60, 50, 40, 30, 20, 10}), "0 keeps all");
    checkpoint_prune(out, 3, 40);
    check(steps() == Steps({80, 70, 60, 40}), "last 3 and every 40");
    checkpoint_prune(out, 1, 0);
    check(steps() == Steps({80}), "last 1");
    checkpoint_prune(out, 1, 0);
    check(steps() == Steps({80}), "the newest stays");
    fill();
    spill(step_dir(out, 80) + "/config.json", "");
    checkpoint_prune(out, 2, 0);
    check(steps() == Steps({80, 70, 60}), "a damaged one is neither counted nor deleted");
    for (const char* name : {"step-", "step-123", "step-0000000x", "step-00000090.tmp", "stop-00000090",
                             "step-999999999999999999999999", ".step-00000099.tmp/x", ".step-00000098.trash", ".git"})
        fs::create_directories(out + "/" + name);
    spill(out + "/step-00000095", "a file");
    check(steps() == Steps({80, 70, 60}), "other names are no checkpoints");
    save(out, 123456789, false, 1);
    check(steps() == Steps({123456789, 80, 70, 60}), "nine digits");
    bool gone = !fs::exists(out + "/.step-00000099.tmp") && !fs::exists(out + "/.step-00000098.trash");
    check(gone && fs::exists(out + "/.git"), "leftovers go, others stay");
    checkpoint_prune(dir + "/nowhere", 1, 0);
}

// ------------------------------------------------------------------------------------------------
// Ranks: processes that save together

constexpr int MAX_RANKS = 4;
struct Meeting {                              // shared memory
    std::atomic<int> arrivals, ended;         // at all sums; ranks that ended early
    double values[2][MAX_RANKS][1000];        // of a sum, and of the one before, which others may still read
};
using Owner = std::function<std::pair<int, size_t>(size_t)>;

// The sum of a rank's numbers and the others', number `n` of the run.
static void meet(Meeting* meeting, int rank, int ranks, int n, std::vector<double>* x) {
    auto& values = meeting->values[n % 2];
    if (x->size() > sizeof values[0] / sizeof(double)) die("a sum of %zu numbers", x->size());
    std::copy(x->begin(), x->end(), values[rank]);
    for (meeting->arrivals++; meeting->arrivals < (n + 1) * ranks; usleep(100))
        if (meeting->ended) _exit(9);
    for (size_t i = 0; i < x->size(); i++) {
        (*x)[i] = 0;
        for (int r = 0; r < ranks; r++) (*x)[i] += values[r][i];
    }
}

// Runs act on every rank. When one ends early the others end also, with exit code 9, but not before they wait for it in
// a sum.
static std::vector<Outcome> together(int ranks, const Owner& owner, const std::function<void(const Savers&)>& act) {
    const int read_write = PROT_READ | PROT_WRITE;
    Meeting* meeting = (Meeting*)mmap(nullptr, sizeof(Meeting), read_write, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (meeting == MAP_FAILED) abort();
    std::vector<Outcome> outcomes((size_t)ranks);
    std::map<pid_t, size_t> pids;
    std::vector<int> errors;                  // a pipe each
    fflush(stdout);
    for (int rank = 0; rank < ranks; rank++) {
        int ends[2];
        if (pipe(ends) != 0) abort();
        pid_t pid = fork();
        if (pid == 0) {
            dup2(ends[1], 2);
            int sums = 0;
            act({rank, ranks, owner, [&](std::vector<double>* x) {
                if (trace) trace->push_back("sum ");
                meet(meeting, rank, ranks, sums++, x);
            }});
            _exit(0);
        }
        close(ends[1]);
        errors.push_back(ends[0]), pids[pid] = (size_t)rank;
    }
    for (int n = 0; n < ranks; n++) {
        int status;
        pid_t pid = waitpid(-1, &status, 0);
        outcomes[pids.at(pid)].status = status;
        if (status != 0) meeting->ended++;
    }
    for (size_t r = 0; r < errors.size(); r++) {
        char buffer[4096];
        ssize_t n;
        while ((n = read(errors[r], buffer, sizeof buffer)) > 0) outcomes[r].err.append(buffer, (size_t)n);
        close(errors[r]);
    }
    munmap(meeting, sizeof(Meeting));
    return outcomes;
}

// Which rank owns an element, and where its run ends
static Owner even(int ranks) {
    const size_t total = hf_tensors(little()).back().offset + hf_tensors(little()).back().count;
    size_t share = (total + (size_t)ranks - 1) / (size_t)ranks;
    return [=](size_t offset) { return std::make_pair((int)(offset / share), (offset / share + 1) * share); };
}
static Owner uneven(int ranks) {              // in the embedding, in q_proj, in an expert
    return [=](size_t offset) {
        const size_t ends[] = {7, 29, 111, SIZE_MAX};
        int r = 0;
        while (r < ranks - 1 && offset >= ends[r]) r++;
        return std::make_pair(r, r == ranks - 1 ? SIZE_MAX : ends[r]);
    };
}
static Owner stripes(int ranks) {
    return [=](size_t offset) { return std::make_pair((int)(offset / 5 % (size_t)ranks), (offset / 5 + 1) * 5); };
}
static Owner the_last(int ranks) {
    return [=](size_t) { return std::make_pair(ranks - 1, SIZE_MAX); };
}
static Owner both_ends(int ranks) {           // the last and the first, but none between
    return [=](size_t offset) {
        return offset < 150 ? std::make_pair(ranks - 1, (size_t)150) : std::make_pair(0, SIZE_MAX);
    };
}

// A rank's part in a save, with the order of what it does: what it wrote is on the disk before it meets the others, and
// it does not return too early.
static void save_in_order(const string& out, bool bf16, size_t shard, const Savers& savers) {
    std::vector<string> log;
    trace = &log;
    if (savers.rank == savers.size - 1) usleep(3000);       // the others wait
    save(out, 2, bf16, 1, little(), "{}", shard, savers);
    trace = nullptr;
    if (!fs::exists(step_dir(out, 2))) die("it is not complete");
    std::set<string> dirty;
    int sums = 0;
    for (const string& event : log) {
        string name = event.substr(0, event.find(' ')), path = event.substr(event.find(' ') + 1);
        if (name == "write") dirty.insert(path);
        if (name == "sync") dirty.erase(path);
        if (name == "sum" && ++sums == 2 && !dirty.empty()) die("%s is not synced", dirty.begin()->c_str());
        if (name == "rename" && (sums != 2 || savers.rank != 0)) die("renamed between sums %d and %d", sums, sums + 1);
    }
    if (sums != 3) die("%d sums", sums);
}

// The bytes are those of one rank.
static void ranks_same_bytes(const string& out, const string& one) {
    const std::vector<std::pair<string, Owner (*)(int)>> splits = {
        {"even", even}, {"uneven", uneven}, {"stripes", stripes}, {"the last", the_last}, {"ends", both_ends}};
    int saves = 0;
    for (bool bf16 : {false, true})
        for (size_t shard : {(size_t)5000000000, (size_t)150}) {
            fresh(one);
            save(one, 2, bf16, 1, little(), "{}", shard);
            for (auto& [name, split] : splits)
                for (int ranks = 1; ranks <= MAX_RANKS; ranks++) {
                    const string what = std::to_string(ranks) + " ranks, " + name + (bf16 ? ", BF16, " : ", FP32, ")
                        + std::to_string(shard);
                    fresh(out);
                    auto outcomes = together(ranks, split(ranks), [&](const Savers& savers) {
                        save_in_order(out, bf16, shard, savers);
                    });
                    for (const Outcome& o : outcomes) check(o.status == 0 && o.err.empty(), what + ": " + o.err);
                    bool same = files_of(step_dir(out, 2)) == files_of(step_dir(one, 2));
                    check(same, what + ": other bytes than one rank's");
                    check(entries_of(out) == 1, what + ": something is left beside it");
                    saves++;
                }
        }
    printf("%d saves by 1 to %d ranks\n", saves, MAX_RANKS);
    for (auto& [name, text] : files_of(step_dir(out, 2)))
        for (size_t at = 0; at < text.size() && name != "trainer_state.json"; at += 101) {
            string bad = text;
            bad[at] = (char)(bad[at] ^ 4);
            spill(step_dir(out, 2) + "/" + name, bad);
            check(checkpoint_damage(step_dir(out, 2), true) == name + " is damaged: its checksum differs",
                  name + " flipped at " + std::to_string(at));
            spill(step_dir(out, 2) + "/" + name, text);
        }
    checkpoint_check(step_dir(out, 2));
}

// What is left when one of three ranks was killed, or had no space, at one of its system calls
static void check_one_failed(const string& what, const string& out, Trap kind, int bad,
                             const std::vector<Outcome>& outcomes) {
    const Outcome& o = outcomes[(size_t)bad];
    bool renaming = kind == Trap::kill ? bad == 0 : o.err.find("cannot sync") == 0 || o.err.find("cannot rename") == 0;
    bool complete = fs::exists(step_dir(out, 3));
    bool reported = exited(o, 1) && contains(o.err, "No space left") && one_line(o.err);
    check(kind == Trap::kill ? WIFSIGNALED(o.status) : reported, what + ": " + o.err);
    for (int r = 0; r < 3; r++) {
        const Outcome& other = outcomes[(size_t)r];
        bool waited = exited(other, 9) && other.err.empty();
        bool heard = exited(other, 1) && contains(other.err, "Another rank failed");
        if (r != bad) check(waited || heard, what + ": rank " + std::to_string(r) + ": " + other.err);
    }
    check(!complete || renaming, what + ": a complete directory");
    check(!complete || checkpoint_damage(step_dir(out, 3), true).empty(), what + ": a damaged directory");
    if (kind == Trap::full && !renaming) check(entries_of(out) == 1, what + ": something is left");
}

// A rank that is killed, or has no space, at any of its system calls.
static void ranks_one_fails(const string& out, const string& one) {
    fresh(one);
    save(one, 1, false, 1);
    const auto before = files_of(step_dir(one, 1));
    save(one, 3, false, 3);
    const auto clean = files_of(step_dir(one, 3));
    int points = 0;
    for (Trap kind : {Trap::kill, Trap::full})
        for (int bad : {0, 1})
            for (int n = 1;; n++) {
                const string what = "rank " + std::to_string(bad)
                    + (kind == Trap::kill ? " killed at call " : " without space at call ") + std::to_string(n);
                fresh(out);
                fs::copy(step_dir(one, 1), step_dir(out, 1));
                auto outcomes = together(3, even(3), [&](const Savers& savers) {
                    if (savers.rank == bad) trap = kind, trap_at = n;
                    save(out, 3, false, 3, little(), "", 5000000000, savers);
                });
                if (outcomes[(size_t)bad].status == 0) { check(n > 10, what + ": calls seen"); break; }
                points++;
                check_one_failed(what, out, kind, bad, outcomes);
                check(files_of(step_dir(out, 1)) == before, what + ": the earlier checkpoint");
                if (kind == Trap::full) continue;
                save(out, 3, false, 3);
                check(files_of(step_dir(out, 3)) == clean, what + ": saved again, other bytes");
                no_leftovers(out, what);
            }
    printf("one of 3 ranks failed at %d system calls\n", points);
}

// Ranks that do not share a file system, or do not agree, or whose sum is none.
static void ranks_disagree(const string& out, const string& elsewhere) {
    auto refused = [&](const string& what, const string& words, const std::function<void(Savers*)>& change) {
        fresh(out);
        int reported = 0;
        auto outcomes = together(2, even(2), [&](const Savers& savers) {
            Savers mine = savers;
            change(&mine);
            const string& mine_out = mine.rank == 1 && what == "elsewhere" ? elsewhere : out;
            save(mine_out, 3, true, 3, little(), "", 5000000000, mine);
        });
        for (const Outcome& o : outcomes) {
            reported += contains(o.err, words);
            check(exited(o, 9) || (exited(o, 1) && contains(o.err, words) && one_line(o.err)), what + ": " + o.err);
        }
        check(reported > 0 && checkpoint_list(out).empty(), what + ": a checkpoint");
    };
    refused("elsewhere", "do not share", [](Savers*) {});
    refused("two owners", "disagree", [&](Savers* s) { if (s->rank == 1) s->owner = the_last(2); });
    refused("other runs", "disagree", [&](Savers* s) { if (s->rank == 1) s->owner = uneven(2); });
    refused("no sum", "disagree", [](Savers* s) { s->sum = [](std::vector<double>*) {}; });
    refused("an owner too many", "no rank owns element 128", [&](Savers* s) {
        s->owner = [](size_t offset) { return std::make_pair((int)(offset / 64), offset / 64 * 64 + 64); };
    });
    refused("an empty run", "no rank owns element 7", [&](Savers* s) {
        s->owner = [](size_t) { return std::make_pair(0, (size_t)7); };
    });
}

static void test_ranks(const string& dir) {
    const string out = dir + "/out", one = dir + "/one";
    ranks_same_bytes(out, one);
    ranks_one_fails(out, one);
    ranks_disagree(out, dir + "/elsewhere");

    OlmoeConfig large = little();             // a tensor of more than a chunk, split
    large.V = 270000;
    fresh(one), fresh(out);
    save(one, 2, true, 1, large);
    auto owner = [](size_t offset) {
        if (offset < 5) return std::make_pair(2, (size_t)5);
        return offset < 1070001 ? std::make_pair(0, (size_t)1070001) : std::make_pair(1, SIZE_MAX);
    };
    auto outcomes = together(3, owner, [&](const Savers& savers) {
        save(out, 2, true, 1, large, "", 5000000000, savers);
    });
    for (const Outcome& o : outcomes) check(o.status == 0, "chunks: " + o.err);
    check(files_of(step_dir(out, 2)) == files_of(step_dir(one, 2)), "chunks: other bytes than one rank's");
}

// configs/*.json are what config_json prints, so that they can't drift from what we save.
static void test_configs(const string&) {
    for (const char* name : {"tiny", "small", "olmoe-1b-7b"}) {
        const string path = string(CONFIGS) + "/" + name + ".json";
        OlmoeConfig c;
        config_read(&c, path);
        check(json_text(config_json(c, string(name) == "olmoe-1b-7b")) == slurp(path), path);
    }
}

int main(int argc, char** argv) {
    const std::vector<std::pair<string, void (*)(const string&)>> groups = {
        {"config", test_config}, {"configs", test_configs}, {"tensors", test_tensors},
        {"safetensors", test_safetensors}, {"weights", test_weights}, {"layouts", test_layouts},
        {"roundtrip", test_roundtrip}, {"damage", test_damage}, {"kill", test_kill}, {"sync", test_sync},
        {"full", test_full}, {"prune", test_prune}, {"ranks", test_ranks}};
    const string command = argc > 1 ? argv[1] : "";
    if (command == "list") {
        for (auto& [name, run] : groups) puts(name.c_str());
        return 0;
    }
    if (command == "half") {                  // every F16 and BF16 as float
        std::vector<uint16_t> all(65536);
        for (size_t i = 0; i < all.size(); i++) all[i] = (uint16_t)i;
        std::vector<float> f(65536);
        string bytes;
        for (const char* dtype : {"F16", "BF16"}) {
            tensor_to_float(f.data(), {"t", dtype, {65536}, (const unsigned char*)all.data(), 131072}, 0, 65536);
            bytes.append((const char*)f.data(), f.size() * 4);
        }
        spill(argv[2], bytes);
        return 0;
    }
    if (command == "save") {
        save(argv[2], atoi(argv[4]), atoi(argv[3]), 1, little(), "", strtoull(argv[5], nullptr, 10));
        return 0;
    }
    if (command == "load") {                  // the flat vector as floats
        OlmoeConfig c;
        config_read(&c, argv[2]);
        ModelWeights w;
        weights_open(&w, argv[2], c);
        string bytes;
        for (size_t i = 0; i < hf_tensors(c).size(); i++) {
            std::vector<float> f(hf_tensors(c)[i].count);
            tensor_to_float(f.data(), weights_tensor(w, i), 0, f.size());
            bytes.append((const char*)f.data(), f.size() * 4);
        }
        weights_close(&w);
        spill(argv[3], bytes);
        return 0;
    }
    for (auto& [name, run] : groups)
        if (name == command && argc == 3) {
            fresh(argv[2]);
            run(argv[2]);
            printf("%s: %d checks, %d failed\n", name.c_str(), checks, failures);
            return failures > 0 || checks == 0;
        }
    die("usage: test_checkpoint list | GROUP DIR | save DIR BF16 STEP SHARD | load DIR OUT | half OUT");
}
