// files.h: what all that reads and writes files needs: names that reach the disk, and JSON with numbers of any size.
//
// Host code only. No error ends the program here.
#pragma once
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <string>
#include <fcntl.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

// Makes the names in a folder as durable as its files. There are folders that can't be opened (nobody may list them) or
// synced (some file systems don't). What is written there is complete all the same, so this is no error. False, with
// errno set, where the disk fails or is full.
inline bool folder_sync(const std::string& path) {
    int folder = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool synced = folder >= 0 && fsync(folder) == 0;
    int error = errno;
    if (folder >= 0) close(folder);
    errno = error;
    return synced || (error != EIO && error != ENOSPC && error != EDQUOT);
}

// The JSON text with 1e308 in the place of numbers that no double holds, such as 1e400: the library ends at these,
// wherever they are. What follows such a number stays at its byte.
inline std::string json_numbers_limited(std::string s) {
    auto too_large = [](const std::string& number) {
        try {
            return std::isinf(strtod(number.c_str(), nullptr)) && nlohmann::json::parse(number).is_null();
        } catch (const nlohmann::json::exception& e) { return e.id == 406; }    // else it is not a number of JSON
    };
    bool quoted = false;
    for (size_t i = 0, end; i < s.size(); i = end) {
        end = i + 1;
        if (s[i] == '"') quoted = !quoted;
        else if (quoted && s[i] == '\\') end++;
        if (quoted || !(s[i] == '-' || (s[i] >= '0' && s[i] <= '9'))) continue;
        end = std::min(s.find_first_not_of("+-.0123456789Ee", i), s.size());
        std::string limit = s[i] == '-' ? "-1e308" : "1e308";
        if (!too_large(s.substr(i, end - i))) continue;
        limit.resize(end - i, ' ');
        s.replace(i, end - i, limit);
    }
    return s;
}

// Values nested deeper than this are dropped, because dump() would recurse into them. Nothing here is nested so deep.
constexpr int json_depth = 100;

// Discarded where the text is not JSON.
template <class J> J json_parse_as(const std::string& source) {
    auto shallow = [](int depth, typename J::parse_event_t, J&) { return depth < json_depth; };
    try {
        return J::parse(source, shallow);
    } catch (const nlohmann::json::out_of_range&) {
        return J::parse(json_numbers_limited(source), shallow, false);
    } catch (const nlohmann::json::parse_error&) {
        return J(J::value_t::discarded);
    }
}

using Json = nlohmann::ordered_json;                    // an object keeps its order

inline Json json_parse(const std::string& source) { return json_parse_as<Json>(source); }

// A value for an error message: as JSON, so that it stays on one line, and cut where it is long.
inline std::string json_shown(const Json& j) {
    std::string s = j.dump(-1, ' ', true, Json::error_handler_t::replace);
    return s.size() <= 80 ? s : s.substr(0, 77) + "...";
}
