// The words of a command, as words.py writes them: a blank in a path comes as the byte 0x1f.
#pragma once
#include <algorithm>
#include <sstream>
#include <string>
#include <type_traits>

struct Words : std::istringstream { using std::istringstream::istringstream; };
template <typename T> static Words& operator>>(Words& in, T& value) {
    static_cast<std::istringstream&>(in) >> value;
    if constexpr (std::is_same<T, std::string>::value) std::replace(value.begin(), value.end(), '\x1f', ' ');
    return in;
}
