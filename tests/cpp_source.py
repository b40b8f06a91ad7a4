"""Reads C++ and CUDA well enough for rules of style: where functions begin and end, and what they declare.

It is no parser. Comments, texts and directives are blanked first; then each { is what the words before it say.
"""
import re
from collections import namedtuple

TEXTS = re.compile(r"""//(?:\\.|[^\n])*|/\*.*?\*/
                       |(?<!\w)(?:u8|u|U|L)?R"([^\s()\\"]{0,16})\(.*?\)\1"
                       |"(?:\\.|[^"\\\n])*"
                       |(?<!\w)(?:u8|u|U|L)?'(?:\\.|[^'\\\n])+'""", re.S | re.X)


def blank(source):
    """The source without comments, without what is in quotes and without directives. Places and lines stay."""
    def spaces(text):
        return re.sub(r"[^\n]", " ", text)

    def blanked(match):
        if match[0].startswith("/"):
            return spaces(match[0])
        quote = match[0][-1]
        first = match[0].index(quote)
        return spaces(match[0][:first]) + quote + spaces(match[0][first + 1:-1]) + quote

    code = TEXTS.sub(blanked, source)
    return re.sub(r"^[ \t]*#(?:\\\n|[^\n])*", lambda m: spaces(m[0]), code, flags=re.M)


def without_parentheses(text):
    """The text without what is in parentheses, whose places stay empty: f()."""
    depth, out = 0, []
    for c in text:
        depth -= c == ")"
        if depth == 0:
            out.append(c)
        depth += c == "("
    return "".join(out)


def after_pair(text, at, pair):
    """The place after the bracket that closes the one at a place, or None. A < or > in parentheses is no bracket."""
    depth = parentheses = 0
    for i in range(at, len(text)):
        if parentheses == 0 or pair == "()":
            depth += (text[i] == pair[0]) - (text[i] == pair[1])
        parentheses += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return None


CONTROL = re.compile(r"\s*(else|do|try|case\b[^:]*:(?!:)|default\s*:|(?:if|for|while|switch|catch)\b[^(]*(\())")


def after_control(head):
    """What is left of a statement after if (...), else and the like."""
    while True:
        match = CONTROL.match(head)
        if not match:
            return head.strip()
        end = after_pair(head, match.start(2), "()") if match[2] else match.end()
        if end is None:
            return head.strip()
        head = head[end:]


def after_template(head):
    """Where a declaration begins after template <...>."""
    at = 0
    while match := re.compile(r"\s*template\s*<").match(head, at):
        at = after_pair(head, match.end() - 1, "<>") or len(head)
    return at


NO_FUNCTION = {"__attribute__", "__launch_bounds__", "alignas", "decltype", "noexcept", "requires", "explicit"}
AFTER_PARAMETERS = re.compile(r"\s*(?:const\b|noexcept\b|override\b|final\b|__attribute__|requires\b|->|&|:|$)")
CALLED = re.compile(r"(operator\s*(?:\(\s*\)|[^\s\w(]+|[\w:]+(?:\s*[*&]+)?)|~?\w+(?:::~?\w+)*)\s*\(")


def function_of(head):
    """The name of the function that a head defines, and where its parameters begin; or None."""
    at = after_template(head)
    plain = re.sub(r"operator\s*[^\s\w(]+", "operator", without_parentheses(head[at:]))
    if "(" not in plain or "=" in plain:
        return None
    for match in CALLED.finditer(head, at):
        if match[1] not in NO_FUNCTION:
            end = after_pair(head, match.end() - 1, "()")
            return (re.sub(r"\s+", " ", match[1]), match.end() - 1) if AFTER_PARAMETERS.match(head, end) else None
    return None


# What a pair of braces encloses. kind: namespace, class (also struct, union, enum), function, block (of if, for, ...),
# braces (values, or a lambda). begin: where the statement of { begins. parameters: the place of a function's (
Scope = namedtuple("Scope", "kind name begin open close parameters outer")


def classify(head, outer, in_parentheses):
    """Kind, name and place of the parameters of what begins after a head."""
    if in_parentheses:
        return "braces", "", None
    if re.match(r"\s*(inline\s+)?namespace\b|\s*extern\s*\"\s*\"\s*$", head):
        return "namespace", "", None
    rest = after_control(head)
    inside = outer is not None and outer.kind not in ("namespace", "class")
    if inside and rest == "":
        return "block", "", None
    plain = re.sub(r"\b(alignas|__attribute__|__align__)\s*\(\)", "", without_parentheses(rest[after_template(rest):]))
    match = re.match(r"\s*(?:(?:typedef|static|const|constexpr|inline)\s+)*(?:struct|class|union|enum(?:\s+class)?)\b"
                     r"\s*(?:\[\[.*?\]\]\s*)?(\w*)", plain)
    if match and "=" not in plain and "(" not in plain:
        return "class", match[1], None
    function = None if inside else function_of(head)
    if not function:
        return "braces", "", None
    # A(int n) : member{n} { ... }: the first pair of braces is no body
    if re.search(r"\)\s*(noexcept\s*)?:(?!:)", without_parentheses(head)) and re.search(r"[\w>]\s*$", head):
        return "braces", "", None
    return "function", *function


def scopes(source):
    """All pairs of braces, inner ones after the ones around them. ValueError where braces do not match."""
    code, found, stack = blank(source), [], []
    begin = parentheses = 0
    for match in re.finditer(r"[(){};]|\b(?:public|private|protected)\s*:", code):
        at, c = match.start(), match[0]
        if c == "(":
            parentheses += 1
        elif c == ")":
            parentheses -= 1
        elif c == "{":
            outer = stack[-1][0] if stack else None
            kind, name, parameters = classify(code[begin:at], outer, parentheses > 0)
            spaces = len(code[begin:at]) - len(code[begin:at].lstrip())
            place = begin + parameters if parameters is not None else None
            scope = Scope(kind, name, begin + spaces, at, None, place, outer)
            stack.append((scope, len(found), begin, parentheses))
            found.append(scope)
            begin, parentheses = at + 1, 0
        elif c == "}":
            if not stack or parentheses != 0:
                raise ValueError(f"line {code.count(chr(10), 0, at) + 1}: a }} without its {{")
            scope, index, before, parentheses = stack.pop()
            found[index] = scope._replace(close=at)
            begin = before if scope.kind == "braces" else at + 1
        elif parentheses == 0:
            begin = match.end()
    if stack:
        raise ValueError(f"line {code.count(chr(10), 0, stack[-1][0].open) + 1}: a {{ without its }}")
    return found


def around(scope):
    """The scopes around one, the nearest first."""
    while scope := scope.outer:
        yield scope


Function = namedtuple("Function", "name line lines member")


def functions(source):
    """Functions and member functions, by name, first line, number of lines, and whether they belong to a class.
    What is inside a function is a part of it."""
    found = []
    for scope in scopes(source):
        outer = list(around(scope))
        if scope.kind != "function" or any(o.kind not in ("namespace", "class") for o in outer):
            continue
        classes = [o.name for o in reversed(outer) if o.kind == "class"]
        first, last = (source.count("\n", 0, at) + 1 for at in (scope.begin, scope.close))
        found.append(Function("::".join([*classes, scope.name]), first, last - first + 1, bool(classes)))
    return found


# ------------------------------------------------------------------------------------------------
# Declarations

ARGUMENTS = ("<", ">", ",", "*", "&", "&&", "::", "(", ")", "[", "]", "...")
NO_TYPE = set("return else do case default throw new delete goto using namespace typedef sizeof operator if for while "
              "switch catch try break continue template public private protected static_assert this".split())
SPECIFIERS = set("const constexpr static inline thread_local volatile extern register mutable typename struct class "
                 "enum union __shared__ __constant__ __restrict__".split())
BUILT_IN = set("unsigned signed long short int char double float bool".split())


class Tokens:
    """The words and signs of a source, and the declarations among them."""

    def __init__(self, source):
        self.code = blank(source)
        found = list(re.finditer(r"\w+|::|->|&&|\|\||\.\.\.|[=!<>+\-*/%&|^]=|\S", self.code))
        self.text = [match[0] for match in found] + [""] * 4
        self.at = [match.start() for match in found] + [len(self.code)] * 4

    def word(self, i):
        return re.match(r"[A-Za-z_]", self.text[i]) is not None

    def closing(self, i, pair):
        """The index of what closes the bracket at an index."""
        depth = 0
        for j in range(i, len(self.text)):
            depth += (self.text[j] == pair[0]) - (self.text[j] == pair[1])
            if depth == 0:
                return j
        return len(self.text) - 4

    def after_type(self, i):
        """The index after a type that begins at an index, or None."""
        while self.text[i] == "[" and self.text[i + 1] == "[":
            i = self.closing(i, "[]") + 1
        while self.text[i] in SPECIFIERS:
            i += 1
        i += self.text[i] == "::"
        if not self.word(i) or self.text[i] in NO_TYPE:
            return None
        if self.text[i] in BUILT_IN:
            while self.text[i] in BUILT_IN:
                i += 1
        else:
            i += 1
            while True:
                if self.text[i] == "<":
                    i = self.after_arguments(i)
                    if i is None:
                        return None
                elif self.text[i] == "::" and self.word(i + 1):
                    i += 2
                else:
                    break
        while self.text[i] in ("const", "*", "&", "&&", "__restrict__", "..."):
            i += 1
        return i

    def after_arguments(self, i):
        """The index after <...>, or None where it is a comparison."""
        depth = 0
        while True:
            depth += (self.text[i] == "<") - (self.text[i] == ">")
            if not self.word(i) and not self.text[i].isdigit() and self.text[i] not in ARGUMENTS:
                return None
            i += 1
            if depth == 0:
                return i

    def declared(self, i, after):
        """The indices of the names that a declaration at an index declares; [] where it is none. `after` holds what may
        come after a name."""
        i = self.after_type(i)
        if i is None:
            return []
        if self.text[i] == "[":                                 # auto [a, b]
            end = self.closing(i, "[]")
            return [j for j in range(i, end) if self.word(j)] if self.text[i - 1] in ("auto", "&", "&&") else []
        if not self.word(i) or self.text[i] in NO_TYPE or self.text[i + 1] not in after:
            return []
        names, depth = [i], 0
        for j in range(i + 1, len(self.text) - 4):
            depth += (self.text[j] in ("(", "[", "{")) - (self.text[j] in (")", "]", "}"))
            if depth < 0 or (depth == 0 and self.text[j] in (";", ":")):
                break
            if depth == 0 and self.text[j] == ",":
                while self.text[j + 1] in ("*", "&", "&&"):
                    j += 1
                if self.word(j + 1) and self.text[j + 2] in after:
                    names.append(j + 1)
        return names

    def parameters(self, i):
        """The indices of the names of the parameters in the parentheses that open at an index."""
        names, end, depth = [], self.closing(i, "()"), 0
        for j in range(i, end):
            if depth == (j > i) and self.text[j] in ("(", ","):
                after = self.after_type(j + 1)
                if after and self.word(after) and self.text[after + 1] in (",", ")", "=", "["):
                    names.append(after)
            depth += (self.text[j] in ("(", "[", "{")) - (self.text[j] in (")", "]", "}"))
        return names

    def lambda_parameters(self, i):
        """Those of the lambda whose [ is at an index; [] where it is an index into an array."""
        before = self.text[i - 1] if i else ""
        if (re.match(r"[\w\])\"]", before) and before != "return") or before == "[" or self.text[i + 1] == "[":
            return []
        end = self.closing(i, "[]")
        return self.parameters(end + 1) if self.text[end + 1] == "(" else []


STATEMENT = ("=", ";", ",", "(", "{", "[")
IN_PARENTHESES = {"for": ("=", ":", ",", ";", "{"), "catch": (")",), "if": ("=", "{"), "while": ("=", "{"),
                  "switch": ("=", "{")}


def declarations(source):
    """(name, line) of the parameters of functions and lambdas and of the variables that are local to functions."""
    tokens = Tokens(source)
    text = tokens.text
    found = scopes(source)
    scope_at = {scope.open: scope for scope in found}
    parameters_at = {scope.parameters for scope in found if scope.kind == "function"}
    names, stack, start = set(), [], False
    for i, at in enumerate(tokens.at[:-4]):
        if at in parameters_at:
            names.update(tokens.parameters(i))
        if text[i] == "{":
            stack.append(scope_at[at])
        elif text[i] == "}":
            stack.pop()
        inside = bool(stack) and stack[-1].kind not in ("class", "namespace")
        inside = inside and any(scope.kind == "function" for scope in stack)
        if inside and start:
            names.update(tokens.declared(i, STATEMENT))
        if inside and text[i] == "(":
            control = text[i - 2] if text[i - 1] == "constexpr" else text[i - 1]
            names.update(tokens.declared(i + 1, IN_PARENTHESES.get(control, ())))
        if inside and text[i] == "[":
            names.update(tokens.lambda_parameters(i))
        in_label = start == "label" and text[i] != ":"
        start = "label" if in_label or text[i] in ("case", "default") else (
            text[i] in (";", "{", "}", "else", "do") or (start == "label" and text[i] == ":"))
    return [(text[i], tokens.code.count("\n", 0, tokens.at[i]) + 1) for i in sorted(names)]
