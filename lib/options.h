// Command-line options: one table parses them, checks them, and prints --help, so that these can't differ.
#pragma once
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <variant>
#include <vector>

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
void print_check();         // ends the program if something that it printed was not written

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
    printf("--name=VALUE is --name VALUE, also where VALUE reads like an option\n");
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

// The option that an argument names, as --name or --name=VALUE, or null. *value: what follows the =, or null.
inline const Option* option_named(const std::vector<Option>& options, const char* arg, const char** value) {
    if (strncmp(arg, "--", 2) != 0) return nullptr;
    const char* end = strchr(arg, '=');
    const std::string name = end ? std::string(arg + 2, end) : std::string(arg + 2);
    *value = end ? end + 1 : nullptr;
    for (const Option& o : options) if (name == o.name) return &o;
    return nullptr;
}

// --word: if no option has this name, it is a mistyped one rather than a text.
inline bool option_spelling(const char* arg) {
    if (strncmp(arg, "--", 2) != 0 || !isalpha((unsigned char)arg[2])) return false;
    for (arg += 2; *arg && *arg != '='; arg++) if (!isalnum((unsigned char)*arg) && *arg != '-') return false;
    return true;
}

// How a text is given to option o that reads like an option, or nothing where o takes no texts
inline std::string text_after_equals(const Option& o, const char* arg) {
    const bool texts = o.as<std::string>() || o.as<std::vector<std::string>>();
    return texts ? std::string("; as a value: --") + o.name + "=" + arg : "";
}

// Gives option o its values: `value`, if it came with a =, else what follows argv[i]. A value is what is no option's
// name, so it may begin with dashes; where it may be left out, or others come before it, it is not --word either.
// Returns the last argument that was used.
inline int option_take(const Option& o, const char* value, int argc, char** argv, int i,
                       const std::vector<Option>& options) {
    auto is_value = [&](int at) {
        const char* unused;
        return at < argc && strcmp(argv[at], "--help") != 0 && !option_named(options, argv[at], &unused);
    };
    if (auto flag = o.as<bool>()) {
        if (value) die("option --%s takes no value", o.name);
        *flag = true;
    } else if (auto optional = o.as<Optional>()) {
        if (!value && is_value(i + 1) && !option_spelling(argv[i + 1])) value = argv[++i];
        optional->assign(value ? value : "newest");
    } else {
        auto list = o.as<std::vector<std::string>>();
        const bool attached = value;
        if (!attached && !is_value(i + 1))
            die("option --%s needs %s: %s%s", o.name, list ? "at least one value" : "a value", o.values,
                i + 1 < argc ? text_after_equals(o, argv[i + 1]).c_str() : "");
        if (!attached) value = argv[++i];
        if (list) list->push_back(value);
        else option_set(o, value);
        if (!list || attached) return i;
        for (; is_value(i + 1); list->push_back(argv[++i]))
            if (option_spelling(argv[i + 1]))
                die("unknown option '%s'; see olmoe %s --help%s", argv[i + 1], argv[1],
                    text_after_equals(o, argv[i + 1]).c_str());
    }
    return i;
}

// Fills the values of `options` from the arguments after the command. `rest` takes what belongs to no option, and all
// that follows --, or is null.
inline void options_parse(int argc, char** argv, const char* usage, const std::vector<Option>& options,
                          std::vector<std::string>* rest = nullptr) {
    for (int i = 2; i < argc; i++) {
        const std::string arg = argv[i];
        const char* value = nullptr;
        if (arg == "--help" || arg == "-h") { options_help(usage, options); print_check(); exit(0); }
        if (rest && arg == "--") { rest->insert(rest->end(), argv + i + 1, argv + argc); return; }
        if (const Option* o = option_named(options, argv[i], &value)) {
            i = option_take(*o, value, argc, argv, i, options);
            continue;
        }
        if (arg.compare(0, 2, "--") == 0) die("unknown option '%s'; see olmoe %s --help", argv[i], argv[1]);
        if (!rest) die("unexpected argument '%s'; see olmoe %s --help", argv[i], argv[1]);
        rest->push_back(arg);
    }
}

// A number of steps, or of tokens where a T follows it ("5e12T"), in steps of tokens_per_step
inline double steps_of(const char* option, const Steps& given, double tokens_per_step, bool fractions = false) {
    char* end;
    double number = strtod(given.c_str(), &end);
    bool tokens = strcmp(end, "T") == 0, whole = fractions || number == std::floor(number);
    if (end == given.c_str() || (*end && !tokens) || !(number >= 0 && number <= 1e18) || (!tokens && !whole))
        die("option --%s: '%s' is not a %s of steps, or of tokens with a T after it (5e12T)", option,
            given.c_str(), fractions ? "number" : "whole number");
    return tokens ? number / tokens_per_step : number;
}
