#!/usr/bin/env python3
"""A picture of a page that `olmoe routing --page` made, as in the README.

    build/venv/bin/python scripts/screenshot_page.py PAGE.html OUT.png [--place layer=2&token=40&expert=5]
        [--theme light|dark] [--width 1280] [--height 800]

--place is what the page's own address keeps. Needs chromium and chromium-driver (make setup-page), and selenium and
Pillow (make venv). At most 256 colours, which keeps a picture of text below 200 kB.
"""
import argparse
import io
import shutil
import sys
from pathlib import Path

try:
    from PIL import Image
    from selenium import webdriver
except ImportError:
    Image = None

MISSING = "needs chromium and chromium-driver (make setup-page), selenium and Pillow (make venv)"


def start():
    """A browser without a window, or None where chromium or its driver is missing. selenium must look for no other:
    that would download one."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Root, and most containers, can't have chromium's sandbox; these pages load nothing from elsewhere.
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))


def set_window(browser, width, height, scheme):
    """Its size in pixels, and whether its reader prefers light or dark"""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                            {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def reduced(picture, n):
    """The picture in its n most frequent colours, each other one as the nearest of them. Pillow's own methods choose a
    palette that gives up the paper's tint or the frame of a token, and map colours coarsely."""
    colours = [colour for _, colour in sorted(picture.getcolors(1 << 24), reverse=True)]
    number = {colour: i for i, colour in enumerate(colours[:n])}
    for colour in colours[n:]:
        nearest = min(colours[:n], key=lambda other: sum((a - b) ** 2 for a, b in zip(colour, other)))
        number[colour] = number[nearest]
    pixels = picture.tobytes()
    out = Image.frombytes("P", picture.size, bytes(map(number.get, zip(*[iter(pixels)] * 3))))
    out.putpalette([part for colour in colours[:n] for part in colour])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--place", default="")
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    options = parser.parse_args()
    if not options.page.is_file():
        sys.exit(f"screenshot_page.py: {options.page}: there is no such file")
    browser = start() if Image else None
    if browser is None:
        sys.exit(f"screenshot_page.py: {MISSING}")
    try:
        set_window(browser, options.width, options.height, options.theme)
        browser.get(options.page.resolve().as_uri() + "#" + options.place)
        browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 500))")
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    finally:
        browser.quit()
    reduced(picture, 256).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
