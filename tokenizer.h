// Text in, tokens out. The byte tokenizer: a token is a byte, and 256 ends a document.
//
// tokenize_files writes what dataloader.h reads, as dolma writes it: FILE.npy, uint16 tokens without a header, and next to it
// FILE.csv.gz, a line a document: start, end (offsets of its tokens, its end-of-document included), id, src, loc (file and line).

#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>
#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>
#include <nlohmann/json.hpp>

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Tokenizer {
    int eos = -1;           // ends a document
    int vocab = 0;          // ids in use; a model's V may be larger (padded: 320 for bytes)
    bool bytes = false;
    std::string name;
};

inline void tokenizer_open(Tokenizer* t, const std::string& name) {
    if (name != "bytes") die("tokenizer %s: this version has only the byte tokenizer; use --tokenizer bytes", name.c_str());
    t->eos = 256;
    t->vocab = 257;
    t->bytes = true;
    t->name = name;
}

inline std::vector<int> tokenizer_encode(const Tokenizer&, const std::string& text) {
    std::vector<int> ids(text.size());
    for (size_t i = 0; i < text.size(); i++) ids[i] = (unsigned char)text[i];
    return ids;
}

// The end of a document and the ids that pad the vocabulary have no text.
inline std::string tokenizer_decode(const Tokenizer&, int id) { return id >= 0 && id < 256 ? std::string(1, (char)id) : ""; }

// ------------------------------------------------------------------------------------------------
// Documents

struct Document {
    size_t start, end;      // its tokens in the .npy, end exclusive
    std::string id;
};

// story-000123 is of the domain story.
inline std::string document_domain(const Document& d) { return d.id.substr(0, d.id.find('-')); }

inline std::string documents_path(const std::string& npy) {
    bool suffix = npy.size() > 4 && npy.compare(npy.size() - 4, 4, ".npy") == 0;
    return npy.substr(0, npy.size() - (suffix ? 4 : 0)) + ".csv.gz";
}

// Reads a text file, gzipped or not, a line at a time (zlib reads both).
struct LineReader {
    gzFile file;
    std::string buffer;     // read, not yet handed out
    size_t at;
    bool failed;
};

inline bool lines_open(LineReader* r, const std::string& path) {
    *r = LineReader{gzopen(path.c_str(), "rbe"), "", 0, false};
    return r->file != nullptr;
}

// False at the end of the file or where reading failed, which sets failed. Without split, a line is the whole file.
inline bool lines_next(LineReader* r, std::string* line, bool split) {
    line->clear();
    for (;;) {
        size_t end = split ? r->buffer.find('\n', r->at) : std::string::npos;
        line->append(r->buffer, r->at, end - r->at);
        if (end != std::string::npos) {
            r->at = end + 1;
            return true;
        }
        r->at = 0;
        r->buffer.resize(1 << 16);
        int n = gzread(r->file, &r->buffer[0], 1 << 16), error;
        r->buffer.resize(n > 0 ? n : 0);
        gzerror(r->file, &error);
        r->failed = n < 0 || (n == 0 && error != Z_OK && error != Z_STREAM_END);    // a gzip file cut short says so at its end
        if (n <= 0) return !r->failed && !line->empty();
    }
}

// The documents of a token file, from the .csv.gz next to it; none where there is no such file.
inline std::vector<Document> documents_read(const std::string& npy) {
    std::string path = documents_path(npy), line;
    std::vector<Document> documents;
    LineReader lines;
    if (!lines_open(&lines, path)) {
        if (errno == ENOENT) return documents;
        die("%s: cannot be read: %s", path.c_str(), strerror(errno));
    }
    while (lines_next(&lines, &line, true)) {
        std::vector<std::string> columns(1);
        bool quoted = false;
        for (size_t i = 0; i < line.size(); i++) {
            if (line[i] == '"' && quoted && i + 1 < line.size() && line[i + 1] == '"') columns.back() += line[i++];
            else if (line[i] == '"') quoted = !quoted;
            else if (line[i] == ',' && !quoted) columns.emplace_back();
            else columns.back() += line[i];
        }
        char *end1 = nullptr, *end2 = nullptr;
        Document d = {0, 0, columns.size() > 2 ? columns[2] : ""};
        if (columns.size() > 2) {
            d.start = strtoull(columns[0].c_str(), &end1, 10);
            d.end = strtoull(columns[1].c_str(), &end2, 10);
        }
        size_t previous = documents.empty() ? 0 : documents.back().end;
        if (!end1 || end1 == columns[0].c_str() || *end1 || end2 == columns[1].c_str() || *end2 || d.start < previous || d.end < d.start)
            die("%s:%zu: not a line of start,end,id,src,loc; tokenize again", path.c_str(), documents.size() + 1);
        documents.push_back(d);
    }
    if (lines.failed) die("%s: damaged after %zu documents; tokenize again", path.c_str(), documents.size());
    gzclose(lines.file);
    return documents;
}

// ------------------------------------------------------------------------------------------------
// Tokenizing files

// Python's str.strip, which dolma applies to every document: the bytes of ASCII's white space, and Unicode's in UTF-8.
inline std::string strip(const std::string& s) {
    static const char* const wide[] = {
        "\xc2\x85", "\xc2\xa0", "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81", "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86",
        "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8", "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};
    size_t begin = 0, end = s.size();
    auto space = [&](bool front) -> size_t {    // bytes of white space at this end of what is left
        if (begin == end) return 0;
        unsigned char c = (unsigned char)s[front ? begin : end - 1];
        if (c == ' ' || (c >= 9 && c <= 13) || (c >= 28 && c <= 31)) return 1;
        for (const char* w : wide) {
            size_t n = strlen(w);
            if (end - begin >= n && s.compare(front ? begin : end - n, n, w) == 0) return n;
        }
        return 0;
    };
    while (size_t n = space(true)) begin += n;
    while (size_t n = space(false)) end -= n;
    return s.substr(begin, end - begin);
}

struct TokenizeCounts { size_t documents, tokens; };

// .txt: the file is a document, named after it. .jsonl: a document a line, {"text": ..., "id": ...}; without an id it is named
// FILE-LINE. Either may be gzipped. Documents are stripped, empty ones left out, each is ended by EOS.
// Both files are written under temporary names, flushed to the disk and renamed, so that out_npy is never there half-written; an
// error leaves what was there before.
inline TokenizeCounts tokenize_files(const Tokenizer& t, const std::vector<std::string>& inputs, const std::string& out_npy) {
    std::string out_csv = documents_path(out_npy), temporary_npy = out_npy + ".tmp", temporary_csv = out_csv + ".tmp";
    bool created = false;
    auto refuse = [&](const std::string& message) {
        if (created) {
            unlink(temporary_npy.c_str());
            unlink(temporary_csv.c_str());
        }
        die("%s", message.c_str());
    };
    auto ends = [](const std::string& name, const std::string& suffix) {
        return name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
    };
    auto unwritable = [&](const std::string& path) { refuse(path + ": cannot be written: " + strerror(errno)); };
    if (inputs.empty()) refuse("tokenize: no input file given; name .txt or .jsonl files");

    FILE* npy = fopen(temporary_npy.c_str(), "wbe");
    if (!npy) unwritable(out_npy);
    created = true;
    int csv_file = open(temporary_csv.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    gzFile csv = csv_file < 0 ? nullptr : gzdopen(dup(csv_file), "wb");
    if (!csv) unwritable(out_csv);

    TokenizeCounts counts = {0, 0};
    std::vector<uint16_t> tokens;
    std::string line;
    for (const std::string& path : inputs) {
        std::string plain = ends(path, ".gz") ? path.substr(0, path.size() - 3) : path;
        std::string src = path.substr(path.rfind('/') + 1);     // npos + 1 is 0
        bool jsonl = ends(plain, ".jsonl");
        if (!jsonl && !ends(plain, ".txt")) refuse(path + ": neither .txt (a document) nor .jsonl (a document a line); rename it");
        LineReader lines;
        if (!lines_open(&lines, path)) refuse(path + ": cannot be read: " + strerror(errno));
        size_t loc = 1;
        for (; lines_next(&lines, &line, jsonl); loc++) {
            std::string text = strip(line), id = jsonl ? src + "-" + std::to_string(loc) : src;
            if (text.empty()) continue;
            if (jsonl) {
                nlohmann::json j = nlohmann::json::parse(text, nullptr, false);
                auto field = [&](const char* key) { return j.is_object() && j.contains(key) && j[key].is_string(); };
                if (!field("text")) refuse(path + ":" + std::to_string(loc) + ": not a JSON object with a string \"text\"; a line is a document: {\"text\": \"...\", \"id\": \"...\"}");
                text = strip(j["text"].get<std::string>());
                if (field("id")) id = j["id"].get<std::string>();
                if (text.empty()) continue;
            }
            std::vector<int> ids = tokenizer_encode(t, text);
            tokens.assign(ids.begin(), ids.end());
            if (tokens.back() != t.eos) tokens.push_back((uint16_t)t.eos);
            if (fwrite(tokens.data(), 2, tokens.size(), npy) != tokens.size()) unwritable(out_npy);

            auto quote = [](const std::string& s) {     // for CSV; a line break would end the line, so it becomes a space
                std::string q = "\"";
                for (char c : s) q += c == '"' ? "\"\"" : std::string(1, c == '\n' || c == '\r' ? ' ' : c);
                return s.find_first_of(",\"\r\n") == std::string::npos ? s : q + "\"";
            };
            size_t start = counts.tokens, end = start + tokens.size();
            std::string row = std::to_string(start) + "," + std::to_string(end) + "," + quote(id) + "," + quote(src) + "," + std::to_string(loc) + "\n";
            if (gzwrite(csv, row.data(), (unsigned)row.size()) != (int)row.size()) unwritable(out_csv);
            counts.tokens = end;
            counts.documents++;
        }
        if (lines.failed) refuse(path + ":" + std::to_string(loc) + ": cannot be read from here on; the file is damaged or cut short");
        gzclose(lines.file);
    }
    if (counts.documents == 0) refuse("tokenize: no text in " + inputs[0] + (inputs.size() > 1 ? " or the other files" : ""));

    if (fflush(npy) != 0 || fsync(fileno(npy)) != 0 || fclose(npy) != 0) unwritable(out_npy);
    if (gzclose(csv) != Z_OK || fsync(csv_file) != 0 || close(csv_file) != 0) unwritable(out_csv);
    if (rename(temporary_csv.c_str(), out_csv.c_str()) != 0) unwritable(out_csv);       // first, so that a .npy never misses its documents
    if (rename(temporary_npy.c_str(), out_npy.c_str()) != 0) unwritable(out_npy);
    std::string directory = out_npy.find('/') == std::string::npos ? "." : out_npy.substr(0, out_npy.rfind('/') + 1);
    int parent = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (parent < 0 || fsync(parent) != 0 || close(parent) != 0) die("%s: cannot be flushed to the disk: %s", directory.c_str(), strerror(errno));
    return counts;
}
