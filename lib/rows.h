// The rows of a fine-tuning run: read once, encoded by all cores, and kept in the run's directory as rows.safetensors,
// which every rank maps and a resumed run opens.
//
//     starts (S + 1) I64   where in ids each of the S sequences begins; a row has one, or of DPO two: chosen, rejected
//     lines (R, 2) I64     the file of a row, by its number on the command line, and its line
//     ids I32, targets U8  of all sequences; see RowSequence
//     prompts (S) I32      of KTO: ids before the completion
//     labels (R) U8        of KTO
//
// Included once, by olmoe.cu, before TrainingRun.
#pragma once
#include <thread>
#include "checkpoint.h"
#include "weights.h"
#include "../dataloader.h"

// ------------------------------------------------------------------------------------------------
// Tables that a run makes once and keeps

struct TablePart { const char *name, *dtype; std::vector<int64_t> shape; const void* data; };

// Writes OUT/NAME.safetensors: complete under this name, or not there. `key` says what it was made from. Rank 0 alone.
inline void table_write(const std::string& out, const std::string& name, const std::string& key,
                        const std::vector<TablePart>& parts) {
    const std::string scratch = out + "/." + name + ".tmp", file = name + ".safetensors", path = out + "/" + file;
    std::error_code ignored;
    std::filesystem::remove_all(scratch, ignored);
    if (mkdir(scratch.c_str(), 0777) != 0) die("cannot create %s: %s", scratch.c_str(), strerror(errno));
    std::vector<TensorInfo> infos;
    for (const TablePart& p : parts) infos.push_back({p.name, p.dtype, p.shape});
    const std::string header = safetensors_header(infos, {{"format", "pt"}, {"made_from", key}});
    FileWriter w;
    w.open(scratch, file, O_CREAT);
    w.write(header.data(), header.size(), 0);
    size_t at = header.size();
    for (const TablePart& p : parts) {
        size_t bytes = dtype_bytes(p.dtype);
        for (int64_t n : p.shape) bytes *= (size_t)n;
        w.write(p.data, bytes, at);
        at += bytes;
    }
    w.close();
    if (rename(w.path.c_str(), path.c_str()) != 0) die("cannot write %s: %s", path.c_str(), strerror(errno));
    rmdir(scratch.c_str());
    directory_sync(out);
}

// Maps the file, if it is there and was made from `key`; an empty one: from whatever.
inline bool table_open(Safetensors* f, const std::string& out, const std::string& name, const std::string& key) {
    const std::string path = out + "/" + name + ".safetensors";
    if (access(path.c_str(), F_OK) != 0) return false;
    safetensors_open(f, path);
    auto made_from = f->metadata.find("made_from");
    const bool same = key.empty() || (made_from != f->metadata.end() && made_from->second == key);
    if (!same) safetensors_close(f);
    return same;
}

template <typename T> const T* table_part(const Safetensors& f, const char* name, size_t count) {
    const SafeTensor* t = f.find(name);
    if (!t || t->bytes != count * sizeof(T)) die("%s: no %s of %zu numbers; remove it", f.path.c_str(), name, count);
    return (const T*)t->data;
}

// ------------------------------------------------------------------------------------------------
// Reading rows

struct Rows {
    RowFormat format;
    Safetensors file;
    size_t count = 0;                       // rows that are kept: those that have targets
    int64_t dropped = 0, left_out = 0;      // rows without targets; lines that are no rows
    uint64_t fingerprint = 0;
    const int64_t *starts = nullptr, *lines = nullptr;
    const int32_t *ids = nullptr, *prompts = nullptr;
    const uint8_t *targets = nullptr, *labels = nullptr;

    int sides() const { return format.kind == RowKind::dpo ? 2 : 1; }
    size_t whole_length(size_t sequence) const { return (size_t)(starts[sequence + 1] - starts[sequence]); }
    int length(size_t sequence) const { return (int)std::min<size_t>(format.T, whole_length(sequence)); }
};

struct RowTable {                           // Rows while they are read
    std::vector<int64_t> starts = {0}, lines;
    std::vector<int32_t> ids, prompts;
    std::vector<uint8_t> targets, labels;
    int64_t dropped = 0, left_out = 0;
};

struct RowLine { size_t file, number; std::string text, problem; RowData row; };

// Encodes the lines of a batch: of n threads each takes every n-th line. Where there is no memory for one, throws that.
inline void rows_encode(std::vector<RowLine>* batch, const RowFormat& format) {
    const size_t threads = std::min(encoding_threads(), batch->size());
    std::vector<std::exception_ptr> thrown(threads);
    auto encode = [&](RowLine* line) {
        try { line->row = row_read(line->text, format); }
        catch (const std::bad_alloc&) { throw; }
        catch (const std::exception& e) { line->problem = e.what(); }
    };
    auto work = [&](size_t first) {
        try { for (size_t i = first; i < batch->size(); i += threads) encode(&(*batch)[i]); }
        catch (...) { thrown[first] = std::current_exception(); }
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < threads; i++) others.emplace_back(work, i);
    if (threads > 0) work(0);
    for (std::thread& t : others) t.join();
    for (const std::exception_ptr& e : thrown) if (e) std::rethrow_exception(e);
}

inline void rows_append(RowTable* table, const RowLine& line, const RowFormat& format, const std::string& path) {
    constexpr int64_t SHOWN = 1000;
    if (!line.problem.empty()) {
        std::string said = path + ":" + std::to_string(line.number) + ": " + line.problem + "; left out";
        std::replace_if(said.begin(), said.end(), [](char c) { return (unsigned char)c < 32; }, '?');  // of a path
        if (++table->left_out <= SHOWN) fprintf(stderr, "%s\n", said.c_str());
        if (table->left_out == SHOWN + 1) fprintf(stderr, "more bad rows are left out without a line\n");
        return;
    }
    for (const RowSequence& s : line.row.sides)
        if (num_targets(s.targets.data(), s.ids.size(), format.T) == 0) { table->dropped++; return; }
    for (const RowSequence& s : line.row.sides) {
        table->ids.insert(table->ids.end(), s.ids.begin(), s.ids.end());
        table->targets.insert(table->targets.end(), s.targets.begin(), s.targets.end());
        table->starts.push_back((int64_t)table->ids.size());
        table->prompts.push_back(s.prompt);
    }
    table->lines.insert(table->lines.end(), {(int64_t)line.file, (int64_t)line.number});
    table->labels.push_back(line.row.label);
}

// All rows of the files, in their order. Bad ones are a line on standard error each, up to a thousand.
inline RowTable rows_read(const std::vector<std::string>& paths, const RowFormat& format) {
    constexpr size_t BATCH_OF_LINES = 8 << 20;      // bytes: some tenths of a second of all cores
    RowTable table;
    double bytes = 0;
    for (const std::string& path : paths) bytes += (double)std::filesystem::file_size(path);
    Progress progress("reading rows", bytes);
    for (size_t file = 0; file < paths.size(); file++) {
        LineReader lines;
        if (!lines_open(&lines, paths[file])) die("%s: cannot be read: %s", paths[file].c_str(), strerror(errno));
        size_t number = 0;
        for (bool more = true; more; ) {
            std::vector<RowLine> batch;
            const double before = (double)gzoffset(lines.file);
            for (size_t size = 0; size < BATCH_OF_LINES; ) {
                RowLine line = {file, number + 1, "", "", {}};
                more = lines_next(&lines, &line.text);
                if (!more) break;
                number++;
                size += line.text.size() + 64;
                if (!strip(line.text).empty()) batch.push_back(std::move(line));
            }
            ranks_alive();
            rows_encode(&batch, format);
            for (const RowLine& line : batch) rows_append(&table, line, format, paths[file]);
            progress.add((double)gzoffset(lines.file) - before);
        }
        if (lines.failed)
            die("%s:%zu: cannot be read from here on; the file is damaged or cut short", paths[file].c_str(),
                number + 1);
        gzclose(lines.file);
    }
    return table;
}

// FNV-1a of up to `most` blocks of 4 KB, spread evenly, the first and the last included
inline uint64_t fnv1a_of_blocks(uint64_t hash, const unsigned char* data, size_t bytes, size_t most) {
    const size_t blocks = (bytes + 4095) / 4096, n = std::min(blocks, most);
    for (size_t i = 0; i < n; i++) {
        const size_t at = 4096 * (n == 1 ? 0 : i * (blocks - 1) / (n - 1));
        hash = fnv1a(hash, data + at, std::min<size_t>(4096, bytes - at));
    }
    return hash;
}

// FNV-1a over the parts of a table: their sizes and, spread evenly, 1024 blocks of 4 KB of each
inline uint64_t table_fingerprint(const Safetensors& f) {
    uint64_t hash = FNV_BASIS;
    for (const SafeTensor& t : f.tensors) {
        hash = fnv1a(hash, (const unsigned char*)&t.bytes, sizeof t.bytes);
        hash = fnv1a_of_blocks(hash, t.data, t.bytes, 1024);
    }
    return hash;
}

const char* name_of(RowKind kind) {
    return kind == RowKind::sft ? "sft" : kind == RowKind::dpo ? "dpo" : "kto";
}

// Ends the program where the rows that are there are of other options than `from`, or of another number of files.
inline void rows_check(const Safetensors& f, nlohmann::json from) {
    auto made_from = f.metadata.find("made_from");
    nlohmann::json theirs = json_parse(made_from == f.metadata.end() ? "" : made_from->second);
    const nlohmann::json files = theirs.is_object() ? theirs.value("files", nlohmann::json()) : nlohmann::json();
    if (!files.is_array()) die("%s: not rows of a run", f.path.c_str());
    if (files.size() != from["files"].size())
        die("%s: the run had %zu files of rows, and %zu are given", f.path.c_str(), files.size(), from["files"].size());
    theirs["files"] = from["files"];
    for (auto& [name, value] : from.items())
        if (theirs.value(name, nlohmann::json()) != value)
            die("%s: the run's rows are of another %s: %s, not %s", f.path.c_str(), name.c_str(),
                theirs.value(name, nlohmann::json()).dump().c_str(), value.dump().c_str());
}

// The rows of the files, from OUT/NAME.safetensors where it is of these files, of this tokenizer and format. Without
// `make` the rows that are there, whatever their files are now. All ranks call it.
inline void rows_open(Rows* rows, const std::string& out, const std::string& name,
                      const std::vector<std::string>& paths, const RowFormat& format, bool make = true) {
    const Tokenizer& t = *format.tokenizer;
    std::string vocabulary;
    if (!t.bytes && !file_contents(&vocabulary, t.path)) die("cannot read %s: %s", t.path.c_str(), strerror(errno));
    const uint32_t crc = (uint32_t)crc32_z(0, (const Bytef*)vocabulary.data(), vocabulary.size());
    nlohmann::json from = {{"rows", name_of(format.kind)}, {"mask", format.olmoe_mask ? "olmoe" : "assistant"},
                           {"seq", format.T}, {"tokenizer", {t.bytes ? "bytes" : crc_text(crc), t.eos}},
                           {"files", nlohmann::json::array()}};
    for (const std::string& path : paths) from["files"].push_back(file_stamp(path));
    const std::string key = make ? from.dump() : "";
    Safetensors& f = rows->file;
    if (world.rank == 0 && !table_open(&f, out, name, key)) {
        if (!make)
            die("%s/%s.safetensors, the rows as the run read them, is not there; --run or --out names the run",
                out.c_str(), name.c_str());
        const RowTable r = rows_read(paths, format);
        const int64_t R = (int64_t)r.labels.size(), S = (int64_t)r.prompts.size(), n = (int64_t)r.ids.size();
        const int64_t counts[] = {r.dropped, r.left_out};
        table_write(out, name, key, {
            {"starts", "I64", {S + 1}, r.starts.data()}, {"lines", "I64", {R, 2}, r.lines.data()},
            {"counts", "I64", {2}, counts}, {"ids", "I32", {n}, r.ids.data()},
            {"prompts", "I32", {S}, r.prompts.data()}, {"targets", "U8", {n}, r.targets.data()},
            {"labels", "U8", {R}, r.labels.data()}});
    }
    host_sum(0.0);                          // it is there
    if (!f.map && !table_open(&f, out, name, key))
        die("%s/%s.safetensors is not what rank 0 wrote: the files of rows changed, or the ranks see different ones",
            out.c_str(), name.c_str());
    if (!make) rows_check(f, from);
    rows->format = format;
    rows->count = f.find("labels") ? f.find("labels")->bytes : 0;
    const size_t S = rows->count * rows->sides();
    rows->starts = table_part<int64_t>(f, "starts", S + 1);
    rows->lines = table_part<int64_t>(f, "lines", 2 * rows->count);
    rows->ids = table_part<int32_t>(f, "ids", (size_t)rows->starts[S]);
    rows->prompts = table_part<int32_t>(f, "prompts", S);
    rows->targets = table_part<uint8_t>(f, "targets", (size_t)rows->starts[S]);
    rows->labels = table_part<uint8_t>(f, "labels", rows->count);
    const int64_t* counts = table_part<int64_t>(f, "counts", 2);
    rows->dropped = counts[0];
    rows->left_out = counts[1];
    rows->fingerprint = table_fingerprint(f);
    if (make && rows->left_out > 0) printf("%s: left out %ld bad rows\n", join(paths).c_str(), rows->left_out);
    if (make && rows->dropped > 0) printf("%s: dropped %ld rows without targets\n", join(paths).c_str(), rows->dropped);
    if (rows->count == 0 && rows->dropped == 0)
        die("%s: none of %ld lines is a row of --objective %s", join(paths).c_str(), rows->left_out,
            name_of(format.kind));
    if (rows->count == 0) die("%s: no row with a target within --seq %d", join(paths).c_str(), format.T);
}

// Sequence s as it is trained: ids and targets, cut at T
inline RowSequence row_sequence(const Rows& rows, size_t s) {
    const int n = rows.length(s);
    const int32_t* ids = rows.ids + rows.starts[s];
    const uint8_t* targets = rows.targets + rows.starts[s];
    return {{ids, ids + n}, {targets, targets + n}, rows.prompts[s]};
}

// The prompt of row i with the completion of row j
inline RowSequence row_mismatched(const Rows& rows, size_t i, size_t j) {
    const int32_t *a = rows.ids + rows.starts[i], *b = rows.ids + rows.starts[j];
    return row_mismatched(a, rows.prompts[i], b + rows.prompts[j], (int)rows.whole_length(j) - rows.prompts[j],
                          rows.format);
}

// ------------------------------------------------------------------------------------------------
// A step of rows

// Of a step of rows: which they are, how many tokens and their lengths' squares on all ranks, KTO's estimate of KL
struct Deal {
    std::vector<std::vector<size_t>> mine;  // of each micro-batch of this rank, places in the step
    std::vector<double> tokens;             // of each micro-batch, of all ranks together
};
struct RowStep {
    std::vector<size_t> rows;
    Deal deal;
    double tokens = 0, squares = 0, kl = 0;
};

// Log-probabilities by the reference: of each row's sequences, and of KTO's mismatched rows in the order of the run
struct ReferenceLogps { std::vector<double> rows, mismatched; };

// What steps of DPO and KTO add up over their rows: the loss; of chosen and rejected (KTO: desirable and undesirable)
// rows the log-probability (KTO: the reward) and their number; DPO's margin of rewards, and how often it is positive
enum Measure { LOSS, CHOSEN, REJECTED, CHOSENS, REJECTEDS, REWARD_MARGIN, ACCURATE, MEASURES };

// What a fine-tuning run has of its rows
struct Finetuning {
    Rows training, validation;
    bool of_out = false;                    // olmoe batch: rows as OUT has them, whatever became of their files
    ReferenceLogps reference, validation_reference;
    std::string reference_fingerprint;
    RowStep step;
};
