// Token files, as dolma writes them: FILE.npy holds uint16 tokens without a header, uint32 where the tokenizer has ids
// above 65,535, and FILE.csv.gz next to it has a line for each document: start, end (offsets of its tokens, its
// end-of-document included), id, src (the input file), loc (the line in it).
//
// Threads take turns at reading: each takes a batch of documents, encodes it while others read the next ones, and adds
// it to the encoded batches. The thread that adds the next batch in the order of the inputs writes it, so no byte of
// the output depends on the number of threads. Only a few batches are in memory at a time, and a long .txt is cut into
// pieces: inputs may be larger than the memory.
//
// A run that was stopped goes on from its last save. FILE.npy.state holds how much of the inputs is done, and sizes and
// checksums of what was written until then: a file that is not so is not believed. The parts before the one being
// written are complete. The name of what is not complete ends in .tmp.

#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <nlohmann/json.hpp>

#include "../dataloader.h"
#include "../lib/files.h"
#include "../lib/options.h"
#include "../tokenizer.h"

// ------------------------------------------------------------------------------------------------
// Reading text

// The next `bytes` or so of a document that is a whole file. Pieces are cut before white space that follows something
// else. The tokens of the pieces are then those of the document: in the pattern of byte-level BPE, and in OLMoE's
// added tokens, a word that begins with something else holds no white space. False where reading failed; sets `last`
// with the last piece.
inline bool lines_piece(LineReader* r, std::string* piece, size_t bytes, bool* last) {
    piece->clear();
    size_t searched = 0;
    do {
        piece->append(r->buffer, r->at, std::string::npos);
        r->at = r->buffer.size();
        if (piece->size() < bytes) continue;
        for (size_t i = piece->size() - 1; i > searched; i--) {
            char c = (*piece)[i];
            if (!(c == ' ' || (c >= 9 && c <= 13)) || white_space(*piece, 0, i, false)) continue;
            r->buffer.assign(*piece, i, std::string::npos);
            r->at = 0;
            piece->resize(i);
            return true;
        }
        searched = piece->size() - 1;
    } while (lines_read(r));
    *last = true;
    return !r->failed;
}

// ------------------------------------------------------------------------------------------------
// From inputs to batches of tokens

constexpr size_t BATCH_BYTES = 1 << 18;     // of text: some ten milliseconds of BPE
constexpr size_t DAMAGE_SHOWN = 20;         // damaged lines of a file that are reported one by one

struct TextPosition { size_t file = 0, offset = 0, line = 1; };     // the next byte of the (unpacked) inputs

// A document, or a part of a long .txt
struct TextPiece {
    size_t file = 0, line = 0;              // where it is
    bool first = true, last = true;         // of its document
    std::string text;                       // of a .jsonl the line; empty after encoding
    std::string id;
    std::string damage;                     // why the line can't be read; else empty
    size_t bytes = 0, invalid = 0;          // of the text of a .txt; those of them that are not UTF-8, ...
    size_t first_invalid = 0;               // ... and which is the first
    bool utf16 = false;                     // the file begins with the mark of UTF-16
    std::vector<int> tokens;                // none where the text is empty
};

struct TextBatch {
    std::vector<TextPiece> pieces;
    TextPosition next;                      // after it
    size_t bytes = 0;                       // of the inputs, as they are on the disk, up to its end
    std::string failure;                    // why the inputs can't be read after it; else empty
};

struct InputReader {
    std::vector<std::string> paths;
    std::vector<nlohmann::json> stamps;     // path, size, time of change: whether a file is still the one that was read
    std::vector<size_t> starts;             // bytes before each file, and of all
    TextPosition at;
    LineReader lines;
    bool open = false, inside = false;      // a file is open; within the document of a .txt
};

// dolma's own files are named .json.gz.
inline bool input_is_jsonl(const std::string& path) {
    return ends_with(path, ".jsonl") || ends_with(path, ".jsonl.gz") || ends_with(path, ".json.gz");
}

// {path (as valid UTF-8), bytes, nanoseconds of its last change}; the last two are 0 where there is no such file.
inline nlohmann::json file_stamp(const std::string& path) {
    struct stat info = {};
    bool there = stat(path.c_str(), &info) == 0;
    std::string name = nlohmann::json(path).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    int64_t size = there ? (int64_t)info.st_size : 0;
    int64_t changed = there ? info.st_mtim.tv_sec * 1000000000ll + info.st_mtim.tv_nsec : 0;
    return {name, size, changed};
}

// Checks all inputs, so that a wrong one is not found after hours.
inline void inputs_check(InputReader* r, const std::vector<std::string>& paths) {
    if (paths.empty()) die("tokenize: no input file given; name .txt or .jsonl files");
    r->paths = paths;
    r->starts = {0};
    for (const std::string& path : paths) {
        int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        struct stat info;
        if (file < 0 || fstat(file, &info) != 0) die("%s: cannot be read: %s", path.c_str(), strerror(errno));
        if (!S_ISREG(info.st_mode)) die("%s: not a regular file; name the text files themselves", path.c_str());
        char begin[512];
        ssize_t n = std::max<ssize_t>(0, pread(file, begin, sizeof begin, 0));
        close(file);
        bool named = input_is_jsonl(path) || ends_with(path, ".txt") || ends_with(path, ".txt.gz");
        const FileFormat* other = file_format(path, std::string_view(begin, (size_t)n));
        if (other && !(named && other->suffix == std::string(".gz")))
            die("%s: not text, but %s", path.c_str(), format_advice(*other, path).c_str());
        if (!named)
            die("%s: neither .txt (a document) nor .jsonl (a document a line); rename it if it is one of them",
                path.c_str());
        r->stamps.push_back(file_stamp(path));
        r->starts.push_back(r->starts.back() + (size_t)info.st_size);
    }
}

// The next batch; false after the last one.
inline bool inputs_next(InputReader* r, TextBatch* b) {
    for (size_t bytes = 0; bytes < BATCH_BYTES && r->at.file < r->paths.size(); ) {
        const std::string& path = r->paths[r->at.file];
        if (!r->open && !lines_open(&r->lines, path, r->at.offset)) {
            b->failure = path + ": cannot be read: " + strerror(errno);
            break;
        }
        r->open = true;
        TextPiece p;
        p.file = r->at.file;
        p.line = r->at.line;
        bool jsonl = input_is_jsonl(path), more = true;
        if (jsonl) {
            more = lines_next(&r->lines, &p.text);
            r->at.line++;
            r->at.offset = r->lines.offset;
        } else {
            p.first = !r->inside;
            p.last = false;
            lines_piece(&r->lines, &p.text, BATCH_BYTES, &p.last);
            r->inside = !p.last;
        }
        if (r->lines.failed) {
            b->failure = path + ":" + std::to_string(p.line)
                + ": cannot be read from here on; the file is damaged or cut short";
            break;
        }
        b->bytes = r->starts[p.file] + (size_t)gzoffset(r->lines.file);
        bytes += p.text.size() + 64;
        bool ended = jsonl ? !more : p.last;
        if (more) b->pieces.push_back(std::move(p));
        if (ended) {
            gzclose(r->lines.file);
            r->open = false;
            r->at = TextPosition{r->at.file + 1, 0, 1};
        }
    }
    b->next = r->at;
    return !b->pieces.empty() || !b->failure.empty();
}

// What a line of .jsonl is read for. The library calls it for each part of the JSON.
struct JsonlLine : nlohmann::json_sax<nlohmann::json> {
    std::string text, id, error;            // error: why the line can't be read; else empty
    bool has_text = false, has_id = false, too_large = false;   // too_large: by a number that the library refuses
    int depth = 0;
    std::string name;                       // of a field of the outermost object while its value comes; else empty

    bool value(const std::string* as_text, const std::string* as_id) {
        if (name == "text" && (has_text = as_text)) text = *as_text;
        if (name == "id" && (has_id = as_id)) id = *as_id;
        name.clear();
        return true;
    }
    bool nested(int by) {
        depth += by;
        return value(nullptr, nullptr);
    }
    bool number(const std::string& written) { return value(nullptr, &written); }
    bool null() override { return value(nullptr, nullptr); }
    bool boolean(bool) override { return value(nullptr, nullptr); }
    bool number_integer(int64_t x) override { return number(std::to_string(x)); }
    bool number_unsigned(uint64_t x) override { return number(std::to_string(x)); }
    // It may be an integer of many digits. With an exponent it may be the stand-in of json_numbers_limited.
    bool number_float(double, const std::string& written) override {
        return written.find_first_of("eE") == std::string::npos ? number(written) : value(nullptr, nullptr);
    }
    bool string(std::string& s) override { return value(&s, &s); }
    bool binary(nlohmann::json::binary_t&) override { return true; }    // not in JSON
    bool start_object(size_t) override { return nested(1); }
    bool end_object() override { return nested(-1); }
    bool start_array(size_t) override { return nested(1); }
    bool end_array() override { return nested(-1); }
    bool key(std::string& s) override {
        name = depth == 1 ? s : "";
        return true;
    }
    bool parse_error(size_t byte, const std::string&, const nlohmann::detail::exception& e) override {
        too_large = e.id == 406;
        const char* what = strstr(e.what(), "UTF-8") ? "not UTF-8 at byte " : "not JSON from byte ";
        error = what + std::to_string(byte) + " on";
        return false;
    }
};

inline JsonlLine jsonl_read(const std::string& line) {
    JsonlLine j;
    nlohmann::json::sax_parse(line, &j);
    if (j.too_large) {
        j = JsonlLine();
        nlohmann::json::sax_parse(json_numbers_limited(line), &j);
    }
    if (j.error.empty() && !j.has_text) j.error = "not an object with a string \"text\"";
    return j;
}

// The bytes FF FE or FE FF
inline bool utf16_mark(const std::string& s) {
    return s.compare(0, 2, "\xff\xfe") == 0 || s.compare(0, 2, "\xfe\xff") == 0;
}

// Counts the bytes of a piece that are not UTF-8.
inline void piece_check(TextPiece* p) {
    const char *begin = p->text.data(), *end = begin + p->text.size();
    p->bytes = p->text.size();
    p->utf16 = p->first && utf16_mark(p->text);
    for (const char* s = begin; s < end; ) {
        uint64_t eight = 0;
        if (end - s >= 8) memcpy(&eight, s, 8);
        if (end - s >= 8 && !(eight & 0x8080808080808080)) {
            s += 8;
            continue;
        }
        int n = utf8_length(s, end);
        if (n < 0 && p->invalid == 0) p->first_invalid = (size_t)(s - begin);
        if (n < 0) p->invalid += (size_t)-n;
        s += std::abs(n);
    }
}

// .txt: the file is a document, named after the file. .jsonl: a document a line, {"text": ..., "id": ...}; without an
// id, a string or a number, it is named FILE-LINE. Documents are stripped and encoded without special tokens.
inline void piece_encode(const Tokenizer& t, const std::string& path, TextPiece* p) {
    bool jsonl = input_is_jsonl(path);
    if (!jsonl) piece_check(p);
    std::string document = strip(p->text, p->first, p->last);
    p->text = std::string();
    p->id = path.substr(path.rfind('/') + 1);       // npos + 1 is 0
    if (jsonl && !document.empty()) {
        JsonlLine j = jsonl_read(document);
        p->damage = p->line == 1 && utf16_mark(document) ? "UTF-16, and not UTF-8" : j.error;
        if (!p->damage.empty()) return;
        p->id = j.has_id ? j.id : p->id + "-" + std::to_string(p->line);
        document = strip(j.text);
    }
    if (document.empty()) return;
    p->tokens = tokenizer_encode(t, document);
}

// ------------------------------------------------------------------------------------------------
// Writing

struct TokenizeCounts { size_t documents, tokens, files, damaged; };

// The size and the checksum of a file, or of what is written of it
struct FileSum {
    size_t bytes = 0;
    uint32_t crc = 0;
    void add(const void* data, size_t n) {
        crc = (uint32_t)crc32_z(crc, (const Bytef*)data, n);
        bytes += n;
    }
    bool operator==(const FileSum& other) const { return bytes == other.bytes && crc == other.crc; }
};

struct TokenWriter {
    std::string out, base;                  // FILE.npy, FILE
    int eos = 0, width = 2;                 // width: bytes of a token
    bool keeps_bytes = false;               // the tokenizer replaces nothing
    size_t max_tokens = 0, save_every = 0;  // of a file, 0: no limit; between two saves
    FILE *npy = nullptr, *csv = nullptr;    // of the part being written; the .csv is packed when it is complete
    std::vector<int> document;              // tokens of the document being written that are not yet in the .npy
    int previous = -1;                      // its last token, or -1
    size_t start = 0;                       // where it starts in the .npy
    TextPiece text;                         // of a .txt, what piece_check found so far
    int lock = -1;                          // of the first part that is complete, but has not its final name yet
    size_t shown = 0, shown_file = 0;       // damaged lines of the file being written, and which file that is

    // What is saved
    size_t part = 0, part_tokens = 0, documents = 0, tokens = 0, damaged = 0;
    FileSum npy_sum, csv_sum;               // of the part being written
    std::vector<std::array<FileSum, 2>> sums;   // of the parts before it: .csv.gz and .npy
    bool finished = false;
    TextPosition at;

    size_t saved_tokens = 0, published = 0; // tokens at the last save; parts that have their final names
    bool saved = false, bar = false;        // there is a state to go on from; there is a progress bar to overwrite
};

// A single part is FILE.npy, several are FILE-00000.npy and so on. Until it is complete, .tmp follows.
inline std::string part_name(const TokenWriter& w, size_t part, bool single) {
    char number[32];
    snprintf(number, sizeof number, "-%05zu", part);
    return single ? w.base : w.base + number;
}
inline std::string part_tmp(const TokenWriter& w, size_t part, const char* suffix) {
    return part_name(w, part, part == 0) + suffix + ".tmp";
}
inline std::string part_final(const TokenWriter& w, size_t part, const char* suffix) {
    return part_name(w, part, w.finished && w.part == 1) + suffix;
}

[[noreturn]] inline void writer_fails(const std::string& path) {
    throw std::runtime_error(path + ": cannot be written: " + strerror(errno));
}

// A line on standard error, in the place of the progress bar
inline void writer_says(const TokenWriter& w, const std::string& line) {
    fputs(((w.bar ? "\r\x1b[K" : "") + line + "\n").c_str(), stderr);
}

inline void writer_sync_folder(const TokenWriter& w) {
    std::string folder = w.out.find('/') == std::string::npos ? "." : w.out.substr(0, w.out.rfind('/') + 1);
    if (!folder_sync(folder)) writer_fails(folder);
}

// The sum of a file's first bytes, or of all.
inline FileSum file_sum(int file, size_t bytes) {
    FileSum sum;
    std::vector<char> buffer(1 << 16);
    while (sum.bytes < bytes) {
        ssize_t n = pread(file, buffer.data(), std::min(buffer.size(), bytes - sum.bytes), (off_t)sum.bytes);
        if (n <= 0) break;
        sum.add(buffer.data(), (size_t)n);
    }
    return sum;
}

[[noreturn]] inline void writer_disbelieves(const std::string& path) {
    throw std::runtime_error(path + ": not as the stopped run left it; start over with --restart");
}

// A file of the part being written, cut to what was saved of it. It is locked: two runs in one file would destroy it.
inline FILE* writer_open(const std::string& path, const FileSum& saved) {
    struct stat info, named;
    for (;;) {
        int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (file < 0) writer_fails(path);
        if (flock(file, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
            throw std::runtime_error(path + ": another run is writing it");
        if (fstat(file, &info) != 0) writer_fails(path);
        // Another run may have finished meanwhile, and given this file its final name.
        bool same = stat(path.c_str(), &named) == 0 && named.st_ino == info.st_ino && named.st_dev == info.st_dev;
        if (!same) close(file);
        if (!same) continue;
        if (!(file_sum(file, saved.bytes) == saved)) writer_disbelieves(path);
        if (ftruncate(file, (off_t)saved.bytes) != 0 || lseek(file, 0, SEEK_END) < 0) writer_fails(path);
        return fdopen(file, "r+");
    }
}

inline void writer_open_part(TokenWriter* w) {
    w->npy = writer_open(part_tmp(*w, w->part, ".npy"), w->npy_sum);
    w->csv = writer_open(part_tmp(*w, w->part, ".csv"), w->csv_sum);
}

// Writes n tokens of the document.
inline void writer_put(TokenWriter* w, const int* tokens, size_t n) {
    if (!w->npy) writer_open_part(w);
    std::vector<uint16_t> narrow;
    if (w->width == 2) narrow.assign(tokens, tokens + n);
    const void* bytes = w->width == 2 ? (const void*)narrow.data() : tokens;
    if (fwrite(bytes, w->width, n, w->npy) != n) writer_fails(part_tmp(*w, w->part, ".npy"));
    w->npy_sum.add(bytes, w->width * n);
    w->part_tokens += n;
    w->tokens += n;
}

// The document's line in the .csv, from its start to here.
inline void writer_row(TokenWriter* w, const TextPiece& p, const std::string& src) {
    auto quote = [](const std::string& s) {     // for CSV; a line break would end the line, so it becomes a space
        std::string q = "\"";
        for (char c : s) q += c == '"' ? "\"\"" : std::string(1, c == '\n' || c == '\r' ? ' ' : c);
        return s.find_first_of(",\"\r\n") == std::string::npos ? s : q + "\"";
    };
    std::string row = std::to_string(w->start) + "," + std::to_string(w->part_tokens) + "," + quote(p.id) + ","
        + quote(src) + "," + std::to_string(p.line) + "\n";
    if (fwrite(row.data(), 1, row.size(), w->csv) != row.size()) writer_fails(part_tmp(*w, w->part, ".csv"));
    w->csv_sum.add(row.data(), row.size());
    w->start = w->part_tokens;
}

// Completes the part being written: both files are complete and on the disk, under temporary names.
inline void writer_end_part(TokenWriter* w) {
    std::string packed = part_tmp(*w, w->part, ".csv.gz");
    int file = open(packed.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    gzFile gz = file < 0 ? nullptr : gzdopen(dup(file), "wb");      // its header has neither name nor time
    if (!gz || fflush(w->csv) != 0) writer_fails(packed);
    rewind(w->csv);
    std::vector<char> buffer(1 << 16);
    while (size_t n = fread(buffer.data(), 1, buffer.size(), w->csv))
        if (gzwrite(gz, buffer.data(), (unsigned)n) != (int)n) writer_fails(packed);
    if (ferror(w->csv) || gzclose(gz) != Z_OK || fsync(file) != 0) writer_fails(packed);
    w->sums.push_back({file_sum(file, SIZE_MAX), w->npy_sum});
    if (close(file) != 0) writer_fails(packed);
    if (w->lock < 0) w->lock = dup(fileno(w->npy));         // locked as long as one of both is open
    if (fflush(w->npy) != 0 || fsync(fileno(w->npy)) != 0 || fclose(w->npy) != 0)
        writer_fails(part_tmp(*w, w->part, ".npy"));
    fclose(w->csv);
    w->npy = w->csv = nullptr;
    w->part++;
    w->part_tokens = w->start = 0;
    w->npy_sum = w->csv_sum = FileSum();
}

// Gives complete parts their final names, the .csv.gz first, so that a .npy never misses its documents. Goes on where
// it was stopped.
inline void writer_publish(TokenWriter* w) {
    for (; w->published < w->part; w->published++) {
        for (const char* suffix : {".csv.gz", ".npy"}) {
            std::string from = part_tmp(*w, w->published, suffix), to = part_final(*w, w->published, suffix);
            if (rename(from.c_str(), to.c_str()) == 0) continue;
            if (errno != ENOENT || access(to.c_str(), F_OK) != 0) writer_fails(to);
        }
        unlink(part_tmp(*w, w->published, ".csv").c_str());
    }
    writer_sync_folder(*w);
    if (w->lock >= 0) close(w->lock);
    w->lock = -1;
}

// Saves how far the run is, then gives the complete parts their final names.
inline void writer_save(TokenWriter* w, const InputReader& r, const nlohmann::json& run) {
    if (w->npy && (fflush(w->npy) != 0 || fsync(fileno(w->npy)) != 0)) writer_fails(part_tmp(*w, w->part, ".npy"));
    if (w->csv && (fflush(w->csv) != 0 || fsync(fileno(w->csv)) != 0)) writer_fails(part_tmp(*w, w->part, ".csv"));
    size_t begun = w->at.file + (w->at.offset > 0);         // inputs that are read, or read in part
    std::vector<nlohmann::json> inputs(r.stamps.begin(), r.stamps.begin() + (ptrdiff_t)begun);
    nlohmann::json sums = nlohmann::json::array();
    for (const auto& [csv, npy] : w->sums) sums.push_back({csv.bytes, csv.crc, npy.bytes, npy.crc});
    nlohmann::json state = {
        {"run", run},
        {"inputs", inputs},
        {"at", {w->at.file, w->at.offset, w->at.line}},
        {"finished", w->finished},
        {"part", {w->part, w->published, w->part_tokens}},
        {"written", {w->csv_sum.bytes, w->csv_sum.crc, w->npy_sum.bytes, w->npy_sum.crc}},
        {"complete", sums},
        {"counts", {w->documents, w->tokens, w->damaged}}};
    std::string line = state.dump() + "\n";
    std::string path = w->out + ".state", tmp = path + ".tmp";
    FILE* f = fopen(tmp.c_str(), "wbe");
    if (!f || fwrite(line.data(), 1, line.size(), f) != line.size()) writer_fails(path);
    if (fflush(f) != 0 || fsync(fileno(f)) != 0 || fclose(f) != 0) writer_fails(path);
    if (rename(tmp.c_str(), path.c_str()) != 0) writer_fails(path);
    w->saved = true;                        // whatever fails from here on: the state needs its files
    w->saved_tokens = w->tokens;
    writer_sync_folder(*w);
    writer_publish(w);
}

// Adds a document, or a piece of one. As in dolma (memmap_writer.py), a document that would bring a file to max_tokens
// or more begins the next file. A document of max_tokens or more fits into no file of dolma's. Here it begins a file,
// fills as many as it needs, and has a line in each.
inline void writer_piece(TokenWriter* w, const TextPiece& p, const std::string& src) {
    if (p.first) {
        w->previous = -1;
        w->start = w->part_tokens;
    }
    w->document.insert(w->document.end(), p.tokens.begin(), p.tokens.end());
    if (!p.tokens.empty()) w->previous = p.tokens.back();
    if (w->previous < 0) return;            // empty so far
    if (p.last && w->previous != w->eos) w->document.push_back(w->eos);
    const int* tokens = w->document.data();
    size_t left = w->document.size(), limit = w->max_tokens;
    if (limit > 0) {
        if (w->part_tokens > 0 && w->part_tokens + left >= limit && (p.last || left > limit)) writer_end_part(w);
        for (; left > limit; tokens += limit, left -= limit) {
            writer_put(w, tokens, limit);
            writer_row(w, p, src);
            writer_end_part(w);
        }
    }
    if (limit == 0 || p.last) {
        writer_put(w, tokens, left);
        left = 0;
    }
    w->document.erase(w->document.begin(), w->document.end() - (ptrdiff_t)left);
    if (!p.last) return;
    writer_row(w, p, src);
    w->documents++;
}

// One line for a .txt that is not all UTF-8, after its last piece.
inline void writer_text(TokenWriter* w, const TextPiece& p, const std::string& path) {
    TextPiece& t = w->text;
    if (p.first) t = TextPiece();
    if (p.first) t.utf16 = p.utf16;
    if (t.invalid == 0) t.first_invalid = t.bytes + p.first_invalid;
    t.bytes += p.bytes;
    t.invalid += p.invalid;
    if (!p.last || t.invalid == 0) return;
    std::string what = t.invalid == 1 ? " byte is not UTF-8" : " bytes are not UTF-8";
    writer_says(*w, path + ": " + (t.utf16 ? "begins with the mark of UTF-16, but is read as UTF-8; " : "")
                + std::to_string(t.invalid) + what + ", the first at byte " + std::to_string(t.first_invalid + 1)
                + (w->keeps_bytes ? "; kept as they are" : "; replaced by U+FFFD"));
}

// Writes a batch, reports its damaged lines, and saves if a part is complete or enough was written.
inline void writer_batch(TokenWriter* w, const TextBatch& b, const InputReader& r, const nlohmann::json& run) {
    auto end_file = [&](size_t next) {      // after the last damaged line of a file
        size_t more = w->shown - std::min(w->shown, DAMAGE_SHOWN);
        if (more > 0) writer_says(*w, r.paths[w->shown_file] + ": " + std::to_string(more) + " more damaged lines");
        w->shown = 0;
        w->shown_file = next;
    };
    for (const TextPiece& p : b.pieces) {
        const std::string& path = r.paths[p.file];
        if (p.file != w->shown_file) end_file(p.file);
        if (p.damage.empty()) {
            writer_piece(w, p, path);
            writer_text(w, p, path);
        } else {
            w->damaged++;
            if (++w->shown <= DAMAGE_SHOWN)
                writer_says(*w, path + ":" + std::to_string(p.line) + ": " + p.damage + "; left out");
        }
    }
    w->at = b.next;
    if (w->at.file == r.paths.size() || !b.failure.empty()) end_file(w->shown_file);
    if (!b.failure.empty()) throw std::runtime_error(b.failure);
    bool enough = w->part > w->published || w->tokens - w->saved_tokens >= w->save_every;
    if (enough && b.pieces.back().last) writer_save(w, r, run);
}

// Takes over a saved state. Refuses that of another run.
inline void writer_restore(TokenWriter* w, const InputReader& r, const nlohmann::json& run, const nlohmann::json& state,
                           const std::string& path) {
    auto &at = state.at("at"), &part = state.at("part"), &counts = state.at("counts"), &inputs = state.at("inputs");
    auto sum = [](const nlohmann::json& j, size_t i) { return FileSum{j.at(i), j.at(i + 1)}; };
    w->finished = state.at("finished");
    bool same = state.at("run") == run && inputs.size() <= r.stamps.size();
    if (w->finished && inputs.size() != r.stamps.size()) same = false;
    for (size_t i = 0; same && i < inputs.size(); i++) same = inputs[i] == r.stamps[i];
    if (!same)
        throw std::runtime_error(path + ": saved by a run with other inputs, options or another tokenizer; "
                                 "start over with --restart");
    w->at = TextPosition{at.at(0), at.at(1), at.at(2)};
    w->part = part.at(0);
    w->published = part.at(1);
    w->part_tokens = part.at(2);
    w->csv_sum = sum(state.at("written"), 0);
    w->npy_sum = sum(state.at("written"), 2);
    for (const nlohmann::json& j : state.at("complete")) w->sums.push_back({sum(j, 0), sum(j, 2)});
    if (w->sums.size() != w->part || w->published > w->part || w->at.file > r.paths.size())
        throw std::runtime_error(path + ": damaged; start over with --restart");
    w->documents = counts.at(0);
    w->tokens = w->saved_tokens = counts.at(1);
    w->damaged = counts.at(2);
}

// Refuses complete parts that are not as they were saved. Those that have their final names count by their size, the
// others, which may have either name, by their contents.
inline void writer_check(const TokenWriter& w) {
    for (size_t part = 0; part < w.part; part++)
        for (size_t i : {0, 1}) {
            const char* suffix = i == 0 ? ".csv.gz" : ".npy";
            std::string path = part_tmp(w, part, suffix);
            if (part < w.published || access(path.c_str(), F_OK) != 0) path = part_final(w, part, suffix);
            int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
            struct stat info = {};
            bool as_saved = file >= 0 && fstat(file, &info) == 0 && (size_t)info.st_size == w.sums[part][i].bytes
                && (part < w.published || file_sum(file, SIZE_MAX) == w.sums[part][i]);
            if (file >= 0) close(file);
            if (!as_saved) writer_disbelieves(path);
        }
}

// Begins a run, or goes on from the state that a stopped run saved.
inline void writer_begin(TokenWriter* w, InputReader* r, const nlohmann::json& run, bool restart) {
    std::string path = w->out + ".state", first = part_name(*w, 0, false) + ".npy", line;
    LineReader lines;
    if (!restart && lines_open(&lines, path)) {
        lines_next(&lines, &line);
        gzclose(lines.file);
        try {
            writer_restore(w, *r, run, nlohmann::json::parse(line, nullptr, false), path);
        } catch (const nlohmann::json::exception&) {
            throw std::runtime_error(path + ": damaged; start over with --restart");
        }
        writer_check(*w);
        w->saved = true;
        r->at = w->at;
        w->shown_file = w->at.file;
        if (!w->finished) writer_open_part(w);
        writer_publish(w);
        return;
    }
    if (!restart && errno != ENOENT) throw std::runtime_error(path + ": cannot be read: " + strerror(errno));
    for (const std::string& earlier : {first, w->out})
        if (w->max_tokens > 0 && !restart && access(earlier.c_str(), F_OK) == 0)
            throw std::runtime_error(earlier + ": written by an earlier run; --restart replaces its files");
    writer_open_part(w);
    if (unlink(path.c_str()) != 0 && errno != ENOENT) writer_fails(path);
}

// False where none of the files was there
inline bool files_remove(const std::vector<std::string>& paths) {
    bool any = false;
    for (const std::string& path : paths) any |= unlink(path.c_str()) == 0;
    return any;
}

// Completes the last part. Removes what an earlier run left under this name.
inline void writer_finish(TokenWriter* w, const InputReader& r, const nlohmann::json& run) {
    if (w->documents == 0)
        throw std::runtime_error("tokenize: no text in " + r.paths[0]
                                 + (r.paths.size() > 1 ? " or the other files" : ""));
    if (!w->finished) {
        if (w->part_tokens > 0) writer_end_part(w);
        w->finished = true;
        writer_save(w, r, run);
    }
    size_t k = w->part;
    while (files_remove({part_tmp(*w, k, ".npy"), part_tmp(*w, k, ".csv"), part_tmp(*w, k, ".csv.gz")})) k++;
    k = w->part == 1 ? 0 : w->part;
    if (w->max_tokens > 0)
        while (files_remove({part_name(*w, k, false) + ".npy", part_name(*w, k, false) + ".csv.gz"})) k++;
    if (w->part > 1) files_remove({w->out, w->base + ".csv.gz"});
    files_remove({w->out + ".state"});
}

// ------------------------------------------------------------------------------------------------
// The threads

struct TokenizeOptions {
    size_t max_tokens = 0, save_every = 1 << 25;    // as in TokenWriter
    size_t threads = 1;
    bool restart = false;                           // forget what a stopped run saved, replace parts of an earlier run
};

// What the threads share. `reading` guards the reader and `taken`, `state` guards the rest. While `writing` is set, one
// thread uses the writer.
struct TokenizePool {
    const Tokenizer* tokenizer;
    InputReader* reader;
    TokenWriter* writer;
    nlohmann::json run;
    std::mutex reading, state;
    std::condition_variable changed;
    std::map<size_t, TextBatch> encoded;    // by number; not yet written
    size_t threads = 1, taken = 0, written = 0, running = 0, bytes = 0, tokens = 0;
    bool writing = false;
    std::string failure;
};

// Takes the next batch and its number, once few enough are in memory. False after the last batch, or where one failed.
inline bool pool_take(TokenizePool* pool, TextBatch* b, size_t* number) {
    std::lock_guard<std::mutex> reading(pool->reading);
    {
        std::unique_lock<std::mutex> state(pool->state);
        pool->changed.wait(state, [&] {
            return !pool->failure.empty() || pool->taken < pool->written + 4 * pool->threads;
        });
        if (!pool->failure.empty()) return false;
    }
    if (!inputs_next(pool->reader, b)) return false;
    *number = pool->taken++;
    return true;
}

// Writes the encoded batches that are next in the order of the inputs. `state` is locked before and after.
inline void pool_write(TokenizePool* pool, std::unique_lock<std::mutex>* state) {
    for (;;) {
        auto due = pool->encoded.begin();
        bool ready = due != pool->encoded.end() && due->first == pool->written;
        if (!ready || !pool->failure.empty()) return;
        TextBatch b = std::move(due->second);
        std::string failure;
        pool->encoded.erase(due);
        state->unlock();
        try {
            writer_batch(pool->writer, b, *pool->reader, pool->run);
        } catch (const std::exception& e) {
            failure = e.what();
        }
        state->lock();
        pool->failure = failure;
        pool->written++;
        pool->bytes = b.bytes;
        pool->tokens = pool->writer->tokens;
        pool->changed.notify_all();
    }
}

// A thread: takes a batch, encodes it, adds it to the encoded batches, and writes, until there is no more.
inline void tokenize_batches(TokenizePool* pool) {
    for (;;) {
        TextBatch mine;
        size_t number = 0;
        if (!pool_take(pool, &mine, &number)) break;
        try {
            for (TextPiece& p : mine.pieces) piece_encode(*pool->tokenizer, pool->reader->paths[p.file], &p);
        } catch (const std::exception& e) {
            mine.failure = "tokenize: " + std::string(e.what());    // no memory
        }

        std::unique_lock<std::mutex> state(pool->state);
        pool->encoded.emplace(number, std::move(mine));
        if (pool->writing) continue;        // the thread that is writing also writes this batch
        pool->writing = true;
        pool_write(pool, &state);
        pool->writing = false;
    }
    std::lock_guard<std::mutex> state(pool->state);
    pool->running--;
    pool->changed.notify_all();
}

// The progress bar, on a terminal only: the share of the inputs' bytes that is written, rates, and the time left.
inline void tokenize_watch(TokenizePool* pool) {
    auto begin = std::chrono::steady_clock::now();
    size_t total = std::max<size_t>(1, pool->reader->starts.back());
    size_t first_bytes = pool->bytes, first_tokens = pool->tokens;
    std::unique_lock<std::mutex> state(pool->state);
    while (!pool->changed.wait_for(state, std::chrono::milliseconds(200), [&] { return pool->running == 0; })) {
        if (!pool->writer->bar) continue;
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        double rate = (double)(pool->bytes - first_bytes) / seconds;
        double token_rate = (double)(pool->tokens - first_tokens) / seconds;
        double share = std::min(1.0, (double)pool->bytes / (double)total);
        long eta = rate > 0 ? (long)((1 - share) * (double)total / rate) : 0;
        char line[128];
        snprintf(line, sizeof line, "\r[%-20.*s] %3d %% | %.1f MB/s | %.2f M tok/s | eta %ldh%02ldm%02lds\x1b[K",
                 (int)(20 * share), "####################", (int)(100 * share), rate / 1e6, token_rate / 1e6,
                 eta / 3600, eta / 60 % 60, eta % 60);
        fputs(line, stderr);
    }
    if (pool->writer->bar) fputs("\r\x1b[K", stderr);
}

// Writes out_npy from the inputs. An error leaves what was there before, and also what the run has done up to its last
// save.
inline TokenizeCounts tokenize_files(const Tokenizer& t, const std::vector<std::string>& paths,
                                     const std::string& out_npy, const TokenizeOptions& o = {}) {
    InputReader r;
    inputs_check(&r, paths);
    TokenWriter w;
    w.out = out_npy;
    w.base = documents_path(out_npy);
    w.base.resize(w.base.size() - strlen(".csv.gz"));
    w.eos = t.eos;
    w.width = t.vocab > 65536 ? 4 : 2;
    w.keeps_bytes = t.bytes;
    w.max_tokens = o.max_tokens;
    w.save_every = o.save_every;
    w.bar = isatty(fileno(stderr));
    nlohmann::json run = {{"tokenizer", file_stamp(t.bytes ? t.name : t.path)}, {"max_tokens", o.max_tokens}};
    try {
        writer_begin(&w, &r, run, o.restart);
    } catch (const std::exception& e) {
        die("%s", e.what());
    }

    TokenizePool pool;
    pool.tokenizer = &t;
    pool.reader = &r;
    pool.writer = &w;
    pool.run = run;
    pool.threads = pool.running = std::max<size_t>(1, o.threads);
    pool.tokens = w.tokens;
    pool.bytes = r.starts[w.at.file];
    std::vector<std::thread> threads;
    for (size_t i = 0; i < pool.threads; i++) threads.emplace_back(tokenize_batches, &pool);
    tokenize_watch(&pool);
    for (std::thread& thread : threads) thread.join();
    try {
        if (!pool.failure.empty()) throw std::runtime_error(pool.failure);
        writer_finish(&w, r, run);
    } catch (const std::exception& e) {
        for (size_t k = w.published; !w.saved && k <= w.part; k++)
            for (const char* suffix : {".npy", ".csv", ".csv.gz"}) unlink(part_tmp(w, k, suffix).c_str());
        unlink((w.out + ".state.tmp").c_str());
        die("%s%s", e.what(), w.saved ? "; the same command goes on from what is saved" : "");
    }
    return {w.documents, w.tokens, w.part, w.damaged};
}

// As many threads as OMP_NUM_THREADS says, else one for each core
inline size_t encoding_threads() {
    const char* threads = getenv("OMP_NUM_THREADS");
    const size_t cores = std::max(1u, std::thread::hardware_concurrency());
    return threads && atoi(threads) > 0 ? std::min<size_t>(atoi(threads), 4 * cores) : cores;
}

// ------------------------------------------------------------------------------------------------
// The command

inline int command_tokenize(int argc, char** argv) {
    std::string name, out;
    std::vector<std::string> inputs;
    int64_t max_tokens = 0, save_every = 1 << 25;
    TokenizeOptions o;
    options_parse(argc, argv, "tokenize --tokenizer NAME --out FILE.npy INPUT...   "
                  "(.txt: a document a file; .jsonl: a document a line; gzipped or not)", {
        {"tokenizer", &name, "NAME",
         "a tokenizer.json, or a directory that holds one; or bytes: an id is a byte, 256 ends a document"},
        {"out", &out, "FILE.npy", "tokens without a header: uint16, or uint32 where the tokenizer has "
         "ids above 65,535; FILE.csv.gz lists the documents"},
        {"max-tokens", &max_tokens, "N",
         "more than fit below N begin another file: FILE-00000.npy, FILE-00001.npy, ...; 0: one file", 0, 1e15},
        {"save-every", &save_every, "N",
         "tokens between saves, from where a stopped run goes on when it is called again", 1, 1e15},
        {"restart", &o.restart, "", "start over, whatever a stopped run saved or an earlier one wrote"},
    }, &inputs);
    if (name.empty() || out.empty() || inputs.empty())
        die("tokenize needs --tokenizer NAME, --out FILE.npy and inputs "
            "(.txt: a document a file; .jsonl: a document a line)");
    if (out.size() < 5 || !ends_with(out, ".npy")) die("--out %s: the name of a token file ends in .npy", out.c_str());
    Tokenizer t;
    tokenizer_open(&t, name);
    o.max_tokens = (size_t)max_tokens;
    o.save_every = (size_t)save_every;
    o.threads = encoding_threads();
    TokenizeCounts counts = tokenize_files(t, inputs, out, o);
    std::string more = counts.files > 1 ? " in " + std::to_string(counts.files) + " files" : "";
    if (t.vocab > 65536) more += " of uint32 (train with --token-type uint32)";
    if (counts.damaged > 0) more += ", " + std::to_string(counts.damaged) + " damaged lines left out";
    printf("%s: %zu documents, %zu tokens%s\n", out.c_str(), counts.documents, counts.tokens, more.c_str());
    return 0;
}
