// Command-line options: one table parses them, checks them, and prints --help, so that these can't differ.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <variant>
#include <vector>

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Kinds of text, told apart by their types
struct Choice : std::string { using std::string::string; };     // one of the words that the option lists
struct Steps : std::string { using std::string::string; };      // a number of steps, or of tokens; see steps_of
struct Optional : std::string { using std::string::string; };   // an option whose value may be left out: "newest" then

struct Option {
    using Value = std::variant<int64_t*, double*, bool*, std::string*, Choice*, Steps*, Optional*,
                               std::vector<std::string>*>;
    const char* name;
    Value value;            // where it goes; what is there before is the default
    const char* values;     // how --help shows the value; of a Choice, the words with | between them
    const char* help;
    double min = 0, max = 1e18;

    template <typename T> T* as() const { auto p = std::get_if<T*>(&value); return p ? *p : nullptr; }
};

inline std::string option_default(const Option& o) {
    char number[64] = "";
    if (auto integer = o.as<int64_t>()) snprintf(number, sizeof number, "%ld", *integer);
    if (auto real = o.as<double>()) snprintf(number, sizeof number, "%g", *real);
    if (auto words = o.as<std::string>()) return *words;
    if (auto word = o.as<Choice>()) return *word;
    if (auto steps = o.as<Steps>()) return *steps;
    return number;
}

inline void options_help(const char* usage, const std::vector<Option>& options) {
    printf("usage: olmoe %s\n", usage);
    for (const Option& o : options) {
        std::string left = std::string("--") + o.name + (o.as<bool>() ? "" : std::string(" ") + o.values);
        std::string fallback = option_default(o);
        printf("  %-34s %s%s\n", left.c_str(), o.help, fallback.empty() ? "" : (" (" + fallback + ")").c_str());
    }
}

// The value `given` of an option that takes one
inline void option_set(const Option& o, const char* given) {
    if (auto words = o.as<std::string>()) { *words = given; return; }
    if (auto steps = o.as<Steps>()) { steps->assign(given); return; }
    if (auto word = o.as<Choice>()) {
        const std::string list = std::string("|") + o.values + "|";
        if (strchr(given, '|') || list.find("|" + std::string(given) + "|") == std::string::npos)
            die("option --%s: '%s' is not one of %s", o.name, given, o.values);
        word->assign(given);
        return;
    }
    char* end;
    double number = strtod(given, &end);
    if (*given == 0 || *end || !(number >= o.min && number <= o.max))
        die("option --%s: '%s' is not a number from %.10g to %.10g", o.name, given, o.min, o.max);
    if (auto real = o.as<double>()) { *real = number; return; }
    if (number != std::floor(number)) die("option --%s: '%s' is not a whole number", o.name, given);
    *o.as<int64_t>() = (int64_t)number;
}

// Fills the values of `options` from the arguments after the command. `rest` takes what belongs to no option, or is
// null.
inline void options_parse(int argc, char** argv, const char* usage, const std::vector<Option>& options,
                          std::vector<std::string>* rest = nullptr) {
    auto is_option = [&](int i) { return strncmp(argv[i], "--", 2) == 0; };
    for (int i = 2; i < argc; i++) {
        std::string arg = argv[i];
        if (arg == "--help" || arg == "-h") { options_help(usage, options); exit(0); }
        if (!is_option(i)) {
            if (!rest) die("unexpected argument '%s'; see olmoe %s --help", argv[i], argv[1]);
            rest->push_back(arg);
            continue;
        }
        const Option* o = nullptr;
        for (const Option& candidate : options) if (arg == std::string("--") + candidate.name) o = &candidate;
        if (!o) die("unknown option '%s'; see olmoe %s --help", argv[i], argv[1]);
        bool another = i + 1 < argc && !is_option(i + 1);
        if (auto flag = o->as<bool>()) {
            *flag = true;
        } else if (auto optional = o->as<Optional>()) {
            optional->assign(another ? argv[++i] : "newest");
        } else if (auto list = o->as<std::vector<std::string>>()) {
            if (!another) die("option %s needs at least one value", argv[i]);
            while (i + 1 < argc && !is_option(i + 1)) list->push_back(argv[++i]);
        } else {
            bool missing = i + 1 >= argc || (!another && !o->as<std::string>());
            if (missing) die("option %s needs a value: %s", argv[i], o->values);
            option_set(*o, argv[++i]);
        }
    }
}

// A number of steps, or of tokens where a T follows it ("5e12T"), in steps of tokens_per_step
inline double steps_of(const char* option, const Steps& given, double tokens_per_step) {
    char* end;
    double number = strtod(given.c_str(), &end);
    bool tokens = strcmp(end, "T") == 0, whole = number == std::floor(number);
    if (end == given.c_str() || (*end && !tokens) || !(number >= 0 && number <= 1e18) || (!tokens && !whole))
        die("option --%s: '%s' is not a whole number of steps, or of tokens with a T after it (5e12T)", option,
            given.c_str());
    return tokens ? number / tokens_per_step : number;
}
