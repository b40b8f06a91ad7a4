"""The page of `olmoe routing --page` in a real browser: chromium, by its driver and selenium (`make test-page`).

Made-up choices, so that what the page shows can be compared with what is in its data. After each test the browser's log
has no error.
"""
import base64
import io
import json
import os
import subprocess
import sys
import time

import pytest

from routing_pages import NASTY, ROOT, build, made_up, nasty_data

SCRIPT = os.path.join(ROOT, "scripts", "screenshot_page.py")
sys.path.insert(0, os.path.dirname(SCRIPT))
import screenshot_page

try:
    from PIL import Image
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    Image = None                        # each test that needs a browser is skipped


@pytest.fixture(scope="session")
def browser():
    browser = screenshot_page.start() if Image else None
    if browser is None:
        pytest.skip(screenshot_page.MISSING)
    yield browser
    browser.quit()


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("program"))


class Page:
    """A page in the browser, beside the data that it was made from"""

    def __init__(self, browser, path, data):
        self.browser, self.path, self.data = browser, path, data
        self.L, self.E, self.K, self.n = (data[name] for name in ("layers", "experts", "k", "tokens"))
        self.choices = base64.b64decode(data["choices"])
        self.weights = base64.b64decode(data["weights"])
        losses = base64.b64decode(data["losses"])
        self.losses = [losses[2 * p] + 256 * losses[2 * p + 1] for p in range(self.n)]

    def open(self, address="", whole=True):
        self.browser.get("about:blank")
        self.browser.get(self.path.as_uri() + address)
        if whole:
            self.js("views.forEach(build)")             # also what is far from the window
        return self

    def wait(self, condition):
        WebDriverWait(self.browser, 10, 0.05).until(lambda _: condition())

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def token(self, p):
        return self.find(f'.t[data-p="{p}"]')

    def experts(self, p, layer):
        at = (p * self.L + layer) * self.K
        return list(self.choices[at:at + self.K])

    def firsts(self, layer):
        return [self.experts(p, layer)[0] for p in range(self.n)]

    def colours(self):
        """The background of each token"""
        return self.js("return [...document.querySelectorAll('.t')].map(t => getComputedStyle(t).backgroundColor)")

    def at(self):
        """The token that has the keyboard's focus, or None"""
        p = self.js("return document.activeElement.dataset.p")
        return None if p is None else int(p)

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def shown(self):
        """Experts, weights and loss of the token that is shown at the side"""
        rows = self.js("return [...document.querySelectorAll('#choices > div')].map("
                       "row => [Number(row.firstChild.textContent), Number(row.lastChild.textContent)])")
        return [row[0] for row in rows], [row[1] for row in rows], self.text("#glyph div p")

    def shows(self, p, layer):
        experts, weights, loss = self.shown()
        at = (p * self.L + layer) * self.K
        said = "no loss" if self.losses[p] == 65535 else float(loss.split()[1])
        return experts == self.experts(p, layer) \
            and all(abs(w - byte / 255) <= 0.0051 for w, byte in zip(weights, self.weights[at:at + self.K])) \
            and (loss.startswith("no loss") if said == "no loss" else abs(said - self.losses[p] / 1000) <= 0.0051)

    def screenshot(self):
        return Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")


@pytest.fixture
def page(browser, program, tmp_path):
    """Makes a page of data and opens it in a window of a size, with a preference for dark or light."""
    def make(data, address="", width=1280, height=900, scheme="light", whole=True):
        path = tmp_path / "page.html"
        path.write_bytes(subprocess.run([program], input=json.dumps(data).encode(), capture_output=True,
                                        check=True).stdout)
        screenshot_page.set_window(browser, width, height, scheme)
        browser.get_log("browser")
        return Page(browser, path, data).open(address, whole)
    yield make
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


LINES = "It was a day.\nAnd then 1 + 2 = 3, said\n\tthe wolf.\n"


def small(**options):
    return made_up([("story", list(LINES)), ("story", list(LINES)), ("sums", list("1 + 2 = 3\n" * 8))],
                   **{"layers": 3, "experts": 6, "k": 2, **options})


ROUNDED = 0.0501                        # how far a share in % with one digit may be off


def percent(text):
    assert text.endswith(" %")
    return float(text[:-2])


def luminance(rgb):
    linear = [x / 255 / 12.92 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# A colour as a canvas draws it, in bytes of sRGB
PIXELS = """const draw = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const pixel = colour => {
  draw.fillStyle = colour; draw.fillRect(0, 0, 1, 1);
  return [...draw.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
"""


# ------------------------------------------------------------------------------------------------
# What is shown

def test_loads_alone(page):
    p = page(small(title="my/model", of=5000))
    assert p.js("return performance.getEntriesByType('resource').length") == 0
    assert p.text("#title") == "my/model" and "my/model" in p.browser.title
    assert f"{p.n} of 5,000 tokens" in p.text("#about")
    assert p.js("return [...document.querySelectorAll('.x')].map(x => x.textContent)") == \
        [LINES, LINES, "1 + 2 = 3\n" * 8]
    assert "5,000" not in page(small()).text("#about")


def test_pieces_and_documents(page):
    """A token's number counts from where its piece begins, also where a document begins within the piece."""
    data = made_up([("a", list("abcd")), ("a", list("efgh")), ("b", list("ij")), ("b", list("kl"))])
    for section, piece in zip(data["sections"], (6, 7, 7, 8), strict=True):
        section["piece"] = piece
    p = page(data)
    for token, words in {2: "a, piece 6, token 2", 5: "a, piece 7, token 1", 9: "b, piece 7, token 5",
                         10: "b, piece 8, token 0"}.items():
        p.js("show_token(arguments[0])", token)
        assert p.text("#glyph p:last-child") == words
    labels = p.js("return [...document.querySelectorAll('.s h3')].map(h => [...h.children].map(c => c.textContent))")
    assert labels == [["a", "piece 6"], ["piece 7"], ["b", "piece 7"], ["piece 8"]]


def test_slider_changes_colours(page):
    """Tokens have the same colour where their first expert is the same, in one layer and over layers, and else not."""
    p = page(small())
    colour_of, slider = {}, p.find("#layer")
    for layer in range(3):
        colours = p.colours()
        for expert, colour in zip(p.firsts(layer), colours):
            assert colour_of.setdefault(expert, colour) == colour
        slider.send_keys(Keys.ARROW_RIGHT)
    assert len(set(colour_of.values())) == len(colour_of) > 3
    assert p.firsts(0) != p.firsts(2) and p.text("#layer-out") == "2"
    slider.send_keys(Keys.HOME)
    assert [colour_of[expert] for expert in p.firsts(0)] == p.colours()


def test_pointing_at_a_token_shows_its_experts(page):
    p = page(small(k=3))
    for token, layer in ((5, 0), (0, 1), (60, 2)):
        p.js("set_layer(arguments[0])", layer)
        ActionChains(p.browser).move_to_element(p.token(token)).perform()
        p.wait(lambda: p.shows(token, layer))
        assert sorted(p.shown()[1], reverse=True) == p.shown()[1]
    rows = p.js("return [...document.querySelectorAll('#path .row')].map(r => [...r.querySelectorAll('i')].map("
                "i => i.className))")
    assert rows == [[f"e{e}" for e in p.experts(60, layer)] for layer in range(3)]
    ActionChains(p.browser).move_to_element(p.find("h1")).perform()         # away: that of the keyboard again
    p.wait(lambda: p.shows(0, 2))


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_a_chosen_expert_shows_its_tokens(page, by):
    p = page(small())
    expert = p.firsts(0)[0]
    button = p.find(f'#legend [data-e="{expert}"]')
    if by == "mouse":
        button.click()
    else:
        p.token(0).send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "true"
    kinds = p.js("return [...document.querySelectorAll('.t')].map(t => t.className)")
    filled = [i for i, e in enumerate(p.firsts(0)) if e == expert]
    further = [i for i in range(p.n) if expert in p.experts(i, 0)[1:]]
    assert filled and further
    assert [i for i, kind in enumerate(kinds) if kind == f"t e{expert}"] == filled
    assert [i for i, kind in enumerate(kinds) if kind == "t also"] == further
    assert kinds.count("t off") == p.n - len(filled) - len(further) > 0
    seen = {colour for i, colour in enumerate(p.colours()) if i not in filled}
    assert seen == {"rgba(0, 0, 0, 0)"} and p.colours()[filled[0]] not in seen
    details = p.text("#expert")
    assert f"Expert {expert} in layer 0" in details and f"First choice of {len(filled)} tokens" in details
    rows = p.js("return [...document.querySelectorAll('.share')].map(r => [r.firstChild.textContent, "
                "r.lastChild.textContent])")
    assert [name for name, _ in rows] == [domain["name"] for domain in p.data["domains"]]
    assert [percent(share) for _, share in rows] == pytest.approx(
        [100 * domain["counts"][0][expert] / domain["tokens"] for domain in p.data["domains"]], abs=ROUNDED)
    words = p.js("return [...document.querySelectorAll('#words li')].map(li => li.textContent)")
    signs = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    assert words == [f"{signs.get(word['text'], word['text'])} {100 * word['share']:.0f} % of {word['count']}"
                     for word in p.data["top"][0][expert]]
    p.find("#next").click()
    assert p.at() == filled[1]
    p.press("p", "p")
    assert p.at() == filled[-1]
    if by == "mouse":
        p.find("#clear").click()
    else:
        p.press(Keys.ESCAPE)
    assert button.get_attribute("aria-pressed") == "false" and not p.find("#filter").is_displayed()
    assert p.js("return document.querySelectorAll('.off, .also').length") == 0


def test_load_by_domain(page):
    data = small()
    p = page(data)
    for layer in (0, 2):
        p.js("set_layer(arguments[0])", layer)
        bars = p.js("""return [...document.querySelectorAll('.bars')].map(bars => [
            bars.querySelector('b').getBoundingClientRect().bottom, bars.getBoundingClientRect().bottom,
            bars.clientHeight, ...[...bars.querySelectorAll('a i')].map(i => i.getBoundingClientRect().height)]);""")
        shares = [[n / d["tokens"] for n in d["counts"][layer]] for d in data["domains"]]
        most = max(2 * p.K / p.E, *(x for row in shares for x in row))
        for (even, bottom, box, *heights), row in zip(bars, shares, strict=True):
            assert heights == pytest.approx([box * x / most for x in row], abs=0.6)
            assert bottom - even == pytest.approx(box * p.K / p.E / most, abs=2)        # its border, the line's width
        assert f"{p.K}/{p.E} = {100 * p.K / p.E:.1f} %" in p.text("#load-note")
        said = "return [...document.querySelectorAll('.load p > span:last-child')].map(span => span.textContent)"
        for row, words in zip(shares, p.js(said), strict=True):
            most_of = row.index(max(row))
            assert words.startswith(f"most: expert {most_of}, ") and percent(words.split(", ")[1]) == \
                pytest.approx(100 * row[most_of], abs=ROUNDED)
        ActionChains(p.browser).move_to_element(p.find('.bars [data-e="3"]')).perform()
        for row, words in zip(shares, p.js(said), strict=True):
            assert words.startswith("expert 3: ") and percent(words[10:]) == pytest.approx(100 * row[3], abs=ROUNDED)
        ActionChains(p.browser).move_to_element(p.find("h1")).perform()
    p.find("#load-numbers summary").click()
    p.wait(lambda: p.find("#load-table table").is_displayed())
    table = p.js("return [...document.querySelectorAll('#load-table tbody tr')].map(r => [...r.cells].map("
                 "c => c.textContent))")
    assert [row[0] for row in table] == [str(e) for e in range(p.E)]
    for e, (_, *cells) in enumerate(table):
        assert [percent(cell) for cell in cells] == pytest.approx([100 * row[e] for row in shares], abs=ROUNDED)


def test_layers_in_numbers(page):
    data = small()
    data["router"]["entropy"][1] = None                 # JSON has no NaN
    data["router"]["dead"][2] = 4
    p = page(data)
    table = p.js("return [...document.querySelectorAll('#layer-table tbody tr')].map(r => [...r.cells].map("
                 "c => c.textContent))")
    router, saturation = data["router"], data["saturation"]
    for layer, row in enumerate(table):
        assert row[1] == ("–" if layer == 1 else f"{router['entropy'][layer]:.2f}")
        assert row[2] == f"{router['max_over_mean'][layer]:.2f}" and row[3] == str(router["dead"][layer])
        assert [percent(x) for x in row[4:]] == pytest.approx(
            [100 * saturation[name][layer] for name in ("top1", "topk")], abs=ROUNDED)
    p.find('#layer-table [data-layer="2"]').click()
    assert p.text("#layer-out") == "2" and p.find("#layer").get_attribute("value") == "2"
    assert "saturation" not in page({**data, "saturation": None}).text("#layers")


def test_numbers_below_the_tokens(page):
    p = page(small())
    p.find("#numbers").click()
    for layer in (0, 1):
        p.js("set_layer(arguments[0])", layer)
        assert p.js("return [...document.querySelectorAll('.t')].map(t => Number(t.dataset.n))") == p.firsts(layer)
    assert p.js("return getComputedStyle(document.querySelector('.t'), '::after').content") == f'"{p.firsts(1)[0]}"'


# ------------------------------------------------------------------------------------------------
# Without a mouse

def test_keys(page):
    p = page(small())
    stops = []
    while p.at() is None and len(stops) < 40:
        p.press(Keys.TAB)
        stops.append(p.js("const a = document.activeElement; return a.id || a.dataset.e || a.tagName"))
    assert p.at() == 0 and {"theme", "layer", "numbers", "0"} <= set(stops), stops
    assert p.shows(0, 0)
    p.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert p.at() == 2 and p.shows(2, 0)
    said = p.text("#status")
    for expert in p.experts(2, 0):
        assert f"{expert} (" in said
    assert said.startswith("token ␣, layer 0, experts")
    p.press(Keys.ARROW_DOWN)
    assert p.at() == LINES.index("And") + 2
    p.press(Keys.ARROW_UP)
    assert p.at() == 2
    p.press(Keys.END)
    assert p.at() == len(LINES) - 1
    p.press(Keys.ARROW_RIGHT)
    assert p.at() == len(LINES)                         # the next piece
    p.press(Keys.END, Keys.HOME)
    assert p.at() == len(LINES)
    p.press("]", "]", "]", "[", "-", "+")
    assert p.text("#layer-out") == "1" and p.shows(len(LINES), 1) and "layer 1" in p.text("#status")
    p.press(Keys.ENTER, "n")
    expert = p.firsts(1)[len(LINES)]
    assert p.at() == p.firsts(1).index(expert, len(LINES) + 1)
    p.press(Keys.ESCAPE)
    assert not p.find("#filter").is_displayed()
    # One stop for all tokens, whose experts are read when it is reached
    p.press(Keys.TAB)
    assert p.at() is None
    p.js("document.querySelector('#status').textContent = ''; document.activeElement.blur()")
    p.press(Keys.SHIFT + Keys.TAB)
    assert p.at() == p.js("return state.at") and p.text("#status") == p.js("return sentence(state.at)")
    p.js("document.querySelector('#legend button').focus()")
    p.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    assert p.js("return document.activeElement.dataset.e") == "2" and "Expert 2" in p.text("#filter-text")


def test_controls_have_names(page):
    p = page(small())
    p.find("#legend button").click()
    controls = p.browser.find_elements(By.CSS_SELECTOR, "button, input, main")
    assert len(controls) > 10
    for control in controls:
        assert control.accessible_name, control.get_attribute("outerHTML")
    assert p.find("#layer").accessible_name.startswith("Layer")
    assert p.find('#choices button').accessible_name == f"expert {p.firsts(0)[0]}"


def test_the_address_keeps_the_place(page):
    p = page(small(), "#layer=2&token=70&expert=1&theme=dark")
    assert p.at() == 70 and p.text("#layer-out") == "2" and "Expert 1" in p.text("#filter-text")
    assert p.js("return document.documentElement.dataset.theme") == "dark"
    p.press("[", Keys.ARROW_RIGHT)
    p.wait(lambda: p.js("return location.hash") == "#layer=1&token=71&expert=1&theme=dark")
    for wrong in ("#layer=3&token=999&expert=6", "#layer=-1&token=1e1&expert=x&theme=<b>", "#%", "#layer"):
        p.open(wrong)
        assert p.text("#layer-out") == "0" and p.js("return state.at") == 0 and not p.find("#filter").is_displayed()


# ------------------------------------------------------------------------------------------------
# Colours

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(page, scheme):
    """Text on each of 256 colours, and what is soft or not chosen, in both themes"""
    p = page(small(experts=256, k=4), scheme=scheme)
    pairs = p.js(PIXELS + """
        const out = [], body = getComputedStyle(document.body).backgroundColor, pair = (a, b) => [pixel(a), pixel(b)];
        for (let e = 0; e < E; e++) {
          const span = make('span', 't e' + e, 'x');
          document.querySelector('.x').append(span);
          out.push(pair(getComputedStyle(span).color, getComputedStyle(span).backgroundColor));
          span.remove();
        }
        const off = make('span', 't off', 'x');
        document.querySelector('.x').append(off);
        out.push(pair(getComputedStyle(document.querySelector('#about')).color, body));
        out.push(pair(getComputedStyle(off).color, body));
        off.remove();
        return out;""")
    ratios = [contrast(*pair) for pair in pairs]
    assert min(ratios[:-1]) >= 4.5 and ratios[-1] >= 3           # WCAG 2: text, and large or inactive text
    assert len({tuple(below) for _, below in pairs[:64]}) == 64
    assert (luminance(pairs[-1][1]) < 0.05) == (scheme == "dark")


def test_switch_of_themes(page):
    p = page(small(), scheme="dark")
    background = "return getComputedStyle(document.body).backgroundColor"
    dark, dark_tokens = p.js(background), p.colours()
    assert p.find("#theme").text == "Light"
    p.find("#theme").click()
    light, light_tokens = p.js(background), p.colours()
    assert light != dark and all(a != b for a, b in zip(dark_tokens, light_tokens))
    p.find("#theme").click()
    assert p.js(background) == dark and p.colours() == dark_tokens
    assert page(small(), scheme="light").js(background) == light


def test_screenshot_is_not_blank(page):
    """The pixels have the colours that the styles name, and those of the text change with the layer."""
    p = page(small())
    shots = []
    for layer in range(2):
        p.js("set_layer(arguments[0])", layer)
        p.js("document.activeElement.blur()")
        shots.append(p.screenshot())
        places = p.js(PIXELS + """
            return [...document.querySelectorAll('.t')].slice(0, 40).filter(t => t.textContent === ' ').map(t => {
              const r = t.getClientRects()[0];
              return [r.left + r.width / 2, r.top + r.height / 2, pixel(getComputedStyle(t).backgroundColor)];
            });""")
        assert len(places) > 5
        for x, y, colour in places:
            assert max(abs(a - b) for a, b in zip(shots[-1].getpixel((int(x), int(y))), colour)) <= 2
    counts = shots[0].getcolors(1 << 24)
    assert len(counts) > 50 and max(n for n, _ in counts) < 0.97 * shots[0].width * shots[0].height
    assert shots[0].tobytes() != shots[1].tobytes()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_picture_of_a_page(page, theme, tmp_path):
    p, out = page(small()), tmp_path / "page.png"
    subprocess.run([sys.executable, SCRIPT, p.path, out, "--place", "layer=1&token=5", "--theme", theme,
                    "--width", "900", "--height", "600"], check=True)
    picture = Image.open(out).convert("RGB")
    assert picture.size == (900, 600) and out.stat().st_size < 200_000
    assert len(picture.getcolors()) > 50
    p.js("set_theme(arguments[0])", theme)
    paper = p.js(PIXELS + "return pixel(getComputedStyle(document.body).backgroundColor)")
    assert list(picture.getpixel((2, 2))) == paper and (luminance(paper) < 0.05) == (theme == "dark")


def test_picture_of_nothing(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "none.html", tmp_path / "out.png"], capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "none.html" in done.stderr


# ------------------------------------------------------------------------------------------------
# Texts that would do harm, shapes, size

def signs(text):
    """What the page shows of a text: line breaks and tabs as they are, signs for what else can't be seen"""
    out = ""
    for c in text:
        if c in "\n\t":
            out += c
        elif c < " ":
            out += chr(0x2400 + ord(c))
        elif c == "\x7f":
            out += "␡"
        elif c in "\x85\u2028\u2029\u202e\u200b\ufeff":
            out += f"[U+{ord(c):04X}]"
        else:
            out += c
    return out


def test_nasty_texts_and_names_do_no_harm(page):
    data = nasty_data()
    data["shown"] = [[0, "</script><script>hacked=1</script>"], [4, "é"]]
    p = page(data)
    for e in range(4):                                  # each expert's words, too
        p.js("choose(arguments[0])", e)
    p.find("#load-numbers summary").click()
    texts = p.js("return [...document.querySelectorAll('.t')].map(t => t.textContent)")
    expected = [text for _ in p.data["domains"] for text in NASTY * 12]
    expected[0], expected[4] = data["shown"][0][1], "é"
    assert texts == [signs(text) for text in expected]
    for token in (0, 4):                                # what takes the place of a text does so at the side, too
        p.js("show_token(arguments[0])", token)
        assert p.text("#glyph b") == expected[token] and expected[token] in p.text("#now")
    line = {"\n\t": "⏎⇥", " ": "␣", "": "·"}
    names = p.js("return [...document.querySelectorAll('.s h3 b')].map(b => b.textContent)")
    assert names == [line.get(name, signs(name)) for name in NASTY]
    assert p.js("return document.querySelector('#title').textContent") == \
        signs(data["title"]).replace("\n", "⏎").replace("\t", "⇥")
    assert p.js("return typeof window.hacked") == "undefined"
    assert p.js("return document.querySelectorAll('script').length") == 2
    assert p.js("return document.querySelectorAll('img, iframe, object, embed, form, a[href]').length") == 0
    assert p.js("return [...document.querySelectorAll('aside, main')].every(n => n.scrollWidth <= n.clientWidth + 1)")


def test_signs_are_beside_what_they_stand_for(page):
    p = page(made_up([("d", ["a\n", "\t", "", "\0", "b"])]))
    marks = p.js("return [...document.querySelectorAll('.t i')].map(i => [i.dataset.c || '', i.textContent])")
    assert marks == [["⏎", "\n"], ["⇥", "\t"], ["·", ""], ["", "␀"]]
    tops = p.js("return [...document.querySelectorAll('.t')].map(t => t.getClientRects()[0].top)")
    assert tops[1] > tops[0] + 10 and len(set(tops[1:])) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 256, 8), (16, 64, 8), (2, 3, 3)])
@pytest.mark.parametrize("width", [360, 820, 1440])
def test_shapes_and_windows(page, shape, width):
    """Nothing is wider than the window; in a narrow one the token's experts are at its foot."""
    layers, experts, k = shape
    long = ["the", " " * 30, "x" * 300] + list(LINES) * 2
    p = page(made_up([("a rather long name of a domain", long), ("b", long)], layers, experts, k,
                     title="a/very/long/path/" * 8), width=width, height=800)
    p.js("choose(arguments[0])", experts - 1)
    assert p.js("return document.documentElement.scrollWidth") <= width
    p.js("span_of(4).scrollIntoView({block: 'center'})")
    p.token(4).click()
    assert p.at() == 4 and p.shows(4, 0)
    foot = p.find("#now")
    assert foot.is_displayed() == (width < 960)
    if foot.is_displayed():
        assert all(f"{e} (" in foot.text for e in p.experts(4, 0))


def test_tokens_without_a_tokenizer(page):
    p = page(made_up([("d", [f"#{i % 40}" for i in range(400)])]))
    rects = p.js("return [...document.querySelectorAll('.t')].map(t => t.getClientRects().length)")
    assert rects == [1] * 400                           # none is broken over two lines
    assert p.js("return document.documentElement.scrollWidth") <= 1280


def test_twenty_thousand_tokens(page):
    """The shape of the default run: quick to open, and to colour anew"""
    text = list("Once upon a time there was a wolf. 12 + 30 = 42\n" * 5 + "It was grey.\n")[:250]
    p = page(made_up([("story", text)] * 40 + [("sums", text)] * 40, layers=4, experts=16, k=2), whole=False)
    assert p.n == 20_000 and p.path.stat().st_size < 2_000_000
    p.wait(lambda: p.js("return document.querySelectorAll('.t').length") > 500)
    for y in range(0, p.js("return document.body.scrollHeight"), 800):
        p.js("window.scrollTo(0, arguments[0])", y)
        time.sleep(0.02)
    p.wait(lambda: p.js("return document.querySelectorAll('.t').length") == p.n)
    assert "".join(p.js("return [...document.querySelectorAll('.x')].map(x => x.textContent)")) == "".join(text * 80)
    times = p.js("""const slider = document.getElementById('layer'), times = [];
        for (let i = 0; i < 8; i++) {
          const start = performance.now();
          slider.value = i % 4;
          slider.dispatchEvent(new Event('input'));
          document.body.offsetHeight;                   // styles and layout, not only the calls
          times.push(performance.now() - start);
        }
        return times;""")
    print("a change of layer, ms:", *(f"{x:.0f}" for x in times))
    assert sorted(times)[len(times) // 2] < 100
    p.js("set_layer(1); window.scrollTo(0, 0)")         # what was far is coloured when it comes near
    first, colour = p.firsts(1), {}
    p.wait(lambda: not p.js("return views[0].stale"))
    for expert, seen in zip(first[:250], p.colours()[:250]):
        assert colour.setdefault(expert, seen) == seen
    assert len(set(colour.values())) == len(colour) > 4
