// What a file holds, by its bytes rather than by its name: another format or text, or numbers of another type.
//
// Included by dataloader.h and commands/tokenize.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

// ------------------------------------------------------------------------------------------------
// Formats

struct FileFormat {
    const char* suffix;         // of names
    std::string_view magic;     // how the contents begin; empty where nothing tells them from tokens or text
    size_t at;                  // where the magic number is
    const char *what, *first;   // what to do before the file can be used; the name follows where it ends in a space
};

constexpr const char* WRITE_JSONL = "write its texts as .jsonl, {\"text\": ...} on each line";

// The format of a file by how it begins, else by its name, else null.
inline const FileFormat* file_format(const std::string& path, std::string_view begin) {
    using namespace std::string_view_literals;
    static const FileFormat formats[] = {
        {".zst", "\x28\xb5\x2f\xfd"sv, 0, "compressed by zstd", "zstd -d "},
        {".gz", "\x1f\x8b\x08"sv, 0, "compressed by gzip", "gunzip "},
        {".xz", "\xfd" "7zXZ\0"sv, 0, "compressed by xz", "xz -d "},
        {".bz2", "1AY&SY"sv, 4, "compressed by bzip2", "bzip2 -d "},
        {".lz4", "\x04\x22\x4d\x18"sv, 0, "compressed by lz4", "lz4 -d "},
        {".zip", "PK\3\4"sv, 0, "a zip archive", "unzip "},
        {".npz", ""sv, 0, "a zip archive", "save its array by numpy.save"},
        {".tar", "ustar"sv, 257, "a tar archive", "tar -xf "},
        {".parquet", "PAR1"sv, 0, "a Parquet table", WRITE_JSONL},
        {".arrow", "ARROW1\0"sv, 0, "an Arrow table", WRITE_JSONL},
        {".h5", "\x89HDF\r\n\x1a\n"sv, 0, "an HDF5 file", WRITE_JSONL},
        {".pdf", "%PDF-"sv, 0, "a PDF", "pdftotext "},
        {".idx", "MMIDIDX\0"sv, 0, "an index of Megatron's", "write its tokens by numpy.save"},
        {".npy", "\x93NUMPY"sv, 0, "numbers, such as tokens", "name the texts themselves"},
    };
    auto has_magic = [&](const FileFormat& f) {
        return !f.magic.empty() && begin.size() > f.at && begin.substr(f.at, f.magic.size()) == f.magic;
    };
    auto has_name = [&](const FileFormat& f) {
        size_t n = strlen(f.suffix);
        return path.size() > n && path.compare(path.size() - n, n, f.suffix) == 0;
    };
    for (const FileFormat& f : formats) if (has_magic(f)) return &f;
    for (const FileFormat& f : formats) if (has_name(f)) return &f;
    return nullptr;
}

// "compressed by zstd; first: zstd -d FILE"
inline std::string format_advice(const FileFormat& f, const std::string& path) {
    std::string first = f.first;
    return std::string(f.what) + "; first: " + first + (first.back() == ' ' ? path : "");
}

// ------------------------------------------------------------------------------------------------
// Samples of a file

using Sample = std::vector<std::string_view>;   // some blocks of it, each from a multiple of 8 bytes on

// Is it text? At least 7/8 of its bytes are then ASCII's characters and white space, or those of longer characters in
// UTF-8. Of the bytes of tokens half are at most.
inline bool looks_like_text(const Sample& sample) {
    size_t all = 0, readable = 0;
    for (std::string_view block : sample)
        for (size_t i = 0, n; i < block.size(); all += n, i += n) {
            unsigned char c = (unsigned char)block[i];
            size_t length = c < 0xc2 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 1;
            for (n = 1; n < length && i + n < block.size() && ((unsigned char)block[i + n] & 0xc0) == 0x80; n++) {}
            bool ascii = (c >= 32 && c < 127) || (c >= 9 && c <= 13);
            if (ascii || (length > 1 && n == length)) readable += n;
        }
    return all >= 32 && 8 * readable >= 7 * all;
}

// The numbers of a sample as a type: how many, how many above 0, and how many are not whole numbers from 0 to below
// `bound`. The -1 and -100 of labels are no tokens, and pass.
struct Numbers {
    size_t count = 0, above = 0, outside = 0;

    // Some damaged ones don't count against a type. Almost nothing but zeros says nothing of it.
    bool fit() const { return count >= 16 && 64 * outside <= count && 8 * above >= count; }
};

template <typename T> Numbers numbers_read(const Sample& sample, double bound, bool swapped = false) {
    Numbers found;
    for (std::string_view block : sample)
        for (size_t i = 0; i + sizeof(T) <= block.size(); i += sizeof(T)) {
            char bytes[sizeof(T)];
            for (size_t b = 0; b < sizeof(T); b++) bytes[b] = block[i + (swapped ? sizeof(T) - 1 - b : b)];
            T number;
            memcpy(&number, bytes, sizeof number);
            double x = (double)number;
            found.count++;
            found.above += x > 0;
            found.outside += !(x >= 0 && x < bound && x == std::floor(x)) && x != -1 && x != -100;
        }
    return found;
}

// The type of wider numbers than uint16, or of uint32 in a file that is read as uint32, that all are below `bound`; the
// widest first, because an int64 is also two uint32. Tokens of the right type are no such numbers: every second word of
// theirs would have to be 0 or small.
inline std::string wider_type(const Sample& sample, int width, double bound) {
    if (numbers_read<int64_t>(sample, bound).fit()) return "int64";
    if (numbers_read<double>(sample, bound).fit()) return "float64";
    if (width == 2 && numbers_read<int32_t>(sample, bound).fit()) return "uint32";
    if (numbers_read<float>(sample, bound).fit()) return "float32";
    if (numbers_read<int64_t>(sample, bound, true).fit()) return "big-endian int64";
    if (numbers_read<int32_t>(sample, bound, true).fit()) return "big-endian uint32";
    return "";
}

// The type that the numbers of a file evidently have, where it is not uint16 (width 2) or uint32 (width 4); else "".
inline std::string other_type(const Sample& sample, int width, int vocabulary) {
    const double V = vocabulary, many = 1 << 20;        // more than any vocabulary has
    const Numbers as_read = width == 2 ? numbers_read<uint16_t>(sample, V) : numbers_read<uint32_t>(sample, V);
    std::string type = wider_type(sample, width, std::max(V, 65536.0));
    if (type.empty() && as_read.outside > 0) type = wider_type(sample, width, many);
    // Bytes and an end of text, 0 to 256, have nothing but 0 and 1 in their upper halves.
    bool bytes = numbers_read<uint16_t>(sample, 512, true).fit() && numbers_read<uint16_t>(sample, 512).outside > 0;
    if (type.empty() && bytes) type = "big-endian uint16";
    bool right = as_read.outside == 0 || (width == 4 && numbers_read<uint32_t>(sample, many).fit());
    if (!type.empty() || right) return type;
    if (width == 4 && numbers_read<uint16_t>(sample, V).fit()) return "uint16";
    return numbers_read<uint16_t>(sample, V, true).fit() ? "big-endian uint16" : "";
}
