// Text in, tokens out. There are two tokenizers: a tokenizer.json of the GPT-NeoX and OLMoE family, with the same ids
// as Hugging Face's `tokenizers` for every string; and the byte tokenizer: a token is a byte, and 256 ends a document.
// Encoding has five steps, each with a section below:
//
//   bytes         -> UTF-8: what is not UTF-8 becomes U+FFFD, by the rule of Python's errors="replace"
//   added tokens  that are matched in the unchanged text are cut out: <|endoftext|>
//   NFC           of the pieces between them (e + combining acute -> é), then the added tokens that are matched in the
//                 NFC are cut out: runs of spaces
//   words         GPT-2's rule: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   merges        each byte of a word is a symbol; of all pairs of neighbours, the one that comes first in the list of
//                 merges becomes one symbol, until no pair is in the list
//
// A word has the same ids at every place, so each thread remembers the words it has met, and most words cost one lookup
// in a table.

#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <nlohmann/json.hpp>
#include <utf8proc.h>
#include "lib/files.h"
#include "lib/unicode_differences.h"

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ------------------------------------------------------------------------------------------------
// UTF-8

// The number of bytes, 1 to 4, of the UTF-8 sequence that begins at p < end. Where the bytes are not valid: minus the
// number of bytes that one U+FFFD replaces, which is as many as could begin a sequence, at least one. Surrogates and
// values above U+10FFFF are not valid. Sets partial where more bytes could complete the sequence.
inline int utf8_length(const char* p, const char* end, bool* partial = nullptr) {
    unsigned char c = (unsigned char)*p;
    if (partial) *partial = false;
    if (c < 0x80) return 1;
    int n = c >= 0xc2 && c < 0xe0 ? 2 : c >= 0xe0 && c < 0xf0 ? 3 : c >= 0xf0 && c < 0xf5 ? 4 : 1;
    if (n == 1) return -1;
    // The bounds of the second byte
    int low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80, high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < n; i++, low = 0x80, high = 0xbf) {
        if (p + i == end) {
            if (partial) *partial = true;
            return -i;
        }
        if ((unsigned char)p[i] < low || (unsigned char)p[i] > high) return -i;
    }
    return n;
}

// The code point of the n bytes at p, which are valid UTF-8.
inline char32_t utf8_decode(const char* p, int n) {
    char32_t c = (unsigned char)p[0] & (n == 1 ? 0x7f : 0xff >> (n + 1));
    for (int i = 1; i < n; i++) c = c << 6 | ((unsigned char)p[i] & 0x3f);
    return c;
}

// The number of bytes of a sequence in text that is known to be valid UTF-8.
inline int utf8_step(const char* p) {
    unsigned char c = (unsigned char)*p;
    return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

inline void utf8_append(std::string* s, char32_t c) {
    utf8proc_uint8_t bytes[4];
    s->append((const char*)bytes, (size_t)utf8proc_encode_char((utf8proc_int32_t)c, bytes));
}

// The text with its invalid bytes replaced by U+FFFD. With pending, bytes at the end that begin a character go there.
inline std::string utf8_replace(std::string_view s, std::string* pending = nullptr) {
    std::string out;
    for (const char *p = s.data(), *end = p + s.size(); p < end;) {
        bool partial;
        int n = utf8_length(p, end, &partial);
        if (partial && pending) {
            pending->assign(p, end - p);
            break;
        }
        if (n > 0) out.append(p, n);
        else out += "\xef\xbf\xbd";
        p += std::abs(n);
    }
    return out;
}

// ------------------------------------------------------------------------------------------------
// Unicode

// The properties of a code point that the steps use. They are utf8proc's tables, which unicode_differences.h corrects
// to those of `tokenizers` (whose classes are of another Unicode version than its NFC).
enum : uint8_t {
    OTHER = 0, LETTER = 1, NUMBER = 2, SPACE = 3,   // \p{L}, \p{N}, \s
    KIND = 3,
    IN_WORD = 4,                                    // \w, what an added token with single_word must not touch
    UNSTABLE = 8,                                   // NFC may change it, move it or join it to what is before it
};

struct Unicode {
    std::vector<uint8_t> of;                                    // [0x110000], the flags above
    std::vector<uint8_t> combining;                             // [0x110000], canonical combining class
    std::unordered_map<char32_t, std::u32string> decomposed;    // full canonical decompositions
    std::unordered_map<uint64_t, char32_t> composed;            // first << 32 | second -> what NFC makes of them
};

// The flags, but for UNSTABLE, and the combining classes
inline void unicode_make_classes(Unicode* u) {
    u->of.resize(0x110000);
    u->combining.resize(0x110000);
    for (char32_t c = 0; c < 0x110000; c++) {
        const utf8proc_property_t* property = utf8proc_get_property((utf8proc_int32_t)c);
        int k = property->category;
        bool letter = k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
        bool number = k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO;
        bool space = (k >= UTF8PROC_CATEGORY_ZS && k <= UTF8PROC_CATEGORY_ZP) || (c >= 9 && c <= 13) || c == 0x85;
        bool word = letter || (k >= UTF8PROC_CATEGORY_MN && k <= UTF8PROC_CATEGORY_NL) || k == UTF8PROC_CATEGORY_PC;
        u->of[c] = (uint8_t)((letter ? LETTER : number ? NUMBER : space ? SPACE : OTHER) | (word ? IN_WORD : 0));
        u->combining[c] = (uint8_t)property->combining_class;
    }
    for (const UnicodeKind& d : unicode_kinds)
        for (char32_t c = d.first; c <= d.last; c++) u->of[c] = (uint8_t)(d.kind | (d.in_word ? IN_WORD : 0));
    for (const UnicodeCombining& d : unicode_combining)
        for (char32_t c = d.first; c <= d.last; c++) u->combining[c] = d.combining;
}

inline Unicode unicode_make() {
    Unicode u;
    unicode_make_classes(&u);
    std::vector<std::pair<std::u32string, char32_t>> composites;    // a decomposition, and what NFC makes of it again
    auto not_composed = [](char32_t c) {
        auto last = std::end(unicode_not_composed);
        return std::find(std::begin(unicode_not_composed), last, c) != last;
    };
    for (char32_t c = 0; c < 0x110000; c++) {
        const utf8proc_property_t* property = utf8proc_get_property((utf8proc_int32_t)c);
        bool hangul = c >= 0xac00 && c <= 0xd7a3;
        if (!hangul && (property->decomp_seqindex == UINT16_MAX || property->decomp_type != 0)) continue;
        if (not_composed(c)) continue;
        utf8proc_int32_t parts[8], again[8];
        int bound = 0;
        int n = (int)utf8proc_decompose_char((utf8proc_int32_t)c, parts, 8, UTF8PROC_DECOMPOSE, &bound);
        std::u32string d(parts, parts + n);
        u.decomposed[c] = d;
        std::copy(parts, parts + n, again);
        const auto compose = (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        if (utf8proc_normalize_utf32(again, n, compose) == 1 && (char32_t)again[0] == c) composites.emplace_back(d, c);
        else u.of[c] |= UNSTABLE;
    }
    std::unordered_map<std::u32string, char32_t> by_parts(composites.begin(), composites.end());
    for (auto& [d, c] : composites) {       // the last part joins what the parts before it make
        char32_t first = d.size() == 2 ? d[0] : by_parts.at(d.substr(0, d.size() - 1));
        u.composed[(uint64_t)first << 32 | d.back()] = c;
        u.of[d.back()] |= UNSTABLE;
    }
    for (char32_t c = 0; c < 0x110000; c++)
        if (u.combining[c]) u.of[c] |= UNSTABLE;
    for (auto& [c, d] : u.decomposed)
        if (u.of[d[0]] & UNSTABLE) u.of[c] |= UNSTABLE;
    return u;
}

// The tables, made at the first use.
inline const Unicode& unicode() {
    static const Unicode u = unicode_make();
    return u;
}

// Appends the NFC of text: decompose, sort each run of combining characters by class, compose each with the last
// starter before it unless one between them has the same class or a higher one.
inline void nfc_append(const Unicode& u, const char* p, const char* end, std::string* out) {
    std::u32string d, c;
    for (; p < end; p += utf8_step(p)) {
        char32_t x = utf8_decode(p, utf8_step(p));
        auto found = u.decomposed.find(x);
        if (found != u.decomposed.end()) d += found->second;
        else d += x;
    }
    for (size_t i = 0; i < d.size(); i++) {
        size_t j = i;
        while (j < d.size() && u.combining[d[j]]) j++;
        auto lower_class = [&](char32_t a, char32_t b) { return u.combining[a] < u.combining[b]; };
        if (j > i + 1) std::stable_sort(d.begin() + i, d.begin() + j, lower_class);
        i = j;
    }
    size_t starter = std::string::npos;
    for (char32_t x : d) {
        int combining = u.combining[x];
        if (starter != std::string::npos && (starter + 1 == c.size() || u.combining[c.back()] < combining)) {
            auto found = u.composed.find((uint64_t)c[starter] << 32 | x);
            if (found != u.composed.end()) {
                c[starter] = found->second;
                continue;
            }
        }
        if (combining == 0) starter = c.size();
        c += x;
    }
    for (char32_t x : c) utf8_append(out, x);
}

// The first code point in [p, end) that is UNSTABLE, or end. Sets *previous to the code point before it; where there is
// none, to p.
inline const char* nfc_next(const Unicode& u, const char* p, const char* end, const char** previous) {
    *previous = p;
    while (p < end) {
        uint64_t eight;
        if (end - p >= 8 && (memcpy(&eight, p, 8), (eight & 0x8080808080808080) == 0)) {
            *previous = p + 7;
            p += 8;
            continue;
        }
        int n = utf8_step(p);
        if (n > 1 && (u.of[utf8_decode(p, n)] & UNSTABLE)) return p;
        *previous = p;
        p += n;
    }
    return end;
}

// NFC of text, which is valid UTF-8. Only runs of unstable code points are recomputed, each with the code point before
// it.
inline std::string nfc(const Unicode& u, std::string_view s) {
    std::string out;
    const char *p = s.data(), *end = p + s.size(), *from;
    for (;;) {
        const char* q = nfc_next(u, p, end, &from);
        out.append(p, (q == end ? end : from) - p);
        if (q == end) return out;
        while (q < end && (u.of[utf8_decode(q, utf8_step(q))] & UNSTABLE)) q += utf8_step(q);
        nfc_append(u, from, q, &out);
        p = q;
    }
}

// ------------------------------------------------------------------------------------------------
// The tokenizer and its file

struct AddedToken {
    std::string content;    // in NFC if normalized
    int id = 0;
    bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};

// A trie of the bytes of added tokens. It finds the first one in a text, and of those that begin there the longest.
struct AddedTokens {
    struct Node { int next[256], token; };      // nodes, 0: none; index into tokens, -1: none
    std::vector<Node> nodes;
    std::vector<AddedToken> tokens;
    uint8_t first[256] = {}, second[256] = {};  // a token can begin where first[byte] & second[the next byte]
};

struct Bpe {
    uint64_t serial = 0;                // number of this opened tokenizer: the words a thread remembers belong to one
    bool nfc = true;
    int byte_id[256];                   // of the symbol of one byte; -1: none
    std::vector<uint32_t> byte_ranks;   // [256 * 256], of the pairs of these: half of all lookups for a new word
    std::vector<uint64_t> pairs;        // hash table of merges: left << 44 | right << 24 | rank; all ones: empty
    std::vector<int> merged;            // rank -> id
    int shift = 0;                      // 64 - log2(pairs.size())
    AddedTokens raw, normalized;        // matched in the unchanged text; in its NFC
    std::vector<std::string> text;      // id -> bytes
    std::vector<bool> present, special; // id -> in use; left out by skip_special
};

struct Tokenizer {
    int eos = -1;           // ends a document
    int vocab = 0;          // ids in use; a model's V may be larger (padded: 320 for bytes)
    bool bytes = false;
    std::string name;       // as the user gave it
    std::string path;       // its tokenizer.json; empty for bytes
    std::shared_ptr<const Bpe> bpe;
};

constexpr uint32_t NO_MERGE = 0xffffff;

inline uint64_t pair_of(int left, int right) { return (uint64_t)left << 20 | (uint64_t)right; }

// The place of a pair in the list of merges; NO_MERGE if it is not in the list.
inline uint32_t merge_rank(const Bpe& b, int left, int right) {
    uint64_t pair = pair_of(left, right);
    for (size_t i = (pair * 0x9e3779b97f4a7c15) >> b.shift;; i = (i + 1) & (b.pairs.size() - 1)) {
        if (b.pairs[i] == ~0ull) return NO_MERGE;
        if (b.pairs[i] >> 24 == pair) return (uint32_t)b.pairs[i] & NO_MERGE;
    }
}

inline void added_insert(AddedTokens* a, const AddedToken& token) {
    if (a->nodes.empty()) a->nodes.push_back({{}, -1});
    int node = 0;
    for (char c : token.content) {
        int next = a->nodes[node].next[(unsigned char)c];
        if (!next) {
            next = a->nodes[node].next[(unsigned char)c] = (int)a->nodes.size();
            a->nodes.push_back({{}, -1});
        }
        node = next;
    }
    if (a->nodes[node].token < 0) a->nodes[node].token = (int)a->tokens.size();
    a->tokens.push_back(token);
    // The first bytes form 8 groups, a bit each, so that the second bytes of one first byte don't count for another.
    unsigned char c = (unsigned char)token.content[0];
    auto used = std::count_if(std::begin(a->first), std::end(a->first), [](uint8_t x) { return x != 0; });
    if (!a->first[c]) a->first[c] = (uint8_t)(1 << std::min<int>(7, (int)used));
    uint8_t bit = a->first[c];
    if (token.content.size() == 1) for (uint8_t& x : a->second) x |= bit;
    else a->second[(unsigned char)token.content[1]] |= bit;
}

// The bytes of a string of the vocabulary. They are written in GPT-2's alphabet: a printable byte is its own character,
// the other 68 are U+0100 to U+0143, in order. A string with any other character (an added token with spaces) means its
// UTF-8.
inline std::string symbol_bytes(const std::string& s) {
    static const std::vector<int> byte_of = [] {
        std::vector<int> table(256 + 68, -1);
        int other = 256;
        for (int b = 0; b < 256; b++) {
            bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b != 0xad);
            table[printable ? b : other++] = b;
        }
        return table;
    }();
    std::string bytes;
    for (const char *p = s.data(), *end = p + s.size(); p < end; p += utf8_step(p)) {
        char32_t c = utf8_decode(p, utf8_step(p));
        if (c >= byte_of.size() || byte_of[c] < 0) return s;
        bytes += (char)byte_of[c];
    }
    return bytes;
}

// The tokenizer.json that a name means: a file, or the one in a directory; empty for the byte tokenizer.
inline std::string tokenizer_path(const std::string& name) {
    struct stat status;
    bool directory = stat(name.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
    return name == "bytes" ? "" : directory ? name + "/tokenizer.json" : name;
}

// A tokenizer.json while it is opened. What is not of the family is an error that names the file and the part.
struct TokenizerFile {
    std::string path;
    nlohmann::json j;
    std::unordered_map<std::string, int> ids;   // of the vocabulary and of the added tokens

    [[noreturn]] void refuse(const std::string& what) const { die("tokenizer %s: %s", path.c_str(), what.c_str()); }

    // A part of an object; null where the object does not have it.
    static const nlohmann::json& part(const nlohmann::json& from, const char* key) {
        static const nlohmann::json none;
        return from.contains(key) ? from.at(key) : none;
    }

    static std::string type(const nlohmann::json& x) {
        if (x.is_null()) return "none";
        return part(x, "type").is_string() ? x.at("type").get<std::string>() : "of no type";
    }

    void only(const nlohmann::json& x, const char* what, const std::string& wanted, bool or_none) const {
        if (type(x) != wanted && !(or_none && x.is_null()))
            refuse(std::string("its ") + what + " is " + type(x) + "; only " + wanted + " is supported");
    }

    void unset(const nlohmann::json& from, const char* what, std::initializer_list<const char*> keys) const {
        for (const char* key : keys) {
            const nlohmann::json& x = part(from, key);
            if (!(x.is_null() || x == false || x == 0 || x == ""))
                refuse(std::string("its ") + what + " has " + key + " " + x.dump() + ", which is not supported");
        }
    }
};

// Null where the file can't be read, discarded where it is not JSON.
inline nlohmann::json tokenizer_json(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return nlohmann::json();
    std::ostringstream contents;
    contents << file.rdbuf();
    return json_parse_as<nlohmann::json>(contents.str());
}

// A part that is a sequence of one is that one.
inline void tokenizer_unwrap(TokenizerFile* f) {
    const std::pair<const char*, const char*> parts[] = {
        {"normalizer", "normalizers"}, {"pre_tokenizer", "pretokenizers"}, {"post_processor", "processors"},
        {"decoder", "decoders"}};
    for (auto& [part, list] : parts) {
        const nlohmann::json x = f->part(f->j, part);
        if (f->type(x) == "Sequence" && f->part(x, list).is_array() && x.at(list).size() == 1)
            f->j[part] = x.at(list)[0];
    }
}

// Refuses what is not implemented: each part besides the vocabulary is null, or of the one type that is implemented.
inline void tokenizer_check(const TokenizerFile& f) {
    const nlohmann::json &model = f.j.at("model"), &before = f.part(f.j, "pre_tokenizer");
    const nlohmann::json &after = f.part(f.j, "post_processor");
    f.only(model, "model", "BPE", false);
    f.unset(model, "model", {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                             "ignore_merges"});
    f.only(f.part(f.j, "normalizer"), "normalizer", "NFC", true);
    f.only(before, "pre_tokenizer", "ByteLevel", false);
    f.unset(before, "pre_tokenizer", {"add_prefix_space"});
    if (before.contains("use_regex") && before.at("use_regex") != true)
        f.refuse("its pre_tokenizer does not split the text (use_regex), which is not supported");
    f.only(f.part(f.j, "decoder"), "decoder", "ByteLevel", false);
    f.unset(f.j, "file", {"truncation", "padding"});
    if (f.type(after) != "TemplateProcessing") return f.only(after, "post_processor", "ByteLevel", true);
    // It adds ids around the text; or none, as transformers writes it.
    const nlohmann::json& single = f.part(after, "single");
    if (!single.is_array() || single.size() != 1 || !single[0].contains("Sequence"))
        f.refuse("its post_processor adds tokens (TemplateProcessing), which is not supported");
}

// Gives the string s of the file its id.
inline void tokenizer_add(TokenizerFile* f, Bpe* b, const std::string& s, const nlohmann::json& id) {
    auto shown = [&] { return nlohmann::json(s).dump(); };
    if (!id.is_number_integer() || id < 0 || id >= 1 << 20)
        f->refuse("the id of " + shown() + " is " + id.dump() + ", not from 0 to 1048575");
    auto [at, is_new] = f->ids.emplace(s, id.get<int>());
    if (at->second != id)
        f->refuse("it gives " + shown() + " two ids, " + std::to_string(at->second) + " and " + id.dump());
    size_t i = (size_t)at->second;
    if (i >= b->text.size()) {
        b->text.resize(i + 1);
        b->present.resize(i + 1);
        b->special.resize(i + 1);
    }
    if (is_new && b->present[i]) f->refuse("two of its tokens have the id " + id.dump());
    b->text[i] = symbol_bytes(s);
    b->present[i] = true;
}

inline void tokenizer_read_vocab(TokenizerFile* f, Bpe* b) {
    const nlohmann::json& model = f->j.at("model");
    if (!f->part(model, "vocab").is_object() || !f->part(model, "merges").is_array())
        f->refuse("its model has no vocab or no merges");
    for (auto& [s, id] : model.at("vocab").items()) tokenizer_add(f, b, s, id);

    std::fill(std::begin(b->byte_id), std::end(b->byte_id), -1);
    for (auto& [s, id] : f->ids)
        if (utf8_step(s.data()) == (int)s.size() && b->text[id].size() == 1)
            b->byte_id[(unsigned char)b->text[id][0]] = id;
    for (int byte = 0; byte < 256; byte++) {
        bool never = byte == 0xc0 || byte == 0xc1 || byte >= 0xf5;      // in no UTF-8
        if (b->byte_id[byte] < 0 && !never)
            f->refuse("its vocabulary has no symbol for byte " + std::to_string(byte) + "; it is not a byte-level one");
    }
}

// The two tokens of a merge, which is "left right" or ["left", "right"]; empty where it is neither.
inline std::pair<std::string, std::string> merge_parts(const nlohmann::json& merge) {
    if (merge.is_string()) {
        std::string both = merge.get<std::string>();
        size_t space = both.find(' ');
        return {both.substr(0, space), space == std::string::npos ? "" : both.substr(space + 1)};
    }
    bool pair = merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string();
    if (!pair) return {};
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
}

inline void tokenizer_read_merges(const TokenizerFile& f, Bpe* b) {
    const nlohmann::json& merges = f.j.at("model").at("merges");
    if (merges.size() >= NO_MERGE) f.refuse("it has more than 16777214 merges");
    for (b->shift = 54; (1ull << (64 - b->shift)) < 2 * merges.size(); b->shift--) {}
    b->pairs.assign(1ull << (64 - b->shift), ~0ull);
    for (const nlohmann::json& merge : merges) {
        auto [left, right] = merge_parts(merge);
        auto l = f.ids.find(left), r = f.ids.find(right), m = f.ids.find(left + right);
        if (l == f.ids.end() || r == f.ids.end() || m == f.ids.end())
            f.refuse("its merge " + merge.dump() + " is not of two tokens that make a third");
        uint64_t pair = pair_of(l->second, r->second);
        size_t i = (pair * 0x9e3779b97f4a7c15) >> b->shift;
        while (b->pairs[i] != ~0ull && b->pairs[i] >> 24 != pair) i = (i + 1) & (b->pairs.size() - 1);
        b->pairs[i] = pair << 24 | b->merged.size();
        b->merged.push_back(m->second);
    }

    b->byte_ranks.assign(256 * 256, NO_MERGE);
    for (int left = 0; left < 256; left++)
        for (int right = 0; right < 256; right++) {
            int l = b->byte_id[left], r = b->byte_id[right];
            if (l >= 0 && r >= 0) b->byte_ranks[left << 8 | right] = merge_rank(*b, l, r);
        }
}

inline void tokenizer_read_added(TokenizerFile* f, Bpe* b) {
    const nlohmann::json& added = f->part(f->j, "added_tokens");
    if (!added.is_null() && !added.is_array()) f->refuse("its added_tokens are not a list");
    for (const nlohmann::json& x : added) {
        AddedToken a;
        if (!x.is_object() || !f->part(x, "content").is_string() || x.at("content") == "")
            f->refuse("an added token has no content: " + x.dump());
        const std::pair<const char*, bool*> flags[] = {
            {"single_word", &a.single_word}, {"lstrip", &a.lstrip}, {"rstrip", &a.rstrip},
            {"normalized", &a.normalized}, {"special", &a.special}};
        for (auto& [key, flag] : flags) {
            if (!f->part(x, key).is_boolean())
                f->refuse("an added token has no " + std::string(key) + ", true or false: " + x.dump());
            *flag = x.at(key).get<bool>();
        }
        a.content = x.at("content").get<std::string>();
        tokenizer_add(f, b, a.content, f->part(x, "id"));
        a.id = x.at("id").get<int>();
        if (a.special) b->special[a.id] = true;
        if (a.normalized && b->nfc) a.content = nfc(unicode(), a.content);
        b->text[a.id] = symbol_bytes(a.content);
        added_insert(a.normalized ? &b->normalized : &b->raw, a);
    }
}

// The id that ends a document: the eos_token_id of the config.json in the same directory, of a list the first (in
// OLMoE's 0125 releases the names of the tokens are swapped); where there is none, <|endoftext|>.
inline int tokenizer_eos(const TokenizerFile& f, const Bpe& b) {
    nlohmann::json config = tokenizer_json(f.path.substr(0, f.path.rfind('/') + 1) + "config.json");
    nlohmann::json field = config.is_object() ? f.part(config, "eos_token_id") : nlohmann::json();
    double number = -1;                     // like null: it names none
    for (const nlohmann::json& id : field.is_array() ? field : nlohmann::json::array({field}))
        if (number < 0 && id.is_number()) number = id.get<double>();
    auto named = f.ids.find("<|endoftext|>");
    if (number < 0 && named == f.ids.end())
        f.refuse("it has no <|endoftext|>, and no config.json beside it names one of its ids as eos_token_id: "
                 "nothing ends a document");
    const double eos = number < 0 ? named->second : number;
    if (!(eos < (double)b.present.size()) || eos != std::floor(eos) || !b.present[(size_t)eos])
        f.refuse("the config.json beside it has eos_token_id " + field.dump() + ", but it has no token of this id: "
                 "are they of two models?");
    return (int)eos;
}

// Opens "bytes", a tokenizer.json, or the one in a directory. What is not of the family is refused by its name.
inline void tokenizer_open(Tokenizer* t, const std::string& name) {
    *t = Tokenizer();
    t->name = name;
    t->path = tokenizer_path(name);
    if (t->path.empty()) {
        t->eos = 256;
        t->vocab = 257;
        t->bytes = true;
        return;
    }
    TokenizerFile f;
    f.path = t->path;
    f.j = tokenizer_json(t->path);
    if (f.j.is_null())
        f.refuse(std::string("cannot be read: ") + strerror(errno)
                 + "; --tokenizer takes bytes, a tokenizer.json, or a directory that holds one");
    if (!f.j.is_object() || !f.j.contains("model")) f.refuse("not a tokenizer.json: a JSON object with a model");
    tokenizer_unwrap(&f);
    tokenizer_check(f);

    auto b = std::make_shared<Bpe>();
    static std::atomic<uint64_t> opened{0};
    b->serial = ++opened;
    b->nfc = !f.part(f.j, "normalizer").is_null();
    tokenizer_read_vocab(&f, b.get());
    tokenizer_read_merges(f, b.get());
    tokenizer_read_added(&f, b.get());
    t->eos = tokenizer_eos(f, *b);
    t->vocab = (int)b->text.size();
    t->bpe = b;
}

// ------------------------------------------------------------------------------------------------
// Added tokens and words

// The token at p, -1 where none begins there.
inline int added_at(const AddedTokens& a, const char* p, const char* end) {
    int token = -1;
    for (int node = 0; p < end && (node = a.nodes[node].next[(unsigned char)*p]) != 0; p++)
        if (a.nodes[node].token >= 0) token = a.nodes[node].token;
    return token;
}

// Where the next token begins in [p, end), and which one; end and -1 where there is none. Most places are skipped eight
// at a time, by their pairs of bytes.
inline const char* added_next(const AddedTokens& a, const char* p, const char* end, int* token) {
    const unsigned char *s = (const unsigned char*)p, *stop = (const unsigned char*)end;
    *token = -1;
    while (s < stop && !a.tokens.empty()) {
        bool eight = stop - s > 8;
        int n = eight ? 8 : (int)(stop - s), any = !eight;
        if (eight)
            for (int i = 0; i < 8; i++) any |= a.first[s[i]] & a.second[s[i + 1]];
        for (int i = 0; any && i < n; i++)
            if (a.first[s[i]] && (*token = added_at(a, (const char*)s + i, end)) >= 0) return (const char*)s + i;
        s += n;
    }
    return end;
}

// The beginning of the code point that ends at p > begin.
inline const char* utf8_back(const char* begin, const char* p) {
    do p--;
    while (p > begin && ((unsigned char)*p & 0xc0) == 0x80);
    return p;
}

// Cuts text at added tokens: calls piece(begin, end) for what is between them and token(id) for each, in order. A
// token with single_word that touches a word is skipped. With lstrip the white space before a token belongs to it,
// with rstrip the white space after it.
template <class Piece, class Token>
inline void added_split(const AddedTokens& a, const char* begin, const char* end, Piece piece, Token token) {
    const Unicode& u = unicode();
    auto flags = [&](const char* p) { return u.of[utf8_decode(p, utf8_step(p))]; };
    auto space = [&](const char* p) { return (flags(p) & KIND) == SPACE; };
    const char* done = begin;       // the text before it is cut
    int found;
    for (const char* p = added_next(a, begin, end, &found); found >= 0; ) {
        const AddedToken& t = a.tokens[found];
        const char *start = p, *stop = p + t.content.size(), *next = stop;
        bool touches = (start > begin && (flags(utf8_back(begin, start)) & IN_WORD))
            || (stop < end && (flags(stop) & IN_WORD));
        if (!t.single_word || !touches) {
            if (t.lstrip)
                while (start > begin && space(utf8_back(begin, start))) start = utf8_back(begin, start);
            if (t.rstrip)
                while (stop < end && space(stop)) stop += utf8_step(stop);
            start = t.lstrip ? std::max(start, done) : start;
            if (done < start) piece(done, start);
            if (start < stop) token(t.id);      // false where its text belongs to the token before it
            done = stop;
        }
        p = added_next(a, next, end, &found);
    }
    if (done < end) piece(done, end);
}

// How many of the eight bytes at p are ASCII letters, up to the first that is not. The high bit of each byte becomes
// the answer for that byte.
inline int ascii_letters(const char* p) {
    uint64_t x, ones = 0x0101010101010101;
    memcpy(&x, p, 8);
    uint64_t lower = (x | 0x20 * ones) & 0x7f * ones;
    uint64_t letter = (lower + (0x80 - 'a') * ones) & ~(lower + (0x7f - 'z') * ones) & ~x & 0x80 * ones;
    uint64_t not_letter = letter ^ 0x80 * ones;
    return not_letter ? __builtin_ctzll(not_letter) / 8 : 8;
}

// The end of the word that begins at p < end, by GPT-2's rule.
inline const char* word_end(const Unicode& u, const char* p, const char* end) {
    auto kind = [&](const char* q) {
        return u.of[(signed char)*q >= 0 ? (unsigned char)*q : utf8_decode(q, utf8_step(q))] & KIND;
    };
    if (*p == '\'' && end - p >= 2) {
        if (p[1] == 's' || p[1] == 't' || p[1] == 'm' || p[1] == 'd') return p + 2;
        bool re_ve_ll = end - p >= 3
            && ((p[2] == 'e' && (p[1] == 'r' || p[1] == 'v')) || (p[1] == 'l' && p[2] == 'l'));
        if (re_ve_ll) return p + 3;
    }
    int k = kind(p);
    if (*p == ' ' && p + 1 < end && kind(p + 1) != SPACE) k = kind(++p);
    const char *q = p, *last = p;
    while (q < end && kind(q) == k) {
        last = q;
        q += utf8_step(q);
    }
    // The last character of a run of white space belongs to the next word if it is a space. If not, it is a word
    // itself.
    return k == SPACE && q < end && last > p ? last : q;
}

// ------------------------------------------------------------------------------------------------
// Merges

// Appends the ids of a short word: searches all its pairs for the first merge, again and again.
inline void merge_short(const Bpe& b, const char* p, int n, std::vector<int>* out) {
    int ids[64];
    uint32_t ranks[64];     // of the pair (i, i + 1)
    for (int i = 0; i < n; i++) ids[i] = b.byte_id[(unsigned char)p[i]];
    for (int i = 0; i + 1 < n; i++) ranks[i] = b.byte_ranks[(unsigned char)p[i] << 8 | (unsigned char)p[i + 1]];
    while (n > 1) {
        int at = (int)(std::min_element(ranks, ranks + n - 1) - ranks);
        if (ranks[at] == NO_MERGE) break;
        ids[at] = b.merged[ranks[at]];
        for (int i = at + 1; i + 1 < n; i++) ids[i] = ids[i + 1];
        for (int i = at + 1; i + 2 < n; i++) ranks[i] = ranks[i + 1];
        n--;
        if (at + 1 < n) ranks[at] = merge_rank(b, ids[at], ids[at + 1]);
        if (at > 0) ranks[at - 1] = merge_rank(b, ids[at - 1], ids[at]);
    }
    out->insert(out->end(), ids, ids + n);
}

// The same for a long word: a linked list of symbols, and for each rank the places of its pair. A pair at one of these
// places may be gone by then, and is skipped. The places of a rank are merged from left to right, in the order of
// memory: 10 MB without a space take seconds.
inline void merge_long(const Bpe& b, const char* p, size_t n, std::vector<int>* out) {
    if (n > UINT32_MAX / 2) die("tokenizer: a word of %zu bytes; more than 2 GB without a space can't be encoded", n);
    struct Symbol { int id; uint32_t previous, next, rank; };   // next n: none; rank: of the pair with the next symbol
    std::vector<Symbol> s(n);
    std::map<uint32_t, std::vector<uint32_t>> places;
    auto pair_with_next = [&](uint32_t i) {
        s[i].rank = s[i].next < n ? merge_rank(b, s[i].id, s[s[i].next].id) : NO_MERGE;
        if (s[i].rank != NO_MERGE) places[s[i].rank].push_back(i);
    };
    for (uint32_t i = 0; i < n; i++) s[i] = {b.byte_id[(unsigned char)p[i]], i - 1, i + 1, NO_MERGE};
    for (uint32_t i = 0; i < n; i++) pair_with_next(i);
    while (!places.empty()) {
        uint32_t rank = places.begin()->first;
        std::vector<uint32_t> now = std::move(places.begin()->second);
        places.erase(places.begin());
        if (!std::is_sorted(now.begin(), now.end())) std::sort(now.begin(), now.end());
        for (size_t at = 0; at < now.size(); at++) {
            uint32_t i = now[at], gone = s[i].next;
            if (s[i].rank != rank) continue;
            s[i].id = b.merged[rank];
            s[i].next = s[gone].next;
            s[gone].rank = NO_MERGE;
            if (s[i].next < n) s[s[i].next].previous = i;
            pair_with_next(i);
            if (i > 0) pair_with_next(s[i].previous);
            // A pair that comes earlier in the list is merged first. No list that was trained has such a pair.
            if (!places.empty() && places.begin()->first < rank) {
                places[rank].assign(now.begin() + at + 1, now.end());
                break;
            }
        }
    }
    for (uint32_t i = 0; i < n; i = s[i].next) out->push_back(s[i].id);
}

// The words that a thread has met. Those of up to 15 bytes are in a hash table whose key is the word itself; longer
// ones are in a map. When the cache is full it is emptied: it holds at most about 25 MB a thread.
struct WordCache {
    // high: bytes 8 to 14, and the length. Where count > 3, ids[0] is an offset in more.
    struct Word { uint64_t low, high; int count, ids[3]; };
    struct LongWord { size_t offset; int count; };
    uint64_t serial = 0;
    std::vector<Word> words;
    size_t used = 0;
    int shift = 0;                                              // 64 - log2(words.size())
    std::vector<int> more, scratch;
    std::unordered_map<std::string_view, LongWord> long_words;
    std::deque<std::string> long_text;                          // what the keys of long_words point into
};

constexpr size_t CACHE_WORDS = 1 << 17, CACHE_LONG_WORDS = 1 << 14, CACHE_MORE = 1 << 20;
constexpr ptrdiff_t CACHE_BYTES = 256;                          // longer words are not remembered

inline void cache_clear(WordCache* c, uint64_t serial) {
    *c = WordCache();
    c->serial = serial;
    c->words.resize(1 << 10);
    c->shift = 64 - 10;
}

inline size_t cache_slot(const WordCache& c, uint64_t low, uint64_t high) {
    uint64_t h = (low ^ (high << 32 | high >> 32)) * 0x9e3779b97f4a7c15;
    return ((h ^ h >> 32) * 0xd6e8feb86659fd93) >> c.shift;
}

// The place of a word, or the free place where it will go.
inline WordCache::Word* cache_find(WordCache* c, uint64_t low, uint64_t high) {
    size_t i = cache_slot(*c, low, high);
    while (c->words[i].high && (c->words[i].low != low || c->words[i].high != high))
        i = (i + 1) & (c->words.size() - 1);
    return &c->words[i];
}

inline void merge_word(const Bpe& b, const char* p, size_t n, std::vector<int>* out) {
    if (n <= 64) merge_short(b, p, (int)n, out);
    else merge_long(b, p, n, out);
}

// Computes a short word that is not in the cache and remembers it.
inline WordCache::Word* cache_insert(const Bpe& b, WordCache* c, const char* p, int n, uint64_t low, uint64_t high) {
    if (c->used >= CACHE_WORDS || c->more.size() > CACHE_MORE) cache_clear(c, c->serial);
    if (2 * c->used >= c->words.size()) {
        std::vector<WordCache::Word> old(2 * c->words.size());
        old.swap(c->words);
        c->shift--;
        for (const WordCache::Word& w : old)
            if (w.high) *cache_find(c, w.low, w.high) = w;
    }
    c->scratch.clear();
    merge_word(b, p, n, &c->scratch);
    WordCache::Word* w = cache_find(c, low, high);
    *w = {low, high, (int)c->scratch.size(), {}};
    c->used++;
    if (w->count <= 3) std::copy(c->scratch.begin(), c->scratch.end(), w->ids);
    else {
        w->ids[0] = (int)c->more.size();
        c->more.insert(c->more.end(), c->scratch.begin(), c->scratch.end());
    }
    return w;
}

// Appends the ids of a word of 16 bytes or more.
inline void encode_long(const Bpe& b, WordCache* c, std::string_view word, std::vector<int>* out) {
    if ((ptrdiff_t)word.size() > CACHE_BYTES) return merge_word(b, word.data(), word.size(), out);
    auto found = c->long_words.find(word);
    if (found == c->long_words.end()) {
        if (c->long_words.size() >= CACHE_LONG_WORDS || c->more.size() > CACHE_MORE) cache_clear(c, c->serial);
        size_t offset = c->more.size();
        merge_word(b, word.data(), word.size(), &c->more);
        c->long_text.emplace_back(word);
        WordCache::LongWord computed = {offset, (int)(c->more.size() - offset)};
        found = c->long_words.emplace(c->long_text.back(), computed).first;
    }
    auto ids = c->more.begin() + found->second.offset;
    out->insert(out->end(), ids, ids + found->second.count);
}

// Appends the ids of [p, end), which holds no added token. The bytes up to limit >= end may be read.
inline void encode_words(const Bpe& b, WordCache* c, const char* p, const char* end, const char* limit,
                         std::vector<int>* out) {
    const Unicode& u = unicode();
    struct Found { const char* p; int n; uint64_t low, high; } words[64];
    int ids[64 * 16];
    while (p < end) {
        // First finds some words and prefetches their places in the cache, then reads these places. The processor often
        // guesses the end of a word wrong; this way it does not wait for memory as well (20 to 33 % faster).
        int count = 0;
        for (const char* next; p < end && count < 64; p = next) {
            // Most words are a space and ASCII letters.
            const char* q = p + (*p == ' ');
            int letters = limit - q >= 8 ? ascii_letters(q) : 0;
            if (letters == 0) next = word_end(u, p, end);
            else {
                for (q += letters; letters == 8; q += letters) letters = limit - q >= 8 ? ascii_letters(q) : 0;
                next = std::min(q, end);
                if (q < end && ((signed char)*q < 0 || limit - q < 8)) next = word_end(u, p, end);
            }
            ptrdiff_t n = next - p;
            if (n > 15) {
                if (count > 0) break;       // first the words before it
                encode_long(b, c, std::string_view(p, n), out);
                continue;
            }
            Found& w = words[count++];
            w = {p, (int)n, 0, 0};
            if (limit - p >= 16) {
                memcpy(&w.low, p, 8);
                memcpy(&w.high, p + 8, 8);
                w.low &= n >= 8 ? ~0ull : (1ull << 8 * n) - 1;
                w.high &= n <= 8 ? 0 : (1ull << 8 * (n - 8)) - 1;
            } else {
                memcpy(&w.low, p, std::min<ptrdiff_t>(n, 8));
                if (n > 8) memcpy(&w.high, p + 8, n - 8);
            }
            w.high |= (uint64_t)n << 56;
            __builtin_prefetch(&c->words[cache_slot(*c, w.low, w.high)]);
        }
        int* to = ids;
        for (int i = 0; i < count; i++) {
            WordCache::Word* w = cache_find(c, words[i].low, words[i].high);
            if (!w->high) w = cache_insert(b, c, words[i].p, words[i].n, words[i].low, words[i].high);
            memcpy(to, w->ids, sizeof w->ids);
            if (w->count > 3) memcpy(to, &c->more[w->ids[0]], w->count * sizeof(int));
            to += w->count;
        }
        out->insert(out->end(), ids, to);
    }
}

// ------------------------------------------------------------------------------------------------
// Encode, decode

// Appends the ids of s: those of `tokenizers`, without special tokens around them. Bytes that are not UTF-8 count as
// U+FFFD. Any number of threads may encode with one tokenizer.
inline void tokenizer_encode(const Tokenizer& t, std::string_view s, std::vector<int>* append_to) {
    if (t.bytes) {
        for (char c : s) append_to->push_back((unsigned char)c);
        return;
    }
    const Bpe& b = *t.bpe;
    const Unicode& u = unicode();
    static thread_local WordCache cache;
    if (cache.serial != b.serial) cache_clear(&cache, b.serial);

    std::string replaced;
    bool stable = true;
    for (const char *p = s.data(), *end = p + s.size(); p < end;) {
        uint64_t eight;
        if (end - p >= 8 && (memcpy(&eight, p, 8), (eight & 0x8080808080808080) == 0)) {
            p += 8;
            continue;
        }
        int n = utf8_length(p, end);
        if (n < 0) {        // begins again, with valid UTF-8
            replaced = utf8_replace(s);
            s = replaced;
            p = s.data();
            end = p + s.size();
            continue;
        }
        if (n > 1 && (u.of[utf8_decode(p, n)] & UNSTABLE)) stable = false;
        p += n;
    }
    auto token = [&](int id) { append_to->push_back(id); };
    auto piece = [&](const char* begin, const char* end) {
        std::string composed;
        const char* limit = s.data() + s.size();
        if (b.nfc && !stable) {
            composed = nfc(u, std::string_view(begin, end - begin));
            begin = composed.data();
            limit = end = begin + composed.size();
        }
        auto words = [&](const char* from, const char* to) { encode_words(b, &cache, from, to, limit, append_to); };
        added_split(b.normalized, begin, end, words, token);
    };
    added_split(b.raw, s.data(), s.data() + s.size(), piece, token);
}

inline std::vector<int> tokenizer_encode(const Tokenizer& t, const std::string& s) {
    std::vector<int> ids;
    tokenizer_encode(t, s, &ids);
    return ids;
}

// The bytes of one id, which may be a part of a character. The id that ends a document of the byte tokenizer has no
// bytes, nor do the ids that pad the vocabulary.
inline std::string tokenizer_decode(const Tokenizer& t, int id) {
    if (t.bytes) return id >= 0 && id < 256 ? std::string(1, (char)id) : "";
    return id >= 0 && id < t.vocab ? t.bpe->text[id] : "";
}

// The text of ids; what is not UTF-8 becomes U+FFFD. skip_special leaves out the tokens that the file calls special,
// such as <|endoftext|>.
inline std::string tokenizer_decode(const Tokenizer& t, const std::vector<int>& ids, bool skip_special) {
    std::string bytes;
    for (int id : ids) {
        bool special = t.bpe && id >= 0 && id < t.vocab && t.bpe->special[id];
        if (!(skip_special && special)) bytes += tokenizer_decode(t, id);
    }
    return utf8_replace(bytes);
}

// Decodes one id after another: each call returns the characters that are now complete. Together they are the text that
// tokenizer_decode returns.
struct TextStream { std::string pending; };

inline std::string stream_next(TextStream* s, const Tokenizer& t, int id) {
    std::string bytes = s->pending + tokenizer_decode(t, id);
    s->pending.clear();
    return utf8_replace(bytes, &s->pending);
}

inline std::string stream_end(TextStream* s) {
    std::string rest = utf8_replace(s->pending);
    s->pending.clear();
    return rest;
}

// ------------------------------------------------------------------------------------------------
// White space, and conversations

// Bytes of the white space character that s[begin, end) begins with, or with front = false ends with; 0 where there is
// none. White space is Python's: that of ASCII, and that of Unicode in UTF-8.
inline size_t white_space(const std::string& s, size_t begin, size_t end, bool front) {
    static const char* const wide[] = {
        "\xc2\x85", "\xc2\xa0", "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81", "\xe2\x80\x82", "\xe2\x80\x83",
        "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86", "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a",
        "\xe2\x80\xa8", "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};
    if (begin == end) return 0;
    unsigned char c = (unsigned char)s[front ? begin : end - 1];
    if (c == ' ' || (c >= 9 && c <= 13) || (c >= 28 && c <= 31)) return 1;
    if (c < 128) return 0;
    for (const char* w : wide) {
        size_t n = strlen(w);
        if (end - begin >= n && s.compare(front ? begin : end - n, n, w) == 0) return n;
    }
    return 0;
}

// Python's str.strip, which dolma applies to every document. A piece is stripped only at an end of its document.
inline std::string strip(const std::string& s, bool front = true, bool back = true) {
    size_t begin = 0, end = s.size();
    while (size_t n = front ? white_space(s, begin, end, true) : 0) begin += n;
    while (size_t n = back ? white_space(s, begin, end, false) : 0) end -= n;
    return s.substr(begin, end - begin);
}

struct ChatMessage { std::string role, content; };      // role: system, user or assistant

// The text that OLMoE's Instruct models were trained to answer, by the template of their release. It begins with eos,
// so encode it without adding tokens. With answer_follows it ends where the answer of the assistant begins. eos is the
// text of the token that ends a document; the 0125 releases have another one.
inline std::string chat_prompt(const std::vector<ChatMessage>& messages, bool answer_follows,
                               const std::string& eos = "<|endoftext|>") {
    std::string prompt = eos;
    for (const ChatMessage& m : messages) {
        if (m.role != "system" && m.role != "user" && m.role != "assistant")
            die("chat: the role %s is not one of system, user, assistant", m.role.c_str());
        prompt += "<|" + m.role + "|>\n" + m.content + (m.role == "assistant" ? eos : "") + "\n";
    }
    return prompt + (answer_follows ? "<|assistant|>\n" : "");
}
