// Lets test_data.py drive dataloader.h, tokenizer.h and tokenize.h: reads commands from standard input, a line each,
// and prints what they give.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
void die(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

// With TRACE set, prints what reaches the disk and in which order. With DIE_AT=N ends at the Nth of these places:
// before and after each rename, before each unlink. With STOP_AT=N stops there, until SIGCONT. With FOLDER_OPEN=E or
// FOLDER_SYNC=E, folders can't be opened or synced: the error is E.
#include <csignal>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <nlohmann/json.hpp>
static bool fails(const char* name, bool folder) {
    if (!folder || !getenv(name)) return false;
    errno = atoi(getenv(name));
    return true;
}
static int traced_fsync(int file) {
    char path[4096] = "";
    const std::string entry = "/proc/self/fd/" + std::to_string(file);
    if (getenv("TRACE") && readlink(entry.c_str(), path, sizeof path - 1) > 0) printf("fsync %s\n", path);
    struct stat info;
    return fails("FOLDER_SYNC", fstat(file, &info) == 0 && S_ISDIR(info.st_mode)) ? -1 : fsync(file);
}
static int traced_open(const char* path, int flags, int mode = 0) {
    return fails("FOLDER_OPEN", flags & O_DIRECTORY) ? -1 : open(path, flags, mode);
}
static void step() {
    static int steps = 0;
    steps++;
    if (getenv("DIE_AT") && steps == atoi(getenv("DIE_AT"))) _exit(2);
    if (getenv("STOP_AT") && steps == atoi(getenv("STOP_AT"))) raise(SIGSTOP);
}
static int traced_rename(const char* from, const char* to) {
    step();
    if (getenv("TRACE")) printf("rename %s %s\n", from, to);
    int result = rename(from, to);
    step();
    return result;
}
static int traced_unlink(const char* path) {
    step();
    return unlink(path);
}
#define fsync(file) traced_fsync(file)
#define open(...) traced_open(__VA_ARGS__)
#define rename(from, to) traced_rename(from, to)
#define unlink(path) traced_unlink(path)

#include "../commands/tokenize.h"
#include "../dataloader.h"
#include "words.h"

static void print_rows(const std::vector<int32_t>& values, size_t rows, int T) {
    for (size_t row = 0; row < rows; row++)
        for (int t = 0; t < T; t++) printf("%d%c", values[row * T + t], t + 1 == T ? '\n' : ' ');
}

int main() {
    DataLoader d;
    std::string line, word;
    while (std::getline(std::cin, line)) {
        Words in(line);
        in >> word;
        std::vector<int32_t> inputs, targets;
        if (word == "pcg") {                    // pcg SEED N: raw outputs
            uint64_t seed; int n; in >> seed >> n;
            Pcg64 g;
            pcg64_seed(&g, seed);
            for (int i = 0; i < n; i++) printf("0x%016llx\n", (unsigned long long)pcg64_next(&g));
        } else if (word == "shuffle") {         // shuffle SEED N
            uint64_t seed; size_t n; in >> seed >> n;
            Pcg64 g;
            std::vector<uint32_t> order(n);
            for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
            pcg64_seed(&g, seed);
            pcg64_shuffle(&g, &order);
            for (uint32_t i : order) printf("%u ", i);
            printf("\n");
        } else if (word == "open") {            // open T V global|sequential SEED FILTER [uint32] FILE...
            int T, V, filter; std::string order, file, type = "uint16"; uint64_t seed; std::vector<std::string> files;
            in >> T >> V >> order >> seed >> filter;
            while (in >> file) if (file == "uint32") type = file; else files.push_back(file);
            DataOrder data_order = order == "global" ? DataOrder::global : DataOrder::sequential;
            dataloader_open(&d, files, T, V, data_order, seed, filter, type);
        } else if (word == "next") {            // next G RANK WORLD
            int G, rank, world; in >> G >> rank >> world;
            size_t rows = world > 0 && G > 0 ? G / world : 0;
            inputs.assign(rows * d.T, -1);
            targets.assign(rows * d.T, -1);
            dataloader_next(&d, G, rank, world, inputs.data(), targets.data());
            print_rows(inputs, rows, d.T);
            print_rows(targets, rows, d.T);
        } else if (word == "rows") {            // rows FIRST N
            size_t first, n; in >> first >> n;
            inputs.assign(n * d.T, -1);
            targets.assign(n * d.T, -1);
            printf("%zu\n", dataloader_rows(&d, first, n, inputs.data(), targets.data()));
            print_rows(inputs, n, d.T);
            print_rows(targets, n, d.T);
        } else if (word == "seek") {            // seek EPOCH POSITION
            int64_t epoch, position; in >> epoch >> position;
            dataloader_seek(&d, epoch, position);
        } else if (word == "skip") {            // skip RANGE...: as --skip-batches
            std::vector<BatchRange> ranges; std::string range;
            while (in >> range) ranges.push_back(batch_range_of(range));
            d.skipped = batch_ranges_joined(ranges);
            printf("%s\n", batch_ranges_json(d.skipped).dump().c_str());
        } else if (word == "batches") {         // batches N: of the first N steps
            int64_t n; in >> n;
            for (int64_t step = 1; step <= n; step++) printf("%lld ", (long long)batch_of_step(step, d.skipped));
            printf("\n");
        } else if (word == "go") {              // go G BATCH
            int G; int64_t batch; in >> G >> batch;
            dataloader_go_to(&d, G, batch);
        } else if (word == "state") {
            printf("%lld %lld %lld %zu %zu %016llx\n", (long long)d.epoch, (long long)d.position,
                   (long long)dataloader_masked(&d), d.instances, dataloader_tokens(&d),
                   (unsigned long long)dataloader_fingerprint(&d));
        } else if (word == "close") {
            dataloader_close(&d);
        } else if (word == "resident") {        // peak resident memory so far, KB
            std::ifstream status("/proc/self/status");
            while (std::getline(status, line))
                if (line.compare(0, 6, "VmHWM:") == 0) printf("%ld\n", atol(line.c_str() + 6));
        } else if (word == "tokenize") {        // tokenize TOKENIZER OUT [max=N] [save=N] [threads=N] [restart] FILE...
            Tokenizer t; std::string name, out, file; std::vector<std::string> files; TokenizeOptions o;
            in >> name >> out;
            while (in >> file) {
                size_t equals = file.find('=');
                size_t value = equals < file.size() ? strtoull(file.c_str() + equals + 1, nullptr, 10) : 0;
                if (file.compare(0, 4, "max=") == 0) o.max_tokens = value;
                else if (file.compare(0, 5, "save=") == 0) o.save_every = value;
                else if (file.compare(0, 8, "threads=") == 0) o.threads = value;
                else if (file == "restart") o.restart = true;
                else files.push_back(file);
            }
            tokenizer_open(&t, name);
            TokenizeCounts counts = tokenize_files(t, files, out, o);
            printf("%zu %zu %zu %zu\n", counts.documents, counts.tokens, counts.files, counts.damaged);
        } else if (word == "pieces") {          // pieces BYTES FILE: those of a document that is a file, in hexadecimal
            size_t bytes; std::string file, piece; in >> bytes >> file;
            LineReader lines;
            if (!lines_open(&lines, file)) die("%s", file.c_str());
            for (bool last = false; !last && lines_piece(&lines, &piece, bytes, &last); printf("\n"))
                for (char c : piece) printf("%02x", (unsigned char)c);
            gzclose(lines.file);
        } else if (word == "documents") {       // documents NPY
            std::string npy, problem; in >> npy;
            TokenFile f;
            token_file_open(&f, npy, 2);
            for (const Document& x : documents_read(f, &problem))
                printf("%zu\t%zu\t%s\t%s\n", x.start, x.end, x.id.c_str(), document_domain(x).c_str());
            if (!problem.empty()) printf("left out: %s\n", problem.c_str());
        } else if (word == "decode") {          // decode ID...: the bytes, in hexadecimal
            Tokenizer t; tokenizer_open(&t, "bytes");
            int id;
            while (in >> id) for (char c : tokenizer_decode(t, id)) printf("%02x", (unsigned char)c);
            printf("\n");
        } else {
            die("test_data: unknown command %s", word.c_str());
        }
        fflush(stdout);
    }
}
