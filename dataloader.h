// Token files in, batches out: the data of a training run, in OLMo's order, bit for bit.
//
// A data set is a list of files of uint16 or uint32 tokens. A file of n tokens holds floor(n / T) instances: instance j
// is its tokens [jT, (j+1)T). The tail is dropped, and an instance never crosses files. The numbers of the instances go
// on from file to file. A file may count more than once, or in part: b.npy:2.5 is b twice, then the first half of its
// instances. An epoch visits them in the order of NumPy's Generator(PCG64(seed + epoch)).shuffle, which is
// written out below: each batch is the same as in a run of OLMo's. Batch b of G instances is positions [bG, (b+1)G) of
// that order, on any number of ranks. Batches may be skipped: the next one takes their step.
//
// The state to save is (epoch, position), both counted over all ranks; nothing else changes.

#pragma once

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "lib/file_kinds.h"
#include "lib/files.h"
#include "tokenizer.h"

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ------------------------------------------------------------------------------------------------
// The shuffle: SeedSequence (O'Neill 2015), PCG64 XSL-RR (O'Neill 2014) and masked rejection, as NumPy combines them.

struct Pcg64 {
    unsigned __int128 state, increment;
    uint32_t spare;         // NumPy hands out the low half of a draw, then the high half
    bool has_spare;
};

inline uint64_t pcg64_next(Pcg64* g) {
    const unsigned __int128 multiplier = ((unsigned __int128)2549297995355413924u << 64) + 4865540595714422341u;
    g->state = g->state * multiplier + g->increment;
    uint64_t word = (uint64_t)(g->state >> 64) ^ (uint64_t)g->state;
    unsigned rotate = (unsigned)(g->state >> 122);
    return word >> rotate | word << (-rotate & 63);
}

inline uint32_t pcg64_next32(Pcg64* g) {
    g->has_spare = !g->has_spare;
    if (!g->has_spare) return g->spare;
    uint64_t word = pcg64_next(g);
    g->spare = (uint32_t)(word >> 32);
    return (uint32_t)word;
}

// SeedSequence(seed): the words of the seed are hashed into a pool of four, every word is mixed into every other, and
// eight words are drawn from the pool: the generator's state and its increment.
inline void pcg64_seed(Pcg64* g, uint64_t seed) {
    uint32_t pool[4] = {(uint32_t)seed, (uint32_t)(seed >> 32), 0, 0}, hash = 0x43b0d7e5, out[8];
    auto hashmix = [&hash](uint32_t v) {
        v ^= hash;
        hash *= 0x931e8875;
        v *= hash;
        return v ^ v >> 16;
    };
    for (uint32_t& word : pool) word = hashmix(word);
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++)
            if (from != to) {
                uint32_t v = 0xca01f9dd * pool[to] - 0x4973f715 * hashmix(pool[from]);
                pool[to] = v ^ v >> 16;
            }

    hash = 0x8b51f9dd;
    for (int i = 0; i < 8; i++) {
        uint32_t v = pool[i % 4] ^ hash;
        hash *= 0x58f38ded;
        v *= hash;
        out[i] = v ^ v >> 16;
    }
    auto word128 = [&out](int i) {      // four words, low half of each 64 first, high 64 first
        uint64_t high = (uint64_t)out[i + 1] << 32 | out[i], low = (uint64_t)out[i + 3] << 32 | out[i + 2];
        return (unsigned __int128)high << 64 | low;
    };
    g->increment = word128(4) << 1 | 1;
    g->state = 0;
    g->spare = 0;
    g->has_spare = false;
    pcg64_next(g);
    g->state += word128(0);
    pcg64_next(g);
}

// Fisher-Yates from the top. A draw is masked to the bits of i, and repeated while it is above i: no division, no bias.
inline void pcg64_shuffle(Pcg64* g, std::vector<uint32_t>* order) {
    for (size_t i = order->size(); i-- > 1; ) {
        uint32_t mask = (uint32_t)i, j;
        for (int s = 1; s < 32; s *= 2) mask |= mask >> s;
        do j = pcg64_next32(g) & mask; while (j > i);
        std::swap((*order)[i], (*order)[j]);
    }
}

// ------------------------------------------------------------------------------------------------
// The repetition filter of OLMoE's run: an instance trains nothing if it holds a pattern of p = 1 .. 13 tokens about 32
// times in a row: a run of m >= 31 p positions with x[i] == x[i - p].
inline bool repetition_filter_hits(const int32_t* tokens, int T) {
    for (int p = 1; p <= std::min(13, T / 3); p++) {
        int run = 0;
        for (int i = p; i < T; i++) {
            run = tokens[i] == tokens[i - p] ? run + 1 : 0;
            if (run >= 31 * p) return true;
        }
    }
    return false;
}

// ------------------------------------------------------------------------------------------------
// Files

inline bool ends_with(const std::string& name, const std::string& suffix) {
    return name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

struct TokenFile {
    std::string path;
    const unsigned char* map = nullptr; // the whole file, memory-mapped: it may be larger than the memory
    size_t bytes = 0, header = 0;       // sizes of the file, and of what is before the tokens
    int width = 2;                      // bytes of a token
    size_t tokens = 0, instances = 0;
    size_t first = 0;                   // number of its first instance in the data set
};

inline uint32_t token_at(const TokenFile& f, size_t i) {
    const unsigned char* p = f.map + f.header;
    return f.width == 2 ? ((const uint16_t*)p)[i] : ((const uint32_t*)p)[i];
}

// A real .npy file: magic, version, length of the header (2 bytes in version 1, 4 in 2 and 3), a Python dict as text:
//     {'descr': '<u2', 'fortran_order': False, 'shape': (1000,), }
inline void token_file_read_npy(TokenFile* f) {
    const char* path = f->path.c_str();
    size_t version = f->bytes > 6 ? f->map[6] : 0, prefix = version == 1 ? 10 : 12, length = 0;
    if (version < 1 || version > 3 || f->bytes < prefix) die("%s: damaged .npy header; write the file again", path);
    for (size_t i = prefix; i-- > 8; ) length = length << 8 | f->map[i];
    if (length > f->bytes - prefix)
        die("%s: damaged .npy header: %zu bytes long in a file of %zu; write the file again", path, length, f->bytes);
    f->header = prefix + length;

    std::string dict((const char*)f->map + prefix, length);
    auto value = [&](const std::string& key, const char* left, const char* right) {
        size_t at = dict.find("'" + key + "':");
        size_t begin = at == std::string::npos ? at : dict.find(left, at + key.size() + 3);
        size_t end = begin == std::string::npos ? begin : dict.find(right, begin + 1);
        if (end == std::string::npos) die("%s: no %s in its .npy header; write the file again", path, key.c_str());
        return dict.substr(begin + 1, end - begin - 1);
    };
    std::string descr = value("descr", "'", "'"), shape = value("shape", "(", ")");
    if (descr != "<u2" && descr != "<u4")
        die("%s: dtype %s, where tokens are uint16 or uint32; save it with .astype('<u2') or .astype('<u4')", path,
            descr.c_str());
    f->width = descr == "<u2" ? 2 : 4;
    char* end;
    f->tokens = strtoull(shape.c_str(), &end, 10);
    if (end == shape.c_str() || (*end && strcmp(end, ",") != 0))
        die("%s: shape (%s), where one dimension is needed; save it with .reshape(-1)", path, shape.c_str());
    if (f->header % f->width != 0)
        die("%s: its tokens start at byte %zu, %s; write the file again", path, f->header,
            f->width == 2 ? "an odd byte" : "no multiple of 4");
}

// Refuses what is no file of tokens by its name, or by how it begins.
inline void token_file_refuse(const std::string& name, std::string_view begin) {
    const char* path = name.c_str();
    for (const char* suffix : {".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz"})
        if (ends_with(name, suffix))
            die("%s: text where tokens are needed; first: olmoe tokenize --tokenizer NAME --out FILE.npy %s", path,
                path);
    if (ends_with(name, ".csv.gz"))
        die("%s: a list of documents, not their tokens; name the .npy beside it", path);
    if (ends_with(name, ".npy.tmp") || ends_with(name, ".npy.state"))
        die("%s: of a tokenization that is not complete; let it finish", path);
    const FileFormat* other = file_format(name, begin);
    if (other && other->suffix != std::string(".npy"))
        die("%s: not tokens, but %s", path, format_advice(*other, name).c_str());
}

// Finds out which of the three formats the file is, and where its tokens are:
//   a real .npy file, known by its magic bytes;
//   llm.c's .bin: 256 int32 (magic, version, number of tokens, zeros), then uint16 (GPT-2) or uint32 (Llama 3);
//   anything else: tokens of `width` bytes from the first byte on, as dolma writes them under the name .npy.
inline void token_file_open(TokenFile* f, const std::string& name, int width) {
    f->path = name;
    f->width = width;
    const char* path = f->path.c_str();
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) die("%s: cannot be read: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) die("%s: not a regular file; name the token files themselves", path);
    f->bytes = (size_t)info.st_size;
    if (f->bytes > 0) {
        void* map = mmap(nullptr, f->bytes, PROT_READ, MAP_SHARED, file, 0);
        if (map == MAP_FAILED) die("%s: cannot be memory-mapped: %s", path, strerror(errno));
        madvise(map, f->bytes, MADV_RANDOM);        // instances are visited in random order
        f->map = (const unsigned char*)map;
    }
    close(file);
    token_file_refuse(name, std::string_view((const char*)f->map, std::min<size_t>(f->bytes, 512)));

    int32_t word[3] = {0, 0, 0};
    if (f->map) memcpy(word, f->map, std::min(f->bytes, sizeof word));
    if (f->bytes >= 6 && memcmp(f->map, "\x93NUMPY", 6) == 0) {
        token_file_read_npy(f);
    } else if (word[0] == 20240520 || word[0] == 20240801) {
        f->width = word[0] == 20240520 ? 2 : 4;
        if (word[1] != (f->width == 2 ? 1 : 7))
            die("%s: version %d of llm.c's .bin; only version 1 of uint16 and 7 of uint32 can be read", path, word[1]);
        if (f->bytes < 1024 || word[2] < 0) die("%s: damaged .bin header; write the file again", path);
        f->header = 1024;
        f->tokens = (size_t)word[2];
    } else {
        if (ends_with(name, ".bin"))
            die("%s: a .bin without llm.c's header (magic 20240520 or 20240801); "
                "if it holds plain tokens, rename it to .npy", path);
        f->tokens = f->bytes / f->width;
    }
    size_t data = f->bytes - f->header;
    if (f->header > 0 && (data % f->width != 0 || f->tokens != data / f->width))
        die("%s: its header says %zu tokens (%d bytes each), but %zu bytes follow it; write the file again",
            path, f->tokens, f->width, data);
}

// ------------------------------------------------------------------------------------------------
// The documents of a token file: FILE.csv.gz next to FILE.npy, a line of start,end,id,src,loc for each

// Reads a text file, gzipped or not (zlib reads both).
struct LineReader {
    gzFile file;
    std::string buffer;     // what was read; the bytes before `at` are used
    size_t at;
    size_t offset;          // of the next byte in the unpacked file
    bool failed;
};

inline bool lines_open(LineReader* r, const std::string& path, size_t offset = 0) {
    *r = LineReader{gzopen(path.c_str(), "rbe"), "", 0, offset, false};
    if (!r->file) return false;
    gzbuffer(r->file, 1 << 17);
    r->failed = offset > 0 && gzseek(r->file, (z_off_t)offset, SEEK_SET) < 0;
    return true;
}

// Replaces the buffer, all of whose bytes are used, by the next bytes. False at the end of the file, or where reading
// failed.
inline bool lines_read(LineReader* r) {
    r->at = 0;
    r->buffer.resize(1 << 16);
    int n = r->failed ? -1 : gzread(r->file, &r->buffer[0], 1 << 16), error;
    r->buffer.resize(n > 0 ? n : 0);
    gzerror(r->file, &error);
    r->failed = n < 0 || (n == 0 && error != Z_OK && error != Z_STREAM_END);    // the second: a gzip file cut short
    return n > 0;
}

// The next line, without its end. False at the end of the file, or where reading failed, which sets failed.
inline bool lines_next(LineReader* r, std::string* line) {
    line->clear();
    do {
        size_t end = r->buffer.find('\n', r->at);
        line->append(r->buffer, r->at, end - r->at);
        if (end == std::string::npos) continue;
        r->at = end + 1;
        r->offset += line->size() + 1;
        return true;
    } while (lines_read(r));
    r->offset += line->size();
    return !r->failed && !line->empty();
}

// Refuses a file that is not lines of JSON, by how it begins. script: makes the lines, `what`, of data sets
inline void json_lines_refuse(const std::string& name, const char* what, const char* script) {
    const char* path = name.c_str();
    char begin[512];
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0) die("%s: cannot be read: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) die("%s: not a regular file; name the files of %s themselves", path, what);
    const ssize_t n = std::max<ssize_t>(0, pread(file, begin, sizeof begin, 0));
    close(file);
    const FileFormat* other = file_format(name, std::string_view(begin, (size_t)n));
    const std::string suffix = other ? other->suffix : "";
    if (suffix == ".parquet" || suffix == ".arrow") die("%s: %s; %s makes %s of it", path, other->what, script, what);
    if (other && suffix != ".gz") die("%s: not %s of JSON, but %s", path, what, format_advice(*other, name).c_str());
    if (info.st_size == 0) die("%s: empty, where %s of JSON are needed", path, what);
}

struct Document {
    size_t start, end;      // its tokens in the .npy, end exclusive
    std::string id, source; // source: the file that it was tokenized from
};

// The domain of story-000123 is story.
inline std::string document_domain(const Document& d) { return d.id.substr(0, d.id.find('-')); }

inline std::string documents_path(const std::string& npy) {
    return npy.substr(0, npy.size() - (ends_with(npy, ".npy") ? 4 : 0)) + ".csv.gz";
}

inline std::vector<std::string> csv_fields(const std::string& line) {
    std::vector<std::string> fields(1);
    bool quoted = false;
    for (size_t i = 0; i < line.size(); i++) {
        bool escaped = quoted && line.compare(i, 2, "\"\"") == 0;       // "" within quotes is a quote
        if (escaped) fields.back() += line[i++];
        else if (line[i] == '"') quoted = !quoted;
        else if (line[i] == ',' && !quoted) fields.emplace_back();
        else fields.back() += line[i];
    }
    return fields;
}

// The documents of a .csv.gz. None where there is no such file, and none, with the reason in `problem`, where it can't
// be read or is damaged.
inline std::vector<Document> documents_list(const std::string& path, std::string* problem) {
    std::vector<Document> documents;
    LineReader lines;
    std::string line;
    struct stat info;
    problem->clear();
    bool there = stat(path.c_str(), &info) == 0;
    if (!there && (errno == ENOENT || errno == ENOTDIR)) return documents;
    if (there && !S_ISREG(info.st_mode)) *problem = path + ": not a regular file";
    else if (!there || !lines_open(&lines, path)) *problem = path + ": cannot be read: " + strerror(errno);
    if (!problem->empty()) return documents;
    while (problem->empty() && lines_next(&lines, &line)) {
        std::vector<std::string> fields = csv_fields(line);
        bool valid_row = fields.size() > 2;
        auto number = [&](size_t i) {
            char* end;
            size_t n = strtoull(fields[i].c_str(), &end, 10);
            valid_row = valid_row && end != fields[i].c_str() && *end == 0;
            return n;
        };
        Document d = {0, 0, valid_row ? fields[2] : "", fields.size() > 3 ? fields[3] : ""};
        if (valid_row) {
            d.start = number(0);
            d.end = number(1);
        }
        size_t previous = documents.empty() ? 0 : documents.back().end;
        if (!valid_row || d.start < previous || d.end < d.start)
            *problem = path + ":" + std::to_string(documents.size() + 1) + ": not a line of start,end,id,src,loc";
        documents.push_back(d);
    }
    if (lines.failed) *problem = path + ": damaged after " + std::to_string(documents.size()) + " documents";
    gzclose(lines.file);
    if (problem->empty() && documents.empty()) *problem = path + ": holds no documents";
    if (!problem->empty()) documents.clear();
    return documents;
}

// The documents of a token file, from the .csv.gz next to it, where that is its own.
inline std::vector<Document> documents_read(const TokenFile& f, std::string* problem) {
    std::string path = documents_path(f.path);
    std::vector<Document> documents = documents_list(path, problem);
    if (documents.empty() || documents.back().end == f.tokens) return documents;
    *problem = path + ": its documents have " + std::to_string(documents.back().end) + " tokens, and " + f.path
        + " has " + std::to_string(f.tokens);
    return {};
}

// ------------------------------------------------------------------------------------------------
// Is a file without a header what it is read as?

constexpr size_t BLOCK_BYTES = 4096;

// The blocks of the file's tokens, or `most` of them, spread evenly, with the first and the last.
inline Sample token_file_blocks(const TokenFile& f, size_t most) {
    size_t bytes = f.width * f.tokens, blocks = (bytes + BLOCK_BYTES - 1) / BLOCK_BYTES, n = std::min(blocks, most);
    Sample sample;
    for (size_t i = 0; i < n; i++) {
        size_t begin = BLOCK_BYTES * (n == 1 ? 0 : i * (blocks - 1) / (n - 1));
        sample.emplace_back((const char*)f.map + f.header + begin, std::min(BLOCK_BYTES, bytes - begin));
    }
    return sample;
}

// Do the documents, whose numbers are `width` bytes wide, all end with the same one? Looks at some 64 of them; fewer
// than eight could agree by chance.
inline bool documents_end_alike(const TokenFile& f, const std::vector<Document>& documents, int width) {
    const unsigned char* first = nullptr;
    for (size_t i = 0, step = documents.size() / 64 + 1; i < documents.size(); i += step) {
        if (documents[i].end == 0 || documents[i].end > f.bytes / width) return false;
        const unsigned char* last = f.map + (documents[i].end - 1) * width;
        if (first && memcmp(first, last, width) != 0) return false;
        if (!first) first = last;
    }
    return documents.size() >= 8;
}

// The type of the file's numbers by the documents beside it: one whose width makes them as many as the documents have.
// Where that is not the width that is read, every document has to end alike, too: the list may be that of another file.
// "" where it says nothing.
inline std::string documents_type(const TokenFile& f) {
    std::string problem;
    std::vector<Document> documents = documents_list(documents_path(f.path), &problem);
    const size_t end = documents.empty() ? 0 : documents.back().end;
    const char* types[] = {"uint8", "uint16", "uint32", "int64"};
    for (int i = 0, width = 1; i < 4; i++, width *= 2) {
        if (end == 0 || f.bytes % width != 0 || f.bytes / width != end) continue;
        bool right = width == f.width, alike = documents_end_alike(f, documents, width);
        if (right || (alike && !documents_end_alike(f, documents, f.width))) return types[i];
    }
    return "";
}

// Ends the program where the contents of a file without a header contradict what it is read as: text, or numbers of
// another type. `sample` is of its blocks. What the .csv.gz beside it says is looked up where there is doubt, or where
// `documents` is set.
inline void token_file_check(const TokenFile& f, int V, const Sample& sample, bool documents) {
    const char *path = f.path.c_str(), *read_as = f.width == 2 ? "uint16" : "uint32";
    std::string type = looks_like_text(sample) ? "text" : other_type(sample, f.width, V);
    const std::string listed = !type.empty() || documents ? documents_type(f) : "";
    if (listed == read_as) return;
    if (type.empty()) type = listed;
    if (type == "text")
        die("%s: text where tokens are needed; name it .txt, then: olmoe tokenize --tokenizer NAME --out FILE.npy TEXT",
            path);
    const char* remedy = type == "uint32" ? "give --token-type uint32"
                       : type == "uint16" ? "give --token-type uint16"
                       : "save them with .astype('<u2') or .astype('<u4')";
    if (!type.empty())
        die("%s: its numbers are %s, not %s; %s (what numpy.save writes is read as its header says)", path,
            type.c_str(), read_as, remedy);
    if (f.bytes % f.width != 0)
        die("%s: %zu bytes, %s, cannot be %s tokens; write the file again", path, f.bytes,
            f.width == 2 ? "an odd number" : "no multiple of 4", read_as);
}

// ------------------------------------------------------------------------------------------------
// The loader

enum class DataOrder { global, sequential };    // shuffled again in every epoch, or in the order of the files

// Batches [first, last] of a run, which counts them from 1
struct BatchRange { int64_t first, last; };

// "412000-412100", or one number
inline BatchRange batch_range_of(const std::string& given) {
    char* end = nullptr;
    BatchRange r = {strtoll(given.c_str(), &end, 10), 0};
    r.last = *end == '-' && isdigit((unsigned char)end[1]) ? strtoll(end + 1, &end, 10) : r.first;
    if (given.empty() || !isdigit((unsigned char)given[0]) || *end || r.first < 1 || r.last < r.first ||
        r.last > (int64_t)1e15)
        die("--skip-batches '%s': not FROM-TO, numbers of batches from 1 on", given.c_str());
    return r;
}

// The same batches as ranges in order, no two of which touch
inline std::vector<BatchRange> batch_ranges_joined(std::vector<BatchRange> all) {
    std::sort(all.begin(), all.end(), [](const BatchRange& a, const BatchRange& b) { return a.first < b.first; });
    std::vector<BatchRange> joined;
    for (const BatchRange& r : all)
        if (joined.empty() || r.first > joined.back().last + 1) joined.push_back(r);
        else joined.back().last = std::max(joined.back().last, r.last);
    return joined;
}

inline Json batch_ranges_json(const std::vector<BatchRange>& ranges) {
    Json list = Json::array();
    for (const BatchRange& r : ranges) list.push_back({r.first, r.last});
    return list;
}

// The batch that a step trains on: both are counted from 1, and step S takes batch S where none is skipped.
inline int64_t batch_of_step(int64_t step, const std::vector<BatchRange>& skipped) {
    for (const BatchRange& r : skipped) if (r.first <= step) step += r.last - r.first + 1;
    return step;
}

// A file of a data set, and how often it counts
struct DataShare { std::string path; double times = 1; };

// FILE or FILE:TIMES; a name that exists is one, whatever it ends in.
inline DataShare data_share_of(const std::string& name) {
    struct stat info;
    const size_t colon = name.rfind(':');
    if (colon == std::string::npos || colon + 1 == name.size() || stat(name.c_str(), &info) == 0) return {name};
    char* end;
    const double times = strtod(name.c_str() + colon + 1, &end);
    if (*end) return {name};
    if (!(times > 0 && times <= 1000)) die("%s: a file counts more than 0 and up to 1000 times", name.c_str());
    return {name.substr(0, colon), times};
}

struct DataLoader {
    std::vector<TokenFile> files;
    int T = 0, V = 0;
    DataOrder order = DataOrder::global;
    uint64_t seed = 0;
    bool repetition_filter = false;
    size_t instances = 0;               // in an epoch, the last partial batch included
    int64_t epoch = 0, position = 0;    // position: instances of this epoch that are used, over all ranks
    int64_t masked = 0;                 // instances that the filter masked on this rank since the loader was opened
    std::vector<uint32_t> shuffled;     // (instances), of epoch shuffled_epoch; empty when sequential
    int64_t shuffled_epoch = -1;
    std::vector<BatchRange> skipped;    // in order, see batch_ranges_joined
};

// The blocks of a file that are looked at: about 4096 of the whole set
inline size_t blocks_per_file(const DataLoader& d) { return std::max<size_t>(4, 4096 / d.files.size()); }

// Checks what the files hold, by eight of the blocks of each that the fingerprint reads anyway, and by as many of the
// lists of documents as are read in a moment.
inline void dataloader_check_files(DataLoader* d) {
    size_t left = 4 << 20;
    for (const TokenFile& f : d->files) {
        if (f.header > 0) continue;
        Sample blocks = token_file_blocks(f, blocks_per_file(*d)), sample;
        size_t n = std::min<size_t>(8, blocks.size());
        for (size_t i = 0; i < n; i++) sample.push_back(blocks[n == 1 ? 0 : i * (blocks.size() - 1) / (n - 1)]);
        struct stat info;
        bool documents = stat(documents_path(f.path).c_str(), &info) == 0 && (size_t)info.st_size <= left;
        if (documents) left -= (size_t)info.st_size;
        token_file_check(f, d->V, sample, documents);
    }
}

inline void dataloader_open(DataLoader* d, const std::vector<std::string>& files, int T, int V, DataOrder order,
                            uint64_t seed, bool repetition_filter, const std::string& token_type = "uint16") {
    if (T < 1 || V < 1) die("data: sequence length %d and vocabulary %d have to be positive", T, V);
    *d = DataLoader();
    d->T = T;
    d->V = V;
    d->order = order;
    d->seed = seed;
    d->repetition_filter = repetition_filter;
    size_t longest = 0;
    for (const std::string& name : files) {
        const DataShare share = data_share_of(name);
        for (double left = share.times; left > 0; left -= 1) {          // each time a file of its own
            TokenFile f;
            token_file_open(&f, share.path, token_type == "uint32" ? 4 : 2);
            f.instances = f.tokens / T;
            longest = std::max(longest, f.tokens);
            const size_t whole = f.instances;
            if (left < 1) f.instances = (size_t)floor(left * (double)whole + 1e-6);     // 0.29 of 100 are 29
            if (left < 1 && f.instances == 0)
                die("%s: %.4g of the file's %zu sequences of %d tokens is less than one", name.c_str(), left, whole, T);
            f.first = d->instances;
            d->instances += f.instances;
            d->files.push_back(f);
        }
    }
    if (files.empty()) die("data: no token file given; name one or more");
    dataloader_check_files(d);
    if (d->instances == 0)
        die("data: no sequence of %d tokens in %s%s (the longest file has %zu tokens); shorten --seq or give more data",
            T, files[0].c_str(), files.size() > 1 ? " and the other files" : "", longest);
    if (d->instances > UINT32_MAX)
        die("data: %zu sequences, and the order of an epoch counts to 2^32; lengthen --seq or give fewer files",
            d->instances);
}

inline void dataloader_close(DataLoader* d) {
    for (TokenFile& f : d->files)
        if (f.map) munmap((void*)f.map, f.bytes);
    *d = DataLoader();
}

// The file that an instance is in
inline const TokenFile& token_file_of(const DataLoader& d, size_t instance) {
    auto before = [](size_t i, const TokenFile& file) { return i < file.first; };
    return *(std::upper_bound(d.files.begin(), d.files.end(), instance, before) - 1);
}

// Copies one instance into a row of inputs and a row of targets, both (T). The targets are the inputs shifted left.
// The last one would be outside of the instance and is -100 (ignored), as are all of an instance that the filter hits.
inline void dataloader_row(DataLoader* d, size_t instance, int32_t* inputs, int32_t* targets) {
    const TokenFile* f = &token_file_of(*d, instance);
    size_t start = (instance - f->first) * d->T;
    for (int t = 0; t < d->T; t++) {
        uint32_t id = token_at(*f, start + t);
        if (id >= (uint32_t)d->V)
            die("%s: token %zu has id %u, outside of the vocabulary of %d; was it written with another tokenizer?",
                f->path.c_str(), start + t, id, d->V);
        inputs[t] = (int32_t)id;
    }
    bool hit = d->repetition_filter && repetition_filter_hits(inputs, d->T);
    d->masked += hit;
    for (int t = 0; t < d->T; t++) targets[t] = hit || t + 1 == d->T ? -100 : inputs[t + 1];
}

// Of the batch that the position is at, counted from 1 over all epochs
inline int64_t dataloader_batch(const DataLoader& d, int G) {
    return d.epoch * (int64_t)(d.instances / G) + d.position / G + 1;
}

// To a batch, of which an epoch has floor(instances / G): what is left of it is dropped
inline void dataloader_go_to(DataLoader* d, int G, int64_t batch) {
    const int64_t each = (int64_t)(d->instances / G);
    d->epoch = (batch - 1) / each;
    d->position = (batch - 1) % each * G;
}

// The next global batch of G instances, by their numbers
inline std::vector<size_t> dataloader_draw(DataLoader* d, int G) {
    if ((size_t)G > d->instances)
        die("data: a global batch of %d sequences, but only %zu of %d tokens in the data; "
            "lower --global-batch or give more data", G, d->instances, d->T);
    int64_t batch = dataloader_batch(*d, G);
    for (const BatchRange& r : d->skipped) if (r.first <= batch && batch <= r.last) batch = r.last + 1;
    dataloader_go_to(d, G, batch);
    if (d->order == DataOrder::global && d->shuffled_epoch != d->epoch) {
        d->shuffled.resize(d->instances);
        for (size_t i = 0; i < d->instances; i++) d->shuffled[i] = (uint32_t)i;
        Pcg64 g;
        pcg64_seed(&g, d->seed + (uint64_t)d->epoch);
        pcg64_shuffle(&g, &d->shuffled);
        d->shuffled_epoch = d->epoch;
    }
    std::vector<size_t> numbers;
    for (size_t p = (size_t)d->position; p < (size_t)d->position + G; p++)
        numbers.push_back(d->order == DataOrder::global ? d->shuffled[p] : p);
    d->position += G;
    return numbers;
}

// The next global batch of G instances. This rank gets those at position + rank, position + rank + world, and so on, as
// inputs and targets (G / world, T).
inline void dataloader_next(DataLoader* d, int G, int rank, int world, int32_t* inputs, int32_t* targets) {
    if (world < 1 || rank < 0 || rank >= world || G < 1 || G % world != 0)
        die("data: a global batch of %d sequences cannot be divided among %d ranks", G, world);
    const std::vector<size_t> numbers = dataloader_draw(d, G);
    for (size_t row = 0; row < (size_t)(G / world); row++)
        dataloader_row(d, numbers[rank + world * row], inputs + row * d->T, targets + row * d->T);
}

// For validation: instances first, first + 1, ... in the order of the files. Fills inputs and targets (n, T) and
// returns how many of the n rows hold an instance. The other rows, after the end of the data, are token 0 with all
// targets ignored.
inline size_t dataloader_rows(DataLoader* d, size_t first, size_t n, int32_t* inputs, int32_t* targets) {
    size_t filled = first < d->instances ? std::min(n, d->instances - first) : 0;
    for (size_t row = 0; row < filled; row++)
        dataloader_row(d, first + row, inputs + row * d->T, targets + row * d->T);
    std::fill(inputs + filled * d->T, inputs + n * d->T, 0);
    std::fill(targets + filled * d->T, targets + n * d->T, -100);
    return filled;
}

// Dies if one of the first n instances has an id outside of the vocabulary. Calls alive() while it reads.
inline void dataloader_check(DataLoader* d, size_t n, const std::function<void()>& alive) {
    std::vector<int32_t> row(2 * (size_t)d->T);
    for (size_t i = 0; i < std::min(n, d->instances); i++) {
        dataloader_row(d, i, row.data(), row.data() + d->T);
        if (i % 1024 == 0) alive();
    }
}

inline void dataloader_seek(DataLoader* d, int64_t epoch, int64_t position) {
    if (epoch < 0 || position < 0 || (uint64_t)position > d->instances)
        die("data: epoch %lld, sequence %lld does not exist in data of %zu sequences; "
            "resume with the data of the saved run", (long long)epoch, (long long)position, d->instances);
    d->epoch = epoch;
    d->position = position;
}

inline int64_t dataloader_masked(const DataLoader* d) { return d->masked; }

// Whether only a part of the file's instances counts
inline bool in_part(const TokenFile& f, int T) { return f.instances < f.tokens / T; }

inline size_t dataloader_tokens(const DataLoader* d) {
    size_t tokens = 0;
    for (const TokenFile& f : d->files) tokens += in_part(f, d->T) ? f.instances * d->T : f.tokens;
    return tokens;
}

// FNV-1a of more bytes, after those that `hash` is of
constexpr uint64_t FNV_BASIS = 0xcbf29ce484222325;
inline uint64_t fnv1a(uint64_t hash, const unsigned char* bytes, size_t n) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ bytes[i]) * 0x100000001b3;
    return hash;
}

// A number that differs between data sets, so that a run is not resumed on other data: FNV-1a over every file's number
// of tokens and about 4096 blocks of 4 KB, spread evenly over the set (small sets are read whole), but not over paths.
inline uint64_t dataloader_fingerprint(const DataLoader* d) {
    uint64_t hash = FNV_BASIS;
    for (const TokenFile& f : d->files) {
        uint64_t tokens = f.tokens;
        hash = fnv1a(hash, (const unsigned char*)&tokens, sizeof tokens);
        if (in_part(f, d->T)) hash = fnv1a(hash, (const unsigned char*)&f.instances, sizeof f.instances);
        for (std::string_view block : token_file_blocks(f, blocks_per_file(*d)))
            hash = fnv1a(hash, (const unsigned char*)block.data(), block.size());
    }
    return hash;
}

// ------------------------------------------------------------------------------------------------
// Rows of conversations and preferences, for fine-tuning: a line of JSON each. docs/tour.md has their forms.

// Why a row can't be used: it is left out, with a line.
struct RowError : std::runtime_error { using std::runtime_error::runtime_error; };

// The text of a JSON value: a string, or where there may be `parts` a list of them, [{"type": "text", "text": ...}]
inline std::string text_of(const Json& j, const std::string& name, bool parts) {
    if (j.is_string()) return j;
    if (!parts || !j.is_array())
        throw RowError(name + " is no text" + (parts ? " and no list of parts" : "") + ": " + json_shown(j));
    std::string joined;
    for (const Json& part : j) {
        const Json type = part.is_object() && part.contains("type") ? part["type"] : part;
        if (type != "text" || !part.is_object())
            throw RowError("a part of " + name + " is not of type \"text\": " + json_shown(type));
        if (!part.contains("text")) throw RowError("a part of " + name + " has no \"text\": " + json_shown(part));
        joined += text_of(part["text"], "the text of a part", false);
    }
    return joined;
}

// A list of {"role": "system" | "user" | "assistant", "content": text}, one or more
inline std::vector<ChatMessage> messages_of(const Json& list, const std::string& name = "messages") {
    std::vector<ChatMessage> messages;
    if (!list.is_array() || list.empty()) throw RowError(name + " is no list of messages");
    for (const Json& message : list) {
        for (const char* key : {"role", "content"})
            if (!message.is_object() || !message.contains(key))
                throw RowError(std::string("a message has no \"") + key + "\": " + json_shown(message));
        messages.push_back({text_of(message["role"], "a message's role", false),
                            text_of(message["content"], "a message's content", true)});
        const std::string& role = messages.back().role;
        if (role != "system" && role != "user" && role != "assistant")
            throw RowError("the role " + json_shown(role) + " is not one of system, user, assistant");
    }
    return messages;
}

enum class RowKind { sft, dpo, kto };

// What rows are read for. Which ids are targets:
//   assistant  what the assistant says, and the EOS after it
//   olmoe      as open-instruct trained OLMoE: all but the messages of others, whose spans it counts in a text without
//              BOS and masks in one with it. So each span is masked one id early
struct RowFormat {
    RowKind kind = RowKind::sft;
    bool olmoe_mask = false;
    int T = 0;                          // ids of a sequence, at most
    const Tokenizer* tokenizer = nullptr;
};

// A sequence of ids, BOS first; targets[i]: does the model's -log p of ids[i], at position i - 1, count?
struct RowSequence {
    std::vector<int> ids;
    std::vector<uint8_t> targets;
    int prompt = 0;                     // of KTO's: ids before the completion
};

constexpr int ROW_SLACK = 64;           // ids after the cut: what the last of those before it may depend on

// The sequence of a conversation, whose first `context` messages are masked, whoever speaks. The template is that of
// OLMoE's fine-tuning (spec section 7.2):
//     BOS <|user|>\n CONTENT \n <|assistant|>\n CONTENT EOS \n ...
// without white space at the ends of contents, and at the end of all. It is encoded between one EOS and the next, which
// is what encoding all of it gives: EOS is an added token, and no id holds both it and text.
inline RowSequence row_of_messages(const std::vector<ChatMessage>& messages, size_t context, const RowFormat& f) {
    const int eos = f.tokenizer->eos;
    RowSequence r;
    r.ids = {eos};                      // BOS is the EOS
    r.targets = {f.olmoe_mask};
    std::string open;                   // what follows the last EOS
    auto others = [&](size_t i) { return i < context || messages[i].role != "assistant"; };
    auto tokens = [&] { return (int)(r.ids.size() + tokenizer_encode(*f.tokenizer, open).size()); };    // so far
    auto close = [&] {
        tokenizer_encode(*f.tokenizer, open, &r.ids);
        r.targets.resize(r.ids.size(), f.olmoe_mask);
        open.clear();
    };
    struct Span { int begin, end; };
    std::vector<Span> spans;            // olmoe: those that are masked, counted without BOS; assistant: the targets'
    for (size_t i = 0; i < messages.size(); i++) {
        const int begin = i == 0 || !f.olmoe_mask ? 0 : tokens() - 1;
        const bool answer = messages[i].role == "assistant";
        open += "<|" + messages[i].role + "|>\n";
        const int content = answer ? tokens() : 0;
        if (answer && i >= context && r.prompt == 0) r.prompt = content;
        open += strip(messages[i].content);
        if (answer) {
            close();
            r.ids.push_back(eos);
            r.targets.push_back(f.olmoe_mask);
            if (!f.olmoe_mask && !others(i)) spans.push_back({content, (int)r.ids.size()});
        }
        open += "\n";
        if (!f.olmoe_mask || !others(i)) continue;
        const std::string before = open;
        if (i + 1 < messages.size() && messages[i + 1].role == "assistant") open += "<|assistant|>\n";
        const int end = tokens() - 1;
        spans.push_back({begin, end});
        open = before;
        if (f.kind != RowKind::kto && end > f.T + ROW_SLACK) break;     // what follows is cut off
    }
    open = strip(open, false);
    close();
    for (const Span& s : spans)
        for (int i = s.begin; i < std::min(s.end, (int)r.ids.size()); i++) r.targets[i] = !f.olmoe_mask;
    return r;
}

// The sequence of two texts, as they are: BOS, both, EOS unless it is there. BOS and as many ids as `prompt` alone has
// are the prompt's.
inline RowSequence row_of_texts(const std::string& prompt, const std::string& completion, const RowFormat& f) {
    auto white = [](const std::string& s, size_t i) { return i < s.size() && strchr(" \n\t", s[i]) && s[i]; };
    const bool joined = white(prompt, prompt.size() - 1) || white(completion, 0);
    RowSequence r;
    r.ids = {f.tokenizer->eos};
    tokenizer_encode(*f.tokenizer, prompt + (joined ? "" : " ") + completion, &r.ids);
    if (r.ids.size() == 1 || r.ids.back() != f.tokenizer->eos) r.ids.push_back(f.tokenizer->eos);
    r.prompt = std::min(1 + (int)tokenizer_encode(*f.tokenizer, prompt).size(), (int)r.ids.size());
    r.targets.assign(r.ids.size(), 1);
    std::fill_n(r.targets.begin(), r.prompt - f.olmoe_mask, 0);
    return r;
}

// KTO's mismatched sequence (spec section 9.3): the prompt of one row and the completion of another, each whole; cut at
// T. All of the completion are targets, with olmoe's mask from one id earlier.
inline RowSequence row_mismatched(const int* prompt, int n, const int* completion, int m, const RowFormat& f) {
    RowSequence r;
    r.ids.assign(prompt, prompt + n);
    r.ids.insert(r.ids.end(), completion, completion + m);
    r.prompt = n;
    r.targets.assign(r.ids.size(), 1);
    std::fill_n(r.targets.begin(), n - f.olmoe_mask, 0);
    r.ids.resize(std::min<size_t>(f.T, r.ids.size()));
    r.targets.resize(r.ids.size());
    return r;
}

// Targets among the first T ids; the first id has no predecessor
inline int num_targets(const uint8_t* targets, size_t n, int T) {
    n = std::min<size_t>(n, T);
    return n > 1 ? (int)std::count(targets + 1, targets + n, 1) : 0;
}

// The messages of a side of a pair. Where there is a list of messages for a prompt, and the side does not begin with
// it, as in files for TRL, they follow it.
inline Json after_prompt(const Json& j, const char* side) {
    const Json prompt = j.value("prompt", Json());
    const Json& messages = j[side];
    if (!prompt.is_array()) return messages;
    const bool begins = messages.size() >= prompt.size() && std::equal(prompt.begin(), prompt.end(), messages.begin());
    Json all = begins ? Json::array() : prompt;
    all.insert(all.end(), messages.begin(), messages.end());
    return all;
}

struct RowData {
    std::vector<RowSequence> sides;     // one; of DPO chosen and rejected
    bool label = false;                 // of KTO: desirable
};

// A row from its line. Sequences are cut at T ids, but KTO's, which are still to be joined with others. Throws
// RowError.
inline RowData row_read(const std::string& line, const RowFormat& f) {
    const Json j = json_parse(line);
    if (j.is_discarded()) throw RowError("not JSON");
    if (!j.is_object()) throw RowError("not a JSON object");
    auto field = [&](const char* name) -> const Json& {         // null is what tables have where there is none
        if (!j.contains(name) || j[name].is_null()) throw RowError(std::string("no \"") + name + "\"");
        return j[name];
    };
    auto words = [&](const char* name) { return text_of(field(name), name, false); };
    RowData row;
    if (f.kind == RowKind::sft && j.contains("messages") && !j["messages"].is_null()) {
        row.sides = {row_of_messages(messages_of(j["messages"]), 0, f)};
    } else if (f.kind == RowKind::sft) {
        if (!j.contains("prompt") || j["prompt"].is_null())
            throw RowError("neither \"messages\" nor \"prompt\" and \"completion\"");
        row.sides = {row_of_texts(words("prompt"), words("completion"), f)};
    } else if (f.kind == RowKind::dpo) {
        if (field("chosen").is_array() != field("rejected").is_array())
            throw RowError("one of \"chosen\" and \"rejected\" is a text, the other one messages");
        for (const char* name : {"chosen", "rejected"})
            row.sides.push_back(j[name].is_array() ? row_of_messages(messages_of(after_prompt(j, name), name), 0, f)
                                                   : row_of_texts(words("prompt"), words(name), f));
    } else {
        if (!field("label").is_boolean()) throw RowError("label is neither true nor false: " + json_shown(j["label"]));
        row.label = j["label"];
        if (field("prompt").is_array() != field("completion").is_array())
            throw RowError("one of \"prompt\" and \"completion\" is a text, the other one messages");
        if (j["prompt"].is_array()) {
            std::vector<ChatMessage> all = messages_of(j["prompt"], "prompt");
            const size_t context = all.size();
            for (const ChatMessage& m : messages_of(j["completion"], "completion")) all.push_back(m);
            row.sides = {row_of_messages(all, context, f)};
        } else {
            row.sides = {row_of_texts(words("prompt"), words("completion"), f)};
        }
    }
    for (RowSequence& s : row.sides) {
        if (f.kind == RowKind::kto) continue;
        s.ids.resize(std::min<size_t>(f.T, s.ids.size()));
        s.targets.resize(s.ids.size());
    }
    return row;
}
