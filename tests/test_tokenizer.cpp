// Lets test_tokenizer.py, test_tokenizer_peers.py and bench_tokenizers.py drive tokenizer.h: reads commands from
// standard input, a line each, and prints what they give. Texts go in and out in hexadecimal or in files.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iostream>
#include <sstream>
#include <thread>

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
void die(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

#include "../tokenizer.h"
#include "words.h"

static std::string unhex(const std::string& s) {
    std::string bytes;
    for (size_t i = 0; i + 1 < s.size(); i += 2) bytes += (char)std::stoi(s.substr(i, 2), nullptr, 16);
    return bytes;
}

static void print_hex(const std::string& s) {
    for (unsigned char c : s) printf("%02x", c);
    printf("\n");
}

static std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) die("%s: cannot be read", path.c_str());
    std::stringstream s;
    s << file.rdbuf();
    return s.str();
}

// A file of texts: each is its length, 4 bytes, and its bytes.
static std::vector<std::string_view> texts(const std::string& s) {
    std::vector<std::string_view> list;
    for (size_t i = 0; i < s.size();) {
        uint32_t n;
        memcpy(&n, &s[i], 4);
        list.emplace_back(&s[i + 4], n);
        i += 4 + n;
    }
    return list;
}

// The same, of ids.
static void encode_all(const Tokenizer& t, const std::vector<std::string_view>& list, std::vector<int>* out) {
    for (std::string_view text : list) {
        size_t at = out->size();
        out->push_back(0);
        tokenizer_encode(t, text, out);
        (*out)[at] = (int)(out->size() - at - 1);
    }
}

static void write_ids(const std::vector<int>& ids, const std::string& path) {
    std::ofstream(path, std::ios::binary).write((const char*)ids.data(), (std::streamsize)(ids.size() * sizeof(int)));
}

static double cpu_seconds() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main() {
    Tokenizer t;
    std::string line, word;
    while (std::getline(std::cin, line)) {
        Words in(line);
        in >> word;
        std::string name, out;
        std::vector<int> ids;
        if (word == "open") {                   // open NAME: the id that ends a document, ids
            std::getline(in >> std::ws, name);
            std::replace(name.begin(), name.end(), '\x1f', ' ');
            tokenizer_open(&t, name);
            printf("%d %d\n", t.eos, t.vocab);
        } else if (word == "encode") {          // encode HEX: ids
            in >> name;
            for (int id : tokenizer_encode(t, unhex(name))) printf("%d ", id);
            printf("\n");
        } else if (word == "decode") {          // decode SKIP ID...: the text
            bool skip; int id; in >> skip;
            while (in >> id) ids.push_back(id);
            print_hex(tokenizer_decode(t, ids, skip));
        } else if (word == "stream") {          // stream ID...: the text of each, and of the end
            TextStream s; int id;
            while (in >> id) print_hex(stream_next(&s, t, id));
            print_hex(stream_end(&s));
        } else if (word == "file") {            // file TEXTS IDS: encodes the texts of a file, decodes and writes them
            in >> name >> out;
            std::string data = contents(name);
            encode_all(t, texts(data), &ids);
            write_ids(ids, out);
            std::ofstream back(out + ".text", std::ios::binary);
            for (size_t i = 0; i < ids.size(); i += 1 + ids[i]) {
                auto first = ids.begin() + i + 1;
                std::string text = tokenizer_decode(t, std::vector<int>(first, first + ids[i]), false);
                uint32_t n = (uint32_t)text.size();
                back.write((const char*)&n, 4).write(text.data(), n);
            }
        } else if (word == "threads") {         // threads N TEXTS: a file by N threads at once; 1: all give the same
            int n; in >> n >> name;
            std::string data = contents(name);
            std::vector<std::vector<int>> all(n);
            std::vector<std::thread> threads;
            for (int i = 0; i < n; i++) threads.emplace_back([&, i] { encode_all(t, texts(data), &all[i]); });
            for (std::thread& thread : threads) thread.join();
            bool same = true;
            for (auto& x : all) same = same && x == all[0];
            printf("%d\n", same);
        } else if (word == "time") {            // time RUNS TEXTS: for each run seconds of one core, ids
            // The first run has no word remembered.
            int runs; in >> runs >> name;
            std::string data = contents(name);
            std::vector<std::string_view> list = texts(data);
            std::thread([&] {
                for (int i = 0; i < runs; i++) {
                    std::vector<int> some;
                    size_t count = 0;
                    double start = cpu_seconds();
                    for (std::string_view text : list) {
                        some.clear();
                        tokenizer_encode(t, text, &some);
                        count += some.size();
                    }
                    printf("%.6f %zu\n", cpu_seconds() - start, count);
                }
            }).join();
        } else if (word == "unicode") {
            // A line for each code point that is not plain: flags, class, decomposition, whether NFC makes it
            const Unicode& u = unicode();
            std::vector<bool> made(0x110000);
            for (auto& pair : u.composed) made[pair.second] = true;
            for (char32_t c = 0; c < 0x110000; c++) {
                auto d = u.decomposed.find(c);
                bool whole = d == u.decomposed.end();
                if (whole && !(u.of[c] & ~UNSTABLE) && !u.combining[c]) continue;
                printf("%x %d %d", (unsigned)c, u.of[c] & ~UNSTABLE, whole ? u.combining[c] : 0);
                if (!whole) for (char32_t x : d->second) printf(" %x", (unsigned)x);
                printf("%s\n", whole ? "" : made[c] ? " made" : " not made");
            }
        } else if (word == "chat") {            // chat GENERATE ROLE HEX ...: the prompt
            bool generate; std::string role;
            std::vector<ChatMessage> messages;
            in >> generate;
            while (in >> role >> name) messages.push_back({role, unhex(name)});
            print_hex(chat_prompt(messages, generate));
        } else {
            die("test_tokenizer: unknown command %s", word.c_str());
        }
        fflush(stdout);
    }
}
