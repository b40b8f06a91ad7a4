// safetensors.h: safetensors files in and out, and helpers for small files and JSON.
//
//   u64 length of the header | header, JSON: {name: {dtype, shape, data_offsets}} | data, without holes
//
// Included by checkpoint.h, after die(). Host code only. Every error is one line from die().
#pragma once
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <nlohmann/json.hpp>
#include "files.h"

// ------------------------------------------------------------------------------------------------
// Small files

// The whole file. False, with errno set, when it can't be read.
inline bool file_contents(std::string* contents, const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return false;
    std::vector<char> buffer(1 << 16);
    ssize_t n;
    while ((n = read(fd, buffer.data(), buffer.size())) > 0) contents->append(buffer.data(), (size_t)n);
    int error = errno;
    close(fd);
    errno = error;
    return n == 0;
}

inline Json json_read(const std::string& path) {
    std::string contents;
    if (!file_contents(&contents, path)) die("cannot read %s: %s", path.c_str(), strerror(errno));
    Json j = json_parse(contents);
    if (!j.is_object()) die("%s: not a JSON object; the file is damaged, or another kind of file", path.c_str());
    return j;
}

inline std::string json_text(const Json& j) { return j.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

// ------------------------------------------------------------------------------------------------
// Reading

struct SafeTensor {
    std::string name, dtype;        // dtype as the format spells it: F32, BF16, F16, I32, I64, U8, ...
    std::vector<int64_t> shape;
    const unsigned char* data;      // bytes, in the mapped file; at any alignment
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

// Bytes per element; 0: no such dtype.
inline size_t dtype_bytes(const std::string& dtype) {
    static const std::map<std::string, size_t> sizes = {
        {"F64", 8}, {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4},
        {"F16", 2}, {"BF16", 2}, {"I16", 2}, {"U16", 2},
        {"I8", 1}, {"U8", 1}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    auto it = sizes.find(dtype);
    return it == sizes.end() ? 0 : it->second;
}

// Maps the whole file.
inline void safetensors_map(Safetensors* f) {
    const char* path = f->path.c_str();
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0) die("cannot read %s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) die("%s: not a file", path);
    size_t size = (size_t)info.st_size;
    if (size < 8) die("%s: %zu bytes, too short for a safetensors file; it is truncated", path, size);
    f->map = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (f->map == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    f->map_bytes = size;
    close(fd);
}

// The header, which is the text [begin, end). Not as Json, whose objects search linearly.
inline nlohmann::json header_parse(const char* path, const unsigned char* begin, const unsigned char* end) {
    // The parser keeps one of two equal keys, so the keys are looked at while it reads them.
    std::set<std::string> names;
    std::string twice;
    auto see = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
        const bool is_name = depth == 1 && event == nlohmann::json::parse_event_t::key;
        if (is_name && !names.insert(value.get<std::string>()).second) twice = json_shown(value);
        return depth < json_depth;
    };
    nlohmann::json j = nlohmann::json::parse(begin, end, see, false);
    if (!j.is_object()) die("%s: its header is not a JSON object; it is damaged, or not a safetensors file", path);
    if (!twice.empty()) die("%s: its header names tensor %s twice", path, twice.c_str());
    return j;
}

inline std::map<std::string, std::string> header_metadata(const char* path, const nlohmann::json& j) {
    bool ok = j.is_object();
    if (ok) for (const auto& value : j) ok = ok && value.is_string();
    if (!ok) die("%s: __metadata__ is not an object of strings", path);
    return j.get<std::map<std::string, std::string>>();
}

// The tensor that the header describes by j, in the file's data.
inline SafeTensor header_tensor(const char* path, const std::string& name, const nlohmann::json& j,
                                const unsigned char* data, size_t data_bytes) {
    const std::string shown = json_shown(name);
    auto sizes = [&](const char* key) {                   // an array of integers, none negative
        bool ok = j.is_object() && j.contains(key) && j[key].is_array();
        if (ok) for (const auto& n : j[key]) ok = ok && n.is_number_unsigned() && n.get<uint64_t>() <= INT64_MAX;
        if (!ok) die("%s: tensor %s: %s is missing, or not a list of sizes", path, shown.c_str(), key);
        return j[key].get<std::vector<int64_t>>();
    };
    SafeTensor t{name, "", sizes("shape"), nullptr, 0};
    const std::vector<int64_t> range = sizes("data_offsets");

    if (!j.contains("dtype") || !j["dtype"].is_string() || !dtype_bytes(j["dtype"])) {
        const std::string dtype = json_shown(j.value("dtype", nlohmann::json()));
        die("%s: tensor %s: unknown dtype %s", path, shown.c_str(), dtype.c_str());
    }
    t.dtype = j["dtype"];
    t.bytes = dtype_bytes(t.dtype);
    bool fits = true;
    for (int64_t n : t.shape) fits = fits && !__builtin_mul_overflow(t.bytes, (size_t)n, &t.bytes);

    if (range.size() != 2 || range[1] < range[0] || (size_t)range[1] > data_bytes)
        die("%s: tensor %s: data_offsets %s with %zu bytes of data; the file is truncated or damaged",
            path, shown.c_str(), json_shown(j["data_offsets"]).c_str(), data_bytes);
    if (!fits || t.bytes != (size_t)(range[1] - range[0]))
        die("%s: tensor %s: %s of shape %s does not take %lld bytes",
            path, shown.c_str(), t.dtype.c_str(), json_shown(j["shape"]).c_str(), (long long)(range[1] - range[0]));
    t.data = data + range[0];
    return t;
}

// Maps the file and checks everything that its header claims; nothing of the data is read yet.
inline void safetensors_open(Safetensors* f, const std::string& path) {
    *f = Safetensors();
    f->path = path;
    safetensors_map(f);

    const char* at = path.c_str();
    const unsigned char* bytes = (const unsigned char*)f->map;
    const size_t size = f->map_bytes;
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | bytes[i];
    if (header > 100000000 || header > size - 8)
        die("%s: its header claims %llu bytes of a file of %zu; it is truncated, or not a safetensors file",
            at, (unsigned long long)header, size);
    const unsigned char* data = bytes + 8 + header;
    const size_t data_bytes = size - 8 - header;

    const nlohmann::json j = header_parse(at, bytes + 8, data);
    std::vector<SafeTensor> tensors;
    for (const auto& item : j.items()) {
        if (item.key() == "__metadata__") f->metadata = header_metadata(at, item.value());
        else tensors.push_back(header_tensor(at, item.key(), item.value(), data, data_bytes));
    }

    // In the order of their data, an empty tensor before the one that begins at the same place.
    std::sort(tensors.begin(), tensors.end(), [](const SafeTensor& a, const SafeTensor& b) {
        return a.data != b.data ? a.data < b.data : a.bytes < b.bytes;
    });
    size_t end = 0;
    for (SafeTensor& t : tensors) {
        const size_t offset = (size_t)(t.data - data);
        if (offset != end)
            die("%s: tensor %s %s the tensor before it",
                at, json_shown(t.name).c_str(), offset < end ? "overlaps" : "leaves a hole after");
        end += t.bytes;
        f->index[t.name] = f->tensors.size();
        f->tensors.push_back(std::move(t));
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
    const size_t width = dtype_bytes(t.dtype), elements = t.bytes / width;
    if (begin + count > elements)
        die("tensor %s: elements [%zu, %zu) asked for, it has %zu",
            json_shown(t.name).c_str(), begin, begin + count, elements);
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
        die("tensor %s: dtype %s is not supported here, only F32, BF16 and F16",
            json_shown(t.name).c_str(), t.dtype.c_str());
    }
}

// Elements [begin, begin + count) have been read: their pages of the file leave this process, where they would count as
// its memory; the system keeps them cached as long as it has room.
inline void tensor_read(const SafeTensor& t, size_t begin, size_t count) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), width = dtype_bytes(t.dtype);
    const uintptr_t first = (uintptr_t)(t.data + begin * width) / page * page;
    const uintptr_t last = (uintptr_t)(t.data + (begin + count) * width);
    // No harm to pages that others still read: they come back.
    madvise((void*)first, last - first, MADV_DONTNEED);
}

// ------------------------------------------------------------------------------------------------
// Writing

struct TensorInfo { std::string name, dtype; std::vector<int64_t> shape; };

// What a safetensors file begins with: the length of the header and the header. The data of the tensors follow, in
// their order.
inline std::string safetensors_header(const std::vector<TensorInfo>& tensors,
                                      const Json& metadata = {{"format", "pt"}}) {      // which transformers needs
    std::string header = "{\"__metadata__\":" + metadata.dump(), length;
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
