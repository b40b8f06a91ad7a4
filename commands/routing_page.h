// The page of `olmoe routing --page`: one HTML file in which a reader looks through a text, token by token, with the
// experts that each layer chose.
//
// The file needs nothing else: no network, no framework. Its data is one JSON object in a script element that is not
// run; the program of the page puts what it finds there into text nodes only. What can be seen can also be read: each
// expert has its number beside its colour, and each chart has its numbers as text or as a table.
//
// Used by commands/routing.h.
#pragma once
#include <string>
#include "../lib/files.h"

// @DATA@ is where the data goes.
static const char routing_page_template[] = R"html(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
  script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>What the experts learn</title>
<style>
:root {
  color-scheme: light dark;
  --paper: light-dark(#fbfaf7, #141619);
  --panel: light-dark(#ffffff, #1a1d21);
  --ink: light-dark(#24221e, #e9e6e0);
  --soft: light-dark(#69655d, #a09c94);
  --line: light-dark(#e6e2d9, #2d3136);
  --track: light-dark(#f1eee7, #24282d);
  --focus: light-dark(#1d4ed8, #93b4ff);
  --sans: Inter, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", "URW Palladio L", Georgia, serif;
  --mono: ui-monospace, "SF Mono", "JetBrains Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --bar: 3.5rem;
}
* { box-sizing: border-box; }
html { scroll-padding-top: calc(var(--bar) + 1rem); -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 0.875rem/1.5 var(--sans); }
h1, h2, h3, p, ol, ul { margin: 0; padding: 0; font-weight: inherit; }
button, input { font: inherit; color: inherit; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.soft { color: var(--soft); }
.number { font-variant-numeric: tabular-nums; }
[hidden] { display: none !important; }

/* Heading and bar */
header, #bar, #page { padding-inline: max(1.5rem, (100vw - 82rem) / 2); }
header { display: flex; gap: 2rem; align-items: end; justify-content: space-between; padding-block: 2.25rem 1.25rem; }
h1 { font: 2rem/1.2 var(--serif); letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p { margin-top: 0.5rem; }
#title { font: 0.8125rem var(--mono); overflow-wrap: anywhere; margin-right: 1em; }
#about { color: var(--soft); }
#bar { position: sticky; top: 0; z-index: 2; min-height: var(--bar); display: flex; flex-wrap: wrap;
  gap: 0.4rem 1.75rem;
  align-items: center; padding-block: 0.5rem; background: var(--paper); border-block: 1px solid var(--line); }
#bar label { display: flex; gap: 0.6rem; align-items: center; }
#layer { width: clamp(8rem, 22vw, 20rem); accent-color: var(--ink); margin: 0; }
#layer-out { min-width: 1.5em; font-size: 1rem; font-weight: 600; font-variant-numeric: tabular-nums; }
#numbers { accent-color: var(--ink); margin: 0; }
#filter { display: flex; gap: 0.5rem; align-items: center; margin-left: auto; }
.plain { background: none; border: 1px solid var(--line); border-radius: 6px; padding: 0.2rem 0.65rem; cursor: pointer;
  white-space: nowrap; }
.plain:hover { border-color: var(--soft); }

/* The text */
#page { display: grid; grid-template-columns: minmax(0, 1fr) 24.5rem; gap: 3rem; padding-block: 1.75rem 6rem; }
main { grid-area: 1 / 1; max-width: 56rem; }
.s { display: grid; grid-template-columns: 7.5rem minmax(0, 1fr); gap: 0 1.25rem; }
.s.new:not(:first-child) { margin-top: 1.75rem; }
.s h3 { font-size: 0.8125rem; line-height: 1.75rem; text-align: right; overflow-wrap: anywhere; }
.s h3 b { font: italic 1rem/1.75rem var(--serif); display: block; }
.s h3 small { font-size: 0.6875rem; line-height: 1.25rem; color: var(--soft); display: block; }
.x { font: 0.875rem/1.75rem var(--mono); white-space: break-spaces; overflow-wrap: anywhere; tab-size: 4;
  font-variant-ligatures: none; min-width: 0; }
.t { background: var(--c); padding-block: 0.19rem; border-radius: 2px; box-shadow: inset -1px 0 color-mix(in srgb,
  var(--paper) 60%, transparent); cursor: pointer;
  scroll-margin: calc(var(--bar) + 2rem) 0 5rem; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.t.off { background: none; color: light-dark(#8e8a82, #75726c); }
.t.also { background: none; box-shadow: inset 0 -2px var(--chosen); }
.t:hover, .t[data-at] { outline: 1.5px solid var(--ink); outline-offset: 0; position: relative; }
.t:focus-visible { outline: 2.5px solid var(--focus); z-index: 1; }
.t i { font-style: normal; color: color-mix(in oklab, var(--ink) 55%, transparent); }
.t i[data-c]::before { content: attr(data-c); }
.ids .t { display: inline-block; padding-inline: 0.2em; margin-right: 0.25em; }
.numbered .x { line-height: 2.4rem; letter-spacing: var(--room); }
.numbered .t { position: relative; }
.numbered .t::after { content: attr(data-n); position: absolute; left: 0; top: 1.5rem; font: 0.5625rem/1.1 var(--sans);
  letter-spacing: 0; color: var(--soft); white-space: nowrap; pointer-events: none; }

.s h3 small:first-child { line-height: 1.75rem; }
.numbered .off::after { opacity: 0.5; }

/* The side */
aside { grid-area: 1 / 2; position: sticky; top: calc(var(--bar) + 1rem); align-self: start; overflow-y: auto;
  max-height: calc(100vh - var(--bar) - 2rem); scrollbar-width: thin; padding: 2px; }
aside > section, aside > details { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.85rem 1rem 1rem; margin-bottom: 0.85rem; }
h2 { font-size: 0.8125rem; font-weight: 600; display: inline; }
summary { cursor: pointer; list-style-position: outside; margin-left: 0.9rem; }
summary h2 + span { margin-left: 0.5em; }
.chip { display: inline-block; min-width: 1.9rem; padding: 0 0.3rem; border: 0; border-radius: 5px;
  background: var(--c);
  text-align: center; font: 0.75rem/1.4rem var(--sans); font-variant-numeric: tabular-nums; cursor: pointer; }
.chip:hover, .chip[aria-pressed=true] { box-shadow: 0 0 0 1.5px var(--ink); }
.track { position: relative; height: 0.55rem; background: var(--track); border-radius: 3px; }
.track > i { display: block; height: 100%; border-radius: 3px; background: var(--d); }
.track > b { position: absolute; inset-block: -3px; border-left: 1.5px dashed var(--soft); }

#glyph { display: flex; gap: 0.9rem; align-items: center; margin-bottom: 0.8rem; min-height: 3rem; }
#glyph b { font: 1.375rem/2.5rem var(--mono); padding: 0.1rem 0.7rem; border-radius: 7px; background: var(--c);
  min-width: 2.75rem;
  text-align: center; max-width: 11rem; overflow: hidden; text-overflow: ellipsis; white-space: pre;
    unicode-bidi: isolate; }
#glyph p { font-size: 0.8125rem; line-height: 1.3rem; }
.choice { display: grid; grid-template-columns: 2.4rem 1fr 2rem; gap: 0.6rem; align-items: center;
  font-size: 0.8125rem; min-height: 1.65rem; }
.choice span:last-child { text-align: right; }
#choices.wide { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; }
#token h3 { margin: 0.7rem 0 0.25rem; }
.row { display: grid; grid-template-columns: 2.4rem 1fr; gap: 0.6rem; align-items: center; font-size: 0.75rem; }
.row > span { color: var(--soft); border-radius: 4px; padding-inline: 0.3rem; text-align: right; }
.row.now > span { color: var(--paper); background: var(--ink); }
.row > div { display: flex; height: 1.05rem; margin-block: 1px; background: var(--track); border-radius: 3px;
  overflow: hidden; }
.row i { font: 0.6875rem/1.05rem var(--sans); text-align: center; background: var(--c); overflow: hidden;
  box-shadow: inset -1px 0 var(--panel); font-variant-numeric: tabular-nums; }

#legend { display: grid; grid-template-columns: repeat(8, 1fr); gap: 0.3rem;
  margin: 0.4rem -3px 0; padding: 3px; max-height: 13.5rem; overflow-y: auto; scrollbar-width: thin; }
#expert { margin-top: 0.9rem; padding-top: 0.8rem; border-top: 1px solid var(--line); }
#expert h3 { font-size: 0.875rem; font-weight: 600; display: flex; gap: 0.6rem; align-items: center; }
#expert h4 { margin: 0.8rem 0 0.3rem; font-size: 0.75rem; font-weight: 400; color: var(--soft); }
.share { display: grid; grid-template-columns: 6.5rem 1fr 3.6rem; gap: 0.6rem; align-items: center;
  font-size: 0.8125rem; }
.share span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.share span:last-child { text-align: right; }
#words { display: flex; flex-wrap: wrap; gap: 0.3rem; list-style: none; }
#words li { border: 1px solid var(--line); border-radius: 5px; padding: 0 0.4rem; font-size: 0.75rem; white-space: pre;
  max-width: 100%; overflow: hidden; text-overflow: ellipsis; unicode-bidi: isolate; }
#words b { font: 0.8125rem/1.5rem var(--mono); }

.load { margin-top: 0.8rem; content-visibility: auto; contain-intrinsic-size: auto 4.5rem; }
.load p { display: flex; justify-content: space-between; gap: 1rem; font-size: 0.8125rem; }
.load p span:first-child { overflow-wrap: anywhere; }
.bars { position: relative; display: flex; align-items: end; height: 2.9rem; border-bottom: 1px solid var(--soft); }
.bars a { flex: 1; height: 100%; display: flex; align-items: end; cursor: pointer; padding-inline: min(1px, 6%); }
.bars a i { display: block; width: 100%; background: var(--d); border-radius: 2px 2px 0 0; }
.bars a:hover { background: var(--track); }
.chosen .bars a:not(.on) i { opacity: 0.3; }
.bars > b { position: absolute; inset-inline: 0; border-top: 1.5px dashed var(--soft); pointer-events: none; }
#axis { display: flex; font-size: 0.625rem; line-height: 1.1rem; color: var(--soft); }
#axis span { flex: 1; width: 0; display: flex; justify-content: center; white-space: nowrap; }
.note { font-size: 0.75rem; color: var(--soft); margin-top: 0.5rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.75rem; font-variant-numeric: tabular-nums;
  margin-top: 0.5rem; }
th { font-weight: 400; color: var(--soft); text-align: right; padding: 0.1rem 0 0.3rem 0.6rem;
  vertical-align: bottom; line-height: 1.2; max-width: 5em; }
td { text-align: right; padding: 0.12rem 0 0.12rem 0.6rem; }
td .track { height: 3px; margin-top: 1px; }
td .track > i { background: var(--soft); }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
tbody tr.now { font-weight: 600; }
tbody tr.now .track > i { background: var(--ink); }
#layers button { border: 0; background: none; padding: 0 0.6rem; border-radius: 4px; cursor: pointer; }
#layers button:hover { background: var(--track); }
#layers .now button { color: var(--paper); background: var(--ink); }
.scroll { overflow-x: auto; }
kbd { font: 0.6875rem var(--mono); border: 1px solid var(--line); border-bottom-width: 2px; border-radius: 4px;
  padding: 0 0.3rem; }
#now { display: none; }

@media (max-width: 75rem) {
  .s { display: block; }
  .s h3 { text-align: left; display: flex; gap: 0.6rem; align-items: baseline; }
  #page { gap: 2rem; }
}
@media (max-width: 60rem) {
  header { padding-block: 1.25rem 0.9rem; align-items: start; }
  h1 { font-size: 1.5rem; }
  header, #bar, #page { padding-inline: 1rem; }
  #title { display: block; margin-bottom: 0.3rem; }
  #page { display: block; padding-top: 1rem; }
  aside { position: static; max-height: none; overflow: visible; }
  html { scroll-padding-bottom: 5rem; }
  #filter { margin-left: 0; }
  #legend { grid-template-columns: repeat(auto-fill, minmax(2.6rem, 1fr)); max-height: 40vh; }
  #now { display: block; position: fixed; inset: auto 0 0; z-index: 2; padding: 0.55rem 1rem; background: var(--panel);
    border-top: 1px solid var(--line); font-size: 0.8125rem; }
}
@media print { #bar, aside, #now, #theme { display: none !important; } #page { display: block; } }
</style>
</head>
<body>
<header>
  <div><h1>What the experts learn</h1><p><span id="title"></span><span id="about"></span></p></div>
  <button id="theme" class="plain" type="button"></button>
</header>
<div id="bar">
  <label for="layer">Layer <output id="layer-out" for="layer"></output> <span class="soft number">0</span>
    <input id="layer" type="range" min="0" step="1"> <span id="layer-last" class="soft number"></span></label>
  <label><input id="numbers" type="checkbox"> Expert numbers</label>
  <div id="filter" hidden>
    <span id="filter-text"></span>
    <button id="previous" class="plain" type="button">Previous</button>
    <button id="next" class="plain" type="button">Next</button>
    <button id="clear" class="plain" type="button">Clear</button>
  </div>
</div>
<div id="page">
  <aside aria-label="Token, experts, domains and layers">
    <section id="token" aria-labelledby="token-title">
      <h2 id="token-title" class="hidden">Token</h2>
      <div id="glyph"></div>
      <h3 id="choices-of" class="note"></h3>
      <div id="choices"></div>
      <h3 class="note">Experts and weights in each layer</h3>
      <div id="path" aria-hidden="true"></div>
    </section>
    <section aria-labelledby="experts-title">
      <h2 id="experts-title">Experts</h2> <span id="experts-of" class="soft"></span>
      <div id="legend" role="group" aria-labelledby="experts-title"></div>
      <div id="expert" hidden></div>
    </section>
    <details id="load" open>
      <summary><h2>Load by domain</h2><span class="soft" id="load-of"></span></summary>
      <div id="charts"></div>
      <div id="axis" aria-hidden="true"></div>
      <p class="note" id="load-note"></p>
      <details id="load-numbers"><summary class="note">As a table</summary>
        <div id="load-table" class="scroll"></div></details>
    </details>
    <details id="layers" open>
      <summary><h2>Layers</h2></summary>
      <div id="layer-table" class="scroll"></div>
      <p class="note" id="layer-note"></p>
    </details>
    <details>
      <summary><h2>Keys</h2></summary>
      <p class="note"><kbd>Tab</kbd> leads into the text, <kbd>←</kbd> <kbd>→</kbd> <kbd>↑</kbd> <kbd>↓</kbd> from token
        to token, <kbd>Home</kbd> and <kbd>End</kbd> to the ends of a section. <kbd>Enter</kbd> shows the tokens of its
        first expert, <kbd>n</kbd> and <kbd>p</kbd> lead to the next and the previous of them, <kbd>Esc</kbd> shows all
        again. <kbd>-</kbd> and <kbd>+</kbd>, or <kbd>[</kbd> and <kbd>]</kbd>: the layer below and above.</p>
    </details>
  </aside>
  <main id="text" aria-label="Text. Arrow keys walk through its tokens."></main>
</div>
<p id="now" aria-hidden="true"></p>
<p id="status" class="hidden" role="status" aria-live="polite"></p>
<noscript>This page needs JavaScript, which it brings itself.</noscript>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const L = data.layers, E = data.experts, K = data.k, N = data.tokens;

function bytes(base64) {
  const text = atob(base64), out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}
function words(base64) {                                // little-endian, whatever this machine is
  const b = bytes(base64), out = new Uint16Array(b.length >> 1);
  for (let i = 0; i < out.length; i++) out[i] = b[2 * i] | b[2 * i + 1] << 8;
  return out;
}
const ids = words(data.ids), choices = bytes(data.choices), weights = bytes(data.weights), losses = words(data.losses);
const replaced = new Map(data.shown);                   // position -> what stands there in the place of its own text
const sections = data.sections;
const state = {layer: 0, expert: -1, at: 0, numbers: false};

const $ = id => document.getElementById(id);
function make(tag, name, ...children) {                 // texts become text nodes, never HTML
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
}
const count = n => n.toLocaleString("en");
const percent = x => (100 * x).toFixed(1) + " %";
const width = x => (100 * Math.max(0, Math.min(1, x))).toFixed(2) + "%";
const choice = (p, l, j) => choices[(p * L + l) * K + j];
const weight = (p, l, j) => weights[(p * L + l) * K + j] / 255;

// ------------------------------------------------------------------------------------------------
// Colours. Neighbours in number are far in hue; experts with a similar hue differ in lightness, which all eyes see. The
// text on them keeps a contrast of more than 4.5 in both themes.

function colours() {
  const tiers = [[0.90, 0.070], [0.83, 0.095], [0.93, 0.045], [0.86, 0.105], [0.79, 0.085]];
  const dark = [[0.45, 0.085], [0.40, 0.100], [0.49, 0.065], [0.43, 0.115], [0.36, 0.085]];
  let css = "";
  for (let e = 0; e < E; e++) {
    const hue = ((e * 137.508 + 75) % 360).toFixed(1), [l, c] = tiers[e % 5], [dl, dc] = dark[e % 5];
    css += `.e${e}{--c:light-dark(oklch(${l} ${c} ${hue}),oklch(${dl} ${dc} ${hue}));` +
           `--d:light-dark(oklch(${l - 0.17} ${c + 0.04} ${hue}),oklch(${dl + 0.2} ${dc + 0.03} ${hue}))}`;
  }
  document.head.append(make("style", "", css));
}

// ------------------------------------------------------------------------------------------------
// Text. What can't be seen gets a sign: line breaks and tabs stay beside theirs, other control characters, and
// marks that turn the direction of a text, are replaced. A token that has no text (a part of a character) is a dot.

const INVISIBLE = /[\0-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/;
const EACH_INVISIBLE = new RegExp(INVISIBLE.source, "g");

function sign(c) {
  const code = c.charCodeAt(0);
  if (c === "\n") return "⏎";
  if (c === "\t") return "⇥";
  if (code < 32) return String.fromCharCode(0x2400 + code);
  if (code === 127) return "␡";
  return "[U+" + code.toString(16).toUpperCase().padStart(4, "0") + "]";
}
const text_of = p => replaced.has(p) ? replaced.get(p) : data.vocab[ids[p]];

// As one line, for lists and status
function shown(text) {
  if (text === "") return "·";
  if (/^[\u200c\u200d]$/.test(text)) return sign(text);
  return text.replace(EACH_INVISIBLE, sign).replace(/^ +| +$/g, s => "␣".repeat(s.length));
}

function token_node(text) {
  const node = make("span", "t"), joiner = /^[\u200c\u200d]$/.test(text);
  for (const c of text === "" ? [""] : text) {
    if (c === "" || c === "\n" || c === "\t") {
      const mark = make("i", "", c);
      mark.dataset.c = c === "" ? "·" : sign(c);
      node.append(mark);
    } else if (joiner || INVISIBLE.test(c)) node.append(make("i", "", sign(c)));
    else node.append(c);
  }
  node.normalize();                                     // one text node, for letters that change beside others
  return node;
}

// ------------------------------------------------------------------------------------------------
// Sections: each is plain text until it comes near the window, then a span a token. What is far keeps its colours until
// it comes near again: so a change of layer takes as long for a short text as for a long one.

const views = [];                   // of each section: box, begin, end, where its piece begins, built, near, stale
const nodes = new Map();                                // index in vocab -> a span to copy

function build(view) {
  if (view.built) return;
  const all = document.createDocumentFragment();
  for (let p = view.begin; p < view.end; p++) {
    let node;
    if (replaced.has(p)) node = token_node(replaced.get(p));
    else {
      if (!nodes.has(ids[p])) nodes.set(ids[p], token_node(data.vocab[ids[p]]));
      node = nodes.get(ids[p]).cloneNode(true);
    }
    node.dataset.p = p;
    all.append(node);
  }
  view.box.replaceChildren(all);
  view.built = true;
  paint(view);
}

function paint(view) {
  view.stale = false;
  const spans = view.box.children, {layer, expert} = state;
  for (let p = view.begin, i = 0; p < view.end; p++, i++) {
    const at = (p * L + layer) * K, first = choices[at];
    let name = "t e" + first;
    if (expert >= 0 && first !== expert) {
      name = "t off";
      for (let j = 1; j < K; j++) if (choices[at + j] === expert) name = "t also";
    }
    spans[i].className = name;
    if (state.numbers) spans[i].dataset.n = first;
  }
}
function paint_all() {
  for (const view of views) if (view.built) { if (view.near) paint(view); else view.stale = true; }
}

const near = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const view = views[entry.target.dataset.s];
    view.near = entry.isIntersecting;
    if (view.near && !view.built) build(view);
    else if (view.near && view.stale) paint(view);
  }
}, {rootMargin: "1000px 0px"});

function layout_text() {
  sections.forEach((section, s) => {
    const before = s > 0 ? sections[s - 1] : {domain: -1}, goes_on = section.piece === before.piece;
    const end = s + 1 < sections.length ? sections[s + 1].begin : N;
    const box = make("div", "x"), heading = make("h3", "");
    box.dir = "auto";
    if (section.domain !== before.domain) heading.append(make("b", "", data.domains[section.domain].name));
    heading.append(make("small", "", "piece " + count(section.piece)));
    const root = make("section", "s", heading, box);
    root.dataset.s = s;
    root.classList.toggle("new", goes_on || section.domain !== before.domain);       // another document
    let text = "";
    for (let p = section.begin; p < end; p++) text += text_of(p).replace(EACH_INVISIBLE, c =>
      c === "\n" ? "⏎\n" : c === "\t" ? "⇥\t" : sign(c)) || "·";
    box.textContent = text;
    const piece = goes_on ? views[s - 1].piece : section.begin;
    views.push({root, box, begin: section.begin, end, piece, built: false, near: false, stale: false});
    $("text").append(root);
  });
  if (data.vocab.length && data.vocab.every(text => /^#\d+$/.test(text))) $("text").classList.add("ids");
  for (const view of views) near.observe(view.root);
}

function view_of(p) {                                   // the last section that begins at p or before
  let low = 0, high = views.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (views[middle].begin <= p) low = middle; else high = middle - 1;
  }
  return views[low];
}
function span_of(p) {
  const view = view_of(p);
  build(view);
  return view.box.children[p - view.begin];
}

// ------------------------------------------------------------------------------------------------
// One token

function chip(e) {
  const button = make("button", "chip e" + e, String(e));
  button.type = "button";
  button.dataset.e = e;
  button.setAttribute("aria-label", "expert " + e);
  return button;
}
const loss_text = p => losses[p] === 65535 ? "no loss: first of its piece"
  : `loss ${(losses[p] / 1000).toFixed(losses[p] < 100 ? 3 : 2)} (probability ${percent(Math.exp(-losses[p] / 1000))})`;

function sentence(p) {
  const l = state.layer, all = [];
  for (let j = 0; j < K; j++) all.push(`${choice(p, l, j)} (${weight(p, l, j).toFixed(2)})`);
  return `token ${shown(text_of(p))}, layer ${l}, ${K > 1 ? "experts" : "expert"} ${all.join(", ")}; ${loss_text(p)}`;
}

function show_token(p) {
  const view = view_of(p), section = sections[views.indexOf(view)], l = state.layer;
  const text = text_of(p), name = make("b", "e" + choice(p, l, 0), shown(text));
  $("glyph").replaceChildren(name, make("div", "",
    make("p", "number", loss_text(p)),
    make("p", "soft number", data.domains[section.domain].name, ", piece ", count(section.piece), ", token ",
      count(p - view.piece), text === "" ? ", without a text of its own" : "")));
  $("choices-of").textContent = `${K > 1 ? "Experts and their weights" : "Expert and its weight"} in layer ${l}`;
  $("choices").className = K > 4 ? "wide" : "";
  $("choices").replaceChildren(...Array.from({length: K}, (_, j) => {
    const e = choice(p, l, j), bar = make("i", "e" + e);
    bar.style.width = width(weight(p, l, j));
    const button = chip(e);
    button.tabIndex = -1;                               // the same expert is in the legend
    return make("div", "choice", button, make("div", "track", bar), make("span", "number", weight(p, l, j).toFixed(2)));
  }));
  $("path").replaceChildren(...Array.from({length: L}, (_, i) => {
    const all = make("div", "");
    for (let j = 0; j < K; j++) {
      const part = make("i", "e" + choice(p, i, j), weight(p, i, j) > 0.055 ? String(choice(p, i, j)) : "");
      part.style.width = width(weight(p, i, j));
      all.append(part);
    }
    return make("div", i === l ? "row now" : "row", make("span", "number", String(i)), all);
  }));
  $("now").textContent = sentence(p);
}

// Moves to a token: the one that the tab key finds, and whose experts are shown while the mouse is elsewhere.
function go(p, focus, block = "nearest") {
  const old = span_of(state.at), span = span_of(p);
  delete old.dataset.at;
  old.removeAttribute("tabindex");
  state.at = p;
  span.dataset.at = "";
  span.tabIndex = 0;
  show_token(p);
  if (!focus) return;
  span.focus({preventScroll: true});
  span.scrollIntoView({block});
  $("status").textContent = sentence(p);
  remember();
}

function line_step(p, way) {                            // the token above or below, nearest to the middle of this one
  const here = span_of(p).getClientRects()[0];
  const x = (here.left + here.right) / 2;
  let best = -1, distance = Infinity, top = null;
  for (let q = p + way; q >= 0 && q < N; q += way) {
    const rect = span_of(q).getClientRects()[0];
    if (!rect || Math.abs(rect.top - here.top) < 4) continue;
    if (top !== null && Math.abs(rect.top - top) > 4) break;
    top = rect.top;
    const d = Math.abs((rect.left + rect.right) / 2 - x);
    if (d < distance) [best, distance] = [q, d];
  }
  return best >= 0 ? best : way < 0 ? 0 : N - 1;
}

// ------------------------------------------------------------------------------------------------
// Experts

function layout_legend() {
  for (let e = 0; e < E; e++) $("legend").append(chip(e));
  $("legend").firstChild.tabIndex = 0;
  for (const button of [...$("legend").children].slice(1)) button.tabIndex = -1;
}

function choose(e) {
  state.expert = e === state.expert ? -1 : e;
  document.body.classList.toggle("chosen", state.expert >= 0);
  if (state.expert >= 0) {
    const probe = make("i", "e" + state.expert);
    document.body.append(probe);
    $("text").style.setProperty("--chosen", getComputedStyle(probe).getPropertyValue("--d"));
    probe.remove();
  }
  paint_all();
  show_expert();
  show_load();
  if (state.expert < 0) $("status").textContent = "all tokens";
  const side = document.querySelector("aside"), box = $("expert").getBoundingClientRect();
  side.scrollTop += Math.max(0, box.bottom + 16 - side.getBoundingClientRect().bottom);
  remember();
}

function share_row(name, x, most) {
  const bar = make("i", "e" + state.expert), even = make("b", "");
  bar.style.width = width(x / most);
  even.style.left = width(K / E / most);
  return make("div", "share", make("span", "", name), make("div", "track", bar, even),
    make("span", "number", percent(x)));
}

function show_expert() {
  const {expert: e, layer: l} = state;
  for (const button of $("legend").children) button.setAttribute("aria-pressed", Number(button.dataset.e) === e);
  $("experts-of").textContent = `of layer ${l}: choose one to see its tokens`;
  $("filter").hidden = $("expert").hidden = e < 0;
  if (e < 0) return;
  let first = 0, among = 0;
  for (let p = 0; p < N; p++)
    for (let j = 0; j < K; j++) if (choice(p, l, j) === e) { among++; if (j === 0) first++; }
  $("filter-text").textContent = `Expert ${e}: ${count(first)} tokens`;
  const shares = data.domains.map(d => d.tokens ? d.counts[l][e] / d.tokens : 0);
  const most = Math.max(2 * K / E, ...shares);
  const number = make("span", "chip e" + e, String(e));
  const top = (data.top && data.top[l] && data.top[l][e]) || [];
  const list = make("ol", "", ...top.map(word => make("li", "", make("b", "", shown(word.text)), " ",
    make("span", "soft number", `${Math.round(100 * word.share)} % of ${count(word.count)}`))));
  list.id = "words";
  $("expert").replaceChildren(
    make("h3", "", number, `Expert ${e} in layer ${l}`),
    make("p", "note", `First choice of ${count(first)} tokens here (filled), ` + (K > 1 ?
      `further choice of ${count(among - first)} (underlined).` : "")),
    make("h4", "", "Share of each domain’s tokens; the mark is an even share, " + percent(K / E)),
    ...data.domains.map((d, i) => share_row(d.name, shares[i], most)),
    make("h4", "", top.length ? "Favourite words: how often it is their first choice, of how many"
      : "No token that occurs often enough has it as its usual first choice"), list);
  $("status").textContent = `expert ${e} in layer ${l}: first choice of ${count(first)} tokens, among the choices of ` +
    `${count(among)}; ` + data.domains.map((d, i) => `${d.name} ${percent(shares[i])}`).join(", ");
}

function next_of_expert(way) {
  if (state.expert < 0) return;
  for (let step = 1, p = state.at; step <= N; step++) {
    p = (p + way + N) % N;
    if (choice(p, state.layer, 0) === state.expert) return go(p, true, "center");
  }
}

// ------------------------------------------------------------------------------------------------
// Load and layers

function layout_load() {
  for (const d of data.domains) {
    const bars = make("div", "bars", make("b", ""));
    for (let e = 0; e < E; e++) {
      const bar = make("a", "e" + e, make("i", ""));
      bar.dataset.e = e;
      bars.append(bar);
    }
    bars.setAttribute("role", "img");
    $("charts").append(make("div", "load", make("p", "", make("span", "", d.name, " ",
      make("span", "soft number", count(d.tokens) + " tokens")), make("span", "soft number", "")), bars));
  }
  const step = Math.max(1, Math.ceil(E / 16));
  for (let e = 0; e < E; e++) $("axis").append(make("span", "", e % step === 0 ? String(e) : ""));
}

// Beside each domain's name: the share of one expert, or with -1 of the busiest
function name_bars(expert) {
  data.domains.forEach((d, i) => {
    const row = $("charts").children[i], counts = d.counts[state.layer];
    const e = expert >= 0 ? expert : counts.indexOf(Math.max(...counts));
    const share = percent(d.tokens ? counts[e] / d.tokens : 0);
    row.firstChild.lastChild.textContent = expert >= 0 ? `expert ${e}: ${share}` : `most: expert ${e}, ${share}`;
    row.lastChild.setAttribute("aria-label", `load of ${E} experts; ${row.firstChild.lastChild.textContent}`);
  });
}

function show_load() {
  const {layer: l, expert} = state, even = K / E;
  let most = 2 * even;
  for (const d of data.domains) if (d.tokens) for (const n of d.counts[l]) most = Math.max(most, n / d.tokens);
  data.domains.forEach((d, i) => {
    const row = $("charts").children[i], bars = row.lastChild;
    for (let e = 0; e < E; e++) {
      const bar = bars.children[e + 1];
      bar.firstChild.style.height = width(d.tokens ? d.counts[l][e] / d.tokens / most : 0);
      bar.classList.toggle("on", e === expert);
    }
    bars.firstChild.style.bottom = width(even / most);
  });
  name_bars(expert);
  $("load-of").textContent = "in layer " + l;
  $("load-note").textContent = `% of a domain’s tokens that have the expert among their ${K}. Dashed: an even ` +
    `share, ${K}/${E} = ${percent(even)}.`;
  if ($("load-numbers").open) show_load_table();
}

function table(heads, rows) {
  const head = make("tr", "", ...heads.map(text => { const th = make("th", "", text); th.scope = "col"; return th; }));
  return make("table", "", make("thead", "", head), make("tbody", "", ...rows));
}
function show_load_table() {
  const rows = Array.from({length: E}, (_, e) => make("tr", e === state.expert ? "now" : "", make("td", "", String(e)),
    ...data.domains.map(d => make("td", "", percent(d.tokens ? d.counts[state.layer][e] / d.tokens : 0)))));
  $("load-table").replaceChildren(table(["expert", ...data.domains.map(d => d.name)], rows));
}

function show_layers() {
  const router = data.router || {}, saturation = data.saturation;
  const busiest = Math.max(1, ...(router.max_over_mean || []));
  const two = x => x.toFixed(2);                        // columns: heading, values, their form, what fills a bar
  const columns = [["entropy", router.entropy, two, Math.log(E) || 1],
                   ["max / mean", router.max_over_mean, two, busiest], ["dead", router.dead, String, 0]];
  if (saturation) columns.push(["saturation top 1", saturation.top1, percent, 1]);
  if (saturation && K > 1) columns.push([`top ${K}`, saturation.topk, percent, 1]);
  const rows = Array.from({length: L}, (_, l) => {
    const button = make("button", "number", String(l));
    button.type = "button";
    button.dataset.layer = l;
    button.setAttribute("aria-label", "layer " + l);
    const cells = columns.map(([name, values, form, whole]) => {
      const x = values ? values[l] : null;
      const cell = make("td", "", typeof x === "number" ? form(x) : "–");
      if (whole && typeof x === "number") {
        const bar = make("i", "");
        bar.style.width = width(x / whole);
        cell.append(make("div", "track", bar));
      }
      return cell;
    });
    return make("tr", l === state.layer ? "now" : "", make("td", "", button), ...cells);
  });
  const active = document.activeElement, layer = active && active.dataset.layer;
  $("layer-table").replaceChildren(table(["layer", ...columns.map(column => column[0])], rows));
  if (layer) $("layer-table").querySelector(`[data-layer="${Number(layer)}"]`).focus();
  const notes = [`Entropy of the router in nats, at most ${Math.log(E).toFixed(2)}`,
    "load of the busiest expert over the mean", "experts without a token"];
  if (saturation) notes.push("saturation: choices that the later checkpoint shares");
  $("layer-note").textContent = notes.join("; ") + ".";
}

function set_layer(l) {
  l = Math.max(0, Math.min(L - 1, l));
  state.layer = l;
  $("layer").value = l;
  $("layer-out").textContent = l;
  paint_all();
  show_expert();
  show_load();
  show_layers();
  if (N) {
    show_token(state.at);
    $("status").textContent = sentence(state.at);
  }
  remember();
}

// ------------------------------------------------------------------------------------------------
// The address keeps what is looked at: #layer=2&token=40&expert=5&theme=dark

let waiting = 0;
function remember() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const theme = document.documentElement.dataset.theme;
    try {
      history.replaceState(null, "", `#layer=${state.layer}&token=${state.at}` +
        (state.expert >= 0 ? `&expert=${state.expert}` : "") + (theme ? `&theme=${theme}` : ""));
    } catch (error) { }                                 // some viewers do not let a page do so
  }, 300);
}
function set_theme(theme) {
  document.documentElement.dataset.theme = theme;
  document.documentElement.style.colorScheme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function start() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const integer = (name, below) => {
    const x = wanted.get(name);
    return x !== null && /^\d{1,9}$/.test(x) && Number(x) < below ? Number(x) : -1;
  };
  data.title = shown(data.title);
  for (const d of data.domains) d.name = shown(d.name);
  document.title = data.title + ": what the experts learn";
  $("title").textContent = data.title;
  $("about").textContent = [`${L} ${L === 1 ? "layer" : "layers"}`,
    `${E} ${E === 1 ? "expert" : "experts"} in each, ${K} for a token`,
    N < data.of ? `${count(N)} of ${count(data.of)} tokens are shown` : `${count(N)} tokens`].join(" · ");
  const theme = wanted.get("theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  if (theme === "dark" || theme === "light") set_theme(theme);
  else $("theme").textContent = dark.matches ? "Light" : "Dark";
  $("layer").max = L - 1;
  $("layer-last").textContent = L - 1;
  $("text").style.setProperty("--room", E > 100 ? "0.6em" : E > 10 ? "0.25em" : "0");       // digits below a letter
  colours();
  layout_legend();
  layout_load();
  layout_text();
  if (matchMedia("(max-width: 60rem)").matches) $("load").open = $("layers").open = false;
  state.at = Math.max(0, integer("token", N));
  set_layer(Math.max(0, integer("layer", L)));
  if (N) go(state.at, wanted.has("token"), "center");
  if (integer("expert", E) >= 0) choose(integer("expert", E));
}

// ------------------------------------------------------------------------------------------------
// Mouse and keys. One listener for all tokens.

const token_at = event => {
  const span = event.target.closest && event.target.closest(".t");
  return span && span.dataset.p ? Number(span.dataset.p) : -1;
};
$("text").addEventListener("mouseover", event => { if (token_at(event) >= 0) show_token(token_at(event)); });
$("text").addEventListener("mouseleave", () => { if (N) show_token(state.at); });
$("text").addEventListener("click", event => { if (token_at(event) >= 0) go(token_at(event), true); });
$("text").addEventListener("focusin", event => {
  if (token_at(event) < 0 || $("text").contains(event.relatedTarget)) return;
  show_token(state.at);                                 // by the tab key
  $("status").textContent = sentence(state.at);
});
$("text").addEventListener("keydown", event => {
  if (token_at(event) < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
  const p = state.at, view = view_of(p);
  const steps = {ArrowLeft: () => p - 1, ArrowRight: () => p + 1, ArrowUp: () => line_step(p, -1),
                 ArrowDown: () => line_step(p, 1), Home: () => view.begin, End: () => view.end - 1};
  if (event.key in steps) go(Math.max(0, Math.min(N - 1, steps[event.key]())), true);
  else if (event.key === "Enter" || event.key === " ") choose(choice(p, state.layer, 0));
  else return;
  event.preventDefault();
});
$("charts").addEventListener("mouseover", event => {
  const bar = event.target.closest("a");
  name_bars(bar ? Number(bar.dataset.e) : state.expert);
});
$("charts").addEventListener("mouseleave", () => name_bars(state.expert));
$("legend").addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1}[event.key];
  if (!step) return;
  event.preventDefault();
  const old = event.target, button = $("legend").children[(Number(old.dataset.e) + step + E) % E];
  old.tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Escape" && state.expert >= 0) choose(-1);
  const layers = {"[": -1, "]": 1, "-": -1, "+": 1}, tokens = {n: 1, p: -1};
  if (event.key in layers) set_layer(state.layer + layers[event.key]);
  else if (event.key in tokens) next_of_expert(tokens[event.key]);
});
document.addEventListener("click", event => {
  const marked = event.target.closest("[data-e], [data-layer]");
  if (!marked) return;
  if (marked.dataset.e) choose(Number(marked.dataset.e));
  else set_layer(Number(marked.dataset.layer));
});
$("layer").addEventListener("input", () => set_layer(Number($("layer").value)));
$("numbers").addEventListener("change", () => {
  state.numbers = $("numbers").checked;
  $("text").classList.toggle("numbered", state.numbers);
  paint_all();
});
$("load-numbers").addEventListener("toggle", () => { if ($("load-numbers").open) show_load_table(); });
$("previous").addEventListener("click", () => next_of_expert(-1));
$("next").addEventListener("click", () => next_of_expert(1));
$("clear").addEventListener("click", () => choose(-1));
$("theme").addEventListener("click", () => { set_theme($("theme").textContent.toLowerCase()); remember(); });
addEventListener("beforeprint", () => views.forEach(build));
start();
</script>
</body>
</html>
)html";

// The page as HTML. The data, of which docs has no more than its writer, commands/routing.h:
//   title               name of the model
//   layers, experts, k  L, E (at most 256), K
//   tokens, of          n tokens are on the page, of so many that were analysed
//   domains             of the whole analysis: {name, tokens, counts (L, E): tokens that have the expert among their K}
//   vocab               text of each distinct token, "" where it has none of its own, "#17" without a tokenizer
//   ids                 (n), base64 of uint16, little-endian: index into vocab
//   shown               pairs {position, text}: what stands there in the place of vocab's text
//   sections            {domain, begin, piece}: where a piece or a document begins
//   choices, weights    (n, L, K), base64 of bytes: experts, first choice first; 255 times their weights, rounded
//   losses              (n), base64 of uint16, little-endian: 1000 times the loss, rounded; 65535: none
//   saturation          {top1 (L), topk (L)}, fractions of 1, or null
//   router              {entropy, max_over_mean, dead}, each (L)
//   top                 (L, E) lists of {text, share, count}
// No text ends the script element or begins a comment in it: each < is written as \u003c. What is no UTF-8 becomes
// U+FFFD.
inline std::string routing_page(const Json& data) {
    const std::string mark = "@DATA@";
    std::string json, page = routing_page_template;
    for (char c : data.dump(-1, ' ', false, Json::error_handler_t::replace)) {
        if (c == '<') json += "\\u003c";
        else json += c;
    }
    return page.replace(page.find(mark), mark.size(), json);
}
